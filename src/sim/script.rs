//! The mini-language of simulated containers: what a command prints, how long it runs and how it ends.
//!
//! ```text
//! sleep N|infinity   exit N   true   false   echo WORDS [>&2]   trap   oom
//! seq N M        the numbers from N to M, a line each
//! spam BYTES     numbered lines of 64 bytes
//! partial BYTES  one long line
//! uname -r       cat /proc/sys/kernel/osrelease      cat OTHER fails
//! sh -c "A; B"   simple commands and quotes, no more of a shell
//! ```
//! No command at all sleeps for ever, as does one that ends with `trap`; `trap` ignores the polite signal.
//!
//! Invariant: a script is known in full when it is read: what is printed when, and the end. So a container goes on after a restart
//! of the simulator as if nothing was.

/// Where a line goes; the spelling is that of a CRI log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogStream {
    Stdout,
    Stderr,
}

impl LogStream {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Something printed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Print {
    Kernel,
    Line(LogStream, String),
    Partial(usize),
    Seq(u32, u32),
    Spam(usize),
}

/// What a container or an exec does. Times are nanoseconds since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Script {
    prints: Vec<(i64, Print)>,
    /// When it ends, how, and whether of too much memory; none is never.
    pub(super) end: Option<(i64, i32, bool)>,
    /// The polite signal does nothing.
    pub(super) ignores_term: bool,
}

/// The program is not one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NoProgram(pub(super) String);

/// What `spam` and `partial` may write.
const OUTPUT_BYTES_MAX: usize = 256 << 20;
/// A line of `spam`, newline included.
const SPAM_LINE_BYTES: usize = 64;
/// The time every print takes, so that log lines have an order.
const PRINT_NS: i64 = 1000;

impl Script {
    /// # Errors
    /// [`NoProgram`] when the first word is no program of the language.
    pub(super) fn parse(words: &[String]) -> Result<Self, NoProgram> {
        let shell = words.first().is_some_and(|word| program(word) == "sh");
        let commands = match words {
            [_, flag, text, ..] if shell && flag == "-c" => split(text),
            [] | [_] if shell || words.is_empty() => vec![vec!["trap".into()]],
            words => vec![words.to_vec()],
        };
        let is_trap = |command: &Vec<String>| command.first().is_some_and(|word| word == "trap");
        let mut script = Self { ignores_term: !words.is_empty() && commands.iter().any(is_trap), ..Self::default() };
        // The time so far, and the status; none once it has ended or sleeps for ever.
        let mut state = Some((0, 0));
        for command in &commands {
            let Some((ns, status)) = state else { break };
            state = script.command(command, ns, status).or_else(|NoProgram(name)| {
                if !shell {
                    return Err(NoProgram(name));
                }
                script.prints.push((ns, Print::Line(LogStream::Stderr, format!("sh: {name}: not found"))));
                Ok(Some((ns + PRINT_NS, 127)))
            })?;
        }
        if let Some((ns, status)) = state.filter(|_| !commands.last().is_some_and(is_trap)) {
            script.end = Some((ns, status, false));
        }
        Ok(script)
    }

    /// Adds a simple command at `ns`, after one that ended with `status`; the time and status after it, if it ends and all goes on.
    fn command(&mut self, words: &[String], ns: i64, status: i32) -> Result<Option<(i64, i32)>, NoProgram> {
        let (name, args) = words.split_first().map_or(("", words), |(name, args)| (program(name), args));
        let (args, stream) = match args.split_last() {
            Some((last, args)) if last == ">&2" || last == "1>&2" => (args, LogStream::Stderr),
            _ => (args, LogStream::Stdout),
        };
        let first = args.first().map_or("", String::as_str);
        let mut print = |what: Print, status: i32| {
            self.prints.push((ns, what));
            Ok(Some((ns.saturating_add(PRINT_NS), status)))
        };
        let complaint = |rule: &str| Print::Line(LogStream::Stderr, format!("{name}: {rule}"));
        let bytes = first.parse().ok().filter(|bytes| *bytes <= OUTPUT_BYTES_MAX);
        let end = match name {
            "cat" if first == "/proc/sys/kernel/osrelease" => return print(Print::Kernel, 0),
            "uname" if first == "-r" => return print(Print::Kernel, 0),
            "cat" => return print(complaint(&format!("can't open '{first}': No such file or directory")), 1),
            "echo" => return print(Print::Line(stream, args.join(" ")), 0),
            "partial" | "spam" => match bytes {
                Some(bytes) if name == "spam" => return print(Print::Spam(bytes), 0),
                Some(bytes) => return print(Print::Partial(bytes), 0),
                None => return print(complaint(&format!("not a number up to {OUTPUT_BYTES_MAX}: '{first}'")), 1),
            },
            "seq" => match args {
                [first, last] if first.parse::<u32>().is_ok() && last.parse::<u32>().is_ok() => {
                    return print(Print::Seq(first.parse().unwrap_or(0), last.parse().unwrap_or(0)), 0);
                }
                _ => return print(complaint("wants two numbers"), 1),
            },
            "sleep" if matches!(first, "infinity" | "inf") => None,
            "sleep" => match nanoseconds(first) {
                Some(wait) => return Ok(Some((ns.saturating_add(wait), 0))),
                None => return print(complaint(&format!("invalid number '{first}'")), 1),
            },
            "false" => return Ok(Some((ns, 1))),
            "trap" | "true" => return Ok(Some((ns, 0))),
            "exit" => Some((ns, first.parse().unwrap_or(status) & 255, false)),
            "oom" => Some((ns, 137, true)),
            name => return Err(NoProgram(name.to_owned())),
        };
        self.end = end;
        Ok(None)
    }

    /// When print number `index` comes, or after the last of them the end; none is never.
    pub(super) fn due(&self, index: usize) -> Option<i64> {
        self.prints.get(index).map(|(ns, _)| *ns).or(self.end.map(|(ns, ..)| ns))
    }

    /// Whether print number `index` is beyond the last.
    pub(super) fn is_printed(&self, index: usize) -> bool {
        index >= self.prints.len()
    }

    /// Hands every line of print number `index` to `line`.
    pub(super) fn print(&self, index: usize, kernel: &str, line: &mut dyn FnMut(LogStream, &[u8])) {
        match self.prints.get(index) {
            Some((_, Print::Line(stream, text))) => line(*stream, text.as_bytes()),
            Some((_, Print::Kernel)) => line(LogStream::Stdout, kernel.as_bytes()),
            Some((_, Print::Seq(first, last))) => (*first..=*last).for_each(|n| line(LogStream::Stdout, n.to_string().as_bytes())),
            Some((_, Print::Partial(bytes))) => line(LogStream::Stdout, &vec![b'p'; *bytes]),
            Some((_, Print::Spam(bytes))) => {
                let mut left = *bytes;
                for number in 0.. {
                    let Some(length) = left.min(SPAM_LINE_BYTES).checked_sub(1) else { break };
                    line(LogStream::Stdout, format!("{number:010} {:x<52}", "").as_bytes().get(..length).unwrap_or_default());
                    left -= length + 1;
                }
            }
            None => {}
        }
    }

    /// All that goes to stdout and to stderr.
    pub(super) fn output(&self, kernel: &str) -> (Vec<u8>, Vec<u8>) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        for index in 0..self.prints.len() {
            self.print(index, kernel, &mut |stream, line| {
                let out = if stream == LogStream::Stdout { &mut stdout } else { &mut stderr };
                out.extend_from_slice(line);
                out.push(b'\n');
            });
        }
        (stdout, stderr)
    }
}

/// The name of a program, without the usual directories.
fn program(word: &str) -> &str {
    ["/usr/bin/", "/bin/"].iter().find_map(|dir| word.strip_prefix(dir)).unwrap_or(word)
}

/// Seconds, with a fraction or without.
fn nanoseconds(text: &str) -> Option<i64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let whole: i64 = format!("0{whole}").parse().ok().filter(|_| is_number)?;
    let fraction: i64 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    whole.checked_mul(1_000_000_000)?.checked_add(fraction)
}

/// The simple commands of a shell line: words, quotes, `;` and newlines.
fn split(text: &str) -> Vec<Vec<String>> {
    let mut commands = Vec::new();
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in text.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, ';' | '\n') => {
                words.extend(word.take());
                commands.push(std::mem::take(&mut words));
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    commands.push(words);
    commands.retain(|command| !command.is_empty());
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    fn run(line: &[&str]) -> (String, String, i32, Option<i64>) {
        let script = Script::parse(&words(line)).expect("a program");
        let (stdout, stderr) = script.output("6.1.0");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (text(stdout), text(stderr), script.end.map_or(0, |(_, code, _)| code), script.end.map(|(ns, ..)| ns / 1_000_000))
    }

    #[test]
    fn commands_print_wait_and_end() {
        let check = |line: &[&str], stdout: &str, stderr: &str, code: i32, ms: Option<i64>| {
            assert_eq!(run(line), (stdout.to_owned(), stderr.to_owned(), code, ms), "{line:?}");
        };
        check(&["true"], "", "", 0, Some(0));
        check(&["false"], "", "", 1, Some(0));
        check(&["exit", "259"], "", "", 3, Some(0));
        check(&["seq", "9", "11"], "9\n10\n11\n", "", 0, Some(0));
        check(&["seq", "2", "1"], "", "", 0, Some(0));
        check(&["seq", "1"], "", "seq: wants two numbers\n", 1, Some(0));
        check(&["/bin/sleep", "1.25"], "", "", 0, Some(1250));
        check(&["sleep", ".5"], "", "", 0, Some(500));
        check(&["sleep", "infinity"], "", "", 0, None);
        check(&["sleep", "x"], "", "sleep: invalid number 'x'\n", 1, Some(0));
        check(&["echo", "a", "b; c"], "a b; c\n", "", 0, Some(0));
        check(&["echo", "a", ">&2"], "", "a\n", 0, Some(0));
        check(&["oom"], "", "", 137, Some(0));
        check(&["uname", "-r"], "6.1.0\n", "", 0, Some(0));
        check(&["cat", "/proc/sys/kernel/osrelease"], "6.1.0\n", "", 0, Some(0));
        check(&["cat", "/x"], "", "cat: can't open '/x': No such file or directory\n", 1, Some(0));
        check(&[], "", "", 0, None);
        check(&["trap"], "", "", 0, None);
    }

    #[test]
    fn a_shell_runs_simple_commands_in_order() {
        let check = |line: &str, stdout: &str, stderr: &str, code: i32, ms: Option<i64>| {
            assert_eq!(run(&["sh", "-c", line]), (stdout.to_owned(), stderr.to_owned(), code, ms), "{line:?}");
        };
        check("echo one; sleep 0.1; echo 'two; three' >&2; exit 4; echo never", "one\n", "two; three\n", 4, Some(100));
        check("false; exit", "", "", 1, Some(0));
        check("echo a; oom; echo b", "a\n", "", 137, Some(0));
        check("false; echo ok", "ok\n", "", 0, Some(0));
        check("false", "", "", 1, Some(0));
        check("nope -x; echo on", "on\n", "sh: nope: not found\n", 0, Some(0));
        check("nope", "", "sh: nope: not found\n", 127, Some(0));
        check(" ; echo \"\" ;\n", "\n", "", 0, Some(0));
        check("trap; sleep 1; echo x", "x\n", "", 0, Some(1000));
        check("sleep 1; trap", "", "", 0, None);
    }

    #[test]
    fn spam_writes_exactly_what_it_says() {
        for bytes in [0, 1, 63, 64, 65, 1000] {
            let text = run(&["spam", &bytes.to_string()]).0;
            assert_eq!(text.len(), bytes);
            assert!(text.lines().all(|line| line.len() < SPAM_LINE_BYTES));
        }
        assert!(run(&["spam", "200"]).0.lines().nth(1).is_some_and(|line| line.starts_with("0000000001 xxx")));
        assert_eq!(run(&["partial", "40000"]).0.len(), 40_001);
        assert_eq!(run(&["spam", "999999999999"]).2, 1);
    }

    #[test]
    fn an_unknown_program_is_named() {
        assert_eq!(Script::parse(&words(&["nginx", "-g"])), Err(NoProgram("nginx".into())));
        assert_eq!(Script::parse(&words(&["/opt/sleep", "1"])), Err(NoProgram("/opt/sleep".into())));
    }

    #[test]
    fn trap_is_known_before_it_runs() {
        let ignores = |line: &[&str]| Script::parse(&words(line)).expect("a program").ignores_term;
        assert!(ignores(&["trap"]) && ignores(&["sh", "-c", "sleep 1; trap"]));
        assert!(!ignores(&["sleep", "1"]) && !ignores(&["echo", "trap"]));
    }
}
