//! One connected socket, TCP or Unix. Every read and write carries a deadline.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::Error;
use super::address::Address;
use crate::deadline::Deadline;

/// A connected socket.
#[derive(Debug)]
pub enum Stream {
    /// TCP, with `TCP_NODELAY`: requests and replies are small and waited for.
    Tcp(TcpStream),
    /// Unix.
    Unix(UnixStream),
}

impl Stream {
    /// Connects.
    ///
    /// # Errors
    /// Those of `connect`, and the deadline.
    pub fn connect(address: &Address, deadline: Deadline) -> Result<Self, Error> {
        match address {
            Address::Tcp(addr) => {
                let stream = TcpStream::connect_timeout(addr, deadline.left()?).map_err(|e| wait_error(e, deadline))?;
                stream.set_nodelay(true).map_err(Error::Io)?;
                Ok(Self::Tcp(stream))
            }
            Address::Unix(path) => connect_unix(path, deadline).map(Self::Unix),
        }
    }

    /// Reads at least one byte; 0 is the end of the stream.
    ///
    /// # Errors
    /// [`Error::Expired`] when nothing came in time, [`Error::Io`] otherwise.
    pub fn read(&mut self, buffer: &mut [u8], deadline: Deadline) -> Result<usize, Error> {
        loop {
            let left = Some(deadline.left()?);
            let result = match self {
                Self::Tcp(s) => s.set_read_timeout(left).and_then(|()| s.read(buffer)),
                Self::Unix(s) => s.set_read_timeout(left).and_then(|()| s.read(buffer)),
            };
            match result {
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
                Err(e) => return Err(wait_error(e, deadline)),
            }
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// [`Error::Closed`] when nobody reads any more, [`Error::Expired`] when the reader is too slow.
    pub fn write_all(&mut self, mut bytes: &[u8], deadline: Deadline) -> Result<(), Error> {
        while !bytes.is_empty() {
            let written = self.write(bytes, deadline)?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// Writes some of `bytes`, at least one of them.
    ///
    /// # Errors
    /// As [`Stream::write_all`].
    pub fn write(&mut self, bytes: &[u8], deadline: Deadline) -> Result<usize, Error> {
        loop {
            let left = Some(deadline.left()?);
            let result = match self {
                Self::Tcp(s) => s.set_write_timeout(left).and_then(|()| s.write(bytes)),
                Self::Unix(s) => s.set_write_timeout(left).and_then(|()| s.write(bytes)),
            };
            match result {
                Ok(0) => return Err(Error::Closed),
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => return Err(Error::Closed),
                Err(e) => return Err(wait_error(e, deadline)),
            }
        }
    }

    /// What already lies in the socket, without waiting: `None` when nothing does, `Some(0)` at the end of the stream.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn read_ready(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, Error> {
        self.set_nonblocking(true)?;
        let result = match self {
            Self::Tcp(s) => s.read(buffer),
            Self::Unix(s) => s.read(buffer),
        };
        self.set_nonblocking(false)?;
        match result {
            Ok(n) => Ok(Some(n)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(Some(0)),
            Err(e) => Err(Error::Io(e)),
        }
    }

    /// Ends reading, writing or both, for every clone of this socket; a read that waits elsewhere returns 0.
    pub fn shutdown(&self, how: Shutdown) {
        // An already closed socket is what was wanted.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
        };
    }

    /// Lets the other side read our last words: ends our side, drops what it still sends, waits for it to end its own, within
    /// `bytes_max` and the deadline. Closing with unread bytes would reset the connection and may destroy the answer (RFC 9112
    /// section 9.6).
    pub fn linger(&mut self, mut bytes_max: usize, deadline: Deadline) {
        self.shutdown(Shutdown::Write);
        let mut dropped = [0; 4096];
        while bytes_max > 0 {
            match self.read(&mut dropped, deadline) {
                Ok(0) | Err(_) => return,
                Ok(read) => bytes_max = bytes_max.saturating_sub(read),
            }
        }
    }

    /// A second handle on the same socket.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn try_clone(&self) -> Result<Self, Error> {
        match self {
            Self::Tcp(s) => s.try_clone().map(Self::Tcp),
            Self::Unix(s) => s.try_clone().map(Self::Unix),
        }
        .map_err(Error::Io)
    }

    /// The other side, for logs.
    pub fn peer(&self) -> String {
        match self {
            Self::Tcp(s) => s.peer_addr().map_or_else(|_| "tcp".into(), |a| a.to_string()),
            Self::Unix(_) => "unix".into(),
        }
    }

    /// Whether it is TCP to a loopback address of this machine.
    pub fn is_over_loopback(&self) -> bool {
        match self {
            Self::Tcp(s) => s.local_addr().is_ok_and(|address| address.ip().to_canonical().is_loopback()),
            Self::Unix(_) => false,
        }
    }

    fn set_nonblocking(&self, on: bool) -> Result<(), Error> {
        match self {
            Self::Tcp(s) => s.set_nonblocking(on),
            Self::Unix(s) => s.set_nonblocking(on),
        }
        .map_err(Error::Io)
    }
}

/// Where the backlog of whoever listens is full, connecting waits; the timeout for sending bounds that as well (socket(7),
/// `SO_SNDTIMEO`). The standard library has no way to set it before the connect.
fn connect_unix(path: &Path, deadline: Deadline) -> Result<UnixStream, Error> {
    let io = |errno: rustix::io::Errno| Error::Io(errno.into());
    let address = SocketAddrUnix::new(path).map_err(io)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(io)?;
    loop {
        set_socket_timeout(&socket, Timeout::Send, Some(deadline.left()?)).map_err(io)?;
        match connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(wait_error(error.into(), deadline)),
        }
    }
}

/// A blocking socket with a timeout answers `WouldBlock` when the time is over (`SO_RCVTIMEO`, socket(7)).
fn wait_error(error: io::Error, deadline: Deadline) -> Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Expired(deadline.expired()),
        _ => Error::Io(error),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two ends of one connection.
    pub(crate) fn pair() -> (Stream, Stream) {
        let (a, b) = UnixStream::pair().expect("a socket pair");
        (Stream::Unix(a), Stream::Unix(b))
    }

    /// A listener whose backlog has room for next to nobody.
    pub(crate) fn listen_and_never_accept(path: &Path) -> std::os::fd::OwnedFd {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a socket");
        rustix::net::bind(&socket, &SocketAddrUnix::new(path).expect("a short path")).expect("bound");
        rustix::net::listen(&socket, 0).expect("listens");
        socket
    }

    #[test]
    fn a_read_that_waits_too_long_names_its_phase() {
        let (mut a, _b) = pair();
        let result = a.read(&mut [0], Deadline::within_ms(5, "header"));
        assert!(matches!(result, Err(Error::Expired(e)) if e.phase == "header"), "{result:?}");
    }

    #[test]
    fn connecting_where_nobody_accepts_ends_with_the_deadline() {
        let path = std::env::temp_dir().join(format!("kakuri-full-{}", std::process::id()));
        let listener = listen_and_never_accept(&path);
        let address = Address::Unix(path.clone());
        // What the backlog holds is connected, and held.
        let waiting: Vec<_> = std::iter::from_fn(|| Stream::connect(&address, Deadline::within_ms(20, "connect")).ok()).take(9).collect();
        assert!(waiting.len() < 9, "a backlog of no place holds one");
        let result = Stream::connect(&address, Deadline::within_ms(20, "connect"));
        assert!(matches!(result, Err(Error::Expired(e)) if e.phase == "connect"), "{result:?}");
        drop(listener);
        assert!(matches!(Stream::connect(&address, Deadline::within_ms(20, "connect")), Err(Error::Io(_))), "nobody is there");
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn read_ready_does_not_wait() {
        let (mut a, mut b) = pair();
        assert!(matches!(a.read_ready(&mut [0; 4]), Ok(None)));
        b.write_all(b"ab", Deadline::within_ms(1000, "write")).expect("written");
        assert!(matches!(a.read_ready(&mut [0; 4]), Ok(Some(2))));
        drop(b);
        assert!(matches!(a.read_ready(&mut [0; 4]), Ok(Some(0))));
    }

    #[test]
    fn writing_to_nobody_is_closed() {
        let (mut a, b) = pair();
        drop(b);
        let result = a.write_all(b"x", Deadline::within_ms(1000, "write"));
        assert!(matches!(result, Err(Error::Closed)), "{result:?}");
    }
}
