//! The two servers under test, each with a store of its own, and what they use of the machine.

use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::client::Client;
use crate::parts::rootfs::{self, Nix};
use crate::root::Root;

/// Clock ticks a second in `/proc/PID/stat`: the same on every Linux (USER_HZ).
const TICKS: f64 = 100.0;

/// Who serves.
#[derive(Clone, Debug)]
pub enum Program {
    /// Real Nix, of the version that the design compares with.
    Nix,
    /// A `drover-builder`.
    Drover(PathBuf),
}

/// A running session of one of them, with its client.
pub struct Server {
    pub client: Client<BufReader<ChildStdout>, ChildStdin>,
    child: Child,
}

/// What a process has used so far.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Seconds, user and system.
    pub cpu: f64,
    /// Most bytes of memory (VmHWM).
    pub peak: u64,
}

impl Program {
    /// The command that serves the store below `root`, which has the directory `nix`, on its standard input and output.
    /// Builds run in the sandbox, with a static busybox as the shell.
    pub fn command(&self, root: &Path) -> Result<Command> {
        let nix_root = rootfs::nix(Nix::V2_34)?;
        match self {
            Self::Nix => {
                let mut command = Root::new(nix_root).bind(root.join("nix"), "/nix").command("nix-store")?;
                let config = "substitute = false\nsandbox = true\nsandbox-fallback = false\nbuild-users-group =\n\
                              sandbox-paths = /bin/sh=/bin/busybox\n";
                command.args(["--serve", "--write"]).env("NIX_CONFIG", config);
                for name in ["NIX_PATH", "NIX_REMOTE", "NIX_STORE_DIR", "NIX_STATE_DIR"] {
                    command.env_remove(name);
                }
                Ok(command)
            }
            Self::Drover(program) => {
                let mut command = Command::new(program);
                command.args(["serve", "--write", "--store"]).arg(root);
                command.arg("--sandbox-shell").arg(nix_root.join("bin/busybox"));
                Ok(command)
            }
        }
    }

    /// Starts a session on the store below `root`. The log goes to `log`.
    pub fn start(&self, root: &Path, log: Stdio) -> Result<Server> {
        std::fs::create_dir_all(root.join("nix"))?;
        let mut child =
            self.command(root)?.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn()?;
        let (input, output) = (child.stdout.take(), child.stdin.take());
        let (input, output) = (input.context("no standard output")?, output.context("no standard input")?);
        // Answers may come in many small pieces; archives pass through it in large ones.
        let client = Client::connect(BufReader::with_capacity(super::client::PIECE, input), output)?;
        Ok(Server { client, child })
    }
}

impl Server {
    /// What the server has used so far.
    pub fn usage(&self) -> Result<Usage> {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let status = std::fs::read_to_string(proc.join("status"))?;
        let cpu = cpu_of(self.child.id())?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let peak: u64 = peak.trim().trim_end_matches(" kB").parse()?;
        Ok(Usage { cpu, peak: peak << 10 })
    }

    /// Ends the session as clients do, and waits.
    pub fn end(self) -> Result<()> {
        let Self { client, mut child } = self;
        drop(client);
        let status = child.wait()?;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }
}

/// Seconds of processor time that a process has used, user and system.
pub fn cpu_of(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    cpu_seconds(&stat).with_context(|| format!("no times in {stat:?}"))
}

/// The same of a process and of all that descend from it, those that ended included.
pub fn cpu_of_tree(root: u32) -> Result<f64> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        // What ends meanwhile has gone into its parent's times, which may be read already: a little is lost then.
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let behind_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let parent = behind_name.split_ascii_whitespace().nth(1).and_then(|word| word.parse::<u32>().ok());
        if let (Some(parent), Some(cpu)) = (parent, cpu_seconds(&stat)) {
            parents.push((pid, parent, cpu));
        }
    }
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(&parent) = tree.get(next) {
        tree.extend(parents.iter().filter(|(_, of, _)| *of == parent).map(|(pid, ..)| *pid));
        next += 1;
    }
    Ok(parents.iter().filter(|(pid, ..)| tree.contains(pid)).map(|(.., cpu)| cpu).sum())
}

/// User and system time, that of children that ended included: fields 14 to 17 of `/proc/PID/stat`. The name before them
/// may hold anything but ends at the last `)`.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11).take(4).collect();
    let ticks = fields.iter().map(|field| field.parse::<f64>().ok()).sum::<Option<f64>>()?;
    (fields.len() == 4).then_some(ticks / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_behind_a_name_with_spaces() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 3 7 20 0 1 0 1";
        assert_eq!(cpu_seconds(stat), Some(3.1));
        assert_eq!(cpu_seconds("7"), None);
    }
}
