//! Images: who pulls what when, who waits for whom, what is told of what went wrong, and what is collected.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kakuri::cri::proto::{ContainerConfig, ContainerMetadata, ImageSpec, PodSandboxConfig, PodSandboxMetadata};
use kakuri::wire::agent::{ErrorCode, Reply};
use kakuri::wire::images::{Image, Images};
use kakuri::workload::{Phase, Reason, State};
use serde_json::{Value, json};

use crate::harness::agent::address_of;
use crate::harness::daemon::{AGENT, Daemon, command};
use crate::harness::place::{IMAGE, soon, with};
use crate::harness::{Agent, Line, Place, SOON_MS, eventually, expect_error, until};

fn of(place: &Place, id: &str, image: &str) -> Value {
    with(place.workload(id, &["sleep", "1000"]), json!({"image": image, "stop_grace_ms": 0}))
}

/// An agent with a configuration file of its own.
fn agent_with<'a>(place: &'a Place, config: &str) -> Agent<'a> {
    let file = place.dir.write("agent.toml", config).display().to_string();
    place.agent(&["--config", &file])
}

#[track_caller]
fn collect(agent: &Agent<'_>, dry_run: bool) -> Images {
    match agent.ask(&json!({"type": "CollectImages", "dry_run": dry_run})) {
        Reply::Images(images) => images,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn row<'a>(images: &'a Images, image: &str) -> &'a Image {
    images.images.iter().find(|row| row.image == image).unwrap_or_else(|| panic!("no {image}: {images:?}"))
}

/// What the runtime has, by first name.
fn at_runtime(place: &Place) -> Vec<String> {
    let images = place.cri().list_images(soon()).expect("a list");
    images.into_iter().filter_map(|image| image.repo_tags.into_iter().next()).collect()
}

/// The pulls that were under way when each began.
fn pulls_at_once(place: &Place) -> Vec<u64> {
    let calls = place.calls();
    calls.iter().filter_map(|call| call.split(" pulls=").nth(1)?.split(' ').next()?.parse().ok()).collect()
}

fn waits(agent: &Agent<'_>, id: &str) -> bool {
    agent.status(id).1.phase == Some(Phase::Pulling)
}

/// Room for 100 MiB, of which nothing is left over 50.
const TIGHT: &str = "image_gc_capacity_mb = 100\nimage_gc_high_percent = 50\nimage_gc_low_percent = 40\nimage_gc_min_age_s = 0\n";

#[test]
fn starts_of_one_image_share_its_pull() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    let ids: Vec<String> = (0..20).map(|n| format!("wl-{n}")).collect();
    for id in &ids {
        agent.start_workload(&of(&place, id, "r.test/slow-3000:1"));
    }
    until("it waits", || waits(&agent, "wl-7"));
    // One that is stopped ends at once, and costs the others nothing.
    let (state, status) = agent.stop_workload("wl-7");
    assert_eq!((state, status.reason), (State::Failed, Some(Reason::Stopped)), "{status:?}");
    for id in ids.iter().filter(|id| *id != "wl-7") {
        let status = agent.run(&of(&place, id, "r.test/slow-3000:1"));
        // Those that came late, on a machine that is slow, found it.
        assert!(id != "wl-0" || status.timings_ms.pull.is_some_and(|ms| ms >= 2000), "its wait is in its timings: {status:?}");
        assert!(status.timings_ms.total >= status.timings_ms.pull, "{status:?}");
        assert!(status.image_digest.is_some_and(|digest| digest.starts_with("sha256:") && digest.len() == 71));
    }
    assert_eq!(place.count("PullImage"), 1);
    // With `always`, each that does not come while a pull is under way asks again, a digest or not.
    let always = |id: &str, image: &str| with(of(&place, id, image), json!({"image_pull": {"policy": "always"}}));
    agent.run(&always("again", "r.test/slow-3000:1"));
    let pinned = format!("r.test/pinned@sha256:{}", "a".repeat(64));
    let status = agent.run(&always("pinned-1", &pinned));
    assert_eq!(status.image_digest, pinned.split('@').nth(1).map(str::to_owned));
    agent.run(&always("pinned-2", &pinned));
    assert_eq!(place.count("PullImage"), 4);
}

#[test]
fn so_many_images_are_pulled_at_a_time() {
    let place = Place::sim(&[]);
    let agent = place.agent(&["--pulls-max", "3"]);
    for n in 0..9 {
        agent.start_workload(&of(&place, &format!("wl-{n}"), &format!("r.test/slow-1000/i{n}:1")));
    }
    for n in 0..9 {
        agent.run(&of(&place, &format!("wl-{n}"), &format!("r.test/slow-1000/i{n}:1")));
    }
    let at_once = pulls_at_once(&place);
    assert_eq!((at_once.len(), at_once.iter().max()), (9, Some(&3)), "{at_once:?}");
}

#[test]
fn a_start_whose_image_is_there_does_not_wait_behind_pulls() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    place.faults(&["PullImage:hang"]);
    let ids: Vec<String> = (0..20).map(|n| format!("hangs-{n}")).collect();
    for id in &ids {
        agent.start_workload(&of(&place, id, &format!("r.test/{id}:1")));
    }
    until("all wait", || ids.iter().all(|id| waits(&agent, id)));
    // All of them hang for as long as the runtime likes; this one takes what any start takes.
    agent.run(&of(&place, "quick", IMAGE));
    assert!(ids.iter().all(|id| waits(&agent, id)), "the others still wait");
    // Pulls nobody waits for any more are broken off, and make room.
    for id in &ids {
        agent.delete(id);
    }
    place.faults(&[]);
    agent.run(&of(&place, "new", "r.test/new:1"));
    until("the runtime was told", || place.count("PullImage") >= 5);
}

#[test]
fn a_pull_ends_with_its_start() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    place.faults(&["PullImage:hang"]);
    let late = with(of(&place, "late", "r.test/a:1"), json!({"start_deadline_ms": 1500}));
    let (state, status) = agent.settle(&late);
    assert_eq!((state, status.reason), (State::Failed, Some(Reason::StartDeadlineExceeded)), "{status:?}");
    assert_eq!(status.message.as_deref(), Some("start deadline passed in Pulling"));
    // An agent that is told to stop does not wait for a pull.
    agent.start_workload(&of(&place, "waits", "r.test/b:1"));
    until("it pulls", || waits(&agent, "waits"));
    agent.terminate();
    place.faults(&[]);
    agent.again();
}

#[test]
fn what_passes_is_tried_again_and_what_is_refused_is_not() {
    let place = Place::sim(&[]);
    let agent = place.agent(&[]);
    for (n, (words, starts)) in [
        ("failed to do request: dial tcp 192.0.2.1:443: connect: connection refused".to_owned(), "network: "),
        (status_of("429 Too Many Requests"), "limit: "),
        (status_of("503 Service Unavailable"), "registry: "),
        ("write /ingest/data: no space left on device".to_owned(), "disk: "),
    ]
    .into_iter()
    .enumerate()
    {
        place.forget_calls();
        place.faults(&[&format!("PullImage:error=UNKNOWN,{words}*2")]);
        let id = format!("passes-{n}");
        let workload = of(&place, &id, &format!("r.test/{id}:1"));
        agent.start_workload(&workload);
        until("it says why it is not there yet", || agent.status(&id).1.last_error.is_some());
        let (state, shown) = agent.status(&id);
        if state == State::Pending {
            assert_eq!((shown.reason, shown.attempt), (Some(Reason::ImagePullFailed), 0), "{shown:?}");
            assert!(shown.message.as_ref().is_some_and(|m| m.starts_with(starts) && m.contains(&words)), "{shown:?}");
        }
        let status = agent.run(&workload);
        assert_eq!((status.reason, status.message, status.attempt), (None, None, 0));
        assert_eq!(place.count("PullImage"), 3, "{words}");
    }
    // The first cause stays, and the deadline is not it.
    place.faults(&["PullImage:error=UNKNOWN,dial tcp: first*1", "PullImage:error=UNKNOWN,dial tcp: later@1"]);
    let (_, status) = agent.settle(&with(of(&place, "late", "r.test/late:1"), json!({"start_deadline_ms": 1200})));
    assert_eq!(status.reason, Some(Reason::ImagePullFailed), "{status:?}");
    assert!(status.message.as_ref().is_some_and(|m| m.ends_with("dial tcp: first")), "{status:?}");
    assert_eq!(status.last_error.as_deref(), Some("start deadline passed in Pulling"));
    for (n, (code, words, reason)) in [
        ("NOT_FOUND", "r.test/x: not found".to_owned(), Reason::ImageNotFound),
        ("UNKNOWN", status_of("401 Unauthorized"), Reason::ImageUnauthorized),
        ("PERMISSION_DENIED", "no".to_owned(), Reason::ImageUnauthorized),
        ("UNKNOWN", "something nobody knows".to_owned(), Reason::ImagePullFailed),
    ]
    .into_iter()
    .enumerate()
    {
        place.forget_calls();
        place.faults(&[&format!("PullImage:error={code},{words}")]);
        let id = format!("final-{n}");
        let (state, status) = agent.settle(&of(&place, &id, &format!("r.test/{id}:1")));
        assert_eq!((state, status.reason), (State::Failed, Some(reason)), "{status:?}");
        assert_eq!(place.count("PullImage"), 1, "{words}");
    }
}

fn status_of(answer: &str) -> String {
    format!("pulling from host r.test failed with status code [manifests 1]: {answer}")
}

/// What the simulator's registry gives out to whoever shows anything.
const PRIVATE: &str = "r.test/unauthorized:1";

fn with_set(place: &Place, id: &str, image: &str, name: &str) -> Value {
    with(of(place, id, image), json!({"image_pull": {"credentials": name}}))
}

/// A workload whose image it does not get.
#[track_caller]
fn refused(agent: &Agent<'_>, workload: &Value, reason: Reason, words: &str) {
    let (state, status) = agent.settle(workload);
    assert_eq!((state, status.reason), (State::Failed, Some(reason)), "{status:?}");
    let message = status.message.unwrap_or_default();
    assert!(message.contains(words) && !message.contains("sesame") && !message.contains(".json"), "{words:?}: {message}");
}

#[test]
fn credentials_are_sets_and_nobody_gains_by_anothers_pull() {
    let place = Place::sim(&[]);
    let set = |password: &str| json!({"auths": {"r.test": {"username": "kakuri", "password": password}}}).to_string();
    place.dir.secret("team.json", &set("open-sesame"));
    place.dir.secret("other.json", &set("wrong"));
    place.dir.secret("store.json", r#"{"auths":{"r.test":{}},"credsStore":"desktop"}"#);
    place.dir.write("world.json", &set("open-sesame"));
    let mut config = String::new();
    for name in ["team", "other", "store", "world", "absent"] {
        config.push_str(&format!("[credentials.{name}]\nfile = \"{name}.json\"\n"));
    }
    let mut agent = agent_with(&place, &config);
    let with_set = |id: &str, image: &str, name: &str| with_set(&place, id, image, name);
    let private = PRIVATE;
    agent.run(&with_set("first", private, "team"));
    // It is there now. Whoever shows the same has it at once; whoever does not is sent to the registry, which knows better.
    place.forget_calls();
    agent.run(&with_set("same", private, "team"));
    assert_eq!(place.count("PullImage"), 0);
    refused(&agent, &of(&place, "nobody", private), Reason::ImageUnauthorized, "401 Unauthorized");
    refused(&agent, &with_set("other", private, "other"), Reason::ImageUnauthorized, "401 Unauthorized");
    assert_eq!(place.count("PullImage"), 2);
    let never = with(of(&place, "never", private), json!({"image_pull": {"policy": "never"}}));
    refused(&agent, &never, Reason::ImageUnauthorized, "was pulled with credentials this workload does not show");
    // The next agent knows as much.
    until("it is written down", || fs::read_to_string(place.dir.join("agent/images.json")).is_ok_and(|text| text.contains("name:team")));
    agent.kill();
    agent.again();
    refused(&agent, &of(&place, "nobody-2", private), Reason::ImageUnauthorized, "401 Unauthorized");
    // What everybody may have, a set or not, is nobody's.
    agent.run(&of(&place, "public-1", "r.test/public:1"));
    place.forget_calls();
    agent.run(&with_set("public-2", "r.test/public:1", "team"));
    assert_eq!(place.count("PullImage"), 0);
    // What cannot be shown is said, and nothing of it.
    refused(&agent, &with_set("store", private, "store"), Reason::ImagePullFailed, "helpers are not run");
    refused(&agent, &with_set("world", private, "world"), Reason::ImagePullFailed, "others may read or change the file");
    refused(&agent, &with_set("absent", private, "absent"), Reason::ImagePullFailed, "cannot be read");
    refused(&agent, &with_set("elsewhere", "q.test/unauthorized:1", "team"), Reason::ImageUnauthorized, "there are none for q.test");
    let unknown = json!({"type": "StartWorkload", "workload": with_set("unknown", private, "nobody")});
    assert_eq!(expect_error(agent.ask(&unknown)).code, ErrorCode::InvalidArgument);
    // A runtime that quotes what it was shown, a rotated file, and the log.
    place.faults(&["PullImage:error=UNKNOWN,password open-sesame is not it"]);
    refused(&agent, &with_set("quoted", "r.test/quoted:1", "team"), Reason::ImagePullFailed, "password *** is not it");
    place.faults(&[]);
    place.dir.secret("other.json", &set("right"));
    agent.run(&with_set("rotated", private, "other"));
    for file in ["agent.log", "agent/images.json"] {
        let text = fs::read_to_string(place.dir.join(file)).unwrap_or_default();
        assert!(!text.is_empty() && !text.contains("sesame"), "{file}: {text}");
    }
    assert!(!format!("{:?}", agent.list()).contains("sesame"));
}

/// A configuration with the set `team`, and no room for images.
fn config_of_team(place: &Place) -> String {
    place.dir.secret("team.json", r#"{"auths":{"r.test":{"username":"kakuri","password":"open-sesame"}}}"#);
    format!("{TIGHT}[credentials.team]\nfile = \"team.json\"\n")
}

/// Nobody but those who show the set gets what is private, whatever is on the node.
#[track_caller]
fn is_private(place: &Place, agent: &Agent<'_>, serial: usize) {
    assert!(at_runtime(place).contains(&PRIVATE.to_owned()), "it is there");
    refused(agent, &of(place, &format!("nobody-{serial}"), PRIVATE), Reason::ImageUnauthorized, "401 Unauthorized");
    let never = with(of(place, &format!("never-{serial}"), PRIVATE), json!({"image_pull": {"policy": "never"}}));
    refused(agent, &never, Reason::ImageUnauthorized, "was pulled with credentials this workload does not show");
}

#[test]
fn what_a_pull_without_an_answer_brought_is_for_nobody() {
    for is_killed in [false, true] {
        let place = Place::sim(&[]);
        let config = config_of_team(&place);
        let mut agent = agent_with(&place, &config);
        // The runtime pulls it, and then nobody says which it is.
        place.faults(&["ImageStatus:error=UNAVAILABLE,gone"]);
        let first = with(of(&place, "first", PRIVATE), json!({"image_pull": {"credentials": "team", "policy": "always"}}));
        agent.start_workload(&first);
        until("it was pulled more than once", || place.count("PullImage") > 1);
        agent.delete("first");
        place.faults(&[]);
        if is_killed {
            agent.kill();
            agent.again();
        }
        is_private(&place, &agent, 1);
        // Those who show the set ask the registry once more, and then have it.
        agent.run(&with_set(&place, "team-1", PRIVATE, "team"));
        place.forget_calls();
        agent.run(&with_set(&place, "team-2", PRIVATE, "team"));
        assert_eq!(place.count("PullImage"), 0);
        is_private(&place, &agent, 2);
        // An agent that was there before it knows that it came by it.
        assert_eq!(row(&collect(&agent, true), PRIVATE).pulled_by_kakuri, !is_killed);
    }
}

#[test]
fn what_a_pull_brought_that_nobody_waited_for_any_more_is_for_nobody() {
    let place = Place::sim(&[]);
    let config = config_of_team(&place);
    let agent = agent_with(&place, &config);
    place.faults(&["PullImage:delay-after=600000*1"]);
    agent.start_workload(&with_set(&place, "first", PRIVATE, "team"));
    until("the runtime has it", || at_runtime(&place).contains(&PRIVATE.to_owned()));
    is_private(&place, &agent, 1);
    agent.delete("first");
    is_private(&place, &agent, 2);
    let log = || fs::read_to_string(place.dir.join("agent.log")).unwrap_or_default();
    until("it is broken off", || log().contains("pull broken off"));
    agent.run(&with_set(&place, "team", PRIVATE, "team"));
    is_private(&place, &agent, 3);
}

#[test]
fn what_an_agent_was_killed_over_pulling_is_for_nobody() {
    let place = Place::sim(&[]);
    let config = place.dir.write("agent.toml", &config_of_team(&place)).display().to_string();
    // The first writing is before the pull, the second after it.
    dies_at(&place, "agent-images-before@1", &config, &with_set(&place, "first", PRIVATE, "team"));
    let agent = place.agent(&["--config", &config]);
    is_private(&place, &agent, 1);
    // The one it was pulled for is started again, and shows the set again.
    until("it runs", || agent.status("first").0 == State::Running);
    is_private(&place, &agent, 2);
}

#[test]
fn no_pull_shows_credentials_that_was_not_written_down() {
    let place = Place::sim(&[]);
    let config = config_of_team(&place);
    let agent = agent_with(&place, &config);
    // Nothing can be put in the place of a directory.
    fs::create_dir_all(place.dir.join("agent/images.json/x")).expect("made");
    let late = with(with_set(&place, "first", PRIVATE, "team"), json!({"start_deadline_ms": 2000}));
    refused(&agent, &late, Reason::ImagePullFailed, "has to be written down before, and cannot be");
    assert_eq!(place.count("PullImage"), 0);
    agent.run(&of(&place, "public", "r.test/public:1"));
    fs::remove_dir_all(place.dir.join("agent/images.json")).expect("removed");
    agent.run(&with_set(&place, "second", PRIVATE, "team"));
}

#[test]
fn a_pull_that_ends_with_the_agent_is_written_down() {
    let place = Place::sim(&[]);
    let mut agent = agent_with(&place, TIGHT);
    // After the pull, the runtime takes its time to say which it is.
    place.faults(&["ImageStatus:delay=2000@1"]);
    agent.start_workload(&of(&place, "a", "r.test/mb-90/a:1"));
    until("the runtime has it", || at_runtime(&place).len() == 2);
    agent.terminate();
    place.faults(&[]);
    let text = fs::read_to_string(place.dir.join("agent/images.json")).unwrap_or_default();
    assert!(text.contains("r.test/mb-90/a:1"), "{text}");
    agent.again();
    assert!(row(&collect(&agent, true), "r.test/mb-90/a:1").pulled_by_kakuri);
}

#[test]
fn a_removal_without_an_answer_is_not_made_up_for_by_others() {
    let place = Place::sim(&[]);
    let agent = agent_with(&place, TIGHT);
    for id in ["a", "b", "c"] {
        agent.run(&of(&place, id, &format!("r.test/mb-10/{id}:1")));
        agent.delete(id);
    }
    // 57 of 100, down to 40: two go. The answer about the first is lost, and nobody knows whether it went.
    place.faults(&["image-used=59768832", "RemoveImage:error=DEADLINE_EXCEEDED,slow*1"]);
    let did = collect(&agent, false);
    let why = |id: &str| row(&did, &format!("r.test/mb-10/{id}:1")).why.clone();
    assert!(why("a").starts_with("not removed: RemoveImage"), "{did:?}");
    assert_eq!((row(&did, "r.test/mb-10/b:1").removed, row(&did, "r.test/mb-10/c:1").removed), (true, false), "{did:?}");
    assert_eq!((why("c").as_str(), place.count("RemoveImage")), ("enough goes without it to come down to 40 %", 2));
    // One that the runtime refuses makes no room: the next goes for it.
    place.faults(&["image-used=59768832", "RemoveImage:error=UNKNOWN,busy*1"]);
    let did = collect(&agent, false);
    let removed = |id: &str| row(&did, &format!("r.test/mb-10/{id}:1")).removed;
    assert_eq!((removed("a"), removed("c")), (false, true), "{did:?}");
}

#[test]
fn images_nobody_uses_go_when_there_is_no_room() {
    let place = Place::sim(&[]);
    // Somebody else's, of another size.
    let cri = place.cri();
    let theirs = ImageSpec { image: "theirs.test/mb-5:1".into(), ..Default::default() };
    cri.pull_image(&theirs, None, &Default::default(), soon(), &|| true).expect("pulled");
    let agent = agent_with(&place, TIGHT);
    for (id, image) in [("a", "r.test/mb-10/a:1"), ("b", "r.test/mb-10/b:1"), ("keep", "r.test/mb-10/keep:1")] {
        agent.run(&of(&place, id, image));
    }
    agent.delete("a");
    agent.delete("b");
    // 37 of 100: below the mark, and told so.
    let told = collect(&agent, true);
    assert!(told.dry_run && told.images.iter().all(|row| !row.removed), "{told:?}");
    assert_eq!(told.file_systems.iter().map(|f| (f.used_percent, f.capacity_bytes)).collect::<Vec<_>>(), [(Some(37), Some(100 << 20))]);
    let a = row(&told, "r.test/mb-10/a:1");
    assert_eq!((a.pulled_by_kakuri, a.in_use, a.bytes), (true, false, 10 << 20));
    assert_eq!(a.why, "37 % are taken, images go from 50 % on");
    assert!(a.last_used_at.is_some());
    let theirs = row(&told, "theirs.test/mb-5:1");
    assert_eq!((theirs.pulled_by_kakuri, theirs.why.as_str()), (false, "kakuri did not pull it"));
    assert!(row(&told, "r.test/mb-10/keep:1").in_use);
    assert_eq!(row(&told, IMAGE).why, "kakuri did not pull it");
    // At 57 of 100 those go that were used longest ago, until 40 are left.
    place.faults(&["image-used=59768832"]);
    let would = collect(&agent, true);
    let gone: Vec<&str> = would.images.iter().filter(|row| row.removed).map(|row| row.image.as_str()).collect();
    assert_eq!(gone, ["r.test/mb-10/a:1", "r.test/mb-10/b:1"], "{would:?}");
    assert_eq!(at_runtime(&place).len(), 5, "a dry run removes nothing");
    assert_eq!(place.count("RemoveImage"), 0);
    let did = collect(&agent, false);
    let gone: Vec<&str> = did.images.iter().filter(|row| row.removed).map(|row| row.image.as_str()).collect();
    assert_eq!(gone, ["r.test/mb-10/a:1", "r.test/mb-10/b:1"], "{did:?}");
    let mut left = at_runtime(&place);
    left.sort();
    assert_eq!(left, [IMAGE, "r.test/mb-10/keep:1", "theirs.test/mb-5:1"]);
    // Full as it is: what is used stays, and what is not ours.
    let rest = collect(&agent, false);
    assert!(rest.images.iter().all(|row| !row.removed), "{rest:?}");
    assert_eq!(row(&rest, "r.test/mb-10/keep:1").why, "a container or a workload uses it");
    // One that ended still has its container; deleted, it has not.
    agent.stop_workload("keep");
    assert!(row(&collect(&agent, false), "r.test/mb-10/keep:1").in_use);
    agent.delete("keep");
    assert!(row(&collect(&agent, false), "r.test/mb-10/keep:1").removed);
}

#[test]
fn a_pull_that_fills_the_room_makes_room() {
    let place = Place::sim(&[]);
    let agent = agent_with(&place, TIGHT);
    for n in 0..3 {
        agent.run(&of(&place, &format!("wl-{n}"), &format!("r.test/mb-15/i{n}:1")));
        agent.delete(&format!("wl-{n}"));
    }
    // 2 + 45 so far; the next makes it 62, and the agent sees to it without being asked.
    agent.run(&of(&place, "wl-3", "r.test/mb-15/i3:1"));
    until("the oldest two went", || {
        let left = at_runtime(&place);
        left.len() == 3 && left.contains(&"r.test/mb-15/i3:1".to_owned()) && left.contains(&"r.test/mb-15/i2:1".to_owned())
    });
    // The same image again is pulled again.
    agent.run(&of(&place, "wl-0", "r.test/mb-15/i0:1"));
    assert_eq!(agent.status("wl-3").0, State::Running);
}

#[test]
fn an_image_that_is_also_somebody_elses_stays() {
    let place = Place::sim(&[]);
    let cri = place.cri();
    let pull = |image: &str| {
        let image = ImageSpec { image: image.into(), ..Default::default() };
        cri.pull_image(&image, None, &Default::default(), soon(), &|| true).expect("pulled");
    };
    // The same content as what kakuri is to pull: removing one name would remove the other.
    pull("theirs.test/same-1:1");
    let agent = agent_with(&place, TIGHT);
    agent.run(&of(&place, "a", "r.test/same-1:1"));
    agent.delete("a");
    // Pulled by kakuri first, and named by somebody then.
    agent.run(&of(&place, "b", "r.test/same-2:1"));
    agent.delete("b");
    pull("theirs.test/same-2:1");
    place.faults(&["image-used=100000000"]);
    let did = collect(&agent, false);
    assert!(did.images.iter().all(|row| !row.removed), "{did:?}");
    let by_id = |image: &str| did.images.iter().find(|row| at_names(&place, &row.id).iter().any(|name| name == image)).expect("listed");
    assert_eq!(by_id("r.test/same-1:1").why, "kakuri did not pull it");
    assert_eq!(by_id("r.test/same-2:1").why, "it has another name, theirs.test/same-2:1");
    assert_eq!(place.count("RemoveImage"), 0);
}

fn at_names(place: &Place, id: &str) -> Vec<String> {
    let images = place.cri().list_images(soon()).expect("a list");
    images.into_iter().filter(|image| image.id == id).flat_map(|image| image.repo_tags).collect()
}

#[test]
fn what_was_not_written_down_is_not_collected() {
    for (place_of_death, is_known) in [("agent-images-before", false), ("agent-images-after", true)] {
        let place = Place::sim(&[]);
        let config = place.dir.write("agent.toml", TIGHT).display().to_string();
        dies_at(&place, place_of_death, &config, &of(&place, "a", "r.test/mb-90:1"));
        let mut agent = place.agent(&["--config", &config]);
        for object in agent.list() {
            agent.delete(object.spec["id"].as_str().expect("an id"));
        }
        until("nothing uses it", || place.containers().is_empty());
        let told = collect(&agent, true);
        let image = row(&told, "r.test/mb-90:1");
        assert_eq!((image.pulled_by_kakuri, image.removed), (is_known, is_known), "{place_of_death}: {told:?}");
        // A damaged file may have said that an image is not for everybody.
        agent.kill();
        let file = place.dir.join("agent").join("images.json");
        fs::write(&file, "{\"version\":1,\"images\":[{\"endpoint\"").expect("written");
        assert!(!agent.try_again());
        let log = fs::read_to_string(place.dir.join("agent.log")).expect("a log");
        assert!(log.contains("images.json: damaged: ") && log.contains("Remove those images at the runtime and move it away"), "{log}");
        fs::rename(&file, place.dir.join("away")).expect("moved");
        agent.again();
        let told = collect(&agent, false);
        assert!(told.images.iter().all(|row| !row.pulled_by_kakuri && !row.removed), "{told:?}");
    }
}

/// An agent that is to die at a place, is given a workload, and does.
fn dies_at(place: &Place, place_of_death: &str, config: &str, workload: &Value) {
    let ready = place.dir.join("dying.ready");
    let (state, endpoint) = (place.dir.join("agent").display().to_string(), place.endpoint_url());
    let mut dying = command(AGENT);
    dying.args(["--config", config, "--node-id", &place.node, "--listen", "127.0.0.1:0", "--state-dir", &state, "--until-eof"]);
    dying.args(["--cri-endpoint", &endpoint, "--relist-ms", "200", "--ready-file", &ready.display().to_string()]);
    dying.env("KAKURI_DIE_AT", place_of_death);
    let mut daemon = Daemon::spawn(dying, "dying", &place.dir.join("dying.log"));
    let address = eventually("it serves", SOON_MS, || address_of(fs::read_to_string(&ready).ok()?.lines().next()?));
    let mut line = Line::connect(&address);
    until("it takes work", || matches!(line.ask(&json!({"type": "GetNode"})), Reply::Node(node) if node.ready));
    line.tell(&json!({"type": "StartWorkload", "workload": workload}));
    assert!(!daemon.wait(SOON_MS).success(), "{place_of_death}");
}

/// Ends a loop of another thread, also when the test fails.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn what_a_container_of_somebody_else_is_of_stays() {
    let place = Place::sim(&[]);
    let agent = agent_with(&place, TIGHT);
    agent.run(&of(&place, "a", "r.test/mb-90/a:1"));
    let cri = place.cri();
    let metadata = PodSandboxMetadata { name: "theirs".into(), uid: "u".into(), namespace: "kube-system".into(), attempt: 0 };
    let sandbox = PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
    let sandbox_id = cri.run_pod_sandbox(&sandbox, "runc", soon()).expect("a sandbox");
    let container = ContainerConfig {
        metadata: Some(ContainerMetadata { name: "theirs".into(), attempt: 0 }),
        image: Some(ImageSpec { image: "r.test/mb-90/a:1".into(), ..Default::default() }),
        ..Default::default()
    };
    cri.create_container(&sandbox_id, container, &sandbox, soon()).expect("a container");
    agent.delete("a");
    let did = collect(&agent, false);
    let image = row(&did, "r.test/mb-90/a:1");
    assert_eq!((image.in_use, image.removed, image.why.as_str()), (true, false, "a container or a workload uses it"), "{did:?}");
    cri.remove_pod_sandbox(&sandbox_id, soon()).expect("removed");
    assert!(row(&collect(&agent, false), "r.test/mb-90/a:1").removed);
}

#[test]
fn a_removal_and_a_start_of_one_image_do_not_cross() {
    let place = Place::sim(&[]);
    let agent = agent_with(&place, TIGHT);
    place.faults(&["RemoveImage:delay=10", "RemoveImage:delay-after=10"]);
    let mut collector = agent.line();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stops = Stops(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                let reply = collector.ask(&json!({"type": "CollectImages"}));
                // The agent collects by itself, too.
                assert!(matches!(&reply, Reply::Images(_)) || expect_error(reply).code == ErrorCode::Unavailable);
            }
        });
        // Pulled, or found, or on its way out, by this name or another: whatever it is, whoever comes gets it.
        for n in 0..40 {
            let id = format!("wl-{n}");
            let name = if n % 4 < 2 { "x" } else { "y" };
            let (state, status) = agent.settle(&of(&place, &id, &format!("r.test/mb-90/same-x/{name}:1")));
            assert_eq!(state, State::Running, "{status:?}");
            let removals = place.count("RemoveImage");
            agent.delete(&id);
            if n % 3 == 0 {
                until("it went", || place.count("RemoveImage") > removals);
            }
        }
    });
    assert!(place.count("PullImage") > 5, "what went was pulled again");
}

/// On a real containerd, with real registries.
mod lab {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::harness::place::Lab;

    fn sha256(bytes: &[u8]) -> String {
        let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("coreutils");
        child.stdin.take().expect("a pipe").write_all(bytes).expect("written");
        let output = child.wait_with_output().expect("it ends");
        format!("sha256:{}", String::from_utf8_lossy(&output.stdout).split(' ').next().expect("a sum"))
    }

    /// Puts a new image into a registry, that no runtime has: busybox with a label of its own. Its name, and its manifest's digest.
    fn publish(registry: &str) -> (String, String) {
        let tag = format!("t{}", crate::harness::unique());
        let url = |path: &str| format!("http://{registry}/v2/busybox/{path}");
        let types = ["application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json"].join(",");
        let get = |url: &str| ureq::get(url).header("accept", &types).call().expect("an answer").body_mut().read_to_vec().expect("a body");
        let mut manifest: Value = serde_json::from_slice(&get(&url("manifests/1.35"))).expect("JSON");
        let mut config: Value =
            serde_json::from_slice(&get(&url(&format!("blobs/{}", text(&manifest["config"]["digest"]))))).expect("JSON");
        config["config"]["Labels"] = json!({"test": format!("{tag}-{}", kakuri::report::random_id())});
        let config = config.to_string().into_bytes();
        let upload = ureq::post(url("blobs/uploads/")).send_empty().expect("an upload");
        let location = upload.headers()["location"].to_str().expect("an address").to_owned();
        let digest = sha256(&config);
        ureq::put(format!("{location}&digest={digest}")).send(&config).expect("uploaded");
        manifest["config"]["digest"] = digest.into();
        manifest["config"]["size"] = config.len().into();
        let kind = text(&manifest["mediaType"]);
        let manifest = manifest.to_string().into_bytes();
        ureq::put(url(&format!("manifests/{tag}"))).header("content-type", kind).send(&manifest).expect("published");
        (format!("{registry}/busybox:{tag}"), sha256(&manifest))
    }

    fn text(value: &Value) -> String {
        value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
    }

    #[test]
    fn what_was_pulled_is_recorded_by_its_manifest_and_collected() {
        // Others' images would come and go.
        let _alone = Lab::alone();
        Place::with_lab_unguarded("native", |place| {
            let Some(registry) = place.lab().and_then(|lab| lab.open_registry.clone()) else {
                return crate::harness::skip(crate::harness::Need::Lab, "no registry (KAKURI_REGISTRY_OPEN=HOST:PORT)");
            };
            // Full, whatever there is.
            let tight = "image_gc_capacity_mb = 1\nimage_gc_high_percent = 1\nimage_gc_low_percent = 0\nimage_gc_min_age_s = 0\n";
            let agent = agent_with(place, tight);
            let mut known = at_runtime(place);
            let (image, manifest) = publish(&registry);
            let status = agent.run(&of(place, "wl-1", &image));
            assert_eq!(status.image_digest.as_ref(), Some(&manifest), "{status:?}");
            let told = collect(&agent, false);
            let ours = row(&told, &image);
            assert_eq!((ours.pulled_by_kakuri, ours.in_use, ours.removed), (true, true, false), "{told:?}");
            assert_ne!(ours.id, manifest, "an id is no digest of a manifest");
            assert!(ours.bytes > 100_000 && told.file_systems.iter().all(|f| f.problem.is_none() && f.mountpoint.is_some()), "{told:?}");
            // Its container is there until it is deleted, running or not.
            agent.stop_workload("wl-1");
            assert!(row(&collect(&agent, false), &image).in_use);
            agent.delete("wl-1");
            let would = collect(&agent, true);
            assert!(row(&would, &image).removed && at_runtime(place).contains(&image), "{would:?}");
            // Nobody else's goes with it, however full it is: also not one whose layers it shares.
            let removed: Vec<String> = collect(&agent, false).images.into_iter().filter(|row| row.removed).map(|row| row.image).collect();
            assert_eq!(removed, [image.clone()]);
            let mut left = at_runtime(place);
            left.sort();
            known.sort();
            assert_eq!(left, known);
            // The very content of an image that was there before is not ours, whatever name we pull it by.
            agent.run(&of(place, "wl-2", &format!("{registry}/busybox:1.35")));
            agent.delete("wl-2");
            let did = collect(&agent, false);
            assert!(did.images.iter().all(|row| !row.removed), "{did:?}");
            agent.run(&of(place, "wl-3", IMAGE));
            // And what was collected can be had again.
            agent.run(&of(place, "wl-4", &image));
            agent.delete("wl-4");
            assert!(row(&collect(&agent, false), &image).removed);
        });
    }

    #[test]
    fn the_kernel_says_how_full_the_runtimes_file_system_is() {
        Place::with_lab_class("native", |place| {
            let agent = place.agent(&[]);
            let told = collect(&agent, true);
            assert_eq!(told.file_systems.len(), 1);
            let fs = &told.file_systems[0];
            assert!(fs.problem.is_none() && fs.mountpoint.is_some(), "{fs:?}");
            assert!(fs.capacity_bytes > fs.available_bytes && fs.capacity_bytes > Some(1 << 20), "{fs:?}");
            assert!(fs.used_percent.is_some_and(|percent| percent <= 100), "{fs:?}");
        });
    }

    #[test]
    fn a_registry_that_hangs_is_left_when_nobody_waits() {
        Place::with_lab_class("native", |place| {
            let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
            let registry = silent.local_addr().expect("bound").to_string();
            let agent = place.agent(&[]);
            agent.start_workload(&of(place, "wl-1", &format!("{registry}/busybox:1")));
            let (mut asked, _) = silent.accept().expect("the runtime asks");
            asked.set_read_timeout(Some(Duration::from_millis(SOON_MS))).expect("set");
            assert!(waits(&agent, "wl-1"));
            agent.run(&of(place, "quick", IMAGE));
            let (state, status) = agent.stop_workload("wl-1");
            assert_eq!((state, status.reason), (State::Failed, Some(Reason::Stopped)), "{status:?}");
            // The end of what the runtime had to say: it does not wait for the registry any more.
            let mut request = Vec::new();
            asked.read_to_end(&mut request).expect("closed");
            assert!(String::from_utf8_lossy(&request).contains("/v2/busybox/manifests/1"));
        });
    }

    #[test]
    fn what_a_real_runtime_says_of_a_pull_is_understood() {
        Place::with_lab_class("native", |place| {
            let agent = place.agent(&[]);
            for (answer, starts) in [("429 Too Many Requests", "limit: "), ("503 Service Unavailable", "registry: ")] {
                let registry = TcpListener::bind("127.0.0.1:0").expect("a port");
                let address = registry.local_addr().expect("bound").to_string();
                thread::spawn(move || {
                    // Until the test's process ends: who asks, and how often, is the runtime's business.
                    for mut stream in registry.incoming().flatten() {
                        let mut request = [0; 4096];
                        let _ = stream.read(&mut request); // A client that left is no news.
                        let _ = stream.write_all(format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").as_bytes());
                    }
                });
                let id = answer[..3].to_owned();
                let workload = with(of(place, &format!("wl-{id}"), &format!("{address}/busybox:1")), json!({"start_deadline_ms": 3000}));
                let (state, status) = agent.settle(&workload);
                assert_eq!((state, status.reason), (State::Failed, Some(Reason::ImagePullFailed)), "{status:?}");
                assert!(status.message.as_ref().is_some_and(|m| m.starts_with(starts) && m.contains(answer)), "{status:?}");
            }
            let (_, status) =
                agent.settle(&with(of(place, "no-host", "no-such-host.invalid/busybox:1"), json!({"start_deadline_ms": 1500})));
            // A machine whose resolver does not answer waits for it until the deadline.
            let is_said = status.message.as_ref().is_some_and(|m| m.starts_with("network: "));
            assert!(is_said || status.reason == Some(Reason::StartDeadlineExceeded), "{status:?}");
        });
    }
}
