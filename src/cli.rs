//! `kakuri`, the command line: one HTTP client, and `play`, which starts everything on one machine.
//!
//! *Scope*: what each command does. *Not here*: how it is typed (`command`), sent (`client`) and shown (`show`).
//!
//! Data goes to stdout, words go to stderr, nothing is coloured and nothing is asked. A closed stdout is a success: the reader
//! had enough.
//! Invariant: `run --wait` and `exec` exit as the workload does; whatever keeps them from learning how is 125.

mod client;
mod command;
mod play;
mod show;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::deadline::{Deadline, Stopwatch};
use crate::flags::{self, Parsed};
use crate::limits;
use crate::report::{self, Chain, Exit, complain};
use crate::workload::{State, WorkloadId};
use client::{Client, Patience};
use command::{Body, Command, Goal, Invocation};
use show::Output;

const PROGRAM: &str = "kakuri";

/// The program.
pub fn main() -> ExitCode {
    let parsed = flags::arguments(PROGRAM).and_then(|args| command::parse(&args, flags::environment));
    let result = match parsed {
        Err(error) => {
            complain(PROGRAM, &error);
            return Exit::Usage.into();
        }
        Ok(Parsed::Special(text)) => report::say(&text).map(|()| Exit::Ok).map_err(Error::Stdout),
        Ok(Parsed::Run(invocation)) => perform(invocation),
    };
    result.unwrap_or_else(|error| error.told()).into()
}

/// Why a command failed.
#[derive(Debug)]
enum Error {
    /// The body to post cannot be read.
    Body { path: PathBuf, cause: io::Error },
    /// The control plane, or the way to it.
    Client(client::Error),
    /// A workload was posted, and nobody knows whether it was accepted.
    Doubt { id: WorkloadId, cause: client::Error },
    /// A command whose exit code is the workload's has none.
    Ours(Box<Error>),
    /// `kakuri play`.
    Play(play::Error),
    /// Nobody reads what we write, or it cannot be written.
    Stdout(io::Error),
    /// It was not there yet when the time was over.
    Timeout { id: WorkloadId, standing: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Body { path, .. } => write!(f, "{}", path.display()),
            Self::Client(error) => error.fmt(f),
            Self::Doubt { id, cause } => {
                write!(f, "{cause}\n{id} may have been accepted: 'kakuri get {id}' tells, and the same again with --id {id} does no harm")
            }
            Self::Ours(error) => error.fmt(f),
            Self::Play(error) => error.fmt(f),
            Self::Stdout(_) => f.write_str("stdout"),
            Self::Timeout { id, standing } => write!(f, "timeout: {id} is {standing}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Body { cause, .. } | Self::Stdout(cause) => Some(cause),
            Self::Client(error) => error.source(),
            // It stands in the text, before the hint.
            Self::Doubt { .. } => None,
            Self::Ours(error) => error.source(),
            Self::Play(error) => error.source(),
            Self::Timeout { .. } => None,
        }
    }
}

impl From<client::Error> for Error {
    fn from(error: client::Error) -> Self {
        Self::Client(error)
    }
}

impl Error {
    /// Tells the person, and gives the exit code.
    fn told(&self) -> Exit {
        if self.is_closed_stdout() {
            return Exit::Ok;
        }
        complain(PROGRAM, &Chain(self));
        match self {
            Self::Body { .. } => Exit::Usage,
            Self::Client(error) | Self::Doubt { cause: error, .. } => error.exit(),
            Self::Ours(_) => Exit::Ours,
            Self::Play(error) => error.exit(),
            Self::Stdout(_) => Exit::General,
            Self::Timeout { .. } => Exit::Unavailable,
        }
    }

    fn is_closed_stdout(&self) -> bool {
        match self {
            Self::Stdout(cause) => cause.kind() == io::ErrorKind::BrokenPipe,
            Self::Ours(error) => error.is_closed_stdout(),
            Self::Body { .. } | Self::Client(_) | Self::Doubt { .. } | Self::Play(_) | Self::Timeout { .. } => false,
        }
    }
}

fn perform(Invocation { server, output, command }: Invocation) -> Result<Exit, Error> {
    let table = output.unwrap_or(Output::Table);
    let name = output.unwrap_or(Output::Name);
    let client = || Client::new(&server).map_err(Error::Client);
    match command {
        Command::Delete { id, force, wait, timeout_ms } => {
            let client = client()?;
            if force {
                let forgotten = client.delete(&client::query(&path(&id), &[("force", "true".to_owned())]))?;
                complain(id.as_str(), &show::at(&forgotten, "/status/last_error"));
            } else {
                client.delete(&path(&id))?;
            }
            if wait {
                wait_until_gone(&client, &id, limit(timeout_ms))?;
            }
            say(&if name == Output::Json { show::json(&json!({"id": id.as_str()})) } else { id.to_string() })
        }
        Command::Exec { id, command, timeout_ms } => {
            client().and_then(|client| exec(&client, &id, &command, timeout_ms, output)).map_err(|error| Error::Ours(Box::new(error)))
        }
        Command::Events { query } => {
            let stream = client()?.stream(&client::query("/events", &query), Patience::PerRead)?;
            if output == Some(Output::Json) {
                pass_on(stream)?;
            } else {
                show_events(stream)?;
            }
            // It ends only when the control plane ends it: what follows was not seen.
            Ok(Exit::Unavailable)
        }
        Command::Get { id } => say(&show::workload(&client()?.get(&path(&id), 0)?, table)),
        Command::Label { id, patch } => say(&show::workload(&client()?.patch(&path(&id), patch.to_string().as_bytes())?, name)),
        Command::List { filters } => say(&show::workloads(&list(&client()?, "/workloads", &filters)?, table)),
        Command::Logs { id, query, follow } => {
            let patience = if follow { Patience::Endless } else { Patience::PerRead };
            pass_on(client()?.stream(&client::query(&format!("{}/logs", path(&id)), &query), patience)?).map(|()| Exit::Ok)
        }
        Command::Nodes { id: None } => say(&show::nodes(&list(&client()?, "/nodes", &[])?, table)),
        Command::Nodes { id: Some(id) } => {
            let node = client()?.get(&format!("/nodes/{id}"), 0)?;
            say(&if table == Output::Json { show::json(&node) } else { show::nodes(&[node], table) })
        }
        Command::Play(options) => play::play(&options).map_err(Error::Play),
        Command::Run { body, until: Some(Goal::Terminal), timeout_ms } => {
            let client = client()?;
            run_to_end(&client, &body, output, limit(timeout_ms)).map_err(|error| Error::Ours(Box::new(error)))
        }
        Command::Run { body, until, timeout_ms } => {
            let client = client()?;
            let (id, mut workload) = post(&client, &body)?;
            if let Some(goal) = until {
                workload = wait_for(&client, &id, goal, limit(timeout_ms), &mut Progress::of(&id))?;
            }
            say(&show::workload(&workload, name))?;
            Ok(verdict(&workload))
        }
        Command::Stop { id, wait, timeout_ms } => {
            let client = client()?;
            let mut workload = client.post(&format!("{}/stop", path(&id)), b"", 0)?;
            if wait {
                workload = wait_for(&client, &id, Goal::Terminal, limit(timeout_ms), &mut Progress::of(&id))?;
            }
            say(&show::workload(&workload, name))
        }
        Command::Version => {
            let answer = client().and_then(|client| client.get("/version", 0).map_err(Error::Client));
            say(&show::versions(answer.as_ref().ok(), table))?;
            answer.map(|_| Exit::Ok)
        }
        Command::Wait { id, goal, timeout_ms } => {
            let workload = wait_for(&client()?, &id, goal, limit(timeout_ms), &mut Progress::silent())?;
            say(&if output.is_some() { show::workload(&workload, name) } else { show::at(&workload, "/state") })?;
            Ok(if goal == Goal::Running { verdict(&workload) } else { Exit::Ok })
        }
    }
}

fn say(text: &str) -> Result<Exit, Error> {
    // A list of no names is no line, rather than an empty one.
    if text.is_empty() {
        return Ok(Exit::Ok);
    }
    report::say(&text).map(|()| Exit::Ok).map_err(Error::Stdout)
}

fn path(id: &WorkloadId) -> String {
    format!("/workloads/{id}")
}

/// Without a limit of its own a wait ends with the longest life of a workload.
fn limit(timeout_ms: Option<u64>) -> Deadline {
    Deadline::within_ms(timeout_ms.unwrap_or(limits::TTL_MS_MAX), "wait")
}

/// Failed is a failure of `run --wait-running` and of `wait --for running`; having Succeeded already is none.
fn verdict(workload: &Value) -> Exit {
    if show::state(workload) == Some(State::Failed) { Exit::General } else { Exit::Ok }
}

/// All pages of a list.
fn list(client: &Client, path: &str, filters: &[(&str, String)]) -> Result<Vec<Value>, Error> {
    let mut items = Vec::new();
    let mut next = None;
    loop {
        let mut query = filters.to_vec();
        if path == "/workloads" {
            query.push(("limit", limits::PAGE_MAX.to_string()));
        }
        query.extend(next.take().map(|token| ("continue", token)));
        let mut page = client.get(&client::query(path, &query), 0)?;
        let more = match page.pointer_mut("/items").map(Value::take) {
            Some(Value::Array(more)) => more,
            _ => Vec::new(),
        };
        // An empty page ends the list even with a token, so that no control plane can keep us for ever.
        next = page.pointer("/continue").and_then(Value::as_str).filter(|_| !more.is_empty()).map(str::to_owned);
        items.extend(more);
        if next.is_none() {
            return Ok(items);
        }
    }
}

/// Posts a workload. Its id is known before, so that of a connection that is lost it is known which one may be there, and the same may
/// be posted again: once, for whoever does not answer then either is asked by a person.
fn post(client: &Client, body: &Body) -> Result<(WorkloadId, Value), Error> {
    let bytes = match body {
        Body::File(path) => File::open(path).and_then(read_body).map_err(|cause| Error::Body { path: path.clone(), cause })?,
        Body::Spec(spec) => spec.to_string().into_bytes(),
        Body::Stdin => read_body(io::stdin()).map_err(|cause| Error::Body { path: Path::new("stdin").to_owned(), cause })?,
    };
    let (bytes, id) = named(bytes);
    let send = || client.post("/workloads", &bytes, 0);
    let mut sent = send();
    let is_lost = id.is_some() && sent.as_ref().is_err_and(client::Error::is_lost_connection);
    if is_lost {
        // It may be starting again: at once it would not be there yet.
        thread::sleep(Duration::from_millis(limits::CLI_POLL_MS_MIN));
        sent = send();
    }
    let workload = sent.map_err(|cause| match id {
        // After a first one that may have arrived, only a rule that is broken says that there is nothing.
        Some(id) if cause.leaves_doubt() || (is_lost && !cause.is_rule()) => Error::Doubt { id, cause },
        _ => Error::Client(cause),
    })?;
    let id = WorkloadId::new(&show::at(&workload, "/id")).map_err(|_| client.unlike())?;
    Ok((id, workload))
}

/// The JSON of a workload with the id it is posted under, which is made here where it names none. It is changed as text: what is wrong
/// with it otherwise is for the control plane to say, which is not told of any id then.
fn named(mut bytes: Vec<u8>) -> (Vec<u8>, Option<WorkloadId>) {
    let Ok(Value::Object(spec)) = serde_json::from_slice(&bytes) else { return (bytes, None) };
    if let Some(id) = spec.get("id") {
        let id = id.as_str().and_then(|id| WorkloadId::new(id).ok());
        return (bytes, id);
    }
    let id = WorkloadId::random();
    let comma = if spec.is_empty() { "" } else { "," };
    let begin = bytes.iter().position(|byte| *byte == b'{').map_or(0, |at| at + 1);
    bytes.splice(begin..begin, format!("\"id\":\"{id}\"{comma}").into_bytes());
    (bytes, Some(id))
}

/// Reads a byte more than the control plane takes, so that it and not we say what is too long.
fn read_body(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(u64::try_from(limits::HTTP_BODY_BYTES_MAX).unwrap_or(u64::MAX).saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Says each new standing of a workload on stderr.
struct Progress<'a> {
    id: Option<&'a WorkloadId>,
    last: String,
}

impl<'a> Progress<'a> {
    fn of(id: &'a WorkloadId) -> Self {
        Self { id: Some(id), last: String::new() }
    }

    fn silent() -> Self {
        Self { id: None, last: String::new() }
    }

    fn see(&mut self, workload: &Value) {
        let standing = show::standing(workload);
        if let (Some(id), true) = (self.id, standing != self.last) {
            complain(id.as_str(), &standing);
        }
        self.last = standing;
    }
}

/// One long poll; the control plane holds the answer until the goal is reached or the slice is over.
fn poll(client: &Client, id: &WorkloadId, goal: Goal, deadline: Deadline, progress: &mut Progress<'_>) -> Result<(Value, bool), Error> {
    let left_ms = deadline.left().map_or(0, |left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
    let slice_ms = left_ms.min(limits::CLI_WAIT_SLICE_MS);
    let query = [("wait_ms", slice_ms.to_string()), ("for", goal.as_str().to_owned())];
    let asked = Stopwatch::start();
    let workload = client.get(&client::query(&path(id), &query), slice_ms)?;
    progress.see(&workload);
    let reached = match (goal, show::state(&workload)) {
        (Goal::Running, state) => state.is_some_and(|state| state != State::Pending),
        (Goal::Terminal, state) => state.is_some_and(State::is_terminal),
    };
    if !reached {
        if left_ms == 0 {
            return Err(Error::Timeout { id: id.clone(), standing: show::standing(&workload) });
        }
        // A control plane that cannot reach the node answers at once with the last it knew; asking again without a pause would
        // only keep it busy.
        let pause_ms = limits::CLI_POLL_MS_MIN.saturating_sub(asked.elapsed_ms()).min(left_ms);
        thread::sleep(Duration::from_millis(pause_ms));
    }
    Ok((workload, reached))
}

fn wait_for(client: &Client, id: &WorkloadId, goal: Goal, deadline: Deadline, progress: &mut Progress<'_>) -> Result<Value, Error> {
    loop {
        if let (workload, true) = poll(client, id, goal, deadline, progress)? {
            return Ok(workload);
        }
    }
}

/// `run --wait`: logs to stdout, states to stderr, until it ends. With an output format only the ended workload is printed.
fn run_to_end(client: &Client, body: &Body, output: Option<Output>, deadline: Deadline) -> Result<Exit, Error> {
    let (id, workload) = post(client, body)?;
    let mut progress = Progress::of(&id);
    progress.see(&workload);
    // Each attempt of a workload that restarts has its own output; this is the one shown last.
    let mut shown = None;
    loop {
        let workload = wait_for(client, &id, Goal::Running, deadline, &mut progress)?;
        let attempt = (show::at(&workload, "/status/restarts"), show::at(&workload, "/status/started_at"));
        if output.is_none() && attempt.1 != "-" && shown.as_ref() != Some(&attempt) {
            let mut query = vec![("follow", "true".to_owned())];
            query.extend(shown.is_some().then(|| ("since", attempt.1.clone())));
            let target = client::query(&format!("{}/logs", path(&id)), &query);
            let passed = client.stream(&target, Patience::Until(deadline)).map_err(Error::Client).and_then(pass_on);
            match passed {
                // Logs that are gone, or break off, must not hide how the workload ends; a timeout is told below.
                Err(Error::Client(_)) if deadline.left().is_err() => {}
                Err(Error::Client(error)) => complain(PROGRAM, &format_args!("logs of {id}: {}", Chain(&error))),
                other => other?,
            }
            shown = Some(attempt);
        }
        let (workload, ended) = poll(client, &id, Goal::Terminal, deadline, &mut progress)?;
        if ended {
            if let Some(output) = output {
                say(&show::workload(&workload, output))?;
            }
            return Ok(exit_of(&workload));
        }
    }
}

/// The exit code of a workload that ended. One that failed never counts as a success, whatever its first process returned.
fn exit_of(workload: &Value) -> Exit {
    match (workload.pointer("/status/exit_code").and_then(Value::as_i64), show::state(workload)) {
        (Some(0), Some(State::Succeeded)) => Exit::Ok,
        (Some(0), _) => Exit::General,
        (Some(code), _) => passed_on(code),
        (None, _) => Exit::Ours,
    }
}

/// Exit codes have eight bits; one that would be cut to 0 becomes 255.
fn passed_on(code: i64) -> Exit {
    Exit::Workload(u8::try_from(code).unwrap_or(u8::MAX))
}

fn exec(client: &Client, id: &WorkloadId, command: &[String], timeout_ms: u64, output: Option<Output>) -> Result<Exit, Error> {
    let body = json!({"command": command, "timeout_ms": timeout_ms}).to_string();
    let answer = client.post(&format!("{}/exec", path(id)), body.as_bytes(), timeout_ms)?;
    let exit =
        answer.pointer("/exit_code").and_then(Value::as_i64).map_or(Exit::Ours, |code| if code == 0 { Exit::Ok } else { passed_on(code) });
    if output == Some(Output::Json) {
        return say(&show::json(&answer)).map(|_| exit);
    }
    let base64 = answer.pointer("/encoding").and_then(Value::as_str) == Some("base64");
    let bytes = |pointer: &str| {
        let text = answer.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        if base64 { STANDARD.decode(text).map_err(|_| client.unlike()) } else { Ok(text.as_bytes().to_vec()) }
    };
    let (stdout, stderr) = (bytes("/stdout")?, bytes("/stderr")?);
    let mut out = io::stdout().lock();
    let written = out.write_all(&stdout).and_then(|()| out.flush());
    // A closed stderr leaves no one to tell.
    let _ = io::stderr().write_all(&stderr);
    if answer.pointer("/truncated").and_then(Value::as_bool) == Some(true) {
        complain(PROGRAM, &format_args!("output was cut at {} bytes", limits::EXEC_OUTPUT_BYTES_MAX));
    }
    written.map_err(Error::Stdout)?;
    Ok(exit)
}

fn wait_until_gone(client: &Client, id: &WorkloadId, deadline: Deadline) -> Result<(), Error> {
    let mut progress = Progress::of(id);
    loop {
        let (workload, ended) = match poll(client, id, Goal::Terminal, deadline, &mut progress) {
            Err(Error::Client(error)) if error.is_not_found() => return Ok(()),
            other => other?,
        };
        if deadline.left().is_err() {
            return Err(Error::Timeout { id: id.clone(), standing: show::standing(&workload) });
        }
        if ended {
            // Ended and not yet removed: the rest takes a moment that no long poll covers.
            thread::sleep(Duration::from_millis(limits::CLI_POLL_MS_MIN));
        }
    }
}

/// Shows events as they come, a line each.
fn show_events(stream: impl Read) -> Result<(), Error> {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let bytes_max = limits::CLI_ANSWER_BYTES_MAX;
        let n = stream.by_ref().take(bytes_max).read_until(b'\n', &mut line).map_err(|cause| client::Error::Broken { cause })?;
        if n == 0 {
            return Ok(());
        }
        // What is no JSON is shown as nothing: `-o json` shows all.
        if let Some(text) = serde_json::from_slice(&line).ok().as_ref().and_then(show::event) {
            say(&text)?;
        }
    }
}

/// Hands a stream on to stdout as it comes.
fn pass_on(mut stream: impl Read) -> Result<(), Error> {
    let mut buffer = [0; 16 * 1024];
    let mut out = io::stdout().lock();
    loop {
        let n = stream.read(&mut buffer).map_err(|cause| client::Error::Broken { cause })?;
        if n == 0 {
            return Ok(());
        }
        let bytes = buffer.get(..n).unwrap_or_default();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(Error::Stdout)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_passes_its_exit_code_on() {
        let check = |state: &str, code: Value, expect: Exit| {
            assert_eq!(exit_of(&json!({"state": state, "status": {"exit_code": code}})), expect, "{state}");
        };
        check("Succeeded", json!(0), Exit::Ok);
        check("Failed", json!(3), Exit::Workload(3));
        check("Failed", json!(137), Exit::Workload(137));
        check("Failed", json!(0), Exit::General);
        check("Failed", json!(256), Exit::Workload(255));
        check("Failed", json!(-1), Exit::Workload(255));
        check("Failed", json!(null), Exit::Ours);
    }

    #[test]
    fn a_workload_without_a_name_gets_one() {
        let check = |text: &str| {
            let (bytes, id) = named(text.as_bytes().to_vec());
            let spec: Value = serde_json::from_slice(&bytes).expect("JSON");
            assert_eq!(spec["id"].as_str(), id.as_ref().map(WorkloadId::as_str), "{text}");
            assert!(id.is_some_and(|id| id.as_str().starts_with("wl-") && id.as_str().len() == 15), "{text}");
            spec
        };
        check("{}");
        check(" \n{ }");
        assert_eq!(check(r#"{"image":"a{b","env":{"id":"x"}}"#)["image"], "a{b");
        let same = |text: &str, expect: Option<&str>| {
            let (bytes, id) = named(text.as_bytes().to_vec());
            assert_eq!((bytes.as_slice(), id.as_ref().map(WorkloadId::as_str)), (text.as_bytes(), expect), "{text}");
        };
        same(r#"{"id":"a"}"#, Some("a"));
        same(r#"{"id":"A"}"#, None);
        same(r#"{"id":null}"#, None);
        same("[]", None);
        same("{", None);
        same("", None);
        // What stands twice is still there twice, for the control plane to refuse.
        let (bytes, _) = named(br#"{"image":"a","image":"b"}"#.to_vec());
        assert!(bytes.ends_with(br#","image":"a","image":"b"}"#));
    }

    #[test]
    fn a_closed_stdout_is_a_success() {
        let closed = || Error::Stdout(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(closed().told(), Exit::Ok);
        assert_eq!(Error::Ours(Box::new(closed())).told(), Exit::Ok);
        assert_eq!(Error::Ours(Box::new(Error::Stdout(io::Error::other("full")))).told(), Exit::Ours);
    }
}
