//! Clients: each has workloads of its own, does to them what the dice say, and holds the daemons to every word.
//!
//! An answer that did not come leaves a request of unknown fate, which a daemon that was paused may still carry out later. So an id
//! with such a request is never used for another workload ("loose"); what was acknowledged of it counts all the same.

use std::io::ErrorKind;
use std::net::SocketAddr;

use kakuri::deadline::Timestamp;
use kakuri::net::Address;
use kakuri::wire::agent::{ErrorCode, ErrorReply, LogLine, Reply};
use kakuri::wire::status::Status;
use kakuri::workload::State;
use serde_json::{Value, json};

use super::Storm;
use super::model::{Fate, Meddling, Told, Wish, check_each_line, check_lines, check_lines_left, is_restarting};
use super::tally;
use crate::harness::dice::Dice;
use crate::harness::http::Answer;
use crate::harness::{Http, Line, brief};

/// Workloads a client has at a time.
const SLOTS: usize = 4;
/// Longer than any daemon is paused or gone, and than any answer may take.
const PATIENT_MS: u64 = 40_000;
const IMPATIENT_MS: u64 = 250;

/// What a client knows of the existence of its workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Nobody accepted it, or it was seen to be gone.
    Absent,
    /// It was asked for, and no answer came.
    Asked,
    /// It was accepted.
    Present,
    /// Its deletion was asked for.
    Leaving { is_accepted: bool },
}

/// One id.
#[derive(Clone, Debug)]
pub struct Slot {
    pub id: String,
    pub wish: Wish,
    pub presence: Presence,
    pub told: Told,
    pub meddling: Meddling,
    /// The agent it is asked of; `None`: the control plane.
    pub home: Option<usize>,
    /// A request of it has an unknown fate.
    is_loose: bool,
    /// One of those would accept it, and may yet.
    is_late: bool,
    /// The acceptance of this moment is to end: its stop was acknowledged.
    must_end: Option<Timestamp>,
    /// What is to end is left alone until it has. A delete would hide that it never does.
    is_patient: bool,
    /// When the request was sent whose answer was noted last.
    asked_ms: u64,
    now_ms: u64,
    /// The control plane was killed since: what its agents said last may not have been on its disk, and it tells the truth before
    /// that, with its age, until they say it again.
    may_be_older: bool,
    /// How many acceptances it may have had.
    pub lives: usize,
    /// How many containers one of them may have run.
    pub runs_max: usize,
}

/// Who acts.
pub struct Client<'a> {
    storm: &'a Storm,
    name: String,
    dice: Dice,
    front: Front,
    /// The agent it speaks with.
    home: Option<usize>,
    /// Nodes that may be asked for by name.
    nodes: Vec<String>,
    slots: Vec<Slot>,
    /// Ids that are not used any more.
    pub retired: Vec<Slot>,
    ids: usize,
}

enum Front {
    Http(SocketAddr),
    Line { address: Address, line: Option<Line> },
}

/// What came of a request.
enum Outcome {
    Said(State, Box<Status>),
    /// It is not there.
    NotThere,
    Accepted,
    /// It will be done.
    Begun,
    /// It is there in other words, or may not be there yet again.
    Conflict(String),
    /// No, and nothing was done.
    Refused,
    Silence,
}

impl<'a> Client<'a> {
    /// One that speaks with the control plane.
    pub fn http(storm: &'a Storm, name: String, dice: Dice, address: SocketAddr, nodes: Vec<String>) -> Self {
        Self::new(storm, name, dice, Front::Http(address), None, nodes)
    }

    /// One that speaks with an agent, the one of this number.
    pub fn line(storm: &'a Storm, name: String, dice: Dice, home: usize, address: Address) -> Self {
        Self::new(storm, name, dice, Front::Line { address, line: None }, Some(home), Vec::new())
    }

    fn new(storm: &'a Storm, name: String, dice: Dice, front: Front, home: Option<usize>, nodes: Vec<String>) -> Self {
        let mut client = Self { storm, name, dice, front, home, nodes, slots: Vec::new(), retired: Vec::new(), ids: 0 };
        for _ in 0..SLOTS {
            let slot = client.new_slot();
            client.slots.push(slot);
        }
        client
    }

    fn new_slot(&mut self) -> Slot {
        self.ids += 1;
        let policy = if self.dice.below(6) == 0 { "r" } else { "" };
        let id = format!("{}-{}{policy}", self.name, self.ids);
        let wish = Wish::any(&mut self.dice, &id, &self.nodes, self.storm.on_lab);
        let meddling = Meddling { is_real: self.storm.on_lab, ..Meddling::default() };
        Slot { meddling, home: self.home, is_patient: self.ids % 2 == 0, ..Slot::new(id, wish) }
    }

    /// Acts until the storm is over; all ids it ever used.
    pub fn run(mut self) -> Vec<Slot> {
        while self.storm.goes_on() {
            let at = self.dice.below(self.slots.len());
            let mut slot = self.slots[at].clone();
            let result = self.act(&mut slot);
            self.slots[at] = slot;
            if let Err(rule) = result {
                self.storm.violated(&format!("{}: {rule}", self.slots[at].id));
            }
            if self.slots[at].is_spent() {
                let fresh = self.new_slot();
                self.retired.push(std::mem::replace(&mut self.slots[at], fresh));
            }
            self.storm.pause(self.dice.below(if self.storm.on_lab { 150 } else { 25 }));
        }
        self.retired.append(&mut self.slots);
        self.retired
    }

    fn act(&mut self, slot: &mut Slot) -> Result<(), String> {
        slot.meddling.is_harmed = self.storm.is_harmed(&slot.id);
        slot.may_be_older = matches!(self.front, Front::Http(_)) && slot.asked_ms <= self.storm.plane_killed_ms();
        slot.now_ms = self.storm.now_ms();
        let is_over = slot.told.state().is_some_and(State::is_terminal);
        let is_left_alone = slot.is_patient && !is_over && (slot.wish.fate.is_mortal() || slot.must_end.is_some());
        match (slot.presence, self.dice.below(20)) {
            (Presence::Absent, 0..=3) => self.get(slot),
            (Presence::Absent, _) => self.post(slot),
            (Presence::Asked, 0..=11) => self.post(slot),
            (Presence::Asked, 12..=16) => self.get(slot),
            (Presence::Asked, _) => self.delete(slot),
            (Presence::Present, 0..=7) => self.get(slot),
            (Presence::Present, 8..=9) => self.post(slot),
            (Presence::Present, 10) => self.post_other(slot),
            (Presence::Present, 11..=12) => self.list(),
            (Presence::Present, 13..=14) => self.logs(slot),
            (Presence::Present, 15) => self.exec(slot),
            (Presence::Present, 16 | 17) if is_left_alone => self.get(slot),
            (Presence::Present, 16) => self.stop(slot),
            (Presence::Present, 17) => self.delete(slot),
            (Presence::Present, _) if is_over => self.delete(slot),
            (Presence::Present, _) => self.wait(slot),
            (Presence::Leaving { .. }, 0..=9) => self.get(slot),
            (Presence::Leaving { .. }, 10..=14) => self.delete(slot),
            (Presence::Leaving { .. }, 15..=17) => self.post(slot),
            (Presence::Leaving { .. }, _) => self.list(),
        }
    }

    fn patience(&mut self) -> u64 {
        if self.dice.below(8) == 0 { IMPATIENT_MS } else { PATIENT_MS }
    }

    fn post(&mut self, slot: &mut Slot) -> Result<(), String> {
        if slot.presence == Presence::Absent && slot.lives > 0 {
            slot.wish = Wish::any(&mut self.dice, &slot.id, &self.nodes, self.storm.on_lab);
        }
        slot.runs_max = slot.runs_max.max(slot.wish.fate.runs_max());
        let wait_ms = [0, 0, 50, 2000][self.dice.below(4)];
        let (outcome, is_new) = self.send_start(slot, &slot.wish.spec.clone(), wait_ms);
        match (outcome, slot.presence) {
            (Outcome::Said(state, status), was) => {
                // The line protocol does not say whether it was there; the moment of the acceptance does.
                let before = slot.told.created_at().filter(|_| !slot.is_loose);
                let is_new = is_new.or(before.map(|before| before != status.created_at));
                match (was, is_new) {
                    (Presence::Present, Some(true)) => return Err("lost: an accepted workload was accepted again".into()),
                    (Presence::Absent, Some(false)) if !slot.is_loose => return Err("nobody asked for it, and it is there".into()),
                    (Presence::Leaving { is_accepted: true }, Some(false)) if !slot.is_loose => {
                        return Err("its deletion was accepted, and it is there as if not".into());
                    }
                    (Presence::Leaving { .. }, Some(false)) => return slot.note(self.storm, state, *status),
                    (Presence::Leaving { .. }, _) => {
                        slot.lives += 1;
                        (slot.told, slot.must_end, slot.meddling.is_stopped) = (Told::default(), None, slot.is_loose);
                    }
                    (Presence::Absent, _) => {
                        slot.lives += 1;
                        (slot.told, slot.must_end, slot.meddling.is_stopped) = (Told::default(), None, false);
                    }
                    // The silent one before it may yet be another.
                    (Presence::Asked, _) => slot.lives += 1,
                    (Presence::Present, _) => {}
                }
                if was != Presence::Present {
                    self.storm.tally.add(tally::ACCEPTED);
                }
                slot.presence = Presence::Present;
                slot.note(self.storm, state, *status)
            }
            (Outcome::Conflict(code), Presence::Leaving { .. }) if code == "workload_deleting" || code == "Unavailable" => Ok(()),
            (Outcome::Conflict(code), _) => Err(format!("POST of what is there in the same words: {code}")),
            (Outcome::Silence, was) => {
                slot.lives += 1;
                (slot.is_loose, slot.is_late) = (true, true);
                if was == Presence::Absent {
                    (slot.presence, slot.told, slot.meddling.is_stopped) = (Presence::Asked, Told::default(), false);
                }
                Ok(())
            }
            (Outcome::Refused, _) => Ok(()),
            (Outcome::NotThere | Outcome::Accepted | Outcome::Begun, _) => Err("no answer to a POST".into()),
        }
    }

    fn post_other(&mut self, slot: &mut Slot) -> Result<(), String> {
        match self.send_start(slot, &slot.wish.other(), 0).0 {
            Outcome::Said(state, _) => Err(format!("another workload of its id was accepted: {state}")),
            Outcome::Conflict(code) if code == "workload_exists" || code == "AlreadyExists" => Ok(()),
            Outcome::Conflict(code) => Err(format!("POST of another workload of its id: {code}")),
            Outcome::Silence => {
                // It will be refused as well, unless it comes behind a delete.
                slot.lives += 1;
                (slot.is_loose, slot.is_late) = (true, true);
                Ok(())
            }
            Outcome::Refused => Ok(()),
            Outcome::NotThere | Outcome::Accepted | Outcome::Begun => Err("no answer to a POST".into()),
        }
    }

    fn get(&mut self, slot: &mut Slot) -> Result<(), String> {
        self.get_until(slot, "")
    }

    fn wait(&mut self, slot: &mut Slot) -> Result<(), String> {
        let until = ["running", "terminal"][self.dice.below(2)];
        let ms = self.dice.below(1500);
        self.get_until(slot, &format!("?for={until}&wait_ms={ms}"))
    }

    fn get_until(&mut self, slot: &mut Slot, query: &str) -> Result<(), String> {
        let outcome = match &self.front {
            Front::Http(_) => self.http_outcome("GET", &format!("/workloads/{}{query}", slot.id), ""),
            Front::Line { .. } => self.line_outcome(&json!({"type": "GetStatus", "id": slot.id})),
        };
        match (outcome, slot.presence) {
            (Outcome::Said(..), Presence::Absent) => Err("it is gone, or never was, and is there".into()),
            // It may still be refused by its node.
            (Outcome::Said(..), Presence::Asked) => Ok(()),
            (Outcome::Said(state, status), Presence::Present | Presence::Leaving { .. }) => slot.note(self.storm, state, *status),
            (Outcome::NotThere, presence) => self.not_there(slot, presence, "GET"),
            (Outcome::Accepted | Outcome::Begun | Outcome::Conflict(_), _) => Err("no answer to a GET".into()),
            (Outcome::Refused | Outcome::Silence, _) => Ok(()),
        }
    }

    fn not_there(&self, slot: &mut Slot, presence: Presence, what: &str) -> Result<(), String> {
        match presence {
            Presence::Present => Err(format!("lost: {what} of an accepted workload says that it is not there")),
            Presence::Leaving { .. } => {
                slot.presence = Presence::Absent;
                slot.told = Told::default();
                Ok(())
            }
            Presence::Absent | Presence::Asked => Ok(()),
        }
    }

    fn stop(&mut self, slot: &mut Slot) -> Result<(), String> {
        slot.meddling.is_stopped = true;
        let outcome = match &self.front {
            Front::Http(_) => self.http_outcome("POST", &format!("/workloads/{}/stop", slot.id), ""),
            Front::Line { .. } => self.line_outcome(&json!({"type": "StopWorkload", "id": slot.id})),
        };
        match outcome {
            Outcome::Said(state, status) => {
                slot.must_end = Some(status.created_at);
                slot.note(self.storm, state, *status)
            }
            Outcome::NotThere => self.not_there(slot, slot.presence, "stop"),
            Outcome::Silence => {
                slot.is_loose = true;
                Ok(())
            }
            Outcome::Refused => Ok(()),
            Outcome::Accepted | Outcome::Begun => Err("no answer to a stop".into()),
            Outcome::Conflict(code) => Err(format!("stop: {code}")),
        }
    }

    fn delete(&mut self, slot: &mut Slot) -> Result<(), String> {
        slot.meddling.is_stopped = true;
        let outcome = match &self.front {
            Front::Http(_) => self.http_outcome("DELETE", &format!("/workloads/{}", slot.id), ""),
            Front::Line { .. } => {
                let wait_ms = self.dice.below(300);
                self.line_outcome(&json!({"type": "DeleteWorkload", "id": slot.id, "wait_ms": wait_ms}))
            }
        };
        match outcome {
            Outcome::Said(state, status) if matches!(self.front, Front::Http(_)) => {
                slot.presence = Presence::Leaving { is_accepted: true };
                slot.note(self.storm, state, *status)
            }
            // Deleted: it is gone already.
            Outcome::Accepted => {
                (slot.presence, slot.told) = (Presence::Absent, Told::default());
                Ok(())
            }
            Outcome::NotThere => self.not_there(slot, slot.presence, "DELETE"),
            Outcome::Silence => {
                slot.is_loose = true;
                if !matches!(slot.presence, Presence::Leaving { .. }) {
                    slot.presence = Presence::Leaving { is_accepted: false };
                }
                Ok(())
            }
            Outcome::Begun => {
                slot.presence = Presence::Leaving { is_accepted: true };
                Ok(())
            }
            Outcome::Refused => Ok(()),
            Outcome::Said(..) | Outcome::Conflict(_) => Err("no answer to a DELETE".into()),
        }
    }

    /// The list has all that is mine, and nothing that is gone.
    fn list(&mut self) -> Result<(), String> {
        let now_ms = self.storm.now_ms();
        let Some(items) = self.items() else {
            self.storm.tally.add(tally::REFUSED);
            return Ok(());
        };
        self.storm.count();
        for slot in &mut self.slots {
            slot.meddling.is_harmed = self.storm.is_harmed(&slot.id);
            slot.may_be_older = matches!(self.front, Front::Http(_)) && slot.asked_ms <= self.storm.plane_killed_ms();
            slot.now_ms = now_ms;
            let item = items.iter().find(|item| item["id"] == slot.id.as_str());
            match (slot.presence, item) {
                (Presence::Present, None) => {
                    return Err(format!("lost: accepted {} is not in the list", slot.id));
                }
                (Presence::Absent, Some(item)) if !slot.is_loose => return Err(format!("gone, and in the list: {item}")),
                (Presence::Present, Some(item)) => {
                    let (state, status) = read(item)?;
                    slot.note(self.storm, state, status).map_err(|rule| format!("{}: {rule}", slot.id))?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn items(&mut self) -> Option<Vec<Value>> {
        let mut all = Vec::new();
        let mut after = String::new();
        loop {
            let page = match &self.front {
                Front::Http(address) => {
                    let answer = Http::attempt(*address, "GET", &format!("/workloads?limit=100{after}"), "", PATIENT_MS).ok()?;
                    self.storm.write(&format!("{} list {}", self.name, answer.status));
                    if answer.status != 200 {
                        return None;
                    }
                    answer.json()
                }
                Front::Line { .. } => match self.ask(&json!({"type": "ListWorkloads"}))? {
                    Reply::Workloads { workloads, .. } => json!({"items": workloads, "continue": null}),
                    _ => return None,
                },
            };
            all.extend(page["items"].as_array().cloned().unwrap_or_default());
            match page["continue"].as_str() {
                Some(token) => after = format!("&continue={token}"),
                None => return Some(all),
            }
        }
    }

    fn logs(&mut self, slot: &mut Slot) -> Result<(), String> {
        let is_complete = slot.told.state() == Some(State::Succeeded);
        let lines = match &self.front {
            Front::Http(address) => {
                let answer = Http::attempt(*address, "GET", &format!("/workloads/{}/logs", slot.id), "", PATIENT_MS);
                let Some(answer) = self.passed_on(slot, "logs", answer)? else { return Ok(()) };
                answer.text().lines().map(str::to_owned).collect()
            }
            Front::Line { .. } => {
                let Some(lines) = self.log_lines(slot)? else { return Ok(()) };
                lines.into_iter().map(|l| l.line).collect::<Vec<String>>()
            }
        };
        self.storm.count();
        self.storm.write(&format!("{} logs {} lines", slot.id, lines.len()));
        let all = || lines.iter().map(String::as_str);
        let wrong = |rule| format!("logs: {rule}: {lines:?}");
        if is_restarting(&slot.id) {
            return check_each_line(&lines).map_err(wrong);
        }
        if self.storm.on_lab {
            // A containerd that is killed takes with it what it had read and not written.
            return check_lines_left(all()).map_err(wrong);
        }
        let count = check_lines(all()).map_err(wrong)?;
        if is_complete && count < super::model::LINES && !slot.meddling.is_harmed {
            return Err(format!("logs: it succeeded, and {count} lines are all there is: {lines:?}"));
        }
        Ok(())
    }

    /// The answer to a request that the control plane passes on to an agent; `None` when there is none, for a reason that may be.
    fn passed_on(&self, slot: &mut Slot, what: &str, answer: std::io::Result<Answer>) -> Result<Option<Answer>, String> {
        let Ok(answer) = answer else {
            self.storm.tally.add(tally::UNANSWERED);
            return Ok(None);
        };
        match (answer.status, problem_code(&answer).as_str()) {
            (200, _) => return Ok(Some(answer)),
            (404, "not_found") => self.not_there(slot, slot.presence, what)?,
            // It has yet to hear of it, or will not any more. What ran there it knows until it is deleted.
            (404, "unknown_to_node") if !slot.told.has_run() || slot.is_loose => {}
            // Ended, or never ran; the rule of a node is that its runtime refused.
            (409, "not_running") | (422, "node_rule") if what == "exec" => {}
            (429 | 503 | 504, _) => {
                self.storm.tally.add(tally::REFUSED);
                return Ok(None);
            }
            (status, _) => return Err(format!("{what}: {status} {}", answer.text())),
        }
        self.storm.count();
        Ok(None)
    }

    /// As above, of an agent itself.
    fn refused(&self, slot: &mut Slot, what: &str, error: &ErrorReply) -> Result<(), String> {
        match error.code {
            ErrorCode::NotFound => self.not_there(slot, slot.presence, what)?,
            ErrorCode::InvalidArgument if what == "exec" => {}
            ErrorCode::DeadlineExceeded | ErrorCode::ResourceExhausted | ErrorCode::Unavailable => {
                self.storm.tally.add(tally::REFUSED);
                return Ok(());
            }
            code => return Err(format!("{what}: {code:?} {}", error.message)),
        }
        self.storm.count();
        Ok(())
    }

    fn log_lines(&mut self, slot: &mut Slot) -> Result<Option<Vec<LogLine>>, String> {
        let mut reply = self.ask(&json!({"type": "GetLogs", "id": slot.id}));
        let mut lines = Vec::new();
        loop {
            match reply {
                Some(Reply::Log(line)) => lines.push(line),
                Some(Reply::LogEnd { gap: false, .. }) if lines.iter().all(|line| !line.gap) => return Ok(Some(lines)),
                Some(Reply::LogEnd { .. }) => return Err(format!("logs: a gap that nobody made: {lines:?}")),
                Some(Reply::Heartbeat { .. }) => {}
                Some(Reply::Error(error)) => return self.refused(slot, "logs", &error).map(|()| None),
                Some(other) => return Err(format!("logs: {}", brief(&other))),
                None => {
                    self.storm.tally.add(tally::UNANSWERED);
                    return Ok(None);
                }
            }
            let Front::Line { line, .. } = &mut self.front else { return Ok(None) };
            reply = line.as_mut().and_then(Line::attempt);
            if reply.is_none() {
                *line = None;
            }
        }
    }

    fn exec(&mut self, slot: &mut Slot) -> Result<(), String> {
        let mut request = json!({"command": ["echo", "hello"], "timeout_ms": 2000});
        let (exit_code, stdout) = match &self.front {
            Front::Http(address) => {
                let target = format!("/workloads/{}/exec", slot.id);
                let answer = Http::attempt(*address, "POST", &target, &request.to_string(), PATIENT_MS);
                let Some(answer) = self.passed_on(slot, "exec", answer)? else { return Ok(()) };
                let result = answer.json();
                (result["exit_code"].as_i64(), result["stdout"].as_str().unwrap_or_default().to_owned())
            }
            Front::Line { .. } => {
                (request["type"], request["id"]) = ("Exec".into(), slot.id.as_str().into());
                match self.ask(&request) {
                    Some(Reply::ExecResult(result)) => (Some(result.exit_code.into()), result.stdout),
                    Some(Reply::Error(error)) => return self.refused(slot, "exec", &error),
                    Some(other) => return Err(format!("exec: {}", brief(&other))),
                    None => {
                        self.storm.tally.add(tally::UNANSWERED);
                        return Ok(());
                    }
                }
            }
        };
        self.storm.count();
        match (exit_code, stdout.as_str()) {
            (Some(0), "hello\n") => Ok(()),
            // The end of the workload is the end of all that runs in it.
            (Some(137 | 143), _) => Ok(()),
            (code, said) => Err(format!("exec: exit code {code:?}, {said:?}")),
        }
    }

    /// Asks for a workload; and whether it was new, where the answer says.
    fn send_start(&mut self, slot: &Slot, spec: &Value, wait_ms: u64) -> (Outcome, Option<bool>) {
        let target = format!("/workloads?wait_ms={wait_ms}");
        match &self.front {
            Front::Http(address) => {
                let (address, ms) = (*address, self.patience());
                let answer = Http::attempt(address, "POST", &target, &spec.to_string(), ms);
                self.log("POST", &slot.id, answer.as_ref());
                let answer = match answer {
                    Ok(answer) => answer,
                    Err(error) => return (self.counted(no_answer(&error)), None),
                };
                let is_new = (answer.status == 201).then_some(true).or((answer.status == 200).then_some(false));
                (self.judge("POST", &target, &answer), is_new)
            }
            Front::Line { .. } => (self.line_outcome(&json!({"type": "StartWorkload", "workload": spec, "wait_ms": wait_ms})), None),
        }
    }

    fn http_outcome(&mut self, method: &str, target: &str, body: &str) -> Outcome {
        let Front::Http(address) = self.front else { return Outcome::Silence };
        let ms = self.patience();
        let answer = Http::attempt(address, method, target, body, ms);
        self.log(method, target, answer.as_ref());
        match answer {
            Ok(answer) => self.judge(method, target, &answer),
            Err(error) => self.counted(no_answer(&error)),
        }
    }

    /// Only what was answered, and not refused, is an operation.
    fn counted(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Refused => self.storm.tally.add(tally::REFUSED),
            Outcome::Silence => self.storm.tally.add(tally::UNANSWERED),
            Outcome::Said(..) | Outcome::NotThere | Outcome::Accepted | Outcome::Begun | Outcome::Conflict(_) => self.storm.count(),
        }
        outcome
    }

    fn log(&self, method: &str, what: &str, answer: Result<&Answer, &std::io::Error>) {
        let said = answer.map_or_else(
            |error| format!("- {error}"),
            |answer| format!("{} {}", answer.status, if answer.status < 400 { summary(&answer.json()) } else { answer.text().to_owned() }),
        );
        self.storm.write(&format!("{method} {what}: {said}"));
    }

    fn judge(&self, method: &str, target: &str, answer: &Answer) -> Outcome {
        let outcome = match answer.status {
            200..=202 => match read(&answer.json()) {
                Ok((state, status)) => Outcome::Said(state, Box::new(status)),
                Err(error) => {
                    self.storm.violated(&format!("{method} {target}: {error}"));
                    Outcome::Silence
                }
            },
            404 if answer.problem().1 == "not_found" => Outcome::NotThere,
            409 => Outcome::Conflict(answer.problem().1),
            // Whether it is done, or will be, nobody knows.
            504 if problem_code(answer) == "outcome_unknown" => Outcome::Silence,
            429 | 503 | 504 | 507 => Outcome::Refused,
            _ => {
                self.storm.violated(&format!("{method} {target}: {} {}", answer.status, answer.text()));
                Outcome::Silence
            }
        };
        self.counted(outcome)
    }

    /// Whether there is a connection to the agent. One that is being started again refuses them for a moment.
    fn is_connected(&mut self) -> bool {
        let Front::Line { address, line, .. } = &mut self.front else { return false };
        if line.is_none() {
            *line = Line::try_connect(address).ok();
        }
        line.is_some()
    }

    /// One request to the agent; `None` when it was not there to answer.
    fn ask(&mut self, request: &Value) -> Option<Reply> {
        self.is_connected();
        let Front::Line { line, .. } = &mut self.front else { return None };
        let reply = line.as_mut().and_then(|line| line.try_send(format!("{request}\n").as_bytes()).ok().and_then(|()| line.attempt()));
        if reply.is_none() {
            *line = None;
        }
        reply
    }

    fn line_outcome(&mut self, request: &Value) -> Outcome {
        if !self.is_connected() {
            // It was not sent.
            return self.counted(Outcome::Refused);
        }
        let reply = self.ask(request);
        let id = request["id"].as_str().or(request["workload"]["id"].as_str()).unwrap_or_default().to_owned();
        let kind = request["type"].as_str().unwrap_or_default();
        self.storm.write(&format!("{kind} {id}: {}", reply.as_ref().map_or("-".into(), said)));
        let outcome = match reply {
            None => Outcome::Silence,
            Some(Reply::Status { state, status, .. }) => Outcome::Said(state, status),
            Some(Reply::Deleted { .. }) => Outcome::Accepted,
            Some(Reply::Error(error)) => match error.code {
                ErrorCode::NotFound => Outcome::NotThere,
                ErrorCode::AlreadyExists => Outcome::Conflict("AlreadyExists".into()),
                ErrorCode::Unavailable if error.message.contains("still being deleted") => Outcome::Conflict("Unavailable".into()),
                // "Not gone yet; it will be".
                ErrorCode::DeadlineExceeded if kind == "DeleteWorkload" => Outcome::Begun,
                // Its journal did not take what may be done all the same; a start it takes back.
                ErrorCode::ResourceExhausted if kind != "StartWorkload" => Outcome::Silence,
                ErrorCode::ResourceExhausted | ErrorCode::Unavailable => Outcome::Refused,
                code => {
                    self.storm.violated(&format!("{request}: {code:?} {}", error.message));
                    Outcome::Refused
                }
            },
            Some(other) => {
                self.storm.violated(&format!("{request}: {}", brief(&other)));
                Outcome::Refused
            }
        };
        self.counted(outcome)
    }
}

impl Slot {
    /// One that nobody asked for yet.
    pub fn new(id: String, wish: Wish) -> Self {
        Self {
            id,
            wish,
            presence: Presence::Absent,
            told: Told::default(),
            meddling: Meddling::default(),
            home: None,
            is_loose: false,
            is_late: false,
            must_end: None,
            is_patient: false,
            asked_ms: 0,
            now_ms: 0,
            may_be_older: false,
            lives: 0,
            runs_max: 0,
        }
    }

    /// One that was accepted, for a canary.
    pub fn sample(id: &str, home: Option<usize>, presence: Presence, fate: Fate) -> Self {
        Self { home, presence, lives: 1, runs_max: fate.runs_max(), ..Self::new(id.to_owned(), Wish { spec: json!({"id": id}), fate }) }
    }

    /// The same, after its stop was acknowledged.
    pub fn stopped(self, created_at: Timestamp) -> Self {
        Self { must_end: Some(created_at), meddling: Meddling { is_stopped: true, ..self.meddling }, ..self }
    }

    /// Whether what this is said of has to end, be it that nobody does anything more about it.
    pub fn is_to_end(&self, status: &Status) -> bool {
        self.must_end == Some(status.created_at) || self.wish.fate.is_mortal()
    }

    /// Notes what is said of it when all agree: the last word.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub fn close(&mut self, storm: &Storm, state: State, status: Status) -> Result<(), String> {
        self.may_be_older = false;
        self.note(storm, state, status)
    }

    fn note(&mut self, storm: &Storm, state: State, status: Status) -> Result<(), String> {
        // It may have come to harm while the request was under way.
        self.meddling.is_harmed = storm.is_harmed(&self.id);
        if self.is_loose && self.told.created_at().is_some_and(|before| before != status.created_at) {
            // A request that was not answered was carried out, and this is another life.
            self.told = Told::default();
        }
        if self.may_be_older && self.told.is_newer_than(&status) {
            return Ok(());
        }
        self.asked_ms = self.now_ms;
        let (had_run, was_over) = (self.told.has_run(), self.told.state().is_some_and(State::is_terminal));
        let is_met = state.is_terminal() && self.wish.fate.is_met(&status);
        self.told.note(self.wish.fate, self.meddling, state, status)?;
        if !had_run && self.told.has_run() {
            storm.tally.add(tally::RAN);
        }
        if !was_over && is_met {
            storm.tally.add(tally::MET);
        }
        Ok(())
    }

    /// Whether a request that was not answered may yet accept it.
    pub fn is_late(&self) -> bool {
        self.is_late
    }

    /// It is gone, and its id cannot be used again.
    fn is_spent(&self) -> bool {
        self.presence == Presence::Absent && self.is_loose
    }
}

/// What came of a request without an answer: one that did not even find anybody to connect to was not sent.
fn no_answer(error: &std::io::Error) -> Outcome {
    if error.kind() == ErrorKind::ConnectionRefused { Outcome::Refused } else { Outcome::Silence }
}

/// The code of a problem; none of an answer that is none.
fn problem_code(answer: &Answer) -> String {
    let body: Option<Value> = serde_json::from_slice(&answer.body).ok();
    body.and_then(|body| body["code"].as_str().map(str::to_owned)).unwrap_or_default()
}

/// State and status of a workload in an answer.
pub fn read(object: &Value) -> Result<(State, Status), String> {
    let state = object["state"].as_str().and_then(State::parse).ok_or_else(|| format!("no state in {object}"))?;
    let status = serde_json::from_value(object["status"].clone()).map_err(|error| format!("{error}: {object}"))?;
    Ok((state, status))
}

/// A reply, for the history.
fn said(reply: &Reply) -> String {
    match reply {
        Reply::Status { state, status, .. } => summary(&json!({"state": state.as_str(), "status": status})),
        other => brief(other),
    }
}

/// A workload in an answer, for the history.
fn summary(object: &Value) -> String {
    let status = &object["status"];
    format!(
        "{} {} {} exit {} node {} attempt {} container {} last_error {}",
        object["state"],
        status["phase"],
        status["reason"],
        status["exit_code"],
        status["node"],
        status["attempt"],
        status["container_id"].as_str().map_or("-", |id| id.get(..8).unwrap_or(id)),
        status["last_error"],
    )
}
