//! An HTTP client that sends exactly the bytes it is given, and reads what comes by the letter of RFC 9112.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use kakuri::deadline::Deadline;
use serde_json::Value;

use super::SOON_MS;

/// One connection to a control plane.
pub struct Http {
    socket: TcpStream,
    /// Read and not yet used.
    buffer: Vec<u8>,
}

/// A response.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Status line and headers as they came.
    pub head: String,
    /// Names in lower case.
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    /// The only header of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let value = values.next();
        assert!(values.next().is_none(), "{name} twice: {}", self.head);
        value
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    /// The body as JSON; a problem's says so in its type.
    pub fn json(&self) -> Value {
        let kind = if self.status < 400 { "application/json" } else { "application/problem+json" };
        assert_eq!(self.header("content-type"), Some(kind), "{}{}", self.head, self.text());
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The status, and the code of a problem.
    pub fn problem(&self) -> (u16, String) {
        let body = self.json();
        assert_eq!(body["status"], self.status, "{body}");
        assert_eq!(body["type"], "about:blank", "{body}");
        (self.status, body["code"].as_str().unwrap_or_default().to_owned())
    }
}

fn request(method: &str, target: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n");
    headers.iter().for_each(|header| head.extend([header, "\r\n"]));
    if !body.is_empty() || method == "POST" || method == "PUT" {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

impl Http {
    pub fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        socket.set_nodelay(true).expect("a socket");
        socket.set_read_timeout(Some(Duration::from_millis(SOON_MS))).expect("a socket");
        socket.set_write_timeout(Some(Duration::from_millis(SOON_MS))).expect("a socket");
        Self { socket, buffer: Vec::new() }
    }

    /// A connection to a server that may not be there.
    pub fn try_connect(address: SocketAddr) -> Option<Self> {
        let socket = TcpStream::connect(address).ok()?;
        socket.set_read_timeout(Some(Duration::from_millis(SOON_MS))).ok()?;
        Some(Self { socket, buffer: Vec::new() })
    }

    /// Asks a server that may die before it has answered.
    pub fn try_ask(&mut self, method: &str, target: &str, headers: &[&str], body: &[u8]) -> Option<Answer> {
        self.try_send(&request(method, target, headers, body)).ok()?;
        self.next()
    }

    /// How long a read may wait from now on.
    pub fn patience(&mut self, ms: u64) {
        self.socket.set_read_timeout(Some(Duration::from_millis(ms))).expect("a socket");
    }

    /// One request on a connection of its own, to a server that may be gone, hang, or die in the middle of its response. An error is
    /// no answer: nobody knows whether the request was done.
    pub fn attempt(address: SocketAddr, method: &str, target: &str, body: &str, ms: u64) -> io::Result<Answer> {
        let deadline = Deadline::within_ms(ms, "attempt");
        let left = || deadline.left().map_err(|_| io::Error::from(io::ErrorKind::TimedOut));
        let mut socket = TcpStream::connect_timeout(&address, left()?)?;
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(left()?))?;
        let framing =
            if method == "POST" { format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()) } else { String::new() };
        socket
            .write_all(format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{framing}\r\n{body}").as_bytes())?;
        let (mut buffer, mut chunk) = (Vec::new(), [0; 16 * 1024]);
        loop {
            socket.set_read_timeout(Some(left()?))?;
            match socket.read(&mut chunk)? {
                0 => break,
                read => buffer.extend_from_slice(&chunk[..read]),
            }
        }
        if !is_whole(&buffer) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self { socket, buffer }.answer())
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("the server reads");
    }

    /// Sends to a server that may have closed.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Says that nothing more comes.
    pub fn end(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write); // Closed already is as good.
    }

    /// Sends a request with these headers and this body, and reads the response.
    pub fn ask(&mut self, method: &str, target: &str, headers: &[&str], body: &[u8]) -> Answer {
        self.send(&request(method, target, headers, body));
        if method == "HEAD" { self.head() } else { self.answer() }
    }

    /// The next response; there must be one.
    pub fn answer(&mut self) -> Answer {
        self.next().expect("the server closed the connection without a response")
    }

    /// The next response; `None` when the server closed.
    pub fn next(&mut self) -> Option<Answer> {
        let mut answer = self.try_head()?;
        if answer.status / 100 == 1 || answer.status == 204 {
            return Some(answer);
        }
        answer.body = match (answer.header("content-length"), answer.header("transfer-encoding")) {
            (Some(length), None) => {
                let length: usize = length.parse().expect("a number");
                self.take(length)
            }
            (None, Some("chunked")) => self.chunks(),
            (None, None) => {
                while self.fill() {}
                std::mem::take(&mut self.buffer)
            }
            other => panic!("framing {other:?}: {}", answer.head),
        };
        Some(answer)
    }

    /// The next response to a HEAD.
    pub fn head(&mut self) -> Answer {
        self.try_head().expect("the server closed the connection without a response")
    }

    /// Whether the server closed, with nothing more to read.
    pub fn is_closed(&mut self) -> bool {
        self.buffer.is_empty() && !self.fill()
    }

    /// Everything up to the end of the stream.
    pub fn rest(&mut self) -> Vec<u8> {
        while self.fill() {}
        std::mem::take(&mut self.buffer)
    }

    /// One chunk of a streamed body; `None` at its end.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = self.line();
        let size = usize::from_str_radix(&line, 16).unwrap_or_else(|error| panic!("chunk size {line:?}: {error}"));
        let data = self.take(size);
        assert_eq!(self.line(), "", "a chunk ends with CRLF");
        (size > 0).then_some(data)
    }

    /// The status line and headers, for a body that is read chunk by chunk.
    pub fn try_head(&mut self) -> Option<Answer> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            if !self.fill() {
                assert!(self.buffer.is_empty(), "half a head: {:?}", String::from_utf8_lossy(&self.buffer));
                return None;
            }
        };
        let head = String::from_utf8(self.take(end)).expect("ASCII");
        let mut lines = head.trim_end().split("\r\n");
        let first = lines.next().unwrap_or_default();
        let status = first.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
        let status = status.unwrap_or_else(|| panic!("status line {first:?}"));
        let header = |line: &str| line.split_once(": ").map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned()));
        let headers = lines.map(|line| header(line).unwrap_or_else(|| panic!("header {line:?}"))).collect();
        Some(Answer { status, head, headers, body: Vec::new() })
    }

    fn chunks(&mut self) -> Vec<u8> {
        std::iter::from_fn(|| self.chunk()).flatten().collect()
    }

    fn line(&mut self) -> String {
        loop {
            if let Some(at) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                let line = self.take(at);
                self.take(2);
                return String::from_utf8(line).expect("ASCII");
            }
            assert!(self.fill(), "the body breaks off");
        }
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        while self.buffer.len() < length {
            assert!(self.fill(), "the body breaks off at {} of {length} bytes", self.buffer.len());
        }
        let rest = self.buffer.split_off(length);
        std::mem::replace(&mut self.buffer, rest)
    }

    /// Reads some; whether there was any.
    fn fill(&mut self) -> bool {
        let mut chunk = [0; 16 * 1024];
        match self.socket.read(&mut chunk) {
            Ok(read) => {
                self.buffer.extend_from_slice(&chunk[..read]);
                read > 0
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("nothing from the server: {error}"),
        }
    }
}

/// Whether these bytes are a response to its end.
fn is_whole(bytes: &[u8]) -> bool {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4) else { return false };
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).and_then(|text| text.trim().parse::<usize>().ok());
    length.map_or_else(|| bytes.ends_with(b"0\r\n\r\n"), |length| bytes.len() - end >= length)
}
