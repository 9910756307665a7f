//! Sending what the builder lacks: streams from caches, several under way at once, verified as they pass.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use drover_cache::{Cache, VerifiedNar};
use drover_nix::{NarInfo, StorePath};
use drover_serve::Client;

use crate::{Event, Failure, Observer, Reason};

/// NARs that are opened ahead of being sent, so that a cache's latency is not paid for each.
const AHEAD: usize = 4;
/// Progress is told about every so many bytes.
pub(crate) const PROGRESS: u64 = 4 << 20;

/// A NAR, and the index of the cache that it comes from.
type Opened = Result<(usize, Box<dyn Read + Send>), drover_cache::Error>;

/// Sends `paths`, in order, and waits until the builder has confirmed them. Returns how many bytes of NARs it were.
pub(crate) fn send<R: Read, W: Write>(
    caches: &[Arc<dyn Cache>],
    paths: &[(usize, &NarInfo)],
    client: &mut Client<R, W>,
    observer: &mut dyn Observer,
) -> Result<u64, Failure> {
    thread::scope(|scope| {
        let (opened, ready) = sync_channel(AHEAD);
        scope.spawn(move || open_ahead(caches, paths, &opened));
        // Moved in, so that leaving early closes the channel, which ends the thread.
        send_ready(caches, paths, ready, client, observer)
    })
}

fn open_ahead(caches: &[Arc<dyn Cache>], paths: &[(usize, &NarInfo)], opened: &SyncSender<Opened>) {
    for (cache, narinfo) in paths {
        if opened.send(open(caches, *cache, narinfo)).is_err() {
            return;
        }
    }
}

/// Opens a NAR in the cache that has it or, if that fails, in another one that has the same.
fn open(caches: &[Arc<dyn Cache>], first: usize, narinfo: &NarInfo) -> Opened {
    let error = match caches[first].nar(narinfo) {
        Ok(nar) => return Ok((first, nar)),
        Err(error) => error,
    };
    let others = caches.iter().enumerate().filter(|(index, _)| *index != first);
    let mut opened = others.filter_map(|(index, cache)| {
        let other = cache.narinfo(&narinfo.info.path).ok()??;
        let same =
            other.info.nar_hash == narinfo.info.nar_hash && other.info.nar_size == narinfo.info.nar_size;
        Some((index, cache.nar(&other).ok().filter(|_| same)?))
    });
    opened.next().ok_or(error)
}

fn send_ready<R: Read, W: Write>(
    caches: &[Arc<dyn Cache>],
    paths: &[(usize, &NarInfo)],
    ready: Receiver<Opened>,
    client: &mut Client<R, W>,
    observer: &mut dyn Observer,
) -> Result<u64, Failure> {
    let mut bytes = 0;
    for ((cache, narinfo), opened) in paths.iter().zip(ready) {
        let info = &narinfo.info;
        let (cache, nar) = opened.map_err(|error| {
            Failure::cache(&format!("fetching {} from {}", info.path, caches[*cache].url()))(error)
        })?;
        observer.event(Event::CopyStarted { path: info.path.clone(), nar_size: info.nar_size });
        let mut nar =
            Progress { inner: VerifiedNar::new(nar, info), observer, path: &info.path, bytes: 0, told: 0 };
        client.send_nar(info, &mut nar).map_err(|error| failed(error, &info.path, &caches[cache].url()))?;
        observer.event(Event::Copied { path: info.path.clone(), nar_size: info.nar_size });
        bytes += info.nar_size;
    }
    client.finish_nars().map_err(Failure::builder("waiting for the builder to take the inputs"))?;
    Ok(bytes)
}

fn failed(error: drover_serve::Error, path: &StorePath, url: &str) -> Failure {
    match error {
        drover_serve::Error::NarSource { source, .. } if source.kind() == ErrorKind::InvalidData => {
            let message = format!("{url} delivered {path} wrong: {source}");
            Failure { source: Some(source.into()), ..Failure::verdict(Reason::InputHashMismatch, message) }
        }
        drover_serve::Error::NarSource { source, .. } => {
            Failure::infrastructure(format!("fetching {path} from {url}: {source}"), source)
        }
        error => Failure::builder(&format!("sending {path} to the builder"))(error),
    }
}

/// Tells how far a NAR is.
struct Progress<'a, R> {
    inner: R,
    observer: &'a mut dyn Observer,
    path: &'a StorePath,
    bytes: u64,
    told: u64,
}

impl<R: Read> Read for Progress<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes += count as u64;
        if self.bytes - self.told >= PROGRESS {
            self.told = self.bytes;
            self.observer.event(Event::CopyProgress { path: self.path.clone(), bytes: self.bytes });
        }
        Ok(count)
    }
}
