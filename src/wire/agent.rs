//! The line protocol between the control plane, or a person with `nc`, and an agent: one JSON object a line.
//!
//! Requests are read strictly ([`Request::parse`]); replies leniently, for an agent may be one version ahead. What it says of a
//! workload in a state of its own is not read at all ([`Unreadable`]), for no state is invented.
//!
//! What the shapes alone do not say:
//!
//! - `StartWorkload` answered with `Error` was not taken. It is idempotent, as are all but `Exec`.
//! - `StartWorkload`, `StopWorkload`, `UpdateWorkload` and `DeleteWorkload` may have a `fence`, a number that their sender lets grow. Of
//!   those about one id, one with a lower number than the highest seen is refused with `Unavailable` and that number: it came late.
//! - `UpdateWorkload` answers `Status`. It changes nothing that runs: labels are for selectors.
//! - `StopWorkload` without `wait_ms` answers at once. `DeleteWorkload` answers `Deleted` when nothing is left, `NotFound` when
//!   nothing was there, and `DeadlineExceeded` when it takes longer than `wait_ms`: then it goes on, and a `DELETED` event tells its end.
//! - `GetStatus` with `wait_ms` is answered with `NotFound` when the workload goes away meanwhile.
//! - `Watch` with `since` begins with every event since that revision, or is refused with `NotFound` when they are not kept any more.
//! - `Watch` begins with `ADDED` for everything there is, and a `Heartbeat` that ends the list.
//! - `GetLogs` refuses with its first line, or ends with `LogEnd`; with `follow` there may be `Heartbeat`s between. A `Log` with
//!   `"gap":true` says that output before it is missing: it was removed before it was read, is more than `tail` holds, or no record
//!   (the line may be the end of one that was cut by that); a `LogEnd`, that output after the last line is.
//! - `CollectImages` answers `Images` when it is done, with what it removed, or with `dry_run` what it would have; `Unavailable` while
//!   the agent itself is at it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::json::{Fields, Problems, parse};
use super::status::Status;
use super::workload;
use crate::deadline::Timestamp;
use crate::limits;
use crate::workload::{State, Workload, WorkloadId};

/// What an agent can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Proves who asks, where the listener wants that.
    Auth {
        /// The secret.
        token: String,
    },
    /// Removes images nobody uses, as far as the marks of the node's configuration call for it.
    CollectImages {
        /// Only tell what would be done.
        dry_run: bool,
    },
    /// Stops, removes and forgets a workload.
    DeleteWorkload {
        /// Which.
        id: WorkloadId,
        /// How long the answer may take.
        wait_ms: Option<u64>,
    },
    /// Runs a command in a running workload.
    Exec {
        /// Which workload.
        id: WorkloadId,
        /// The command and its arguments.
        command: Vec<String>,
        /// How long it may run.
        timeout_ms: u64,
    },
    /// Reads, and with `follow` keeps reading, the output of a workload.
    GetLogs(LogRequest),
    /// Asks what the node is and has.
    GetNode,
    /// Asks how a workload is.
    GetStatus {
        /// Which.
        id: WorkloadId,
        /// Hold the answer until it is in such a state, up to `wait_ms`.
        wait: Option<(Until, u64)>,
    },
    /// Lists workloads in the order of their ids, a page at a time.
    ListWorkloads {
        /// Begin behind this id.
        after: Option<WorkloadId>,
        /// At most so many.
        limit: usize,
    },
    /// Asks for a sign of life.
    Ping,
    /// Starts a workload.
    StartWorkload {
        /// What to run.
        workload: Box<Workload>,
        /// Hold the answer until it left Pending, up to this.
        wait_ms: Option<u64>,
    },
    /// Ends a workload; what is known of it stays.
    StopWorkload {
        /// Which.
        id: WorkloadId,
        /// Hold the answer until it ended, up to this.
        wait_ms: Option<u64>,
    },
    /// Replaces the labels of a workload; all else stays.
    UpdateWorkload {
        /// Which.
        id: WorkloadId,
        /// All it is to have.
        labels: BTreeMap<String, String>,
    },
    /// Sends an event for every change from now on.
    Watch {
        /// And for every change since the one of this revision, in place of the list of what there is.
        since: Option<u64>,
    },
}

/// Which part of a workload's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRequest {
    /// Whose.
    pub id: WorkloadId,
    /// Go on as it grows, until the workload ends.
    pub follow: bool,
    /// Only the last lines.
    pub tail: Option<u64>,
    /// Only what was written at or after this moment.
    pub since: Option<Timestamp>,
    /// Only one of the two streams.
    pub stream: Option<LogStream>,
}

/// Which state a wait is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Any but Pending.
    Started,
    /// Succeeded or Failed.
    Terminal,
}

impl Until {
    /// Whether the wait is over in this state.
    pub fn is_reached(self, state: State) -> bool {
        match self {
            Self::Started => state != State::Pending,
            Self::Terminal => state.is_terminal(),
        }
    }

    /// `running` or `terminal`, as `for` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Started => "running",
            Self::Terminal => "terminal",
        }
    }

    /// The inverse of [`Until::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Started, Self::Terminal].into_iter().find(|u| u.as_str() == text)
    }
}

/// One of a container's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum LogStream {
    Stdout,
    Stderr,
}

impl LogStream {
    /// `stdout` or `stderr`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }

    /// The inverse of [`LogStream::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Stdout, Self::Stderr].into_iter().find(|s| s.as_str() == text)
    }
}

/// A line from outside: the request, and what comes with it.
#[derive(Debug)]
pub struct Received {
    /// Given back with every reply.
    pub seq: Option<Value>,
    /// The id the line names, for the error's sake.
    pub id: Option<String>,
    /// The number of a request that changes a workload: of those about one id, one with a lower number than the highest seen is refused.
    pub fence: Option<u64>,
    /// The request, or every rule the line breaks.
    pub request: Result<Request, Problems>,
}

impl Request {
    /// Reads one line.
    pub fn parse(line: &[u8]) -> Received {
        let mut problems = Problems::default();
        let fields = parse(line).map(|value| Fields::of(value, "", &mut problems));
        let mut fields = match fields {
            Ok(Some(fields)) => fields,
            Ok(None) => return Received { seq: None, id: None, fence: None, request: Err(problems) },
            Err(problems) => return Received { seq: None, id: None, fence: None, request: Err(problems) },
        };
        let seq = fields.take("seq");
        let seq_fits = seq.as_ref().is_none_or(|s| s.is_number() || s.as_str().is_some_and(|s| s.len() <= limits::NAME_BYTES_MAX));
        if !seq_fits {
            fields.problem("seq", format!("must be a number or a string of at most {} bytes", limits::NAME_BYTES_MAX));
        }
        let (request, id) = read(&mut fields);
        // Of any other request it is a field that nobody knows.
        let is_change = request.as_ref().is_none_or(Self::is_change);
        let fence = if is_change { fields.integer("fence", 0, FENCE_MAX) } else { None };
        fields.finish();
        let request = request.filter(|_| problems.is_empty()).ok_or(problems);
        Received { seq: seq.filter(|_| seq_fits), id, fence, request }
    }

    /// Whether it changes what is wished of one workload.
    pub fn is_change(&self) -> bool {
        match self {
            Self::DeleteWorkload { .. } | Self::StartWorkload { .. } | Self::StopWorkload { .. } | Self::UpdateWorkload { .. } => true,
            Self::Auth { .. }
            | Self::CollectImages { .. }
            | Self::Exec { .. }
            | Self::GetLogs(_)
            | Self::GetNode
            | Self::GetStatus { .. }
            | Self::ListWorkloads { .. }
            | Self::Ping
            | Self::Watch { .. } => false,
        }
    }

    /// The line that [`Request::parse`] reads back, newline included. Only a change has a `fence`.
    pub fn to_line(&self, fence: Option<u64>) -> Vec<u8> {
        let mut value = match self {
            Self::Auth { token } => json!({"type": "Auth", "token": token}),
            Self::CollectImages { dry_run } => json!({"type": "CollectImages", "dry_run": dry_run}),
            Self::DeleteWorkload { id, wait_ms } => json!({"type": "DeleteWorkload", "id": id.as_str(), "wait_ms": wait_ms}),
            Self::Exec { id, command, timeout_ms } => {
                json!({"type": "Exec", "id": id.as_str(), "command": command, "timeout_ms": timeout_ms})
            }
            Self::GetLogs(LogRequest { id, follow, tail, since, stream }) => {
                json!({"type": "GetLogs", "id": id.as_str(), "follow": follow, "tail": tail, "since": since, "stream": stream})
            }
            Self::GetNode => json!({"type": "GetNode"}),
            Self::GetStatus { id, wait } => {
                let (until, wait_ms) = (wait.map(|w| w.0.as_str()), wait.map(|w| w.1));
                json!({"type": "GetStatus", "id": id.as_str(), "for": until, "wait_ms": wait_ms})
            }
            Self::ListWorkloads { after, limit } => {
                json!({"type": "ListWorkloads", "after": after.as_ref().map(WorkloadId::as_str), "limit": limit})
            }
            Self::Ping => json!({"type": "Ping"}),
            Self::StartWorkload { workload, wait_ms } => {
                json!({"type": "StartWorkload", "workload": workload::to_map(workload), "wait_ms": wait_ms})
            }
            Self::StopWorkload { id, wait_ms } => json!({"type": "StopWorkload", "id": id.as_str(), "wait_ms": wait_ms}),
            Self::UpdateWorkload { id, labels } => json!({"type": "UpdateWorkload", "id": id.as_str(), "labels": labels}),
            Self::Watch { since } => json!({"type": "Watch", "since": since}),
        };
        if let (Some(fence), true, Some(fields)) = (fence, self.is_change(), value.as_object_mut()) {
            fields.insert("fence".into(), fence.into());
        }
        let mut line = value.to_string().into_bytes();
        line.push(b'\n');
        line
    }
}

/// The largest whole number that every reader of JSON keeps exactly (RFC 8259, section 6).
const INTEGER_MAX: u64 = (1 << 53) - 1;

/// The largest `fence`.
pub const FENCE_MAX: u64 = INTEGER_MAX;

/// The feature of an agent that heeds a `fence`.
pub const FEATURE_FENCE: &str = "fence";

/// The types of requests, for the error that lists them.
const TYPES: &str = "Auth, CollectImages, DeleteWorkload, Exec, GetLogs, GetNode, GetStatus, ListWorkloads, Ping, StartWorkload, \
     StopWorkload, UpdateWorkload, Watch";

fn read(fields: &mut Fields<'_>) -> (Option<Request>, Option<String>) {
    let kind = fields.text("type", limits::NAME_BYTES_MAX);
    let Some(kind) = fields.required("type", kind) else { return (None, None) };
    let mut named = None;
    let request = match kind.as_str() {
        "Auth" => {
            let token = fields.text("token", limits::WORD_BYTES_MAX);
            fields.required("token", token).map(|token| Request::Auth { token })
        }
        "CollectImages" => {
            let dry_run = fields.flag("dry_run").unwrap_or(false);
            Some(Request::CollectImages { dry_run })
        }
        "DeleteWorkload" => {
            let (id, wait_ms) = (id(fields, &mut named), wait_ms(fields));
            id.map(|id| Request::DeleteWorkload { id, wait_ms })
        }
        "Exec" => {
            let id = id(fields, &mut named);
            let command = fields.texts("command", limits::WORDS_MAX, limits::WORD_BYTES_MAX);
            if command.is_empty() && fields.problems().is_empty() {
                fields.problem("command", "must have at least one word");
            }
            let timeout_ms = fields.integer("timeout_ms", 1, limits::EXEC_MS_MAX).unwrap_or(limits::EXEC_MS_DEFAULT);
            id.map(|id| Request::Exec { id, command, timeout_ms })
        }
        "GetLogs" => {
            let id = id(fields, &mut named);
            let follow = fields.flag("follow").unwrap_or(false);
            let tail = fields.integer("tail", 0, limits::LOG_TAIL_MAX);
            let since = fields.text("since", limits::NAME_BYTES_MAX);
            let since = since.and_then(|text| {
                let time = Timestamp::parse(&text);
                if time.is_none() {
                    fields.problem("since", "must be an RFC 3339 time in UTC");
                }
                time
            });
            let stream = fields.one_of("stream", &[LogStream::Stdout, LogStream::Stderr], LogStream::as_str);
            id.map(|id| Request::GetLogs(LogRequest { id, follow, tail, since, stream }))
        }
        "GetNode" => Some(Request::GetNode),
        "GetStatus" => {
            let id = id(fields, &mut named);
            let until = fields.one_of("for", &[Until::Started, Until::Terminal], Until::as_str).unwrap_or(Until::Started);
            let wait = wait_ms(fields).map(|ms| (until, ms));
            id.map(|id| Request::GetStatus { id, wait })
        }
        "ListWorkloads" => {
            let after = fields.parsed("after", WorkloadId::new);
            let limit = fields.integer("limit", 1, limits::PAGE_MAX as u64).unwrap_or(limits::PAGE_MAX as u64);
            Some(Request::ListWorkloads { after, limit: usize::try_from(limit).unwrap_or(limits::PAGE_MAX) })
        }
        "Ping" => Some(Request::Ping),
        "StartWorkload" => {
            let value = fields.take("workload");
            let value = fields.required("workload", value);
            named = value
                .as_ref()
                .and_then(|v| v.get("id"))
                .and_then(Value::as_str)
                .and_then(|id| WorkloadId::new(id).ok())
                .map(|id| id.to_string());
            let workload = value.and_then(|value| workload::complete(value, "/workload", fields.problems()));
            let wait_ms = wait_ms(fields);
            workload.map(|workload| Request::StartWorkload { workload: Box::new(workload), wait_ms })
        }
        "StopWorkload" => {
            let (id, wait_ms) = (id(fields, &mut named), wait_ms(fields));
            id.map(|id| Request::StopWorkload { id, wait_ms })
        }
        "UpdateWorkload" => {
            let id = id(fields, &mut named);
            // Absent would be as good as empty, and a line that was cut short must not take all labels away.
            let given = fields.take("labels");
            let given = fields.required("labels", given);
            let mut inner = given.and_then(|labels| Fields::of(json!({ "labels": labels }), "", fields.problems()));
            let labels = inner.as_mut().map(|inner| workload::labels(inner, "labels"));
            id.zip(labels).map(|(id, labels)| Request::UpdateWorkload { id, labels })
        }
        "Watch" => Some(Request::Watch { since: fields.integer("since", 0, INTEGER_MAX) }),
        _ => {
            fields.problem("type", format!("unknown type; must be one of {TYPES}"));
            None
        }
    };
    (request, named)
}

fn id(fields: &mut Fields<'_>, named: &mut Option<String>) -> Option<WorkloadId> {
    let id = fields.parsed("id", WorkloadId::new);
    let id = fields.required("id", id);
    *named = id.as_ref().map(ToString::to_string);
    id
}

fn wait_ms(fields: &mut Fields<'_>) -> Option<u64> {
    fields.integer("wait_ms", 0, limits::WAIT_MS_MAX)
}

/// What an agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type")]
#[allow(missing_docs)] // Each variant answers the request it is named for, with the fields of spec and status.
pub enum Reply {
    Deleted {
        id: String,
    },
    Error(ErrorReply),
    Event(Event),
    ExecResult(ExecResult),
    Images(super::images::Images),
    Heartbeat {
        time: Timestamp,
        revision: u64,
    },
    Log(LogLine),
    LogEnd {
        id: String,
        /// Output after the last line is missing.
        #[serde(default, skip_serializing_if = "is_false")]
        gap: bool,
    },
    Node(Box<Node>),
    Ok,
    Pong {
        version: String,
    },
    Status {
        id: String,
        state: State,
        status: Box<Status>,
    },
    Workloads {
        workloads: Vec<Object>,
        #[serde(default)]
        r#continue: Option<String>,
    },
}

/// A refusal or a failure, in a form programs can branch on and people can act on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    /// What kind.
    pub code: ErrorCode,
    /// In words.
    pub message: String,
    /// The workload it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Each rule the request breaks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<ProblemBody>,
    /// Why it was refused: it has a lower `fence` than this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<u64>,
}

/// One rule a body breaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemBody {
    /// Where, as a JSON pointer.
    pub pointer: String,
    /// The rule.
    pub detail: String,
}

impl From<&Problems> for Vec<ProblemBody> {
    fn from(problems: &Problems) -> Self {
        let body = |p: &super::Problem| ProblemBody { pointer: p.pointer.clone(), detail: p.detail.clone() };
        problems.as_slice().iter().map(body).collect()
    }
}

/// What kinds of errors there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorCode {
    /// The id is taken by another spec.
    AlreadyExists,
    /// Not done in time.
    DeadlineExceeded,
    /// A bug of the agent.
    Internal,
    /// The request breaks a rule.
    InvalidArgument,
    /// There is no such workload.
    NotFound,
    /// Known, and not allowed.
    PermissionDenied,
    /// A bound is reached.
    ResourceExhausted,
    /// Not known who asks.
    Unauthenticated,
    /// Not now.
    Unavailable,
}

/// A change of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with every change on this agent since it started.
    pub revision: u64,
    /// What happened.
    pub event: EventKind,
    /// The workload, as it is after the change, or was before it vanished.
    #[serde(flatten)]
    pub object: Object,
}

/// What happened to a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EventKind {
    /// It is new here, or was here when the watch began.
    Added,
    /// It is gone.
    Deleted,
    /// Its state or status changed.
    Modified,
}

/// A workload with its state and status: the fields of its spec, and two more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Where it stands.
    pub state: State,
    /// What is known of it.
    pub status: Box<Status>,
    /// The fields of the workload.
    #[serde(flatten)]
    pub spec: Map<String, Value>,
}

/// What a command in a workload did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecResult {
    /// Its exit code.
    pub exit_code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// How the two are written: `utf-8`, or `base64` when either is not UTF-8.
    pub encoding: String,
    /// Whether either was cut at `EXEC_OUTPUT_BYTES_MAX`.
    pub truncated: bool,
}

/// One line of output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Which output.
    pub stream: LogStream,
    /// When the runtime read it, as it wrote it down.
    pub time: String,
    /// The line; bytes that are not UTF-8 are replaced.
    pub line: String,
    /// Output before it is missing: it was removed for want of space or with its workload, or is beyond a bound.
    #[serde(default, skip_serializing_if = "is_false")]
    pub gap: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde asks by reference.
fn is_false(value: &bool) -> bool {
    !value
}

/// A node, as its agent describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name.
    pub node_id: String,
    /// Whether it takes work.
    pub ready: bool,
    /// Why not.
    pub conditions: Vec<Condition>,
    /// The classes it offers.
    pub runtime_classes: Vec<Class>,
    /// What it has.
    pub capacity: Resources,
    /// What its workloads and their overhead take.
    pub allocated: Resources,
    /// Its labels.
    pub labels: Map<String, Value>,
    /// Of the agent.
    pub version: String,
    /// What it can that an agent of an earlier version cannot: `fence`.
    #[serde(default)]
    pub features: Vec<String>,
    /// The node's kernel release.
    pub host_kernel: String,
    /// When the agent started.
    pub started_at: Timestamp,
    /// When the runtime last answered a relist.
    pub observed_at: Option<Timestamp>,
    /// Workloads that are being stopped or deleted.
    #[serde(default)]
    pub stopping: u64,
    /// For how long the longest of them, milliseconds.
    #[serde(default)]
    pub oldest_stopping_ms: u64,
}

/// A statement on a node's health.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// `RuntimeAnswers`, `RuntimeReady` or `NetworkReady`, with the class's endpoint where there are several; `DiskSpace`.
    pub r#type: String,
    /// Whether it holds.
    pub ok: bool,
    /// In words.
    pub message: String,
}

/// A class of sandboxes a node offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Class {
    /// Its name.
    pub name: String,
    /// The CRI runtime handler behind it.
    pub handler: String,
    /// Whether its sandboxes have a kernel of their own.
    pub own_kernel: bool,
    /// Whether the runtime offers the handler; `null` where the runtime does not list its handlers.
    pub available: Option<bool>,
    /// Memory a sandbox takes beside its workload, MiB.
    pub overhead_mb: u64,
    /// The least memory a workload of this class may ask for, MiB.
    pub memory_mb_min: u64,
    /// The runtime's name and version.
    pub runtime: Option<String>,
}

/// Memory, CPU and count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// MiB.
    pub memory_mb: u64,
    /// Thousandths of a core.
    pub cpu_millicores: u64,
    /// Workloads.
    pub workloads: u64,
}

/// The line of a [`Reply::Workloads`], newline included; each object is made when it is written, and never all of them.
pub fn workloads_line<T>(items: &[T], object: impl Fn(&T) -> Object, r#continue: Option<&str>, seq: Option<&Value>) -> Vec<u8> {
    struct Objects<'a, T, F>(&'a [T], F);
    impl<T, F: Fn(&T) -> Object> Serialize for Objects<'_, T, F> {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_seq(self.0.iter().map(&self.1))
        }
    }
    #[derive(Serialize)]
    #[serde(tag = "type", rename = "Workloads")]
    struct Line<'a, T> {
        workloads: T,
        r#continue: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        seq: Option<&'a Value>,
    }
    line_of(&Line { workloads: Objects(items, object), r#continue, seq })
}

fn line_of(reply: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(reply).unwrap_or_else(|error| {
        // Our own types have string keys and no floats; should that ever change, the peer still gets an answer.
        log::error!("a reply cannot be written: {error}");
        br#"{"type":"Error","code":"Internal","message":"the reply cannot be written"}"#.to_vec()
    });
    line.push(b'\n');
    line
}

impl Reply {
    /// An error without a list of rules.
    pub fn error(code: ErrorCode, message: impl Into<String>, id: Option<String>) -> Self {
        Self::Error(ErrorReply { code, message: message.into(), id, errors: Vec::new(), fence: None })
    }

    /// The line, newline included, with `seq` echoed.
    pub fn to_line(&self, seq: Option<&Value>) -> Vec<u8> {
        #[derive(Serialize)]
        struct Line<'a> {
            #[serde(flatten)]
            reply: &'a Reply,
            #[serde(skip_serializing_if = "Option::is_none")]
            seq: Option<&'a Value>,
        }
        line_of(&Line { reply: self, seq })
    }

    /// Reads a line of an agent; unknown fields, reasons and phases are ignored, an unknown type or state is an error.
    ///
    /// # Errors
    /// What does not fit.
    pub fn parse(line: &[u8]) -> Result<Self, Unreadable> {
        serde_json::from_slice(line).map_err(|cause| {
            let words = serde_json::from_slice::<Words>(line).ok();
            let is_reply = words.is_some();
            Unreadable { is_reply, id: words.and_then(|words| words.id).and_then(|id| WorkloadId::new(&id).ok()), cause }
        })
    }
}

/// What every reply has, and what those about a workload have, in whatever version.
#[derive(Deserialize)]
struct Words {
    #[allow(dead_code)] // Its presence makes it a reply.
    r#type: String,
    id: Option<String>,
}

/// A line that is no reply of this version.
#[derive(Debug)]
pub struct Unreadable {
    /// Whether it may be one of a later version.
    pub is_reply: bool,
    /// The workload it names.
    pub id: Option<WorkloadId>,
    cause: serde_json::Error,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_reply { "a reply in words that this version does not know" } else { "no reply" })
    }
}

impl std::error::Error for Unreadable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(request: &Request) {
        let line = request.to_line(Some(FENCE_MAX));
        let received = Request::parse(&line);
        assert_eq!(received.request.as_ref(), Ok(request), "{:?}", String::from_utf8_lossy(&line));
        assert_eq!(received.fence, request.is_change().then_some(FENCE_MAX));
    }

    fn id() -> WorkloadId {
        WorkloadId::new("wl-1").expect("valid")
    }

    #[test]
    fn requests_read_what_they_write() {
        round_trip(&Request::Ping);
        round_trip(&Request::GetNode);
        round_trip(&Request::Watch { since: None });
        round_trip(&Request::Watch { since: Some(7) });
        round_trip(&Request::CollectImages { dry_run: true });
        round_trip(&Request::Auth { token: "t".into() });
        round_trip(&Request::GetStatus { id: id(), wait: None });
        round_trip(&Request::GetStatus { id: id(), wait: Some((Until::Terminal, 5)) });
        round_trip(&Request::StopWorkload { id: id(), wait_ms: Some(0) });
        round_trip(&Request::DeleteWorkload { id: id(), wait_ms: None });
        round_trip(&Request::UpdateWorkload { id: id(), labels: BTreeMap::new() });
        round_trip(&Request::UpdateWorkload { id: id(), labels: BTreeMap::from([("a".into(), "b".into())]) });
        round_trip(&Request::ListWorkloads { after: Some(id()), limit: 7 });
        round_trip(&Request::Exec { id: id(), command: vec!["uname".into()], timeout_ms: 9 });
        let since = Timestamp::parse("2026-01-02T03:04:05.678Z");
        round_trip(&Request::GetLogs(LogRequest { id: id(), follow: true, tail: Some(3), since, stream: Some(LogStream::Stderr) }));
        let mut problems = Problems::default();
        let workload = workload::complete(json!({"id":"a","image":"b","runtime_class":"c"}), "", &mut problems).expect("valid");
        round_trip(&Request::StartWorkload { workload: Box::new(workload), wait_ms: None });
    }

    #[test]
    fn a_bad_line_says_what_is_wrong_and_keeps_seq_and_id() {
        let check = |line: &str, rule: &str| {
            let received = Request::parse(line.as_bytes());
            let problems = received.request.expect_err("breaks a rule").to_string();
            assert!(problems.contains(rule), "{line}: {problems}");
        };
        check("", "not JSON");
        check("[]", "body: must be an object, not an array");
        check("{}", "/type: is required");
        check(r#"{"type":"Nonsense"}"#, "/type: unknown type; must be one of Auth,");
        check(r#"{"type":5}"#, "/type: must be a string");
        check(r#"{"type":"GetStatus"}"#, "/id: is required");
        check(r#"{"type":"GetStatus","id":"a","idd":"b"}"#, "/idd: unknown field; did you mean id?");
        check(r#"{"type":"Ping","type":"Ping"}"#, "/type: duplicate key");
        check(r#"{"type":"StartWorkload","workload":{"id":"a","image":"b"}}"#, "/workload/runtime_class: is required");
        check(r#"{"type":"StartWorkload"}"#, "/workload: is required");
        check(r#"{"type":"Ping","seq":[]}"#, "/seq: must be a number or a string");
        check(r#"{"type":"GetStatus","id":"a","fence":1}"#, "/fence: unknown field");
        check(r#"{"type":"StopWorkload","id":"a","fence":-1}"#, "/fence: must be");
        check(r#"{"type":"StopWorkload","id":"a","fence":9007199254740992}"#, "/fence: must be");
        check(r#"{"type":"Exec","id":"a"}"#, "/command: must have at least one word");
        check(r#"{"type":"GetLogs","id":"a","since":"today"}"#, "/since: must be an RFC 3339 time");
        let received = Request::parse(br#"{"type":"GetStatus","id":"wl-1","seq":7,"x":1}"#);
        assert_eq!((received.seq, received.id), (Some(7.into()), Some("wl-1".into())));
    }

    #[test]
    fn a_line_of_workloads_is_the_reply_of_that_name() {
        let object = Object { spec: Map::new(), state: State::Running, status: Box::new(Status::accepted(None)) };
        let reply = |r#continue: Option<&str>| Reply::Workloads {
            workloads: vec![object.clone(), object.clone()],
            r#continue: r#continue.map(str::to_owned),
        };
        for (r#continue, seq) in [(None, None), (Some("a"), Some(&Value::from(7)))] {
            let line = workloads_line(&[(), ()], |()| object.clone(), r#continue, seq);
            assert_eq!(String::from_utf8_lossy(&line), String::from_utf8_lossy(&reply(r#continue).to_line(seq)));
        }
    }

    #[test]
    fn replies_carry_type_and_seq_and_are_read_leniently() {
        let reply = Reply::Status { id: "a".into(), state: State::Running, status: Box::new(Status::accepted(None)) };
        let line = reply.to_line(Some(&7.into()));
        let text = String::from_utf8(line.clone()).expect("UTF-8");
        assert!(text.starts_with(r#"{"type":"Status","id":"a","state":"Running","status":{"#), "{text}");
        assert!(text.ends_with("\"seq\":7}\n"), "{text}");
        assert_eq!(Reply::parse(&line).expect("read"), reply);
        let text = String::from_utf8(line).expect("UTF-8");
        let check = |line: &str, expect: Option<Option<&str>>| {
            let error = Reply::parse(line.as_bytes()).expect_err(line);
            assert_eq!(error.is_reply.then(|| error.id.as_ref().map(WorkloadId::as_str)), expect, "{line}");
        };
        check(&text.replace("\"Running\"", "\"Frozen\""), Some(Some("a")));
        check(r#"{"type":"Weather","id":5,"wind":1}"#, None);
        check(r#"{"type":"Weather"}"#, Some(None));
        check("nonsense", None);
        check("{}", None);
        let error = Reply::error(ErrorCode::NotFound, "no such workload", Some("a".into()));
        let text = String::from_utf8(error.to_line(None)).expect("UTF-8");
        assert_eq!(text, "{\"type\":\"Error\",\"code\":\"NotFound\",\"message\":\"no such workload\",\"id\":\"a\"}\n");
    }
}
