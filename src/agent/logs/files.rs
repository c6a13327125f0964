//! The files of one workload's output: which there are, in which order, and what may be done to them.
//!
//! The runtime writes attempt `A` to `A.log`. A rotation renames that to `A.log.N`, and the runtime opens `A.log` anew. `N` is 1 at
//! first and grows by one with each rotation of the attempt.
//!
//! Everything goes through the directory's descriptor, so that a path cannot be changed under us.
//!
//! Invariant: no link is followed, and nothing but a plain file is opened, emptied or measured.
//! Invariant: the newest `A.log.N` of the newest attempt may be emptied, never removed. So its number is never given a second time,
//! and a reader sees by the numbers whether something between two files is missing.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

use crate::limits;

/// The name of a log file. The order of names is the order in which the files were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// Of the workload.
    pub attempt: u32,
    /// Of the rotation; [`Name::LIVE`] of the file that was not renamed yet.
    pub number: u64,
}

impl Name {
    /// The number of what the runtime writes to: behind all others.
    pub const LIVE: u64 = u64::MAX;

    /// What the runtime writes of an attempt.
    pub fn live(attempt: u32) -> Self {
        Self { attempt, number: Self::LIVE }
    }

    /// Whether it was not renamed yet.
    pub fn is_live(self) -> bool {
        self.number == Self::LIVE
    }

    fn parse(text: &str) -> Option<Self> {
        let (attempt, rest) = text.split_once(".log")?;
        let attempt = attempt.parse().ok()?;
        let number = if rest.is_empty() { Self::LIVE } else { rest.strip_prefix('.')?.parse().ok().filter(|n| *n > 0)? };
        // Only the spelling that we write ourselves: `+1` and `01` are numbers, too.
        Some(Self { attempt, number }).filter(|name| name.to_string() == text)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::cri::runtime::log_file(self.attempt))?;
        if self.is_live() { Ok(()) } else { write!(f, ".{}", self.number) }
    }
}

/// The newest rotated file among sorted names, if it is of the newest attempt: the one that is never removed.
pub fn keystone(names: &[Name]) -> Option<Name> {
    let newest = names.last()?.attempt;
    names.iter().rev().find(|name| !name.is_live()).copied().filter(|name| name.attempt == newest)
}

/// What the file system says of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its size.
    pub bytes: u64,
    /// When it was last written to, seconds since 1970, and nanoseconds.
    pub written: (i64, i64),
    /// Which file it is, whatever its name.
    pub identity: Identity,
}

/// A device and a file on it. Not used again while somebody has the file open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity(u64, u64);

/// A directory of log files.
#[derive(Debug)]
pub struct Files(OwnedFd);

impl Files {
    /// Opens the directory; `None` when there is none.
    ///
    /// # Errors
    /// Those of the file system; a link in its place is one.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        present(openat(CWD, path, flags, Mode::empty())).map(|dir| dir.map(Self))
    }

    /// Whether it has an entry of this name, be it what it may.
    pub fn has(&self, entry: &str) -> bool {
        statat(&self.0, entry, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The log files, in their order.
    ///
    /// # Errors
    /// Those of the file system; more files than [`limits::LOG_DIR_FILES_MAX`].
    pub fn names(&self) -> io::Result<Vec<Name>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.0)? {
            let entry = match entry {
                Ok(entry) => entry,
                // The directory is gone, and so are its files.
                Err(Errno::NOENT) => break,
                Err(error) => return Err(error.into()),
            };
            names.extend(entry.file_name().to_str().ok().and_then(Name::parse));
            if names.len() > limits::LOG_DIR_FILES_MAX {
                return Err(io::Error::other(format!("more than {} log files", limits::LOG_DIR_FILES_MAX)));
            }
        }
        names.sort_unstable();
        // A file that is renamed meanwhile may be seen twice, under the same name only if the file system repeats itself.
        names.dedup();
        Ok(names)
    }

    /// Measures a file; `None` when it is not there, or is no plain file.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn facts(&self, name: Name) -> io::Result<Option<Facts>> {
        let stat = present(statat(&self.0, name.to_string(), AtFlags::SYMLINK_NOFOLLOW))?;
        let stat = stat.filter(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        #[allow(clippy::unnecessary_cast, clippy::cast_possible_wrap)] // The types differ between architectures.
        Ok(stat.map(|stat| Facts {
            bytes: u64::try_from(stat.st_size).unwrap_or(0),
            written: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            identity: Identity(stat.st_dev as u64, stat.st_ino as u64),
        }))
    }

    /// Opens a file for reading; `None` when it is not there, or is no plain file.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&self, name: Name) -> io::Result<Option<(File, Identity)>> {
        self.open_file(name, OFlags::RDONLY)
    }

    /// Gives a file another name. One that has that name is replaced: whoever asks makes sure that none has.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn rename(&self, from: Name, to: Name) -> io::Result<()> {
        Ok(renameat(&self.0, from.to_string(), &self.0, to.to_string())?)
    }

    /// Gives the space of a file back, at once and whoever has it open, and leaves its name. Returns how much that was.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn empty(&self, name: Name) -> io::Result<u64> {
        let Some((file, _)) = self.open_file(name, OFlags::WRONLY)? else { return Ok(0) };
        let bytes = file.metadata()?.len();
        file.set_len(0)?;
        Ok(bytes)
    }

    /// Empties a file and removes it. A reader that has it open sees that something is missing. Returns how much it held.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, name: Name) -> io::Result<u64> {
        let bytes = self.empty(name)?;
        present(unlinkat(&self.0, name.to_string(), AtFlags::empty()))?;
        Ok(bytes)
    }

    fn open_file(&self, name: Name, access: OFlags) -> io::Result<Option<(File, Identity)>> {
        // Without NONBLOCK, opening a pipe would wait for its other end.
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = match openat(&self.0, name.to_string(), flags, Mode::empty()) {
            // A link, or a pipe without a reader.
            Err(Errno::LOOP | Errno::NXIO) => None,
            result => present(result)?,
        };
        let Some(file) = opened.map(File::from) else { return Ok(None) };
        let metadata = file.metadata()?;
        Ok(metadata.is_file().then_some((file, Identity(metadata.dev(), metadata.ino()))))
    }
}

/// What is not there is no error.
fn present<T>(result: Result<T, Errno>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A file system's size, and what an ordinary process may still write to it, in bytes.
///
/// # Errors
/// Those of the file system.
pub fn space(path: &Path) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok((bytes(stat.f_blocks), bytes(stat.f_bavail)))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::super::tests::Dir;
    use super::*;

    #[test]
    fn names_are_those_we_write() {
        for text in ["0.log", "12.log", "0.log.1", "3.log.18446744073709551614"] {
            assert_eq!(Name::parse(text).map(|name| name.to_string()).as_deref(), Some(text));
        }
        for text in ["", ".log", "a.log", "+1.log", "01.log", "0.log.", "0.log.0", "0.log.01", "0.log.x", "0.log.1.gz", "0.logs", "-1.log"]
        {
            assert_eq!(Name::parse(text), None, "{text}");
        }
        assert_eq!(Name::parse("0.log.18446744073709551615"), None, "that one is the live file's");
        let order = ["0.log.9", "0.log.10", "0.log", "1.log.1", "1.log"].map(|text| Name::parse(text).expect("a name"));
        assert!(order.is_sorted());
    }

    #[test]
    fn the_newest_number_is_the_keystone() {
        let check = |names: &[&str], expect: Option<&str>| {
            let names: Vec<Name> = names.iter().map(|text| Name::parse(text).expect("a name")).collect();
            assert_eq!(keystone(&names).map(|name| name.to_string()).as_deref(), expect);
        };
        check(&[], None);
        check(&["0.log"], None);
        check(&["0.log.1", "0.log.2", "0.log"], Some("0.log.2"));
        check(&["0.log.1", "0.log.2"], Some("0.log.2"));
        check(&["0.log.1", "0.log", "1.log"], None);
    }

    #[test]
    fn links_pipes_and_directories_are_no_log_files() {
        let dir = Dir::new("plain");
        fs::write(dir.0.join("secret"), "secret").expect("written");
        symlink(dir.0.join("secret"), dir.0.join("0.log")).expect("linked");
        fs::create_dir(dir.0.join("1.log")).expect("made");
        let made = std::process::Command::new("mkfifo").arg(dir.0.join("2.log")).status();
        assert!(made.is_ok_and(|status| status.success()));
        dir.append("3.log", "text");
        let files = Files::open(&dir.0).expect("opened").expect("there");
        assert_eq!(files.names().expect("listed").len(), 4);
        for attempt in 0..3 {
            let name = Name::live(attempt);
            assert!(files.facts(name).expect("measured").is_none() && files.read(name).expect("no error").is_none(), "{name}");
            assert!(!matches!(files.empty(name), Ok(1..)), "{name}");
        }
        assert_eq!(fs::read_to_string(dir.0.join("secret")).expect("there"), "secret");
        assert_eq!(files.empty(Name::live(3)).expect("emptied"), 4);
        assert_eq!(files.remove(Name::live(3)).expect("removed"), 0);
        assert!(!dir.0.join("3.log").exists());
        symlink(&dir.0, dir.0.join("link")).expect("linked");
        assert!(Files::open(&dir.0.join("link")).is_err());
        assert!(Files::open(&dir.0.join("none")).expect("no error").is_none());
    }

    #[test]
    fn a_file_system_has_space() {
        let (total, free) = space(&std::env::temp_dir()).expect("measured");
        assert!(total > 0 && free <= total, "{free} of {total}");
    }
}
