//! What follows a start: restarts by policy, health, time to live, and what of it outlives the agent.

use kakuri::wire::agent::{EventKind, Reply};
use kakuri::wire::record::{Record, Update, parse, to_line};
use kakuri::wire::status::Status;
use kakuri::workload::{Phase, Reason, State};
use serde_json::json;

use crate::harness::place::with;
use crate::harness::{Agent, Place, expect_error, until};

scenarios! {
    what_fails_is_started_again_until_it_may_not_be
    what_succeeded_is_started_again_only_always
    a_stop_ends_what_is_to_be_started_again
    a_sick_workload_is_ended
    a_restart_outlives_the_agent
    what_was_stopped_or_deleted_while_the_agent_died_is
}

/// Restarts without much ado.
fn restarting(policy: &str) -> serde_json::Value {
    json!({"restart_policy": policy, "restart_backoff_ms": 100, "restart_backoff_max_ms": 200, "stop_grace_ms": 0})
}

fn what_fails_is_started_again_until_it_may_not_be(place: &Place) {
    let agent = place.agent(&[]);
    let mut watch = agent.line();
    watch.tell(&json!({"type": "Watch"}));
    let workload = with(place.workload("wl-1", &["sh", "-c", "echo try; exit 3"]), restarting("on-failure"));
    agent.start_workload(&with(workload, json!({"restart_max_attempts": 2})));
    let (state, status) = agent.ended("wl-1");
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::Error), Some(3)), "{status:?}");
    assert_eq!((status.restarts, status.attempt), (2, 2));
    // Each attempt was seen, with why the one before ended; and the state machine was kept.
    let mut seen: Vec<(State, u32, Status)> = Vec::new();
    while !seen.last().is_some_and(|(state, _, _)| state.is_terminal()) {
        if let Reply::Event(event) = watch.reply() {
            let status = *event.object.status;
            let (state, restarts) = (event.object.state, status.restarts);
            if let Some((last, ..)) = seen.last() {
                assert!(last.may_become(state), "{last} became {state}");
            }
            seen.push((state, restarts, status));
        }
    }
    for n in 1..=2 {
        let (_, _, pending) =
            seen.iter().find(|(state, restarts, _)| *state == State::Pending && *restarts == n).expect("a restart is seen");
        assert_eq!((pending.reason, pending.message.as_deref(), pending.exit_code), (Some(Reason::Error), Some("exit code 3"), None));
        let words = format!("attempt {} ended: Error: exit code 3; restart {n} of 2 after 1 s", n - 1);
        assert_eq!(pending.last_error.as_deref(), Some(words.as_str()));
        assert!(seen.iter().any(|(state, restarts, _)| *state == State::Running && *restarts == n), "it ran");
    }
    // What it wrote in all its lives is there, and only one sandbox is.
    assert_eq!(agent.logs(json!({"id": "wl-1"})).into_iter().map(|l| l.line).collect::<Vec<_>>(), ["try"; 3]);
    assert_eq!(place.sandboxes_of("wl-1").len(), 1);
}

fn what_succeeded_is_started_again_only_always(place: &Place) {
    let agent = place.agent(&[]);
    agent.start_workload(&with(place.workload("once", &["true"]), restarting("on-failure")));
    let (state, status) = agent.ended("once");
    assert_eq!((state, status.reason, status.restarts), (State::Succeeded, Some(Reason::Completed), 0), "{status:?}");
    agent.start_workload(&with(place.workload("always", &["true"]), restarting("always")));
    until("it ran three times", || agent.status("always").1.restarts >= 3);
}

fn a_stop_ends_what_is_to_be_started_again(place: &Place) {
    let agent = place.agent(&[]);
    let slow = json!({"restart_policy": "always", "restart_backoff_ms": 3_600_000, "restart_backoff_max_ms": 3_600_000});
    agent.start_workload(&with(place.workload("wl-1", &["sh", "-c", "exit 4"]), slow));
    until("it waits for its restart", || agent.status("wl-1").1.restarts == 1);
    assert_eq!(agent.status("wl-1").0, State::Pending);
    let (state, status) = agent.stop_workload("wl-1");
    assert_eq!(
        (state, status.reason, status.message.as_deref()),
        (State::Failed, Some(Reason::Stopped), Some("exit code 4")),
        "{status:?}"
    );
    // And what runs again, as well.
    agent.run(&with(place.workload("wl-2", &["sleep", "1000"]), restarting("always")));
    let (state, status) = agent.stop_workload("wl-2");
    assert_eq!((state, status.reason, status.restarts), (State::Failed, Some(Reason::Stopped), 0), "{status:?}");
}

fn a_sick_workload_is_ended(place: &Place) {
    let agent = place.agent(&[]);
    let check = |command: &[&str]| json!({"stop_grace_ms": 0, "health": {"exec": command, "interval_ms": 100, "timeout_ms": 10_000, "failures": 2}});
    agent.run(&with(place.workload("well", &["sleep", "1000"]), check(&["true"])));
    agent.run(&with(place.workload("sick", &["sleep", "1000"]), check(&["sh", "-c", "exit 9"])));
    let (state, status) = agent.ended("sick");
    assert_eq!((state, status.reason), (State::Failed, Some(Reason::HealthCheckFailed)), "{status:?}");
    assert_eq!(status.message.as_deref(), Some("health check failed 2 of 2 times in a row: exit code 9: "), "{status:?}");
    assert_eq!(agent.status("well").0, State::Running);
    // Its policy decides what follows.
    let again = with(restarting("on-failure"), check(&["sh", "-c", "exit 9"]));
    agent.run(&with(place.workload("again", &["sleep", "1000"]), again));
    until("it was started again", || agent.status("again").1.restarts >= 1);
    let last_error = agent.status("again").1.last_error.unwrap_or_default();
    assert!(last_error.contains("HealthCheckFailed") || last_error.contains("health check failed"), "{last_error}");
}

fn a_restart_outlives_the_agent(place: &Place) {
    let mut agent = place.agent(&[]);
    let slow =
        json!({"restart_policy": "on-failure", "restart_backoff_ms": 3_600_000, "restart_backoff_max_ms": 3_600_000, "stop_grace_ms": 0});
    agent.start_workload(&with(place.workload("later", &["sh", "-c", "exit 4"]), slow));
    let soon = with(place.workload("soon", &["sh", "-c", "sleep 1; exit 5"]), restarting("on-failure"));
    agent.run(&soon);
    until("the one waits", || agent.status("later").1.restarts == 1);
    let before = agent.status("later").1;
    agent.kill();
    agent.again();
    // The one still waits, and knows why.
    let (state, after) = agent.status("later");
    assert_eq!((state, after.restarts, after.attempt, after.reason), (State::Pending, 1, before.attempt, Some(Reason::Error)), "{after:?}");
    assert_eq!((after.message, after.last_error), (before.message, before.last_error));
    until("nothing of its first life is left", || place.sandboxes_of("later").is_empty());
    // The other ended, whoever looked, and lives again.
    until("the other was started again", || agent.status("soon").1.restarts >= 1);
}

fn what_was_stopped_or_deleted_while_the_agent_died_is(place: &Place) {
    let mut agent = place.agent(&[]);
    // Long graces, so that the agent dies before they are over.
    let stubborn = |id: &str| with(place.workload(id, &place.stubborn()), json!({"stop_grace_ms": 4000}));
    agent.run_until_ready(&stubborn("stopped"));
    agent.run_until_ready(&stubborn("deleted"));
    agent.ask(&json!({"type": "StopWorkload", "id": "stopped"}));
    agent.ask(&json!({"type": "DeleteWorkload", "id": "deleted", "wait_ms": 0}));
    agent.kill();
    agent.again();
    let (state, status) = agent.ended("stopped");
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::Stopped), Some(137)), "{status:?}");
    until("the other is gone", || matches!(agent.ask(&json!({"type": "GetStatus", "id": "deleted"})), Reply::Error(_)));
    assert_eq!(place.sandboxes_of("deleted"), []);
}

/// Changes the journal of an agent that does not run, as a boot of the machine would: what is in it was written under another.
fn reboot(place: &Place, agent: &mut Agent<'_>) {
    agent.kill();
    let path = place.dir.join("agent/journal");
    let journal = std::fs::read(&path).expect("a journal");
    let change = |line: &[u8]| match parse(line) {
        Some(Record::Update(update)) => to_line(&Record::Update(Box::new(Update { boot_id: "another".into(), ..*update }))),
        Some(other) => to_line(&other),
        None => panic!("{:?}", String::from_utf8_lossy(line)),
    };
    let lines: Vec<u8> = journal.split(|b| *b == b'\n').filter(|line| !line.is_empty()).flat_map(change).collect();
    std::fs::write(path, lines).expect("written");
}

#[test]
fn a_boot_ends_what_ran_and_policy_says_what_follows() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    agent.settle(&place.workload("over", &["sh", "-c", "exit 6"]));
    let over = agent.ended("over").1;
    agent.run(&with(place.workload("once", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    agent.run(&with(place.workload("again", &["sleep", "1000"]), restarting("on-failure")));
    reboot(&place, &mut agent);
    // A simulator that forgets is a machine that was booted: nothing runs any more. The first agent after that dies before it sees so.
    place.kill_sim();
    agent.again_now();
    agent.kill();
    place.start_sim();
    agent.again();
    let (state, status) = agent.ended("once");
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::NodeRebooted), None), "{status:?}");
    assert_eq!(agent.ended("over").1.finished_at, over.finished_at);
    until("the other runs again", || agent.status("again").0 == State::Running);
    let (_, status) = agent.status("again");
    assert_eq!((status.restarts, status.attempt), (1, 1));
    assert!(status.last_error.as_deref().is_some_and(|e| e.starts_with("attempt 0 ended: NodeRebooted")), "{status:?}");
    assert_eq!(place.sandboxes().len(), 1);
}

#[test]
fn a_boot_that_nothing_ran_under_is_no_news() {
    let place = Place::sim(&["--persist"]);
    let mut agent = place.agent(&[]);
    agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    reboot(&place, &mut agent);
    // Some runtimes keep what runs elsewhere: what the runtime says runs, runs.
    agent.again();
    assert_eq!(agent.status("wl-1").0, State::Running);
}

#[test]
fn an_outcome_is_kept_though_the_runtime_forgets() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    agent.settle(&place.workload("wl-1", &["sh", "-c", "exit 6"]));
    let before = agent.ended("wl-1").1;
    agent.kill();
    place.kill_sim();
    place.start_sim();
    agent.again();
    let (state, after) = agent.status("wl-1");
    assert_eq!((state, after.exit_code, after.reason, after.finished_at), (State::Failed, Some(6), before.reason, before.finished_at));
    // Secrets are kept for a restart, and for their owner alone.
    let mode = std::os::unix::fs::PermissionsExt::mode(&place.dir.join("agent/journal").metadata().expect("there").permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_time_to_live_goes_on_while_the_agent_is_away() {
    let place = Place::sim(&["--persist"]);
    let mut agent = place.agent(&[]);
    let first = agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"ttl_ms": 3000, "stop_grace_ms": 0})));
    for _ in 0..3 {
        agent.kill();
        agent.again();
    }
    let (state, status) = agent.ended("wl-1");
    assert_eq!((state, status.reason), (State::Failed, Some(Reason::TtlExpired)), "{status:?}");
    let lived = status.finished_at.zip(first.started_at).map(|(end, start)| end.as_millis().saturating_sub(start.as_millis()));
    assert!(lived.is_some_and(|ms| ms >= 2900), "{lived:?} ms");
}

#[test]
fn a_watch_goes_on_where_it_was_left() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    agent.settle(&place.workload("wl-1", &["true"]));
    agent.ended("wl-1");
    let mut watch = agent.line();
    watch.tell(&json!({"type": "Watch"}));
    let revision = loop {
        if let Some(Reply::Heartbeat { revision, .. }) = watch.next() {
            break revision;
        }
    };
    drop(watch);
    agent.settle(&place.workload("wl-2", &["true"]));
    agent.ended("wl-2");
    let mut watch = agent.line();
    watch.tell(&json!({"type": "Watch", "since": revision}));
    let mut expected = revision;
    let mut kinds = Vec::new();
    while let Some(Reply::Event(event)) = watch.next() {
        expected += 1;
        assert_eq!((event.revision, &event.object.spec["id"]), (expected, &json!("wl-2")));
        kinds.push(event.event);
    }
    assert_eq!(kinds.first(), Some(&EventKind::Added));
    assert!(kinds.len() >= 3, "{kinds:?}");
    // What never happened cannot be gone on from; nor can what the agent before this one saw.
    for since in [expected + 1000, 0] {
        let error = expect_error(agent.ask(&json!({"type": "Watch", "since": since})));
        assert!(error.message.contains("not kept any more"), "{error:?}");
    }
    agent.kill();
    agent.again();
    let error = expect_error(agent.ask(&json!({"type": "Watch", "since": expected})));
    assert!(error.message.contains("not kept any more"), "{error:?}");
    let mut watch = agent.line();
    watch.tell(&json!({"type": "Watch"}));
    let Reply::Event(event) = watch.reply() else { panic!("no event") };
    assert!(event.revision > expected, "a revision never comes twice");
}

#[test]
fn a_stop_that_the_runtime_does_not_obey_is_seen_and_repeated() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    place.faults(&["StopContainer:error=Internal,stuck"]);
    agent.ask(&json!({"type": "StopWorkload", "id": "wl-1"}));
    until("it was tried again and again", || place.count("StopContainer") >= 3);
    let (state, status) = agent.status("wl-1");
    assert_eq!((state, status.phase), (State::Running, Some(Phase::Stopping)));
    assert!(status.last_error.is_some_and(|e| e.contains("stuck")));
    let node = agent.node();
    assert!(node.stopping == 1 && node.oldest_stopping_ms > 0, "{node:?}");
    place.faults(&[]);
    assert_eq!(agent.ended("wl-1").1.reason, Some(Reason::Stopped));
    assert_eq!(agent.node().stopping, 0);
}

#[test]
fn a_state_directory_has_one_agent_and_must_be_whole() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    agent.settle(&place.workload("wl-1", &["true"]));
    agent.ended("wl-1");
    let second = |what: &str| {
        let state = place.dir.join("agent").display().to_string();
        let endpoint = place.endpoint_url();
        let args = ["--node-id", "other", "--listen", "127.0.0.1:0", "--cri-endpoint", &endpoint, "--state-dir", &state];
        let output = crate::harness::daemon::command(crate::harness::daemon::AGENT).args(args).output().expect("it ran");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains(what), "{:?}: {said}", output.status);
    };
    second("another agent uses");
    agent.kill();
    let path = place.dir.join("agent/journal");
    let whole = std::fs::read(&path).expect("a journal");
    let mut bad = whole.clone();
    let middle = whole.iter().position(|b| *b == b'\n').expect("lines") + 50;
    bad[middle] ^= 1;
    std::fs::write(&path, &bad).expect("written");
    second("is damaged at line 2; move it away");
    std::fs::write(&path, to_line(&Record::Begin { version: 99, starts: 1 })).expect("written");
    second("has version 99, this agent writes 1");
    // A torn last line was never acknowledged.
    std::fs::write(&path, [whole.as_slice(), b"0123abcd {\"rec"].concat()).expect("written");
    agent.again();
    assert_eq!(agent.status("wl-1").0, State::Succeeded);
}
