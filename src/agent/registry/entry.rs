//! One workload as the registry keeps it: what is wanted of it, where it stands, and what it needs done next. Pure.
//!
//! Invariant: a terminal state never changes; an exit code once known never changes ([`Entry::end`]).

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::cri::runtime::{Class, Ending};
use crate::deadline::{Deadline, Stopwatch, Timestamp};
use crate::limits;
use crate::report::clip;
use crate::wire::agent::Object;
use crate::wire::status::Status;
use crate::wire::workload::to_map;
use crate::workload::{Reason, State, Workload};

pub(super) struct Entry {
    pub(super) workload: Arc<Workload>,
    /// Tells this acceptance of the id from any other.
    pub(super) uid: Arc<str>,
    /// The class as it was when the workload was accepted; a later configuration does not change what was promised.
    pub(super) class: Arc<Class>,
    /// Which runtime has it.
    pub(super) endpoint: usize,
    pub(super) spec_bytes: usize,
    /// The values of the environment are known; they are not after an adoption.
    pub(super) is_env_known: bool,
    pub(super) state: State,
    pub(super) status: Status,
    pub(super) wanted: Wanted,
    pub(super) work: Work,
    pub(super) probe: Probe,
    /// The sandbox and container of a start that worked.
    pub(super) made: Option<Made>,
    /// Set when nobody wants a start in flight any more.
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) accepted: Stopwatch,
    pub(super) start_deadline: Deadline,
    /// When a chore that failed may be tried again, and how often it failed.
    pub(super) retry: Option<Deadline>,
    pub(super) failures: u32,
    /// The polite signal was sent; the kill is due then.
    pub(super) kill: Option<Deadline>,
    /// When a probe that got no answer may be tried again, and how long the next pause is.
    pub(super) probe_retry: Option<(Deadline, u64)>,
    /// When its time to live is over.
    pub(super) ttl: Option<Deadline>,
    /// The registry's revision at its last change.
    pub(super) version: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) sandbox_id: String,
    pub(super) container_id: String,
    /// The sandbox was stopped; only its record is left at the runtime.
    pub(super) retired: bool,
}

/// What is wanted of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Delete,
    Run,
    Stop { reason: Reason, message: Option<String> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Doing,
    Idle,
    Queued(Chore),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Probe {
    Due,
    /// Answered, not needed, or given up.
    Over,
    Queued,
}

/// What a workload needs done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chore {
    /// Remove what is left at the runtime and on disk, and forget it.
    Remove,
    /// Stop the sandbox of a workload that ended: frees its network, its memory and its processes.
    Retire,
    /// Start it.
    Start,
    /// Stop its container.
    Stop,
}

impl Entry {
    /// A workload that is pending and wanted, and nothing else.
    pub(super) fn new(workload: Workload, uid: &str, class: Class, endpoint: usize, status: Status) -> Self {
        Self {
            start_deadline: Deadline::within_ms(workload.spec.start_deadline_ms, "start"),
            spec_bytes: serde_json::Value::Object(to_map(&workload)).to_string().len(),
            workload: Arc::new(workload),
            uid: uid.into(),
            class: Arc::new(class),
            endpoint,
            is_env_known: true,
            state: State::Pending,
            status,
            wanted: Wanted::Run,
            work: Work::Idle,
            probe: Probe::Over,
            made: None,
            cancel: Arc::default(),
            accepted: Stopwatch::start(),
            retry: None,
            failures: 0,
            kill: None,
            probe_retry: None,
            ttl: None,
            version: 0,
        }
    }

    pub(super) fn chore(&self) -> Option<Chore> {
        if self.retry.is_some_and(|retry| retry.left().is_ok()) {
            return None;
        }
        let is_running = self.state == State::Running;
        match &self.wanted {
            // A runtime that does not stop a container may still remove its sandbox.
            Wanted::Delete if is_running && self.failures >= STOP_FAILURES_MAX => Some(Chore::Remove),
            Wanted::Delete | Wanted::Stop { .. } if is_running => Some(Chore::Stop),
            Wanted::Delete => Some(Chore::Remove),
            Wanted::Run if self.state == State::Pending => Some(Chore::Start),
            Wanted::Run | Wanted::Stop { .. } => {
                let retires = self.state.is_terminal() && self.made.as_ref().is_some_and(|m| !m.retired);
                retires.then_some(Chore::Retire)
            }
        }
    }

    pub(super) fn object(&self) -> Object {
        let mut spec = to_map(&self.workload);
        if let (false, Some(serde_json::Value::Object(env))) = (self.is_env_known, spec.get_mut("env")) {
            env.values_mut().for_each(|value| *value = serde_json::Value::Null);
        }
        Object { spec, state: self.state, status: Box::new(self.status.clone()) }
    }

    pub(super) fn owns(&self, sandbox_id: &str) -> bool {
        self.made.as_ref().is_some_and(|made| made.sandbox_id == sandbox_id)
    }

    /// How long a stop may be polite. Who asked for the end gets the grace the workload asks for; a sandbox that is not what it
    /// should be gets none.
    pub(super) fn grace_ms(&self) -> u64 {
        let grace_ms = self.workload.spec.stop_grace_ms;
        match &self.wanted {
            Wanted::Stop { reason: Reason::IsolationMismatch | Reason::SandboxDied, .. } => 0,
            Wanted::Stop { reason: Reason::TtlExpired, .. } => grace_ms.min(limits::FORCED_GRACE_MS_MAX),
            Wanted::Delete | Wanted::Run | Wanted::Stop { .. } => grace_ms,
        }
    }

    /// Moves to another state, if the state machine allows.
    pub(super) fn become_state(&mut self, next: State) {
        if self.state.may_become(next) {
            self.state = next;
        } else {
            log::error!("workload {}: {} may not become {next}", self.workload.id, self.state);
        }
    }

    /// The workload is over. The first cause wins.
    pub(super) fn end(&mut self, state: State, reason: Reason, message: Option<String>, finished_at: Option<Timestamp>) {
        if self.state.is_terminal() {
            return;
        }
        self.become_state(state);
        self.status.reason = Some(reason);
        self.status.message = message;
        self.status.phase = None;
        self.status.finished_at = finished_at;
        self.status.observed_at = Timestamp::now();
        self.ttl = None;
        self.retry = None;
        self.kill = None;
        self.failures = 0;
        self.probe = Probe::Over;
    }

    /// The start is given up. What went wrong first says more than what went wrong last.
    pub(super) fn give_up(&mut self, reason: Reason, message: String) {
        let first = self.status.message.take();
        if first.is_some() {
            self.status.last_error = Some(message.clone());
        }
        self.end(State::Failed, reason, Some(first.unwrap_or(message)), Some(Timestamp::now()));
    }

    pub(super) fn ended(&mut self, ending: Ending) {
        let Ending { exit_code, oom_killed, never_ran, message, started_at, finished_at } = ending;
        if self.state.is_terminal() {
            return;
        }
        self.status.exit_code = exit_code;
        self.status.oom_killed = oom_killed;
        self.status.started_at = self.status.started_at.or(started_at);
        let said = Some(message).filter(|m| !m.is_empty());
        let (reason, message) = match &self.wanted {
            _ if oom_killed => (Reason::OomKilled, said),
            _ if never_ran => (Reason::StartFailed, said),
            Wanted::Stop { reason, message } => (*reason, message.clone().or(said)),
            Wanted::Delete => (Reason::Stopped, said),
            Wanted::Run if exit_code == Some(0) => (Reason::Completed, said),
            Wanted::Run => (Reason::Error, said.or_else(|| exit_code.is_none().then(|| "the runtime does not know the exit code".into()))),
        };
        let succeeded = exit_code == Some(0) && matches!(reason, Reason::Completed | Reason::Stopped);
        self.end(if succeeded { State::Succeeded } else { State::Failed }, reason, message, finished_at);
    }

    pub(super) fn fail_chore(&mut self, message: String) {
        self.failures = self.failures.saturating_add(1);
        // 250 ms doubling to 16 s: a runtime that restarts is back in a second or two.
        let ms = 250u64 << self.failures.saturating_sub(1).min(6);
        self.retry = Some(Deadline::within_ms(ms, "retry"));
        self.status.last_error = Some(clip(message, limits::MESSAGE_BYTES_MAX));
    }
}

/// Failed stops after which a delete goes on to removing the sandbox.
pub(super) const STOP_FAILURES_MAX: u32 = 3;
