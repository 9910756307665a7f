//! The build's log on its way through the operator: all of it into a file, for the cache; its last lines into memory,
//! for the status.
//!
//! Owns a thread that does nothing but read, because a log that nobody reads stops the build that writes it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek as _, Write as _};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_api::LOG_TAIL_LINES;

use crate::error::Error;

/// Most bytes of a log that are kept. What comes later is read and dropped, and the file says so.
const MAX_KEPT: u64 = 64 << 20;
/// Longest line in the tail; a longer one is cut.
const MAX_LINE: usize = 1024;

/// The log of one session.
pub struct Log {
    tail: Arc<Mutex<Tail>>,
    done: Receiver<File>,
}

#[derive(Default)]
struct Tail {
    lines: VecDeque<String>,
    /// Bytes behind the last line's end.
    open: Vec<u8>,
}

impl Log {
    /// Follows `stream` to its end.
    pub fn follow(mut stream: impl Read + Send + 'static, dir: &Path) -> Result<Self, Error> {
        let fail = |source| Error::File { act: "keep a build's log in", path: dir.to_owned(), source };
        let mut file = tempfile::tempfile_in(dir).map_err(fail)?;
        let tail = Arc::new(Mutex::new(Tail::default()));
        let (sender, done) = channel();
        let shared = tail.clone();
        let follow = move || {
            let mut buffer = vec![0; 64 << 10];
            let mut kept = 0;
            let mut keeps = true;
            loop {
                let count = match stream.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => count,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    // A connection that broke ends the log; the session says why.
                    Err(_) => break,
                };
                let bytes = &buffer[..count];
                // A panic elsewhere leaves a tail that can still be added to.
                shared.lock().unwrap_or_else(PoisonError::into_inner).add(bytes);
                if keeps {
                    kept += count as u64;
                    keeps = kept <= MAX_KEPT && file.write_all(bytes).is_ok();
                    if !keeps {
                        // If the disk is full, this fails as well, and the log just ends.
                        let _ = file.write_all(b"\ndrover: the rest of this log was not kept\n");
                    }
                }
            }
            let _ = file.rewind();
            // Nobody waits for it any more if the session was given up.
            let _ = sender.send(file);
        };
        std::thread::Builder::new().name("build-log".into()).spawn(follow).map_err(fail)?;
        Ok(Self { tail, done })
    }

    /// A handle to the last lines, which goes on filling up.
    pub fn tail(&self) -> LogTail {
        LogTail(self.tail.clone())
    }

    /// The whole log from its beginning, once it has ended. None if it does not end in time. Blocks.
    pub fn into_file(self, patience: Duration) -> Option<File> {
        self.done.recv_timeout(patience).ok()
    }
}

/// The last lines of a [`Log`].
#[derive(Clone)]
pub struct LogTail(Arc<Mutex<Tail>>);

impl LogTail {
    /// At most [`LOG_TAIL_LINES`] lines, the last one perhaps unfinished.
    pub fn lines(&self) -> Vec<String> {
        let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lines: Vec<String> = tail.lines.iter().cloned().collect();
        if !tail.open.is_empty() {
            lines.push(text(&tail.open));
        }
        let skip = lines.len().saturating_sub(LOG_TAIL_LINES);
        lines.split_off(skip)
    }
}

impl Tail {
    fn add(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let line = piece.strip_suffix(b"\n").unwrap_or(piece);
            let room = MAX_LINE.saturating_sub(self.open.len());
            self.open.extend_from_slice(&line[..line.len().min(room)]);
            if piece.ends_with(b"\n") {
                self.lines.push_back(text(&self.open));
                self.open.clear();
                if self.lines.len() > LOG_TAIL_LINES {
                    self.lines.pop_front();
                }
            }
        }
    }
}

/// Builders write what they like; the status is JSON.
fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line).trim_end_matches('\r').replace(|c: char| c.is_control() && c != '\t', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail_of(pieces: &[&[u8]]) -> Vec<String> {
        let mut tail = Tail::default();
        pieces.iter().for_each(|piece| tail.add(piece));
        LogTail(Arc::new(Mutex::new(tail))).lines()
    }

    #[test]
    fn the_tail_is_lines_however_they_arrive() {
        assert_eq!(
            tail_of(&[b"on", b"e\ntw", b"o\r\n", b"\x1b[31mthree\xff"]),
            ["one", "two", "[31mthree\u{fffd}"]
        );
        assert_eq!(tail_of(&[]), Vec::<String>::new());
        assert_eq!(tail_of(&[b"\n"]), [""]);
    }

    #[test]
    fn the_tail_is_bounded_in_both_directions() {
        let many: Vec<u8> = (0..100).flat_map(|i| format!("{i}\n").into_bytes()).collect();
        let lines = tail_of(&[&many, b"open"]);
        assert_eq!((lines.len(), lines[0].as_str()), (LOG_TAIL_LINES, "76"));
        assert_eq!(tail_of(&[&[b'x'; 5000], b"y\nz"]), ["x".repeat(MAX_LINE), "z".into()]);
    }

    #[test]
    fn the_file_has_all_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let log = Log::follow(reader, dir.path()).unwrap();
        writer.write_all(b"one\ntwo\n").unwrap();
        drop(writer);
        let tail = log.tail();
        let mut text = String::new();
        log.into_file(Duration::from_secs(10)).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), tail.lines()), ("one\ntwo\n", vec!["one".into(), "two".into()]));
    }

    #[test]
    fn a_log_without_an_end_does_not_hold_the_session() {
        let dir = tempfile::tempdir().unwrap();
        let (reader, _writer) = std::io::pipe().unwrap();
        let log = Log::follow(reader, dir.path()).unwrap();
        assert!(log.into_file(Duration::from_millis(10)).is_none());
    }
}
