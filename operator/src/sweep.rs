//! What is left of requests that are gone: pods, sessions and what this process remembers. Found at intervals and whenever a
//! request goes, and ended.
//!
//! Nothing is owned across namespaces, so nobody else clears it away; and no finalizer holds a request back until the
//! operator has done so. Before a pod is deleted, the API server itself has said that its request is gone: watches lag, and a
//! request that cannot be read is not gone.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use drover_api::BuildRequest;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::reflector::Store;
use kube::{Api, ResourceExt as _};
use tokio::sync::Notify;
use tracing::{Instrument as _, Span};

use crate::error::Error;
use crate::execute::delete_pod;
use crate::health::Loop;
use crate::log;
use crate::observe::request_of;
use crate::operator::{Operator, call};
use crate::pod;
use crate::ready::Watch;
use crate::scope::Scope;
use crate::watches::readable::Unreadable;

/// Twice within the minute in which nothing may be left, since one sweep can fail.
const INTERVAL: Duration = Duration::from_secs(20);
/// Pods that are asked about and deleted at the same time.
const AT_ONCE: usize = 8;

/// Sweeps for ever: at intervals, and when it is woken.
pub async fn run(
    operator: Arc<Operator>,
    requests: Store<BuildRequest>,
    unreadable: Arc<Unreadable>,
    wake: Arc<Notify>,
) {
    operator.ready.wait(&[Watch::Pods, Watch::Requests]).await;
    loop {
        operator.health.beat(Loop::Sweeps);
        let known: HashSet<String> = requests.state().iter().filter_map(|request| request.uid()).collect();
        sweep(&operator, |uid| known.contains(uid) || unreadable.contains(uid)).await;
        // Woken or not, it is the same work.
        let _ = tokio::time::timeout(INTERVAL, wake.notified()).await;
    }
}

async fn sweep(operator: &Operator, is_known: impl Fn(&str) -> bool) {
    for uid in operator.sessions.uids() {
        if !is_known(&uid) {
            operator.sessions.stop(&uid);
            operator.queue.gone(&uid);
        }
    }
    operator.backoffs().retain(&is_known);
    operator.events.retain(&is_known);
    operator.refusals.retain(&is_known);
    operator.obstacles.retain(&is_known);
    let strays = operator.pods.state().into_iter().filter(|found| {
        let uid = found.labels().get(pod::UID_LABEL);
        found.metadata.deletion_timestamp.is_none()
            && uid.is_some_and(|uid| !is_known(uid))
            && is_ours(&operator.settings.scope, found)
    });
    // One that cannot be deleted keeps no other from it.
    futures::stream::iter(strays)
        .for_each_concurrent(AT_ONCE, async |stray| {
            operator.health.beat(Loop::Sweeps);
            let span = of_stray(&stray);
            if let Err(error) = clear(operator, &stray).instrument(span.clone()).await {
                operator.metrics.failed(&error);
                let error = &error as &dyn std::error::Error;
                let _of = span.entered();
                tracing::warn!(
                    pod = stray.name_any(),
                    error,
                    "a builder without a request stays until the next sweep"
                );
            }
        })
        .await;
}

/// The pod remembers whose it is.
fn of_stray(pod: &Pod) -> Span {
    let request = request_of(pod);
    let name = request.as_ref().map(|request| request.name.as_str()).unwrap_or_default();
    let namespace = request.as_ref().and_then(|request| request.namespace.as_deref()).unwrap_or_default();
    let label = |label: &str| pod.labels().get(label).map(String::as_str).unwrap_or_default();
    log::of_request(namespace, name, label(pod::UID_LABEL), label(pod::ATTEMPT_LABEL).parse().ok())
}

/// Whether the pod's request would be this operator's: of other namespaces it knows nothing, and may not even ask.
fn is_ours(scope: &Scope, pod: &Pod) -> bool {
    match request_of(pod).and_then(|request| request.namespace) {
        Some(namespace) => scope.has(&namespace),
        None => scope.is_cluster(),
    }
}

async fn clear(operator: &Operator, stray: &Pod) -> Result<(), Error> {
    if exists(operator, stray).await? {
        return Ok(());
    }
    let (namespace, name) = (stray.namespace().unwrap_or_default(), stray.name_any());
    tracing::info!(pod = name, "deleting a builder whose request is gone");
    delete_pod(operator, &namespace, &name, &stray.uid().unwrap_or_default()).await
}

/// Whether the API server has the pod's request.
async fn exists(operator: &Operator, pod: &Pod) -> Result<bool, Error> {
    let Some(request) = request_of(pod) else { return Ok(false) };
    let api: Api<BuildRequest> =
        Api::namespaced(operator.client.clone(), request.namespace.as_deref().unwrap_or_default());
    let found = call("look for a pod's request", api.get_metadata_opt(&request.name)).await?;
    Ok(found.is_some_and(|found| found.uid().as_ref() == pod.labels().get(pod::UID_LABEL)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builders_of_another_operator_are_let_be() {
        let pod = |annotations: serde_json::Value| -> Pod {
            serde_json::from_value(serde_json::json!({"metadata": {"name": "p", "annotations": annotations}}))
                .unwrap()
        };
        let of =
            |namespace: &str| pod(serde_json::json!({pod::REQUEST_ANNOTATION: format!("{namespace}/x")}));
        let some = Scope { namespaces: vec!["team".into()], ..Scope::default() };
        assert!(is_ours(&some, &of("team")) && is_ours(&Scope::default(), &of("other")));
        assert!(!is_ours(&some, &of("other")) && !is_ours(&some, &pod(serde_json::json!({}))));
        assert!(is_ours(&Scope::default(), &pod(serde_json::json!({}))));
    }
}
