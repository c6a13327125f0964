//! HTTP/1.1, the server's side, by hand: what the control plane's API needs and nothing a peer could use beyond that.
//!
//! *In scope*: RFC 9112 with keep-alive, pipelining, `Content-Length` and chunked bodies both ways, `Expect: 100-continue`, HEAD,
//! origin-, absolute- and asterisk-form targets, HTTP/1.0 clients; streamed responses.
//! *Out of scope*: TLS, upgrades, CONNECT and TRACE (501), content and transfer codings but chunked, conditional and range requests,
//! trailers (read and dropped), cookies, obsolete line folding (400). Virtual hosts too; which `Host` a handler takes is its own rule.
//!
//! Invariant: a request whose end two parsers could see in two places is refused and its connection closed (RFC 9112 section 11.2).
//! Invariant: nothing a peer sent is written back raw; a [`Reject`] is a sentence of ours.
//! Invariant: every byte read or written is under a deadline and counted against a bound of [`limits`](crate::limits).

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

pub mod parse;
pub mod response;
pub mod route;
pub mod serve;

pub use parse::Reject;
pub use response::{Body, ChunkWriter, Response, Status};
pub use serve::{busy, serve};

/// Request methods we know (RFC 9110 section 9); any other is 501.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// DELETE
    Delete,
    /// GET
    Get,
    /// HEAD: answered like GET, without the body.
    Head,
    /// OPTIONS
    Options,
    /// PATCH
    Patch,
    /// POST
    Post,
    /// PUT
    Put,
}

impl Method {
    /// By its name, which is case-sensitive.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Delete, Self::Get, Self::Head, Self::Options, Self::Patch, Self::Post, Self::Put].into_iter().find(|m| m.as_str() == name)
    }

    /// Its name, as in `Allow`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Delete => "DELETE",
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Options => "OPTIONS",
            Self::Patch => "PATCH",
            Self::Post => "POST",
            Self::Put => "PUT",
        }
    }
}

/// A complete, well-formed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// The path, decoded: none for `/` (and for `*`, which also asks about the server as a whole), two for `/nodes/n1`.
    /// Invariant: no segment is empty, `.` or `..`, or has a slash, backslash or control character.
    pub segments: Vec<String>,
    /// The query, decoded, in order; a name may repeat, and a name without `=` has an empty value.
    pub query: Vec<(String, String)>,
    /// Header fields in order; names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, chunks joined.
    pub body: Vec<u8>,
    /// Whether the request declared a body, be it an empty one; where none was, 411 can be the answer.
    pub has_body_framing: bool,
    /// The other end of the connection, for logs.
    pub peer: String,
    /// Whether it came over TCP to an address of this machine's loopback.
    pub is_over_loopback: bool,
}

impl Request {
    /// The first header field called `name`, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// The other end, while its request is being handled.
pub trait Client {
    /// Whether the client left, or the server stops: then there is nobody, or no time, to wait for. One that only closed its sending
    /// side still waits for its answer.
    fn is_over(&mut self) -> bool;
}

/// What answers requests.
pub trait Handler: Send + Sync {
    /// Answers a request. One that takes its time looks now and then whether `client` still waits.
    fn handle(&self, request: &Request, client: &mut dyn Client) -> Response;

    /// Renders the refusal of something that did not become a request; the connection is closed after it.
    fn reject(&self, reject: &Reject) -> Response;
}
