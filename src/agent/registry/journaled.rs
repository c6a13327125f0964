//! The registry and its journal: what is to be written down, what was, and what was found there after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::entry::{Entry, Made, Probe, Recovery, Work};
use super::{Inner, Registry, Wanted};
use crate::agent::journal::Saved;
use crate::cri::images;
use crate::cri::runtime::{Class, Found, Observed, Seen};
use crate::deadline::{Deadline, Stopwatch, Timestamp, uptime_ms};
use crate::limits;
use crate::wire::agent::EventKind;
use crate::wire::record::{Accepted, Record, SavedClass, Update};
use crate::wire::status::Status;
use crate::wire::workload::{complete, to_map};
use crate::wire::{Problems, record};
use crate::workload::{Phase, Reason, State, Workload, WorkloadId};

/// Records to be written, and what they are about.
pub struct Batch {
    /// In this order.
    pub records: Vec<Record>,
    about: Vec<(WorkloadId, Arc<str>, u64)>,
}

/// What a journal said of the agent that wrote it.
pub struct Restored {
    /// The machine's present boot.
    pub boot_id: String,
    /// How often an agent has begun, this one included.
    pub starts: u64,
}

impl Registry {
    /// Takes up what a journal holds; from now on every change that matters is to be saved. Nothing is done about any of it before
    /// its runtime was listed. `endpoint` finds a runtime by its socket.
    ///
    /// # Errors
    /// What cannot be taken up: a runtime that is not configured any more, or a workload this version cannot read.
    pub fn restore(
        &self,
        saved: BTreeMap<String, Saved>,
        restored: &Restored,
        endpoint: impl Fn(&str) -> Option<usize>,
    ) -> Result<(), String> {
        let mut inner = self.lock();
        inner.dirty = Some(super::BTreeSet::new());
        // The lower half counts events; 2^53, what JSON numbers hold, leaves room for two million starts.
        inner.revision = restored.starts << 32;
        inner.boot_id.clone_from(&restored.boot_id);
        for saved in saved.into_values() {
            let id = saved.accepted.id.clone();
            let at = &saved.accepted.endpoint;
            let endpoint = endpoint(at).ok_or_else(|| format!("workload {id} is at unix://{at}, which is not configured any more"))?;
            let entry = self.restored(saved, endpoint, &restored.boot_id).map_err(|problems| format!("workload {id}: {problems}"))?;
            inner.specs_bytes = inner.specs_bytes.saturating_add(entry.spec_bytes);
            inner.entries.insert(entry.workload.id.clone(), entry);
        }
        Ok(())
    }

    fn restored(&self, saved: Saved, endpoint: usize, boot_now: &str) -> Result<Box<Entry>, Problems> {
        let Accepted { id: _, uid, workload, is_env_known, endpoint: _, class } = saved.accepted;
        let mut problems = Problems::default();
        let workload = complete(serde_json::Value::Object(workload), "", &mut problems).filter(|_| problems.is_empty()).ok_or(problems)?;
        let SavedClass { handler, own_kernel, annotations, overhead_mb, sandbox_ms_max } = class;
        let name = workload.runtime_class.clone();
        let class = Class { name, handler, own_kernel, annotations, overhead_mb, memory_mb_min: 0, sandbox_ms_max };
        let mut entry = Entry::new(workload, &uid, class, endpoint, Status::accepted(Some(self.node.to_string())));
        entry.is_env_known = is_env_known;
        entry.recovery = Some(Recovery::default());
        entry.ledger.is_accept_saved = true;
        entry.touch();
        entry.ledger.saved = entry.ledger.change;
        let Some(update) = saved.update else { return Ok(entry) };
        let Update {
            id: _,
            wanted,
            state,
            status,
            launched,
            retired,
            streak,
            restart_at,
            ttl_at,
            ailing,
            ran_since,
            asked_to_stop,
            boot_id,
        } = update;
        let rebooted = boot_id != boot_now;
        entry.ran_since = ran_since;
        let is_active = !state.is_terminal();
        let spec = &entry.workload.spec;
        if is_active {
            entry.is_rebooted = rebooted && (launched || state == State::Running);
            let left = |at: u64| at.saturating_sub(uptime_ms());
            entry.ttl = match (ttl_at, spec.ttl_ms) {
                (Some(at), Some(ms)) if !rebooted => Some(left(at).min(ms)),
                // After a boot only the wall clock is left to count by. It may have jumped: it can shorten the time, never lengthen it.
                (Some(_), Some(ms)) => {
                    let since = ran_since.unwrap_or(status.created_at);
                    Some(ms.saturating_sub(Timestamp::now().as_millis().saturating_sub(since.as_millis())))
                }
                (_, _) => None,
            }
            .map(|ms| Deadline::within_ms(ms, "ttl"));
            entry.restart =
                restart_at.map(|at| Deadline::within_ms(if rebooted { 0 } else { left(at).min(limits::RESTART_MS_MAX) }, "restart"));
            if state == State::Running {
                entry.began_to_run_again();
            }
        }
        if state == State::Running || state.is_terminal() {
            let ids = status.sandbox_id.clone().zip(status.container_id.clone());
            entry.made = ids.map(|(sandbox_id, container_id)| Made { sandbox_id, container_id, retired });
        }
        entry.probe =
            if state == State::Running && entry.class.own_kernel && status.isolation.kernel.is_none() { Probe::Due } else { Probe::Over };
        (entry.wanted, entry.state, entry.status, entry.launched, entry.streak, entry.ailing) =
            (wanted, state, status, launched, streak, ailing);
        if is_active || entry.wanted == Wanted::Delete {
            let is_ending = entry.wanted != Wanted::Run || entry.ailing.is_some();
            entry.status.phase = is_ending.then_some(Phase::Stopping);
            entry.stopping = is_ending.then(Stopwatch::start);
            entry.asked_to_stop = asked_to_stop;
        }
        Ok(entry)
    }

    /// What is not on disk yet; waits for something. While the journal is in trouble, nothing at all is something: it is to be seen
    /// whether it can be written again. `None` when there is nothing and `is_over` says that nothing more will come.
    pub fn unsaved(&self, endpoint: impl Fn(usize) -> String, is_over: impl Fn() -> bool) -> Option<Batch> {
        let mut inner = self.lock();
        loop {
            let ids: Vec<WorkloadId> = inner.dirty.as_mut().map(std::mem::take).unwrap_or_default().into_iter().collect();
            if !ids.is_empty() || (inner.trouble.is_some() && !is_over()) {
                return Some(batch(&inner, ids, false, endpoint));
            }
            if is_over() {
                return None;
            }
            inner = self.unsaved.wait(inner).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Everything that is to be kept, whether it is on disk or not.
    pub fn everything(&self, endpoint: impl Fn(usize) -> String) -> Batch {
        let mut inner = self.lock();
        inner.dirty = inner.dirty.as_ref().map(|_| super::BTreeSet::new());
        let ids = inner.entries.keys().cloned().collect();
        batch(&inner, ids, true, endpoint)
    }

    /// Makes the journal's writer look again.
    pub fn wake_writer(&self) {
        let _held = self.lock();
        self.unsaved.notify_all();
    }

    /// Somebody waits for what is not saved of this entry.
    pub(super) fn save(&self, inner: &mut Inner, id: &WorkloadId) {
        match &mut inner.dirty {
            Some(dirty) => {
                dirty.insert(id.clone());
                self.unsaved.notify_one();
            }
            None => inner.entries.get_mut(id).into_iter().for_each(|entry| entry.ledger.saved = entry.ledger.change),
        }
    }

    /// A batch is on disk: what was held back for it is told.
    pub fn saved(&self, batch: Batch) {
        let mut inner = self.lock();
        inner.trouble = None;
        for (id, uid, change) in batch.about {
            let Some(entry) = inner.entries.get_mut(&id).filter(|entry| entry.uid == uid) else { continue };
            entry.ledger.saved = entry.ledger.saved.max(change);
            // What changed since the batch was made may be of what was accepted, and then the next one has to have it.
            entry.ledger.is_accept_saved |= entry.ledger.change == change;
            self.release(&mut inner, &id);
        }
        self.changed.notify_all();
    }

    /// A batch could not be written. What was to be accepted with it is refused; everything else is written later.
    pub fn not_saved(&self, batch: Batch, trouble: String) {
        let mut inner = self.lock();
        inner.trouble = Some(trouble);
        for (id, uid, _) in batch.about {
            let Some(entry) = inner.entries.get(&id).filter(|entry| entry.uid == uid) else { continue };
            if entry.is_visible() {
                inner.mark(&id);
                continue;
            }
            let spec_bytes = entry.spec_bytes;
            inner.entries.remove(&id);
            inner.specs_bytes = inner.specs_bytes.saturating_sub(spec_bytes);
        }
        self.changed.notify_all();
    }

    /// Takes up a workload that the runtime `endpoint` has: one that ran before this agent started, and that its journal does not
    /// have, or has as one that was about to start. A sandbox that is not of the handler asked for is taken up to be stopped.
    pub fn adopt(&self, workload: Workload, seen: &Seen, overhead_mb: u64, endpoint: usize, found: Found) {
        let mut inner = self.lock();
        let id = workload.id.clone();
        let known = inner.entries.remove(&id);
        let is_new = known.is_none();
        let mut entry = match known {
            None => {
                let class = Class {
                    name: workload.runtime_class.clone(),
                    handler: seen.asked_handler.clone(),
                    own_kernel: seen.own_kernel,
                    annotations: BTreeMap::new(),
                    overhead_mb,
                    memory_mb_min: 0,
                    sandbox_ms_max: limits::START_DEADLINE_MS_DEFAULT,
                };
                let mut status = Status::accepted(Some(self.node.to_string()));
                status.created_at = seen.created_at.unwrap_or(status.created_at);
                status.attempt = seen.attempt;
                let mut entry = Entry::new(workload, &seen.uid, class, endpoint, status);
                entry.is_env_known = entry.workload.spec.env.is_empty();
                inner.specs_bytes = inner.specs_bytes.saturating_add(entry.spec_bytes);
                // The runtime has it, so it may be told before it is in the journal.
                entry.ledger.saved = 1;
                entry.ledger.change = 1;
                entry
            }
            Some(entry) if entry.recovery.is_some() && entry.state == State::Pending && *entry.uid == *seen.uid => entry,
            Some(entry) => {
                inner.entries.insert(id, entry);
                return;
            }
        };
        if matches!(found.observed, Observed::Ended(_)) {
            // Before it becomes Running on its way to its end: until that is on disk, what was told before is told.
            entry.hold();
        }
        let verified = !seen.handler.is_empty() && seen.handler == seen.asked_handler;
        let isolation = self.isolation(&seen.handler, seen.own_kernel || !verified);
        let container_id = seen.container.as_ref().map(|c| c.id.clone()).unwrap_or_default();
        let since = match &found.observed {
            Observed::Running(since) => *since,
            Observed::Created | Observed::Ended(_) | Observed::Unknown => None,
        };
        entry.touch();
        entry.recovery = None;
        entry.launched = true;
        entry.state = State::Running;
        let status = &mut entry.status;
        status.sandbox_id = Some(seen.sandbox_id.clone());
        status.container_id = Some(container_id.clone());
        status.handler = Some(seen.handler.clone());
        status.ip = found.ip;
        status.image_digest = images::digest(&entry.workload.spec.image, &[found.image_ref]);
        status.isolation = isolation;
        status.started_at = since;
        status.observed_at = Timestamp::now();
        (status.reason, status.message) = (None, None);
        // The wall clock may have jumped, so it can shorten the time to live, and never lengthen it.
        let ran_ms = since.map_or(0, |since| Timestamp::now().as_millis().saturating_sub(since.as_millis()));
        let is_ttl_known = entry.ttl.is_some();
        entry.ran_since = entry.ran_since.or(since);
        entry.began_to_run(seen.own_kernel);
        if !is_ttl_known {
            entry.ttl = entry.workload.spec.ttl_ms.map(|ms| Deadline::within_ms(ms.saturating_sub(ran_ms), "ttl"));
        }
        entry.made = Some(Made { sandbox_id: seen.sandbox_id.clone(), container_id, retired: false });
        if !verified {
            let message = format!("asked for a sandbox of handler {:?}, the runtime reports {:?}", seen.asked_handler, seen.handler);
            entry.wanted = Wanted::Stop { reason: Reason::IsolationMismatch, message: Some(message) };
        }
        if let Observed::Ended(ending) = found.observed {
            entry.ended(ending);
        }
        inner.entries.insert(id.clone(), entry);
        self.publish(&mut inner, &id, if is_new { EventKind::Added } else { EventKind::Modified });
    }

    /// The container of a start that another agent began was made and not started, as far as can be seen. Whether that was long
    /// enough ago to know that it never will be.
    pub fn is_past_doubt(&self, id: &WorkloadId) -> bool {
        let mut inner = self.lock();
        let recovery = inner.entries.get_mut(id).and_then(|entry| entry.recovery.as_mut());
        let is_past = |recovery: &mut Recovery| {
            recovery.doubt.get_or_insert_with(|| Deadline::within_ms(limits::LAUNCH_DOUBT_MS, "doubt")).left().is_err()
        };
        recovery.is_some_and(is_past)
    }

    /// The runtime was listed, and nothing of this journal's entry is left to be found there but `leftover`. `never_ran`: its
    /// container is there, and was not started.
    pub fn recovered(&self, id: &WorkloadId, leftover: Option<&Seen>, never_ran: bool) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id).filter(|entry| entry.recovery.is_some()) else { return };
        entry.recovery = None;
        entry.start_deadline =
            Deadline::within_ms(entry.restart.map_or(0, |r| r.left_ms()).saturating_add(entry.workload.spec.start_deadline_ms), "start");
        if entry.state == State::Pending {
            entry.hold();
            if let Some(seen) = leftover {
                let container_id = seen.container.as_ref().map(|c| c.id.clone()).unwrap_or_default();
                entry.made = Some(Made { sandbox_id: seen.sandbox_id.clone(), container_id, retired: false });
            }
            match entry.wanted.clone() {
                // It may have run, and what came of it is gone.
                Wanted::Run if entry.launched && !never_ran => entry.lost(),
                // The name of the attempt before may still be taken.
                Wanted::Run if entry.restart.is_none() || leftover.is_some_and(|seen| seen.attempt >= entry.status.attempt) => {
                    entry.launched = false;
                    entry.status.attempt = entry.status.attempt.max(leftover.map_or(0, |seen| seen.attempt)).saturating_add(1);
                }
                Wanted::Run | Wanted::Delete => {}
                Wanted::Stop { reason, message } => entry.give_up(reason, message.unwrap_or_else(|| "stopped before it ran".into())),
            }
        }
        entry.work = Work::Idle;
        self.publish(&mut inner, id, EventKind::Modified);
    }
}

fn batch(inner: &Inner, ids: Vec<WorkloadId>, whole: bool, endpoint: impl Fn(usize) -> String) -> Batch {
    let mut batch = Batch { records: Vec::new(), about: Vec::new() };
    for id in ids {
        let Some(entry) = inner.entries.get(&id) else { continue };
        batch.about.push((id.clone(), Arc::clone(&entry.uid), entry.ledger.change));
        if entry.ledger.is_forgotten {
            // A whole new file does not need to be told.
            batch.records.extend((!whole).then(|| Record::Forget { id: id.to_string() }));
            continue;
        }
        if whole || !entry.ledger.is_accept_saved {
            batch.records.push(Record::Accept(Box::new(accepted(entry, endpoint(entry.endpoint)))));
        }
        batch.records.push(Record::Update(Box::new(update(entry, &inner.boot_id))));
    }
    batch
}

fn accepted(entry: &Entry, endpoint: String) -> Accepted {
    let Class { name: _, handler, own_kernel, annotations, overhead_mb, memory_mb_min: _, sandbox_ms_max } = (*entry.class).clone();
    Accepted {
        id: entry.workload.id.to_string(),
        uid: entry.uid.to_string(),
        workload: to_map(&entry.workload),
        is_env_known: entry.is_env_known,
        endpoint,
        class: SavedClass { handler, own_kernel, annotations, overhead_mb, sandbox_ms_max },
    }
}

fn update(entry: &Entry, boot_id: &str) -> record::Update {
    let at = |deadline: Deadline| uptime_ms().saturating_add(deadline.left_ms());
    Update {
        id: entry.workload.id.to_string(),
        wanted: entry.wanted.clone(),
        state: entry.state,
        status: entry.status.clone(),
        launched: entry.launched,
        retired: entry.made.as_ref().is_some_and(|made| made.retired),
        streak: entry.streak,
        restart_at: entry.restart.map(at),
        ttl_at: entry.ttl.map(at),
        ailing: entry.ailing.clone(),
        ran_since: entry.ran_since,
        asked_to_stop: entry.asked_to_stop,
        boot_id: if entry.is_rebooted { String::new() } else { boot_id.to_owned() },
    }
}
