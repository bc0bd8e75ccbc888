//! A reader of tar archives as layers use them: ustar, GNU and PAX names, numbers, times, extended attributes and sparse
//! files. It reads forward only and holds one header at a time; every length that the archive states is bounded.

use std::io;

use super::input::{Input, truncated};

/// An archive that is being read.
pub(crate) struct Archive<R> {
    source: R,
    /// Bytes of the current entry's data that nobody has read yet, and the padding after them.
    left: u64,
    padding: u64,
    defaults: Pax,
}

/// One entry, all header forms merged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: sys::tree::Time,
    /// Length of the file as it will be on disk.
    pub(crate) size: u64,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the stored bytes belong, if the file has holes: offset and length.
    pub(crate) sparse: Option<Vec<(u64, u64)>>,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Kind {
    #[default]
    File,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
}

/// Why the archive cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("{0}")]
    Malformed(String),
    #[error(transparent)]
    Source(#[from] io::Error),
}

const BLOCK: usize = 512;
const BLOCK_BYTES: u64 = 512;
/// As Go's archive/tar: names, links and PAX records of one entry.
const SPECIAL_BYTES_MAX: u64 = 1 << 20;
/// A file of this many fragments is no file of a layer.
const FRAGMENTS_MAX: usize = 1 << 20;

const XATTRS_MAX: usize = 256;

type Block = [u8; BLOCK];

impl<R: Input> Archive<R> {
    pub(crate) fn new(source: R) -> Self {
        Self { source, left: 0, padding: 0, defaults: Pax::default() }
    }

    /// Gives the source back, to read what follows the archive.
    pub(crate) fn into_source(self) -> R {
        self.source
    }

    /// The source, which stands where the current entry's unread data begin.
    pub(crate) fn source(&self) -> &R {
        &self.source
    }

    /// The next entry, or none at the end of the archive. What is left of the last one is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut special = Special { pax: self.defaults.clone(), ..Special::default() };
        loop {
            self.skip_data()?;
            let Some(block) = self.header()? else { return Ok(None) };
            let header = Header(&block);
            match header.kind_byte() {
                b'x' => special.pax.merge(&self.special_data(&header)?)?,
                b'g' => {
                    let records = self.special_data(&header)?;
                    self.defaults.merge(&records)?;
                    special.pax = self.defaults.clone();
                }
                b'L' => special.name = Some(until_nul(&self.special_data(&header)?).to_vec()),
                b'K' => special.link = Some(until_nul(&self.special_data(&header)?).to_vec()),
                _ => return self.entry(&header, special).map(Some),
            }
        }
    }

    /// The next piece of the current entry's stored bytes; empty at its end. Tell [`Archive::consume`] what was used.
    pub(crate) fn data(&mut self) -> io::Result<&[u8]> {
        if self.left == 0 {
            return Ok(&[]);
        }
        let piece = self.source.fill_buf()?;
        if piece.is_empty() {
            return Err(truncated());
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        Ok(&piece[..piece.len().min(most)])
    }

    pub(crate) fn consume(&mut self, bytes: usize) {
        self.source.consume(bytes);
        self.left -= bytes as u64;
    }

    fn entry(&mut self, header: &Header<'_>, special: Special) -> Result<Entry, TarError> {
        let kind = header.kind(special.name().unwrap_or(&header.name()))?;
        let stored = special.pax.size.map_or_else(|| header.size(), Ok)?;
        // As Go's archive/tar, which made most layers: only files have data, whatever size others state.
        let stored = if kind == Kind::File { stored } else { 0 };
        self.start_data(stored)?;
        let mut entry = header.entry(kind, stored)?;
        if header.kind_byte() == b'S' {
            let (real_size, map) = self.old_sparse_map(header)?;
            (entry.size, entry.sparse) = (real_size, Some(map));
        }
        special.apply(&mut entry);
        if kind == Kind::File && special.pax.sparse.is_sparse() {
            self.pax_sparse(&special.pax.sparse, &mut entry)?;
        }
        check_sparse(&entry)?;
        Ok(entry)
    }

    fn start_data(&mut self, stored: u64) -> Result<(), TarError> {
        if stored > u64::MAX / 4 {
            return Err(malformed("an entry states an impossible size"));
        }
        self.left = stored;
        self.padding = (BLOCK_BYTES - stored % BLOCK_BYTES) % BLOCK_BYTES;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let left = self.left + self.padding;
        if left > 0 {
            self.source.skip(left)?;
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// The next header block; none at the end marker, or where the archive just ends (some writers leave the marker out).
    fn header(&mut self) -> Result<Option<Block>, TarError> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        Header(&block).check()?;
        Ok(Some(block))
    }

    fn block(&mut self) -> Result<Option<Block>, TarError> {
        let mut block = [0; BLOCK];
        let mut have = 0;
        while have < BLOCK {
            match self.source.read(&mut block[have..])? {
                0 if have == 0 => return Ok(None),
                0 => return Err(truncated().into()),
                read => have += read,
            }
        }
        Ok(Some(block))
    }

    fn special_data(&mut self, header: &Header<'_>) -> Result<Vec<u8>, TarError> {
        let size = header.size()?;
        if size > SPECIAL_BYTES_MAX {
            return Err(malformed("an extended header is longer than 1 MiB"));
        }
        self.start_data(size)?;
        let mut data = Vec::new();
        loop {
            let piece = self.data()?;
            if piece.is_empty() {
                return Ok(data);
            }
            data.extend_from_slice(piece);
            let used = piece.len();
            self.consume(used);
        }
    }

    /// GNU's first form: four fragments in the header, 21 in each block that follows it.
    fn old_sparse_map(&mut self, header: &Header<'_>) -> Result<(u64, Vec<(u64, u64)>), TarError> {
        let mut map = Vec::new();
        let mut more = fragments(&header.0[386..482], &mut map)? && header.0[482] != 0;
        while more {
            let block = self.block()?.ok_or_else(truncated)?;
            more = fragments(&block[..504], &mut map)? && block[504] != 0;
        }
        Ok((number(&header.0[483..495])?, map))
    }

    /// The PAX forms: 0.0 and 0.1 hold the map in the records, 1.0 in front of the data.
    fn pax_sparse(&mut self, sparse: &PaxSparse, entry: &mut Entry) -> Result<(), TarError> {
        if let Some(name) = &sparse.name {
            entry.name.clone_from(name);
        }
        let map = if sparse.major == Some(1) { self.leading_sparse_map()? } else { sparse.map.clone() };
        entry.size = sparse.real_size.ok_or_else(|| malformed("a sparse file states no size"))?;
        entry.sparse = Some(map);
        Ok(())
    }

    /// Decimal lines, first their number; padded to a whole block.
    fn leading_sparse_map(&mut self) -> Result<Vec<(u64, u64)>, TarError> {
        let mut read = 0;
        let count = usize::try_from(self.decimal_line(&mut read)?).unwrap_or(usize::MAX);
        if count > FRAGMENTS_MAX {
            return Err(malformed("a sparse file has too many fragments"));
        }
        let mut map = Vec::new();
        for _ in 0..count {
            map.push((self.decimal_line(&mut read)?, self.decimal_line(&mut read)?));
        }
        let padding = (BLOCK - read % BLOCK) % BLOCK;
        for _ in 0..padding {
            self.data_byte()?;
        }
        Ok(map)
    }

    fn decimal_line(&mut self, read: &mut usize) -> Result<u64, TarError> {
        let mut value: u64 = 0;
        loop {
            let byte = self.data_byte()?;
            *read += 1;
            match byte {
                b'\n' => return Ok(value),
                b'0'..=b'9' => {
                    value =
                        value.checked_mul(10).and_then(|v| v.checked_add(u64::from(byte - b'0'))).ok_or_else(bad_map)?
                }
                _ => return Err(bad_map()),
            }
        }
    }

    fn data_byte(&mut self) -> Result<u8, TarError> {
        let byte = *self.data()?.first().ok_or_else(bad_map)?;
        self.consume(1);
        Ok(byte)
    }
}

fn malformed(what: &str) -> TarError {
    TarError::Malformed(what.to_owned())
}

fn bad_map() -> TarError {
    malformed("the map of a sparse file is malformed")
}

/// Fragments must rise, not overlap, and end within the file.
fn check_sparse(entry: &Entry) -> Result<(), TarError> {
    let mut end = 0;
    for (offset, length) in entry.sparse.iter().flatten() {
        let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= entry.size);
        end = next.ok_or_else(bad_map)?;
    }
    Ok(())
}

/// Pairs of 12-byte numbers; false when an empty one ends the list.
fn fragments(fields: &[u8], map: &mut Vec<(u64, u64)>) -> Result<bool, TarError> {
    for pair in fields.chunks_exact(24) {
        if pair[0] == 0 || pair[12] == 0 {
            return Ok(false);
        }
        if map.len() == FRAGMENTS_MAX {
            return Err(malformed("a sparse file has too many fragments"));
        }
        map.push((number(&pair[..12])?, number(&pair[12..])?));
    }
    Ok(true)
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

/// A number field: octal digits among blanks, or base 256 when the first bit is set.
fn number(field: &[u8]) -> Result<u64, TarError> {
    if field[0] & 0x80 != 0 {
        return base_256(field);
    }
    let digits = until_nul(field).trim_ascii();
    digits.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'7' => {
            value.checked_mul(8).map(|v| v + u64::from(digit - b'0')).ok_or_else(|| malformed("a number is too large"))
        }
        _ => Err(malformed("a number has characters that are not octal digits")),
    })
}

fn base_256(field: &[u8]) -> Result<u64, TarError> {
    if field[0] & 0x40 != 0 {
        return Err(malformed("a number is negative"));
    }
    let (first, rest) = (u64::from(field[0] & 0x3f), &field[1..]);
    rest.iter().try_fold(first, |value, byte| {
        value.checked_mul(256).map(|v| v + u64::from(*byte)).ok_or_else(|| malformed("a number is too large"))
    })
}

/// Times before 1970 are written in base 256 by GNU tar; they are clamped to 1970 here, as nothing in a node needs them.
fn time_field(field: &[u8]) -> Result<i64, TarError> {
    if field[0] & 0xc0 == 0xc0 {
        return Ok(0);
    }
    Ok(i64::try_from(number(field)?).unwrap_or(0))
}

struct Header<'a>(&'a Block);

impl Header<'_> {
    fn check(&self) -> Result<(), TarError> {
        let stated = number(&self.0[148..156])?;
        let (mut unsigned, mut signed) = (0u64, 0i64);
        for (at, byte) in self.0.iter().enumerate() {
            let byte = if (148..156).contains(&at) { b' ' } else { *byte };
            unsigned += u64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if stated == unsigned || i64::try_from(stated) == Ok(signed) {
            return Ok(());
        }
        Err(malformed("a header's checksum is wrong: this is not a tar archive, or it is damaged"))
    }

    fn kind_byte(&self) -> u8 {
        self.0[156]
    }

    /// `name` is the whole one: what stands here may be its beginning, cut after a slash.
    fn kind(&self, name: &[u8]) -> Result<Kind, TarError> {
        Ok(match self.kind_byte() {
            0 if name.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Character,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(TarError::Malformed(format!(
                    "an entry has type {:?}, which layers do not have",
                    char::from(other)
                )));
            }
        })
    }

    fn size(&self) -> Result<u64, TarError> {
        number(&self.0[124..136])
    }

    fn name(&self) -> Vec<u8> {
        let name = until_nul(&self.0[..100]);
        let prefix = until_nul(&self.0[345..500]);
        // GNU headers ("ustar  ") keep other things where POSIX ("ustar\0") has the prefix.
        if &self.0[257..263] == b"ustar\0" && !prefix.is_empty() {
            [prefix, b"/", name].concat()
        } else {
            name.to_vec()
        }
    }

    fn entry(&self, kind: Kind, size: u64) -> Result<Entry, TarError> {
        let is_device = matches!(kind, Kind::Character | Kind::Block);
        let device = if is_device { (small(&self.0[329..337])?, small(&self.0[337..345])?) } else { (0, 0) };
        Ok(Entry {
            name: self.name(),
            link: until_nul(&self.0[157..257]).to_vec(),
            kind,
            mode: u32::try_from(number(&self.0[100..108])? & 0o7777).expect("twelve bits"),
            uid: small(&self.0[108..116])?,
            gid: small(&self.0[116..124])?,
            mtime: sys::tree::Time { seconds: time_field(&self.0[136..148])?, nanoseconds: 0 },
            size,
            device,
            xattrs: Vec::new(),
            sparse: None,
        })
    }
}

fn small(field: &[u8]) -> Result<u32, TarError> {
    u32::try_from(number(field)?).map_err(|_| malformed("an owner or device number is too large"))
}

/// Headers that came before the one with the data.
#[derive(Default)]
struct Special {
    pax: Pax,
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

impl Special {
    fn name(&self) -> Option<&Vec<u8>> {
        self.name.as_ref().or(self.pax.path.as_ref())
    }

    fn apply(&self, entry: &mut Entry) {
        let pax = &self.pax;
        replace(&mut entry.name, self.name());
        replace(&mut entry.link, self.link.as_ref().or(pax.link_path.as_ref()));
        entry.uid = pax.uid.unwrap_or(entry.uid);
        entry.gid = pax.gid.unwrap_or(entry.gid);
        entry.mtime = pax.mtime.unwrap_or(entry.mtime);
        entry.xattrs.clone_from(&pax.xattrs);
    }
}

fn replace(field: &mut Vec<u8>, with: Option<&Vec<u8>>) {
    if let Some(value) = with {
        field.clone_from(value);
    }
}

/// The PAX records that matter here.
#[derive(Debug, Clone, Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link_path: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<sys::tree::Time>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: PaxSparse,
}

#[derive(Debug, Clone, Default)]
struct PaxSparse {
    major: Option<u64>,
    name: Option<Vec<u8>>,
    real_size: Option<u64>,
    map: Vec<(u64, u64)>,
    pending_offset: Option<u64>,
}

impl PaxSparse {
    fn is_sparse(&self) -> bool {
        self.major == Some(1) || !self.map.is_empty()
    }
}

impl Pax {
    /// Takes in records of the form `length SP key=value NL`.
    fn merge(&mut self, mut data: &[u8]) -> Result<(), TarError> {
        let bad = || malformed("a PAX record is malformed");
        while !data.is_empty() {
            let space = data.iter().position(|byte| *byte == b' ').ok_or_else(bad)?;
            let length: usize =
                std::str::from_utf8(&data[..space]).ok().and_then(|text| text.parse().ok()).ok_or_else(bad)?;
            let record = data.get(space + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(bad)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
            self.set(&record[..equals], &record[equals + 1..])?;
            data = &data[length..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        match key {
            b"path" => self.path = Some(text(value)?),
            b"linkpath" => self.link_path = Some(text(value)?),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal_id(value)?),
            b"gid" => self.gid = Some(decimal_id(value)?),
            b"mtime" => self.mtime = Some(pax_time(value)?),
            b"GNU.sparse.major" => self.sparse.major = Some(decimal(value)?),
            b"GNU.sparse.name" => self.sparse.name = Some(text(value)?),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.real_size = Some(decimal(value)?),
            b"GNU.sparse.offset" => self.sparse.pending_offset = Some(decimal(value)?),
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.pending_offset.take().ok_or_else(bad_map)?;
                self.sparse.map.push((offset, decimal(value)?));
            }
            b"GNU.sparse.map" => self.sparse.map = comma_map(value)?,
            _ => self.set_xattr(key, value)?,
        }
        Ok(())
    }

    fn set_xattr(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let Some(name) = key.strip_prefix(b"SCHILY.xattr.") else { return Ok(()) };
        let name = text(name)?;
        self.xattrs.retain(|(known, _)| *known != name);
        if self.xattrs.len() == XATTRS_MAX {
            return Err(malformed("an entry has too many extended attributes"));
        }
        self.xattrs.push((name, value.to_vec()));
        Ok(())
    }
}

fn text(value: &[u8]) -> Result<Vec<u8>, TarError> {
    if value.is_empty() || value.contains(&0) {
        return Err(malformed("a name in a PAX record is empty or has a NUL byte"));
    }
    Ok(value.to_vec())
}

fn decimal(value: &[u8]) -> Result<u64, TarError> {
    std::str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| malformed("a PAX record has a bad number"))
}

fn decimal_id(value: &[u8]) -> Result<u32, TarError> {
    u32::try_from(decimal(value)?).map_err(|_| malformed("an owner number is too large"))
}

fn comma_map(value: &[u8]) -> Result<Vec<(u64, u64)>, TarError> {
    let numbers = value.split(|byte| *byte == b',').map(decimal).collect::<Result<Vec<_>, _>>()?;
    if numbers.len() % 2 != 0 || numbers.len() / 2 > FRAGMENTS_MAX {
        return Err(bad_map());
    }
    Ok(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

/// `seconds[.fraction]`; times before 1970 become 1970.
fn pax_time(value: &[u8]) -> Result<sys::tree::Time, TarError> {
    if value.starts_with(b"-") {
        return Ok(sys::tree::Time::default());
    }
    let (whole, fraction) = match value.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&value[..dot], &value[dot + 1..]),
        None => (value, &b""[..]),
    };
    let mut digits = fraction.iter().copied().chain(std::iter::repeat(b'0'));
    let mut nanoseconds = 0;
    for _ in 0..9 {
        let digit = digits.next().filter(u8::is_ascii_digit).ok_or_else(|| malformed("a PAX record has a bad time"))?;
        nanoseconds = nanoseconds * 10 + u32::from(digit - b'0');
    }
    Ok(sys::tree::Time { seconds: i64::try_from(decimal(whole)?).unwrap_or(0), nanoseconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Input for io::BufReader<&[u8]> {}

    fn read_all(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
        // A tiny buffer, so that every boundary falls inside something.
        let mut archive = Archive::new(io::BufReader::with_capacity(37, bytes));
        let mut entries = Vec::new();
        while let Some(entry) = archive.next()? {
            let mut data = Vec::new();
            loop {
                let piece = archive.data()?;
                if piece.is_empty() {
                    break;
                }
                data.extend_from_slice(piece);
                let used = piece.len();
                archive.consume(used);
            }
            entries.push((entry, data));
        }
        Ok(entries)
    }

    fn header(kind: u8, name: &str, size: u64) -> Block {
        let mut block = [0; BLOCK];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..108].copy_from_slice(b"0000644\0");
        block[108..116].copy_from_slice(b"0001750\0");
        block[116..124].copy_from_slice(b"0001751\0");
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        block[136..148].copy_from_slice(b"00000000017\0");
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        seal(&mut block);
        block
    }

    fn seal(block: &mut Block) {
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }

    fn member(kind: u8, name: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = header(kind, name, data.len() as u64).to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    fn pax(records: &[(&str, &str)]) -> Vec<u8> {
        let mut data = String::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut length = body + 1;
            while length != body + length.to_string().len() {
                length = body + length.to_string().len();
            }
            data += &format!("{length} {key}={value}\n");
        }
        member(b'x', "pax", data.as_bytes())
    }

    #[test]
    fn reads_plain_members() {
        let bytes = [member(b'0', "a", b"hello"), member(b'5', "d/", b""), vec![0; 1024]].concat();
        let entries = read_all(&bytes).unwrap();
        assert_eq!(entries[0].1, b"hello");
        assert_eq!(
            (entries[0].0.uid, entries[0].0.gid, entries[0].0.mode, entries[0].0.mtime.seconds),
            (0o1750, 0o1751, 0o644, 15)
        );
        assert_eq!(entries[1].0.kind, Kind::Directory);
    }

    #[test]
    fn pax_and_gnu_names_win() {
        let long = "x/".repeat(150) + "y";
        let bytes = [
            pax(&[("path", &long), ("uid", "4000000000"), ("mtime", "12.5"), ("SCHILY.xattr.user.a", "b")]),
            member(b'0', "short", b"1"),
            member(b'L', "././@LongLink", format!("{long}\0").as_bytes()),
            member(b'0', "short", b"2"),
        ]
        .concat();
        let entries = read_all(&bytes).unwrap();
        assert_eq!(entries[0].0.name, long.as_bytes());
        assert_eq!(entries[0].0.uid, 4_000_000_000);
        assert_eq!(entries[0].0.mtime, sys::tree::Time { seconds: 12, nanoseconds: 500_000_000 });
        assert_eq!(entries[0].0.xattrs, [(b"user.a".to_vec(), b"b".to_vec())]);
        assert_eq!(
            (entries[1].0.name.as_slice(), entries[1].0.uid),
            (long.as_bytes(), 0o1750),
            "records hold for one entry only"
        );
    }

    #[test]
    fn a_long_name_that_is_cut_after_a_slash_is_no_directory() {
        let long = "x/".repeat(50) + "y";
        let cut = &long[..100];
        let name = format!("{long}\0");
        let bytes =
            [member(b'L', "././@LongLink", name.as_bytes()), member(0, cut, b"data"), member(0, "d/", b"")].concat();
        let entries = read_all(&bytes).unwrap();
        assert_eq!((entries[0].0.kind, entries[0].1.as_slice()), (Kind::File, &b"data"[..]));
        assert_eq!(entries[1].0.kind, Kind::Directory);
        let bytes = [pax(&[("path", &long)]), member(0, cut, b"data")].concat();
        assert_eq!(read_all(&bytes).unwrap()[0].1, b"data");
    }

    #[test]
    fn every_sparse_form_gives_the_same_map() {
        let expected = Some(vec![(0, 2), (8192, 3)]);
        let mut old = header(b'S', "f", 5);
        old[386..398].copy_from_slice(b"00000000000\0");
        old[398..410].copy_from_slice(b"00000000002\0");
        old[410..422].copy_from_slice(b"00000020000\0");
        old[422..434].copy_from_slice(b"00000000003\0");
        old[483..495].copy_from_slice(b"00000030000\0");
        seal(&mut old);
        let mut old = old.to_vec();
        old.extend_from_slice(b"abcde");
        old.resize(1024, 0);
        let v00 = [
            pax(&[
                ("GNU.sparse.size", "12288"),
                ("GNU.sparse.offset", "0"),
                ("GNU.sparse.numbytes", "2"),
                ("GNU.sparse.offset", "8192"),
                ("GNU.sparse.numbytes", "3"),
            ]),
            member(b'0', "f", b"abcde"),
        ]
        .concat();
        let v01 = [
            pax(&[("GNU.sparse.size", "12288"), ("GNU.sparse.map", "0,2,8192,3"), ("GNU.sparse.name", "f")]),
            member(b'0', "odd", b"abcde"),
        ]
        .concat();
        let mut data = b"2\n0\n2\n8192\n3\n".to_vec();
        data.resize(512, 0);
        data.extend_from_slice(b"abcde");
        let v10 = [
            pax(&[
                ("GNU.sparse.major", "1"),
                ("GNU.sparse.minor", "0"),
                ("GNU.sparse.realsize", "12288"),
                ("GNU.sparse.name", "f"),
            ]),
            member(b'0', "odd", &data),
        ]
        .concat();
        for (form, bytes) in [("old", old), ("0.0", v00), ("0.1", v01), ("1.0", v10)] {
            let (entry, data) = read_all(&bytes).unwrap_or_else(|e| panic!("{form}: {e}")).remove(0);
            assert_eq!((entry.sparse, entry.size, data.as_slice()), (expected.clone(), 12288, &b"abcde"[..]), "{form}");
            assert_eq!(entry.name, b"f", "{form}");
        }
    }

    #[test]
    fn refuses_broken_archives() {
        let whole = member(b'0', "a", b"hello");
        let mut flipped = whole.clone();
        flipped[3] ^= 1;
        let negative = [pax(&[("size", "-1")]), member(b'0', "a", b"")].concat();
        let overlap =
            [pax(&[("GNU.sparse.size", "10"), ("GNU.sparse.map", "0,5,4,2")]), member(b'0', "f", b"1234567")].concat();
        let cases: [(&str, Vec<u8>); 6] = [
            ("cut in the data", whole[..514].to_vec()),
            ("cut in the header", whole[..100].to_vec()),
            ("bad checksum", flipped),
            ("unknown type", member(b'M', "a", b"")),
            ("negative size", negative),
            ("overlapping fragments", overlap),
        ];
        for (name, bytes) in cases {
            assert!(read_all(&bytes).is_err(), "{name}");
        }
    }
}
