//! The status that a local build leads to: what the operator would have written. Pure.

use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{
    Attempt, BuildRequest, BuildRequestStatus, FailureStatus, OutputStatus, Phase, Reason, Timings, Transfer,
    format_duration,
};
use drover_nix::StoreDir;
use drover_session::Outcome;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::{End, Failed};
use crate::order::Item;

/// The request with its status.
pub(super) fn with_status(
    item: &Item,
    end: &End,
    dir: &StoreDir,
    start: Timestamp,
    stop: Timestamp,
) -> BuildRequest {
    let mut request = item.manifest.request.clone();
    let mut status = match end {
        End::Done(outcome) => done(outcome, dir, stop),
        End::Failed(failed) => failure(failed, start, stop),
    };
    status.drv_path = item.ready.as_ref().map(|resolved| dir.full(&resolved.drv_path));
    status.start_time = Some(Time(start));
    status.completion_time = Some(Time(stop));
    let duration = Duration::try_from(stop.duration_since(start)).unwrap_or_default();
    status.duration = Some(format_duration(duration));
    if let Some(attempt) = status.attempts.first_mut() {
        attempt.start_time = Some(Time(start));
        attempt.end_time = Some(Time(stop));
        status.attempt = Some(attempt.number);
    }
    request.status = Some(status);
    request
}

fn done(outcome: &Outcome, dir: &StoreDir, now: Timestamp) -> BuildRequestStatus {
    let mut status = BuildRequestStatus { phase: Some(Phase::Succeeded), ..Default::default() };
    let reason = if outcome.built.is_some() { Reason::Built } else { Reason::AlreadyBuilt };
    let steps: &[(&str, Reason)] = match &outcome.built {
        Some(_) => &[
            (conditions::ACCEPTED, Reason::Accepted),
            (conditions::BUILDER_READY, Reason::BuilderReady),
            (conditions::INPUTS_COPIED, Reason::InputsCopied),
            (conditions::BUILT, Reason::Built),
            (conditions::OUTPUTS_COLLECTED, Reason::OutputsCollected),
        ],
        None => &[(conditions::ACCEPTED, Reason::Accepted)],
    };
    for (type_, reason) in steps {
        conditions::set(&mut status.conditions, type_, Status::True, *reason, "", None, now);
    }
    conditions::set_summary(&mut status.conditions, Some(true), reason, reason.description(), None, now);
    for (name, output) in &outcome.outputs {
        let output = OutputStatus {
            path: dir.full(&output.path),
            nar_hash: output.nar_hash.to_string(),
            nar_size: output.nar_size,
            references: output.references.iter().map(|path| dir.full(path)).collect(),
            references_omitted: None,
            signatures: output.signatures.iter().map(ToString::to_string).collect(),
            ca: output.ca.as_ref().map(ToString::to_string),
        };
        status.outputs.insert(name.to_string(), output);
    }
    if outcome.built.is_some() {
        status.attempts = vec![Attempt { number: 1, reason: Some(reason.to_string()), ..Default::default() }];
        status.timings = Some(timings(outcome));
        status.transfer = Some(transfer(outcome));
    }
    status
}

fn failure(failed: &Failed, start: Timestamp, now: Timestamp) -> BuildRequestStatus {
    let Failed { reason, message, log_tail } = failed;
    let mut status = BuildRequestStatus { phase: Some(Phase::Failed), ..Default::default() };
    if *reason != Reason::InvalidDerivation {
        conditions::set(
            &mut status.conditions,
            conditions::ACCEPTED,
            Status::True,
            Reason::Accepted,
            "",
            None,
            start,
        );
    }
    conditions::set_summary(&mut status.conditions, Some(false), *reason, message, None, now);
    status.attempts = vec![Attempt {
        number: 1,
        reason: Some(reason.to_string()),
        message: Some(message.clone()),
        infrastructure: reason.is_infrastructure(),
        ..Default::default()
    }];
    status.failure = Some(FailureStatus {
        reason: reason.to_string(),
        message: message.clone(),
        log_tail: log_tail.clone(),
    });
    status
}

fn timings(outcome: &Outcome) -> Timings {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).ok();
    let from = &outcome.timings;
    Timings {
        queued_millis: None,
        pod_start_millis: None,
        connect_millis: millis(from.connect),
        copy_in_millis: millis(from.closure + from.lock + from.copy_in),
        build_millis: millis(from.build),
        collect_millis: millis(from.copy_out + from.store),
    }
}

fn transfer(outcome: &Outcome) -> Transfer {
    let from = &outcome.transfer;
    Transfer {
        paths_total: from.paths_total as u64,
        paths_present: from.paths_present as u64,
        paths_fetched: from.paths_fetched as u64,
        bytes_fetched: from.bytes_fetched,
        paths_sent: from.paths_sent as u64,
        bytes_sent: from.bytes_sent,
        bytes_received: from.bytes_received,
        bytes_stored: from.bytes_stored,
    }
}
