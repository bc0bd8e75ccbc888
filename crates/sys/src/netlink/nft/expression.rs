//! What rules are made of: expressions, and verdicts.

use super::Family;
use crate::netlink::Writer;

/// A register of 32 bits, 0 to 15. Longer values continue in the next ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reg(pub u8);

/// A comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum Cmp {
    Eq = 0,
    Neq = 1,
}

/// Field of a packet's meta data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum Meta {
    Mark = 3,
    IifName = 6,
    OifName = 7,
    NfProto = 15,
    L4Proto = 16,
}

/// Field of a connection; those of a tuple are read in the direction in which the connection was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum Ct {
    State = 0,
    Status = 2,
    OriginalProtoDst = 12,
    OriginalDstIp = 20,
    OriginalDstIp6 = 22,
}

/// Where a payload offset counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum From {
    Network = 1,
    Transport = 2,
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum Verdict<'a> {
    Drop,
    Accept,
    Return,
    Jump(&'a str),
    Goto(&'a str),
}

impl<'a> Verdict<'a> {
    /// The one with this number; `chain` is where it leads, if it does. `None`: rules here have no such.
    pub(super) fn of(code: i32, chain: &'a str) -> Option<Self> {
        let all = [Verdict::Drop, Verdict::Accept, Verdict::Return, Verdict::Jump(chain), Verdict::Goto(chain)];
        all.into_iter().find(|verdict| verdict.code() == code)
    }

    pub(super) fn code(self) -> i32 {
        match self {
            Verdict::Drop => 0,
            Verdict::Accept => 1,
            Verdict::Jump(_) => -3,
            Verdict::Goto(_) => -4,
            Verdict::Return => -5,
        }
    }
}

/// What a rule does to a dynamic set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum DynsetOp {
    Add = 0,
    Update = 1,
    Delete = 2,
}

/// One expression of a rule. An expression that does not match ends its rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are explained, their fields say themselves what they are")]
pub enum Expr<'a> {
    /// Loads bytes of the packet.
    Payload { dreg: Reg, from: From, offset: u32, len: u32 },
    /// Loads meta data.
    Meta { dreg: Reg, key: Meta },
    /// Writes meta data.
    SetMeta { key: Meta, sreg: Reg },
    /// Loads a field of the connection.
    Ct { dreg: Reg, key: Ct },
    /// Loads the type of an address (`RTN_LOCAL` is 2): of the destination, else of the source.
    FibType { dreg: Reg, destination: bool },
    /// Loads a constant.
    Load { dreg: Reg, value: &'a [u8] },
    /// Goes on if the register compares so.
    Compare { sreg: Reg, op: Cmp, value: &'a [u8] },
    /// `dreg = sreg & mask`.
    Mask { sreg: Reg, dreg: Reg, mask: &'a [u8] },
    /// Goes on if the key is in the set (or is not).
    Lookup { set: &'a str, sreg: Reg, invert: bool },
    /// Loads the value of the key, goes on if there is one.
    Map { set: &'a str, sreg: Reg, dreg: Reg },
    /// Takes the verdict of the key, goes on if there is none.
    Vmap { set: &'a str, sreg: Reg },
    /// Loads a random number below the modulus.
    Random { dreg: Reg, modulus: u32 },
    /// Destination address and port translation.
    Dnat { family: Family, address: Reg, port: Reg },
    /// Source translation to the outgoing interface's address, with ports chosen at random.
    Masquerade,
    /// Writes into a dynamic set.
    Dynset { set: &'a str, op: DynsetOp, key: Reg, data: Option<Reg>, timeout_ms: u64 },
    /// Refuses: TCP by a reset, everything else by ICMP port unreachable. `tcp` says which of the two this rule sends.
    Reject { tcp: bool },
    /// At most this many packets a second.
    Limit { rate_per_s: u64 },
    /// Counts packets and bytes.
    Counter,
    /// Ends with a verdict.
    Verdict(Verdict<'a>),
}

pub(super) fn write_verdict(w: &mut Writer, verdict: Verdict<'_>) {
    w.nest(2, |w| {
        w.be32(1, verdict.code().cast_unsigned());
        if let Verdict::Jump(chain) | Verdict::Goto(chain) = verdict {
            w.str(2, chain);
        }
    });
}

impl Expr<'_> {
    fn name(&self) -> &'static str {
        match self {
            Expr::Payload { .. } => "payload",
            Expr::Meta { .. } | Expr::SetMeta { .. } => "meta",
            Expr::Ct { .. } => "ct",
            Expr::FibType { .. } => "fib",
            Expr::Load { .. } | Expr::Verdict(_) => "immediate",
            Expr::Compare { .. } => "cmp",
            Expr::Mask { .. } => "bitwise",
            Expr::Lookup { .. } | Expr::Map { .. } | Expr::Vmap { .. } => "lookup",
            Expr::Random { .. } => "numgen",
            Expr::Dnat { .. } => "nat",
            Expr::Masquerade => "masq",
            Expr::Dynset { .. } => "dynset",
            Expr::Reject { .. } => "reject",
            Expr::Limit { .. } => "limit",
            Expr::Counter => "counter",
        }
    }
}

/// `NFT_REG32_00`; the verdict register is 0.
fn register(reg: Reg) -> u32 {
    8 + u32::from(reg.0)
}

pub(super) fn write_expression(w: &mut Writer, expression: &Expr<'_>) {
    w.nest(1, |w| {
        w.str(1, expression.name());
        w.nest(2, |w| write_operands(w, expression));
    });
}

/// The attributes of an expression, each with its own numbers (`enum nft_*_attributes`).
fn write_operands(w: &mut Writer, expression: &Expr<'_>) {
    match *expression {
        Expr::Payload { dreg, from, offset, len } => {
            numbers(w, &[(1, register(dreg)), (2, from as u32), (3, offset), (4, len)])
        }
        Expr::Meta { dreg, key } => numbers(w, &[(1, register(dreg)), (2, key as u32)]),
        Expr::SetMeta { key, sreg } => numbers(w, &[(2, key as u32), (3, register(sreg))]),
        Expr::Ct { dreg, key } => write_ct(w, dreg, key),
        Expr::FibType { dreg, destination } => {
            const ADDRTYPE: u32 = 3;
            numbers(w, &[(1, register(dreg)), (2, ADDRTYPE), (3, if destination { 2 } else { 1 })]);
        }
        Expr::Load { dreg, value } => {
            numbers(w, &[(1, register(dreg))]);
            w.nest(2, |w| w.bytes_attr(1, value));
        }
        Expr::Compare { sreg, op, value } => {
            numbers(w, &[(1, register(sreg)), (2, op as u32)]);
            w.nest(3, |w| w.bytes_attr(1, value));
        }
        Expr::Mask { sreg, dreg, mask } => write_mask(w, sreg, dreg, mask),
        Expr::Lookup { set, sreg, invert } => write_lookup(w, set, &[(2, register(sreg)), (5, invert.into())]),
        Expr::Map { set, sreg, dreg } => write_lookup(w, set, &[(2, register(sreg)), (3, register(dreg))]),
        // Its result goes into the register of verdicts.
        Expr::Vmap { set, sreg } => write_lookup(w, set, &[(2, register(sreg)), (3, 0)]),
        Expr::Random { dreg, modulus } => {
            const RANDOM: u32 = 1;
            numbers(w, &[(1, register(dreg)), (2, modulus), (3, RANDOM)]);
        }
        Expr::Dnat { family, address, port } => {
            const DNAT: u32 = 1;
            numbers(w, &[(1, DNAT), (2, family as u32), (3, register(address)), (5, register(port))]);
        }
        // NF_NAT_RANGE_PROTO_RANDOM_FULLY: two clients behind one address do not race for a port.
        Expr::Masquerade => numbers(w, &[(1, 1 << 4)]),
        Expr::Dynset { set, op, key, data, timeout_ms } => write_dynset(w, set, op, key, data, timeout_ms),
        Expr::Reject { tcp } => write_reject(w, tcp),
        Expr::Limit { rate_per_s } => write_limit(w, rate_per_s),
        Expr::Counter => {
            w.be64(1, 0);
            w.be64(2, 0);
        }
        Expr::Verdict(verdict) => {
            numbers(w, &[(1, 0)]);
            w.nest(2, |w| write_verdict(w, verdict));
        }
    }
}

/// Attributes of 32 bits.
fn numbers(w: &mut Writer, attributes: &[(u16, u32)]) {
    attributes.iter().for_each(|(kind, value)| w.be32(*kind, *value));
}

fn write_lookup(w: &mut Writer, set: &str, attributes: &[(u16, u32)]) {
    w.str(1, set);
    numbers(w, attributes);
}

fn write_reject(w: &mut Writer, tcp: bool) {
    const TCP_RST: u32 = 1;
    const ICMPX_UNREACH: u32 = 2;
    const PORT_UNREACH: u8 = 1;
    numbers(w, &[(1, if tcp { TCP_RST } else { ICMPX_UNREACH })]);
    w.u8(2, if tcp { 0 } else { PORT_UNREACH });
}

fn write_limit(w: &mut Writer, rate_per_s: u64) {
    const BURST: u32 = 5;
    w.be64(1, rate_per_s);
    w.be64(2, 1);
    numbers(w, &[(3, BURST)]);
}

fn write_ct(w: &mut Writer, dreg: Reg, key: Ct) {
    w.be32(1, register(dreg));
    w.be32(2, key as u32);
    if matches!(key, Ct::OriginalProtoDst | Ct::OriginalDstIp | Ct::OriginalDstIp6) {
        const ORIGINAL: u8 = 0;
        w.u8(3, ORIGINAL);
    }
}

fn write_mask(w: &mut Writer, sreg: Reg, dreg: Reg, mask: &[u8]) {
    w.be32(1, register(sreg));
    w.be32(2, register(dreg));
    w.be32(3, u32::try_from(mask.len()).unwrap_or(0));
    w.nest(4, |w| w.bytes_attr(1, mask));
    w.nest(5, |w| w.bytes_attr(1, &vec![0; mask.len()]));
}

fn write_dynset(w: &mut Writer, set: &str, op: DynsetOp, key: Reg, data: Option<Reg>, timeout_ms: u64) {
    w.str(1, set);
    w.be32(3, op as u32);
    w.be32(4, register(key));
    if let Some(data) = data {
        w.be32(5, register(data));
    }
    if timeout_ms > 0 {
        w.be64(6, timeout_ms);
    }
}
