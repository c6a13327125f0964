//! What comes out of a workload: its logs, and what a command in it says. Both are passed through from its agent.

use super::super::node_client::{Error, Replies};
use super::{Answer, Api, Call, Refusal, body};
use crate::deadline::{Deadline, Timestamp};
use crate::flags;
use crate::http::{ChunkWriter, Request, Response, Status};
use crate::limits;
use crate::net;
use crate::report::Chain;
use crate::wire::agent::{self, LogRequest, LogStream, Reply};
use crate::wire::api::{ExecBody, to_json};
use crate::workload::{State, WorkloadId};

impl Api {
    pub(super) fn logs(&self, call: &Call<'_>, id: &str) -> Answer {
        let record = self.record(id)?;
        let request = read_log_request(call.request, record.workload.id.clone())?;
        let with_time = call.request.query_flag("timestamps")?;
        let fail = |error| Refusal::of_node(&record.node, error);
        let node = self.plane.nodes.get(&record.node).ok_or_else(|| fail(Error::NoSuchNode))?;
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
        Ok(Response::stream("text/plain; charset=utf-8", move |writer| pass_on(&id, replies, first, with_time, writer)))
    }

    pub(super) fn exec(&self, call: &Call<'_>, id: &str) -> Answer {
        let refuse = |problems| Refusal::problems(Status::UnprocessableContent, "invalid_exec", "the command breaks a rule", &problems);
        let ExecBody { command, timeout_ms } = ExecBody::parse(body(call.request)?).map_err(refuse)?;
        let record = self.record(id)?;
        let record = self.plane.refresh(&record, None).ok_or_else(|| Refusal::not_found("workload"))?;
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
        match node.client.request(&request, deadline).map_err(fail)? {
            Reply::ExecResult(result) => Ok(Response::json(Status::Ok, to_json(&result))),
            _ => Err(fail(Error::Unexpected)),
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

/// Writes log lines as they come, those that lie ready together.
fn pass_on(
    id: &WorkloadId,
    mut replies: Replies,
    first: Option<Reply>,
    with_time: bool,
    writer: &mut ChunkWriter<'_>,
) -> Result<(), net::Error> {
    // The response is under way, so that all a failure can do is cut it off.
    let cut_off = |error: Error| {
        log::warn!("logs of {id} were cut off: {}", Chain(&error));
        net::Error::Closed
    };
    let mut batch = Vec::new();
    let mut next = first;
    loop {
        match next {
            Some(Reply::Log(line)) => {
                if with_time {
                    batch.extend_from_slice(line.time.as_bytes());
                    batch.push(b' ');
                }
                batch.extend_from_slice(line.line.as_bytes());
                batch.push(b'\n');
            }
            Some(Reply::LogEnd { .. }) => return writer.write(&batch),
            // A quiet log is still followed.
            Some(Reply::Heartbeat { .. }) => {}
            Some(_) => return Err(cut_off(Error::Unexpected)),
            None if writer.is_over() => return Err(net::Error::Closed),
            None => {}
        }
        next = if batch.len() < limits::LOG_BATCH_BYTES { replies.ready().map_err(cut_off)? } else { None };
        if next.is_none() {
            writer.write(&batch)?;
            batch.clear();
            next = replies.next(Deadline::within_ms(limits::NODE_WAIT_SLICE_MS, "log line")).map_err(cut_off)?;
        }
    }
}
