//! Those who follow: one the control plane's `GET /events`, one each agent's `Watch`. They go on from the last revision whenever a
//! daemon was away, and hold it to what a revision promises.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use kakuri::deadline::Timestamp;
use kakuri::wire::agent::{ErrorCode, Reply};
use kakuri::workload::State;
use serde_json::{Value, json};

use super::Storm;
use super::client::read;
use super::tally;
use crate::harness::brief;

/// A reader goes on, and comes back with its revision, after so many events.
const EVENTS: usize = 50;
/// How long a reader waits before it looks whether the storm goes on.
const SLICE_MS: u64 = 250;

/// What a reader was told, and what it may be told next. Pure.
#[derive(Debug, Default)]
pub struct Book {
    /// Of the last event; all up to it was told.
    since: Option<u64>,
    /// The highest ever: a stream that begins anew does not begin behind it.
    highest: u64,
    /// What there is. Of each acceptance, its last state, and how it ended.
    present: BTreeMap<String, (Timestamp, State, Option<String>)>,
    /// Everything there is is being told, under one revision.
    is_replaying: bool,
}

impl Book {
    /// A stream begins: after the last revision, or anew, with everything there is.
    fn begin(&mut self) {
        self.is_replaying = self.since.is_none();
        if self.is_replaying {
            self.present.clear();
        }
    }

    /// What happened since the last revision is not kept any more.
    fn is_gone(&mut self) {
        self.since = None;
    }

    /// All up to this revision was told.
    ///
    /// # Errors
    /// The rule that this breaks.
    fn heartbeat(&mut self, revision: u64) -> Result<(), String> {
        if revision < self.highest || (!self.is_replaying && self.since.is_none_or(|since| revision < since)) {
            return Err(format!("a heartbeat of {revision} after {}", self.highest));
        }
        (self.since, self.highest, self.is_replaying) = (Some(revision), revision, false);
        Ok(())
    }

    /// A change.
    ///
    /// # Errors
    /// The rule that this breaks.
    fn event(&mut self, kind: &str, revision: u64, id: &str, item: &Value) -> Result<(), String> {
        let broken = |rule: &str, was: &dyn std::fmt::Debug| Err(format!("event {revision}, {kind} of {id}: {rule}: {item}; was {was:?}"));
        let (state, status) = read(item)?;
        if revision < self.highest || (revision == self.highest && !self.is_replaying) {
            return broken("a revision that was told before", &self.highest);
        }
        if !self.is_replaying {
            (self.since, self.highest) = (Some(revision), revision);
        }
        let ending = state.is_terminal().then(|| format!("{:?} {:?} {:?}", status.reason, status.exit_code, status.finished_at));
        let was = self.present.get(id).cloned();
        match (kind, &was) {
            ("ADDED", None) => {}
            ("ADDED", Some(was)) => return broken("it was there", was),
            ("MODIFIED" | "DELETED", None) => return broken("it was not there", &""),
            ("MODIFIED" | "DELETED", Some((born, before, end))) => {
                if *born != status.created_at {
                    return broken("another acceptance", &was);
                }
                if end.is_some() && *end != ending {
                    return broken("an end that changed", &was);
                }
                if !before.may_become(state) {
                    return broken("an illegal transition", &was);
                }
            }
            _ => return broken("no such event", &""),
        }
        if kind == "DELETED" {
            self.present.remove(id);
        } else {
            self.present.insert(id.to_owned(), (status.created_at, state, ending));
        }
        Ok(())
    }
}

/// Follows the control plane until the storm is over.
pub fn follow_plane(storm: &Storm, address: SocketAddr) {
    let mut book = Book::default();
    while storm.goes_on() {
        let result = read_events(storm, &mut book, address);
        if let Err(rule) = result {
            storm.violated(&format!("GET /events: {rule}"));
        }
        storm.pause(50);
    }
}

/// A stream of lines, from a daemon that may be killed or paused.
struct Lines {
    socket: TcpStream,
    bytes: Vec<u8>,
}

impl Lines {
    /// Connects and asks; `None` when nobody is there.
    fn ask(address: SocketAddr, request: &str) -> Option<Self> {
        let mut socket = TcpStream::connect(address).ok()?;
        socket.set_read_timeout(Some(Duration::from_millis(SLICE_MS))).ok()?;
        socket.write_all(request.as_bytes()).ok()?;
        Some(Self { socket, bytes: Vec::new() })
    }

    /// The next line without its end; `None` when there is none, or the storm is over.
    fn next(&mut self, storm: &Storm) -> Option<Vec<u8>> {
        let mut chunk = [0; 16 * 1024];
        while storm.goes_on() {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                return Some(line.trim_ascii_end().to_vec());
            }
            match self.socket.read(&mut chunk) {
                Ok(0) => return None,
                Ok(read) => self.bytes.extend_from_slice(&chunk[..read]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => return None,
            }
        }
        None
    }
}

/// Reads one stream to its end, whatever ends it.
fn read_events(storm: &Storm, book: &mut Book, address: SocketAddr) -> Result<(), String> {
    let query = book.since.map_or_else(|| "replay".to_owned(), |since| format!("since={since}"));
    let request = format!("GET /events?{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let Some(mut lines) = Lines::ask(address, &request) else { return Ok(()) };
    let Some(first) = lines.next(storm) else { return Ok(()) };
    let first = String::from_utf8_lossy(&first).into_owned();
    match first.split(' ').nth(1) {
        Some("200") => {}
        Some("410") if book.since.is_some() => {
            book.is_gone();
            return Ok(());
        }
        Some("503") => return Ok(()),
        _ => return Err(format!("{query}: {first}")),
    }
    if book.since.is_some() {
        storm.tally.add(tally::RESUMED);
    }
    book.begin();
    let mut left = EVENTS;
    while let Some(line) = lines.next(storm).filter(|_| left > 0 || book.is_replaying) {
        // Headers, and the framing of chunks, none of which divides a line.
        if !line.starts_with(b"{") {
            continue;
        }
        let line: Value = serde_json::from_slice(&line).map_err(|error| format!("{error}: {}", String::from_utf8_lossy(&line)))?;
        let revision = line["revision"].as_u64().ok_or_else(|| format!("no revision: {line}"))?;
        let (kind, item) = (line["event"].as_str().unwrap_or_default(), &line["object"]);
        match kind {
            "HEARTBEAT" => book.heartbeat(revision)?,
            "STOPPING" => return Ok(()),
            "GONE" => {
                book.is_gone();
                return Ok(());
            }
            _ => {
                left = left.saturating_sub(1);
                storm.tally.add(tally::EVENTS);
                book.event(kind, revision, item["id"].as_str().unwrap_or_default(), item)?;
            }
        }
    }
    Ok(())
}

/// Follows an agent until the storm is over.
pub fn follow_agent(storm: &Storm, address: SocketAddr) {
    let mut book = Book::default();
    while storm.goes_on() {
        if let Err(rule) = read_watch(storm, &mut book, address) {
            storm.violated(&format!("Watch of {address}: {rule}"));
        }
        storm.pause(50);
    }
}

/// Reads one watch to its end, whatever ends it.
fn read_watch(storm: &Storm, book: &mut Book, address: SocketAddr) -> Result<(), String> {
    let request = book.since.map_or_else(|| json!({"type": "Watch"}), |since| json!({"type": "Watch", "since": since}));
    let Some(mut lines) = Lines::ask(address, &format!("{request}\n")) else { return Ok(()) };
    let mut is_begun = false;
    let mut left = EVENTS;
    while let Some(line) = lines.next(storm).filter(|_| left > 0 || book.is_replaying) {
        let reply = Reply::parse(&line).map_err(|error| format!("{error}: {}", String::from_utf8_lossy(&line)))?;
        if !is_begun && matches!(reply, Reply::Event(_) | Reply::Heartbeat { .. }) {
            if book.since.is_some() {
                storm.tally.add(tally::RESUMED);
            }
            book.begin();
            is_begun = true;
        }
        match reply {
            Reply::Event(event) => {
                left = left.saturating_sub(1);
                storm.tally.add(tally::EVENTS);
                let event = serde_json::to_value(&event).map_err(|error| error.to_string())?;
                let (kind, id) = (event["event"].as_str().unwrap_or_default(), event["id"].as_str().unwrap_or_default());
                book.event(kind, event["revision"].as_u64().unwrap_or_default(), id, &event)?;
            }
            Reply::Heartbeat { revision, .. } => book.heartbeat(revision)?,
            Reply::Error(error) if error.code == ErrorCode::NotFound && book.since.is_some() => {
                book.is_gone();
                return Ok(());
            }
            Reply::Error(error) if matches!(error.code, ErrorCode::ResourceExhausted | ErrorCode::Unavailable) => return Ok(()),
            other => return Err(brief(&other)),
        }
    }
    Ok(())
}

mod tests {
    use super::*;
    use kakuri::wire::status::Status;

    #[test]
    fn the_book_finds_what_it_is_there_to_find() {
        let born = Status::accepted(None);
        let item = |state: State, exit_code: Option<i32>| json!({"state": state.as_str(), "status": Status { exit_code, ..born.clone() }});
        let (pending, running) = (item(State::Pending, None), item(State::Running, None));
        let (failed, other) = (item(State::Failed, Some(1)), item(State::Failed, Some(2)));
        let later = json!({"state": "Pending", "status": Status { created_at: born.created_at.plus_ms(1), ..born.clone() }});
        // A replay of one workload at revision 5, and then this.
        let check = |story: &[(&str, u64, &Value)], expect: Option<&str>| {
            let mut book = Book::default();
            book.begin();
            book.event("ADDED", 5, "x", &pending).and_then(|()| book.heartbeat(5)).expect("a replay");
            let result = story.iter().try_for_each(|(kind, revision, item)| match *kind {
                "HEARTBEAT" => book.heartbeat(*revision),
                "anew" => {
                    book.is_gone();
                    book.begin();
                    Ok(())
                }
                kind => book.event(kind, *revision, "x", item),
            });
            match expect {
                None => assert_eq!(result, Ok(()), "{story:?}"),
                Some(rule) => assert!(result.as_ref().is_err_and(|error| error.contains(rule)), "{rule}: {result:?}"),
            }
        };
        let none = Value::Null;
        check(&[("MODIFIED", 6, &running), ("HEARTBEAT", 6, &none), ("MODIFIED", 8, &failed), ("DELETED", 9, &failed)], None);
        check(&[("MODIFIED", 6, &running), ("DELETED", 7, &running), ("ADDED", 8, &later)], None);
        check(&[("MODIFIED", 5, &running)], Some("a revision that was told before"));
        check(&[("MODIFIED", 7, &running), ("MODIFIED", 6, &failed)], Some("a revision that was told before"));
        check(&[("MODIFIED", 7, &running), ("HEARTBEAT", 6, &none)], Some("a heartbeat of 6 after 7"));
        check(&[("ADDED", 6, &pending)], Some("it was there"));
        check(&[("DELETED", 6, &pending), ("MODIFIED", 7, &running)], Some("it was not there"));
        check(&[("MODIFIED", 6, &later)], Some("another acceptance"));
        check(&[("MODIFIED", 6, &failed), ("MODIFIED", 7, &other)], Some("an end that changed"));
        check(&[("MODIFIED", 6, &failed), ("MODIFIED", 7, &running)], Some("an end that changed"));
        check(&[("anew", 0, &none), ("ADDED", 6, &running), ("HEARTBEAT", 6, &none), ("MODIFIED", 7, &failed)], None);
        check(&[("anew", 0, &none), ("ADDED", 4, &running)], Some("a revision that was told before"));
        check(&[("anew", 0, &none), ("HEARTBEAT", 4, &none)], Some("a heartbeat of 4 after 5"));
    }
}
