//! `kakuri-cri-sim`: a CRI v1 runtime on a Unix socket that only simulates. **Nothing is isolated, nothing real runs.**
//!
//! *Scope*: for tests, and for machines without a runtime. Containers are state machines driven by their command (`script`'s
//! mini-language), with real CRI log files; images are names, and what their name says is how a pull goes (`not-found`,
//! `unauthorized`, `unreachable`, `disk-full`, `slow-500`), how large it is (`mb-70`), and that its content is another's
//! (`same-1`); every method takes scripted faults (`faults`), from flags or from a
//! file that tests replace at run time; each call leaves a line in a log. *Not here*: processes, networks, anything to trust.
//!
//! With `--persist` the state is written to `DIR/state` at each change and read at the start. A simulator that was killed then
//! finds its containers as a real runtime finds its shims: they went on by the clock on the wall, and one whose time came
//! meanwhile ended then. A line printed in the very moment of the kill may be printed twice. Without the flag a restart is a reboot.
//!
//! Threads: one accepts, one runs all containers; each connection has a driver, a reader and at most `SIM_WORKERS_MAX` workers.

mod authority;
mod faults;
mod logs;
mod machine;
mod methods;
mod script;
mod server;
mod state;
#[cfg(test)]
mod tests;

pub use faults::Fault;

use std::fmt;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::daemon::{self, Signal};
use crate::flags::{self, Flag, Matches, Parsed, Takes, Usage};
use crate::limits;
use crate::net::address::{Address, unix_path};
use crate::net::listen::Server;
use crate::report::{self, Chain, Exit};
use crate::workload::Name;

const PROGRAM: &str = "kakuri-cri-sim";

const USAGE: Usage = Usage::new(
    PROGRAM,
    "--listen unix:///PATH [OPTIONS]",
    "A CRI v1 runtime that only simulates containers: nothing is isolated, nothing real runs.",
    &[&[
        Flag::long("listen", Takes::Value("unix:///PATH"), "the socket to serve on"),
        Flag::long("root", Takes::Value("DIR"), "directory of the state file"),
        Flag::long("persist", Takes::Nothing, "keep the state in DIR over a restart"),
        Flag::long("handlers", Takes::Value("A,B"), "runtime handlers, the default first (runc,gvisor,kata,edera)"),
        Flag::long("no-handler-list", Takes::Nothing, "list handlers as containerd 1.6 does: in the verbose configuration only"),
        Flag::long("no-events", Takes::Nothing, "GetContainerEvents is unimplemented"),
        Flag::long("fault", Takes::Values("SPEC"), "METHOD:ACTION[=ARG][*COUNT][@AFTER], lie=HANDLER, kernel=HANDLER:VALUE"),
        Flag::long("fault-file", Takes::Value("PATH"), "a spec a line; read again whenever it changed"),
        Flag::long("log-calls", Takes::Value("PATH"), "append a line for each call"),
        Flag::long("ready-file", Takes::Value("PATH"), "write unix=PATH to it once it serves"),
        Flag::long("until-eof", Takes::Nothing, "end when stdin does"),
        Flag::long("log-level", Takes::Value("LEVEL"), "error, warn, info, debug or trace"),
    ]],
    "kakuri-cri-sim --listen unix:///tmp/sim.sock --fault 'RunPodSandbox:delay=500*1'",
);

/// What a simulator is like.
#[derive(Clone, Debug)]
pub struct Options {
    /// Runtime handlers; the first is the default.
    pub handlers: Vec<String>,
    /// Whether `Status` lists them, as containerd 2 does.
    pub lists_handlers: bool,
    /// Whether `GetContainerEvents` is there.
    pub has_events: bool,
    /// Faults in force from the start.
    pub faults: Vec<Fault>,
    /// A file with more of them.
    pub fault_file: Option<PathBuf>,
    /// Where each call leaves a line.
    pub call_log: Option<PathBuf>,
    /// Where the state is kept.
    pub state_file: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            handlers: ["runc", "gvisor", "kata", "edera"].map(String::from).to_vec(),
            lists_handlers: true,
            has_events: true,
            faults: Vec::new(),
            fault_file: None,
            call_log: None,
            state_file: None,
        }
    }
}

/// Why a simulator cannot run.
#[derive(Debug)]
pub enum Error {
    /// Its socket, signals or threads.
    Daemon(daemon::Error),
    /// A file or directory it needs.
    File(PathBuf, io::Error),
    /// The command line.
    Usage(flags::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Daemon(error) => error.fmt(f),
            Self::File(path, _) => path.display().fmt(f),
            Self::Usage(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Daemon(error) => error.source(),
            Self::File(_, error) => Some(error),
            Self::Usage(_) => None,
        }
    }
}

/// A running simulator.
#[derive(Debug)]
pub struct Sim {
    machine: Arc<machine::Machine>,
    servers: Vec<Server>,
    scheduler: JoinHandle<()>,
}

impl Sim {
    /// Starts to serve on the Unix socket at `path`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn start(path: &Path, options: Options) -> Result<Self, Error> {
        let machine = Arc::new(machine::Machine::new(options)?);
        let front = Arc::new(server::Front(Arc::clone(&machine)));
        let servers = daemon::serve(&[Address::Unix(path.to_owned())], "cri", &front).map_err(Error::Daemon)?;
        let containers = Arc::clone(&machine);
        let scheduler = daemon::spawn("cri-containers", move || containers.schedule()).map_err(Error::Daemon)?;
        Ok(Self { machine, servers, scheduler })
    }

    /// Stops: calls that only compute are answered, those that wait fail.
    pub fn stop(self) {
        self.servers.into_iter().for_each(|server| server.stop(limits::DRAIN_MS));
        self.machine.stop();
        let _ = self.scheduler.join(); // Had it panicked, containers had stood still, and all who use us had seen it.
    }
}

/// The program `kakuri-cri-sim`.
pub fn main() -> ExitCode {
    let read = flags::arguments(PROGRAM).and_then(|args| USAGE.parse(&args, flags::environment)).map_err(Error::Usage);
    let outcome = match read {
        // A closed stdout has nobody to tell.
        Ok(Parsed::Special(text)) => return report::say(&text).map_or(Exit::General, |()| Exit::Ok).into(),
        Ok(Parsed::Run(matches)) => run(&matches),
        Err(error) => Err(error),
    };
    let Err(error) = outcome else { return Exit::Ok.into() };
    report::complain(PROGRAM, &Chain(&error));
    if matches!(error, Error::Usage(_)) { Exit::Usage } else { Exit::General }.into()
}

fn run(matches: &Matches) -> Result<(), Error> {
    let (path, level, options) = settings(matches).map_err(Error::Usage)?;
    report::init_log(PROGRAM, level);
    report::complain(PROGRAM, &"THIS IS A SIMULATOR: nothing is isolated, nothing real runs");
    if let Some(root) = matches.one("root").map(PathBuf::from) {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&root);
        made.map_err(|error| Error::File(root, error))?;
    }
    let signals = daemon::signals(matches.present("until-eof")).map_err(Error::Daemon)?;
    let sim = Sim::start(&path, options)?;
    daemon::announce(&sim.servers, matches.one("ready-file").as_ref().map(Path::new)).map_err(Error::Daemon)?;
    // There is nothing to reload: the fault file is read at each call.
    while signals.recv() == Ok(Signal::Reload) {}
    log::info!("stopping");
    sim.stop();
    Ok(())
}

fn settings(matches: &Matches) -> Result<(PathBuf, log::LevelFilter, Options), flags::Error> {
    matches.no_words()?;
    let path = matches.parsed("listen", unix_path)?.ok_or_else(|| matches.error("--listen is missing"))?;
    let level = |text: &str| report::level(text).ok_or(format!("must be one of {}", report::LEVELS));
    let names = |text: &str| text.split(',').map(|name| Name::new(name).map(|name| name.to_string())).collect();
    let root = matches.one("root").map(PathBuf::from);
    let state_file = match (root, matches.present("persist")) {
        (None, true) => return Err(matches.error("--persist needs --root")),
        (Some(root), true) => Some(root.join("state")),
        (_, false) => None,
    };
    let defaults = Options::default();
    let options = Options {
        handlers: matches.parsed("handlers", names)?.unwrap_or(defaults.handlers),
        lists_handlers: !matches.present("no-handler-list"),
        has_events: !matches.present("no-events"),
        faults: matches.all_parsed("fault", Fault::parse)?,
        fault_file: matches.one("fault-file").map(PathBuf::from),
        call_log: matches.one("log-calls").map(PathBuf::from),
        state_file,
    };
    Ok((path, matches.parsed("log-level", level)?.unwrap_or(log::LevelFilter::Info), options))
}
