//! One connection: read a request, handle it, write the response, again.
//!
//! The head has one deadline from its first byte and the body one from its head, so a client that drips bytes gains no time. After a
//! [`Reject`] nobody knows where the next request would begin, so the connection ends. It ends by lingering (RFC 9112 section 9.6):
//! closing with unread bytes would make the kernel reset the connection and the client might never see the response.
//!
//! Invariant: bytes held besides a body <= `HTTP_HEAD_BYTES_MAX` + `READ_BYTES`; an idle connection holds <= `IDLE_BYTES`.
//! *Not here*: panics of a handler, which end the thread and are counted there.

#[cfg(test)]
mod tests;

use std::net::Shutdown;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::parse::{self, Chunks, Framing, Head, Reject, Version};
use super::response::{Body, ChunkWriter, Delivery, Response, Status};
use super::{Client, Handler, Method};
use crate::deadline::{Deadline, Stopwatch, Timestamp};
use crate::limits;
use crate::net::{self, Stream};
use crate::report::Chain;

/// A complete response for a connection that gets no slot. It has no `Date`: it is made once.
pub fn busy() -> &'static [u8] {
    static BUSY: LazyLock<Vec<u8>> = LazyLock::new(|| {
        const BODY: &str = "{\"type\":\"about:blank\",\"title\":\"Service Unavailable\",\"status\":503,\"code\":\"too_many_connections\",\
            \"detail\":\"all connection slots are taken; try again later\"}";
        let head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 1\r\n\
            X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nConnection: close\r\n";
        format!("{head}Content-Length: {}\r\n\r\n{BODY}", BODY.len()).into_bytes()
    });
    &BUSY
}

/// Serves `stream` to its end: a request at a time, until either side is done. When `stopping` is set, the response in the making
/// is the last one.
pub fn serve(stream: Stream, handler: &dyn Handler, stopping: &AtomicBool) {
    Connection::new(stream, Patience::default()).run(handler, stopping);
}

/// How long a connection waits, for what.
#[derive(Clone, Copy, Debug)]
struct Patience {
    idle_ms: u64,
    head_ms: u64,
    body_ms: u64,
    write_ms: u64,
    linger_ms: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            idle_ms: limits::HTTP_IDLE_MS_MAX,
            head_ms: limits::HTTP_HEAD_MS_MAX,
            body_ms: limits::HTTP_BODY_MS_MAX,
            write_ms: limits::WRITE_MS_MAX,
            linger_ms: limits::LINGER_MS_MAX,
        }
    }
}

/// One read takes at most this much.
const READ_BYTES: usize = 8 * 1024;
/// What the buffer shrinks back to between requests.
const IDLE_BYTES: usize = 4 * 1024;

struct Connection {
    stream: Stream,
    /// Read and not yet understood.
    buffer: Vec<u8>,
    read_bytes: usize,
    requests_left: u32,
    peer: String,
    is_over_loopback: bool,
    patience: Patience,
}

/// Why there is no request.
enum Fault {
    Net(net::Error),
    Reject(Reject),
}

impl From<net::Error> for Fault {
    fn from(error: net::Error) -> Self {
        Self::Net(error)
    }
}

impl From<Reject> for Fault {
    fn from(reject: Reject) -> Self {
        Self::Reject(reject)
    }
}

impl Connection {
    fn new(stream: Stream, patience: Patience) -> Self {
        Self {
            buffer: Vec::with_capacity(IDLE_BYTES),
            read_bytes: READ_BYTES,
            requests_left: limits::HTTP_REQUESTS_PER_CONNECTION_MAX,
            peer: stream.peer(),
            is_over_loopback: stream.is_over_loopback(),
            stream,
            patience,
        }
    }

    fn run(mut self, handler: &dyn Handler, stopping: &AtomicBool) {
        if let Err(error) = self.converse(handler, stopping) {
            log::debug!("{}: {}", self.peer, Chain(&error));
        }
        // The listener has a clone of this socket, so dropping ours would not end it.
        self.stream.shutdown(Shutdown::Both);
    }

    fn converse(&mut self, handler: &dyn Handler, stopping: &AtomicBool) -> Result<(), net::Error> {
        loop {
            self.requests_left = self.requests_left.saturating_sub(1);
            let (response, delivery) = match self.receive(stopping) {
                Ok(None) => return Ok(()),
                Ok(Some(head)) => {
                    let response = handler.handle(&head.request, &mut Asker::new(self, head.version, stopping));
                    // Asked after the handler, which may have taken its time.
                    let keep_alive = head.keep_alive && self.requests_left > 0 && !stopping.load(Ordering::SeqCst);
                    (response, Delivery { is_head: head.request.method == Method::Head, version: head.version, keep_alive })
                }
                Err(Fault::Reject(reject)) => {
                    let delivery = Delivery { is_head: false, version: Version::Http11, keep_alive: false };
                    (handler.reject(&reject), delivery)
                }
                Err(Fault::Net(error)) => return Err(error),
            };
            if !self.send(response, delivery)? {
                self.stream.linger(limits::LINGER_BYTES_MAX, Deadline::within_ms(self.patience.linger_ms, "linger"));
                return Ok(());
            }
            self.buffer.shrink_to(IDLE_BYTES);
        }
    }

    /// The next request, body included; `None` when the client is done.
    fn receive(&mut self, stopping: &AtomicBool) -> Result<Option<Head>, Fault> {
        let Some(mut head) = self.receive_head(stopping)? else { return Ok(None) };
        head.request.peer.clone_from(&self.peer);
        head.request.is_over_loopback = self.is_over_loopback;
        let deadline = Deadline::within_ms(self.patience.body_ms, "body");
        if head.expects_continue && !matches!(head.framing, Framing::None | Framing::Length(0)) {
            let deadline = deadline.at_most_ms(self.patience.write_ms, "write");
            self.stream.write_all(CONTINUE, deadline)?;
        }
        let body = &mut head.request.body;
        let mut chunks = Chunks::new();
        loop {
            let is_over = match head.framing {
                Framing::None => true,
                Framing::Length(length) => {
                    let missing = length.saturating_sub(body.len()).min(self.buffer.len());
                    body.extend(self.buffer.drain(..missing));
                    body.len() == length
                }
                Framing::Chunked => {
                    let used = chunks.decode(&self.buffer, body)?;
                    self.buffer.drain(..used);
                    chunks.is_over()
                }
            };
            if is_over {
                return Ok(Some(head));
            }
            match self.fill(deadline) {
                Ok(0) => return Err(ended_early(stopping)),
                Ok(_) => {}
                Err(net::Error::Expired(_)) => return Err(Reject::BodyTime.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn receive_head(&mut self, stopping: &AtomicBool) -> Result<Option<Head>, Fault> {
        let idle = Deadline::within_ms(self.patience.idle_ms, "next request");
        let mut begun = None;
        loop {
            self.buffer.drain(..parse::blank(&self.buffer));
            if let Some((used, head)) = parse::head(&self.buffer)? {
                self.buffer.drain(..used);
                return Ok(Some(head));
            }
            let is_idle = self.buffer.is_empty();
            let deadline = if is_idle { idle } else { *begun.get_or_insert_with(|| Deadline::within_ms(self.patience.head_ms, "head")) };
            match self.fill(deadline) {
                Ok(0) if is_idle => return Ok(None),
                Ok(0) => return Err(ended_early(stopping)),
                Ok(_) => {}
                Err(net::Error::Expired(_)) if is_idle => return Ok(None),
                Err(net::Error::Expired(_)) => return Err(Reject::HeadTime.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn fill(&mut self, deadline: Deadline) -> Result<usize, net::Error> {
        let mut bytes = [0; READ_BYTES];
        let read = self.stream.read(bytes.get_mut(..self.read_bytes).unwrap_or_default(), deadline)?;
        self.buffer.extend_from_slice(bytes.get(..read).unwrap_or_default());
        Ok(read)
    }

    /// Writes a response; says whether another may follow it.
    fn send(&mut self, response: Response, delivery: Delivery) -> Result<bool, net::Error> {
        let is_ended_by_close = matches!(response.body, Body::Stream(_)) && delivery.version == Version::Http10;
        let delivery = Delivery { keep_alive: delivery.keep_alive && !is_ended_by_close, ..delivery };
        let mut bytes = response.head(&delivery, Timestamp::now());
        let is_bodiless = delivery.is_head || response.status == Status::NoContent;
        let producer = match response.body {
            Body::Full(body) if !is_bodiless => {
                bytes.extend_from_slice(&body);
                None
            }
            Body::Stream(producer) if !is_bodiless => Some(producer),
            Body::Empty | Body::Full(_) | Body::Stream(_) => None,
        };
        let write_ms = self.patience.write_ms;
        self.stream.write_all(&bytes, Deadline::within_ms(write_ms, "write"))?;
        if let Some(producer) = producer {
            let mut writer = ChunkWriter { stream: &mut self.stream, ahead: &mut self.buffer, version: delivery.version, write_ms };
            producer(&mut writer)?;
            writer.finish()?;
        }
        Ok(delivery.keep_alive)
    }
}

/// The client whose request is being handled.
///
/// One that left and one that only closed its sending side look the same until something is written. What may be written before a
/// response is `100 Continue`, which a client that did not ask for it discards (RFC 9110 section 15.2.1): to one that left, the
/// second of them fails.
struct Asker<'a> {
    stream: &'a mut Stream,
    /// Bytes of the next requests, read meanwhile.
    ahead: &'a mut Vec<u8>,
    version: Version,
    stopping: &'a AtomicBool,
    write_ms: u64,
    /// How often one that closed its sending side was written to, and when last.
    probes: u32,
    last_probe: Stopwatch,
}

/// To one that left, the first is in vain and the second fails.
const QUICK_PROBES: u32 = 2;

impl<'a> Asker<'a> {
    fn new(connection: &'a mut Connection, version: Version, stopping: &'a AtomicBool) -> Self {
        let Connection { stream, buffer: ahead, patience, .. } = connection;
        Self { stream, ahead, version, stopping, write_ms: patience.write_ms, probes: 0, last_probe: Stopwatch::start() }
    }

    /// Whether nobody reads any more at the other end, whose sending side is closed.
    fn is_gone(&mut self) -> bool {
        // It knows no interim responses (RFC 9110 section 15.2), so nothing tells whether it is there: it gets its answer now.
        if self.version == Version::Http10 {
            return true;
        }
        let pause_ms = match self.probes {
            0 => 0,
            1..QUICK_PROBES => limits::HEARTBEAT_HALF_CLOSED_MS,
            _ => limits::HEARTBEAT_MS,
        };
        if self.last_probe.elapsed_ms() < pause_ms {
            return false;
        }
        (self.probes, self.last_probe) = (self.probes.saturating_add(1), Stopwatch::start());
        self.stream.write_all(CONTINUE, Deadline::within_ms(self.write_ms, "write")).is_err()
    }
}

impl Client for Asker<'_> {
    fn is_over(&mut self) -> bool {
        // A stopping server ends the reading side itself.
        if self.stopping.load(Ordering::SeqCst) {
            return true;
        }
        // A client that pipelines without end is there, and its bytes may wait in the socket.
        if self.ahead.len() >= limits::HTTP_HEAD_BYTES_MAX {
            return false;
        }
        let mut bytes = [0; 512];
        match self.stream.read_ready(&mut bytes) {
            Ok(None) => false,
            Ok(Some(0)) => self.is_gone(),
            Ok(Some(read)) => {
                self.ahead.extend_from_slice(bytes.get(..read).unwrap_or_default());
                false
            }
            Err(_) => true,
        }
    }
}

const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// A stopping server ends the reading side itself, and then the request is none of the client's fault.
fn ended_early(stopping: &AtomicBool) -> Fault {
    Fault::Reject(if stopping.load(Ordering::SeqCst) { Reject::Stopping } else { Reject::Truncated })
}
