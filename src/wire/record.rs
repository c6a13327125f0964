//! The agent's journal, as lines: a checksum, then JSON. What a daemon wrote is read back strictly.
//!
//! ```text
//! 8 hexadecimal digits of CRC-32, a space, JSON, \n
//! ```

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::status::Status;
use crate::deadline::Timestamp;
use crate::workload::{Reason, State};

/// One line. The last one of its kind about a workload counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", deny_unknown_fields)]
pub enum Record {
    /// A workload was accepted, or what is asked of it changed.
    Accept(Box<Accepted>),
    /// The first line: what the rest is written in.
    Begin {
        /// [`VERSION`].
        version: u32,
        /// How often an agent has begun to write it.
        starts: u64,
    },
    /// A workload is removed and forgotten.
    Forget {
        /// Which.
        id: String,
    },
    /// Where a workload stands.
    Update(Box<Update>),
}

/// The version of the journal's lines. Another is refused, not guessed at.
pub const VERSION: u32 = 1;

/// What was asked for, and how this node makes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accepted {
    /// Its id.
    pub id: String,
    /// Tells this acceptance of the id from any other.
    pub uid: String,
    /// The workload, secrets included: the file is for the agent alone.
    pub workload: Map<String, Value>,
    /// The values of its environment are known; after an adoption they are not.
    pub is_env_known: bool,
    /// The socket of its runtime.
    pub endpoint: String,
    /// The class as it was when the workload was accepted.
    pub class: SavedClass,
}

/// How a class was made when a workload was accepted under it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // As in `cri::runtime::Class`.
pub struct SavedClass {
    pub handler: String,
    pub own_kernel: bool,
    pub annotations: BTreeMap<String, String>,
    pub overhead_mb: u64,
    pub sandbox_ms_max: u64,
}

/// Where a workload stands. Moments are milliseconds of the machine's uptime in that boot, which no change of its clock reaches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// Which.
    pub id: String,
    /// What is wanted of it.
    pub wanted: Wanted,
    /// Its state.
    pub state: State,
    /// What was known of it.
    pub status: Status,
    /// The runtime may have been asked to run the container of this attempt.
    pub launched: bool,
    /// Its sandbox is stopped.
    pub retired: bool,
    /// Restarts in a row.
    pub streak: u64,
    /// The next start is not before this.
    pub restart_at: Option<u64>,
    /// When its time to live is over.
    pub ttl_at: Option<u64>,
    /// Why it is being ended, where its policy may start it again.
    pub ailing: Option<Ailing>,
    /// When it first ran.
    pub ran_since: Option<Timestamp>,
    /// When its runtime was asked to stop it, first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked_to_stop: Option<Timestamp>,
    /// The boot of the machine this was written under (`/proc/sys/kernel/random/boot_id`); empty when what ran under an earlier one was
    /// not found out about yet.
    pub boot_id: String,
}

/// Why a workload that nobody wanted to end is being ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Ailing {
    pub reason: Reason,
    pub message: String,
}

/// What is wanted of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "to", deny_unknown_fields)]
pub enum Wanted {
    /// To be removed and forgotten.
    Delete,
    /// To run.
    Run,
    /// To end.
    Stop {
        /// Why.
        reason: Reason,
        /// In words.
        message: Option<String>,
    },
}

/// Writes a record as a line.
pub fn to_line(record: &Record) -> Vec<u8> {
    let json = super::api::to_json(record);
    let mut line = format!("{:08x} ", crc32fast::hash(&json)).into_bytes();
    line.extend_from_slice(&json);
    line.push(b'\n');
    line
}

/// Reads a line back, its newline taken off; `None` when it is not what was written.
pub fn parse<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let (sum, json) = line.split_at_checked(9)?;
    let sum = u32::from_str_radix(std::str::from_utf8(sum.strip_suffix(b" ")?).ok()?, 16).ok()?;
    if sum != crc32fast::hash(json) {
        return None;
    }
    serde_json::from_slice(json).ok()
}

/// The version of a journal whose first line this is; `None` when it is no such line.
pub fn version(line: &[u8]) -> Option<u32> {
    /// What every version's first line has.
    #[derive(Deserialize)]
    struct First {
        version: u32,
    }
    parse::<First>(line).map(|first| first.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_touched_anywhere_is_refused() {
        let record = Record::Forget { id: "wl-1".into() };
        let line = to_line(&record);
        let line = line.strip_suffix(b"\n").expect("a newline");
        assert_eq!(parse(line), Some(record));
        for at in 0..line.len() {
            let mut bad = line.to_vec();
            bad[at] ^= 1;
            assert_eq!(parse::<Record>(&bad), None, "byte {at}");
            assert_eq!(parse::<Record>(&line[..at]), None, "cut at {at}");
        }
    }
}
