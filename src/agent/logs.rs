//! The output of a workload, read from the CRI log files the runtime writes: one record a line, `TIME STREAM TAGS TEXT`.
//!
//! A record tagged `P` is part of a line that goes on in the next record of the same stream; `F` ends it. Which files there are, and
//! in which order, [`files`] knows; a reader holds on to the file it has open, whatever becomes of its name, and goes on to the next
//! when nothing more will be written to it.
//!
//! Invariant: a record is handed on only when its newline was read, so that a record being written is never cut.
//! Invariant: no record is handed on twice, and none is joined with what does not belong to it; where something was removed before it
//! was read, or cannot be handed on, the next line says so ([`LogLine::gap`]), or [`LogReader::has_gap`] behind the last. A reader that
//! had seen no file before the whole directory was removed is told nothing.

pub mod files;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use crate::deadline::{Stopwatch, Timestamp};
use crate::limits;
use crate::wire::agent::{LogLine, LogRequest, LogStream};
use files::{Files, Identity, Name};

/// Reads a workload's files in the order they were written.
pub struct LogReader {
    dir: PathBuf,
    files: Option<Files>,
    present: Option<Present>,
    /// Bytes read and not yet part of a record.
    rest: Vec<u8>,
    /// Within a record that is too long to be one, up to its end.
    is_skipping: bool,
    /// Something is missing before the next line.
    gap: bool,
    /// Lines begun, by stream.
    partial: [Partial; 2],
    since: Option<Timestamp>,
    stream: Option<LogStream>,
}

/// The file being read.
struct Present {
    /// As it will be called once it is rotated; as it is called, once it was.
    name: Name,
    file: File,
    identity: Identity,
    /// Bytes read of it.
    offset: u64,
    /// How it begins: another beginning means that it was emptied under us.
    head: Vec<u8>,
    /// Since its successor is there and it did not grow.
    quiet: Option<Stopwatch>,
    /// It was seen under a number: then it is empty only if it was emptied.
    is_numbered: bool,
    /// Nobody writes to it any more: the next time that it has nothing to read is its end.
    is_over: bool,
}

/// What follows the file being read.
enum Next {
    /// This one, and whether something between the two is missing.
    File(Present, bool),
    /// That will be known in a moment.
    Soon,
    /// Nothing, yet.
    Nothing,
}

impl LogReader {
    /// A reader of the directory's files from the beginning.
    pub fn new(dir: PathBuf, request: &LogRequest) -> Self {
        let LogRequest { id: _, follow: _, tail: _, since, stream } = request;
        Self {
            dir,
            files: None,
            present: None,
            rest: Vec::new(),
            is_skipping: false,
            gap: false,
            partial: Default::default(),
            since: *since,
            stream: *stream,
        }
    }

    /// Reads on, a bounded piece of what is there beyond what was read before.
    ///
    /// # Errors
    /// Those of the files; a missing file is an empty one.
    pub fn read(&mut self) -> io::Result<Batch> {
        let mut lines = Vec::new();
        for _ in 0..limits::LOG_BATCH_READ_BYTES_MAX / CHUNK_BYTES {
            if self.read_chunk(&mut lines)? {
                if lines.is_empty() {
                    continue;
                }
                return Ok(Batch { lines, more: More::Now });
            }
            match self.next()? {
                Next::Nothing => return Ok(Batch { lines, more: More::Later }),
                Next::Soon => return Ok(Batch { lines, more: More::Soon }),
                Next::File(next, is_gap) => match &mut self.present {
                    // What was written since the last look, and before the successor was there, is read first.
                    Some(present) if !present.is_over => present.is_over = true,
                    _ => self.enter(next, is_gap, &mut lines),
                },
            }
        }
        Ok(Batch { lines, more: More::Now })
    }

    /// The lines that were begun and not ended, when nothing more will be written: a last line needs no newline.
    pub fn finish(&mut self) -> Vec<LogLine> {
        let begun = [LogStream::Stdout, LogStream::Stderr].into_iter().zip(std::mem::take(&mut self.partial));
        let lines: Vec<_> = begun.filter(|(_, partial)| !partial.text.is_empty()).collect();
        lines.into_iter().filter_map(|(stream, partial)| self.select(stream, partial)).collect()
    }

    /// Whether something after the last line is missing.
    pub fn has_gap(&self) -> bool {
        self.gap
    }

    /// Reads a piece of the present file; false at its end.
    fn read_chunk(&mut self, lines: &mut Vec<LogLine>) -> io::Result<bool> {
        let Some(present) = &mut self.present else { return Ok(false) };
        let mut chunk = vec![0; CHUNK_BYTES];
        let read = present.file.read(&mut chunk)?;
        let chunk = chunk.get(..read).unwrap_or_default();
        if present.offset == 0 {
            present.head = chunk.get(..HEAD_BYTES.min(read)).unwrap_or_default().to_vec();
        }
        // Looked at after reading: as it begins as before, what was read belongs to it.
        let head = head(&present.file)?;
        if head.first() == Some(&0) && self.files.as_ref().is_some_and(|files| !files.is_at(&self.dir)) {
            // The workload was deleted; `Files::wipe` says what its size tells.
            let end = present.file.seek(SeekFrom::End(0))?;
            let is_whole = std::mem::replace(&mut present.offset, end) == end;
            present.head = head;
            if !is_whole {
                self.miss();
            }
            return Ok(false);
        }
        if !head.starts_with(&present.head) {
            present.file.seek(SeekFrom::Start(0))?;
            (present.offset, present.head, present.quiet) = (0, Vec::new(), None);
            self.miss();
            return Ok(true);
        }
        present.head = head;
        if read == 0 {
            return Ok(false);
        }
        present.offset += read as u64;
        (present.quiet, present.is_over) = (None, false);
        lines.extend(self.take_lines(chunk));
        Ok(true)
    }

    /// Something that was not read is gone, and with it the end of what was begun.
    fn miss(&mut self) {
        self.partial = Default::default();
        self.rest.clear();
        self.is_skipping = false;
        self.gap = true;
    }

    /// Goes on to the next file.
    fn enter(&mut self, next: Present, is_gap: bool, lines: &mut Vec<LogLine>) {
        let is_same_attempt = |present: &Present| present.name.attempt == next.name.attempt;
        let is_lost = |present: &Present| present.offset == 0 && (present.is_numbered || is_same_attempt(present));
        if is_gap || self.present.as_ref().is_some_and(is_lost) {
            self.miss();
        } else if !self.present.as_ref().is_some_and(is_same_attempt) {
            lines.extend(self.finish());
        }
        // No runtime splits a record between files: this one was never finished.
        self.rest.clear();
        self.is_skipping = false;
        self.present = Some(next);
    }

    /// Looks for the file that follows the present one, and whether the present one is over.
    ///
    /// A list is no snapshot: a file that is renamed meanwhile may be missing from it. So the list is read again once the next file is
    /// open: whatever was written before that file had its last name by then.
    fn next(&mut self) -> io::Result<Next> {
        if self.files.is_none() {
            self.files = Files::open(&self.dir)?;
        }
        let Some(files) = &self.files else { return Ok(Next::Nothing) };
        let mut is_last = false;
        for _ in 0..LOOKS_MAX {
            let Some((name, _)) = first_after(files, &files.names()?, &mut self.present)? else {
                if std::mem::replace(&mut is_last, true) {
                    return Ok(Next::Nothing);
                }
                continue;
            };
            let Some((file, identity)) = files.read(name)? else { continue };
            let names = files.names()?;
            let name = match first_after(files, &names, &mut self.present)? {
                Some((name, seen)) if seen == identity => name,
                Some(_) | None => continue,
            };
            if self.present.as_mut().is_some_and(|present| !present.is_settled(name)) {
                return Ok(Next::Soon);
            }
            let before = self.present.as_ref().map(|p| p.name).filter(|p| p.attempt == name.attempt).map_or(0, |p| p.number);
            let is_numbered = !name.is_live();
            let number = if is_numbered { name.number } else { files::next_name(&names, name.attempt).number.max(before + 1) };
            let name = Name { attempt: name.attempt, number };
            let next = Present { name, file, identity, offset: 0, head: Vec::new(), quiet: None, is_numbered, is_over: false };
            return Ok(Next::File(next, number != before + 1));
        }
        // Files come and go faster than one can look.
        Ok(Next::Soon)
    }

    fn take_lines(&mut self, bytes: &[u8]) -> Vec<LogLine> {
        self.rest.extend_from_slice(bytes);
        let rest = std::mem::take(&mut self.rest);
        let mut lines = Vec::new();
        for record in rest.split_inclusive(|b| *b == b'\n') {
            match record.strip_suffix(b"\n") {
                Some(_) if self.is_skipping => self.is_skipping = false,
                // No runtime that is set up as usual writes such a record; dropping it keeps memory bounded.
                Some(record) if record.len() > limits::LOG_RECORD_BYTES_MAX => self.miss(),
                Some(record) => {
                    if self.take_record(record, &mut lines).is_none() {
                        self.miss();
                    }
                }
                None if self.is_skipping => {}
                None if record.len() > limits::LOG_RECORD_BYTES_MAX => {
                    self.miss();
                    self.is_skipping = true;
                }
                None => self.rest = record.to_vec(),
            }
        }
        lines
    }

    /// One record, and the lines that are whole with it; `None` when it is none.
    fn take_record(&mut self, record: &[u8], lines: &mut Vec<LogLine>) -> Option<()> {
        let mut parts = record.splitn(4, |b| *b == b' ');
        let time = std::str::from_utf8(parts.next()?).ok().filter(|time| time.len() <= limits::LOG_TIME_BYTES_MAX)?;
        let stream = LogStream::parse(std::str::from_utf8(parts.next()?).ok()?)?;
        let tags = parts.next()?;
        let text = parts.next().unwrap_or_default();
        let is_partial = tags.split(|b| *b == b':').any(|tag| tag == b"P");
        let partial = &mut self.partial[usize::from(stream == LogStream::Stderr)];
        if partial.text.is_empty() {
            time.clone_into(&mut partial.time);
        }
        partial.text.extend_from_slice(text);
        let piece = (partial.text.len() > limits::LOG_LINE_BYTES_MAX).then(|| {
            let rest = partial.text.split_off(whole_characters(&partial.text, limits::LOG_LINE_BYTES_MAX));
            std::mem::replace(partial, Partial { time: time.to_owned(), text: rest })
        });
        let last = (!is_partial).then(|| std::mem::take(partial));
        lines.extend(piece.into_iter().chain(last).filter_map(|whole| self.select(stream, whole)));
        Some(())
    }

    fn select(&mut self, stream: LogStream, Partial { time, text }: Partial) -> Option<LogLine> {
        if self.since.is_some_and(|since| parse_time(&time).is_some_and(|time| time < since)) {
            // What is missing before it is of no interest either.
            self.gap = false;
            return None;
        }
        let is_wanted = self.stream.is_none_or(|s| s == stream);
        is_wanted.then(|| {
            let gap = std::mem::take(&mut self.gap);
            LogLine { stream, line: String::from_utf8_lossy(&text).into_owned(), time, gap }
        })
    }
}

impl Present {
    /// Whether nothing more will be written to it, now that `next` is there and there is nothing to read. A runtime may still be writing
    /// down what it read before it was asked to open the new file.
    fn is_settled(&mut self, next: Name) -> bool {
        // Had `next` no number, it would be the file the runtime was just asked to open.
        let is_passed = next.attempt != self.name.attempt || !next.is_live();
        let quiet = self.quiet.get_or_insert_with(Stopwatch::start);
        self.is_over || is_passed || quiet.elapsed_ms() >= limits::LOG_SETTLE_MS || is_old(&self.file)
    }
}

/// Whether a file was neither written to nor renamed for so long that no call to a runtime can be under way that concerns it.
fn is_old(file: &File) -> bool {
    let changed_s = file.metadata().map_or(i64::MAX, |metadata| metadata.ctime());
    let now_s = i64::try_from(Timestamp::now().as_millis() / 1000).unwrap_or(0);
    now_s.saturating_sub(changed_s) > 2 * i64::try_from(limits::LOG_REOPEN_MS_MAX / 1000).unwrap_or(0)
}

/// The first file behind the one being read, but for that one itself, which may still have its first name.
fn first_after(files: &Files, names: &[Name], present: &mut Option<Present>) -> io::Result<Option<(Name, Identity)>> {
    let from = present.as_ref().map(|present| present.name);
    for name in names.iter().filter(|name| from.is_none_or(|from| **name > from)) {
        let Some(facts) = files.facts(*name)? else { continue };
        match present {
            Some(present) if present.identity == facts.identity && name.is_live() => {}
            // What shows that something is missing may have the number that was to be its own.
            Some(present) if present.identity == facts.identity => (present.name, present.is_numbered) = (*name, true),
            Some(_) | None => return Ok(Some((*name, facts.identity))),
        }
    }
    Ok(None)
}

/// How much of a text fits, without cutting its last character (RFC 3629, section 3).
fn whole_characters(text: &[u8], bytes_max: usize) -> usize {
    let is_inside = |at: &usize| text.get(*at).is_some_and(|b| b & 0xc0 == 0x80);
    (bytes_max.saturating_sub(3)..=bytes_max).rev().find(|at| !is_inside(at)).unwrap_or(bytes_max)
}

/// How a file begins. The time in its first record makes that unlike any other beginning of the same file.
fn head(file: &File) -> io::Result<Vec<u8>> {
    let mut head = vec![0; HEAD_BYTES];
    let read = file.read_at(&mut head, 0)?;
    head.truncate(read);
    Ok(head)
}

/// A line that was begun, and when.
#[derive(Debug, Default)]
struct Partial {
    time: String,
    text: Vec<u8>,
}

/// A piece of the output.
#[derive(Debug)]
pub struct Batch {
    /// Those asked for; may be none although there is more to read.
    pub lines: Vec<LogLine>,
    /// Whether to read on.
    pub more: More,
}

/// When there is more to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum More {
    /// There is more.
    Now,
    /// There may be more, in a moment: a file was just rotated.
    Soon,
    /// Not before the workload writes it.
    Later,
}

/// The last lines of an output, within bounds.
#[derive(Debug)]
pub struct Tail {
    keep: usize,
    lines: VecDeque<LogLine>,
    bytes: usize,
}

impl Tail {
    /// At most so many lines.
    pub fn new(lines: u64) -> Self {
        Self { keep: usize::try_from(lines).unwrap_or(usize::MAX), lines: VecDeque::new(), bytes: 0 }
    }

    /// Adds lines at the end. Whoever asks for more than fits gets the end of it, and hears that it is not all.
    pub fn push(&mut self, lines: Vec<LogLine>) {
        for line in lines {
            self.bytes += cost(&line);
            self.lines.push_back(line);
            while self.lines.len() > self.keep || self.bytes > limits::LOG_TAIL_BYTES_MAX {
                let is_wanted = self.lines.len() <= self.keep;
                self.bytes -= self.lines.pop_front().map_or(self.bytes, |line| cost(&line));
                if let Some(first) = self.lines.front_mut() {
                    first.gap |= is_wanted;
                }
            }
        }
    }

    /// What is left.
    pub fn into_lines(self) -> impl Iterator<Item = LogLine> {
        self.lines.into_iter()
    }
}

/// What a line takes in memory, about.
fn cost(line: &LogLine) -> usize {
    line.line.len() + line.time.len() + size_of::<LogLine>()
}

const CHUNK_BYTES: usize = 64 * 1024;
/// What is compared of a file's beginning: a record's time, stream, tag and first letters.
const HEAD_BYTES: usize = 64;
/// How often a list that changes is read again, before the client is looked at.
const LOOKS_MAX: usize = 4;

/// RFC 3339 with an offset, as runtimes write it (containerd: local time). `None` when it is something else.
fn parse_time(text: &str) -> Option<Timestamp> {
    if text.ends_with('Z') {
        return Timestamp::parse(text);
    }
    let (local, offset) = text.split_at_checked(text.len().checked_sub(6)?)?;
    let (sign, clock) = offset.split_at_checked(1)?;
    let (hours, minutes) = clock.split_once(':')?;
    let ms = (hours.parse::<u64>().ok()? * 60 + minutes.parse::<u64>().ok()?) * 60_000;
    let local = Timestamp::parse(&format!("{local}Z"))?;
    match sign {
        "+" => Some(local.minus_ms(ms)),
        "-" => Some(local.plus_ms(ms)),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests;
