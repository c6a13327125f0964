//! What this agent pulled: the images it may collect, and for whose credentials a registry gave each out.
//!
//! Kept in a file that is replaced as a whole. One that is missing, damaged or of another version is an empty one: then nothing that
//! is there is ours, so nothing is collected. So it is with an image whose agent died between the pull and the writing.
//!
//! Invariant: an image that was at the runtime before kakuri pulled it is never in here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::deadline::Timestamp;
use crate::failpoint;
use crate::limits;
use crate::wire::images as wire;
use crate::workload::Name;

/// In the agent's state directory.
pub(super) const FILE: &str = "images.json";

/// Whose credentials an image came for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    /// The registry gives it to everybody.
    Anonymous,
    /// A set of the node that workloads name.
    Named(Name),
    /// The node's own, for workloads that name none.
    Node,
}

impl Source {
    fn text(&self) -> String {
        match self {
            Self::Anonymous => "anonymous".to_owned(),
            Self::Named(name) => format!("name:{name}"),
            Self::Node => "node".to_owned(),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "anonymous" => Some(Self::Anonymous),
            "node" => Some(Self::Node),
            other => other.strip_prefix("name:").and_then(|name| Name::new(name).ok()).map(Self::Named),
        }
    }
}

/// An image that kakuri pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pulled {
    pub(super) names: BTreeSet<String>,
    sources: BTreeSet<Source>,
    pub(super) pulled_at: Timestamp,
    pub(super) last_used_at: Timestamp,
    /// As the file has it.
    written_at: Timestamp,
}

#[cfg(test)]
impl Pulled {
    pub(super) fn sample(name: &str, pulled_at: Timestamp, last_used_at: Timestamp) -> Self {
        let (names, sources) = (BTreeSet::from([name.to_owned()]), BTreeSet::from([Source::Anonymous]));
        Self { names, sources, pulled_at, last_used_at, written_at: last_used_at }
    }
}

/// All of them, by runtime and id.
#[derive(Debug)]
pub(super) struct Ledger {
    path: PathBuf,
    images: BTreeMap<(String, String), Pulled>,
}

impl Ledger {
    /// What the file says; nothing, and a warning, when it cannot be believed.
    pub(super) fn read(path: PathBuf) -> Self {
        let images = match load(&path) {
            Ok(images) => images,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => {
                log::warn!("{}: {error}; no image that is there now will be collected", path.display());
                BTreeMap::new()
            }
        };
        Self { path, images }
    }

    /// Notes a pull; whether there is something to write.
    pub(super) fn pulled(&mut self, socket: &str, id: &str, name: String, source: Source, was_there: bool, now: Timestamp) -> bool {
        let key = (socket.to_owned(), id.to_owned());
        let is_full = self.images.len() >= limits::IMAGES_MAX;
        match self.images.get_mut(&key) {
            Some(pulled) => {
                pulled.last_used_at = now;
                let is_new_source = pulled.sources.len() < limits::IMAGE_NAMES_MAX && pulled.sources.insert(source);
                let is_new_name = pulled.names.len() < limits::IMAGE_NAMES_MAX && pulled.names.insert(name);
                is_new_source || is_new_name
            }
            None if was_there || is_full => false,
            None => {
                let (names, sources) = (BTreeSet::from([name]), BTreeSet::from([source]));
                self.images.insert(key, Pulled { names, sources, pulled_at: now, last_used_at: now, written_at: now });
                true
            }
        }
    }

    /// Notes that an image is used; whether that is worth writing: hours are, not every start.
    pub(super) fn used(&mut self, socket: &str, id: &str, now: Timestamp) -> bool {
        let Some(pulled) = self.images.get_mut(&(socket.to_owned(), id.to_owned())) else { return false };
        pulled.last_used_at = now;
        now.as_millis().abs_diff(pulled.written_at.as_millis()) >= USED_MS
    }

    /// Whether a workload that shows these credentials may use an image that is there, without a word from its registry.
    pub(super) fn may_use(&self, socket: &str, id: &str, credentials: Option<&Name>) -> bool {
        let shows = |source: &Source| match (source, credentials) {
            (Source::Anonymous, _) | (Source::Node, None) => true,
            (Source::Named(name), Some(shown)) => name == shown,
            (Source::Named(_), None) | (Source::Node, Some(_)) => false,
        };
        self.get(socket, id).is_none_or(|pulled| pulled.sources.iter().any(shows))
    }

    pub(super) fn get(&self, socket: &str, id: &str) -> Option<&Pulled> {
        self.images.get(&(socket.to_owned(), id.to_owned()))
    }

    /// Forgets an image that was removed.
    pub(super) fn remove(&mut self, socket: &str, id: &str) {
        self.images.remove(&(socket.to_owned(), id.to_owned()));
    }

    /// Forgets what a runtime does not have any more; whether there was any. What was pulled after its list was asked for is not
    /// missing.
    pub(super) fn prune(&mut self, socket: &str, listed: &BTreeSet<&str>, asked_at: Timestamp) -> bool {
        let before = self.images.len();
        self.images.retain(|(of, id), pulled| of != socket || listed.contains(id.as_str()) || pulled.last_used_at >= asked_at);
        before != self.images.len()
    }

    /// The file's path and text, as of now.
    pub(super) fn text(&mut self) -> (PathBuf, String) {
        let image = |((endpoint, id), pulled): (&(String, String), &mut Pulled)| {
            pulled.written_at = pulled.last_used_at;
            wire::Pulled {
                endpoint: endpoint.clone(),
                id: id.clone(),
                names: pulled.names.iter().cloned().collect(),
                credentials: pulled.sources.iter().map(Source::text).collect(),
                pulled_at: pulled.pulled_at,
                last_used_at: pulled.last_used_at,
            }
        };
        let images = self.images.iter_mut().map(image).collect();
        (self.path.clone(), wire::Ledger { version: wire::Ledger::VERSION, images }.to_text())
    }
}

/// A use this much later than the one on disk is written.
const USED_MS: u64 = 3_600_000;

fn load(path: &Path) -> io::Result<BTreeMap<(String, String), Pulled>> {
    let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("damaged: {what}"));
    let mut bytes = Vec::new();
    File::open(path)?.take(limits::IMAGES_FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limits::IMAGES_FILE_BYTES_MAX {
        return Err(damaged("too large"));
    }
    let ledger = wire::Ledger::parse(&bytes).map_err(|error| damaged(&error.to_string()))?;
    let mut images = BTreeMap::new();
    for wire::Pulled { endpoint, id, names, credentials, pulled_at, last_used_at } in ledger.images {
        let sources: Option<BTreeSet<Source>> = credentials.iter().map(|text| Source::parse(text)).collect();
        let sources = sources.filter(|sources| !sources.is_empty()).ok_or_else(|| damaged("credentials nobody knows"))?;
        let names: BTreeSet<String> = names.into_iter().collect();
        if names.is_empty() || id.is_empty() {
            return Err(damaged("an image without a name"));
        }
        let pulled = Pulled { names, sources, pulled_at, last_used_at, written_at: last_used_at };
        if images.insert((endpoint, id), pulled).is_some() {
            return Err(damaged("an image is there twice"));
        }
    }
    Ok(images)
}

/// Writes a file so that whoever reads it, after whatever happened, finds the old one or the new one.
pub(super) fn write(path: &Path, text: &str) -> io::Result<()> {
    failpoint::pass("agent-images-before");
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = path.with_extension("json.new");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()?;
    failpoint::pass("agent-images-after");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKET: &str = "/run/cri.sock";

    fn ledger(path: &Path) -> Ledger {
        Ledger::read(path.to_owned())
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000).expect("a time").plus_ms(seconds * 1000)
    }

    fn temporary() -> PathBuf {
        std::env::temp_dir().join(format!("kakuri-ledger-{}-{}", std::process::id(), crate::report::random_id())).join(FILE)
    }

    fn name(text: &str) -> Name {
        Name::new(text).expect("valid")
    }

    #[test]
    fn what_was_written_is_read_and_what_was_damaged_is_nothing() {
        let path = temporary();
        let mut first = ledger(&path);
        assert!(first.pulled(SOCKET, "sha256:1", "r.test/a:1".into(), Source::Node, false, at(1)));
        assert!(first.pulled(SOCKET, "sha256:1", "r.test/a:2".into(), Source::Named(name("team")), true, at(2)));
        assert!(!first.pulled(SOCKET, "sha256:2", "r.test/b:1".into(), Source::Anonymous, true, at(2)), "it was there before");
        let (to, text) = first.text();
        write(&to, &text).expect("written");
        let second = ledger(&path);
        assert_eq!(second.images, first.images);
        for cut in 0..text.len() {
            fs::write(&path, &text[..cut]).expect("written");
            assert!(ledger(&path).images.is_empty(), "{cut}");
        }
        for bad in [text.replace("node", "nobody"), text.replace("\"sha256:1\"", "\"\""), " ".repeat(limits::IMAGES_FILE_BYTES_MAX + 1)] {
            fs::write(&path, &bad).expect("written");
            assert!(ledger(&path).images.is_empty(), "{}", bad.trim());
        }
        fs::remove_dir_all(path.parent().expect("a directory")).expect("removed");
    }

    #[test]
    fn an_image_is_for_those_its_registry_gave_it_to() {
        let mut ledger = ledger(&temporary());
        let team = name("team");
        assert!(ledger.may_use(SOCKET, "sha256:0", None), "what somebody else put there is for everybody");
        ledger.pulled(SOCKET, "sha256:1", "r.test/a:1".into(), Source::Named(team.clone()), false, at(1));
        let of = |ledger: &Ledger, shown: Option<&Name>| ledger.may_use(SOCKET, "sha256:1", shown);
        assert!(of(&ledger, Some(&team)) && !of(&ledger, None) && !of(&ledger, Some(&name("other"))));
        ledger.pulled(SOCKET, "sha256:1", "r.test/a:1".into(), Source::Node, true, at(2));
        assert!(of(&ledger, None) && !of(&ledger, Some(&name("other"))));
        ledger.pulled(SOCKET, "sha256:1", "r.test/a:1".into(), Source::Anonymous, true, at(3));
        assert!(of(&ledger, Some(&name("other"))));
    }

    #[test]
    fn uses_are_written_by_the_hour_and_what_is_gone_is_forgotten() {
        let mut ledger = ledger(&temporary());
        ledger.pulled(SOCKET, "sha256:1", "r.test/a:1".into(), Source::Anonymous, false, at(0));
        assert!(!ledger.used(SOCKET, "sha256:1", at(3599)) && ledger.used(SOCKET, "sha256:1", at(3600)));
        ledger.text();
        assert!(!ledger.used(SOCKET, "sha256:1", at(3601)));
        assert!(!ledger.used(SOCKET, "sha256:2", at(9999)), "not ours");
        assert!(!ledger.prune("/run/other.sock", &BTreeSet::new(), at(9000)));
        assert!(!ledger.prune(SOCKET, &BTreeSet::new(), at(3601)), "it came after the list was asked for");
        assert!(ledger.prune(SOCKET, &BTreeSet::new(), at(3602)) && ledger.get(SOCKET, "sha256:1").is_none());
    }
}
