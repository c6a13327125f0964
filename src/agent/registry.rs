//! What this agent knows: every workload, its state, what is wanted of it and who is at work on it.
//!
//! All changes go through here, under one lock and without I/O; work in flight is a ticket, and each workload has at most one.
//! Whatever a workload needs done next is derived from its entry (`Entry::chore`), never remembered elsewhere, so that a lost
//! wake-up costs time, not work.
//!
//! Invariant: `entries.len() <= AGENT_WORKLOADS_MAX`.
//! Invariant: a terminal state never changes; an exit code once known never changes.
//! Invariant: `revision` grows with every change that a watcher sees.

mod entry;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::cri::runtime::{Class, Ending, Found, Observed, Progress, Seen, StartError, Started};
use crate::deadline::{Deadline, Timestamp};
use crate::limits;
use crate::wire::agent::{Event, EventKind, Object, Resources, Until};
use crate::wire::status::{Isolation, Status, Timings};
use crate::workload::{Name, Phase, Reason, State, Workload, WorkloadId};

pub use entry::Chore;
use entry::{Entry, Made, Probe, Wanted, Work};

/// All workloads of this agent.
pub struct Registry {
    node: Name,
    host_kernel: Option<String>,
    inner: Mutex<Inner>,
    changed: Condvar,
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
}

#[derive(Default)]
struct Inner {
    entries: BTreeMap<WorkloadId, Entry>,
    /// Invariant: the sum of `Entry::spec_bytes`, `<= AGENT_SPECS_BYTES_MAX` but for adoptions.
    specs_bytes: usize,
    revision: u64,
    watchers: Vec<Watcher>,
}

struct Watcher {
    events: Sender<Arc<Event>>,
    /// Dead when the watch is over.
    alive: Weak<()>,
}

/// Everything as it was when the watch began, and every change since.
pub struct Watch {
    /// An `ADDED` for each workload.
    pub present: Vec<Event>,
    /// Of the last change before the watch.
    pub revision: u64,
    /// Disconnected when its reader fell behind by more than `WATCH_EVENTS_MAX`.
    pub events: Receiver<Arc<Event>>,
    _alive: Arc<()>,
}

/// How an `accept` was answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The id is taken by another workload.
    Differs,
    /// The id's former workload is still being deleted.
    Leaving,
    /// There are as many workloads, or as large ones, as one agent keeps.
    Full,
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
    /// An empty registry of this node.
    pub fn new(node: Name, host_kernel: Option<String>, queues: Queues) -> Self {
        Self { node, host_kernel, inner: Mutex::default(), changed: Condvar::new(), queues }
    }

    /// This node.
    pub fn node(&self) -> &Name {
        &self.node
    }

    /// The node's kernel release.
    pub fn host_kernel(&self) -> Option<&str> {
        self.host_kernel.as_deref()
    }

    /// Accepts a workload of a class that the runtime `endpoint` makes, or finds that it is here already.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn accept(&self, workload: Workload, class: Class, endpoint: usize) -> Result<(State, Status), Refusal> {
        let mut inner = self.lock();
        if let Some(answer) = present(&mut inner, &workload) {
            return answer;
        }
        let id = workload.id.clone();
        let entry = Entry::new(workload, &crate::report::random_id(), class, endpoint, Status::accepted(Some(self.node.to_string())));
        let specs_bytes = inner.specs_bytes.saturating_add(entry.spec_bytes);
        if inner.entries.len() >= limits::AGENT_WORKLOADS_MAX || specs_bytes > limits::AGENT_SPECS_BYTES_MAX {
            return Err(Refusal::Full);
        }
        let answer = (entry.state, entry.status.clone());
        inner.specs_bytes = specs_bytes;
        inner.entries.insert(id.clone(), entry);
        self.publish(&mut inner, &id, EventKind::Added);
        Ok(answer)
    }

    /// The state of a workload that was asked for before in the same words.
    ///
    /// # Errors
    /// [`Refusal`], when it was asked for in others, or is on its way out.
    pub fn present(&self, workload: &Workload) -> Option<Result<(State, Status), Refusal>> {
        present(&mut self.lock(), workload)
    }

    /// Takes up a workload that the runtime `endpoint` has and we do not know: from before this agent started. A sandbox that is not
    /// of the handler asked for is taken up to be stopped.
    pub fn adopt(&self, workload: Workload, seen: &Seen, overhead_mb: u64, endpoint: usize, found: Found) {
        let mut inner = self.lock();
        if inner.entries.contains_key(&workload.id) {
            return;
        }
        let id = workload.id.clone();
        let mut status = Status::accepted(Some(self.node.to_string()));
        status.created_at = seen.created_at.unwrap_or(status.created_at);
        status.attempt = seen.attempt;
        status.sandbox_id = Some(seen.sandbox_id.clone());
        status.handler = Some(seen.handler.clone());
        status.ip = found.ip;
        status.image_digest = found.image_digest;
        let container_id = seen.container.as_ref().map(|c| c.id.clone()).unwrap_or_default();
        status.container_id = Some(container_id.clone());
        let verified = !seen.handler.is_empty() && seen.handler == seen.asked_handler;
        status.isolation = self.isolation(&seen.handler, seen.own_kernel || !verified);
        let mismatch = || format!("asked for a sandbox of handler {:?}, the runtime reports {:?}", seen.asked_handler, seen.handler);
        let class = Class {
            name: workload.runtime_class.clone(),
            handler: seen.asked_handler.clone(),
            own_kernel: seen.own_kernel,
            annotations: BTreeMap::new(),
            overhead_mb,
            memory_mb_min: 0,
            sandbox_ms_max: limits::START_DEADLINE_MS_DEFAULT,
        };
        let since = match &found.observed {
            Observed::Running(since) => *since,
            Observed::Created | Observed::Ended(_) | Observed::Unknown => None,
        };
        // The wall clock may have jumped, so it can shorten the time to live, and never lengthen it.
        let ran_ms = since.map_or(0, |since| Timestamp::now().as_millis().saturating_sub(since.as_millis()));
        status.started_at = since;
        let mut entry = Entry::new(workload, &seen.uid, class, endpoint, status);
        entry.state = State::Running;
        entry.is_env_known = entry.workload.spec.env.is_empty();
        entry.ttl = entry.workload.spec.ttl_ms.map(|ms| Deadline::within_ms(ms.saturating_sub(ran_ms), "ttl"));
        entry.probe = if seen.own_kernel { Probe::Due } else { Probe::Over };
        entry.made = Some(Made { sandbox_id: seen.sandbox_id.clone(), container_id, retired: false });
        if !verified {
            entry.wanted = Wanted::Stop { reason: Reason::IsolationMismatch, message: Some(mismatch()) };
        }
        if let Observed::Ended(ending) = found.observed {
            entry.ended(ending);
        }
        inner.specs_bytes = inner.specs_bytes.saturating_add(entry.spec_bytes);
        inner.entries.insert(id.clone(), entry);
        self.publish(&mut inner, &id, EventKind::Added);
    }

    /// Asks for a workload's end. A workload that does not run yet ends at once.
    pub fn want_stop(&self, id: &WorkloadId, reason: Reason, message: Option<String>) -> Option<(State, Status)> {
        let mut inner = self.lock();
        let entry = inner.entries.get_mut(id)?;
        if entry.wanted == Wanted::Run && !entry.state.is_terminal() {
            entry.wanted = Wanted::Stop { reason, message: message.clone() };
            entry.retry = None;
            entry.cancel.store(true, Ordering::SeqCst);
            if entry.state == State::Pending && entry.work != Work::Doing {
                entry.work = Work::Idle;
                entry.give_up(reason, message.unwrap_or_else(|| "stopped before it ran".into()));
            } else {
                entry.status.phase = Some(Phase::Stopping);
            }
            self.publish(&mut inner, id, EventKind::Modified);
        }
        inner.entries.get(id).map(|entry| (entry.state, entry.status.clone()))
    }

    /// Asks for a workload to be removed and forgotten; whether there is one.
    pub fn want_delete(&self, id: &WorkloadId) -> bool {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return false };
        if entry.wanted != Wanted::Delete {
            entry.wanted = Wanted::Delete;
            entry.retry = None;
            entry.cancel.store(true, Ordering::SeqCst);
            entry.status.phase = Some(Phase::Stopping);
            if matches!(entry.work, Work::Queued(_)) {
                // What it waits for is not what it needs any more; a stale place in a queue is passed over.
                entry.work = Work::Idle;
            }
            self.publish(&mut inner, id, EventKind::Modified);
        }
        true
    }

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
            cancel: Arc::clone(&entry.cancel),
            deadline: entry.start_deadline,
            is_over: false,
        })
    }

    /// A worker takes up whatever ends a workload; `None` when there is nothing to do any more.
    pub fn begin_end(&self, id: &WorkloadId) -> Option<EndTicket<'_>> {
        let mut inner = self.lock();
        let (chore, entry) = self.begin(&mut inner, id, &[Chore::Stop, Chore::Retire, Chore::Remove])?;
        Some(EndTicket {
            registry: self,
            id: id.clone(),
            uid: Arc::clone(&entry.uid),
            chore,
            endpoint: entry.endpoint,
            sandbox_id: entry.status.sandbox_id.clone(),
            container_id: entry.made.as_ref().map(|m| m.container_id.clone()),
            // The polite signal is sent once; after the grace comes the kill.
            grace_ms: if entry.kill.is_some() { 0 } else { entry.grace_ms() },
            is_over: false,
        })
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

    /// Applies what the runtime says of a container of ours.
    pub fn observe(&self, id: &WorkloadId, container_id: &str, observed: Observed) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        if entry.made.as_ref().is_none_or(|m| m.container_id != container_id) || entry.state != State::Running {
            return;
        }
        match observed {
            Observed::Ended(ending) => {
                entry.ended(ending);
                self.publish(&mut inner, id, EventKind::Modified);
            }
            Observed::Running(since) => {
                entry.status.observed_at = Timestamp::now();
                entry.status.started_at = entry.status.started_at.or(since);
            }
            Observed::Created | Observed::Unknown => {}
        }
    }

    /// The runtime has no such sandbox or container any more. Ignored when the entry changed since `version`.
    pub fn vanished(&self, id: &WorkloadId, version: u64) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        if entry.version != version || entry.state != State::Running {
            return;
        }
        let message = Some("the runtime does not have it any more".to_owned());
        match entry.wanted.clone() {
            Wanted::Stop { reason, message: why } => entry.end(State::Failed, reason, why.or(message), None),
            Wanted::Delete | Wanted::Run => entry.end(State::Failed, Reason::SandboxDied, message, None),
        }
        self.publish(&mut inner, id, EventKind::Modified);
    }

    /// Ends what ran out of time, and offers every open chore to the workers again. Returns when it should be called next.
    pub fn tick(&self) -> Option<Duration> {
        let (mut ttls, mut next) = (Vec::new(), None::<Duration>);
        let mut inner = self.lock();
        let ids: Vec<WorkloadId> = inner.entries.keys().cloned().collect();
        for id in ids {
            let Some(entry) = inner.entries.get_mut(&id) else { continue };
            if entry.ttl.is_some_and(|ttl| ttl.left().is_err()) && entry.wanted == Wanted::Run {
                ttls.push(id.clone());
            }
            let is_late = entry.state == State::Pending && entry.work != Work::Doing && entry.start_deadline.left().is_err();
            if is_late && entry.wanted == Wanted::Run {
                entry.work = Work::Idle;
                entry.give_up(Reason::StartDeadlineExceeded, "start deadline passed while it waited for its start".into());
                self.publish(&mut inner, &id, EventKind::Modified);
                continue;
            }
            let start = (entry.state == State::Pending).then_some(entry.start_deadline);
            let probe = entry.probe_retry.map(|(retry, _)| retry).filter(|_| entry.probe == Probe::Due);
            let waits = [entry.ttl, entry.retry, start, probe];
            next = waits.into_iter().flatten().filter_map(|d| d.left().ok()).chain(next).min();
            self.assign(&mut inner, &id);
        }
        drop(inner);
        for id in ttls {
            self.want_stop(&id, Reason::TtlExpired, Some("its time to live was over".into()));
        }
        next
    }

    /// A workload's state and status.
    pub fn status(&self, id: &WorkloadId) -> Option<(State, Status)> {
        self.lock().entries.get(id).map(|entry| (entry.state, entry.status.clone()))
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
        let has = |entry: &&Entry| entry.made.as_ref().is_some_and(|m| m.container_id == container_id);
        inner.entries.values().find(has).map(|entry| (entry.workload.id.clone(), entry.version))
    }

    /// Waits until a workload is in such a state, gone, or the time is up; then as [`Registry::status`].
    pub fn wait(&self, id: &WorkloadId, until: Until, deadline: Deadline, stopping: &AtomicBool) -> Option<(State, Status)> {
        let mut inner = self.lock();
        loop {
            let entry = inner.entries.get(id)?;
            let left = deadline.left();
            if until.is_reached(entry.state) || left.is_err() || stopping.load(Ordering::SeqCst) {
                return Some((entry.state, entry.status.clone()));
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
    pub fn page(&self, after: Option<&WorkloadId>, limit: usize) -> (Vec<Object>, bool) {
        use std::ops::Bound;
        let inner = self.lock();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = inner.entries.range::<WorkloadId, _>((from, Bound::Unbounded)).map(|(_, entry)| entry);
        let page = rest.by_ref().take(limit).map(Entry::object).collect();
        (page, rest.next().is_some())
    }

    /// Everything as it is, and every change from then on; `None` when there are `WATCHES_MAX` already.
    pub fn watch(&self) -> Option<Watch> {
        let mut inner = self.lock();
        inner.watchers.retain(|watcher| watcher.alive.strong_count() > 0);
        if inner.watchers.len() >= limits::WATCHES_MAX {
            return None;
        }
        let (sender, events) = bounded(limits::WATCH_EVENTS_MAX);
        let alive = Arc::new(());
        inner.watchers.push(Watcher { events: sender, alive: Arc::downgrade(&alive) });
        let revision = inner.revision;
        let added = |entry: &Entry| Event { revision, event: EventKind::Added, object: entry.object() };
        let present = inner.entries.values().map(added).collect();
        Some(Watch { present, revision, events, _alive: alive })
    }

    /// The revision of the last change.
    pub fn revision(&self) -> u64 {
        self.lock().revision
    }

    /// What all workloads that are not over take, overhead included.
    pub fn allocated(&self) -> Resources {
        let inner = self.lock();
        let active = inner.entries.values().filter(|entry| !entry.state.is_terminal());
        active.fold(Resources::default(), |sum, entry| Resources {
            memory_mb: sum.memory_mb + entry.workload.spec.memory_mb + entry.class.overhead_mb,
            cpu_millicores: sum.cpu_millicores + entry.workload.spec.cpu_millicores,
            workloads: sum.workloads + 1,
        })
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
            is_ending: entry.wanted != Wanted::Run,
        };
        inner.entries.values().map(known).collect()
    }

    /// Which acceptance of a workload is here; `None` when there is none.
    pub fn uid(&self, id: &WorkloadId) -> Option<Arc<str>> {
        self.lock().entries.get(id).map(|entry| Arc::clone(&entry.uid))
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

    fn finish_start(&self, id: &WorkloadId, result: Result<(Started, bool), StartError>) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        entry.work = Work::Idle;
        entry.status.observed_at = Timestamp::now();
        match result {
            Ok((started, own_kernel)) => {
                let [pull, sandbox, create, start] = started.steps_ms.map(Some);
                entry.become_state(State::Running);
                entry.failures = 0;
                entry.probe = if own_kernel { Probe::Due } else { Probe::Over };
                entry.ttl = entry.workload.spec.ttl_ms.map(|ms| Deadline::within_ms(ms, "ttl"));
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
                        entry.ended(ending);
                    }
                    Observed::Created | Observed::Unknown => {}
                }
            }
            Err(error) if error.retriable && entry.wanted == Wanted::Run && entry.start_deadline.left().is_ok() => {
                entry.status.attempt += 1;
                entry.status.phase = None;
                entry.status.reason = Some(error.reason);
                entry.status.message.get_or_insert_with(|| error.message.clone());
                entry.fail_chore(error.message);
            }
            Err(error) => {
                let (reason, message) = match entry.wanted.clone() {
                    Wanted::Stop { reason, message } => (reason, message.unwrap_or(error.message)),
                    Wanted::Delete => (Reason::Stopped, error.message),
                    Wanted::Run => (error.reason, error.message),
                };
                entry.give_up(reason, message);
            }
        }
        self.publish(&mut inner, id, EventKind::Modified);
    }

    fn finish_end(&self, id: &WorkloadId, result: Result<EndStep, String>) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        entry.work = Work::Idle;
        match result {
            Ok(EndStep::Ended(ending)) => {
                entry.failures = 0;
                entry.ended(ending);
            }
            Ok(EndStep::Asked) => {
                let kill = Deadline::within_ms(entry.grace_ms().saturating_sub(limits::STOP_WAIT_MS), "grace");
                entry.kill = Some(kill);
                entry.retry = Some(kill);
            }
            Ok(EndStep::Gone) => {
                entry.failures = 0;
                let version = entry.version;
                drop(inner);
                return self.vanished(id, version);
            }
            Ok(EndStep::Removed) => {
                let spec_bytes = entry.spec_bytes;
                // Nothing is to be done about it any more, so its last event must not queue anything.
                entry.work = Work::Doing;
                self.publish(&mut inner, id, EventKind::Deleted);
                inner.entries.remove(id);
                inner.specs_bytes = inner.specs_bytes.saturating_sub(spec_bytes);
                drop(inner);
                self.changed.notify_all();
                return;
            }
            Ok(EndStep::Retired) => {
                entry.failures = 0;
                if let Some(made) = &mut entry.made {
                    made.retired = true;
                }
                // Nothing a watcher sees has changed.
                return self.assign(&mut inner, id);
            }
            Err(message) => entry.fail_chore(message),
        }
        self.publish(&mut inner, id, EventKind::Modified);
    }

    /// Counts a change, tells the watchers, wakes who waits, and hands out what the change calls for.
    fn publish(&self, inner: &mut Inner, id: &WorkloadId, kind: EventKind) {
        inner.revision += 1;
        let revision = inner.revision;
        if let Some(entry) = inner.entries.get_mut(id) {
            entry.version = revision;
            if !inner.watchers.is_empty() {
                let event = Arc::new(Event { revision, event: kind, object: entry.object() });
                // Dropping the sender of a watcher that is too slow, or gone, is how it learns.
                inner.watchers.retain(|watcher| watcher.events.try_send(Arc::clone(&event)).is_ok());
            }
        }
        self.assign(inner, id);
        self.changed.notify_all();
    }

    /// Puts the entry's next chore into its queue.
    fn assign(&self, inner: &mut Inner, id: &WorkloadId) {
        let Some(entry) = inner.entries.get_mut(id) else { return };
        let is_probe_due = entry.probe == Probe::Due
            && entry.state == State::Running
            && entry.wanted == Wanted::Run
            && entry.probe_retry.is_none_or(|(retry, _)| retry.left().is_err());
        if is_probe_due && self.queues.probes.try_send(id.clone()).is_ok() {
            entry.probe = Probe::Queued;
        }
        if entry.work != Work::Idle {
            return;
        }
        let Some(chore) = entry.chore() else { return };
        let queue = match chore {
            Chore::Start => &self.queues.starts,
            Chore::Remove | Chore::Retire | Chore::Stop => &self.queues.ends,
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

/// How an entry that is there answers a request to accept.
fn present(inner: &mut Inner, workload: &Workload) -> Option<Result<(State, Status), Refusal>> {
    let entry = inner.entries.get_mut(&workload.id)?;
    if entry.wanted == Wanted::Delete {
        return Some(Err(Refusal::Leaving));
    }
    if !is_same(entry, workload) {
        return Some(Err(Refusal::Differs));
    }
    if !entry.is_env_known {
        entry.workload = Arc::new(workload.clone());
        entry.is_env_known = true;
    }
    Some(Ok((entry.state, entry.status.clone())))
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

/// A start in flight. Dropped unfinished, by a panic, it marks the workload failed.
pub struct StartTicket<'a> {
    registry: &'a Registry,
    id: WorkloadId,
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
    /// Until when.
    pub deadline: Deadline,
    cancel: Arc<AtomicBool>,
    is_over: bool,
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
    is_over: bool,
}

/// What a worker brought about.
#[derive(Debug)]
pub enum EndStep {
    /// The container was asked to end, and has its grace.
    Asked,
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

#[cfg(test)]
mod tests;
