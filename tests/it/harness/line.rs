//! A client of the line protocol that sends exactly the bytes it is given.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kakuri::net::Address;
use kakuri::wire::agent::Reply;
use serde_json::Value;

use super::SOON_MS;

/// TCP or Unix, with a read timeout.
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    pub fn connect(address: &Address) -> io::Result<Self> {
        let patience = Some(Duration::from_millis(SOON_MS));
        let socket = match address {
            Address::Tcp(addr) => {
                let stream = TcpStream::connect(addr)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(patience)?;
                stream.set_write_timeout(patience)?;
                Self::Tcp(stream)
            }
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(patience)?;
                stream.set_write_timeout(patience)?;
                Self::Unix(stream)
            }
        };
        Ok(socket)
    }

    pub fn shutdown_write(&self) {
        let _ = match self {
            Self::Tcp(s) => s.shutdown(Shutdown::Write),
            Self::Unix(s) => s.shutdown(Shutdown::Write),
        };
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buffer),
            Self::Unix(s) => s.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(bytes),
            Self::Unix(s) => s.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One connection to an agent.
pub struct Line(BufReader<Socket>);

impl Line {
    /// Connects.
    pub fn connect(address: &Address) -> Self {
        Self(BufReader::new(Socket::connect(address).unwrap_or_else(|error| panic!("{address}: {error}"))))
    }

    /// Connects to an agent that may not be there.
    pub fn try_connect(address: &Address) -> io::Result<Self> {
        Socket::connect(address).map(|socket| Self(BufReader::new(socket)))
    }

    /// Sends these bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("the agent reads");
    }

    /// Sends these bytes to an agent that may have closed.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.get_mut().write_all(bytes)
    }

    /// Says that nothing more comes.
    pub fn end(&mut self) {
        self.0.get_ref().shutdown_write();
    }

    /// The next line as it came; `None` at the end of the stream, and when the agent reset the connection.
    pub fn text(&mut self) -> Option<String> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => {
                assert_eq!(line.pop(), Some('\n'), "a whole line");
                Some(line)
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("no line from the agent: {error}"),
        }
    }

    /// The next reply; `None` at the end.
    pub fn next(&mut self) -> Option<Reply> {
        let line = self.text()?;
        Some(Reply::parse(line.as_bytes()).unwrap_or_else(|error| panic!("{error}: {line}")))
    }

    /// The next reply of an agent that may hang, or die in the middle of a line.
    pub fn attempt(&mut self) -> Option<Reply> {
        let mut line = String::new();
        let read = self.0.read_line(&mut line).ok()?;
        (read > 0 && line.ends_with('\n')).then(|| Reply::parse(line.as_bytes()).unwrap_or_else(|error| panic!("{error}: {line}")))
    }

    /// The next reply but heartbeats; there must be one.
    pub fn reply(&mut self) -> Reply {
        loop {
            match self.reply_or_heartbeat() {
                Reply::Heartbeat { .. } => {}
                reply => return reply,
            }
        }
    }

    /// The next reply, be it a heartbeat; there must be one.
    pub fn reply_or_heartbeat(&mut self) -> Reply {
        self.next().expect("the agent closed the connection")
    }

    /// Sends a request and reads one reply.
    pub fn ask(&mut self, request: &Value) -> Reply {
        self.tell(request);
        self.reply()
    }

    /// Sends a request.
    pub fn tell(&mut self, request: &Value) {
        self.send(format!("{request}\n").as_bytes());
    }

    /// Sends a line as text and reads the reply as text.
    pub fn exchange(&mut self, line: &str) -> String {
        self.send(format!("{line}\n").as_bytes());
        self.text().unwrap_or_else(|| panic!("no answer to {line:?}"))
    }
}
