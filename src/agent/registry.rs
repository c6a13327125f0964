//! What this agent knows: every workload, its state, what is wanted of it and who is at work on it.
//!
//! All changes go through here, under one lock and without I/O; work in flight is a ticket, and each workload has at most one.
//! Whatever a workload needs done next is derived from its entry (`Entry::chore`), never remembered elsewhere, so that a lost
//! wake-up costs time, not work.
//!
//! What only this agent knows is in its journal before anybody hears of it or acts upon it: acceptances, ends, what is to be stopped
//! or deleted, restarts, and that a container may be about to run. A change calls `Entry::hold` first; the journal's writer takes
//! what is unsaved in batches (`journaled`), and what was held back is told when it is on disk.
//!
//! Invariant: `entries.len() <= AGENT_WORKLOADS_MAX`.
//! Invariant: what was accepted and is not over takes at most the node's memory together, overhead included, but for what was restored
//! or adopted: that may run already. CPU is shared: a quota is a limit, not a claim.
//! Invariant: a terminal state never changes; an exit code once known never changes.
//! Invariant: `revision` grows with every change that a watcher sees.

mod asks;
mod entry;
mod journaled;
mod pulls;
mod tickets;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::cri::runtime::{Class, Observed};
use crate::deadline::{Deadline, Stopwatch, Timestamp};
use crate::limits;
use crate::wire::agent::{EventKind, Resources, Until};
use crate::wire::record::{Ailing, Wanted};
use crate::wire::status::{Isolation, Status};
use crate::workload::{Health, Name, Phase, Reason, State, Workload, WorkloadId};

pub use asks::{Overtaken, Refusal};
pub use entry::{Chore, News, Snapshot, chore_pause_ms};
use entry::{Entry, Probe, Work};
pub use journaled::{Batch, Restored};
pub use tickets::{EndStep, EndTicket, StartTicket};

/// All workloads of this agent.
pub struct Registry {
    node: Name,
    host_kernel: Option<String>,
    /// What all workloads together may ask for, overhead included; `None` where the machine does not tell what it has.
    memory_mb_max: Option<u64>,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Wakes the journal's writer.
    unsaved: Condvar,
    /// Says that something may be due sooner than [`Registry::tick`] said.
    sooner: (Sender<()>, Receiver<()>),
    queues: Queues,
}

/// Where chores wait for a worker. A full queue refuses; the reconcile loop offers the chore again.
pub struct Queues {
    /// Starts.
    pub starts: Sender<WorkloadId>,
    /// Stops and removals.
    pub ends: Sender<WorkloadId>,
    /// Own-kernel probes.
    pub probes: Sender<WorkloadId>,
    /// Health checks.
    pub checks: Sender<WorkloadId>,
}

#[derive(Default)]
struct Inner {
    /// Boxed, for a tree may keep room for twice as many.
    entries: BTreeMap<WorkloadId, Box<Entry>>,
    fences: asks::Fences,
    /// Invariant: the sum of `Entry::spec_bytes`, `<= AGENT_SPECS_BYTES_MAX` but for adoptions.
    specs_bytes: usize,
    /// Of the last event. Its upper half counts the agent's starts, so that it never repeats.
    revision: u64,
    /// The last events, up to `WATCH_HISTORY_MAX` and `WATCH_HISTORY_BYTES_MAX`.
    history: VecDeque<Arc<News>>,
    /// Of the specs in it, as JSON.
    history_bytes: usize,
    watchers: Vec<Watcher>,
    /// Counts changes.
    version: u64,
    /// Whose changes are to be saved; `None` when nothing is ever saved.
    dirty: Option<BTreeSet<WorkloadId>>,
    /// The machine's present boot.
    boot_id: String,
    /// Why the journal cannot be written now.
    trouble: Option<String>,
}

impl Inner {
    /// Notes that an entry has changes to be saved, without haste.
    fn mark(&mut self, id: &WorkloadId) {
        if let Some(dirty) = &mut self.dirty {
            dirty.insert(id.clone());
        }
    }
}

struct Watcher {
    events: Sender<Arc<News>>,
    /// Dead when the watch is over.
    alive: Weak<()>,
}

/// Everything as it was when the watch began, or what it missed; and every change since.
pub struct Watch {
    /// An `ADDED` for each workload, or every event since the revision it resumes from.
    pub present: Vec<Arc<News>>,
    /// Of the last change before the watch.
    pub revision: u64,
    /// Disconnected when its reader fell behind by more than `WATCH_EVENTS_MAX`.
    pub events: Receiver<Arc<News>>,
    _alive: Arc<()>,
}

/// Why there is no watch.
#[derive(Debug, PartialEq, Eq)]
pub enum NoWatch {
    /// There are `WATCHES_MAX` already.
    Full,
    /// What happened since that revision is not kept any more, or never happened.
    Gone,
}

/// An entry as the reconcile loop sees it, before it lists what the runtime has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Which.
    pub id: WorkloadId,
    /// Which acceptance of it.
    pub uid: String,
    /// Changes whenever the entry does.
    pub version: u64,
    /// Where it stands.
    pub state: State,
    /// Its sandbox and container, where a start worked.
    pub made: Option<(String, String)>,
    /// Which runtime has it.
    pub endpoint: usize,
    /// The handler that was verified when it started.
    pub handler: Option<String>,
    /// Somebody is at work on it.
    pub is_busy: bool,
    /// It is to end, for whatever reason.
    pub is_ending: bool,
    /// It was read from the journal, and not compared yet.
    pub is_recovering: bool,
    /// Which of its sandboxes it is about.
    pub attempt: u32,
    /// The container of that attempt may have been asked to run.
    pub is_launched: bool,
}

/// A health check that is due.
#[derive(Clone, Debug)]
pub struct CheckUp {
    /// Which runtime has it.
    pub endpoint: usize,
    /// The container to ask.
    pub container_id: String,
    /// The sandbox's address, where it has one.
    pub ip: Option<String>,
    /// What to do.
    pub health: Health,
}

/// A running container, to ask something of.
#[derive(Clone, Debug)]
pub struct Container {
    /// Where the workload stands.
    pub state: State,
    /// The runtime's name for the container, where a start worked.
    pub id: Option<String>,
    /// Which runtime has it.
    pub endpoint: usize,
    /// When the state was last known to be true.
    pub observed_at: Timestamp,
    /// Changes whenever the entry does.
    pub version: u64,
}

impl Registry {
    /// An empty registry of this node, whose workloads may take so much memory.
    pub fn new(node: Name, host_kernel: Option<String>, memory_mb_max: Option<u64>, queues: Queues) -> Self {
        let (inner, changed, unsaved, sooner) = (Mutex::default(), Condvar::new(), Condvar::new(), bounded(1));
        Self { node, host_kernel, memory_mb_max, inner, changed, unsaved, sooner, queues }
    }

    /// This node.
    pub fn node(&self) -> &Name {
        &self.node
    }

    /// The node's kernel release.
    pub fn host_kernel(&self) -> Option<&str> {
        self.host_kernel.as_deref()
    }

    /// Ends a running workload because of what became of it; its policy decides what follows.
    pub fn ail(&self, id: &WorkloadId, container_id: &str, reason: Reason, message: String) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        let is_it = entry.made.as_ref().is_some_and(|made| made.container_id == container_id);
        if !is_it || entry.state != State::Running || entry.wanted != Wanted::Run || entry.ailing.is_some() {
            return;
        }
        log::warn!("workload {id}: {reason}: {message}; it is stopped");
        entry.hold();
        entry.ailing = Some(Ailing { reason, message });
        entry.retry = None;
        entry.stopping = Some(Stopwatch::start());
        entry.status.phase = Some(Phase::Stopping);
        self.publish(&mut inner, id, EventKind::Modified);
    }

    /// The container to probe, and the runtime that has it; `None` when the workload does not run any more.
    pub fn begin_probe(&self, id: &WorkloadId) -> Option<(usize, String)> {
        let mut inner = self.lock();
        let entry = inner.entries.get_mut(id)?;
        if entry.probe != Probe::Queued || entry.state != State::Running || entry.wanted != Wanted::Run {
            return None;
        }
        entry.made.as_ref().map(|m| (entry.endpoint, m.container_id.clone()))
    }

    /// Records what the guest in this container answered: its kernel release, or that its image has nothing to answer with.
    /// A guest on the host's own kernel is stopped: its class promised another.
    pub fn finish_probe(&self, id: &WorkloadId, container_id: &str, kernel: Option<String>) {
        let mut mismatch = None;
        {
            let mut inner = self.lock();
            let Some(entry) = probed(&mut inner, id, container_id) else { return };
            entry.probe = Probe::Over;
            let isolation = &mut entry.status.isolation;
            isolation.message = None;
            match (&kernel, &self.host_kernel) {
                (Some(guest), Some(host)) if guest == host => {
                    isolation.verified = Some(false);
                    mismatch = Some(format!("the guest answered with the host's own kernel, {host}"));
                }
                (Some(_), Some(_)) => isolation.verified = Some(true),
                (Some(_), None) => isolation.message = Some("the host's kernel release is unknown".into()),
                (None, _) => isolation.message = Some("the image has no uname or cat to answer the probe with".into()),
            }
            isolation.kernel = kernel;
            entry.touch();
            self.publish(&mut inner, id, EventKind::Modified);
        }
        if let Some(message) = mismatch {
            log::error!("workload {id}: {message}; it is stopped");
            self.want_stop(id, Reason::IsolationMismatch, Some(message));
        }
    }

    /// The probe got no answer; it is tried again while the workload runs, more and more rarely.
    pub fn retry_probe(&self, id: &WorkloadId, container_id: &str, message: &str) {
        let mut inner = self.lock();
        let Some(entry) = probed(&mut inner, id, container_id) else { return };
        let pause_ms = entry.probe_retry.map_or(limits::PROBE_PAUSE_MS_MIN, |(_, ms)| ms);
        entry.probe = Probe::Due;
        entry.probe_retry = Some((Deadline::within_ms(pause_ms, "probe"), (pause_ms * 2).min(limits::PROBE_PAUSE_MS_MAX)));
        entry.status.isolation.message = Some(format!("the probe got no answer yet: {message}"));
        self.publish(&mut inner, id, EventKind::Modified);
    }

    /// The check-up that is due; `None` when there is nothing to check any more.
    pub fn begin_check(&self, id: &WorkloadId) -> Option<CheckUp> {
        let mut inner = self.lock();
        let entry = inner.entries.get_mut(id).filter(|entry| entry.health.is_queued)?;
        let (endpoint, ip) = (entry.endpoint, entry.status.ip.clone());
        let made = entry.made.as_ref().filter(|_| entry.state == State::Running && entry.wanted == Wanted::Run);
        made.zip(entry.workload.spec.health.clone()).map(|(made, health)| CheckUp {
            endpoint,
            container_id: made.container_id.clone(),
            ip,
            health,
        })
    }

    /// Records how a check went. Too many failures in a row end the workload.
    pub fn finish_check(&self, id: &WorkloadId, container_id: &str, result: Result<(), String>) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        let is_it = entry.made.as_ref().is_some_and(|made| made.container_id == container_id);
        let Some(health) = entry.workload.spec.health.as_ref().filter(|_| is_it && entry.health.is_queued) else { return };
        entry.health.is_queued = false;
        entry.health.due = Some(Deadline::within_ms(health.interval_ms, "health"));
        self.nudge();
        let Err(message) = result else {
            entry.health.failures = 0;
            return;
        };
        entry.health.failures += 1;
        let message = format!("health check failed {} of {} times in a row: {message}", entry.health.failures, health.failures_max);
        let is_over = entry.health.failures >= health.failures_max;
        entry.status.last_error = Some(crate::report::clip(message.clone(), limits::MESSAGE_BYTES_MAX));
        if is_over || entry.health.failures.is_power_of_two() {
            // Each of a thousand in a row is no news.
            self.publish(&mut inner, id, EventKind::Modified);
        }
        drop(inner);
        if is_over {
            self.ail(id, container_id, Reason::HealthCheckFailed, message);
        }
    }

    /// Applies what the runtime says of a container of ours.
    pub fn observe(&self, id: &WorkloadId, container_id: &str, observed: Observed) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        if entry.made.as_ref().is_none_or(|m| m.container_id != container_id) || entry.state != State::Running {
            return;
        }
        match observed {
            Observed::Ended(ending) => {
                entry.hold();
                entry.ended(ending);
                self.publish(&mut inner, id, EventKind::Modified);
                self.nudge();
            }
            Observed::Running(since) => {
                entry.is_rebooted = false;
                entry.status.observed_at = Timestamp::now();
                entry.status.started_at = entry.status.started_at.or(since);
                entry.unknown = None;
            }
            Observed::Unknown => {
                let until = *entry.unknown.get_or_insert_with(|| Deadline::within_ms(limits::UNKNOWN_MS_MAX, "container"));
                if until.left().is_err() {
                    drop(inner);
                    let message = "the runtime has lost track of the container, and does not know whether it runs".to_owned();
                    self.ail(id, container_id, Reason::RuntimeUnavailable, message);
                }
            }
            Observed::Created => {}
        }
    }

    /// The runtime has no such sandbox or container any more. Ignored when the entry changed since `version`.
    pub fn vanished(&self, id: &WorkloadId, version: u64) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        if entry.version != version || entry.state != State::Running {
            return;
        }
        entry.hold();
        entry.lost();
        self.publish(&mut inner, id, EventKind::Modified);
    }

    /// Ends what ran out of time, and offers every open chore to the workers again. Returns when it should be called next.
    pub fn tick(&self) -> Option<Duration> {
        let (mut ttls, mut next) = (Vec::new(), None::<Duration>);
        let mut inner = self.lock();
        let ids: Vec<WorkloadId> = inner.entries.keys().cloned().collect();
        for id in ids {
            let Some(entry) = inner.entries.get_mut(&id) else { continue };
            if entry.ttl.is_some_and(|ttl| ttl.left().is_err()) && entry.wanted == Wanted::Run && !entry.state.is_terminal() {
                ttls.push(id.clone());
            }
            let waits_to_start = entry.state == State::Pending && entry.work != Work::Doing && entry.recovery.is_none();
            let is_late = waits_to_start && entry.ledger.is_settled() && entry.start_deadline.left().is_err();
            if is_late && entry.wanted == Wanted::Run {
                let (reason, message) = entry.too_late();
                entry.hold();
                entry.work = Work::Idle;
                entry.fail_start(reason, message);
                self.publish(&mut inner, &id, EventKind::Modified);
                continue;
            }
            let start = waits_to_start.then_some(entry.start_deadline);
            let probe = entry.probe_retry.map(|(retry, _)| retry).filter(|_| entry.probe == Probe::Due);
            let health = entry.health.due.filter(|_| !entry.health.is_queued);
            let waits = [entry.ttl, entry.retry, entry.restart, start, probe, health];
            next = waits.into_iter().flatten().filter_map(|d| d.left().ok()).chain(next).min();
            self.assign(&mut inner, &id);
        }
        drop(inner);
        for id in ttls {
            self.want_stop(&id, Reason::TtlExpired, Some("its time to live was over".into()));
        }
        next
    }

    /// Something may be due sooner.
    pub fn sooner(&self) -> &Receiver<()> {
        &self.sooner.1
    }

    fn nudge(&self) {
        let _ = self.sooner.0.try_send(()); // One that waits says it all.
    }

    /// A workload's state and status.
    pub fn status(&self, id: &WorkloadId) -> Option<(State, Status)> {
        self.lock().entries.get(id).filter(|entry| entry.is_visible()).map(|entry| entry.seen())
    }

    /// Why the journal cannot be written now.
    pub fn trouble(&self) -> Option<String> {
        self.lock().trouble.clone()
    }

    /// For how long the workload that is to end and does not has been waited for, milliseconds; and how many there are.
    pub fn stopping(&self) -> (u64, u64) {
        let inner = self.lock();
        let ages = inner.entries.values().filter_map(|entry| entry.stopping.map(|since| since.elapsed_ms()));
        ages.fold((0, 0), |(oldest_ms, count), ms| (oldest_ms.max(ms), count + 1))
    }

    /// A workload's container, and how old the knowledge is.
    pub fn container(&self, id: &WorkloadId) -> Option<Container> {
        let inner = self.lock();
        let entry = inner.entries.get(id)?;
        Some(Container {
            state: entry.state,
            id: entry.made.as_ref().map(|m| m.container_id.clone()),
            endpoint: entry.endpoint,
            observed_at: entry.status.observed_at,
            version: entry.version,
        })
    }

    /// The workload that has this container, and its version.
    pub fn find_container(&self, container_id: &str) -> Option<(WorkloadId, u64)> {
        let inner = self.lock();
        let has = |entry: &Entry| entry.made.as_ref().is_some_and(|m| m.container_id == container_id);
        inner.entries.values().find(|entry| has(entry)).map(|entry| (entry.workload.id.clone(), entry.version))
    }

    /// Waits until a workload is in such a state, gone, or the time is up; then as [`Registry::status`].
    pub fn wait(&self, id: &WorkloadId, until: Until, deadline: Deadline, stopping: &AtomicBool) -> Option<(State, Status)> {
        let mut inner = self.lock();
        loop {
            let entry = inner.entries.get(id).filter(|entry| entry.is_visible())?;
            let left = deadline.left();
            if until.is_reached(entry.view().0) || left.is_err() || stopping.load(Ordering::SeqCst) {
                return Some(entry.seen());
            }
            inner = self.wait_changed(inner, left.unwrap_or_default());
        }
    }

    /// Waits until a workload is gone; whether it is.
    pub fn wait_gone(&self, id: &WorkloadId, deadline: Deadline, stopping: &AtomicBool) -> bool {
        let mut inner = self.lock();
        loop {
            let Ok(left) = deadline.left() else { return !inner.entries.contains_key(id) };
            if !inner.entries.contains_key(id) {
                return true;
            }
            if stopping.load(Ordering::SeqCst) {
                return false;
            }
            inner = self.wait_changed(inner, left);
        }
    }

    /// Workloads behind `after` in the order of their ids, and whether there are more.
    pub fn page(&self, after: Option<&WorkloadId>, limit: usize) -> (Vec<Snapshot>, bool) {
        use std::ops::Bound;
        let inner = self.lock();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let all = inner.entries.range::<WorkloadId, _>((from, Bound::Unbounded));
        let mut rest = all.map(|(_, entry)| entry).filter(|entry| entry.is_visible());
        let page = rest.by_ref().take(limit).map(|entry| entry.snapshot()).collect();
        (page, rest.next().is_some())
    }

    /// Everything as it is, and every change from then on; or every change since a revision.
    ///
    /// # Errors
    /// [`NoWatch`].
    pub fn watch(&self, since: Option<u64>) -> Result<Watch, NoWatch> {
        let mut inner = self.lock();
        inner.watchers.retain(|watcher| watcher.alive.strong_count() > 0);
        if inner.watchers.len() >= limits::WATCHES_MAX {
            return Err(NoWatch::Full);
        }
        let revision = inner.revision;
        let present = match since {
            None => {
                let added = |entry: &Entry| Arc::new(entry.news(revision, EventKind::Added));
                inner.entries.values().filter(|entry| entry.is_visible()).map(|entry| added(entry)).collect()
            }
            Some(since) => {
                // Revisions have no gaps, so the number of events since then is known.
                let missed = revision.checked_sub(since).and_then(|missed| usize::try_from(missed).ok()).ok_or(NoWatch::Gone)?;
                let from = inner.history.len().checked_sub(missed).ok_or(NoWatch::Gone)?;
                inner.history.iter().skip(from).cloned().collect()
            }
        };
        let (sender, events) = bounded(limits::WATCH_EVENTS_MAX);
        let alive = Arc::new(());
        inner.watchers.push(Watcher { events: sender, alive: Arc::downgrade(&alive) });
        Ok(Watch { present, revision, events, _alive: alive })
    }

    /// Whether nothing waits for the disk to be told.
    pub fn is_settled(&self) -> bool {
        self.lock().entries.values().all(|entry| entry.ledger.is_settled())
    }

    /// Grows with every change of any entry, told or not.
    pub fn version(&self) -> u64 {
        self.lock().version
    }

    /// The revision of the last change.
    pub fn revision(&self) -> u64 {
        self.lock().revision
    }

    /// What all workloads that are not over take, overhead included.
    pub fn allocated(&self) -> Resources {
        allocated_in(&self.lock())
    }

    /// Every entry, for comparison with what the runtime lists.
    pub fn known(&self) -> Vec<Known> {
        let inner = self.lock();
        let known = |entry: &Entry| Known {
            id: entry.workload.id.clone(),
            uid: entry.uid.to_string(),
            version: entry.version,
            state: entry.state,
            made: entry.made.as_ref().map(|m| (m.sandbox_id.clone(), m.container_id.clone())),
            endpoint: entry.endpoint,
            handler: entry.status.handler.clone(),
            is_busy: entry.work == Work::Doing,
            is_ending: entry.wanted != Wanted::Run || entry.ailing.is_some(),
            is_recovering: entry.recovery.is_some(),
            attempt: entry.status.attempt,
            is_launched: entry.launched,
        };
        inner.entries.values().map(|entry| known(entry)).collect()
    }

    /// Which acceptance of a workload is here; `None` when there is none.
    pub fn uid(&self, id: &WorkloadId) -> Option<Arc<str>> {
        self.lock().entries.get(id).map(|entry| Arc::clone(&entry.uid))
    }

    /// Which acceptance of a workload is here, and its state, as may be told; `None` when there is none.
    pub fn acceptance(&self, id: &WorkloadId) -> Option<(Arc<str>, State)> {
        let inner = self.lock();
        let entry = inner.entries.get(id).filter(|entry| entry.is_visible())?;
        Some((Arc::clone(&entry.uid), entry.view().0))
    }

    /// A workload, if this acceptance of it is here.
    pub fn workload(&self, id: &WorkloadId, uid: &str) -> Option<Workload> {
        self.lock().entries.get(id).filter(|entry| *entry.uid == *uid).map(|entry| (*entry.workload).clone())
    }

    /// Whether a sandbox of this acceptance has an owner, or may be about to get one.
    pub fn may_own(&self, id: &WorkloadId, uid: &str, sandbox_id: &str) -> bool {
        let inner = self.lock();
        inner.entries.get(id).is_some_and(|entry| *entry.uid == *uid && (entry.work == Work::Doing || entry.owns(sandbox_id)))
    }

    /// Wakes everyone who waits, so that they see that the agent stops.
    pub fn wake_all(&self) {
        let _held = self.lock();
        self.changed.notify_all();
    }

    fn isolation(&self, handler: &str, own_kernel: bool) -> Isolation {
        Isolation {
            // Without a kernel of its own to show, the verified handler is all that the class promises.
            verified: if own_kernel { None } else { Some(true) },
            handler: Some(handler.to_owned()),
            kernel: None,
            host_kernel: self.host_kernel.clone(),
            message: None,
        }
    }

    /// Counts a change, and hands out what it calls for. It is told at once, or when it is saved.
    fn publish(&self, inner: &mut Inner, id: &WorkloadId, kind: EventKind) {
        inner.version += 1;
        let Some(entry) = inner.entries.get_mut(id) else { return };
        if entry.ledger.is_forgotten && kind != EventKind::Deleted {
            // Its last event waits for the disk; nothing comes after it.
            return;
        }
        entry.version = inner.version;
        match &mut inner.dirty {
            Some(dirty) if entry.ledger.change > entry.ledger.saved => {
                dirty.insert(id.clone());
                self.unsaved.notify_one();
            }
            Some(_) => {}
            None => entry.ledger.saved = entry.ledger.change,
        }
        if entry.ledger.owed != Some(EventKind::Added) {
            entry.ledger.owed = Some(kind);
        }
        self.release(inner, id);
    }

    /// Tells what was held back, if it may be told now, and hands out what it calls for.
    fn release(&self, inner: &mut Inner, id: &WorkloadId) {
        let Some(entry) = inner.entries.get_mut(id) else { return };
        if !entry.ledger.is_settled() {
            return;
        }
        entry.ledger.shown = None;
        if let Some(kind) = entry.ledger.owed.take() {
            inner.revision += 1;
            let news = Arc::new(entry.news(inner.revision, kind));
            // Dropping the sender of a watcher that is too slow, or gone, is how it learns.
            inner.watchers.retain(|watcher| watcher.events.try_send(Arc::clone(&news)).is_ok());
            inner.history_bytes += news.spec_bytes;
            inner.history.push_back(news);
            while inner.history.len() > limits::WATCH_HISTORY_MAX || inner.history_bytes > limits::WATCH_HISTORY_BYTES_MAX {
                let Some(oldest) = inner.history.pop_front() else { break };
                inner.history_bytes = inner.history_bytes.saturating_sub(oldest.spec_bytes);
            }
        }
        if entry.ledger.is_forgotten {
            let spec_bytes = entry.spec_bytes;
            inner.entries.remove(id);
            inner.specs_bytes = inner.specs_bytes.saturating_sub(spec_bytes);
        } else {
            self.assign(inner, id);
        }
        self.changed.notify_all();
    }

    /// Puts the entry's next chore into its queue.
    fn assign(&self, inner: &mut Inner, id: &WorkloadId) {
        let Some(entry) = inner.entries.get_mut(id) else { return };
        let is_probe_due = entry.probe == Probe::Due
            && entry.state == State::Running
            && entry.wanted == Wanted::Run
            && entry.recovery.is_none()
            && entry.probe_retry.is_none_or(|(retry, _)| retry.left().is_err());
        if is_probe_due && self.queues.probes.try_send(id.clone()).is_ok() {
            entry.probe = Probe::Queued;
        }
        let is_check_due = entry.health.due.is_some_and(|due| due.left().is_err()) && entry.recovery.is_none();
        if is_check_due && !entry.health.is_queued && self.queues.checks.try_send(id.clone()).is_ok() {
            entry.health.is_queued = true;
        }
        if entry.work != Work::Idle {
            return;
        }
        let Some(chore) = entry.chore() else { return };
        let queue = match chore {
            Chore::Start => &self.queues.starts,
            Chore::Clear | Chore::Remove | Chore::Retire | Chore::Stop => &self.queues.ends,
        };
        if queue.try_send(id.clone()).is_ok() {
            entry.work = Work::Queued(chore);
        }
    }

    /// Takes up a chore from the queue these chores wait in, if it is still the right one.
    fn begin<'a>(&self, inner: &'a mut Inner, id: &WorkloadId, chores: &[Chore]) -> Option<(Chore, &'a mut Entry)> {
        let entry = inner.entries.get_mut(id)?;
        // Anything else is a stale place in the queue: the entry waits elsewhere, or is being worked on.
        if !matches!(entry.work, Work::Queued(queued) if chores.contains(&queued)) {
            return None;
        }
        let Some(chore) = entry.chore().filter(|chore| chores.contains(chore)) else {
            entry.work = Work::Idle;
            self.assign(inner, id);
            return None;
        };
        let entry = inner.entries.get_mut(id)?;
        entry.work = Work::Doing;
        Some((chore, entry))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing that holds this lock can panic but by a bug that would show in any test; the data stays whole either way.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_changed<'a>(&'a self, inner: MutexGuard<'a, Inner>, left: Duration) -> MutexGuard<'a, Inner> {
        self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The entry of a container that was probed, if it still is the one, and still of interest.
fn probed<'a>(inner: &'a mut Inner, id: &WorkloadId, container_id: &str) -> Option<&'a mut Entry> {
    let entry = inner.entries.get_mut(id)?;
    let is_it = entry.made.as_ref().is_some_and(|m| m.container_id == container_id);
    (is_it && entry.probe == Probe::Queued && entry.state == State::Running).then_some(entry)
}

/// What a workload takes of the node's memory, its class's overhead included, MiB.
fn memory_mb(entry: &Entry) -> u64 {
    entry.workload.spec.memory_mb.saturating_add(entry.class.overhead_mb)
}

fn allocated_in(inner: &Inner) -> Resources {
    let active = inner.entries.values().filter(|entry| !entry.state.is_terminal());
    active.fold(Resources::default(), |sum, entry| Resources {
        memory_mb: sum.memory_mb.saturating_add(memory_mb(entry)),
        cpu_millicores: sum.cpu_millicores + entry.workload.spec.cpu_millicores,
        workloads: sum.workloads + 1,
    })
}

#[cfg(test)]
mod tests;
