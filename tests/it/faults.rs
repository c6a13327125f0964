//! What a start makes of every call that can fail, in every way it can: the state, the reason, and not a sandbox too many.
//!
//! A row is a fault of the simulator and what must come of it. The calls of a start, in order: ImageStatus, PullImage (where the
//! image is not there; then ImageStatus once more), RunPodSandbox, PodSandboxStatus, CreateContainer, StartContainer, ContainerStatus.

use std::thread;

use kakuri::workload::{Reason, State};
use serde_json::json;

use crate::harness::place::with;
use crate::harness::{Agent, Place, until};

/// What must come of a start.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// It runs, as this attempt.
    Runs(u32),
    /// It failed for this reason, with these words in its message.
    Fails(Reason, &'static str),
}
use Outcome::{Fails, Runs};

const IN_ORDER: [&str; 7] =
    ["ImageStatus", "PullImage", "RunPodSandbox", "PodSandboxStatus", "CreateContainer", "StartContainer", "ContainerStatus"];

/// Starts a workload under a fault and looks at what came of it, there and at the runtime.
fn check(place: &Place, agent: &Agent<'_>, spec: &str, start_deadline_ms: u64, outcome: Outcome) {
    let id = crate::harness::unique();
    // A new image each time, so that each start pulls.
    let image = format!("localhost/image-{id}:1");
    place.faults(&[spec]);
    let change = json!({"image": image, "start_deadline_ms": start_deadline_ms, "stop_grace_ms": 0});
    let (state, status) = agent.settle(&with(place.workload(&id, &["sleep", "1000"]), change));
    place.faults(&[]);
    match outcome {
        Runs(attempt) => {
            assert_eq!((state, status.attempt), (State::Running, attempt), "{spec}: {status:?}");
            assert_eq!((status.reason, &status.message, status.phase), (None, &None, None), "{spec}: {status:?}");
            let sandboxes = place.sandboxes_of(&id);
            let ids: Vec<&str> = sandboxes.iter().map(|s| s.id.as_str()).collect();
            assert_eq!(ids, [status.sandbox_id.as_deref().unwrap_or_default()], "{spec}");
            assert_eq!(sandboxes[0].metadata.as_ref().map(|m| m.attempt), Some(attempt), "{spec}");
        }
        Fails(reason, words) => {
            assert_eq!((state, status.reason), (State::Failed, Some(reason)), "{spec}: {status:?}");
            assert!(status.message.as_ref().is_some_and(|m| m.contains(words)), "{spec}: {words:?} is not in {:?}", status.message);
            assert_eq!((status.exit_code, status.started_at, status.phase), (None, None, None), "{spec}: {status:?}");
            assert!(status.finished_at.is_some(), "{spec}: {status:?}");
            until(&format!("{spec}: nothing is left at the runtime"), || place.sandboxes_of(&id).is_empty());
        }
    }
    agent.delete(&id);
}

/// Checks rows side by side, for most of them wait most of the time.
fn check_all(rows: &[Row<'_>]) {
    thread::scope(|scope| {
        for part in rows.chunks(rows.len().div_ceil(6)) {
            scope.spawn(move || {
                // Without events nobody but the start itself makes these calls.
                let place = Place::sim(&["--no-events"]);
                let agent = place.agent(&[]);
                part.iter().for_each(|(spec, outcome)| check(&place, &agent, spec, 30_000, *outcome));
            });
        }
    });
}

type Row<'a> = (&'a str, Outcome);

/// The same under a start deadline that is not enough.
fn check_late(methods: &[&str], start_deadline_ms: u64, rows: impl Fn(&str) -> Vec<(String, Outcome)> + Sync) {
    thread::scope(|scope| {
        for method in methods {
            let rows = &rows;
            scope.spawn(move || {
                let place = Place::sim(&["--no-events"]);
                let agent = place.agent(&[]);
                rows(method).iter().for_each(|(spec, outcome)| check(&place, &agent, spec, start_deadline_ms, *outcome));
            });
        }
    });
}

#[test]
fn an_error_of_each_call_has_its_reason() {
    check_all(&[
        ("ImageStatus:error=UNKNOWN,boom", Fails(Reason::ImagePullFailed, "ImageStatus: Unknown: boom")),
        ("PullImage:error=UNKNOWN,boom", Fails(Reason::ImagePullFailed, "PullImage: Unknown: boom")),
        ("PullImage:error=NOT_FOUND,boom", Fails(Reason::ImageNotFound, "PullImage: NotFound: boom")),
        ("RunPodSandbox:error=UNKNOWN,boom", Fails(Reason::CreateFailed, "RunPodSandbox: Unknown: boom")),
        ("RunPodSandbox:error=UNKNOWN,no runtime for \"runc\" is configured", Fails(Reason::HandlerUnavailable, "no runtime for")),
        ("PodSandboxStatus:error=UNKNOWN,boom", Fails(Reason::CreateFailed, "PodSandboxStatus: Unknown: boom")),
        ("CreateContainer:error=UNKNOWN,boom", Fails(Reason::CreateFailed, "CreateContainer: Unknown: boom")),
        ("StartContainer:error=UNKNOWN,boom", Fails(Reason::StartFailed, "StartContainer: Unknown: boom")),
        // By then it was said to have started; how it is, the next list says.
        ("ContainerStatus:error=UNKNOWN,boom", Runs(0)),
        // The effect is there and the answer is an error all the same.
        ("RunPodSandbox:error-after=UNKNOWN,boom", Fails(Reason::CreateFailed, "RunPodSandbox: Unknown: boom")),
        ("CreateContainer:error-after=UNKNOWN,boom", Fails(Reason::CreateFailed, "CreateContainer: Unknown: boom")),
        ("StartContainer:error-after=UNKNOWN,boom", Fails(Reason::StartFailed, "StartContainer: Unknown: boom")),
    ]);
}

#[test]
fn a_call_that_hangs_ends_with_the_start_deadline() {
    check_late(&IN_ORDER, 400, |method| {
        // An answer that is lost after StartContainer is settled by asking: but there is no time left to ask.
        // Which side is first to say that the time is over is a matter of luck.
        let outcome = if method == "ContainerStatus" { Runs(0) } else { Fails(Reason::StartDeadlineExceeded, "") };
        ["hang", "hang-after"].map(|action| (format!("{method}:{action}*1"), outcome)).to_vec()
    });
}

#[test]
fn a_connection_that_breaks_costs_an_attempt_at_most() {
    check_all(&[
        ("ImageStatus:drop*1", Runs(0)),
        ("ImageStatus:drop-after*1", Runs(0)),
        ("PullImage:drop*1", Runs(0)),
        ("PullImage:drop-after*1", Runs(0)),
        ("RunPodSandbox:drop*1", Runs(1)),
        // The answer is lost, the sandbox is there: it is looked for, and taken.
        ("RunPodSandbox:drop-after*1", Runs(0)),
        ("PodSandboxStatus:drop*1", Runs(0)),
        ("CreateContainer:drop*1", Runs(1)),
        ("CreateContainer:drop-after*1", Runs(1)),
        // Once the request may have left, code of the user's may have run, and it is never run again.
        ("StartContainer:drop*1", Fails(Reason::RuntimeUnavailable, "StartContainer: connection broken")),
        ("StartContainer:drop-after*1", Runs(0)),
        ("ContainerStatus:drop*1", Runs(0)),
    ]);
}

#[test]
fn a_stream_that_is_reset_was_answered_in_a_way() {
    check_all(&[
        ("ImageStatus:rst=2*1", Runs(0)),
        ("PullImage:rst=2*1", Runs(0)),
        ("RunPodSandbox:rst=2*1", Fails(Reason::CreateFailed, "RunPodSandbox: connection broken")),
        ("RunPodSandbox:rst-after=2*1", Runs(0)),
        ("CreateContainer:rst=2*1", Fails(Reason::CreateFailed, "CreateContainer: connection broken")),
        ("CreateContainer:rst-after=2*1", Fails(Reason::CreateFailed, "CreateContainer: connection broken")),
        ("StartContainer:rst=2*1", Fails(Reason::StartFailed, "StartContainer: connection broken")),
        ("StartContainer:rst-after=2*1", Runs(0)),
        // Refused means not seen: that is sent again.
        ("RunPodSandbox:rst=REFUSED_STREAM*1", Runs(0)),
        ("CreateContainer:rst=REFUSED_STREAM*1", Runs(0)),
        ("StartContainer:rst=REFUSED_STREAM*1", Runs(0)),
    ]);
}

#[test]
fn a_server_that_says_goodbye_costs_nothing() {
    let rows: Vec<String> = IN_ORDER.iter().map(|method| format!("{method}:goaway*1")).collect();
    check_all(&rows.iter().map(|spec| (spec.as_str(), Runs(0))).collect::<Vec<_>>());
}

#[test]
fn an_answer_that_is_none_is_never_believed() {
    for action in ["malformed", "giant", "no-status", "compressed"] {
        let row = |method: &str| format!("{method}:{action}*1");
        let words = if action == "giant" { "over the limit" } else { "not a gRPC answer" };
        check_all(&[
            (&row("ImageStatus"), Fails(Reason::ImagePullFailed, words)),
            (&row("PullImage"), Fails(Reason::ImagePullFailed, words)),
            // These had their effect, which is looked for.
            (&row("RunPodSandbox"), Runs(0)),
            (&row("PodSandboxStatus"), Fails(Reason::CreateFailed, words)),
            (&row("CreateContainer"), Fails(Reason::CreateFailed, words)),
            (&row("StartContainer"), Runs(0)),
            (&row("ContainerStatus"), Runs(0)),
        ]);
    }
}

#[test]
fn a_runtime_that_is_busy_is_tried_again() {
    check_all(&[
        ("ImageStatus:error=UNAVAILABLE,boom*1", Runs(1)),
        // Tried again as the pull it is, before there is a sandbox to count.
        ("PullImage:error=UNAVAILABLE,boom*1", Runs(0)),
        ("RunPodSandbox:error=UNAVAILABLE,boom*1", Runs(1)),
        ("RunPodSandbox:error-after=UNAVAILABLE,boom*1", Runs(0)),
        ("PodSandboxStatus:error=UNAVAILABLE,boom*1", Runs(1)),
        ("CreateContainer:error=UNAVAILABLE,boom*1", Runs(1)),
        ("CreateContainer:error-after=UNAVAILABLE,boom*1", Runs(1)),
        ("StartContainer:error=UNAVAILABLE,boom*1", Fails(Reason::RuntimeUnavailable, "StartContainer: Unavailable: boom")),
        ("StartContainer:error-after=UNAVAILABLE,boom*1", Runs(0)),
        ("ContainerStatus:error=UNAVAILABLE,boom*1", Runs(0)),
        ("CreateContainer:http=503*1", Runs(1)),
        // A name that is still held by what came to light late.
        ("RunPodSandbox:error=UNKNOWN,name \"x\" is reserved for \"y\"*1", Runs(1)),
        ("RunPodSandbox:error=UNAVAILABLE,boom*3", Runs(3)),
    ]);
}

#[test]
fn a_runtime_that_stays_away_ends_with_the_start_deadline_and_the_first_cause() {
    check_late(&IN_ORDER[..5], 900, |method| {
        let gone = (format!("{method}:error=UNAVAILABLE,gone fishing"), Fails(Reason::StartDeadlineExceeded, "gone fishing"));
        let closes = (format!("{method}:drop"), Fails(Reason::StartDeadlineExceeded, "connection broken"));
        vec![gone, closes]
    });
}

#[test]
fn while_a_start_is_tried_again_it_says_why() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    place.faults(&["RunPodSandbox:error=UNAVAILABLE,first cause*1", "RunPodSandbox:error=UNAVAILABLE,later cause@1"]);
    agent.start_workload(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    until("it was tried twice", || agent.status("wl-1").1.attempt >= 2);
    let (state, status) = agent.status("wl-1");
    assert_eq!((state, status.reason), (State::Pending, Some(Reason::RuntimeUnavailable)), "{status:?}");
    assert!(status.message.as_ref().is_some_and(|m| m.contains("first cause")), "the first cause stays: {status:?}");
    assert!(status.last_error.as_ref().is_some_and(|m| m.contains("later cause")), "{status:?}");
    place.faults(&[]);
    let (state, status) = agent.settle(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    assert_eq!((state, status.reason, status.message), (State::Running, None, None));
    assert_eq!(place.sandboxes().len(), 1);
}

#[test]
fn what_cannot_be_undone_at_once_is_swept_later() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    // The start fails, and neither stop nor removal of its sandbox works.
    place.faults(&["CreateContainer:error=UNKNOWN,boom", "StopPodSandbox:error=UNKNOWN,not now", "RemovePodSandbox:error=UNKNOWN,not now"]);
    let (state, status) = agent.settle(&place.workload("wl-1", &["true"]));
    assert_eq!((state, status.reason), (State::Failed, Some(Reason::CreateFailed)), "{status:?}");
    assert_eq!(place.sandboxes_of("wl-1").len(), 1);
    place.faults(&[]);
    until("it is swept", || place.sandboxes_of("wl-1").is_empty());
    assert_eq!(agent.status("wl-1").0, State::Failed);
}

#[test]
fn a_sandbox_that_comes_to_light_late_is_swept() {
    use kakuri::cri::proto::{PodSandboxConfig, PodSandboxMetadata};
    use kakuri::cri::runtime::{LABEL_NODE, LABEL_WORKLOAD};
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    // As a runtime that finishes RunPodSandbox after its caller gave up: the label is ours, and nobody waits for it.
    let late = |id: &str, attempt: u32| {
        let metadata = PodSandboxMetadata { name: id.into(), uid: id.into(), namespace: "kakuri".into(), attempt };
        let labels = [(LABEL_NODE, place.node.as_str()), (LABEL_WORKLOAD, id)].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let config = PodSandboxConfig { metadata: Some(metadata), labels, ..Default::default() };
        place.cri().run_pod_sandbox(&config, "runc", crate::harness::place::soon()).expect("a sandbox")
    };
    late("nobody-knows-me", 0);
    until("of a workload nobody knows", || place.sandboxes().is_empty());
    let status = agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    late("wl-1", 7);
    until("of another attempt", || place.sandboxes().len() == 1);
    assert_eq!(place.sandboxes()[0].id, status.sandbox_id.clone().unwrap_or_default());
    agent.stop_workload("wl-1");
    let before = place.sandboxes().len();
    late("wl-1", 8);
    until("of a workload that ended", || place.sandboxes().len() <= before);
    assert!(matches!(agent.status("wl-1").0, State::Failed));
}

#[test]
fn an_end_is_repeated_until_the_runtime_obeys() {
    let sleeper = |place: &Place, id: &str| with(place.workload(id, &["sleep", "1000"]), json!({"stop_grace_ms": 0}));
    thread::scope(|scope| {
        for fault in ["error=UNKNOWN,not now", "error=UNAVAILABLE,not now", "drop", "malformed", "giant", "rst=2", "no-status"] {
            scope.spawn(move || {
                let place = Place::sim(&[]);
                let agent = place.agent(&[]);
                agent.run(&sleeper(&place, "wl-1"));
                place.faults(&[&format!("StopContainer:{fault}*3")]);
                let (state, status) = agent.stop_workload("wl-1");
                assert_eq!(
                    (state, status.reason, status.exit_code),
                    (State::Failed, Some(Reason::Stopped), Some(137)),
                    "{fault}: {status:?}"
                );
                place.faults(&[&format!("StopPodSandbox:{fault}*1"), &format!("RemovePodSandbox:{fault}*1")]);
                agent.delete("wl-1");
                assert_eq!(place.sandboxes(), [], "{fault}");
            });
        }
    });
    // The trouble shows while it lasts.
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    agent.run(&sleeper(&place, "wl-1"));
    place.faults(&["StopContainer:error=UNKNOWN,not now"]);
    agent.ask(&json!({"type": "StopWorkload", "id": "wl-1"}));
    until("it says why it does not stop", || agent.status("wl-1").1.last_error.is_some_and(|e| e.contains("not now")));
    assert_eq!(agent.status("wl-1").0, State::Running);
    place.faults(&[]);
    agent.ended("wl-1");
}

#[test]
fn what_the_runtime_lost_is_said_to_be_lost() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let soon = crate::harness::place::soon;
    let status = agent.run(&place.workload("wl-1", &["sleep", "1000"]));
    place.cri().remove_pod_sandbox(status.sandbox_id.as_deref().unwrap_or_default(), soon()).expect("removed");
    let (state, status) = agent.ended("wl-1");
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::SandboxDied), None), "{status:?}");
    // A sandbox that died under its container: what was killed with it is not called a success.
    let status = agent.run(&place.workload("wl-2", &["sleep", "1000"]));
    place.cri().stop_pod_sandbox(status.sandbox_id.as_deref().unwrap_or_default(), soon()).expect("stopped");
    let (state, status) = agent.ended("wl-2");
    assert_eq!((state, status.exit_code, status.oom_killed), (State::Failed, Some(137), false), "{status:?}");
}

#[test]
fn a_state_the_runtime_does_not_know_is_not_invented() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    agent.run(&with(place.workload("wl-1", &["sleep", "1"]), json!({"stop_grace_ms": 0})));
    place.faults(&["unknown=runc"]);
    let asked = place.count("ContainerStatus");
    until("it was asked about", || place.count("ContainerStatus") > asked + 2);
    let (state, status) = agent.status("wl-1");
    assert_eq!((state, status.exit_code), (State::Running, None), "{status:?}");
    place.faults(&[]);
    let (state, status) = agent.ended("wl-1");
    assert_eq!((state, status.exit_code), (State::Succeeded, Some(0)), "{status:?}");
}
