//! What the control plane has accepted, and what it knows: an index in memory ([`Store`]) over a file ([`disk`]).
//!
//! ```text
//!   insert, wish, remove --> queue --> thread "store": batch, evaluate, one commit for all, publish --> answers
//!   note (what agents say) --> publish at once --> dirty --> with the next commit, or one of its own within 200 ms
//!   get, page, follow <-- what is published
//! ```
//! Every change is one whole transition. Only the thread `store` inserts, wishes and removes, so between a batch's evaluation and its
//! publication nothing but what agents say can change, and that is in the other half of a record.
//!
//! Invariant: what a client wished is published, answered, sent to an agent or shown to anybody only after the commit that holds it;
//! when the commit fails, nothing of it is published, and the rows it may have left are written again as they are published.
//! Invariant: what an agent said is on disk within `STORE_LAZY_MS` while the disk works. What a crash takes, the agent says again.
//! Invariant: that a workload ended is told only after the commit that holds it, unless the disk takes none.
//! Invariant: records <= `STORE_WORKLOADS_MAX`, ended ones included.
//! Invariant: revisions grow with every change published, and across restarts: a revision is told only below the mark on disk.
//! *Not here*: agents, HTTP.

mod commit;
pub(super) mod disk;
mod record;
pub(super) mod transfer;
pub(super) mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Bound;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};

use crate::deadline::{Deadline, Timestamp};
use crate::limits;
use crate::workload::{Desired, State, WorkloadId};
use commit::{Act, Order, Outcome};
use disk::{Disk, Loaded, StoreFile};
pub(super) use record::{LabelPatch, Record, Wish};
use watch::{Change, History, Kept, Next};

/// A truth that only grew younger is written when it is of another minute.
const AGE_KEPT_MS: u64 = 60_000;

/// Why the store did not take a change.
#[derive(Clone, Debug)]
pub(super) enum Error {
    /// It is closed, or its thread is gone.
    Closed,
    /// The disk did not take it.
    Disk(Arc<disk::Error>),
    /// It keeps as many workloads as it may.
    Full,
    /// The workload would have more labels than it may.
    Labels,
    /// All revisions that are reserved are used up, and the disk takes no reservation.
    Revisions,
    /// The disk did not answer in time; the change may be made yet.
    Slow,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the store is closed"),
            Self::Disk(error) if error.is_full() => f.write_str("the disk of the control plane is full"),
            Self::Disk(_) => f.write_str("the disk of the control plane failed"),
            Self::Full => write!(f, "the control plane keeps at most {} workloads; delete some that ended", limits::STORE_WORKLOADS_MAX),
            Self::Labels => write!(f, "a workload has at most {} labels", limits::LABELS_MAX),
            Self::Revisions => f.write_str("the disk of the control plane takes nothing"),
            Self::Slow => f.write_str("the disk of the control plane did not answer in time"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Disk(error) => Some(error.as_ref()),
            Self::Closed | Self::Full | Self::Labels | Self::Revisions | Self::Slow => None,
        }
    }
}

/// What became of an insertion.
#[derive(Debug)]
pub(super) enum Insertion {
    /// The id is taken by this one.
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
    /// The revision of the last change before that moment.
    pub(super) revision: u64,
}

/// Keeps records.
#[derive(Debug)]
pub(super) struct Store {
    shared: Arc<Shared>,
    /// Dropped to close.
    orders: Mutex<Option<Sender<Order>>>,
    /// Becomes disconnected when the thread is done.
    done: Receiver<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the store's thread and all others see.
#[derive(Debug)]
struct Shared {
    index: Mutex<Index>,
    /// Notified at every change, and at the close.
    changed: Condvar,
    /// Tells the thread that there is something to be written sometime.
    poke: Sender<()>,
}

#[derive(Debug)]
struct Index {
    records: BTreeMap<WorkloadId, Arc<Record>>,
    revision: u64,
    /// On disk: revisions up to this may be told.
    reserved: u64,
    /// Whose rows on disk are not as they are here.
    dirty: BTreeSet<WorkloadId>,
    history: History,
    followers: usize,
    is_closed: bool,
    /// Why the last commit failed.
    trouble: Option<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Index> {
        // A panic in `change` or `filter` leaves the map as it was.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poke(&self) {
        match self.poke.try_send(()) {
            // One is as good as many; and without the thread nothing is written any more.
            Ok(()) | Err(TrySendError::Full(()) | TrySendError::Disconnected(())) => {}
        }
    }
}

impl Index {
    /// Replaces, inserts or removes the record of an id, under the next revision.
    fn publish(&mut self, id: &WorkloadId, after: Option<Record>) -> Option<Arc<Record>> {
        self.revision += 1;
        let revision = self.revision;
        let after = after.map(|record| Arc::new(Record { revision, ..record }));
        let before = match &after {
            Some(record) => self.records.insert(id.clone(), Arc::clone(record)),
            None => self.records.remove(id),
        };
        self.history.push(Change { revision, time: Timestamp::now(), before, after: after.clone() });
        after
    }
}

impl Store {
    /// Opens the store of a data directory, or makes one.
    ///
    /// # Errors
    /// [`disk::Error`]
    pub(super) fn open(dir: &Path) -> Result<Self, disk::Error> {
        let (file, loaded) = StoreFile::open_or_make(dir)?;
        log::info!("the store in {} has {} workloads", dir.display(), loaded.records.len());
        Self::start(file, loaded)
    }

    /// A store that forgets everything with its process.
    #[cfg(test)]
    pub(super) fn forgetful() -> Self {
        Self::start(disk::NoDisk, Loaded::default()).expect("a thread")
    }

    fn start(disk: impl Disk + 'static, loaded: Loaded) -> Result<Self, disk::Error> {
        let Loaded { records, revision } = loaded;
        let records = records.into_iter().map(|stored| (stored.workload.id.clone(), Arc::new(Record::loaded(stored, revision))));
        let (poke, poked) = bounded(1);
        let index = Index {
            records: records.collect(),
            revision,
            // Nothing can be told until the first commit has reserved more.
            reserved: revision,
            dirty: BTreeSet::new(),
            history: History::since(revision),
            followers: 0,
            is_closed: false,
            trouble: None,
        };
        let shared = Arc::new(Shared { index: Mutex::new(index), changed: Condvar::new(), poke });
        let (orders, ordered) = bounded(limits::STORE_QUEUE_MAX);
        let (is_done, done) = bounded(0);
        let thread = commit::start(disk, Arc::clone(&shared), ordered, poked, is_done).map_err(disk::Error::Thread)?;
        Ok(Self { shared, orders: Mutex::new(Some(orders)), done, thread: Mutex::new(Some(thread)) })
    }

    /// Writes what is not on disk yet, and closes. Whoever asks for a change from now on hears that.
    pub(super) fn close(&self) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
        if self.done.recv_timeout(Duration::from_millis(limits::STORE_CLOSE_MS)) == Err(RecvTimeoutError::Timeout) {
            log::error!("the disk of the store does not answer; what agents said last may not be on it");
            return;
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("thread store had panicked");
        }
    }

    /// Keeps a record, unless its id is taken.
    pub(super) fn insert(&self, record: Record) -> Result<Insertion, Error> {
        match self.order(Act::Insert(Box::new(record)))? {
            Outcome::Inserted(record) => Ok(Insertion::Inserted(record)),
            Outcome::Existing(record) => Ok(Insertion::Existing(record)),
            Outcome::Gone | Outcome::Refused => Err(Error::Full),
        }
    }

    /// Does as a client wishes; the record as it is then, or `None` when there is none that was inserted at `born`.
    pub(super) fn wish(&self, id: &WorkloadId, born: u64, wish: Wish) -> Result<Option<Arc<Record>>, Error> {
        match self.order(Act::Wish { id: id.clone(), born, wish })? {
            Outcome::Inserted(record) | Outcome::Existing(record) => Ok(Some(record)),
            Outcome::Gone => Ok(None),
            Outcome::Refused => Err(Error::Labels),
        }
    }

    /// Forgets the record of this id that was inserted at `born`, if it is still there.
    pub(super) fn remove(&self, id: &WorkloadId, born: u64) -> Result<(), Error> {
        self.order(Act::Remove { id: id.clone(), born }).map(drop)
    }

    /// Wishes several workloads away, with one commit if it can be.
    pub(super) fn wish_away<'a>(&self, records: impl IntoIterator<Item = &'a Arc<Record>>) -> Result<(), Error> {
        let act = |record: &Arc<Record>| Act::Wish { id: record.workload.id.clone(), born: record.born, wish: Wish::Delete };
        let waiting = records.into_iter().map(|record| self.begin(act(record))).collect::<Result<Vec<_>, _>>()?;
        waiting.iter().try_for_each(|waiting| await_answer(waiting).map(drop))
    }

    fn order(&self, act: Act) -> Result<Outcome, Error> {
        await_answer(&self.begin(act)?)
    }

    fn begin(&self, act: Act) -> Result<Receiver<Result<Outcome, Error>>, Error> {
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Error::Closed)?;
        let (answer, waiting) = bounded(1);
        let order = Order { act, answer };
        orders.send_timeout(order, Duration::from_millis(limits::STORE_MS_MAX)).map_err(|error| match error {
            crossbeam_channel::SendTimeoutError::Timeout(_) => Error::Slow,
            crossbeam_channel::SendTimeoutError::Disconnected(_) => Error::Closed,
        })?;
        Ok(waiting)
    }

    /// The record of this id.
    pub(super) fn get(&self, id: &WorkloadId) -> Option<Arc<Record>> {
        self.shared.lock().records.get(id).map(Arc::clone)
    }

    /// Notes what is known of a workload, as `change` makes it of the record, or leaves it where that is `None`; the record as it is
    /// then. What is wished stays as it is, whatever `change` makes of it. A truth that only grew younger is no change that anybody
    /// follows, and goes to disk once in a while: else whoever looks at a workload would change it.
    pub(super) fn note(&self, id: &WorkloadId, change: impl FnOnce(&Record) -> Option<Record>) -> Result<Option<Arc<Record>>, Error> {
        let mut index = self.shared.lock();
        let Some(current) = index.records.get(id).map(Arc::clone) else { return Ok(None) };
        let Some(next) = change(&current) else { return Ok(Some(current)) };
        let Record { workload, node, desired, born, .. } = current.as_ref().clone();
        let next = Record { workload, node, desired, born, revision: current.revision, ..next };
        if next == *current {
            return Ok(Some(current));
        }
        if next.is_but_older_or_younger(&current) {
            let after = Arc::new(next);
            index.records.insert(id.clone(), Arc::clone(&after));
            let minute = |record: &Record| record.status.observed_at.as_millis() / AGE_KEPT_MS;
            if minute(&after) != minute(&current) {
                index.dirty.insert(id.clone());
                drop(index);
                self.shared.poke();
            }
            return Ok(Some(after));
        }
        if next.state.is_terminal() && !current.state.is_terminal() {
            drop(index);
            // An end is final, so it is told when it is on disk. Where the disk takes nothing, its agent's word is still the truth.
            match self.order(Act::End(Box::new(next.clone()))) {
                Ok(Outcome::Inserted(record) | Outcome::Existing(record)) => return Ok(Some(record)),
                Ok(Outcome::Gone | Outcome::Refused) => return Ok(None),
                Err(_) => index = self.shared.lock(),
            }
            if index.records.get(id).is_none_or(|now| !Arc::ptr_eq(now, &current)) {
                return Ok(index.records.get(id).map(Arc::clone));
            }
        }
        if index.revision >= index.reserved {
            self.shared.poke();
            return Err(Error::Revisions);
        }
        let after = index.publish(id, Some(next));
        index.dirty.insert(id.clone());
        drop(index);
        self.shared.poke();
        self.shared.changed.notify_all();
        Ok(after)
    }

    /// The record once it is another than `record`, or when `ms` are over; `None` when it is gone.
    pub(super) fn await_change(&self, record: &Record, ms: u64) -> Option<Arc<Record>> {
        let deadline = Deadline::within_ms(ms, "change");
        let mut index = self.shared.lock();
        loop {
            let current = index.records.get(&record.workload.id).filter(|current| current.born == record.born)?;
            let Ok(left) = deadline.left() else { return Some(Arc::clone(current)) };
            if current.revision != record.revision || index.is_closed {
                return Some(Arc::clone(current));
            }
            index = self.shared.changed.wait_timeout(index, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The first `limit` records behind `after` that pass `filter`.
    pub(super) fn page(&self, after: Option<&WorkloadId>, limit: usize, filter: impl Fn(&Record) -> bool) -> Page {
        let index = self.shared.lock();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut passing = index.records.range::<WorkloadId, _>((start, Bound::Unbounded)).map(|(_, record)| record).filter(|r| filter(r));
        let records = passing.by_ref().take(limit).map(Arc::clone).collect();
        Page { records, has_more: passing.next().is_some(), revision: index.history.kept().newest }
    }

    /// How many there are in each state.
    pub(super) fn counts(&self) -> Vec<(State, usize)> {
        let index = self.shared.lock();
        let count = |state: &State| (*state, index.records.values().filter(|record| record.state == *state).count());
        State::ALL.iter().map(count).collect()
    }

    /// Which ended workloads are too many, the first that ended first.
    pub(super) fn surplus(&self, history: usize) -> Vec<Arc<Record>> {
        let is_ended = |record: &Record| record.state.is_terminal() && record.desired != Desired::Deleted;
        let mut ended = self.page(None, usize::MAX, is_ended).records;
        let surplus = ended.len().saturating_sub(history);
        if surplus > 0 {
            ended.sort_by_key(|record| record.status.finished_at.unwrap_or(record.status.observed_at));
        }
        ended.truncate(surplus);
        ended
    }

    /// Which revisions a follower can go on from.
    pub(super) fn kept(&self) -> Kept {
        self.shared.lock().history.kept()
    }

    /// Why nothing can be accepted now.
    pub(super) fn trouble(&self) -> Option<String> {
        let index = self.shared.lock();
        if index.is_closed { Some("it is closed".into()) } else { index.trouble.clone() }
    }

    /// A place among the followers; `None` when there are as many as there may be.
    pub(super) fn follow(self: &Arc<Self>) -> Option<Follower> {
        let mut index = self.shared.lock();
        if index.followers >= limits::FOLLOWERS_MAX {
            return None;
        }
        index.followers += 1;
        Some(Follower(Arc::clone(self)))
    }

    /// How many follow.
    pub(super) fn followers(&self) -> usize {
        self.shared.lock().followers
    }
}

fn await_answer(waiting: &Receiver<Result<Outcome, Error>>) -> Result<Outcome, Error> {
    waiting.recv_timeout(Duration::from_millis(limits::STORE_MS_MAX)).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(Error::Slow),
        RecvTimeoutError::Disconnected => Err(Error::Closed),
    })
}

/// Somebody who is told every change.
#[derive(Debug)]
pub(super) struct Follower(Arc<Store>);

impl Follower {
    /// The first changes after `revision`; waits up to `ms` for one.
    pub(super) fn next(&self, revision: u64, ms: u64) -> Next {
        let mut index = self.0.shared.lock();
        if index.history.kept().newest == revision && !index.is_closed {
            // Woken for nothing it returns with nothing, and is asked again.
            let waited = self.0.shared.changed.wait_timeout(index, Duration::from_millis(ms));
            index = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        index.history.after(revision)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.shared.lock().followers -= 1;
    }
}

#[cfg(test)]
pub(super) mod tests;
