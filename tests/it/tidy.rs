//! The rules of the house that a machine can see: who may import whom, one door per crate, sizes, headers, and what the README
//! promises of threads and crates. Nothing about taste.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use kakuri::limits;
use serde_json::json;

use crate::harness::place::with;
use crate::harness::{Place, Plane, until};

/// A room and the rooms it may import. An arrow that is not here is a decision nobody took.
const ARROWS: [(&str, &[&str]); 19] = [
    ("failpoint", &[]),
    ("limits", &[]),
    ("metrics", &[]),
    ("deadline", &[]),
    ("report", &["deadline"]),
    ("workload", &["limits", "report"]),
    ("wire", &["deadline", "limits", "workload"]),
    ("net", &["deadline", "limits", "report"]),
    ("http", &["deadline", "limits", "net", "report"]),
    ("grpc", &["deadline", "limits", "net", "report"]),
    ("cri", &["deadline", "grpc", "limits", "net", "report", "workload"]),
    ("flags", &["workload"]),
    ("config", &["flags", "limits", "net", "report", "workload"]),
    ("daemon", &["limits", "net"]),
    ("agent", &["config", "cri", "daemon", "deadline", "failpoint", "flags", "grpc", "limits", "net", "report", "wire", "workload"]),
    (
        "control_plane",
        &["config", "daemon", "deadline", "failpoint", "flags", "http", "limits", "metrics", "net", "report", "wire", "workload"],
    ),
    ("sim", &["cri", "daemon", "deadline", "flags", "grpc", "limits", "net", "report", "workload"]),
    ("cli", &["config", "deadline", "flags", "limits", "net", "report", "workload"]),
    ("bin", &[]),
];

/// A crate and the files, or the beginnings of their paths, that may name it; tests excepted.
const DOORS: [(&str, &[&str]); 20] = [
    ("base64", &["agent/handlers.rs", "cli.rs", "control_plane/api/workloads.rs", "wire/docker.rs"]),
    ("bytes", &["grpc/", "sim/"]),
    ("crc32fast", &["wire/record.rs"]),
    ("crossbeam_channel", &["agent", "control_plane", "daemon.rs", "net/listen.rs", "sim/"]),
    ("env_logger", &["report.rs"]),
    ("getopts", &["flags.rs"]),
    ("h2", &["grpc", "sim/server.rs"]),
    ("http", &["grpc/call.rs", "sim/server.rs"]),
    ("httparse", &["http/parse.rs"]),
    ("humantime", &["deadline.rs", "sim/logs.rs"]),
    ("log", &[""]),
    ("prost", &["cri/", "sim/"]),
    ("redb", &["control_plane/store/disk.rs"]),
    (
        "rustix",
        &[
            "agent/images/",
            "agent/journal.rs",
            "agent/logs/files.rs",
            "control_plane/store/disk.rs",
            "daemon.rs",
            "deadline.rs",
            "net/stream.rs",
        ],
    ),
    ("serde", &["config", "wire/"]),
    ("serde_json", &["agent", "cli", "control_plane", "wire/"]),
    ("signal_hook", &["cli/play.rs", "daemon.rs"]),
    ("tokio", &["grpc/pump.rs"]),
    ("toml", &["config"]),
    ("ureq", &["cli/client.rs"]),
];

const LINES_MAX: usize = 1000;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below a folder of the repository: its path from there, and its text.
fn files(folder: &str) -> BTreeMap<String, String> {
    let base = root().join(folder);
    let mut found = BTreeMap::new();
    let mut folders = vec![base.clone()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.insert(name_of(&base, &path), fs::read_to_string(&path).expect("UTF-8"));
            }
        }
    }
    assert!(found.len() > 10 || folder != "src", "{} files", found.len());
    found
}

fn name_of(base: &Path, path: &Path) -> String {
    path.strip_prefix(base).unwrap_or(path).display().to_string()
}

/// The code of a file: no comments, and nothing from its `mod tests {` on.
fn code(text: &str) -> Vec<&str> {
    let all = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    all.take_while(|line| !line.starts_with("mod tests {") && !line.starts_with("pub(crate) mod tests {")).collect()
}

fn is_test(name: &str) -> bool {
    name.ends_with("tests.rs") || name.contains("/tests/")
}

/// The word after `prefix`, wherever that stands in a line and begins a word.
fn words_after<'a>(line: &'a str, prefix: &str) -> Vec<&'a str> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let found = line.match_indices(prefix).filter(|(at, _)| !line[..*at].ends_with(is_word));
    found.map(|(at, _)| line[at + prefix.len()..].split(|c: char| !is_word(c)).next().unwrap_or_default()).collect()
}

#[test]
fn arrows_point_where_the_house_says() {
    let allowed: BTreeMap<&str, BTreeSet<&str>> = ARROWS.iter().map(|(room, to)| (*room, to.iter().copied().collect())).collect();
    let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, text) in files("src") {
        let room = name.split(['/', '.']).next().unwrap_or_default().to_owned();
        if is_test(&name) || room == "lib" {
            continue;
        }
        let rooms = allowed.get(room.as_str()).unwrap_or_else(|| panic!("src/{name}: a room that is not in ARROWS"));
        for line in code(&text) {
            assert!(!line.contains("use crate::{"), "src/{name}: one import a room, so that this test sees them: {line}");
            for to in words_after(line, "crate::").into_iter().filter(|to| allowed.contains_key(to) && *to != room) {
                assert!(rooms.contains(to), "src/{name}: {room} may not import {to}: {line}");
                used.entry(room.clone()).or_default().insert(to.to_owned());
            }
        }
    }
    // What is allowed and not used any more is not allowed.
    for (room, to) in ARROWS {
        let used = used.get(room).cloned().unwrap_or_default();
        assert_eq!(to.iter().map(|to| (*to).to_owned()).collect::<BTreeSet<_>>(), used, "arrows of {room}");
    }
    // No way leads back.
    let mut done: BTreeSet<&str> = BTreeSet::new();
    while done.len() < ARROWS.len() {
        let next = ARROWS.iter().find(|(room, to)| !done.contains(room) && to.iter().all(|to| done.contains(to)));
        done.insert(next.unwrap_or_else(|| panic!("a circle of arrows beside {done:?}")).0);
    }
}

#[test]
fn a_crate_has_one_door() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("a manifest");
    let dependencies = manifest.split("[dependencies]").nth(1).and_then(|rest| rest.split("\n[").next()).expect("dependencies");
    let names: BTreeSet<String> =
        dependencies.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name.replace('-', "_")).collect();
    assert_eq!(names, DOORS.iter().map(|(name, _)| (*name).to_owned()).collect(), "a crate needs a door, and a door a crate");
    for line in dependencies.lines().filter(|line| line.contains(" = ")) {
        assert!(line.contains("default-features = false"), "{line}");
    }
    for (name, text) in files("src").into_iter().filter(|(name, _)| !is_test(name)) {
        for line in code(&text) {
            for (krate, doors) in DOORS {
                let path = format!("{krate}::");
                // `crate::http` is a room of ours, and a name in a longer path is not the crate either.
                let at =
                    line.match_indices(&path).find(|(at, _)| !line[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':'));
                let is_ours = krate == "http" && !line.starts_with("use http::");
                assert!(
                    at.is_none() || is_ours || doors.iter().any(|door| name.starts_with(door)),
                    "src/{name}: {krate} is not let in here: {line}"
                );
            }
        }
    }
}

#[test]
fn what_an_outsider_can_fill_is_in_two_places() {
    for (name, text) in files("src").into_iter().filter(|(name, _)| !is_test(name)) {
        let at_home = |homes: &[&str]| homes.iter().any(|home| name.starts_with(home));
        for line in code(&text) {
            assert!(!line.contains("Deserialize") || at_home(&["wire/", "config"]), "src/{name}: {line}");
            assert!(
                !line.contains("Instant::now(") && !line.contains("SystemTime::now(") || at_home(&["deadline.rs"]),
                "src/{name}: {line}"
            );
            assert!(!line.contains("to_socket_addrs") && !line.contains("ToSocketAddrs"), "src/{name}: nothing asks a resolver: {line}");
        }
    }
}

#[test]
fn files_are_short_and_say_what_they_are() {
    for folder in ["src", "tests"] {
        for (name, text) in files(folder) {
            let lines = text.lines().count();
            assert!(lines <= LINES_MAX, "{folder}/{name} has {lines} lines");
            assert!(text.starts_with("//! ") || is_test(&name), "{folder}/{name} does not begin with what it is");
        }
    }
    let bins: Vec<(String, String)> = files("src").into_iter().filter(|(name, _)| name.starts_with("bin/")).collect();
    assert_eq!(bins.len(), 4, "{bins:?}");
    for (name, text) in bins {
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("//!")).collect();
        assert!(lines.len() == 3 && lines[1].starts_with("    kakuri::") && lines[1].ends_with("::main()"), "src/{name}: {text}");
    }
}

#[test]
fn every_limit_limits_something() {
    let text = fs::read_to_string(root().join("src/limits.rs")).expect("limits");
    let names: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("pub const ")?.split(':').next()).collect();
    assert!(names.len() > 50, "{} limits", names.len());
    let rest: String = files("src").into_iter().filter(|(name, _)| name != "limits.rs" && !is_test(name)).map(|(_, text)| text).collect();
    for name in names {
        assert!(!words_after(&rest, name).is_empty(), "limits::{name} is used nowhere");
    }
}

/// Every place where a test lets a daemon die, by its name.
fn places_to_die() -> BTreeSet<String> {
    let mut places = BTreeSet::new();
    for (name, text) in files("src").into_iter().filter(|(name, _)| !is_test(name) && name != "failpoint.rs") {
        for line in code(&text) {
            let Some((_, place)) = line.split_once("failpoint::pass(") else { continue };
            if let Some(place) = place.strip_prefix('"').and_then(|rest| rest.split('"').next()) {
                places.insert(place.to_owned());
                continue;
            }
            // The one that is put together: of each kind of commit.
            let kinds = text.split("fn kinds(").nth(1).and_then(|rest| rest.split("\n}").next()).unwrap_or_default();
            let (before, after) =
                place.strip_prefix("&format!(\"").and_then(|rest| rest.split('"').next()?.split_once("{kind}")).unwrap_or_else(|| {
                    panic!("src/{name}: a name that this test cannot read: {line}");
                });
            places.extend(kinds.split('"').skip(1).step_by(2).map(|kind| format!("{before}{kind}{after}")));
        }
    }
    places
}

#[test]
fn every_place_to_die_is_died_at() {
    let places = places_to_die();
    assert!(places.len() > 20, "{places:?}");
    let tests: String = files("tests/it").into_iter().filter(|(name, _)| name != "tidy.rs").map(|(_, text)| text).collect();
    for place in &places {
        let stem = place.trim_end_matches("-before").trim_end_matches("-after");
        let is_armed = tests.contains(&format!("\"{place}\""))
            || tests.contains(&format!("\"{place}@"))
            || tests.contains(&format!("around(\"{stem}\""));
        assert!(is_armed, "no test lets a daemon die at {place}");
    }
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("a README")
}

/// The words in backticks of the README's row about a program's threads, and the numbers behind them.
fn threads_in_readme(program: &str) -> Vec<String> {
    let readme = readme();
    let section = readme.split("\n## Threads\n").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a section on threads");
    let row = section.lines().find(|line| line.starts_with(&format!("| `{program}` |"))).unwrap_or_else(|| panic!("no row for {program}"));
    row.split('`').skip(3).step_by(2).filter(|word| !word.starts_with("--")).map(str::to_owned).collect()
}

/// `agent-7` for `agent-N`, `node-a` for `node-NAME`; the kernel keeps 15 bytes of a name.
fn is_named(thread: &str, row: &str) -> bool {
    match (row.strip_suffix('N').filter(|start| start.ends_with('-')), row.strip_suffix("NAME")) {
        (Some(start), _) => thread.strip_prefix(start).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit())),
        (None, Some(start)) => thread.starts_with(start),
        (None, None) => thread == &row[..row.len().min(15)],
    }
}

#[test]
fn threads_are_those_of_the_readme() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.run(&with(place.workload("wl-1", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
    let mut http = plane.http();
    http.send(b"GET /workloads/wl-1/logs?follow HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(http.try_head().expect("a response").status, 200);
    until("both serve", || plane.connections() > 0 && agent.connections() > 0);
    for (program, threads) in [("kakuri-agent", agent.daemon().threads()), ("kakuri-control-plane", plane.daemon().threads())] {
        let rows = threads_in_readme(program);
        // The first thread has the name of the program.
        let is_main = |thread: &String| program.starts_with(thread.as_str());
        for thread in &threads {
            assert!(
                is_main(thread) || rows.iter().any(|row| is_named(thread, row)),
                "{program}: the README has no thread {thread:?}: {rows:?}"
            );
        }
        for row in rows.iter().filter(|row| *row != "main") {
            assert!(threads.iter().any(|thread| is_named(thread, row)), "{program}: no thread is called {row:?}: {threads:?}");
        }
    }
    let row = readme().lines().find(|line| line.starts_with("| `kakuri-agent` | `main`")).expect("a row").to_owned();
    for words in [
        format!("`agent-N` per connection (at most {})", limits::CONNECTIONS_MAX),
        format!("`start-N` ({})", limits::START_WORKERS_DEFAULT),
        format!("`end-N` ({})", limits::STOP_WORKERS_DEFAULT),
        format!("`pull-N` ({})", limits::PULLS_MAX_DEFAULT),
    ] {
        assert!(row.contains(&words), "{words:?} is not in {row}");
    }
    drop(http);
}

#[test]
fn crates_are_those_of_the_readme() {
    let readme = readme();
    let section = readme.split("\n## Dependencies\n").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a section on crates");
    let first_cells = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let named: BTreeSet<String> =
        first_cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(|name| name.replace('-', "_")).collect();
    for (krate, _) in DOORS {
        assert!(named.contains(krate), "the README does not say what {krate} is for: {named:?}");
    }
}
