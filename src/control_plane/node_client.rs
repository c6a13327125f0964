//! One request to one agent under one deadline, over pooled connections; and streams, each over its own.
//!
//! A connection carries one request at a time, and goes back to the pool only when its reply was read whole. An idle one that the
//! agent closed is replaced before anything is written. A connection lost later may have lost the reply alone, so only a request
//! that is idempotent by contract (all but Exec) is sent again, once. What comes of that may contradict what became of it the first time:
//! only an answer that is true of both counts ([`is_true_of_both`]).
//!
//! Invariant: nothing is asked of an agent but its name, as long as it has not said on that very connection that it is the one meant. An
//! address may be somebody else's from one moment to the next, and that one's "no such workload" is no truth of ours.
//! A change carries the revision of the record it is about as its `fence`, where the agent heeds one: what its sender gave up waiting
//! for, and what lies in a connection to an agent that hangs, is not done any more once the agent has seen what came after it.
//!
//! Invariant: idle connections <= `NODE_POOL_MAX`, and none was closed by the agent or idle for `NODE_IDLE_MS_MAX` before the last
//! [`NodeClient::sweep`]; a reply is a line <= `LINE_BYTES_MAX`, and what it says of a node is bounded ([`within_bounds`]).
//! Invariant: whoever waits here notices within `NODE_WAIT_SLICE_MS` that the control plane is stopping.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::Stopping;
use crate::deadline::{Deadline, Expired, Stopwatch};
use crate::limits;
use crate::net::line::{LineError, LineReader};
use crate::net::{self, Address, Stream};
use crate::report::clip;
use crate::wire::agent::{self, Class, Condition, ErrorCode, ErrorReply, Reply, Request, Unreadable};
use crate::workload::Name;

/// Why there is no reply.
#[derive(Debug)]
pub(super) enum Error {
    /// The agent closed the connection.
    Closed,
    /// There is no way to it.
    Connect(net::Error),
    /// It did not answer in time.
    Expired(Expired),
    /// Its line is no reply that this version knows.
    Garbled(Unreadable),
    /// No such node is configured.
    NoSuchNode,
    /// It said no.
    Refused(ErrorReply),
    /// The connection failed.
    Socket(net::Error),
    /// The agent at this address is another one. It was asked for nothing else.
    Somebody(Box<agent::Node>),
    /// We are stopping, and the wait was long.
    Stopping,
    /// Its line is over the limit.
    TooLong,
    /// A reply to something else.
    Unexpected,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the agent closed the connection"),
            Self::Connect(_) => f.write_str("no connection to the agent"),
            Self::Expired(expired) => expired.fmt(f),
            Self::Garbled(_) => f.write_str("the agent's reply is not of this protocol"),
            Self::NoSuchNode => f.write_str("the node is not configured any more"),
            Self::Refused(reply) => write!(f, "the agent says {:?}: {}", reply.code, reply.message),
            Self::Socket(_) => f.write_str("connection to the agent"),
            Self::Somebody(node) => write!(f, "the agent there calls itself {:?}", node.node_id),
            Self::Stopping => f.write_str("the control plane is stopping"),
            Self::TooLong => write!(f, "the agent's reply is longer than {} bytes", limits::LINE_BYTES_MAX),
            Self::Unexpected => f.write_str("the agent replied to something else"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connect(error) | Self::Socket(error) => Some(error),
            Self::Garbled(error) => Some(error),
            Self::Closed
            | Self::Expired(_)
            | Self::NoSuchNode
            | Self::Refused(_)
            | Self::Somebody(_)
            | Self::Stopping
            | Self::TooLong
            | Self::Unexpected => None,
        }
    }
}

impl Error {
    /// Whether the reply may be lost without a trace.
    fn is_lost_connection(&self) -> bool {
        match self {
            Self::Closed | Self::Socket(_) => true,
            Self::Connect(_)
            | Self::Expired(_)
            | Self::Garbled(_)
            | Self::NoSuchNode
            | Self::Refused(_)
            | Self::Somebody(_)
            | Self::Stopping
            | Self::TooLong
            | Self::Unexpected => false,
        }
    }

    /// Whether the agent, or the way to it, took longer than it was given.
    pub(super) fn is_hang(&self) -> bool {
        matches!(self, Self::Expired(_) | Self::Connect(net::Error::Expired(_)) | Self::Socket(net::Error::Expired(_)))
    }
}

/// Speaks with one agent.
#[derive(Debug)]
pub(super) struct NodeClient {
    /// What it must call itself.
    name: Name,
    address: Address,
    /// The one that was needed last is the last, and since when it is idle.
    idle: Mutex<Vec<(Stopwatch, Connection)>>,
    /// Added to each fence, so that it is above what the agent has seen of other stores.
    fence_raise: AtomicU64,
    stopping: Arc<Stopping>,
}

impl NodeClient {
    /// Nothing is connected yet.
    pub(super) fn new(name: Name, address: Address, stopping: Arc<Stopping>) -> Self {
        Self { name, address, idle: Mutex::default(), fence_raise: AtomicU64::new(0), stopping }
    }

    /// Where the agent listens.
    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// Asks, and waits for the reply; one that is an error is [`Error::Refused`].
    pub(super) fn request(&self, request: &Request, deadline: Deadline) -> Result<Reply, Error> {
        self.request_once(request, None, deadline)
    }

    /// As [`NodeClient::request`], for a change. Whoever sends one about the same workload later has a `fence` as high, or higher.
    pub(super) fn change(&self, request: &Request, fence: u64, deadline: Deadline) -> Result<Reply, Error> {
        let raised = || fence.saturating_add(self.fence_raise.load(Ordering::SeqCst)).min(agent::FENCE_MAX);
        let first = raised();
        match self.request_once(request, Some(first), deadline) {
            // The agent knows numbers of a store that was lost, or of a later state of this one. We are not late: we wait here.
            Err(Error::Refused(ErrorReply { fence: Some(seen), .. })) if seen > first => {
                log::warn!("node {}: it has seen fence {seen}, of another store than this one, or a later copy of it", self.name);
                let raise = seen.saturating_add(limits::REVISIONS_RESERVED).saturating_sub(fence);
                self.fence_raise.fetch_max(raise, Ordering::SeqCst);
                self.request_once(request, Some(raised()), deadline)
            }
            result => result,
        }
    }

    fn request_once(&self, request: &Request, fence: Option<u64>, deadline: Deadline) -> Result<Reply, Error> {
        let mut connection = self.take_idle().map_or_else(|| self.connect(deadline), Ok)?;
        let mut result = connection.ask(request, fence, deadline);
        if let (true, Some(lost)) = (is_idempotent(request), result.as_ref().err().filter(|error| error.is_lost_connection())) {
            let again = self.connect(deadline).map(|mut connection| match connection.ask(request, fence, deadline) {
                Err(Error::Refused(refusal)) if !is_true_of_both(request, refusal.code) => {
                    log::debug!("{}: {lost}, and then {refusal:?}", self.name);
                    None
                }
                result => Some((connection, result)),
            });
            match again {
                Ok(Some((other, second))) => (connection, result) = (other, second),
                // Nothing was learnt of the first one.
                Ok(None) | Err(Error::Refused(_)) => return result,
                Err(error) => return Err(error),
            }
        }
        if matches!(result, Ok(_) | Err(Error::Refused(_))) {
            self.give_back(connection);
        }
        result
    }

    /// Asks for what comes in many replies, over a connection of its own.
    pub(super) fn stream(&self, request: &Request, deadline: Deadline) -> Result<Replies, Error> {
        let mut connection = self.connect(deadline)?;
        connection.write(&request.to_line(None), deadline)?;
        Ok(Replies(connection))
    }

    /// A connection to an agent that has said that it is the one meant.
    fn connect(&self, deadline: Deadline) -> Result<Connection, Error> {
        let greeting = deadline;
        let deadline = deadline.at_most_ms(limits::NODE_CONNECT_MS_MAX, "connect to the agent");
        let stream = Stream::connect(&self.address, deadline).map_err(Error::Connect)?;
        let reader = LineReader::new(limits::LINE_BYTES_MAX, limits::LINE_MS_MAX);
        let mut connection = Connection { stream, reader, heeds_fences: false, stopping: Arc::clone(&self.stopping) };
        match connection.ask(&Request::GetNode, None, greeting) {
            Ok(Reply::Node(node)) if node.node_id == self.name.as_str() => {
                let heeds_fences = node.features.iter().any(|feature| feature == agent::FEATURE_FENCE);
                Ok(Connection { heeds_fences, ..connection })
            }
            Ok(Reply::Node(node)) => Err(Error::Somebody(node)),
            Err(Error::Refused(refusal)) if !is_of_agent(refusal.code) => Err(Error::Unexpected),
            Ok(_) => Err(Error::Unexpected),
            Err(error) => Err(error),
        }
    }

    /// An idle connection on which nothing happened since; what the agent closed or spoke on unasked is dropped.
    fn take_idle(&self) -> Option<Connection> {
        loop {
            let (_, mut connection) = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            if connection.is_quiet() {
                return Some(connection);
            }
        }
    }

    /// Closes idle connections that the agent closed, or that nobody needed for long. Those that are needed are taken from the other
    /// end, so that nobody else would ever look at these.
    pub(super) fn sweep(&self) {
        let mut pooled = std::mem::take(&mut *self.idle.lock().unwrap_or_else(PoisonError::into_inner));
        pooled.retain_mut(|(idle, connection)| idle.elapsed_ms() < limits::NODE_IDLE_MS_MAX && connection.is_quiet());
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        pooled.append(&mut idle);
        pooled.truncate(limits::NODE_POOL_MAX);
        *idle = pooled;
    }

    fn give_back(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < limits::NODE_POOL_MAX {
            idle.push((Stopwatch::start(), connection));
        }
    }
}

/// A reply of which no text is longer than is kept, and no list longer than is looked through. A name that is too long is no name.
fn within_bounds(reply: Reply) -> Reply {
    let text = |text: String| clip(text, limits::MESSAGE_BYTES_MAX);
    match reply {
        Reply::Node(node) => {
            let agent::Node { node_id, ready, conditions, runtime_classes, capacity, allocated, labels, version, features, .. } = *node;
            let condition = |Condition { r#type, ok, message }| Condition { r#type: text(r#type), ok, message: text(message) };
            let is_class = |class: &Class| class.name.len() <= limits::NAME_BYTES_MAX;
            let class = |Class { name, handler, own_kernel, available, overhead_mb, memory_mb_min, runtime }| {
                let (handler, runtime) = (text(handler), runtime.map(text));
                Class { name, handler, own_kernel, available, overhead_mb, memory_mb_min, runtime }
            };
            let is_label = |(key, value): &(String, Value)| {
                key.len() <= limits::LABEL_BYTES_MAX && value.as_str().is_some_and(|value| value.len() <= limits::LABEL_BYTES_MAX)
            };
            Reply::Node(Box::new(agent::Node {
                node_id: text(node_id),
                ready,
                conditions: conditions.into_iter().take(limits::NODE_CONDITIONS_MAX).map(condition).collect(),
                runtime_classes: runtime_classes.into_iter().filter(is_class).take(limits::CLASSES_MAX).map(class).collect(),
                capacity,
                allocated,
                labels: labels.into_iter().filter(is_label).take(limits::LABELS_MAX).collect(),
                version: text(version),
                features: features.into_iter().take(limits::NODE_FEATURES_MAX).map(text).collect(),
                host_kernel: text(node.host_kernel),
                started_at: node.started_at,
                observed_at: node.observed_at,
                stopping: node.stopping,
                oldest_stopping_ms: node.oldest_stopping_ms,
            }))
        }
        Reply::Error(refusal) => Reply::Error(ErrorReply { message: clip(refusal.message, limits::REFUSAL_BYTES_MAX), ..refusal }),
        reply => reply,
    }
}

/// Whether a request that may have been done can be sent again. A second Exec would run the command twice.
fn is_idempotent(request: &Request) -> bool {
    match request {
        Request::Exec { .. } => false,
        Request::Auth { .. }
        | Request::CollectImages { .. }
        | Request::DeleteWorkload { .. }
        | Request::GetLogs(_)
        | Request::GetNode
        | Request::GetStatus { .. }
        | Request::ListWorkloads { .. }
        | Request::Ping
        | Request::StartWorkload { .. }
        | Request::StopWorkload { .. }
        | Request::UpdateWorkload { .. }
        | Request::Watch { .. } => true,
    }
}

/// Whether a refusal says something about the agent as a whole, and not about a workload.
fn is_of_agent(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::Internal | ErrorCode::ResourceExhausted | ErrorCode::Unauthenticated | ErrorCode::Unavailable)
}

/// Whether the refusal of a request that was sent again, for the reply to the first one was lost, says that the first was refused too.
/// A start that an agent accepted and then is too busy to hear of again is under way.
fn is_true_of_both(request: &Request, code: ErrorCode) -> bool {
    let is_final = matches!(code, ErrorCode::AlreadyExists | ErrorCode::InvalidArgument | ErrorCode::PermissionDenied);
    is_final || !matches!(request, Request::StartWorkload { .. })
}

/// Replies that come one after the other.
#[derive(Debug)]
pub(super) struct Replies(Connection);

impl Replies {
    /// The next one; `None` when there was none until `wait`.
    pub(super) fn next(&mut self, wait: Deadline) -> Result<Option<Reply>, Error> {
        match self.0.receive(wait) {
            Ok(reply) => Ok(Some(reply)),
            Err(Error::Expired(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The next one, if it was read already.
    pub(super) fn ready(&mut self) -> Result<Option<Reply>, Error> {
        self.next(Deadline::within_ms(0, "ready"))
    }
}

#[derive(Debug)]
struct Connection {
    stream: Stream,
    reader: LineReader,
    /// An agent of an earlier version refuses what it does not know.
    heeds_fences: bool,
    stopping: Arc<Stopping>,
}

impl Connection {
    /// Whether it is open, and nothing was said on it.
    fn is_quiet(&mut self) -> bool {
        matches!(self.stream.read_ready(&mut [0]), Ok(None))
    }

    fn ask(&mut self, request: &Request, fence: Option<u64>, deadline: Deadline) -> Result<Reply, Error> {
        self.write(&request.to_line(fence.filter(|_| self.heeds_fences)), deadline)?;
        self.receive(deadline)
    }

    fn write(&mut self, line: &[u8], deadline: Deadline) -> Result<(), Error> {
        self.stream.write_all(line, deadline).map_err(|error| match error {
            net::Error::Closed => Error::Closed,
            net::Error::Expired(expired) => Error::Expired(expired),
            net::Error::Io(_) => Error::Socket(error),
        })
    }

    /// Waits in slices, to notice a stop; an [`Error::Expired`] leaves the connection usable for whoever waits on.
    fn receive(&mut self, deadline: Deadline) -> Result<Reply, Error> {
        loop {
            let slice = deadline.at_most_ms(limits::NODE_WAIT_SLICE_MS, "reply");
            return match self.reader.next(&mut self.stream, slice) {
                Ok(Some(line)) => match Reply::parse(line).map(within_bounds) {
                    Ok(Reply::Error(refusal)) => Err(Error::Refused(refusal)),
                    Ok(reply) => Ok(reply),
                    Err(error) => Err(Error::Garbled(error)),
                },
                Ok(None) | Err(LineError::HalfLine) => Err(Error::Closed),
                Err(LineError::Idle(_)) if self.stopping.is_set() => Err(Error::Stopping),
                Err(LineError::Idle(_)) if deadline.left().is_ok() => continue,
                Err(LineError::Idle(_)) => Err(Error::Expired(deadline.expired())),
                Err(LineError::Slow(_)) => Err(Error::Socket(net::Error::Expired(deadline.expired()))),
                Err(LineError::Socket(error)) => Err(Error::Socket(error)),
                Err(LineError::TooLong(_)) => Err(Error::TooLong),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::super::scheduler::tests::node;
    use super::*;
    use crate::net::listen::{Listener, Server, Service};

    /// An agent that says its name whenever it is asked, counts other requests and answers each with the next of its lines; an empty one
    /// closes the connection.
    struct Scripted {
        name: &'static str,
        heeds_fences: bool,
        lines: Vec<&'static str>,
        asked: AtomicUsize,
        fences: Mutex<Vec<Option<u64>>>,
    }

    impl Service for Scripted {
        fn serve(&self, mut stream: Stream, _stopping: &AtomicBool) {
            let mut reader = LineReader::new(limits::LINE_BYTES_MAX, 1000);
            while let Ok(Some(asked)) = reader.next(&mut stream, soon()) {
                if asked == Request::GetNode.to_line(None).trim_ascii_end() {
                    let features = if self.heeds_fences { vec![agent::FEATURE_FENCE.to_owned()] } else { Vec::new() };
                    let greeting = Reply::Node(Box::new(agent::Node { features, ..node(self.name, &[]) })).to_line(None);
                    if stream.write_all(&greeting, soon()).is_err() {
                        return;
                    }
                    continue;
                }
                self.fences.lock().expect("not poisoned").push(Request::parse(asked).fence);
                let line = self.lines.get(self.asked.fetch_add(1, Ordering::SeqCst)).copied().unwrap_or_default();
                if line.is_empty() || stream.write_all(line.as_bytes(), soon()).is_err() {
                    return;
                }
            }
        }

        fn busy(&self) -> &'static [u8] {
            b""
        }
    }

    fn soon() -> Deadline {
        Deadline::within_ms(5000, "test")
    }

    fn name() -> Name {
        Name::new("node-1").expect("a name")
    }

    fn with_agent(lines: &[&'static str], act: impl FnOnce(&NodeClient, &Server)) -> usize {
        with_agent_called("node-1", lines, act)
    }

    fn with_agent_called(name: &'static str, lines: &[&'static str], act: impl FnOnce(&NodeClient, &Server)) -> usize {
        let listener = Listener::bind(&Address::parse("127.0.0.1:0").expect("an address")).expect("a port");
        run(listener, &Arc::new(scripted(name, lines)), act)
    }

    fn scripted(name: &'static str, lines: &[&'static str]) -> Scripted {
        Scripted { name, heeds_fences: true, lines: lines.to_vec(), asked: AtomicUsize::new(0), fences: Mutex::default() }
    }

    fn run(listener: Listener, agent: &Arc<Scripted>, act: impl FnOnce(&NodeClient, &Server)) -> usize {
        let server = Server::start(listener, "agent", Arc::clone(agent)).expect("a thread");
        act(&NodeClient::new(self::name(), server.address().clone(), Arc::default()), &server);
        server.stop(1000);
        agent.asked.load(Ordering::SeqCst)
    }

    const PONG: &str = "{\"type\":\"Pong\",\"version\":\"1\",\"new\":1}\n";
    const NO: &str = "{\"type\":\"Error\",\"code\":\"NotFound\",\"message\":\"no\"}\n";

    #[test]
    fn one_connection_serves_many_requests() {
        let asked = with_agent(&[PONG, NO, PONG], |client, server| {
            assert!(matches!(client.request(&Request::Ping, soon()), Ok(Reply::Pong { .. })));
            assert!(matches!(client.request(&Request::Ping, soon()), Err(Error::Refused(_))));
            assert!(matches!(client.request(&Request::Ping, soon()), Ok(Reply::Pong { .. })));
            assert_eq!(server.connections(), 1);
        });
        assert_eq!(asked, 3);
    }

    #[test]
    fn an_idempotent_request_survives_one_lost_connection() {
        assert_eq!(with_agent(&["", PONG], |client, _| assert!(client.request(&Request::Ping, soon()).is_ok())), 2);
        let asked = with_agent(&["", "", PONG], |client, _| {
            assert!(matches!(client.request(&Request::Ping, soon()), Err(Error::Closed)));
        });
        assert_eq!(asked, 2);
    }

    const OVERTAKEN: &str = "{\"type\":\"Error\",\"code\":\"Unavailable\",\"message\":\"late\",\"fence\":40}\n";

    #[test]
    fn a_change_is_numbered_where_the_agent_heeds_it_and_only_there() {
        let check = |heeds_fences: bool, lines: &[&'static str], fences: &[Option<u64>]| {
            let listener = Listener::bind(&Address::parse("127.0.0.1:0").expect("an address")).expect("a port");
            let agent = Arc::new(Scripted { heeds_fences, ..scripted("node-1", lines) });
            run(listener, &agent, |client, _| {
                let stop = Request::StopWorkload { id: crate::workload::WorkloadId::new("a").expect("an id"), wait_ms: None };
                assert!(matches!(client.change(&stop, 7, soon()), Ok(Reply::Pong { .. })));
            });
            assert_eq!(*agent.fences.lock().expect("not poisoned"), fences);
        };
        check(true, &[PONG], &[Some(7)]);
        check(false, &[PONG], &[None]);
        check(true, &["", PONG], &[Some(7), Some(7)]);
        // Of a store that was lost; nothing of that one that comes later still has so high a number.
        check(true, &[OVERTAKEN, PONG], &[Some(7), Some(40 + limits::REVISIONS_RESERVED)]);
    }

    #[test]
    fn what_comes_after_a_raised_number_is_raised_as_well() {
        let listener = Listener::bind(&Address::parse("127.0.0.1:0").expect("an address")).expect("a port");
        let last = "{\"type\":\"Error\",\"code\":\"Unavailable\",\"message\":\"late\",\"fence\":9007199254740991}\n";
        let agent = Arc::new(scripted("node-1", &[OVERTAKEN, PONG, PONG, last, PONG]));
        run(listener, &agent, |client, _| {
            let stop = Request::StopWorkload { id: crate::workload::WorkloadId::new("a").expect("an id"), wait_ms: None };
            for fence in [7, 8, 9] {
                assert!(client.change(&stop, fence, soon()).is_ok());
            }
        });
        let raised = |fence: u64| Some(fence + 33 + limits::REVISIONS_RESERVED);
        let expect = [Some(7), raised(7), raised(8), raised(9), Some(agent::FENCE_MAX)];
        assert_eq!(*agent.fences.lock().expect("not poisoned"), expect);
    }

    #[test]
    fn another_agent_is_asked_for_nothing() {
        let asked = with_agent_called("node-2", &[NO], |client, _| {
            let delete = Request::DeleteWorkload { id: crate::workload::WorkloadId::new("a").expect("an id"), wait_ms: None };
            let error = client.request(&delete, soon()).expect_err("somebody else");
            assert_eq!(error.to_string(), "the agent there calls itself \"node-2\"");
            assert!(matches!(client.stream(&Request::Watch { since: None }, soon()), Err(Error::Somebody(_))));
            assert!(matches!(client.request(&Request::GetNode, soon()), Err(Error::Somebody(_))));
        });
        assert_eq!(asked, 0);
    }

    #[test]
    fn a_refusal_of_the_second_start_is_none_of_the_first() {
        let start = || {
            let name = Name::new("gvisor").expect("a name");
            let draft = super::super::store::tests::draft(r#"{"image":"busybox"}"#);
            let workload = Box::new(draft.resolve(crate::workload::WorkloadId::new("a").expect("an id"), name));
            Request::StartWorkload { workload, wait_ms: None }
        };
        let check = |code: &str, is_final: bool| {
            let line: &'static str = format!("{{\"type\":\"Error\",\"code\":\"{code}\",\"message\":\"no\"}}\n").leak();
            let asked = with_agent(&["", line], |client, _| {
                let error = client.request(&start(), soon()).expect_err("refused or lost");
                assert_eq!(matches!(error, Error::Refused(_)), is_final, "{error:?}");
                assert!(is_final || matches!(error, Error::Closed), "{error:?}");
            });
            assert_eq!(asked, 2);
            with_agent(&[line], |client, _| assert!(matches!(client.request(&start(), soon()), Err(Error::Refused(_)))));
        };
        for code in ["AlreadyExists", "InvalidArgument", "PermissionDenied"] {
            check(code, true);
        }
        for code in ["Unavailable", "ResourceExhausted", "Internal", "DeadlineExceeded", "NotFound"] {
            check(code, false);
        }
    }

    #[test]
    fn a_command_never_runs_twice() {
        let id = crate::workload::WorkloadId::new("a").expect("an id");
        let asked = with_agent(&[""], |client, _| {
            let exec = Request::Exec { id, command: vec!["x".into()], timeout_ms: 1 };
            assert!(matches!(client.request(&exec, soon()), Err(Error::Closed)));
        });
        assert_eq!(asked, 1);
    }

    #[test]
    fn a_pooled_connection_that_was_closed_is_replaced() {
        let first = "{\"type\":\"Ok\"}\n";
        let asked = with_agent(&[first, PONG], |client, _| {
            assert!(matches!(client.request(&Request::Ping, soon()), Ok(Reply::Ok)));
            for (_, connection) in client.idle.lock().expect("not poisoned").iter() {
                connection.stream.shutdown(std::net::Shutdown::Both);
            }
            let exec = Request::Exec { id: crate::workload::WorkloadId::new("a").expect("an id"), command: Vec::new(), timeout_ms: 1 };
            assert!(matches!(client.request(&exec, soon()), Ok(Reply::Pong { .. })), "not even a command is lost to that");
        });
        assert_eq!(asked, 2);
    }

    #[test]
    fn connections_that_are_closed_or_not_needed_do_not_stay() {
        with_agent(&[PONG, NO], |client, server| {
            let open: Vec<Connection> = (0..8).map(|_| client.connect(soon()).expect("connected")).collect();
            open.into_iter().for_each(|connection| client.give_back(connection));
            client.sweep();
            let pooled = || client.idle.lock().expect("not poisoned").len();
            assert_eq!((pooled(), server.connections()), (8, 8));
            // The agent closes all but the one that is needed; whoever asks takes only that.
            for (_, connection) in client.idle.lock().expect("not poisoned").iter_mut().take(7) {
                connection.stream.shutdown(std::net::Shutdown::Both);
            }
            assert!(client.request(&Request::Ping, soon()).is_ok());
            assert_eq!(pooled(), 8);
            client.sweep();
            assert_eq!(pooled(), 1);
            assert!(matches!(client.request(&Request::Ping, soon()), Err(Error::Refused(_))), "the one that is left is usable");
        });
    }

    #[test]
    fn what_an_agent_says_of_itself_is_bounded() {
        let long = || "x".repeat(limits::LINE_BYTES_MAX / 16);
        let well = node("node-1", &["gvisor"]);
        let class = well.runtime_classes.first().cloned().expect("a class");
        let loud = agent::Node {
            conditions: (0..1000).map(|_| Condition { r#type: long(), ok: false, message: long() }).collect(),
            runtime_classes: (0..1000)
                .map(|i| Class {
                    name: if i == 0 { long() } else { format!("c{i}") },
                    handler: long(),
                    runtime: Some(long()),
                    ..class.clone()
                })
                .collect(),
            labels: (0..1000).map(|i| (format!("l{i:03}"), if i == 0 { Value::from(long()) } else { Value::from("v") })).collect(),
            version: long(),
            features: vec![long(); 1000],
            host_kernel: long(),
            ..well.clone()
        };
        let Reply::Node(node) = within_bounds(Reply::Node(Box::new(loud))) else { panic!("another reply") };
        let lengths = (node.conditions.len(), node.runtime_classes.len(), node.labels.len(), node.features.len());
        assert_eq!(lengths, (limits::NODE_CONDITIONS_MAX, limits::CLASSES_MAX, limits::LABELS_MAX, limits::NODE_FEATURES_MAX));
        assert_eq!((node.runtime_classes[0].name.as_str(), node.labels.keys().next().map(String::as_str)), ("c1", Some("l001")));
        let texts =
            node.conditions.iter().flat_map(|c| [&c.r#type, &c.message]).chain(&node.features).chain([&node.version, &node.host_kernel]);
        let texts = texts.chain(node.runtime_classes.iter().flat_map(|class| [Some(&class.handler), class.runtime.as_ref()]).flatten());
        assert!(texts.map(String::len).all(|bytes| bytes == limits::MESSAGE_BYTES_MAX));
        assert_eq!(within_bounds(Reply::Node(Box::new(well.clone()))), Reply::Node(Box::new(well)));
        let Reply::Error(refusal) = within_bounds(Reply::error(ErrorCode::Internal, long(), None)) else { panic!("another reply") };
        assert_eq!(refusal.message.len(), limits::REFUSAL_BYTES_MAX);
    }

    #[test]
    fn half_a_reply_ends_with_the_deadline_and_the_rest_is_not_lost() {
        let half: &'static str = "{\"type\":\"Pong\",";
        with_agent(&[half, "\"version\":\"1\"}\n"], |client, _| {
            // The agent writes its half, and waits for another request.
            let result = client.request(&Request::Ping, Deadline::within_ms(50, "ping"));
            assert!(matches!(result, Err(Error::Expired(e)) if e.phase == "ping"), "{result:?}");
        });
        with_agent(&[half, "\"version\":\"1\"}\n"], |client, _| {
            let mut replies = client.stream(&Request::Ping, soon()).expect("connected");
            assert!(matches!(replies.next(Deadline::within_ms(50, "next")), Ok(None)));
            assert!(matches!(replies.ready(), Ok(None)));
            replies.0.write(&Request::Ping.to_line(None), soon()).expect("written");
            assert!(matches!(replies.next(soon()), Ok(Some(Reply::Pong { .. }))));
        });
    }

    #[test]
    fn what_is_no_reply_is_named_and_its_connection_dropped() {
        with_agent(&["nonsense\n", "{\"type\":\"FromTheFuture\"}\n"], |client, _| {
            assert!(matches!(client.request(&Request::Ping, soon()), Err(Error::Garbled(_))));
            assert!(matches!(client.request(&Request::Ping, soon()), Err(Error::Garbled(_))));
            assert!(client.idle.lock().expect("not poisoned").is_empty());
        });
        let long: &'static str = "x".repeat(limits::LINE_BYTES_MAX).leak();
        with_agent(&[long], |client, _| assert!(matches!(client.request(&Request::Ping, soon()), Err(Error::TooLong))));
    }

    #[test]
    fn silence_ends_with_the_deadline_or_the_stop() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = Address::Tcp(listener.local_addr().expect("bound"));
        let stopping = Arc::<Stopping>::default();
        let client = NodeClient::new(name(), address, Arc::clone(&stopping));
        let result = client.request(&Request::Ping, Deadline::within_ms(20, "ping"));
        assert!(matches!(result, Err(Error::Expired(e)) if e.phase == "ping"), "{result:?}");
        stopping.set();
        assert!(matches!(client.request(&Request::Ping, Deadline::within_ms(60_000, "ping")), Err(Error::Stopping)));
        drop(listener);
        assert!(matches!(client.request(&Request::Ping, soon()), Err(Error::Connect(_))));
    }
}
