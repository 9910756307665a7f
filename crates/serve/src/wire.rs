//! Primitives of the wire (Nix: serialise.cc): 64-bit words, padded strings, lists, paths. Little-endian throughout.
//!
//! Readers take a limit wherever the peer names a length, and grow buffers only by what really arrives.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};

use drover_nix::{Sha256, StoreDir, StorePath};

use crate::Error;

/// Longest path string, in bytes: a store directory and a base name.
pub const MAX_PATH_LEN: u64 = 4096;
/// Most paths in one set. Each takes some two hundred bytes of memory once it is there.
pub const MAX_PATHS: u64 = 1 << 20;
/// Longest signature, hash, content address or name, in bytes.
pub const MAX_SHORT_LEN: u64 = 4096;
/// Most signatures on one path.
pub const MAX_SIGNATURES: u64 = 1024;
/// Longest argument, environment value or builder of a derivation, in bytes.
pub const MAX_VALUE_LEN: u64 = 32 << 20;
/// Most arguments, or environment entries, of a derivation.
pub const MAX_VALUES: u64 = 1 << 20;
/// All strings of a derivation together, in bytes: as much as a `.drv` file may have.
pub const MAX_DERIVATION_LEN: u64 = 64 << 20;
/// Most outputs of a derivation.
pub const MAX_OUTPUTS: u64 = 4096;
/// Longest error message that is kept, in bytes.
pub const MAX_MESSAGE_LEN: u64 = 4 << 20;

/// Up to here a string's claimed length is allocated before its bytes are there.
const EAGER_LEN: u64 = 1024;

/// One word, whole or not at all.
pub fn read_u64(input: &mut impl Read, act: &'static str) -> Result<u64, Error> {
    let mut word = [0; 8];
    input.read_exact(&mut word).map_err(Error::io(act))?;
    Ok(u64::from_le_bytes(word))
}

/// A word that must fit 32 bits, as Nix reads magic numbers, commands and most options.
pub fn read_int(input: &mut impl Read, act: &'static str) -> Result<u64, Error> {
    match read_u64(input, act)? {
        value if value <= u64::from(u32::MAX) => Ok(value),
        value => Err(Error::TooLong { what: "an integer", got: value, limit: u64::from(u32::MAX) }),
    }
}

/// Anything but 0 is true.
pub fn read_bool(input: &mut impl Read, act: &'static str) -> Result<bool, Error> {
    Ok(read_u64(input, act)? != 0)
}

/// A word, or None where the stream ends before its first byte.
pub fn read_word_or_end(input: &mut impl Read, act: &'static str) -> Result<Option<u64>, Error> {
    let mut word = [0; 8];
    let first = loop {
        match input.read(&mut word) {
            Ok(0) => return Ok(None),
            Ok(n) => break n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(act)(error)),
        }
    };
    input.read_exact(&mut word[first..]).map_err(Error::io(act))?;
    Ok(Some(u64::from_le_bytes(word)))
}

/// A string of at most `limit` bytes, into `buffer`, which is cleared first.
pub fn read_string_into(
    input: &mut impl Read,
    buffer: &mut Vec<u8>,
    limit: u64,
    what: &'static str,
) -> Result<(), Error> {
    buffer.clear();
    let len = read_u64(input, what)?;
    if len > limit {
        return Err(Error::TooLong { what, got: len, limit });
    }
    let padded = len.next_multiple_of(8);
    if padded <= EAGER_LEN {
        // At most EAGER_LEN, so it fits usize.
        buffer.resize(padded as usize, 0);
        input.read_exact(buffer).map_err(Error::io(what))?;
    } else {
        let got = input.by_ref().take(padded).read_to_end(buffer).map_err(Error::io(what))?;
        if got as u64 != padded {
            return Err(Error::Closed { act: what });
        }
    }
    // `padded` bytes are in memory, so `len` fits usize.
    let len = len as usize;
    if buffer[len..].iter().any(|byte| *byte != 0) {
        return Err(Error::invalid(what, "the padding behind a string is not zero"));
    }
    buffer.truncate(len);
    Ok(())
}

/// A string of at most `limit` bytes.
pub fn read_string(input: &mut impl Read, limit: u64, what: &'static str) -> Result<Vec<u8>, Error> {
    let mut buffer = Vec::new();
    read_string_into(input, &mut buffer, limit, what)?;
    if buffer.len() as u64 > EAGER_LEN {
        // It grew by doubling: what is kept should take what it has.
        buffer.shrink_to_fit();
    }
    Ok(buffer)
}

/// A short string that must be text.
pub fn read_text(input: &mut impl Read, what: &'static str) -> Result<String, Error> {
    String::from_utf8(read_string(input, MAX_SHORT_LEN, what)?)
        .map_err(|_| Error::invalid(what, "it is not UTF-8"))
}

/// A number of items.
pub fn read_count(input: &mut impl Read, limit: u64, what: &'static str) -> Result<u64, Error> {
    match read_u64(input, what)? {
        count if count <= limit => Ok(count),
        got => Err(Error::TooLong { what, got, limit }),
    }
}

/// A full store path.
pub fn read_path(input: &mut impl Read, dir: &StoreDir) -> Result<StorePath, Error> {
    read_optional_path(input, dir)?.ok_or_else(|| Error::invalid("a store path", "it is empty"))
}

/// A full store path, or the empty string for none.
pub fn read_optional_path(input: &mut impl Read, dir: &StoreDir) -> Result<Option<StorePath>, Error> {
    const WHAT: &str = "a store path";
    match read_string(input, MAX_PATH_LEN, WHAT)? {
        path if path.is_empty() => Ok(None),
        path => dir.parse(&path).map(Some).map_err(Error::nix(WHAT)),
    }
}

/// A set of full store paths, in any order.
pub fn read_paths(input: &mut impl Read, dir: &StoreDir) -> Result<BTreeSet<StorePath>, Error> {
    const WHAT: &str = "a set of store paths";
    let count = read_count(input, MAX_PATHS, WHAT)?;
    let mut buffer = Vec::new();
    // Collected first: building the set from a sorted sequence, the usual case, is much faster than inserting.
    let mut paths = Vec::new();
    for _ in 0..count {
        read_string_into(input, &mut buffer, MAX_PATH_LEN, WHAT)?;
        paths.push(dir.parse(&buffer).map_err(Error::nix(WHAT))?);
    }
    Ok(paths.into_iter().collect())
}

/// A NAR hash in any spelling; bare digits are taken as SHA-256.
pub fn read_nar_hash(input: &mut impl Read) -> Result<Sha256, Error> {
    const WHAT: &str = "a NAR hash";
    read_text(input, WHAT)?.parse().map_err(Error::nix(WHAT))
}

/// The writing half. Every method fails only as the underlying stream does.
pub trait WireWrite: Write + Sized {
    fn put_u64(&mut self, value: u64) -> Result<(), Error> {
        self.write_all(&value.to_le_bytes()).map_err(Error::io("writing"))
    }

    fn put_bool(&mut self, value: bool) -> Result<(), Error> {
        self.put_u64(u64::from(value))
    }

    fn put_string(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.put_u64(bytes.len() as u64)?;
        let padding = bytes.len().next_multiple_of(8) - bytes.len();
        self.write_all(bytes).and_then(|()| self.write_all(&[0; 8][..padding])).map_err(Error::io("writing"))
    }

    /// The full path.
    fn put_path(&mut self, dir: &StoreDir, path: &StorePath) -> Result<(), Error> {
        let (dir, base) = (dir.as_str().as_bytes(), path.as_str().as_bytes());
        let len = dir.len() + 1 + base.len();
        self.put_u64(len as u64)?;
        let padding = len.next_multiple_of(8) - len;
        [dir, b"/", base, &[0; 8][..padding]]
            .into_iter()
            .try_for_each(|part| self.write_all(part))
            .map_err(Error::io("writing"))
    }

    fn put_optional_path(&mut self, dir: &StoreDir, path: Option<&StorePath>) -> Result<(), Error> {
        match path {
            Some(path) => self.put_path(dir, path),
            None => self.put_string(b""),
        }
    }

    /// A sorted set, as Nix writes it.
    fn put_paths(&mut self, dir: &StoreDir, paths: &BTreeSet<StorePath>) -> Result<(), Error> {
        self.put_u64(paths.len() as u64)?;
        paths.iter().try_for_each(|path| self.put_path(dir, path))
    }
}

impl<W: Write> WireWrite for W {}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a";

    #[test]
    fn strings_are_padded_to_eight_bytes() {
        for (text, len) in [("", 8), ("a", 16), ("12345678", 16), ("123456789", 24)] {
            let mut bytes = Vec::new();
            bytes.put_string(text.as_bytes()).unwrap();
            assert_eq!(bytes.len(), len, "{text:?}");
            assert_eq!(read_string(&mut bytes.as_slice(), 9, "x").unwrap(), text.as_bytes());
        }
    }

    #[test]
    fn padding_must_be_zero() {
        let bytes = [1, 0, 0, 0, 0, 0, 0, 0, b'a', 0, 0, 0, 0, 0, 0, 1];
        assert!(matches!(read_string(&mut bytes.as_slice(), 9, "x"), Err(Error::Invalid { .. })));
    }

    #[test]
    fn a_claimed_length_alone_allocates_nothing() {
        let limit_minus_one = (MAX_VALUE_LEN - 1).to_le_bytes();
        let mut buffer = Vec::new();
        let result = read_string_into(&mut limit_minus_one.as_slice(), &mut buffer, MAX_VALUE_LEN, "x");
        assert!(matches!(result, Err(Error::Closed { .. })));
        assert!(buffer.capacity() < 4096);
        for hostile in [MAX_VALUE_LEN + 1, 1 << 63, u64::MAX, u64::MAX - 7] {
            let bytes = hostile.to_le_bytes();
            let result = read_string_into(&mut bytes.as_slice(), &mut buffer, MAX_VALUE_LEN, "x");
            assert!(matches!(result, Err(Error::TooLong { .. })), "{hostile}");
        }
    }

    #[test]
    fn hostile_counts() {
        let dir = StoreDir::default();
        for count in [MAX_PATHS + 1, 1 << 63, u64::MAX] {
            let bytes = count.to_le_bytes();
            assert!(matches!(read_paths(&mut bytes.as_slice(), &dir), Err(Error::TooLong { .. })));
        }
        let bytes = MAX_PATHS.to_le_bytes();
        assert!(matches!(read_paths(&mut bytes.as_slice(), &dir), Err(Error::Closed { .. })));
    }

    #[test]
    fn sets_of_paths() {
        let dir = StoreDir::default();
        let mut bytes = Vec::new();
        let path = dir.parse(PATH.as_bytes()).unwrap();
        bytes.put_paths(&dir, &[path.clone()].into()).unwrap();
        let mut expected = 1u64.to_le_bytes().to_vec();
        expected.extend((PATH.len() as u64).to_le_bytes());
        expected.extend(PATH.as_bytes());
        expected.extend([0; 3]);
        assert_eq!(bytes, expected);
        assert_eq!(read_paths(&mut bytes.as_slice(), &dir).unwrap(), [path].into());
    }

    #[test]
    fn the_end_is_only_clean_between_words() {
        assert_eq!(read_word_or_end(&mut [].as_slice(), "x").unwrap(), None);
        assert!(matches!(read_word_or_end(&mut [1, 2].as_slice(), "x"), Err(Error::Closed { .. })));
        assert_eq!(read_word_or_end(&mut 7u64.to_le_bytes().as_slice(), "x").unwrap(), Some(7));
    }
}
