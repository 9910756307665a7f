//! Where a build's output goes: to a reader that may be slow, stalled or gone, none of which may hold up a build for
//! ever (NixOS/nix#16437). A slow reader slows the build down; one that takes nothing for [`STALL`] loses log, with a
//! note of how much. [`BuildLog`] is one build's, with any number of readers; [`Tail`] is the last lines of it.

mod broadcast;
mod history;
mod tail;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use self::broadcast::BuildLog;
pub(crate) use self::tail::Tail;

/// How much log may wait for its reader.
const MAX_PENDING: usize = 1 << 20;
/// Pieces that wait are joined up to this: so much has to be taken for a reader to count as alive.
const MAX_PIECE: usize = 64 << 10;
/// How long a reader may take nothing before log is dropped.
const STALL: Duration = Duration::from_secs(10);
/// How long the end of a session waits for its log's reader, who was given time during every build.
const END_FLUSH: Duration = Duration::from_millis(100);
/// How soon it is noticed that nobody waits for the log any more.
const GIVE_UP_INTERVAL: Duration = Duration::from_millis(20);

/// A handle on the log. Clones write to the same places.
#[derive(Clone)]
pub(crate) struct Log {
    outlets: Vec<Outlet>,
}

/// One reader. The last outlet that is dropped ends its thread.
struct Outlet {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pending: VecDeque<Piece>,
    /// Of what waits, in memory.
    bytes: usize,
    writing: bool,
    dropped: u64,
    /// When the reader last took something; None while nothing waits.
    waiting_since: Option<Instant>,
    broken: bool,
    /// Outlets that there are. Counted here, under the lock, and not by their number of references: of two that are dropped
    /// at once each would find the other still there, and the thread never end.
    outlets: usize,
}

/// Something that waits for its reader.
#[derive(Clone)]
enum Piece {
    Bytes(Vec<u8>),
    /// These bytes of a file.
    Spooled {
        file: Arc<File>,
        from: u64,
        to: u64,
    },
}

impl Log {
    /// Writes to `sink` from a thread of its own, which may block for as long as it likes. The error is that of making it.
    pub(crate) fn to(mut sink: impl Write + Send + 'static) -> io::Result<Self> {
        let state = State { outlets: 1, ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let writer = Arc::clone(&shared);
        std::thread::Builder::new().name("log".into()).spawn(move || {
            while let Some(bytes) = writer.next() {
                let result = sink.write_all(&bytes).and_then(|()| sink.flush());
                writer.written(result.is_err());
            }
        })?;
        Ok(Self { outlets: vec![Outlet { shared }] })
    }

    /// A log that goes to the readers of both.
    pub(crate) fn and(mut self, other: &Self) -> Self {
        self.outlets.extend(other.outlets.iter().cloned());
        self
    }

    /// Takes the bytes, or drops them for a reader that is gone or stalled. Never blocks.
    fn write(&self, bytes: &[u8]) {
        self.outlets.iter().for_each(|outlet| outlet.shared.write(bytes));
    }

    /// A line of our own.
    pub(crate) fn note(&self, line: &str) {
        self.write(note(line).as_bytes());
    }

    /// Waits until everything is written, the readers have taken nothing for a while, or `given_up`.
    pub(crate) fn flush_until(&self, given_up: &dyn Fn() -> bool) {
        self.outlets.iter().for_each(|outlet| outlet.flush(given_up));
    }

    /// Waits until everything is written, but not for long: the session is over.
    pub(crate) fn flush(&self) {
        let begin = Instant::now();
        self.flush_until(&|| begin.elapsed() >= END_FLUSH);
    }
}

fn note(line: &str) -> String {
    format!("drover-builder: {line}\n")
}

impl Outlet {
    /// Whether more may be written without waiting. False only while a reader is slow, never for long.
    fn has_room(&self) -> bool {
        let state = self.shared.lock();
        state.bytes < MAX_PENDING || state.broken || state.is_stalled()
    }

    /// Waits until everything is written, the reader has taken nothing for a while, or `given_up`.
    fn flush(&self, given_up: &dyn Fn() -> bool) {
        let mut state = self.shared.lock();
        while !(state.is_settled() || given_up()) {
            let waited = self.shared.changed.wait_timeout(state, GIVE_UP_INTERVAL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Clone for Outlet {
    fn clone(&self) -> Self {
        self.shared.lock().outlets += 1;
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.outlets -= 1;
        // Nobody can write any more.
        if state.outlets == 0 {
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

    /// Takes what was kept for a reader that comes late.
    fn put(&self, pieces: Vec<Piece>) {
        let mut state = self.lock();
        for piece in pieces {
            match piece {
                Piece::Bytes(bytes) if bytes.is_empty() => {}
                Piece::Spooled { from, to, .. } if from == to => {}
                Piece::Bytes(bytes) => state.push(bytes),
                spooled => {
                    state.waiting_since.get_or_insert_with(Instant::now);
                    state.pending.push_back(spooled);
                }
            }
        }
        self.changed.notify_all();
    }

    /// What to write next; None once there will be nothing any more.
    fn next(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if let Some(piece) = state.pending.pop_front() {
                state.writing = true;
                let (bytes, rest) = piece.split();
                if let Some(rest) = rest {
                    state.pending.push_front(rest);
                }
                return Some(bytes);
            }
            if state.outlets == 0 {
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
        state.bytes = state.pending.iter().map(Piece::in_memory).sum();
        state.waiting_since = (!state.pending.is_empty()).then(Instant::now);
        self.changed.notify_all();
    }
}

impl State {
    fn push(&mut self, bytes: Vec<u8>) {
        self.waiting_since.get_or_insert_with(Instant::now);
        self.bytes += bytes.len();
        match self.pending.back_mut() {
            // Builders write byte by byte if they like; what waits shall not be made of crumbs.
            Some(Piece::Bytes(last)) if last.len() + bytes.len() <= MAX_PIECE => last.extend(bytes),
            _ => self.pending.push_back(Piece::Bytes(bytes)),
        }
    }

    fn is_settled(&self) -> bool {
        self.broken || self.is_stalled() || (self.pending.is_empty() && !self.writing)
    }

    fn is_stalled(&self) -> bool {
        self.waiting_since.is_some_and(|since| since.elapsed() >= STALL)
    }
}

impl Piece {
    fn in_memory(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Spooled { .. } => 0,
        }
    }

    /// What to write now, and what is left for later.
    fn split(self) -> (Vec<u8>, Option<Self>) {
        match self {
            Self::Bytes(bytes) => (bytes, None),
            Self::Spooled { file, from, to } => {
                let mut bytes = vec![0; usize::try_from(to - from).unwrap_or(MAX_PIECE).min(MAX_PIECE)];
                let end = from + bytes.len() as u64;
                if let Err(error) = file.read_exact_at(&mut bytes, from) {
                    let line = note(&format!("this build's log cannot be read back: {error}"));
                    return (format!("\n{line}").into_bytes(), None);
                }
                (bytes, (end < to).then_some(Self::Spooled { file, from: end, to }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
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

    /// Says when its thread has ended.
    struct Ends(mpsc::Sender<()>);

    impl Write for Ends {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Drop for Ends {
        fn drop(&mut self) {
            let _nobody_asks = self.0.send(());
        }
    }

    #[test]
    fn a_reader_ends_with_its_last_two_outlets_at_once() {
        const ROUNDS: usize = 20_000;
        let (give, take) = mpsc::sync_channel::<(Log, Arc<std::sync::atomic::AtomicBool>)>(0);
        let other = std::thread::spawn(move || {
            for (log, go) in take {
                while !go.load(std::sync::atomic::Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
                drop(log);
            }
        });
        for round in 0..ROUNDS {
            let (ends, ended) = mpsc::channel();
            let log = Log::to(Ends(ends)).unwrap();
            let go = Arc::<std::sync::atomic::AtomicBool>::default();
            give.send((log.clone(), Arc::clone(&go))).unwrap();
            go.store(true, std::sync::atomic::Ordering::SeqCst);
            drop(log);
            assert_eq!(ended.recv_timeout(2 * STALL), Ok(()), "round {round}");
        }
        drop(give);
        other.join().unwrap();
    }

    #[test]
    fn who_reads_the_log_of_a_build_that_has_ended_is_let_go_of() {
        let build = BuildLog::new(&Log::to(io::sink()).unwrap(), None);
        build.write(b"text");
        build.end();
        let (ends, ended) = mpsc::channel();
        let late = Log::to(Ends(ends)).unwrap();
        build.join(&late);
        late.flush_until(&|| false);
        drop(late);
        assert_eq!(ended.recv_timeout(2 * STALL), Ok(()), "the build that is kept keeps its reader");
    }

    #[test]
    fn a_slow_reader_is_waited_for() {
        let ((arrived, arrivals), (open, gate)) = (mpsc::channel(), mpsc::channel());
        let log = Log::to(Gate { arrived, open: gate }).unwrap();
        log.write(b"first");
        assert_eq!(arrivals.recv().unwrap(), 5);
        log.write(&vec![0; MAX_PENDING]);
        assert!(!log.outlets[0].has_room());
        open.send(()).unwrap();
        assert_eq!(arrivals.recv().unwrap(), MAX_PENDING);
        open.send(()).unwrap();
        log.flush();
        assert!(log.outlets[0].has_room());
    }

    #[test]
    fn a_reader_that_is_gone_is_not() {
        let ((arrived, arrivals), (open, gate)) = (mpsc::channel(), mpsc::channel());
        let log = Log::to(Gate { arrived, open: gate }).unwrap();
        log.write(&vec![0; MAX_PENDING]);
        arrivals.recv().unwrap();
        drop(open);
        log.flush();
        log.write(&vec![0; MAX_PENDING]);
        assert!(log.outlets[0].has_room());
    }

    #[test]
    fn a_stalled_reader_loses_log() {
        let ((arrived, arrivals), (_open, gate)) = (mpsc::channel(), mpsc::channel());
        let log = Log::to(Gate { arrived, open: gate }).unwrap();
        log.write(b"first");
        arrivals.recv().unwrap();
        log.write(&vec![0; MAX_PENDING]);
        log.outlets[0].shared.lock().waiting_since = Some(Instant::now().checked_sub(STALL).unwrap());
        assert!(log.outlets[0].has_room());
        log.write(b"lost");
        assert_eq!(log.outlets[0].shared.lock().dropped, 4);
        log.flush();
    }
}
