//! What the server answers. Synchronous: time passes, connections break and watches flow elsewhere.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Failure;
use super::routes::{Route, Verb};
use super::selector::Selector;
use super::store::{Deletion, Key, Part, Store, Writer, merge};
use super::watch::Watch;

/// A watch for which the client names no end.
const LONGEST_WATCH: Duration = Duration::from_secs(3600);

/// Refuses objects that a client wants to create.
pub(crate) type Admission = Box<dyn Fn(&Key, &Value) -> Result<(), Failure> + Send>;

pub(crate) struct Server {
    store: Mutex<Store>,
    changed: watch::Sender<u64>,
    now: Box<dyn Fn() -> Timestamp + Send + Sync>,
    admission: Mutex<Option<Admission>>,
    /// Who writes an object's status, as server-side apply keeps it.
    owners: Mutex<BTreeMap<Key, String>>,
}

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) route: Route,
    pub(crate) client: u32,
    pub(crate) accept: String,
    pub(crate) content_type: String,
    pub(crate) body: Vec<u8>,
}

pub(crate) enum Answer {
    Object(u16, Value),
    /// These first, and then what the watch has to say.
    Watch(Watch, Vec<Value>),
}

impl Server {
    pub(crate) fn new(now: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self {
            store: Mutex::default(),
            changed: watch::Sender::new(0),
            now: Box::new(now),
            admission: Mutex::default(),
            owners: Mutex::default(),
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        (self.now)()
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("nobody panics with the store in hand")
    }

    /// Says each time the newest version.
    pub(crate) fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// What the cluster and its users do: no request, no rules.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut Store, Timestamp) -> T) -> T {
        let now = self.now();
        let mut store = self.store();
        let result = act(&mut store, now);
        let version = store.version();
        drop(store);
        self.changed.send_if_modified(|seen| std::mem::replace(seen, version) != version);
        result
    }

    pub(crate) fn admit(&self, admission: Admission) {
        *self.admission.lock().expect("no panic in between") = Some(admission);
    }

    /// Answers a request; a read, on wish, as of an earlier version.
    pub(crate) fn answer(&self, call: &Call, as_of: Option<u64>) -> Result<Answer, Failure> {
        let route = &call.route;
        if route.query("dryRun").is_some() {
            return Err(Failure::not_modelled("dry runs"));
        }
        match route.verb {
            Verb::Get => self.get(call, as_of),
            Verb::List => self.list(call, as_of),
            Verb::Watch => self.watch(call),
            Verb::Create => self.create(call),
            Verb::Replace => self.replace(call),
            Verb::Patch => self.patch(call),
            Verb::Delete => self.delete(call),
        }
    }

    fn get(&self, call: &Call, as_of: Option<u64>) -> Result<Answer, Failure> {
        let key = key(call)?;
        let store = self.store();
        let found = match as_of {
            Some(version) => store.get_at(&key, version),
            None => store.get(&key).cloned(),
        };
        let found = found.ok_or_else(|| Failure::not_found(&key))?;
        Ok(Answer::Object(200, projected(call, &found)))
    }

    fn list(&self, call: &Call, as_of: Option<u64>) -> Result<Answer, Failure> {
        let route = &call.route;
        let selector = selector(route)?;
        let store = self.store();
        let namespace = route.namespace.as_deref();
        let (objects, version) = match as_of {
            Some(version) => (store.list_at(route.kind, namespace, &selector, version), version),
            None => (store.list(route.kind, namespace, &selector), store.version()),
        };
        if route
            .query("limit")
            .and_then(|limit| limit.parse().ok())
            .is_some_and(|limit| objects.len() > limit)
        {
            return Err(Failure::not_modelled("lists of more than one page"));
        }
        let items: Vec<Value> = objects.iter().map(|object| projected(call, object)).collect();
        let (api_version, kind) = match metadata_only(call) {
            true => ("meta.k8s.io/v1".to_owned(), "PartialObjectMetadataList".to_owned()),
            false => (route.kind.api_version(), format!("{}List", route.kind.kind)),
        };
        let metadata = json!({"resourceVersion": version.to_string()});
        Ok(Answer::Object(
            200,
            json!({"apiVersion": api_version, "kind": kind, "metadata": metadata, "items": items}),
        ))
    }

    fn watch(&self, call: &Call) -> Result<Answer, Failure> {
        if metadata_only(call) {
            return Err(Failure::not_modelled("watches of metadata"));
        }
        let route = &call.route;
        let flag = |name| route.query(name) == Some("true");
        let store = self.store();
        let since = route.query("resourceVersion").unwrap_or_default();
        let from_now = matches!(since, "" | "0");
        let version = match from_now {
            true => store.version(),
            false => since.parse().map_err(|_| Failure::bad_request("invalid resource version"))?,
        };
        if version > store.version() {
            return Err(Failure::not_modelled("watches from a version that is still to come"));
        }
        let seconds = route.query("timeoutSeconds").and_then(|seconds| seconds.parse().ok());
        let watch = Watch {
            kind: route.kind,
            namespace: route.namespace.clone(),
            selector: selector(route)?,
            version,
            bookmarks: flag("allowWatchBookmarks"),
            timeout: seconds.map_or(LONGEST_WATCH, Duration::from_secs),
        };
        let initial = flag("sendInitialEvents");
        if initial && !from_now {
            return Err(Failure::not_modelled("initial events from a version"));
        }
        let mut first = vec![];
        if from_now {
            let objects = store.list(route.kind, route.namespace.as_deref(), &watch.selector);
            first.extend(objects.iter().map(|object| json!({"type": "ADDED", "object": &**object})));
        }
        if initial {
            first.push(watch.bookmark(version, true));
        }
        Ok(Answer::Watch(watch, first))
    }

    fn create(&self, call: &Call) -> Result<Answer, Failure> {
        let object = parsed(call)?;
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if name.is_empty() {
            return Err(Failure::not_modelled("names that the server makes"));
        }
        let namespace = call.route.namespace.clone().unwrap_or_default();
        let key = Key { kind: call.route.kind, namespace, name };
        if let Some(admission) = &*self.admission.lock().expect("no panic in between") {
            admission(&key, &object)?;
        }
        let made = self.with(|store, now| {
            if key.kind.namespaced && store.get(&Key::new("namespaces", "", &key.namespace)).is_none() {
                return Err(Failure::not_found(&Key::new("namespaces", "", &key.namespace)));
            }
            store.create(key, object, Writer::Client(call.client), now)
        })?;
        Ok(Answer::Object(201, (*made).clone()))
    }

    fn replace(&self, call: &Call) -> Result<Answer, Failure> {
        let key = key(call)?;
        let object = parsed(call)?;
        if call.route.part == Part::Status {
            return Err(Failure::not_modelled("a status that is replaced"));
        }
        let written =
            self.with(|store, now| store.write(&key, Part::Main, object, Writer::Client(call.client), now))?;
        Ok(Answer::Object(200, (*written).clone()))
    }

    fn patch(&self, call: &Call) -> Result<Answer, Failure> {
        let key = key(call)?;
        let patch = parsed(call)?;
        let (part, writer) = (call.route.part, Writer::Client(call.client));
        match (call.content_type.as_str(), part) {
            ("application/apply-patch+yaml", Part::Status) => {
                self.check_owner(call, &key)?;
                // The one manager owns all of it, so that what is not applied any more goes.
                let written = self.with(|store, now| store.write(&key, part, patch, writer, now))?;
                Ok(Answer::Object(200, (*written).clone()))
            }
            ("application/merge-patch+json", Part::Main) => {
                let written = self.with(|store, now| {
                    let current = store.get(&key).ok_or_else(|| Failure::not_found(&key))?;
                    let mut object = (**current).clone();
                    merge(&mut object, &patch);
                    store.write(&key, part, object, writer, now)
                })?;
                Ok(Answer::Object(200, (*written).clone()))
            }
            (kind, part) => Err(Failure::not_modelled(&format!("{kind} of {part:?}"))),
        }
    }

    fn check_owner(&self, call: &Call, key: &Key) -> Result<(), Failure> {
        let Some(manager) = call.route.query("fieldManager") else {
            return Err(Failure::no_manager());
        };
        let mut owners = self.owners.lock().expect("no panic in between");
        match owners.entry(key.clone()).or_insert_with(|| manager.to_owned()) == manager {
            true => Ok(()),
            false => Err(Failure::not_modelled("several managers of one status")),
        }
    }

    fn delete(&self, call: &Call) -> Result<Answer, Failure> {
        let key = key(call)?;
        let options = match call.body.is_empty() {
            true => Value::Null,
            false => parsed(call)?,
        };
        let text = |field: &str| options["preconditions"][field].as_str().map(str::to_owned);
        let deletion = Deletion {
            uid: text("uid"),
            version: text("resourceVersion"),
            grace_seconds: options["gracePeriodSeconds"].as_i64(),
        };
        let last = self.with(|store, now| store.delete(&key, &deletion, Writer::Client(call.client), now))?;
        // Kubernetes: pods say ReturnDeletedObject, custom resources do not.
        Ok(Answer::Object(
            200,
            match key.kind.graceful {
                true => (*last).clone(),
                false => json!({
                    "kind": "Status",
                    "apiVersion": "v1",
                    "metadata": {},
                    "status": "Success",
                    "details": {"name": key.name, "group": key.kind.group, "kind": key.kind.plural, "uid": last["metadata"]["uid"]},
                }),
            },
        ))
    }
}

fn key(call: &Call) -> Result<Key, Failure> {
    call.route.key().ok_or_else(|| Failure::bad_request("it has no name"))
}

fn selector(route: &Route) -> Result<Selector, Failure> {
    Selector::parse(route.query("labelSelector"), route.query("fieldSelector"))
}

fn parsed(call: &Call) -> Result<Value, Failure> {
    // Apply patches are YAML in general and JSON from kube.
    serde_json::from_slice(&call.body).map_err(|error| Failure::bad_request(&error.to_string()))
}

fn metadata_only(call: &Call) -> bool {
    call.accept.contains("as=PartialObjectMetadata")
}

fn projected(call: &Call, object: &Value) -> Value {
    match metadata_only(call) {
        true => {
            json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": object["metadata"]})
        }
        false => object.clone(),
    }
}
