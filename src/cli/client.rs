//! HTTP to a control plane: requests, answers as JSON, streams, and what can go wrong.
//!
//! *Scope*: `ureq` enters here. *Not here*: what the JSON means ([`super::show`]).
//!
//! Invariant: `getaddrinfo` is not linked: [`Hosts`] is the only resolver. No proxy, no redirect, no TLS.

use std::fmt;
use std::io::{self, Read};
use std::time::Duration;

use serde_json::Value;
use ureq::http::{Method, Request, Response, Uri};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{NextTimeout, TcpConnector};
use ureq::{Agent, AsSendBody, Body};

use super::show;
use crate::deadline::Deadline;
use crate::limits;
use crate::net::address;
use crate::report::{Chain, Exit};

/// Why there is no answer, or not the one hoped for.
#[derive(Debug)]
pub(super) enum Error {
    /// What came is not what a control plane says.
    Answer { server: String },
    /// The answer began, and broke off.
    Broken { cause: io::Error },
    /// The control plane said no.
    Refused(Box<Refusal>),
    /// Not an address of a server.
    Server { server: String },
    /// No connection, or no answer in time.
    Unreachable { server: String, cause: Box<ureq::Error> },
}

/// An `application/problem+json` answer (RFC 9457), as far as people need it.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    code: String,
    detail: String,
    /// JSON pointers, and what is wrong there.
    errors: Vec<(String, String)>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer { server } => write!(f, "{server} does not answer like a kakuri control plane"),
            Self::Broken { .. } => f.write_str("the answer broke off"),
            Self::Refused(refusal) => {
                f.write_str(&refusal.detail)?;
                refusal.errors.iter().try_for_each(|(pointer, detail)| write!(f, "\n  {pointer}: {detail}"))
            }
            Self::Server { server } => {
                write!(
                    f,
                    "server {server:?} must be http://HOST:PORT, HOST an IP address or a name in /etc/hosts; https is not in this version"
                )
            }
            Self::Unreachable { server, cause } => {
                match &**cause {
                    ureq::Error::Io(error) => write!(f, "no control plane at {server}: {error}")?,
                    ureq::Error::Other(error) => write!(f, "no control plane at {server}: {}", Chain(&**error))?,
                    ureq::Error::Timeout(phase) => write!(f, "{server} did not answer in time: {phase}")?,
                    other => write!(f, "no control plane at {server}: {other}")?,
                }
                f.write_str("\nstart one with 'kakuri play --project DIR', or say where it is: --server URL or KAKURI_ADDR")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Broken { cause } => Some(cause),
            // The cause of the unreachable stands in the text, before the hint.
            Self::Answer { .. } | Self::Refused(_) | Self::Server { .. } | Self::Unreachable { .. } => None,
        }
    }
}

impl Error {
    /// The one mapping of answers to exit codes.
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Answer { .. } => Exit::General,
            Self::Server { .. } => Exit::Usage,
            Self::Broken { .. } | Self::Unreachable { .. } => Exit::Unavailable,
            Self::Refused(refusal) => match refusal.status {
                400 | 413..=415 | 422 => Exit::Usage,
                401 | 403 => Exit::Denied,
                404 | 410 => Exit::NotFound,
                409 | 412 => Exit::Conflict,
                408 | 425 | 429 | 502..=504 => Exit::Unavailable,
                _ => Exit::General,
            },
        }
    }

    /// Whether the connection was lost when what was asked may have been on its way.
    pub(super) fn is_lost_connection(&self) -> bool {
        match self {
            Self::Broken { .. } => true,
            Self::Unreachable { cause, .. } => match &**cause {
                ureq::Error::Io(error) => error.kind() != io::ErrorKind::ConnectionRefused,
                ureq::Error::Protocol(_) => true,
                _ => false,
            },
            Self::Answer { .. } | Self::Refused(_) | Self::Server { .. } => false,
        }
    }

    /// Whether nobody knows if what was asked is done.
    pub(super) fn leaves_doubt(&self) -> bool {
        match self {
            Self::Refused(refusal) => refusal.code == "outcome_unknown",
            Self::Unreachable { cause, .. } => match &**cause {
                ureq::Error::Timeout(phase) => !matches!(phase, ureq::Timeout::Resolve | ureq::Timeout::Connect),
                _ => self.is_lost_connection(),
            },
            Self::Answer { .. } | Self::Broken { .. } => true,
            Self::Server { .. } => false,
        }
    }

    /// Whether the control plane said no, and will say so again.
    pub(super) fn is_rule(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.status < 500)
    }

    /// Whether the thing asked about is not there.
    pub(super) fn is_not_found(&self) -> bool {
        self.exit() == Exit::NotFound
    }
}

/// Resolves IP literals and the names in `/etc/hosts`.
#[derive(Debug)]
struct Hosts;

impl Resolver for Hosts {
    fn resolve(&self, uri: &Uri, _: &ureq::config::Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let found = address::resolve(host, uri.port_u16().unwrap_or(80));
        let found = found.map_err(|error| ureq::Error::Other(Box::new(error)))?;
        let mut addresses = self.empty();
        addresses.push(found);
        Ok(addresses)
    }
}

/// How long a body may take.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience {
    /// It is followed, and may be silent for days.
    Endless,
    /// It comes at once, but who reads it may be slow (a pager).
    PerRead,
    /// All of it by then.
    Until(Deadline),
}

/// A control plane.
pub(super) struct Client {
    agent: Agent,
    server: String,
}

impl Client {
    /// Nothing is connected yet.
    pub(super) fn new(server: &str) -> Result<Self, Error> {
        let fail = || Error::Server { server: server.to_owned() };
        let url = if server.contains("://") { server.trim_end_matches('/').to_owned() } else { format!("http://{server}") };
        let uri: Uri = url.parse().map_err(|_| fail())?;
        let plain = uri.scheme_str() == Some("http") && uri.host().is_some_and(|host| !host.is_empty()) && uri.query().is_none();
        if !plain {
            return Err(fail());
        }
        let config = Agent::config_builder()
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("kakuri/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_millis(limits::CLI_CONNECT_MS_MAX)))
            .timeout_send_request(Some(Duration::from_millis(limits::CLI_ANSWER_MS_MAX)))
            .timeout_send_body(Some(Duration::from_millis(limits::CLI_ANSWER_MS_MAX)))
            .build();
        Ok(Self { agent: Agent::with_parts(config, TcpConnector::default(), Hosts), server: url })
    }

    /// `GET`; the control plane may take `wait_ms` longer than usual.
    pub(super) fn get(&self, path: &str, wait_ms: u64) -> Result<Value, Error> {
        let response = self.send(Method::GET, path, (), wait_ms, Patience::PerRead)?;
        self.json(response)
    }

    /// `POST` of JSON text, as given.
    pub(super) fn post(&self, path: &str, body: &[u8], wait_ms: u64) -> Result<Value, Error> {
        let response = self.send(Method::POST, path, body, wait_ms, Patience::PerRead)?;
        self.json(response)
    }

    /// `PATCH` by RFC 7396.
    pub(super) fn patch(&self, path: &str, body: &[u8]) -> Result<Value, Error> {
        let response = self.send(Method::PATCH, path, body, 0, Patience::PerRead)?;
        self.json(response)
    }

    /// `DELETE`
    pub(super) fn delete(&self, path: &str) -> Result<Value, Error> {
        let response = self.send(Method::DELETE, path, (), 0, Patience::PerRead)?;
        self.json(response)
    }

    /// `GET` of something that comes bit by bit.
    pub(super) fn stream(&self, path: &str, patience: Patience) -> Result<impl Read + use<>, Error> {
        let response = self.send(Method::GET, path, (), 0, patience)?;
        if response.status().is_success() { Ok(response.into_body().into_reader()) } else { Err(self.refusal(response)) }
    }

    /// What comes is not what a control plane says.
    pub(super) fn unlike(&self) -> Error {
        Error::Answer { server: self.server.clone() }
    }

    fn send(&self, method: Method, path: &str, body: impl AsSendBody, wait_ms: u64, patience: Patience) -> Result<Response<Body>, Error> {
        let unreachable = |cause| Error::Unreachable { server: self.server.clone(), cause: Box::new(cause) };
        let kind = if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        let request = Request::builder().method(method).uri(format!("{}{path}", self.server));
        let request = request.header("content-type", kind).header("accept", "*/*").body(body);
        let request = self.agent.configure_request(request.map_err(|cause| unreachable(ureq::Error::Http(cause)))?);
        let answer = Duration::from_millis(limits::CLI_ANSWER_MS_MAX.saturating_add(wait_ms));
        let request = request.timeout_recv_response(Some(answer));
        let request = match patience {
            Patience::Endless => request,
            Patience::PerRead => request.timeout_per_read(Some(answer)),
            // A deadline that has passed still leaves the millisecond in which that is noticed.
            Patience::Until(deadline) => request.timeout_recv_body(Some(deadline.left().unwrap_or(Duration::from_millis(1)))),
        };
        self.agent.run(request.build()).map_err(unreachable)
    }

    fn json(&self, response: Response<Body>) -> Result<Value, Error> {
        if !response.status().is_success() {
            return Err(self.refusal(response));
        }
        let bytes = whole(response).map_err(|cause| Error::Broken { cause })?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).map_err(|_| self.unlike())
    }

    fn refusal(&self, response: Response<Body>) -> Error {
        let status = response.status();
        // A refusal whose text broke off is still a refusal; the status says most of it.
        let problem: Value = whole(response).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let detail = ["/detail", "/title"].iter().find_map(|at| problem.pointer(at)).map(show::text);
        let detail = detail.unwrap_or_else(|| format!("{} answered {status}", self.server));
        let errors = problem.pointer("/errors").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let errors = errors.iter().map(|error| (show::at(error, "/pointer"), show::at(error, "/detail"))).collect();
        Error::Refused(Box::new(Refusal { status: status.as_u16(), code: show::at(&problem, "/code"), detail, errors }))
    }
}

fn whole(response: Response<Body>) -> Result<Vec<u8>, io::Error> {
    let mut body = response.into_body();
    body.with_config().limit(limits::CLI_ANSWER_BYTES_MAX).read_to_vec().map_err(ureq::Error::into_io)
}

/// A path with its query, everything that is not plain percent-encoded (RFC 3986).
pub(super) fn query(path: &str, pairs: &[(&str, String)]) -> String {
    let mut target = path.to_owned();
    for (i, (key, value)) in pairs.iter().enumerate() {
        target.push(if i == 0 { '?' } else { '&' });
        target.push_str(key);
        target.push('=');
        for byte in value.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => target.push(char::from(byte)),
                _ => target.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    target
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::thread;

    /// Serves one connection with one answer; returns what was asked.
    fn answered(answer: &'static str, ask: impl FnOnce(&Client)) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let server = format!("http://localhost:{}", listener.local_addr().expect("bound").port());
        let serve = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.windows(4).any(|w| w == b"\r\n\r\n") {
                let n = stream.read(&mut buffer).expect("a request");
                request.extend_from_slice(&buffer[..n]);
            }
            stream.write_all(answer.as_bytes()).expect("written");
            String::from_utf8(request).expect("text")
        });
        ask(&Client::new(&server).expect("a server"));
        serve.join().expect("served")
    }

    #[test]
    fn a_problem_is_shown_as_people_want_it() {
        let body = r#"{"title":"invalid","detail":"the workload has 2 problems","errors":[
            {"pointer":"/memory_mb","detail":"too small"},{"pointer":"/id","detail":"bad\u001b[31m"}]}"#;
        let answer = format!("HTTP/1.1 422 x\r\nContent-Length: {}\r\n\r\n{body}", body.len()).leak();
        let asked = answered(answer, |client| {
            let error = client.post("/workloads", b"{}", 0).expect_err("refused");
            assert_eq!(error.to_string(), "the workload has 2 problems\n  /memory_mb: too small\n  /id: bad\\u{1b}[31m");
            assert_eq!(error.exit(), Exit::Usage);
        });
        assert!(asked.starts_with("POST /workloads HTTP/1.1\r\n") && asked.contains("content-length: 2"), "{asked}");
    }

    #[test]
    fn a_post_of_nothing_says_so() {
        let asked = answered("HTTP/1.1 202 x\r\nContent-Length: 2\r\n\r\n{}", |client| {
            assert_eq!(client.post("/workloads/a/stop", b"", 0).expect("accepted"), serde_json::json!({}));
        });
        assert!(asked.to_ascii_lowercase().contains("content-length: 0"), "{asked}");
    }

    #[test]
    fn answers_that_are_none_are_told_apart() {
        let check = |answer: &'static str, expect: Exit| {
            answered(answer, |client| assert_eq!(client.get("/x", 0).expect_err("an error").exit(), expect, "{answer}"));
        };
        check("HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n", Exit::NotFound);
        check("HTTP/1.1 403 x\r\nContent-Length: 0\r\n\r\n", Exit::Denied);
        check("HTTP/1.1 409 x\r\nContent-Length: 0\r\n\r\n", Exit::Conflict);
        check("HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n", Exit::Unavailable);
        check("HTTP/1.1 302 x\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", Exit::General);
        check("HTTP/1.1 200 x\r\nContent-Length: 4\r\n\r\nHi!\n", Exit::General);
        check("HTTP/1.1 200 x\r\nContent-Length: 9\r\n\r\n{", Exit::Unavailable);
        check("SSH-2.0-OpenSSH\r\n\r\n", Exit::Unavailable);
    }

    #[test]
    fn nobody_there_is_said_with_a_hint() {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
        let error = Client::new(&free.to_string()).expect("a server").get("/nodes", 0).expect_err("nobody");
        assert_eq!(error.exit(), Exit::Unavailable);
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("no control plane at http://{free}: Connection refused")) && text.contains("kakuri play"),
            "{text}"
        );
        let error = Client::new("http://no-such-host.invalid:1").expect("a server").get("/", 0).expect_err("nobody");
        assert!(error.to_string().contains("is not in /etc/hosts"), "{error}");
    }

    #[test]
    fn only_plain_http_is_spoken() {
        for good in ["http://127.0.0.1:8080", "http://[::1]:80/", "127.0.0.1:8080", "localhost"] {
            assert!(Client::new(good).is_ok(), "{good}");
        }
        for bad in ["https://127.0.0.1", "ftp://a", "", "http://", "http://a b", "http://a?x=y", "unix:///run/x"] {
            assert!(matches!(Client::new(bad), Err(Error::Server { .. })), "{bad}");
        }
    }

    #[test]
    fn queries_are_encoded() {
        assert_eq!(query("/w", &[]), "/w");
        assert_eq!(query("/w", &[("label", "a=b c".into()), ("x", "1".into())]), "/w?label=a%3Db%20c&x=1");
    }
}
