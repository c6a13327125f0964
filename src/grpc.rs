//! gRPC over HTTP/2, hand-built on `h2` with blocking sockets: bytes in, bytes out.
//!
//! *Scope*: unary calls and server streams, as a client ([`Channel`]); the socket adapter that a server shares ([`pump`]).
//! *Not here*: protobuf, CRI, TLS, compression.
//!
//! Invariant: one call at a time on a connection; callers at the same time use several, kept in a small pool.
//! Invariant: a call that may have reached the server is repeated only when its [`Method`] says that this does no harm.
//! Invariant: a call without a `grpc-status` failed, whatever else it brought.

pub mod call;
pub mod frame;
pub mod pump;
pub mod status;

pub use call::{Channel, Messages, Method};
pub use status::{Code, Status};

use std::fmt;

use crate::deadline::Expired;
use crate::net;

/// A call that failed: which one, and how.
#[derive(Debug)]
pub struct Error {
    /// The method's short name, `RunPodSandbox`.
    pub method: &'static str,
    /// What happened.
    pub kind: ErrorKind,
}

/// How a call failed.
#[derive(Debug)]
pub enum ErrorKind {
    /// The server closed the connection, or reset the stream, before the answer was complete.
    Broken(Option<h2::Error>),
    /// No connection could be made.
    Connect(net::Error),
    /// The deadline passed; says in which phase.
    Expired(Expired),
    /// The answer breaks a rule of gRPC; says which.
    Protocol(&'static str),
    /// The server answered with an error.
    Status(Status),
    /// A message is larger than [`crate::limits::GRPC_MESSAGE_BYTES_MAX`].
    TooLarge {
        /// As announced.
        bytes: u64,
    },
}

impl Error {
    /// The status the server answered with, if it did.
    pub fn status(&self) -> Option<&Status> {
        match &self.kind {
            ErrorKind::Status(status) => Some(status),
            _ => None,
        }
    }

    /// The status code the server answered with, if it did.
    pub fn code(&self) -> Option<Code> {
        self.status().map(|s| s.code)
    }

    /// Whether the server reset the stream, which is an answer in a way: it is there, and said no.
    pub fn is_reset(&self) -> bool {
        matches!(&self.kind, ErrorKind::Broken(Some(cause)) if cause.is_reset())
    }

    /// Whether it is unknown if the call took effect: it may have reached the server, and no answer came.
    pub fn is_in_doubt(&self) -> bool {
        match &self.kind {
            ErrorKind::Broken(_) | ErrorKind::Expired(_) | ErrorKind::Protocol(_) | ErrorKind::TooLarge { .. } => true,
            ErrorKind::Connect(_) => false,
            // The server, or something before it, gave up in the middle.
            ErrorKind::Status(status) => {
                matches!(status.code, Code::Aborted | Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable)
            }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.method)?;
        match &self.kind {
            ErrorKind::Broken(_) => f.write_str("connection broken before the answer"),
            ErrorKind::Connect(_) => f.write_str("cannot connect to the runtime"),
            ErrorKind::Expired(expired) => expired.fmt(f),
            ErrorKind::Protocol(rule) => write!(f, "not a gRPC answer: {rule}"),
            ErrorKind::Status(status) => status.fmt(f),
            ErrorKind::TooLarge { bytes } => {
                write!(f, "answer of {bytes} bytes is over the limit of {}", crate::limits::GRPC_MESSAGE_BYTES_MAX)
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            ErrorKind::Broken(Some(error)) => Some(error),
            ErrorKind::Connect(error) => Some(error),
            _ => None,
        }
    }
}
