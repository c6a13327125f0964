//! The node agent: takes requests by the line protocol, and keeps what runs on this node as it was asked to be.
//!
//! Threads (all named, all joined but those that may hang in the runtime beyond the drain):
//!
//! | name | does |
//! |---|---|
//! | main | starts the others, waits for a signal, stops them |
//! | signals, stdin | [`crate::daemon`] |
//! | agent-accept | one per listener |
//! | agent-N | one per connection |
//! | start-N | starts workloads, one at a time each |
//! | pull-N | pulls images for starts that wait for them |
//! | images | collects images |
//! | ledger | writes down what was pulled |
//! | end-N | stops and removes workloads |
//! | probe-N | asks guests for their kernel |
//! | health-N | asks workloads how they are |
//! | journal | writes down what only this agent knows |
//! | sweep | removes sandboxes that nobody wants |
//! | rotate | keeps logs within their bounds |
//! | reopen | asks runtimes to open log files anew |
//! | tick | time to live, retries, start deadlines |
//! | relist-N, events-N | one of each per CRI endpoint |
//!
//! Invariant: the agent's end ends no workload.

pub mod handlers;
pub mod images;
pub mod journal;
pub mod logs;
pub mod node;
pub mod reconcile;
pub mod registry;
pub mod rotate;
pub mod sweep;
pub mod work;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select};

use crate::config::{self, AgentConfig};
use crate::cri::runtime::Seen;
use crate::daemon::{self, Signal, spawn};
use crate::deadline::Deadline;
use crate::flags::{self, Parsed};
use crate::limits;
use crate::net::Stream;
use crate::net::listen::{Server, Service};
use crate::report::{Chain, Exit, complain, init_log, say};
use crate::workload::WorkloadId;

use images::Images;
use journal::Journal;
use node::{Endpoint, Node, Stoppers};
use registry::{Batch, Queues, Registry, Restored};
use rotate::Rotation;
use sweep::Sweeps;

const PROGRAM: &str = "kakuri-agent";
const PROBE_WORKERS: usize = 2;
const HEALTH_WORKERS: usize = 4;

/// Runs the agent; returns when it was told to stop.
pub fn main() -> ExitCode {
    let config = match flags::arguments(PROGRAM).map_err(|e| e.to_string()).and_then(|args| config::agent(&args).map_err(|e| e.to_string()))
    {
        Ok(Parsed::Run(config)) => config,
        // A closed stdout has nobody to tell.
        Ok(Parsed::Special(text)) => return say(&text).map_or(Exit::General, |()| Exit::Ok).into(),
        Err(message) => {
            complain(PROGRAM, &message);
            return Exit::Usage.into();
        }
    };
    init_log(PROGRAM, config.log_level);
    match run(&config) {
        Ok(()) => Exit::Ok.into(),
        Err(error) => {
            complain(PROGRAM, &Chain(&*error));
            Exit::General.into()
        }
    }
}

/// Everything the agent's threads share.
pub struct Agent {
    /// What runs here.
    pub registry: Registry,
    /// What this node offers.
    pub node: Node,
    /// Disconnected when the agent stops.
    pub stop: Receiver<()>,
    /// Streams that wait for ever.
    pub stoppers: Stoppers,
    /// Sandboxes to be removed.
    pub sweeps: Sweeps,
    /// Time between relists, where configured.
    pub relist_ms: Option<u64>,
    /// Roots under which host mounts may lie, as configured and as they really are.
    pub mount_roots: Vec<PathBuf>,
    /// Images, and the starts that wait for them.
    pub images: Images,
    /// Of the node.
    pub labels: BTreeMap<String, String>,
    /// The bounds of logs.
    pub rotation: Rotation,
    /// Set before anybody is woken to see it.
    pub stopping: AtomicBool,
    /// Set when nothing more will come for the journal.
    pub journal_ends: AtomicBool,
    logs: PathBuf,
}

impl Agent {
    /// A runtime, by its place among the endpoints; there is always a first.
    pub fn endpoint(&self, index: usize) -> &Arc<Endpoint> {
        self.node.endpoints.get(index).unwrap_or(&self.node.endpoints[0])
    }

    /// Waits; whether the agent goes on.
    pub fn pause(&self, ms: u64) -> bool {
        self.stop.recv_timeout(Duration::from_millis(ms)).is_err_and(|e| e.is_timeout())
    }

    /// Where the log files of one acceptance of a workload are. The next of the same id has another place, so that whoever clears up
    /// after this one cannot hit it.
    pub fn log_dir(&self, id: &WorkloadId, uid: &str) -> PathBuf {
        // A uid may come back from a label at the runtime.
        let plain = uid.chars().filter(char::is_ascii_alphanumeric);
        self.logs.join(format!("{id}.{}", plain.collect::<String>()))
    }

    /// Where all of them are.
    pub fn logs_dir(&self) -> &std::path::Path {
        &self.logs
    }

    /// Whether the agent is on its way out.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

impl Service for Agent {
    fn serve(&self, stream: Stream, _: &AtomicBool) {
        // Our own flag, not the listener's: it is set before those who wait are woken, so none of them goes back to sleep.
        handlers::serve(self, stream, &self.stopping);
    }

    fn busy(&self) -> &'static [u8] {
        handlers::BUSY
    }
}

fn run(config: &AgentConfig) -> Result<(), Box<dyn std::error::Error>> {
    let node = Node::new(config)?;
    let (starts, start_queue) = bounded(limits::START_QUEUE_MAX);
    let (ends, end_queue) = bounded(limits::AGENT_WORKLOADS_MAX);
    let (probes, probe_queue) = bounded(limits::START_QUEUE_MAX);
    let (checks, check_queue) = bounded(limits::START_QUEUE_MAX);
    let (sweep_sender, sweep_queue) = bounded(limits::SWEEP_QUEUE_MAX);
    let (stop_sender, stop) = bounded(0);
    let mut mount_roots = config.mount_roots.clone();
    for root in &config.mount_roots {
        mount_roots.push(std::fs::canonicalize(root)?);
    }
    if mount_roots.iter().any(|root| root.parent().is_none()) {
        return Err("a mount root leads to /: workloads could mount the whole host".into());
    }
    // Before anything else is done with the directory, or the runtime: it is locked.
    let (journal, replay) = Journal::open(&config.state_dir)?;
    // 0 is a machine that does not tell.
    let memory_mb_max = Some(node.capacity.memory_mb).filter(|mb| *mb > 0);
    let registry = Registry::new(config.node_id.clone(), node::host_kernel(), memory_mb_max, Queues { starts, ends, probes, checks });
    let restored = Restored { boot_id: boot_id(), starts: replay.starts };
    let endpoint_of = |at: &str| node.endpoints.iter().position(|endpoint| endpoint.client.endpoint() == Path::new(at));
    let unfit = |why| format!("{}: {why}; configure what it was written with, or move it away", config.state_dir.join("journal").display());
    registry.restore(replay.saved, &restored, endpoint_of).map_err(unfit)?;
    let agent = Arc::new(Agent {
        registry,
        node,
        stop,
        stoppers: Stoppers::default(),
        sweeps: Sweeps::new(sweep_sender),
        relist_ms: config.relist_ms,
        mount_roots,
        images: Images::open(config)?,
        labels: config.labels.clone(),
        rotation: Rotation::new(config.logs),
        stopping: AtomicBool::new(false),
        journal_ends: AtomicBool::new(false),
        logs: config.log_dir.clone(),
    });
    log_start(config, &agent);
    let signals = daemon::signals(config.until_eof)?;
    // Before anything is listed or swept: a second agent of this node must not get so far.
    let servers = daemon::serve(&config.listen, "agent", &agent)?;
    let queues = WorkQueues { starts: start_queue, ends: end_queue, probes: probe_queue, checks: check_queue, sweeps: sweep_queue };
    let a = Arc::clone(&agent);
    let journal = (spawn("journal", move || journal_loop(&a, journal))?, false);
    let a = Arc::clone(&agent);
    let writers = [journal, (spawn("ledger", move || images::write_loop(&a))?, false)];
    let mut threads = start_threads(&agent, config, &queues)?;
    wait_for_first_list(&agent);
    daemon::announce(&servers, config.ready_file.as_deref())?;
    let workers = threads.len();
    threads.extend(writers);
    let result = wait_for_stop(&signals, &threads);
    log::info!("stopping; workloads go on running");
    let writers = threads.split_off(workers);
    stop_all(&agent, servers, stop_sender, &mut threads);
    // Last, for what the others did in their last moments is written down too.
    agent.images.end();
    agent.journal_ends.store(true, Ordering::SeqCst);
    agent.registry.wake_writer();
    // A panic was logged where it happened.
    writers.into_iter().for_each(|(writer, _)| drop(writer.join()));
    result.map_err(Into::into)
}

/// Whoever waits for the agent wants to find what runs, and what ended meanwhile, which is told when it is on disk. A runtime or a disk
/// that does not answer is waited for a little, no more.
fn wait_for_first_list(agent: &Agent) {
    let deadline = Deadline::within_ms(FIRST_LIST_MS_MAX, "first list");
    let is_settled = |endpoint: &Arc<Endpoint>| endpoint.is_listed() || endpoint.health().error.is_some();
    let is_known = || agent.node.endpoints.iter().all(is_settled) && agent.registry.is_settled();
    while !is_known() && deadline.left().is_ok() && agent.pause(5) {}
}

/// How long a runtime may keep the agent from saying that it serves.
const FIRST_LIST_MS_MAX: u64 = 3000;

/// Waits until somebody says stop, or a thread that should live as long as the agent does not.
fn wait_for_stop(signals: &Receiver<Signal>, threads: &Threads) -> Result<(), String> {
    loop {
        match signals.recv_timeout(Duration::from_millis(TICK_MS_MAX)) {
            Ok(Signal::Reload) => log::info!("SIGHUP: there is nothing to reload in this version"),
            Ok(Signal::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                if let Some((dead, _)) = threads.iter().find(|(thread, may_end)| !may_end && thread.is_finished()) {
                    let name = dead.thread().name().unwrap_or("a thread");
                    return Err(format!("{name} panicked; the next agent takes up what runs"));
                }
            }
        }
    }
}

fn log_start(config: &AgentConfig, agent: &Agent) {
    let endpoints: Vec<String> = agent.node.endpoints.iter().map(|e| format!("unix://{}", e.client.endpoint().display())).collect();
    log::info!("version {}, node {}, runtime at {}", env!("CARGO_PKG_VERSION"), config.node_id, endpoints.join(", "));
    if config.insecure_listen {
        log::warn!("--insecure-listen: anybody who reaches this port runs workloads on this node");
    }
}

/// Threads to join, and whether each may end before the agent does.
type Threads = Vec<(JoinHandle<()>, bool)>;

struct WorkQueues {
    starts: Receiver<WorkloadId>,
    ends: Receiver<WorkloadId>,
    probes: Receiver<WorkloadId>,
    checks: Receiver<WorkloadId>,
    sweeps: Receiver<(usize, Seen)>,
}

fn start_threads(agent: &Arc<Agent>, config: &AgentConfig, queues: &WorkQueues) -> Result<Threads, daemon::Error> {
    let mut threads = Threads::new();
    for (i, endpoint) in agent.node.endpoints.iter().enumerate() {
        let (a, e) = (Arc::clone(agent), Arc::clone(endpoint));
        threads.push((spawn(&format!("relist-{i}"), move || reconcile::relist_loop(&a, i, &e))?, false));
        let (a, e) = (Arc::clone(agent), Arc::clone(endpoint));
        // A runtime without events needs no listener.
        threads.push((spawn(&format!("events-{i}"), move || reconcile::event_loop(&a, i, &e))?, true));
    }
    let pools: [(&str, usize, &Receiver<WorkloadId>, Work); 4] = [
        ("start", config.start_workers, &queues.starts, work::start),
        ("end", config.stop_workers, &queues.ends, work::end),
        ("probe", PROBE_WORKERS, &queues.probes, work::probe),
        ("health", HEALTH_WORKERS, &queues.checks, work::check),
    ];
    for (name, workers, queue, work) in pools {
        for i in 0..workers {
            let (agent, queue) = (Arc::clone(agent), queue.clone());
            threads.push((spawn(&format!("{name}-{i}"), move || work_loop(&agent, &queue, |id| work(&agent, &id)))?, false));
        }
    }
    let (a, sweeps) = (Arc::clone(agent), queues.sweeps.clone());
    let sweep = move || work_loop(&a, &sweeps, |(endpoint, seen)| sweep::sweep(&a, endpoint, &seen));
    threads.push((spawn("sweep", sweep)?, false));
    for i in 0..config.pulls_max {
        let a = Arc::clone(agent);
        threads.push((spawn(&format!("pull-{i}"), move || images::pull_loop(&a))?, false));
    }
    let a = Arc::clone(agent);
    threads.push((spawn("images", move || images::keep_loop(&a))?, false));
    let a = Arc::clone(agent);
    threads.push((spawn("tick", move || tick_loop(&a))?, false));
    let a = Arc::clone(agent);
    threads.push((spawn("rotate", move || rotate::rotate_loop(&a))?, false));
    let a = Arc::clone(agent);
    threads.push((spawn("reopen", move || rotate::reopen_loop(&a))?, false));
    Ok(threads)
}

type Work = fn(&Agent, &WorkloadId);

fn work_loop<T>(agent: &Agent, queue: &Receiver<T>, work: impl Fn(T)) {
    while !agent.is_stopping() {
        select! {
            recv(queue) -> item => match item {
                Ok(item) => work(item),
                Err(_) => return,
            },
            recv(agent.stop) -> _ => return,
        }
    }
}

/// Names the present boot of the machine (random(4)); empty where the kernel does not say.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Writes down what is not on disk, batch after batch: whatever piles up while one is written is the next. A disk that does not take
/// it is tried again, more and more rarely; meanwhile nothing is accepted, and what runs goes on.
fn journal_loop(agent: &Agent, mut journal: Journal) {
    let endpoint = |index: usize| agent.endpoint(index).client.endpoint().display().to_string();
    let is_over = || agent.journal_ends.load(Ordering::SeqCst);
    let mut pause_ms = limits::JOURNAL_PAUSE_MS_MIN;
    loop {
        let (batch, result): (Batch, _) = if journal.is_broken() {
            let batch = agent.registry.everything(endpoint);
            let result = journal.rewrite(&batch.records);
            (batch, result)
        } else {
            let Some(batch) = agent.registry.unsaved(endpoint, is_over) else { return };
            let result = if batch.records.is_empty() { journal.probe() } else { journal.append(&batch.records) };
            (batch, result)
        };
        match result {
            Ok(()) => {
                agent.registry.saved(batch);
                pause_ms = limits::JOURNAL_PAUSE_MS_MIN;
            }
            Err(error) => {
                log::error!("the journal cannot be written: {error}");
                agent.registry.not_saved(batch, error.to_string());
                if is_over() {
                    return;
                }
                if !agent.pause(pause_ms) {
                    std::thread::park_timeout(Duration::from_millis(pause_ms));
                }
                pause_ms = (pause_ms * 2).min(limits::JOURNAL_PAUSE_MS_MAX);
            }
        }
    }
}

/// The longest time between two looks at what is due.
const TICK_MS_MAX: u64 = 1000;

fn tick_loop(agent: &Agent) {
    loop {
        let next_ms = agent.registry.tick().map_or(TICK_MS_MAX, |next| u64::try_from(next.as_millis()).unwrap_or(TICK_MS_MAX));
        select! {
            recv(agent.registry.sooner()) -> _ => {}
            recv(agent.stop) -> _ => return,
            default(Duration::from_millis(next_ms.clamp(1, TICK_MS_MAX))) => {}
        }
    }
}

/// No new work, requests in flight are answered, and what the workers are at has the drain's time to end. A start that is cut off
/// is found by the next agent's first list.
fn stop_all(agent: &Arc<Agent>, servers: Vec<Server>, stop: Sender<()>, threads: &mut Threads) {
    agent.stopping.store(true, Ordering::SeqCst);
    drop(stop);
    agent.registry.wake_all();
    agent.images.wake_all();
    agent.stoppers.stop();
    let deadline = Deadline::within_ms(limits::DRAIN_MS, "drain");
    for server in servers {
        server.stop(deadline.left().map_or(0, |left| u64::try_from(left.as_millis()).unwrap_or(0)));
    }
    while !threads.is_empty() && deadline.left().is_ok() {
        let (over, rest): (Threads, Threads) = threads.drain(..).partition(|(thread, _)| thread.is_finished());
        *threads = rest;
        // A panic was logged where it happened.
        over.into_iter().for_each(|(thread, _)| drop(thread.join()));
        if !threads.is_empty() {
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }
    for (thread, _) in threads.iter() {
        log::warn!("{} is still in a call to the runtime and is left behind", thread.thread().name().unwrap_or("a thread"));
    }
}
