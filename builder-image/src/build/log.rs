//! Where a build's output goes: to a reader that may be slow, stalled or gone, none of which may hold up a build for
//! ever (NixOS/nix#16437). A slow reader slows the build down; one that takes nothing for [`STALL`] loses log, with a
//! note of how much. Also the last lines, for messages.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much log may wait for its reader.
const MAX_PENDING: usize = 1 << 20;
/// How long a reader may take nothing before log is dropped.
const STALL: Duration = Duration::from_secs(10);
/// How many last lines a failure's message has (Nix: `log-lines`).
const TAIL_LINES: usize = 25;
/// Longest line that the tail keeps whole.
const MAX_TAIL_LINE: usize = 2000;

/// A handle on the log. Clones write to the same places.
#[derive(Clone)]
pub(crate) struct Log {
    outlets: Vec<Outlet>,
}

/// One reader. The last outlet that is dropped ends its thread.
#[derive(Clone)]
struct Outlet {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pending: VecDeque<Vec<u8>>,
    bytes: usize,
    writing: bool,
    dropped: u64,
    /// When the reader last took something; None while nothing waits.
    waiting_since: Option<Instant>,
    broken: bool,
    closed: bool,
}

impl Log {
    /// Writes to `sink` from a thread of its own, which may block for as long as it likes.
    pub(crate) fn to(mut sink: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Some(bytes) = writer.next() {
                let result = sink.write_all(&bytes).and_then(|()| sink.flush());
                writer.written(result.is_err());
            }
        });
        Self { outlets: vec![Outlet { shared }] }
    }

    /// A log that goes to the readers of both.
    pub(crate) fn and(mut self, other: &Self) -> Self {
        self.outlets.extend(other.outlets.iter().cloned());
        self
    }

    /// Whether more may be written without waiting. False only while a reader is slow, never for long.
    pub(crate) fn has_room(&self) -> bool {
        self.outlets.iter().all(|outlet| {
            let state = outlet.shared.lock();
            state.bytes < MAX_PENDING || state.broken || state.is_stalled()
        })
    }

    /// Takes the bytes, or drops them for a reader that is gone or stalled. Never blocks.
    pub(crate) fn write(&self, bytes: &[u8]) {
        self.outlets.iter().for_each(|outlet| outlet.shared.write(bytes));
    }

    /// A line of our own.
    pub(crate) fn note(&self, line: &str) {
        self.write(format!("drover-builder: {line}\n").as_bytes());
    }

    /// Waits until everything is written, or the readers have taken nothing for a while.
    pub(crate) fn flush(&self) {
        self.outlets.iter().for_each(|outlet| outlet.shared.flush());
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        // The writer and this handle: nobody can write any more.
        if Arc::strong_count(&self.shared) <= 2 {
            self.shared.lock().closed = true;
            self.shared.changed.notify_all();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements, so a panic elsewhere spoils nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if state.broken || bytes.is_empty() {
            return;
        }
        if state.bytes >= MAX_PENDING && state.is_stalled() {
            state.dropped += bytes.len() as u64;
            return;
        }
        if state.dropped > 0 && state.bytes < MAX_PENDING / 2 {
            let dropped = std::mem::take(&mut state.dropped);
            let note = format!("\ndrover-builder: {dropped} bytes of log were dropped: nobody read them\n");
            state.push(note.into_bytes());
        }
        state.push(bytes.to_vec());
        self.changed.notify_all();
    }

    fn flush(&self) {
        let mut state = self.lock();
        while !(state.broken || state.is_stalled() || (state.pending.is_empty() && !state.writing)) {
            let waited = self.changed.wait_timeout(state, Duration::from_millis(200));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What to write next; None once there will be nothing any more.
    fn next(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if let Some(bytes) = state.pending.pop_front() {
                state.writing = true;
                return Some(bytes);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn written(&self, broken: bool) {
        let mut state = self.lock();
        state.writing = false;
        state.broken |= broken;
        if state.broken {
            state.pending.clear();
        }
        state.bytes = state.pending.iter().map(Vec::len).sum();
        state.waiting_since = (!state.pending.is_empty()).then(Instant::now);
        self.changed.notify_all();
    }
}

impl State {
    fn push(&mut self, bytes: Vec<u8>) {
        self.waiting_since.get_or_insert_with(Instant::now);
        self.bytes += bytes.len();
        self.pending.push_back(bytes);
    }

    fn is_stalled(&self) -> bool {
        self.waiting_since.is_some_and(|since| since.elapsed() >= STALL)
    }
}

/// The last lines of a log, as a terminal would leave them: a carriage return starts its line over. Lines that are
/// messages to Nix (`@nix {…}`) are left out.
#[derive(Default)]
pub(crate) struct Tail {
    lines: VecDeque<Vec<u8>>,
    current: Vec<u8>,
    return_pending: bool,
}

impl Tail {
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' {
                self.return_pending = false;
                self.end_line();
                continue;
            }
            if std::mem::take(&mut self.return_pending) {
                self.current.clear();
            }
            match byte {
                b'\r' => self.return_pending = true,
                _ if self.current.len() < MAX_TAIL_LINE => self.current.push(*byte),
                _ => {}
            }
        }
    }

    pub(crate) fn finish(mut self) -> Vec<String> {
        if !self.current.is_empty() {
            self.end_line();
        }
        self.lines.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.current);
        if line.starts_with(b"@nix {") {
            return;
        }
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::mpsc;

    use super::*;

    /// Says when it was given something, and waits to be allowed to take it.
    struct Gate {
        arrived: mpsc::Sender<usize>,
        open: mpsc::Receiver<()>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
            self.arrived.send(bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            self.open.recv().map_err(gone)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_reader_is_waited_for() {
        let ((arrived, arrivals), (open, gate)) = (mpsc::channel(), mpsc::channel());
        let log = Log::to(Gate { arrived, open: gate });
        log.write(b"first");
        assert_eq!(arrivals.recv().unwrap(), 5);
        log.write(&vec![0; MAX_PENDING]);
        assert!(!log.has_room());
        open.send(()).unwrap();
        assert_eq!(arrivals.recv().unwrap(), MAX_PENDING);
        open.send(()).unwrap();
        log.flush();
        assert!(log.has_room());
    }

    #[test]
    fn a_reader_that_is_gone_is_not() {
        let ((arrived, arrivals), (open, gate)) = (mpsc::channel(), mpsc::channel());
        let log = Log::to(Gate { arrived, open: gate });
        log.write(&vec![0; MAX_PENDING]);
        arrivals.recv().unwrap();
        drop(open);
        log.flush();
        log.write(&vec![0; MAX_PENDING]);
        assert!(log.has_room());
    }

    #[test]
    fn a_stalled_reader_loses_log() {
        let ((arrived, arrivals), (_open, gate)) = (mpsc::channel(), mpsc::channel());
        let log = Log::to(Gate { arrived, open: gate });
        log.write(b"first");
        arrivals.recv().unwrap();
        log.write(&vec![0; MAX_PENDING]);
        log.outlets[0].shared.lock().waiting_since = Some(Instant::now().checked_sub(STALL).unwrap());
        assert!(log.has_room());
        log.write(b"lost");
        assert_eq!(log.outlets[0].shared.lock().dropped, 4);
        log.flush();
    }

    #[test]
    fn the_tail_is_what_a_terminal_shows() {
        let mut tail = Tail::default();
        tail.write(b"a\r\nprogress 1\rprogress 2\n@nix {\"action\":\"msg\"}\nend");
        assert_eq!(tail.finish(), ["a", "progress 2", "end"]);
        let mut tail = Tail::default();
        (0..100).for_each(|i| tail.write(format!("{i}\n").as_bytes()));
        let lines = tail.finish();
        assert_eq!((lines.len(), lines[0].as_str(), lines[24].as_str()), (25, "75", "99"));
    }
}
