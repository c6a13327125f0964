//! The world under its lock: changing it, waiting for it, keeping it on disk, and the one thread that runs all containers.
//!
//! Invariant: an effect is on disk (with `--persist`) before anybody hears of it. That is why the state file, alone among all
//! I/O, is written under the lock. Nothing is synced: the state outlives the process, not the machine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use prost::Message;

use super::faults::{Faults, Plan};
use super::logs::Logs;
use super::state::{Container, Saved, World};
use super::{Error, Options};
use crate::cri::proto;
use crate::deadline::{Deadline, Stopwatch, Timestamp};
use crate::grpc::{Code, Status};

/// One call of a client.
#[derive(Debug)]
pub(super) struct Call {
    /// Its name.
    pub(super) method: &'static str,
    /// The stream it came on.
    pub(super) stream: u32,
    /// The client's, or a day.
    deadline: Deadline,
    /// Nobody waits for the answer any more.
    is_cancelled: AtomicBool,
    /// Rings when all of the answer so far is on its way, and when the call is cancelled.
    bell: (Sender<()>, Receiver<()>),
}

impl Call {
    pub(super) fn new(method: &'static str, stream: u32, deadline: Deadline) -> Self {
        Self { method, stream, deadline, is_cancelled: AtomicBool::new(false), bell: bounded(1) }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::SeqCst)
    }

    pub(super) fn sent(&self) {
        let _ = self.bell.0.try_send(()); // It rings already.
    }

    /// Waits until the answer so far is on its way; false when nobody waits for it.
    pub(super) fn wait_sent(&self) -> bool {
        self.bell.1.recv().is_ok() && !self.is_cancelled()
    }
}

/// The simulated machine.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) options: Options,
    pub(super) faults: Faults,
    logs: Logs,
    world: Mutex<World>,
    /// After each change, each cancelled call, and when the machine stops.
    changed: Condvar,
    clock: Clock,
    calls: Option<Mutex<File>>,
    is_stopping: AtomicBool,
    /// Pulls under way.
    pub(super) pulls: AtomicU64,
}

/// Nanoseconds since 1970 that never go back while the process lives.
#[derive(Debug)]
struct Clock {
    start: i64,
    watch: Stopwatch,
}

impl Clock {
    fn start() -> Self {
        Self { start: i64::try_from(Timestamp::now().as_millis()).unwrap_or(0).saturating_mul(1_000_000), watch: Stopwatch::start() }
    }

    fn now(&self) -> i64 {
        self.start.saturating_add(i64::try_from(self.watch.elapsed().as_nanos()).unwrap_or(i64::MAX))
    }
}

impl Machine {
    /// A machine as it was saved, or a fresh one.
    ///
    /// # Errors
    /// [`Error`] when a file of the options cannot be read or written.
    pub(super) fn new(mut options: Options) -> Result<Self, Error> {
        let saved = options.state_file.as_deref().map(load).transpose()?.unwrap_or_default();
        let open =
            |path: &PathBuf| OpenOptions::new().create(true).append(true).open(path).map_err(|error| Error::File(path.clone(), error));
        let calls = options.call_log.as_ref().map(open).transpose()?;
        let machine = Self {
            faults: Faults::new(std::mem::take(&mut options.faults), options.fault_file.clone()),
            logs: Logs::default(),
            world: Mutex::new(World::new(saved)),
            changed: Condvar::new(),
            clock: Clock::start(),
            calls: calls.map(Mutex::new),
            is_stopping: AtomicBool::new(false),
            pulls: AtomicU64::new(0),
            options,
        };
        let world = machine.lock();
        for container in world.saved.containers.values().filter(|c| c.is_running()) {
            machine.open_log(container);
        }
        drop(world);
        Ok(machine)
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        // Transitions do not panic; should one, the tests that use us had better see it go on than hang.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the world at this moment.
    pub(super) fn read<T>(&self, look: impl FnOnce(&World, i64) -> T) -> T {
        look(&self.lock(), self.clock.now())
    }

    /// Changes the world at this moment, and tells all who wait.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut World, i64) -> T) -> T {
        let mut world = self.lock();
        let value = change(&mut world, self.clock.now());
        if let Some(path) = &self.options.state_file {
            if let Err(error) = write_whole(path, &world.saved.encode_to_vec()) {
                log::error!("{}: {error}", path.display());
            }
        }
        let ended = std::mem::take(&mut world.ended);
        drop(world);
        self.changed.notify_all();
        for id in ended {
            self.logs.close(&id);
        }
        value
    }

    /// Waits until `done` finds something, at most until `until`; `None` when it did not.
    ///
    /// # Errors
    /// The status of a call whose own deadline came first, or that nobody waits for any more.
    pub(super) fn wait<T>(&self, call: &Call, until: Deadline, mut done: impl FnMut(&mut World) -> Option<T>) -> Result<Option<T>, Status> {
        let mut world = self.lock();
        loop {
            if let Some(value) = done(&mut world) {
                return Ok(Some(value));
            }
            if call.is_cancelled() {
                return Err(Status { code: Code::Unavailable, message: "transport is closing".into() });
            }
            let Ok(mine) = call.deadline.left() else {
                return Err(Status { code: Code::DeadlineExceeded, message: "context deadline exceeded".into() });
            };
            let Ok(left) = until.left() else { return Ok(None) };
            world = self.changed.wait_timeout(world, left.min(mine)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the wait of a call.
    pub(super) fn cancel(&self, call: &Call) {
        let world = self.lock(); // Whoever waits either sees the flag or hears the bell.
        call.is_cancelled.store(true, Ordering::SeqCst);
        drop(world);
        self.changed.notify_all();
        call.sent();
    }

    /// What `uname -r` says under a handler.
    pub(super) fn kernel(&self, handler: &str, plan: &Plan) -> String {
        let scripted = plan.settings("kernel").find_map(|setting| setting.split_once(':').filter(|(of, _)| *of == handler));
        match (scripted, handler) {
            (Some((_, value)), _) => value.to_owned(),
            (None, "edera") => "6.16.0-zone".to_owned(),
            (None, "gvisor" | "runsc") => "4.4.0".to_owned(),
            (None, "kata") => "6.12.0-kata".to_owned(),
            // The host's own, which is what a shared kernel says.
            (None, _) => fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        }
    }

    /// Starts a container; its log is open before it can write.
    pub(super) fn start_container(&self, id: &str) -> Result<(), Status> {
        self.change(|world, now| {
            world.start_container(id, now)?;
            world.container(id).map(|container| self.open_log(container))
        })
    }

    pub(super) fn reopen_log(&self, id: &str) -> Result<(), Status> {
        let id = self.read(|world, _| world.running(id).map(|container| container.status.id.clone()))?;
        self.logs.reopen(&id).map_err(|error| Status { code: Code::Unknown, message: error.to_string() })
    }

    fn open_log(&self, container: &Container) {
        let proto::ContainerStatus { id, log_path, .. } = &container.status;
        if log_path.is_empty() {
            return;
        }
        if let Err(error) = self.logs.open(id, PathBuf::from(log_path)) {
            log::warn!("container {id} has no log: {log_path:?}: {error}");
        }
    }

    /// Runs all containers until the machine stops.
    pub(super) fn schedule(&self) {
        let mut world = self.lock();
        while !self.is_stopping.load(Ordering::SeqCst) {
            let now = self.clock.now();
            let wait = match world.due() {
                Some((at, container)) if at <= now => {
                    let (id, printed, script) = (container.status.id.clone(), container.printed, container.script());
                    let kernel = self.kernel(world.handler_of(container), &Plan::default());
                    drop(world);
                    // Lines first, so that whoever sees the end of a container finds its whole log.
                    if let (Ok(script), Ok(index)) = (script, usize::try_from(printed)) {
                        self.logs.write(&id, at, |line| script.print(index, &kernel, line));
                    }
                    self.change(|world, _| world.advance(&id, printed));
                    world = self.lock();
                    continue;
                }
                Some((at, _)) => Duration::from_nanos(at.abs_diff(now)),
                None => Duration::from_secs(3600),
            };
            world = self.changed.wait_timeout(world, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends [`Machine::schedule`].
    pub(super) fn stop(&self) {
        let world = self.lock();
        self.is_stopping.store(true, Ordering::SeqCst);
        drop(world);
        self.changed.notify_all();
    }

    /// Adds a line to the log of calls: one write, so that lines of several threads do not mix.
    pub(super) fn record(&self, line: &str) {
        log::debug!("{line}");
        let Some(calls) = &self.calls else { return };
        let mut file = calls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(format!("{line}\n").as_bytes()) {
            log::error!("log of calls: {error}");
        }
    }
}

/// What was saved; nothing when there is no file yet.
fn load(path: &Path) -> Result<Saved, Error> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Saved::default()),
        result => result,
    };
    bytes.and_then(|bytes| Saved::decode(bytes.as_slice()).map_err(io::Error::other)).map_err(|error| Error::File(path.to_owned(), error))
}

/// Writes a file so that a reader finds the old one or the new one.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    fs::write(&new, bytes)?;
    fs::rename(&new, path)
}
