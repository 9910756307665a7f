use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use drover_serve::Client;

use crate::closure::{Closure, look_up_one};
use crate::{
    Event, Failure, Job, Observer, Outcome, Output, Tally, Timings, Transfer, collect, copy, fetch, verdict,
    verify,
};

/// Runs one build over one connection to one builder. The builder's stderr, which carries the log, is the caller's to
/// read, all the time. To cancel, close the connection.
pub fn run<R: Read, W: Write>(
    reader: R,
    writer: W,
    job: &Job,
    observer: &mut dyn Observer,
) -> Result<Outcome, Failure> {
    run_counting(reader, writer, job, observer, &mut Tally::default())
}

/// [`run`], with an account of what was done that is there after a failure too.
pub fn run_counting<R: Read, W: Write>(
    reader: R,
    writer: W,
    job: &Job,
    observer: &mut dyn Observer,
    tally: &mut Tally,
) -> Result<Outcome, Failure> {
    let known = job.outputs()?;
    let Tally { timings, transfer } = tally;
    let mut clock = Clock(Instant::now());

    let mut client =
        Client::connect(reader, writer, job.dir.clone()).map_err(Failure::builder("greeting the builder"))?;
    observer.event(Event::Connected { version: client.version() });
    timings.connect = clock.lap();

    let closure = Closure::find(job, &mut client)?;
    let paths = closure.paths();
    transfer.paths_total = paths.len();
    observer.event(Event::ClosureComputed { paths: paths.len() });
    timings.closure = clock.lap();

    // Everything is locked before anything is copied, in one request: what is there now stays there.
    let valid = client
        .query_valid_paths(&paths, true, false)
        .map_err(Failure::builder("locking the inputs on the builder"))?;
    let mut missing = closure.to_send(&valid)?;
    transfer.paths_present = valid.len();
    observer.event(Event::Locked {
        valid: valid.len(),
        missing: missing.len(),
        missing_bytes: missing.iter().map(|(_, narinfo)| narinfo.info.nar_size).sum(),
    });
    let fetched = fetch::fetch(&missing, &mut client, observer)?;
    missing.retain(|(_, narinfo)| !fetched.paths.contains(&narinfo.info.path));
    transfer.paths_fetched = fetched.paths.len();
    transfer.bytes_fetched = fetched.bytes;
    timings.lock = clock.lap();

    transfer.bytes_sent = copy::send(&job.caches, &missing, &mut client, observer)?;
    transfer.paths_sent = missing.len();
    observer.event(Event::InputsCopied { paths: missing.len(), bytes: transfer.bytes_sent });
    timings.copy_in = clock.lap();
    // A build may take days, and what caches said of a large system is many megabytes.
    drop(missing);
    drop(closure);

    observer.event(Event::BuildStarted);
    let result = client
        .build_derivation(&job.drv_path, &job.derivation, &job.options)
        .map_err(Failure::builder("building"))?;
    observer.event(Event::Built { result: result.clone() });
    timings.build = clock.lap();
    if let Some(failure) = verdict::failure(&job.derivation, &result) {
        return Err(failure);
    }

    let located = verify::locate(&job.dir, known, &result)?;
    let collected = collect::collect(job, &located, paths, &mut client, observer)?;
    transfer.bytes_received = collected.iter().map(|output| output.info.nar_size).sum();
    observer.event(Event::OutputsVerified { outputs: collected.len(), bytes: transfer.bytes_received });
    timings.copy_out = clock.lap();
    // The session's locks are needed no longer.
    drop(client);

    let (outputs, bytes_stored) = collect::store(job, collected, observer)?;
    transfer.bytes_stored = bytes_stored;
    timings.store = clock.lap();
    observer.event(Event::OutputsCollected);
    Ok(Outcome { outputs, built: Some(result), transfer: *transfer, timings: *timings })
}

/// The outcome of a job whose outputs all lie in one of its caches already, the one that it pushes to first: no builder
/// is needed. None if any of them does not, or if a path is not known before the build.
pub fn all_outputs_in_cache(job: &Job) -> Result<Option<Outcome>, Failure> {
    let Some(known) = job.known_outputs()? else {
        return Ok(None);
    };
    let caches: Vec<_> = job.push.iter().chain(&job.caches).cloned().collect();
    let mut outputs = BTreeMap::new();
    for (name, path) in known {
        let found = match look_up_one(&caches, &path) {
            // There, but nobody vouches for it, or not as it should be: as good as absent.
            Err(drover_cache::Error::Untrusted { .. } | drover_cache::Error::SetAside { .. }) => None,
            found => {
                let act = format!("looking for output {name} ({path}) in the caches");
                found.map_err(Failure::cache(&act))?
            }
        };
        let Some((_, narinfo)) = found else {
            return Ok(None);
        };
        outputs.insert(name, Output::from(&narinfo));
    }
    let (transfer, timings) = (Transfer::default(), Timings::default());
    Ok(Some(Outcome { outputs, built: None, transfer, timings }))
}

struct Clock(Instant);

impl Clock {
    /// Time since the last call.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}
