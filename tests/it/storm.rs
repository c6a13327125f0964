//! Everything at once: clients start, stop and delete while agents, control plane and runtimes are killed, paused and made to fail.
//! What was acknowledged along the way must stay true, and at the end store, agents and runtimes agree.
//!
//! `KAKURI_STORM_SECONDS` makes it longer, `KAKURI_SEED` brings the same dice back; `scripts/storm` does both. The seed brings back
//! what is asked and what breaks, not the order in which threads do it.
//!
//! The history (`storm.log` beside the daemons' logs) has a line for each request and each change of the weather.

mod client;
mod follower;
mod model;
mod tally;
mod view;
mod weather;
mod witness;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kakuri::cri::proto::{PodSandboxConfig, PodSandboxMetadata, PodSandboxState};
use kakuri::deadline::Stopwatch;

use crate::harness::dice::Dice;
use crate::harness::place::{Lab, soon};
use crate::harness::{Agent, Place, Plane, within};
use client::{Client, Slot};
use tally::Tally;
use view::View;
use weather::World;

/// How long all may take to agree once the weather is fair. The longest pause anybody makes between two attempts is 30 s.
const CALM_MS: u64 = 150_000;
/// Progress is said this often.
const PROGRESS_MS: u64 = 10_000;

/// What all threads of a storm share.
pub struct Storm {
    is_over: AtomicBool,
    operations: AtomicUsize,
    tally: Tally,
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

    /// A request was answered, and not refused.
    fn count(&self) {
        self.operations.fetch_add(1, Ordering::Relaxed);
    }

    /// The dice say how long a client or the weather does nothing: it waits for nothing.
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
    let operations = brave(&places, agents, &mut dice, seconds(5), (5, 3));
    for (place, id) in places.iter().zip(foreign) {
        let is_there = place.cri().pod_sandbox_status(&id, soon()).is_ok_and(|s| s.state() == PodSandboxState::SandboxReady);
        assert!(is_there, "storm: violation: the sandbox of somebody else was touched");
        place.cri().stop_pod_sandbox(&id, soon()).expect("stopped");
        place.cri().remove_pod_sandbox(&id, soon()).expect("removed");
    }
    println!("storm: {operations} operations, 0 violations");
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
            let operations = brave(std::slice::from_ref(place), agents, &mut Dice::new(), seconds(40), (3, 1));
            println!("storm: {operations} operations, 0 violations");
        });
    }
}

fn seconds(default: u64) -> u64 {
    // A shorter storm than the one that was asked for would prove less than it says.
    let given = |text: String| text.parse().unwrap_or_else(|error| panic!("KAKURI_STORM_SECONDS={text:?}: {error}"));
    std::env::var("KAKURI_STORM_SECONDS").map_or(default, given)
}

/// A storm over these runtimes and agents, with so many clients of HTTP and of the line protocol, and the calm after it; how many
/// requests were answered.
fn brave<'a>(places: &'a [Place], agents: Vec<Agent<'a>>, dice: &mut Dice, seconds: u64, clients: (usize, usize)) -> usize {
    let plane = Plane::start(&places[0], &agents.iter().collect::<Vec<_>>(), &[]);
    let storm = Storm {
        is_over: AtomicBool::new(false),
        operations: AtomicUsize::new(0),
        tally: Tally::default(),
        violation: Mutex::default(),
        harmed: Mutex::default(),
        plane_killed_ms: AtomicU64::new(0),
        history: Mutex::new(BufWriter::new(File::create(places[0].dir.join("storm.log")).expect("a directory of ours"))),
        clock: Stopwatch::start(),
        on_lab: places[0].lab().is_some(),
    };
    println!("storm: {seconds} s, {} nodes", agents.len());
    let mut world = World::new(places, agents, plane);
    let (mut slots, mut seen) = rage(&storm, &mut world, dice, seconds, clients);
    storm.check();
    world.calm(&storm);
    settle(&storm, &world, &mut slots, &mut seen);
    let counts = storm.tally.counts();
    let looks: Vec<String> = seen.iter().map(|seen| seen.looks.to_string()).collect();
    println!("storm: counted {}; {} looks", tally::summary(&counts), looks.join(" and "));
    let missing = tally::missing(&counts, seconds, storm.on_lab);
    assert!(missing.is_empty(), "storm: violation: too little happened to prove anything: at least {}", missing.join(", "));
    // A look takes some ten milliseconds of an idle machine.
    let least = tally::floor_seconds(seconds) / 2;
    assert!(seen.iter().all(|seen| seen.looks >= least), "storm: violation: nobody looked: {looks:?} times, at least {least}");
    for name in ["a", "b", "c", "plane", "sim"] {
        for place in places {
            let log = std::fs::read_to_string(place.dir.join(&format!("{name}.log"))).unwrap_or_default();
            let bad = log.lines().find(|line| line.contains("panicked") || line.contains("may not become"));
            assert_eq!(bad, None, "storm: violation in {name}.log");
        }
    }
    drop(world);
    storm.operations.load(Ordering::Relaxed)
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
            let home = i % world.agents.len();
            clients.push(Client::line(storm, format!("l{i}"), dice.fork(), home, world.agents[home].address.clone()));
        }
        let clients: Vec<_> = clients.into_iter().map(|client| scope.spawn(move || client.run())).collect();
        let endpoints: Vec<_> = world.places.iter().map(|place| place.endpoint().to_owned()).collect();
        let witnesses: Vec<_> = endpoints.into_iter().map(|path| scope.spawn(move || witness::watch(storm, &path))).collect();
        let plane = world.plane.address;
        scope.spawn(move || follower::follow_plane(storm, plane));
        for address in world.agents.iter().map(Agent::tcp) {
            scope.spawn(move || follower::follow_agent(storm, address));
        }
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
fn settle(storm: &Storm, world: &World<'_>, slots: &mut [Slot], seen: &mut [witness::Seen]) {
    let began_ms = storm.now_ms();
    let mut problem = "somebody does not answer".to_owned();
    let mut restarts = None;
    let agreed = within(CALM_MS, || {
        let view = View::of(world)?;
        match view.check(slots, restarts.get_or_insert_with(|| view.restarts())) {
            Ok(()) => Some(view),
            Err(found) => {
                if problem != found {
                    storm.write(&format!("no agreement: {found}"));
                }
                problem = found;
                None
            }
        }
    });
    storm.check();
    let view = agreed.unwrap_or_else(|| panic!("storm: violation: no agreement within {CALM_MS} ms of fair weather: {problem}"));
    println!("storm: all agree after {} ms", storm.now_ms().saturating_sub(began_ms));
    storm.write("all agree");
    for slot in slots.iter_mut() {
        let Some((state, status)) = view.said(slot).cloned() else { continue };
        if let Err(rule) = slot.close(storm, state, status) {
            storm.violated(&format!("at the end, {}: {rule}", slot.id));
        }
    }
    for (seen, place) in seen.iter_mut().zip(world.places) {
        seen.look(storm, place.endpoint());
        if !storm.on_lab {
            seen.read_calls(&place.calls());
            assert!(seen.starts > 0, "storm: violation: no start is in the log of calls: its words have changed");
        }
    }
    storm.check();
    if let Err(rule) = witness::judge(seen, slots) {
        storm.violated(&rule);
    }
    storm.check();
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
