//! Everything at once: clients start, stop and delete while the agent and its runtime are killed and made to fail. What was said
//! along the way must stay true, and at the end all agree.
//!
//! `KAKURI_STORM_SECONDS` makes it longer, `KAKURI_SEED` brings the same dice back.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use kakuri::deadline::Stopwatch;
use kakuri::net::Address;
use kakuri::wire::agent::{ErrorCode, Reply};
use kakuri::wire::status::Status;
use kakuri::workload::State;
use serde_json::{Value, json};

use crate::harness::dice::Dice;
use crate::harness::line::Socket;
use crate::harness::place::with;
use crate::harness::{Line, Place, until};

const SECONDS_DEFAULT: u64 = 4;
const CLIENTS: usize = 4;
const IDS_PER_CLIENT: usize = 3;

/// What a client was told of one life of a workload: of one container.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    state: State,
    exit_code: Option<i32>,
}

/// One client, with ids of its own.
struct Client {
    address: Address,
    dice: Dice,
    line: Option<Line>,
    specs: Vec<Value>,
    told: BTreeMap<String, Told>,
}

impl Client {
    /// One request; `None` when the agent was not there to answer it.
    fn ask(&mut self, request: &Value) -> Option<Reply> {
        if self.line.is_none() {
            // An agent that is being started again refuses connections for a moment.
            drop(Socket::connect(&self.address).ok()?);
            self.line = Some(Line::connect(&self.address));
        }
        let line = self.line.as_mut()?;
        let reply = line.try_send(format!("{request}\n").as_bytes()).ok().and_then(|()| line.next());
        if reply.is_none() {
            self.line = None;
        }
        reply
    }

    fn act(&mut self) {
        let spec = self.specs[self.dice.below(self.specs.len())].clone();
        let id = spec["id"].clone();
        let wait_ms = self.dice.below(300);
        let request = match self.dice.below(10) {
            0..=3 => json!({"type": "StartWorkload", "workload": spec, "wait_ms": wait_ms}),
            4..=6 => json!({"type": "GetStatus", "id": id}),
            7 => json!({"type": "StopWorkload", "id": id, "wait_ms": wait_ms}),
            8 => json!({"type": "DeleteWorkload", "id": id, "wait_ms": wait_ms}),
            _ => json!({"type": "Exec", "id": id, "command": ["true"], "timeout_ms": 1000}),
        };
        match self.ask(&request) {
            Some(Reply::Status { state, status, .. }) => self.note(&request, state, &status),
            Some(Reply::Error(error)) => {
                let expected = [ErrorCode::NotFound, ErrorCode::Unavailable, ErrorCode::DeadlineExceeded, ErrorCode::InvalidArgument];
                assert!(expected.contains(&error.code), "{request}: {error:?}");
                // Every request here is good; only a command may find that it cannot run.
                assert!(error.code != ErrorCode::InvalidArgument || request["type"] == "Exec", "{request}: {error:?}");
            }
            Some(Reply::Deleted { .. } | Reply::ExecResult(_)) | None => {}
            Some(other) => panic!("{request}: {other:?}"),
        }
    }

    /// What was said of a container before must not be taken back.
    fn note(&mut self, request: &Value, state: State, status: &Status) {
        assert!(state != State::Running || status.exit_code.is_none(), "{request}: {status:?}");
        assert!(state != State::Succeeded || status.exit_code == Some(0), "{request}: {status:?}");
        let Some(container) = status.container_id.clone() else { return };
        let now = Told { state, exit_code: status.exit_code };
        if let Some(before) = self.told.get(&container) {
            assert!(!before.state.is_terminal() || *before == now, "{request}: was {before:?}, is {now:?}");
        }
        self.told.insert(container, now);
    }
}

#[test]
fn what_was_said_stays_true_and_at_the_end_all_agree() {
    let seconds = std::env::var("KAKURI_STORM_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS_DEFAULT);
    let mut dice = Dice::new();
    let place = Place::sim(&["--persist"]);
    let mut agent = place.agent(&[]);
    let is_over = AtomicBool::new(false);
    let acts = AtomicUsize::new(0);
    thread::scope(|scope| {
        for i in 0..CLIENTS {
            let specs = (0..IDS_PER_CLIENT).map(|k| {
                let command = ["sleep 1000", "sleep 0.2; exit 3", "trap '' TERM; sleep 0.5"][k % 3];
                with(
                    place.workload(&format!("c{i}-{k}"), &["sh", "-c", command]),
                    json!({"stop_grace_ms": 100 * k, "start_deadline_ms": 5000}),
                )
            });
            let mut client =
                Client { address: agent.address.clone(), dice: dice.fork(), line: None, specs: specs.collect(), told: BTreeMap::new() };
            let (is_over, acts) = (&is_over, &acts);
            scope.spawn(move || {
                while !is_over.load(Ordering::SeqCst) {
                    client.act();
                    acts.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let clock = Stopwatch::start();
        // The weather; should it break, the clients must still be let go.
        let weather = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while clock.elapsed_ms() < seconds * 1000 {
                match dice.below(8) {
                    0 => {
                        agent.kill();
                        agent.again_now();
                    }
                    1 => {
                        agent.terminate();
                        agent.again_now();
                    }
                    2 => {
                        place.kill_sim();
                        place.start_sim();
                    }
                    3 => place.faults(&[]),
                    _ => place.faults(&[&fault(&mut dice), &fault(&mut dice)]),
                }
                thread::park_timeout(std::time::Duration::from_millis(50 + dice.below(250) as u64));
            }
        }));
        is_over.store(true, Ordering::SeqCst);
        if let Err(panic) = weather {
            std::panic::resume_unwind(panic);
        }
    });
    place.faults(&[]);
    agent.wait_until_ready();

    // What the agent says, and what the runtime has.
    let agrees = || {
        let known: BTreeMap<String, State> =
            agent.list().iter().map(|o| (o.spec["id"].as_str().unwrap_or_default().to_owned(), o.state)).collect();
        if known.values().any(|state| *state == State::Pending) {
            return false;
        }
        let label = |labels: &BTreeMap<String, String>| labels.get(kakuri::cri::runtime::LABEL_WORKLOAD).cloned().unwrap_or_default();
        let sandboxes = place.sandboxes();
        let ready = sandboxes.iter().filter(|s| s.state == 0).map(|s| label(&s.labels)).collect::<Vec<_>>();
        let running: Vec<&String> = known.iter().filter(|(_, state)| **state == State::Running).map(|(id, _)| id).collect();
        let one_each = sandboxes.iter().all(|s| known.contains_key(&label(&s.labels))) && sandboxes.len() <= known.len();
        one_each && ready.len() == running.len() && running.iter().all(|id| ready.contains(id))
    };
    until("agent and runtime agree", agrees);
    let log = std::fs::read_to_string(place.dir.join("agent.log")).expect("a log");
    assert!(!log.contains("panicked") && !log.contains("may not become"), "{log}");
    let acts = acts.load(Ordering::Relaxed);
    println!("{acts} requests");
    assert!(acts > 100, "{acts} requests are no storm");
    std::io::stdout().flush().expect("stdout");
}

/// Something that goes wrong a few times.
fn fault(dice: &mut Dice) -> String {
    let methods = [
        "ImageStatus",
        "RunPodSandbox",
        "PodSandboxStatus",
        "CreateContainer",
        "StartContainer",
        "ContainerStatus",
        "StopContainer",
        "StopPodSandbox",
        "RemovePodSandbox",
        "ListPodSandbox",
        "ListContainers",
        "ExecSync",
        "Status",
    ];
    let actions = [
        "error=UNAVAILABLE,storm",
        "error=UNKNOWN,storm",
        "error-after=UNAVAILABLE,storm",
        "drop",
        "drop-after",
        "rst=2",
        "malformed",
        "goaway",
        "delay=100",
        "delay-after=100",
        "no-status",
    ];
    let (method, action) = (methods[dice.below(methods.len())], actions[dice.below(actions.len())]);
    format!("{method}:{action}*{}", 1 + dice.below(3))
}
