//! Programs in a root filesystem of their own: a mount namespace, an overlay in memory over the part, and pivot_root.
//!
//! The part is never written to, so any number of programs may use it at a time, and what they leave goes with them.
//! It takes root (CAP_SYS_ADMIN in the initial user namespace) and util-linux's `unshare`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::parts;

const IN_ROOT: &str = include_str!("scripts/in-root.sh");

/// How a program is run in a root filesystem. Build it up, then ask for the [`command`](Self::command).
#[derive(Clone, Debug)]
pub struct Root {
    rootfs: PathBuf,
    binds: Vec<(PathBuf, PathBuf, &'static str)>,
    cwd: PathBuf,
    netns: Option<PathBuf>,
    own_processes: bool,
}

impl Root {
    /// The root filesystem in `rootfs`, with nothing of the machine but `/dev`, `/sys` and a fresh `/proc`; it starts in `/`.
    pub fn new(rootfs: impl Into<PathBuf>) -> Self {
        Self { rootfs: rootfs.into(), binds: Vec::new(), cwd: "/".into(), netns: None, own_processes: false }
    }

    /// Shows the file or directory `from` at `to` inside, writable, with the mounts below it.
    pub fn bind(mut self, from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        self.binds.push((from.into(), to.into(), "rw"));
        self
    }

    /// Shows the file or directory `from` at `to` inside, read-only.
    pub fn bind_ro(mut self, from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        self.binds.push((from.into(), to.into(), "ro"));
        self
    }

    /// Starts in this directory, as seen inside.
    pub fn cwd(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = dir.into();
        self
    }

    /// Runs in the network namespace that this file names (`/run/netns/NAME`).
    pub fn netns(mut self, file: impl Into<PathBuf>) -> Self {
        self.netns = Some(file.into());
        self
    }

    /// Gives the program process and host name namespaces of its own: when it ends, everything that it started ends.
    /// The command is then the parent of the program, and killing it kills the program.
    pub fn own_processes(mut self) -> Self {
        self.own_processes = true;
        self
    }

    /// The command that runs `program` inside. Its environment is inherited, but for PATH, HOME and the XDG directories.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        if !parts::host::is_root() {
            bail!("running a program in {} takes root, for its mounts", self.rootfs.display());
        }
        let scratch = parts::cache()?.join("mnt");
        std::fs::create_dir_all(&scratch).with_context(|| format!("could not make {}", scratch.display()))?;
        let mut words: Vec<OsString> = Vec::new();
        // Not `ip netns exec`: it remounts /sys and hides the control groups from what runs inside.
        if let Some(netns) = &self.netns {
            words.extend(["nsenter".into(), join("--net=", netns), "--".into()]);
        }
        words.extend(["unshare", "--mount", "--propagation=private"].map(OsString::from));
        if self.own_processes {
            words.extend(["--uts", "--pid", "--fork", "--kill-child"].map(OsString::from));
        }
        words.extend(["sh", "-c", IN_ROOT, "in-root.sh"].map(OsString::from));
        words.extend([&self.rootfs, &scratch, &self.cwd].map(|path| path.clone().into_os_string()));
        for (from, to, mode) in &self.binds {
            words.extend(["--bind".into(), from.into(), to.into(), OsString::from(mode)]);
        }
        words.extend(["--".into(), program.as_ref().to_owned()]);
        let mut words = words.into_iter();
        let mut command = Command::new(words.next().context("no words")?);
        command
            .args(words)
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root")
            // What programs inside remember goes with the root: Nix would find in one test's cache what another's has.
            .env_remove("XDG_CACHE_HOME")
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("XDG_DATA_HOME")
            .env_remove("XDG_STATE_HOME");
        Ok(command)
    }
}

fn join(flag: &str, path: &Path) -> OsString {
    let mut word = OsString::from(flag);
    word.push(path);
    word
}
