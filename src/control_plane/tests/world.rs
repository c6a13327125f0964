//! A control plane over real sockets, and an agent of our own making that does as it is told.

use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, MutexGuard};
use std::thread;

use serde_json::{Value, json};

use super::super::store::{Insertion, Record, Wish};
use super::super::*;
use crate::deadline::Timestamp;
use crate::net::line::LineReader;
use crate::net::listen::{Listener, Server};
use crate::wire::Status;
use crate::wire::agent::{ErrorCode, Event, EventKind, ExecResult, LogLine, LogStream, Object, Reply, Request, Resources};
use crate::wire::workload::to_map;
use crate::workload::{Phase, State};

/// What a fake agent does instead of its duty, once.
pub(super) enum Fault {
    /// Closes the connection without a reply.
    Close,
    /// Says this.
    Say(Reply),
    /// Says this, word for word, and closes the connection.
    SayAndClose(Vec<u8>),
    /// Says it as late.
    SayLate(Reply, Duration),
}

#[derive(Default)]
pub(super) struct Fake {
    /// What it calls itself.
    pub(super) name: String,
    pub(super) workloads: BTreeMap<String, Object>,
    /// Where lines for those who watch go.
    watchers: Vec<Sender<Vec<u8>>>,
    /// Lines that begin a watch, before the list.
    pub(super) prelude: Vec<String>,
    /// The types of requests so far, with the id.
    pub(super) asked: Vec<String>,
    faults: Vec<(&'static str, Fault)>,
    /// DeleteWorkload only begins; [`FakeAgent::forget`] ends it.
    pub(super) deletes_slowly: bool,
    /// Changes are not answered as long as this is so; all else is.
    pub(super) hangs: bool,
    /// Memory it says its workloads take.
    pub(super) allocated_mb: u64,
    revision: u64,
}

/// An agent that keeps workloads and never runs them.
#[derive(Default)]
pub(super) struct FakeAgent {
    fake: Mutex<Fake>,
    changed: Condvar,
}

impl FakeAgent {
    pub(super) fn lock(&self) -> MutexGuard<'_, Fake> {
        self.fake.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn fail(&self, request: &'static str, fault: Fault) {
        self.lock().faults.push((request, fault));
    }

    pub(super) fn asked(&self, what: &str) -> usize {
        self.lock().asked.iter().filter(|asked| asked.starts_with(what)).count()
    }

    /// Moves a workload on, and tells the watchers.
    pub(super) fn set(&self, id: &str, state: State, change: impl FnOnce(&mut Status)) {
        let mut fake = self.lock();
        let object = fake.workloads.get_mut(id).expect("a workload");
        object.state = state;
        object.status.observed_at = Timestamp::now();
        change(&mut object.status);
        let object = object.clone();
        tell(&mut fake, EventKind::Modified, object);
        self.changed.notify_all();
    }

    pub(super) fn forget(&self, id: &str) {
        let mut fake = self.lock();
        let object = fake.workloads.remove(id).expect("a workload");
        tell(&mut fake, EventKind::Deleted, object);
        self.changed.notify_all();
    }

    /// Says a line to all who watch.
    pub(super) fn say(&self, line: &str) {
        let line = format!("{line}\n").into_bytes();
        self.lock().watchers.retain(|watcher| watcher.try_send(line.clone()).is_ok());
    }

    /// From now on answers everything.
    pub(super) fn wake(&self) {
        self.lock().hangs = false;
        self.changed.notify_all();
    }

    /// Waits as long as it hangs; whether it still does, and is to end.
    fn hang(&self, stopping: &AtomicBool) -> bool {
        let mut fake = self.lock();
        while fake.hangs && !stopping.load(Ordering::SeqCst) {
            fake = self.changed.wait_timeout(fake, Duration::from_millis(20)).unwrap_or_else(PoisonError::into_inner).0;
        }
        fake.hangs
    }

    pub(super) fn answer(&self, request: Request, stopping: &AtomicBool) -> Vec<Reply> {
        let mut fake = self.lock();
        let status = |id: &str, object: &Object| Reply::Status { id: id.into(), state: object.state, status: object.status.clone() };
        let unknown = |id: &str| Reply::error(ErrorCode::NotFound, "no such workload", Some(id.into()));
        let reply = match request {
            Request::GetNode => {
                let node = super::super::scheduler::tests::node(&fake.name, &["gvisor", "native"]);
                let allocated = Resources { memory_mb: fake.allocated_mb, ..node.allocated };
                Reply::Node(Box::new(crate::wire::agent::Node { allocated, stopping: 2, oldest_stopping_ms: 90_500, ..node }))
            }
            Request::StartWorkload { workload, .. } => {
                let id = workload.id.to_string();
                let new =
                    Object { state: State::Pending, status: Box::new(Status::accepted(Some(fake.name.clone()))), spec: to_map(&workload) };
                if !fake.workloads.contains_key(&id) {
                    fake.workloads.insert(id.clone(), new.clone());
                    tell(&mut fake, EventKind::Added, new);
                }
                status(&id, &fake.workloads[&id])
            }
            Request::GetStatus { id, wait } => {
                let id = id.to_string();
                if let Some((until, ms)) = wait {
                    let deadline = Deadline::within_ms(ms, "wait");
                    while fake.workloads.get(&id).is_some_and(|object| !until.is_reached(object.state)) && !stopping.load(Ordering::SeqCst)
                    {
                        let Ok(left) = deadline.left() else { break };
                        let left = left.min(Duration::from_millis(20));
                        fake = self.changed.wait_timeout(fake, left).unwrap_or_else(PoisonError::into_inner).0;
                    }
                }
                match fake.workloads.get_mut(&id) {
                    Some(object) => {
                        object.status.observed_at = Timestamp::now();
                        status(&id, object)
                    }
                    None => unknown(&id),
                }
            }
            Request::StopWorkload { id, .. } => match fake.workloads.get_mut(id.as_str()) {
                Some(object) => {
                    object.status.phase = Some(Phase::Stopping);
                    status(id.as_str(), object)
                }
                None => unknown(id.as_str()),
            },
            Request::UpdateWorkload { id, labels } => match fake.workloads.get_mut(id.as_str()) {
                Some(object) => {
                    object.spec.insert("labels".into(), json!(labels));
                    let reply = status(id.as_str(), object);
                    let object = object.clone();
                    tell(&mut fake, EventKind::Modified, object);
                    reply
                }
                None => unknown(id.as_str()),
            },
            Request::DeleteWorkload { id, .. } if fake.deletes_slowly => {
                let going_on = |_| Reply::error(ErrorCode::DeadlineExceeded, "not gone yet; it will be", Some(id.to_string()));
                fake.workloads.get(id.as_str()).map_or_else(|| unknown(id.as_str()), going_on)
            }
            Request::DeleteWorkload { id, .. } => {
                let removed = fake.workloads.remove(id.as_str());
                removed.map_or_else(|| unknown(id.as_str()), |_| Reply::Deleted { id: id.to_string() })
            }
            Request::GetLogs(logs) => {
                let line = |n: u32| {
                    Reply::Log(LogLine {
                        stream: LogStream::Stdout,
                        time: format!("2026-01-01T00:00:0{n}Z"),
                        line: format!("line {n}"),
                        gap: false,
                    })
                };
                let heartbeat = Reply::Heartbeat { time: Timestamp::now(), revision: 0 };
                return vec![line(1), heartbeat, line(2), Reply::LogEnd { id: logs.id.to_string(), gap: false }];
            }
            Request::Exec { command, .. } => {
                let (stdout, encoding) = (command.join(" "), "utf-8".into());
                Reply::ExecResult(ExecResult { exit_code: 3, stdout, stderr: String::new(), encoding, truncated: false })
            }
            _ => Reply::Ok,
        };
        vec![reply]
    }

    pub(super) fn watch(&self, stream: &mut Stream, stopping: &AtomicBool) {
        let (sender, receiver) = bounded(1000);
        {
            let mut fake = self.lock();
            let objects: Vec<Object> = fake.workloads.values().cloned().collect();
            let revision = fake.revision;
            let list = objects.into_iter().map(|object| Reply::Event(Event { revision, event: EventKind::Added, object }));
            let list = list.chain([Reply::Heartbeat { time: Timestamp::now(), revision }]).map(|reply| reply.to_line(None));
            let prelude = fake.prelude.iter().map(|line| format!("{line}\n").into_bytes());
            prelude.chain(list).for_each(|line| sender.send(line).expect("room"));
            fake.watchers.push(sender);
        }
        while !stopping.load(Ordering::SeqCst) {
            let Ok(line) = receiver.recv_timeout(Duration::from_millis(20)) else { continue };
            if stream.write_all(&line, soon()).is_err() {
                return;
            }
        }
    }
}

pub(super) fn tell(fake: &mut Fake, event: EventKind, object: Object) {
    fake.revision += 1;
    let event = Reply::Event(Event { revision: fake.revision, event, object }).to_line(None);
    fake.watchers.retain(|watcher| watcher.try_send(event.clone()).is_ok());
}

pub(super) struct FakeService(Arc<FakeAgent>);

impl Service for FakeService {
    fn serve(&self, mut stream: Stream, stopping: &AtomicBool) {
        let mut reader = LineReader::new(limits::LINE_BYTES_MAX, 1000);
        while let Ok(Some(line)) = reader.next(&mut stream, Deadline::within_ms(60_000, "idle")) {
            let value: Value = serde_json::from_slice(line).expect("JSON");
            let kind = value["type"].as_str().expect("a type").to_owned();
            let id = value["id"].as_str().or(value["workload"]["id"].as_str()).unwrap_or_default();
            let request = Request::parse(line).request.expect("a request");
            let fault = {
                let mut fake = self.0.lock();
                fake.asked.push(format!("{kind} {id}"));
                let at = fake.faults.iter().position(|(request, _)| *request == kind);
                at.map(|at| fake.faults.remove(at).1)
            };
            let replies = match fault {
                Some(Fault::Close) => return stream.shutdown(Shutdown::Both),
                Some(Fault::Say(reply)) => vec![reply],
                Some(Fault::SayAndClose(bytes)) => {
                    let _ = stream.write_all(&bytes, soon()); // The test sees what is missing.
                    return stream.shutdown(Shutdown::Both);
                }
                // Being late is what it is there for.
                Some(Fault::SayLate(reply, late)) => {
                    thread::sleep(late);
                    vec![reply]
                }
                None if request.is_change() && self.0.hang(stopping) => return,
                None if matches!(request, Request::Watch { .. }) => return self.0.watch(&mut stream, stopping),
                None => self.0.answer(request, stopping),
            };
            let lines: Vec<u8> = replies.iter().flat_map(|reply| reply.to_line(None)).collect();
            if stream.write_all(&lines, soon()).is_err() {
                return;
            }
        }
    }

    fn busy(&self) -> &'static [u8] {
        b""
    }
}

pub(super) fn soon() -> Deadline {
    Deadline::within_ms(10_000, "test")
}

/// Looks until it is so, from outside, as a client would: nothing tells when.
pub(super) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = soon();
    while !is_so() {
        assert!(deadline.left().is_ok(), "never: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

pub(super) fn any_port() -> Address {
    Address::parse("127.0.0.1:0").expect("an address")
}

/// A control plane with one node, `node-1`, behind HTTP.
pub(super) struct World {
    pub(super) agent: Arc<FakeAgent>,
    node: Option<Server>,
    pub(super) node_address: Address,
    pub(super) running: Running,
    pub(super) http: Server,
}

impl World {
    pub(super) fn new() -> Self {
        Self::with_history(limits::HISTORY_DEFAULT)
    }

    pub(super) fn with_history(history: usize) -> Self {
        Self::with_store(Store::forgetful(), history)
    }

    pub(super) fn with_store(store: Store, history: usize) -> Self {
        let agent = Arc::<FakeAgent>::default();
        agent.lock().name = "node-1".into();
        let listener = Listener::bind(&any_port()).expect("a port");
        let node = Server::start(listener, "agent", Arc::new(FakeService(Arc::clone(&agent)))).expect("a thread");
        let node_address = node.address().clone();
        let name = Name::new("node-1").expect("a name");
        let running = Running::start(vec![(name, node_address.clone())], store, history).expect("threads");
        let api = Api::new(Arc::clone(&running.plane), false);
        let http = Server::start(Listener::bind(&any_port()).expect("a port"), "http", Arc::new(Http(api))).expect("a thread");
        let world = Self { agent, node: Some(node), node_address, running, http };
        eventually("the node is ready", || world.status("GET", "/readyz", "") == 200);
        // From here on it is not asked what it has for want of its list, so that tests can count what it is asked.
        let anybody = crate::workload::WorkloadId::new("anybody").expect("an id");
        eventually("its list is whole", || world.running.plane.nodes.values().all(|node| node.has_stranger(&anybody).is_some()));
        world
    }

    /// Stops the agent; what it knows stays in `agent`.
    pub(super) fn stop_agent(&mut self) {
        self.node.take().expect("it runs").stop(1000);
        self.agent.lock().watchers.clear();
    }

    pub(super) fn start_agent(&mut self) {
        self.start_any_agent();
        eventually("the node is ready again", || self.status("GET", "/readyz", "") == 200);
    }

    /// Starts what may call itself something else.
    pub(super) fn start_any_agent(&mut self) {
        let listener = Listener::bind(&self.node_address).expect("the same port");
        self.node = Some(Server::start(listener, "agent", Arc::new(FakeService(Arc::clone(&self.agent)))).expect("a thread"));
    }

    /// Head and body of an answer.
    pub(super) fn ask(&self, method: &str, target: &str, body: &str) -> (String, String) {
        let framing =
            if body.is_empty() { String::new() } else { format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()) };
        // The body of an HTTP/1.0 response ends with the connection, chunks or not.
        self.send(&format!("{method} {target} HTTP/1.0\r\n{framing}\r\n{body}"))
    }

    pub(super) fn send(&self, text: &str) -> (String, String) {
        let mut stream = Stream::connect(self.http.address(), soon()).expect("connected");
        stream.write_all(text.as_bytes(), soon()).expect("written");
        let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = stream.read(&mut buffer, soon()) {
            answer.extend_from_slice(&buffer[..n]);
        }
        let answer = String::from_utf8(answer).expect("text");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {answer:?}"));
        (head.to_owned(), body.to_owned())
    }

    pub(super) fn status(&self, method: &str, target: &str, body: &str) -> u16 {
        code(&self.ask(method, target, body).0)
    }

    pub(super) fn json(&self, method: &str, target: &str, body: &str) -> (u16, Value) {
        let (head, body) = self.ask(method, target, body);
        (code(&head), serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {head}\n{body:?}")))
    }

    pub(super) fn post(&self, id: &str) -> Value {
        let (status, object) = self.json("POST", "/workloads", &workload(id).to_string());
        assert_eq!(status, 201, "{object}");
        object
    }

    pub(super) fn get(&self, id: &str) -> Value {
        let (status, object) = self.json("GET", &format!("/workloads/{id}"), "");
        assert_eq!(status, 200, "{object}");
        object
    }

    pub(super) fn end(self) {
        self.http.stop(2000);
        self.running.stop();
        if let Some(node) = self.node {
            node.stop(2000);
        }
    }
}

/// A control plane with several nodes, `node-1` and so on, and no API.
pub(super) struct Fleet {
    pub(super) agents: Vec<Arc<FakeAgent>>,
    servers: Vec<Server>,
    pub(super) running: Running,
}

impl Fleet {
    pub(super) fn new(nodes: usize) -> Self {
        let (mut agents, mut servers, mut names) = (Vec::new(), Vec::new(), Vec::new());
        for i in 1..=nodes {
            let (agent, name) = (Arc::<FakeAgent>::default(), format!("node-{i}"));
            agent.lock().name.clone_from(&name);
            let service = Arc::new(FakeService(Arc::clone(&agent)));
            let server = Server::start(Listener::bind(&any_port()).expect("a port"), "agent", service).expect("a thread");
            names.push((Name::new(&name).expect("a name"), server.address().clone()));
            agents.push(agent);
            servers.push(server);
        }
        let running = Running::start(names, Store::forgetful(), limits::HISTORY_DEFAULT).expect("threads");
        let fleet = Self { agents, servers, running };
        eventually("all nodes are ready", || fleet.running.plane.nodes.values().all(|node| node.view().trouble.is_none()));
        fleet
    }

    /// Has the control plane wish away workloads that the `n`th node, counted from 0, has.
    pub(super) fn delete(&self, n: usize, ids: impl Iterator<Item = String>) {
        let store = &self.running.plane.store;
        for id in ids {
            let draft = super::super::store::tests::draft(r#"{"image":"busybox"}"#);
            let id = crate::workload::WorkloadId::new(&id).expect("an id");
            let workload = draft.resolve(id.clone(), Name::new("gvisor").expect("a name"));
            let object = Object { state: State::Running, status: Box::new(Status::accepted(None)), spec: to_map(&workload) };
            self.agents[n].lock().workloads.insert(id.to_string(), object);
            let record = Record::new(workload, Name::new(&format!("node-{}", n + 1)).expect("a name"), serde_json::Map::new());
            let Ok(Insertion::Inserted(record)) = store.insert(Record { is_known: true, has_run: true, state: State::Running, ..record })
            else {
                panic!("{id} is taken");
            };
            store.wish(&id, record.born, Wish::Delete).expect("taken");
            self.running.plane.dispatch.nudge(&id);
        }
    }

    pub(super) fn end(self) {
        self.running.stop();
        self.servers.into_iter().for_each(|server| server.stop(2000));
    }
}

pub(super) fn code(head: &str) -> u16 {
    head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("{head}"))
}

pub(super) fn workload(id: &str) -> Value {
    json!({"id": id, "image": "busybox", "runtime_class": "gvisor", "labels": {"app": id}})
}

pub(super) fn refusal(code: ErrorCode) -> Fault {
    Fault::Say(Reply::error(code, "because", None))
}
