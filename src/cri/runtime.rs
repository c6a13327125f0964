//! A workload becomes a sandbox and a container, and an observation becomes what we know of it.
//!
//! A start is sandbox, handler check, container, start; the image is there by then ([`super::images`]). Each step that made something
//! names its undo; on failure they are undone in reverse, under a deadline of their own. What cannot be undone then carries our labels
//! and is swept later.
//!
//! Invariant: the user's code runs only in a sandbox whose handler the runtime itself reported to be the one asked for.
//! Invariant: a creation that may have happened is looked for by its labels before anything else is done about it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use super::client::Client;
use super::images::Image;
use super::proto;
use crate::deadline::{Deadline, Stopwatch, Timestamp};
use crate::grpc::{self, Code, ErrorKind};
use crate::limits;
use crate::report::clip;
use crate::workload::{Name, Phase, Protocol, Reason, Workload};

/// The label that marks what is ours: the name of the node whose agent made it.
pub const LABEL_NODE: &str = "kakuri.dev/node";
/// The workload's id.
pub const LABEL_WORKLOAD: &str = "kakuri.dev/workload";
/// The acceptance of the workload: two workloads of one id, one after the other, differ in it.
pub const LABEL_UID: &str = "kakuri.dev/uid";
/// The handler that was asked for, to compare with what the runtime reports as long as the sandbox lives.
pub const LABEL_HANDLER: &str = "kakuri.dev/handler";
/// `true` or `false`: whether the sandbox must have a kernel of its own.
pub const LABEL_OWN_KERNEL: &str = "kakuri.dev/own-kernel";
/// The workload as JSON, without the values of its environment; only on the sandbox.
pub const ANNOTATION_WORKLOAD: &str = "kakuri.dev/workload-spec";
/// CRI wants a namespace for each sandbox; all of ours share this one.
pub(super) const NAMESPACE: &str = "kakuri";
/// The name of the one container in each sandbox.
const CONTAINER: &str = "main";
/// The handler of Edera zones, and the annotations it sizes them by.
const EDERA: &str = "edera";

/// How a runtime class is made on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Its name.
    pub name: Name,
    /// The CRI runtime handler; never empty.
    pub handler: String,
    /// Whether its sandboxes must have a kernel of their own.
    pub own_kernel: bool,
    /// Annotations for every sandbox of the class; nothing else ever becomes an annotation.
    pub annotations: BTreeMap<String, String>,
    /// Memory a sandbox takes beside its workload, MiB.
    pub overhead_mb: u64,
    /// The least memory a workload may ask for, MiB.
    pub memory_mb_min: u64,
    /// How long making a sandbox may take, milliseconds.
    pub sandbox_ms_max: u64,
}

/// What to start, and as what.
pub struct Order<'a> {
    /// What.
    pub workload: &'a Workload,
    /// The acceptance it belongs to; part of the sandbox's name.
    pub uid: &'a str,
    /// The how-manieth sandbox of this acceptance it is; part of its name.
    pub attempt: u32,
    /// Host mounts as they really are, links followed; asked for just before the container is made, for a link can be changed.
    pub mounts: &'a dyn Fn() -> Result<Vec<crate::workload::Mount>, String>,
    /// Processes and threads at a time; none where the node cannot limit them.
    pub pids_max: Option<u64>,
    /// Its class on this node.
    pub class: &'a Class,
    /// This node.
    pub node: &'a Name,
    /// The directory of the workload's log files.
    pub log_dir: &'a Path,
    /// The workload for [`ANNOTATION_WORKLOAD`].
    pub annotation: String,
    /// The image, which is there.
    pub image: &'a Image,
    /// How long it took until it was, milliseconds.
    pub pull_ms: u64,
}

/// Watches a start, and may end it.
pub trait Progress {
    /// A step begins.
    fn enter(&self, phase: Phase);
    /// A sandbox exists.
    fn sandbox(&self, sandbox_id: &str);
    /// The user's code may run from now on.
    ///
    /// # Errors
    /// Why it must not.
    fn launch(&self) -> Result<(), String>;
    /// Whether somebody wants the workload no more.
    fn is_cancelled(&self) -> bool;
}

/// A start that worked.
#[derive(Clone, Debug)]
pub struct Started {
    /// The runtime's name for the sandbox.
    pub sandbox_id: String,
    /// The runtime's name for the container.
    pub container_id: String,
    /// The handler, as the runtime reports it.
    pub handler: String,
    /// The sandbox's address; none where the runtime gives none.
    pub ip: Option<String>,
    /// The digest of the image's manifest in its repository; none where the runtime knows none.
    pub image_digest: Option<String>,
    /// What the runtime then said of the container: a short one may be over already.
    pub observed: Observed,
    /// How long each step took, milliseconds: image, sandbox, create, start.
    pub steps_ms: [u64; 4],
}

/// A start that did not; everything it made is undone, or marked for the sweep.
#[derive(Clone, Debug)]
pub struct StartError {
    /// The kind of failure.
    pub reason: Reason,
    /// The cause, in words for the status.
    pub message: String,
    /// It failed for want of an answer, not because of the workload: worth another attempt.
    pub retriable: bool,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

impl std::error::Error for StartError {}

/// Starts a workload.
///
/// # Errors
/// [`StartError`]; by then what was made is undone as far as the runtime answers.
pub fn start(client: &Client, order: &Order<'_>, deadline: Deadline, progress: &dyn Progress) -> Result<Started, StartError> {
    let mut made = Made::default();
    let result = run_steps(client, order, deadline, progress, &mut made);
    if result.is_err() {
        undo(client, &made);
    }
    result
}

/// What a start made so far; undone in reverse.
#[derive(Default)]
struct Made {
    sandbox_id: Option<String>,
    container_id: Option<String>,
}

fn run_steps(
    client: &Client,
    order: &Order<'_>,
    deadline: Deadline,
    progress: &dyn Progress,
    made: &mut Made,
) -> Result<Started, StartError> {
    let sandbox_config = sandbox_config(order);
    let mut watch = Stopwatch::start();
    let mut step_ms = || {
        let ms = watch.elapsed_ms();
        watch = Stopwatch::start();
        ms
    };
    enter(progress, Phase::CreatingSandbox, deadline)?;
    let sandbox_id = create_sandbox(client, order, &sandbox_config, deadline)?;
    progress.sandbox(&sandbox_id);
    made.sandbox_id = Some(sandbox_id.clone());
    let sandbox = client.pod_sandbox_status(&sandbox_id, deadline).map_err(|e| failure(&e, Reason::CreateFailed, deadline))?;
    verify_handler(&order.class.handler, &sandbox.runtime_handler)?;
    let sandbox_ms = step_ms();

    enter(progress, Phase::Creating, deadline)?;
    let mounts = (order.mounts)().map_err(|message| StartError { reason: Reason::CreateFailed, message, retriable: false })?;
    let container = container_config(order, &mounts);
    let created = client.create_container(&sandbox_id, container, &sandbox_config, deadline);
    let container_id = created.map_err(|e| failure(&e, Reason::CreateFailed, deadline))?;
    made.container_id = Some(container_id.clone());
    let create_ms = step_ms();

    enter(progress, Phase::Starting, deadline)?;
    let journal =
        |why| StartError { reason: Reason::StartFailed, message: format!("the start could not be written down: {why}"), retriable: true };
    progress.launch().map_err(journal)?;
    let status = start_container(client, &container_id, deadline)?;
    let start_ms = step_ms();

    Ok(Started {
        sandbox_id,
        container_id,
        handler: sandbox.runtime_handler,
        ip: sandbox.network.map(|n| n.ip).filter(|ip| !ip.is_empty()),
        image_digest: order.image.digest.clone(),
        observed: observed(status),
        steps_ms: [order.pull_ms, sandbox_ms, create_ms, start_ms],
    })
}

fn enter(progress: &dyn Progress, phase: Phase, deadline: Deadline) -> Result<(), StartError> {
    if progress.is_cancelled() {
        return Err(cancelled());
    }
    deadline.left().map_err(|_| deadline_passed(phase.as_str()))?;
    progress.enter(phase);
    Ok(())
}

/// Of a start that nobody wants any more.
pub fn cancelled() -> StartError {
    StartError { reason: Reason::Stopped, message: "stopped before it ran".into(), retriable: false }
}

fn deadline_passed(phase: &str) -> StartError {
    StartError { reason: Reason::StartDeadlineExceeded, message: format!("start deadline passed in {phase}"), retriable: false }
}

/// Makes the sandbox. When the answer is lost, it is looked for by name and attempt, and adopted where it is ready.
fn create_sandbox(client: &Client, order: &Order<'_>, config: &proto::PodSandboxConfig, deadline: Deadline) -> Result<String, StartError> {
    let sandbox_deadline = deadline.at_most_ms(order.class.sandbox_ms_max, "RunPodSandbox");
    let error = match client.run_pod_sandbox(config, &order.class.handler, sandbox_deadline) {
        Ok(id) if !id.is_empty() => return Ok(id),
        Ok(_) => grpc::Error { method: "RunPodSandbox", kind: ErrorKind::Protocol("the answer lacks the sandbox's id") },
        Err(error) => error,
    };
    // The words of containerd, and of CRI-O.
    let says = |words| error.status().is_some_and(|s| s.message.contains(words));
    let unknown = says("no runtime for") || says("failed to find runtime handler");
    if !error.is_in_doubt() {
        return Err(failure(&error, if unknown { Reason::HandlerUnavailable } else { Reason::CreateFailed }, deadline));
    }
    // The deadline may be over; looking has one of its own.
    let look = Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "look for the sandbox");
    let listed = client.list_pod_sandbox(ours(order.node, Some(order.uid)), look).unwrap_or_default();
    let found = listed.into_iter().find(|s| s.metadata.as_ref().is_some_and(|m| m.attempt == order.attempt));
    match found {
        Some(sandbox) if deadline.left().is_ok() && sandbox.state() == proto::PodSandboxState::SandboxReady => {
            log::info!("workload {}: the answer to RunPodSandbox was lost, sandbox {} adopted", order.workload.id, sandbox.id);
            Ok(sandbox.id)
        }
        Some(sandbox) => {
            undo(client, &Made { sandbox_id: Some(sandbox.id), container_id: None });
            Err(failure(&error, Reason::CreateFailed, deadline))
        }
        None => Err(failure(&error, Reason::CreateFailed, deadline)),
    }
}

fn verify_handler(asked: &str, reported: &str) -> Result<(), StartError> {
    if asked == reported {
        return Ok(());
    }
    let message = format!("asked for a sandbox of handler {asked:?}, the runtime reports {:?}", clip(reported.to_owned(), 64));
    Err(StartError { reason: Reason::IsolationMismatch, message, retriable: false })
}

/// Starts the container and reads back when. A lost answer is settled by asking for the state. Once the request may have left, the
/// user's code may have run, and a failure is never a reason to run it again.
fn start_container(client: &Client, id: &str, deadline: Deadline) -> Result<proto::ContainerStatus, StartError> {
    let started = client.start_container(id, deadline);
    let fail = |error: &grpc::Error, sent: bool| {
        let failure = failure(error, Reason::StartFailed, deadline);
        StartError { retriable: failure.retriable && !sent, ..failure }
    };
    let sent = !matches!(&started, Err(grpc::Error { kind: ErrorKind::Connect(_), .. }));
    if let Err(error) = &started {
        if !error.is_in_doubt() {
            return Err(fail(error, sent));
        }
    }
    let status = match (client.container_status(id, deadline), &started) {
        (Ok(status), _) => status,
        // It was started; how it is, the next list will say.
        (Err(_), Ok(())) => proto::ContainerStatus::default(),
        (Err(_), Err(error)) => return Err(fail(error, sent)),
    };
    let never_ran = status.state() == proto::ContainerState::ContainerExited && status.reason == START_ERROR;
    match (started, status.state()) {
        (Err(error), proto::ContainerState::ContainerCreated | proto::ContainerState::ContainerUnknown) => Err(fail(&error, sent)),
        _ if never_ran => {
            let message = clip(status.message, limits::MESSAGE_BYTES_MAX);
            Err(StartError { reason: Reason::StartFailed, message, retriable: false })
        }
        (Ok(()) | Err(_), _) => Ok(status),
    }
}

/// containerd's word for a container whose start failed: it calls it exited, with an exit code of its own making.
const START_ERROR: &str = "StartError";

/// The failure of a step, from the error of its call.
pub fn failure(error: &grpc::Error, reason: Reason, deadline: Deadline) -> StartError {
    let message = clip(crate::report::Chain(error).to_string(), limits::MESSAGE_BYTES_MAX);
    // The runtime has our deadline too, and may say so a moment before we do.
    let is_near = deadline.left().is_ok_and(|left| left.as_millis() < 1000);
    let expired = deadline.left().is_err() || (error.code() == Some(Code::DeadlineExceeded) && is_near);
    // A reset stream was answered, in a way; only a broken connection says that the runtime is not there.
    let broken = matches!(error.kind, ErrorKind::Broken(_)) && !error.is_reset();
    let lost = broken || matches!(error.kind, ErrorKind::Connect(_)) || error.code() == Some(Code::Unavailable);
    let reason = match reason {
        _ if expired => Reason::StartDeadlineExceeded,
        _ if lost => Reason::RuntimeUnavailable,
        reason => reason,
    };
    // The name is held by a sandbox of an earlier attempt that came to light late; the next attempt has another name.
    let reserved = error.status().is_some_and(|s| s.message.contains("is reserved for"));
    StartError { reason, message, retriable: (lost && !expired) || reserved }
}

fn undo(client: &Client, made: &Made) {
    let deadline = Deadline::within_ms(limits::UNDO_MS_MAX, "undo");
    let quick = || deadline.at_most_ms(limits::CRI_QUICK_MS_MAX, "undo");
    if let Some(id) = &made.container_id {
        // What is not stopped here is stopped with its sandbox; what is not removed is swept.
        let _ = client.stop_container(id, 0, deadline);
        let _ = client.remove_container(id, quick());
    }
    if let Some(id) = &made.sandbox_id {
        if let Err(error) = remove_sandbox(client, id, deadline) {
            log::warn!("sandbox {id} of a failed start is left for the sweep: {}", crate::report::Chain(&error));
        }
    }
}

/// Stops and removes a sandbox with all in it. Gone already is done.
///
/// # Errors
/// Those of the two calls.
pub fn remove_sandbox(client: &Client, id: &str, deadline: Deadline) -> Result<(), grpc::Error> {
    let gone = |result: Result<(), grpc::Error>| match result {
        Err(error) if error.code() == Some(Code::NotFound) => Ok(()),
        other => other,
    };
    gone(client.stop_pod_sandbox(id, deadline))?;
    gone(client.remove_pod_sandbox(id, deadline))
}

/// Selects our sandboxes, or those of one acceptance.
fn ours(node: &Name, uid: Option<&str>) -> proto::PodSandboxFilter {
    let mut label_selector = BTreeMap::from([(LABEL_NODE.to_owned(), node.to_string())]);
    label_selector.extend(uid.map(|uid| (LABEL_UID.to_owned(), uid.to_owned())));
    proto::PodSandboxFilter { label_selector, ..Default::default() }
}

fn labels(order: &Order<'_>) -> BTreeMap<String, String> {
    BTreeMap::from([
        (LABEL_NODE.to_owned(), order.node.to_string()),
        (LABEL_WORKLOAD.to_owned(), order.workload.id.to_string()),
        (LABEL_UID.to_owned(), order.uid.to_owned()),
        (LABEL_HANDLER.to_owned(), order.class.handler.clone()),
        (LABEL_OWN_KERNEL.to_owned(), order.class.own_kernel.to_string()),
    ])
}

fn sandbox_config(order: &Order<'_>) -> proto::PodSandboxConfig {
    let Order { workload, class, .. } = order;
    let id = workload.id.as_str();
    let mut annotations = class.annotations.clone();
    if class.handler == EDERA {
        // Zones have whole CPUs; a zone whose memory may shrink would surprise a workload that was promised its limit.
        let cpus = workload.spec.cpu_millicores.div_ceil(1000).max(1);
        annotations.insert("dev.edera/cpu".to_owned(), cpus.to_string());
        annotations.entry("dev.edera/resource-policy".to_owned()).or_insert_with(|| "static".to_owned());
    }
    annotations.insert(ANNOTATION_WORKLOAD.to_owned(), order.annotation.clone());
    let overhead = i64::try_from(class.overhead_mb.saturating_mul(1 << 20)).unwrap_or(i64::MAX);
    proto::PodSandboxConfig {
        metadata: Some(proto::PodSandboxMetadata {
            name: id.to_owned(),
            uid: order.uid.to_owned(),
            namespace: NAMESPACE.to_owned(),
            attempt: order.attempt,
        }),
        hostname: id.to_owned(),
        log_directory: order.log_dir.to_string_lossy().into_owned(),
        port_mappings: workload.spec.ports.iter().map(port_mapping).collect(),
        labels: labels(order),
        annotations,
        linux: Some(proto::LinuxPodSandboxConfig {
            security_context: Some(proto::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                readonly_rootfs: true,
                seccomp: Some(seccomp()),
                ..Default::default()
            }),
            overhead: Some(proto::LinuxContainerResources { memory_limit_in_bytes: overhead, ..Default::default() }),
            resources: Some(resources(order)),
            ..Default::default()
        }),
    }
}

fn port_mapping(port: &crate::workload::Port) -> proto::PortMapping {
    let protocol = match port.protocol {
        Protocol::Tcp => proto::Protocol::Tcp,
        Protocol::Udp => proto::Protocol::Udp,
        Protocol::Sctp => proto::Protocol::Sctp,
    };
    proto::PortMapping {
        protocol: protocol.into(),
        container_port: port.container.into(),
        host_port: port.host.unwrap_or(0).into(),
        host_ip: String::new(),
    }
}

fn container_config(order: &Order<'_>, mounts: &[crate::workload::Mount]) -> proto::ContainerConfig {
    let spec = &order.workload.spec;
    let id = |n: u32| proto::Int64Value { value: n.into() };
    // On a shared kernel a capability is a piece of the host, so none is given that was not asked for.
    let drop = if order.class.own_kernel { spec.capabilities_drop.clone() } else { vec!["ALL".to_owned()] };
    let add = spec.capabilities_add.iter().filter(|c| !spec.capabilities_drop.contains(c)).cloned().collect();
    proto::ContainerConfig {
        metadata: Some(proto::ContainerMetadata { name: CONTAINER.to_owned(), attempt: order.attempt }),
        image: Some(order.image.of_container(spec.image.as_str(), &order.class.handler)),
        command: spec.command.clone(),
        args: spec.args.clone(),
        working_dir: spec.working_dir.clone().unwrap_or_default(),
        envs: spec.env.iter().map(|(key, value)| proto::KeyValue { key: key.clone(), value: value.expose().as_bytes().to_vec() }).collect(),
        mounts: mounts.iter().map(mount).collect(),
        labels: labels(order),
        annotations: BTreeMap::new(),
        log_path: log_file(order.attempt),
        linux: Some(proto::LinuxContainerConfig {
            resources: Some(resources(order)),
            security_context: Some(proto::LinuxContainerSecurityContext {
                capabilities: Some(proto::Capability { add_capabilities: add, drop_capabilities: drop }),
                privileged: false,
                namespace_options: Some(namespaces()),
                run_as_user: spec.user.map(|u| id(u.uid)),
                run_as_group: spec.user.and_then(|u| u.gid).map(id),
                readonly_rootfs: spec.read_only_rootfs,
                no_new_privs: true,
                masked_paths: MASKED_PATHS.map(str::to_owned).to_vec(),
                readonly_paths: READONLY_PATHS.map(str::to_owned).to_vec(),
                seccomp: Some(seccomp()),
            }),
        }),
    }
}

/// The name of a log file in the workload's directory.
pub fn log_file(attempt: u32) -> String {
    format!("{attempt}.log")
}

fn mount(mount: &crate::workload::Mount) -> proto::Mount {
    proto::Mount {
        container_path: mount.target.clone(),
        host_path: mount.source.clone(),
        readonly: mount.read_only,
        selinux_relabel: false,
        propagation: proto::MountPropagation::PropagationPrivate.into(),
    }
}

/// What a workload may use. The same numbers go to the sandbox, from which virtual machines are sized, and to the container.
///
/// CPU: quota and shares of the CFS, as Kubernetes computes them (period 100 ms; at least 1 ms and 2 shares).
fn resources(order: &Order<'_>) -> proto::LinuxContainerResources {
    let spec = &order.workload.spec;
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let unified = order.pids_max.map(|n| ("pids.max".to_owned(), n.to_string())).into_iter().collect();
    proto::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: signed((spec.cpu_millicores * 100).max(1000)),
        cpu_shares: signed((spec.cpu_millicores * 1024 / 1000).clamp(2, 262_144)),
        memory_limit_in_bytes: signed(spec.memory_mb << 20),
        unified,
        ..Default::default()
    }
}

/// Everything its own, nothing of the host.
fn namespaces() -> proto::NamespaceOption {
    proto::NamespaceOption {
        network: proto::NamespaceMode::Pod.into(),
        pid: proto::NamespaceMode::Container.into(),
        ipc: proto::NamespaceMode::Pod.into(),
        target_id: String::new(),
    }
}

fn seccomp() -> proto::SecurityProfile {
    proto::SecurityProfile { profile_type: proto::security_profile::ProfileType::RuntimeDefault.into(), localhost_ref: String::new() }
}

/// Hidden from every workload: what tells of the host or reaches into it. CRI leaves the list to the client.
pub const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Not writable, whoever asks.
pub const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A sandbox of ours, as the runtime lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The workload's id, as labelled.
    pub workload: String,
    /// Its acceptance, as labelled.
    pub uid: String,
    /// Which sandbox of the acceptance.
    pub attempt: u32,
    /// The handler that was asked for, as labelled.
    pub asked_handler: String,
    /// Whether a kernel of its own was promised, as labelled; a sandbox without the label was promised one.
    pub own_kernel: bool,
    /// The runtime's name for it.
    pub sandbox_id: String,
    /// Whether it is alive.
    pub is_ready: bool,
    /// The handler the runtime reports.
    pub handler: String,
    /// The workload, as annotated.
    pub annotation: String,
    /// When it was made.
    pub created_at: Option<Timestamp>,
    /// The container in it.
    pub container: Option<SeenContainer>,
}

/// A container of ours, as the runtime lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenContainer {
    /// The runtime's name for it.
    pub id: String,
    /// Where it stands.
    pub state: proto::ContainerState,
}

/// Lists what is ours: the truth that everything else is compared with.
///
/// # Errors
/// Those of the two calls.
pub fn list(client: &Client, node: &Name) -> Result<Vec<Seen>, grpc::Error> {
    let deadline = Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "relist");
    let filter = ours(node, None);
    let containers = proto::ContainerFilter { label_selector: filter.label_selector.clone(), ..Default::default() };
    // Containers first: one that is created in between belongs to a sandbox the second list has, and is merely not seen yet.
    let mut containers: BTreeMap<String, proto::Container> =
        client.list_containers(containers, deadline)?.into_iter().map(|c| (c.pod_sandbox_id.clone(), c)).collect();
    let seen = |sandbox: proto::PodSandbox| {
        let container = containers.remove(&sandbox.id).map(|c| SeenContainer { state: c.state(), id: c.id });
        Seen {
            workload: sandbox.labels.get(LABEL_WORKLOAD).cloned().unwrap_or_default(),
            uid: sandbox.labels.get(LABEL_UID).cloned().unwrap_or_default(),
            attempt: sandbox.metadata.as_ref().map(|m| m.attempt).unwrap_or_default(),
            asked_handler: sandbox.labels.get(LABEL_HANDLER).cloned().unwrap_or_default(),
            own_kernel: sandbox.labels.get(LABEL_OWN_KERNEL).is_none_or(|label| label != "false"),
            is_ready: sandbox.state() == proto::PodSandboxState::SandboxReady,
            handler: sandbox.runtime_handler,
            annotation: sandbox.annotations.get(ANNOTATION_WORKLOAD).cloned().unwrap_or_default(),
            created_at: Timestamp::from_nanos(sandbox.created_at),
            sandbox_id: sandbox.id,
            container,
        }
    };
    Ok(client.list_pod_sandbox(filter, deadline)?.into_iter().map(seen).collect())
}

/// What the runtime says of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// It was never started.
    Created,
    /// It ended.
    Ended(Ending),
    /// It runs, since then.
    Running(Option<Timestamp>),
    /// The runtime does not know either.
    Unknown,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Of its first process; `None` where the runtime itself does not know.
    pub exit_code: Option<i32>,
    /// The runtime says that the kernel killed it for its memory.
    pub oom_killed: bool,
    /// It never ran: the runtime could not start it.
    pub never_ran: bool,
    /// The runtime's own words.
    pub message: String,
    /// When it ran, first.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

/// Asks the runtime for a container.
///
/// # Errors
/// Those of the call; `NotFound` among them.
pub fn observe(client: &Client, container_id: &str, deadline: Deadline) -> Result<Observed, grpc::Error> {
    client.container_status(container_id, deadline).map(observed)
}

fn observed(status: proto::ContainerStatus) -> Observed {
    let started_at = Timestamp::from_nanos(status.started_at);
    match status.state() {
        proto::ContainerState::ContainerCreated => Observed::Created,
        proto::ContainerState::ContainerRunning => Observed::Running(started_at),
        proto::ContainerState::ContainerExited => Observed::Ended(Ending {
            // containerd's ways to say that there is none: the container was lost, or never ran.
            exit_code: Some(status.exit_code).filter(|_| status.reason != "Unknown" && status.reason != START_ERROR),
            oom_killed: status.reason == "OOMKilled",
            never_ran: status.reason == START_ERROR,
            message: clip(status.message, limits::MESSAGE_BYTES_MAX),
            started_at,
            finished_at: Timestamp::from_nanos(status.finished_at),
        }),
        proto::ContainerState::ContainerUnknown => Observed::Unknown,
    }
}

/// What an agent needs to know of a sandbox it did not start itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The container.
    pub observed: Observed,
    /// The sandbox's address.
    pub ip: Option<String>,
    /// The image, as the runtime refers to it.
    pub image_ref: String,
}

/// Asks for what a list does not say.
///
/// # Errors
/// When the runtime did not answer. A refusal is an answer: nothing is known then.
pub fn find_out(client: &Client, seen: &Seen) -> Result<Found, grpc::Error> {
    let deadline = Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "adopt");
    let answered = |error: grpc::Error| if error.status().is_some() && !error.is_in_doubt() { Ok(()) } else { Err(error) };
    let mut found = Found { observed: Observed::Unknown, ip: None, image_ref: String::new() };
    match client.pod_sandbox_status(&seen.sandbox_id, deadline) {
        Ok(status) => found.ip = status.network.map(|n| n.ip).filter(|ip| !ip.is_empty()),
        Err(error) => answered(error)?,
    }
    let container_id = seen.container.as_ref().map(|c| c.id.as_str()).unwrap_or_default();
    match client.container_status(container_id, deadline) {
        Ok(status) => {
            found.image_ref.clone_from(&status.image_ref);
            found.observed = observed(status);
        }
        Err(error) => answered(error)?,
    }
    Ok(found)
}

/// Asks the guest for its kernel release: `Ok(None)` when the image has nothing to answer with.
///
/// # Errors
/// When the runtime did not answer, or the container is no longer there to ask.
pub fn probe_kernel(client: &Client, container_id: &str) -> Result<Option<String>, grpc::Error> {
    let deadline = Deadline::within_ms(limits::PROBE_MS_MAX, "probe");
    let commands: [&[&str]; 2] = [&["uname", "-r"], &["cat", "/proc/sys/kernel/osrelease"]];
    for command in commands {
        let words: Vec<String> = command.iter().map(|w| (*w).to_owned()).collect();
        match client.exec_sync(container_id, &words, i64::try_from(limits::PROBE_MS_MAX / 1000).unwrap_or(1), deadline) {
            Ok(answer) if answer.exit_code == 0 => {
                let text = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
                if !text.is_empty() {
                    return Ok(Some(clip(text, 128)));
                }
            }
            Ok(_) => {}
            // A missing program is an error of the call; one that never reached the runtime is not about the image.
            Err(error) if error.is_in_doubt() || error.status().is_none() => return Err(error),
            Err(_) => {}
        }
        client.container_status(container_id, deadline).and_then(|s| match s.state() {
            proto::ContainerState::ContainerRunning => Ok(()),
            _ => Err(grpc::Error { method: "ExecSync", kind: ErrorKind::Protocol("the container is not running") }),
        })?;
    }
    Ok(None)
}
