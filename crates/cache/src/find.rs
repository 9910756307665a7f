//! Which of several caches has a path.

use std::sync::Arc;

use drover_nix::{NarInfo, StorePath};

use crate::{Cache, Error, Recalled};

/// The first cache that has `path`, as an index into `caches`. One that fails counts only if no other has it.
///
/// What caches [recall](Cache::recall) decides who is asked first, and spares questions to those that lacked the path a
/// moment ago if another has it. It never makes a path absent: before that is said, every cache has said so now.
pub fn find(caches: &[Arc<dyn Cache>], path: &StorePath) -> Result<Option<(usize, NarInfo)>, Error> {
    let (mut lacked, mut last, mut asked) = (Vec::new(), Vec::new(), Asked::default());
    for (index, cache) in caches.iter().enumerate() {
        match cache.recall(path) {
            Recalled::Has(narinfo) => return Ok(Some((index, *narinfo))),
            Recalled::Lacked => lacked.push(index),
            Recalled::AskedLast => last.push(index),
            Recalled::Nothing => {
                if let Some(narinfo) = asked.ask(caches, index, path) {
                    return Ok(Some((index, narinfo)));
                }
            }
        }
    }
    for index in lacked.into_iter().chain(last) {
        if let Some(narinfo) = asked.ask(caches, index, path) {
            return Ok(Some((index, narinfo)));
        }
    }
    asked.failed.map_or(Ok(None), Err)
}

#[derive(Default)]
struct Asked {
    /// Those that said no, or failed.
    done: Vec<usize>,
    failed: Option<Error>,
}

impl Asked {
    fn ask(&mut self, caches: &[Arc<dyn Cache>], index: usize, path: &StorePath) -> Option<NarInfo> {
        // A cache that outputs go to is often one that inputs come from: the same handle twice.
        if self.done.iter().any(|done| Arc::ptr_eq(&caches[*done], &caches[index])) {
            return None;
        }
        self.done.push(index);
        match caches[index].narinfo(path) {
            Ok(found) => found,
            Err(error) => {
                self.failed.get_or_insert(error);
                None
            }
        }
    }
}
