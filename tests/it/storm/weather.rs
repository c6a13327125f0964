//! The weather: daemons are killed, paused and stopped, runtimes fail in every way the simulator knows, sandboxes vanish.
//!
//! What is broken is mended after a while, and while it is broken other things break. One thread has all daemons, and does it all.

use kakuri::cri::runtime::{LABEL_NODE, LABEL_WORKLOAD};

use super::Storm;
use super::tally;
use crate::harness::dice::Dice;
use crate::harness::place::soon;
use crate::harness::{Agent, Place, Plane};

/// Everything that runs.
pub struct World<'a> {
    pub places: &'a [Place],
    /// Before the agents, whose connections are its own.
    pub plane: Plane<'a>,
    pub agents: Vec<Agent<'a>>,
    /// What each daemon is, and until when: agents, then the control plane, then the simulators.
    conditions: Vec<Condition>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Down(u64),
    Paused(u64),
    Up,
}

#[derive(Clone, Copy, Debug)]
enum Who {
    Agent(usize),
    Plane,
    Sim(usize),
}

impl<'a> World<'a> {
    pub fn new(places: &'a [Place], agents: Vec<Agent<'a>>, plane: Plane<'a>) -> Self {
        let conditions = vec![Condition::Up; agents.len() + 1 + places.len()];
        Self { places, plane, agents, conditions }
    }

    fn who(&self, at: usize) -> Who {
        match at.checked_sub(self.agents.len()) {
            None => Who::Agent(at),
            Some(0) => Who::Plane,
            Some(n) => Who::Sim(n - 1),
        }
    }

    /// One moment of weather.
    pub fn blow(&mut self, storm: &Storm, dice: &mut Dice) {
        self.mend(storm, storm.now_ms());
        let now = storm.now_ms();
        match dice.below(20) {
            0..=7 => {
                let at = dice.below(self.conditions.len());
                if self.conditions[at] == Condition::Up {
                    self.hit(storm, dice, at, now);
                }
            }
            8..=12 if !storm.on_lab => {
                let place = &self.places[dice.below(self.places.len())];
                let faults: Vec<String> = (0..=dice.below(3)).map(|_| fault(dice)).collect();
                storm.write(&format!("* faults {faults:?}"));
                storm.tally.add(tally::FAULTS);
                place.faults(&faults.iter().map(String::as_str).collect::<Vec<_>>());
            }
            13..=14 if !storm.on_lab => self.places.iter().for_each(|place| place.faults(&[])),
            15 => self.harm(storm, dice),
            _ => {}
        }
        storm.pause(20 + dice.below(250));
    }

    fn hit(&mut self, storm: &Storm, dice: &mut Dice, at: usize, now: u64) {
        let who = self.who(at);
        if let (true, Who::Sim(n)) = (storm.on_lab, who) {
            storm.write("* containerd is killed and started");
            self.places[n].lab().expect("the lab").restart_hard();
            storm.tally.add(tally::RUNTIMES_KILLED);
            return storm.write("* containerd is back");
        }
        let length = [100, 500, 2000, 6500][dice.below(4)];
        let until = now + 20 + dice.below(length) as u64;
        let how = dice.below(6);
        storm.write(&format!("* {who:?} {} until {until}", ["killed", "killed", "killed", "terminated", "paused", "paused"][how]));
        match (how, who) {
            (0..=2, Who::Agent(n)) => self.agents[n].kill(),
            (0..=2, Who::Plane) => {
                self.plane.kill();
                storm.note_plane_killed();
            }
            (0..=3, Who::Sim(n)) => self.places[n].kill_sim(),
            (3, Who::Agent(n)) => self.agents[n].terminate(),
            (3, Who::Plane) => self.plane.terminate(),
            (_, who) => self.signal(who, "STOP"),
        }
        storm.tally.add(match (how, who) {
            (0..=2, Who::Agent(_)) => tally::AGENTS_KILLED,
            (0..=2, Who::Plane) => tally::PLANES_KILLED,
            (0..=3, Who::Sim(_)) => tally::RUNTIMES_KILLED,
            (3, _) => tally::TERMINATED,
            _ => tally::PAUSED,
        });
        self.conditions[at] = if how < 4 { Condition::Down(until) } else { Condition::Paused(until) };
    }

    fn signal(&mut self, who: Who, name: &str) {
        match who {
            Who::Agent(n) => self.agents[n].daemon().signal(name),
            Who::Plane => self.plane.daemon().signal(name),
            Who::Sim(n) => self.places[n].signal_sim(name),
        }
    }

    /// Mends what was broken long enough.
    pub fn mend(&mut self, storm: &Storm, now: u64) {
        // The last first: an agent that starts without its runtime waits for it for a while.
        for at in (0..self.conditions.len()).rev() {
            let who = self.who(at);
            match (self.conditions[at], who) {
                (Condition::Paused(until), who) if until <= now => self.signal(who, "CONT"),
                (Condition::Down(until), Who::Agent(n)) if until <= now => self.agents[n].again_now(),
                (Condition::Down(until), Who::Plane) if until <= now => self.plane.again(),
                (Condition::Down(until), Who::Sim(n)) if until <= now => self.places[n].start_sim(),
                _ => continue,
            }
            storm.write(&format!("* {who:?} is back"));
            self.conditions[at] = Condition::Up;
        }
    }

    /// Removes a sandbox behind the back of its agent.
    fn harm(&self, storm: &Storm, dice: &mut Dice) {
        let place = &self.places[dice.below(self.places.len())];
        let Ok(all) = place.cri().list_pod_sandbox(Default::default(), kakuri::deadline::Deadline::within_ms(500, "harm")) else { return };
        let ours: Vec<_> = all.into_iter().filter(|s| s.labels.contains_key(LABEL_NODE)).collect();
        if ours.is_empty() {
            return;
        }
        let victim = &ours[dice.below(ours.len())];
        let id = victim.labels.get(LABEL_WORKLOAD).cloned().unwrap_or_default();
        storm.write(&format!("* sandbox {} of {id} is removed", victim.id));
        storm.harm(id);
        storm.tally.add(tally::HARMED);
        let _ = place.cri().stop_pod_sandbox(&victim.id, soon()); // The faults are for everybody.
        let _ = place.cri().remove_pod_sandbox(&victim.id, soon());
    }

    /// Fair weather from now on.
    pub fn calm(&mut self, storm: &Storm) {
        if !storm.on_lab {
            self.places.iter().for_each(|place| place.faults(&[]));
        }
        self.mend(storm, u64::MAX);
    }
}

/// Something that goes wrong a few times.
fn fault(dice: &mut Dice) -> String {
    const METHODS: [&str; 20] = [
        "*",
        "ContainerStatus",
        "ContainerStatus",
        "CreateContainer",
        "CreateContainer",
        "ExecSync",
        "GetContainerEvents",
        "ImageStatus",
        "ListContainers",
        "ListPodSandbox",
        "PodSandboxStatus",
        "PullImage",
        "RemovePodSandbox",
        "RunPodSandbox",
        "RunPodSandbox",
        "StartContainer",
        "StartContainer",
        "Status",
        "StopContainer",
        "StopPodSandbox",
    ];
    const ACTIONS: [&str; 20] = [
        "big=100000",
        "compressed",
        "delay=100",
        "delay=3000",
        "delay-after=100",
        "delay-after=3000",
        "drop",
        "drop-after",
        "error=UNAVAILABLE,storm",
        "error=UNKNOWN,storm",
        "error-after=UNAVAILABLE,storm",
        "error-after=UNKNOWN,storm",
        "goaway",
        "hang",
        "hang-after",
        "http=503",
        "malformed",
        "no-status",
        "rst=2",
        "rst=7",
    ];
    let (method, action) = (METHODS[dice.below(METHODS.len())], ACTIONS[dice.below(ACTIONS.len())]);
    format!("{method}:{action}*{}@{}", 1 + dice.below(3), dice.below(3))
}
