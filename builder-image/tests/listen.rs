//! The SSH server, spoken to by OpenSSH's client. Without it these tests fail: `apt-get install openssh-client`.

#![allow(clippy::unwrap_used)] // all of it is tests

mod common;

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{add, derivation, out, path_for, tools};
use drover_nix::StoreDir;
use drover_serve::{BuildOptions, BuildStatus, Client};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Some key.
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
/// Longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

struct Server {
    child: Child,
    root: TempDir,
    port: String,
    stderr: mpsc::Receiver<String>,
}

impl Server {
    fn start() -> Self {
        let root = TempDir::new().unwrap();
        for name in ["id", "other"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(root.path().join(name))
                .status();
            assert!(made.expect("ssh-keygen not found: apt-get install openssh-client").success());
        }
        let mut child = Command::new(common::BUILDER)
            .args(["listen", "--listen", "127.0.0.1:0", "--store"])
            .arg(root.path())
            .arg("--authorized-key")
            .arg(root.path().join("id.pub"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut line = |prefix: &str| lines.next().unwrap().unwrap().strip_prefix(prefix).unwrap().to_owned();
        let host_key = line("host-key: ");
        assert!(host_key.starts_with("ssh-ed25519 AAAA") && host_key.split(' ').count() == 2);
        assert!(["nested", "nested-admin"].contains(&line("sandbox: ").as_str()));
        let port = line("listening: 127.0.0.1:");
        std::fs::write(root.path().join("known_hosts"), format!("[127.0.0.1]:{port} {host_key}\n")).unwrap();
        let (sender, stderr) = mpsc::channel();
        let error = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            error.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Self { child, root, port, stderr }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn ssh(&self, key: &str, options: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command.args([
            "-F",
            "none",
            "-p",
            &self.port,
            "-o",
            "BatchMode=yes",
            "-o",
            "StrictHostKeyChecking=yes",
        ]);
        command
            .args(["-o", "IdentitiesOnly=yes", "-o"])
            .arg(format!("UserKnownHostsFile={}", self.file("known_hosts").display()));
        command.arg("-i").arg(self.file(key)).args(options).arg("drover@127.0.0.1");
        command
    }

    fn client(&self) -> (Client<ChildStdout, ChildStdin>, Child) {
        let mut ssh = self
            .ssh("id", &[])
            .arg("anything at all")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ssh not found: apt-get install openssh-client");
        let (stdout, stdin) = (ssh.stdout.take().unwrap(), ssh.stdin.take().unwrap());
        (Client::connect(stdout, stdin, StoreDir::default()).unwrap(), ssh)
    }

    /// Waits for a line of the server's own standard error.
    fn says(&self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.stderr.recv_timeout(left).unwrap_or_else(|_| panic!("never said {wanted:?}"));
            if line.contains(wanted) {
                return;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap(), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        drover_store::fs::delete(&self.file("nix")).unwrap();
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_build_and_its_log_on_both_sides() {
    let server = Server::start();
    let (mut client, mut ssh) = server.client();
    let tools = add(&mut client, "tools", tools().path());
    let drv = derivation(&tools, "echo to be seen; head -c 5000000 /dev/urandom > $out");
    let result =
        client.build_derivation(&path_for("ssh", "test.drv"), &drv, &BuildOptions::default()).unwrap();
    assert_eq!(result.status, BuildStatus::Built, "{}", result.error_message);
    let mut nar = Vec::new();
    client.dump_store_path(&out(&drv), &mut nar).unwrap();
    assert!(nar.len() > 5_000_000);
    drop(client);
    let mut log = String::new();
    ssh.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("to be seen\n"), "{log}");
    assert_eq!(ssh.wait().unwrap().code(), Some(0));
    server.says("to be seen");
}

#[test]
fn several_sessions_at_once() {
    let server = Server::start();
    let (mut first, mut first_ssh) = server.client();
    let (mut second, mut second_ssh) = server.client();
    let tools = add(&mut first, "tools", tools().path());
    assert!(second.query_valid_paths(&[tools.clone()].into(), true, false).unwrap().contains(&tools));
    // Two sessions, one derivation: it is built once.
    let drv = derivation(&tools, "echo once; sleep 1; touch $out");
    let request = |client: &mut Client<ChildStdout, ChildStdin>| {
        client.build_derivation(&path_for("both", "test.drv"), &drv, &BuildOptions::default()).unwrap().status
    };
    let mut statuses = std::thread::scope(|scope| {
        let other = scope.spawn(|| request(&mut second));
        [request(&mut first), other.join().unwrap()]
    });
    statuses.sort();
    assert_eq!(statuses, [BuildStatus::Built, BuildStatus::AlreadyValid]);
    drop((first, second));
    assert!(first_ssh.wait().unwrap().success() && second_ssh.wait().unwrap().success());
}

#[test]
fn nobody_else_gets_in() {
    let server = Server::start();
    let denied = server.ssh("other", &[]).arg("x").output().unwrap();
    assert_eq!(denied.status.code(), Some(255));
    assert!(text(&denied).contains("Permission denied"), "{}", text(&denied));
    // A host key that is not the one that was printed.
    let known = std::fs::read_to_string(server.file("known_hosts")).unwrap();
    let other = std::fs::read_to_string(server.file("other.pub")).unwrap();
    let address = known.split(' ').next().unwrap();
    std::fs::write(server.file("known_hosts"), format!("{address} {other}")).unwrap();
    let denied = server.ssh("id", &[]).arg("x").output().unwrap();
    assert!(text(&denied).contains("HOST IDENTIFICATION HAS CHANGED"), "{}", text(&denied));
}

#[test]
fn only_commands_are_executed() {
    let server = Server::start();
    for (options, command) in
        [(&["-T"][..], None), (&["-tt"], None), (&["-s"], Some("sftp")), (&["-W", "127.0.0.1:1"], None)]
    {
        let mut ssh = server.ssh("id", options);
        ssh.args(command).stdin(Stdio::null());
        let output = ssh.output().unwrap();
        assert!(!output.status.success(), "{options:?}: {}", text(&output));
        assert!(output.stdout.is_empty(), "{options:?}: {}", text(&output));
    }
    let forwarded =
        server.ssh("id", &["-N", "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1"]).output().unwrap();
    assert_eq!(forwarded.status.code(), Some(255), "{}", text(&forwarded));
    // Text that is not the protocol ends with an error on standard error.
    let mut ssh = server.ssh("id", &[]);
    let mut child =
        ssh.arg("x").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("does not speak the serve protocol"), "{}", text(&output));
}

#[test]
fn a_client_that_is_killed_takes_its_build_with_it() {
    let server = Server::start();
    let (mut client, mut ssh) = server.client();
    let tools = add(&mut client, "tools", tools().path());
    let drv = derivation(&tools, "echo started; sleep 100000 & wait");
    let requester = std::thread::spawn(move || {
        client.build_derivation(&path_for("kill", "test.drv"), &drv, &BuildOptions::default()).is_err()
    });
    server.says("started");
    ssh.kill().unwrap();
    ssh.wait().unwrap();
    assert!(requester.join().unwrap());
    server.says("the build was cancelled");
}

#[test]
fn told_to_stop_it_stops_what_runs() {
    let mut server = Server::start();
    let (mut client, mut ssh) = server.client();
    let tools = add(&mut client, "tools", tools().path());
    let drv = derivation(&tools, "echo started; sleep 100000 & wait");
    let requester = std::thread::spawn(move || {
        client.build_derivation(&path_for("stop", "test.drv"), &drv, &BuildOptions::default()).is_err()
    });
    server.says("started");
    server.signal(Signal::TERM);
    let begin = Instant::now();
    assert_eq!(server.child.wait().unwrap().code(), Some(143));
    assert!(begin.elapsed() < PATIENCE);
    assert!(requester.join().unwrap());
    assert!(!ssh.wait().unwrap().success());
    let left = std::fs::read_dir(server.file("nix/store")).unwrap().filter_map(Result::ok);
    assert_eq!(left.filter(|entry| entry.path().extension().is_some_and(|e| e == "chroot")).count(), 0);
}

#[test]
fn says_which_network_builds_have() {
    let root = TempDir::new().unwrap();
    let listen = |network: &str| {
        let mut command = Command::new(common::BUILDER);
        command.args(["listen", "--listen", "127.0.0.1:0", "--network", network, "--store"]).arg(root.path());
        // Nobody logs in with it. And there is no pasta on this PATH.
        command.args(["--authorized-key", KEY]).env("PATH", root.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for (network, expected) in
        [("auto", "host (there is no program `pasta`"), ("host", "host"), ("none", "none")]
    {
        let mut child = listen(network);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said =
            lines.map_while(Result::ok).find_map(|line| Some(line.strip_prefix("network: ")?.to_owned()));
        assert!(said.as_ref().is_some_and(|said| said.starts_with(expected)), "{network}: {said:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = listen("pasta").wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("no program `pasta`"),
        "what was demanded is no wish: {said}"
    );
}
