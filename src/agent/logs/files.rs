//! The files of one workload's output: which there are, in which order, and what may be done to them.
//!
//! The runtime writes attempt `A` to `A.log`. A rotation renames that to `A.log.N`, and the runtime opens `A.log` anew. `N` is 1 at
//! first and grows by one with each rotation of the attempt.
//!
//! Everything goes through the directory's descriptor, so that a path cannot be changed under us.
//!
//! Invariant: no link is followed, and nothing but a plain file is opened, emptied or measured.
//! Invariant: no number of an attempt is given a second time; what shows a reader that output is missing is a hole in the numbers, or
//! an empty file that has one. So the newest `A.log.N` may be emptied, and is removed only when one behind it shows the same.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, openat, renameat, statat, unlinkat};
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

/// The name that what the runtime writes of an attempt gets when it is renamed.
pub fn next_name(names: &[Name], attempt: u32) -> Name {
    let numbers = names.iter().filter(|name| name.attempt == attempt && !name.is_live()).map(|name| name.number);
    Name { attempt, number: numbers.max().unwrap_or(0) + 1 }
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

    /// Whether this is its path, still.
    pub fn is_at(&self, path: &Path) -> bool {
        let this = fstat(&self.0).map(|stat| (stat.st_dev, stat.st_ino));
        let there = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map(|stat| (stat.st_dev, stat.st_ino));
        this.is_ok() && this == there
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

    /// Gives up a file that is not written to any more, and those before it, which were given up already; leaves what shows that they
    /// are missing. Returns how much it held.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn give_up(&self, name: Name) -> io::Result<u64> {
        let names = self.names()?;
        let next = names.iter().find(|other| **other > name);
        // Behind it the numbers have a hole.
        let is_shown = next.is_some_and(|next| next.attempt == name.attempt && !next.is_live());
        // Who misses an end of an attempt that is empty misses nothing.
        let is_nothing = || Ok::<_, io::Error>(name.is_live() && self.facts(name)?.is_none_or(|facts| facts.bytes == 0));
        if is_shown || is_nothing()? {
            return self.remove(name);
        }
        let shown = if name.is_live() { next_name(&names, name.attempt) } else { name };
        if name.is_live() {
            self.rename(name, shown)?;
        }
        let bytes = self.empty(shown)?;
        for older in names.iter().filter(|older| **older < name) {
            self.remove(*older)?;
        }
        Ok(bytes)
    }

    /// Empties what is written to, which goes on behind that; leaves what shows that there was more. Returns how much it held.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn start_over(&self) -> io::Result<u64> {
        let names = self.names()?;
        let Some((last, before)) = names.split_last() else { return Ok(0) };
        if self.facts(*last)?.is_none_or(|facts| facts.bytes == 0) {
            return Ok(0);
        }
        let before = before.last().filter(|before| before.attempt == last.attempt);
        let is_before_empty = before.map(|before| self.facts(*before)).transpose()?.flatten().is_some_and(|facts| facts.bytes == 0);
        if !last.is_live() {
            let has_hole = last.number != before.map_or(0, |before| before.number) + 1;
            if has_hole || is_before_empty {
                return self.empty(*last);
            }
            let later = Name { number: last.number + 1, ..*last };
            self.rename(*last, later)?;
            return self.empty(later);
        }
        if is_before_empty {
            return self.empty(*last);
        }
        let shown = next_name(&names, last.attempt);
        let made = self.make(shown);
        let bytes = self.empty(*last)?;
        // What is full of this very file may have room for a name only now.
        if let Err(error) = made.or_else(|_| self.make(shown)) {
            log::warn!("{last} was emptied, and nothing shows it: {error}");
        }
        Ok(bytes)
    }

    /// Gives the space of all files back before they are removed for good. To a reader that has one open its size tells whether all of
    /// it was read, and of its successors: the last keeps its size, and any other grows by one.
    pub fn wipe(&self) {
        // What cannot be wiped is removed all the same; only a reader holds its space for a while.
        let names = self.names().unwrap_or_default();
        for name in &names {
            let Ok(Some((file, _))) = self.open_file(*name, OFlags::WRONLY) else { continue };
            let bytes = file.metadata().map_or(0, |metadata| metadata.len());
            let bytes = if Some(name) == names.last() { bytes } else { bytes.saturating_add(1) };
            let _ = file.set_len(0).and_then(|()| file.set_len(bytes)); // The same.
        }
    }

    fn make(&self, name: Name) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.0, name.to_string(), flags, Mode::RUSR | Mode::WUSR)?;
        Ok(())
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

    fn filled(name: &str, entries: &[(&str, usize)]) -> (Dir, Files) {
        let dir = Dir::new(name);
        for (name, bytes) in entries {
            dir.append(name, &"x".repeat(*bytes));
        }
        let files = Files::open(&dir.0).expect("opened").expect("there");
        (dir, files)
    }

    fn listed(files: &Files) -> String {
        let size = |name: &Name| format!("{name}={}", files.facts(*name).expect("measured").expect("there").bytes);
        files.names().expect("listed").iter().map(size).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_is_given_up_leaves_a_trace() {
        let check = |entries: &[(&str, usize)], name: &str, expect: &str| {
            let (_dir, files) = filled("trace", entries);
            files.give_up(Name::parse(name).expect("a name")).expect("given up");
            assert_eq!(listed(&files), expect, "{name} of {entries:?}");
        };
        // A hole in the numbers; where there is none, an empty file with a number.
        check(&[("0.log.1", 1), ("0.log.2", 2), ("0.log", 3)], "0.log.1", "0.log.2=2 0.log=3");
        check(&[("0.log.2", 2), ("0.log", 3)], "0.log.2", "0.log.2=0 0.log=3");
        check(&[("0.log.2", 0), ("0.log.3", 2), ("0.log", 3)], "0.log.3", "0.log.3=0 0.log=3");
        // That of an attempt stands for those before it.
        check(&[("0.log", 1), ("1.log", 3)], "0.log", "0.log.1=0 1.log=3");
        check(&[("0.log.4", 0), ("0.log", 1), ("1.log", 3)], "0.log", "0.log.5=0 1.log=3");
        check(&[("0.log.1", 0), ("1.log", 1), ("2.log", 3)], "1.log", "1.log.1=0 2.log=3");
        // Nothing was in it.
        check(&[("0.log.4", 0), ("1.log", 0), ("2.log", 3)], "1.log", "0.log.4=0 2.log=3");
        check(&[("0.log", 0), ("1.log", 3)], "0.log", "1.log=3");
        check(&[("1.log", 3)], "0.log", "1.log=3");
    }

    #[test]
    fn what_is_emptied_while_it_is_written_to_leaves_a_trace() {
        let check = |entries: &[(&str, usize)], expect: &str| {
            let (_dir, files) = filled("over", entries);
            assert_eq!(files.start_over().expect("emptied"), entries.last().map_or(0, |(_, bytes)| *bytes as u64));
            assert_eq!(listed(&files), expect, "{entries:?}");
        };
        check(&[("0.log", 3)], "0.log.1=0 0.log=0");
        check(&[("0.log", 0)], "0.log=0");
        check(&[("0.log.1", 1), ("0.log", 3)], "0.log.1=1 0.log.2=0 0.log=0");
        check(&[("0.log.1", 0), ("0.log", 3)], "0.log.1=0 0.log=0");
        check(&[("0.log.1", 0), ("1.log", 3)], "0.log.1=0 1.log.1=0 1.log=0");
        // The runtime did not open a new one.
        check(&[("0.log.1", 3)], "0.log.2=0");
        check(&[("0.log.2", 3)], "0.log.2=0");
        check(&[("0.log.1", 1), ("0.log.2", 3)], "0.log.1=1 0.log.3=0");
        check(&[("0.log.1", 0), ("0.log.2", 3)], "0.log.1=0 0.log.2=0");
        check(&[("0.log", 1), ("1.log.1", 3)], "0.log=1 1.log.2=0");
        check(&[], "");
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
