//! What happened in a storm, and how much of it there must be: a storm in which little happens proves little.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Acceptances that were acknowledged.
pub const ACCEPTED: &str = "accepted";
/// Acceptances that were seen to run.
pub const RAN: &str = "ran";
/// Ends of the kind a workload was made for, and that nobody else brought about.
pub const MET: &str = "met their fate";
/// Requests that were refused: nothing was done.
pub const REFUSED: &str = "refused";
/// Requests that were not answered.
pub const UNANSWERED: &str = "unanswered";
/// `kill -9`, of whom.
pub const AGENTS_KILLED: &str = "agents killed";
pub const PLANES_KILLED: &str = "control planes killed";
pub const RUNTIMES_KILLED: &str = "runtimes killed";
/// SIGTERM and SIGSTOP.
pub const TERMINATED: &str = "terminated";
pub const PAUSED: &str = "paused";
/// Faults handed to a simulator.
pub const FAULTS: &str = "faults";
/// Sandboxes removed behind the back of their agent.
pub const HARMED: &str = "sandboxes removed";
/// Events that those who follow were told.
pub const EVENTS: &str = "events";
/// How often they went on from the revision they had.
pub const RESUMED: &str = "resumed";

/// Counts.
#[derive(Debug, Default)]
pub struct Tally(Mutex<BTreeMap<&'static str, usize>>);

impl Tally {
    /// One more.
    pub fn add(&self, what: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default() += 1;
    }

    /// All of it.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// All of it, in words.
pub fn summary(counts: &BTreeMap<&'static str, usize>) -> String {
    counts.iter().map(|(what, count)| format!("{count} {what}")).collect::<Vec<_>>().join(", ")
}

/// For how many seconds much must have happened: one pause or one hanging call may take all of a short storm.
pub fn floor_seconds(seconds: u64) -> usize {
    const PAUSE_S: u64 = 20;
    usize::try_from(seconds.saturating_sub(PAUSE_S)).unwrap_or(usize::MAX)
}

/// What happened less often than a storm of so many seconds wants; about a tenth of what an idle machine makes of it.
pub fn missing(counts: &BTreeMap<&'static str, usize>, seconds: u64, on_lab: bool) -> Vec<String> {
    let seconds = floor_seconds(seconds);
    // A real runtime takes a second for what the simulator does in a millisecond, and is away as long when it is killed.
    let slowness = if on_lab { 4 } else { 1 };
    let kills = usize::from(seconds >= 40);
    let floors = [
        (ACCEPTED, seconds / 2 / slowness),
        (RAN, seconds / 4 / slowness),
        (MET, seconds / 8 / slowness),
        (EVENTS, seconds / slowness),
        (RESUMED, kills),
        (AGENTS_KILLED, kills),
        (PLANES_KILLED, kills),
        (RUNTIMES_KILLED, kills),
    ];
    let is_few = |(what, least): &(&'static str, usize)| counts.get(what).copied().unwrap_or_default() < *least;
    floors.into_iter().filter(is_few).map(|(what, least)| format!("{least} {what}")).collect()
}

mod tests {
    use super::*;

    #[test]
    fn a_storm_in_which_little_happened_is_none() {
        let tally = Tally::default();
        assert_eq!(missing(&tally.counts(), 21, false), ["1 events"]);
        assert_eq!(missing(&tally.counts(), 60, true).len(), 8);
        (0..100)
            .for_each(|_| [ACCEPTED, RAN, MET, EVENTS, RESUMED, AGENTS_KILLED, RUNTIMES_KILLED].iter().for_each(|what| tally.add(what)));
        assert_eq!(missing(&tally.counts(), 60, false), ["1 control planes killed"]);
        assert_eq!(missing(&tally.counts(), 30, false), [""; 0]);
        assert!(summary(&tally.counts()).starts_with("100 accepted, 100 agents killed, "));
    }
}
