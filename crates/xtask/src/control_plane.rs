//! etcd and kube-apiserver alone, on ports of loopback, for tests of what the API server does: schemas, CEL, RBAC, watches.
//!
//! No kubelet and no controllers: nothing runs, nothing is collected as garbage, and namespaces never finish deleting.
//! It needs neither root nor namespaces, and everything that it started ends when the handle is dropped.
//!
//! Tests of faults kill, restart and stop its programs ([`ControlPlane::kill_apiserver`], [`ControlPlane::pause_etcd`]); what
//! was asked of it, and by whom, is in its audit log ([`ControlPlane::audit`]).

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::audit;
use crate::parts::{go, rootfs};
use crate::pki::{self, Authority};
use crate::platform::Platform;
use crate::run;

const READY_LIMIT: Duration = Duration::from_secs(60);
/// Between asking for a free port and listening on it another program may take it.
const ATTEMPTS: usize = 3;
/// What the audit log has: bodies of writes of what belongs to Drover, of pods and of leases, so that they can be compared.
const AUDIT_POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
omitManagedFields: true
rules:
- level: None
  nonResourceURLs: [\"*\"]
- level: RequestResponse
  verbs: [create, update, patch, delete, deletecollection]
  resources:
  - {group: drover.build}
  - {group: \"\", resources: [pods, pods/status]}
  - {group: coordination.k8s.io, resources: [leases]}
- level: Metadata
";

/// A running control plane of its own.
pub struct ControlPlane {
    // In the order in which they are dropped: clients before servers, files last.
    apiserver: Mutex<Running>,
    etcd: Mutex<Running>,
    dir: TempDir,
    programs: PathBuf,
    etcd_url: String,
    server: String,
    ca: Authority,
}

/// A program that stands still, its connections open, until this is dropped.
pub struct Paused<'a>(MutexGuard<'a, Running>);

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
        let mut command = Command::new(self.programs.join("kubectl"));
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

    /// Every request that was answered, oldest first. Bodies are there for writes of Drover's own kinds, pods and leases.
    pub fn audit(&self) -> Result<Vec<audit::Entry>> {
        audit::read(&self.audit_log())
    }

    /// The file with the audit log: one event (Kubernetes: audit.k8s.io/v1) a line.
    pub fn audit_log(&self) -> PathBuf {
        self.dir.path().join("audit.log")
    }

    /// SIGKILL: connections break, and nobody listens until [`Self::restart_apiserver`]. What etcd has stays.
    pub fn kill_apiserver(&self) {
        lock(&self.apiserver).kill();
    }

    /// Kills it if it runs, and starts it again at the same address. Returns when it is ready.
    pub fn restart_apiserver(&self) -> Result<()> {
        let port = self.server.rsplit(':').next().and_then(|port| port.parse().ok()).context("a port")?;
        let mut attempt = 1;
        loop {
            {
                let mut apiserver = lock(&self.apiserver);
                apiserver.kill();
                *apiserver = start_apiserver(self.dir.path(), &self.programs, &self.etcd_url, port)?;
            }
            match self.wait_ready() {
                Err(error) if attempt < ATTEMPTS => eprintln!("control plane: trying again: {error:#}"),
                done => return done,
            }
            attempt += 1;
        }
    }

    /// SIGSTOP: whoever asks gets no answer, and no connection breaks.
    pub fn pause_apiserver(&self) -> Result<Paused<'_>> {
        Paused::new(lock(&self.apiserver))
    }

    /// SIGSTOP: the API server answers from its watch cache at most, and stores nothing.
    pub fn pause_etcd(&self) -> Result<Paused<'_>> {
        Paused::new(lock(&self.etcd))
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
        let platform = Platform::native()?;
        let libraries = node.join("usr/lib").join(platform.triplet());
        let mut etcd = Command::new(libraries.join(platform.loader().1));
        etcd.arg("--library-path").arg(&libraries).arg(node.join("usr/bin/etcd"));
        etcd.arg("--data-dir").arg(path("etcd")).arg("--unsafe-no-fsync");
        etcd.args(["--listen-client-urls", &etcd_url, "--advertise-client-urls", &etcd_url]);
        etcd.arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"));
        let etcd = Mutex::new(Running::start(&mut etcd, &path("etcd.log"))?);

        let apiserver = Mutex::new(start_apiserver(dir.path(), programs, &etcd_url, secure)?);
        let this = Self { apiserver, etcd, dir, programs: programs.to_owned(), etcd_url, server, ca };
        this.wait_ready()?;
        Ok(this)
    }

    fn wait_ready(&self) -> Result<()> {
        let log = |name: &str| {
            let text = fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(10)..].join("\n")
        };
        run::wait_for("kube-apiserver to be ready", READY_LIMIT, || {
            for (program, name) in [(&self.apiserver, "kube-apiserver"), (&self.etcd, "etcd")] {
                if let Some(status) = lock(program).0.try_wait()? {
                    bail!("{name} ended with {status}");
                }
            }
            Ok(self.kubectl(&["get", "--raw", "/readyz"]).is_ok()
                && self.kubectl(&["get", "namespace", "default"]).is_ok())
        })
        .with_context(|| {
            format!("the end of apiserver.log:\n{}\nof etcd.log:\n{}", log("apiserver.log"), log("etcd.log"))
        })
    }
}

fn lock(program: &Mutex<Running>) -> MutexGuard<'_, Running> {
    // Replaced as a whole: fit for use after a panic.
    program.lock().unwrap_or_else(PoisonError::into_inner)
}

/// With its certificates in `dir`. Its logs there are continued.
fn start_apiserver(dir: &Path, programs: &Path, etcd_url: &str, port: u16) -> Result<Running> {
    fs::write(dir.join("audit.yaml"), AUDIT_POLICY)?;
    let flag = |name: &str, file: &str| format!("--{name}={}", dir.join(file).display());
    let mut command = Command::new(programs.join("kube-apiserver"));
    command.args([format!("--etcd-servers={etcd_url}"), format!("--secure-port={port}")]);
    command.args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--allow-privileged=true"]);
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
    // Each entry is written when its request has been answered, or a moment later.
    command.args([flag("audit-policy-file", "audit.yaml"), flag("audit-log-path", "audit.log")]);
    command.arg("--audit-log-mode=blocking");
    Running::start(&mut command, &dir.join("apiserver.log"))
}

impl Paused<'_> {
    fn new(program: MutexGuard<'_, Running>) -> Result<Paused<'_>> {
        kill_process(program.pid(), Signal::STOP).context("could not stop a program of the control plane")?;
        Ok(Paused(program))
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        // It was not waited for, so the number is still its own; and one that died meanwhile needs no signal.
        let _ = kill_process(self.0.pid(), Signal::CONT);
    }
}

impl Running {
    fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self(command.spawn().with_context(|| format!("could not start {}", run::describe(command)))?))
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    fn kill(&mut self) {
        // An error here means that it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing is worth keeping.
        self.kill();
    }
}

fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let listeners: Vec<TcpListener> =
        (0..N).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<_>>()?;
    let ports: Vec<u16> =
        listeners.iter().map(|at| Ok(at.local_addr()?.port())).collect::<std::io::Result<_>>()?;
    ports.try_into().map_err(|_| anyhow::anyhow!("asked for {N} ports"))
}
