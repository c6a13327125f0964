//! The witness: looks at the runtime itself, past every agent, all the time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::thread;
use std::time::Duration;

use kakuri::cri::client::Client;
use kakuri::cri::proto::ContainerState;
use kakuri::cri::runtime::{LABEL_NODE, LABEL_UID, LABEL_WORKLOAD};
use kakuri::deadline::Deadline;

use super::Storm;
use super::model::is_restarting;

/// What one runtime was seen to run.
#[derive(Debug, Default)]
pub struct Seen {
    /// Containers that ran, by workload and acceptance at the agent.
    pub ran: BTreeMap<String, BTreeMap<String, BTreeSet<String>>>,
    pub looks: usize,
}

/// Looks until the storm is over, and once more.
pub fn watch(storm: &Storm, endpoint: &Path) -> Seen {
    let mut seen = Seen::default();
    while storm.goes_on() {
        seen.look(storm, endpoint);
        thread::sleep(Duration::from_millis(20));
    }
    seen
}

impl Seen {
    /// Looks once. A runtime that does not answer shows nothing.
    pub fn look(&mut self, storm: &Storm, endpoint: &Path) {
        let deadline = Deadline::within_ms(2000, "witness");
        let Ok(containers) = Client::new(endpoint.to_owned()).list_containers(Default::default(), deadline) else { return };
        self.looks += 1;
        let mut running: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
        for container in &containers {
            let label = |name: &str| container.labels.get(name).map(String::as_str).unwrap_or_default();
            let (node, id, uid) = (label(LABEL_NODE), label(LABEL_WORKLOAD), label(LABEL_UID));
            if id.is_empty() || container.state() == ContainerState::ContainerCreated {
                continue;
            }
            if container.state() == ContainerState::ContainerRunning {
                running.entry((node, id)).or_default().push(&container.id);
            }
            let of_uid = self.ran.entry(id.to_owned()).or_default().entry(uid.to_owned()).or_default();
            of_uid.insert(container.id.clone());
            if of_uid.len() > 1 && !is_restarting(id) {
                storm.violated(&format!("{id}: one acceptance ran as {of_uid:?}"));
            }
        }
        for ((node, id), containers) in running.into_iter().filter(|(_, containers)| containers.len() > 1) {
            storm.violated(&format!("{id} runs twice on {node}: {containers:?}"));
        }
    }

    /// Adds what the simulator's log of calls tells: containers that came and went between two looks.
    pub fn read_calls(&mut self, calls: &[String]) {
        let field = |line: &str, key: &str| line.split(' ').find_map(|word| word.strip_prefix(key).map(str::to_owned));
        // Sandbox to (workload, uid), and container to sandbox.
        let (mut sandboxes, mut containers) = (BTreeMap::new(), BTreeMap::new());
        for line in calls {
            match line.split(' ').next() {
                Some("RunPodSandbox") => {
                    let name = field(line, "name=").unwrap_or_default();
                    let parts: Vec<&str> = name.split('_').collect();
                    if let (Some(sandbox), [id, _, uid, _]) = (field(line, "sandbox="), parts.as_slice()) {
                        sandboxes.insert(sandbox, ((*id).to_owned(), (*uid).to_owned()));
                    }
                }
                Some("CreateContainer") => {
                    if let (Some(container), Some(sandbox)) = (field(line, "container="), field(line, "sandbox=")) {
                        containers.insert(container, sandbox);
                    }
                }
                Some("StartContainer") if line.starts_with("StartContainer OK") || line.contains("effect=yes") => {
                    let container = field(line, "container=").unwrap_or_default();
                    if let Some((id, uid)) = containers.get(&container).and_then(|sandbox| sandboxes.get(sandbox)) {
                        self.ran.entry(id.clone()).or_default().entry(uid.clone()).or_default().insert(container);
                    }
                }
                _ => {}
            }
        }
    }
}
