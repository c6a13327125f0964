//! Where a scenario runs: a runtime, a directory, and a node's name that no other test has.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;

use kakuri::cri::client::Client;
use kakuri::cri::proto::{Container, ContainerFilter, PodSandbox, PodSandboxFilter};
use kakuri::cri::runtime::{LABEL_NODE, LABEL_WORKLOAD};
use kakuri::deadline::Deadline;
use serde_json::{Value, json};

use super::agent::Agent;
use super::daemon::{Daemon, SIM};
use super::{Dir, Need, SOON_MS, skip, unique, until};

/// The image both runtimes have.
pub const IMAGE: &str = "localhost/busybox:1.35";

/// Held while a test restarts the lab's containerd; shared by those that need it to stay.
static LAB_STAYS: RwLock<()> = RwLock::new(());

/// A runtime and a directory.
pub struct Place {
    runtime: Runtime,
    /// The node's name.
    pub node: String,
    /// The class scenarios start workloads under.
    pub class: &'static str,
    endpoint: PathBuf,
    fault_files: Cell<u32>,
    /// Last, for it must outlive the daemons that write to it.
    pub dir: Dir,
}

enum Runtime {
    Lab(Lab),
    Sim(RefCell<Option<Daemon>>, Vec<String>),
}

/// A real runtime, as `scripts/test` names it.
pub struct Lab {
    /// Its directory, for `scripts/lab restart`.
    pub dir: Option<PathBuf>,
    /// `HOST:PORT` of a registry that answers anybody.
    pub open_registry: Option<String>,
    /// `HOST:PORT` of one that wants user kakuri with password secret.
    pub auth_registry: Option<String>,
    _stays: Option<RwLockReadGuard<'static, ()>>,
}

impl Lab {
    fn from_environment() -> Option<(PathBuf, Self)> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint = variable("KAKURI_LAB")?;
        let endpoint = PathBuf::from(endpoint.strip_prefix("unix://").unwrap_or(&endpoint));
        let lab = Self {
            dir: variable("KAKURI_LAB_DIR").map(PathBuf::from),
            open_registry: variable("KAKURI_REGISTRY_OPEN"),
            auth_registry: variable("KAKURI_REGISTRY_AUTH"),
            _stays: None,
        };
        Some((endpoint, lab))
    }

    /// Waits until no other test uses the lab, and keeps them off it.
    pub fn alone() -> RwLockWriteGuard<'static, ()> {
        // A test that failed leaves the lab as it should be.
        LAB_STAYS.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// kill -9 of containerd, and a new one.
    pub fn restart_hard(&self) {
        let dir = self.dir.as_ref().expect("asked for before");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/lab");
        let done = Command::new(script).arg("restart").arg(dir).arg("--hard").output().expect("a script");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
}

impl Place {
    /// A simulator of its own.
    pub fn sim(args: &[&str]) -> Self {
        let dir = Dir::new();
        let endpoint = dir.join("cri.sock");
        let mut all = vec!["--listen".to_owned(), format!("unix://{}", endpoint.display())];
        for (flag, file) in [("--root", "sim"), ("--fault-file", "faults"), ("--log-calls", "calls")] {
            all.extend([flag.to_owned(), dir.join(file).display().to_string()]);
        }
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        let runtime = Runtime::Sim(RefCell::default(), all);
        let place = Self { runtime, node: node_name(), class: "native", endpoint, fault_files: Cell::new(0), dir };
        place.start_sim();
        place
    }

    /// Runs a scenario on the real runtime, under a shared kernel and under its own; says so where there is none.
    pub fn with_lab(scenario: impl Fn(&Self)) {
        for class in ["native", "gvisor"] {
            Self::with_lab_class(class, &scenario);
        }
    }

    /// The same under one class.
    pub fn with_lab_class(class: &'static str, scenario: impl FnOnce(&Self)) {
        let stays = LAB_STAYS.read().unwrap_or_else(PoisonError::into_inner);
        Self::with_lab_unguarded(class, |place| {
            scenario(place);
        });
        drop(stays);
    }

    /// The same for a test that holds [`Lab::alone`].
    pub fn with_lab_unguarded(class: &'static str, scenario: impl FnOnce(&Self)) {
        let Some((endpoint, lab)) = Lab::from_environment() else {
            return skip(Need::Lab, "no real runtime (KAKURI_LAB=unix:///PATH)");
        };
        scenario(&Self { runtime: Runtime::Lab(lab), node: node_name(), class, endpoint, fault_files: Cell::new(0), dir: Dir::new() });
    }

    /// The real runtime's own things; none on the simulator.
    pub fn lab(&self) -> Option<&Lab> {
        match &self.runtime {
            Runtime::Lab(lab) => Some(lab),
            Runtime::Sim(..) => None,
        }
    }

    /// The runtime's socket.
    pub fn endpoint(&self) -> &Path {
        &self.endpoint
    }

    /// The runtime's socket as a flag's value.
    pub fn endpoint_url(&self) -> String {
        format!("unix://{}", self.endpoint.display())
    }

    /// Starts the simulator again after it ended.
    pub fn start_sim(&self) {
        let Runtime::Sim(slot, args) = &self.runtime else { panic!("not a simulator") };
        let (daemon, _) = Daemon::start(SIM, "sim", self.dir.join("").as_path(), args);
        *slot.borrow_mut() = Some(daemon);
    }

    /// kill -9 of the simulator.
    pub fn kill_sim(&self) {
        let Runtime::Sim(slot, _) = &self.runtime else { panic!("not a simulator") };
        slot.borrow_mut().take().expect("it ran").kill();
    }

    /// Sends the simulator a signal by its name.
    pub fn signal_sim(&self, name: &str) {
        let Runtime::Sim(slot, _) = &self.runtime else { panic!("not a simulator") };
        slot.borrow().as_ref().expect("it runs").signal(name);
    }

    /// Waits for a simulator that a fault ends.
    pub fn wait_for_sim_to_end(&self) {
        let Runtime::Sim(slot, _) = &self.runtime else { panic!("not a simulator") };
        slot.borrow_mut().take().expect("it ran").wait(SOON_MS);
    }

    /// Replaces the simulator's faults.
    pub fn faults(&self, specs: &[&str]) {
        let Runtime::Sim(..) = &self.runtime else { panic!("not a simulator") };
        // The count makes each file different: the simulator tells files apart by inode, size and time.
        self.fault_files.set(self.fault_files.get() + 1);
        let new = self.dir.write("faults.new", &format!("# {}\n{}\n", "+".repeat(self.fault_files.get() as usize), specs.join("\n")));
        fs::rename(new, self.dir.join("faults")).expect("a directory of ours");
    }

    /// The calls the simulator got, a line each: `METHOD OUTCOME key=value...`.
    pub fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.dir.join("calls")).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// How often a method was called, whatever came of it.
    pub fn count(&self, method: &str) -> usize {
        self.calls().iter().filter(|call| call.split(' ').next() == Some(method)).count()
    }

    /// Forgets the calls so far.
    pub fn forget_calls(&self) {
        self.dir.write("calls", "");
    }

    /// A client of the runtime itself, past the agent.
    pub fn cri(&self) -> Client {
        Client::new(self.endpoint.clone())
    }

    /// The sandboxes of our node.
    pub fn sandboxes(&self) -> Vec<PodSandbox> {
        let filter = PodSandboxFilter { label_selector: of_node(&self.node), ..Default::default() };
        self.cri().list_pod_sandbox(filter, soon()).expect("a list")
    }

    /// Whether the runtime has nothing of a node.
    pub fn is_clear_of(&self, node: &str) -> bool {
        let (cri, label_selector) = (self.cri(), of_node(node));
        let sandboxes = cri.list_pod_sandbox(PodSandboxFilter { label_selector: label_selector.clone(), ..Default::default() }, soon());
        let containers = cri.list_containers(ContainerFilter { label_selector, ..Default::default() }, soon());
        sandboxes.expect("a list").is_empty() && containers.expect("a list").is_empty()
    }

    /// The sandboxes of one workload.
    pub fn sandboxes_of(&self, id: &str) -> Vec<PodSandbox> {
        let mut label_selector = of_node(&self.node);
        label_selector.insert(LABEL_WORKLOAD.to_owned(), id.to_owned());
        let filter = PodSandboxFilter { label_selector, ..Default::default() };
        self.cri().list_pod_sandbox(filter, soon()).expect("a list")
    }

    /// The containers of our node.
    pub fn containers(&self) -> Vec<Container> {
        let filter = ContainerFilter { label_selector: of_node(&self.node), ..Default::default() };
        self.cri().list_containers(filter, soon()).expect("a list")
    }

    /// Whether labels say that something is of a node of this place, be it one of [`Place::agent_named`].
    fn is_ours(&self, labels: &BTreeMap<String, String>) -> bool {
        labels.get(LABEL_NODE).is_some_and(|node| node.starts_with(&self.node))
    }

    /// Removes every sandbox of this place's nodes, as far as the runtime obeys.
    fn remove_all(&self) {
        let cri = self.cri();
        for sandbox in cri.list_pod_sandbox(PodSandboxFilter::default(), soon()).unwrap_or_default() {
            if self.is_ours(&sandbox.labels) {
                let _ = cri.stop_pod_sandbox(&sandbox.id, soon()); // Whatever it says, removing is tried.
                let removed = cri.remove_pod_sandbox(&sandbox.id, soon());
                println!("removed sandbox {} of the failed test: {removed:?}", sandbox.id);
            }
        }
    }

    /// Whether there is a runtime that can be asked what it has.
    pub fn has_runtime(&self) -> bool {
        match &self.runtime {
            Runtime::Lab(_) => true,
            Runtime::Sim(slot, _) => slot.borrow().is_some(),
        }
    }

    /// An agent of this runtime that is ready for work.
    pub fn agent(&self, flags: &[&str]) -> Agent<'_> {
        let mut agent = self.agent_now(flags);
        agent.wait_until_ready();
        agent
    }

    /// An agent that may not be ready.
    pub fn agent_now(&self, flags: &[&str]) -> Agent<'_> {
        Agent::start(self, "agent", self.node.clone(), flags, None)
    }

    /// An agent that ends at a failpoint, as `kill -9` would end it; [`Agent::again`] brings it back without.
    pub fn agent_to_die(&self, flags: &[&str], die_at: &str) -> Agent<'_> {
        let mut agent = Agent::start(self, "agent", self.node.clone(), flags, Some(die_at));
        agent.wait_until_ready();
        agent
    }

    /// Another agent of this runtime, ready for work, with a node of its own.
    pub fn agent_named(&self, name: &str, flags: &[&str]) -> Agent<'_> {
        let mut agent = Agent::start(self, name, format!("{}-{name}", self.node), flags, None);
        agent.wait_until_ready();
        agent
    }

    /// A workload of this place that runs a command.
    pub fn workload(&self, id: &str, command: &[&str]) -> Value {
        json!({"id": id, "image": IMAGE, "runtime_class": self.class, "memory_mb": 64, "cpu_millicores": 200, "command": command})
    }

    /// A command that ends with 143 when it is asked politely, once it said that it is ready.
    pub fn polite(&self) -> Vec<&'static str> {
        match self.runtime {
            Runtime::Sim(..) => vec!["sh", "-c", "echo ready; sleep 1000"],
            Runtime::Lab(_) => vec!["sh", "-c", "trap 'exit 143' TERM; echo ready; while true; do sleep 0.05; done"],
        }
    }

    /// A command that only a kill ends, once it said that it is ready.
    pub fn stubborn(&self) -> [&'static str; 3] {
        ["sh", "-c", "trap '' TERM; echo ready; sleep 1000"]
    }
}

/// A node's name that no other test has, and that begins no other.
fn node_name() -> String {
    format!("n-{}-x", unique())
}

fn of_node(node: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(LABEL_NODE.to_owned(), node.to_owned())])
}

/// `base` with the fields of `more`.
pub fn with(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}

/// A deadline for one call.
pub fn soon() -> Deadline {
    Deadline::within_ms(SOON_MS, "test")
}

impl Drop for Place {
    fn drop(&mut self) {
        if thread::panicking() {
            // What a failed test made must not stay in a lab that others use.
            if self.lab().is_some() {
                self.remove_all();
            }
            return;
        }
        if let Runtime::Sim(slot, _) = &self.runtime {
            let mut slot = slot.borrow_mut();
            let Some(daemon) = slot.as_mut() else { return };
            let all = self.cri().list_pod_sandbox(PodSandboxFilter::default(), soon()).expect("a list");
            assert_eq!(all, [], "sandboxes left at the simulator");
            let all = self.cri().list_containers(ContainerFilter::default(), soon()).expect("a list");
            assert_eq!(all, [], "containers left at the simulator");
            until("the simulator's connections end", || daemon.threads().iter().filter(|name| name.starts_with("cri-")).count() <= 2);
            assert_eq!(daemon.stop(), Some(0), "the simulator's exit code");
            let log = fs::read_to_string(self.dir.join("sim.log")).unwrap_or_default();
            assert!(!log.contains("the faults from before stay"), "a bad fault: {log}");
            assert!(!self.endpoint.exists(), "the simulator's socket is left");
        } else {
            let mut all = self.cri().list_pod_sandbox(PodSandboxFilter::default(), soon()).expect("a list");
            all.retain(|sandbox| self.is_ours(&sandbox.labels));
            assert_eq!(all, [], "sandboxes left at the runtime");
            let mut all = self.cri().list_containers(ContainerFilter::default(), soon()).expect("a list");
            all.retain(|container| self.is_ours(&container.labels));
            assert_eq!(all, [], "containers left at the runtime");
        }
    }
}
