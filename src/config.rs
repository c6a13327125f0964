//! The configuration of both daemons: TOML file, environment and flags become one checked value, or a list of all that is wrong.
//!
//! *Scope*: `toml` enters here and nowhere else. The control plane's file is the bundle's `runtime.toml`. *Not here*: opening
//! what the configuration names.
//!
//! Flag, then `KAKURI_*`, then file, then default; a list from one of them replaces that of the next.
//! Invariant: every problem names where the value came from: `--flag`, `KAKURI_VARIABLE` or `file:line`.
//! Invariant: a key this version does not know is an error, never ignored.

mod defaults;
mod reader;

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
use reader::Reader;

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
