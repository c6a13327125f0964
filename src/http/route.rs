//! The request target: path segments to `match` on, and query parameters.
//!
//! Each segment is decoded on its own, after the split, and may not bring separators or dot segments back in: what is matched is
//! what every intermediary saw. *Not here*: the table itself, which is `control_plane/api.rs`:
//!
//! ```text
//! match (request.method, request.path().as_slice()) {
//!     (Method::Get, ["workloads", id]) => ..
//! ```

use super::{Method, Reject, Request};

impl Request {
    /// The path segments, to match on.
    pub fn path(&self) -> Vec<&str> {
        self.segments.iter().map(String::as_str).collect()
    }

    /// A query parameter that may be given once.
    ///
    /// # Errors
    /// [`Reject::QueryRepeated`]
    pub fn query_value(&self, name: &'static str) -> Result<Option<&str>, Reject> {
        let mut values = self.query.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str());
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            _ => Err(Reject::QueryRepeated { name }),
        }
    }

    /// A query parameter that is a number.
    ///
    /// # Errors
    /// [`Reject::QueryNumber`], [`Reject::QueryRepeated`]
    pub fn query_u64(&self, name: &'static str) -> Result<Option<u64>, Reject> {
        match self.query_value(name)? {
            None => Ok(None),
            // The integer parser would take "+1".
            Some(value) if !value.bytes().all(|b| b.is_ascii_digit()) => Err(Reject::QueryNumber { name }),
            Some(value) => value.parse().map(Some).map_err(|_| Reject::QueryNumber { name }),
        }
    }

    /// A query parameter that is on or off; alone (`?follow`) it is on, absent it is off.
    ///
    /// # Errors
    /// [`Reject::QueryFlag`], [`Reject::QueryRepeated`]
    pub fn query_flag(&self, name: &'static str) -> Result<bool, Reject> {
        match self.query_value(name)? {
            None | Some("false" | "0") => Ok(false),
            Some("" | "true" | "1") => Ok(true),
            Some(_) => Err(Reject::QueryFlag { name }),
        }
    }
}

/// A request target, taken apart; see the fields of [`Request`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) segments: Vec<String>,
    pub(super) query: Vec<(String, String)>,
}

/// Takes a request target apart (RFC 9112 section 3.2).
pub(super) fn target(method: Method, raw: &str) -> Result<Target, Reject> {
    let origin = match raw {
        "*" if method == Method::Options => "/",
        _ if raw.starts_with('/') => raw,
        _ => after_authority(raw).ok_or(Reject::TargetForm)?,
    };
    if !origin.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'#' | b'\\')) {
        return Err(Reject::TargetCharacter);
    }
    let (path, query) = origin.split_once('?').unwrap_or((origin, ""));
    let segments = match path.strip_prefix('/').unwrap_or(path) {
        "" => Vec::new(),
        path => path.split('/').map(segment).collect::<Result<_, _>>()?,
    };
    let query = query.split('&').filter(|pair| !pair.is_empty()).map(pair).collect::<Result<_, _>>()?;
    Ok(Target { segments, query })
}

/// What follows the authority of an absolute-form target. The authority itself is ours by the fact that it reached us.
fn after_authority(raw: &str) -> Option<&str> {
    let (scheme, rest) = raw.split_once("://")?;
    let at = rest.find(['/', '?']).unwrap_or(rest.len());
    let is_http = scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https");
    (is_http && at > 0).then(|| rest.get(at..)).flatten()
}

fn segment(raw: &str) -> Result<String, Reject> {
    let segment = decode(raw)?;
    match segment.as_str() {
        "" | "." | ".." => Err(Reject::PathSegment),
        s if s.contains(['/', '\\']) => Err(Reject::PathSegment),
        _ => Ok(segment),
    }
}

fn pair(raw: &str) -> Result<(String, String), Reject> {
    let (name, value) = raw.split_once('=').unwrap_or((raw, ""));
    Ok((decode(&name.replace('+', " "))?, decode(&value.replace('+', " "))?))
}

/// Undoes percent-encoding (RFC 3986 section 2.1).
fn decode(raw: &str) -> Result<String, Reject> {
    let mut decoded = Vec::with_capacity(raw.len());
    let mut bytes = raw.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(if byte == b'%' { nibble(bytes.next())? << 4 | nibble(bytes.next())? } else { byte });
    }
    let decoded = String::from_utf8(decoded).map_err(|_| Reject::TargetEncoding)?;
    if decoded.chars().any(char::is_control) { Err(Reject::TargetEncoding) } else { Ok(decoded) }
}

fn nibble(digit: Option<u8>) -> Result<u8, Reject> {
    digit.and_then(|d| char::from(d).to_digit(16)).and_then(|d| u8::try_from(d).ok()).ok_or(Reject::TargetEncoding)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(raw: &str, path: &[&str], query: &[(&str, &str)]) {
        let Target { segments, query: pairs } = target(Method::Get, raw).unwrap_or_else(|reject| panic!("{raw}: {reject}"));
        assert_eq!(segments, path, "{raw}");
        assert_eq!(pairs.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect::<Vec<_>>(), query, "{raw}");
    }

    #[test]
    fn targets_come_apart() {
        check("/", &[], &[]);
        check("/?a=1", &[], &[("a", "1")]);
        check("/nodes/n1", &["nodes", "n1"], &[]);
        check("/a%20b/%E9%9A%94", &["a b", "隔"], &[]);
        check("/a+b", &["a+b"], &[]);
        check("/a%2Bb%3F%23%25", &["a+b?#%"], &[]);
        check("/.../.a", &["...", ".a"], &[]);
        check(
            "/l?x=1&x=2&&y&z=&=v&q=a+b%2B%2f%5c%3D=",
            &["l"],
            &[("x", "1"), ("x", "2"), ("y", ""), ("z", ""), ("", "v"), ("q", "a b+/\\==")],
        );
        check("http://h:80/a?b", &["a"], &[("b", "")]);
        check("HTTPS://h", &[], &[]);
        check("http://h?a=/", &[], &[("a", "/")]);
        assert_eq!(target(Method::Options, "*"), Ok(Target { segments: vec![], query: vec![] }));
    }

    #[test]
    fn a_bad_target_is_refused_by_the_rule_it_breaks() {
        for raw in ["//", "/a//b", "/a/", "/.", "/..", "/a/../b", "/%2e", "/%2E%2e", "/.%2e/x", "/a%2fb", "/a%2Fb", "/a%5cb", "http://h//"]
        {
            assert_eq!(target(Method::Get, raw), Err(Reject::PathSegment), "{raw}");
        }
        for raw in
            ["/%", "/%4", "/%4g", "/%+1", "/%00", "/%0a", "/%7f", "/%c2%85", "/%ff", "/%c3", "/%ed%a0%80", "/?a=%", "/?%00", "/?a=%0d%0a"]
        {
            assert_eq!(target(Method::Get, raw), Err(Reject::TargetEncoding), "{raw}");
        }
        for raw in ["/隔", "/a#b", "/?a#b", "/a\\b"] {
            assert_eq!(target(Method::Get, raw), Err(Reject::TargetCharacter), "{raw}");
        }
        for raw in ["*", "**", "", "h", "h:80", "ftp://h/", "http:///a", "http://", "http:/a", "?a", "%2f"] {
            assert_eq!(target(Method::Get, raw), Err(Reject::TargetForm), "{raw}");
        }
    }

    #[test]
    fn query_values_are_typed_and_given_once() {
        let Target { segments, query } =
            target(Method::Get, "/?n=7&big=18446744073709551616&plus=%2B1&none=&on&off=false&odd=yes&d=1&d=2").expect("valid");
        let request = super::super::parse::head(b"GET / HTTP/1.0\r\n\r\n")
            .expect("valid")
            .map(|(_, head)| Request { segments, query, ..head.request })
            .expect("whole");
        assert_eq!(request.path(), [""; 0]);
        assert_eq!(request.query_u64("n"), Ok(Some(7)));
        assert_eq!(request.query_u64("absent"), Ok(None));
        for name in ["big", "plus", "none", "odd"] {
            assert_eq!(request.query_u64(name), Err(Reject::QueryNumber { name }));
        }
        assert_eq!((request.query_flag("on"), request.query_flag("off"), request.query_flag("absent")), (Ok(true), Ok(false), Ok(false)));
        assert_eq!(request.query_flag("odd"), Err(Reject::QueryFlag { name: "odd" }));
        assert_eq!(request.query_value("d"), Err(Reject::QueryRepeated { name: "d" }));
    }
}
