//! The last changes, for those who follow them: a bounded history, of which every follower reads at its own pace.
//!
//! Nothing is queued for anybody. A follower that is so slow that what it should read next is gone is told so and cut off, and one
//! that comes back after that long is told to list again.
//!
//! Invariant: changes kept <= `EVENTS_MAX`, their weight <= `EVENTS_BYTES_MAX`.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::Value;

use super::Record;
use crate::deadline::Timestamp;
use crate::limits;
use crate::wire::status::{Isolation, Status};

/// A record was inserted (no `before`), changed, or removed (no `after`).
#[derive(Debug)]
pub(in super::super) struct Change {
    pub(in super::super) revision: u64,
    pub(in super::super) time: Timestamp,
    pub(in super::super) before: Option<Arc<Record>>,
    pub(in super::super) after: Option<Arc<Record>>,
}

impl Change {
    /// What it keeps in memory, about.
    fn weight(&self) -> usize {
        const RECORD_BYTES: usize = 1024;
        let spec = |record: &Record| {
            let spec = &record.workload.spec;
            let words = spec.command.iter().chain(&spec.args).map(String::len).sum::<usize>();
            let env = spec.env.iter().map(|(key, value)| key.len().saturating_add(value.expose().len())).sum::<usize>();
            let pairs = spec.labels.iter().chain(&spec.node_selector);
            let labels = pairs.map(|(key, value)| key.len().saturating_add(value.len())).sum::<usize>();
            let mounts = spec.mounts.iter().map(|mount| mount.source.len().saturating_add(mount.target.len())).sum::<usize>();
            words.saturating_add(env).saturating_add(labels).saturating_add(mounts)
        };
        let record = |record: &Record| {
            let Status { message, node, sandbox_id, container_id, image_digest, ip, handler, isolation, placement, last_error, .. } =
                &record.status;
            let Isolation { handler: found, kernel, host_kernel, message: doubt, verified: _ } = isolation;
            let texts = [message, node, sandbox_id, container_id, image_digest, ip, handler, found, kernel, host_kernel, doubt, last_error];
            let status = texts.into_iter().flatten().map(String::len).sum::<usize>();
            let text_of = |why: &Value| why.as_str().map_or(0, str::len);
            let rejected = placement.rejected.iter().map(|(node, why)| node.len().saturating_add(text_of(why))).sum::<usize>();
            RECORD_BYTES.saturating_add(status).saturating_add(rejected).saturating_add(spec(record))
        };
        self.before.as_deref().map_or(0, record).saturating_add(self.after.as_deref().map_or(0, record))
    }
}

/// What a follower gets next.
#[derive(Debug)]
pub(in super::super) enum Next {
    /// These.
    Changes(Vec<Arc<Change>>),
    /// What it should get is not kept any more, or never was.
    Gone,
    /// Nothing happened.
    Quiet,
}

/// Which revisions one can go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Kept {
    pub(in super::super) oldest: u64,
    pub(in super::super) newest: u64,
}

/// The last changes, in the order of their revisions.
#[derive(Debug)]
pub(super) struct History {
    changes: VecDeque<Arc<Change>>,
    weight: usize,
    /// All that happened after this is kept.
    oldest: u64,
    newest: u64,
}

impl History {
    /// Nothing happened since `revision`.
    pub(super) fn since(revision: u64) -> Self {
        Self { changes: VecDeque::new(), weight: 0, oldest: revision, newest: revision }
    }

    pub(super) fn push(&mut self, change: Change) {
        self.newest = change.revision;
        self.weight = self.weight.saturating_add(change.weight());
        self.changes.push_back(Arc::new(change));
        while self.changes.len() > limits::EVENTS_MAX || self.weight > limits::EVENTS_BYTES_MAX {
            let Some(gone) = self.changes.pop_front() else { return };
            self.weight = self.weight.saturating_sub(gone.weight());
            self.oldest = gone.revision;
        }
    }

    pub(super) fn kept(&self) -> Kept {
        Kept { oldest: self.oldest, newest: self.newest }
    }

    /// The first changes after `revision`.
    pub(super) fn after(&self, revision: u64) -> Next {
        if !(self.oldest..=self.newest).contains(&revision) {
            return Next::Gone;
        }
        let start = self.changes.partition_point(|change| change.revision <= revision);
        let next: Vec<Arc<Change>> = self.changes.iter().skip(start).take(limits::EVENTS_BATCH_MAX).map(Arc::clone).collect();
        if next.is_empty() { Next::Quiet } else { Next::Changes(next) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    fn change(revision: u64, record: &Arc<Record>) -> Change {
        Change { revision, time: Timestamp::now(), before: None, after: Some(Arc::clone(record)) }
    }

    fn revisions(next: Next) -> Vec<u64> {
        match next {
            Next::Changes(changes) => changes.iter().map(|change| change.revision).collect(),
            Next::Gone => panic!("gone"),
            Next::Quiet => Vec::new(),
        }
    }

    #[test]
    fn a_follower_gets_each_change_once_and_in_order() {
        let mut history = History::since(100);
        let record = Arc::new(record("a"));
        assert!(revisions(history.after(100)).is_empty());
        for revision in [101, 103, 104] {
            history.push(change(revision, &record));
        }
        assert_eq!(revisions(history.after(100)), [101, 103, 104]);
        assert_eq!(revisions(history.after(102)), [103, 104]);
        assert!(revisions(history.after(104)).is_empty());
        for strange in [99, 105, 0, u64::MAX] {
            assert!(matches!(history.after(strange), Next::Gone), "{strange}");
        }
        (105..300).for_each(|revision| history.push(change(revision, &record)));
        assert_eq!(revisions(history.after(100)).len(), limits::EVENTS_BATCH_MAX);
    }

    #[test]
    fn what_is_kept_is_bounded_by_count_and_by_weight() {
        let mut history = History::since(0);
        let small = Arc::new(record("a"));
        let count = u64::try_from(limits::EVENTS_MAX).expect("small");
        (1..=count).for_each(|revision| history.push(change(revision, &small)));
        assert_eq!(history.kept(), Kept { oldest: 0, newest: count });
        history.push(change(count + 1, &small));
        assert_eq!(history.kept(), Kept { oldest: 1, newest: count + 1 });
        assert!(matches!(history.after(0), Next::Gone));

        let mut large = record("b");
        large.status.message = Some("x".repeat(limits::EVENTS_BYTES_MAX / 2));
        let large = Arc::new(large);
        history.push(change(count + 2, &large));
        assert!(history.kept().oldest > 1);
        history.push(change(count + 3, &large));
        assert_eq!(history.kept(), Kept { oldest: count + 2, newest: count + 3 });
        let mut kernel = super::super::tests::record("c");
        kernel.status.isolation.kernel = Some("x".repeat(limits::EVENTS_BYTES_MAX / 2));
        history.push(change(count + 4, &Arc::new(kernel)));
        assert_eq!(history.kept(), Kept { oldest: count + 3, newest: count + 4 }, "every text counts");
    }
}
