//! The bytes of an archive on their way in: read in large chunks, hashed beside the work, and handed on without a copy.
//!
//! A chunk is read once and then shared: the parser looks at its tokens, a thread hashes it, files are written from it.
//! It returns to its pool when the last of them is done. The pool's size is the limit of what is in flight.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use drover_nix::Sha256;
use drover_nix::hash::Sha256Hasher;
use drover_nix::nar::Stream;
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;

/// Bytes that are read at a time, at most.
const CHUNK: usize = 256 << 10;
/// Chunks of one archive that are in use at a time, at most.
const MAX_CHUNKS: usize = 12;
/// Bytes that are read back from a file at a time: little enough for a core's cache.
const READ_BACK: usize = 64 << 10;
/// From which size on an archive is hashed by a thread of its own. Below it, starting one costs more than it saves.
pub(super) const HASH_APART_FROM: u64 = 1 << 20;

/// An archive's stream. Where its size is known it reads ahead, but never beyond that size.
pub(super) struct Feed<'a> {
    input: &'a mut dyn Stream,
    /// Bytes of the archive that were not read from `input` yet; None if that is not known.
    left: Option<u64>,
    hasher: Hasher,
    pool: Arc<Pool>,
    /// What was read and not taken yet.
    ahead: Piece,
    /// Whether the kernel may still be asked to move bytes.
    splices: bool,
}

/// Some bytes of a chunk, shared.
#[derive(Clone, Default)]
pub(super) struct Piece {
    chunk: Option<Arc<Chunk>>,
    range: Range<usize>,
}

impl<'a> Feed<'a> {
    pub(super) fn new(input: &'a mut dyn Stream, size: Option<u64>) -> Self {
        let apart = match size {
            // Without a thread it takes longer, and that is all.
            Some(HASH_APART_FROM..) => HashThread::start().ok(),
            _ => None,
        };
        let hasher = apart.map_or_else(|| Hasher::Here(Sha256Hasher::new()), Hasher::Apart);
        Self { input, left: size, hasher, pool: Arc::default(), ahead: Piece::default(), splices: true }
    }

    /// Up to `most` bytes, at least one but for the end of the stream.
    pub(super) fn piece(&mut self, most: u64) -> io::Result<(Piece, u64)> {
        if self.ahead.is_empty() {
            self.fill(most)?;
        }
        let count = self.ahead.len().min(usize::try_from(most).unwrap_or(usize::MAX));
        let piece = self.ahead.split(count);
        Ok((piece, count as u64))
    }

    /// Has the kernel move up to `most` bytes from the stream to the end of `file`, which has `at` bytes and can be read.
    /// 0 if that is not possible, whatever the reason: then [`Self::piece`] is.
    pub(super) fn splice(&mut self, most: u64, file: &Arc<File>, at: u64) -> u64 {
        let Hasher::Apart(thread) = &self.hasher else { return 0 };
        let most = usize::try_from(most.min(self.left.unwrap_or(0))).unwrap_or(CHUNK).min(CHUNK);
        if !self.splices || !self.ahead.is_empty() || most == 0 {
            return 0;
        }
        let Some(from) = self.input.descriptor() else { return 0 };
        let flags = SpliceFlags::MOVE;
        match rustix::io::retry_on_intr(|| rustix::pipe::splice(from, None, file, None, most, flags)) {
            Ok(count) => {
                let count = count as u64;
                self.input.taken(count);
                self.left = self.left.map(|left| left - count);
                thread.update(ToHash::File { file: Arc::clone(file), at, count });
                count
            }
            Err(errno) => {
                // Not a pipe, for instance. A full disk is better told by who writes.
                self.splices = errno == Errno::AGAIN;
                0
            }
        }
    }

    /// The hash of everything that was read.
    pub(super) fn finish(self) -> io::Result<Sha256> {
        self.hasher.finish()
    }

    /// Reads the next chunk: as much as may be read ahead, or, if that is not known, `wanted` bytes.
    fn fill(&mut self, wanted: u64) -> io::Result<()> {
        // Back to the pool before another one is asked for.
        self.ahead = Piece::default();
        let may = usize::try_from(self.left.unwrap_or(wanted)).unwrap_or(CHUNK).min(CHUNK);
        if may == 0 {
            return Ok(());
        }
        let mut chunk = Chunk { bytes: self.pool.take(may), pool: Arc::clone(&self.pool) };
        let count = loop {
            match self.input.read(&mut chunk.bytes[..may]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.left = self.left.map(|left| left - count as u64);
        self.ahead = Piece { chunk: Some(Arc::new(chunk)), range: 0..count };
        match &mut self.hasher {
            Hasher::Here(hasher) => hasher.update(self.ahead.bytes()),
            Hasher::Apart(thread) => thread.update(ToHash::Piece(self.ahead.clone())),
        }
        Ok(())
    }
}

impl Read for Feed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (piece, count) = self.piece(buffer.len() as u64)?;
        buffer[..piece.len()].copy_from_slice(piece.bytes());
        Ok(usize::try_from(count).unwrap_or(buffer.len()))
    }

    /// The parser's tokens, nearly always at hand.
    fn read_exact(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            if self.ahead.is_empty() {
                self.fill(buffer.len() as u64)?;
            }
            let count = buffer.len().min(self.ahead.len());
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (now, later) = buffer.split_at_mut(count);
            now.copy_from_slice(&self.ahead.bytes()[..count]);
            self.ahead.range.start += count;
            buffer = later;
        }
        Ok(())
    }
}

impl Piece {
    pub(super) fn bytes(&self) -> &[u8] {
        self.chunk.as_ref().map_or(&[], |chunk| &chunk.bytes[self.range.clone()])
    }

    pub(super) fn len(&self) -> usize {
        self.range.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Takes off the first `count` bytes, of at least as many.
    fn split(&mut self, count: usize) -> Self {
        let range = self.range.start..self.range.start + count;
        self.range.start = range.end;
        Self { chunk: self.chunk.clone(), range }
    }
}

struct Chunk {
    bytes: Vec<u8>,
    pool: Arc<Pool>,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.bytes));
    }
}

/// Buffers of one archive. Whoever holds one gives it back without needing another, so waiting for one always ends.
#[derive(Default)]
struct Pool {
    state: Mutex<Buffers>,
    returned: Condvar,
}

#[derive(Default)]
struct Buffers {
    free: Vec<Vec<u8>>,
    /// How many there are, in use or free.
    made: usize,
    /// Whether someone waits for one.
    wanted: bool,
}

impl Pool {
    /// A buffer of at least `size` bytes.
    fn take(&self, size: usize) -> Vec<u8> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = loop {
            if let Some(buffer) = state.free.pop() {
                break buffer;
            }
            if state.made < MAX_CHUNKS {
                state.made += 1;
                break Vec::new();
            }
            state.wanted = true;
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        buffer
    }

    fn give_back(&self, buffer: Vec<u8>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.free.push(buffer);
        // Nearly never, while waking costs a call of the system even if nobody sleeps.
        if std::mem::take(&mut state.wanted) {
            self.returned.notify_one();
        }
    }
}

enum Hasher {
    Here(Sha256Hasher),
    Apart(HashThread),
}

impl Hasher {
    fn finish(self) -> io::Result<Sha256> {
        match self {
            Self::Here(hasher) => Ok(hasher.finish()),
            Self::Apart(thread) => thread.finish(),
        }
    }
}

/// Hashes while its owner parses and writes. It ends with its owner, finished or not.
struct HashThread {
    queue: SyncSender<ToHash>,
    thread: JoinHandle<io::Result<Sha256>>,
}

/// The next bytes of the archive.
enum ToHash {
    Piece(Piece),
    /// They went past us into this file: still in the page cache, and most likely in the processor's.
    File {
        file: Arc<File>,
        at: u64,
        count: u64,
    },
}

impl HashThread {
    fn start() -> io::Result<Self> {
        let (queue, next) = mpsc::sync_channel::<ToHash>(MAX_CHUNKS);
        let hash = move || {
            let mut hasher = Sha256Hasher::new();
            let mut buffer = Vec::new();
            for bytes in next {
                match bytes {
                    ToHash::Piece(piece) => hasher.update(piece.bytes()),
                    ToHash::File { file, at, count } => {
                        buffer.resize(READ_BACK, 0);
                        read_back(&file, at, count, &mut buffer, &mut hasher)?;
                    }
                }
            }
            Ok(hasher.finish())
        };
        Ok(Self { queue, thread: thread::Builder::new().spawn(hash)? })
    }

    /// The thread ends by itself only if it cannot go on; `finish` tells of that.
    fn update(&self, bytes: ToHash) {
        let _ = self.queue.send(bytes);
    }

    fn finish(self) -> io::Result<Sha256> {
        drop(self.queue);
        match self.thread.join() {
            Ok(hash) => hash,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn read_back(
    file: &File,
    mut at: u64,
    count: u64,
    buffer: &mut [u8],
    hasher: &mut Sha256Hasher,
) -> io::Result<()> {
    let end = at + count;
    while at < end {
        let most = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        file.read_exact_at(&mut buffer[..most], at)?;
        hasher.update(&buffer[..most]);
        at += most as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ahead_no_further_than_the_archive_goes() {
        let bytes: Vec<u8> = (0..3 * CHUNK + 77).map(|i| (i % 251) as u8).collect();
        for size in [1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let mut input = &bytes[..];
            let mut feed = Feed::new(&mut input, Some(size as u64));
            let mut token = [0; 1];
            feed.read_exact(&mut token).unwrap();
            let mut got = token.to_vec();
            loop {
                let (piece, count) = feed.piece(u64::MAX).unwrap();
                if count == 0 {
                    break;
                }
                got.extend_from_slice(piece.bytes());
            }
            assert_eq!(feed.finish().unwrap(), Sha256::of(&bytes[..size]));
            assert_eq!((got.as_slice(), input), (&bytes[..size], &bytes[size..]));
        }
    }

    #[test]
    fn chunks_in_use_are_bounded_and_come_back() {
        let bytes = vec![7; CHUNK * (MAX_CHUNKS + 3)];
        let mut input = &bytes[..];
        let mut feed = Feed::new(&mut input, Some(bytes.len() as u64));
        let held: Vec<Piece> = (0..MAX_CHUNKS).map(|_| feed.piece(CHUNK as u64).unwrap().0).collect();
        // One more has to wait until one of them is let go.
        let (go, wait) = mpsc::channel();
        let releaser = thread::spawn(move || {
            wait.recv().unwrap();
            drop(held);
        });
        assert_eq!(feed.pool.state.lock().unwrap().made, MAX_CHUNKS);
        go.send(()).unwrap();
        for _ in 0..3 {
            assert_eq!(feed.piece(CHUNK as u64).unwrap().1, CHUNK as u64);
        }
        releaser.join().unwrap();
        assert_eq!(feed.pool.state.lock().unwrap().made, MAX_CHUNKS);
        assert_eq!(feed.finish().unwrap(), Sha256::of(&bytes));
    }
}
