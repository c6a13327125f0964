//! A request as slices: [`head`] reads the request line and the headers and says how the body is framed, [`Chunks`] undoes the
//! chunked coding. No I/O, no state but what is passed in; "not complete" is `None` or a short count, and then nothing is lost.
//!
//! *Scope*: the only `httparse`, which splits lines and checks their characters. It takes a bare LF for a line end, reads an empty
//! chunk size as 0, and knows nothing of framing, so those rules are here.
//!
//! Invariant: bytes of a head looked at <= `HTTP_HEAD_BYTES_MAX`; bytes kept of a body <= `HTTP_BODY_BYTES_MAX`.

#[cfg(test)]
mod tests;

use std::fmt;

use httparse::Status::{Complete, Partial};

use super::response::Status;
use super::{Method, Request, route};
use crate::limits::{
    HTTP_BODY_BYTES_MAX, HTTP_CHUNK_EXTENSION_BYTES_MAX, HTTP_HEAD_BYTES_MAX, HTTP_HEADERS_MAX, HTTP_TARGET_BYTES_MAX,
    HTTP_TRAILER_BYTES_MAX,
};

/// One row a rule: its name, the status a client sees, and the sentence it reads.
macro_rules! rejects {
    ($($(#[$doc:meta])* $rule:ident $({ $name:ident })? $status:ident $sentence:literal)*) => {
        /// A rule of HTTP, or of ours, that a client broke.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reject {
            $(#[doc = $sentence] $(#[$doc])* $rule $({ #[doc = "Which one."] $name: &'static str })?,)*
        }

        impl Reject {
            /// The status a client sees.
            pub fn status(&self) -> Status {
                match self {
                    $(Self::$rule $({ $name: _ })? => Status::$status,)*
                }
            }
        }

        impl fmt::Display for Reject {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$rule $({ $name })? => write!(f, $sentence),)*
                }
            }
        }
    };
}

rejects! {
    /// (RFC 9112 section 2.2 lets us refuse it.)
    BareLineFeed BadRequest "lines end with CRLF, not with LF alone"
    BodyBytes ContentTooLarge "a body has at most {HTTP_BODY_BYTES_MAX} bytes"
    BodyTime RequestTimeout "the body was not complete in time"
    /// (RFC 9112 section 7.1)
    ChunkEnd BadRequest "the data of a chunk is followed by CRLF"
    ChunkExtension BadRequest "chunk extensions are text of at most {HTTP_CHUNK_EXTENSION_BYTES_MAX} bytes in all"
    ChunkSize BadRequest "a chunk size is 1 to 16 hexadecimal digits"
    /// (RFC 9112 section 6.3)
    CodingOrder BadRequest "chunked must be the last transfer coding, and stand once"
    /// (RFC 9112 section 6.1)
    CodingUnknown NotImplemented "chunked is the only transfer coding served here"
    /// (RFC 9112 section 6.1)
    CodingVersion BadRequest "HTTP/1.0 has no Transfer-Encoding"
    /// (RFC 9112 section 6.3: request smuggling.)
    CodingWithLength BadRequest "Content-Length and Transfer-Encoding exclude each other"
    ContentLength BadRequest "Content-Length is one decimal number of at most 64 bits"
    /// (RFC 9110 section 10.1.1)
    Expectation ExpectationFailed "100-continue is the only expectation served here"
    HeadBytes HeaderFieldsTooLarge "request line and headers have at most {HTTP_HEAD_BYTES_MAX} bytes"
    HeadTime RequestTimeout "request line and headers were not complete in time"
    HeaderCount HeaderFieldsTooLarge "a request has at most {HTTP_HEADERS_MAX} headers"
    /// (RFC 9112 section 5.2)
    HeaderFolded BadRequest "a header stands on one line"
    /// (RFC 9110 section 5.1)
    HeaderName BadRequest "a header is a name of token characters, a colon and a value"
    /// (RFC 9110 section 5.3)
    HeaderRepeated { name } BadRequest "header {name} may be given once"
    /// (RFC 9112 section 5.1)
    HeaderSpace BadRequest "no whitespace stands between a header name and its colon"
    /// (RFC 9110 section 5.5)
    HeaderValue BadRequest "header values are UTF-8 without control characters"
    HostInvalid BadRequest "Host is a name or address, and maybe a port"
    /// (RFC 9112 section 3.2)
    HostMissing BadRequest "HTTP/1.1 requires Host"
    Method NotImplemented "methods are DELETE, GET, HEAD, OPTIONS, PATCH, POST and PUT"
    PathSegment BadRequest "path segments are not empty, not '.' or '..', and hold no slash or backslash"
    QueryFlag { name } BadRequest "query parameter {name} is true or false"
    QueryNumber { name } BadRequest "query parameter {name} is a decimal number of at most 64 bits"
    QueryRepeated { name } BadRequest "query parameter {name} may be given once"
    /// (RFC 9112 section 3)
    RequestLine BadRequest "a request begins with a method, a target and HTTP/1.1, one space apart, and CRLF"
    Stopping Unavailable "the server is stopping"
    TargetBytes UriTooLong "a request target has at most {HTTP_TARGET_BYTES_MAX} bytes"
    /// (RFC 3986 section 2)
    TargetCharacter BadRequest "the request target has a character that must be percent-encoded"
    TargetEncoding BadRequest "percent-encoding is two hexadecimal digits a byte, and gives UTF-8 without control characters"
    /// (RFC 9112 section 3.2)
    TargetForm BadRequest "the request target is a path, an http URL, or * for OPTIONS"
    TrailerBytes HeaderFieldsTooLarge "trailers have at most {HTTP_TRAILER_BYTES_MAX} bytes"
    Truncated BadRequest "the connection ended before the request was complete"
    Version VersionNotSupported "HTTP/1.1 and HTTP/1.0 are the only versions served here"
}

impl std::error::Error for Reject {}

/// The versions we speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0: no chunks, and one request per connection unless it asks for more.
    Http10,
    /// HTTP/1.1
    Http11,
}

/// Where the body ends (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// At the end of the chunked coding.
    Chunked,
    /// After this many bytes, at most `HTTP_BODY_BYTES_MAX`.
    Length(usize),
    /// There is none.
    None,
}

/// A request whose body is still to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The request; `body` is empty, and so is what its connection says of it.
    pub request: Request,
    /// The version of the client.
    pub version: Version,
    /// How its body is framed.
    pub framing: Framing,
    /// Whether it waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    /// Whether it may send another request on this connection.
    pub keep_alive: bool,
}

/// The length of the empty lines at the start of `bytes`, which a server skips before a request line (RFC 9112 section 2.2).
pub fn blank(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    while let [b'\r', b'\n', after @ ..] = rest {
        rest = after;
    }
    bytes.len().saturating_sub(rest.len())
}

/// Reads a head from the start of `bytes`: how many bytes it has, and what it says; `None` when there must be more.
///
/// Called again with every read: a head that comes byte by byte costs a scan of at most `HTTP_HEAD_BYTES_MAX` a byte, which is of
/// the order of the system call that brought it.
///
/// # Errors
/// The rule that is broken, as soon as that is certain.
pub fn head(bytes: &[u8]) -> Result<Option<(usize, Head)>, Reject> {
    let window = bytes.get(..HTTP_HEAD_BYTES_MAX).unwrap_or(bytes);
    let mut slots = [httparse::EMPTY_HEADER; HTTP_HEADERS_MAX];
    let mut raw = httparse::Request::new(&mut slots);
    let outcome = raw.parse(window);

    // The target so far: all of it once there is a path, else what follows the method.
    let target_bytes = match (raw.method, raw.path) {
        (_, Some(path)) => path.len(),
        (Some(method), None) => window.len().saturating_sub(method.len()).saturating_sub(1),
        (None, None) => 0,
    };
    let used = match outcome {
        _ if raw.path.is_some() && target_bytes > HTTP_TARGET_BYTES_MAX => return Err(Reject::TargetBytes),
        Ok(Complete(used)) => used,
        Ok(Partial) => {
            refuse_bare_line_feed(window)?;
            return match raw.method {
                None if window.len() > METHOD_BYTES_MAX => Err(Reject::Method),
                _ if target_bytes > HTTP_TARGET_BYTES_MAX => Err(Reject::TargetBytes),
                _ if bytes.len() >= HTTP_HEAD_BYTES_MAX => Err(Reject::HeadBytes),
                _ => Ok(None),
            };
        }
        Err(error) => return Err(fault(error, window)),
    };
    refuse_bare_line_feed(window.get(..used).unwrap_or(window))?;

    let version = if raw.version == Some(0) { Version::Http10 } else { Version::Http11 };
    let method = Method::parse(raw.method.unwrap_or_default()).ok_or(Reject::Method)?;
    let route::Target { segments, query } = route::target(method, raw.path.unwrap_or_default())?;
    let headers = fields(raw.headers)?;
    check_host(&headers, version)?;
    let framing = framing(&headers, version)?;
    let expects_continue = expectation(&headers)? && version == Version::Http11;
    let asks = |option: &str| list(&headers, "connection").any(|o| o.eq_ignore_ascii_case(option));
    let keep_alive = !asks("close") && (version == Version::Http11 || asks("keep-alive"));
    let has_body_framing = framing != Framing::None;
    let request =
        Request { method, segments, query, headers, body: Vec::new(), has_body_framing, peer: String::new(), is_over_loopback: false };
    Ok(Some((used, Head { request, version, framing, expects_continue, keep_alive })))
}

/// No method of ours is longer; a longer first word needs no waiting for its end.
const METHOD_BYTES_MAX: usize = 16;

/// httparse takes LF for CRLF; an intermediary that does not would see another message. It does refuse a CR without LF.
fn refuse_bare_line_feed(head: &[u8]) -> Result<(), Reject> {
    let mut before = 0;
    for byte in head {
        if *byte == b'\n' && before != b'\r' {
            return Err(Reject::BareLineFeed);
        }
        before = *byte;
    }
    Ok(())
}

/// Which rule an error of httparse stands for.
fn fault(error: httparse::Error, head: &[u8]) -> Reject {
    match error {
        httparse::Error::HeaderName => name_fault(head),
        httparse::Error::HeaderValue => Reject::HeaderValue,
        // Where the request line is whole, it is a CR without LF in the place of a header name.
        httparse::Error::NewLine if is_whole(lines(head).next()) => Reject::HeaderName,
        httparse::Error::NewLine | httparse::Error::Status | httparse::Error::Token => Reject::RequestLine,
        httparse::Error::TooManyHeaders => Reject::HeaderCount,
        httparse::Error::Version => {
            let version = lines(head).next().and_then(|line| line.split(|b| *b == b' ').nth(2)).unwrap_or_default();
            if version.starts_with(b"HTTP/") { Reject::Version } else { Reject::RequestLine }
        }
    }
}

/// The first header line that is out of order, by what is wrong with it.
fn name_fault(head: &[u8]) -> Reject {
    for line in lines(head).skip(1).take_while(|line| !line.is_empty()) {
        let name = line.iter().take_while(|b| !matches!(b, b':' | b' ' | b'\t')).count();
        match line.get(name..).unwrap_or_default() {
            [b':', ..] => {}
            _ if name == 0 => return Reject::HeaderFolded,
            space if space.trim_ascii_start().starts_with(b":") => return Reject::HeaderSpace,
            _ => return Reject::HeaderName,
        }
    }
    Reject::HeaderName
}

fn is_whole(request_line: Option<&[u8]>) -> bool {
    request_line.is_some_and(|line| line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0"))
}

fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    head.split(|b| *b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

/// Fields we or the API act on, of which two would leave open whose word counts.
const SINGLE_FIELDS: [&str; 5] = ["authorization", "content-length", "content-type", "expect", "host"];

fn fields(raw: &[httparse::Header<'_>]) -> Result<Vec<(String, String)>, Reject> {
    let mut fields: Vec<(String, String)> = Vec::with_capacity(raw.len());
    for field in raw {
        let value = std::str::from_utf8(field.value).map_err(|_| Reject::HeaderValue)?;
        fields.push((field.name.to_ascii_lowercase(), value.to_owned()));
    }
    for name in SINGLE_FIELDS {
        if fields.iter().filter(|(n, _)| n == name).count() > 1 {
            return Err(Reject::HeaderRepeated { name });
        }
    }
    Ok(fields)
}

fn single<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

/// All elements of a field that is a list, over all its lines.
fn list<'a>(fields: &'a [(String, String)], name: &'static str) -> impl Iterator<Item = &'a str> {
    fields.iter().filter(move |(n, _)| n == name).flat_map(|(_, value)| value.split(',')).map(str::trim)
}

fn check_host(fields: &[(String, String)], version: Version) -> Result<(), Reject> {
    match single(fields, "host") {
        // An empty one is legal (RFC 9110 section 7.2).
        Some(host) if host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~:[]%!$&'()*+;=".contains(&b)) => Ok(()),
        Some(_) => Err(Reject::HostInvalid),
        None if version == Version::Http10 => Ok(()),
        None => Err(Reject::HostMissing),
    }
}

fn framing(fields: &[(String, String)], version: Version) -> Result<Framing, Reject> {
    let length = single(fields, "content-length");
    let codings: Vec<_> = list(fields, "transfer-encoding").collect();
    match (length, codings.as_slice()) {
        (None, []) => Ok(Framing::None),
        (Some(length), []) => {
            // The integer parser would take "+1".
            let length = if length.bytes().all(|b| b.is_ascii_digit()) { length.parse::<u64>().ok() } else { None };
            let length = usize::try_from(length.ok_or(Reject::ContentLength)?).unwrap_or(usize::MAX);
            if length > HTTP_BODY_BYTES_MAX { Err(Reject::BodyBytes) } else { Ok(Framing::Length(length)) }
        }
        (Some(_), [_, ..]) => Err(Reject::CodingWithLength),
        (None, _) if version == Version::Http10 => Err(Reject::CodingVersion),
        (None, [before @ .., last]) => {
            let is_chunked = |coding: &str| coding.eq_ignore_ascii_case("chunked");
            match before {
                [] if is_chunked(last) => Ok(Framing::Chunked),
                _ if !is_chunked(last) || before.iter().any(|c| is_chunked(c)) => Err(Reject::CodingOrder),
                _ => Err(Reject::CodingUnknown),
            }
        }
    }
}

fn expectation(fields: &[(String, String)]) -> Result<bool, Reject> {
    match single(fields, "expect") {
        None => Ok(false),
        Some(value) if value.eq_ignore_ascii_case("100-continue") => Ok(true),
        Some(_) => Err(Reject::Expectation),
    }
}

/// Undoes the chunked coding (RFC 9112 section 7.1), slice by slice.
///
/// ```text
///            size 0
///   Size ------------> Trailer --> End
///   |  ^                 | ^
///   v  | CRLF            +-+ field line
///   Data
/// ```
#[derive(Debug)]
pub struct Chunks {
    at: At,
    extension_bytes: usize,
    trailer_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Size,
    /// This much is left of the chunk; then comes its CRLF.
    Data(usize),
    Trailer,
    End,
}

impl Chunks {
    /// At the first chunk size.
    pub fn new() -> Self {
        Self { at: At::Size, extension_bytes: 0, trailer_bytes: 0 }
    }

    /// Whether the coding is over; what follows is the next request.
    pub fn is_over(&self) -> bool {
        self.at == At::End
    }

    /// Appends to `body` the data in `bytes` and says how many of them are done with; the rest must be given again, with more.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(&mut self, bytes: &[u8], body: &mut Vec<u8>) -> Result<usize, Reject> {
        let mut rest = bytes;
        loop {
            match self.at {
                At::Size => {
                    let longest = CHUNK_DIGITS_MAX.saturating_add(HTTP_CHUNK_EXTENSION_BYTES_MAX);
                    let Some(line) = line(&mut rest, longest, Reject::ChunkExtension)? else { break };
                    let size = self.size(line)?;
                    if size > HTTP_BODY_BYTES_MAX.saturating_sub(body.len()) {
                        return Err(Reject::BodyBytes);
                    }
                    self.at = if size == 0 { At::Trailer } else { At::Data(size) };
                }
                At::Data(0) => match rest {
                    [b'\r', b'\n', after @ ..] => {
                        rest = after;
                        self.at = At::Size;
                    }
                    [] | [b'\r'] => break,
                    _ => return Err(Reject::ChunkEnd),
                },
                At::Data(left) => {
                    let (data, after) = rest.split_at(left.min(rest.len()));
                    body.extend_from_slice(data);
                    rest = after;
                    self.at = At::Data(left.saturating_sub(data.len()));
                    if data.is_empty() {
                        break;
                    }
                }
                At::Trailer => {
                    let Some(line) = line(&mut rest, HTTP_TRAILER_BYTES_MAX, Reject::TrailerBytes)? else { break };
                    self.trailer_bytes = self.trailer_bytes.saturating_add(line.len()).saturating_add(CRLF_BYTES);
                    match line {
                        [] => self.at = At::End,
                        _ if self.trailer_bytes > HTTP_TRAILER_BYTES_MAX => return Err(Reject::TrailerBytes),
                        _ if !line.contains(&b':') => return Err(Reject::HeaderName),
                        _ if !is_text(line) => return Err(Reject::HeaderValue),
                        _ => {}
                    }
                }
                At::End => break,
            }
        }
        Ok(bytes.len().saturating_sub(rest.len()))
    }

    fn size(&mut self, line: &[u8]) -> Result<usize, Reject> {
        let digits = match line.iter().position(|b| *b == b';') {
            None => line,
            Some(at) => {
                let (size, extension) = line.split_at(at);
                self.extension_bytes = self.extension_bytes.saturating_add(extension.len());
                if self.extension_bytes > HTTP_CHUNK_EXTENSION_BYTES_MAX || !is_text(extension) {
                    return Err(Reject::ChunkExtension);
                }
                size.trim_ascii_end()
            }
        };
        if digits.len() > CHUNK_DIGITS_MAX || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(Reject::ChunkSize);
        }
        let size = std::str::from_utf8(digits).ok().and_then(|d| u64::from_str_radix(d, 16).ok()).ok_or(Reject::ChunkSize)?;
        Ok(usize::try_from(size).unwrap_or(usize::MAX))
    }
}

impl Default for Chunks {
    fn default() -> Self {
        Self::new()
    }
}

/// Sixteen hexadecimal digits fill 64 bits.
const CHUNK_DIGITS_MAX: usize = 16;
const CRLF_BYTES: usize = 2;

/// Takes the first line off `rest`, CRLF and all; `None` when its end is still to come, `over` when that is too far off, whether it
/// came already or not.
fn line<'a>(rest: &mut &'a [u8], bytes_max: usize, over: Reject) -> Result<Option<&'a [u8]>, Reject> {
    match rest.iter().position(|b| *b == b'\n') {
        None if rest.len() > bytes_max.saturating_add(CRLF_BYTES) => Err(over),
        None => Ok(None),
        Some(at) if at > bytes_max.saturating_add(CRLF_BYTES) => Err(over),
        Some(at) => {
            let (line, after) = rest.split_at(at);
            *rest = after.strip_prefix(b"\n").unwrap_or(after);
            line.strip_suffix(b"\r").map(Some).ok_or(Reject::BareLineFeed)
        }
    }
}

fn is_text(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == b'\t' || !b.is_ascii_control())
}
