//! What this node offers: CRI endpoints, the classes behind them, how they are, and what the machine has.
//!
//! Invariant: a class is offered only under a handler that is named, and that the runtime lists where it lists any.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::{AgentConfig, CRI_SOCKETS, ClassConfig};
use crate::cri::Client;
use crate::cri::runtime::{Class, Seen};
use crate::deadline::{Deadline, Stopwatch, Timestamp};
use crate::limits;
use crate::net::Stream;
use crate::report::Chain;
use crate::wire::agent::{Condition, Resources};
use crate::wire::containerd;
use crate::workload::Name;

/// The node.
pub struct Node {
    /// At least one; the first is the default.
    pub endpoints: Vec<Arc<Endpoint>>,
    configured: Vec<ClassConfig>,
    /// Memory and CPU, as configured or as the machine has.
    pub capacity: Resources,
    /// When the agent started.
    pub started_at: Timestamp,
}

/// One CRI runtime.
pub struct Endpoint {
    /// Its client.
    pub client: Client,
    /// Its socket, however the configuration spells it.
    pub socket: String,
    health: Mutex<Health>,
    /// Sandboxes that carry our labels and that this agent cannot read; not touched.
    unreadable: Mutex<BTreeSet<String>>,
}

/// What an endpoint last said.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// Name and version.
    pub runtime: Option<String>,
    /// The handlers it lists; `None` where it lists none, or was never heard.
    pub handlers: Option<Vec<String>>,
    /// RuntimeReady and NetworkReady, as it says.
    pub conditions: Vec<Condition>,
    /// When a relist last worked.
    pub listed_at: Option<Timestamp>,
    /// How long ago that was, by a clock that nobody sets.
    pub listed: Option<Stopwatch>,
    /// Why the last call did not work.
    pub error: Option<String>,
    /// It sends events, so relists may be rarer.
    pub has_events: bool,
}

/// A path without links, as far as it is there: a socket by the one name that does not change with how it is spelled. What it leads to
/// need not be there yet.
pub fn real(path: &Path) -> PathBuf {
    let known = |path: &Path, ancestor: &Path| Some((fs::canonicalize(ancestor).ok()?, path.strip_prefix(ancestor).ok()?.to_owned()));
    let parents = |path: &Path| {
        path.ancestors().skip(1).find_map(|ancestor| known(path, ancestor)).map_or_else(|| path.to_owned(), |(real, rest)| real.join(rest))
    };
    let mut real = parents(path);
    // As many as the kernel follows.
    for _ in 0..40 {
        match (fs::read_link(&real), real.parent()) {
            (Ok(target), Some(parent)) => real = parents(&parent.join(target)),
            _ => break,
        }
    }
    real
}

impl Endpoint {
    fn new(path: PathBuf) -> Arc<Self> {
        let socket = real(&path).display().to_string();
        Arc::new(Self { client: Client::new(path), socket, health: Mutex::default(), unreadable: Mutex::default() })
    }

    /// What it last said.
    pub fn health(&self) -> Health {
        self.lock().clone()
    }

    /// Whether it was listed since the agent started: before that, nobody knows what already runs.
    pub fn is_listed(&self) -> bool {
        self.lock().listed_at.is_some()
    }

    /// Whether it sends events.
    pub fn has_events(&self) -> bool {
        self.lock().has_events
    }

    /// Notes whether it sends events.
    pub fn set_events(&self, has_events: bool) {
        self.lock().has_events = has_events;
    }

    /// Never again touches a sandbox.
    pub fn leave_alone(&self, sandbox_id: String) {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).insert(sandbox_id);
    }

    /// A list less what is left alone.
    pub fn without_unreadable(&self, mut seen: Vec<Seen>) -> Vec<Seen> {
        let unreadable = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|s| !unreadable.contains(&s.sandbox_id));
        seen
    }

    /// Notes that a relist worked, or why not.
    pub fn note_relist(&self, result: Result<(), String>) {
        let mut health = self.lock();
        match result {
            Ok(()) => {
                if health.error.take().is_some() {
                    log::info!("runtime at {} answers again", self.client.endpoint().display());
                }
                (health.listed_at, health.listed) = (Some(Timestamp::now()), Some(Stopwatch::start()));
            }
            Err(error) => {
                if health.error.as_ref() != Some(&error) {
                    log::warn!("runtime at {}: {error}", self.client.endpoint().display());
                }
                health.error = Some(error);
            }
        }
    }

    /// Asks for version, conditions and handlers.
    pub fn refresh(&self) {
        let deadline = Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "status");
        let answer = self.client.version(deadline).and_then(|version| Ok((version, self.client.status(true, deadline)?)));
        let (version, status) = match answer {
            Ok(pair) => pair,
            Err(error) => return self.note_relist(Err(Chain(&error).to_string())),
        };
        let listed: Vec<String> = status.runtime_handlers.into_iter().map(|h| h.name).filter(|n| !n.is_empty()).collect();
        // containerd before 2.0 does not list its handlers, but shows its configuration.
        let handlers = if listed.is_empty() { status.info.get("config").and_then(|c| containerd::handlers(c)) } else { Some(listed) };
        let condition = |c: crate::cri::proto::RuntimeCondition| Condition {
            r#type: c.r#type,
            ok: c.status,
            message: if c.message.is_empty() { c.reason } else { c.message },
        };
        let mut health = self.lock();
        health.runtime = Some(format!("{} {}", version.runtime_name, version.runtime_version));
        health.conditions = status.status.unwrap_or_default().conditions.into_iter().map(condition).collect();
        health.handlers = handlers;
    }

    fn lock(&self) -> MutexGuard<'_, Health> {
        // Held for copying only; the data is whole at every moment.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Node {
    /// The node of this configuration.
    ///
    /// # Errors
    /// In words, when there is no CRI socket to speak to.
    pub fn new(config: &AgentConfig) -> Result<Self, NoRuntime> {
        let found = || CRI_SOCKETS.iter().map(PathBuf::from).find(|p| p.exists());
        let default = config.cri_endpoint.clone().or_else(found);
        let mut paths: Vec<PathBuf> = default.into_iter().collect();
        for path in config.classes.iter().filter_map(|class| class.endpoint.clone()) {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
        if paths.is_empty() {
            return Err(NoRuntime);
        }
        let capacity = Resources {
            memory_mb: config.memory_mb.or_else(machine_memory_mb).unwrap_or(0),
            cpu_millicores: config.cpu_millicores.unwrap_or_else(machine_cpu_millicores),
            workloads: limits::AGENT_WORKLOADS_MAX as u64,
        };
        let endpoints = paths.into_iter().map(Endpoint::new).collect();
        Ok(Self { endpoints, configured: config.classes.clone(), capacity, started_at: Timestamp::now() })
    }

    /// The classes on offer.
    pub fn classes(&self) -> Vec<Offer> {
        let derived;
        let configured = if self.configured.is_empty() {
            derived = self.endpoints.first().map(|e| derive_classes(e)).unwrap_or_default();
            &derived
        } else {
            &self.configured
        };
        configured.iter().filter_map(|config| self.offer(config)).collect()
    }

    /// A class by name.
    pub fn class(&self, name: &Name) -> Option<Offer> {
        self.classes().into_iter().find(|offer| offer.class.name == *name)
    }

    /// Whether a runtime has a handler; unknown where it lists none.
    pub fn has_handler(&self, endpoint: usize, handler: &str) -> Option<bool> {
        self.endpoints.get(endpoint)?.lock().handlers.as_ref().map(|handlers| handlers.iter().any(|h| h == handler))
    }

    fn offer(&self, config: &ClassConfig) -> Option<Offer> {
        let endpoint = match &config.endpoint {
            None => 0,
            Some(path) => self.endpoints.iter().position(|e| e.client.endpoint() == path)?,
        };
        let class = Class {
            name: config.name.clone(),
            handler: config.handler.clone(),
            own_kernel: config.own_kernel,
            annotations: config.annotations.clone(),
            overhead_mb: config.overhead_mb,
            memory_mb_min: config.memory_mb_min,
            sandbox_ms_max: config.start_timeout_ms,
        };
        Some(Offer { available: self.has_handler(endpoint, &class.handler), class, endpoint })
    }
}

/// A class this node offers.
#[derive(Clone, Debug)]
pub struct Offer {
    /// What it is.
    pub class: Class,
    /// The runtime that makes it, by its place among the endpoints.
    pub endpoint: usize,
    /// Whether that runtime lists its handler; unknown where it lists none.
    pub available: Option<bool>,
}

/// Classes for a node whose configuration names none: the conventional names for the handlers the runtime lists.
fn derive_classes(endpoint: &Endpoint) -> Vec<ClassConfig> {
    let named = |name: &str, handler: &str| Name::new(name).ok().map(|name| ClassConfig::new(name, handler.to_owned(), None));
    if CRI_SOCKETS.first().is_some_and(|edera| endpoint.client.endpoint() == Path::new(edera)) {
        return named("edera-zone", "edera").into_iter().collect();
    }
    let handlers = endpoint.health().handlers.unwrap_or_default();
    let has = |handler: &&str| handlers.iter().any(|h| h == handler);
    let kata = handlers.iter().map(String::as_str).filter(|h| h.starts_with("kata")).min();
    [("native", ["runc", "crun"].into_iter().find(has)), ("gvisor", ["runsc", "gvisor"].into_iter().find(has)), ("kata", kata)]
        .into_iter()
        .filter_map(|(name, handler)| named(name, handler?))
        .collect()
}

/// There is no CRI socket to speak to.
#[derive(Debug)]
pub struct NoRuntime;

impl std::fmt::Display for NoRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no container runtime: none of {} exists; name its CRI socket with --cri-endpoint unix:///PATH", CRI_SOCKETS.join(", "))
    }
}

impl std::error::Error for NoRuntime {}

/// The kernel release of this machine.
pub fn host_kernel() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Whether the machine's cgroups are the unified hierarchy, where CRI can limit processes.
pub fn has_cgroup_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// proc_meminfo(5): `MemTotal:  24684092 kB`.
fn machine_memory_mb() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb / 1024)
}

fn machine_cpu_millicores() -> u64 {
    std::thread::available_parallelism().map_or(1000, |n| n.get() as u64 * 1000)
}

/// Handles on the sockets of streams that wait for ever, one for each endpoint, so that stopping can end them.
#[derive(Default)]
pub struct Stoppers(Mutex<(bool, BTreeMap<usize, Stream>)>);

impl Stoppers {
    /// Sets or forgets the stream of an endpoint; when stopping has begun, it is ended at once.
    pub fn set(&self, endpoint: usize, stream: Option<Stream>) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (is_stopping, streams) = &mut *inner;
        match stream {
            Some(stream) if *is_stopping => stream.shutdown(std::net::Shutdown::Both),
            Some(stream) => drop(streams.insert(endpoint, stream)),
            None => drop(streams.remove(&endpoint)),
        }
    }

    /// Ends all, and those still to come.
    pub fn stop(&self) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.0 = true;
        for stream in std::mem::take(&mut inner.1).into_values() {
            stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_has_one_name_however_it_is_spelled() {
        let dir = std::env::temp_dir().join(format!("kakuri-node-{}-{}", std::process::id(), crate::report::random_id()));
        let here = fs::canonicalize(std::env::temp_dir()).expect("there").join(dir.file_name().expect("a name"));
        fs::create_dir_all(dir.join("run")).expect("made");
        std::os::unix::fs::symlink("run", dir.join("var-run")).expect("linked");
        // Not there yet, as a runtime's that is started later.
        for path in ["run/cri.sock", "var-run/cri.sock", "run/../var-run/./cri.sock"] {
            assert_eq!(real(&dir.join(path)), here.join("run/cri.sock"), "{path}");
        }
        assert_eq!(real(&dir.join("var-run/later/cri.sock")), here.join("run/later/cri.sock"));
        std::os::unix::fs::symlink("../run/later.sock", dir.join("run/link.sock")).expect("linked");
        assert_eq!(real(&dir.join("var-run/link.sock")), here.join("run/later.sock"));
        std::os::unix::fs::symlink("loop.sock", dir.join("run/loop.sock")).expect("linked");
        assert_eq!(real(&dir.join("run/loop.sock")), here.join("run/loop.sock"));
        fs::remove_dir_all(&dir).expect("removed");
    }
}
