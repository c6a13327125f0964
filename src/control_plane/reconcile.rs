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
//! Invariant: dispatchers busy with one node <= `DISPATCHERS_PER_NODE_MAX`, and <= 1 with one that did not answer in time lately; with
//! all of those together <= `DISPATCHERS_IN_DOUBT_MAX`. A dispatcher does one thing for a node, and is then free for any.
//! Invariant: no start is sent of what was ever seen to run ([`Record::has_run`]). What was not is sent again when its agent says that
//! it has no such workload; an agent says so only once it has listed its runtime, which keeps what it ever started.
//! Invariant: no workload is deleted at an agent but one whose record says so; what an agent has and nobody here knows is left alone.
//! Invariant: nothing here invents a state: what an agent did not say stays as old as its `observed_at`. The two exceptions are a
//! workload that never ran and never will, and one that ran and that its agent, having listed its runtimes, knows nothing of: both are
//! Failed, the latter without an exit code.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::Plane;
use super::node_client::Error;
use super::store::Record;
use crate::deadline::{Deadline, Stopwatch, doubled_ms};
use crate::limits;
use crate::report::Chain;
use crate::wire::Status;
use crate::wire::agent::{ErrorCode, Reply, Request};
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
    is_due: impl Fn(&WorkloadId, Action) -> bool,
) -> Vec<(&'a WorkloadId, Action)> {
    let action = |record: &'a Record| decide(record).map(|action| (&record.workload.id, action));
    let reachable = records.into_iter().filter(|record| is_reachable(&record.node));
    reachable.filter_map(action).filter(|(id, action)| is_due(id, *action)).collect()
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
        // That a node is not configured is said of its workloads, too.
        let is_heard = |node: &Name| plane.is_reachable(node) || !plane.nodes.contains_key(node);
        plane.dispatch.keep_attempts(&unsettled.iter().map(|record| &record.workload.id).collect());
        let is_due = |id: &WorkloadId, action| plane.dispatch.is_due(id, action);
        for (id, _) in plan(unsettled.iter().map(AsRef::as_ref), is_heard, is_due) {
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

/// Does what is to be done for `id`, if there is a place at its node.
fn work_off(plane: &Plane, id: WorkloadId) {
    let Some(record) = plane.store.get(&id) else { return };
    let Some(id) = plane.dispatch.enter(&record.node, id) else { return };
    let answered = plane.apply(&id);
    if plane.dispatch.leave(&record.node, answered) {
        log::info!("node {}: answers in time again", record.node);
        plane.nudge_all_on(&record.node);
    }
}

impl Plane {
    /// Does what is to be done for a workload; whether its agent answered in time, where it was asked.
    fn apply(&self, id: &WorkloadId) -> Option<bool> {
        let _claim = self.dispatch.claim(id)?;
        let record = self.store.get(id)?;
        let action = decide(&record)?;
        if self.dispatch.is_barred(id, action) {
            return None;
        }
        self.dispatch.note_attempt(id, action);
        if !self.nodes.contains_key(&record.node) {
            drop(self.trouble(&record, &Error::NoSuchNode));
            return None;
        }
        if self.stopping.is_set() || !self.is_reachable(&record.node) {
            return None;
        }
        let result = match action {
            Action::Delete => self.delete(&record),
            Action::Label => self.label(&record),
            Action::Start => self.start(&record).map(drop),
            Action::Stop => self.stop(&record),
        };
        let Err(error) = result else { return Some(true) };
        self.dispatch.note_failure(id);
        log::warn!("{action:?} {id} on {}: {}", record.node, Chain(&error));
        match verdict(action, &record, &error) {
            Some(reason) => {
                let fail = |current: &Record| current.failed(reason, trouble_text(&record.node, &error));
                drop(self.amend(&record, |current| (current.state == State::Pending).then(|| fail(current))));
            }
            None => drop(self.trouble(&record, &error)),
        }
        Some(!error.is_hang())
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

    /// Asks the agent how a workload is; the record as it is then, which is as it was when the agent does not answer, or `None` when it
    /// is gone.
    pub(super) fn refresh(&self, record: &Arc<Record>) -> Option<Arc<Record>> {
        self.inquire(record).0
    }

    /// As [`Plane::refresh`]; and whether the agent said how it is, be it that there is no such workload.
    pub(super) fn inquire(&self, record: &Arc<Record>) -> (Option<Arc<Record>>, bool) {
        let request = Request::GetStatus { id: record.workload.id.clone(), wait: None };
        match self.ask(record, &request, limits::NODE_STATUS_MS_MAX, "GetStatus").and_then(|reply| self.take(record, reply)) {
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
            Reply::Status { id, state, status } if id == record.workload.id.as_str() => {
                self.nodes.get(&record.node).into_iter().for_each(|node| node.adopt(&record.workload.id));
                Ok(self.observe(record, state, *status))
            }
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
            (!current.state.is_terminal() || current.desired == Desired::Deleted).then(next)
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

    /// Nudges all that is to be done on a node that answers again, whatever failed there before.
    pub(super) fn nudge_all_on(&self, node: &Name) {
        for record in self.store.page(None, usize::MAX, |record| record.node == *node && decide(record).is_some()).records {
            self.dispatch.forget_attempts(&record.workload.id);
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
    lanes: Mutex<Lanes>,
    attempts: Mutex<HashMap<WorkloadId, Attempts>>,
}

#[derive(Debug, Default)]
struct Lanes {
    by_node: BTreeMap<Name, Lane>,
    /// Dispatchers in lanes that are in doubt, or were when they entered.
    in_doubt: usize,
}

/// Dispatchers at one node, and what waits for them.
#[derive(Debug, Default)]
struct Lane {
    busy: usize,
    /// Of them, those that count as in doubt.
    busy_in_doubt: usize,
    parked: BTreeSet<WorkloadId>,
    /// Grows with every request that was not answered in time, and goes down with every one that was.
    doubts: u32,
    /// When such a request last ended.
    hung: Option<Stopwatch>,
}

impl Lane {
    /// Whether what hung may be tried again.
    fn is_due(&self) -> bool {
        self.hung.is_none_or(|hung| hung.elapsed_ms() >= pause_ms(self.doubts))
    }
}

#[derive(Debug)]
struct Attempts {
    action: Action,
    count: u32,
    has_failed: bool,
    last: Stopwatch,
}

impl Attempts {
    fn is_due(&self, action: Action) -> bool {
        self.action != action || self.last.elapsed_ms() >= pause_ms(self.count)
    }
}

/// Between attempt `count` and the next.
fn pause_ms(count: u32) -> u64 {
    doubled_ms(limits::RETRY_MS_MIN, limits::RETRY_MS_MAX, count)
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

    /// Takes a place at a node. Where all are taken, the workload waits for one. At a node that did not answer in time lately there is
    /// one place at most, and none for a while: the next pass finds what is turned away.
    fn enter(&self, node: &Name, id: WorkloadId) -> Option<WorkloadId> {
        let mut lanes = lock(&self.lanes);
        let Lanes { by_node, in_doubt } = &mut *lanes;
        let lane = by_node.entry(node.clone()).or_default();
        let is_in_doubt = lane.doubts > 0;
        if is_in_doubt && (!lane.is_due() || *in_doubt >= limits::DISPATCHERS_IN_DOUBT_MAX) {
            return None;
        }
        if lane.busy >= if is_in_doubt { 1 } else { limits::DISPATCHERS_PER_NODE_MAX } {
            if lane.parked.len() < limits::DISPATCH_QUEUE_MAX {
                lane.parked.insert(id);
            }
            return None;
        }
        lane.busy += 1;
        if is_in_doubt {
            lane.busy_in_doubt += 1;
            *in_doubt += 1;
        }
        Some(id)
    }

    /// Leaves a place at a node, for one that waits there; `answered` says whether the agent did in time, if it was asked. Whether it
    /// does so again after it had not for some time.
    fn leave(&self, node: &Name, answered: Option<bool>) -> bool {
        let mut lanes = lock(&self.lanes);
        let Lanes { by_node, in_doubt } = &mut *lanes;
        let Some(lane) = by_node.get_mut(node) else { return false };
        lane.busy = lane.busy.saturating_sub(1);
        // Which of them leaves makes no difference to the counts.
        if lane.busy_in_doubt > 0 {
            lane.busy_in_doubt -= 1;
            *in_doubt = in_doubt.saturating_sub(1);
        }
        let doubts = lane.doubts;
        match answered {
            Some(false) => {
                lane.doubts = doubts.saturating_add(1).min(limits::DISPATCH_DOUBTS_MAX);
                lane.hung = Some(Stopwatch::start());
                // Each of them would wait as long. The next pass has them all.
                lane.parked.clear();
            }
            Some(true) => lane.doubts = doubts.saturating_sub(1),
            None => {}
        }
        let next = lane.parked.pop_first();
        let is_trusted_again = doubts > 0 && lane.doubts == 0;
        drop(lanes);
        if let Some(next) = next {
            // At the end of the queue: others had to wait longer.
            self.nudge(&next);
        }
        is_trusted_again
    }

    /// Forgets that a node did not answer in time: it was lost, and is there again.
    pub(super) fn trust(&self, node: &Name) {
        if let Some(lane) = lock(&self.lanes).by_node.get_mut(node) {
            (lane.doubts, lane.hung) = (0, None);
        }
    }

    fn note_attempt(&self, id: &WorkloadId, action: Action) {
        let mut attempts = lock(&self.attempts);
        let before = attempts.get(id).filter(|attempts| attempts.action == action);
        let count = before.map_or(1, |attempts| attempts.count.saturating_add(1));
        attempts.insert(id.clone(), Attempts { action, count, has_failed: false, last: Stopwatch::start() });
    }

    fn note_failure(&self, id: &WorkloadId) {
        if let Some(attempts) = lock(&self.attempts).get_mut(id) {
            attempts.has_failed = true;
        }
    }

    /// Whether a pass is to see to it.
    fn is_due(&self, id: &WorkloadId, action: Action) -> bool {
        lock(&self.attempts).get(id).is_none_or(|attempts| attempts.is_due(action))
    }

    /// Whether the same failed a moment ago. After one that did not, there may be news at any time.
    fn is_barred(&self, id: &WorkloadId, action: Action) -> bool {
        lock(&self.attempts).get(id).is_some_and(|attempts| attempts.has_failed && !attempts.is_due(action))
    }

    fn forget_attempts(&self, id: &WorkloadId) {
        lock(&self.attempts).remove(id);
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
            let found = plan(records, |_| reachable, |id, _| due.contains(id.as_str()));
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
        // However often it is nudged it waits once, and for any that is done.
        assert_eq!(dispatch.enter(&node, id(90)), None);
        assert!(!dispatch.leave(&node, Some(true)));
        assert_eq!(dispatch.waiting.try_recv(), Ok(id(90)), "behind what waits for others");
        assert!(!dispatch.leave(&node, None));
        assert!(dispatch.waiting.is_empty());
        assert_eq!(dispatch.enter(&node, id(92)), Some(id(92)));
    }

    /// As if that long had passed since the last request to it hung.
    fn wait_for(dispatch: &Dispatch, node: &Name) {
        lock(&dispatch.lanes).by_node.get_mut(node).expect("a lane").hung = None;
    }

    #[test]
    fn a_node_that_does_not_answer_in_time_gets_one_dispatcher_now_and_then() {
        let dispatch = Dispatch::default();
        let node = Name::new("n").expect("a name");
        let id = |i: usize| WorkloadId::new(&format!("w{i}")).expect("an id");
        for i in 0..limits::DISPATCHERS_PER_NODE_MAX {
            assert!(dispatch.enter(&node, id(i)).is_some());
        }
        assert_eq!(dispatch.enter(&node, id(90)), None);
        for _ in 0..limits::DISPATCHERS_PER_NODE_MAX {
            assert!(!dispatch.leave(&node, Some(false)));
        }
        assert!(dispatch.waiting.is_empty(), "what waited there is not handed to the next dispatcher");
        assert_eq!(dispatch.enter(&node, id(90)), None, "not yet");
        wait_for(&dispatch, &node);
        assert!(dispatch.enter(&node, id(90)).is_some());
        assert_eq!(dispatch.enter(&node, id(91)), None, "one to try it");
        assert!(!dispatch.leave(&node, Some(true)));
        assert_eq!(dispatch.waiting.try_recv(), Ok(id(91)));
        // So many answers make up for as many that were not.
        assert!(dispatch.enter(&node, id(91)).is_some());
        assert_eq!(dispatch.enter(&node, id(92)), None);
        assert!(!dispatch.leave(&node, Some(true)));
        assert!(dispatch.enter(&node, id(93)).is_some());
        assert!(dispatch.leave(&node, Some(true)), "as before");
        for i in 0..limits::DISPATCHERS_PER_NODE_MAX {
            assert!(dispatch.enter(&node, id(i)).is_some());
        }
        assert!(!dispatch.leave(&node, Some(false)));
        dispatch.trust(&node);
        assert!(dispatch.enter(&node, id(94)).is_some(), "an agent that was started anew");
    }

    #[test]
    fn however_many_nodes_hang_the_others_have_dispatchers() {
        let dispatch = Dispatch::default();
        let id = WorkloadId::new("a").expect("an id");
        let nodes: Vec<Name> = (0..20).map(|i| Name::new(&format!("n{i}")).expect("a name")).collect();
        for node in &nodes {
            assert!(dispatch.enter(node, id.clone()).is_some());
            dispatch.leave(node, Some(false));
            wait_for(&dispatch, node);
        }
        let try_all = || nodes.iter().filter(|node| dispatch.enter(node, id.clone()).is_some()).collect::<Vec<_>>();
        let entered = try_all();
        assert_eq!(entered.len(), limits::DISPATCHERS_IN_DOUBT_MAX);
        let well = Name::new("well").expect("a name");
        assert!(dispatch.enter(&well, id.clone()).is_some());
        assert!(!entered.into_iter().any(|node| dispatch.leave(node, Some(false))));
        let next = try_all();
        assert_eq!(next.len(), limits::DISPATCHERS_IN_DOUBT_MAX);
        for node in next {
            dispatch.trust(node);
            assert!(!dispatch.leave(node, None));
        }
        assert_eq!(lock(&dispatch.lanes).in_doubt, 0);
    }

    #[test]
    fn attempts_grow_apart() {
        let dispatch = Dispatch::default();
        let id = WorkloadId::new("a").expect("an id");
        assert!(dispatch.is_due(&id, Action::Stop));
        dispatch.note_attempt(&id, Action::Stop);
        assert!(!dispatch.is_due(&id, Action::Stop));
        // News may come at any time, but not of what failed; and a new wish is no second attempt.
        assert!(!dispatch.is_barred(&id, Action::Stop));
        dispatch.note_failure(&id);
        assert!(dispatch.is_barred(&id, Action::Stop));
        assert!(dispatch.is_due(&id, Action::Delete) && !dispatch.is_barred(&id, Action::Delete));
        dispatch.keep_attempts(&BTreeSet::new());
        assert!(dispatch.is_due(&id, Action::Stop) && !dispatch.is_barred(&id, Action::Stop));
        let often = Attempts { action: Action::Stop, count: u32::MAX, has_failed: false, last: Stopwatch::start() };
        assert!(!often.is_due(Action::Stop));
        assert_eq!((pause_ms(1), pause_ms(2)), (limits::RETRY_MS_MIN, 2 * limits::RETRY_MS_MIN));
        assert_eq!((pause_ms(0), pause_ms(u32::MAX)), (limits::RETRY_MS_MIN, limits::RETRY_MS_MAX));
    }
}
