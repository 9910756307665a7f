//! Compressing an archive into frames by several threads: each takes one piece at a time, and the frames leave in order.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::frames::{Encoder, FRAME};

/// Most threads: more would outrun every reader, and each holds two pieces and a compressor's tables, 4 MiB in all.
const MAX_THREADS: usize = 8;

/// Takes an archive's bytes and hands its frames on, each of them whole, to `sink`.
pub struct FrameWriter<S> {
    sink: S,
    piece: Vec<u8>,
    crew: Vec<Worker>,
    /// How many of the crew there may be.
    most: usize,
    /// Pieces that were handed out, and frames that were handed on.
    given: usize,
    taken: usize,
}

struct Worker {
    /// None once there is nothing more to do.
    pieces: Option<Sender<Vec<u8>>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
}

/// A piece, for its memory, and its frame.
struct Done {
    piece: Vec<u8>,
    frame: io::Result<Vec<u8>>,
}

impl<S: FnMut(&[u8]) -> io::Result<()>> FrameWriter<S> {
    /// With as many threads as there are processors for this program. They start when there is work for them.
    pub fn new(sink: S) -> Self {
        let most = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        Self { sink, piece: Vec::new(), crew: Vec::new(), most, given: 0, taken: 0 }
    }

    /// Hands on what is left.
    pub fn finish(mut self) -> io::Result<()> {
        if !self.piece.is_empty() {
            self.give()?;
        }
        while self.taken < self.given {
            self.take()?;
        }
        Ok(())
    }

    /// Hands a piece out. Whoever is next has done what it was given before, or does it now.
    fn give(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.piece);
        if self.given - self.taken == self.most {
            self.take()?;
        }
        let next = self.given % self.most;
        if self.crew.len() == next {
            self.crew.push(Worker::start()?);
        }
        let sent = self.crew[next].pieces.as_ref().is_some_and(|pieces| pieces.send(piece).is_ok());
        if !sent {
            return Err(gone());
        }
        self.given += 1;
        Ok(())
    }

    /// Hands the oldest frame on that is still to come.
    fn take(&mut self) -> io::Result<()> {
        let Done { piece, frame } = self.crew[self.taken % self.most].done.recv().map_err(|_| gone())?;
        self.taken += 1;
        self.piece = piece;
        self.piece.clear();
        (self.sink)(&frame?)
    }
}

impl<S: FnMut(&[u8]) -> io::Result<()>> Write for FrameWriter<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() == FRAME {
            self.give()?;
        }
        let count = bytes.len().min(FRAME - self.piece.len());
        self.piece.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    /// Nothing leaves but whole frames.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Worker {
    fn start() -> io::Result<Self> {
        let mut encoder = Encoder::new()?;
        let (pieces, given) = channel::<Vec<u8>>();
        let (finished, done) = channel();
        let work = move || {
            for piece in given {
                let frame = encoder.encode(&piece);
                if finished.send(Done { piece, frame }).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("compress".into()).spawn(work)?;
        Ok(Self { pieces: Some(pieces), done, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.pieces = None;
        if let Some(thread) = self.thread.take() {
            // It ends with the piece that it has. If it panicked, whoever waited for its frame was told.
            let _ = thread.join();
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("a thread that compresses is gone")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::Decoder;

    fn data(len: usize) -> Vec<u8> {
        (0..u32::try_from(len / 4 + 1).unwrap()).flat_map(|i| (i / 5).to_le_bytes()).take(len).collect()
    }

    #[test]
    fn frames_leave_in_order() {
        for (len, piece) in
            [(0, 1), (1, 1), (FRAME, 70_000), (FRAME + 1, FRAME), (20 * FRAME + 77, 3 * FRAME)]
        {
            let data = data(len);
            for most in [1, 2, 7] {
                let mut frames = Vec::new();
                let sink = |frame: &[u8]| {
                    frames.push(frame.to_vec());
                    Ok(())
                };
                let mut writer = FrameWriter { most, ..FrameWriter::new(sink) };
                data.chunks(piece).for_each(|piece| writer.write_all(piece).unwrap());
                assert!(writer.crew.len() <= most);
                writer.finish().unwrap();
                let (mut decoder, mut content, mut again) = (Decoder::new().unwrap(), Vec::new(), Vec::new());
                for frame in &frames {
                    decoder.decode(frame, (len - again.len()) as u64, &mut content).unwrap();
                    again.extend_from_slice(&content);
                }
                assert_eq!(frames.len(), len.div_ceil(FRAME));
                assert!(again == data, "{len} {most}");
            }
        }
    }

    #[test]
    fn a_sink_that_fails_ends_it() {
        let mut left = 3;
        let sink = |_: &[u8]| {
            left -= 1;
            if left == 0 { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
        };
        let mut writer = FrameWriter::new(sink);
        let error = io::copy(&mut io::Read::take(io::repeat(7), 100 << 20), &mut writer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
