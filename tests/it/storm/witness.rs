//! The witness: looks at the runtime itself, past every agent, all the time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::thread;
use std::time::Duration;

use kakuri::cri::client::Client;
use kakuri::cri::proto::{Container, ContainerState, ContainerStatus};
use kakuri::cri::runtime::{LABEL_UID, LABEL_WORKLOAD};
use kakuri::deadline::Deadline;

use super::Storm;
use super::client::Slot;
use super::model::is_restarting;

/// What one runtime was seen to run.
#[derive(Debug, Default)]
pub struct Seen {
    /// Containers that ran, by workload and acceptance at the agent.
    pub ran: BTreeMap<String, BTreeMap<String, BTreeSet<String>>>,
    /// From when until when, at least, a container of a workload ran: what runs in two lists ran all the time between them.
    spans: BTreeMap<String, BTreeMap<String, (u64, u64)>>,
    /// Containers that ended, and whether they ever ran.
    judged: BTreeMap<String, bool>,
    pub looks: usize,
    /// Starts in the log of calls.
    pub starts: usize,
}

/// Looks until the storm is over, and once more.
pub fn watch(storm: &Storm, endpoint: &Path) -> Seen {
    let mut seen = Seen::default();
    while storm.goes_on() {
        seen.look(storm, endpoint);
        // It samples; the log of calls has what comes and goes between two looks.
        thread::sleep(Duration::from_millis(20));
    }
    seen
}

impl Seen {
    /// Looks once. A runtime that does not answer shows nothing.
    pub fn look(&mut self, storm: &Storm, endpoint: &Path) {
        let deadline = Deadline::within_ms(2000, "witness");
        let asked_ms = storm.now_ms();
        let client = Client::new(endpoint.to_owned());
        let Ok(mut containers) = client.list_containers(Default::default(), deadline) else { return };
        let answered_ms = storm.now_ms();
        containers.retain(|container| self.has_run(container, &client));
        if let Err(rule) = self.note(&containers, asked_ms, answered_ms) {
            storm.violated(&rule);
        }
    }

    /// Whether a container of the list runs, or ran. What ended is asked how, once.
    fn has_run(&mut self, container: &Container, client: &Client) -> bool {
        if !matches!(container.state(), ContainerState::ContainerExited | ContainerState::ContainerUnknown) {
            return container.state() == ContainerState::ContainerRunning;
        }
        if let Some(known) = self.judged.get(&container.id) {
            return *known;
        }
        // One that was removed since, or whose runtime is gone, has shown nothing; it may in the next list.
        let Ok(status) = client.container_status(&container.id, Deadline::within_ms(2000, "witness")) else { return false };
        if status.state() == ContainerState::ContainerExited {
            self.judged.insert(container.id.clone(), ever_ran(&status));
        }
        ever_ran(&status)
    }

    /// Notes a list that was made at some moment between these two.
    ///
    /// # Errors
    /// What no moment may show.
    pub fn note(&mut self, containers: &[Container], asked_ms: u64, answered_ms: u64) -> Result<(), String> {
        self.looks += 1;
        let mut running: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for container in containers {
            let label = |name: &str| container.labels.get(name).map(String::as_str).unwrap_or_default();
            let (id, uid) = (label(LABEL_WORKLOAD), label(LABEL_UID));
            if id.is_empty() || container.state() == ContainerState::ContainerCreated {
                continue;
            }
            if container.state() == ContainerState::ContainerRunning {
                running.entry(id).or_default().push(&container.id);
                let spans = self.spans.entry(id.to_owned()).or_default();
                spans.entry(container.id.clone()).or_insert((answered_ms, answered_ms)).1 = asked_ms;
            }
            let of_uid = self.ran.entry(id.to_owned()).or_default().entry(uid.to_owned()).or_default();
            of_uid.insert(container.id.clone());
            if of_uid.len() > 1 && !is_restarting(id) {
                return Err(format!("{id}: one acceptance ran as {of_uid:?}"));
            }
        }
        let twice = running.into_iter().find(|(_, containers)| containers.len() > 1);
        twice.map_or(Ok(()), |(id, containers)| Err(format!("{id} runs twice: {containers:?}")))
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
                        self.starts += 1;
                        self.ran.entry(id.clone()).or_default().entry(uid.clone()).or_default().insert(container);
                    }
                }
                _ => {}
            }
        }
    }
}

/// Whether a container that ended, or is unknown, ever ran. A containerd that is killed between making one and writing that down has
/// it as unknown afterwards, and as exited with a code of its own making once its sandbox was stopped. One that ended while its
/// containerd was away may lack the moment of its start, and has an exit code that is its own.
fn ever_ran(status: &ContainerStatus) -> bool {
    let is_made_up = status.exit_code == 255 || ["Unknown", "StartError"].contains(&status.reason.as_str());
    status.started_at > 0 || (status.state() == ContainerState::ContainerExited && !is_made_up)
}

/// What all runtimes ran against what was asked for.
///
/// # Errors
/// What ran too often.
pub fn judge(all: &[Seen], slots: &[Slot]) -> Result<(), String> {
    let spans = |id: &str| all.iter().filter_map(|seen| seen.spans.get(id)).flatten().collect::<Vec<_>>();
    for id in all.iter().flat_map(|seen| seen.spans.keys()) {
        let spans = spans(id);
        for (at, (one, a)) in spans.iter().enumerate() {
            if let Some((other, b)) = spans.iter().skip(at + 1).find(|(_, b)| a.0.max(b.0) < a.1.min(b.1)) {
                return Err(format!("{id} ran twice at a time: {one} in {a:?} ms, {other} in {b:?} ms"));
            }
        }
    }
    let mut ran: BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>> = BTreeMap::new();
    for (id, uids) in all.iter().flat_map(|seen| &seen.ran) {
        for (uid, containers) in uids {
            ran.entry(id).or_default().entry(uid).or_default().extend(containers.iter().map(String::as_str));
        }
    }
    for (id, uids) in ran {
        let Some(slot) = slots.iter().find(|slot| slot.id == id) else { return Err(format!("{id} was asked for by nobody, and ran")) };
        if let Some(containers) = uids.values().find(|containers| containers.len() > slot.runs_max) {
            return Err(format!("{id}: one acceptance may run {} times, and ran as {containers:?}", slot.runs_max));
        }
        if uids.len() > slot.lives {
            return Err(format!("{id} was accepted {} times and ran as {uids:?}", slot.lives));
        }
    }
    Ok(())
}

mod tests {
    use super::*;
    use crate::storm::client::Presence;
    use crate::storm::model::Fate;

    fn container(id: &str, of: &str, uid: &str, state: ContainerState) -> Container {
        let labels = [(LABEL_WORKLOAD.to_owned(), of.to_owned()), (LABEL_UID.to_owned(), uid.to_owned())].into();
        Container { id: id.into(), labels, state: state.into(), ..Default::default() }
    }

    #[test]
    fn the_witness_sees_what_it_is_there_to_see() {
        use ContainerState::{ContainerCreated as Made, ContainerExited as Over, ContainerRunning as Runs};
        let slot = |id: &str, fate| Slot::sample(id, None, Presence::Present, fate);
        let slots = [slot("h0-1", Fate::Forever), slot("h0-2r", Fate::Restarts { code: 7, most: Some(1) })];
        // Each list of each place, and the rule that the whole breaks.
        let check = |stories: &[&[&[Container]]], expect: Option<&str>| {
            let mut all = Vec::new();
            let mut result = Ok(());
            for lists in stories {
                let mut seen = Seen::default();
                for (at, list) in (0u64..).zip(*lists) {
                    result = result.and(seen.note(list, at * 100, at * 100 + 10));
                }
                all.push(seen);
            }
            let result = result.and(judge(&all, &slots));
            match expect {
                None => assert_eq!(result, Ok(()), "{stories:?}"),
                Some(rule) => assert!(result.as_ref().is_err_and(|e| e.contains(rule)), "{rule}: {result:?}"),
            }
        };
        let one = |id: &str, state| container(id, "h0-1", "u", state);
        let again = |id: &str, uid: &str, state| container(id, "h0-2r", uid, state);
        check(&[&[&[one("c", Made)], &[one("c", Runs)], &[one("c", Runs)], &[one("c", Over)], &[]]], None);
        check(&[&[&[one("c", Runs), one("d", Made)]]], None);
        check(&[&[&[one("c", Over), one("d", Runs)]]], Some("one acceptance ran as"));
        check(&[&[&[one("c", Over)]], &[&[one("d", Over)]]], Some("one acceptance may run 1 times"));
        check(&[&[&[one("c", Runs), container("d", "h0-1", "v", Runs)]]], Some("runs twice"));
        check(&[&[&[one("c", Over), container("d", "h0-1", "v", Over)]]], Some("was accepted 1 times"));
        let (here, there) = ([one("c", Runs)], [container("d", "h0-1", "v", Runs)]);
        check(&[&[&here, &here], &[&there, &there]], Some("ran twice at a time"));
        check(&[&[&here, &here, &[], &[]], &[&[], &[], &there, &there]], Some("was accepted 1 times"));
        check(&[&[&[again("c", "u", Over), again("d", "u", Runs)]]], None);
        check(&[&[&[again("c", "u", Runs), again("d", "u", Runs)]]], Some("runs twice"));
        check(&[&[&[again("c", "u", Over), again("d", "u", Over), again("e", "u", Runs)]]], Some("one acceptance may run 2 times"));
        check(&[&[&[container("c", "h9-9", "u", Runs)]]], Some("asked for by nobody"));
    }

    #[test]
    fn what_was_never_started_did_not_run() {
        let check = |state: ContainerState, started_at, exit_code, reason: &str, expect| {
            let status = ContainerStatus { state: state.into(), started_at, exit_code, reason: reason.into(), ..Default::default() };
            assert_eq!(ever_ran(&status), expect, "{status:?}");
        };
        use ContainerState::{ContainerExited as Over, ContainerUnknown as Unknown};
        check(Over, 1, 255, "Error", true);
        check(Over, 1, 255, "Unknown", true);
        check(Over, 0, 7, "Error", true);
        check(Over, 0, 0, "Completed", true);
        check(Over, 0, 255, "Error", false);
        check(Over, 0, 128, "StartError", false);
        check(Over, 0, 255, "Unknown", false);
        check(Unknown, 0, 0, "", false);
        check(Unknown, 1, 0, "", true);
    }

    #[test]
    fn the_log_of_calls_is_read() {
        let calls = [
            "RunPodSandbox OK name=h0-1_kakuri_u_0 handler=runc sandbox=s",
            "CreateContainer OK sandbox=s name=h0-1 container=c",
            "CreateContainer OK sandbox=s name=h0-1 container=d",
            "StartContainer Unknown container=d",
            "StartContainer drop container=c effect=yes",
        ];
        let mut seen = Seen::default();
        seen.read_calls(&calls.map(str::to_owned));
        assert_eq!(seen.starts, 1);
        assert_eq!(seen.ran["h0-1"]["u"], BTreeSet::from(["c".to_owned()]));
        let forever = Slot::sample("h0-1", None, Presence::Present, Fate::Forever);
        assert_eq!(judge(&[seen], &[forever]), Ok(()));
    }
}
