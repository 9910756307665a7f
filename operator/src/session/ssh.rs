//! One SSH connection to one builder, by the `openssh` crate.
//!
//! Owns the generated `ssh` configuration, the files that it names and the pipes to the remote `serve`. The dial is
//! the readiness check: it is repeated while nothing listens yet. It may not decide what a failure means for the
//! build: it says what failed and whether trying again could help.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use openssh::{ControlPersist, KnownHosts, SessionBuilder, Stdio};

use crate::error::Error;
use crate::keys::ClientKey;
use crate::session::host_key::HostKey;
use crate::session::pipe::Pipes;

/// What the builder is asked to run. It runs this and nothing else, whatever is asked.
const COMMAND: &str = "drover-builder serve --write";
/// The user name has no meaning for the builder; only the key counts.
const USER: &str = "drover";
/// Time between two dials: first and longest.
const FIRST_WAIT: Duration = Duration::from_millis(25);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// One dial's share of the time.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that answers none of three probes at this distance is gone.
const ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a connection may take to close. Its master may hang; then it goes with the operator's last descriptor of it, or
/// with the pod.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the connection's master outlives its last channel, should the operator die without closing it.
const PERSIST_SECONDS: usize = 10;

/// Where and as whom to connect, and whom to expect.
#[derive(Debug)]
pub struct Target<'a> {
    pub address: IpAddr,
    pub port: u16,
    /// Stands for the builder in `known_hosts`, since its address may be another's tomorrow.
    pub alias: &'a str,
    pub host_key: &'a HostKey,
    pub client_key: &'a ClientKey,
}

/// A running `serve`. Its pipes are for threads.
#[derive(Debug)]
pub struct Connection {
    session: Arc<openssh::Session>,
    child: openssh::Child<Arc<openssh::Session>>,
    files: Files,
}

/// The files of one connection; gone with the value.
#[derive(Debug)]
struct Files {
    dir: tempfile::TempDir,
}

impl Connection {
    /// Dials until somebody listens. `work_dir` is private to this process and short: the path of a socket below it
    /// must fit in 108 bytes. Ends early where another dial would not help: a wrong key on either side.
    pub async fn open(target: &Target<'_>, work_dir: &Path) -> Result<(Self, Pipes), Error> {
        let files = Files::write(target, work_dir)?;
        let mut builder = SessionBuilder::default();
        builder
            .user(USER.into())
            .port(target.port)
            .keyfile(files.key())
            .user_known_hosts_file(files.known_hosts())
            .known_hosts_check(KnownHosts::Strict)
            .config_file(files.config())
            .control_directory(files.dir.path())
            // The constant is not zero.
            .control_persist(ControlPersist::IdleFor(
                NonZeroUsize::new(PERSIST_SECONDS).unwrap_or(NonZeroUsize::MIN),
            ))
            .connect_timeout(DIAL_TIMEOUT)
            .server_alive_interval(ALIVE_INTERVAL)
            .compression(false);
        let mut wait = FIRST_WAIT;
        let session = loop {
            match builder.connect_mux(target.address.to_string()).await {
                Ok(session) => break Arc::new(session),
                Err(source) if !worth_another_dial(&source) => {
                    return Err(Error::Ssh { act: "connect to the builder", source });
                }
                Err(error) => {
                    tracing::debug!(
                        alias = target.alias,
                        error = &error as &dyn std::error::Error,
                        "dial failed"
                    );
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 3 / 2).min(LONGEST_WAIT);
        };

        let fail = |source| Error::File { act: "make a pipe to", path: "ssh".into(), source };
        let (remote_stdin, stdin) = std::io::pipe().map_err(fail)?;
        let (stdout, remote_stdout) = std::io::pipe().map_err(fail)?;
        let (stderr, remote_stderr) = std::io::pipe().map_err(fail)?;
        let child = session
            .clone()
            .arc_raw_command(COMMAND)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(remote_stdin)))
            .stdout(Stdio::from(std::os::fd::OwnedFd::from(remote_stdout)))
            .stderr(Stdio::from(std::os::fd::OwnedFd::from(remote_stderr)))
            .spawn()
            .await
            .map_err(|source| Error::Ssh { act: "start `serve`", source })?;
        let pipes = Pipes::new(stdin, stdout, stderr).map_err(fail)?;
        Ok((Self { session, child, files }, pipes))
    }

    /// Gives up the channel and the connection. The pipes report their end to whoever still reads.
    ///
    /// The connection's master closes a channel whose control connection is closed, so this also frees a thread that
    /// is blocked on a pipe.
    pub async fn close(self) {
        drop(self.child);
        if let Some(session) = Arc::into_inner(self.session) {
            match tokio::time::timeout(CLOSE_TIMEOUT, session.close()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "closing an SSH connection failed"
                    );
                }
                Err(_) => tracing::warn!("an SSH connection does not close"),
            }
        }
        drop(self.files);
    }
}

impl Files {
    fn write(target: &Target<'_>, work_dir: &Path) -> Result<Self, Error> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::File { act: "write", path, source }
        };
        let dir = tempfile::Builder::new()
            .prefix("s")
            .rand_bytes(8)
            .tempdir_in(work_dir)
            .map_err(fail(work_dir))?;
        let files = Self { dir };
        for (path, text) in [
            (files.key(), target.client_key.private_file()),
            (files.known_hosts(), target.host_key.known_hosts_line(target.alias)),
            (files.config(), config(target.alias)),
        ] {
            std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
                .map_err(fail(&path))?;
        }
        Ok(files)
    }

    fn key(&self) -> PathBuf {
        self.dir.path().join("key")
    }

    fn known_hosts(&self) -> PathBuf {
        self.dir.path().join("known_hosts")
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("config")
    }
}

/// What the crate has no setters for. Given by `-F`, it also keeps every other configuration file unread.
fn config(alias: &str) -> String {
    format!(
        "Host *\n\
         HostKeyAlias {alias}\n\
         GlobalKnownHostsFile /dev/null\n\
         HostKeyAlgorithms ssh-ed25519\n\
         UpdateHostKeys no\n\
         CheckHostIP no\n\
         VerifyHostKeyDNS no\n\
         PreferredAuthentications publickey\n\
         IdentityAgent none\n\
         Ciphers aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com\n\
         ServerAliveCountMax 3\n\
         ForwardAgent no\n\
         ForwardX11 no\n\
         ClearAllForwardings yes\n\
         PermitLocalCommand no\n\
         EscapeChar none\n\
         LogLevel ERROR\n"
    )
}

/// A builder that has not begun to listen refuses, resets or does not answer; a wrong key stays wrong.
fn worth_another_dial(error: &openssh::Error) -> bool {
    match error {
        openssh::Error::Connect(io) => {
            io.kind() != std::io::ErrorKind::PermissionDenied
                && io.kind() != std::io::ErrorKind::NotFound
                && !io.to_string().contains("Host key verification failed")
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Error as IoError, ErrorKind};

    use super::*;
    use crate::keys::Seed;

    #[test]
    fn only_what_time_can_mend_is_tried_again() {
        let connect = |kind, text: &str| openssh::Error::Connect(IoError::new(kind, text));
        assert!(worth_another_dial(&connect(ErrorKind::ConnectionRefused, "refused")));
        assert!(worth_another_dial(&connect(
            ErrorKind::ConnectionAborted,
            "kex_exchange_identification: reset"
        )));
        assert!(!worth_another_dial(&connect(ErrorKind::PermissionDenied, "publickey")));
        assert!(!worth_another_dial(&connect(ErrorKind::ConnectionAborted, "Host key verification failed.")));
        // No `ssh` program.
        assert!(!worth_another_dial(&connect(ErrorKind::NotFound, "No such file or directory")));
    }

    /// `ssh -G` prints the configuration as `ssh` understands it: every line of ours must arrive.
    #[test]
    fn openssh_understands_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let key = Seed::from_bytes(&[1; 32]).unwrap().client_key("uid", 1).unwrap();
        let host_key = HostKey::parse_line(&format!("host-key: {}", key.public_line())).unwrap();
        let target = Target {
            address: IpAddr::from([127, 0, 0, 1]),
            port: 2222,
            alias: "drover-uid-1",
            host_key: &host_key,
            client_key: &key,
        };
        let files = Files::write(&target, dir.path()).unwrap();
        let output = std::process::Command::new("ssh")
            .args(["-G", "-F"])
            .arg(files.config())
            .arg("127.0.0.1")
            .output()
            .expect("the `ssh` program of OpenSSH must be installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let understood = String::from_utf8(output.stdout).unwrap().to_lowercase();
        for line in config("drover-uid-1").to_lowercase().lines().skip(1) {
            let line = match line {
                "clearallforwardings yes"
                | "updatehostkeys no"
                | "permitlocalcommand no"
                | "loglevel error" => line.replace(" no", " false"),
                other => other.to_owned(),
            };
            let (key, value) = line.split_once(' ').unwrap();
            let found = understood.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
            let found = found.unwrap_or_else(|| panic!("ssh -G does not know {key}"));
            let truth = |v: &str| match v {
                "yes" => "true".to_owned(),
                "no" => "false".to_owned(),
                other => other.to_owned(),
            };
            assert_eq!(truth(found.trim()), truth(value), "{key}");
        }
    }
}
