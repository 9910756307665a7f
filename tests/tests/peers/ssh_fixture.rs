//! A `drover-builder listen` of its own on loopback, real OpenSSH clients for it, and real Nix's judgement of its store.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use drover_nix::{ContentAddress, Method, PathInfo, Sha256, StoreDir, nar};
use drover_serve::Client;
use drover_tests::{Nix, Peer, program};
use tempfile::TempDir;
use xtask::parts::host;
use xtask::run;

/// Longest that anything here may take; all of it is for machines that are busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Keys, certificates and a directory for a store.
pub(crate) struct Keys {
    dir: TempDir,
}

impl Keys {
    pub(crate) fn new() -> Result<Self> {
        host::ensure(host::SSH_TOOLS)?;
        Ok(Self { dir: TempDir::with_prefix("drover-ssh-")? })
    }

    /// Makes a key pair. Its public line.
    pub(crate) fn make(&self, name: &str) -> Result<String> {
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"]).arg(self.path(name));
        run::run(&mut keygen)?;
        self.public(name)
    }

    pub(crate) fn public(&self, name: &str) -> Result<String> {
        Ok(std::fs::read_to_string(self.path(&format!("{name}.pub")))?.trim().to_owned())
    }

    /// A copy of the key `of` that goes by another name, with a certificate by the authority `ca`.
    pub(crate) fn certify(&self, name: &str, of: &str, ca: &str, options: &[&str]) -> Result<()> {
        std::fs::copy(self.path(of), self.path(name))?;
        std::fs::write(self.path(&format!("{name}.pub")), self.public(of)?)?;
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-s"]).arg(self.path(ca)).args(["-I", name]).args(options);
        run::run(keygen.arg(self.path(&format!("{name}.pub"))))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// A running server.
pub(crate) struct Listener {
    child: Child,
    keys: Keys,
    port: u16,
    log: Arc<(Mutex<String>, Condvar)>,
}

impl Listener {
    /// A server with the keys in `authorized`, lines or files, and one that is called `id`, which may log in too.
    pub(crate) fn with_id(options: &[&str]) -> Result<Self> {
        let keys = Keys::new()?;
        let id = keys.make("id")?;
        Self::start(keys, &[&id], options)
    }

    pub(crate) fn start(keys: Keys, authorized: &[&str], options: &[&str]) -> Result<Self> {
        let mut command = Command::new(program("drover-builder")?);
        command.args(["listen", "--listen", "127.0.0.1:0", "--store"]).arg(keys.path("store")).args(options);
        for line in authorized {
            command.args(["--authorized-key", line]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let log = Arc::new((Mutex::new(String::new()), Condvar::new()));
        let (mut stderr, sink) = (child.stderr.take().context("no stderr")?, Arc::clone(&log));
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut chunk) {
                let mut text = sink.0.lock().unwrap_or_else(|poison| poison.into_inner());
                text.push_str(&String::from_utf8_lossy(&chunk[..count]));
                sink.1.notify_all();
            }
        });
        let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        let mut this = Self { child, keys, port: 0, log };
        let mut line = |prefix: &str| -> Result<String> {
            let line = lines.next().with_context(|| format!("no {prefix:?}"))??;
            Ok(line.strip_prefix(prefix).with_context(|| line.clone())?.to_owned())
        };
        let begin = || -> Result<(String, u16)> {
            let key = line("host-key: ")?;
            line("sandbox: ")?;
            Ok((key, line("listening: 127.0.0.1:")?.parse()?))
        };
        let begun = { begin }();
        let (host_key, port) = begun.or_else(|error| bail!("{error:#}: {}", this.log_text()))?;
        this.port = port;
        std::fs::write(this.keys.path("known_hosts"), format!("[127.0.0.1]:{port} {host_key}\n"))?;
        Ok(this)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The root of the server's store.
    pub(crate) fn store(&self) -> PathBuf {
        self.keys.path("store")
    }

    /// `ssh` with nothing of the user's own, up to the host: `root@127.0.0.1`.
    pub(crate) fn ssh(&self, key: &str, options: &[&str]) -> Command {
        self.complete(Command::new("ssh"), key, options)
    }

    /// The same, which is ended after a while, whatever it is waiting for.
    pub(crate) fn ssh_for(&self, time: Duration, key: &str, options: &[&str]) -> Command {
        let mut timeout = Command::new("timeout");
        timeout.arg(time.as_secs().to_string()).arg("ssh");
        self.complete(timeout, key, options)
    }

    fn complete(&self, mut ssh: Command, key: &str, options: &[&str]) -> Command {
        ssh.args([
            "-F",
            "none",
            "-p",
            &self.port.to_string(),
            "-o",
            "BatchMode=yes",
            "-o",
            "IdentitiesOnly=yes",
        ]);
        ssh.args(["-o", "StrictHostKeyChecking=yes", "-i"]).arg(self.keys.path(key));
        ssh.arg("-o").arg(format!("UserKnownHostsFile={}", self.keys.path("known_hosts").display()));
        ssh.env_remove("SSH_AUTH_SOCK").args(options).arg("root@127.0.0.1");
        ssh.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        ssh
    }

    /// A session of the key `id`.
    pub(crate) fn session(&self) -> Result<Session> {
        Session::start(self.ssh("id", &[]).arg("anything"))
    }

    /// Whether this key gets in: a whole session, or what ssh says.
    pub(crate) fn try_login(&self, key: &str, options: &[&str]) -> Result<Result<(), String>> {
        let mut command = self.ssh(key, options);
        match Session::start(command.arg("serve")) {
            Ok(session) => session.end().map(Ok),
            Err(error) => Ok(Err(format!("{error:#}"))),
        }
    }

    /// All that the server has said on standard error.
    pub(crate) fn log_text(&self) -> String {
        self.log.0.lock().unwrap_or_else(|poison| poison.into_inner()).clone()
    }

    /// Waits until the server has said something.
    pub(crate) fn says(&self, wanted: &str) -> Result<()> {
        let text = self.log.0.lock().unwrap_or_else(|poison| poison.into_inner());
        let waited = self.log.1.wait_timeout_while(text, PATIENCE, |text| !text.contains(wanted));
        let (text, timeout) = waited.unwrap_or_else(|poison| poison.into_inner());
        ensure!(!timeout.timed_out(), "the server never said {wanted:?} but:\n{text}");
        Ok(())
    }

    /// Tells the server to stop, and how long it took.
    pub(crate) fn stop(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        run::run(Command::new("kill").arg(self.child.id().to_string()))?;
        let status = self.child.wait()?;
        // The shell's number for SIGTERM: it did as it was told.
        ensure!(status.code() == Some(143), "the server ended with {status}:\n{}", self.log_text());
        Ok(begin.elapsed())
    }

    /// Real Nix finds nothing wrong, and nothing is left of what was not finished.
    pub(crate) fn verify(&self) -> Result<()> {
        let root = self.store().display().to_string();
        let peer = Peer::new(Nix::V2_34)?;
        let output =
            peer.command("nix-store")?.args(["--store", &root, "--verify", "--check-contents"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{said}");
        for complaint in ["error", "warning", "disappeared", "not valid", "modified"] {
            ensure!(!said.contains(complaint), "{said}");
        }
        Ok(())
    }

    /// What lies in the store directory.
    pub(crate) fn objects(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(self.store().join("nix/store"))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let mut names = names.collect::<Result<Vec<_>>>()?;
        names.retain(|name| name != ".links");
        names.sort();
        Ok(names)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = drover_store::fs::delete(&self.store().join("nix"));
    }
}

/// An `ssh` with the protocol's client at its end.
pub(crate) struct Session {
    pub(crate) client: Client<ChildStdout, ChildStdin>,
    pub(crate) ssh: Child,
}

impl Session {
    /// Starts it and greets the server. The error holds what ssh said.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let mut ssh = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (stdout, stdin) = (ssh.stdout.take().context("piped")?, ssh.stdin.take().context("piped")?);
        match Client::connect(stdout, stdin, StoreDir::default()) {
            Ok(client) => Ok(Self { client, ssh }),
            Err(error) => bail!("{error}: {}", text(&ssh.wait_with_output()?)),
        }
    }

    /// Ends it as clients do.
    pub(crate) fn end(self) -> Result<()> {
        let Self { client, ssh } = self;
        drop(client);
        let output = ssh.wait_with_output()?;
        ensure!(output.status.success(), "{}: {}", output.status, text(&output));
        Ok(())
    }
}

/// Both outputs.
pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A store object of one file: what is said of it, and its archive.
pub(crate) fn object(name: &str, size: usize) -> Result<(PathInfo, Vec<u8>)> {
    let mut writer = nar::Writer::new(Vec::with_capacity(size + 200));
    let contents: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
    writer.file_bytes(false, &contents)?;
    let nar = writer.finish()?;
    let nar_hash = Sha256::of(&nar);
    let ca = ContentAddress { method: Method::Nar, hash: nar_hash.into() };
    let path = ca.store_path(&StoreDir::default(), name, &[].into(), false)?;
    let info = PathInfo {
        path,
        nar_hash,
        nar_size: nar.len() as u64,
        references: [].into(),
        deriver: None,
        signatures: Vec::new(),
        ca: Some(ca),
    };
    Ok((info, nar))
}

/// An AddToStoreNar request up to the archive.
pub(crate) fn add_request(info: &PathInfo) -> Vec<u8> {
    let mut request = Vec::new();
    let mut word = |value: u64| request.extend_from_slice(&value.to_le_bytes());
    word(9);
    let mut strings = |text: &str| {
        request.extend_from_slice(&(text.len() as u64).to_le_bytes());
        request.extend_from_slice(text.as_bytes());
        request.resize(request.len().next_multiple_of(8), 0);
    };
    strings(&StoreDir::default().full(&info.path));
    strings(""); // no deriver
    strings(&info.nar_hash.to_hex());
    // No references, registration time, size, not built here, no signatures.
    for value in [0, 0, info.nar_size, 0, 0] {
        request.extend_from_slice(&u64::to_le_bytes(value));
    }
    let ca = info.ca.as_ref().map(ToString::to_string).unwrap_or_default();
    request.extend_from_slice(&(ca.len() as u64).to_le_bytes());
    request.extend_from_slice(ca.as_bytes());
    request.resize(request.len().next_multiple_of(8), 0);
    request
}

/// A DumpStorePath request.
pub(crate) fn dump_request(info: &PathInfo) -> Vec<u8> {
    let path = StoreDir::default().full(&info.path);
    let mut request = [3_u64.to_le_bytes(), (path.len() as u64).to_le_bytes()].concat();
    request.extend_from_slice(path.as_bytes());
    request.resize(request.len().next_multiple_of(8), 0);
    request
}

/// The greeting that a client begins with, protocol 2.7, and the length of the answer.
pub(crate) fn greeting() -> (Vec<u8>, usize) {
    ([0x390c_9deb_u64.to_le_bytes(), 0x0207_u64.to_le_bytes()].concat(), 16)
}

/// Kibibytes of memory that a process has used at most.
pub(crate) fn peak_memory(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
