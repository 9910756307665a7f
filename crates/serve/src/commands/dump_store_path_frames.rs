//! The NAR of one valid path from an offset on, compressed: no command of Nix's.
//!
//! The request is that of [`super::dump_store_path_from`] with another number. The answer is frames, each with its length before it, and a length of 0 behind the last. What is in a frame is for the
//! two stores behind the session to agree about: here it is bytes. A server that knows this command says so when it is
//! asked about the path [`announcement`], which no store has: any other server has nothing to say about that one, and
//! the session goes on.

use std::io::{Read, Write};

use drover_nix::StorePath;

use crate::Error;
use crate::wire;

/// Most bytes of one frame: a mebibyte of a NAR, however badly it compresses.
pub(crate) const MAX_FRAME: u64 = 2 << 20;
/// Behind the last frame.
pub(crate) const END: u64 = 0;

/// Valid, says a server that knows this command. Its hash part is zeros, which nothing hashes to.
pub(crate) fn announcement() -> StorePath {
    StorePath::from_parts([0; 20], "drover-serve-frames")
        .unwrap_or_else(|_| unreachable!("the name is valid"))
}

/// The next frame into `frame`, in the place of what was there. False at the end.
pub(crate) fn read_frame(input: &mut impl Read, frame: &mut Vec<u8>) -> Result<bool, Error> {
    const ACT: &str = "receiving a compressed NAR";
    frame.clear();
    let len = match wire::read_u64(input, ACT)? {
        END => return Ok(false),
        len if len > MAX_FRAME => return Err(Error::TooLong { what: "a frame", got: len, limit: MAX_FRAME }),
        len => len,
    };
    // Grows as the bytes come.
    match input.by_ref().take(len).read_to_end(frame).map_err(Error::io(ACT))? {
        got if got as u64 == len => Ok(true),
        _ => Err(Error::Closed { act: ACT }),
    }
}

pub(crate) fn write_frame(output: &mut impl Write, frame: &[u8]) -> std::io::Result<()> {
    output.write_all(&(frame.len() as u64).to_le_bytes())?;
    output.write_all(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::WireWrite as _;

    #[test]
    fn frames_and_their_end() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, b"one").unwrap();
        write_frame(&mut bytes, &[7; 100_000]).unwrap();
        bytes.put_u64(END).unwrap();
        let (mut input, mut frame) = (&bytes[..], b"before".to_vec());
        assert!(read_frame(&mut input, &mut frame).unwrap() && frame == b"one");
        assert!(read_frame(&mut input, &mut frame).unwrap() && frame == [7; 100_000]);
        assert!(!read_frame(&mut input, &mut frame).unwrap() && input.is_empty());
        for len in 0..bytes.len() - 1 {
            let mut input = &bytes[..len];
            let end = loop {
                match read_frame(&mut input, &mut frame) {
                    Ok(true) => {}
                    end => break end,
                }
            };
            assert!(end.unwrap_err().is_disconnect(), "{len}");
        }
    }

    #[test]
    fn a_claimed_length_alone_allocates_nothing() {
        let mut frame = Vec::new();
        for len in [MAX_FRAME + 1, 1 << 63, u64::MAX] {
            let error = read_frame(&mut len.to_le_bytes().as_slice(), &mut frame).unwrap_err();
            assert!(matches!(error, Error::TooLong { .. }), "{error}");
        }
        let error = read_frame(&mut MAX_FRAME.to_le_bytes().as_slice(), &mut frame).unwrap_err();
        assert!(error.is_disconnect() && frame.capacity() < 4096, "{error}");
    }
}
