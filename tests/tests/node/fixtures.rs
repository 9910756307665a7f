//! The node runs what a builder needs: a pod that Pod Security `baseline` admits, and that can still nest namespaces and
//! reach a cache in the cluster's network.

use std::path::Path;

use anyhow::{Context, Result};
use drover_tests::{Cluster, HttpCache};
use xtask::{images, parts};

const NAMESPACE: &str = "drover-test-fixtures";

#[test]
fn a_baseline_pod_nests_namespaces_and_reaches_the_cache() -> Result<()> {
    let cluster = Cluster::up()?;
    let scratch = tempfile::tempdir()?;
    let image = scratch.path().join("busybox.tar");
    images::busybox(&parts::rootfs::node()?, images::BUSYBOX, &image)?;
    cluster.load(&image)?;

    let served = tempfile::tempdir()?;
    std::fs::write(served.path().join("nix-cache-info"), "StoreDir: /nix/store\n")?;
    let cache = HttpCache::start_in(&cluster, served.path(), 8101)?;

    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait"])?;
    cluster.apply(&pod(cache.url()))?;
    let phase = "jsonpath={.status.phase}=Succeeded";
    let waited = cluster.kubectl(&["wait", "-n", NAMESPACE, "pod/nest", "--for", phase, "--timeout=60s"]);
    let log = cluster.kubectl(&["logs", "-n", NAMESPACE, "nest"])?;
    waited.map_err(|error| error.context(log.clone()))?;
    for line in ["StoreDir: /nix/store", "mounted", "fresh proc", "loopback up"] {
        assert!(log.lines().any(|said| said == line), "no {line:?} in {log:?}");
    }
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--wait"])?;
    Ok(())
}

#[test]
fn a_cluster_that_went_down_left_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let cluster = Cluster::in_dir(dir.path())?;
    cluster.ensure_up()?;
    let netns = cluster.netns();
    let name = netns.file_name().context("a namespace has a name")?.to_owned();
    let before = std::fs::metadata(cluster.kubeconfig())?.modified()?;
    cluster.ensure_up()?;
    assert_eq!(std::fs::metadata(cluster.kubeconfig())?.modified()?, before, "it was started a second time");

    cluster.down()?;
    assert!(!cluster.is_running() && !netns.exists());
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 0);
    for group in std::fs::read_dir("/sys/fs/cgroup")? {
        assert!(!group?.path().join(&name).exists(), "a control group is left");
    }
    assert!(!Path::new("/sys/fs/cgroup").join(&name).exists());
    cluster.down() // and again, which has nothing to do
}

fn pod(cache: &str) -> String {
    let image = images::BUSYBOX;
    format!(
        r#"
apiVersion: v1
kind: Namespace
metadata: {{name: {NAMESPACE}, labels: {{pod-security.kubernetes.io/enforce: baseline}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: nest, namespace: {NAMESPACE}}}
spec:
  restartPolicy: Never
  hostUsers: false
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  containers:
  - name: nest
    image: {image}
    imagePullPolicy: Never
    securityContext: {{allowPrivilegeEscalation: false, procMount: Unmasked}}
    command: [sh, -e, -c]
    args:
    - |
      wget -q -O - {cache}/nix-cache-info
      unshare -U -r -m sh -e -c '
        mount -t tmpfs none /tmp; echo mounted
        unshare -p -f -n -i -u sh -e -c "
          mount -t proc proc /proc; echo fresh proc
          ip link set lo up; echo loopback up"'
"#
    )
}
