//! A relay between an agent and its runtime, which measures how long the runtime was at work: what is left of a start is kakuri's own.
//!
//! It looks at the headers of the HTTP/2 frames that pass (RFC 9113 section 4.1). A call begins with the last byte of its request and
//! ends with the end of its answer. The relay's own two hops for each call, some 20 us, count as kakuri's.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use kakuri::deadline::Stopwatch;

/// The time during which at least one call was at the runtime.
#[derive(Default)]
pub(crate) struct Meter(Mutex<Busy>);

#[derive(Default)]
struct Busy {
    open: u32,
    since: Option<Stopwatch>,
    total: Duration,
}

impl Meter {
    /// Since the relay began, the calls at the runtime right now included.
    pub(crate) fn busy(&self) -> Duration {
        let busy = self.lock();
        busy.total + busy.since.map(|since| since.elapsed()).unwrap_or_default()
    }

    fn begin(&self) {
        let mut busy = self.lock();
        busy.open += 1;
        busy.since.get_or_insert_with(Stopwatch::start);
    }

    fn end(&self) {
        let mut busy = self.lock();
        busy.open -= 1;
        if busy.open == 0 {
            let since = busy.since.take();
            busy.total += since.map(|since| since.elapsed()).unwrap_or_default();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Busy> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Relays connections to `path` on to `upstream`, until the process ends.
///
/// # Errors
/// When it cannot listen.
pub(crate) fn start(path: &Path, upstream: &Path) -> io::Result<Arc<Meter>> {
    let listener = UnixListener::bind(path)?;
    let meter = Arc::new(Meter::default());
    let (upstream, shared) = (upstream.to_owned(), Arc::clone(&meter));
    thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            // An upstream that is down shows as a connection that ends at once.
            let _ = UnixStream::connect(&upstream).and_then(|far| join(near, far, &shared));
        }
    });
    Ok(meter)
}

/// One connection, on which there is one call at a time.
struct Call {
    meter: Arc<Meter>,
    is_open: AtomicBool,
}

impl Call {
    fn begin(&self) {
        if !self.is_open.swap(true, Ordering::AcqRel) {
            self.meter.begin();
        }
    }

    fn end(&self) {
        if self.is_open.swap(false, Ordering::AcqRel) {
            self.meter.end();
        }
    }
}

fn join(near: UnixStream, far: UnixStream, meter: &Arc<Meter>) -> io::Result<()> {
    let call = Arc::new(Call { meter: Arc::clone(meter), is_open: AtomicBool::new(false) });
    let (near_too, far_too, call_too) = (near.try_clone()?, far.try_clone()?, Arc::clone(&call));
    thread::spawn(move || {
        copy(near, far, Frames { skip: PREFACE_BYTES, ..Frames::default() }, |frame| match *frame {
            // The empty message is the request for events: a stream, which is never over.
            Frame { kind: DATA, flags, length: 6.. } if flags & END_STREAM != 0 => call.begin(),
            Frame { kind: RST_STREAM, .. } => call.end(),
            _ => {}
        });
        call.end();
    });
    thread::spawn(move || {
        copy(far_too, near_too, Frames::default(), |frame| match *frame {
            Frame { kind: DATA | HEADERS, flags, .. } if flags & END_STREAM != 0 => call_too.end(),
            Frame { kind: RST_STREAM, .. } => call_too.end(),
            _ => {}
        });
    });
    Ok(())
}

fn copy(mut from: UnixStream, mut to: UnixStream, mut frames: Frames, mut seen: impl FnMut(&Frame)) {
    let mut buffer = [0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        frames.push(&buffer[..read], &mut seen);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    // Either side may be closed already.
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// What a client sends before its first frame (RFC 9113 section 3.4).
const PREFACE_BYTES: usize = 24;
const HEADER_BYTES: usize = 9;
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
pub(crate) const END_STREAM: u8 = 1;

/// The header of a frame.
pub(crate) struct Frame {
    /// Of the payload.
    pub(crate) length: usize,
    /// Its type.
    pub(crate) kind: u8,
    /// What they mean depends on the type.
    pub(crate) flags: u8,
}

/// Finds the frames in the bytes of one direction.
#[derive(Default)]
pub(crate) struct Frames {
    /// Bytes to come that are no frame header.
    skip: usize,
    /// Of a header, what came so far.
    header: Vec<u8>,
}

impl Frames {
    /// Takes what came, and shows the frame headers that became complete.
    pub(crate) fn push(&mut self, mut bytes: &[u8], seen: &mut impl FnMut(&Frame)) {
        loop {
            bytes = {
                let skipped = self.skip.min(bytes.len());
                self.skip -= skipped;
                &bytes[skipped..]
            };
            let taken = (HEADER_BYTES - self.header.len()).min(bytes.len());
            self.header.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            let [a, b, c, kind, flags, ..] = self.header[..] else { return };
            if self.header.len() < HEADER_BYTES {
                return;
            }
            let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            seen(&Frame { length, kind, flags });
            self.header.clear();
            self.skip = length;
        }
    }
}
