//! One workload as the registry keeps it: what is wanted of it, where it stands, and what it needs done next. Pure.
//!
//! Invariant: a terminal state never changes; an exit code once known never changes ([`Entry::end`]).

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::cri::images::Image;
use crate::cri::runtime::{Class, Ending};
use crate::deadline::{Deadline, Stopwatch, Timestamp, doubled_ms};
use crate::limits;
use crate::report::clip;
use crate::wire::agent::{Event, EventKind, Object};
use crate::wire::record::{Ailing, Wanted};
use crate::wire::status::Status;
use crate::wire::workload::to_map;
use crate::workload::{Reason, RestartPolicy, State, Workload, WorkloadId};

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
    /// The sandbox and container of a start that worked, or what one before left behind.
    pub(super) made: Option<Made>,
    /// The runtime may have been asked to run the container of this attempt.
    pub(super) launched: bool,
    /// The image that was pulled for the next start.
    pub(super) image: Option<Image>,
    /// Since when it waits for it, and how long it did before.
    pub(super) pull: Option<Stopwatch>,
    pub(super) pull_ms: u64,
    /// The first cause in the status is one of the pull.
    pub(super) is_pull_noted: bool,
    /// Set when nobody wants a start in flight any more.
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) accepted: Stopwatch,
    pub(super) start_deadline: Deadline,
    /// When a chore that failed may be tried again, and how often it failed.
    pub(super) retry: Option<Deadline>,
    pub(super) failures: u32,
    /// The polite signal was sent; the kill is due then.
    pub(super) kill: Option<Deadline>,
    /// Since when it is to end.
    pub(super) stopping: Option<Stopwatch>,
    /// When its runtime was asked to stop it, first.
    pub(super) asked_to_stop: Option<Timestamp>,
    /// When a probe that got no answer may be tried again, and how long the next pause is.
    pub(super) probe_retry: Option<(Deadline, u64)>,
    /// When its time to live is over: counted from when it first ran.
    pub(super) ttl: Option<Deadline>,
    /// When it first ran.
    pub(super) ran_since: Option<Timestamp>,
    /// Restarts in a row, and when the present run has lasted long enough to end the row.
    pub(super) streak: u64,
    pub(super) is_proven: Option<Deadline>,
    /// A restart is not due before this.
    pub(super) restart: Option<Deadline>,
    /// Why it is being ended although it is wanted.
    pub(super) ailing: Option<Ailing>,
    pub(super) health: Health,
    /// It was read from the journal, and not compared yet with what its runtime has.
    pub(super) recovery: Option<Recovery>,
    /// Until when its runtime may not know whether it runs.
    pub(super) unknown: Option<Deadline>,
    /// It ran when the machine went down.
    pub(super) is_rebooted: bool,
    pub(super) ledger: Ledger,
    /// Grows with every change.
    pub(super) version: u64,
}

/// What of an entry is on disk.
///
/// Invariant: what is `held` is neither told nor acted upon before `saved >= held`.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Counts changes worth saving.
    pub(super) change: u64,
    /// The last of them that is on disk; 0 when there is nothing of it on disk.
    pub(super) saved: u64,
    /// The last of them that nobody may hear of before.
    pub(super) held: u64,
    /// What is told meanwhile.
    pub(super) shown: Option<(State, Status, Arc<Workload>)>,
    /// The event to be told then.
    pub(super) owed: Option<EventKind>,
    /// What was asked for is on disk too.
    pub(super) is_accept_saved: bool,
    /// Its removal is complete, and it is to be forgotten.
    pub(super) is_forgotten: bool,
}

impl Ledger {
    pub(super) fn is_settled(&self) -> bool {
        self.saved >= self.held
    }
}

/// The comparison of a journal's entry with what its runtime has.
#[derive(Debug, Default)]
pub(super) struct Recovery {
    /// Its container exists, and may be about to run: then it is known.
    pub(super) doubt: Option<Deadline>,
}

/// Where its health check stands.
#[derive(Debug, Default)]
pub(super) struct Health {
    pub(super) due: Option<Deadline>,
    pub(super) is_queued: bool,
    /// In a row.
    pub(super) failures: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) sandbox_id: String,
    pub(super) container_id: String,
    /// The sandbox was stopped; only its record is left at the runtime.
    pub(super) retired: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Doing,
    Idle,
    /// A start that waits for its image.
    Pulling,
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
    /// Remove what an attempt before left at the runtime, so that the next can start.
    Clear,
    /// Remove what is left at the runtime and on disk, and forget it.
    Remove,
    /// Stop the sandbox of a workload that ended: frees its network, its memory and its processes.
    Retire,
    /// Start it.
    Start,
    /// Stop its container.
    Stop,
}

/// What may be told of an entry at one moment; a fraction of the size of its JSON.
#[derive(Debug)]
pub struct Snapshot {
    workload: Arc<Workload>,
    is_env_known: bool,
    state: State,
    status: Box<Status>,
}

impl Snapshot {
    /// Of which workload.
    pub fn id(&self) -> &WorkloadId {
        &self.workload.id
    }

    /// As every answer shows it. Values of the environment that are not known are `null`.
    pub fn object(&self) -> Object {
        let mut spec = to_map(&self.workload);
        if let (false, Some(serde_json::Value::Object(env))) = (self.is_env_known, spec.get_mut("env")) {
            env.values_mut().for_each(|value| *value = serde_json::Value::Null);
        }
        Object { spec, state: self.state, status: self.status.clone() }
    }
}

/// A change, as it is kept for whoever watches.
#[derive(Debug)]
pub struct News {
    /// Of the change.
    pub revision: u64,
    /// What happened.
    pub kind: EventKind,
    pub(super) snapshot: Snapshot,
    /// Of its spec, as JSON.
    pub(super) spec_bytes: usize,
}

impl News {
    /// As it goes over the wire.
    pub fn event(&self) -> Event {
        Event { revision: self.revision, event: self.kind, object: self.snapshot.object() }
    }
}

impl Entry {
    /// A workload that is pending and wanted, and nothing else.
    pub(super) fn new(workload: Workload, uid: &str, class: Class, endpoint: usize, status: Status) -> Box<Self> {
        Box::new(Self {
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
            launched: false,
            image: None,
            pull: None,
            pull_ms: 0,
            is_pull_noted: false,
            cancel: Arc::default(),
            accepted: Stopwatch::start(),
            retry: None,
            failures: 0,
            kill: None,
            stopping: None,
            asked_to_stop: None,
            probe_retry: None,
            ttl: None,
            ran_since: None,
            streak: 0,
            is_proven: None,
            restart: None,
            ailing: None,
            health: Health::default(),
            recovery: None,
            unknown: None,
            is_rebooted: false,
            ledger: Ledger::default(),
            version: 0,
        })
    }

    pub(super) fn chore(&self) -> Option<Chore> {
        if self.recovery.is_some() || !self.ledger.is_settled() || self.retry.is_some_and(|retry| retry.left().is_ok()) {
            return None;
        }
        match (&self.wanted, self.state) {
            // A runtime that does not stop a container may still remove its sandbox.
            (Wanted::Delete, State::Running) if self.failures >= STOP_FAILURES_MAX => Some(Chore::Remove),
            (Wanted::Delete | Wanted::Stop { .. }, State::Running) => Some(Chore::Stop),
            (Wanted::Delete, State::Pending | State::Succeeded | State::Failed) => Some(Chore::Remove),
            (Wanted::Run, State::Running) => self.ailing.is_some().then_some(Chore::Stop),
            (Wanted::Run, State::Pending) if self.made.is_some() => Some(Chore::Clear),
            (Wanted::Run, State::Pending) => self.restart.is_none_or(|restart| restart.left().is_err()).then_some(Chore::Start),
            // It ends as soon as nobody is at work on it.
            (Wanted::Stop { .. }, State::Pending) => None,
            (Wanted::Run | Wanted::Stop { .. }, State::Succeeded | State::Failed) => {
                self.made.as_ref().is_some_and(|m| !m.retired).then_some(Chore::Retire)
            }
        }
    }

    /// What may be told: nothing that is not on disk, where that matters.
    pub(super) fn view(&self) -> (State, &Status) {
        self.ledger.shown.as_ref().map_or((self.state, &self.status), |(state, status, _)| (*state, status))
    }

    /// What may be told, to keep.
    pub(super) fn seen(&self) -> (State, Status) {
        let (state, status) = self.view();
        (state, status.clone())
    }

    /// There is something that may be told.
    pub(super) fn is_visible(&self) -> bool {
        self.ledger.saved > 0
    }

    /// Notes that what comes is to be saved.
    pub(super) fn touch(&mut self) {
        self.ledger.change += 1;
    }

    /// Notes that what comes is to be saved before anybody hears of it or acts upon it. Called before the change.
    pub(super) fn hold(&mut self) {
        if self.ledger.is_settled() && self.is_visible() {
            self.ledger.shown = Some((self.state, self.status.clone(), Arc::clone(&self.workload)));
        }
        self.touch();
        self.ledger.held = self.ledger.change;
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let workload = self.ledger.shown.as_ref().map_or(&self.workload, |(_, _, workload)| workload);
        let (state, status) = self.view();
        Snapshot { workload: Arc::clone(workload), is_env_known: self.is_env_known, state, status: Box::new(status.clone()) }
    }

    pub(super) fn news(&self, revision: u64, kind: EventKind) -> News {
        News { revision, kind, snapshot: self.snapshot(), spec_bytes: self.spec_bytes }
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
            Wanted::Run if self.ailing.as_ref().is_some_and(|a| a.reason == Reason::SandboxDied) => 0,
            Wanted::Run => grace_ms.min(limits::FORCED_GRACE_MS_MAX),
            Wanted::Delete | Wanted::Stop { .. } => grace_ms,
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

    /// Its container runs, for the first time that we know of.
    pub(super) fn began_to_run(&mut self, own_kernel: bool) {
        self.failures = 0;
        self.retry = None;
        self.restart = None;
        self.probe = if own_kernel { Probe::Due } else { Probe::Over };
        // Counted from the first run, whatever number of restarts follow.
        self.ttl = self.ttl.or_else(|| self.workload.spec.ttl_ms.map(|ms| Deadline::within_ms(ms, "ttl")));
        self.ran_since.get_or_insert_with(Timestamp::now);
        self.began_to_run_again();
    }

    /// Its container runs; since when, nobody here has seen.
    pub(super) fn began_to_run_again(&mut self) {
        self.is_proven = Some(Deadline::within_ms(self.workload.spec.restart.reset_ms, "proof"));
        let due = |health: &crate::workload::Health| Deadline::within_ms(health.interval_ms, "health");
        self.health = Health { due: self.workload.spec.health.as_ref().map(due), ..Health::default() };
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
        self.rest();
    }

    /// Nothing of the present attempt goes on.
    fn rest(&mut self) {
        self.retry = None;
        self.kill = None;
        self.failures = 0;
        self.stopping = None;
        self.asked_to_stop = None;
        self.probe = Probe::Over;
        self.probe_retry = None;
        self.ailing = None;
        self.health = Health::default();
        self.restart = None;
        self.unknown = None;
        self.is_rebooted = false;
        self.image = None;
        self.pull = None;
        self.pull_ms = 0;
        self.is_pull_noted = false;
    }

    /// The attempt is over. By its policy the workload may not be.
    fn conclude(&mut self, succeeded: bool, reason: Reason, message: Option<String>, finished_at: Option<Timestamp>) {
        if self.state.is_terminal() {
            return;
        }
        if self.is_proven.take().is_some_and(|proven| proven.left().is_err()) {
            self.streak = 0;
        }
        if self.is_to_restart(succeeded, reason) {
            self.begin_again(reason, message);
        } else {
            self.end(if succeeded { State::Succeeded } else { State::Failed }, reason, message, finished_at);
        }
    }

    fn is_to_restart(&self, succeeded: bool, reason: Reason) -> bool {
        let restart = &self.workload.spec.restart;
        let is_covered = match restart.policy {
            RestartPolicy::Always => true,
            RestartPolicy::Never => false,
            RestartPolicy::OnFailure => !succeeded,
        };
        // A sandbox that is not what it should be is not asked for again.
        let is_final = matches!(reason, Reason::IsolationMismatch | Reason::Stopped | Reason::TtlExpired);
        let is_left = restart.attempts_max.is_none_or(|most| self.streak < most);
        // Without the values of its environment it would be another workload.
        self.wanted == Wanted::Run && is_covered && !is_final && is_left && self.is_env_known
    }

    /// Back to Pending, to be started again after a pause.
    fn begin_again(&mut self, reason: Reason, message: Option<String>) {
        let restart = self.workload.spec.restart;
        let pause_ms = restart.pause_ms(self.streak);
        self.streak += 1;
        self.become_state(State::Pending);
        self.rest();
        self.launched = false;
        self.cancel = Arc::default();
        self.restart = Some(Deadline::within_ms(pause_ms, "restart"));
        self.start_deadline = Deadline::within_ms(pause_ms.saturating_add(self.workload.spec.start_deadline_ms), "start");
        let most = restart.attempts_max.map(|most| format!(" of {most}")).unwrap_or_default();
        let exit = self.status.exit_code.take().map(|code| format!("exit code {code}"));
        let cause = [exit, message].into_iter().flatten().collect::<Vec<_>>().join(": ");
        let status = &mut self.status;
        status.last_error = Some(clip(
            format!(
                "attempt {} ended: {reason}: {cause}; restart {}{most} after {} s",
                status.attempt,
                self.streak,
                pause_ms.div_ceil(1000)
            ),
            limits::MESSAGE_BYTES_MAX,
        ));
        status.restarts = status.restarts.saturating_add(1);
        status.attempt = status.attempt.saturating_add(1);
        status.reason = Some(reason);
        status.message.get_or_insert(cause);
        status.phase = None;
        status.oom_killed = false;
        status.ip = None;
        (status.started_at, status.finished_at) = (None, None);
        status.observed_at = Timestamp::now();
    }

    /// It is not there any more, and nobody knows how it ended.
    pub(super) fn lost(&mut self) {
        let (reason, message) = if self.is_rebooted {
            (Reason::NodeRebooted, "the machine was booted again while it ran")
        } else if self.state == State::Pending {
            (Reason::StartFailed, "an agent died while it started it; whether it ran is not known, and nothing of it is left")
        } else {
            (Reason::SandboxDied, "the runtime does not have it any more")
        };
        match self.wanted.clone() {
            Wanted::Stop { reason, message: why } => self.end(State::Failed, reason, why.or(Some(message.into())), None),
            // It is we who remove it.
            Wanted::Delete if !self.is_rebooted => self.end(State::Failed, Reason::Stopped, Some(message.into()), None),
            Wanted::Delete => self.end(State::Failed, reason, Some(message.into()), None),
            Wanted::Run => self.conclude(false, reason, Some(message.into()), None),
        }
    }

    /// Nobody is at work on it any more: what is to be stopped and does not run is over.
    pub(super) fn end_if_unwanted(&mut self) {
        if let (State::Pending, Wanted::Stop { reason, message }) = (self.state, self.wanted.clone()) {
            self.hold();
            self.give_up(reason, message.unwrap_or_else(|| "stopped before it ran again".into()));
        }
    }

    /// A start failed for good. What ran before may run again; what never did is not tried again by policy.
    pub(super) fn fail_start(&mut self, reason: Reason, message: String) {
        if self.status.restarts > 0 && self.is_to_restart(false, reason) {
            self.begin_again(reason, Some(message));
        } else {
            self.give_up(reason, message);
        }
    }

    /// Why a start that nobody is at work on is too late. A pull that kept failing is the cause, not the deadline it ran into.
    pub(super) fn too_late(&self) -> (Reason, String) {
        match (self.work, self.status.reason) {
            (Work::Pulling, Some(Reason::ImagePullFailed)) => (Reason::ImagePullFailed, "start deadline passed in Pulling".into()),
            (Work::Pulling, _) => (Reason::StartDeadlineExceeded, "start deadline passed in Pulling".into()),
            (Work::Doing | Work::Idle | Work::Queued(_), _) => {
                (Reason::StartDeadlineExceeded, "start deadline passed while it waited for its start".into())
            }
        }
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
        // Two may see the same end: whoever stopped it, and whoever lists. The second has nothing to add.
        if self.state != State::Running {
            return;
        }
        let is_unasked = self.is_unasked(finished_at);
        // containerd's own, for a container that it has no task of (`cleanupUnknownContainer`).
        let is_made_up = |code: &i32| *code == 255 && self.is_lost_track_of() && !is_unasked;
        let exit_code = exit_code.filter(|code| !is_made_up(code));
        // What had ended by itself, unseen, before it was stopped for want of a sandbox or of any trace of it, is not done again. For
        // want of a sandbox it is killed at once, which leaves no other exit code than these.
        let is_killed = exit_code.is_none_or(|code| matches!(code, 137 | 143 | 255));
        let is_own_end = |ailing: &Ailing| match ailing.reason {
            Reason::SandboxDied => !is_killed,
            Reason::RuntimeUnavailable => !is_killed && is_unasked,
            _ => false,
        };
        self.status.exit_code = exit_code;
        self.status.oom_killed = oom_killed;
        self.status.started_at = self.status.started_at.or(started_at);
        let said = Some(message).filter(|m| !m.is_empty());
        let own = |said: Option<String>| match exit_code {
            Some(0) => (Reason::Completed, said),
            Some(_) => (Reason::Error, said),
            None => (Reason::Error, said.or_else(|| Some("the runtime does not know the exit code".into()))),
        };
        let (reason, message) = match &self.wanted {
            _ if oom_killed => (Reason::OomKilled, said),
            _ if never_ran => (Reason::StartFailed, said),
            // Its time came when it was over already, unseen.
            Wanted::Stop { reason: Reason::TtlExpired, .. } if is_unasked && exit_code.is_some() => own(said),
            Wanted::Stop { reason, message } => (*reason, message.clone().or(said)),
            Wanted::Delete => (Reason::Stopped, said),
            Wanted::Run => match self.ailing.as_ref().filter(|ailing| !is_own_end(ailing)) {
                Some(ailing) => (ailing.reason, Some(ailing.message.clone())),
                // What the runtime kept of it over a boot counts; what it made up does not.
                None if exit_code.is_none() && self.is_rebooted => return self.lost(),
                None => own(said),
            },
        };
        let succeeded = exit_code == Some(0) && matches!(reason, Reason::Completed | Reason::Stopped);
        self.conclude(succeeded, reason, message, finished_at);
    }

    /// Whether it ended before anybody asked its runtime to stop it. Before it is asked, it is looked for; what cannot be seen then
    /// shows later by when it ended, as far as nobody set the clock.
    fn is_unasked(&self, finished_at: Option<Timestamp>) -> bool {
        let Some(asked) = self.asked_to_stop else { return true };
        self.is_lost_track_of() && finished_at.is_some_and(|finished| finished < asked)
    }

    /// Its runtime does not know whether it runs, or did not when it was given up for that.
    fn is_lost_track_of(&self) -> bool {
        self.unknown.is_some() || self.ailing.as_ref().is_some_and(|ailing| ailing.reason == Reason::RuntimeUnavailable)
    }

    pub(super) fn fail_chore(&mut self, message: String) {
        self.failures = self.failures.saturating_add(1);
        self.retry = Some(Deadline::within_ms(chore_pause_ms(self.failures), "retry"));
        self.status.last_error = Some(clip(message, limits::MESSAGE_BYTES_MAX));
    }
}

/// The pause after so many failures of a chore in a row.
pub fn chore_pause_ms(failures: u32) -> u64 {
    doubled_ms(limits::CHORE_RETRY_MS_MIN, limits::CHORE_RETRY_MS_MAX, failures)
}

/// Failed stops after which a delete goes on to removing the sandbox.
pub(super) const STOP_FAILURES_MAX: u32 = 3;
