//! On its way from a builder to a cache an output rests in a temporary file, compressed: its narinfo can only be
//! written once all of it was seen.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, Write};
use std::path::Path;

use drover_nix::hash::Sha256Hasher;
use drover_nix::references::RefScanner;
use drover_nix::{Sha256, StorePath};

use crate::Error;

/// zstd's own default: a good part of what higher levels save, at the speed of a network.
const LEVEL: i32 = 3;
const BUFFER: usize = 128 << 10;

/// Takes a NAR's bytes: hashes them, looks for references in them, and keeps them compressed.
pub struct NarSpool {
    encoder: zstd::Encoder<'static, Hashing>,
    hasher: Sha256Hasher,
    scanner: RefScanner,
    size: u64,
}

/// A NAR at rest, and what was learned about it. The file is gone when this is dropped.
pub struct SpooledNar {
    /// Of the NAR itself.
    pub nar_hash: Sha256,
    pub nar_size: u64,
    /// The candidates that occur in it.
    pub references: BTreeSet<StorePath>,
    /// Of the compressed file (zstd).
    pub file_hash: Sha256,
    pub file_size: u64,
    file: File,
}

impl NarSpool {
    /// Keeps the file, which has no name, in `dir`. Looks for references to `candidates`.
    pub fn new(dir: &Path, candidates: impl IntoIterator<Item = StorePath>) -> Result<Self, Error> {
        let file = tempfile::tempfile_in(dir).map_err(spooling)?;
        let file = BufWriter::with_capacity(BUFFER, file);
        let hashing = Hashing { file, hasher: Sha256Hasher::new(), size: 0 };
        let encoder = zstd::Encoder::new(hashing, LEVEL).map_err(spooling)?;
        let scanner = RefScanner::new(candidates);
        Ok(Self { encoder, hasher: Sha256Hasher::new(), scanner, size: 0 })
    }

    /// Bytes of the NAR so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn finish(self) -> Result<SpooledNar, Error> {
        let Hashing { file, hasher, size } = self.encoder.finish().map_err(spooling)?;
        let file = file.into_inner().map_err(|error| spooling(error.into_error()))?;
        Ok(SpooledNar {
            nar_hash: self.hasher.finish(),
            nar_size: self.size,
            references: self.scanner.found(),
            file_hash: hasher.finish(),
            file_size: size,
            file,
        })
    }
}

impl Write for NarSpool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.encoder.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.scanner.feed(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.encoder.flush()
    }
}

impl SpooledNar {
    /// The compressed file, from its beginning. One reader at a time.
    pub fn open_file(&self) -> Result<File, Error> {
        let mut file = self.file.try_clone().map_err(spooling)?;
        file.rewind().map_err(spooling)?;
        Ok(file)
    }

    /// The NAR, from its beginning. One reader at a time.
    pub fn open_nar(&self) -> Result<impl Read + use<>, Error> {
        let file = BufReader::with_capacity(BUFFER, self.open_file()?);
        zstd::Decoder::with_buffer(file).map_err(spooling)
    }
}

struct Hashing {
    file: BufWriter<File>,
    hasher: Sha256Hasher,
    size: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn spooling(source: io::Error) -> Error {
    Error::Io { act: "keep a NAR in a temporary file".to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_in_one_pass() {
        let wanted: StorePath = "i00sflxqsj37lfmf95m8mn0grv615hpj-a".parse().unwrap();
        let other: StorePath = "q4mzjdlh5px6977h7v5fdsk1p33yg583-b".parse().unwrap();
        let mut nar = vec![b'.'; 300_000];
        nar.extend(wanted.as_str().as_bytes());
        let mut spool = NarSpool::new(&std::env::temp_dir(), [wanted.clone(), other]).unwrap();
        nar.chunks(1000).for_each(|piece| spool.write_all(piece).unwrap());
        let spooled = spool.finish().unwrap();
        assert_eq!((spooled.nar_hash, spooled.nar_size), (Sha256::of(&nar), nar.len() as u64));
        assert_eq!(spooled.references, [wanted].into());
        for _ in 0..2 {
            let mut file = Vec::new();
            spooled.open_file().unwrap().read_to_end(&mut file).unwrap();
            assert_eq!((spooled.file_hash, spooled.file_size), (Sha256::of(&file), file.len() as u64));
            let mut back = Vec::new();
            spooled.open_nar().unwrap().read_to_end(&mut back).unwrap();
            assert_eq!(back, nar);
        }
        assert!(spooled.file_size < 10_000);
    }
}
