//! Scripted faults: what goes wrong, in which call, how often.
//!
//! ```text
//! METHOD:ACTION[=ARG][*COUNT][@AFTER]     METHOD is a CRI method or *; COUNT firings at most; AFTER calls pass first
//!   error=CODE,MESSAGE  delay=MS  hang  drop  exit  rst=CODE  http=STATUS      before the effect; with -after, after it
//!   big=BYTES  giant  malformed  no-status  compressed  goaway                 the answer of a call that took effect
//! lie=HANDLER            sandboxes are reported under this handler
//! kernel=HANDLER:VALUE   what `uname -r` says under a handler
//! unready=CONDITION      Status reports RuntimeReady or NetworkReady as false
//! image-used=BYTES       what images take, says ImageFsInfo
//! unknown=HANDLER        containers under a handler are reported in state UNKNOWN
//! ```
//! A file has one a line, `#` for comments. A changed file replaces what the file said before, and its counts start anew; a file
//! with a mistake changes nothing and is logged.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::grpc::{Code, Status};
use crate::workload::Unfit;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// A valid answer grows by an unknown field of so many bytes.
    Big(usize),
    /// The answer claims to be compressed.
    Compressed,
    Delay(u64),
    /// The connection is closed without an answer.
    Drop,
    Error(Status),
    /// The process ends at once.
    Exit,
    /// The answer is a message over everybody's limits.
    Giant,
    /// GOAWAY, then the answer.
    GoAway,
    /// No answer, until the caller gives up.
    Hang,
    Http(u16),
    /// The answer is no protobuf.
    Malformed,
    /// The answer ends without a `grpc-status`.
    NoStatus,
    /// RST_STREAM with this code.
    Reset(u32),
}

/// One parsed spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault(Spec);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Spec {
    Rule { method: String, action: Action, is_after: bool, count: u64, skip: u64, seen: u64 },
    Setting { key: &'static str, value: String },
}

impl Fault {
    /// Parses a spec.
    ///
    /// # Errors
    /// [`Unfit`] with the rule and the spec that breaks it.
    pub fn parse(spec: &str) -> Result<Self, Unfit> {
        let spec = spec.trim();
        let setting = spec.split_once('=').and_then(|(key, value)| SETTINGS.iter().find(|known| **known == key).zip(Some(value)));
        let parsed = match setting {
            Some((&key, value)) => Ok(Spec::Setting { key, value: value.to_owned() }),
            None => rule(spec),
        };
        parsed.map(Self).map_err(|rule| Unfit(format!("{rule}: {spec:?}")))
    }
}

const SETTINGS: [&str; 5] = ["image-used", "kernel", "lie", "unknown", "unready"];

fn rule(spec: &str) -> Result<Spec, &'static str> {
    let (method, rest) = spec.split_once(':').ok_or("a fault must be METHOD:ACTION[=ARG][*COUNT][@AFTER]")?;
    if method != "*" && super::methods::named(method).is_none() {
        return Err("no such method");
    }
    let (rest, skip) = number_after('@', rest);
    let (rest, count) = number_after('*', rest);
    let (name, arg) = rest.split_once(['=', ':']).unwrap_or((rest, ""));
    let (base, is_after) = name.strip_suffix("-after").map_or((name, false), |base| (base, true));
    let (action, shapes_answer) = match base {
        "big" => (Action::Big(number(arg, 64 << 20)?), true),
        "compressed" => (Action::Compressed, true),
        "delay" => (Action::Delay(number(arg, 3_600_000)?), false),
        "drop" => (Action::Drop, false),
        "error" => {
            let (code, message) = arg.split_once(',').unwrap_or((arg, ""));
            let code = code_of(code).ok_or("error needs CODE,MESSAGE, the code as NOT_FOUND or 5")?;
            (Action::Error(Status { code, message: message.to_owned() }), false)
        }
        "exit" | "kill" => (Action::Exit, false),
        "giant" => (Action::Giant, true),
        "goaway" => (Action::GoAway, true),
        "hang" => (Action::Hang, false),
        "http" => (Action::Http(number(arg, 599)?), false),
        "malformed" => (Action::Malformed, true),
        "no-status" => (Action::NoStatus, true),
        // RFC 9113 section 7.
        "rst" if arg == "REFUSED_STREAM" => (Action::Reset(7), false),
        "rst" if arg == "CANCEL" => (Action::Reset(8), false),
        "rst" => (Action::Reset(number(arg, u32::MAX)?), false),
        _ => return Err("no such action"),
    };
    if shapes_answer && is_after {
        return Err("the action concerns the answer, it has no -after");
    }
    if !arg.is_empty() && !matches!(base, "big" | "delay" | "error" | "http" | "rst") {
        return Err("the action takes no argument");
    }
    let (count, skip) = (count.unwrap_or(u64::MAX), skip.unwrap_or(0));
    Ok(Spec::Rule { method: method.to_owned(), action, is_after: is_after || shapes_answer, count, skip, seen: 0 })
}

fn number<T: std::str::FromStr + PartialOrd + Copy>(arg: &str, max: T) -> Result<T, &'static str> {
    arg.parse().ok().filter(|number| *number <= max).ok_or("the action needs a number within reason")
}

/// Splits `mark` and the number after it off the end.
fn number_after(mark: char, text: &str) -> (&str, Option<u64>) {
    text.rsplit_once(mark).and_then(|(rest, n)| n.parse().ok().map(|n| (rest, Some(n)))).unwrap_or((text, None))
}

/// `NOT_FOUND`, `NotFound` or `5`; never OK.
fn code_of(text: &str) -> Option<Code> {
    let name = text.replace('_', "");
    let named = Code::ALL.into_iter().find(|code| format!("{code:?}").eq_ignore_ascii_case(&name));
    named.or_else(|| Code::ALL.get(text.parse::<usize>().ok()?).copied()).filter(|code| *code != Code::Ok)
}

/// What befalls one call.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    pub(super) before: Vec<Action>,
    pub(super) after: Vec<Action>,
    settings: Vec<(&'static str, String)>,
}

impl Plan {
    /// The values of a setting.
    pub(super) fn settings(&self, key: &'static str) -> impl Iterator<Item = &str> {
        self.settings.iter().filter(move |(of, _)| *of == key).map(|(_, value)| value.as_str())
    }
}

/// The faults in force.
#[derive(Debug)]
pub(super) struct Faults {
    file: Option<PathBuf>,
    rules: Mutex<Rules>,
}

#[derive(Debug, Default)]
struct Rules {
    fixed: Vec<Fault>,
    from_file: Vec<Fault>,
    /// Inode, size and modification time of the file as read.
    stamp: Option<(u64, u64, i64, i64)>,
}

impl Faults {
    /// Those of the command line, and those of a file.
    pub(super) fn new(fixed: Vec<Fault>, file: Option<PathBuf>) -> Self {
        Self { file, rules: Mutex::new(Rules { fixed, ..Rules::default() }) }
    }

    /// Counts a call and tells what befalls it.
    pub(super) fn begin(&self, called: &str) -> Plan {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &self.file {
            rules.reread(file);
        }
        let mut plan = Plan::default();
        let Rules { fixed, from_file, .. } = &mut *rules;
        for Fault(spec) in fixed.iter_mut().chain(from_file) {
            match spec {
                Spec::Setting { key, value } => plan.settings.push((*key, value.clone())),
                Spec::Rule { method, action, is_after, count, skip, seen } if method == "*" || method == called => {
                    *seen += 1;
                    if *seen > *skip && *seen - *skip <= *count {
                        if *is_after { &mut plan.after } else { &mut plan.before }.push(action.clone());
                    }
                }
                Spec::Rule { .. } => {}
            }
        }
        plan
    }
}

impl Rules {
    fn reread(&mut self, file: &PathBuf) {
        let stamp = fs::metadata(file).ok().map(|meta| (meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()));
        if stamp == self.stamp {
            return;
        }
        self.stamp = stamp;
        // No file is no faults.
        let text = fs::read_to_string(file).unwrap_or_default();
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        match lines.map(Fault::parse).collect() {
            Ok(faults) => self.from_file = faults,
            Err(error) => log::error!("{}: {error}; the faults from before stay", file.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(specs: &[&str]) -> Faults {
        Faults::new(specs.iter().map(|s| Fault::parse(s).expect("valid")).collect(), None)
    }

    #[test]
    fn specs_are_read_whole() {
        let check = |spec: &str, action: Action, is_after: bool, count: u64, skip: u64| {
            let method = spec.split(':').next().unwrap_or_default().to_owned();
            let expect = Fault(Spec::Rule { method, action, is_after, count, skip, seen: 0 });
            assert_eq!(Fault::parse(spec), Ok(expect), "{spec}");
        };
        let status = |code, message: &str| Action::Error(Status { code, message: message.into() });
        check("Version:error=NOT_FOUND,no: such * thing @ all", status(Code::NotFound, "no: such * thing @ all"), false, u64::MAX, 0);
        check("Version:error=14,x*2@3", status(Code::Unavailable, "x"), false, 2, 3);
        check("*:error-after=Unknown", status(Code::Unknown, ""), true, u64::MAX, 0);
        check("Version:delay=20*1", Action::Delay(20), false, 1, 0);
        check("Version:delay:20", Action::Delay(20), false, u64::MAX, 0);
        check("Version:hang@1", Action::Hang, false, u64::MAX, 1);
        check("Version:drop-after", Action::Drop, true, u64::MAX, 0);
        check("Version:exit", Action::Exit, false, u64::MAX, 0);
        check("Version:kill-after", Action::Exit, true, u64::MAX, 0);
        check("Version:exit-after", Action::Exit, true, u64::MAX, 0);
        check("Version:big=12582912", Action::Big(12 << 20), true, u64::MAX, 0);
        check("Version:rst=REFUSED_STREAM", Action::Reset(7), false, u64::MAX, 0);
        check("Version:http=503", Action::Http(503), false, u64::MAX, 0);
        check("Version:goaway*1", Action::GoAway, true, 1, 0);
    }

    #[test]
    fn bad_specs_name_the_rule() {
        let check = |spec: &str, rule: &str| assert_eq!(Fault::parse(spec), Err(Unfit(format!("{rule}: {spec:?}"))));
        check("", "a fault must be METHOD:ACTION[=ARG][*COUNT][@AFTER]");
        check("Version", "a fault must be METHOD:ACTION[=ARG][*COUNT][@AFTER]");
        check("Nope:drop", "no such method");
        check("Version:nope", "no such action");
        check("Version:drop=1", "the action takes no argument");
        check("Version:giant-after", "the action concerns the answer, it has no -after");
        for bad in ["delay", "delay=3600001", "rst=X", "http=600", "big=x"] {
            check(&format!("Version:{bad}"), "the action needs a number within reason");
        }
        for bad in ["error=OK,x", "error=NOPE,x", "error=17,x"] {
            check(&format!("Version:{bad}"), "error needs CODE,MESSAGE, the code as NOT_FOUND or 5");
        }
    }

    #[test]
    fn counts_and_skips_are_per_method() {
        let faults = faults(&["Version:drop*2@1", "*:delay=1@3", "Version:drop-after*1"]);
        let seen: Vec<_> = (0..5).map(|_| faults.begin("Version")).map(|plan| (plan.before.len(), plan.after.len())).collect();
        assert_eq!(seen, [(0, 1), (1, 0), (1, 0), (1, 0), (1, 0)]);
        assert_eq!(faults.begin("Status").before, [Action::Delay(1)]);
    }

    #[test]
    fn settings_are_found() {
        let plan = faults(&["lie=runc", "kernel=edera:6:1", "kernel=kata:5"]).begin("Status");
        let of = |key| plan.settings(key).collect::<Vec<_>>();
        assert_eq!((of("lie"), of("kernel"), of("unready")), (vec!["runc"], vec!["edera:6:1", "kata:5"], vec![]));
    }

    #[test]
    fn a_changed_file_replaces_its_faults_and_a_bad_one_does_not() {
        let path = std::env::temp_dir().join(format!("kakuri-sim-faults-{}", std::process::id()));
        let faults = Faults::new(vec![Fault::parse("Status:hang").expect("valid")], Some(path.clone()));
        let write = |text: &str| {
            let new = path.with_extension("new");
            fs::write(&new, text).expect("written");
            fs::rename(&new, &path).expect("renamed");
        };
        assert!(faults.begin("Version").before.is_empty());
        write("# comment\n\nVersion:drop\n");
        assert_eq!(faults.begin("Version").before, [Action::Drop]);
        write("Version:nonsense\n");
        assert_eq!(faults.begin("Version").before, [Action::Drop]);
        write("Version:hang\n");
        assert_eq!(faults.begin("Version").before, [Action::Hang]);
        fs::remove_file(&path).expect("removed");
        assert!(faults.begin("Version").before.is_empty());
        assert_eq!(faults.begin("Status").before, [Action::Hang]);
    }
}
