//! Drives `h2` over a blocking socket, without a runtime.
//!
//! `h2` reads and writes through tokio's two I/O traits. [`Pipe`] implements them: a read takes from an inbox and is `Pending`
//! when that is empty; a write goes straight to the socket and waits there. [`drive`] polls until nothing moves any more, and
//! only then waits for the peer, with one blocking read into the inbox.
//!
//! Invariant: the connection is polled before the call in each round, so that what the call queued is flushed before we wait:
//! h2 flushes only after a read said `Pending`.
//! Invariant: the waker remembers. `wake` sets a flag, and a round in which it was set is followed by another, not by a wait.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::deadline::Deadline;
use crate::net::{self, Stream};

/// What one read takes from the socket; the size of an HTTP/2 frame's default payload.
const READ_BYTES: usize = 16 * 1024;

/// A blocking socket behind tokio's I/O traits. Clones share it: one is h2's, one is the driver's.
#[derive(Clone, Debug)]
pub struct Pipe(Arc<Mutex<Inside>>);

#[derive(Debug)]
struct Inside {
    stream: Stream,
    /// Invariant: `begin <= end <= inbox.len()`; what waits to be read is `inbox[begin..end]`.
    inbox: Vec<u8>,
    begin: usize,
    end: usize,
    /// The peer will send nothing more.
    ended: bool,
    /// For writes, which `h2` starts when it likes.
    deadline: Deadline,
    /// Bytes the socket took since [`Pipe::begin_call`].
    written: u64,
    /// The error of a failed write, kept because h2 turns it into one of its own.
    write_error: Option<net::Error>,
}

impl Pipe {
    /// Wraps a connected socket; `deadline` is that of the first call.
    pub fn new(stream: Stream, deadline: Deadline) -> Self {
        let inside = Inside { stream, inbox: Vec::new(), begin: 0, end: 0, ended: false, deadline, written: 0, write_error: None };
        Self(Arc::new(Mutex::new(inside)))
    }

    /// Starts counting what is written, for a call with this deadline.
    pub fn begin_call(&self, deadline: Deadline) {
        let mut inside = self.lock();
        inside.deadline = deadline;
        inside.written = 0;
    }

    /// Whether the socket took no byte since [`Pipe::begin_call`].
    pub fn is_unwritten(&self) -> bool {
        self.lock().written == 0
    }

    /// The error of the last failed write, once.
    pub fn take_write_error(&self) -> Option<net::Error> {
        self.lock().write_error.take()
    }

    /// Moves what already lies in the socket to the inbox, without waiting.
    ///
    /// # Errors
    /// [`net::Error::Closed`] when the peer closed.
    pub fn fill_ready(&self) -> Result<(), net::Error> {
        let mut inside = self.lock();
        let Inside { stream, inbox, end, begin, .. } = &mut *inside;
        if *begin == *end {
            (*begin, *end) = (0, 0);
        }
        inbox.resize(end.saturating_add(READ_BYTES), 0);
        match stream.read_ready(inbox.get_mut(*end..).unwrap_or_default())? {
            Some(0) => Err(net::Error::Closed),
            Some(n) => {
                *end = end.saturating_add(n);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Waits for the peer: one read into the inbox, or the end of the stream.
    ///
    /// # Errors
    /// The deadline; the socket; [`net::Error::Closed`] when the stream had ended before.
    pub fn fill(&self, deadline: Deadline) -> Result<(), net::Error> {
        let mut inside = self.lock();
        if inside.ended {
            return Err(net::Error::Closed);
        }
        let Inside { stream, inbox, end, begin, .. } = &mut *inside;
        if *begin == *end {
            (*begin, *end) = (0, 0);
        }
        if inbox.len() < end.saturating_add(READ_BYTES) {
            inbox.resize(end.saturating_add(READ_BYTES), 0);
        }
        let read = stream.read(inbox.get_mut(*end..).unwrap_or_default(), deadline)?;
        *end = end.saturating_add(read);
        inside.ended = read == 0;
        Ok(())
    }

    /// Puts bytes another thread read into the inbox; none means the end of the stream.
    pub fn feed(&self, bytes: &[u8]) {
        let mut inside = self.lock();
        let (begin, end) = (inside.begin, inside.end);
        inside.inbox.truncate(end);
        inside.inbox.drain(..begin);
        inside.inbox.extend_from_slice(bytes);
        (inside.begin, inside.end) = (0, inside.inbox.len());
        inside.ended |= bytes.is_empty();
    }

    /// A second handle on the socket, to end it from another thread.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn try_clone_stream(&self) -> Result<Stream, net::Error> {
        self.lock().stream.try_clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        // Held for one read or write at a time by the one thread that drives; nothing in between panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut inside = self.lock();
        let waiting = inside.inbox.get(inside.begin..inside.end).unwrap_or_default();
        if waiting.is_empty() {
            // An empty buffer with `Ready` is the end of the stream. `fill` comes when all is `Pending`, so no waker is kept.
            return if inside.ended { Poll::Ready(Ok(())) } else { Poll::Pending };
        }
        let taken = waiting.get(..buffer.remaining()).unwrap_or(waiting);
        buffer.put_slice(taken);
        inside.begin = inside.begin.saturating_add(taken.len());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut inside = self.lock();
        let deadline = inside.deadline;
        match inside.stream.write(bytes, deadline) {
            Ok(n) => {
                inside.written = inside.written.saturating_add(n as u64);
                Poll::Ready(Ok(n))
            }
            Err(error) => {
                let kind = match &error {
                    net::Error::Closed => io::ErrorKind::BrokenPipe,
                    net::Error::Expired(_) => io::ErrorKind::TimedOut,
                    net::Error::Io(e) => e.kind(),
                };
                inside.write_error = Some(error);
                Poll::Ready(Err(kind.into()))
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.lock().stream.shutdown(std::net::Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}

/// A waker that remembers that it was woken.
#[derive(Debug, Default)]
pub struct Flag(AtomicBool);

impl Flag {
    /// Whether it was woken since the last time this was asked.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs `call` to its end, polling `connection` along with it, waiting on `pipe` when neither moves. `connection` answers whether it
/// is over: then a call that does not end by itself never will.
///
/// # Errors
/// [`net::Error`] when the wait for the peer failed; the call is then in an unknown state, and its connection must be dropped.
pub fn drive<T>(
    pipe: &Pipe,
    deadline: Deadline,
    mut connection: impl FnMut(&mut Context<'_>) -> bool,
    call: impl Future<Output = T>,
) -> Result<T, net::Error> {
    let flag = Arc::new(Flag::default());
    let waker = Waker::from(Arc::clone(&flag));
    let mut context = Context::from_waker(&waker);
    let mut call = pin!(call);
    loop {
        let is_over = connection(&mut context);
        if let Poll::Ready(value) = call.as_mut().poll(&mut context) {
            return Ok(value);
        }
        if flag.take() {
            continue;
        }
        if is_over {
            return Err(net::Error::Closed);
        }
        pipe.fill(deadline)?;
    }
}
