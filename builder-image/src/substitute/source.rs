//! One cache, and how it has behaved: one that does not answer is left alone for a while, and one that gave wrong bytes is
//! asked after all others.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_cache::{Cache, Error, Guarded, Memory, Recalled};
use drover_nix::{NarInfo, StorePath};

use super::complaints::{Complaints, Kind};

/// Failures in a row that are one too many, where the cache has been reached at least.
const MOST_FAILURES: u32 = 3;
/// How long a cache that cannot be asked is left alone.
const REST: Duration = Duration::from_secs(60);
/// Paths that came wrong, after which nothing more is tried.
const MOST_WRONG: u32 = 3;
/// How long such a cache is left alone.
const SET_ASIDE: Duration = Duration::from_secs(3600);

/// Shared by all sessions.
pub(super) struct Source {
    cache: Guarded,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    failures: u32,
    wrong: u32,
    rests_until: Option<Instant>,
}

impl Source {
    /// `url` says what kind of cache it is.
    pub(super) fn new(cache: Arc<dyn Cache>, url: &str) -> Self {
        Self { cache: Guarded::new(cache, Memory::of(url)), state: Mutex::default() }
    }

    pub(super) fn cache(&self) -> &dyn Cache {
        &self.cache
    }

    /// What it says about a path. None if it does not have it, is not believed, cannot be asked or is left alone.
    pub(super) fn narinfo(&self, path: &StorePath, complaints: &Complaints<'_>) -> Option<NarInfo> {
        if self.rests() {
            return None;
        }
        if let Recalled::Has(narinfo) = self.cache.recall(path) {
            return Some(*narinfo);
        }
        match self.cache.narinfo(path) {
            Ok(found) => {
                self.works();
                found
            }
            Err(error @ Error::Untrusted { .. }) => {
                complaints.say(&self.cache.url(), Kind::Untrusted, &error.to_string());
                None
            }
            // Which was said when it happened.
            Err(Error::SetAside { .. }) => None,
            Err(error) => {
                self.failed(&error, complaints);
                None
            }
        }
    }

    /// Whether others are to be asked first.
    pub(super) fn is_doubtful(&self, path: &StorePath) -> bool {
        matches!(self.cache.recall(path), Recalled::AskedLast)
    }

    /// It answers.
    pub(super) fn works(&self) {
        self.lock().failures = 0;
    }

    /// It did not do what it should, and may later.
    pub(super) fn failed(&self, error: &Error, complaints: &Complaints<'_>) {
        let mut state = self.lock();
        state.failures += 1;
        // Where nothing answers, each further question takes as long as the first.
        if matches!(error, Error::Request { .. }) || state.failures >= MOST_FAILURES {
            state.rests_until = Some(Instant::now() + REST);
        }
        drop(state);
        complaints.say(&self.cache.url(), Kind::Unreachable, &error.to_string());
    }

    /// It gave something else than it should.
    pub(super) fn set_aside(&self, path: &StorePath, why: &str, complaints: &Complaints<'_>) {
        self.cache.set_aside(path, why);
        let mut state = self.lock();
        state.wrong += 1;
        if state.wrong >= MOST_WRONG {
            state.rests_until = Some(Instant::now() + SET_ASIDE);
        }
        drop(state);
        let url = self.cache.url();
        complaints.say(&url, Kind::Wrong, &format!("{url} delivered {path} wrong, and is set aside: {why}"));
    }

    /// Whether it is left alone.
    pub(super) fn rests(&self) -> bool {
        self.lock().rests_until.is_some_and(|until| Instant::now() < until)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each value is whole by itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cache.url())
    }
}
