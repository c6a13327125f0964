//! The table, and what is said of requests that never reach an agent. No sockets.

use serde_json::json;

use super::super::{Running, Store};
use super::*;
use crate::http::Body;

/// An API without nodes, and an answer from it.
fn ask(text: &str, body: Option<&str>) -> (u16, Value, Response) {
    let running = Running::start(Vec::new(), Store::forgetful(), limits::HISTORY_DEFAULT).expect("threads");
    let mut request = request(text, body);
    request.headers.extend(body.map(|_| ("content-type".to_owned(), "application/json".to_owned())));
    let response = Api::new(Arc::clone(&running.plane), true).handle(&request, &mut Here);
    running.stop();
    let body = match &response.body {
        Body::Full(body) => serde_json::from_slice(body).unwrap_or_else(|_| String::from_utf8_lossy(body).into_owned().into()),
        Body::Empty => Value::Null,
        Body::Stream(_) => panic!("a stream"),
    };
    (response.status.code(), body, response)
}

/// A request out of `METHOD /path?query`.
fn request(text: &str, body: Option<&str>) -> Request {
    let (method, target) = text.split_once(' ').expect("a method");
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pair =
        |pair: &str| pair.split_once('=').map_or((pair.to_owned(), String::new()), |(name, value)| (name.to_owned(), value.to_owned()));
    Request {
        method: Method::parse(method).expect("a method"),
        segments: path.split('/').skip(1).filter(|s| !s.is_empty()).map(str::to_owned).collect(),
        query: query.split('&').filter(|q| !q.is_empty()).map(pair).collect(),
        headers: Vec::new(),
        body: body.unwrap_or_default().as_bytes().to_vec(),
        has_body_framing: body.is_some(),
        peer: "test".into(),
        is_over_loopback: true,
    }
}

/// A client that waits for ever.
struct Here;

impl Client for Here {
    fn is_over(&mut self) -> bool {
        false
    }
}

/// Every route, as a request for it.
const TABLE: [(&str, Route<'static>); 28] = [
    ("GET /workloads", Route::List),
    ("POST /workloads", Route::Create),
    ("GET /workloads/a", Route::Get("a")),
    ("DELETE /workloads/a", Route::Delete("a")),
    ("POST /workloads/a/stop", Route::Stop("a")),
    ("GET /workloads/a/logs", Route::Logs("a")),
    ("POST /workloads/a/exec", Route::Exec("a")),
    ("GET /nodes", Route::Nodes),
    ("GET /nodes/n", Route::Node("n")),
    ("POST /nodes/n/cordon", Route::Later),
    ("POST /nodes/n/uncordon", Route::Later),
    ("POST /nodes/n/drain", Route::Later),
    ("GET /security-profiles/p", Route::Later),
    ("PUT /security-profiles/p", Route::Later),
    ("DELETE /security-profiles/p", Route::Later),
    ("GET /events", Route::Events),
    ("PATCH /workloads/a", Route::Patch("a")),
    ("GET /api/runtime-cloud", Route::Later),
    ("GET /api/runtime-cloud/sites", Route::Later),
    ("POST /api/runtime-cloud", Route::Later),
    ("POST /api/runtime-cloud/a/b", Route::Later),
    ("GET /livez", Route::Livez),
    ("GET /healthz", Route::Livez),
    ("GET /readyz", Route::Readyz),
    ("GET /metrics", Route::Metrics),
    ("GET /version", Route::Version),
    ("GET /openapi.json", Route::OpenApi),
    ("GET /v1/workloads", Route::List),
];

#[test]
fn the_table_is_whole() {
    for (text, expect) in TABLE {
        let request = request(text, None);
        let path: Vec<&str> = request.path();
        let path = path.strip_prefix(&["v1"]).unwrap_or(&path);
        assert_eq!(route(request.method, path), Some(expect), "{text}");
    }
}

#[test]
fn openapi_has_every_route() {
    let document: Value = serde_json::from_slice(include_bytes!("../openapi.json")).expect("JSON");
    let paths = document["paths"].as_object().expect("paths");
    for (text, route) in TABLE.into_iter().filter(|(text, route)| *route != Route::Later && !text.contains("/v1/")) {
        let (method, path) = text.split_once(' ').expect("a method");
        let path = path.replace("/a", "/{id}").replace("/n/", "/{id}/").replace("/nodes/n", "/nodes/{id}");
        let operation = &paths.get(&path).unwrap_or_else(|| panic!("{path} is missing"))[method.to_ascii_lowercase()];
        let described: Vec<&str> = operation["parameters"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default()
            .iter()
            .filter(|p| p["in"] == "query")
            .filter_map(|p| p["name"].as_str())
            .collect();
        assert_eq!(described, parameters(route), "{text}");
        assert!(operation["responses"].is_object(), "{text}");
    }
    let routes = TABLE.iter().filter(|(text, route)| *route != Route::Later && !text.contains("/v1/")).count();
    let operations: usize = paths.values().filter_map(Value::as_object).map(|o| o.keys().filter(|k| *k != "parameters").count()).sum();
    assert_eq!(operations, routes, "and no other");
}

#[test]
fn a_path_says_what_it_has() {
    let check = |text: &str, status: u16, code: &str, allow: Option<&str>| {
        let (seen, body, response) = ask(text, None);
        assert_eq!((seen, response.header("Allow")), (status, allow), "{text}");
        assert_eq!(body["code"], if code.is_empty() { Value::Null } else { code.into() }, "{text}");
    };
    check("GET /", 404, "no_route", None);
    check("GET /v1", 404, "no_route", None);
    check("GET /workload", 404, "no_route", None);
    check("GET /workloads/a/b", 404, "no_route", None);
    check("GET /workloads/a/stop", 405, "method_not_allowed", Some("POST"));
    check("PUT /workloads/a", 405, "method_not_allowed", Some("DELETE, GET, PATCH, HEAD"));
    check("PUT /workloads", 405, "method_not_allowed", Some("GET, POST, HEAD"));
    check("DELETE /v1/livez", 405, "method_not_allowed", Some("GET, HEAD"));
    check("OPTIONS /workloads", 204, "", Some("GET, POST, HEAD"));
    check("GET /events?since=7", 410, "events_gone", None);
    check("POST /nodes/n/drain?now=1", 501, "not_implemented", None);
    check("HEAD /workloads/a", 404, "not_found", None);
    check("GET /workloads/..", 404, "not_found", None);
    check("GET /nodes/A", 404, "not_found", None);
}

#[test]
fn queries_are_read_strictly() {
    let check = |text: &str, status: u16, code: &str| {
        let (seen, body, _) = ask(text, Some("{}"));
        assert_eq!((seen, body["code"].as_str()), (status, Some(code)), "{text}: {body}");
    };
    check("GET /workloads?lable=app=web", 400, "bad_query");
    check("GET /workloads?limit=0", 400, "bad_query");
    check("GET /workloads?limit=501", 400, "bad_query");
    check("GET /workloads?limit=x", 400, "bad_query");
    check("GET /workloads?state=running", 400, "bad_query");
    check("GET /workloads?state=Running&state=Failed", 400, "bad_query");
    check("GET /workloads?node=A", 400, "bad_query");
    check("GET /workloads?label=", 400, "bad_query");
    check("GET /workloads?continue=!", 400, "bad_continue");
    check("GET /workloads?continue=Li4", 400, "bad_continue");
    check("GET /workloads/a?wait_ms=600001", 400, "bad_query");
    check("GET /workloads/a?for=ever", 400, "bad_query");
    check("POST /workloads?wait_ms=-1", 400, "bad_query");
    check("DELETE /workloads/a?force=maybe", 400, "bad_query");
    check("GET /readyz?verbose=maybe", 400, "bad_query");
    check("GET /events?since=x", 400, "bad_query");
    check("GET /events?since=1&replay", 400, "bad_query");
    check("GET /events?node=A", 400, "bad_query");
    check("GET /events?label=", 400, "bad_query");
    let (status, page, _) = ask("GET /workloads?limit=500&state=Failed&node=n&label=a,!b&class=c", None);
    assert_eq!((status, page), (200, json!({"items": [], "continue": null, "revision": 0})));
}

#[test]
fn bodies_are_read_strictly() {
    let check = |body: Option<&str>, status: u16, code: &str, pointers: &[&str]| {
        let (seen, problem, response) = ask("POST /workloads", body);
        assert_eq!((seen, problem["code"].as_str()), (status, Some(code)), "{body:?}: {problem}");
        assert_eq!(response.header("content-type"), Some("application/problem+json"));
        let found: Vec<&str> =
            problem["errors"].as_array().map(Vec::as_slice).unwrap_or_default().iter().filter_map(|e| e["pointer"].as_str()).collect();
        assert_eq!(found, pointers, "{body:?}");
    };
    check(None, 411, "body_required", &[]);
    check(Some(""), 400, "bad_json", &[""]);
    check(Some("{"), 400, "bad_json", &[""]);
    check(Some(r#"{"image":"a","image":"b"}"#), 400, "bad_json", &["/image"]);
    check(Some("[]"), 422, "invalid_workload", &[""]);
    check(Some("{}"), 422, "invalid_workload", &["/image", "/runtime_class"]);
    check(Some(r#"{"image":"a"}"#), 422, "invalid_workload", &["/runtime_class"]);
    check(Some(r#"{"image":"a","security_profile":"x"}"#), 422, "invalid_workload", &["/security_profile"]);
    check(Some(r#"{"id":"A","memory_mb":0,"image":"a","x":1,"runtime_class":"y"}"#), 422, "invalid_workload", &["/id", "/memory_mb", "/x"]);
    check(Some(r#"{"image":"a","runtime_class":"gvisor"}"#), 503, "no_node", &[]);
}

#[test]
fn only_json_is_read_as_json() {
    let unnamed = body(&request("POST /workloads", Some("{}"))).err().map(|refusal| (refusal.status.code(), refusal.code));
    assert_eq!(unnamed, Some((415, "not_json")), "a page may send that to anybody");
    let code = |content_type: &str| {
        let mut request = request("POST /workloads", Some("{}"));
        request.headers.push(("content-type".into(), content_type.into()));
        body(&request).err().map(|refusal| (refusal.status.code(), refusal.code))
    };
    assert_eq!(code("application/json"), None);
    assert_eq!(code("Application/JSON; charset=utf-8"), None);
    let patch = |content_type: &str| {
        let mut request = request("PATCH /workloads/a", Some("{}"));
        request.headers.push(("content-type".into(), content_type.into()));
        patch_body(&request).is_ok()
    };
    assert!(patch("application/merge-patch+json") && patch("application/json") && !patch("application/json-patch+json"));
    for other in ["application/merge-patch+json", "application/x-www-form-urlencoded", "text/plain", "application/jsonx", ""] {
        assert_eq!(code(other), Some((415, "not_json")), "{other}");
    }
}

#[test]
fn request_ids_are_echoed_or_made() {
    let running = Running::start(Vec::new(), Store::forgetful(), limits::HISTORY_DEFAULT).expect("threads");
    let api = Api::new(Arc::clone(&running.plane), false);
    let seen = |given: Option<&str>| {
        let mut request = request("GET /nowhere", None);
        request.headers.extend(given.map(|id| ("x-request-id".to_owned(), id.to_owned())));
        let response = api.handle(&request, &mut Here);
        let id = response.header("x-request-id").expect("an id").to_owned();
        let Body::Full(body) = response.body else { panic!("no problem") };
        assert_eq!(serde_json::from_slice::<Value>(&body).expect("JSON")["request_id"], id);
        id
    };
    assert_eq!(seen(Some("abc-123")), "abc-123");
    let made = [seen(None), seen(None), seen(Some("")), seen(Some("a b")), seen(Some(&"x".repeat(65)))];
    assert!(made.iter().all(|id| is_request_id(id)) && made[0] != made[1], "{made:?}");
    let rejected = api.reject(&Reject::BodyBytes);
    assert_eq!((rejected.status.code(), rejected.header("content-type")), (413, Some("application/problem+json")));
    running.stop();
}

#[test]
fn health_tells_what_is_missing() {
    assert_eq!(ask("GET /livez", None).1, "ok\n");
    assert_eq!(ask("GET /healthz?verbose", None).0, 200);
    let (status, text, response) = ask("GET /readyz", None);
    assert_eq!((status, response.header("retry-after")), (503, Some("1")));
    let lines: Vec<&str> = text.as_str().expect("text").lines().collect();
    assert_eq!(
        lines,
        ["[+]store ok", "[-]nodes: none is configured", "[!]insecure-listen: whoever reaches a listener may do everything", "not ready"]
    );
    assert_eq!(ask("GET /version", None).1, json!({"version": env!("CARGO_PKG_VERSION"), "api": "v1", "program": "kakuri-control-plane"}));
}

#[test]
fn an_agent_s_pointers_become_those_of_the_body() {
    let node = Name::new("n").expect("a name");
    let body = |pointer: &str| ProblemBody { pointer: pointer.into(), detail: "d".into() };
    let errors = vec![body("/workload/mounts/0"), body("/wait_ms")];
    let reply = ErrorReply { code: ErrorCode::InvalidArgument, message: "m".into(), id: None, errors, fence: None };
    let refusal = Refusal::refused(&node, reply);
    assert_eq!((refusal.status.code(), refusal.detail.as_str()), (422, "n: m"));
    assert_eq!(refusal.errors, [body("/mounts/0"), body("/wait_ms")]);
}
