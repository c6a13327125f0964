//! A control plane that dies, whose disk is full or damaged, and that comes back: what it answered for is there, what it did not is
//! there wholly or not at all, and no agent starts anything twice.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Mutex;
use std::thread;

use kakuri::wire::agent::{ErrorCode, EventKind, Reply};
use kakuri::workload::State;
use serde_json::{Value, json};

use crate::harness::daemon::{CLI, PLANE, command};
use crate::harness::http::Answer;
use crate::harness::place::with;
use crate::harness::plane::try_ask;
use crate::harness::{Agent, Need, Place, Plane, SOON_MS, can_mount, eventually, expect_error, expect_status, skip, unique, until};

fn sleeper(place: &Place, id: &str) -> Value {
    with(place.workload(id, &["sleep", "1000"]), json!({"stop_grace_ms": 0, "labels": {"app": id}}))
}

/// How often the runtime was told to start a container; there is one for each workload.
fn starts(place: &Place) -> usize {
    place.count("StartContainer")
}

fn is_gone(plane: &Plane<'_>, id: &str) -> bool {
    plane.get(&format!("/workloads/{id}")).status == 404
}

/// A control plane that dies at a place, over a request or over what comes of it; whether the request was answered well.
struct Death<'a> {
    place: &'a Place,
    /// Before its agent, so that it ends before it.
    plane: Plane<'a>,
    agent: Agent<'a>,
}

impl<'a> Death<'a> {
    fn prepare(place: &'a Place) -> Self {
        let agent = place.agent(&[]);
        let plane = Plane::start(place, &[&agent], &[]);
        plane.run(&sleeper(place, "old"));
        Self { place, plane, agent }
    }

    /// Does it; the control plane is back when this returns.
    fn over(&mut self, failpoint: &str, method: &str, target: &str, body: Option<&Value>) -> bool {
        self.plane.terminate();
        self.plane.again_to_die_at(failpoint);
        self.plane.wait_until_ready();
        let answer = try_ask(self.plane.address, method, target, body);
        self.plane.wait_for_end();
        self.plane.again();
        self.plane.wait_until_ready();
        answer.is_some_and(|answer| answer.status < 300)
    }
}

/// Runs a scenario before and after a kind of commit, each in a place of its own, side by side.
fn around(stem: &str, scenario: impl Fn(&Place, String, bool) + Sync) {
    thread::scope(|scope| {
        for (when, is_after) in [("before", false), ("after", true)] {
            let scenario = &scenario;
            scope.spawn(move || scenario(&Place::sim(&[]), format!("{stem}-{when}"), is_after));
        }
    });
}

#[test]
fn a_death_over_a_post_leaves_it_there_or_not_there() {
    around("control_plane-insert", |place, failpoint, is_after| {
        let mut death = Death::prepare(place);
        let is_acknowledged = death.over(&failpoint, "POST", "/workloads", Some(&sleeper(place, "new")));
        assert!(!is_acknowledged, "nobody could have answered");
        if is_after {
            until("it runs, for it was on disk", || death.plane.workload("new")["state"] == "Running");
            assert_eq!((place.sandboxes_of("new").len(), starts(place)), (1, 2));
        } else {
            assert!(is_gone(&death.plane, "new"));
            assert_eq!((death.agent.list().len(), starts(place)), (1, 1), "nothing was sent that was not on disk");
        }
        // Whoever asked asks again, and has one in any case.
        let status = death.plane.post("/workloads", &sleeper(place, "new")).status;
        assert_eq!(status, if is_after { 200 } else { 201 });
        until("it runs", || death.plane.workload("new")["state"] == "Running");
        assert_eq!((place.sandboxes_of("new").len(), starts(place)), (1, 2));
    });
}

#[test]
fn a_death_before_what_the_agent_said_is_on_disk_loses_nothing() {
    around("control_plane-known", |place, failpoint, _| {
        let agent = place.agent(&[]);
        let mut plane = Plane::start(place, &[&agent], &[]);
        plane.terminate();
        plane.again_to_die_at(&failpoint);
        plane.wait_until_ready();
        let answer = try_ask(plane.address, "POST", "/workloads", Some(&sleeper(place, "new")));
        plane.wait_for_end();
        plane.again();
        plane.wait_until_ready();
        let is_acknowledged = answer.is_some_and(|answer| answer.status == 201);
        assert!(is_acknowledged || !is_gone(&plane, "new"), "it was on disk before the agent could say anything");
        until("it runs", || plane.workload("new")["state"] == "Running");
        assert_eq!((place.sandboxes_of("new").len(), starts(place)), (1, 1));
    });
}

#[test]
fn a_death_over_a_stop_stops_it_or_leaves_it_running() {
    around("control_plane-stop", |place, failpoint, is_after| {
        let mut death = Death::prepare(place);
        assert!(!death.over(&failpoint, "POST", "/workloads/old/stop", None));
        if is_after {
            assert_eq!(death.plane.ended("old")["status"]["reason"], "Stopped");
        } else {
            assert_eq!(death.plane.workload("old")["status"]["phase"], Value::Null);
            assert_eq!(death.agent.status("old").0, State::Running);
        }
        assert_eq!(starts(death.place), 1);
    });
}

#[test]
fn a_death_over_a_delete_deletes_it_or_leaves_it_running() {
    thread::scope(|scope| {
        for (failpoint, is_kept) in [
            ("control_plane-delete-before", true),
            ("control_plane-delete-after", false),
            // The wish is on disk, the agent has deleted it, and that it is to be forgotten is being written.
            ("control_plane-remove-before", false),
            ("control_plane-remove-after", false),
        ] {
            scope.spawn(move || {
                let place = Place::sim(&[]);
                let agent = place.agent(&[]);
                let mut plane = Plane::start(&place, &[&agent], &[]);
                plane.run(&sleeper(&place, "old"));
                plane.terminate();
                plane.again_to_die_at(failpoint);
                plane.wait_until_ready();
                let answer = try_ask(plane.address, "DELETE", "/workloads/old", None);
                plane.wait_for_end();
                assert!(!is_kept || answer.is_none(), "{failpoint}");
                plane.again();
                plane.wait_until_ready();
                if is_kept {
                    assert_eq!(plane.workload("old")["status"]["phase"], Value::Null, "{failpoint}");
                    assert_eq!(agent.status("old").0, State::Running, "{failpoint}");
                } else {
                    until("it is gone", || is_gone(&plane, "old"));
                    assert_eq!(agent.list(), [], "{failpoint}");
                    until("nothing is left", || place.sandboxes().is_empty());
                }
                assert_eq!(starts(&place), 1, "{failpoint}");
            });
        }
    });
}

#[test]
fn a_death_over_labels_changes_all_or_none() {
    around("control_plane-labels", |place, failpoint, is_after| {
        let mut death = Death::prepare(place);
        let patch = json!({"labels": {"app": null, "tier": "web"}});
        assert!(!death.over(&failpoint, "PATCH", "/workloads/old", Some(&patch)));
        let expect = if is_after { json!({"tier": "web"}) } else { json!({"app": "old"}) };
        assert_eq!(death.plane.workload("old")["labels"], expect);
        let there = || death.agent.list().first().map(|object| object.spec["labels"].clone());
        until("the agent has the same", || there().as_ref() == Some(&expect));
        assert_eq!(death.plane.post("/workloads", &with(sleeper(place, "old"), json!({"labels": expect}))).status, 200);
        assert_eq!(starts(place), 1);
    });
}

#[test]
fn a_death_over_an_end_tells_it_when_it_is_on_disk_and_not_before() {
    around("control_plane-end", |place, failpoint, is_after| {
        let mut agent = place.agent(&[]);
        let mut plane = Plane::start(place, &[&agent], &[]);
        plane.terminate();
        plane.again_to_die_at(&failpoint);
        plane.wait_until_ready();
        let ends = place.workload("ends", &["sh", "-c", "sleep 0.7; exit 3"]);
        assert_eq!(plane.post("/workloads", &ends).status, 201);
        let told = try_ask(plane.address, "GET", &format!("/workloads/ends?for=terminal&wait_ms={SOON_MS}"), None);
        plane.wait_for_end();
        let is_over = |workload: &Value| workload["state"] == "Failed" || workload["state"] == "Succeeded";
        assert!(told.is_none_or(|answer| !is_over(&answer.json())), "it was told before it was on disk, or over its own death");
        // Its agent knows; without it, what is on disk is all there is.
        agent.kill();
        plane.again();
        let alone = plane.workload("ends");
        assert_eq!(is_over(&alone), is_after, "{alone}");
        assert_eq!(alone["status"]["exit_code"], if is_after { json!(3) } else { Value::Null }, "{alone}");
        agent.again();
        plane.wait_until_ready();
        let ended = plane.ended("ends");
        let (state, status) = agent.status("ends");
        assert_eq!(
            (state, status.exit_code, status.finished_at.map(|at| at.to_string())),
            (State::Failed, Some(3), text(&ended["status"]["finished_at"]))
        );
        assert_eq!((&ended["status"]["exit_code"], &ended["status"]["reason"]), (&json!(3), &json!("Error")), "{ended}");
        assert!(!is_after || ended["status"]["finished_at"] == alone["status"]["finished_at"], "{alone}, then {ended}");
        assert_eq!(starts(place), 1);
    });
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// Posts, stops and deletes, one workload after the other, with a control plane that dies at its first, second, .. commit, whatever
/// that is of, and has the next one make the best of it; how many deaths there were.
fn die_at_each_commit(failpoint: &str) -> usize {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&sleeper(&place, "witness"));
    let witness = plane.workload("witness")["status"]["container_id"].clone();
    for pass in 0..100 {
        let (id, at) = (unique(), format!("{failpoint}@{pass}"));
        let (workload, path) = (sleeper(&place, &id), format!("/workloads/{id}"));
        place.forget_calls();
        plane.kill();
        // It may die before it serves, or before it knows its node.
        let ready =
            |plane: &Plane<'_>| try_ask(plane.address, "GET", "/nodes", None).is_some_and(|a| a.json()["items"][0]["ready"] == true);
        let serves = plane.try_again_to_die_at(&at)
            && eventually(&at, SOON_MS, || if plane.has_died() { Some(false) } else { ready(&plane).then_some(true) });
        let steps = [
            ("POST", format!("/workloads?wait_ms={SOON_MS}"), Some(&workload)),
            ("POST", format!("{path}/stop"), None),
            ("DELETE", path.clone(), None),
        ];
        let answers = steps.iter().filter(|_| serves).map_while(|(method, target, body)| try_ask(plane.address, method, target, *body));
        let answers: Vec<Answer> = answers.inspect(|answer| assert!(answer.status < 300, "{at}: {}", answer.text())).collect();
        let is_over = answers.len() == steps.len();
        let is_gone = |plane: &Plane<'_>| try_ask(plane.address, "GET", &path, None).is_some_and(|answer| answer.status == 404);
        let mut has_died = !is_over;
        if is_over {
            until(&at, || {
                has_died = plane.has_died();
                has_died || is_gone(&plane)
            });
        }
        if !has_died {
            // What it has still to write may be its end, too.
            plane.signal("TERM");
        }
        let code = if plane.is_started() { plane.wait_for_end().code() } else { None };
        plane.again();
        plane.wait_until_ready();
        if code == Some(0) {
            return pass;
        }
        assert_eq!(plane.workload("witness")["status"]["container_id"], witness, "{at}");
        let now = plane.get(&path);
        // What was answered for is so, and what was not is so or not.
        let ran = answers.first().map(|answer| answer.json()["status"]["container_id"].clone());
        match answers.len() {
            0 => {
                let status = plane.post("/workloads", &workload).status;
                assert_eq!(status, if now.status == 404 { 201 } else { 200 }, "{at}");
                until(&at, || plane.workload(&id)["state"] == "Running");
            }
            1 => {
                let now = now.json();
                assert_eq!(Some(&now["status"]["container_id"]), ran.as_ref(), "{at}: {now}");
                assert!(now["state"] == "Running" || now["status"]["reason"] == "Stopped", "{at}: {now}");
            }
            2 => until(&at, || {
                let now = plane.get(&path);
                now.status == 404 || now.json()["status"]["reason"] == "Stopped"
            }),
            _ => until(&at, || is_gone(&plane)),
        }
        assert!(matches!(plane.ask("DELETE", &path, None).status, 202 | 404), "{at}");
        until(&at, || is_gone(&plane));
        until("there too", || agent.list().len() == 1 && place.sandboxes_of(&id).is_empty());
        assert_eq!(starts(&place), 1, "{at}");
    }
    panic!("{failpoint}: no end after 100 passes")
}

#[test]
fn a_death_at_any_commit_keeps_what_was_answered_for() {
    thread::scope(|scope| {
        for failpoint in ["control_plane-store-before", "control_plane-store-after"] {
            scope.spawn(move || {
                let passes = die_at_each_commit(failpoint);
                println!("{failpoint}: the control plane died at {passes} commits");
                assert!(passes > 2, "{failpoint} was hardly passed");
            });
        }
    });
}

#[test]
fn a_death_over_the_making_of_a_store_is_made_good() {
    for failpoint in ["control_plane-store-before", "control_plane-store-after"] {
        let place = Place::sim(&[]);
        let mut dying = command(PLANE);
        dying.env("KAKURI_DIE_AT", failpoint).arg("--data-dir").arg(place.dir.join("plane"));
        let died = dying.args(["--listen", "127.0.0.1:0", "--until-eof"]).stdin(Stdio::null()).output().expect("its end");
        assert_eq!(died.status.code(), None, "{failpoint}: {died:?}");
        let plane = Plane::start_now(&place, &[], &[]);
        assert_eq!(plane.get("/workloads").json()["items"], json!([]), "{failpoint}");
    }
}

/// kill -9, and SIGTERM, while many clients post: the store's commits, the agent's starts and the answers are cut through anywhere.
#[test]
fn what_was_acknowledged_under_load_is_there() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    let (mut asked, acknowledged) = (0, Mutex::new(Vec::new()));
    for (round, signal) in ["KILL", "TERM", "KILL"].into_iter().enumerate() {
        thread::scope(|scope| {
            let (address, acknowledged) = (plane.address, &acknowledged);
            for client in 0..4 {
                let work = (0..5).map(|i| format!("w{round}-{client}-{i}")).map(|id| (sleeper(&place, &id), id));
                let work: Vec<(Value, String)> = work.collect();
                scope.spawn(move || {
                    for (workload, id) in work {
                        let answer = try_ask(address, "POST", "/workloads", Some(&workload));
                        if answer.is_some_and(|answer| answer.status == 201) {
                            acknowledged.lock().expect("no panic").push(id);
                        }
                    }
                });
            }
            let before = acknowledged.lock().expect("no panic").len();
            until("some are acknowledged", || acknowledged.lock().expect("no panic").len() >= before + 6);
            plane.signal(signal);
        });
        asked += 20;
        assert_eq!(plane.wait_for_end().code(), (signal == "TERM").then_some(0), "{signal}");
        plane.again();
        plane.wait_until_ready();
    }
    let acknowledged = acknowledged.into_inner().expect("no panic");
    let listed = plane.get("/workloads?limit=500").json();
    let ids: Vec<&str> = listed["items"].as_array().expect("items").iter().filter_map(|item| item["id"].as_str()).collect();
    for id in &acknowledged {
        assert!(ids.contains(&id.as_str()), "{id} was acknowledged and is not there");
    }
    assert!(ids.len() <= asked);
    until("all that is there runs", || {
        plane.get("/workloads?limit=500&state=Running").json()["items"].as_array().is_some_and(|items| items.len() == ids.len())
    });
    assert_eq!((agent.list().len(), place.sandboxes().len(), starts(&place)), (ids.len(), ids.len(), ids.len()), "each once");
}

#[test]
fn a_stop_keeps_all_and_the_next_goes_on() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&sleeper(&place, "a"));
    let revision = plane.get("/workloads").json()["revision"].as_u64().expect("a revision");
    let before = plane.workload("a");
    plane.terminate();
    plane.again();
    plane.wait_until_ready();
    let after = plane.workload("a");
    assert_eq!((&after["state"], &after["status"]["created_at"]), (&before["state"], &before["status"]["created_at"]));
    assert!(plane.get("/workloads").json()["revision"].as_u64().expect("a revision") >= revision);
    // What happened before is not kept, and who asks for it hears that.
    assert_eq!(plane.get(&format!("/events?since={revision}")).problem(), (410, "events_gone".into()));
    assert_eq!(starts(&place), 1);
}

#[test]
fn an_end_that_nobody_saw_is_learnt_and_a_deletion_finished() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&with(place.workload("ends", &["sh", "-c", "sleep 0.7; exit 3"]), json!({"stop_grace_ms": 0})));
    plane.run(&sleeper(&place, "goes"));
    agent.kill();
    assert_eq!(plane.ask("DELETE", "/workloads/goes", None).status, 202);
    plane.kill();
    agent.again();
    agent.ended("ends");
    plane.again();
    plane.wait_until_ready();
    assert_eq!(plane.ended("ends")["status"]["exit_code"], 3);
    until("it is gone", || is_gone(&plane, "goes"));
    until("there too", || place.sandboxes_of("goes").is_empty());
}

#[test]
fn what_ended_long_ago_makes_room() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &["--history", "2"]);
    for id in ["a", "b", "c", "d"] {
        plane.run(&place.workload(id, &["true"]));
        plane.ended(id);
    }
    until("two are left", || plane.get("/workloads").json()["items"].as_array().is_some_and(|items| items.len() == 2));
    until("there too", || agent.list().len() == 2);
    assert!(!is_gone(&plane, "c") && !is_gone(&plane, "d"), "those that ended last");
}

fn run(data: &Path, flags: &[&str], input: &[u8]) -> Output {
    let mut command = command(PLANE);
    command.arg("--data-dir").arg(data).args(["--listen", "127.0.0.1:0"]).args(flags);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    child.stdin.take().expect("a pipe").write_all(input).expect("read");
    child.wait_with_output().expect("its end")
}

fn said(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_data_directory_has_one_control_plane() {
    let place = Place::sim(&[]);
    let plane = Plane::start_now(&place, &[], &[]);
    for flags in [&["--until-eof"][..], &["--export"], &["--import"]] {
        let (code, text) = said(&run(&plane.data_dir(), flags, b""));
        let expect = if flags == ["--import"] { "is there already" } else { "is in use: another control plane" };
        assert!(code == Some(1) && text.contains(expect), "{code:?} {text}");
    }
}

#[test]
fn a_store_goes_out_and_in() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&with(sleeper(&place, "a"), json!({"env": {"PASSWORD": "secret"}})));
    plane.terminate();
    let out = run(&plane.data_dir(), &["--export"], b"");
    assert!(out.status.success() && said(&out).1.contains("exported 1 workloads; the values of their env are in the lines"), "{out:?}");
    assert_eq!(String::from_utf8_lossy(&out.stdout).lines().count(), 3);
    let (code, text) = said(&run(&place.dir.join("other"), &["--import"], &out.stdout[1..]));
    assert!(code == Some(1) && text.contains("nothing was imported") && text.contains("line 1: body: not JSON"), "{text}");

    // A damaged store is refused, and the way out is the one that the refusal names.
    let file = plane.data_dir().join("store.redb");
    let bytes = std::fs::read(&file).expect("a store");
    std::fs::write(&file, &bytes[..bytes.len() / 2]).expect("written");
    let (code, text) = said(&run(&plane.data_dir(), &["--until-eof"], b""));
    assert!(code == Some(1) && text.contains("store.redb is damaged") && text.contains("--import < FILE"), "{text}");
    std::fs::rename(&file, place.dir.join("damaged")).expect("moved");
    assert_eq!(said(&run(&plane.data_dir(), &["--import"], &out.stdout)).0, Some(0));
    plane.again();
    plane.wait_until_ready();
    assert_eq!(plane.workload("a")["state"], "Running");

    // Without its store it begins empty, and leaves alone what runs.
    plane.terminate();
    std::fs::rename(plane.data_dir(), place.dir.join("away")).expect("moved");
    plane.again();
    plane.wait_until_ready();
    let strangers = || plane.get("/nodes").json()["items"][0]["strangers"].clone();
    until("it is a stranger now", || strangers() == json!(1));
    assert!(is_gone(&plane, "a"));
    assert_eq!(agent.status("a").0, State::Running);
    // Asked for in the same words it is adopted. The agent has seen higher numbers than this new store has.
    assert_eq!(plane.post("/workloads?wait_ms=5000", &with(sleeper(&place, "a"), json!({"env": {"PASSWORD": "secret"}}))).status, 201);
    assert_eq!(plane.workload("a")["state"], "Running");
    assert_eq!(starts(&place), 1);
    plane.delete("a");
    until("nothing is left", || agent.list().is_empty() && strangers() == json!(0));
}

/// Needs root, for a file system of its own that is small.
#[test]
fn a_full_disk_refuses_new_work_and_loses_nothing() {
    if !can_mount() {
        return skip(Need::Mounts, "a mount namespace takes root");
    }
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.terminate();
    let data = plane.data_dir();
    std::fs::remove_dir_all(&data).expect("removed");
    std::fs::create_dir(&data).expect("made");
    let mut command = command("unshare");
    let script = r#"mount -t tmpfs -o size=6m,mode=700 tmpfs "$1" && shift && exec "$@""#;
    command.args(["-m", "sh", "-c", script, "sh"]).arg(&data).arg(PLANE);
    plane.again_as(command);
    plane.wait_until_ready();
    plane.run(&sleeper(&place, "kept"));
    // Its file system as this process sees it.
    let inside = PathBuf::from(format!("/proc/{}/root", plane.daemon().pid())).join(data.strip_prefix("/").expect("absolute"));
    let filler = inside.join("filler");
    let fill = || {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(&filler).expect("a file");
        while file.write_all(&[7; 4096]).is_ok() {}
    };
    fill();
    // Pages of the store that are free take some more; large workloads use them up.
    let large = |id: &str| with(sleeper(&place, id), json!({"env": {"A": "x".repeat(30_000), "B": "x".repeat(30_000)}}));
    let refused = eventually("a POST is refused", SOON_MS, || {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let id = format!("full-{}", NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        fill();
        let answer = plane.post("/workloads", &large(&id));
        (answer.status != 201).then(|| (id, answer.problem(), answer.text().to_owned()))
    });
    let (id, problem, text) = refused;
    assert_eq!(problem, (507, "disk_full".into()), "{text}");
    assert!(text.contains("nothing was changed") && !text.contains("store.redb"), "{text}");
    assert!(is_gone(&plane, &id));
    assert!(agent.list().iter().all(|object| object.spec["id"] != id.as_str()), "it was not sent");
    assert_eq!(plane.workload("kept")["state"], "Running");
    let readyz = plane.get("/readyz");
    assert!(readyz.status == 503 && readyz.text().contains("[-]store"), "{}", readyz.text());
    assert_eq!(plane.ask("PATCH", "/workloads/kept", Some(&json!({"labels": {"x": "y"}}))).status, 507);
    assert_eq!(plane.workload("kept")["labels"], json!({"app": "kept"}));

    std::fs::remove_file(&filler).expect("removed");
    until("it takes work again", || plane.post("/workloads", &large(&id)).status == 201);
    until("it is ready", || plane.get("/readyz").status == 200);
    until("it runs", || plane.workload(&id)["state"] == "Running");
    assert_eq!(starts(&place), agent.list().len());
    assert_eq!(place.sandboxes_of(&id).len(), 1);
}

#[test]
fn an_agent_replaces_labels_as_told() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    let before = agent.run(&sleeper(&place, "a"));
    let mut watch = agent.line();
    watch.tell(&json!({"type": "Watch"}));
    // Up to the end of the list of what there is.
    while !matches!(watch.reply_or_heartbeat(), Reply::Heartbeat { .. }) {}
    let update = |id: &str, labels: Value| agent.ask(&json!({"type": "UpdateWorkload", "id": id, "labels": labels}));
    for _ in 0..2 {
        let (state, status) = expect_status(update("a", json!({"tier": "web"})));
        assert_eq!((state, &status.container_id), (State::Running, &before.container_id), "nothing that runs is touched");
    }
    assert_eq!(agent.list()[0].spec["labels"], json!({"tier": "web"}));
    // The watch tells the one change there was.
    let told = std::iter::from_fn(|| watch.next()).find_map(|reply| match reply {
        Reply::Event(event) if event.event == EventKind::Modified => Some(event.object.spec["labels"].clone()),
        _ => None,
    });
    assert_eq!(told, Some(json!({"tier": "web"})));
    // It is the same workload under its present labels, and another under those of before.
    let now = with(sleeper(&place, "a"), json!({"labels": {"tier": "web"}}));
    assert_eq!(agent.settle(&now).0, State::Running);
    let error = expect_error(agent.ask(&json!({"type": "StartWorkload", "workload": sleeper(&place, "a")})));
    assert_eq!(error.code, ErrorCode::AlreadyExists);
    assert_eq!(expect_error(update("b", json!({}))).code, ErrorCode::NotFound);
    for bad in [Value::Null, json!([]), json!({"a": 1}), json!({"a b": "x"})] {
        assert_eq!(expect_error(update("a", bad.clone())).code, ErrorCode::InvalidArgument, "{bad}");
    }
    drop(watch);
    agent.kill();
    agent.again();
    assert_eq!(agent.list()[0].spec["labels"], json!({"tier": "web"}), "what it answered for it remembers");
    let update = |id: &str, labels: Value| agent.ask(&json!({"type": "UpdateWorkload", "id": id, "labels": labels}));
    assert_eq!(expect_status(update("a", json!({}))).0, State::Running);
    assert_eq!(agent.list()[0].spec.get("labels"), None);
}

#[test]
fn the_command_line_labels_and_follows() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&sleeper(&place, "a"));
    let kakuri = |words: &[&str]| {
        let output = command(CLI).args(["--server", &plane.url()]).args(words).output().expect("started");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let revision = plane.get("/workloads").json()["revision"].to_string();
    assert_eq!(kakuri(&["label", "a", "tier=web", "app-"]), (Some(0), "a\n".into(), String::new()));
    assert_eq!(plane.workload("a")["labels"], json!({"tier": "web"}));
    let (code, _, err) = kakuri(&["label", "a", "no label=x"]);
    assert!(code == Some(2) && err.contains("/labels/no label"), "{err}");
    for wrong in [&["label"][..], &["label", "a"], &["label", "a", "x"], &["label", "a", "x=1", "x-"]] {
        assert_eq!(kakuri(wrong).0, Some(2), "{wrong:?}");
    }
    let follow = |words: &[&str]| {
        let mut child = command(CLI).args(["--server", &plane.url()]).args(words).stdout(Stdio::piped()).spawn().expect("started");
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().expect("a pipe")));
        let found = lines.by_ref().map_while(Result::ok).find(|line| line.contains("MODIFIED"));
        child.kill().expect("it follows");
        child.wait().expect("a child of ours");
        found.expect("a change")
    };
    let line = follow(&["events", "--since", &revision, "--id", "a"]);
    assert!(line.contains("  MODIFIED  a  Running  -"), "{line}");
    let line: Value = serde_json::from_str(&follow(&["events", "--since", &revision, "-o", "json"])).expect("JSON");
    assert_eq!((&line["event"], &line["object"]["id"]), (&json!("MODIFIED"), &json!("a")));
    let (code, _, err) = kakuri(&["events", "--since", "999999999"]);
    assert!(code == Some(3) && err.contains("list again"), "{err}");
}
