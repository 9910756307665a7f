//! `drover build`: the whole pipeline on one machine, with the builder as a child process over a pipe.
//!
//! The session is the operator's own (`drover_session`); what is here is what a cluster would do around it: find the
//! parts, keep the order, show what happens, and write the status.

mod child;
mod console;
mod progress;
mod setup;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use drover_api::{BuildRequest, BuilderStatus, Reason};
use drover_cache::Cache;
use drover_nix::{StoreDir, StorePath};
use drover_serve::BuildOptions;
use drover_session::{Job, Outcome, Trust};
use k8s_openapi::jiff::Timestamp;

use crate::args;
use crate::build::child::Child;
use crate::build::console::Console;
use crate::build::setup::Setup;
use crate::exit::{self, Fault};
use crate::order::{Item, Named, Queue};
use crate::output;
use crate::resolve::Resolved;

pub(crate) use setup::{open_caches, own_cache};

/// How often a build is begun because a cache gave an input wrong that another has.
const MAX_SESSIONS: u32 = 20;

/// What became of one request.
enum End {
    Done(Box<Outcome>),
    Failed(Failed),
}

/// A failure with what goes into the status.
struct Failed {
    reason: Reason,
    message: String,
    log_tail: Vec<String>,
}

pub(crate) fn run(args: &args::Build) -> exit::Outcome {
    let dir = StoreDir::default();
    let caches = || {
        let mut urls = args.caches.clone();
        urls.push(own_cache().map_err(Fault::Input)?);
        open_caches(&urls, &args.public_keys, args.netrc_file.as_deref(), &dir)
    };
    let mut queue = Queue::load(&args.files, &dir, Named::Read(&caches))?;
    let setup = Setup::new(args, dir)?;
    let console = Console::new(!args.no_progress);
    let wanted = wanted(&mut queue, &setup)?;

    let mut requests: Vec<BuildRequest> = Vec::with_capacity(wanted.len());
    let mut verdicts: BTreeMap<usize, Option<Reason>> = BTreeMap::new();
    for index in wanted {
        let start = Timestamp::now();
        let broken =
            queue.items[index].needs.iter().find(|need| verdicts.get(need).is_some_and(Option::is_some));
        let (end, sandbox) = match broken {
            Some(need) => (
                End::Failed(Failed {
                    reason: Reason::InputMissing,
                    message: format!("{}, which makes an input, was not built", queue.items[*need].name()),
                    log_tail: vec![],
                }),
                None,
            ),
            None => {
                let resolved = queue.resolve(index).map_err(Fault::Input)?.clone();
                build(&queue.items[index], &resolved, &setup, &console)?
            }
        };
        console.line(&summary(&queue.items[index], &end));
        let verdict = match &end {
            End::Done(outcome) => {
                queue.record(index, outcome.outputs.iter().map(|(name, output)| (name, &output.path)));
                None
            }
            End::Failed(failed) => Some(failed.reason),
        };
        verdicts.insert(index, verdict);
        let mut request = status::with_status(&queue.items[index], &end, &setup.dir, start, Timestamp::now());
        if let (Some(status), Some(_)) = (&mut request.status, &sandbox) {
            status.builder = Some(BuilderStatus { sandbox, ..Default::default() });
        }
        requests.push(request);
    }
    output::print(&requests, args.output)?;
    Ok(match verdicts.into_values().flatten().max_by_key(|reason| reason.is_infrastructure()) {
        None => exit::DONE,
        Some(reason) if reason.is_infrastructure() => exit::INFRASTRUCTURE,
        Some(_) => exit::BUILD_FAILED,
    })
}

/// What was asked for, and of what is below it as much as is not in the caches, in order.
fn wanted(queue: &mut Queue, setup: &Setup) -> Result<BTreeSet<usize>, Fault> {
    let mut wanted = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut open: Vec<usize> = (0..queue.items.len()).filter(|index| queue.items[*index].is_top).collect();
    while let Some(index) = open.pop() {
        if !seen.insert(index) {
            continue;
        }
        let is_there = match queue.outputs(index).map_err(Fault::Input)? {
            Some(outputs) => outputs.values().all(|path| setup.has(path)),
            None => false,
        };
        if queue.items[index].is_top || !is_there {
            wanted.insert(index);
        }
        if !is_there {
            open.extend(&queue.items[index].needs);
        }
    }
    Ok(wanted)
}

/// Builds one request; says also which sandbox it had. Fails only where not even the builder could be started.
fn build(
    item: &Item,
    resolved: &Resolved,
    setup: &Setup,
    console: &Console,
) -> Result<(End, Option<String>), Fault> {
    let job = job(item, resolved, setup);
    match drover_session::all_outputs_in_cache(&job) {
        Ok(Some(outcome)) => return Ok((End::Done(Box::new(outcome)), None)),
        Ok(None) => {}
        Err(failure) => return Ok((End::Failed(failed(failure, vec![])), None)),
    }
    let mut sessions = 0;
    let (result, end) = loop {
        let mut child = Child::start(&setup.builder, &setup.store, setup.spool.path(), console.clone())
            .map_err(Fault::Infrastructure)?;
        let (reader, writer) = child.pipes();
        let mut observer = progress::Progress::new(item.name(), console.clone());
        let result = drover_session::run(reader, writer, &job, &mut observer);
        observer.end();
        let end = child.finish().map_err(Fault::Infrastructure)?;
        sessions += 1;
        // A cache is set aside by now, and another has what it gave wrong. What was copied is in the store.
        let again = |failure: &drover_session::Failure| {
            failure.reason == drover_session::Reason::InputHashMismatch && failure.infrastructure
        };
        if sessions == MAX_SESSIONS || !result.as_ref().is_err_and(again) {
            break (result, end);
        }
    };
    // The log is worth keeping even if the build failed, and no reason to fail if it cannot be kept.
    if let Err(error) = keep_log(&*setup.push, &resolved.drv_path, &end.log_file) {
        console.line(&format!("warning: {error:#}"));
    }
    let ended = match result {
        Ok(outcome) => End::Done(Box::new(outcome)),
        Err(failure) => {
            let mut failed = failed(failure.with_last_words(&end.tail), end.tail);
            // Nothing of the builder's own ends it so.
            let killed = end.trouble.is_some_and(|status| status.signal().is_some());
            if failed.reason == Reason::ConnectionLost && killed {
                failed.reason = Reason::BuilderLost;
            }
            if let (true, Some(code)) = (failed.reason.is_infrastructure(), end.trouble) {
                failed.message = format!("{} (the builder ended with {code})", failed.message);
            }
            End::Failed(failed)
        }
    };
    Ok((ended, end.sandbox))
}

fn job(item: &Item, resolved: &Resolved, setup: &Setup) -> Job {
    let spec = &item.manifest.request.spec;
    let limits = &setup.limits;
    Job {
        dir: setup.dir.clone(),
        drv_path: resolved.drv_path.clone(),
        derivation: resolved.derivation.clone(),
        options: BuildOptions {
            max_silent_seconds: spec.max_silent_seconds.or(limits.max_silent_time).unwrap_or(0).into(),
            timeout_seconds: spec.timeout_seconds.or(limits.timeout).unwrap_or(0).into(),
            max_log_bytes: spec.max_log_bytes.or(limits.max_log_bytes).unwrap_or(0),
            keep_failed: limits.keep_failed,
            ..BuildOptions::default()
        },
        caches: setup.caches.clone(),
        push: Some(Arc::clone(&setup.push)),
        signing_key: setup.signing_key.clone(),
        // The store and the cache are the caller's own, and so is the request.
        trust: Trust::Claimed,
        proven: Arc::default(),
        max_output_bytes: spec.max_output_bytes,
        spool_dir: setup.spool.path().to_path_buf(),
        kept: Arc::default(),
    }
}

fn failed(failure: drover_session::Failure, log_tail: Vec<String>) -> Failed {
    // A word that the API does not know would be a mistake of ours, not of the build's.
    let reason = Reason::parse(failure.reason.as_str()).unwrap_or(Reason::InfrastructureFailure);
    Failed { reason, message: headline(&failure.message), log_tail }
}

/// A builder's message without the log's last lines, which Nix puts below it and the status has apart.
fn headline(message: &str) -> String {
    let lines =
        message.lines().take_while(|line| !(line.starts_with("last ") && line.ends_with("log lines:")));
    lines.collect::<Vec<_>>().join("\n").trim_end_matches([';', '\n']).to_owned()
}

fn keep_log(cache: &dyn Cache, drv_path: &StorePath, log_file: &Path) -> anyhow::Result<()> {
    let keep = || -> anyhow::Result<()> {
        let mut log = io::BufReader::new(File::open(log_file)?);
        Ok(cache.put_log(drv_path, &mut log)?)
    };
    keep().with_context(|| format!("cannot keep the log in {}", cache.url()))
}

fn summary(item: &Item, end: &End) -> String {
    match end {
        End::Done(outcome) => {
            let paths: Vec<String> = outcome.outputs.values().map(|output| output.path.to_string()).collect();
            let what = if outcome.built.is_some() { "built" } else { "already in the cache:" };
            format!("{}: {what} {}", item.name(), paths.join(" "))
        }
        End::Failed(failed) => format!("{}: {}: {}", item.name(), failed.reason, failed.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headlines_have_no_log() {
        assert_eq!(headline("it failed;\nlast 2 log lines:\n> a\n> b"), "it failed");
        assert_eq!(headline("two\nlines"), "two\nlines");
    }
}
