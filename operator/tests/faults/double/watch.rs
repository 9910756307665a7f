//! Watches: the history from a version on, and what comes after it.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::Failure;
use super::selector::Selector;
use super::store::{Change, Kind};

/// What a watch is about and how far it has come.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    pub(crate) kind: &'static Kind,
    pub(crate) namespace: Option<String>,
    pub(crate) selector: Selector,
    /// Everything up to here was delivered.
    pub(crate) version: u64,
    pub(crate) bookmarks: bool,
    /// The server ends it after this long.
    pub(crate) timeout: Duration,
}

impl Watch {
    /// What this watch has to say of a change, if anything.
    pub(crate) fn event(&self, change: &Change) -> Option<Value> {
        if change.key.kind != self.kind
            || self.namespace.as_ref().is_some_and(|namespace| *namespace != change.key.namespace)
        {
            return None;
        }
        let seen =
            |object: &Option<Arc<Value>>| object.clone().filter(|object| self.selector.matches(object));
        let (kind, object) = match (seen(&change.before), seen(&change.after)) {
            (None, None) => return None,
            (None, Some(after)) => ("ADDED", (*after).clone()),
            (Some(_), Some(after)) => ("MODIFIED", (*after).clone()),
            (Some(before), None) => {
                // The last state, under the version of the deletion.
                let mut last = (*before).clone();
                last["metadata"]["resourceVersion"] = change.version.to_string().into();
                ("DELETED", last)
            }
        };
        Some(json!({"type": kind, "object": object}))
    }

    /// Says how far the watch has come; `initial` ends the list that a watch began with.
    pub(crate) fn bookmark(&self, version: u64, initial: bool) -> Value {
        let mut metadata = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
        if initial {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        json!({
            "type": "BOOKMARK",
            "object": {"kind": self.kind.kind, "apiVersion": self.kind.api_version(), "metadata": metadata},
        })
    }
}

/// Ends a watch with a refusal.
pub(crate) fn error(failure: &Failure) -> Value {
    json!({"type": "ERROR", "object": failure.status()})
}

/// One line of the stream.
pub(crate) fn line(event: &Value) -> Vec<u8> {
    let mut line = event.to_string().into_bytes();
    line.push(b'\n');
    line
}
