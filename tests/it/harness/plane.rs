//! A control plane under test.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::thread;

use kakuri::net::Address;
use serde_json::Value;

use super::agent::{address_of, size, steady};
use super::daemon::{Daemon, PLANE, command};
use super::http::{Answer, Http};
use super::{Agent, Place, SOON_MS, half_written, until, within};

/// A running control plane.
pub struct Plane<'a> {
    place: &'a Place,
    daemon: Option<Daemon>,
    /// Where it listens.
    pub address: SocketAddr,
    flags: Vec<String>,
    environment: Vec<(String, String)>,
    /// Threads, descriptors that are no sockets, and sockets, when all nodes were ready and nobody was connected.
    idle: Option<[usize; 3]>,
}

impl<'a> Plane<'a> {
    /// Starts one that has these agents for nodes, and waits until it knows them.
    pub fn start(place: &'a Place, agents: &[&Agent<'_>], flags: &[&str]) -> Self {
        let mut plane = Self::start_now(place, agents, flags);
        plane.wait_until_ready();
        until("connections end", || plane.connections() == 0);
        plane.idle = Some(steady(|| plane.size()));
        plane
    }

    /// Starts one that may not know them yet.
    pub fn start_now(place: &'a Place, agents: &[&Agent<'_>], flags: &[&str]) -> Self {
        let data = place.dir.join("plane").display().to_string();
        let mut all = vec!["--listen".to_owned(), "127.0.0.1:0".into(), "--log-level".into(), "debug".into()];
        if !flags.contains(&"--data-dir") {
            all.extend(["--data-dir".into(), data]);
        }
        all.extend(agents.iter().flat_map(|agent| ["--node".to_owned(), format!("{}={}", agent.node, agent.address)]));
        all.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let (daemon, lines) = Daemon::start(PLANE, "plane", &place.dir.join(""), &all);
        let address = match lines.first().and_then(|line| address_of(line)) {
            Some(Address::Tcp(address)) => address,
            other => panic!("{other:?}"),
        };
        Self { place, daemon: Some(daemon), address, flags: all, environment: Vec::new(), idle: None }
    }

    /// The daemon itself.
    pub fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("it runs")
    }

    /// A connection of its own.
    pub fn http(&self) -> Http {
        Http::connect(self.address)
    }

    /// As a flag of the command line.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// One request on a connection of its own.
    pub fn ask(&self, method: &str, target: &str, body: Option<&Value>) -> Answer {
        let body = body.map(ToString::to_string).unwrap_or_default();
        self.http().ask(method, target, &["Connection: close", "Content-Type: application/json"], body.as_bytes())
    }

    pub fn get(&self, target: &str) -> Answer {
        self.ask("GET", target, None)
    }

    pub fn post(&self, target: &str, body: &Value) -> Answer {
        self.ask("POST", target, Some(body))
    }

    /// Posts a workload, which must be accepted, and waits until it left Pending.
    #[track_caller]
    pub fn run(&self, workload: &Value) -> Value {
        let answer = self.post(&format!("/workloads?wait_ms={SOON_MS}"), workload);
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer.json()
    }

    /// A workload, which must be known.
    #[track_caller]
    pub fn workload(&self, id: &str) -> Value {
        let answer = self.get(&format!("/workloads/{id}"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    }

    /// A workload when it ended.
    #[track_caller]
    pub fn ended(&self, id: &str) -> Value {
        let workload = self.get(&format!("/workloads/{id}?for=terminal&wait_ms={SOON_MS}")).json();
        assert!(workload["state"] == "Succeeded" || workload["state"] == "Failed", "{workload}");
        workload
    }

    /// Deletes a workload and waits until it is gone.
    #[track_caller]
    pub fn delete(&self, id: &str) {
        assert_eq!(self.ask("DELETE", &format!("/workloads/{id}"), None).status, 202);
        until("it is gone", || self.get(&format!("/workloads/{id}")).status == 404);
    }

    /// kill -9. [`Plane::again`] brings it back.
    pub fn kill(&mut self) {
        self.daemon.take().expect("it runs").kill();
    }

    /// SIGTERM; it must end with 0, in the time that a drain takes.
    pub fn terminate(&mut self) {
        let mut daemon = self.daemon.take().expect("it runs");
        daemon.signal("TERM");
        assert_eq!(daemon.wait(kakuri::limits::DRAIN_MS + 5000).code(), Some(0), "the control plane's exit code after SIGTERM");
    }

    /// Starts it again where it was.
    pub fn again(&mut self) {
        let mut command = command(PLANE);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.again_as(command);
    }

    /// Starts it again where it was, to die at a failpoint.
    pub fn again_to_die_at(&mut self, place: &str) {
        let mut command = command(PLANE);
        command.env("KAKURI_DIE_AT", place);
        self.again_as(command);
    }

    /// The same for a place that it may pass before it serves; whether it serves.
    pub fn try_again_to_die_at(&mut self, place: &str) -> bool {
        self.listen_as_before();
        let started = Daemon::try_start(PLANE, "plane", &self.place.dir.join(""), &self.flags, &[("KAKURI_DIE_AT", place)]);
        self.daemon = started.ok().map(|(daemon, _)| daemon);
        self.daemon.is_some()
    }

    /// Whether it was started, and nobody has waited for its end yet.
    pub fn is_started(&self) -> bool {
        self.daemon.is_some()
    }

    fn listen_as_before(&mut self) {
        assert!(self.daemon.is_none(), "it still runs");
        let at = self.flags.iter().position(|flag| flag == "--listen").expect("a usual flag");
        self.flags[at + 1] = self.address.to_string();
    }

    /// Starts it again where it was, by a command of the test's.
    pub fn again_as(&mut self, command: Command) {
        self.listen_as_before();
        self.daemon = Some(Daemon::start_as(command, "plane", &self.place.dir.join(""), &self.flags).0);
    }

    /// Sends it a signal.
    pub fn signal(&self, name: &str) {
        self.daemon.as_ref().expect("it runs").signal(name);
    }

    /// Whether it ended by itself.
    pub fn has_died(&mut self) -> bool {
        self.daemon().try_wait().is_some()
    }

    /// Waits for an end that something else brought about.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        self.daemon.take().expect("it runs").wait(SOON_MS)
    }

    /// Its data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.place.dir.join("plane")
    }

    /// Starts it anew with more in its environment.
    pub fn restart_with(&mut self, environment: Vec<(String, String)>) {
        self.terminate();
        self.environment = environment;
        self.again();
    }

    /// Waits until all its nodes are ready.
    pub fn wait_until_ready(&self) {
        until("all nodes are ready", || {
            self.get("/nodes").json()["items"].as_array().is_some_and(|all| all.iter().all(|n| n["ready"] == true))
        });
    }

    /// How many connections it serves now.
    pub fn connections(&self) -> usize {
        let threads = self.daemon.as_ref().map(Daemon::threads).unwrap_or_default();
        threads.iter().filter(|name| name.strip_prefix("http-").is_some_and(|n| n.parse::<u64>().is_ok())).count()
    }

    fn size(&self) -> [usize; 3] {
        size(self.daemon.as_ref().expect("it runs"))
    }
}

/// One request to a control plane that may die over it.
pub fn try_ask(address: SocketAddr, method: &str, target: &str, body: Option<&Value>) -> Option<Answer> {
    let body = body.map(ToString::to_string).unwrap_or_default();
    Http::try_connect(address)?.try_ask(method, target, &["Connection: close", "Content-Type: application/json"], body.as_bytes())
}

impl Drop for Plane<'_> {
    /// The leak check, and the end.
    fn drop(&mut self) {
        if thread::panicking() || self.daemon.is_none() {
            return;
        }
        let listed = self.get("/workloads?limit=500").json();
        for item in listed["items"].as_array().expect("items") {
            self.delete(item["id"].as_str().expect("an id"));
        }
        until("connections end", || self.connections() == 0);
        if let Some([threads, others, sockets]) = self.idle {
            // Idle connections to agents are kept, up to a limit.
            let most = [threads, others, sockets + kakuri::limits::NODE_POOL_MAX];
            let is_small = || self.size().iter().zip(most).all(|(now, most)| *now <= most).then_some(());
            let found = within(SOON_MS, is_small);
            let daemon = self.daemon.as_ref().expect("it runs");
            assert!(found.is_some(), "{:?} is more than {most:?}: {:?} {:?}", self.size(), daemon.threads(), daemon.descriptors());
        }
        assert_eq!(self.daemon().stop(), Some(0), "the control plane's exit code");
        assert_eq!(half_written(&self.data_dir()), [] as [std::path::PathBuf; 0], "files that were not finished");
    }
}
