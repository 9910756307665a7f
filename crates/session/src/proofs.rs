//! Proofs of output paths from the closures of `.drv` files in caches, shared by all sessions.
//!
//! Who holds the lock reads nothing. A proof first asks which files are below, by the references that narinfo files state,
//! then reads and proves them from the bottom up, several at a time, and keeps of each a hash and its paths. A file counts
//! because it leads to its own name, whichever cache it is from and whether or not anybody signed it; what a cache says
//! about references decides only what is read. Two proofs of one closure do not read it twice. Nothing is kept on disk: a
//! process that starts again proves again.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use drover_cache::{Cache, Closure, closure_where, find};
use drover_nix::derivation::aterm;
use drover_nix::derivation::proof::{DrvFile, MAX_DERIVATIONS, ProofError, Proven};
use drover_nix::order::references_first;
use drover_nix::{BasicDerivation, NarInfo, StoreDir, StorePath};

/// Files that are read at a time.
const PARALLEL: usize = 16;
/// Files that are in memory at a time.
const CHUNK: usize = 64;
/// How often a proof looks below again, because a cache did not say all of what its files refer to.
const MAX_ROUNDS: usize = 64;

type Error = ProofError<Box<drover_cache::Error>>;

/// What was proven so far.
#[derive(Default)]
pub struct Proofs {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    proven: Proven,
    /// Derivations that a thread is about to prove.
    roots: HashSet<StorePath>,
    /// Files that a thread reads.
    reading: HashSet<StorePath>,
    /// Files that were read and not taken in yet.
    read: HashMap<StorePath, Arc<DrvFile>>,
}

/// Why there is no proof of a derivation.
enum Failed {
    Itself(Error),
    /// This input of it has none.
    Below(StorePath),
}

impl Proofs {
    /// Checks that a request is what `drv_path` says, whose paths are proven by its closure in the caches.
    pub(crate) fn entitle(
        &self,
        dir: &StoreDir,
        caches: &[Arc<dyn Cache>],
        drv_path: &StorePath,
        request: &BasicDerivation,
    ) -> Result<(), Error> {
        // One more try for what others made it forget meanwhile.
        for _ in 0..2 {
            self.prove(dir, caches, drv_path)?;
            let mut state = self.lock();
            if state.proven.is_ready(drv_path) {
                return state
                    .proven
                    .entitles(dir, drv_path, request, &BTreeSet::new())
                    .map_err(ProofError::widen);
            }
        }
        Err(ProofError::Missing(drv_path.clone()))
    }

    /// Takes in `root` and all that is below it, as far as that is not known.
    pub fn prove(&self, dir: &StoreDir, caches: &[Arc<dyn Cache>], root: &StorePath) -> Result<(), Error> {
        let _turn = self.turn(root);
        self.lock().proven.begin();
        let mut roots = BTreeSet::from([root.clone()]);
        for _ in 0..MAX_ROUNDS {
            if self.lock().proven.is_ready(root) {
                return Ok(());
            }
            let wanted =
                |path: &StorePath| path.is_derivation() && (path == root || !self.lock().proven.knows(path));
            let below = closure_where(caches, roots.clone(), &wanted, MAX_DERIVATIONS)
                .map_err(|source| ProofError::Read { drv: root.clone(), source: Box::new(source) })?
                .ok_or_else(|| ProofError::TooMany(root.clone()))?;
            let mut round = Round {
                proofs: self,
                dir,
                caches,
                root,
                failed: BTreeMap::new(),
                unforeseen: BTreeSet::new(),
                early: BTreeMap::new(),
            };
            round.take_in(below);
            roots.extend(std::mem::take(&mut round.unforeseen));
            if let Some(error) = round.verdict() {
                return Err(error);
            }
        }
        match self.lock().proven.is_ready(root) {
            true => Ok(()),
            false => Err(ProofError::Missing(root.clone())),
        }
    }

    /// Waits while another thread proves the same.
    fn turn(&self, root: &StorePath) -> Turn<'_> {
        let mut state = self.lock();
        while !state.roots.insert(root.clone()) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Turn { proofs: self, root: root.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Only ever extended by what is true, so what a panicking thread left is good.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Turn<'a> {
    proofs: &'a Proofs,
    root: StorePath,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.proofs.lock().roots.remove(&self.root);
        self.proofs.changed.notify_all();
    }
}

/// Files that this thread reads, so that no other does.
struct Claim<'a> {
    proofs: &'a Proofs,
    paths: Vec<StorePath>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.proofs.lock();
        for path in &self.paths {
            state.reading.remove(path);
        }
        drop(state);
        self.proofs.changed.notify_all();
    }
}

/// One look at what is below.
struct Round<'a> {
    proofs: &'a Proofs,
    dir: &'a StoreDir,
    caches: &'a [Arc<dyn Cache>],
    root: &'a StorePath,
    /// Nothing fails the proof but what the root needs: a cache may speak of files that nothing needs.
    failed: BTreeMap<StorePath, Failed>,
    /// Inputs that no narinfo file spoke of.
    unforeseen: BTreeSet<StorePath>,
    /// Files that were read before these inputs of theirs.
    early: BTreeMap<StorePath, Vec<StorePath>>,
}

impl Round<'_> {
    fn take_in(&mut self, below: Closure) {
        let Closure { found, missing } = below;
        for path in missing {
            self.failed.insert(path.clone(), Failed::Itself(ProofError::Missing(path)));
        }
        let references = |path: &StorePath| {
            let references = found.get(path).map(|(_, narinfo)| &narinfo.info.references);
            let known: Vec<_> =
                references.into_iter().flatten().filter_map(|path| found.get_key_value(path)).collect();
            known.into_iter().map(|(path, _)| path)
        };
        // True names are in no circle. Where a cache says so, it lies, and what it makes us read in vain is bounded.
        let order = references_first(found.keys(), references).unwrap_or_else(|_| found.keys().collect());
        for chunk in order.chunks(CHUNK) {
            self.read(chunk, &found);
            self.wait_for(chunk);
            for path in chunk {
                self.take_in_one(path);
            }
        }
    }

    /// Reads what of these nobody has read or reads.
    fn read(&mut self, chunk: &[&StorePath], found: &BTreeMap<StorePath, (usize, NarInfo)>) {
        let mut state = self.proofs.lock();
        let mut mine = Vec::new();
        for path in chunk {
            let needed = *path == self.root || !state.proven.knows(path);
            if needed && !state.read.contains_key(*path) && state.reading.insert((*path).clone()) {
                mine.push((*path).clone());
            }
        }
        drop(state);
        let claim = Claim { proofs: self.proofs, paths: mine };
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        drover_cache::in_parallel(PARALLEL.min(claim.paths.len()), || {
            while let Some(path) = claim.paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                match read_one(self.dir, self.caches, path, found.get(path)) {
                    Ok(file) => drop(self.proofs.lock().read.insert(path.clone(), Arc::new(file))),
                    Err(error) => {
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.push((path.clone(), error));
                    }
                }
            }
        });
        for (path, error) in failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            self.failed.insert(path, Failed::Itself(error));
        }
    }

    /// Until nobody reads any of these.
    fn wait_for(&self, chunk: &[&StorePath]) {
        let mut state = self.proofs.lock();
        while chunk.iter().any(|path| state.reading.contains(*path)) {
            state = self.proofs.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn take_in_one(&mut self, path: &StorePath) {
        let mut state = self.proofs.lock();
        let Some(file) = state.read.get(path).cloned() else {
            // Proven, or it failed here, or where another thread read it: then it is looked for again.
            if !state.proven.knows(path) && !self.failed.contains_key(path) {
                self.unforeseen.insert(path.clone());
            }
            return;
        };
        let lacking = state.proven.lacks(&file);
        if let Some(input) = lacking.iter().find(|input| self.failed.contains_key(*input)) {
            self.failed.insert(path.clone(), Failed::Below(input.clone()));
        } else if lacking.is_empty() {
            match state.proven.take_in(self.dir, &file) {
                Ok(()) if path == self.root => state.proven.keep(Arc::clone(&file)),
                Ok(()) => {}
                Err(error) => drop(self.failed.insert(path.clone(), Failed::Itself(error.widen()))),
            }
        } else {
            // Read again when these are there, which is seldom: Nix's caches say all references.
            self.unforeseen.extend(lacking.iter().cloned());
            self.early.insert(path.clone(), lacking);
        }
        state.read.remove(path);
    }

    /// What keeps the root from being proven, if that is for good.
    fn verdict(mut self) -> Option<Error> {
        // What was read before its inputs has not heard of their failures.
        loop {
            let failed = &self.failed;
            let below = self.early.iter().find_map(|(path, lacking)| {
                let input = lacking.iter().find(|input| failed.contains_key(*input))?;
                Some((path.clone(), input.clone()))
            });
            let Some((path, input)) = below else { break };
            self.early.remove(&path);
            self.failed.insert(path, Failed::Below(input));
        }
        let mut failed = self.failed.remove(self.root)?;
        loop {
            match failed {
                Failed::Itself(error) => return Some(error),
                Failed::Below(input) => failed = self.failed.remove(&input)?,
            }
        }
    }
}

/// From the first cache whose bytes are right. One that gives others is set aside.
fn read_one(
    dir: &StoreDir,
    caches: &[Arc<dyn Cache>],
    path: &StorePath,
    found: Option<&(usize, NarInfo)>,
) -> Result<DrvFile, Error> {
    let unread = |source| ProofError::Read { drv: path.clone(), source: Box::new(source) };
    let mut left = caches.to_vec();
    let mut found = found.cloned();
    let mut wrong = None;
    while let Some((index, narinfo)) = found {
        let cache = left.remove(index);
        let error = match drover_cache::read_nar_file(&*cache, &narinfo, aterm::MAX_LEN as u64) {
            Ok(text) => match DrvFile::parse(dir, path, &text) {
                Ok(file) => return Ok(file),
                Err(error) => error.widen(),
            },
            Err(error) => unread(error),
        };
        let is_wrong = !matches!(&error, ProofError::Read { source, .. } if source.is_transient());
        if is_wrong {
            cache.set_aside(path, &error.to_string());
        }
        // What a cache gave wrong says more than that another one is not there.
        if wrong.is_none() || is_wrong {
            wrong = Some(error);
        }
        found = find(&left, path).map_err(unread).unwrap_or(None);
    }
    Err(wrong.unwrap_or_else(|| ProofError::Missing(path.clone())))
}
