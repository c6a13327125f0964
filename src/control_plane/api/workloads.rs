//! Workloads: create, get, list, stop, delete.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::super::monitor::View;
use super::super::node_client::Error;
use super::super::profiles;
use super::super::scheduler::{self, Candidate, Placement};
use super::super::store::{self, Insertion, LabelPatch, Record, Wish};
use super::selector::Selector;
use super::{Answer, Api, CLASS_REQUIRED, Call, Refusal, body, patch_body};
use crate::deadline::Deadline;
use crate::http::{self, Response, Status};
use crate::limits;
use crate::report::Chain;
use crate::wire::agent::{ErrorCode, Request, Until};
use crate::wire::api::{Page, PatchBody, to_json};
use crate::wire::{Problems, workload};
use crate::workload::{Desired, Draft, Name, Spec, State, WorkloadId};

/// How often a POST begins again when the workload that had its id went away meanwhile.
const CREATE_ATTEMPTS_MAX: usize = 5;

impl Api {
    /// Places a workload, keeps it, and hands it to its agent, in this order: what was answered 201 is never forgotten, and what
    /// the agent refuses was never accepted.
    pub(super) fn create(&self, call: &mut Call<'_>) -> Answer {
        for _ in 0..CREATE_ATTEMPTS_MAX {
            if let Some(response) = self.try_create(call)? {
                return Ok(response);
            }
        }
        Err(Refusal::new(Status::Unavailable, "node_unavailable", "others come and go under this id; try again"))
    }

    /// `None` when the workload that had the id went away meanwhile: was deleted, or refused by its node. Then the id is free again.
    fn try_create(&self, call: &mut Call<'_>) -> Result<Option<Response>, Refusal> {
        let wait = wait_ms(call.request)?.map(|ms| (Until::Started, ms));
        let draft = read_draft(call.request)?;
        let existing = draft.id.as_ref().and_then(|id| self.plane.store.get(id));
        if let Some(existing) = existing.map(|record| self.settled(record)).transpose()?.flatten() {
            return self.again(call, &existing, existing.is_for(&draft), wait);
        }
        let choice = profiles::choose(&draft)?;
        let home = draft.id.as_ref().map(|id| self.home(id)).transpose()?.flatten();
        let Placement { node, class, rejected } = self.place(home.as_ref(), &choice, &draft.spec)?;
        let id = draft.id.clone().unwrap_or_else(WorkloadId::random);
        let claim = self.plane.dispatch.claim(&id);
        let record = Record::new(draft.resolve(id.clone(), class), node, rejected);
        let workload = Arc::clone(&record.workload);
        let inserted = self.plane.store.insert(record).map_err(|error| {
            let refusal = Refusal::from(error);
            // Who knows the id can ask what became of it.
            Refusal { detail: format!("{}: {id}", refusal.detail), ..refusal }
        });
        let mut record = match inserted? {
            Insertion::Existing(existing) => {
                drop(claim);
                let Some(existing) = self.settled(existing)? else { return Ok(None) };
                return self.again(call, &existing, existing.workload == workload, wait);
            }
            Insertion::Inserted(record) => record,
        };
        // Without the claim a dispatcher still forgets an earlier workload of this id, and will send this one when it is done.
        if let Some(claim) = claim {
            match self.plane.start(&record) {
                Ok(started) => record = started.unwrap_or(record),
                Err(Error::Refused(reply)) => match self.plane.store.remove(&id, record.born) {
                    Ok(()) => return Err(Refusal::refused(&record.node, reply)),
                    // It may be gone yet, and may not: whoever asks again finds out.
                    Err(error @ store::Error::Slow) => return Err(error.into()),
                    // It is kept, so it is accepted: the disk that did not take it back has it, and its agent will be asked again.
                    Err(error) => {
                        log::error!("{id}: its agent refused it, and it cannot be forgotten: {}", Chain(&error));
                        record = self.plane.trouble(&record, &Error::Refused(reply)).unwrap_or(record);
                        self.plane.dispatch.nudge(&id);
                    }
                },
                // It may have arrived. A dispatcher sends it again, and will learn what became of it.
                Err(error) => {
                    record = self.plane.trouble(&record, &error).unwrap_or(record);
                    self.plane.dispatch.nudge(&id);
                }
            }
            drop(claim);
        }
        log::info!("{id}: accepted from {} for {}", call.caller, record.node);
        if wait.is_some() && record.is_known && record.state == State::Pending {
            record = self.wait(call, &record, wait).unwrap_or(record);
        }
        Ok(Some(object(Status::Created, &record).with_header("Location", format!("/workloads/{id}"))))
    }

    /// The record, once it is certain that it stays: one whose agent was not heard yet may be refused, and then was never there.
    fn settled(&self, record: Arc<Record>) -> Result<Option<Arc<Record>>, Refusal> {
        if record.is_known || record.state.is_terminal() || record.desired != Desired::Run {
            return Ok(Some(record));
        }
        let id = &record.workload.id;
        // The agent's answer, and the removal that may follow it.
        let deadline = Deadline::within_ms(limits::NODE_REQUEST_MS_MAX.saturating_add(limits::STORE_MS_MAX), "placement");
        if self.plane.dispatch.wait_released(id, deadline) {
            return Ok(self.plane.store.get(id));
        }
        let detail = "it is not decided yet whether the workload of this id is accepted; try again";
        Err(Refusal::new(Status::Unavailable, "node_unavailable", detail))
    }

    /// Answers a POST of an id that is taken; `None` when it is not any more.
    fn again(
        &self,
        call: &mut Call<'_>,
        existing: &Arc<Record>,
        is_same: bool,
        wait: Option<(Until, u64)>,
    ) -> Result<Option<Response>, Refusal> {
        if existing.desired == Desired::Deleted {
            return Err(Refusal::new(Status::Conflict, "workload_deleting", "the workload of this id is being deleted; try again later"));
        }
        if !is_same {
            return Err(Refusal::new(Status::Conflict, "workload_exists", "another workload has this id"));
        }
        Ok(self.wait(call, existing, wait).map(|record| object(Status::Ok, &record)))
    }

    fn place(&self, home: Option<&Name>, choice: &profiles::Choice, spec: &Spec) -> Result<Placement, Refusal> {
        let views: Vec<(&Name, View)> = self.plane.nodes.iter().map(|(name, node)| (name, node.view())).collect();
        let candidates: Vec<Candidate<'_>> = views.iter().map(|view| candidate(view, home)).collect();
        Ok(scheduler::place(&candidates, choice, spec)?)
    }

    /// The node whose agent has a workload of this id that nobody here knows of: placed anywhere else, it would run twice. That agent
    /// says whether it is the same one.
    fn home(&self, id: &WorkloadId) -> Result<Option<Name>, Refusal> {
        let deadline = Deadline::within_ms(limits::NODE_REQUEST_MS_MAX, "GetStatus");
        let mut homes = Vec::new();
        for (name, node) in &self.plane.nodes {
            let is_there = match (node.has_stranger(id), node.view()) {
                (Some(is_there), _) => is_there,
                // It did not tell yet, so it is asked.
                (None, View { is_reachable: true, .. } | View { was_asked: false, .. }) => {
                    match node.client.request(&Request::GetStatus { id: id.clone(), wait: None }, deadline) {
                        Ok(_) => true,
                        Err(Error::Refused(refusal)) if refusal.code == ErrorCode::NotFound => false,
                        // There is no way to it, or it is another one. One that hangs may have it.
                        Err(error @ (Error::Connect(_) | Error::NoSuchNode | Error::Somebody(_))) if !error.is_hang() => false,
                        // It has an answer, and that did not arrive or is in words of a later version.
                        Err(error) => return Err(unsure(name, &error)),
                    }
                }
                (None, _) => false,
            };
            homes.extend(is_there.then_some(name));
        }
        match homes.as_slice() {
            [] => Ok(None),
            [home] => Ok(Some((*home).clone())),
            homes => {
                let names: Vec<&str> = homes.iter().take(limits::PLACEMENT_REASONS_MAX).map(|name| name.as_str()).collect();
                let detail = format!(
                    "{} each have a workload of this id that is not of this control plane; delete all but one there",
                    names.join(", ")
                );
                Err(Refusal::new(Status::Conflict, "workload_exists", detail))
            }
        }
    }

    /// Asks how a workload is, and waits as long as it is not as far as asked for, its agent answers, and somebody waits for it; `None`
    /// when it is gone. What happens meanwhile comes by the events of its agent, so that a wait holds no connection to it; it is asked
    /// again now and then, for an event may be lost, and at the end, so that the answer is as young as it looks.
    fn wait(&self, call: &mut Call<'_>, record: &Arc<Record>, wait: Option<(Until, u64)>) -> Option<Arc<Record>> {
        let plane = &self.plane;
        // Where too many wait, there is no waiting: the answer is the same, only earlier.
        let hold = wait.and_then(|_| self.holds.take(&record.node));
        let (until, ms) = wait.filter(|_| hold.is_some()).unwrap_or((Until::Started, 0));
        let deadline = Deadline::within_ms(ms, "wait");
        let mut record = Arc::clone(record);
        loop {
            let (after, is_answered) = plane.inquire(&record);
            record = after?;
            if !is_answered || until.is_reached(record.state) || deadline.left().is_err() {
                return Some(record);
            }
            let ask_again = deadline.at_most_ms(limits::HEARTBEAT_MS, "wait");
            while ask_again.left().is_ok() {
                if plane.stopping.is_set() || call.client.is_over() {
                    return Some(record);
                }
                record = plane.store.await_change(&record, ask_again.left_ms().min(limits::NODE_WAIT_SLICE_MS))?;
                if until.is_reached(record.state) {
                    return Some(record);
                }
                if !plane.nodes.get(&record.node).is_some_and(|node| node.view().is_reachable) {
                    break;
                }
            }
        }
    }

    pub(super) fn get(&self, call: &mut Call<'_>, id: &str) -> Answer {
        let until = match call.request.query_value("for")? {
            None => Until::Started,
            Some(text) => Until::parse(text).ok_or_else(|| Refusal::bad_query("query parameter for is running or terminal"))?,
        };
        let wait = wait_ms(call.request)?.map(|ms| (until, ms));
        let record = self.record(id)?;
        let record = self.wait(call, &record, wait).ok_or_else(|| Refusal::not_found("workload"))?;
        Ok(object(Status::Ok, &record))
    }

    /// A page of last known truths: a list asks no agent, whose events keep it fresh.
    pub(super) fn list(&self, call: &Call<'_>) -> Answer {
        let query = Query::read(call.request)?;
        let page = self.plane.store.page(query.after.as_ref(), query.limit, |record| query.passes(record));
        let last = page.records.last().filter(|_| page.has_more);
        let body = Page {
            items: page.records.iter().map(|record| record.object()).collect(),
            r#continue: last.map(|record| URL_SAFE_NO_PAD.encode(record.workload.id.as_str())),
            revision: page.revision,
        };
        Ok(Response::json(Status::Ok, to_json(&body)))
    }

    pub(super) fn stop(&self, call: &Call<'_>, id: &str) -> Answer {
        self.want(call, id, Wish::Stop).map(|record| object(Status::Accepted, &record))
    }

    pub(super) fn delete(&self, call: &Call<'_>, id: &str) -> Answer {
        let is_forced = call.request.query_flag("force")?;
        let record = self.record(id)?;
        let node = &record.node;
        let is_configured = self.plane.nodes.contains_key(node);
        if !is_forced {
            let record = self.want(call, id, Wish::Delete)?;
            let told = if is_configured { None } else { self.plane.trouble(&record, &Error::NoSuchNode) };
            return Ok(object(Status::Accepted, &told.unwrap_or(record)));
        }
        if is_configured {
            let detail =
                format!("{node} is configured, and deletes it when it answers; only what is on a node that is not is forgotten by force");
            return Err(Refusal::new(Status::Conflict, "node_configured", detail));
        }
        self.plane.store.remove(&record.workload.id, record.born)?;
        log::warn!("{id}: {} has it forgotten; what runs of it on {node}, which is not configured, is left alone", call.caller);
        Ok(object(
            Status::Accepted,
            &record.troubled(format!("forgotten; what runs of it on {node}, which is not configured, is left alone")),
        ))
    }

    /// Changes labels; the rest of a workload is what it was accepted as.
    pub(super) fn patch(&self, call: &Call<'_>, id: &str) -> Answer {
        let refuse =
            |problems: Problems| Refusal::problems(Status::UnprocessableContent, "invalid_patch", "the patch breaks a rule", &problems);
        let PatchBody { labels } = PatchBody::parse(patch_body(call.request)?).map_err(refuse)?;
        let patch = labels.map_or(LabelPatch::Clear, LabelPatch::Merge);
        self.want(call, id, Wish::Labels(patch)).map(|record| object(Status::Ok, &record))
    }

    /// Notes a wish, and has a dispatcher see to it.
    fn want(&self, call: &Call<'_>, id: &str, wish: Wish) -> Result<Arc<Record>, Refusal> {
        let record = self.record(id)?;
        let text = format!("{wish:?}");
        let record = self.plane.store.wish(&record.workload.id, record.born, wish)?.ok_or_else(|| Refusal::not_found("workload"))?;
        self.plane.dispatch.nudge(&record.workload.id);
        log::info!("{id}: {} wishes {text}", call.caller);
        Ok(record)
    }

    /// The record of an id from a path.
    pub(super) fn record(&self, id: &str) -> Result<Arc<Record>, Refusal> {
        // What is no id names no workload.
        let id = WorkloadId::new(id).ok();
        id.and_then(|id| self.plane.store.get(&id)).ok_or_else(|| Refusal::not_found("workload"))
    }
}

fn candidate<'a>((name, view): &'a (&'a Name, View), home: Option<&'a Name>) -> Candidate<'a> {
    Candidate { name, home, trouble: view.trouble.as_deref(), node: view.node.as_deref() }
}

/// A node that is there and cannot say whether it has a workload may have it.
fn unsure(node: &Name, error: &Error) -> Refusal {
    let detail = format!("{node} does not say yet whether it has a workload of this id: {}", Chain(error));
    Refusal::new(Status::Unavailable, "no_node", detail)
}

fn object(status: Status, record: &Record) -> Response {
    Response::json(status, to_json(&record.object()))
}

fn read_draft(request: &http::Request) -> Result<Draft, Refusal> {
    let value = body(request)?;
    let names_no_class = value.as_object().is_some_and(|map| !map.contains_key("runtime_class") && !map.contains_key("security_profile"));
    workload::draft(value).map_err(|mut problems: Problems| {
        if names_no_class {
            problems.add("/runtime_class", CLASS_REQUIRED);
        }
        Refusal::problems(Status::UnprocessableContent, "invalid_workload", "the workload breaks a rule", &problems)
    })
}

/// How long to hold the answer; nothing for not at all.
fn wait_ms(request: &http::Request) -> Result<Option<u64>, Refusal> {
    match request.query_u64("wait_ms")? {
        Some(ms) if ms > limits::WAIT_MS_MAX => {
            Err(Refusal::bad_query(format!("query parameter wait_ms is at most {}", limits::WAIT_MS_MAX)))
        }
        ms => Ok(ms.filter(|ms| *ms > 0)),
    }
}

/// What a list is to hold.
struct Query {
    after: Option<WorkloadId>,
    class: Option<Name>,
    labels: Selector,
    limit: usize,
    node: Option<Name>,
    state: Option<State>,
}

impl Query {
    fn read(request: &http::Request) -> Result<Self, Refusal> {
        let name = |parameter| request.query_value(parameter).map_err(Refusal::from)?.map(Name::new).transpose().map_err(Refusal::from);
        let state = |text| {
            let states: Vec<&str> = State::ALL.iter().map(|state| state.as_str()).collect();
            State::parse(text).ok_or_else(|| Refusal::bad_query(format!("query parameter state is one of {}", states.join(", "))))
        };
        let limit = request.query_u64("limit")?.map_or(Some(limits::PAGE_DEFAULT), |limit| usize::try_from(limit).ok());
        let limit = limit.filter(|limit| (1..=limits::PAGE_MAX).contains(limit));
        let mut labels = Selector::default();
        for (_, text) in request.query.iter().filter(|(name, _)| name == "label") {
            labels.add(text)?;
        }
        Ok(Self {
            after: request.query_value("continue")?.map(read_token).transpose()?,
            class: name("class")?,
            labels,
            limit: limit.ok_or_else(|| Refusal::bad_query(format!("query parameter limit is 1 to {}", limits::PAGE_MAX)))?,
            node: name("node")?,
            state: request.query_value("state")?.map(state).transpose()?,
        })
    }

    fn passes(&self, record: &Record) -> bool {
        self.state.is_none_or(|state| record.state == state)
            && self.node.as_ref().is_none_or(|node| record.node == *node)
            && self.class.as_ref().is_none_or(|class| record.workload.runtime_class == *class)
            && self.labels.matches(&record.workload.spec.labels)
    }
}

/// The id a page ended with.
fn read_token(token: &str) -> Result<WorkloadId, Refusal> {
    let id = URL_SAFE_NO_PAD.decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok()).and_then(|id| WorkloadId::new(&id).ok());
    id.ok_or_else(|| Refusal::new(Status::BadRequest, "bad_continue", "query parameter continue is not one that a list gave"))
}
