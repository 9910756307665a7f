//! Threads that fetch what a [`Plan`] lists, several paths at a time, each registered once all that it refers to is.
//!
//! Paths are begun in the plan's order, in which references come first. So whoever waits for a path's lock waits for a path
//! that its holder can complete: what that one refers to was begun before it, by its holder, too.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_nix::nar::Plain;
use drover_nix::{NarInfo, StorePath};
use drover_store::{Claim, Claimed, LocalStore};

use super::complaints::Complaints;
use super::paced::Paced;
use super::search::{Plan, by_preference};
use super::source::Source;
use crate::build::cancel::Cancel;
use crate::error::Error;

/// Paths that are fetched at once. Each takes up to 65 MiB for what `xz -9` has made, and 10 MiB as a rule.
const PARALLEL: usize = 6;
/// Paths that are unpacked and wait for what they refer to: each holds a file descriptor.
const MOST_WAITING: usize = 128;
/// How often a path is asked for again that somebody else is making.
const RETRY: Duration = Duration::from_millis(50);

/// Fetches as far as possible. The error is the store's: nothing more can be put there.
pub(super) fn fetch(
    store: &LocalStore,
    sources: &[Source],
    plan: &Plan,
    cancel: &Cancel,
    complaints: &Complaints<'_>,
) -> Result<(), Error> {
    let ends = plan.0.iter().map(|(_, narinfo)| (narinfo.info.path.clone(), None)).collect();
    let state = State { ends, ..State::default() };
    let crew =
        Crew { store, sources, plan, cancel, complaints, state: Mutex::new(state), changed: Condvar::new() };
    drover_store::in_parallel(PARALLEL.min(plan.0.len()), || crew.work());
    match crew.state.into_inner().unwrap_or_else(PoisonError::into_inner).error {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

struct Crew<'a> {
    store: &'a LocalStore,
    sources: &'a [Source],
    plan: &'a Plan,
    cancel: &'a Cancel,
    complaints: &'a Complaints<'a>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Of the plan's next path that nobody has begun.
    next: usize,
    /// Paths in the hands of a thread.
    busy: usize,
    /// What became of each path of the plan.
    ends: BTreeMap<StorePath, Option<End>>,
    /// Unpacked, with their place in the plan.
    waiting: Vec<(usize, Claim)>,
    /// Ends everything.
    error: Option<Error>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Valid,
    Failed,
}

/// What is wrong with a NAR.
enum Blame {
    /// The cache broke off.
    Cache(drover_cache::Error),
    /// The cache gave something else.
    Content,
    Store,
}

impl Crew<'_> {
    fn work(&self) {
        while let Some(index) = self.begin() {
            let fetched = self.fetch_one(index);
            let mut state = self.lock();
            state.busy -= 1;
            let path = &self.plan.0[index].1.info.path;
            match fetched {
                Ok(Fetched::Unpacked(claim)) => state.waiting.push((index, *claim)),
                Ok(Fetched::Valid) => state.end(path, End::Valid),
                Ok(Fetched::Failed) => state.end(path, End::Failed),
                Err(error) => {
                    state.end(path, End::Failed);
                    state.error.get_or_insert(error);
                }
            }
            self.register_ready(&mut state);
            self.changed.notify_all();
        }
    }

    /// The next path to fetch. None when there is none, or none is wanted.
    fn begin(&self) -> Option<usize> {
        let mut state = self.lock();
        loop {
            if state.error.is_some() || self.cancel.is_cancelled() {
                return None;
            }
            let index = state.next;
            let (_, narinfo) = self.plan.0.get(index)?;
            // Those that wait do so for one that is busy.
            if state.busy > 0 && state.busy + state.waiting.len() >= MOST_WAITING {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.next += 1;
            if state.has_failed(narinfo) {
                state.end(&narinfo.info.path, End::Failed);
                continue;
            }
            state.busy += 1;
            return Some(index);
        }
    }

    /// From the source that the plan names or, if that fails or has come into doubt meanwhile, from another one that says
    /// the same of the path's references.
    fn fetch_one(&self, index: usize) -> Result<Fetched, Error> {
        let (first, planned) = &self.plan.0[index];
        let path = &planned.info.path;
        // Before anything is asked for: whoever has the lock may be fetching it.
        let mut claim = loop {
            match self.store.claim(path)? {
                Claimed::Valid => return Ok(Fetched::Valid),
                Claimed::Ours(claim) => break claim,
                Claimed::Busy => {
                    if self.cancel.comes_within(RETRY).map_err(Error::system("wait for a path's lock"))? {
                        return Ok(Fetched::Failed);
                    }
                }
            }
        };
        for index in by_preference(self.sources, path, Some(*first)) {
            if self.cancel.is_cancelled() {
                break;
            }
            let source = &self.sources[index];
            let narinfo = match index == *first && !source.rests() {
                true => Some(planned.clone()),
                false => source.narinfo(path, self.complaints),
            };
            let same = narinfo.filter(|narinfo| narinfo.info.references == planned.info.references);
            if let Some(narinfo) = same
                && self.unpack(&mut claim, source, &narinfo)?
            {
                return Ok(Fetched::Unpacked(claim));
            }
        }
        Ok(Fetched::Failed)
    }

    /// False if the source is at fault. What is in place then is the same as before.
    fn unpack(&self, claim: &mut Claim, source: &Source, narinfo: &NarInfo) -> Result<bool, Error> {
        let nar = match source.cache().nar(narinfo) {
            Ok(nar) => nar,
            Err(error) => {
                source.failed(&error, self.complaints);
                return Ok(false);
            }
        };
        // The store compares hash, size and content address with what the source says.
        let mut nar = Paced::new(nar, self.cancel);
        let Err(error) = claim.unpack(&narinfo.info, &mut Plain(&mut nar)) else {
            source.works();
            return Ok(true);
        };
        if self.cancel.is_cancelled() {
            return Ok(false);
        }
        match blame(source, &error) {
            Blame::Cache(error) => source.failed(&error, self.complaints),
            Blame::Content => source.set_aside(claim.path(), &error.to_string(), self.complaints),
            Blame::Store => return Err(error.into()),
        }
        Ok(false)
    }

    /// Makes valid what waits for nothing any more, and drops what waits for something that will never be.
    fn register_ready(&self, state: &mut State) {
        loop {
            let mut ready = Vec::new();
            let mut waiting = Vec::new();
            for (index, claim) in std::mem::take(&mut state.waiting) {
                let (_, narinfo) = &self.plan.0[index];
                if state.has_failed(narinfo) || state.error.is_some() {
                    state.end(&narinfo.info.path, End::Failed);
                } else if state.is_complete(narinfo) {
                    ready.push(claim);
                } else {
                    waiting.push((index, claim));
                }
            }
            state.waiting = waiting;
            if ready.is_empty() {
                return;
            }
            let paths: Vec<StorePath> = ready.iter().map(|claim| claim.path().clone()).collect();
            let registered = self.store.register_claims(ready);
            let end = if registered.is_ok() { End::Valid } else { End::Failed };
            paths.iter().for_each(|path| state.end(path, end));
            if let Err(error) = registered {
                state.error.get_or_insert_with(|| error.into());
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the program.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Fetched {
    /// Somebody else has made it so.
    Valid,
    Unpacked(Box<Claim>),
    Failed,
}

impl State {
    fn end(&mut self, path: &StorePath, end: End) {
        self.ends.insert(path.clone(), Some(end));
    }

    /// Whether something that the path refers to will not be valid.
    fn has_failed(&self, narinfo: &NarInfo) -> bool {
        narinfo.info.other_references().any(|reference| self.ends.get(reference) == Some(&Some(End::Failed)))
    }

    /// Whether all that the path refers to is valid: what is not in the plan was before.
    fn is_complete(&self, narinfo: &NarInfo) -> bool {
        let is_valid =
            |reference: &StorePath| matches!(self.ends.get(reference), None | Some(Some(End::Valid)));
        narinfo.info.other_references().all(is_valid)
    }
}

/// Whose fault it is that an archive could not be unpacked.
fn blame(source: &Source, error: &drover_store::Error) -> Blame {
    use drover_store::Error as E;
    match error {
        E::Nar { source: drover_nix::Error::NarIo { source: broken, .. }, .. }
        | E::Archive { source: drover_nix::Error::NarIo { source: broken, .. }, .. } => {
            if broke_off(broken) {
                let why = io::Error::new(broken.kind(), broken.to_string());
                Blame::Cache(drover_cache::Error::Read { url: source.cache().url(), source: why })
            } else {
                Blame::Content
            }
        }
        E::Nar { .. }
        | E::Archive { .. }
        // What no store can hold.
        | E::BadFile { .. }
        | E::HashMismatch { .. }
        | E::SizeMismatch { .. }
        | E::ContentAddress { .. } => Blame::Content,
        _ => Blame::Store,
    }
}

/// Whether a stream ended before its time, rather than with bytes that make no sense: those do not decompress.
fn broke_off(error: &io::Error) -> bool {
    let of_client = |inner: &(dyn std::error::Error + Send + Sync + 'static)| {
        inner.is::<reqwest::Error>() || inner.is::<drover_cache::Error>()
    };
    error.get_ref().is_some_and(of_client)
        || matches!(
            error.kind(),
            io::ErrorKind::TimedOut | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted
        )
}
