//! Classic BPF, written from its end: jumps only go forward, so every target is known when a jump is written.

use std::collections::HashMap;

/// An instruction, counted from the program's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position(usize);

/// `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u16,
    yes: u8,
    no: u8,
    constant: u32,
}

// Of linux/bpf_common.h, spelled as class | size or operation | source.
const LOAD_ABSOLUTE: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// A verdict this near is jumped to; a farther one is written again, which is no longer than a far jump.
const NEAR: usize = 200;

/// A program under construction, last instruction first.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    reversed: Vec<Instruction>,
    verdicts: HashMap<u32, Position>,
}

impl Assembler {
    /// The program's end with this verdict.
    pub(super) fn verdict(&mut self, verdict: u32) -> Position {
        match self.verdicts.get(&verdict) {
            Some(near) if self.reversed.len() - near.0 < NEAR => *near,
            _ => {
                let position = self.push(RETURN, 0, 0, verdict);
                self.verdicts.insert(verdict, position);
                position
            }
        }
    }

    pub(super) fn if_equal(&mut self, constant: u32, yes: Position, no: Position) -> Position {
        self.branch(JUMP_EQUAL, constant, yes, no)
    }

    pub(super) fn if_greater(&mut self, constant: u32, yes: Position, no: Position) -> Position {
        self.branch(JUMP_GREATER, constant, yes, no)
    }

    pub(super) fn if_greater_or_equal(&mut self, constant: u32, yes: Position, no: Position) -> Position {
        self.branch(JUMP_GREATER_OR_EQUAL, constant, yes, no)
    }

    /// Loads a word of `struct seccomp_data`, then goes on at `next`.
    pub(super) fn load_before(&mut self, offset: u32, next: Position) -> Position {
        self.go_to(next);
        self.push(LOAD_ABSOLUTE, 0, 0, offset)
    }

    /// Masks the accumulator, then goes on at `next`.
    pub(super) fn and_before(&mut self, mask: u32, next: Position) -> Position {
        if mask == u32::MAX {
            return next;
        }
        self.go_to(next);
        self.push(AND, 0, 0, mask)
    }

    /// Loads a word; what was written last follows.
    pub(super) fn load(&mut self, offset: u32) {
        self.push(LOAD_ABSOLUTE, 0, 0, offset);
    }

    /// The program as an array of `struct sock_filter`.
    pub(super) fn finish(self) -> Vec<u8> {
        let instructions = self.reversed.into_iter().rev();
        instructions
            .flat_map(|Instruction { code, yes, no, constant }| {
                let ([a, b], [c, d, e, f]) = (code.to_ne_bytes(), constant.to_ne_bytes());
                [a, b, yes, no, c, d, e, f]
            })
            .collect()
    }

    /// Makes what comes next, in the order of execution, `next`.
    fn go_to(&mut self, next: Position) {
        if next.0 + 1 != self.reversed.len() {
            let distance = self.reversed.len() - next.0 - 1;
            self.push(JUMP, 0, 0, u32::try_from(distance).unwrap_or(u32::MAX));
        }
    }

    fn branch(&mut self, code: u16, constant: u32, yes: Position, no: Position) -> Position {
        // A relay for one target may push the other out of reach, so the farther one goes first.
        let (yes, no) = if yes.0 < no.0 {
            let yes = self.within_reach(yes, 1);
            (yes, self.within_reach(no, 0))
        } else {
            let no = self.within_reach(no, 1);
            (self.within_reach(yes, 0), no)
        };
        let (yes, no) = (self.distance(yes), self.distance(no));
        self.push(code, yes, no, constant)
    }

    /// The position itself, or a jump to it that a branch can reach even after `more` further instructions.
    fn within_reach(&mut self, target: Position, more: usize) -> Position {
        let distance = self.reversed.len() - target.0 - 1;
        if distance + more <= u8::MAX.into() {
            return target;
        }
        self.push(JUMP, 0, 0, u32::try_from(distance).unwrap_or(u32::MAX))
    }

    #[expect(clippy::cast_possible_truncation, reason = "`within_reach` has seen to it")]
    fn distance(&self, target: Position) -> u8 {
        (self.reversed.len() - target.0 - 1) as u8
    }

    fn push(&mut self, code: u16, yes: u8, no: u8, constant: u32) -> Position {
        self.reversed.push(Instruction { code, yes, no, constant });
        Position(self.reversed.len() - 1)
    }
}
