//! Sandboxes of ours that nobody wants, and their removal.
//!
//! A list of what the runtime has offers each of them again and again ([`super::reconcile`]); one that the runtime does not remove is
//! tried with growing pauses, and why is said when it is new.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam_channel::Sender;

use super::Agent;
use super::registry::chore_pause_ms;
use super::work::remove_stray_logs;
use crate::cri::runtime::{self, Seen};
use crate::deadline::{Deadline, Stopwatch};
use crate::limits;
use crate::report::Chain;

/// Sandboxes to be removed, each once at a time.
pub struct Sweeps {
    queue: Sender<(usize, Seen)>,
    sandboxes: Mutex<BTreeMap<String, Sweep>>,
}

enum Sweep {
    Queued(Failures),
    /// It failed so long ago.
    Failed(Stopwatch, Failures),
}

/// How often a removal failed in a row, and why it did last.
#[derive(Default)]
struct Failures {
    count: u32,
    why: String,
}

impl Failures {
    fn pause_ms(&self) -> u64 {
        chore_pause_ms(self.count)
    }
}

impl Sweeps {
    /// None yet; those that are offered go to this queue.
    pub fn new(queue: Sender<(usize, Seen)>) -> Self {
        Self { queue, sandboxes: Mutex::default() }
    }

    /// Queues a sandbox of an endpoint, unless it is queued or was tried a moment ago. A full queue refuses; the next list offers it
    /// again.
    pub fn offer(&self, endpoint: usize, seen: Seen) {
        let mut sandboxes = self.lock();
        let sandbox_id = seen.sandbox_id.clone();
        let failures = match sandboxes.remove(&sandbox_id) {
            None => Failures::default(),
            Some(Sweep::Failed(since, failures)) if since.elapsed_ms() >= failures.pause_ms() => failures,
            Some(waits) => {
                sandboxes.insert(sandbox_id, waits);
                return;
            }
        };
        let workload = seen.workload.clone();
        if self.queue.try_send((endpoint, seen)).is_err() {
            if failures.count > 0 {
                sandboxes.insert(sandbox_id, Sweep::Failed(Stopwatch::start(), failures));
            }
            return;
        }
        if failures.count == 0 {
            log::warn!("sandbox {sandbox_id} of workload {workload:?} is wanted by nobody and removed");
        }
        sandboxes.insert(sandbox_id, Sweep::Queued(failures));
    }

    /// Records how a removal went; and how often it has failed now, where the reason is new.
    fn done(&self, sandbox_id: &str, result: Result<(), String>) -> Option<String> {
        let mut sandboxes = self.lock();
        // Who else had it removed does not tell: it is in no list any more, and is not offered.
        sandboxes.retain(|_, sweep| match sweep {
            Sweep::Queued(_) => true,
            Sweep::Failed(since, failures) => since.elapsed_ms() < failures.pause_ms() + limits::UNDO_MS_MAX,
        });
        let before = match sandboxes.remove(sandbox_id) {
            Some(Sweep::Queued(failures) | Sweep::Failed(_, failures)) => failures,
            None => Failures::default(),
        };
        let why = result.err()?;
        let news = (why != before.why).then(|| why.clone());
        sandboxes.insert(sandbox_id.to_owned(), Sweep::Failed(Stopwatch::start(), Failures { count: before.count.saturating_add(1), why }));
        news
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Sweep>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes a sandbox that nobody wants.
pub fn sweep(agent: &Agent, endpoint: usize, seen: &Seen) {
    let sandbox_id = &seen.sandbox_id;
    let deadline = Deadline::within_ms(limits::UNDO_MS_MAX, "sweep");
    let removed = runtime::remove_sandbox(&agent.endpoint(endpoint).client, sandbox_id, deadline);
    let is_removed = removed.is_ok();
    // The next list shows again what is still there.
    if let Some(why) = agent.sweeps.done(sandbox_id, removed.map_err(|error| Chain(&error).to_string())) {
        log::warn!("sandbox {sandbox_id} is not removed yet: {why}");
    }
    if is_removed {
        remove_stray_logs(agent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(sandbox_id: &str) -> Seen {
        Seen {
            workload: "a".into(),
            uid: "u".into(),
            attempt: 0,
            asked_handler: "runc".into(),
            own_kernel: false,
            sandbox_id: sandbox_id.into(),
            is_ready: true,
            handler: "runc".into(),
            annotation: String::new(),
            created_at: None,
            container: None,
        }
    }

    #[test]
    fn what_cannot_be_removed_is_tried_again_after_a_pause_and_said_once() {
        let (queue, offered) = crossbeam_channel::bounded(1);
        let sweeps = Sweeps::new(queue);
        let taken = || offered.try_recv().ok().map(|(_, seen)| seen.sandbox_id);
        sweeps.offer(0, seen("s"));
        sweeps.offer(0, seen("s"));
        sweeps.offer(0, seen("t"));
        assert_eq!((taken().as_deref(), taken()), (Some("s"), None), "each once, and no more than there is room for");
        let watch = Stopwatch::start();
        assert_eq!(sweeps.done("s", Err("stuck".into())).as_deref(), Some("stuck"));
        let again = || {
            sweeps.offer(0, seen("s"));
            taken().is_some()
        };
        while !again() {
            assert!(watch.elapsed_ms() < 10_000, "never again");
            std::thread::yield_now();
        }
        assert!(watch.elapsed_ms() >= chore_pause_ms(1), "not at once, but after {} ms", watch.elapsed_ms());
        assert_eq!(sweeps.done("s", Err("stuck".into())), None, "as before");
        assert!(matches!(sweeps.lock().get("s"), Some(Sweep::Failed(_, Failures { count: 2, .. }))));
        sweeps.lock().clear();
        sweeps.offer(0, seen("t"));
        assert_eq!(taken().as_deref(), Some("t"));
        assert_eq!(sweeps.done("t", Ok(())), None);
        assert!(sweeps.lock().is_empty());
    }
}
