//! The command lines of all four programs: what a command is called, what it takes, and its `--help`.
//!
//! *Scope*: `getopts` enters here and nowhere else; the lookup "flag, then environment". *Not here*: files ([`crate::config`]),
//! and what the words mean.
//!
//! Every command answers `-h`, `--help` and `-V`, `--version`; its help ends with an example.

use std::fmt;

use getopts::{Matches as Found, Options, ParsingStyle};

use crate::workload::Unfit;

/// What a command line asks for.
#[derive(Debug)]
pub enum Parsed<T> {
    /// Only a text for stdout (`--help`, `--version`, `--check-config`); then exit 0.
    Special(String),
    /// The program itself.
    Run(T),
}

/// A command line that breaks a rule; exit 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    command: &'static str,
    rule: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\ntry '{} --help'", self.rule, self.command)
    }
}

impl std::error::Error for Error {}

/// What a flag takes.
#[derive(Clone, Copy, Debug)]
pub enum Takes {
    /// It is there or not.
    Nothing,
    /// One value; the text stands for it in the help.
    Value(&'static str),
    /// A value each time it is given.
    Values(&'static str),
}

/// A flag.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// One letter, or empty.
    pub short: &'static str,
    /// Without dashes.
    pub long: &'static str,
    /// What follows it.
    pub takes: Takes,
    /// A line of help.
    pub about: &'static str,
}

impl Flag {
    /// A flag with a letter.
    pub const fn short(short: &'static str, long: &'static str, takes: Takes, about: &'static str) -> Self {
        Self { short, long, takes, about }
    }

    /// A flag without a letter.
    pub const fn long(long: &'static str, takes: Takes, about: &'static str) -> Self {
        Self { short: "", long, takes, about }
    }
}

/// A command: a program, or a program and a word (`kakuri run`).
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// As typed.
    pub command: &'static str,
    /// What follows the command.
    pub synopsis: &'static str,
    /// A sentence.
    pub about: &'static str,
    /// Groups of flags, so that commands can share some.
    pub flags: &'static [&'static [Flag]],
    /// A line to copy.
    pub example: &'static str,
}

/// Looks up a variable of the environment.
pub type Environment = fn(&str) -> Option<String>;

/// The environment of this process; an empty or non-UTF-8 variable counts as absent.
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The arguments of this process, without its name.
///
/// # Errors
/// [`Error`] when one is not UTF-8.
pub fn arguments(program: &'static str) -> Result<Vec<String>, Error> {
    let fail = |word: std::ffi::OsString| Error { command: program, rule: format!("argument {word:?} is not UTF-8") };
    std::env::args_os().skip(1).map(|word| word.into_string().map_err(fail)).collect()
}

impl Usage {
    /// A command as typed, what follows it, a sentence about it, groups of flags (so that commands can share some), and an example.
    pub const fn new(
        command: &'static str,
        synopsis: &'static str,
        about: &'static str,
        flags: &'static [&'static [Flag]],
        example: &'static str,
    ) -> Self {
        Self { command, synopsis, about, flags, example }
    }

    /// Reads flags and words in any order.
    ///
    /// # Errors
    /// [`Error`] when a flag is unknown, lacks its value, or is given twice.
    pub fn parse(&self, args: &[String], environment: Environment) -> Result<Parsed<Matches>, Error> {
        self.read(args, environment, ParsingStyle::FloatingFrees)
    }

    /// Reads flags up to the first word; everything from that word on is the words.
    ///
    /// # Errors
    /// As [`Usage::parse`].
    pub fn parse_leading(&self, args: &[String], environment: Environment) -> Result<Parsed<Matches>, Error> {
        self.read(args, environment, ParsingStyle::StopAtFirstFree)
    }

    /// An error of this command.
    pub fn error(&self, rule: impl Into<String>) -> Error {
        Error { command: self.command, rule: rule.into() }
    }

    /// The text of `--help`.
    pub fn help(&self) -> String {
        let brief = format!("{}\n\nUsage: {} {}", self.about, self.command, self.synopsis);
        format!("{}\nExample:\n    {}", self.options().usage(brief.trim_end()), self.example)
    }

    fn options(&self) -> Options {
        let mut options = Options::new();
        for flag in self.flags.iter().copied().flatten() {
            match flag.takes {
                Takes::Nothing => options.optflag(flag.short, flag.long, flag.about),
                Takes::Value(hint) => options.optopt(flag.short, flag.long, flag.about, hint),
                Takes::Values(hint) => options.optmulti(flag.short, flag.long, flag.about, hint),
            };
        }
        options.optflag("h", "help", "print this");
        options.optflag("V", "version", "print the version");
        options
    }

    fn read(&self, args: &[String], environment: Environment, style: ParsingStyle) -> Result<Parsed<Matches>, Error> {
        let found = self.options().parsing_style(style).parse(args).map_err(|fail| self.error(fail.to_string()))?;
        if found.opt_present("help") {
            return Ok(Parsed::Special(self.help()));
        }
        if found.opt_present("version") {
            let program = self.command.split(' ').next().unwrap_or_default();
            return Ok(Parsed::Special(format!("{program} {}", env!("CARGO_PKG_VERSION"))));
        }
        Ok(Parsed::Run(Matches { usage: *self, found, environment }))
    }
}

/// A value and where it was given: `--listen`, `KAKURI_LISTEN` or `agent.toml:3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// As given.
    pub value: String,
    /// For messages.
    pub origin: String,
}

/// A command line, read. The names asked for must be declared in the [`Usage`].
#[derive(Clone)]
pub struct Matches {
    usage: Usage,
    found: Found,
    environment: Environment,
}

impl fmt::Debug for Matches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matches").field("command", &self.usage.command).finish_non_exhaustive()
    }
}

impl Matches {
    /// Whether the flag is there.
    pub fn present(&self, flag: &str) -> bool {
        self.found.opt_present(flag)
    }

    /// The flag's value; a flag the command does not have counts as absent.
    pub fn one(&self, flag: &str) -> Option<String> {
        self.found.opt_defined(flag).then(|| self.found.opt_str(flag)).flatten()
    }

    /// The flag's values, in order.
    pub fn many(&self, flag: &str) -> Vec<String> {
        self.found.opt_strs(flag)
    }

    /// The flag's value, parsed.
    ///
    /// # Errors
    /// [`Error`] naming the flag and the rule its value breaks.
    pub fn parsed<T, E: fmt::Display>(&self, flag: &str, parse: impl Fn(&str) -> Result<T, E>) -> Result<Option<T>, Error> {
        self.one(flag).map(|text| parse(&text).map_err(|rule| self.error(format!("--{flag}: {rule}")))).transpose()
    }

    /// The flag's values, parsed.
    ///
    /// # Errors
    /// As [`Matches::parsed`].
    pub fn all_parsed<T, E: fmt::Display>(&self, flag: &str, parse: impl Fn(&str) -> Result<T, E>) -> Result<Vec<T>, Error> {
        self.many(flag).iter().map(|text| parse(text).map_err(|rule| self.error(format!("--{flag}: {rule}")))).collect()
    }

    /// The value of the flag, or else of its variable.
    pub fn given(&self, flag: &str) -> Option<Given> {
        self.one(flag).map(|value| Given { value, origin: format!("--{flag}") }).or_else(|| self.variable(flag))
    }

    /// The values of the flag, or else those of its variable, separated by commas.
    pub fn all_given(&self, flag: &str) -> Vec<Given> {
        let given: Vec<Given> = self.many(flag).into_iter().map(|value| Given { value, origin: format!("--{flag}") }).collect();
        if !given.is_empty() {
            return given;
        }
        let split = |given: Given| {
            let words = given.value.split(',').filter(|word| !word.trim().is_empty());
            words.map(|word| Given { value: word.trim().to_owned(), origin: given.origin.clone() }).collect()
        };
        self.variable(flag).map(split).unwrap_or_default()
    }

    /// `true` when the flag is there, else what its variable says.
    pub fn switch(&self, flag: &str) -> Option<Given> {
        let set = self.present(flag).then(|| Given { value: "true".into(), origin: format!("--{flag}") });
        set.or_else(|| self.variable(flag))
    }

    /// Any variable of the environment.
    pub fn environment(&self, name: &str) -> Option<String> {
        (self.environment)(name)
    }

    /// `KAKURI_STATE_DIR` for `state-dir`.
    fn variable(&self, flag: &str) -> Option<Given> {
        let name = format!("KAKURI_{}", flag.to_ascii_uppercase().replace('-', "_"));
        (self.environment)(&name).map(|value| Given { value, origin: name })
    }

    /// The words before `--`.
    pub fn words(&self) -> &[String] {
        let end = self.found.free_trailing_start().unwrap_or(self.found.free.len());
        self.found.free.get(..end).unwrap_or_default()
    }

    /// The words after `--`.
    pub fn trailing(&self) -> &[String] {
        let start = self.found.free_trailing_start().unwrap_or(self.found.free.len());
        self.found.free.get(start..).unwrap_or_default()
    }

    /// The single word of the command, called `what`.
    ///
    /// # Errors
    /// [`Error`] when there is none, or more.
    pub fn word(&self, what: &str) -> Result<&str, Error> {
        self.word_or_none(what)?.ok_or_else(|| self.error(format!("{what} is missing")))
    }

    /// The single word of the command, if it has one.
    ///
    /// # Errors
    /// [`Error`] when there is more than one.
    pub fn word_or_none(&self, what: &str) -> Result<Option<&str>, Error> {
        match self.words() {
            [] => Ok(None),
            [word] => Ok(Some(word)),
            [_, extra, ..] => Err(self.error(format!("unexpected argument {extra:?} after {what}"))),
        }
    }

    /// Refuses words where the command has none.
    ///
    /// # Errors
    /// [`Error`] naming the first one.
    pub fn no_words(&self) -> Result<(), Error> {
        match self.found.free.first() {
            None => Ok(()),
            Some(word) => Err(self.error(format!("unexpected argument {word:?}"))),
        }
    }

    /// An error of this command.
    pub fn error(&self, rule: impl Into<String>) -> Error {
        self.usage.error(rule)
    }
}

/// Parses `1h30m`, `45s`, `250ms` into milliseconds.
///
/// # Errors
/// [`Unfit`] when it is none, or more than a century.
pub fn duration_ms(text: &str) -> Result<u64, Unfit> {
    let unfit = || Unfit("a duration is numbers with units: 500ms, 30s, 5m, 1h30m, 7d".into());
    const CENTURY_MS: u64 = 36_525 * 86_400_000;
    let mut total: u64 = 0;
    let mut rest = text;
    loop {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(unfit)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let unit_ms: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(unfit()),
        };
        let part = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit_ms)).ok_or_else(unfit)?;
        total = total.checked_add(part).filter(|ms| *ms <= CENTURY_MS).ok_or_else(unfit)?;
        if tail.is_empty() {
            return Ok(total);
        }
        rest = tail;
    }
}

/// Parses a whole number.
///
/// # Errors
/// [`Unfit`] when it is none.
pub fn number(text: &str) -> Result<u64, Unfit> {
    text.parse().map_err(|_| Unfit("must be a whole number".into()))
}

/// The one of `words` that `typed` was probably meant to be: at most two letters away.
pub fn nearest<'a>(typed: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const DISTANCE_MAX: usize = 2;
    let measured = words.map(|word| (distance(typed, word), word)).filter(|(far, word)| *far <= DISTANCE_MAX && *far < word.len());
    measured.min_by_key(|(far, _)| *far).map(|(_, word)| word)
}

/// Levenshtein's distance, one row of the table at a time.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEST: Usage = Usage::new(
        "kakuri test",
        "[OPTIONS] WORD",
        "Tests.",
        &[
            &[Flag::short("l", "listen", Takes::Values("ADDR"), "where")],
            &[Flag::long("state-dir", Takes::Value("DIR"), "which"), Flag::long("insecure-listen", Takes::Nothing, "no care")],
        ],
        "kakuri test -l 127.0.0.1:1 x",
    );

    fn variables(name: &str) -> Option<String> {
        match name {
            "KAKURI_LISTEN" => Some("a, b,".into()),
            "KAKURI_STATE_DIR" => Some("/from/env".into()),
            _ => None,
        }
    }

    fn read(words: &[&str]) -> Result<Parsed<Matches>, Error> {
        TEST.parse(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>(), variables)
    }

    fn matches(words: &[&str]) -> Matches {
        match read(words) {
            Ok(Parsed::Run(matches)) => matches,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn help_shows_usage_options_and_an_example() {
        let Ok(Parsed::Special(help)) = read(&["--help"]) else { panic!("no help") };
        for part in ["Tests.", "Usage: kakuri test [OPTIONS] WORD", "--listen ADDR", "Example:\n    kakuri test -l"] {
            assert!(help.contains(part), "{part}: {help}");
        }
        let Ok(Parsed::Special(version)) = read(&["-V"]) else { panic!("no version") };
        assert_eq!(version, format!("kakuri {}", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn a_flag_comes_before_its_variable() {
        let origins = |given: Vec<Given>| given.into_iter().map(|g| format!("{}={}", g.origin, g.value)).collect::<Vec<_>>();
        assert_eq!(origins(matches(&["-l", "x", "--listen=y"]).all_given("listen")), ["--listen=x", "--listen=y"]);
        assert_eq!(origins(matches(&[]).all_given("listen")), ["KAKURI_LISTEN=a", "KAKURI_LISTEN=b"]);
        assert_eq!(matches(&["--state-dir", "/d"]).given("state-dir").map(|g| g.value), Some("/d".into()));
        assert_eq!(matches(&[]).given("state-dir").map(|g| g.origin), Some("KAKURI_STATE_DIR".into()));
        assert_eq!(matches(&[]).switch("insecure-listen"), None);
        assert_eq!(matches(&["--insecure-listen"]).switch("insecure-listen").map(|g| g.value), Some("true".into()));
    }

    #[test]
    fn words_after_two_dashes_are_apart() {
        let read = matches(&["a", "--", "-x", "--help"]);
        assert_eq!((read.words(), read.trailing()), (&["a".to_owned()][..], &["-x".to_owned(), "--help".to_owned()][..]));
        assert_eq!(matches(&["a", "--"]).trailing().len(), 0);
        assert!(matches(&["a", "b"]).word("ID").is_err());
        assert!(matches(&[]).word("ID").is_err());
    }

    #[test]
    fn errors_name_the_flag_and_the_help() {
        let check = |words: &[&str], expect: &str| {
            let error = read(words).expect_err("an error").to_string();
            assert!(error.contains(expect) && error.ends_with("try 'kakuri test --help'"), "{error}");
        };
        check(&["--nope"], "nope");
        check(&["--listen"], "listen");
        check(&["--state-dir", "a", "--state-dir", "b"], "state-dir");
        let error = matches(&["--state-dir", "x"]).parsed("state-dir", number).expect_err("an error").to_string();
        assert!(error.starts_with("--state-dir: must be a whole number"), "{error}");
    }

    #[test]
    fn durations_need_units() {
        let check = |text: &str, ms: Option<u64>| assert_eq!(duration_ms(text).ok(), ms, "{text}");
        check("250ms", Some(250));
        check("30s", Some(30_000));
        check("1h30m", Some(5_400_000));
        check("0s", Some(0));
        for bad in ["", "5", "s", "-5s", "5x", "1h 30m", "1.5s", "99999999999999999999s", "9999999d", "5s5"] {
            check(bad, None);
        }
    }

    #[test]
    fn a_slip_of_the_fingers_is_recognised() {
        let check = |typed: &str, expect: Option<&str>| assert_eq!(nearest(typed, ["list", "logs", "run"].into_iter()), expect, "{typed}");
        check("lst", Some("list"));
        check("rnu", Some("run"));
        check("log", Some("logs"));
        check("frobnicate", None);
    }
}
