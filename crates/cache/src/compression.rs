//! Decompression by the names that narinfo files and `Content-Encoding` use.

use std::io::{self, BufReader, ErrorKind, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use drover_nix::narinfo::Compression;
use liblzma::stream::{CONCATENATED, Stream};

/// Memory that an xz stream may ask for. The largest dictionary that `xz -9` uses needs 65 MiB.
const XZ_MEMORY: u64 = 256 << 20;
/// Bytes of compressed data that are read at a time.
const BUFFER: usize = 64 << 10;

/// Reads the decompressed form of `input`; several streams one after the other are one. None for a compression that is
/// not supported. Errors of what does not decompress have the kind `InvalidData`, those of the input keep theirs.
pub(crate) fn decoder(
    compression: Compression,
    input: Box<dyn Read + Send>,
) -> Option<io::Result<Box<dyn Read + Send>>> {
    if compression == Compression::None {
        return Some(Ok(input));
    }
    let failed = Arc::new(AtomicBool::new(false));
    let input = Box::new(Compressed { inner: input, failed: Arc::clone(&failed) });
    let decoder = decompressor(compression, input)?;
    Some(decoder.map(|inner| Box::new(Decompressed { inner, failed }) as Box<dyn Read + Send>))
}

fn decompressor(
    compression: Compression,
    input: Box<dyn Read + Send>,
) -> Option<io::Result<Box<dyn Read + Send>>> {
    let buffered = |input| BufReader::with_capacity(BUFFER, input);
    Some(match compression {
        Compression::None => Ok(input),
        Compression::Bzip2 => Ok(Box::new(bzip2::bufread::MultiBzDecoder::new(buffered(input)))),
        Compression::Gzip => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(buffered(input)))),
        Compression::Xz => Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED)
            .map(|stream| {
                Box::new(liblzma::bufread::XzDecoder::new_stream(buffered(input), stream))
                    as Box<dyn Read + Send>
            })
            .map_err(io::Error::other),
        Compression::Zstd => zstd::stream::read::Decoder::with_buffer(buffered(input))
            .map(|decoder| Box::new(decoder) as Box<dyn Read + Send>),
        Compression::Other(_) => return None,
    })
}

/// What a `Content-Encoding` header means. None for one that is not supported.
pub(crate) fn content_encoding(name: &str) -> Option<Compression> {
    Some(match name.trim() {
        "" | "identity" | "none" => Compression::None,
        "gzip" | "x-gzip" => Compression::Gzip,
        "xz" => Compression::Xz,
        "zstd" => Compression::Zstd,
        "bzip2" => Compression::Bzip2,
        _ => return None,
    })
}

/// What is decompressed; remembers whether reading it failed.
struct Compressed {
    inner: Box<dyn Read + Send>,
    failed: Arc<AtomicBool>,
}

impl Read for Compressed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).inspect_err(|error| {
            self.failed.store(error.kind() != ErrorKind::Interrupted, Ordering::Relaxed);
        })
    }
}

/// What comes out. An error that is not the input's is the content's, whatever the decoder calls it.
struct Decompressed {
    inner: Box<dyn Read + Send>,
    failed: Arc<AtomicBool>,
}

impl Read for Decompressed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| match error.kind() {
            ErrorKind::Interrupted => error,
            _ if self.failed.load(Ordering::Relaxed) => error,
            _ => io::Error::new(ErrorKind::InvalidData, format!("it does not decompress: {error}")),
        })
    }
}

/// Fails where a stream is longer than was announced: nobody should decompress a bomb to its end.
pub(crate) struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R> Bounded<R> {
    pub(crate) fn new(inner: R, limit: u64) -> Self {
        Self { inner, left: limit }
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 && !buffer.is_empty() {
            return match self.inner.read(&mut [0])? {
                0 => Ok(0),
                _ => Err(io::Error::new(ErrorKind::InvalidData, "it is longer than was announced")),
            };
        }
        let want = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.inner.read(&mut buffer[..want])?;
        self.left -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write as _;

    use super::*;

    pub(crate) fn compress(compression: Compression, bytes: &[u8]) -> Vec<u8> {
        match compression {
            Compression::None => bytes.to_vec(),
            Compression::Bzip2 => {
                let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Xz => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Zstd => zstd::encode_all(bytes, 3).unwrap(),
            Compression::Other(_) => unreachable!(),
        }
    }

    struct Broken;

    impl Read for Broken {
        fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
            Err(ErrorKind::ConnectionReset.into())
        }
    }

    fn read(compression: Compression, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut output = Vec::new();
        decoder(compression, Box::new(io::Cursor::new(bytes.to_vec()))).unwrap()?.read_to_end(&mut output)?;
        Ok(output)
    }

    #[test]
    fn every_compression_in_one_stream_and_in_two() {
        let bytes: Vec<u8> = (0..200_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        let (left, right) = bytes.split_at(123_456);
        for compression in
            [Compression::Bzip2, Compression::Gzip, Compression::None, Compression::Xz, Compression::Zstd]
        {
            assert!(read(compression, &compress(compression, &bytes)).unwrap() == bytes, "{compression}");
            let two = [compress(compression, left), compress(compression, right)].concat();
            assert!(read(compression, &two).unwrap() == bytes, "{compression} in two");
            if compression != Compression::None {
                let whole = compress(compression, &bytes);
                for wrong in [&whole[..whole.len() - 5], b"this is not it at all"] {
                    let error = read(compression, wrong).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::InvalidData, "{compression} {error}");
                }
                // A connection that breaks says nothing of the content.
                let broken = io::Cursor::new(whole[..whole.len() / 2].to_vec()).chain(Broken);
                let decoder = decoder(compression, Box::new(broken)).unwrap().unwrap();
                let error = io::copy(&mut { decoder }, &mut io::sink()).unwrap_err();
                assert_ne!(error.kind(), ErrorKind::InvalidData, "{compression} {error}");
            }
        }
        assert!(decoder(Compression::Other("br"), Box::new(io::empty())).is_none());
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        let bomb = compress(Compression::Zstd, &vec![0; 10 << 20]);
        let inner = decoder(Compression::Zstd, Box::new(io::Cursor::new(bomb))).unwrap().unwrap();
        let mut output = Vec::new();
        let error = Bounded::new(inner, 1000).read_to_end(&mut output).unwrap_err();
        assert_eq!((error.kind(), output.len()), (ErrorKind::InvalidData, 1000));
        let mut exact = Vec::new();
        assert_eq!(Bounded::new(&b"12345"[..], 5).read_to_end(&mut exact).unwrap(), 5);
    }
}
