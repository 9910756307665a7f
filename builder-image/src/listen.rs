//! The builder's SSH server: one key may log in, and whatever it asks to execute is a serve session. No shell, no
//! terminal, no environment, no subsystem, no forwarding. The only file that knows russh, and the only asynchronous
//! one: sessions are plain threads behind channels.
//!
//! The process' own standard output begins with the host key, so that who can read the pod's log through the API server
//! can pin it; builds' output goes to the client and to standard error.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use russh::keys::ssh_key::private::Ed25519Keypair;
use russh::keys::{PrivateKey, PublicKey};
use russh::server::{
    Auth, ChannelOpenHandle, Config, Handler, Msg, PublicKeyOffer, Session as Ssh, VerifiedPublicKey,
    run_stream,
};
use russh::{
    Channel, ChannelId, ChannelMsg, ChannelReadHalf, Disconnect, MethodKind, MethodSet, Preferred, Pty,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::backend::Session;
use crate::build::Builder;
use crate::build::log::Log;
use crate::build::supervise::Cancel;
use crate::sandbox::{launch, rungs};

/// How long a connection may take to log in.
const LOGIN_GRACE: Duration = Duration::from_secs(20);
/// Connections that have not logged in yet, at most.
const MAX_UNAUTHENTICATED: usize = 32;
/// Channels of one connection, at most.
const MAX_CHANNELS: usize = 16;
/// A client that is silent for this long is asked whether it is there; after three times it is gone.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// Messages of up to 32 KiB that a channel keeps before the client has to wait: this bounds memory.
const CHANNEL_MESSAGES: usize = 32;
/// Pieces of data between a session's thread and its connection.
const QUEUE: usize = 4;
/// How long sessions may take to end when the program is told to, and the last of a log to be taken.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);
const LOG_GRACE: Duration = Duration::from_secs(5);
/// How often process 1 looks for orphans that have ended.
const REAP_INTERVAL: Duration = Duration::from_secs(2);
/// Extended data of this type is standard error (RFC 4254, 5.2).
const STDERR: u32 = 1;

pub(crate) struct Options<'a> {
    pub address: &'a str,
    /// Public keys in OpenSSH's format, or files of them.
    pub authorized_keys: &'a [String],
    /// A private key file; without it a key is made.
    pub host_key: Option<&'a Path>,
    pub max_sessions: usize,
}

/// Serves until the program is told to stop.
pub(crate) fn run(options: &Options<'_>, builder: Builder) -> anyhow::Result<()> {
    let rung = rungs::probe(builder.settings.ids)
        .map_err(anyhow::Error::msg)
        .context("this machine allows no sandbox")?;
    let authorized = authorized_keys(options.authorized_keys)?;
    let host_key = host_key(options.host_key)?;
    let public = host_key.public_key().to_openssh().context("cannot encode the host key")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the server's threads")?;
    let shared = Arc::new(Shared {
        builder,
        authorized,
        log: Log::to(io::stderr()),
        sessions: Semaphore::new(options.max_sessions),
        running: Mutex::default(),
        next: AtomicU64::new(0),
    });
    let result = runtime.block_on(async {
        let listener = TcpListener::bind(options.address).await;
        let listener = listener.with_context(|| format!("cannot listen on {}", options.address))?;
        // The first line is the key without its comment, and nothing may come before it.
        println!("host-key: {}", public.split(' ').take(2).collect::<Vec<_>>().join(" "));
        println!("sandbox: {rung}");
        println!("listening: {}", listener.local_addr().context("cannot tell the address")?);
        serve(listener, Arc::new(config(host_key)), Arc::clone(&shared)).await
    });
    // Sessions' threads that are stuck in a system call are not waited for.
    runtime.shutdown_background();
    result
}

/// What all connections have in common.
struct Shared {
    builder: Builder,
    authorized: Vec<PublicKey>,
    log: Log,
    sessions: Semaphore,
    /// Of every session that runs.
    running: Mutex<HashMap<u64, Cancel>>,
    next: AtomicU64,
}

impl Shared {
    fn running(&self) -> MutexGuard<'_, HashMap<u64, Cancel>> {
        // Only whole entries are put in and taken out.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_authorized(&self, key: &PublicKey) -> bool {
        self.authorized.iter().any(|authorized| authorized.key_data() == key.key_data())
    }
}

async fn serve(listener: TcpListener, config: Arc<Config>, shared: Arc<Shared>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut reap = tokio::time::interval(REAP_INTERVAL);
    let is_init = std::process::id() == 1;
    let unauthenticated = Arc::new(Semaphore::new(MAX_UNAUTHENTICATED));
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = reap.tick(), if is_init => launch::reap_orphans(),
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    // Beyond the limit a connection is closed at once; whoever has a key tries again.
                    if let Ok(permit) = Arc::clone(&unauthenticated).try_acquire_owned() {
                        tokio::spawn(connection(stream, peer, Arc::clone(&config), Arc::clone(&shared), permit));
                    }
                }
                // Out of descriptors or memory, or a connection that was gone before it was taken: both pass.
                Err(error) => {
                    shared.log.note(&format!("cannot accept a connection: {error}"));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    shared.running().values().for_each(Cancel::stop);
    let ended = async {
        while !shared.running().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let _stuck = tokio::time::timeout(SHUTDOWN_GRACE, ended).await;
    Ok(())
}

/// One connection, from its first byte to its last.
async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    config: Arc<Config>,
    shared: Arc<Shared>,
    permit: tokio::sync::OwnedSemaphorePermit,
) {
    let _best_effort = stream.set_nodelay(true);
    let logged_in = Arc::new(AtomicBool::new(false));
    let handler = Connection {
        shared: Arc::clone(&shared),
        logged_in: Arc::clone(&logged_in),
        channels: HashMap::new(),
        open: Arc::new(AtomicUsize::new(0)),
    };
    let deadline = tokio::time::Instant::now() + LOGIN_GRACE;
    let Ok(Ok(mut session)) = tokio::time::timeout_at(deadline, run_stream(config, stream, handler)).await
    else {
        return;
    };
    let handle = session.handle();
    let late = tokio::time::timeout_at(deadline, &mut session).await.is_err();
    if late && !logged_in.load(Ordering::Relaxed) {
        shared.log.note(&format!("{peer} did not log in within {} seconds", LOGIN_GRACE.as_secs()));
        let _gone =
            handle.disconnect(Disconnect::ByApplication, "too slow to log in".into(), String::new()).await;
        return;
    }
    drop(permit);
    if late {
        let _ended = session.await;
    }
}

/// What one connection may do.
struct Connection {
    shared: Arc<Shared>,
    logged_in: Arc<AtomicBool>,
    /// Open, and not executing anything yet.
    channels: HashMap<ChannelId, Channel<Msg>>,
    /// How many are open, executing or not.
    open: Arc<AtomicUsize>,
}

impl Connection {
    fn judge(&self, key: &PublicKey) -> Auth {
        if self.shared.is_authorized(key) { Auth::Accept } else { Auth::reject() }
    }
}

impl Handler for Connection {
    type Error = russh::Error;

    async fn auth_publickey_offered(
        &mut self,
        _user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Self::Error> {
        Ok(self.judge(offer.public_key))
    }

    async fn auth_publickey(&mut self, _user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(self.judge(key.public_key))
    }

    async fn auth_succeeded(&mut self, _session: &mut Ssh) -> Result<(), Self::Error> {
        self.logged_in.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        // Dropping the handle refuses the channel.
        if self.open.load(Ordering::Relaxed) < MAX_CHANNELS {
            self.open.fetch_add(1, Ordering::Relaxed);
            self.channels.insert(channel.id(), channel);
            reply.accept().await;
        }
        Ok(())
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        _command: &[u8],
        session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        let Some(channel) = self.channels.remove(&id) else {
            return session.channel_failure(id);
        };
        session.channel_success(id)?;
        let (shared, open) = (Arc::clone(&self.shared), Arc::clone(&self.open));
        tokio::spawn(async move {
            execute(channel, shared).await;
            open.fetch_sub(1, Ordering::Relaxed);
        });
        Ok(())
    }

    async fn channel_close(&mut self, id: ChannelId, _session: &mut Ssh) -> Result<(), Self::Error> {
        if self.channels.remove(&id).is_some() {
            self.open.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }

    // The defaults leave these without an answer, and clients wait for one.

    async fn shell_request(&mut self, id: ChannelId, session: &mut Ssh) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        _value: &str,
        session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        _term: &str,
        _columns: u32,
        _rows: u32,
        _width: u32,
        _height: u32,
        _modes: &[(Pty, u32)],
        session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }
}

/// One serve session over one channel.
async fn execute(channel: Channel<Msg>, shared: Arc<Shared>) {
    let (receiver, sender) = channel.split();
    let refuse = |why: String| {
        let line = format!("drover-builder: {why}\n").into_bytes();
        let sender = &sender;
        async move {
            let _gone = sender.extended_data_bytes(STDERR, line).await;
            let _gone = sender.exit_status(1).await;
            let _gone = sender.close().await;
        }
    };
    let Ok(permit) = shared.sessions.try_acquire() else {
        return refuse("too many sessions; try again later".into()).await;
    };
    let cancel = match Cancel::new() {
        Ok(cancel) => cancel,
        Err(error) => return refuse(format!("cannot start a session: {error}")).await,
    };
    let number = shared.next.fetch_add(1, Ordering::Relaxed);
    shared.running().insert(number, cancel.clone());

    let (input, requests) = mpsc::channel(QUEUE);
    let (answers, mut output) = mpsc::channel::<Vec<u8>>(QUEUE);
    let (errors, mut error_output) = mpsc::channel::<Vec<u8>>(QUEUE);
    let (exit, exited) = oneshot::channel();
    let pump = tokio::spawn(receive(receiver, input, cancel.clone()));
    let builder = shared.builder.clone();
    let log = Log::to(Outlet(errors)).and(&shared.log);
    std::thread::spawn(move || {
        let _nobody_waits =
            exit.send(session(builder, Incoming::new(requests), Outlet(answers), log, cancel));
    });

    let to_client = async {
        while let Some(bytes) = output.recv().await {
            if sender.data_bytes(bytes).await.is_err() {
                // The session notices by its next write.
                output.close();
            }
        }
    };
    let log_to_client = async {
        while let Some(bytes) = error_output.recv().await {
            if sender.extended_data_bytes(STDERR, bytes).await.is_err() {
                error_output.close();
            }
        }
    };
    // Both end with the session's thread; only the log may be held up by a client that takes none of it.
    let mut log_to_client = std::pin::pin!(log_to_client);
    let mut to_client = std::pin::pin!(to_client);
    let mut log_done = false;
    loop {
        tokio::select! {
            () = &mut to_client => break,
            () = &mut log_to_client, if !log_done => log_done = true,
        }
    }
    if !log_done {
        let _stalled = tokio::time::timeout(LOG_GRACE, log_to_client).await;
    }
    let code = exited.await.unwrap_or(1);
    shared.running().remove(&number);
    pump.abort();
    // In this order, or clients take the end for a failure.
    let _gone = sender.exit_status(code).await;
    let _gone = sender.eof().await;
    let _gone = sender.close().await;
    drop(permit);
}

/// Runs in a thread of its own. The exit status.
fn session(builder: Builder, input: Incoming, output: Outlet, log: Log, cancel: Cancel) -> u32 {
    let dir = builder.store.store_dir().clone();
    let result = Session::new(builder, true, log.clone(), cancel)
        .map_err(anyhow::Error::from)
        .and_then(|mut session| Ok(drover_serve::serve(input, output, &mut session, &dir, true)?));
    if let Err(error) = &result {
        log.note(&format!("{error:#}"));
    }
    log.flush();
    u32::from(result.is_err())
}

/// Passes on what the client sends. Only an end that the client announced is one; whatever else ends the connection
/// truncates it. Either way a build that runs has nobody left who wants it.
async fn receive(mut channel: ChannelReadHalf, input: mpsc::Sender<ChannelMsg>, cancel: Cancel) {
    loop {
        match channel.wait().await {
            Some(message @ ChannelMsg::Data { .. }) => {
                if input.send(message).await.is_err() {
                    return;
                }
            }
            Some(ChannelMsg::Eof) => {
                cancel.cancel();
                let _session_ended = input.send(ChannelMsg::Eof).await;
                return;
            }
            Some(ChannelMsg::Close) | None => {
                cancel.cancel();
                return;
            }
            Some(_) => {}
        }
    }
}

/// The session's input.
struct Incoming {
    messages: mpsc::Receiver<ChannelMsg>,
    current: ChannelMsg,
    offset: usize,
}

impl Incoming {
    fn new(messages: mpsc::Receiver<ChannelMsg>) -> Self {
        Self { messages, current: ChannelMsg::Success, offset: 0 }
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match &self.current {
                ChannelMsg::Eof => return Ok(0),
                ChannelMsg::Data { data } if self.offset < data.len() => {
                    let count = buffer.len().min(data.len() - self.offset);
                    buffer[..count].copy_from_slice(&data[self.offset..self.offset + count]);
                    self.offset += count;
                    return Ok(count);
                }
                _ => {
                    let next = self.messages.blocking_recv();
                    self.current = next.ok_or_else(|| {
                        io::Error::new(io::ErrorKind::ConnectionReset, "the SSH connection broke off")
                    })?;
                    self.offset = 0;
                }
            }
        }
    }
}

/// The session's output, or its log on the way to the client.
struct Outlet(mpsc::Sender<Vec<u8>>);

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(bytes.to_vec());
        sent.map(|()| bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn config(host_key: PrivateKey) -> Config {
    use russh::cipher::{AES_128_GCM, AES_256_GCM, CHACHA20_POLY1305};
    Config {
        server_id: russh::SshId::Standard("SSH-2.0-drover".into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        // Every OpenSSH client begins with a probe that is refused: a delay there is a delay for all.
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![host_key],
        channel_buffer_size: CHANNEL_MESSAGES,
        preferred: Preferred {
            cipher: vec![AES_128_GCM, AES_256_GCM, CHACHA20_POLY1305].into(),
            compression: vec![russh::compression::NONE].into(),
            ..Preferred::default()
        },
        max_auth_attempts: 6,
        // Builds can be silent for hours; who is gone is told by keepalives.
        inactivity_timeout: None,
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: 3,
        nodelay: true,
        ..Config::default()
    }
}

/// Parses keys, and files of keys with a line each.
fn authorized_keys(arguments: &[String]) -> anyhow::Result<Vec<PublicKey>> {
    let mut keys = Vec::new();
    for argument in arguments {
        let is_key = argument.contains(' ');
        let text = match is_key {
            true => argument.clone(),
            false => std::fs::read_to_string(argument)
                .with_context(|| format!("cannot read the keys in {argument}"))?,
        };
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let key = PublicKey::from_openssh(line);
            keys.push(key.with_context(|| {
                format!("--authorized-key: not a public key in OpenSSH's format: {line:?}")
            })?);
        }
    }
    anyhow::ensure!(!keys.is_empty(), "no --authorized-key has a key in it: nobody could log in");
    Ok(keys)
}

fn host_key(file: Option<&Path>) -> anyhow::Result<PrivateKey> {
    use ring::rand::SecureRandom as _;
    if let Some(file) = file {
        let text =
            std::fs::read(file).with_context(|| format!("cannot read the host key {}", file.display()))?;
        return PrivateKey::from_openssh(text)
            .with_context(|| format!("{} is no OpenSSH private key", file.display()));
    }
    let mut seed = [0; 32];
    ring::rand::SystemRandom::new()
        .fill(&mut seed)
        .map_err(|_| anyhow::anyhow!("cannot get random bytes"))?;
    Ok(Ed25519Keypair::from_seed(&seed).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";

    #[test]
    fn keys_and_files_of_keys() {
        let keys = authorized_keys(&[KEY.to_owned(), format!("{KEY} comment")]).unwrap();
        assert_eq!(keys[0].key_data(), keys[1].key_data());
        assert!(authorized_keys(&["ssh-ed25519 AAAA".to_owned()]).is_err());
        assert!(authorized_keys(&["/no/such/file".to_owned()]).is_err());
        let file = std::env::temp_dir().join(format!("drover-keys-{}", std::process::id()));
        std::fs::write(&file, format!("# keys\n\n{KEY}\n")).unwrap();
        assert_eq!(authorized_keys(&[file.to_str().unwrap().to_owned()]).unwrap().len(), 1);
        std::fs::write(&file, "").unwrap();
        assert!(authorized_keys(&[file.to_str().unwrap().to_owned()]).is_err());
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn each_host_key_is_a_new_one() {
        let (a, b) = (host_key(None).unwrap(), host_key(None).unwrap());
        assert_ne!(a.public_key(), b.public_key());
        assert!(a.public_key().to_openssh().unwrap().starts_with("ssh-ed25519 "));
    }

    #[test]
    fn only_an_announced_end_is_an_end() {
        let read = |messages: Vec<ChannelMsg>| {
            let (sender, receiver) = mpsc::channel(8);
            messages.into_iter().for_each(|message| sender.try_send(message).unwrap());
            drop(sender);
            let mut text = String::new();
            Incoming::new(receiver).read_to_string(&mut text).map(|_| text)
        };
        let data = |text: &'static str| ChannelMsg::Data { data: text.as_bytes().into() };
        assert_eq!(read(vec![data("ab"), data(""), data("c"), ChannelMsg::Eof]).unwrap(), "abc");
        assert_eq!(read(vec![data("ab")]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
