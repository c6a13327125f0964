use super::entry::STOP_FAILURES_MAX;
use super::*;
use crate::cri::images::Image;
use crate::cri::runtime::{Ending, Found, Progress, Seen, StartError, Started};
use crate::wire::record::Record;
use crate::workload::ImageRef;
use serde_json::json;

struct House {
    registry: Registry,
    starts: Receiver<WorkloadId>,
    ends: Receiver<WorkloadId>,
    probes: Receiver<WorkloadId>,
    checks: Receiver<WorkloadId>,
}

/// Of the node.
const MEMORY_MB: u64 = 64 * 1024;

fn house() -> House {
    let (s, starts) = bounded(8);
    let (e, ends) = bounded(8);
    let (p, probes) = bounded(8);
    let (c, checks) = bounded(8);
    let node = Name::new("node-1").expect("valid");
    let queues = Queues { starts: s, ends: e, probes: p, checks: c };
    House { registry: Registry::new(node, Some("6.0-host".into()), Some(MEMORY_MB), queues), starts, ends, probes, checks }
}

fn id() -> WorkloadId {
    WorkloadId::new("wl-1").expect("valid")
}

#[allow(clippy::needless_pass_by_value)] // So that a test can write json!({..}) in place.
fn workload(fields: serde_json::Value) -> Workload {
    let mut value = json!({"id": "wl-1", "image": "busybox", "runtime_class": "gvisor"});
    value.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    let mut problems = crate::wire::Problems::default();
    crate::wire::workload::complete(value, "", &mut problems).unwrap_or_else(|| panic!("{problems}"))
}

fn class() -> Class {
    Class {
        name: Name::new("gvisor").expect("valid"),
        handler: "runsc".into(),
        own_kernel: true,
        annotations: BTreeMap::new(),
        overhead_mb: 24,
        memory_mb_min: 4,
        sandbox_ms_max: 1000,
    }
}

impl House {
    fn accept(&self, workload: Workload) -> Result<(State, Status), Refusal> {
        self.registry.accept(workload, class(), 0, None)
    }

    fn stop(&self) -> State {
        self.registry.stop(&id(), None).expect("not overtaken").expect("known").0
    }

    fn delete(&self) {
        assert_eq!(self.registry.delete(&id(), None), Ok(true));
    }
}

fn started() -> Started {
    Started {
        sandbox_id: "s".into(),
        container_id: "c".into(),
        handler: "runsc".into(),
        ip: None,
        image_digest: None,
        observed: Observed::Running(Timestamp::from_nanos(1_000_000)),
        steps_ms: [0, 1, 2, 3],
    }
}

fn ending(exit_code: Option<i32>, oom_killed: bool) -> Observed {
    Observed::Ended(Ending { exit_code, oom_killed, never_ran: false, message: String::new(), started_at: None, finished_at: None })
}

fn failure(reason: Reason, retriable: bool) -> StartError {
    StartError { reason, message: "because".into(), retriable }
}

/// A house with one workload that runs.
fn running(fields: serde_json::Value, own_kernel: bool) -> House {
    let house = house();
    house.accept(workload(fields)).expect("accepted");
    let queued = house.starts.try_recv().expect("queued");
    let ticket = house.registry.begin_start(&queued).expect("to be started");
    ticket.finish(Ok((started(), own_kernel)));
    assert_eq!(state(&house), State::Running);
    house
}

fn state(house: &House) -> State {
    house.registry.status(&id()).expect("known").0
}

fn reason(house: &House) -> Option<Reason> {
    house.registry.status(&id()).expect("known").1.reason
}

#[test]
fn the_same_workload_is_accepted_once_and_another_refused() {
    let house = house();
    house.accept(workload(json!({"env": {"A": "1"}}))).expect("accepted");
    assert_eq!(house.accept(workload(json!({"env": {"A": "1"}}))).map(|(state, _)| state), Ok(State::Pending));
    assert_eq!(house.accept(workload(json!({"env": {"A": "2"}}))).map(|_| ()), Err(Refusal::Differs));
    assert_eq!(house.starts.len(), 1, "one start is queued");
}

#[test]
fn a_start_runs_once_however_often_it_is_queued() {
    let house = house();
    house.accept(workload(json!({}))).expect("accepted");
    let ticket = house.registry.begin_start(&id()).expect("to be started");
    assert!(house.registry.begin_start(&id()).is_none(), "a second worker finds nothing to do");
    ticket.finish(Ok((started(), false)));
    assert!(house.registry.begin_start(&id()).is_none());
}

#[test]
fn a_ticket_that_is_dropped_marks_the_workload_failed() {
    let house = house();
    house.accept(workload(json!({}))).expect("accepted");
    drop(house.registry.begin_start(&id()).expect("to be started"));
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::CreateFailed)));
}

/// A workload of which its runtime has not known for too long whether it runs.
fn untraceable(fields: serde_json::Value) -> House {
    let house = running(fields, false);
    let unknown = || house.registry.observe(&id(), "c", Observed::Unknown);
    let age = || house.registry.lock().entries.get_mut(&id()).expect("known").unknown = Some(Deadline::within_ms(0, "container"));
    unknown();
    unknown();
    house.registry.tick();
    assert!(house.ends.is_empty(), "it may know again in a moment");
    age();
    house.registry.observe(&id(), "c", Observed::Running(None));
    unknown();
    assert!(house.ends.is_empty(), "it knew again");
    age();
    unknown();
    assert_eq!(house.registry.status(&id()).expect("known").1.phase, Some(Phase::Stopping));
    house
}

#[test]
fn what_its_runtime_lost_track_of_is_stopped_and_judged_by_how_it_ended() {
    let lost = |house: &House| {
        let ticket = house.registry.begin_end(&house.ends.try_recv().expect("queued")).expect("to be stopped");
        ticket.ask();
        ticket.chore
    };
    let ended = |house: &House, exit_code, finished_at| {
        let Observed::Ended(ending) = ending(exit_code, false) else { unreachable!("an end") };
        house.registry.observe(&id(), "c", Observed::Ended(Ending { finished_at, ..ending }));
        let (state, status) = house.registry.status(&id()).expect("known");
        (state, status.reason)
    };
    let (earlier, later) = (Some(Timestamp::now().minus_ms(60_000)), Some(Timestamp::now().plus_ms(60_000)));
    let stopped = |exit_code, finished_at| {
        let house = untraceable(json!({"restart_policy": "on-failure"}));
        assert_eq!(lost(&house), Chore::Stop);
        ended(&house, exit_code, finished_at)
    };
    // It was over before anybody stopped it: what is done is not done again.
    assert_eq!(stopped(Some(0), earlier), (State::Succeeded, Some(Reason::Completed)));
    assert_eq!(stopped(Some(3), earlier), (State::Pending, Some(Reason::Error)));
    for (exit_code, finished_at) in [(Some(0), later), (Some(137), earlier), (Some(143), later), (None, earlier), (Some(0), None)] {
        assert_eq!(stopped(exit_code, finished_at), (State::Pending, Some(Reason::RuntimeUnavailable)), "{exit_code:?} {finished_at:?}");
    }
    // Nobody came to stop it yet.
    let house = untraceable(json!({}));
    assert_eq!(ended(&house, Some(0), later), (State::Succeeded, Some(Reason::Completed)));
    // What the runtime makes up is no exit code; what the workload said is.
    for (finished_at, exit_code) in [(later, None), (earlier, Some(255))] {
        let house = untraceable(json!({}));
        lost(&house);
        ended(&house, Some(255), finished_at);
        assert_eq!(house.registry.status(&id()).expect("known").1.exit_code, exit_code);
    }
    // Its end, once decided, is not taken back: it may have been told to end.
    let house = untraceable(json!({}));
    house.registry.observe(&id(), "c", Observed::Running(None));
    assert_eq!(lost(&house), Chore::Stop);
    // Somebody wants it for another reason.
    let house = untraceable(json!({}));
    house.stop();
    lost(&house);
    assert_eq!(ended(&house, Some(137), later), (State::Failed, Some(Reason::Stopped)));
}

#[test]
fn what_ended_by_itself_before_it_was_stopped_tells_its_own_end() {
    let ended = |wish: &dyn Fn(&House), exit_code, is_asked: bool| {
        let house = running(json!({}), false);
        wish(&house);
        let ticket = house.registry.begin_end(&id()).expect("to be stopped");
        if is_asked {
            ticket.ask();
        }
        let Observed::Ended(ending) = ending(exit_code, false) else { unreachable!("an end") };
        // Whatever the clock says.
        let finished_at = Some(Timestamp::now().minus_ms(60_000));
        ticket.finish(Ok(EndStep::Ended(Ending { finished_at, ..ending })));
        (state(&house), reason(&house))
    };
    let (done, failed) = ((State::Succeeded, Some(Reason::Completed)), |reason| (State::Failed, Some(reason)));
    let ails = |reason| move |house: &House| house.registry.ail(&id(), "c", reason, "because".into());
    let (died, sick) = (ails(Reason::SandboxDied), ails(Reason::HealthCheckFailed));
    assert_eq!(ended(&died, Some(0), false), done);
    assert_eq!(ended(&died, Some(7), false), failed(Reason::Error));
    assert_eq!(ended(&died, Some(137), false), failed(Reason::SandboxDied), "its processes died with it");
    assert_eq!(ended(&died, Some(7), true), failed(Reason::Error), "it got there first");
    assert_eq!(ended(&died, Some(137), true), failed(Reason::SandboxDied));
    assert_eq!(ended(&sick, Some(0), false), failed(Reason::HealthCheckFailed));
    let stops = |reason| move |house: &House| house.registry.want_stop(&id(), reason, None);
    let (late, fake) = (stops(Reason::TtlExpired), stops(Reason::IsolationMismatch));
    assert_eq!(ended(&late, Some(0), false), done);
    assert_eq!(ended(&late, Some(137), false), failed(Reason::Error));
    assert_eq!(ended(&late, None, false), failed(Reason::TtlExpired));
    assert_eq!(ended(&late, Some(0), true), failed(Reason::TtlExpired));
    assert_eq!(ended(&fake, Some(0), false), failed(Reason::IsolationMismatch));
}

#[test]
fn what_ended_says_how_and_its_sandbox_is_retired() {
    let check = |observed: Observed, expected: (State, Reason, Option<i32>)| {
        let house = running(json!({}), false);
        house.registry.observe(&id(), "c", observed);
        let (state, status) = house.registry.status(&id()).expect("known");
        assert_eq!((state, status.reason, status.exit_code), (expected.0, Some(expected.1), expected.2));
        house.ends.try_recv().expect("to be retired");
        let ticket = house.registry.begin_end(&id()).expect("to be retired");
        assert_eq!(ticket.chore, Chore::Retire);
        ticket.finish(Ok(EndStep::Retired));
        assert!(house.ends.is_empty(), "nothing more to do");
    };
    check(ending(Some(0), false), (State::Succeeded, Reason::Completed, Some(0)));
    check(ending(Some(3), false), (State::Failed, Reason::Error, Some(3)));
    check(ending(Some(137), false), (State::Failed, Reason::Error, Some(137)));
    check(ending(Some(137), true), (State::Failed, Reason::OomKilled, Some(137)));
    check(ending(None, false), (State::Failed, Reason::Error, None));
}

#[test]
fn terminal_never_changes() {
    let house = running(json!({}), false);
    house.registry.observe(&id(), "c", ending(Some(3), false));
    let before = house.registry.status(&id());
    house.registry.observe(&id(), "c", ending(Some(0), false));
    house.stop();
    for known in house.registry.known() {
        house.registry.vanished(&known.id, known.version);
    }
    assert_eq!(house.registry.status(&id()), before);
}

#[test]
fn stopping_before_the_start_ends_at_once() {
    let house = house();
    house.accept(workload(json!({}))).expect("accepted");
    house.stop();
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::Stopped)));
    assert!(house.registry.begin_start(&id()).is_none(), "the queued start is passed over");
}

#[test]
fn stopping_during_the_start_cancels_it() {
    let house = house();
    house.accept(workload(json!({}))).expect("accepted");
    let ticket = house.registry.begin_start(&id()).expect("to be started");
    assert!(!ticket.is_cancelled());
    house.stop();
    assert!(ticket.is_cancelled());
    assert_eq!(state(&house), State::Pending);
    ticket.finish(Err(failure(Reason::Stopped, false)));
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::Stopped)));
}

#[test]
fn a_stop_that_comes_with_the_last_step_of_the_start_is_done_after_it() {
    let house = house();
    house.accept(workload(json!({}))).expect("accepted");
    let ticket = house.registry.begin_start(&id()).expect("to be started");
    house.registry.want_stop(&id(), Reason::TtlExpired, None);
    ticket.finish(Ok((started(), false)));
    let ticket = house.registry.begin_end(&house.ends.try_recv().expect("queued")).expect("to be stopped");
    assert_eq!((ticket.chore, ticket.container_id.as_deref()), (Chore::Stop, Some("c")));
    ticket.ask();
    let Observed::Ended(ending) = ending(Some(0), false) else { unreachable!() };
    ticket.finish(Ok(EndStep::Ended(ending)));
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::TtlExpired)), "a forced end is no success");
}

#[test]
fn deleting_stops_then_removes_then_forgets() {
    let house = running(json!({}), false);
    assert_eq!(house.registry.delete(&id(), None), Ok(true));
    let stop = house.registry.begin_end(&id()).expect("to be stopped");
    assert_eq!(stop.chore, Chore::Stop);
    assert_eq!(house.accept(workload(json!({}))).map(|_| ()), Err(Refusal::Leaving));
    let Observed::Ended(ending) = ending(Some(143), false) else { unreachable!() };
    stop.finish(Ok(EndStep::Ended(ending)));
    let remove = house.registry.begin_end(&id()).expect("to be removed");
    assert_eq!(remove.chore, Chore::Remove);
    remove.finish(Ok(EndStep::Removed));
    assert_eq!(house.registry.uid(&id()), None);
    assert_eq!(house.registry.delete(&id(), None), Ok(false));
}

#[test]
fn deleting_what_waits_in_the_start_queue_needs_no_start_worker() {
    let house = house();
    house.accept(workload(json!({}))).expect("accepted");
    house.delete();
    let remove = house.registry.begin_end(&house.ends.try_recv().expect("queued")).expect("to be removed");
    assert_eq!(remove.chore, Chore::Remove);
    assert!(house.registry.begin_start(&house.starts.try_recv().expect("stale")).is_none());
    remove.finish(Ok(EndStep::Removed));
    assert_eq!(house.registry.uid(&id()), None);
}

#[test]
fn a_failed_end_is_repeated_with_its_cause_shown() {
    let house = running(json!({}), false);
    house.stop();
    house.registry.begin_end(&id()).expect("to be stopped").finish(Err("the runtime hangs".into()));
    let (state, status) = house.registry.status(&id()).expect("known");
    assert_eq!((state, status.last_error.as_deref()), (State::Running, Some("the runtime hangs")));
    assert!(house.registry.begin_end(&id()).is_none(), "not before the pause is over");
    let next = house.registry.tick().expect("a retry is due");
    assert!(next <= Duration::from_millis(250), "{next:?}");
}

#[test]
fn a_lost_runtime_means_another_attempt_and_a_refusal_means_the_end() {
    let house = house();
    house.accept(workload(json!({}))).expect("accepted");
    house.registry.begin_start(&id()).expect("to be started").finish(Err(failure(Reason::RuntimeUnavailable, true)));
    let (state, status) = house.registry.status(&id()).expect("known");
    assert_eq!((state, status.attempt, status.reason), (State::Pending, 1, Some(Reason::RuntimeUnavailable)));
    let house = self::house();
    house.accept(workload(json!({}))).expect("accepted");
    house.registry.begin_start(&id()).expect("to be started").finish(Err(failure(Reason::ImageNotFound, false)));
    assert_eq!((self::state(&house), reason(&house)), (State::Failed, Some(Reason::ImageNotFound)));
}

#[test]
fn a_probe_tells_kernels_apart() {
    let check = |kernel: Option<&str>, verified: Option<bool>, stopped: bool| {
        let house = running(json!({}), true);
        let queued = house.probes.try_recv().expect("queued");
        assert_eq!(house.registry.begin_probe(&queued).map(|(_, container)| container), Some("c".into()));
        house.registry.finish_probe(&queued, "another", Some("6.0-host".into()));
        house.registry.finish_probe(&queued, "c", kernel.map(str::to_owned));
        let (_, status) = house.registry.status(&id()).expect("known");
        assert_eq!(status.isolation.verified, verified, "{kernel:?}");
        assert_eq!(status.isolation.message.is_some(), kernel.is_none());
        assert_eq!(status.phase == Some(Phase::Stopping), stopped);
    };
    check(Some("4.4.0"), Some(true), false);
    check(Some("6.0-host"), Some(false), true);
    check(None, None, false);
}

#[test]
fn without_a_kernel_of_its_own_the_handler_is_all_there_is_to_verify() {
    let house = running(json!({}), false);
    assert!(house.probes.is_empty());
    assert_eq!(house.registry.status(&id()).expect("known").1.isolation.verified, Some(true));
}

#[test]
fn a_stale_comparison_changes_nothing() {
    let house = running(json!({}), false);
    let version = house.registry.known()[0].version;
    house.stop();
    house.registry.vanished(&id(), version);
    assert_eq!(state(&house), State::Running);
    let version = house.registry.known()[0].version;
    house.registry.vanished(&id(), version);
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::Stopped)));
}

#[test]
fn the_start_deadline_counts_the_time_in_the_queue() {
    let house = house();
    house.accept(workload(json!({"start_deadline_ms": 1}))).expect("accepted");
    let never = AtomicBool::new(false);
    house.registry.wait(&id(), Until::Started, Deadline::within_ms(5, "test"), &never);
    house.registry.tick();
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::StartDeadlineExceeded)));
}

#[test]
fn the_time_to_live_stops_a_workload() {
    let house = running(json!({"ttl_ms": 1}), false);
    let never = AtomicBool::new(false);
    house.registry.wait(&id(), Until::Terminal, Deadline::within_ms(5, "test"), &never);
    house.registry.tick();
    assert_eq!(house.registry.begin_end(&id()).map(|t| t.chore), Some(Chore::Stop));
}

#[test]
fn a_watch_sees_what_is_and_every_change_in_order() {
    let house = house();
    house.accept(workload(json!({}))).expect("accepted");
    let watch = house.registry.watch(None).expect("a place");
    assert_eq!(watch.present.len(), 1);
    house.registry.begin_start(&id()).expect("to be started").finish(Ok((started(), false)));
    house.delete();
    let events: Vec<_> = watch.events.try_iter().map(|e| (e.kind, e.event().object.state, e.revision)).collect();
    assert_eq!(
        events.iter().map(|e| (e.0, e.1)).collect::<Vec<_>>(),
        [(EventKind::Modified, State::Running), (EventKind::Modified, State::Running)]
    );
    assert!(events.windows(2).all(|w| w[0].2 < w[1].2), "{events:?}");
}

#[test]
fn a_watch_that_falls_behind_is_cut_off() {
    let house = running(json!({}), true);
    let watch = house.registry.watch(None).expect("a place");
    for _ in 0..=limits::WATCH_EVENTS_MAX {
        let mut inner = house.registry.lock();
        house.registry.publish(&mut inner, &id(), EventKind::Modified);
    }
    assert_eq!(watch.events.try_iter().count(), limits::WATCH_EVENTS_MAX);
    assert!(watch.events.try_recv().is_err_and(|e| e.is_disconnected()));
}

fn seen() -> Seen {
    Seen {
        workload: "wl-1".into(),
        uid: "u".into(),
        attempt: 2,
        asked_handler: "runsc".into(),
        own_kernel: true,
        sandbox_id: "s".into(),
        is_ready: true,
        handler: "runsc".into(),
        annotation: String::new(),
        created_at: None,
        container: Some(crate::cri::runtime::SeenContainer { id: "c".into(), state: crate::cri::proto::ContainerState::ContainerRunning }),
    }
}

fn found(observed: Observed) -> Found {
    Found { observed, ip: Some("10.0.0.1".into()), image_ref: String::new() }
}

#[test]
fn an_adopted_workload_is_the_same_whatever_its_secrets() {
    let house = house();
    let known = workload(json!({"env": {"TOKEN": ""}}));
    house.registry.adopt(known, &seen(), 24, 0, found(Observed::Running(None)));
    let (state, status) = house.registry.status(&id()).expect("known");
    assert_eq!((state, status.attempt, status.ip.as_deref()), (State::Running, 2, Some("10.0.0.1")));
    let (page, _) = house.registry.page(None, 1);
    assert_eq!(page[0].object().spec["env"], json!({"TOKEN": null}), "a value nobody knows is not shown as empty");
    assert_eq!(house.accept(workload(json!({"env": {"OTHER": "x"}}))).map(|_| ()), Err(Refusal::Differs));
    assert!(house.accept(workload(json!({"env": {"TOKEN": "x"}}))).is_ok());
    assert_eq!(house.accept(workload(json!({"env": {"TOKEN": "y"}}))).map(|_| ()), Err(Refusal::Differs));
}

#[test]
fn a_sandbox_of_another_handler_is_taken_up_to_be_stopped_at_once() {
    for handler in ["runc", ""] {
        let house = house();
        let seen = Seen { handler: handler.into(), own_kernel: false, ..seen() };
        house.registry.adopt(workload(json!({"stop_grace_ms": 3_600_000})), &seen, 0, 0, found(Observed::Running(None)));
        let ticket = house.registry.begin_end(&id()).expect("to be stopped");
        assert_eq!((ticket.chore, ticket.grace_ms), (Chore::Stop, 0));
        assert_ne!(house.registry.status(&id()).expect("known").1.isolation.verified, Some(true));
    }
}

#[test]
fn a_start_that_was_over_before_we_looked_ran_all_the_same() {
    let house = house();
    house.accept(workload(json!({}))).expect("accepted");
    let watch = house.registry.watch(None).expect("a place");
    let Observed::Ended(ending) = ending(Some(3), false) else { unreachable!() };
    let over = Started { observed: Observed::Ended(ending), ..started() };
    house.registry.begin_start(&id()).expect("to be started").finish(Ok((over, true)));
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::Error)));
    assert_eq!(watch.events.try_iter().map(|e| e.event().object.state).collect::<Vec<_>>(), [State::Running, State::Failed]);
}

#[test]
fn a_polite_stop_holds_no_worker_and_is_followed_by_the_kill() {
    let house = running(json!({"stop_grace_ms": 2001}), false);
    house.stop();
    let ticket = house.registry.begin_end(&id()).expect("to be stopped");
    assert_eq!(ticket.grace_ms, 2001);
    ticket.finish(Ok(EndStep::Asked));
    let never = AtomicBool::new(false);
    house.registry.wait(&id(), Until::Terminal, Deadline::within_ms(5, "test"), &never);
    house.registry.tick();
    assert_eq!(house.registry.begin_end(&id()).map(|t| t.grace_ms), Some(0));
}

#[test]
fn a_delete_does_not_wait_for_a_stop_that_never_works() {
    let house = running(json!({}), false);
    house.delete();
    for _ in 0..STOP_FAILURES_MAX {
        let mut inner = house.registry.lock();
        inner.entries.get_mut(&id()).expect("known").retry = None;
        house.registry.assign(&mut inner, &id());
        drop(inner);
        house.registry.begin_end(&id()).expect("to be stopped").finish(Err("no".into()));
    }
    house.registry.lock().entries.get_mut(&id()).expect("known").retry = None;
    house.registry.tick();
    assert_eq!(house.registry.begin_end(&id()).map(|t| t.chore), Some(Chore::Remove));
}

#[test]
fn all_workloads_together_are_no_larger_than_the_runtime_can_list() {
    let house = house();
    let mut accepted = 0;
    let refusal = loop {
        let mut workload = workload(json!({"args": vec!["x".repeat(30_000); 16]}));
        workload.id = WorkloadId::new(&format!("w{accepted}")).expect("valid");
        match house.accept(workload) {
            Ok(_) => accepted += 1,
            Err(refusal) => break refusal,
        }
    };
    assert_eq!((refusal, accepted), (Refusal::Full, limits::AGENT_SPECS_BYTES_MAX / 480_500));
}

#[test]
fn all_workloads_together_ask_for_no_more_memory_than_there_is() {
    let house = house();
    let named = |name: &str, memory_mb: u64| {
        let mut workload = workload(json!({"memory_mb": memory_mb}));
        workload.id = WorkloadId::new(name).expect("valid");
        workload
    };
    let over = class().overhead_mb;
    assert_eq!(
        house.accept(named("most", MEMORY_MB)).map(|_| ()),
        Err(Refusal::Memory { wants: MEMORY_MB + over, free: MEMORY_MB }),
        "overhead counts"
    );
    house.accept(named("wl-1", MEMORY_MB - 2 * over - 4)).expect("accepted");
    assert_eq!(house.accept(named("more", 5)).map(|_| ()), Err(Refusal::Memory { wants: 5 + over, free: 4 + over }));
    house.accept(named("rest", 4)).expect("accepted");
    assert_eq!(house.registry.allocated().memory_mb, MEMORY_MB);
    // What was accepted is accepted, and what is over takes nothing.
    house.accept(named("rest", 4)).expect("there");
    assert_eq!(house.stop(), State::Failed);
    house.accept(named("more", 5)).expect("accepted");
}

#[test]
fn pages_come_in_the_order_of_ids() {
    let house = house();
    for name in ["c", "a", "b"] {
        let mut workload = workload(json!({}));
        workload.id = WorkloadId::new(name).expect("valid");
        workload.spec.image = ImageRef::new("busybox").expect("valid");
        house.accept(workload).expect("accepted");
    }
    let ids = |page: Vec<Snapshot>| page.into_iter().map(|o| o.object().spec["id"].as_str().map(str::to_owned)).collect::<Vec<_>>();
    let (page, more) = house.registry.page(None, 2);
    assert_eq!((ids(page), more), (vec![Some("a".into()), Some("b".into())], true));
    let (page, more) = house.registry.page(WorkloadId::new("b").ok().as_ref(), 2);
    assert_eq!((ids(page), more), (vec![Some("c".into())], false));
}

/// A house with a journal, of which this test is the writer.
fn journaled() -> House {
    let house = house();
    let restored = Restored { boot_id: "boot".into(), starts: 1 };
    house.registry.restore(BTreeMap::new(), &restored, |_| Some(0)).expect("nothing to restore");
    house
}

impl House {
    fn batch(&self) -> Batch {
        self.registry.unsaved(|_| "/run/x".into(), || true).expect("something to save")
    }
}

#[test]
fn what_is_to_be_on_disk_is_neither_told_nor_done_before() {
    let house = journaled();
    let watch = house.registry.watch(None).expect("a place");
    house.accept(workload(json!({}))).expect("accepted");
    assert!(house.registry.status(&id()).is_none() && house.starts.is_empty() && watch.events.is_empty(), "nobody heard of it");
    let batch = house.batch();
    assert!(matches!(batch.records.as_slice(), [Record::Accept(_), Record::Update(_)]), "{:?}", batch.records);
    house.registry.saved(batch);
    assert_eq!((state(&house), house.starts.len(), watch.events.len()), (State::Pending, 1, 1));

    house.registry.begin_start(&id()).expect("to be started").finish(Ok((started(), false)));
    assert_eq!(state(&house), State::Running, "the runtime knows that too");
    house.registry.observe(&id(), "c", ending(Some(0), false));
    assert_eq!((state(&house), house.ends.len()), (State::Running, 0), "its end is not on disk");
    let early = house.batch();
    house.delete();
    house.registry.saved(early);
    assert_eq!((state(&house), house.ends.len()), (State::Running, 0), "what came after that is not on disk either");
    house.registry.saved(house.batch());
    assert_eq!((state(&house), house.ends.len()), (State::Succeeded, 1));

    house.registry.begin_end(&id()).expect("to be removed").finish(Ok(EndStep::Removed));
    assert!(house.registry.status(&id()).is_some(), "a restart would find it in the journal");
    let batch = house.batch();
    assert!(matches!(batch.records.as_slice(), [Record::Forget { .. }]), "{:?}", batch.records);
    house.registry.saved(batch);
    assert!(house.registry.status(&id()).is_none());
}

#[test]
fn a_full_disk_refuses_what_is_new_and_keeps_what_is_not() {
    let house = journaled();
    house.accept(workload(json!({}))).expect("accepted");
    house.registry.not_saved(house.batch(), "no space".into());
    assert_eq!(house.registry.settled(&id(), true), Err("no space".into()));
    assert!(house.registry.uid(&id()).is_none(), "it was not accepted");
    let probe = house.registry.unsaved(|_| "/run/x".into(), || false).expect("a probe");
    assert!(probe.records.is_empty(), "whether the disk is well again is to be seen");
    house.accept(workload(json!({}))).expect("the id is free");
    house.registry.saved(house.batch());
    assert_eq!((house.registry.settled(&id(), true), house.registry.trouble()), (Ok(()), None));
    house.stop();
    house.registry.not_saved(house.batch(), "no space".into());
    assert_eq!(state(&house), State::Pending, "not stopped yet");
    house.registry.saved(house.batch());
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::Stopped)));
}

#[test]
fn an_end_is_the_end_of_one_attempt() {
    let fields =
        json!({"restart_policy": "always", "restart_backoff_ms": 100, "health": {"exec": ["true"], "interval_ms": 100, "failures": 1}});
    let house = running(fields, false);
    until_due(|| house.checks.try_recv().is_ok(), &house);
    let due = house.registry.begin_check(&id()).expect("a check");
    house.registry.finish_check(&id(), &due.container_id, Err("sick".into()));
    let stop = house.registry.begin_end(&id()).expect("to be stopped");
    assert_eq!(stop.chore, Chore::Stop);
    // The list sees its end before the worker that stopped it says so.
    house.registry.observe(&id(), "c", ending(Some(137), false));
    let Observed::Ended(same) = ending(Some(137), false) else { unreachable!("an end") };
    stop.finish(Ok(EndStep::Ended(same)));
    let (state, status) = house.registry.status(&id()).expect("known");
    assert_eq!((state, status.reason, status.restarts, status.attempt), (State::Pending, Some(Reason::HealthCheckFailed), 1, 1));
    let clear = house.registry.begin_end(&id()).expect("its sandbox goes first");
    assert_eq!((clear.chore, clear.sandbox_id.as_deref()), (Chore::Clear, Some("s")));
    clear.finish(Ok(EndStep::Cleared));
    until_due(|| house.starts.try_recv().is_ok(), &house);
    house.registry.begin_start(&id()).expect("to be started").finish(Ok((started(), false)));
    assert_eq!(
        house.registry.status(&id()).map(|(state, status)| (state, status.reason, status.exit_code)),
        Some((State::Running, None, None))
    );
}

/// Ticks until something is.
fn until_due(mut is_due: impl FnMut() -> bool, house: &House) {
    let deadline = Deadline::within_ms(10_000, "test");
    while !is_due() {
        deadline.left().expect("it is due some time");
        house.registry.tick();
        std::thread::yield_now();
    }
}

fn pulled() -> Image {
    Image { id: "sha256:1".into(), digest: None }
}

fn uid(house: &House) -> Arc<str> {
    house.registry.uid(&id()).expect("known")
}

/// A house with one workload that waits for its image.
fn pulling(fields: serde_json::Value) -> House {
    let house = house();
    house.accept(workload(fields)).expect("accepted");
    assert_eq!(house.starts.try_recv(), Ok(id()));
    assert!(house.registry.begin_start(&id()).expect("to be started").park());
    assert_eq!(house.registry.status(&id()).expect("known").1.phase, Some(Phase::Pulling));
    house
}

#[test]
fn a_start_that_waits_for_its_image_holds_no_worker_and_comes_back_with_it() {
    let house = pulling(json!({}));
    house.registry.tick();
    assert!(house.starts.is_empty(), "nobody starts it meanwhile");
    assert!(house.registry.is_pulling(&id(), &uid(&house)) && !house.registry.is_pulling(&id(), "another"));
    house.registry.finish_pull(&id(), "another", Ok(pulled()));
    assert!(house.starts.is_empty());
    house.registry.note_pull(&id(), &uid(&house), Reason::ImagePullFailed, "first");
    house.registry.note_pull(&id(), &uid(&house), Reason::ImagePullFailed, "later");
    let status = house.registry.status(&id()).expect("known").1;
    assert_eq!((status.message.as_deref(), status.last_error.as_deref()), (Some("first"), Some("later")));
    house.registry.finish_pull(&id(), &uid(&house), Ok(pulled()));
    assert_eq!(house.registry.images(), [(0, "docker.io/library/busybox:latest".to_owned()), (0, "sha256:1".to_owned())]);
    assert_eq!(house.starts.try_recv(), Ok(id()));
    let ticket = house.registry.begin_start(&id()).expect("to be started");
    assert_eq!(ticket.image, Some(pulled()));
    assert_eq!(house.registry.status(&id()).expect("known").1.message, None, "that trouble is over");
    house.registry.finish_pull(&id(), &uid(&house), Ok(pulled()));
    assert!(house.starts.is_empty(), "it waits no more");
    ticket.finish(Ok((started(), false)));
    assert_eq!(state(&house), State::Running);
}

#[test]
fn a_start_that_waits_for_its_image_ends_at_once_when_nobody_wants_it() {
    let house = pulling(json!({}));
    assert_eq!(house.stop(), State::Failed);
    let house = pulling(json!({}));
    house.delete();
    assert_eq!(house.ends.try_recv(), Ok(id()));
    house.registry.finish_pull(&id(), &uid(&house), Ok(pulled()));
    assert!(house.starts.is_empty());
    // Stopped while a worker had it, before it was parked.
    let house = self::house();
    house.accept(workload(json!({}))).expect("accepted");
    let ticket = house.registry.begin_start(&id()).expect("to be started");
    house.stop();
    assert!(!ticket.park(), "nobody is to bring it back");
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::Stopped)));
}

#[test]
fn a_pull_that_fails_ends_its_start_with_its_reason() {
    let house = pulling(json!({}));
    house.registry.finish_pull(&id(), &uid(&house), Err(failure(Reason::ImageNotFound, false)));
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::ImageNotFound)));
    let check = |noted: Option<Reason>, expected: Reason| {
        let house = pulling(json!({"start_deadline_ms": 1}));
        if let Some(reason) = noted {
            house.registry.note_pull(&id(), &uid(&house), reason, "why");
        }
        // The millisecond passes while we ask.
        while state(&house) == State::Pending {
            house.registry.tick();
        }
        let status = house.registry.status(&id()).expect("known").1;
        assert_eq!(status.reason, Some(expected), "{status:?}");
        assert_eq!(status.message.as_deref(), Some(noted.map_or("start deadline passed in Pulling", |_| "why")));
    };
    check(None, Reason::StartDeadlineExceeded);
    check(Some(Reason::ImagePullFailed), Reason::ImagePullFailed);
    check(Some(Reason::RuntimeUnavailable), Reason::StartDeadlineExceeded);
}

#[test]
fn a_stop_that_comes_while_its_end_is_seen_ends_it() {
    let fields = json!({"restart_policy": "always", "restart_backoff_ms": 100});
    let house = running(fields, false);
    house.registry.ail(&id(), "c", Reason::SandboxDied, "dead".into());
    let stop = house.registry.begin_end(&id()).expect("to be stopped");
    house.registry.observe(&id(), "c", ending(Some(1), false));
    house.stop();
    stop.finish(Ok(EndStep::Gone));
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::Stopped)));
}

#[test]
fn a_second_wish_does_not_shorten_the_grace() {
    let house = running(json!({"stop_grace_ms": 60_000}), false);
    house.stop();
    house.registry.begin_end(&id()).expect("to be stopped").finish(Ok(EndStep::Asked));
    house.delete();
    let again = house.registry.begin_end(&id()).expect("to be stopped");
    assert!((50_000..60_000).contains(&again.grace_ms), "{}", again.grace_ms);
}

#[test]
fn a_workload_whose_environment_is_unknown_is_not_run_again() {
    let house = house();
    let annotated = workload(json!({"env": {"A": ""}, "restart_policy": "always", "restart_backoff_ms": 100}));
    house.registry.adopt(annotated.clone(), &seen(), 0, 0, found(Observed::Running(None)));
    house.registry.observe(&id(), "c", ending(Some(1), false));
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::Error)));
}

#[test]
fn what_is_over_when_it_is_taken_up_is_never_called_running() {
    let house = journaled();
    house.registry.adopt(workload(json!({})), &seen(), 0, 0, found(ending(Some(3), false)));
    assert_eq!(state(&house), State::Pending, "its end is not on disk yet");
    house.registry.saved(house.batch());
    assert_eq!((state(&house), reason(&house)), (State::Failed, Some(Reason::Error)));
}

#[test]
fn the_last_event_is_the_deletion() {
    let house = journaled();
    house.accept(workload(json!({}))).expect("accepted");
    house.registry.saved(house.batch());
    let watch = house.registry.watch(None).expect("a place");
    house.delete();
    house.registry.saved(house.batch());
    house.registry.begin_end(&id()).expect("to be removed").finish(Ok(EndStep::Removed));
    let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
    assert!(house.registry.update_labels(&id(), labels, None).is_ok_and(|seen| seen.is_some()));
    house.registry.saved(house.batch());
    let kinds: Vec<EventKind> = watch.events.try_iter().map(|news| news.kind).collect();
    assert_eq!(kinds, [EventKind::Modified, EventKind::Deleted]);
    assert!(house.registry.uid(&id()).is_none());
}

#[test]
fn of_numbered_requests_about_one_id_the_late_ones_are_refused() {
    let house = house();
    let accept = |fence| house.registry.accept(workload(json!({})), class(), 0, Some(fence)).map(|(state, _)| state);
    assert_eq!(house.registry.delete(&id(), Some(7)), Ok(false), "it is not here, and no start from before may bring it");
    assert_eq!(accept(5), Err(Refusal::Overtaken(Overtaken(7))));
    assert_eq!(house.registry.present(&workload(json!({})), Some(6)), Some(Err(Refusal::Overtaken(Overtaken(7)))));
    assert!(house.registry.uid(&id()).is_none());
    assert_eq!(accept(8), Ok(State::Pending));
    assert_eq!(accept(8), Ok(State::Pending), "the same request, sent again");
    assert_eq!(house.registry.delete(&id(), Some(7)), Err(Overtaken(8)));
    assert_eq!(house.registry.stop(&id(), Some(7)), Err(Overtaken(8)));
    assert_eq!(house.registry.update_labels(&id(), BTreeMap::new(), Some(7)), Err(Overtaken(8)));
    assert_eq!(house.registry.status(&id()).map(|(state, _)| state), Some(State::Pending), "nothing of that was done");
    assert_eq!(house.stop(), State::Failed, "whoever does not number asks as ever");
}

#[test]
fn numbers_are_kept_for_so_many_ids() {
    let house = house();
    let id = |i: usize| WorkloadId::new(&format!("w{i}")).expect("valid");
    for i in 0..=limits::FENCES_MAX {
        assert_eq!(house.registry.delete(&id(i), Some(10 + i as u64)), Ok(false));
    }
    assert_eq!(house.registry.delete(&id(0), Some(1)), Ok(false), "the lowest number of all was forgotten");
    assert_eq!(house.registry.delete(&id(2), Some(1)), Err(Overtaken(12)));
}
