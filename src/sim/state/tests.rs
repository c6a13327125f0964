use super::*;

fn handlers() -> Vec<String> {
    vec!["runc".into(), "kata".into()]
}

fn sandbox_request(name: &str, handler: &str) -> proto::RunPodSandboxRequest {
    let metadata = proto::PodSandboxMetadata { name: name.into(), uid: "u".into(), namespace: "ns".into(), attempt: 1 };
    let labels = BTreeMap::from([("name".to_owned(), name.to_owned())]);
    let config = Some(proto::PodSandboxConfig { metadata: Some(metadata), labels, ..Default::default() });
    proto::RunPodSandboxRequest { config, runtime_handler: handler.into() }
}

fn container_request(sandbox: &str, command: &[&str]) -> proto::CreateContainerRequest {
    let config = proto::ContainerConfig {
        metadata: Some(proto::ContainerMetadata { name: command.join("-"), attempt: 0 }),
        image: Some(proto::ImageSpec { image: "localhost/busybox:1.35".into(), ..Default::default() }),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        ..Default::default()
    };
    proto::CreateContainerRequest { pod_sandbox_id: sandbox.into(), config: Some(config), sandbox_config: None }
}

fn world_with(commands: &[&[&str]]) -> (World, String, Vec<String>) {
    let mut world = World::new(Saved::default());
    let sandbox = world.run_sandbox(sandbox_request("a", ""), &handlers(), 1).expect("a sandbox");
    let containers =
        commands.iter().map(|command| world.create_container(container_request(&sandbox, command), 2).expect("created")).collect();
    (world, sandbox, containers)
}

/// Runs everything that is due up to `until`.
fn run(world: &mut World, until: i64) {
    while let Some((id, step)) = world.due().filter(|(at, _)| *at <= until).map(|(_, c)| (c.status.id.clone(), c.printed)) {
        world.advance(&id, step);
    }
}

fn words<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String) {
    let Status { code, message } = result.expect_err("an error");
    (code, message)
}

#[test]
fn sandbox_names_are_reserved_until_removed() {
    let mut world = World::new(Saved::default());
    let id = world.run_sandbox(sandbox_request("a", "kata"), &handlers(), 1).expect("a sandbox");
    let message = format!(r#"failed to reserve sandbox name "a_ns_u_1": name "a_ns_u_1" is reserved for "{id}""#);
    assert_eq!(words(world.run_sandbox(sandbox_request("a", "kata"), &handlers(), 2)), (Code::Unknown, message));
    world.stop_sandbox(&id, 3).expect("stopped");
    assert!(world.run_sandbox(sandbox_request("a", "kata"), &handlers(), 4).is_err());
    world.remove_sandbox(&id, 5);
    world.remove_sandbox(&id, 6);
    assert!(world.run_sandbox(sandbox_request("a", "kata"), &handlers(), 7).is_ok());
}

#[test]
fn the_handler_must_be_known_and_empty_is_the_default() {
    let mut world = World::new(Saved::default());
    let message = r#"failed to get sandbox runtime: no runtime for "x" is configured"#.to_owned();
    assert_eq!(words(world.run_sandbox(sandbox_request("a", "x"), &handlers(), 1)), (Code::Unknown, message));
    let id = world.run_sandbox(sandbox_request("a", ""), &handlers(), 1).expect("a sandbox");
    assert_eq!(reported(world.sandbox(&id).expect("there"), &Plan::default()).runtime_handler, "runc");
    let message = "sandbox config must include metadata".to_owned();
    assert_eq!(words(world.run_sandbox(proto::RunPodSandboxRequest::default(), &handlers(), 1)), (Code::Unknown, message));
}

#[test]
fn a_container_moves_by_its_script_alone() {
    let (mut world, _, ids) = world_with(&[&["sh", "-c", "sleep 2; exit 3"]]);
    let id = &ids[0];
    assert_eq!(world.due().map(|(at, _)| at), None);
    world.start_container(id, 100).expect("started");
    run(&mut world, 1_000_000_000);
    assert!(world.running(id).is_ok());
    run(&mut world, 2_000_000_100);
    let container = world.container(id).expect("there");
    assert_eq!((container.status.exit_code, container.status.reason.as_str(), container.status.finished_at), (3, "Error", 2_000_000_100));
    assert_eq!(world.ended, std::slice::from_ref(id));
    assert!(words(world.start_container(id, 5)).1.contains("CONTAINER_EXITED"));
}

#[test]
fn a_saved_world_goes_on_where_it_was_and_ends_in_time() {
    let (mut world, _, ids) = world_with(&[&["sleep", "5"], &["sleep", "infinity"]]);
    for id in &ids {
        world.start_container(id, 1_000).expect("started");
    }
    run(&mut world, 3_000_000_000);
    let saved = Saved::decode(world.saved.encode_to_vec().as_slice()).expect("readable");
    assert_eq!(saved, world.saved);
    let mut again = World::new(saved);
    assert_eq!(again.due().map(|(at, _)| at), Some(5_000_001_000));
    // It was away until long after.
    run(&mut again, 60_000_000_000);
    let container = again.container(&ids[0]).expect("there");
    assert_eq!(
        (container.status.finished_at, container.status.exit_code, container.status.reason.as_str()),
        (5_000_001_000, 0, "Completed")
    );
    assert!(again.running(&ids[1]).is_ok());
}

#[test]
fn a_killed_container_is_not_moved_by_an_old_step() {
    let (mut world, _, ids) = world_with(&[&["sleep", "5"]]);
    world.start_container(&ids[0], 1).expect("started");
    world.kill(&ids[0], 2);
    world.advance(&ids[0], 0);
    let container = world.container(&ids[0]).expect("there");
    assert_eq!((container.status.exit_code, container.status.finished_at, container.due_at), (137, 2, None));
}

#[test]
fn an_unknown_program_fails_the_start_and_stays_as_exited() {
    let (mut world, _, ids) = world_with(&[&["nginx"]]);
    let (code, message) = words(world.start_container(&ids[0], 1));
    assert!(code == Code::Unknown && message.contains(r#"exec: "nginx": executable file not found in $PATH"#), "{message}");
    let container = world.container(&ids[0]).expect("there");
    assert_eq!(
        (container.status.state(), container.status.exit_code, container.status.reason.as_str()),
        (ContainerState::ContainerExited, 128, "StartError")
    );
}

#[test]
fn stopping_a_sandbox_kills_and_removing_it_removes() {
    let (mut world, sandbox, ids) = world_with(&[&["trap"], &["sleep", "1"]]);
    world.start_container(&ids[0], 3).expect("started");
    world.stop_sandbox(&sandbox, 4).expect("stopped");
    world.stop_sandbox(&sandbox, 5).expect("still stopped");
    assert_eq!(world.container(&ids[0]).expect("there").status.exit_code, 137);
    assert!(world.start_container(&ids[1], 6).is_err());
    assert_eq!(words(world.create_container(container_request(&sandbox, &["true"]), 6)).0, Code::NotFound);
    world.remove_sandbox(&sandbox, 7);
    assert!(world.saved.containers.is_empty() && world.saved.sandboxes.is_empty());
    assert_eq!(words(world.stop_sandbox(&sandbox, 8)).0, Code::NotFound);
}

#[test]
fn creating_a_container_checks_sandbox_name_and_image() {
    let (mut world, sandbox, ids) = world_with(&[&["true"]]);
    assert_eq!(words(world.create_container(container_request("nope", &["true"]), 1)).0, Code::NotFound);
    let message = format!(r#"failed to reserve container name "true_a_ns_u_0": name "true_a_ns_u_0" is reserved for "{}""#, ids[0]);
    assert_eq!(words(world.create_container(container_request(&sandbox, &["true"]), 1)), (Code::Unknown, message));
    world.remove_image("localhost/busybox:1.35");
    assert_eq!(words(world.create_container(container_request(&sandbox, &["false"]), 1)).0, Code::NotFound);
    assert_eq!(World::new(world.saved).image("localhost/busybox:1.35"), None, "a removed image stays removed");
}

#[test]
fn ids_may_be_shortened_while_they_are_clear() {
    let (world, sandbox, ids) = world_with(&[&["true"], &["false"]]);
    assert_eq!(world.container(&ids[0][..63]).expect("clear").status.id, ids[0]);
    assert_eq!(words(world.container("")).0, Code::NotFound);
    assert!(world.sandbox(&sandbox[..8]).is_ok());
    assert_ne!(ids[0], ids[1]);
    assert!(ids[0].len() == 64 && ids[0].bytes().all(|b| b.is_ascii_hexdigit()));
}

#[test]
fn lists_select_by_id_state_sandbox_and_label() {
    let (mut world, sandbox, ids) = world_with(&[&["sleep", "9"], &["true"]]);
    world.run_sandbox(sandbox_request("b", "kata"), &handlers(), 9).expect("a sandbox");
    world.start_container(&ids[0], 3).expect("started");
    let plan = Plan::default();
    let sandboxes = |filter| world.list_sandboxes(&filter, &plan).len();
    assert_eq!(sandboxes(proto::PodSandboxFilter::default()), 2);
    assert_eq!(sandboxes(proto::PodSandboxFilter { id: sandbox.clone(), ..Default::default() }), 1);
    let label_selector = BTreeMap::from([("name".to_owned(), "b".to_owned())]);
    assert_eq!(sandboxes(proto::PodSandboxFilter { label_selector: label_selector.clone(), ..Default::default() }), 1);
    assert_eq!(sandboxes(proto::PodSandboxFilter { id: sandbox.clone(), label_selector, ..Default::default() }), 0);
    let state = Some(proto::PodSandboxStateValue { state: PodSandboxState::SandboxNotready.into() });
    assert_eq!(sandboxes(proto::PodSandboxFilter { state, ..Default::default() }), 0);
    let containers = |filter| world.list_containers(&filter, &plan).len();
    assert_eq!(containers(proto::ContainerFilter { pod_sandbox_id: sandbox, ..Default::default() }), 2);
    let state = Some(proto::ContainerStateValue { state: ContainerState::ContainerRunning.into() });
    assert_eq!(containers(proto::ContainerFilter { state, ..Default::default() }), 1);
}

#[test]
fn a_slow_subscriber_is_cut_off() {
    let mut world = World::new(Saved::default());
    let slow = world.subscribe();
    for _ in 0..limits::SIM_EVENTS_MAX {
        world.emit(Event::ContainerCreatedEvent, "c", "s", 1);
    }
    assert_eq!(world.subscribers[&slow].len(), limits::SIM_EVENTS_MAX);
    world.emit(Event::ContainerCreatedEvent, "c", "s", 1);
    assert!(world.subscribers.is_empty());
}
