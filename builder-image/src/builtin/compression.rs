//! Compressed input, told by its first bytes, as archives do not say it otherwise.

use std::io::{self, BufRead, BufReader, Read};

use liblzma::stream::{CONCATENATED, Stream};

/// Memory that an xz stream may ask for. The largest dictionary that `xz -9` uses needs 65 MiB.
const XZ_MEMORY: u64 = 256 << 20;
/// Bytes of compressed data that are read at a time.
const BUFFER: usize = 64 << 10;

/// Reads the decompressed form of `input`; what is not known as compressed is read as it is.
pub(super) fn detect<'a>(input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    // Six bytes tell all of them apart. A regular file gives as much with the first read.
    let mut input = BufReader::with_capacity(BUFFER, input);
    let head = input.fill_buf()?;
    let begins = |magic: &[u8]| head.starts_with(magic);
    Ok(if begins(b"\x1f\x8b") {
        Box::new(flate2::bufread::MultiGzDecoder::new(input))
    } else if begins(b"\xfd7zXZ\0") {
        Box::new(xz_stream(input)?)
    } else if begins(b"BZh") {
        Box::new(bzip2::bufread::MultiBzDecoder::new(input))
    } else if begins(b"\x28\xb5\x2f\xfd") {
        Box::new(zstd::stream::read::Decoder::with_buffer(input)?)
    } else {
        Box::new(input)
    })
}

pub(super) fn xz<'a>(input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(Box::new(xz_stream(BufReader::with_capacity(BUFFER, input))?))
}

fn xz_stream<R: BufRead>(input: R) -> io::Result<impl Read> {
    let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED).map_err(io::Error::other)?;
    Ok(liblzma::bufread::XzDecoder::new_stream(input, stream))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn each_is_told_by_its_first_bytes() {
        let text = b"plain text ".repeat(10_000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 6);
        gzip.write_all(&text).unwrap();
        bzip2.write_all(&text).unwrap();
        xz.write_all(&text).unwrap();
        let zstd = zstd::encode_all(text.as_slice(), 3).unwrap();
        for bytes in
            [gzip.finish().unwrap(), bzip2.finish().unwrap(), xz.finish().unwrap(), zstd, text.clone()]
        {
            let mut read = Vec::new();
            detect(bytes.as_slice()).unwrap().read_to_end(&mut read).unwrap();
            assert!(read == text);
            let cut = &bytes[..bytes.len() - 9];
            let whole = detect(cut).and_then(|mut input| input.read_to_end(&mut Vec::new()));
            assert_eq!(whole.is_ok(), bytes == text, "what was cut off is noticed");
        }
        let mut none = Vec::new();
        detect(io::empty()).unwrap().read_to_end(&mut none).unwrap();
        assert_eq!(none, b"");
    }
}
