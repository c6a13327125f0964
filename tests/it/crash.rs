//! The crash matrix: the agent is killed just before and just after each call to the runtime, and each write to its own disk, that a
//! workload's life consists of. Whatever the moment, the next agent ends up with one sandbox or none, as it should be, and what had
//! nothing to do with it is as it was.
//!
//! Starts are in `recovery.rs`, records of images and log files in `images.rs` and `logs.rs`, the control plane in `durable.rs`. A call
//! is caught with the simulator's `hang` (not done yet) and `hang-after` (done, not answered); a write with a failpoint
//! (`KAKURI_DIE_AT`), at its first, second, .. pass, until a whole life passes without it.

use std::sync::Mutex;
use std::thread;

use kakuri::cri::proto::{PodSandboxConfig, PodSandboxMetadata};
use kakuri::cri::runtime::{LABEL_NODE, LABEL_WORKLOAD};
use kakuri::wire::agent::{ErrorCode, EventKind, Reply};
use kakuri::wire::status::Status;
use kakuri::workload::{Reason, State};
use serde_json::{Value, json};

use crate::harness::place::{soon, with};
use crate::harness::{Agent, Line, Place, SOON_MS, eventually, expect_error, expect_status, unique, until};

fn forever(place: &Place, id: &str) -> Value {
    with(place.workload(id, &["sleep", "1000"]), json!({"stop_grace_ms": 0}))
}

/// Tells the agent something, and reads no answer.
fn tell(agent: &Agent<'_>, request: &Value) -> Line {
    let mut line = agent.line();
    line.tell(request);
    line
}

fn start(agent: &Agent<'_>, workload: &Value) -> Line {
    tell(agent, &json!({"type": "StartWorkload", "workload": workload}))
}

fn stop(agent: &Agent<'_>, id: &str) -> Line {
    tell(agent, &json!({"type": "StopWorkload", "id": id}))
}

fn delete(agent: &Agent<'_>, id: &str) -> Line {
    tell(agent, &json!({"type": "DeleteWorkload", "id": id}))
}

fn wait_for_hang(place: &Place, method: &str) {
    until(&format!("{method} hangs"), || place.calls().iter().any(|call| call.starts_with(&format!("{method} hang"))));
}

/// Kills the agent when `act` made it call `method`, and starts the next. Each fault is `METHOD:ACTION`, as the simulator has them; the
/// agent dies in the first of them.
fn die_in(place: &Place, agent: &mut Agent<'_>, faults: &[&str], act: impl FnOnce(&Agent<'_>) -> Line) {
    place.forget_calls();
    place.faults(faults);
    let held = act(agent);
    wait_for_hang(place, faults[0].split(':').next().expect("a method"));
    agent.kill();
    drop(held);
    place.faults(&[]);
    agent.again();
}

/// Each call, before and after its effect.
fn each(methods: &[&'static str]) -> Vec<(&'static str, &'static str)> {
    methods.iter().flat_map(|method| [(*method, "hang"), (*method, "hang-after")]).collect()
}

/// How often code of a user's was started, whoever was told.
fn starts(place: &Place) -> usize {
    let is_start =
        |call: &String| call.starts_with("StartContainer OK") || (call.starts_with("StartContainer ") && call.contains("effect=yes"));
    place.calls().iter().filter(|call| is_start(call)).count()
}

/// Two that are there through all deaths, one that runs and one that ended, and that none of them is about.
struct Witnesses {
    running: (Value, Status),
    over: (Value, Status),
}

impl Witnesses {
    fn start(place: &Place, agent: &Agent<'_>) -> Self {
        let more = |label: &str| json!({"env": {"SECRET": label}, "labels": {"app": label}});
        let running = with(forever(place, "witness"), more("runs"));
        let over = with(place.workload("witness-over", &["sh", "-c", "exit 7"]), more("is-over"));
        let ran = agent.run(&running);
        agent.settle(&over);
        let (_, ended) = agent.ended("witness-over");
        assert_eq!((ended.reason, ended.exit_code), (Some(Reason::Error), Some(7)), "{ended:?}");
        Self { running: (running, ran), over: (over, ended) }
    }

    /// All that was said of them is still so. That an agent takes the same words for the same workload says that it has them all, the
    /// values of the environment included.
    fn check(&self, place: &Place, agent: &Agent<'_>, at: &str) {
        for (workload, before) in [&self.running, &self.over] {
            let id = workload["id"].as_str().expect("an id");
            let reply = agent.ask(&json!({"type": "StartWorkload", "workload": workload}));
            let Reply::Status { state, status, .. } = reply else { panic!("{at}: {id}: {reply:?}") };
            let is_over = before.exit_code.is_some();
            assert_eq!(state, if is_over { State::Failed } else { State::Running }, "{at}: {id}: {status:?}");
            let of = |s: &Status| (s.container_id.clone(), s.sandbox_id.clone(), s.started_at, s.finished_at, s.attempt, s.restarts);
            assert_eq!(of(&status), of(before), "{at}: {id}");
            assert_eq!((status.reason, status.exit_code), (before.reason, before.exit_code), "{at}: {id}");
            let object = agent.list().into_iter().find(|object| object.spec["id"] == id).expect("listed");
            assert_eq!(object.spec["labels"], workload["labels"], "{at}: {id}");
            assert_eq!(place.sandboxes_of(id).len(), 1, "{at}: {id}");
        }
        match agent.ask(&json!({"type": "Exec", "id": "witness", "command": ["echo", "alive"]})) {
            Reply::ExecResult(result) => assert_eq!((result.exit_code, result.stdout.as_str()), (0, "alive\n"), "{at}"),
            other => panic!("{at}: {other:?}"),
        }
    }
}

#[test]
fn an_agent_that_dies_in_a_stop_ends_it_or_leaves_it() {
    // Without events, whose questions would meet the faults that are meant for the stop.
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for (method, action) in each(&["StopContainer", "ContainerStatus", "StopPodSandbox"]) {
        let id = unique();
        let before = agent.run(&forever(&place, &id));
        die_in(&place, &mut agent, &[&format!("{method}:{action}*1")], |agent| stop(agent, &id));
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
        let id = unique();
        agent.run(&forever(&place, &id));
        die_in(&place, &mut agent, &[&format!("{method}:{action}*1")], |agent| delete(agent, &id));
        gone_in_the_end(&place, &agent, &id);
    }
    for (method, action) in each(&["StopPodSandbox", "RemovePodSandbox"]) {
        let id = unique();
        agent.settle(&place.workload(&id, &["sh", "-c", "exit 3"]));
        agent.ended(&id);
        until("its sandbox is stopped", || place.sandboxes_of(&id).iter().all(|s| s.state == 1));
        die_in(&place, &mut agent, &[&format!("{method}:{action}*1")], |agent| delete(agent, &id));
        gone_in_the_end(&place, &agent, &id);
    }
}

/// Nobody asks for it again.
fn gone_in_the_end(place: &Place, agent: &Agent<'_>, id: &str) {
    until("its sandbox is gone", || place.sandboxes_of(id).is_empty());
    until("it is forgotten", || agent.list().iter().all(|object| object.spec["id"] != *id));
    let is_of = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().trim_start_matches('.').starts_with(&format!("{id}."));
    let logs = || std::fs::read_dir(place.dir.join("agent/logs")).into_iter().flatten().flatten().filter(is_of).count();
    until("its logs are gone", || logs() == 0);
}

#[test]
fn half_a_start_is_removed_whoever_dies_over_that() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for (method, action) in each(&["StopPodSandbox", "RemovePodSandbox"]) {
        let (id, at) = (unique(), format!("{method} {action}"));
        let workload = forever(&place, &id);
        place.forget_calls();
        place.faults(&["CreateContainer:hang*1", &format!("{method}:{action}*1")]);
        agent.start_workload(&workload);
        wait_for_hang(&place, "CreateContainer");
        let half = place.sandboxes_of(&id);
        agent.kill();
        // Nobody asks for the removal, here or below.
        agent.again();
        wait_for_hang(&place, method);
        agent.kill();
        place.faults(&[]);
        agent.again();
        until("the first attempt's sandbox is gone", || place.sandboxes_of(&id).iter().all(|s| !half.iter().any(|half| half.id == s.id)));
        let (state, status) = agent.settle(&workload);
        assert_eq!((half.len(), state, status.attempt > 0, starts(&place)), (1, State::Running, true, 1), "{at}: {status:?}");
        assert_eq!(place.sandboxes_of(&id).len(), 1, "{at}");
        agent.delete(&id);
    }
}

#[test]
fn a_sandbox_nobody_wants_is_removed_whoever_dies_over_that() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for (method, action) in each(&["StopPodSandbox", "RemovePodSandbox"]) {
        let stray = unique();
        die_in(&place, &mut agent, &[&format!("{method}:{action}*1")], |agent| {
            let labels = [(LABEL_NODE, place.node.as_str()), (LABEL_WORKLOAD, &stray)].map(|(k, v)| (k.to_owned(), v.to_owned()));
            let metadata = PodSandboxMetadata { name: stray.clone(), uid: stray.clone(), namespace: "kakuri".into(), attempt: 0 };
            let config = PodSandboxConfig { metadata: Some(metadata), labels: labels.into(), ..Default::default() };
            place.cri().run_pod_sandbox(&config, "runc", soon()).expect("a sandbox");
            agent.line()
        });
        until(&format!("{method} {action}: it is swept"), || place.sandboxes_of(&stray).is_empty());
    }
}

/// The call in which the undo of a failed start is cut short, how, and what the next agent makes of what it finds.
#[test]
fn an_agent_that_dies_while_it_undoes_a_start_runs_nothing_twice() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for (method, action) in each(&["StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"]) {
        let (id, at) = (unique(), format!("{method} {action}"));
        let workload = forever(&place, &id);
        let fault = format!("{method}:{action}*1");
        die_in(&place, &mut agent, &[&fault, "StartContainer:error=INTERNAL,boom*1"], |agent| start(agent, &workload));
        let (state, status) = agent.settle(&workload);
        let is_container_left = matches!((method, action), ("StopContainer", _) | ("RemoveContainer", "hang"));
        if is_container_left {
            // It was not started, as everybody can see.
            assert_eq!((state, status.attempt, starts(&place)), (State::Running, 1, 1), "{at}: {status:?}");
        } else {
            // Whether it ran nobody knows any more; it was never seen alive, so nothing befell it.
            assert_eq!((state, status.reason, starts(&place)), (State::Failed, Some(Reason::StartFailed), 0), "{at}: {status:?}");
            assert_eq!(status.exit_code, None, "{at}");
        }
        until("one sandbox at most, that of now", || {
            let there = place.sandboxes_of(&id);
            there.len() <= 1 && there.iter().all(|s| Some(&s.id) == status.sandbox_id.as_ref())
        });
        agent.delete(&id);
    }
}

#[test]
fn an_agent_that_dies_in_a_restart_by_policy_runs_each_attempt_once() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    // The calls of the second attempt, and how many the first has before it.
    let mut calls: Vec<(&str, &str, u32)> = each(&["StopPodSandbox", "RemovePodSandbox"]).into_iter().map(|(m, a)| (m, a, 0)).collect();
    let second = each(&["ImageStatus", "RunPodSandbox", "PodSandboxStatus", "CreateContainer", "StartContainer"]);
    calls.extend(second.into_iter().map(|(m, a)| (m, a, 1)));
    calls.extend(each(&["ContainerStatus"]).into_iter().map(|(m, a)| (m, a, 2)));
    for (method, action, before) in calls {
        let (id, at) = (unique(), format!("{method} {action}"));
        let policy = json!({"restart_policy": "on-failure", "restart_max_attempts": 1, "restart_backoff_ms": 100});
        let workload = with(place.workload(&id, &["sh", "-c", "sleep 0.2; exit 9"]), policy);
        die_in(&place, &mut agent, &[&format!("{method}:{action}*1@{before}")], |agent| start(agent, &workload));
        let (state, status) = agent.ended(&id);
        let end = (state, status.reason, status.exit_code, status.restarts);
        assert_eq!(end, (State::Failed, Some(Reason::Error), Some(9), 1), "{at}: {status:?}");
        assert_eq!(starts(&place), 2, "{at}: {:?}", place.calls());
        until("one sandbox, its last", || {
            place.sandboxes_of(&id).into_iter().map(|s| s.id).collect::<Vec<_>>() == [status.sandbox_id.clone().unwrap_or_default()]
        });
        agent.delete(&id);
    }
}

#[test]
fn an_agent_that_dies_when_a_time_to_live_is_over_ends_it_all_the_same() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    // The start asks for the container's status once.
    for (method, action, before) in [
        ("StopContainer", "hang", 0),
        ("StopContainer", "hang-after", 0),
        ("ContainerStatus", "hang", 1),
        ("ContainerStatus", "hang-after", 1),
        ("StopPodSandbox", "hang", 0),
        ("StopPodSandbox", "hang-after", 0),
    ] {
        let (id, at) = (unique(), format!("{method} {action}"));
        let workload = with(forever(&place, &id), json!({"ttl_ms": 300}));
        die_in(&place, &mut agent, &[&format!("{method}:{action}*1@{before}")], |agent| start(agent, &workload));
        let (state, status) = agent.ended(&id);
        let end = (state, status.reason, status.exit_code);
        assert_eq!(end, (State::Failed, Some(Reason::TtlExpired), Some(137)), "{at}: {status:?}");
        assert_eq!((starts(&place), status.attempt), (1, 0), "{at}");
        until("one sandbox, stopped", || place.sandboxes_of(&id).iter().map(|s| s.state).collect::<Vec<_>>() == [1]);
        agent.delete(&id);
    }
}

#[test]
fn an_agent_that_dies_asking_inside_a_workload_holds_nothing_against_it() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    let health = json!({"health": {"exec": ["true"], "interval_ms": 100, "timeout_ms": 10_000, "failures": 1}});
    // A check of its health, and the question what kernel it has.
    for more in [health, json!({"runtime_class": "gvisor"})] {
        for (method, action) in each(&["ExecSync"]) {
            let (id, at) = (unique(), format!("{action} {more}"));
            let workload = with(forever(&place, &id), more.clone());
            die_in(&place, &mut agent, &[&format!("{method}:{action}*1")], |agent| start(agent, &workload));
            until("the next agent asks too", || place.calls().iter().any(|call| call.starts_with("ExecSync OK")));
            if more.get("runtime_class").is_some() {
                until("it is known what it has", || agent.status(&id).1.isolation.verified == Some(true));
            }
            let (state, status) = agent.status(&id);
            let now = (state, status.reason, status.last_error.as_ref(), status.attempt, starts(&place));
            assert_eq!(now, (State::Running, None, None, 0, 1), "{at}: {status:?}");
            agent.delete(&id);
        }
    }
}

#[test]
fn an_agent_that_dies_in_the_removal_of_an_image_still_knows_it_for_its_own() {
    let place = Place::sim(&["--no-events"]);
    let tight = "image_gc_capacity_mb = 100\nimage_gc_high_percent = 50\nimage_gc_low_percent = 40\nimage_gc_min_age_s = 0\n";
    let config = place.dir.write("agent.toml", tight).display().to_string();
    let mut agent = place.agent(&["--config", &config]);
    let witnesses = Witnesses::start(&place, &agent);
    let image = "r.test/mb-90/a:1";
    let is_there = || place.cri().list_images(soon()).expect("a list").iter().any(|i| i.repo_tags.iter().any(|tag| tag == image));
    // The agent collects by itself too, and is then too busy to be told.
    let collect = |agent: &Agent<'_>| match agent.ask(&json!({"type": "CollectImages"})) {
        Reply::Images(_) => {}
        reply => assert_eq!(expect_error(reply).code, ErrorCode::Unavailable),
    };
    for (method, action) in each(&["RemoveImage"]) {
        let id = unique();
        let workload = with(forever(&place, &id), json!({"image": image}));
        // Pulled, removed, and pulled again by whoever comes next: it is the agent's each time.
        agent.run(&workload);
        die_in(&place, &mut agent, &[&format!("{method}:{action}*1")], |agent| {
            agent.delete(&id);
            tell(agent, &json!({"type": "CollectImages"}))
        });
        witnesses.check(&place, &agent, action);
        until("it is gone", || {
            collect(&agent);
            !is_there()
        });
        agent.run(&workload);
        assert!(is_there());
        agent.delete(&id);
        until("it is gone again", || {
            collect(&agent);
            !is_there()
        });
    }
}

#[test]
fn an_agent_that_dies_having_a_log_opened_anew_loses_no_line() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&["--log-file-kb", "16", "--log-files", "64", "--log-check-ms", "20"]);
    for (method, action) in each(&["ReopenContainerLog"]) {
        let id = unique();
        let round = |n: u32| format!("seq {} {}; sleep 0.1; ", n * 400 + 1, (n + 1) * 400);
        let command = (0..8).map(round).collect::<String>() + "sleep 0.5; seq 3201 4000";
        let workload = place.workload(&id, &["sh", "-c", &command]);
        die_in(&place, &mut agent, &[&format!("{method}:{action}*1")], |agent| start(agent, &workload));
        agent.ended(&id);
        let lines = agent.logs(json!({"id": id}));
        assert!(lines.iter().all(|line| !line.gap), "{action}");
        let numbers: Vec<u32> = lines.iter().map(|line| line.line.parse().expect("a number")).collect();
        assert_eq!(numbers, (1..=4000).collect::<Vec<_>>(), "{action}");
        agent.delete(&id);
    }
}

#[test]
fn an_agent_that_dies_in_its_first_look_changes_nothing() {
    thread::scope(|scope| {
        for (method, action) in each(&["ListPodSandbox", "ListContainers", "Status"]) {
            scope.spawn(move || {
                let place = Place::sim(&["--no-events"]);
                let mut agent = place.agent(&[]);
                let witnesses = Witnesses::start(&place, &agent);
                agent.kill();
                place.forget_calls();
                place.faults(&[&format!("{method}:{action}*1")]);
                // It serves though its runtime does not answer, and before that it waits a little.
                agent.again_now();
                wait_for_hang(&place, method);
                agent.kill();
                place.faults(&[]);
                agent.again();
                witnesses.check(&place, &agent, &format!("{method} {action}"));
                assert_eq!(starts(&place), 0);
            });
        }
    });
}

#[test]
fn an_agent_that_is_told_to_stop_keeps_what_it_accepted_and_nothing_else() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for round in 0..3 {
        let address = agent.address.clone();
        let answers = Mutex::new(Vec::new());
        let count =
            |is_accepted: bool| answers.lock().expect("not poisoned").iter().filter(|(_, accepted)| *accepted == is_accepted).count();
        thread::scope(|scope| {
            for client in 0..4 {
                let (workload, address, answers) = (forever(&place, "any"), &address, &answers);
                scope.spawn(move || {
                    // Up to the agent's end: whoever gets no answer knows nothing.
                    for n in 0.. {
                        let id = format!("w{round}-{client}-{n}");
                        let Ok(mut line) = Line::try_connect(address) else { return };
                        let request = json!({"type": "StartWorkload", "workload": with(workload.clone(), json!({"id": id}))});
                        let reply = line.try_send(format!("{request}\n").as_bytes()).ok().and_then(|()| line.attempt());
                        let Some(reply) = reply else { return };
                        answers.lock().expect("not poisoned").push((id, matches!(reply, Reply::Status { .. })));
                    }
                });
            }
            until("some are accepted", || count(true) >= 8);
            agent.daemon().signal("TERM");
        });
        assert_eq!(agent.wait_for_end(SOON_MS), Some(0));
        agent.again();
        println!("{} accepted, {} refused", count(true), count(false));
        for (id, is_accepted) in answers.into_inner().expect("not poisoned") {
            match agent.ask(&json!({"type": "GetStatus", "id": id})) {
                Reply::Status { .. } => assert!(is_accepted, "{id} was refused, and is there"),
                reply => assert!(!is_accepted && expect_error(reply).code == ErrorCode::NotFound, "{id} was accepted, and is lost"),
            }
        }
        for object in agent.list() {
            agent.delete(object.spec["id"].as_str().expect("an id"));
        }
    }
}

#[test]
fn what_is_deleted_and_found_gone_was_stopped() {
    let place = Place::sim(&["--no-events"]);
    let agent = place.agent(&["--relist-ms", "100"]);
    agent.run(&forever(&place, "wl-1"));
    let mut watch = agent.line();
    watch.tell(&json!({"type": "Watch"}));
    // A runtime that does not stop it, and that removes it and does not say so.
    place.faults(&["StopContainer:error=INTERNAL,boom", "RemovePodSandbox:drop-after*3"]);
    let deletion = delete(&agent, "wl-1");
    let mut ends = Vec::new();
    loop {
        match watch.reply() {
            Reply::Event(event) if event.event == EventKind::Deleted => break,
            Reply::Event(event) if event.object.state.is_terminal() => ends.push(event.object.status.reason),
            _ => {}
        }
    }
    assert!(!ends.is_empty() && ends.iter().all(|reason| *reason == Some(Reason::Stopped)), "{ends:?}");
    place.faults(&[]);
    drop((deletion, watch));
}

/// What one life of a workload brought, as far as the agent lived to say it.
#[derive(Debug, Default)]
struct Life {
    /// What was last heard of it.
    told: Option<(State, Status)>,
    is_stop_asked: bool,
    is_delete_asked: bool,
    is_gone: bool,
}

/// Starts, stops and deletes a workload, until it is gone or the agent is.
fn live(agent: &Agent<'_>, workload: &Value) -> Life {
    let mut life = Life::default();
    let id = &workload["id"];
    let steps = [
        json!({"type": "StartWorkload", "workload": workload, "wait_ms": SOON_MS}),
        json!({"type": "StopWorkload", "id": id, "wait_ms": SOON_MS}),
        json!({"type": "DeleteWorkload", "id": id}),
    ];
    for step in steps {
        life.is_stop_asked |= step["type"] == "StopWorkload";
        life.is_delete_asked |= step["type"] == "DeleteWorkload";
        // One that began a moment ago says so for a moment.
        let reply = eventually("an answer, or the end", SOON_MS, || match agent.attempt(&step) {
            Some(Reply::Error(error)) if error.code == ErrorCode::Unavailable => None,
            reply => Some(reply),
        });
        match reply {
            Some(Reply::Status { state, status, .. }) => {
                match &life.told {
                    None => assert_eq!(state, State::Running, "{status:?}"),
                    Some((_, before)) => assert_stopped(state, &status, before, "told"),
                }
                life.told = Some((state, *status));
            }
            Some(Reply::Deleted { .. }) => life.is_gone = true,
            Some(other) => panic!("{step}: {other:?}"),
            None => return life,
        }
    }
    life
}

/// What ran came to the end that was asked for.
#[track_caller]
fn assert_stopped(state: State, status: &Status, before: &Status, at: &str) {
    let end = (state, status.reason, status.exit_code, &status.container_id);
    assert_eq!(end, (State::Failed, Some(Reason::Stopped), Some(137), &before.container_id), "{at}: {status:?}");
}

/// What the next agent says of it first, against what the one before it said last.
fn judge(life: &Life, known: Reply, at: &str) {
    let (state, status) = match known {
        Reply::Status { state, status, .. } => (state, *status),
        reply => {
            assert_eq!(expect_error(reply).code, ErrorCode::NotFound, "{at}");
            assert!(life.told.is_none() || life.is_delete_asked, "{at}: {life:?} was accepted and is lost");
            return;
        }
    };
    assert!(!life.is_gone, "{at}: it was deleted, and is {state}");
    match &life.told {
        // Nobody was told anything; but nothing can have befallen it.
        None => assert!(!state.is_terminal(), "{at}: {state} {status:?}"),
        Some((State::Running, before)) if state == State::Running => assert_eq!(status.container_id, before.container_id, "{at}"),
        Some((State::Running, before)) => {
            assert!(life.is_stop_asked, "{at}: it ran, and is {state}: {status:?}");
            assert_stopped(state, &status, before, at);
        }
        Some((told, before)) => {
            assert_stopped(state, &status, before, at);
            assert_eq!((state, status.finished_at), (*told, before.finished_at), "{at}: an end that changed: {status:?}");
        }
    }
}

/// Lives one life after the other with an agent that dies at the first, second, .. pass of a failpoint, and has the next agent make
/// the best of it; how many deaths there were.
fn die_at_each_pass(failpoint: &str) -> usize {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    let witnesses = Witnesses::start(&place, &agent);
    for pass in 0..100 {
        let id = unique();
        let workload = with(forever(&place, &id), json!({"env": {"A": "b"}}));
        place.forget_calls();
        agent.terminate();
        let at = format!("{failpoint}@{pass}");
        let life = if agent.again_to_die(&at) { live(&agent, &workload) } else { Life::default() };
        if life.is_gone && !agent.has_died() {
            // What it has still to write may be its end, too.
            agent.daemon().signal("TERM");
            let code = agent.wait_for_end(SOON_MS);
            agent.again();
            witnesses.check(&place, &agent, &at);
            if code == Some(0) {
                return pass;
            }
        } else {
            until(&format!("the agent died at {at}: {life:?}"), || agent.has_died());
            agent.again();
        }
        judge(&life, agent.ask(&json!({"type": "GetStatus", "id": id})), &at);
        witnesses.check(&place, &agent, &at);
        // Whoever got no answer asks again.
        if life.told.is_none() {
            assert_eq!(agent.settle(&workload).0, State::Running, "{at}");
        }
        if !life.is_gone {
            match agent.ask(&json!({"type": "StopWorkload", "id": id, "wait_ms": SOON_MS})) {
                reply @ Reply::Status { .. } => {
                    let (state, status) = expect_status(reply);
                    assert_eq!((state, status.reason), (State::Failed, Some(Reason::Stopped)), "{at}: {status:?}");
                }
                reply => {
                    assert_eq!(expect_error(reply).code, ErrorCode::NotFound, "{at}");
                    assert!(life.is_delete_asked, "{at}: {life:?} is lost");
                }
            }
            agent.ask(&json!({"type": "DeleteWorkload", "id": id}));
        }
        gone_in_the_end(&place, &agent, &id);
        assert_eq!(starts(&place), 1, "{at}: how often code of the user's ran");
    }
    panic!("{failpoint}: no end after 100 passes")
}

#[test]
fn an_agent_that_dies_at_a_write_of_its_journal_remembers_what_it_said() {
    thread::scope(|scope| {
        for failpoint in ["agent-journal-before", "agent-journal-after", "agent-journal-rename-before", "agent-journal-rename-after"] {
            scope.spawn(move || {
                let passes = die_at_each_pass(failpoint);
                println!("{failpoint}: the agent died at {passes} passes");
                assert!(passes > 0, "{failpoint} was never passed");
            });
        }
    });
}

#[test]
fn an_agent_that_dies_over_a_log_directory_leaves_none() {
    thread::scope(|scope| {
        for failpoint in ["agent-logs-make-before", "agent-logs-make-after", "agent-logs-remove-before", "agent-logs-remove-after"] {
            scope.spawn(move || assert_eq!(die_at_each_pass(failpoint), 1, "{failpoint}: passes in a life"));
        }
    });
}

#[test]
fn an_agent_that_dies_while_it_compacts_its_journal_remembers_what_it_said() {
    thread::scope(|scope| {
        for failpoint in ["agent-journal-rename-before", "agent-journal-rename-after"] {
            scope.spawn(move || {
                let place = Place::sim(&["--no-events"]);
                let mut agent = place.agent(&[]);
                let witnesses = Witnesses::start(&place, &agent);
                // Each new set of labels writes all of it once more.
                let large = with(forever(&place, "large"), json!({"env": {"A": "x".repeat(30_000)}}));
                let before = agent.run(&large);
                let label = |n: u32| json!({"n": n.to_string()});
                let update = |n: u32| json!({"type": "UpdateWorkload", "id": "large", "labels": label(n)});
                agent.terminate();
                // The first renaming is that of the beginning; the second, third and fourth are of compactions.
                for at in 1..=3 {
                    let at = format!("{failpoint}@{at}");
                    assert!(agent.again_to_die(&at), "{at}");
                    let told = |n: &u32| match agent.attempt(&update(*n)) {
                        Some(reply) => expect_status(reply).0 == State::Running,
                        None => false,
                    };
                    let answered = (1..=200).take_while(told).last().expect("an answer");
                    until(&format!("the agent died at {at}"), || agent.has_died());
                    let length = std::fs::metadata(place.dir.join("agent/journal")).expect("a journal").len();
                    assert_eq!(length > 256 << 10, failpoint.ends_with("before"), "{at}: {length}");
                    agent.again();
                    witnesses.check(&place, &agent, &at);
                    // The one more that was not answered was on disk before the rest was written anew.
                    let labels =
                        agent.list().into_iter().find(|object| object.spec["id"] == "large").expect("listed").spec["labels"].clone();
                    assert!([label(answered), label(answered + 1)].contains(&labels), "{at}: {labels} after {answered}");
                    let (state, status) = agent.settle(&with(large.clone(), json!({"labels": labels})));
                    assert_eq!((state, &status.container_id), (State::Running, &before.container_id), "{at}");
                    agent.terminate();
                }
                agent.again();
            });
        }
    });
}
