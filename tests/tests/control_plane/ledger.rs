//! What the audit log says of a request: the pods that were made for it, and the writes of its status.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use serde_json::Value;
use xtask::audit::Entry;

/// Writes of the status of this request of namespace `team` that were taken, oldest first.
pub(crate) fn status_writes<'a>(audit: &'a [Entry], request: &str) -> Vec<&'a Entry> {
    let of_status = |entry: &&Entry| entry.resource == "buildrequests" && entry.subresource == "status";
    let done = |entry: &&Entry| entry.is_write() && entry.is_done() && entry.name == request;
    audit.iter().filter(of_status).filter(done).collect()
}

/// Names of the pods that were made for this request, as often as they were.
pub(crate) fn pods_created<'a>(audit: &'a [Entry], request: &str) -> Vec<&'a str> {
    let annotation = format!("team/{request}");
    let of_request =
        |entry: &&Entry| entry.body["metadata"]["annotations"]["drover.build/request"] == *annotation;
    let made = audit.iter().filter(|entry| entry.act() == "create pods" && entry.is_done());
    made.filter(of_request).filter_map(|entry| entry.body["metadata"]["name"].as_str()).collect()
}

/// One pod an attempt; the verdict is the last word, and is spoken once.
pub(crate) fn ensure_once(audit: &[Entry], request: &str) -> Result<()> {
    let pods = pods_created(audit, request);
    ensure!(
        pods.iter().collect::<BTreeSet<_>>().len() == pods.len(),
        "{request}: a pod was made twice: {pods:?}"
    );
    let phases: Vec<&Value> =
        status_writes(audit, request).iter().map(|entry| &entry.body["status"]["phase"]).collect();
    let ends = phases.iter().filter(|phase| **phase == "Succeeded" || **phase == "Failed").count();
    ensure!(ends <= 1, "{request}: the verdict was written {ends} times: {phases:?}");
    let last = phases.last().is_none_or(|phase| *phase == "Succeeded" || *phase == "Failed");
    ensure!(ends == 0 || last, "{request}: something was written after the verdict: {phases:?}");
    Ok(())
}
