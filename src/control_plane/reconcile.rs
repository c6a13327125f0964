//! What is desired (the store) against what agents say: [`decide`] and [`plan`] are pure, everything applied is idempotent.
//!
//! A nudge puts an id into a bounded queue; a dispatcher looks up what is to be done for it *then*, and does it. Nothing but ids is
//! queued, so nothing stale is ever done; a nudge that is lost or does not fit is made good by the next pass.
//!
//! ```text
//!   POST, DELETE, stop --+                        +-- dispatch-0 --+
//!   events of agents ----+--> nudge --> queue --> +       ..       +--> claim, decide, StartWorkload, StopWorkload, DeleteWorkload
//!   a pass every 2 s ----+                        +-- dispatch-7 --+
//! ```
//! Invariant: of all that changes one workload, one request is under way at a time: whoever sends it holds its [`Claim`].
//! Invariant: dispatchers busy with one node <= `DISPATCHERS_PER_NODE_MAX`.
//! Invariant: no start is sent of what was ever seen to run ([`Record::has_run`]). What was not is sent again when its agent says that
//! it has no such workload; an agent says so only once it has listed its runtime, which keeps what it ever started.
//! Invariant: no workload is deleted at an agent but one whose record says so; what an agent has and nobody here knows is left alone.
//! Invariant: nothing here invents a state: what an agent did not say stays as old as its `observed_at`. The two exceptions are a
//! workload that never ran and never will, and one that ran and that its agent, having listed its runtimes, knows nothing of: both are
//! Failed, the latter without an exit code.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::Plane;
use super::node_client::Error;
use super::store::Record;
use crate::deadline::{Deadline, Stopwatch};
use crate::limits;
use crate::report::Chain;
use crate::wire::Status;
use crate::wire::agent::{ErrorCode, Reply, Request, Until};
use crate::workload::{Desired, Name, Reason, State, WorkloadId};

/// What an agent is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Delete,
    /// Its labels.
    Label,
    Start,
    Stop,
}

/// What is to be done for a workload; `None` where all is as desired.
fn decide(record: &Record) -> Option<Action> {
    // An agent may have the workload under its old labels although its answer was lost; a start under the new ones would be another.
    let label = record.has_new_labels.then_some(Action::Label);
    match (record.desired, record.state) {
        (Desired::Deleted, _) => Some(Action::Delete),
        (Desired::Run | Desired::Stopped, State::Succeeded | State::Failed) => label,
        (Desired::Stopped, State::Pending | State::Running) => Some(Action::Stop),
        (Desired::Run, State::Pending) if !record.is_known && !record.has_run => label.or(Some(Action::Start)),
        (Desired::Run, State::Pending | State::Running) => label,
    }
}

/// What is to be done now: on nodes that answer, for workloads whose last attempt is long enough ago.
fn plan<'a>(
    records: impl IntoIterator<Item = &'a Record>,
    is_reachable: impl Fn(&Name) -> bool,
    is_due: impl Fn(&WorkloadId) -> bool,
) -> Vec<(&'a WorkloadId, Action)> {
    let ready = |record: &&Record| is_reachable(&record.node) && is_due(&record.workload.id);
    let action = |record: &'a Record| decide(record).map(|action| (&record.workload.id, action));
    records.into_iter().filter(ready).filter_map(action).collect()
}

/// Whether a workload that has not run never will. Whoever asks holds the claim, so that nothing else is on its way to the agent.
fn verdict(action: Action, record: &Record, error: &Error) -> Option<Reason> {
    let Error::Refused(refusal) = error else { return None };
    if record.has_run {
        return None;
    }
    match (action, record.state, refusal.code) {
        (Action::Stop, State::Pending, ErrorCode::NotFound) => Some(Reason::Stopped),
        // The rule will be broken the next time as well.
        (Action::Start, State::Pending, ErrorCode::AlreadyExists | ErrorCode::InvalidArgument | ErrorCode::PermissionDenied) => {
            Some(Reason::Unschedulable)
        }
        _ => None,
    }
}

fn is_unknown(error: &Error) -> bool {
    matches!(error, Error::Refused(refusal) if refusal.code == ErrorCode::NotFound)
}

fn is_invalid(error: &Error) -> bool {
    matches!(error, Error::Refused(refusal) if refusal.code == ErrorCode::InvalidArgument)
}

fn trouble_text(node: &Name, error: &Error) -> String {
    if is_unknown(error) { format!("{node}: the agent does not know it") } else { format!("{node}: {}", Chain(error)) }
}

/// The thread `reconcile`: a pass every `RECONCILE_MS`.
pub(super) fn run(plane: &Plane) {
    while !plane.stopping.wait(limits::RECONCILE_MS) {
        trim(plane);
        let unsettled = plane.store.page(None, usize::MAX, |record| decide(record).is_some()).records;
        plane.dispatch.keep_attempts(&unsettled.iter().map(|record| &record.workload.id).collect());
        for (id, _) in plan(unsettled.iter().map(AsRef::as_ref), |node| plane.is_reachable(node), |id| plane.dispatch.is_due(id)) {
            plane.dispatch.nudge(id);
        }
    }
}

/// Wishes away what ended longest ago and is more than is to be kept.
fn trim(plane: &Plane) {
    let surplus = plane.store.surplus(plane.history);
    if surplus.is_empty() {
        return;
    }
    match plane.store.wish_away(&surplus) {
        Ok(()) => log::info!("{} ended workloads are more than the {} that are kept, and go", surplus.len(), plane.history),
        Err(error) => log::warn!("ended workloads that are too many stay for now: {}", Chain(&error)),
    }
}

/// The threads `dispatch-N`.
pub(super) fn dispatch(plane: &Plane) {
    loop {
        select! {
            recv(plane.dispatch.waiting) -> id => if let Ok(id) = id {
                work_off(plane, id);
            },
            recv(plane.stopping.channel()) -> _ => return,
        }
    }
}

/// Does what is to be done for `id`, and then what piled up for the same node meanwhile.
fn work_off(plane: &Plane, id: WorkloadId) {
    let Some(record) = plane.store.get(&id) else { return };
    let mut next = plane.dispatch.enter(&record.node, id);
    while let Some(id) = next {
        plane.apply(&id);
        next = plane.dispatch.next(&record.node);
    }
}

impl Plane {
    fn apply(&self, id: &WorkloadId) {
        let Some(_claim) = self.dispatch.claim(id) else { return };
        let Some(record) = self.store.get(id) else { return };
        let Some(action) = decide(&record) else { return };
        self.dispatch.note_attempt(id);
        if self.stopping.is_set() || !self.is_reachable(&record.node) {
            return;
        }
        let result = match action {
            Action::Delete => self.delete(&record),
            Action::Label => self.label(&record),
            Action::Start => self.start(&record).map(drop),
            Action::Stop => self.stop(&record),
        };
        let Err(error) = result else { return };
        log::warn!("{action:?} {id} on {}: {}", record.node, Chain(&error));
        match verdict(action, &record, &error) {
            Some(reason) => {
                let fail = |current: &Record| current.failed(reason, trouble_text(&record.node, &error));
                drop(self.amend(&record, |current| (current.state == State::Pending).then(|| fail(current))));
            }
            None => drop(self.trouble(&record, &error)),
        }
    }

    fn is_reachable(&self, node: &Name) -> bool {
        self.nodes.get(node).is_some_and(|node| node.view().is_reachable)
    }

    /// Hands a workload to its agent, and notes what that says of it. Whoever calls this holds the claim.
    ///
    /// # Errors
    /// The agent's refusal, or that there is no telling; the record is left as it was.
    pub(super) fn start(&self, record: &Arc<Record>) -> Result<Option<Arc<Record>>, Error> {
        let workload = Box::new(record.workload.as_ref().clone());
        let reply = self.ask(record, &Request::StartWorkload { workload, wait_ms: None }, limits::NODE_REQUEST_MS_MAX, "StartWorkload")?;
        self.take(record, reply)
    }

    fn stop(&self, record: &Arc<Record>) -> Result<(), Error> {
        let request = Request::StopWorkload { id: record.workload.id.clone(), wait_ms: None };
        let reply = self.ask(record, &request, limits::NODE_REQUEST_MS_MAX, "StopWorkload")?;
        self.take(record, reply).map(drop)
    }

    /// Tells an agent all labels of a workload. Where there is no such workload there is nothing to tell: a start brings them along.
    fn label(&self, record: &Arc<Record>) -> Result<(), Error> {
        let labels = &record.workload.spec.labels;
        let request = Request::UpdateWorkload { id: record.workload.id.clone(), labels: labels.clone() };
        let result = self.ask(record, &request, limits::NODE_REQUEST_MS_MAX, "UpdateWorkload").and_then(|reply| self.take(record, reply));
        // An agent of the version before has no such request. What it knows it will be told when it is replaced.
        let is_settled = result.as_ref().map_or_else(|error| is_unknown(error) || (!record.is_known && is_invalid(error)), |_| true);
        if is_settled {
            let settled = |current: &Record| Record { has_new_labels: false, ..current.clone() };
            self.amend(record, |current| (current.has_new_labels && current.workload.spec.labels == *labels).then(|| settled(current)));
            self.dispatch.nudge(&record.workload.id);
        }
        result.map(drop)
    }

    /// The agent answers at once, that it is gone or that it will be; its event on the end comes back here by a nudge.
    fn delete(&self, record: &Arc<Record>) -> Result<(), Error> {
        let id = &record.workload.id;
        let request = Request::DeleteWorkload { id: id.clone(), wait_ms: Some(0) };
        match self.ask(record, &request, limits::NODE_REQUEST_MS_MAX, "DeleteWorkload") {
            Ok(Reply::Deleted { .. }) => {}
            Ok(_) => return Err(Error::Unexpected),
            Err(Error::Refused(refusal)) if refusal.code == ErrorCode::DeadlineExceeded => return Ok(()),
            Err(error) if is_unknown(&error) => {}
            Err(error) => return Err(error),
        }
        match self.store.remove(id, record.born) {
            Ok(()) => log::info!("{id}: deleted"),
            Err(error) => log::error!("{id}: cannot be forgotten: {}", Chain(&error)),
        }
        Ok(())
    }

    /// Asks the agent how a workload is, and waits until it got somewhere where that is asked for; the record as it is then, which
    /// is as it was when the agent does not answer, or `None` when it is gone.
    pub(super) fn refresh(&self, record: &Arc<Record>, wait: Option<(Until, u64)>) -> Option<Arc<Record>> {
        self.inquire(record, wait).0
    }

    /// As [`Plane::refresh`]; and whether the agent said how it is, be it that there is no such workload.
    pub(super) fn inquire(&self, record: &Arc<Record>, wait: Option<(Until, u64)>) -> (Option<Arc<Record>>, bool) {
        let request = Request::GetStatus { id: record.workload.id.clone(), wait };
        let ms = limits::NODE_STATUS_MS_MAX.saturating_add(wait.map_or(0, |wait| wait.1));
        match self.ask(record, &request, ms, "GetStatus").and_then(|reply| self.take(record, reply)) {
            Ok(after) => (after, true),
            Err(error) => {
                let after = self.trouble(record, &error);
                if is_unknown(&error) && after.as_deref().and_then(decide).is_some() {
                    self.dispatch.nudge(&record.workload.id);
                }
                (after, is_unknown(&error))
            }
        }
    }

    fn ask(&self, record: &Record, request: &Request, ms: u64, phase: &'static str) -> Result<Reply, Error> {
        let node = self.nodes.get(&record.node).ok_or(Error::NoSuchNode)?;
        let deadline = Deadline::within_ms(ms, phase);
        if request.is_change() { node.client.change(request, record.revision, deadline) } else { node.client.request(request, deadline) }
    }

    /// Notes what an agent replied.
    fn take(&self, record: &Arc<Record>, reply: Reply) -> Result<Option<Arc<Record>>, Error> {
        match reply {
            Reply::Status { id, state, status } if id == record.workload.id.as_str() => Ok(self.observe(record, state, *status)),
            _ => Err(Error::Unexpected),
        }
    }

    /// Notes what an agent says of a workload.
    pub(super) fn observe(&self, record: &Arc<Record>, state: State, status: Status) -> Option<Arc<Record>> {
        let mut status = Some(status);
        let mut known = state;
        let after = self.amend(record, |current| {
            known = current.state;
            current.observed(state, status.take()?)
        });
        if !known.may_become(state) {
            log::warn!("{}: {} says {state} of what is {known}", record.workload.id, record.node);
        }
        after
    }

    /// Notes that an agent did not do or say what it was asked to.
    pub(super) fn trouble(&self, record: &Arc<Record>, error: &Error) -> Option<Arc<Record>> {
        self.amend(record, |current| {
            // It ran already when its agent was asked: a question that overtook the start is answered in the same words.
            if is_unknown(error) && record.has_run && !current.state.is_terminal() && current.desired != Desired::Deleted {
                return Some(current.lost(format!("{}: its agent does not know it any more; how it ended is not known", record.node)));
            }
            // Sent again, unless it ever ran: then a second start could be a second run.
            let is_known = current.is_known && !(is_unknown(error) && current.state == State::Pending && !current.has_run);
            let next = || Record { is_known, ..current.troubled(trouble_text(&record.node, error)) };
            (!current.state.is_terminal()).then(next)
        })
    }

    /// Notes what is known now of the workload that `of` is a moment of; `None` when it is gone.
    pub(super) fn amend(&self, of: &Record, change: impl FnOnce(&Record) -> Option<Record>) -> Option<Arc<Record>> {
        let id = &of.workload.id;
        let result = self.store.note(id, |current| if current.born == of.born { change(current) } else { None });
        let current = result.unwrap_or_else(|error| {
            log::error!("{id}: the store did not take a change: {}", Chain(&error));
            self.store.get(id)
        });
        current.filter(|current| current.born == of.born)
    }

    /// Nudges all that is to be done on a node that answers again.
    pub(super) fn nudge_all_on(&self, node: &Name) {
        for record in self.store.page(None, usize::MAX, |record| record.node == *node && decide(record).is_some()).records {
            self.dispatch.nudge(&record.workload.id);
        }
    }
}

/// The queue, and who is at work on what.
#[derive(Debug)]
pub(super) struct Dispatch {
    queue: Sender<WorkloadId>,
    waiting: Receiver<WorkloadId>,
    /// Claimed workloads, and whether somebody was turned away meanwhile.
    claims: Mutex<HashMap<WorkloadId, bool>>,
    /// A claim was given back.
    released: Condvar,
    lanes: Mutex<BTreeMap<Name, Lane>>,
    attempts: Mutex<HashMap<WorkloadId, Attempts>>,
}

/// Dispatchers at one node, and what waits for them.
#[derive(Debug, Default)]
struct Lane {
    busy: usize,
    parked: VecDeque<WorkloadId>,
}

#[derive(Debug)]
struct Attempts {
    count: u32,
    last: Stopwatch,
}

impl Attempts {
    fn is_due(&self) -> bool {
        let doubled = limits::RETRY_MS_MIN.checked_shl(self.count.saturating_sub(1)).unwrap_or(u64::MAX);
        self.last.elapsed_ms() >= doubled.min(limits::RETRY_MS_MAX)
    }
}

/// The right to change a workload's fate on its agent; given back when dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    dispatch: &'a Dispatch,
    id: WorkloadId,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let is_wanted = lock(&self.dispatch.claims).remove(&self.id) == Some(true);
        self.dispatch.released.notify_all();
        if is_wanted {
            self.dispatch.nudge(&self.id);
        }
    }
}

impl Default for Dispatch {
    fn default() -> Self {
        let (queue, waiting) = bounded(limits::DISPATCH_QUEUE_MAX);
        let (claims, lanes, attempts) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { queue, waiting, claims, released: Condvar::new(), lanes, attempts }
    }
}

impl Dispatch {
    /// Has a dispatcher look at a workload soon.
    pub(super) fn nudge(&self, id: &WorkloadId) {
        // A full queue means that the next pass will find it.
        let _ = self.queue.try_send(id.clone());
    }

    /// Claims a workload; `None` when somebody else has, who will have it looked at again.
    pub(super) fn claim(&self, id: &WorkloadId) -> Option<Claim<'_>> {
        let mut claims = lock(&self.claims);
        if let Some(is_wanted) = claims.get_mut(id) {
            *is_wanted = true;
            return None;
        }
        claims.insert(id.clone(), false);
        Some(Claim { dispatch: self, id: id.clone() })
    }

    /// Waits until nobody claims a workload, or the time is over; whether nobody does.
    pub(super) fn wait_released(&self, id: &WorkloadId, deadline: Deadline) -> bool {
        let mut claims = lock(&self.claims);
        while claims.contains_key(id) {
            let Ok(left) = deadline.left() else { return false };
            claims = self.released.wait_timeout(claims, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Takes a place at a node; where there is none, the workload waits for one of those who have.
    fn enter(&self, node: &Name, id: WorkloadId) -> Option<WorkloadId> {
        let mut lanes = lock(&self.lanes);
        let lane = lanes.entry(node.clone()).or_default();
        if lane.busy < limits::DISPATCHERS_PER_NODE_MAX {
            lane.busy += 1;
            return Some(id);
        }
        if lane.parked.len() < limits::DISPATCH_QUEUE_MAX {
            lane.parked.push_back(id);
        }
        None
    }

    /// The next workload that waits at a node; without one the place is left.
    fn next(&self, node: &Name) -> Option<WorkloadId> {
        let mut lanes = lock(&self.lanes);
        let lane = lanes.get_mut(node)?;
        let next = lane.parked.pop_front();
        if next.is_none() {
            lane.busy = lane.busy.saturating_sub(1);
        }
        next
    }

    fn note_attempt(&self, id: &WorkloadId) {
        let mut attempts = lock(&self.attempts);
        let count = attempts.get(id).map_or(1, |attempts| attempts.count.saturating_add(1));
        attempts.insert(id.clone(), Attempts { count, last: Stopwatch::start() });
    }

    fn is_due(&self, id: &WorkloadId) -> bool {
        lock(&self.attempts).get(id).is_none_or(Attempts::is_due)
    }

    fn keep_attempts(&self, unsettled: &BTreeSet<&WorkloadId>) {
        lock(&self.attempts).retain(|id, _| unsettled.contains(id));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::store::tests::record;
    use super::*;

    #[test]
    fn each_desire_has_its_action() {
        let check = |desired, state, is_known, expect| {
            assert_eq!(decide(&Record { desired, state, is_known, ..record("a") }), expect, "{desired:?} {state} {is_known}");
        };
        for state in State::ALL {
            check(Desired::Deleted, *state, true, Some(Action::Delete));
            check(Desired::Stopped, *state, true, (!state.is_terminal()).then_some(Action::Stop));
        }
        check(Desired::Deleted, State::Pending, false, Some(Action::Delete));
        check(Desired::Run, State::Pending, false, Some(Action::Start));
        check(Desired::Run, State::Pending, true, None);
        // Whoever was seen running is never started again.
        check(Desired::Run, State::Running, false, None);
        check(Desired::Run, State::Failed, false, None);
        let restarting = Record { has_run: true, ..record("a") };
        assert_eq!(decide(&restarting), None, "not between two attempts either");
        assert_eq!(decide(&Record { desired: Desired::Stopped, ..restarting }), Some(Action::Stop));
    }

    #[test]
    fn new_labels_come_before_a_start_and_after_a_stop() {
        let check = |desired, state, is_known, has_run, expect| {
            let record = Record { desired, state, is_known, has_run, has_new_labels: true, ..record("a") };
            assert_eq!(decide(&record), Some(expect), "{desired:?} {state} {is_known} {has_run}");
        };
        check(Desired::Run, State::Pending, false, false, Action::Label);
        check(Desired::Run, State::Pending, true, false, Action::Label);
        check(Desired::Run, State::Pending, false, true, Action::Label);
        check(Desired::Run, State::Running, true, true, Action::Label);
        check(Desired::Run, State::Failed, true, true, Action::Label);
        check(Desired::Stopped, State::Running, true, true, Action::Stop);
        check(Desired::Stopped, State::Failed, true, true, Action::Label);
        check(Desired::Deleted, State::Failed, true, true, Action::Delete);
    }

    #[test]
    fn the_plan_leaves_out_silent_nodes_and_recent_attempts() {
        let (a, b) = (record("a"), Record { desired: Desired::Stopped, ..record("b") });
        let c = Record { is_known: true, ..record("c") };
        let records = [&a, &b, &c];
        let plan = |reachable: bool, due: &str| {
            let found = plan(records, |_| reachable, |id| due.contains(id.as_str()));
            found.into_iter().map(|(id, action)| (id.as_str(), action)).collect::<Vec<_>>()
        };
        assert_eq!(plan(true, "abc"), [("a", Action::Start), ("b", Action::Stop)]);
        assert_eq!(plan(true, "b"), [("b", Action::Stop)]);
        assert_eq!(plan(false, "abc"), []);
    }

    #[test]
    fn a_claim_is_exclusive_and_whoever_is_turned_away_gets_a_nudge() {
        let dispatch = Dispatch::default();
        let id = WorkloadId::new("a").expect("an id");
        let first = dispatch.claim(&id);
        assert!(first.is_some() && dispatch.claim(&id).is_none());
        assert!(dispatch.waiting.is_empty());
        assert!(!dispatch.wait_released(&id, Deadline::within_ms(5, "test")), "a claim that is held is no answer");
        drop(first);
        assert!(dispatch.wait_released(&id, Deadline::within_ms(5, "test")));
        assert_eq!(dispatch.waiting.try_recv(), Ok(id.clone()));
        drop(dispatch.claim(&id));
        assert!(dispatch.waiting.is_empty());
    }

    #[test]
    fn one_node_holds_no_more_than_its_share_of_dispatchers() {
        let dispatch = Dispatch::default();
        let (node, other) = (Name::new("n").expect("a name"), Name::new("o").expect("a name"));
        let id = |i: usize| WorkloadId::new(&format!("w{i}")).expect("an id");
        for i in 0..limits::DISPATCHERS_PER_NODE_MAX {
            assert_eq!(dispatch.enter(&node, id(i)), Some(id(i)));
        }
        assert_eq!(dispatch.enter(&node, id(90)), None);
        assert_eq!(dispatch.enter(&other, id(91)), Some(id(91)));
        assert_eq!(dispatch.next(&node), Some(id(90)));
        assert_eq!(dispatch.next(&node), None);
        assert_eq!(dispatch.enter(&node, id(92)), Some(id(92)));
    }

    #[test]
    fn attempts_grow_apart() {
        let dispatch = Dispatch::default();
        let id = WorkloadId::new("a").expect("an id");
        assert!(dispatch.is_due(&id));
        dispatch.note_attempt(&id);
        assert!(!dispatch.is_due(&id));
        dispatch.keep_attempts(&BTreeSet::new());
        assert!(dispatch.is_due(&id));
        let often = Attempts { count: u32::MAX, last: Stopwatch::start() };
        assert!(!often.is_due());
    }
}
