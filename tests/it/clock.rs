//! The clock on the wall jumps a year ahead, and a year back: whatever has to last a while lasts that long, by the clock that does
//! not jump. The daemons run with libfaketime (Debian's `libfaketime`), whose time is in a file.

use std::path::{Path, PathBuf};

use kakuri::deadline::{Stopwatch, Timestamp};
use kakuri::workload::{Reason, State};
use serde_json::json;

use crate::harness::place::with;
use crate::harness::{Agent, Need, Place, Plane, skip, until};

const YEAR_MS: u64 = 365 * 86_400_000;

/// A clock that a test sets.
struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// One that is right; says so where there is none.
    fn new(place: &Place) -> Option<Self> {
        // Debian has a directory for each architecture; others have none.
        let roots = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
        let mut libraries = roots.chain(["/usr/lib".into()]).map(|root| root.join("faketime/libfaketimeMT.so.1"));
        let Some(library) = libraries.find(|path| path.exists()) else {
            skip(Need::Clock, "no libfaketimeMT.so.1, which is in Debian's libfaketime");
            return None;
        };
        let file = place.dir.write("clock", "+0\n");
        Some(Self { library, file })
    }

    fn environment(&self) -> Vec<(String, String)> {
        let path = |path: &Path| path.display().to_string();
        let pairs = [
            ("LD_PRELOAD", path(&self.library)),
            ("FAKETIME_TIMESTAMP_FILE", path(&self.file)),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
            ("DONT_FAKE_MONOTONIC", "1".into()),
            ("NO_FAKE_STAT", "1".into()),
        ];
        pairs.map(|(name, value)| (name.to_owned(), value)).to_vec()
    }

    /// Lets it jump by so many years.
    fn jump(&self, years: &str) {
        let new = self.file.with_extension("new");
        std::fs::write(&new, format!("{years}\n")).expect("written");
        std::fs::rename(&new, &self.file).expect("renamed");
    }
}

impl Drop for Clock {
    /// A daemon that was killed leaves what libfaketime shares with its children.
    fn drop(&mut self) {
        for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name.rsplit_once('_').filter(|(of, _)| of.contains("faketime")).map(|(_, pid)| pid);
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = std::fs::remove_file(entry.path()); // Another test may have been quicker.
            }
        }
    }
}

/// How far a time is from the right one, to the nearest year.
fn years(time: Timestamp) -> i64 {
    let (now, time) = (i64::try_from(Timestamp::now().as_millis()), i64::try_from(time.as_millis()));
    let year = i64::try_from(YEAR_MS).expect("a year");
    let (now, time) = (now.expect("a time"), time.expect("a time"));
    (time - now + (time - now).signum() * year / 2) / year
}

/// The time on the last line of a daemon's log.
fn last_line_of(place: &Place, daemon: &str) -> Option<Timestamp> {
    let log = std::fs::read_to_string(place.dir.join(&format!("{daemon}.log"))).ok()?;
    Timestamp::parse(log.lines().last()?.strip_prefix("ts=")?.split(' ').next()?)
}

fn jumps(years_text: &str, expect: i64) {
    let place = Place::sim(&[]);
    // Before the daemons, so that it goes after them.
    let Some(clock) = Clock::new(&place) else { return };
    let mut agent = place.agent(&[]);
    agent.terminate();
    agent.environment = clock.environment();
    agent.again();
    let mut plane = Plane::start(&place, &[&agent], &[]);
    plane.restart_with(clock.environment());
    plane.wait_until_ready();
    let post = |id: &str, command: &[&str], more| {
        let workload = with(with(place.workload(id, command), json!({"stop_grace_ms": 0})), more);
        assert_eq!(plane.post("/workloads?wait_ms=20000", &workload).status, 201);
    };
    let ttl = Stopwatch::start();
    post("brief", &["sleep", "1000"], json!({"ttl_ms": 4000}));
    post("long", &["sleep", "1000"], json!({"ttl_ms": 120_000}));
    post("forever", &["sleep", "1000"], json!({}));
    let again = json!({"restart_policy": "always", "restart_backoff_ms": 300, "restart_backoff_max_ms": 300});
    post("again", &["sh", "-c", "sleep 0.1; exit 1"], again);
    let slow = with(place.workload("slow", &["sleep", "1000"]), json!({"image": "localhost/slow-2000:1", "start_deadline_ms": 60_000}));
    assert_eq!(plane.post("/workloads", &slow).status, 201);
    let restarts = |agent: &Agent<'_>| agent.status("again").1.restarts;
    let before = restarts(&agent);

    clock.jump(years_text);
    until("the new time is told", || years(agent.status("forever").1.observed_at) == expect);
    // And by the control plane, whose clock is another: what it tells of a workload is its agent's time.
    let of_plane = || {
        // A refusal is a line of its log.
        assert_eq!(plane.get("/workloads/nobody").status, 404);
        last_line_of(&place, "plane").map(years)
    };
    until("the control plane has the new time", || of_plane() == Some(expect));
    assert!(agent.node().ready, "{:?}", agent.node().conditions);
    until("the pauses of restarts go on", || restarts(&agent) > before + 2);
    assert_eq!(agent.settle(&slow).0, State::Running, "no start deadline passed");
    let seen = agent.status("forever").1.observed_at;
    until("what is told stays fresh", || agent.status("forever").1.observed_at > seen);
    let (state, status) = agent.ended("brief");
    assert_eq!((state, status.reason), (State::Failed, Some(Reason::TtlExpired)), "{status:?}");
    assert!(ttl.elapsed_ms() >= 4000, "its time to live was cut short: {} ms", ttl.elapsed_ms());
    until("the control plane has heard of it", || plane.workload("brief")["status"]["reason"] == "TtlExpired");
    post("later", &["sh", "-c", "exit 3"], json!({}));
    assert_eq!(plane.ended("later")["status"]["exit_code"], 3);
    // Those who come back to a clock that jumped.
    agent.kill();
    agent.again();
    plane.wait_until_ready();
    for id in ["long", "forever", "slow"] {
        assert_eq!(agent.status(id).0, State::Running, "{id}: {:?}", agent.status(id).1);
        assert_eq!(plane.workload(id)["state"], "Running", "{id}");
    }
    clock.jump("+0");
    until("the old time is told", || years(agent.status("forever").1.observed_at) == 0);
    until("by the control plane too", || of_plane() == Some(0));
    until("and heard", || plane.workload("forever")["status"]["observed_at"].as_str().and_then(Timestamp::parse).map(years) == Some(0));
    let before = restarts(&agent);
    until("the pauses of restarts go on", || restarts(&agent) > before + 2);
    for id in ["long", "forever", "slow"] {
        assert_eq!(agent.status(id).0, State::Running, "{id}: {:?}", agent.status(id).1);
    }
}

#[test]
fn a_year_ahead_ends_nothing_early() {
    jumps("+1y", 1);
}

#[test]
fn a_year_back_makes_nothing_wait() {
    jumps("-1y", -1);
}
