//! One serve session over one channel, in a thread of its own: it begins with a request to execute something, and ends
//! with an exit status.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use drover_serve::Cause;
use tokio::sync::OwnedSemaphorePermit;

use super::Shared;
use super::authorized::Access;
use super::bridge::{Client, Incoming, Input};
use crate::backend;
use crate::build::log::Log;
use crate::error;

/// The last words of every session that runs when the program is told to end, whatever its end looks like from inside: a
/// client shall not take that for a failure of its build.
const TOLD_TO_END: &str = "the builder was told to end";

/// All that a session starts with.
pub(super) struct Session {
    pub shared: Arc<Shared>,
    pub peer: SocketAddr,
    pub access: Access,
    pub input: Arc<Input>,
    pub client: Client,
}

impl Session {
    /// Starts the session, or tells the client why not. The error is that of making a thread.
    pub(super) fn start(self) -> io::Result<()> {
        let permit = Arc::clone(&self.shared.sessions).try_acquire_owned().ok();
        let admitted = match permit {
            Some(permit) => Some((permit, Log::to(self.client.error_output())?)),
            None => None,
        };
        let name = if admitted.is_some() { "session" } else { "refusal" };
        let run = move || match admitted {
            Some((permit, client_log)) => self.run(permit, client_log),
            None => self.refuse("too many sessions; try again later"),
        };
        std::thread::Builder::new().name(name.into()).spawn(run).map(drop)
    }

    fn run(self, permit: OwnedSemaphorePermit, client_log: Log) {
        let running = self.shared.enter(&self.input);
        let result = self.serve(client_log.clone().and(&self.shared.log));
        if let Err(error) = &result {
            let words = match self.input.cancel().is_stopped() {
                true => Cause::Killed.say(TOLD_TO_END),
                false => error::last_words(error),
            };
            client_log.note(&words);
            self.note(&words);
        }
        client_log.flush();
        // A client that has read the status may come back at once.
        self.input.leave();
        drop(permit);
        self.client.finish(u32::from(result.is_err()));
        drop(running);
    }

    fn serve(&self, log: Log) -> anyhow::Result<()> {
        let builder = self.shared.builder.clone();
        let (dir, write) = (builder.store.store_dir().clone(), self.access.write);
        let mut session = backend::Session::new(builder, write, log.clone(), self.input.cancel())?;
        let (input, output) = (Incoming::new(Arc::clone(&self.input)), self.client.output());
        let result = drover_serve::serve(input, output, &mut session, &dir, write);
        log.flush();
        Ok(result?)
    }

    fn refuse(self, why: &str) {
        let line = format!("drover-builder: {why}\n");
        let _gone = io::Write::write_all(&mut self.client.error_output(), line.as_bytes());
        self.note(why);
        self.input.leave();
        self.client.finish(1);
    }

    fn note(&self, line: &str) {
        self.shared.log.note(&format!("session of {} ({}): {line}", self.peer, self.access.who));
    }
}
