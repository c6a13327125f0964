//! A workload as the store keeps it: a JSON object, on disk and as a line of an export.
//!
//! An export is a `Store` line, a `Workload` line for each workload and an `End` line that counts them. The values of `env` are in
//! it, as they are in the store.
//!
//! Invariant: what is written here is read back as the same; a line with a field that this version does not know is refused.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::json::{Fields, Problems, parse_within};
use super::status::Status;
use super::workload;
use crate::limits;
use crate::workload::{Desired, Name, State, Workload};

/// A workload, what is wanted of it, and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// What runs.
    pub workload: Arc<Workload>,
    /// Where it is placed.
    pub node: Name,
    /// What clients want of it.
    pub desired: Desired,
    /// Whether its agent answered for it, and did not say since that it knows nothing of it.
    pub is_known: bool,
    /// Whether it was ever seen to run.
    pub has_run: bool,
    /// Whether its agent has yet to be told its labels.
    pub has_new_labels: bool,
    /// Tells it from an earlier or later one with the same id.
    pub born: u64,
    /// Where it stands.
    pub state: State,
    /// The rest of what is known.
    pub status: Status,
}

/// The largest revision that is read: clients hold revisions in doubles, which are exact up to 2^53, and what follows needs room.
pub const REVISION_MAX: u64 = (1 << 53) - (1 << 40);

/// A line of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// The last one.
    End {
        /// How many workloads there were.
        workloads: u64,
    },
    /// The first one.
    Store {
        /// The format of the lines, and of the store.
        format: u64,
        /// No revision above this was ever told to anybody.
        revision: u64,
    },
    /// A workload.
    Workload(Box<Stored>),
}

#[derive(Serialize)]
struct Written<'a> {
    r#type: &'a str,
    workload: Value,
    node: &'a str,
    desired: Desired,
    is_known: bool,
    has_run: bool,
    has_new_labels: bool,
    born: u64,
    state: State,
    status: &'a Status,
}

impl Stored {
    /// Its JSON text, which [`Line::parse`] reads back.
    pub fn to_json(&self) -> String {
        // Destructured, so that a new field breaks the build here.
        let Self { workload, node, desired, is_known, has_run, has_new_labels, born, state, status } = self;
        let line = Written {
            r#type: "Workload",
            workload: workload::to_map(workload).into(),
            node: node.as_str(),
            desired: *desired,
            is_known: *is_known,
            has_run: *has_run,
            has_new_labels: *has_new_labels,
            born: *born,
            state: *state,
            status,
        };
        // Our own types have string keys and no floats; an empty text would be refused when read.
        serde_json::to_string(&line).unwrap_or_default()
    }
}

impl Line {
    /// Its JSON text, without a newline.
    pub fn to_json(&self) -> String {
        match self {
            Self::End { workloads } => json!({"type": "End", "workloads": workloads}).to_string(),
            Self::Store { format, revision } => json!({"type": "Store", "format": format, "revision": revision}).to_string(),
            Self::Workload(stored) => stored.to_json(),
        }
    }

    /// Reads a line.
    ///
    /// # Errors
    /// Every rule it breaks.
    pub fn parse(bytes: &[u8]) -> Result<Self, Problems> {
        let value = parse_within(bytes, limits::STORED_VALUES_MAX)?;
        let mut problems = Problems::default();
        let line = Fields::of(value, "", &mut problems).and_then(|mut fields| {
            let line = read(&mut fields);
            fields.finish();
            line
        });
        line.filter(|_| problems.is_empty()).ok_or(problems)
    }
}

fn read(fields: &mut Fields<'_>) -> Option<Line> {
    let kind = fields.text("type", limits::NAME_BYTES_MAX);
    match fields.required("type", kind)?.as_str() {
        "End" => Some(Line::End { workloads: number(fields, "workloads")? }),
        "Store" => {
            let (format, revision) = (number(fields, "format"), revision(fields, "revision"));
            Some(Line::Store { format: format?, revision: revision? })
        }
        "Workload" => {
            let given = fields.take("workload");
            let given = fields.required("workload", given);
            let workload = given.and_then(|value| workload::complete(value, "/workload", fields.problems()));
            let node = fields.parsed("node", Name::new);
            let node = fields.required("node", node);
            let desired = fields.one_of("desired", Desired::ALL, Desired::as_str);
            let desired = fields.required("desired", desired);
            let state = fields.one_of("state", State::ALL, State::as_str);
            let state = fields.required("state", state);
            let mut flag = |name| {
                let flag = fields.flag(name);
                fields.required(name, flag)
            };
            let (is_known, has_run, has_new_labels) = (flag("is_known"), flag("has_run"), flag("has_new_labels"));
            let born = revision(fields, "born");
            let status = status(fields);
            Some(Line::Workload(Box::new(Stored {
                workload: Arc::new(workload?),
                node: node?,
                desired: desired?,
                is_known: is_known?,
                has_run: has_run?,
                has_new_labels: has_new_labels?,
                born: born?,
                state: state?,
                status: status?,
            })))
        }
        _ => {
            fields.problem("type", "must be one of End, Store, Workload");
            None
        }
    }
}

fn number(fields: &mut Fields<'_>, name: &'static str) -> Option<u64> {
    let number = fields.integer(name, 0, u64::MAX);
    fields.required(name, number)
}

fn revision(fields: &mut Fields<'_>, name: &'static str) -> Option<u64> {
    let number = fields.integer(name, 0, REVISION_MAX);
    fields.required(name, number)
}

/// Everywhere else a status is read leniently. Here a field that is not understood would be lost for good.
fn status(fields: &mut Fields<'_>) -> Option<Status> {
    let given = fields.take("status");
    let given = fields.required("status", given)?;
    match serde_json::from_value::<Status>(given.clone()) {
        Ok(status) if serde_json::to_value(&status).is_ok_and(|read| covers(&read, &given)) => return Some(status),
        Ok(_) => fields.problem("status", "has fields or words that this version does not know"),
        Err(error) => fields.problem("status", format!("is no status: {error}")),
    }
    None
}

/// Whether nothing of `given` is lost in `read`, which may have more.
fn covers(read: &Value, given: &Value) -> bool {
    match (read, given) {
        (Value::Object(read), Value::Object(given)) => {
            given.iter().all(|(key, value)| read.get(key).is_some_and(|inner| covers(inner, value)))
        }
        _ => read == given,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::json::parse;

    fn stored() -> Stored {
        let body = br#"{"id":"a","image":"busybox","runtime_class":"gvisor","env":{"PASSWORD":"x"},"labels":{"app":"web"}}"#;
        let mut problems = Problems::default();
        let workload = workload::complete(parse(body).expect("JSON"), "", &mut problems).expect("a workload");
        Stored {
            workload: Arc::new(workload),
            node: Name::new("node-1").expect("a name"),
            desired: Desired::Stopped,
            is_known: true,
            has_run: false,
            has_new_labels: true,
            born: REVISION_MAX,
            state: State::Running,
            status: Status::accepted(Some("node-1".into())),
        }
    }

    #[test]
    fn lines_are_read_as_they_were_written() {
        for line in [Line::Store { format: 1, revision: 9 }, Line::Workload(Box::new(stored())), Line::End { workloads: 1 }] {
            assert_eq!(Line::parse(line.to_json().as_bytes()), Ok(line));
        }
    }

    #[test]
    fn what_would_be_lost_or_is_wrong_is_refused() {
        let text = stored().to_json();
        let check = |from: &str, to: &str, expect: &str| {
            assert!(text.contains(from), "{text}");
            let error = Line::parse(text.replacen(from, to, 1).as_bytes()).expect_err(to).to_string();
            assert!(error.contains(expect), "{error}");
        };
        check("\"born\"", "\"borm\"", "/born: is required; /borm: unknown field; did you mean born?");
        check("\"oom_killed\":false", "\"oom_killed\":false,\"new\":1", "/status: has fields");
        check("\"oom_killed\":false", "\"oom_killed\":3", "/status: is no status");
        check("\"reason\":null", "\"reason\":\"Preempted\"", "/status: has fields or words");
        check("\"phase\":null", "\"phase\":\"Migrating\"", "/status: has fields or words");
        let born = |number: u64| format!("\"born\":{number}");
        check(&born(REVISION_MAX), &born(REVISION_MAX + 1), "/born: must be");
        check("\"image\"", "\"imago\"", "/workload/image: is required");
        check("\"Stopped\"", "\"stopped\"", "/desired: must be one of Deleted, Run, Stopped");
        check("\"type\":\"Workload\"", "\"type\":\"Else\"", "/type: must be one of End, Store, Workload");
        check("}", "", "not JSON");
        let store = Line::Store { format: 1, revision: u64::MAX }.to_json();
        assert!(Line::parse(store.as_bytes()).is_err_and(|problems| problems.to_string().contains("/revision: must be")));
    }
}
