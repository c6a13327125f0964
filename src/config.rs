//! The configuration of both daemons: TOML file, environment and flags become one checked value, or a list of all that is wrong.
//!
//! *Scope*: `toml` enters here and nowhere else. The control plane's file is the bundle's `runtime.toml`. *Not here*: opening
//! what the configuration names.
//!
//! Flag, then `KAKURI_*`, then file, then default; a list from one of them replaces that of the next.
//! Invariant: every problem names where the value came from: `--flag`, `KAKURI_VARIABLE` or `file:line`.
//! Invariant: a key this version does not know is an error, never ignored.

mod defaults;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::{Range, RangeInclusive};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use log::LevelFilter;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

use crate::flags::{self, Environment, Flag, Given, Matches, Parsed, Takes, Usage};
use crate::limits;
use crate::net::{Address, address};
use crate::report;
use crate::workload::{Name, Unfit, check_label};
use defaults::agent_listen;
pub(crate) use defaults::control_plane_listen;

/// CRI sockets looked for when none is configured, the best one first: Edera, containerd, CRI-O.
pub const CRI_SOCKETS: [&str; 3] = ["/var/lib/edera/protect/cri.socket", "/run/containerd/containerd.sock", "/run/crio/crio.sock"];

/// Where a control plane listens when nobody says.
pub const CONTROL_PLANE_LISTEN: &str = control_plane_listen!();

/// What the agent is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentConfig {
    /// The node's name.
    pub node_id: Name,
    /// Where to listen.
    pub listen: Vec<Address>,
    /// Other machines may reach a listener, although there is no TLS.
    pub insecure_listen: bool,
    /// The CRI runtime; the first of [`CRI_SOCKETS`] that is there when absent.
    pub cri_endpoint: Option<PathBuf>,
    /// The classes this node offers; chosen by what the runtime offers when empty.
    pub classes: Vec<ClassConfig>,
    /// The agent's own files.
    pub state_dir: PathBuf,
    /// Where the runtime writes the logs of containers.
    pub log_dir: PathBuf,
    /// How much of them is kept.
    pub logs: LogLimits,
    /// How much to say.
    pub log_level: LevelFilter,
    /// Host directories workloads may mount from.
    pub mount_roots: Vec<PathBuf>,
    /// For node selectors.
    pub labels: BTreeMap<String, String>,
    /// Memory to offer, MiB; the machine's when absent.
    pub memory_mb: Option<u64>,
    /// CPU to offer, thousandths of a core; the machine's when absent.
    pub cpu_millicores: Option<u64>,
    /// Workers that start workloads.
    pub start_workers: usize,
    /// Workers that stop workloads.
    pub stop_workers: usize,
    /// Time between two relists; depends on the runtime when absent.
    pub relist_ms: Option<u64>,
    /// A `config.json` as Docker writes it, with the credentials of registries.
    pub registry_credentials: Option<PathBuf>,
    /// Others of them, by the name under which workloads ask for them.
    pub credentials: BTreeMap<Name, PathBuf>,
    /// Images pulled at a time.
    pub pulls_max: usize,
    /// When images are collected.
    pub image_gc: ImageGc,
    /// A file that gets a line per listener (`tcp=ADDRESS`, `unix=PATH`) once the daemon serves.
    pub ready_file: Option<PathBuf>,
    /// Stop when stdin ends.
    pub until_eof: bool,
}

/// How much is kept of what containers write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// A file of this size is rotated.
    pub file_bytes: u64,
    /// Files of one workload, the one being written included.
    pub files: u64,
    /// All logs of the node together.
    pub total_bytes: u64,
    /// What logs leave free of their file system; a twentieth of it, up to `LOG_RESERVE_MB_DEFAULT`, when absent.
    pub reserve_bytes: Option<u64>,
    /// How often a log that does not grow is looked at.
    pub check_ms: u64,
}

/// When images that kakuri pulled, and nobody uses, are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageGc {
    /// From here on, percent of their file system; 100 is never.
    pub high_percent: u64,
    /// Down to here.
    pub low_percent: u64,
    /// Younger ones stay, milliseconds.
    pub min_age_ms: u64,
    /// The room for images; that of their file system when absent.
    pub capacity_bytes: Option<u64>,
}

/// A runtime class: which handler of which runtime, and what it costs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassConfig {
    /// As workloads name it.
    pub name: Name,
    /// As the runtime names it; never empty, because an empty handler means "whatever the default is".
    pub handler: String,
    /// Another CRI runtime than the agent's.
    pub endpoint: Option<PathBuf>,
    /// Its sandboxes run their own kernel: proven after each start.
    pub own_kernel: bool,
    /// Sandbox annotations, the same for every workload.
    pub annotations: BTreeMap<String, String>,
    /// Memory a sandbox takes beside its workload, MiB.
    pub overhead_mb: u64,
    /// The least memory a workload may ask for, MiB.
    pub memory_mb_min: u64,
    /// Starting a sandbox may take this long.
    pub start_timeout_ms: u64,
}

impl ClassConfig {
    /// A class with the defaults of its kind. The name and the handler both tell the kind, and the stricter of the two counts,
    /// so that a class called `kata` never loses its kernel check by pointing elsewhere.
    pub fn new(name: Name, handler: String, endpoint: Option<PathBuf>) -> Self {
        let (by_name, by_handler) = (Kind::of(name.as_str()), Kind::of(&handler));
        Self {
            name,
            handler,
            endpoint,
            own_kernel: by_name.own_kernel || by_handler.own_kernel,
            annotations: BTreeMap::new(),
            overhead_mb: by_name.overhead_mb.max(by_handler.overhead_mb),
            memory_mb_min: by_name.memory_mb_min.max(by_handler.memory_mb_min),
            start_timeout_ms: limits::START_DEADLINE_MS_DEFAULT,
        }
    }
}

/// What is known of a family of runtimes.
struct Kind {
    own_kernel: bool,
    overhead_mb: u64,
    memory_mb_min: u64,
}

impl Kind {
    fn of(text: &str) -> Self {
        let kind = |own_kernel, overhead_mb, memory_mb_min| Self { own_kernel, overhead_mb, memory_mb_min };
        match text {
            // A zone's kernel lives inside the workload's memory; Edera raises anything below 300 MB to that.
            t if t.starts_with("edera") => kind(true, 0, 300),
            // Kata's own figure for its QEMU hypervisor (kata-deploy's RuntimeClass).
            t if t.starts_with("kata") => kind(true, 160, limits::MEMORY_MB_MIN),
            // The Sentry and the Gofer at rest.
            t if t.starts_with("gvisor") || t.starts_with("runsc") => kind(true, 24, limits::MEMORY_MB_MIN),
            _ => kind(false, 0, limits::MEMORY_MB_MIN),
        }
    }
}

/// What the control plane is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlPlaneConfig {
    /// Its name among the runtimes of its site.
    pub name: Name,
    /// Its site.
    pub site: Name,
    /// Where to listen for HTTP.
    pub listen: Vec<Address>,
    /// Other machines may reach a listener, although there is neither TLS nor authentication.
    pub insecure_listen: bool,
    /// The agents.
    pub nodes: Vec<(Name, Address)>,
    /// Its store.
    pub data_dir: PathBuf,
    /// How many ended workloads it keeps.
    pub history: usize,
    /// What it is started for.
    pub task: Task,
    /// How much to say.
    pub log_level: LevelFilter,
    /// A file that gets a line per listener (`tcp=ADDRESS`, `unix=PATH`) once the daemon serves.
    pub ready_file: Option<PathBuf>,
    /// Stop when stdin ends.
    pub until_eof: bool,
}

/// What a control plane is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// To write its store to stdout.
    Export,
    /// To make its store out of stdin.
    Import,
    /// To serve.
    Serve,
}

/// A value that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// `--flag`, `KAKURI_VARIABLE` or `file:line`.
    pub origin: String,
    /// The rule.
    pub rule: String,
}

/// Why there is no configuration; exit 2.
#[derive(Debug)]
pub enum Error {
    /// The command line.
    Flags(flags::Error),
    /// Everything that is wrong.
    Problems(Vec<Problem>),
    /// The file cannot be read.
    Read {
        /// As given.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flags(error) => error.fmt(f),
            Self::Problems(problems) => {
                f.write_str("configuration")?;
                // A rule may quote a key, and a key may be as long as the file.
                let clipped = |rule: &str| report::clip(rule.to_owned(), limits::MESSAGE_BYTES_MAX);
                problems.iter().try_for_each(|problem| write!(f, "\n  {}: {}", problem.origin, clipped(&problem.rule)))
            }
            Self::Read { path, .. } => write!(f, "configuration file {}", path.display()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Flags(_) | Self::Problems(_) => None,
            Self::Read { cause, .. } => Some(cause),
        }
    }
}

impl From<flags::Error> for Error {
    fn from(error: flags::Error) -> Self {
        Self::Flags(error)
    }
}

const CONFIG: Flag = Flag::short("c", "config", Takes::Value("FILE"), "read this TOML file");
const CHECK_CONFIG: Flag = Flag::long("check-config", Takes::Nothing, "check the configuration and leave");
const fn listen(about: &'static str) -> Flag {
    Flag::short("l", "listen", Takes::Values("ADDR"), about)
}
const INSECURE_LISTEN: Flag = Flag::long("insecure-listen", Takes::Nothing, "let other machines connect, without TLS");
const LOG_LEVEL: Flag = Flag::long("log-level", Takes::Value("LEVEL"), report::LEVELS);
const READY_FILE: Flag = Flag::long("ready-file", Takes::Value("FILE"), "write the addresses there once they are served");
const UNTIL_EOF: Flag = Flag::long("until-eof", Takes::Nothing, "stop when stdin ends");

const AGENT: Usage = Usage::new(
    "kakuri-agent",
    "[--config FILE] --node-id ID [OPTIONS]",
    "Runs workloads on this machine, through its CRI runtime.",
    &[&[
        CONFIG,
        CHECK_CONFIG,
        Flag::long("node-id", Takes::Value("ID"), "this node's name"),
        listen(concat!("IP:PORT or unix:///PATH; repeatable; else ", agent_listen!())),
        INSECURE_LISTEN,
        Flag::long("cri-endpoint", Takes::Value("unix:///PATH"), "the CRI runtime; else Edera, containerd, CRI-O"),
        Flag::long("runtime-class", Takes::Values("NAME=HANDLER[@ENDPOINT]"), "offer this class; repeatable"),
        Flag::long("state-dir", Takes::Value("DIR"), "the agent's files"),
        Flag::long("log-dir", Takes::Value("DIR"), "logs of containers; else STATE-DIR/logs"),
        Flag::long("log-file-kb", Takes::Value("KB"), "rotate a log of this size"),
        Flag::long("log-files", Takes::Value("N"), "files of a workload's log, the present one included"),
        Flag::long("log-total-mb", Takes::Value("MB"), "all logs of the node together"),
        Flag::long("log-reserve-mb", Takes::Value("MB"), "what logs leave free of their disk; else a twentieth, up to 512"),
        Flag::long("log-check-ms", Takes::Value("MS"), "time between two looks at a log that does not grow"),
        LOG_LEVEL,
        Flag::long("mount-root", Takes::Values("DIR"), "workloads may mount from here; repeatable"),
        Flag::long("label", Takes::Values("KEY=VALUE"), "a label of this node; repeatable"),
        Flag::long("memory-mb", Takes::Value("MB"), "memory to offer; else the machine's"),
        Flag::long("cpu-millicores", Takes::Value("N"), "CPU to offer; else the machine's"),
        Flag::long("start-workers", Takes::Value("N"), "workloads started at a time"),
        Flag::long("stop-workers", Takes::Value("N"), "workloads stopped at a time"),
        Flag::long("relist-ms", Takes::Value("MS"), "time between two looks at the runtime's list"),
        Flag::long("registry-credentials", Takes::Value("FILE"), "Docker's config.json with credentials of registries"),
        Flag::long("pulls-max", Takes::Value("N"), "images pulled at a time"),
        READY_FILE,
        UNTIL_EOF,
    ]],
    concat!("kakuri-agent --node-id node-1 --listen ", agent_listen!(), " --runtime-class gvisor=runsc"),
);

const CONTROL_PLANE: Usage = Usage::new(
    "kakuri-control-plane",
    "[--config FILE] [--node ID=ADDR]... [OPTIONS]",
    "Takes workloads over HTTP and places them on nodes.",
    &[&[
        CONFIG,
        CHECK_CONFIG,
        listen(concat!("IP:PORT or unix:///PATH; repeatable; else ", control_plane_listen!())),
        INSECURE_LISTEN,
        Flag::long("node", Takes::Values("ID=ADDR"), "an agent; repeatable"),
        Flag::long("data-dir", Takes::Value("DIR"), "the control plane's store; else a directory of the system's or the user's"),
        Flag::long("history", Takes::Value("N"), "ended workloads that are kept"),
        Flag::long("export", Takes::Nothing, "write the store to stdout as JSON lines, secrets included, and leave"),
        Flag::long("import", Takes::Nothing, "make the store out of such lines on stdin, and leave"),
        LOG_LEVEL,
        READY_FILE,
        UNTIL_EOF,
    ]],
    concat!("kakuri-control-plane --listen ", control_plane_listen!(), " --node node-1=", agent_listen!()),
);

/// The agent's file.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAgent {
    node_id: Option<Spanned<String>>,
    listen: Vec<Spanned<String>>,
    insecure_listen: Option<Spanned<bool>>,
    cri_endpoint: Option<Spanned<String>>,
    runtime_classes: BTreeMap<String, Spanned<RawClass>>,
    state_dir: Option<Spanned<String>>,
    log_dir: Option<Spanned<String>>,
    log_file_kb: Option<Spanned<u64>>,
    log_files: Option<Spanned<u64>>,
    log_total_mb: Option<Spanned<u64>>,
    log_reserve_mb: Option<Spanned<u64>>,
    log_check_ms: Option<Spanned<u64>>,
    log_level: Option<Spanned<String>>,
    mount_roots: Vec<Spanned<String>>,
    labels: BTreeMap<String, Spanned<String>>,
    memory_mb: Option<Spanned<u64>>,
    cpu_millicores: Option<Spanned<u64>>,
    start_workers: Option<Spanned<u64>>,
    stop_workers: Option<Spanned<u64>>,
    relist_ms: Option<Spanned<u64>>,
    registry_credentials: Option<Spanned<String>>,
    credentials: BTreeMap<String, Spanned<RawCredentials>>,
    pulls_max: Option<Spanned<u64>>,
    image_gc_high_percent: Option<Spanned<u64>>,
    image_gc_low_percent: Option<Spanned<u64>>,
    image_gc_min_age_s: Option<Spanned<u64>>,
    image_gc_capacity_mb: Option<Spanned<u64>>,
}

/// `[credentials.NAME]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCredentials {
    file: Option<Spanned<String>>,
}

/// `[runtime_classes.NAME]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawClass {
    handler: Option<Spanned<String>>,
    endpoint: Option<Spanned<String>>,
    own_kernel: Option<bool>,
    annotations: BTreeMap<String, Spanned<String>>,
    overhead_mb: Option<Spanned<u64>>,
    memory_mb_min: Option<Spanned<u64>>,
    start_timeout_ms: Option<Spanned<u64>>,
}

/// `runtime.toml`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawControlPlane {
    runtime: RawRuntime,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRuntime {
    name: Option<Spanned<String>>,
    site: Option<Spanned<String>>,
    data_dir: Option<Spanned<String>>,
    history: Option<Spanned<u64>>,
    web: RawWeb,
    log: RawLog,
    nodes: Vec<Spanned<RawNode>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawWeb {
    listen: Option<Spanned<String>>,
    auth: Option<Spanned<String>>,
    insecure_listen: Option<Spanned<bool>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLog {
    level: Option<Spanned<String>>,
}

/// `[[runtime.nodes]]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawNode {
    id: Option<Spanned<String>>,
    address: Option<Spanned<String>>,
}

/// The agent's configuration.
///
/// # Errors
/// [`Error`], with everything that is wrong.
pub fn agent(args: &[String]) -> Result<Parsed<AgentConfig>, Error> {
    agent_in(args, flags::environment)
}

fn agent_in(args: &[String], environment: Environment) -> Result<Parsed<AgentConfig>, Error> {
    let matches = match AGENT.parse(args, environment)? {
        Parsed::Special(text) => return Ok(Parsed::Special(text)),
        Parsed::Run(matches) => matches,
    };
    matches.no_words()?;
    let (mut reader, raw) = Reader::open::<RawAgent>(matches)?;
    let node_id = reader.required("node-id", raw.node_id, Name::new);
    let insecure_listen = reader.switch("insecure-listen", raw.insecure_listen);
    let listen = reader.listen(&raw.listen, agent_listen!(), insecure_listen);
    let cri_endpoint = reader.one("cri-endpoint", raw.cri_endpoint, address::unix_path);
    let classes = reader.classes(raw.runtime_classes);
    let state_dir = reader.state_dir("state-dir", raw.state_dir, AGENT.command);
    let log_dir = reader.path("log-dir", raw.log_dir).or_else(|| state_dir.as_ref().map(|dir| dir.join("logs")));
    let file_kb = reader.number("log-file-kb", raw.log_file_kb, limits::LOG_FILE_KB_MIN..=limits::LOG_FILE_KB_MAX);
    let total_mb = reader.number("log-total-mb", raw.log_total_mb, 1..=limits::LOG_TOTAL_MB_MAX);
    let reserve_mb = reader.number("log-reserve-mb", raw.log_reserve_mb, 0..=limits::LOG_TOTAL_MB_MAX);
    let check_ms = reader.number("log-check-ms", raw.log_check_ms, limits::LOG_CHECK_MS_MIN..=limits::LOG_CHECK_MS_MAX);
    let logs = LogLimits {
        file_bytes: file_kb.unwrap_or(limits::LOG_FILE_KB_DEFAULT) << 10,
        files: reader.number("log-files", raw.log_files, 1..=limits::LOG_FILES_MAX).unwrap_or(limits::LOG_FILES_DEFAULT),
        total_bytes: total_mb.unwrap_or(limits::LOG_TOTAL_MB_DEFAULT) << 20,
        reserve_bytes: reserve_mb.map(|mb| mb << 20),
        check_ms: check_ms.unwrap_or(limits::LOG_CHECK_MS_DEFAULT),
    };
    let log_level = reader.log_level(raw.log_level);
    let mount_roots = reader.mount_roots(&raw.mount_roots);
    let labels = reader.labels(raw.labels);
    let memory_mb = reader.number("memory-mb", raw.memory_mb, 1..=limits::NODE_MEMORY_MB_MAX);
    let cpu_millicores = reader.number("cpu-millicores", raw.cpu_millicores, 1..=limits::NODE_CPU_MILLICORES_MAX);
    let start_workers = reader.workers("start-workers", raw.start_workers, limits::START_WORKERS_DEFAULT);
    let stop_workers = reader.workers("stop-workers", raw.stop_workers, limits::STOP_WORKERS_DEFAULT);
    let relist_ms = reader.number("relist-ms", raw.relist_ms, limits::RELIST_MS_MIN..=limits::RELIST_MS_MAX);
    let registry_credentials = reader.path("registry-credentials", raw.registry_credentials);
    let credentials = reader.credentials(raw.credentials);
    let pulls_max = reader.workers("pulls-max", raw.pulls_max, limits::PULLS_MAX_DEFAULT);
    let marks = [raw.image_gc_high_percent, raw.image_gc_low_percent];
    let image_gc = reader.image_gc(marks, raw.image_gc_min_age_s, raw.image_gc_capacity_mb);
    let ready_file = reader.path("ready-file", None);
    let until_eof = reader.matches.present("until-eof");
    reader.finish(node_id.zip(state_dir).zip(log_dir).map(|((node_id, state_dir), log_dir)| AgentConfig {
        node_id,
        listen,
        insecure_listen,
        cri_endpoint,
        classes,
        state_dir,
        log_dir,
        logs,
        log_level,
        mount_roots,
        labels,
        memory_mb,
        cpu_millicores,
        start_workers,
        stop_workers,
        relist_ms,
        registry_credentials,
        credentials,
        pulls_max,
        image_gc,
        ready_file,
        until_eof,
    }))
}

/// The control plane's configuration.
///
/// # Errors
/// [`Error`], with everything that is wrong.
pub fn control_plane(args: &[String]) -> Result<Parsed<ControlPlaneConfig>, Error> {
    control_plane_in(args, flags::environment)
}

/// The same, in another environment: `kakuri play` gives its children none of its own.
///
/// # Errors
/// As [`control_plane`].
pub fn control_plane_in(args: &[String], environment: Environment) -> Result<Parsed<ControlPlaneConfig>, Error> {
    let matches = match CONTROL_PLANE.parse(args, environment)? {
        Parsed::Special(text) => return Ok(Parsed::Special(text)),
        Parsed::Run(matches) => matches,
    };
    matches.no_words()?;
    let (mut reader, RawControlPlane { runtime: raw }) = Reader::open::<RawControlPlane>(matches)?;
    let name = reader.file_one(raw.name, Name::new).or_else(|| Name::new("kakuri").ok());
    let site = reader.file_one(raw.site, Name::new).or_else(|| Name::new("default-site").ok());
    reader.file_one(raw.web.auth, |auth| match auth {
        "local" => Ok(()),
        _ => Err(Unfit("only auth = \"local\" is in this version; \"token\" and \"mtls\" are not".into())),
    });
    let insecure_listen = reader.switch("insecure-listen", raw.web.insecure_listen);
    let listen = reader.listen(raw.web.listen.as_slice(), CONTROL_PLANE_LISTEN, insecure_listen);
    let nodes = reader.nodes(raw.nodes);
    let data_dir = reader.state_dir("data-dir", raw.data_dir, CONTROL_PLANE.command);
    let history_max = u64::try_from(limits::HISTORY_MAX).unwrap_or(u64::MAX);
    let history = reader.number("history", raw.history, 0..=history_max);
    let (export, import) = (reader.matches.present("export"), reader.matches.present("import"));
    if export && import {
        reader.problem("--export", "and --import exclude each other");
    }
    let log_level = reader.log_level(raw.log.level);
    let ready_file = reader.path("ready-file", None);
    let until_eof = reader.matches.present("until-eof");
    reader.finish(name.zip(site).zip(data_dir).map(|((name, site), data_dir)| ControlPlaneConfig {
        name,
        site,
        listen,
        insecure_listen,
        nodes,
        data_dir,
        history: history.and_then(|n| usize::try_from(n).ok()).unwrap_or(limits::HISTORY_DEFAULT),
        task: match (export, import) {
            (true, _) => Task::Export,
            (false, true) => Task::Import,
            (false, false) => Task::Serve,
        },
        log_level,
        ready_file,
        until_eof,
    }))
}

/// Flags, environment and file together, and what is wrong with them so far.
struct Reader {
    matches: Matches,
    file: Source,
    problems: Vec<Problem>,
}

impl Reader {
    fn open<R: DeserializeOwned + Default>(matches: Matches) -> Result<(Self, R), Error> {
        let file = matches.given("config").map_or(Ok(Source::default()), |given| Source::read(Path::new(&given.value)))?;
        let mut problems = Vec::new();
        match file.deserialize(&mut problems) {
            Some(raw) => Ok((Self { matches, file, problems }, raw)),
            None => Err(Error::Problems(problems)),
        }
    }

    fn finish<C>(self, config: Option<C>) -> Result<Parsed<C>, Error> {
        match config {
            Some(_) if self.problems.is_empty() && self.matches.present("check-config") => Ok(Parsed::Special("config ok".into())),
            Some(config) if self.problems.is_empty() => Ok(Parsed::Run(config)),
            _ => Err(Error::Problems(self.problems)),
        }
    }

    fn problem(&mut self, origin: impl Into<String>, rule: impl fmt::Display) {
        if self.problems.len() < limits::PROBLEMS_MAX {
            self.problems.push(Problem { origin: origin.into(), rule: rule.to_string() });
        }
    }

    fn given<T: fmt::Display>(&self, flag: &str, raw: Option<Spanned<T>>) -> Option<Given> {
        self.matches.given(flag).or_else(|| raw.map(|raw| self.file.given(&raw)))
    }

    fn all_given(&self, flag: &str, raw: &[Spanned<String>]) -> Vec<Given> {
        let given = self.matches.all_given(flag);
        if given.is_empty() { raw.iter().map(|raw| self.file.given(raw)).collect() } else { given }
    }

    fn check<T, E: fmt::Display>(&mut self, given: &Given, parse: impl FnOnce(&str) -> Result<T, E>) -> Option<T> {
        parse(&given.value).map_err(|rule| self.problem(&given.origin, rule)).ok()
    }

    fn one<T, E: fmt::Display>(&mut self, flag: &str, raw: Option<Spanned<String>>, parse: impl Fn(&str) -> Result<T, E>) -> Option<T> {
        self.given(flag, raw).and_then(|given| self.check(&given, parse))
    }

    /// A key that no flag sets.
    fn file_one<V: fmt::Display, T, E: fmt::Display>(
        &mut self,
        raw: Option<Spanned<V>>,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        raw.and_then(|raw| self.check(&self.file.given(&raw), parse))
    }

    fn required<T, E: fmt::Display>(
        &mut self,
        flag: &str,
        raw: Option<Spanned<String>>,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let given = self.given(flag, raw);
        // A key that is there but broken has been reported already.
        if given.is_none() && self.problems.is_empty() {
            self.problem(format!("--{flag}"), format!("missing: give the flag, or {} in the file", flag.replace('-', "_")));
        }
        given.and_then(|given| self.check(&given, parse))
    }

    fn switch(&mut self, flag: &str, raw: Option<Spanned<bool>>) -> bool {
        let given = self.matches.switch(flag).or_else(|| raw.map(|raw| self.file.given(&raw)));
        let parse = |text: &str| match text {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err("must be true or false"),
        };
        given.and_then(|given| self.check(&given, parse)).unwrap_or(false)
    }

    fn number(&mut self, flag: &str, raw: Option<Spanned<u64>>, range: RangeInclusive<u64>) -> Option<u64> {
        self.given(flag, raw).and_then(|given| self.check(&given, within(range)))
    }

    fn workers(&mut self, flag: &str, raw: Option<Spanned<u64>>, default: usize) -> usize {
        let workers = self.number(flag, raw, 1..=limits::WORKERS_MAX);
        workers.and_then(|n| usize::try_from(n).ok()).unwrap_or(default)
    }

    fn log_level(&mut self, raw: Option<Spanned<String>>) -> LevelFilter {
        let parse = |text: &str| report::level(text).ok_or(format!("must be one of {}", report::LEVELS));
        self.one("log-level", raw, parse).unwrap_or(LevelFilter::Info)
    }

    /// A path: relative to the working directory, or in a file to the file's directory.
    fn path(&mut self, flag: &str, raw: Option<Spanned<String>>) -> Option<PathBuf> {
        let base = if self.matches.given(flag).is_some() { PathBuf::new() } else { self.file.directory.clone() };
        self.one(flag, raw, |text| absolute(&base, text))
    }

    fn state_dir(&mut self, flag: &str, raw: Option<Spanned<String>>, program: &str) -> Option<PathBuf> {
        if self.given(flag, raw.clone()).is_some() {
            return self.path(flag, raw);
        }
        let dir = default_dir(program, |name| self.matches.environment(name));
        if dir.is_none() {
            self.problem(format!("--{flag}"), "missing, and there is neither XDG_STATE_HOME nor HOME to choose a default");
        }
        dir
    }

    fn listen(&mut self, raw: &[Spanned<String>], default: &str, insecure: bool) -> Vec<Address> {
        let mut given = self.all_given("listen", raw);
        if given.is_empty() {
            given.push(Given { value: default.into(), origin: "--listen".into() });
        }
        if given.len() > limits::LISTENERS_MAX {
            self.problem("--listen", format!("at most {} addresses", limits::LISTENERS_MAX));
        }
        let mut addresses = Vec::new();
        for given in given {
            let Some(address) = self.check(&given, Address::parse) else { continue };
            if !insecure && !address.is_local() {
                self.problem(
                    &given.origin,
                    format!(
                        "other machines could reach {address}, and TLS and client authentication are not in this version: \
                         listen on loopback or a unix socket, or take the risk with --insecure-listen"
                    ),
                );
            }
            addresses.push(address);
        }
        addresses
    }

    fn classes(&mut self, raw: BTreeMap<String, Spanned<RawClass>>) -> Vec<ClassConfig> {
        let given = self.matches.all_given("runtime-class");
        let mut classes: Vec<ClassConfig> = if given.is_empty() {
            raw.into_iter().filter_map(|(name, raw)| self.class(&name, raw)).collect()
        } else {
            given.iter().filter_map(|given| self.check(given, class_flag)).collect()
        };
        classes.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(twice) = classes.windows(2).find_map(|pair| pair.first().filter(|a| pair.last().is_some_and(|b| a.name == b.name))) {
            self.problem("--runtime-class", format!("{} is given twice", twice.name));
        }
        if classes.len() > limits::CLASSES_MAX {
            self.problem("--runtime-class", format!("at most {} classes", limits::CLASSES_MAX));
        }
        classes
    }

    fn class(&mut self, name: &str, raw: Spanned<RawClass>) -> Option<ClassConfig> {
        let header = self.file.given(&Spanned::new(raw.span(), name));
        let raw = raw.into_inner();
        let name = self.check(&header, Name::new);
        if raw.handler.is_none() && self.problems.is_empty() {
            self.problem(&header.origin, "handler is missing: a class without one would run under the runtime's default");
        }
        let handler = self.file_one(raw.handler, handler);
        let endpoint = self.file_one(raw.endpoint, address::unix_path);
        let annotations = self.map(raw.annotations, annotation);
        let overhead_mb = self.file_one(raw.overhead_mb, within(0..=limits::MEMORY_MB_MAX));
        let memory_mb_min = self.file_one(raw.memory_mb_min, within(limits::MEMORY_MB_MIN..=limits::MEMORY_MB_MAX));
        let start_timeout_ms = self.file_one(raw.start_timeout_ms, within(1000..=limits::START_DEADLINE_MS_MAX));
        let mut class = ClassConfig::new(name?, handler?, endpoint);
        class.own_kernel = raw.own_kernel.unwrap_or(class.own_kernel);
        class.annotations = annotations;
        class.overhead_mb = overhead_mb.unwrap_or(class.overhead_mb);
        class.memory_mb_min = memory_mb_min.unwrap_or(class.memory_mb_min);
        class.start_timeout_ms = start_timeout_ms.unwrap_or(class.start_timeout_ms);
        Some(class)
    }

    fn credentials(&mut self, raw: BTreeMap<String, Spanned<RawCredentials>>) -> BTreeMap<Name, PathBuf> {
        let mut sets = BTreeMap::new();
        for (name, raw) in raw {
            let header = self.file.given(&Spanned::new(raw.span(), &name));
            let name = self.check(&header, Name::new);
            let base = self.file.directory.clone();
            let raw = raw.into_inner();
            // A key that is there but broken has been reported already.
            if raw.file.is_none() && self.problems.is_empty() {
                self.problem(&header.origin, "file is missing: a set of credentials is a docker config.json");
            }
            let file = self.file_one(raw.file, |text| absolute(&base, text));
            sets.extend(name.zip(file));
        }
        if sets.len() > limits::CREDENTIALS_MAX {
            self.problem("credentials", format!("at most {} sets", limits::CREDENTIALS_MAX));
        }
        sets
    }

    fn image_gc(
        &mut self,
        marks: [Option<Spanned<u64>>; 2],
        min_age_s: Option<Spanned<u64>>,
        capacity_mb: Option<Spanned<u64>>,
    ) -> ImageGc {
        let origin = marks.iter().flatten().next().map(|mark| self.file.given(mark).origin);
        let [high, low] = marks.map(|mark| self.file_one(mark, within(0..=100)));
        let (high, low) = (high.unwrap_or(limits::IMAGE_GC_HIGH_PERCENT_DEFAULT), low.unwrap_or(limits::IMAGE_GC_LOW_PERCENT_DEFAULT));
        if let Some(origin) = origin.filter(|_| low > high) {
            self.problem(origin, format!("image_gc_low_percent is {low}, above image_gc_high_percent, {high}"));
        }
        let min_age_s = self.file_one(min_age_s, within(0..=limits::IMAGE_GC_MIN_AGE_S_MAX));
        let capacity_mb = self.file_one(capacity_mb, within(1..=limits::NODE_MEMORY_MB_MAX));
        ImageGc {
            high_percent: high,
            low_percent: low,
            min_age_ms: min_age_s.unwrap_or(limits::IMAGE_GC_MIN_AGE_S_DEFAULT) * 1000,
            capacity_bytes: capacity_mb.map(|mb| mb << 20),
        }
    }

    fn mount_roots(&mut self, raw: &[Spanned<String>]) -> Vec<PathBuf> {
        let given = self.all_given("mount-root", raw);
        given.iter().filter_map(|given| self.check(given, mount_root)).collect()
    }

    fn labels(&mut self, raw: BTreeMap<String, Spanned<String>>) -> BTreeMap<String, String> {
        let given = self.matches.all_given("label");
        let labels = if given.is_empty() {
            self.map(raw, check_label)
        } else {
            let split = |text: &str| {
                let (key, value) = text.split_once('=').ok_or(Unfit("must be KEY=VALUE".into()))?;
                check_label(key, value).map(|()| (key.to_owned(), value.to_owned()))
            };
            given.iter().filter_map(|given| self.check(given, split)).collect()
        };
        if labels.len() > limits::LABELS_MAX {
            self.problem("--label", format!("at most {} labels", limits::LABELS_MAX));
        }
        labels
    }

    fn map(&mut self, raw: BTreeMap<String, Spanned<String>>, rule: fn(&str, &str) -> Result<(), Unfit>) -> BTreeMap<String, String> {
        let mut checked = BTreeMap::new();
        for (key, value) in raw {
            if self.check(&self.file.given(&value), |value| rule(&key, value)).is_some() {
                checked.insert(key, value.into_inner());
            }
        }
        checked
    }

    fn nodes(&mut self, raw: Vec<Spanned<RawNode>>) -> Vec<(Name, Address)> {
        let given = self.matches.all_given("node");
        let mut nodes: Vec<(String, (Name, Address))> = Vec::new();
        if given.is_empty() {
            for node in raw {
                let origin = self.file.given(&Spanned::new(node.span(), "")).origin;
                let RawNode { id, address } = node.into_inner();
                if (id.is_none() || address.is_none()) && self.problems.is_empty() {
                    self.problem(&origin, "a node needs id and address");
                }
                let id = self.file_one(id, Name::new);
                let address = self.file_one(address, Address::parse);
                nodes.extend(id.zip(address).map(|node| (origin, node)));
            }
        } else {
            let parsed = given.into_iter().filter_map(|given| self.check(&given, node_flag).map(|node| (given.origin, node)));
            nodes = parsed.collect();
        }
        let mut seen: BTreeMap<Name, Address> = BTreeMap::new();
        for (origin, (id, address)) in nodes {
            if seen.contains_key(&id) {
                self.problem(origin, format!("node {id} is given twice"));
            }
            seen.insert(id, address);
        }
        if seen.len() > limits::NODES_MAX {
            self.problem("--node", format!("at most {} nodes", limits::NODES_MAX));
        }
        seen.into_iter().collect()
    }
}

/// A configuration file, or none.
#[derive(Default)]
struct Source {
    name: String,
    directory: PathBuf,
    text: String,
}

impl Source {
    fn read(path: &Path) -> Result<Self, Error> {
        let fail = |cause| Error::Read { path: path.to_owned(), cause };
        let mut text = String::new();
        let bytes_max = u64::try_from(limits::CONFIG_BYTES_MAX).unwrap_or(u64::MAX);
        let bytes = File::open(path).and_then(|file| file.take(bytes_max + 1).read_to_string(&mut text)).map_err(fail)?;
        if bytes > limits::CONFIG_BYTES_MAX {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidData, format!("more than {bytes_max} bytes"))));
        }
        Ok(Self { name: path.display().to_string(), directory: path.parent().map(Path::to_owned).unwrap_or_default(), text })
    }

    fn origin(&self, span: Option<Range<usize>>) -> String {
        let before = self.text.get(..span.map_or(0, |span| span.start)).unwrap_or(&self.text);
        format!("{}:{}", self.name, before.matches('\n').count() + 1)
    }

    fn given<T: fmt::Display>(&self, raw: &Spanned<T>) -> Given {
        Given { value: raw.get_ref().to_string(), origin: self.origin(Some(raw.span())) }
    }

    /// Reads the whole file into `R`. Serde stops at the first thing it does not like: that thing is noted, taken out of the
    /// table, and the rest read again, so that one run shows all of them. `None` when nothing could be taken out.
    fn deserialize<R: DeserializeOwned + Default>(&self, problems: &mut Vec<Problem>) -> Option<R> {
        let note = |error: &toml::de::Error| Problem { origin: self.origin(error.span()), rule: error.message().to_owned() };
        let mut table = DeTable::parse(&self.text).map_err(|error| problems.push(note(&error))).ok()?;
        loop {
            match R::deserialize(Deserializer::from(table.clone())) {
                Ok(raw) => return Some(raw),
                Err(error) => {
                    problems.push(note(&error));
                    let removed = error.span().is_some_and(|span| remove(table.get_mut(), &span));
                    if !removed || problems.len() >= limits::PROBLEMS_MAX {
                        return None;
                    }
                }
            }
        }
    }
}

/// Takes the entry out whose key lies at `span` (it is unknown), or else the innermost one whose value does (it is of the wrong type).
fn remove(table: &mut DeTable<'_>, span: &Range<usize>) -> bool {
    if let Some(key) = table.keys().find(|key| key.span() == *span).cloned() {
        return table.remove(&key).is_some();
    }
    let below = table.iter_mut().any(|(_, value)| match value.get_mut() {
        DeValue::Table(inner) => remove(inner, span),
        _ => false,
    });
    let holds = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
    let here = table.iter().find(|(_, value)| holds(value.span())).map(|(key, _)| key.clone());
    below || here.is_some_and(|key| table.remove(&key).is_some())
}

fn within(range: RangeInclusive<u64>) -> impl Fn(&str) -> Result<u64, Unfit> {
    move |text| {
        let number = text.parse().ok().filter(|n| range.contains(n));
        number.ok_or_else(|| Unfit(format!("must be a number from {} to {}", range.start(), range.end())))
    }
}

/// Checks the name of a runtime handler.
///
/// # Errors
/// [`Unfit`], also for the empty name, which would mean the runtime's default.
pub fn handler(text: &str) -> Result<String, Unfit> {
    let fits = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if fits && !text.is_empty() && text.len() <= limits::NAME_BYTES_MAX {
        Ok(text.to_owned())
    } else {
        Err(Unfit(format!("handler must be 1 to {} characters of A-Z, a-z, 0-9, '.', '_', '-'", limits::NAME_BYTES_MAX)))
    }
}

/// `NAME=HANDLER[@ENDPOINT]`
fn class_flag(text: &str) -> Result<ClassConfig, Unfit> {
    let (name, rest) = text.split_once('=').ok_or_else(|| Unfit("must be NAME=HANDLER or NAME=HANDLER@ENDPOINT".into()))?;
    let (handler_name, endpoint) = match rest.split_once('@') {
        Some((handler_name, endpoint)) => (handler_name, Some(address::unix_path(endpoint).map_err(|e| Unfit(e.to_string()))?)),
        None => (rest, None),
    };
    Ok(ClassConfig::new(Name::new(name)?, handler(handler_name)?, endpoint))
}

/// `ID=ADDR`
fn node_flag(text: &str) -> Result<(Name, Address), Unfit> {
    let (id, address) = text.split_once('=').ok_or_else(|| Unfit("must be ID=ADDR".into()))?;
    Ok((Name::new(id)?, Address::parse(address).map_err(|e| Unfit(e.to_string()))?))
}

fn annotation(key: &str, value: &str) -> Result<(), Unfit> {
    if key.starts_with("kakuri.dev/") {
        return Err(Unfit("annotations under kakuri.dev/ are the agent's own".into()));
    }
    let fits = |text: &str| text.len() <= limits::LABEL_BYTES_MAX && !text.chars().any(char::is_control);
    if fits(key) && fits(value) && !key.is_empty() {
        return Ok(());
    }
    Err(Unfit(format!("key and value must be at most {} bytes without control characters", limits::LABEL_BYTES_MAX)))
}

fn mount_root(text: &str) -> Result<PathBuf, Unfit> {
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, std::path::Component::RootDir | std::path::Component::Normal(_)));
    if path.is_absolute() && plain && path.parent().is_some() {
        Ok(path.to_owned())
    } else {
        Err(Unfit("a mount root must be an absolute path without '..', and not / itself".into()))
    }
}

fn absolute(base: &Path, text: &str) -> Result<PathBuf, Unfit> {
    let path = base.join(text);
    let fits = !text.is_empty() && text.len() <= limits::PATH_BYTES_MAX && !text.contains('\0');
    fits.then(|| std::path::absolute(path).ok()).flatten().ok_or_else(|| Unfit("must be a path".into()))
}

/// Where a daemon keeps its files: root's belong under `/var/lib`, those of others under their state directory (XDG).
fn default_dir(program: &str, variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    // The owner of /proc/self is the effective user (proc(5)); getuid itself would need unsafe code.
    if std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0) {
        return Some(Path::new("/var/lib").join(program));
    }
    let state = variable("XDG_STATE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let home = variable("HOME").map(|home| Path::new(&home).join(".local/state")).filter(|dir| dir.is_absolute());
    state.or(home).map(|dir| dir.join(program))
}

#[cfg(test)]
mod tests;
