//! A NAR on its way to a cache: hashed, scanned for references and compressed in one pass, into a file of its own. What
//! comes compressed by whoever built it stays as it came, once it is known to be a [frame](crate::frames) of the NAR.

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
use crate::frames::{Decoder, LEVEL};

type Encoder = zstd::stream::write::Encoder<'static, Packed>;
/// The file, as a cache will have it.
type Packed = Hashing<BufWriter<NamedTempFile>>;

/// Takes a NAR's bytes; see [`SpooledNar`] for what becomes of them. The file goes when it is dropped.
pub struct NarSpool {
    hash: Sha256Hasher,
    size: u64,
    scanner: RefScanner,
    packed: Target,
    /// Of frames; made for the first of them.
    decoder: Option<Decoder>,
}

/// Where compressed bytes go: a frame that is open takes the NAR's bytes, and between frames whole ones may come.
enum Target {
    Open(Encoder),
    Between(Packed),
    /// Changing from one to the other failed.
    Lost,
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
            packed: Target::Between(file),
            decoder: None,
        })
    }

    /// Takes the next [frame](crate::FRAME) of a NAR of which `left` bytes are still to come, and puts what is in it into
    /// `content`, in the place of what was there. Nothing of one that is refused, which is [`Error::Frame`], is taken.
    pub fn frame(&mut self, frame: &[u8], left: u64, content: &mut Vec<u8>) -> Result<(), Error> {
        let fail = |source| Error::Io { act: "write the compressed NAR".into(), source };
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => none.insert(Decoder::new().map_err(fail)?),
        };
        decoder.decode(frame, left, content)?;
        self.packed.between().and_then(|file| file.write_all(frame)).map_err(fail)?;
        self.note(content);
        Ok(())
    }

    /// Bytes of the NAR so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Completes the file.
    pub fn finish(mut self) -> Result<SpooledNar, Error> {
        let fail = |source| Error::Io { act: "write the compressed NAR".into(), source };
        if self.size == 0 {
            // An empty file would be no zstd stream.
            self.packed.open().map_err(fail)?;
        }
        let Hashing { inner, hash, size } = self.packed.close().map_err(fail)?;
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

    fn note(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.scanner.feed(bytes);
        self.size += bytes.len() as u64;
    }
}

impl Write for NarSpool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.packed.open()?.write_all(bytes)?;
        self.note(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Target {
    fn open(&mut self) -> io::Result<&mut Encoder> {
        if let Self::Between(_) = self {
            let file = std::mem::replace(self, Self::Lost).close()?;
            *self = Self::Open(Encoder::new(file, LEVEL)?);
        }
        match self {
            Self::Open(encoder) => Ok(encoder),
            _ => Err(lost()),
        }
    }

    fn between(&mut self) -> io::Result<&mut Packed> {
        if let Self::Open(_) = self {
            *self = Self::Between(std::mem::replace(self, Self::Lost).close()?);
        }
        match self {
            Self::Between(file) => Ok(file),
            _ => Err(lost()),
        }
    }

    fn close(self) -> io::Result<Packed> {
        match self {
            Self::Open(encoder) => encoder.finish(),
            Self::Between(file) => Ok(file),
            Self::Lost => Err(lost()),
        }
    }
}

fn lost() -> io::Error {
    io::Error::other("writing to it failed before")
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
    use crate::frames::{Encoder, FRAME};
    use crate::testing::{nar_of_file, store_path};

    /// What it says that it has, from its file alone.
    fn check(spooled: &SpooledNar, nar: &[u8]) {
        assert_eq!((spooled.nar_hash, spooled.nar_size), (Sha256::of(nar), nar.len() as u64));
        let mut file = Vec::new();
        spooled.open_file(0).unwrap().read_to_end(&mut file).unwrap();
        assert_eq!((spooled.file_hash, spooled.file_size), (Sha256::of(&file), file.len() as u64));
        let mut again = Vec::new();
        spooled.open_nar().unwrap().read_to_end(&mut again).unwrap();
        assert!(again == nar);
    }

    #[test]
    fn frames_stay_as_they_came() {
        let dir = tempfile::tempdir().unwrap();
        let there = store_path("there");
        // Over the border of two frames, where a reference stands as well.
        let filler = "x".repeat(FRAME - 120);
        let nar = nar_of_file(format!("{filler}{there}{}", "y".repeat(2 * FRAME)).as_bytes());
        let border = nar.len() - 2 * FRAME - 100;
        assert!(border < FRAME && FRAME < border + 100);
        let frames: Vec<Vec<u8>> =
            nar.chunks(FRAME).map(|piece| Encoder::new().unwrap().encode(piece).unwrap()).collect();
        let new = || NarSpool::new(dir.path(), [there.clone(), store_path("absent")]).unwrap();
        let mut content = Vec::new();
        let mut spool = new();
        for frame in &frames {
            let left = nar.len() as u64 - spool.size();
            // What is refused leaves no trace.
            for wrong in [&frame[..frame.len() - 1], &[&frame[..], b"x"].concat()] {
                let error = spool.frame(wrong, left, &mut content).unwrap_err();
                assert!(matches!(error, Error::Frame { .. }), "{error}");
            }
            spool.frame(frame, left, &mut content).unwrap();
        }
        let spooled = spool.finish().unwrap();
        check(&spooled, &nar);
        assert_eq!(spooled.references, [there.clone()].into());
        assert_eq!(spooled.file_size, frames.concat().len() as u64);

        // In turns with bytes, as when a session with another builder program goes on.
        let mut spool = new();
        spool.frame(&frames[0], nar.len() as u64, &mut content).unwrap();
        spool.write_all(&nar[FRAME..2 * FRAME]).unwrap();
        spool.frame(&frames[2], (nar.len() - 2 * FRAME) as u64, &mut content).unwrap();
        spool.write_all(&nar[3 * FRAME..]).unwrap();
        check(&spool.finish().unwrap(), &nar);
        check(&new().finish().unwrap(), b"");
    }

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
