//! What the control plane has accepted: the trait [`Store`], and a store in memory.
//!
//! Every operation is one whole transition, so that a store on disk can make each a transaction. *Not here*: agents, HTTP.
//!
//! Invariant: records <= `STORE_WORKLOADS_MAX`, ended ones included.
//! Invariant: a terminal state never changes, whatever an agent says ([`Record::observed`]).
//! Invariant: a record is replaced, never changed in place; who holds one holds a moment of it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};

use crate::deadline::Timestamp;
use crate::limits;
use crate::report::clip;
use crate::wire::agent::Object;
use crate::wire::status::{Placement, Status};
use crate::wire::workload::to_map;
use crate::workload::{Draft, Name, Phase, Reason, State, Workload, WorkloadId};

/// What clients want of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Desired {
    /// Gone, and forgotten.
    Deleted,
    /// Started once; its end is its own matter.
    Run,
    /// Ended, and remembered.
    Stopped,
}

/// A workload, where it is placed, what is wanted of it, and the last truth about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) workload: Arc<Workload>,
    pub(super) node: Name,
    pub(super) desired: Desired,
    /// Its agent answered for it, and did not say since that it knows nothing of it.
    pub(super) is_known: bool,
    pub(super) state: State,
    pub(super) status: Status,
    /// The revision it was inserted at: tells it from an earlier or later one with the same id.
    pub(super) born: u64,
    /// Grows with every change the store takes.
    pub(super) revision: u64,
}

impl Record {
    /// A record of a workload that was placed just now.
    pub(super) fn new(workload: Workload, node: Name, rejected: Map<String, Value>) -> Self {
        let mut status = Status::accepted(Some(node.to_string()));
        status.placement = Placement { rejected };
        Self {
            workload: Arc::new(workload),
            node,
            desired: Desired::Run,
            is_known: false,
            state: State::Pending,
            status,
            born: 0,
            revision: 0,
        }
    }

    /// Whether `draft` asks for this very workload; a class that a profile chose is not asked for.
    pub(super) fn is_for(&self, draft: &Draft) -> bool {
        let Workload { id, runtime_class, security_profile, spec } = &*self.workload;
        draft.id.as_ref() == Some(id)
            && draft.runtime_class.as_ref().is_none_or(|class| class == runtime_class)
            && draft.security_profile == *security_profile
            && draft.spec == *spec
    }

    /// The record after its agent said this; `None` when it contradicts what is known already, or is older and no step forward.
    pub(super) fn observed(&self, state: State, status: Status) -> Option<Self> {
        let is_no_news = self.is_known && is_stale(&status, &self.status) && state <= self.state;
        if is_no_news || !self.state.may_become(state) {
            return None;
        }
        // Who placed it when, and why there, is known here and not there.
        let placed = Status {
            node: Some(self.node.to_string()),
            created_at: self.status.created_at,
            placement: self.status.placement.clone(),
            ..status
        };
        Some(Self { is_known: true, ..self.with(state, placed) })
    }

    /// The record with the last thing that went wrong; the truth stays as old as it is.
    pub(super) fn troubled(&self, error: String) -> Self {
        self.with(self.state, Status { last_error: Some(clip(error, limits::MESSAGE_BYTES_MAX)), ..self.status.clone() })
    }

    /// The record, failed without ever having run.
    pub(super) fn failed(&self, reason: Reason, message: String) -> Self {
        let now = Timestamp::now();
        let message = Some(clip(message, limits::MESSAGE_BYTES_MAX));
        let status = Status { reason: Some(reason), message, phase: None, finished_at: Some(now), observed_at: now, ..self.status.clone() };
        self.with(State::Failed, status)
    }

    fn with(&self, state: State, status: Status) -> Self {
        let Self { workload, node, desired, is_known, born, revision, .. } = self;
        let (workload, node) = (Arc::clone(workload), node.clone());
        Self { workload, node, desired: *desired, is_known: *is_known, state, status, born: *born, revision: *revision }
    }

    /// As every answer shows it.
    pub(super) fn object(&self) -> Object {
        let mut status = Box::new(self.status.clone());
        let is_ending = match self.desired {
            Desired::Deleted => true,
            Desired::Run => false,
            Desired::Stopped => !self.state.is_terminal(),
        };
        if is_ending {
            status.phase = Some(Phase::Stopping);
        }
        Object { state: self.state, status, spec: to_map(&self.workload) }
    }
}

/// An event may arrive behind the answer to a later question. A node whose clock was set back is believed again after a minute.
fn is_stale(new: &Status, old: &Status) -> bool {
    const CLOCK_SET_BACK_MS: u64 = 60_000;
    new.observed_at < old.observed_at && new.observed_at >= old.observed_at.minus_ms(CLOCK_SET_BACK_MS)
}

/// Why the store did not take a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Error {
    /// It keeps as many workloads as it may.
    Full,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => write!(f, "{} workloads are kept, ended ones included; delete some", limits::STORE_WORKLOADS_MAX),
        }
    }
}

impl std::error::Error for Error {}

/// What became of an insertion.
#[derive(Debug)]
pub(super) enum Insertion {
    /// The id is taken, by this.
    Existing(Arc<Record>),
    /// It is kept.
    Inserted(Arc<Record>),
}

/// Some records in the order of their ids.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) records: Vec<Arc<Record>>,
    /// Whether more would have followed.
    pub(super) has_more: bool,
}

/// Keeps records.
pub(super) trait Store: Send + Sync {
    /// Keeps a record, unless its id is taken.
    fn insert(&self, record: Record) -> Result<Insertion, Error>;

    /// The record of this id.
    fn get(&self, id: &WorkloadId) -> Option<Arc<Record>>;

    /// Replaces a record by what `change` makes of it, or leaves it where that is `None`; the record as it is then.
    fn update(&self, id: &WorkloadId, change: &mut dyn FnMut(&Record) -> Option<Record>) -> Result<Option<Arc<Record>>, Error>;

    /// Forgets the record of this id that was inserted at revision `born`, if it is still there.
    fn remove(&self, id: &WorkloadId, born: u64) -> Result<(), Error>;

    /// The first `limit` records behind `after` that pass `filter`.
    fn page(&self, after: Option<&WorkloadId>, limit: usize, filter: &dyn Fn(&Record) -> bool) -> Page;

    /// How many there are in each state.
    fn counts(&self) -> Vec<(State, usize)>;
}

/// A store that forgets everything with its process.
#[derive(Debug, Default)]
pub(super) struct MemoryStore(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    records: BTreeMap<WorkloadId, Arc<Record>>,
    revision: u64,
}

impl MemoryStore {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        // A panic in `change` or `filter` leaves the map as it was.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn insert(&self, mut record: Record) -> Result<Insertion, Error> {
        let mut kept = self.lock();
        if let Some(existing) = kept.records.get(&record.workload.id) {
            return Ok(Insertion::Existing(Arc::clone(existing)));
        }
        if kept.records.len() >= limits::STORE_WORKLOADS_MAX {
            return Err(Error::Full);
        }
        kept.revision += 1;
        (record.born, record.revision) = (kept.revision, kept.revision);
        let record = Arc::new(record);
        kept.records.insert(record.workload.id.clone(), Arc::clone(&record));
        Ok(Insertion::Inserted(record))
    }

    fn get(&self, id: &WorkloadId) -> Option<Arc<Record>> {
        self.lock().records.get(id).map(Arc::clone)
    }

    fn update(&self, id: &WorkloadId, change: &mut dyn FnMut(&Record) -> Option<Record>) -> Result<Option<Arc<Record>>, Error> {
        let mut kept = self.lock();
        let Kept { records, revision } = &mut *kept;
        let Some(record) = records.get_mut(id) else { return Ok(None) };
        if let Some(next) = change(record) {
            *revision += 1;
            *record = Arc::new(Record { revision: *revision, ..next });
        }
        Ok(Some(Arc::clone(record)))
    }

    fn remove(&self, id: &WorkloadId, born: u64) -> Result<(), Error> {
        let mut kept = self.lock();
        if kept.records.get(id).is_some_and(|record| record.born == born) {
            kept.records.remove(id);
        }
        Ok(())
    }

    fn page(&self, after: Option<&WorkloadId>, limit: usize, filter: &dyn Fn(&Record) -> bool) -> Page {
        let kept = self.lock();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut passing = kept.records.range::<WorkloadId, _>((start, Bound::Unbounded)).map(|(_, record)| record).filter(|r| filter(r));
        let records = passing.by_ref().take(limit).map(Arc::clone).collect();
        Page { records, has_more: passing.next().is_some() }
    }

    fn counts(&self) -> Vec<(State, usize)> {
        let kept = self.lock();
        let count = |state: &State| (*state, kept.records.values().filter(|record| record.state == *state).count());
        State::ALL.iter().map(count).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::wire::{json, workload};

    /// A draft of this body.
    pub(crate) fn draft(body: &str) -> Draft {
        json::parse(body.as_bytes()).and_then(workload::draft).expect("a workload")
    }

    /// A record of a workload of this id on node-1.
    pub(crate) fn record(id: &str) -> Record {
        let name = |text| Name::new(text).expect("a name");
        let workload = draft(r#"{"image":"busybox"}"#).resolve(WorkloadId::new(id).expect("an id"), name("gvisor"));
        Record::new(workload, name("node-1"), Map::new())
    }

    fn id(text: &str) -> WorkloadId {
        WorkloadId::new(text).expect("an id")
    }

    fn inserted(store: &MemoryStore, id: &str) -> Arc<Record> {
        match store.insert(record(id)) {
            Ok(Insertion::Inserted(record)) => record,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_id_is_taken_once_and_free_again_when_removed() {
        let store = MemoryStore::default();
        let first = inserted(&store, "a");
        assert!(matches!(store.insert(record("a")), Ok(Insertion::Existing(r)) if r == first));
        store.remove(&id("a"), first.born).expect("removed");
        let second = inserted(&store, "a");
        store.remove(&id("a"), first.born).expect("another one is there");
        assert_eq!(store.get(&id("a")), Some(second));
    }

    #[test]
    fn a_store_is_full_at_its_limit() {
        let store = MemoryStore::default();
        for i in 0..limits::STORE_WORKLOADS_MAX {
            inserted(&store, &format!("w{i}"));
        }
        assert_eq!(store.insert(record("more")).map(|_| ()), Err(Error::Full));
        assert!(matches!(store.insert(record("w7")), Ok(Insertion::Existing(_))));
        assert_eq!(
            store.counts(),
            [(State::Pending, limits::STORE_WORKLOADS_MAX), (State::Running, 0), (State::Succeeded, 0), (State::Failed, 0)]
        );
    }

    #[test]
    fn pages_follow_each_other() {
        let store = MemoryStore::default();
        for name in ["a", "b", "c", "d"] {
            inserted(&store, name);
        }
        let check = |after: Option<&str>, limit, skip: &str, expect: &[&str], has_more| {
            let after = after.map(id);
            let page = store.page(after.as_ref(), limit, &|r| r.workload.id.as_str() != skip);
            let ids: Vec<&str> = page.records.iter().map(|r| r.workload.id.as_str()).collect();
            assert_eq!((ids.as_slice(), page.has_more), (expect, has_more));
        };
        check(None, 2, "", &["a", "b"], true);
        check(Some("b"), 2, "", &["c", "d"], false);
        check(Some("a"), 2, "d", &["b", "c"], false);
        check(Some("bb"), 9, "", &["c", "d"], false);
        check(Some("d"), 9, "", &[], false);
    }

    #[test]
    fn a_change_is_whole_or_not_at_all() {
        let store = MemoryStore::default();
        let before = inserted(&store, "a");
        let unchanged = store.update(&id("a"), &mut |_| None).expect("stored");
        assert_eq!(unchanged, Some(Arc::clone(&before)));
        let after = store.update(&id("a"), &mut |r| Some(Record { desired: Desired::Stopped, ..r.clone() }));
        let after = after.expect("stored").expect("there");
        assert_eq!((after.desired, after.born), (Desired::Stopped, before.born));
        assert!(after.revision > before.revision);
        assert_eq!(store.update(&id("b"), &mut |_| panic!("nothing to change")), Ok(None));
    }

    #[test]
    fn terminal_stays_and_old_news_is_no_news() {
        let at = |text: &str| Status { observed_at: Timestamp::parse(text).expect("a time"), ..Status::accepted(None) };
        let fresh = record("a");
        // The agent's clock may be behind ours, so the first word of it always counts.
        let running = fresh.observed(State::Running, at("2020-01-01T00:00:10Z")).expect("news");
        assert_eq!((running.is_known, running.status.created_at), (true, fresh.status.created_at));
        assert_eq!(running.status.node.as_deref(), Some("node-1"));
        assert_eq!(running.observed(State::Pending, at("2020-01-01T00:00:09Z")), None);
        assert!(running.observed(State::Failed, at("2020-01-01T00:00:09Z")).is_some(), "an end is an end");
        assert!(running.observed(State::Running, at("2019-01-01T00:00:00Z")).is_some(), "the clock was set back");
        let ended = running.observed(State::Failed, at("2020-01-01T00:00:11Z")).expect("news");
        assert_eq!(ended.observed(State::Running, at("2020-01-01T00:00:12Z")), None);
        assert_eq!(ended.observed(State::Succeeded, at("2020-01-01T00:00:12Z")), None);
    }

    #[test]
    fn the_same_workload_is_recognised_however_its_class_was_chosen() {
        let name = |text| Name::new(text).ok();
        let by_profile = draft(r#"{"id":"a","image":"busybox","security_profile":"internal"}"#);
        let workload = by_profile.clone().resolve(id("a"), name("gvisor").expect("a name"));
        let record = Record::new(workload, name("n").expect("a name"), Map::new());
        assert!(record.is_for(&by_profile));
        assert!(record.is_for(&Draft { runtime_class: name("gvisor"), ..by_profile.clone() }));
        assert!(!record.is_for(&Draft { runtime_class: name("native"), ..by_profile.clone() }));
        assert!(!record.is_for(&Draft { security_profile: None, ..by_profile }));
        assert!(!record.is_for(&draft(r#"{"id":"a","image":"busybox:2","security_profile":"internal"}"#)));
    }

    #[test]
    fn what_is_ending_says_so() {
        let phase = |desired, state| Record { desired, state, ..record("a") }.object().status.phase;
        assert_eq!(phase(Desired::Run, State::Running), None);
        assert_eq!(phase(Desired::Stopped, State::Running), Some(Phase::Stopping));
        assert_eq!(phase(Desired::Stopped, State::Failed), None);
        assert_eq!(phase(Desired::Deleted, State::Failed), Some(Phase::Stopping));
    }
}
