//! What kakuri runs, and the states it goes through. Pure: no I/O, no JSON.
//!
//! ```text
//!             start failed, deadline passed, stopped
//!            +-------------------------------------------> Failed
//!            |                                               ^
//!  Pending --+--> Running --+--> exit code not 0, killed ----+
//!     ^                     +--> exit code 0 --------------> Succeeded
//!     +--- restart by policy
//! ```
//! Invariant: a terminal state never changes ([`State::may_become`]).
//! Invariant: whoever holds a [`Workload`] holds one that passed validation; the constructors here are the only makers of its parts.

use std::collections::BTreeMap;
use std::fmt;

use crate::limits;
use crate::report::random_id;

/// A workload as accepted: who it is, the class it runs under, and everything else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name, unique in the fleet.
    pub id: WorkloadId,
    /// The class of sandbox it runs in.
    pub runtime_class: Name,
    /// The profile that chose or allowed the class.
    pub security_profile: Option<Name>,
    /// Image, limits, command and the rest.
    pub spec: Spec,
}

/// What a client asked for, before a missing id and class are settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// Made by the control plane when absent.
    pub id: Option<WorkloadId>,
    /// Chosen through the profile when absent.
    pub runtime_class: Option<Name>,
    /// The profile that chooses or allows the class.
    pub security_profile: Option<Name>,
    /// Image, limits, command and the rest.
    pub spec: Spec,
}

/// The part of a workload that does not say who or where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The image, completed to a full reference.
    pub image: ImageRef,
    /// Memory limit, MiB.
    pub memory_mb: u64,
    /// CPU limit, thousandths of a core.
    pub cpu_millicores: u64,
    /// Replaces the image's entrypoint; empty keeps it.
    pub command: Vec<String>,
    /// Replaces the image's cmd; empty keeps it.
    pub args: Vec<String>,
    /// Added to the image's environment. Values are secrets: they appear in no log, label or annotation.
    pub env: BTreeMap<String, Secret>,
    /// Replaces the image's working directory.
    pub working_dir: Option<String>,
    /// Replaces the image's user.
    pub user: Option<User>,
    /// For selectors; ours alone, the runtime never sees them.
    pub labels: BTreeMap<String, String>,
    /// Ports of the sandbox, and where on the host they appear.
    pub ports: Vec<Port>,
    /// Host directories inside the sandbox.
    pub mounts: Vec<Mount>,
    /// The root file system cannot be written to.
    pub read_only_rootfs: bool,
    /// Capabilities beyond those of the class, without `CAP_`.
    pub capabilities_add: Vec<String>,
    /// Capabilities taken away, without `CAP_`.
    pub capabilities_drop: Vec<String>,
    /// Processes and threads at a time.
    pub pids_max: Option<u64>,
    /// When to pull the image.
    pub pull_policy: PullPolicy,
    /// The name of registry credentials on the node.
    pub pull_credentials: Option<Name>,
    /// From acceptance to Running, milliseconds.
    pub start_deadline_ms: u64,
    /// From Running to a forced end, milliseconds; enforced by the agent.
    pub ttl_ms: Option<u64>,
    /// Between the polite signal and the kill, milliseconds.
    pub stop_grace_ms: u64,
    /// Labels a node must have.
    pub node_selector: BTreeMap<String, String>,
    /// What follows its end.
    pub restart: Restart,
    /// How its agent sees whether it still does its job.
    pub health: Option<Health>,
}

/// What follows the end of a workload that nobody asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// Whether it is started again.
    pub policy: RestartPolicy,
    /// Restarts in a row at most; none is without end.
    pub attempts_max: Option<u64>,
    /// The pause before the first restart in a row, milliseconds; each further one doubles it.
    pub backoff_ms: u64,
    /// The longest pause, milliseconds.
    pub backoff_ms_max: u64,
    /// A run that lasted this long ends the row, milliseconds.
    pub reset_ms: u64,
}

impl Restart {
    /// No restart; the rest as when nothing was said.
    pub const NEVER: Self = Self {
        policy: RestartPolicy::Never,
        attempts_max: None,
        backoff_ms: limits::RESTART_BACKOFF_MS_DEFAULT,
        backoff_ms_max: limits::RESTART_BACKOFF_MS_MAX_DEFAULT,
        reset_ms: limits::RESTART_RESET_MS_DEFAULT,
    };

    /// The pause before a restart, of which there were `streak` in a row already, milliseconds.
    pub fn pause_ms(&self, streak: u64) -> u64 {
        let doubled = u32::try_from(streak).ok().and_then(|n| 1u64.checked_shl(n)).and_then(|factor| self.backoff_ms.checked_mul(factor));
        doubled.unwrap_or(u64::MAX).min(self.backoff_ms_max.max(self.backoff_ms))
    }
}

/// A check that the agent repeats while a workload runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// What is done.
    pub check: Check,
    /// From the start to the first check, and from each to the next, milliseconds.
    pub interval_ms: u64,
    /// How long one may take, milliseconds.
    pub timeout_ms: u64,
    /// Failures in a row that end the workload.
    pub failures_max: u64,
}

/// One way to ask a workload how it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// A command inside it ends with 0.
    Exec(Vec<String>),
    /// `GET path` at the sandbox's address is answered with a status from 200 to 399.
    Http {
        /// At which port.
        port: u16,
        /// Absolute.
        path: String,
    },
    /// The sandbox's address accepts a connection.
    Tcp {
        /// At which port.
        port: u16,
    },
}

impl Draft {
    /// The accepted workload under this id and class.
    pub fn resolve(self, id: WorkloadId, runtime_class: Name) -> Workload {
        Workload { id, runtime_class, security_profile: self.security_profile, spec: self.spec }
    }
}

/// A text that is not what it should be; says the rule, never the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit(pub String);

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unfit {}

/// The name of a workload: an RFC 1123 label, `[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkloadId(String);

impl WorkloadId {
    /// # Errors
    /// [`Unfit`] when the text is not an RFC 1123 label.
    pub fn new(text: &str) -> Result<Self, Unfit> {
        label("id", text).map(Self)
    }

    /// One for a workload that nobody named: `wl-` and 12 letters and digits.
    pub fn random() -> Self {
        Self(format!("wl-{}", random_id()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkloadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a runtime class, node, profile or set of credentials: as an RFC 1123 label, with `_` allowed inside.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// # Errors
    /// [`Unfit`] when the text is no such name.
    pub fn new(text: &str) -> Result<Self, Unfit> {
        label("name", &text.replace('_', "-")).map(|_| Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks a label of a workload or a node; a selector asks for both in the same words.
///
/// # Errors
/// [`Unfit`], with the rule.
pub fn check_label(key: &str, value: &str) -> Result<(), Unfit> {
    let is_word = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/'));
    let fits = |text: &str| text.len() <= limits::LABEL_BYTES_MAX && is_word(text);
    if key.is_empty() {
        return Err(Unfit("a label needs a key".into()));
    }
    if fits(key) && fits(value) {
        return Ok(());
    }
    Err(Unfit(format!("key and value must be at most {} of A-Z, a-z, 0-9, '.', '_', '-', '/'", limits::LABEL_BYTES_MAX)))
}

fn label(what: &str, text: &str) -> Result<String, Unfit> {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends = bytes.first().zip(bytes.last()).is_some_and(|(a, z)| alphanumeric(*a) && alphanumeric(*z));
    if ends && bytes.len() <= limits::ID_BYTES_MAX && bytes.iter().all(|b| alphanumeric(*b) || *b == b'-') {
        Ok(text.to_owned())
    } else {
        Err(Unfit(format!(
            "{what} must be 1 to {} characters of a-z, 0-9 and '-', beginning and ending with a letter or digit",
            limits::ID_BYTES_MAX
        )))
    }
}

/// An OCI image reference, completed: registry, repository, and a tag or digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageRef(String);

impl ImageRef {
    /// Completes a reference as Docker does: `busybox` is `docker.io/library/busybox:latest`.
    ///
    /// # Errors
    /// [`Unfit`] when a part of it is not what the OCI distribution specification allows.
    pub fn new(text: &str) -> Result<Self, Unfit> {
        let too_long = || Unfit(format!("image must be 1 to {} bytes, registry and tag included", limits::IMAGE_BYTES_MAX));
        if text.is_empty() || text.len() > limits::IMAGE_BYTES_MAX {
            return Err(too_long());
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        let after_slash = rest.rfind('/').map_or(0, |i| i + 1);
        let (name, tag) = match rest[after_slash..].find(':') {
            Some(i) => (&rest[..after_slash + i], Some(&rest[after_slash + i + 1..])),
            None => (rest, None),
        };
        let (registry, path) = match name.split_once('/') {
            Some((host, path)) if host == "localhost" || host.contains(['.', ':']) => (host, path),
            Some(_) | None => (DEFAULT_REGISTRY, name),
        };
        // As runtimes list it.
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        let path = if registry == DEFAULT_REGISTRY && !path.contains('/') { format!("library/{path}") } else { path.to_owned() };
        check_registry(registry)?;
        if !path.split('/').all(is_path_component) {
            return Err(Unfit("image repository must be lower-case words of a-z, 0-9, '.', '_', '-' between slashes".into()));
        }
        if !tag.is_none_or(is_tag) {
            return Err(Unfit("image tag must be 1 to 128 characters of A-Z, a-z, 0-9, '_', '.', '-'".into()));
        }
        if !digest.is_none_or(is_digest) {
            return Err(Unfit("image digest must be sha256: and 64 hexadecimal digits".into()));
        }
        let mut full = format!("{registry}/{path}");
        if let Some(tag) = tag.or(if digest.is_none() { Some("latest") } else { None }) {
            full.push(':');
            full.push_str(tag);
        }
        if let Some(digest) = digest {
            full.push('@');
            full.push_str(digest);
        }
        // What is kept and read again is this.
        if full.len() > limits::IMAGE_BYTES_MAX { Err(too_long()) } else { Ok(Self(full)) }
    }

    /// The whole reference.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The registry: host and port.
    pub fn registry(&self) -> &str {
        self.0.split('/').next().unwrap_or_default()
    }

    /// Registry and path, without tag and digest.
    pub fn repository(&self) -> &str {
        let name = self.0.split('@').next().unwrap_or_default();
        name.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).map_or(name, |(repository, _)| repository)
    }

    /// The digest it is pinned to.
    pub fn digest(&self) -> Option<&str> {
        self.0.split_once('@').map(|(_, digest)| digest)
    }

    /// As runtimes list it: a tag beside a digest says nothing more, and they drop it.
    pub fn listed(&self) -> String {
        self.digest().map_or_else(|| self.0.clone(), |digest| format!("{}@{digest}", self.repository()))
    }
}

const DEFAULT_REGISTRY: &str = "docker.io";

fn check_registry(registry: &str) -> Result<(), Unfit> {
    let (host, port) = match registry.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (registry, None),
    };
    let host_fits = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-'));
    if host_fits && port.is_none_or(|p| p.parse::<u16>().is_ok_and(|p| p > 0)) {
        Ok(())
    } else {
        Err(Unfit("image registry must be a host name with an optional port".into()))
    }
}

fn is_path_component(part: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends = part.as_bytes().first().zip(part.as_bytes().last()).is_some_and(|(a, z)| inner(*a) && inner(*z));
    ends && part.bytes().all(|b| inner(b) || matches!(b, b'.' | b'_' | b'-'))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= 128 && tag.bytes().next().is_some_and(word) && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

fn is_digest(digest: &str) -> bool {
    digest.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// Who a workload's first process runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Numeric user.
    pub uid: u32,
    /// Numeric group; the runtime's default when absent.
    pub gid: Option<u32>,
}

impl User {
    /// Parses `uid[:gid]`.
    ///
    /// # Errors
    /// [`Unfit`] when a part is not a number from 0 to [`limits::UID_MAX`].
    pub fn new(text: &str) -> Result<Self, Unfit> {
        let number = |part: &str| {
            let fits = !part.is_empty() && part.len() <= 10 && part.bytes().all(|b| b.is_ascii_digit());
            fits.then(|| part.parse::<u32>().ok()).flatten().filter(|n| u64::from(*n) <= limits::UID_MAX)
        };
        let parsed = match text.split_once(':') {
            Some((uid, gid)) => number(uid).zip(number(gid)).map(|(uid, gid)| Self { uid, gid: Some(gid) }),
            None => number(text).map(|uid| Self { uid, gid: None }),
        };
        parsed.ok_or_else(|| Unfit(format!("user must be uid or uid:gid, numbers from 0 to {}", limits::UID_MAX)))
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.gid {
            Some(gid) => write!(f, "{}:{gid}", self.uid),
            None => write!(f, "{}", self.uid),
        }
    }
}

/// A value that must not be shown: `Debug` hides it, and there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps a text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text, for the one who has to have it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A port of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Inside.
    pub container: u16,
    /// On the host; none means it is only reachable at the sandbox's address.
    pub host: Option<u16>,
    /// TCP unless said otherwise.
    pub protocol: Protocol,
}

/// A host directory or file inside the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// On the host; must lie under a root the node's configuration allows.
    pub source: String,
    /// Inside; absolute.
    pub target: String,
    /// Cannot be written to.
    pub read_only: bool,
}

/// Declares an enum whose variants have one spelling each, for the wire, the logs and the labels alike.
macro_rules! spelled {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$variant_meta])* $variant),+
        }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its one spelling.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text),+
                }
            }

            /// The value so spelled.
            pub fn parse(text: &str) -> Option<Self> {
                match text {
                    $($text => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

spelled!(
    /// Transport of a port.
    Protocol {
        /// TCP.
        Tcp = "tcp",
        /// UDP.
        Udp = "udp",
        /// SCTP.
        Sctp = "sctp",
    }
);

spelled!(
    /// When to pull an image.
    PullPolicy {
        /// Always ask the registry.
        Always = "always",
        /// Only when the node has no such image.
        IfNotPresent = "if-not-present",
        /// Never: an absent image is an error.
        Never = "never",
    }
);

spelled!(
    /// Whether a workload that ended is started again.
    RestartPolicy {
        /// Whatever its end.
        Always = "always",
        /// It stays ended.
        Never = "never",
        /// When it failed.
        OnFailure = "on-failure",
    }
);

spelled!(
    /// Where a workload stands.
    State {
        /// Accepted; not running yet, or again.
        Pending = "Pending",
        /// The runtime says its container runs.
        Running = "Running",
        /// Ended with exit code 0.
        Succeeded = "Succeeded",
        /// Ended otherwise, or never ran.
        Failed = "Failed",
    }
);

impl State {
    /// Whether nothing can happen to it any more.
    pub fn is_terminal(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed => true,
            Self::Pending | Self::Running => false,
        }
    }

    /// Whether `next` may follow. Staying is no transition, and always allowed.
    pub fn may_become(self, next: Self) -> bool {
        match (self, next) {
            (Self::Pending, Self::Running | Self::Failed | Self::Succeeded) => true,
            (Self::Running, Self::Pending | Self::Succeeded | Self::Failed) => true,
            (from, to) => from == to,
        }
    }
}

spelled!(
    /// What clients want of a workload.
    Desired {
        /// Gone, and forgotten.
        Deleted = "Deleted",
        /// Started once; its end is its own matter.
        Run = "Run",
        /// Ended, and remembered.
        Stopped = "Stopped",
    }
);

spelled!(
    /// What is being done to a workload right now.
    Phase {
        /// The image is on its way.
        Pulling = "Pulling",
        /// RunPodSandbox.
        CreatingSandbox = "CreatingSandbox",
        /// CreateContainer.
        Creating = "Creating",
        /// StartContainer.
        Starting = "Starting",
        /// StopContainer: the polite signal, then the kill.
        Stopping = "Stopping",
    }
);

spelled!(
    /// Why a workload is in its state.
    Reason {
        /// Ended with exit code 0.
        Completed = "Completed",
        /// CreateContainer failed.
        CreateFailed = "CreateFailed",
        /// Ended with another exit code.
        Error = "Error",
        /// The runtime does not offer the class's handler, or refused it.
        HandlerUnavailable = "HandlerUnavailable",
        /// Its health check failed too often.
        HealthCheckFailed = "HealthCheckFailed",
        /// The registry has no such image, or the node has not and may not pull.
        ImageNotFound = "ImageNotFound",
        /// The image could not be pulled.
        ImagePullFailed = "ImagePullFailed",
        /// The registry refused our credentials, or our lack of them.
        ImageUnauthorized = "ImageUnauthorized",
        /// The sandbox was not of the class asked for.
        IsolationMismatch = "IsolationMismatch",
        /// The node was not heard of for too long.
        NodeLost = "NodeLost",
        /// The node restarted under it.
        NodeRebooted = "NodeRebooted",
        /// The kernel killed it for its memory; only when the runtime says so.
        OomKilled = "OOMKilled",
        /// Policy forbids it.
        PolicyDenied = "PolicyDenied",
        /// The runtime did not answer.
        RuntimeUnavailable = "RuntimeUnavailable",
        /// The sandbox vanished under it.
        SandboxDied = "SandboxDied",
        /// Not Running by its deadline.
        StartDeadlineExceeded = "StartDeadlineExceeded",
        /// StartContainer failed.
        StartFailed = "StartFailed",
        /// Somebody stopped it.
        Stopped = "Stopped",
        /// Its time to live was over.
        TtlExpired = "TtlExpired",
        /// No node fits.
        Unschedulable = "Unschedulable",
    }
);

/// Capabilities that may be added: containerd's default set. Anything beyond is a way out of a shared kernel.
pub const CAPABILITIES_DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_rfc_1123_labels() {
        for good in ["a", "wl-123", "0", &"a".repeat(63)] {
            assert!(WorkloadId::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "..", "a\n", "é", &"a".repeat(64)] {
            assert!(WorkloadId::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn image_references_are_completed() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let check = |given: &str, full: &str| {
            // What is read again is the same.
            assert_eq!([given, full].map(|text| ImageRef::new(text).map(|i| i.0)), [Ok(full.to_owned()), Ok(full.to_owned())]);
        };
        check("busybox", "docker.io/library/busybox:latest");
        check("busybox:1.35", "docker.io/library/busybox:1.35");
        check("docker.io/busybox:1.35", "docker.io/library/busybox:1.35");
        check("index.docker.io/library/busybox:1.35", "docker.io/library/busybox:1.35");
        check("index.docker.io/me/busybox", "docker.io/me/busybox:latest");
        check("user/app", "docker.io/user/app:latest");
        check("ghcr.io/example/secure-app:1.0", "ghcr.io/example/secure-app:1.0");
        check("localhost/busybox:1.35", "localhost/busybox:1.35");
        check("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest");
        check(&format!("busybox@{digest}"), &format!("docker.io/library/busybox@{digest}"));
        check(&format!("busybox:1@{digest}"), &format!("docker.io/library/busybox:1@{digest}"));
    }

    #[test]
    fn bad_image_references_are_refused() {
        let long = "a".repeat(513);
        for bad in
            ["", "UPPER", "a b", "a:", "a:b:c", "a@sha256:12", "a//b", "/a", "a/", "host:0/a", "host:99999/a", "a@b@c", "-a", "a\n", &long]
        {
            assert!(ImageRef::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn users_are_numbers_the_kernel_agrees_on() {
        let check = |text: &str, uid, gid| assert_eq!(User::new(text), Ok(User { uid, gid }));
        check("0", 0, None);
        check("1000:100", 1000, Some(100));
        check("2147483647", 2_147_483_647, None);
        for bad in ["", "root", "-1", "+1", "1:", ":1", "2147483648", "4294967296", "1:2:3", "99999999999999999999"] {
            assert!(User::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn terminal_is_terminal() {
        for from in State::ALL {
            for to in State::ALL {
                if from.is_terminal() && from != to {
                    assert!(!from.may_become(*to), "{from} -> {to}");
                }
            }
        }
        assert!(State::Running.may_become(State::Pending));
        assert!(!State::Succeeded.may_become(State::Running));
    }
}
