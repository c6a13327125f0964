//! Places where a test lets a daemon die, as `kill -9` would: nothing is unwound, flushed or told. A leaf: it knows no room.
//!
//! `KAKURI_DIE_AT=NAME` ends the process when it first passes the place of that name, `NAME@N` after N passes. Only builds with debug
//! assertions look; in a release build a place is nothing at all.
//!
//! Names are `ROOM-WRITE-before` and `ROOM-WRITE-after`, for every write that a recovery depends on.

#[cfg(debug_assertions)]
use std::sync::{Mutex, OnceLock, PoisonError};

#[cfg(debug_assertions)]
static ARMED: OnceLock<Option<(String, Mutex<u64>)>> = OnceLock::new();

/// Passes a place.
#[cfg(debug_assertions)]
pub fn pass(place: &str) {
    let armed = ARMED.get_or_init(|| {
        let spec = std::env::var("KAKURI_DIE_AT").ok()?;
        let (name, left) = spec.split_once('@').unwrap_or((&spec, "0"));
        Some((name.to_owned(), Mutex::new(left.parse().ok()?)))
    });
    let Some((name, left)) = armed else { return };
    if name == place {
        let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
        match left.checked_sub(1) {
            Some(fewer) => *left = fewer,
            None => std::process::abort(),
        }
    }
}

/// Passes a place: nothing, in a release build.
#[cfg(not(debug_assertions))]
pub fn pass(_: &str) {}
