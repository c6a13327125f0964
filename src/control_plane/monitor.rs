//! One watcher per node: asks its agent every heartbeat what it is, follows its events, notices when it is lost and found.
//!
//! The agent begins a watch with an event for every workload it has and a heartbeat, then sends changes, and a heartbeat whenever
//! it was quiet for `HEARTBEAT_MS`. The first heartbeat ends the list: a workload of ours that was not on it is asked about.
//!
//! A workload that an agent has and that is not placed there is a stranger: of somebody else who speaks with the agent, or of a store
//! that was lost or is older than the agent's truth. It is counted, named in the log, and left alone.
//!
//! A node whose events cannot be followed takes work all the same: what happens there is seen when it is asked for. That it is so is
//! said in the log and where the node is shown.
//!
//! Invariant: a lost node changes no workload's state; its truth grows old, and `observed_at` says so.
//! Invariant: a node is ready only while the last answer of its agent says so, under the name it is configured by.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::node_client::{Error, NodeClient};
use super::store::Record;
use super::{Plane, Stopping};
use crate::deadline::{Deadline, Timestamp};
use crate::limits;
use crate::metrics;
use crate::net::Address;
use crate::report::{Chain, clip};
use crate::wire::agent::{self, Event, EventKind, Reply, Request};
use crate::wire::api::NodeObject;
use crate::workload::{Desired, Name, WorkloadId};

/// A node: how to reach it, and what is known of it.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) name: Name,
    pub(super) client: NodeClient,
    view: Mutex<View>,
    strangers: Mutex<Strangers>,
    watching: Mutex<Watching>,
}

/// How following its events goes.
#[derive(Debug, Default)]
struct Watching {
    /// Watches that failed one after the other, although the agent answers.
    failures: u32,
    /// Why the last of them did, when it was not the first.
    trouble: Option<String>,
}

/// Workloads that an agent has and that are not placed there.
#[derive(Debug, Default)]
struct Strangers {
    ids: BTreeSet<WorkloadId>,
    /// Those the log names already.
    told: BTreeSet<WorkloadId>,
    /// Whether the agent has named all it has.
    is_whole: bool,
    /// Whether it has more than are kept here, or named one that could not be read.
    has_others: bool,
}

impl Strangers {
    /// Those of the next list take their place.
    fn clear(&mut self) {
        self.ids.clear();
        (self.is_whole, self.has_others) = (false, false);
    }

    /// No more are kept than one agent of ours has.
    fn add(&mut self, id: WorkloadId) {
        if self.ids.len() < limits::AGENT_WORKLOADS_MAX {
            self.ids.insert(id);
        } else {
            self.has_others |= !self.ids.contains(&id);
        }
    }

    /// Whether it is one of them; `None` when nobody here can say.
    fn has(&self, id: &WorkloadId) -> Option<bool> {
        if self.ids.contains(id) { Some(true) } else { (self.is_whole && !self.has_others).then_some(false) }
    }
}

/// A node as last seen.
#[derive(Clone, Debug)]
pub(super) struct View {
    /// Whether it was ever tried to ask its agent.
    pub(super) was_asked: bool,
    /// Whether its agent answered last time, and under its name.
    pub(super) is_reachable: bool,
    /// Why it takes no work.
    pub(super) trouble: Option<String>,
    /// When its agent last answered.
    pub(super) observed_at: Option<Timestamp>,
    /// As its agent described it.
    pub(super) node: Option<Arc<agent::Node>>,
}

impl Node {
    /// A node nobody spoke with yet.
    pub(super) fn new(name: Name, address: Address, stopping: Arc<Stopping>) -> Self {
        let view = View { was_asked: false, is_reachable: false, trouble: Some("no answer yet".into()), observed_at: None, node: None };
        let client = NodeClient::new(name.clone(), address, stopping);
        Self { name, client, view: Mutex::new(view), strangers: Mutex::default(), watching: Mutex::default() }
    }

    /// As last seen.
    pub(super) fn view(&self) -> View {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many workloads it has that are not placed there.
    pub(super) fn strangers(&self) -> usize {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner).ids.len()
    }

    /// Whether a workload of this id is among them; `None` as long as its agent has not named all it has in words that are known here.
    pub(super) fn has_stranger(&self, id: &WorkloadId) -> Option<bool> {
        self.with_strangers(|strangers| strangers.has(id))
    }

    /// Takes a workload for one that is placed there: its agent answered for it.
    pub(super) fn adopt(&self, id: &WorkloadId) {
        self.with_strangers(|strangers| strangers.ids.remove(id));
    }

    fn with_strangers<T>(&self, act: impl FnOnce(&mut Strangers) -> T) -> T {
        act(&mut self.strangers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Names new strangers in the log; not at once, for what is being deleted looks like one for a moment.
    fn tell_strangers(&self) {
        let new: Vec<String> = self.with_strangers(|strangers| {
            let new = strangers.ids.difference(&strangers.told).map(ToString::to_string).collect();
            strangers.told.clone_from(&strangers.ids);
            new
        });
        if !new.is_empty() {
            let (count, some) = (new.len(), new.iter().take(limits::PLACEMENT_REASONS_MAX).cloned().collect::<Vec<_>>().join(", "));
            log::warn!("node {}: {count} workloads there are not of this control plane, and are left alone: {some}", self.name);
        }
    }

    fn watching(&self) -> MutexGuard<'_, Watching> {
        self.watching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a watch of an agent that answers ended. Once is no more than a connection that was lost.
    fn note_watch_failure(&self, error: &Error) {
        let text = clip(format!("its events cannot be followed: {}", Chain(error)), limits::MESSAGE_BYTES_MAX);
        let mut watching = self.watching();
        watching.failures = watching.failures.saturating_add(1);
        let is_new = watching.failures >= 2 && watching.trouble.is_none();
        watching.trouble = (watching.failures >= 2).then(|| text.clone());
        drop(watching);
        if is_new {
            log::warn!("node {}: {text}", self.name);
        }
    }

    /// Notes that something came of a watch that lasts.
    fn note_watch(&self) {
        let Watching { trouble, .. } = std::mem::take(&mut *self.watching());
        if trouble.is_some() {
            log::info!("node {}: its events are followed again", self.name);
        }
    }

    /// As the API shows it.
    pub(super) fn object(&self) -> NodeObject {
        let View { trouble, observed_at, node, .. } = self.view();
        let unwatched = self.watching().trouble.clone();
        NodeObject {
            id: self.name.to_string(),
            address: self.client.address().to_string(),
            ready: trouble.is_none(),
            message: trouble.or(unwatched),
            observed_at,
            strangers: self.strangers(),
            node: node.map(|node| node.as_ref().clone()),
        }
    }

    /// Asks the agent what the node is, and notes that, or that it did not answer.
    fn ask(&self) -> Result<(), Error> {
        self.client.sweep();
        let deadline = Deadline::within_ms(limits::NODE_REQUEST_MS_MAX, "GetNode");
        let result = match self.client.request(&Request::GetNode, deadline) {
            Ok(Reply::Node(node)) => Ok(Arc::from(node)),
            Ok(_) => Err(Error::Unexpected),
            Err(error) => Err(error),
        };
        let was = self.view();
        let (is, result) = match result {
            Ok(node) => {
                let trouble = trouble_of(&node);
                (View { was_asked: true, is_reachable: true, trouble, observed_at: Some(Timestamp::now()), node: Some(node) }, Ok(()))
            }
            Err(error) => {
                // Whoever mixed up two addresses sees what is there.
                let node = if let Error::Somebody(node) = &error { Some(Arc::new(node.as_ref().clone())) } else { was.node.clone() };
                let trouble = Some(clip(Chain(&error).to_string(), limits::MESSAGE_BYTES_MAX));
                (View { was_asked: true, is_reachable: false, trouble, node, ..was.clone() }, Err(error))
            }
        };
        match (&was.trouble, &is.trouble) {
            (Some(_), None) => log::info!("node {} is ready", self.name),
            (old, Some(new)) if old.as_ref() != Some(new) => log::warn!("node {} takes no work: {new}", self.name),
            (None | Some(_), Some(_)) | (None, None) => {}
        }
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = is;
        result
    }
}

/// Why a node that answered takes no work.
fn trouble_of(node: &agent::Node) -> Option<String> {
    if node.ready {
        return None;
    }
    let failed = node.conditions.iter().filter(|condition| !condition.ok);
    let failed: Vec<String> = failed.map(|condition| format!("{}: {}", condition.r#type, condition.message)).collect();
    let why = if failed.is_empty() { "its agent says it is not ready".into() } else { failed.join("; ") };
    Some(clip(why, limits::MESSAGE_BYTES_MAX))
}

/// The thread `node-NAME`.
pub(super) fn run(plane: &Plane, node: &Node) {
    let mut pause_ms = limits::NODE_PAUSE_MS_MIN;
    loop {
        let mut was_watched = false;
        let was_lost = !node.view().is_reachable;
        if let Err(error) = node.ask().and_then(|()| watch(plane, node, was_lost, &mut was_watched)) {
            log::debug!("node {}: {}", node.name, Chain(&error));
            if node.view().is_reachable && !plane.stopping.is_set() {
                node.note_watch_failure(&error);
            }
        }
        // What it takes from others from now on is not heard of.
        node.with_strangers(|strangers| strangers.is_whole = false);
        // What was well until now is looked at again soon.
        pause_ms = if was_watched { limits::NODE_PAUSE_MS_MIN } else { pause_ms.saturating_mul(2).min(limits::NODE_PAUSE_MS_MAX) };
        if plane.stopping.wait(pause_ms) {
            return;
        }
    }
}

/// Follows the agent's events until they end; `was_watched` says whether any came.
fn watch(plane: &Plane, node: &Node, was_lost: bool, was_watched: &mut bool) -> Result<(), Error> {
    let mut replies = node.client.stream(&Request::Watch { since: None }, Deadline::within_ms(limits::NODE_REQUEST_MS_MAX, "Watch"))?;
    if was_lost {
        plane.dispatch.trust(&node.name);
    }
    plane.nudge_all_on(&node.name);
    // The list to come names those that are still there.
    node.with_strangers(Strangers::clear);
    let silence = || Deadline::within_ms(limits::WATCH_SILENCE_MS_MAX, "watch");
    // A node that is not ready, or not sure, is asked again soon: it may have begun a moment ago.
    let heartbeat = |is_sure: bool| {
        let is_well = is_sure && node.view().trouble.is_none();
        Deadline::within_ms(if is_well { limits::HEARTBEAT_MS } else { limits::NODE_WAIT_SLICE_MS }, "heartbeat")
    };
    // What was on the list, as long as there is something that should have been; and whether the list was whole.
    let (mut listed, mut is_whole, mut has_unread) = (Some(HashSet::new()), false, false);
    let (mut silent, mut next_ask) = (silence(), heartbeat(true));
    loop {
        // One that always has news never waits, and it is the wait that notices a stop.
        if plane.stopping.is_set() {
            return Err(Error::Stopping);
        }
        if next_ask.left().is_err() {
            node.ask()?;
            listed = listed.filter(|listed| !is_whole || !is_sure_of_missing(plane, node, listed));
            next_ask = heartbeat(listed.is_none());
        }
        // What lasted beyond its list is a watch that works.
        let lasts = is_whole;
        let mut list = |id: &WorkloadId| {
            // An agent may have any number of others.
            let is_ours = || plane.store.get(id).is_some_and(|record| record.node == node.name);
            if let Some(listed) = listed.as_mut().filter(|_| is_ours()) {
                listed.insert(id.clone());
            }
        };
        match replies.next(next_ask) {
            Err(Error::Garbled(unreadable)) if unreadable.is_reply => {
                metrics::WATCH_LINES_UNREAD.add_one();
                if !std::mem::replace(&mut has_unread, true) {
                    let why = clip(Chain(&unreadable).to_string(), limits::MESSAGE_BYTES_MAX);
                    log::warn!("node {}: an event is skipped, and others like it: {why}", node.name);
                }
                let is_ours = |id: &WorkloadId| plane.store.get(id).is_some_and(|record| record.node == node.name);
                match &unreadable.id {
                    Some(id) if is_ours(id) => list(id),
                    // One may have come that nobody here knows of. From now on the agent is asked what it has.
                    Some(_) | None => node.with_strangers(|strangers| strangers.has_others = true),
                }
            }
            Err(error) => return Err(error),
            Ok(Some(Reply::Event(event))) => {
                if let Some(id) = id_of(&event) {
                    list(&id);
                }
                // What the node has left is another thing now, and the scheduler goes by what its agent said of that.
                let is_of_room = event.event != EventKind::Modified || event.object.state.is_terminal();
                next_ask = if is_of_room { next_ask.or_sooner(heartbeat(false)) } else { next_ask };
                take(plane, node, event);
            }
            Ok(Some(Reply::Heartbeat { .. })) => {
                is_whole = true;
                node.with_strangers(|strangers| strangers.is_whole = true);
                listed = listed.filter(|listed| !is_sure_of_missing(plane, node, listed));
                next_ask = if listed.is_some() { heartbeat(false) } else { next_ask };
                node.tell_strangers();
            }
            Ok(Some(_)) => return Err(Error::Unexpected),
            Ok(None) if silent.left().is_err() => return Err(Error::Expired(silent.expired())),
            Ok(None) => continue,
        }
        if lasts {
            node.note_watch();
        }
        *was_watched = true;
        silent = silence();
    }
}

fn id_of(event: &Event) -> Option<WorkloadId> {
    event.object.spec.get("id").and_then(|id| id.as_str()).and_then(|id| WorkloadId::new(id).ok())
}

/// Notes an event. What we did not place there is somebody else's, and left alone.
fn take(plane: &Plane, node: &Node, event: Event) {
    let Some(id) = id_of(&event) else { return };
    let record = plane.store.get(&id).filter(|record| record.node == node.name);
    let is_gone = event.event == EventKind::Deleted;
    node.with_strangers(|strangers| {
        if record.is_none() && !is_gone {
            strangers.add(id.clone());
        } else {
            strangers.ids.remove(&id);
        }
    });
    let Some(record) = record else { return };
    match event.event {
        EventKind::Added | EventKind::Modified => {
            let has_labels = has_labels(&event, &record);
            let after = plane.observe(&record, event.object.state, *event.object.status);
            // An agent that was started anew knows the labels of the start.
            if let (Some(after), false) = (after, has_labels) {
                plane.amend(&after, |current| (!current.has_new_labels).then(|| Record { has_new_labels: true, ..current.clone() }));
                plane.dispatch.nudge(&id);
            }
        }
        // It may be an earlier workload of the same id that is gone: the agent is asked, by the dispatcher or by us.
        EventKind::Deleted if record.desired == Desired::Deleted => plane.dispatch.nudge(&record.workload.id),
        EventKind::Deleted => drop(plane.refresh(&record)),
    }
}

/// Whether the agent has the workload under the labels that are wished.
fn has_labels(event: &Event, record: &Record) -> bool {
    let wished = &record.workload.spec.labels;
    match event.object.spec.get("labels").and_then(|labels| labels.as_object()) {
        None => wished.is_empty(),
        Some(labels) => {
            labels.len() == wished.len() && wished.iter().all(|(key, value)| labels.get(key).and_then(|v| v.as_str()) == Some(value))
        }
    }
}

/// Asks about workloads that should be there and were not on the list; whether the agent knew about all of them. One that began a
/// moment ago may not have seen yet what its runtime has.
fn is_sure_of_missing(plane: &Plane, node: &Node, listed: &HashSet<WorkloadId>) -> bool {
    let is_missing = |record: &Record| {
        let was_there = record.is_known || record.has_run;
        record.node == node.name && was_there && !record.state.is_terminal() && !listed.contains(&record.workload.id)
    };
    let missing = plane.store.page(None, usize::MAX, is_missing).records;
    let asked = missing.iter().take_while(|_| !plane.stopping.is_set());
    let unsure = asked.filter(|record| !plane.inquire(record).1).count();
    unsure == 0
}

#[cfg(test)]
mod tests {
    use super::super::scheduler::tests::node;
    use super::*;
    use crate::wire::agent::Condition;

    #[test]
    fn a_node_is_ready_when_it_says_so() {
        let check = |node: agent::Node, expect: Option<&str>| assert_eq!(trouble_of(&node).as_deref(), expect);
        let well = || node("node-1", &["gvisor"]);
        let failed = || Condition { r#type: "RuntimeReady".into(), ok: false, message: "no answer".into() };
        check(well(), None);
        check(agent::Node { ready: false, ..well() }, Some("its agent says it is not ready"));
        check(agent::Node { ready: false, conditions: vec![failed()], ..well() }, Some("RuntimeReady: no answer"));
        let loud = agent::Node { ready: false, conditions: vec![failed(); limits::NODE_CONDITIONS_MAX], ..well() };
        assert_eq!(trouble_of(&loud).map(|text| text.len()), Some(limits::MESSAGE_BYTES_MAX));
    }

    #[test]
    fn what_nobody_can_say_is_not_said() {
        let id = |i: usize| WorkloadId::new(&format!("w{i}")).expect("an id");
        let mut strangers = Strangers { is_whole: true, ..Strangers::default() };
        for i in 0..limits::AGENT_WORKLOADS_MAX {
            strangers.add(id(i));
        }
        strangers.add(id(0));
        let beyond = id(limits::AGENT_WORKLOADS_MAX);
        assert_eq!((strangers.has(&id(0)), strangers.has(&beyond)), (Some(true), Some(false)));
        strangers.add(beyond.clone());
        assert_eq!((strangers.has(&id(0)), strangers.has(&beyond)), (Some(true), None), "it may be one that did not fit");
        strangers.clear();
        assert_eq!(strangers.has(&id(0)), None, "as long as there is no new list");
    }
}
