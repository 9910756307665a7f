//! The cluster around the operator: a scheduler and a kubelet that take their time, builders in pods, users that do what a
//! scenario says. It lives outside of all operators and goes on when one is killed.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::AtomicU16;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use drover_cache::{CacheOptions, NarSpool};
use drover_nix::StorePath;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::double::store::{Deletion, Writer};
use crate::double::{Change, Key, Server};
use crate::time::Time;
use crate::traces::Spans;

pub(crate) const BUILDERS: &str = "drover-builders";
pub(crate) const TEAM: &str = "team";
pub(crate) const UID_LABEL: &str = "drover.build/request-uid";
pub(crate) const ATTEMPT_LABEL: &str = "drover.build/attempt";
pub(crate) const REQUEST_ANNOTATION: &str = "drover.build/request";

const BIND: SignedDuration = SignedDuration::from_millis(30);
const START: SignedDuration = SignedDuration::from_millis(700);
const REAP: SignedDuration = SignedDuration::from_millis(400);
/// No node has room for pods of requests that are called so.
pub(crate) const STUCK: &str = "stuck";
/// How long a build takes.
pub(crate) const BUILD: SignedDuration = SignedDuration::from_secs(20);

/// A user's or the cluster's deed: when it is time for it, how long after that, and what.
pub(crate) struct Step {
    pub(crate) when: fn(&World) -> bool,
    pub(crate) after: SignedDuration,
    pub(crate) act: fn(&World),
}

pub(crate) struct World {
    pub(crate) server: Arc<Server>,
    pub(crate) time: Arc<Time>,
    pub(crate) spans: Arc<Spans>,
    /// Of an operator that begins from here on.
    pub(crate) max_sessions: AtomicU16,
    cache: TempDir,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// How far the history was read.
    cursor: usize,
    /// By time and order of arrival.
    due: BTreeMap<(Timestamp, usize), Deed>,
    deeds: usize,
    /// By uid of the pod.
    builders: BTreeMap<String, Builder>,
    script: Vec<Option<Step>>,
    /// Pod and derivation of each build that was begun anew.
    starts: Vec<String>,
}

enum Deed {
    Bind(Key),
    Run(Key),
    Reap(Key),
    Act(fn(&World)),
}

/// A builder that runs, or ran.
#[derive(Default)]
struct Builder {
    /// Its build, and when that is done.
    build: Option<(StorePath, Timestamp)>,
    dead: bool,
}

/// What one hears of a builder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    NotYet,
    Lost,
    /// The build is done at this time.
    Until(Timestamp),
}

impl World {
    pub(crate) fn new(script: Vec<Step>) -> Arc<Self> {
        let time = Arc::new(Time::new());
        let clock = time.clone();
        let cache = tempfile::tempdir().expect("a directory for the cache");
        std::fs::write(cache.path().join("nix-cache-info"), "StoreDir: /nix/store\n").expect("a cache");
        let world = Self {
            server: Arc::new(Server::new(move || clock.now())),
            time,
            spans: Arc::default(),
            max_sessions: AtomicU16::new(1024),
            cache,
            state: Mutex::default(),
            changed: watch::Sender::new(0),
        };
        world.state().script = script.into_iter().map(Some).collect();
        for name in [BUILDERS, TEAM, "drover-system"] {
            world.make(Key::new("namespaces", "", name), json!({"metadata": {}}));
        }
        Arc::new(world)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic in between")
    }

    pub(crate) fn cache(&self) -> &Path {
        self.cache.path()
    }

    /// Pod and derivation of each build that was begun anew.
    pub(crate) fn starts(&self) -> Vec<String> {
        self.state().starts.clone()
    }

    /// A user makes an object.
    /// Puts a file into the cache as what this path names.
    pub(crate) fn keep_file(&self, path: &StorePath, contents: &[u8]) {
        let url = format!("file://{}", self.cache.path().display());
        let cache = drover_cache::open(&url, &CacheOptions::default()).expect("a cache");
        let nar = drover_serve::testing::file_nar(contents);
        let mut spool = NarSpool::new(self.cache.path(), []).expect("a place for an archive");
        spool.write_all(&nar).expect("an archive");
        let info = drover_serve::testing::info_of(path.clone(), &[], &nar);
        cache.put(&info, &spool.finish().expect("an archive")).expect("a cache that takes files");
    }

    pub(crate) fn make(&self, key: Key, object: Value) {
        self.server.with(|store, now| store.create(key, object, Writer::User, now)).expect("a new object");
    }

    pub(crate) fn request(&self, name: &str) -> Option<Arc<Value>> {
        self.server.store().get(&Key::new("buildrequests", TEAM, name)).cloned()
    }

    /// A user changes a request's spec.
    pub(crate) fn edit(&self, name: &str, field: &str, value: Value) {
        let key = Key::new("buildrequests", TEAM, name);
        self.server.with(|store, now| {
            store.change(&key, Writer::User, now, |request| request["spec"][field] = value);
        });
    }

    /// A user deletes a request.
    pub(crate) fn delete(&self, name: &str) {
        let key = Key::new("buildrequests", TEAM, name);
        self.server.with(|store, now| store.remove(&key, Writer::User, now));
    }

    /// Pods of a request, by its name, that are not about to go.
    pub(crate) fn pods_of(&self, request: &str) -> Vec<(Key, Arc<Value>)> {
        let store = self.server.store();
        let pods = store.list(Key::new("pods", "", "").kind, Some(BUILDERS), &Default::default());
        let of = format!("{TEAM}/{request}");
        let ours = pods.into_iter().filter(|pod| {
            pod["metadata"]["annotations"][REQUEST_ANNOTATION] == of.as_str()
                && pod["metadata"]["deletionTimestamp"].is_null()
        });
        ours.map(|pod| {
            (Key::new("pods", BUILDERS, pod["metadata"]["name"].as_str().unwrap_or_default()), pod)
        })
        .collect()
    }

    /// Whether a pod of this attempt of the request builds.
    pub(crate) fn builds(&self, request: &str, attempt: &str) -> bool {
        let pods = self.pods_of(request);
        let state = self.state();
        pods.iter().any(|(_, pod)| {
            let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
            pod["metadata"]["labels"][ATTEMPT_LABEL] == attempt
                && state.builders.get(uid).is_some_and(|builder| builder.build.is_some() && !builder.dead)
        })
    }

    /// The kubelet evicts the request's pods.
    pub(crate) fn evict(&self, request: &str) {
        let ended = json!({
            "phase": "Failed",
            "reason": "Evicted",
            "message": "The node had condition: [PIDPressure]. ",
            "containerStatuses": [{
                "name": "builder", "image": "i", "imageID": "i@sha256:1", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": 137, "reason": "Error"}},
            }],
        });
        for (key, pod) in self.pods_of(request) {
            self.kill(&pod);
            let ended = ended.clone();
            self.server.with(|store, now| {
                store.change(&key, Writer::Cluster, now, |pod| {
                    for (field, value) in ended.as_object().expect("an object") {
                        pod["status"][field] = value.clone();
                    }
                });
            });
        }
    }

    /// The pods of the request go without a trace, as after the loss of a node.
    pub(crate) fn lose(&self, request: &str) {
        for (key, pod) in self.pods_of(request) {
            self.kill(&pod);
            self.server.with(|store, now| store.remove(&key, Writer::Cluster, now));
        }
    }

    fn kill(&self, pod: &Value) {
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        self.state().builders.entry(uid).or_default().dead = true;
        self.tell();
    }

    fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Says each time that something of the builders has changed.
    pub(crate) fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether the builder in this pod is there.
    pub(crate) fn builder(&self, pod_uid: &str) -> Answer {
        let gone = {
            let store = self.server.store();
            let pods = store.list(Key::new("pods", "", "").kind, None, &Default::default());
            !pods.iter().any(|pod| pod["metadata"]["uid"] == pod_uid)
        };
        match self.state().builders.get(pod_uid) {
            Some(builder) if builder.dead => Answer::Lost,
            Some(_) => Answer::Until(self.time.now()),
            None if gone => Answer::Lost,
            None => Answer::NotYet,
        }
    }

    /// Asks the builder to build; one that does so already goes on.
    pub(crate) fn build(&self, pod_uid: &str, drv: &StorePath) -> Answer {
        let now = self.time.now();
        let mut state = self.state();
        let Some(builder) = state.builders.get_mut(pod_uid).filter(|builder| !builder.dead) else {
            return Answer::Lost;
        };
        if let Some((of, done)) = &builder.build {
            assert_eq!(of, drv, "a pod serves one derivation");
            return Answer::Until(*done);
        }
        let done = now + BUILD;
        builder.build = Some((drv.clone(), done));
        state.starts.push(format!("{drv} in {pod_uid}"));
        drop(state);
        self.tell();
        Answer::Until(done)
    }

    /// Does what is due, for ever.
    pub(crate) async fn drive(self: Arc<Self>) {
        let (mut objects, mut builders) = (self.server.changed(), self.changed());
        loop {
            let wait = match self.step() {
                Some(due) => Duration::try_from(due.duration_since(self.time.now())).unwrap_or_default(),
                None => Duration::from_secs(86_400),
            };
            // The clock of the runtime counts in milliseconds.
            let wait = wait + Duration::from_millis(1);
            tokio::select! {
                _ = objects.changed() => {}
                _ = builders.changed() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Everything that is due now; when the next is.
    fn step(&self) -> Option<Timestamp> {
        loop {
            let now = self.time.now();
            let news: Vec<Change> = {
                let store = self.server.store();
                let mut state = self.state();
                let news = store.history[state.cursor..].to_vec();
                state.cursor = store.history.len();
                news
            };
            for change in news.iter().filter(|change| change.key.kind.plural == "pods") {
                self.hear(change, now);
            }
            let count = self.state().script.len();
            for index in 0..count {
                let step = self.state().script[index].take();
                match step {
                    Some(step) if (step.when)(self) => self.plan(now + step.after, Deed::Act(step.act)),
                    step => self.state().script[index] = step,
                }
            }
            let mut state = self.state();
            let (&(due, nth), _) = state.due.first_key_value()?;
            if due > now {
                return Some(due);
            }
            let deed = state.due.remove(&(due, nth));
            drop(state);
            if let Some(deed) = deed {
                self.perform(deed);
            }
        }
    }

    fn plan(&self, due: Timestamp, deed: Deed) {
        let mut state = self.state();
        state.deeds += 1;
        let key = (due, state.deeds);
        state.due.insert(key, deed);
    }

    fn hear(&self, change: &Change, now: Timestamp) {
        let key = change.key.clone();
        let deleting = |object: &Option<Arc<Value>>| {
            object.as_ref().is_some_and(|object| !object["metadata"]["deletionTimestamp"].is_null())
        };
        match (&change.before, &change.after) {
            (None, Some(_)) => self.plan(now + BIND, Deed::Bind(key)),
            (Some(pod), None) => self.kill(pod),
            (Some(pod), Some(_)) if deleting(&change.after) && !deleting(&change.before) => {
                self.kill(pod);
                self.plan(now + REAP, Deed::Reap(key));
            }
            _ => {}
        }
    }

    fn perform(&self, deed: Deed) {
        match deed {
            Deed::Bind(key) => {
                let now = self.time.now();
                if key.name.starts_with(STUCK) {
                    self.server.with(|store, now| {
                        store.change(&key, Writer::Cluster, now, |pod| {
                            pod["status"]["conditions"] = json!([{
                                "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                                "message": "0/1 nodes are available", "lastTransitionTime": now.to_string(),
                            }]);
                        });
                    });
                    return;
                }
                self.server.with(|store, now| {
                    store.change(&key, Writer::Cluster, now, |pod| {
                        pod["spec"]["nodeName"] = "n1".into();
                        pod["status"]["conditions"] = json!([{
                            "type": "PodScheduled", "status": "True", "lastTransitionTime": now.to_string(),
                        }]);
                    });
                });
                self.plan(now + START, Deed::Run(key));
            }
            Deed::Run(key) => {
                let pod = self.server.store().get(&key).cloned();
                let Some(pod) = pod.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()) else {
                    return;
                };
                self.server.with(|store, now| {
                    store.change(&key, Writer::Cluster, now, |pod| {
                        let status = &mut pod["status"];
                        status["phase"] = "Running".into();
                        status["podIP"] = "10.0.0.1".into();
                        status["containerStatuses"] = json!([{
                            "name": "builder", "image": "i", "imageID": "i@sha256:1", "ready": true, "restartCount": 0,
                            "state": {"running": {"startedAt": now.to_string()}},
                        }]);
                    });
                });
                let uid = pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
                self.state().builders.entry(uid).or_default();
                self.tell();
            }
            Deed::Reap(key) => {
                let at_once = Deletion { grace_seconds: Some(0), ..Deletion::default() };
                // Somebody else may have been first.
                let _ = self.server.with(|store, now| store.delete(&key, &at_once, Writer::Cluster, now));
            }
            Deed::Act(act) => act(self),
        }
    }
}
