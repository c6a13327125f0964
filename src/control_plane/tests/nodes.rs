//! Nodes that hang, that speak a later version, that cannot be watched, that are full.

use super::world::Fleet;
use super::*;
use crate::metrics::WATCH_LINES_UNREAD;

#[test]
fn nodes_that_hang_do_not_hold_up_the_others() {
    const HUNG: usize = 3;
    let fleet = Fleet::new(HUNG + 1);
    for (n, agent) in fleet.agents.iter().take(HUNG).enumerate() {
        agent.lock().hangs = true;
        // More than all dispatchers could wait for.
        fleet.delete(n, (0..20).map(|i| format!("hung-{n}-{i}")));
    }
    let asked = || fleet.agents.iter().map(|agent| agent.asked("DeleteWorkload")).sum::<usize>();
    eventually("all dispatchers wait", || asked() >= limits::DISPATCHERS);
    fleet.delete(HUNG, ["well".to_owned()].into_iter());
    let well = WorkloadId::new("well").expect("an id");
    let store = &fleet.running.plane.store;
    eventually("what is asked of a node that is well is done", || store.get(&well).is_none());
    assert_eq!(store.page(None, usize::MAX, |_| true).records.len(), HUNG * 20);
    fleet.agents.iter().for_each(|agent| agent.wake());
    fleet.end();
}

#[test]
fn what_a_node_that_hung_was_not_told_it_is_told_when_it_answers() {
    let fleet = Fleet::new(1);
    fleet.agents[0].lock().hangs = true;
    fleet.delete(0, (0..20).map(|i| format!("hung-{i}")));
    let trouble = || fleet.running.plane.store.page(None, 1, |record| record.status.last_error.is_some()).records;
    eventually("a request has hung", || !trouble().is_empty());
    fleet.agents[0].wake();
    eventually("all are gone", || fleet.running.plane.store.page(None, 1, |_| true).records.is_empty());
    fleet.end();
}

/// An event about a workload of the tests, in words of a later version.
fn event(id: &str, state: &str, more: &Value) -> String {
    let mut event = workload(id);
    let mut status = serde_json::to_value(crate::wire::Status::accepted(None)).expect("JSON");
    status.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let fields = json!({"type": "Event", "revision": 1, "event": "MODIFIED", "state": state, "status": status});
    event.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    event.to_string()
}

#[test]
fn an_agent_of_a_later_version_is_followed() {
    let world = World::new();
    world.post("a");
    world.post("b");
    let listed = |world: &World, state: &str| world.json("GET", &format!("/workloads?state={state}"), "").1["items"].clone();
    world.agent.say(&event("a", "Running", &json!({"reason": "Preempted", "phase": "Migrating", "weather": "fair"})));
    eventually("the event is read", || listed(&world, "Running")[0]["id"] == "a");
    let status = &listed(&world, "Running")[0]["status"];
    assert_eq!((&status["reason"], &status["phase"]), (&Value::Null, &Value::Null));
    // A state that nobody here knows is none that could be told.
    let unread = WATCH_LINES_UNREAD.value();
    world.agent.say(&event("b", "Frozen", &json!({})));
    world.agent.say(r#"{"type":"Weather","wind":1}"#);
    world.agent.set("b", State::Running, |_| {});
    eventually("what follows is read", || listed(&world, "Running")[1]["id"] == "b");
    assert!(WATCH_LINES_UNREAD.value() >= unread + 2);
    assert_eq!(world.agent.asked("Watch"), 1, "it is the same watch");
    // What came in such words may be a workload that nobody here knows of. From now on the agent is asked.
    world.agent.say(&event("not-ours", "Frozen", &json!({})));
    eventually("it was heard", || WATCH_LINES_UNREAD.value() >= unread + 3);
    assert_eq!(world.agent.asked("GetStatus new"), 0);
    world.agent.fail("GetStatus", Fault::SayAndClose(format!("{}\n", event("new", "Frozen", &json!({}))).into_bytes()));
    assert_eq!(world.json("POST", "/workloads", &workload("new").to_string()).0, 503);
    assert_eq!((world.agent.asked("GetStatus new") > 0, world.agent.asked("StartWorkload new")), (true, 0));
    assert_eq!(world.status("POST", "/workloads", &workload("new").to_string()), 201);
    world.end();
}

#[test]
fn what_is_on_the_list_in_words_of_a_later_version_is_not_missing() {
    let mut world = World::new();
    world.post("a");
    world.post("b");
    world.agent.set("a", State::Running, |_| {});
    eventually("it runs", || world.json("GET", "/workloads?state=Running", "").1["items"][0]["id"] == "a");
    world.stop_agent();
    {
        let mut fake = world.agent.lock();
        fake.prelude = vec![event("a", "Frozen", &json!({}))];
        fake.workloads.clear();
        fake.asked.clear();
    }
    world.start_agent();
    // One that is missing says when the list was compared.
    eventually("the other is sent again", || world.agent.asked("StartWorkload b") == 1);
    assert_eq!(world.agent.asked("GetStatus a"), 0);
    let running = world.json("GET", "/workloads?state=Running", "").1;
    assert_eq!(running["items"][0]["id"], "a", "as it was last heard of");
    world.end();
}

#[test]
fn a_node_that_cannot_be_watched_is_shown() {
    let mut world = World::new();
    let shown = |world: &World| world.json("GET", "/nodes/node-1", "").1;
    world.stop_agent();
    for _ in 0..3 {
        world.agent.fail("Watch", refusal(ErrorCode::ResourceExhausted));
    }
    world.start_agent();
    let text = "its events cannot be followed: the agent says ResourceExhausted: because";
    eventually("it is shown", || shown(&world)["message"] == text);
    assert_eq!(shown(&world)["ready"], true, "it takes work all the same");
    let watches = world.agent.asked("Watch");
    eventually("it is watched again", || world.agent.asked("Watch") > watches || watches > 4);
    world.post("a");
    world.agent.set("a", State::Running, |_| {});
    eventually("that is over", || {
        world.agent.set("a", State::Running, |_| {});
        shown(&world)["message"].is_null()
    });
    world.end();
}

#[test]
fn a_node_without_memory_gets_nothing_until_it_has_some() {
    let world = World::new();
    world.agent.lock().allocated_mb = 1000;
    // News of what comes and goes there make its agent be asked again.
    world.post("a");
    let post = |world: &World| world.json("POST", "/workloads", &workload("b").to_string());
    eventually("it is full", || {
        let (status, problem) = post(&world);
        if status != 503 {
            assert_eq!(world.status("DELETE", "/workloads/b", ""), 202);
            eventually("it is gone", || world.status("GET", "/workloads/b", "") == 404);
            return false;
        }
        assert_eq!(problem["detail"], "no node can take it now: node-1: memory: wants 512, free 24 of 1024");
        true
    });
    world.agent.lock().allocated_mb = 0;
    world.agent.set("a", State::Succeeded, |_| {});
    eventually("there is room", || post(&world).0 == 201);
    world.end();
}

#[test]
fn an_agent_that_talks_too_much_is_cut_short() {
    let world = World::new();
    let long = "x".repeat(limits::LINE_BYTES_MAX / 2);
    world.post("a");
    world.agent.set("a", State::Running, |status| status.message = Some(long.clone()));
    world.agent.fail("StartWorkload", Fault::Say(Reply::error(ErrorCode::Unavailable, long, None)));
    let (status, problem) = world.json("POST", "/workloads", &workload("b").to_string());
    assert_eq!(status, 503);
    assert!(problem["detail"].as_str().is_some_and(|text| text.len() <= limits::REFUSAL_BYTES_MAX + 100));
    assert_eq!(world.get("a")["status"]["message"].as_str().map(str::len), Some(limits::MESSAGE_BYTES_MAX));
    world.end();
}
