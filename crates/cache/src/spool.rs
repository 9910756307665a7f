//! A NAR on its way to a cache: hashed, scanned for references and compressed in one pass, into a file of its own.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use drover_nix::hash::Sha256Hasher;
use drover_nix::narinfo::Compression;
use drover_nix::references::RefScanner;
use drover_nix::{Sha256, StorePath};
use tempfile::NamedTempFile;

use crate::Error;

/// zstd's own default: near the speed of the hash, and half the size of most outputs.
const LEVEL: i32 = zstd::DEFAULT_COMPRESSION_LEVEL;

/// Takes a NAR's bytes; see [`SpooledNar`] for what becomes of them. The file goes when it is dropped.
pub struct NarSpool {
    hash: Sha256Hasher,
    size: u64,
    scanner: RefScanner,
    encoder: zstd::stream::write::Encoder<'static, Hashing<BufWriter<NamedTempFile>>>,
}

/// A compressed NAR in a file, and everything that a narinfo file says about its content.
pub struct SpooledNar {
    /// Of the uncompressed NAR.
    pub nar_hash: Sha256,
    pub nar_size: u64,
    /// Those of the candidates that occur in it.
    pub references: BTreeSet<StorePath>,
    pub compression: Compression,
    /// Of the file.
    pub file_hash: Sha256,
    pub file_size: u64,
    file: NamedTempFile,
    read: Arc<AtomicU64>,
}

impl NarSpool {
    /// A spool in `dir`, an existing directory, that looks for references to `candidates`.
    pub fn new(dir: &Path, candidates: impl IntoIterator<Item = StorePath>) -> Result<Self, Error> {
        let fail = |source| Error::Io { act: format!("make a temporary file in {}", dir.display()), source };
        let file = tempfile::Builder::new().prefix("nar-").tempfile_in(dir).map_err(fail)?;
        let file =
            Hashing { inner: BufWriter::with_capacity(128 << 10, file), hash: Sha256Hasher::new(), size: 0 };
        Ok(Self {
            hash: Sha256Hasher::new(),
            size: 0,
            scanner: RefScanner::new(candidates),
            encoder: zstd::stream::write::Encoder::new(file, LEVEL).map_err(fail)?,
        })
    }

    /// Bytes of the NAR so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Completes the file.
    pub fn finish(self) -> Result<SpooledNar, Error> {
        let fail = |source| Error::Io { act: "write the compressed NAR".into(), source };
        let Hashing { inner, hash, size } = self.encoder.finish().map_err(fail)?;
        let file = inner.into_inner().map_err(|error| fail(error.into_error()))?;
        Ok(SpooledNar {
            nar_hash: self.hash.finish(),
            nar_size: self.size,
            references: self.scanner.found(),
            compression: Compression::Zstd,
            file_hash: hash.finish(),
            file_size: size,
            file,
            read: Arc::default(),
        })
    }
}

impl Write for NarSpool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.encoder.write_all(bytes)?;
        self.hash.update(bytes);
        self.scanner.feed(bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SpooledNar {
    /// The NAR again, decompressed.
    pub fn open_nar(&self) -> Result<Box<dyn Read + Send>, Error> {
        let decoder = zstd::stream::read::Decoder::with_buffer(BufReader::new(self.open_file(0)?));
        Ok(Box::new(decoder.map_err(|source| Error::Io { act: "read the compressed NAR".into(), source })?))
    }

    /// How many bytes of the file have been read, again and again perhaps: how far it is on its way to a cache.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.read)
    }

    /// The file from this offset on, by a descriptor of its own.
    pub(crate) fn open_file(&self, offset: u64) -> Result<SpoolFile, Error> {
        let mut file = self.file.reopen().map_err(Error::io("open", self.file.path()))?;
        file.seek(SeekFrom::Start(offset)).map_err(Error::io("read", self.file.path()))?;
        Ok(SpoolFile { file, read: Arc::clone(&self.read) })
    }
}

/// A reader of a [`SpooledNar`]'s file.
pub(crate) struct SpoolFile {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for SpoolFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

struct Hashing<W> {
    inner: W,
    hash: Sha256Hasher,
    size: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{nar_of_file, store_path};

    #[test]
    fn one_pass_tells_all() {
        let dir = tempfile::tempdir().unwrap();
        let (there, absent) = (store_path("there"), store_path("absent"));
        let nar = nar_of_file(format!("see {there} {}", "x".repeat(200_000)).as_bytes());
        let mut spool = NarSpool::new(dir.path(), [there.clone(), absent]).unwrap();
        for piece in nar.chunks(1000) {
            spool.write_all(piece).unwrap();
        }
        let spooled = spool.finish().unwrap();
        assert_eq!(spooled.nar_hash, Sha256::of(&nar));
        assert_eq!(spooled.nar_size, nar.len() as u64);
        assert_eq!(spooled.references, [there].into());
        let mut file = Vec::new();
        spooled.open_file(0).unwrap().read_to_end(&mut file).unwrap();
        assert_eq!((spooled.file_hash, spooled.file_size), (Sha256::of(&file), file.len() as u64));
        assert!(file.len() < nar.len() / 10);
        // Twice: each reader has its own place in the file.
        for _ in 0..2 {
            let mut again = Vec::new();
            spooled.open_nar().unwrap().read_to_end(&mut again).unwrap();
            assert!(again == nar);
        }
        drop(spooled);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
