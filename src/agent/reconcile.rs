//! The runtime's own list is the truth: it is read again and again, compared with what we know, and the difference acted upon.
//!
//! The comparison ([`plan`]) is pure. What we know is copied *before* the list is read, so that whatever happened in between makes
//! an entry newer than its copy, and every action on it a no-op.
//!
//! Invariant: a workload is called dead only by a list that was read after it was known to run, never by an error.
//! Invariant: a sandbox of ours that nobody here wants is removed; one that is not ours is never in the list.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, select};

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
    /// It runs, and not as it should.
    Kill {
        /// Which.
        id: WorkloadId,
        /// The kind.
        reason: Reason,
        /// The cause.
        message: String,
    },
    /// Nobody wants it: remove it.
    Sweep {
        /// The runtime's name for it.
        sandbox_id: String,
        /// The workload it was for.
        workload: String,
    },
    /// The runtime has no sandbox of it.
    Vanished {
        /// Which.
        id: WorkloadId,
        /// As of when it was known.
        version: u64,
    },
}

/// Compares what was known with what was then seen. `handler_of` names the handler a class asks for; `first` is the first list since
/// the agent started, in which whatever lives is taken up.
pub fn plan(known: &[Known], seen: &[Seen], first: bool, handler_of: impl Fn(&Known) -> Option<String>) -> Vec<Action> {
    let mut newest: BTreeMap<&str, &Seen> = BTreeMap::new();
    let mut actions = Vec::new();
    let sweep = |seen: &Seen| Action::Sweep { sandbox_id: seen.sandbox_id.clone(), workload: seen.workload.clone() };
    for sandbox in seen {
        match newest.get(sandbox.workload.as_str()) {
            Some(other) if other.attempt >= sandbox.attempt => actions.push(sweep(sandbox)),
            Some(other) => {
                actions.push(sweep(other));
                newest.insert(&sandbox.workload, sandbox);
            }
            None => {
                newest.insert(&sandbox.workload, sandbox);
            }
        }
    }
    for entry in known {
        let sandbox = newest.remove(entry.id.as_str());
        actions.extend(compare(entry, sandbox, handler_of(entry)));
    }
    for unknown in newest.into_values() {
        let lived = unknown.container.as_ref().is_some_and(|c| c.state != ContainerState::ContainerCreated);
        // Half a start, or the late effect of one that was given up, has nothing anybody could want.
        actions.push(if first && lived { Action::Adopt(unknown.clone()) } else { sweep(unknown) });
    }
    actions
}

fn compare(entry: &Known, sandbox: Option<&Seen>, handler: Option<String>) -> Option<Action> {
    let (id, version) = (entry.id.clone(), entry.version);
    if entry.is_busy {
        return None;
    }
    let Some(sandbox) = sandbox else {
        return (entry.state == State::Running).then_some(Action::Vanished { id, version });
    };
    let Some((_, container_id)) = entry.made.as_ref().filter(|(sandbox_id, _)| *sandbox_id == sandbox.sandbox_id) else {
        // What a failed start left, or an earlier attempt.
        return Some(Action::Sweep { sandbox_id: sandbox.sandbox_id.clone(), workload: sandbox.workload.clone() });
    };
    if entry.state != State::Running {
        return None;
    }
    let container_id = container_id.clone();
    match &sandbox.container {
        _ if handler.as_ref().is_some_and(|h| *h != sandbox.handler) => {
            let message =
                format!("asked for a sandbox of handler {:?}, the runtime now reports {:?}", handler.unwrap_or_default(), sandbox.handler);
            Some(Action::Kill { id, reason: Reason::IsolationMismatch, message })
        }
        Some(container) if container.state == ContainerState::ContainerRunning && sandbox.is_ready => {
            Some(Action::Confirm { id, container_id })
        }
        Some(container) if container.state == ContainerState::ContainerRunning => {
            Some(Action::Kill { id, reason: Reason::SandboxDied, message: "the sandbox is not ready any more".into() })
        }
        Some(_) | None => Some(Action::Ask { id, version, container_id }),
    }
}

/// Relists one endpoint until the agent stops; `wake` asks for one at once.
pub fn relist_loop(agent: &Agent, endpoint: &Arc<Endpoint>, wake: &Receiver<()>) {
    let mut health = Stopwatch::start();
    endpoint.refresh();
    loop {
        relist(agent, endpoint);
        let with_events = if endpoint.has_events() { limits::RELIST_WITH_EVENTS_MS_DEFAULT } else { limits::RELIST_MS_DEFAULT };
        // A runtime that does not answer is asked more often than one whose events keep us informed.
        let ms = if endpoint.health().error.is_some() { limits::RELIST_MS_DEFAULT } else { agent.relist_ms.unwrap_or(with_events) };
        select! {
            recv(wake) -> _ => {}
            recv(agent.stop) -> _ => return,
            default(Duration::from_millis(ms)) => {}
        }
        if health.elapsed_ms() >= limits::HEARTBEAT_MS || endpoint.health().runtime.is_none() {
            endpoint.refresh();
            health = Stopwatch::start();
        }
    }
}

fn relist(agent: &Agent, endpoint: &Arc<Endpoint>) {
    let here = |entry: &Known| agent.node.endpoint(&entry.class).is_some_and(|e| Arc::ptr_eq(&e, endpoint));
    let known: Vec<Known> = agent.registry.known().into_iter().filter(here).collect();
    let seen = match runtime::list(&endpoint.client, agent.registry.node()) {
        Ok(seen) => endpoint.without_unreadable(seen),
        Err(error) => return endpoint.note_relist(Err(Chain(&error).to_string())),
    };
    let handler_of = |entry: &Known| agent.node.class(&entry.class).map(|(class, ..)| class.handler);
    let mut result = Ok(());
    for action in plan(&known, &seen, !endpoint.is_listed(), handler_of) {
        match action {
            // As long as one of them is not taken up, no list counts as the first: the next would sweep what lives.
            Action::Adopt(seen) => result = result.and(adopt(agent, endpoint, &seen)),
            action => apply(agent, endpoint, &known, action),
        }
    }
    endpoint.note_relist(result);
}

fn apply(agent: &Agent, endpoint: &Arc<Endpoint>, known: &[Known], action: Action) {
    match action {
        Action::Adopt(_) => {}
        Action::Ask { id, version, container_id } => ask(agent, endpoint, &id, version, &container_id),
        Action::Confirm { id, container_id } => agent.registry.observe(&id, &container_id, Observed::Running(None)),
        Action::Kill { id, reason, message } => {
            log::error!("workload {id}: {message}; it is stopped");
            agent.registry.want_stop(&id, reason, Some(message));
        }
        Action::Sweep { sandbox_id, workload } => {
            // A start that was accepted after the copy was taken may own it.
            let is_new = |id: &WorkloadId| agent.registry.contains(id) && !known.iter().any(|k| k.id == *id);
            let changed = |id: &WorkloadId| {
                let now = agent.registry.known().into_iter().find(|k| k.id == *id);
                now.is_some_and(|now| known.iter().any(|k| k.id == *id && k.version != now.version))
            };
            if WorkloadId::new(&workload).is_ok_and(|id| is_new(&id) || changed(&id)) {
                return;
            }
            log::warn!("sandbox {sandbox_id} of workload {workload:?} is wanted by nobody and removed");
            if let Err(error) = runtime::remove_sandbox(&endpoint.client, &sandbox_id, Deadline::within_ms(limits::UNDO_MS_MAX, "sweep")) {
                log::warn!("sandbox {sandbox_id}: {}", Chain(&error));
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

fn adopt(agent: &Agent, endpoint: &Endpoint, seen: &Seen) -> Result<(), String> {
    let workload = match parse_annotation(seen) {
        Ok(workload) => workload,
        Err(problems) => {
            // It carries our labels, so somebody may rely on it; what we cannot read we do not touch.
            log::error!("sandbox {} of workload {:?} cannot be taken up and is left alone: {problems}", seen.sandbox_id, seen.workload);
            endpoint.leave_alone(seen.sandbox_id.clone());
            return Ok(());
        }
    };
    let class = agent.node.class(&workload.runtime_class).map(|(class, ..)| class);
    let container_id = seen.container.as_ref().map(|c| c.id.as_str()).unwrap_or_default();
    let observed = runtime::observe(&endpoint.client, container_id, Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "adopt"));
    let observed = observed.map_err(|error| format!("workload {} not taken up yet: {}", workload.id, Chain(&error)))?;
    log::info!("workload {}: taken up again, {observed:?}", workload.id);
    agent.registry.adopt(workload, seen, class.as_ref(), observed);
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
pub fn event_loop(agent: &Agent, endpoint: &Arc<Endpoint>) {
    let wait = |ms| agent.stop.recv_timeout(Duration::from_millis(ms)).is_err_and(|e| e.is_timeout());
    loop {
        match listen(agent, endpoint) {
            Ok(()) => {}
            Err(error) if error.code() == Some(Code::Unimplemented) => {
                endpoint.set_events(false);
                return log::info!("runtime at {} sends no events; it is relisted instead", endpoint.client.endpoint().display());
            }
            Err(error) => log::debug!("events: {}", Chain(&error)),
        }
        endpoint.set_events(false);
        if !wait(limits::RELIST_MS_DEFAULT) {
            return;
        }
    }
}

fn listen(agent: &Agent, endpoint: &Arc<Endpoint>) -> Result<(), crate::grpc::Error> {
    let mut events = endpoint.client.container_events(Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "events"))?;
    match events.stopper() {
        Ok(stopper) => agent.stoppers.add(stopper),
        // Without it this thread could not be stopped; relisting does not need it.
        Err(_) => return Ok(()),
    }
    // A server that does not know the method says so at once; silence for a moment means that it streams.
    let mut first_wait = Some(Deadline::within_ms(limits::RELIST_MS_DEFAULT, "events"));
    loop {
        let deadline = first_wait.take().unwrap_or_else(|| Deadline::within_ms(limits::IDLE_MS_MAX, "events"));
        let event = match events.next(deadline) {
            Ok(Some(event)) => event,
            Ok(None) => return Ok(()),
            Err(error) if matches!(error.kind, ErrorKind::Expired(_)) => {
                endpoint.set_events(true);
                continue;
            }
            Err(error) => return Err(error),
        };
        endpoint.set_events(true);
        let ends =
            matches!(event.container_event_type(), ContainerEventType::ContainerStoppedEvent | ContainerEventType::ContainerDeletedEvent);
        if !ends {
            continue;
        }
        if let Some(id) = agent.registry.find_container(&event.container_id) {
            let known = agent.registry.known().into_iter().find(|k| k.id == id);
            ask(agent, endpoint, &id, known.map_or(0, |k| k.version), &event.container_id);
        }
    }
}

#[cfg(test)]
mod tests;
