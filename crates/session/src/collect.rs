//! Receiving outputs: hashed, scanned, compared, and only then stored.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};

use drover_cache::{SpooledNar, Stored};
use drover_nix::order::references_first;
use drover_nix::{OutputName, PathInfo, StorePath};
use drover_serve::Client;

use crate::verify::{self, Received};
use crate::{Event, Failure, Job, Observer, Output, Reason, content, receive};

/// Outputs from this size on come compressed if the builder knows how to, and go to the cache as they came: compressing
/// takes ten times as long as all else that is done with them here. For smaller ones it is not worth the question.
const FRAMES_FROM: u64 = 256 << 10;

/// An output that is what it must be, not stored yet.
pub(crate) struct Collected {
    pub name: OutputName,
    pub info: PathInfo,
    pub nar: SpooledNar,
}

/// Receives and checks `outputs`. `closure` is what they may refer to beside each other. References come first.
pub(crate) fn collect<R: Read, W: Write>(
    job: &Job,
    outputs: &BTreeMap<OutputName, StorePath>,
    closure: BTreeSet<StorePath>,
    client: &mut Client<R, W>,
    observer: &mut dyn Observer,
) -> Result<Vec<Collected>, Failure> {
    let paths: BTreeSet<StorePath> = outputs.values().cloned().collect();
    let infos =
        client.query_path_infos(&paths).map_err(Failure::builder("asking the builder about the outputs"))?;
    let mut candidates = closure;
    candidates.extend(paths);
    verify::claims(outputs, &infos, &candidates, job.max_output_bytes)?;
    let frames = job.push.is_some()
        && infos.values().any(|info| info.nar_size >= FRAMES_FROM)
        && client.knows_frames().map_err(Failure::builder("asking what the builder can do"))?;
    let mut collected = Vec::new();
    for (name, path) in in_order(outputs, &infos)? {
        let info = &infos[path];
        let frames = frames && info.nar_size >= FRAMES_FROM;
        match collect_one(job, name, info, &candidates, frames, client, observer) {
            Ok(output) => collected.push(output),
            Err(failure) => {
                keep(job, collected, &failure);
                return Err(failure);
            }
        }
    }
    Ok(collected)
}

/// Signs and stores them. What was stored before a failure stays: it is complete and correct.
pub(crate) fn store(
    job: &Job,
    collected: Vec<Collected>,
    observer: &mut dyn Observer,
) -> Result<(BTreeMap<OutputName, Output>, u64), Failure> {
    let stored = store_all(job, &collected, observer);
    if let Err(failure) = &stored {
        keep(job, collected, failure);
    }
    stored
}

/// For another session, if there may be one.
fn keep(job: &Job, collected: Vec<Collected>, failure: &Failure) {
    if failure.infrastructure {
        job.kept.put(collected);
    }
}

fn store_all(
    job: &Job,
    collected: &[Collected],
    observer: &mut dyn Observer,
) -> Result<(BTreeMap<OutputName, Output>, u64), Failure> {
    let mut outputs = BTreeMap::new();
    let mut bytes = 0;
    for Collected { name, info, nar } in collected {
        let (name, mut info) = (name.clone(), info.clone());
        if let Some(key) = &job.signing_key {
            info.signatures.push(key.sign(info.fingerprint(&job.dir).as_bytes()));
        }
        if let Some(cache) = &job.push {
            let act = || format!("storing output {name} ({}) in {}", info.path, cache.url());
            match cache.put(&info, nar).map_err(|error| Failure::cache(&act())(error))? {
                Stored::New => bytes += nar.file_size,
                // Where the path follows from content, there is only one: what is there was not proven.
                Stored::Already(there) if info.ca.is_some() && there.info.nar_hash != info.nar_hash => {
                    let why = format!(
                        "the cache has other content at this path, with the hash {}, which cannot be right: delete it",
                        there.info.nar_hash
                    );
                    return Err(Failure::infrastructure(format!("{}: {why}", act()), why));
                }
                // Somebody else's build of it came first. What the cache has is what counts, also where that
                // build gave other bytes.
                Stored::Already(there) if there.info.nar_hash != info.nar_hash => info = there.info,
                Stored::Already(_) => {}
            }
            let (name, path) = (name.clone(), info.path.clone());
            observer.event(Event::OutputStored { name, path, cache: cache.url() });
        }
        outputs.insert(name, Output::from(&info));
    }
    Ok((outputs, bytes))
}

fn in_order<'a>(
    outputs: &'a BTreeMap<OutputName, StorePath>,
    infos: &BTreeMap<StorePath, PathInfo>,
) -> Result<Vec<(&'a OutputName, &'a StorePath)>, Failure> {
    // Each of them is there: claims() saw to that.
    let paths: BTreeSet<&StorePath> = outputs.values().collect();
    let below = |path| infos[path].references.iter().filter_map(|one| paths.get(one).copied());
    let order = references_first(paths.iter().copied(), below).map_err(|(path, _)| {
        let message = format!("the outputs refer to each other in a circle, through {path}");
        Failure::verdict(Reason::OutputRejected, message)
    })?;
    let position = |path: &StorePath| order.iter().position(|item| *item == path);
    let mut outputs: Vec<_> = outputs.iter().collect();
    outputs.sort_by_key(|(_, path)| position(path));
    Ok(outputs)
}

fn collect_one<R: Read, W: Write>(
    job: &Job,
    name: &OutputName,
    claimed: &PathInfo,
    candidates: &BTreeSet<StorePath>,
    frames: bool,
    client: &mut Client<R, W>,
    observer: &mut dyn Observer,
) -> Result<Collected, Failure> {
    let (path, nar_size) = (&claimed.path, claimed.nar_size);
    observer.event(Event::OutputStarted { name: name.clone(), path: path.clone(), nar_size });
    if let Some(kept) = job.kept.take(name, claimed) {
        observer.event(Event::OutputKept { name: name.clone(), bytes: nar_size });
        return Ok(kept);
    }
    let nar = receive::receive(job, name, claimed, candidates, frames, client, observer)?;
    let discarded = BTreeSet::new();
    let references =
        if verify::discards_references(&job.derivation, name) { &discarded } else { &nar.references };
    let received = Received { nar_hash: nar.nar_hash, nar_size: nar.nar_size, references };
    verify::received(name, claimed, &received)?;
    let ca = address(job, name, path, &nar, references)?;
    observer.event(Event::OutputReceived {
        name: name.clone(),
        path: path.clone(),
        nar_hash: nar.nar_hash,
        nar_size: nar.nar_size,
    });
    let info = PathInfo {
        path: path.clone(),
        nar_hash: nar.nar_hash,
        nar_size: nar.nar_size,
        references: references.clone(),
        deriver: Some(job.drv_path.clone()),
        // The builder's signatures are left out: nobody has reason to trust a builder's key.
        signatures: Vec::new(),
        ca,
    };
    Ok(Collected { name: name.clone(), info, nar })
}

fn address(
    job: &Job,
    name: &OutputName,
    path: &StorePath,
    nar: &SpooledNar,
    references: &BTreeSet<StorePath>,
) -> Result<Option<drover_nix::ContentAddress>, Failure> {
    let Some((method, algo)) = job.derivation.outputs.get(name).and_then(verify::content_method) else {
        return Ok(None);
    };
    let bytes = nar.open_nar().map_err(Failure::cache(&format!("reading output {name} back")))?;
    let hashes = content::hashes(method, algo, bytes, path).map_err(|error| match error {
        content::Error::Io(source) => Failure::infrastructure(format!("reading output {name} back"), source),
        error => Failure::verdict(Reason::OutputRejected, format!("output {name} ({path}): {error}")),
    })?;
    verify::content_address(job, name, path, references, &hashes)
}
