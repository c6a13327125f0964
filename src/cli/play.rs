//! `kakuri play --project DIR`: a control plane and an agent on this machine, for as long as this process lives.
//!
//! The first run makes the bundle; each run starts the programs that stand beside this one. Without a container runtime the
//! simulator takes its place, and says so in a frame.
//!
//! Children run with `--until-eof` and a pipe for stdin that only this process holds: closing it asks them to stop, and dying,
//! however, closes it. Threads: one per child, which passes its stderr on.

use std::fmt;
use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::command::Play;
use crate::config::{self, CONTROL_PLANE_LISTEN, CRI_SOCKETS, ControlPlaneConfig};
use crate::deadline::Deadline;
use crate::flags::Parsed;
use crate::limits;
use crate::net::address::{self, AddressError};
use crate::net::{self, Address, Stream};
use crate::report::{Chain, Exit, complain};
use crate::workload::Name;

const PROGRAM: &str = "kakuri play";
const AGENT: &str = "kakuri-agent";
const CONTROL_PLANE: &str = "kakuri-control-plane";
const SIMULATOR: &str = "kakuri-cri-sim";

/// Why `play` ended without being asked to.
#[derive(Debug)]
pub(super) enum Error {
    /// `runtime.toml` is wrong.
    Config(config::Error),
    /// A program ended by itself.
    Ended { program: &'static str, status: ExitStatus },
    /// The project cannot be made or read.
    File { path: PathBuf, cause: io::Error },
    /// A program cannot be started.
    Program { path: PathBuf, cause: io::Error },
    /// A program runs, and does not serve.
    Ready { program: &'static str },
    /// The runtime asked for does not answer.
    Runtime { path: PathBuf, cause: net::Error },
    /// Signals cannot be had.
    Signals { cause: io::Error },
    /// The project's path leaves no room for the name of a socket.
    Socket { path: PathBuf, cause: AddressError },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(error) => error.fmt(f),
            Self::Ended { program, status } => write!(f, "{program} ended: {status}; the others were stopped"),
            Self::File { path, .. } => write!(f, "{}", path.display()),
            Self::Program { path, .. } => write!(f, "cannot start {}; all programs of kakuri must stand in one directory", path.display()),
            Self::Ready { program } => {
                write!(f, "{program} does not serve after {} s; the others were stopped", limits::PLAY_READY_MS_MAX / 1000)
            }
            Self::Runtime { path, .. } => write!(f, "container runtime {}", path.display()),
            Self::Signals { .. } => f.write_str("signal handlers"),
            Self::Socket { path, .. } => write!(f, "{}", path.display()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Config(error) => error.source(),
            Self::Ended { .. } | Self::Ready { .. } => None,
            Self::File { cause, .. } | Self::Program { cause, .. } | Self::Signals { cause } => Some(cause),
            Self::Runtime { cause, .. } => Some(cause),
            Self::Socket { cause, .. } => Some(cause),
        }
    }
}

impl Error {
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Config(_) | Self::Socket { .. } => Exit::Usage,
            Self::Runtime { .. } => Exit::Unavailable,
            Self::Ended { .. } | Self::File { .. } | Self::Program { .. } | Self::Ready { .. } | Self::Signals { .. } => Exit::General,
        }
    }
}

/// Runs until somebody says stop, or a child ends.
pub(super) fn play(options: &Play) -> Result<Exit, Error> {
    let project = Project::open(&options.project)?;
    let config = project.config()?;
    let runtime = choose_runtime(options)?;
    // Before the first child, so that no signal is missed.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGCHLD]).map_err(|cause| Error::Signals { cause })?;
    let mut children = Children(Vec::new());
    let result = start(&project, &config, runtime, &mut children, &mut signals)
        .and_then(|serves| if serves { watch(&mut children, &mut signals) } else { Ok(()) });
    complain(PROGRAM, &"stopping");
    children.stop(&mut signals);
    result.map(|()| Exit::Ok)
}

/// A bundle on disk.
struct Project {
    directory: PathBuf,
}

impl Project {
    /// Makes whatever is missing of it; what is there stays as it is.
    fn open(directory: &Path) -> Result<Self, Error> {
        let make = |path: &Path, mode| {
            let made = DirBuilder::new().recursive(true).mode(mode).create(path);
            made.map_err(|cause| Error::File { path: path.to_owned(), cause })
        };
        make(directory, 0o755)?;
        let directory = directory.canonicalize().map_err(|cause| Error::File { path: directory.to_owned(), cause })?;
        // Whoever reaches the agent's socket rules its workloads.
        make(&directory.join("data"), 0o700)?;
        make(&directory.join("certs"), 0o700)?;
        write_new(&directory.join(".gitignore"), "/data/\n/certs/\n")?;
        let name = name_of(&directory);
        let runtime = format!(
            "[runtime]\nname = \"{name}\"\nsite = \"default-site\"\n\n\
             [runtime.web]\nlisten = \"{CONTROL_PLANE_LISTEN}\"\nauth = \"local\"\n\n\
             [runtime.log]\nlevel = \"info\"\n"
        );
        if write_new(&directory.join("runtime.toml"), &runtime)? {
            complain(PROGRAM, &format_args!("made {}: runtime.toml, data/, certs/, .gitignore", directory.display()));
        }
        Ok(Self { directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn data(&self, name: &str) -> PathBuf {
        self.path("data").join(name)
    }

    fn socket(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.data(name);
        address::unix_path(&path.to_string_lossy()).map_err(|cause| Error::Socket { path, cause })
    }

    /// Reads `runtime.toml` as the control plane will, which has no part of our environment either.
    fn config(&self) -> Result<ControlPlaneConfig, Error> {
        let args = ["--config".to_owned(), self.path("runtime.toml").display().to_string()];
        match config::control_plane_in(&args, |_| None) {
            Ok(Parsed::Run(config)) => Ok(config),
            // No flag here asks for a text instead.
            Ok(Parsed::Special(_)) => Err(Error::Config(config::Error::Problems(Vec::new()))),
            Err(error) => Err(Error::Config(error)),
        }
    }
}

/// Writes a file unless there is one; says whether it did.
fn write_new(path: &Path, text: &str) -> Result<bool, Error> {
    match OpenOptions::new().write(true).create_new(true).open(path).and_then(|mut file| file.write_all(text.as_bytes())) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(cause) => Err(Error::File { path: path.to_owned(), cause }),
    }
}

/// The folder's name, as near as a name can come to it.
fn name_of(directory: &Path) -> String {
    let folder = directory.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let plain: String = folder.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(limits::NAME_BYTES_MAX).collect();
    Name::new(plain.trim_matches('-')).map_or_else(|_| "runtime".into(), |name| name.as_str().to_owned())
}

/// Finds out whether somebody serves this socket.
fn try_connect(path: &Path) -> Result<(), net::Error> {
    Stream::connect(&Address::Unix(path.to_owned()), Deadline::within_ms(limits::CLI_CONNECT_MS_MAX, "connect")).map(drop)
}

/// The runtime to use, or none: then the simulator.
fn choose_runtime(options: &Play) -> Result<Option<PathBuf>, Error> {
    if options.simulator {
        return Ok(None);
    }
    if let Some(path) = &options.runtime {
        try_connect(path).map_err(|cause| Error::Runtime { path: path.clone(), cause })?;
        return Ok(Some(path.clone()));
    }
    for path in CRI_SOCKETS {
        match try_connect(Path::new(path)) {
            Ok(()) => return Ok(Some(path.into())),
            Err(net::Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => complain(PROGRAM, &format_args!("{path} is of no use: {}", Chain(&error))),
        }
    }
    Ok(None)
}

const WARNING: &str = "
+--------------------------------------------------------------------------+
|                                                                          |
|   SIMULATION: NOTHING IS ISOLATED, AND NO CONTAINER RUNS.                |
|                                                                          |
|   kakuri-cri-sim stands in for a container runtime (Edera, containerd,   |
|   CRI-O): it plays the states of containers and runs none of them.       |
|   Do not take anything seen here for protection.                         |
|                                                                          |
+--------------------------------------------------------------------------+
";

/// Starts everything in order, each once the one before serves. Whether it serves: somebody may have said stop meanwhile.
fn start(
    project: &Project,
    config: &ControlPlaneConfig,
    runtime: Option<PathBuf>,
    children: &mut Children,
    signals: &mut Signals,
) -> Result<bool, Error> {
    let runtime = match runtime {
        Some(path) => {
            complain(PROGRAM, &format_args!("container runtime {}", path.display()));
            path
        }
        None => {
            // A closed stderr leaves no one to warn.
            let _ = io::stderr().write_all(WARNING.as_bytes());
            let socket = project.socket("cri-sim.sock")?;
            let root = project.data("sim").display().to_string();
            children.spawn(SIMULATOR, &["--listen", &unix(&socket), "--root", &root, "--until-eof"])?;
            if !children.serve(SIMULATOR, signals, || try_connect(&socket).is_ok())? {
                return Ok(false);
            }
            socket
        }
    };
    let agent = unix(&project.socket("agent.sock")?);
    let level = config.log_level.as_str().to_ascii_lowercase();
    let state_dir = project.data("agent").display().to_string();
    let ready = ReadyFile::new(project.data("agent.ready"))?;
    #[rustfmt::skip]
    let args = [
        "--node-id", "local", "--listen", &agent, "--cri-endpoint", &unix(&runtime), "--state-dir", &state_dir, "--log-level", &level,
        "--ready-file", &ready.text(), "--until-eof",
    ];
    children.spawn(AGENT, &args)?;
    if !children.serve(AGENT, signals, || ready.address().is_some())? {
        return Ok(false);
    }
    let ready = ReadyFile::new(project.data("control-plane.ready"))?;
    let file = project.path("runtime.toml").display().to_string();
    let data_dir = project.data("control-plane").display().to_string();
    // Nodes given by a flag replace those of the file, so the file's are repeated.
    let others = config.nodes.iter().filter(|(id, _)| id.as_str() != "local").map(|(id, address)| format!("{id}={address}"));
    let nodes: Vec<String> = others.chain([format!("local={agent}")]).collect();
    let mut args = vec!["--config", &file, "--data-dir", &data_dir];
    args.extend(nodes.iter().flat_map(|node| ["--node", node]));
    let ready_file = ready.text();
    args.extend(["--ready-file", &ready_file, "--until-eof"]);
    children.spawn(CONTROL_PLANE, &args)?;
    if !children.serve(CONTROL_PLANE, signals, || ready.address().is_some())? {
        return Ok(false);
    }
    let address = ready.address().unwrap_or_default();
    complain(PROGRAM, &format_args!("{} is ready on {address}, its agent on {agent}", config.name));
    if address.starts_with("http:") {
        complain(PROGRAM, &format_args!("try: curl {address}/nodes"));
        complain(PROGRAM, &format_args!("try: kakuri --server {address} run --image busybox --profile internal --wait -- echo hello"));
    }
    complain(PROGRAM, &"Ctrl-C stops both; workloads of a real runtime live on");
    Ok(true)
}

fn unix(path: &Path) -> String {
    Address::Unix(path.to_owned()).to_string()
}

/// The file a daemon writes once it serves.
struct ReadyFile(PathBuf);

impl ReadyFile {
    /// Removes the one of the run before.
    fn new(path: PathBuf) -> Result<Self, Error> {
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(Self(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self(path)),
            Err(cause) => Err(Error::File { path, cause }),
        }
    }

    fn text(&self) -> String {
        self.0.display().to_string()
    }

    /// The first address it names, when the line is complete; that of TCP as a URL.
    fn address(&self) -> Option<String> {
        let text = std::fs::read_to_string(&self.0).ok()?;
        let (line, _) = text.split_once('\n')?;
        Some(line.strip_prefix("tcp=").map_or_else(|| line.replacen("unix=", "unix://", 1), |address| format!("http://{address}")))
    }
}

/// Returns when somebody says stop; fails when a child ends.
fn watch(children: &mut Children, signals: &mut Signals) -> Result<(), Error> {
    // What happened before the last look is found by this one.
    children.all_alive()?;
    loop {
        let arrived: Vec<i32> = signals.wait().collect();
        if arrived.iter().any(|signal| *signal != SIGCHLD) {
            return Ok(());
        }
        children.all_alive()?;
    }
}

/// The programs that run, in the order they were started.
struct Children(Vec<Running>);

struct Running {
    program: &'static str,
    child: Child,
    relay: thread::JoinHandle<()>,
}

impl Children {
    fn spawn(&mut self, program: &'static str, args: &[&str]) -> Result<(), Error> {
        let beside = std::env::current_exe().map(|me| me.with_file_name(program));
        let path = beside.unwrap_or_else(|_| program.into());
        let fail = |cause| Error::Program { path: path.clone(), cause };
        let mut command = Command::new(&path);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        // What is meant for this process (KAKURI_LISTEN for one) must not reach all of them.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"KAKURI_")) {
            command.env_remove(name);
        }
        let mut child = command.spawn().map_err(fail)?;
        let stderr = child.stderr.take();
        let relay = thread::Builder::new().name(format!("relay {program}")).spawn(move || relay(program, stderr)).map_err(fail)?;
        self.0.push(Running { program, child, relay });
        Ok(())
    }

    /// Waits until `ready`; `false` when somebody said stop first.
    fn serve(&mut self, program: &'static str, signals: &mut Signals, ready: impl Fn() -> bool) -> Result<bool, Error> {
        let deadline = Deadline::within_ms(limits::PLAY_READY_MS_MAX, "ready");
        while !ready() {
            self.all_alive()?;
            if is_stop(signals) {
                return Ok(false);
            }
            if deadline.left().is_err() {
                return Err(Error::Ready { program });
            }
            // A child, its socket and a signal are waited for at once, and std waits for none of them with a deadline.
            thread::sleep(Duration::from_millis(limits::PLAY_POLL_MS));
        }
        Ok(true)
    }

    fn all_alive(&mut self) -> Result<(), Error> {
        for Running { program, child, .. } in &mut self.0 {
            // A child that cannot be asked is as good as gone, but there is no status to tell: the next signal asks again.
            if let Ok(Some(status)) = child.try_wait() {
                return Err(Error::Ended { program, status });
            }
        }
        Ok(())
    }

    /// Asks each to stop, the last started first; kills what does not, or all the rest when somebody says stop again.
    fn stop(self, signals: &mut Signals) {
        let mut hurry = false;
        for Running { program, mut child, relay } in self.0.into_iter().rev() {
            drop(child.stdin.take());
            let deadline = Deadline::within_ms(limits::DRAIN_MS.saturating_mul(2), "stop");
            while let Ok(None) = child.try_wait() {
                hurry = hurry || is_stop(signals);
                if hurry || deadline.left().is_err() {
                    complain(PROGRAM, &format_args!("killing {program}"));
                    // Only a child that has ended meanwhile cannot be killed.
                    let _ = child.kill();
                    let _ = child.wait();
                    break;
                }
                // Its end and a signal are waited for at once, and std waits for neither with a deadline.
                thread::sleep(Duration::from_millis(limits::PLAY_POLL_MS));
            }
            // A relay cannot panic on what a child says; if it did, that has been printed.
            let _ = relay.join();
        }
    }
}

fn is_stop(signals: &mut Signals) -> bool {
    signals.pending().any(|signal| signal != SIGCHLD)
}

/// Passes the lines of a child on, each with the child's name.
fn relay(program: &str, stderr: Option<ChildStderr>) {
    let Some(stderr) = stderr else { return };
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    let bytes_max = u64::try_from(limits::LOG_LINE_BYTES_MAX).unwrap_or(u64::MAX);
    while let Ok(1..) = lines.by_ref().take(bytes_max).read_until(b'\n', &mut line) {
        complain(&format!("{program:>20}"), &String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_gives_its_name() {
        let check = |folder: &str, expect: &str| assert_eq!(name_of(Path::new(folder)), expect, "{folder}");
        check("/srv/runtime-a", "runtime-a");
        check("/srv/My Project_2", "my-project-2");
        check("/srv/.demo.", "demo");
        check("/srv/隔離", "runtime");
        check("/", "runtime");
    }

    #[test]
    fn the_first_run_makes_a_bundle_and_the_second_keeps_it() {
        let directory = std::env::temp_dir().join(format!("kakuri-play-{}", std::process::id()));
        let project = Project::open(&directory).expect("a bundle");
        let config = project.config().expect("a valid runtime.toml");
        assert_eq!(config.name.as_str(), name_of(&directory));
        assert_eq!(config.listen, [Address::parse(CONTROL_PLANE_LISTEN).expect("valid")]);
        for secret in ["data", "certs"] {
            let mode = directory.join(secret).metadata().expect("a directory").permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{secret}");
        }
        std::fs::write(project.path("runtime.toml"), "[runtime]\nname = \"mine\"\n").expect("written");
        assert_eq!(Project::open(&directory).and_then(|p| p.config()).expect("a bundle").name.as_str(), "mine");
        std::fs::write(project.path("runtime.toml"), "[runtime]\nnam = 1\n").expect("written");
        assert!(matches!(project.config(), Err(Error::Config(_))));
        std::fs::remove_dir_all(&directory).expect("removed");
    }

    #[test]
    fn a_ready_file_is_read_when_complete() {
        let path = std::env::temp_dir().join(format!("kakuri-ready-{}", std::process::id()));
        std::fs::write(&path, "stale").expect("written");
        let ready = ReadyFile::new(path.clone()).expect("removed");
        assert_eq!(ready.address(), None);
        std::fs::write(&path, "tcp=127.0.0.1:80").expect("written");
        assert_eq!(ready.address(), None, "the line has not ended");
        std::fs::write(&path, "tcp=127.0.0.1:8080\nunix=/x\n").expect("written");
        assert_eq!(ready.address().as_deref(), Some("http://127.0.0.1:8080"));
        std::fs::write(&path, "unix=/x\n").expect("written");
        assert_eq!(ready.address().as_deref(), Some("unix:///x"));
        std::fs::remove_file(&path).expect("removed");
    }
}
