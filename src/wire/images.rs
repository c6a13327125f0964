//! Images in JSON: the agent's file of what it pulled, and what `CollectImages` tells.

use serde::de::Error as _;
use serde::{Deserialize, Serialize};

use crate::deadline::Timestamp;

/// The file of what an agent pulled. Read strictly: a file that is not exactly this is no file, and nothing in it is believed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    /// [`Ledger::VERSION`].
    pub version: u32,
    /// One for each image.
    pub images: Vec<Pulled>,
    /// One for each pull that shows credentials and whose end is not known; none in version 1.
    #[serde(default)]
    pub intents: Vec<Intent>,
}

/// A pull that shows credentials, written down before it begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Intent {
    /// The runtime's socket.
    pub endpoint: String,
    /// The name it is pulled under.
    pub name: String,
    /// Whose credentials it shows.
    pub credentials: String,
}

/// An image an agent pulled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pulled {
    /// The runtime's socket.
    pub endpoint: String,
    /// The runtime's name for the image.
    pub id: String,
    /// The names it was pulled under.
    pub names: Vec<String>,
    /// Whose credentials a registry gave it out for.
    pub credentials: Vec<String>,
    /// It was not there before; in version 1 none was.
    #[serde(default = "yes")]
    pub ours: bool,
    /// When it was pulled first.
    pub pulled_at: Timestamp,
    /// When something here last used it, to the hour.
    pub last_used_at: Timestamp,
}

fn yes() -> bool {
    true
}

impl Ledger {
    /// Of the file's format as it is written; the one before is read, too.
    pub const VERSION: u32 = 2;

    /// Reads the file.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let ledger: Self = serde_json::from_slice(bytes)?;
        match ledger.version {
            1 | Self::VERSION => Ok(ledger),
            other => Err(serde_json::Error::custom(format_args!("version {other}"))),
        }
    }

    /// The file's text.
    pub fn to_text(&self) -> String {
        // Strings and numbers alone: nothing here can fail to be written.
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// What is, or would be, done about the images of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Images {
    /// Nothing was removed; `removed` tells what would have been.
    pub dry_run: bool,
    /// The file systems images are on.
    pub file_systems: Vec<FileSystem>,
    /// The images, those that go first.
    pub images: Vec<Image>,
    /// Images beyond those.
    pub omitted: u64,
}

/// A file system with images of one runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// The runtime's socket.
    pub endpoint: String,
    /// Where, as the runtime says.
    pub mountpoint: Option<String>,
    /// What there is room for, bytes.
    pub capacity_bytes: Option<u64>,
    /// What is free of it, bytes.
    pub available_bytes: Option<u64>,
    /// What is taken, percent.
    pub used_percent: Option<u64>,
    /// From here on images are collected, percent.
    pub high_percent: u64,
    /// Down to here, percent.
    pub low_percent: u64,
    /// Why nothing can be said or done.
    pub problem: Option<String>,
}

/// An image, and what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// A name of it, or its id where it has none.
    pub image: String,
    /// The runtime's name for it.
    pub id: String,
    /// The runtime's socket.
    pub endpoint: String,
    /// What it takes, bytes.
    pub bytes: u64,
    /// When a workload here last used it; known of what kakuri pulled.
    pub last_used_at: Option<Timestamp>,
    /// It was not there before kakuri pulled it.
    pub pulled_by_kakuri: bool,
    /// A container of the runtime, or a workload of this node, is of it.
    pub in_use: bool,
    /// It was removed, or would be.
    pub removed: bool,
    /// Why, or why not.
    pub why: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_reads_what_it_writes_and_nothing_else() {
        let at = Timestamp::parse("2026-01-02T03:04:05.678Z").expect("a time");
        let pulled = Pulled {
            endpoint: "/run/cri.sock".into(),
            id: "sha256:1".into(),
            names: vec!["r.test/a:1".into()],
            credentials: vec!["anonymous".into()],
            ours: true,
            pulled_at: at,
            last_used_at: at,
        };
        let intent = Intent { endpoint: "/run/cri.sock".into(), name: "r.test/b:1".into(), credentials: "node".into() };
        let text = Ledger { version: Ledger::VERSION, images: vec![pulled.clone()], intents: vec![intent.clone()] }.to_text();
        let read = Ledger::parse(text.as_bytes()).expect("itself");
        assert_eq!((read.images, read.intents), (vec![pulled.clone()], vec![intent]));
        let of_old = r#"{"version":1,"images":[{"endpoint":"/run/cri.sock","id":"sha256:1","names":["r.test/a:1"],
            "credentials":["anonymous"],"pulled_at":"2026-01-02T03:04:05.678Z","last_used_at":"2026-01-02T03:04:05.678Z"}]}"#;
        let read = Ledger::parse(of_old.as_bytes()).expect("the version before");
        assert_eq!((read.images, read.intents), (vec![pulled], vec![]));
        for bad in
            ["", "{}", "[]", &text[..text.len() - 1], &text.replace("\"version\":2", "\"version\":3"), &text.replace("names", "name")]
        {
            assert!(Ledger::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
