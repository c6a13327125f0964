//! Where records lie when the process does not run: [`Disk`], and its home in a file of redb, the only place that names that crate.
//!
//! The file has two tables: `workloads` (id to the JSON of [`wire::stored`](crate::wire::stored)) and `store` (the format, the revision
//! up to which all are reserved, the number of the last commit). It is opened with all its checksums verified, and read once; from then
//! on only written.
//!
//! Every commit is in two phases, two syncs: with one, a damaged last commit looks like one that a crash interrupted, and redb would
//! go back to the one before, in silence. One bit of the file still decides which of two commits is the last; so each is numbered,
//! and its number noted in the file `store.mark` after it. That needs no sync: a mark that was lost with the power is only too low.
//!
//! What redb makes of a damaged file is mostly an error and sometimes a panic. It is opened on a thread of its own, at whose edge a
//! panic ends.
//!
//! Invariant: a commit that was acknowledged is there, or the file is refused.
//! Invariant: after an error of the disk the file is opened anew, and verified, before anything is written to it.
//! Invariant: a store file is made under another name and linked into place when it is whole; none is ever replaced. Whoever makes one
//! holds a lock on the directory, and takes nothing away before it has seen that there is none.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use redb::{Builder, Database, ReadableTable, TableDefinition};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::failpoint;
use crate::limits;
use crate::wire::Problems;
use crate::wire::stored::{Line, REVISION_MAX, Stored};
use crate::workload::WorkloadId;

const WORKLOADS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("workloads");
const STORE: TableDefinition<'_, &str, u64> = TableDefinition::new("store");
const FORMAT_KEY: &str = "format";
const REVISION_KEY: &str = "revision";
const COMMITS_KEY: &str = "commits";

/// The format this version reads and writes. A change that an older version would misread is a new number.
pub(super) const FORMAT: u64 = 1;

const FILE: &str = "store.redb";
const NEW_FILE: &str = "store.new";
const MARK_FILE: &str = "store.mark";

/// What one commit changes.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Records, and those that are to go.
    pub(super) rows: Vec<(WorkloadId, Option<String>)>,
    /// Revisions up to this are reserved.
    pub(super) revision: u64,
}

/// What was on disk.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) records: Vec<Stored>,
    /// No revision above this was ever told to anybody.
    pub(super) revision: u64,
}

/// Makes changes last.
pub(super) trait Disk: Send {
    /// Makes all of a batch last, or nothing of it that anybody would see.
    ///
    /// # Errors
    /// [`Error`]; then nobody knows whether it lasts, until a later commit writes the same rows again. A panic is one too, after which
    /// the next commit must find a disk that it can use.
    fn commit(&mut self, batch: &Batch) -> Result<(), Error>;
}

/// A disk that forgets with its process: for tests of everything else.
#[cfg(test)]
pub(super) struct NoDisk;

#[cfg(test)]
impl Disk for NoDisk {
    fn commit(&mut self, _: &Batch) -> Result<(), Error> {
        Ok(())
    }
}

/// Why the disk has not what it should have.
#[derive(Debug)]
pub(in super::super) enum Error {
    /// A file that is not as redb or this version wrote it.
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// The directory cannot be used.
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// There is a store already, and it is not written over.
    Exists(PathBuf),
    /// A store of another version.
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// Another process has it.
    InUse(PathBuf),
    /// The system refused a read or write.
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A lines of an import, each with what is wrong.
    Lines(Vec<(u64, String)>),
    /// There is no store to read.
    Missing(PathBuf),
    /// The code that reads and writes the file panicked.
    Panicked,
    /// Standard input or output failed.
    Pipe(io::Error),
    /// No thread can be made.
    Thread(io::Error),
}

impl Error {
    /// Whether there is no room.
    pub(in super::super) fn is_full(&self) -> bool {
        match self {
            Self::Io { cause, .. } => {
                matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
            }
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged { path, what } => write!(
                f,
                "{} is damaged: {what}; nothing was changed. Move it away, then put a copy of it back, or an export: \
                 kakuri-control-plane --data-dir DIR --import < FILE. Started without it, the control plane begins empty, and leaves \
                 alone what agents run",
                path.display()
            ),
            Self::Directory { path, .. } => write!(f, "the data directory {} cannot be used", path.display()),
            Self::Exists(path) => write!(f, "{} is there already; an import needs a data directory without a store", path.display()),
            Self::Format { path, found } => write!(
                f,
                "{} has format {found}, and this version reads {FORMAT}: run the version that wrote it with --export, and this one \
                 with --import into another data directory",
                path.display()
            ),
            Self::InUse(path) => {
                write!(f, "{} is in use: another control plane runs on this data directory; stop it first", path.display())
            }
            Self::Io { path, .. } => write!(f, "{} cannot be read or written", path.display()),
            Self::Lines(lines) => {
                f.write_str("nothing was imported")?;
                lines.iter().try_for_each(|(number, what)| write!(f, "\n  line {number}: {what}"))
            }
            Self::Missing(path) => write!(f, "there is no {}", path.display()),
            Self::Panicked => f.write_str("what writes the store panicked (see above); its file is opened anew"),
            Self::Pipe(_) => f.write_str("standard input or output failed"),
            Self::Thread(_) => f.write_str("cannot start a thread"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Directory { cause, .. } | Self::Io { cause, .. } | Self::Pipe(cause) | Self::Thread(cause) => Some(cause),
            Self::Damaged { .. }
            | Self::Exists(_)
            | Self::Format { .. }
            | Self::InUse(_)
            | Self::Lines(_)
            | Self::Missing(_)
            | Self::Panicked => None,
        }
    }
}

/// A store file, held open: that is also the lock that keeps a second control plane off.
pub(super) struct StoreFile {
    dir: PathBuf,
    /// `None` after an error, until it was opened anew.
    open: Option<Open>,
}

struct Open {
    database: Database,
    mark: File,
    commits: u64,
}

impl StoreFile {
    /// Opens the store of a data directory, and makes both where they are missing.
    ///
    /// # Errors
    /// [`Error`]
    pub(super) fn open_or_make(dir: &Path) -> Result<(Self, Loaded), Error> {
        make_dir(dir)?;
        if !exists(dir)? {
            match make(dir, &Loaded::default()) {
                // Somebody was faster; it may be in use.
                Ok(()) | Err(Error::Exists(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Self::open(dir)
    }

    /// Opens the store of a data directory, which must have one.
    ///
    /// # Errors
    /// [`Error`]
    pub(super) fn open(dir: &Path) -> Result<(Self, Loaded), Error> {
        if !exists(dir)? {
            return Err(Error::Missing(dir.join(FILE)));
        }
        let dir = dir.to_owned();
        apart(&dir.join(FILE), move || {
            let (open, loaded) = open(&dir)?;
            Ok((Self { dir, open: Some(open) }, loaded))
        })
    }
}

impl Disk for StoreFile {
    fn commit(&mut self, batch: &Batch) -> Result<(), Error> {
        let mut open = match self.open.take() {
            Some(open) => open,
            None => {
                let dir = self.dir.clone();
                apart(&dir.join(FILE), move || Ok(open(&dir)?.0))?
            }
        };
        let commits = open.commits.saturating_add(1);
        // An error leaves the file closed.
        write(&self.dir.join(FILE), &open.database, batch, commits)?;
        open.commits = commits;
        if let Err(error) = open.mark.write_all_at(mark_of(commits).as_bytes(), 0) {
            log::warn!("the mark of the store cannot be written, so that damage of its last commit may go unnoticed: {error}");
        }
        self.open = Some(open);
        Ok(())
    }
}

/// Makes a store that holds this, whole or not at all.
///
/// # Errors
/// [`Error::Exists`] among others.
pub(super) fn make(dir: &Path, content: &Loaded) -> Result<(), Error> {
    let (path, hidden) = (dir.join(FILE), dir.join(NEW_FILE));
    let in_dir = |cause| Error::Directory { path: dir.to_owned(), cause };
    let lock = File::open(dir).map_err(in_dir)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(Error::InUse(path)),
        Err(error) => return Err(in_dir(error.into())),
    }
    // The mark of a store that is there is not ours to take.
    if exists(dir)? {
        return Err(Error::Exists(path));
    }
    // Of a making that was cut short, and of a store that was moved away.
    remove(&hidden).and_then(|()| remove(&dir.join(MARK_FILE))).map_err(in_dir)?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(FILE_MODE).open(&hidden).map_err(in_dir)?;
    let database = builder().create_file(file).map_err(sorted(&path))?;
    let rows = content.records.iter().map(|stored| (stored.workload.id.clone(), Some(stored.to_json()))).collect();
    write(&path, &database, &Batch { rows, revision: content.revision }, 1)?;
    drop(database);
    fs::hard_link(&hidden, &path).map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists(path.clone()),
        _ => in_dir(cause),
    })?;
    remove(&hidden).and_then(|()| File::open(dir)?.sync_all()).map_err(in_dir)
}

/// Whether a data directory has a store.
pub(super) fn exists(dir: &Path) -> Result<bool, Error> {
    dir.join(FILE).try_exists().map_err(|cause| Error::Directory { path: dir.to_owned(), cause })
}

/// Makes a data directory, for its owner alone.
pub(super) fn make_dir(dir: &Path) -> Result<(), Error> {
    let failed = |cause| Error::Directory { path: dir.to_owned(), cause };
    DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir).map_err(failed)?;
    let mode = fs::metadata(dir).map_err(failed)?.permissions().mode();
    if mode & 0o077 != 0 {
        // It may be somebody's on purpose; the files in it are for their owner alone anyway.
        log::warn!("the data directory {} is open to others (mode {:o})", dir.display(), mode & 0o7777);
    }
    Ok(())
}

const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    // The format that the next major version of redb reads too.
    builder.set_cache_size(limits::STORE_CACHE_BYTES).create_with_file_format_v3(true);
    builder
}

/// Does something with a file that may be anything on a thread of its own: redb panics over some damage, and a thread's edge is
/// where a panic ends.
fn apart<T: Send + 'static>(path: &Path, act: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    let thread =
        thread::Builder::new().name("store-open".into()).stack_size(limits::STORE_STACK_BYTES).spawn(act).map_err(Error::Thread)?;
    let what = "it makes no sense to redb (see the panic above); it may have been cut short";
    thread.join().unwrap_or_else(|_| Err(Error::Damaged { path: path.to_owned(), what: what.into() }))
}

/// The part of redb's header that none of its checksums covers and that only a later write trips over: page size, pages of a
/// region's header, pages of a region. They are what redb chooses for a file made as ours is.
const GEOMETRY: [u8; 12] = [0, 0x10, 0, 0, 0x82, 0, 0, 0, 0, 0, 0x10, 0];
const GEOMETRY_AT: u64 = 12;

fn check_geometry(path: &Path) -> Result<(), Error> {
    let mut found = [0; GEOMETRY.len()];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut found, GEOMETRY_AT));
    match read {
        Ok(()) if found == GEOMETRY => Ok(()),
        Ok(()) => Err(Error::Damaged { path: path.to_owned(), what: "its header is no header of redb for a store of ours".into() }),
        Err(error) => Err(sort(path, redb::Error::Io(error))),
    }
}

fn open(dir: &Path) -> Result<(Open, Loaded), Error> {
    let path = dir.join(FILE);
    check_geometry(&path)?;
    let mut database = builder().open(&path).map_err(sorted(&path))?;
    // Where the process before was killed, this repairs what needs it; a commit that was interrupted is undone.
    database.check_integrity().map_err(sorted(&path))?;
    let read = read(&path, &database)?;
    let mark = read_mark(dir)?;
    let damaged = |what: String| Error::Damaged { path: path.clone(), what };
    if read.commits < mark.noted {
        return Err(damaged(format!("it has commit {}, and commit {} was acknowledged", read.commits, mark.noted)));
    }
    Ok((Open { database, mark: mark.file, commits: read.commits }, read.loaded))
}

struct Content {
    loaded: Loaded,
    commits: u64,
}

fn read(path: &Path, database: &Database) -> Result<Content, Error> {
    let damaged = |what: String| Error::Damaged { path: path.to_owned(), what };
    let transaction = database.begin_read().map_err(sorted(path))?;
    let store = transaction.open_table(STORE).map_err(sorted(path))?;
    let number = |key: &str| {
        let found = store.get(key).map_err(sorted(path))?.map(|value| value.value());
        found.ok_or_else(|| damaged(format!("it has no {key}")))
    };
    let found = number(FORMAT_KEY)?;
    if found != FORMAT {
        return Err(Error::Format { path: path.to_owned(), found });
    }
    let (revision, commits) = (number(REVISION_KEY)?, number(COMMITS_KEY)?);
    if revision > REVISION_MAX {
        return Err(damaged(format!("it has revision {revision}, and {REVISION_MAX} is the most")));
    }
    let rows = transaction.open_table(WORKLOADS).map_err(sorted(path))?;
    let mut records = Vec::new();
    for row in rows.iter().map_err(sorted(path))? {
        let (key, value) = row.map_err(sorted(path))?;
        let row = |what: &dyn fmt::Display| damaged(format!("workload {:?}: {what}", key.value()));
        match Line::parse(value.value()).map_err(|problems: Problems| row(&problems))? {
            Line::Workload(stored) if stored.workload.id.as_str() == key.value() => records.push(*stored),
            Line::End { .. } | Line::Store { .. } | Line::Workload(_) => return Err(row(&"it is another")),
        }
    }
    if records.len() > limits::STORE_WORKLOADS_MAX {
        return Err(damaged(format!("it has {} workloads, and {} is the most", records.len(), limits::STORE_WORKLOADS_MAX)));
    }
    Ok(Content { loaded: Loaded { records, revision }, commits })
}

fn write(path: &Path, database: &Database, batch: &Batch, commits: u64) -> Result<(), Error> {
    failpoint::pass("control_plane-store-before");
    let mut transaction = database.begin_write().map_err(sorted(path))?;
    transaction.set_two_phase_commit(true);
    {
        let mut store = transaction.open_table(STORE).map_err(sorted(path))?;
        store.insert(FORMAT_KEY, FORMAT).map_err(sorted(path))?;
        store.insert(REVISION_KEY, batch.revision).map_err(sorted(path))?;
        store.insert(COMMITS_KEY, commits).map_err(sorted(path))?;
        let mut workloads = transaction.open_table(WORKLOADS).map_err(sorted(path))?;
        for (id, row) in &batch.rows {
            match row {
                Some(row) => workloads.insert(id.as_str(), row.as_bytes()),
                None => workloads.remove(id.as_str()),
            }
            .map_err(sorted(path))?;
        }
    }
    transaction.commit().map_err(sorted(path))?;
    failpoint::pass("control_plane-store-after");
    Ok(())
}

fn sorted<E: Into<redb::Error>>(path: &Path) -> impl FnOnce(E) -> Error + '_ {
    |cause| sort(path, cause.into())
}

struct Mark {
    file: File,
    noted: u64,
}

/// The mark of a store; one without begins at nothing, as a copy of the store alone does.
fn read_mark(dir: &Path) -> Result<Mark, Error> {
    let path = dir.join(MARK_FILE);
    let failed = |cause| Error::Directory { path: dir.to_owned(), cause };
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(FILE_MODE).open(&path).map_err(failed)?;
    let mut text = String::new();
    let what = || Error::Damaged { path: path.clone(), what: "it is not what was written there".into() };
    file.by_ref().take(MARK_BYTES_MAX).read_to_string(&mut text).map_err(|cause| match cause.kind() {
        io::ErrorKind::InvalidData => what(),
        _ => failed(cause),
    })?;
    if text.is_empty() {
        return Ok(Mark { file, noted: 0 });
    }
    let noted = text.split(' ').next().and_then(|number| number.parse().ok()).filter(|noted| mark_of(*noted) == text);
    Ok(Mark { file, noted: noted.ok_or_else(what)? })
}

const MARK_BYTES_MAX: u64 = 64;

/// Of fixed length, and with a complement: so a half-written one is seen.
fn mark_of(commits: u64) -> String {
    format!("{commits:020} {:020}\n", !commits)
}

/// What an error of redb is to us.
fn sort(path: &Path, cause: redb::Error) -> Error {
    let path = path.to_owned();
    match cause {
        redb::Error::DatabaseAlreadyOpen => Error::InUse(path),
        redb::Error::Corrupted(what) => Error::Damaged { path, what },
        redb::Error::Io(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) => {
            Error::Damaged { path, what: format!("it is no file of redb, or not all of one ({error})") }
        }
        redb::Error::Io(cause) => Error::Io { path, cause },
        redb::Error::PreviousIo => Error::Io { path, cause: io::Error::other("there was an error before") },
        cause => Error::Damaged { path, what: cause.to_string() },
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Makes a store look as if another version had written it.
    pub(in super::super) fn set_format(dir: &Path, format: u64) {
        set(dir, FORMAT_KEY, format);
    }

    /// Makes a store look as if it had seen that many changes.
    pub(in super::super) fn set_revision(dir: &Path, revision: u64) {
        set(dir, REVISION_KEY, revision);
    }

    /// As somebody who makes a store.
    pub(in super::super) fn lock(dir: &File) {
        flock(dir, FlockOperation::LockExclusive).expect("locked");
    }

    fn set(dir: &Path, key: &str, value: u64) {
        let database = builder().open(dir.join(FILE)).expect("opened");
        let transaction = database.begin_write().expect("begun");
        transaction.open_table(STORE).expect("there").insert(key, value).expect("written");
        transaction.commit().expect("committed");
    }
}
