//! nftables transactions (nf_tables over nfnetlink).
//!
//! A [`Batch`] collects changes; [`Socket::commit`] applies all or none of them, in one step for the packets.
//! Names and numbers are those of `linux/netfilter/nf_tables.h`.

mod expression;

use std::collections::{BTreeMap, BTreeSet};

use rustix::io::Errno;

pub use self::expression::{Cmp, Ct, DynsetOp, Expr, From, Meta, Reg, Verdict};
use self::expression::{write_expression, write_verdict};
use super::{ACK, APPEND, Attribute, Attributes, CREATE, DUMP, Error, Message, Result, Socket, Writer};

const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEWTABLE: u16 = SUBSYSTEM;
const GETTABLE: u16 = SUBSYSTEM | 1;
const DELTABLE: u16 = SUBSYSTEM | 2;
const NEWCHAIN: u16 = SUBSYSTEM | 3;
const GETCHAIN: u16 = SUBSYSTEM | 4;
const DELCHAIN: u16 = SUBSYSTEM | 5;
const NEWRULE: u16 = SUBSYSTEM | 6;
const DELRULE: u16 = SUBSYSTEM | 8;
const NEWSET: u16 = SUBSYSTEM | 9;
const GETSET: u16 = SUBSYSTEM | 10;
const DELSET: u16 = SUBSYSTEM | 11;
const NEWSETELEM: u16 = SUBSYSTEM | 12;
const GETSETELEM: u16 = SUBSYSTEM | 13;
const DELSETELEM: u16 = SUBSYSTEM | 14;
const GETGEN: u16 = SUBSYSTEM | 16;
const HEADER_BYTES: usize = 4;
const CHAIN_NAME: u16 = 3;
const CHAIN_USE: u16 = 6;
const SET_NAME: u16 = 2;

/// `NFT_SET_ELEM_LIST_ELEMENTS` is one attribute, whose length has 16 bits.
const ELEMENTS_BYTES_MAX: usize = 60_000;

/// Family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// IPv4.
    Ipv4 = 2,
    /// IPv6.
    Ipv6 = 10,
}

/// Where a base chain hooks in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// What a base chain is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    /// `filter` or `nat`.
    pub kind: &'static str,
    /// Its hook.
    pub hook: Hook,
    /// Its place among the chains of the hook.
    pub priority: i32,
}

/// A data type, for the programs that list tables; numbers are those of libnftables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "nft's own names")]
pub enum Type {
    Verdict = 1,
    Ipv4Addr = 7,
    Ipv6Addr = 8,
    InetProto = 12,
    InetService = 13,
    Mark = 19,
    Ifname = 41,
}

impl Type {
    fn bytes(self) -> u32 {
        match self {
            Type::Verdict | Type::Ipv6Addr | Type::Ifname => 16,
            _ => 4,
        }
    }
    /// Length as the type itself declares it; in a concatenation every part is padded to 4 bytes.
    fn bytes_alone(self) -> u32 {
        match self {
            Type::InetProto => 1,
            Type::InetService => 2,
            other => other.bytes(),
        }
    }
}

/// A set or map.
#[derive(Debug, Clone, Copy)]
pub struct Set<'a> {
    /// Its name.
    pub name: &'a str,
    /// Parts of the key.
    pub key: &'a [Type],
    /// Parts of the value; empty for a set.
    pub data: &'a [Type],
    /// For sets that rules write into: the most elements.
    pub dynamic: Option<u32>,
}

/// An element of a set or map.
#[derive(Debug, Clone, Copy)]
pub struct Element<'a> {
    /// The key; every part padded to 4 bytes.
    pub key: &'a [u8],
    /// Its value.
    pub data: Data<'a>,
}

/// The value of an element.
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    /// A set has none.
    None,
    /// Bytes; every part padded to 4 bytes.
    Value(&'a [u8]),
    /// A verdict.
    Verdict(Verdict<'a>),
}

/// The changes of one transaction on one table.
#[derive(Debug)]
pub struct Batch {
    writer: Writer,
    table: String,
    family: Family,
    set_id: u32,
    chains: BTreeMap<String, Additions>,
    deleted_chains: BTreeSet<String>,
    elements: BTreeMap<String, ElementSum>,
}

/// Elements of a set, as far as two such sums are to be compared: how many there are, and what they say. The order does not
/// matter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ElementSum {
    /// How many.
    pub count: i64,
    /// The sum of their prints.
    pub prints: u64,
}

impl ElementSum {
    fn of(element: &Element<'_>) -> Self {
        let print = Print::default().with(element.key);
        let print = match element.data {
            Data::None => print,
            Data::Value(value) => print.with(value),
            Data::Verdict(verdict) => {
                let chain = if let Verdict::Jump(chain) | Verdict::Goto(chain) = verdict { chain } else { "" };
                print.with(&verdict.code().to_be_bytes()).with(chain.as_bytes())
            }
        };
        ElementSum { count: 1, prints: print.0 }
    }
}

impl std::ops::AddAssign for ElementSum {
    fn add_assign(&mut self, more: ElementSum) {
        self.count += more.count;
        self.prints = self.prints.wrapping_add(more.prints);
    }
}

impl std::ops::SubAssign for ElementSum {
    fn sub_assign(&mut self, less: ElementSum) {
        self.count -= less.count;
        self.prints = self.prints.wrapping_sub(less.prints);
    }
}

/// FNV-1a, 64 bits, of texts with their lengths.
#[derive(Debug, Clone, Copy)]
struct Print(u64);

impl Default for Print {
    fn default() -> Self {
        Print(0xcbf2_9ce4_8422_2325)
    }
}

impl Print {
    fn with(self, bytes: &[u8]) -> Print {
        let length = (bytes.len() as u64).to_be_bytes();
        let step = |print: u64, byte: &u8| (print ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        Print(length.iter().chain(bytes).fold(self.0, step))
    }
}

/// What a transaction adds to a chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Additions {
    /// Whether it hooks in, and needs nobody who leads there.
    pub is_base: bool,
    /// Number of rules.
    pub rules: u32,
}

fn header(family: u8, resource: u16) -> [u8; HEADER_BYTES] {
    let resource = resource.to_be_bytes();
    [family, 0, resource[0], resource[1]]
}

impl Batch {
    /// No change to this table yet.
    pub fn new(family: Family, table: &str) -> Self {
        let mut writer = Writer::new();
        writer.message(BATCH_BEGIN, 0, &header(0, SUBSYSTEM >> 8), |_| ());
        Batch {
            writer,
            table: table.into(),
            family,
            set_id: 0,
            chains: BTreeMap::new(),
            deleted_chains: BTreeSet::new(),
            elements: BTreeMap::new(),
        }
    }

    /// Whether nothing has been added.
    pub fn is_empty(&self) -> bool {
        self.writer.count() == 1
    }

    /// The chains that it creates or leaves.
    pub fn chains(&self) -> &BTreeMap<String, Additions> {
        &self.chains
    }

    /// The chains that it deletes.
    pub fn deleted_chains(&self) -> &BTreeSet<String> {
        &self.deleted_chains
    }

    /// The elements that it adds to sets, less those that it deletes one by one.
    pub fn elements(&self) -> &BTreeMap<String, ElementSum> {
        &self.elements
    }

    fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Writer, &str)) {
        let table = &self.table;
        self.writer.message(kind, flags, &header(self.family as u8, 0), |w| body(w, table));
    }

    /// Creates the table; leaves it if it exists.
    pub fn add_table(&mut self) {
        self.message(NEWTABLE, CREATE, |w, table| {
            w.str(1, table);
            w.be32(2, 0);
        });
    }

    /// Deletes the table and everything in it. Preceded by [`Batch::add_table`] it never fails.
    pub fn delete_table(&mut self) {
        self.message(DELTABLE, 0, |w, table| w.str(1, table));
    }

    /// Deletes the rules of all chains of the table; it must be there.
    pub fn flush_rules(&mut self) {
        self.message(DELRULE, 0, |w, table| w.str(1, table));
    }

    /// Creates a chain; leaves it if it exists.
    pub fn add_chain(&mut self, name: &str, base: Option<Base>) {
        self.chains.entry(name.to_owned()).or_default().is_base |= base.is_some();
        self.message(NEWCHAIN, CREATE, |w, table| {
            w.str(1, table);
            w.str(3, name);
            if let Some(base) = base {
                w.nest(4, |w| {
                    w.be32(1, base.hook as u32);
                    w.be32(2, base.priority.cast_unsigned());
                });
                w.be32(5, 1);
                w.str(7, base.kind);
            }
        });
    }

    /// Deletes an empty chain that nothing refers to.
    pub fn delete_chain(&mut self, name: &str) {
        self.deleted_chains.insert(name.to_owned());
        self.message(DELCHAIN, 0, |w, table| {
            w.str(1, table);
            w.str(3, name);
        });
    }

    /// Appends a rule to a chain.
    pub fn add_rule(&mut self, chain: &str, expressions: &[Expr<'_>]) {
        self.chains.entry(chain.to_owned()).or_default().rules += 1;
        self.message(NEWRULE, CREATE | APPEND, |w, table| {
            w.str(1, table);
            w.str(2, chain);
            w.nest(4, |w| expressions.iter().for_each(|expression| write_expression(w, expression)));
        });
    }

    /// Creates a set or map; leaves it if it exists with the same definition.
    pub fn add_set(&mut self, set: &Set<'_>) {
        const MAP: u32 = 0x8;
        const TIMEOUT: u32 = 0x10;
        const EVAL: u32 = 0x20;
        self.set_id += 1;
        let id = self.set_id;
        let mut flags = if set.data.is_empty() { 0 } else { MAP };
        if set.dynamic.is_some() {
            flags |= TIMEOUT | EVAL;
        }
        self.message(NEWSET, CREATE, |w, table| {
            w.str(1, table);
            w.str(2, set.name);
            w.be32(3, flags);
            w.be32(4, type_number(set.key));
            w.be32(5, type_bytes(set.key));
            match set.data {
                [] => (),
                [Type::Verdict] => {
                    w.be32(6, 0xffff_ff00);
                    w.be32(7, 16);
                }
                data => {
                    w.be32(6, type_number(data));
                    w.be32(7, type_bytes(data));
                }
            }
            w.be32(10, id);
            if let Some(size) = set.dynamic {
                w.nest(9, |w| w.be32(1, size));
            }
        });
    }

    /// Deletes a set or map that no rule refers to.
    pub fn delete_set(&mut self, name: &str) {
        self.message(DELSET, 0, |w, table| {
            w.str(1, table);
            w.str(2, name);
        });
    }

    /// Deletes all elements of a set.
    pub fn flush_set(&mut self, set: &str) {
        self.message(DELSETELEM, 0, |w, table| {
            w.str(1, table);
            w.str(2, set);
        });
    }

    /// Adds elements. One that exists with the same value is left; with another value the transaction fails.
    pub fn add_elements<'e>(&mut self, set: &str, elements: impl IntoIterator<Item = Element<'e>>) {
        let mut sum = ElementSum::default();
        let elements = elements.into_iter().inspect(|element| sum += ElementSum::of(element));
        self.write_elements(NEWSETELEM, CREATE, set, elements);
        *self.elements.entry(set.to_owned()).or_default() += sum;
    }

    /// Deletes elements of a set by key. One that does not exist fails the transaction.
    pub fn delete_elements<'e>(&mut self, set: &str, keys: impl IntoIterator<Item = &'e [u8]>) {
        self.delete_pairs(set, keys.into_iter().map(|key| Element { key, data: Data::None }));
    }

    /// Deletes elements of a map, which have these values, by key. One that does not exist fails the transaction.
    pub fn delete_pairs<'e>(&mut self, map: &str, elements: impl IntoIterator<Item = Element<'e>>) {
        let mut sum = ElementSum::default();
        let keys = elements.into_iter().map(|element| {
            sum += ElementSum::of(&element);
            Element { data: Data::None, ..element }
        });
        self.write_elements(DELSETELEM, 0, map, keys);
        *self.elements.entry(map.to_owned()).or_default() -= sum;
    }

    fn write_elements<'e>(
        &mut self,
        kind: u16,
        flags: u16,
        set: &str,
        elements: impl IntoIterator<Item = Element<'e>>,
    ) {
        let mut elements = elements.into_iter().peekable();
        while elements.peek().is_some() {
            self.message(kind, flags, |w, table| {
                w.str(1, table);
                w.str(2, set);
                let limit = w.bytes().len() + ELEMENTS_BYTES_MAX;
                w.nest(3, |w| {
                    while w.bytes().len() < limit {
                        let Some(element) = elements.next() else { break };
                        w.nest(1, |w| write_element(w, &element));
                    }
                });
            });
        }
    }
}

fn type_number(types: &[Type]) -> u32 {
    types.iter().fold(0, |number, part| number << 6 | *part as u32)
}

fn type_bytes(types: &[Type]) -> u32 {
    match types {
        [alone] => alone.bytes_alone(),
        parts => parts.iter().map(|part| part.bytes()).sum(),
    }
}

fn write_element(w: &mut Writer, element: &Element<'_>) {
    w.nest(1, |w| w.bytes_attr(1, element.key));
    match element.data {
        Data::None => (),
        Data::Value(value) => w.nest(2, |w| w.bytes_attr(1, value)),
        Data::Verdict(verdict) => w.nest(2, |w| write_verdict(w, verdict)),
    }
}

impl Socket {
    /// Applies a transaction: all of it or nothing.
    ///
    /// # Errors
    /// The first change that the kernel refused.
    pub fn commit(&mut self, mut batch: Batch) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        batch.writer.flag_last(ACK);
        batch.writer.message(BATCH_END, 0, &header(0, SUBSYSTEM >> 8), |_| ());
        self.transact(batch.writer)
    }

    /// Names of the tables of a family.
    ///
    /// # Errors
    /// The kernel refused, or has no nf_tables.
    pub fn tables(&mut self, family: Family) -> Result<Vec<String>> {
        let mut request = Writer::new();
        request.message(GETTABLE, DUMP, &header(family as u8, 0), |_| ());
        self.collect(&request, |message| message.attributes(HEADER_BYTES).get(1).map(|name| name.text()))
    }

    /// A number that every transaction of this network namespace changes, whoever commits it.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn generation(&mut self) -> Result<u32> {
        let mut request = Writer::new();
        request.message(GETGEN, ACK, &header(0, 0), |_| ());
        let mut generation = 0;
        self.list(&request, |message| generation = message.attributes(HEADER_BYTES).get(1).map_or(0, |id| id.be32()))?;
        Ok(generation)
    }

    /// Names of the chains of a table; none if it does not exist.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn chains(&mut self, family: Family, table: &str) -> Result<Vec<String>> {
        self.objects(GETCHAIN, family, table, |attributes| Some(attributes.get(CHAIN_NAME)?.text()))
    }

    /// How often a chain is used: by rules in it, and by rules that jump to it. `None`: there is no such chain.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn chain_uses(&mut self, family: Family, table: &str, chain: &str) -> Result<Option<u32>> {
        let mut request = Writer::new();
        request.message(GETCHAIN, ACK, &header(family as u8, 0), |w| {
            w.str(1, table);
            w.str(CHAIN_NAME, chain);
        });
        let mut uses = None;
        let read = |message: &Message<'_>| message.attributes(HEADER_BYTES).get(CHAIN_USE).map(|uses| uses.be32());
        match self.list(&request, |message| uses = read(message)) {
            Err(Error { errno: Errno::NOENT, .. }) => Ok(None),
            other => other.map(|()| uses),
        }
    }

    /// How often each chain of a table is used ([`Socket::chain_uses`]).
    ///
    /// # Errors
    /// The kernel refused.
    pub fn uses(&mut self, family: Family, table: &str) -> Result<BTreeMap<String, u32>> {
        let uses = |attributes: &Attributes<'_>| {
            let uses = attributes.get(CHAIN_USE).map_or(0, |uses| uses.be32());
            Some((attributes.get(CHAIN_NAME)?.text(), uses))
        };
        Ok(self.objects(GETCHAIN, family, table, uses)?.into_iter().collect())
    }

    /// Names of the sets and maps of a table; none if it does not exist.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn sets(&mut self, family: Family, table: &str) -> Result<Vec<String>> {
        self.objects(GETSET, family, table, |attributes| Some(attributes.get(SET_NAME)?.text()))
    }

    /// The sets and maps of a table with the number of their elements, where the kernel tells it without being asked for
    /// them (`NFTA_SET_COUNT`).
    ///
    /// # Errors
    /// The kernel refused.
    pub fn set_counts(&mut self, family: Family, table: &str) -> Result<BTreeMap<String, Option<u32>>> {
        const SET_COUNT: u16 = 20;
        let count = |attributes: &Attributes<'_>| {
            Some((attributes.get(SET_NAME)?.text(), attributes.get(SET_COUNT).map(|count| count.be32())))
        };
        Ok(self.objects(GETSET, family, table, count)?.into_iter().collect())
    }

    /// What `parse` makes of the objects of a kind that a table has.
    fn objects<T>(
        &mut self,
        kind: u16,
        family: Family,
        table: &str,
        parse: impl Fn(&Attributes<'_>) -> Option<T>,
    ) -> Result<Vec<T>> {
        let mut request = Writer::new();
        request.message(kind, DUMP, &header(family as u8, 0), |w| w.str(1, table));
        let listed = self.collect(&request, |message| {
            let attributes = message.attributes(HEADER_BYTES);
            // Not every kernel filters chains by table.
            let is_of_table = attributes.get(1).is_some_and(|one| one.text() == table);
            is_of_table.then(|| parse(&attributes)).flatten()
        });
        none_without(listed)
    }

    /// Keys and, for maps of values, values of the elements of a set; empty if the set does not exist.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn elements(&mut self, family: Family, table: &str, set: &str) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        none_without(self.collect(&all_elements(family, table, set), parse_elements))
    }

    /// The elements of a set, by reading them all; none if it does not exist.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn element_sum(&mut self, family: Family, table: &str, set: &str) -> Result<ElementSum> {
        let sum = |message: &Message<'_>| {
            let mut sum = ElementSum::default();
            let list = message.attributes(HEADER_BYTES).get(3);
            for element in list.iter().flat_map(Attribute::nested) {
                sum += sum_of(&element);
            }
            Some(sum)
        };
        let mut all = ElementSum::default();
        none_without(self.collect(&all_elements(family, table, set), sum))?.into_iter().for_each(|sum| all += sum);
        Ok(all)
    }
}

/// Of an element as the kernel tells it.
fn sum_of(element: &Attribute<'_>) -> ElementSum {
    let attributes = element.nested();
    let (key, data) = (attributes.get(1), attributes.get(2));
    let key = key.and_then(|key| key.nested().get(1)).map_or(&[][..], |key| key.value);
    let Some(data) = data.map(|data| data.nested()) else {
        return ElementSum::of(&Element { key, data: Data::None });
    };
    let Some(verdict) = data.get(2).map(|verdict| verdict.nested()) else {
        let value = data.get(1).map_or(&[][..], |value| value.value);
        return ElementSum::of(&Element { key, data: Data::Value(value) });
    };
    let chain = verdict.get(2).map(|chain| chain.text()).unwrap_or_default();
    let code = verdict.get(1).map_or(0, |code| code.be32().cast_signed());
    match Verdict::of(code, &chain) {
        Some(verdict) => ElementSum::of(&Element { key, data: Data::Verdict(verdict) }),
        // None that we write.
        None => ElementSum { count: 1, prints: 0 },
    }
}

fn all_elements(family: Family, table: &str, set: &str) -> Writer {
    let mut request = Writer::new();
    request.message(GETSETELEM, DUMP, &header(family as u8, 0), |w| {
        w.str(1, table);
        w.str(2, set);
    });
    request
}

/// A list in what does not exist is empty.
fn none_without<T>(listed: Result<Vec<T>>) -> Result<Vec<T>> {
    match listed {
        Err(Error { errno: Errno::NOENT, .. }) => Ok(Vec::new()),
        other => other,
    }
}

pub(super) fn parse_elements(message: &Message<'_>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let element = |element: Attribute<'_>| {
        let value = |kind| Some(element.nested().get(kind)?.nested().get(1)?.value.to_vec());
        (value(1).unwrap_or_default(), value(2).unwrap_or_default())
    };
    let list = message.attributes(HEADER_BYTES).get(3);
    list.map(|list| list.nested().map(element).collect()).unwrap_or_default()
}
