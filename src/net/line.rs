//! Lines from a socket: bytes up to `\n`, at most so many, begun and ended in time.
//!
//! Whoever waits for a line may do so in slices: what came of it is kept, and so is how long the rest was waited for.
//!
//! Invariant: `begin <= scanned <= buffer.len()`, `buffer.len() - begin <= bytes_max`, and `buffer[begin..scanned]` holds no newline.

use std::time::Duration;

use super::{Error, Stream};
use crate::deadline::{Deadline, Expired, Stopwatch};

/// Reads lines from one socket; what came after a line stays for the next.
#[derive(Debug)]
pub struct LineReader {
    buffer: Vec<u8>,
    begin: usize,
    scanned: usize,
    bytes_max: usize,
    line_ms: u64,
    /// How long the rest of the line that has begun was waited for: a peer is not slow while its reader does something else.
    waited: Duration,
}

/// Why there is no line.
#[derive(Debug)]
pub enum LineError {
    /// The other side closed in the middle of a line.
    HalfLine,
    /// There was no line, or not the whole of it, when the caller's wait was over.
    Idle(Expired),
    /// A line began and did not end in time.
    Slow(Expired),
    /// The socket failed.
    Socket(Error),
    /// Longer than this many bytes.
    TooLong(usize),
}

impl LineReader {
    /// A reader of lines of at most `bytes_max` bytes, newline included, each complete after at most `line_ms` of waiting
    /// since its first byte.
    pub fn new(bytes_max: usize, line_ms: u64) -> Self {
        Self { buffer: Vec::new(), begin: 0, scanned: 0, bytes_max, line_ms, waited: Duration::ZERO }
    }

    /// The next line without its newline (and without a `\r` before it); `None` when the other side closed between two lines.
    ///
    /// # Errors
    /// [`LineError`]. Only [`LineError::Idle`] leaves the reader usable, with what came of the next line.
    pub fn next(&mut self, stream: &mut Stream, wait: Deadline) -> Result<Option<&[u8]>, LineError> {
        loop {
            let fresh = self.buffer.get(self.scanned..).unwrap_or_default();
            if let Some(at) = fresh.iter().position(|b| *b == b'\n') {
                let end = self.scanned.saturating_add(at);
                let line = self.buffer.get(self.begin..end).unwrap_or_default();
                self.begin = end.saturating_add(1);
                self.scanned = self.begin;
                self.waited = Duration::ZERO;
                return Ok(Some(line.strip_suffix(b"\r").unwrap_or(line)));
            }
            // Only before waiting: moving the rest after each short line would cost the square of a long pipeline.
            self.discard_read();
            self.scanned = self.buffer.len();
            if self.buffer.len() >= self.bytes_max {
                return Err(LineError::TooLong(self.bytes_max));
            }
            let begun = !self.buffer.is_empty();
            let slow = begun.then(|| Deadline::within_ms(self.line_ms.saturating_sub(millis(self.waited)), "line"));
            let watch = Stopwatch::start();
            let result = self.fill(stream, slow.map_or(wait, |slow| wait.or_sooner(slow)));
            if begun {
                self.waited = self.waited.saturating_add(watch.elapsed());
            }
            match result {
                Ok(0) if begun => return Err(LineError::HalfLine),
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(Error::Expired(_)) => {
                    let slow = slow.and_then(|slow| slow.left().err());
                    return Err(slow.map_or_else(|| LineError::Idle(wait.expired()), LineError::Slow));
                }
                Err(error) => return Err(LineError::Socket(error)),
            }
        }
    }

    /// Whether the other side closed or spoke while we were writing to it: what follows a long answer may tell.
    pub fn is_closed(&mut self, stream: &mut Stream) -> bool {
        let mut probe = [0; 512];
        let room = self.bytes_max.saturating_sub(self.buffer.len().saturating_sub(self.begin)).min(probe.len());
        if room == 0 {
            // A client that sends more than a line while it is being answered is not waited for.
            return true;
        }
        match stream.read_ready(probe.get_mut(..room).unwrap_or_default()) {
            Ok(None) => false,
            Ok(Some(0)) | Err(_) => true,
            Ok(Some(n)) => {
                self.buffer.extend_from_slice(probe.get(..n).unwrap_or_default());
                false
            }
        }
    }

    fn fill(&mut self, stream: &mut Stream, deadline: Deadline) -> Result<usize, Error> {
        let used = self.buffer.len();
        // Grow by doubling, from 4 KiB: most lines are short, and an idle connection should cost little.
        let room = used.max(4096).min(self.bytes_max.saturating_sub(used));
        self.buffer.resize(used.saturating_add(room), 0);
        let result = stream.read(self.buffer.get_mut(used..).unwrap_or_default(), deadline);
        let read = *result.as_ref().unwrap_or(&0);
        self.buffer.truncate(used.saturating_add(read));
        result
    }

    fn discard_read(&mut self) {
        self.buffer.drain(..self.begin.min(self.buffer.len()));
        self.begin = 0;
        if self.buffer.is_empty() {
            self.buffer.shrink_to(4096);
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::stream::tests::pair;
    use super::*;

    fn soon() -> Deadline {
        Deadline::within_ms(2000, "idle")
    }

    fn lines(chunks: &[&[u8]], bytes_max: usize) -> (Vec<Vec<u8>>, Option<LineError>) {
        let (mut ours, mut theirs) = pair();
        for chunk in chunks {
            theirs.write_all(chunk, soon()).expect("fits the socket's buffer");
        }
        drop(theirs);
        let mut reader = LineReader::new(bytes_max, 2000);
        let mut seen = Vec::new();
        loop {
            match reader.next(&mut ours, soon()) {
                Ok(Some(line)) => seen.push(line.to_vec()),
                Ok(None) => return (seen, None),
                Err(error) => return (seen, Some(error)),
            }
        }
    }

    #[test]
    fn lines_are_cut_wherever_the_bytes_are_split() {
        let text = b"one\n\ntwo\r\nthree\n";
        for at in 0..text.len() {
            let (seen, error) = lines(&[&text[..at], &text[at..]], 64);
            assert_eq!(seen, [&b"one"[..], b"", b"two", b"three"], "split at {at}");
            assert!(error.is_none());
        }
    }

    #[test]
    fn a_line_at_the_limit_passes_and_one_byte_more_does_not() {
        let (seen, error) = lines(&[b"1234567\n"], 8);
        assert_eq!((seen.len(), error.is_none()), (1, true));
        let (seen, error) = lines(&[b"12345678\n"], 8);
        assert!(seen.is_empty());
        assert!(matches!(error, Some(LineError::TooLong(8))), "{error:?}");
    }

    #[test]
    fn half_a_line_is_an_error_and_silence_after_it_too() {
        assert!(matches!(lines(&[b"half"], 64).1, Some(LineError::HalfLine)));
        let (mut ours, mut theirs) = pair();
        theirs.write_all(b"half", soon()).expect("written");
        let result = LineReader::new(64, 10).next(&mut ours, soon()).map(|_| ());
        assert!(matches!(result, Err(LineError::Slow(e)) if e.phase == "line"), "{result:?}");
    }

    #[test]
    fn a_wait_ends_in_the_middle_of_a_line_and_no_byte_is_lost() {
        let (mut ours, mut theirs) = pair();
        let mut reader = LineReader::new(64, 60_000);
        for part in [&b"one\ntw"[..], b"o, and", b" thr"] {
            theirs.write_all(part, soon()).expect("written");
            let mut wait = |ms| reader.next(&mut ours, Deadline::within_ms(ms, "slice")).map(|line| line.map(<[u8]>::to_vec));
            if part.starts_with(b"one") {
                assert_eq!(wait(2000).ok().flatten().as_deref(), Some(&b"one"[..]));
            }
            let result = wait(5);
            assert!(matches!(result, Err(LineError::Idle(e)) if e.phase == "slice"), "{result:?}");
            // As one that takes what lies ready and waits for nothing.
            assert!(matches!(wait(0), Err(LineError::Idle(_))));
        }
        theirs.write_all(b"ee\nfour\n", soon()).expect("written");
        assert_eq!(reader.next(&mut ours, soon()).ok().flatten(), Some(&b"two, and three"[..]));
        assert_eq!(reader.next(&mut ours, soon()).ok().flatten(), Some(&b"four"[..]));
    }

    #[test]
    fn slices_do_not_give_a_slow_line_more_time() {
        let (mut ours, mut theirs) = pair();
        let mut reader = LineReader::new(64, 40);
        let end = soon();
        let error = loop {
            // A byte at a time, for as long as it takes.
            theirs.write_all(b"x", soon()).expect("written");
            match reader.next(&mut ours, Deadline::within_ms(10, "slice")).map(|line| line.is_some()) {
                Err(LineError::Idle(_)) if end.left().is_ok() => {}
                result => break result,
            }
        };
        assert!(matches!(error, Err(LineError::Slow(e)) if e.phase == "line"), "{error:?}");
    }

    #[test]
    fn silence_is_idle_and_the_reader_lives() {
        let (mut ours, mut theirs) = pair();
        let mut reader = LineReader::new(64, 1000);
        let result = reader.next(&mut ours, Deadline::within_ms(5, "idle")).map(|_| ());
        assert!(matches!(result, Err(LineError::Idle(_))), "{result:?}");
        theirs.write_all(b"x\n", soon()).expect("written");
        assert_eq!(reader.next(&mut ours, soon()).ok().flatten(), Some(&b"x"[..]));
    }
}
