//! The bodies of the HTTP API that are not workloads: problems, lists, nodes, versions.

use serde::Serialize;
use serde_json::{Map, Value};

use super::agent::{Node, Object, ProblemBody};
use super::json::{Fields, Problems};
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
    /// Why not.
    pub message: Option<String>,
    /// When its agent last answered.
    pub observed_at: Option<Timestamp>,
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
