//! What there was of a build's log, for who comes later: all of it in a file, where there is one, up to a limit; and in
//! memory its last part.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::{Piece, note};

/// How much of a log's end is in memory.
const MAX_RECENT: usize = 256 << 10;
/// How much of a log's beginning is in its file: as much as the operator keeps of one.
pub(super) const MAX_SPOOLED: u64 = 64 << 20;

pub(super) struct History {
    recent: VecDeque<u8>,
    /// Bytes of the log so far.
    total: u64,
    spool: Option<Spool>,
}

/// The log's beginning. The file has no name, and is gone with the last that reads it.
struct Spool {
    file: Arc<File>,
    bytes: u64,
    /// It takes no more: it is as large as it may be, or the disk is full.
    ended: bool,
}

impl History {
    pub(super) fn new(file: Option<File>) -> Self {
        let spool = file.map(|file| Spool { file: Arc::new(file), bytes: 0, ended: false });
        Self { recent: VecDeque::new(), total: 0, spool }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        if let Some(spool) = &mut self.spool {
            spool.write(bytes);
        }
        let kept = bytes.get(bytes.len().saturating_sub(MAX_RECENT)..).unwrap_or(bytes);
        let excess = (self.recent.len() + kept.len()).saturating_sub(MAX_RECENT);
        self.recent.drain(..excess);
        self.recent.extend(kept);
        self.total += bytes.len() as u64;
    }

    /// The log so far, as far as it is kept, with a line where something is left out.
    pub(super) fn pieces(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let recent_from = self.total - self.recent.len() as u64;
        let spooled = self.spool.as_ref().map_or(0, |spool| spool.bytes);
        if let Some(spool) = &self.spool {
            pieces.push(Piece::Spooled { file: Arc::clone(&spool.file), from: 0, to: spool.bytes });
        }
        let left_out = recent_from.saturating_sub(spooled);
        if left_out > 0 {
            let line = match spooled {
                0 => note("the beginning of this build's log is not kept"),
                _ => format!("\n{}", note(&format!("{left_out} bytes of this build's log are not kept"))),
            };
            pieces.push(Piece::Bytes(line.into_bytes()));
        }
        // At most as much as there is in memory.
        let known = usize::try_from(spooled.saturating_sub(recent_from)).unwrap_or(usize::MAX);
        pieces.push(Piece::Bytes(self.recent.iter().skip(known).copied().collect()));
        pieces
    }

    /// Bytes that this takes of the disk.
    pub(super) fn spooled(&self) -> u64 {
        self.spool.as_ref().map_or(0, |spool| spool.bytes)
    }
}

impl Spool {
    fn write(&mut self, bytes: &[u8]) {
        let room = usize::try_from(MAX_SPOOLED - self.bytes).unwrap_or(usize::MAX);
        let taken = &bytes[..bytes.len().min(room)];
        if self.ended {
            return;
        }
        // What was written in part is written again by nobody: it does not count.
        match self.file.write_all_at(taken, self.bytes) {
            Ok(()) => self.bytes += taken.len() as u64,
            Err(_) => self.ended = true,
        }
        self.ended |= taken.len() < bytes.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(history: &History) -> String {
        let pieces = history.pieces().into_iter().map(|piece| match piece {
            Piece::Bytes(bytes) => bytes,
            Piece::Spooled { file, from, to } => {
                let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
                file.read_exact_at(&mut bytes, from).unwrap();
                bytes
            }
        });
        String::from_utf8(pieces.flatten().collect()).unwrap()
    }

    #[test]
    fn without_a_file_its_end_is_kept() {
        let mut history = History::new(None);
        history.write(&vec![b'a'; MAX_RECENT - 1]);
        history.write(b"bc");
        let text = text(&history);
        let (first, rest) = text.split_once('\n').unwrap();
        assert!(first.contains("not kept"));
        assert!(rest.len() == MAX_RECENT && rest.ends_with("abc"));
        history.write(&vec![b'd'; 2 * MAX_RECENT]);
        assert_eq!(history.recent.len(), MAX_RECENT);
    }

    #[test]
    fn with_a_file_all_of_it_is() {
        let mut history = History::new(Some(tempfile::tempfile().unwrap()));
        history.write(b"first\n");
        history.write(&vec![b'x'; 3 * MAX_RECENT]);
        history.write(b"\nlast\n");
        assert_eq!(text(&history), format!("first\n{}\nlast\n", "x".repeat(3 * MAX_RECENT)));
        assert_eq!(history.spooled(), history.total);
    }

    #[test]
    fn the_file_is_bounded_and_what_is_left_out_is_said() {
        let mut history = History::new(Some(tempfile::tempfile().unwrap()));
        history.spool.as_mut().unwrap().bytes = MAX_SPOOLED - 3;
        history.total = MAX_SPOOLED - 3;
        history.write(b"abcdef");
        history.write(&vec![b'x'; MAX_RECENT]);
        assert_eq!(history.spooled(), MAX_SPOOLED);
        let Some(Piece::Bytes(line)) = history.pieces().into_iter().nth(1) else { panic!("a line of ours") };
        assert_eq!(line, b"\ndrover-builder: 3 bytes of this build's log are not kept\n");
    }

    #[test]
    fn a_file_that_takes_nothing_is_done_without() {
        let unwritable = File::open("/dev/null").unwrap();
        let mut history = History::new(Some(unwritable));
        history.write(b"first\n");
        history.write(b"last\n");
        assert_eq!((text(&history).as_str(), history.spooled()), ("first\nlast\n", 0));
    }
}
