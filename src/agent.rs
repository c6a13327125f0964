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
//! | end-N | stops and removes workloads |
//! | probe-N | asks guests for their kernel |
//! | tick | time to live, retries, start deadlines |
//! | relist-N, events-N | one of each per CRI endpoint |
//!
//! Invariant: the agent's end ends no workload.

pub mod handlers;
pub mod logs;
pub mod node;
pub mod reconcile;
pub mod registry;
pub mod work;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, select};

use crate::config::{self, AgentConfig};
use crate::daemon::{self, Signal, spawn};
use crate::deadline::Deadline;
use crate::flags::{self, Parsed};
use crate::limits;
use crate::net::Stream;
use crate::net::listen::{Server, Service};
use crate::report::{Chain, Exit, complain, init_log, say};
use crate::workload::WorkloadId;

use node::{Node, Stoppers};
use registry::{Queues, Registry};

const PROGRAM: &str = "kakuri-agent";
const PROBE_WORKERS: usize = 2;

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
    /// Time between relists, where configured.
    pub relist_ms: Option<u64>,
    /// Roots under which host mounts may lie; real paths.
    pub mount_roots: Vec<PathBuf>,
    /// A docker `config.json`.
    pub registry_credentials: Option<PathBuf>,
    /// Of the node.
    pub labels: BTreeMap<String, String>,
    logs: PathBuf,
    stopping: AtomicBool,
}

impl Agent {
    /// Where a workload's log files are.
    pub fn log_dir(&self, id: &WorkloadId) -> PathBuf {
        self.logs.join(id.as_str())
    }

    /// Whether the agent is on its way out.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

impl Service for Agent {
    fn serve(&self, stream: Stream, stopping: &AtomicBool) {
        handlers::serve(self, stream, stopping);
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
    let (stop_sender, stop) = bounded(0);
    let mount_roots = config.mount_roots.iter().map(std::fs::canonicalize).collect::<Result<_, _>>()?;
    let agent = Arc::new(Agent {
        registry: Registry::new(config.node_id.clone(), node::host_kernel(), Queues { starts, ends, probes }),
        node,
        stop,
        stoppers: Stoppers::new(),
        relist_ms: config.relist_ms,
        mount_roots,
        registry_credentials: config.registry_credentials.clone(),
        labels: config.labels.clone(),
        logs: config.log_dir.clone(),
        stopping: AtomicBool::new(false),
    });
    log_start(config, &agent);
    let signals = daemon::signals(config.until_eof)?;
    let (mut threads, wakes) = start_threads(&agent, config, &start_queue, &end_queue, &probe_queue)?;
    let servers = daemon::serve(&config.listen, "agent", &agent)?;
    daemon::announce(&servers, config.ready_file.as_deref())?;
    while let Ok(signal) = signals.recv() {
        match signal {
            Signal::Reload => log::info!("SIGHUP: there is nothing to reload in this version"),
            Signal::Stop => break,
        }
    }
    log::info!("stopping; workloads go on running");
    stop_all(&agent, servers, stop_sender, wakes, &mut threads);
    Ok(())
}

fn log_start(config: &AgentConfig, agent: &Agent) {
    let endpoints: Vec<String> = agent.node.endpoints.iter().map(|e| format!("unix://{}", e.client.endpoint().display())).collect();
    log::info!("version {}, node {}, runtime at {}", env!("CARGO_PKG_VERSION"), config.node_id, endpoints.join(", "));
    if config.insecure_listen {
        log::warn!("--insecure-listen: anybody who reaches this port runs workloads on this node");
    }
}

type Threads = Vec<JoinHandle<()>>;

fn start_threads(
    agent: &Arc<Agent>,
    config: &AgentConfig,
    starts: &Receiver<WorkloadId>,
    ends: &Receiver<WorkloadId>,
    probes: &Receiver<WorkloadId>,
) -> Result<(Threads, Vec<Sender<()>>), daemon::Error> {
    let mut threads = Threads::new();
    let mut wakes = Vec::new();
    for (i, endpoint) in agent.node.endpoints.iter().enumerate() {
        let (wake, woken) = bounded(1);
        wakes.push(wake);
        let (a, e) = (Arc::clone(agent), Arc::clone(endpoint));
        threads.push(spawn(&format!("relist-{i}"), move || reconcile::relist_loop(&a, &e, &woken))?);
        let (a, e) = (Arc::clone(agent), Arc::clone(endpoint));
        threads.push(spawn(&format!("events-{i}"), move || reconcile::event_loop(&a, &e))?);
    }
    let pools: [(&str, usize, &Receiver<WorkloadId>, Work); 3] = [
        ("start", config.start_workers, starts, work::start),
        ("end", config.stop_workers, ends, work::end),
        ("probe", PROBE_WORKERS, probes, work::probe),
    ];
    for (name, workers, queue, work) in pools {
        for i in 0..workers {
            let (agent, queue) = (Arc::clone(agent), queue.clone());
            threads.push(spawn(&format!("{name}-{i}"), move || work_loop(&agent, &queue, work))?);
        }
    }
    let a = Arc::clone(agent);
    threads.push(spawn("tick", move || tick_loop(&a))?);
    Ok((threads, wakes))
}

type Work = fn(&Agent, &WorkloadId);

fn work_loop(agent: &Agent, queue: &Receiver<WorkloadId>, work: Work) {
    while !agent.is_stopping() {
        select! {
            recv(queue) -> id => match id {
                Ok(id) => work(agent, &id),
                Err(_) => return,
            },
            recv(agent.stop) -> _ => return,
        }
    }
}

/// The longest time between two looks at what is due.
const TICK_MS_MAX: u64 = 1000;

fn tick_loop(agent: &Agent) {
    loop {
        let next = agent.registry.tick().unwrap_or(Duration::MAX).min(Duration::from_millis(TICK_MS_MAX));
        if !agent.stop.recv_timeout(next).is_err_and(|e| e.is_timeout()) {
            return;
        }
    }
}

/// No new work, requests in flight are answered, and what the workers are at has the drain's time to end. A start that is cut off
/// is found by the next agent's first list.
fn stop_all(agent: &Arc<Agent>, servers: Vec<Server>, stop: Sender<()>, wakes: Vec<Sender<()>>, threads: &mut Threads) {
    agent.stopping.store(true, Ordering::SeqCst);
    drop(stop);
    drop(wakes);
    agent.registry.wake_all();
    agent.stoppers.stop();
    let deadline = Deadline::within_ms(limits::DRAIN_MS, "drain");
    for server in servers {
        server.stop(deadline.left().map_or(0, |left| u64::try_from(left.as_millis()).unwrap_or(0)));
    }
    while !threads.is_empty() && deadline.left().is_ok() {
        let (over, rest): (Threads, Threads) = threads.drain(..).partition(JoinHandle::is_finished);
        *threads = rest;
        over.into_iter().for_each(|thread| drop(thread.join()));
        if !threads.is_empty() {
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }
    for thread in threads.iter() {
        log::warn!("{} is still in a call to the runtime and is left behind", thread.thread().name().unwrap_or("a thread"));
    }
}
