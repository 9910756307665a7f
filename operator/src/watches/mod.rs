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

use crate::health::{Health, Source};
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
        (store, kept.inspect(self.mark(Watch::Requests)).touched_objects())
    }

    /// All builder pods, while the future is polled; the request of each that changes is asked to be looked at.
    pub fn pods(&self, namespace: &str) -> (Store<Pod>, impl Future<Output = ()> + Send + use<>) {
        let api: Api<DeserializeGuard<Pod>> = Api::namespaced(self.client.clone(), namespace);
        let (store, writer) = reflector::store();
        let events = watch(api, config().labels(pod::UID_LABEL)).default_backoff();
        let events = events.inspect(self.note(Watch::Pods.into()));
        let events = readable(events, self.unreadable(Watch::Pods), |_| {});
        let kept = reflector::reflector(writer, events.modify(strip::pod));
        let changes = kept.inspect(self.mark(Watch::Pods)).touched_objects();
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
        let events = watch(api, config()).default_backoff().inspect(self.note(Watch::Classes.into()));
        let events = readable(events, self.unreadable(Watch::Classes), |_| {});
        let events = events.modify(|class: &mut BuilderClass| strip::metadata(&mut class.metadata));
        let kept = reflector::reflector(writer, events);
        let changes = kept.inspect(self.mark(Watch::Classes)).touched_objects();
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
        self.health.watch_delivered(&Watch::Classes.into(), true);
        store
    }

    fn everywhere(
        &self,
        namespaces: &[String],
    ) -> impl Stream<Item = watcher::Result<Event<DeserializeGuard<BuildRequest>>>> + Send + use<> {
        let watches = of_requests(namespaces).into_iter().map(|source| {
            let api: Api<DeserializeGuard<BuildRequest>> = match &source.namespace {
                None => Api::all(self.client.clone()),
                Some(one) => Api::namespaced(self.client.clone(), one),
            };
            watch(api, config()).default_backoff().inspect(self.note(source)).boxed()
        });
        merge::merge(watches.collect())
    }

    pub fn unreadable(&self, watch: Watch) -> Arc<Unreadable> {
        Arc::new(Unreadable::new(watch, self.metrics.clone()))
    }

    /// Says how this connection does. For the stream as it comes, before several become one.
    fn note<K>(&self, source: Source) -> impl FnMut(&watcher::Result<Event<K>>) + Send + use<K> {
        let health = self.health.clone();
        move |event| match event {
            // The answer to a list may still not come to its end.
            Ok(Event::Init) => {}
            Ok(event) => health.watch_delivered(&source, matches!(event, Event::InitDone)),
            Err(_) => health.watch_failed(&source),
        }
    }

    /// Marks the watch as ready when its first list is in the store. For the stream behind the reflector.
    fn mark<K>(&self, watch: Watch) -> impl FnMut(&watcher::Result<Event<K>>) + Send + use<K> {
        let ready = self.ready.clone();
        move |event| {
            if let Ok(Event::InitDone) = event {
                ready.mark(watch);
            }
        }
    }
}

/// All connections of all watches, as `/readyz` lists them.
pub fn sources(namespaces: &[String]) -> Vec<Source> {
    let others = [Watch::Classes, Watch::Pods].map(Source::from);
    others.into_iter().chain(of_requests(namespaces)).collect()
}

/// One for each of these namespaces, or one for all if there are none.
fn of_requests(namespaces: &[String]) -> Vec<Source> {
    match namespaces {
        [] => vec![Watch::Requests.into()],
        some => {
            some.iter().map(|one| Source { watch: Watch::Requests, namespace: Some(one.clone()) }).collect()
        }
    }
}

fn config() -> watcher::Config {
    watcher::Config::default().page_size(PAGE)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use futures::channel::mpsc::unbounded;
    use kube::client::Body;

    use super::*;

    /// One namespace answers and one refuses: what is asked for, and what `/readyz` says of it.
    #[tokio::test]
    async fn each_namespace_is_asked_for_and_answers_for_itself() {
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let server = {
            let asked = asked.clone();
            tower::service_fn(move |request: hyper::Request<Body>| {
                let path = request.uri().path().to_owned();
                asked.lock().unwrap().push(path.clone());
                let (code, body) = match path.contains("/bad/") {
                    true => (403, r#"{"kind":"Status","apiVersion":"v1","status":"Failure","code":403}"#),
                    false => (200, r#"{"metadata":{"resourceVersion":"1"},"items":[]}"#),
                };
                let mut response = hyper::Response::new(Body::from(body.as_bytes().to_vec()));
                *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap();
                async move { Ok::<_, std::io::Error>(response) }
            })
        };
        let watches = Watches {
            client: Client::new(server, "default"),
            ready: Arc::default(),
            health: Arc::default(),
            metrics: Arc::default(),
            trigger: unbounded().0,
        };
        let namespaces = ["bad".to_owned(), "good".to_owned()];
        watches.health.lease_unused();
        watches.health.watches_begin(sources(&namespaces));
        let failing = || -> Vec<String> {
            let checks = watches.health.ready(Instant::now());
            checks.iter().filter(|check| check.result.is_err()).map(|check| check.name.to_string()).collect()
        };
        let all = ["watch-classes", "watch-pods", "watch-requests/bad", "watch-requests/good"];
        assert_eq!(failing(), all);
        let mut events = Box::pin(watches.everywhere(&namespaces));
        let until = async {
            while failing().iter().any(|name| name.ends_with("/good")) {
                assert!(events.next().await.is_some(), "a watch has no end");
            }
        };
        tokio::time::timeout(Duration::from_secs(30), until).await.expect("one of them lists");
        assert_eq!(failing(), &all[..3]);
        let asked: Vec<String> = asked.lock().unwrap().clone();
        for one in ["bad", "good"] {
            let path = format!("/apis/drover.build/v1alpha1/namespaces/{one}/buildrequests");
            assert!(asked.contains(&path), "{asked:?}");
        }
        assert_eq!(of_requests(&[]), [Source::from(Watch::Requests)]);
    }
}
