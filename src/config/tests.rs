//! Each bad file, and what is said about it.

use super::*;
use std::sync::atomic::{AtomicU32, Ordering};

/// A file that is gone when this is.
struct TempFile(PathBuf);

impl TempFile {
    fn new(text: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kakuri-config-{}-{}.toml", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).expect("a temporary file");
        Self(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        // What is left in the temporary directory hurts nobody.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn nothing(_: &str) -> Option<String> {
    None
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn run<C>(parsed: Result<Parsed<C>, Error>) -> C {
    match parsed {
        Ok(Parsed::Run(config)) => config,
        Ok(Parsed::Special(text)) => panic!("{text}"),
        Err(error) => panic!("{error}"),
    }
}

fn agent_file(text: &str, flags: &[&str]) -> Result<Parsed<AgentConfig>, Error> {
    let file = TempFile::new(text);
    let mut args = words(&["--config", &file.0.display().to_string()]);
    args.extend(words(flags));
    agent_in(&args, nothing)
}

fn runtime_file(text: &str, flags: &[&str]) -> Result<Parsed<ControlPlaneConfig>, Error> {
    let file = TempFile::new(text);
    let mut args = words(&["--config", &file.0.display().to_string()]);
    args.extend(words(flags));
    control_plane_in(&args, nothing)
}

/// The problems as `LINE: RULE`, or `--flag: RULE`.
fn problems<C: fmt::Debug>(parsed: Result<Parsed<C>, Error>) -> Vec<String> {
    match parsed {
        Err(Error::Problems(problems)) => {
            let place = |origin: &str| origin.rsplit_once(".toml:").map_or(origin, |(_, line)| line).to_owned();
            problems.iter().map(|problem| format!("{}: {}", place(&problem.origin), problem.rule)).collect()
        }
        other => panic!("{other:?}"),
    }
}

const FULL: &str = r#"
node_id = "node-1"
listen = ["127.0.0.1:9001", "unix:///run/kakuri/agent.sock"]
cri_endpoint = "unix:///run/containerd/containerd.sock"
state_dir = "state"
log_level = "debug"
mount_roots = ["/srv/data"]
memory_mb = 2048
cpu_millicores = 4000
start_workers = 2
relist_ms = 500
log_file_kb = 64
log_files = 3
log_reserve_mb = 0

[labels]
zone = "a"

[runtime_classes.native]
handler = "runc"

[runtime_classes.edera-zone]
handler = "edera"
endpoint = "/var/lib/edera/protect/cri.socket"
start_timeout_ms = 30000
annotations = { "dev.edera/resource-policy" = "static" }
"#;

#[test]
fn a_full_file_is_read_whole() {
    let config = run(agent_file(FULL, &[]));
    assert_eq!(config.node_id.as_str(), "node-1");
    assert_eq!(config.listen.iter().map(ToString::to_string).collect::<Vec<_>>(), ["127.0.0.1:9001", "unix:///run/kakuri/agent.sock"]);
    assert_eq!(config.state_dir, std::env::temp_dir().join("state"));
    assert_eq!(config.log_dir, std::env::temp_dir().join("state/logs"));
    let logs = LogLimits { file_bytes: 65_536, files: 3, total_bytes: 4096 << 20, reserve_bytes: Some(0), check_ms: 500 };
    assert_eq!(config.logs, logs);
    assert_eq!(config.log_level, LevelFilter::Debug);
    assert_eq!((config.memory_mb, config.cpu_millicores, config.relist_ms), (Some(2048), Some(4000), Some(500)));
    assert_eq!((config.start_workers, config.stop_workers), (2, limits::STOP_WORKERS_DEFAULT));
    assert_eq!(config.labels.get("zone").map(String::as_str), Some("a"));
    let [edera, native] = config.classes.as_slice() else { panic!("{:?}", config.classes) };
    assert_eq!((edera.handler.as_str(), edera.own_kernel, edera.memory_mb_min, edera.start_timeout_ms), ("edera", true, 300, 30_000));
    assert_eq!(edera.annotations.len(), 1);
    assert_eq!((native.handler.as_str(), native.own_kernel), ("runc", false));
}

#[test]
fn flag_before_environment_before_file_before_default() {
    fn variables(name: &str) -> Option<String> {
        (name == "KAKURI_NODE_ID").then(|| "from-env".into())
    }
    let file = TempFile::new("node_id = \"from-file\"\nlisten = [\"127.0.0.1:1\"]\n");
    let path = file.0.display().to_string();
    let node_id = |args: &[&str], environment| run(agent_in(&words(args), environment)).node_id.as_str().to_owned();
    assert_eq!(node_id(&["--config", &path, "--node-id", "from-flag"], variables), "from-flag");
    assert_eq!(node_id(&["--config", &path], variables), "from-env");
    assert_eq!(node_id(&["--config", &path], nothing), "from-file");
    let config = run(agent_in(&words(&["--node-id", "n"]), nothing));
    assert_eq!(config.listen, [Address::parse("127.0.0.1:9000").expect("valid")]);
    let config = run(agent_in(&words(&["--config", &path, "--listen", "127.0.0.1:2"]), nothing));
    assert_eq!(config.listen, [Address::parse("127.0.0.1:2").expect("valid")]);
}

#[test]
fn every_bad_agent_file_is_explained_with_its_line() {
    let check = |text: &str, expect: &[&str]| {
        let found = problems(agent_file(&format!("node_id = \"n\"\n{text}"), &[]));
        assert_eq!(found.len(), expect.len(), "{text}: {found:?}");
        for (found, expect) in found.iter().zip(expect) {
            assert!(found.starts_with(expect), "{text}: {found} should be {expect}");
        }
    };
    check("nodeid = \"x\"", &["2: unknown field `nodeid`"]);
    check("listen = \"127.0.0.1:1\"", &["2: invalid type: string"]);
    check("\nlisten = [\"127.0.0.1\"]", &["3: address must be"]);
    check("listen = [\"0.0.0.0:9000\"]", &["2: other machines could reach 0.0.0.0:9000"]);
    check("memory_mb = -1", &["2: invalid value: integer `-1`"]);
    check("memory_mb = 0", &["2: must be a number from 1 to"]);
    check("relist_ms = 1", &["2: must be a number from 100"]);
    check("log_file_kb = 15", &["2: must be a number from 16"]);
    check("log_files = 0", &["2: must be a number from 1"]);
    check("log_files = 65", &["2: must be a number from 1 to 64"]);
    check("log_total_mb = 0", &["2: must be a number from 1"]);
    check("log_check_ms = 19", &["2: must be a number from 20"]);
    check("log_level = \"loud\"", &["2: must be one of error"]);
    check("cri_endpoint = \"tcp://x\"", &["2: unix socket path must be"]);
    check("mount_roots = [\"/\"]", &["2: a mount root must be"]);
    check("mount_roots = [\"/srv/../etc\"]", &["2: a mount root must be"]);
    check("mount_roots = [\"srv\"]", &["2: a mount root must be"]);
    check("[labels]\n\"\" = \"a\"", &["3: a label needs a key"]);
    check("[labels]\nzone = \"rack 1\"", &["3: key and value must be at most 128 of A-Z"]);
    check("[runtime_classes.Bad]\nhandler = \"x\"", &["2: name must be"]);
    check("[runtime_classes.a]\nhandler = \"\"", &["3: handler must be 1 to"]);
    check("[runtime_classes.a]\nhandler = \"a/b\"", &["3: handler must be"]);
    check("[runtime_classes.a]\noverhead_mb = 1", &["2: handler is missing"]);
    check("[runtime_classes.a]\nhandler = \"x\"\nprivileged = true", &["4: unknown field `privileged`"]);
    check("[runtime_classes.a]\nhandler = \"x\"\nannotations = { \"kakuri.dev/id\" = \"x\" }", &["4: annotations under kakuri.dev/"]);
    check("node_id = \"m\"", &["2: duplicate key"]);
    check("listen = [", &["2: "]);
    check(
        "lisen = []\nmemory_mb = \"x\"\nlog_level = \"loud\"\n[runtime_classes.a]\nhandlr = \"x\"\nhandler = \"y\"",
        &["2: unknown field `lisen`", "3: invalid type: string", "6: unknown field `handlr`", "4: must be one of"],
    );
}

#[test]
fn a_node_must_have_a_name() {
    assert_eq!(problems(agent_in(&[], nothing)).len(), 1);
    assert!(problems(agent_in(&[], nothing))[0].starts_with("--node-id: missing"));
    assert!(problems(agent_in(&words(&["--node-id", "Node_1"]), nothing))[0].starts_with("--node-id: name must be"));
}

#[test]
fn only_local_listeners_without_consent() {
    let with = |flags: &[&str]| agent_in(&words(&[&["--node-id", "n"], flags].concat()), nothing);
    let found = problems(with(&["--listen", "10.1.2.3:9000"]));
    assert!(found[0].starts_with("--listen: other machines could reach") && found[0].contains("--insecure-listen"), "{found:?}");
    assert!(run(with(&["--listen", "10.1.2.3:9000", "--insecure-listen"])).insecure_listen);
    assert!(!run(with(&["--listen", "[::1]:9000", "--listen", "unix:///run/a"])).insecure_listen);
}

#[test]
fn classes_know_their_kind() {
    let class = |text: &str| class_flag(text).map(|c| (c.own_kernel, c.overhead_mb, c.memory_mb_min));
    assert_eq!(class("edera-zone=edera"), Ok((true, 0, 300)));
    assert_eq!(class("kata=kata-qemu"), Ok((true, 160, 4)));
    assert_eq!(class("gvisor=runsc@unix:///run/x.sock"), Ok((true, 24, 4)));
    assert_eq!(class("native=runc"), Ok((false, 0, 4)));
    assert_eq!(class("kata=runc"), Ok((true, 160, 4)), "the stricter of name and handler counts");
    for bad in ["native", "native=", "=runc", "Native=runc", "native=runc@", "native=runc@run/x", "native=a b"] {
        assert!(class_flag(bad).is_err(), "{bad}");
    }
    let twice = agent_in(&words(&["--node-id", "n", "--runtime-class", "a=x", "--runtime-class", "a=y"]), nothing);
    assert_eq!(problems(twice), ["--runtime-class: a is given twice"]);
}

#[test]
fn check_config_leaves_with_a_word() {
    assert!(matches!(agent_file(FULL, &["--check-config"]), Ok(Parsed::Special(text)) if text == "config ok"));
    assert!(matches!(control_plane_in(&words(&["--check-config"]), nothing), Ok(Parsed::Special(_))));
    assert!(agent_file("node_id = 1", &["--check-config"]).is_err());
    assert!(matches!(agent_in(&words(&["--config", "/nonexistent/kakuri.toml"]), nothing), Err(Error::Read { .. })));
}

#[test]
fn a_bundle_is_read_whole() {
    let text = r#"
[runtime]
name = "runtime-a"
site = "site-a"
data_dir = "data"
history = 7
[runtime.web]
listen = "127.0.0.1:18081"
auth = "local"
[runtime.log]
level = "warn"
[[runtime.nodes]]
id = "b"
address = "127.0.0.1:2"
[[runtime.nodes]]
id = "a"
address = "127.0.0.1:1"
"#;
    let config = run(runtime_file(text, &[]));
    assert_eq!((config.name.as_str(), config.site.as_str()), ("runtime-a", "site-a"));
    assert_eq!(config.listen[0].to_string(), "127.0.0.1:18081");
    assert_eq!(config.nodes.iter().map(|(id, address)| format!("{id}={address}")).collect::<Vec<_>>(), ["a=127.0.0.1:1", "b=127.0.0.1:2"]);
    assert_eq!((config.log_level, config.data_dir), (LevelFilter::Warn, std::env::temp_dir().join("data")));
    assert_eq!((config.history, config.task), (7, Task::Serve));
    let config = run(runtime_file(text, &["--node", "c=unix:///run/c.sock", "--listen", "127.0.0.1:0"]));
    assert_eq!(config.nodes.len(), 1);
    assert_eq!(config.listen[0].to_string(), "127.0.0.1:0");
}

#[test]
fn every_bad_bundle_is_explained_with_its_line() {
    let check = |text: &str, expect: &str| {
        let found = problems(runtime_file(text, &[]));
        assert!(found.len() == 1 && found[0].starts_with(expect), "{text}: {found:?} should be {expect}");
    };
    check("name = \"a\"", "1: unknown field `name`");
    check("[runtime]\nname = \"A\"", "2: name must be");
    check("[runtime.web]\nauth = \"token\"", "2: only auth = \"local\"");
    check("[runtime.web]\nlisten = \"0.0.0.0:8080\"", "2: other machines could reach");
    check("[runtime.tls]\nmode = \"disabled\"", "1: unknown field `tls`");
    check("[runtime.cloud.wan]\nallow_write = []", "1: unknown field `cloud`");
    check("[[runtime.nodes]]\nid = \"a\"", "1: a node needs id and address");
    check("[[runtime.nodes]]\nid = \"a\"\naddress = \"x\"", "3: address must be");
    check(
        "[[runtime.nodes]]\nid = \"a\"\naddress = \"127.0.0.1:1\"\n[[runtime.nodes]]\nid = \"a\"\naddress = \"127.0.0.1:2\"",
        "4: node a is given twice",
    );
    assert_eq!(problems(control_plane_in(&words(&["--node", "a"]), nothing)), ["--node: must be ID=ADDR"]);
}

#[test]
fn a_file_has_a_limit() {
    let comment = |bytes: usize| format!("#{}\n", "x".repeat(bytes - 2));
    assert!(runtime_file(&comment(limits::CONFIG_BYTES_MAX), &[]).is_ok());
    assert!(matches!(runtime_file(&comment(limits::CONFIG_BYTES_MAX + 1), &[]), Err(Error::Read { .. })));
}

#[test]
fn files_belong_where_xdg_says() {
    let variable = |name: &str| (name == "HOME").then(|| "/home/k".to_owned());
    let expect = if std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0) { "/var/lib/p" } else { "/home/k/.local/state/p" };
    assert_eq!(default_dir("p", variable), Some(PathBuf::from(expect)));
}

#[test]
fn no_cut_of_a_file_is_misread() {
    for (end, _) in FULL.char_indices() {
        for text in [FULL[..end].to_owned(), FULL[end..].to_owned(), format!("{}\u{7f}é{}", &FULL[..end], &FULL[end..])] {
            let file = reader::Source { name: "f".into(), directory: PathBuf::new(), text };
            let mut problems = Vec::new();
            let read = file.deserialize::<RawAgent>(&mut problems);
            assert!(read.is_some() || !problems.is_empty(), "{}", file.text);
        }
    }
}

#[test]
fn images_have_marks_and_credentials_have_names() {
    let config = run(agent_file("node_id = \"a\"\nstate_dir = \"s\"", &[]));
    let gc = ImageGc { high_percent: 85, low_percent: 80, min_age_ms: 120_000, capacity_bytes: None };
    assert_eq!((config.pulls_max, config.image_gc, config.credentials.len()), (4, gc, 0));
    let text = "node_id = \"a\"\nstate_dir = \"s\"\npulls_max = 2\nimage_gc_high_percent = 60\nimage_gc_low_percent = 60\n\
                image_gc_min_age_s = 0\nimage_gc_capacity_mb = 5\n[credentials.team]\nfile = \"team.json\"\n";
    let config = run(agent_file(text, &["--pulls-max", "3"]));
    let gc = ImageGc { high_percent: 60, low_percent: 60, min_age_ms: 0, capacity_bytes: Some(5 << 20) };
    assert_eq!((config.pulls_max, config.image_gc), (3, gc));
    let team = config.credentials.get(&Name::new("team").expect("valid")).expect("a set");
    assert!(team.is_absolute() && team.ends_with("team.json"), "relative to the file: {}", team.display());
    let check = |line: &str, rule: &str| {
        let found = problems(agent_file(&format!("node_id = \"a\"\nstate_dir = \"s\"\n{line}\n"), &[]));
        assert_eq!(found, [rule], "{line}");
    };
    check("pulls_max = 0", "3: must be a number from 1 to 256");
    check("image_gc_high_percent = 101", "3: must be a number from 0 to 100");
    check("image_gc_low_percent = 90", "3: image_gc_low_percent is 90, above image_gc_high_percent, 85");
    check("image_gc_capacity_mb = 0", "3: must be a number from 1 to 67108864");
    check("[credentials.team]", "3: file is missing: a set of credentials is a docker config.json");
    check("[credentials.team]\nfil = \"x\"", "4: unknown field `fil`, expected `file`");
}
