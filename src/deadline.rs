//! Time that runs out: a [`Deadline`] is a moment plus the name of what must be done by then, so that every timeout says
//! which phase it ended. Also the wall clock, as a [`Timestamp`].
//!
//! *Scope*: the only `Instant::now()` and the only `SystemTime::now()` of the program.
//!
//! Invariant: a read or write that waits recomputes [`Deadline::left`] each time; a duration is never reused, so a peer that
//! sends a byte a second gains nothing.

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A moment on the monotonic clock, and the phase that must be over by then.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    phase: &'static str,
}

impl Deadline {
    /// A deadline `ms` milliseconds from now for `phase` (a lower-case noun: "header", "RunPodSandbox").
    pub fn within_ms(ms: u64, phase: &'static str) -> Self {
        Self { at: Instant::now() + Duration::from_millis(ms), phase }
    }

    /// The same moment, known by another phase.
    #[must_use]
    pub fn phase(self, phase: &'static str) -> Self {
        Self { phase, ..self }
    }

    /// The earlier of this deadline and `ms` from now; the phase is that of the one that fires first.
    #[must_use]
    pub fn at_most_ms(self, ms: u64, phase: &'static str) -> Self {
        self.or_sooner(Self::within_ms(ms, phase))
    }

    /// Whichever of the two comes first.
    #[must_use]
    pub fn or_sooner(self, other: Self) -> Self {
        if other.at < self.at { other } else { self }
    }

    /// What is left, never zero.
    ///
    /// # Errors
    /// [`Expired`] when nothing is.
    pub fn left(&self) -> Result<Duration, Expired> {
        let left = self.at.saturating_duration_since(Instant::now());
        // The kernel's socket timers tick in microseconds and read 0 as "for ever".
        if left < Duration::from_micros(1) { Err(self.expired()) } else { Ok(left) }
    }

    /// Milliseconds left, 0 when none are.
    pub fn left_ms(&self) -> u64 {
        self.left().map_or(0, |left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
    }

    /// The error this deadline turns into.
    pub fn expired(&self) -> Expired {
        Expired { phase: self.phase }
    }
}

/// A deadline passed; names the phase that was not over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired {
    /// What ran out of time.
    pub phase: &'static str,
}

impl fmt::Display for Expired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "timeout: {}", self.phase)
    }
}

impl std::error::Error for Expired {}

/// Measures how long something took.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Whole milliseconds since the start.
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Milliseconds since the machine was booted, sleep included (clock_gettime(2), `CLOCK_BOOTTIME`): a clock that nobody sets, and that
/// all processes of one boot share.
pub fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let whole = u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1000);
    whole.saturating_add(u64::try_from(now.tv_nsec / 1_000_000).unwrap_or(0))
}

/// Wall-clock time, milliseconds since 1970; for people and for records, never for timeouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The present moment; 1970 when the clock stands before that.
    pub fn now() -> Self {
        Self::from_system(SystemTime::now())
    }

    /// From nanoseconds since 1970, the unit of CRI times; `None` for 0 and below, which CRI uses for "unset".
    pub fn from_nanos(nanos: i64) -> Option<Self> {
        u64::try_from(nanos).ok().filter(|n| *n > 0).map(|n| Self(n / 1_000_000))
    }

    /// Parses RFC 3339 in UTC (`2026-01-02T03:04:05.678Z`); `None` when the text is something else.
    pub fn parse(text: &str) -> Option<Self> {
        humantime::parse_rfc3339(text).ok().map(Self::from_system)
    }

    /// Milliseconds since 1970.
    pub fn as_millis(self) -> u64 {
        self.0
    }

    /// This moment less `ms`.
    #[must_use]
    pub fn minus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_sub(ms))
    }

    /// This moment and `ms`.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    fn from_system(time: SystemTime) -> Self {
        Self(time.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(MILLIS_MAX)))
    }
}

/// RFC 3339 in UTC with milliseconds.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = UNIX_EPOCH + Duration::from_millis(self.0.min(MILLIS_MAX));
        humantime::format_rfc3339_millis(time).fmt(f)
    }
}

/// The last millisecond of the year 9999, the end of RFC 3339.
const MILLIS_MAX: u64 = 253_402_300_799_999;

/// The pause after so many failures in a row, the first counted as 1: it begins with `first_ms`, and is doubled up to `most_ms`.
pub fn doubled_ms(first_ms: u64, most_ms: u64, failures: u32) -> u64 {
    let factor = 1u64 << failures.saturating_sub(1).min(32);
    first_ms.saturating_mul(factor).min(most_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expired_deadline_names_its_phase() {
        let deadline = Deadline::within_ms(0, "header");
        assert_eq!(deadline.left(), Err(Expired { phase: "header" }));
        assert_eq!(deadline.expired().to_string(), "timeout: header");
    }

    #[test]
    fn a_pause_is_doubled_up_to_its_bound() {
        assert_eq!([0, 1, 2, 4, 5, u32::MAX].map(|n| doubled_ms(250, 1000, n)), [250, 250, 500, 1000, 1000, 1000]);
    }

    #[test]
    fn the_earlier_of_two_deadlines_wins() {
        let long = Deadline::within_ms(60_000, "start");
        assert_eq!(long.at_most_ms(1, "probe").expired().phase, "probe");
        assert_eq!(long.at_most_ms(120_000, "probe").expired().phase, "start");
    }

    #[test]
    fn timestamps_read_what_they_print() {
        let text = "2026-01-02T03:04:05.678Z";
        assert_eq!(Timestamp::parse(text).expect("valid").to_string(), text);
        assert_eq!(Timestamp::parse("yesterday"), None);
        assert_eq!(Timestamp::from_nanos(0), None);
        assert_eq!(Timestamp::from_nanos(1_500_000_000).map(Timestamp::as_millis), Some(1500));
        assert_eq!(Timestamp(u64::MAX).to_string(), "9999-12-31T23:59:59.999Z");
    }
}
