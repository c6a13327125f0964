//! What all tests here share: real daemons as child processes, clients that send exactly what they are told, and a look for
//! anything left behind at the end of each test.
//!
//! A [`Place`] is a runtime and a directory: the simulator, or a real one (`KAKURI_LAB`). An [`Agent`] and a [`Plane`] are daemons
//! in it. Each ends with its scope: workloads are deleted, threads and descriptors counted, the daemon is stopped and its exit code
//! looked at, and the runtime must have nothing of ours. A test that fails keeps its directory and shows the daemons' logs.
//!
//! Invariant: a daemon never outlives its test: its stdin is a pipe the test holds, and it runs with `--until-eof`.
//! Invariant: nothing waits a fixed time for something to happen; [`eventually`] is the only wait.

pub mod agent;
pub mod daemon;
pub mod dice;
pub mod http;
pub mod line;
pub mod place;
pub mod plane;

pub use agent::{Agent, expect_error, expect_status};
pub use http::Http;
pub use line::Line;
pub use place::Place;
pub use plane::Plane;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use kakuri::deadline::Deadline;
use kakuri::report::clip;

/// Long enough for anything that should happen at once, on a machine that is busy with other tests.
pub const SOON_MS: u64 = 20_000;

/// Runs each scenario on the simulator (`sim::`), and on a real runtime where there is one (`lab::`).
#[macro_export]
macro_rules! scenarios {
    ($($name:ident)+) => {
        mod sim {
            $(#[test] fn $name() { super::$name(&$crate::harness::Place::sim(&[])); })+
        }
        mod lab {
            $(#[test] fn $name() { $crate::harness::Place::with_lab(super::$name); })+
        }
    };
}

/// What a test may need that a machine may lack.
#[derive(Clone, Copy)]
pub enum Need {
    /// A clock that can be set for one process: libfaketime.
    Clock,
    /// A real container runtime, with all that `scripts/lab` and `scripts/test` give it.
    Lab,
    /// Mount namespaces, and root in them.
    Mounts,
    /// No container runtime in any of the usual places.
    NoRuntime,
    /// A Python that speaks gRPC.
    Python,
}

impl Need {
    fn name(self) -> &'static str {
        match self {
            Self::Clock => "clock",
            Self::Lab => "lab",
            Self::Mounts => "mounts",
            Self::NoRuntime => "no-runtime",
            Self::Python => "python",
        }
    }
}

/// Says that the test is left out, and for want of what. libtest shows nobody what a test that passed said, so it is said in the file
/// that `KAKURI_SKIPS` names too, which `scripts/test` reads. What `KAKURI_NO_SKIP` names (words, or `all`) is there, says whoever
/// set it; then there is no reason to leave anything out, and a test that does has failed.
pub fn skip(need: Need, why: &str) {
    let (thread, name) = (thread::current(), need.name());
    let test = thread.name().unwrap_or("a test");
    let none = std::env::var("KAKURI_NO_SKIP").unwrap_or_default();
    let is_there = none.split_whitespace().any(|word| word == name || word == "all");
    assert!(!is_there, "{test} would be skipped, and {name} is said to be there: {why}");
    println!("SKIPPED {test}: {name}: {why}");
    if let Some(path) = std::env::var_os("KAKURI_SKIPS").map(PathBuf::from) {
        let file = fs::OpenOptions::new().create(true).append(true).open(&path);
        // One write, so that lines of tests side by side stay whole.
        let written = file.and_then(|mut file| file.write_all(format!("{name}\t{test}\t{why}\n").as_bytes()));
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// Whether this machine lets us mount a file system of our own, which takes root.
pub fn can_mount() -> bool {
    std::process::Command::new("unshare").args(["-m", "true"]).output().is_ok_and(|output| output.status.success())
}

/// Asks until there is an answer.
pub fn eventually<T>(what: &str, ms: u64, look: impl FnMut() -> Option<T>) -> T {
    within(ms, look).unwrap_or_else(|| panic!("{what}: not within {ms} ms"))
}

/// Asks until there is an answer, or the time is over. The one poll of these tests: what is waited for is in other processes.
pub fn within<T>(ms: u64, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Deadline::within_ms(ms, "eventually");
    loop {
        match look() {
            None if deadline.left().is_ok() => thread::sleep(Duration::from_millis(5)),
            found => return found,
        }
    }
}

/// Asks until the answer is yes.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    eventually(what, SOON_MS, || is_so().then_some(()));
}

/// A number no other test has.
pub fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A directory of one test: gone when the test was good, kept and shown when not.
pub struct Dir(PathBuf);

impl Dir {
    /// A new one. Its name is short, because Unix sockets live in it.
    pub fn new() -> Self {
        let path = std::env::temp_dir().join(format!("kt-{}", unique()));
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self(path)
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file of it that nobody else may read.
    pub fn secret(&self, name: &str, text: &str) -> PathBuf {
        let path = self.write(name, text);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&path, mode).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path
    }

    /// Writes a file of it.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if !thread::panicking() {
            fs::remove_dir_all(&self.0).unwrap_or_else(|error| panic!("{}: {error}", self.0.display()));
            return;
        }
        println!("\nevidence is kept in {}", self.0.display());
        let logs = fs::read_dir(&self.0).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut logs: Vec<PathBuf> = logs.filter(|path| path.extension().is_some_and(|e| e == "log")).collect();
        logs.sort();
        logs.iter().for_each(|path| show_end(path));
    }
}

/// Files in a directory of a daemon, and below it, that were to be replaced or renamed and were not.
pub fn half_written(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "new" || extension == "tmp") {
            found.push(path);
        } else if path.is_dir() {
            found.extend(half_written(&path));
        }
    }
    found
}

/// A value for the words of a panic: as much of it as one wants to read.
pub fn brief(value: &impl std::fmt::Debug) -> String {
    clip(format!("{value:?}"), 1500)
}

fn show_end(path: &Path) {
    const LINES: usize = 40;
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    println!("--- {} (the last {LINES} of {} lines)", path.display(), lines.len());
    for line in lines.iter().skip(lines.len().saturating_sub(LINES)) {
        println!("{}", clip((*line).to_owned(), 400));
    }
}
