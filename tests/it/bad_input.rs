//! Input that is wrong in every way that issue 2 names, and what the daemons answer; after each, the next client is served.

use std::io::Write;
use std::thread;
use std::time::Duration;

use kakuri::deadline::Stopwatch;
use kakuri::limits;
use kakuri::wire::agent::{ErrorCode, Reply};
use serde_json::{Value, json};

use crate::harness::line::Socket;
use crate::harness::place::with;
use crate::harness::{Agent, Http, Line, Place, Plane, brief, expect_error, until};

/// Answers that nobody could misread: code, and the rules by pointer.
fn rules(reply: Reply) -> (ErrorCode, Vec<(String, String)>) {
    let error = expect_error(reply);
    (error.code, error.errors.into_iter().map(|e| (e.pointer, e.detail)).collect())
}

/// A bad line is answered, the connection lives, and so does everybody else's.
fn check_line(agent: &Agent<'_>, line: &[u8], expect: &[(&str, &str)]) {
    let mut client = agent.line();
    client.send(&[line, b"\n"].concat());
    let (code, found) = rules(client.reply());
    let shown = brief(&String::from_utf8_lossy(line));
    assert_eq!(code, ErrorCode::InvalidArgument, "{shown}");
    let pointers: Vec<&str> = found.iter().map(|(pointer, _)| pointer.as_str()).collect();
    assert_eq!(pointers, expect.iter().map(|(pointer, _)| *pointer).collect::<Vec<_>>(), "{shown}: {found:?}");
    for ((_, detail), (_, words)) in found.iter().zip(expect) {
        assert!(detail.contains(words), "{shown}: {detail}");
    }
    assert!(matches!(client.ask(&json!({"type": "Ping"})), Reply::Pong { .. }), "{shown}");
}

#[test]
fn a_line_that_breaks_a_rule_hears_which() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let start = |workload: Value| json!({"type": "StartWorkload", "workload": workload}).to_string().into_bytes();
    let change = |change: Value| start(with(place.workload("wl-1", &["true"]), change));
    let check = |line: &[u8], expect: &[(&str, &str)]| check_line(&agent, line, expect);

    check(b"nonsense", &[("", "not JSON")]);
    check(b"\x00\x01\x02", &[("", "not JSON")]);
    check(b"{\"type\":\"Ping\"", &[("", "not JSON: the text ends too early")]);
    check(b"{\"type\":\"Ping\"} {\"type\":\"Ping\"}", &[("", "not JSON")]);
    check(b"\xff\xfe{}", &[("", "not JSON")]);
    check(b"{\"type\":\"GetStatus\",\"id\":\"\xff\"}", &[("", "not JSON")]);
    check(b"{\"type\":\"GetStatus\",\"id\":\"\\ud800\"}", &[("", "not JSON")]);
    check(b"[]", &[("", "must be an object, not an array")]);
    check(b"null", &[("", "must be an object, not null")]);
    check(b"{}", &[("/type", "is required")]);
    check(b"{\"type\":\"Reboot\"}", &[("/type", "unknown type; must be one of Auth, CollectImages, DeleteWorkload")]);
    check(b"{\"type\":7}", &[("/type", "must be a string, not a number")]);
    check(b"{\"type\":\"Ping\",\"type\":\"Ping\"}", &[("/type", "duplicate key")]);
    check(b"{\"type\":\"Ping\",\"pnig\":1}", &[("/pnig", "unknown field")]);
    check(b"{\"type\":\"GetStatus\"}", &[("/id", "is required")]);
    check(b"{\"type\":\"GetStatus\",\"id\":\"Wl-1\"}", &[("/id", "id must be 1 to 63")]);
    check(b"{\"type\":\"GetStatus\",\"id\":\"../etc\"}", &[("/id", "id must be")]);
    check(b"{\"type\":\"GetStatus\",\"id\":\"a\\u0000\"}", &[("/id", "must not contain NUL")]);
    check(b"{\"type\":\"GetStatus\",\"id\":\"a\",\"wait_ms\":600001}", &[("/wait_ms", "must be a whole number from 0 to 600000")]);
    check(b"{\"type\":\"GetStatus\",\"id\":\"a\",\"wait_ms\":1e3}", &[("/wait_ms", "must be a whole number")]);
    check(b"{\"type\":\"GetStatus\",\"id\":\"a\",\"wait_ms\":-1}", &[("/wait_ms", "must be a whole number")]);
    check(b"{\"type\":\"GetStatus\",\"id\":\"a\",\"wait_ms\":99999999999999999999}", &[("/wait_ms", "must be a whole number")]);
    check(b"{\"type\":\"ListWorkloads\",\"limit\":0}", &[("/limit", "must be a whole number from 1 to 500")]);
    check(b"{\"type\":\"ListWorkloads\",\"limit\":501}", &[("/limit", "must be a whole number from 1 to 500")]);
    check(b"{\"type\":\"GetLogs\",\"id\":\"a\",\"since\":\"yesterday\"}", &[("/since", "must be an RFC 3339 time")]);
    check(b"{\"type\":\"GetLogs\",\"id\":\"a\",\"stream\":\"stdin\"}", &[("/stream", "must be one of stdout, stderr")]);
    check(b"{\"type\":\"GetLogs\",\"id\":\"a\",\"follow\":\"yes\"}", &[("/follow", "must be true or false, not a string")]);
    check(b"{\"type\":\"Exec\",\"id\":\"a\",\"command\":[]}", &[("/command", "must have at least one word")]);
    check(b"{\"type\":\"Exec\",\"id\":\"a\",\"command\":\"ls\"}", &[("/command", "must be an array, not a string")]);
    check(b"{\"type\":\"Exec\",\"id\":\"a\",\"command\":[1]}", &[("/command/0", "must be a string, not a number")]);

    check(&change(json!({"memory_mb": 0})), &[("/workload/memory_mb", "from 4 to 1048576")]);
    check(&change(json!({"memory_mb": 3})), &[("/workload/memory_mb", "from 4 to 1048576")]);
    check(&change(json!({"memory_mb": 1_048_577})), &[("/workload/memory_mb", "from 4 to 1048576")]);
    check(&change(json!({"memory_mb": "64"})), &[("/workload/memory_mb", "not a string")]);
    check(&change(json!({"memory_mb": 64.5})), &[("/workload/memory_mb", "from 4 to 1048576")]);
    check(&change(json!({"cpu_millicores": 9})), &[("/workload/cpu_millicores", "from 10 to 1024000")]);
    check(&change(json!({"cpu_millicores": 1_024_001})), &[("/workload/cpu_millicores", "from 10 to 1024000")]);
    check(
        &change(json!({"runtime_class": "docker"})),
        &[("/workload/runtime_class", "unknown class; this node offers native, gvisor, kata")],
    );
    check(&change(json!({"privileged": true})), &[("/workload/privileged", "unknown field")]);
    check(&change(json!({"annotations": {"a": "b"}})), &[("/workload/annotations", "unknown field")]);
    check(&change(json!({"runtme_class": "x"})), &[("/workload/runtme_class", "unknown field; did you mean runtime_class?")]);
    check(&change(json!({"image": "UPPER CASE"})), &[("/workload/image", "image")]);
    check(&change(json!({"user": "root"})), &[("/workload/user", "user must be uid or uid:gid")]);
    check(&change(json!({"user": "2147483648"})), &[("/workload/user", "user must be")]);
    check(&change(json!({"capabilities_add": ["SYS_ADMIN"]})), &[("/workload/capabilities_add/0", "must be one of AUDIT_WRITE")]);
    check(&change(json!({"working_dir": "/a/../b"})), &[("/workload/working_dir", "must be an absolute path")]);
    check(&change(json!({"mounts": [{"source": "/", "target": "/x"}]})), &[("/workload/mounts/0/source", "must be an absolute path")]);
    check(&change(json!({"env": {"A=B": "x"}})), &[("/workload/env/A=B", "name must be")]);
    check(&change(json!({"restart_policy": "sometimes"})), &[("/workload/restart_policy", "must be one of")]);
    // All of it at once.
    let many = change(json!({"id": "-", "memory_mb": 0, "cpu_millicores": 0, "x/y": 1, "user": 7}));
    check(
        &many,
        &[
            ("/workload/id", "id must be"),
            ("/workload/memory_mb", "from 4"),
            ("/workload/cpu_millicores", "from 10"),
            ("/workload/user", "must be a string"),
            ("/workload/x~1y", "unknown field"),
        ],
    );
    let twice = br#"{"type":"StartWorkload","workload":{"id":"a","image":"b","runtime_class":"native","env":{"A":"1","A":"2"}}}"#;
    check(twice, &[("/workload/env/A", "duplicate key")]);
    assert_eq!(agent.list(), []);
    assert_eq!(place.count("RunPodSandbox"), 0);
}

#[test]
fn limits_hold_at_the_limit_and_one_beyond() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut client = agent.line();
    // (field, the largest value that is taken, one that is not)
    let list = |n: usize| json!(vec!["x"; n]);
    let map = |n: usize| json!((0..n).map(|i| (format!("k{i}"), "v")).collect::<std::collections::BTreeMap<_, _>>());
    let ports = |n: usize| json!(vec![json!({"container": 80}); n]);
    let rows = [
        ("id", json!("a".repeat(limits::ID_BYTES_MAX)), json!("a".repeat(limits::ID_BYTES_MAX + 1))),
        // With the registry and the tag that it is completed by.
        (
            "image",
            json!(format!("h/{}", "a".repeat(limits::IMAGE_BYTES_MAX - 19))),
            json!(format!("h/{}", "a".repeat(limits::IMAGE_BYTES_MAX - 18))),
        ),
        ("memory_mb", json!(limits::MEMORY_MB_MAX), json!(limits::MEMORY_MB_MAX + 1)),
        ("memory_mb", json!(limits::MEMORY_MB_MIN), json!(limits::MEMORY_MB_MIN - 1)),
        ("cpu_millicores", json!(limits::CPU_MILLICORES_MAX), json!(limits::CPU_MILLICORES_MAX + 1)),
        ("cpu_millicores", json!(limits::CPU_MILLICORES_MIN), json!(limits::CPU_MILLICORES_MIN - 1)),
        ("command", list(limits::WORDS_MAX), list(limits::WORDS_MAX + 1)),
        ("args", list(limits::WORDS_MAX), list(limits::WORDS_MAX + 1)),
        ("args", json!(["x".repeat(limits::WORD_BYTES_MAX)]), json!(["x".repeat(limits::WORD_BYTES_MAX + 1)])),
        ("env", map(limits::ENV_MAX), map(limits::ENV_MAX + 1)),
        ("env", json!({"A": "x".repeat(limits::WORD_BYTES_MAX)}), json!({"A": "x".repeat(limits::WORD_BYTES_MAX + 1)})),
        ("labels", map(limits::LABELS_MAX), map(limits::LABELS_MAX + 1)),
        ("labels", json!({"a": "x".repeat(limits::LABEL_BYTES_MAX)}), json!({"a": "x".repeat(limits::LABEL_BYTES_MAX + 1)})),
        ("node_selector", map(limits::LABELS_MAX), map(limits::LABELS_MAX + 1)),
        ("ports", ports(limits::PORTS_MAX), ports(limits::PORTS_MAX + 1)),
        (
            "working_dir",
            json!(format!("/{}", "x".repeat(limits::PATH_BYTES_MAX - 1))),
            json!(format!("/{}", "x".repeat(limits::PATH_BYTES_MAX))),
        ),
        ("start_deadline_ms", json!(limits::START_DEADLINE_MS_MAX), json!(limits::START_DEADLINE_MS_MAX + 1)),
        ("ttl_ms", json!(limits::TTL_MS_MAX), json!(limits::TTL_MS_MAX + 1)),
        ("stop_grace_ms", json!(limits::STOP_GRACE_MS_MAX), json!(limits::STOP_GRACE_MS_MAX + 1)),
        ("user", json!(limits::UID_MAX.to_string()), json!((limits::UID_MAX + 1).to_string())),
    ];
    for (i, (field, most, beyond)) in rows.into_iter().enumerate() {
        let ask = |client: &mut Line, value: Value| {
            // Never pulled, so that nothing runs: what counts is whether it is taken.
            let base =
                with(place.workload(&format!("wl-{i}"), &["true"]), json!({"image": "localhost/no:1", "image_pull": {"policy": "never"}}));
            client.ask(&json!({"type": "StartWorkload", "workload": with(base, json!({field: value}))}))
        };
        let (code, found) = rules(ask(&mut client, beyond));
        assert_eq!(code, ErrorCode::InvalidArgument, "{field}");
        assert!(found.len() == 1 && found[0].0.starts_with(&format!("/workload/{field}")), "{field}: {found:?}");
        match ask(&mut client, most) {
            Reply::Status { .. } => {}
            other => panic!("{field}: {}", brief(&other)),
        }
    }
    assert!(matches!(client.ask(&json!({"type": "Ping"})), Reply::Pong { .. }));
}

#[test]
fn a_line_has_its_length_and_its_depth() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let check = |bytes: usize, fits: bool| {
        let mut client = agent.line();
        let line = format!("{{\"type\":\"Ping\",\"seq\":1{}}}", " ".repeat(bytes - 24));
        let sent = client.try_send(format!("{line}\n").as_bytes());
        match client.text() {
            Some(text) if fits => assert!(text.contains("Pong") && sent.is_ok(), "{text}"),
            Some(text) => {
                assert_eq!(
                    text,
                    format!(
                        r#"{{"type":"Error","code":"InvalidArgument","message":"a line must be at most {} bytes"}}"#,
                        limits::LINE_BYTES_MAX
                    )
                );
                assert_eq!(client.text(), None, "and the connection is closed");
            }
            None => panic!("no answer to {bytes} bytes"),
        }
        assert!(matches!(agent.ask(&json!({"type": "Ping"})), Reply::Pong { .. }));
    };
    check(limits::LINE_BYTES_MAX, true);
    check(limits::LINE_BYTES_MAX + 1, false);
    check(2 * limits::LINE_BYTES_MAX, false);
    let nested = |depth: usize| format!("{{\"type\":\"Ping\",\"x\":{}1{}}}", "[".repeat(depth), "]".repeat(depth));
    check_line(&agent, nested(limits::JSON_DEPTH_MAX - 1).as_bytes(), &[("/x", "unknown field")]);
    check_line(&agent, nested(limits::JSON_DEPTH_MAX).as_bytes(), &[("", "nested deeper than")]);
    check_line(&agent, nested(500_000).as_bytes(), &[("", "nested deeper than")]);
}

#[test]
fn an_endless_line_is_cut_off() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut socket = Socket::connect(&agent.address).expect("connected");
    let mut sent = 0usize;
    // More than any buffer between us, and less than what the closing side throws away.
    let error = loop {
        match socket.write(&[b'x'; 64 * 1024]) {
            Ok(n) => sent += n,
            Err(error) => break error,
        }
        assert!(sent < 256 << 20, "nobody stops us");
    };
    assert!(matches!(error.kind(), std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset), "{error}");
    assert!(matches!(agent.ask(&json!({"type": "Ping"})), Reply::Pong { .. }));
}

#[test]
fn lines_are_lines_whatever_is_between_them() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut client = agent.line();
    // Empty lines, carriage returns, blanks, and many at once, answered in order.
    client.send(b"\n\r\n   \n{\"type\":\"Ping\",\"seq\":1}\r\n{\"type\":\"Ping\",\"seq\":2}\n");
    let pong = |seq: &str| format!(r#"{{"type":"Pong","version":"{}","seq":{seq}}}"#, env!("CARGO_PKG_VERSION"));
    assert_eq!((client.text(), client.text()), (Some(pong("1")), Some(pong("2"))));
    assert_eq!(client.exchange(r#"{"type":"Ping","seq":"abc"}"#), pong("\"abc\""));
    let many: String = (0..1000).map(|i| format!("{{\"type\":\"Ping\",\"seq\":{i}}}\n")).collect();
    client.send(many.as_bytes());
    for i in 0..1000 {
        assert_eq!(client.text(), Some(pong(&i.to_string())));
    }
    // Garbage between good lines costs an answer each, and no more.
    client.send(b"{\"type\":\"Ping\",\"seq\":7}\ngarbage\n{\"type\":\"Ping\",\"seq\":8}\n");
    assert_eq!(client.text(), Some(pong("7")));
    assert_eq!(expect_error(client.reply()).code, ErrorCode::InvalidArgument);
    assert_eq!(client.text(), Some(pong("8")));
    // A seq that cannot be echoed is a problem, and the others are echoed with errors too.
    assert!(client.exchange(r#"{"type":"Nope","seq":9}"#).ends_with("\"seq\":9}"));
    assert!(!client.exchange(r#"{"type":"Ping","seq":[1]}"#).contains("\"seq\":["));
    let long = "s".repeat(limits::NAME_BYTES_MAX + 1);
    assert!(client.exchange(&format!(r#"{{"type":"Ping","seq":"{long}"}}"#)).contains("/seq"));
    // The end of the stream in the middle of a line is answered, at its beginning it is the end.
    client.send(b"{\"type\":\"Pi");
    client.end();
    let error = expect_error(client.next().expect("an answer"));
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::InvalidArgument, "a line must end with a newline"));
    assert_eq!(client.next(), None);
    let mut client = agent.line();
    client.end();
    assert_eq!(client.next(), None);
    // Byte by byte is a line all the same.
    let mut client = agent.line();
    for byte in b"{\"type\":\"Ping\"}\n" {
        client.send(&[*byte]);
    }
    assert!(matches!(client.reply(), Reply::Pong { .. }));
}

/// Rows that take the daemons' own patience: side by side, so that all together take as long as one.
#[test]
fn the_slow_are_cut_off_in_time() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let (line, http) = (agent.address.clone(), plane.address);
    thread::scope(|scope| {
        // Half a line, then silence; and a byte a second, which gains nothing.
        for drips in [false, true] {
            let line = &line;
            scope.spawn(move || {
                let mut client = Line::connect(line);
                let watch = Stopwatch::start();
                client.send(b"{\"type\":\"Pin");
                if drips {
                    while watch.elapsed_ms() < limits::LINE_MS_MAX - 500 {
                        let _ = client.try_send(b" ");
                        thread::park_timeout(Duration::from_secs(1));
                    }
                }
                let error = expect_error(client.next().expect("an answer"));
                assert_eq!(
                    (error.code, error.message),
                    (ErrorCode::DeadlineExceeded, format!("a line must be complete within {} ms", limits::LINE_MS_MAX))
                );
                check_time(&watch, limits::LINE_MS_MAX);
                assert_eq!(client.next(), None);
            });
        }
        for drips in [false, true] {
            scope.spawn(move || {
                let mut client = Http::connect(http);
                let watch = Stopwatch::start();
                client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: ");
                if drips {
                    while watch.elapsed_ms() < limits::HTTP_HEAD_MS_MAX - 500 {
                        let _ = client.try_send(b"x");
                        thread::park_timeout(Duration::from_secs(1));
                    }
                }
                assert_eq!(client.answer().problem(), (408, "request_timeout".into()));
                check_time(&watch, limits::HTTP_HEAD_MS_MAX);
                assert!(client.is_closed());
            });
        }
        // Meanwhile others are served.
        for _ in 0..5 {
            assert!(matches!(agent.ask(&json!({"type": "Ping"})), Reply::Pong { .. }));
            assert_eq!(plane.get("/livez").status, 200);
            thread::park_timeout(Duration::from_millis(500));
        }
    });
}

fn check_time(watch: &Stopwatch, ms: u64) {
    assert!((ms - 100..ms + 5000).contains(&watch.elapsed_ms()), "{} ms instead of {ms}", watch.elapsed_ms());
}

#[test]
fn an_http_request_that_breaks_a_rule_hears_which() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    // A request that may hide another ends its connection; what follows it is never looked at.
    let check = |request: &[u8], status: u16, code: &str, words: &str| {
        let mut http = plane.http();
        let shown = brief(&String::from_utf8_lossy(request));
        let _ = http.try_send(&[request, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"].concat());
        let answer = http.answer();
        assert_eq!(answer.problem(), (status, code.to_owned()), "{shown}: {}", answer.text());
        let detail = answer.json()["detail"].as_str().unwrap_or_default().to_owned();
        assert!(detail.contains(words), "{shown}: {detail}");
        assert_eq!(answer.header("connection"), Some("close"), "{shown}");
        assert!(http.is_closed(), "{shown}");
    };
    let bad = |request: &[u8], words: &str| check(request, 400, "bad_request", words);
    let post =
        |headers: &str, body: &[u8]| [format!("POST /workloads HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").as_bytes(), body].concat();

    bad(&post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"), "exclude each other");
    bad(&post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n"), "exclude each other");
    bad(&post("Content-Length: 2\r\nContent-Length: 2\r\n", b"{}"), "header content-length may be given once");
    bad(&post("Content-Length: 2\r\nContent-Length: 3\r\n", b"{}"), "header content-length may be given once");
    for length in ["+2", "-1", "0x2", "2,2", "2 2", "", "18446744073709551616", "\u{0662}"] {
        bad(&post(&format!("Content-Length: {length}\r\n"), b"{}"), "Content-Length is one decimal number");
    }
    bad(&post("Transfer-Encoding: gzip\r\n", b""), "chunked must be the last");
    bad(&post("Transfer-Encoding: chunked, identity\r\n", b""), "chunked must be the last");
    bad(&post("Transfer-Encoding: chunked, chunked\r\n", b""), "chunked must be the last");
    check(&post("Transfer-Encoding: gzip, chunked\r\n", b""), 501, "not_implemented", "the only transfer coding");
    bad(&post("Transfer-Encoding : chunked\r\n", b""), "no whitespace stands between");
    bad(&post("X-Folded: a\r\n b\r\n", b""), "a header stands on one line");
    bad(&post("X-Folded: a\r\n\tb\r\n", b""), "a header stands on one line");
    bad(&post("X\x01Y: a\r\n", b""), "a header is a name");
    bad(&post("X-Nul: a\x00b\r\n", b""), "header values are UTF-8 without control characters");
    bad(&post("No colon here\r\n", b""), "");
    for chunks in ["zz\r\n", "-1\r\n", "0x1\r\na\r\n", "\r\n", "1 \r\na\r\n", "11111111111111111\r\n", "+1\r\na\r\n"] {
        bad(&post("Transfer-Encoding: chunked\r\n", chunks.as_bytes()), "a chunk size is 1 to 16 hexadecimal digits");
    }
    bad(&post("Transfer-Encoding: chunked\r\n", b"1\r\nab\r\n"), "the data of a chunk is followed by CRLF");
    bad(&post("Transfer-Encoding: chunked\r\n", b"1\na\r\n"), "lines end with CRLF");
    check(&post("Transfer-Encoding: chunked\r\n", b"ffffffffffffffff\r\n"), 413, "body_too_large", "a body has at most");
    check(&post("Transfer-Encoding: chunked\r\n", b"80001\r\n"), 413, "body_too_large", "a body has at most");
    check(&post("Content-Length: 524289\r\n", b""), 413, "body_too_large", "a body has at most 524288 bytes");
    check(&post("Content-Length: 18446744073709551615\r\n", b""), 413, "body_too_large", "a body has at most");
    check(&post("Expect: 200-ok\r\nContent-Length: 2\r\n", b""), 417, "expectation_failed", "100-continue");

    bad(b"GET /livez HTTP/1.1\r\n\r\n", "HTTP/1.1 requires Host");
    bad(b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "header host may be given once");
    bad(b"GET /livez HTTP/1.1\r\nHost: a b\r\n\r\n", "Host is a name");
    bad(b"GET /livez HTTP/1.1\nHost: a\n\n", "lines end with CRLF");
    bad(b"GET  /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", "a request begins with");
    bad(b"GET /livez\r\n\r\n", "a request begins with");
    bad(b"GET /li vez HTTP/1.1\r\nHost: localhost\r\n\r\n", "a request begins with");
    bad(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS hello\r\n\r\n", "a request begins with");
    check(b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n", 505, "version_not_supported", "HTTP/1.1 and HTTP/1.0");
    check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "version_not_supported", "HTTP/1.1 and HTTP/1.0");
    check(b"BREW /pot HTTP/1.1\r\nHost: localhost\r\n\r\n", 501, "not_implemented", "methods are DELETE, GET");
    check(b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501, "not_implemented", "methods are");
    check(b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 501, "not_implemented", "methods are");
    check(b"get /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 501, "not_implemented", "methods are");

    let target = |target: &str, words: &str| bad(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes(), words);
    for path in
        ["/workloads/../nodes", "/workloads/%2e%2e/nodes", "/..", "/./livez", "//livez", "/workloads/a%2fb", "/workloads/a%5Cb", "/livez/"]
    {
        target(path, "path segments are not empty");
    }
    for path in ["/workloads/%00", "/workloads/a%0d%0ab", "/workloads/%zz", "/workloads/%", "/workloads/%ff", "/livez?a=%00"] {
        target(path, "percent-encoding is two hexadecimal digits");
    }
    target("/livez#a", "must be percent-encoded");
    target("/a\\b", "must be percent-encoded");
    target("livez", "the request target is a path");
    target("ftp://x/livez", "the request target is a path");
    check(
        format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(limits::HTTP_TARGET_BYTES_MAX)).as_bytes(),
        414,
        "uri_too_long",
        "at most 4096",
    );
    assert_eq!(plane.get("/workloads").json()["items"], json!([]));
}

/// Without it no body is looked at.
const JSON: &str = "Content-Type: application/json\r\n";

#[test]
fn http_limits_hold_at_the_limit_and_one_beyond() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let get = |target: &str, headers: &str| {
        let mut http = plane.http();
        let _ = http.try_send(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").as_bytes());
        http.answer().status
    };
    let path = |bytes: usize| format!("/{}", "a".repeat(bytes - 1));
    assert_eq!(get(&path(limits::HTTP_TARGET_BYTES_MAX), ""), 404);
    assert_eq!(get(&path(limits::HTTP_TARGET_BYTES_MAX + 1), ""), 414);
    let headers = |n: usize| (0..n).map(|i| format!("X-{i}: a\r\n")).collect::<String>();
    assert_eq!(get("/livez", &headers(limits::HTTP_HEADERS_MAX - 1)), 200);
    assert_eq!(get("/livez", &headers(limits::HTTP_HEADERS_MAX)), 431);
    assert_eq!(get("/livez", &headers(10_000)), 431);
    let frame = "GET /livez HTTP/1.1\r\nHost: localhost\r\nX: \r\n\r\n".len();
    let header = |head_bytes: usize| format!("X: {}\r\n", "a".repeat(head_bytes - frame));
    assert_eq!(get("/livez", &header(limits::HTTP_HEAD_BYTES_MAX)), 200);
    assert_eq!(get("/livez", &header(limits::HTTP_HEAD_BYTES_MAX + 1)), 431);
    assert_eq!(get("/livez", &header(1 << 20)), 431);

    let body = |bytes: usize| with(place.workload("wl-1", &["true"]), json!({"pad": "x".repeat(bytes)})).to_string();
    let overhead = body(0).len();
    let post = |bytes: usize| {
        let mut http = plane.http();
        let body = body(bytes - overhead);
        let _ = http.try_send(
            format!("POST /workloads HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes(),
        );
        http.answer().status
    };
    assert_eq!(post(limits::HTTP_BODY_BYTES_MAX), 422, "read, and found to have a field too many");
    assert_eq!(post(limits::HTTP_BODY_BYTES_MAX + 1), 413);
    let chunked = |bytes: usize| {
        let mut http = plane.http();
        let body = body(bytes - overhead);
        let mut request = format!("POST /workloads HTTP/1.1\r\nHost: localhost\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n").into_bytes();
        for chunk in body.as_bytes().chunks(60_000) {
            request.extend([format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat());
        }
        let _ = http.try_send(&[&request[..], b"0\r\n\r\n"].concat());
        http.answer().status
    };
    assert_eq!(chunked(limits::HTTP_BODY_BYTES_MAX), 422);
    assert_eq!(chunked(limits::HTTP_BODY_BYTES_MAX + 1), 413);
}

#[test]
fn what_is_allowed_but_rare_is_done_as_the_rfc_says() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    // Expect: the client waits for the interim response before it sends the body.
    let workload = with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})).to_string();
    let mut http = plane.http();
    let framing = format!("{JSON}Expect: 100-continue\r\nContent-Length: {}\r\n", workload.len());
    let head = format!("POST /workloads HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n");
    http.send(head.as_bytes());
    assert_eq!(http.answer().status, 100);
    http.send(workload.as_bytes());
    assert_eq!(http.answer().status, 201);
    // A body that will not be read is refused at once, without asking for it.
    http.send(b"POST /workloads HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n\r\n");
    assert_eq!(http.answer().status, 413);
    assert!(http.is_closed());
    // Shorter than promised.
    let mut http = plane.http();
    http.send(b"POST /workloads HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{}");
    http.end();
    let answer = http.answer();
    assert_eq!(answer.problem(), (400, "bad_request".into()));
    assert!(answer.text().contains("the connection ended before the request was complete"), "{}", answer.text());
    // HEAD is GET without the body; the length is that of the body there would be.
    let mut http = plane.http();
    let get = http.ask("GET", "/version", &[], b"");
    let head = http.ask("HEAD", "/version", &[], b"");
    assert_eq!((head.status, head.header("content-length")), (200, get.header("content-length")));
    assert_eq!(head.header("content-type"), get.header("content-type"));
    assert_eq!(http.ask("HEAD", "/workloads/nobody", &[], b"").status, 404);
    assert_eq!(http.ask("GET", "/livez", &[], b"").text(), "ok\n", "no byte of a body stood in between");
    // Absolute form, an asterisk, blank lines before a request, a chunk extension, a trailer, header names in any case.
    http.send(b"\r\n\r\nGET http://x:80/livez HTTP/1.1\r\nhOsT: localhost\r\n\r\n");
    assert_eq!(http.answer().text(), "ok\n");
    http.send(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(http.answer().status < 500);
    let chunked = format!("{JSON}Transfer-Encoding: Chunked\r\n\r\n2;a=b\r\n{{}}\r\n0\r\nX-Trailer: a\r\n\r\n");
    http.send(format!("POST /workloads HTTP/1.1\r\nHost: localhost\r\n{chunked}").as_bytes());
    assert_eq!(http.answer().status, 422);
    http.send(b"GET /livez HTTP/1.1\r\nHost:\r\n\r\n");
    assert_eq!(http.answer().status, 200);
    // A query is split before it is decoded.
    assert_eq!(http.ask("GET", "/workloads?label=a%3Db%26c", &[], b"").status, 400);
    assert_eq!(http.ask("GET", "/workloads?&&limit=1", &[], b"").status, 200);
}

#[test]
fn a_client_too_many_is_told_so_and_costs_nobody_else() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let mut lines: Vec<Line> = Vec::new();
    // The control plane has connections of its own to the agent, so the last place is found by trying.
    let refused = loop {
        let mut line = agent.line();
        let _ = line.try_send(b"{\"type\":\"Ping\"}\n");
        match line.next() {
            Some(Reply::Pong { .. }) => lines.push(line),
            Some(Reply::Error(error)) => break error,
            other => panic!("{other:?}"),
        }
        assert!(lines.len() <= limits::CONNECTIONS_MAX);
    };
    assert_eq!((refused.code, refused.message.as_str()), (ErrorCode::ResourceExhausted, "too many connections; try again later"));
    assert!(lines.len() > limits::CONNECTIONS_MAX - 20, "{} were served", lines.len());
    assert!(matches!(lines[0].ask(&json!({"type": "Ping"})), Reply::Pong { .. }), "who is in is served");
    lines.clear();
    until("there is room again", || {
        let mut line = agent.line();
        let _ = line.try_send(b"{\"type\":\"Ping\"}\n");
        matches!(line.next(), Some(Reply::Pong { .. }))
    });

    let mut clients: Vec<Http> = (0..limits::CONNECTIONS_MAX).map(|_| plane.http()).collect();
    for client in &mut clients {
        assert_eq!(client.ask("GET", "/livez", &[], b"").status, 200);
    }
    let mut late = plane.http();
    let answer = late.answer();
    assert_eq!(
        (answer.problem(), answer.header("retry-after"), answer.header("connection")),
        ((503, "too_many_connections".into()), Some("1"), Some("close"))
    );
    assert_eq!(clients[7].ask("GET", "/livez", &[], b"").status, 200);
}
