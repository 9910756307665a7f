//! Outputs that came while their session did not come to its end: what the next session with the same builder need not
//! ask for again.
//!
//! All that is known of them was computed from bytes that came. What a builder says decides only whether they are still
//! what is wanted; of a part, whether the rest fits is decided by the hash of the whole.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use drover_cache::NarSpool;
use drover_nix::{OutputName, PathInfo, StorePath};

use crate::collect::Collected;

/// Shared by the sessions of one attempt to build one derivation. Holds files in the job's spool directory, which go with
/// it.
#[derive(Default)]
pub struct Kept(Mutex<State>);

#[derive(Default)]
struct State {
    whole: BTreeMap<OutputName, Collected>,
    /// The one that was coming.
    part: Option<Part>,
}

/// The beginning of an output.
pub(crate) struct Part {
    /// What the builder said that it is.
    pub claimed: PathInfo,
    pub spool: NarSpool,
}

impl Kept {
    /// Whether there is anything.
    pub fn is_empty(&self) -> bool {
        let state = self.lock();
        state.whole.is_empty() && state.part.is_none()
    }

    pub(crate) fn put(&self, collected: impl IntoIterator<Item = Collected>) {
        let mut state = self.lock();
        state.whole.extend(collected.into_iter().map(|output| (output.name.clone(), output)));
    }

    pub(crate) fn put_part(&self, part: Part) {
        self.lock().part = Some(part);
    }

    /// The output, if it is what the builder says now.
    pub(crate) fn take(&self, name: &OutputName, claimed: &PathInfo) -> Option<Collected> {
        let output = self.lock().whole.remove(name)?;
        is_same(&output.info, claimed).then_some(output)
    }

    /// Its beginning, if it is of what the builder says now.
    pub(crate) fn take_part(&self, claimed: &PathInfo) -> Option<NarSpool> {
        let part = self.lock().part.take_if(|part| part.claimed.path == claimed.path)?;
        is_same(&part.claimed, claimed).then_some(part.spool)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one insertion or removal: a panic leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_same(left: &PathInfo, right: &PathInfo) -> bool {
    let of = |info: &PathInfo| -> (StorePath, _, _) { (info.path.clone(), info.nar_hash, info.nar_size) };
    of(left) == of(right) && left.references == right.references
}
