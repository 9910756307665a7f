//! A real OpenSSH server on loopback, whose keys each may run one command and nothing else.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;
use xtask::parts::host;
use xtask::parts::rootfs;
use xtask::root::Root;
use xtask::run;

const START_LIMIT: Duration = Duration::from_secs(20);
/// Where clients find the server, which has this name for host keys as well.
pub const ADDRESS: &str = "127.0.0.1";

/// A running sshd with its own configuration, host key and port. It ends when this is dropped, with all its sessions.
pub struct Sshd {
    child: Child,
    state: TempDir,
    port: u16,
}

impl Sshd {
    /// One key for each of `commands`, in order: what an administrator writes behind `command=`. The commands see `/tmp`
    /// and the files and directories in `visible`, at the same paths.
    pub fn start(commands: &[&str], visible: &[&Path]) -> Result<Self> {
        host::ensure(host::SSH_TOOLS)?;
        let state = TempDir::with_prefix("drover-sshd-")?;
        let port = TcpListener::bind((ADDRESS, 0))?.local_addr()?.port();
        let keygen = |name: &str| {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"]).arg(state.path().join(name));
            run::run(&mut keygen)?;
            fs::read_to_string(state.path().join(name).with_extension("pub"))
                .context("ssh-keygen made no key")
        };
        let host_key = keygen("host")?;
        fs::write(state.path().join("known_hosts"), format!("[{ADDRESS}]:{port} {host_key}"))?;
        let mut authorized = String::new();
        for (number, command) in commands.iter().enumerate() {
            let key = keygen(&format!("key-{number}"))?;
            authorized += &format!("command=\"{}\",restrict {key}", command.replace('"', "\\\""));
        }
        fs::write(state.path().join("authorized_keys"), authorized)?;
        fs::write(state.path().join("config"), configuration(port))?;
        // The package's own script would have made this user; sessions are root's.
        fs::write(
            state.path().join("passwd"),
            "root:x:0:0:root:/root:/bin/sh\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n",
        )?;

        let mut root = Root::new(rootfs::sshd()?).bind("/tmp", "/tmp").bind(state.path(), "/state");
        root = root.bind_ro(state.path().join("passwd"), "/etc/passwd").own_processes();
        for path in visible {
            root = root.bind(*path, *path);
        }
        let log = File::create(state.path().join("log"))?;
        let mut sshd = root.command("sh")?;
        // The shell is the first process of its namespace. It ends, and all with it, when its standard input does: also
        // when whoever runs the test is killed.
        sshd.args(["-c", "mkdir -p /run/sshd && { /usr/sbin/sshd -D -e -f /state/config & } && read -r _"]);
        sshd.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log);
        let child = sshd.spawn().context("could not start sshd")?;
        let mut this = Self { child, state, port };
        run::wait_for("sshd to listen", START_LIMIT, || {
            if let Some(status) = this.child.try_wait()? {
                bail!("sshd ended with {status}: {}", this.log());
            }
            Ok(this.log().contains("Server listening on"))
        })?;
        Ok(this)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The private key whose command is the one of this number.
    pub fn key(&self, number: usize) -> PathBuf {
        self.state.path().join(format!("key-{number}"))
    }

    /// Words for `ssh` before the host, which is [`ADDRESS`]: this server and no other, and nothing of the user's own.
    pub fn options(&self, key: usize) -> String {
        format!(
            "-F none -p {} -i {} -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=yes -o UserKnownHostsFile={}",
            self.port,
            self.key(key).display(),
            self.state.path().join("known_hosts").display()
        )
    }

    /// What the server has said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.state.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        // The child is the parent of a process namespace, which ends with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn configuration(port: u16) -> String {
    format!(
        "ListenAddress {ADDRESS}:{port}
HostKey /state/host
AuthorizedKeysFile /state/authorized_keys
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin forced-commands-only
StrictModes no
LogLevel VERBOSE
"
    )
}
