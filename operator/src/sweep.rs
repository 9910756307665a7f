//! Pods and sessions without a request: found once a minute and whenever a request goes, and ended.
//!
//! Nothing is owned across namespaces, so nobody else clears them away; and no finalizer holds a request back until
//! the operator has done so.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use drover_api::BuildRequest;
use kube::runtime::reflector::Store;
use kube::{Api, ResourceExt as _};
use tokio::sync::Notify;

use crate::error::Error;
use crate::execute::delete_pod;
use crate::observe::request_of;
use crate::operator::{Operator, call};
use crate::pod;
use crate::ready::Watch;

const INTERVAL: Duration = Duration::from_secs(60);

/// Sweeps for ever: at intervals, and when it is woken.
pub async fn run(operator: Arc<Operator>, requests: Store<BuildRequest>, wake: Arc<Notify>) {
    operator.ready.wait(&[Watch::Pods, Watch::Requests]).await;
    loop {
        if let Err(error) = sweep(&operator, &requests).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "sweeping failed; the next one is in a minute"
            );
        }
        // Woken or not, it is the same work.
        let _ = tokio::time::timeout(INTERVAL, wake.notified()).await;
    }
}

async fn sweep(operator: &Operator, requests: &Store<BuildRequest>) -> Result<(), Error> {
    let known: HashSet<String> = requests.state().iter().filter_map(|request| request.uid()).collect();
    for uid in operator.sessions.uids() {
        if !known.contains(&uid) {
            operator.sessions.stop(&uid);
            operator.queue.gone(&uid);
        }
    }
    for found in operator.pods.state() {
        let Some(uid) = found.labels().get(pod::UID_LABEL) else { continue };
        if found.metadata.deletion_timestamp.is_some()
            || known.contains(uid)
            || exists(operator, &found, uid).await?
        {
            continue;
        }
        let (namespace, name) = (found.namespace().unwrap_or_default(), found.name_any());
        tracing::info!(pod = name, "deleting a builder whose request is gone");
        delete_pod(operator, &namespace, &name, &found.uid().unwrap_or_default()).await?;
    }
    Ok(())
}

/// Asks the API server: the watch may lag behind a request that is new.
async fn exists(
    operator: &Operator,
    pod: &k8s_openapi::api::core::v1::Pod,
    uid: &str,
) -> Result<bool, Error> {
    let Some(request) = request_of(pod) else { return Ok(false) };
    let api: Api<BuildRequest> =
        Api::namespaced(operator.client.clone(), request.namespace.as_deref().unwrap_or_default());
    let found = call("look for a pod's request", api.get_metadata_opt(&request.name)).await?;
    Ok(found.and_then(|found| found.uid()).as_deref() == Some(uid))
}
