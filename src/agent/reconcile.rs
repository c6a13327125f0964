//! The runtime's own list is the truth: it is read again and again, compared with what we know, and the difference acted upon.
//!
//! The comparison ([`plan`]) is pure. What we know is copied *before* the list is read, so that whatever happened in between makes
//! an entry newer than its copy, and every action on it a no-op.
//!
//! Invariant: a workload is called dead only by a list that was read after it was known to run, never by an error.
//! Invariant: a sandbox of ours that nobody here wants is removed; one that is not ours is never in the list.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Agent;
use super::node::Endpoint;
use super::registry::Known;
use crate::cri::proto::{ContainerEventType, ContainerState};
use crate::cri::runtime::{self, Observed, Seen};
use crate::deadline::{Deadline, Stopwatch};
use crate::grpc::{Code, ErrorKind};
use crate::limits;
use crate::report::Chain;
use crate::wire::{Problems, json, workload};
use crate::workload::{Reason, State, Workload, WorkloadId};

/// What a comparison calls for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It ran before this agent started: take it up.
    Adopt(Seen),
    /// It is known to run and seen to: its truth is fresh.
    Confirm {
        /// Which.
        id: WorkloadId,
        /// Its container.
        container_id: String,
    },
    /// Its container ended, or is not to be found: ask how.
    Ask {
        /// Which.
        id: WorkloadId,
        /// As of when it was known.
        version: u64,
        /// Its container.
        container_id: String,
    },
    /// Its sandbox is none any more, with the container in it.
    Ail {
        /// Which.
        id: WorkloadId,
        /// Its container.
        container_id: String,
    },
    /// Its container was made for an agent before this one, and may be about to run.
    Doubt {
        /// Which.
        id: WorkloadId,
        /// Its sandbox.
        seen: Seen,
    },
    /// It runs, and not as it should.
    Kill {
        /// Which.
        id: WorkloadId,
        /// The cause.
        message: String,
    },
    /// It was in the journal, and this is all that is left of it here.
    Recover {
        /// Which.
        id: WorkloadId,
        /// A sandbox of a start that was not finished.
        leftover: Option<Seen>,
    },
    /// Nobody wants it: remove it.
    Sweep(Seen),
    /// The runtime has no sandbox of it.
    Vanished {
        /// Which.
        id: WorkloadId,
        /// As of when it was known.
        version: u64,
    },
}

/// Compares what was known with what the runtime `endpoint` was then seen to have. `first` is the first list since the agent started,
/// in which whatever lives is taken up.
pub fn plan(known: &[Known], seen: &[Seen], endpoint: usize, first: bool) -> Vec<Action> {
    let mut actions = Vec::new();
    let mut owned: BTreeMap<&WorkloadId, &Seen> = BTreeMap::new();
    let mut unknown: BTreeMap<&str, &Seen> = BTreeMap::new();
    let mut halves: BTreeMap<&WorkloadId, &Seen> = BTreeMap::new();
    for sandbox in seen {
        match known.iter().find(|k| k.id.as_str() == sandbox.workload) {
            Some(entry) if entry.owns(sandbox) => {
                owned.insert(&entry.id, sandbox);
            }
            // It may be what the start in flight is about.
            Some(entry) if entry.is_busy && entry.uid == sandbox.uid => {}
            // What an agent before this one was about to start; the latest of them counts.
            Some(entry) if entry.is_recovering && entry.state == State::Pending && entry.uid == sandbox.uid => {
                let other = halves.get(&entry.id).copied().filter(|other| other.attempt >= sandbox.attempt);
                let older = if other.is_some() { Some(sandbox) } else { halves.insert(&entry.id, sandbox) };
                actions.extend(older.map(|older| Action::Sweep(older.clone())));
            }
            // What a failed start left, an earlier attempt, or an earlier workload of the same id.
            Some(_) => actions.push(Action::Sweep(sandbox.clone())),
            // Half a start, or the late effect of one that was given up, has nothing anybody could want.
            None if !first || !sandbox.has_lived() => actions.push(Action::Sweep(sandbox.clone())),
            None => match unknown.get(sandbox.workload.as_str()) {
                Some(other) if other.created_at >= sandbox.created_at => actions.push(Action::Sweep(sandbox.clone())),
                other => {
                    actions.extend(other.map(|other| Action::Sweep((*other).clone())));
                    unknown.insert(&sandbox.workload, sandbox);
                }
            },
        }
    }
    for entry in known.iter().filter(|entry| entry.endpoint == endpoint) {
        actions.extend(compare(entry, owned.get(&entry.id).copied()));
    }
    // After the comparisons: they are about the entries as they were.
    let recovering = known.iter().filter(|entry| entry.is_recovering && entry.endpoint == endpoint);
    actions.extend(recovering.map(|entry| recover(entry, halves.get(&entry.id).copied())));
    actions.extend(unknown.into_values().map(|sandbox| Action::Adopt(sandbox.clone())));
    actions
}

/// What is to be done about an entry of the journal.
fn recover(entry: &Known, half: Option<&Seen>) -> Action {
    let id = entry.id.clone();
    let has_run = |seen: &Seen| match seen.container.as_ref().map(|container| container.state) {
        Some(ContainerState::ContainerRunning) => true,
        // What was never asked to run is called ended by whoever undid its start, and unknown by a runtime that lost it.
        Some(ContainerState::ContainerExited | ContainerState::ContainerUnknown) => entry.is_launched,
        Some(ContainerState::ContainerCreated) | None => false,
    };
    match half {
        Some(seen) if seen.attempt == entry.attempt && has_run(seen) => Action::Adopt(seen.clone()),
        Some(seen) if seen.attempt == entry.attempt && entry.is_launched && seen.is_created() => Action::Doubt { id, seen: seen.clone() },
        leftover => Action::Recover { id, leftover: leftover.cloned() },
    }
}

impl Known {
    fn owns(&self, sandbox: &Seen) -> bool {
        self.made.as_ref().is_some_and(|(sandbox_id, _)| *sandbox_id == sandbox.sandbox_id)
    }
}

impl Seen {
    fn has_lived(&self) -> bool {
        self.container.is_some() && !self.is_created()
    }

    fn is_created(&self) -> bool {
        self.container.as_ref().is_some_and(|c| c.state == ContainerState::ContainerCreated)
    }
}

/// What is to be done about an entry whose sandbox was seen, or was not.
fn compare(entry: &Known, sandbox: Option<&Seen>) -> Option<Action> {
    if entry.is_busy || entry.state != State::Running {
        return None;
    }
    let (id, version) = (entry.id.clone(), entry.version);
    let Some(sandbox) = sandbox else { return Some(Action::Vanished { id, version }) };
    let container_id = entry.made.as_ref().map(|(_, container_id)| container_id.clone())?;
    let unless_ending = |action: Action| (!entry.is_ending).then_some(action);
    match &sandbox.container {
        _ if entry.handler.as_deref() != Some(&sandbox.handler) => {
            let was = entry.handler.as_deref().unwrap_or_default();
            let message = format!("the sandbox had handler {was:?} when it started, the runtime now reports {:?}", sandbox.handler);
            unless_ending(Action::Kill { id, message })
        }
        Some(container) if container.state == ContainerState::ContainerRunning && sandbox.is_ready => {
            Some(Action::Confirm { id, container_id })
        }
        Some(container) if container.state == ContainerState::ContainerRunning => unless_ending(Action::Ail { id, container_id }),
        Some(_) | None => Some(Action::Ask { id, version, container_id }),
    }
}

/// Relists one endpoint until the agent stops.
pub fn relist_loop(agent: &Agent, index: usize, endpoint: &Arc<Endpoint>) {
    let mut health = Stopwatch::start();
    endpoint.refresh();
    loop {
        relist(agent, index, endpoint);
        let with_events = if endpoint.has_events() { limits::RELIST_WITH_EVENTS_MS_DEFAULT } else { limits::RELIST_MS_DEFAULT };
        // A runtime that does not answer is asked more often than one whose events keep us informed.
        let ms = if endpoint.health().error.is_some() { limits::RELIST_MS_DEFAULT } else { agent.relist_ms.unwrap_or(with_events) };
        if !agent.pause(ms) {
            return;
        }
        if health.elapsed_ms() >= limits::HEARTBEAT_MS || endpoint.health().runtime.is_none() {
            endpoint.refresh();
            health = Stopwatch::start();
        }
    }
}

fn relist(agent: &Agent, index: usize, endpoint: &Arc<Endpoint>) {
    if endpoint.health().runtime.is_none() {
        // It never said what it is, so nothing it lists can be judged.
        return;
    }
    let known = agent.registry.known();
    let seen = match runtime::list(&endpoint.client, agent.registry.node()) {
        Ok(seen) => endpoint.without_unreadable(seen),
        Err(error) => return endpoint.note_relist(Err(Chain(&error).to_string())),
    };
    let mut result = Ok(());
    for action in plan(&known, &seen, index, !endpoint.is_listed()) {
        match action {
            // As long as one of them is not taken up, no list counts as the first: the next would sweep what lives.
            Action::Adopt(seen) => result = result.and(adopt(agent, index, endpoint, &seen)),
            action => apply(agent, index, endpoint, action),
        }
    }
    let is_first = !endpoint.is_listed();
    endpoint.note_relist(result);
    if is_first {
        super::work::remove_stray_logs(agent);
    }
}

fn apply(agent: &Agent, index: usize, endpoint: &Arc<Endpoint>, action: Action) {
    match action {
        Action::Adopt(_) => {}
        Action::Ask { id, version, container_id } => ask(agent, endpoint, &id, version, &container_id),
        Action::Confirm { id, container_id } => agent.registry.observe(&id, &container_id, Observed::Running(None)),
        Action::Ail { id, container_id } => {
            agent.registry.ail(&id, &container_id, Reason::SandboxDied, "the sandbox is not ready any more".into());
        }
        Action::Doubt { id, seen } => {
            if agent.registry.is_past_doubt(&id) {
                log::info!("workload {id}: its start was asked for and never happened");
                agent.registry.recovered(&id, Some(&seen), true);
            }
        }
        Action::Kill { id, message } => {
            log::error!("workload {id}: {message}; it is stopped");
            agent.registry.want_stop(&id, Reason::IsolationMismatch, Some(message));
        }
        Action::Recover { id, leftover } => agent.registry.recovered(&id, leftover.as_ref(), false),
        Action::Sweep(seen) => {
            // A start that was accepted or taken up after the copy was taken may own it.
            let owner = WorkloadId::new(&seen.workload);
            if !owner.is_ok_and(|id| agent.registry.may_own(&id, &seen.uid, &seen.sandbox_id)) {
                agent.sweeps.offer(index, seen);
            }
        }
        Action::Vanished { id, version } => agent.registry.vanished(&id, version),
    }
}

/// Asks how a container is, and records it.
pub fn ask(agent: &Agent, endpoint: &Endpoint, id: &WorkloadId, version: u64, container_id: &str) {
    match runtime::observe(&endpoint.client, container_id, Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "ask")) {
        Ok(observed) => agent.registry.observe(id, container_id, observed),
        Err(error) if error.code() == Some(Code::NotFound) => agent.registry.vanished(id, version),
        Err(error) => log::debug!("workload {id}: {}", Chain(&error)),
    }
}

fn adopt(agent: &Agent, index: usize, endpoint: &Endpoint, seen: &Seen) -> Result<(), String> {
    // What the journal knows needs no annotation.
    let known = WorkloadId::new(&seen.workload).ok().and_then(|id| agent.registry.workload(&id, &seen.uid));
    let workload = match known.map_or_else(|| parse_annotation(seen), Ok) {
        Ok(workload) => workload,
        Err(problems) => {
            // It carries our labels, so somebody may rely on it; what we cannot read we do not touch.
            log::error!("sandbox {} of workload {:?} cannot be taken up and is left alone: {problems}", seen.sandbox_id, seen.workload);
            endpoint.leave_alone(seen.sandbox_id.clone());
            return Ok(());
        }
    };
    let found = runtime::find_out(&endpoint.client, seen);
    let found = found.map_err(|error| format!("workload {} not taken up yet: {}", workload.id, Chain(&error)))?;
    log::info!("workload {}: taken up again, {:?}", workload.id, found.observed);
    let overhead_mb = agent.node.class(&workload.runtime_class).map_or(0, |offer| offer.class.overhead_mb);
    agent.registry.adopt(workload, seen, overhead_mb, index, found);
    Ok(())
}

fn parse_annotation(seen: &Seen) -> Result<Workload, Problems> {
    let mut problems = Problems::default();
    let workload = workload::complete(json::parse(seen.annotation.as_bytes())?, "", &mut problems);
    match workload {
        Some(workload) if problems.is_empty() && workload.id.as_str() == seen.workload => Ok(workload),
        Some(_) if problems.is_empty() => Err(Problems::one("/id", "differs from the label")),
        Some(_) | None => Err(problems),
    }
}

/// Listens to the events of one endpoint until the agent stops. They are hints: each makes us ask, none is believed.
pub fn event_loop(agent: &Agent, index: usize, endpoint: &Arc<Endpoint>) {
    let mut pause_ms = limits::RELIST_MS_DEFAULT;
    loop {
        let result = listen(agent, index, endpoint);
        endpoint.set_events(false);
        agent.stoppers.set(index, None);
        pause_ms = match result {
            Ok(true) => limits::RELIST_MS_DEFAULT,
            // It ended the stream without a single event: it has none to send (CRI-O, unless configured).
            Ok(false) => (pause_ms * 2).min(limits::PROBE_PAUSE_MS_MAX),
            Err(error) if error.code() == Some(Code::Unimplemented) => {
                return log::info!("runtime at {} sends no events; it is relisted instead", endpoint.client.endpoint().display());
            }
            Err(error) => {
                log::debug!("events: {}", Chain(&error));
                limits::RELIST_MS_DEFAULT
            }
        };
        if !agent.pause(pause_ms) {
            return;
        }
    }
}

/// Listens until the stream ends; whether there ever was an event.
fn listen(agent: &Agent, index: usize, endpoint: &Arc<Endpoint>) -> Result<bool, crate::grpc::Error> {
    let mut events = endpoint.client.container_events(Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "events"))?;
    match events.stopper() {
        Ok(stopper) => agent.stoppers.set(index, Some(stopper)),
        // Without it this thread could not be stopped; relisting does not need it.
        Err(_) => return Ok(false),
    }
    // A server that does not know the method says so at once; silence for a moment means that it streams.
    let mut first_wait = Some(Deadline::within_ms(limits::RELIST_MS_DEFAULT, "events"));
    let mut any = false;
    loop {
        let deadline = first_wait.take().unwrap_or_else(|| Deadline::within_ms(limits::IDLE_MS_MAX, "events"));
        let event = match events.next(deadline) {
            Ok(Some(event)) => event,
            Ok(None) => return Ok(any),
            Err(error) if matches!(error.kind, ErrorKind::Expired(_)) => {
                endpoint.set_events(true);
                continue;
            }
            Err(error) => return Err(error),
        };
        any = true;
        endpoint.set_events(true);
        let kind = event.container_event_type();
        if !matches!(kind, ContainerEventType::ContainerStoppedEvent | ContainerEventType::ContainerDeletedEvent) {
            continue;
        }
        if let Some((id, version)) = agent.registry.find_container(&event.container_id) {
            ask(agent, endpoint, &id, version, &event.container_id);
        }
    }
}

#[cfg(test)]
mod tests;
