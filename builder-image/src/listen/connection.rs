//! What one connection may do: log in by key or certificate, open session channels, and have each execute one command,
//! whatever its name, which is a serve session. Everything else that SSH knows is refused.
//!
//! russh calls [`Connection`] from the connection's own task, one call after another.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use russh::keys::{Algorithm, Certificate, PublicKey};
use russh::server::{
    Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session as Ssh, VerifiedPublicKey,
};
use russh::{Channel, ChannelId, ChannelWriteHalf, Disconnect, Pty};
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};

use super::authorized::{self, Access};
use super::bridge::{Client, End, Input, window};
use super::certificate::{self, Visit};
use super::session::Session;
use super::{Shared, Ticket};
use crate::build::supervise::Cancel;

/// Channels of one connection, at most.
const MAX_CHANNELS: usize = 16;
/// Reasons that are kept for the log, of a client that offers key after key.
const MAX_REFUSALS: usize = 8;
/// Characters of each, and of what else a stranger sent, that are quoted.
const MAX_QUOTE: usize = 300;

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error(transparent)]
    Ssh(#[from] russh::Error),
    #[error("the client sent more than its window allowed")]
    Flood,
}

pub(super) struct Connection {
    shared: Arc<Shared>,
    peer: SocketAddr,
    /// Gone as soon as the client has logged in.
    ticket: Option<Ticket>,
    logged_in: Arc<AtomicBool>,
    access: Option<Access>,
    place: Option<OwnedSemaphorePermit>,
    /// The client has begun to log in.
    tried: bool,
    refusals: Vec<String>,
    channels: HashMap<ChannelId, Open>,
    wanted: Arc<Notify>,
    /// From our word that a channel is open to the client's next: its round-trip time, and what a busy machine adds.
    round_trip: Duration,
}

/// A channel that is open.
struct Open {
    input: Arc<Input>,
    /// None once something was executed.
    half: Option<ChannelWriteHalf<Msg>>,
    since: Instant,
    /// Tells the session by being dropped.
    gone: watch::Sender<()>,
}

impl Open {
    /// Its session is over and its thread gone. russh tells of channels that the client closed first, and of no others.
    fn is_over(&self) -> bool {
        self.half.is_none() && Arc::strong_count(&self.input) == 1
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.input.end(End::Broken("the SSH connection broke off"));
    }
}

impl Connection {
    pub(super) fn new(shared: Arc<Shared>, peer: SocketAddr, ticket: Ticket) -> Self {
        Self {
            shared,
            peer,
            ticket: Some(ticket),
            logged_in: Arc::default(),
            access: None,
            place: None,
            tried: false,
            refusals: Vec::new(),
            channels: HashMap::new(),
            wanted: Arc::default(),
            round_trip: Duration::ZERO,
        }
    }

    /// Becomes true once, and stays so.
    pub(super) fn logged_in(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.logged_in)
    }

    fn decide(&mut self, user: &str, judgement: Result<Access, String>) -> Auth {
        match judgement {
            Ok(access) => {
                let line = format!("{} logged in as {:?} by {}", self.peer, brief(user), access.who);
                self.shared.log.note(&line);
                self.access = Some(access);
                Auth::Accept
            }
            Err(why) => {
                if self.refusals.len() < MAX_REFUSALS {
                    self.refusals.push(brief(&why));
                }
                Auth::reject()
            }
        }
    }

    fn refuse(&self, id: ChannelId, what: &str, session: &mut Ssh) -> Result<(), Broken> {
        self.shared.note_refusal(&format!("{} asked for {what}, which nobody gets", self.peer));
        Ok(session.channel_failure(id)?)
    }

    /// Starts a session in a channel, or says that it cannot.
    fn execute(&mut self, id: ChannelId) -> bool {
        let (Some(access), Some(open)) = (self.access.clone(), self.channels.get_mut(&id)) else {
            return false;
        };
        let Some(half) = open.half.take() else {
            return false;
        };
        // Any of them may have been slow for other reasons, the quickest least.
        let first = self.round_trip.is_zero();
        let since = open.since.elapsed();
        self.round_trip = if first { since } else { self.round_trip.min(since) };
        let client = Client {
            runtime: tokio::runtime::Handle::current(),
            channel: Arc::new(half),
            gone: open.gone.subscribe(),
            wanted: Arc::clone(&self.wanted),
        };
        let input = Arc::clone(&open.input);
        let session = Session { shared: Arc::clone(&self.shared), peer: self.peer, access, input, client };
        match session.start() {
            Ok(()) => true,
            Err(error) => {
                self.shared.log.note(&format!("cannot start a session for {}: {error}", self.peer));
                false
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.access.is_none() && self.tried {
            let mut reasons = self.refusals.clone();
            if self.shared.rules.iter().any(|rule| rule.authority) {
                // russh looks at these by itself and does not tell.
                let silent =
                    "a certificate that expired, is not valid yet or is forged has no line of its own";
                reasons.push(silent.into());
            }
            let why = if reasons.is_empty() { "it showed no key".into() } else { reasons.join("; ") };
            self.shared.note_refusal(&format!("{} did not log in: {why}", self.peer));
        }
    }
}

/// The beginning of what a stranger sent.
fn brief(text: &str) -> String {
    text.chars().take(MAX_QUOTE).collect()
}

fn now() -> u64 {
    // A clock before 1970 makes every certificate one of the future.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Handler for Connection {
    type Error = Broken;

    /// Called before anything is tried. There is nothing to announce.
    async fn authentication_banner(&mut self) -> Result<Option<String>, Self::Error> {
        self.tried = true;
        Ok(None)
    }

    async fn auth_publickey_offered(
        &mut self,
        user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Self::Error> {
        let judgement = authorized::judge(&self.shared.rules, offer.public_key, self.peer.ip());
        // The key of a certificate is offered as if it were a key by itself. Whether that is so turns out when the
        // client has signed, and then both are judged for what they are.
        let may_be_certificate =
            *offer.algorithm == Algorithm::Ed25519 && self.shared.rules.iter().any(|rule| rule.authority);
        match judgement {
            Err(_) if may_be_certificate => Ok(Auth::Accept),
            Ok(_) => Ok(Auth::Accept),
            refused => Ok(self.decide(user, refused)),
        }
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        let key: &PublicKey = key.public_key;
        let judgement = authorized::judge(&self.shared.rules, key, self.peer.ip());
        Ok(self.decide(user, judgement))
    }

    async fn auth_openssh_certificate(
        &mut self,
        user: &str,
        certificate: &Certificate,
    ) -> Result<Auth, Self::Error> {
        let visit = Visit { user, address: self.peer.ip(), now: now() };
        let judgement = certificate::judge(&self.shared.rules, certificate, visit);
        Ok(self.decide(user, judgement))
    }

    async fn auth_succeeded(&mut self, session: &mut Ssh) -> Result<(), Self::Error> {
        self.place = Arc::clone(&self.shared.connections).try_acquire_owned().ok();
        if self.place.is_some() {
            self.ticket = None;
            self.logged_in.store(true, Ordering::Relaxed);
        } else {
            // It stays one of those that have not logged in, and has as much time to go as they have.
            self.shared.note_refusal(&format!("{} was sent away: too many connections", self.peer));
            session.disconnect(
                Disconnect::TooManyConnections,
                "too many connections; try again later",
                "",
            )?;
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        self.channels.retain(|_, open| !open.is_over());
        let in_use = self.channels.values().filter(|open| !open.input.is_left()).count();
        // Dropping the handle refuses the channel.
        if in_use >= MAX_CHANNELS || self.place.is_none() {
            self.shared.note_refusal(&format!("{} asked for too many channels", self.peer));
            return Ok(());
        }
        let Ok(cancel) = Cancel::new() else {
            return Ok(());
        };
        let id = channel.id();
        // What arrives comes by calls, so the half that queues it goes; its queue would hold the connection up.
        let (_queue, half) = channel.split();
        let open = Open {
            input: Arc::new(Input::new(cancel)),
            half: Some(half),
            since: Instant::now(),
            gone: watch::Sender::new(()),
        };
        self.channels.insert(id, open);
        reply.accept().await;
        Ok(())
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        _command: &[u8],
        session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        match self.execute(id) {
            true => Ok(session.channel_success(id)?),
            false => Ok(session.channel_failure(id)?),
        }
    }

    async fn data(&mut self, id: ChannelId, data: &[u8], _session: &mut Ssh) -> Result<(), Self::Error> {
        match self.channels.get(&id) {
            Some(open) => open.input.push(data, &self.wanted).await.map_err(|_| Broken::Flood),
            None => Ok(()),
        }
    }

    fn adjust_window(&mut self, _id: ChannelId, _current: u32) -> u32 {
        window(self.round_trip, self.channels.values().map(|open| &*open.input))
    }

    async fn channel_eof(&mut self, id: ChannelId, _session: &mut Ssh) -> Result<(), Self::Error> {
        if let Some(open) = self.channels.get(&id) {
            open.input.end(End::Announced);
        }
        Ok(())
    }

    async fn channel_close(&mut self, id: ChannelId, _session: &mut Ssh) -> Result<(), Self::Error> {
        self.channels.remove(&id);
        Ok(())
    }

    // russh leaves these without an answer, and clients wait for one. Forwarding of every kind it refuses by itself.

    async fn shell_request(&mut self, id: ChannelId, session: &mut Ssh) -> Result<(), Self::Error> {
        self.refuse(id, "a shell", session)
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        self.refuse(id, &format!("the subsystem {:?}", brief(name)), session)
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        _value: &str,
        session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        // Clients send these unasked, and mean nothing by it.
        Ok(session.channel_failure(id)?)
    }

    async fn x11_request(
        &mut self,
        id: ChannelId,
        _single: bool,
        _protocol: &str,
        _cookie: &str,
        _screen: u32,
        session: &mut Ssh,
    ) -> Result<(), Self::Error> {
        self.refuse(id, "X11 forwarding", session)
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
        self.refuse(id, "a terminal", session)
    }
}
