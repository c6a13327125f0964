//! A gRPC message in its stream: one byte of flags, four of length, the message (gRPC over HTTP/2, "Length-Prefixed-Message").

use bytes::Bytes;

use super::ErrorKind;
use crate::limits;

/// Puts the prefix before a message.
///
/// # Errors
/// [`ErrorKind::TooLarge`].
pub fn encode(message: &[u8]) -> Result<Bytes, ErrorKind> {
    let length = u32::try_from(message.len()).ok().filter(|n| *n as usize <= limits::GRPC_MESSAGE_BYTES_MAX);
    let length = length.ok_or(ErrorKind::TooLarge { bytes: message.len() as u64 })?;
    let mut framed = Vec::with_capacity(message.len().saturating_add(PREFIX_BYTES));
    framed.push(0);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    Ok(framed.into())
}

const PREFIX_BYTES: usize = 5;

/// Takes messages out of the bytes of a stream. Holds no more than arrived, and never more than one message over the limit.
///
/// Invariant: `begin <= bytes.len()`; what was taken is moved out of the way only when more arrives, so that many small messages in
/// one piece cost no more than their bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    begin: usize,
}

impl Decoder {
    /// Adds what arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.begin);
        self.begin = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next complete message; `None` until it is complete.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] as soon as the prefix says so, [`ErrorKind::Protocol`] for a compressed message: we never said
    /// that we accept any compression.
    pub fn take(&mut self) -> Result<Option<Vec<u8>>, ErrorKind> {
        let waiting = self.bytes.get(self.begin..).unwrap_or_default();
        let Some((prefix, rest)) = waiting.split_first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
        let [flags, a, b, c, d] = *prefix;
        if flags != 0 {
            return Err(ErrorKind::Protocol("a compressed message that nobody asked for"));
        }
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > limits::GRPC_MESSAGE_BYTES_MAX {
            return Err(ErrorKind::TooLarge { bytes: length as u64 });
        }
        let Some(message) = rest.get(..length) else { return Ok(None) };
        let message = message.to_vec();
        self.begin = self.begin.saturating_add(PREFIX_BYTES).saturating_add(length);
        Ok(Some(message))
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.begin >= self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_wherever_the_bytes_are_split() {
        let mut stream = encode(b"first").expect("small").to_vec();
        stream.extend_from_slice(&encode(b"").expect("small"));
        stream.extend_from_slice(&encode(b"third").expect("small"));
        for at in 0..stream.len() {
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for part in [&stream[..at], &stream[at..]] {
                decoder.push(part);
                while let Some(message) = decoder.take().expect("valid") {
                    seen.push(message);
                }
            }
            assert_eq!(seen, [&b"first"[..], b"", b"third"], "split at {at}");
            assert!(decoder.is_empty());
        }
    }

    #[test]
    fn the_limit_is_checked_on_the_prefix_alone() {
        let check = |length: u32| {
            let mut decoder = Decoder::default();
            decoder.push(&[0]);
            decoder.push(&length.to_be_bytes());
            decoder.take()
        };
        let max = u32::try_from(limits::GRPC_MESSAGE_BYTES_MAX).expect("fits");
        assert!(matches!(check(max), Ok(None)));
        assert!(matches!(check(max + 1), Err(ErrorKind::TooLarge { .. })));
        assert!(encode(&vec![0; limits::GRPC_MESSAGE_BYTES_MAX]).is_ok());
        assert!(encode(&vec![0; limits::GRPC_MESSAGE_BYTES_MAX + 1]).is_err());
    }

    #[test]
    fn compression_is_refused() {
        let mut decoder = Decoder::default();
        decoder.push(&[1, 0, 0, 0, 0]);
        assert!(matches!(decoder.take(), Err(ErrorKind::Protocol(_))));
    }
}
