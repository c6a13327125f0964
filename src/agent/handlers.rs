//! One connection of the line protocol: read a request, do it, reply; in order, until the client leaves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use crossbeam_channel::RecvTimeoutError;
use serde_json::Value;

use super::Agent;
use super::logs::{LogReader, More, Tail};
use super::node::Offer;
use super::registry::{Container, NoWatch, Overtaken, Refusal, Snapshot};
use super::work::is_allowed;
use super::{images, node, reconcile};
use crate::cri::runtime::Class;
use crate::deadline::{Deadline, Stopwatch, Timestamp};
use crate::grpc::Code;
use crate::limits;
use crate::net::line::{LineError, LineReader};
use crate::net::{self, Stream};
use crate::report::Chain;
use crate::wire::agent::{
    Class as ClassBody, Condition, ErrorCode, ErrorReply, ExecResult, FEATURE_FENCE, LogRequest, Node, Received, Reply, Request, Until,
    workloads_line,
};
use crate::wire::{Problems, api, workload as wire_workload};
use crate::workload::{State, Workload, WorkloadId};

/// The client is gone, or too slow: nothing more can be said.
struct Hangup;

impl From<net::Error> for Hangup {
    fn from(_: net::Error) -> Self {
        Self
    }
}

/// Serves one connection to its end.
pub fn serve(agent: &Agent, mut stream: Stream, stopping: &AtomicBool) {
    let mut lines = LineReader::new(limits::LINE_BYTES_MAX, limits::LINE_MS_MAX);
    while !stopping.load(Ordering::SeqCst) {
        let line = match lines.next(&mut stream, Deadline::within_ms(limits::IDLE_MS_MAX, "idle")) {
            Ok(Some(line)) if line.trim_ascii().is_empty() => continue,
            Ok(Some(line)) if is_http(line) => return refuse_http(&mut stream),
            Ok(Some(line)) => Request::parse(line),
            Ok(None) => return,
            Err(error) => return refuse_line(&mut stream, &error),
        };
        let Received { seq, id, fence, request } = line;
        let mut client = Client { stream: &mut stream, lines: &mut lines, seq, stopping: &agent.stopping, probes: 0 };
        let result = match request {
            Ok(request) => handle(agent, request, fence, &mut client),
            Err(problems) => client.send(&invalid(&problems, id)),
        };
        if result.is_err() {
            return;
        }
    }
}

/// A browser can be made to send what it likes to a local port, after the head of an HTTP request: that head must be the end of it.
fn is_http(line: &[u8]) -> bool {
    let first = line.split(|b| *b == b' ').next().unwrap_or_default();
    let is_method = (3..=7).contains(&first.len()) && first.len() < line.len() && first.iter().all(u8::is_ascii_uppercase);
    is_method || line.get(..5).is_some_and(|start| start.eq_ignore_ascii_case(b"host:"))
}

fn refuse_http(stream: &mut Stream) {
    let message = "this port speaks JSON lines, not HTTP; the HTTP API is the control plane's";
    close_with(stream, &Reply::error(ErrorCode::InvalidArgument, message, None));
}

/// The complete answer for a client that gets no slot.
pub const BUSY: &[u8] = b"{\"type\":\"Error\",\"code\":\"ResourceExhausted\",\"message\":\"too many connections; try again later\"}\n";

/// After such a line nobody knows where the next begins, so the connection ends with the answer.
fn refuse_line(stream: &mut Stream, error: &LineError) {
    let (code, message) = match error {
        LineError::TooLong(bytes_max) => (ErrorCode::InvalidArgument, format!("a line must be at most {bytes_max} bytes")),
        LineError::Slow(_) => (ErrorCode::DeadlineExceeded, format!("a line must be complete within {} ms", limits::LINE_MS_MAX)),
        LineError::HalfLine => (ErrorCode::InvalidArgument, "a line must end with a newline".to_owned()),
        // Nobody is there, or nobody spoke.
        LineError::Idle(_) | LineError::Socket(_) => return,
    };
    close_with(stream, &Reply::error(code, message, None));
}

/// Says a last word, and gives the client the time to read it.
fn close_with(stream: &mut Stream, reply: &Reply) {
    if stream.write_all(&reply.to_line(None), Deadline::within_ms(limits::LINE_MS_MAX, "refusal")).is_ok() {
        stream.linger(limits::LINGER_BYTES_MAX, Deadline::within_ms(limits::LINGER_MS_MAX, "linger"));
    }
}

/// Where replies go.
struct Client<'a> {
    stream: &'a mut Stream,
    lines: &'a mut LineReader,
    seq: Option<Value>,
    stopping: &'a AtomicBool,
    /// Heartbeats sent to see whether it is still there.
    probes: u32,
}

impl Client<'_> {
    fn send(&mut self, reply: &Reply) -> Result<(), Hangup> {
        self.send_line(&reply.to_line(self.seq.as_ref()))
    }

    fn send_line(&mut self, line: &[u8]) -> Result<(), Hangup> {
        Ok(self.stream.write_all(line, Deadline::within_ms(limits::WRITE_MS_MAX, "reply"))?)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Whether an answer that goes on was silent for too long. A client that ended its side may only be listening (`nc -N`), or gone:
    /// two writes tell which, for the first of them is answered with a reset.
    fn is_heartbeat_due(&mut self, quiet: &Stopwatch) -> bool {
        let is_due =
            self.probes < HALF_CLOSED_PROBES && quiet.elapsed_ms() >= limits::HEARTBEAT_HALF_CLOSED_MS && self.lines.is_closed(self.stream);
        self.probes += u32::from(is_due);
        is_due || quiet.elapsed_ms() >= limits::HEARTBEAT_MS
    }
}

/// Heartbeats for a client that ended its side; one that is still there after them is waited for as any other.
const HALF_CLOSED_PROBES: u32 = 2;

fn handle(agent: &Agent, request: Request, fence: Option<u64>, client: &mut Client<'_>) -> Result<(), Hangup> {
    let reply = match request {
        // No listener asks for a token yet; one that is offered does no harm.
        Request::Auth { token: _ } => Reply::Ok,
        Request::CollectImages { dry_run } => collect_images(agent, dry_run),
        Request::DeleteWorkload { id, wait_ms } => delete(agent, &id, wait_ms, fence, client),
        Request::Exec { id, command, timeout_ms } => exec(agent, &id, &command, timeout_ms),
        Request::GetLogs(request) => return logs(agent, &request, client),
        Request::GetNode => Reply::Node(Box::new(describe(agent))),
        Request::GetStatus { id, wait } => {
            refresh(agent, &id);
            let (until, ms) = wait.unwrap_or((Until::Started, 0));
            status_reply(agent, &id, agent.registry.wait(&id, until, Deadline::within_ms(ms, "wait"), client.stopping))
        }
        Request::ListWorkloads { after, limit } => return list(agent, after.as_ref(), limit, client),
        Request::Ping => Reply::Pong { version: env!("CARGO_PKG_VERSION").into() },
        Request::StartWorkload { workload, wait_ms } => start(agent, *workload, wait_ms, fence, client),
        Request::StopWorkload { id, wait_ms } => {
            let stopped = match agent.registry.stop(&id, fence) {
                Ok(stopped) => stopped,
                Err(seen) => return client.send(&overtaken(&id, seen)),
            };
            if let Some(unsaved) = unsaved(agent, &id, false) {
                return client.send(&unsaved);
            }
            let waited = wait_ms.and_then(|ms| agent.registry.wait(&id, Until::Terminal, Deadline::within_ms(ms, "wait"), client.stopping));
            status_reply(agent, &id, waited.or_else(|| agent.registry.status(&id)).or(stopped))
        }
        Request::UpdateWorkload { id, labels } => {
            let updated = match agent.registry.update_labels(&id, labels, fence) {
                Ok(updated) => updated,
                Err(seen) => return client.send(&overtaken(&id, seen)),
            };
            if let Some(unsaved) = unsaved(agent, &id, false) {
                return client.send(&unsaved);
            }
            status_reply(agent, &id, updated)
        }
        Request::Watch { since } => return watch(agent, since, client),
    };
    client.send(&reply)
}

fn status_reply(agent: &Agent, id: &WorkloadId, status: Option<(State, crate::wire::Status)>) -> Reply {
    match status {
        Some((state, status)) => Reply::Status { id: id.to_string(), state, status: Box::new(status) },
        None => not_found(agent, id),
    }
}

/// The answer to a request that could not be written down: what is not in the journal is not promised.
fn unsaved(agent: &Agent, id: &WorkloadId, is_new: bool) -> Option<Reply> {
    let why = agent.registry.settled(id, is_new).err()?;
    let message = format!("the agent's journal cannot be written: {why}");
    Some(Reply::error(ErrorCode::ResourceExhausted, message, Some(id.to_string())))
}

/// There is no such workload; as long as a runtime was not listed since the agent started, nobody can say so.
fn not_found(agent: &Agent, id: &WorkloadId) -> Reply {
    let certain = || Reply::error(ErrorCode::NotFound, "no such workload on this node", Some(id.to_string()));
    uncertain(agent, Some(id)).unwrap_or_else(certain)
}

/// The answer to whoever asks what is not here, until every runtime was listed: what was not seen yet may run all the same.
fn uncertain(agent: &Agent, id: Option<&WorkloadId>) -> Option<Reply> {
    let message = "not known yet: the runtime was not listed since the agent started";
    let error = || Reply::error(ErrorCode::Unavailable, message, id.map(ToString::to_string));
    (!agent.node.endpoints.iter().all(|endpoint| endpoint.is_listed())).then(error)
}

fn invalid(problems: &Problems, id: Option<String>) -> Reply {
    let message = problems.to_string();
    Reply::Error(ErrorReply { code: ErrorCode::InvalidArgument, message, id, errors: problems.into(), fence: None })
}

fn overtaken(id: &WorkloadId, Overtaken(fence): Overtaken) -> Reply {
    let message = format!("a later request about this workload was seen, of fence {fence}; this one is not done");
    let (code, id) = (ErrorCode::Unavailable, Some(id.to_string()));
    Reply::Error(ErrorReply { code, message, id, errors: Vec::new(), fence: Some(fence) })
}

fn start(agent: &Agent, workload: Workload, wait_ms: Option<u64>, fence: Option<u64>, client: &Client<'_>) -> Reply {
    let id = workload.id.clone();
    let error = |code, message: String| Reply::error(code, message, Some(id.to_string()));
    let accepted = match agent.registry.present(&workload, fence) {
        Some(answer) => answer,
        // The rules of this node are for what is new; what it accepted once it does not take back.
        None => match check(agent, &workload) {
            Ok(offer) => agent.registry.accept(workload, offer.class, offer.endpoint, fence),
            Err(Unfit::Rules(problems)) => return invalid(&problems, Some(id.to_string())),
            Err(Unfit::Now(message)) => return error(ErrorCode::Unavailable, message),
        },
    };
    let accepted = match accepted {
        Ok(accepted) => accepted,
        Err(Refusal::Differs) => return error(ErrorCode::AlreadyExists, "another workload has this id".into()),
        Err(Refusal::Leaving) => return error(ErrorCode::Unavailable, "the former workload of this id is still being deleted".into()),
        Err(Refusal::Memory { wants, free }) => {
            let message = format!("memory: wants {wants} MiB with its overhead, free {free} of {}", agent.node.capacity.memory_mb);
            return error(ErrorCode::ResourceExhausted, message);
        }
        Err(Refusal::Overtaken(seen)) => return overtaken(&id, seen),
        Err(Refusal::Full) => {
            let (workloads, bytes) = (limits::AGENT_WORKLOADS_MAX, limits::AGENT_SPECS_BYTES_MAX);
            let message = format!("this node keeps at most {workloads} workloads of {bytes} bytes together; delete some that ended");
            return error(ErrorCode::ResourceExhausted, message);
        }
    };
    if let Some(unsaved) = unsaved(agent, &id, true) {
        return unsaved;
    }
    let waited = wait_ms.and_then(|ms| agent.registry.wait(&id, Until::Started, Deadline::within_ms(ms, "wait"), client.stopping));
    status_reply(agent, &id, Some(waited.unwrap_or(accepted)))
}

/// Why this node does not take a workload.
enum Unfit {
    /// Not now.
    Now(String),
    /// Never.
    Rules(Problems),
}

/// The rules that depend on this node's configuration. Nothing is accepted that could only fail.
fn check(agent: &Agent, workload: &Workload) -> Result<Offer, Unfit> {
    let offers = agent.node.classes();
    let names: Vec<String> = offers.iter().map(|offer| offer.class.name.to_string()).collect();
    let Some(offer) = offers.into_iter().find(|offer| offer.class.name == workload.runtime_class) else {
        if names.is_empty() {
            return Err(Unfit::Now("this node offers no runtime class: its runtime did not answer yet, or lists no handlers".into()));
        }
        let detail = format!("unknown class; this node offers {}", names.join(", "));
        return Err(Unfit::Rules(Problems::one("/workload/runtime_class", detail)));
    };
    let problems = broken_rules(agent, workload, &offer.class);
    if !problems.is_empty() {
        return Err(Unfit::Rules(problems));
    }
    if offer.available == Some(false) {
        return Err(Unfit::Now(format!("the runtime does not list the handler {:?} of this class", offer.class.handler)));
    }
    if !agent.endpoint(offer.endpoint).is_listed() {
        return Err(Unfit::Now("the runtime was not listed since the agent started; it may already run this workload".into()));
    }
    Ok(offer)
}

fn broken_rules(agent: &Agent, workload: &Workload, class: &Class) -> Problems {
    let mut problems = Problems::default();
    let spec = &workload.spec;
    if serde_json::Value::Object(wire_workload::to_map(workload)).to_string().len() > limits::WORKLOAD_BYTES_MAX {
        problems.add("/workload", format!("must be at most {} bytes", limits::WORKLOAD_BYTES_MAX));
    }
    if spec.memory_mb < class.memory_mb_min {
        problems.add("/workload/memory_mb", format!("must be at least {} for class {}", class.memory_mb_min, class.name));
    }
    if spec.pids_max.is_some() && !node::has_cgroup_v2() {
        problems.add("/workload/pids_max", "cannot be enforced on this node: it has no cgroup v2");
    }
    if spec.pull_credentials.as_ref().is_some_and(|name| !agent.images.has_credentials(name)) {
        problems.add("/workload/image_pull/credentials", "this node has no credentials of that name");
    }
    for (i, mount) in spec.mounts.iter().enumerate() {
        if !is_allowed(&agent.mount_roots, std::path::Path::new(&mount.source)) {
            problems.add(format!("/workload/mounts/{i}/source"), "is not under a mount root of this node");
        }
    }
    problems
}

/// Asks the runtime first when what is known of a running workload is not fresh.
fn refresh(agent: &Agent, id: &WorkloadId) {
    let Some(Container { state: State::Running, id: Some(container_id), endpoint, observed_at, version }) = agent.registry.container(id)
    else {
        return;
    };
    let endpoint = agent.endpoint(endpoint);
    // A clock that was set back makes it of the future, and as stale as one of the past.
    let is_fresh = Timestamp::now().as_millis().abs_diff(observed_at.as_millis()) < limits::FRESH_MS;
    // While the runtime does not answer, every question would wait for nothing; the relist says when it is back.
    if !is_fresh && endpoint.health().error.is_none() {
        reconcile::ask(agent, endpoint, id, version, &container_id);
    }
}

fn delete(agent: &Agent, id: &WorkloadId, wait_ms: Option<u64>, fence: Option<u64>, client: &Client<'_>) -> Reply {
    match agent.registry.delete(id, fence) {
        Ok(true) => {}
        Ok(false) => return not_found(agent, id),
        Err(seen) => return overtaken(id, seen),
    }
    if let Some(unsaved) = unsaved(agent, id, false) {
        return unsaved;
    }
    let ms = wait_ms.unwrap_or(limits::DELETE_WAIT_MS_DEFAULT);
    if agent.registry.wait_gone(id, Deadline::within_ms(ms, "wait"), client.stopping) {
        return Reply::Deleted { id: id.to_string() };
    }
    let last = agent.registry.status(id).and_then(|(_, status)| status.last_error);
    let because = last.map(|error| format!(": {error}")).unwrap_or_default();
    Reply::error(ErrorCode::DeadlineExceeded, format!("not gone yet; it will be{because}"), Some(id.to_string()))
}

fn collect_images(agent: &Agent, dry_run: bool) -> Reply {
    // Before the first list nobody knows what runs here.
    if !agent.node.endpoints.iter().all(|endpoint| endpoint.is_listed()) {
        return Reply::error(ErrorCode::Unavailable, "a runtime was not listed since the agent started", None);
    }
    match images::collect::collect(agent, dry_run) {
        Some(images) => Reply::Images(images),
        None => Reply::error(ErrorCode::Unavailable, "images are being collected already", None),
    }
}

fn list(agent: &Agent, after: Option<&WorkloadId>, limit: usize, client: &mut Client<'_>) -> Result<(), Hangup> {
    if let Some(error) = uncertain(agent, None) {
        return client.send(&error);
    }
    let (mut workloads, mut is_more) = agent.registry.page(after, limit);
    loop {
        let last = workloads.last().map(|snapshot| snapshot.id().as_str());
        let line = workloads_line(&workloads, Snapshot::object, last.filter(|_| is_more), client.seq.as_ref());
        // A reply is a line, and a line has its limit: large workloads come in smaller pages.
        if workloads.len() <= 1 || line.len() <= limits::LINE_BYTES_MAX {
            return client.send_line(&line);
        }
        workloads.truncate(workloads.len() / 2);
        is_more = true;
    }
}

fn exec(agent: &Agent, id: &WorkloadId, command: &[String], timeout_ms: u64) -> Reply {
    let error = |code, message: String| Reply::error(code, message, Some(id.to_string()));
    let (endpoint, container_id) = match agent.registry.container(id) {
        None => return not_found(agent, id),
        Some(Container { state: State::Running, id: Some(container_id), endpoint, .. }) => (agent.endpoint(endpoint), container_id),
        Some(Container { state, .. }) => return error(ErrorCode::Unavailable, format!("the workload is {state}, not Running")),
    };
    let timeout_s = i64::try_from(timeout_ms.div_ceil(1000)).unwrap_or(1);
    let deadline = Deadline::within_ms(timeout_ms.saturating_add(limits::CRI_QUICK_MS_MAX), "exec");
    match endpoint.client.exec_sync(&container_id, command, timeout_s, deadline) {
        Ok(answer) => Reply::ExecResult(exec_result(&answer.stdout, &answer.stderr, answer.exit_code)),
        Err(e) if e.code() == Some(Code::DeadlineExceeded) || matches!(e.kind, crate::grpc::ErrorKind::Expired(_)) => {
            error(ErrorCode::DeadlineExceeded, format!("the command did not end within {timeout_ms} ms"))
        }
        // containerd says Unknown of a program that is not there.
        Err(e) if matches!(e.code(), Some(Code::Unknown | Code::InvalidArgument | Code::NotFound)) => {
            error(ErrorCode::InvalidArgument, Chain(&e).to_string())
        }
        Err(e) => error(ErrorCode::Unavailable, Chain(&e).to_string()),
    }
}

fn exec_result(stdout: &[u8], stderr: &[u8], exit_code: i32) -> ExecResult {
    let cut = |bytes: &[u8]| bytes.len() > limits::EXEC_OUTPUT_BYTES_MAX;
    let truncated = cut(stdout) || cut(stderr);
    let clip = |bytes: &[u8]| bytes.get(..limits::EXEC_OUTPUT_BYTES_MAX).unwrap_or(bytes).to_vec();
    let (stdout, stderr) = (clip(stdout), clip(stderr));
    // A control character takes six bytes in JSON, base64 never more than four for three.
    let is_plain = |bytes: &[u8]| bytes.iter().all(|b| *b >= b' ' || matches!(b, b'\n' | b'\r' | b'\t'));
    let texts = (is_plain(&stdout) && is_plain(&stderr)).then(|| std::str::from_utf8(&stdout).ok().zip(std::str::from_utf8(&stderr).ok()));
    let (encoding, stdout, stderr) = match texts.flatten() {
        Some((stdout, stderr)) => ("utf-8", stdout.to_owned(), stderr.to_owned()),
        None => ("base64", BASE64.encode(&stdout), BASE64.encode(&stderr)),
    };
    ExecResult { exit_code, stdout, stderr, encoding: encoding.into(), truncated }
}

fn logs(agent: &Agent, request: &LogRequest, client: &mut Client<'_>) -> Result<(), Hangup> {
    let id = &request.id;
    let Some((uid, _)) = agent.registry.acceptance(id) else { return client.send(&not_found(agent, id)) };
    let mut reader = LogReader::new(agent.log_dir(id, &uid), request);
    let mut tail = request.tail.map(Tail::new);
    let mut quiet = Stopwatch::start();
    loop {
        // Asked before reading: what was written before the end is then always read. What has the same id now may be another workload.
        let is_ended = agent.registry.acceptance(id).is_none_or(|(present, state)| present != uid || state.is_terminal());
        let batch = match reader.read() {
            Ok(batch) => batch,
            Err(error) => {
                log::warn!("workload {id}: cannot read its log: {error}");
                return client.send(&Reply::error(ErrorCode::Internal, "cannot read the log", Some(id.to_string())));
            }
        };
        match &mut tail {
            Some(tail) => tail.push(batch.lines),
            None if batch.lines.is_empty() => {}
            None => {
                batch.lines.into_iter().try_for_each(|line| client.send(&Reply::Log(line)))?;
                quiet = Stopwatch::start();
            }
        }
        if client.is_stopping() {
            return Err(Hangup);
        }
        if client.is_heartbeat_due(&quiet) {
            // Also how a client that left is noticed.
            client.send(&heartbeat(agent))?;
            quiet = Stopwatch::start();
        }
        match batch.more {
            More::Now => continue,
            More::Soon => {
                agent.pause(limits::LOG_SOON_MS);
                continue;
            }
            More::Later => {}
        }
        // A line without its end is handed on only when nobody will write that end.
        let mut rest = if is_ended { reader.finish() } else { Vec::new() };
        if let Some(mut tail) = tail.take() {
            tail.push(std::mem::take(&mut rest));
            rest = tail.into_lines().collect();
        }
        rest.into_iter().try_for_each(|line| client.send(&Reply::Log(line)))?;
        if is_ended || !request.follow {
            return client.send(&Reply::LogEnd { id: id.to_string(), gap: reader.has_gap() });
        }
        agent.registry.wait(id, Until::Terminal, Deadline::within_ms(limits::LOG_FOLLOW_MS, "follow"), client.stopping);
    }
}

fn heartbeat(agent: &Agent) -> Reply {
    Reply::Heartbeat { time: Timestamp::now(), revision: agent.registry.revision() }
}

fn watch(agent: &Agent, since: Option<u64>, client: &mut Client<'_>) -> Result<(), Hangup> {
    let watch = match agent.registry.watch(since) {
        Ok(watch) => watch,
        Err(NoWatch::Full) => {
            let message = format!("at most {} watches at a time", limits::WATCHES_MAX);
            return client.send(&Reply::error(ErrorCode::ResourceExhausted, message, None));
        }
        Err(NoWatch::Gone) => {
            let message = "what happened since that revision is not kept any more; watch without since";
            return client.send(&Reply::error(ErrorCode::NotFound, message, None));
        }
    };
    for news in watch.present {
        client.send(&Reply::Event(news.event()))?;
    }
    client.send(&Reply::Heartbeat { time: Timestamp::now(), revision: watch.revision })?;
    let mut quiet = Stopwatch::start();
    while !client.is_stopping() {
        // In slices, so that stopping is noticed.
        match watch.events.recv_timeout(Duration::from_millis(limits::LOG_FOLLOW_MS)) {
            Ok(news) => {
                client.send(&Reply::Event(news.event()))?;
                quiet = Stopwatch::start();
            }
            Err(RecvTimeoutError::Timeout) if client.is_heartbeat_due(&quiet) => {
                client.send(&heartbeat(agent))?;
                quiet = Stopwatch::start();
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let message = format!("this watch fell behind by more than {} events; begin again", limits::WATCH_EVENTS_MAX);
                client.send(&Reply::error(ErrorCode::ResourceExhausted, message, None))?;
                return Err(Hangup);
            }
        }
    }
    Ok(())
}

/// The node, as it is now.
fn describe(agent: &Agent) -> Node {
    let offers = agent.node.classes();
    let several = agent.node.endpoints.len() > 1;
    let mut conditions = Vec::new();
    let mut oldest: Option<Timestamp> = None;
    for endpoint in &agent.node.endpoints {
        let health = endpoint.health();
        let at = if several { format!(" ({})", endpoint.client.endpoint().display()) } else { String::new() };
        let age_ms = health.listed.map(|listed| listed.elapsed_ms());
        let (ok, message) = match (health.error, age_ms) {
            (Some(error), _) => (false, error),
            (None, None) => (false, "not listed yet".to_owned()),
            (None, Some(ms)) if ms > limits::LIST_AGE_MS_MAX => (false, format!("not listed for {} s", ms / 1000)),
            (None, Some(_)) => (true, "answers".to_owned()),
        };
        conditions.push(Condition { r#type: format!("RuntimeAnswers{at}"), ok, message });
        conditions.extend(health.conditions.into_iter().map(|c| Condition { r#type: format!("{}{at}", c.r#type), ..c }));
        oldest = match (oldest, health.listed_at) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }
    let trouble = agent.registry.trouble();
    let message = trouble.clone().unwrap_or_else(|| "is written".into());
    conditions.push(Condition { r#type: "JournalWritable".into(), ok: trouble.is_none(), message });
    let (oldest_stopping_ms, stopping) = agent.registry.stopping();
    conditions.extend(agent.rotation.condition());
    let body = |Offer { class, endpoint, available }: &Offer| ClassBody {
        name: class.name.to_string(),
        handler: class.handler.clone(),
        own_kernel: class.own_kernel,
        available: *available,
        overhead_mb: class.overhead_mb,
        memory_mb_min: class.memory_mb_min,
        runtime: agent.endpoint(*endpoint).health().runtime,
    };
    Node {
        node_id: agent.registry.node().to_string(),
        ready: conditions.iter().all(|c| c.ok) && !offers.is_empty() && !agent.is_stopping(),
        conditions,
        runtime_classes: offers.iter().map(body).collect(),
        capacity: agent.node.capacity,
        allocated: agent.registry.allocated(),
        labels: api::text_map(&agent.labels),
        version: env!("CARGO_PKG_VERSION").into(),
        features: vec![FEATURE_FENCE.into()],
        host_kernel: agent.registry.host_kernel().unwrap_or_default().to_owned(),
        started_at: agent.node.started_at,
        observed_at: oldest,
        stopping,
        oldest_stopping_ms,
    }
}
