//! The store in memory, on a disk that fails on demand, and on a real file that is killed, damaged, exported and imported.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use serde_json::Map;

use super::disk::Batch;
use super::*;
use crate::deadline::{Deadline, Timestamp};
use crate::wire::status::Status;
use crate::wire::stored::Stored;
use crate::wire::{json, workload};
use crate::workload::{Draft, Name, Phase};

/// A draft of this body.
pub(crate) fn draft(body: &str) -> Draft {
    json::parse(body.as_bytes()).and_then(workload::draft).expect("a workload")
}

/// A record of a workload of this id on node-1.
pub(crate) fn record(id: &str) -> Record {
    let name = |text| Name::new(text).expect("a name");
    let workload = draft(r#"{"image":"busybox","env":{"PASSWORD":"secret"}}"#).resolve(WorkloadId::new(id).expect("an id"), name("gvisor"));
    Record::new(workload, name("node-1"), Map::new())
}

fn id(text: &str) -> WorkloadId {
    WorkloadId::new(text).expect("an id")
}

fn inserted(store: &Store, id: &str) -> Arc<Record> {
    match store.insert(record(id)) {
        Ok(Insertion::Inserted(record)) => record,
        other => panic!("{other:?}"),
    }
}

fn running(record: &Record) -> Option<Record> {
    record.observed(State::Running, Status::accepted(None))
}

#[test]
fn an_id_is_taken_once_and_free_again_when_removed() {
    let store = Store::forgetful();
    let first = inserted(&store, "a");
    assert!(matches!(store.insert(record("a")), Ok(Insertion::Existing(r)) if r == first));
    store.remove(&id("a"), first.born).expect("removed");
    let second = inserted(&store, "a");
    store.remove(&id("a"), first.born).expect("another one is there");
    assert_eq!(store.get(&id("a")), Some(second));
    assert!(matches!(store.wish(&id("a"), first.born, Wish::Delete), Ok(None)), "another one is there");
}

#[test]
fn labels_that_are_wished_while_an_end_is_written_have_yet_to_be_told() {
    let store = Store::forgetful();
    let first = inserted(&store, "a");
    // As its agent told it before the wish.
    let ended = first.observed(State::Failed, Status { restarts: 1, ..Status::accepted(None) }).expect("news");
    let labels = LabelPatch::Merge(BTreeMap::from([("tier".to_owned(), Some("web".to_owned()))]));
    let wished = store.wish(&id("a"), first.born, Wish::Labels(labels)).expect("taken").expect("there");
    assert!(wished.has_new_labels);
    let Ok(Outcome::Inserted(record)) = store.order(Act::End(Box::new(ended))) else { panic!("not taken") };
    assert_eq!((record.state, record.has_new_labels), (State::Failed, true));
    assert_eq!(record.workload.spec.labels.get("tier").map(String::as_str), Some("web"));
}

#[test]
fn a_store_is_full_at_its_limit() {
    let store = Arc::new(Store::forgetful());
    // Many at a time, so that the test does not take as many commits.
    let act = |i: usize| Act::Insert(Box::new(record(&format!("w{i}"))));
    for batch in (0..limits::STORE_WORKLOADS_MAX).collect::<Vec<_>>().chunks(limits::STORE_QUEUE_MAX) {
        let waiting: Vec<_> = batch.iter().map(|i| store.begin(act(*i)).expect("room")).collect();
        assert!(waiting.iter().all(|waiting| matches!(await_answer(waiting), Ok(Outcome::Inserted(_)))));
    }
    let more: Vec<_> = (0..10).map(|i| store.begin(act(1_000_000 + i)).expect("room")).collect();
    assert!(more.iter().all(|waiting| matches!(await_answer(waiting), Ok(Outcome::Refused))));
    assert!(matches!(store.insert(record("more")), Err(Error::Full)));
    assert!(matches!(store.insert(record("w7")), Ok(Insertion::Existing(_))));
    assert_eq!(
        store.counts(),
        [(State::Pending, limits::STORE_WORKLOADS_MAX), (State::Running, 0), (State::Succeeded, 0), (State::Failed, 0)]
    );
}

#[test]
fn pages_follow_each_other() {
    let store = Store::forgetful();
    for name in ["a", "b", "c", "d"] {
        inserted(&store, name);
    }
    let check = |after: Option<&str>, limit, skip: &str, expect: &[&str], has_more| {
        let after = after.map(id);
        let page = store.page(after.as_ref(), limit, |r| r.workload.id.as_str() != skip);
        let ids: Vec<&str> = page.records.iter().map(|r| r.workload.id.as_str()).collect();
        assert_eq!((ids.as_slice(), page.has_more), (expect, has_more));
    };
    check(None, 2, "", &["a", "b"], true);
    check(Some("b"), 2, "", &["c", "d"], false);
    check(Some("a"), 2, "d", &["b", "c"], false);
    check(Some("bb"), 9, "", &["c", "d"], false);
    check(Some("d"), 9, "", &[], false);
}

#[test]
fn wishes_and_knowledge_do_not_touch_each_other() {
    let store = Store::forgetful();
    let before = inserted(&store, "a");
    assert_eq!(store.note(&id("a"), |_| None).expect("noted"), Some(Arc::clone(&before)));
    let stopped = store.wish(&id("a"), before.born, Wish::Stop).expect("kept").expect("there");
    assert_eq!((stopped.desired, stopped.state, stopped.born), (Desired::Stopped, State::Pending, before.born));
    assert!(stopped.revision > before.revision);
    // Somebody who saw it before that says what he knows.
    let noted = store.note(&id("a"), |_| running(&before)).expect("noted").expect("there");
    assert_eq!((noted.desired, noted.state, noted.has_run), (Desired::Stopped, State::Running, true));
    let again = store.wish(&id("a"), before.born, Wish::Stop).expect("kept").expect("there");
    assert_eq!(again, noted, "what is so already is no change");
    store.wish(&id("a"), before.born, Wish::Delete).expect("kept");
    let deleted = store.wish(&id("a"), before.born, Wish::Stop).expect("kept").expect("there");
    assert_eq!(deleted.desired, Desired::Deleted, "there is no way back");
    assert_eq!(store.note(&id("b"), |_| panic!("nothing to change")).expect("noted"), None);
}

#[test]
fn a_truth_that_only_grew_younger_is_no_change() {
    let disk = Scripted::default();
    let store = on(&disk);
    inserted(&store, "a");
    let at = |text: &str| Status { observed_at: Timestamp::parse(text).expect("a time"), ..Status::accepted(None) };
    let say = |text: &str| store.note(&id("a"), |record| record.observed(State::Running, at(text))).expect("noted").expect("there");
    let first = say("2020-01-01T00:00:00Z");
    let commits = || disk.commits.lock().expect("not poisoned").len();
    until("it is written", || commits() == 3);
    assert_eq!(say("2020-01-01T00:00:00Z"), first);
    let later = say("2020-01-01T00:00:59Z");
    assert_eq!((later.revision, store.kept().newest), (first.revision, first.revision), "nobody is told");
    assert_eq!(store.get(&id("a")).expect("there").status.observed_at, later.status.observed_at, "whoever asks sees it");
    assert!(store.shared.lock().dirty.is_empty());
    say("2020-01-01T00:01:00Z");
    until("it is written once in a while", || commits() == 4);
    assert_eq!(store.kept().newest, first.revision);
}

#[test]
fn terminal_stays_and_old_news_is_no_news() {
    let at = |text: &str| Status { observed_at: Timestamp::parse(text).expect("a time"), ..Status::accepted(None) };
    let fresh = record("a");
    // The agent's clock may be behind ours, so the first word of it always counts.
    let running = fresh.observed(State::Running, at("2020-01-01T00:00:10Z")).expect("news");
    assert_eq!((running.is_known, running.status.created_at), (true, fresh.status.created_at));
    assert_eq!(running.status.node.as_deref(), Some("node-1"));
    assert_eq!(running.observed(State::Pending, at("2020-01-01T00:00:09Z")), None);
    assert!(running.observed(State::Failed, at("2020-01-01T00:00:09Z")).is_some(), "an end is an end");
    assert!(running.observed(State::Running, at("2019-01-01T00:00:00Z")).is_some(), "the clock was set back");
    let ended = running.observed(State::Failed, at("2020-01-01T00:00:11Z")).expect("news");
    assert_eq!(ended.observed(State::Running, at("2020-01-01T00:00:12Z")), None);
    assert_eq!(ended.observed(State::Succeeded, at("2020-01-01T00:00:12Z")), None);
}

#[test]
fn only_a_restart_leads_back_to_pending() {
    let running = running(&record("a")).expect("news");
    assert_eq!(running.observed(State::Pending, Status::accepted(None)), None, "a word that was overtaken");
    let restarted = running.observed(State::Pending, Status { attempt: 1, restarts: 1, ..Status::accepted(None) }).expect("news");
    assert_eq!((restarted.state, restarted.has_run), (State::Pending, true));
    assert!(record("a").observed(State::Pending, Status { restarts: 1, ..Status::accepted(None) }).is_some_and(|r| r.has_run));
    assert!(record("a").observed(State::Pending, Status::accepted(None)).is_some_and(|r| !r.has_run));
}

#[test]
fn a_word_of_an_earlier_run_undoes_no_restart() {
    let at = |second: u32, run: u32| {
        let observed_at = Timestamp::parse(&format!("2020-01-01T00:00:{second:02}Z")).expect("a time");
        Status { observed_at, attempt: run, restarts: run, ..Status::accepted(None) }
    };
    let first = record("a").observed(State::Running, at(10, 0)).expect("news");
    let restarted = first.observed(State::Pending, at(20, 1)).expect("news");
    assert_eq!(restarted.observed(State::Running, at(15, 0)), None, "the answer to a question before the restart");
    assert_eq!(restarted.observed(State::Running, at(20, 0)), None, "of the same moment");
    assert_eq!(restarted.observed(State::Failed, at(15, 0)), None, "the end of a run is not that of the workload");
    assert!(first.observed(State::Pending, at(5, 1)).is_some(), "a restart is one, whatever the clock says");
    let again = restarted.observed(State::Running, at(25, 1)).expect("news");
    assert_eq!(again.observed(State::Pending, at(26, 1)), None, "overtaken");
    // It lost its journal, and counts from the sandbox that it found.
    let counted_anew = Status { restarts: 0, ..at(30, 1) };
    assert_eq!(again.observed(State::Running, counted_anew).map(|record| record.status.restarts), Some(0));
}

#[test]
fn the_same_workload_is_recognised_however_its_class_was_chosen() {
    let name = |text| Name::new(text).ok();
    let by_profile = draft(r#"{"id":"a","image":"busybox","security_profile":"internal"}"#);
    let workload = by_profile.clone().resolve(id("a"), name("gvisor").expect("a name"));
    let record = Record::new(workload, name("n").expect("a name"), Map::new());
    assert!(record.is_for(&by_profile));
    assert!(record.is_for(&Draft { runtime_class: name("gvisor"), ..by_profile.clone() }));
    assert!(!record.is_for(&Draft { runtime_class: name("native"), ..by_profile.clone() }));
    assert!(!record.is_for(&Draft { security_profile: None, ..by_profile }));
    assert!(!record.is_for(&draft(r#"{"id":"a","image":"busybox:2","security_profile":"internal"}"#)));
}

#[test]
fn what_is_ending_says_so() {
    let phase = |desired, state| Record { desired, state, ..record("a") }.object().status.phase;
    assert_eq!(phase(Desired::Run, State::Running), None);
    assert_eq!(phase(Desired::Stopped, State::Running), Some(Phase::Stopping));
    assert_eq!(phase(Desired::Stopped, State::Failed), None);
    assert_eq!(phase(Desired::Deleted, State::Failed), Some(Phase::Stopping));
}

#[test]
fn those_that_ended_first_are_the_surplus() {
    let store = Store::forgetful();
    let ended = |id_text: &str, second: u32| {
        let at = Timestamp::parse(&format!("2026-01-01T00:00:0{second}Z"));
        let inserted = inserted(&store, id_text);
        let status = Status { finished_at: at, ..Status::accepted(None) };
        store.note(&id(id_text), |record| record.observed(State::Failed, status)).expect("noted");
        inserted
    };
    let (_, b, _) = (ended("a", 3), ended("b", 1), ended("c", 2));
    inserted(&store, "d");
    let surplus = |history| store.surplus(history).iter().map(|r| r.workload.id.to_string()).collect::<Vec<_>>().join(" ");
    assert_eq!((surplus(3), surplus(2), surplus(1), surplus(0)), ("".into(), "b".into(), "b c".into(), "b c a".into()));
    store.wish_away(&[b]).expect("kept");
    assert_eq!((surplus(2), surplus(1)), ("".into(), "c".into()));
}

/// The rows of a commit, and whether each stays.
type Rows = Vec<(String, bool)>;

/// A disk that does what it is told, and remembers what it was given.
#[derive(Clone, Default)]
pub(crate) struct Scripted {
    /// Commits wait as long as this is set.
    is_stuck: Arc<AtomicBool>,
    begun: Arc<AtomicU64>,
    pub(crate) is_full: Arc<AtomicBool>,
    is_panicking: Arc<AtomicBool>,
    commits: Arc<Mutex<Vec<Rows>>>,
    revision: Arc<AtomicU64>,
}

impl Disk for Scripted {
    fn commit(&mut self, batch: &Batch) -> Result<(), disk::Error> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        until("it is not stuck", || !self.is_stuck.load(Ordering::SeqCst));
        assert!(!self.is_panicking.load(Ordering::SeqCst), "told to");
        if self.is_full.load(Ordering::SeqCst) {
            let cause = redb_full();
            return Err(cause);
        }
        let rows: Rows = batch.rows.iter().map(|(id, row)| (id.to_string(), row.is_some())).collect();
        self.commits.lock().expect("not poisoned").push(rows);
        self.revision.store(batch.revision, Ordering::SeqCst);
        Ok(())
    }
}

fn redb_full() -> disk::Error {
    disk::Error::Directory { path: "/d".into(), cause: std::io::Error::from(std::io::ErrorKind::StorageFull) }
}

/// Looks until it is so: what is waited for is on disk, or in a thread's own hands, and tells nobody.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Deadline::within_ms(10_000, "test");
    while !is_so() {
        assert!(deadline.left().is_ok(), "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn on(disk: &Scripted) -> Store {
    Store::start(disk.clone(), Loaded::default()).expect("a thread")
}

#[test]
fn those_who_come_while_a_commit_is_under_way_share_the_next() {
    let disk = Scripted::default();
    let store = on(&disk);
    disk.is_stuck.store(true, Ordering::SeqCst);
    thread::scope(|scope| {
        let store = &store;
        let first = scope.spawn(|| inserted(store, "first"));
        until("the first is with the disk", || disk.begun.load(Ordering::SeqCst) == 2);
        let others: Vec<_> = (0..20).map(|i| store.begin(Act::Insert(Box::new(record(&format!("w{i}"))))).expect("room")).collect();
        assert_eq!(store.page(None, 100, |_| true).records.len(), 0, "nothing is shown that is not on disk");
        disk.is_stuck.store(false, Ordering::SeqCst);
        first.join().expect("inserted");
        assert!(others.iter().all(|waiting| matches!(await_answer(waiting), Ok(Outcome::Inserted(_)))));
    });
    let sizes: Vec<usize> = disk.commits.lock().expect("not poisoned").iter().map(Vec::len).collect();
    assert_eq!(sizes, [0, 1, 20], "the reservation, the first, all others");
}

#[test]
fn what_the_disk_does_not_take_never_was() {
    let disk = Scripted::default();
    let store = on(&disk);
    let kept = inserted(&store, "kept");
    disk.is_full.store(true, Ordering::SeqCst);
    assert!(matches!(store.insert(record("more")), Err(Error::Disk(_))));
    assert!(matches!(store.wish(&id("kept"), kept.born, Wish::Delete), Err(Error::Disk(_))));
    assert!(matches!(store.remove(&id("kept"), kept.born), Err(Error::Disk(_))));
    assert_eq!((store.get(&id("more")), store.get(&id("kept"))), (None, Some(kept)));
    assert!(store.trouble().is_some());
    // What agents say is noted, and on disk when that takes it.
    store.note(&id("kept"), running).expect("noted");
    disk.is_full.store(false, Ordering::SeqCst);
    let rows = || disk.commits.lock().expect("not poisoned").iter().skip(2).flatten().cloned().collect::<BTreeSet<_>>();
    // What may have been left of the insertion is taken back.
    until("it is written", || rows() == BTreeSet::from([("kept".to_owned(), true), ("more".to_owned(), false)]));
    until("all is well", || store.trouble().is_none());
    inserted(&store, "more");
}

#[test]
fn a_disk_that_panics_failed_and_is_tried_again() {
    let disk = Scripted::default();
    let store = on(&disk);
    inserted(&store, "a");
    disk.is_panicking.store(true, Ordering::SeqCst);
    assert!(matches!(store.insert(record("b")), Err(Error::Disk(cause)) if matches!(*cause, disk::Error::Panicked)));
    assert!(store.trouble().is_some_and(|trouble| trouble.contains("panicked")), "readiness says so");
    assert!(matches!(store.insert(record("b")), Err(Error::Disk(_))));
    disk.is_panicking.store(false, Ordering::SeqCst);
    until("all is well", || store.trouble().is_none());
    inserted(&store, "b");
    store.close();
}

#[test]
fn no_revision_is_told_beyond_what_is_reserved() {
    let disk = Scripted::default();
    let store = on(&disk);
    inserted(&store, "a");
    disk.is_full.store(true, Ordering::SeqCst);
    store.shared.lock().revision = disk.revision.load(Ordering::SeqCst) - 1;
    let next = AtomicU64::new(0);
    let trouble = || store.note(&id("a"), |record| Some(record.troubled(next.fetch_add(1, Ordering::SeqCst).to_string())));
    assert!(trouble().is_ok());
    assert!(matches!(trouble(), Err(Error::Revisions)));
    disk.is_full.store(false, Ordering::SeqCst);
    until("more are reserved", || trouble().is_ok());
}

#[test]
fn what_agents_say_is_on_disk_soon_and_at_the_close() {
    let disk = Scripted::default();
    let store = on(&disk);
    inserted(&store, "a");
    let commits = || disk.commits.lock().expect("not poisoned").len();
    store.note(&id("a"), running).expect("noted");
    until("it is written", || commits() == 3);
    (0..100).for_each(|i| drop(store.note(&id("a"), |record| Some(record.troubled(format!("{i}"))))));
    store.close();
    assert!(commits() <= 5, "{}: not one commit for each", commits());
    assert!(matches!(store.insert(record("b")), Err(Error::Closed)));
    assert!(store.get(&id("a")).is_some());
}

/// A directory that goes with the test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("ks-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // What is tested here is not the disk, so it may be memory.
        let memory = PathBuf::from("/dev/shm");
        Self(if memory.is_dir() { memory } else { std::env::temp_dir() }.join(name))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn copy(&self) -> Self {
        let copy = Self::new();
        fs::create_dir_all(&copy.0).expect("made");
        for name in ["store.redb", "store.mark"] {
            fs::copy(self.file(name), copy.file(name)).expect("copied");
        }
        copy
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0); // Only a directory for temporary files is left behind.
    }
}

fn ids(store: &Store) -> String {
    let page = store.page(None, usize::MAX, |_| true);
    page.records.iter().map(|record| record.workload.id.to_string()).collect::<Vec<_>>().join(" ")
}

/// A store with three workloads, of which one runs, one is stopped and one has new labels.
fn filled(dir: &Dir) -> Store {
    let store = Store::open(&dir.0).expect("opened");
    let [_, b, c] = ["a", "b", "c"].map(|id| inserted(&store, id));
    store.note(&id("a"), running).expect("noted");
    store.wish(&id("b"), b.born, Wish::Stop).expect("kept");
    let labels = [("app".to_owned(), Some("web".to_owned()))].into();
    store.wish(&id("c"), c.born, Wish::Labels(LabelPatch::Merge(labels))).expect("kept");
    store
}

#[test]
fn what_was_kept_is_there_again() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Dir::new();
    let store = filled(&dir);
    let before = store.page(None, usize::MAX, |_| true);
    let mode = |name: &str| fs::metadata(dir.file(name)).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(""), mode("store.redb"), mode("store.mark")), (0o700, 0o600, 0o600));
    assert!(matches!(Store::open(&dir.0), Err(disk::Error::InUse(_))));
    store.close();
    drop(store);
    let store = Store::open(&dir.0).expect("opened");
    let after = store.page(None, usize::MAX, |_| true);
    let ageless = |page: &Page| page.records.iter().map(|r| Record { revision: 0, ..r.as_ref().clone() }).collect::<Vec<_>>();
    assert_eq!(ageless(&after), ageless(&before));
    assert!(after.revision >= before.revision);
    assert!(inserted(&store, "d").born > before.records.iter().map(|record| record.born).max().unwrap_or_default());
}

/// As after `kill -9`: a copy of the files while the store is open.
#[test]
fn a_store_that_was_not_closed_opens() {
    let dir = Dir::new();
    let store = filled(&dir);
    let copy = dir.copy();
    drop(store);
    let store = Store::open(&copy.0).expect("opened");
    assert_eq!(ids(&store), "a b c");
    assert_eq!(store.get(&id("b")).map(|record| record.desired), Some(Desired::Stopped));
}

#[test]
fn a_store_is_made_whole_or_not_at_all() {
    let dir = Dir::new();
    fs::create_dir_all(&dir.0).expect("made");
    // What a making leaves that was cut short.
    fs::write(dir.file("store.new"), "half").expect("written");
    let store = Store::open(&dir.0).expect("opened");
    assert!(!dir.file("store.new").exists());
    inserted(&store, "a");
}

#[test]
fn whoever_comes_too_late_to_make_a_store_takes_nothing_of_it() {
    let dir = Dir::new();
    filled(&dir).close();
    let mark = || fs::read_to_string(dir.file("store.mark")).expect("there");
    let before = mark();
    assert!(matches!(disk::make(&dir.0, &Loaded::default()), Err(disk::Error::Exists(_))));
    assert_eq!(mark(), before);
    let empty = Dir::new();
    fs::create_dir_all(&empty.0).expect("made");
    let held = fs::File::open(&empty.0).expect("opened");
    disk::tests::lock(&held);
    assert!(matches!(disk::make(&empty.0, &Loaded::default()), Err(disk::Error::InUse(_))));
    drop(held);
    assert!(disk::make(&empty.0, &Loaded::default()).is_ok());
}

#[test]
fn what_is_no_store_of_ours_is_refused_with_the_way_out() {
    let check = |name: &str, content: &[u8], expect: &str| {
        let dir = Dir::new();
        let store = filled(&dir);
        store.close();
        drop(store);
        fs::write(dir.file(name), content).expect("written");
        let error = Store::open(&dir.0).expect_err("refused").to_string();
        assert!(error.contains(name) && error.contains(expect) && error.contains("--import"), "{error}");
        assert_eq!(fs::read(dir.file(name)).expect("there"), content, "nothing was changed");
    };
    check("store.redb", b"", "no file of redb");
    check("store.redb", &[0; 4096], "no header of redb");
    check("store.redb", b"something else altogether", "no header of redb");
    check("store.mark", b"00000000000000000007 1\n", "not what was written there");
    check("store.mark", &[0xff; 42], "not what was written there");
    let mark = format!("{:020} {:020}\n", 1000, !1000_u64);
    let error = {
        let dir = Dir::new();
        filled(&dir).close();
        fs::write(dir.file("store.mark"), &mark).expect("written");
        Store::open(&dir.0).expect_err("refused").to_string()
    };
    assert!(error.contains("commit 1000 was acknowledged"), "{error}");
}

/// Every kind of damage is refused or changes nothing; no panic gets out, and nothing that was acknowledged is missing.
#[test]
fn damage_is_never_silent() {
    let dir = Dir::new();
    let store = filled(&dir);
    let unclean = dir.copy();
    store.close();
    let expect: Vec<String> = store.page(None, usize::MAX, |_| true).records.iter().map(|r| r.stored().to_json()).collect();
    drop(store);
    // Panics of redb that end at a thread's edge would fill the log of the tests.
    let mut refused = 0;
    for base in [&dir, &unclean] {
        let bytes = fs::read(base.file("store.redb")).expect("there");
        let used: Vec<usize> = (320..bytes.len()).filter(|at| bytes[*at] != 0).collect();
        // The header, the byte in it that says which commit is the last, and some of the rest.
        let flips = (0..64).chain((64..320).step_by(7)).map(|at| (at, 1 << (at % 8))).chain((0..3).map(|bit| (9, 1 << bit)));
        let flips = flips.chain(used.iter().step_by(used.len() / 40).map(|at| (*at, 0x10)));
        let flipped = flips.map(|(at, bits)| {
            let mut damaged = bytes.clone();
            damaged[at] ^= bits;
            (format!("byte {at} ^ {bits}"), damaged)
        });
        let cut = [1, 100, 4096, bytes.len() / 2, bytes.len() - 1].into_iter().map(|at| (format!("cut at {at}"), bytes[..at].to_vec()));
        for (what, damaged) in flipped.chain(cut) {
            let copy = base.copy();
            fs::write(copy.file("store.redb"), &damaged).expect("written");
            match StoreFile::open(&copy.0) {
                Ok((file, loaded)) => {
                    // Closing writes: what only that trips over would be a panic of the thread that writes.
                    thread::spawn(move || drop(file)).join().unwrap_or_else(|_| panic!("{what}: it opens, and cannot be closed"));
                    let found: Vec<String> = loaded.records.iter().map(Stored::to_json).collect();
                    // The copy was made before what the agent said was written.
                    let is_whole = found.len() == expect.len() && (found == expect || base.0 == unclean.0);
                    assert!(is_whole, "{what}: {found:?}");
                }
                Err(error) => {
                    refused += 1;
                    assert!(matches!(error, disk::Error::Damaged { .. } | disk::Error::Format { .. }), "{what}: {error:?}");
                }
            }
        }
    }
    assert!(refused > 50, "{refused}: the canary");
}

#[test]
fn an_export_is_a_store_again() {
    let dir = Dir::new();
    filled(&dir).close();
    let mut lines = Vec::new();
    assert_eq!(transfer::export(&dir.0, &mut lines).expect("exported"), 3);
    let text = String::from_utf8(lines.clone()).expect("text");
    assert!(
        text.starts_with("{\"format\":1,") && text.contains("secret") && text.ends_with("{\"type\":\"End\",\"workloads\":3}\n"),
        "{text}"
    );
    let other = Dir::new();
    assert_eq!(transfer::import(&other.0, &lines[..]).expect("imported"), 3);
    let mut again = Vec::new();
    transfer::export(&other.0, &mut again).expect("exported");
    assert_eq!(String::from_utf8(again).expect("text"), text);
    assert!(matches!(transfer::import(&other.0, &lines[..]), Err(disk::Error::Exists(_))));
    let store = Store::open(&other.0).expect("opened");
    assert!(matches!(transfer::export(&other.0, std::io::sink()), Err(disk::Error::InUse(_))));
    assert_eq!(ids(&store), "a b c");
    assert!(matches!(transfer::export(&dir.file("none"), std::io::sink()), Err(disk::Error::Missing(_))));
}

#[test]
fn what_an_agent_says_at_length_is_clipped_and_exported() {
    let long = || Some("\u{1}".repeat(limits::LINE_BYTES_MAX / 8));
    let mut status = Status { message: long(), sandbox_id: long(), ip: long(), last_error: long(), ..Status::accepted(None) };
    status.isolation.kernel = long();
    let said = record("a").observed(State::Running, status).expect("news");
    let texts = [&said.status.message, &said.status.sandbox_id, &said.status.ip, &said.status.last_error, &said.status.isolation.kernel];
    assert!(texts.iter().all(|text| text.as_ref().is_some_and(|text| text.len() == limits::MESSAGE_BYTES_MAX)));

    // What the version before wrote: a workload, and what filled a whole line of an agent.
    let dir = Dir::new();
    let store = Store::open(&dir.0).expect("opened");
    let mut large = record("a");
    large.status.message = Some("x".repeat(limits::LINE_BYTES_MAX - 1024));
    let env = [("X".to_owned(), crate::workload::Secret::new("y".repeat(32 * 1024)))].into();
    let workload = large.workload.as_ref().clone();
    large.workload = Arc::new(crate::workload::Workload { spec: crate::workload::Spec { env, ..workload.spec }, ..workload });
    store.insert(large).expect("kept");
    store.close();
    let mut lines = Vec::new();
    transfer::export(&dir.0, &mut lines).expect("exported");
    assert_eq!(transfer::import(&Dir::new().0, &lines[..]).expect("imported"), 1);
}

#[test]
fn an_import_names_every_bad_line_and_leaves_nothing() {
    let dir = Dir::new();
    filled(&dir).close();
    let mut lines = Vec::new();
    transfer::export(&dir.0, &mut lines).expect("exported");
    let good: Vec<String> = String::from_utf8(lines).expect("text").lines().map(str::to_owned).collect();
    let check = |change: &dyn Fn(&mut Vec<String>), expect: &[(u64, &str)]| {
        let mut lines = good.clone();
        change(&mut lines);
        let other = Dir::new();
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let found = match transfer::import(&other.0, text.as_bytes()) {
            Err(disk::Error::Lines(found)) => found,
            result => panic!("{result:?}"),
        };
        assert_eq!(found.len(), expect.len(), "{found:?}");
        for ((number, what), (line, why)) in found.iter().zip(expect) {
            assert!(number == line && what.contains(why), "{found:?}");
        }
        assert!(!other.file("store.redb").exists());
    };
    check(&|lines| lines.clear(), &[(1, "is missing")]);
    check(&|lines| drop(lines.pop()), &[(5, "is missing: the last line")]);
    check(&|lines| drop(lines.remove(0)), &[(1, "must be a Store line")]);
    check(&|lines| drop(lines.remove(2)), &[(4, "/workloads: is 3, and there were 2")]);
    check(&|lines| lines.push(good[1].clone()), &[(6, "behind the End line")]);
    check(&|lines| lines[2] = good[1].clone(), &[(3, "was on a line before")]);
    check(&|lines| lines[0] = lines[0].replace("\"format\":1", "\"format\":2"), &[(1, "this version reads 1")]);
    check(&|lines| lines[0] = r#"{"format":1,"revision":0,"type":"Store"}"#.into(), &[(2, "/born"), (3, "/born"), (4, "/born")]);
    check(
        &|lines| {
            lines[1] = lines[1].replace("busybox", "BUSYBOX");
            lines[3] = "nonsense".into();
        },
        &[(2, "/workload/image"), (4, "not JSON")],
    );
    let other = Dir::new();
    let result = transfer::import(&other.0, good[0].as_bytes());
    assert!(matches!(result, Err(disk::Error::Lines(found)) if found[0].1.contains("has no end")));
}

#[test]
fn a_store_whose_revisions_no_double_holds_is_refused() {
    let dir = Dir::new();
    filled(&dir).close();
    disk::tests::set_revision(&dir.0, 1 << 53);
    let error = Store::open(&dir.0).expect_err("refused").to_string();
    assert!(error.contains("revision 9007199254740992"), "{error}");
}

#[test]
fn a_store_of_another_format_is_refused() {
    let dir = Dir::new();
    filled(&dir).close();
    disk::tests::set_format(&dir.0, 2);
    let error = Store::open(&dir.0).expect_err("refused").to_string();
    assert!(error.contains("has format 2") && error.contains("--export"), "{error}");
}
