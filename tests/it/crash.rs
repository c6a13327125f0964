//! The crash matrix: the agent is killed just before and just after each call to the runtime, and each write to its own disk, that a
//! workload's life consists of. Whatever the moment, the next agent ends up with one sandbox or none, as it should be.
//!
//! Starts are in `recovery.rs`. A call is caught with the simulator's `hang` (not done yet) and `hang-after` (done, not answered);
//! a write with a failpoint (`KAKURI_DIE_AT`), at its first, second, .. pass, until a whole life passes without it.

use kakuri::wire::agent::{ErrorCode, Reply};
use kakuri::workload::{Reason, State};
use serde_json::{Value, json};

use crate::harness::place::with;
use crate::harness::{Agent, Place, SOON_MS, eventually, expect_error, expect_status, until};

/// Kills the agent when `act` made it call `method`, before or after the effect, and starts the next.
fn die_in(place: &Place, agent: &mut Agent<'_>, method: &str, action: &str, act: &Value) {
    place.forget_calls();
    place.faults(&[&format!("{method}:{action}*1")]);
    let mut line = agent.line();
    line.tell(act);
    until(&format!("{method} {action}"), || place.calls().iter().any(|call| call.starts_with(&format!("{method} hang"))));
    agent.kill();
    place.faults(&[]);
    agent.again();
}

/// Each call, before and after its effect.
fn each(methods: &[&'static str]) -> Vec<(&'static str, &'static str)> {
    methods.iter().flat_map(|method| [(*method, "hang"), (*method, "hang-after")]).collect()
}

#[test]
fn an_agent_that_dies_in_a_stop_ends_it_or_leaves_it() {
    // Without events, whose questions would meet the faults that are meant for the stop.
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for (method, action) in each(&["StopContainer", "ContainerStatus", "StopPodSandbox"]) {
        let id = crate::harness::unique();
        let before = agent.run(&with(place.workload(&id, &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
        die_in(&place, &mut agent, method, action, &json!({"type": "StopWorkload", "id": id}));
        // Nobody asks again: it was on disk.
        let (state, status) = agent.ended(&id);
        let end = (state, status.reason, status.exit_code);
        assert_eq!(end, (State::Failed, Some(Reason::Stopped), Some(137)), "{method} {action}: {status:?}");
        assert_eq!(status.container_id, before.container_id, "{method} {action}: nothing was started again");
        until("one sandbox, stopped", || place.sandboxes_of(&id).iter().map(|s| s.state).collect::<Vec<_>>() == [1]);
        agent.delete(&id);
        assert_eq!(place.sandboxes_of(&id), [], "{method} {action}");
    }
}

#[test]
fn an_agent_that_dies_in_a_delete_leaves_nothing_in_the_end() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for (method, action) in each(&["StopContainer", "ContainerStatus", "StopPodSandbox", "RemovePodSandbox"]) {
        let id = crate::harness::unique();
        agent.run(&with(place.workload(&id, &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
        let delete = json!({"type": "DeleteWorkload", "id": id});
        die_in(&place, &mut agent, method, action, &delete);
        gone_in_the_end(&place, &agent, &id);
    }
    for (method, action) in each(&["StopPodSandbox", "RemovePodSandbox"]) {
        let id = crate::harness::unique();
        agent.settle(&place.workload(&id, &["sh", "-c", "exit 3"]));
        agent.ended(&id);
        until("its sandbox is stopped", || place.sandboxes_of(&id).iter().all(|s| s.state == 1));
        die_in(&place, &mut agent, method, action, &json!({"type": "DeleteWorkload", "id": id}));
        gone_in_the_end(&place, &agent, &id);
    }
}

/// Nobody asks for it again.
fn gone_in_the_end(place: &Place, agent: &Agent<'_>, id: &str) {
    until("its sandbox is gone", || place.sandboxes_of(id).is_empty());
    until("it is forgotten", || agent.list().iter().all(|object| object.spec["id"] != *id));
    let logs = || std::fs::read_dir(place.dir.join("agent/logs")).map_or(0, Iterator::count);
    until("its logs are gone", || logs() == 0);
}

#[test]
fn an_agent_that_dies_in_a_sweep_sweeps_again() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for (method, action) in each(&["StopPodSandbox", "RemovePodSandbox"]) {
        let id = crate::harness::unique();
        // Half a start, which the next agent sweeps, and dies of; its next one goes on.
        die_in(
            &place,
            &mut agent,
            "CreateContainer",
            "hang",
            &json!({"type": "StartWorkload", "workload": place.workload(&id, &["true"])}),
        );
        until("it is swept, or made again", || place.calls().iter().any(|call| call.starts_with("RemovePodSandbox")));
        agent.attempt(&json!({"type": "DeleteWorkload", "id": id}));
        until("it is gone", || place.sandboxes_of(&id).is_empty());
        let again = crate::harness::unique();
        place.faults(&["CreateContainer:hang*1", &format!("{method}:{action}*1")]);
        place.forget_calls();
        agent.start_workload(&place.workload(&again, &["true"]));
        until("half a start", || place.calls().iter().any(|call| call.starts_with("CreateContainer hang")));
        agent.kill();
        agent.again();
        until(&format!("{method} {action}"), || place.calls().iter().any(|call| call.starts_with(&format!("{method} hang"))));
        agent.kill();
        place.faults(&[]);
        agent.again();
        agent.attempt(&json!({"type": "DeleteWorkload", "id": again}));
        until("it is swept", || place.sandboxes_of(&again).is_empty());
    }
}

/// What one life of a workload brought, as far as the agent lived to say it.
#[derive(Debug, Default)]
struct Life {
    is_accepted: bool,
    /// Its state when it was last heard of.
    last: Option<(State, Option<i32>)>,
    is_stop_accepted: bool,
    is_gone: bool,
}

/// Starts, stops and deletes a workload, until it is gone or the agent is.
fn live(agent: &Agent<'_>, workload: &Value) -> Life {
    let mut life = Life::default();
    let id = &workload["id"];
    let steps = [
        json!({"type": "StartWorkload", "workload": workload, "wait_ms": 10_000}),
        json!({"type": "StopWorkload", "id": id, "wait_ms": 10_000}),
        json!({"type": "DeleteWorkload", "id": id}),
    ];
    for step in steps {
        // One that began a moment ago says so for a moment.
        let reply = eventually("an answer, or the end", SOON_MS, || match agent.attempt(&step) {
            Some(Reply::Error(error)) if error.code == ErrorCode::Unavailable => None,
            reply => Some(reply),
        });
        match reply {
            Some(Reply::Status { state, status, .. }) => {
                life.is_accepted = true;
                life.is_stop_accepted |= step["type"] == "StopWorkload";
                life.last = Some((state, status.exit_code));
            }
            Some(Reply::Deleted { .. }) => life.is_gone = true,
            Some(other) => panic!("{step}: {other:?}"),
            None => return life,
        }
    }
    life
}

/// Lives one life after the other with an agent that dies at the first, second, .. pass of a failpoint, and has the next agent make
/// the best of it. `remembers`: what was answered is on the agent's disk.
fn die_at_each_pass(failpoint: &str) -> usize {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for pass in 0..100 {
        let id = crate::harness::unique();
        let workload = with(place.workload(&id, &["sleep", "1000"]), json!({"stop_grace_ms": 0, "env": {"A": "b"}}));
        place.forget_calls();
        agent.terminate();
        let at = format!("{failpoint}@{pass}");
        let life = if agent.again_to_die(&at) { live(&agent, &workload) } else { Life::default() };
        if life.is_gone && !agent.has_died() {
            return pass;
        }
        until(&format!("the agent died at {at}: {life:?}"), || agent.has_died());
        agent.again();
        let known = agent.ask(&json!({"type": "GetStatus", "id": id}));
        match (&life, known) {
            (Life { is_gone: true, .. }, reply) => assert_eq!(expect_error(reply).code, ErrorCode::NotFound, "{at}: it was deleted"),
            (Life { is_accepted: true, .. }, reply @ Reply::Error(_)) => {
                // Its deletion was asked for, and may have been all but answered.
                let was_deleted = life.last.is_some_and(|(state, _)| state.is_terminal());
                assert!(was_deleted && expect_error(reply).code == ErrorCode::NotFound, "{at}: {life:?} was accepted and is lost");
            }
            (_, Reply::Status { state, status, .. }) => {
                if let Some((told, exit_code)) = life.last.filter(|(state, _)| state.is_terminal()) {
                    assert_eq!((state, status.exit_code), (told, exit_code), "{at}: an end that changed: {status:?}");
                }
            }
            (_, reply) => assert_eq!(expect_error(reply).code, ErrorCode::NotFound, "{at}"),
        }
        // Whoever got no answer asks again.
        if !life.is_accepted {
            assert_eq!(agent.settle(&workload).0, State::Running, "{at}");
        }
        if !life.is_gone {
            match agent.ask(&json!({"type": "StopWorkload", "id": id, "wait_ms": 10_000})) {
                reply @ Reply::Status { .. } => assert_eq!(expect_status(reply).0, State::Failed, "{at}"),
                reply => assert_eq!(expect_error(reply).code, ErrorCode::NotFound, "{at}"),
            }
            agent.ask(&json!({"type": "DeleteWorkload", "id": id}));
        }
        gone_in_the_end(&place, &agent, &id);
        let starts = place.calls().iter().filter(|call| call.starts_with("StartContainer OK")).count();
        assert!(starts <= 1, "{at}: code of the user's ran {starts} times");
    }
    panic!("{failpoint}: no end after 100 passes")
}

#[test]
fn an_agent_that_dies_at_a_write_of_its_journal_remembers_what_it_said() {
    std::thread::scope(|scope| {
        for failpoint in ["agent-journal-before", "agent-journal-after", "agent-journal-rename-before", "agent-journal-rename-after"] {
            scope.spawn(move || {
                let passes = die_at_each_pass(failpoint);
                println!("{failpoint}: the agent died at {passes} passes");
                assert!(passes > 0, "{failpoint} was never passed");
            });
        }
    });
}
