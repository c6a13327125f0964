//! What can be typed after `kakuri`: every command with its flags, and the value it becomes.
//!
//! *Not here*: doing any of it. Rules about workloads are the control plane's to check; only the form of flags is checked here.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::show::Output;
use crate::config::control_plane_listen;
use crate::deadline::Timestamp;
use crate::flags::{self, Environment, Error, Flag, Matches, Parsed, Takes, Usage, duration_ms, number};
use crate::limits;
use crate::net::address;
use crate::workload::{Name, PullPolicy, RestartPolicy, Unfit, WorkloadId};

/// A whole command line.
#[derive(Debug)]
pub(super) struct Invocation {
    pub(super) server: String,
    /// As asked for; each command has a default of its own.
    pub(super) output: Option<Output>,
    pub(super) command: Command,
}

/// One command.
#[derive(Debug)]
pub(super) enum Command {
    Delete { id: WorkloadId, force: bool, wait: bool, timeout_ms: Option<u64> },
    Events { query: Vec<(&'static str, String)> },
    Exec { id: WorkloadId, command: Vec<String>, timeout_ms: u64 },
    Get { id: WorkloadId },
    Label { id: WorkloadId, patch: Value },
    List { filters: Vec<(&'static str, String)> },
    Logs { id: WorkloadId, query: Vec<(&'static str, String)>, follow: bool },
    Nodes { id: Option<Name> },
    Play(Play),
    Run { body: Body, until: Option<Goal>, timeout_ms: Option<u64> },
    Stop { id: WorkloadId, wait: bool, timeout_ms: Option<u64> },
    Version,
    Wait { id: WorkloadId, goal: Goal, timeout_ms: Option<u64> },
}

/// What to post.
#[derive(Debug)]
pub(super) enum Body {
    File(PathBuf),
    Spec(Value),
    Stdin,
}

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// It left Pending.
    Running,
    /// It ended.
    Terminal,
}

impl Goal {
    /// As the `for` of a request says it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Terminal => "terminal",
        }
    }

    fn parse(text: &str) -> Result<Self, Unfit> {
        let goal = [Self::Running, Self::Terminal].into_iter().find(|goal| goal.as_str() == text);
        goal.ok_or_else(|| Unfit("must be running or terminal".into()))
    }
}

/// `kakuri play`
#[derive(Debug)]
pub(super) struct Play {
    pub(super) project: PathBuf,
    pub(super) runtime: Option<PathBuf>,
    pub(super) simulator: bool,
}

/// Where a control plane is, as long as nobody says.
const DEFAULT_SERVER: &str = concat!("http://", control_plane_listen!());
const SERVER: &[Flag] =
    &[Flag::long("server", Takes::Value("URL"), concat!("the control plane; else KAKURI_ADDR, else http://", control_plane_listen!()))];
const OUTPUT: &[Flag] = &[Flag::short("o", "output", Takes::Value("FORMAT"), "json, table or name")];
const TIMEOUT: Flag = Flag::long("timeout", Takes::Value("DURATION"), "give up after this; else never");

const TOP: Usage = Usage::new(
    "kakuri",
    "[--server URL] COMMAND ...",
    "Runs containers nobody has to trust, each in its own sandbox.

Commands:
    run       start a workload
    get       show one workload
    list      show all workloads
    stop      stop a workload; it stays listed
    delete    stop and forget a workload
    logs      print what a workload wrote
    exec      run a command inside a workload
    wait      wait until a workload runs or has ended
    label     change labels of a workload
    nodes     show the nodes
    events    follow every change
    version   show the versions of client and server
    play      start a control plane and an agent on this machine

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 denied, 5 conflict, 6 unreachable or too late;
run --wait and exec exit as the workload does, and with 125 when they could not learn how.",
    &[SERVER],
    "kakuri run --image busybox --class gvisor --wait -- uname -a",
);

const RUN_SPEC: &[Flag] = &[
    Flag::long("id", Takes::Value("ID"), "its name; else one is made here"),
    Flag::short("i", "image", Takes::Value("IMAGE"), "the OCI image; or the first word"),
    Flag::short("c", "class", Takes::Value("CLASS"), "the runtime class"),
    Flag::long("profile", Takes::Value("NAME"), "the security profile that chooses the class"),
    Flag::short("m", "memory", Takes::Value("MB"), "memory limit"),
    Flag::long("cpu", Takes::Value("MILLICORES"), "CPU limit"),
    Flag::short("e", "env", Takes::Values("K[=V]"), "environment; K alone takes the value from here"),
    Flag::short("l", "label", Takes::Values("K=V"), "a label"),
    Flag::short("p", "port", Takes::Values("[HOST:]CONTAINER[/udp]"), "a port"),
    Flag::short("v", "mount", Takes::Values("SRC:DST[:ro]"), "a directory of the node"),
    Flag::short("u", "user", Takes::Value("UID[:GID]"), "who it runs as"),
    Flag::short("w", "workdir", Takes::Value("DIR"), "its working directory"),
    Flag::long("read-only", Takes::Nothing, "its root file system cannot be written to"),
    Flag::long("cap-add", Takes::Values("CAP"), "a capability more"),
    Flag::long("cap-drop", Takes::Values("CAP"), "a capability less"),
    Flag::long("pids-max", Takes::Value("N"), "processes and threads at a time"),
    Flag::long("pull", Takes::Value("POLICY"), "if-not-present, always or never"),
    Flag::long("ttl", Takes::Value("DURATION"), "end it after this"),
    Flag::long("grace", Takes::Value("DURATION"), "between the polite signal and the kill"),
    Flag::long("start-deadline", Takes::Value("DURATION"), "it must run within this"),
    Flag::long("restart", Takes::Value("POLICY[:MAX]"), "never, on-failure or always; MAX restarts in a row"),
    Flag::long("restart-backoff", Takes::Value("DURATION"), "the first pause; each further one in a row doubles it"),
    Flag::long("health-cmd", Takes::Value("COMMAND"), "is well as long as this ends with 0 inside it (sh -c)"),
    Flag::long("health-http", Takes::Value("PORT[/PATH]"), "is well as long as GET is answered with 200 to 399"),
    Flag::long("health-tcp", Takes::Value("PORT"), "is well as long as it accepts connections"),
    Flag::long("health-interval", Takes::Value("DURATION"), "between two checks"),
    Flag::long("health-timeout", Takes::Value("DURATION"), "how long a check may take"),
    Flag::long("health-failures", Takes::Value("N"), "failed checks in a row that end it"),
];

const RUN: Usage = Usage::new(
    "kakuri run",
    "[OPTIONS] IMAGE [-- COMMAND...] | -f FILE",
    "Starts a workload, and prints its id.",
    &[
        RUN_SPEC,
        &[
            Flag::short("f", "file", Takes::Value("FILE"), "post this JSON file; - is stdin"),
            Flag::long("wait", Takes::Nothing, "print its logs until it ends, and exit as it does"),
            Flag::long("wait-running", Takes::Nothing, "return when it runs"),
            TIMEOUT,
        ],
        OUTPUT,
        SERVER,
    ],
    "kakuri run --image busybox --class gvisor --memory 64 --wait -- sh -c 'echo hello'",
);

const GET: Usage = Usage::new("kakuri get", "ID", "Shows one workload.", &[OUTPUT, SERVER], "kakuri get wl-123 -o json");

const LIST: Usage = Usage::new(
    "kakuri list",
    "[OPTIONS]",
    "Shows all workloads.",
    &[
        &[
            Flag::long("state", Takes::Value("STATE"), "Pending, Running, Succeeded or Failed"),
            Flag::long("node", Takes::Value("ID"), "on this node"),
            Flag::short("l", "label", Takes::Values("K=V"), "with this label; repeatable"),
        ],
        OUTPUT,
        SERVER,
    ],
    "kakuri list --state Running --label app=web -o name",
);

const STOP: Usage = Usage::new(
    "kakuri stop",
    "ID",
    "Stops a workload; it stays listed.",
    &[&[Flag::long("wait", Takes::Nothing, "return when it has ended"), TIMEOUT], OUTPUT, SERVER],
    "kakuri stop wl-123 --wait",
);

const DELETE: Usage = Usage::new(
    "kakuri delete",
    "ID",
    "Stops a workload and forgets it.",
    &[
        &[
            Flag::long("force", Takes::Nothing, "forget one on a node that is not configured any more; what runs there is left alone"),
            Flag::long("wait", Takes::Nothing, "return when it is gone"),
            TIMEOUT,
        ],
        OUTPUT,
        SERVER,
    ],
    "kakuri delete wl-123 --wait",
);

const LOGS: Usage = Usage::new(
    "kakuri logs",
    "ID",
    "Prints what a workload wrote.",
    &[
        &[
            Flag::short("f", "follow", Takes::Nothing, "go on until it ends"),
            Flag::short("n", "tail", Takes::Value("N"), "only the last lines"),
            Flag::long("since", Takes::Value("WHEN"), "a duration (10m) or a time (2026-01-02T03:04:05Z)"),
            Flag::long("stream", Takes::Value("NAME"), "stdout or stderr; else both"),
            Flag::short("t", "timestamps", Takes::Nothing, "before each line"),
        ],
        SERVER,
    ],
    "kakuri logs wl-123 -f --tail 10",
);

const EXEC: Usage = Usage::new(
    "kakuri exec",
    "ID -- COMMAND...",
    "Runs a command inside a workload, and exits as it does.",
    &[&[Flag::long("timeout", Takes::Value("DURATION"), "how long it may run; else 30s")], OUTPUT, SERVER],
    "kakuri exec wl-123 -- uname -r",
);

const WAIT: Usage = Usage::new(
    "kakuri wait",
    "ID",
    "Waits until a workload runs or has ended, and prints its state.",
    &[&[Flag::long("for", Takes::Value("GOAL"), "running or terminal; else terminal"), TIMEOUT], OUTPUT, SERVER],
    "kakuri wait wl-123 --for running --timeout 30s",
);

const LABEL: Usage = Usage::new(
    "kakuri label",
    "ID K=V... K-...",
    "Sets labels of a workload, and takes those away that are followed by a minus.",
    &[OUTPUT, SERVER],
    "kakuri label wl-123 tier=web canary-",
);

const EVENTS: Usage = Usage::new(
    "kakuri events",
    "[OPTIONS]",
    "Follows every change of every workload, until it is interrupted.",
    &[
        &[
            Flag::long("since", Takes::Value("REVISION"), "first what happened after this revision"),
            Flag::long("replay", Takes::Nothing, "first everything there is, as ADDED"),
            Flag::long("id", Takes::Value("ID"), "of this workload"),
            Flag::long("node", Takes::Value("ID"), "on this node"),
            Flag::short("l", "label", Takes::Values("K=V"), "with this label; repeatable"),
        ],
        OUTPUT,
        SERVER,
    ],
    "kakuri events --replay -l app=web",
);

const NODES: Usage = Usage::new("kakuri nodes", "[ID]", "Shows the nodes.", &[OUTPUT, SERVER], "kakuri nodes node-1 -o json");

const VERSION: Usage =
    Usage::new("kakuri version", "", "Shows the versions of client and server.", &[OUTPUT, SERVER], "kakuri version -o json");

const PLAY: Usage = Usage::new(
    "kakuri play",
    "--project DIR",
    "Starts a control plane and an agent on this machine; the first time, it makes the project.",
    &[&[
        Flag::long("project", Takes::Value("DIR"), "holds runtime.toml and all data"),
        Flag::long("cri-endpoint", Takes::Value("unix:///PATH"), "this runtime; else Edera, containerd, CRI-O"),
        Flag::long("simulator", Takes::Nothing, "simulate the runtime, even if there is a real one: NOTHING IS ISOLATED"),
    ]],
    "kakuri play --project ./demo",
);

/// How a command is made of its flags and words.
type Make = fn(&Matches) -> Result<Command, Error>;

const COMMANDS: &[(Usage, Make)] = &[
    (RUN, run),
    (GET, |m| Ok(Command::Get { id: id(m)? })),
    (LIST, list),
    (STOP, |m| Ok(Command::Stop { id: id(m)?, wait: m.present("wait"), timeout_ms: timeout(m)? })),
    (DELETE, |m| {
        let (force, wait) = (m.present("force"), m.present("wait"));
        Ok(Command::Delete { id: id(m)?, force, wait, timeout_ms: timeout(m)? })
    }),
    (LOGS, logs),
    (EXEC, exec),
    (WAIT, |m| Ok(Command::Wait { id: id(m)?, goal: m.parsed("for", Goal::parse)?.unwrap_or(Goal::Terminal), timeout_ms: timeout(m)? })),
    (LABEL, label),
    (EVENTS, events),
    (NODES, |m| {
        let id = m.word_or_none("ID")?.map(Name::new).transpose();
        id.map(|id| Command::Nodes { id }).map_err(|rule| m.error(format!("ID: {rule}")))
    }),
    (VERSION, |m| m.no_words().map(|()| Command::Version)),
    (PLAY, play),
];

/// Reads a command line.
pub(super) fn parse(args: &[String], environment: Environment) -> Result<Parsed<Invocation>, Error> {
    let top = match TOP.parse_leading(args, environment)? {
        Parsed::Special(text) => return Ok(Parsed::Special(text)),
        Parsed::Run(top) => top,
    };
    let (word, rest) = top.words().split_first().ok_or_else(|| TOP.error("a command is missing"))?;
    if word == "help" {
        return match rest.first() {
            Some(word) => Ok(Parsed::Special(find(word)?.0.help())),
            None => Ok(Parsed::Special(TOP.help())),
        };
    }
    let (usage, make) = find(word)?;
    let matches = match usage.parse(rest, environment)? {
        Parsed::Special(text) => return Ok(Parsed::Special(text)),
        Parsed::Run(matches) => matches,
    };
    let server = matches.one("server").or_else(|| top.one("server")).or_else(|| environment("KAKURI_ADDR"));
    let command = make(&matches)?;
    let output = matches.parsed("output", Output::parse)?;
    Ok(Parsed::Run(Invocation { server: server.unwrap_or_else(|| DEFAULT_SERVER.into()), output, command }))
}

fn find(word: &str) -> Result<&'static (Usage, Make), Error> {
    let name = |usage: &Usage| usage.command.rsplit(' ').next().unwrap_or_default();
    COMMANDS.iter().find(|(usage, _)| name(usage) == word).ok_or_else(|| {
        let hint = flags::nearest(word, COMMANDS.iter().map(|(usage, _)| name(usage)));
        let hint = hint.map(|hint| format!("; did you mean {hint:?}?")).unwrap_or_default();
        TOP.error(format!("there is no command {word:?}{hint}"))
    })
}

fn id(matches: &Matches) -> Result<WorkloadId, Error> {
    let id = WorkloadId::new(matches.word("ID")?).map_err(|rule| matches.error(rule.to_string()))?;
    if matches.trailing().is_empty() { Ok(id) } else { Err(matches.error("no command is expected after --")) }
}

fn timeout(matches: &Matches) -> Result<Option<u64>, Error> {
    let bounded = |text: &str| {
        let ms = duration_ms(text)?;
        if (1..=limits::TTL_MS_MAX).contains(&ms) { Ok(ms) } else { Err(Unfit("must be more than nothing, and at most a year".into())) }
    };
    matches.parsed("timeout", bounded)
}

fn list(matches: &Matches) -> Result<Command, Error> {
    matches.no_words()?;
    let mut filters = Vec::new();
    filters.extend(matches.one("state").map(|state| ("state", state)));
    filters.extend(matches.one("node").map(|node| ("node", node)));
    filters.extend(matches.many("label").into_iter().map(|label| ("label", label)));
    Ok(Command::List { filters })
}

fn events(matches: &Matches) -> Result<Command, Error> {
    matches.no_words()?;
    let mut query = Vec::new();
    query.extend(matches.parsed("since", number)?.map(|revision| ("since", revision.to_string())));
    query.extend(matches.present("replay").then(|| ("replay", "true".to_owned())));
    query.extend(matches.one("id").map(|id| ("id", id)));
    query.extend(matches.one("node").map(|node| ("node", node)));
    query.extend(matches.many("label").into_iter().map(|label| ("label", label)));
    Ok(Command::Events { query })
}

fn label(matches: &Matches) -> Result<Command, Error> {
    let (id, words) = matches.words().split_first().ok_or_else(|| matches.error("ID is missing"))?;
    let id = WorkloadId::new(id).map_err(|rule| matches.error(rule.to_string()))?;
    let mut labels = Map::new();
    for word in words {
        let (key, value) = match (word.split_once('='), word.strip_suffix('-')) {
            (Some((key, value)), _) => (key, Value::from(value)),
            (None, Some(key)) => (key, Value::Null),
            (None, None) => return Err(matches.error(format!("{word:?} must be KEY=VALUE, or KEY- to take it away"))),
        };
        if labels.insert(key.to_owned(), value).is_some() {
            return Err(matches.error(format!("label {key:?} is given twice")));
        }
    }
    if labels.is_empty() {
        return Err(matches.error("a label is missing: KEY=VALUE, or KEY- to take it away"));
    }
    Ok(Command::Label { id, patch: json!({ "labels": labels }) })
}

fn logs(matches: &Matches) -> Result<Command, Error> {
    let follow = matches.present("follow");
    let since = |text: &str| match Timestamp::parse(text) {
        Some(_) => Ok(text.to_owned()),
        None => duration_ms(text).map(|ms| Timestamp::now().minus_ms(ms).to_string()),
    };
    let stream = |text: &str| match text {
        "stdout" | "stderr" => Ok(text.to_owned()),
        _ => Err("must be stdout or stderr"),
    };
    let mut query = Vec::new();
    query.extend(follow.then(|| ("follow", "true".to_owned())));
    query.extend(matches.parsed("tail", number)?.map(|lines| ("tail", lines.to_string())));
    query.extend(matches.parsed("since", since)?.map(|since| ("since", since)));
    query.extend(matches.parsed("stream", stream)?.map(|stream| ("stream", stream)));
    query.extend(matches.present("timestamps").then(|| ("timestamps", "true".to_owned())));
    Ok(Command::Logs { id: id(matches)?, query, follow })
}

fn exec(matches: &Matches) -> Result<Command, Error> {
    let id = WorkloadId::new(matches.word("ID")?).map_err(|rule| matches.error(rule.to_string()))?;
    if matches.trailing().is_empty() {
        return Err(matches.error("the command is missing: kakuri exec ID -- COMMAND..."));
    }
    let timeout_ms = timeout(matches)?.unwrap_or(limits::EXEC_MS_DEFAULT);
    Ok(Command::Exec { id, command: matches.trailing().to_vec(), timeout_ms })
}

fn play(matches: &Matches) -> Result<Command, Error> {
    matches.no_words()?;
    let project = matches.one("project").ok_or_else(|| matches.error("--project is missing"))?;
    let runtime = matches.parsed("cri-endpoint", address::unix_path)?;
    let simulator = matches.present("simulator");
    if simulator && runtime.is_some() {
        return Err(matches.error("--simulator and --cri-endpoint exclude each other"));
    }
    Ok(Command::Play(Play { project: project.into(), runtime, simulator }))
}

fn run(matches: &Matches) -> Result<Command, Error> {
    let until = match (matches.present("wait"), matches.present("wait-running")) {
        (true, true) => return Err(matches.error("--wait and --wait-running exclude each other")),
        (true, false) => Some(Goal::Terminal),
        (false, true) => Some(Goal::Running),
        (false, false) => None,
    };
    let body = match matches.one("file") {
        None => Body::Spec(spec(matches)?),
        Some(_) if RUN_SPEC.iter().any(|flag| matches.present(flag.long)) || matches.no_words().is_err() => {
            return Err(matches.error("-f takes the whole workload from the file; no other part of it can be given"));
        }
        Some(file) if file == "-" => Body::Stdin,
        Some(file) => Body::File(file.into()),
    };
    Ok(Command::Run { body, until, timeout_ms: timeout(matches)? })
}

/// The workload, with the fields that were given and no others: defaults are the control plane's.
fn spec(matches: &Matches) -> Result<Value, Error> {
    let word = matches.word_or_none("IMAGE")?.map(str::to_owned);
    let image = match (matches.one("image"), word) {
        (Some(_), Some(word)) => {
            return Err(matches.error(format!("unexpected argument {word:?}: the image is given; commands stand after --")));
        }
        (image, word) => image.or(word).ok_or_else(|| matches.error("the image is missing"))?,
    };
    let pull = |text: &str| PullPolicy::parse(text).ok_or("must be if-not-present, always or never");
    let some = |items: Vec<Value>| if items.is_empty() { None } else { Some(Value::from(items)) };
    let texts = |flag: &str| some(matches.many(flag).into_iter().map(Value::from).collect());
    let (restart_policy, restart_max_attempts) = matches.parsed("restart", restart)?.unzip();
    let fields = [
        ("id", matches.one("id").map(Value::from)),
        ("image", Some(Value::from(image))),
        ("runtime_class", matches.one("class").map(Value::from)),
        ("security_profile", matches.one("profile").map(Value::from)),
        ("memory_mb", matches.parsed("memory", number)?.map(Value::from)),
        ("cpu_millicores", matches.parsed("cpu", number)?.map(Value::from)),
        ("command", some(matches.trailing().iter().cloned().map(Value::from).collect())),
        ("env", pairs(matches.all_parsed("env", env_pair)?)),
        ("labels", pairs(matches.all_parsed("label", label_pair)?)),
        ("ports", some(matches.all_parsed("port", port)?)),
        ("mounts", some(matches.all_parsed("mount", mount)?)),
        ("user", matches.one("user").map(Value::from)),
        ("working_dir", matches.one("workdir").map(Value::from)),
        ("read_only_rootfs", matches.present("read-only").then_some(Value::from(true))),
        ("capabilities_add", texts("cap-add")),
        ("capabilities_drop", texts("cap-drop")),
        ("pids_max", matches.parsed("pids-max", number)?.map(Value::from)),
        ("image_pull", matches.parsed("pull", pull)?.map(|policy| json!({"policy": policy.as_str()}))),
        ("ttl_ms", matches.parsed("ttl", duration_ms)?.map(Value::from)),
        ("stop_grace_ms", matches.parsed("grace", duration_ms)?.map(Value::from)),
        ("start_deadline_ms", matches.parsed("start-deadline", duration_ms)?.map(Value::from)),
        ("restart_policy", restart_policy),
        ("restart_max_attempts", restart_max_attempts.flatten()),
        ("restart_backoff_ms", matches.parsed("restart-backoff", duration_ms)?.map(Value::from)),
        ("health", health(matches)?),
    ];
    Ok(fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<Map<_, _>>().into())
}

/// `POLICY[:MAX]`
fn restart(text: &str) -> Result<(Value, Option<Value>), Unfit> {
    let (policy, most) = text.split_once(':').map_or((text, None), |(policy, most)| (policy, Some(most)));
    let policy = RestartPolicy::parse(policy).ok_or_else(|| Unfit("must be never, on-failure or always, with :MAX or without".into()))?;
    Ok((policy.as_str().into(), most.map(number).transpose()?.map(Value::from)))
}

fn health(matches: &Matches) -> Result<Option<Value>, Error> {
    let http = |text: &str| {
        let (port, path) = text.split_once('/').map_or((text, None), |(port, path)| (port, Some(path)));
        let path = path.map_or_else(|| "/".to_owned(), |path| format!("/{path}"));
        Ok::<_, Unfit>(json!({"port": number(port)?, "path": path}))
    };
    let fields = [
        ("exec", matches.one("health-cmd").map(|command| json!(["sh", "-c", command]))),
        ("http", matches.parsed("health-http", http)?),
        ("tcp", matches.parsed("health-tcp", number)?.map(|port| json!({"port": port}))),
        ("interval_ms", matches.parsed("health-interval", duration_ms)?.map(Value::from)),
        ("timeout_ms", matches.parsed("health-timeout", duration_ms)?.map(Value::from)),
        ("failures", matches.parsed("health-failures", number)?.map(Value::from)),
    ];
    let map: Map<_, _> = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
    Ok(if map.is_empty() { None } else { Some(map.into()) })
}

fn pairs(pairs: Vec<(String, String)>) -> Option<Value> {
    let map: Map<_, _> = pairs.into_iter().map(|(key, value)| (key, Value::from(value))).collect();
    if map.is_empty() { None } else { Some(map.into()) }
}

fn label_pair(text: &str) -> Result<(String, String), Unfit> {
    let (key, value) = text.split_once('=').ok_or_else(|| Unfit("must be KEY=VALUE".into()))?;
    Ok((key.to_owned(), value.to_owned()))
}

fn env_pair(text: &str) -> Result<(String, String), Unfit> {
    match text.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => {
            std::env::var(text).map(|value| (text.to_owned(), value)).map_err(|_| Unfit(format!("{text} is not set here, or not UTF-8")))
        }
    }
}

fn port(text: &str) -> Result<Value, Unfit> {
    let unfit = || Unfit("must be HOST:CONTAINER or CONTAINER, with /tcp, /udp or /sctp".into());
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let parse = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(unfit);
    let mut port = match ports.split_once(':') {
        Some((host, container)) => json!({"host": parse(host)?, "container": parse(container)?}),
        None => json!({"container": parse(ports)?}),
    };
    port["protocol"] = crate::workload::Protocol::parse(protocol).ok_or_else(unfit)?.as_str().into();
    Ok(port)
}

fn mount(text: &str) -> Result<Value, Unfit> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, read_only) = match parts.as_slice() {
        [source, target] | [source, target, "rw"] => (source, target, false),
        [source, target, "ro"] => (source, target, true),
        _ => return Err(Unfit("must be SRC:DST or SRC:DST:ro".into())),
    };
    Ok(json!({"type": "host", "source": source, "target": target, "read_only": read_only}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing(_: &str) -> Option<String> {
        None
    }

    fn read(line: &[&str]) -> Result<Parsed<Invocation>, Error> {
        parse(&line.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>(), nothing)
    }

    fn invocation(line: &[&str]) -> Invocation {
        match read(line) {
            Ok(Parsed::Run(invocation)) => invocation,
            other => panic!("{line:?}: {other:?}"),
        }
    }

    fn body(line: &[&str]) -> Value {
        match invocation(line).command {
            Command::Run { body: Body::Spec(body), .. } => body,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn run_posts_what_was_given_and_nothing_else() {
        assert_eq!(body(&["run", "busybox"]), json!({"image": "busybox"}));
        assert_eq!(body(&["run", "-i", "busybox", "--", "sh", "-c", "x"]), json!({"image": "busybox", "command": ["sh", "-c", "x"]}));
        let line = [
            "run --id a --image b --class c --profile d --memory 64 --cpu 100 --env K=V=W --label l=m --port 8080:80 --port 53/udp",
            "--mount /s:/t:ro --user 1:2 --workdir /w --read-only --cap-add CHOWN --cap-drop KILL --pids-max 9 --pull never --ttl 1h",
            "--grace 5s --start-deadline 30s --restart on-failure:3 --restart-backoff 2s --health-http 80/h --health-failures 2",
        ];
        let line = line.join(" ");
        let expect = json!({
            "id": "a", "image": "b", "runtime_class": "c", "security_profile": "d", "memory_mb": 64, "cpu_millicores": 100,
            "env": {"K": "V=W"}, "labels": {"l": "m"},
            "ports": [{"host": 8080, "container": 80, "protocol": "tcp"}, {"container": 53, "protocol": "udp"}],
            "mounts": [{"type": "host", "source": "/s", "target": "/t", "read_only": true}],
            "user": "1:2", "working_dir": "/w", "read_only_rootfs": true, "capabilities_add": ["CHOWN"], "capabilities_drop": ["KILL"],
            "pids_max": 9, "image_pull": {"policy": "never"}, "ttl_ms": 3_600_000, "stop_grace_ms": 5000, "start_deadline_ms": 30_000,
            "restart_policy": "on-failure", "restart_max_attempts": 3, "restart_backoff_ms": 2000,
            "health": {"http": {"port": 80, "path": "/h"}, "failures": 2},
        });
        assert_eq!(body(&line.split(' ').collect::<Vec<_>>()), expect);
    }

    #[test]
    fn bad_lines_say_what_is_wrong() {
        let check = |line: &[&str], expect: &str| {
            let error = read(line).expect_err("an error").to_string();
            assert!(error.contains(expect), "{line:?}: {error}");
        };
        check(&[], "a command is missing");
        check(&["lsit"], "did you mean \"list\"?");
        check(&["frobnicate"], "there is no command \"frobnicate\"\n");
        check(&["run"], "the image is missing");
        check(&["run", "a", "b"], "unexpected argument \"b\"");
        check(&["run", "-i", "a", "b"], "unexpected argument \"b\"");
        check(&["run", "a", "--memory", "1g"], "--memory: must be a whole number");
        check(&["run", "a", "--restart", "often"], "--restart: must be never, on-failure or always");
        check(&["run", "a", "--ttl", "5"], "--ttl: a duration is");
        check(&["run", "a", "--env", "KAKURI_SURELY_NOT_SET"], "is not set here");
        check(&["run", "a", "--port", "0:80"], "--port: must be");
        check(&["run", "a", "--port", "80/icmp"], "--port: must be");
        check(&["run", "a", "--mount", "/a"], "--mount: must be");
        check(&["run", "a", "--pull", "maybe"], "--pull: must be");
        check(&["run", "a", "--wait", "--wait-running"], "exclude each other");
        check(&["run", "-f", "x.json", "--memory", "1"], "-f takes the whole workload");
        check(&["run", "-f", "x.json", "image"], "-f takes the whole workload");
        check(&["get"], "ID is missing");
        check(&["get", "../nodes"], "id must be");
        check(&["get", "a", "-o", "xml"], "--output: must be");
        check(&["wait", "a", "--for", "ever"], "--for: must be running or terminal");
        check(&["wait", "a", "--timeout", "0s"], "--timeout: must be");
        check(&["exec", "a"], "the command is missing");
        check(&["exec", "a", "ls"], "unexpected argument \"ls\"");
        check(&["logs", "a", "--stream", "both"], "--stream: must be");
        check(&["logs", "a", "--since", "noon"], "--since: a duration is");
        check(&["nodes", "A"], "ID: name must be");
        check(&["play"], "--project is missing");
        check(&["play", "--project", "x", "--simulator", "--cri-endpoint", "/x"], "exclude each other");
    }

    #[test]
    fn the_server_comes_from_flag_or_environment() {
        fn variables(name: &str) -> Option<String> {
            (name == "KAKURI_ADDR").then(|| "http://env:1".into())
        }
        assert_eq!(invocation(&["list"]).server, "http://127.0.0.1:8080");
        assert_eq!(invocation(&["--server", "http://a:1", "list"]).server, "http://a:1");
        assert_eq!(invocation(&["--server", "http://a:1", "list", "--server", "http://b:1"]).server, "http://b:1");
        let Ok(Parsed::Run(read)) = parse(&["list".to_owned()], variables) else { panic!("not read") };
        assert_eq!(read.server, "http://env:1");
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        for (usage, _) in COMMANDS {
            let word = usage.command.rsplit(' ').next().unwrap_or_default();
            let Ok(Parsed::Special(help)) = read(&[word, "--help"]) else { panic!("{word}") };
            assert!(help.contains(&format!("Example:\n    kakuri {word}")), "{help}");
            assert!(TOP.help().contains(&format!("\n    {word} ")), "{word} is not in the list");
            // Examples are read by people: they must at least be read by us.
            let example: Vec<&str> = usage.example.split(' ').skip(1).collect();
            assert!(read(&example).is_ok(), "{}", usage.example);
        }
    }

    #[test]
    fn waits_and_logs_are_read() {
        let wait = invocation(&["wait", "a", "--for", "running", "--timeout", "30s"]).command;
        assert!(matches!(wait, Command::Wait { goal: Goal::Running, timeout_ms: Some(30_000), .. }), "{wait:?}");
        let Command::Logs { query, follow, .. } =
            invocation(&["logs", "a", "-f", "-n", "5", "-t", "--since", "2026-01-02T03:04:05Z"]).command
        else {
            panic!("no logs")
        };
        let expect = [("follow", "true"), ("tail", "5"), ("since", "2026-01-02T03:04:05Z"), ("timestamps", "true")];
        assert_eq!(query.iter().map(|(k, v)| (*k, v.as_str())).collect::<Vec<_>>(), expect);
        assert!(follow);
    }
}
