//! Removing images that kakuri pulled and nobody uses, when their file system is full to the high mark, until it is down to the low
//! one; those first that were used longest ago.
//!
//! Never: an image that was there before kakuri pulled it, or that somebody gave another name since (a runtime removes all names of
//! an image at once); one a container of the runtime is of, ours or not, running or not; one a workload of this node asks for; one
//! the runtime pins; one that was pulled or used within `min_age`.
//!
//! CRI tells what images take, and not how large their file system is. So the room is what the configuration gives to images
//! (`image_gc_capacity_mb`), or else what the kernel says of the file system the runtime names.

use std::collections::BTreeSet;

use super::ledger::{Moment, Pulled};
use super::{Agent, Images, socket};
use crate::config::ImageGc;
use crate::cri::proto::{self, ContainerFilter};
use crate::deadline::{Deadline, Stopwatch, Timestamp};
use crate::grpc::Code;
use crate::limits;
use crate::report::{Chain, clip};
use crate::wire::images::{FileSystem, Image as Row, Images as Reply};
use crate::workload::ImageRef;

/// An image of a runtime, and all that decides about it.
#[derive(Clone, Debug)]
struct Candidate {
    id: String,
    /// Its tags, then its digests.
    names: Vec<String>,
    bytes: u64,
    is_pinned: bool,
    is_used: bool,
    pulled: Option<Pulled>,
}

/// How much room there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Space {
    capacity: u64,
    available: u64,
}

impl Space {
    fn used_percent(self) -> u64 {
        let free = u128::from(self.available.min(self.capacity)) * 100 / u128::from(self.capacity.max(1));
        100 - u64::try_from(free).unwrap_or(0)
    }

    /// Bytes to free to come from the high mark down to the low one; none below the high one.
    fn to_free(self, gc: &ImageGc) -> u64 {
        // 100 % is never exceeded: the high mark that switches collection off.
        if gc.high_percent >= 100 || self.used_percent() < gc.high_percent {
            return 0;
        }
        let wanted = u128::from(self.capacity) * u128::from(100 - gc.low_percent.min(100)) / 100;
        u64::try_from(wanted).unwrap_or(u64::MAX).saturating_sub(self.available)
    }
}

/// What is to become of an image, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Verdict {
    removes: bool,
    why: String,
}

/// Judges images one after the other, those first that go first.
struct Judge<'a> {
    gc: &'a ImageGc,
    space: Option<Space>,
    /// Bytes that are to go yet.
    to_free: u64,
    now: Timestamp,
}

impl<'a> Judge<'a> {
    fn new(gc: &'a ImageGc, space: Option<Space>, now: Timestamp) -> Self {
        Self { gc, space, to_free: space.map_or(0, |space| space.to_free(gc)), now }
    }

    /// Whether an image goes, and why or why not.
    fn judge(&self, candidate: &Candidate) -> Verdict {
        let keep = |why: String| Verdict { removes: false, why };
        if let Some(why) = stays(candidate, self.gc, self.now) {
            return keep(why);
        }
        let Some(space) = self.space else { return keep("nobody knows how much room there is".into()) };
        let percent = space.used_percent();
        if space.to_free(self.gc) == 0 {
            return keep(format!("{percent} % are taken, images go from {} % on", self.gc.high_percent));
        }
        if self.to_free == 0 {
            return keep(format!("enough goes without it to come down to {} %", self.gc.low_percent));
        }
        Verdict { removes: true, why: format!("nobody uses it, and {percent} % are taken") }
    }

    /// One went. What was to go and did not makes no room.
    fn gone(&mut self, bytes: u64) {
        self.to_free = self.to_free.saturating_sub(bytes);
    }
}

/// Why an image stays, whatever room there is.
fn stays(candidate: &Candidate, gc: &ImageGc, now: Timestamp) -> Option<String> {
    let Candidate { names, is_pinned, is_used, pulled, .. } = candidate;
    let Some(pulled) = pulled.as_ref().filter(|pulled| pulled.is_ours) else { return Some("kakuri did not pull it".into()) };
    if *is_used {
        return Some("a container or a workload uses it".into());
    }
    if *is_pinned {
        return Some("the runtime pins it".into());
    }
    if let Some(name) = names.iter().find(|name| !is_ours(name, pulled)) {
        return Some(format!("it has another name, {}", clip(name.clone(), limits::IMAGE_BYTES_MAX)));
    }
    // A clock that was set back makes an image young for a while; then it stays a little longer.
    let age_ms = now.as_millis().saturating_sub(pulled.idle_since().as_millis());
    (age_ms < gc.min_age_ms).then(|| format!("pulled or used less than {} s ago", gc.min_age_ms / 1000))
}

/// Whether a name of an image came by our pulls: one we pulled, or a digest in a repository we pulled from.
fn is_ours(name: &str, pulled: &Pulled) -> bool {
    let in_repository =
        |repository: &str| pulled.names.iter().any(|ours| ImageRef::new(ours).is_ok_and(|ours| ours.repository() == repository));
    pulled.names.contains(name) || name.split_once('@').is_some_and(|(repository, _)| in_repository(repository))
}

/// What a runtime has, who uses it, and how much room there is.
struct Survey {
    images: Vec<proto::Image>,
    /// Names and ids that containers are of.
    used: BTreeSet<String>,
    asked: Moment,
    /// Since it was asked.
    watch: Stopwatch,
}

fn survey(agent: &Agent, endpoint: usize) -> Result<Survey, crate::grpc::Error> {
    let client = &agent.endpoint(endpoint).client;
    let quick = || Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "collect");
    let (asked, watch) = (agent.images.lock().ledger.ask(), Stopwatch::start());
    let images = client.list_images(quick())?;
    // After the images: whoever made a container since is in this list.
    let containers = client.list_containers(ContainerFilter::default(), quick())?;
    let of = |container: proto::Container| {
        let spec = container.image.unwrap_or_default();
        [container.image_ref, container.image_id, spec.image, spec.user_specified_image]
    };
    let used = containers.into_iter().flat_map(of).filter(|name| !name.is_empty()).collect();
    Ok(Survey { images, used, asked, watch })
}

fn space(agent: &Agent, endpoint: usize) -> Result<(Option<String>, Space), String> {
    let quick = Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "ImageFsInfo");
    let file_systems = agent.endpoint(endpoint).client.image_fs_info(quick).map_err(|error| Chain(&error).to_string())?;
    let mountpoint = file_systems.iter().filter_map(|f| f.fs_id.as_ref()).map(|id| id.mountpoint.clone()).find(|path| !path.is_empty());
    if let Some(capacity) = agent.images.gc.capacity_bytes {
        let of = |f: &proto::FilesystemUsage| f.used_bytes.as_ref().map_or(0, |used| used.value);
        let used = file_systems.iter().map(of).fold(0u64, u64::saturating_add);
        return Ok((mountpoint, Space { capacity, available: capacity.saturating_sub(used) }));
    }
    let path = mountpoint.ok_or("the runtime does not say where its images are; set image_gc_capacity_mb")?;
    let seen = rustix::fs::statvfs(path.as_str()).map_err(|error| format!("{path}: {error}"))?;
    let bytes = |blocks: u64| blocks.saturating_mul(seen.f_frsize);
    let space = Space { capacity: bytes(seen.f_blocks), available: bytes(seen.f_bavail) };
    if space.capacity == 0 {
        Err(format!("{path}: the file system has no size; set image_gc_capacity_mb"))
    } else {
        Ok((Some(path), space))
    }
}

/// Collects on all runtimes, unless somebody does already.
pub(super) fn pass(agent: &Agent) {
    let Some(reply) = collect(agent, false) else { return };
    let is_stuck = |f: &FileSystem| {
        let any_removed = reply.images.iter().any(|image| image.removed && image.endpoint == f.endpoint);
        f.high_percent < 100 && f.used_percent >= Some(f.high_percent) && !any_removed
    };
    let trouble = |f: &FileSystem| match &f.problem {
        Some(problem) => Some(format!("images are not collected: {problem}")),
        None if is_stuck(f) => Some("there is little room for images, and none of them can go; CollectImages with dry_run says why".into()),
        None => None,
    };
    let troubles: Vec<String> = reply.file_systems.iter().filter_map(trouble).collect();
    let is_news = std::mem::replace(&mut agent.images.lock().troubles, troubles.clone()) != troubles;
    for trouble in troubles.iter().filter(|_| is_news) {
        log::warn!("{trouble}");
    }
}

/// The right to remove images, which one has at a time.
struct Turn<'a>(&'a Images);

impl<'a> Turn<'a> {
    fn take(images: &'a Images) -> Option<Self> {
        // Not `then_some`: a turn that is made and not given would end another's.
        let is_taken = std::mem::replace(&mut images.lock().is_collecting, true);
        (!is_taken).then(|| Self(images))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().is_collecting = false;
    }
}

/// Collects on all runtimes, or says what a collection would do; `None` while another is at it.
pub fn collect(agent: &Agent, dry_run: bool) -> Option<Reply> {
    let _turn = if dry_run { None } else { Some(Turn::take(&agent.images)?) };
    let mut reply = Reply { dry_run, file_systems: Vec::new(), images: Vec::new(), omitted: 0 };
    for endpoint in 0..agent.node.endpoints.len() {
        collect_from(agent, endpoint, &mut reply);
    }
    let omitted = reply.images.len().saturating_sub(limits::IMAGES_SHOWN_MAX);
    reply.images.truncate(limits::IMAGES_SHOWN_MAX);
    reply.omitted = omitted as u64;
    Some(reply)
}

fn collect_from(agent: &Agent, endpoint: usize, reply: &mut Reply) {
    let images = &agent.images;
    let gc = &images.gc;
    let mut row = FileSystem {
        endpoint: socket(agent, endpoint),
        mountpoint: None,
        capacity_bytes: None,
        available_bytes: None,
        used_percent: None,
        high_percent: gc.high_percent,
        low_percent: gc.low_percent,
        problem: None,
    };
    let survey = match survey(agent, endpoint) {
        Ok(survey) => survey,
        Err(error) => {
            row.problem = Some(Chain(&error).to_string());
            return reply.file_systems.push(row);
        }
    };
    let space = match space(agent, endpoint) {
        Ok((mountpoint, space)) => {
            row.mountpoint = mountpoint;
            (row.capacity_bytes, row.available_bytes) = (Some(space.capacity), Some(space.available));
            row.used_percent = Some(space.used_percent());
            Some(space)
        }
        Err(problem) => {
            row.problem = Some(problem);
            None
        }
    };
    let asked = survey.asked;
    let candidates = candidates(agent, endpoint, survey);
    let mut judge = Judge::new(gc, space, Timestamp::now());
    for candidate in candidates {
        let mut verdict = judge.judge(&candidate);
        if verdict.removes && !reply.dry_run {
            if let Err(kept) = remove(agent, endpoint, &candidate, asked) {
                let why = match kept {
                    Kept::Wanted => "somebody came for it meanwhile".to_owned(),
                    Kept::Failed(error) => {
                        if error.is_in_doubt() {
                            // It may go yet; nothing else goes in its place.
                            judge.gone(candidate.bytes);
                        }
                        let why = format!("not removed: {}", clip(Chain(&error).to_string(), limits::IMAGE_BYTES_MAX));
                        row.problem.get_or_insert_with(|| format!("image {} was {why}", candidate.id));
                        why
                    }
                };
                verdict = Verdict { removes: false, why };
            }
        }
        if verdict.removes {
            judge.gone(candidate.bytes);
        }
        reply.images.push(shown(agent, endpoint, candidate, verdict));
    }
    reply.file_systems.push(row);
}

/// Why an image is still there.
enum Kept {
    Failed(crate::grpc::Error),
    /// Somebody came for it since it was judged.
    Wanted,
}

/// All images of a runtime, those first that go first. Notes in passing which of ours are used, and which are gone.
fn candidates(agent: &Agent, endpoint: usize, survey: Survey) -> Vec<Candidate> {
    let Survey { images, mut used, asked, watch } = survey;
    used.extend(wanted(agent, endpoint));
    let socket = socket(agent, endpoint);
    let now = Timestamp::now();
    let mut inner = agent.images.lock();
    let listed: BTreeSet<&str> = images.iter().map(|image| image.id.as_str()).collect();
    let mut is_dirty = inner.ledger.prune(&socket, &listed, asked, limits::IMAGE_MISSING_MS_MAX);
    let names = |image: &proto::Image| image.repo_tags.iter().chain(&image.repo_digests).cloned().collect();
    let named: Vec<(&str, Vec<String>)> = images.iter().map(|image| (image.id.as_str(), names(image))).collect();
    is_dirty |= inner.ledger.sweep(&socket, &named, (asked, watch), now);
    let held: BTreeSet<String> = inner.held.keys().filter(|(of, _)| *of == endpoint).map(|(_, id)| id.clone()).collect();
    let mut candidates = Vec::new();
    for image in images {
        let names: Vec<String> = image.repo_tags.into_iter().chain(image.repo_digests).collect();
        let is_used = names.iter().chain([&image.id]).any(|name| used.contains(name) || held.contains(name));
        is_dirty |= is_used && inner.ledger.used(&socket, &image.id, now);
        let pulled = inner.ledger.get(&socket, &image.id).cloned();
        candidates.push(Candidate { id: image.id, names, bytes: image.size, is_pinned: image.pinned, is_used, pulled });
    }
    inner.change += u64::from(is_dirty);
    drop(inner);
    agent.images.changed.notify_all();
    // Those nobody pulled last: they stay anyway.
    candidates.sort_by_key(|c| (c.pulled.is_none(), c.pulled.as_ref().map(|p| (p.last_used_at, p.pulled_at))));
    candidates
}

/// The images the workloads of a runtime ask for, by name, and those that were just pulled for them, by id.
fn wanted(agent: &Agent, endpoint: usize) -> impl Iterator<Item = String> {
    agent.registry.images().into_iter().filter(move |(of, _)| *of == endpoint).map(|(_, name)| name)
}

/// Removes an image, unless somebody came for it since it was judged.
fn remove(agent: &Agent, endpoint: usize, candidate: &Candidate, asked: Moment) -> Result<(), Kept> {
    let marks: BTreeSet<(usize, String)> = candidate.names.iter().chain([&candidate.id]).map(|name| (endpoint, name.clone())).collect();
    {
        let mut inner = agent.images.lock();
        let is_pulling = |(of, name): &(usize, String)| {
            inner.pulls.iter().any(|pull| pull.key.endpoint == *of && pull.is_doing && pull.key.image.listed() == *name)
        };
        // It may have been pulled since it was listed, by a name it had not then.
        let is_touched = inner.ledger.is_touched(&socket(agent, endpoint), &candidate.id, asked);
        if is_touched || inner.held.contains_key(&(endpoint, candidate.id.clone())) || marks.iter().any(is_pulling) {
            return Err(Kept::Wanted);
        }
        // From here on whoever comes for it waits, looks again, or pulls it anew.
        inner.removing.extend(marks.iter().cloned());
        inner.removals += 1;
    }
    let marks = Marks { images: &agent.images, marks };
    // Whoever is in the registry by now came before the mark, or will see it.
    if wanted(agent, endpoint).any(|name| marks.marks.contains(&(endpoint, name))) {
        return Err(Kept::Wanted);
    }
    remove_marked(agent, endpoint, candidate)?;
    agent.images.change(|ledger| {
        ledger.remove(&socket(agent, endpoint), &candidate.id);
        true
    });
    Ok(())
}

/// What keeps pulls and starts off an image that is being removed.
struct Marks<'a> {
    images: &'a Images,
    marks: BTreeSet<(usize, String)>,
}

impl Drop for Marks<'_> {
    fn drop(&mut self) {
        self.images.lock().removing.retain(|mark| !self.marks.contains(mark));
        self.images.changed.notify_all();
    }
}

fn remove_marked(agent: &Agent, endpoint: usize, candidate: &Candidate) -> Result<(), Kept> {
    let quick = || Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "RemoveImage");
    let client = &agent.endpoint(endpoint).client;
    let image = proto::ImageSpec { image: candidate.id.clone(), ..Default::default() };
    match client.remove_image(&image, quick()) {
        Err(error) if error.code() != Some(Code::NotFound) => Err(Kept::Failed(error)),
        Ok(()) | Err(_) => {
            let name = candidate.names.first().unwrap_or(&candidate.id);
            log::info!("image {name}: removed, {} bytes, {}", candidate.bytes, candidate.id);
            Ok(())
        }
    }
}

fn shown(agent: &Agent, endpoint: usize, candidate: Candidate, verdict: Verdict) -> Row {
    let Candidate { id, names, bytes, is_pinned: _, is_used, pulled } = candidate;
    Row {
        image: clip(names.into_iter().next().unwrap_or_else(|| id.clone()), limits::IMAGE_BYTES_MAX),
        id: clip(id, limits::IMAGE_BYTES_MAX),
        endpoint: socket(agent, endpoint),
        bytes,
        last_used_at: pulled.as_ref().map(|pulled| pulled.last_used_at),
        pulled_by_kakuri: pulled.is_some_and(|pulled| pulled.is_ours),
        in_use: is_used,
        removed: verdict.removes,
        why: verdict.why,
    }
}

#[cfg(test)]
mod tests {
    use super::super::ledger::Pulled;
    use super::*;

    const GC: ImageGc = ImageGc { high_percent: 85, low_percent: 80, min_age_ms: 120_000, capacity_bytes: None };
    const FULL: Space = Space { capacity: 1000, available: 100 };

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000).expect("a time").plus_ms(seconds * 1000)
    }

    /// An image of 40 bytes that kakuri pulled, used last so many seconds after the beginning of time.
    fn ours(name: &str, used: u64) -> Candidate {
        let names = vec![format!("r.test/{name}:1"), format!("r.test/{name}@sha256:{}", "0".repeat(64))];
        let pulled = Pulled::sample(&names[0], at(0), at(used));
        Candidate { id: format!("sha256:{name}"), names, bytes: 40, is_pinned: false, is_used: false, pulled: Some(pulled) }
    }

    /// What becomes of each, should all go that are to.
    fn plan(candidates: &[Candidate], space: Option<Space>, gc: &ImageGc, now: Timestamp) -> Vec<Verdict> {
        let mut judge = Judge::new(gc, space, now);
        let mut next = |candidate: &Candidate| {
            let verdict = judge.judge(candidate);
            if verdict.removes {
                judge.gone(candidate.bytes);
            }
            verdict
        };
        candidates.iter().map(&mut next).collect()
    }

    /// Which go, as ids.
    fn go(candidates: &[Candidate], space: Option<Space>, gc: &ImageGc, now: u64) -> Vec<String> {
        let verdicts = plan(candidates, space, gc, at(now));
        assert_eq!(verdicts.len(), candidates.len());
        candidates.iter().zip(verdicts).filter(|(_, verdict)| verdict.removes).map(|(c, _)| c.id.clone()).collect()
    }

    fn why(candidate: Candidate, space: Option<Space>) -> String {
        let verdicts = plan(&[candidate], space, &GC, at(1000));
        assert!(!verdicts[0].removes, "{verdicts:?}");
        verdicts[0].why.clone()
    }

    #[test]
    fn the_marks_are_the_kubelets() {
        let space = |available| Space { capacity: 1000, available };
        let check = |available, percent, bytes| {
            assert_eq!((space(available).used_percent(), space(available).to_free(&GC)), (percent, bytes), "{available}");
        };
        check(1000, 0, 0);
        check(151, 85, 49);
        check(160, 84, 0);
        check(150, 85, 50);
        check(0, 100, 200);
        check(2000, 0, 0);
        assert_eq!(space(0).to_free(&ImageGc { high_percent: 100, ..GC }), 0, "off");
        assert_eq!(Space { capacity: u64::MAX, available: 0 }.to_free(&GC), u64::MAX / 5);
        assert_eq!(Space { capacity: 0, available: 0 }.used_percent(), 100);
    }

    #[test]
    fn enough_go_and_no_more_from_the_front() {
        // 200 wanted free, 100 are: 100 to go, 40 each.
        let five: Vec<Candidate> = (0..5).map(|n| ours(&n.to_string(), n)).collect();
        assert_eq!(go(&five, Some(FULL), &GC, 1000), ["sha256:0", "sha256:1", "sha256:2"]);
        assert_eq!(go(&five, Some(Space { available: 200, ..FULL }), &GC, 1000), [""; 0]);
        assert_eq!(go(&five, None, &GC, 1000), [""; 0]);
        let verdicts = plan(&five, Some(FULL), &GC, at(1000));
        assert_eq!(verdicts[0].why, "nobody uses it, and 90 % are taken");
        assert_eq!(verdicts[3].why, "enough goes without it to come down to 80 %");
        assert_eq!(why(ours("a", 0), Some(Space { available: 500, ..FULL })), "50 % are taken, images go from 85 % on");
        assert_eq!(why(ours("a", 0), None), "nobody knows how much room there is");
    }

    #[test]
    fn what_cannot_be_removed_makes_no_room() {
        // 100 to go, 40 each, and the first does not.
        let five: Vec<Candidate> = (0..5).map(|n| ours(&n.to_string(), n)).collect();
        let mut judge = Judge::new(&GC, Some(FULL), at(1000));
        let went: Vec<bool> = five
            .iter()
            .map(|candidate| {
                let goes = judge.judge(candidate).removes;
                if goes && candidate.id != "sha256:0" {
                    judge.gone(candidate.bytes);
                }
                goes
            })
            .collect();
        assert_eq!(went, [true, true, true, true, false]);
    }

    #[test]
    fn what_is_used_or_young_or_not_ours_never_goes() {
        let full = Some(Space { capacity: 1000, available: 0 });
        assert_eq!(why(Candidate { pulled: None, ..ours("a", 0) }, full), "kakuri did not pull it");
        assert_eq!(why(Candidate { is_used: true, ..ours("a", 0) }, full), "a container or a workload uses it");
        assert_eq!(why(Candidate { is_pinned: true, ..ours("a", 0) }, full), "the runtime pins it");
        let mut named = ours("a", 0);
        named.names.push("localhost/precious:1".into());
        assert_eq!(why(named, full), "it has another name, localhost/precious:1");
        let mut mirrored = ours("a", 0);
        mirrored.names.push(format!("other.test/a@sha256:{}", "1".repeat(64)));
        assert!(why(mirrored, full).starts_with("it has another name, other.test/a@"));
        assert_eq!(why(ours("a", 881), full), "pulled or used less than 120 s ago");
        assert_eq!(go(&[ours("a", 880)], full, &GC, 1000), ["sha256:a"]);
        // A clock that was set back.
        assert_eq!(why(ours("a", 5000), full), "pulled or used less than 120 s ago");
        // What cannot go does not count as going.
        let mix = [Candidate { is_used: true, ..ours("a", 0) }, ours("b", 1), Candidate { pulled: None, ..ours("c", 2) }, ours("d", 3)];
        assert_eq!(go(&mix, full, &GC, 1000), ["sha256:b", "sha256:d"]);
    }
}
