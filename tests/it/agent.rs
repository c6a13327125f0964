//! What an agent does with workloads: the same on the simulator and on a real runtime.

use std::os::unix::fs::PermissionsExt;

use kakuri::net::Address;
use kakuri::wire::agent::{ErrorCode, Event, EventKind, LogStream, Object, Reply};
use kakuri::workload::{Phase, Reason, State};
use serde_json::{Value, json};

use crate::harness::agent::read_logs;
use crate::harness::daemon::{AGENT, command};
use crate::harness::place::{IMAGE, with};
use crate::harness::{Line, Place, SOON_MS, brief, eventually, expect_error, expect_status, until};

scenarios! {
    a_workload_runs_to_its_end
    a_workload_that_does_its_job_succeeds
    a_command_that_does_not_exist_is_a_failed_start
    the_same_again_is_the_same_and_another_is_refused
    a_polite_stop_is_enough_for_the_polite
    a_stubborn_workload_is_killed_after_its_grace
    a_time_to_live_ends_a_workload
    deleting_a_running_workload_leaves_nothing
    an_answer_does_not_wait_for_a_deletion_longer_than_asked
    a_command_runs_inside
    lists_come_in_pages
    a_watch_sees_every_change
    a_log_is_followed_to_its_end
    the_end_of_a_workload_is_noticed_by_relisting
    twenty_start_at_a_time
    a_unix_socket_is_for_its_owner_alone
    the_node_says_what_it_is
    secrets_stay_where_they_are
}

fn a_workload_runs_to_its_end(place: &Place) {
    let agent = place.agent(&[]);
    let command = "echo one; sleep 0.2; echo two >&2; sleep 0.2; echo three; exit 3";
    let workload = place.workload("wl-1", &["sh", "-c", command]);

    let (state, status) = agent.start_workload(&workload);
    assert_eq!(state, State::Pending, "{status:?}");
    assert_eq!((status.node.as_deref(), status.attempt, status.restarts), (Some(place.node.as_str()), 0, 0));
    assert_eq!((status.exit_code, status.started_at, status.finished_at), (None, None, None));

    let (state, status) = agent.settle(&workload);
    assert_eq!(state, State::Running, "{status:?}");
    assert_eq!((status.reason, status.phase, status.exit_code, status.oom_killed), (None, None, None, false));
    let sandboxes = place.sandboxes_of("wl-1");
    assert_eq!(sandboxes.iter().map(|s| Some(s.id.clone())).collect::<Vec<_>>(), [status.sandbox_id.clone()]);
    assert_eq!(sandboxes.iter().map(|s| Some(s.runtime_handler.clone())).collect::<Vec<_>>(), [status.handler.clone()]);
    assert_eq!(place.containers().iter().map(|c| Some(c.id.clone())).collect::<Vec<_>>(), [status.container_id.clone()]);
    // None, where the image came from no registry.
    assert!(status.image_digest.as_ref().is_none_or(|d| d.starts_with("sha256:") && d.len() == 71), "{status:?}");
    assert!(status.ip.as_ref().is_some_and(|ip| ip.parse::<std::net::IpAddr>().is_ok()), "{status:?}");
    let times = status.timings_ms;
    let steps = [times.pull, times.sandbox, times.create, times.start].map(|step| step.expect("a step that was taken"));
    assert!(times.total >= Some(steps.iter().sum()), "{times:?}");

    let (state, status) = agent.ended("wl-1");
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::Error), Some(3)), "{status:?}");
    assert_eq!((status.oom_killed, status.phase), (false, None));
    assert!(status.created_at <= status.started_at.expect("it ran") && status.started_at < status.finished_at, "{status:?}");

    let text = |request| agent.logs(request).into_iter().map(|l| (l.stream, l.line)).collect::<Vec<_>>();
    let all = [(LogStream::Stdout, "one"), (LogStream::Stderr, "two"), (LogStream::Stdout, "three")].map(|(s, l)| (s, l.to_owned()));
    assert_eq!(text(json!({"id": "wl-1"})), all);
    assert_eq!(text(json!({"id": "wl-1", "tail": 2})), all[1..]);
    assert_eq!(text(json!({"id": "wl-1", "tail": 0})), []);
    assert_eq!(text(json!({"id": "wl-1", "stream": "stderr"})), all[1..2]);
    assert_eq!(text(json!({"id": "wl-1", "stream": "stdout", "tail": 1, "follow": true})), all[2..]);
    // Written less than 200 ms after the second line, so the middle of the run separates it from the third.
    let middle = status.finished_at.map(|at| at.minus_ms(100)).expect("it ended");
    assert_eq!(text(json!({"id": "wl-1", "since": middle.to_string()})), all[2..]);

    agent.delete("wl-1");
    for request in ["GetStatus", "StopWorkload", "DeleteWorkload", "GetLogs"] {
        let error = expect_error(agent.ask(&json!({"type": request, "id": "wl-1"})));
        assert_eq!((error.code, error.id.as_deref()), (ErrorCode::NotFound, Some("wl-1")), "{request}");
        assert_eq!(error.message, "no such workload on this node");
    }
}

fn a_workload_that_does_its_job_succeeds(place: &Place) {
    let agent = place.agent(&[]);
    agent.settle(&place.workload("wl-1", &["true"]));
    let (state, status) = agent.ended("wl-1");
    assert_eq!((state, status.reason, status.exit_code), (State::Succeeded, Some(Reason::Completed), Some(0)), "{status:?}");
    // What it ran in is stopped at once, and kept until it is deleted.
    until("the sandbox is stopped", || place.sandboxes_of("wl-1").iter().all(|s| s.state == 1));
    assert_eq!(place.sandboxes_of("wl-1").len(), 1);
    // Nothing changes any more: not by stopping, not by asking again.
    let (again, same) = agent.stop_workload("wl-1");
    assert_eq!((again, same.reason, same.exit_code, same.finished_at), (state, status.reason, status.exit_code, status.finished_at));
    let (again, same) = agent.settle(&place.workload("wl-1", &["true"]));
    assert_eq!((again, same.reason, same.exit_code, same.finished_at), (state, status.reason, status.exit_code, status.finished_at));
    assert_eq!(place.sandboxes_of("wl-1").len(), 1);
}

fn a_command_that_does_not_exist_is_a_failed_start(place: &Place) {
    let agent = place.agent(&[]);
    let (state, status) = agent.settle(&place.workload("wl-1", &["/no/such/program"]));
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::StartFailed), None), "{status:?}");
    assert!(status.message.as_ref().is_some_and(|m| m.contains("/no/such/program")), "{status:?}");
    assert!(status.finished_at.is_some() && status.started_at.is_none(), "{status:?}");
    until("the sandbox is gone", || place.sandboxes_of("wl-1").is_empty());
}

fn the_same_again_is_the_same_and_another_is_refused(place: &Place) {
    let agent = place.agent(&[]);
    let workload = place.workload("wl-1", &["sleep", "1000"]);
    let first = agent.run(&workload);
    let (state, again) = agent.settle(&workload);
    assert_eq!((state, &again.container_id, again.created_at), (State::Running, &first.container_id, first.created_at));
    // Written differently, meant the same.
    let (state, _) = agent.settle(&with(workload.clone(), json!({"stop_grace_ms": 10_000, "env": {}})));
    assert_eq!(state, State::Running);
    for other in
        [json!({"memory_mb": 65}), json!({"command": ["sleep", "1001"]}), json!({"env": {"A": "b"}}), json!({"labels": {"a": "b"}})]
    {
        let error = expect_error(agent.ask(&json!({"type": "StartWorkload", "workload": with(workload.clone(), other.clone())})));
        assert_eq!((error.code, error.id.as_deref()), (ErrorCode::AlreadyExists, Some("wl-1")), "{other}");
    }
    assert_eq!(place.sandboxes().len(), 1);
}

fn a_polite_stop_is_enough_for_the_polite(place: &Place) {
    let agent = place.agent(&[]);
    agent.run_until_ready(&with(place.workload("wl-1", &place.polite()), json!({"stop_grace_ms": 30_000})));
    let (state, status) = agent.stop_workload("wl-1");
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::Stopped), Some(143)), "{status:?}");
    assert_eq!(status.phase, None);
}

fn a_stubborn_workload_is_killed_after_its_grace(place: &Place) {
    let agent = place.agent(&[]);
    agent.run_until_ready(&with(place.workload("wl-1", &place.stubborn()), json!({"stop_grace_ms": 1000})));
    let (state, status) = expect_status(agent.ask(&json!({"type": "StopWorkload", "id": "wl-1"})));
    assert_eq!((state, status.phase), (State::Running, Some(Phase::Stopping)), "{status:?}");
    // Asked twice, it is still stopped once.
    let (state, status) = agent.stop_workload("wl-1");
    assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::Stopped), Some(137)), "{status:?}");
    assert_eq!((status.oom_killed, status.phase), (false, None));
}

fn a_time_to_live_ends_a_workload(place: &Place) {
    let agent = place.agent(&[]);
    let status = agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"ttl_ms": 500, "stop_grace_ms": 0})));
    let (state, ended) = agent.ended("wl-1");
    assert_eq!((state, ended.reason, ended.exit_code), (State::Failed, Some(Reason::TtlExpired), Some(137)), "{ended:?}");
    let lived = ended.finished_at.zip(status.started_at).map(|(end, start)| end.as_millis() - start.as_millis());
    assert!(lived.is_some_and(|ms| ms >= 450), "{lived:?} ms");
}

fn deleting_a_running_workload_leaves_nothing(place: &Place) {
    let agent = place.agent(&[]);
    let status = agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    agent.delete("wl-1");
    assert_eq!((place.sandboxes(), place.containers()), (vec![], vec![]));
    assert_eq!(std::fs::read_dir(place.dir.join("agent/logs")).expect("there").count(), 0);
    let error = expect_error(agent.ask(&json!({"type": "DeleteWorkload", "id": "wl-1"})));
    assert_eq!(error.code, ErrorCode::NotFound);
    // The id is free, for anything.
    let next = agent.run(&with(place.workload("wl-1", &["sleep", "999"]), json!({"stop_grace_ms": 0})));
    assert_ne!(next.sandbox_id, status.sandbox_id);
}

fn an_answer_does_not_wait_for_a_deletion_longer_than_asked(place: &Place) {
    let agent = place.agent(&[]);
    let workload = with(place.workload("wl-1", &place.stubborn()), json!({"stop_grace_ms": 1000}));
    agent.run_until_ready(&workload);
    let error = expect_error(agent.ask(&json!({"type": "DeleteWorkload", "id": "wl-1", "wait_ms": 0})));
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::DeadlineExceeded, "not gone yet; it will be"));
    let error = expect_error(agent.ask(&json!({"type": "StartWorkload", "workload": workload})));
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::Unavailable, "the former workload of this id is still being deleted"));
    until("it is gone", || matches!(agent.ask(&json!({"type": "GetStatus", "id": "wl-1"})), Reply::Error(_)));
    assert_eq!(place.sandboxes(), []);
}

fn a_command_runs_inside(place: &Place) {
    let agent = place.agent(&[]);
    agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let exec =
        |command: &[&str], timeout_ms: u64| agent.ask(&json!({"type": "Exec", "id": "wl-1", "command": command, "timeout_ms": timeout_ms}));
    let check = |command: &[&str], exit_code: i32, stdout: &str, stderr: &str| match exec(command, 15_000) {
        Reply::ExecResult(r) => {
            assert_eq!((r.exit_code, r.stdout.as_str(), r.stderr.as_str()), (exit_code, stdout, stderr), "{command:?}");
            assert_eq!((r.encoding.as_str(), r.truncated), ("utf-8", false));
        }
        other => panic!("{command:?}: {}", brief(&other)),
    };
    check(&["echo", "hi", "there"], 0, "hi there\n", "");
    check(&["sh", "-c", "echo out; echo err >&2; exit 4"], 4, "out\n", "err\n");
    check(&["true"], 0, "", "");

    let error = expect_error(exec(&["/no/such/program"], 15_000));
    assert_eq!((error.code, error.id.as_deref()), (ErrorCode::InvalidArgument, Some("wl-1")), "{error:?}");
    assert!(error.message.contains("/no/such/program"), "{error:?}");
    let error = expect_error(exec(&["sleep", "60"], 1000));
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::DeadlineExceeded, "the command did not end within 1000 ms"));

    let flood = if place.lab().is_some() { vec!["sh", "-c", "yes | head -c 300000"] } else { vec!["spam", "300000"] };
    match exec(&flood, 15_000) {
        Reply::ExecResult(r) => assert_eq!((r.exit_code, r.stdout.len(), r.truncated), (0, kakuri::limits::EXEC_OUTPUT_BYTES_MAX, true)),
        other => panic!("{}", brief(&other)),
    }
    if place.lab().is_some() {
        match exec(&["printf", "\\377\\376ok"], 15_000) {
            Reply::ExecResult(r) => assert_eq!((r.stdout.as_str(), r.encoding.as_str(), r.truncated), ("//5vaw==", "base64", false)),
            other => panic!("{}", brief(&other)),
        }
    }

    agent.stop_workload("wl-1");
    let error = expect_error(exec(&["true"], 1000));
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::Unavailable, "the workload is Failed, not Running"));
    let error = expect_error(agent.ask(&json!({"type": "Exec", "id": "nobody", "command": ["true"]})));
    assert_eq!(error.code, ErrorCode::NotFound);
}

fn lists_come_in_pages(place: &Place) {
    let agent = place.agent(&[]);
    let ids = ["a", "b", "c", "d", "e"];
    for id in ids {
        // Accepted is listed: these never run, for nothing makes them.
        agent.start_workload(&with(
            place.workload(id, &["true"]),
            json!({"image_pull": {"policy": "never"}, "image": "localhost/not-here:1"}),
        ));
    }
    let page = |request: Value| match agent.ask(&with(json!({"type": "ListWorkloads"}), request)) {
        Reply::Workloads { workloads, r#continue } => {
            let id = |object: &Object| object.spec["id"].as_str().expect("an id").to_owned();
            (workloads.iter().map(id).collect::<Vec<_>>(), r#continue)
        }
        other => panic!("{}", brief(&other)),
    };
    assert_eq!(page(json!({})), (ids.map(str::to_owned).to_vec(), None));
    assert_eq!(page(json!({"limit": 2})), (vec!["a".into(), "b".into()], Some("b".into())));
    assert_eq!(page(json!({"limit": 2, "after": "b"})), (vec!["c".into(), "d".into()], Some("d".into())));
    assert_eq!(page(json!({"limit": 2, "after": "d"})), (vec!["e".into()], None));
    assert_eq!(page(json!({"limit": 5})), (ids.map(str::to_owned).to_vec(), None));
    assert_eq!(page(json!({"after": "cc"})), (vec!["d".into(), "e".into()], None));
    assert_eq!(page(json!({"after": "zzz"})), (vec![], None));
    for id in ids {
        let (state, status) = agent.ended(id);
        assert_eq!((state, status.reason), (State::Failed, Some(Reason::ImageNotFound)), "{status:?}");
        assert!(status.message.as_ref().is_some_and(|m| m.contains("image_pull.policy is never")), "{status:?}");
    }
    let specs: Vec<Value> = agent.list().into_iter().map(|object| object.spec["image"].clone()).collect();
    assert_eq!(specs, vec![json!("localhost/not-here:1"); 5]);
}

fn a_watch_sees_every_change(place: &Place) {
    let agent = place.agent(&[]);
    agent.run(&with(place.workload("old", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let mut watch = agent.line();
    watch.tell(&json!({"type": "Watch", "seq": 7}));
    let next = |watch: &mut Line| match watch.reply() {
        Reply::Event(Event { revision, event, object }) => {
            (revision, event, object.spec["id"].as_str().unwrap_or_default().to_owned(), object.state)
        }
        other => panic!("{}", brief(&other)),
    };
    let (mut last, kind, id, state) = next(&mut watch);
    assert_eq!((kind, id.as_str(), state), (EventKind::Added, "old", State::Running));
    // The heartbeat says that what was there has been told.
    let beat = watch.text().expect("a heartbeat");
    assert!(beat.contains("\"type\":\"Heartbeat\"") && beat.contains("\"seq\":7"), "{beat}");

    agent.settle(&place.workload("new", &["true"]));
    agent.ended("new");
    agent.delete("new");
    let mut seen = Vec::new();
    while seen.last().is_none_or(|(kind, _)| *kind != EventKind::Deleted) {
        let (revision, kind, id, state) = next(&mut watch);
        assert!(revision > last, "{revision} after {last}");
        last = revision;
        // The other is probed meanwhile, where its class has a kernel of its own.
        if id == "new" {
            seen.push((kind, state));
        }
    }
    assert_eq!(seen.first(), Some(&(EventKind::Added, State::Pending)));
    let states: Vec<State> = seen.iter().map(|(_, state)| *state).collect();
    let mut steps = states.clone();
    steps.dedup();
    assert_eq!(steps, [State::Pending, State::Running, State::Succeeded], "{seen:?}");
    assert!(seen[1..seen.len() - 1].iter().all(|(kind, _)| *kind == EventKind::Modified), "{seen:?}");
}

fn a_log_is_followed_to_its_end(place: &Place) {
    let agent = place.agent(&[]);
    agent.run(&place.workload("wl-1", &["sh", "-c", "echo a; sleep 0.4; echo b; sleep 0.4; echo c; sleep 0.2"]));
    let mut follow = agent.line();
    follow.tell(&json!({"type": "GetLogs", "id": "wl-1", "follow": true}));
    match follow.reply() {
        Reply::Log(log) => assert_eq!((log.line.as_str(), agent.status("wl-1").0), ("a", State::Running)),
        other => panic!("{}", brief(&other)),
    }
    let mut tail = agent.line();
    tail.tell(&json!({"type": "GetLogs", "id": "wl-1", "follow": true, "tail": 0}));
    let rest: Vec<String> = read_logs(&mut follow).into_iter().map(|l| l.line).collect();
    assert_eq!(rest, ["b", "c"]);
    assert!(agent.status("wl-1").0.is_terminal());
    let rest: Vec<String> = read_logs(&mut tail).into_iter().map(|l| l.line).collect();
    assert_eq!(rest, ["b", "c"], "a follower with tail 0 sees what comes");

    // A follower that leaves is noticed, and one whose workload is deleted sees the end.
    agent.run(&with(place.workload("wl-2", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let mut follow = agent.line();
    follow.tell(&json!({"type": "GetLogs", "id": "wl-2", "follow": true}));
    agent.delete("wl-2");
    assert_eq!(follow.reply(), Reply::LogEnd { id: "wl-2".into(), gap: false });
}

fn the_end_of_a_workload_is_noticed_by_relisting(place: &Place) {
    // Real runtimes before containerd 1.7 send no events either, so this is the only way there; the simulator has its own test.
    let agent = place.agent(&["--relist-ms", "100"]);
    agent.settle(&place.workload("wl-1", &["sh", "-c", "sleep 0.5; exit 9"]));
    let (state, status) = agent.ended("wl-1");
    assert_eq!((state, status.exit_code), (State::Failed, Some(9)), "{status:?}");
}

fn twenty_start_at_a_time(place: &Place) {
    let count = if place.lab().is_some() { 8 } else { 20 };
    let agent = place.agent(&["--start-workers", "8", "--stop-workers", "8"]);
    let clients: Vec<_> = (0..count)
        .map(|i| {
            let workload = with(place.workload(&format!("wl-{i}"), &["sleep", "1000"]), json!({"stop_grace_ms": 0}));
            let mut line = agent.line();
            std::thread::spawn(move || line.ask(&json!({"type": "StartWorkload", "workload": workload, "wait_ms": SOON_MS})))
        })
        .collect();
    for client in clients {
        let (state, status) = expect_status(client.join().expect("a client"));
        assert_eq!(state, State::Running, "{status:?}");
    }
    assert_eq!(place.sandboxes().len(), count);
    let node = agent.node();
    assert_eq!(node.allocated.workloads, count as u64);
    assert_eq!(node.allocated.cpu_millicores, 200 * count as u64);
}

fn a_unix_socket_is_for_its_owner_alone(place: &Place) {
    let socket = place.dir.join("agent.sock");
    let agent = place.agent(&["--listen", &format!("unix://{}", socket.display())]);
    assert_eq!(agent.address, Address::Unix(socket.clone()));
    assert_eq!(socket.metadata().expect("there").permissions().mode() & 0o777, 0o600);
    assert!(matches!(agent.ask(&json!({"type": "Ping"})), Reply::Pong { .. }));
    // What it keeps is for its owner alone too.
    agent.settle(&place.workload("wl-1", &["true"]));
    let mode = |path: std::path::PathBuf| path.metadata().expect("there").permissions().mode() & 0o777;
    let logs = place.dir.join("agent/logs");
    let of_it = std::fs::read_dir(&logs).expect("there").flatten().next().expect("a directory").path();
    assert_eq!((mode(place.dir.join("agent")), mode(logs), mode(of_it)), (0o700, 0o700, 0o700));
}

fn the_node_says_what_it_is(place: &Place) {
    let agent = place.agent(&["--label", "zone=a", "--memory-mb", "1000", "--cpu-millicores", "4000"]);
    let node = agent.node();
    assert_eq!((node.node_id.as_str(), node.ready), (place.node.as_str(), true));
    assert_eq!((node.capacity.memory_mb, node.capacity.cpu_millicores), (1000, 4000));
    assert_eq!((node.allocated.memory_mb, node.allocated.workloads), (0, 0));
    assert_eq!(node.labels.get("zone"), Some(&json!("a")));
    assert_eq!(node.version, env!("CARGO_PKG_VERSION"));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux");
    assert_eq!(node.host_kernel, kernel.trim());
    let class = |name: &str| node.runtime_classes.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("{name}: {node:?}"));
    assert_eq!((class("native").handler.as_str(), class("native").own_kernel, class("native").available), ("runc", false, Some(true)));
    assert_eq!((class("gvisor").handler.as_str(), class("gvisor").own_kernel, class("gvisor").overhead_mb), ("gvisor", true, 24));
    for condition in ["RuntimeAnswers", "RuntimeReady", "NetworkReady"] {
        assert!(node.conditions.iter().any(|c| c.r#type == condition && c.ok), "{condition}: {:?}", node.conditions);
    }
    let observed = node.observed_at.expect("it was listed");
    until("it goes on looking", || agent.node().observed_at > Some(observed));

    let status = agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let allocated = agent.node().allocated;
    let overhead_mb = class(place.class).overhead_mb;
    assert_eq!((allocated.memory_mb, allocated.workloads), (64 + overhead_mb, 1));
    let free = 1000 - 64 - overhead_mb;
    let large = with(place.workload("large", &["sleep", "1000"]), json!({"memory_mb": free - overhead_mb + 1}));
    let refusal = expect_error(agent.line().ask(&json!({"type": "StartWorkload", "workload": large})));
    let message = format!("memory: wants {} MiB with its overhead, free {free} of 1000", free + 1);
    assert_eq!((refusal.code, refusal.message), (ErrorCode::ResourceExhausted, message));
    // Nothing is told that is older than it seems: the truth of a running workload is renewed.
    let newer =
        eventually("the truth is renewed", SOON_MS, || Some(agent.status("wl-1").1.observed_at).filter(|at| *at > status.observed_at));
    assert!(newer > status.observed_at);
    agent.stop_workload("wl-1");
    assert_eq!(agent.node().allocated.workloads, 0, "what ended takes nothing");
}

fn secrets_stay_where_they_are(place: &Place) {
    const SECRET: &str = "hunter2-battery-staple";
    let agent = place.agent(&["--log-level", "trace"]);
    let workload = with(place.workload("wl-1", &["sleep", "1000"]), json!({"env": {"TOKEN": SECRET}, "stop_grace_ms": 0}));
    agent.run(&workload);
    let bad = with(workload, json!({"env": {"TOKEN": SECRET, "A=B": SECRET}, "id": "wl-2", "image": SECRET.to_uppercase()}));
    let mut line = agent.line();
    let refusal = line.exchange(&json!({"type": "StartWorkload", "workload": bad}).to_string());
    assert!(refusal.contains("/workload/env/A=B"), "{refusal}");
    let status = line.exchange(r#"{"type":"GetStatus","id":"wl-1"}"#);
    let log = std::fs::read_to_string(place.dir.join("agent.log")).expect("a log");
    let annotations: Vec<String> = place.sandboxes().iter().map(|s| format!("{:?}{:?}", s.annotations, s.labels)).collect();
    for (what, text) in [("refusal", &refusal), ("status", &status), ("log", &log), ("annotations", &annotations.concat())] {
        assert!(!text.to_lowercase().contains(SECRET), "{what}: {text}");
    }
    assert!(annotations.concat().contains("TOKEN"), "the names are kept: {annotations:?}");
}

#[test]
fn a_listener_that_others_reach_needs_a_word_more() {
    let refused = |args: &[&str]| {
        let output =
            command(AGENT).args(["--node-id", "n", "--check-config", "--state-dir", "/nonexistent"]).args(args).output().expect("runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout))
    };
    for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:9000"] {
        let (code, text) = refused(&["--listen", listen]);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains("other machines could reach") && text.contains("--insecure-listen"), "{text}");
        assert_eq!(refused(&["--listen", listen, "--insecure-listen"]), (Some(0), "config ok\n".into()));
    }
    for listen in ["127.0.0.1:0", "127.1.2.3:0", "[::1]:0", "unix:///tmp/x.sock"] {
        assert_eq!(refused(&["--listen", listen]), (Some(0), "config ok\n".into()), "{listen}");
    }
}

#[test]
fn insecure_listening_is_said_at_every_start() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&["--listen", "0.0.0.0:0", "--insecure-listen"]);
    agent.terminate();
    agent.again();
    let log = std::fs::read_to_string(place.dir.join("agent.log")).expect("a log");
    assert_eq!(log.matches("level=warn program=kakuri-agent msg=\"--insecure-listen: anybody who reaches this port").count(), 2, "{log}");
}

#[test]
fn without_a_runtime_the_agent_says_what_is_missing() {
    let dir = crate::harness::Dir::new();
    let args = ["--node-id", "n", "--listen", "127.0.0.1:0", "--state-dir", &dir.join("a").display().to_string()];
    if kakuri::config::CRI_SOCKETS.iter().any(|path| std::path::Path::new(path).exists()) {
        return crate::harness::skip(crate::harness::Need::NoRuntime, "this machine has a runtime in a usual place");
    }
    let output = command(AGENT).args(args).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("no container runtime: none of") && text.contains("--cri-endpoint unix:///PATH"), "{text}");
}

#[test]
fn a_port_in_use_is_an_error_that_names_it() {
    let place = Place::sim(&[]);
    let holder = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = holder.local_addr().expect("bound").to_string();
    let output = command(AGENT)
        .args(["--node-id", "n", "--listen", &port, "--cri-endpoint", &place.endpoint_url()])
        .args(["--state-dir", &place.dir.join("a").display().to_string()])
        .output()
        .expect("runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("cannot listen on {port}: Address already in use")), "{text}");
}

/// What only the simulator can be made to do.
mod sim_alone {
    use super::*;

    #[test]
    fn the_end_of_a_workload_is_noticed_by_events() {
        let place = Place::sim(&[]);
        let agent = place.agent(&["--relist-ms", "600000"]);
        until("the stream of events is open", || place.count("GetContainerEvents") > 0);
        agent.settle(&place.workload("wl-1", &["sh", "-c", "sleep 1; exit 9"]));
        let (state, status) = agent.ended("wl-1");
        assert_eq!((state, status.exit_code), (State::Failed, Some(9)), "{status:?}");
    }

    #[test]
    fn the_end_of_a_workload_is_noticed_without_events() {
        let place = Place::sim(&["--no-events"]);
        let agent = place.agent(&["--relist-ms", "100"]);
        agent.settle(&place.workload("wl-1", &["sh", "-c", "sleep 0.3; exit 9"]));
        let (state, status) = agent.ended("wl-1");
        assert_eq!((state, status.exit_code), (State::Failed, Some(9)), "{status:?}");
    }

    #[test]
    fn out_of_memory_is_said_only_when_the_runtime_says_so() {
        let place = Place::sim(&[]);
        let agent = place.agent(&[]);
        agent.settle(&place.workload("oom", &["sh", "-c", "sleep 0.1; oom"]));
        agent.settle(&place.workload("like-oom", &["sh", "-c", "sleep 0.1; exit 137"]));
        let (state, status) = agent.ended("oom");
        assert_eq!((state, status.reason, status.exit_code, status.oom_killed), (State::Failed, Some(Reason::OomKilled), Some(137), true));
        let (state, status) = agent.ended("like-oom");
        assert_eq!((state, status.reason, status.exit_code, status.oom_killed), (State::Failed, Some(Reason::Error), Some(137), false));
    }

    #[test]
    fn a_stop_during_a_slow_pull_leaves_nothing() {
        let place = Place::sim(&[]);
        let agent = place.agent(&[]);
        let slow = with(place.workload("wl-1", &["sleep", "1000"]), json!({"image": "localhost/slow-800:1"}));
        agent.start_workload(&slow);
        until("it pulls", || agent.status("wl-1").1.phase == Some(Phase::Pulling));
        let (state, status) = agent.stop_workload("wl-1");
        assert_eq!(
            (state, status.reason, status.exit_code, status.phase),
            (State::Failed, Some(Reason::Stopped), None, None),
            "{status:?}"
        );
        assert_eq!((place.count("RunPodSandbox"), place.sandboxes()), (0, vec![]));
        // The same with a deletion.
        agent.start_workload(&with(slow.clone(), json!({"id": "wl-2", "image": "localhost/slow-801:1"})));
        until("it pulls", || agent.status("wl-2").1.phase == Some(Phase::Pulling));
        agent.delete("wl-2");
        assert_eq!((place.count("RunPodSandbox"), place.sandboxes()), (0, vec![]));
    }

    #[test]
    fn a_stop_between_the_steps_of_a_start_undoes_them() {
        let place = Place::sim(&[]);
        let agent = place.agent(&[]);
        for (i, (method, phase)) in [
            ("RunPodSandbox", Phase::CreatingSandbox),
            ("PodSandboxStatus", Phase::CreatingSandbox),
            ("CreateContainer", Phase::Creating),
            ("StartContainer", Phase::Starting),
            ("ContainerStatus", Phase::Starting),
        ]
        .into_iter()
        .enumerate()
        {
            let id = format!("wl-{i}");
            place.faults(&[&format!("{method}:delay-after=400*1")]);
            agent.start_workload(&with(place.workload(&id, &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
            until("it is there", || agent.status(&id).1.phase == Some(phase));
            let (state, status) = agent.stop_workload(&id);
            assert_eq!((state, status.reason, status.phase), (State::Failed, Some(Reason::Stopped), None), "{method}: {status:?}");
            // What ran is stopped, and kept like anything that ended; what did not is undone.
            let ran = phase == Phase::Starting;
            until("all is undone", || {
                if ran { place.sandboxes_of(&id).iter().all(|s| s.state == 1) } else { place.sandboxes_of(&id).is_empty() }
            });
            assert_eq!(status.exit_code, ran.then_some(137), "{method}: {status:?}");
        }
    }

    #[test]
    fn pulls_fail_each_in_their_own_way() {
        let place = Place::sim(&[]);
        let agent = place.agent(&[]);
        for (image, reason) in [
            ("registry.test/not-found:1", Reason::ImageNotFound),
            ("registry.test/unauthorized:1", Reason::ImageUnauthorized),
            ("registry.test/unreachable:1", Reason::ImagePullFailed),
            ("registry.test/disk-full:1", Reason::ImagePullFailed),
        ] {
            let id = image.trim_start_matches("registry.test/").trim_end_matches(":1");
            // What may pass is tried again until it is too late.
            let (state, status) = agent.settle(&with(place.workload(id, &["true"]), json!({"image": image, "start_deadline_ms": 2000})));
            assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(reason), None), "{image}: {status:?}");
            assert!(status.message.as_ref().is_some_and(|m| m.contains(image)), "{image}: {status:?}");
        }
        assert_eq!((place.count("RunPodSandbox"), place.sandboxes()), (0, vec![]));
    }

    #[test]
    fn credentials_are_shown_to_their_registry_alone() {
        let place = Place::sim(&[]);
        let text = r#"{"auths":{"registry.test":{"username":"kakuri","password":"open-sesame"}}}"#;
        let file = place.dir.secret("config.json", text).display().to_string();
        let agent = place.agent(&["--registry-credentials", &file, "--log-level", "trace"]);
        let image = |id: &str, image: &str| with(place.workload(id, &["sleep", "1000"]), json!({"image": image, "stop_grace_ms": 0}));
        agent.run(&image("known", "registry.test/unauthorized:1"));
        let (_, status) = agent.settle(&image("unknown", "other.test/unauthorized:1"));
        assert_eq!(status.reason, Some(Reason::ImageUnauthorized), "{status:?}");
        // Read at each pull, so that new ones count at once; what cannot be read fails the pull and quotes nothing.
        place.dir.secret("config.json", r#"{"auths":{"registry.test":{"password":open-sesame}}}"#);
        let (_, status) = agent.settle(&image("broken", "registry.test/unauthorized:2"));
        assert_eq!(status.reason, Some(Reason::ImagePullFailed), "{status:?}");
        assert!(status.message.as_ref().is_some_and(|m| m.contains("config.json") && !m.contains("sesame")), "{status:?}");
        let log = std::fs::read_to_string(place.dir.join("agent.log")).expect("a log");
        assert!(!log.contains("sesame"), "{log}");
    }

    #[test]
    fn an_image_is_pulled_as_the_policy_says() {
        let place = Place::sim(&[]);
        let agent = place.agent(&[]);
        let pull = |id: &str, image: &str, policy: &str| {
            place.forget_calls();
            let workload =
                with(place.workload(id, &["sleep", "1000"]), json!({"image": image, "image_pull": {"policy": policy}, "stop_grace_ms": 0}));
            (agent.settle(&workload).0, place.count("PullImage"))
        };
        assert_eq!(pull("a", IMAGE, "if-not-present"), (State::Running, 0));
        assert_eq!(pull("b", IMAGE, "never"), (State::Running, 0));
        assert_eq!(pull("c", IMAGE, "always"), (State::Running, 1));
        assert_eq!(pull("d", "registry.test/new:1", "never"), (State::Failed, 0));
        assert_eq!(pull("e", "registry.test/new:1", "if-not-present"), (State::Running, 1));
        assert_eq!(pull("f", "registry.test/new:1", "if-not-present"), (State::Running, 0));
    }

    #[test]
    fn long_lines_and_much_output_come_whole() {
        let place = Place::sim(&[]);
        let agent = place.agent(&[]);
        agent.settle(&place.workload("long", &["partial", "100000"]));
        agent.settle(&place.workload("longer", &["partial", "200000"]));
        agent.settle(&place.workload("much", &["spam", "3200000"]));
        for id in ["long", "longer", "much"] {
            agent.ended(id);
        }
        let lengths = |id: &str| agent.logs(json!({"id": id})).iter().map(|l| l.line.len()).collect::<Vec<_>>();
        assert_eq!(lengths("long"), [100_000]);
        // What is over the limit comes in pieces of it.
        assert_eq!(lengths("longer"), [kakuri::limits::LOG_LINE_BYTES_MAX, 200_000 - kakuri::limits::LOG_LINE_BYTES_MAX]);
        let lines = agent.logs(json!({"id": "much"}));
        assert_eq!(lines.len(), 50_000);
        assert!(lines.iter().enumerate().all(|(i, l)| l.line.starts_with(&format!("{i:010} "))));
        let tail = agent.logs(json!({"id": "much", "tail": 3}));
        assert_eq!(tail, lines[49_997..]);
    }

    #[test]
    fn a_full_node_says_so_and_a_class_has_its_floor() {
        let place = Place::sim(&[]);
        let agent =
            place.agent(&["--runtime-class", "edera-zone=edera", "--runtime-class", "native=runc", "--runtime-class", "ghost=nope"]);
        let refused = |change: Value| {
            let workload = with(place.workload("wl-1", &["true"]), change);
            let error = expect_error(agent.ask(&json!({"type": "StartWorkload", "workload": workload})));
            let rules: Vec<(String, String)> = error.errors.into_iter().map(|e| (e.pointer, e.detail)).collect();
            (error.code, error.message, rules)
        };
        let rule = |pointer: &str, detail: &str| (pointer.to_owned(), detail.to_owned());
        assert_eq!(
            refused(json!({"runtime_class": "gvisor"})).2,
            [rule("/workload/runtime_class", "unknown class; this node offers edera-zone, ghost, native")]
        );
        assert_eq!(
            refused(json!({"runtime_class": "edera-zone", "memory_mb": 299})).2,
            [rule("/workload/memory_mb", "must be at least 300 for class edera-zone")]
        );
        let (code, message, rules) = refused(json!({"runtime_class": "ghost"}));
        assert_eq!((code, rules), (ErrorCode::Unavailable, vec![]));
        assert_eq!(message, "the runtime does not list the handler \"nope\" of this class");
        assert_eq!(
            refused(json!({"mounts": [{"source": "/etc", "target": "/x"}]})).2,
            [rule("/workload/mounts/0/source", "is not under a mount root of this node")]
        );
        assert_eq!(
            refused(json!({"image_pull": {"credentials": "c"}})).2,
            [rule("/workload/image_pull/credentials", "this node has no credentials of that name")]
        );
        assert_eq!(agent.list(), []);
        assert_eq!(place.count("RunPodSandbox"), 0);
        let status = agent.run(&with(place.workload("zone", &["sleep", "9"]), json!({"runtime_class": "edera-zone", "memory_mb": 300})));
        assert_eq!(status.handler.as_deref(), Some("edera"));
        let annotations = &place.sandboxes_of("zone")[0].annotations;
        assert_eq!(annotations.get("dev.edera/cpu").map(String::as_str), Some("1"));
        assert_eq!(annotations.get("dev.edera/resource-policy").map(String::as_str), Some("static"));
        assert_eq!(annotations.len(), 3, "and the workload itself: {annotations:?}");
    }

    #[test]
    fn a_mount_that_leads_out_of_its_root_is_refused() {
        let place = Place::sim(&[]);
        let root = place.dir.join("root");
        std::fs::create_dir(&root).expect("made");
        std::fs::create_dir(root.join("in")).expect("made");
        std::os::unix::fs::symlink("/etc", root.join("out")).expect("made");
        let agent = place.agent(&["--mount-root", &root.display().to_string()]);
        let mount = |id: &str, source: &str| {
            let mounts = json!([{"source": root.join(source).display().to_string(), "target": "/x", "read_only": true}]);
            agent.settle(&with(place.workload(id, &["sleep", "9"]), json!({"mounts": mounts, "stop_grace_ms": 0})))
        };
        assert_eq!(mount("in", "in").0, State::Running);
        let (state, status) = mount("out", "out");
        assert_eq!((state, status.reason), (State::Failed, Some(Reason::CreateFailed)), "{status:?}");
        assert!(status.message.as_ref().is_some_and(|m| m.contains("leads outside the node's mount roots")), "{status:?}");
        assert_eq!(mount("absent", "absent").0, State::Failed);
        assert_eq!(place.sandboxes().len(), 1);
    }

    #[test]
    fn a_watch_that_does_not_read_is_cut_off() {
        let place = Place::sim(&[]);
        let agent = place.agent(&[]);
        let mut watch = agent.line();
        watch.tell(&json!({"type": "Watch"}));
        watch.reply_or_heartbeat();
        // Each workload makes several events of some KB; the socket's buffers take a part of them, the watch's own queue 1024.
        let long = "x".repeat(6000);
        for i in 0..1250 {
            let workload = json!({"id": format!("w{i}"), "image": "localhost/not-here:1", "runtime_class": "native",
                "image_pull": {"policy": "never"}, "command": [long]});
            agent.start_workload(&workload);
        }
        let mut last = None;
        let error = loop {
            match watch.next() {
                Some(Reply::Event(event)) => {
                    assert!(last.is_none_or(|last| event.revision > last));
                    last = Some(event.revision);
                }
                Some(Reply::Heartbeat { .. }) => {}
                Some(Reply::Error(error)) => break error,
                other => panic!("{}", brief(&other)),
            }
        };
        assert_eq!(
            (error.code, error.message.as_str()),
            (ErrorCode::ResourceExhausted, "this watch fell behind by more than 1024 events; begin again")
        );
        assert_eq!(watch.next(), None);
    }

    #[test]
    fn there_are_only_so_many_watches() {
        let place = Place::sim(&[]);
        let agent = place.agent(&[]);
        let open = || {
            let mut line = agent.line();
            line.tell(&json!({"type": "Watch"}));
            let first = line.next().expect("an answer");
            (line, first)
        };
        let mut watches: Vec<_> = (0..kakuri::limits::WATCHES_MAX).map(|_| open()).collect();
        assert!(watches.iter().all(|(_, first)| matches!(first, Reply::Heartbeat { .. })));
        let (mut refused, first) = open();
        assert_eq!(expect_error(first).code, ErrorCode::ResourceExhausted);
        assert!(matches!(refused.ask(&json!({"type": "Ping"})), Reply::Pong { .. }), "the connection lives");
        // A place that is left is free again, long before the next heartbeat is due.
        watches.pop();
        eventually("a place is free", 5000, || matches!(open().1, Reply::Heartbeat { .. }).then_some(()));
    }

    #[test]
    fn who_only_listens_is_served_and_who_left_is_not() {
        let place = Place::sim(&[]);
        let agent = place.agent(&[]);
        agent.run(&place.workload("wl-1", &["sh", "-c", "sleep 1.5; echo late"]));
        let follow = |line: &mut Line| line.tell(&json!({"type": "GetLogs", "id": "wl-1", "follow": true}));
        let mut half = agent.line();
        follow(&mut half);
        half.end();
        let mut gone = agent.line();
        follow(&mut gone);
        drop(gone);
        assert!(matches!(half.reply_or_heartbeat(), Reply::Heartbeat { .. }), "a sign of life long before 10 s");
        assert_eq!(read_logs(&mut half).into_iter().map(|l| l.line).collect::<Vec<_>>(), ["late"]);
        drop(half);
        agent.run(&with(place.workload("wl-2", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
        let mut gone = agent.line();
        gone.tell(&json!({"type": "GetLogs", "id": "wl-2", "follow": true}));
        drop(gone);
        let own = 1; // The harness's own connection.
        eventually("the follower's thread ends", 5000, || (agent.connections() <= own).then_some(()));
    }
}

#[test]
fn a_change_that_comes_late_is_refused_by_its_fence() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    assert!(agent.node().features.iter().any(|feature| feature == "fence"));
    let change = |kind: &str, fence: u64| agent.ask(&json!({"type": kind, "id": "web", "fence": fence, "wait_ms": 5000}));
    let start = |fence: u64| {
        let workload = json!({"id": "web", "image": "busybox", "runtime_class": "gvisor", "args": ["sleep", "1000"]});
        agent.ask(&json!({"type": "StartWorkload", "workload": workload, "fence": fence, "wait_ms": 5000}))
    };
    let late = |reply: Reply, seen: u64| {
        let error = expect_error(reply);
        assert_eq!((error.code, error.fence, error.id.as_deref()), (ErrorCode::Unavailable, Some(seen), Some("web")), "{error:?}");
    };

    // Deleted before its start came: that start may not bring it to life.
    assert_eq!(expect_error(change("DeleteWorkload", 7)).code, ErrorCode::NotFound);
    late(start(6), 7);
    assert_eq!(agent.list(), []);
    assert_eq!(place.calls().iter().filter(|call| call.contains("RunPodSandbox")).count(), 0);

    // The next of this id lives, whatever was still on its way to the one before it.
    assert_eq!(expect_status(start(8)).0, State::Running);
    late(change("DeleteWorkload", 7), 8);
    late(change("StopWorkload", 7), 8);
    late(agent.ask(&json!({"type": "UpdateWorkload", "id": "web", "labels": {}, "fence": 7})), 8);
    assert_eq!(agent.status("web").0, State::Running);
    assert!(matches!(change("DeleteWorkload", 9), Reply::Deleted { .. }));
}
