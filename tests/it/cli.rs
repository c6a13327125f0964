//! The command line, as a script sees it: stdout, stderr, exit code.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::harness::daemon::{CLI, Daemon, command};
use crate::harness::place::{IMAGE, with};
use crate::harness::{Dir, Place, Plane, SOON_MS, eventually, until};

/// What a command said and how it ended.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }
}

/// `kakuri` with these words, against this control plane.
fn kakuri(plane: &Plane<'_>, words: &[&str]) -> Said {
    command(CLI).env("KAKURI_ADDR", plane.url()).args(words).output().expect("runs").into()
}

fn piped(mut command: Command, stdin: &str) -> Said {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs");
    child.stdin.take().expect("a pipe").write_all(stdin.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it ends").into()
}

scenarios! {
    run_wait_is_like_running_it_here
}

fn run_wait_is_like_running_it_here(place: &Place) {
    let agent = place.agent(&[]);
    let plane = Plane::start(place, &[&agent], &[]);
    let run = |more: &[&str]| kakuri(&plane, &[&["run", "--class", place.class, "--memory", "64", "--wait", IMAGE, "--"], more].concat());
    let said = run(&["sh", "-c", "echo out; sleep 0.2; echo more; exit 7"]);
    assert_eq!((said.code, said.out.as_str()), (Some(7), "out\nmore\n"), "{said:?}");
    assert!(said.err.contains("Running") && said.err.contains("Failed (Error)"), "{said:?}");
    let said = run(&["true"]);
    assert_eq!((said.code, said.out.as_str()), (Some(0), ""), "{said:?}");
    assert!(said.err.contains("Succeeded (Completed)"), "{said:?}");
    // Whatever keeps us from learning how it ended is 125.
    let said = run(&["/no/such/program"]);
    assert_eq!((said.code, said.out.as_str()), (Some(125), ""), "{said:?}");
    assert!(said.err.contains("Failed (StartFailed)"), "{said:?}");
}

#[test]
fn each_command_does_its_part() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let kakuri = |words: &[&str]| kakuri(&plane, words);
    let said = kakuri(&[
        "run",
        "--id",
        "web",
        "--class",
        "native",
        "-l",
        "app=web",
        "--grace",
        "0s",
        "--wait-running",
        IMAGE,
        "--",
        "sleep",
        "1000",
    ]);
    assert_eq!((said.code, said.out.as_str()), (Some(0), "web\n"), "{said:?}");
    // The same again is the same, another is a conflict.
    let again = ["run", "--id", "web", "--class", "native", "-l", "app=web", "--grace", "0s", IMAGE, "--", "sleep", "1000"];
    assert_eq!(kakuri(&again).code, Some(0));
    let said = kakuri(&["run", "--id", "web", "--class", "native", IMAGE]);
    assert_eq!((said.code, said.out.as_str()), (Some(5), ""), "{said:?}");
    assert!(said.err.contains("another workload has this id"), "{said:?}");

    let said = kakuri(&["get", "web", "-o", "json"]);
    assert_eq!((said.code, said.json()["state"].clone()), (Some(0), json!("Running")), "{said:?}");
    assert_eq!(kakuri(&["get", "web", "-o", "name"]).out, "web\n");
    let table = kakuri(&["get", "web"]).out;
    assert!(table.lines().any(|line| line.split_whitespace().eq(["state", "Running"])), "{table}");
    let table = kakuri(&["list"]).out;
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["ID", "STATE", "REASON", "CLASS", "NODE", "RESTARTS", "EXIT", "AGE", "IMAGE"]);
    assert_eq!((&rows[1][..6], rows.len()), (&["web", "Running", "-", "native", agent.node.as_str(), "0"][..], 2));
    assert_eq!(kakuri(&["list", "-o", "name", "--label", "app=web", "--state", "Running"]).out, "web\n");
    assert_eq!(kakuri(&["list", "-o", "name", "--state", "Failed"]).out, "");
    assert_eq!(kakuri(&["list", "-o", "json"]).json()["items"][0]["id"], "web");

    let said = kakuri(&["exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (Some(3), "out\n", "err\n"));
    assert_eq!(kakuri(&["exec", "web", "--", "true"]).code, Some(0));
    let said = kakuri(&["exec", "-o", "json", "web", "--", "sh", "-c", "echo out; exit 3"]);
    assert_eq!((said.code, said.json()["stdout"].clone(), said.json()["exit_code"].clone()), (Some(3), json!("out\n"), json!(3)));
    let said = kakuri(&["exec", "web", "--", "/no/such/program"]);
    assert_eq!((said.code, said.out.as_str()), (Some(125), ""), "{said:?}");
    let said = kakuri(&["exec", "web", "--timeout", "1s", "--", "sleep", "60"]);
    assert_eq!(said.code, Some(125), "{said:?}");

    let said = kakuri(&["wait", "web", "--for", "running"]);
    assert_eq!((said.code, said.out.as_str()), (Some(0), "Running\n"), "{said:?}");
    let said = kakuri(&["wait", "web", "--timeout", "300ms"]);
    assert_eq!((said.code, said.out.as_str()), (Some(6), ""), "{said:?}");
    assert!(said.err.contains("timeout: web is Running"), "{said:?}");
    let said = kakuri(&["stop", "web", "--wait", "-o", "json"]);
    assert_eq!((said.code, said.json()["status"]["reason"].clone()), (Some(0), json!("Stopped")), "{said:?}");
    let said = kakuri(&["wait", "web"]);
    assert_eq!((said.code, said.out.as_str()), (Some(0), "Failed\n"), "{said:?}");

    let said = kakuri(&["nodes"]);
    assert!(said.out.contains(&agent.node) && said.code == Some(0), "{said:?}");
    assert_eq!(kakuri(&["nodes", "-o", "name"]).out, format!("{}\n", agent.node));
    assert_eq!(kakuri(&["nodes", &agent.node, "-o", "json"]).json()["ready"], true);
    let version = env!("CARGO_PKG_VERSION");
    let said = kakuri(&["version"]);
    assert_eq!((said.code, said.out.matches(version).count()), (Some(0), 2), "{said:?}");

    let said = kakuri(&["delete", "--force", "web"]);
    assert_eq!((said.code, said.err.contains("is configured")), (Some(5), true), "{said:?}");
    let said = kakuri(&["delete", "web", "--wait"]);
    assert_eq!((said.code, said.out.as_str()), (Some(0), "web\n"), "{said:?}");
    for words in [&["get", "web"][..], &["stop", "web"], &["delete", "web"], &["logs", "web"], &["wait", "web"], &["nodes", "nobody"]] {
        let said = kakuri(words);
        assert_eq!((said.code, said.out.as_str()), (Some(3), ""), "{words:?}: {said:?}");
        assert!(said.err.starts_with("kakuri: there is no such"), "{words:?}: {said:?}");
    }
    assert_eq!(kakuri(&["exec", "web", "--", "true"]).code, Some(125), "exec has the workload's codes, and 125 for ours");
}

#[test]
fn logs_come_as_they_are_written() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&place.workload("wl-1", &["sh", "-c", "echo one; sleep 0.3; echo two >&2; sleep 0.3; echo three"]));
    let said = kakuri(&plane, &["logs", "-f", "wl-1"]);
    assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (Some(0), "one\ntwo\nthree\n", ""));
    let logs = |words: &[&str]| kakuri(&plane, &[&["logs", "wl-1"], words].concat()).out;
    assert_eq!(logs(&[]), "one\ntwo\nthree\n");
    assert_eq!(logs(&["-n", "1"]), "three\n");
    assert_eq!(logs(&["--stream", "stderr"]), "two\n");
    assert_eq!(logs(&["--since", "1h", "-n", "2"]), "two\nthree\n");
    assert!(logs(&["-t"]).lines().all(|line| line.contains("Z ")), "{}", logs(&["-t"]));
    // A reader that had enough is no failure.
    plane.run(&place.workload("much", &["spam", "640000"]));
    plane.ended("much");
    let script = format!("{CLI} logs much | head -n 1; echo ${{PIPESTATUS[0]}}");
    let output = command("bash").env("KAKURI_ADDR", plane.url()).args(["-c", &script]).output().expect("bash");
    let said = Said::from(output);
    assert!(said.out.starts_with("0000000000 ") && said.out.ends_with("\n0\n") && said.err.is_empty(), "{said:?}");
}

#[test]
fn a_spec_comes_from_a_file_or_stdin() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let spec = place.workload("from-file", &["sh", "-c", "echo hello; exit 2"]);
    let path = place.dir.write("spec.json", &spec.to_string()).display().to_string();
    let said = kakuri(&plane, &["run", "-f", &path, "--wait"]);
    assert_eq!((said.code, said.out.as_str()), (Some(2), "hello\n"), "{said:?}");
    let mut from_stdin = command(CLI);
    from_stdin.env("KAKURI_ADDR", plane.url()).args(["run", "-f", "-"]);
    let said = piped(from_stdin, &with(spec, json!({"id": "from-stdin"})).to_string());
    assert_eq!((said.code, said.out.as_str()), (Some(0), "from-stdin\n"), "{said:?}");
    // What is wrong is said by pointer, all of it.
    let path = place.dir.write("bad.json", r#"{"image":"busybox","runtime_class":"native","memory_mb":0,"nope":1}"#).display().to_string();
    let said = kakuri(&plane, &["run", "-f", &path]);
    assert_eq!((said.code, said.out.as_str()), (Some(2), ""), "{said:?}");
    assert!(said.err.contains("/memory_mb: must be a whole number") && said.err.contains("/nope: unknown field"), "{said:?}");
    assert_eq!(kakuri(&plane, &["run", "-f", "/no/such/file"]).code, Some(2));
    // An environment variable by its name alone takes its value from here, and shows it nowhere.
    let mut by_name = command(CLI);
    let words = ["run", "--id", "env", "--class", "native", "-e", "SECRET_TOKEN", "-e", "A=b", IMAGE, "--", "true"];
    by_name.env("KAKURI_ADDR", plane.url()).env("SECRET_TOKEN", "hunter2").args(words);
    let said = Said::from(by_name.output().expect("runs"));
    assert_eq!(said.code, Some(0), "{said:?}");
    let shown: String =
        ["agent.log", "plane.log", "calls"].map(|file| std::fs::read_to_string(place.dir.join(file)).unwrap_or_default()).concat();
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[test]
fn wrong_words_are_answered_with_the_right_ones() {
    let said = |words: &[&str]| Said::from(command(CLI).args(words).output().expect("runs"));
    for (words, expect) in [
        (&[][..], "a command is missing"),
        (&["lst"], "did you mean \"list\"?"),
        (&["get"], "ID is missing"),
        (&["get", "a", "b"], "unexpected argument \"b\""),
        (&["get", "A"], "id must be"),
        (&["list", "--nope"], "nope"),
        (&["list", "-o", "yaml"], "must be json, table or name"),
        (&["run"], ""),
        (&["wait", "a", "--for", "ever"], "must be running or terminal"),
        (&["wait", "a", "--timeout", "5"], "a duration is numbers with units"),
        (&["--server", "https://x", "list"], "https is not in this version"),
    ] {
        let said = said(words);
        assert_eq!((said.code, said.out.as_str()), (Some(2), ""), "{words:?}: {said:?}");
        assert!(said.err.starts_with("kakuri: ") && said.err.contains(expect), "{words:?}: {said:?}");
    }
    for words in [&["--help"][..], &["help"], &["run", "--help"], &["help", "play"]] {
        let said = said(words);
        assert_eq!((said.code, said.err.as_str()), (Some(0), ""), "{words:?}: {said:?}");
        assert!(said.out.contains("Usage: kakuri") && said.out.contains("Example:"), "{words:?}: {said:?}");
    }
    assert_eq!(said(&["--version"]).out, format!("kakuri {}\n", env!("CARGO_PKG_VERSION")));
    // Nobody answers.
    let holder = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let nobody = format!("http://{}", holder.local_addr().expect("bound"));
    drop(holder);
    let refused = said(&["--server", &nobody, "list"]);
    assert_eq!((refused.code, refused.out.as_str()), (Some(6), ""), "{refused:?}");
    assert!(refused.err.contains("kakuri play --project DIR"), "{refused:?}");
    let refused = said(&["--server", &nobody, "run", "--class", "native", "--wait", "busybox"]);
    assert_eq!(refused.code, Some(125), "{refused:?}");
}

#[test]
fn every_program_explains_itself() {
    use crate::harness::daemon::{AGENT, PLANE, SIM};
    for program in [AGENT, CLI, PLANE, SIM] {
        let said = |words: &[&str]| Said::from(command(program).args(words).output().expect("runs"));
        let help = said(&["--help"]);
        assert_eq!((help.code, help.err.as_str()), (Some(0), ""), "{help:?}");
        let name = program.rsplit('/').next().unwrap_or_default();
        assert!(help.out.contains(&format!("Usage: {name} ")) && help.out.contains("Example:"), "{help:?}");
        assert!(help.out.lines().all(|line| line.len() <= 120), "{}", help.out);
        let version = said(&["-V"]);
        assert_eq!((version.code, version.out), (Some(0), format!("{name} {}\n", env!("CARGO_PKG_VERSION"))));
        let wrong = said(&["--no-such-flag"]);
        assert_eq!((wrong.code, wrong.out.as_str()), (Some(2), ""), "{wrong:?}");
        assert!(wrong.err.starts_with(&format!("{name}: ")) && wrong.err.contains("--help"), "{wrong:?}");
    }
}

/// `kakuri play`, ended when the test is: it has no `--until-eof` of its own.
fn play(dir: &Dir, words: &[&str]) -> Daemon {
    let project = dir.join("demo").display().to_string();
    let script = r#""$0" play --project "$@" & child=$!; trap 'kill -INT $child' TERM; cat >/dev/null; kill -INT $child; wait $child"#;
    let mut shell = command("bash");
    shell.args(["-c", script, CLI, &project]).args(words);
    Daemon::spawn(shell, "play", &dir.join("play.log"))
}

#[test]
fn play_starts_everything_and_leaves_nothing() {
    let dir = Dir::new();
    std::fs::create_dir(dir.join("demo")).expect("made");
    dir.write("demo/runtime.toml", "[runtime]\nname = \"demo\"\n\n[runtime.web]\nlisten = \"127.0.0.1:0\"\n");
    let mut playing = play(&dir, &["--simulator"]);
    let log = || std::fs::read_to_string(dir.join("play.log")).unwrap_or_default();
    let url = eventually("play is ready", SOON_MS, || {
        log().lines().find_map(|line| line.split(" is ready on ").nth(1).and_then(|rest| rest.split(',').next()).map(str::to_owned))
    });
    assert!(log().contains("SIMULATION: NOTHING IS ISOLATED, AND NO CONTAINER RUNS."), "{}", log());
    // Ready means that what it then suggests works, to the letter.
    let suggested = eventually("suggestions", SOON_MS, || {
        let tries: Vec<String> =
            log().lines().filter_map(|line| line.split_once("try: kakuri ").map(|(_, words)| words.to_owned())).collect();
        (!tries.is_empty()).then_some(tries)
    });
    for words in suggested {
        let said = Said::from(command(CLI).args(words.split(' ')).output().expect("runs"));
        assert_eq!((said.code, said.out.as_str()), (Some(0), "hello\n"), "kakuri {words}: {said:?}");
    }
    assert_eq!(
        std::fs::metadata(dir.join("demo/data")).map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 0o777).ok(),
        Some(0o700)
    );
    assert_eq!(playing.stop(), Some(0), "{}", log());
    let refused = Said::from(command(CLI).args(["--server", &url, "list"]).output().expect("runs"));
    assert_eq!(refused.code, Some(6), "{refused:?}");
    for socket in ["agent.sock", "cri-sim.sock"] {
        assert!(!dir.join("demo/data").join(socket).exists(), "{socket} is left");
    }
    // What is there is kept: the second time nothing is made anew.
    assert!(!log().contains("made "), "{}", log());
}

#[test]
fn play_makes_a_project_once() {
    let dir = Dir::new();
    // Nothing listens there, so that it ends by itself, with a word about it.
    let words = ["--cri-endpoint", "unix:///nonexistent/cri.sock"];
    let mut playing = play(&dir, &words);
    until("it ended", || {
        std::fs::read_to_string(dir.join("play.log")).is_ok_and(|log| log.contains("container runtime /nonexistent/cri.sock"))
    });
    playing.stop();
    let made = |name: &str| dir.join("demo").join(name).exists();
    assert!(made("runtime.toml") && made("data") && made("certs") && made(".gitignore"));
    let text = std::fs::read_to_string(dir.join("demo/runtime.toml")).expect("made");
    assert!(text.contains("name = \"demo\"") && text.contains("127.0.0.1:8080"), "{text}");
}

/// Hears as many requests as there are words, and answers those that are to be; what was asked.
fn control_plane_that_hangs_up(answers: &[bool], ask: impl FnOnce(&str) -> Said) -> (Vec<Value>, Said) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    std::thread::scope(|scope| {
        let heard = scope.spawn(|| {
            answers
                .iter()
                .map(|is_answered| {
                    let (mut stream, _) = listener.accept().expect("a client");
                    let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
                    let (mut line, mut length) = (String::new(), 0);
                    while reader.read_line(&mut line).expect("text") > 2 {
                        length = line
                            .to_ascii_lowercase()
                            .strip_prefix("content-length: ")
                            .map_or(length, |n| n.trim().parse().expect("a number"));
                        line.clear();
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).expect("a body");
                    let spec: Value = serde_json::from_slice(&body).expect("JSON");
                    if *is_answered {
                        let answer = with(spec.clone(), json!({"state": "Pending"})).to_string();
                        let head = format!("HTTP/1.1 201 Created\r\nContent-Length: {}\r\n\r\n", answer.len());
                        stream.write_all([head, answer].concat().as_bytes()).expect("written");
                    }
                    spec
                })
                .collect()
        });
        let said = ask(&url);
        (heard.join().expect("it was asked as often"), said)
    })
}

#[test]
fn a_post_whose_answer_is_lost_is_sent_once_more_under_the_same_id() {
    let run = |url: &str| Said::from(command(CLI).args(["--server", url, "run", "--class", "native", "busybox"]).output().expect("runs"));
    let (heard, said) = control_plane_that_hangs_up(&[false, true], run);
    assert_eq!(heard[0], heard[1]);
    let id = heard[0]["id"].as_str().expect("an id");
    assert_eq!((said.code, said.out.as_str()), (Some(0), format!("{id}\n").as_str()), "{said:?}");
    let (heard, said) = control_plane_that_hangs_up(&[false, false], run);
    let id = heard[0]["id"].as_str().expect("an id");
    assert_eq!((said.code, said.out.as_str(), heard[1]["id"].as_str()), (Some(6), "", Some(id)), "{said:?}");
    assert!(said.err.contains(&format!("kakuri get {id}")), "{said:?}");
}

#[test]
fn a_control_plane_that_dies_over_a_run_leaves_an_id_to_ask_for() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.terminate();
    plane.again_to_die_at("control_plane-insert-after");
    plane.wait_until_ready();
    let run = |plane: &Plane<'_>, more: &[&str]| {
        let words = ["run", "--class", place.class, "--grace", "0s", "--memory", "64"];
        kakuri(plane, &[&words, more, &[IMAGE, "--", "sleep", "1000"]].concat())
    };
    let said = run(&plane, &[]);
    assert_eq!((said.code, said.out.as_str()), (Some(6), ""), "{said:?}");
    let id = said.err.split_whitespace().find(|word| word.starts_with("wl-")).expect("an id").to_owned();
    plane.wait_for_end();
    plane.again();
    plane.wait_until_ready();
    // It was accepted; whoever asks again under that id gets the same one.
    assert_eq!(kakuri(&plane, &["wait", &id, "--for", "running"]).code, Some(0));
    assert_eq!(run(&plane, &["--id", &id]).out, format!("{id}\n"));
    assert_eq!((kakuri(&plane, &["list", "-o", "name"]).out, place.count("StartContainer")), (format!("{id}\n"), 1));
}
