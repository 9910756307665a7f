//! The hash of an archive that contains its own hash part: occurrences count as zeros (Nix: references.cc,
//! HashModuloSink). It is what the path of a content-addressed object with a reference to itself is made of.

use std::io::{self, Write};
use std::str::FromStr;

use bstr::ByteSlice as _;

use crate::hash::Hasher;
use crate::{Error, Hash, HashAlgo, StorePath};

/// Which of [`ModuloHashes`] a builder makes paths of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SelfReferenceHash {
    /// As Nix 2.35: content with zeros where another one refers to itself has another path.
    #[default]
    WithOffsets,
    /// As Nix 2.17 to 2.34, where both have the same path.
    WithoutOffsets,
}

/// Digests what is written to it.
pub struct HashModulo {
    needle: Vec<u8>,
    /// The end of what was seen, in which an occurrence may have begun. Shorter than the needle between writes.
    held: Vec<u8>,
    /// Where `held` begins in the archive.
    position: u64,
    offsets: Vec<u64>,
    hasher: Hasher,
}

/// Both ways in which Nix has hashed such archives. Paths from either are around.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModuloHashes {
    /// With the offset of every occurrence digested after the archive: every Nix but 2.17 to 2.34.
    pub with_offsets: Hash,
    /// Without: Nix 2.17 to 2.34.
    pub without_offsets: Hash,
}

impl ModuloHashes {
    /// Of content without an occurrence.
    pub fn both(hash: Hash) -> Self {
        Self { with_offsets: hash.clone(), without_offsets: hash }
    }

    pub fn get(&self, which: SelfReferenceHash) -> &Hash {
        match which {
            SelfReferenceHash::WithOffsets => &self.with_offsets,
            SelfReferenceHash::WithoutOffsets => &self.without_offsets,
        }
    }

    /// Whether it is one of them, whichever Nix it comes from.
    pub fn contains(&self, hash: &Hash) -> bool {
        *hash == self.with_offsets || *hash == self.without_offsets
    }
}

impl FromStr for SelfReferenceHash {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "with-offsets" => Ok(Self::WithOffsets),
            "without-offsets" => Ok(Self::WithoutOffsets),
            _ => Err(Error::Hash {
                text: text.chars().take(80).collect(),
                why: "expected with-offsets or without-offsets",
            }),
        }
    }
}

impl HashModulo {
    /// `own` is the path under which the archive refers to itself.
    pub fn new(own: &StorePath, algo: HashAlgo) -> Self {
        let needle = own.hash_part().as_bytes().to_vec();
        Self { needle, held: Vec::new(), position: 0, offsets: Vec::new(), hasher: Hasher::new(algo) }
    }

    pub fn finish(mut self) -> ModuloHashes {
        self.hasher.update(&self.held);
        let without_offsets = self.hasher.clone().finish();
        for offset in &self.offsets {
            self.hasher.update(format!("|{offset}").as_bytes());
        }
        ModuloHashes { with_offsets: self.hasher.finish(), without_offsets }
    }
}

impl Write for HashModulo {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(bytes);
        let mut from = 0;
        while let Some(found) = self.held[from..].find(&self.needle) {
            let start = from + found;
            from = start + self.needle.len();
            self.held[start..from].fill(0);
            self.offsets.push(self.position + start as u64);
        }
        // What was replaced holds no beginning of another occurrence: zero is no digit.
        let done = self.held.len().saturating_sub(self.needle.len() - 1);
        self.hasher.update(&self.held[..done]);
        self.held.drain(..done);
        self.position += done as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sha256;

    #[test]
    fn occurrences_are_blanked_wherever_a_piece_ends() {
        let own: StorePath = "i00sflxqsj37lfmf95m8mn0grv615hpj-x".parse().unwrap();
        let part = own.hash_part();
        let tail = &part[..31]; // the beginning of an occurrence is none
        let text = format!("{part}ab{part}{part}i00sflxq{part}c{tail}");
        let zeros = "\0".repeat(32);
        let blanked = format!("{zeros}ab{zeros}{zeros}i00sflxq{zeros}c{tail}");
        let expected = ModuloHashes {
            with_offsets: Sha256::of(format!("{blanked}|0|34|66|106").as_bytes()).into(),
            without_offsets: Sha256::of(blanked.as_bytes()).into(),
        };
        for piece in 1..=text.len() {
            let mut hasher = HashModulo::new(&own, HashAlgo::Sha256);
            text.as_bytes().chunks(piece).for_each(|bytes| hasher.write_all(bytes).unwrap());
            assert_eq!(hasher.finish(), expected, "pieces of {piece}");
        }
    }
}
