//! Objects that cannot be read, made under another schema or broken: told apart from those that are gone.
//!
//! One is logged once and counted, stands in nobody's way, and what belongs to it stays.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{Stream, StreamExt as _};
use kube::Resource;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::watcher::{self, Event};

use crate::metrics::Metrics;
use crate::ready::Watch;

/// Objects of one kind that are there and cannot be read, by uid.
#[derive(Debug)]
pub struct Unreadable {
    watch: Watch,
    metrics: Arc<Metrics>,
    uids: Mutex<Uids>,
}

#[derive(Default, Debug)]
struct Uids {
    now: HashSet<String>,
    /// While a list comes in: those from before that were not in it yet.
    before: HashSet<String>,
}

impl Unreadable {
    pub fn new(watch: Watch, metrics: Arc<Metrics>) -> Self {
        Self { watch, metrics, uids: Mutex::default() }
    }

    /// Whether this one is there.
    pub fn contains(&self, uid: &str) -> bool {
        let uids = self.lock();
        uids.now.contains(uid) || uids.before.contains(uid)
    }

    fn add(&self, object: &InvalidObject) {
        let metadata = &object.metadata;
        let uid = metadata.uid.clone().unwrap_or_default();
        let mut uids = self.lock();
        let was_there = uids.before.remove(&uid);
        if uids.now.insert(uid) && !was_there {
            tracing::error!(
                watch = self.watch.name(),
                namespace = metadata.namespace,
                name = metadata.name,
                error = object.error,
                "an object cannot be read and is left alone; what belongs to it stays until it is mended or deleted"
            );
        }
        self.count(&uids);
    }

    fn remove(&self, uid: &str) {
        let mut uids = self.lock();
        if uids.now.remove(uid) | uids.before.remove(uid) {
            tracing::info!(
                watch = self.watch.name(),
                uid,
                "an object that could not be read was mended or deleted"
            );
            self.count(&uids);
        }
    }

    fn begin_list(&self) {
        let mut uids = self.lock();
        let now = std::mem::take(&mut uids.now);
        uids.before.extend(now);
    }

    fn end_list(&self) {
        let mut uids = self.lock();
        uids.before.clear();
        self.count(&uids);
    }

    fn count(&self, uids: &Uids) {
        self.metrics.unreadable(self.watch, uids.now.len() + uids.before.len());
    }

    fn lock(&self) -> MutexGuard<'_, Uids> {
        // Sets of names: fit for use after a panic.
        self.uids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events of a watch without the objects that cannot be read; `note` hears of those that are there, by uid. Failures of the
/// watch itself are counted, and go through.
pub fn readable<K: Resource + Default>(
    events: impl Stream<Item = watcher::Result<Event<DeserializeGuard<K>>>>,
    unreadable: Arc<Unreadable>,
    mut note: impl FnMut(&str),
) -> impl Stream<Item = watcher::Result<Event<K>>> {
    events.filter_map(move |event| {
        let passed = match event {
            Ok(event) => read(event, &unreadable, &mut note).map(Ok),
            Err(error) => {
                unreadable.metrics.watch_broke(unreadable.watch);
                Some(Err(error))
            }
        };
        std::future::ready(passed)
    })
}

fn read<K: Resource + Default>(
    event: Event<DeserializeGuard<K>>,
    unreadable: &Unreadable,
    note: &mut impl FnMut(&str),
) -> Option<Event<K>> {
    let mut pass = |guard: DeserializeGuard<K>| match guard.0 {
        Ok(object) => {
            unreadable.remove(object.meta().uid.as_deref().unwrap_or_default());
            Some(object)
        }
        Err(invalid) => {
            unreadable.add(&invalid);
            note(invalid.metadata.uid.as_deref().unwrap_or_default());
            None
        }
    };
    match event {
        Event::Init => {
            unreadable.begin_list();
            Some(Event::Init)
        }
        Event::InitApply(guard) => pass(guard).map(Event::InitApply),
        Event::InitDone => {
            unreadable.end_list();
            Some(Event::InitDone)
        }
        // What was known of it before stays as it is.
        Event::Apply(guard) => pass(guard).map(Event::Apply),
        Event::Delete(guard) => {
            // That it is gone is all that matters.
            let object = guard.0.unwrap_or_else(|invalid| {
                let mut husk = K::default();
                *husk.meta_mut() = invalid.metadata;
                husk
            });
            unreadable.remove(object.meta().uid.as_deref().unwrap_or_default());
            Some(Event::Delete(object))
        }
    }
}

#[cfg(test)]
mod tests {
    use drover_api::{BuildRequest, BuilderClass};
    use futures::FutureExt as _;
    use kube::ResourceExt as _;
    use serde_json::{Value, json};

    use super::*;

    const GOOD: &str = "good";
    const POISON: &str = "poison";

    #[test]
    fn what_cannot_be_read_stops_nobody_and_is_not_gone() {
        let mut watch = Watched::default();
        let passed = watch.see([
            Event::Init,
            Event::InitApply(poison()),
            Event::InitApply(request(GOOD)),
            Event::InitDone,
            Event::Apply(poison()),
        ]);
        assert_eq!(passed, ["init", "listed good", "listed"]);
        assert_eq!(watch.noted, [POISON, POISON]);
        assert!(watch.unreadable.contains(POISON) && !watch.unreadable.contains(GOOD));
        assert_eq!(watch.count(), 1);

        // The same again in a new list; it is there all the time.
        assert_eq!(watch.see([Event::Init]), ["init"]);
        assert!(watch.unreadable.contains(POISON));
        assert_eq!(watch.see([Event::InitApply(poison()), Event::InitDone]), ["listed"]);
        assert!(watch.unreadable.contains(POISON));
        // Not in the next: deleted while nobody watched.
        watch.see([Event::Init, Event::InitDone]);
        assert!(!watch.unreadable.contains(POISON));
        assert_eq!(watch.count(), 0);
    }

    #[test]
    fn what_was_mended_or_deleted_is_heard_of() {
        let mut watch = Watched::default();
        watch.see([Event::Apply(poison())]);
        assert_eq!(watch.see([Event::Apply(request(POISON))]), ["changed poison"]);
        assert!(!watch.unreadable.contains(POISON));
        watch.see([Event::Apply(poison())]);
        assert_eq!(watch.see([Event::Delete(poison())]), ["gone poison"]);
        assert!(!watch.unreadable.contains(POISON));
    }

    #[test]
    fn failures_of_the_watch_go_through_and_are_counted() {
        let watch = Watched::default();
        let broken = futures::stream::iter([Err(watcher::Error::NoResourceVersion)]);
        let passed: Vec<watcher::Result<Event<BuildRequest>>> =
            readable(broken, watch.unreadable.clone(), |_| {}).collect().now_or_never().unwrap();
        assert!(matches!(passed[..], [Err(_)]));
        let page = watch.metrics.render();
        assert!(page.contains("drover_watch_errors_total{watch=\"requests\"} 1"), "{page}");
    }

    #[test]
    fn classes_can_be_unreadable_too() {
        let broken = json!({"metadata": {"name": "c", "uid": POISON}, "spec": {"systems": 7}});
        let guard: DeserializeGuard<BuilderClass> = serde_json::from_value(broken).unwrap();
        let unreadable = Unreadable::new(Watch::Classes, Arc::default());
        assert!(read(Event::Apply(guard), &unreadable, &mut |_| {}).is_none());
        assert!(unreadable.contains(POISON));
    }

    struct Watched {
        unreadable: Arc<Unreadable>,
        metrics: Arc<Metrics>,
        noted: Vec<String>,
    }

    impl Default for Watched {
        fn default() -> Self {
            let metrics = Arc::new(Metrics::new());
            let unreadable = Arc::new(Unreadable::new(Watch::Requests, metrics.clone()));
            Self { unreadable, metrics, noted: vec![] }
        }
    }

    impl Watched {
        /// What comes through of these, in words.
        fn see(
            &mut self,
            events: impl IntoIterator<Item = Event<DeserializeGuard<BuildRequest>>>,
        ) -> Vec<String> {
            let events = futures::stream::iter(events.into_iter().map(Ok).collect::<Vec<_>>());
            let passed = readable(events, self.unreadable.clone(), |uid| self.noted.push(uid.to_owned()));
            let words = passed.map(|event| {
                let uid = |request: BuildRequest| request.uid().unwrap_or_default();
                match event.unwrap() {
                    Event::Init => "init".into(),
                    Event::InitApply(request) => format!("listed {}", uid(request)),
                    Event::InitDone => "listed".into(),
                    Event::Apply(request) => format!("changed {}", uid(request)),
                    Event::Delete(request) => format!("gone {}", uid(request)),
                }
            });
            words.collect().now_or_never().unwrap()
        }

        fn count(&self) -> i64 {
            self.metrics.unreadable_now(Watch::Requests)
        }
    }

    fn request(uid: &str) -> DeserializeGuard<BuildRequest> {
        guard(uid, json!({"drvPath": "/nix/store/x.drv"}))
    }

    fn poison() -> DeserializeGuard<BuildRequest> {
        let guard = guard(POISON, json!({"derivation": "none of this"}));
        assert!(guard.0.is_err());
        guard
    }

    fn guard(uid: &str, spec: Value) -> DeserializeGuard<BuildRequest> {
        serde_json::from_value(json!({"metadata": {"name": uid, "namespace": "n", "uid": uid}, "spec": spec}))
            .unwrap()
    }
}
