//! Sessions of one listening program that ask for the same build: one builds, all see its log and get its end. Spoken to
//! by OpenSSH's client; without it these tests fail: `apt-get install openssh-client`.

#![allow(clippy::unwrap_used)] // all of it is tests

mod common;

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{add, derivation, path_for, set, tools};
use drover_nix::{
    BasicDerivation, DerivationOutput, HashAlgo, Method, OutputName, Sha256, StoreDir, StorePath,
};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, Client};
use tempfile::TempDir;

/// Longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

struct Server {
    child: Child,
    root: TempDir,
    port: String,
    log: Arc<Mutex<Vec<u8>>>,
}

impl Server {
    fn start(options: &[&str]) -> Self {
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
        let log = collect(child.stderr.take().unwrap());
        Self { child, root, port: port.unwrap(), log }
    }

    fn session(&self) -> Session {
        let mut ssh = Command::new("ssh")
            .args(["-F", "none", "-p", &self.port, "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"])
            .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i"])
            .arg(self.root.path().join("id"))
            .args(["drover@127.0.0.1", "serve"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ssh not found: apt-get install openssh-client");
        let log = collect(ssh.stderr.take().unwrap());
        let (stdout, stdin) = (ssh.stdout.take().unwrap(), ssh.stdin.take().unwrap());
        Session { client: Some(Client::connect(stdout, stdin, StoreDir::default()).unwrap()), ssh, log }
    }

    /// Lets every build that holds go on.
    fn let_go(&self) {
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

struct Session {
    client: Option<Client<ChildStdout, ChildStdin>>,
    ssh: Child,
    log: Arc<Mutex<Vec<u8>>>,
}

impl Session {
    fn build(&mut self, drv: &BasicDerivation, options: &BuildOptions) -> JoinHandle<Option<BuildResult>> {
        let (mut client, drv, options) = (self.client.take().unwrap(), drv.clone(), options.clone());
        let path = path_for(&format!("{drv:?}"), "test.drv");
        std::thread::spawn(move || client.build_derivation(&path, &drv, &options).ok())
    }

    fn says(&self, text: &str) {
        eventually(text, || self.log().contains(text));
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&self.log.lock().unwrap()).into_owned()
    }

    /// As when the machine that it runs on goes.
    fn kill(&mut self) {
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

fn collect(mut from: impl std::io::Read + Send + 'static) -> Arc<Mutex<Vec<u8>>> {
    let log = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&log);
    std::thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            sink.lock().unwrap().extend(&chunk[..count]);
        }
    });
    log
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

/// A build that waits in its middle, and says before and behind where it is.
fn held(tools: &StorePath, name: &str) -> BasicDerivation {
    derivation(
        tools,
        &format!(": {name}; echo first; while [ ! -e go ]; do sleep 0.05; done; echo last; touch $out"),
    )
}

fn processes(drv: &BasicDerivation) -> usize {
    let script = drv.args[1].to_string();
    let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(&script)).count()
}

#[test]
fn two_sessions_share_a_build_and_its_log() {
    let server = Server::start(&[]);
    let (mut first, mut second) = (server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "shared");
    let none = BuildOptions::default();
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    // From the beginning, which was before it came.
    second.says("another session builds");
    second.says("first\n");
    assert_eq!(processes(&drv), 1);
    server.let_go();
    let (built, joined) = (built.join().unwrap().unwrap(), joined.join().unwrap().unwrap());
    assert_eq!((built.status, joined.status), (BuildStatus::Built, BuildStatus::AlreadyValid));
    assert_eq!(built.built_outputs, joined.built_outputs);
    assert_eq!((joined.times_built, joined.start_time, joined.stop_time), (0, 0, 0));
    first.says("last\n");
    second.says("last\n");
    // The pod's log has it once.
    let log = String::from_utf8_lossy(&server.log.lock().unwrap()).into_owned();
    assert_eq!(log.matches("last\n").count(), 1, "{log}");
}

#[test]
fn a_failure_is_shared_too_and_other_limits_are_not() {
    let server = Server::start(&[]);
    let (mut first, mut second, mut third) = (server.session(), server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let drv = derivation(&tools, "echo first; while [ ! -e go ]; do sleep 0.05; done; exit 7");
    let none = BuildOptions::default();
    let limited = BuildOptions { timeout_seconds: 1, ..BuildOptions::default() };
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    second.says("first\n");
    let apart = third.build(&drv, &limited);
    third.says("waiting for another build");
    server.let_go();
    for answer in [built, joined] {
        let result = answer.join().unwrap().unwrap();
        assert_eq!(result.status, BuildStatus::PermanentFailure);
        assert!(result.error_message.contains("exit code 7"), "{}", result.error_message);
    }
    // It builds for itself, with its own limit.
    assert_eq!(apart.join().unwrap().unwrap().status, BuildStatus::TimedOut);
}

#[test]
fn a_build_goes_on_for_who_joined_it() {
    let server = Server::start(&[]);
    let (mut first, mut second) = (server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "joined");
    let none = BuildOptions::default();
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    second.says("first\n");
    first.kill();
    assert!(built.join().unwrap().is_none());
    assert_eq!(processes(&drv), 1);
    server.let_go();
    assert_eq!(joined.join().unwrap().unwrap().status, BuildStatus::AlreadyValid);
    second.says("last\n");
    // And it ends when the last one leaves.
    let drv = held(&tools, "left");
    let (mut first, mut second) = (server.session(), server.session());
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    second.says("first\n");
    first.kill();
    second.kill();
    assert!(built.join().unwrap().is_none() && joined.join().unwrap().is_none());
    eventually("the build ends", || processes(&drv) == 0);
}

#[test]
fn a_lingering_build_is_found_again_with_its_log() {
    let server = Server::start(&["--linger", "1000"]);
    let mut first = server.session();
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "lingers");
    let none = BuildOptions::default();
    let built = first.build(&drv, &none);
    first.says("first\n");
    first.kill();
    assert!(built.join().unwrap().is_none());
    let mut second = server.session();
    let joined = second.build(&drv, &none);
    second.says("another session builds");
    second.says("first\n");
    server.let_go();
    assert_eq!(joined.join().unwrap().unwrap().status, BuildStatus::AlreadyValid);
    second.says("last\n");
}

/// As [`held`], with an output whose path follows from its content: another one with each build.
fn held_unknown(tools: &StorePath, name: &str, output: DerivationOutput) -> BasicDerivation {
    let mut drv = held(tools, name);
    let script = drv.args[1].to_string();
    drv.args[1] = script.replace("touch $out", "cat /proc/sys/kernel/random/uuid > $out").into();
    drv.outputs = [(OutputName::out(), output)].into();
    let placeholder = Sha256::of(b"nix-output:out").to_nix32();
    set(&mut drv, "out", &format!("/{placeholder}"));
    drv
}

#[test]
fn what_is_not_known_before_is_shared_by_its_derivation() {
    let server = Server::start(&["--linger", "1000"]);
    let (mut first, mut second) = (server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let floating = DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 };
    let drv = held_unknown(&tools, "floating", floating);
    let none = BuildOptions::default();
    let built = first.build(&drv, &none);
    first.says("first\n");
    let joined = second.build(&drv, &none);
    second.says("another session builds");
    first.kill();
    assert!(built.join().unwrap().is_none());
    server.let_go();
    let joined = joined.join().unwrap().unwrap();
    assert_eq!(joined.status, BuildStatus::AlreadyValid);
    // Remembered when nobody of those is there any more.
    let again = server.session().build(&drv, &none).join().unwrap().unwrap();
    assert_eq!(again.status, BuildStatus::AlreadyValid);
    assert!(again.built_outputs.len() == 1 && again.built_outputs == joined.built_outputs);
}

#[test]
fn what_is_impure_is_shared_with_nobody() {
    let server = Server::start(&[]);
    let (mut first, mut second) = (server.session(), server.session());
    let tools = add(first.client.as_mut().unwrap(), "tools", tools().path());
    let impure = DerivationOutput::Impure { method: Method::Nar, algo: HashAlgo::Sha256 };
    let drv = held_unknown(&tools, "impure", impure);
    let none = BuildOptions::default();
    let one = first.build(&drv, &none);
    first.says("first\n");
    let other = second.build(&drv, &none);
    second.says("waiting for another build");
    server.let_go();
    let one = one.join().unwrap().unwrap();
    second.says("first\n");
    server.let_go();
    let other = other.join().unwrap().unwrap();
    assert_eq!((one.status, other.status), (BuildStatus::Built, BuildStatus::Built));
    assert_ne!(one.built_outputs, other.built_outputs);
}

#[test]
fn nothing_lingers_in_a_program_that_ends() {
    let mut server = Server::start(&["--linger", "1000"]);
    let mut session = server.session();
    let tools = add(session.client.as_mut().unwrap(), "tools", tools().path());
    let drv = held(&tools, "stopped");
    let _answer = session.build(&drv, &BuildOptions::default());
    session.says("first\n");
    let pid = rustix::process::Pid::from_raw(i32::try_from(server.child.id()).unwrap()).unwrap();
    let begin = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(server.child.wait().unwrap().success());
    assert!(begin.elapsed() < Duration::from_secs(8), "it took {:?}", begin.elapsed());
    assert_eq!(processes(&drv), 0);
}
