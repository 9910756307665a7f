//! Which request may begin, and what requests mean for each other: who builds the same, who makes whose inputs.
//!
//! [`Queue`] is the [`index::Index`] behind a lock, with a way to ask for looks at requests. Whatever it is told, it tells
//! those whom it concerns, and only those: an end wakes the requests that waited for it. It may not read or write the
//! API server; the watch of requests and the answers to the operator's own writes feed it. What it says is lost with the
//! process and follows again from the first list, which has to be complete before anybody is granted anything.
//!
//! Everything under `index` is pure: `entry` is what is kept of a request, `paths` who makes and needs what, `cycle` who waits
//! in circles, `slots` who runs. [`lookups`] and [`resolutions`] keep what caches have answered.

mod cycle;
mod entry;
pub mod index;
pub mod lookups;
mod paths;
pub mod resolutions;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_api::{BuildRequest, Concurrency, conditions};
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher::Event;

use crate::session::Trigger;
use crate::world::{Lookup, Others, Resolution, Slot};
use index::{Index, News};
use lookups::Lookups;
use resolutions::Resolutions;

/// One of these a process.
pub struct Queue {
    index: Mutex<Index>,
    trigger: Trigger,
    /// What caches have answered for requests.
    pub lookups: Lookups,
    /// What they have given of derivations that requests only name.
    pub resolutions: Resolutions,
}

impl Queue {
    pub fn new(trigger: Trigger) -> Self {
        Self {
            index: Mutex::default(),
            trigger,
            lookups: Lookups::default(),
            resolutions: Resolutions::default(),
        }
    }

    /// What the watch of requests shows. To be told before anybody looks at the request because of it.
    pub fn note(&self, event: &Event<BuildRequest>) {
        match event {
            Event::Init => self.begin_list(),
            Event::InitApply(request) => self.listed(request),
            Event::InitDone => self.end_list(),
            Event::Apply(request) => self.seen(request),
            Event::Delete(request) => self.gone(&request.uid().unwrap_or_default()),
        }
    }

    pub fn begin_list(&self) {
        self.with(Index::begin_list);
    }

    pub fn listed(&self, request: &BuildRequest) {
        self.forget_if_settled(request);
        self.with(|index| index.listed(request));
    }

    pub fn end_list(&self) {
        self.with(Index::end_list);
    }

    /// The request as the API server has just shown it: in a watch, in answer to a write or to a read.
    pub fn seen(&self, request: &BuildRequest) {
        self.forget_if_settled(request);
        self.with(|index| index.seen(request));
    }

    /// A request that is there and cannot be read.
    pub fn unreadable(&self, uid: &str) {
        self.with(|index| index.unreadable(uid));
    }

    pub fn gone(&self, uid: &str) {
        self.lookups.forget(uid);
        self.resolutions.forget(uid);
        self.with(|index| index.gone(uid));
    }

    /// What other requests mean for this one, which gets this class.
    pub fn others(&self, uid: &str, class: Option<&str>) -> Others {
        self.lock().others(uid, class)
    }

    /// Where this attempt stands, under what the class allows now.
    pub fn slot(&self, uid: &str, attempt: u32, class: Option<(&str, Concurrency)>) -> Slot {
        self.with(|index| {
            if let Some((class, concurrency)) = class {
                index.limit(class, concurrency);
            }
            index.slot(uid, attempt)
        })
    }

    pub fn ask(&self, uid: &str, attempt: u32, class: &str, concurrency: Concurrency) -> Slot {
        self.with(|index| index.ask(uid, attempt, class, concurrency))
    }

    /// Gives back leave to begin that is not used.
    pub fn release(&self, uid: &str) {
        self.with(|index| index.release(uid));
    }

    /// What a lookup has found.
    pub fn looked_up(&self, uid: &str, lookup: &Lookup) {
        let none = BTreeSet::new();
        let absent = if let Lookup::Missing { absent } = lookup { absent } else { &none };
        self.with(|index| index.waits(uid, absent));
    }

    /// What was read of a derivation that the request only names.
    pub fn resolved(&self, uid: &str, resolution: &Resolution) {
        if let Resolution::Found(found) = resolution {
            self.with(|index| index.resolved(uid, &found.derivation));
        }
    }

    /// Whether another request of the namespace may still make this path.
    pub fn is_coming(&self, uid: &str, path: &str) -> bool {
        self.lock().is_coming(uid, path)
    }

    /// Asks for a look at the request.
    pub fn look_at(&self, request: ObjectRef<BuildRequest>) {
        // The receiver is gone only while the process ends.
        let _ = self.trigger.unbounded_send(request);
    }

    /// There may be thousands, and nobody asks what caches have for them.
    fn forget_if_settled(&self, request: &BuildRequest) {
        let status = request.status.as_ref();
        if status.is_some_and(|status| conditions::verdict(&status.conditions).is_some()) {
            let uid = request.uid().unwrap_or_default();
            self.lookups.forget(&uid);
            self.resolutions.forget(&uid);
        }
    }

    /// Changes the index, and passes on whom that concerns.
    fn with<T>(&self, change: impl FnOnce(&mut Index) -> T) -> T {
        let mut index = self.lock();
        let result = change(&mut index);
        let news = index.take_news();
        drop(index);
        for (uid, request, news) in news {
            match news {
                News::Look => {}
                News::LookUp => self.lookups.forget(&uid),
                News::Arrived(paths) => self.lookups.arrived(&uid, &paths),
            }
            self.look_at(request);
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        // Nothing in it panics by any input that its tests have found. If it did, the next list would put it right.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shared by everything that runs.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<Queue>>();
};
