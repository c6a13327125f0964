//! What is known of a workload, as every answer shows it: one shape for the line protocol, HTTP and the store.
//!
//! Read leniently: a newer agent may say more, and in words that this version does not know. Such a reason or phase is none; what is
//! stored is compared with what was read of it (`wire::stored`), so that nothing is lost there.

use serde::de::IntoDeserializer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::deadline::Timestamp;
use crate::workload::{Desired, Phase, Reason, State};

/// Gives a type with one spelling its JSON form: that spelling.
macro_rules! as_text {
    ($($type:ty),+) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::parse(&text).ok_or_else(|| serde::de::Error::custom(concat!("not a ", stringify!($type))))
            }
        }
    )+};
}

as_text!(Desired, Phase, Reason, State, Timestamp);

/// A word, or none where it is `null`, absent, or of a later version.
fn if_known<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    let known = |text: String| T::deserialize(IntoDeserializer::<serde::de::value::Error>::into_deserializer(text)).ok();
    Ok(text.and_then(known))
}

/// What is known of a workload. `null` is "unknown" or "not so", never a guess.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Why it is in its state.
    #[serde(default, deserialize_with = "if_known")]
    pub reason: Option<Reason>,
    /// The reason in words: the first cause, not the last symptom.
    pub message: Option<String>,
    /// What is being done right now.
    #[serde(default, deserialize_with = "if_known")]
    pub phase: Option<Phase>,
    /// Where it is placed.
    pub node: Option<String>,
    /// Which sandbox of this workload it is, from 0.
    pub attempt: u32,
    /// Restarts by policy.
    pub restarts: u32,
    /// Of its first process; unknown is `null`.
    pub exit_code: Option<i32>,
    /// Whether the runtime said that the kernel killed it for its memory.
    pub oom_killed: bool,
    /// The runtime's name for the sandbox.
    pub sandbox_id: Option<String>,
    /// The runtime's name for the container.
    pub container_id: Option<String>,
    /// The image that runs, as the runtime resolved it.
    pub image_digest: Option<String>,
    /// Of the sandbox.
    pub ip: Option<String>,
    /// The runtime handler the sandbox has, as the runtime reports it.
    pub handler: Option<String>,
    /// What was verified of the isolation.
    pub isolation: Isolation,
    /// When the workload was accepted.
    pub created_at: Timestamp,
    /// When the runtime started the container.
    pub started_at: Option<Timestamp>,
    /// When the container ended, or the start was given up.
    pub finished_at: Option<Timestamp>,
    /// When this was last known to be true.
    pub observed_at: Timestamp,
    /// Where the time of the start went.
    pub timings_ms: Timings,
    /// Why other nodes did not get it.
    pub placement: Placement,
    /// The last thing that went wrong while working on it.
    pub last_error: Option<String>,
}

/// What was verified of the isolation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Isolation {
    /// `true`: the handler is the one asked for and, where the class promises an own kernel, the guest answered with another
    /// kernel than the host's. `null`: not known (yet); `message` of a class with its own kernel says why it stays so.
    pub verified: Option<bool>,
    /// The handler as the runtime reports it.
    pub handler: Option<String>,
    /// The kernel release the guest answered with.
    pub kernel: Option<String>,
    /// The kernel release of the node.
    pub host_kernel: Option<String>,
    /// Why `verified` is not known and will not be.
    pub message: Option<String>,
}

/// Milliseconds of each step of the start; `null` for a step that was not taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// ImageStatus and PullImage.
    pub pull: Option<u64>,
    /// RunPodSandbox and the check of its handler.
    pub sandbox: Option<u64>,
    /// CreateContainer.
    pub create: Option<u64>,
    /// StartContainer.
    pub start: Option<u64>,
    /// From the agent's acceptance to Running.
    pub total: Option<u64>,
}

/// Why a node was not chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Node to reason.
    pub rejected: Map<String, Value>,
}

impl Status {
    /// The status of a workload accepted now, of which nothing else is known.
    pub fn accepted(node: Option<String>) -> Self {
        let now = Timestamp::now();
        Self {
            reason: None,
            message: None,
            phase: None,
            node,
            attempt: 0,
            restarts: 0,
            exit_code: None,
            oom_killed: false,
            sandbox_id: None,
            container_id: None,
            image_digest: None,
            ip: None,
            handler: None,
            isolation: Isolation::default(),
            created_at: now,
            started_at: None,
            finished_at: None,
            observed_at: now,
            timings_ms: Timings::default(),
            placement: Placement::default(),
            last_error: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_reads_what_it_writes_and_ignores_what_is_new() {
        let mut status = Status::accepted(Some("node-1".into()));
        status.reason = Some(Reason::OomKilled);
        status.phase = Some(Phase::Stopping);
        let mut value = serde_json::to_value(&status).expect("JSON");
        assert_eq!(value["reason"], "OOMKilled");
        assert_eq!(value["exit_code"], Value::Null);
        value["from_the_future"] = 1.into();
        assert_eq!(serde_json::from_value::<Status>(value).expect("read"), status);
    }

    #[test]
    fn words_of_a_later_version_are_none() {
        let status = Status::accepted(None);
        let mut value = serde_json::to_value(&status).expect("JSON");
        (value["reason"], value["phase"]) = ("Preempted".into(), "Migrating".into());
        assert_eq!(serde_json::from_value::<Status>(value.clone()).expect("read"), status);
        value["reason"] = 7.into();
        assert!(serde_json::from_value::<Status>(value.clone()).is_err(), "no word at all");
        value.as_object_mut().expect("an object").retain(|key, _| key != "reason" && key != "phase");
        assert_eq!(serde_json::from_value::<Status>(value).expect("read"), status);
    }
}
