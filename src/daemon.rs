//! What the daemons share: binding listeners, saying that they serve, and waiting for the end.
//!
//! Threads: `signals` (SIGTERM, SIGINT, SIGHUP) and, with `--until-eof`, `stdin`, which waits in a read that only the end of the
//! process interrupts.

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, bounded};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::limits;
use crate::net::Address;
use crate::net::listen::{Listener, Server, Service};

/// A daemon cannot begin, or go on.
#[derive(Debug)]
pub enum Error {
    /// An address cannot be listened on.
    Bind(Address, io::Error),
    /// The ready file cannot be written.
    Ready(io::Error),
    /// No thread, or no signal handler, can be made.
    Thread(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bind(address, _) => write!(f, "cannot listen on {address}"),
            Self::Ready(_) => f.write_str("cannot write the ready file"),
            Self::Thread(_) => f.write_str("cannot start a thread"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Bind(_, error) | Self::Ready(error) | Self::Thread(error) => Some(error),
        }
    }
}

/// What a daemon is told from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGHUP.
    Reload,
    /// SIGTERM, SIGINT, or the end of stdin.
    Stop,
}

/// Listens for signals, and with `until_eof` for the end of stdin. A second SIGTERM or SIGINT ends the process at once.
///
/// # Errors
/// [`Error::Thread`].
pub fn signals(until_eof: bool) -> Result<Receiver<Signal>, Error> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(Error::Thread)?;
    let (sender, receiver) = bounded(4);
    let eof = sender.clone();
    let listen = move || {
        let mut is_stopping = false;
        for signal in signals.forever() {
            let told = if signal == SIGHUP { Signal::Reload } else { Signal::Stop };
            if told == Signal::Stop && std::mem::replace(&mut is_stopping, true) {
                log::warn!("second signal: leaving at once");
                std::process::exit(1);
            }
            // A full channel already holds what matters.
            let _ = sender.try_send(told);
        }
    };
    spawn("signals", listen)?;
    if until_eof {
        spawn("stdin", move || {
            let mut buffer = [0; 64];
            while matches!(io::stdin().read(&mut buffer), Ok(1..)) {}
            let _ = eof.try_send(Signal::Stop);
        })?;
    }
    Ok(receiver)
}

/// Asks the kernel for as many descriptors as may be needed. A process commonly begins with 1024, and may have many times that
/// (getrlimit(2)); one that gets fewer refuses connections when they run out.
pub fn raise_descriptors(needed: usize) {
    let needed = u64::try_from(needed).unwrap_or(u64::MAX);
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let granted = maximum.map_or(needed, |maximum| maximum.min(needed));
    if current.is_some_and(|current| current < granted) {
        if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(granted), maximum }) {
            log::warn!("cannot have more descriptors: {error}");
        }
    }
    if let Some(has) = getrlimit(Resource::Nofile).current.filter(|has| *has < needed) {
        log::warn!("there are {has} descriptors, and so many nodes and clients may need {needed}; raise the limit (ulimit -n)");
    }
}

/// Starts a named thread with the stack all threads here have.
///
/// # Errors
/// [`Error::Thread`].
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<thread::JoinHandle<()>, Error> {
    thread::Builder::new().name(name.to_owned()).stack_size(limits::STACK_BYTES).spawn(body).map_err(Error::Thread)
}

/// Binds all addresses, then serves on all, with places for `CONNECTIONS_MAX` connections together.
///
/// # Errors
/// [`Error::Bind`]: then none is served.
pub fn serve<S: Service>(addresses: &[Address], name: &'static str, service: &Arc<S>) -> Result<Vec<Server>, Error> {
    let bind = |address: &Address| Listener::bind(address).map_err(|e| Error::Bind(address.clone(), e));
    let listeners: Vec<Listener> = addresses.iter().map(bind).collect::<Result<_, _>>()?;
    let slots = Arc::default();
    let start = |listener| Server::start_with(listener, name, Arc::clone(service), Arc::clone(&slots)).map_err(Error::Thread);
    listeners.into_iter().map(start).collect()
}

/// Logs where the servers listen, and writes it to the ready file: a line each, `tcp=ADDRESS` or `unix=PATH`.
///
/// # Errors
/// [`Error::Ready`].
pub fn announce(servers: &[Server], ready_file: Option<&Path>) -> Result<(), Error> {
    let mut lines = String::new();
    for server in servers {
        log::info!("listening on {}", server.address());
        match server.address() {
            Address::Tcp(addr) => lines.push_str(&format!("tcp={addr}\n")),
            Address::Unix(path) => lines.push_str(&format!("unix={}\n", path.display())),
        }
    }
    let Some(path) = ready_file else { return Ok(()) };
    // Renamed into place, so that whoever sees the file sees all of it.
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(".new");
    fs::write(&hidden, lines).and_then(|()| fs::rename(&hidden, path)).map_err(Error::Ready)
}
