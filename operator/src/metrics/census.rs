//! How many requests and builders there are now, and how long the oldest have waited. Pure: from what the watches have.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use drover_api::{BuildRequest, Reason, conditions};
use drover_cache::Counts;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::table::{BUILDER_STATES, OTHER};
use crate::pod;

/// Everything by the word of its label; what is not there is none.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Census {
    /// Requests without a verdict, by reason.
    pub requests: BTreeMap<&'static str, i64>,
    /// By reason, for how many seconds one of them has waited.
    pub oldest_seconds: BTreeMap<&'static str, i64>,
    /// Builders' pods by state.
    pub builders: BTreeMap<&'static str, i64>,
    /// Those that belong to no request.
    pub orphans: i64,
    /// What became of questions to caches since the process began.
    pub caches: Counts,
    /// Look-ups that met a cache which could not be asked.
    pub cache_errors: u64,
}

/// Counts. `is_known` says of a uid that is not among the requests whether there is one nevertheless, which cannot be read.
pub fn count(
    requests: &[Arc<BuildRequest>],
    pods: &[Arc<Pod>],
    is_known: impl Fn(&str) -> bool,
    now: Timestamp,
) -> Census {
    let mut census = Census::default();
    for request in requests {
        let Some(reason) = reason(request) else { continue };
        *census.requests.entry(reason).or_default() += 1;
        let oldest = census.oldest_seconds.entry(reason).or_default();
        *oldest = (*oldest).max(now.duration_since(since(request, now)).as_secs());
    }
    if pods.is_empty() {
        return census;
    }
    let uids: HashSet<&str> = requests.iter().filter_map(|request| request.metadata.uid.as_deref()).collect();
    for pod in pods {
        let state = state(pod);
        *census.builders.entry(state).or_default() += 1;
        let uid = pod.labels().get(pod::UID_LABEL).map_or("", String::as_str);
        if !uids.contains(uid) && !is_known(uid) {
            census.orphans += 1;
        }
    }
    census
}

/// What a request does or waits for; None if it came to its end.
fn reason(request: &BuildRequest) -> Option<&'static str> {
    let status = request.status.as_ref();
    let summary = status.and_then(|status| conditions::find(&status.conditions, conditions::SUCCEEDED));
    let Some(summary) = summary else { return Some(Reason::Pending.as_str()) };
    if conditions::verdict(&status?.conditions).is_some() {
        return None;
    }
    Some(Reason::parse(&summary.reason).filter(|reason| !reason.is_terminal()).map_or(OTHER, Reason::as_str))
}

/// When it began what it is about: its attempt, or else itself.
fn since(request: &BuildRequest, now: Timestamp) -> Timestamp {
    let attempt = request.status.as_ref().and_then(|status| status.attempts.last());
    let open =
        attempt.filter(|attempt| attempt.end_time.is_none()).and_then(|attempt| attempt.start_time.as_ref());
    open.or(request.metadata.creation_timestamp.as_ref()).map_or(now, |time| time.0)
}

fn state(pod: &Pod) -> &'static str {
    let [pending, starting, running, ending] = BUILDER_STATES;
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let has_node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    match phase {
        _ if pod.metadata.deletion_timestamp.is_some() => ending,
        Some("Succeeded" | "Failed") => ending,
        Some("Running") => running,
        _ if has_node => starting,
        _ => pending,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn request(uid: &str, status: Value) -> Arc<BuildRequest> {
        let object = json!({
            "apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest",
            "metadata": {"name": uid, "uid": uid, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {},
            "status": status,
        });
        Arc::new(serde_json::from_value(object).unwrap())
    }

    fn summary(status: &str, reason: &str) -> Value {
        json!([{"type": "Succeeded", "status": status, "reason": reason, "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}])
    }

    fn pod(uid: &str, node: Option<&str>, phase: &str, deleted: Option<&str>) -> Arc<Pod> {
        let object = json!({
            "metadata": {"name": uid, "labels": {pod::UID_LABEL: uid}, "deletionTimestamp": deleted},
            "spec": {"containers": [], "nodeName": node}, "status": {"phase": phase},
        });
        Arc::new(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn requests_by_reason_and_age() {
        let waiting = json!({"conditions": summary("Unknown", "WaitingForNode"), "attempts": [
            {"number": 1, "startTime": "2026-01-01T00:00:10Z", "endTime": "2026-01-01T00:00:20Z"},
            {"number": 2, "startTime": "2026-01-01T00:01:00Z"},
        ]});
        let requests = [
            request("new", json!(null)),
            request("a", waiting),
            request("b", json!({"conditions": summary("Unknown", "WaitingForConcurrency")})),
            request(
                "c",
                json!({"conditions": summary("Unknown", "WaitingForNode"), "attempts": [
                {"number": 1, "startTime": "2026-01-01T00:02:00Z"}]}),
            ),
            request("later", json!({"conditions": summary("Unknown", "AWordOfAnotherVersion")})),
            request("done", json!({"conditions": summary("True", "Built")})),
            request("failed", json!({"conditions": summary("False", "Evicted")})),
        ];
        let census = count(&requests, &[], |_| false, "2026-01-01T00:03:20Z".parse().unwrap());
        let counts = [("Pending", 1), ("WaitingForConcurrency", 1), ("WaitingForNode", 2), ("other", 1)];
        assert_eq!(census.requests, BTreeMap::from(counts));
        assert_eq!(census.oldest_seconds["WaitingForNode"], 140, "since its attempt began");
        assert_eq!(census.oldest_seconds["WaitingForConcurrency"], 200, "since it was made");
    }

    #[test]
    fn builders_by_state_and_those_of_nobody() {
        let gone = Some("2026-01-01T00:00:00Z");
        let pods = [
            pod("a", None, "Pending", None),
            pod("a", Some("n"), "Pending", None),
            pod("a", Some("n"), "Running", None),
            pod("a", Some("n"), "Failed", None),
            pod("nobody", Some("n"), "Running", gone),
            pod("unreadable", Some("n"), "Running", None),
        ];
        let census = count(&[request("a", json!(null))], &pods, |uid| uid == "unreadable", Timestamp::now());
        let counts = [("ending", 2), ("pending", 1), ("running", 2), ("starting", 1)];
        assert_eq!(census.builders, BTreeMap::from(counts));
        assert_eq!(census.orphans, 1);
    }
}
