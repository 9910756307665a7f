//! An archive as zstd frames: how a builder that compresses sends an output, and how a cache keeps it.
//!
//! One frame for each [`FRAME`] bytes of the archive, the last for what is left of them, one behind the other. Such a file
//! is an ordinary `.nar.zst` to whoever reads one (RFC 8878, 3: frames in a row are their contents in a row), and each
//! frame is checked before it becomes part of one: what a builder could put into a zstd stream beside the archive, or
//! leave for other readers to fail at, has no place in it. Frames are also where a transfer that broke off goes on.

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, find_frame_compressed_size, get_frame_content_size};

use crate::Error;

/// Bytes of an archive that are compressed together. Both sides hold that much, and what is lost with a connection is less
/// than this; ten times as much would make files a percent or two smaller.
pub const FRAME: usize = 1 << 20;

/// As the operator compresses what it compresses itself.
pub(crate) const LEVEL: i32 = zstd::DEFAULT_COMPRESSION_LEVEL;

const MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();
/// Of a frame header's first byte, all bits but those that say how long the field of the content's size is.
const DESCRIPTOR_BITS: u8 = 0b0011_1111;
/// The content is one segment, so that the window is no larger than it; no reserved bit is set; a checksum stands at the
/// end; no dictionary is asked for (RFC 8878, 3.1.1.1.1).
const DESCRIPTOR: u8 = 0b0010_0100;

/// Makes frames.
pub(crate) struct Encoder(Compressor<'static>);

impl Encoder {
    pub(crate) fn new() -> std::io::Result<Self> {
        let mut compressor = Compressor::new(LEVEL)?;
        compressor.set_parameter(CParameter::ChecksumFlag(true))?;
        compressor.set_parameter(CParameter::ContentSizeFlag(true))?;
        Ok(Self(compressor))
    }

    /// The frame of at most [`FRAME`] bytes.
    pub(crate) fn encode(&mut self, piece: &[u8]) -> std::io::Result<Vec<u8>> {
        self.0.compress(piece)
    }
}

/// Checks frames and gives their contents.
pub(crate) struct Decoder(Decompressor<'static>);

impl Decoder {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self(Decompressor::new()?))
    }

    /// Puts the content of `frame` into `content`, in the place of what was there. It has to be exactly what comes next of
    /// an archive of which `left` bytes are still to come. After an error `content` is of no use.
    pub(crate) fn decode(&mut self, frame: &[u8], left: u64, content: &mut Vec<u8>) -> Result<(), Error> {
        let wrong = |why: String| Error::Frame { why };
        let wanted = usize::try_from(left).map_or(FRAME, |left| left.min(FRAME));
        if frame.get(..4) != Some(&MAGIC) {
            return Err(wrong("it is no zstd frame".into()));
        }
        if frame.get(4).is_none_or(|descriptor| descriptor & DESCRIPTOR_BITS != DESCRIPTOR) {
            return Err(wrong("it is not one segment with a checksum and without a dictionary".into()));
        }
        match get_frame_content_size(frame) {
            Ok(Some(size)) if size == wanted as u64 => {}
            Ok(Some(size)) => {
                return Err(wrong(format!("it has {size} bytes of the archive in it instead of {wanted}")));
            }
            Ok(None) | Err(_) => return Err(wrong("its header is not whole".into())),
        }
        match find_frame_compressed_size(frame) {
            Ok(size) if size == frame.len() => {}
            Ok(size) => return Err(wrong(format!("{} bytes stand behind it", frame.len() - size))),
            Err(_) => return Err(wrong("it is not whole".into())),
        }
        // The destination has an end, whatever the header said.
        content.resize(wanted, 0);
        match self.0.decompress_to_buffer(frame, &mut content[..]) {
            Ok(size) if size == wanted => Ok(()),
            Ok(size) => Err(wrong(format!("it gives {size} bytes of the archive instead of {wanted}"))),
            Err(error) => Err(wrong(format!("it does not decompress: {error}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        let step = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..len).map(step).collect()
    }

    fn encode(piece: &[u8]) -> Vec<u8> {
        Encoder::new().unwrap().encode(piece).unwrap()
    }

    fn decode(frame: &[u8], left: usize) -> Result<Vec<u8>, String> {
        let mut content = b"of another frame".to_vec();
        match Decoder::new().unwrap().decode(frame, left as u64, &mut content) {
            Ok(()) => Ok(content),
            Err(error @ Error::Frame { .. }) => Err(error.to_string()),
            Err(error) => panic!("{error}"),
        }
    }

    fn refused(frame: &[u8], left: usize, why: &str) {
        let error = decode(frame, left).unwrap_err();
        assert!(error.contains(why), "{error}");
    }

    /// With other settings than ours.
    fn unusual(piece: &[u8], settings: &[CParameter]) -> Vec<u8> {
        let mut compressor = Compressor::new(LEVEL).unwrap();
        for setting in [CParameter::ChecksumFlag(true)].iter().chain(settings) {
            compressor.set_parameter(*setting).unwrap();
        }
        compressor.compress(piece).unwrap()
    }

    #[test]
    fn there_and_back() {
        for piece in [&b"x"[..], &[7; 255], &[7; 256], &[7; 70_000], &vec![0; FRAME], &noise(FRAME)] {
            assert!(decode(&encode(piece), piece.len()).unwrap() == piece);
        }
        // Larger than what is in it, and as good as any.
        assert!(encode(&noise(FRAME)).len() > FRAME);
        // All but the last are full.
        assert!(decode(&encode(&noise(FRAME)), 5 * FRAME).is_ok());
    }

    #[test]
    fn frames_in_a_row_are_one_file() {
        let data = noise(2 * FRAME + 5);
        let file: Vec<u8> = data.chunks(FRAME).flat_map(encode).collect();
        let mut again = Vec::new();
        zstd::stream::read::Decoder::new(&file[..]).unwrap().read_to_end(&mut again).unwrap();
        assert!(again == data);
    }

    #[test]
    fn a_bomb() {
        // Says what it is.
        let one_segment = unusual(&vec![0; 64 << 20], &[CParameter::WindowLog(27)]);
        assert!(one_segment.len() < 10_000);
        refused(&one_segment, FRAME, "67108864 bytes of the archive in it instead of 1048576");
        refused(&unusual(&vec![0; 64 << 20], &[]), FRAME, "one segment");
        refused(&encode(&[0; 1001]), 1000, "1001 bytes of the archive in it instead of 1000");
        // Says that it is less than it is.
        let mut bomb = encode(&vec![0; FRAME]);
        assert_eq!(&bomb[5..9], (FRAME as u32).to_le_bytes());
        bomb[5..9].copy_from_slice(&70_000u32.to_le_bytes());
        refused(&bomb, 70_000, "does not decompress");
    }

    #[test]
    fn frames_with_too_little_in_them() {
        refused(&encode(&[7; 1000]), 1001, "1000 bytes of the archive in it instead of 1001");
        refused(&encode(&[7; 1000]), 2 * FRAME, "instead of 1048576");
        // A flood of them would never end.
        refused(&encode(b""), 1, "0 bytes of the archive in it");
        let mut less = encode(&[7; 70_000]);
        less[5..9].copy_from_slice(&70_001u32.to_le_bytes());
        refused(&less, 70_001, "does not decompress");
    }

    #[test]
    fn skippable_frames() {
        let skippable = [&0x184d_2a50_u32.to_le_bytes()[..], &5u32.to_le_bytes(), b"hello"].concat();
        refused(&skippable, 5, "no zstd frame");
        refused(&[&skippable[..], &encode(b"hello")].concat(), 5, "no zstd frame");
        refused(&[&encode(b"hello")[..], &skippable].concat(), 5, "13 bytes stand behind it");
    }

    #[test]
    fn what_stands_behind_a_frame() {
        refused(&[&encode(b"hello")[..], b"x"].concat(), 5, "1 bytes stand behind it");
        refused(&[encode(b"hello"), encode(b"hello")].concat(), 5, "stand behind it");
        refused(&[encode(b"hello"), encode(b"")].concat(), 5, "stand behind it");
    }

    #[test]
    fn a_frame_without_its_end() {
        let frame = encode(&noise(1000));
        for len in 0..frame.len() {
            assert!(decode(&frame[..len], 1000).is_err(), "{len}");
        }
    }

    #[test]
    fn a_wrong_checksum_or_none() {
        let mut frame = encode(&noise(1000));
        *frame.last_mut().unwrap() ^= 1;
        refused(&frame, 1000, "does not decompress");
        refused(&unusual(b"hello", &[CParameter::ChecksumFlag(false)]), 5, "with a checksum");
    }

    #[test]
    fn a_window_that_not_every_reader_takes() {
        // A window of 128 MiB, which libarchive does not take, over next to nothing.
        let mut frame = Vec::new();
        let mut encoder = zstd::stream::write::Encoder::new(&mut frame, LEVEL).unwrap();
        encoder.set_parameter(CParameter::WindowLog(27)).unwrap();
        encoder.include_checksum(true).unwrap();
        std::io::Write::write_all(&mut encoder, b"hello").unwrap();
        encoder.finish().unwrap();
        refused(&frame, 5, "one segment");
    }

    #[test]
    fn dictionaries_and_reserved_bits() {
        let frame = encode(&[7; 1000]);
        for bit in [0, 1, 3, 4] {
            let mut other = frame.clone();
            other[4] |= 1 << bit;
            refused(&other, 1000, "without a dictionary");
        }
    }

    #[test]
    fn other_formats() {
        for wrong in [&b""[..], b"hello", &0x184d_2204_u32.to_le_bytes(), &[0; 100]] {
            refused(wrong, 5, "no zstd frame");
        }
        // Without its magic number.
        let magicless = &encode(b"hello")[4..];
        refused(magicless, 5, "no zstd frame");
    }
}
