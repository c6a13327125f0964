//! The workers: each takes chores from one queue and does them, one at a time.
//!
//! Invariant: no registry lock is held while a worker speaks to the runtime or touches the disk.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::Agent;
use super::images;
use super::logs::files::Files;
use super::node;
use super::registry::{CheckUp, Chore, EndStep, EndTicket, StartTicket};
use crate::cri::images::Image;
use crate::cri::runtime::{self, Observed, Order, StartError, Started};
use crate::deadline::Deadline;
use crate::failpoint;
use crate::grpc::{Code, ErrorKind};
use crate::limits;
use crate::net::{Address, Stream};
use crate::report::{Chain, clip};
use crate::wire::workload as wire_workload;
use crate::workload::{Check, Mount, Reason, Workload, WorkloadId};

/// Starts a workload.
pub fn start(agent: &Agent, id: &WorkloadId) {
    let Some(ticket) = agent.registry.begin_start(id) else { return };
    let result = match prepare(agent, &ticket).and_then(|()| images::find(agent, &ticket)) {
        Ok(Some(held)) => start_ticket(agent, &ticket, &held.image, held.pull_ms),
        // The image is pulled by others; when it is there, the start comes back.
        Ok(None) => return images::wait_for(agent, ticket),
        Err(error) => Err(error),
    };
    match &result {
        Ok((started, _)) => log::info!("workload {id}: running in sandbox {} of {:?}", started.sandbox_id, started.handler),
        Err(error) => log::warn!("workload {id}: start failed: {error}"),
    }
    ticket.finish(result);
}

/// What must hold before an image is worth pulling.
fn prepare(agent: &Agent, ticket: &StartTicket<'_>) -> Result<(), StartError> {
    let refused = |reason, message: String| StartError { reason, message, retriable: false };
    let StartTicket { workload, class, .. } = ticket;
    if agent.node.has_handler(ticket.endpoint, &class.handler) == Some(false) {
        return Err(refused(Reason::HandlerUnavailable, format!("the runtime does not list the handler {:?}", class.handler)));
    }
    make_log_dir(agent, &agent.log_dir(&workload.id, &ticket.uid))
        .map_err(|e| refused(Reason::CreateFailed, format!("cannot make the log directory: {e}")))?;
    Ok(())
}

fn start_ticket(agent: &Agent, ticket: &StartTicket<'_>, image: &Image, pull_ms: u64) -> Result<(Started, bool), StartError> {
    let StartTicket { workload, class, .. } = ticket;
    let log_dir = agent.log_dir(&workload.id, &ticket.uid);
    let order = Order {
        annotation: annotation(workload),
        workload,
        uid: &ticket.uid,
        attempt: ticket.attempt,
        class,
        node: agent.registry.node(),
        log_dir: &log_dir,
        mounts: &|| resolve_mounts(agent, workload),
        pids_max: pids_max(workload, class.own_kernel, node::has_cgroup_v2()),
        image,
        pull_ms,
    };
    runtime::start(&agent.endpoint(ticket.endpoint).client, &order, ticket.deadline, ticket).map(|started| (started, class.own_kernel))
}

/// Processes at a time. On a shared kernel their number is the host's, so there is a limit even where none was asked for.
fn pids_max(workload: &Workload, own_kernel: bool, can_limit: bool) -> Option<u64> {
    workload.spec.pids_max.or_else(|| (can_limit && !own_kernel).then_some(limits::PIDS_DEFAULT))
}

/// The workload as the runtime keeps it for us: without the values of its environment, which are secrets.
fn annotation(workload: &Workload) -> String {
    let mut map = wire_workload::to_map(workload);
    if let Some(serde_json::Value::Object(env)) = map.get_mut("env") {
        for value in env.values_mut() {
            *value = "".into();
        }
    }
    serde_json::Value::Object(map).to_string()
}

/// Host mounts as they really are, links followed, each under a root the configuration allows.
fn resolve_mounts(agent: &Agent, workload: &Workload) -> Result<Vec<Mount>, String> {
    let resolve = |mount: &Mount| {
        let real = fs::canonicalize(&mount.source).map_err(|e| format!("mount source {}: {e}", mount.source))?;
        if !is_allowed(&agent.mount_roots, &real) {
            return Err(format!("mount source {} leads outside the node's mount roots", mount.source));
        }
        // CRI paths are text; the nearest text of a name that is none could name something else.
        let source = real.into_os_string().into_string().map_err(|_| format!("mount source {} is not UTF-8", mount.source))?;
        Ok(Mount { source, ..mount.clone() })
    };
    workload.spec.mounts.iter().map(resolve).collect()
}

/// Whether a path lies under one of the roots.
pub fn is_allowed(roots: &[PathBuf], path: &Path) -> bool {
    roots.iter().any(|root| path.starts_with(root))
}

/// Brings a workload one step nearer to its end: stop, then retire or remove.
pub fn end(agent: &Agent, id: &WorkloadId) {
    let Some(ticket) = agent.registry.begin_end(id) else { return };
    let result = end_ticket(agent, &ticket);
    match &result {
        Ok(EndStep::Ended(ending)) => log::info!("workload {id}: stopped, exit code {:?}", ending.exit_code),
        Ok(EndStep::Removed) => log::info!("workload {id}: removed"),
        Ok(EndStep::Asked | EndStep::Cleared | EndStep::Gone | EndStep::Retired) => log::debug!("workload {id}: {result:?}"),
        Err(message) => log::warn!("workload {id}: {:?} failed, to be repeated: {message}", ticket.chore),
    }
    ticket.finish(result);
}

fn end_ticket(agent: &Agent, ticket: &EndTicket<'_>) -> Result<EndStep, String> {
    let client = &agent.endpoint(ticket.endpoint).client;
    let deadline = Deadline::within_ms(limits::UNDO_MS_MAX, "removal");
    let words = |error: &crate::grpc::Error| Chain(error).to_string();
    match ticket.chore {
        Chore::Stop => {
            let Some(container_id) = &ticket.container_id else { return Ok(EndStep::Gone) };
            // What ended by itself meanwhile is to be told from what we end.
            let quick = Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "stop");
            match runtime::observe(client, container_id, quick) {
                Ok(Observed::Ended(ending)) => return Ok(EndStep::Ended(ending)),
                // Nobody is there to be asked.
                Err(error) if matches!(error.kind, ErrorKind::Connect(_)) => return Err(words(&error)),
                Ok(_) | Err(_) => {}
            }
            ticket.ask();
            stop(client, container_id, ticket.grace_ms, ticket.failures)
        }
        Chore::Clear => {
            let sandbox_id = ticket.sandbox_id.as_deref().unwrap_or_default();
            runtime::remove_sandbox(client, sandbox_id, deadline).map(|()| EndStep::Cleared).map_err(|e| words(&e))
        }
        Chore::Retire => {
            let sandbox_id = ticket.sandbox_id.as_deref().unwrap_or_default();
            match client.stop_pod_sandbox(sandbox_id, deadline) {
                Err(error) if error.code() != Some(Code::NotFound) => Err(words(&error)),
                Ok(()) | Err(_) => Ok(EndStep::Retired),
            }
        }
        Chore::Remove => {
            if let Some(sandbox_id) = &ticket.sandbox_id {
                runtime::remove_sandbox(client, sandbox_id, deadline).map_err(|e| words(&e))?;
            }
            let removed = remove_log_dir(agent, &agent.log_dir(ticket.id(), &ticket.uid));
            removed.map(|()| EndStep::Removed).map_err(|error| format!("cannot remove the logs: {error}"))
        }
        // The queue of ends holds no starts.
        Chore::Start => Err("not an end".into()),
    }
}

/// Stops a container. One that has a long grace, and takes it, does not hold a worker meanwhile: the runtime goes on without a
/// listener, and nothing is lost (containerd sends the polite signal once, whoever waits). One that the runtime fails to stop is
/// given more time each time: a machine that is busy enough needs it.
fn stop(client: &crate::cri::Client, container_id: &str, grace_ms: u64, failures: u32) -> Result<EndStep, String> {
    // CRI counts in seconds; half a second of grace is better rounded up than down to none.
    let grace_s = i64::try_from(grace_ms.div_ceil(1000)).unwrap_or(i64::MAX);
    let is_long = grace_ms > limits::STOP_WAIT_MS;
    let wait_ms = if is_long { limits::STOP_WAIT_MS } else { grace_ms.saturating_add(limits::CRI_STOP_MARGIN_MS << failures.min(3)) };
    let stopped = client.stop_container(container_id, grace_s, Deadline::within_ms(wait_ms, "stop"));
    // Whatever it answered, its own view of the container decides.
    let quick = Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "stop");
    match (runtime::observe(client, container_id, quick), stopped) {
        (Ok(Observed::Ended(ending)), _) => Ok(EndStep::Ended(ending)),
        (Err(error), _) if error.code() == Some(Code::NotFound) => Ok(EndStep::Gone),
        (Ok(Observed::Running(_) | Observed::Unknown), Err(error)) if is_long && is_timeout(&error) => Ok(EndStep::Asked),
        (_, Err(error)) | (Err(error), Ok(())) => Err(Chain(&error).to_string()),
        (Ok(observed), Ok(())) => Err(format!("the runtime says it stopped the container, and that it is {observed:?}")),
    }
}

fn is_timeout(error: &crate::grpc::Error) -> bool {
    matches!(error.kind, ErrorKind::Expired(_)) || matches!(error.code(), Some(Code::DeadlineExceeded | Code::Cancelled))
}

/// Removes log directories of workloads that are not here any more: of starts that another agent began, and nobody takes up. Only
/// when every runtime was listed is it known who is here.
pub fn remove_stray_logs(agent: &Agent) {
    if !agent.node.endpoints.iter().all(|endpoint| endpoint.is_listed()) {
        return;
    }
    for entry in fs::read_dir(agent.logs_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let hidden = name.strip_prefix('.').and_then(|name| name.strip_suffix(HIDDEN_SUFFIX));
        let Some((id, uid)) = hidden.unwrap_or(name).split_once('.') else { continue };
        // An acceptance that is not here now never will be: its uid is made when it enters the registry, and its directory after that.
        if WorkloadId::new(id).is_ok_and(|id| agent.registry.uid(&id).is_none_or(|present| *present != *uid)) {
            let _ = remove_log_dir(agent, &entry.path()); // Tried again with the next sweep.
            if hidden.is_some() {
                // An agent that was killed before it marked the directory, or just after it removed the mark, left it empty.
                let _ = fs::remove_dir(entry.path()); // One that is not empty is not ours.
            }
        }
    }
}

/// The file that marks a log directory as this node's. Logs commonly live among those of others, whose directories have names like
/// those of workloads.
pub fn mark(agent: &Agent) -> String {
    format!(".kakuri-{}", agent.registry.node())
}

/// How the name of a log directory ends, after a dot before it, that is being made or removed.
const HIDDEN_SUFFIX: &str = ".new";

fn hidden(dir: &Path) -> PathBuf {
    dir.with_file_name(format!(".{}{HIDDEN_SUFFIX}", dir.file_name().unwrap_or_default().to_string_lossy()))
}

/// Makes a log directory, with its mark in it from its first moment. One that is there without it is not ours.
fn make_log_dir(agent: &Agent, dir: &Path) -> io::Result<()> {
    if dir.join(mark(agent)).exists() {
        return Ok(());
    }
    let hidden = hidden(dir);
    match fs::remove_dir_all(&hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    DirBuilder::new().recursive(true).mode(0o700).create(&hidden)?;
    failpoint::pass("agent-logs-make-before");
    fs::write(hidden.join(mark(agent)), "")?;
    failpoint::pass("agent-logs-make-after");
    fs::rename(&hidden, dir)
}

/// Removes a log directory, if it is ours; gone already is done. It loses its name first, so that a reader knows what it sees. Its mark
/// goes last, and under a name that only we give: whoever is killed in the middle leaves something that is known for ours.
fn remove_log_dir(agent: &Agent, dir: &Path) -> io::Result<()> {
    let mark = mark(agent);
    let is_hidden = dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    if !is_hidden {
        // Of a start, or a removal, that did not come to its end.
        remove_log_dir(agent, &hidden(dir))?;
        let _ = fs::remove_dir(hidden(dir)); // Without a mark it is ours only if it is empty.
    }
    if !dir.join(&mark).exists() {
        return Ok(());
    }
    let last = if is_hidden { dir.to_owned() } else { hidden(dir) };
    if !is_hidden {
        fs::rename(dir, &last)?;
    }
    failpoint::pass("agent-logs-remove-before");
    if let Some(files) = Files::open(&last)? {
        files.wipe();
    }
    for entry in fs::read_dir(&last)? {
        let entry = entry?;
        if entry.file_name() == *mark {
            continue;
        }
        if entry.file_type()?.is_dir() { gone(fs::remove_dir_all(entry.path()))? } else { gone(fs::remove_file(entry.path()))? }
    }
    failpoint::pass("agent-logs-remove-after");
    fs::remove_dir_all(last)
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Asks a guest for its kernel.
pub fn probe(agent: &Agent, id: &WorkloadId) {
    let Some((endpoint, container_id)) = agent.registry.begin_probe(id) else { return };
    match runtime::probe_kernel(&agent.endpoint(endpoint).client, &container_id) {
        Ok(kernel) => agent.registry.finish_probe(id, &container_id, kernel),
        Err(error) => agent.registry.retry_probe(id, &container_id, &clip(Chain(&error).to_string(), limits::MESSAGE_BYTES_MAX)),
    }
}

/// Asks a workload how it is, in the way it asked for.
pub fn check(agent: &Agent, id: &WorkloadId) {
    let Some(CheckUp { endpoint, container_id, ip, health }) = agent.registry.begin_check(id) else { return };
    let deadline = Deadline::within_ms(health.timeout_ms, "health check");
    let address = |port: u16| match ip.as_deref().map(str::parse::<std::net::IpAddr>) {
        Some(Ok(ip)) => Ok(Address::Tcp((ip, port).into())),
        Some(Err(_)) | None => Err("the runtime gives its sandbox no address".to_owned()),
    };
    let connect = |port| address(port).and_then(|at| Stream::connect(&at, deadline).map_err(|e| Chain(&e).to_string()));
    let result = match &health.check {
        Check::Exec(command) => exec_check(&agent.endpoint(endpoint).client, &container_id, command, health.timeout_ms),
        Check::Http { port, path } => connect(*port).and_then(|stream| http_check(stream, path, deadline)),
        Check::Tcp { port } => connect(*port).map(drop),
    };
    agent.registry.finish_check(id, &container_id, result);
}

fn exec_check(client: &crate::cri::Client, container_id: &str, command: &[String], timeout_ms: u64) -> Result<(), String> {
    // CRI counts in seconds. Our own deadline is exact, but leaves the command running; the runtime's ends it a little later.
    let timeout_s = i64::try_from(timeout_ms.div_ceil(1000)).unwrap_or(1);
    let deadline = Deadline::within_ms(timeout_ms, "health check");
    match client.exec_sync(container_id, command, timeout_s, deadline) {
        Ok(answer) if answer.exit_code == 0 => Ok(()),
        Ok(answer) => {
            let said = String::from_utf8_lossy(if answer.stderr.is_empty() { &answer.stdout } else { &answer.stderr }).trim().to_owned();
            Err(clip(format!("exit code {}: {said}", answer.exit_code), limits::MESSAGE_BYTES_MAX / 2))
        }
        Err(error) => Err(clip(Chain(&error).to_string(), limits::MESSAGE_BYTES_MAX / 2)),
    }
}

/// One GET; the status line is all that is read of the answer (RFC 9112, section 4).
fn http_check(mut stream: Stream, path: &str, deadline: Deadline) -> Result<(), String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: kakuri-agent\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes(), deadline).map_err(|e| Chain(&e).to_string())?;
    let mut head = Vec::new();
    let mut chunk = [0; 256];
    while !head.contains(&b'\n') && head.len() < limits::HEALTH_ANSWER_BYTES_MAX {
        let read = stream.read(&mut chunk, deadline).map_err(|e| Chain(&e).to_string())?;
        if read == 0 {
            break;
        }
        head.extend_from_slice(chunk.get(..read).unwrap_or_default());
    }
    let line = head.split(|b| *b == b'\n').next().unwrap_or_default();
    let status = line.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|digits| std::str::from_utf8(digits).ok());
    match status.and_then(|digits| digits.parse::<u16>().ok()) {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("GET {path} was answered with status {status}")),
        None if head.is_empty() => Err(format!("GET {path} was not answered: the connection was closed")),
        None => Err(format!("GET {path} was not answered in HTTP")),
    }
}
