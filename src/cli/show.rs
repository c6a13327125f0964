//! How JSON from a control plane is read and shown: as it is, as names, or as a table.
//!
//! Invariant: columns are stable; scripts cut them, so a column is only ever added at the end.
//! Invariant: no control character of a peer reaches the terminal, except in logs and the output of `exec`, which are the workload's.

use std::fmt;

use serde_json::Value;

use crate::deadline::Timestamp;
use crate::workload::State;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Json,
    Name,
    Table,
}

impl Output {
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        match text {
            "json" => Ok(Self::Json),
            "name" => Ok(Self::Name),
            "table" => Ok(Self::Table),
            _ => Err("must be json, table or name"),
        }
    }
}

/// A value as one line of text; `-` for nothing.
pub(super) fn text(value: &Value) -> String {
    let plain = match value {
        Value::Null => return "-".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let quiet = |c: char| if c.is_control() { c.escape_default().collect() } else { c.to_string() };
    if plain.is_empty() { "-".into() } else { plain.chars().map(quiet).collect() }
}

/// The text at a JSON pointer.
pub(super) fn at(object: &Value, pointer: &str) -> String {
    object.pointer(pointer).map_or_else(|| "-".into(), text)
}

/// The state of a workload; `None` when it is none this version knows.
pub(super) fn state(workload: &Value) -> Option<State> {
    workload.pointer("/state").and_then(Value::as_str).and_then(State::parse)
}

/// `Failed (ImageNotFound): docker.io/library/x:latest`
pub(super) fn standing(workload: &Value) -> String {
    let mut line = at(workload, "/state");
    let why = reason(workload);
    if why != "-" {
        line.push_str(&format!(" ({why})"));
    }
    let message = at(workload, "/status/message");
    if message != "-" {
        line.push_str(&format!(": {message}"));
    }
    line
}

/// The reason; while it starts, the phase.
fn reason(workload: &Value) -> String {
    let reason = at(workload, "/status/reason");
    if reason == "-" { at(workload, "/status/phase") } else { reason }
}

/// Workloads, one to a row.
pub(super) fn workloads(items: &[Value], output: Output) -> String {
    match output {
        Output::Json => json(&serde_json::json!({ "items": items })),
        Output::Name => names(items),
        Output::Table => {
            let columns = ["ID", "STATE", "REASON", "CLASS", "NODE", "RESTARTS", "EXIT", "AGE", "IMAGE"];
            table(&columns, items.iter().map(|item| row(item).to_vec()))
        }
    }
}

/// An event, a line: revision, time, event, id, state, reason; `None` for what only says that all is quiet.
pub(super) fn event(line: &Value) -> Option<String> {
    if at(line, "/event") == "HEARTBEAT" {
        return None;
    }
    let object = line.pointer("/object").unwrap_or(&Value::Null);
    let words = [at(line, "/revision"), at(line, "/time"), at(line, "/event")];
    let rest = match line.pointer("/detail") {
        Some(detail) => vec![text(detail)],
        None => vec![at(object, "/id"), at(object, "/state"), reason(object)],
    };
    Some(words.into_iter().chain(rest).collect::<Vec<_>>().join("  "))
}

/// One workload: everything people ask about first, a field to a row.
pub(super) fn workload(item: &Value, output: Output) -> String {
    match output {
        Output::Json => json(item),
        Output::Name => at(item, "/id"),
        Output::Table => {
            let [id, state, reason, class, node, restarts, exit, age, image] = row(item);
            let rows = [
                ("id", id),
                ("state", state),
                ("reason", reason),
                ("message", at(item, "/status/message")),
                ("class", class),
                ("node", node),
                ("restarts", restarts),
                ("exit_code", exit),
                ("age", age),
                ("image", image),
                ("memory_mb", at(item, "/memory_mb")),
                ("cpu_millicores", at(item, "/cpu_millicores")),
                ("ip", at(item, "/status/ip")),
                ("handler", at(item, "/status/handler")),
                ("isolation_verified", at(item, "/status/isolation/verified")),
                ("kernel", at(item, "/status/isolation/kernel")),
                ("host_kernel", at(item, "/status/isolation/host_kernel")),
                ("created_at", at(item, "/status/created_at")),
                ("started_at", at(item, "/status/started_at")),
                ("finished_at", at(item, "/status/finished_at")),
                ("observed_at", at(item, "/status/observed_at")),
                ("last_error", at(item, "/status/last_error")),
            ];
            table(&["FIELD", "VALUE"], rows.into_iter().map(|(field, value)| vec![field.to_owned(), value]))
        }
    }
}

fn row(item: &Value) -> [String; 9] {
    [
        at(item, "/id"),
        at(item, "/state"),
        reason(item),
        at(item, "/runtime_class"),
        at(item, "/status/node"),
        at(item, "/status/restarts"),
        at(item, "/status/exit_code"),
        age(item),
        at(item, "/image"),
    ]
}

/// Nodes, one to a row.
pub(super) fn nodes(items: &[Value], output: Output) -> String {
    let used = |item: &Value, what: &str| {
        format!("{}/{}", at(item, &format!("/node/allocated/{what}")), at(item, &format!("/node/capacity/{what}")))
    };
    match output {
        Output::Json => json(&serde_json::json!({ "items": items })),
        Output::Name => names(items),
        Output::Table => table(
            &["ID", "READY", "CLASSES", "MEMORY_MB", "CPU_MILLICORES"],
            items
                .iter()
                .map(|item| vec![name(item), at(item, "/ready"), classes(item), used(item, "memory_mb"), used(item, "cpu_millicores")]),
        ),
    }
}

/// The classes of a node.
fn classes(node: &Value) -> String {
    let listed = node.pointer("/node/runtime_classes").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let names: Vec<String> = listed.iter().map(|class| at(class, "/name")).collect();
    if names.is_empty() { "-".into() } else { names.join(",") }
}

/// Versions of both ends; the server's when it answered.
pub(super) fn versions(server: Option<&Value>, output: Output) -> String {
    let client = env!("CARGO_PKG_VERSION");
    match output {
        Output::Json => json(&serde_json::json!({ "client": { "version": client }, "server": server })),
        Output::Name => client.to_owned(),
        Output::Table => {
            let server = server.map_or_else(|| "-".into(), |server| at(server, "/version"));
            table(
                &["PART", "VERSION"],
                [("client", client.to_owned()), ("server", server)].map(|(part, v)| vec![part.to_owned(), v]).into_iter(),
            )
        }
    }
}

/// JSON for people and for `jq`.
pub(super) fn json(value: &Value) -> String {
    format!("{value:#}")
}

/// The name of a workload or node.
fn name(item: &Value) -> String {
    at(item, "/id")
}

fn names(items: &[Value]) -> String {
    items.iter().map(name).collect::<Vec<_>>().join("\n")
}

fn age(item: &Value) -> String {
    let created = item.pointer("/status/created_at").and_then(Value::as_str).and_then(Timestamp::parse);
    created.map_or_else(|| "-".into(), |created| Age(Timestamp::now().as_millis().saturating_sub(created.as_millis())).to_string())
}

/// Milliseconds in their largest whole unit.
struct Age(u64);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 / 1000 {
            s @ 0..=119 => write!(f, "{s}s"),
            s @ 120..=7199 => write!(f, "{}m", s / 60),
            s @ 7200..=172_799 => write!(f, "{}h", s / 3600),
            s => write!(f, "{}d", s / 86_400),
        }
    }
}

/// Columns as wide as they must be, two spaces between; no blanks at the end of a line.
fn table(columns: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head: Vec<String> = columns.iter().map(|column| (*column).to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let pad = |(cell, width): (&String, &usize)| format!("{cell:<width$}");
    let line = |cells: &Vec<String>| cells.iter().zip(&widths).map(pad).collect::<Vec<_>>().join("  ").trim_end().to_owned();
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_have_stable_columns() {
        let items = [
            json!({"id": "wl-1", "state": "Running", "image": "busybox", "runtime_class": "gvisor",
                "status": {"node": "n", "restarts": 0}}),
            json!({"id": "a-longer-id", "state": "Failed", "image": "x\u{1b}[2J", "status": {"reason": "Error", "exit_code": 3}}),
            json!({"id": "p", "state": "Pending", "status": {"phase": "Pulling"}}),
        ];
        let expect = "\
ID           STATE    REASON   CLASS   NODE  RESTARTS  EXIT  AGE  IMAGE
wl-1         Running  -        gvisor  n     0         -     -    busybox
a-longer-id  Failed   Error    -       -     -         3     -    x\\u{1b}[2J
p            Pending  Pulling  -       -     -         -     -    -";
        assert_eq!(workloads(&items, Output::Table), expect);
        assert_eq!(workloads(&items, Output::Name), "wl-1\na-longer-id\np");
        assert_eq!(workloads(&[], Output::Table), "ID  STATE  REASON  CLASS  NODE  RESTARTS  EXIT  AGE  IMAGE");
        let back: Value = serde_json::from_str(&workloads(&items, Output::Json)).expect("JSON");
        assert_eq!(back.pointer("/items/1/status/exit_code"), Some(&json!(3)));
    }

    #[test]
    fn one_workload_is_shown_with_its_isolation() {
        let item = json!({"id": "a", "state": "Running", "status": {"isolation": {"verified": true, "kernel": "4.4.0"}}});
        let shown = workload(&item, Output::Table);
        assert!(shown.contains("isolation_verified  true\nkernel              4.4.0\n"), "{shown}");
    }

    #[test]
    fn nodes_show_what_they_offer_and_what_is_taken() {
        let items = [json!({"id": "n1", "ready": true, "node": {"runtime_classes": [{"name": "native"}, {"name": "gvisor"}],
            "capacity": {"memory_mb": 100, "cpu_millicores": 2000}, "allocated": {"memory_mb": 10, "cpu_millicores": 0}}})];
        let expect = "ID  READY  CLASSES        MEMORY_MB  CPU_MILLICORES\nn1  true   native,gvisor  10/100     0/2000";
        assert_eq!(nodes(&items, Output::Table), expect);
        assert_eq!(nodes(&items, Output::Name), "n1");
    }

    #[test]
    fn a_standing_is_one_line() {
        let check = |item: Value, expect: &str| assert_eq!(standing(&item), expect);
        check(json!({"state": "Pending", "status": {"phase": "Pulling"}}), "Pending (Pulling)");
        check(json!({"state": "Failed", "status": {"reason": "Error", "message": "exit\ncode 1"}}), "Failed (Error): exit\\ncode 1");
        check(json!({"state": "Running"}), "Running");
        check(json!(null), "-");
    }

    #[test]
    fn ages_are_short() {
        let check = |ms: u64, expect: &str| assert_eq!(Age(ms).to_string(), expect);
        check(0, "0s");
        check(119_999, "119s");
        check(120_000, "2m");
        check(7_200_000, "2h");
        check(172_800_000, "2d");
    }
}
