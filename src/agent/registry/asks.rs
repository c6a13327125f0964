//! What clients ask of the registry: to take a workload, to end it, to forget it, to label it anew.
//!
//! A request may come late: its sender gave up waiting and asked for something else since, over another connection. A sender that
//! numbers its requests (`fence`) is protected: of the requests about one id, one with a lower number than the highest seen is refused.
//! The numbers are forgotten with the process, and so are the connections that a late request could come from.
//!
//! Invariant: a number is noted, and compared, under the lock under which its request is done.

use super::*;

/// A request with a higher number was seen: this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overtaken(pub u64);

/// Why a workload is not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The id is taken by another workload.
    Differs,
    /// There are as many workloads, or as large ones, as one agent keeps.
    Full,
    /// The id's former workload is still being deleted.
    Leaving,
    /// It and its overhead ask for more memory than the others leave, MiB.
    Memory {
        /// What it asks for.
        wants: u64,
        /// What they leave.
        free: u64,
    },
    /// A later request about the id was seen.
    Overtaken(Overtaken),
}

impl From<Overtaken> for Refusal {
    fn from(overtaken: Overtaken) -> Self {
        Self::Overtaken(overtaken)
    }
}

/// The highest number seen of each id.
#[derive(Default)]
pub(super) struct Fences(BTreeMap<WorkloadId, u64>);

impl Fences {
    /// Notes a number, unless a higher one was seen. Beyond `FENCES_MAX` ids the lowest number of all is forgotten.
    fn pass(&mut self, id: &WorkloadId, fence: Option<u64>) -> Result<(), Overtaken> {
        let Some(fence) = fence else { return Ok(()) };
        if let Some(highest) = self.0.get_mut(id) {
            if fence < *highest {
                return Err(Overtaken(*highest));
            }
            *highest = fence;
            return Ok(());
        }
        if self.0.len() >= limits::FENCES_MAX {
            let lowest = self.0.iter().min_by_key(|(_, fence)| **fence).map(|(id, _)| id.clone());
            lowest.and_then(|lowest| self.0.remove(&lowest));
        }
        self.0.insert(id.clone(), fence);
        Ok(())
    }
}

impl Registry {
    /// Accepts a workload of a class that the runtime `endpoint` makes, or finds that it is here already. Nobody is to be told
    /// before [`Registry::settled`].
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn accept(&self, workload: Workload, class: Class, endpoint: usize, fence: Option<u64>) -> Result<(State, Status), Refusal> {
        let mut inner = self.lock();
        inner.fences.pass(&workload.id, fence)?;
        if let Some(answer) = self.present_in(&mut inner, &workload) {
            return answer;
        }
        let id = workload.id.clone();
        let mut entry = Entry::new(workload, &crate::report::random_id(), class, endpoint, Status::accepted(Some(self.node.to_string())));
        entry.hold();
        let specs_bytes = inner.specs_bytes.saturating_add(entry.spec_bytes);
        if inner.entries.len() >= limits::AGENT_WORKLOADS_MAX || specs_bytes > limits::AGENT_SPECS_BYTES_MAX {
            return Err(Refusal::Full);
        }
        if let Some(memory_mb_max) = self.memory_mb_max {
            let free = memory_mb_max.saturating_sub(allocated_in(&inner).memory_mb);
            let wants = memory_mb(&entry);
            if wants > free {
                return Err(Refusal::Memory { wants, free });
            }
        }
        let answer = (entry.state, entry.status.clone());
        inner.specs_bytes = specs_bytes;
        inner.entries.insert(id.clone(), entry);
        self.publish(&mut inner, &id, EventKind::Added);
        Ok(answer)
    }

    /// The state of a workload that was asked for before in the same words; `None` when the id is free.
    ///
    /// # Errors
    /// [`Refusal`], when it was asked for in others, or is on its way out.
    pub fn present(&self, workload: &Workload, fence: Option<u64>) -> Option<Result<(State, Status), Refusal>> {
        let mut inner = self.lock();
        match inner.fences.pass(&workload.id, fence) {
            Ok(()) => self.present_in(&mut inner, workload),
            Err(overtaken) => Some(Err(overtaken.into())),
        }
    }

    /// How an entry that is there answers a request to accept.
    fn present_in(&self, inner: &mut Inner, workload: &Workload) -> Option<Result<(State, Status), Refusal>> {
        let entry = inner.entries.get_mut(&workload.id)?;
        if entry.wanted == Wanted::Delete {
            return Some(Err(Refusal::Leaving));
        }
        if !is_same(entry, workload) {
            return Some(Err(Refusal::Differs));
        }
        if !entry.is_env_known {
            entry.hold();
            entry.workload = Arc::new(workload.clone());
            entry.is_env_known = true;
            entry.ledger.is_accept_saved = false;
            self.publish(inner, &workload.id, EventKind::Modified);
        }
        inner.entries.get(&workload.id).map(|entry| entry.seen()).map(Ok)
    }

    /// Asks for a workload's end; `None` when there is no such workload.
    ///
    /// # Errors
    /// [`Overtaken`].
    pub fn stop(&self, id: &WorkloadId, fence: Option<u64>) -> Result<Option<(State, Status)>, Overtaken> {
        let mut inner = self.lock();
        inner.fences.pass(id, fence)?;
        Ok(self.want_stop_in(&mut inner, id, Reason::Stopped, None))
    }

    /// Ends a workload because of what was found out about it. One that does not run yet ends at once.
    pub fn want_stop(&self, id: &WorkloadId, reason: Reason, message: Option<String>) {
        self.want_stop_in(&mut self.lock(), id, reason, message);
    }

    fn want_stop_in(&self, inner: &mut Inner, id: &WorkloadId, reason: Reason, message: Option<String>) -> Option<(State, Status)> {
        let entry = inner.entries.get_mut(id)?;
        if entry.wanted == Wanted::Run && !entry.state.is_terminal() {
            entry.hold();
            entry.wanted = Wanted::Stop { reason, message: message.clone() };
            entry.retry = None;
            entry.stopping = Some(Stopwatch::start());
            entry.cancel.store(true, Ordering::SeqCst);
            if entry.state == State::Pending && entry.work != Work::Doing && entry.recovery.is_none() {
                entry.work = Work::Idle;
                entry.give_up(reason, message.unwrap_or_else(|| "stopped before it ran".into()));
            } else {
                entry.status.phase = Some(Phase::Stopping);
            }
            self.publish(inner, id, EventKind::Modified);
        }
        inner.entries.get(id).map(|entry| entry.seen())
    }

    /// Replaces the labels of a workload; `None` when there is no such workload.
    ///
    /// # Errors
    /// [`Overtaken`].
    pub fn update_labels(
        &self,
        id: &WorkloadId,
        labels: BTreeMap<String, String>,
        fence: Option<u64>,
    ) -> Result<Option<(State, Status)>, Overtaken> {
        let mut inner = self.lock();
        inner.fences.pass(id, fence)?;
        let Some(entry) = inner.entries.get_mut(id) else { return Ok(None) };
        if entry.workload.spec.labels != labels {
            entry.hold();
            let mut workload = entry.workload.as_ref().clone();
            workload.spec.labels = labels;
            entry.workload = Arc::new(workload);
            entry.ledger.is_accept_saved = false;
            self.publish(&mut inner, id, EventKind::Modified);
        }
        Ok(inner.entries.get(id).map(|entry| entry.seen()))
    }

    /// Asks for a workload to be removed and forgotten; whether there is one.
    ///
    /// # Errors
    /// [`Overtaken`].
    pub fn delete(&self, id: &WorkloadId, fence: Option<u64>) -> Result<bool, Overtaken> {
        let mut inner = self.lock();
        inner.fences.pass(id, fence)?;
        let Some(entry) = inner.entries.get_mut(id) else { return Ok(false) };
        if entry.wanted != Wanted::Delete {
            entry.hold();
            entry.wanted = Wanted::Delete;
            entry.retry = None;
            entry.stopping.get_or_insert_with(Stopwatch::start);
            entry.cancel.store(true, Ordering::SeqCst);
            entry.status.phase = Some(Phase::Stopping);
            if matches!(entry.work, Work::Pulling | Work::Queued(_)) {
                // What it waits for is not what it needs any more; a stale place in a queue is passed over.
                entry.work = Work::Idle;
            }
            self.publish(&mut inner, id, EventKind::Modified);
        }
        Ok(true)
    }

    /// Waits until what was asked of a workload is on disk. One that is gone by then was removed; or, where it was to be accepted
    /// (`is_new`), was not.
    ///
    /// # Errors
    /// Why it is not.
    pub fn settled(&self, id: &WorkloadId, is_new: bool) -> Result<(), String> {
        let deadline = Deadline::within_ms(limits::JOURNAL_MS_MAX, "journal");
        let mut inner = self.lock();
        loop {
            let why = |inner: &Inner, otherwise: &str| inner.trouble.clone().unwrap_or_else(|| otherwise.to_owned());
            match inner.entries.get_mut(id) {
                None if is_new => return Err(why(&inner, "it could not be written a moment ago, or was deleted meanwhile")),
                None => return Ok(()),
                Some(entry) if entry.ledger.is_settled() => return Ok(()),
                // An agent that stops writes all of it down first, so there is no other answer until then.
                Some(entry) if deadline.left().is_err() => {
                    if !entry.is_visible() {
                        // It may still be written. What is refused now must not run then.
                        entry.hold();
                        entry.wanted = Wanted::Delete;
                        inner.mark(id);
                    }
                    return Err(why(&inner, "the disk is too slow"));
                }
                Some(_) => inner = self.wait_changed(inner, deadline.left().unwrap_or_default()),
            }
        }
    }
}

/// Whether the same was asked for before. After an adoption the values of the environment are unknown, and only its names count.
fn is_same(entry: &Entry, workload: &Workload) -> bool {
    if entry.is_env_known {
        return *entry.workload == *workload;
    }
    let mut known = (*entry.workload).clone();
    let names_agree = known.spec.env.keys().eq(workload.spec.env.keys());
    known.spec.env.clone_from(&workload.spec.env);
    names_agree && known == *workload
}
