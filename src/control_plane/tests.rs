//! The control plane over real sockets, against a fake agent.

mod nodes;
mod world;

use std::sync::atomic::Ordering;
use std::thread;

use serde_json::{Value, json};

use super::*;
use crate::deadline::{Stopwatch, Timestamp};
use crate::net::line::LineReader;
use crate::wire::agent::{ErrorCode, Object, Reply};
use crate::workload::{State, WorkloadId};
use store::tests::Scripted;
use world::{Fault, World, eventually, refusal, soon, workload};

#[test]
fn a_workload_lives_and_is_forgotten() {
    let world = World::new();
    let (head, body) = world.ask("POST", "/workloads", &workload("a").to_string());
    assert!(head.starts_with("HTTP/1.1 201 ") && head.contains("\r\nLocation: /workloads/a\r\n"), "{head}");
    let object: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!((&object["state"], &object["status"]["node"]), (&json!("Pending"), &json!("node-1")));
    assert_eq!((&object["image"], &object["memory_mb"]), (&json!("docker.io/library/busybox:latest"), &json!(512)));

    world.agent.set("a", State::Running, |status| status.handler = Some("runsc".into()));
    let object = world.get("a");
    assert_eq!((&object["state"], &object["status"]["handler"]), (&json!("Running"), &json!("runsc")));
    assert_eq!(object["status"]["created_at"], serde_json::from_str::<Value>(&body).expect("JSON")["status"]["created_at"]);

    let exec = world.json("POST", "/workloads/a/exec", r#"{"command":["uname","-r"]}"#);
    assert_eq!(exec, (200, json!({"exit_code": 3, "stdout": "uname -r", "stderr": "", "encoding": "utf-8", "truncated": false})));

    let (status, object) = world.json("POST", "/workloads/a/stop", "");
    assert_eq!((status, &object["state"], &object["status"]["phase"]), (202, &json!("Running"), &json!("Stopping")));
    eventually("the agent is told to stop it", || world.agent.asked("StopWorkload a") > 0);
    assert_eq!(world.get("a")["status"]["phase"], "Stopping");
    world.agent.set("a", State::Failed, |status| status.phase = None);
    let object = world.get("a");
    assert_eq!((&object["state"], &object["status"]["phase"]), (&json!("Failed"), &Value::Null));
    assert_eq!(world.json("POST", "/workloads/a/exec", r#"{"command":["x"]}"#).1["code"], "not_running");

    let (status, object) = world.json("DELETE", "/workloads/a", "");
    assert_eq!((status, &object["status"]["phase"]), (202, &json!("Stopping")));
    eventually("it is gone", || world.status("GET", "/workloads/a", "") == 404);
    assert_eq!(world.json("DELETE", "/workloads/a", "").1["code"], "not_found");
    assert!(world.agent.lock().workloads.is_empty());
    world.end();
}

#[test]
fn the_same_post_again_is_the_same_workload() {
    let world = World::new();
    world.post("a");
    let (status, object) = world.json("POST", "/workloads", &workload("a").to_string());
    assert_eq!((status, &object["id"]), (200, &json!("a")));
    assert_eq!(world.agent.asked("StartWorkload a"), 1);
    let (status, problem) = world.json("POST", "/workloads", r#"{"id":"a","image":"other","runtime_class":"gvisor"}"#);
    assert_eq!((status, &problem["code"]), (409, &json!("workload_exists")));
    let (status, object) = world.json("POST", "/workloads", r#"{"image":"a","security_profile":"internal"}"#);
    let id = object["id"].as_str().expect("an id");
    assert_eq!((status, id.len(), &id[..3], &object["runtime_class"]), (201, 15, "wl-", &json!("gvisor")));
    world.end();
}

#[test]
fn what_an_agent_refuses_was_never_accepted() {
    let world = World::new();
    let check = |code, status: u16, expect: &str| {
        world.agent.fail("StartWorkload", refusal(code));
        let (seen, problem) = world.json("POST", "/workloads", &workload("a").to_string());
        assert_eq!((seen, problem["code"].as_str()), (status, Some(expect)), "{problem}");
        assert_eq!(world.status("GET", "/workloads/a", ""), 404);
    };
    check(ErrorCode::InvalidArgument, 422, "node_rule");
    check(ErrorCode::AlreadyExists, 409, "workload_exists");
    check(ErrorCode::ResourceExhausted, 503, "node_full");
    check(ErrorCode::Unavailable, 503, "node_unavailable");
    check(ErrorCode::PermissionDenied, 403, "node_denied");
    check(ErrorCode::Unauthenticated, 503, "node_unauthenticated");
    check(ErrorCode::DeadlineExceeded, 504, "node_timeout");
    check(ErrorCode::Internal, 500, "node_internal");
    world.post("a");
    world.end();
}

#[test]
fn what_another_request_was_refused_is_not_confirmed() {
    let world = World::new();
    let refusal = Reply::error(ErrorCode::Unavailable, "because", None);
    world.agent.fail("StartWorkload", Fault::SayLate(refusal, Duration::from_millis(300)));
    thread::scope(|scope| {
        let first = scope.spawn(|| world.status("POST", "/workloads", &workload("a").to_string()));
        eventually("the agent was asked", || world.agent.asked("StartWorkload a") == 1);
        // Whoever lost patience asks again, while the agent makes up its mind.
        assert_eq!(world.status("POST", "/workloads", &workload("a").to_string()), 201);
        assert_eq!(first.join().expect("no panic"), 503);
    });
    assert_eq!(world.status("GET", "/workloads/a", ""), 200, "what was accepted is there");
    world.end();
}

#[test]
fn what_was_refused_and_cannot_be_forgotten_is_accepted() {
    let disk = Scripted::default();
    let world = World::with_store(store::tests::on(&disk), limits::HISTORY_DEFAULT);
    let refusal = Reply::error(ErrorCode::Unavailable, "because", None);
    world.agent.fail("StartWorkload", Fault::SayLate(refusal, Duration::from_millis(300)));
    thread::scope(|scope| {
        let post = scope.spawn(|| world.json("POST", "/workloads", &workload("a").to_string()));
        eventually("the agent was asked", || world.agent.asked("StartWorkload a") == 1);
        disk.is_full.store(true, Ordering::SeqCst);
        let (status, object) = post.join().expect("answered");
        assert_eq!((status, &object["state"]), (201, &json!("Pending")), "it is on disk, and will run");
        assert_eq!(object["status"]["last_error"], "node-1: the agent says Unavailable: because");
    });
    disk.is_full.store(false, Ordering::SeqCst);
    eventually("it is sent again", || world.agent.lock().workloads.contains_key("a"));
    world.end();
}

#[test]
fn a_post_of_what_goes_away_meanwhile_begins_again() {
    let world = World::new();
    world.post("a");
    let late = Reply::error(ErrorCode::Unavailable, "because", None);
    world.agent.fail("GetStatus", Fault::SayLate(late, Duration::from_millis(1500)));
    thread::scope(|scope| {
        let again = scope.spawn(|| world.status("POST", "/workloads", &workload("a").to_string()));
        eventually("the agent was asked", || world.agent.asked("GetStatus a") == 1);
        assert_eq!(world.status("DELETE", "/workloads/a", ""), 202);
        eventually("it is gone", || world.json("GET", "/workloads", "").1["items"] == json!([]));
        assert_eq!(again.join().expect("answered"), 201, "not the one that is gone");
    });
    assert_eq!(world.get("a")["state"], "Pending");
    assert_eq!(world.agent.asked("StartWorkload a"), 2);
    world.end();
}

#[test]
fn what_cannot_be_placed_is_not_accepted() {
    let world = World::new();
    let (status, problem) = world.json("POST", "/workloads", r#"{"image":"a","runtime_class":"kata"}"#);
    assert_eq!((status, &problem["code"]), (422, &json!("unknown_class")));
    assert_eq!(problem["detail"], "no node offers this runtime class; on offer: gvisor, native");
    assert_eq!(problem["errors"][0]["pointer"], "/runtime_class");
    let (status, problem) = world.json("POST", "/workloads", r#"{"image":"a","runtime_class":"native","node_selector":{"disk":"fast"}}"#);
    assert_eq!((status, &problem["code"]), (503, &json!("no_node")));
    assert_eq!(problem["detail"], "no node can take it now: node-1: node_selector: wants disk=fast");
    let (status, problem) = world.json("POST", "/workloads", r#"{"image":"a","runtime_class":"native","security_profile":"untrusted"}"#);
    assert_eq!((status, &problem["code"]), (403, &json!("policy_denied")));
    assert_eq!(problem["detail"], "security profile untrusted allows only edera-zone, kata");
    assert_eq!(world.json("GET", "/workloads", "").1["items"], json!([]));
    world.end();
}

#[test]
fn a_start_whose_reply_was_lost_is_sent_again() {
    let world = World::new();
    // The request, and its one repetition.
    world.agent.fail("StartWorkload", Fault::Close);
    world.agent.fail("StartWorkload", Fault::Close);
    let object = world.post("a");
    assert_eq!(object["state"], "Pending");
    assert_eq!(object["status"]["last_error"], "node-1: the agent closed the connection");
    eventually("the agent has it", || world.agent.lock().workloads.contains_key("a"));
    eventually("its word is heard", || world.get("a")["status"]["last_error"].is_null());
    world.end();
}

#[test]
fn a_silent_agent_leaves_the_last_truth() {
    let mut world = World::new();
    for id in ["pending", "running"] {
        world.post(id);
    }
    world.agent.set("running", State::Running, |_| {});
    let seen = world.get("running");
    world.stop_agent();
    let last = world.get("running");
    assert_eq!((&last["state"], &last["status"]["observed_at"]), (&json!("Running"), &seen["status"]["observed_at"]));
    let error = last["status"]["last_error"].as_str().expect("why").to_owned();
    assert!(error.starts_with("node-1: no connection to the agent"), "{error}");
    eventually("the node is lost", || world.status("GET", "/readyz", "") == 503);
    let (status, node) = world.json("GET", "/nodes/node-1", "");
    assert_eq!((status, &node["ready"], &node["node"]["node_id"]), (200, &json!(false), &json!("node-1")));
    let (status, problem) = world.json("POST", "/workloads", &workload("b").to_string());
    assert_eq!((status, &problem["code"]), (503, &json!("no_node")));
    assert_eq!(world.json("GET", "/workloads/running/logs", "").1["code"], "node_unreachable");

    // It comes back and has forgotten everything: what never ran is sent again, what ran is not.
    world.agent.lock().workloads.clear();
    world.start_agent();
    eventually("what never ran is sent again", || world.agent.lock().workloads.contains_key("pending"));
    eventually("the loss is noted", || world.json("GET", "/workloads?state=Failed", "").1["items"][0]["id"] == "running");
    let lost = world.get("running");
    let status = &lost["status"];
    assert_eq!((&lost["state"], &status["reason"], &status["exit_code"]), (&json!("Failed"), &json!("SandboxDied"), &Value::Null));
    assert_eq!(status["message"], "node-1: its agent does not know it any more; how it ended is not known");
    assert_eq!((&status["finished_at"], world.agent.asked("StartWorkload running")), (&Value::Null, 1));
    assert_eq!(world.status("DELETE", "/workloads/running", ""), 202);
    eventually("it is forgotten", || world.status("GET", "/workloads/running", "") == 404);
    world.end();
}

#[test]
fn a_node_that_always_has_news_does_not_hold_up_a_stop() {
    let world = World::new();
    world.post("a");
    let agent = Arc::clone(&world.agent);
    let is_over = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&is_over);
    let news = thread::spawn(move || {
        let limit = soon();
        while !over.load(Ordering::SeqCst) && limit.left().is_ok() {
            agent.set("a", State::Running, |_| {});
            // Less often than a watcher's slice: it never waits one out.
            thread::sleep(Duration::from_millis(20));
        }
    });
    let watch = Stopwatch::start();
    world.end();
    let stopped_ms = watch.elapsed_ms();
    is_over.store(true, Ordering::SeqCst);
    news.join().expect("no panic");
    assert!(stopped_ms < 8000, "{stopped_ms} ms");
}

#[test]
fn a_question_that_overtook_the_start_loses_nothing() {
    let world = World::new();
    let early = world.post("a");
    let id = WorkloadId::new(early["id"].as_str().expect("an id")).expect("an id");
    // As it was when the question was sent: not seen to run.
    let asked = world.running.plane.store.get(&id).expect("there");
    world.agent.set("a", State::Running, |_| {});
    assert_eq!(world.get("a")["state"], "Running");
    let Reply::Error(refusal) = Reply::error(ErrorCode::NotFound, "no such workload", None) else { panic!("no error") };
    let after = world.running.plane.trouble(&asked, &node_client::Error::Refused(refusal)).expect("there");
    assert_eq!(after.state, State::Running);
    world.end();
}

#[test]
fn an_agent_that_is_not_sure_yet_is_asked_again() {
    let mut world = World::new();
    world.post("a");
    world.stop_agent();
    // It has lost the workload, and cannot say so before it has looked.
    world.agent.lock().workloads.clear();
    for _ in 0..3 {
        world.agent.fail("GetStatus", refusal(ErrorCode::Unavailable));
    }
    world.start_agent();
    eventually("it is sent again", || world.agent.lock().workloads.contains_key("a"));
    world.end();
}

#[test]
fn a_deletion_outlasts_a_silent_agent() {
    let mut world = World::new();
    world.post("a");
    world.stop_agent();
    assert_eq!(world.status("DELETE", "/workloads/a", ""), 202);
    assert_eq!(world.status("DELETE", "/workloads/a", ""), 202);
    assert_eq!(world.get("a")["status"]["phase"], "Stopping");
    let (status, problem) = world.json("POST", "/workloads", &workload("a").to_string());
    assert_eq!((status, &problem["code"]), (409, &json!("workload_deleting")));
    world.start_agent();
    eventually("it is gone", || world.status("GET", "/workloads/a", "") == 404);
    assert!(world.agent.lock().workloads.is_empty());
    world.end();
}

#[test]
fn another_agent_at_the_address_is_told_nothing_and_believed_nothing() {
    let mut world = World::new();
    for id in ["deleted", "pending", "running"] {
        world.post(id);
    }
    world.agent.set("running", State::Running, |_| {});
    assert_eq!(world.get("running")["state"], "Running");
    world.stop_agent();
    assert_eq!(world.status("DELETE", "/workloads/deleted", ""), 202);
    let ours = {
        let mut fake = world.agent.lock();
        fake.name = "node-2".into();
        fake.asked.clear();
        std::mem::take(&mut fake.workloads)
    };
    world.start_any_agent();
    let message = |world: &World| world.json("GET", "/nodes/node-1", "").1["message"].clone();
    eventually("it is seen", || message(&world) == "the agent there calls itself \"node-2\"");
    // Passes of the reconciler that would have sent something, and those who ask.
    for _ in 0..3 {
        let passes = world.agent.asked("GetNode");
        eventually("it was asked again who it is", || world.agent.asked("GetNode") > passes);
        assert_eq!(world.get("running")["state"], "Running");
        assert_eq!(world.json("GET", "/workloads/running/logs", "").1["code"], "node_unreachable");
        assert_eq!(world.json("POST", "/workloads/running/exec", r#"{"command":["x"]}"#).1["code"], "node_unreachable");
    }
    assert_eq!(world.get("deleted")["status"]["phase"], "Stopping", "nobody has confirmed that it is gone");
    let other: Vec<String> = world.agent.lock().asked.iter().filter(|asked| !asked.starts_with("GetNode")).cloned().collect();
    assert!(other.is_empty(), "{other:?}");

    world.stop_agent();
    world.agent.lock().name = "node-1".into();
    world.agent.lock().workloads = ours;
    world.start_agent();
    eventually("it is gone", || world.status("GET", "/workloads/deleted", "") == 404);
    assert_eq!((&world.get("running")["state"], &world.get("pending")["state"]), (&json!("Running"), &json!("Pending")));
    assert_eq!(world.agent.asked("StartWorkload"), 0);
    world.end();
}

#[test]
fn a_slow_deletion_is_seen_to_its_end() {
    let world = World::new();
    world.post("a");
    world.agent.lock().deletes_slowly = true;
    assert_eq!(world.status("DELETE", "/workloads/a", ""), 202);
    eventually("the agent is told", || world.agent.asked("DeleteWorkload a") > 0);
    let status = &world.get("a")["status"];
    assert_eq!((&status["phase"], &status["last_error"]), (&json!("Stopping"), &Value::Null));
    world.agent.forget("a");
    eventually("it is gone", || world.status("GET", "/workloads/a", "") == 404);
    world.end();
}

#[test]
fn what_never_arrived_and_is_stopped_is_failed() {
    let mut world = World::new();
    world.post("a");
    world.stop_agent();
    assert_eq!(world.status("POST", "/workloads/a/stop", ""), 202);
    world.agent.lock().workloads.clear();
    world.start_agent();
    eventually("it is failed", || world.get("a")["status"]["reason"] == "Stopped");
    let object = world.get("a");
    assert_eq!((&object["state"], &object["status"]["exit_code"]), (&json!("Failed"), &Value::Null));
    assert_eq!(world.agent.asked("StartWorkload a"), 1);
    world.end();
}

#[test]
fn what_may_have_been_done_is_never_to_be_tried_again() {
    let disk = Scripted::default();
    let world = World::with_store(store::tests::on(&disk), limits::HISTORY_DEFAULT);
    world.post("a");
    world.agent.set("a", State::Running, |_| {});
    let exec = || world.ask("POST", "/workloads/a/exec", r#"{"command":["x"]}"#);
    let unknown = |(head, body): (String, String)| {
        let problem: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!((world::code(&head), &problem["code"]), (504, &json!("outcome_unknown")), "{head}\n{body}");
        assert!(!head.contains("Retry-After"), "{head}");
        problem["detail"].as_str().expect("text").to_owned()
    };
    // The connection is lost once the agent has the request.
    world.agent.fail("Exec", Fault::Close);
    assert_eq!(unknown(exec()), "node-1: the agent closed the connection; it may have been done");
    assert_eq!(world.agent.asked("Exec a"), 1);
    for code in [ErrorCode::Unavailable, ErrorCode::Internal] {
        world.agent.fail("Exec", refusal(code));
        unknown(exec());
    }
    // What the agent did not even take was not done.
    world.agent.fail("Exec", refusal(ErrorCode::ResourceExhausted));
    let (head, body) = exec();
    assert!(head.contains("Retry-After: 1") && body.contains("node_full"), "{head}\n{body}");

    // A commit that failed may be on disk all the same.
    disk.is_full.store(true, Ordering::SeqCst);
    let detail = unknown(world.ask("POST", "/workloads", &workload("b").to_string()));
    assert!(detail.ends_with("it may have been done: b"), "{detail}");
    unknown(world.ask("DELETE", "/workloads/a", ""));
    disk.is_full.store(false, Ordering::SeqCst);
    world.end();
}

#[test]
fn a_race_for_one_id_leaves_nothing_over() {
    let world = World::new();
    thread::scope(|scope| {
        for worker in 0..4 {
            let world = &world;
            scope.spawn(move || {
                for round in 0..40 {
                    let (method, target, body) = match (worker + round) % 3 {
                        0 => ("DELETE", "/workloads/a", String::new()),
                        1 => ("POST", "/workloads/a/stop", String::new()),
                        _ => ("POST", "/workloads", workload("a").to_string()),
                    };
                    let status = world.status(method, target, &body);
                    assert!(matches!(status, 200 | 201 | 202 | 404 | 409), "{method} {target}: {status}");
                }
            });
        }
    });
    eventually("it is gone", || world.status("DELETE", "/workloads/a", "") == 404);
    assert!(world.agent.lock().workloads.is_empty());
    world.end();
}

#[test]
fn lists_show_what_events_told() {
    let world = World::new();
    for id in ["a", "b", "c"] {
        world.post(id);
    }
    let asked = world.agent.asked("GetStatus");
    world.agent.set("b", State::Running, |_| {});
    let ids = |target: &str| {
        let (status, page) = world.json("GET", target, "");
        assert_eq!(status, 200, "{page}");
        let ids: Vec<String> =
            page["items"].as_array().expect("items").iter().map(|item| item["id"].to_string().replace('"', "")).collect();
        (ids.join(" "), page["continue"].as_str().map(str::to_owned))
    };
    eventually("the event arrived", || ids("/workloads?state=Running").0 == "b");
    assert_eq!(ids("/workloads?label=app!=a&state=Pending").0, "c");
    assert_eq!(ids("/workloads?label=app&label=app%3Da").0, "a");
    assert_eq!(ids("/workloads?class=gvisor&node=node-1").0, "a b c");
    assert_eq!(ids("/workloads?class=native").0, "");
    let (first, token) = ids("/v1/workloads?limit=2");
    assert_eq!(first, "a b");
    assert_eq!(ids(&format!("/workloads?limit=2&continue={}", token.expect("more"))), ("c".into(), None));
    assert_eq!(world.agent.asked("GetStatus"), asked, "a list asks no agent");
    // Lists and gets show one shape; only the age of the truth may differ.
    let ageless = |mut object: Value| {
        object["status"]["observed_at"].take();
        object
    };
    let listed = world.json("GET", "/workloads?state=Running", "").1["items"][0].take();
    assert_eq!(ageless(listed), ageless(world.get("b")));
    world.end();
}

#[test]
fn an_answer_waits_for_the_state_asked_for() {
    let world = World::new();
    thread::scope(|scope| {
        let asked = scope.spawn(|| world.json("POST", "/workloads?wait_ms=60000", &workload("a").to_string()));
        eventually("it waits", || world.agent.asked("GetStatus a") == 1);
        world.agent.set("a", State::Running, |_| {});
        let (status, object) = asked.join().expect("answered");
        assert_eq!((status, &object["state"]), (201, &json!("Running")));

        let asked = scope.spawn(|| world.json("GET", "/workloads/a?wait_ms=60000&for=terminal", ""));
        eventually("it waits", || world.agent.asked("GetStatus a") == 2);
        world.agent.set("a", State::Succeeded, |status| status.exit_code = Some(0));
        let (status, object) = asked.join().expect("answered");
        assert_eq!((status, &object["state"], &object["status"]["exit_code"]), (200, &json!("Succeeded"), &json!(0)));
    });
    world.end();
}

#[test]
fn a_stop_does_not_wait_for_those_who_wait() {
    let world = World::new();
    world.post("a");
    let mut stream = Stream::connect(world.http.address(), soon()).expect("connected");
    stream.write_all(b"GET /workloads/a?wait_ms=600000 HTTP/1.1\r\nHost: localhost\r\n\r\n", soon()).expect("written");
    eventually("it waits", || world.agent.asked("GetStatus a") == 1);
    let watch = Stopwatch::start();
    world.running.plane.stopping.set();
    world.end();
    assert!(watch.elapsed_ms() < limits::DRAIN_MS, "{} ms", watch.elapsed_ms());
    let mut buffer = [0; 12];
    assert_eq!(stream.read(&mut buffer, soon()).ok().map(|n| buffer[..n].to_vec()), Some(b"HTTP/1.1 200".to_vec()));
}

#[test]
fn logs_are_lines_of_text() {
    let world = World::new();
    world.post("a");
    let (head, body) = world.ask("GET", "/workloads/a/logs?tail=5&since=10m&stream=stdout", "");
    assert!(head.contains("\r\nContent-Type: text/plain; charset=utf-8"), "{head}");
    assert_eq!(body, "line 1\nline 2\n");
    let (_, body) = world.ask("GET", "/workloads/a/logs?timestamps&follow=1", "");
    assert_eq!(body, "2026-01-01T00:00:01Z line 1\n2026-01-01T00:00:02Z line 2\n");
    let (head, body) = world.send("GET /workloads/a/logs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    assert!(head.contains("\r\nTransfer-Encoding: chunked"), "{head}");
    assert_eq!(body, "e\r\nline 1\nline 2\n\r\n0\r\n\r\n");
    world.agent.fail("GetLogs", refusal(ErrorCode::NotFound));
    assert_eq!(world.json("GET", "/workloads/a/logs?follow", "").1["code"], "unknown_to_node");
    world.end();
}

#[test]
fn a_hole_in_a_log_is_shown() {
    let world = World::new();
    world.post("a");
    let text = r#"{"type":"Log","stream":"stdout","time":"T1","line":"one"}
{"type":"Log","stream":"stdout","time":"T2","line":"three","gap":true}
{"type":"LogEnd","id":"a","gap":true}
"#;
    world.agent.fail("GetLogs", Fault::SayAndClose(text.into()));
    let (_, body) = world.ask("GET", "/workloads/a/logs", "");
    assert_eq!(body, "one\n[kakuri: output is missing here]\nthree\n[kakuri: output is missing here]\n");
    world.agent.fail("GetLogs", Fault::SayAndClose(text.into()));
    let (_, body) = world.ask("GET", "/workloads/a/logs?timestamps", "");
    let (begin, end) = body.split_at(body.len().min("T1 one\nT2 [kakuri: output is missing here]\nT2 three\n".len()));
    assert_eq!(begin, "T1 one\nT2 [kakuri: output is missing here]\nT2 three\n");
    assert!(end.ends_with("Z [kakuri: output is missing here]\n"), "{end}");
    world.end();
}

#[test]
fn a_log_that_breaks_off_is_passed_on_up_to_there_and_not_ended() {
    let world = World::new();
    world.post("a");
    let line = |n: u32| format!("{{\"type\":\"Log\",\"stream\":\"stdout\",\"time\":\"T\",\"line\":\"line {n}\"}}\n");
    for broken in ["{\"type\":\"Log\",\"str", "{\"type\":\"Ok\"}\n", ""] {
        world.agent.fail("GetLogs", Fault::SayAndClose(format!("{}{}{broken}", line(1), line(2)).into()));
        let (_, body) = world.send("GET /workloads/a/logs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let text: String = body.lines().filter(|line| line.starts_with("line")).map(|line| format!("{line} ")).collect();
        assert_eq!(text, "line 1 line 2 ", "{broken:?}");
        assert!(!body.ends_with("0\r\n\r\n"), "{body:?}");
    }
    world.end();
}

#[test]
fn nodes_are_shown_as_their_agents_describe_them() {
    let world = World::new();
    let (status, nodes) = world.json("GET", "/nodes", "");
    let node = &nodes["items"][0];
    assert_eq!((status, &node["id"], &node["ready"], &node["message"]), (200, &json!("node-1"), &json!(true), &Value::Null));
    assert_eq!(node["address"], world.node_address.to_string());
    assert_eq!(node["node"]["runtime_classes"][0]["name"], "gvisor");
    assert_eq!(world.json("GET", "/nodes/node-2", "").1["code"], "not_found");
    let (_, metrics) = world.ask("GET", "/metrics", "");
    assert!(metrics.contains("\nkakuri_node_ready{node=\"node-1\"} 1\n"), "{metrics}");
    assert!(metrics.contains("\nkakuri_workloads{state=\"Running\"} 0\n"), "{metrics}");
    assert!(metrics.contains("\nkakuri_node_workloads_stopping{node=\"node-1\"} 2\n"), "{metrics}");
    assert!(metrics.contains("\nkakuri_node_oldest_stopping_seconds{node=\"node-1\"} 90.500\n"), "{metrics}");
    world.end();
}

#[test]
fn labels_are_changed_here_and_at_the_agent() {
    let mut world = World::new();
    world.post("a");
    let (status, object) = world.json("PATCH", "/workloads/a", r#"{"labels":{"app":null,"tier":"web","x/y":"1"}}"#);
    assert_eq!((status, &object["labels"]), (200, &json!({"tier": "web", "x/y": "1"})));
    let labels_there = |world: &World| world.agent.lock().workloads["a"].spec.get("labels").cloned().unwrap_or_default();
    eventually("the agent knows them", || labels_there(&world) == json!({"tier": "web", "x/y": "1"}));
    // The workload as it is now is the same workload.
    let now = json!({"id": "a", "image": "busybox", "runtime_class": "gvisor", "labels": {"tier": "web", "x/y": "1"}});
    assert_eq!(world.status("POST", "/workloads", &now.to_string()), 200);
    assert_eq!(world.status("POST", "/workloads", &workload("a").to_string()), 409);

    world.stop_agent();
    assert_eq!(world.json("PATCH", "/workloads/a", r#"{"labels":null}"#).1["labels"], Value::Null);
    world.start_agent();
    eventually("the agent hears of it when it is back", || labels_there(&world) == json!({}));
    // One that was started anew has the labels of the start.
    world.stop_agent();
    world.agent.lock().workloads.get_mut("a").expect("there").spec.insert("labels".into(), json!({"old": "1"}));
    world.start_agent();
    eventually("and of what it forgot", || labels_there(&world) == json!({}));

    let check = |body: &str, status: u16, code: &str, pointer: Option<&str>| {
        let (seen, problem) = world.json("PATCH", "/workloads/a", body);
        assert_eq!((seen, problem["code"].as_str()), (status, Some(code)), "{problem}");
        assert_eq!(problem["errors"][0]["pointer"].as_str(), pointer, "{problem}");
    };
    check("{", 400, "bad_json", Some(""));
    check("[]", 422, "invalid_patch", Some(""));
    check(r#"{"image":"b"}"#, 422, "invalid_patch", Some("/image"));
    check(r#"{"a/b~c":1}"#, 422, "invalid_patch", Some("/a~1b~0c"));
    check(r#"{"labels":{"a":1}}"#, 422, "invalid_patch", Some("/labels/a"));
    check(r#"{"labels":{"a b":"x"}}"#, 422, "invalid_patch", Some("/labels/a b"));
    check(r#"{"labels":[]}"#, 422, "invalid_patch", Some("/labels"));
    let many = |from: usize, n: usize| {
        let labels: serde_json::Map<_, _> = (from..from + n).map(|i| (format!("l{i}"), json!("x"))).collect();
        json!({ "labels": labels })
    };
    assert_eq!(world.status("PATCH", "/workloads/a", &many(0, limits::LABELS_MAX).to_string()), 200);
    check(&many(1000, 1).to_string(), 422, "too_many_labels", None);
    assert_eq!(world.status("PATCH", "/workloads/b", r#"{"labels":{}}"#), 404);
    world.end();
}

#[test]
fn an_agent_of_the_version_before_keeps_its_labels_and_runs_all_the_same() {
    let world = World::new();
    world.post("a");
    let unknown = || refusal(ErrorCode::InvalidArgument);
    world.agent.fail("UpdateWorkload", unknown());
    assert_eq!(world.status("PATCH", "/workloads/a", r#"{"labels":{"new":"1"}}"#), 200);
    eventually("it was told", || world.agent.asked("UpdateWorkload a") > 0);
    eventually("that it does not know how is noted", || {
        world.get("a")["status"]["last_error"].is_string() || world.agent.asked("UpdateWorkload a") > 1
    });
    world.agent.set("a", State::Running, |_| {});
    assert_eq!((&world.get("a")["state"], &world.get("a")["labels"]["new"]), (&json!("Running"), &json!("1")));
    // When it is replaced it is told again.
    eventually("it has them", || world.agent.lock().workloads["a"].spec["labels"]["new"] == "1");
    world.end();
}

#[test]
fn labels_change_before_the_agent_ever_answered() {
    let mut world = World::new();
    world.stop_agent();
    let view = |world: &World| world.running.plane.nodes.values().next().expect("a node").view();
    eventually("the node is lost", || !view(&world).is_reachable);
    // The agent takes the start, and its answer is lost, twice.
    world.agent.fail("StartWorkload", Fault::Close);
    world.agent.fail("StartWorkload", Fault::Close);
    let mut lost = Object { state: State::Pending, status: Box::new(crate::wire::Status::accepted(None)), spec: serde_json::Map::new() };
    lost.spec = workload("a").as_object().expect("an object").clone();
    world.agent.lock().workloads.insert("a".into(), lost);
    world.start_agent();
    // Before its list is known it would be asked what it has, and that is not what is to fail.
    eventually("its list is known", || world.json("GET", "/nodes/node-1", "").1["strangers"] == json!(1));
    world.agent.fail("GetStatus", refusal(ErrorCode::Unavailable));
    assert_eq!(world.status("POST", "/workloads", &workload("a").to_string()), 201);
    assert_eq!(world.status("PATCH", "/workloads/a", r#"{"labels":{"new":"1"}}"#), 200);
    eventually("it has them", || world.agent.lock().workloads["a"].spec["labels"]["new"] == "1");
    assert_eq!(world.get("a")["state"], "Pending");
    world.end();
}

#[test]
fn what_ran_is_never_started_again_not_even_between_two_attempts() {
    let mut world = World::new();
    world.post("a");
    world.agent.set("a", State::Running, |_| {});
    assert_eq!(world.get("a")["state"], "Running");
    // The agent starts it again by its own policy, and then loses all it knows.
    world.agent.set("a", State::Pending, |status| (status.attempt, status.restarts) = (1, 1));
    assert_eq!((&world.get("a")["state"], &world.get("a")["status"]["restarts"]), (&json!("Pending"), &json!(1)));
    world.stop_agent();
    assert_eq!(world.status("POST", "/workloads/a/stop", ""), 202);
    world.agent.lock().workloads.clear();
    world.start_agent();
    eventually("the loss is noted", || world.get("a")["state"] == "Failed");
    let status = &world.get("a")["status"];
    assert_eq!((&status["reason"], &status["exit_code"]), (&json!("SandboxDied"), &Value::Null), "whether the stop ended it nobody knows");
    assert_eq!(world.agent.asked("StartWorkload a"), 1);
    world.end();
}

#[test]
fn what_nobody_here_placed_is_left_alone_and_shown() {
    let mut world = World::new();
    world.stop_agent();
    let mut other = Object { state: State::Running, status: Box::new(crate::wire::Status::accepted(None)), spec: serde_json::Map::new() };
    other.spec.insert("id".into(), json!("theirs"));
    world.agent.lock().workloads.insert("theirs".into(), other);
    world.start_agent();
    let strangers = |world: &World| world.json("GET", "/nodes/node-1", "").1["strangers"].clone();
    eventually("it is seen", || strangers(&world) == json!(1));
    let (_, metrics) = world.ask("GET", "/metrics", "");
    assert!(metrics.contains("\nkakuri_node_strangers{node=\"node-1\"} 1\n"), "{metrics}");
    world.post("ours");
    assert_eq!(world.status("DELETE", "/workloads/ours", ""), 202);
    eventually("ours is gone", || world.status("GET", "/workloads/ours", "") == 404);
    assert!(world.agent.lock().workloads.contains_key("theirs"));
    assert_eq!((world.agent.asked("DeleteWorkload theirs"), world.agent.asked("StopWorkload theirs")), (0, 0));
    world.agent.forget("theirs");
    eventually("it is gone", || strangers(&world) == json!(0));
    world.end();
}

#[test]
fn what_ended_first_makes_room() {
    let world = World::with_history(2);
    for id in ["a", "b", "c", "d", "e"] {
        world.post(id);
    }
    for (second, id) in ["d", "b", "a", "c"].into_iter().enumerate() {
        let ended = format!("2026-01-01T00:00:0{second}Z");
        world.agent.set(id, State::Succeeded, |status| status.finished_at = Timestamp::parse(&ended));
    }
    let ids = |world: &World| {
        let page = world.json("GET", "/workloads", "").1;
        page["items"].as_array().expect("items").iter().filter_map(|item| item["id"].as_str()).collect::<Vec<_>>().join(" ")
    };
    eventually("two of those that ended are left, and what runs", || ids(&world) == "a c e");
    let there: Vec<String> = world.agent.lock().workloads.keys().cloned().collect();
    assert_eq!(there, ["a", "c", "e"], "at the agent too");
    world.end();
}

/// Reads `GET /events` line by line.
struct Events(Stream, LineReader);

impl Events {
    fn of(world: &World, target: &str, headers: &str) -> Self {
        let mut stream = Stream::connect(world.http.address(), soon()).expect("connected");
        stream.write_all(format!("GET {target} HTTP/1.0\r\n{headers}\r\n").as_bytes(), soon()).expect("written");
        let mut events = Self(stream, LineReader::new(limits::LINE_BYTES_MAX, 5000));
        let head = events.text();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        while !events.text().trim().is_empty() {}
        events
    }

    fn text(&mut self) -> String {
        let line = self.1.next(&mut self.0, soon()).expect("a line").expect("not the end");
        String::from_utf8(line.to_vec()).expect("text")
    }

    fn next(&mut self) -> Value {
        serde_json::from_str(&self.text()).expect("JSON")
    }

    /// `EVENT id state` of the next lines, with the revisions growing.
    fn expect(&mut self, expect: &[&str]) -> u64 {
        let mut last = 0;
        for expect in expect {
            let line = self.next();
            let part = |value: &Value| value.as_str().map(str::to_owned);
            let parts = [&line["event"], &line["object"]["id"], &line["object"]["state"]].into_iter().filter_map(part);
            assert_eq!(parts.collect::<Vec<_>>().join(" "), *expect, "{line}");
            let revision = line["revision"].as_u64().expect("a revision");
            assert!(revision >= last, "{line}");
            last = revision;
        }
        last
    }
}

#[test]
fn changes_are_told_in_order_and_can_be_had_again() {
    let world = World::new();
    let mut all = Events::of(&world, "/events", "");
    let begin = all.expect(&["HEARTBEAT"]);
    world.post("a");
    world.agent.set("a", State::Running, |_| {});
    // Accepted; answered for by its agent; told by its events.
    let mut seen = vec![all.next()];
    while seen.last().is_some_and(|line| line["object"]["state"] != "Running") {
        seen.push(all.next());
    }
    assert_eq!((&seen[0]["event"], &seen[0]["object"]["id"]), (&json!("ADDED"), &json!("a")));
    assert!(seen[1..].iter().all(|line| line["event"] == "MODIFIED"), "{seen:?}");
    let mut again = Events::of(&world, &format!("/events?since={begin}"), "");
    again.expect(&["HEARTBEAT"]);
    assert_eq!(seen.iter().map(|_| again.next()).collect::<Vec<_>>(), seen);
    let running = seen.last().expect("some")["revision"].as_u64().expect("a revision");

    world.post("b");
    let mut replay = Events::of(&world, "/events?replay&id=a", "");
    let at = replay.expect(&["ADDED a Running", "HEARTBEAT"]);
    assert!(at > running);
    // A list says from where on to follow.
    let revision = world.json("GET", "/workloads", "").1["revision"].as_u64().expect("a revision");
    assert!(revision >= at);

    // Who sees what has a label sees it come and go.
    let mut labelled = Events::of(&world, "/events?label=tier=web", "");
    labelled.expect(&["HEARTBEAT"]);
    assert_eq!(world.status("PATCH", "/workloads/a", r#"{"labels":{"tier":"web"}}"#), 200);
    labelled.expect(&["ADDED a Running"]);
    assert_eq!(world.status("PATCH", "/workloads/a", r#"{"labels":{"tier":null}}"#), 200);
    loop {
        let line = labelled.next();
        if line["event"] == "DELETED" {
            assert_eq!(line["object"]["id"], "a");
            break;
        }
        assert_eq!(line["event"], "MODIFIED", "{line}");
    }
    world.agent.forget("b");
    assert_eq!(world.status("DELETE", "/workloads/b", ""), 202);
    let mut of_b = Events::of(&world, &format!("/events?id=b&since={revision}"), "");
    of_b.expect(&["HEARTBEAT"]);
    while of_b.next()["event"] != "DELETED" {}

    let (status, problem) = world.json("GET", "/events?since=99999999999", "");
    assert_eq!((status, &problem["code"]), (410, &json!("events_gone")), "{problem}");
    world.running.plane.stopping.set();
    let last = std::iter::repeat_with(|| all.next()).find(|line| line["event"] != "MODIFIED" && line["object"].is_null());
    assert_eq!(last.expect("a last line")["event"], "STOPPING");
    world.end();
}

#[test]
fn looking_at_a_workload_changes_nothing() {
    let world = World::new();
    world.post("a");
    world.agent.set("a", State::Running, |_| {});
    eventually("the event arrived", || world.json("GET", "/workloads?state=Running", "").1["items"][0]["id"] == "a");
    let first = world.get("a");
    let newest = |world: &World| world.running.plane.store.kept().newest;
    let before = newest(&world);
    for _ in 0..100 {
        world.get("a");
    }
    assert_eq!(newest(&world), before);
    let time = |object: &Value| Timestamp::parse(object["status"]["observed_at"].as_str().expect("a time")).expect("a time");
    eventually("its truth grows younger all the same", || time(&world.get("a")) > time(&first));
    world.end();
}

#[test]
fn browsers_get_server_sent_events() {
    let world = World::new();
    let mut events = Events::of(&world, "/events", "Accept: text/event-stream\r\n");
    let id = events.text();
    let revision: u64 = id.trim().strip_prefix("id: ").expect("an id").parse().expect("a number");
    assert_eq!(events.text(), "event: HEARTBEAT");
    assert!(events.text().starts_with("data: {\"revision\":"));
    assert_eq!(events.text(), "");
    world.post("a");
    let mut again = Events::of(&world, "/events?since=1", &format!("Accept: text/event-stream\r\nLast-Event-ID: {revision}\r\n"));
    let read = |events: &mut Events| (0..4).map(|_| events.text()).collect::<Vec<_>>();
    assert_eq!(read(&mut again)[1], "event: HEARTBEAT");
    let added = read(&mut again);
    assert_eq!(added[1], "event: ADDED");
    assert_eq!(read(&mut events), added);
    // What is replayed has no id: one who breaks off in the middle has not all of it.
    let mut replay = Events::of(&world, "/events?replay", "Accept: text/event-stream\r\n");
    assert_eq!(replay.text(), "event: ADDED");
    world.end();
}

#[test]
fn followers_have_a_limit() {
    let world = World::new();
    let store = &world.running.plane.store;
    let mut followers: Vec<_> = (0..limits::FOLLOWERS_MAX).map(|_| store.follow().expect("a place")).collect();
    let (status, problem) = world.json("GET", "/events", "");
    assert_eq!((status, &problem["code"]), (503, &json!("too_many_followers")));
    followers.pop();
    Events::of(&world, "/events", "").expect(&["HEARTBEAT"]);
    drop(followers);
    world.end();
}

#[test]
fn one_that_falls_behind_is_told() {
    let world = World::new();
    world.post("a");
    let mut slow = Events::of(&world, "/events", "");
    slow.expect(&["HEARTBEAT"]);
    // More than is kept and than the sockets hold; nothing of it is read meanwhile.
    let id = crate::workload::WorkloadId::new("a").expect("an id");
    let text = "x".repeat(60_000);
    for i in 0..1000 {
        let noted = world.running.plane.store.note(&id, |record| Some(record.troubled(format!("{i} {text}"))));
        assert!(noted.is_ok());
        let mut large = world.running.plane.store.get(&id).expect("there").as_ref().clone();
        large.status.message = Some(format!("{i} {text}"));
        assert!(world.running.plane.store.note(&id, |_| Some(large)).is_ok());
    }
    let last = std::iter::repeat_with(|| slow.next()).find(|line| line["event"] == "GONE").expect("an end");
    assert!(last["detail"].as_str().is_some_and(|text| text.contains("too slowly")), "{last}");
    world.end();
}
