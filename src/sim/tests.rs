//! Our client against the simulator over a real socket: every fault, and the life of a container.

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use prost::Message;

use super::{Fault, Options, Sim};
use crate::cri::proto as p;
use crate::deadline::{Deadline, Stopwatch};
use crate::grpc::{Channel, Code, Error, ErrorKind, Method};
use crate::limits;

const VERSION: Method = Method { path: "/runtime.v1.RuntimeService/Version", idempotent: true };
/// As if calling it twice did harm.
const VERSION_ONCE: Method = Method { idempotent: false, ..VERSION };
const EVENTS: Method = Method { path: "/runtime.v1.RuntimeService/GetContainerEvents", idempotent: true };

fn soon() -> Deadline {
    Deadline::within_ms(10_000, "test")
}

/// A simulator, a client, and a directory that goes with them.
struct Rig {
    dir: PathBuf,
    options: Options,
    sim: Option<Sim>,
    channel: Channel,
}

impl Rig {
    fn start(faults: &[&str]) -> Self {
        static RIGS: AtomicU64 = AtomicU64::new(0);
        let dir = std::env::temp_dir().join(format!("kakuri-sim-{}-{}", std::process::id(), RIGS.fetch_add(1, Ordering::SeqCst)));
        fs::create_dir_all(&dir).expect("a directory");
        let faults = faults.iter().map(|spec| Fault::parse(spec).expect("a fault")).collect();
        let options = Options {
            faults,
            fault_file: Some(dir.join("faults")),
            call_log: Some(dir.join("calls")),
            state_file: Some(dir.join("state")),
            ..Options::default()
        };
        let mut rig = Self { channel: Channel::new(dir.join("s")), dir, options, sim: None };
        rig.restart();
        rig
    }

    /// Stops the simulator, if it runs, and starts it again.
    fn restart(&mut self) {
        if let Some(sim) = self.sim.take() {
            sim.stop();
        }
        self.sim = Some(Sim::start(&self.dir.join("s"), self.options.clone()).expect("started"));
    }

    fn faults(&self, text: &str) {
        fs::write(self.dir.join("new"), text).expect("written");
        fs::rename(self.dir.join("new"), self.dir.join("faults")).expect("renamed");
    }

    fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.dir.join("calls")).expect("a log").lines().map(str::to_owned).collect()
    }

    fn version(&self, method: Method) -> Result<usize, Error> {
        self.channel.unary(method, &[], soon()).map(|answer| answer.len())
    }

    fn call<A: Message + Default>(&self, name: &str, request: &impl Message) -> Result<A, Error> {
        let service = if name.contains("Image") { "ImageService" } else { "RuntimeService" };
        let path = Box::leak(format!("/runtime.v1.{service}/{name}").into_boxed_str());
        let answer = self.channel.unary(Method { path, idempotent: false }, &request.encode_to_vec(), soon())?;
        Ok(A::decode(answer.as_slice()).expect("a message"))
    }

    fn sandbox(&self, name: &str, handler: &str) -> String {
        let metadata = p::PodSandboxMetadata { name: name.into(), uid: "u".into(), namespace: "n".into(), attempt: 0 };
        let log_directory = self.dir.join("logs").display().to_string();
        let config = Some(p::PodSandboxConfig { metadata: Some(metadata), log_directory, ..Default::default() });
        let request = p::RunPodSandboxRequest { config, runtime_handler: handler.into() };
        self.call::<p::RunPodSandboxResponse>("RunPodSandbox", &request).expect("a sandbox").pod_sandbox_id
    }

    fn create(&self, sandbox: &str, image: &str, command: &[&str]) -> Result<String, Error> {
        let config = p::ContainerConfig {
            metadata: Some(p::ContainerMetadata { name: command.join(" "), attempt: 0 }),
            image: Some(p::ImageSpec { image: image.into(), ..Default::default() }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path: "0.log".into(),
            ..Default::default()
        };
        let request = p::CreateContainerRequest { pod_sandbox_id: sandbox.into(), config: Some(config), sandbox_config: None };
        self.call::<p::CreateContainerResponse>("CreateContainer", &request).map(|answer| answer.container_id)
    }

    fn begin(&self, id: &str) -> Result<p::StartContainerResponse, Error> {
        self.call("StartContainer", &p::StartContainerRequest { container_id: id.into() })
    }

    fn started(&self, sandbox: &str, command: &[&str]) -> String {
        let id = self.create(sandbox, "localhost/busybox:1.35", command).expect("created");
        self.begin(&id).expect("started");
        id
    }

    fn status(&self, id: &str) -> p::ContainerStatus {
        let request = p::ContainerStatusRequest { container_id: id.into(), verbose: false };
        self.call::<p::ContainerStatusResponse>("ContainerStatus", &request).expect("known").status.expect("a status")
    }

    /// The status of a container that has ended, as soon as it has.
    fn ended(&self, id: &str) -> p::ContainerStatus {
        let deadline = soon();
        loop {
            let status = self.status(id);
            if status.state() == p::ContainerState::ContainerExited {
                return status;
            }
            deadline.left().expect("ended in time");
            std::thread::yield_now();
        }
    }

    fn stop(&self, id: &str, timeout: i64) {
        self.call::<p::StopContainerResponse>("StopContainer", &p::StopContainerRequest { container_id: id.into(), timeout })
            .expect("stopped");
    }

    fn exec(&self, id: &str, cmd: &[&str], timeout: i64) -> Result<(String, String, i32), Error> {
        let cmd = cmd.iter().map(|word| (*word).to_owned()).collect();
        let answer: p::ExecSyncResponse = self.call("ExecSync", &p::ExecSyncRequest { container_id: id.into(), cmd, timeout })?;
        let text = |bytes| String::from_utf8(bytes).expect("text");
        Ok((text(answer.stdout), text(answer.stderr), answer.exit_code))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(sim) = self.sim.take() {
            sim.stop();
        }
        let _ = fs::remove_dir_all(&self.dir); // What is left is in the way of nobody.
    }
}

fn message_of<T: std::fmt::Debug>(result: Result<T, Error>) -> (Code, String) {
    match result.expect_err("an error").kind {
        ErrorKind::Status(status) => (status.code, status.message),
        other => panic!("no status: {other:?}"),
    }
}

#[test]
fn a_unary_call_is_answered() {
    let rig = Rig::start(&[]);
    let answer: p::VersionResponse = rig.call("Version", &p::VersionRequest::default()).expect("answered");
    assert_eq!((answer.runtime_name.as_str(), answer.runtime_api_version.as_str()), ("kakuri-cri-sim", "v1"));
    assert_eq!(rig.calls(), ["Version OK"]);
}

#[test]
fn an_error_without_a_body_keeps_its_words() {
    let rig = Rig::start(&["Version:error=NOT_FOUND,隔離 is 100% off"]);
    assert_eq!(message_of(rig.version(VERSION)), (Code::NotFound, "隔離 is 100% off".into()));
    rig.faults("Status:error-after=12,later");
    assert_eq!(message_of(rig.call::<p::StatusResponse>("Status", &p::StatusRequest::default())), (Code::Unimplemented, "later".into()));
    let method = Method { path: "/runtime.v1.RuntimeService/Nope", idempotent: true };
    let unknown = (Code::Unimplemented, "unknown method Nope for service runtime.v1.RuntimeService".into());
    assert_eq!(message_of(rig.channel.unary(method, &[], soon())), unknown);
}

#[test]
fn large_answers_arrive_whole_and_giant_ones_do_not() {
    let rig = Rig::start(&["Version:big=12582912*1@1", "Version:giant*1@2"]);
    let small = rig.version(VERSION).expect("answered");
    let large = rig.version(VERSION).expect("answered");
    assert!(large > small + (12 << 20), "{large}");
    let giant = rig.version(VERSION).expect_err("too large");
    assert!(matches!(giant.kind, ErrorKind::TooLarge { bytes } if bytes == 17 << 20), "{giant}");
    assert!(giant.is_in_doubt());
    assert_eq!(rig.version(VERSION).expect("answered"), small);
}

#[test]
fn a_large_request_arrives_whole() {
    let rig = Rig::start(&[]);
    let request = p::VersionRequest { version: "x".repeat(limits::GRPC_MESSAGE_BYTES_MAX - 100) };
    assert!(rig.call::<p::VersionResponse>("Version", &request).is_ok());
}

#[test]
fn answers_that_are_none_are_named_so() {
    let check = |fault: &str, rule: &str| {
        let rig = Rig::start(&[&format!("Version:{fault}*1")]);
        let error = rig.version(VERSION_ONCE).expect_err(fault);
        assert!(matches!(error.kind, ErrorKind::Protocol(seen) if seen.contains(rule)), "{fault}: {error}");
        assert!(error.is_in_doubt());
        assert!(rig.version(VERSION_ONCE).is_ok(), "{fault}: the next call");
        assert_eq!(rig.calls().len(), 2, "{fault}");
    };
    check("no-status", "no grpc-status");
    check("compressed", "compressed");
    let rig = Rig::start(&["Version:http=503*1"]);
    let error = rig.version(VERSION_ONCE).expect_err("no gRPC server");
    assert_eq!(error.code(), Some(Code::Unavailable), "{error}");
    let rig = Rig::start(&["Version:malformed"]);
    let answer = rig.channel.unary(VERSION, &[], soon()).expect("bytes");
    assert!(p::VersionResponse::decode(answer.as_slice()).is_err());
}

#[test]
fn a_hanging_call_ends_at_its_deadline_and_names_the_phase() {
    let rig = Rig::start(&["Version:hang*1", "Version:hang-after*1@1"]);
    for call in 1..=2 {
        let watch = Stopwatch::start();
        let error = rig.channel.unary(VERSION, &[], Deadline::within_ms(200, "test")).expect_err("no answer");
        // Either clock may be the first to notice.
        let is_ours = matches!(error.kind, ErrorKind::Expired(expired) if expired.phase == "answer");
        assert!(is_ours || error.code() == Some(Code::DeadlineExceeded), "{error}");
        assert!(error.is_in_doubt() && (199..2000).contains(&watch.elapsed_ms()), "{} ms", watch.elapsed_ms());
        assert_eq!(rig.calls().len(), call, "a call that hangs is logged when it begins to");
    }
    assert!(rig.version(VERSION).is_ok());
    assert_eq!(rig.calls(), ["Version hang", "Version hang", "Version OK"]);
}

#[test]
fn the_log_of_calls_says_what_was_named_and_what_became_of_it() {
    let rig = Rig::start(&["RunPodSandbox:error=UNKNOWN,x*1"]);
    let metadata = Some(p::PodSandboxMetadata { name: "a b".into(), uid: "u".into(), namespace: "n".into(), attempt: 2 });
    let config = Some(p::PodSandboxConfig { metadata, ..Default::default() });
    let request = p::RunPodSandboxRequest { config, runtime_handler: "kata".into() };
    assert!(rig.call::<p::RunPodSandboxResponse>("RunPodSandbox", &request).is_err());
    let id = rig.call::<p::RunPodSandboxResponse>("RunPodSandbox", &request).expect("a sandbox").pod_sandbox_id;
    assert!(rig.exec("nope\n", &["true"], 1).is_err());
    let expect = [
        r"RunPodSandbox Unknown name=a\u{20}b_n_u_2 handler=kata".to_owned(),
        format!(r"RunPodSandbox OK name=a\u{{20}}b_n_u_2 handler=kata sandbox={id}"),
        r"ExecSync NotFound container=nope\n".to_owned(),
    ];
    assert_eq!(rig.calls(), expect);
}

#[test]
fn a_delayed_answer_is_late_and_right() {
    let rig = Rig::start(&["Version:delay=50*1", "Version:delay-after=50*1"]);
    let watch = Stopwatch::start();
    assert!(rig.version(VERSION).is_ok());
    assert!(watch.elapsed_ms() >= 100);
}

#[test]
fn a_broken_call_is_repeated_only_if_that_does_no_harm() {
    let check = |fault: &str, method: Method, is_ok: bool, calls: &[&str]| {
        let rig = Rig::start(&[fault]);
        let result = rig.version(method);
        assert_eq!(result.is_ok(), is_ok, "{fault}: {result:?}");
        if let Err(error) = result {
            assert!(error.is_in_doubt() && matches!(error.kind, ErrorKind::Broken(_)), "{fault}: {error}");
        }
        assert_eq!(rig.calls(), calls, "{fault}");
        assert!(rig.version(VERSION_ONCE).is_ok() || fault == "Version:drop", "{fault}: the next call");
    };
    check("Version:drop*1", VERSION, true, &["Version drop", "Version OK"]);
    check("Version:drop*1", VERSION_ONCE, false, &["Version drop"]);
    check("Version:drop-after*1", VERSION, true, &["Version drop", "Version OK"]);
    check("Version:drop-after*1", VERSION_ONCE, false, &["Version drop"]);
    check("Version:drop", VERSION, false, &["Version drop", "Version drop", "Version drop"]);
    check("Version:rst=REFUSED_STREAM*1", VERSION_ONCE, true, &["Version rst=7", "Version OK"]);
    check("Version:rst=2*1", VERSION_ONCE, false, &["Version rst=2"]);
    check("Version:rst=2*1", VERSION, true, &["Version rst=2", "Version OK"]);
    check("Version:rst-after=CANCEL*1", VERSION_ONCE, false, &["Version rst=8"]);
}

#[test]
fn a_connection_that_ended_while_idle_costs_no_call() {
    let mut rig = Rig::start(&[]);
    assert!(rig.version(VERSION_ONCE).is_ok());
    rig.restart();
    assert!(rig.version(VERSION_ONCE).is_ok());
    assert_eq!(rig.calls().len(), 2);
    rig.sim.take().expect("runs").stop();
    let error = rig.version(VERSION).expect_err("nobody there");
    assert!(matches!(error.kind, ErrorKind::Connect(_)) && !error.is_in_doubt(), "{error}");
}

#[test]
fn after_goaway_the_next_call_works() {
    let rig = Rig::start(&["Version:goaway*3"]);
    for _ in 0..5 {
        assert!(rig.version(VERSION_ONCE).is_ok());
    }
    assert_eq!(rig.calls(), ["Version OK"; 5]);
}

#[test]
fn a_request_that_goaway_says_was_not_processed_is_repeated() {
    let dir = std::env::temp_dir().join(format!("kakuri-goaway-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    let listener = std::os::unix::net::UnixListener::bind(dir.join("s")).expect("a socket");
    let server = std::thread::spawn(move || {
        // SETTINGS, and once a request is there GOAWAY with last stream 0 and NO_ERROR; on three connections.
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().expect("a client");
            stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).expect("written");
            let mut seen = Vec::new();
            // Preface, SETTINGS and WINDOW_UPDATE are shorter than this; the request is not.
            while seen.len() < 150 {
                let mut buffer = [0; 4096];
                let n = stream.read(&mut buffer).expect("read");
                seen.extend_from_slice(&buffer[..n]);
            }
            stream.write_all(&[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).expect("written");
        }
    });
    let error = Channel::new(dir.join("s")).unary(VERSION_ONCE, &[], soon()).expect_err("three times refused");
    server.join().expect("three connections");
    assert!(matches!(error.kind, ErrorKind::Broken(_)), "{error}");
    fs::remove_dir_all(&dir).expect("removed");
}

#[test]
fn sixteen_threads_share_a_channel() {
    let rig = Rig::start(&["Version:delay=1"]);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| (0..50).for_each(|_| assert!(rig.version(VERSION_ONCE).is_ok())));
        }
    });
    assert_eq!(rig.calls().len(), 16 * 50);
}

#[test]
fn a_stream_brings_a_thousand_events_in_order() {
    let rig = Rig::start(&[]);
    let mut events = rig.channel.stream(EVENTS, &[], soon()).expect("a stream");
    let deadline = soon();
    while rig.calls().is_empty() {
        deadline.left().expect("subscribed in time");
        std::thread::yield_now();
    }
    let mut expect = Vec::new();
    for n in 0..250 {
        let id = rig.sandbox(&format!("s{n}"), "runc");
        rig.call::<p::RemovePodSandboxResponse>("RemovePodSandbox", &p::RemovePodSandboxRequest { pod_sandbox_id: id.clone() })
            .expect("removed");
        expect.extend([0, 1, 2, 3].map(|kind| (id.clone(), kind)));
    }
    let mut seen = Vec::new();
    while seen.len() < 1000 {
        let event = events.next(soon()).expect("an event").expect("no end");
        let event = p::ContainerEventResponse::decode(event.as_slice()).expect("a message");
        seen.push((event.container_id, event.container_event_type));
    }
    assert_eq!(seen, expect);
    let error = events.next(Deadline::within_ms(20, "test")).expect_err("no more");
    assert!(matches!(error.kind, ErrorKind::Expired(_)), "{error}");
    rig.sandbox("one more", "runc");
    assert!(events.next(soon()).expect("an event").is_some());
    drop(rig);
    assert!(std::iter::from_fn(|| events.next(soon()).transpose()).any(|event| event.is_err()));
}

#[test]
fn without_events_the_stream_says_so() {
    let mut rig = Rig::start(&[]);
    rig.options.has_events = false;
    rig.restart();
    let mut events = rig.channel.stream(EVENTS, &[], soon()).expect("a stream");
    assert_eq!(message_of(events.next(soon())).0, Code::Unimplemented);
}

#[test]
fn a_container_runs_logs_and_ends() {
    let rig = Rig::start(&[]);
    let sandbox = rig.sandbox("a", "gvisor");
    let id = rig.started(&sandbox, &["sh", "-c", "echo out; echo err >&2; uname -r; sleep 0.05; exit 3"]);
    let status = rig.ended(&id);
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    assert_eq!(status.finished_at - status.started_at, 50_003_000, "50 ms, and a microsecond a line");
    let log = fs::read_to_string(&status.log_path).expect("a log");
    let lines: Vec<_> = log.lines().map(|line| line.split_once(' ').expect("a time").1).collect();
    assert_eq!(lines, ["stdout F out", "stderr F err", "stdout F 4.4.0"]);
    let check = |command: &[&str], code: i32, reason: &str| {
        let status = rig.ended(&rig.started(&sandbox, command));
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{command:?}");
    };
    check(&["true"], 0, "Completed");
    check(&["oom"], 137, "OOMKilled");
    check(&["spam", "100000"], 0, "Completed");
    assert!(fs::metadata(&status.log_path).expect("a log").len() > 100_000);
}

#[test]
fn stopping_is_polite_unless_it_is_not() {
    let rig = Rig::start(&[]);
    let sandbox = rig.sandbox("a", "runc");
    let check = |command: &[&str], timeout: i64, code: i32, ms: std::ops::Range<u64>| {
        let id = rig.started(&sandbox, command);
        let watch = Stopwatch::start();
        rig.stop(&id, timeout);
        assert!(ms.contains(&watch.elapsed_ms()), "{command:?}: {} ms", watch.elapsed_ms());
        assert_eq!(rig.status(&id).exit_code, code, "{command:?}");
        rig.stop(&id, timeout);
        rig.call::<p::RemoveContainerResponse>("RemoveContainer", &p::RemoveContainerRequest { container_id: id }).expect("removed");
    };
    check(&["sleep", "60"], 10, 143, 0..900);
    check(&["sleep", "60"], 0, 137, 0..900);
    check(&["trap"], 1, 137, 999..5000);
    check(&["trap"], 0, 137, 0..900);
}

#[test]
fn exec_answers_as_the_handler_and_the_image_do() {
    let rig = Rig::start(&["kernel=kata:9.9"]);
    let exec = |handler: &str, cmd: &[&str]| {
        let sandbox = rig.sandbox(&format!("{handler} {}", cmd.join(" ")), handler);
        rig.exec(&rig.started(&sandbox, &[]), cmd, 10).expect("ran")
    };
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux");
    assert_eq!(exec("", &["uname", "-r"]).0, host);
    assert_eq!(exec("edera", &["uname", "-r"]).0, "6.16.0-zone\n");
    assert_eq!(exec("kata", &["cat", "/proc/sys/kernel/osrelease"]).0, "9.9\n");
    assert_eq!(exec("runc", &["sh", "-c", "echo a; echo b >&2; exit 4"]), ("a\n".into(), "b\n".into(), 4));
    assert_eq!(exec("runc", &["spam", "3000000"]).0.len(), 3_000_000);

    let sandbox = rig.sandbox("a", "runc");
    let id = rig.started(&sandbox, &[]);
    let (code, words) = message_of(rig.exec(&id, &["missing-binary"], 5));
    assert!(code == Code::Unknown && words.contains(r#"exec: "missing-binary": executable file not found in $PATH"#), "{words}");
    let (code, words) = message_of(rig.exec(&id, &["sleep", "60"], 1));
    assert!(code == Code::DeadlineExceeded && words.contains("timeout 1s exceeded"), "{words}");
    rig.call::<p::PullImageResponse>("PullImage", &pull("registry.test/scratch:1", "")).expect("pulled");
    let id = rig.create(&sandbox, "registry.test/scratch:1", &["trap"]).expect("created");
    assert!(message_of(rig.exec(&id, &["uname", "-r"], 5)).1.contains("CONTAINER_CREATED"));
    rig.begin(&id).expect("started");
    assert!(message_of(rig.exec(&id, &["uname", "-r"], 5)).1.contains("executable file not found"));
    rig.stop(&id, 0);
    assert!(message_of(rig.exec(&id, &["true"], 5)).1.contains("CONTAINER_EXITED"));
}

fn pull(image: &str, password: &str) -> p::PullImageRequest {
    let auth = Some(p::AuthConfig { username: "u".into(), password: password.into(), ..Default::default() });
    p::PullImageRequest { image: Some(p::ImageSpec { image: image.into(), ..Default::default() }), auth, sandbox_config: None }
}

#[test]
fn the_name_of_an_image_says_how_its_pull_goes() {
    let rig = Rig::start(&[]);
    let try_pull = |image: &str, password: &str| rig.call::<p::PullImageResponse>("PullImage", &pull(image, password));
    let check = |image: &str, password: &str, words: &str| {
        let (code, message) = message_of(try_pull(image, password));
        assert!(code == Code::Unknown && message.starts_with("failed to pull and unpack image") && message.contains(words), "{message}");
    };
    check("r.test/not-found:1", "", "r.test/not-found:1: not found");
    check("r.test/unauthorized:1", "", "authorization failed");
    check("r.test/unauthorized:1", "wrong", "401 Unauthorized");
    check("r.test/unreachable:1", "", "connection refused");
    check("r.test/disk-full:1", "", "no space left on device");
    assert!(try_pull("r.test/unauthorized:1", "right").is_ok());
    let watch = Stopwatch::start();
    let digest = try_pull("slow-50", "").expect("pulled").image_ref;
    assert!(watch.elapsed_ms() >= 50 && digest.len() == 71 && digest.starts_with("sha256:"));
    assert_eq!(try_pull("docker.io/library/slow-50:latest", "").expect("pulled").image_ref, digest, "the same name, completed");
    let status = |image: &str| {
        let image = Some(p::ImageSpec { image: image.into(), ..Default::default() });
        rig.call::<p::ImageStatusResponse>("ImageStatus", &p::ImageStatusRequest { image, verbose: false }).expect("answered").image
    };
    assert_eq!(status(&digest).expect("there").repo_tags, ["docker.io/library/slow-50:latest"]);
    assert!(status("nope").is_none() && status("localhost/busybox:1.35").is_some());
    let image = Some(p::ImageSpec { image: "slow-50".into(), ..Default::default() });
    rig.call::<p::RemoveImageResponse>("RemoveImage", &p::RemoveImageRequest { image }).expect("removed");
    assert!(status(&digest).is_none());
}

#[test]
fn status_lists_handlers_as_either_containerd_does() {
    let mut rig = Rig::start(&["unready=NetworkReady"]);
    let status = |rig: &Rig| rig.call::<p::StatusResponse>("Status", &p::StatusRequest { verbose: true }).expect("answered");
    let answer = status(&rig);
    let names: Vec<_> = answer.runtime_handlers.iter().map(|h| h.name.as_str()).collect();
    assert_eq!(names, ["runc", "gvisor", "kata", "edera", ""]);
    let ready: Vec<_> = answer.status.expect("a status").conditions.into_iter().map(|c| (c.r#type, c.status)).collect();
    assert_eq!(ready, [("RuntimeReady".into(), true), ("NetworkReady".into(), false)]);
    rig.options.lists_handlers = false;
    rig.options.handlers = vec!["runc".into(), "kata-qemu".into()];
    rig.restart();
    let answer = status(&rig);
    assert!(answer.runtime_handlers.is_empty());
    let config: serde_json::Value = serde_json::from_str(&answer.info["config"]).expect("JSON");
    let runtimes = config["containerd"]["runtimes"].as_object().expect("an object");
    assert_eq!(runtimes.keys().collect::<Vec<_>>(), ["kata-qemu", "runc"]);
}

#[test]
fn a_lie_changes_what_is_reported_and_nothing_else() {
    let rig = Rig::start(&[]);
    let id = rig.sandbox("a", "edera");
    let handler = |rig: &Rig| {
        let request = p::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
        let status: p::PodSandboxStatusResponse = rig.call("PodSandboxStatus", &request).expect("known");
        let list: p::ListPodSandboxResponse = rig.call("ListPodSandbox", &p::ListPodSandboxRequest::default()).expect("a list");
        (status.status.expect("a status").runtime_handler, list.items[0].runtime_handler.clone())
    };
    assert_eq!(handler(&rig), ("edera".into(), "edera".into()));
    rig.faults("lie=runc\n");
    assert_eq!(handler(&rig), ("runc".into(), "runc".into()));
    rig.faults("");
    assert_eq!(handler(&rig), ("edera".into(), "edera".into()));
}

#[test]
fn containers_go_on_while_the_simulator_is_away() {
    let mut rig = Rig::start(&[]);
    let sandbox = rig.sandbox("a", "runc");
    let forever = rig.started(&sandbox, &["sh", "-c", "echo up; trap"]);
    let short = rig.started(&sandbox, &["sh", "-c", "sleep 0.3; echo done; exit 5"]);
    let before = rig.status(&short);
    assert_eq!(before.state(), p::ContainerState::ContainerRunning);
    rig.restart();
    assert_eq!(rig.status(&forever).state(), p::ContainerState::ContainerRunning);
    let after = rig.ended(&short);
    assert_eq!((after.exit_code, after.started_at), (5, before.started_at));
    assert_eq!(after.finished_at - after.started_at, 300_001_000, "by the clock on the wall, whoever looked");
    let log = fs::read_to_string(&after.log_path).expect("a log");
    assert_eq!(log.lines().filter(|line| line.ends_with(" up")).count(), 1, "{log}");
    assert_eq!(log.lines().filter(|line| line.ends_with(" done")).count(), 1, "{log}");
    rig.options.state_file = None;
    rig.restart();
    let list: p::ListContainersResponse = rig.call("ListContainers", &p::ListContainersRequest::default()).expect("a list");
    assert!(list.containers.is_empty(), "without a state file a restart is a reboot");
}

#[test]
fn logs_are_reopened_by_name() {
    let rig = Rig::start(&[]);
    let sandbox = rig.sandbox("a", "runc");
    let id = rig.started(&sandbox, &["sh", "-c", "echo before; sleep 0.3; echo after"]);
    let path = PathBuf::from(rig.status(&id).log_path);
    let deadline = soon();
    while fs::metadata(&path).map_or(0, |meta| meta.len()) == 0 {
        deadline.left().expect("a line in time");
    }
    fs::rename(&path, path.with_extension("1")).expect("renamed");
    rig.call::<p::ReopenContainerLogResponse>("ReopenContainerLog", &p::ReopenContainerLogRequest { container_id: id.clone() })
        .expect("reopened");
    rig.ended(&id);
    let text = |path: PathBuf| fs::read_to_string(path).expect("a log");
    assert!(text(path.with_extension("1")).ends_with(" before\n") && text(path).ends_with(" after\n"));
}
