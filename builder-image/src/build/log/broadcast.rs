//! The log of one build, for every session that wants the build: the first one's, and those that join it later, who are
//! shown what there was before as far as it is kept.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Log, Outlet, note};

/// How much of a build's log is kept for who joins later.
const MAX_HISTORY: usize = 256 << 10;

pub(crate) struct BuildLog {
    inner: Mutex<Inner>,
}

struct Inner {
    readers: Vec<Outlet>,
    history: VecDeque<u8>,
    cut: bool,
}

impl BuildLog {
    /// With a session's readers.
    pub(crate) fn new(log: &Log) -> Self {
        let readers = log.outlets.clone();
        Self { inner: Mutex::new(Inner { readers, history: VecDeque::new(), cut: false }) }
    }

    /// Adds a session's readers, as far as they are not there yet, and shows them what is kept.
    pub(crate) fn join(&self, log: &Log) {
        let mut inner = self.lock();
        for outlet in &log.outlets {
            if inner.readers.iter().any(|reader| Arc::ptr_eq(&reader.shared, &outlet.shared)) {
                continue;
            }
            if inner.cut {
                outlet.shared.write(note("the beginning of this build's log is not kept").as_bytes());
            }
            outlet.shared.write(inner.history.make_contiguous());
            inner.readers.push(outlet.clone());
        }
    }

    /// Whether more may be written without waiting. False only while a reader is slow, never for long.
    pub(crate) fn has_room(&self) -> bool {
        self.lock().readers.iter().all(Outlet::has_room)
    }

    /// Takes the bytes, or drops them for readers that are gone or stalled. Never blocks.
    pub(crate) fn write(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        inner.readers.iter().for_each(|reader| reader.shared.write(bytes));
        let kept = bytes.get(bytes.len().saturating_sub(MAX_HISTORY)..).unwrap_or(bytes);
        let excess = (inner.history.len() + kept.len()).saturating_sub(MAX_HISTORY);
        inner.cut |= excess > 0 || kept.len() < bytes.len();
        inner.history.drain(..excess);
        inner.history.extend(kept);
    }

    /// A line of our own.
    pub(crate) fn note(&self, line: &str) {
        self.write(note(line).as_bytes());
    }

    /// Waits until everything is written, the readers have taken nothing for a while, or `given_up`.
    pub(crate) fn flush(&self, given_up: &dyn Fn() -> bool) {
        let readers = self.lock().readers.clone();
        readers.iter().for_each(|reader| reader.flush(given_up));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Whole between any two statements, so a panic elsewhere spoils nothing.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Kept {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    #[test]
    fn who_joins_sees_the_log_from_where_it_stands() {
        let (first, second) = (Kept::default(), Kept::default());
        let log = Log::to(first.clone());
        let build = BuildLog::new(&log);
        build.write(b"before\n");
        let joining = Log::to(second.clone()).and(&log);
        build.join(&joining);
        build.write(b"after\n");
        build.flush(&|| false);
        assert_eq!((first.text().as_str(), second.text().as_str()), ("before\nafter\n", "before\nafter\n"));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let build = BuildLog::new(&Log::to(io::sink()));
        build.write(&vec![b'a'; MAX_HISTORY - 1]);
        build.write(b"bc");
        let kept = Kept::default();
        build.join(&Log::to(kept.clone()));
        build.flush(&|| false);
        let text = kept.text();
        let (first, rest) = text.split_once('\n').unwrap();
        assert!(first.contains("not kept"));
        assert!(rest.len() == MAX_HISTORY && rest.ends_with("abc"));
        build.write(&vec![b'd'; 2 * MAX_HISTORY]);
        assert_eq!(build.lock().history.len(), MAX_HISTORY);
    }
}
