//! How an input becomes another one.

/// Numbers without pattern, the same for the same seed (splitmix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, 0 if that is 0.
    fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { usize::try_from(self.next() % end as u64).unwrap_or(0) }
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.below(all.len()))
    }

    /// A range of at most `most` bytes in `length` bytes; short ones are more likely.
    fn range(&mut self, length: usize, most: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        let most = most >> self.below(8);
        let end = start + self.below(most.min(length - start) + 1);
        start..end
    }
}

/// Numbers at which parsers go wrong.
const NUMBERS: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

/// The same as texts.
const DIGITS: [&str; 8] = [
    "0",
    "-1",
    "1e400",
    "2147483648",
    "4294967296",
    "9223372036854775808",
    "18446744073709551616",
    "0000000000000000000001",
];

/// An input of `pool` after a few changes.
pub(crate) fn changed(pool: &[Vec<u8>], words: &[&str], length_max: usize, random: &mut Random) -> Vec<u8> {
    let mut input = random.one_of(pool).cloned().unwrap_or_default();
    for _ in 0..=random.below(5) {
        change(&mut input, pool, words, random);
    }
    input.truncate(length_max);
    input
}

fn change(input: &mut Vec<u8>, pool: &[Vec<u8>], words: &[&str], random: &mut Random) {
    let at = random.below(input.len());
    match random.below(12) {
        0 => on_byte(input, at, |byte| byte ^ (1 << (at % 8))),
        1 => {
            let new = random.byte();
            on_byte(input, at, |_| new);
        }
        2 => {
            let step = random.byte() % 8;
            on_byte(input, at, |byte| byte.wrapping_add(step).wrapping_sub(4));
        }
        3 => overwrite(input, at, &number(random)),
        4 => {
            let cut = random.range(input.len(), 1024);
            input.drain(cut);
        }
        5 => input.truncate(at),
        6 => {
            let copy = input[random.range(input.len(), 1024)].to_vec();
            insert(input, at, &copy);
        }
        7 => {
            let copy = input[random.range(input.len(), 1024)].to_vec();
            overwrite(input, at, &copy);
        }
        8 => {
            let other = random.one_of(pool).cloned().unwrap_or_default();
            let part = random.range(other.len(), 4096);
            insert(input, at, &other[part]);
        }
        9 => {
            let word = random.one_of(words).copied().unwrap_or_default();
            insert(input, at, word.as_bytes());
        }
        10 => {
            let word = random.one_of(words).copied().unwrap_or_default();
            overwrite(input, at, word.as_bytes());
        }
        _ => replace_digits(input, at, random),
    }
}

fn on_byte(input: &mut [u8], at: usize, change: impl FnOnce(u8) -> u8) {
    if let Some(byte) = input.get_mut(at) {
        *byte = change(*byte);
    }
}

fn overwrite(input: &mut [u8], at: usize, with: &[u8]) {
    let room = with.len().min(input.len() - at);
    input[at..at + room].copy_from_slice(&with[..room]);
}

fn insert(input: &mut Vec<u8>, at: usize, what: &[u8]) {
    input.splice(at..at, what.iter().copied());
}

/// A number of one, two, four or eight bytes in either order.
fn number(random: &mut Random) -> Vec<u8> {
    let value = random.one_of(&NUMBERS).copied().unwrap_or_default();
    let size = 1 << random.below(4);
    let bytes = value.to_le_bytes()[..size].to_vec();
    if random.below(2) == 0 { bytes } else { bytes.into_iter().rev().collect() }
}

/// Puts another number in the place of the next digits.
fn replace_digits(input: &mut Vec<u8>, at: usize, random: &mut Random) {
    let Some(start) = input[at.min(input.len())..].iter().position(u8::is_ascii_digit).map(|found| at + found) else {
        return;
    };
    let length = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let digits = random.one_of(&DIGITS).copied().unwrap_or_default();
    input.splice(start..start + length, digits.bytes());
}
