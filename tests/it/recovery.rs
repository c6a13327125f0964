//! Any part dies at any moment, and the whole comes back to the truth.

use std::thread;

use kakuri::cri::proto::{ContainerState, PodSandboxConfig, PodSandboxMetadata};
use kakuri::cri::runtime::{ANNOTATION_WORKLOAD, LABEL_NODE, LABEL_WORKLOAD};
use kakuri::limits;
use kakuri::wire::agent::{ErrorCode, Reply};
use kakuri::workload::{Phase, Reason, State};
use serde_json::json;

use crate::harness::place::{soon, with};
use crate::harness::{Place, expect_error, until, within};

scenarios! {
    a_killed_agent_finds_what_it_left
    a_stopped_agent_leaves_workloads_running
    what_is_not_ours_is_not_touched
}

fn a_killed_agent_finds_what_it_left(place: &Place) {
    let mut agent = place.agent(&[]);
    let runs = with(place.workload("runs", &["sleep", "1000"]), json!({"stop_grace_ms": 0, "env": {"A": "b"}, "labels": {"app": "web"}}));
    let before = agent.run(&runs);
    agent.settle(&place.workload("ended", &["sh", "-c", "echo bye; exit 7"]));
    let ended = agent.ended("ended").1;
    agent.run(&place.workload("ends-meanwhile", &["sh", "-c", "sleep 0.7; echo late; exit 8"]));
    let mine: Vec<String> = place.containers().iter().map(|c| c.id.clone()).collect();
    agent.kill();
    let exited = |id: &str| place.cri().container_status(id, soon()).is_ok_and(|s| s.finished_at > 0);
    until("one ends while nobody looks", || mine.iter().filter(|id| exited(id)).count() == 2);
    agent.again();

    let (state, after) = agent.status("runs");
    assert_eq!((state, &after.container_id, &after.sandbox_id), (State::Running, &before.container_id, &before.sandbox_id));
    assert_eq!((after.started_at, &after.handler, after.attempt), (before.started_at, &before.handler, before.attempt));
    let (state, again) = agent.status("ended");
    assert_eq!((state, again.reason, again.exit_code), (State::Failed, Some(Reason::Error), Some(7)), "{again:?}");
    assert_eq!(again.finished_at, ended.finished_at);
    let (state, status) = agent.status("ends-meanwhile");
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::Error), Some(8)), "{status:?}");
    assert_eq!(agent.logs(json!({"id": "ends-meanwhile"})).into_iter().map(|l| l.line).collect::<Vec<_>>(), ["late"]);
    // Nothing was started again.
    let mut now: Vec<String> = place.containers().iter().map(|c| c.id.clone()).collect();
    let mut mine = mine;
    mine.sort();
    now.sort();
    assert_eq!(now, mine);
    // The same workload is still the same, and another is another.
    let (state, same) = agent.settle(&runs);
    assert_eq!((state, same.container_id), (State::Running, before.container_id));
    let other = with(runs, json!({"labels": {"app": "db"}}));
    let error = expect_error(agent.ask(&json!({"type": "StartWorkload", "workload": other})));
    assert_eq!(error.code, ErrorCode::AlreadyExists);
    let object = agent.list().into_iter().find(|o| o.spec["id"] == "runs").expect("listed");
    assert_eq!(object.spec["labels"], json!({"app": "web"}));
}

fn a_stopped_agent_leaves_workloads_running(place: &Place) {
    let mut agent = place.agent(&[]);
    let before = agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let mut follower = agent.line();
    follower.tell(&json!({"type": "GetLogs", "id": "wl-1", "follow": true}));
    let mut waiting = agent.line();
    waiting.tell(&json!({"type": "GetStatus", "id": "wl-1", "for": "terminal", "wait_ms": 600_000}));
    until("both are served", || agent.connections() >= 2 && agent.unread() == 0);
    agent.terminate();
    // Whoever waited got an answer; whoever followed was cut off, and not told that the log ended.
    assert!(matches!(waiting.next(), Some(Reply::Status { state: State::Running, .. })));
    assert_eq!((follower.next(), waiting.next()), (None, None));
    assert_eq!(place.sandboxes().iter().map(|s| s.state).collect::<Vec<_>>(), [0]);
    agent.again();
    let (state, after) = agent.status("wl-1");
    assert_eq!((state, after.container_id, after.started_at), (State::Running, before.container_id, before.started_at));
}

fn what_is_not_ours_is_not_touched(place: &Place) {
    let handler = if place.class == "native" { "runc" } else { place.class };
    let make = |name: &str, labels: &[(&str, &str)], annotations: &[(&str, &str)]| {
        let owned = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let name = format!("{name}-{}", place.node);
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata { name: name.clone(), uid: name, namespace: "others".into(), attempt: 0 }),
            labels: owned(labels),
            annotations: owned(annotations),
            ..Default::default()
        };
        place.cri().run_pod_sandbox(&config, handler, soon()).expect("a sandbox")
    };
    let neighbour = format!("{}-b", place.node);
    let foreign = [
        make("plain", &[], &[]),
        make("pod", &[("io.kubernetes.pod.name", "x")], &[]),
        // Another agent's on the same runtime, even of a workload with an id that we have too.
        make("neighbour", &[(LABEL_NODE, &neighbour), (LABEL_WORKLOAD, "wl-1")], &[(ANNOTATION_WORKLOAD, "{}")]),
    ];
    let mut agent = place.agent(&["--relist-ms", "100"]);
    agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    agent.kill();
    agent.again();
    agent.delete("wl-1");
    let observed = agent.node().observed_at;
    until("it looked again", || agent.node().observed_at > observed);
    let cri = place.cri();
    for id in &foreign {
        assert_eq!(cri.pod_sandbox_status(id, soon()).expect("it is still there").state, 0, "ready");
    }
    drop(agent);
    for id in foreign {
        cri.stop_pod_sandbox(&id, soon()).expect("stopped");
        cri.remove_pod_sandbox(&id, soon()).expect("removed");
    }
}

#[test]
fn a_directory_of_somebody_else_s_is_not_touched() {
    // Container logs usually live under /var/log, which is full of directories with names like those of workloads.
    let place = Place::sim(&[]);
    std::fs::create_dir_all(place.dir.join("var-log/apt")).expect("made");
    std::fs::create_dir_all(place.dir.join("var-log/private")).expect("made");
    place.dir.write("var-log/apt/history.log", "precious");
    let logs = place.dir.join("var-log").display().to_string();
    let mut agent = place.agent(&["--log-dir", &logs]);
    let neighbour = place.agent_named("b", &["--log-dir", &logs]);
    neighbour.settle(&place.workload("theirs", &["echo", "precious"]));
    neighbour.ended("theirs");
    place.faults(&["StartContainer:hang*1"]);
    agent.start_workload(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    until("it hangs", || place.calls().iter().any(|call| call.starts_with("StartContainer hang")));
    agent.kill();
    agent.again();
    agent.delete("wl-1");
    until("half a start is removed", || place.is_clear_of(&agent.node));
    assert_eq!(std::fs::read_to_string(place.dir.join("var-log/apt/history.log")).ok().as_deref(), Some("precious"));
    assert!(place.dir.join("var-log/private").exists());
    assert_eq!(neighbour.logs(json!({"id": "theirs"})).into_iter().map(|l| l.line).collect::<Vec<_>>(), ["precious"]);
}

#[test]
fn a_sandbox_of_ours_that_cannot_be_read_is_left_alone() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let sandbox = place.sandboxes().remove(0);
    let container = place.containers().remove(0);
    agent.delete("wl-1");
    agent.terminate();
    // What a version of the future may write: the same labels, a spec this version has no field for.
    let labels = sandbox.labels.clone();
    let spec = with(place.workload("wl-1", &["sleep", "1000"]), json!({"from_the_future": 1}));
    let config = PodSandboxConfig {
        metadata: sandbox.metadata.clone(),
        labels: labels.clone(),
        annotations: [(ANNOTATION_WORKLOAD.to_owned(), spec.to_string())].into(),
        ..Default::default()
    };
    let cri = place.cri();
    let id = cri.run_pod_sandbox(&config, "runc", soon()).expect("a sandbox");
    let inside = kakuri::cri::proto::ContainerConfig {
        metadata: container.metadata.clone(),
        image: container.image.clone(),
        command: vec!["sleep".into(), "1000".into()],
        labels,
        ..Default::default()
    };
    let inside = cri.create_container(&id, inside, &config, soon()).expect("a container");
    cri.start_container(&inside, soon()).expect("started");
    agent.again();
    let observed = agent.node().observed_at;
    until("it looked again", || agent.node().observed_at > observed);
    assert_eq!(agent.list(), []);
    assert!(cri.container_status(&inside, soon()).is_ok_and(|s| s.finished_at == 0));
    let log = std::fs::read_to_string(place.dir.join("agent.log")).expect("a log");
    assert!(log.contains("cannot be taken up and is left alone: /from_the_future: unknown field"), "{log}");
    cri.stop_pod_sandbox(&id, soon()).expect("stopped");
    cri.remove_pod_sandbox(&id, soon()).expect("removed");
}

#[test]
fn what_a_runtime_lost_track_of_does_not_run_for_ever() {
    let place = Place::sim(&[]);
    let agent = place.agent(&["--relist-ms", "200"]);
    // A long grace, which a worker does not wait for.
    agent.run_until_ready(&with(place.workload("once", &place.stubborn()), json!({"stop_grace_ms": 4000})));
    agent.run(&with(place.workload("again", &["sleep", "1000"]), json!({"restart_policy": "always", "restart_backoff_ms": 100})));
    let seen = |id: &str| agent.status(id).1;
    place.faults(&["unknown=runc"]);
    let is_stopping = |id: &str| (seen(id).phase == Some(Phase::Stopping)).then_some(());
    within(limits::UNKNOWN_MS_MAX * 3, || is_stopping("once").and(is_stopping("again"))).expect("they are stopped");
    let was_stopped =
        |id: &str| seen(id).last_error.is_some_and(|error| error.contains("says it stopped the container, and that it is Unknown"));
    until("one obeyed", || was_stopped("again"));
    until("the other was killed after its grace", || was_stopped("once"));
    assert_eq!((agent.status("again").0, agent.status("once").0), (State::Running, State::Running), "nobody said that they ended");
    place.faults(&[]);
    let (state, status) = agent.ended("once");
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::RuntimeUnavailable), Some(137)), "{status:?}");
    assert!(status.message.is_some_and(|message| message.contains("lost track")), "it says why");
    until("its policy goes on", || seen("again").restarts == 1 && agent.status("again").0 == State::Running);
    assert_eq!(place.containers().iter().filter(|c| c.state() == ContainerState::ContainerRunning).count(), 1);
}

#[test]
fn what_was_made_and_never_asked_to_run_did_not() {
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    let workload = place.workload("wl-1", &["sleep", "1000"]);
    // A containerd that is killed before it has written down what it made calls that unknown.
    place.faults(&["CreateContainer:hang-after*1"]);
    agent.start_workload(&workload);
    until("it is made", || place.containers().len() == 1);
    let half = place.containers().remove(0).id;
    agent.kill();
    place.faults(&["unknown=runc"]);
    agent.again();
    until("it is gone", || place.containers().iter().all(|container| container.id != half));
    place.faults(&[]);
    let (state, status) = agent.settle(&workload);
    assert_eq!((state, status.attempt, status.restarts), (State::Running, 1, 0), "{status:?}");
    assert_eq!((place.sandboxes().len(), place.containers().len()), (1, 1));
    let log = std::fs::read_to_string(place.dir.join("agent.log")).expect("a log");
    assert!(!log.contains("taken up again"), "{log}");
}

#[test]
fn an_agent_that_dies_in_a_start_leaves_one_sandbox_or_none() {
    // Without events, whose questions would meet the faults that are meant for the start.
    let place = Place::sim(&["--no-events"]);
    let mut agent = place.agent(&[]);
    for method in ["ImageStatus", "PullImage", "RunPodSandbox", "PodSandboxStatus", "CreateContainer", "StartContainer", "ContainerStatus"]
    {
        for action in ["hang", "hang-after"] {
            let id = crate::harness::unique();
            place.faults(&[&format!("{method}:{action}*1")]);
            place.forget_calls();
            let workload =
                with(place.workload(&id, &["sleep", "1000"]), json!({"image": format!("localhost/i{id}:1"), "stop_grace_ms": 0}));
            agent.start_workload(&workload);
            until(&format!("{method} hangs"), || place.calls().iter().any(|call| call.starts_with(&format!("{method} hang"))));
            agent.kill();
            place.faults(&[]);
            agent.again();
            let lives = matches!((method, action), ("StartContainer", "hang-after") | ("ContainerStatus", _));
            // What was accepted is started, though nobody asks for it again; and half a start goes before the next begins.
            let (state, settled) = agent.settle(&workload);
            assert_eq!((state, settled.attempt), (State::Running, u32::from(!lives)), "{method} {action}: {settled:?}");
            until("one sandbox, this one", || {
                let ids: Vec<String> = place.sandboxes_of(&id).into_iter().map(|s| s.id).collect();
                ids == [settled.sandbox_id.clone().unwrap_or_default()]
            });
            // The user's code ran once: one container was started, whoever asked for it.
            let calls = place.calls();
            let by_the_first = (method, action) == ("StartContainer", "hang-after");
            let started = calls.iter().filter(|call| call.starts_with("StartContainer OK")).count() + usize::from(by_the_first);
            assert_eq!(started, 1, "{method} {action}: {calls:?}");
            agent.delete(&id);
            // So that nothing asked about this one is still on its way.
            agent.kill();
            agent.again();
        }
    }
}

#[test]
fn a_runtime_that_dies_in_a_start_is_waited_for() {
    thread::scope(|scope| {
        for method in
            ["ImageStatus", "PullImage", "RunPodSandbox", "PodSandboxStatus", "CreateContainer", "StartContainer", "ContainerStatus"]
        {
            scope.spawn(move || dies_in(method));
        }
    });
}

fn dies_in(method: &str) {
    let place = Place::sim(&["--persist"]);
    let agent = place.agent(&[]);
    for action in ["exit", "exit-after"] {
        let id = crate::harness::unique();
        place.faults(&[&format!("{method}:{action}*1")]);
        let workload = with(place.workload(&id, &["sleep", "1000"]), json!({"image": format!("localhost/i{id}:1"), "stop_grace_ms": 0}));
        agent.start_workload(&workload);
        place.wait_for_sim_to_end();
        place.faults(&[]);
        place.start_sim();
        let (state, status) = agent.settle(&workload);
        if method == "StartContainer" {
            // Code of the user's may have run; it is not run again.
            assert_eq!((state, status.reason), (State::Failed, Some(Reason::RuntimeUnavailable)), "{method} {action}: {status:?}");
            until("nothing is left", || place.sandboxes_of(&id).is_empty());
        } else {
            assert_eq!(state, State::Running, "{method} {action}: {status:?}");
            until("one sandbox, this one", || {
                let ids: Vec<String> = place.sandboxes_of(&id).into_iter().map(|s| s.id).collect();
                ids == [status.sandbox_id.clone().unwrap_or_default()]
            });
        }
        agent.delete(&id);
    }
}

#[test]
fn a_runtime_that_is_away_changes_no_state() {
    let place = Place::sim(&["--persist"]);
    let agent = place.agent(&[]);
    agent.run(&with(place.workload("stays", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    agent.run(&place.workload("ends", &["sh", "-c", "sleep 0.5; exit 5"]));
    place.kill_sim();
    until("the node is not ready", || !agent.node().ready);
    let node = agent.node();
    assert!(node.conditions.iter().any(|c| c.r#type == "RuntimeAnswers" && !c.ok && c.message.contains("cannot connect")), "{node:?}");
    let seen = agent.status("stays").1.observed_at;
    // New work is taken and waits, for whoever asks cannot know that it is a bad moment.
    let (state, _) = agent.start_workload(&with(place.workload("waits", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    assert_eq!(state, State::Pending);
    until("it was tried", || agent.status("waits").1.attempt > 1);
    let (state, status) = agent.status("waits");
    assert_eq!((state, status.reason), (State::Pending, Some(Reason::RuntimeUnavailable)), "{status:?}");
    for id in ["stays", "ends"] {
        assert_eq!(agent.status(id).0, State::Running, "{id}");
    }
    assert_eq!(agent.status("stays").1.observed_at, seen, "nobody saw it since");
    let error = expect_error(agent.ask(&json!({"type": "Exec", "id": "stays", "command": ["true"], "timeout_ms": 1000})));
    assert_eq!(error.code, ErrorCode::Unavailable, "{error:?}");
    // A stop is remembered.
    let (state, _) = agent.settle(&with(place.workload("stays", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    assert_eq!(state, State::Running);
    agent.ask(&json!({"type": "StopWorkload", "id": "stays"}));

    place.start_sim();
    until("the node is ready again", || agent.node().ready);
    let (state, status) = agent.ended("ends");
    assert_eq!((state, status.exit_code), (State::Failed, Some(5)), "{status:?}");
    let (state, status) = agent.ended("stays");
    assert_eq!((state, status.reason), (State::Failed, Some(Reason::Stopped)), "{status:?}");
    let (state, _) = agent.settle(&with(place.workload("waits", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    assert_eq!(state, State::Running);
    assert_eq!(place.sandboxes_of("waits").len(), 1);
}

#[test]
fn an_agent_may_start_before_its_runtime() {
    let place = Place::sim(&["--persist"]);
    place.kill_sim();
    let mut agent = place.agent_now(&[]);
    assert!(!agent.node().ready);
    let error = expect_error(agent.ask(&json!({"type": "StartWorkload", "workload": place.workload("wl-1", &["true"])})));
    assert_eq!(error.code, ErrorCode::Unavailable, "{error:?}");
    place.start_sim();
    agent.wait_until_ready();
    agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
}

#[test]
fn what_an_agent_was_killed_over_making_or_removing_is_cleared_away() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    agent.terminate();
    let logs = place.dir.join("agent/logs");
    let mark = format!(".kakuri-{}", place.node);
    // Made, and not marked yet; marked, and not in place yet; somebody else's.
    std::fs::create_dir_all(logs.join(".wl-1.abcdefghijkl.new")).expect("made");
    std::fs::create_dir_all(logs.join(".wl-2.abcdefghijkl.new")).expect("made");
    std::fs::write(logs.join(".wl-2.abcdefghijkl.new").join(mark), "").expect("written");
    std::fs::create_dir_all(logs.join(".wl-3.abcdefghijkl.new")).expect("made");
    std::fs::write(logs.join(".wl-3.abcdefghijkl.new/precious"), "x").expect("written");
    agent.again();
    let names = || {
        let entries = std::fs::read_dir(&logs).expect("a directory").flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    until("only what is not ours is left", || names() == [".wl-3.abcdefghijkl.new"]);
    std::fs::remove_dir_all(logs.join(".wl-3.abcdefghijkl.new")).expect("ours again");
}

#[test]
fn a_list_is_whole_or_refused() {
    let place = Place::sim(&["--persist"]);
    let mut agent = place.agent(&[]);
    agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    agent.kill();
    place.kill_sim();
    agent.again_now();
    // It runs, and the agent cannot know yet: an empty list would be a lie.
    let error = expect_error(agent.ask(&json!({"type": "ListWorkloads"})));
    assert_eq!(error.code, ErrorCode::Unavailable, "{error:?}");
    place.start_sim();
    agent.wait_until_ready();
    assert_eq!(agent.list().len(), 1);
}

#[test]
fn a_stop_finishes_what_is_in_flight() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    place.faults(&["RunPodSandbox:delay-after=700*1"]);
    agent.start_workload(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    until("it is in the middle", || place.sandboxes().len() == 1);
    agent.terminate();
    agent.again();
    assert_eq!(agent.status("wl-1").0, State::Running);
}

/// Both take the whole drain, so they run side by side.
#[test]
fn a_stop_is_bounded_whatever_hangs() {
    thread::scope(|scope| {
        scope.spawn(|| {
            let place = Place::sim(&[]);
            let mut agent = place.agent(&[]);
            place.faults(&["RunPodSandbox:hang*1"]);
            agent.start_workload(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
            until("it hangs", || place.calls().iter().any(|call| call.starts_with("RunPodSandbox hang")));
            agent.terminate();
            agent.again();
            assert_eq!(agent.settle(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0}))).0, State::Running);
            assert_eq!(place.sandboxes().len(), 1);
        });
        scope.spawn(|| {
            let place = Place::sim(&[]);
            let mut agent = place.agent(&[]);
            agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
            let mut line = agent.line();
            line.tell(&json!({"type": "Exec", "id": "wl-1", "command": ["sleep", "600"], "timeout_ms": 600_000}));
            until("it runs", || agent.connections() == 2);
            agent.terminate();
            agent.again();
        });
    });
}

#[test]
fn a_second_signal_ends_the_agent_at_once() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    place.faults(&["RunPodSandbox:hang*1"]);
    agent.start_workload(&place.workload("wl-1", &["true"]));
    until("it hangs", || place.calls().iter().any(|call| call.starts_with("RunPodSandbox hang")));
    agent.daemon().signal("TERM");
    until("it was told", || {
        std::fs::read_to_string(place.dir.join("agent.log")).is_ok_and(|log| log.contains("stopping; workloads go on"))
    });
    agent.daemon().signal("TERM");
    assert_eq!(agent.wait_for_end(3000), Some(1));
    place.faults(&[]);
    until("the simulator lost its client", || place.sandboxes().is_empty());
}
