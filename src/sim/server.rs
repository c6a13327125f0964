//! gRPC's server side: many calls at a time on one HTTP/2 connection, each on a thread of its own.
//!
//! ```text
//! reader --- bytes ----+                    +--- call ---> worker (at most SIM_WORKERS_MAX; more calls wait)
//!                      v                    |                |
//!                  [ inbox ] --> driver ----+                |
//!                      ^         polls h2, writes the socket |
//!                      +------------- answer ----------------+
//! ```
//! The driver alone touches `h2`. It waits in one place, for the inbox.
//!
//! Invariant: a message is handed to `h2` only as far as the client's window is open.
//! Invariant: threads of a connection end with it: the scope they live in joins them.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread::{self, Scope};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use h2::server::{Connection, Handshake, SendResponse};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};

use super::authority::Filter;
use super::machine::{Call, Machine};
use super::methods;
use crate::deadline::Deadline;
use crate::grpc::pump::{Flag, Pipe};
use crate::grpc::{Code, ErrorKind, Status, frame, status};
use crate::limits;
use crate::net::listen::Service;
use crate::net::{self, Stream};
use crate::report::{Chain, clip};

/// What a call sends; `End` comes last.
#[derive(Debug)]
pub(super) enum Answer {
    End(End),
    /// GOAWAY for the connection.
    GoAway,
    /// A framed message; the head alone when it is empty.
    Item(Bytes),
}

/// How a call ends.
#[derive(Debug)]
pub(super) enum End {
    /// Without a status.
    Bare,
    /// With its connection.
    Drop,
    /// With a status of HTTP instead of gRPC.
    Http(u16),
    Reset(Reason),
    Status(Status),
}

/// What the driver waits for.
enum Note {
    Answer(u32, Answer),
    Bytes(Vec<u8>),
    /// The client sends no more.
    Ended,
}

/// A call and its message.
type Job = (Arc<Call>, Vec<u8>);

/// A call's way to its client.
pub(super) struct Outbox<'a> {
    call: &'a Call,
    notes: &'a Sender<Note>,
}

impl Outbox<'_> {
    pub(super) fn send(&self, answer: Answer) {
        // A driver that is gone has nobody to answer to.
        let _ = self.notes.send(Note::Answer(self.call.stream, answer));
    }

    /// Sends a message of a stream and waits until it is on its way; false when the stream is gone.
    pub(super) fn send_and_wait(&self, message: Bytes) -> bool {
        self.send(Answer::Item(message));
        self.call.wait_sent()
    }
}

/// Serves CRI on the connections of a listener.
#[derive(Debug)]
pub(super) struct Front(pub(super) Arc<Machine>);

impl Service for Front {
    fn serve(&self, stream: Stream, stopping: &AtomicBool) {
        if let Err(error) = serve(&self.0, stream, stopping) {
            log::debug!("connection: {}", Chain(&error));
        }
    }

    fn busy(&self) -> &'static [u8] {
        // An empty SETTINGS frame, then GOAWAY with ENHANCE_YOUR_CALM (RFC 9113, sections 6.5 and 6.8).
        b"\0\0\0\x04\0\0\0\0\0\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x0b"
    }
}

fn serve(machine: &Machine, stream: Stream, stopping: &AtomicBool) -> Result<(), net::Error> {
    let mut incoming = stream.try_clone()?;
    let closing = stream.try_clone()?;
    let deadline = Deadline::within_ms(limits::WRITE_MS_MAX, "handshake");
    let pipe = Pipe::new(stream, deadline);
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(limits::GRPC_WINDOW_BYTES)
        .initial_connection_window_size(limits::GRPC_WINDOW_BYTES)
        .max_concurrent_streams(limits::SIM_STREAMS_MAX)
        .max_header_list_size(64 * 1024);
    let mut handshake = builder.handshake(pipe.clone());
    let (notes, inbox) = bounded(limits::SIM_CHUNKS_MAX);
    thread::scope(|scope| {
        let reader = notes.clone();
        named("cri-read").spawn_scoped(scope, move || read(&mut incoming, &reader)).map_err(net::Error::Io)?;
        let outcome = shake_hands(&mut handshake, &pipe, &inbox, deadline).map(|h2| {
            let (calls, waiting, live) = (bounded(limits::SIM_WORKERS_MAX), VecDeque::new(), BTreeMap::new());
            let mut driver = Driver { machine, scope, h2, pipe, notes, waiting, calls, workers: 0, busy: 0, live };
            driver.run(&inbox, stopping);
            driver.live.values().for_each(|live| machine.cancel(&live.call));
        });
        // Ends the reader's wait for the socket; all waits for the inbox end as it is dropped.
        closing.shutdown(Shutdown::Both);
        drop(inbox);
        outcome
    })
}

fn named(name: &str) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(limits::STACK_BYTES)
}

fn read(stream: &mut Stream, notes: &Sender<Note>) {
    let mut buffer = vec![0; 16 * 1024];
    let mut filter = Filter::default();
    loop {
        let bytes = match stream.read(&mut buffer, Deadline::within_ms(limits::IDLE_MS_MAX, "idle")) {
            Ok(n @ 1..) => filter.pass(buffer.get(..n).unwrap_or_default()),
            Err(net::Error::Expired(_)) => continue, // A runtime's client may be silent for as long as it likes.
            Ok(0) | Err(_) => {
                let _ = notes.send(Note::Ended); // A driver that is gone knows.
                return;
            }
        };
        if !bytes.is_empty() && notes.send(Note::Bytes(bytes)).is_err() {
            return;
        }
    }
}

/// Drives the handshake on what the reader brings.
fn shake_hands(
    handshake: &mut Handshake<Pipe, Bytes>,
    pipe: &Pipe,
    inbox: &Receiver<Note>,
    deadline: Deadline,
) -> Result<Connection<Pipe, Bytes>, net::Error> {
    let mut context = Context::from_waker(Waker::noop());
    loop {
        // It waits for nothing but the pipe, so what is `Pending` stays so until more was fed.
        if let Poll::Ready(shaken) = Pin::new(&mut *handshake).poll(&mut context) {
            return shaken.map_err(|error| net::Error::Io(io::Error::other(error)));
        }
        match inbox.recv_timeout(deadline.left()?) {
            Ok(Note::Bytes(bytes)) => pipe.feed(&bytes),
            Ok(Note::Answer(..) | Note::Ended) => return Err(net::Error::Closed),
            Err(_) => return Err(deadline.expired().into()),
        }
    }
}

struct Driver<'scope, 'env> {
    machine: &'env Machine,
    scope: &'scope Scope<'scope, 'env>,
    h2: Connection<Pipe, Bytes>,
    pipe: Pipe,
    notes: Sender<Note>,
    /// Calls that want a worker, and their messages.
    waiting: VecDeque<Job>,
    /// From the driver to the workers.
    calls: (Sender<Job>, Receiver<Job>),
    workers: usize,
    /// Calls that have a worker.
    busy: usize,
    live: BTreeMap<u32, Live>,
}

impl Driver<'_, '_> {
    /// Drives the connection to its end.
    fn run(&mut self, inbox: &Receiver<Note>, stopping: &AtomicBool) {
        let flag = Arc::new(Flag::default());
        let waker = Waker::from(Arc::clone(&flag));
        let mut context = Context::from_waker(&waker);
        let mut drain: Option<Deadline> = None;
        loop {
            self.pipe.begin_call(Deadline::within_ms(limits::WRITE_MS_MAX, "write"));
            loop {
                let accepted = pin!(self.h2.accept()).poll(&mut context);
                match accepted {
                    Poll::Ready(Some(Ok((request, respond)))) => self.admit(request, respond),
                    Poll::Ready(end) => return log::debug!("connection over: {:?}", end.map(|result| result.err())),
                    Poll::Pending => break,
                }
            }
            self.progress(&mut context);
            if flag.take() {
                continue;
            }
            let first = match drain {
                None => inbox.recv().ok(),
                Some(deadline) if !self.live.is_empty() => deadline.left().ok().and_then(|left| inbox.recv_timeout(left).ok()),
                Some(_) => None,
            };
            let Some(first) = first else { return };
            for note in std::iter::once(first).chain(inbox.try_iter()) {
                match note {
                    Note::Answer(_, Answer::End(End::Drop)) => return,
                    Note::Answer(_, Answer::GoAway) => self.h2.graceful_shutdown(),
                    Note::Answer(stream, answer) => self.take(stream, answer),
                    Note::Bytes(bytes) => self.pipe.feed(&bytes),
                    Note::Ended if stopping.load(Ordering::SeqCst) => {
                        // Only our reading side was shut: answers still leave, as far as the window was open. Calls that wait
                        // end now; those that no worker has yet are not begun.
                        drain = Some(Deadline::within_ms(limits::SIM_DRAIN_MS, "drain"));
                        self.live.retain(|_, live| live.request.is_none());
                        self.live.values().for_each(|live| self.machine.cancel(&live.call));
                        for (call, _) in self.waiting.drain(..) {
                            self.live.remove(&call.stream);
                        }
                    }
                    Note::Ended => self.pipe.feed(&[]),
                }
            }
        }
    }

    /// A new stream: refused at once, or live.
    fn admit(&mut self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let (head, body) = request.into_parts();
        let is_grpc = head.headers.get("content-type").is_some_and(|v| v.as_bytes().starts_with(b"application/grpc"));
        if !is_grpc {
            return send_head(&mut respond, StatusCode::UNSUPPORTED_MEDIA_TYPE, HeaderMap::new());
        }
        let method = methods::at(head.uri.path());
        let ms = timeout_ms(&head.headers).ok_or(status_of(Code::Internal, "malformed grpc-timeout"));
        let (method, ms) = match method.and_then(|method| ms.map(|ms| (method, ms))) {
            Ok(both) => both,
            Err(status) => return end_at_once(&mut respond, &status),
        };
        let stream = respond.stream_id().as_u32();
        let call = Arc::new(Call::new(method, stream, Deadline::within_ms(ms, "grpc-timeout")));
        let request = Some((body, frame::Decoder::default()));
        let live =
            Live { call, request, message: None, respond, sending: None, unsent: VecDeque::new(), owes: false, end: None, is_over: false };
        self.live.insert(stream, live);
    }

    /// Moves every live call as far as it goes.
    fn progress(&mut self, context: &mut Context<'_>) {
        for live in self.live.values_mut() {
            match live.receive(context) {
                Poll::Ready(Ok(message)) => self.waiting.push_back((Arc::clone(&live.call), message)),
                Poll::Ready(Err(status)) => live.end = Some(End::Status(status)),
                Poll::Pending => {}
            }
            live.pump(context);
            if !live.is_over && live.is_reset(context) {
                self.machine.cancel(&live.call);
                live.is_over = true;
            }
        }
        self.live.retain(|_, live| !live.is_over);
        self.waiting.retain(|(call, _)| !call.is_cancelled());
        while !self.waiting.is_empty() && self.busy < limits::SIM_WORKERS_MAX {
            if self.busy == self.workers {
                let (machine, calls, notes) = (self.machine, self.calls.1.clone(), self.notes.clone());
                let work =
                    move || calls.iter().for_each(|(call, message)| machine.serve(&call, &message, &Outbox { call: &call, notes: &notes }));
                match named("cri-call").spawn_scoped(self.scope, work) {
                    Ok(_) => self.workers += 1, // The scope joins it.
                    Err(error) => return log::error!("no thread for a call, it waits: {error}"),
                }
            }
            self.busy += 1;
            // There is room: at most SIM_WORKERS_MAX are busy.
            let _ = self.waiting.pop_front().map(|job| self.calls.0.try_send(job));
        }
    }

    /// Takes a piece of a call's answer. The next turn sends it.
    fn take(&mut self, stream: u32, answer: Answer) {
        self.busy -= usize::from(matches!(answer, Answer::End(_)));
        let Some(live) = self.live.get_mut(&stream) else { return };
        match answer {
            Answer::End(end) => live.end = Some(end),
            Answer::GoAway => {} // Concerns the connection.
            Answer::Item(message) => live.add(message),
        }
    }
}

/// A call whose stream is open.
struct Live {
    call: Arc<Call>,
    /// Until the request is complete.
    request: Option<(RecvStream, frame::Decoder)>,
    message: Option<Vec<u8>>,
    respond: SendResponse<Bytes>,
    /// From the head of the response on.
    sending: Option<SendStream<Bytes>>,
    unsent: VecDeque<Bytes>,
    /// A worker waits until nothing is unsent.
    owes: bool,
    end: Option<End>,
    is_over: bool,
}

impl Live {
    /// Takes what came of the request; its message when that is complete.
    fn receive(&mut self, context: &mut Context<'_>) -> Poll<Result<Vec<u8>, Status>> {
        let Some((body, decoder)) = &mut self.request else { return Poll::Pending };
        let received = loop {
            let Poll::Ready(chunk) = body.poll_data(context) else { return Poll::Pending };
            let Some(chunk) = chunk else {
                let message = self.message.take().filter(|_| decoder.is_empty());
                break message.ok_or(status_of(Code::Internal, "the request is not one message"));
            };
            let Ok(chunk) = chunk else { return Poll::Pending }; // The stream was reset, which `is_reset` finds.
            ignore(body.flow_control().release_capacity(chunk.len()));
            decoder.push(&chunk);
            match decoder.take() {
                Ok(message) if self.message.is_none() => self.message = message,
                Ok(_) => break Err(status_of(Code::Internal, "the request is more than one message")),
                Err(ErrorKind::TooLarge { bytes }) => break Err(too_large("received", bytes)),
                Err(_) => break Err(status_of(Code::Unimplemented, "compression is not supported")),
            }
        };
        self.request = None;
        Poll::Ready(received)
    }

    /// Takes a message of the answer, and sends the head if it is the first.
    fn add(&mut self, message: Bytes) {
        if self.sending.is_none() {
            match self.respond.send_response(head_of(StatusCode::OK, HeaderMap::new()), false) {
                Ok(sending) => self.sending = Some(sending),
                Err(error) => return log::debug!("stream: {error}"), // Reset, which `is_reset` finds.
            }
        }
        if !message.is_empty() {
            self.unsent.push_back(message);
            self.owes = true;
        }
    }

    /// Sends as much as the client's window takes, and the end after all else.
    fn pump(&mut self, context: &mut Context<'_>) {
        while let (Some(message), Some(sending)) = (self.unsent.front_mut(), &mut self.sending) {
            sending.reserve_capacity(message.len());
            if sending.capacity() == 0 && (sending.poll_capacity(context).is_pending() || sending.capacity() == 0) {
                return;
            }
            let part = message.split_to(sending.capacity().min(message.len()));
            if let Err(error) = sending.send_data(part, false) {
                return log::debug!("stream: {error}");
            }
            if message.is_empty() {
                self.unsent.pop_front();
            }
        }
        if std::mem::take(&mut self.owes) {
            self.call.sent();
        }
        let Some(end) = self.end.take() else { return };
        self.is_over = true;
        match (end, &mut self.sending) {
            (End::Reset(reason), Some(sending)) => sending.send_reset(reason),
            (End::Reset(reason), None) => self.respond.send_reset(reason),
            (End::Status(status), Some(sending)) => ignore(sending.send_trailers(trailers(&status))),
            (End::Status(status), None) => end_at_once(&mut self.respond, &status),
            (End::Http(code), None) => send_head(&mut self.respond, StatusCode::from_u16(code).unwrap_or_default(), HeaderMap::new()),
            (End::Bare | End::Drop | End::Http(_), Some(sending)) => ignore(sending.send_data(Bytes::new(), true)),
            (End::Bare | End::Drop, None) => send_head(&mut self.respond, StatusCode::OK, HeaderMap::new()),
        }
    }

    fn is_reset(&mut self, context: &mut Context<'_>) -> bool {
        match &mut self.sending {
            Some(sending) => sending.poll_reset(context).is_ready(),
            None => self.respond.poll_reset(context).is_ready(),
        }
    }
}

/// A send on a stream fails when the client reset it, and then nobody waits for what was sent.
fn ignore(result: Result<impl Sized, h2::Error>) {
    if let Err(error) = result {
        log::debug!("stream: {error}");
    }
}

fn send_head(respond: &mut SendResponse<Bytes>, status: StatusCode, headers: HeaderMap) {
    ignore(respond.send_response(head_of(status, headers), true));
}

/// The status travels in the head, and nothing follows ("Trailers-Only").
fn end_at_once(respond: &mut SendResponse<Bytes>, status: &Status) {
    send_head(respond, StatusCode::OK, trailers(status));
}

fn head_of(status: StatusCode, headers: HeaderMap) -> Response<()> {
    let mut head = Response::new(());
    *head.status_mut() = status;
    *head.headers_mut() = headers;
    let kind = if status == StatusCode::OK { "application/grpc" } else { "text/plain" };
    head.headers_mut().insert("content-type", HeaderValue::from_static(kind));
    head
}

fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(status.code as u16));
    let message = clip(status.message.clone(), limits::GRPC_STATUS_MESSAGE_BYTES_MAX);
    // What is encoded is printable, so it is a header.
    if let (false, Ok(message)) = (message.is_empty(), HeaderValue::try_from(status::encode_message(&message))) {
        trailers.insert("grpc-message", message);
    }
    trailers
}

fn status_of(code: Code, message: &str) -> Status {
    Status { code, message: message.to_owned() }
}

/// In the words of grpc-go.
pub(super) fn too_large(what: &str, bytes: u64) -> Status {
    let message = format!("{what} message larger than max ({bytes} vs. {})", limits::GRPC_MESSAGE_BYTES_MAX);
    Status { code: Code::ResourceExhausted, message }
}

/// `grpc-timeout` in milliseconds, a day when there is none; `None` when it is malformed.
fn timeout_ms(headers: &HeaderMap) -> Option<u64> {
    let Some(value) = headers.get("grpc-timeout") else { return Some(methods::DAY_MS) };
    let (unit, digits) = value.as_bytes().split_last()?;
    let number: u64 = std::str::from_utf8(digits).ok().filter(|text| text.len() <= 8)?.parse().ok()?;
    let ms = match unit {
        b'H' => number.saturating_mul(3_600_000),
        b'M' => number.saturating_mul(60_000),
        b'S' => number.saturating_mul(1000),
        b'm' => number,
        b'u' => number.div_ceil(1000),
        b'n' => number.div_ceil(1_000_000),
        _ => return None,
    };
    Some(ms.min(methods::DAY_MS))
}
