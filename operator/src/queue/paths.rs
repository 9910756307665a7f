//! Who makes which path, and who needs it, within one namespace. Pure.
//!
//! A namespace never sees another's: each has a table of its own.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::slots::Id;

/// The store paths that requests of one namespace make or need.
#[derive(Default)]
pub(super) struct Paths(HashMap<Arc<str>, Uses>);

#[derive(Default)]
struct Uses {
    producers: BTreeSet<Id>,
    consumers: BTreeSet<Id>,
}

impl Paths {
    /// Notes what a request makes and needs. The same text is kept once: what is returned shares it.
    pub(super) fn add(&mut self, id: Id, outputs: &mut [Arc<str>], inputs: &mut [Arc<str>]) {
        for path in outputs {
            self.uses(path).producers.insert(id);
        }
        for path in inputs {
            self.uses(path).consumers.insert(id);
        }
    }

    pub(super) fn remove_outputs(&mut self, id: Id, outputs: &[Arc<str>]) {
        self.remove(outputs, |uses| uses.producers.remove(&id));
    }

    pub(super) fn remove_inputs(&mut self, id: Id, inputs: &[Arc<str>]) {
        self.remove(inputs, |uses| uses.consumers.remove(&id));
    }

    /// Requests that have the path among their outputs.
    pub(super) fn producers(&self, path: &str) -> impl Iterator<Item = Id> + '_ {
        self.0.get(path).into_iter().flat_map(|uses| &uses.producers).copied()
    }

    /// Requests that have it among their direct inputs and have not come to their end.
    pub(super) fn consumers(&self, path: &str) -> impl Iterator<Item = Id> + '_ {
        self.0.get(path).into_iter().flat_map(|uses| &uses.consumers).copied()
    }

    fn uses(&mut self, path: &mut Arc<str>) -> &mut Uses {
        if let Some((known, _)) = self.0.get_key_value(path) {
            *path = known.clone();
        }
        self.0.entry(path.clone()).or_default()
    }

    fn remove(&mut self, paths: &[Arc<str>], forget: impl Fn(&mut Uses) -> bool) {
        for path in paths {
            let Some(uses) = self.0.get_mut(path) else { continue };
            forget(uses);
            if uses.producers.is_empty() && uses.consumers.is_empty() {
                self.0.remove(path);
            }
        }
    }
}
