//! Counters, and the Prometheus text format 0.0.4. A leaf: it knows no room, and no label comes from a peer.

use std::fmt::{Display, Write as _};
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// One more.
    pub fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// So many by now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Default for Counter {
    fn default() -> Self {
        Self::new()
    }
}

/// HTTP responses by the first digit of their status, from 1.
pub static HTTP_RESPONSES: [Counter; 5] = [const { Counter::new() }; 5];

/// Commits of the control plane's store.
pub static STORE_COMMITS: Counter = Counter::new();

/// Commits of the control plane's store that failed.
pub static STORE_FAILURES: Counter = Counter::new();

/// Lines of agents' watches that this version could not read.
pub static WATCH_LINES_UNREAD: Counter = Counter::new();

/// Counts an HTTP response.
pub fn count_http_response(status: u16) {
    if let Some(counter) = usize::from(status / 100).checked_sub(1).and_then(|class| HTTP_RESPONSES.get(class)) {
        counter.add_one();
    }
}

/// What kind of metric a family is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A page of metrics in the making.
#[derive(Debug, Default)]
pub struct Text(String);

impl Text {
    /// The content type of a page.
    pub const CONTENT_TYPE: &'static str = "text/plain; version=0.0.4; charset=utf-8";

    /// Writes a metric with its samples.
    pub fn family<V: Display>(&mut self, name: &str, kind: Kind, help: &str, samples: impl IntoIterator<Item = (Labels, V)>) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        // Writing to a String does not fail, here and below.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{} {value}", labels.0);
        }
    }

    /// Writes what the kernel says of this process; what it does not say is left out.
    pub fn process(&mut self) {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).and_then(|rest| rest.split_whitespace().next());
        let resident = resident.and_then(|kib| kib.parse::<u64>().ok()).map(|kib| kib.saturating_mul(1024));
        let descriptors = fs::read_dir("/proc/self/fd").ok().map(Iterator::count);
        let one = |value| (Labels::none(), value);
        self.family("process_resident_memory_bytes", Kind::Gauge, "Resident memory.", resident.map(one));
        self.family("process_open_fds", Kind::Gauge, "Open file descriptors.", descriptors.map(|n| (Labels::none(), n)));
        self.family("process_cpu_seconds_total", Kind::Counter, "CPU time, user and system.", cpu_seconds().map(|s| (Labels::none(), s)));
    }

    /// The page.
    pub fn into_string(self) -> String {
        self.0
    }
}

/// Fields 14 and 15 of proc_pid_stat(5), in hundredths of a second on every Linux. The name before them may hold spaces.
fn cpu_seconds() -> Option<String> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()?.saturating_add(fields.next()?.parse().ok()?);
    Some(format!("{}.{:02}", ticks / 100, ticks % 100))
}

/// The labels of a sample.
#[derive(Debug)]
pub struct Labels(String);

impl Labels {
    /// No label.
    pub fn none() -> Self {
        Self(String::new())
    }

    /// These labels; values are escaped as the format wants it.
    pub fn of(pairs: &[(&str, &str)]) -> Self {
        let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let pairs: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
        Self(format!("{{{}}}", pairs.join(",")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_written_as_the_format_says() {
        let mut text = Text::default();
        text.family("a_total", Kind::Counter, "Help.", [(Labels::of(&[("x", "1"), ("y", "a\"b\\\n")]), 7), (Labels::none(), 8)]);
        text.family("b", Kind::Gauge, "None.", [] as [(Labels, u8); 0]);
        let expect = "# HELP a_total Help.\n# TYPE a_total counter\na_total{x=\"1\",y=\"a\\\"b\\\\\\n\"} 7\na_total 8\n\
                      # HELP b None.\n# TYPE b gauge\n";
        assert_eq!(text.into_string(), expect);
    }

    #[test]
    fn the_kernel_tells_about_this_process() {
        let mut text = Text::default();
        text.process();
        let text = text.into_string();
        for name in ["process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"] {
            let value = text.lines().find_map(|line| line.strip_prefix(name)).and_then(|v| v.trim().parse::<f64>().ok());
            assert!(value.is_some(), "{name}: {text}");
        }
    }

    #[test]
    fn responses_are_counted_by_class() {
        let before: Vec<u64> = HTTP_RESPONSES.iter().map(Counter::value).collect();
        [200, 404, 99, 600].into_iter().for_each(count_http_response);
        let grown = |class: usize| HTTP_RESPONSES[class].value() > before[class];
        // Other tests of this process may count meanwhile.
        assert!(grown(1) && grown(3));
    }
}
