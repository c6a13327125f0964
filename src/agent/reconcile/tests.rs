use super::*;
use crate::cri::runtime::SeenContainer;
use crate::workload::Name;

fn known(state: State, attempt: u32, made: bool) -> Known {
    Known {
        id: WorkloadId::new("a").expect("valid"),
        version: 7,
        state,
        attempt,
        made: made.then(|| (format!("s{attempt}"), "c".to_owned())),
        class: Name::new("gvisor").expect("valid"),
        is_busy: false,
    }
}

fn seen(attempt: u32, container: Option<ContainerState>) -> Seen {
    Seen {
        workload: "a".into(),
        attempt,
        sandbox_id: format!("s{attempt}"),
        is_ready: true,
        handler: "runsc".into(),
        annotation: String::new(),
        created_at: None,
        container: container.map(|state| SeenContainer { id: "c".into(), state }),
    }
}

fn sweep(attempt: u32) -> Action {
    Action::Sweep { sandbox_id: format!("s{attempt}"), workload: "a".into() }
}

fn check(known: &[Known], seen: &[Seen], first: bool, expected: &[Action]) {
    assert_eq!(plan(known, seen, first, |_| Some("runsc".into())), expected, "known {known:?}, seen {seen:?}, first {first}");
}

const RUNNING: Option<ContainerState> = Some(ContainerState::ContainerRunning);
const EXITED: Option<ContainerState> = Some(ContainerState::ContainerExited);
const CREATED: Option<ContainerState> = Some(ContainerState::ContainerCreated);

#[test]
fn what_runs_as_known_is_confirmed() {
    let confirm = Action::Confirm { id: WorkloadId::new("a").expect("valid"), container_id: "c".into() };
    check(&[known(State::Running, 0, true)], &[seen(0, RUNNING)], false, &[confirm]);
}

#[test]
fn what_ended_is_asked_for_and_what_is_gone_has_vanished() {
    let id = || WorkloadId::new("a").expect("valid");
    let ask = Action::Ask { id: id(), version: 7, container_id: "c".into() };
    check(&[known(State::Running, 0, true)], &[seen(0, EXITED)], false, &[ask.clone()]);
    check(&[known(State::Running, 0, true)], &[seen(0, None)], false, &[ask]);
    check(&[known(State::Running, 0, true)], &[], false, &[Action::Vanished { id: id(), version: 7 }]);
}

#[test]
fn nothing_is_concluded_of_what_somebody_works_on() {
    for state in [State::Pending, State::Running] {
        let busy = Known { is_busy: true, ..known(state, 0, state == State::Running) };
        check(&[busy.clone()], &[], false, &[]);
        check(&[busy.clone()], &[seen(0, CREATED)], false, &[]);
        check(&[busy], &[seen(0, EXITED)], true, &[]);
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
    check(&[known(State::Failed, 0, false)], &[seen(0, CREATED)], false, &[sweep(0)]);
    check(&[known(State::Pending, 1, false)], &[seen(0, None)], false, &[sweep(0)]);
}

#[test]
fn of_several_attempts_only_the_newest_counts() {
    let confirm = Action::Confirm { id: WorkloadId::new("a").expect("valid"), container_id: "c".into() };
    check(&[known(State::Running, 1, true)], &[seen(0, CREATED), seen(1, RUNNING)], false, &[sweep(0), confirm.clone()]);
    check(&[known(State::Running, 1, true)], &[seen(1, RUNNING), seen(0, CREATED)], false, &[sweep(0), confirm]);
}

#[test]
fn only_the_first_list_takes_up_what_nobody_knows() {
    check(&[], &[seen(0, RUNNING)], true, &[Action::Adopt(seen(0, RUNNING))]);
    check(&[], &[seen(0, EXITED)], true, &[Action::Adopt(seen(0, EXITED))]);
    check(&[], &[seen(0, CREATED)], true, &[sweep(0)]);
    check(&[], &[seen(0, None)], true, &[sweep(0)]);
    check(&[], &[seen(0, RUNNING)], false, &[sweep(0)]);
}

#[test]
fn another_handler_or_a_dead_sandbox_means_the_end() {
    let reasons = |seen: Seen| {
        let actions = plan(&[known(State::Running, 0, true)], &[seen], false, |_| Some("runsc".into()));
        actions.into_iter().map(|a| if let Action::Kill { reason, .. } = a { Some(reason) } else { None }).collect::<Vec<_>>()
    };
    assert_eq!(reasons(Seen { handler: "runc".into(), ..seen(0, RUNNING) }), [Some(Reason::IsolationMismatch)]);
    assert_eq!(reasons(Seen { is_ready: false, ..seen(0, RUNNING) }), [Some(Reason::SandboxDied)]);
    assert_eq!(reasons(Seen { is_ready: false, ..seen(0, EXITED) }), [None], "an exit code is worth asking for");
}
