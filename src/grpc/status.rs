//! How a call ended: `grpc-status` and `grpc-message` (gRPC over HTTP/2, "Responses").

use std::fmt;

use crate::limits;
use crate::report::clip;

/// The canonical status codes of gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)] // The names are the standard's own.
pub enum Code {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

impl Code {
    /// Every code, at its own number.
    pub const ALL: [Self; 17] = [
        Self::Ok,
        Self::Cancelled,
        Self::Unknown,
        Self::InvalidArgument,
        Self::DeadlineExceeded,
        Self::NotFound,
        Self::AlreadyExists,
        Self::PermissionDenied,
        Self::ResourceExhausted,
        Self::FailedPrecondition,
        Self::Aborted,
        Self::OutOfRange,
        Self::Unimplemented,
        Self::Internal,
        Self::Unavailable,
        Self::DataLoss,
        Self::Unauthenticated,
    ];

    /// The code with this number. A number gRPC does not know is `Unknown`, as the standard says.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let number: usize = std::str::from_utf8(text).ok()?.parse().ok()?;
        Some(Self::ALL.get(number).copied().unwrap_or(Self::Unknown))
    }
}

/// An error as the server answered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// What kind.
    pub code: Code,
    /// In its words; clipped.
    pub message: String,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.code, self.message)
    }
}

/// Undoes the percent-encoding of `grpc-message`. What is not well encoded is kept as it is: it is only words.
pub fn decode_message(bytes: &[u8]) -> String {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((first, tail)) = rest.split_first() {
        let decoded = match (first, tail) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)).map(|(h, l)| h << 4 | l),
            _ => None,
        };
        out.push(decoded.unwrap_or(*first));
        rest = tail.get(if decoded.is_some() { 2 } else { 0 }..).unwrap_or_default();
    }
    clip(String::from_utf8_lossy(&out).into_owned(), limits::GRPC_STATUS_MESSAGE_BYTES_MAX)
}

/// Percent-encodes a `grpc-message`: what is not printable ASCII, and `%`.
pub fn encode_message(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        if matches!(b, b' '..=b'~') && b != b'%' {
            out.push(char::from(b));
        } else {
            out.push('%');
            for nibble in [b >> 4, b & 15] {
                out.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0').to_ascii_uppercase());
            }
        }
    }
    out
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|d| u8::try_from(d).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_percent_encoding() {
        for text in ["", "plain words", "100% of \"x\"\nfailed", "隔離"] {
            assert_eq!(decode_message(encode_message(text).as_bytes()), text);
        }
        assert_eq!(decode_message(b"50%"), "50%");
        assert_eq!(decode_message(b"%zz%4"), "%zz%4");
        assert_eq!(decode_message(b"%FF"), "\u{fffd}");
    }

    #[test]
    fn codes_are_their_numbers() {
        for (number, code) in Code::ALL.iter().enumerate() {
            assert_eq!(Code::parse(number.to_string().as_bytes()), Some(*code));
        }
        assert_eq!(Code::parse(b"99"), Some(Code::Unknown));
        assert_eq!(Code::parse(b"x"), None);
    }
}
