//! What is kept of an object: what plans ask for. Of requests that came to their end, thousands of which may lie about, that
//! is nearly nothing.

use drover_api::{BuildRequest, conditions};
use k8s_openapi::api::core::v1::{Pod, PodSpec, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt as _;

use crate::pod;

/// Where kubectl keeps the whole object a second time.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// On a request that [`request`] has cut down, in this process's memory only.
const STRIPPED: &str = "drover.build/stripped";

/// Leaves of a request what plans ask for. One that came to its end keeps its verdict and what its deletion depends on.
pub fn request(request: &mut BuildRequest) {
    metadata(&mut request.metadata);
    if let Some(annotations) = &mut request.metadata.annotations {
        // Nobody else's mark counts.
        annotations.remove(STRIPPED);
    }
    let verdict = request.status.as_ref().and_then(|status| conditions::verdict(&status.conditions));
    if let (Some(_), Some(status)) = (verdict, &mut request.status) {
        request.spec.derivation = None;
        status.outputs.clear();
        status.attempts.clear();
        if let Some(failure) = &mut status.failure {
            failure.log_tail.clear();
        }
        request.metadata.annotations.get_or_insert_default().insert(STRIPPED.into(), String::new());
    }
}

/// Whether the request lacks what [`request`] took: no status may be made from it.
pub fn is_stripped(request: &BuildRequest) -> bool {
    request.annotations().contains_key(STRIPPED)
}

/// Leaves of a builder's pod whose it is, where it is, and how it is.
pub fn pod(pod: &mut Pod) {
    let metadata = &mut pod.metadata;
    self::metadata(metadata);
    metadata.owner_references = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.retain(|name, _| name == pod::REQUEST_ANNOTATION);
    }
    if let Some(spec) = pod.spec.take() {
        pod.spec = Some(PodSpec {
            node_name: spec.node_name,
            active_deadline_seconds: spec.active_deadline_seconds,
            ..PodSpec::default()
        });
    }
    if let Some(status) = pod.status.take() {
        pod.status = Some(PodStatus {
            phase: status.phase,
            reason: status.reason,
            message: status.message,
            conditions: status.conditions,
            container_statuses: status.container_statuses,
            pod_ip: status.pod_ip,
            ..PodStatus::default()
        });
    }
}

pub fn metadata(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.remove(LAST_APPLIED);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_request_that_came_to_its_end_is_kept_small() {
        let whole = |succeeded: &str| -> BuildRequest {
            let text = |n: usize| "x".repeat(n);
            serde_json::from_value(json!({
                "apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest",
                "metadata": {
                    "name": "a", "uid": "u", "resourceVersion": "7", "generation": 2,
                    "annotations": {LAST_APPLIED: text(5000), "mine": "yes", STRIPPED: "not by us"},
                    "managedFields": [{"manager": text(5000)}],
                },
                "spec": {"ttlSecondsAfterSucceeded": 5, "derivation": {
                    "name": "a", "system": "s", "builder": "b", "args": [text(5000)], "outputs": {"out": {}},
                }},
                "status": {
                    "conditions": [{"type": "Succeeded", "status": succeeded, "reason": "R", "message": "",
                        "lastTransitionTime": "2026-01-01T00:00:00Z"}],
                    "observedGeneration": 2,
                    "completionTime": "2026-01-01T00:00:00Z",
                    "failure": {"reason": "R", "message": "m", "logTail": [text(5000)]},
                },
            }))
            .unwrap()
        };
        let mut settled = whole("False");
        request(&mut settled);
        assert!(is_stripped(&settled));
        let text = serde_json::to_string(&settled).unwrap();
        assert!(text.len() < 1000, "{text}");
        // What plans for settled requests ask for.
        assert_eq!(settled.spec.ttl_seconds_after_succeeded, Some(5));
        let status = settled.status.unwrap_or_default();
        assert_eq!(conditions::verdict(&status.conditions), Some(false));
        assert!(status.completion_time.is_some() && status.observed_generation == Some(2));

        let mut going = whole("Unknown");
        request(&mut going);
        assert!(!is_stripped(&going) && going.spec.derivation.is_some());
        assert_eq!(going.annotations().keys().collect::<Vec<_>>(), ["mine"]);
        assert!(going.managed_fields().is_empty());
    }

    #[test]
    fn a_pod_keeps_what_is_looked_at() {
        let mut pod: Pod = serde_json::from_value(json!({
            "metadata": {
                "name": "p", "uid": "u", "namespace": "n",
                "labels": {pod::UID_LABEL: "r", pod::ATTEMPT_LABEL: "1"},
                "annotations": {pod::REQUEST_ANNOTATION: "team/a", "other": "x"},
            },
            "spec": {"nodeName": "node", "activeDeadlineSeconds": 60, "containers": [{"name": pod::CONTAINER, "args": ["--key"]}]},
            "status": {
                "phase": "Failed", "reason": "Evicted", "message": "m", "podIP": "10.0.0.1",
                "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}],
                "containerStatuses": [{"name": pod::CONTAINER, "image": "i", "imageID": "i@sha256:1", "ready": false,
                    "restartCount": 0, "state": {"terminated": {"exitCode": 1, "reason": "OOMKilled"}}}],
            },
        }))
        .unwrap();
        let view = crate::observe::view(&pod);
        let request = crate::observe::request_of(&pod);
        super::pod(&mut pod);
        assert!(view.as_ref().is_some_and(|view| view.deadline.is_some() && view.disruption.is_some()));
        assert_eq!(crate::observe::view(&pod), view);
        assert_eq!(crate::observe::request_of(&pod), request);
        assert_eq!(pod.status.and_then(|status| status.pod_ip).as_deref(), Some("10.0.0.1"));
        assert!(pod.spec.is_some_and(|spec| spec.containers.is_empty()));
    }
}
