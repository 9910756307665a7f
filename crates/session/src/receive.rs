//! The bytes of one output, off the connection into a spool: from where they broke off before, no more of them than were
//! announced, and in the form of an archive. What they should be is decided elsewhere.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};

use drover_cache::{NarSpool, SpooledNar};
use drover_nix::{OutputName, PathInfo, StorePath, nar};
use drover_serve::{Client, Frames};

use crate::copy::PROGRESS;
use crate::kept::Part;
use crate::{Event, Failure, Job, Observer, Reason};

/// Receives the output that the builder describes as `claimed`: as it is, or as compressed `frames`, which become the
/// cache's file as they are. What breaks off is kept for the next session.
pub(crate) fn receive<R: Read, W: Write>(
    job: &Job,
    name: &OutputName,
    claimed: &PathInfo,
    candidates: &BTreeSet<StorePath>,
    frames: bool,
    client: &mut Client<R, W>,
    observer: &mut dyn Observer,
) -> Result<SpooledNar, Failure> {
    let (path, nar_size) = (&claimed.path, claimed.nar_size);
    let part = job.kept.take_part(claimed).filter(|spool| spool.size() <= nar_size);
    let resumes = part.is_some();
    let spool = match part {
        Some(spool) => spool,
        None => NarSpool::new(&job.spool_dir, candidates.iter().cloned())
            .map_err(Failure::cache(&format!("making room for output {name}")))?,
    };
    let begin = spool.size();
    if resumes {
        observer.event(Event::OutputKept { name: name.clone(), bytes: begin });
    }
    let mut incoming = Incoming { spool, limit: nar_size, observer, name, told: begin };
    let received = match (resumes, frames) {
        // The connection broke behind its last byte.
        (true, _) if begin == nar_size => Ok(()),
        (_, true) => incoming.take_frames(client, path, resumes),
        (true, false) => incoming.take_bytes(|sink| client.dump_store_path_from(path, begin, nar_size, sink)),
        (false, false) => incoming.take_bytes(|sink| client.dump_store_path(path, sink).map(drop)),
    };
    let spool = incoming.spool;
    match received {
        Ok(()) => {}
        Err(Trouble::TooLong) => {
            let message = format!(
                "output {name} ({path}) is not what the builder says: more than {nar_size} bytes arrive"
            );
            return Err(Failure::verdict(Reason::OutputHashMismatch, message));
        }
        Err(Trouble::Form(error)) => return Err(no_archive(name, path, &error)),
        Err(Trouble::Spool(error @ drover_cache::Error::Frame { .. })) => {
            return Err(Failure::cache(&format!("receiving output {name} ({path}) from the builder"))(error));
        }
        Err(Trouble::Spool(error)) => return Err(Failure::cache(&format!("keeping output {name}"))(error)),
        Err(Trouble::Builder(error @ drover_serve::Error::NarSink { .. })) => {
            return Err(Failure::infrastructure(format!("keeping output {name}: {error}"), error));
        }
        Err(Trouble::Builder(error)) => {
            // Without progress, the builder may be one that does not resume: then all of it is asked for again.
            if error.is_disconnect() && spool.size() > begin {
                job.kept.put_part(Part { claimed: claimed.clone(), spool });
            }
            return Err(Failure::builder(&format!("receiving output {name} ({path})"))(error));
        }
    }
    let nar = spool.finish().map_err(Failure::cache(&format!("keeping output {name}")))?;
    if resumes {
        check_form(name, path, &nar)?;
    }
    Ok(nar)
}

/// Why the bytes of an output did not all arrive as they should.
enum Trouble {
    Builder(drover_serve::Error),
    Spool(drover_cache::Error),
    /// They are no archive.
    Form(drover_nix::Error),
    TooLong,
}

/// An output on its way.
struct Incoming<'a> {
    spool: NarSpool,
    /// Its size, as the builder says.
    limit: u64,
    observer: &'a mut dyn Observer,
    name: &'a OutputName,
    /// Bytes that the observer knows of.
    told: u64,
}

impl Incoming<'_> {
    /// What `dump` writes, with the error that it has if the limit is exceeded.
    fn take_bytes(
        &mut self,
        dump: impl FnOnce(&mut dyn Write) -> Result<(), drover_serve::Error>,
    ) -> Result<(), Trouble> {
        let mut sink = Sink { incoming: self, exceeded: false };
        let dumped = dump(&mut sink);
        dumped.map_err(|error| if sink.exceeded { Trouble::TooLong } else { Trouble::Builder(error) })
    }

    /// Compressed frames. Those of a whole archive are seen to be one as they come.
    fn take_frames<R: Read, W: Write>(
        &mut self,
        client: &mut Client<R, W>,
        path: &StorePath,
        resumes: bool,
    ) -> Result<(), Trouble> {
        let frames = client.dump_store_path_frames(path, self.spool.size()).map_err(Trouble::Builder)?;
        let (frame, content) = (Vec::new(), Vec::new());
        let mut unpacked =
            Unpacked { incoming: self, frames, frame, content, at: 0, ended: false, trouble: None };
        let form = match resumes {
            true => Ok(0),
            false => nar::Reader::new(&mut unpacked).skip_all(),
        };
        if let Some(trouble) = unpacked.trouble.take() {
            return Err(trouble);
        }
        let end = form.map_err(Trouble::Form)?;
        // To the end, so that the session can go on.
        while unpacked.next()? {}
        if !resumes && end != self.spool.size() {
            let why = format!("{} bytes stand behind it", self.spool.size() - end);
            return Err(Trouble::Form(drover_nix::Error::Nar { offset: end, why }));
        }
        Ok(())
    }

    fn tell(&mut self) {
        let size = self.spool.size();
        if size - self.told >= PROGRESS {
            self.told = size;
            self.observer.event(Event::OutputProgress { name: self.name.clone(), bytes: size });
        }
    }
}

/// Takes no more than was announced.
struct Sink<'a, 'b> {
    incoming: &'a mut Incoming<'b>,
    exceeded: bool,
}

impl Write for Sink<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.incoming.limit - self.incoming.spool.size() {
            self.exceeded = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let count = self.incoming.spool.write(bytes)?;
        self.incoming.tell();
        Ok(count)
    }

    // Not the spool's: flushing a compressor costs bytes, and finishing it flushes anyway.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives what is in the frames that arrive, after the spool has taken them.
struct Unpacked<'a, 'b, R: Read> {
    incoming: &'a mut Incoming<'b>,
    frames: Frames<'a, R>,
    frame: Vec<u8>,
    content: Vec<u8>,
    /// How much of the content was given.
    at: usize,
    ended: bool,
    /// What a reader could not be told.
    trouble: Option<Trouble>,
}

impl<R: Read> Unpacked<'_, '_, R> {
    /// The next frame's content. False at the end, which a builder may reach too early: then the size will tell.
    fn next(&mut self) -> Result<bool, Trouble> {
        if self.ended || !self.frames.next(&mut self.frame).map_err(Trouble::Builder)? {
            self.ended = true;
            return Ok(false);
        }
        let left = self.incoming.limit - self.incoming.spool.size();
        if left == 0 {
            return Err(Trouble::TooLong);
        }
        self.incoming.spool.frame(&self.frame, left, &mut self.content).map_err(Trouble::Spool)?;
        self.at = 0;
        self.incoming.tell();
        Ok(true)
    }
}

impl<R: Read> Read for Unpacked<'_, '_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.content.len() && !buffer.is_empty() {
            self.content.clear();
            self.at = 0;
            if let Err(trouble) = self.next() {
                self.trouble = Some(trouble);
                return Err(io::ErrorKind::Other.into());
            }
        }
        let count = buffer.len().min(self.content.len() - self.at);
        buffer[..count].copy_from_slice(&self.content[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// Whether an archive that came in parts is one: only what comes whole is looked at as it comes.
fn check_form(name: &OutputName, path: &StorePath, nar: &SpooledNar) -> Result<(), Failure> {
    let bytes = nar.open_nar().map_err(Failure::cache(&format!("reading output {name} back")))?;
    match nar::Reader::new(io::BufReader::new(bytes)).skip_all() {
        Ok(size) if size == nar.nar_size => Ok(()),
        Ok(_) => {
            let message = format!("output {name} ({path}) has more in it than an archive");
            Err(Failure::verdict(Reason::OutputRejected, message))
        }
        Err(drover_nix::Error::NarIo { source, .. }) => {
            Err(Failure::infrastructure(format!("reading output {name} back: {source}"), source))
        }
        Err(error) => {
            Err(Failure::verdict(Reason::OutputRejected, format!("output {name} ({path}): {error}")))
        }
    }
}

fn no_archive(name: &OutputName, path: &StorePath, error: &drover_nix::Error) -> Failure {
    Failure::verdict(Reason::OutputRejected, format!("output {name} ({path}): {error}"))
}
