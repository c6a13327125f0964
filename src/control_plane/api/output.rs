//! What comes out of a workload: its logs, and what a command in it says. Both are passed through from its agent.

use super::super::node_client::{Error, Replies};
use super::super::store::Record;
use super::holds::Hold;
use super::{Answer, Api, Call, Refusal, body};
use crate::deadline::{Deadline, Timestamp};
use crate::flags;
use crate::http::{ChunkWriter, Request, Response, Status};
use crate::limits;
use crate::net;
use crate::report::Chain;
use crate::wire::agent::{self, ErrorCode, LogRequest, LogStream, Reply};
use crate::wire::api::{ExecBody, to_json};
use crate::workload::{State, WorkloadId};

impl Api {
    pub(super) fn logs(&self, call: &Call<'_>, id: &str) -> Answer {
        let record = self.record(id)?;
        let request = read_log_request(call.request, record.workload.id.clone())?;
        let with_time = call.request.query_flag("timestamps")?;
        let fail = |error| Refusal::of_node(&record.node, error);
        let node = self.plane.nodes.get(&record.node).ok_or_else(|| fail(Error::NoSuchNode))?;
        let hold = self.hold(&record)?;
        // A refusal comes at once; the first line of a quiet workload may not.
        let first_ms = if request.follow { limits::LOG_FIRST_MS } else { limits::NODE_REQUEST_MS_MAX };
        let is_followed = request.follow;
        let deadline = Deadline::within_ms(limits::NODE_REQUEST_MS_MAX, "GetLogs");
        let mut replies = node.client.stream(&agent::Request::GetLogs(request), deadline).map_err(fail)?;
        let first = replies.next(Deadline::within_ms(first_ms, "GetLogs")).map_err(fail)?;
        if first.is_none() && !is_followed {
            return Err(fail(Error::Expired(deadline.expired())));
        }
        let id = record.workload.id.clone();
        Ok(Response::stream("text/plain; charset=utf-8", move |writer| {
            let _hold = hold;
            pass_on(&id, replies, first, with_time, writer)
        }))
    }

    /// A place among those that keep a connection to an agent.
    fn hold(&self, record: &Record) -> Result<Hold, Refusal> {
        let detail = || format!("too many wait for logs, commands and states of {} already; try again later", record.node);
        self.holds.take(&record.node).ok_or_else(|| Refusal::new(Status::Unavailable, "node_busy", detail()))
    }

    /// Runs a command, once. It goes on when the client leaves, for the runtime knows no way to end it: so it keeps its hold, too.
    pub(super) fn exec(&self, call: &Call<'_>, id: &str) -> Answer {
        let refuse = |problems| Refusal::problems(Status::UnprocessableContent, "invalid_exec", "the command breaks a rule", &problems);
        let ExecBody { command, timeout_ms } = ExecBody::parse(body(call.request)?).map_err(refuse)?;
        let record = self.record(id)?;
        let record = self.plane.refresh(&record).ok_or_else(|| Refusal::not_found("workload"))?;
        if record.state != State::Running {
            return Err(Refusal::new(Status::Conflict, "not_running", format!("the workload is {}", record.state)));
        }
        log::info!("{id}: {} runs a command in it", call.caller);
        let fail = |error| Refusal::of_node(&record.node, error);
        let node = self.plane.nodes.get(&record.node).ok_or_else(|| fail(Error::NoSuchNode))?;
        let request = agent::Request::Exec { id: record.workload.id.clone(), command, timeout_ms };
        // The agent gives its runtime some time beyond that of the command.
        let ms = timeout_ms.saturating_add(limits::CRI_QUICK_MS_MAX).saturating_add(limits::NODE_REQUEST_MS_MAX);
        let deadline = Deadline::within_ms(ms, "Exec");
        let _hold = self.hold(&record)?;
        // Until all of the request is written, the command cannot run.
        let mut replies = node.client.stream(&request, deadline).map_err(fail)?;
        let unknown = |error: &dyn std::error::Error| Refusal::outcome_unknown(format_args!("{}: {}", record.node, Chain(error)));
        match replies.next(deadline) {
            Ok(Some(Reply::ExecResult(result))) => Ok(Response::json(Status::Ok, to_json(&result))),
            Ok(Some(_)) => Err(unknown(&Error::Unexpected)),
            Ok(None) => Err(unknown(&deadline.expired())),
            // An agent that lost its runtime amidst the command says so with one of these.
            Err(Error::Refused(reply)) if matches!(reply.code, ErrorCode::Internal | ErrorCode::Unavailable) => {
                Err(unknown(&Error::Refused(reply)))
            }
            Err(error @ Error::Refused(_)) => Err(fail(error)),
            Err(error) => Err(unknown(&error)),
        }
    }
}

fn read_log_request(request: &Request, id: WorkloadId) -> Result<LogRequest, Refusal> {
    let tail = request.query_u64("tail")?;
    if tail.is_some_and(|tail| tail > limits::LOG_TAIL_MAX) {
        return Err(Refusal::bad_query(format!("query parameter tail is at most {}", limits::LOG_TAIL_MAX)));
    }
    let stream = |text| LogStream::parse(text).ok_or_else(|| Refusal::bad_query("query parameter stream is stdout or stderr"));
    Ok(LogRequest {
        id,
        follow: request.query_flag("follow")?,
        tail,
        since: request.query_value("since")?.map(read_since).transpose()?,
        stream: request.query_value("stream")?.map(stream).transpose()?,
    })
}

fn read_since(text: &str) -> Result<Timestamp, Refusal> {
    let ago = || flags::duration_ms(text).ok().map(|ms| Timestamp::now().minus_ms(ms));
    Timestamp::parse(text)
        .or_else(ago)
        .ok_or_else(|| Refusal::bad_query("query parameter since is a time as 2026-01-02T03:04:05Z, or a duration as 10m"))
}

/// The line in place of output that is missing. A workload can print the same; `gap` of the line protocol is not its to set.
const GAP: &str = "[kakuri: output is missing here]";

/// Writes log lines as they come, those that lie ready together.
fn pass_on(
    id: &WorkloadId,
    mut replies: Replies,
    first: Option<Reply>,
    with_time: bool,
    writer: &mut ChunkWriter<'_>,
) -> Result<(), net::Error> {
    let mut batch = Vec::new();
    let push = |batch: &mut Vec<u8>, time: &str, text: &str| {
        let time = if with_time { [time, " "] } else { ["", ""] };
        [&time[..], &[text, "\n"]].concat().iter().for_each(|part| batch.extend_from_slice(part.as_bytes()));
    };
    let mut next = Ok(first);
    let error = loop {
        match next {
            Ok(Some(Reply::Log(line))) => {
                if line.gap {
                    push(&mut batch, &line.time, GAP);
                }
                push(&mut batch, &line.time, &line.line);
            }
            Ok(Some(Reply::LogEnd { gap, .. })) => {
                if gap {
                    push(&mut batch, &Timestamp::now().to_string(), GAP);
                }
                return writer.write(&batch);
            }
            // A quiet log is still followed.
            Ok(Some(Reply::Heartbeat { .. })) => {}
            Ok(Some(_)) => break Error::Unexpected,
            Ok(None) if writer.is_over() => return Err(net::Error::Closed),
            Ok(None) => {}
            Err(error) => break error,
        }
        next = if batch.len() < limits::LOG_BATCH_BYTES { replies.ready() } else { Ok(None) };
        if matches!(next, Ok(None)) {
            writer.write(&batch)?;
            batch.clear();
            next = replies.next(Deadline::within_ms(limits::NODE_WAIT_SLICE_MS, "log line"));
        }
    };
    // What came before it is whole. The response is under way, so that all a failure can do is cut it off.
    writer.write(&batch)?;
    log::warn!("logs of {id} were cut off: {}", Chain(&error));
    Err(net::Error::Closed)
}
