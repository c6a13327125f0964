//! What only a real runtime can show: registries, kernels, out-of-memory, and a containerd that is killed. The rest of what runs
//! there is [`scenarios!`](crate::scenarios) of other files; without `KAKURI_LAB` all of it says that it is skipped.

use kakuri::wire::agent::Reply;
use kakuri::workload::{Reason, State};
use serde_json::{Value, json};

use crate::harness::place::{IMAGE, Lab, with};
use crate::harness::{Need, Place, skip, until};

fn of_registry(place: &Place, id: &str, registry: &str, name: &str) -> Value {
    with(place.workload(id, &["sleep", "1000"]), json!({"image": format!("{registry}/{name}"), "stop_grace_ms": 0}))
}

#[test]
fn an_image_is_pulled_from_a_registry() {
    Place::with_lab_class("native", |place| {
        let Some(registry) = place.lab().and_then(|lab| lab.open_registry.clone()) else {
            return skip(Need::Lab, "no registry (KAKURI_REGISTRY_OPEN=HOST:PORT)");
        };
        let agent = place.agent(&[]);
        let workload = with(of_registry(place, "wl-1", &registry, "busybox:1.35"), json!({"image_pull": {"policy": "always"}}));
        let status = agent.run(&workload);
        assert!(status.image_digest.as_ref().is_some_and(|d| d.contains("sha256:")), "{status:?}");
        for name in ["busybox:no-such-tag", "no-such-image:1"] {
            let (state, status) = agent.settle(&of_registry(place, &name.replace(':', "-"), &registry, name));
            assert_eq!((state, status.reason), (State::Failed, Some(Reason::ImageNotFound)), "{name}: {status:?}");
        }
        // Nobody listens there.
        let unreachable = with(of_registry(place, "unreachable", "127.0.0.1:1", "busybox:1.35"), json!({"start_deadline_ms": 1500}));
        let (state, status) = agent.settle(&unreachable);
        assert_eq!((state, status.reason), (State::Failed, Some(Reason::ImagePullFailed)), "{status:?}");
        assert!(status.message.as_ref().is_some_and(|m| m.starts_with("network: ") && m.contains("connection refused")), "{status:?}");
        assert_eq!(place.sandboxes().len(), 1, "none was made for an image that did not come");
    });
}

#[test]
fn a_registry_wants_to_know_who_asks() {
    Place::with_lab_class("native", |place| {
        let Some(registry) = place.lab().and_then(|lab| lab.auth_registry.clone()) else {
            return skip(Need::Lab, "no registry that asks who is there (KAKURI_REGISTRY_AUTH=HOST:PORT)");
        };
        let credentials = |password: &str| {
            let text = json!({"auths": {registry.as_str(): {"username": "kakuri", "password": password}}}).to_string();
            place.dir.secret("config.json", &text).display().to_string()
        };
        let file = credentials("wrong");
        let agent = place.agent(&["--registry-credentials", &file]);
        let always = |id: &str| with(of_registry(place, id, &registry, "busybox:1.35"), json!({"image_pull": {"policy": "always"}}));
        let (state, status) = agent.settle(&always("wrong"));
        assert_eq!((state, status.reason), (State::Failed, Some(Reason::ImageUnauthorized)), "{status:?}");
        place.dir.secret("config.json", "{}");
        let (state, status) = agent.settle(&always("none"));
        assert_eq!((state, status.reason), (State::Failed, Some(Reason::ImageUnauthorized)), "{status:?}");
        credentials("secret");
        agent.run(&always("right"));
        let log = std::fs::read_to_string(place.dir.join("agent.log")).expect("a log");
        assert!(!log.contains("secret"), "{log}");
    });
}

#[test]
fn out_of_memory_is_said_to_be_that() {
    Place::with_lab_class("native", |place| {
        let agent = place.agent(&[]);
        // `tail` keeps the last line, and the zeros have no end of line.
        agent.settle(&with(place.workload("wl-1", &["tail", "/dev/zero"]), json!({"memory_mb": 16})));
        let (state, status) = agent.ended("wl-1");
        assert_eq!((state, status.reason, status.exit_code), (State::Failed, Some(Reason::OomKilled), Some(137)), "{status:?}");
        assert!(status.oom_killed);
    });
}

#[test]
fn an_image_without_programs_runs_and_cannot_answer() {
    Place::with_lab_class("gvisor", |place| {
        let agent = place.agent(&[]);
        let scratch = with(place.workload("wl-1", &[]), json!({"image": "localhost/scratch:1", "stop_grace_ms": 0}));
        let (state, status) = agent.settle(&scratch);
        assert_eq!(state, State::Running, "{status:?}");
        let message = || agent.status("wl-1").1.isolation.message.unwrap_or_default();
        until("the probe gave up", || message().contains("the image has no uname or cat"));
        let isolation = agent.status("wl-1").1.isolation;
        assert_eq!((isolation.verified, isolation.kernel), (None, None));
    });
}

#[test]
fn limits_and_confinement_are_real() {
    Place::with_lab_class("native", |place| {
        let agent = place.agent(&[]);
        let more = json!({"stop_grace_ms": 0, "memory_mb": 32, "cpu_millicores": 300, "user": "1000:1000", "read_only_rootfs": true, "working_dir": "/tmp"});
        agent.run(&with(place.workload("wl-1", &["sleep", "1000"]), more));
        let inside = |command: &str| match agent.ask(&json!({"type": "Exec", "id": "wl-1", "command": ["sh", "-c", command]})) {
            Reply::ExecResult(result) => result.stdout.trim().to_owned(),
            other => panic!("{other:?}"),
        };
        assert_eq!(inside("id -u; id -g; pwd; hostname"), "1000\n1000\n/tmp\nwl-1");
        assert_eq!(inside("grep -E 'NoNewPrivs|Seccomp:' /proc/self/status | tr -d '\\t'"), "NoNewPrivs:1\nSeccomp:2");
        assert_eq!(inside("grep CapEff /proc/self/status | tr -d '\\t'"), "CapEff:0000000000000000");
        assert_eq!(inside("touch /x 2>&1 || echo refused"), "touch: /x: Read-only file system\nrefused");
        assert_eq!(inside("cat /proc/kcore | wc -c; ls /proc/acpi /sys/firmware | wc -l"), "0\n3");
        let limit = "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
        assert_eq!(inside(limit), (32 << 20).to_string());
        let quota = "cat /sys/fs/cgroup/cpu.max 2>/dev/null || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us | xargs";
        assert_eq!(inside(quota), "30000 100000");
        // Two workloads do not see each other.
        agent.run(&with(place.workload("wl-2", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
        assert_eq!(inside("ps | grep -c '[s]leep 1000'"), "1", "its own");
    });
}

#[test]
fn a_mount_is_what_it_says() {
    Place::with_lab_class("native", |place| {
        let root = place.dir.join("root");
        std::fs::create_dir(&root).expect("made");
        std::fs::write(root.join("greeting"), "hello from the host\n").expect("written");
        let agent = place.agent(&["--mount-root", &root.display().to_string()]);
        let mounts = json!([{"source": root.display().to_string(), "target": "/mnt/in", "read_only": true}]);
        let command = ["sh", "-c", "cat /mnt/in/greeting; echo x > /mnt/in/x || echo refused"];
        agent.settle(&with(place.workload("wl-1", &command), json!({"mounts": mounts})));
        agent.ended("wl-1");
        let lines: Vec<String> = agent.logs(json!({"id": "wl-1", "stream": "stdout"})).into_iter().map(|l| l.line).collect();
        assert_eq!(lines, ["hello from the host", "refused"]);
        assert!(!root.join("x").exists());
    });
}

#[test]
fn an_environment_reaches_its_workload_and_nobody_else() {
    Place::with_lab(|place| {
        let agent = place.agent(&[]);
        let more = json!({"env": {"GREETING": "konnichiwa 隔離"}, "image": IMAGE});
        agent.settle(&with(place.workload("wl-1", &["sh", "-c", "echo $GREETING"]), more));
        agent.ended("wl-1");
        let lines: Vec<String> = agent.logs(json!({"id": "wl-1"})).into_iter().map(|l| l.line).collect();
        assert_eq!(lines, ["konnichiwa 隔離"]);
        let annotations: Vec<String> = place.sandboxes().iter().map(|s| format!("{:?}", s.annotations)).collect();
        assert!(!annotations.concat().contains("konnichiwa"), "{annotations:?}");
    });
}

#[test]
fn a_containerd_that_is_killed_costs_no_workload() {
    let _alone = Lab::alone();
    Place::with_lab_unguarded("native", |place| {
        let lab = place.lab().expect("this is the lab");
        if lab.dir.is_none() {
            return skip(Need::Lab, "no directory of scripts/lab (KAKURI_LAB_DIR=DIR)");
        }
        let agent = place.agent(&[]);
        let before = agent.run(&with(place.workload("runs", &["sleep", "1000"]), json!({"stop_grace_ms": 0})));
        agent.run(&place.workload("ends", &["sh", "-c", "sleep 2; exit 9"]));
        lab.restart_hard();
        until("the node is ready again", || agent.node().ready);
        let (state, status) = agent.ended("ends");
        assert_eq!(state, State::Failed, "{status:?}");
        // A containerd that was away when a container ended may not know its exit code; then nobody does.
        assert!(matches!(status.exit_code, Some(9) | None), "{status:?}");
        let (state, after) = agent.status("runs");
        assert_eq!((state, after.container_id), (State::Running, before.container_id));
        match agent.ask(&json!({"type": "Exec", "id": "runs", "command": ["echo", "alive"]})) {
            Reply::ExecResult(result) => assert_eq!(result.stdout, "alive\n"),
            other => panic!("{other:?}"),
        }
        assert_eq!(place.sandboxes().len(), 2);
    });
}

#[test]
fn a_check_over_the_network_asks_the_sandbox() {
    Place::with_lab(|place: &Place| {
        let agent = place.agent(&[]);
        let serve = ["sh", "-c", "mkdir /tmp/www; echo ok >/tmp/www/h; exec httpd -f -p 8080 -h /tmp/www"];
        let check = |check: serde_json::Value| {
            let health = with(check, json!({"interval_ms": 500, "timeout_ms": 5000, "failures": 3}));
            json!({"stop_grace_ms": 0, "health": health})
        };
        // The lab's runsc has the host's network stack, and there a blocking read of what has not come yet is EAGAIN now and then (its
        // --strace shows it): httpd then leaves without an answer. So those that have to answer are under runc.
        let runc = |id: &str| with(place.workload(id, &serve), json!({"runtime_class": "native"}));
        agent.run(&with(runc("http"), check(json!({"http": {"port": 8080, "path": "/h"}}))));
        agent.run(&with(place.workload("tcp", &serve), check(json!({"tcp": {"port": 8080}}))));
        agent.run(&with(runc("missing"), check(json!({"http": {"port": 8080, "path": "/none"}}))));
        agent.run(&with(place.workload("closed", &serve), check(json!({"tcp": {"port": 81}}))));
        let (_, status) = agent.ended("missing");
        assert_eq!(status.reason, Some(Reason::HealthCheckFailed), "{status:?}");
        assert!(status.message.as_deref().is_some_and(|m| m.ends_with("GET /none was answered with status 404")), "{status:?}");
        let (_, status) = agent.ended("closed");
        assert_eq!(status.reason, Some(Reason::HealthCheckFailed), "{status:?}");
        for id in ["http", "tcp"] {
            let (state, status) = agent.status(id);
            assert_eq!((state, status.last_error), (State::Running, None), "{id}");
        }
    });
}
