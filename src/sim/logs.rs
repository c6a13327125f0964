//! CRI log files: one record a line, `RFC3339Nano stdout|stderr P|F text`.
//!
//! Invariant: only running containers have a file open; a container without a log path has none.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use super::script::LogStream;

/// A longer line is split, as containerd does.
const RECORD_BYTES_MAX: usize = 16 * 1024;

/// The log files of running containers, by container id.
#[derive(Debug, Default)]
pub(super) struct Logs(Mutex<HashMap<String, (PathBuf, File)>>);

impl Logs {
    /// Opens a log file, with its directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn open(&self, id: &str, path: PathBuf) -> io::Result<()> {
        if let Some(parent) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        let file = append(&path)?;
        self.lock().insert(id.to_owned(), (path, file));
        Ok(())
    }

    /// Opens it once more, by its name: what is written from now on goes to the file that has the name now.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn reopen(&self, id: &str) -> io::Result<()> {
        let mut files = self.lock();
        if let Some((path, file)) = files.get_mut(id) {
            *file = append(path)?;
        }
        Ok(())
    }

    /// Writes the lines `print` prints, all with one time. A full disk costs lines, not the container.
    pub(super) fn write(&self, id: &str, nanos: i64, print: impl FnOnce(&mut dyn FnMut(LogStream, &[u8]))) {
        let files = self.lock();
        let Some((_, file)) = files.get(id) else { return };
        let mut out = BufWriter::with_capacity(64 * 1024, file);
        let time = UNIX_EPOCH + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
        let time = humantime::format_rfc3339_nanos(time).to_string();
        let mut result = Ok(());
        print(&mut |stream, line| {
            if result.is_ok() {
                result = records(&mut out, &time, stream, line);
            }
        });
        if let Err(error) = result.and_then(|()| out.flush()) {
            log::warn!("log of container {id:?}: {error}");
        }
    }

    /// Closes it.
    pub(super) fn close(&self, id: &str) {
        self.lock().remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (PathBuf, File)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn append(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

fn records(out: &mut impl Write, time: &str, stream: LogStream, mut line: &[u8]) -> io::Result<()> {
    loop {
        let (part, rest) = line.split_at(line.len().min(RECORD_BYTES_MAX));
        write!(out, "{time} {} {} ", stream.as_str(), if rest.is_empty() { 'F' } else { 'P' })?;
        out.write_all(part)?;
        out.write_all(b"\n")?;
        if rest.is_empty() {
            return Ok(());
        }
        line = rest;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn long_lines_are_split_into_partial_records() {
        let check = |length: usize, tags: &str| {
            let mut out = Vec::new();
            records(&mut out, "T", LogStream::Stderr, &vec![b'x'; length]).expect("written");
            let text = String::from_utf8(out).expect("text");
            let seen: String =
                text.lines().map(|l| l.strip_prefix("T stderr ").expect("a record")).filter_map(|l| l.chars().next()).collect();
            assert_eq!(seen, tags, "{length}");
            assert_eq!(text.bytes().filter(|b| *b == b'x').count(), length);
        };
        check(0, "F");
        check(RECORD_BYTES_MAX, "F");
        check(RECORD_BYTES_MAX + 1, "PF");
        check(3 * RECORD_BYTES_MAX, "PPF");
    }

    #[test]
    fn a_reopened_log_goes_to_the_new_file() {
        let dir = std::env::temp_dir().join(format!("kakuri-sim-logs-{}", std::process::id()));
        let path = dir.join("pod/0.log");
        let logs = Logs::default();
        logs.open("c", path.clone()).expect("opened");
        let say = |text: &str| logs.write("c", 1_500_000_000, |line| line(LogStream::Stdout, text.as_bytes()));
        say("old");
        fs::rename(&path, dir.join("pod/0.log.1")).expect("renamed");
        say("still old");
        logs.reopen("c").expect("reopened");
        say("new");
        logs.close("c");
        say("lost");
        let old = "1970-01-01T00:00:01.500000000Z stdout F old\n1970-01-01T00:00:01.500000000Z stdout F still old\n";
        assert_eq!(fs::read_to_string(dir.join("pod/0.log.1")).expect("read"), old);
        assert_eq!(fs::read_to_string(&path).expect("read"), "1970-01-01T00:00:01.500000000Z stdout F new\n");
        let mode = |path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(dir.join("pod")), mode(path)), (0o700, 0o640));
        fs::remove_dir_all(&dir).expect("removed");
    }
}
