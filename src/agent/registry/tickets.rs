//! Work in flight: who is at work on an entry holds its ticket, and gives it back with what came of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::entry::{Chore, Made, Work};
use super::{Registry, Wanted};
use crate::cri::images::Image;
use crate::cri::runtime::{Class, Ending, Observed, Progress, StartError, Started};
use crate::deadline::{Deadline, Timestamp};
use crate::limits;
use crate::wire::agent::EventKind;
use crate::wire::status::Timings;
use crate::workload::{Phase, Reason, State, Workload, WorkloadId};

impl Registry {
    /// A worker takes up a start; `None` when there is nothing to start any more.
    pub fn begin_start(&self, id: &WorkloadId) -> Option<StartTicket<'_>> {
        let mut inner = self.lock();
        let entry = self.begin(&mut inner, id, &[Chore::Start])?.1;
        Some(StartTicket {
            registry: self,
            id: id.clone(),
            workload: Arc::clone(&entry.workload),
            uid: Arc::clone(&entry.uid),
            class: Arc::clone(&entry.class),
            endpoint: entry.endpoint,
            attempt: entry.status.attempt,
            image: entry.image.take(),
            pull_ms: entry.pull_ms,
            cancel: Arc::clone(&entry.cancel),
            deadline: entry.start_deadline,
            is_over: false,
        })
    }

    /// A worker takes up whatever ends a workload; `None` when there is nothing to do any more.
    pub fn begin_end(&self, id: &WorkloadId) -> Option<EndTicket<'_>> {
        let mut inner = self.lock();
        let (chore, entry) = self.begin(&mut inner, id, &[Chore::Clear, Chore::Stop, Chore::Retire, Chore::Remove])?;
        let made = entry.made.as_ref();
        Some(EndTicket {
            registry: self,
            id: id.clone(),
            uid: Arc::clone(&entry.uid),
            chore,
            endpoint: entry.endpoint,
            sandbox_id: made.map(|m| m.sandbox_id.clone()).or_else(|| entry.status.sandbox_id.clone()),
            container_id: made.map(|m| m.container_id.clone()),
            // After the grace comes the kill, whoever asks for it meanwhile.
            grace_ms: entry.kill.map_or_else(|| entry.grace_ms(), |kill| kill.left_ms()),
            failures: entry.failures,
            is_over: false,
        })
    }

    /// The container is about to be asked to run: after this is on disk nobody takes it for one that never ran.
    fn launch(&self, id: &WorkloadId) -> Result<(), String> {
        let deadline = Deadline::within_ms(limits::JOURNAL_MS_MAX, "journal");
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return Ok(()) };
        entry.touch();
        entry.launched = true;
        let change = entry.ledger.change;
        self.save(&mut inner, id);
        loop {
            let Some(entry) = inner.entries.get_mut(id) else { return Ok(()) };
            if entry.ledger.saved >= change {
                return Ok(());
            }
            let Ok(left) = deadline.left() else {
                entry.touch();
                entry.launched = false;
                return Err(inner.trouble.clone().unwrap_or_else(|| "the disk is too slow".into()));
            };
            inner = self.wait_changed(inner, left);
        }
    }

    pub(super) fn finish_start(&self, id: &WorkloadId, result: Result<(Started, bool), StartError>) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        entry.work = Work::Idle;
        entry.status.observed_at = Timestamp::now();
        match result {
            Ok((started, own_kernel)) => {
                let [pull, sandbox, create, start] = started.steps_ms.map(Some);
                entry.touch(); // Not held: the runtime knows it as well.
                entry.become_state(State::Running);
                entry.began_to_run(own_kernel);
                entry.made =
                    Some(Made { sandbox_id: started.sandbox_id.clone(), container_id: started.container_id.clone(), retired: false });
                let status = &mut entry.status;
                status.reason = None;
                status.message = None;
                status.phase = if entry.wanted == Wanted::Run { None } else { Some(Phase::Stopping) };
                status.sandbox_id = Some(started.sandbox_id);
                status.container_id = Some(started.container_id);
                status.image_digest = started.image_digest;
                status.ip = started.ip;
                status.isolation = self.isolation(&started.handler, own_kernel);
                status.handler = Some(started.handler);
                status.timings_ms = Timings { pull, sandbox, create, start, total: Some(entry.accepted.elapsed_ms()) };
                match started.observed {
                    Observed::Running(since) => status.started_at = since,
                    // Over before we looked: it ran all the same, and whoever watches sees both.
                    Observed::Ended(ending) => {
                        status.started_at = ending.started_at;
                        self.publish(&mut inner, id, EventKind::Modified);
                        let Some(entry) = inner.entries.get_mut(id) else { return };
                        entry.hold();
                        entry.ended(ending);
                    }
                    Observed::Created | Observed::Unknown => {}
                }
            }
            Err(error) if error.retriable && entry.wanted == Wanted::Run && entry.start_deadline.left().is_ok() => {
                // The attempt's number is not used again, whatever happens.
                entry.hold();
                entry.launched = false;
                entry.status.attempt += 1;
                entry.status.phase = None;
                entry.status.reason = Some(error.reason);
                entry.status.message.get_or_insert_with(|| error.message.clone());
                entry.fail_chore(error.message);
            }
            Err(error) => {
                entry.hold();
                match entry.wanted.clone() {
                    Wanted::Stop { reason, message } => entry.give_up(reason, message.unwrap_or(error.message)),
                    Wanted::Delete => entry.give_up(Reason::Stopped, error.message),
                    // It would have been tried again, had there been time: undoing it took the rest.
                    Wanted::Run if error.retriable => entry.fail_start(Reason::StartDeadlineExceeded, error.message),
                    Wanted::Run => entry.fail_start(error.reason, error.message),
                }
            }
        }
        self.publish(&mut inner, id, EventKind::Modified);
        self.nudge();
    }

    pub(super) fn finish_end(&self, id: &WorkloadId, result: Result<EndStep, String>) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        entry.work = Work::Idle;
        match result {
            Ok(EndStep::Cleared) => {
                entry.failures = 0;
                entry.made = None;
            }
            Ok(EndStep::Ended(ending)) => {
                entry.hold();
                entry.failures = 0;
                entry.ended(ending);
            }
            // Somebody else saw its end meanwhile.
            Ok(EndStep::Asked) if entry.state != State::Running => {}
            Ok(EndStep::Asked) => {
                // A second stop does not lengthen the first one's grace.
                let grace_ms = entry.grace_ms().saturating_sub(limits::STOP_WAIT_MS);
                entry.retry = Some(*entry.kill.get_or_insert_with(|| Deadline::within_ms(grace_ms, "grace")));
            }
            Ok(EndStep::Gone) => {
                entry.failures = 0;
                if entry.state == State::Running {
                    entry.hold();
                    entry.lost();
                }
            }
            Ok(EndStep::Removed) => {
                entry.hold();
                entry.ledger.is_forgotten = true;
                // Nothing is to be done about it any more.
                entry.work = Work::Doing;
                return self.publish(&mut inner, id, EventKind::Deleted);
            }
            Ok(EndStep::Retired) => {
                entry.failures = 0;
                if let Some(made) = &mut entry.made {
                    made.retired = true;
                }
                entry.touch();
                // Nothing a watcher sees has changed; the next batch takes it along.
                inner.mark(id);
                return self.assign(&mut inner, id);
            }
            Err(message) => entry.fail_chore(message),
        }
        entry.end_if_unwanted();
        self.publish(&mut inner, id, EventKind::Modified);
    }
}

/// A start in flight. Dropped unfinished, by a panic, it marks the workload failed.
pub struct StartTicket<'a> {
    pub(super) registry: &'a Registry,
    pub(super) id: WorkloadId,
    /// What to start.
    pub workload: Arc<Workload>,
    /// Which acceptance of it.
    pub uid: Arc<str>,
    /// As what.
    pub class: Arc<Class>,
    /// On which runtime.
    pub endpoint: usize,
    /// As which sandbox.
    pub attempt: u32,
    /// The image, when it was pulled for this start.
    pub image: Option<Image>,
    /// How long it waited for that, milliseconds.
    pub pull_ms: u64,
    /// Until when.
    pub deadline: Deadline,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) is_over: bool,
}

impl StartTicket<'_> {
    /// Records the outcome; with a start that worked, whether its class has to show a kernel of its own.
    pub fn finish(mut self, result: Result<(Started, bool), StartError>) {
        self.is_over = true;
        self.registry.finish_start(&self.id, result);
    }
}

impl Progress for StartTicket<'_> {
    fn enter(&self, phase: Phase) {
        let mut inner = self.registry.lock();
        if let Some(entry) = inner.entries.get_mut(&self.id) {
            if entry.wanted == Wanted::Run {
                entry.status.phase = Some(phase);
                self.registry.publish(&mut inner, &self.id, EventKind::Modified);
            }
        }
    }

    fn launch(&self) -> Result<(), String> {
        self.registry.launch(&self.id)
    }

    fn sandbox(&self, sandbox_id: &str) {
        if let Some(entry) = self.registry.lock().entries.get_mut(&self.id) {
            entry.status.sandbox_id = Some(sandbox_id.to_owned());
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::SeqCst)
    }
}

impl Drop for StartTicket<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            let message = "the agent failed while it started the workload; its log says more".to_owned();
            self.registry.finish_start(&self.id, Err(StartError { reason: Reason::CreateFailed, message, retriable: false }));
        }
    }
}

/// An end in flight. Dropped unfinished, it is tried again.
pub struct EndTicket<'a> {
    registry: &'a Registry,
    id: WorkloadId,
    /// Which acceptance of it.
    pub uid: Arc<str>,
    /// What to do.
    pub chore: Chore,
    /// The runtime that has it.
    pub endpoint: usize,
    /// Its sandbox, where one was made.
    pub sandbox_id: Option<String>,
    /// Its container, where a start worked.
    pub container_id: Option<String>,
    /// Between the polite signal and the kill, milliseconds.
    pub grace_ms: u64,
    /// How often it failed before.
    pub failures: u32,
    is_over: bool,
}

/// What a worker brought about.
#[derive(Debug)]
pub enum EndStep {
    /// The container was asked to end, and has its grace.
    Asked,
    /// What an attempt before left is removed.
    Cleared,
    /// The container ended.
    Ended(Ending),
    /// The runtime has no such container.
    Gone,
    /// Sandbox, container and logs are removed.
    Removed,
    /// The sandbox is stopped.
    Retired,
}

impl EndTicket<'_> {
    /// Whose.
    pub fn id(&self) -> &WorkloadId {
        &self.id
    }

    /// The runtime is about to be asked to stop the container. What it says of its end from now on may be our doing.
    pub fn ask(&self) {
        let mut inner = self.registry.lock();
        let Some(entry) = inner.entries.get_mut(&self.id).filter(|entry| entry.asked_to_stop.is_none()) else { return };
        entry.asked_to_stop = Some(Timestamp::now());
        // Not waited for: on a full disk, too, what is to end is ended.
        entry.touch();
        self.registry.save(&mut inner, &self.id);
    }

    /// Records the outcome; a failure, in words, is tried again.
    pub fn finish(mut self, result: Result<EndStep, String>) {
        self.is_over = true;
        self.registry.finish_end(&self.id, result);
    }
}

impl Drop for EndTicket<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.registry.finish_end(&self.id, Err("the agent failed while it ended the workload; its log says more".into()));
        }
    }
}
