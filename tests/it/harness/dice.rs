//! Chance that can be brought back, and what it does to bytes.

use std::fs;
use std::io::Read;

/// SplitMix64 (Steele, Lea, Flood 2014): every seed is another sequence, also 2 and 3, and none of them is all zeros.
pub struct Dice(u64);

impl Dice {
    /// Dice that show how to throw them again: `KAKURI_SEED=0x..`.
    pub fn new() -> Self {
        let seed = std::env::var("KAKURI_SEED").map_or_else(
            |_| {
                let mut bytes = [0; 8];
                fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).expect("randomness");
                u64::from_le_bytes(bytes)
            },
            // Other dice than those that were asked for would prove something else.
            |text| seed_of(&text).unwrap_or_else(|| panic!("KAKURI_SEED={text:?} is neither 0x.. nor a number")),
        );
        println!("KAKURI_SEED={seed:#x}");
        Self(seed)
    }

    /// Others that these begin, for another thread.
    pub fn fork(&mut self) -> Self {
        Self(self.next())
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
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

/// A seed as it is shown, or as a decimal number.
fn seed_of(text: &str) -> Option<u64> {
    text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
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

mod tests {
    use super::*;

    #[test]
    fn no_two_seeds_are_the_same_dice() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..64 {
            let mut dice = Dice(seed);
            assert!(seen.insert((0..4).map(|_| dice.below(1 << 30)).collect::<Vec<_>>()), "{seed}");
            assert_ne!(dice.fork().next(), dice.next());
        }
        // As published for seed 1234567.
        assert_eq!(Dice(1_234_567).next(), 6_457_827_717_110_365_317);
        let seeds = [("0x10", Some(16)), ("16", Some(16)), ("", None), ("0x", None), ("x", None), ("1e3", None), ("-1", None)];
        for (text, expect) in seeds {
            assert_eq!(seed_of(text), expect, "{text}");
        }
    }
}
