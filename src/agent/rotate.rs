//! Keeps the logs of all workloads within their bounds: one thread, no matter how many there are.
//!
//! ```text
//!            the runtime writes           rename             the runtime is asked to open A.log anew
//!  A.log  ───────────────────►  A.log   ─────────►  A.log.N  ───────────────────────────────────────►  A.log.N   A.log
//!                                                      │  no answer, or we died: A.log is missing,
//!                                                      └─ the runtime goes on in A.log.N, and is asked again
//! ```
//!
//! Three bounds, the first to be met first: a workload's own ([`LogLimits::file_bytes`], [`LogLimits::files`]), that of all logs
//! together ([`LogLimits::total_bytes`]), and the space that logs leave to others on their file system, to the agent's journal above
//! all ([`LogLimits::reserve_bytes`]). For the last two, rotated files go first, the oldest of all workloads before the others, and
//! then the largest of the files that workloads last wrote to is emptied, and the next: that needs no runtime that answers, and no
//! space. Runtimes append, so they go on at its new end.
//!
//! Runtimes are asked by a thread of its own ([`reopen_loop`]): a call may take its whole time, and the bounds do not wait for it.
//!
//! How far a bound is exceeded depends on what a workload can write between two looks. A log that grows is looked at when it may be
//! half way to its bound, but at least [`limits::LOG_CHECK_MS_MIN`] later; one that was quiet before, after [`LogLimits::check_ms`], and
//! up to [`limits::LOG_QUIET_CHECKS_MAX`] times that when it stays so.
//!
//! Invariant: nothing is removed before its space is given back, so a reader that has it open holds no space.
//! Invariant: only directories that bear this node's mark are touched.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::Agent;
use super::logs::files::{self, Files, Name, space};
use super::registry::Known;
use super::work;
use crate::config::LogLimits;
use crate::deadline::{Deadline, Stopwatch, Timestamp};
use crate::failpoint;
use crate::limits;
use crate::report::Chain;
use crate::wire::agent::Condition;
use crate::workload::{State, WorkloadId};

/// The bounds of logs, and what was done to keep them.
pub struct Rotation {
    limits: LogLimits,
    facts: Mutex<Facts>,
    asks: (Sender<Ask>, Receiver<Ask>),
    /// Of those that were asked; there is room for every one.
    answers: (Sender<Answer>, Receiver<Answer>),
}

/// That a runtime is to open a workload's log anew.
struct Ask {
    id: WorkloadId,
    endpoint: usize,
    container_id: String,
}

/// Whether it did.
struct Answer {
    id: WorkloadId,
    is_open: bool,
}

#[derive(Clone, Debug, Default)]
struct Facts {
    /// Bytes free where the logs are, and bytes that should be; unknown before the first look.
    space: Option<(u64, u64)>,
    dropped: Dropped,
    dropped_at: Option<Timestamp>,
}

/// What was removed although its workload had not too much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Dropped {
    files: u64,
    bytes: u64,
}

impl Rotation {
    /// Nothing done yet.
    pub fn new(bounds: LogLimits) -> Self {
        let (asks, answers) = (bounded(limits::LOG_REOPENS_MAX), bounded(limits::LOG_REOPENS_MAX));
        Self { limits: bounds, facts: Mutex::default(), asks, answers }
    }

    /// Whether there is the space that logs should leave, and what was dropped for its sake.
    pub fn condition(&self) -> Option<Condition> {
        let Facts { space, dropped, dropped_at } = self.lock().clone();
        let (free, reserve) = space?;
        let mut message = format!("{} MiB free where the logs are, {} MiB wanted", free >> 20, reserve >> 20);
        if let Some(at) = dropped_at {
            let Dropped { files, bytes } = dropped;
            message.push_str(&format!("; {files} log files of {} MiB dropped for want of space, last at {at}", bytes >> 20));
        }
        Some(Condition { r#type: "DiskSpace".into(), ok: free >= reserve, message })
    }

    fn lock(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rotates until the agent stops.
pub fn rotate_loop(agent: &Agent) {
    let mut keeper = Keeper {
        agent,
        limits: agent.rotation.limits,
        mark: work::mark(agent),
        tracks: BTreeMap::new(),
        listed: None,
        listed_version: None,
        asked: 0,
        hopeless: None,
        unsaid: Dropped::default(),
        said: None,
    };
    loop {
        let wait_ms = keeper.pass();
        select! {
            recv(agent.rotation.answers.1) -> answer => answer.into_iter().for_each(|answer| keeper.note_answer(&answer)),
            recv(agent.stop) -> _ => return,
            default(Duration::from_millis(wait_ms)) => {}
        }
    }
}

/// Asks runtimes to open log files anew, one after the other, until the agent stops.
pub fn reopen_loop(agent: &Agent) {
    // Of runtimes that did not answer: until when they are asked nothing.
    let mut pauses: BTreeMap<usize, Deadline> = BTreeMap::new();
    loop {
        let ask = select! {
            recv(agent.rotation.asks.1) -> ask => ask,
            recv(agent.stop) -> _ => return,
        };
        let Ok(Ask { id, endpoint, container_id }) = ask else { return };
        let deadline = Deadline::within_ms(limits::LOG_REOPEN_MS_MAX, "log rotation");
        let mut is_open = false;
        if is_due(pauses.get(&endpoint).copied()) {
            match agent.endpoint(endpoint).client.reopen_container_log(&container_id, deadline) {
                Ok(()) => {
                    failpoint::pass("agent-log-reopen-after");
                    is_open = true;
                }
                Err(error) => {
                    // It may just have ended; the runtime goes on in the old file if it has not.
                    log::debug!("workload {id}: its log was not opened anew: {}", Chain(&error));
                    if deadline.left().is_err() {
                        pauses.insert(endpoint, Deadline::within_ms(limits::LOG_REOPEN_PAUSE_MS, "log rotation"));
                    }
                }
            }
        }
        let _ = agent.rotation.answers.0.try_send(Answer { id, is_open }); // There is room for all that were asked.
    }
}

struct Keeper<'a> {
    agent: &'a Agent,
    limits: LogLimits,
    mark: String,
    tracks: BTreeMap<WorkloadId, Track>,
    /// Until when the list of workloads is good.
    listed: Option<Deadline>,
    /// The registry's version when that was made.
    listed_version: Option<u64>,
    /// Asks without an answer.
    asked: usize,
    /// There is nothing more to drop: until when that is taken for granted.
    hopeless: Option<Deadline>,
    /// Dropped since that was last logged.
    unsaid: Dropped,
    said: Option<Stopwatch>,
}

/// A workload's log, as last looked at.
struct Track {
    owner: Known,
    /// Of its files.
    sizes: BTreeMap<Name, u64>,
    /// What it last wrote to, and how much was in it when.
    last: Option<(Name, u64, Stopwatch)>,
    /// Bytes a second that it writes.
    pace: u64,
    /// Looks in a row that found nothing new.
    quiet: u64,
    /// When to look again.
    due: Option<Deadline>,
    /// The runtime is being asked to open a file anew.
    is_asked: bool,
    /// The runtime did not open a file anew; when to ask again.
    retry: Option<Deadline>,
    /// Its directory cannot be read, and that was logged.
    is_broken: bool,
}

impl Track {
    fn new(owner: Known) -> Self {
        Self { owner, sizes: BTreeMap::new(), last: None, pace: 0, quiet: 0, due: None, is_asked: false, retry: None, is_broken: false }
    }

    fn is_running(&self) -> bool {
        self.owner.state == State::Running
    }

    fn bytes(&self) -> u64 {
        self.sizes.values().sum()
    }

    /// Forgets what is known of its files.
    fn forget(&mut self) {
        self.sizes.clear();
        self.last = None;
        self.due = None;
    }

    /// What it writes to, if it has not written since the last look: most have not, and then one look at one file is enough.
    fn unchanged(&self, dir: &Path) -> Option<(Name, u64)> {
        let (name, bytes, _) = self.last.as_ref().filter(|(name, ..)| name.is_live())?;
        let facts = Files::open(dir).ok().flatten().and_then(|files| files.facts(*name).ok().flatten());
        facts.filter(|facts| facts.bytes == *bytes).map(|facts| (*name, facts.bytes))
    }

    /// Notes what is in the file it writes to, and how fast that grew.
    fn measure(&mut self, name: Name, bytes: u64) {
        if let Some((before, had, watch)) = &self.last {
            let grown = bytes.saturating_sub(if *before == name { *had } else { 0 });
            let pace = grown.saturating_mul(1000) / watch.elapsed_ms().max(1);
            // Who wrote fast a moment ago may do it again.
            self.pace = pace.max(self.pace / 2);
        }
        self.quiet = if self.pace == 0 { self.quiet + 1 } else { 0 };
        self.last = Some((name, bytes, Stopwatch::start()));
    }
}

fn is_due(deadline: Option<Deadline>) -> bool {
    deadline.is_none_or(|deadline| deadline.left().is_err())
}

/// When something that grows at this pace may be half way through this room.
fn half_way_ms(room: u64, pace: u64, ms_max: u64) -> u64 {
    let ms = room.saturating_mul(500).checked_div(pace).unwrap_or(ms_max);
    ms.clamp(limits::LOG_CHECK_MS_MIN.min(ms_max), ms_max)
}

impl Keeper<'_> {
    /// Looks at what is due; how long until something is again.
    fn pass(&mut self) -> u64 {
        let check_ms = self.limits.check_ms;
        if is_due(self.listed) {
            let version = self.agent.registry.version();
            if self.listed_version != Some(version) {
                self.list();
                self.listed_version = Some(version);
            }
            self.listed = Some(Deadline::within_ms(check_ms, "logs"));
        }
        let due: Vec<WorkloadId> = self.tracks.iter().filter(|(_, track)| is_due(track.due)).map(|(id, _)| id.clone()).collect();
        let mut watch = Stopwatch::start();
        for id in due {
            if self.agent.is_stopping() {
                return 0;
            }
            self.look(&id);
            // A disk that is slow is not less full.
            if watch.elapsed_ms() >= check_ms {
                self.leave_space();
                watch = Stopwatch::start();
            }
        }
        let total: u64 = self.tracks.values().map(Track::bytes).sum();
        if let Some(excess) = total.checked_sub(self.limits.total_bytes).filter(|excess| *excess > 0) {
            self.drop_logs(excess);
        }
        let room_ms = self.leave_space();
        let waits = self.tracks.values().filter_map(|track| track.due).chain(self.listed);
        let wait_ms = waits.map(|due| due.left().map_or(0, |left| u64::try_from(left.as_millis()).unwrap_or(check_ms))).min();
        wait_ms.unwrap_or(check_ms).min(room_ms).clamp(limits::LOG_CHECK_MS_MIN.min(check_ms), check_ms)
    }

    /// Takes up who is new, and lets go who is gone.
    fn list(&mut self) {
        let mut former = std::mem::take(&mut self.tracks);
        for owner in self.agent.registry.known() {
            let id = owner.id.clone();
            let mut track = match former.remove(&id) {
                Some(track) if track.owner.uid == owner.uid => track,
                Some(_) | None => Track::new(owner.clone()),
            };
            let is_changed = (track.owner.state, &track.owner.made) != (owner.state, &owner.made);
            if is_changed {
                track.due = None;
                track.retry = None;
                track.last = None;
            }
            track.owner = owner;
            self.tracks.insert(id, track);
        }
    }

    fn look(&mut self, id: &WorkloadId) {
        let Some(mut track) = self.tracks.remove(id) else { return };
        let due_ms = match self.tend(&mut track) {
            Ok(due_ms) => {
                track.is_broken = false;
                due_ms
            }
            // It was just deleted.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.limits.check_ms,
            Err(error) => {
                if !std::mem::replace(&mut track.is_broken, true) {
                    log::warn!("workload {id}: cannot keep its log within its bounds: {error}");
                }
                self.limits.check_ms
            }
        };
        track.due = Some(Deadline::within_ms(due_ms, "logs"));
        self.tracks.insert(id.clone(), track);
    }

    /// Keeps one workload's log within its own bounds; when to look again.
    fn tend(&mut self, track: &mut Track) -> io::Result<u64> {
        let LogLimits { file_bytes, files: count, check_ms, .. } = self.limits;
        // An ended workload writes no more.
        let idle_ms = if track.is_running() { check_ms } else { limits::LOG_CHECK_MS_MAX };
        let dir = self.agent.log_dir(&track.owner.id, &track.owner.uid);
        if let Some((name, bytes)) = track.unchanged(&dir).filter(|(_, bytes)| *bytes < file_bytes) {
            track.measure(name, bytes);
            let ms_max = if track.is_running() { check_ms * track.quiet.clamp(1, limits::LOG_QUIET_CHECKS_MAX) } else { idle_ms };
            return Ok(half_way_ms(file_bytes - bytes, track.pace, ms_max));
        }
        let Some(files) = ours(&dir, &self.mark)? else {
            track.forget();
            return Ok(idle_ms);
        };
        let mut names = files.names()?;
        let Some(last) = names.last().copied() else { return Ok(idle_ms) };
        let mut bytes = files.facts(last)?.map_or(0, |facts| facts.bytes);
        track.measure(last, bytes);
        let workload_bytes = file_bytes.saturating_mul(count);
        let mut room = file_bytes.saturating_sub(bytes);
        if track.is_running() && (room == 0 || !last.is_live()) {
            self.rotate(track, &files, &names)?;
            // Until its runtime opens the new file it goes on in the old one.
            room = workload_bytes.saturating_sub(bytes);
            if room == 0 {
                let emptied = files.start_over()?;
                self.note(Dropped { files: 1, bytes: emptied });
            }
            names = files.names()?;
            let newest = names.last().copied().unwrap_or(last);
            bytes = files.facts(newest)?.map_or(0, |facts| facts.bytes);
            track.last = Some((newest, bytes, Stopwatch::start()));
        }
        track.sizes = sizes(&files, &names, &track.sizes)?;
        prune(&files, &mut track.sizes, count, workload_bytes)?;
        Ok(if track.is_running() { half_way_ms(room, track.pace, check_ms) } else { idle_ms })
    }

    /// Renames what a workload writes to, where that was not done before, and has its runtime asked to open a new file.
    fn rotate(&mut self, track: &mut Track, files: &Files, names: &[Name]) -> io::Result<()> {
        let Some((last, (_, container_id))) = names.last().zip(track.owner.made.as_ref()) else { return Ok(()) };
        let is_healthy = || self.agent.endpoint(track.owner.endpoint).health().error.is_none();
        if track.is_asked || self.asked >= limits::LOG_REOPENS_MAX || !is_due(track.retry) || !is_healthy() {
            return Ok(());
        }
        if last.is_live() {
            failpoint::pass("agent-log-rename-before");
            files.rename(*last, files::next_name(names, last.attempt))?;
            failpoint::pass("agent-log-rename-after");
        }
        let ask = Ask { id: track.owner.id.clone(), endpoint: track.owner.endpoint, container_id: container_id.clone() };
        track.is_asked = self.agent.rotation.asks.0.try_send(ask).is_ok();
        self.asked += usize::from(track.is_asked);
        Ok(())
    }

    /// Takes up what became of an ask. Whether there is a new file its directory says.
    fn note_answer(&mut self, Answer { id, is_open }: &Answer) {
        self.asked = self.asked.saturating_sub(1);
        if let Some(track) = self.tracks.get_mut(id) {
            track.is_asked = false;
            track.retry = (!is_open).then(|| Deadline::within_ms(limits::LOG_REOPEN_PAUSE_MS, "log rotation"));
            track.due = None;
        }
    }

    /// Drops logs until there is the space that there should be; how soon that must be looked at again.
    fn leave_space(&mut self) -> u64 {
        let check_ms = self.limits.check_ms;
        // Until the first workload comes there may be no directory.
        let Some((total, free)) = self.agent.logs_dir().ancestors().find_map(|dir| space(dir).ok()) else { return check_ms };
        let default = (total / 20).min(limits::LOG_RESERVE_MB_DEFAULT << 20);
        let reserve = self.limits.reserve_bytes.unwrap_or(default);
        let pace = self.tracks.values().filter(|track| track.is_running()).map(|track| track.pace).sum();
        let mut left = free;
        if free < reserve {
            self.drop_logs(reserve - free);
            left = space(self.agent.logs_dir()).map_or(free, |(_, free)| free);
        }
        self.agent.rotation.lock().space = Some((left, reserve));
        let ms_max =
            self.hopeless.and_then(|until| until.left().ok()).map_or(check_ms, |left| u64::try_from(left.as_millis()).unwrap_or(0));
        half_way_ms(left.saturating_sub(reserve), pace, ms_max.max(limits::LOG_CHECK_MS_MIN))
    }

    /// Drops logs of so many bytes, whoever's.
    fn drop_logs(&mut self, need: u64) {
        if !is_due(self.hopeless) {
            return;
        }
        let dropped = shed(self.agent.logs_dir(), &self.mark, need);
        self.hopeless = (dropped.bytes == 0).then(|| Deadline::within_ms(self.limits.check_ms, "disk space"));
        if dropped.files > 0 {
            self.tracks.values_mut().for_each(Track::forget);
            self.note(dropped);
        }
    }

    /// Counts what was dropped, and says so now and then.
    fn note(&mut self, dropped: Dropped) {
        let mut facts = self.agent.rotation.lock();
        facts.dropped = facts.dropped.and(dropped);
        facts.dropped_at = Some(Timestamp::now());
        drop(facts);
        self.unsaid = self.unsaid.and(dropped);
        // Our own log may be on the same disk.
        if self.said.is_none_or(|said| said.elapsed_ms() >= limits::HEARTBEAT_MS) {
            let Dropped { files, bytes } = std::mem::take(&mut self.unsaid);
            log::warn!(
                "{files} log files of {bytes} bytes were dropped: too much is written, or the disk is full; see DiskSpace of GetNode"
            );
            self.said = Some(Stopwatch::start());
        }
    }
}

impl Dropped {
    fn and(self, other: Self) -> Self {
        Self { files: self.files + other.files, bytes: self.bytes + other.bytes }
    }
}

/// A log directory, if it is there and ours.
fn ours(dir: &Path, mark: &str) -> io::Result<Option<Files>> {
    Ok(Files::open(dir)?.filter(|files| files.has(mark)))
}

/// The sizes of files. Of those that were rotated and are known, none is asked for again, but for the newest. What is live, or was when
/// its attempt ended, may have grown since.
fn sizes(files: &Files, names: &[Name], known: &BTreeMap<Name, u64>) -> io::Result<BTreeMap<Name, u64>> {
    let mut sizes = BTreeMap::new();
    for (i, name) in names.iter().enumerate() {
        let known = known.get(name).filter(|_| !name.is_live() && i + 2 < names.len());
        let bytes = match known {
            Some(bytes) => *bytes,
            None => files.facts(*name)?.map_or(0, |facts| facts.bytes),
        };
        sizes.insert(*name, bytes);
    }
    Ok(sizes)
}

/// Gives the oldest files up until no more than `count` are left, and beside the newest no more than `bytes_max`.
fn prune(files: &Files, sizes: &mut BTreeMap<Name, u64>, count: u64, bytes_max: u64) -> io::Result<()> {
    // What is empty and has a number shows that something is missing; before another number a hole shows that as well.
    let names: Vec<Name> = sizes.keys().copied().collect();
    for (name, next) in names.iter().zip(names.iter().skip(1)) {
        if sizes.get(name) == Some(&0) && !name.is_live() && !next.is_live() && name.attempt == next.attempt {
            files.give_up(*name)?;
            sizes.remove(name);
        }
    }
    let newest = names.last().copied();
    let is_held = |(name, bytes): &(&Name, &u64)| Some(**name) != newest && (name.is_live() || **bytes > 0);
    let old: Vec<(Name, u64)> = sizes.iter().filter(is_held).map(|(name, bytes)| (*name, *bytes)).collect();
    let is_enough = |left: &[(Name, u64)]| {
        let rotated = left.iter().filter(|(name, _)| !name.is_live()).count() as u64;
        let bytes: u64 = left.iter().map(|(_, bytes)| bytes).sum();
        rotated < count && bytes <= bytes_max && left.len() <= limits::LOG_OLD_FILES_MAX
    };
    let kept = (0..old.len()).find(|i| old.get(*i..).is_some_and(is_enough)).unwrap_or(old.len());
    for (name, _) in old.iter().take(kept) {
        files.give_up(*name)?;
        sizes.remove(name);
    }
    if kept > 0 {
        *sizes = self::sizes(files, &files.names()?, sizes)?;
    }
    Ok(())
}

/// Drops rotated files of all workloads, the oldest first, and then empties what was last written to, the largest first, until so many
/// bytes are free. Looks at the disk, not at what is known: with no space left, an agent may not know what runs here.
fn shed(logs: &Path, mark: &str, need: u64) -> Dropped {
    let mut old: Vec<((i64, i64), Name, PathBuf)> = Vec::new();
    let mut last: Vec<(u64, PathBuf)> = Vec::new();
    for dir in fs::read_dir(logs).into_iter().flatten().flatten().map(|entry| entry.path()) {
        // What cannot be read cannot be dropped; the others can.
        let Ok(Some(files)) = ours(&dir, mark) else { continue };
        let Ok(names) = files.names() else { continue };
        let mut written = (i64::MIN, 0);
        for (i, name) in names.iter().enumerate() {
            let Ok(Some(facts)) = files.facts(*name) else { continue };
            // A clock that was set back does not make a file older than the one before it.
            written = written.max(facts.written);
            if i + 1 == names.len() {
                last.push((facts.bytes, dir.clone()));
            } else if facts.bytes > 0 {
                old.push((written, *name, dir.clone()));
            }
        }
    }
    old.sort();
    last.sort_by(|a, b| b.cmp(a));
    let mut dropped = Dropped::default();
    let mut drop_one = |dir: &Path, act: &dyn Fn(&Files) -> io::Result<u64>| {
        if dropped.bytes < need {
            let freed = ours(dir, mark).and_then(|files| files.map_or(Ok(0), |files| act(&files)));
            let freed = freed.unwrap_or_else(|error| {
                log::debug!("a log of {} is not dropped: {error}", dir.display());
                0
            });
            dropped = dropped.and(Dropped { files: u64::from(freed > 0), bytes: freed });
        }
    };
    for (_, name, dir) in &old {
        drop_one(dir, &|files| files.give_up(*name));
    }
    for (_, dir) in last.iter().filter(|(bytes, _)| *bytes > limits::LOG_SPARE_BYTES) {
        drop_one(dir, &Files::start_over);
    }
    dropped
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::logs::tests::Dir;
    use super::*;

    const MARK: &str = ".kakuri-test";

    fn dir(name: &str, files: &[(&str, usize)]) -> Dir {
        let dir = Dir::new(name);
        fill(&dir.0, files);
        dir
    }

    fn fill(dir: &Path, files: &[(&str, usize)]) {
        fs::create_dir_all(dir).expect("made");
        fs::write(dir.join(MARK), "").expect("written");
        for (name, bytes) in files {
            fs::write(dir.join(name), vec![b'x'; *bytes]).expect("written");
        }
    }

    /// What is in a directory: `NAME=BYTES`.
    fn listed(dir: &Path) -> String {
        let files = ours(dir, MARK).expect("opened").expect("there");
        let names = files.names().expect("listed");
        let sizes = sizes(&files, &names, &BTreeMap::new()).expect("measured");
        sizes.iter().map(|(name, bytes)| format!("{name}={bytes}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_oldest_files_of_a_workload_go_first() {
        let check = |files: &[(&str, usize)], count: u64, bytes_max: u64, expect: &str| {
            let dir = dir("prune", files);
            let opened = ours(&dir.0, MARK).expect("opened").expect("there");
            let mut known = sizes(&opened, &opened.names().expect("listed"), &BTreeMap::new()).expect("measured");
            prune(&opened, &mut known, count, bytes_max).expect("pruned");
            assert_eq!(listed(&dir.0), expect, "{files:?}");
            let left = known.iter().map(|(name, bytes)| format!("{name}={bytes}")).collect::<Vec<_>>().join(" ");
            assert_eq!(left, expect, "what is known is what is there");
        };
        let three = [("0.log.7", 10), ("0.log.8", 10), ("0.log.9", 10), ("0.log", 3)];
        check(&three, 4, 100, "0.log.7=10 0.log.8=10 0.log.9=10 0.log=3");
        check(&three, 3, 100, "0.log.8=10 0.log.9=10 0.log=3");
        check(&three, 9, 20, "0.log.8=10 0.log.9=10 0.log=3");
        check(&three, 1, 100, "0.log.9=0 0.log=3");
        check(&three, 9, 5, "0.log.9=0 0.log=3");
        // What was emptied counts for nothing, and nothing is done about it again.
        check(&[("0.log.9", 0), ("0.log", 3)], 1, 0, "0.log.9=0 0.log=3");
        check(&[("0.log.6", 0), ("0.log.7", 1), ("0.log.8", 0), ("0.log.9", 0), ("0.log", 3)], 9, 99, "0.log.7=1 0.log.9=0 0.log=3");
        // The ends of earlier attempts are small, and kept as long as bytes allow.
        check(&[("0.log", 1), ("1.log", 1), ("2.log.1", 9), ("2.log", 3)], 2, 11, "0.log=1 1.log=1 2.log.1=9 2.log=3");
        check(&[("0.log", 1), ("1.log", 1), ("2.log.1", 9), ("2.log", 3)], 2, 10, "0.log.1=0 1.log=1 2.log.1=9 2.log=3");
        check(&[("0.log", 1), ("1.log", 1), ("2.log.1", 9), ("2.log", 3)], 2, 9, "1.log.1=0 2.log.1=9 2.log=3");
        check(&[("0.log.4", 1), ("0.log", 1), ("1.log", 1)], 1, 9, "0.log.4=0 0.log=1 1.log=1");
        // Without a live file the newest is what is written to.
        check(&[("0.log.4", 9), ("0.log.5", 9)], 1, 0, "0.log.5=9");
        check(&[("0.log", 9)], 1, 0, "0.log=9");
        check(&[], 1, 0, "");
    }

    #[test]
    fn what_an_earlier_attempt_wrote_last_is_measured() {
        let dir = dir("grown", &[("0.log.1", 1), ("0.log", 1), ("1.log", 1), ("2.log", 1)]);
        let opened = ours(&dir.0, MARK).expect("opened").expect("there");
        let names = opened.names().expect("listed");
        let known = sizes(&opened, &names, &BTreeMap::new()).expect("measured");
        fill(&dir.0, &[("0.log", 90), ("2.log", 7)]);
        let sizes = sizes(&opened, &names, &known).expect("measured");
        assert_eq!(sizes.values().copied().collect::<Vec<_>>(), [1, 90, 1, 7]);
    }

    #[test]
    fn ends_of_attempts_have_a_number_of_their_own() {
        let names: Vec<String> = (0..100).map(|attempt| format!("{attempt}.log")).collect();
        let files: Vec<(&str, usize)> = names.iter().map(|name| (name.as_str(), 1)).collect();
        let dir = dir("attempts", &files);
        let opened = ours(&dir.0, MARK).expect("opened").expect("there");
        let mut known = sizes(&opened, &opened.names().expect("listed"), &BTreeMap::new()).expect("measured");
        prune(&opened, &mut known, 5, 1000).expect("pruned");
        // One more shows that others are missing.
        assert_eq!(known.len(), limits::LOG_OLD_FILES_MAX + 2);
        assert!(known.contains_key(&Name::live(99)) && known.keys().next() == Some(&Name { attempt: 34, number: 1 }), "{known:?}");
    }

    #[test]
    fn space_is_made_of_the_oldest_files_of_all_and_then_of_the_largest() {
        let logs = Dir::new("shed");
        let big = usize::try_from(limits::LOG_SPARE_BYTES).expect("small") + 1;
        // Written in this order, and told apart by it: the times of files have a coarse clock.
        let write = |workload: &str, name: &str, bytes: usize, second: i64| {
            fill(&logs.0.join(workload), &[(name, bytes)]);
            let file = fs::OpenOptions::new().write(true).open(logs.0.join(workload).join(name)).expect("opened");
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(u64::try_from(second).expect("a time"));
            file.set_modified(time).expect("set");
        };
        write("a.1", "0.log.1", 10, 100);
        write("b.1", "0.log.1", 20, 200);
        write("b.1", "0.log.2", 20, 150); // A clock was set back.
        write("a.1", "0.log.2", 10, 300);
        write("a.1", "0.log", big, 400);
        write("b.1", "0.log", big + 1, 500);
        write("c.1", "0.log", 5, 600);
        fs::create_dir(logs.0.join("alien")).expect("made");
        fs::write(logs.0.join("alien/0.log"), vec![b'x'; big]).expect("written");
        symlink(logs.0.join("a.1"), logs.0.join("d.1")).expect("linked");
        let all = || ["a.1", "b.1", "c.1"].map(|workload| listed(&logs.0.join(workload)));
        let before = all();
        assert_eq!(shed(&logs.0, MARK, 0), Dropped::default());
        assert_eq!(all(), before);
        assert_eq!(shed(&logs.0, MARK, 1), Dropped { files: 1, bytes: 10 });
        assert_eq!(shed(&logs.0, MARK, 25), Dropped { files: 2, bytes: 40 });
        assert_eq!(all(), [format!("0.log.2=10 0.log={big}"), format!("0.log.2=0 0.log={}", big + 1), "0.log=5".into()]);
        assert_eq!(shed(&logs.0, MARK, 11), Dropped { files: 2, bytes: 10 + big as u64 + 1 });
        assert_eq!(all(), [format!("0.log.2=0 0.log={big}"), "0.log.2=0 0.log=0".into(), "0.log=5".into()]);
        assert_eq!(shed(&logs.0, MARK, u64::MAX), Dropped { files: 1, bytes: big as u64 });
        assert_eq!(shed(&logs.0, MARK, u64::MAX), Dropped::default(), "what is small stays");
        assert_eq!(fs::metadata(logs.0.join("alien/0.log")).expect("there").len(), big as u64, "not ours");
    }

    #[test]
    fn what_grows_fast_is_looked_at_soon() {
        assert_eq!(half_way_ms(1 << 20, 0, 500), 500);
        assert_eq!(half_way_ms(1 << 20, 1 << 20, 1000), 500);
        assert_eq!(half_way_ms(1 << 20, 1 << 30, 500), limits::LOG_CHECK_MS_MIN);
        assert_eq!(half_way_ms(0, u64::MAX, 500), limits::LOG_CHECK_MS_MIN);
        assert_eq!(half_way_ms(u64::MAX, 1, 500), 500);
    }
}
