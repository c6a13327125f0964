//! The HTTP API, over a control plane, an agent and a runtime.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::harness::place::{IMAGE, with};
use crate::harness::{Agent, Place, Plane, SOON_MS, eventually, until};

scenarios! {
    a_workload_lives_over_http
    a_log_is_passed_on
    a_workload_that_ends_by_itself_is_listed_so
}

fn a_workload_lives_over_http(place: &Place) {
    let agent = place.agent(&[]);
    let plane = Plane::start(place, &[&agent], &[]);
    let workload = with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0, "labels": {"app": "web"}}));
    let answer = plane.post("/workloads", &workload);
    assert_eq!((answer.status, answer.header("location")), (201, Some("/workloads/wl-1")), "{}", answer.text());
    let object = answer.json();
    for (field, value) in workload.as_object().expect("an object") {
        assert_eq!(&object[field], value, "{field}");
    }
    assert_eq!((&object["state"], &object["status"]["node"]), (&json!("Pending"), &json!(agent.node)));

    // The same again is the same; what the first answer was held for, the second may be too.
    let answer = plane.post(&format!("/workloads?wait_ms={SOON_MS}"), &workload);
    assert_eq!((answer.status, answer.json()["state"].clone()), (200, json!("Running")));
    let object = plane.workload("wl-1");
    assert_eq!((object["state"].clone(), object["status"]["restarts"].clone()), (json!("Running"), json!(0)));
    let fields: BTreeSet<&str> = object["status"].as_object().expect("an object").keys().map(String::as_str).collect();
    let promised = [
        "reason",
        "message",
        "phase",
        "node",
        "attempt",
        "restarts",
        "exit_code",
        "oom_killed",
        "sandbox_id",
        "container_id",
        "image_digest",
        "ip",
        "handler",
        "isolation",
        "created_at",
        "started_at",
        "finished_at",
        "observed_at",
        "timings_ms",
        "placement",
        "last_error",
    ];
    assert_eq!(fields, BTreeSet::from(promised));
    assert_eq!(object["status"]["sandbox_id"], json!(place.sandboxes()[0].id));
    // GET, POST and list show one and the same.
    let stable = |object: &Value| {
        let mut object = object.clone();
        object["status"].as_object_mut().map(|s| (s.remove("observed_at"), s.remove("isolation")));
        object
    };
    let listed = plane.get("/workloads").json();
    assert_eq!(listed["continue"], Value::Null);
    assert_eq!(listed["items"].as_array().map(|items| items.iter().map(stable).collect::<Vec<_>>()), Some(vec![stable(&object)]));

    let exec = plane.post("/workloads/wl-1/exec", &json!({"command": ["sh", "-c", "echo hi; exit 3"]}));
    let result = exec.json();
    assert_eq!((exec.status, &result["exit_code"], &result["stdout"]), (200, &json!(3), &json!("hi\n")), "{result}");

    let answer = plane.post("/workloads/wl-1/stop", &Value::Null);
    assert_eq!((answer.status, answer.json()["status"]["phase"].clone()), (202, json!("Stopping")));
    let ended = plane.ended("wl-1");
    assert_eq!((&ended["state"], &ended["status"]["reason"]), (&json!("Failed"), &json!("Stopped")), "{ended}");
    assert_eq!(plane.post("/workloads/wl-1/stop", &Value::Null).status, 202, "again is fine");
    let answer = plane.post("/workloads/wl-1/exec", &json!({"command": ["true"]}));
    assert_eq!(answer.problem(), (409, "not_running".into()));

    let answer = plane.ask("DELETE", "/workloads/wl-1", None);
    assert_eq!((answer.status, answer.json()["id"].clone()), (202, json!("wl-1")));
    until("it is gone", || plane.get("/workloads/wl-1").status == 404);
    assert_eq!(plane.ask("DELETE", "/workloads/wl-1", None).problem(), (404, "not_found".into()));
    assert_eq!((place.sandboxes(), agent.list()), (vec![], vec![]));
    // The id is free.
    assert_eq!(plane.post("/workloads", &with(workload, json!({"command": ["true"]}))).status, 201);
}

fn a_log_is_passed_on(place: &Place) {
    let agent = place.agent(&[]);
    let plane = Plane::start(place, &[&agent], &[]);
    plane.run(&place.workload("wl-1", &["sh", "-c", "echo one; sleep 0.5; echo two >&2; sleep 0.5; echo three"]));
    // Followed: the first line comes long before the last, and the end comes by itself.
    let mut http = plane.http();
    http.send(b"GET /workloads/wl-1/logs?follow HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let head = http.try_head().expect("a response");
    assert_eq!((head.status, head.header("transfer-encoding")), (200, Some("chunked")));
    assert_eq!(head.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(http.chunk().as_deref(), Some(&b"one\n"[..]));
    assert_eq!(plane.workload("wl-1")["state"], "Running");
    let rest: Vec<u8> = std::iter::from_fn(|| http.chunk()).flatten().collect();
    assert_eq!(String::from_utf8_lossy(&rest), "two\nthree\n");
    // The connection lives on.
    http.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(http.answer().text(), "ok\n");

    plane.ended("wl-1");
    let logs = |query: &str| {
        let answer = plane.get(&format!("/workloads/wl-1/logs{query}"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.text().to_owned()
    };
    assert_eq!(logs(""), "one\ntwo\nthree\n");
    assert_eq!(logs("?tail=1"), "three\n");
    assert_eq!(logs("?stream=stderr"), "two\n");
    assert_eq!(logs("?since=1h"), "one\ntwo\nthree\n");
    assert_eq!(logs("?since=0s"), "");
    assert_eq!(logs("?follow=true&tail=2"), "two\nthree\n");
    let stamped = logs("?timestamps");
    let times: Vec<&str> = stamped.lines().filter_map(|line| line.split_once(' ')).map(|(time, _)| time).collect();
    assert_eq!(times.len(), 3, "{stamped}");
    assert!(times.iter().all(|time| time.contains('T') && time.len() > 20), "{stamped}");
    assert_eq!(plane.get("/workloads/nobody/logs").problem(), (404, "not_found".into()));
}

fn a_workload_that_ends_by_itself_is_listed_so(place: &Place) {
    let agent = place.agent(&[]);
    let plane = Plane::start(place, &[&agent], &[]);
    plane.run(&place.workload("wl-1", &["sh", "-c", "sleep 0.3; exit 4"]));
    // The list asks no agent: what it shows came by an event.
    let listed = eventually("it is listed as ended", SOON_MS, || {
        Some(plane.get("/workloads?state=Failed").json()["items"][0].clone()).filter(|item| !item.is_null())
    });
    assert_eq!((&listed["id"], &listed["status"]["exit_code"]), (&json!("wl-1"), &json!(4)), "{listed}");
}

#[test]
fn an_id_is_made_where_there_is_none() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let mut ids = BTreeSet::new();
    for _ in 0..5 {
        let answer = plane.post("/workloads", &json!({"image": IMAGE, "runtime_class": "native", "command": ["true"]}));
        let id = answer.json()["id"].as_str().expect("an id").to_owned();
        assert_eq!(answer.header("location"), Some(format!("/workloads/{id}").as_str()));
        let random = id.strip_prefix("wl-").expect("wl-");
        assert!(random.len() == 12 && random.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7')), "{id}");
        ids.insert(id);
    }
    assert_eq!(ids.len(), 5);
}

#[test]
fn a_body_hears_of_everything_that_is_wrong_with_it() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let rules = |body: &str| {
        let answer = plane.http().ask("POST", "/workloads", &["Content-Type: application/json", "Connection: close"], body.as_bytes());
        let json = answer.json();
        let errors = json["errors"].as_array().cloned().unwrap_or_default();
        let pointers: Vec<String> = errors.iter().map(|e| e["pointer"].as_str().unwrap_or_default().to_owned()).collect();
        (answer.status, json["code"].as_str().unwrap_or_default().to_owned(), pointers)
    };
    let check = |body: &str, status: u16, code: &str, pointers: &[&str]| {
        assert_eq!(rules(body), (status, code.to_owned(), pointers.iter().map(|p| (*p).to_owned()).collect()), "{body}");
    };
    check(
        r#"{"id":"-","image":"busybox","runtime_class":"native","memory_mb":0,"x":1}"#,
        422,
        "invalid_workload",
        &["/id", "/memory_mb", "/x"],
    );
    check(r#"{"image":"busybox"}"#, 422, "invalid_workload", &["/runtime_class"]);
    check("{}", 422, "invalid_workload", &["/image", "/runtime_class"]);
    check(r#"{"image":"busybox","runtime_class":"nope"}"#, 422, "unknown_class", &["/runtime_class"]);
    check(r#"{"image":"busybox","security_profile":"nope"}"#, 422, "invalid_workload", &["/security_profile"]);
    check(
        r#"{"image":"busybox","runtime_class":"native","mounts":[{"source":"/etc","target":"/x"}]}"#,
        422,
        "node_rule",
        &["/mounts/0/source"],
    );
    check(r#"{"image":"busybox","image":"busybox","runtime_class":"native"}"#, 400, "bad_json", &["/image"]);
    check("[]", 422, "invalid_workload", &[""]);
    check("{", 400, "bad_json", &[""]);
    check("", 400, "bad_json", &[""]);
    check(r#"{"image":"busybox","security_profile":"internal","runtime_class":"kata"}"#, 403, "policy_denied", &[]);
    let detail = plane.post("/workloads", &json!({"image": "busybox", "runtime_class": "nope"})).json()["detail"].clone();
    assert_eq!(detail, "no node offers this runtime class; on offer: gvisor, kata, native");
    assert_eq!(plane.get("/workloads").json()["items"], json!([]));
    assert_eq!(agent.list(), []);
}

#[test]
fn a_request_that_is_not_json_is_told_so() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let post = |headers: &str, body: &str| {
        let mut http = plane.http();
        http.send(format!("POST /workloads HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n{body}").as_bytes());
        http.answer().problem()
    };
    assert_eq!(post("", ""), (411, "body_required".into()));
    assert_eq!(post("Content-Length: 2\r\nContent-Type: text/plain\r\n", "{}"), (415, "not_json".into()));
    assert_eq!(post("Content-Length: 2\r\nContent-Type: application/x-www-form-urlencoded\r\n", "{}"), (415, "not_json".into()));
    assert_eq!(post("Content-Length: 2\r\nContent-Type: application/JSON; charset=utf-8\r\n", "{}"), (422, "invalid_workload".into()));
    assert_eq!(post("Content-Length: 2\r\n", "{}"), (415, "not_json".into()), "a web page can send that");
    let chunks = "1\r\n{\r\n1\r\n}\r\n0\r\n\r\n";
    assert_eq!(post("Transfer-Encoding: chunked\r\n", chunks), (415, "not_json".into()));
    assert_eq!(post("Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n", chunks), (422, "invalid_workload".into()));
}

#[test]
fn lists_select_and_come_in_pages() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    for (i, id) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
        let labels = if i % 2 == 0 { json!({"app": "web", "n": i.to_string()}) } else { json!({"app": "db"}) };
        let class = if i == 4 { "gvisor" } else { "native" };
        plane.run(&with(place.workload(id, &["sleep", "1000"]), json!({"labels": labels, "runtime_class": class, "stop_grace_ms": 0})));
    }
    plane.post("/workloads/b/stop", &Value::Null);
    plane.ended("b");
    let list = |query: &str| {
        let page = plane.get(&format!("/workloads{query}")).json();
        let items = page["items"].as_array().expect("items").clone();
        let ids: Vec<String> = items.iter().map(|item| item["id"].as_str().expect("an id").to_owned()).collect();
        (ids.join(""), page["continue"].as_str().map(str::to_owned))
    };
    let check = |query: &str, expect: &str| assert_eq!(list(query), (expect.to_owned(), None), "{query}");
    check("", "abcde");
    check("?state=Running", "acde");
    check("?state=Failed", "b");
    check("?label=app=web", "ace");
    check("?label=app%21=web", "bd");
    check("?label=app=web,n=0", "a");
    check("?label=app=web&label=n=2", "c");
    check("?label=n", "ace");
    check("?label=%21n", "bd");
    check("?class=gvisor", "e");
    check(&format!("?node={}", agent.node), "abcde");
    check("?node=other", "");
    check("?state=Running&label=app=db", "d");
    let (ids, token) = list("?limit=2");
    assert_eq!(ids, "ab");
    let (ids, token) = list(&format!("?limit=2&continue={}", token.expect("more")));
    assert_eq!(ids, "cd");
    let (ids, token) = list(&format!("?limit=2&continue={}", token.expect("more")));
    assert_eq!((ids.as_str(), token), ("e", None));
    for (query, code) in [
        ("?limit=0", "bad_query"),
        ("?limit=501", "bad_query"),
        ("?limit=x", "bad_query"),
        ("?limit=1&limit=2", "bad_query"),
        ("?state=running", "bad_query"),
        ("?label=", "bad_query"),
        ("?label=a%20in%20(b)", "bad_query"),
        ("?node=A", "bad_query"),
        ("?continue=%21%21", "bad_continue"),
        ("?stat=Running", "bad_query"),
        ("?wait_ms=1", "bad_query"),
    ] {
        assert_eq!(plane.get(&format!("/workloads{query}")).problem(), (400, code.into()), "{query}");
    }
}

#[test]
fn a_profile_chooses_the_class_and_never_a_weaker_one() {
    let place = Place::sim(&[]);
    let agent = place.agent(&["--runtime-class", "gvisor=gvisor", "--runtime-class", "native=runc", "--runtime-class", "edera-zone=edera"]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let post = |id: &str, more: Value| {
        let body = with(json!({"id": id, "image": IMAGE, "memory_mb": 300, "command": ["sleep", "9"], "stop_grace_ms": 0}), more);
        plane.post(&format!("/workloads?wait_ms={SOON_MS}"), &body)
    };
    for (profile, class) in [("untrusted", "edera-zone"), ("multi-tenant", "edera-zone"), ("internal", "gvisor")] {
        let object = post(profile, json!({"security_profile": profile})).json();
        assert_eq!((&object["runtime_class"], &object["state"]), (&json!(class), &json!("Running")), "{object}");
    }
    assert_eq!(post("a", json!({"security_profile": "untrusted", "runtime_class": "gvisor"})).problem(), (403, "policy_denied".into()));
    assert_eq!(post("a", json!({"security_profile": "untrusted", "runtime_class": "native"})).problem(), (403, "policy_denied".into()));
    assert_eq!(post("a", json!({"security_profile": "internal", "runtime_class": "native"})).status, 201);
}

#[test]
fn a_workload_goes_where_it_fits_and_the_others_say_why_not() {
    let place = Place::sim(&[]);
    let a = place.agent_named("a", &["--label", "zone=a"]);
    let b = place.agent_named("b", &["--label", "zone=b", "--runtime-class", "native=runc", "--runtime-class", "ghost=nope"]);
    let plane = Plane::start(&place, &[&a, &b], &[]);
    let workload = |id: &str, more: Value| with(place.workload(id, &["sleep", "1000"]), with(json!({"stop_grace_ms": 0}), more));
    // (id, what it wants, where it goes, why not the other)
    for (id, wants, there, other, why) in [
        ("anywhere", json!({}), &a, &b, format!("fits too; {} comes first", a.node)),
        ("by-class", json!({"runtime_class": "gvisor"}), &a, &b, "runtime_class: gvisor is not on offer".into()),
        ("by-label", json!({"node_selector": {"zone": "b"}}), &b, &a, "node_selector: wants zone=b".into()),
    ] {
        let object = plane.run(&workload(id, wants));
        assert_eq!(object["status"]["node"], json!(there.node), "{object}");
        assert_eq!(object["status"]["placement"]["rejected"], json!({other.node.as_str(): why}), "{object}");
    }
    for (wants, code, words) in [
        (json!({"node_selector": {"zone": "c"}}), (503, "no_node"), "node_selector: wants zone=c"),
        (json!({"runtime_class": "ghost"}), (503, "no_node"), "the runtime does not offer the handler of ghost"),
        (json!({"runtime_class": "nope"}), (422, "unknown_class"), "on offer: ghost, gvisor, kata, native"),
    ] {
        let answer = plane.post("/workloads", &workload("nowhere", wants.clone()));
        assert_eq!(answer.problem(), (code.0, code.1.into()), "{wants}");
        assert_eq!(answer.header("retry-after"), (code.0 == 503).then_some("1"));
        let detail = answer.json()["detail"].as_str().unwrap_or_default().to_owned();
        assert!(detail.contains(words), "{wants}: {detail}");
    }
    // What was placed where is found there.
    let ids = |agent: &Agent<'_>| agent.list().iter().map(|o| o.spec["id"].clone()).collect::<Vec<_>>();
    assert_eq!((ids(&a), ids(&b)), (vec![json!("anywhere"), json!("by-class")], vec![json!("by-label")]));
    let listed = plane.get(&format!("/workloads?node={}", b.node)).json();
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(1));
}

#[test]
fn a_node_that_is_lost_changes_no_state_and_is_found_again() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let workload = with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0}));
    let before = plane.run(&workload);
    plane.run(&place.workload("wl-2", &["sh", "-c", "sleep 0.5; exit 6"]));
    agent.kill();
    until("the node is not ready", || plane.get("/nodes").json()["items"][0]["ready"] == false);
    let node = plane.get(&format!("/nodes/{}", agent.node)).json();
    assert!(node["message"].as_str().is_some_and(|m| !m.is_empty()) && !node["observed_at"].is_null(), "{node}");
    assert_eq!(plane.get("/readyz").status, 503);
    assert_eq!(plane.get("/livez").status, 200);
    // The last known truth, and how old it is.
    let object = plane.workload("wl-1");
    assert_eq!((&object["state"], &object["status"]["container_id"]), (&json!("Running"), &before["status"]["container_id"]));
    let observed = object["status"]["observed_at"].clone();
    assert_eq!(plane.workload("wl-1")["status"]["observed_at"], observed);
    assert!(object["status"]["last_error"].as_str().is_some_and(|e| e.contains("agent")), "{object}");
    let answer = plane.post("/workloads", &place.workload("wl-3", &["true"]));
    assert_eq!(answer.problem(), (503, "no_node".into()));
    assert_eq!(plane.get("/workloads/wl-1/logs").status, 503);
    assert_eq!(plane.post("/workloads/wl-1/exec", &json!({"command": ["true"]})).status, 503);
    // A wish is remembered and carried out later.
    assert_eq!(plane.ask("DELETE", "/workloads/wl-1", None).status, 202);
    agent.again();
    until("the node is ready", || plane.get("/nodes").json()["items"][0]["ready"] == true);
    until("the deletion is carried out", || plane.get("/workloads/wl-1").status == 404);
    let ended = plane.ended("wl-2");
    assert_eq!((&ended["state"], &ended["status"]["exit_code"]), (&json!("Failed"), &json!(6)), "{ended}");
    assert_eq!(plane.get("/readyz").status, 200);
}

#[test]
fn a_workload_that_waited_for_its_node_is_sent_again() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    // The agent accepts and forgets: it dies in the start, before anything of it is at the runtime.
    place.faults(&["ImageStatus:hang*1"]);
    let workload = with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0}));
    assert_eq!(plane.post("/workloads", &workload).status, 201);
    until("it hangs", || place.calls().iter().any(|call| call.starts_with("ImageStatus hang")));
    agent.kill();
    place.faults(&[]);
    agent.again();
    until("it runs", || plane.workload("wl-1")["state"] == "Running");
    assert_eq!(place.sandboxes().len(), 1);
}

#[test]
fn an_agent_that_is_somebody_else_gets_no_work() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start_now(&place, &[], &["--node", &format!("impostor={}", agent.address)]);
    let node = eventually("the agent answered", SOON_MS, || Some(plane.get("/nodes/impostor").json()).filter(|n| !n["node"].is_null()));
    assert_eq!((&node["ready"], &node["message"]), (&json!(false), &json!(format!("the agent there calls itself {:?}", agent.node))));
    assert_eq!(plane.post("/workloads", &place.workload("wl-1", &["true"])).problem(), (503, "no_node".into()));
}

#[test]
fn without_a_node_nothing_is_ready_and_all_is_said() {
    let place = Place::sim(&[]);
    let plane = Plane::start_now(&place, &[], &[]);
    let answer = plane.get("/readyz");
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    assert_eq!(answer.text(), "[+]store ok\n[-]nodes: none is configured\nnot ready\n");
    assert_eq!((plane.get("/livez").status, plane.get("/healthz").status), (200, 200));
    assert_eq!(plane.post("/workloads", &place.workload("wl-1", &["true"])).problem(), (503, "no_node".into()));
}

#[test]
fn a_listener_for_everybody_is_said_where_readiness_is() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &["--insecure-listen"]);
    assert_eq!(plane.get("/readyz").text(), "ok\n[!]insecure-listen: whoever reaches a listener may do everything\n");
}

#[test]
fn every_route_answers_as_the_table_says() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let check = |method: &str, target: &str, status: u16| {
        let answer = plane.ask(method, target, None);
        assert_eq!(answer.status, status, "{method} {target}: {}", answer.head);
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        assert!(answer.header("x-request-id").is_some() && answer.header("date").is_some(), "{}", answer.head);
        assert_eq!(answer.header("server"), None);
        answer
    };
    for target in
        ["/", "/nope", "/workloads/a/b/c", "/v1", "/v1/v1/workloads", "/v2/workloads", "/nodes/nobody", "/workloads/-", "/workloads/A"]
    {
        check("GET", target, 404).problem();
    }
    for target in ["/workloads", "/v1/workloads", "/nodes", "/livez", "/healthz", "/readyz", "/metrics", "/version", "/openapi.json"] {
        check("GET", target, 200);
        let head = check("HEAD", target, 200);
        assert!(head.body.is_empty());
        let options = check("OPTIONS", target, 204);
        assert!(options.header("allow").is_some_and(|allow| allow.contains("GET, ") && allow.ends_with("HEAD")), "{}", options.head);
    }
    for (method, target, allow) in [
        ("PUT", "/workloads", "GET, POST, HEAD"),
        ("DELETE", "/workloads", "GET, POST, HEAD"),
        ("POST", "/workloads/a", "DELETE, GET, PATCH, HEAD"),
        ("PUT", "/workloads/a", "DELETE, GET, PATCH, HEAD"),
        ("GET", "/workloads/a/stop", "POST"),
        ("DELETE", "/nodes", "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
    ] {
        let answer = check(method, target, 405);
        assert_eq!(answer.header("allow"), Some(allow), "{method} {target}");
        assert_eq!(answer.problem(), (405, "method_not_allowed".into()));
    }
    for (method, target) in [("POST", "/nodes/a/drain"), ("PUT", "/security-profiles/a"), ("POST", "/api/runtime-cloud/x")] {
        assert_eq!(check(method, target, 501).problem(), (501, "not_implemented".into()), "{method} {target}");
    }
    let version = plane.get("/version").json();
    assert_eq!(version, json!({"version": env!("CARGO_PKG_VERSION"), "api": "v1", "program": "kakuri-control-plane"}));
}

#[test]
fn every_route_is_described() {
    let place = Place::sim(&[]);
    let plane = Plane::start_now(&place, &[], &[]);
    let description = plane.get("/openapi.json").json();
    assert!(description["openapi"].as_str().is_some_and(|v| v.starts_with("3.")), "{}", description["openapi"]);
    let paths = description["paths"].as_object().expect("paths");
    for path in [
        "/workloads",
        "/workloads/{id}",
        "/workloads/{id}/stop",
        "/workloads/{id}/logs",
        "/workloads/{id}/exec",
        "/nodes",
        "/nodes/{id}",
        "/events",
        "/livez",
        "/readyz",
        "/healthz",
        "/metrics",
        "/version",
        "/openapi.json",
    ] {
        assert!(paths.contains_key(path), "{path} is not described");
    }
    // And what is described is there.
    for (path, methods) in paths {
        // A stream of events that begins does not end.
        let target = path.replace("{id}", "a").replace("{name}", "a").replace("/events", "/events?since=999999999999");
        let is_method = |key: &&String| ["get", "patch", "post", "put", "delete"].contains(&key.as_str());
        for method in methods.as_object().expect("methods").keys().filter(is_method) {
            let answer = plane.ask(&method.to_uppercase(), &target, None);
            let code = if answer.status < 400 || answer.header("content-type") != Some("application/problem+json") {
                String::new()
            } else {
                answer.problem().1
            };
            assert!(code != "no_route" && code != "method_not_allowed", "{method} {path}: {code}");
        }
    }
}

#[test]
fn a_request_keeps_its_id() {
    let place = Place::sim(&[]);
    let plane = Plane::start_now(&place, &[], &[]);
    let ask = |id: &str| plane.http().ask("GET", "/nope", &[&format!("X-Request-Id: {id}"), "Connection: close"], b"");
    let answer = ask("my-id.7");
    assert_eq!((answer.header("x-request-id"), answer.json()["request_id"].clone()), (Some("my-id.7"), json!("my-id.7")));
    for bad in ["two words".to_owned(), "x".repeat(65)] {
        let made = ask(&bad).header("x-request-id").expect("one is made").to_owned();
        assert_ne!(made, bad);
    }
    let (a, b) = (plane.get("/livez"), plane.get("/livez"));
    assert_ne!(a.header("x-request-id"), b.header("x-request-id"));
}

#[test]
fn metrics_count_what_happens() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let text = plane.get("/metrics").text().to_owned();
    let value = |sample: &str| text.lines().find_map(|line| line.strip_prefix(sample)).map(str::trim).map(str::to_owned);
    assert_eq!(value("kakuri_workloads{state=\"Running\"}").as_deref(), Some("1"), "{text}");
    assert_eq!(value("kakuri_workloads{state=\"Pending\"}").as_deref(), Some("0"));
    assert_eq!(value(&format!("kakuri_node_ready{{node=\"{}\"}}", agent.node)).as_deref(), Some("1"));
    assert!(value("kakuri_http_requests_total{code=\"2xx\"}").is_some_and(|n| n.parse::<u64>().is_ok_and(|n| n > 0)), "{text}");
    for family in ["kakuri_build_info", "process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"] {
        assert!(text.contains(&format!("# TYPE {family} ")), "{family}");
    }
    assert!(!text.contains("wl-1"), "no workload is ever a label");
}

#[test]
fn a_long_wait_ends_when_it_is_over_or_the_plane_stops() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let watch = kakuri::deadline::Stopwatch::start();
    assert_eq!(plane.get("/workloads/wl-1?for=terminal&wait_ms=300").json()["state"], "Running");
    assert!((300..5000).contains(&watch.elapsed_ms()), "{} ms", watch.elapsed_ms());
    for (query, code) in [("?wait_ms=600001", "bad_query"), ("?wait_ms=-1", "bad_query"), ("?for=ever", "bad_query")] {
        assert_eq!(plane.get(&format!("/workloads/wl-1{query}")).problem(), (400, code.into()), "{query}");
    }
    let mut waiting = plane.http();
    waiting.send(b"GET /workloads/wl-1?for=terminal&wait_ms=600000 HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut following = plane.http();
    following.send(b"GET /workloads/wl-1/logs?follow HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(following.try_head().expect("a response").status, 200);
    let mut idle = plane.http();
    idle.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n");
    idle.answer();
    until("all are served", || plane.connections() == 3);
    plane.terminate();
    let answer = waiting.answer();
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")), "{}", answer.text());
    assert!(idle.is_closed());
    drop(following);
    // The workload is the agent's: it runs on, and the agent still knows it.
    assert_eq!(agent.status("wl-1").0, kakuri::workload::State::Running);
}

#[test]
fn requests_follow_each_other_on_one_connection() {
    let place = Place::sim(&[]);
    let plane = Plane::start_now(&place, &[], &[]);
    let mut http = plane.http();
    for _ in 0..100 {
        assert_eq!(http.ask("GET", "/livez", &[], b"").text(), "ok\n");
    }
    // Pipelined, answered in order.
    http.send(
        &b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET /nope HTTP/1.1\r\nHost: localhost\r\n\r\nHEAD /version HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(3),
    );
    for _ in 0..3 {
        assert_eq!(http.answer().status, 200);
        assert_eq!(http.answer().status, 404);
        assert_eq!(http.head().status, 200);
    }
    // An error of the client is no reason to close.
    let answer = http.ask("POST", "/workloads", &["Content-Type: application/json"], b"{");
    assert_eq!((answer.status, answer.header("connection")), (400, None));
    assert_eq!(http.ask("GET", "/livez", &["Connection: close"], b"").header("connection"), Some("close"));
    assert!(http.is_closed());
    // HTTP/1.0 closes, unless asked not to.
    let mut http = plane.http();
    http.send(b"GET /livez HTTP/1.0\r\n\r\n");
    assert_eq!((http.answer().text(), http.is_closed()), ("ok\n", true));
    let mut http = plane.http();
    http.send(b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert_eq!(http.answer().header("connection"), Some("keep-alive"));
    http.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(http.answer().text(), "ok\n");
}

#[test]
fn many_clients_at_a_time_get_what_they_ask_for() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let address = plane.address;
    let clients: Vec<_> = (0..20)
        .map(|i| {
            let workload = with(place.workload(&format!("wl-{i}"), &["sleep", "1000"]), json!({"stop_grace_ms": 0})).to_string();
            std::thread::spawn(move || {
                let mut http = crate::harness::Http::connect(address);
                let answer =
                    http.ask("POST", &format!("/workloads?wait_ms={SOON_MS}"), &["Content-Type: application/json"], workload.as_bytes());
                assert_eq!((answer.status, answer.json()["state"].clone()), (201, json!("Running")), "{}", answer.text());
                for _ in 0..20 {
                    assert_eq!(http.ask("GET", &format!("/workloads/wl-{i}"), &[], b"").status, 200);
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().expect("a client"));
    assert_eq!(place.sandboxes().len(), 20);
    assert_eq!(plane.get("/workloads?state=Running").json()["items"].as_array().map(Vec::len), Some(20));
}

#[test]
fn a_web_page_changes_nothing() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let body = place.workload("wl-2", &["true"]).to_string();
    let ask = |method: &str, target: &str, header: &str| {
        plane.http().ask(method, target, &[header, "Connection: close", "Content-Type: application/json"], body.as_bytes())
    };
    let refused = (403, "from_web_page".to_owned());
    for header in [
        "Origin: http://evil.example",
        "Origin: null",
        "Origin: http://127.0.0.1:8080",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
        "sec-fetch-site: x",
    ] {
        assert_eq!(ask("POST", "/workloads", header).problem(), refused, "{header}");
        assert_eq!(ask("POST", "/workloads/wl-1/stop", header).problem(), refused, "{header}");
        assert_eq!(ask("POST", "/workloads/wl-1/exec", header).problem(), refused, "{header}");
        assert_eq!(ask("DELETE", "/workloads/wl-1", header).problem(), refused, "{header}");
        assert_eq!(ask("PATCH", "/workloads/wl-1", header).problem(), refused, "{header}");
        // What a page of another origin asks to be shown, the browser does not show it.
        assert_eq!(ask("GET", "/workloads/wl-1", header).status, 200, "{header}");
    }
    assert_eq!(plane.workload("wl-1")["state"], "Running");
    assert_eq!(plane.get("/workloads/wl-2").status, 404);
    for header in ["Sec-Fetch-Site: none", "X-Other: 1"] {
        assert!(ask("POST", "/workloads", header).status < 300, "{header}");
    }
}

#[test]
fn a_name_that_was_made_to_resolve_to_us_is_told_nothing() {
    let place = Place::sim(&[]);
    let socket = place.dir.join("plane.sock");
    let plane = Plane::start_now(&place, &[], &["--listen", &format!("unix://{}", socket.display())]);
    let head = |method: &str, path: &str, host: &str| format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nHost:{host}\r\n\r\n");
    let ask = |method: &str, path: &str, host: &str| {
        let mut http = plane.http();
        http.send(head(method, path, host).as_bytes());
        http.answer()
    };
    let port = plane.address.port();
    for host in [" evil.example".to_owned(), format!(" evil.example:{port}"), " localhost.evil.example".into(), " x".into()] {
        for method in ["GET", "POST"] {
            assert_eq!(ask(method, "/workloads", &host).problem(), (403, "host_not_local".into()), "{method} {host}");
        }
        assert_eq!(ask("GET", "/metrics", &host).problem(), (403, "host_not_local".into()), "{host}");
        assert_eq!(ask("GET", "/livez", &host).text(), "ok\n", "it says nothing of anybody");
    }
    for host in [" localhost".to_owned(), format!(" localhost:{port}"), format!(" 127.0.0.1:{port}"), " [::1]:80".into(), String::new()] {
        assert_eq!(ask("GET", "/workloads", &host).status, 200, "{host}");
    }
    // No page reaches a socket of the file system, and there is no host there that could be named.
    let mut unix = std::os::unix::net::UnixStream::connect(&socket).expect("it listens");
    std::io::Write::write_all(&mut unix, head("GET", "/workloads", " kakuri").as_bytes()).expect("written");
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut unix, &mut answer).expect("text");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn what_runs_on_a_node_already_is_adopted_there_and_nowhere_else() {
    let place = Place::sim(&[]);
    let (a, mut b) = (place.agent_named("a", &[]), place.agent_named("b", &[]));
    let mut plane = Plane::start(&place, &[&a, &b], &[]);
    let sleeper = |id: &str| with(place.workload(id, &["sleep", "1000"]), json!({"stop_grace_ms": 0}));
    let strangers = |plane: &Plane<'_>, agent: &Agent<'_>| plane.get(&format!("/nodes/{}", agent.node)).json()["strangers"].clone();
    b.run(&sleeper("dup"));
    until("it is a stranger", || strangers(&plane, &b) == json!(1));
    let starts = || place.count("StartContainer");
    assert_eq!(starts(), 1);
    // In other words it is another one, which is refused, and nothing of this one is touched.
    let answer = plane.post("/workloads", &with(sleeper("dup"), json!({"memory_mb": 99})));
    assert_eq!(answer.problem(), (409, "workload_exists".into()));
    assert!(answer.text().contains(&b.node), "{}", answer.text());
    assert_eq!(plane.get("/workloads/dup").status, 404);
    // In the same words it is that one, though the other node comes first.
    let object = plane.run(&sleeper("dup"));
    assert_eq!((&object["status"]["node"], &object["state"]), (&json!(b.node), &json!("Running")));
    let why = format!("the agent of {} has a workload of this id", b.node);
    assert_eq!(object["status"]["placement"]["rejected"], json!({a.node.as_str(): why}));
    assert_eq!((a.list().len(), starts()), (0, 1));
    // A store that is lost forgets it; whoever asks at once, before its agent has told of it, still gets no second one.
    plane.terminate();
    std::fs::rename(plane.data_dir(), place.dir.join("away")).expect("moved");
    plane.again();
    let object = eventually("it is adopted again", SOON_MS, || {
        Some(plane.post("/workloads", &sleeper("dup"))).filter(|answer| answer.status == 201).map(|answer| answer.json())
    });
    assert_eq!((&object["status"]["node"], a.list().len(), starts()), (&json!(b.node), 0, 1));

    // Which of two nobody can say.
    a.run(&sleeper("two"));
    b.run(&sleeper("two"));
    until("they are strangers", || strangers(&plane, &a) == json!(1) && strangers(&plane, &b) == json!(1));
    let answer = plane.post("/workloads", &sleeper("two"));
    assert_eq!(answer.problem(), (409, "workload_exists".into()));
    assert!(answer.text().contains(&format!("{}, {}", a.node, b.node)), "{}", answer.text());
    a.delete("two");
    until("it is gone there", || strangers(&plane, &a) == json!(0));
    // Where the one that has it is away, it is waited for.
    b.kill();
    until("it is away", || plane.get(&format!("/nodes/{}", b.node)).json()["ready"] == false);
    assert_eq!(plane.post("/workloads", &sleeper("two")).problem(), (503, "no_node".into()));
    b.again();
    b.delete("two");
    until("it is gone there", || strangers(&plane, &b) == json!(0));
}

#[test]
fn waits_that_are_abandoned_free_their_places() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let poll = || {
        let mut http = plane.http();
        http.send(b"GET /workloads/wl-1?wait_ms=600000&for=terminal HTTP/1.1\r\nHost: localhost\r\n\r\n");
        http
    };
    let polls: Vec<_> = (0..40).map(|_| poll()).collect();
    until("all wait", || plane.connections() == 40);
    until("no wait holds a connection to the agent", || agent.connections() <= kakuri::limits::NODE_POOL_MAX + 2);
    drop(polls);
    until("their places are free", || plane.connections() == 0);
    // One that only said that it has nothing more to say is still answered.
    let mut half_closed = poll();
    half_closed.end();
    until("it waits", || plane.connections() == 1);
    let interim = half_closed.answer();
    assert_eq!(interim.status, 100, "how one that left is noticed");
    assert_eq!(plane.post("/workloads/wl-1/stop", &Value::Null).status, 202);
    let answer = std::iter::repeat_with(|| half_closed.answer()).find(|answer| answer.status != 100).expect("endless");
    assert_eq!((answer.status, answer.json()["state"].clone()), (200, json!("Failed")));
}

#[test]
fn what_is_on_a_node_that_is_not_configured_is_forgotten_by_force_alone() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&with(place.workload("runs", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    plane.run(&place.workload("ended", &["true"]));
    plane.ended("ended");
    assert_eq!(plane.ask("DELETE", "/workloads/runs?force=true", None).problem(), (409, "node_configured".into()));
    assert_eq!(plane.ask("DELETE", "/workloads/runs?force=1x", None).problem(), (400, "bad_query".into()));
    assert_eq!(plane.workload("runs")["state"], "Running");
    plane.terminate();
    let plane = Plane::start_now(&place, &[], &[]);
    let last_error = |object: &Value| object["status"]["last_error"].as_str().unwrap_or_default().to_owned();
    let why = format!("{}: the node is not configured any more", agent.node);
    for id in ["runs", "ended"] {
        let answer = plane.ask("DELETE", &format!("/workloads/{id}"), None);
        assert_eq!((answer.status, last_error(&answer.json())), (202, why.clone()), "{id}");
    }
    let listed = plane.get("/workloads").json();
    let shown: Vec<_> = listed["items"].as_array().expect("items").iter().map(last_error).collect();
    assert_eq!(shown, [why.clone(), why.clone()]);
    // Another start remembers the wish, and says again why nothing comes of it.
    for id in ["runs", "ended"] {
        let answer = plane.ask("DELETE", &format!("/workloads/{id}?force=true"), None);
        assert_eq!(answer.status, 202, "{}", answer.text());
        assert!(last_error(&answer.json()).contains("is left alone"), "{}", answer.text());
        assert_eq!(plane.get(&format!("/workloads/{id}")).status, 404);
    }
    assert_eq!(plane.ask("DELETE", "/workloads/runs?force", None).problem(), (404, "not_found".into()));
    assert_eq!(agent.status("runs").0, kakuri::workload::State::Running);
    agent.delete("runs");
    agent.delete("ended");
}
