//! What the operator keeps of the cluster: [`readable`] objects, cut down by [`strip`] to what it needs; and whom it tells of
//! their changes.

mod merge;
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
    /// All requests of these namespaces, or of all if there are none; and each one that changes or goes. The queue hears of it before anybody else does, and of all of it.
    pub fn requests(
        &self,
        namespaces: &[String],
        queue: Arc<Queue>,
        unreadable: Arc<Unreadable>,
    ) -> (Store<BuildRequest>, impl Stream<Item = watcher::Result<BuildRequest>> + Send + use<>) {
        let (store, writer) = reflector::store();
        let poisoned = queue.clone();
        let events = self.everywhere(namespaces);
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

    /// These classes and no others, ever.
    pub fn given(&self, classes: &[BuilderClass]) -> Store<BuilderClass> {
        let (store, mut writer) = reflector::store();
        let list = classes.iter().cloned().map(Event::InitApply);
        for event in std::iter::once(Event::Init).chain(list).chain([Event::InitDone]) {
            writer.apply_watcher_event(&event);
        }
        self.ready.mark(Watch::Classes);
        self.health.watch_delivered(Watch::Classes, true);
        store
    }

    fn everywhere(
        &self,
        namespaces: &[String],
    ) -> impl Stream<Item = watcher::Result<Event<DeserializeGuard<BuildRequest>>>> + Send + use<> {
        merge::merge(
            self.of_requests(namespaces)
                .into_iter()
                .map(|api| watch(api, config()).default_backoff().boxed())
                .collect(),
        )
    }

    fn of_requests(&self, namespaces: &[String]) -> Vec<Api<DeserializeGuard<BuildRequest>>> {
        match namespaces {
            [] => vec![Api::all(self.client.clone())],
            some => some.iter().map(|one| Api::namespaced(self.client.clone(), one)).collect(),
        }
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

#[cfg(test)]
mod tests {
    use futures::channel::mpsc::unbounded;
    use kube::client::Body;

    use super::*;

    #[tokio::test]
    async fn only_namespaces_that_are_watched_are_asked_for() {
        let nobody = tower::service_fn(async |_: hyper::Request<Body>| {
            Ok::<_, std::io::Error>(hyper::Response::new(Body::empty()))
        });
        let watches = Watches {
            client: Client::new(nobody, "default"),
            ready: Arc::default(),
            health: Arc::default(),
            metrics: Arc::default(),
            trigger: unbounded().0,
        };
        let asked = |namespaces: &[String]| -> Vec<String> {
            watches.of_requests(namespaces).iter().map(|api| api.resource_url().to_owned()).collect()
        };
        assert_eq!(asked(&[]), ["/apis/drover.build/v1alpha1/buildrequests"]);
        assert_eq!(
            asked(&["a".into(), "b".into()]),
            ["a", "b"].map(|one| format!("/apis/drover.build/v1alpha1/namespaces/{one}/buildrequests"))
        );
    }
}
