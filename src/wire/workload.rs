//! A workload as JSON, read and written.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::json::{Fields, Problems, text};
use crate::limits;
use crate::workload::{
    CAPABILITIES_DEFAULT, Check, Draft, Health, ImageRef, Mount, Name, Port, Protocol, PullPolicy, Restart, RestartPolicy, Secret, Spec,
    Unfit, User, Workload, WorkloadId, check_label,
};

/// Reads a workload in which id and class may still be missing.
///
/// # Errors
/// Every rule it breaks.
pub fn draft(value: Value) -> Result<Draft, Problems> {
    let mut problems = Problems::default();
    let draft = read(value, "", &mut problems);
    draft.filter(|_| problems.is_empty()).ok_or(problems)
}

/// Reads a complete workload that stands at `pointer`; `None`, and problems, when it breaks a rule.
pub fn complete(value: Value, pointer: &str, problems: &mut Problems) -> Option<Workload> {
    let draft = read(value, pointer, problems)?;
    let (id, class) = (draft.id.clone(), draft.runtime_class.clone());
    for (name, missing) in [("id", id.is_none()), ("runtime_class", class.is_none())] {
        let at = format!("{pointer}/{name}");
        if missing && !problems.as_slice().iter().any(|p| p.pointer == at) {
            problems.add(at, "is required");
        }
    }
    Some(draft.resolve(id?, class?))
}

fn read(value: Value, pointer: &str, problems: &mut Problems) -> Option<Draft> {
    let mut fields = Fields::of(value, pointer, problems)?;
    let id = fields.parsed("id", WorkloadId::new);
    let image = fields.parsed("image", ImageRef::new);
    let image = fields.required("image", image);
    let runtime_class = fields.parsed("runtime_class", Name::new);
    let security_profile = fields.parsed("security_profile", Name::new);
    let (pull_policy, pull_credentials) = image_pull(&mut fields);
    let spec = Spec {
        // A missing image is a problem, and with a problem no draft leaves this room.
        image: image.or_else(|| ImageRef::new("missing").ok())?,
        memory_mb: fields.integer("memory_mb", limits::MEMORY_MB_MIN, limits::MEMORY_MB_MAX).unwrap_or(limits::MEMORY_MB_DEFAULT),
        cpu_millicores: fields
            .integer("cpu_millicores", limits::CPU_MILLICORES_MIN, limits::CPU_MILLICORES_MAX)
            .unwrap_or(limits::CPU_MILLICORES_DEFAULT),
        command: fields.texts("command", limits::WORDS_MAX, limits::WORD_BYTES_MAX),
        args: fields.texts("args", limits::WORDS_MAX, limits::WORD_BYTES_MAX),
        env: env(&mut fields),
        working_dir: fields.text("working_dir", limits::PATH_BYTES_MAX),
        user: fields.parsed("user", User::new),
        labels: labels(&mut fields, "labels"),
        ports: fields.items("ports", limits::PORTS_MAX, port),
        mounts: fields.items("mounts", limits::PORTS_MAX, mount),
        read_only_rootfs: fields.flag("read_only_rootfs").unwrap_or(false),
        capabilities_add: capabilities(&mut fields, "capabilities_add"),
        capabilities_drop: capabilities(&mut fields, "capabilities_drop"),
        pids_max: fields.integer("pids_max", 1, limits::PIDS_MAX),
        pull_policy,
        pull_credentials,
        start_deadline_ms: fields
            .integer("start_deadline_ms", 1, limits::START_DEADLINE_MS_MAX)
            .unwrap_or(limits::START_DEADLINE_MS_DEFAULT),
        ttl_ms: fields.integer("ttl_ms", 1, limits::TTL_MS_MAX),
        stop_grace_ms: fields.integer("stop_grace_ms", 0, limits::STOP_GRACE_MS_MAX).unwrap_or(limits::STOP_GRACE_MS_DEFAULT),
        node_selector: labels(&mut fields, "node_selector"),
        restart: restart(&mut fields),
        health: health(&mut fields),
    };
    if spec.working_dir.as_deref().is_some_and(|dir| !is_plain_absolute(dir)) {
        fields.problem("working_dir", PATH_RULE);
    }
    not_yet(&mut fields);
    fields.finish();
    Some(Draft { id, runtime_class, security_profile, spec })
}

/// Fields of the contract whose behaviour this version does not have: only the value that asks for nothing is accepted.
fn not_yet(fields: &mut Fields<'_>) {
    if fields.take("on_node_lost").is_some_and(|v| v != "keep") {
        fields.problem("on_node_lost", "only keep is supported by this version");
    }
}

fn restart(fields: &mut Fields<'_>) -> Restart {
    let policy = fields.one_of("restart_policy", RestartPolicy::ALL, RestartPolicy::as_str).unwrap_or(RestartPolicy::Never);
    let attempts_max = fields.integer("restart_max_attempts", 1, limits::RESTART_ATTEMPTS_MAX);
    let mut ms = |name, min| fields.integer(name, min, limits::RESTART_MS_MAX);
    let backoff_ms = ms("restart_backoff_ms", limits::RESTART_BACKOFF_MS_MIN);
    let backoff_ms_max = ms("restart_backoff_max_ms", limits::RESTART_BACKOFF_MS_MIN);
    let reset_ms = ms("restart_reset_ms", 1);
    let given = [
        ("restart_max_attempts", attempts_max),
        ("restart_backoff_ms", backoff_ms),
        ("restart_backoff_max_ms", backoff_ms_max),
        ("restart_reset_ms", reset_ms),
    ];
    for (name, _) in given.into_iter().filter(|(_, value)| value.is_some() && policy == RestartPolicy::Never) {
        fields.problem(name, "needs a restart_policy of on-failure or always");
    }
    if backoff_ms.zip(backoff_ms_max).is_some_and(|(least, most)| least > most) {
        fields.problem("restart_backoff_max_ms", "must not be less than restart_backoff_ms");
    }
    let backoff_ms = backoff_ms.unwrap_or(Restart::NEVER.backoff_ms);
    Restart {
        policy,
        attempts_max,
        backoff_ms,
        backoff_ms_max: backoff_ms_max.unwrap_or(Restart::NEVER.backoff_ms_max).max(backoff_ms),
        reset_ms: reset_ms.unwrap_or(Restart::NEVER.reset_ms),
    }
}

fn health(fields: &mut Fields<'_>) -> Option<Health> {
    let pointer = format!("{}/health", fields.pointer());
    let mut inner = fields.take("health").and_then(|value| Fields::of(value, &pointer, fields.problems()))?;
    let exec = inner.texts("exec", limits::WORDS_MAX, limits::WORD_BYTES_MAX);
    let exec = (!exec.is_empty()).then_some(Check::Exec(exec));
    let (tcp, http) = (endpoint(&mut inner, "tcp"), endpoint(&mut inner, "http"));
    let interval_ms = inner.integer("interval_ms", limits::HEALTH_INTERVAL_MS_MIN, limits::HEALTH_INTERVAL_MS_MAX);
    let timeout_ms = inner.integer("timeout_ms", 1, limits::HEALTH_TIMEOUT_MS_MAX);
    let failures_max = inner.integer("failures", 1, limits::HEALTH_FAILURES_MAX);
    let mut checks = [exec, tcp, http].into_iter().flatten();
    let check = checks.next();
    let is_one = check.is_some() && checks.next().is_none();
    inner.finish();
    if !is_one {
        fields.problem("health", "must have exactly one of exec, tcp and http");
    }
    Some(Health {
        check: check?,
        interval_ms: interval_ms.unwrap_or(limits::HEALTH_INTERVAL_MS_DEFAULT),
        timeout_ms: timeout_ms.unwrap_or(limits::HEALTH_TIMEOUT_MS_DEFAULT),
        failures_max: failures_max.unwrap_or(limits::HEALTH_FAILURES_DEFAULT),
    })
}

/// `tcp: {port}` or `http: {port, path}`.
fn endpoint(health: &mut Fields<'_>, name: &'static str) -> Option<Check> {
    let pointer = format!("{}/{name}", health.pointer());
    let mut fields = health.take(name).and_then(|value| Fields::of(value, &pointer, health.problems()))?;
    let port = fields.integer("port", 1, u64::from(u16::MAX));
    let port = fields.required("port", port);
    let path = if name == "http" { fields.text("path", limits::PATH_BYTES_MAX) } else { None };
    // It becomes part of a request's first line.
    if path.as_deref().is_some_and(|path| !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic())) {
        fields.problem("path", "must begin with / and be printable ASCII without spaces");
    }
    fields.finish();
    let port = u16::try_from(port?).ok()?;
    Some(if name == "http" { Check::Http { port, path: path.unwrap_or_else(|| "/".to_owned()) } } else { Check::Tcp { port } })
}

const PATH_RULE: &str = "must be an absolute path without . or .. segments";

/// Absolute, and the same after normalising: nobody has to guess what `..` will mean inside.
fn is_plain_absolute(path: &str) -> bool {
    path.strip_prefix('/')
        .is_some_and(|rest| rest.is_empty() || rest.trim_end_matches('/').split('/').all(|segment| !matches!(segment, "" | "." | "..")))
}

fn env(fields: &mut Fields<'_>) -> BTreeMap<String, Secret> {
    let read = |key: &str, value: Value, pointer: &str, problems: &mut Problems| {
        if key.is_empty() || key.len() > limits::LABEL_BYTES_MAX || key.contains(['=', '\0']) {
            problems.add(pointer, format!("name must be 1 to {} bytes without = and NUL", limits::LABEL_BYTES_MAX));
        }
        Some((key.to_owned(), Secret::new(text(value, pointer, limits::WORD_BYTES_MAX, problems)?)))
    };
    fields.entries("env", limits::ENV_MAX, read).into_iter().collect()
}

/// Labels by the rules that all labels have.
pub(super) fn labels(fields: &mut Fields<'_>, name: &'static str) -> BTreeMap<String, String> {
    fields.entries(name, limits::LABELS_MAX, label).into_iter().collect()
}

/// Labels, and those that are to go: their value is `null`.
pub(super) fn label_patch(fields: &mut Fields<'_>) -> BTreeMap<String, Option<String>> {
    let read = |key: &str, value: Value, pointer: &str, problems: &mut Problems| match value {
        // A key that no label can have is none that could be taken away.
        Value::Null => label(key, Value::from(""), pointer, problems).map(|(key, _)| (key, None)),
        value => label(key, value, pointer, problems).map(|(key, value)| (key, Some(value))),
    };
    fields.entries("labels", limits::LABELS_MAX * 2, read).into_iter().collect()
}

fn label(key: &str, value: Value, pointer: &str, problems: &mut Problems) -> Option<(String, String)> {
    let value = text(value, pointer, limits::LABEL_BYTES_MAX, problems)?;
    if let Err(Unfit(rule)) = check_label(key, &value) {
        problems.add(pointer, rule);
    }
    Some((key.to_owned(), value))
}

fn capabilities(fields: &mut Fields<'_>, name: &'static str) -> Vec<String> {
    let is_add = name == "capabilities_add";
    fields.items(name, limits::WORDS_MAX, |item, pointer, problems| {
        let given = text(item, pointer, limits::NAME_BYTES_MAX, problems)?;
        let plain = given.strip_prefix("CAP_").unwrap_or(&given);
        // Dropping is harmless, so any name may be dropped, ALL among them.
        let word = !plain.is_empty() && plain.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
        if is_add && !CAPABILITIES_DEFAULT.contains(&plain) {
            problems.add(pointer, format!("must be one of {}", CAPABILITIES_DEFAULT.join(", ")));
        } else if !word {
            problems.add(pointer, "must be a capability's name, as NET_RAW, or ALL");
        }
        Some(plain.to_owned())
    })
}

fn port(value: Value, pointer: &str, problems: &mut Problems) -> Option<Port> {
    let mut fields = Fields::of(value, pointer, problems)?;
    let container = fields.integer("container", 1, u64::from(u16::MAX));
    let container = fields.required("container", container);
    let host = fields.integer("host", 1, u64::from(u16::MAX));
    let protocol = fields.one_of("protocol", Protocol::ALL, Protocol::as_str).unwrap_or(Protocol::Tcp);
    fields.finish();
    Some(Port { container: u16::try_from(container?).ok()?, host: host.and_then(|h| u16::try_from(h).ok()), protocol })
}

fn mount(value: Value, pointer: &str, problems: &mut Problems) -> Option<Mount> {
    let mut fields = Fields::of(value, pointer, problems)?;
    if fields.take("type").is_some_and(|kind| kind != "host") {
        fields.problem("type", "only host is supported by this version");
    }
    let mut path = |name| {
        let path = fields.text(name, limits::PATH_BYTES_MAX);
        if path.as_deref().is_some_and(|p| !is_plain_absolute(p) || p == "/") {
            fields.problem(name, PATH_RULE);
        }
        fields.required(name, path)
    };
    let (source, target) = (path("source"), path("target"));
    let read_only = fields.flag("read_only").unwrap_or(false);
    fields.finish();
    Some(Mount { source: source?, target: target?, read_only })
}

fn image_pull(fields: &mut Fields<'_>) -> (PullPolicy, Option<Name>) {
    let pointer = format!("{}/image_pull", fields.pointer());
    let inner = fields.take("image_pull").and_then(|value| Fields::of(value, &pointer, fields.problems()));
    let Some(mut inner) = inner else { return (PullPolicy::IfNotPresent, None) };
    let policy = inner.one_of("policy", PullPolicy::ALL, PullPolicy::as_str).unwrap_or(PullPolicy::IfNotPresent);
    let credentials = inner.parsed("credentials", Name::new);
    inner.finish();
    (policy, credentials)
}

/// The fields of a workload; [`complete`] reads back the same.
pub fn to_map(workload: &Workload) -> Map<String, Value> {
    // Destructured, so that a new field breaks the build here.
    let Workload { id, runtime_class, security_profile, spec } = workload;
    let Spec {
        image,
        memory_mb,
        cpu_millicores,
        command,
        args,
        env,
        working_dir,
        user,
        labels,
        ports,
        mounts,
        read_only_rootfs,
        capabilities_add,
        capabilities_drop,
        pids_max,
        pull_policy,
        pull_credentials,
        start_deadline_ms,
        ttl_ms,
        stop_grace_ms,
        node_selector,
        restart,
        health,
    } = spec;
    let mut map = Map::new();
    let mut put = |name: &str, value: Value| {
        let empty = match &value {
            Value::Null => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(entries) => entries.is_empty(),
            Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
        };
        if !empty {
            map.insert(name.to_owned(), value);
        }
    };
    put("id", id.as_str().into());
    put("image", image.as_str().into());
    put("runtime_class", runtime_class.as_str().into());
    put("security_profile", security_profile.as_ref().map(Name::as_str).into());
    put("memory_mb", (*memory_mb).into());
    put("cpu_millicores", (*cpu_millicores).into());
    put("command", command.clone().into());
    put("args", args.clone().into());
    put("env", env.iter().map(|(key, value)| (key.clone(), Value::from(value.expose()))).collect::<Map<_, _>>().into());
    put("working_dir", working_dir.clone().into());
    put("user", user.map(|u| u.to_string()).into());
    put("labels", json!(labels));
    let port = |p: &Port| json!({"container": p.container, "host": p.host, "protocol": p.protocol.as_str()});
    put("ports", ports.iter().map(port).collect());
    let mount = |m: &Mount| json!({"type": "host", "source": m.source, "target": m.target, "read_only": m.read_only});
    put("mounts", mounts.iter().map(mount).collect());
    put("read_only_rootfs", (*read_only_rootfs).into());
    put("capabilities_add", capabilities_add.clone().into());
    put("capabilities_drop", capabilities_drop.clone().into());
    put("pids_max", (*pids_max).into());
    let mut pull = Map::new();
    pull.insert("policy".into(), pull_policy.as_str().into());
    pull.extend(pull_credentials.iter().map(|name| ("credentials".to_owned(), Value::from(name.as_str()))));
    put("image_pull", pull.into());
    put("start_deadline_ms", (*start_deadline_ms).into());
    put("ttl_ms", (*ttl_ms).into());
    put("stop_grace_ms", (*stop_grace_ms).into());
    put("node_selector", json!(node_selector));
    let Restart { policy, attempts_max, backoff_ms, backoff_ms_max, reset_ms } = *restart;
    put("restart_policy", policy.as_str().into());
    if policy != RestartPolicy::Never {
        put("restart_max_attempts", attempts_max.into());
        put("restart_backoff_ms", backoff_ms.into());
        put("restart_backoff_max_ms", backoff_ms_max.into());
        put("restart_reset_ms", reset_ms.into());
    }
    put("health", health.as_ref().map_or(Value::Null, health_value));
    map
}

fn health_value(health: &Health) -> Value {
    let Health { check, interval_ms, timeout_ms, failures_max } = health;
    let mut value = json!({"interval_ms": interval_ms, "timeout_ms": timeout_ms, "failures": failures_max});
    let (name, check) = match check {
        Check::Exec(command) => ("exec", json!(command)),
        Check::Http { port, path } => ("http", json!({"port": port, "path": path})),
        Check::Tcp { port } => ("tcp", json!({"port": port})),
    };
    if let Value::Object(map) = &mut value {
        map.insert(name.to_owned(), check);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::json;

    fn problems(body: &str) -> String {
        json::parse(body.as_bytes()).and_then(draft).expect_err("breaks a rule").to_string()
    }

    #[test]
    fn the_seed_s_example_is_a_workload() {
        let body = br#"{"id":"wl-123","image":"ghcr.io/example/secure-app:1.0","runtime_class":"edera-zone","memory_mb":512,
            "cpu_millicores":500}"#;
        let draft = json::parse(body).and_then(draft).expect("valid");
        assert_eq!(draft.id, WorkloadId::new("wl-123").ok());
        assert_eq!((draft.spec.memory_mb, draft.spec.cpu_millicores), (512, 500));
        assert_eq!(draft.spec.start_deadline_ms, 120_000);
    }

    #[test]
    fn a_workload_reads_what_it_writes() {
        let body = br#"{"id":"a","image":"busybox","runtime_class":"gvisor","security_profile":"internal","command":["/bin/sh","-c"],
            "args":["exit 3"],"env":{"A":"b"},"working_dir":"/tmp","user":"1:2","labels":{"app":"web"},
            "ports":[{"container":80,"host":8080,"protocol":"udp"},{"container":81}],
            "mounts":[{"type":"host","source":"/srv/a","target":"/a","read_only":true}],"read_only_rootfs":true,
            "capabilities_add":["CAP_KILL"],"capabilities_drop":["ALL"],"pids_max":9,"image_pull":{"policy":"always","credentials":"c"},
            "start_deadline_ms":1000,"ttl_ms":5,"stop_grace_ms":0,"node_selector":{"zone":"a"},"restart_policy":"on-failure",
            "restart_max_attempts":3,"restart_backoff_ms":200,"restart_backoff_max_ms":400,"restart_reset_ms":1000,
            "health":{"http":{"port":80,"path":"/h"},"interval_ms":500,"timeout_ms":50,"failures":2}}"#;
        let mut problems = Problems::default();
        let first = complete(json::parse(body).expect("JSON"), "", &mut problems).expect("valid");
        let again = complete(Value::Object(to_map(&first)), "", &mut problems).expect("valid");
        assert_eq!(problems, Problems::default());
        assert_eq!(first, again);
        assert_eq!(first.spec.capabilities_add, ["KILL"]);
    }

    #[test]
    fn each_bad_field_names_its_rule() {
        let check = |field: &str, rule: &str| {
            let found = problems(&format!(r#"{{"image":"a",{field}}}"#));
            assert!(found.contains(rule), "{field}: {found}");
        };
        check(r#""id":"A""#, "/id: id must be 1 to 63");
        check(r#""id":7"#, "/id: must be a string, not a number");
        check(r#""memory_mb":0"#, "/memory_mb: must be a whole number from 4 to 1048576");
        check(r#""memory_mb":1048577"#, "/memory_mb: must be");
        check(r#""memory_mb":1e99"#, "/memory_mb: must be");
        check(r#""memory_mb":-5"#, "/memory_mb: must be");
        check(r#""memory_mb":512.5"#, "/memory_mb: must be");
        check(r#""memory_mb":"512""#, "/memory_mb: must be a whole number from 4 to 1048576, not a string");
        check(r#""cpu_millicores":9"#, "/cpu_millicores: must be a whole number from 10 to 1024000");
        check(r#""command":"sh""#, "/command: must be an array, not a string");
        check(r#""command":["a",5]"#, "/command/1: must be a string");
        check(r#""args":["a\u0000"]"#, "/args/0: must not contain NUL");
        check(r#""env":{"A=B":"c"}"#, "/env/A=B: name must be");
        check(r#""env":{"A":1}"#, "/env/A: must be a string");
        check(r#""user":"root""#, "/user: user must be uid or uid:gid");
        check(r#""working_dir":"tmp""#, "/working_dir: must be an absolute path");
        check(r#""working_dir":"/a/../b""#, "/working_dir: must be an absolute path");
        check(r#""ports":[{"container":0}]"#, "/ports/0/container: must be a whole number from 1 to 65535");
        check(r#""ports":[{}]"#, "/ports/0/container: is required");
        check(r#""mounts":[{"source":"/","target":"/a"}]"#, "/mounts/0/source: must be an absolute path");
        check(r#""mounts":[{"type":"tmpfs","source":"/a","target":"/a"}]"#, "/mounts/0/type: only host");
        check(r#""capabilities_add":["SYS_ADMIN"]"#, "/capabilities_add/0: must be one of AUDIT_WRITE");
        check(r#""capabilities_add":["ALL"]"#, "/capabilities_add/0: must be one of");
        check(r#""image_pull":{"policy":"sometimes"}"#, "/image_pull/policy: must be one of always, if-not-present, never");
        check(r#""ttl_ms":0"#, "/ttl_ms: must be");
        check(r#""restart_policy":"sometimes""#, "/restart_policy: must be one of always, never, on-failure");
        check(r#""restart_backoff_ms":500"#, "/restart_backoff_ms: needs a restart_policy");
        check(
            r#""restart_policy":"always","restart_backoff_ms":500,"restart_backoff_max_ms":400"#,
            "/restart_backoff_max_ms: must not be less",
        );
        check(r#""health":{}"#, "/health: must have exactly one of exec, tcp and http");
        check(r#""health":{"tcp":{"port":1},"exec":["true"]}"#, "/health: must have exactly one of");
        check(r#""health":{"tcp":{"port":0}}"#, "/health/tcp/port: must be a whole number from 1 to 65535");
        check(r#""health":{"http":{"port":80,"path":"/a b"}}"#, "/health/http/path: must begin with /");
        check(r#""health":{"exec":["true"],"interval_ms":1}"#, "/health/interval_ms: must be a whole number from 100");
        check(r#""privileged":true"#, "/privileged: unknown field");
        check(r#""annotations":{}"#, "/annotations: unknown field");
        check(r#""runtme_class":"x""#, "did you mean runtime_class?");
        check(r#""labels":{"a b":"c"}"#, "/labels/a b: key and value");
    }

    #[test]
    fn all_problems_come_at_once() {
        let found = problems(r#"{"id":"-","memory_mb":0,"x":1}"#);
        for part in ["/id:", "/memory_mb:", "/image: is required", "/x: unknown field"] {
            assert!(found.contains(part), "{found}");
        }
    }
}
