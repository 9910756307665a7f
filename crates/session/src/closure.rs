//! What a build needs: the closure of its inputs under references, and where each path can be had.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use drover_cache::Cache;
use drover_nix::order::references_first;
use drover_nix::{NarInfo, PathInfo, StorePath};
use drover_serve::Client;

use crate::{Failure, Job, Reason};

/// Requests for narinfo files that are under way at once. They are small, so latency is all that they cost.
const LOOKUPS: usize = 16;
/// Paths that a build may need, and references between them: a cache, or a builder, may name ever more. A large system has
/// some ten thousand paths and some hundred thousand references.
const MAX_PATHS: usize = 262_144;
const MAX_REFERENCES: usize = 1 << 20;
/// How many missing paths a message names.
const NAMED: usize = 10;

/// Every path that the build needs. Closed under references.
pub(crate) struct Closure(BTreeMap<StorePath, Known>);

pub(crate) enum Known {
    /// In the cache with this index.
    InCache(usize, NarInfo),
    /// In no cache, but on the builder.
    OnBuilder(PathInfo),
}

impl Known {
    pub(crate) fn info(&self) -> &PathInfo {
        match self {
            Self::InCache(_, narinfo) => &narinfo.info,
            Self::OnBuilder(info) => info,
        }
    }
}

impl Closure {
    /// Asks the caches, level by level; what none of them has, the builder.
    pub(crate) fn find<R: Read, W: Write>(job: &Job, client: &mut Client<R, W>) -> Result<Self, Failure> {
        let mut plan = Plan::new(job.inputs());
        while !plan.wanted.is_empty() {
            let wanted: Vec<StorePath> = plan.wanted.iter().cloned().collect();
            let mut unknown = BTreeSet::new();
            for (path, found) in look_up(&job.caches, &wanted) {
                match found {
                    Ok(Some((cache, narinfo))) => plan.found(path, Known::InCache(cache, narinfo))?,
                    Ok(None) => {
                        unknown.insert(path);
                    }
                    Err(error) => {
                        plan.trouble(error);
                        unknown.insert(path);
                    }
                }
            }
            if unknown.is_empty() {
                continue;
            }
            let mut infos = client
                .query_path_infos(&unknown)
                .map_err(Failure::builder("asking the builder for inputs"))?;
            for path in unknown {
                match infos.remove(&path) {
                    Some(info) => plan.found(path, Known::OnBuilder(info))?,
                    None => plan.missing(path),
                }
            }
        }
        plan.finish(job)
    }

    pub(crate) fn paths(&self) -> BTreeSet<StorePath> {
        self.0.keys().cloned().collect()
    }

    /// What has to be sent to a builder that has `valid`, references first.
    pub(crate) fn to_send(&self, valid: &BTreeSet<StorePath>) -> Result<Vec<(usize, &NarInfo)>, Failure> {
        let missing: BTreeMap<_, _> = self.0.iter().filter(|(path, _)| !valid.contains(path)).collect();
        let below = |path: &StorePath| {
            let references = missing[path].info().references.iter();
            references.filter_map(|reference| Some(*missing.get_key_value(reference)?.0))
        };
        let order = references_first(missing.keys().copied(), below).map_err(|(path, _)| {
            let message = format!("the caches say that {path} refers to itself through other paths");
            Failure::verdict(Reason::InputHashMismatch, message)
        })?;
        let sources = order.into_iter().map(|path| match &self.0[path] {
            Known::InCache(cache, narinfo) => Ok((*cache, narinfo)),
            Known::OnBuilder(_) => {
                let message = format!("{path} vanished from the builder while it was being locked");
                Err(Failure::infrastructure(message, "it is in no cache"))
            }
        });
        sources.collect()
    }
}

/// The bookkeeping of a search, without the searching.
struct Plan {
    known: BTreeMap<StorePath, Known>,
    wanted: BTreeSet<StorePath>,
    missing: BTreeSet<StorePath>,
    references: usize,
    /// The first cache that failed rather than said no; one that cannot be asked before one that gave a path wrong or is not
    /// trusted.
    trouble: Option<drover_cache::Error>,
}

impl Plan {
    fn new(roots: &BTreeSet<StorePath>) -> Self {
        let (known, missing) = (BTreeMap::new(), BTreeSet::new());
        Self { known, wanted: roots.clone(), missing, references: 0, trouble: None }
    }

    fn found(&mut self, path: StorePath, known: Known) -> Result<(), Failure> {
        self.wanted.remove(&path);
        self.references += known.info().references.len();
        let new = known.info().references.iter().filter(|reference| {
            **reference != path && !self.known.contains_key(reference) && !self.missing.contains(reference)
        });
        self.wanted.extend(new.cloned());
        self.known.insert(path, known);
        let paths = self.known.len() + self.wanted.len() + self.missing.len();
        let (what, most) = match (paths > MAX_PATHS, self.references > MAX_REFERENCES) {
            (true, _) => ("paths", MAX_PATHS),
            (_, true) => ("references between paths", MAX_REFERENCES),
            _ => return Ok(()),
        };
        let message = format!(
            "the inputs come with more than {most} {what}, as the caches and the builder describe them"
        );
        Err(Failure::verdict(Reason::InputHashMismatch, message))
    }

    fn trouble(&mut self, error: drover_cache::Error) {
        let rank = |error: &drover_cache::Error| match error {
            drover_cache::Error::Untrusted { .. } => 1,
            drover_cache::Error::SetAside { .. } => 2,
            _ => 3,
        };
        if self.trouble.as_ref().map_or(0, rank) < rank(&error) {
            self.trouble = Some(error);
        }
    }

    fn missing(&mut self, path: StorePath) {
        self.wanted.remove(&path);
        self.missing.insert(path);
    }

    fn finish(self, job: &Job) -> Result<Closure, Failure> {
        if self.missing.is_empty() {
            return Ok(Closure(self.known));
        }
        let mut paths: Vec<String> = self.missing.iter().take(NAMED).map(|path| job.dir.full(path)).collect();
        if self.missing.len() > NAMED {
            paths.push(format!("and {} more", self.missing.len() - NAMED));
        }
        let paths = paths.join(", ");
        match self.trouble {
            Some(error @ drover_cache::Error::Untrusted { .. }) => {
                let message = format!("inputs are in no cache that is trusted: {paths}: {error}");
                return Err(Failure {
                    source: Some(error.into()),
                    ..Failure::verdict(Reason::InputMissing, message)
                });
            }
            Some(error @ drover_cache::Error::SetAside { .. }) => {
                let message = format!("no cache gives the inputs {paths} as they are: {error}");
                return Err(Failure {
                    source: Some(error.into()),
                    ..Failure::verdict(Reason::InputHashMismatch, message)
                });
            }
            // A cache that cannot be asked may well have them: no verdict from that.
            Some(error) => return Err(Failure::cache(&format!("looking for the inputs {paths}"))(error)),
            None => {}
        }
        let caches: Vec<String> = job.caches.iter().map(|cache| cache.url()).collect();
        let caches = if caches.is_empty() { "there is no cache".into() } else { caches.join(", ") };
        let message = format!("inputs are neither on the builder nor in a cache ({caches}): {paths}");
        Err(Failure::verdict(Reason::InputMissing, message))
    }
}

/// Direct inputs that no cache has, as far as caches can say. Nothing is asked about what they refer to.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct MissingInputs {
    /// Every cache says that it does not have them.
    pub absent: BTreeSet<StorePath>,
    /// No cache gives them, but one could not be asked, or has them and nobody vouches for it.
    pub unknown: BTreeSet<StorePath>,
    /// Why, of one of these.
    pub trouble: Option<String>,
}

/// Asks the job's caches for its direct inputs. Where there are no caches, nothing is known.
pub fn missing_inputs(job: &Job) -> MissingInputs {
    let inputs: Vec<StorePath> = job.inputs().iter().cloned().collect();
    let mut missing = MissingInputs::default();
    if job.caches.is_empty() {
        missing.unknown.extend(inputs);
        return missing;
    }
    for (path, found) in look_up(&job.caches, &inputs) {
        match found {
            Ok(Some(_)) => {}
            Ok(None) => {
                missing.absent.insert(path);
            }
            Err(error) => {
                missing.trouble.get_or_insert_with(|| error.to_string());
                missing.unknown.insert(path);
            }
        }
    }
    missing
}

type Found = Result<Option<(usize, NarInfo)>, drover_cache::Error>;

/// Asks the caches for many paths at once.
fn look_up(caches: &[Arc<dyn Cache>], paths: &[StorePath]) -> Vec<(StorePath, Found)> {
    if caches.is_empty() {
        return paths.iter().map(|path| (path.clone(), Ok(None))).collect();
    }
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(paths.len()));
    let work = || {
        while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
            let found = drover_cache::find(caches, path);
            // A poisoned lock means that another lookup panicked, which the scope passes on anyway.
            results.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((path.clone(), found));
        }
    };
    drover_cache::in_parallel(LOOKUPS.min(paths.len()), work);
    results.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The first cache that has it, as of now: nothing that was remembered. A failure counts only if no other one has it.
pub(crate) fn look_up_one(caches: &[Arc<dyn Cache>], path: &StorePath) -> Found {
    let mut trouble = None;
    for (index, cache) in caches.iter().enumerate() {
        match cache.narinfo(path) {
            Ok(Some(narinfo)) => return Ok(Some((index, narinfo))),
            Ok(None) => {}
            Err(error) => trouble = trouble.or(Some(error)),
        }
    }
    trouble.map_or(Ok(None), Err)
}

#[cfg(test)]
mod tests {
    use drover_serve::testing::{file_nar, info_of};

    use super::*;

    fn path(number: usize) -> StorePath {
        StorePath::from_parts([0; 20], &number.to_string()).unwrap()
    }

    /// Of something that refers to these.
    fn known(number: usize, references: impl Iterator<Item = usize>) -> Known {
        let references: Vec<StorePath> = references.map(path).collect();
        Known::OnBuilder(info_of(path(number), &references.iter().collect::<Vec<_>>(), &file_nar(b"")))
    }

    /// Feeds it with what `references` says of each path, until it has had enough.
    fn fed(references: impl Fn(usize) -> std::ops::Range<usize>) -> (usize, Failure) {
        let mut plan = Plan::new(&[path(0)].into());
        for number in 0.. {
            if let Err(failure) = plan.found(path(number), known(number, references(number))) {
                return (number, failure);
            }
        }
        unreachable!("it has an end")
    }

    #[test]
    fn what_has_no_end_is_given_up() {
        const STEP: usize = 4096;
        // Each names paths that nobody has named before.
        let (seen, failure) = fed(|number| number * STEP + 1..(number + 1) * STEP + 1);
        assert_eq!((seen, failure.reason), (MAX_PATHS / STEP - 1, Reason::InputHashMismatch));
        assert!(failure.message.contains("262144 paths"), "{}", failure.message);
        // Each names the same ones, over and over.
        let (seen, failure) = fed(|_| 0..STEP);
        assert_eq!(seen, MAX_REFERENCES / STEP);
        assert!(failure.message.contains("references"), "{}", failure.message);
    }
}
