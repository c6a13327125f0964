//! Who asks. The only maker of a [`Caller`]; TLS and tokens will be checked here and nowhere else.
//!
//! A web page on this machine reaches whatever listens on loopback, and a browser tells on it: it sends `Origin` (RFC 6454 section 7)
//! and `Sec-Fetch-Site` (<https://www.w3.org/TR/fetch-metadata/>) with whatever a page asks to be changed, and the name in the page's
//! address as `Host`, which is not ours even if it was made to resolve to this machine. No page is of ours, so all are refused.
//! Programs send none of that.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use super::Refusal;
use crate::http::{Method, Request, Status};

/// Who asks, and as what. Nothing outside this file can make one.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    actor: &'static str,
    role: Role,
}

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Everything.
    Admin,
}

/// Whoever reaches a listener and is no web page is who runs this machine: a listener beyond loopback and Unix sockets refuses to
/// start without `--insecure-listen`, and then that is said at every start and in `/readyz`.
pub(super) fn identify(request: &Request) -> Result<Caller, Refusal> {
    // What can be read holds secrets, so this counts for a GET as well; but for what says nothing of anybody.
    let says_nothing = matches!(request.path().as_slice(), ["livez" | "readyz" | "version" | "openapi.json"]);
    if request.is_over_loopback && !says_nothing && !request.header("host").is_none_or(is_local) {
        let detail =
            "on a loopback listener, Host is localhost or an IP address: any other name may be a web page's, made to resolve to us";
        return Err(Refusal::new(Status::Forbidden, "host_not_local", detail));
    }
    let is_change = !matches!(request.method, Method::Get | Method::Head | Method::Options);
    let tells = |(name, value): &(String, String)| match name.as_str() {
        "origin" => true,
        "sec-fetch-site" => !["none", "same-origin"].contains(&value.as_str()),
        _ => false,
    };
    if is_change && request.headers.iter().any(tells) {
        let detail = "web pages change nothing here: a request with Origin, or with Sec-Fetch-Site of another site, is refused";
        return Err(Refusal::new(Status::Forbidden, "from_web_page", detail));
    }
    Ok(Caller { actor: "local", role: Role::Admin })
}

/// Whether a `Host` can only mean this machine, or names no machine at all. An empty one no browser sends.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let literal = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let is_address = match literal {
        Some(literal) => literal.parse::<Ipv6Addr>().is_ok(),
        None => name.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4()),
    };
    is_address || host.is_empty() || name.eq_ignore_ascii_case("localhost")
}

/// For logs: `local (admin)`.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Admin => "admin",
        };
        write!(f, "{} ({role})", self.actor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_this_machine_or_no_name() {
        for host in ["localhost", "LocalHost:8080", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:8080", "10.0.0.7:1", "", "localhost:"] {
            assert!(is_local(host), "{host:?}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "localhost.",
            "x",
            "[::1",
            "::1",
            "[1.2.3.4]",
            "0x7f.1",
            "2130706433",
            ":80:80",
            "localhost:80a",
        ] {
            assert!(!is_local(host), "{host:?}");
        }
    }
}
