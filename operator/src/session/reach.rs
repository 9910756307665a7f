//! From a pod that has a node to a connection: the builder's key, its address, and the dial.
//!
//! The key comes from the beginning of the pod's log. A kubelet that has rotated that log away shows it to nobody any more
//! (Kubernetes: `containerLogMaxSize`, 10 MiB unless it is set), and a build's log goes there as well. So an earlier
//! session's word is kept in the request's status: whoever can write that can say what the outputs are, too.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use kube::runtime::reflector::ObjectRef;

use super::host_key;
use super::pipe::Pipes;
use super::ssh::{Connection, Target};
use super::{Assignment, Progress};
use crate::error::Error;
use crate::pod;
use crate::settings::BUILDER_PORT;

/// Between two looks for the pod's address, which the kubelet reports a moment after the container started.
const ADDRESS_WAIT: Duration = Duration::from_millis(20);

/// Learns the builder's key and address and connects.
pub(super) async fn reach(
    assignment: &Assignment,
    progress: &Progress,
) -> Result<(Connection, Pipes), Error> {
    let host_key = match &assignment.host_key {
        Some(known) => known.clone(),
        None => {
            let greeting = host_key::greeting(&assignment.pods, &assignment.pod, pod::CONTAINER).await?;
            progress.sandbox(greeting.sandbox);
            greeting.host_key
        }
    };
    progress.host_key(host_key.line().to_owned());
    let address = address(assignment).await?;
    let target = Target {
        address,
        port: BUILDER_PORT,
        alias: &format!("drover-{}-{}", assignment.request_uid, assignment.attempt),
        host_key: &host_key,
        client_key: &assignment.client_key,
    };
    Connection::open(&target, &assignment.work_dir).await
}

/// The pod's address, as soon as the kubelet has reported it.
async fn address(assignment: &Assignment) -> Result<IpAddr, Error> {
    let namespace = assignment.pods.namespace().unwrap_or_default().to_owned();
    let key = ObjectRef::new(&assignment.pod).within(&namespace);
    for look in 0u32.. {
        // The watch is nearly always first; asking now and then makes up for one that lags.
        let pod = match assignment.pods_seen.get(&key) {
            Some(pod) => Some(pod),
            None if look % 50 == 0 => {
                let pod = assignment.pods.get_opt(&assignment.pod).await;
                pod.map_err(Error::kube("read the builder's pod"))?.map(Arc::new)
            }
            None => None,
        };
        let address = pod
            .filter(|pod| pod.metadata.uid.as_deref() == Some(&assignment.pod_uid))
            .and_then(|pod| pod.status.as_ref()?.pod_ip.clone());
        if let Some(address) = address {
            return address.parse().map_err(|_| Error::Pod {
                why: format!("pod {} has the address {address:?}", assignment.pod),
            });
        }
        tokio::time::sleep(ADDRESS_WAIT).await;
    }
    // The loop has no other end; the caller bounds its time.
    Err(Error::Pod { why: format!("pod {} has no address", assignment.pod) })
}
