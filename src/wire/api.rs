//! The bodies of the HTTP API that are not workloads: problems, lists, nodes, versions.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::agent::{Node, Object, ProblemBody};
use super::json::{Fields, Problems, token};
use super::workload::label_patch;
use crate::deadline::Timestamp;
use crate::limits;

/// `application/problem+json` (RFC 9457) with a stable `code`, and every rule a body breaks.
#[derive(Debug, Serialize)]
pub struct ProblemDetails<'a> {
    /// Always `about:blank`: the code says the kind.
    pub r#type: &'static str,
    /// The HTTP status in words.
    pub title: &'a str,
    /// The HTTP status.
    pub status: u16,
    /// Stable, for programs.
    pub code: &'a str,
    /// For people.
    pub detail: &'a str,
    /// Each rule the body breaks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<ProblemBody>,
    /// Echoed or made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<&'a str>,
}

/// A page of workloads.
#[derive(Debug, Serialize)]
pub struct Page {
    /// In the order of their ids.
    pub items: Vec<Object>,
    /// Give it back as `continue` for the next page.
    pub r#continue: Option<String>,
    /// What happens after this page was made comes after this revision (`GET /events?since=`).
    pub revision: u64,
}

/// A line of `GET /events`.
#[derive(Debug, Serialize)]
pub struct EventLine {
    /// Of the change; of the last one before a line that is none.
    pub revision: u64,
    /// When.
    pub time: Timestamp,
    /// What happened.
    pub event: EventName,
    /// The workload after the change, or before it was gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<Object>,
    /// Why no line follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<&'static str>,
}

/// What a line of `GET /events` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EventName {
    /// A workload is new here, or was here when the stream began and its replay was asked for.
    Added,
    /// It is gone.
    Deleted,
    /// The stream ends: its reader fell behind what is kept.
    Gone,
    /// All is quiet; also the first line, which tells the revision the stream begins at.
    Heartbeat,
    /// It changed.
    Modified,
    /// The stream ends: the control plane stops.
    Stopping,
}

impl EventName {
    /// Its spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Deleted => "DELETED",
            Self::Gone => "GONE",
            Self::Heartbeat => "HEARTBEAT",
            Self::Modified => "MODIFIED",
            Self::Stopping => "STOPPING",
        }
    }
}

/// The body of `PATCH /workloads/{id}` (RFC 7396): labels to set, and to take away where the value is `null`.
#[derive(Debug, PartialEq, Eq)]
pub struct PatchBody {
    /// `None` takes all away.
    pub labels: Option<BTreeMap<String, Option<String>>>,
}

impl PatchBody {
    /// Reads it.
    ///
    /// # Errors
    /// Every rule it breaks; also that it would change something else.
    pub fn parse(value: Value) -> Result<Self, Problems> {
        let Value::Object(map) = value else { return Err(Problems::one("", "must be an object, as {\"labels\": {..}}")) };
        let mut problems = Problems::default();
        let mut body = Self { labels: Some(BTreeMap::new()) };
        for (name, value) in map {
            match (name.as_str(), value) {
                ("labels", Value::Null) => body.labels = None,
                ("labels", value) => {
                    let read = Fields::of(json!({ "labels": value }), "", &mut problems).map(|mut fields| label_patch(&mut fields));
                    body.labels = read.or(body.labels);
                }
                _ => problems.add(format!("/{}", token(&name)), "only labels can be changed"),
            }
        }
        if problems.is_empty() { Ok(body) } else { Err(problems) }
    }
}

/// A node, as the control plane knows it.
#[derive(Debug, Serialize)]
pub struct NodeObject {
    /// Its name here.
    pub id: String,
    /// Where its agent listens.
    pub address: String,
    /// Whether it takes work.
    pub ready: bool,
    /// Why not, or what else is wrong with it.
    pub message: Option<String>,
    /// When its agent last answered.
    pub observed_at: Option<Timestamp>,
    /// Workloads its agent has that are not placed there by this control plane; they are left alone.
    pub strangers: usize,
    /// As the agent describes it; `null` as long as it never answered.
    pub node: Option<Node>,
}

/// All nodes.
#[derive(Debug, Serialize)]
pub struct Nodes {
    /// In the order of their ids.
    pub items: Vec<NodeObject>,
}

/// `GET /version`.
#[derive(Debug, Serialize)]
pub struct Version {
    /// Of the program.
    pub version: &'static str,
    /// Of the HTTP API.
    pub api: &'static str,
    /// The program.
    pub program: &'static str,
}

/// The body of `POST /workloads/{id}/exec`.
#[derive(Debug, PartialEq, Eq)]
pub struct ExecBody {
    /// The command and its arguments.
    pub command: Vec<String>,
    /// How long it may run.
    pub timeout_ms: u64,
}

impl ExecBody {
    /// Reads it.
    ///
    /// # Errors
    /// Every rule it breaks.
    pub fn parse(value: Value) -> Result<Self, Problems> {
        let mut problems = Problems::default();
        let body = Fields::of(value, "", &mut problems).map(|mut fields| {
            let command = fields.texts("command", limits::WORDS_MAX, limits::WORD_BYTES_MAX);
            if command.is_empty() && fields.problems().is_empty() {
                fields.problem("command", "must have at least one word");
            }
            let timeout_ms = fields.integer("timeout_ms", 1, limits::EXEC_MS_MAX).unwrap_or(limits::EXEC_MS_DEFAULT);
            fields.finish();
            Self { command, timeout_ms }
        });
        body.filter(|_| problems.is_empty()).ok_or(problems)
    }
}

/// JSON bytes of one of our own shapes.
pub fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_else(|error| {
        // Our own types have string keys and no floats.
        log::error!("a body cannot be written: {error}");
        b"{}".to_vec()
    })
}

/// The entries of a map of texts as JSON.
pub fn text_map<'a>(entries: impl IntoIterator<Item = (&'a String, &'a String)>) -> Map<String, Value> {
    entries.into_iter().map(|(key, value)| (key.clone(), Value::from(value.as_str()))).collect()
}
