//! Logs within their bounds: rotated while they are read, capped, and dropped before they fill a disk. Every line is a number, so
//! that a test sees which are missing, and which came twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use kakuri::wire::agent::{LogLine, Reply};
use kakuri::workload::State;
use serde_json::{Value, json};

use crate::harness::agent::read_logs;
use crate::harness::daemon::{CLI, command};
use crate::harness::place::with;
use crate::harness::{Agent, Line, Place, Plane, brief, eventually, until};

scenarios! {
    every_line_is_read_once_across_rotations
    a_log_stays_within_its_bounds
    all_logs_together_stay_within_their_bound
    an_agent_that_dies_in_a_rotation_loses_nothing
}

/// A command that writes the numbers from 1 to `rounds` x `lines`, pausing after each round, and then stays or leaves.
fn counting(rounds: u32, lines: u32, pause: &str, end: &str) -> String {
    let round = |n: u32| format!("seq {} {}; sleep {pause}; ", n * lines + 1, (n + 1) * lines);
    (0..rounds).map(round).collect::<String>() + end
}

/// Says again and again that the counting is over: what is said once may be dropped like anything else.
fn end() -> String {
    "echo 1000000; sleep 0.3; ".repeat(200) + "sleep 1000"
}

fn count(place: &Place, id: &str, command: &str) -> Value {
    with(place.workload(id, &["sh", "-c", command]), json!({"stop_grace_ms": 0}))
}

fn follow(agent: &Agent<'_>, id: &str, more: Value) -> Line {
    let mut line = agent.line();
    line.tell(&with(json!({"type": "GetLogs", "id": id, "follow": true}), more));
    line
}

#[track_caller]
fn number(line: &LogLine) -> u32 {
    line.line.parse().unwrap_or_else(|_| panic!("no number: {}", brief(line)))
}

/// All of them, each once and in order, and nothing said to be missing.
#[track_caller]
fn assert_counts(lines: &[LogLine], first: u32, last: u32) {
    let mut next = first;
    for line in lines {
        assert_eq!((number(line), line.gap), (next, false), "{}", brief(line));
        next += 1;
    }
    assert_eq!(next, last + 1, "{} lines", lines.len());
}

/// The next line; a follower that is told nothing but that its agent lives would wait for ever.
#[track_caller]
fn next_line(follower: &mut Line) -> LogLine {
    for _ in 0..4 {
        match follower.reply_or_heartbeat() {
            Reply::Heartbeat { .. } => {}
            Reply::Log(line) => return line,
            other => panic!("{}", brief(&other)),
        }
    }
    panic!("no line for the time of four heartbeats");
}

/// Follows until the number 1000000 comes: none may come twice, and none be missing without a word. A runtime may cut a line in two
/// where it opens a new file; so the first line behind a gap may be half of one. What was gone before it began nobody owes a follower.
#[track_caller]
fn assert_order(follower: &mut Line, mut see: impl FnMut(u32)) {
    let (mut last, mut is_after_gap) = (0, true);
    while last != 1_000_000 {
        let line = next_line(follower);
        let n = number(&line);
        see(n);
        if line.gap && n != 1_000_000 {
            is_after_gap = true;
            continue;
        }
        assert!(n > last, "{n} after {last}");
        let is_next = n == last + 1 || n == 1_000_000;
        assert!(is_next || is_after_gap, "{last} is followed by {n}, and nobody says that something is missing");
        (last, is_after_gap) = (n, false);
    }
}

/// The workload's files, and their sizes.
fn files(agent_dir: &Path, id: &str) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for dir in fs::read_dir(agent_dir.join("logs")).into_iter().flatten().flatten() {
        if dir.file_name().to_string_lossy().split('.').next() != Some(id) {
            continue;
        }
        for file in fs::read_dir(dir.path()).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            // It may be renamed meanwhile; then the next look sees it.
            found.extend(file.metadata().ok().filter(|_| !name.starts_with('.')).map(|metadata| (name, metadata.len())));
        }
    }
    found.sort();
    found
}

fn bytes(files: &[(String, u64)]) -> u64 {
    files.iter().map(|(_, bytes)| bytes).sum()
}

fn is_rotated(files: &[(String, u64)]) -> bool {
    files.iter().any(|(name, _)| name.starts_with("0.log."))
}

/// More files than this test fills, so that nothing is removed, however slowly it is read.
const KEEP_ALL: [&str; 6] = ["--log-file-kb", "16", "--log-files", "64", "--log-check-ms", "20"];

fn every_line_is_read_once_across_rotations(place: &Place) {
    const LAST: u32 = 40 * 400;
    let agent = place.agent(&KEEP_ALL);
    let dir = place.dir.join("agent");
    agent.run(&count(place, "wl-1", &counting(40, 400, "0.05", "true")));
    let mut from_start = follow(&agent, "wl-1", json!({}));
    let reader = thread::spawn(move || read_logs(&mut from_start));
    until("the first rotation", || is_rotated(&files(&dir, "wl-1")));
    let mut from_now = follow(&agent, "wl-1", json!({"tail": 1}));
    assert_counts(&reader.join().expect("a reader"), 1, LAST);
    let later = read_logs(&mut from_now);
    assert_counts(&later, later.first().map_or(0, number), LAST);

    agent.ended("wl-1");
    let found = files(&dir, "wl-1");
    assert!(found.len() >= 5, "{found:?}");
    // It ended, and all of it is there until it is deleted.
    let all = agent.logs(json!({"id": "wl-1"}));
    assert_counts(&all, 1, LAST);
    assert_counts(&agent.logs(json!({"id": "wl-1", "tail": 3000})), LAST - 2999, LAST);
    assert_eq!(agent.logs(json!({"id": "wl-1", "stream": "stderr"})), []);
    let status = agent.status("wl-1").1;
    let middle = status.started_at.zip(status.finished_at).map(|(start, end)| start.plus_ms((end.as_millis() - start.as_millis()) / 2));
    let recent = agent.logs(json!({"id": "wl-1", "since": middle.expect("it ran and ended").to_string()}));
    assert!(!recent.is_empty() && recent.len() < all.len(), "{} of {}", recent.len(), all.len());
    assert_counts(&recent, number(&recent[0]), LAST);
    agent.delete("wl-1");
    assert_eq!(files(&dir, "wl-1"), []);
}

fn a_log_stays_within_its_bounds(place: &Place) {
    const FILE: u64 = 16 << 10;
    let agent = place.agent(&["--log-file-kb", "16", "--log-files", "3", "--log-check-ms", "20"]);
    let dir = place.dir.join("agent");
    agent.run(&count(place, "wl-1", &counting(50, 500, "0.05", &end())));
    let mut follower = follow(&agent, "wl-1", json!({}));
    let mut last = 0;
    let mut most = 0;
    while last != 1_000_000 {
        match follower.reply() {
            Reply::Log(line) => {
                let n = number(&line);
                assert!(n > last, "{n} after {last}");
                assert!(
                    n == last + 1 || n == 1_000_000 || line.gap,
                    "{last} is followed by {n}, and nobody says that something is missing"
                );
                if n % 1000 == 0 {
                    most = most.max(bytes(&files(&dir, "wl-1")));
                }
                last = n;
            }
            other => panic!("{}", brief(&other)),
        }
    }
    let found = eventually("the log is small", crate::harness::SOON_MS, || {
        let found = files(&dir, "wl-1");
        (bytes(&found) <= 4 * FILE).then_some(found)
    });
    // Three, and maybe the last that was rotated, emptied.
    assert!(found.len() <= 4 && is_rotated(&found), "{found:?}");
    println!("at most {} KiB of about 1100, bound {} KiB", most >> 10, (4 * FILE) >> 10);
    assert_eq!(agent.logs(json!({"id": "wl-1", "tail": 1})).first().map(number), Some(1_000_000));
    assert_eq!(agent.status("wl-1").0, State::Running);
}

fn all_logs_together_stay_within_their_bound(place: &Place) {
    let flags = ["--log-file-kb", "128", "--log-files", "10", "--log-total-mb", "1", "--log-check-ms", "20"];
    let agent = place.agent(&flags);
    let dir = place.dir.join("agent");
    let ids = ["wl-1", "wl-2", "wl-3"];
    for id in ids {
        agent.run(&count(place, id, &counting(6, 4000, "0.1", &end())));
    }
    let is_done = |id: &&str| agent.logs(json!({"id": id, "tail": 1})).first().is_some_and(|line| line.line == "1000000");
    until("all has been written", || ids.iter().all(is_done));
    let total = || ids.iter().map(|id| bytes(&files(&dir, id))).sum::<u64>();
    until("all logs together are small", || total() <= 1 << 20);
    let space = agent.node().conditions.into_iter().find(|c| c.r#type == "DiskSpace").expect("a condition");
    assert!(space.ok && space.message.contains("dropped"), "{space:?}");
    for id in ids {
        let lines = agent.logs(json!({"id": id}));
        // A line behind a gap may be half of one.
        let is_in_order = |a: &LogLine, b: &LogLine| a.gap || b.gap || number(a) < number(b) || number(b) == 1_000_000;
        assert!(lines.iter().zip(&lines[1..]).all(|(a, b)| is_in_order(a, b)), "{id}");
    }
}

fn an_agent_that_dies_in_a_rotation_loses_nothing(place: &Place) {
    for die_at in ["agent-log-rename-before@1", "agent-log-rename-after@1", "agent-log-reopen-after@1"] {
        let mut agent = place.agent_to_die(&KEEP_ALL, die_at);
        agent.run(&count(place, "wl-1", &counting(8, 400, "0.1", "sleep 1; seq 3201 4000")));
        assert_eq!(agent.wait_for_end(crate::harness::SOON_MS), None, "{die_at}");
        agent.again();
        let mut follower = follow(&agent, "wl-1", json!({}));
        assert_counts(&read_logs(&mut follower), 1, 4000);
        assert_counts(&agent.logs(json!({"id": "wl-1"})), 1, 4000);
        let found = files(&place.dir.join("agent"), "wl-1");
        assert!(found.len() >= 4, "{die_at}: {found:?}");
        agent.delete("wl-1");
    }
}

#[test]
fn a_runtime_that_opens_no_file_anew_is_asked_again() {
    let place = Place::sim(&[]);
    let agent = place.agent(&["--log-file-kb", "16", "--log-files", "3", "--log-check-ms", "20"]);
    let dir = place.dir.join("agent");
    place.faults(&["ReopenContainerLog:error=UNAVAILABLE,not now"]);
    agent.run(&count(&place, "wl-1", &counting(20, 1000, "0.05", &end())));
    let mut follower = follow(&agent, "wl-1", json!({}));
    until("it was asked", || place.count("ReopenContainerLog") > 0);
    until("it was asked again", || place.count("ReopenContainerLog") > 1);
    let found = files(&dir, "wl-1");
    // The second number where the first look at it emptied it: the hole tells later readers.
    let found: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert!(found == ["0.log.1"] || found == ["0.log.2"], "the runtime goes on there: {found:?}");
    until("all has been written", || agent.logs(json!({"id": "wl-1", "tail": 1})).first().is_some_and(|line| line.line == "1000000"));
    // It cannot be rotated, and is emptied instead: the bound holds.
    until("the log is small", || bytes(&files(&dir, "wl-1")) <= 4 * (16 << 10));
    place.faults(&[]);
    until("the runtime opened a new file", || files(&dir, "wl-1").iter().any(|(name, _)| name == "0.log"));
    assert_order(&mut follower, |_| {});
    assert_eq!(agent.status("wl-1").0, State::Running);
}

/// The directory of a workload's log.
#[track_caller]
fn log_dir(place: &Place, id: &str) -> PathBuf {
    let dirs = fs::read_dir(place.dir.join("agent/logs")).expect("there").flatten().map(|entry| entry.path());
    dirs.into_iter().find(|dir| dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&format!("{id}.")))).expect("a log")
}

/// Reads on to the end of the log; whether something is missing before that.
#[track_caller]
fn read_to_end(follower: &mut Line) -> bool {
    let mut quiet = 0;
    while quiet < 4 {
        match follower.reply_or_heartbeat() {
            Reply::Heartbeat { .. } => quiet += 1,
            Reply::Log(_) => quiet = 0,
            Reply::LogEnd { gap, .. } => return gap,
            other => panic!("{}", brief(&other)),
        }
    }
    panic!("no end for the time of four heartbeats");
}

#[test]
fn a_slow_follower_of_what_was_deleted_does_not_go_on_with_the_next_of_its_name() {
    let place = Place::sim(&[]);
    // A Unix socket takes little before its reader is waited for.
    let agent = place.agent(&["--listen", &format!("unix://{}", place.dir.join("agent.sock").display())]);
    agent.run(&count(&place, "wl-1", "spam 6000000; sleep 1000"));
    until("it wrote", || bytes(&files(&place.dir.join("agent"), "wl-1")) > 6_000_000);
    let mut follower = follow(&agent, "wl-1", json!({}));
    next_line(&mut follower);
    agent.delete("wl-1");
    agent.run(&count(&place, "wl-1", "echo other; sleep 1000"));
    assert!(read_to_end(&mut follower), "nobody says that something is missing");
    assert_eq!(agent.status("wl-1").0, State::Running);
}

#[test]
fn a_follower_that_read_all_misses_nothing_when_it_is_deleted() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    // Between two attempts nothing tells it of the end before it is gone.
    let slow = json!({"restart_policy": "always", "restart_backoff_ms": 3_600_000, "restart_backoff_max_ms": 3_600_000});
    agent.start_workload(&with(place.workload("wl-1", &["sh", "-c", "echo hello; exit 1"]), slow));
    let mut follower = follow(&agent, "wl-1", json!({}));
    assert_eq!(next_line(&mut follower).line, "hello");
    until("it waits", || agent.status("wl-1").0 == State::Pending);
    agent.delete("wl-1");
    assert!(!read_to_end(&mut follower), "nothing is missing");
}

#[test]
fn a_runtime_that_hangs_holds_up_no_bound() {
    let place = Place::sim(&[]);
    let flags = ["--log-file-kb", "64", "--log-files", "20", "--log-total-mb", "1", "--log-check-ms", "20"];
    let agent = place.agent(&flags);
    let dir = place.dir.join("agent");
    place.faults(&["ReopenContainerLog:hang"]);
    let ids = ["wl-1", "wl-2", "wl-3", "wl-4", "wl-5", "wl-6"];
    for id in ids {
        agent.run(&count(&place, id, "spam 500000; sleep 1000"));
    }
    until("a runtime is asked", || place.count("ReopenContainerLog") > 0);
    let total = || ids.iter().map(|id| bytes(&files(&dir, id))).sum::<u64>();
    until("all logs together are small", || total() <= 1 << 20);
    // One that was not answered stands for all of that runtime.
    until("it is asked again", || place.count("ReopenContainerLog") > 1);
    place.faults(&[]);
}

#[test]
fn the_longest_line_comes_whole_and_a_longer_one_in_pieces() {
    const TIME: &str = "2026-01-01T00:00:00.000000001Z";
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    // What takes most room in JSON.
    let longest = "\u{1}".repeat(kakuri::limits::LOG_LINE_BYTES_MAX);
    let records = |text: &str, end: char| format!("{TIME} stdout {end} {text}\n");
    let quarter = longest.split_at(longest.len() / 4).0;
    let all_but_one = quarter.split_at(quarter.len() - 1).0;
    let parts = records(quarter, 'P').repeat(3);
    let written = format!("{parts}{}{parts}{}{}", records(quarter, 'F'), records(quarter, 'P'), records("\u{1}", 'F'))
        + &format!("{parts}{}", records(all_but_one, 'F'));
    fs::write(log_dir(&place, "wl-1").join("0.log"), written).expect("written");
    let expect = [longest.as_str(), &longest, "\u{1}", longest.split_at(longest.len() - 1).0];
    let lines = agent.logs(json!({"id": "wl-1"}));
    assert_eq!(lines.iter().map(|line| line.line.len()).collect::<Vec<_>>(), expect.map(str::len));
    assert!(lines.iter().zip(expect).all(|(line, expect)| line.line == expect && !line.gap));
    let body = plane.get("/workloads/wl-1/logs");
    assert!(body.status == 200 && body.text() == expect.map(|line| format!("{line}\n")).concat());
    // A record that no runtime writes is left out, and that is said: by HTTP and by the command line with a line of its own.
    let endless = records(&"x".repeat(kakuri::limits::LOG_RECORD_BYTES_MAX), 'F');
    fs::write(log_dir(&place, "wl-1").join("0.log"), endless.clone() + &records("behind", 'F') + &endless).expect("written");
    let expect = "[kakuri: output is missing here]\nbehind\n[kakuri: output is missing here]\n";
    assert_eq!(plane.get("/workloads/wl-1/logs").text(), expect);
    let said = command(CLI).env("KAKURI_ADDR", plane.url()).args(["logs", "wl-1"]).output().expect("runs");
    assert_eq!(String::from_utf8_lossy(&said.stdout), expect);
}

#[test]
fn a_link_in_place_of_a_log_is_not_followed() {
    let place = Place::sim(&[]);
    let agent = place.agent(&["--log-check-ms", "20"]);
    let dir = place.dir.join("agent/logs");
    agent.run(&count(&place, "wl-1", "echo hello; sleep 1000"));
    until("it wrote", || agent.logs(json!({"id": "wl-1"})).len() == 1);
    let of_workload = fs::read_dir(&dir).expect("there").flatten().next().expect("a directory").path();
    let secret = place.dir.write("secret", "2026-01-01T00:00:00Z stdout F secret\n");
    fs::rename(of_workload.join("0.log"), of_workload.join("kept")).expect("renamed");
    std::os::unix::fs::symlink(&secret, of_workload.join("0.log")).expect("linked");
    assert_eq!(agent.logs(json!({"id": "wl-1"})), []);
    fs::rename(of_workload.join("kept"), of_workload.join("0.log")).expect("renamed");
    assert_eq!(agent.logs(json!({"id": "wl-1"})).len(), 1);
}

/// Set for the process that runs a test in a mount namespace of its own: its small disk.
const SMALL_DISK: &str = "KAKURI_TEST_SMALL_DISK";

#[test]
fn logs_stop_before_a_disk_is_full() {
    if let Some(disk) = std::env::var_os(SMALL_DISK) {
        return on_a_small_disk(&PathBuf::from(disk));
    }
    if !crate::harness::can_mount() {
        return crate::harness::skip(crate::harness::Need::Mounts, "a mount namespace takes root");
    }
    let dir = crate::harness::Dir::new();
    let disk = dir.join("disk");
    fs::create_dir(&disk).expect("made");
    let script = r#"mount -t tmpfs -o size=8m kakuri "$0" && exec "$@""#;
    let mut command = Command::new("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-c", script]).arg(&disk).arg(std::env::current_exe().expect("this"));
    command.args(["--exact", "logs::logs_stop_before_a_disk_is_full", "--nocapture"]).env(SMALL_DISK, &disk);
    let output = command.output().expect("started");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
}

fn on_a_small_disk(disk: &Path) {
    let place = Place::sim(&[]);
    let state = disk.join("state").display().to_string();
    let agent = place.agent(&["--state-dir", &state, "--log-reserve-mb", "3", "--log-check-ms", "20"]);
    let space = || agent.node().conditions.into_iter().find(|c| c.r#type == "DiskSpace").expect("a condition");
    assert!(space().ok, "{:?}", space());
    // Fifteen times a little more than a megabyte, on a disk of eight with three to be left free.
    let command = "spam 700000; sleep 0.2; ".repeat(15) + &"echo done; sleep 0.3; ".repeat(200) + "sleep 1000";
    agent.run(&count(&place, "wl-1", &command));
    let mut follower = follow(&agent, "wl-1", json!({}));
    let mut has_gap = false;
    loop {
        let line = next_line(&mut follower);
        has_gap |= line.gap;
        if line.line == "done" {
            break;
        }
    }
    println!("the follower missed something: {has_gap}");
    assert_eq!(agent.status("wl-1").0, State::Running);
    until("there is space", || space().ok);
    assert!(space().message.contains("dropped"), "{:?}", space());
    // The journal was never short of space, and could grow.
    let written = agent.node().conditions.into_iter().find(|c| c.r#type == "JournalWritable").expect("a condition");
    assert!(written.ok, "{written:?}");
    fs::write(disk.join("state/room"), vec![1; 2 << 20]).expect("there is room");
    fs::remove_file(disk.join("state/room")).expect("removed");

    // Somebody else fills the disk: the node says so, keeps what it can, and takes no work meanwhile.
    agent.run(&count(&place, "wl-2", "echo small; sleep 1000"));
    fs::write(disk.join("other"), vec![1; 6 << 20]).expect("there is room");
    until("the node is not ready", || !agent.node().ready && !space().ok);
    assert_eq!(agent.logs(json!({"id": "wl-2"})).len(), 1, "what is small stays");
    assert_eq!((agent.status("wl-1").0, agent.status("wl-2").0), (State::Running, State::Running));
    fs::remove_file(disk.join("other")).expect("removed");
    until("the node is ready", || agent.node().ready);
    agent.delete("wl-1");
    agent.delete("wl-2");
    assert_eq!(fs::read_dir(disk.join("state/logs")).expect("there").count(), 0);
}
