//! Between a connection, which is a task, and a session, which is a thread: input, output, and how both end.
//!
//! A connection's task must never wait for a session for long. While it waits it neither sends what sessions have to say
//! nor notices that its client is gone, and a session that waits to be read while its own input is full would wait for
//! ever. So input is taken off the connection whatever happens, and it is the client's window that is held back: as
//! long as a session keeps up, by plain back pressure for moments; when it does not, by granting a few bytes at a time,
//! because russh grants windows by itself, when data arrives, and can only be told how much.

use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use russh::ChannelWriteHalf;
use russh::server::Msg;
use tokio::sync::{Notify, watch};

use crate::build::supervise::Cancel;

/// What a client that is near may send of a channel without waiting for us: as much as with OpenSSH's server. OpenSSH's
/// client reads ahead as far as its window goes, and with a larger one it spends more time on memory than it gains.
pub(super) const NEAR_WINDOW: u32 = 2 << 20;
/// The same for one that is far. russh grants it again when half is used up, so at a round-trip time of 50 ms it bounds an
/// upload to 160 MiB/s. It also bounds what is held for a client whose session does not read.
const FAR_WINDOW: u32 = 16 << 20;
/// The round-trip time from which on a client is far: there the smaller window would bound an upload to 100 MiB/s.
const FAR_FROM: Duration = Duration::from_millis(10);
/// The window of a client whose session does not keep up. Each arrival of so little is a chance to grant more.
const DRIP: u32 = 2;
/// Input that a session has not taken yet, as long as it keeps up.
const COMFORTABLE: usize = 1 << 20;
/// More than a client can send that heeds its window: the comfortable part, one window, and one that was granted while
/// that was on its way.
const MAX_HELD: usize = COMFORTABLE + 2 * FAR_WINDOW as usize;
/// How long a connection waits for a session that does not keep up, before it does something else.
const PATIENCE: Duration = Duration::from_millis(20);
/// Extended data of this type is standard error (RFC 4254, 5.2).
const STDERR: u32 = 1;

/// What a client has sent, and its session has not read. The connection holds it and the session's reader does.
pub(super) struct Input {
    state: Mutex<State>,
    arrived: Condvar,
    taken: Notify,
    cancel: Cancel,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    end: Option<End>,
    reader_waits: bool,
    /// The session has read what it ever will.
    left: bool,
    /// The session did not keep up when it was last waited for, and has taken nothing since.
    stuck: bool,
}

/// How input ends. Only an end that the client announced is an end of file: a client that was killed in the middle of
/// an upload announces nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    Announced,
    /// With what the session is told.
    Broken(&'static str),
}

/// The client has sent more than its window allowed.
#[derive(Debug)]
pub(super) struct Flood;

impl Input {
    /// `cancel` tells builds to stop; they are told when the input ends, because nobody wants them then.
    pub(super) fn new(cancel: Cancel) -> Self {
        Self { state: Mutex::default(), arrived: Condvar::new(), taken: Notify::new(), cancel }
    }

    pub(super) fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }

    /// Takes what has arrived, and holds the connection back if the session is behind. `wanted` says that a session of
    /// the same connection has something to send.
    pub(super) async fn push(&self, bytes: &[u8], wanted: &Notify) -> Result<(), Flood> {
        self.put(bytes)?;
        // One that is stuck already has its window closed, and what is still on its way need not wait one by one.
        if self.is_stuck() && bytes.len() > DRIP as usize {
            return Ok(());
        }
        while self.lock().bytes.len() > COMFORTABLE {
            let stuck = tokio::select! {
                biased;
                () = self.taken.notified() => false,
                () = wanted.notified() => true,
                () = tokio::time::sleep(PATIENCE) => true,
            };
            if stuck {
                let mut state = self.lock();
                state.stuck = state.bytes.len() > COMFORTABLE;
                break;
            }
        }
        Ok(())
    }

    /// The first end counts.
    pub(super) fn end(&self, end: End) {
        self.lock().end.get_or_insert(end);
        self.arrived.notify_all();
        self.cancel.cancel();
    }

    /// This program is to end, and the session with it, whatever it is doing.
    pub(super) fn stop(&self) {
        self.cancel.stop();
        self.end(End::Broken("the builder is told to stop"));
    }

    /// The session reads no more. What its client still sends is of no interest.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        (state.left, state.stuck, state.bytes) = (true, false, Vec::new());
        self.taken.notify_one();
    }

    pub(super) fn is_left(&self) -> bool {
        self.lock().left
    }

    pub(super) fn is_stuck(&self) -> bool {
        self.lock().stuck
    }

    fn put(&self, bytes: &[u8]) -> Result<(), Flood> {
        let mut state = self.lock();
        if state.left || state.end.is_some() {
            return Ok(());
        }
        if state.bytes.len() + bytes.len() > MAX_HELD {
            return Err(Flood);
        }
        state.bytes.extend_from_slice(bytes);
        if std::mem::take(&mut state.reader_waits) {
            self.arrived.notify_one();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements, so a panic elsewhere spoils nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much a client may send from now on, given its round-trip time and the inputs of all channels of its connection.
pub(super) fn window<'a>(round_trip: Duration, mut inputs: impl Iterator<Item = &'a Input>) -> u32 {
    // russh knows one size for the whole connection.
    if inputs.any(Input::is_stuck) {
        DRIP
    } else if round_trip >= FAR_FROM {
        FAR_WINDOW
    } else {
        NEAR_WINDOW
    }
}

/// The session's side of an [`Input`].
pub(super) struct Incoming {
    input: Arc<Input>,
    chunk: Vec<u8>,
    offset: usize,
}

impl Incoming {
    pub(super) fn new(input: Arc<Input>) -> Self {
        Self { input, chunk: Vec::new(), offset: 0 }
    }

    /// Waits for input and takes all of it. False at the end.
    fn refill(&mut self) -> io::Result<bool> {
        let mut state = self.input.lock();
        loop {
            if let Some(End::Broken(why)) = state.end {
                return Err(io::Error::new(io::ErrorKind::ConnectionReset, why));
            }
            if !state.bytes.is_empty() {
                break;
            }
            if state.end.is_some() {
                return Ok(false);
            }
            state.reader_waits = true;
            state = self.input.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.chunk.clear();
        // After a burst, keep no more than is needed in the long run.
        self.chunk.shrink_to(2 * COMFORTABLE);
        std::mem::swap(&mut self.chunk, &mut state.bytes);
        self.offset = 0;
        state.stuck = false;
        if self.chunk.len() > COMFORTABLE {
            self.input.taken.notify_one();
        }
        Ok(true)
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || (self.offset == self.chunk.len() && !self.refill()?) {
            return Ok(0);
        }
        let count = buffer.len().min(self.chunk.len() - self.offset);
        buffer[..count].copy_from_slice(&self.chunk[self.offset..self.offset + count]);
        self.offset += count;
        Ok(count)
    }
}

/// The session's way to its client, for data, log and exit status. Every call returns when the client is gone.
#[derive(Clone)]
pub(super) struct Client {
    pub runtime: tokio::runtime::Handle,
    pub channel: Arc<ChannelWriteHalf<Msg>>,
    /// Its sender goes with the channel.
    pub gone: watch::Receiver<()>,
    /// Told when the connection is waited for.
    pub wanted: Arc<Notify>,
}

impl Client {
    pub(super) fn output(&self) -> Outgoing {
        Outgoing { client: self.clone(), error: false }
    }

    pub(super) fn error_output(&self) -> Outgoing {
        Outgoing { client: self.clone(), error: true }
    }

    /// Status, end of file, close: in this order, or clients take the end for a failure.
    pub(super) fn finish(&self, status: u32) {
        let finish = async {
            self.channel.exit_status(status).await?;
            self.channel.eof().await?;
            self.channel.close().await
        };
        let _gone = self.wait(finish);
    }

    fn wait(&self, act: impl Future<Output = Result<(), russh::Error>>) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the client is gone");
        let mut receiver = self.gone.clone();
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                // Fails only when the connection is no more.
                done = act => done.map_err(|_| gone()),
                // The channel is closed. Waiting for its window would be waiting for ever.
                _ = receiver.changed() => Err(gone()),
                // Polled only if the act could not be done at once.
                never = self.tell() => match never {},
            }
        })
    }

    async fn tell(&self) -> std::convert::Infallible {
        self.wanted.notify_one();
        std::future::pending().await
    }
}

/// One of the two streams to a client.
pub(super) struct Outgoing {
    client: Client,
    error: bool,
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (channel, data) = (&self.client.channel, bytes.to_vec());
        match self.error {
            false => self.client.wait(channel.data_bytes(data))?,
            true => self.client.wait(channel.extended_data_bytes(STDERR, data))?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn input() -> Arc<Input> {
        Arc::new(Input::new(Cancel::new().unwrap()))
    }

    fn read_all(input: &Arc<Input>) -> io::Result<String> {
        let mut text = String::new();
        Incoming::new(Arc::clone(input)).read_to_string(&mut text).map(|_| text)
    }

    #[tokio::test]
    async fn only_an_announced_end_is_an_end() {
        let quiet = Notify::new();
        for (end, expected) in [(End::Announced, true), (End::Broken("gone"), false)] {
            let input = input();
            for piece in ["ab", "", "c"] {
                input.push(piece.as_bytes(), &quiet).await.unwrap();
            }
            input.end(end);
            input.end(End::Announced);
            assert!(input.cancel().is_cancelled());
            match read_all(&input) {
                Ok(text) => assert!(expected && text == "abc"),
                Err(error) => {
                    assert_eq!(
                        (error.kind(), error.to_string()),
                        (io::ErrorKind::ConnectionReset, "gone".into())
                    );
                    assert!(!expected);
                }
            }
        }
    }

    #[tokio::test]
    async fn a_session_that_does_not_read_closes_the_window_and_not_the_connection() {
        let (input, quiet) = (input(), Notify::new());
        let piece = vec![7; 32 << 10];
        let granted = |input: &Arc<Input>| window(FAR_FROM, [&**input].into_iter());
        assert_eq!(window(Duration::ZERO, [&*input].into_iter()), NEAR_WINDOW);
        let mut sent = 0;
        // All of a window that was granted before comes through in bounded time, and more than that is refused.
        while sent < COMFORTABLE + FAR_WINDOW as usize {
            input.push(&piece, &quiet).await.unwrap();
            sent += piece.len();
            assert_eq!(granted(&input), if sent > COMFORTABLE { DRIP } else { FAR_WINDOW });
        }
        let mut flood = Ok(());
        while flood.is_ok() && sent <= MAX_HELD {
            flood = input.push(&piece, &quiet).await;
            sent += piece.len();
        }
        assert!(flood.is_err());
        // Once it reads, the window opens again.
        let mut reader = Incoming::new(Arc::clone(&input));
        reader.read_exact(&mut [0; 100]).unwrap();
        assert_eq!(granted(&input), FAR_WINDOW);
    }

    #[test]
    fn output_that_waits_goes_before_patience() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _inside = runtime.enter();
        let (input, wanted) = (input(), Notify::new());
        let poll = |bytes: &[u8]| {
            let mut context = Context::from_waker(Waker::noop());
            pin!(input.push(bytes, &wanted)).poll(&mut context).is_ready()
        };
        assert!(poll(&vec![0; COMFORTABLE]));
        assert!(!poll(b"more") && !input.is_stuck());
        wanted.notify_one();
        assert!(poll(b"more") && input.is_stuck());
    }

    #[test]
    fn nothing_is_lost_between_the_threads() {
        let input = input();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let reader = std::thread::spawn({
            let input = Arc::clone(&input);
            move || {
                let mut incoming = Incoming::new(input);
                let (mut total, mut buffer) = (0_u64, vec![0; 100_000]);
                loop {
                    match incoming.read(&mut buffer).unwrap() {
                        0 => return total,
                        count => total += buffer[..count].iter().map(|byte| u64::from(*byte)).sum::<u64>(),
                    }
                }
            }
        });
        let quiet = Notify::new();
        let mut expected = 0;
        runtime.block_on(async {
            for i in 0..2_000_usize {
                let piece = vec![i as u8; (i * 37) % 40_000];
                expected += piece.iter().map(|byte| u64::from(*byte)).sum::<u64>();
                input.push(&piece, &quiet).await.unwrap();
            }
        });
        input.end(End::Announced);
        assert_eq!(reader.join().unwrap(), expected);
    }
}
