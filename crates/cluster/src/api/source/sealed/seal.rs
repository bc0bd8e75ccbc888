//! Bytes that only this node can read, and nobody can change unnoticed.

use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

/// The format; another one is another word.
const MAGIC: &[u8; 8] = b"orlop-1\n";
const KEY_BYTES: usize = 32;

/// A key. Nonces are random: good for 2³² writes, which a node does not reach.
pub(super) struct Seal {
    key: LessSafeKey,
}

impl Seal {
    /// The key in this file; a new one if there is none. Whoever wants more than a file's protection puts the file where a
    /// TPM or the boot process provides it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let bytes = match std::fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(path)?,
            read => read?,
        };
        let key: [u8; KEY_BYTES] = bytes.try_into().map_err(|bytes: Vec<u8>| {
            let fault =
                format!("a key of {} bytes instead of {KEY_BYTES}; remove the file to get a new key", bytes.len());
            io::Error::new(io::ErrorKind::InvalidData, fault)
        })?;
        let key = UnboundKey::new(&AES_256_GCM, &key).map_err(|_| io::Error::other("the key is refused"))?;
        Ok(Self { key: LessSafeKey::new(key) })
    }

    /// Seals `content` as what `name` stands for: it cannot be taken for something else.
    pub(super) fn seal(&self, name: &str, mut content: Vec<u8>) -> io::Result<Vec<u8>> {
        let nonce = sys::random::bytes::<NONCE_LEN>();
        let sealed = self.key.seal_in_place_append_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(name.as_bytes()),
            &mut content,
        );
        sealed.map_err(|_| io::Error::other("too long to be sealed"))?;
        Ok([MAGIC.as_slice(), &nonce, &content].concat())
    }

    /// What was sealed under this name.
    pub(super) fn unseal(&self, name: &str, sealed: &[u8]) -> io::Result<Vec<u8>> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it was not sealed with this key, or is damaged");
        let rest = sealed.strip_prefix(MAGIC.as_slice()).ok_or_else(damaged)?;
        let (nonce, rest) = rest.split_first_chunk::<NONCE_LEN>().ok_or_else(damaged)?;
        let mut content = rest.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = self.key.open_in_place(nonce, Aad::from(name.as_bytes()), &mut content);
        let length = opened.map_err(|_| damaged())?.len();
        content.truncate(length);
        Ok(content)
    }
}

fn make(path: &Path) -> io::Result<Vec<u8>> {
    let key = sys::random::bytes::<KEY_BYTES>();
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&key)?;
    file.sync_all()?;
    Ok(key.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_content_is_read_by_its_name_and_key_alone() {
        let dir = tempfile::tempdir().unwrap();
        let seal = Seal::open(&dir.path().join("key")).unwrap();
        let sealed = seal.seal("a", b"content".to_vec()).unwrap();
        assert!(!sealed.windows(7).any(|window| window == b"content"));
        let again = Seal::open(&dir.path().join("key")).unwrap();
        assert_eq!(again.unseal("a", &sealed).unwrap(), b"content");
        assert!(again.unseal("b", &sealed).is_err());
        for at in 0..sealed.len() {
            let mut other = sealed.clone();
            other[at] ^= 1;
            assert!(again.unseal("a", &other).is_err(), "byte {at}");
        }
        assert!(again.unseal("a", &sealed[..20]).is_err());
        let stranger = Seal::open(&dir.path().join("other")).unwrap();
        assert!(stranger.unseal("a", &sealed).is_err());
        std::fs::write(dir.path().join("short"), "x").unwrap();
        assert!(Seal::open(&dir.path().join("short")).err().unwrap().to_string().contains("remove the file"));
    }
}
