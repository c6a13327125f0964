//! The output of a workload, read from the CRI log files the runtime writes: one record a line, `TIME STREAM TAGS TEXT`.
//!
//! A record tagged `P` is part of a line that goes on in the next record of the same stream; `F` ends it.
//!
//! Invariant: a record is handed on only when its newline was read, so that a record being written is never cut.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::deadline::Timestamp;
use crate::limits;
use crate::wire::agent::{LogLine, LogRequest, LogStream};

/// Reads a workload's files in the order of its attempts.
pub struct LogReader {
    dir: PathBuf,
    attempt: Option<u32>,
    file: Option<File>,
    /// Bytes read and not yet part of a record.
    rest: Vec<u8>,
    /// Lines begun, by stream.
    partial: [Partial; 2],
    since: Option<Timestamp>,
    stream: Option<LogStream>,
}

impl LogReader {
    /// A reader of the directory's files from the beginning.
    pub fn new(dir: PathBuf, request: &LogRequest) -> Self {
        let LogRequest { id: _, follow: _, tail: _, since, stream } = request;
        Self { dir, attempt: None, file: None, rest: Vec::new(), partial: Default::default(), since: *since, stream: *stream }
    }

    /// Reads on, a bounded piece of what is there beyond what was read before.
    ///
    /// # Errors
    /// Those of the files; a missing file is an empty one.
    pub fn read(&mut self) -> io::Result<Batch> {
        let mut lines = Vec::new();
        for _ in 0..limits::LOG_BATCH_READ_BYTES_MAX / CHUNK_BYTES {
            if self.file.is_none() && !self.open_next()? {
                return Ok(Batch { lines, at_end: true });
            }
            let mut chunk = vec![0; CHUNK_BYTES];
            let read = self.file.as_mut().map_or(Ok(0), |file| file.read(&mut chunk))?;
            if read > 0 {
                lines.extend(self.take_lines(chunk.get(..read).unwrap_or_default()));
                if !lines.is_empty() {
                    return Ok(Batch { lines, at_end: false });
                }
                continue;
            }
            // The next attempt's file means that this one is complete.
            if self.next_attempt()?.is_none() {
                return Ok(Batch { lines, at_end: true });
            }
            lines.extend(self.finish());
            self.file = None;
            self.rest.clear();
        }
        Ok(Batch { lines, at_end: false })
    }

    /// The lines that were begun and not ended, when nothing more will be written: a last line needs no newline.
    pub fn finish(&mut self) -> Vec<LogLine> {
        let begun = [LogStream::Stdout, LogStream::Stderr].into_iter().zip(std::mem::take(&mut self.partial));
        let lines: Vec<_> = begun.filter(|(_, partial)| !partial.text.is_empty()).collect();
        lines.into_iter().filter_map(|(stream, partial)| self.select(stream, partial)).collect()
    }

    fn open_next(&mut self) -> io::Result<bool> {
        let Some(attempt) = self.next_attempt()? else { return Ok(false) };
        self.file = Some(File::open(self.dir.join(crate::cri::runtime::log_file(attempt)))?);
        self.attempt = Some(attempt);
        Ok(true)
    }

    fn next_attempt(&self) -> io::Result<Option<u32>> {
        let attempts = attempts(&self.dir)?;
        Ok(attempts.into_iter().filter(|a| self.attempt.is_none_or(|present| *a > present)).min())
    }

    fn take_lines(&mut self, bytes: &[u8]) -> Vec<LogLine> {
        self.rest.extend_from_slice(bytes);
        let rest = std::mem::take(&mut self.rest);
        let mut lines = Vec::new();
        for record in rest.split_inclusive(|b| *b == b'\n') {
            match record.strip_suffix(b"\n") {
                Some(record) => lines.extend(self.take_record(record)),
                None if record.len() > limits::LOG_RECORD_BYTES_MAX => {
                    // No runtime writes such a record; dropping it keeps memory bounded.
                    log::warn!("a log record in {} is longer than {} bytes", self.dir.display(), limits::LOG_RECORD_BYTES_MAX);
                }
                None => self.rest = record.to_vec(),
            }
        }
        lines
    }

    /// One record; `None` when it ends no line, or none that was asked for.
    fn take_record(&mut self, record: &[u8]) -> Option<LogLine> {
        let mut parts = record.splitn(4, |b| *b == b' ');
        let time = std::str::from_utf8(parts.next()?).ok()?;
        let stream = LogStream::parse(std::str::from_utf8(parts.next()?).ok()?)?;
        let tags = parts.next()?;
        let text = parts.next().unwrap_or_default();
        let is_partial = tags.split(|b| *b == b':').any(|tag| tag == b"P");
        let partial = &mut self.partial[usize::from(stream == LogStream::Stderr)];
        if partial.text.is_empty() {
            time.clone_into(&mut partial.time);
        }
        partial.text.extend_from_slice(text);
        if is_partial && partial.text.len() < limits::LOG_LINE_BYTES_MAX {
            return None;
        }
        let whole = std::mem::take(partial);
        self.select(stream, whole)
    }

    fn select(&self, stream: LogStream, Partial { time, text }: Partial) -> Option<LogLine> {
        let is_recent = |since| parse_time(&time).is_none_or(|time| time >= since);
        let wanted = self.stream.is_none_or(|s| s == stream) && self.since.is_none_or(is_recent);
        wanted.then(|| LogLine { stream, line: String::from_utf8_lossy(&text).into_owned(), time })
    }
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
    /// Nothing more is there now.
    pub at_end: bool,
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

    /// Adds lines at the end. Whoever asks for more than fits gets the end of it, as with any tail.
    pub fn push(&mut self, lines: Vec<LogLine>) {
        for line in lines {
            self.bytes += cost(&line);
            self.lines.push_back(line);
            while self.lines.len() > self.keep || self.bytes > TAIL_BYTES_MAX {
                self.bytes -= self.lines.pop_front().map_or(self.bytes, |line| cost(&line));
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
/// What `tail` may hold in memory.
const TAIL_BYTES_MAX: usize = 8 << 20;

fn attempts(dir: &Path) -> io::Result<Vec<u32>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let number = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.strip_suffix(".log")?.parse().ok();
    Ok(entries.filter_map(number).collect())
}

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
mod tests {
    use super::*;
    use crate::workload::WorkloadId;

    fn request(since: Option<&str>, stream: Option<LogStream>) -> LogRequest {
        let id = WorkloadId::new("a").expect("valid");
        LogRequest { id, follow: false, tail: None, since: since.and_then(Timestamp::parse), stream }
    }

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("kakuri-logs-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).expect("a directory");
            Self(dir)
        }

        fn append(&self, file: &str, text: &str) {
            use std::io::Write;
            let mut file = fs::OpenOptions::new().create(true).append(true).open(self.0.join(file)).expect("opened");
            file.write_all(text.as_bytes()).expect("written");
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).expect("removed");
        }
    }

    fn texts(lines: impl IntoIterator<Item = LogLine>) -> Vec<String> {
        lines.into_iter().map(|l| l.line).collect()
    }

    fn read(reader: &mut LogReader) -> Vec<String> {
        texts(reader.read().expect("read").lines)
    }

    fn tail(reader: &mut LogReader, lines: u64) -> Vec<String> {
        let mut tail = Tail::new(lines);
        loop {
            let batch = reader.read().expect("read");
            tail.push(batch.lines);
            if batch.at_end {
                return texts(tail.into_lines());
            }
        }
    }

    #[test]
    fn partial_records_are_joined_by_stream() {
        let dir = Dir::new("partial");
        dir.append(
            "0.log",
            "2026-01-01T00:00:00.000000001Z stdout P one \n2026-01-01T00:00:00Z stderr F err\n2026-01-01T00:00:00Z stdout P two \n\
             2026-01-01T00:00:00Z stdout F three\n2026-01-01T00:00:00Z stdout F \nnonsense\n",
        );
        let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
        assert_eq!(read(&mut reader), ["err", "one two three", ""]);
    }

    #[test]
    fn a_last_line_needs_no_newline() {
        let dir = Dir::new("unended");
        dir.append("0.log", "2026-01-01T00:00:00Z stdout P result\n");
        let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
        assert!(read(&mut reader).is_empty());
        assert_eq!(texts(reader.finish()), ["result"]);
        assert!(reader.finish().is_empty());
        dir.append("0.log", "2026-01-01T00:00:00Z stdout P half\n");
        dir.append("1.log", "2026-01-01T00:00:00Z stdout F whole\n");
        assert_eq!(read(&mut reader), ["half", "whole"], "the next attempt ends a line of the one before");
    }

    #[test]
    fn a_record_is_read_when_it_is_complete_and_once() {
        let dir = Dir::new("growing");
        let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
        assert!(read(&mut reader).is_empty(), "no file yet");
        dir.append("0.log", "2026-01-01T00:00:00Z stdout F ha");
        assert!(read(&mut reader).is_empty(), "half a record");
        dir.append("0.log", "lf\n");
        assert_eq!(read(&mut reader), ["half"]);
        assert!(read(&mut reader).is_empty(), "the end");
        dir.append("1.log", "2026-01-01T00:00:00Z stdout F next attempt\n");
        assert_eq!(read(&mut reader), ["next attempt"]);
    }

    #[test]
    fn since_stream_and_tail_select() {
        let dir = Dir::new("select");
        for i in 0..10 {
            dir.append("0.log", &format!("2026-01-01T02:00:0{i}.5+02:00 {} F line {i}\n", if i % 2 == 0 { "stdout" } else { "stderr" }));
        }
        let mut reader = LogReader::new(dir.0.clone(), &request(Some("2026-01-01T00:00:07Z"), None));
        assert_eq!(read(&mut reader), ["line 7", "line 8", "line 9"]);
        let mut reader = LogReader::new(dir.0.clone(), &request(None, Some(LogStream::Stderr)));
        assert_eq!(tail(&mut reader, 2), ["line 7", "line 9"]);
        let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
        assert!(tail(&mut reader, 0).is_empty());
        assert!(read(&mut reader).is_empty());
    }

    #[test]
    fn times_have_offsets() {
        let utc = parse_time("2026-01-01T00:00:00Z");
        assert_eq!(parse_time("2026-01-01T02:00:00+02:00"), utc);
        assert_eq!(parse_time("2025-12-31T18:30:00-05:30"), utc);
        assert_eq!(parse_time("now"), None);
    }
}
