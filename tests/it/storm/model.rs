//! What may be said of a workload, given what was said of it before. Pure.
//!
//! Invariant: whoever breaks a rule here was told so by a daemon: nothing is inferred from an answer that did not come.

use kakuri::deadline::Timestamp;
use kakuri::wire::status::Status;
use kakuri::workload::{Reason, State};
use serde_json::{Value, json};

use crate::harness::dice::Dice;
use crate::harness::place::IMAGE;

/// What a workload does when nobody meddles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Prints a few lines and ends with this code.
    Exits(i32),
    /// Runs until somebody ends it.
    Forever,
    /// Its image is not there.
    NoImage,
    /// Takes too much memory.
    Oom,
    /// Ends with this code, and is started again by policy: so many times, or for ever.
    Restarts { code: i32, most: Option<u32> },
    /// Fails its health checks.
    Sick,
    /// Runs until its time to live is over.
    Ttl { ms: u64 },
}

impl Fate {
    /// Whether it comes to an end, be it that nobody does anything about it.
    pub fn is_mortal(self) -> bool {
        match self {
            Self::Exits(_) | Self::NoImage | Self::Oom | Self::Sick | Self::Ttl { .. } => true,
            Self::Restarts { most, .. } => most.is_some(),
            Self::Forever => false,
        }
    }

    /// How many containers of one acceptance may run, one after the other.
    pub fn runs_max(self) -> usize {
        match self {
            Self::Restarts { most, .. } => most.map_or(usize::MAX, |most| most as usize + 1),
            Self::NoImage => 0,
            Self::Exits(_) | Self::Forever | Self::Oom | Self::Sick | Self::Ttl { .. } => 1,
        }
    }

    /// Whether this is the end it was made for.
    pub fn is_met(self, status: &Status) -> bool {
        let (reason, exit) = (status.reason, status.exit_code);
        match self {
            Self::Exits(0) => (reason, exit) == (Some(Reason::Completed), Some(0)),
            Self::Exits(code) => (reason, exit) == (Some(Reason::Error), Some(code)),
            Self::Forever => false,
            Self::NoImage => reason == Some(Reason::ImageNotFound),
            Self::Oom => (reason, exit) == (Some(Reason::OomKilled), Some(137)),
            Self::Restarts { code, .. } => (reason, exit) == (Some(Reason::Error), Some(code)) && code != 0,
            Self::Sick => reason == Some(Reason::HealthCheckFailed),
            Self::Ttl { .. } => reason == Some(Reason::TtlExpired),
        }
    }
}

/// Lines a workload prints before it ends.
pub const LINES: usize = 4;

/// A workload to ask for, and what should become of it.
#[derive(Clone, Debug)]
pub struct Wish {
    pub spec: Value,
    pub fate: Fate,
}

impl Wish {
    /// Any, for this id, on one of these nodes; `on_lab`: of what a real runtime has.
    pub fn any(dice: &mut Dice, id: &str, nodes: &[String], on_lab: bool) -> Self {
        let lines = |pause: &str| (0..LINES).map(|n| format!("echo line {n}; sleep {pause}; ")).collect::<String>();
        let (fate, command) = match dice.below(14) {
            0..=3 => (Fate::Forever, format!("{}sleep 100000", lines("0.05"))),
            4 | 13 => (Fate::Forever, format!("{}sleep 100000; trap", lines("0.01"))),
            5 => (Fate::Exits(0), lines("0.1")),
            6 => (Fate::Exits(0), lines("0.4")),
            7 => (Fate::Exits(7), format!("{}exit 7", lines("0.1"))),
            8 => (Fate::Exits(0), lines("0.001")),
            9 if !on_lab => (Fate::Oom, format!("{}oom", lines("0.1"))),
            9 | 10 => (Fate::NoImage, "true".to_owned()),
            11 => (Fate::Sick, format!("{}sleep 100000", lines("0.01"))),
            _ => (Fate::Ttl { ms: 200 + dice.below(2000) as u64 }, format!("{}sleep 100000", lines("0.01"))),
        };
        let (fate, command) = match dice.below(2) {
            _ if !is_restarting(id) => (fate, command),
            0 => (Fate::Restarts { code: 0, most: None }, lines("0.05")),
            _ => {
                let most = 1 + u32::try_from(dice.below(4)).expect("below 4");
                (Fate::Restarts { code: 7, most: Some(most) }, format!("{}exit 7", lines("0.05")))
            }
        };
        let image = match (fate, dice.below(6)) {
            (Fate::NoImage, _) => format!("localhost/not-found-{id}:1"),
            (_, 0) if !on_lab => format!("localhost/slow-{}-{id}:1", 50 + dice.below(600)),
            (_, 1) if !on_lab => format!("localhost/image-{id}:1"),
            _ => IMAGE.to_owned(),
        };
        let class = ["native", "native", "gvisor"][dice.below(3)];
        let (grace_ms, mut deadline_ms) = ([0, 100, 1500][dice.below(3)], [3000, 30_000, 120_000][dice.below(3)]);
        if fate == Fate::NoImage && on_lab {
            // No registry answers there, which may pass, so it is tried until the deadline. Nobody learns more by waiting longer.
            deadline_ms = deadline_ms.min(10_000);
        }
        let mut spec = json!({
            "id": id, "image": image, "runtime_class": class, "memory_mb": 64, "command": ["sh", "-c", command],
            "stop_grace_ms": grace_ms, "start_deadline_ms": deadline_ms, "labels": {"from": "storm"},
        });
        match fate {
            Fate::Restarts { most, .. } => {
                spec["restart_policy"] = json!(if most.is_some() { "on-failure" } else { "always" });
                spec["restart_backoff_ms"] = json!(100 + dice.below(400));
                spec["restart_backoff_max_ms"] = json!(1000);
                most.into_iter().for_each(|most| spec["restart_max_attempts"] = json!(most));
            }
            Fate::Sick => spec["health"] = json!({"exec": ["false"], "interval_ms": 100, "timeout_ms": 1000, "failures": 2}),
            // A failure now and then is the weather; it does not come so often in a row.
            Fate::Forever if dice.below(3) == 0 => {
                spec["health"] = json!({"exec": ["true"], "interval_ms": 100, "timeout_ms": 1000, "failures": 1000});
            }
            Fate::Ttl { ms } => spec["ttl_ms"] = json!(ms),
            Fate::Exits(_) | Fate::Forever | Fate::NoImage | Fate::Oom => {}
        }
        if let Some(node) = nodes.get(dice.below(nodes.len() + 1)) {
            spec["node_selector"] = json!({"name": node});
        }
        if dice.below(4) == 0 {
            spec["env"] = json!({"SECRET": "hush-hush"});
        }
        Self { spec, fate }
    }

    /// The same id, asked for in other words.
    pub fn other(&self) -> Value {
        let mut other = self.spec.clone();
        other["labels"] = json!({"from": "somebody-else"});
        other
    }
}

/// Whether the workloads of this id are restarted by policy.
pub fn is_restarting(id: &str) -> bool {
    id.ends_with('r')
}

/// What may have been done to a workload beside starting it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meddling {
    /// A stop or a delete was asked for; whether it was heard is another matter.
    pub is_stopped: bool,
    /// Its sandbox was removed behind the back of its agent.
    pub is_harmed: bool,
    /// The runtime is a real one: killed in the wrong moment, it does not know an exit code.
    pub is_real: bool,
}

/// What was said of one acceptance of a workload, so far.
#[derive(Clone, Debug, Default)]
pub struct Told {
    last: Option<(State, Status)>,
    has_run: bool,
}

impl Told {
    /// Whether this is about an earlier moment of the same acceptance.
    pub fn is_newer_than(&self, status: &Status) -> bool {
        self.last.as_ref().is_some_and(|(_, last)| last.created_at == status.created_at && last.observed_at > status.observed_at)
    }

    /// Whether it was told that it runs, or ran.
    pub fn has_run(&self) -> bool {
        self.has_run
    }

    /// When the acceptance happened that this is about.
    pub fn created_at(&self) -> Option<Timestamp> {
        self.last.as_ref().map(|(_, status)| status.created_at)
    }

    /// The last state that was told.
    pub fn state(&self) -> Option<State> {
        self.last.as_ref().map(|(state, _)| *state)
    }

    /// Notes what is said now.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub fn note(&mut self, fate: Fate, meddling: Meddling, state: State, status: Status) -> Result<(), String> {
        let said = format!("{state} {status:?}");
        let broken = |rule: &str| Err(format!("{rule}: is {said}, was {:?}", self.last));
        let exit = status.exit_code;
        if !state.is_terminal() && exit.is_some() {
            return broken("an exit code of what has not ended");
        }
        if state == State::Succeeded && exit != Some(0) {
            return broken("success with another exit code than 0");
        }
        if state.is_terminal() == status.reason.is_none() && state != State::Pending {
            return broken("a reason that is missing, or too many");
        }
        if fate == Fate::NoImage && (state == State::Running || status.started_at.is_some()) {
            return broken("a run of an image that is not there");
        }
        if matches!(fate, Fate::Restarts { most: Some(most), .. } if status.restarts > most) {
            return broken("more restarts than were asked for");
        }
        if status.oom_killed != (status.reason == Some(Reason::OomKilled)) {
            return broken("oom_killed and the reason disagree");
        }
        if let Some((was, before)) = &self.last {
            let is_again = matches!(fate, Fate::Restarts { .. }) && !was.is_terminal() && status.restarts > before.restarts;
            if was != &state && (*was > state || was.is_terminal()) && !is_again {
                return broken("an illegal transition");
            }
            if status.restarts < before.restarts || (status.restarts > 0 && !matches!(fate, Fate::Restarts { .. })) {
                return broken("restarts that were not, or that nobody wanted");
            }
            if before.created_at != status.created_at {
                return broken("another acceptance than before");
            }
            if before.exit_code.is_some() && before.exit_code != exit {
                return broken("an exit code that changed");
            }
            let ending = |s: &Status| (s.reason, s.exit_code, s.oom_killed, s.finished_at, s.container_id.clone());
            if was.is_terminal() && ending(before) != ending(&status) {
                return broken("an ending that changed");
            }
            let has_moved = before.container_id.is_some() && before.container_id != status.container_id;
            if self.has_run && has_moved && !matches!(fate, Fate::Restarts { .. }) {
                return broken("another container than before");
            }
        }
        if state.is_terminal() {
            if let Err(rule) = judge(fate, meddling, self.has_run, &status) {
                return broken(rule);
            }
        }
        self.has_run |= state == State::Running || status.started_at.is_some();
        self.last = Some((state, status));
        Ok(())
    }
}

/// Whether a workload may have ended so.
fn judge(fate: Fate, meddling: Meddling, has_run: bool, status: &Status) -> Result<(), &'static str> {
    let exit = status.exit_code;
    let has_run = has_run && !matches!(fate, Fate::Restarts { .. });
    let is_killed = || matches!(exit, None | Some(137 | 143));
    let is_untraceable = status.message.as_ref().is_some_and(|message| message.contains("lost track of the container"));
    // The weather: a runtime that fails in the middle of a start.
    let is_failed_start = matches!(
        status.reason,
        Some(
            Reason::CreateFailed
                | Reason::ImagePullFailed
                | Reason::RuntimeUnavailable
                | Reason::StartDeadlineExceeded
                | Reason::StartFailed
                | Reason::HandlerUnavailable
        )
    );
    if let (Fate::Restarts { most, .. }, false) = (fate, meddling.is_stopped) {
        // Only the first start is not tried again by policy; whatever ends a run is, as often as was asked for.
        let never_ran = is_failed_start && status.restarts == 0;
        if !never_ran && most != Some(status.restarts) {
            return Err("an end before the last restart that was asked for");
        }
    }
    if let (Fate::Ttl { ms }, Some(Reason::TtlExpired), Some(started), Some(finished)) =
        (fate, status.reason, status.started_at, status.finished_at)
    {
        // Both moments are cut to a millisecond.
        if finished.as_millis().saturating_add(1) < started.as_millis().saturating_add(ms) {
            return Err("a time to live that was not over");
        }
    }
    match status.reason {
        Some(_) if fate.is_met(status) && !(fate == Fate::NoImage && has_run) => Ok(()),
        Some(_) if is_failed_start && !has_run => Ok(()),
        // A workload that is asked to stop may end by itself just before.
        Some(Reason::Stopped) if meddling.is_stopped => Ok(()),
        Some(Reason::SandboxDied | Reason::Error) if meddling.is_harmed && is_killed() => Ok(()),
        // A containerd that was killed may have lost track of what runs, and then it is stopped.
        Some(Reason::RuntimeUnavailable) if meddling.is_real && is_killed() && is_untraceable => Ok(()),
        // Killed in the middle of a start, it ends what it had begun to run.
        Some(Reason::Error) if meddling.is_real && !has_run && status.started_at.is_none() && matches!(exit, None | Some(137 | 255)) => {
            Ok(())
        }
        Some(Reason::Error) if meddling.is_real && fate != Fate::Forever && matches!(exit, None | Some(137 | 255)) => Ok(()),
        _ => Err("an end that nobody brought about"),
    }
}

/// Whether these are lines of a workload that may have run several times. One that ran more often than there are files kept of it has
/// lost the oldest, and says so first.
///
/// # Errors
/// The line that is none.
pub fn check_each_line(lines: &[String]) -> Result<(), String> {
    let is_none = |line: &&String| line.strip_prefix("line ").and_then(|n| n.parse::<usize>().ok()).is_none_or(|n| n >= LINES);
    let is_cut = lines.len() > kakuri::limits::LOG_OLD_FILES_MAX && lines.first().is_some_and(|line| line == GAP);
    lines.iter().skip(usize::from(is_cut)).find(is_none).map_or(Ok(()), |line| Err(format!("not a line of it: {line:?}")))
}

/// How the control plane shows that something is missing.
const GAP: &str = "[kakuri: output is missing here]";

/// Checks the output of a workload of which some may be lost: its lines in order, none of them twice.
///
/// # Errors
/// What is wrong with it.
pub fn check_lines_left<'a>(lines: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut next = 0;
    for line in lines {
        match line.strip_prefix("line ").and_then(|n| n.parse::<usize>().ok()) {
            Some(n) if (next..LINES).contains(&n) => next = n + 1,
            _ => return Err(format!("line {next} or a later one should be next, not {line:?}")),
        }
    }
    Ok(())
}

/// Checks the output of a workload: its lines in order, without gaps. A simulator that is killed in the moment of a line may print
/// it again.
///
/// # Errors
/// What is wrong with it.
pub fn check_lines<'a>(lines: impl Iterator<Item = &'a str>) -> Result<usize, String> {
    let mut next = 0;
    for line in lines {
        let number = line.strip_prefix("line ").and_then(|n| n.parse::<usize>().ok());
        match number {
            Some(n) if n == next && n < LINES => next += 1,
            Some(n) if n + 1 == next => {}
            _ => return Err(format!("line {next} should be next, not {line:?}")),
        }
    }
    Ok(next)
}

mod tests {
    use super::*;

    fn status(reason: Option<Reason>, exit_code: Option<i32>) -> Status {
        let created_at = Timestamp::parse("2026-01-01T00:00:00Z").expect("a time");
        let oom_killed = reason == Some(Reason::OomKilled);
        Status { reason, exit_code, oom_killed, created_at, ..Status::accepted(None) }
    }

    #[test]
    fn the_model_finds_what_it_is_there_to_find() {
        use State::{Failed, Pending, Running, Succeeded};
        let none = Meddling::default();
        let stopped = Meddling { is_stopped: true, ..none };
        let check = |fate, meddling, story: &[(State, Status)], expect: Option<&str>| {
            let mut told = Told::default();
            let result = story.iter().cloned().try_for_each(|(state, status)| told.note(fate, meddling, state, status));
            match expect {
                None => assert_eq!(result, Ok(()), "{story:?}"),
                Some(rule) => assert!(result.as_ref().is_err_and(|e| e.starts_with(rule)), "{rule}: {result:?}"),
            }
        };
        let plain = || status(None, None);
        let done = status(Some(Reason::Completed), Some(0));
        check(Fate::Exits(0), none, &[(Pending, plain()), (Running, plain()), (Succeeded, done.clone()), (Succeeded, done.clone())], None);
        check(Fate::Exits(0), none, &[(Running, plain()), (Pending, plain())], Some("an illegal transition"));
        check(Fate::Exits(0), none, &[(Succeeded, done.clone()), (Failed, status(Some(Reason::Error), Some(1)))], Some("an illegal"));
        let later = Status { finished_at: Some(Timestamp::now()), ..done.clone() };
        check(Fate::Exits(0), none, &[(Succeeded, done.clone()), (Succeeded, later)], Some("an ending that changed"));
        check(Fate::Forever, none, &[(Running, plain()), (Succeeded, done)], Some("an end that nobody brought about"));
        let killed = status(Some(Reason::Stopped), Some(137));
        check(Fate::Forever, none, &[(Running, plain()), (Failed, killed.clone())], Some("an end that nobody"));
        check(Fate::Forever, stopped, &[(Running, plain()), (Failed, killed)], None);
        let harmed = Meddling { is_harmed: true, ..none };
        let died = |exit| [(Running, plain()), (Failed, status(Some(Reason::SandboxDied), exit))];
        check(Fate::Exits(7), harmed, &died(Some(7)), Some("an end that nobody"));
        check(Fate::Exits(7), harmed, &died(Some(137)), None);
        check(Fate::Exits(7), none, &died(Some(137)), Some("an end that nobody"));
        let real = Meddling { is_real: true, ..none };
        let lost = |exit| {
            let message = Some("the runtime has lost track of the container".to_owned());
            [(Running, plain()), (Failed, Status { message, ..status(Some(Reason::RuntimeUnavailable), exit) })]
        };
        check(Fate::Forever, real, &lost(Some(143)), None);
        let cut_off = status(Some(Reason::Error), Some(137));
        check(Fate::Forever, real, &[(Pending, plain()), (Failed, cut_off.clone())], None);
        check(Fate::Forever, none, &[(Pending, plain()), (Failed, cut_off.clone())], Some("an end that nobody"));
        check(Fate::Forever, real, &[(Running, plain()), (Failed, cut_off.clone())], Some("an end that nobody"));
        let ran = Status { started_at: Some(Timestamp::now()), ..cut_off };
        check(Fate::Forever, real, &[(Pending, plain()), (Failed, ran)], Some("an end that nobody"));
        check(Fate::Forever, none, &lost(Some(143)), Some("an end that nobody"));
        check(Fate::Exits(7), real, &lost(Some(7)), Some("an end that nobody"));
        check(
            Fate::Forever,
            real,
            &[(Running, plain()), (Failed, status(Some(Reason::RuntimeUnavailable), Some(143)))],
            Some("an end that"),
        );
        let unavailable = status(Some(Reason::RuntimeUnavailable), None);
        check(Fate::Forever, none, &[(Pending, plain()), (Failed, unavailable.clone())], None);
        check(Fate::Forever, none, &[(Running, plain()), (Failed, unavailable)], Some("an end that nobody"));
        check(Fate::Forever, none, &[(Running, status(None, Some(0)))], Some("an exit code of what has not ended"));
        let moved = Status { container_id: Some("b".into()), ..plain() };
        let first = Status { container_id: Some("a".into()), ..plain() };
        check(Fate::Forever, none, &[(Running, first), (Running, moved)], Some("another container"));
        check(Fate::Forever, none, &[(Running, plain()), (Running, Status::accepted(None))], Some("another acceptance"));
        let ending = |reason, exit, restarts| Status { restarts, ..status(Some(reason), exit) };
        let restarts = Fate::Restarts { code: 7, most: Some(2) };
        let always = Fate::Restarts { code: 0, most: None };
        let again = |restarts| Status { restarts, ..plain() };
        let given_up = ending(Reason::Error, Some(7), 2);
        check(restarts, none, &[(Running, plain()), (Pending, again(1)), (Pending, again(2)), (Failed, given_up.clone())], None);
        check(restarts, none, &[(Running, plain()), (Failed, ending(Reason::Error, Some(7), 0))], Some("an end before the last restart"));
        check(restarts, none, &[(Running, again(2)), (Pending, again(3))], Some("more restarts than were asked for"));
        check(restarts, none, &[(Failed, ending(Reason::CreateFailed, None, 0))], None);
        check(restarts, none, &[(Failed, ending(Reason::CreateFailed, None, 1))], Some("an end before the last restart"));
        check(restarts, stopped, &[(Running, plain()), (Failed, ending(Reason::Stopped, Some(137), 1))], None);
        check(always, none, &[(Running, plain()), (Succeeded, ending(Reason::Completed, Some(0), 0))], Some("an end before the last"));
        check(Fate::NoImage, none, &[(Pending, plain()), (Failed, status(Some(Reason::ImageNotFound), None))], None);
        check(Fate::NoImage, none, &[(Running, plain())], Some("a run of an image that is not there"));
        let sick = status(Some(Reason::HealthCheckFailed), Some(137));
        check(Fate::Sick, none, &[(Running, plain()), (Failed, sick.clone())], None);
        check(Fate::Forever, none, &[(Running, plain()), (Failed, sick)], Some("an end that nobody"));
        let moment = |text| Timestamp::parse(text);
        let expired = |finished| {
            let (started_at, finished_at) = (moment("2026-01-01T00:00:01.000Z"), moment(finished));
            Status { started_at, finished_at, ..status(Some(Reason::TtlExpired), Some(137)) }
        };
        let ttl = Fate::Ttl { ms: 1000 };
        check(ttl, none, &[(Running, plain()), (Failed, expired("2026-01-01T00:00:02.000Z"))], None);
        check(ttl, none, &[(Running, plain()), (Failed, expired("2026-01-01T00:00:01.900Z"))], Some("a time to live that was not over"));
        check(Fate::Exits(7), none, &[(Failed, status(Some(Reason::Error), Some(8)))], Some("an end that nobody"));
        let many =
            |first: &[&str], n: usize| first.iter().copied().chain(std::iter::repeat_n("line 3", n)).map(str::to_owned).collect::<Vec<_>>();
        assert!(check_each_line(&many(&["line 1", "line 0"], 9)).is_ok());
        assert!(check_each_line(&many(&["line 4"], 9)).is_err());
        assert!(check_each_line(&many(&[GAP], 9)).is_err(), "nothing had to go");
        assert!(check_each_line(&many(&[GAP], 64)).is_ok());
        assert!(check_each_line(&many(&["line 0", GAP], 64)).is_err());
        assert!(check_lines_left(["line 0", "line 3"].into_iter()).is_ok());
        assert!(check_lines_left(["line 3", "line 0"].into_iter()).is_err());
        assert!(check_lines_left(["line 1", "line 1"].into_iter()).is_err());
        assert!(check_lines_left(["line 4"].into_iter()).is_err());
        assert_eq!(check_lines(["line 0", "line 1", "line 1", "line 2"].into_iter()), Ok(3));
        assert!(check_lines(["line 0", "line 2"].into_iter()).is_err());
        assert!(check_lines(["line 0", "line 1", "line 0"].into_iter()).is_err());
    }
}
