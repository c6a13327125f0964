//! `GET /events`: every change, as lines of JSON, or as server-sent events where `Accept` asks for them.
//!
//! The first line is a heartbeat with the revision the stream begins at, before it everything there is if `replay` asks for that.
//! A reader that passes a filter is shown what the filter makes of a change: a workload whose labels do not match any more is gone.
//!
//! Invariant: a stream ends with a line that says why, or is cut off.

use std::sync::Arc;

use super::super::Plane;
use super::super::store::watch::{Change, Kept, Next};
use super::super::store::{Follower, Record};
use super::selector::Selector;
use super::{Answer, Api, Call, Refusal};
use crate::deadline::{Deadline, Timestamp};
use crate::http::{ChunkWriter, Request, Response, Status};
use crate::limits;
use crate::net;
use crate::wire::api::{EventLine, EventName, to_json};
use crate::workload::{Name, WorkloadId};

impl Api {
    pub(super) fn events(&self, call: &Call<'_>) -> Answer {
        let query = Query::read(call.request)?;
        let store = &self.plane.store;
        let Some(follower) = store.follow() else {
            let detail = format!("{} readers follow already; try again later", limits::FOLLOWERS_MAX);
            return Err(Refusal::new(Status::Unavailable, "too_many_followers", detail));
        };
        let mut begin = Vec::new();
        let mut since = query.since;
        if query.replay {
            let page = store.page(None, usize::MAX, |record| query.filter.passes(record));
            begin = page.records;
            since = Some(page.revision);
        }
        let kept = store.kept();
        let since = since.unwrap_or(kept.newest);
        if !(kept.oldest..=kept.newest).contains(&since) {
            return Err(gone(since, kept));
        }
        let (plane, form) = (Arc::clone(&self.plane), query.form);
        let content_type = match form {
            Form::Lines => "application/x-ndjson",
            Form::ServerSent => "text/event-stream",
        };
        let stream = Stream { plane, follower, filter: query.filter, form, revision: since, is_replaying: true };
        Ok(Response::stream(content_type, move |writer| stream.run(&begin, writer)))
    }
}

fn gone(since: u64, Kept { oldest, newest }: Kept) -> Refusal {
    let detail = format!("revision {since} is not among those kept, {oldest} to {newest}: list again, and go on from the list's revision");
    Refusal::new(Status::Gone, "events_gone", detail)
}

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Lines,
    /// <https://html.spec.whatwg.org/multipage/server-sent-events.html>
    ServerSent,
}

struct Query {
    since: Option<u64>,
    replay: bool,
    filter: Filter,
    form: Form,
}

impl Query {
    fn read(request: &Request) -> Result<Self, Refusal> {
        let is_sent =
            |accept: &str| accept.split(',').any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim() == "text/event-stream"));
        let form = if request.header("accept").is_some_and(is_sent) { Form::ServerSent } else { Form::Lines };
        // A browser that comes back sends the address it began with, and this.
        let last = request.header("last-event-id").filter(|id| !id.is_empty()).map(|id| {
            id.parse().map_err(|_| Refusal::new(Status::BadRequest, "bad_request", "Last-Event-ID is not one that this stream gave"))
        });
        let since = match last {
            Some(last) => Some(last?),
            None => request.query_u64("since")?,
        };
        let replay = request.query_flag("replay")?;
        if replay && request.query_u64("since")?.is_some() {
            return Err(Refusal::bad_query("query parameters since and replay exclude each other"));
        }
        let mut labels = Selector::default();
        for (_, text) in request.query.iter().filter(|(name, _)| name == "label") {
            labels.add(text)?;
        }
        let filter = Filter {
            id: request.query_value("id")?.map(WorkloadId::new).transpose()?,
            node: request.query_value("node")?.map(Name::new).transpose()?,
            labels,
        };
        // After a reconnection the replay was had already.
        Ok(Self { replay: replay && since.is_none(), since, filter, form })
    }
}

/// Which workloads are shown.
struct Filter {
    id: Option<WorkloadId>,
    node: Option<Name>,
    labels: Selector,
}

impl Filter {
    fn passes(&self, record: &Record) -> bool {
        self.id.as_ref().is_none_or(|id| record.workload.id == *id)
            && self.node.as_ref().is_none_or(|node| record.node == *node)
            && self.labels.matches(&record.workload.spec.labels)
    }

    /// A change as those see it who see only what passes.
    fn see<'a>(&self, change: &'a Change) -> Option<(EventName, &'a Record)> {
        let passing = |record: &'a Option<Arc<Record>>| record.as_deref().filter(|record| self.passes(record));
        match (passing(&change.before), passing(&change.after)) {
            (None, Some(after)) => Some((EventName::Added, after)),
            (Some(_), Some(after)) => Some((EventName::Modified, after)),
            (Some(before), None) => Some((EventName::Deleted, change.after.as_deref().unwrap_or(before))),
            (None, None) => None,
        }
    }
}

struct Stream {
    plane: Arc<Plane>,
    follower: Follower,
    filter: Filter,
    form: Form,
    /// All up to this was written.
    revision: u64,
    /// Until the first heartbeat: one who breaks off before it has not all there was, and must not go on from here.
    is_replaying: bool,
}

impl Stream {
    fn run(mut self, begin: &[Arc<Record>], writer: &mut ChunkWriter<'_>) -> Result<(), net::Error> {
        for some in begin.chunks(limits::EVENTS_BATCH_MAX) {
            let lines = some.iter().flat_map(|record| self.line(EventName::Added, Timestamp::now(), Some(record), None));
            writer.write(&lines.collect::<Vec<u8>>())?;
        }
        self.is_replaying = false;
        writer.write(&self.line(EventName::Heartbeat, Timestamp::now(), None, None))?;
        let heartbeat = || Deadline::within_ms(limits::HEARTBEAT_MS, "heartbeat");
        let mut next_heartbeat = heartbeat();
        loop {
            match self.follower.next(self.revision, limits::NODE_WAIT_SLICE_MS) {
                Next::Changes(changes) => {
                    let mut lines = Vec::new();
                    for change in changes {
                        self.revision = change.revision;
                        if let Some((event, record)) = self.filter.see(&change) {
                            lines.extend(self.line(event, change.time, Some(record), None));
                        }
                    }
                    if !lines.is_empty() {
                        writer.write(&lines)?;
                        next_heartbeat = heartbeat();
                    }
                }
                Next::Gone => {
                    let detail = "you read too slowly: what comes next is not kept any more; list again";
                    return writer.write(&self.line(EventName::Gone, Timestamp::now(), None, Some(detail)));
                }
                Next::Quiet if self.plane.stopping.is_set() => {
                    let detail = "the control plane is stopping; come back with the last revision";
                    return writer.write(&self.line(EventName::Stopping, Timestamp::now(), None, Some(detail)));
                }
                Next::Quiet if writer.is_over() => return Err(net::Error::Closed),
                Next::Quiet => {}
            }
            if next_heartbeat.left().is_err() {
                writer.write(&self.line(EventName::Heartbeat, Timestamp::now(), None, None))?;
                next_heartbeat = heartbeat();
            }
        }
    }

    fn line(&self, event: EventName, time: Timestamp, record: Option<&Record>, detail: Option<&'static str>) -> Vec<u8> {
        let revision = self.revision;
        let line = EventLine { revision, time, event, object: record.map(Record::object), detail };
        let json = to_json(&line);
        match self.form {
            Form::Lines => [&json[..], b"\n"].concat(),
            Form::ServerSent => {
                let id = if self.is_replaying { String::new() } else { format!("id: {revision}\n") };
                let head = format!("{id}event: {}\ndata: ", event.as_str());
                [head.as_bytes(), &json, b"\n\n"].concat()
            }
        }
    }
}
