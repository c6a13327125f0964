//! Listeners: a thread that accepts, a thread per connection, slots, and one way to stop.
//!
//! Stopping: set the flag, connect to ourselves so that `accept` returns, shut the reading side of every connection (a waiting
//! reader sees the end of the stream; an answer in flight still leaves), wait for the threads until the drain is over, then shut
//! both sides of what is left, and leave behind a thread that even so does not end: it waits for somebody else.
//!
//! Invariant: connections served at a time by all servers that share their [`Slots`] <= `CONNECTIONS_MAX`; one more gets a complete
//! refusal and is closed.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Address, Error, Stream};
use crate::deadline::Deadline;
use crate::limits;

/// A bound listener that does not accept yet.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix; the socket file is removed when the server stops.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Binds. A Unix socket is made with mode 0600; a stale file of a dead server is replaced, a live one is an error.
    ///
    /// # Errors
    /// Those of `bind`; `AddrInUse` when somebody answers at the path, `AlreadyExists` when it is no socket.
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(addr) => TcpListener::bind(addr).map(Self::Tcp),
            Address::Unix(path) => bind_unix(path).map(|l| Self::Unix(l, path.clone())),
        }
    }

    /// Where it listens, the port the kernel chose for 0 included.
    ///
    /// # Errors
    /// Those of `getsockname`.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(l) => l.local_addr().map(Address::Tcp),
            Self::Unix(_, path) => Ok(Address::Unix(path.clone())),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(l) => {
                let (stream, _) = l.accept()?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(l, _) => l.accept().map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "not a socket")),
        Ok(_) => match Stream::connect(&Address::Unix(path.to_owned()), Deadline::within_ms(limits::PROBE_LISTENER_MS, "connect")) {
            // A full backlog is somebody's too.
            Ok(_) | Err(Error::Closed | Error::Expired(_)) => return Err(io::ErrorKind::AddrInUse.into()),
            // Nobody listens; any other error does not say so.
            Err(Error::Io(e)) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
            Err(Error::Io(e)) => return Err(e),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    // Bound under another name first, so that there is no moment in which the socket stands open to others.
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(".new");
    let _ = fs::remove_file(&hidden); // Left by a server that died between the two steps.
    let listener = UnixListener::bind(&hidden)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))?;
    fs::rename(&hidden, path)?;
    Ok(listener)
}

/// What a server does with its connections.
pub trait Service: Send + Sync + 'static {
    /// Serves one connection to its end. `stopping` becomes true when the server drains.
    fn serve(&self, stream: Stream, stopping: &AtomicBool);

    /// A complete answer for a connection that gets no slot.
    fn busy(&self) -> &'static [u8];
}

/// Places for connections, which the listeners of one daemon share.
#[derive(Debug, Default)]
pub struct Slots {
    taken: AtomicUsize,
}

impl Slots {
    fn take(self: &Arc<Self>) -> Option<Place> {
        let more = |taken: usize| (taken < limits::CONNECTIONS_MAX).then(|| taken.saturating_add(1));
        self.taken.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok().map(|_| Place(Arc::clone(self)))
    }
}

/// A connection's place; free again when dropped.
struct Place(Arc<Slots>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A running server: its accept thread and its connections.
#[derive(Debug)]
pub struct Server {
    address: Address,
    file: Option<SocketFile>,
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

/// The file of a Unix socket that we made.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(address: &Address) -> Option<Self> {
        let Address::Unix(path) = address else { return None };
        let meta = fs::symlink_metadata(path).ok()?;
        Some(Self { path: path.clone(), device: meta.dev(), inode: meta.ino() })
    }

    /// Removes it, if it is still the one we made.
    fn remove(&self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| meta.dev() == self.device && meta.ino() == self.inode) {
            let _ = fs::remove_file(&self.path); // Gone already is as good.
        }
    }
}

#[derive(Debug)]
struct Shared {
    slots: Arc<Slots>,
    stopping: AtomicBool,
    connections: Mutex<Connections>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Connections {
    next: u64,
    open: HashMap<u64, (Stream, Option<JoinHandle<()>>)>,
    /// Threads that are over or about to be; joined by the accept thread and at the end.
    done: Vec<JoinHandle<()>>,
    panics: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Connections> {
        // No code panics while it holds this lock; a poisoned one would still hold true data.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Starts accepting, in a thread called `name`; connections run in threads `name` with a number.
    ///
    /// # Errors
    /// When there are no threads left.
    pub fn start<S: Service>(listener: Listener, name: &'static str, service: Arc<S>) -> io::Result<Self> {
        Self::start_with(listener, name, service, Arc::default())
    }

    /// As [`Server::start`], with places that others take too.
    ///
    /// # Errors
    /// When there are no threads left.
    pub fn start_with<S: Service>(listener: Listener, name: &'static str, service: Arc<S>, slots: Arc<Slots>) -> io::Result<Self> {
        let address = listener.address()?;
        let file = SocketFile::of(&address);
        let shared = Arc::new(Shared { slots, stopping: AtomicBool::new(false), connections: Mutex::default(), changed: Condvar::new() });
        let accept = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name(format!("{name}-accept"))
                .stack_size(limits::STACK_BYTES)
                .spawn(move || accept_loop(&listener, name, &service, &shared))?
        };
        Ok(Self { address, file, shared, accept: Some(accept) })
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        self.shared.lock().open.len()
    }

    /// Stops: no new connections, requests in flight have `drain_ms` to end. What does not end even when both its sides are shut is
    /// left behind, for the process to end with.
    pub fn stop(mut self, drain_ms: u64) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let accept: Vec<_> = self.accept.take().into_iter().collect();
        wake(&self.address);
        if let Some(file) = &self.file {
            file.remove();
        }
        // Whoever took our file's place took the wake-up too.
        join_within(accept, Deadline::within_ms(limits::CUT_OFF_MS, "accept"));
        let deadline = Deadline::within_ms(drain_ms, "drain");
        let mut connections = self.shared.lock();
        for (stream, _) in connections.open.values() {
            stream.shutdown(Shutdown::Read);
        }
        while !connections.open.is_empty() {
            let Ok(left) = deadline.left() else { break };
            connections = self.shared.changed.wait_timeout(connections, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if !connections.open.is_empty() {
            log::warn!("{} connections are cut off: not over within {drain_ms} ms", connections.open.len());
        }
        let mut threads = std::mem::take(&mut connections.done);
        for (stream, thread) in connections.open.values_mut() {
            stream.shutdown(Shutdown::Both);
            threads.extend(thread.take());
        }
        drop(connections);
        join_within(threads, Deadline::within_ms(limits::CUT_OFF_MS, "cut off"));
    }
}

/// Joins what ends in time.
fn join_within(mut threads: Vec<JoinHandle<()>>, deadline: Deadline) {
    loop {
        let (over, rest): (Vec<_>, Vec<_>) = threads.into_iter().partition(JoinHandle::is_finished);
        threads = rest;
        over.into_iter().for_each(join);
        if threads.is_empty() {
            return;
        }
        if deadline.left().is_err() {
            return log::warn!("{} threads do not end and are left behind", threads.len());
        }
        thread::park_timeout(Duration::from_millis(1));
    }
}

fn accept_loop<S: Service>(listener: &Listener, name: &'static str, service: &Arc<S>, shared: &Arc<Shared>) {
    while !shared.stopping.load(Ordering::SeqCst) {
        let stream = match listener.accept() {
            Ok(stream) => stream,
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => continue,
            Err(e) => {
                // No descriptors or memory: wait for a connection to end, or a little, instead of spinning.
                log::warn!("{name}: accept: {e}");
                let connections = shared.lock();
                drop(shared.changed.wait_timeout(connections, Duration::from_millis(100)));
                continue;
            }
        };
        if shared.stopping.load(Ordering::SeqCst) {
            break;
        }
        if let Err(error) = admit(stream, name, service, shared) {
            log::warn!("{name}: connection refused: {}", crate::report::Chain(&error));
        }
        let done = std::mem::take(&mut shared.lock().done);
        for thread in done {
            join(thread);
        }
    }
}

fn admit<S: Service>(mut stream: Stream, name: &'static str, service: &Arc<S>, shared: &Arc<Shared>) -> Result<(), Error> {
    let clone = stream.try_clone()?;
    let Some(place) = shared.slots.take() else {
        // The answer fits the socket's buffer; a reader that takes nothing must not hold up the accept thread.
        return stream.write_all(service.busy(), Deadline::within_ms(100, "refusal"));
    };
    let mut connections = shared.lock();
    let key = connections.next;
    connections.next = key.wrapping_add(1);
    connections.open.insert(key, (clone, None));
    drop(connections);
    let spawned = {
        let (service, shared) = (Arc::clone(service), Arc::clone(shared));
        thread::Builder::new().name(format!("{name}-{}", key % 10_000)).stack_size(limits::STACK_BYTES).spawn(move || {
            // Dropped on return and on panic alike, so that a place is never lost, and after the entry among the open ones.
            let _place = place;
            let _slot = Slot { key, shared: &shared };
            service.serve(stream, &shared.stopping);
        })
    };
    let mut connections = shared.lock();
    match spawned {
        Ok(thread) => match connections.open.get_mut(&key) {
            Some(slot) => slot.1 = Some(thread),
            None => connections.done.push(thread),
        },
        Err(error) => {
            connections.open.remove(&key);
            return Err(Error::Io(error));
        }
    }
    Ok(())
}

struct Slot<'a> {
    key: u64,
    shared: &'a Shared,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut connections = self.shared.lock();
        if thread::panicking() {
            connections.panics += 1;
            log::error!("a connection's thread panicked ({} so far); its connection is closed", connections.panics);
        }
        if let Some((stream, thread)) = connections.open.remove(&self.key) {
            stream.shutdown(Shutdown::Both);
            connections.done.extend(thread);
        }
        drop(connections);
        self.shared.changed.notify_all();
    }
}

/// Connects to ourselves, so that a waiting `accept` returns.
fn wake(address: &Address) {
    let target = match address {
        Address::Tcp(addr) if addr.ip().is_unspecified() => {
            let loopback = if addr.is_ipv4() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { IpAddr::V6(Ipv6Addr::LOCALHOST) };
            Address::Tcp(SocketAddr::new(loopback, addr.port()))
        }
        other => other.clone(),
    };
    if let Err(error) = Stream::connect(&target, Deadline::within_ms(1000, "wake")) {
        log::warn!("cannot wake the listener at {target}: {}", crate::report::Chain(&error));
    }
}

fn join(thread: JoinHandle<()>) {
    // A panic was counted and logged where it happened.
    let _ = thread.join();
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Service for Echo {
        fn serve(&self, mut stream: Stream, _stopping: &AtomicBool) {
            let mut buffer = [0; 64];
            let deadline = Deadline::within_ms(60_000, "echo");
            while let Ok(n @ 1..) = stream.read(&mut buffer, deadline) {
                assert_ne!(&buffer[..n], b"panic");
                if stream.write_all(&buffer[..n], deadline).is_err() {
                    return;
                }
            }
        }

        fn busy(&self) -> &'static [u8] {
            b"busy"
        }
    }

    fn start() -> Server {
        let listener = Listener::bind(&Address::parse("127.0.0.1:0").expect("valid")).expect("a free port");
        Server::start(listener, "echo", Arc::new(Echo)).expect("a thread")
    }

    fn soon() -> Deadline {
        Deadline::within_ms(5000, "test")
    }

    fn ask(stream: &mut Stream, text: &[u8]) -> Vec<u8> {
        let mut buffer = [0; 64];
        stream.write_all(text, soon()).expect("written");
        let n = stream.read(&mut buffer, soon()).expect("read");
        buffer[..n].to_vec()
    }

    #[test]
    fn stop_ends_idle_connections_at_once() {
        let server = start();
        let mut client = Stream::connect(server.address(), soon()).expect("connected");
        assert_eq!(ask(&mut client, b"hello"), b"hello");
        let watch = crate::deadline::Stopwatch::start();
        server.stop(60_000);
        assert!(watch.elapsed_ms() < 5000);
        assert_eq!(client.read(&mut [0; 1], soon()).expect("end of stream"), 0);
    }

    #[test]
    fn stop_does_not_wait_for_a_thread_that_waits_for_somebody_else() {
        struct Deaf(crossbeam_channel::Receiver<()>);
        impl Service for Deaf {
            fn serve(&self, mut stream: Stream, _stopping: &AtomicBool) {
                stream.write_all(b"in", Deadline::within_ms(5000, "test")).expect("written");
                let _ = self.0.recv();
            }

            fn busy(&self) -> &'static [u8] {
                b"busy"
            }
        }
        let (release, held) = crossbeam_channel::bounded(0);
        let listener = Listener::bind(&Address::parse("127.0.0.1:0").expect("valid")).expect("a free port");
        let server = Server::start(listener, "deaf", Arc::new(Deaf(held))).expect("a thread");
        let mut client = Stream::connect(server.address(), soon()).expect("connected");
        assert_eq!(client.read(&mut [0; 8], soon()).expect("served"), 2);
        let watch = crate::deadline::Stopwatch::start();
        server.stop(10);
        assert!(watch.elapsed_ms() < limits::CUT_OFF_MS + 5000);
        drop(release);
    }

    #[test]
    fn a_panic_costs_one_connection_and_no_slot() {
        let server = start();
        let mut client = Stream::connect(server.address(), soon()).expect("connected");
        assert_eq!(ask(&mut client, b"panic"), b"");
        let mut other = Stream::connect(server.address(), soon()).expect("connected");
        assert_eq!(ask(&mut other, b"still here"), b"still here");
        server.stop(1000);
    }

    #[test]
    fn one_connection_too_many_is_refused_in_words() {
        let server = start();
        let mut clients = Vec::new();
        for _ in 0..limits::CONNECTIONS_MAX {
            let mut client = Stream::connect(server.address(), soon()).expect("connected");
            assert_eq!(ask(&mut client, b"in"), b"in");
            clients.push(client);
        }
        let mut late = Stream::connect(server.address(), soon()).expect("connected");
        let mut buffer = [0; 8];
        let n = late.read(&mut buffer, soon()).expect("read");
        assert_eq!(&buffer[..n], b"busy");
        server.stop(5000);
    }

    #[test]
    fn listeners_of_one_daemon_share_their_places() {
        let slots = Arc::<Slots>::default();
        let server = || {
            let listener = Listener::bind(&Address::parse("127.0.0.1:0").expect("valid")).expect("a free port");
            Server::start_with(listener, "echo", Arc::new(Echo), Arc::clone(&slots)).expect("a thread")
        };
        let (one, other) = (server(), server());
        let mut clients = Vec::new();
        for i in 0..limits::CONNECTIONS_MAX {
            let server = if i % 2 == 0 { &one } else { &other };
            let mut client = Stream::connect(server.address(), soon()).expect("connected");
            assert_eq!(ask(&mut client, b"in"), b"in");
            clients.push(client);
        }
        for server in [&one, &other] {
            let mut late = Stream::connect(server.address(), soon()).expect("connected");
            let mut buffer = [0; 8];
            let n = late.read(&mut buffer, soon()).expect("read");
            assert_eq!(&buffer[..n], b"busy");
        }
        // One that leaves here makes room there.
        assert_eq!(ask(&mut clients.remove(0), b"panic"), b"");
        let end = soon();
        while slots.taken.load(Ordering::SeqCst) == limits::CONNECTIONS_MAX {
            assert!(end.left().is_ok(), "its place is never free");
            thread::park_timeout(Duration::from_millis(1));
        }
        let mut next = Stream::connect(other.address(), soon()).expect("connected");
        assert_eq!(ask(&mut next, b"in"), b"in");
        one.stop(5000);
        other.stop(5000);
        assert_eq!(slots.taken.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_listens_and_does_not_accept_is_not_replaced() {
        let path = std::env::temp_dir().join(format!("kakuri-deaf-{}", std::process::id()));
        let listener = super::super::stream::tests::listen_and_never_accept(&path);
        let address = Address::Unix(path.clone());
        let waiting = Stream::connect(&address, soon()).expect("in the backlog");
        assert_eq!(Listener::bind(&address).map(|_| ()).map_err(|e| e.kind()), Err(io::ErrorKind::AddrInUse));
        drop((waiting, listener));
        fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn a_unix_socket_is_private_and_replaces_only_the_dead() {
        let dir = std::env::temp_dir().join(format!("kakuri-listen-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        let path = dir.join("s");
        let address = Address::Unix(path.clone());
        drop(UnixListener::bind(&path).expect("a stale socket"));
        let server = Server::start(Listener::bind(&address).expect("replaces"), "echo", Arc::new(Echo)).expect("a thread");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(Listener::bind(&address).map(|_| ()).map_err(|e| e.kind()), Err(io::ErrorKind::AddrInUse));
        server.stop(1000);
        assert!(!path.exists());
        fs::write(&path, "a file").expect("written");
        assert_eq!(Listener::bind(&address).map(|_| ()).map_err(|e| e.kind()), Err(io::ErrorKind::AlreadyExists));
        fs::remove_dir_all(&dir).expect("removed");
    }
}
