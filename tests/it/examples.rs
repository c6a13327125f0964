//! Everything that a reader may copy works: each file in `examples/`, and what the README shows.

use std::fs;
use std::path::{Path, PathBuf};

use kakuri::wire::agent::Request;
use serde_json::{Value, json};

use crate::harness::daemon::{AGENT, PLANE, command};
use crate::harness::{Place, Plane, SOON_MS};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("a README")
}

#[test]
fn every_example_works() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let plane = Plane::start(&place, &[&agent], &[]);
    let mut files: Vec<PathBuf> = fs::read_dir(root().join("examples")).expect("examples").flatten().map(|entry| entry.path()).collect();
    files.sort();
    for path in &files {
        let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8");
        let check = |program: &str| {
            let mut check = command(program);
            check.arg("--config").arg(path).arg("--check-config").env("HOME", place.dir.join(""));
            let output = check.output().expect("it runs");
            assert_eq!(String::from_utf8_lossy(&output.stdout), "config ok\n", "{name}: {}", String::from_utf8_lossy(&output.stderr));
        };
        match name {
            "agent.toml" => check(AGENT),
            "control-plane.toml" => check(PLANE),
            _ if name.starts_with("workload") && name.ends_with(".json") => {
                let text = fs::read_to_string(path).expect("a file");
                let workload: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
                let answer = plane.post(&format!("/workloads?wait_ms={SOON_MS}"), &workload);
                assert_eq!((answer.status, answer.json()["state"].clone()), (201, json!("Running")), "{name}: {}", answer.text());
            }
            _ => panic!("examples/{name}: no test knows how to run it"),
        }
    }
    assert!(files.len() >= 4, "{files:?}");
}

#[test]
fn what_the_readme_says_to_an_agent_is_understood() {
    let readme = readme();
    let requests = [
        "StartWorkload",
        "GetStatus",
        "StopWorkload",
        "DeleteWorkload",
        "ListWorkloads",
        "GetNode",
        "GetLogs",
        "Exec",
        "Watch",
        "Ping",
        "CollectImages",
    ];
    let mut shown = 0;
    for line in readme.lines().filter(|line| requests.iter().any(|kind| line.starts_with(&format!("{{\"type\":\"{kind}\"")))) {
        let received = Request::parse(line.as_bytes());
        assert!(received.request.is_ok(), "{line}: {:?}", received.request);
        shown += 1;
    }
    assert!(shown >= 3, "the README shows {shown} requests");
    for kind in requests {
        assert!(readme.contains(&format!("`{kind}`")), "the README does not name {kind}");
    }
}

#[test]
fn the_workload_of_the_readme_is_one() {
    let readme = readme();
    let body = readme.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a workload in the README");
    let parsed = kakuri::wire::json::parse(body.as_bytes()).and_then(kakuri::wire::workload::draft);
    assert!(parsed.is_ok(), "{body}: {parsed:?}");
}

#[test]
fn every_path_the_readme_names_is_there() {
    let readme = readme();
    // Words in code that look like files of this repository.
    let is_path = |word: &&str| ["scripts/", "examples/", "src/", "tests/", "proto/"].iter().any(|dir| word.starts_with(dir));
    let words = readme.split(|c: char| c.is_whitespace() || "`()[],;|'\"@".contains(c)).filter(is_path);
    let mut seen = 0;
    for word in words {
        let path = word.trim_end_matches(['.', ':']);
        assert!(root().join(path).exists(), "the README names {path}, which is not there");
        seen += 1;
    }
    assert!(seen > 3, "{seen} paths");
}
