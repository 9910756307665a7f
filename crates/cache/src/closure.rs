//! Closures by references: what must be copied with a path.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use drover_nix::{NarInfo, StorePath};

use crate::{Cache, Error, find};

/// Requests that are in flight at a time: a cache far away answers in a tenth of a second, and there may be thousands.
const PARALLEL: usize = 16;

/// A closure, as far as the caches have it.
#[derive(Default)]
pub struct Closure {
    /// Each path with the index of the cache that has it and what that one says.
    pub found: BTreeMap<StorePath, (usize, NarInfo)>,
    /// Paths that no cache has.
    pub missing: BTreeSet<StorePath>,
}

/// `roots` and everything that they refer to, directly or not. The first cache that has a path is the one that counts;
/// a cache that fails counts only if no other has the path.
pub fn closure(
    caches: &[Arc<dyn Cache>],
    roots: impl IntoIterator<Item = StorePath>,
) -> Result<Closure, Error> {
    // No closure has so many, and a map could not hold them.
    closure_where(caches, roots, &|_| true, usize::MAX).map(Option::unwrap_or_default)
}

/// The same without what is not `wanted`, nor what only that refers to. None where there would be more than `limit` paths.
pub fn closure_where(
    caches: &[Arc<dyn Cache>],
    roots: impl IntoIterator<Item = StorePath>,
    wanted: &(dyn Fn(&StorePath) -> bool + Sync),
    limit: usize,
) -> Result<Option<Closure>, Error> {
    let mut seen = BTreeSet::new();
    let todo = roots.into_iter().filter(|root| seen.insert(root.clone())).collect();
    let state = Mutex::new(State { todo, seen, ..State::default() });
    let work = Work { state, changed: Condvar::new(), wanted, limit };
    drover_store::in_parallel(PARALLEL, || work.run(caches));
    let state = work.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    match state.error {
        Some(error) => Err(error),
        None if state.seen.len() > limit => Ok(None),
        None => Ok(Some(state.closure)),
    }
}

struct Work<'a> {
    state: Mutex<State>,
    changed: Condvar,
    wanted: &'a (dyn Fn(&StorePath) -> bool + Sync),
    limit: usize,
}

#[derive(Default)]
struct State {
    todo: VecDeque<StorePath>,
    seen: BTreeSet<StorePath>,
    /// Paths that a thread is asking about.
    asking: usize,
    closure: Closure,
    error: Option<Error>,
}

impl Work<'_> {
    fn run(&self, caches: &[Arc<dyn Cache>]) {
        while let Some(path) = self.next() {
            let found = find(caches, &path);
            let further = match &found {
                Ok(Some((_, narinfo))) => narinfo.info.references.clone(),
                _ => BTreeSet::new(),
            };
            let further: Vec<_> = further.into_iter().filter(|path| (self.wanted)(path)).collect();
            let mut state = self.lock();
            state.asking -= 1;
            match found {
                Ok(Some((cache, narinfo))) => {
                    for reference in further {
                        if state.seen.insert(reference.clone()) {
                            state.todo.push_back(reference);
                        }
                    }
                    state.closure.found.insert(path, (cache, narinfo));
                }
                Ok(None) => {
                    state.closure.missing.insert(path);
                }
                Err(error) => {
                    state.error.get_or_insert(error);
                }
            }
            self.changed.notify_all();
        }
    }

    /// None when there is nothing to do and nothing can come any more.
    fn next(&self) -> Option<StorePath> {
        let mut state = self.lock();
        loop {
            if state.error.is_some() || state.seen.len() > self.limit {
                return None;
            }
            if let Some(path) = state.todo.pop_front() {
                state.asking += 1;
                return Some(path);
            }
            if state.asking == 0 {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
