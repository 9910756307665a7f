//! What goes wrong with caches, said once: whoever asked has other ways, and the log is the build's.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use crate::build::log::Log;

/// Of one request to fetch.
pub(super) struct Complaints<'a> {
    log: &'a Log,
    said: Mutex<BTreeSet<(String, Kind)>>,
}

/// Of each kind one line a cache.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Kind {
    /// It cannot be asked.
    Unreachable,
    /// It says something that nothing shows to be right.
    Untrusted,
    /// It gave bytes that are not what they should be.
    Wrong,
}

impl<'a> Complaints<'a> {
    pub(super) fn new(log: &'a Log) -> Self {
        Self { log, said: Mutex::default() }
    }

    /// About the cache at `url`.
    pub(super) fn say(&self, url: &str, kind: Kind, line: &str) {
        // Each change is one insertion: a panic leaves it whole.
        let new = self.said.lock().unwrap_or_else(PoisonError::into_inner).insert((url.to_owned(), kind));
        if new {
            self.log.note(line);
        }
    }
}
