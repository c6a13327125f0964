//! The images of this node: one pull at a time of each, so many at once, and none by a worker that others wait for.
//!
//! A start that finds its image goes on. One that does not is parked ([`StartTicket::park`]) and joins the pull of its image, begun
//! or to begin; threads of their own (`pull-N`) do the pulls, and bring every start that waits back to the workers, or end it. So a
//! start whose image is there never waits behind a pull, and a start that is stopped, or late, ends while its pull goes on for the
//! others. A pull that nobody waits for any more is broken off.
//!
//! A pull is shared by starts of the same image, handler and set of credentials. What passes (network, 429, 5xx, a full disk, a
//! runtime that is away) is tried again with growing pauses until the last who waits is out of time; what a registry or the
//! configuration refuses is final.
//!
//! Policies are the kubelet's: `always` asks the registry at every start, a digest or not; `if-not-present` and `never` take what
//! is there. What kakuri pulled with credentials is there only for those who show the same: others pull, and
//! the registry decides. What somebody else put there is there for everybody.
//!
//! Invariant: no runtime is shown credentials before the ledger has that pull on disk.
//! Invariant: for each key at most one pull is under way; at most `pulls_max` are in all.
//! Invariant: an image is removed ([`collect`]) only under a mark that keeps pulls and starts off it, and after a look for whoever
//! came before the mark.

pub mod collect;
mod credentials;
mod ledger;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Agent;
use super::registry::StartTicket;
use crate::config::{AgentConfig, ImageGc};
use crate::cri::images::{self, Errand, Found, Image, Kind, Remains, Trouble};
use crate::cri::proto::AuthConfig;
use crate::cri::runtime::{StartError, failure};
use crate::deadline::{Deadline, Stopwatch, Timestamp, doubled_ms};
use crate::limits;
use crate::report::{Chain, clip};
use crate::workload::{ImageRef, Name, PullPolicy, Reason, Spec, WorkloadId};

use credentials::Shown;
use ledger::{IntentKey, Ledger, Moment, Refusal, Source};

/// What this node knows and does about its images.
pub struct Images {
    credentials: credentials::Files,
    gc: ImageGc,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    /// In the order they were asked for.
    pulls: Vec<Pull>,
    /// Images that starts in flight are about to make containers of, and how many of those.
    held: BTreeMap<(usize, String), usize>,
    /// Ids and names of images that are being removed.
    removing: BTreeSet<(usize, String)>,
    /// How many removals began.
    removals: u64,
    ledger: Ledger,
    /// The last change of the ledger, and the last of them that is on disk.
    change: u64,
    saved: u64,
    /// The last change that was to be written and was not, and why.
    failure: Option<(u64, String)>,
    /// Nobody will change the ledger any more.
    is_over: bool,
    /// Somebody collects.
    is_collecting: bool,
    /// Images should be looked at: one came, or there was no room for one.
    is_due: bool,
    /// What the last collection had to complain of; said when it is new.
    troubles: Vec<String>,
}

/// What makes two pulls the same.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    endpoint: usize,
    image: ImageRef,
    handler: String,
    /// The set that was asked for by name, not what is in it: it is read anew for each try.
    credentials: Option<Name>,
}

struct Pull {
    key: Key,
    errand: Errand,
    waiters: Vec<(WorkloadId, Arc<str>)>,
    is_doing: bool,
    /// When it may be tried again, and how often it failed.
    retry: Option<Deadline>,
    failures: u32,
}

impl Pull {
    fn is_wanted(&self, agent: &Agent) -> bool {
        self.waiters.iter().any(|(id, uid)| agent.registry.is_pulling(id, uid))
    }
}

/// How a try ended.
enum Outcome<'a> {
    /// The image stays until those who wait have it.
    Done(Held<'a>),
    Failed(StartError),
    /// It is worth another.
    Passing(Trouble),
    Unwanted,
}

/// An image that is there and stays, as long as this is held.
pub struct Held<'a> {
    images: &'a Images,
    endpoint: usize,
    /// The image.
    pub image: Image,
    /// How long the start waited for it, milliseconds.
    pub pull_ms: u64,
}

/// Why an image that was found is not kept.
enum Lost {
    /// It is being removed, which is as good as gone.
    Removing,
    /// Something was removed since it was found; it has to be looked for again.
    Stale,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let key = (self.endpoint, self.image.id.clone());
        let mut inner = self.images.lock();
        if let Some(count) = inner.held.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                inner.held.remove(&key);
            }
        }
    }
}

/// Finds the image of a start; `None` when it has to be pulled first.
///
/// # Errors
/// When it never will be there, or the runtime does not say.
pub fn find<'a>(agent: &'a Agent, ticket: &StartTicket<'_>) -> Result<Option<Held<'a>>, StartError> {
    let (spec, endpoint) = (&ticket.workload.spec, ticket.endpoint);
    let watch = Stopwatch::start();
    let images = &agent.images;
    let held = match (&ticket.image, spec.pull_policy) {
        // Whoever came to remove it since it was pulled finds it wanted, by its name.
        (Some(image), _) => images.hold(endpoint, &spec.image, image.clone(), None).ok().map(|held| (held, true)),
        (None, PullPolicy::Always) => None,
        (None, PullPolicy::IfNotPresent | PullPolicy::Never) => loop {
            let seen = images.lock().removals;
            let client = &agent.endpoint(endpoint).client;
            let looked = images::look(client, &spec.image, &ticket.class.handler, ticket.deadline);
            let Some(found) = looked.map_err(|error| failure(&error, Reason::ImagePullFailed, ticket.deadline))? else { break None };
            match images.hold(endpoint, &spec.image, found.image.clone(), Some(seen)) {
                Ok(held) => break Some((held, images.may_use(agent, endpoint, &found, spec))),
                Err(Lost::Removing) => break None,
                Err(Lost::Stale) => {}
            }
        },
    };
    let name = spec.image.as_str();
    let never =
        |reason, why: &str| StartError { reason, message: format!("{name} {why}, and image_pull.policy is never"), retriable: false };
    let is_never = spec.pull_policy == PullPolicy::Never;
    match held {
        Some((mut held, true)) => {
            images.change(|ledger| ledger.used(&socket(agent, endpoint), &held.image.id, Timestamp::now()));
            held.pull_ms = ticket.pull_ms.saturating_add(watch.elapsed_ms());
            Ok(Some(held))
        }
        Some(_) if is_never => Err(never(Reason::ImageUnauthorized, "was pulled with credentials this workload does not show")),
        None if is_never => Err(never(Reason::ImageNotFound, "is not on the node")),
        Some(_) | None => Ok(None),
    }
}

/// Parks a start until its image was pulled.
pub fn wait_for(agent: &Agent, ticket: StartTicket<'_>) {
    let workload = &ticket.workload;
    let key = Key {
        endpoint: ticket.endpoint,
        image: workload.spec.image.clone(),
        handler: ticket.class.handler.clone(),
        credentials: workload.spec.pull_credentials.clone(),
    };
    let errand = Errand {
        image: key.image.clone(),
        handler: key.handler.clone(),
        annotations: ticket.class.annotations.clone(),
        workload: workload.id.clone(),
        uid: ticket.uid.to_string(),
        node: agent.registry.node().clone(),
    };
    let waiter = (ticket.id().clone(), Arc::clone(&ticket.uid));
    // Parked first: whoever brings it back must find it waiting.
    if ticket.park() {
        agent.images.join(key, errand, waiter);
    }
}

impl Images {
    /// Of an agent of this configuration, with what the one before wrote down.
    ///
    /// # Errors
    /// That cannot be read, and what can be done.
    pub fn open(config: &AgentConfig) -> Result<Self, String> {
        let path = config.state_dir.join(ledger::FILE);
        let refusal = |error| {
            format!(
                "{}: {error}; it says for whose credentials images came. Remove those images at the runtime and move it away, or move it \
                 away alone: then every workload may use every image that is there",
                path.display()
            )
        };
        let ledger = Ledger::read(path.clone()).map_err(refusal)?;
        let inner = Inner {
            pulls: Vec::new(),
            held: BTreeMap::new(),
            removing: BTreeSet::new(),
            removals: 0,
            ledger,
            change: 0,
            saved: 0,
            failure: None,
            is_over: false,
            is_collecting: false,
            is_due: false,
            troubles: Vec::new(),
        };
        let credentials = credentials::Files { node: config.registry_credentials.clone(), named: config.credentials.clone() };
        Ok(Self { credentials, gc: config.image_gc, inner: Mutex::new(inner), changed: Condvar::new() })
    }

    /// Whether this node has a set of credentials of that name.
    pub fn has_credentials(&self, name: &Name) -> bool {
        self.credentials.named.contains_key(name)
    }

    /// Wakes everyone who waits, so that they see that the agent stops.
    pub fn wake_all(&self) {
        let _held = self.lock();
        self.changed.notify_all();
    }

    /// Says that nobody will change the ledger any more.
    pub fn end(&self) {
        self.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Waits until an image is not being removed any more, one way or the other.
    fn wait_for_removal(&self, endpoint: usize, id: &str) {
        let mark = (endpoint, id.to_owned());
        let mut inner = self.lock();
        while inner.removing.contains(&mark) {
            inner = self.wait(inner, Duration::from_millis(limits::CRI_QUICK_MS_MAX));
        }
    }

    /// Keeps an image that was found after so many removals had begun.
    fn hold(&self, endpoint: usize, name: &ImageRef, image: Image, seen: Option<u64>) -> Result<Held<'_>, Lost> {
        let mut inner = self.lock();
        let id = (endpoint, image.id.clone());
        if inner.removing.contains(&id) || inner.removing.contains(&(endpoint, name.listed())) {
            return Err(Lost::Removing);
        }
        if seen.is_some_and(|seen| seen != inner.removals) {
            return Err(Lost::Stale);
        }
        *inner.held.entry(id).or_default() += 1;
        drop(inner);
        Ok(Held { images: self, endpoint, image, pull_ms: 0 })
    }

    fn may_use(&self, agent: &Agent, endpoint: usize, found: &Found, spec: &Spec) -> bool {
        self.lock().ledger.may_use(&socket(agent, endpoint), found, &spec.image.listed(), spec.pull_credentials.as_ref())
    }

    /// Changes the ledger; what is worth writing is written.
    fn change(&self, change: impl FnOnce(&mut Ledger) -> bool) {
        let mut inner = self.lock();
        if change(&mut inner.ledger) {
            inner.change += 1;
            drop(inner);
            self.changed.notify_all();
        }
    }

    /// Waits until the ledger as it is now is on disk.
    ///
    /// # Errors
    /// Why it is not.
    fn save(&self) -> Result<(), String> {
        let deadline = Deadline::within_ms(limits::JOURNAL_MS_MAX, "images");
        let mut inner = self.lock();
        let change = inner.change;
        loop {
            match (&inner.failure, deadline.left()) {
                _ if inner.saved >= change => return Ok(()),
                (Some((failed, why)), _) if *failed >= change => return Err(why.clone()),
                (_, Err(_)) => return Err("the disk is too slow".into()),
                (_, Ok(left)) => inner = self.wait(inner, left),
            }
        }
    }

    /// Adds a start to the pull it waits for. There are no more of them than workloads.
    fn join(&self, key: Key, errand: Errand, waiter: (WorkloadId, Arc<str>)) {
        let mut inner = self.lock();
        match inner.pulls.iter_mut().find(|pull| pull.key == key) {
            Some(pull) => {
                // Others of a long queue may have given up.
                pull.waiters.retain(|(id, _)| *id != waiter.0);
                pull.waiters.push(waiter);
            }
            None => inner.pulls.push(Pull { key, errand, waiters: vec![waiter], is_doing: false, retry: None, failures: 0 }),
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Waits for a pull to do; `None` when the agent stops.
    fn next(&self, agent: &Agent) -> Option<(Key, Errand)> {
        let mut inner = self.lock();
        loop {
            if agent.is_stopping() {
                return None;
            }
            inner.pulls.retain(|pull| pull.is_doing || pull.is_wanted(agent));
            let mut wait = Duration::from_millis(limits::IMAGE_GC_PERIOD_MS);
            let Inner { pulls, removing, .. } = &mut *inner;
            for pull in pulls.iter_mut().filter(|pull| !pull.is_doing) {
                if let Some(left) = pull.retry.and_then(|retry| retry.left().ok()) {
                    wait = wait.min(left);
                } else if !removing.contains(&(pull.key.endpoint, pull.key.image.listed())) {
                    pull.is_doing = true;
                    return Some((pull.key.clone(), pull.errand.clone()));
                }
            }
            inner = self.wait(inner, wait);
        }
    }

    fn is_wanted(&self, agent: &Agent, key: &Key) -> bool {
        !agent.is_stopping() && self.lock().pulls.iter().any(|pull| pull.key == *key && pull.is_wanted(agent))
    }

    /// Tells those who wait how a try ended.
    fn settle(&self, agent: &Agent, key: &Key, outcome: &Outcome<'_>) {
        let mut inner = self.lock();
        let Some(at) = inner.pulls.iter().position(|pull| pull.key == *key) else { return };
        let is_wanted = inner.pulls[at].is_wanted(agent);
        let waiters = match (outcome, is_wanted) {
            // Somebody came after the last look.
            (Outcome::Unwanted, true) => {
                inner.pulls[at].is_doing = false;
                Vec::new()
            }
            (Outcome::Passing(trouble), true) => {
                let pull = &mut inner.pulls[at];
                pull.failures = pull.failures.saturating_add(1);
                let ms = doubled_ms(limits::PULL_RETRY_MS_MIN, limits::PULL_RETRY_MS_MAX, pull.failures);
                pull.retry = Some(Deadline::within_ms(ms, "pull"));
                pull.is_doing = false;
                let waiters = pull.waiters.clone();
                inner.is_due |= trouble.kind == Kind::Disk;
                waiters
            }
            (Outcome::Unwanted | Outcome::Passing(_), false) | (Outcome::Done(_) | Outcome::Failed(_), _) => inner.pulls.remove(at).waiters,
        };
        drop(inner);
        self.changed.notify_all();
        for (id, uid) in waiters {
            match outcome {
                Outcome::Done(held) => agent.registry.finish_pull(&id, &uid, Ok(held.image.clone())),
                Outcome::Failed(error) => agent.registry.finish_pull(&id, &uid, Err(error.clone())),
                Outcome::Passing(trouble) => agent.registry.note_pull(&id, &uid, trouble.kind.reason(), &trouble.message),
                Outcome::Unwanted => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Held for looking and noting only; the data is whole at every moment.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&'a self, inner: MutexGuard<'a, Inner>, wait: Duration) -> MutexGuard<'a, Inner> {
        self.changed.wait_timeout(inner, wait).unwrap_or_else(PoisonError::into_inner).0
    }
}

/// A runtime's socket, by which the ledger knows it: its place among the endpoints may change with the configuration.
fn socket(agent: &Agent, endpoint: usize) -> String {
    agent.endpoint(endpoint).socket.clone()
}

/// Does pulls until the agent stops.
pub fn pull_loop(agent: &Agent) {
    while let Some((key, errand)) = agent.images.next(agent) {
        let watch = Stopwatch::start();
        let outcome = pull(agent, &key, &errand);
        let (image, ms) = (key.image.as_str(), watch.elapsed_ms());
        match &outcome {
            Outcome::Done(done) => log::info!("image {image}: pulled in {ms} ms, {}", done.image.id),
            Outcome::Failed(error) => log::warn!("image {image}: not pulled: {error}"),
            Outcome::Passing(trouble) => log::warn!("image {image}: not pulled yet: {}", trouble.message),
            Outcome::Unwanted => log::info!("image {image}: pull broken off after {ms} ms, nobody waits for it"),
        }
        agent.images.settle(agent, &key, &outcome);
    }
}

fn pull<'a>(agent: &'a Agent, key: &Key, errand: &Errand) -> Outcome<'a> {
    let images = &agent.images;
    let Shown { credentials, source } = match images.credentials.find(&key.image, key.credentials.as_ref()) {
        Ok(shown) => shown,
        Err(error) => return refused(error.reason(), error.to_string()),
    };
    let opened = match look_around(agent, key.endpoint) {
        Ok(opened) => opened,
        // No registry was asked yet.
        Err(error) => {
            return ended(Trouble {
                kind: Kind::Runtime,
                remains: Remains::Nothing,
                message: clip(Chain(&error).to_string(), limits::MESSAGE_BYTES_MAX),
            });
        }
    };
    // What everybody may have needs no guard.
    let has_intent = source != Source::Anonymous;
    let intent = IntentKey { socket: socket(agent, key.endpoint), name: key.image.listed(), source };
    if has_intent {
        if let Err(outcome) = intend(images, &intent, opened) {
            return outcome;
        }
    }
    let auth = credentials.as_ref().map(|c| AuthConfig {
        auth: c.auth.clone(),
        username: c.username.clone(),
        password: c.password.clone(),
        identity_token: c.identity_token.clone(),
        // containerd shows them to this host alone, and to no mirror. It knows Docker Hub by the host it asks.
        server_address: match key.image.registry() {
            "docker.io" => "https://registry-1.docker.io".to_owned(),
            registry => format!("https://{registry}"),
        },
        registry_token: String::new(),
    });
    let scrub = |text: String| credentials.iter().fold(text, |text, credentials| credentials.scrub(text));
    let (outcome, remains) = bring(agent, key, errand, auth, &scrub, |found| images.note(&intent, found, opened));
    if has_intent {
        images.change(|ledger| ledger.close(&intent, remains));
    }
    outcome
}

/// Learns what a runtime has before a pull, for what is there is not ours after it, whatever its name: a runtime removes an image
/// with all its names.
fn look_around(agent: &Agent, endpoint: usize) -> Result<Moment, crate::grpc::Error> {
    let (images, client) = (&agent.images, &agent.endpoint(endpoint).client);
    loop {
        let asked = images.lock().ledger.ask();
        let list = client.list_images(Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "ListImages"))?;
        let ids = list.iter().map(|image| image.id.as_str()).collect();
        if let Some(opened) = images.lock().ledger.listed(&socket(agent, endpoint), &ids, asked) {
            return Ok(opened);
        }
    }
}

/// Writes down that a pull is to show credentials.
fn intend<'a>(images: &Images, intent: &IntentKey, opened: Moment) -> Result<(), Outcome<'a>> {
    let mut result = Ok(false);
    images.change(|ledger| {
        result = ledger.open(intent, opened);
        result == Ok(true)
    });
    let unwritten = |why: String| {
        let message = format!("a pull with credentials has to be written down before, and cannot be: {why}");
        ended(Trouble { kind: Kind::Disk, remains: Remains::Nothing, message })
    };
    if result.is_err() {
        return Err(unwritten(format!(
            "the agent remembers {} images and pulls already, the most it can, and may forget none",
            limits::IMAGES_MAX
        )));
    }
    images.save().map_err(|why| {
        images.change(|ledger| ledger.close(intent, Remains::Nothing));
        unwritten(why)
    })
}

/// Has the runtime pull, and tells what else that may have left there. What was brought is noted while it is kept.
fn bring<'a>(
    agent: &'a Agent,
    key: &Key,
    errand: &Errand,
    auth: Option<AuthConfig>,
    scrub: images::Scrub<'_>,
    note: impl Fn(&Found) -> Result<Remains, Outcome<'a>>,
) -> (Outcome<'a>, Remains) {
    let (images, client) = (&agent.images, &agent.endpoint(key.endpoint).client);
    let failed = |trouble: Trouble| {
        let remains = trouble.remains;
        (ended(trouble), remains)
    };
    let mut seen = images.lock().removals;
    let mut found = match images::pull(client, errand, auth, scrub, &|| images.is_wanted(agent, key)) {
        Ok(Some(found)) => found,
        Ok(None) => return (Outcome::Unwanted, Remains::Yet),
        Err(trouble) => return failed(trouble),
    };
    loop {
        match images.hold(key.endpoint, &key.image, found.image.clone(), Some(seen)) {
            Ok(held) => {
                return match note(&found) {
                    Ok(remains) => (Outcome::Done(held), remains),
                    // It was there before.
                    Err(outcome) => (outcome, Remains::Nothing),
                };
            }
            // The removal may have come before it, or after it.
            Err(Lost::Removing) => images.wait_for_removal(key.endpoint, &found.image.id),
            Err(Lost::Stale) => {}
        }
        seen = images.lock().removals;
        found = match images::look_after(client, errand, scrub) {
            Ok(found) => found,
            Err(trouble) => return failed(trouble),
        };
    }
}

impl Images {
    /// Notes what a pull brought; what it left that could not be noted.
    ///
    /// # Errors
    /// It may not be used.
    fn note<'a>(&self, intent: &IntentKey, found: &Found, opened: Moment) -> Result<Remains, Outcome<'a>> {
        let mut inner = self.lock();
        let noted = inner.ledger.pulled(intent, found, opened, Timestamp::now());
        inner.change += u64::from(noted == Ok(true));
        inner.is_due = true;
        drop(inner);
        self.changed.notify_all();
        match noted {
            Ok(_) => Ok(Remains::Nothing),
            Err(Refusal::Full) => Ok(Remains::Perhaps),
            Err(Refusal::Private) => Err(refused(
                Reason::ImageUnauthorized,
                format!("{} is what another registry gives to some alone, and the node has it from there", intent.name),
            )),
        }
    }
}

fn refused<'a>(reason: Reason, message: String) -> Outcome<'a> {
    Outcome::Failed(StartError { reason, message, retriable: false })
}

fn ended<'a>(trouble: Trouble) -> Outcome<'a> {
    match trouble {
        trouble if trouble.kind.is_passing() => Outcome::Passing(trouble),
        Trouble { kind, message, .. } => refused(kind.reason(), message),
    }
}

/// Keeps the ledger on disk, until nobody will change it any more: longer than the agent's other threads, for what they did in their
/// last moments is written down too. The only writer of the file; whatever changes while it writes is written next, all at once.
pub fn write_loop(agent: &Agent) {
    let images = &agent.images;
    let mut tried = 0;
    loop {
        let mut inner = images.lock();
        let since = Stopwatch::start();
        let period = Duration::from_millis(limits::IMAGE_GC_PERIOD_MS);
        // What could not be written is tried again with the next change, or after a while.
        let is_due = |inner: &Inner| inner.change > inner.saved && (inner.change > tried || since.elapsed() >= period);
        while !is_due(&inner) && !inner.is_over {
            inner = images.wait(inner, period);
        }
        if inner.change == inner.saved {
            return;
        }
        let (change, is_over) = (inner.change, inner.is_over);
        let (path, contents) = inner.ledger.contents();
        drop(inner);
        tried = change;
        let result = ledger::write(&path, &contents.text());
        let mut inner = images.lock();
        match result {
            Ok(()) => (inner.saved, inner.failure) = (change, None),
            Err(error) => {
                inner.failure = Some((change, error.to_string()));
                log::warn!("{}: {error}", path.display());
            }
        }
        drop(inner);
        images.changed.notify_all();
        if is_over {
            return;
        }
    }
}

/// Collects images until the agent stops.
pub fn keep_loop(agent: &Agent) {
    let images = &agent.images;
    let period = Duration::from_millis(limits::IMAGE_GC_PERIOD_MS);
    let mut since = Stopwatch::start();
    loop {
        let mut inner = images.lock();
        while !inner.is_due && !agent.is_stopping() && since.elapsed() < period {
            inner = images.wait(inner, period.saturating_sub(since.elapsed()));
        }
        if agent.is_stopping() {
            return;
        }
        inner.is_due = false;
        drop(inner);
        since = Stopwatch::start();
        // Before the first list nobody knows what runs here.
        if agent.node.endpoints.iter().all(|endpoint| endpoint.is_listed()) {
            collect::pass(agent);
        }
    }
}
