//! Calls on a server behind a Unix socket: headers, message, trailers, and the pool of connections they run on.
//!
//! Invariant: the deadline of a call bounds connecting, sending, waiting and receiving together, and travels as `grpc-timeout`.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::task::Context;

use bytes::Bytes;
use h2::client::{Connection as H2Connection, SendRequest};
use h2::{Reason, RecvStream};
use http::{HeaderMap, Request};

use super::pump::{Pipe, drive};
use super::status::{Code, Status, decode_message};
use super::{Error, ErrorKind, frame};
use crate::deadline::Deadline;
use crate::limits;
use crate::net::{self, Address, Stream};

/// A remote procedure.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// `/package.Service/Name`.
    pub path: &'static str,
    /// Doing it twice is doing it once, so it may be repeated when a connection broke in the middle.
    pub idempotent: bool,
}

impl Method {
    /// The part after the last slash.
    pub fn name(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }
}

/// A server at a Unix socket, and idle connections to it.
#[derive(Debug)]
pub struct Channel {
    address: Address,
    /// Invariant: `idle.len() <= GRPC_POOL_MAX`.
    idle: Mutex<Vec<Connection>>,
}

/// How an attempt on one connection failed.
struct Failure {
    kind: ErrorKind,
    /// The server cannot have seen the request.
    unseen: bool,
}

impl Channel {
    /// A channel to the socket at `path`; connects when first used.
    pub fn new(path: PathBuf) -> Self {
        Self { address: Address::Unix(path), idle: Mutex::default() }
    }

    /// Calls a unary method and returns the message of the answer.
    ///
    /// # Errors
    /// [`Error`]; [`Error::is_in_doubt`] tells whether the call may have taken effect.
    pub fn unary(&self, method: Method, message: &[u8], deadline: Deadline) -> Result<Vec<u8>, Error> {
        let fail = |kind| Error { method: method.name(), kind };
        let message = frame::encode(message).map_err(fail)?;
        let mut repeats = 0;
        loop {
            let mut connection = self.connection(deadline).map_err(fail)?;
            match connection.unary(method, &message, deadline) {
                Ok(answer) => {
                    self.keep(connection);
                    return Ok(answer);
                }
                Err(Failure { kind, unseen }) => {
                    if matches!(kind, ErrorKind::Status(_)) {
                        self.keep(connection);
                    }
                    let broken = matches!(kind, ErrorKind::Broken(_));
                    if repeats < REPEATS_MAX && (unseen || (broken && method.idempotent)) {
                        repeats += 1;
                        continue;
                    }
                    return Err(fail(kind));
                }
            }
        }
    }

    /// Calls a server-streaming method; `deadline` bounds connecting and sending the request, not the stream.
    ///
    /// # Errors
    /// [`Error`] when no connection could be made or the request not be sent.
    pub fn stream(&self, method: Method, message: &[u8], deadline: Deadline) -> Result<Messages, Error> {
        let fail = |kind| Error { method: method.name(), kind };
        let message = frame::encode(message).map_err(fail)?;
        let mut connection = Connection::open(&self.address, deadline).map_err(fail)?;
        let response = connection.begin(method, message, None, deadline).map_err(|failure| fail(failure.kind))?;
        connection.flush();
        Ok(Messages { method, connection, state: StreamState::Waiting(response), decoder: frame::Decoder::default() })
    }

    /// An idle connection on which nothing ended meanwhile, or a new one.
    fn connection(&self, deadline: Deadline) -> Result<Connection, ErrorKind> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut connection) = idle else { return Connection::open(&self.address, deadline) };
            // Between calls the server's SETTINGS, PING and GOAWAY wait in the socket, or its end.
            if connection.is_usable(deadline) {
                return Ok(connection);
            }
        }
    }

    fn keep(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if !connection.is_over && idle.len() < limits::GRPC_POOL_MAX {
            idle.push(connection);
        }
    }
}

/// Repeats of one call on fresh connections; a server that keeps closing is down.
const REPEATS_MAX: u32 = 2;

/// One HTTP/2 connection.
struct Connection {
    pipe: Pipe,
    requests: SendRequest<Bytes>,
    h2: H2Connection<Pipe, Bytes>,
    /// Nothing can be sent on it any more.
    is_over: bool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("is_over", &self.is_over).finish_non_exhaustive()
    }
}

impl Connection {
    fn open(address: &Address, deadline: Deadline) -> Result<Self, ErrorKind> {
        let stream = Stream::connect(address, deadline.phase("connect")).map_err(ErrorKind::Connect)?;
        let pipe = Pipe::new(stream, deadline);
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(limits::GRPC_WINDOW_BYTES)
            .initial_connection_window_size(limits::GRPC_WINDOW_BYTES)
            .max_header_list_size(limits::GRPC_HEADER_BYTES_MAX)
            .max_concurrent_streams(1);
        let handshake = builder.handshake::<_, Bytes>(pipe.clone());
        let (requests, h2) = match drive(&pipe, deadline.phase("handshake"), |_| false, handshake) {
            Ok(Ok(pair)) => pair,
            Ok(Err(error)) => return Err(pipe.take_write_error().map_or(ErrorKind::Broken(Some(error)), ErrorKind::Connect)),
            Err(error) => return Err(ErrorKind::Connect(error)),
        };
        Ok(Self { pipe, requests, h2, is_over: false })
    }

    /// Reads what came between calls, and lets h2 answer it.
    fn is_usable(&mut self, deadline: Deadline) -> bool {
        self.pipe.begin_call(deadline);
        if self.pipe.fill_ready().is_err() {
            return false;
        }
        let mut context = Context::from_waker(std::task::Waker::noop());
        poll_h2(&mut self.h2, &mut self.is_over, &mut context);
        !self.is_over && !matches!(self.requests.poll_ready(&mut context), std::task::Poll::Ready(Err(_)))
    }

    fn unary(&mut self, method: Method, message: &Bytes, deadline: Deadline) -> Result<Vec<u8>, Failure> {
        let response = self.begin(method, message.clone(), Some(deadline), deadline)?;
        self.run(deadline.phase("answer"), async {
            let (head, mut body) = response.await?.into_parts();
            if let Some(status) = check_head(head.status, &head.headers)? {
                return Err(CallError::Kind(status));
            }
            let mut decoder = frame::Decoder::default();
            let mut answer = None;
            while let Some(chunk) = body.data().await {
                let chunk = chunk?;
                decoder.push(&chunk);
                body.flow_control().release_capacity(chunk.len())?;
                while let Some(message) = decoder.take().map_err(CallError::Kind)? {
                    if answer.replace(message).is_some() {
                        return Err(CallError::rule("two messages answer a unary call"));
                    }
                }
            }
            check_trailers(body.trailers().await?)?;
            if !decoder.is_empty() {
                return Err(CallError::rule("the stream ends within a message"));
            }
            answer.ok_or(CallError::rule("status OK without a message"))
        })
    }

    /// Puts on the socket what h2 holds. An error comes up in the next step.
    fn flush(&mut self) {
        poll_h2(&mut self.h2, &mut self.is_over, &mut Context::from_waker(std::task::Waker::noop()));
    }

    /// Hands the request to h2. It leaves when the connection is polled next: by the step that waits for the answer, or by `flush`.
    fn begin(
        &mut self,
        method: Method,
        message: Bytes,
        timeout: Option<Deadline>,
        deadline: Deadline,
    ) -> Result<h2::client::ResponseFuture, Failure> {
        self.pipe.begin_call(deadline);
        let left = timeout.map(|t| t.left()).transpose().map_err(|e| Failure { kind: ErrorKind::Expired(e), unseen: true })?;
        let mut request = Request::builder()
            .method("POST")
            .uri(format!("http://localhost{}", method.path))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("user-agent", concat!("kakuri/", env!("CARGO_PKG_VERSION")));
        if let Some(left) = left {
            // At most eight digits; milliseconds reach to 27 hours.
            let ms = left.as_millis().clamp(1, 99_999_999);
            request = request.header("grpc-timeout", format!("{ms}m"));
        }
        let request = request.body(()).map_err(|_| Failure { kind: ErrorKind::Protocol("the method has no valid path"), unseen: true })?;
        let mut requests = self.requests.clone();
        self.run(deadline.phase("request"), async move {
            requests = requests.ready().await?;
            let (response, mut stream) = requests.send_request(request, false)?;
            stream.send_data(message, true)?;
            Ok(response)
        })
    }

    /// Drives one step of a call. Any failure but a status ends the connection.
    fn run<T>(&mut self, deadline: Deadline, step: impl Future<Output = Result<T, CallError>>) -> Result<T, Failure> {
        let Self { pipe, h2, is_over, .. } = self;
        let result = drive(pipe, deadline, |context| poll_h2(h2, is_over, context), step);
        let (kind, unseen) = match result {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(CallError::Kind(kind))) => {
                self.is_over |= !matches!(kind, ErrorKind::Status(_));
                return Err(Failure { kind, unseen: false });
            }
            Ok(Err(CallError::H2(error))) => match self.pipe.take_write_error() {
                Some(net::Error::Expired(expired)) => (ErrorKind::Expired(expired), false),
                // The kernel refuses the first byte to a socket whose other end is closed (unix(7), EPIPE).
                _ => (ErrorKind::Broken(Some(error)), self.pipe.is_unwritten()),
            },
            Err(net::Error::Expired(expired)) => (ErrorKind::Expired(expired), false),
            Err(net::Error::Closed | net::Error::Io(_)) => (ErrorKind::Broken(None), self.pipe.is_unwritten()),
        };
        self.is_over = true;
        let unseen = unseen || matches!(&kind, ErrorKind::Broken(Some(error)) if is_refused(error));
        Err(Failure { kind, unseen })
    }
}

/// Polls the connection, unless it is over: polled after its end it would panic. A failed write ends it without a word to its streams.
fn poll_h2(h2: &mut H2Connection<Pipe, Bytes>, is_over: &mut bool, context: &mut Context<'_>) -> bool {
    if !*is_over {
        *is_over = std::pin::Pin::new(h2).poll(context).is_ready();
    }
    *is_over
}

/// Whether the server says that it did not process the request: a graceful GOAWAY below our stream, or REFUSED_STREAM
/// (RFC 9113 sections 6.8 and 8.7).
fn is_refused(error: &h2::Error) -> bool {
    error.is_remote()
        && ((error.is_go_away() && error.reason() == Some(Reason::NO_ERROR))
            || (error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM)))
}

enum CallError {
    H2(h2::Error),
    Kind(ErrorKind),
}

impl CallError {
    fn rule(rule: &'static str) -> Self {
        Self::Kind(ErrorKind::Protocol(rule))
    }
}

impl From<h2::Error> for CallError {
    fn from(error: h2::Error) -> Self {
        Self::H2(error)
    }
}

/// The head of an answer: HTTP 200, gRPC, and for a trailers-only answer the status already.
fn check_head(status: http::StatusCode, headers: &HeaderMap) -> Result<Option<ErrorKind>, CallError> {
    if let Some(error) = status_in(headers)? {
        return Ok(Some(error));
    }
    if status != http::StatusCode::OK {
        // Whatever answered is no gRPC server, but may stand before one (gRPC, "HTTP to gRPC Status Code Mapping").
        let code = match status.as_u16() {
            400 => Code::Internal,
            401 => Code::Unauthenticated,
            403 => Code::PermissionDenied,
            404 => Code::Unimplemented,
            429 | 502..=504 => Code::Unavailable,
            _ => Code::Unknown,
        };
        return Ok(Some(ErrorKind::Status(Status { code, message: format!("HTTP status {}", status.as_u16()) })));
    }
    let grpc = headers.get("content-type").is_some_and(|v| v.as_bytes().starts_with(b"application/grpc"));
    if grpc { Ok(None) } else { Err(CallError::rule("content-type is not application/grpc")) }
}

fn check_trailers(trailers: Option<HeaderMap>) -> Result<(), CallError> {
    let trailers = trailers.ok_or(CallError::rule("no grpc-status"))?;
    match status_in(&trailers)? {
        Some(error) => Err(CallError::Kind(error)),
        None if trailers.contains_key("grpc-status") => Ok(()),
        None => Err(CallError::rule("no grpc-status")),
    }
}

/// The error among these headers or trailers; `None` for status OK and for no status at all.
fn status_in(headers: &HeaderMap) -> Result<Option<ErrorKind>, CallError> {
    let Some(code) = headers.get("grpc-status") else { return Ok(None) };
    match Code::parse(code.as_bytes()) {
        Some(Code::Ok) => Ok(None),
        Some(code) => {
            let message = headers.get("grpc-message").map(|m| decode_message(m.as_bytes())).unwrap_or_default();
            Ok(Some(ErrorKind::Status(Status { code, message })))
        }
        None => Err(CallError::rule("grpc-status is no number")),
    }
}

/// The messages of a server stream, on a connection of its own.
pub struct Messages {
    method: Method,
    connection: Connection,
    state: StreamState,
    decoder: frame::Decoder,
}

enum StreamState {
    Waiting(h2::client::ResponseFuture),
    Open(RecvStream),
}

impl Messages {
    /// Waits for the next message; `None` when the server ended the stream with status OK.
    ///
    /// # Errors
    /// [`Error`]; after [`ErrorKind::Expired`] the stream can be asked again, after any other it is over.
    pub fn next(&mut self, deadline: Deadline) -> Result<Option<Vec<u8>>, Error> {
        let Self { method, connection, state, decoder } = self;
        connection.pipe.begin_call(deadline);
        let step = async {
            loop {
                if let Some(message) = decoder.take().map_err(CallError::Kind)? {
                    return Ok(Some(message));
                }
                match state {
                    StreamState::Waiting(response) => {
                        let (head, body) = response.await?.into_parts();
                        if let Some(status) = check_head(head.status, &head.headers)? {
                            return Err(CallError::Kind(status));
                        }
                        *state = StreamState::Open(body);
                    }
                    StreamState::Open(body) => match body.data().await {
                        Some(chunk) => {
                            let chunk = chunk?;
                            decoder.push(&chunk);
                            body.flow_control().release_capacity(chunk.len())?;
                        }
                        None => {
                            check_trailers(body.trailers().await?)?;
                            return Ok(None);
                        }
                    },
                }
            }
        };
        connection.run(deadline.phase("message"), step).map_err(|failure| {
            // A wait that was too long has harmed nothing.
            connection.is_over &= !matches!(failure.kind, ErrorKind::Expired(_));
            Error { method: method.name(), kind: failure.kind }
        })
    }

    /// A handle that ends the stream from another thread; [`Messages::next`] then fails.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn stopper(&self) -> Result<Stream, net::Error> {
        self.connection.pipe.try_clone_stream()
    }
}
