//! A store as lines of JSON, out and in. Offline: the store must not be in use.

use std::collections::HashSet;
use std::io::{BufRead, BufWriter, Read, Write};
use std::path::Path;

use super::disk::{self, Error, FORMAT, Loaded, StoreFile};
use crate::limits;
use crate::wire::stored::{Line, Stored};

/// What an agent says is clipped, but a store of a version that did not may have a row of a whole body and a whole line of an agent.
const ROW_BYTES_MAX: usize = 2 * limits::LINE_BYTES_MAX;

/// Writes the store of a data directory. Every row was read, so that an import reads it too, unless it is too long for that.
///
/// # Errors
/// [`Error`]
pub(in super::super) fn export(dir: &Path, out: impl Write) -> Result<usize, Error> {
    // Held to the end: it is the lock.
    let (_file, Loaded { records, revision }) = StoreFile::open(dir)?;
    let count = records.len();
    let mut out = BufWriter::new(out);
    let mut put = |line: &Line| {
        let text = line.to_json();
        if text.len() >= ROW_BYTES_MAX {
            let what = format!("a row of {} bytes, and {ROW_BYTES_MAX} are the most", text.len());
            return Err(Error::Damaged { path: dir.to_owned(), what });
        }
        writeln!(out, "{text}").map_err(Error::Pipe)
    };
    put(&Line::Store { format: FORMAT, revision })?;
    for stored in records {
        put(&Line::Workload(Box::new(stored)))?;
    }
    put(&Line::End { workloads: u64::try_from(count).unwrap_or(u64::MAX) })?;
    out.flush().map_err(Error::Pipe)?;
    Ok(count)
}

/// Makes a store out of what [`export`] wrote, in a data directory that has none; all of it or nothing.
///
/// # Errors
/// [`Error::Lines`] names every line that is not as it should be.
pub(in super::super) fn import(dir: &Path, input: impl BufRead) -> Result<usize, Error> {
    disk::make_dir(dir)?;
    if disk::exists(dir)? {
        return Err(Error::Exists(dir.to_owned()));
    }
    let loaded = read(input)?;
    disk::make(dir, &loaded)?;
    Ok(loaded.records.len())
}

fn read(mut input: impl BufRead) -> Result<Loaded, Error> {
    let mut reading = Reading::default();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let bytes_max = u64::try_from(ROW_BYTES_MAX).unwrap_or(u64::MAX);
        input.by_ref().take(bytes_max).read_until(b'\n', &mut line).map_err(Error::Pipe)?;
        if line.is_empty() {
            reading.end(number);
            break;
        }
        let Some(text) = line.strip_suffix(b"\n") else {
            reading.problem(number, format!("has no end: it was cut off, or is longer than {bytes_max} bytes"));
            break;
        };
        match Line::parse(text) {
            Ok(line) => reading.take(number, line),
            Err(problems) => reading.problem(number, problems.to_string()),
        }
        if reading.problems.len() >= limits::PROBLEMS_MAX {
            break;
        }
    }
    if reading.problems.is_empty() {
        Ok(Loaded { records: reading.records, revision: reading.revision.unwrap_or_default() })
    } else {
        Err(Error::Lines(reading.problems))
    }
}

#[derive(Default)]
struct Reading {
    records: Vec<Stored>,
    ids: HashSet<String>,
    /// Once the first line was read.
    revision: Option<u64>,
    is_over: bool,
    problems: Vec<(u64, String)>,
}

impl Reading {
    fn problem(&mut self, number: u64, what: impl Into<String>) {
        self.problems.push((number, what.into()));
    }

    fn take(&mut self, number: u64, line: Line) {
        if self.is_over {
            return self.problem(number, "stands behind the End line");
        }
        match (line, self.revision) {
            (Line::Store { format, revision }, None) if number == 1 => {
                self.revision = Some(revision);
                if format != FORMAT {
                    self.problem(number, format!("/format: is {format}, and this version reads {FORMAT}"));
                }
            }
            (Line::Store { .. }, _) => self.problem(number, "a Store line must be the first, and the only one"),
            (Line::Workload(stored), Some(revision)) => {
                if !self.ids.insert(stored.workload.id.to_string()) {
                    self.problem(number, "/workload/id: was on a line before");
                } else if stored.born > revision {
                    self.problem(number, "/born: is above the revision of the Store line");
                } else if self.records.len() >= limits::STORE_WORKLOADS_MAX {
                    self.problem(number, format!("is one more than the {} workloads that fit", limits::STORE_WORKLOADS_MAX));
                }
                self.records.push(*stored);
            }
            (Line::End { workloads }, Some(_)) => {
                self.is_over = true;
                if self.problems.is_empty() && u64::try_from(self.records.len()) != Ok(workloads) {
                    self.problem(number, format!("/workloads: is {workloads}, and there were {}", self.records.len()));
                }
            }
            (Line::Workload(_) | Line::End { .. }, None) if number == 1 => self.problem(number, "must be a Store line"),
            // The first line has its problem already.
            (Line::Workload(_) | Line::End { .. }, None) => {}
        }
    }

    fn end(&mut self, number: u64) {
        if !self.is_over && self.problems.is_empty() {
            self.problem(number, "is missing: the last line must be an End line");
        }
    }
}
