//! Sending what the builder lacks: streams from caches, several opened ahead, verified as they pass. What a cache gives
//! wrong is asked of another one: at once, as long as nothing of it has gone to the builder, else by the next session.

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
/// How much of a NAR is read before any of it is sent. One that has no more has been verified to its end by then.
const HEAD: u64 = 256 << 10;
/// Progress is told about every so many bytes.
pub(crate) const PROGRESS: u64 = 4 << 20;

/// Sends `paths`, in order, and waits until the builder has confirmed them. Returns how many bytes of NARs it were.
pub(crate) fn send<R: Read, W: Write>(
    caches: &[Arc<dyn Cache>],
    paths: &[(usize, &NarInfo)],
    client: &mut Client<R, W>,
    observer: &mut dyn Observer,
) -> Result<u64, Failure> {
    thread::scope(|scope| {
        let (opened, ready) = sync_channel(AHEAD);
        let open = move || open_ahead(caches, paths, &opened);
        thread::Builder::new().spawn_scoped(scope, open).map_err(|error| {
            Failure::infrastructure(format!("starting a thread to copy inputs: {error}"), error)
        })?;
        // Moved in, so that leaving early closes the channel, which ends the thread.
        send_ready(caches, paths, ready, client, observer)
    })
}

/// What came of asking the caches for one NAR.
struct Opened {
    /// None if no cache gives it.
    nar: Option<Begun>,
    /// Those that were asked and did not give it as they should.
    troubles: Vec<Trouble>,
}

/// A NAR whose first bytes have come, and were right as far as can be told.
struct Begun {
    cache: usize,
    nar: Box<dyn Read + Send>,
}

/// How a cache failed to give what it has.
struct Trouble {
    cache: usize,
    source: drover_cache::Error,
    /// What came is not what was announced. Otherwise it did not come.
    wrong: bool,
}

fn open_ahead(caches: &[Arc<dyn Cache>], paths: &[(usize, &NarInfo)], opened: &SyncSender<Opened>) {
    for (cache, narinfo) in paths {
        if opened.send(open(caches, *cache, narinfo)).is_err() {
            return;
        }
    }
}

/// Begins to read a NAR from the cache that has it or, if that fails, from another one that has the same.
fn open(caches: &[Arc<dyn Cache>], first: usize, narinfo: &NarInfo) -> Opened {
    let mut troubles = Vec::new();
    let others = (0..caches.len()).filter(|index| *index != first);
    for cache in std::iter::once(first).chain(others) {
        let other;
        let at = if cache == first {
            narinfo
        } else {
            let Ok(Some(found)) = caches[cache].narinfo(&narinfo.info.path) else { continue };
            other = found;
            let same = |info: &NarInfo| {
                (info.info.nar_hash, info.info.nar_size) == (narinfo.info.nar_hash, narinfo.info.nar_size)
            };
            if !same(&other) {
                continue;
            }
            &other
        };
        match begin(&*caches[cache], at) {
            Ok(nar) => return Opened { nar: Some(Begun { cache, nar }), troubles },
            Err((source, wrong)) => troubles.push(Trouble { cache, source, wrong }),
        }
    }
    Opened { nar: None, troubles }
}

fn begin(cache: &dyn Cache, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, (drover_cache::Error, bool)> {
    let nar = cache.nar(narinfo).map_err(|error| (error, false))?;
    let mut nar = VerifiedNar::new(nar, &narinfo.info);
    // Grows as the bytes come, so that a claim alone takes no memory.
    let mut head = Vec::new();
    match nar.by_ref().take(HEAD).read_to_end(&mut head) {
        Ok(_) => Ok(Box::new(io::Cursor::new(head).chain(nar))),
        Err(source) => Err(trouble_of(cache, &narinfo.info.path, source)),
    }
}

/// What an error of a NAR's stream says of its cache.
fn trouble_of(cache: &dyn Cache, path: &StorePath, source: io::Error) -> (drover_cache::Error, bool) {
    let wrong = source.kind() == ErrorKind::InvalidData;
    let (url, path) = (cache.url(), path.clone());
    let error = match wrong {
        true => drover_cache::Error::Content { url, path, why: source.to_string() },
        false => drover_cache::Error::Read { url, source },
    };
    (error, wrong)
}

fn send_ready<R: Read, W: Write>(
    caches: &[Arc<dyn Cache>],
    paths: &[(usize, &NarInfo)],
    ready: Receiver<Opened>,
    client: &mut Client<R, W>,
    observer: &mut dyn Observer,
) -> Result<u64, Failure> {
    let mut bytes = 0;
    for ((_, narinfo), Opened { nar, mut troubles }) in paths.iter().zip(ready) {
        let info = &narinfo.info;
        let Some(Begun { cache, nar }) = nar else {
            return Err(not_given(caches, &info.path, troubles, observer));
        };
        for Trouble { cache, source, .. } in troubles.drain(..) {
            set_aside(&*caches[cache], &info.path, &source, observer);
        }
        observer.event(Event::CopyStarted { path: info.path.clone(), nar_size: info.nar_size });
        let mut nar = Progress { inner: nar, observer, path: &info.path, bytes: 0, told: 0 };
        match client.send_nar(info, &mut nar) {
            Ok(()) => {}
            // The builder waits for the rest, and nothing can be said in its place: this session is over.
            Err(drover_serve::Error::NarSource { source, .. }) => {
                let (source, wrong) = trouble_of(&*caches[cache], &info.path, source);
                return Err(not_given(caches, &info.path, vec![Trouble { cache, source, wrong }], observer));
            }
            Err(error) => {
                return Err(Failure::builder(&format!("sending {} to the builder", info.path))(error));
            }
        }
        observer.event(Event::Copied { path: info.path.clone(), nar_size: info.nar_size });
        bytes += info.nar_size;
    }
    client.finish_nars().map_err(Failure::builder("waiting for the builder to take the inputs"))?;
    Ok(bytes)
}

/// Whoever has the path as well is asked by another session: then it is the machinery's failure. Else it is a verdict on
/// the caches, unless one of them may give it another time.
fn not_given(
    caches: &[Arc<dyn Cache>],
    path: &StorePath,
    troubles: Vec<Trouble>,
    observer: &mut dyn Observer,
) -> Failure {
    let failed: Vec<usize> = troubles.iter().map(|trouble| trouble.cache).collect();
    let other = caches
        .iter()
        .enumerate()
        .find(|(index, cache)| !failed.contains(index) && matches!(cache.narinfo(path), Ok(Some(_))));
    let wrong = troubles.iter().any(|trouble| trouble.wrong);
    let mut said = Vec::new();
    for Trouble { cache, source, wrong } in &troubles {
        // What may come another time, and can be had from nobody else, is not refused to those who try again.
        if *wrong || other.is_some() {
            set_aside(&*caches[*cache], path, source, observer);
        }
        let url = caches[*cache].url();
        said.push(match source {
            drover_cache::Error::Content { why, .. } => format!("{url} delivered {path} wrong: {why}"),
            source => format!("fetching {path} from {url}: {source}"),
        });
    }
    let source = troubles.into_iter().next().map(|trouble| trouble.source.into());
    let mut message = said.join("; ");
    match other {
        Some((_, other)) => {
            message.push_str(&format!("; {} has it too, and is asked next", other.url()));
            Failure { reason: Reason::InputHashMismatch, message, infrastructure: true, source }
        }
        None if wrong => Failure { source, ..Failure::verdict(Reason::InputHashMismatch, message) },
        None => Failure { reason: Reason::InfrastructureFailure, message, infrastructure: true, source },
    }
}

fn set_aside(cache: &dyn Cache, path: &StorePath, source: &drover_cache::Error, observer: &mut dyn Observer) {
    let why = match source {
        drover_cache::Error::Content { why, .. } => why.clone(),
        source => source.to_string(),
    };
    cache.set_aside(path, &why);
    observer.event(Event::CacheSetAside { cache: cache.url(), path: path.clone(), why });
}

/// Tells how far a NAR is.
struct Progress<'a> {
    inner: Box<dyn Read + Send>,
    observer: &'a mut dyn Observer,
    path: &'a StorePath,
    bytes: u64,
    told: u64,
}

impl Read for Progress<'_> {
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
