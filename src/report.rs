//! How errors and log lines reach a person: the chain of causes on one line, whose fault it was, and exit codes.
//!
//! *Scope*: `env_logger` enters here and nowhere else. Daemons speak on stderr, one logfmt line an event.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use crate::deadline::Timestamp;

/// Whose fault an error is; decides the status a peer sees and how loudly it is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// Ours: logged as an error, 500.
    Bug,
    /// A file, a socket, the runtime: may pass, 503.
    Environment,
    /// The request broke a rule: 4xx.
    Peer,
}

/// An error and its causes as `a: b: c`.
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Exit codes of all programs (a workload's own exit code passes through `kakuri run --wait` and `kakuri exec`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0
    Ok,
    /// 1: anything without a code of its own.
    General,
    /// 2: the command line or a configuration file is wrong.
    Usage,
    /// 3: there is no such workload or node.
    NotFound,
    /// 4: not allowed.
    Denied,
    /// 5: it exists, and differs.
    Conflict,
    /// 6: not reachable, or not in time.
    Unavailable,
    /// 125: `run --wait` and `exec` could not do their part, so there is no exit code of the workload.
    Ours,
    /// The exit code of a workload.
    Workload(u8),
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Ok => 0,
            Exit::General => 1,
            Exit::Usage => 2,
            Exit::NotFound => 3,
            Exit::Denied => 4,
            Exit::Conflict => 5,
            Exit::Unavailable => 6,
            Exit::Ours => 125,
            Exit::Workload(code) => code,
        })
    }
}

/// Writes `program: message` to stderr; a closed stderr is nobody's problem.
pub fn complain(program: &str, message: &dyn fmt::Display) {
    // A closed stderr leaves no one to tell.
    let _ = writeln!(std::io::stderr(), "{program}: {message}");
}

/// Writes to stdout.
///
/// # Errors
/// Those of stdout; a closed pipe among them.
pub fn say(text: &dyn fmt::Display) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Log levels a person can ask for.
pub const LEVELS: &str = "error, warn, info, debug, trace";

/// Parses a level's name.
pub fn level(text: &str) -> Option<log::LevelFilter> {
    text.parse().ok()
}

/// Starts logging to stderr in logfmt. Under systemd (`JOURNAL_STREAM`) each line begins with its syslog priority.
pub fn init_log(program: &'static str, level: log::LevelFilter) {
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let start = env_logger::Builder::new()
        .filter_level(log::LevelFilter::Warn)
        .filter_module("kakuri", level)
        .format(move |out, record| {
            if journal {
                write!(out, "<{}>", priority(record.level()))?;
            }
            let level = record.level().as_str().to_ascii_lowercase();
            writeln!(out, "ts={} level={level} program={program} msg={}", Timestamp::now(), Quoted(record.args()))
        })
        .try_init();
    // A second start (tests run several daemons in one process) keeps the first.
    let _ = start;
}

fn priority(level: log::Level) -> u8 {
    match level {
        log::Level::Error => 3,
        log::Level::Warn => 4,
        log::Level::Info => 6,
        log::Level::Debug | log::Level::Trace => 7,
    }
}

/// A logfmt value: quoted, with every control character escaped, so that nobody can forge a line.
struct Quoted<'a>(&'a fmt::Arguments<'a>);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        f.write_char('"')?;
        for c in text.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                c if c.is_control() => write!(f, "{}", c.escape_default())?,
                c => f.write_char(c)?,
            }
        }
        f.write_char('"')
    }
}

/// Twelve random characters of base 32 (RFC 4648, lower case): 60 bits, for names nobody chose.
pub fn random_id() -> String {
    let mut bytes = [0; 12];
    // The kernel's generator is always there once the machine is up; without it every name here could be guessed.
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).expect("the kernel has random bytes");
    bytes.iter().map(|b| char::from(b"abcdefghijklmnopqrstuvwxyz234567"[usize::from(b & 31)])).collect()
}

/// Cuts `text` to at most `bytes_max` bytes at a character boundary, marking the cut.
pub fn clip(mut text: String, bytes_max: usize) -> String {
    const MARK: &str = "...";
    if text.len() > bytes_max {
        let mut end = bytes_max.saturating_sub(MARK.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(MARK);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_cannot_be_forged() {
        let shown = Quoted(&format_args!("{}", "a\nlevel=error \"x\"\u{1b}[31m")).to_string();
        assert_eq!(shown, r#""a\nlevel=error \"x\"\u{1b}[31m""#);
    }

    #[test]
    fn a_chain_prints_every_cause() {
        let error = std::io::Error::other(crate::deadline::Expired { phase: "header" });
        assert_eq!(Chain(&error).to_string(), "timeout: header");
    }

    #[test]
    fn clip_cuts_between_characters() {
        assert_eq!(clip("kakuri".into(), 6), "kakuri");
        assert_eq!(clip("隔離隔離".into(), 8), "隔...");
    }
}
