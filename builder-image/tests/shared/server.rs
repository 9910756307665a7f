//! A listening program, and clients of it.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use drover_nix::{BasicDerivation, StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildResult, Client};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::common::{self, derivation, path_for};

/// Longest that anything here may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Server {
    pub(crate) child: Child,
    root: TempDir,
    port: String,
    pub(crate) log: Arc<Mutex<Vec<u8>>>,
}

impl Server {
    pub(crate) fn start(options: &[&str]) -> Self {
        let root = TempDir::new().unwrap();
        let key = root.path().join("id");
        let made =
            Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
        assert!(made.expect("ssh-keygen not found: apt-get install openssh-client").success());
        let mut child = Command::new(common::BUILDER)
            .args(["listen", "--listen", "127.0.0.1:0", "--store"])
            .arg(root.path())
            .arg("--authorized-key")
            .arg(key.with_extension("pub"))
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let port = lines.find_map(|line| Some(line.strip_prefix("listening: 127.0.0.1:")?.to_owned()));
        let (log, _reader) = collect(child.stderr.take().unwrap());
        Self { child, root, port: port.unwrap(), log }
    }

    pub(crate) fn session(&self) -> Session {
        let mut ssh = Command::new("ssh")
            .args([
                "-F",
                "none",
                "-p",
                &self.port,
                "-o",
                "BatchMode=yes",
                "-o",
                "IdentitiesOnly=yes",
                "-o",
                "LogLevel=ERROR",
            ])
            .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i"])
            .arg(self.root.path().join("id"))
            .args(["drover@127.0.0.1", "serve"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ssh not found: apt-get install openssh-client");
        let (log, reader) = collect(ssh.stderr.take().unwrap());
        let (stdout, stdin) = (ssh.stdout.take().unwrap(), ssh.stdin.take().unwrap());
        Session {
            client: Some(Client::connect(stdout, stdin, StoreDir::default()).unwrap()),
            ssh,
            log,
            reader: Some(reader),
        }
    }

    /// Lets every build that holds go on.
    pub(crate) fn let_go(&self) {
        for top in std::fs::read_dir(self.root.path().join("nix/var/nix/builds")).unwrap() {
            std::fs::write(top.unwrap().path().join("build/go"), "").unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        drover_store::fs::delete(&self.root.path().join("nix")).unwrap();
    }
}

pub(crate) struct Session {
    pub(crate) client: Option<Client<ChildStdout, ChildStdin>>,
    pub(crate) ssh: Child,
    log: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Session {
    pub(crate) fn build(
        &mut self,
        drv: &BasicDerivation,
        options: &BuildOptions,
    ) -> JoinHandle<Option<BuildResult>> {
        let (mut client, drv, options) = (self.client.take().unwrap(), drv.clone(), options.clone());
        let path = path_for(&format!("{drv:?}"), "test.drv");
        std::thread::spawn(move || client.build_derivation(&path, &drv, &options).ok())
    }

    /// All of the log, once the client has ended.
    pub(crate) fn end_of_log(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        self.log()
    }

    pub(crate) fn says(&self, text: &str) {
        eventually(text, || self.log().contains(text));
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&self.log.lock().unwrap()).into_owned()
    }

    /// As when the machine that it runs on goes.
    pub(crate) fn kill(&mut self) {
        self.ssh.kill().unwrap();
        self.ssh.wait().unwrap();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ended = self.ssh.kill();
        let _reaped = self.ssh.wait();
    }
}

fn collect(mut from: impl std::io::Read + Send + 'static) -> (Arc<Mutex<Vec<u8>>>, JoinHandle<()>) {
    let log = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&log);
    let reader = std::thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            sink.lock().unwrap().extend(&chunk[..count]);
        }
    });
    (log, reader)
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

/// A build that waits in its middle, and says before and behind where it is.
pub(crate) fn held(tools: &StorePath, name: &str) -> BasicDerivation {
    derivation(
        tools,
        &format!(": {name}; echo first; while [ ! -e go ]; do sleep 0.05; done; echo last; touch $out"),
    )
}

pub(crate) fn processes(drv: &BasicDerivation) -> usize {
    let script = drv.args[1].to_string();
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(&script)).count()
}

pub(crate) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), signal).unwrap();
}
