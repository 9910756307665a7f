//! What breaks a cluster on purpose, from outside: it finds processes of the node and of its pods in this machine's own list,
//! so that it works while the API server does not, and ends or stops them.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::Cluster;

/// A process of a cluster, at the moment in which it was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Process {
    pub pid: i32,
    /// When it started, in the kernel's ticks: with the id it is a name that is never given twice.
    pub started: u64,
    /// The command line, with spaces between arguments.
    pub command: String,
    /// The control group of the first hierarchy that places it below the cluster's; it names pod and container.
    pub group: String,
}

/// The node's own programs that are called so, such as `kubelet`.
pub fn programs(cluster: &Cluster, name: &str) -> Result<Vec<Process>> {
    let namespace = fs::metadata(cluster.netns())?.ino();
    let found = all("")?.into_iter().filter(|process| {
        let net = fs::metadata(format!("/proc/{}/ns/net", process.pid));
        net.is_ok_and(|net| net.ino() == namespace)
            && process.group.is_empty()
            && program(&process.command) == name
    });
    Ok(found.collect())
}

/// Processes in the cluster's pods with these words on their command line.
pub fn in_pods(cluster: &Cluster, words: &str) -> Result<Vec<Process>> {
    let netns = cluster.netns();
    let name = netns.file_name().and_then(|name| name.to_str()).context("a namespace has a name")?;
    let all = all(&format!("/{name}/"))?.into_iter();
    Ok(all.filter(|process| !process.group.is_empty() && process.command.contains(words)).collect())
}

/// Those of [`in_pods`] that are in the pod with this uid.
pub fn in_pod(cluster: &Cluster, pod_uid: &str, words: &str) -> Result<Vec<Process>> {
    let found = in_pods(cluster, words)?.into_iter();
    Ok(found.filter(|process| process.group.contains(pod_uid)).collect())
}

impl Process {
    /// Whether it was there to be sent a signal.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        let pid = Pid::from_raw(self.pid).context("a process has an id")?;
        match kill_process(pid, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(error) => {
                Err(error).with_context(|| format!("could not send {signal:?} to {}", self.command))
            }
        }
    }

    pub fn kill(&self) -> Result<bool> {
        self.signal(Signal::KILL)
    }

    /// Whether it is still there: this one, and not another one with its number.
    pub fn is_alive(&self) -> bool {
        read(self.pid, "").is_some_and(|now| now.started == self.started)
    }
}

/// Every process of this machine; `group` is filled in where it contains `below`.
fn all(below: &str) -> Result<Vec<Process>> {
    let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(pids.filter_map(|pid| read(pid, below)).collect())
}

/// None if it went meanwhile, or is a zombie without a command line.
fn read(pid: i32, below: &str) -> Option<Process> {
    let dir = format!("/proc/{pid}");
    let text = |file: &str| {
        fs::read(Path::new(&dir).join(file)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    let command = text("cmdline").ok()?.replace('\0', " ").trim_end().to_owned();
    // Linux: Documentation/filesystems/proc.rst, stat; the program's name is in parentheses and may contain any.
    let stat = text("stat").ok()?;
    let started = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let groups = text("cgroup").ok()?;
    let group = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let group = group.into_iter().find(|group| !below.is_empty() && format!("{group}/").contains(below));
    (!command.is_empty()).then(|| Process {
        pid,
        started,
        command: command.clone(),
        group: group.unwrap_or_default().to_owned(),
    })
}

fn program(command: &str) -> &str {
    let first = command.split(' ').next().unwrap_or_default();
    first.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let this = i32::try_from(std::process::id()).unwrap();
        let found = all("").unwrap().into_iter().find(|process| process.pid == this).unwrap();
        assert!(found.is_alive() && found.group.is_empty() && found.started > 0);
        assert!(!Process { started: found.started + 1, ..found }.is_alive(), "the id of another process");
        assert_eq!(program("/opt/kube/kubelet --config=/a b"), "kubelet");
    }
}
