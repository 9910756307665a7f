//! What the node's programs read: their configuration, keys and certificates, written into the cluster's directory.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};

use super::NODE_ADDRESS;
use crate::images;
use crate::pki::{self, Authority, Identity};

const NODE: &str = include_str!("../scripts/node.sh");
const FILES: [(&str, &str); 4] = [
    ("kubelet.yaml", include_str!("files/kubelet.yaml")),
    ("containerd.toml", include_str!("files/containerd.toml")),
    ("cni.json", include_str!("files/cni.json")),
    ("audit.yaml", include_str!("files/audit.yaml")),
];

/// What a running cluster must have been started from, to be the cluster that is asked for.
pub(super) fn recipe(node: &Path, programs: &Path) -> String {
    let files = FILES.map(|(_, text)| text).concat();
    crate::parts::key(&format!("{}\n{}\n{NODE}{files}", node.display(), programs.display()))
}

/// Writes everything into `dir`: `etc` (the node's /etc/kubernetes), `var` (its /var), `node.sh` and `pause.tar`.
pub(super) fn write(dir: &Path, name: &str, node: &Path) -> Result<()> {
    let (etc, var) = (dir.join("etc"), dir.join("var"));
    for place in [
        "lib/kubelet",
        "lib/containerd",
        "lib/etcd",
        "lib/cni",
        "log/kube",
        "log/pods",
        "log/containers",
        "tmp",
        "cache",
    ] {
        fs::create_dir_all(var.join(place))
            .with_context(|| format!("could not make {place} in {}", var.display()))?;
    }
    symlink("/run", var.join("run"))?;
    fs::create_dir_all(&etc)?;
    for (file, text) in FILES {
        fs::write(etc.join(file), text.replace("CGROUP_ROOT", &format!("/{name}")))?;
    }
    fs::write(dir.join("node.sh"), NODE)?;
    images::busybox(node, "drover.test/pause:1", &dir.join("pause.tar"))?;
    identities(&etc)
}

fn identities(etc: &Path) -> Result<()> {
    let ca = Authority::new("drover-test-ca")?;
    let server = format!("https://{NODE_ADDRESS}:6443");
    let pki = etc.join("pki");
    fs::create_dir_all(&pki)?;
    let save = |name: &str, identity: &Identity| -> Result<()> {
        fs::write(pki.join(name).with_extension("crt"), &identity.certificate)?;
        Ok(fs::write(pki.join(name).with_extension("key"), &identity.key)?)
    };

    fs::write(pki.join("ca.crt"), &ca.certificate)?;
    fs::write(pki.join("ca.key"), &ca.key)?;
    let (private, public) = pki::signing_key()?;
    fs::write(pki.join("sa.key"), private)?;
    fs::write(pki.join("sa.pub"), public)?;
    let names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "localhost",
        NODE_ADDRESS,
        "10.96.0.1",
        "127.0.0.1",
    ];
    save("apiserver", &ca.issue("kube-apiserver", &[], &names)?)?;
    save("kubelet-client", &ca.issue("kube-apiserver-kubelet-client", &["system:masters"], &[])?)?;
    let kubelet = ca.issue("system:node:node-0", &["system:nodes"], &["node-0", NODE_ADDRESS])?;
    save("kubelet", &kubelet)?;

    fs::write(etc.join("kubelet.conf"), ca.kubeconfig(&server, &kubelet))?;
    for (file, user, groups) in [
        ("admin.conf", "admin", &["system:masters"][..]),
        ("controller-manager.conf", "system:kube-controller-manager", &[]),
        ("scheduler.conf", "system:kube-scheduler", &[]),
        ("kube-proxy.conf", "system:kube-proxy", &[]),
    ] {
        fs::write(etc.join(file), ca.kubeconfig(&server, &ca.issue(user, groups, &[])?))?;
    }
    Ok(())
}
