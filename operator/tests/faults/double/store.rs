//! Objects, their versions, and everything that ever happened to them.
//!
//! One counter of versions for all objects, as etcd has. The history is never cut: it answers watches, reads of the
//! past, and the audit of what a run did.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

use super::Failure;
use super::selector::Selector;

/// A kind of object that the double serves.
#[derive(PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Kind {
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) namespaced: bool,
    /// A deletion answers with the object, and may take its time (pods).
    pub(crate) graceful: bool,
    /// It has a status that is written by itself only.
    pub(crate) status: bool,
}

pub(crate) static KINDS: [Kind; 7] = [
    kind("drover.build", "v1alpha1", "buildrequests", "BuildRequest", true, false, true),
    kind("drover.build", "v1alpha1", "builderclasses", "BuilderClass", false, false, false),
    kind("", "v1", "pods", "Pod", true, true, true),
    kind("", "v1", "secrets", "Secret", true, false, false),
    kind("", "v1", "namespaces", "Namespace", false, false, true),
    kind("coordination.k8s.io", "v1", "leases", "Lease", true, false, false),
    kind("events.k8s.io", "v1", "events", "Event", true, false, false),
];

const fn kind(
    group: &'static str,
    version: &'static str,
    plural: &'static str,
    kind: &'static str,
    namespaced: bool,
    graceful: bool,
    status: bool,
) -> Kind {
    Kind { group, version, plural, kind, namespaced, graceful, status }
}

impl Kind {
    pub(crate) fn of(plural: &str) -> &'static Self {
        KINDS.iter().find(|kind| kind.plural == plural).expect("a kind of the table")
    }

    pub(crate) fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }
}

/// Where an object is. The namespace of a cluster-scoped one is empty.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Key {
    pub(crate) kind: &'static Kind,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(plural: &str, namespace: &str, name: &str) -> Self {
        Self { kind: Kind::of(plural), namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// As API servers name it in messages.
    pub(crate) fn resource(&self) -> String {
        match self.kind.group {
            "" => self.kind.plural.to_owned(),
            group => format!("{}.{group}", self.kind.plural),
        }
    }
}

/// Who made a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Writer {
    User,
    /// Scheduler, kubelet and their like.
    Cluster,
    /// A client by HTTP, with the number that it was given.
    Client(u32),
}

/// One step of the history: a creation has no `before`, a deletion no `after`.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) version: u64,
    pub(crate) at: Timestamp,
    pub(crate) writer: Writer,
    pub(crate) key: Key,
    pub(crate) before: Option<Arc<Value>>,
    pub(crate) after: Option<Arc<Value>>,
}

/// Preconditions and wishes of a deletion.
#[derive(Clone, Default, Debug)]
pub(crate) struct Deletion {
    pub(crate) uid: Option<String>,
    pub(crate) version: Option<String>,
    pub(crate) grace_seconds: Option<i64>,
}

/// What a write replaces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    /// All but the status, of kinds whose status is written by itself.
    Main,
    Status,
}

#[derive(Default)]
pub(crate) struct Store {
    version: u64,
    objects: BTreeMap<Key, Arc<Value>>,
    pub(crate) history: Vec<Change>,
    uids: u64,
}

impl Store {
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Value>> {
        self.objects.get(key)
    }

    /// The object as it was at a version.
    pub(crate) fn get_at(&self, key: &Key, version: u64) -> Option<Arc<Value>> {
        let then =
            self.history.iter().rev().find(|change| change.key == *key && change.version <= version)?;
        then.after.clone()
    }

    /// By namespace and name; from all namespaces if none is given.
    pub(crate) fn list(
        &self,
        kind: &'static Kind,
        namespace: Option<&str>,
        selector: &Selector,
    ) -> Vec<Arc<Value>> {
        let of = |key: &Key| key.kind == kind && namespace.is_none_or(|namespace| key.namespace == namespace);
        let matching = self.objects.iter().filter(|(key, object)| of(key) && selector.matches(object));
        matching.map(|(_, object)| object.clone()).collect()
    }

    /// The list as it was at a version.
    pub(crate) fn list_at(
        &self,
        kind: &'static Kind,
        namespace: Option<&str>,
        selector: &Selector,
        version: u64,
    ) -> Vec<Arc<Value>> {
        let mut objects = BTreeMap::new();
        for change in self.history.iter().filter(|change| change.version <= version) {
            let key = &change.key;
            if key.kind == kind && namespace.is_none_or(|namespace| key.namespace == namespace) {
                objects.insert(key, change.after.clone());
            }
        }
        objects.into_values().flatten().filter(|object| selector.matches(object)).collect()
    }

    pub(crate) fn create(
        &mut self,
        key: Key,
        mut object: Value,
        writer: Writer,
        now: Timestamp,
    ) -> Result<Arc<Value>, Failure> {
        if self.objects.contains_key(&key) {
            return Err(Failure::already_exists(&key));
        }
        if !object["metadata"]["resourceVersion"].is_null() {
            return Err(Failure::version_in_creation());
        }
        self.uids += 1;
        let metadata = &mut object["metadata"];
        metadata["name"] = key.name.clone().into();
        if key.kind.namespaced {
            metadata["namespace"] = key.namespace.clone().into();
        }
        metadata["uid"] = format!("{:08x}-0000-4000-8000-000000000000", self.uids).into();
        metadata["creationTimestamp"] = seconds(now).into();
        metadata["generation"] = 1.into();
        remove(metadata, "deletionTimestamp");
        object["apiVersion"] = key.kind.api_version().into();
        object["kind"] = key.kind.kind.into();
        if key.kind.status {
            // What the definition's own default says, whatever was sent.
            object["status"] = json!({"observedGeneration": -1});
        }
        if key.kind.plural == "pods" {
            object["status"] = json!({"phase": "Pending", "qosClass": "Burstable"});
        }
        Ok(self.put(key, object, writer, now))
    }

    /// Replaces a part of the object that is there. An equal one is no change and gets no version.
    pub(crate) fn write(
        &mut self,
        key: &Key,
        part: Part,
        mut next: Value,
        writer: Writer,
        now: Timestamp,
    ) -> Result<Arc<Value>, Failure> {
        let current = self.objects.get(key).ok_or_else(|| Failure::not_found(key))?.clone();
        let given = &next["metadata"];
        // A status is written with the metadata that are there; only the version counts.
        let wrong = given["uid"].is_string() && given["uid"] != current["metadata"]["uid"];
        if part == Part::Main && wrong {
            let why = format!(
                "Precondition failed: UID in precondition: {}, UID in object meta: {}",
                text(&given["uid"]),
                text(&current["metadata"]["uid"])
            );
            return Err(Failure::conflict(key, &why));
        }
        let version = &given["resourceVersion"];
        if version.as_str().is_some_and(|version| !version.is_empty())
            && *version != current["metadata"]["resourceVersion"]
        {
            return Err(Failure::outdated(key));
        }
        let mut object = (*current).clone();
        match part {
            Part::Status => object["status"] = next["status"].take(),
            Part::Main => {
                let mut metadata = next["metadata"].take();
                for field in
                    ["uid", "resourceVersion", "creationTimestamp", "generation", "namespace", "name"]
                {
                    metadata[field] = current["metadata"][field].clone();
                }
                for field in ["deletionTimestamp", "deletionGracePeriodSeconds"] {
                    match current["metadata"].get(field) {
                        Some(value) => metadata[field] = value.clone(),
                        None => remove(&mut metadata, field),
                    }
                }
                next["metadata"] = metadata;
                if key.kind.status {
                    match current.get("status") {
                        Some(status) => next["status"] = status.clone(),
                        None => remove(&mut next, "status"),
                    }
                }
                for field in ["apiVersion", "kind"] {
                    next[field] = current[field].clone();
                }
                if next.get("spec") != current.get("spec") {
                    let generation = current["metadata"]["generation"].as_i64().unwrap_or(0);
                    next["metadata"]["generation"] = (generation + 1).into();
                }
                object = next;
            }
        }
        if object == *current {
            return Ok(current);
        }
        Ok(self.put(key.clone(), object, writer, now))
    }

    /// Changes an object past all rules, as the cluster's own parts and users with `kubectl edit` do. Nothing if it is
    /// gone.
    pub(crate) fn change(
        &mut self,
        key: &Key,
        writer: Writer,
        now: Timestamp,
        change: impl FnOnce(&mut Value),
    ) {
        let Some(current) = self.objects.get(key).cloned() else { return };
        let mut object = (*current).clone();
        change(&mut object);
        if object == *current {
            return;
        }
        if object.get("spec") != current.get("spec") {
            let generation = current["metadata"]["generation"].as_i64().unwrap_or(0);
            object["metadata"]["generation"] = (generation + 1).into();
        }
        self.put(key.clone(), object, writer, now);
    }

    /// Deletes the object, or, if it is a pod that runs, begins to: then it is the kubelet that removes it in the end.
    pub(crate) fn delete(
        &mut self,
        key: &Key,
        deletion: &Deletion,
        writer: Writer,
        now: Timestamp,
    ) -> Result<Arc<Value>, Failure> {
        let current = self.objects.get(key).ok_or_else(|| Failure::not_found(key))?.clone();
        let metadata = &current["metadata"];
        let asked = [("uid", &deletion.uid), ("resourceVersion", &deletion.version)];
        for (field, wanted) in asked {
            if let Some(wanted) = wanted
                && metadata[field] != wanted.as_str()
            {
                let why = format!(
                    "Precondition failed: {field} in precondition: {wanted}, {field} in object meta: {}",
                    text(&metadata[field])
                );
                return Err(Failure::conflict(key, &why));
            }
        }
        if metadata["finalizers"].as_array().is_some_and(|finalizers| !finalizers.is_empty()) {
            return Err(Failure::not_modelled("deletion of an object with finalizers"));
        }
        // Kubernetes: pkg/registry/core/pod/strategy.go, CheckGracefulDelete.
        let over = matches!(current["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        let grace = match key.kind.graceful && current["spec"]["nodeName"].is_string() && !over {
            true => deletion
                .grace_seconds
                .or_else(|| current["spec"]["terminationGracePeriodSeconds"].as_i64())
                .unwrap_or(30),
            false => 0,
        };
        if !key.kind.graceful {
            self.remove(key, writer, now);
            return Ok(current);
        }
        if grace > 0 && metadata["deletionGracePeriodSeconds"].as_i64().is_some_and(|before| before <= grace)
        {
            return Ok(current);
        }
        let mut object = (*current).clone();
        let due = now + SignedDuration::from_secs(grace);
        object["metadata"]["deletionTimestamp"] = seconds(due).into();
        object["metadata"]["deletionGracePeriodSeconds"] = grace.into();
        let generation = metadata["generation"].as_i64().unwrap_or(0);
        object["metadata"]["generation"] = (generation + 1).into();
        let object = self.put(key.clone(), object, writer, now);
        if grace == 0 {
            // Watches see both.
            self.remove(key, writer, now);
        }
        Ok(object)
    }

    /// Takes the object away at once. Nothing if it is gone.
    pub(crate) fn remove(&mut self, key: &Key, writer: Writer, now: Timestamp) {
        if let Some(before) = self.objects.remove(key) {
            self.version += 1;
            let (version, key) = (self.version, key.clone());
            self.history.push(Change { version, at: now, writer, key, before: Some(before), after: None });
        }
    }

    fn put(&mut self, key: Key, mut object: Value, writer: Writer, now: Timestamp) -> Arc<Value> {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let object = Arc::new(object);
        let before = self.objects.insert(key.clone(), object.clone());
        let (version, after) = (self.version, Some(object.clone()));
        self.history.push(Change { version, at: now, writer, key, before, after });
        object
    }
}

/// RFC 7386.
pub(crate) fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = Value::Object(Map::new());
    }
    for (key, value) in patch {
        match value {
            Value::Null => remove(into, key),
            value => merge(&mut into[key.as_str()], value),
        }
    }
}

/// Objects have times in whole seconds.
pub(crate) fn seconds(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).expect("a time within its range").to_string()
}

fn remove(object: &mut Value, field: &str) {
    if let Some(object) = object.as_object_mut() {
        object.remove(field);
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
