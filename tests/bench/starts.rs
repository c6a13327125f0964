//! One workload from nothing to Running, by three ways: the bare CRI calls, the agent, the control plane.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kakuri::cri::{Client, proto, runtime};
use kakuri::deadline::{Deadline, Stopwatch};
use serde_json::{Value, json};

use crate::daemons::{Http, Line, Pair, poll};
use crate::load::Sample;
use crate::relay::Meter;
use crate::{Failure, RAW_NODE, mib};

/// Memory of each workload; a gVisor kernel has to fit in.
const MEMORY_MB: u64 = 64;
/// Longer than any start.
const WAIT_MS: u64 = 120_000;

/// A runtime class of one runtime, and all that starts something on it.
pub(crate) struct Stage {
    /// For the table.
    pub(crate) name: String,
    class: String,
    handler: String,
    image: String,
    client: Client,
    line: Line,
    http: Http,
    meter: Arc<Meter>,
    log_dir: PathBuf,
    next: usize,
    /// The results, in the order of [`WAYS`].
    pub(crate) starts: [Start; 3],
}

/// How a start is brought about.
pub(crate) const WAYS: [&str; 3] = ["bare CRI calls", "agent, StartWorkload", "control plane, POST /workloads"];
/// The first of [`WAYS`], with which the others are compared.
pub(crate) const RAW: usize = 0;
const AGENT: usize = 1;
const PLANE: usize = 2;

/// What starts by one way took.
#[derive(Default)]
pub(crate) struct Start {
    /// From the request to Running.
    pub(crate) wall: Sample,
    /// Less the time the runtime was at work.
    pub(crate) own: Sample,
}

/// What a [`Stage`] is made of.
pub(crate) struct Setting<'a> {
    /// Of the table.
    pub(crate) name: String,
    /// Its name with the agent.
    pub(crate) class: String,
    /// Its name with the runtime.
    pub(crate) handler: String,
    /// The image to start.
    pub(crate) image: &'a str,
    /// The runtime, through the relay.
    pub(crate) endpoint: PathBuf,
    /// Measures that.
    pub(crate) meter: Arc<Meter>,
    /// The daemons.
    pub(crate) pair: &'a Pair,
    /// For log files.
    pub(crate) dir: PathBuf,
}

impl Stage {
    /// Connects to everything.
    ///
    /// # Errors
    /// The sockets'.
    pub(crate) fn new(setting: Setting<'_>) -> Result<Self, Failure> {
        let Setting { name, class, handler, image, endpoint, meter, pair, dir } = setting;
        Ok(Self {
            name,
            class,
            handler,
            image: image.to_owned(),
            client: Client::new(endpoint),
            line: Line::connect(pair.agent.tcp()?)?,
            http: Http::connect(pair.plane.tcp()?)?,
            meter,
            log_dir: dir,
            next: 0,
            starts: Default::default(),
        })
    }

    /// One start by each way, each removed again. The first way is another in each round, for it comes right after the removal of
    /// something else, which goes on in the background.
    ///
    /// # Errors
    /// The first that fails.
    pub(crate) fn round(&mut self) -> Result<(), Failure> {
        self.next += 1;
        for offset in 0..WAYS.len() {
            let way = (self.next + offset) % WAYS.len();
            let id = format!("bench-{}-{}-{way}", self.class, self.next);
            match way {
                RAW => self.round_raw(&id)?,
                AGENT => self.round_agent(&id)?,
                _ => self.round_plane(&id)?,
            }
        }
        Ok(())
    }

    fn round_raw(&mut self, id: &str) -> Result<(), Failure> {
        let clock = Clock::start(&self.meter);
        let sandbox = self.start_raw(id)?;
        clock.stop(&mut self.starts[RAW]);
        Ok(runtime::remove_sandbox(&self.client, &sandbox, Deadline::within_ms(60_000, "removal"))?)
    }

    fn round_agent(&mut self, id: &str) -> Result<(), Failure> {
        let request = json!({"type": "StartWorkload", "workload": self.workload(id), "wait_ms": WAIT_MS});
        let clock = Clock::start(&self.meter);
        let reply = self.line.ask(&request, "Status")?;
        clock.stop(&mut self.starts[AGENT]);
        is_running(&reply)?;
        self.line.ask(&json!({"type": "DeleteWorkload", "id": id}), "Deleted").map(drop)
    }

    fn round_plane(&mut self, id: &str) -> Result<(), Failure> {
        let (path, body) = (format!("/workloads?wait_ms={WAIT_MS}"), self.workload(id));
        let clock = Clock::start(&self.meter);
        let (status, object) = self.http.call("POST", &path, Some(&body))?;
        clock.stop(&mut self.starts[PLANE]);
        is_created(status, &object)?;
        delete(&mut self.http, id)
    }

    fn workload(&self, id: &str) -> Value {
        workload(id, &self.class, &self.image, MEMORY_MB)
    }

    /// The calls an agent makes, with the messages it sends, and nothing else.
    fn start_raw(&self, id: &str) -> Result<String, Failure> {
        let deadline = Deadline::within_ms(WAIT_MS, "start");
        let image = proto::ImageSpec { image: self.image.clone(), runtime_handler: self.handler.clone(), ..Default::default() };
        self.client.image_status(&image, deadline)?.ok_or_else(|| format!("the runtime has no image {}", self.image))?;
        let sandbox = self.sandbox_config(id);
        let sandbox_id = self.client.run_pod_sandbox(&sandbox, &self.handler, deadline)?;
        self.client.pod_sandbox_status(&sandbox_id, deadline)?;
        let container_id = self.client.create_container(&sandbox_id, self.container_config(image), &sandbox, deadline)?;
        self.client.start_container(&container_id, deadline)?;
        let status = self.client.container_status(&container_id, deadline)?;
        match status.state() {
            proto::ContainerState::ContainerRunning => Ok(sandbox_id),
            state => Err(format!("{container_id} is {state:?}: {}", status.message).into()),
        }
    }

    fn labels(&self, id: &str) -> BTreeMap<String, String> {
        let pairs = [(runtime::LABEL_NODE, RAW_NODE), (runtime::LABEL_WORKLOAD, id), (runtime::LABEL_HANDLER, &self.handler)];
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }

    fn sandbox_config(&self, id: &str) -> proto::PodSandboxConfig {
        proto::PodSandboxConfig {
            metadata: Some(proto::PodSandboxMetadata { name: id.to_owned(), uid: id.to_owned(), namespace: "kakuri".into(), attempt: 0 }),
            hostname: id.to_owned(),
            log_directory: self.log_dir.join(id).display().to_string(),
            port_mappings: Vec::new(),
            labels: self.labels(id),
            annotations: BTreeMap::from([(runtime::ANNOTATION_WORKLOAD.to_owned(), self.workload(id).to_string())]),
            linux: Some(proto::LinuxPodSandboxConfig {
                security_context: Some(proto::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    readonly_rootfs: true,
                    seccomp: Some(proto::SecurityProfile::default()),
                    ..Default::default()
                }),
                overhead: Some(proto::LinuxContainerResources { memory_limit_in_bytes: 24 << 20, ..Default::default() }),
                resources: Some(resources()),
                ..Default::default()
            }),
        }
    }

    fn container_config(&self, image: proto::ImageSpec) -> proto::ContainerConfig {
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        let drop = if self.class == "native" { words(&["ALL"]) } else { Vec::new() };
        proto::ContainerConfig {
            metadata: Some(proto::ContainerMetadata { name: "main".into(), attempt: 0 }),
            image: Some(image),
            command: words(&COMMAND),
            labels: self.labels("raw"),
            log_path: "0.log".into(),
            linux: Some(proto::LinuxContainerConfig {
                resources: Some(resources()),
                security_context: Some(proto::LinuxContainerSecurityContext {
                    capabilities: Some(proto::Capability { add_capabilities: Vec::new(), drop_capabilities: drop }),
                    namespace_options: Some(namespaces()),
                    no_new_privs: true,
                    masked_paths: words(&runtime::MASKED_PATHS),
                    readonly_paths: words(&runtime::READONLY_PATHS),
                    seccomp: Some(proto::SecurityProfile::default()),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        }
    }
}

const COMMAND: [&str; 2] = ["sleep", "600"];

fn resources() -> proto::LinuxContainerResources {
    proto::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: i64::try_from(mib(MEMORY_MB)).unwrap_or(i64::MAX),
        ..Default::default()
    }
}

fn namespaces() -> proto::NamespaceOption {
    proto::NamespaceOption { pid: proto::NamespaceMode::Container.into(), ..Default::default() }
}

/// A workload that does nothing for ten minutes, and ends at once when told.
pub(crate) fn workload(id: &str, class: &str, image: &str, memory_mb: u64) -> Value {
    json!({
        "id": id, "image": image, "runtime_class": class, "memory_mb": memory_mb, "cpu_millicores": 500, "command": COMMAND,
        "stop_grace_ms": 0,
    })
}

/// Deletes a workload and waits until it is gone.
///
/// # Errors
/// When the control plane refuses, or it is still there after a minute.
pub(crate) fn delete(http: &mut Http, id: &str) -> Result<(), Failure> {
    let path = format!("/workloads/{id}");
    let (status, answer) = http.call("DELETE", &path, None)?;
    if !(200..300).contains(&status) {
        return Err(format!("DELETE answered {status}: {answer}").into());
    }
    poll("deletion", 60_000, || Ok(http.call("GET", &path, None)?.0 == 404)).map_err(|e| format!("{id}: {e}").into())
}

/// Whether a reply or an object says Running.
///
/// # Errors
/// What it says instead.
pub(crate) fn is_running(object: &Value) -> Result<(), Failure> {
    if object["state"] == "Running" { Ok(()) } else { Err(format!("does not run: {object}").into()) }
}

/// Whether a POST was answered with a workload that runs.
///
/// # Errors
/// What it was answered with instead.
pub(crate) fn is_created(status: u16, object: &Value) -> Result<(), Failure> {
    if status == 201 { is_running(object) } else { Err(format!("POST answered {status}: {object}").into()) }
}

/// Both clocks of a start.
struct Clock {
    watch: Stopwatch,
    meter: Arc<Meter>,
    busy: Duration,
}

impl Clock {
    fn start(meter: &Arc<Meter>) -> Self {
        Self { busy: meter.busy(), meter: Arc::clone(meter), watch: Stopwatch::start() }
    }

    fn stop(self, start: &mut Start) {
        let wall = self.watch.elapsed();
        start.wall.add(wall);
        start.own.add(wall.saturating_sub(self.meter.busy() - self.busy));
    }
}
