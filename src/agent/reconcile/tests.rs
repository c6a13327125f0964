use super::*;
use crate::cri::runtime::SeenContainer;

fn id() -> WorkloadId {
    WorkloadId::new("a").expect("valid")
}

/// An entry whose start made the sandbox of this attempt, or made none.
fn known(state: State, attempt: u32, made: bool) -> Known {
    Known {
        id: id(),
        uid: "u".into(),
        version: 7,
        state,
        made: made.then(|| (format!("s{attempt}"), "c".to_owned())),
        endpoint: 0,
        handler: made.then(|| "runsc".to_owned()),
        is_busy: false,
        is_ending: false,
        is_recovering: false,
        attempt,
        is_launched: state != State::Pending,
    }
}

fn seen(attempt: u32, container: Option<ContainerState>) -> Seen {
    Seen {
        workload: "a".into(),
        uid: "u".into(),
        attempt,
        asked_handler: "runsc".into(),
        own_kernel: true,
        sandbox_id: format!("s{attempt}"),
        is_ready: true,
        handler: "runsc".into(),
        annotation: String::new(),
        created_at: crate::deadline::Timestamp::from_nanos(i64::from(attempt + 1) * 1_000_000),
        container: container.map(|state| SeenContainer { id: "c".into(), state }),
    }
}

fn confirm() -> Action {
    Action::Confirm { id: id(), container_id: "c".into() }
}

fn check(known: &[Known], seen: &[Seen], first: bool, expected: &[Action]) {
    assert_eq!(plan(known, seen, 0, first), expected, "known {known:?}, seen {seen:?}, first {first}");
}

const RUNNING: Option<ContainerState> = Some(ContainerState::ContainerRunning);
const EXITED: Option<ContainerState> = Some(ContainerState::ContainerExited);
const CREATED: Option<ContainerState> = Some(ContainerState::ContainerCreated);
const UNKNOWN: Option<ContainerState> = Some(ContainerState::ContainerUnknown);

#[test]
fn what_runs_as_known_is_confirmed() {
    check(&[known(State::Running, 0, true)], &[seen(0, RUNNING)], false, &[confirm()]);
}

#[test]
fn what_ended_is_asked_for_and_what_is_gone_has_vanished() {
    let ask = Action::Ask { id: id(), version: 7, container_id: "c".into() };
    check(&[known(State::Running, 0, true)], &[seen(0, EXITED)], false, std::slice::from_ref(&ask));
    check(&[known(State::Running, 0, true)], &[seen(0, None)], false, &[ask]);
    check(&[known(State::Running, 0, true)], &[], false, &[Action::Vanished { id: id(), version: 7 }]);
}

#[test]
fn nothing_is_concluded_of_what_somebody_works_on() {
    for state in [State::Pending, State::Running] {
        let busy = Known { is_busy: true, ..known(state, 0, state == State::Running) };
        let busy = [busy];
        check(&busy, &[], false, &[]);
        check(&busy, &[seen(0, CREATED)], false, &[]);
        check(&busy, &[seen(0, EXITED)], true, &[]);
    }
}

#[test]
fn what_is_over_stays_as_it_is() {
    for state in [State::Succeeded, State::Failed] {
        check(&[known(state, 0, true)], &[seen(0, EXITED)], false, &[]);
        check(&[known(state, 0, true)], &[], false, &[]);
    }
    check(&[known(State::Pending, 0, false)], &[], false, &[]);
}

#[test]
fn what_a_failed_start_left_is_swept() {
    check(&[known(State::Failed, 0, false)], &[seen(0, CREATED)], false, &[Action::Sweep(seen(0, CREATED))]);
    check(&[known(State::Pending, 1, false)], &[seen(0, None)], false, &[Action::Sweep(seen(0, None))]);
}

#[test]
fn what_an_entry_owns_is_not_judged_by_what_else_has_its_name() {
    let late = |uid: &str, attempt| Seen { uid: uid.into(), ..seen(attempt, RUNNING) };
    for other in [late("another", 5), late("u", 5)] {
        for list in [[seen(0, RUNNING), other.clone()], [other.clone(), seen(0, RUNNING)]] {
            check(&[known(State::Running, 0, true)], &list, false, &[Action::Sweep(other.clone()), confirm()]);
        }
    }
}

#[test]
fn what_may_belong_to_a_start_in_flight_is_left_alone_and_strangers_are_not() {
    let busy = [Known { is_busy: true, ..known(State::Pending, 0, false) }];
    check(&busy, &[seen(0, CREATED)], false, &[]);
    let stranger = || Seen { uid: "another".into(), ..seen(3, RUNNING) };
    check(&busy, &[stranger()], false, &[Action::Sweep(stranger())]);
}

#[test]
fn a_workload_of_another_runtime_is_not_missed_in_this_one() {
    let elsewhere = Known { endpoint: 1, ..known(State::Running, 0, true) };
    check(&[elsewhere], &[], false, &[]);
}

#[test]
fn only_the_first_list_takes_up_what_nobody_knows_and_of_several_the_newest() {
    check(&[], &[seen(0, RUNNING)], true, &[Action::Adopt(seen(0, RUNNING))]);
    check(&[], &[seen(0, EXITED)], true, &[Action::Adopt(seen(0, EXITED))]);
    check(&[], &[seen(0, CREATED)], true, &[Action::Sweep(seen(0, CREATED))]);
    check(&[], &[seen(0, None)], true, &[Action::Sweep(seen(0, None))]);
    check(&[], &[seen(0, RUNNING)], false, &[Action::Sweep(seen(0, RUNNING))]);
    let expected = [Action::Sweep(seen(0, EXITED)), Action::Adopt(seen(1, RUNNING))];
    check(&[], &[seen(0, EXITED), seen(1, RUNNING)], true, &expected);
    check(&[], &[seen(1, RUNNING), seen(0, EXITED)], true, &expected);
}

#[test]
fn another_handler_or_a_dead_sandbox_means_the_end() {
    let reasons = |seen: Seen, is_ending| {
        let known = Known { is_ending, ..known(State::Running, 0, true) };
        let actions = plan(&[known], &[seen], 0, false);
        actions
            .into_iter()
            .map(|a| match a {
                Action::Ail { .. } => Some(Reason::SandboxDied),
                Action::Kill { .. } => Some(Reason::IsolationMismatch),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    let lying = || Seen { handler: "runc".into(), ..seen(0, RUNNING) };
    assert_eq!(reasons(lying(), false), [Some(Reason::IsolationMismatch)]);
    assert_eq!(reasons(lying(), true), [], "it is said once");
    assert_eq!(reasons(Seen { is_ready: false, ..seen(0, RUNNING) }, false), [Some(Reason::SandboxDied)]);
    assert_eq!(reasons(Seen { is_ready: false, ..seen(0, EXITED) }, false), [None], "an exit code is worth asking for");
}

/// An entry that was read from a journal.
fn journaled(state: State, attempt: u32, launched: bool) -> Known {
    Known { is_recovering: true, is_launched: launched, ..known(state, attempt, state == State::Running) }
}

#[test]
fn what_an_agent_before_was_about_to_start_is_taken_up_cleared_or_waited_for() {
    let recover = |leftover: Option<Seen>| Action::Recover { id: id(), leftover };
    // Nothing was made yet, or nothing is left.
    check(&[journaled(State::Pending, 0, false)], &[], true, &[recover(None)]);
    check(&[journaled(State::Pending, 0, true)], &[], true, &[recover(None)]);
    // Half a start is cleared away before the next begins, on a later list as on the first.
    for first in [true, false] {
        check(&[journaled(State::Pending, 0, false)], &[seen(0, None)], first, &[recover(Some(seen(0, None)))]);
        check(&[journaled(State::Pending, 0, false)], &[seen(0, CREATED)], first, &[recover(Some(seen(0, CREATED)))]);
    }
    // What was never asked to run did not, whatever a runtime makes of it that lost half of what it made. What was, may.
    for state in [EXITED, UNKNOWN] {
        check(&[journaled(State::Pending, 0, false)], &[seen(0, state)], true, &[recover(Some(seen(0, state)))]);
        check(&[journaled(State::Pending, 0, true)], &[seen(0, state)], true, &[Action::Adopt(seen(0, state))]);
    }
    // It ran, or runs.
    check(&[journaled(State::Pending, 0, false)], &[seen(0, RUNNING)], true, &[Action::Adopt(seen(0, RUNNING))]);
    check(&[journaled(State::Pending, 0, true)], &[seen(0, RUNNING)], true, &[Action::Adopt(seen(0, RUNNING))]);
    // Whether it runs a moment later nobody knows.
    check(&[journaled(State::Pending, 0, true)], &[seen(0, CREATED)], true, &[Action::Doubt { id: id(), seen: seen(0, CREATED) }]);
    // What ended before the restart by policy is cleared away, and only the latest of several is this workload's.
    check(&[journaled(State::Pending, 1, false)], &[seen(0, EXITED)], true, &[recover(Some(seen(0, EXITED)))]);
    let two = [seen(0, EXITED), seen(1, CREATED)];
    check(&[journaled(State::Pending, 1, false)], &two, true, &[Action::Sweep(seen(0, EXITED)), recover(Some(seen(1, CREATED)))]);
    // Another acceptance of the id is nobody's.
    let other = Seen { uid: "other".into(), ..seen(0, RUNNING) };
    check(&[journaled(State::Pending, 0, false)], std::slice::from_ref(&other), true, &[Action::Sweep(other.clone()), recover(None)]);
}

#[test]
fn what_ran_is_compared_before_its_recovery_is_over() {
    let recover = Action::Recover { id: id(), leftover: None };
    check(&[journaled(State::Running, 0, true)], &[seen(0, RUNNING)], true, &[confirm(), recover.clone()]);
    check(&[journaled(State::Running, 0, true)], &[], true, &[Action::Vanished { id: id(), version: 7 }, recover.clone()]);
    check(&[journaled(State::Failed, 0, true)], &[seen(0, EXITED)], true, &[Action::Sweep(seen(0, EXITED)), recover]);
}
