//! Responses: the statuses we send, a [`Response`] and its bytes.
//!
//! Every response carries `Date`, its framing, and what keeps browsers from guessing and caches from keeping; none names its server.
//!
//! Invariant: no header value with a control character leaves, whatever the handler put in.
//! Invariant: a streamed body that failed is cut off, never ended as if it were whole.

use crate::deadline::{Deadline, Timestamp};
use crate::limits::HTTP_HEAD_BYTES_MAX;
use crate::net::{self, Stream};

use super::parse::Version;

macro_rules! statuses {
    ($($name:ident $code:literal $reason:literal)*) => {
        /// The statuses we send (RFC 9110 section 15).
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Status {
            $(#[doc = $reason] $name = $code,)*
        }

        impl Status {
            /// Its words; also the title of a problem.
            pub fn reason(self) -> &'static str {
                match self {
                    $(Self::$name => $reason,)*
                }
            }
        }
    };
}

statuses! {
    Ok 200 "OK"
    Created 201 "Created"
    Accepted 202 "Accepted"
    NoContent 204 "No Content"
    BadRequest 400 "Bad Request"
    Unauthorized 401 "Unauthorized"
    Forbidden 403 "Forbidden"
    NotFound 404 "Not Found"
    MethodNotAllowed 405 "Method Not Allowed"
    RequestTimeout 408 "Request Timeout"
    Conflict 409 "Conflict"
    Gone 410 "Gone"
    LengthRequired 411 "Length Required"
    PreconditionFailed 412 "Precondition Failed"
    ContentTooLarge 413 "Content Too Large"
    UriTooLong 414 "URI Too Long"
    UnsupportedMediaType 415 "Unsupported Media Type"
    ExpectationFailed 417 "Expectation Failed"
    UnprocessableContent 422 "Unprocessable Content"
    TooManyRequests 429 "Too Many Requests"
    HeaderFieldsTooLarge 431 "Request Header Fields Too Large"
    InternalServerError 500 "Internal Server Error"
    NotImplemented 501 "Not Implemented"
    Unavailable 503 "Service Unavailable"
    GatewayTimeout 504 "Gateway Timeout"
    VersionNotSupported 505 "HTTP Version Not Supported"
    InsufficientStorage 507 "Insufficient Storage"
}

impl Status {
    /// Its number.
    pub fn code(self) -> u16 {
        self as u16
    }
}

/// Writes the body of a streamed response; its error ends the connection.
pub type Producer = Box<dyn FnOnce(&mut ChunkWriter<'_>) -> Result<(), net::Error> + Send>;

/// What follows the headers.
pub enum Body {
    /// Nothing.
    Empty,
    /// These bytes.
    Full(Vec<u8>),
    /// What this writes, as it writes it; not run for HEAD.
    Stream(Producer),
}

/// What a handler answers.
pub struct Response {
    /// Its status.
    pub status: Status,
    /// Its body.
    pub body: Body,
    headers: Vec<(&'static str, String)>,
}

impl Response {
    /// A response without a body.
    pub fn empty(status: Status) -> Self {
        Self { status, body: Body::Empty, headers: Vec::new() }
    }

    /// A response with a body of type `content_type`.
    pub fn full(status: Status, content_type: &'static str, body: Vec<u8>) -> Self {
        Self { body: Body::Full(body), ..Self::empty(status) }.with_header("Content-Type", content_type)
    }

    /// JSON.
    pub fn json(status: Status, body: Vec<u8>) -> Self {
        Self::full(status, "application/json", body)
    }

    /// Text.
    pub fn text(status: Status, body: impl Into<String>) -> Self {
        Self::full(status, "text/plain; charset=utf-8", body.into().into_bytes())
    }

    /// A 200 whose body is written while it comes into being.
    pub fn stream<F>(content_type: &'static str, producer: F) -> Self
    where
        F: FnOnce(&mut ChunkWriter<'_>) -> Result<(), net::Error> + Send + 'static,
    {
        Self { body: Body::Stream(Box::new(producer)), ..Self::empty(Status::Ok) }.with_header("Content-Type", content_type)
    }

    /// Adds a header. Characters that could end or forge a line, and those beyond ASCII, become `?`.
    #[must_use]
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        debug_assert!(OURS.iter().all(|ours| !ours.eq_ignore_ascii_case(name)), "{name} is written by the server itself");
        let value = value.into().chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect();
        self.headers.push((name, value));
        self
    }

    /// The first header called `name`, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The status line and the headers.
    pub(super) fn head(&self, delivery: &Delivery, now: Timestamp) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} {}\r\nDate: {}\r\n", self.status.code(), self.status.reason(), imf_fixdate(now));
        let mut field = |name: &str, value: &str| head.extend([name, ": ", value, "\r\n"]);
        for (name, value) in &self.headers {
            field(name, value);
        }
        match &self.body {
            // RFC 9110 section 8.6: a 204 has no length, not even 0.
            Body::Empty if self.status == Status::NoContent => {}
            Body::Empty => field("Content-Length", "0"),
            Body::Full(body) => field("Content-Length", &body.len().to_string()),
            Body::Stream(_) if delivery.version == Version::Http11 => field("Transfer-Encoding", "chunked"),
            // The end of the connection ends it (RFC 9112 section 6.3).
            Body::Stream(_) => {}
        }
        field("X-Content-Type-Options", "nosniff");
        field("Cache-Control", "no-store");
        match (delivery.keep_alive, delivery.version) {
            (false, _) => field("Connection", "close"),
            (true, Version::Http10) => field("Connection", "keep-alive"),
            (true, Version::Http11) => {}
        }
        head.push_str("\r\n");
        head.into_bytes()
    }
}

/// Headers a handler does not write.
const OURS: [&str; 6] = ["Cache-Control", "Connection", "Content-Length", "Date", "Transfer-Encoding", "X-Content-Type-Options"];

/// How a response goes out, as far as that depends on its request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Delivery {
    /// HEAD: everything but the body.
    pub(super) is_head: bool,
    pub(super) version: Version,
    pub(super) keep_alive: bool,
}

/// Where a streamed body is written to.
pub struct ChunkWriter<'a> {
    pub(super) stream: &'a mut Stream,
    /// Bytes of the next requests, read meanwhile.
    pub(super) ahead: &'a mut Vec<u8>,
    pub(super) version: Version,
    pub(super) write_ms: u64,
}

impl ChunkWriter<'_> {
    /// Writes `data` as one chunk; it is on its way when this returns.
    ///
    /// # Errors
    /// Those of the socket; the producer should pass them on, for nobody reads any more.
    pub fn write(&mut self, data: &[u8]) -> Result<(), net::Error> {
        match self.version {
            // An empty chunk would end the body.
            _ if data.is_empty() => Ok(()),
            Version::Http10 => self.send(data),
            Version::Http11 => self.send(&[format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()),
        }
    }

    /// Whether the client left, or the server stops: for producers that have had nothing to write for a while. A client that only
    /// closed its sending side counts as gone, because until something is written the two look the same.
    pub fn is_over(&mut self) -> bool {
        // A client that pipelines without end is there, and its bytes may wait in the socket.
        if self.ahead.len() >= HTTP_HEAD_BYTES_MAX {
            return false;
        }
        let mut bytes = [0; 512];
        match self.stream.read_ready(&mut bytes) {
            Ok(None) => false,
            Ok(Some(read)) => {
                self.ahead.extend_from_slice(bytes.get(..read).unwrap_or_default());
                read == 0
            }
            Err(_) => true,
        }
    }

    /// Ends the body.
    pub(super) fn finish(&mut self) -> Result<(), net::Error> {
        match self.version {
            Version::Http10 => Ok(()),
            Version::Http11 => self.send(b"0\r\n\r\n"),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), net::Error> {
        self.stream.write_all(bytes, Deadline::within_ms(self.write_ms, "write"))
    }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110 section 5.6.7), out of `1994-11-06T08:49:37.000Z`.
fn imf_fixdate(at: Timestamp) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"]; // 1970 began on a Thursday.
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let text = at.to_string();
    let part = |range| text.get(range).unwrap_or_default();
    let name = part(5..7).parse::<usize>().ok().and_then(|month| MONTHS.get(month.checked_sub(1)?)).unwrap_or(&"Jan");
    let days = at.as_millis() / 86_400_000;
    let day = DAYS.iter().cycle().nth(usize::try_from(days % 7).unwrap_or_default()).unwrap_or(&"Thu");
    format!("{day}, {} {name} {} {} GMT", part(8..10), part(0..4), part(11..19))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_rfc_9110() {
        let check = |rfc3339, expect| assert_eq!(imf_fixdate(Timestamp::parse(rfc3339).expect("valid")), expect);
        check("1994-11-06T08:49:37Z", "Sun, 06 Nov 1994 08:49:37 GMT");
        check("1970-01-01T00:00:00Z", "Thu, 01 Jan 1970 00:00:00 GMT");
        check("2024-02-29T23:59:59.999Z", "Thu, 29 Feb 2024 23:59:59 GMT");
        check("2025-12-31T12:00:00Z", "Wed, 31 Dec 2025 12:00:00 GMT");
    }

    fn head(response: &Response, version: Version, keep_alive: bool) -> String {
        let now = Timestamp::parse("1994-11-06T08:49:37Z").expect("valid");
        String::from_utf8(response.head(&Delivery { is_head: false, version, keep_alive }, now)).expect("text")
    }

    #[test]
    fn a_header_value_cannot_end_its_line() {
        let response = Response::empty(Status::Created).with_header("Location", "/a\r\nSet-Cookie: x\0\u{7f}\u{85}é\t");
        assert_eq!(response.header("location"), Some("/a??Set-Cookie: x?????"));
        assert_eq!(
            head(&response, Version::Http11, true),
            "HTTP/1.1 201 Created\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nLocation: /a??Set-Cookie: x?????\r\nContent-Length: 0\r\n\
             X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n\r\n"
        );
    }

    #[test]
    fn framing_and_persistence_fit_the_client() {
        let check = |response: &Response, version, keep_alive, has: &[&str], lacks: &[&str]| {
            let head = head(response, version, keep_alive);
            assert!(has.iter().all(|h| head.contains(h)) && lacks.iter().all(|h| !head.contains(h)), "{head}");
        };
        let stream = Response::stream("text/plain", |_| Ok(()));
        let text = Response::text(Status::Ok, "abc");
        check(&stream, Version::Http11, true, &["\r\nTransfer-Encoding: chunked\r\n"], &["Content-Length", "Connection"]);
        check(&stream, Version::Http10, false, &["\r\nConnection: close\r\n"], &["Content-Length", "Transfer-Encoding"]);
        check(&text, Version::Http11, false, &["\r\nContent-Length: 3\r\n", "\r\nConnection: close\r\n"], &["Transfer-Encoding"]);
        check(&text, Version::Http10, true, &["\r\nConnection: keep-alive\r\n", "charset=utf-8"], &["Transfer-Encoding"]);
        check(&Response::empty(Status::NoContent), Version::Http11, true, &["204 No Content"], &["Content-Length"]);
    }
}
