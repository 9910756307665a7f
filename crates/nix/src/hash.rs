//! Hashes and their spellings (Nix: hash.cc). SHA-256 has a type of its own because NAR hashes are nothing else.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use md5::Digest as _;

use crate::{Error, base32};

/// A SHA-256 digest. Displays as `sha256:` and nix32, the form that narinfo files and fingerprints use.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Sha256Hasher::new();
        hasher.update(bytes);
        hasher.finish()
    }

    /// 64 lower-case hexadecimal digits, without a prefix: what AddToStoreNar carries.
    pub fn to_hex(self) -> String {
        to_hex(&self.0)
    }

    /// 52 nix32 digits, without a prefix.
    pub fn to_nix32(self) -> String {
        base32::encode(&self.0)
    }

    /// `sha256-` and base 64.
    pub fn to_sri(self) -> String {
        format!("sha256-{}", BASE64.encode(self.0))
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.to_nix32())
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Any spelling: prefixed or SRI, or the bare digits, taken as SHA-256.
impl FromStr for Sha256 {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let hash = Hash::parse(text, Some(HashAlgo::Sha256))?;
        let fail = |why| Error::Hash { text: text.chars().take(160).collect(), why };
        if hash.algo != HashAlgo::Sha256 {
            return Err(fail("it is not SHA-256"));
        }
        hash.bytes.try_into().map(Self).map_err(|_| fail("wrong length"))
    }
}

/// SHA-256 of a stream, as a [`std::io::Write`] too.
#[derive(Clone)]
pub struct Sha256Hasher(ring::digest::Context);

impl Default for Sha256Hasher {
    fn default() -> Self {
        Self::new()
    }
}

impl Sha256Hasher {
    pub fn new() -> Self {
        Self(ring::digest::Context::new(&ring::digest::SHA256))
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Sha256 {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.0.finish().as_ref());
        Sha256(bytes)
    }
}

impl std::io::Write for Sha256Hasher {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A digest of any algorithm, of what is written to it.
#[derive(Clone)]
pub struct Hasher(Context);

#[derive(Clone)]
enum Context {
    Md5(md5::Md5),
    Ring(HashAlgo, ring::digest::Context),
}

impl Hasher {
    pub fn new(algo: HashAlgo) -> Self {
        let of_ring = |algorithm| Self(Context::Ring(algo, ring::digest::Context::new(algorithm)));
        match algo {
            HashAlgo::Md5 => Self(Context::Md5(md5::Md5::default())),
            HashAlgo::Sha1 => of_ring(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY),
            HashAlgo::Sha256 => of_ring(&ring::digest::SHA256),
            HashAlgo::Sha512 => of_ring(&ring::digest::SHA512),
        }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Context::Md5(context) => md5::Digest::update(context, bytes),
            Context::Ring(_, context) => context.update(bytes),
        }
    }

    pub fn finish(self) -> Hash {
        match self.0 {
            Context::Md5(context) => Hash { algo: HashAlgo::Md5, bytes: context.finalize().to_vec() },
            Context::Ring(algo, context) => Hash { algo, bytes: context.finish().as_ref().to_vec() },
        }
    }
}

impl std::io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The algorithms that derivations may name. BLAKE3 is experimental in Nix and not offered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum HashAlgo {
    Md5,
    Sha1,
    Sha256,
    Sha512,
}

impl HashAlgo {
    /// Digest length in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

impl fmt::Display for HashAlgo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for HashAlgo {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "md5" => Ok(Self::Md5),
            "sha1" => Ok(Self::Sha1),
            "sha256" => Ok(Self::Sha256),
            "sha512" => Ok(Self::Sha512),
            _ => Err(Error::Hash {
                text: text.chars().take(80).collect(),
                why: "unknown algorithm (known: md5, sha1, sha256, sha512)",
            }),
        }
    }
}

/// A digest of any algorithm. `bytes` has the algorithm's length.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash {
    pub algo: HashAlgo,
    pub bytes: Vec<u8>,
}

impl Hash {
    pub fn to_hex(&self) -> String {
        to_hex(&self.bytes)
    }

    pub fn to_nix32(&self) -> String {
        base32::encode(&self.bytes)
    }

    pub fn to_sri(&self) -> String {
        format!("{}-{}", self.algo, BASE64.encode(&self.bytes))
    }

    /// `algo:digits`, `algo-base64` (SRI), or bare digits if `default` says of which algorithm. The digits' encoding
    /// (hexadecimal, nix32 or base 64) is told by their number, as Nix does (Nix: hash.cc).
    pub fn parse(text: &str, default: Option<HashAlgo>) -> Result<Self, Error> {
        let fail = |why| Error::Hash { text: text.chars().take(160).collect(), why };
        let (algo, digits, sri) = match (text.split_once(':'), text.split_once('-')) {
            (Some((algo, digits)), _) => (algo.parse()?, digits, false),
            (None, Some((algo, digits))) => (algo.parse()?, digits, true),
            (None, None) => (default.ok_or_else(|| fail("it does not name its algorithm"))?, text, false),
        };
        let size = algo.size();
        let bytes = if sri || digits.len() == size.div_ceil(3) * 4 {
            BASE64.decode(digits).map_err(|_| fail("invalid base 64"))?
        } else if digits.len() == size * 2 {
            from_hex(digits).ok_or_else(|| fail("invalid hexadecimal digits"))?
        } else if digits.len() == base32::encoded_len(size) {
            match algo {
                HashAlgo::Md5 => base32::decode::<16>(digits)?.to_vec(),
                HashAlgo::Sha1 => base32::decode::<20>(digits)?.to_vec(),
                HashAlgo::Sha256 => base32::decode::<32>(digits)?.to_vec(),
                HashAlgo::Sha512 => base32::decode::<64>(digits)?.to_vec(),
            }
        } else {
            return Err(fail("wrong length for its algorithm"));
        };
        if bytes.len() != size {
            return Err(fail("wrong length for its algorithm"));
        }
        Ok(Self { algo, bytes })
    }
}

impl From<Sha256> for Hash {
    fn from(hash: Sha256) -> Self {
        Self { algo: HashAlgo::Sha256, bytes: hash.0.to_vec() }
    }
}

/// `algo:` and nix32.
impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algo, self.to_nix32())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

pub(crate) fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]])
        .map(char::from)
        .collect()
}

fn from_hex(digits: &str) -> Option<Vec<u8>> {
    let value = |c: u8| char::from(c).to_digit(16).and_then(|v| u8::try_from(v).ok());
    digits
        .as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some(value(*high)? << 4 | value(*low)?),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_one_hash() {
        let hash = Sha256::of(b"hello\n");
        for text in [
            hash.to_string(),
            hash.to_sri(),
            hash.to_hex(),
            hash.to_nix32(),
            format!("sha256:{}", hash.to_hex()),
        ] {
            assert_eq!(text.parse::<Sha256>().unwrap(), hash, "{text}");
        }
        let base64 = hash.to_sri().replace("sha256-", "sha256:");
        assert_eq!(base64.parse::<Sha256>().unwrap(), hash);
    }

    #[test]
    fn every_algorithm_digests() {
        use std::io::Write as _;
        for (algo, hex) in [
            (HashAlgo::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (HashAlgo::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (HashAlgo::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (
                HashAlgo::Sha512,
                "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                 2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            ),
        ] {
            let mut hasher = Hasher::new(algo);
            hasher.write_all(b"a").unwrap();
            hasher.clone().write_all(b"elsewhere").unwrap();
            hasher.write_all(b"bc").unwrap();
            let hash = hasher.finish();
            assert_eq!((hash.algo, hash.to_hex().as_str()), (algo, hex));
        }
    }

    #[test]
    fn what_is_no_hash() {
        for text in
            ["", "sha256:", "sha256-AAAA", "sha1:00", "rot13:00", "zz", &"0".repeat(63), &"g".repeat(64)]
        {
            assert!(text.parse::<Sha256>().is_err(), "{text}");
        }
        assert!(Hash::parse(&"0".repeat(64), None).is_err());
        assert!("sha1-2jmj7l5rSw0yVb/vlWAYkK/YBwk=".parse::<Sha256>().is_err());
    }
}
