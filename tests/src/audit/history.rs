//! What became of each request and of each builder pod, put together from the events of the log.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::Value;

use super::{Event, GROUP, Rules};

/// All that the log shows of requests, pods and the lease.
#[derive(Debug, Default)]
pub struct History {
    /// By uid.
    pub requests: BTreeMap<String, Request>,
    pub pods: Vec<Pod>,
    /// Successful writes of the operator's lease, in their order.
    pub leases: Vec<Lease>,
}

#[derive(Clone, Debug, Default)]
pub struct Request {
    pub namespace: String,
    pub name: String,
    pub spec: Value,
    /// Successful writes of its status, in their order.
    pub statuses: Vec<StatusWrite>,
    pub deleted: Option<Timestamp>,
}

#[derive(Clone, Debug)]
pub struct StatusWrite {
    pub received: Timestamp,
    /// The object's version behind it; versions of one etcd only grow.
    pub version: u64,
    pub user: String,
    pub status: Value,
}

#[derive(Clone, Debug)]
pub struct Pod {
    pub uid: String,
    pub name: String,
    /// The request's uid and the attempt's number, by the pod's labels.
    pub request: String,
    pub attempt: String,
    /// `namespace/name` of the request, by the pod's annotation.
    pub annotation: String,
    pub user: String,
    /// When the API server had the request for it.
    pub created: Timestamp,
    /// When it was gone, and not only asked to go.
    pub gone: Option<Timestamp>,
}

#[derive(Clone, Debug)]
pub struct Lease {
    pub received: Timestamp,
    pub holder: String,
    pub seconds: i64,
}

impl History {
    /// `events` may be in any order.
    pub fn new(events: &[Event], rules: &Rules) -> Self {
        let mut this = Self::default();
        for event in events.iter().filter(|event| event.writes() && event.succeeded()) {
            if event.group == GROUP && event.resource.starts_with("buildrequests") {
                this.note_request(event);
            } else if event.is("", "pods") && event.namespace == rules.builders {
                this.note_pod(event);
            } else if event.is("coordination.k8s.io", "leases") && event.namespace == rules.namespace {
                this.note_lease(event);
            }
        }
        // A pod's end may stand before its beginning where two answers overlap.
        for event in events.iter().filter(|event| event.succeeded()) {
            this.note_end(event, rules);
        }
        for request in this.requests.values_mut() {
            request.statuses.sort_by_key(|write| write.version);
        }
        this.pods.sort_by_key(|pod| pod.created);
        this.leases.sort_by_key(|lease| lease.received);
        this
    }

    fn note_request(&mut self, event: &Event) {
        let object = &event.response;
        match event.verb.as_str() {
            // A custom resource without finalizers is gone with the answer, which is a Status.
            "delete" => {
                let uid = object["details"]["uid"].as_str().or_else(|| object["metadata"]["uid"].as_str());
                if let Some(uid) = uid {
                    self.requests.entry(uid.to_owned()).or_default().deleted.get_or_insert(event.done);
                }
            }
            "deletecollection" => {
                for item in object["items"].as_array().into_iter().flatten() {
                    let request = self.know(item);
                    request.deleted.get_or_insert(event.done);
                }
            }
            _ => {
                let version = text(&object["metadata"]["resourceVersion"]).parse().unwrap_or(0);
                let request = self.know(object);
                if event.resource == "buildrequests/status" {
                    request.statuses.push(StatusWrite {
                        received: event.received,
                        version,
                        user: event.user.clone(),
                        status: object["status"].clone(),
                    });
                }
            }
        }
    }

    fn know(&mut self, object: &Value) -> &mut Request {
        let metadata = &object["metadata"];
        let request = self.requests.entry(text(&metadata["uid"])).or_default();
        request.namespace = text(&metadata["namespace"]);
        request.name = text(&metadata["name"]);
        request.spec = object["spec"].clone();
        request
    }

    fn note_pod(&mut self, event: &Event) {
        if event.verb != "create" {
            return;
        }
        let metadata = &event.response["metadata"];
        self.pods.push(Pod {
            uid: text(&metadata["uid"]),
            name: text(&metadata["name"]),
            request: text(&metadata["labels"]["drover.build/request-uid"]),
            attempt: text(&metadata["labels"]["drover.build/attempt"]),
            annotation: text(&metadata["annotations"]["drover.build/request"]),
            user: event.user.clone(),
            created: event.received,
            gone: None,
        });
    }

    /// A deletion with a grace period only marks the pod; the one that removes it has none.
    fn note_end(&mut self, event: &Event, rules: &Rules) {
        let of_builders = event.is("", "pods") && event.namespace == rules.builders;
        if !of_builders || event.verb != "delete" {
            return;
        }
        let metadata = &event.response["metadata"];
        if metadata["deletionGracePeriodSeconds"].as_i64().is_some_and(|seconds| seconds > 0) {
            return;
        }
        let uid = text(&metadata["uid"]);
        for pod in self.pods.iter_mut().filter(|pod| pod.uid == uid) {
            pod.gone.get_or_insert(event.done);
        }
    }

    fn note_lease(&mut self, event: &Event) {
        let spec = &event.response["spec"];
        self.leases.push(Lease {
            received: event.received,
            holder: text(&spec["holderIdentity"]),
            seconds: spec["leaseDurationSeconds"].as_i64().unwrap_or(0),
        });
    }
}

pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
