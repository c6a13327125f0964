//! Isolation fails closed: what is asked of the runtime, what it says it gave, and what the guest says it is.

use std::thread;

use kakuri::wire::status::Isolation;
use kakuri::workload::{Reason, State};
use serde_json::json;

use crate::harness::daemon::{AGENT, command};
use crate::harness::place::with;
use crate::harness::{Agent, Place, until};

fn host_kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux").trim().to_owned()
}

/// The isolation of a workload when its probe is over.
fn probed(agent: &Agent<'_>, id: &str) -> Isolation {
    let isolation = || agent.status(id).1.isolation;
    let gave_up = |isolation: &Isolation| isolation.message.as_deref().is_some_and(|m| m.contains("the image has no uname"));
    until("the probe is over", || isolation().verified.is_some() || gave_up(&isolation()));
    isolation()
}

fn quick(place: &Place, id: &str, class: &str) -> serde_json::Value {
    with(place.workload(id, &["sleep", "1000"]), json!({"runtime_class": class, "stop_grace_ms": 0}))
}

scenarios! {
    a_class_is_what_it_says
}

fn a_class_is_what_it_says(place: &Place) {
    let agent = place.agent(&[]);
    agent.run(&quick(place, "wl-1", place.class));
    let isolation = probed(&agent, "wl-1");
    let handler = if place.class == "native" { "runc" } else { place.class };
    assert_eq!((isolation.verified, isolation.handler.as_deref()), (Some(true), Some(handler)), "{isolation:?}");
    assert_eq!(isolation.host_kernel, Some(host_kernel()));
    match isolation.kernel {
        Some(kernel) if place.class == "gvisor" => assert_ne!(kernel, host_kernel()),
        None if place.class == "native" => {}
        other => panic!("{}: {other:?}", place.class),
    }
}

#[test]
fn an_own_kernel_is_proven() {
    let place = Place::sim(&[]);
    let agent = place.agent(&["--runtime-class", "gvisor=gvisor", "--runtime-class", "kata=kata", "--runtime-class", "edera-zone=edera"]);
    for (class, kernel) in [("gvisor", "4.4.0"), ("kata", "6.12.0-kata"), ("edera-zone", "6.16.0-zone")] {
        agent.run(&with(quick(&place, class, class), json!({"memory_mb": 300})));
        let isolation = probed(&agent, class);
        assert_eq!((isolation.verified, isolation.kernel.as_deref(), isolation.message), (Some(true), Some(kernel), None), "{class}");
    }
}

#[test]
fn a_guest_on_the_host_s_kernel_is_killed() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    place.faults(&[&format!("kernel=gvisor:{}", host_kernel())]);
    agent.settle(&quick(&place, "wl-1", "gvisor"));
    let (state, status) = agent.ended("wl-1");
    assert_eq!(
        (state, status.reason, status.isolation.verified),
        (State::Failed, Some(Reason::IsolationMismatch), Some(false)),
        "{status:?}"
    );
    let words = format!("the guest answered with the host's own kernel, {}", host_kernel());
    assert_eq!(status.message, Some(words));
    until("the sandbox is stopped", || place.sandboxes().iter().all(|s| s.state == 1));
}

#[test]
fn an_image_that_cannot_answer_leaves_the_kernel_unknown() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    agent.run(&with(quick(&place, "wl-1", "gvisor"), json!({"image": "localhost/scratch:1"})));
    let isolation = probed(&agent, "wl-1");
    assert_eq!((isolation.verified, isolation.kernel), (None, None));
    assert_eq!(isolation.message.as_deref(), Some("the image has no uname or cat to answer the probe with"));
    assert_eq!(agent.status("wl-1").0, State::Running);
}

#[test]
fn a_probe_without_an_answer_is_asked_again() {
    thread::scope(|scope| {
        for fault in ["ExecSync:error=UNAVAILABLE,boom*2", "ExecSync:drop*1", "ExecSync:malformed*1", "ExecSync:rst=2*1"] {
            scope.spawn(move || {
                let place = Place::sim(&[]);
                let agent = place.agent(&[]);
                place.faults(&[fault]);
                agent.run(&quick(&place, "wl-1", "gvisor"));
                assert_eq!(probed(&agent, "wl-1").verified, Some(true), "{fault}");
            });
        }
    });
}

#[test]
fn no_code_of_the_user_s_runs_under_another_handler() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    for (class, lie) in [("gvisor", "runc"), ("native", "gvisor"), ("gvisor", "")] {
        place.faults(&[&format!("lie={lie}")]);
        place.forget_calls();
        let id = crate::harness::unique();
        let (state, status) = agent.settle(&quick(&place, &id, class));
        assert_eq!((state, status.reason), (State::Failed, Some(Reason::IsolationMismatch)), "{class} {lie}: {status:?}");
        let handler = if class == "native" { "runc" } else { class };
        assert_eq!(status.message, Some(format!("asked for a sandbox of handler {handler:?}, the runtime reports {lie:?}")));
        assert_eq!((place.count("RunPodSandbox"), place.count("CreateContainer"), place.count("StartContainer")), (1, 0, 0));
        until("the sandbox is gone", || place.sandboxes_of(&id).is_empty());
    }
}

#[test]
fn a_sandbox_that_changes_its_handler_is_stopped() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    agent.run(&quick(&place, "wl-1", "gvisor"));
    place.faults(&["lie=runc"]);
    let (state, status) = agent.ended("wl-1");
    assert_eq!((state, status.reason), (State::Failed, Some(Reason::IsolationMismatch)), "{status:?}");
    assert_eq!(status.message.as_deref(), Some("the sandbox had handler \"gvisor\" when it started, the runtime now reports \"runc\""));
    place.faults(&[]);
}

#[test]
fn no_request_goes_without_a_handler() {
    let place = Place::sim(&["--no-handler-list"]);
    let agent = place.agent(&[]);
    for class in ["native", "gvisor", "kata"] {
        agent.run(&quick(&place, class, class));
    }
    let handlers: Vec<String> = place
        .calls()
        .iter()
        .filter(|call| call.starts_with("RunPodSandbox "))
        .map(|call| call.split(" handler=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default().to_owned())
        .collect();
    assert_eq!(handlers, ["runc", "gvisor", "kata"]);
    let refused = |class: &str| {
        let output = command(AGENT).args(["--node-id", "n", "--check-config", "--runtime-class", class]).output().expect("runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for class in ["native=", "native", "=runc", "native= ", "native=@unix:///x"] {
        let (code, text) = refused(class);
        assert_eq!(code, Some(2), "{class}: {text}");
        assert!(text.contains("--runtime-class: "), "{class}: {text}");
    }
}

#[test]
fn a_start_asks_for_these_things_in_this_order() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    place.forget_calls();
    let status = agent.run(&with(quick(&place, "wl-1", "native"), json!({"image": "localhost/new:1"})));
    // What the relist asks has nothing to do with it.
    let of_the_start =
        |call: &String| !["List", "Status ", "Version", "GetContainerEvents", "ImageFsInfo"].iter().any(|other| call.starts_with(other));
    let calls: Vec<String> = place.calls().into_iter().filter(of_the_start).collect();
    let (sandbox, container) = (status.sandbox_id.unwrap_or_default(), status.container_id.unwrap_or_default());
    let uid = place.sandboxes()[0].metadata.clone().unwrap_or_default().uid;
    assert_eq!(uid.len(), 12, "{uid}");
    assert_eq!(
        calls,
        [
            "ImageStatus OK image=localhost/new:1".to_owned(),
            "PullImage OK image=localhost/new:1 pulls=1".to_owned(),
            // Which one it is now, exactly.
            "ImageStatus OK image=localhost/new:1".to_owned(),
            format!("RunPodSandbox OK name=wl-1_kakuri_{uid}_0 handler=runc sandbox={sandbox}"),
            format!("PodSandboxStatus OK sandbox={sandbox}"),
            format!("CreateContainer OK sandbox={sandbox} name=main container={container}"),
            format!("StartContainer OK container={container}"),
            format!("ContainerStatus OK container={container}"),
        ]
    );
}
