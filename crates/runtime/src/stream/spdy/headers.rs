//! Header blocks of SPDY: name-value lists (SPDY/3 §2.6.10), compressed by zlib with a dictionary, one stream of zlib
//! for each direction of a connection.

use flate2::{Decompress, FlushDecompress, Status};

use super::frame::Malformed;

/// The longest header block after decompression. Clients send a few hundred bytes.
pub(super) const BLOCK_MAX: usize = 64 * 1024;

/// The words of the dictionary, each of which has its length before it.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
    content-length content-location content-md5 content-range content-type date etag expect expires from host if-match \
    if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma \
    proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade \
    user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie \
    keep-alive origin";

/// The rest of the dictionary.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 \
    Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 \
    Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept \
    Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,\
    application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdch\
    charset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// The dictionary of SPDY/3 §2.6.10.1.
pub(in crate::stream) fn dictionary() -> Vec<u8> {
    let mut dictionary = Vec::with_capacity(1423);
    for word in WORDS.split(' ') {
        let word = word.replace('_', " ");
        dictionary.extend_from_slice(&[0, 0, 0, u8::try_from(word.len()).unwrap_or_default()]);
        dictionary.extend_from_slice(word.as_bytes());
    }
    dictionary.extend_from_slice(TAIL.as_bytes());
    dictionary
}

/// The headers of a stream; names are in lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::stream) struct Headers(Vec<(String, String)>);

impl Headers {
    /// The value of a header, whose name is given in lower case.
    pub(in crate::stream) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(held, _)| held == name).map(|(_, value)| value.as_str())
    }

    fn parse(mut block: &[u8]) -> Result<Self, Malformed> {
        let count = take_number(&mut block)?;
        // Each header has at least its two lengths.
        if count > block.len() / 8 {
            return Err(Malformed("a header block is shorter than its number of headers"));
        }
        let mut headers = Vec::with_capacity(count);
        for _ in 0..count {
            let (name, value) = (take_text(&mut block)?, take_text(&mut block)?);
            // The standard wants lower case. Clients written in Go are forgiven, as they forgive each other.
            headers.push((name.to_ascii_lowercase(), value));
        }
        Ok(Self(headers))
    }
}

fn take_number(block: &mut &[u8]) -> Result<usize, Malformed> {
    let (number, rest) = block.split_first_chunk().ok_or(Malformed("a header block is cut off"))?;
    *block = rest;
    usize::try_from(u32::from_be_bytes(*number)).map_err(|_| Malformed("a header is too long"))
}

fn take_text(block: &mut &[u8]) -> Result<String, Malformed> {
    let length = take_number(block)?;
    let (text, rest) = block.split_at_checked(length).ok_or(Malformed("a header is cut off"))?;
    *block = rest;
    String::from_utf8(text.to_vec()).map_err(|_| Malformed("a header is not UTF-8"))
}

/// Decompresses the header blocks of one direction, in their order.
pub(super) struct Inflater {
    zlib: Decompress,
}

impl Inflater {
    pub(super) fn new() -> Self {
        Self { zlib: Decompress::new(true) }
    }

    /// The headers in the next block.
    pub(super) fn headers(&mut self, compressed: &[u8]) -> Result<Headers, Malformed> {
        Headers::parse(&self.inflate(compressed)?)
    }

    fn inflate(&mut self, mut compressed: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut block = Vec::with_capacity(1024);
        loop {
            let before = (self.zlib.total_in(), block.len());
            match self.zlib.decompress_vec(compressed, &mut block, FlushDecompress::Sync) {
                Ok(Status::StreamEnd) => return Err(Malformed("the compressed headers end")),
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    let set = self.zlib.set_dictionary(&dictionary());
                    set.map_err(|_| Malformed("the compressed headers name another dictionary"))?;
                }
                Err(_) => return Err(Malformed("a header block is not compressed as it should be")),
            }
            let consumed = usize::try_from(self.zlib.total_in() - before.0).unwrap_or(compressed.len());
            compressed = compressed.get(consumed..).unwrap_or_default();
            if block.len() > BLOCK_MAX {
                return Err(Malformed("a header block is too long"));
            }
            if block.len() == block.capacity() {
                block.reserve(block.len());
            } else if compressed.is_empty() {
                return Ok(block);
            } else if consumed == 0 && block.len() == before.1 {
                return Err(Malformed("a header block cannot be decompressed"));
            }
        }
    }
}

/// A stream of zlib that begins here, and the header block without headers in it: all that a server has to say. Blocks
/// are stored (RFC 1951 §3.2.4), which needs no state. The empty one at the end is a sync flush (SPDY/3 §2.6.10.1): Go's
/// decompressor hands out nothing before it.
const ZLIB_HEADER: [u8; 2] = [0x78, 0x01];
const NO_HEADERS: [u8; 14] = [0, 4, 0, !4, !0, 0, 0, 0, 0, 0, 0, 0, !0, !0];

/// Writes the header blocks of our direction.
#[derive(Default)]
pub(super) struct Deflater {
    begun: bool,
}

impl Deflater {
    /// Appends a header block without headers.
    pub(super) fn no_headers(&mut self, out: &mut Vec<u8>) {
        if !self.begun {
            out.extend_from_slice(&ZLIB_HEADER);
            self.begun = true;
        }
        out.extend_from_slice(&NO_HEADERS);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    /// A header block as a client writes it.
    pub(in crate::stream) fn block(headers: &[(&str, &str)]) -> Vec<u8> {
        let text = |text: &str| [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat();
        let mut block = u32::try_from(headers.len()).unwrap().to_be_bytes().to_vec();
        for (name, value) in headers {
            block.extend(text(name));
            block.extend(text(value));
        }
        block
    }

    fn compress(zlib: &mut Compress, block: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(block.len() + 4096);
        zlib.compress_vec(block, &mut out, FlushCompress::Sync).unwrap();
        out
    }

    fn client() -> Compress {
        let mut zlib = Compress::new(Compression::best(), true);
        zlib.set_dictionary(&dictionary()).unwrap();
        zlib
    }

    /// The identity of the dictionary in the first bytes of every SPDY/3 connection.
    #[test]
    fn the_dictionary_is_the_standard_s() {
        let dictionary = dictionary();
        let (mut low, mut high) = (1_u32, 0_u32);
        for byte in &dictionary {
            low = (low + u32::from(*byte)) % 65521;
            high = (high + low) % 65521;
        }
        assert_eq!((dictionary.len(), high << 16 | low), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn blocks_of_one_stream() {
        let (mut zlib, mut inflater) = (client(), Inflater::new());
        let first = compress(&mut zlib, &block(&[("streamtype", "error"), ("Port", "80")]));
        let headers = inflater.headers(&first).unwrap();
        assert_eq!((headers.get("streamtype"), headers.get("port")), (Some("error"), Some("80")));
        let second = compress(&mut zlib, &block(&[("streamtype", "stdin")]));
        assert!(second.len() < first.len());
        assert_eq!(inflater.headers(&second).unwrap().get("streamtype"), Some("stdin"));
        assert_eq!(inflater.headers(&compress(&mut zlib, &block(&[]))).unwrap(), Headers::default());
    }

    #[test]
    fn a_bomb_is_refused() {
        let bomb = block(&[("name", &"x".repeat(100 * BLOCK_MAX))]);
        let compressed = compress(&mut client(), &bomb);
        assert!(compressed.len() < BLOCK_MAX);
        assert!(Inflater::new().headers(&compressed).is_err());
    }

    #[test]
    fn malformed_blocks() {
        let check = |block: &[u8]| assert!(Headers::parse(block).is_err(), "{block:?}");
        check(b"");
        check(b"\0\0\0\x01");
        check(b"\xff\xff\xff\xff\0\0\0\0\0\0\0\0");
        check(b"\0\0\0\x01\0\0\0\x09name\0\0\0\0");
        check(b"\0\0\0\x01\0\0\0\x01\xff\0\0\0\0");
        assert!(Inflater::new().headers(b"no zlib").is_err());
        assert!(Inflater::new().headers(b"").is_err());
    }

    #[test]
    fn our_blocks_can_be_read() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::new());
        for _ in 0..3 {
            let mut out = Vec::new();
            deflater.no_headers(&mut out);
            assert_eq!(inflater.headers(&out).unwrap(), Headers::default());
        }
    }
}
