//! Makes `:authority` acceptable: clients on Unix sockets put the socket's path there, percent-encoded (gRPC's C core from 1.58,
//! which is Python's) or plain (Java), and `h2` resets such a stream (hyperium/h2, pull request 487).
//!
//! The bytes of a connection pass through here one whole frame at a time. In a HEADERS frame, what a host name cannot hold becomes
//! `-`, byte for byte, so that every length and the HPACK table stay as they were. A Huffman-coded value passes unchanged.

use std::ops::Range;

/// The client's connection preface (RFC 9113 section 3.4).
const PREFACE_BYTES: usize = 24;
const HEAD_BYTES: usize = 9;
/// We never allow more than the default SETTINGS_MAX_FRAME_SIZE.
const PAYLOAD_BYTES_MAX: usize = 1 << 14;
const HEADERS: u8 = 1;
const FLAG_PADDED: u8 = 0x08;
const FLAG_PRIORITY: u8 = 0x20;

/// The filter of one connection.
#[derive(Debug, Default)]
pub(super) struct Filter {
    /// Invariant: less than one frame.
    held: Vec<u8>,
    is_past_preface: bool,
    /// A frame broke the rules; `h2` may say so.
    is_open: bool,
}

impl Filter {
    /// Takes what was read, gives what is complete.
    pub(super) fn pass(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(bytes);
        let mut end = 0;
        while let Some(length) = self.whole(end) {
            let frame = self.held.get_mut(end..end + length).unwrap_or_default();
            if self.is_past_preface {
                mend(frame);
            }
            self.is_past_preface = true;
            end += length;
        }
        if self.is_open {
            end = self.held.len();
        }
        let rest = self.held.split_off(end);
        std::mem::replace(&mut self.held, rest)
    }

    /// The length of the frame at `at`, or of the preface, when all of it is here.
    fn whole(&mut self, at: usize) -> Option<usize> {
        let held = self.held.get(at..).unwrap_or_default();
        let length = match (self.is_past_preface, held) {
            (false, _) => PREFACE_BYTES,
            (true, [0, high, low, _, _, _, _, _, _, ..]) => HEAD_BYTES + usize::from(u16::from_be_bytes([*high, *low])),
            (true, [_, _, _, ..]) if held.len() >= HEAD_BYTES => usize::MAX,
            (true, _) => return None,
        };
        self.is_open |= length > HEAD_BYTES + PAYLOAD_BYTES_MAX;
        (!self.is_open && held.len() >= length).then_some(length)
    }
}

/// Mends the header block of a frame, if it has one (RFC 9113 section 6.2).
fn mend(frame: &mut [u8]) {
    let Some((&mut [_, _, _, HEADERS, flags, ..], payload)) = frame.split_first_chunk_mut::<HEAD_BYTES>() else { return };
    let skip = usize::from(flags & FLAG_PADDED != 0) + if flags & FLAG_PRIORITY == 0 { 0 } else { 5 };
    let block = payload.get_mut(skip..).unwrap_or_default();
    let Some(value) = authority(block) else { return };
    let value = block.get_mut(value).unwrap_or_default();
    if value.iter().any(|b| matches!(b, b'%' | b'/')) {
        for b in value.iter_mut().filter(|b| !b.is_ascii_alphanumeric() && **b != b'.') {
            *b = b'-';
        }
    }
}

/// Where a literal `:authority` stands in a header block, unless it is Huffman-coded (RFC 7541 section 6).
fn authority(block: &[u8]) -> Option<Range<usize>> {
    const AUTHORITY: usize = 1; // In the static table.
    let mut at = 0;
    loop {
        let (bits, is_literal) = match block.get(at)? {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let index;
        (index, at) = integer(block, at, bits)?;
        if is_literal {
            let mut is_authority = index == AUTHORITY;
            if index == 0 {
                let (name, _) = string(block, at)?;
                at = name.end;
                is_authority = block.get(name)? == b":authority";
            }
            let (value, is_huffman) = string(block, at)?;
            if is_authority {
                return (!is_huffman).then_some(value);
            }
            at = value.end;
        }
    }
}

/// A string's place, and whether it is Huffman-coded (RFC 7541 section 5.2).
fn string(block: &[u8], at: usize) -> Option<(Range<usize>, bool)> {
    let is_huffman = block.get(at)? & 0x80 != 0;
    let (length, start) = integer(block, at, 7)?;
    let end = start.checked_add(length).filter(|end| *end <= block.len())?;
    Some((start..end, is_huffman))
}

/// An integer in the low `bits` of a byte and those that follow; and where it ends (RFC 7541 section 5.1).
fn integer(block: &[u8], at: usize, bits: u32) -> Option<(usize, usize)> {
    let mask = (1 << bits) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    let mut next = at + 1;
    if value == mask {
        for shift in [0, 7, 14] {
            let byte = usize::from(*block.get(next)?);
            next += 1;
            value += (byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some((value, next));
            }
        }
        return None;
    }
    Some((value, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(payload.len()).expect("short").to_be_bytes();
        [&[0, length[0], length[1], kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// `:method POST`, `:path` of 130 bytes, `:authority` with its name so encoded, and another literal.
    fn block(name: &[u8], authority: &[u8]) -> Vec<u8> {
        let path = [&[0x44, 0x7f, 3][..], &[b'/'; 130]].concat();
        let length = u8::try_from(authority.len()).expect("short");
        [&[0x83], &path[..], name, &[length], authority, &[0x00, 1, b'a', 1, b'/']].concat()
    }

    #[test]
    fn a_path_becomes_a_name_wherever_the_bytes_are_split() {
        let check = |flags: u8, before: &[u8], authority: &[u8], expect: &[u8]| {
            for name in [&b"\x41"[..], b"\x01", b"\x40\x0a:authority"] {
                let headers = |authority| frame(1, flags, &[before, &block(name, authority)].concat());
                let stream = |authority| [PREFACE, &frame(4, 0, b""), &headers(authority), &frame(0, 0, b"A%/")].concat();
                let (input, output) = (stream(authority), stream(expect));
                for at in 0..input.len() {
                    let mut filter = Filter::default();
                    let mut out = filter.pass(&input[..at]);
                    out.extend(filter.pass(&input[at..]));
                    assert_eq!(out, output, "split at {at}");
                }
            }
        };
        check(4, b"", b"tmp%2Fa_b%2Fs.sock", b"tmp-2Fa-b-2Fs.sock");
        check(4, b"", b"/run/x:1/s.sock", b"-run-x-1-s.sock");
        check(0x2c, &[0, 0, 0, 0, 0, 9], b"a%2F", b"a-2F");
        check(4, b"", b"localhost", b"localhost");
        check(4, b"", b"[::1]:80", b"[::1]:80");
    }

    #[test]
    fn what_breaks_the_rules_passes_as_it_is() {
        let check = |frame: &[u8]| {
            let mut filter = Filter::default();
            assert_eq!(filter.pass(PREFACE), PREFACE);
            assert_eq!(filter.pass(frame), frame);
        };
        check(&frame(1, 4, b""));
        check(&frame(1, 4, &[0x41]));
        check(&frame(1, 4, &[0x41, 0x05, b'%']));
        check(&frame(1, 4, &[0x41, 0x82, 0xff, 0xff]));
        check(&frame(1, 4, &[0xff; 20]));
        check(&frame(1, 0x28, &[1]));
        check(&[1, 0, 0, 1, 4, 0, 0, 0, 1, 0x41]);
        check(&frame(0, 0, &vec![0; PAYLOAD_BYTES_MAX]));
        check(&frame(0, 0, &vec![0; PAYLOAD_BYTES_MAX + 1])[..100]);
    }
}
