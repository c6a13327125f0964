//! What the store holds of one workload, and how that may change. Pure.
//!
//! A record has two halves. What is *wished* (the workload, its node, `desired`, its labels) comes from clients, changes by a
//! [`Wish`], and is on disk before anybody hears of it. What is *known* (the rest) comes from agents, who will say it again.
//!
//! Invariant: a terminal state never changes, whatever an agent says ([`Record::observed`]).
//! Invariant: a record is replaced, never changed in place; who holds one holds a moment of it.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::deadline::Timestamp;
use crate::limits;
use crate::report::clip;
use crate::wire::agent::Object;
use crate::wire::status::{Isolation, Placement, Status};
use crate::wire::stored::Stored;
use crate::wire::workload::to_map;
use crate::workload::{Desired, Draft, Name, Phase, Reason, Spec, State, Workload};

/// A workload, where it is placed, what is wanted of it, and the last truth about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Record {
    pub(in super::super) workload: Arc<Workload>,
    pub(in super::super) node: Name,
    pub(in super::super) desired: Desired,
    /// Its agent answered for it, and did not say since that it knows nothing of it.
    pub(in super::super) is_known: bool,
    /// It was seen to run, be it in an attempt before this one. From then on no start of it is ever sent again.
    pub(in super::super) has_run: bool,
    /// Its agent has yet to be told its labels.
    pub(in super::super) has_new_labels: bool,
    pub(in super::super) state: State,
    pub(in super::super) status: Status,
    /// Tells it from an earlier or later one with the same id.
    pub(in super::super) born: u64,
    /// Grows with every change the store takes.
    pub(in super::super) revision: u64,
}

/// What a client wants changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Wish {
    /// Gone, and forgotten.
    Delete,
    /// Labels set, and, where there is no value, taken away (RFC 7396).
    Labels(LabelPatch),
    /// Ended, and remembered.
    Stop,
}

/// What is to become of labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum LabelPatch {
    /// All of them go.
    Clear,
    /// These change, the others stay.
    Merge(BTreeMap<String, Option<String>>),
}

impl Wish {
    /// The record as wished; `None` when it is so already.
    ///
    /// # Errors
    /// [`TooManyLabels`]
    pub(super) fn apply(&self, record: &Record) -> Result<Option<Record>, TooManyLabels> {
        let desired = match (self, record.desired) {
            (Self::Delete, _) | (Self::Stop, Desired::Deleted) => Desired::Deleted,
            (Self::Stop, Desired::Run | Desired::Stopped) => Desired::Stopped,
            (Self::Labels(patch), _) => return patch.apply(record),
        };
        Ok((desired != record.desired).then(|| Record { desired, ..record.clone() }))
    }
}

impl LabelPatch {
    fn apply(&self, record: &Record) -> Result<Option<Record>, TooManyLabels> {
        let old = &record.workload.spec.labels;
        let mut labels = old.clone();
        match self {
            Self::Clear => labels.clear(),
            Self::Merge(changes) => {
                for (key, value) in changes {
                    match value {
                        Some(value) => labels.insert(key.clone(), value.clone()),
                        None => labels.remove(key),
                    };
                }
            }
        }
        if labels.len() > limits::LABELS_MAX {
            return Err(TooManyLabels);
        }
        if labels == *old {
            return Ok(None);
        }
        let Workload { id, runtime_class, security_profile, spec } = record.workload.as_ref().clone();
        let workload = Arc::new(Workload { id, runtime_class, security_profile, spec: Spec { labels, ..spec } });
        Ok(Some(Record { workload, has_new_labels: true, ..record.clone() }))
    }
}

/// With these the workload would have more than `LABELS_MAX` labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct TooManyLabels;

impl Record {
    /// A record of a workload that was placed just now.
    pub(in super::super) fn new(workload: Workload, node: Name, rejected: Map<String, Value>) -> Self {
        let mut status = Status::accepted(Some(node.to_string()));
        status.placement = Placement { rejected };
        Self {
            workload: Arc::new(workload),
            node,
            desired: Desired::Run,
            is_known: false,
            has_run: false,
            has_new_labels: false,
            state: State::Pending,
            status,
            born: 0,
            revision: 0,
        }
    }

    /// As it was on disk.
    pub(super) fn loaded(stored: Stored, revision: u64) -> Self {
        let Stored { workload, node, desired, is_known, has_run, has_new_labels, born, state, status } = stored;
        Self { workload, node, desired, is_known, has_run, has_new_labels, state, status, born, revision }
    }

    /// As it goes to disk.
    pub(super) fn stored(&self) -> Stored {
        // The revision is of this life of the store alone.
        let Self { workload, node, desired, is_known, has_run, has_new_labels, state, status, born, revision: _ } = self.clone();
        Stored { workload, node, desired, is_known, has_run, has_new_labels, born, state, status }
    }

    /// Whether `draft` asks for this very workload; a class that a profile chose is not asked for.
    pub(in super::super) fn is_for(&self, draft: &Draft) -> bool {
        let Workload { id, runtime_class, security_profile, spec } = &*self.workload;
        draft.id.as_ref() == Some(id)
            && draft.runtime_class.as_ref().is_none_or(|class| class == runtime_class)
            && draft.security_profile == *security_profile
            && draft.spec == *spec
    }

    /// The record after its agent said this; `None` when it contradicts what is known already, or is older and no step forward.
    ///
    /// An agent counts restarts and attempts, and neither goes down but when it lost its journal. So what is told of a later run is
    /// news whatever its time; within one run it is news when it is younger or a step forward; and what is told of an earlier run is
    /// only believed when it is strictly younger: then the agent has begun to count anew, and it alone knows how it is.
    pub(in super::super) fn observed(&self, state: State, status: Status) -> Option<Self> {
        let (old_run, new_run) = (run_of(&self.status), run_of(&status));
        let is_older_news = match new_run.cmp(&old_run) {
            Ordering::Greater => false,
            Ordering::Equal => is_stale(&status, &self.status) && state <= self.state,
            Ordering::Less => is_stale(&status, &self.status) || status.observed_at == self.status.observed_at,
        };
        let is_no_news = self.is_known && is_older_news;
        // From Running to Pending is a restart by the agent's policy, and those are counted; anything else is a word that was overtaken.
        let is_overtaken = (self.state, state) == (State::Running, State::Pending) && new_run == old_run;
        if is_no_news || is_overtaken || !self.state.may_become(state) {
            return None;
        }
        // Who placed it when, and why there, is known here and not there.
        let placed = Status {
            node: Some(self.node.to_string()),
            created_at: self.status.created_at,
            placement: self.status.placement.clone(),
            ..clipped(status)
        };
        let has_run = self.has_run || state == State::Running || placed.started_at.is_some() || placed.restarts > 0;
        Some(Self { is_known: true, has_run, ..self.with(state, placed) })
    }

    /// Whether it says the same, of another time.
    pub(super) fn is_but_older_or_younger(&self, other: &Self) -> bool {
        let status = Status { observed_at: other.status.observed_at, ..self.status.clone() };
        *other == Self { status, ..self.clone() }
    }

    /// The record with the last thing that went wrong; the truth stays as old as it is.
    pub(in super::super) fn troubled(&self, error: String) -> Self {
        self.with(self.state, Status { last_error: Some(clip(error, limits::MESSAGE_BYTES_MAX)), ..self.status.clone() })
    }

    /// The record, failed without ever having run.
    pub(in super::super) fn failed(&self, reason: Reason, message: String) -> Self {
        let now = Timestamp::now();
        let message = Some(clip(message, limits::MESSAGE_BYTES_MAX));
        let status = Status { reason: Some(reason), message, phase: None, finished_at: Some(now), observed_at: now, ..self.status.clone() };
        self.with(State::Failed, status)
    }

    /// The record of what ran, and of which its agent is sure that there is nothing any more. How it ended nobody knows.
    pub(in super::super) fn lost(&self, message: String) -> Self {
        let message = Some(clip(message, limits::MESSAGE_BYTES_MAX));
        let status = Status {
            reason: Some(Reason::SandboxDied),
            message,
            phase: None,
            exit_code: None,
            observed_at: Timestamp::now(),
            ..self.status.clone()
        };
        Self { is_known: false, ..self.with(State::Failed, status) }
    }

    fn with(&self, state: State, status: Status) -> Self {
        Self { state, status, ..self.clone() }
    }

    /// As every answer shows it.
    pub(in super::super) fn object(&self) -> Object {
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

/// With no text longer than `MESSAGE_BYTES_MAX`: an agent's word is kept in memory, in the history and on disk.
fn clipped(status: Status) -> Status {
    let clip = |text: Option<String>| text.map(|text| clip(text, limits::MESSAGE_BYTES_MAX));
    let Isolation { verified, handler, kernel, host_kernel, message } = status.isolation;
    let isolation =
        Isolation { verified, handler: clip(handler), kernel: clip(kernel), host_kernel: clip(host_kernel), message: clip(message) };
    Status {
        reason: status.reason,
        message: clip(status.message),
        phase: status.phase,
        node: clip(status.node),
        attempt: status.attempt,
        restarts: status.restarts,
        exit_code: status.exit_code,
        oom_killed: status.oom_killed,
        sandbox_id: clip(status.sandbox_id),
        container_id: clip(status.container_id),
        image_digest: clip(status.image_digest),
        ip: clip(status.ip),
        handler: clip(status.handler),
        isolation,
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: status.finished_at,
        observed_at: status.observed_at,
        timings_ms: status.timings_ms,
        placement: status.placement,
        last_error: clip(status.last_error),
    }
}

/// Which run of a workload a status tells of; a later one is greater.
fn run_of(status: &Status) -> (u32, u32) {
    (status.restarts, status.attempt)
}

/// An event may arrive behind the answer to a later question. A node whose clock was set back is believed again after a minute.
fn is_stale(new: &Status, old: &Status) -> bool {
    const CLOCK_SET_BACK_MS: u64 = 60_000;
    new.observed_at < old.observed_at && new.observed_at >= old.observed_at.minus_ms(CLOCK_SET_BACK_MS)
}
