//! Where to listen or connect: an IP address with a port, or the path of a Unix socket.
//!
//! Names are resolved from `/etc/hosts` alone. A static glibc binary must not call `getaddrinfo` (it would load the host's
//! NSS plug-ins), and a security tool should not trust a resolver to say which machine it talks to.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use crate::limits;

/// Where to listen or connect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// `127.0.0.1:9000`, `[::1]:9000`, `name-in-etc-hosts:9000`.
    Tcp(SocketAddr),
    /// `unix:///run/kakuri/agent.sock`.
    Unix(PathBuf),
}

/// A text that is no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressError {
    /// The file of names cannot be read.
    Hosts,
    /// No colon and port at the end, or the port is no number up to 65535.
    Port,
    /// The name is not in `/etc/hosts`.
    UnknownName(String),
    /// A Unix path that is empty, relative or longer than a socket address holds.
    UnixPath,
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hosts => f.write_str("address names a host, and /etc/hosts cannot be read"),
            Self::Port => f.write_str("address must be IP:PORT, NAME:PORT or unix:///PATH"),
            Self::UnknownName(name) => {
                write!(f, "host name {name:?} is not in /etc/hosts (kakuri does not ask the DNS); give an IP address")
            }
            Self::UnixPath => write!(f, "unix socket path must be absolute and at most {UNIX_PATH_BYTES_MAX} bytes"),
        }
    }
}

impl std::error::Error for AddressError {}

/// `sun_path` of unix(7), less the final zero.
const UNIX_PATH_BYTES_MAX: usize = 107;

impl Address {
    /// Parses `IP:PORT`, `NAME:PORT` or `unix:///PATH`.
    ///
    /// # Errors
    /// [`AddressError`]: the rule the text breaks.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix://") {
            return unix_path(path).map(Self::Unix);
        }
        let (host, port) = text.rsplit_once(':').ok_or(AddressError::Port)?;
        let port = port.parse().map_err(|_| AddressError::Port)?;
        resolve(host.trim_start_matches('[').trim_end_matches(']'), port).map(Self::Tcp)
    }

    /// Whether only this machine can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(addr) => addr.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

/// The path of a Unix socket, given plain or as `unix:///PATH`.
///
/// # Errors
/// [`AddressError::UnixPath`].
pub fn unix_path(text: &str) -> Result<PathBuf, AddressError> {
    let path = text.strip_prefix("unix://").unwrap_or(text);
    let fits = Path::new(path).is_absolute() && path.len() <= UNIX_PATH_BYTES_MAX && !path.contains('\0');
    if fits { Ok(PathBuf::from(path)) } else { Err(AddressError::UnixPath) }
}

/// The address of a host: an IP literal, or a name in `/etc/hosts`.
///
/// # Errors
/// [`AddressError::UnknownName`], [`AddressError::Hosts`].
pub fn resolve(host: &str, port: u16) -> Result<SocketAddr, AddressError> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    if host.is_empty() {
        return Err(AddressError::Port);
    }
    let hosts = std::fs::read_to_string("/etc/hosts")
        .or_else(|_| if host == "localhost" { Ok(String::new()) } else { Err(AddressError::Hosts) })?;
    match find_host(&hosts, host) {
        Some(ip) => Ok(SocketAddr::new(ip, port)),
        None if host.eq_ignore_ascii_case("localhost") => Ok(SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port)),
        None => Err(AddressError::UnknownName(host.chars().take(limits::LABEL_BYTES_MAX).collect())),
    }
}

/// hosts(5): address, then names; `#` starts a comment. The first line that fits wins, IPv4 before IPv6.
fn find_host(hosts: &str, name: &str) -> Option<IpAddr> {
    let mut found: Option<IpAddr> = None;
    for line in hosts.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(ip) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
        if words.any(|word| word.eq_ignore_ascii_case(name)) {
            if ip.is_ipv4() {
                return Some(ip);
            }
            found = found.or(Some(ip));
        }
    }
    found
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_what_they_print() {
        for text in ["127.0.0.1:9000", "[::1]:80", "unix:///run/kakuri/agent.sock"] {
            assert_eq!(Address::parse(text).map(|a| a.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn bad_addresses_name_the_rule() {
        let check = |text: &str, error: AddressError| assert_eq!(Address::parse(text), Err(error), "{text}");
        check("", AddressError::Port);
        check("127.0.0.1", AddressError::Port);
        check("127.0.0.1:65536", AddressError::Port);
        check(":80", AddressError::Port);
        check("unix://run/x", AddressError::UnixPath);
        check(&format!("unix:///{}", "x".repeat(107)), AddressError::UnixPath);
        check("no-such-host.invalid:1", AddressError::UnknownName("no-such-host.invalid".into()));
    }

    #[test]
    fn hosts_lines_are_read_as_hosts_5_says() {
        let hosts = "::1 localhost six\n127.0.0.1\tlocalhost # six\n10.0.0.7 node-1 Node-One\nnonsense\n";
        assert_eq!(find_host(hosts, "localhost"), "127.0.0.1".parse().ok());
        assert_eq!(find_host(hosts, "six"), "::1".parse().ok());
        assert_eq!(find_host(hosts, "node-one"), "10.0.0.7".parse().ok());
        assert_eq!(find_host(hosts, "node"), None);
    }
}
