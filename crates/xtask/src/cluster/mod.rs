//! A real one-node Kubernetes: kube-apiserver, controller manager, scheduler, kubelet, kube-proxy, etcd, containerd and runc.
//!
//! All of it lives in one network, one mount and one process namespace, so every address is its own and ending one process
//! ends everything. Its state lies in one directory: `$DROVER_CLUSTER_DIR`, or `cluster` in the cache. It takes root.
//!
//! The node has the address 10.99.0.1, pods 10.98.0.0/16, services 10.96.0.0/16. There is no DNS, no registry and no way
//! out: images come by [`Cluster::load`], and servers that pods should reach run in the network namespace
//! ([`Cluster::netns_command`]) and are asked at 10.99.0.1.

mod cgroups;
mod files;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::parts::{self, go, host, rootfs};
use crate::root::Root;
use crate::run;

/// The address of the node inside the cluster's network: what pods reach servers of tests at.
pub const NODE_ADDRESS: &str = "10.99.0.1";

const READY_LIMIT: Duration = Duration::from_secs(120);
const END_LIMIT: Duration = Duration::from_secs(30);
/// Where the node has the script that is its first process.
const NODE_SCRIPT: &str = "/opt/node.sh";

/// A cluster, running or not.
#[derive(Clone, Debug)]
pub struct Cluster {
    dir: PathBuf,
    /// Of the network namespace and of the control group; clusters in other directories have other names.
    name: String,
}

impl Cluster {
    /// The cluster of this user, whether it runs or not.
    pub fn find() -> Result<Self> {
        let named = std::env::var_os("DROVER_CLUSTER_DIR").filter(|dir| !dir.is_empty());
        named.map_or_else(
            || Self::in_dir(&parts::cache()?.join("cluster")),
            |dir| Self::in_dir(Path::new(&dir)),
        )
    }

    /// The cluster whose state lies in `dir`, whether it runs or not. Any number of them may run side by side.
    pub fn in_dir(dir: &Path) -> Result<Self> {
        let dir = std::path::absolute(dir)?;
        let name = format!("drover-{}", &parts::key(&dir.to_string_lossy())[..6]);
        Ok(Self { dir, name })
    }

    /// The cluster of this user, running and Ready.
    pub fn up() -> Result<Self> {
        let cluster = Self::find()?;
        cluster.ensure_up()?;
        Ok(cluster)
    }

    /// Sees to it that the cluster runs, from the parts and files of this version, and that its node is Ready.
    pub fn ensure_up(&self) -> Result<()> {
        if !host::is_root() {
            bail!("the cluster takes root, for its namespaces and control groups");
        }
        host::ensure(host::ROOT_TOOLS)?;
        host::ensure(host::NET_TOOLS)?;
        let (node, programs) = (rootfs::node()?, go::kubernetes()?);
        let recipe = files::recipe(&node, &programs);
        let _lock = self.lock()?;
        let same = fs::read_to_string(self.dir.join("recipe")).is_ok_and(|was| was == recipe);
        if !(same && self.is_running()) {
            self.remove()?;
            self.start(&node, &programs)?;
        }
        self.wait_ready()?;
        Ok(fs::write(self.dir.join("recipe"), recipe)?)
    }

    /// Ends the cluster and removes all that it left: processes, network namespace, control groups, state.
    pub fn down(&self) -> Result<()> {
        let _lock = self.lock()?;
        self.remove()
    }

    /// Whether the node's first process is alive.
    pub fn is_running(&self) -> bool {
        self.main_process().is_some()
    }

    /// The network namespace, as `nsenter --net=` and `ip netns` know it.
    pub fn netns(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// The kubeconfig of the cluster's administrator. It works inside of the network namespace.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("etc/admin.conf")
    }

    /// The directory of the logs: `NAME.log` of each program, `audit.log` of the API server, one JSON object a line.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("var/log/kube")
    }

    /// The kubelet's directory as this machine sees it; `pods` in it has the volumes of pods.
    pub fn kubelet_dir(&self) -> PathBuf {
        self.dir.join("var/lib/kubelet")
    }

    /// A program of this machine, with its files, in the cluster's network; KUBECONFIG is the administrator's.
    pub fn netns_command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns().display())).arg("--").arg(program);
        command.env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// A program of the node's root filesystem beside the running node: its mounts, processes and network.
    pub fn node_command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let main =
            self.main_process().context("the cluster does not run; start it: cargo xtask cluster up")?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={main}"))
            .args(["--mount", "--pid", "--net", "--uts", "--"])
            .arg(program);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        Ok(command)
    }

    /// kubectl as the administrator; add arguments and run it.
    pub fn kubectl_command(&self) -> Result<Command> {
        Ok(self.netns_command(go::kubernetes()?.join("kubectl")))
    }

    /// Helm as the administrator; add arguments and run it.
    pub fn helm_command(&self) -> Result<Command> {
        Ok(self.netns_command(go::helm()?))
    }

    /// Runs kubectl and returns its standard output; an exit code other than 0 is an error with its standard error.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        run::stdout(self.kubectl_command()?.args(args))
    }

    /// `kubectl apply -f -` with this YAML.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        run::filter(self.kubectl_command()?.args(["apply", "-f", "-"]), yaml.as_bytes())
    }

    /// Brings the images of an OCI layout or of `docker save`, a tar file, onto the node.
    pub fn load(&self, image: &Path) -> Result<()> {
        let file =
            File::open(image).with_context(|| format!("could not open the image {}", image.display()))?;
        let mut import = self.node_command("ctr")?;
        import.args(["--namespace", "k8s.io", "image", "import", "-"]).stdin(file).stdout(Stdio::null());
        run::run(&mut import)
    }

    fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.dir).with_context(|| format!("could not make {}", self.dir.display()))?;
        parts::lock(&parts::cache()?, &self.name)
    }

    fn start(&self, node: &Path, programs: &Path) -> Result<()> {
        eprintln!("cluster: starting {} in {}", self.name, self.dir.display());
        files::write(&self.dir, &self.name, node)?;
        run::stdout(Command::new("ip").args(["netns", "add", &self.name]))?;
        cgroups::make(&self.name)?;
        let inside = Root::new(node)
            .bind(self.dir.join("var"), "/var")
            .bind(self.dir.join("etc"), "/etc/kubernetes")
            .bind_ro(programs, "/opt/kube")
            .bind_ro(self.dir.join("node.sh"), NODE_SCRIPT)
            .bind_ro(self.dir.join("pause.tar"), "/opt/pause.tar")
            .bind_ro(self.dir.join("etc/cni.json"), "/etc/cni/net.d/10-drover.conflist")
            .bind_ro(self.dir.join("etc/containerd.toml"), "/etc/containerd/config.toml")
            .netns(self.netns())
            .own_processes()
            .command("sh")?;
        // A session of its own: the cluster outlives the terminal that it was started from.
        let log = File::create(self.logs().join("node.log"))?;
        let mut detached = Command::new("setsid");
        detached.arg(inside.get_program()).args(inside.get_args()).arg(NODE_SCRIPT).env("PATH", host::path());
        detached.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        detached.current_dir("/").spawn().context("could not start the node")?;
        Ok(())
    }

    fn wait_ready(&self) -> Result<()> {
        let jsonpath = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
        run::wait_for("the node to be Ready and the default service account to exist", READY_LIMIT, || {
            let ready =
                self.kubectl(&["get", "node", "node-0", "-o", jsonpath]).is_ok_and(|status| status == "True");
            Ok(ready && self.kubectl(&["get", "serviceaccount", "default"]).is_ok())
        })
        .with_context(|| format!("the cluster does not come up; its logs are in {}", self.logs().display()))
    }

    fn remove(&self) -> Result<()> {
        if self.netns().exists() {
            run::wait_for("the cluster's processes to end", END_LIMIT, || {
                let pids = self.processes()?;
                if !pids.is_empty() {
                    // Some may be gone by now, which is an exit code of kill's and no error of ours.
                    run::output(
                        Command::new("kill").arg("-KILL").args(pids.iter().map(ToString::to_string)),
                    )?;
                }
                Ok(pids.is_empty())
            })?;
            run::stdout(Command::new("ip").args(["netns", "delete", &self.name]))?;
        }
        run::wait_for("the cluster's control groups to be empty", END_LIMIT, || cgroups::remove(&self.name))?;
        for name in ["var", "etc", "node.sh", "pause.tar", "recipe"] {
            let path = self.dir.join(name);
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("could not remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Everything in the cluster's network namespace. Pods have their own, but live in the node's process namespace.
    fn processes(&self) -> Result<Vec<u32>> {
        let listed = run::stdout(Command::new("ip").args(["netns", "pids", &self.name]))?;
        listed.split_whitespace().map(|pid| Ok(pid.parse()?)).collect()
    }

    /// The first process of the node's process namespace.
    fn main_process(&self) -> Option<u32> {
        let pids = self.netns().exists().then(|| self.processes().ok())??;
        pids.into_iter().find(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            is_main(&status, &fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default())
        })
    }
}

/// Whether a process with this `/proc/PID/status` and `cmdline` is a node's first one. Others in its network may be first in
/// process namespaces of their own, as the caches and the Nix of the tests are, and have lower numbers.
fn is_main(status: &str, command: &[u8]) -> bool {
    // The ids in all process namespaces that it is in, ours first: the node's first process is 1 in the second.
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    ids.split_whitespace().skip(1).eq(["1"])
        && command.split(|byte| *byte == 0).any(|word| word == NODE_SCRIPT.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_told_from_what_else_is_in_its_network() {
        let status = |ids: &str| format!("Name:\tsh\nNSpid:\t{ids}\nThreads:\t1\n");
        let script = b"sh\0/opt/node.sh\0";
        assert!(is_main(&status("28693\t1"), script));
        assert!(!is_main(&status("514\t1"), b"nginx\0-c\0/state/nginx.conf\0"));
        assert!(!is_main(&status("30000\t77\t1"), b"sh\0/opt/node.sh\0"), "in a container");
        assert!(!is_main(&status("28700\t9"), script));
        assert!(!is_main("", b""), "gone");
    }
}
