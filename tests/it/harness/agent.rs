//! An agent under test.

use std::cell::RefCell;
use std::fs;
use std::net::SocketAddr;
use std::thread;

use kakuri::limits;
use kakuri::net::Address;
use kakuri::wire::agent::{ErrorCode, ErrorReply, LogLine, Node, Object, Reply};
use kakuri::wire::status::Status;
use kakuri::workload::State;
use serde_json::{Value, json};

use super::daemon::{AGENT, Daemon};
use super::{Line, Place, SOON_MS, brief, eventually, half_written, until, within};

/// A running agent.
pub struct Agent<'a> {
    place: &'a Place,
    /// Its log is `NAME.log`, its state in `NAME`.
    name: String,
    /// Its node.
    pub node: String,
    daemon: Option<Daemon>,
    /// Where it listens, the first listener.
    pub address: Address,
    flags: Vec<String>,
    /// More for its environment, from the next time it is started on.
    pub environment: Vec<(String, String)>,
    /// Threads, descriptors that are no sockets, and sockets, when it was ready and idle.
    idle: Option<[usize; 3]>,
    line: RefCell<Option<Line>>,
}

/// The id, state and status of a Status reply.
#[track_caller]
pub fn expect_status(reply: Reply) -> (State, Status) {
    match reply {
        Reply::Status { state, status, .. } => (state, *status),
        other => panic!("not a status: {}", brief(&other)),
    }
}

/// The error of an Error reply.
#[track_caller]
pub fn expect_error(reply: Reply) -> ErrorReply {
    match reply {
        Reply::Error(error) => error,
        other => panic!("not an error: {}", brief(&other)),
    }
}

impl<'a> Agent<'a> {
    /// Starts one with these flags beside the usual ones; a flag given here replaces the usual one.
    pub(super) fn start(place: &'a Place, name: &str, node: String, flags: &[&str], die_at: Option<&str>) -> Self {
        let state = place.dir.join(name).display().to_string();
        let endpoint = place.endpoint_url();
        let usual = [
            ("--node-id", node.as_str()),
            ("--listen", "127.0.0.1:0"),
            ("--cri-endpoint", endpoint.as_str()),
            ("--state-dir", state.as_str()),
            ("--relist-ms", "200"),
            // So that it is not the machine that says how many workloads there are.
            ("--memory-mb", "16777216"),
            ("--log-level", "debug"),
        ];
        let missing = usual.iter().filter(|(flag, _)| !flags.contains(flag)).flat_map(|(flag, value)| [*flag, *value]);
        let flags: Vec<String> = missing.chain(flags.iter().copied()).map(str::to_owned).collect();
        let (daemon, lines) = Daemon::start_to_die(AGENT, name, &place.dir.join(""), &flags, die_at);
        let address = lines.first().and_then(|line| address_of(line)).expect("an address in the ready file");
        Self {
            place,
            name: name.to_owned(),
            node,
            daemon: Some(daemon),
            address,
            flags,
            environment: Vec::new(),
            idle: None,
            line: RefCell::default(),
        }
    }

    /// Waits until it takes work, and notes what it is made of when idle.
    pub fn wait_until_ready(&mut self) {
        eventually("the agent is ready", SOON_MS, || self.node().ready.then_some(()));
        if self.idle.is_none() {
            self.line.take();
            until("connections end", || self.connections() == 0);
            self.idle = Some(steady(|| self.size()));
        }
    }

    /// The daemon itself.
    pub fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("it runs")
    }

    /// Its TCP address.
    pub fn tcp(&self) -> SocketAddr {
        match &self.address {
            Address::Tcp(addr) => *addr,
            Address::Unix(path) => panic!("{} is no TCP address", path.display()),
        }
    }

    /// A connection of its own.
    pub fn line(&self) -> Line {
        Line::connect(&self.address)
    }

    /// One request, one reply, on a connection kept for this.
    pub fn ask(&self, request: &Value) -> Reply {
        self.line.borrow_mut().get_or_insert_with(|| self.line()).ask(request)
    }

    /// Starts a workload; the status at once.
    #[track_caller]
    pub fn start_workload(&self, workload: &Value) -> (State, Status) {
        expect_status(self.ask(&json!({"type": "StartWorkload", "workload": workload})))
    }

    /// Starts a workload and waits until it left Pending.
    #[track_caller]
    pub fn settle(&self, workload: &Value) -> (State, Status) {
        expect_status(self.ask(&json!({"type": "StartWorkload", "workload": workload, "wait_ms": SOON_MS})))
    }

    /// Starts a workload, which must run.
    #[track_caller]
    pub fn run(&self, workload: &Value) -> Status {
        let (state, status) = self.settle(workload);
        assert_eq!(state, State::Running, "{status:?}");
        status
    }

    /// Starts a workload that says when it is ready (a signal before that would find a shell that has set no trap yet), and waits for it.
    #[track_caller]
    pub fn run_until_ready(&self, workload: &Value) -> Status {
        let status = self.run(workload);
        until("it says it is ready", || self.logs(json!({"id": workload["id"]})).iter().any(|line| line.line == "ready"));
        status
    }

    /// The workload's status now.
    #[track_caller]
    pub fn status(&self, id: &str) -> (State, Status) {
        expect_status(self.ask(&json!({"type": "GetStatus", "id": id})))
    }

    /// The workload's status when it ended.
    #[track_caller]
    pub fn ended(&self, id: &str) -> (State, Status) {
        let (state, status) = expect_status(self.ask(&json!({"type": "GetStatus", "id": id, "for": "terminal", "wait_ms": SOON_MS})));
        assert!(state.is_terminal(), "{state}: {status:?}");
        (state, status)
    }

    /// Stops a workload and waits for its end.
    #[track_caller]
    pub fn stop_workload(&self, id: &str) -> (State, Status) {
        expect_status(self.ask(&json!({"type": "StopWorkload", "id": id, "wait_ms": SOON_MS})))
    }

    /// Deletes a workload and waits until it is gone.
    #[track_caller]
    pub fn delete(&self, id: &str) {
        assert_eq!(self.ask(&json!({"type": "DeleteWorkload", "id": id})), Reply::Deleted { id: id.to_owned() });
    }

    /// All lines of output there are now.
    #[track_caller]
    pub fn logs(&self, request: Value) -> Vec<LogLine> {
        let mut line = self.line();
        line.tell(&super::place::with(json!({"type": "GetLogs"}), request));
        read_logs(&mut line)
    }

    /// The node as it is now.
    pub fn node(&self) -> Node {
        match self.ask(&json!({"type": "GetNode"})) {
            Reply::Node(node) => *node,
            other => panic!("{}", brief(&other)),
        }
    }

    /// All workloads, page by page.
    pub fn list(&self) -> Vec<Object> {
        self.try_list().unwrap_or_else(|error| panic!("{}", brief(&error)))
    }

    /// All workloads, of an agent that may not know them yet.
    pub fn try_list(&self) -> Result<Vec<Object>, ErrorReply> {
        let mut all = Vec::new();
        let mut after = None;
        loop {
            match self.ask(&json!({"type": "ListWorkloads", "after": after})) {
                Reply::Workloads { workloads, r#continue } => {
                    all.extend(workloads);
                    after = r#continue;
                }
                other => return Err(expect_error(other)),
            }
            if after.is_none() {
                return Ok(all);
            }
        }
    }

    /// kill -9. [`Agent::again`] brings it back.
    pub fn kill(&mut self) {
        self.line.take();
        self.daemon.take().expect("it runs").kill();
    }

    /// SIGTERM; it must end with 0, in the time that a drain takes.
    pub fn terminate(&mut self) {
        self.line.take();
        let mut daemon = self.daemon.take().expect("it runs");
        daemon.signal("TERM");
        assert_eq!(daemon.wait(limits::DRAIN_MS + 5000).code(), Some(0), "the agent's exit code after SIGTERM");
    }

    /// Waits for an end that something else brought about; its exit code.
    pub fn wait_for_end(&mut self, ms: u64) -> Option<i32> {
        self.line.take();
        self.daemon.take().expect("it runs").wait(ms).code()
    }

    /// Starts it again where it was, and waits until it is ready.
    pub fn again(&mut self) {
        self.again_now();
        self.wait_until_ready();
    }

    /// Starts it again where it was.
    pub fn again_now(&mut self) {
        assert!(self.try_again(), "{} ended instead of serving", self.name);
    }

    /// Starts it again to die at a failpoint, `NAME@N`; whether it serves before it does.
    pub fn again_to_die(&mut self, at: &str) -> bool {
        self.environment.push(("KAKURI_DIE_AT".to_owned(), at.to_owned()));
        let serves = self.try_again();
        self.environment.pop();
        serves
    }

    /// Starts it again where it was; whether it serves.
    pub fn try_again(&mut self) -> bool {
        assert!(self.daemon.is_none(), "it still runs");
        let at = self.flags.iter().position(|flag| flag == "--listen").expect("a usual flag");
        self.flags[at + 1] = self.address.to_string();
        let environment: Vec<(&str, &str)> = self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let started = Daemon::try_start(AGENT, &self.name, &self.place.dir.join(""), &self.flags, &environment);
        self.daemon = started.ok().map(|(daemon, _)| daemon);
        self.daemon.is_some()
    }

    /// Whether it ended by itself. [`Agent::again`] brings it back.
    pub fn has_died(&mut self) -> bool {
        if self.daemon.as_mut().is_some_and(|daemon| daemon.try_wait().is_some()) {
            self.line.take();
            self.daemon = None;
        }
        self.daemon.is_none()
    }

    /// One request to an agent that may die before it answers.
    pub fn attempt(&self, request: &Value) -> Option<Reply> {
        let mut line = Line::try_connect(&self.address).ok()?;
        line.try_send(format!("{request}\n").as_bytes()).ok()?;
        line.attempt()
    }

    /// How many connections it serves now.
    pub fn connections(&self) -> usize {
        let threads = self.daemon.as_ref().map(Daemon::threads).unwrap_or_default();
        threads.iter().filter(|name| name.strip_prefix("agent-").is_some_and(|n| n.parse::<u64>().is_ok())).count()
    }

    /// Bytes that clients have sent and that it has not read yet (proc_net_tcp: local address, state 01, receive queue).
    pub fn unread(&self) -> u64 {
        let port = format!(":{:04X}", self.tcp().port());
        let queue = |line: &str| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let is_ours = fields.get(1).is_some_and(|local| local.ends_with(&port)) && fields.get(3) == Some(&"01");
            let queues = fields.get(4).filter(|_| is_ours)?;
            u64::from_str_radix(queues.split_once(':')?.1, 16).ok()
        };
        std::fs::read_to_string("/proc/net/tcp").expect("a proc file").lines().filter_map(queue).sum()
    }

    fn size(&self) -> [usize; 3] {
        size(self.daemon.as_ref().expect("it runs"))
    }
}

/// Reads log lines up to the end of the log.
#[track_caller]
pub fn read_logs(line: &mut Line) -> Vec<LogLine> {
    let mut lines = Vec::new();
    loop {
        match line.reply() {
            Reply::Log(log) => lines.push(log),
            Reply::LogEnd { .. } => return lines,
            other => panic!("{}", brief(&other)),
        }
    }
}

/// A daemon's threads, descriptors that are no sockets, and sockets.
pub fn size(daemon: &Daemon) -> [usize; 3] {
    let (sockets, others): (Vec<_>, Vec<_>) =
        daemon.descriptors().into_iter().filter(|d| !is_of_clock(d)).partition(|d| d.to_string_lossy().starts_with("socket:"));
    [daemon.threads().len(), others.len(), sockets.len()]
}

/// What a daemon is made of when it is left alone: a file that it just reads would be room for one that it forgets to close.
pub fn steady(size: impl Fn() -> [usize; 3]) -> [usize; 3] {
    let mut least = size();
    for _ in 0..5 {
        least.iter_mut().zip(size()).for_each(|(least, now)| *least = now.min(*least));
    }
    least
}

/// What libfaketime holds in a daemon that runs with it.
pub fn is_of_clock(descriptor: &std::path::Path) -> bool {
    descriptor.starts_with("/dev/shm")
}

/// The address in a line of a ready file.
pub fn address_of(line: &str) -> Option<Address> {
    let address = line.strip_prefix("tcp=").map(str::to_owned);
    let address = address.or_else(|| line.strip_prefix("unix=").map(|path| format!("unix://{path}")));
    Address::parse(&address?).ok()
}

impl Drop for Agent<'_> {
    /// The leak check, and the end.
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        if self.daemon.is_none() {
            // Nobody is there to clear up, so there has to be nothing.
            assert!(!self.place.has_runtime() || self.place.is_clear_of(&self.node), "{} died and left something", self.name);
            return;
        }
        for object in self.list() {
            match self.ask(&json!({"type": "DeleteWorkload", "id": object.spec["id"]})) {
                Reply::Deleted { .. } => {}
                // Its deletion was under way.
                Reply::Error(error) if error.code == ErrorCode::NotFound => {}
                other => panic!("{}", brief(&other)),
            }
        }
        self.line.take();
        until("nothing of the agent is left at the runtime", || self.place.is_clear_of(&self.node));
        if let Some([threads, others, sockets]) = self.idle {
            // Idle connections to the runtime are kept, up to a limit.
            let most = [threads, others, sockets + limits::GRPC_POOL_MAX];
            let is_small = || self.size().iter().zip(most).all(|(now, most)| *now <= most).then_some(());
            let found = within(SOON_MS, is_small);
            let daemon = self.daemon.as_ref().expect("it runs");
            assert!(found.is_some(), "{:?} is more than {most:?}: {:?} {:?}", self.size(), daemon.threads(), daemon.descriptors());
        }
        assert_eq!(self.daemon().stop(), Some(0), "the agent's exit code");
        if let Address::Unix(path) = &self.address {
            assert!(!path.exists(), "the agent's socket is left");
        }
        let logs = fs::read_dir(self.place.dir.join(&self.name).join("logs")).map_or(0, Iterator::count);
        assert_eq!(logs, 0, "logs of deleted workloads are left");
        assert_eq!(half_written(&self.place.dir.join(&self.name)), [] as [std::path::PathBuf; 0], "files that were not finished");
    }
}
