use std::fs;

use super::*;
use crate::wire::agent::Reply;
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
    assert_eq!(drain(&mut reader), "!next");
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

#[test]
fn a_later_reader_hears_of_what_was_dropped_before_it_came() {
    let check = |name: &str, files: &[&str], act: &dyn Fn(&Files) -> io::Result<u64>, more: &str, expect: &str| {
        let dir = Dir::new(name);
        for (n, file) in (0..).zip(files) {
            dir.append(file, &records(n..n + 1));
        }
        let opened = Files::open(&dir.0).expect("opened").expect("there");
        act(&opened).expect("dropped");
        dir.append(more, &records(7..8));
        let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
        assert_eq!(drain(&mut reader), expect, "{name}");
    };
    check("over", &["0.log"], &Files::start_over, "0.log", "!7");
    check("over-again", &["0.log.1", "0.log"], &Files::start_over, "0.log", "0 !7");
    check("over-numbered", &["0.log.1"], &Files::start_over, "0.log.2", "!7");
    check("over-hanging", &["0.log.1", "0.log.2"], &Files::start_over, "0.log.3", "0 !7");
    let attempts = |files: &Files| files.give_up(Name::live(0)).and_then(|_| files.give_up(Name::live(1)));
    check("attempts", &["0.log", "1.log", "2.log"], &attempts, "2.log", "!2 7");
    let rotated = |files: &Files| files.give_up(Name { attempt: 0, number: 1 });
    check("end", &["0.log.1", "0.log", "1.log"], &rotated, "1.log", "!1 2 7");
    // An attempt that wrote nothing is no gap.
    let dir = Dir::new("silent");
    dir.append("0.log", "");
    dir.append("1.log", &records(0..1));
    assert_eq!(drain(&mut LogReader::new(dir.0.clone(), &request(None, None))), "0");
}

#[test]
fn a_reader_goes_on_where_what_it_reads_was_emptied_and_got_another_number() {
    let dir = Dir::new("renumbered");
    let files = Files::open(&dir.0).expect("opened").expect("there");
    let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
    dir.append("0.log", &records(0..2));
    assert_eq!(drain(&mut reader), "0 1");
    files.start_over().expect("emptied");
    dir.append("0.log", &records(2..3));
    assert_eq!(drain(&mut reader), "!2");
    rename(&dir, "0.log", "0.log.2");
    dir.append("0.log", &records(3..4));
    assert_eq!(drain(&mut reader), "3");
    rename(&dir, "0.log", "0.log.3");
    assert_eq!(drain(&mut reader), "");
    files.start_over().expect("emptied");
    dir.append("0.log.4", &records(4..5));
    assert_eq!(drain(&mut reader), "!4");
    dir.append("0.log", &records(5..6));
    assert_eq!(drain(&mut reader), "5");
}

/// Deletes a log directory, as the agent does.
fn delete(dir: &Dir) {
    let last = dir.0.with_extension("new");
    fs::rename(&dir.0, &last).expect("renamed");
    Files::open(&last).expect("opened").expect("there").wipe();
    fs::remove_dir_all(last).expect("removed");
}

#[test]
fn a_deletion_is_a_gap_for_who_had_not_read_all() {
    let check = |name: &str, files: &[&str], read: &[&str], more: &str, expect: (&str, bool)| {
        let dir = Dir::new(name);
        let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
        for (n, file) in (0..).zip(files) {
            dir.append(file, &records(n..n + 1));
        }
        dir.append(files.last().expect("a file"), &format!("{TIME} stdout P half\n"));
        assert_eq!(drain(&mut reader), read.join(" "), "{name}");
        let last = more.split_once('>').map_or(more, |(from, to)| {
            rename(&dir, from, to);
            "0.log"
        });
        if !last.is_empty() {
            dir.append(last, &records(5..6));
        }
        delete(&dir);
        assert_eq!(drain(&mut reader), "", "{name}");
        let rest = texts(reader.finish()).join(" ");
        assert_eq!((rest.as_str(), reader.has_gap()), expect, "{name}");
        assert_eq!((drain(&mut reader).as_str(), reader.has_gap()), ("", expect.1), "{name}: said once");
        fs::create_dir(&dir.0).expect("made");
    };
    check("deleted-read", &["0.log"], &["0"], "", ("half", false));
    check("deleted-rotated", &["0.log.1", "0.log.2", "0.log"], &["0", "1", "2"], "", ("half", false));
    check("deleted-grown", &["0.log"], &["0"], "0.log", ("", true));
    check("deleted-next", &["0.log"], &["0"], "0.log>0.log.1", ("", true));
    check("deleted-attempt", &["0.log"], &["0"], "1.log", ("", true));
    // What is open and empty is told from what is open and was followed by others.
    for (more, is_gap) in [("", false), ("1.log", true)] {
        let dir = Dir::new("deleted-empty");
        dir.append("0.log", "");
        let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
        assert_eq!(drain(&mut reader), "");
        if !more.is_empty() {
            dir.append(more, &records(0..1));
        }
        delete(&dir);
        assert_eq!((drain(&mut reader).as_str(), reader.has_gap()), ("", is_gap), "{more:?}");
        fs::create_dir(&dir.0).expect("made");
    }
    // A file that begins with zeros, as a machine that went down may leave it, is no deletion.
    let dir = Dir::new("zeros");
    dir.append("0.log", &format!("\0\0\0\n{}", records(0..1)));
    let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
    assert_eq!(drain(&mut reader), "!0");
}

#[test]
fn a_record_is_as_long_as_it_may_be_and_no_longer() {
    let record = |bytes: usize| {
        let head = format!("{TIME} stdout F ");
        format!("{head}{}\n", "x".repeat(bytes - head.len()))
    };
    let dir = Dir::new("record");
    dir.append("0.log", &format!("{TIME} stdout P a\n"));
    dir.append("0.log", &record(limits::LOG_RECORD_BYTES_MAX));
    dir.append("0.log", &format!("{TIME} stdout P b\n"));
    dir.append("0.log", &record(limits::LOG_RECORD_BYTES_MAX + 1));
    dir.append("0.log", &format!("{TIME} stdout F next\n{} stdout F no time\n", "9".repeat(limits::LOG_TIME_BYTES_MAX + 1)));
    let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
    let seen = drain(&mut reader);
    let (first, rest) = seen.split_once(' ').expect("two lines");
    assert!(first.starts_with("ax") && rest == "!next", "{rest}");
    assert!(reader.has_gap());
}

#[test]
fn a_line_is_as_long_as_it_may_be_and_longer_ones_come_in_pieces() {
    let pieces = |text: &str| {
        let dir = Dir::new("line");
        let mut rest = text;
        while !rest.is_empty() {
            let (part, behind) = rest.split_at(rest.len().min(16 * 1024));
            rest = behind;
            dir.append("0.log", &format!("{TIME} stdout {} {part}\n", if rest.is_empty() { 'F' } else { 'P' }));
        }
        let mut reader = LogReader::new(dir.0.clone(), &request(None, None));
        let mut lines = Vec::new();
        loop {
            let batch = reader.read().expect("read");
            lines.extend(batch.lines);
            if batch.more == More::Later {
                break;
            }
        }
        let replies = lines.iter().map(|line| Reply::Log(line.clone()).to_line(None));
        assert!(replies.map(|reply| reply.len()).max().is_some_and(|bytes| bytes < limits::LINE_BYTES_MAX));
        texts(lines)
    };
    let max = limits::LOG_LINE_BYTES_MAX;
    let text = "\u{1}".repeat(max);
    assert!(pieces(&text) == [text.clone()]);
    assert!(pieces(&format!("{text}!")) == [text.as_str(), "!"]);
    assert!(pieces(&format!("{text}{text}!")) == [text.as_str(), &text, "!"]);
    assert_eq!(whole_characters("ab\u{20ac}".as_bytes(), 4), 2);
    assert_eq!(whole_characters("ab\u{20ac}c".as_bytes(), 5), 5);
    assert_eq!(whole_characters(&[0x80; 10], 5), 5);
}

#[test]
fn a_tail_that_does_not_fit_says_so() {
    let line = |bytes: usize| LogLine { stream: LogStream::Stdout, time: String::new(), line: "x".repeat(bytes), gap: false };
    let tail = |keep: u64, bytes: usize, count: usize| {
        let mut tail = Tail::new(keep);
        tail.push((0..count).map(|_| line(bytes)).collect());
        let lines: Vec<LogLine> = tail.into_lines().collect();
        (lines.len(), lines.first().is_some_and(|line| line.gap), lines.iter().skip(1).any(|line| line.gap))
    };
    let (bytes, count) = (limits::LOG_LINE_BYTES_MAX, limits::LOG_TAIL_BYTES_MAX / limits::LOG_LINE_BYTES_MAX);
    assert_eq!(tail(1000, bytes, count), (count - 1, true, false));
    assert_eq!(tail(1000, bytes, count * 2), (count - 1, true, false));
    assert_eq!(tail(1000, bytes, count - 1), (count - 1, false, false));
    // Only as many were wanted.
    assert_eq!(tail(3, bytes, count * 2), (3, false, false));
    assert_eq!(tail(3, 10, 3), (3, false, false));
}
