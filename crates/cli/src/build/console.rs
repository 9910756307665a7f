//! Standard error, shared by the log and the progress: on a terminal the progress is one line that stays below the log.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, PoisonError};

/// Back to the first column, and clear what is there.
const CLEAR: &[u8] = b"\r\x1b[K";
/// Longest progress line: one that wraps cannot be cleared.
const MAX_STATUS: usize = 78;

#[derive(Clone)]
pub(super) struct Console(Arc<Mutex<Inner>>);

struct Inner {
    progress: bool,
    is_terminal: bool,
    /// What stands on the terminal's last line.
    status: String,
}

impl Console {
    pub(super) fn new(progress: bool) -> Self {
        let is_terminal = progress && std::io::stderr().is_terminal();
        Self(Arc::new(Mutex::new(Inner { progress, is_terminal, status: String::new() })))
    }

    /// Whether there is a line that can be written over.
    pub(super) fn is_terminal(&self) -> bool {
        self.lock().is_terminal
    }

    /// A line of progress that stays.
    pub(super) fn line(&self, text: &str) {
        let mut inner = self.lock();
        if inner.progress {
            inner.write(format!("{text}\n").as_bytes());
        }
    }

    /// A line of progress that the next one replaces. Nothing where that cannot be done.
    pub(super) fn status(&self, text: &str) {
        let mut inner = self.lock();
        if inner.is_terminal {
            inner.status = text.chars().filter(|c| !c.is_control()).take(MAX_STATUS).collect();
            inner.write(b"");
        }
    }

    /// The log, as it comes. `bytes` ends with a newline.
    pub(super) fn log(&self, bytes: &[u8]) {
        self.lock().write(bytes);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A text that was cut short by a panic elsewhere is no reason to lose the rest.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Standard error has nobody to report its own failure to.
    fn write(&mut self, bytes: &[u8]) {
        let mut error = std::io::stderr().lock();
        if self.is_terminal {
            let _ = error.write_all(CLEAR);
        }
        let _ = error.write_all(bytes);
        if self.is_terminal {
            let _ = error.write_all(self.status.as_bytes());
        }
        let _ = error.flush();
    }
}
