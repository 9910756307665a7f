//! The two SSH servers in front of one builder, and OpenSSH's client for both.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::client::{Client, PIECE};
use crate::parts::{host, rootfs};
use crate::root::Root;
use crate::run;

const START_LIMIT: Duration = Duration::from_secs(20);
/// Bytes that the pipes to and from OpenSSH's client hold.
const PIPE_SIZE: usize = 1 << 20;

/// Keys, and where servers and clients keep their files.
pub struct Desk {
    dir: PathBuf,
    builder: PathBuf,
}

/// A server that listens. It ends when this is dropped.
pub struct Server {
    child: Child,
    pub port: u16,
}

impl Server {
    /// Processor time that the server and its sessions have used so far, in seconds.
    pub fn cpu(&self) -> Result<f64> {
        super::server::cpu_of_tree(self.child.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Desk {
    /// Makes keys in `dir`, an empty directory, for sessions with this builder.
    pub fn new(dir: &Path, builder: &Path) -> Result<Self> {
        host::ensure(host::SSH_TOOLS)?;
        for name in ["host", "id"] {
            let mut keygen = Command::new("ssh-keygen");
            run::run(keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"]).arg(dir.join(name)))?;
        }
        let builder = fs::canonicalize(builder)?;
        Ok(Self { dir: dir.to_owned(), builder })
    }

    /// The store that both servers' sessions work on, in turns.
    pub fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// `drover-builder listen`.
    pub fn drover(&self) -> Result<Server> {
        let mut command = Command::new(&self.builder);
        command.args(["listen", "--listen", "127.0.0.1:0", "--store"]).arg(self.store());
        command.arg("--host-key").arg(self.dir.join("host"));
        command.arg("--authorized-key").arg(self.dir.join("id.pub"));
        let log = File::create(self.dir.join("drover.log"))?;
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()?;
        let lines = BufReader::new(child.stdout.take().context("no standard output")?).lines();
        let mut server = Server { child, port: 0 };
        for line in lines {
            if let Some(port) = line?.strip_prefix("listening: 127.0.0.1:") {
                server.port = port.parse()?;
                return Ok(server);
            }
        }
        Err(self.failed("drover-builder listen", "drover.log"))
    }

    /// OpenSSH's sshd, whose one key has the builder as its forced command: what people put in front of it.
    pub fn sshd(&self) -> Result<Server> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let file = |name: &str| self.dir.join(name);
        let command = format!("{} serve --write --store {}", self.builder.display(), self.store().display());
        let key = fs::read_to_string(file("id.pub"))?;
        fs::write(file("authorized_keys"), format!("command=\"{command}\",restrict {key}"))?;
        let configuration = "HostKey /state/host\nAuthorizedKeysFile /state/authorized_keys\nPidFile none\nUsePAM no\n\
            PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin forced-commands-only\nStrictModes no\n";
        fs::write(file("config"), format!("ListenAddress 127.0.0.1:{port}\n{configuration}"))?;
        // The package's own script would have made this user; sessions are root's.
        let users = "root:x:0:0:root:/root:/bin/sh\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n";
        fs::write(file("passwd"), users)?;
        let root = Root::new(rootfs::sshd()?).bind(&self.dir, &self.dir).bind(&self.dir, "/state");
        let root = root.bind_ro(file("passwd"), "/etc/passwd").bind_ro(&self.builder, &self.builder);
        let log = File::create(file("sshd.log"))?;
        let mut sshd = root.own_processes().command("sh")?;
        sshd.args(["-c", "mkdir -p /run/sshd && exec /usr/sbin/sshd -D -e -f /state/config"]);
        let child = sshd.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let mut server = Server { child, port };
        run::wait_for("sshd to listen", START_LIMIT, || {
            if server.child.try_wait()?.is_some() {
                return Err(self.failed("sshd", "sshd.log"));
            }
            Ok(fs::read_to_string(file("sshd.log"))?.contains("Server listening on"))
        })?;
        Ok(server)
    }

    /// A session with the server at a port of loopback.
    pub fn connect(&self, port: u16, options: &[&str]) -> Result<Session> {
        let host = fs::read_to_string(self.dir.join("host.pub"))?;
        let known = self.dir.join("known_hosts");
        fs::write(&known, format!("[127.0.0.1]:{port} {host}"))?;
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-p", &port.to_string(), "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]);
        ssh.args(["-o", "StrictHostKeyChecking=yes", "-i"]).arg(self.dir.join("id"));
        ssh.arg("-o").arg(format!("UserKnownHostsFile={}", known.display())).args(options);
        ssh.args(["root@127.0.0.1", "serve"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = ssh.spawn().context("could not start ssh")?;
        let (input, output) = (child.stdout.take(), child.stdin.take());
        let (input, output) = (input.context("no standard output")?, output.context("no standard input")?);
        // So that ssh rarely waits for this client, and what is measured is the servers.
        rustix::pipe::fcntl_setpipe_size(&input, PIPE_SIZE)?;
        rustix::pipe::fcntl_setpipe_size(&output, PIPE_SIZE)?;
        let client = Client::connect(BufReader::with_capacity(PIECE, input), output)?;
        Ok(Session { client, child })
    }

    fn failed(&self, program: &str, log: &str) -> anyhow::Error {
        let said = fs::read_to_string(self.dir.join(log)).unwrap_or_default();
        anyhow::anyhow!("{program} did not start: {said}")
    }
}

/// What speaks the protocol at the client's end of SSH.
pub type ProtocolClient = Client<BufReader<ChildStdout>, ChildStdin>;

/// A session through SSH.
pub struct Session {
    pub client: ProtocolClient,
    child: Child,
}

impl Session {
    /// Processor time that OpenSSH's client has used so far, in seconds.
    pub fn client_cpu(&self) -> Result<f64> {
        super::server::cpu_of(self.child.id())
    }

    /// Does something, and says how much processor time the client had used before.
    pub fn act(mut self, act: impl FnOnce(&mut ProtocolClient) -> Result<()>) -> Result<(Self, f64)> {
        let before = self.client_cpu()?;
        act(&mut self.client)?;
        Ok((self, before))
    }

    /// Ends it as clients do, and waits.
    pub fn end(self) -> Result<()> {
        let Self { client, mut child } = self;
        drop(client);
        let status = child.wait()?;
        ensure!(status.success(), "ssh ended with {status}");
        Ok(())
    }
}
