//! What the runtime cannot know, on disk: accepted workloads, results, what is to be deleted, restarts.
//!
//! An append-only file of checksummed lines ([`record`]). An append is on disk when it returns. A line torn by a crash at the very
//! end is cut off; damage anywhere else is refused, because something was lost that somebody was told is kept.
//!
//! Invariant: the file holds whole records up to `length`, and nothing the agent relies on beyond it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::failpoint;
use crate::limits;
use crate::report::Chain;
use crate::wire::record::{self, Accepted, Record, Update, VERSION};

/// The journal of one agent.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    file: File,
    length: u64,
    /// What a compacted file would take, about.
    live: Sizes,
    /// A write failed in a way that leaves the file in doubt; nothing more is written to it.
    broken: bool,
    starts: u64,
    /// Locked (flock(2)) for as long as the agent lives.
    _lock: File,
}

/// What a journal says of a workload.
#[derive(Clone, Debug)]
pub struct Saved {
    /// What was asked for.
    pub accepted: Accepted,
    /// Where it stood; a workload that was accepted a moment before the end may have none.
    pub update: Option<Update>,
}

/// What a journal held when it was opened.
#[derive(Debug, Default)]
pub struct Replay {
    /// The workloads, by id.
    pub saved: BTreeMap<String, Saved>,
    /// How often an agent has begun to write it, this one included.
    pub starts: u64,
}

/// A journal cannot be used.
#[derive(Debug)]
pub enum Error {
    /// Another agent uses the directory.
    Busy(PathBuf),
    /// A line in the middle is not what was written.
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which line.
        line: usize,
    },
    /// The file was written by a version that this one does not know.
    Foreign {
        /// The file.
        path: PathBuf,
        /// The version it names.
        version: u32,
    },
    /// The file system says no.
    Io(PathBuf, io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy(path) => write!(f, "another agent uses {}", path.display()),
            Self::Damaged { path, line } => write!(
                f,
                "{} is damaged at line {line}; move it away to begin without it: what runs is taken up from the runtime, \
                 results that were not fetched are lost",
                path.display()
            ),
            Self::Foreign { path, version } => {
                write!(f, "{} has version {version}, this agent writes {VERSION}; use the agent that wrote it", path.display())
            }
            Self::Io(path, _) => write!(f, "{}", path.display()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(_, error) => Some(error),
            Self::Busy(_) | Self::Damaged { .. } | Self::Foreign { .. } => None,
        }
    }
}

const FILE: &str = "journal";

impl Journal {
    /// Opens the journal of a directory, or begins one.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(directory: &Path) -> Result<(Self, Replay), Error> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |error| Error::Io(path, error)
        };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io(directory))?;
        let path = directory.join("lock");
        // Not truncated: it is never written to.
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path).map_err(io(&path))?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Busy(directory.to_owned())),
            Err(error) => return Err(Error::Io(path, error.into())),
        }
        let path = directory.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::Io(path, error)),
        };
        let mut replay = replay(&bytes, &path)?;
        replay.starts += 1;
        let starts = replay.starts;
        let (file, length, live) = write_new(directory, starts, &records_of(&replay)).map_err(io(&path))?;
        Ok((Self { directory: directory.to_owned(), file, length, live, broken: false, starts, _lock: lock }, replay))
    }

    /// Whether the file is in doubt: nothing can be appended until it was written anew.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Appends a line that says nothing, to see whether lines can be appended.
    ///
    /// # Errors
    /// As [`Journal::append`].
    pub fn probe(&mut self) -> io::Result<()> {
        self.append(&[Record::Forget { id: String::new() }])
    }

    /// Writes the file anew with these records alone: everything that is to be kept.
    ///
    /// # Errors
    /// Those of the file system; the file is then still in doubt.
    pub fn rewrite(&mut self, records: &[Record]) -> io::Result<()> {
        (self.file, self.length, self.live) = write_new(&self.directory, self.starts, records)?;
        self.broken = false;
        Ok(())
    }

    /// Appends records; they are on disk when this returns.
    ///
    /// # Errors
    /// Those of the file system. After one the file is as it was; where even that cannot be had, every later append fails.
    pub fn append(&mut self, records: &[Record]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("the file is in doubt since an earlier write failed"));
        }
        let mut bytes = Vec::new();
        let mut sizes = Vec::with_capacity(records.len());
        for record in records {
            let line = record::to_line(record);
            sizes.push(line.len() as u64);
            bytes.extend_from_slice(&line);
        }
        failpoint::pass("agent-journal-before");
        if let Err(error) = self.file.write_all(&bytes) {
            // Half a line in the middle would be damage; the tail goes before anything follows it.
            let mended = self.file.set_len(self.length).and_then(|()| self.file.seek(SeekFrom::Start(self.length)));
            self.broken = mended.is_err();
            return Err(error);
        }
        if let Err(error) = self.file.sync_data() {
            // What the kernel dropped after a failed sync cannot be known (fsync(2)). Whoever waited for these lines is refused, so they
            // had better not be there.
            let _ = self.file.set_len(self.length);
            self.broken = true;
            return Err(error);
        }
        failpoint::pass("agent-journal-after");
        self.length += bytes.len() as u64;
        records.iter().zip(sizes).for_each(|(record, size)| note_size(&mut self.live, record, size));
        self.compact();
        Ok(())
    }

    /// Writes the file anew when most of it is history. A failure leaves the old file, which is as good.
    fn compact(&mut self) {
        let live: u64 = self.live.values().flatten().sum();
        if self.length < limits::JOURNAL_COMPACT_BYTES_MIN || self.length < live.saturating_mul(3) {
            return;
        }
        let path = self.directory.join(FILE);
        let rewritten = fs::read(&path).map_err(|e| Error::Io(path.clone(), e)).and_then(|bytes| {
            let replay = replay(&bytes, &path)?;
            write_new(&self.directory, self.starts, &records_of(&replay)).map_err(|e| Error::Io(path.clone(), e))
        });
        match rewritten {
            Ok((file, length, live)) => (self.file, self.length, self.live) = (file, length, live),
            Err(error) => {
                // It may have come as far as the new name; what is appended to the old file would then be lost.
                self.broken = true;
                log::warn!("the journal was not compacted: {}", Chain(&error));
            }
        }
    }
}

/// Of each workload, the bytes of its last two lines that count.
type Sizes = BTreeMap<String, [u64; 2]>;

fn note_size(sizes: &mut Sizes, record: &Record, size: u64) {
    match record {
        Record::Accept(accepted) => sizes.entry(accepted.id.clone()).or_default()[0] = size,
        Record::Begin { .. } => {}
        Record::Forget { id } => drop(sizes.remove(id)),
        Record::Update(update) => sizes.entry(update.id.clone()).or_default()[1] = size,
    }
}

fn records_of(replay: &Replay) -> Vec<Record> {
    let of_one = |saved: &Saved| {
        let accept = Record::Accept(Box::new(saved.accepted.clone()));
        std::iter::once(accept).chain(saved.update.clone().map(|update| Record::Update(Box::new(update)))).collect::<Vec<_>>()
    };
    replay.saved.values().flat_map(of_one).collect()
}

/// The state the lines add up to. A torn last line counts for nothing.
fn replay(bytes: &[u8], path: &Path) -> Result<Replay, Error> {
    let mut replay = Replay::default();
    let damaged = |index: usize| Error::Damaged { path: path.to_owned(), line: index + 1 };
    let mut lines = bytes.split_inclusive(|b| *b == b'\n').enumerate().peekable();
    while let Some((index, line)) = lines.next() {
        let whole = line.strip_suffix(b"\n");
        if index == 0 {
            if let Some(version) = whole.and_then(record::version).filter(|version| *version != VERSION) {
                return Err(Error::Foreign { path: path.to_owned(), version });
            }
        }
        match whole.and_then(record::parse::<Record>) {
            Some(Record::Begin { starts, .. }) if index == 0 => replay.starts = starts,
            Some(Record::Accept(accepted)) if index > 0 => {
                let update = replay.saved.remove(&accepted.id).filter(|old| old.accepted.uid == accepted.uid).and_then(|old| old.update);
                replay.saved.insert(accepted.id.clone(), Saved { accepted: *accepted, update });
            }
            Some(Record::Update(update)) if index > 0 => {
                let saved = replay.saved.get_mut(&update.id).ok_or_else(|| damaged(index))?;
                saved.update = Some(*update);
            }
            Some(Record::Forget { id }) if index > 0 => {
                replay.saved.remove(&id);
            }
            // The first line came with the file, in one piece.
            None if index > 0 && lines.peek().is_none() && whole.is_none() => {
                log::warn!("{}: the last line is torn and was never acknowledged", path.display());
            }
            Some(_) | None => return Err(damaged(index)),
        }
    }
    Ok(replay)
}

/// Writes a whole file and puts it in place of the old one: either is whole at every moment.
fn write_new(directory: &Path, starts: u64, records: &[Record]) -> io::Result<(File, u64, Sizes)> {
    let hidden = directory.join("journal.new");
    let mut bytes = record::to_line(&Record::Begin { version: VERSION, starts });
    let mut sizes = Sizes::new();
    for record in records {
        let line = record::to_line(record);
        note_size(&mut sizes, record, line.len() as u64);
        bytes.extend_from_slice(&line);
    }
    let mut file = OpenOptions::new().create(true).truncate(true).read(true).write(true).mode(0o600).open(&hidden)?;
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    if let Err(error) = written {
        let _ = fs::remove_file(&hidden); // It would only take room.
        return Err(error);
    }
    let parent = File::open(directory)?;
    failpoint::pass("agent-journal-rename-before");
    fs::rename(&hidden, directory.join(FILE))?;
    parent.sync_all()?;
    failpoint::pass("agent-journal-rename-after");
    Ok((file, bytes.len() as u64, sizes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Status;
    use crate::wire::record::{SavedClass, Wanted};
    use crate::workload::State;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("kakuri-journal-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            Self(dir)
        }

        fn open(&self) -> Result<(Journal, Replay), Error> {
            Journal::open(&self.0)
        }

        fn bytes(&self) -> Vec<u8> {
            fs::read(self.0.join(FILE)).expect("there")
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn keep(id: &str) -> Record {
        let class = SavedClass { handler: "h".into(), own_kernel: false, annotations: BTreeMap::new(), overhead_mb: 0, sandbox_ms_max: 1 };
        Record::Accept(Box::new(Accepted {
            id: id.into(),
            uid: "u".into(),
            workload: [("id".to_owned(), id.into())].into_iter().collect(),
            is_env_known: true,
            endpoint: "/run/x".into(),
            class,
        }))
    }

    fn update(id: &str, state: State) -> Record {
        Record::Update(Box::new(Update {
            id: id.into(),
            wanted: Wanted::Run,
            state,
            status: Status::accepted(None),
            launched: false,
            retired: false,
            streak: 0,
            restart_at: None,
            ttl_at: None,
            ailing: None,
            asked_to_stop: None,
            ran_since: None,
            boot_id: "boot".into(),
        }))
    }

    fn forget(id: &str) -> Record {
        Record::Forget { id: id.into() }
    }

    #[test]
    fn what_was_appended_is_there_after_a_restart() {
        let dir = Dir::new("restart");
        let (mut journal, replay) = dir.open().expect("begun");
        assert!(replay.saved.is_empty());
        journal.append(&[keep("a"), keep("b")]).expect("written");
        journal.append(&[update("a", State::Failed), forget("b")]).expect("written");
        drop(journal);
        let (_, replay) = dir.open().expect("opened");
        let states: Vec<_> = replay.saved.iter().map(|(id, s)| (id.as_str(), s.update.as_ref().map(|u| u.state))).collect();
        assert_eq!(states, [("a", Some(State::Failed))]);
        assert_eq!(replay.starts, 2);
    }

    #[test]
    fn a_journal_cut_anywhere_is_a_prefix_of_what_was_written() {
        let dir = Dir::new("torn");
        let (mut journal, _) = dir.open().expect("begun");
        for id in ["a", "b", "c"] {
            journal.append(&[keep(id)]).expect("written");
        }
        drop(journal);
        let whole = dir.bytes();
        let mut before = 0;
        // The first line is written with the file, which appears whole or not at all.
        let first = whole.iter().position(|b| *b == b'\n').expect("a line") + 1;
        for cut in first..=whole.len() {
            fs::write(dir.0.join(FILE), &whole[..cut]).expect("written");
            let (_, replay) = dir.open().expect("a torn tail is no damage");
            assert!(replay.saved.len() >= before, "cut at {cut}");
            before = replay.saved.len();
        }
        assert_eq!(before, 3);
    }

    #[test]
    fn damage_in_the_middle_is_refused_with_the_way_out() {
        let dir = Dir::new("damaged");
        let (mut journal, _) = dir.open().expect("begun");
        journal.append(&[keep("a"), keep("b")]).expect("written");
        drop(journal);
        let mut bytes = dir.bytes();
        let middle = bytes.iter().position(|b| *b == b'\n').expect("lines") + 20;
        bytes[middle] ^= 1;
        fs::write(dir.0.join(FILE), bytes).expect("written");
        let error = dir.open().map(|_| ()).expect_err("damaged");
        assert!(matches!(error, Error::Damaged { line: 2, .. }), "{error}");
        assert!(error.to_string().contains("move it away"));
    }

    #[test]
    fn another_version_and_another_agent_are_noticed() {
        let dir = Dir::new("other");
        let (journal, _) = dir.open().expect("begun");
        assert!(matches!(dir.open().map(|_| ()), Err(Error::Busy(_))));
        drop(journal);
        fs::write(dir.0.join(FILE), record::to_line(&Record::Begin { version: 2, starts: 1 })).expect("written");
        assert!(matches!(dir.open().map(|_| ()), Err(Error::Foreign { version: 2, .. })));
    }

    #[test]
    fn history_is_compacted_and_nothing_alive_is_lost() {
        let dir = Dir::new("compact");
        let (mut journal, _) = dir.open().expect("begun");
        journal.append(&[keep("kept"), update("kept", State::Running)]).expect("written");
        let mut longest = 0;
        for _ in 0..3000 {
            journal.append(&[keep("a"), update("a", State::Failed), forget("a")]).expect("written");
            longest = longest.max(journal.length);
        }
        assert!(longest < limits::JOURNAL_COMPACT_BYTES_MIN + 4096, "{longest}");
        drop(journal);
        let (_, replay) = dir.open().expect("opened");
        assert_eq!(replay.saved.keys().collect::<Vec<_>>(), ["kept"]);
    }

    #[test]
    fn after_a_compaction_that_failed_nothing_is_appended_before_the_file_is_written_anew() {
        let dir = Dir::new("doubt");
        let (mut journal, _) = dir.open().expect("begun");
        let hidden = dir.0.join("journal.new");
        fs::create_dir(&hidden).expect("nothing can be written under this name now");
        while !journal.is_broken() {
            assert!(journal.length <= limits::JOURNAL_COMPACT_BYTES_MIN + 4096, "it was not compacted");
            journal.append(&[keep("a"), update("a", State::Running)]).expect("what was appended is on disk, compacted or not");
        }
        journal.append(&[keep("b")]).expect_err("which file it would go to is not known");
        journal.rewrite(&[keep("a")]).expect_err("still not");
        assert!(journal.is_broken());
        fs::remove_dir(&hidden).expect("removed");
        journal.rewrite(&[keep("a"), update("a", State::Running)]).expect("written anew");
        journal.append(&[keep("c")]).expect("appended");
        drop(journal);
        let (_, replay) = dir.open().expect("opened");
        assert_eq!(replay.saved.keys().collect::<Vec<_>>(), ["a", "c"]);
    }
}
