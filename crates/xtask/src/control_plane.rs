//! etcd and kube-apiserver alone, on ports of loopback, for tests of what the API server does: schemas, CEL, RBAC, watches.
//!
//! No kubelet and no controllers: nothing runs, nothing is collected as garbage, and namespaces never finish deleting.
//! It needs neither root nor namespaces, and everything that it started ends when the handle is dropped.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::parts::{go, rootfs};
use crate::pki::{self, Authority};
use crate::run;

const READY_LIMIT: Duration = Duration::from_secs(60);
/// Between asking for a free port and listening on it another program may take it.
const ATTEMPTS: usize = 3;

/// A running control plane of its own.
pub struct ControlPlane {
    // In the order in which they are dropped: clients before servers, files last.
    _apiserver: Running,
    _etcd: Running,
    dir: TempDir,
    kubectl: PathBuf,
    server: String,
    ca: Authority,
}

/// A program that ends when this is dropped.
struct Running(Child);

impl ControlPlane {
    /// Starts one and waits until it is ready, which takes about 5 seconds.
    pub fn start() -> Result<Self> {
        let (node, programs) = (rootfs::node()?, go::kubernetes()?);
        let mut attempt = 1;
        loop {
            match Self::try_start(&node, &programs) {
                Err(error) if attempt < ATTEMPTS => eprintln!("control plane: trying again: {error:#}"),
                done => return done,
            }
            attempt += 1;
        }
    }

    /// The kubeconfig of the administrator; it holds all that is needed.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("admin.conf")
    }

    /// The URL of the API server.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Writes the kubeconfig of another user, who has these groups and the rights that a test binds to them.
    pub fn kubeconfig_for(&self, user: &str, groups: &[&str]) -> Result<PathBuf> {
        let path = self.dir.path().join(format!("{}.conf", user.replace([':', '/'], "-")));
        fs::write(&path, self.ca.kubeconfig(&self.server, &self.ca.issue(user, groups, &[])?))?;
        Ok(path)
    }

    /// kubectl as the administrator; add arguments and run it.
    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// Runs kubectl and returns its standard output; an exit code other than 0 is an error with its standard error.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        run::stdout(self.kubectl_command().args(args))
    }

    /// `kubectl apply -f -` with this YAML.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        run::filter(self.kubectl_command().args(["apply", "-f", "-"]), yaml.as_bytes())
    }

    /// Waits until the API server serves every definition that was applied. `kubectl wait` gives up on one whose
    /// conditions are still null.
    pub fn wait_established(&self) -> Result<()> {
        let is_established = |definition: &Value| {
            let conditions = definition["status"]["conditions"].as_array().into_iter().flatten();
            conditions.into_iter().any(|c| c["type"] == "Established" && c["status"] == "True")
        };
        run::wait_for("the definitions to be established", Duration::from_secs(30), || {
            let list: Value = serde_json::from_str(&self.kubectl(&["get", "crd", "-o", "json"])?)?;
            let definitions = list["items"].as_array().context("kubectl prints a list")?;
            Ok(!definitions.is_empty() && definitions.iter().all(is_established))
        })
    }

    fn try_start(node: &Path, programs: &Path) -> Result<Self> {
        let dir = TempDir::with_prefix("drover-control-plane-")?;
        let path = |name: &str| dir.path().join(name);
        let [client, peer, secure] = free_ports()?;
        let (etcd_url, server) =
            (format!("http://127.0.0.1:{client}"), format!("https://127.0.0.1:{secure}"));

        let ca = Authority::new("drover-test-ca")?;
        let apiserver = ca.issue(
            "kube-apiserver",
            &[],
            &["127.0.0.1", "localhost", "10.96.0.1", "kubernetes.default.svc"],
        )?;
        let (private, public) = pki::signing_key()?;
        let admin = ca.kubeconfig(&server, &ca.issue("admin", &["system:masters"], &[])?);
        for (name, text) in [
            ("ca.crt", &ca.certificate),
            ("apiserver.crt", &apiserver.certificate),
            ("apiserver.key", &apiserver.key),
            ("sa.key", &private),
            ("sa.pub", &public),
            ("admin.conf", &admin),
        ] {
            fs::write(path(name), text)?;
        }

        // Debian's etcd is linked to the glibc of its own suite: run it by that suite's loader, which takes no root.
        let mut etcd = Command::new(node.join("usr/lib64/ld-linux-x86-64.so.2"));
        etcd.arg("--library-path").arg(node.join("usr/lib/x86_64-linux-gnu")).arg(node.join("usr/bin/etcd"));
        etcd.arg("--data-dir").arg(path("etcd")).arg("--unsafe-no-fsync");
        etcd.args(["--listen-client-urls", &etcd_url, "--advertise-client-urls", &etcd_url]);
        etcd.arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"));
        let etcd = Running::start(&mut etcd, &path("etcd.log"))?;

        let flag = |name: &str, file: &str| format!("--{name}={}", path(file).display());
        let mut command = Command::new(programs.join("kube-apiserver"));
        command.args([format!("--etcd-servers={etcd_url}"), format!("--secure-port={secure}")]);
        command.args([
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--allow-privileged=true",
        ]);
        command.args(["--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16"]);
        // No controller makes service accounts here: pods could not be created where each must have one.
        command.args([
            "--service-account-issuer=https://kubernetes.default.svc",
            "--disable-admission-plugins=ServiceAccount",
        ]);
        command.args([flag("tls-cert-file", "apiserver.crt"), flag("tls-private-key-file", "apiserver.key")]);
        command.args([flag("client-ca-file", "ca.crt"), flag("cert-dir", ".")]);
        command.args([
            flag("service-account-key-file", "sa.pub"),
            flag("service-account-signing-key-file", "sa.key"),
        ]);
        let apiserver = Running::start(&mut command, &path("apiserver.log"))?;

        let kubectl = programs.join("kubectl");
        let mut this = Self { _apiserver: apiserver, _etcd: etcd, dir, kubectl, server, ca };
        this.wait_ready()?;
        Ok(this)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let log = |name: &str| {
            let text = fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(10)..].join("\n")
        };
        let (apiserver, etcd) = (&mut self._apiserver.0, &mut self._etcd.0);
        let kubectl = |args: &[&str]| {
            let conf = self.dir.path().join("admin.conf");
            run::stdout(Command::new(&self.kubectl).env("KUBECONFIG", conf).args(args))
        };
        run::wait_for("kube-apiserver to be ready", READY_LIMIT, || {
            for (child, name) in [(&mut *apiserver, "apiserver.log"), (&mut *etcd, "etcd.log")] {
                if let Some(status) = child.try_wait()? {
                    bail!(
                        "a program of the control plane ended with {status}; the end of {name}:\n{}",
                        log(name)
                    );
                }
            }
            Ok(kubectl(&["get", "--raw", "/readyz"]).is_ok()
                && kubectl(&["get", "namespace", "default"]).is_ok())
        })
        .with_context(|| format!("the end of apiserver.log:\n{}", log("apiserver.log")))
    }
}

impl Running {
    fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let log = File::create(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self(command.spawn().with_context(|| format!("could not start {}", run::describe(command)))?))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing is worth keeping, and an error here means that it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let listeners: Vec<TcpListener> =
        (0..N).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<_>>()?;
    let ports: Vec<u16> =
        listeners.iter().map(|at| Ok(at.local_addr()?.port())).collect::<std::io::Result<_>>()?;
    ports.try_into().map_err(|_| anyhow::anyhow!("asked for {N} ports"))
}
