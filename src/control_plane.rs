//! `kakuri-control-plane`: takes workloads over HTTP, places them on nodes, and keeps asking until agents and wishes agree.
//!
//! *Scope*: start, stop, and what all threads share. *Not here*: what is answered (`api`), decided (`reconcile`) and known of nodes
//! (`monitor`).
//!
//! Threads (all named, all joined):
//!
//! | name | does |
//! |---|---|
//! | main | starts the others, waits for a signal, stops them |
//! | signals, stdin | [`crate::daemon`] |
//! | http-accept | one per listener |
//! | http-N | one per connection; asks the agent concerned |
//! | node-NAME | one per node: heartbeat and events |
//! | reconcile | finds what is not as desired |
//! | store, store-open | makes changes last; opens the store's file |
//! | dispatch-N | tell agents what is desired |

mod api;
mod monitor;
mod node_client;
mod profiles;
mod reconcile;
mod scheduler;
mod store;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};

use crate::config::{self, ControlPlaneConfig, Task};
use crate::daemon::{self, Signal, spawn};
use crate::deadline::Deadline;
use crate::flags::{self, Parsed};
use crate::http;
use crate::limits;
use crate::net::listen::Service;
use crate::net::{Address, Stream};
use crate::report::{Chain, Exit, complain, init_log, say};
use crate::workload::Name;
use api::Api;
use monitor::Node;
use reconcile::Dispatch;
use store::{Store, disk, transfer};

const PROGRAM: &str = "kakuri-control-plane";

/// Runs the control plane; returns when it was told to stop.
pub fn main() -> ExitCode {
    let parsed = flags::arguments(PROGRAM).map_err(config::Error::from).and_then(|args| config::control_plane(&args));
    let config = match parsed {
        Ok(Parsed::Run(config)) => config,
        // A closed stdout has nobody to tell.
        Ok(Parsed::Special(text)) => return say(&text).map_or(Exit::General, |()| Exit::Ok).into(),
        Err(error) => {
            complain(PROGRAM, &Chain(&error));
            return Exit::Usage.into();
        }
    };
    init_log(PROGRAM, config.log_level);
    let result = match config.task {
        Task::Export => transfer::export(&config.data_dir, io::stdout().lock()).map(|count| tell(count, "exported")).map_err(Error::Store),
        Task::Import => transfer::import(&config.data_dir, io::stdin().lock()).map(|count| tell(count, "imported")).map_err(Error::Store),
        Task::Serve => run(&config),
    };
    match result {
        Ok(()) => Exit::Ok.into(),
        Err(error) => {
            complain(PROGRAM, &Chain(&error));
            Exit::General.into()
        }
    }
}

fn tell(count: usize, done: &str) {
    complain(PROGRAM, &format_args!("{done} {count} workloads; the values of their env are in the lines"));
}

/// Why the control plane cannot begin, or go on.
#[derive(Debug)]
enum Error {
    Daemon(daemon::Error),
    Store(disk::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Daemon(error) => error.fmt(f),
            Self::Store(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Daemon(error) => error.source(),
            Self::Store(error) => error.source(),
        }
    }
}

impl From<daemon::Error> for Error {
    fn from(error: daemon::Error) -> Self {
        Self::Daemon(error)
    }
}

impl From<disk::Error> for Error {
    fn from(error: disk::Error) -> Self {
        Self::Store(error)
    }
}

/// Descriptors that so many nodes may need: a pool and a watch each; a client has two, and asks an agent with another; the store,
/// listeners, and what is open for a moment.
fn descriptors(nodes: usize) -> usize {
    nodes * (limits::NODE_POOL_MAX + 1) + limits::CONNECTIONS_MAX * 3 + limits::LISTENERS_MAX + limits::DISPATCHERS + 64
}

fn run(config: &ControlPlaneConfig) -> Result<(), Error> {
    log::info!("version {}, {} nodes", env!("CARGO_PKG_VERSION"), config.nodes.len());
    if config.insecure_listen {
        log::warn!("--insecure-listen: anybody who reaches this port runs workloads on every node");
    }
    if config.nodes.is_empty() {
        log::warn!("no node is configured, so nothing can be placed; add --node ID=ADDR");
    }
    daemon::raise_descriptors(descriptors(config.nodes.len()));
    let signals = daemon::signals(config.until_eof)?;
    let store = Store::open(&config.data_dir)?;
    let running = Running::start(config.nodes.clone(), store, config.history)?;
    let service = Arc::new(Http(Api::new(Arc::clone(&running.plane), config.insecure_listen)));
    let servers = daemon::serve(&config.listen, "http", &service)?;
    daemon::announce(&servers, config.ready_file.as_deref())?;
    while let Ok(signal) = signals.recv() {
        match signal {
            Signal::Reload => log::info!("SIGHUP: there is nothing to reload in this version"),
            Signal::Stop => break,
        }
    }
    log::info!("stopping; workloads go on running");
    let drain = Deadline::within_ms(limits::DRAIN_MS, "drain");
    running.plane.stopping.set();
    for server in servers {
        server.stop(drain.left().map_or(0, |left| u64::try_from(left.as_millis()).unwrap_or(0)));
    }
    running.stop();
    Ok(())
}

/// What the threads of the control plane share.
struct Plane {
    store: Arc<Store>,
    /// How many ended workloads are kept.
    history: usize,
    nodes: BTreeMap<Name, Arc<Node>>,
    dispatch: Dispatch,
    stopping: Arc<Stopping>,
}

/// A plane and its threads.
struct Running {
    plane: Arc<Plane>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    fn start(nodes: Vec<(Name, Address)>, store: Store, history: usize) -> Result<Self, daemon::Error> {
        let stopping = Arc::<Stopping>::default();
        let node = |(name, address): (Name, Address)| (name.clone(), Arc::new(Node::new(name, address, Arc::clone(&stopping))));
        let nodes: BTreeMap<Name, Arc<Node>> = nodes.into_iter().map(node).collect();
        let plane = Arc::new(Plane { store: Arc::new(store), history, nodes, dispatch: Dispatch::default(), stopping });
        let mut threads = Vec::new();
        for (name, node) in &plane.nodes {
            let (plane, node) = (Arc::clone(&plane), Arc::clone(node));
            threads.push(spawn(&format!("node-{name}"), move || monitor::run(&plane, &node))?);
        }
        for i in 0..limits::DISPATCHERS {
            let plane = Arc::clone(&plane);
            threads.push(spawn(&format!("dispatch-{i}"), move || reconcile::dispatch(&plane))?);
        }
        let reconciled = Arc::clone(&plane);
        threads.push(spawn("reconcile", move || reconcile::run(&reconciled))?);
        Ok(Self { plane, threads })
    }

    fn stop(self) {
        self.plane.stopping.set();
        self.threads.into_iter().for_each(join);
        // The last, so that what the others learnt is kept.
        self.plane.store.close();
    }
}

fn join(thread: JoinHandle<()>) {
    let name = thread.thread().name().unwrap_or_default().to_owned();
    if thread.join().is_err() {
        log::error!("thread {name} had panicked");
    }
}

/// Whether the control plane is stopping; set once, seen by whoever waits.
#[derive(Debug)]
struct Stopping {
    /// Dropped to stop: that wakes every receiver.
    open: Mutex<Option<Sender<Infallible>>>,
    closed: Receiver<Infallible>,
}

impl Default for Stopping {
    fn default() -> Self {
        let (open, closed) = bounded(0);
        Self { open: Mutex::new(Some(open)), closed }
    }
}

impl Stopping {
    fn set(&self) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn is_set(&self) -> bool {
        matches!(self.closed.try_recv(), Err(TryRecvError::Disconnected))
    }

    /// Waits for `ms`, or less when it is set meanwhile; whether it is.
    fn wait(&self, ms: u64) -> bool {
        matches!(self.closed.recv_timeout(Duration::from_millis(ms)), Err(RecvTimeoutError::Disconnected))
    }

    /// Becomes ready when it is set.
    fn channel(&self) -> &Receiver<Infallible> {
        &self.closed
    }
}

/// The API behind a listener.
struct Http(Api);

impl Service for Http {
    fn serve(&self, stream: Stream, stopping: &AtomicBool) {
        http::serve(stream, &self.0, stopping);
    }

    fn busy(&self) -> &'static [u8] {
        http::busy()
    }
}
