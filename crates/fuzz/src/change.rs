//! How an input becomes another one.

use crate::Dice;

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
pub(crate) fn changed(pool: &[Vec<u8>], words: &[&str], length_max: usize, dice: &mut Dice) -> Vec<u8> {
    let mut input = one_of(pool, dice).cloned().unwrap_or_default();
    for _ in 0..=dice.below(5) {
        change(&mut input, pool, words, dice);
    }
    input.truncate(length_max);
    input
}

fn change(input: &mut Vec<u8>, pool: &[Vec<u8>], words: &[&str], dice: &mut Dice) {
    let at = dice.below(input.len());
    match dice.below(12) {
        0 => on_byte(input, at, |byte| byte ^ (1 << (at % 8))),
        1 => {
            let new = dice.byte();
            on_byte(input, at, |_| new);
        }
        2 => {
            let step = dice.byte() % 8;
            on_byte(input, at, |byte| byte.wrapping_add(step).wrapping_sub(4));
        }
        3 => overwrite(input, at, &number(dice)),
        4 => {
            let cut = range(input.len(), 1024, dice);
            input.drain(cut);
        }
        5 => input.truncate(at),
        6 => {
            let copy = input[range(input.len(), 1024, dice)].to_vec();
            insert(input, at, &copy);
        }
        7 => {
            let copy = input[range(input.len(), 1024, dice)].to_vec();
            overwrite(input, at, &copy);
        }
        8 => {
            let other = one_of(pool, dice).cloned().unwrap_or_default();
            let part = range(other.len(), 4096, dice);
            insert(input, at, &other[part]);
        }
        9 => {
            let word = one_of(words, dice).copied().unwrap_or_default();
            insert(input, at, word.as_bytes());
        }
        10 => {
            let word = one_of(words, dice).copied().unwrap_or_default();
            overwrite(input, at, word.as_bytes());
        }
        _ => replace_digits(input, at, dice),
    }
}

/// One of `all`, if there is any.
fn one_of<'a, T>(all: &'a [T], dice: &mut Dice) -> Option<&'a T> {
    all.get(dice.below(all.len()))
}

/// A range of at most `most` bytes in `length` bytes; short ones are more likely.
fn range(length: usize, most: usize, dice: &mut Dice) -> std::ops::Range<usize> {
    let start = dice.below(length + 1);
    let most = most >> dice.below(8);
    let end = start + dice.below(most.min(length - start) + 1);
    start..end
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
fn number(dice: &mut Dice) -> Vec<u8> {
    let value = one_of(&NUMBERS, dice).copied().unwrap_or_default();
    let size = 1 << dice.below(4);
    let bytes = value.to_le_bytes()[..size].to_vec();
    if dice.below(2) == 0 { bytes } else { bytes.into_iter().rev().collect() }
}

/// Puts another number in the place of the next digits.
fn replace_digits(input: &mut Vec<u8>, at: usize, dice: &mut Dice) {
    let Some(start) = input[at.min(input.len())..].iter().position(u8::is_ascii_digit).map(|found| at + found) else {
        return;
    };
    let length = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let digits = one_of(&DIGITS, dice).copied().unwrap_or_default();
    input.splice(start..start + length, digits.bytes());
}
