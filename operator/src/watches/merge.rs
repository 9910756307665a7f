//! Several watches of one kind, one a namespace, as if they were one.
//!
//! Whoever reads a watch believes that what a list does not show is gone. So there is one list for all of them, over when the
//! last of them has shown its own; a list that one of them makes again later becomes single changes and deletions. Pure.

use std::collections::{BTreeMap, BTreeSet};

use futures::stream::select_all;
use futures::{Stream, StreamExt as _};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::watcher::{self, Event};
use kube::{Resource, ResourceExt as _};

/// The events of these watches, which are each for another namespace, as those of one. A single watch stays what it is.
pub(super) fn merge<K: Resource + Send + 'static, S>(
    mut watches: Vec<S>,
) -> impl Stream<Item = watcher::Result<Event<DeserializeGuard<K>>>> + Send
where
    S: Stream<Item = watcher::Result<Event<DeserializeGuard<K>>>> + Send + Unpin + 'static,
{
    if watches.len() == 1
        && let Some(only) = watches.pop()
    {
        return only.boxed();
    }
    let mut merged = Merged::new(watches.len());
    let numbered = watches.into_iter().enumerate().map(|(of, watch)| watch.map(move |event| (of, event)));
    let events = select_all(numbered).flat_map(move |(of, event)| {
        futures::stream::iter(match event {
            Ok(event) => merged.step(of, event).into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        })
    });
    futures::stream::iter([Ok(Event::Init)]).chain(events).boxed()
}

/// What each of the watches has shown so far.
struct Merged {
    watches: Vec<Shown>,
    /// Deleted before the first common list was over, by namespace and name: told behind it.
    held_back: BTreeMap<(String, String), InvalidObject>,
    /// The first common list is over.
    listed: bool,
}

#[derive(Default)]
struct Shown {
    /// Names and uids of all that is there.
    known: BTreeMap<String, Identity>,
    /// Those that the list has shown which is going on.
    list: Option<BTreeSet<String>>,
    /// It has shown a whole list.
    done: bool,
}

struct Identity {
    namespace: String,
    uid: Option<String>,
}

impl Merged {
    fn new(watches: usize) -> Self {
        Self {
            watches: (0..watches).map(|_| Shown::default()).collect(),
            held_back: BTreeMap::new(),
            listed: false,
        }
    }

    /// What an event of watch `of` is for those who believe in one.
    fn step<K: Resource>(
        &mut self,
        of: usize,
        event: Event<DeserializeGuard<K>>,
    ) -> Vec<Event<DeserializeGuard<K>>> {
        let Some(shown) = self.watches.get_mut(of) else { return vec![] };
        match event {
            Event::Init => {
                shown.list = Some(BTreeSet::new());
                vec![]
            }
            Event::InitApply(object) => {
                if let Some(list) = &mut shown.list {
                    list.insert(object.name_any());
                }
                self.there(of, object)
            }
            Event::Apply(object) => self.there(of, object),
            Event::Delete(object) => {
                shown.known.remove(&object.name_any());
                self.gone(InvalidObject { error: String::new(), metadata: object.meta().clone() })
            }
            Event::InitDone => {
                let list = shown.list.take().unwrap_or_default();
                let (known, gone): (BTreeMap<_, _>, BTreeMap<_, _>) =
                    std::mem::take(&mut shown.known).into_iter().partition(|(name, _)| list.contains(name));
                shown.known = known;
                shown.done = true;
                let mut events: Vec<_> =
                    gone.into_iter().flat_map(|(name, identity)| self.gone(identity.husk(name))).collect();
                if !self.listed && self.watches.iter().all(|shown| shown.done) {
                    self.listed = true;
                    events.push(Event::InitDone);
                    let held_back = std::mem::take(&mut self.held_back);
                    events.extend(
                        held_back.into_values().map(|husk| Event::Delete(DeserializeGuard(Err(husk)))),
                    );
                }
                events
            }
        }
    }

    fn there<K: Resource>(
        &mut self,
        of: usize,
        object: DeserializeGuard<K>,
    ) -> Vec<Event<DeserializeGuard<K>>> {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        // It is there again.
        self.held_back.remove(&(namespace.clone(), name.clone()));
        if let Some(shown) = self.watches.get_mut(of) {
            shown.known.insert(name, Identity { namespace, uid: object.uid() });
        }
        vec![if self.listed { Event::Apply(object) } else { Event::InitApply(object) }]
    }

    fn gone<K: Resource>(&mut self, husk: InvalidObject) -> Vec<Event<DeserializeGuard<K>>> {
        if self.listed {
            return vec![Event::Delete(DeserializeGuard(Err(husk)))];
        }
        let of = |part: &Option<String>| part.clone().unwrap_or_default();
        self.held_back.insert((of(&husk.metadata.namespace), of(&husk.metadata.name)), husk);
        vec![]
    }
}

impl Identity {
    /// Enough of an object that is gone for those who hear of it.
    fn husk(self, name: String) -> InvalidObject {
        let metadata = ObjectMeta {
            name: Some(name),
            namespace: Some(self.namespace),
            uid: self.uid,
            ..ObjectMeta::default()
        };
        InvalidObject { error: String::new(), metadata }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::runtime::reflector::{self, Store};
    use proptest::prelude::*;

    use super::*;

    type Guarded = DeserializeGuard<ConfigMap>;

    #[test]
    fn one_list_for_all() {
        let mut merged = Merged::new(2);
        let mut words = |of, event| said(&merged.step(of, event));
        assert!(words(0, Event::Init).is_empty() && words(1, Event::Init).is_empty());
        assert_eq!(words(0, Event::InitApply(object("a", "x", 1))), ["listed a/x 1"]);
        assert!(words(0, Event::InitDone).is_empty());
        // The first is watching already while the second still lists.
        assert_eq!(words(0, Event::Apply(object("a", "y", 2))), ["listed a/y 2"]);
        assert!(words(0, Event::Delete(object("a", "x", 1))).is_empty());
        assert_eq!(words(1, Event::InitApply(object("b", "x", 3))), ["listed b/x 3"]);
        assert_eq!(words(1, Event::InitDone), ["done", "gone a/x 1"]);
        assert_eq!(words(1, Event::Apply(object("b", "x", 3))), ["changed b/x 3"]);

        // One of them lists again: nothing of the other's is gone by that.
        assert!(words(1, Event::Init).is_empty());
        assert_eq!(words(1, Event::InitApply(object("b", "z", 4))), ["changed b/z 4"]);
        assert_eq!(words(1, Event::InitDone), ["gone b/x 3"]);
        assert_eq!(words(0, Event::Delete(object("a", "y", 2))), ["gone a/y 2"]);
    }

    #[test]
    fn failures_and_a_single_watch_go_through() {
        let single = futures::stream::iter([Ok(Event::Init), Err(watcher::Error::NoResourceVersion)]);
        let events: Vec<watcher::Result<Event<Guarded>>> =
            merge(vec![single]).collect().now_or_never().unwrap();
        assert!(matches!(events[..], [Ok(Event::Init), Err(_)]));
        let broken = || futures::stream::iter([Err(watcher::Error::NoResourceVersion)]);
        let events: Vec<watcher::Result<Event<Guarded>>> =
            merge(vec![broken(), broken()]).collect().now_or_never().unwrap();
        assert!(matches!(events[..], [Ok(Event::Init), Err(_), Err(_)]));
    }

    /// What happens in one of three namespaces.
    #[derive(Clone, Debug)]
    enum Act {
        Put(u8),
        Remove(u8),
        /// The watch breaks; what happened since, it has not seen. It lists again.
        List,
    }

    proptest! {
        /// Whatever happens where, in the end a reader's store has what there is, and nobody saw a list end twice.
        #[test]
        fn the_store_has_what_there_is(
            acts in proptest::collection::vec((0_usize..3, prop_oneof![
                3 => (0_u8..4).prop_map(Act::Put),
                2 => (0_u8..4).prop_map(Act::Remove),
                1 => Just(Act::List),
            ], any::<bool>()), 0..60),
        ) {
            let (store, mut writer): (Store<ConfigMap>, _) = reflector::store();
            let mut merged = Merged::new(3);
            let mut there: Vec<BTreeMap<u8, u32>> = vec![BTreeMap::new(); 3];
            // Whether each has begun to watch, behind its first list.
            let mut watches = [false; 3];
            let mut ends = 0;
            let mut uid = 0;
            writer.apply_watcher_event(&Event::Init);
            let mut feed = |merged: &mut Merged, of: usize, event: Event<Guarded>| {
                for event in merged.step(of, event) {
                    ends += u32::from(matches!(event, Event::InitDone));
                    writer.apply_watcher_event(&plain(event));
                }
            };
            let relist = |merged: &mut Merged, of: usize, there: &BTreeMap<u8, u32>, feed: &mut dyn FnMut(&mut Merged, usize, Event<Guarded>)| {
                feed(merged, of, Event::Init);
                for (name, uid) in there {
                    feed(merged, of, Event::InitApply(object(NAMES[of], &name.to_string(), *uid)));
                }
                feed(merged, of, Event::InitDone);
            };
            for (of, act, is_missed) in acts {
                match act {
                    Act::Put(name) => {
                        uid += 1;
                        there[of].insert(name, uid);
                        if watches[of] && !is_missed {
                            feed(&mut merged, of, Event::Apply(object(NAMES[of], &name.to_string(), uid)));
                        }
                    }
                    Act::Remove(name) => {
                        if let Some(uid) = there[of].remove(&name)
                            && watches[of]
                            && !is_missed
                        {
                            feed(&mut merged, of, Event::Delete(object(NAMES[of], &name.to_string(), uid)));
                        }
                    }
                    Act::List => {
                        watches[of] = true;
                        relist(&mut merged, of, &there[of], &mut feed);
                    }
                }
            }
            for (of, there) in there.iter().enumerate() {
                relist(&mut merged, of, there, &mut feed);
            }
            let mut found: Vec<_> = store.state().iter().map(|one| said_of(&**one)).collect();
            found.sort();
            let mut wanted: Vec<_> = (0..3)
                .flat_map(|of| there[of].iter().map(move |(name, uid)| format!("{}/{name} {uid}", NAMES[of])))
                .collect();
            wanted.sort();
            prop_assert_eq!(found, wanted);
            prop_assert_eq!(ends, 1);
        }
    }

    const NAMES: [&str; 3] = ["a", "b", "c"];

    fn object(namespace: &str, name: &str, uid: u32) -> Guarded {
        let object =
            serde_json::json!({"metadata": {"namespace": namespace, "name": name, "uid": uid.to_string()}});
        serde_json::from_value(object).unwrap()
    }

    fn plain(event: Event<Guarded>) -> Event<ConfigMap> {
        let read = |guard: Guarded| {
            guard.0.unwrap_or_else(|invalid| ConfigMap { metadata: invalid.metadata, ..ConfigMap::default() })
        };
        match event {
            Event::Init => Event::Init,
            Event::InitApply(object) => Event::InitApply(read(object)),
            Event::InitDone => Event::InitDone,
            Event::Apply(object) => Event::Apply(read(object)),
            Event::Delete(object) => Event::Delete(read(object)),
        }
    }

    fn said(events: &[Event<Guarded>]) -> Vec<String> {
        let words = events.iter().map(|event| match event {
            Event::Init => "init".into(),
            Event::InitApply(object) => format!("listed {}", said_of(object)),
            Event::InitDone => "done".into(),
            Event::Apply(object) => format!("changed {}", said_of(object)),
            Event::Delete(object) => format!("gone {}", said_of(object)),
        });
        words.collect()
    }

    fn said_of<K: Resource>(object: &K) -> String {
        format!(
            "{}/{} {}",
            object.namespace().unwrap_or_default(),
            object.name_any(),
            object.uid().unwrap_or_default()
        )
    }
}
