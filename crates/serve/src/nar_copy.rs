//! Moving one NAR out of a longer stream. A NAR has no length before it: only its grammar says where it ends.

use std::io::{self, BufRead, BufWriter, Read, Write};

use drover_nix::hash::Sha256Hasher;
use drover_nix::{Sha256, StorePath, nar};

use crate::Error;

const BUFFER: usize = 64 << 10;
const ACT: &str = "receiving a NAR";

/// Copies the NAR that `input` stands at to `sink`, checks it on the way, and takes not one byte beyond its end.
/// Returns its size in bytes. On failure `sink` has a part of it.
pub(crate) fn copy_nar(input: &mut impl Read, path: &StorePath, sink: &mut dyn Write) -> Result<u64, Error> {
    let mut tee = Tee { input, sink: BufWriter::with_capacity(BUFFER, sink), broken: None };
    let size = nar::Reader::new(&mut tee).skip_all();
    let Tee { mut sink, broken, .. } = tee;
    let size = match (broken, size) {
        (Some(source), _) => {
            // The buffered rest would only fail again, or hang.
            let (_sink, _rest) = sink.into_parts();
            return Err(Error::NarSink { path: path.clone(), source });
        }
        (None, Ok(size)) => size,
        (None, Err(drover_nix::Error::NarIo { source, .. })) => return Err(Error::io(ACT)(source)),
        (None, Err(error)) => return Err(Error::nix("a NAR")(error)),
    };
    sink.flush().map_err(|source| Error::NarSink { path: path.clone(), source })?;
    Ok(size)
}

/// As [`copy_nar`]; returns the NAR's hash as well.
pub(crate) fn copy_nar_hashed(
    input: &mut impl Read,
    path: &StorePath,
    sink: &mut dyn Write,
) -> Result<(Sha256, u64), Error> {
    let mut hashing = Hashing { sink, hasher: Sha256Hasher::new() };
    let size = copy_nar(input, path, &mut hashing)?;
    Ok((hashing.hasher.finish(), size))
}

/// Copies `count` bytes of a NAR whose beginning came earlier to `sink`. On failure `sink` has a part of them.
pub(crate) fn copy_bytes(
    input: &mut impl BufRead,
    path: &StorePath,
    mut count: u64,
    sink: &mut dyn Write,
) -> Result<(), Error> {
    while count > 0 {
        let bytes = match input.fill_buf() {
            Ok([]) => return Err(Error::io(ACT)(io::ErrorKind::UnexpectedEof.into())),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::io(ACT)(error)),
        };
        let taken = usize::try_from(count).map_or(bytes.len(), |count| count.min(bytes.len()));
        sink.write_all(&bytes[..taken]).map_err(|source| Error::NarSink { path: path.clone(), source })?;
        input.consume(taken);
        count -= taken as u64;
    }
    Ok(())
}

/// Passes on what comes behind the first `left` bytes, which were sent before: reading them again is many times faster
/// than any connection.
pub struct Behind<W> {
    pub inner: W,
    pub left: u64,
}

impl<W: Write> Write for Behind<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let skipped = usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len()));
        if skipped > 0 {
            self.left -= skipped as u64;
            return Ok(skipped);
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

struct Hashing<'a> {
    sink: &'a mut dyn Write,
    hasher: Sha256Hasher,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.sink.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// Passes on what is read through it, and remembers when that was what failed.
struct Tee<'a, R> {
    input: &'a mut R,
    sink: BufWriter<&'a mut dyn Write>,
    broken: Option<io::Error>,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        if let Err(error) = self.sink.write_all(&buffer[..count]) {
            let kind = error.kind();
            self.broken = Some(error);
            // Never `Interrupted`: the parser would try again.
            return Err(if kind == io::ErrorKind::Interrupted { io::ErrorKind::Other } else { kind }.into());
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::file_nar;

    fn path() -> StorePath {
        "i00sflxqsj37lfmf95m8mn0grv615hpj-a".parse().unwrap()
    }

    #[test]
    fn not_one_byte_too_many() {
        for size in [0, 1, 7, 8, 100_000] {
            let nar = file_nar(&vec![7; size]);
            let stream = [nar.as_slice(), b"the rest"].concat();
            let (mut input, mut sink) = (stream.as_slice(), Vec::new());
            assert_eq!(copy_nar(&mut input, &path(), &mut sink).unwrap(), nar.len() as u64);
            assert_eq!((input, sink), (b"the rest".as_slice(), nar));
        }
    }

    #[test]
    fn the_hash_of_what_was_passed_on() {
        let nar = file_nar(&vec![7; 100_000]);
        let stream = [nar.as_slice(), b"the rest"].concat();
        let mut sink = Vec::new();
        let (hash, size) = copy_nar_hashed(&mut stream.as_slice(), &path(), &mut sink).unwrap();
        assert_eq!((hash, size), (Sha256::of(&nar), nar.len() as u64));
        assert_eq!(sink, nar);
    }

    #[test]
    fn a_cut_off_archive() {
        let nar = file_nar(b"hello\n");
        for len in 0..nar.len() {
            let error = copy_nar(&mut &nar[..len], &path(), &mut Vec::new()).unwrap_err();
            assert!(error.is_disconnect(), "{len}: {error}");
        }
    }

    #[test]
    fn who_is_to_blame() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for size in [10, 1_000_000] {
            let nar = file_nar(&vec![7; size]);
            let error = copy_nar(&mut nar.as_slice(), &path(), &mut Full).unwrap_err();
            assert!(matches!(error, Error::NarSink { .. }), "{size}: {error}");
        }
        let error = copy_nar(&mut [9; 200].as_slice(), &path(), &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Error::Nix { .. }), "{error}");
    }
}
