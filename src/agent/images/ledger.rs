//! What this agent pulled: the images it may collect, and for whose credentials a registry gave each out.
//!
//! A pull that shows credentials is written down before the runtime hears of it, as an [`Intent`]. From then on until its end is
//! known, an image of its repository that nobody can tell the origin of is for nobody: whoever asks for it is sent to the registry.
//! So a pull whose answer was lost, or whose agent died, gives nothing away.
//!
//! Kept in a file that is replaced as a whole. One that is missing is an empty one: then nothing that is there is ours, so nothing is
//! collected, and all of it is for everybody. So it is with an image that was pulled without credentials and whose agent died between
//! the pull and the writing. One that is damaged is refused: it may have said that an image is not for everybody.
//!
//! Invariant: an image that was at the runtime before kakuri pulled it is never in here as ours.
//! Invariant: images and intents together are at most `IMAGES_MAX`; an image some may not use is never forgotten to make room.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::agent::node;
use crate::cri::images::{Found, Remains};
use crate::deadline::{Stopwatch, Timestamp, uptime_ms};
use crate::failpoint;
use crate::limits;
use crate::wire::images as wire;
use crate::workload::{ImageRef, Name};

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
    /// Empty when it came by a pull whose end nobody knows: then it is for nobody until a registry gives it out.
    sources: BTreeSet<Source>,
    /// It was not there before, so it may be collected.
    pub(super) is_ours: bool,
    pub(super) pulled_at: Timestamp,
    pub(super) last_used_at: Timestamp,
    /// As the file has it.
    written_at: Timestamp,
    /// When this agent heard of it. Uses shortly before that are not in the file.
    known_at: Timestamp,
    /// When it came; what the file knew, before all that.
    since: Moment,
    /// When something last came of it here.
    touched: Moment,
    /// Since when its runtime does not list it, by [`uptime_ms`].
    missing_since: Option<u64>,
}

impl Pulled {
    /// Since when nobody used it, as far as anybody can tell.
    pub(super) fn idle_since(&self) -> Timestamp {
        self.pulled_at.max(self.last_used_at).max(self.known_at)
    }
}

#[cfg(test)]
impl Pulled {
    pub(super) fn sample(name: &str, pulled_at: Timestamp, last_used_at: Timestamp) -> Self {
        let (names, sources) = (BTreeSet::from([name.to_owned()]), BTreeSet::from([Source::Anonymous]));
        let (written_at, known_at, since, touched) = (last_used_at, pulled_at, Moment(0), Moment(0));
        Self { names, sources, is_ours: true, pulled_at, last_used_at, written_at, known_at, since, touched, missing_since: None }
    }
}

/// The node's credentials are for those, and no others, who name none.
const NODES: (&Source, &Source) = (&Source::Node, &Source::Anonymous);

/// Of the ledger's own time, which nobody sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(u64);

/// What makes two intents the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct IntentKey {
    pub(super) socket: String,
    /// As the runtime will list it.
    pub(super) name: String,
    pub(super) source: Source,
}

/// A pull with credentials that may have brought, or may yet bring, what the ledger does not know.
#[derive(Debug)]
struct Intent {
    repository: String,
    /// What was there before that moment did not come by it. An agent before this one knew.
    opened: Option<Moment>,
    /// Such pulls that are under way.
    doing: usize,
    doubt: Option<Doubt>,
}

/// A pull ended, and nobody knows how.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    at: Moment,
    since: Stopwatch,
    /// For so long after that the runtime may still be at it.
    ms: u64,
}

impl Doubt {
    /// The runtime may be at it for as long as it was given.
    fn unanswered(at: Moment) -> Self {
        Self { at, since: Stopwatch::start(), ms: limits::START_DEADLINE_MS_MAX }
    }

    fn answered(at: Moment) -> Self {
        Self { at, since: Stopwatch::start(), ms: 0 }
    }

    fn left_ms(&self) -> u64 {
        self.ms.saturating_sub(self.since.elapsed_ms())
    }

    /// Whether a runtime that was asked then, when `watch` began, told all that may come of it.
    fn is_over(&self, asked: Moment, watch: Stopwatch) -> bool {
        asked > self.at && (self.ms == 0 || self.since.elapsed_ms() >= self.ms.saturating_add(watch.elapsed_ms()))
    }
}

/// Why an image that was pulled may not be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// There is no room for what must not be forgotten.
    Full,
    /// It came from another registry, which does not give it to everybody. A runtime fetches nothing it has already, so whoever knows
    /// its digest can claim to have it, too.
    Private,
}

/// All of them, by runtime and id.
#[derive(Debug)]
pub(super) struct Ledger {
    path: PathBuf,
    images: BTreeMap<(String, String), Pulled>,
    intents: BTreeMap<IntentKey, Intent>,
    /// What was seen at a runtime and is not in `images`, and when it was seen first.
    strangers: BTreeMap<(String, String), Moment>,
    now: Moment,
    /// When an image was last forgotten.
    forgot: Moment,
}

impl Ledger {
    /// What the file says; nothing, and a warning, when it cannot be believed.
    pub(super) fn read(path: PathBuf) -> io::Result<Self> {
        // Half of what an agent was killed over writing; what is not needed any more is not written any more either.
        let _ = fs::remove_file(new_of(&path)); // There is none as a rule, and the next write replaces one that stays.
        let (images, intents) = match load(&path) {
            Ok(loaded) => loaded,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Default::default(),
            Err(error) => return Err(error),
        };
        Ok(Self { path, images, intents, strangers: BTreeMap::new(), now: Moment(1), forgot: Moment(0) })
    }

    /// Before a runtime is asked for its images.
    pub(super) fn ask(&mut self) -> Moment {
        self.now.0 += 1;
        self.now
    }

    /// Learns what is at a runtime that was asked at that moment; the moment before which all of it was there. `None` when an image
    /// was forgotten since: it may be in the answer and gone, so it has to be asked again.
    pub(super) fn listed(&mut self, socket: &str, ids: &BTreeSet<&str>, asked: Moment) -> Option<Moment> {
        if self.forgot >= asked {
            return None;
        }
        // What others learned since they asked may have come since this was asked.
        self.strangers.retain(|(of, id), first| of != socket || *first >= asked || ids.contains(id.as_str()));
        for id in ids {
            let key = (socket.to_owned(), (*id).to_owned());
            if !self.images.contains_key(&key) {
                self.strangers.entry(key).or_insert(self.now);
            }
        }
        Some(self.ask())
    }

    /// Notes that a pull is to begin, of a runtime that has told before `opened` what it has; whether that is news.
    ///
    /// # Errors
    /// [`Refusal::Full`]: then it must not begin.
    pub(super) fn open(&mut self, key: &IntentKey, opened: Moment) -> Result<bool, Refusal> {
        if let Some(intent) = self.intents.get_mut(key) {
            intent.doing += 1;
            return Ok(false);
        }
        if !self.make_room() {
            return Err(Refusal::Full);
        }
        self.intents.insert(key.clone(), Intent { repository: repository(&key.name), opened: Some(opened), doing: 1, doubt: None });
        Ok(true)
    }

    /// Notes that a pull that was noted ended, and what it left; whether there is something to write.
    pub(super) fn close(&mut self, key: &IntentKey, remains: Remains) -> bool {
        let at = self.ask();
        let Some(intent) = self.intents.get_mut(key) else { return false };
        intent.doing = intent.doing.saturating_sub(1);
        let doubt = match remains {
            Remains::Nothing => None,
            Remains::Perhaps => Some(Doubt::answered(at)),
            Remains::Yet => Some(Doubt::unanswered(at)),
        };
        if let Some(doubt) = doubt {
            // The longer one counts.
            intent.doubt = Some(intent.doubt.filter(|known| known.left_ms() > doubt.ms).map_or(doubt, |known| Doubt { at, ..known }));
        }
        let is_settled = intent.doing == 0 && intent.doubt.is_none();
        if is_settled {
            self.intents.remove(key);
        }
        is_settled
    }

    /// Notes what a pull brought, of a runtime that has told before `opened` what it has; whether there is something to write. The
    /// intent of a pull with credentials is closed after this.
    ///
    /// # Errors
    /// [`Refusal`].
    pub(super) fn pulled(&mut self, key: &IntentKey, found: &Found, opened: Moment, now: Timestamp) -> Result<bool, Refusal> {
        let IntentKey { socket, name, source } = key;
        let id = (socket.clone(), found.image.id.clone());
        let touched = self.now;
        if let Some(pulled) = self.images.get_mut(&id) {
            if !is_of_registry(name, &pulled.names) {
                // Who shows no set of their own shows what the node shows.
                let may_use = |known: &Source| known == source || matches!(known, Source::Anonymous) || (known, source) == NODES;
                let is_anybodys = pulled.sources.iter().eq([&Source::Anonymous]);
                if pulled.since > opened && *source != Source::Anonymous && is_anybodys {
                    // It came while this was under way, from a registry that may have waited for just that. What is somebody's stays
                    // theirs: that they came later says nothing.
                    pulled.sources.clear();
                } else if !pulled.sources.iter().any(may_use) {
                    return Err(Refusal::Private);
                } else if !pulled.sources.contains(source) {
                    (pulled.last_used_at, pulled.touched) = (now, touched);
                    return Ok(pulled.names.len() < limits::IMAGE_NAMES_MAX && pulled.names.insert(name.clone()));
                }
            }
            (pulled.last_used_at, pulled.touched) = (now, touched);
            // One that gets no more names has a name that is not ours, and stays; one that gets no more sources is pulled again.
            let is_new_source = pulled.sources.len() < limits::IMAGE_NAMES_MAX && pulled.sources.insert(source.clone());
            let is_new_name = pulled.names.len() < limits::IMAGE_NAMES_MAX && pulled.names.insert(name.clone());
            return Ok(is_new_source || is_new_name);
        }
        let was_there = self.strangers.get(&id).is_some_and(|first| *first < opened);
        // What others may have brought whose end nobody knows; this pull does not vouch for itself.
        let others = self.origin(socket, &found.image.id, found.names.iter().chain([name]), Some(key));
        if others.is_some_and(|others| !is_of_registry(name, &others.names)) {
            return Err(Refusal::Private);
        }
        let is_ours = match self.origin(socket, &found.image.id, found.names.iter().chain([name]), None) {
            Some(origin) => origin.is_ours || !was_there,
            None if was_there => return Ok(false),
            None => true,
        };
        // The slot of its intent is to be free; who else forgets nothing but what everybody may use anyway.
        let has_intent = self.intents.get(key).is_some_and(|intent| intent.doing == 1 && intent.doubt.is_none());
        if !has_intent && !self.make_room() {
            // Everybody may have it from the registry, and what is not in here is not collected.
            return if *source == Source::Anonymous { Ok(false) } else { Err(Refusal::Full) };
        }
        self.insert(id, BTreeSet::from([name.clone()]), BTreeSet::from([source.clone()]), is_ours, now);
        Ok(true)
    }

    fn insert(&mut self, id: (String, String), names: BTreeSet<String>, sources: BTreeSet<Source>, is_ours: bool, now: Timestamp) {
        self.strangers.remove(&id);
        let (since, touched) = (self.now, self.now);
        let (pulled_at, last_used_at, written_at, known_at) = (now, now, now, now);
        let pulled = Pulled { names, sources, is_ours, pulled_at, last_used_at, written_at, known_at, since, touched, missing_since: None };
        self.images.insert(id, pulled);
    }

    /// Takes down what pulls left whose end nobody knows, and forgets those of them that can leave nothing more. The images are of a
    /// runtime that was asked for them then, when `watch` began; whether there is something to write.
    pub(super) fn sweep(
        &mut self,
        socket: &str,
        images: &[(&str, Vec<String>)],
        (asked, watch): (Moment, Stopwatch),
        now: Timestamp,
    ) -> bool {
        if !self.intents.keys().any(|key| key.socket == socket) {
            return false;
        }
        let (mut is_dirty, mut is_whole) = (false, true);
        for (id, names) in images {
            let key = (socket.to_owned(), (*id).to_owned());
            if self.images.contains_key(&key) || id.len() > limits::IMAGE_BYTES_MAX {
                continue;
            }
            let Some(Origin { names, is_ours }) = self.origin(socket, id, names.iter(), None) else { continue };
            if self.make_room() {
                self.insert(key, names, BTreeSet::new(), is_ours, now);
                is_dirty = true;
            } else {
                is_whole = false;
            }
        }
        let before = self.intents.len();
        let is_over = |intent: &Intent| intent.doing == 0 && intent.doubt.is_some_and(|doubt| doubt.is_over(asked, watch));
        self.intents.retain(|key, intent| key.socket != socket || !is_whole || !is_over(intent));
        is_dirty || before != self.intents.len()
    }

    /// Where an image may have come from that is not in here, but for one pull; `None` when it is somebody else's for certain.
    fn origin<'a, T: AsRef<str> + ?Sized + 'a>(
        &self,
        socket: &str,
        id: &str,
        names: impl Iterator<Item = &'a T>,
        but_for: Option<&IntentKey>,
    ) -> Option<Origin> {
        if self.intents.is_empty() {
            return None;
        }
        let repositories: BTreeSet<String> = names.map(|name| repository(name.as_ref())).collect();
        let first = self.strangers.get(&(socket.to_owned(), id.to_owned()));
        let covers = |key: &IntentKey, intent: &Intent| {
            let was_there = intent.opened.is_some_and(|opened| first.is_some_and(|first| *first < opened));
            Some(key) != but_for && key.socket == socket && repositories.contains(&intent.repository) && !was_there
        };
        let mut origin: Option<Origin> = None;
        for (key, intent) in self.intents.iter().filter(|(key, intent)| covers(key, intent)) {
            let origin = origin.get_or_insert(Origin { names: BTreeSet::new(), is_ours: true });
            origin.is_ours &= intent.opened.is_some();
            if origin.names.len() < limits::IMAGE_NAMES_MAX {
                origin.names.insert(key.name.clone());
            }
        }
        origin
    }

    /// Whether there is room for one more, after an image was forgotten that everybody may use anyway.
    fn make_room(&mut self) -> bool {
        if self.images.len() + self.intents.len() < limits::IMAGES_MAX {
            return true;
        }
        let open = self.images.iter().filter(|(_, pulled)| pulled.sources.contains(&Source::Anonymous));
        let oldest = open.min_by_key(|(_, pulled)| pulled.last_used_at).map(|(id, _)| id.clone());
        let Some((socket, id)) = oldest else { return false };
        self.remove(&socket, &id);
        self.images.len() + self.intents.len() < limits::IMAGES_MAX
    }

    /// Notes that an image is used; whether that is worth writing: hours are, not every start.
    pub(super) fn used(&mut self, socket: &str, id: &str, now: Timestamp) -> bool {
        let touched = self.now;
        let Some(pulled) = self.images.get_mut(&(socket.to_owned(), id.to_owned())) else { return false };
        (pulled.last_used_at, pulled.touched) = (now, touched);
        now.as_millis().abs_diff(pulled.written_at.as_millis()) >= USED_MS
    }

    /// Whether a workload that shows these credentials may use an image that is there, under these names, without a word from its
    /// registry.
    pub(super) fn may_use(&self, socket: &str, found: &Found, name: &str, credentials: Option<&Name>) -> bool {
        let shows = |source: &Source| match (source, credentials) {
            (Source::Anonymous, _) | (Source::Node, None) => true,
            (Source::Named(name), Some(shown)) => name == shown,
            (Source::Named(_), None) | (Source::Node, Some(_)) => false,
        };
        match self.get(socket, &found.image.id) {
            Some(pulled) => pulled.sources.iter().any(shows),
            None => self.origin(socket, &found.image.id, found.names.iter().map(String::as_str).chain([name]), None).is_none(),
        }
    }

    pub(super) fn get(&self, socket: &str, id: &str) -> Option<&Pulled> {
        self.images.get(&(socket.to_owned(), id.to_owned()))
    }

    /// Whether an image was pulled or used since that moment.
    pub(super) fn is_touched(&self, socket: &str, id: &str, since: Moment) -> bool {
        self.get(socket, id).is_some_and(|pulled| pulled.touched >= since)
    }

    /// Forgets an image that was removed.
    pub(super) fn remove(&mut self, socket: &str, id: &str) {
        self.images.remove(&(socket.to_owned(), id.to_owned()));
        self.forgot = self.now;
    }

    /// Forgets what a runtime does not have any more; whether there was any. What was pulled after its list was asked for is not
    /// missing. What some may not use has to be missing for long: a runtime that does not list it now may have it still, and forgotten
    /// it would be for everybody.
    pub(super) fn prune(&mut self, socket: &str, listed: &BTreeSet<&str>, asked: Moment, missing_ms_max: u64) -> bool {
        let (before, uptime_ms) = (self.images.len(), uptime_ms());
        let mut is_news = false;
        self.images.retain(|(of, id), pulled| {
            if of != socket || pulled.touched >= asked {
                return true;
            }
            if listed.contains(id.as_str()) {
                if pulled.missing_since.take().is_some() && std::mem::take(&mut pulled.is_ours) {
                    // Who brought it back nobody knows.
                    is_news = true;
                }
                return true;
            }
            let missing_ms = uptime_ms.saturating_sub(*pulled.missing_since.get_or_insert(uptime_ms));
            !pulled.sources.contains(&Source::Anonymous) && missing_ms < missing_ms_max
        });
        let is_less = before != self.images.len();
        if is_less {
            self.forgot = self.now;
        }
        is_less || is_news
    }

    /// The file's path, and what it is to hold as of now.
    pub(super) fn contents(&mut self) -> (PathBuf, Contents) {
        self.images.values_mut().for_each(|pulled| pulled.written_at = pulled.last_used_at);
        (self.path.clone(), Contents { images: self.images.clone(), intents: self.intents.keys().cloned().collect() })
    }
}

/// What may have brought an image.
struct Origin {
    /// Under which names.
    names: BTreeSet<String>,
    /// It was not there before.
    is_ours: bool,
}

/// The repository of a name as runtimes list them, by tag or by digest.
fn repository(name: &str) -> String {
    // Completed, a name may be a little longer than one that may be asked for.
    let cut = || {
        let name = name.split_once('@').map_or(name, |(name, _)| name);
        name.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).map_or(name, |(repository, _)| repository).to_owned()
    };
    ImageRef::new(name).map_or_else(|_| cut(), |name| name.repository().to_owned())
}

/// Whether a name is of a registry that one of these is of.
fn is_of_registry(name: &str, others: &BTreeSet<String>) -> bool {
    let registry = |name: &str| name.split('/').next().unwrap_or_default().to_owned();
    others.iter().any(|other| registry(other) == registry(name))
}

/// What the file is to hold.
pub(super) struct Contents {
    images: BTreeMap<(String, String), Pulled>,
    intents: Vec<IntentKey>,
}

impl Contents {
    /// The file's text.
    pub(super) fn text(self) -> String {
        let image = |((endpoint, id), pulled): ((String, String), Pulled)| wire::Pulled {
            endpoint,
            id,
            names: pulled.names.into_iter().collect(),
            credentials: pulled.sources.iter().map(Source::text).collect(),
            ours: pulled.is_ours,
            pulled_at: pulled.pulled_at,
            last_used_at: pulled.last_used_at,
        };
        let intent = |IntentKey { socket, name, source }| wire::Intent { endpoint: socket, name, credentials: source.text() };
        let images = self.images.into_iter().map(image).collect();
        wire::Ledger { version: wire::Ledger::VERSION, images, intents: self.intents.into_iter().map(intent).collect() }.to_text()
    }
}

/// A use this much later than the one on disk is written.
const USED_MS: u64 = 3_600_000;

type Loaded = (BTreeMap<(String, String), Pulled>, BTreeMap<IntentKey, Intent>);

fn load(path: &Path) -> io::Result<Loaded> {
    let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("damaged: {what}"));
    let mut bytes = Vec::new();
    File::open(path)?.take(limits::IMAGES_FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limits::IMAGES_FILE_BYTES_MAX {
        return Err(damaged("too large"));
    }
    let ledger = wire::Ledger::parse(&bytes).map_err(|error| damaged(&error.to_string()))?;
    // A version before this one wrote what the configuration said.
    let spelled = |socket: &str| node::real(Path::new(socket)).display().to_string();
    let complete = |name: String| ImageRef::new(&name).map_or(name, |name| name.listed());
    let (mut images, mut seen) = (BTreeMap::new(), BTreeSet::new());
    let known_at = Timestamp::now();
    for wire::Pulled { endpoint, id, names, credentials, ours, pulled_at, last_used_at } in ledger.images {
        let sources: Option<BTreeSet<Source>> = credentials.iter().map(|text| Source::parse(text)).collect();
        // A version before this one remembered more of them.
        let sources = sources.ok_or_else(|| damaged("credentials nobody knows"))?.into_iter().take(limits::IMAGE_NAMES_MAX).collect();
        let names: BTreeSet<String> = names.into_iter().take(limits::IMAGE_NAMES_MAX).map(complete).collect();
        if names.is_empty() || id.is_empty() {
            return Err(damaged("an image without a name"));
        }
        let (written_at, since, touched) = (last_used_at, Moment(0), Moment(0));
        let (is_ours, missing_since) = (ours, None);
        let pulled = Pulled { names, sources, is_ours, pulled_at, last_used_at, written_at, known_at, since, touched, missing_since };
        if !seen.insert((endpoint.clone(), id.clone())) {
            return Err(damaged("an image is there twice"));
        }
        match images.entry((spelled(&endpoint), id)) {
            Entry::Vacant(entry) => drop(entry.insert(pulled)),
            // The same runtime, by two names.
            Entry::Occupied(mut entry) => {
                let known: &mut Pulled = entry.get_mut();
                known.names.extend(pulled.names);
                known.sources.extend(pulled.sources);
                known.is_ours &= pulled.is_ours;
                (known.pulled_at, known.last_used_at) =
                    (known.pulled_at.max(pulled.pulled_at), known.last_used_at.max(pulled.last_used_at));
            }
        }
    }
    let mut intents = BTreeMap::new();
    for wire::Intent { endpoint, name, credentials } in ledger.intents {
        let (socket, name) = (spelled(&endpoint), complete(name));
        let source = Source::parse(&credentials).ok_or_else(|| damaged("credentials nobody knows"))?;
        let intent = Intent { repository: repository(&name), opened: None, doing: 0, doubt: Some(Doubt::unanswered(Moment(0))) };
        intents.insert(IntentKey { socket, name, source }, intent);
    }
    Ok((images, intents))
}

/// Where a file is written before it takes its place.
fn new_of(path: &Path) -> PathBuf {
    path.with_extension("json.new")
}

/// Writes a file so that whoever reads it, after whatever happened, finds the old one or the new one.
pub(super) fn write(path: &Path, text: &str) -> io::Result<()> {
    failpoint::pass("agent-images-before");
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = new_of(path);
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
        Ledger::read(path.to_owned()).expect("whole or not there")
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

    fn key(name: &str, source: Source) -> IntentKey {
        IntentKey { socket: SOCKET.into(), name: name.into(), source }
    }

    fn team() -> Source {
        Source::Named(name("team"))
    }

    fn found(id: &str, names: &[&str]) -> Found {
        let image = crate::cri::images::Image { id: id.into(), digest: None };
        Found { image, names: names.iter().map(|name| (*name).to_owned()).collect() }
    }

    /// What a pull learns first, of a runtime that has these images.
    fn look(ledger: &mut Ledger, ids: &[&str]) -> Moment {
        let asked = ledger.ask();
        ledger.listed(SOCKET, &ids.iter().copied().collect(), asked).expect("nothing was forgotten")
    }

    /// A whole pull of an image that is there under that name alone, then; whether there is something to write.
    fn pull(ledger: &mut Ledger, there: &[&str], id: &str, key: &IntentKey, now: Timestamp) -> bool {
        let opened = look(ledger, there);
        if key.source != Source::Anonymous {
            ledger.open(key, opened).expect("room");
        }
        let is_news = ledger.pulled(key, &found(id, &[&key.name]), opened, now).expect("room");
        ledger.close(key, Remains::Nothing);
        is_news
    }

    fn may_use(ledger: &Ledger, id: &str, image: &str, shown: Option<&str>) -> bool {
        ledger.may_use(SOCKET, &found(id, &[image]), image, shown.map(name).as_ref())
    }

    /// The first image of a file.
    fn row_of(text: &str) -> String {
        let file: serde_json::Value = serde_json::from_str(text).expect("JSON");
        file["images"][0].to_string()
    }

    fn sweep(ledger: &mut Ledger, id: &str, image: &str) -> bool {
        let asked = (ledger.ask(), Stopwatch::start());
        ledger.sweep(SOCKET, &[(id, vec![image.to_owned()])], asked, at(9))
    }

    #[test]
    fn what_was_written_is_read_and_what_was_damaged_is_refused() {
        let path = temporary();
        let mut first = ledger(&path);
        assert!(pull(&mut first, &[], "sha256:1", &key("r.test/a:1", Source::Node), at(1)));
        assert!(pull(&mut first, &["sha256:1"], "sha256:1", &key("r.test/a:2", team()), at(2)));
        assert!(!pull(&mut first, &["sha256:2"], "sha256:2", &key("r.test/b:1", Source::Anonymous), at(2)), "it was there before");
        let opened = look(&mut first, &[]);
        first.open(&key("r.test/c:1", team()), opened).expect("room");
        let (to, contents) = first.contents();
        let text = contents.text();
        write(&to, &text).expect("written");
        fs::write(new_of(&path), &text[..9]).expect("written");
        let mut second = ledger(&path);
        assert_eq!((second.images.len(), second.intents.len()), (1, 1));
        assert_eq!(second.contents().1.text(), text);
        assert!(!new_of(&path).exists(), "what was not finished is left");
        for cut in 0..text.len() {
            fs::write(&path, &text[..cut]).expect("written");
            assert!(Ledger::read(path.clone()).is_err(), "{cut}");
        }
        // What an older version wrote: names as they were given, and one runtime by two names.
        let twice = text.replace("r.test/a:1", "index.docker.io/me/a:1");
        let second_name = twice.replacen("\"images\":[", &format!("\"images\":[{},", row_of(&twice).replace(SOCKET, "/run/./cri.sock")), 1);
        fs::write(&path, &second_name).expect("written");
        let merged = ledger(&path);
        let names: Vec<&String> = merged.images.values().flat_map(|pulled| &pulled.names).collect();
        assert_eq!(names, ["docker.io/me/a:1", "r.test/a:2"]);
        for bad in [text.replace("node", "nobody"), text.replace("\"sha256:1\"", "\"\""), " ".repeat(limits::IMAGES_FILE_BYTES_MAX + 1)] {
            fs::write(&path, &bad).expect("written");
            assert!(Ledger::read(path.clone()).is_err(), "{}", bad.trim());
        }
        fs::remove_dir_all(path.parent().expect("a directory")).expect("removed");
    }

    #[test]
    fn an_image_is_for_those_its_registry_gave_it_to() {
        let mut ledger = ledger(&temporary());
        assert!(may_use(&ledger, "sha256:0", "r.test/z:1", None), "what somebody else put there is for everybody");
        pull(&mut ledger, &[], "sha256:1", &key("r.test/a:1", team()), at(1));
        let of = |ledger: &Ledger, shown: Option<&str>| may_use(ledger, "sha256:1", "r.test/a:1", shown);
        assert!(of(&ledger, Some("team")) && !of(&ledger, None) && !of(&ledger, Some("other")));
        pull(&mut ledger, &["sha256:1"], "sha256:1", &key("r.test/a:1", Source::Node), at(2));
        assert!(of(&ledger, None) && !of(&ledger, Some("other")));
        pull(&mut ledger, &["sha256:1"], "sha256:1", &key("r.test/a:1", Source::Anonymous), at(3));
        assert!(of(&ledger, Some("other")));
        // What was there before is for everybody still.
        assert!(!pull(&mut ledger, &["sha256:2"], "sha256:2", &key("r.test/b:1", team()), at(4)));
        assert!(may_use(&ledger, "sha256:2", "r.test/b:1", None));
    }

    #[test]
    fn no_registry_gives_out_what_came_from_another() {
        let mut ledger = ledger(&temporary());
        let evil = key(&format!("evil.test/x@sha256:{}", "0".repeat(64)), Source::Anonymous);
        let claim = |ledger: &mut Ledger, key: &IntentKey| {
            let opened = look(ledger, &["sha256:1"]);
            ledger.pulled(key, &found("sha256:1", &["r.test/a:1", &key.name]), opened, at(2))
        };
        pull(&mut ledger, &[], "sha256:1", &key("r.test/a:1", team()), at(1));
        assert_eq!(claim(&mut ledger, &evil), Err(Refusal::Private));
        assert_eq!(claim(&mut ledger, &key("evil.test/x:1", Source::Node)), Err(Refusal::Private));
        let (evil_set, opened) = (key("evil.test/y:1", Source::Named(name("evil"))), look(&mut ledger, &[]));
        ledger.open(&evil_set, opened).expect("room");
        assert_eq!(claim(&mut ledger, &evil_set), Err(Refusal::Private), "a pull does not vouch for itself");
        ledger.close(&evil_set, Remains::Nothing);
        assert!(!may_use(&ledger, "sha256:1", "r.test/a:1", None) && !may_use(&ledger, "sha256:1", &evil.name, None));
        // Who may use it may call it what they like; its own registry may give it to whom it likes.
        assert_eq!(claim(&mut ledger, &key("copy.test/a:1", team())), Ok(true));
        assert_eq!(claim(&mut ledger, &key("r.test/public/a:1", Source::Anonymous)), Ok(true));
        assert_eq!(claim(&mut ledger, &evil), Ok(true), "it is for everybody now");
        // Nor what a pull may have brought whose end nobody knows.
        let mut ledger = self::ledger(&temporary());
        let private = key("r.test/a:1", team());
        let opened = look(&mut ledger, &[]);
        ledger.open(&private, opened).expect("room");
        ledger.close(&private, Remains::Yet);
        assert_eq!(claim(&mut ledger, &evil), Err(Refusal::Private));
        assert!(!may_use(&ledger, "sha256:1", "r.test/a:1", None));
        let evil_set = key("evil.test/x:1", Source::Named(name("evil")));
        let opened = look(&mut ledger, &[]);
        ledger.open(&evil_set, opened).expect("room");
        assert_eq!(ledger.pulled(&evil_set, &found("sha256:1", &["r.test/a:1"]), opened, at(2)), Err(Refusal::Private));
    }

    #[test]
    fn what_came_by_another_registry_while_a_pull_was_under_way_is_not_its_gift() {
        let mut ledger = ledger(&temporary());
        let (private, evil) = (key("r.test/a:1", team()), key("evil.test/x:1", Source::Anonymous));
        let opened = look(&mut ledger, &[]);
        ledger.open(&private, opened).expect("room");
        // Its blobs are there, and its name is not yet.
        assert!(pull(&mut ledger, &[], "sha256:1", &evil, at(1)));
        assert_eq!(ledger.pulled(&private, &found("sha256:1", &["r.test/a:1", "evil.test/x:1"]), opened, at(2)), Ok(true));
        assert!(may_use(&ledger, "sha256:1", "r.test/a:1", Some("team")) && !may_use(&ledger, "sha256:1", "evil.test/x:1", None));
        // Nor does it get what is somebody's by having begun before them.
        let mut ledger = self::ledger(&temporary());
        let slow = key("evil.test/x:1", Source::Named(name("evil")));
        let opened = look(&mut ledger, &[]);
        ledger.open(&slow, opened).expect("room");
        assert!(pull(&mut ledger, &[], "sha256:1", &private, at(1)));
        let claim = found("sha256:1", &["r.test/a:1", "evil.test/x:1"]);
        assert_eq!(ledger.pulled(&slow, &claim, opened, at(2)), Err(Refusal::Private));
        assert!(may_use(&ledger, "sha256:1", "r.test/a:1", Some("team")) && !may_use(&ledger, "sha256:1", "r.test/a:1", Some("evil")));
        // Nor what a lost pull brought meanwhile, which is for nobody yet.
        let mut ledger = self::ledger(&temporary());
        let opened = look(&mut ledger, &[]);
        ledger.open(&slow, opened).expect("room");
        let lost = look(&mut ledger, &[]);
        ledger.open(&private, lost).expect("room");
        ledger.close(&private, Remains::Perhaps);
        assert!(sweep(&mut ledger, "sha256:1", "r.test/a:1"));
        assert_eq!(ledger.pulled(&slow, &claim, opened, at(2)), Err(Refusal::Private));
    }

    #[test]
    fn who_names_no_credentials_has_what_the_node_was_given() {
        let mut ledger = ledger(&temporary());
        pull(&mut ledger, &[], "sha256:1", &key("docker.io/library/a:1", Source::Node), at(1));
        // The node has none for the mirror.
        assert!(pull(&mut ledger, &["sha256:1"], "sha256:1", &key("mirror.test/a:1", Source::Anonymous), at(2)));
        assert!(may_use(&ledger, "sha256:1", "mirror.test/a:1", None));
        assert!(!may_use(&ledger, "sha256:1", "mirror.test/a:1", Some("team")), "it is not for everybody for that");
    }

    #[test]
    fn what_a_lost_pull_brought_is_for_nobody_until_a_registry_gives_it_out() {
        for remains in [Remains::Perhaps, Remains::Yet] {
            let mut ledger = ledger(&temporary());
            let (private, id) = (key("r.test/a:1", team()), "sha256:1");
            let by_digest = format!("r.test/a@sha256:{}", "0".repeat(64));
            let opened = look(&mut ledger, &["sha256:0"]);
            assert_eq!(ledger.open(&private, opened), Ok(true));
            // The runtime has it, before the answer and after it was lost.
            for _ in 0..2 {
                for name in [&private.name, &by_digest] {
                    assert!(!may_use(&ledger, id, name, None) && !may_use(&ledger, id, name, Some("team")), "{name}");
                }
                assert!(may_use(&ledger, "sha256:0", &private.name, None), "it was there before");
                assert!(may_use(&ledger, id, "r.test/b:1", None), "another repository is none of it");
                assert!(!ledger.close(&private, remains), "it stays in the file");
            }
            // Others look around, and are none the wiser.
            look(&mut ledger, &["sha256:0", id]);
            assert!(!may_use(&ledger, id, &private.name, None));
            // Asked again, the registry says who may. It came by us.
            assert!(pull(&mut ledger, &["sha256:0", id], id, &private, at(1)));
            assert!(may_use(&ledger, id, &private.name, Some("team")) && !may_use(&ledger, id, &private.name, None));
            assert!(ledger.get(SOCKET, id).is_some_and(|pulled| pulled.is_ours));
            // A list that was asked for after the end says all there is to know, unless the runtime may be at it still.
            assert_eq!(sweep(&mut ledger, id, &private.name), remains == Remains::Perhaps);
            assert_eq!(ledger.intents.is_empty(), remains == Remains::Perhaps);
        }
    }

    #[test]
    fn what_a_lost_pull_brought_is_taken_down_by_a_sweep() {
        let mut ledger = ledger(&temporary());
        let private = key("r.test/a:1", team());
        let opened = look(&mut ledger, &[]);
        ledger.open(&private, opened).expect("room");
        ledger.close(&private, Remains::Perhaps);
        assert!(sweep(&mut ledger, "sha256:1", "r.test/a:1") && ledger.intents.is_empty());
        assert!(!may_use(&ledger, "sha256:1", "r.test/a:1", Some("team")) && !may_use(&ledger, "sha256:1", "r.test/a:1", None));
        assert!(ledger.get(SOCKET, "sha256:1").is_some_and(|pulled| pulled.is_ours), "it may be collected");
        assert!(pull(&mut ledger, &["sha256:1"], "sha256:1", &key("r.test/a:1", Source::Node), at(2)));
        assert!(may_use(&ledger, "sha256:1", "r.test/a:1", None) && !may_use(&ledger, "sha256:1", "r.test/a:1", Some("team")));
    }

    #[test]
    fn a_list_from_before_the_end_of_a_pull_says_nothing_of_it() {
        let mut ledger = ledger(&temporary());
        let private = key("r.test/a:1", team());
        let opened = look(&mut ledger, &[]);
        ledger.open(&private, opened).expect("room");
        let asked = (ledger.ask(), Stopwatch::start());
        ledger.close(&private, Remains::Perhaps);
        assert!(!ledger.sweep(SOCKET, &[], asked, at(9)) && !may_use(&ledger, "sha256:1", "r.test/a:1", None));
        let asked = (ledger.ask(), Stopwatch::start());
        assert!(ledger.sweep(SOCKET, &[], asked, at(9)) && ledger.intents.is_empty());
    }

    #[test]
    fn what_an_agent_died_over_is_guarded_and_not_collected() {
        let path = temporary();
        let mut first = ledger(&path);
        let private = key("r.test/a:1", team());
        let opened = look(&mut first, &["sha256:0"]);
        first.open(&private, opened).expect("room");
        let (to, contents) = first.contents();
        write(&to, &contents.text()).expect("written");
        let mut second = ledger(&path);
        look(&mut second, &["sha256:0", "sha256:1"]);
        assert!(!may_use(&second, "sha256:1", "r.test/a:1", None) && !may_use(&second, "sha256:1", "r.test/a:1", Some("team")));
        assert!(sweep(&mut second, "sha256:1", "r.test/a:1") && !second.intents.is_empty(), "the runtime may be at it still");
        pull(&mut second, &["sha256:0", "sha256:1"], "sha256:1", &private, at(2));
        assert!(may_use(&second, "sha256:1", "r.test/a:1", Some("team")) && !may_use(&second, "sha256:1", "r.test/a:1", None));
        assert!(second.get(SOCKET, "sha256:1").is_some_and(|pulled| !pulled.is_ours), "it may have been there before");
        fs::remove_dir_all(path.parent().expect("a directory")).expect("removed");
    }

    #[test]
    fn what_some_may_not_use_is_never_forgotten_to_make_room() {
        let mut ledger = ledger(&temporary());
        let fill = |ledger: &mut Ledger, n: usize, source: Source| {
            let (id, name) = (format!("sha256:{n}"), format!("r.test/i{n}:1"));
            ledger.insert((SOCKET.to_owned(), id), BTreeSet::from([name]), BTreeSet::from([source]), true, at(n as u64));
        };
        for n in 0..limits::IMAGES_MAX - 1 {
            fill(&mut ledger, n, team());
        }
        fill(&mut ledger, limits::IMAGES_MAX - 1, Source::Anonymous);
        let more = |n: usize| key(&format!("r.test/more{n}:1"), team());
        // One that everybody may have goes for it, and none else.
        assert!(pull(&mut ledger, &[], "sha256:more0", &more(0), at(0)));
        assert!(may_use(&ledger, "sha256:more0", "r.test/more0:1", Some("team")));
        let opened = look(&mut ledger, &[]);
        assert_eq!(ledger.open(&more(1), opened), Err(Refusal::Full));
        assert!(!pull(&mut ledger, &[], "sha256:open", &key("r.test/open:1", Source::Anonymous), at(0)), "it is not remembered");
        assert_eq!(ledger.images.len(), limits::IMAGES_MAX);
        assert!(!may_use(&ledger, "sha256:7", "r.test/i7:1", None));
        // The fullest file there can be is read again.
        let names: BTreeSet<String> =
            (0..limits::IMAGE_NAMES_MAX).map(|n| format!("{}{n:03}", "n".repeat(limits::IMAGE_BYTES_MAX))).collect();
        let sources =
            (0..limits::IMAGE_NAMES_MAX).map(|n| Source::Named(name(&format!("{}{n:03}", "s".repeat(limits::NAME_BYTES_MAX - 3)))));
        let sources: BTreeSet<Source> = sources.collect();
        for pulled in ledger.images.values_mut() {
            (pulled.names, pulled.sources) = (names.clone(), sources.clone());
        }
        let text = ledger.contents().1.text();
        assert!(text.len() < limits::IMAGES_FILE_BYTES_MAX, "{}", text.len());
        assert_eq!(wire::Ledger::parse(text.as_bytes()).expect("valid").images.len(), limits::IMAGES_MAX);
    }

    #[test]
    fn a_list_from_before_an_image_was_forgotten_is_asked_for_again() {
        let mut ledger = ledger(&temporary());
        pull(&mut ledger, &[], "sha256:1", &key("r.test/a:1", team()), at(1));
        let asked = ledger.ask();
        ledger.remove(SOCKET, "sha256:1");
        let ids = BTreeSet::from(["sha256:1"]);
        assert_eq!(ledger.listed(SOCKET, &ids, asked), None, "it is in the list, and was ours");
        let asked = ledger.ask();
        assert!(ledger.listed(SOCKET, &ids, asked).is_some());
    }

    #[test]
    fn a_list_that_comes_late_takes_nobody_for_new() {
        let mut ledger = ledger(&temporary());
        // Theirs came after the one list was asked for, and before the other was.
        let early = ledger.ask();
        let opened = look(&mut ledger, &["sha256:theirs"]);
        assert!(ledger.listed(SOCKET, &BTreeSet::new(), early).is_some());
        assert_eq!(ledger.pulled(&key("r.test/a:1", Source::Anonymous), &found("sha256:theirs", &[]), opened, at(1)), Ok(false));
        // What is gone, and comes again by us, is ours.
        look(&mut ledger, &[]);
        assert!(pull(&mut ledger, &[], "sha256:theirs", &key("r.test/a:1", Source::Anonymous), at(2)));
    }

    #[test]
    fn uses_are_written_by_the_hour_and_what_is_gone_is_forgotten() {
        let mut ledger = ledger(&temporary());
        pull(&mut ledger, &[], "sha256:1", &key("r.test/a:1", Source::Anonymous), at(0));
        assert!(!ledger.used(SOCKET, "sha256:1", at(3599)) && ledger.used(SOCKET, "sha256:1", at(3600)));
        ledger.contents();
        assert!(!ledger.used(SOCKET, "sha256:1", at(3601)));
        assert!(!ledger.used(SOCKET, "sha256:2", at(9999)), "not ours");
        let asked = ledger.ask();
        assert!(!ledger.is_touched(SOCKET, "sha256:1", asked));
        assert!(!ledger.prune("/run/other.sock", &BTreeSet::new(), asked, 0));
        ledger.used(SOCKET, "sha256:1", at(0));
        assert!(ledger.is_touched(SOCKET, "sha256:1", asked), "whatever the clock says");
        assert!(!ledger.prune(SOCKET, &BTreeSet::new(), asked, 0), "it came after the list was asked for");
        let asked = ledger.ask();
        assert!(ledger.prune(SOCKET, &BTreeSet::new(), asked, 0) && ledger.get(SOCKET, "sha256:1").is_none());

        // A list may lack what is there; what some may not use is not forgotten for that.
        pull(&mut ledger, &[], "sha256:2", &key("r.test/b:1", team()), at(0));
        for (is_listed, is_news) in [(true, false), (false, false), (true, true), (false, false), (false, false)] {
            let asked = ledger.ask();
            let listed = if is_listed { BTreeSet::from(["sha256:2"]) } else { BTreeSet::new() };
            assert_eq!(ledger.prune(SOCKET, &listed, asked, limits::IMAGE_MISSING_MS_MAX), is_news);
            assert_eq!(ledger.get(SOCKET, "sha256:2").map(|pulled| pulled.missing_since.is_some()), Some(!is_listed));
        }
        assert!(!may_use(&ledger, "sha256:2", "r.test/b:1", None));
        assert_eq!(ledger.get(SOCKET, "sha256:2").map(|pulled| pulled.is_ours), Some(false), "it was gone, and who brought it back?");
        let asked = ledger.ask();
        assert!(ledger.prune(SOCKET, &BTreeSet::new(), asked, 0) && ledger.get(SOCKET, "sha256:2").is_none(), "for long enough");
    }

    #[test]
    fn what_the_file_knows_was_used_when_it_was_read_at_the_latest() {
        let path = temporary();
        let mut first = ledger(&path);
        pull(&mut first, &[], "sha256:1", &key("r.test/a:1", Source::Anonymous), at(0));
        let (to, contents) = first.contents();
        write(&to, &contents.text()).expect("written");
        let before = Timestamp::now();
        let second = ledger(&path);
        let pulled = second.get(SOCKET, "sha256:1").expect("read");
        assert!(pulled.idle_since() >= before && pulled.last_used_at == at(0), "it is young, and no younger than others");
        fs::remove_dir_all(path.parent().expect("a directory")).expect("removed");
    }
}
