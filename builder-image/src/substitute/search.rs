//! What has to be fetched: paths that are not valid, what they refer to, and an order in which all of it can become valid.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use drover_nix::{NarInfo, StorePath};
use drover_store::{LocalStore, TempRoots};

use super::complaints::Complaints;
use super::source::Source;
use crate::build::cancel::Cancel;
use crate::error::Error;

/// Requests for narinfo files that are under way at once. They are small, so latency is all that they cost.
const LOOKUPS: usize = 16;
/// References that are followed, of all paths together: a cache may name ever more, and all of them are kept in memory. A large
/// system has some ten thousand paths and some hundred thousand references.
const MAX_REFERENCES: usize = 1_048_576;

/// Where a path can be had: the source with this index, and what that says.
pub(super) type Found = (usize, NarInfo);

/// Paths with all that they refer to: each reference is valid already, or before the path.
#[derive(Default)]
pub(super) struct Plan(pub(super) Vec<Found>);

/// Asks level by level. Everything that turns up is kept from the collector by `roots` before it is looked for. What is beyond
/// the limit on references, or would be looked for when nobody wants it any more, is not found.
pub(super) fn search(
    store: &LocalStore,
    sources: &[Source],
    wanted: BTreeSet<StorePath>,
    roots: &TempRoots,
    cancel: &Cancel,
    complaints: &Complaints<'_>,
) -> Result<Plan, Error> {
    let mut found = BTreeMap::new();
    let mut valid = BTreeSet::new();
    let mut seen = wanted.clone();
    let mut level = wanted;
    let left = AtomicUsize::new(MAX_REFERENCES);
    while !level.is_empty() && !cancel.is_cancelled() {
        roots.add_all(&level)?;
        valid.extend(store.valid_paths(&level)?);
        let missing: Vec<StorePath> = level.difference(&valid).cloned().collect();
        let mut next = BTreeSet::new();
        for (path, answer) in look_up(sources, &missing, &left, cancel, complaints) {
            let new = |reference: &&StorePath| seen.insert((*reference).clone());
            next.extend(answer.1.info.other_references().filter(new).cloned());
            found.insert(path, answer);
        }
        level = next;
    }
    Ok(in_order(found, &valid))
}

/// By how deep below it references go, the largest first where that is the same. Paths that refer to something which can
/// neither be had nor is valid, and those that refer to each other, are left out.
fn in_order(mut found: BTreeMap<StorePath, Found>, valid: &BTreeSet<StorePath>) -> Plan {
    let mut waits: BTreeMap<StorePath, usize> = BTreeMap::new();
    let mut referrers: BTreeMap<StorePath, Vec<StorePath>> = BTreeMap::new();
    let mut level = Vec::new();
    for (path, (_, narinfo)) in &found {
        let mut count = 0;
        for reference in narinfo.info.other_references().filter(|reference| !valid.contains(reference)) {
            count += 1;
            referrers.entry(reference.clone()).or_default().push(path.clone());
        }
        if count == 0 {
            level.push(path.clone());
        }
        waits.insert(path.clone(), count);
    }
    let mut plan = Plan::default();
    while !level.is_empty() {
        let mut next = Vec::new();
        for path in &level {
            for referrer in referrers.remove(path).unwrap_or_default() {
                if let Some(count) = waits.get_mut(&referrer) {
                    *count -= 1;
                    if *count == 0 {
                        next.push(referrer);
                    }
                }
            }
        }
        let first = plan.0.len();
        plan.0.extend(level.iter().filter_map(|path| found.remove(path)));
        plan.0[first..].sort_by_key(|(_, narinfo)| Reverse(narinfo.info.nar_size));
        level = next;
    }
    plan
}

/// The sources in the order in which they are asked for a path; `first` goes before its equals.
pub(super) fn by_preference(sources: &[Source], path: &StorePath, first: Option<usize>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sources.len()).collect();
    order.sort_by_cached_key(|index| (sources[*index].is_doubtful(path), Some(*index) != first, *index));
    order
}

/// Takes so many. False if there are not as many left.
fn take(left: &AtomicUsize, count: usize) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(count)).is_ok()
}

/// Asks for many paths at once. Those that no source gives are not in the answer, nor those with more references than are `left`.
pub(super) fn look_up(
    sources: &[Source],
    paths: &[StorePath],
    left: &AtomicUsize,
    cancel: &Cancel,
    complaints: &Complaints<'_>,
) -> Vec<(StorePath, Found)> {
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(Vec::new());
    let work = || {
        while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
            if cancel.is_cancelled() {
                return;
            }
            let ask = |index: usize| Some((index, sources[index].narinfo(path, complaints)?));
            let found = by_preference(sources, path, None).into_iter().find_map(ask);
            if let Some(found) = found
                && take(left, 1 + found.1.info.references.len())
            {
                answers.lock().unwrap_or_else(PoisonError::into_inner).push((path.clone(), found));
            }
        }
    };
    drover_store::in_parallel(LOOKUPS.min(paths.len()), work);
    answers.into_inner().unwrap_or_else(PoisonError::into_inner)
}
