//! A gRPC client that is not ours, Python's, against the simulator: what we believe of the protocol is not only our own belief.

use std::path::Path;
use std::process::Command;

use crate::harness::daemon::command;
use crate::harness::{Need, Place, skip};

/// A Python that speaks gRPC and can compile a `.proto`.
fn python() -> Option<String> {
    let candidates = std::env::var("KAKURI_TEST_PYTHON").ok().into_iter().chain(["python3".to_owned()]);
    let has = |python: &String, code: &str| Command::new(python).args(["-c", code]).output().is_ok_and(|output| output.status.success());
    let speaks = |python: &String| has(python, "import grpc, google.protobuf");
    let compiles = |python: &String| has(python, "import grpc_tools") || Command::new("protoc").arg("--version").output().is_ok();
    candidates.filter(speaks).find(compiles)
}

#[test]
fn a_client_that_is_not_ours_understands_the_simulator() {
    let Some(python) = python() else {
        return skip(Need::Python, "no Python with grpcio, protobuf and grpc_tools or protoc (KAKURI_TEST_PYTHON)");
    };
    let place = Place::sim(&[]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/grpcio_client.py");
    let output = command(&python)
        .arg(script)
        .arg(place.endpoint())
        .env("KAKURI_FAULT_FILE", place.dir.join("faults"))
        .env("TMPDIR", place.dir.join(""))
        .output()
        .expect("it runs");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    let checks =
        out.trim().rsplit('\n').next().and_then(|last| last.strip_prefix("grpcio: ")?.strip_suffix(" checks passed")?.parse::<u32>().ok());
    assert!(checks.is_some_and(|checks| checks > 30), "{out}{err}");
}
