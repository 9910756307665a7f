//! `drover logs`: the log of the pod while there is one, what the status kept afterwards.

use anyhow::anyhow;
use drover_api::BuildRequest;
use futures::{AsyncBufReadExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::LogParams;

use super::Cluster;
use crate::exit::{self, Fault, Outcome};
use crate::output;

/// The container that builds.
const CONTAINER: &str = "builder";
/// What the builder says before any build, of itself and of who logs in; later lines that begin so are shown.
const PREAMBLE: [&str; 5] = ["host-key: ", "sandbox: ", "listening: ", "network: ", "drover-builder: "];

pub(super) async fn print(cluster: &Cluster, name: &str, follow: bool) -> Outcome {
    let request = cluster.get(name).await?;
    // Its pod went with the build, or is going.
    if request.status.as_ref().is_some_and(|status| status.completion_time.is_some()) {
        return from_status(&request);
    }
    match from_pod(cluster, &request, follow).await {
        Ok(true) => Ok(exit::DONE),
        Ok(false) => from_status(&request),
        Err(Fault::ReaderGone) => Err(Fault::ReaderGone),
        // Gone in between, or in a namespace that this user cannot read: the status may have something.
        Err(error) => from_status(&request).map_err(|_| error),
    }
}

/// Whether there is a pod to read from.
async fn from_pod(cluster: &Cluster, request: &BuildRequest, follow: bool) -> Result<bool, Fault> {
    let builder = request.status.as_ref().and_then(|status| status.builder.as_ref());
    let Some((pod, namespace)) =
        builder.and_then(|builder| Some((builder.pod.as_ref()?, builder.namespace.as_ref()?)))
    else {
        return Ok(false);
    };
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    let params = LogParams { follow, container: Some(CONTAINER.into()), ..Default::default() };
    let unreadable = |error: anyhow::Error| {
        Fault::Infrastructure(error.context(format!("cannot read the log of pod {namespace}/{pod}")))
    };
    let log = pods.log_stream(pod, &params).await.map_err(|error| unreadable(error.into()))?;
    let mut lines = log.lines();
    let mut preamble = true;
    while let Some(line) = lines.try_next().await.map_err(|error| unreadable(error.into()))? {
        preamble &= PREAMBLE.iter().any(|start| line.starts_with(start));
        if !preamble {
            output::print_text(&format!("{line}\n"))?;
        }
    }
    Ok(true)
}

fn from_status(request: &BuildRequest) -> Outcome {
    let status = request.status.clone().unwrap_or_default();
    match (&status.failure, &status.drv_path) {
        (Some(failure), _) if !failure.log_tail.is_empty() => {
            eprintln!("note: the builder is gone; these are the last lines");
            output::print_text(&(failure.log_tail.join("\n") + "\n"))?;
            Ok(exit::DONE)
        }
        (_, Some(drv_path)) if status.completion_time.is_some() => Err(Fault::Input(anyhow!(
            "the builder is gone; the class's cache has the log: nix log --store CACHE {drv_path}"
        ))),
        _ => Err(Fault::Input(anyhow!("there is no log yet"))),
    }
}
