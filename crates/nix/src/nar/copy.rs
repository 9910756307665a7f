//! Copying an archive while it is parsed.

use std::io::{self, Read, Write};

use super::{CHUNK, Reader};
use crate::Error;

/// Copies one archive from `input` to `output`, byte for byte, and says how long it was. Fails at the first byte that
/// breaks the format's rules; reads nothing beyond the archive's end. Small pieces are gathered, so that neither side
/// sees a call for every token if `input` is buffered.
pub fn copy(input: impl Read, output: impl Write) -> Result<u64, Error> {
    let tee = Tee { input, output, gathered: Vec::with_capacity(CHUNK), write_error: None };
    let mut reader = Reader::new(tee);
    let result = reader.skip_all();
    let mut tee = reader.into_inner();
    if let Some(source) = tee.write_error.take() {
        return Err(Error::NarIo { act: "write", source });
    }
    let size = result?;
    tee.flush().map_err(|source| Error::NarIo { act: "write", source })?;
    Ok(size)
}

struct Tee<R, W> {
    input: R,
    output: W,
    gathered: Vec<u8>,
    /// Why a read failed although reading went well.
    write_error: Option<io::Error>,
}

impl<R: Read, W: Write> Tee<R, W> {
    fn pass_on(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() >= CHUNK / 2 {
            self.flush()?;
            return self.output.write_all(bytes);
        }
        if self.gathered.len() + bytes.len() > CHUNK {
            self.flush()?;
        }
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.write_all(&self.gathered)?;
        self.gathered.clear();
        Ok(())
    }
}

impl<R: Read, W: Write> Read for Tee<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        if let Err(error) = self.pass_on(&buffer[..count]) {
            self.write_error = Some(error);
            return Err(io::Error::other("the output failed"));
        }
        Ok(count)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        // A `BufReader` underneath has a fast path for this one.
        self.input.read_exact(buffer)?;
        if let Err(error) = self.pass_on(buffer) {
            self.write_error = Some(error);
            return Err(io::Error::other("the output failed"));
        }
        Ok(())
    }
}
