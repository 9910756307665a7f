//! The log of one build, for every session that wants the build: the first one's, and those that join it later, who are
//! shown what there was before as far as it is kept.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::history::History;
use super::{Log, Outlet, Shared, note};

pub(crate) struct BuildLog {
    inner: Mutex<Inner>,
}

struct Inner {
    readers: Vec<Outlet>,
    /// Those that had all of it when it ended, and need not be shown it again.
    had: Vec<Weak<Shared>>,
    /// Nothing comes any more.
    ended: bool,
    history: History,
}

impl BuildLog {
    /// With a session's readers. In `spool` more of it is kept than memory has room for.
    pub(crate) fn new(log: &Log, spool: Option<File>) -> Self {
        let (readers, had, ended) = (log.outlets.clone(), Vec::new(), false);
        Self { inner: Mutex::new(Inner { readers, had, ended, history: History::new(spool) }) }
    }

    /// Adds a session's readers, as far as they are not there yet, and shows them what is kept.
    pub(crate) fn join(&self, log: &Log) {
        let mut inner = self.lock();
        for outlet in &log.outlets {
            let reads = inner.readers.iter().any(|reader| Arc::ptr_eq(&reader.shared, &outlet.shared));
            let weak = Arc::downgrade(&outlet.shared);
            if reads || inner.had.iter().any(|had| had.ptr_eq(&weak)) {
                continue;
            }
            outlet.shared.put(inner.history.pieces());
            if inner.ended {
                // Those that are gone need no remembering: a build's end may be asked for very often.
                inner.had.retain(|had| had.strong_count() > 0);
                inner.had.push(weak);
            } else {
                inner.readers.push(outlet.clone());
            }
        }
    }

    /// Nothing comes any more: lets go of the readers, who may be gone long before the log is.
    pub(crate) fn end(&self) {
        let mut inner = self.lock();
        inner.ended = true;
        inner.had = inner.readers.drain(..).map(|reader| Arc::downgrade(&reader.shared)).collect();
    }

    /// Whether more may be written without waiting. False only while a reader is slow, never for long.
    pub(crate) fn has_room(&self) -> bool {
        self.lock().readers.iter().all(Outlet::has_room)
    }

    /// Takes the bytes, or drops them for readers that are gone or stalled. Never blocks.
    pub(crate) fn write(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        inner.readers.iter().for_each(|reader| reader.shared.write(bytes));
        inner.history.write(bytes);
    }

    /// A line of our own.
    pub(crate) fn note(&self, line: &str) {
        self.write(note(line).as_bytes());
    }

    /// Bytes on the disk.
    pub(crate) fn spooled(&self) -> u64 {
        self.lock().history.spooled()
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
        for spool in [None, Some(tempfile::tempfile().unwrap())] {
            let (first, second) = (Kept::default(), Kept::default());
            let log = Log::to(first.clone()).unwrap();
            let build = BuildLog::new(&log, spool);
            build.write(b"before\n");
            let joining = Log::to(second.clone()).unwrap().and(&log);
            build.join(&joining);
            build.write(b"after\n");
            joining.flush_until(&|| false);
            assert_eq!(
                (first.text().as_str(), second.text().as_str()),
                ("before\nafter\n", "before\nafter\n")
            );
        }
    }

    #[test]
    fn who_comes_after_its_end_sees_it_and_who_was_there_does_not_see_it_again() {
        let (first, second) = (Kept::default(), Kept::default());
        let log = Log::to(first.clone()).unwrap();
        let build = BuildLog::new(&log, Some(tempfile::tempfile().unwrap()));
        // More than is read of a file at once.
        let text = "all of it\n".repeat(20_000);
        build.write(text.as_bytes());
        build.end();
        assert!(build.lock().readers.is_empty());
        let joining = Log::to(second.clone()).unwrap().and(&log);
        build.join(&joining);
        joining.flush_until(&|| false);
        assert!(first.text() == text && second.text() == text);
    }
}
