//! What the operator keeps of the cluster: [`readable`] objects, cut down by [`strip`] to what it needs; and whom it tells of
//! their changes.

pub mod readable;
pub mod strip;

use std::future;
use std::sync::Arc;

use drover_api::{BuildRequest, BuilderClass, conditions};
use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch};
use kube::{Api, Client};

use crate::health::Health;
use crate::metrics::Metrics;
use crate::observe::request_of;
use crate::pod;
use crate::queue::Queue;
use crate::ready::{Ready, Watch};
use crate::session::Trigger;
use readable::{Unreadable, readable};

/// Objects in one answer while a watch lists what there is: what is held twice in memory at that moment.
const PAGE: u32 = 100;

/// What every watch needs.
#[derive(Clone)]
pub struct Watches {
    pub client: Client,
    pub ready: Arc<Ready>,
    pub health: Arc<Health>,
    pub metrics: Arc<Metrics>,
    pub trigger: Trigger,
}

impl Watches {
    /// All requests, and each one that changes or goes. The queue hears of it before anybody else does, and of all of it.
    pub fn requests(
        &self,
        queue: Arc<Queue>,
        unreadable: Arc<Unreadable>,
    ) -> (Store<BuildRequest>, impl Stream<Item = watcher::Result<BuildRequest>> + Send + use<>) {
        let api: Api<DeserializeGuard<BuildRequest>> = Api::all(self.client.clone());
        let (store, writer) = reflector::store();
        let poisoned = queue.clone();
        let events = watch(api, config()).default_backoff();
        let events = readable(events, unreadable, move |uid| poisoned.unreadable(uid));
        let events = events.inspect(move |event| {
            if let Ok(event) = event {
                queue.note(event);
            }
        });
        let kept = reflector::reflector(writer, events.modify(strip::request));
        (store, kept.inspect(self.note(Watch::Requests)).touched_objects())
    }

    /// All builder pods, while the future is polled; the request of each that changes is asked to be looked at.
    pub fn pods(&self, namespace: &str) -> (Store<Pod>, impl Future<Output = ()> + Send + use<>) {
        let api: Api<DeserializeGuard<Pod>> = Api::namespaced(self.client.clone(), namespace);
        let (store, writer) = reflector::store();
        let events = watch(api, config().labels(pod::UID_LABEL)).default_backoff();
        let events = readable(events, self.unreadable(Watch::Pods), |_| {});
        let kept = reflector::reflector(writer, events.modify(strip::pod));
        let changes = kept.inspect(self.note(Watch::Pods)).touched_objects();
        let trigger = self.trigger.clone();
        let told = changes.for_each(move |pod| {
            match pod {
                Ok(pod) => {
                    if let Some(request) = request_of(&pod) {
                        let _ = trigger.unbounded_send(request);
                    }
                }
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "watching pods"),
            }
            future::ready(())
        });
        (store, told)
    }

    /// All classes, while the future is polled. A change of one concerns every request that has not come to its end.
    pub fn classes(
        &self,
        requests: Store<BuildRequest>,
    ) -> (Store<BuilderClass>, impl Future<Output = ()> + Send + use<>) {
        let api: Api<DeserializeGuard<BuilderClass>> = Api::all(self.client.clone());
        let (store, writer) = reflector::store();
        let events = watch(api, config()).default_backoff();
        let events = readable(events, self.unreadable(Watch::Classes), |_| {});
        let events = events.modify(|class: &mut BuilderClass| strip::metadata(&mut class.metadata));
        let kept = reflector::reflector(writer, events);
        let changes = kept.inspect(self.note(Watch::Classes)).touched_objects();
        let trigger = self.trigger.clone();
        let told = changes.for_each(move |class| {
            match class {
                Ok(_) => {
                    for request in requests.state() {
                        let status = request.status.as_ref();
                        if status.and_then(|status| conditions::verdict(&status.conditions)).is_none() {
                            let _ = trigger.unbounded_send(ObjectRef::from_obj(&*request));
                        }
                    }
                }
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "watching classes"),
            }
            future::ready(())
        });
        (store, told)
    }

    pub fn unreadable(&self, watch: Watch) -> Arc<Unreadable> {
        Arc::new(Unreadable::new(watch, self.metrics.clone()))
    }

    /// Marks the watch as ready when its first list is in the store, and says how it does. For the stream behind the reflector.
    fn note<K>(&self, watch: Watch) -> impl FnMut(&watcher::Result<Event<K>>) + Send + use<K> {
        let (ready, health) = (self.ready.clone(), self.health.clone());
        move |event| match event {
            // The answer to a list may still not come to its end.
            Ok(Event::Init) => {}
            Ok(event) => {
                let listed = matches!(event, Event::InitDone);
                if listed {
                    ready.mark(watch);
                }
                health.watch_delivered(watch, listed);
            }
            Err(_) => health.watch_failed(watch),
        }
    }
}

fn config() -> watcher::Config {
    watcher::Config::default().page_size(PAGE)
}
