use std::fs;

use super::*;
use crate::workload::WorkloadId;

fn request(since: Option<&str>, stream: Option<LogStream>) -> LogRequest {
    let id = WorkloadId::new("a").expect("valid");
    LogRequest { id, follow: false, tail: None, since: since.and_then(Timestamp::parse), stream }
}

pub(crate) struct Dir(pub(crate) PathBuf);

impl Dir {
    pub(crate) fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("kakuri-logs-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        Self(dir)
    }

    pub(crate) fn append(&self, file: &str, text: &str) {
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
        if batch.more == More::Later {
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

const TIME: &str = "2026-01-01T00:00:00.000000001Z";

/// Records of these lines, with times of their own, as no two records of a runtime have the same.
fn records(lines: std::ops::Range<u32>) -> String {
    lines.map(|n| format!("2026-01-01T00:00:00.{n:09}Z stdout F {n}\n")).collect()
}

fn rename(dir: &Dir, from: &str, to: &str) {
    fs::rename(dir.0.join(from), dir.0.join(to)).expect("renamed");
}

/// Reads until there is no more; the lines, with `!` before those behind a gap.
fn drain(reader: &mut LogReader) -> String {
    let mut seen = Vec::new();
    loop {
        let batch = reader.read().expect("read");
        seen.extend(batch.lines.into_iter().map(|l| format!("{}{}", if l.gap { "!" } else { "" }, l.line)));
        match batch.more {
            More::Now => {}
            More::Soon => std::thread::park_timeout(std::time::Duration::from_millis(limits::LOG_SOON_MS)),
            More::Later => return seen.join(" "),
        }
    }
}

#[test]
fn rotated_files_are_read_in_order() {
    let dir = Dir::new("rotated");
    for (i, file) in ["0.log.9", "0.log.10", "0.log.11", "0.log", "1.log.1", "1.log"].iter().enumerate() {
        let first = u32::try_from(i).expect("few") * 2;
        dir.append(file, &records(first..first + 2));
    }
    let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
    assert_eq!(drain(&mut reader), "!0 1 2 3 4 5 6 7 8 9 10 11", "what came before 0.log.9 is missing");
    let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
    assert_eq!(tail(&mut reader, 3), ["9", "10", "11"]);
    let mut reader = LogReader::new(dir.0.clone(), &request(Some("2026-01-01T00:00:00.000Z"), None));
    assert!(drain(&mut reader).starts_with("!0 1"));
    let mut reader = LogReader::new(dir.0.clone(), &request(Some("2026-01-01T00:00:01Z"), None));
    assert_eq!((drain(&mut reader).as_str(), reader.has_gap()), ("", false));
}

#[test]
fn a_follower_misses_nothing_and_repeats_nothing() {
    let dir = Dir::new("follow");
    let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
    dir.append("0.log", &records(0..2));
    assert_eq!(drain(&mut reader), "0 1");
    // Renamed, and not opened anew: the runtime goes on in the old file.
    rename(&dir, "0.log", "0.log.1");
    assert_eq!(drain(&mut reader), "");
    dir.append("0.log.1", &records(2..3));
    assert_eq!(drain(&mut reader), "2");
    // Opened anew, and the last of the old is written down late.
    dir.append("0.log", &records(4..5));
    assert_eq!(reader.read().expect("read").more, More::Soon);
    dir.append("0.log.1", &records(3..4));
    assert_eq!(drain(&mut reader), "3 4");
    // Several rotations between two looks, and half of a line in each file.
    dir.append("0.log", &format!("{}{TIME} stdout P a\n", records(5..6)));
    rename(&dir, "0.log", "0.log.2");
    dir.append("0.log.3", &format!("{TIME} stdout P b\n"));
    dir.append("0.log.4", &format!("{TIME} stdout F c\n"));
    dir.append("0.log", &records(6..7));
    assert_eq!(drain(&mut reader), "5 abc 6");
    assert_eq!(drain(&mut reader), "");
    // The next attempt, while the file before was rotated once more.
    rename(&dir, "0.log", "0.log.5");
    dir.append("0.log", &records(7..8));
    dir.append("1.log.1", &records(8..9));
    dir.append("1.log", &records(9..10));
    assert_eq!(drain(&mut reader), "7 8 9");
    assert!(!reader.has_gap());
}

#[test]
fn what_was_removed_unread_is_said_and_nothing_is_mixed() {
    let dir = Dir::new("gap");
    let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
    dir.append("0.log", &format!("{}{TIME} stdout P begun \n{TIME} stdout F cut in the mid", records(0..1)));
    assert_eq!(drain(&mut reader), "0");
    rename(&dir, "0.log", "0.log.1");
    let files = Files::open(&dir.0).expect("opened").expect("there");
    // The present file is removed with the next two.
    files.remove(Name { attempt: 0, number: 1 }).expect("removed");
    dir.append("0.log.4", &records(4..5));
    dir.append("0.log", &records(5..6));
    assert_eq!(drain(&mut reader), "!4 5");
    // Emptied where it stands, and longer than before when looked at again.
    files.empty(Name::live(0)).expect("emptied");
    dir.append("0.log", &records(70..90));
    let expect: Vec<String> = (70..90).map(|n| n.to_string()).collect();
    assert_eq!(drain(&mut reader), format!("!{}", expect.join(" ")));
    // Emptied after its rotation, and nothing of it was read.
    rename(&dir, "0.log", "0.log.5");
    dir.append("0.log.6", "");
    dir.append("0.log", &records(91..92));
    assert_eq!(drain(&mut reader), "!91");
    // At the very end there is no line to say it.
    files.empty(Name::live(0)).expect("emptied");
    assert_eq!((drain(&mut reader).as_str(), reader.has_gap()), ("", true));
    // A deleted workload's reader comes to an end.
    fs::remove_dir_all(&dir.0).expect("removed");
    assert_eq!(drain(&mut reader), "");
    fs::create_dir(&dir.0).expect("made");
}

#[test]
fn a_record_that_never_ends_is_passed_over() {
    let dir = Dir::new("endless");
    dir.append("0.log", &format!("{TIME} stdout F {}", "x".repeat(3 * limits::LOG_RECORD_BYTES_MAX)));
    dir.append("0.log", &format!("{TIME} stdout F {TIME} stdout F forged\n{TIME} stdout F next\n"));
    let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
    assert_eq!(drain(&mut reader), "next");
}

#[test]
fn a_reader_keeps_up_with_a_rotation_that_never_rests() {
    let dir = Dir::new("storm");
    let path = dir.0.clone();
    // As the runtime and the agent do it, as fast as they can, with more files than are ever pruned.
    let writer = std::thread::spawn(move || {
        let files = Files::open(&path).expect("opened").expect("there");
        for round in 0..150_u32 {
            let text = records(round * 10..round * 10 + 10);
            fs::write(path.join("0.log"), text).expect("written");
            files.rename(Name::live(0), Name { attempt: 0, number: u64::from(round) + 1 }).expect("renamed");
        }
        fs::write(path.join("0.log"), records(1500..1510)).expect("written");
    });
    let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
    let mut seen = String::new();
    while !seen.ends_with("1509 ") {
        let more = drain(&mut reader);
        if !more.is_empty() {
            seen.push_str(&more);
            seen.push(' ');
        }
        assert!(!more.contains('!'), "{more}");
    }
    writer.join().expect("written");
    let expect: String = (0..1510).map(|n| format!("{n} ")).collect();
    assert!(seen == expect, "{seen}");
}

#[test]
fn times_have_offsets() {
    let utc = parse_time("2026-01-01T00:00:00Z");
    assert_eq!(parse_time("2026-01-01T02:00:00+02:00"), utc);
    assert_eq!(parse_time("2025-12-31T18:30:00-05:30"), utc);
    assert_eq!(parse_time("now"), None);
}
