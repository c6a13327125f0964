//! The simulated machine's sandboxes, containers and images, and what may happen to them. Pure: the time comes in as a number.
//!
//! ```text
//! sandbox:    run --> READY --> stop --> NOTREADY --> remove
//! container:  create --> CREATED --> start --> RUNNING --> script over, TERM, KILL, sandbox stopped --> EXITED --> remove
//!                           +--> start of an unknown program --> EXITED (128, StartError)
//! ```
//! Words and codes of errors are those containerd 1.6 was seen to answer.
//!
//! Invariant: `due_at` is set only while a container is RUNNING; it and `printed` say all about how far it has come.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use prost::Message;

use super::faults::Plan;
use super::script::{NoProgram, Script};
use crate::cri::proto::{self, ContainerEventType as Event, ContainerState, PodSandboxState};
use crate::grpc::{Code, Status};
use crate::limits;
use crate::workload::ImageRef;

/// All that `--persist` keeps.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Saved {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(super) sandboxes: BTreeMap<String, Sandbox>,
    #[prost(btree_map = "string, message", tag = "2")]
    pub(super) containers: BTreeMap<String, Container>,
    /// By completed reference.
    #[prost(btree_map = "string, message", tag = "3")]
    pub(super) images: BTreeMap<String, proto::Image>,
    /// Makes ids and addresses different; 0 on a machine that is new.
    #[prost(uint64, tag = "4")]
    pub(super) serial: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Sandbox {
    #[prost(message, required, tag = "1")]
    pub(super) status: proto::PodSandboxStatus,
    #[prost(string, tag = "2")]
    log_directory: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Container {
    #[prost(message, required, tag = "1")]
    pub(super) status: proto::ContainerStatus,
    #[prost(string, tag = "2")]
    sandbox_id: String,
    /// Command and arguments.
    #[prost(string, repeated, tag = "3")]
    words: Vec<String>,
    /// Prints of its script that are done.
    #[prost(uint64, tag = "4")]
    pub(super) printed: u64,
    /// When the next print or the end comes; none is never.
    #[prost(int64, optional, tag = "5")]
    pub(super) due_at: Option<i64>,
    #[prost(string, tag = "6")]
    image_id: String,
}

impl Container {
    pub(super) fn is_running(&self) -> bool {
        self.status.state() == ContainerState::ContainerRunning
    }

    pub(super) fn script(&self) -> Result<Script, NoProgram> {
        Script::parse(&self.words)
    }

    pub(super) fn image(&self) -> &str {
        // What the user wrote, where a client resolved that to an id.
        let words = self.status.image.as_ref().map(|image| [&image.user_specified_image, &image.image]);
        words.and_then(|words| words.into_iter().find(|name| !name.is_empty())).map_or("", String::as_str)
    }

    fn end(&mut self, code: i32, reason: &str, now: i64) {
        self.status.set_state(ContainerState::ContainerExited);
        (self.status.exit_code, self.status.reason, self.status.finished_at) = (code, reason.to_owned(), now);
        self.due_at = None;
    }
}

/// Everything the simulator knows.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) saved: Saved,
    /// Events that wait, by subscriber. One that falls too far behind is dropped.
    pub(super) subscribers: HashMap<u64, VecDeque<Vec<u8>>>,
    /// Containers that ended, until somebody takes them.
    pub(super) ended: Vec<String>,
}

const EXIT_KILLED: i32 = 137;
/// Of an image whose name says nothing of its size.
const SIZE: u64 = 2_000_000;
const EXIT_TERMINATED: i32 = 143;
const EXIT_NOT_STARTED: i32 = 128;

fn unknown(message: impl Into<String>) -> Status {
    Status { code: Code::Unknown, message: message.into() }
}

fn not_found(message: impl Into<String>) -> Status {
    Status { code: Code::NotFound, message: message.into() }
}

impl World {
    /// What was saved, or a new machine with one image.
    pub(super) fn new(saved: Saved) -> Self {
        let mut world = Self { saved, ..Self::default() };
        if world.saved.serial == 0 {
            world.add_image("localhost/busybox:1.35");
        }
        world
    }

    fn new_id(&mut self, now: i64) -> String {
        self.saved.serial += 1;
        hex64(&(self.saved.serial, now, std::process::id()))
    }

    pub(super) fn run_sandbox(&mut self, request: proto::RunPodSandboxRequest, handlers: &[String], now: i64) -> Result<String, Status> {
        let proto::RunPodSandboxRequest { config, runtime_handler } = request;
        let config = config.unwrap_or_default();
        let Some(metadata) = &config.metadata else { return Err(unknown("sandbox config must include metadata")) };
        if let Some(holder) = self.saved.sandboxes.values().find(|s| s.status.metadata.as_ref() == Some(metadata)) {
            return Err(reserved("sandbox", &sandbox_name(metadata), &holder.status.id));
        }
        let runtime_handler = if runtime_handler.is_empty() { handlers.first().cloned().unwrap_or_default() } else { runtime_handler };
        if !handlers.contains(&runtime_handler) {
            return Err(unknown(format!("failed to get sandbox runtime: no runtime for {runtime_handler:?} is configured")));
        }
        let id = self.new_id(now);
        let ip = format!("10.88.{}.{}", self.saved.serial / 250 % 250, self.saved.serial % 250 + 2);
        let status = proto::PodSandboxStatus {
            id: id.clone(),
            metadata: config.metadata,
            state: PodSandboxState::SandboxReady.into(),
            created_at: now,
            network: Some(proto::PodSandboxNetworkStatus { ip }),
            labels: config.labels,
            annotations: config.annotations,
            runtime_handler,
        };
        self.saved.sandboxes.insert(id.clone(), Sandbox { status, log_directory: config.log_directory });
        self.emit(Event::ContainerCreatedEvent, &id, &id, now);
        self.emit(Event::ContainerStartedEvent, &id, &id, now);
        Ok(id)
    }

    pub(super) fn sandbox(&self, id: &str) -> Result<&Sandbox, Status> {
        find(&self.saved.sandboxes, id).ok_or_else(|| not_found("an error occurred when try to find sandbox: not found"))
    }

    pub(super) fn stop_sandbox(&mut self, id: &str, now: i64) -> Result<(), Status> {
        let gone = |_| not_found(format!("an error occurred when try to find sandbox {id:?}: not found"));
        let status = &self.sandbox(id).map_err(gone)?.status;
        let (id, was) = (status.id.clone(), status.state());
        for container in self.containers_of(&id) {
            self.kill(&container, now);
        }
        if was == PodSandboxState::SandboxReady {
            self.saved.sandboxes.entry(id.clone()).and_modify(|s| s.status.set_state(PodSandboxState::SandboxNotready));
            self.emit(Event::ContainerStoppedEvent, &id, &id, now);
        }
        Ok(())
    }

    /// Removes a sandbox and its containers. One that is not there is as good as removed.
    pub(super) fn remove_sandbox(&mut self, id: &str, now: i64) {
        let Ok(id) = self.sandbox(id).map(|s| s.status.id.clone()) else { return };
        let _ = self.stop_sandbox(&id, now); // It is there.
        for container in self.containers_of(&id) {
            self.remove_container(&container, now);
        }
        self.saved.sandboxes.remove(&id);
        self.emit(Event::ContainerDeletedEvent, &id, &id, now);
    }

    fn containers_of(&self, sandbox: &str) -> Vec<String> {
        self.saved.containers.values().filter(|c| c.sandbox_id == sandbox).map(|c| c.status.id.clone()).collect()
    }

    pub(super) fn create_container(&mut self, request: proto::CreateContainerRequest, now: i64) -> Result<String, Status> {
        let proto::CreateContainerRequest { pod_sandbox_id, config, .. } = request;
        let gone = |_| not_found(format!("failed to find sandbox id {pod_sandbox_id:?}: not found"));
        let sandbox = self.sandbox(&pod_sandbox_id).map_err(gone)?;
        let sandbox_id = sandbox.status.id.clone();
        if sandbox.status.state() != PodSandboxState::SandboxReady {
            let why = format!("no running task found: task {sandbox_id} not found: not found");
            return Err(not_found(format!("failed to get sandbox container task: {why}")));
        }
        let config = config.unwrap_or_default();
        let Some(metadata) = &config.metadata else { return Err(unknown("container config must include metadata")) };
        let mut siblings = self.saved.containers.values().filter(|c| c.sandbox_id == sandbox_id);
        if let Some(holder) = siblings.find(|c| c.status.metadata.as_ref() == Some(metadata)) {
            let pod = sandbox.status.metadata.clone().unwrap_or_default();
            let name = format!("{}_{}_{}_{}_{}", metadata.name, pod.name, pod.namespace, pod.uid, metadata.attempt);
            return Err(reserved("container", &name, &holder.status.id));
        }
        let image = config.image.as_ref().map_or("", |image| image.image.as_str());
        let Some(found) = self.image(image) else { return Err(not_found(format!("failed to resolve image {image:?}: not found"))) };
        let (image_ref, image_id) = (found.repo_digests.first().cloned().unwrap_or_default(), found.id);
        let has_log = !sandbox.log_directory.is_empty() && !config.log_path.is_empty();
        let log_path = if has_log { format!("{}/{}", sandbox.log_directory, config.log_path) } else { String::new() };
        let id = self.new_id(now);
        let status = proto::ContainerStatus {
            id: id.clone(),
            metadata: config.metadata,
            created_at: now,
            image: config.image,
            image_ref,
            labels: config.labels,
            annotations: config.annotations,
            log_path,
            ..Default::default()
        };
        let words = [config.command, config.args].concat();
        let container = Container { status, sandbox_id: sandbox_id.clone(), words, image_id, ..Container::default() };
        self.saved.containers.insert(id.clone(), container);
        self.emit(Event::ContainerCreatedEvent, &id, &sandbox_id, now);
        Ok(id)
    }

    pub(super) fn container(&self, id: &str) -> Result<&Container, Status> {
        let gone = || not_found(format!("an error occurred when try to find container {id:?}: not found"));
        find(&self.saved.containers, id).ok_or_else(gone)
    }

    /// The container, if it runs.
    pub(super) fn running(&self, id: &str) -> Result<&Container, Status> {
        let container = self.container(id)?;
        let state = container.status.state().as_str_name();
        if container.is_running() { Ok(container) } else { Err(unknown(format!("container is in {state} state"))) }
    }

    /// The handler a container runs under.
    pub(super) fn handler_of(&self, container: &Container) -> &str {
        self.saved.sandboxes.get(&container.sandbox_id).map_or("", |sandbox| &sandbox.status.runtime_handler)
    }

    pub(super) fn start_container(&mut self, id: &str, now: i64) -> Result<(), Status> {
        let container = self.container(id)?;
        let (id, sandbox_id, state) = (container.status.id.clone(), container.sandbox_id.clone(), container.status.state());
        if state != ContainerState::ContainerCreated {
            let why = format!("container is in {} state", state.as_str_name());
            return Err(unknown(format!("failed to set starting state for container {id:?}: {why}")));
        }
        if self.sandbox(&sandbox_id)?.status.state() != PodSandboxState::SandboxReady {
            return Err(unknown(format!("sandbox container {sandbox_id:?} is not running")));
        }
        let script = container.script();
        let Some(container) = self.saved.containers.get_mut(&id) else { return Ok(()) };
        match script {
            Ok(script) => {
                container.status.set_state(ContainerState::ContainerRunning);
                container.status.started_at = now;
                container.due_at = script.due(0).map(|ns| now.saturating_add(ns));
                self.emit(Event::ContainerStartedEvent, &id, &sandbox_id, now);
                Ok(())
            }
            Err(program) => {
                let message = format!("failed to create containerd task: failed to create shim task: {}", no_program("create", &program));
                container.end(EXIT_NOT_STARTED, "StartError", now);
                container.status.message.clone_from(&message);
                Err(unknown(message))
            }
        }
    }

    /// The polite signal, or the other one when there is no time to be polite; the id when it goes on running.
    pub(super) fn terminate(&mut self, id: &str, timeout_s: i64, now: i64) -> Result<Option<String>, Status> {
        let container = self.container(id)?;
        let id = container.status.id.clone();
        let ignores_term = container.script().is_ok_and(|script| script.ignores_term);
        if timeout_s > 0 && ignores_term && container.is_running() {
            return Ok(Some(id));
        }
        self.end(&id, if timeout_s > 0 { EXIT_TERMINATED } else { EXIT_KILLED }, "Error", now);
        Ok(None)
    }

    pub(super) fn kill(&mut self, id: &str, now: i64) {
        self.end(id, EXIT_KILLED, "Error", now);
    }

    /// Ends a container, if it runs.
    fn end(&mut self, id: &str, code: i32, reason: &str, now: i64) {
        if let Some(container) = self.saved.containers.get_mut(id).filter(|c| c.is_running()) {
            container.end(code, reason, now);
            let sandbox_id = container.sandbox_id.clone();
            self.ended.push(id.to_owned());
            self.emit(Event::ContainerStoppedEvent, id, &sandbox_id, now);
        }
    }

    /// Removes a container, killing it first if it runs. One that is not there is as good as removed.
    pub(super) fn remove_container(&mut self, id: &str, now: i64) {
        let Ok(id) = self.container(id).map(|c| c.status.id.clone()) else { return };
        self.kill(&id, now);
        if let Some(container) = self.saved.containers.remove(&id) {
            self.emit(Event::ContainerDeletedEvent, &id, &container.sandbox_id, now);
        }
    }

    /// The running container whose next print or end comes first, and when.
    pub(super) fn due(&self) -> Option<(i64, &Container)> {
        self.saved.containers.values().filter_map(|c| c.due_at.map(|at| (at, c))).min_by_key(|(at, _)| *at)
    }

    /// Takes a container past its print number `printed`, or to its end, at the time that was due. One killed meanwhile stays so.
    pub(super) fn advance(&mut self, id: &str, printed: u64) {
        let Some(container) = self.saved.containers.get_mut(id).filter(|c| c.is_running() && c.printed == printed) else { return };
        let Ok(script) = container.script() else { return };
        let index = usize::try_from(printed).unwrap_or(usize::MAX);
        let started = container.status.started_at;
        if !script.is_printed(index) {
            container.printed += 1;
            container.due_at = script.due(index + 1).map(|ns| started.saturating_add(ns));
        } else if let Some((ns, code, is_oom)) = script.end {
            let reason = if is_oom {
                "OOMKilled"
            } else if code == 0 {
                "Completed"
            } else {
                "Error"
            };
            self.end(id, code, reason, started.saturating_add(ns));
        }
    }

    pub(super) fn add_image(&mut self, reference: &str) -> String {
        self.saved.serial += 1;
        let reference = completed(reference);
        let (name, digest) = reference.split_once('@').unwrap_or((&reference, ""));
        let content = name.split(['/', ':']).find(|part| part.starts_with("same-")).unwrap_or(&reference);
        let id = if digest.is_empty() { format!("sha256:{}", hex64(&content)) } else { digest.to_owned() };
        let repository = name.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).map_or(name, |(repository, _)| repository);
        let repo_digests = vec![format!("{repository}@{id}")];
        let repo_tags = if digest.is_empty() { vec![name.to_owned()] } else { Vec::new() };
        let size = name.split_once("mb-").and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok());
        let size = size.map_or(SIZE, |mb| mb << 20);
        let image = proto::Image { id: id.clone(), repo_tags, repo_digests, size, ..proto::Image::default() };
        self.saved.images.insert(reference, image);
        id
    }

    /// An image by reference, digest or id, with all its names.
    pub(super) fn image(&self, reference: &str) -> Option<proto::Image> {
        let by_name = self.saved.images.get(&completed(reference));
        let is_it = |i: &&proto::Image| i.id == reference || i.repo_digests.iter().any(|d| d == reference);
        let found = by_name.or_else(|| self.saved.images.values().find(is_it))?;
        self.images().into_iter().find(|image| image.id == found.id)
    }

    /// Every image once, with all its names.
    pub(super) fn images(&self) -> Vec<proto::Image> {
        let mut by_id: BTreeMap<&str, proto::Image> = BTreeMap::new();
        for image in self.saved.images.values() {
            let all =
                by_id.entry(&image.id).or_insert_with(|| proto::Image { id: image.id.clone(), size: image.size, ..Default::default() });
            all.repo_tags.extend(image.repo_tags.iter().cloned());
            all.repo_digests.extend(image.repo_digests.iter().cloned());
        }
        by_id.into_values().collect()
    }

    /// Removes an image with all its names, used or not, as containerd does. One that is not there is as good as removed.
    pub(super) fn remove_image(&mut self, reference: &str) {
        if let Some(id) = self.image(reference).map(|image| image.id.clone()) {
            self.saved.images.retain(|_, image| image.id != id);
        }
    }

    /// Begins to keep events for somebody; returns who that is.
    pub(super) fn subscribe(&mut self) -> u64 {
        self.saved.serial += 1;
        self.subscribers.insert(self.saved.serial, VecDeque::new());
        self.saved.serial
    }

    fn emit(&mut self, kind: Event, id: &str, sandbox_id: &str, now: i64) {
        if self.subscribers.is_empty() {
            return;
        }
        let event = proto::ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind.into(),
            created_at: now,
            pod_sandbox_status: self.saved.sandboxes.get(sandbox_id).map(|s| s.status.clone()),
            containers_statuses: self.saved.containers.values().filter(|c| c.sandbox_id == sandbox_id).map(|c| c.status.clone()).collect(),
        };
        let event = event.encode_to_vec();
        self.subscribers.retain(|_, events| events.len() < limits::SIM_EVENTS_MAX);
        for events in self.subscribers.values_mut() {
            events.push_back(event.clone());
        }
    }

    pub(super) fn list_sandboxes(&self, filter: &proto::PodSandboxFilter, plan: &Plan) -> Vec<proto::PodSandbox> {
        let proto::PodSandboxFilter { id, state, label_selector } = filter;
        let all = self.saved.sandboxes.values().map(|s| reported(s, plan));
        let is_chosen = |s: &proto::PodSandboxStatus| {
            s.id.starts_with(id) && state.is_none_or(|wanted| wanted.state == s.state) && selects(label_selector, &s.labels)
        };
        let item = |s: proto::PodSandboxStatus| proto::PodSandbox {
            id: s.id,
            metadata: s.metadata,
            state: s.state,
            created_at: s.created_at,
            labels: s.labels,
            annotations: s.annotations,
            runtime_handler: s.runtime_handler,
        };
        all.filter(is_chosen).map(item).collect()
    }

    pub(super) fn list_containers(&self, filter: &proto::ContainerFilter, plan: &Plan) -> Vec<proto::Container> {
        let proto::ContainerFilter { id, state, pod_sandbox_id, label_selector } = filter;
        let all = self.saved.containers.values().filter(|c| c.sandbox_id.starts_with(pod_sandbox_id));
        let item = |c: &Container| {
            let s = self.reported(c, plan);
            let is_chosen =
                s.id.starts_with(id) && state.is_none_or(|wanted| wanted.state == s.state) && selects(label_selector, &s.labels);
            is_chosen.then(|| proto::Container {
                id: s.id,
                pod_sandbox_id: c.sandbox_id.clone(),
                metadata: s.metadata,
                image: s.image,
                image_ref: s.image_ref,
                state: s.state,
                created_at: s.created_at,
                labels: s.labels,
                annotations: s.annotations,
                image_id: c.image_id.clone(),
            })
        };
        all.filter_map(item).collect()
    }

    /// A container's status, as the faults let it look.
    pub(super) fn reported(&self, container: &Container, plan: &Plan) -> proto::ContainerStatus {
        let mut status = container.status.clone();
        if plan.settings("unknown").any(|handler| handler == self.handler_of(container)) {
            status.set_state(ContainerState::ContainerUnknown);
        }
        status
    }
}

/// A sandbox's status, as the faults let it look.
pub(super) fn reported(sandbox: &Sandbox, plan: &Plan) -> proto::PodSandboxStatus {
    let mut status = sandbox.status.clone();
    if let Some(lie) = plan.settings("lie").next() {
        lie.clone_into(&mut status.runtime_handler);
    }
    status
}

/// The name containerd reserves.
pub(super) fn sandbox_name(m: &proto::PodSandboxMetadata) -> String {
    format!("{}_{}_{}_{}", m.name, m.namespace, m.uid, m.attempt)
}

fn reserved(kind: &str, name: &str, holder: &str) -> Status {
    unknown(format!("failed to reserve {kind} name {name:?}: name {name:?} is reserved for {holder:?}"))
}

/// How runc says that there is no such program.
pub(super) fn no_program(what: &str, NoProgram(program): &NoProgram) -> String {
    let failed = if what == "exec" { "exec failed" } else { "runc create failed" };
    let why = format!("exec: {program:?}: executable file not found in $PATH: unknown");
    format!("OCI runtime {what} failed: {failed}: unable to start container process: {why}")
}

/// An entry by its id, or by a beginning of it that no other has.
fn find<'a, T>(map: &'a BTreeMap<String, T>, id: &str) -> Option<&'a T> {
    let mut starting = map.range(id.to_owned()..).take_while(|(key, _)| key.starts_with(id) && !id.is_empty());
    let (key, value) = starting.next()?;
    (key == id || starting.next().is_none()).then_some(value)
}

fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The reference as the registry model knows it; what is no reference stays as it is.
fn completed(reference: &str) -> String {
    ImageRef::new(reference).map_or_else(|_| reference.to_owned(), |image| image.as_str().to_owned())
}

/// 64 hexadecimal digits that look like a SHA-256 and are none: only equality matters here.
fn hex64(of: &impl Hash) -> String {
    let part = |n: u8| {
        let mut hasher = DefaultHasher::new();
        (n, of).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    };
    (0..4).map(part).collect()
}

#[cfg(test)]
mod tests;
