//! Chance that can be brought back, and what it does to bytes.

use std::fs;
use std::io::Read;

/// Marsaglia's xorshift; good enough to be unfair.
pub struct Dice(u64);

impl Dice {
    /// Dice that show how to throw them again: `KAKURI_SEED=0x..`.
    pub fn new() -> Self {
        let given = std::env::var("KAKURI_SEED").ok().and_then(|text| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok());
        let seed = given.unwrap_or_else(|| {
            let mut bytes = [0; 8];
            fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).expect("randomness");
            u64::from_le_bytes(bytes)
        });
        println!("KAKURI_SEED={seed:#x}");
        Self(seed | 1)
    }

    /// Others that these begin, for another thread.
    pub fn fork(&mut self) -> Self {
        Self(self.next() | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).expect("below a usize")
    }

    /// Two places in `bytes`, in order.
    fn range(&mut self, bytes: &[u8]) -> std::ops::Range<usize> {
        let (a, b) = (self.below(bytes.len() + 1), self.below(bytes.len() + 1));
        a.min(b)..a.max(b)
    }

    /// `bytes`, not as they were.
    pub fn mangle(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = bytes.to_vec();
        for _ in 0..=self.below(3) {
            let range = self.range(&out);
            match self.below(8) {
                0 => out.truncate(range.start),
                1 => drop(out.drain(range)),
                2 if !out.is_empty() => {
                    for _ in 0..=self.below(4) {
                        let at = self.below(out.len());
                        out[at] ^= 1 << self.below(8);
                    }
                }
                3 => {
                    let slice = out[range.clone()].to_vec();
                    for _ in 0..=self.below(20) {
                        out.splice(range.start..range.start, slice.iter().copied());
                    }
                }
                4 => {
                    let random: Vec<u8> = (0..self.below(64)).map(|_| self.next().to_le_bytes()[0]).collect();
                    drop(out.splice(range, random));
                }
                5 => {
                    let token = TOKENS[self.below(TOKENS.len())];
                    drop(out.splice(range.start..range.start, token.iter().copied()));
                }
                6 => {
                    let filler = vec![TOKENS[self.below(TOKENS.len())][0]; 1 << self.below(16)];
                    drop(out.splice(range.start..range.start, filler));
                }
                _ => out.rotate_left(range.start),
            }
        }
        out
    }
}

/// What parsers stumble over.
const TOKENS: [&[u8]; 22] = [
    b"\r\n",
    b"\n",
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b"\\",
    b":",
    b",",
    b" ",
    b"-",
    b"0",
    b"9999999999999999999999",
    b"1e999",
    b"null",
    b"\xf0\x9f\x92\xa9",
    b"%00",
    b"\\u0000",
    b"Transfer-Encoding: chunked\r\n",
];
