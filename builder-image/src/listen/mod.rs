//! The builder's SSH server: authorized keys and certificates may log in, and whatever they ask to execute is a serve
//! session. No shell, no terminal, no environment, no subsystem, no forwarding. russh is known in this folder only, and
//! only here is anything asynchronous: sessions are plain threads.
//!
//! In the order of a connection's life: the socket ([`wire`]), waiting to log in ([`lobby`]), who may ([`authorized`],
//! [`certificate`], [`address`]), what it may do then ([`connection`]), and a session ([`session`], [`bridge`]).
//!
//! The process' own standard output begins with the host key ([`host_key`]), so that who can read the pod's log through
//! the API server can pin it; builds' output goes to the client and to standard error.

mod address;
mod authorized;
mod bridge;
mod certificate;
mod connection;
mod host_key;
mod lobby;
mod session;
mod wire;

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use russh::keys::PrivateKey;
use russh::server::{Config, run_stream};
use russh::{Disconnect, MethodKind, MethodSet, Preferred};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};

use self::authorized::Rule;
use self::bridge::{Input, NEAR_WINDOW};
use self::connection::{Broken, Connection};
use self::lobby::Lobby;
use self::wire::Plug;
use crate::build::Builder;
use crate::build::log::Log;
use crate::error::Error;
use crate::network::Choice;
use crate::sandbox::launch;
use crate::sandbox::rungs::UNTRIED;

/// Connections that have not logged in yet, at most.
const MAX_WAITING: usize = 64;
/// Connections that have, at most.
const MAX_CONNECTIONS: usize = 256;
/// Refused attempts to log in of one connection, at most; the probe that OpenSSH's client begins with is one.
const MAX_ATTEMPTS: usize = 10;
/// A client that is silent for this long is asked whether it is there; after three times it is gone.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// Packets from sessions to their connection that may wait. Several at once are one system call.
const PACKETS: usize = 32;
/// How long sessions may take to end when the program is told to, and a client to close after it was told to. With two of
/// the latter it has to be less than a pod's grace, which the operator sets to 10 seconds.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(6);
const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// How often process 1 looks for orphans that have ended.
const REAP_INTERVAL: Duration = Duration::from_secs(2);
/// Lines about what was refused, in a period. A stranger must not fill the log.
const MAX_REFUSAL_LINES: u32 = 30;
const REFUSAL_PERIOD: Duration = Duration::from_secs(10);

pub(crate) struct Options<'a> {
    pub address: &'a str,
    /// Lines as in OpenSSH's `authorized_keys`, or files of them.
    pub authorized_keys: &'a [String],
    /// A private key file; without it a key is made.
    pub host_key: Option<&'a Path>,
    pub max_sessions: usize,
    /// How long a connection may take to log in.
    pub login_grace: Duration,
}

/// Serves until the program is told to stop.
pub(crate) fn run(options: &Options<'_>, builder: Builder) -> anyhow::Result<()> {
    let rung = builder.rung().map_err(|error| match error {
        Error::Sandbox { why } if !why.contains(UNTRIED) => Error::Unfit { why },
        error => error,
    })?;
    let rules = rules(options.authorized_keys)?;
    let host_key = host_key::load(options.host_key)?;
    let public = host_key::public_line(&host_key)?;
    // A connection's cryptography is done in one task; a few workers let a few connections be quick at once.
    let workers = std::thread::available_parallelism().map_or(2, |count| count.get().clamp(2, 8));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build();
    let runtime = runtime.context("cannot start the server's threads")?;
    let shared = Arc::new(Shared {
        builder,
        rules,
        log: Log::to(io::stderr()).context("cannot start a thread for the log")?,
        login_grace: options.login_grace,
        sessions: Arc::new(Semaphore::new(options.max_sessions)),
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        lobby: Mutex::new(Lobby::new(MAX_WAITING)),
        running: Mutex::default(),
        next: AtomicU64::new(0),
        closing: watch::Sender::new(false),
        refusals: Mutex::new((Instant::now(), 0)),
    });
    let result = runtime.block_on(async {
        let listener = TcpListener::bind(options.address).await;
        let listener = listener.with_context(|| format!("cannot listen on {}", options.address))?;
        // The first line is the key, and nothing may come before it.
        println!("host-key: {public}");
        println!("sandbox: {rung}");
        println!("listening: {}", listener.local_addr().context("cannot tell the address")?);
        announce_network(&shared.builder)?;
        serve(listener, Arc::new(config(host_key)), Arc::clone(&shared)).await
    });
    // Sessions' threads that are stuck in a system call are not waited for.
    runtime.shutdown_background();
    result
}

/// Says which network builds that may fetch get. To find out may take a tenth of a second, for which nobody is kept waiting
/// unless it was demanded.
fn announce_network(builder: &Builder) -> anyhow::Result<()> {
    let demanded = builder.settings.network == Choice::Pasta;
    let builder = builder.clone();
    let announce = move || -> anyhow::Result<()> {
        let network = builder.network()?;
        // Nobody has to read it.
        let _nobody_reads = writeln!(io::stdout(), "network: {network}");
        Ok(())
    };
    if demanded {
        announce()
    } else {
        std::thread::Builder::new().spawn(announce).context("cannot start a thread")?;
        Ok(())
    }
}

/// What all connections have in common.
struct Shared {
    builder: Builder,
    rules: Vec<Rule>,
    log: Log,
    login_grace: Duration,
    sessions: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    lobby: Mutex<Lobby<Arc<Plug>>>,
    /// The input of every session that runs: ending it ends the session.
    running: Mutex<HashMap<u64, Arc<Input>>>,
    next: AtomicU64,
    /// True once connections are to be closed because the program ends.
    closing: watch::Sender<bool>,
    /// Since when lines about refusals are counted, and how many there were.
    refusals: Mutex<(Instant, u32)>,
}

impl Shared {
    /// Notes a session as running for as long as the value lives.
    fn enter(self: &Arc<Self>, input: &Arc<Input>) -> Running {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.running).insert(number, Arc::clone(input));
        Running { shared: Arc::clone(self), number }
    }

    /// A line about something that was refused, unless there were too many of them.
    fn note_refusal(&self, line: &str) {
        let (begin, count) = &mut *lock(&self.refusals);
        if begin.elapsed() >= REFUSAL_PERIOD {
            if let Some(more @ 1..) = count.checked_sub(MAX_REFUSAL_LINES) {
                self.log.note(&format!("{more} more lines about refusals were left out"));
            }
            (*begin, *count) = (Instant::now(), 0);
        }
        *count = count.saturating_add(1);
        if *count <= MAX_REFUSAL_LINES {
            self.log.note(line);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard is whole between any two statements, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Running {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        lock(&self.shared.running).remove(&self.number);
    }
}

/// A connection's place among those that have not logged in.
struct Ticket {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.shared.lobby).leave(self.number);
    }
}

async fn serve(listener: TcpListener, config: Arc<Config>, shared: Arc<Shared>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut reap = tokio::time::interval(REAP_INTERVAL);
    let is_init = std::process::id() == 1;
    // Dropped by each connection at its end.
    let (open, mut closed) = mpsc::channel::<()>(1);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = reap.tick(), if is_init => launch::reap_orphans(),
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let (config, shared, open) = (Arc::clone(&config), Arc::clone(&shared), open.clone());
                    tokio::spawn(async move {
                        connection(stream, peer, config, shared).await;
                        drop(open);
                    });
                }
                // Out of descriptors or memory, or a connection that was gone before it was taken: both pass.
                Err(error) => {
                    shared.note_refusal(&format!("cannot accept a connection: {error}"));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    // Builds stop, and so do sessions that wait for their clients.
    lock(&shared.running).values().for_each(|input| input.stop());
    let ended = async {
        while !lock(&shared.running).is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let _stuck = tokio::time::timeout(SHUTDOWN_GRACE, ended).await;
    // What sessions said last is on its way to the clients, behind which connections close.
    drop(open);
    shared.closing.send_replace(true);
    let _stuck = tokio::time::timeout(2 * CLOSE_GRACE, closed.recv()).await;
    Ok(())
}

/// One connection, from its first byte to its last.
async fn connection(stream: TcpStream, peer: SocketAddr, config: Arc<Config>, shared: Arc<Shared>) {
    let Ok((wire, plug)) = wire::wire(stream) else {
        return; // It is gone already.
    };
    let plug = Arc::new(plug);
    let (number, dropped) = lock(&shared.lobby).enter(peer.ip(), Arc::clone(&plug));
    let ticket = Ticket { shared: Arc::clone(&shared), number };
    if let Some(oldest) = dropped {
        oldest.pull();
        shared.note_refusal(&format!(
            "dropped the oldest of {MAX_WAITING} connections that do not log in, to let {peer} try"
        ));
    }
    let handler = Connection::new(Arc::clone(&shared), peer, ticket);
    let logged_in = handler.logged_in();
    let deadline = tokio::time::Instant::now() + shared.login_grace;
    let late = || {
        let seconds = shared.login_grace.as_secs();
        shared.note_refusal(&format!("{peer} did not log in within {seconds} seconds"));
    };
    let mut session = match tokio::time::timeout_at(deadline, run_stream(config, wire, handler)).await {
        Ok(Ok(session)) => session,
        Ok(Err(error)) => return note_end(&shared, peer, &error),
        Err(_) => return late(),
    };
    let mut closing = shared.closing.subscribe();
    // The sender lives as long as `shared`.
    let mut told_to_close = pin!(async { drop(closing.wait_for(|closing| *closing).await) });
    let why = tokio::select! {
        result = &mut session => return result.unwrap_or_else(|error| note_end(&shared, peer, &error)),
        () = &mut told_to_close => "the builder was told to end",
        () = tokio::time::sleep_until(deadline) => match logged_in.load(Ordering::Relaxed) {
            true => tokio::select! {
                result = &mut session => return result.unwrap_or_else(|error| note_end(&shared, peer, &error)),
                () = &mut told_to_close => "the builder was told to end",
            },
            false => {
                late();
                "too slow to log in"
            }
        },
    };
    let farewell = session.handle();
    let farewell = farewell.disconnect(Disconnect::ByApplication, why.to_owned(), String::new());
    let _gone = tokio::time::timeout(CLOSE_GRACE, farewell).await;
    let _closed = tokio::time::timeout(CLOSE_GRACE, &mut session).await;
    plug.pull();
}

/// Why a connection ended, unless that is what ends are like: probes that say nothing, and clients that go.
fn note_end(shared: &Shared, peer: SocketAddr, error: &Broken) {
    let ordinary = matches!(
        error,
        Broken::Ssh(
            russh::Error::Disconnect | russh::Error::HUP | russh::Error::IO(_) | russh::Error::SendError
        )
    );
    if !ordinary {
        shared.note_refusal(&format!("the connection of {peer} ended: {error}"));
    }
}

fn config(host_key: PrivateKey) -> Config {
    Config {
        server_id: russh::SshId::Standard("SSH-2.0-drover".into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        // Nobody guesses Ed25519 keys, however fast: a delay would only be one for clients with several keys, and for
        // every OpenSSH client, which begins with a probe that is refused.
        auth_rejection_time: Duration::ZERO,
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![host_key],
        window_size: NEAR_WINDOW,
        event_buffer_size: PACKETS,
        // The queue is not used: `connection` says why.
        channel_buffer_size: 1,
        preferred: Preferred {
            cipher: ciphers().into(),
            compression: vec![russh::compression::NONE].into(),
            ..Preferred::default()
        },
        max_auth_attempts: MAX_ATTEMPTS,
        // Builds can be silent for hours; who is gone is told by keepalives.
        inactivity_timeout: None,
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: 3,
        nodelay: true,
        ..Config::default()
    }
}

/// The client's preference decides, and OpenSSH's is ChaCha20 whatever its machine can do. So that is offered only where
/// AES has no instructions of its own; elsewhere it would make uploads a third slower, and downloads less than half as fast.
fn ciphers() -> Vec<russh::cipher::Name> {
    use russh::cipher::{AES_128_GCM, AES_256_GCM, CHACHA20_POLY1305};
    #[cfg(target_arch = "x86_64")]
    let fast = std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    let fast =
        std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let fast = false;
    match fast {
        true => vec![AES_128_GCM, AES_256_GCM],
        false => vec![CHACHA20_POLY1305, AES_128_GCM, AES_256_GCM],
    }
}

/// Parses lines, and files of lines.
fn rules(arguments: &[String]) -> anyhow::Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for argument in arguments {
        let file = Path::new(argument);
        // A line has a blank in it; a file may.
        let (text, what) = match argument.contains(' ') && !file.exists() {
            true => (argument.clone(), "--authorized-key".to_owned()),
            false => (read_keys(file)?, argument.clone()),
        };
        rules.extend(authorized::parse(&text).with_context(|| what)?);
    }
    anyhow::ensure!(!rules.is_empty(), "no --authorized-key has a key in it: nobody could log in");
    Ok(rules)
}

fn read_keys(file: &Path) -> anyhow::Result<String> {
    use std::io::Read as _;
    let read = || {
        let mut text = String::new();
        std::fs::File::open(file)?.take(authorized::MAX_KEYS_FILE + 1).read_to_string(&mut text)?;
        Ok::<_, io::Error>(text)
    };
    let text = read().with_context(|| format!("cannot read the keys in {}", file.display()))?;
    anyhow::ensure!(
        text.len() as u64 <= authorized::MAX_KEYS_FILE,
        "{} is larger than {} bytes: not a file of keys",
        file.display(),
        authorized::MAX_KEYS_FILE
    );
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";

    #[test]
    fn keys_and_files_of_keys() {
        let of = |argument: &str| rules(&[argument.to_owned()]);
        let both = rules(&[KEY.to_owned(), format!("restrict {KEY} comment")]).unwrap();
        assert_eq!(both[0].key.key_data(), both[1].key.key_data());
        assert!(of("ssh-ed25519 AAAA").is_err());
        assert!(of("/no/such/file").is_err());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a name with blanks");
        std::fs::write(&file, format!("# keys\n\n{KEY}\n")).unwrap();
        assert_eq!(of(file.to_str().unwrap()).unwrap().len(), 1);
        std::fs::write(&file, "").unwrap();
        assert!(of(file.to_str().unwrap()).unwrap_err().to_string().contains("nobody could log in"));
        std::fs::write(&file, "#".repeat(authorized::MAX_KEYS_FILE as usize + 1)).unwrap();
        assert!(of(file.to_str().unwrap()).unwrap_err().to_string().contains("not a file of keys"));
    }
}
