//! Sockets: addresses, streams with deadlines, listeners with slots, lines. Knows no message.
//!
//! *Scope*: TCP and Unix stream sockets, blocking. *Not here*: what the bytes mean.
//!
//! Invariant: no call here waits without a [`Deadline`](crate::deadline::Deadline), connecting included, but `accept`, which
//! [`listen::Server::stop`] wakes.
//! Invariant: no name is looked up in the DNS; `getaddrinfo` is not in the program ([`address`]).

pub mod address;
pub mod line;
pub mod listen;
pub mod stream;

pub use address::Address;
pub use stream::Stream;

use std::fmt;
use std::io;

use crate::deadline::Expired;

/// What goes wrong with a socket.
#[derive(Debug)]
pub enum Error {
    /// The other side closed.
    Closed,
    /// The deadline passed; names its phase.
    Expired(Expired),
    /// Anything else the kernel says.
    Io(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("connection closed by the other side"),
            Self::Expired(expired) => expired.fmt(f),
            Self::Io(_) => f.write_str("socket"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Closed | Self::Expired(_) => None,
            Self::Io(error) => Some(error),
        }
    }
}

impl From<Expired> for Error {
    fn from(expired: Expired) -> Self {
        Self::Expired(expired)
    }
}
