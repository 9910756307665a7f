//! The builder's host key: where it comes from and what it must look like. And what else a builder says at its start.
//!
//! A builder makes its key when it starts and prints the public half as the first line of its log. The log comes
//! through the API server, which vouches for the pod that it belongs to: so the key is known before the first byte
//! goes to the builder, and nothing is trusted on first use. Parsing is pure; [`greeting`] is the only edge.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::io::{AsyncBufRead, AsyncReadExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::LogParams;

use crate::error::Error;

/// What the first line begins with.
const PREFIX: &str = "host-key: ";
/// What the second line begins with: the sandbox that the builder found to work.
const SANDBOX_PREFIX: &str = "sandbox: ";
/// The second line is written together with the first. If it does not come, the session goes on without.
const SECOND_LINE_PATIENCE: Duration = Duration::from_secs(1);
/// An Ed25519 key takes 102 bytes; what does not end by here is no such line.
const MAX_LINE: usize = 512;
/// Time between two looks at the log of a container that has not started: first and longest.
const FIRST_WAIT: Duration = Duration::from_millis(25);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// A checked public key, `ssh-ed25519 AAAA…`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostKey(String);

impl HostKey {
    /// Parses the line that a builder prints. A comment behind the key is dropped.
    pub fn parse_line(line: &str) -> Result<Self, Error> {
        let fail = |why: &str| Error::HostKey { why: format!("{why}, got {line:?}") };
        let key = line
            .trim_end_matches(['\r', '\n'])
            .strip_prefix(PREFIX)
            .ok_or_else(|| fail("the first line of its log should begin with `host-key: `"))?;
        let mut words = key.split(' ');
        let (kind, text) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if kind != "ssh-ed25519" {
            return Err(fail("the key should be an ssh-ed25519 key"));
        }
        let blob = BASE64.decode(text).map_err(|_| fail("the key should be base64"))?;
        // Two strings, each behind its length: the type and 32 bytes (RFC 8709).
        let head = b"\0\0\0\x0bssh-ed25519\0\0\0\x20";
        if blob.len() != head.len() + 32 || !blob.starts_with(head) {
            return Err(fail("the key should hold 32 bytes of type ssh-ed25519"));
        }
        Ok(Self(format!("{kind} {text}")))
    }

    /// The key as it is kept: type and text.
    pub fn line(&self) -> &str {
        &self.0
    }

    /// One that was kept. None if it is no such key, whoever wrote it.
    pub fn parse_kept(line: &str) -> Option<Self> {
        Self::parse_line(&format!("{PREFIX}{line}")).ok()
    }

    /// The line of a `known_hosts` file that pins this key to `alias`.
    pub fn known_hosts_line(&self, alias: &str) -> String {
        format!("{alias} {}\n", self.0)
    }
}

/// What a builder says at its start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Greeting {
    pub host_key: HostKey,
    pub sandbox: Option<String>,
}

/// Waits for the container to start and reads the beginning of its log. Retries for as long as the API server says
/// that the container is still to start; the caller bounds the time.
pub async fn greeting(pods: &Api<Pod>, pod: &str, container: &str) -> Result<Greeting, Error> {
    let params = LogParams { container: Some(container.to_owned()), follow: true, ..LogParams::default() };
    let mut wait = FIRST_WAIT;
    loop {
        match pods.log_stream(pod, &params).await {
            Ok(stream) => {
                let mut stream = Box::pin(stream);
                let line = read_line(&mut stream).await?;
                if !line.is_empty() {
                    let host_key = HostKey::parse_line(&line)?;
                    let second = tokio::time::timeout(SECOND_LINE_PATIENCE, read_line(&mut stream)).await;
                    let sandbox = second.ok().and_then(Result::ok).and_then(|line| sandbox(&line));
                    return Ok(Greeting { host_key, sandbox });
                }
                // An empty log that ended: the container stopped, or its log was not there yet.
            }
            // 400: the container waits to start. 404: the pod is not known yet where the log is served.
            Err(kube::Error::Api(status)) if status.code == 400 || status.code == 404 => {}
            Err(kube::Error::Api(status)) if status.code >= 500 => {}
            Err(error) => return Err(Error::kube("read the builder's log")(error)),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 3 / 2).min(LONGEST_WAIT);
    }
}

/// The sandbox's name: a word of our own builder.
fn sandbox(line: &str) -> Option<String> {
    let name = line.strip_prefix(SANDBOX_PREFIX)?.trim_end();
    name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-').then(|| name.to_owned())
}

async fn read_line(mut stream: impl AsyncBufRead + Unpin) -> Result<String, Error> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        let fail = |error: std::io::Error| Error::HostKey { why: format!("its log broke off: {error}") };
        match stream.read(&mut byte).await.map_err(fail)? {
            0 if line.is_empty() => return Ok(String::new()),
            0 => return Err(Error::HostKey { why: "its log ended within the first line".into() }),
            _ if byte[0] == b'\n' => break,
            _ if line.len() == MAX_LINE => {
                return Err(Error::HostKey {
                    why: format!("the first line is longer than {MAX_LINE} bytes"),
                });
            }
            _ => line.push(byte[0]),
        }
    }
    String::from_utf8(line).map_err(|_| Error::HostKey { why: "the first line is not UTF-8".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "host-key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f";

    #[test]
    fn a_good_line_is_pinned_without_its_comment() {
        let key = HostKey::parse_line(&format!("{GOOD} builder\r\n")).unwrap();
        let line = key.known_hosts_line("drover-a-1");
        assert_eq!(line, GOOD.replace("host-key:", "drover-a-1") + "\n");
        assert_eq!(HostKey::parse_kept(key.line()), Some(key));
        assert_eq!(HostKey::parse_kept("ssh-ed25519 AAAA"), None);
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "",
            "ssh-ed25519 AAAA",
            "host-key: ",
            "host-key: ssh-rsa AAAAB3NzaC1yc2E=",
            "host-key: ssh-ed25519 not-base64",
            // One byte too short, and a type inside that differs from the one outside.
            "host-key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4=",
            "host-key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE4AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f",
            "host-key: ssh-ed25519\nevil ssh-ed25519 AAAA",
        ] {
            assert!(HostKey::parse_line(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_sandbox_is_a_word() {
        assert_eq!(sandbox("sandbox: nested-admin").as_deref(), Some("nested-admin"));
        assert_eq!((sandbox("building"), sandbox("sandbox: <b>")), (None, None));
    }

    #[test]
    fn a_line_without_an_end_is_refused() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let read = |text: Vec<u8>| runtime.block_on(read_line(futures::io::Cursor::new(text)));
        assert_eq!(read(b"a\nb".to_vec()).unwrap(), "a");
        assert_eq!(read(Vec::new()).unwrap(), "");
        assert!(read(b"host-key".to_vec()).is_err());
        assert!(read(vec![b'a'; MAX_LINE + 1]).is_err());
    }
}
