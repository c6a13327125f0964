//! A disk that is full: new work is refused, with the cause; nothing that was accepted is harmed; and all goes on when there is room.
//!
//! The disk is a small tmpfs in a mount namespace of its own, in which the test runs again as another process. That takes root.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use kakuri::wire::agent::{ErrorCode, Reply};
use kakuri::workload::State;
use serde_json::json;

use crate::harness::place::with;
use crate::harness::{Agent, Dir, Need, Place, Plane, can_mount, expect_error, skip, until};

/// Set for the process that runs a test in a mount namespace of its own: its small disk.
const SMALL_DISK: &str = "KAKURI_TEST_SMALL_DISK";

/// Runs a test with a disk of so many KiB; says so where this machine cannot have one.
fn on_a_small_disk(test: &str, kib: u32, run: impl FnOnce(&Disk)) {
    if let Some(disk) = std::env::var_os(SMALL_DISK) {
        return run(&Disk(PathBuf::from(disk)));
    }
    if !can_mount() {
        return skip(Need::Mounts, "a mount namespace takes root");
    }
    let dir = Dir::new();
    let disk = dir.join("disk");
    fs::create_dir(&disk).expect("made");
    let script = format!(r#"mount -t tmpfs -o size={kib}k kakuri "$0" && exec "$@""#);
    let mut command = Command::new("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-c", &script]).arg(&disk).arg(std::env::current_exe().expect("this"));
    command.args(["--exact", &format!("disk::{test}"), "--nocapture"]).env(SMALL_DISK, &disk);
    let output = command.output().expect("started");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
}

struct Disk(PathBuf);

impl Disk {
    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// Leaves no byte.
    fn fill(&self) {
        let mut file = OpenOptions::new().create(true).append(true).open(self.0.join("fill")).expect("a file");
        for size in [4096, 1] {
            while file.write_all(&vec![b'x'; size]).is_ok() {}
        }
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("fill")).expect("it was filled");
    }
}

#[test]
fn an_agent_with_a_full_disk_takes_no_work_and_loses_none() {
    on_a_small_disk("an_agent_with_a_full_disk_takes_no_work_and_loses_none", 512, |disk| {
        takes_no_work_and_loses_none(&Place::sim(&[]), disk);
    });
}

fn takes_no_work_and_loses_none(place: &Place, disk: &Disk) {
    let logs = place.dir.join("logs").display().to_string();
    let mut agent = place.agent(&["--state-dir", &disk.path("state"), "--log-dir", &logs]);
    let forever = |id: &str| with(place.workload(id, &["sleep", "1000"]), json!({"stop_grace_ms": 0}));
    let before = agent.run(&forever("before"));
    agent.settle(&place.workload("over", &["sh", "-c", "exit 4"]));
    agent.ended("over");

    disk.fill();
    // The last page of the journal may have room for some; what is accepted is kept.
    let start = |agent: &Agent<'_>, id: &str| match agent.ask(&json!({"type": "StartWorkload", "workload": forever(id)})) {
        Reply::Status { .. } => true,
        reply => {
            let error = expect_error(reply);
            assert!(matches!(error.code, ErrorCode::ResourceExhausted | ErrorCode::Unavailable), "{error:?}");
            assert!(error.message.contains("No space left on device"), "{error:?}");
            false
        }
    };
    let accepted: Vec<String> = (0..100).map(|i| format!("late-{i}")).take_while(|id| start(&agent, id)).collect();
    assert!(accepted.len() < 100, "the disk was not full");
    assert!(!start(&agent, "refused"));
    until("the node says why it takes no work", || {
        let node = agent.node();
        !node.ready && node.conditions.iter().any(|c| !c.ok && c.message.contains("No space left on device"))
    });
    assert_eq!(agent.status("before").0, State::Running);
    match agent.ask(&json!({"type": "Exec", "id": "before", "command": ["echo", "alive"]})) {
        Reply::ExecResult(result) => assert_eq!(result.stdout, "alive\n"),
        other => panic!("{other:?}"),
    }
    assert_eq!(place.sandboxes_of("refused"), [], "what was refused was not begun");
    // Killed on a full disk, it may not begin again, and says why; or it does, and knows all.
    agent.kill();
    if agent.try_again() {
        assert_eq!(agent.status("before").0, State::Running);
        agent.kill();
    } else {
        let log = fs::read_to_string(place.dir.join("agent.log")).expect("a log");
        assert!(log.lines().last().is_some_and(|line| line.contains("No space left on device")), "{log}");
    }

    disk.empty();
    agent.again();
    let (state, status) = agent.status("before");
    assert_eq!((state, status.container_id), (State::Running, before.container_id));
    let (state, status) = agent.status("over");
    assert_eq!((state, status.exit_code), (State::Failed, Some(4)), "{status:?}");
    assert_eq!(expect_error(agent.ask(&json!({"type": "GetStatus", "id": "refused"}))).code, ErrorCode::NotFound);
    for id in &accepted {
        agent.run(&forever(id));
    }
    agent.run(&forever("refused"));
    // And once more, without a new agent in between.
    disk.fill();
    assert!((0..100).map(|i| format!("later-{i}")).any(|id| !start(&agent, &id)), "the disk was not full");
    disk.empty();
    until("the node is ready again", || agent.node().ready);
    agent.run(&forever("third"));
    agent.stop_workload("before");
}

#[test]
fn a_control_plane_with_a_full_disk_accepts_nothing_and_loses_nothing() {
    on_a_small_disk("a_control_plane_with_a_full_disk_accepts_nothing_and_loses_nothing", 8192, |disk| {
        accepts_nothing_and_loses_nothing(&Place::sim(&[]), disk);
    });
}

fn accepts_nothing_and_loses_nothing(place: &Place, disk: &Disk) {
    let agent = place.agent(&[]);
    let mut plane = Plane::start(place, &[&agent], &["--data-dir", &disk.path("data")]);
    // Large ones, so that few of them fill what the store has in reserve.
    let large = "x".repeat(30_000);
    let more = json!({"stop_grace_ms": 0, "env": {"A": large, "B": large, "C": large}});
    let forever = |id: &str| with(place.workload(id, &["sleep", "1000"]), more.clone());
    plane.run(&forever("before"));

    disk.fill();
    // The store may have room inside for some; what is accepted is kept.
    let mut accepted = Vec::new();
    let refusal = (0..60).map(|i| format!("late-{i}")).find_map(|id| {
        let answer = plane.post("/workloads", &forever(&id));
        if answer.status == 201 {
            accepted.push(id);
            return None;
        }
        Some((id, answer))
    });
    let (refused, answer) = refusal.expect("the disk was not full");
    assert!(matches!(answer.status, 503 | 507), "{} {}", answer.status, answer.text());
    assert!(!answer.problem().1.is_empty());
    assert_eq!(plane.get(&format!("/workloads/{refused}")).status, 404);
    assert_eq!(plane.workload("before")["state"], "Running");
    plane.kill();
    disk.empty();
    plane.again();
    plane.wait_until_ready();
    for id in accepted.iter().map(String::as_str).chain(["before"]) {
        let there = plane.get(&format!("/workloads/{id}?for=running&wait_ms=20000"));
        assert_eq!((there.status, &there.json()["state"]), (200, &json!("Running")), "{id}: {}", there.text());
    }
    assert_eq!(plane.get(&format!("/workloads/{refused}")).status, 404);
    plane.run(&forever(&refused));
    // And once more, without a new control plane in between.
    disk.fill();
    let is_refused = |id: &str| matches!(plane.post("/workloads", &forever(id)).status, 503 | 507);
    assert!((0..60).any(|i| is_refused(&format!("later-{i}"))), "the disk was not full");
    disk.empty();
    until("it takes work again", || plane.post("/workloads", &forever("third")).status == 201);
}
