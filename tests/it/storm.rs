//! Everything at once: clients start, stop and delete while agents, control plane and runtimes are killed, paused and made to fail.
//! What was acknowledged along the way must stay true, and at the end store, agents and runtimes agree.
//!
//! `KAKURI_STORM_SECONDS` makes it longer, `KAKURI_SEED` brings the same dice back; `scripts/storm` does both. The seed brings back
//! what is asked and what breaks, not the order in which threads do it.
//!
//! The history (`storm.log` beside the daemons' logs) has a line for each request and each change of the weather.

mod client;
mod model;
mod weather;
mod witness;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kakuri::cri::proto::{ContainerState, PodSandboxConfig, PodSandboxMetadata, PodSandboxState};
use kakuri::cri::runtime::{LABEL_NODE, LABEL_WORKLOAD};
use kakuri::deadline::Stopwatch;
use kakuri::wire::agent::Object;
use kakuri::workload::State;
use serde_json::Value;

use crate::harness::dice::Dice;
use crate::harness::place::{Lab, soon};
use crate::harness::{Agent, Place, Plane, within};
use client::{Client, Presence, Slot};
use model::is_restarting;
use weather::World;

/// How long all may take to agree once the weather is fair. The longest pause anybody makes between two attempts is 30 s.
const CALM_MS: u64 = 150_000;
/// Progress is said this often.
const PROGRESS_MS: u64 = 10_000;

/// What all threads of a storm share.
pub struct Storm {
    is_over: AtomicBool,
    operations: AtomicUsize,
    violation: Mutex<Option<String>>,
    harmed: Mutex<BTreeSet<String>>,
    plane_killed_ms: AtomicU64,
    history: Mutex<BufWriter<File>>,
    clock: Stopwatch,
    /// The runtime is a real one, which takes no faults and has a life of its own.
    on_lab: bool,
}

impl Storm {
    fn goes_on(&self) -> bool {
        !self.is_over.load(Ordering::SeqCst)
    }

    fn now_ms(&self) -> u64 {
        self.clock.elapsed_ms()
    }

    /// When the control plane was last killed.
    fn plane_killed_ms(&self) -> u64 {
        self.plane_killed_ms.load(Ordering::SeqCst)
    }

    fn note_plane_killed(&self) {
        self.plane_killed_ms.store(self.now_ms(), Ordering::SeqCst);
    }

    fn count(&self) {
        self.operations.fetch_add(1, Ordering::Relaxed);
    }

    fn pause(&self, ms: usize) {
        if self.goes_on() {
            thread::sleep(Duration::from_millis(ms as u64));
        }
    }

    fn write(&self, text: &str) {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(history, "{:>8} {text}", self.now_ms()); // A full disk shows elsewhere.
    }

    /// The first violation ends the storm.
    fn violated(&self, rule: &str) {
        self.write(&format!("! {rule}"));
        let mut violation = self.violation.lock().unwrap_or_else(PoisonError::into_inner);
        violation.get_or_insert_with(|| format!("at {} ms: {rule}", self.now_ms()));
        self.is_over.store(true, Ordering::SeqCst);
    }

    fn harm(&self, id: String) {
        self.harmed.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
    }

    fn is_harmed(&self, id: &str) -> bool {
        self.harmed.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    /// Fails the test with the first violation, if there is one.
    fn check(&self) {
        let violation = self.violation.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = self.history.lock().unwrap_or_else(PoisonError::into_inner).flush(); // As above.
        if let Some(rule) = violation {
            println!("storm: violation {rule}");
            panic!("{rule}");
        }
    }
}

#[test]
fn what_was_acknowledged_stays_true_and_at_the_end_all_agree() {
    let mut dice = Dice::new();
    // One node with a runtime of its own, and one or two that share one.
    let places = [Place::sim(&["--persist"]), Place::sim(&["--persist", "--no-events"])];
    let foreign: Vec<String> = places.iter().map(foreign_sandbox).collect();
    let mut agents = vec![agent(&places[0], "a"), agent(&places[1], "b")];
    if dice.below(2) == 0 {
        agents.push(agent(&places[1], "c"));
    }
    brave(&places, agents, &mut dice, seconds(5), (5, 2));
    for (place, id) in places.iter().zip(foreign) {
        let is_there = place.cri().pod_sandbox_status(&id, soon()).is_ok_and(|s| s.state() == PodSandboxState::SandboxReady);
        assert!(is_there, "storm: violation: the sandbox of somebody else was touched");
        place.cri().stop_pod_sandbox(&id, soon()).expect("stopped");
        place.cri().remove_pod_sandbox(&id, soon()).expect("removed");
    }
}

mod lab {
    use super::*;

    #[test]
    fn what_was_acknowledged_stays_true_on_a_real_runtime() {
        let _alone = Lab::alone();
        Place::with_lab_unguarded("native", |place| {
            if place.lab().is_none_or(|lab| lab.dir.is_none()) {
                return println!("SKIPPED the storm on the lab: set KAKURI_LAB_DIR=DIR of scripts/lab");
            }
            let agents = vec![agent(place, "a"), agent(place, "b")];
            brave(std::slice::from_ref(place), agents, &mut Dice::new(), seconds(40), (3, 1));
        });
    }
}

fn seconds(default: u64) -> u64 {
    std::env::var("KAKURI_STORM_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A storm over these runtimes and agents, with so many clients of HTTP and of the line protocol, and the calm after it.
fn brave<'a>(places: &'a [Place], agents: Vec<Agent<'a>>, dice: &mut Dice, seconds: u64, clients: (usize, usize)) {
    let plane = Plane::start(&places[0], &agents.iter().collect::<Vec<_>>(), &[]);
    let storm = Storm {
        is_over: AtomicBool::new(false),
        operations: AtomicUsize::new(0),
        violation: Mutex::default(),
        harmed: Mutex::default(),
        plane_killed_ms: AtomicU64::new(0),
        history: Mutex::new(BufWriter::new(File::create(places[0].dir.join("storm.log")).expect("a directory of ours"))),
        clock: Stopwatch::start(),
        on_lab: places[0].lab().is_some(),
    };
    println!("storm: {seconds} s, {} nodes", agents.len());
    let mut world = World::new(places, agents, plane);
    let (slots, mut seen) = rage(&storm, &mut world, dice, seconds, clients);
    storm.check();
    world.calm(&storm);
    settle(&storm, &world, &slots, &mut seen);
    for name in ["a", "b", "c", "plane", "sim"] {
        for place in places {
            let log = std::fs::read_to_string(place.dir.join(&format!("{name}.log"))).unwrap_or_default();
            let bad = log.lines().find(|line| line.contains("panicked") || line.contains("may not become"));
            assert_eq!(bad, None, "storm: violation in {name}.log");
        }
    }
    drop(world);
    let operations = storm.operations.load(Ordering::Relaxed);
    println!("storm: {operations} operations, 0 violations");
}

fn agent<'a>(place: &'a Place, name: &str) -> Agent<'a> {
    let mut agent = place.agent_named(name, &["--label", &format!("name={name}"), "--relist-ms", "500"]);
    agent.wait_until_ready();
    agent
}

/// A sandbox that is nobody's business.
fn foreign_sandbox(place: &Place) -> String {
    let metadata = PodSandboxMetadata { name: "foreign".into(), uid: "foreign".into(), namespace: "others".into(), attempt: 0 };
    let labels = [("io.kubernetes.pod.name".to_owned(), "x".to_owned())].into();
    let config = PodSandboxConfig { metadata: Some(metadata), labels, ..Default::default() };
    place.cri().run_pod_sandbox(&config, "runc", soon()).expect("a sandbox")
}

/// The storm itself; what clients then know, and what was seen of the runtimes.
fn rage(
    storm: &Storm,
    world: &mut World<'_>,
    dice: &mut Dice,
    seconds: u64,
    (http_clients, line_clients): (usize, usize),
) -> (Vec<Slot>, Vec<witness::Seen>) {
    let nodes: Vec<String> = ["a", "b", "c"][..world.agents.len()].iter().map(|name| (*name).to_owned()).collect();
    thread::scope(|scope| {
        let mut clients = Vec::new();
        for i in 0..http_clients {
            clients.push(Client::http(storm, format!("h{i}"), dice.fork(), world.plane.address, nodes.clone()));
        }
        for i in 0..line_clients {
            let agent = &world.agents[i % world.agents.len()];
            clients.push(Client::line(storm, format!("l{i}"), dice.fork(), agent.address.clone()));
        }
        let clients: Vec<_> = clients.into_iter().map(|client| scope.spawn(move || client.run())).collect();
        let endpoints: Vec<_> = world.places.iter().map(|place| place.endpoint().to_owned()).collect();
        let witnesses: Vec<_> = endpoints.into_iter().map(|path| scope.spawn(move || witness::watch(storm, &path))).collect();
        // Should the weather itself break, the others must still be let go.
        let weather = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut progress = PROGRESS_MS;
            while storm.goes_on() && storm.now_ms() < seconds * 1000 {
                world.blow(storm, dice);
                if storm.now_ms() >= progress {
                    println!("storm: {} s, {} operations", progress / 1000, storm.operations.load(Ordering::Relaxed));
                    progress += PROGRESS_MS;
                }
            }
            world.calm(storm);
        }));
        storm.is_over.store(true, Ordering::SeqCst);
        if let Err(panic) = weather {
            storm.violated("the weather broke");
            std::panic::resume_unwind(panic);
        }
        let join = |panic| -> ! { std::panic::resume_unwind(panic) };
        let slots = clients.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|panic| join(panic))).collect();
        (slots, witnesses.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| join(panic))).collect())
    })
}

/// The weather is fair: all must agree within a bound, everything acknowledged must be accounted for, and when all is deleted nothing
/// may be left.
fn settle(storm: &Storm, world: &World<'_>, slots: &[Slot], seen: &mut [witness::Seen]) {
    let mut problem = String::new();
    let agreed = within(CALM_MS, || {
        let view = View::of(world)?;
        problem = view.disagreement(storm, slots)?;
        problem.is_empty().then_some(())
    });
    storm.check();
    assert!(agreed.is_some(), "storm: violation: no agreement within {CALM_MS} ms of fair weather: {problem}");
    for (seen, place) in seen.iter_mut().zip(world.places) {
        seen.look(storm, place.endpoint());
        seen.read_calls(&place.calls());
        println!("storm: a witness looked {} times and saw {} workloads", seen.looks, seen.ran.len());
    }
    storm.check();
    for slot in slots {
        let ran: BTreeSet<&String> = seen.iter().filter_map(|s| s.ran.get(&slot.id)).flat_map(|uids| uids.values().flatten()).collect();
        assert!(
            ran.len() <= slot.lives || is_restarting(&slot.id),
            "storm: violation: {} was accepted {} times and ran as {ran:?}",
            slot.id,
            slot.lives
        );
    }
    remove_all(world);
}

fn remove_all(world: &World<'_>) {
    let mut left = String::new();
    let gone = within(CALM_MS, || {
        let view = View::of(world)?;
        view.stored.keys().for_each(|id| drop(world.plane.ask("DELETE", &format!("/workloads/{id}"), None)));
        for (agent, known) in world.agents.iter().zip(&view.known) {
            for id in known.keys().filter(|id| id.starts_with('l')) {
                agent.ask(&serde_json::json!({"type": "DeleteWorkload", "id": id, "wait_ms": 0}));
            }
        }
        left = view.left();
        left.is_empty().then_some(())
    });
    assert!(gone.is_some(), "storm: violation: everything was deleted, and this is left: {left}");
}

/// The three views that must be one.
struct View {
    /// The agents' nodes.
    nodes: Vec<String>,
    /// What the control plane says.
    stored: BTreeMap<String, Value>,
    /// What each agent says.
    known: Vec<BTreeMap<String, Object>>,
    /// Sandboxes of each agent's node: workload, sandbox, ready.
    sandboxes: Vec<Vec<(String, String, bool)>>,
    /// Containers of each agent's node: workload, container, state.
    containers: Vec<Vec<(String, String, ContainerState)>>,
}

impl View {
    fn of(world: &World<'_>) -> Option<Self> {
        let mut stored = BTreeMap::new();
        let mut after = String::new();
        loop {
            let page = world.plane.get(&format!("/workloads?limit=500{after}")).json();
            for item in page["items"].as_array()? {
                stored.insert(item["id"].as_str()?.to_owned(), item.clone());
            }
            match page["continue"].as_str() {
                Some(token) => after = format!("&continue={token}"),
                None => break,
            }
        }
        let id_of = |object: &Object| object.spec["id"].as_str().unwrap_or_default().to_owned();
        let list = |agent: &Agent<'_>| Some(agent.try_list().ok()?.into_iter().map(|o| (id_of(&o), o)).collect());
        let known = world.agents.iter().map(list).collect::<Option<_>>()?;
        let of = |labels: &BTreeMap<String, String>, name: &str| labels.get(name).cloned().unwrap_or_default();
        let (mut sandboxes, mut containers) = (Vec::new(), Vec::new());
        for agent in &world.agents {
            let cri = world.places.iter().find(|p| agent.node.starts_with(&p.node))?.cri();
            let all = cri.list_pod_sandbox(Default::default(), soon()).ok()?;
            let mine = all.into_iter().filter(|s| of(&s.labels, LABEL_NODE) == agent.node);
            sandboxes
                .push(mine.map(|s| (of(&s.labels, LABEL_WORKLOAD), s.id.clone(), s.state() == PodSandboxState::SandboxReady)).collect());
            let all = cri.list_containers(Default::default(), soon()).ok()?;
            let mine = all.into_iter().filter(|c| of(&c.labels, LABEL_NODE) == agent.node);
            containers.push(mine.map(|c| (of(&c.labels, LABEL_WORKLOAD), c.id.clone(), c.state())).collect());
        }
        let nodes = world.agents.iter().map(|agent| agent.node.clone()).collect();
        Some(Self { nodes, stored, known, sandboxes, containers })
    }

    /// What does not fit together; empty when all does.
    fn disagreement(&self, storm: &Storm, slots: &[Slot]) -> Option<String> {
        for slot in slots.iter().filter(|slot| slot.id.starts_with('h')) {
            let is_there = self.stored.contains_key(&slot.id);
            match slot.presence {
                Presence::Present if !is_there => return Some(format!("{} was accepted and is not in the store", slot.id)),
                Presence::Leaving { is_accepted: true } | Presence::Absent if is_there && !slot.is_loose() => {
                    return Some(format!("{} was deleted and is in the store: {}", slot.id, self.stored[&slot.id]));
                }
                _ => {}
            }
        }
        for (id, item) in &self.stored {
            let state = item["state"].as_str().and_then(State::parse)?;
            let node = item["status"]["node"].as_str()?;
            let Some(at) = self.nodes.iter().position(|n| n == node) else { return Some(format!("{id} is on {node}, which is none")) };
            match self.known[at].get(id) {
                // It may be on the way from one run to the next for ever.
                Some(_) if is_restarting(id) => {}
                _ if state == State::Pending => return Some(format!("{id} is still pending: {item}")),
                _ if item["status"]["phase"] == "Stopping" => return Some(format!("{id} is still stopping: {item}")),
                Some(object) if object.state != state || object.status.exit_code.map(i64::from) != item["status"]["exit_code"].as_i64() => {
                    return Some(format!("{id} in the store: {item}; at its agent: {object:?}"));
                }
                Some(_) => {}
                // The control plane says of what its node refused for good that it failed.
                None if state.is_terminal() && item["status"]["container_id"].is_null() => {}
                None => return Some(format!("{id} is in the store and not at its agent: {item}")),
            }
        }
        for (at, known) in self.known.iter().enumerate() {
            for (id, object) in known {
                if id.starts_with('h') && !self.stored.contains_key(id) {
                    return Some(format!("{id} is at an agent and not in the store: {object:?}"));
                }
                let node = self.stored.get(id).and_then(|item| item["status"]["node"].as_str());
                if node.is_some_and(|node| self.nodes.iter().position(|n| n == node) != Some(at)) {
                    return Some(format!("{id} is at an agent that is not its own: {object:?}"));
                }
                if let Some(problem) = self.differs(at, id, object) {
                    return Some(problem);
                }
            }
            let unwanted = self.sandboxes[at].iter().map(|(id, sandbox, _)| (id, sandbox)).find(|(id, _)| !known.contains_key(*id));
            if let Some((id, sandbox)) = unwanted {
                return Some(format!("sandbox {sandbox} of {id} is wanted by nobody"));
            }
        }
        storm.write("all agree");
        Some(String::new())
    }

    /// What an agent says of a workload against what its runtime has.
    fn differs(&self, at: usize, id: &str, object: &Object) -> Option<String> {
        let sandboxes: Vec<_> = self.sandboxes[at].iter().filter(|(of, ..)| of == id).collect();
        let containers: Vec<_> = self.containers[at].iter().filter(|(of, ..)| of == id).collect();
        if is_restarting(id) {
            let running = containers.iter().filter(|(.., state)| *state == ContainerState::ContainerRunning).count();
            return (running > 1).then(|| format!("{id} runs {running} times: {containers:?}"));
        }
        let fits = match object.state {
            State::Pending => false,
            State::Running => {
                let sandbox = object.status.sandbox_id.as_deref();
                let container = object.status.container_id.as_deref();
                matches!(sandboxes.as_slice(), [(_, s, true)] if sandbox == Some(s))
                    && matches!(containers.as_slice(), [(_, c, ContainerState::ContainerRunning)] if container == Some(c))
            }
            State::Succeeded | State::Failed => {
                sandboxes.len() <= 1
                    && sandboxes.iter().all(|(.., is_ready)| !is_ready)
                    && containers.iter().all(|(.., state)| *state == ContainerState::ContainerExited)
            }
        };
        (!fits).then(|| format!("{id} at its agent: {object:?}; at the runtime: {sandboxes:?} {containers:?}"))
    }

    /// Whatever is left anywhere.
    fn left(&self) -> String {
        let stored: Vec<_> = self.stored.keys().collect();
        let known: Vec<_> = self.known.iter().flat_map(BTreeMap::keys).collect();
        let sandboxes: Vec<_> = self.sandboxes.iter().flatten().collect();
        if stored.is_empty() && known.is_empty() && sandboxes.is_empty() {
            return String::new();
        }
        format!("store {stored:?}, agents {known:?}, runtimes {sandboxes:?}")
    }
}
