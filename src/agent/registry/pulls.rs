//! Starts that wait for their image: no worker holds them, and [`crate::agent::images`] brings each back when it is there.
//!
//! Such a workload is Pending in phase Pulling. It can be stopped or deleted like one that waits in a queue, and its start deadline
//! ends it like one.

use std::sync::atomic::Ordering;

use super::entry::{Entry, Work};
use super::{Registry, StartTicket, Wanted};
use crate::cri::images::Image;
use crate::cri::runtime::{StartError, cancelled};
use crate::deadline::Stopwatch;
use crate::wire::agent::EventKind;
use crate::workload::{Phase, Reason, WorkloadId};

impl StartTicket<'_> {
    /// Whose.
    pub fn id(&self) -> &WorkloadId {
        &self.id
    }

    /// Gives the start up until [`Registry::finish_pull`]; whether it is to be waited for. Whoever parks it sees to that.
    pub fn park(mut self) -> bool {
        self.is_over = true;
        let mut inner = self.registry.lock();
        let Some(entry) = inner.entries.get_mut(&self.id) else { return false };
        if entry.wanted != Wanted::Run || self.cancel.load(Ordering::SeqCst) {
            drop(inner);
            self.registry.finish_start(&self.id, Err(cancelled()));
            return false;
        }
        entry.work = Work::Pulling;
        entry.pull = Some(Stopwatch::start());
        entry.status.phase = Some(Phase::Pulling);
        self.registry.publish(&mut inner, &self.id, EventKind::Modified);
        true
    }
}

impl Registry {
    /// Whether this acceptance of a workload waits for its image.
    pub fn is_pulling(&self, id: &WorkloadId, uid: &str) -> bool {
        self.lock().entries.get(id).is_some_and(|entry| *entry.uid == *uid && entry.work == Work::Pulling)
    }

    /// Records that a pull failed that is tried again. What went wrong first says more than what went wrong last.
    pub fn note_pull(&self, id: &WorkloadId, uid: &str, reason: Reason, message: &str) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id).filter(|entry| *entry.uid == *uid && entry.work == Work::Pulling) else { return };
        if entry.status.message.is_none() {
            entry.status.reason = Some(reason);
            entry.status.message = Some(message.to_owned());
            entry.is_pull_noted = true;
        }
        entry.status.last_error = Some(message.to_owned());
        self.publish(&mut inner, id, EventKind::Modified);
    }

    /// Brings a start back whose image is there, or ends it. One that waits no more is passed over.
    pub fn finish_pull(&self, id: &WorkloadId, uid: &str, result: Result<Image, StartError>) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id).filter(|entry| *entry.uid == *uid && entry.work == Work::Pulling) else { return };
        entry.work = Work::Idle;
        match result {
            Ok(image) => {
                entry.pull_ms = entry.pull_ms.saturating_add(entry.pull.take().map_or(0, |pull| pull.elapsed_ms()));
                entry.image = Some(image);
                if std::mem::take(&mut entry.is_pull_noted) {
                    // The trouble with the pull is over; what the start may fail of now has a cause of its own.
                    entry.status.reason = None;
                    entry.status.message = None;
                }
            }
            Err(error) => {
                entry.hold();
                entry.fail_start(error.reason, error.message);
            }
        }
        self.publish(&mut inner, id, EventKind::Modified);
    }

    /// What all workloads here need: the names of their images as runtimes list them, and the ids of those that were pulled for a
    /// start that waits for its worker; each with the place of the runtime among the endpoints.
    pub fn images(&self) -> Vec<(usize, String)> {
        let inner = self.lock();
        let names = |entry: &Entry| [Some(entry.workload.spec.image.listed()), entry.image.as_ref().map(|image| image.id.clone())];
        inner.entries.values().flat_map(|entry| names(entry).into_iter().flatten().map(|name| (entry.endpoint, name))).collect()
    }
}
