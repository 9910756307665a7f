//! A client of the serve protocol at version 2.7 that favours nobody: it sends prepared bytes and counts what comes back.
//!
//! It knows every archive beforehand, so it neither hashes nor parses, and its share of the time is that of moving the
//! bytes. Like the clients that people use it sends buffers of at most [`PIECE`] bytes and one request in one write
//! where it fits. It works in two manners. [`Manner::OneAtATime`] is Nix's own: a request, then its answer.
//! [`Manner::InFlight`] is that of Drover's and other newer clients: up to [`WINDOW`] requests await their answers, which
//! the protocol allows to every server, and small ones share a write.

use std::io::{Read, Write};

use anyhow::{Context, Result, bail, ensure};
use drover_nix::{BasicDerivation, StoreDir, StorePath};

use super::data::Object;

/// Bytes that are written or read at a time.
pub const PIECE: usize = 64 << 10;
/// Requests that may await their answers. Such a number of answers to additions always fits a pipe.
pub const WINDOW: usize = 64;

const CLIENT_MAGIC: u64 = 0x390c_9deb;
const SERVER_MAGIC: u64 = 0x5452_eecb;
const VERSION: u64 = 0x0207;

/// Whether requests wait for the answers of earlier ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    OneAtATime,
    InFlight,
}

impl Manner {
    pub const ALL: [Self; 2] = [Self::OneAtATime, Self::InFlight];

    pub fn name(self) -> &'static str {
        match self {
            Self::OneAtATime => "one at a time",
            Self::InFlight => "in flight",
        }
    }

    fn window(self) -> usize {
        match self {
            Self::OneAtATime => 1,
            Self::InFlight => WINDOW,
        }
    }
}

/// One session. Dropping it closes both directions.
pub struct Client<R, W> {
    input: R,
    output: W,
    /// What is not sent yet.
    pending: Vec<u8>,
    buffer: Vec<u8>,
}

impl<R: Read, W: Write> Client<R, W> {
    /// Greets the server and waits for its greeting.
    pub fn connect(input: R, output: W) -> Result<Self> {
        let mut client = Self { input, output, pending: Vec::with_capacity(PIECE), buffer: vec![0; PIECE] };
        put_u64(&mut client.pending, CLIENT_MAGIC);
        put_u64(&mut client.pending, VERSION);
        client.flush()?;
        let (magic, version) = (client.read_u64()?, client.read_u64()?);
        ensure!(magic == SERVER_MAGIC && version == VERSION, "the server greets with {magic:x}, {version:x}");
        Ok(client)
    }

    /// AddToStoreNar of every object. Returns when all are valid.
    pub fn import(&mut self, objects: &[Object], manner: Manner) -> Result<()> {
        let window = manner.window();
        let mut in_flight = 0;
        for object in objects {
            if in_flight == window {
                self.flush()?;
                // Half of them, so that writes are shared.
                self.read_done(window.div_ceil(2))?;
                in_flight -= window.div_ceil(2);
            }
            self.send(&object.request)?;
            self.send(&object.nar)?;
            in_flight += 1;
        }
        self.flush()?;
        self.read_done(in_flight)
    }

    /// AddToStoreNar of one object whose archive is made while it is sent.
    pub fn import_stream(&mut self, request: &[u8], pieces: impl Iterator<Item = Vec<u8>>) -> Result<()> {
        self.send(request)?;
        for piece in pieces {
            self.send(&piece)?;
        }
        self.flush()?;
        self.read_done(1)
    }

    /// DumpStorePath of every object.
    pub fn export(&mut self, objects: &[Object], manner: Manner) -> Result<()> {
        let window = manner.window();
        let mut asked = 0;
        for (got, object) in objects.iter().enumerate() {
            if asked - got <= window / 2 {
                for object in objects[asked..].iter().take(got + window - asked) {
                    put_u64(&mut self.pending, 3);
                    put_path(&mut self.pending, &object.path);
                    asked += 1;
                }
                self.flush()?;
            }
            self.receive(&object.nar).with_context(|| format!("receiving {}", object.path))?;
        }
        Ok(())
    }

    /// QueryValidPaths. Returns how many are valid.
    pub fn query(&mut self, paths: &[StorePath], lock: bool) -> Result<u64> {
        put_u64(&mut self.pending, 1);
        put_u64(&mut self.pending, u64::from(lock));
        put_u64(&mut self.pending, 0); // nothing is substituted
        put_u64(&mut self.pending, paths.len() as u64);
        for path in paths {
            put_path(&mut self.pending, path);
        }
        self.flush()?;
        let count = self.read_u64()?;
        for _ in 0..count {
            let len = self.read_u64()?;
            self.skip(len.next_multiple_of(8))?;
        }
        Ok(count)
    }

    /// BuildDerivation. The outputs must be new, or built before.
    pub fn build(&mut self, drv_path: &StorePath, derivation: &BasicDerivation) -> Result<()> {
        let out = &mut self.pending;
        put_u64(out, 8);
        put_path(out, drv_path);
        put_u64(out, derivation.outputs.len() as u64);
        for (name, output) in &derivation.outputs {
            let (path, algo, hash) = output.to_triple(&StoreDir::default(), &derivation.name, name)?;
            [name.as_str(), &path, &algo, &hash]
                .into_iter()
                .for_each(|field| put_string(out, field.as_bytes()));
        }
        put_u64(out, derivation.input_srcs.len() as u64);
        derivation.input_srcs.iter().for_each(|path| put_path(out, path));
        put_string(out, &derivation.system);
        put_string(out, &derivation.builder);
        put_u64(out, derivation.args.len() as u64);
        derivation.args.iter().for_each(|arg| put_string(out, arg));
        put_u64(out, derivation.env.len() as u64);
        for (key, value) in &derivation.env {
            put_string(out, key);
            put_string(out, value);
        }
        // No limit on silence, time or log; no repetition, nothing kept.
        (0..6).for_each(|_| put_u64(out, 0));
        self.flush()?;
        let status = self.read_u64()?;
        let message = self.read_string()?;
        // Times built, whether deterministic, start, stop; then the outputs.
        (0..4).try_for_each(|_| self.read_u64().map(drop))?;
        for _ in 0..self.read_u64()? {
            self.read_string()?;
            self.read_string()?;
        }
        if status > 2 {
            bail!("{drv_path} was not built: status {status}, {}", String::from_utf8_lossy(&message));
        }
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        if self.pending.len() + bytes.len() > PIECE {
            self.flush()?;
        }
        if bytes.len() < PIECE {
            self.pending.extend_from_slice(bytes);
            return Ok(());
        }
        bytes.chunks(PIECE).try_for_each(|piece| self.output.write_all(piece)).context("sending")
    }

    fn flush(&mut self) -> Result<()> {
        self.output.write_all(&self.pending).and_then(|()| self.output.flush()).context("sending")?;
        self.pending.clear();
        Ok(())
    }

    /// As many bytes as `expected` has. That they are the same is looked at here and there only: comparing all would be
    /// work that no client has.
    fn receive(&mut self, expected: &[u8]) -> Result<()> {
        let mut at = 0;
        while at < expected.len() {
            let want = (expected.len() - at).min(self.buffer.len());
            let count = self.input.read(&mut self.buffer[..want])?;
            ensure!(count > 0, "the server closed its side after {at} bytes");
            let sample = count.min(64);
            ensure!(self.buffer[..sample] == expected[at..at + sample], "other bytes come back at {at}");
            at += count;
        }
        Ok(())
    }

    fn read_done(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            let word = self.read_u64()?;
            ensure!(word == 1, "an addition is answered with {word}");
        }
        Ok(())
    }

    fn read_u64(&mut self) -> Result<u64> {
        let mut word = [0; 8];
        self.input.read_exact(&mut word).context("the server closed its side")?;
        Ok(u64::from_le_bytes(word))
    }

    fn read_string(&mut self) -> Result<Vec<u8>> {
        let len = usize::try_from(self.read_u64()?)?;
        ensure!(len <= PIECE, "a string of {len} bytes");
        let mut bytes = vec![0; len.next_multiple_of(8)];
        self.input.read_exact(&mut bytes)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    fn skip(&mut self, count: u64) -> Result<()> {
        let count = usize::try_from(count)?;
        ensure!(count <= PIECE, "a string of {count} bytes");
        Ok(self.input.read_exact(&mut self.buffer[..count])?)
    }
}

pub(super) fn put_u64(to: &mut Vec<u8>, value: u64) {
    to.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_string(to: &mut Vec<u8>, bytes: &[u8]) {
    put_u64(to, bytes.len() as u64);
    to.extend_from_slice(bytes);
    to.resize(to.len().next_multiple_of(8), 0);
}

fn put_path(to: &mut Vec<u8>, path: &StorePath) {
    put_string(to, StoreDir::default().full(path).as_bytes());
}
