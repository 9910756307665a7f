//! What a build result means for the request. Pure.
//!
//! The protocol has fifteen numbers and a message, the API more reasons than that. Where a number is too coarse the
//! message decides. Drover's own builder names what the machine failed a build with ([`Cause`]); of Nix's messages
//! those are known that say as much. Neither is looked for in what the build itself has printed.
//!
//! Too little memory, too little disk and a builder that something else killed are no verdict on the derivation: they are
//! the machinery's failures, each with a reason of its own.

use drover_nix::BasicDerivation;
use drover_nix::derivation::DerivationType;
use drover_serve::{BuildResult, BuildStatus, Cause};

use crate::{Failure, Reason};

/// The line below a failure's message by which Nix says that its disk is nearly full (Nix: derivation-builder.cc).
const NIX_DISK_FULL: &str = "note: build failure may have been caused by lack of free disk space";

/// The failure that `result` reports, None if it reports success.
pub(crate) fn failure(derivation: &BasicDerivation, result: &BuildResult) -> Option<Failure> {
    let text = without_log(&result.error_message).to_ascii_lowercase();
    let says = |phrases: &[&str]| phrases.iter().any(|phrase| text.contains(phrase));
    let (reason, infrastructure) = match (result.status, cause(result)) {
        (status, _) if status.is_success() => return None,
        (_, Some(Cause::OutOfMemory)) => (Reason::OutOfMemory, true),
        (_, Some(Cause::DiskFull)) => (Reason::DiskFull, true),
        (_, Some(Cause::Killed)) => (Reason::BuilderLost, true),
        (BuildStatus::PermanentFailure | BuildStatus::CachedFailure, _) => (Reason::BuildFailed, false),
        // The builder's own look at what the operator has proven.
        (BuildStatus::InputRejected, _) if says(&["output paths are not proven"]) => {
            (Reason::PathNotProven, false)
        }
        (BuildStatus::InputRejected, _) if says(&["system", "platform", "features"]) => {
            (Reason::WrongSystem, false)
        }
        (BuildStatus::InputRejected, _) => (Reason::InvalidDerivation, false),
        (BuildStatus::OutputRejected, _) if says(&["hash mismatch"]) => (Reason::OutputHashMismatch, false),
        (BuildStatus::OutputRejected, _) => (Reason::OutputRejected, false),
        // The builder ran with the network, and failed. A download may work another time, but that is for
        // `retries.build` to say: the machinery did its part.
        (BuildStatus::TransientFailure, _) if has_network(derivation) => (Reason::BuildFailed, false),
        (BuildStatus::TimedOut, _) if says(&["silen", "without output", "no output"]) => {
            (Reason::MaxSilentExceeded, false)
        }
        (BuildStatus::TimedOut, _) => (Reason::TimedOut, false),
        (BuildStatus::LogLimitExceeded, _) => (Reason::LogLimitExceeded, false),
        (BuildStatus::NotDeterministic, _) => (Reason::NotDeterministic, false),
        // Inputs were locked and confirmed before: that one is missing now is the builder's fault.
        _ => (Reason::InfrastructureFailure, true),
    };
    let message = match result.error_message.as_str() {
        "" => format!("the builder reports: {}", result.status.as_str()),
        message => strip_colours(message),
    };
    Some(Failure { reason, message, infrastructure, source: None })
}

/// What the machine failed the build with, in Drover's words or in Nix's.
fn cause(result: &BuildResult) -> Option<Cause> {
    let of_nix = || {
        let message = strip_colours(&result.error_message);
        // Nix puts this line below the log, whose lines all begin with `>`.
        let noted = message.lines().any(|line| line.trim() == NIX_DISK_FULL);
        // The kernel has the same words for a limit on namespaces.
        let head = without_log(&message);
        let refused = head.contains("No space left on device") && !head.contains("namespace");
        let full = match result.status {
            BuildStatus::TransientFailure => noted,
            BuildStatus::MiscFailure => refused,
            _ => false,
        };
        full.then_some(Cause::DiskFull)
    };
    Cause::of(result).or_else(of_nix)
}

fn has_network(derivation: &BasicDerivation) -> bool {
    matches!(derivation.kind(), Ok(DerivationType::CaFixed | DerivationType::Impure))
}

/// The message up to the log lines that it quotes: those are the build's words, not the builder's.
fn without_log(message: &str) -> &str {
    let mut end = 0;
    for line in message.split_inclusive('\n') {
        let start = line.trim_start();
        if start.starts_with('>') || start.to_ascii_lowercase().contains("log lines:") {
            break;
        }
        end += line.len();
    }
    &message[..end]
}

/// Without ANSI escape sequences (`ESC [ … letter`), which Nix puts in its messages.
fn strip_colours(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\u{1b}') {
        plain.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(sequence) = rest.strip_prefix('[') {
            let end = sequence.find(|c: char| ('\u{40}'..='\u{7e}').contains(&c));
            rest = end.map_or("", |end| &sequence[end + 1..]); // a final byte is ASCII, one byte long
        }
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use drover_nix::{ContentAddress, DerivationOutput, Hash, Method, OutputName, Sha256};

    use super::*;

    fn derivation(fixed: bool) -> BasicDerivation {
        let output = match fixed {
            true => DerivationOutput::CaFixed(ContentAddress {
                method: Method::Flat,
                hash: Hash::from(Sha256::of(b"")),
            }),
            false => DerivationOutput::InputAddressed("i00sflxqsj37lfmf95m8mn0grv615hpj-x".parse().unwrap()),
        };
        BasicDerivation {
            name: "x".into(),
            outputs: [(OutputName::out(), output)].into(),
            input_srcs: [].into(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: Vec::new(),
            env: BTreeMap::new(),
        }
    }

    #[test]
    fn every_status_and_the_phrases() {
        use BuildStatus::*;
        for (status, message, reason, infrastructure) in [
            (PermanentFailure, "builder failed with exit code 2", Reason::BuildFailed, false),
            (PermanentFailure, "out of memory: builder failed with exit code 1", Reason::OutOfMemory, true),
            (TransientFailure, "disk full: builder failed with exit code 1", Reason::DiskFull, true),
            (MiscFailure, "disk full: cannot write /nix/x", Reason::DiskFull, true),
            (PermanentFailure, "killed from outside: failed due to signal 9", Reason::BuilderLost, true),
            (MiscFailure, "error: writing to file: No space left on device", Reason::DiskFull, true),
            (MiscFailure, "namespaces: No space left on device", Reason::InfrastructureFailure, true),
            (InputRejected, "required system 'aarch64-linux'", Reason::WrongSystem, false),
            (InputRejected, "malformed", Reason::InvalidDerivation, false),
            (OutputRejected, "hash mismatch in fixed-output derivation", Reason::OutputHashMismatch, false),
            (OutputRejected, "not allowed to refer to", Reason::OutputRejected, false),
            (TransientFailure, "builder failed", Reason::InfrastructureFailure, true),
            (CachedFailure, "", Reason::BuildFailed, false),
            (TimedOut, "timed out after 5 seconds", Reason::TimedOut, false),
            (TimedOut, "timed out after 5 seconds of silence", Reason::MaxSilentExceeded, false),
            (MiscFailure, "", Reason::InfrastructureFailure, true),
            (DependencyFailed, "", Reason::InfrastructureFailure, true),
            (LogLimitExceeded, "", Reason::LogLimitExceeded, false),
            (NotDeterministic, "", Reason::NotDeterministic, false),
            (NoSubstituters, "", Reason::InfrastructureFailure, true),
        ] {
            let failure = failure(&derivation(false), &BuildResult::failure(status, message)).unwrap();
            assert_eq!((failure.reason, failure.infrastructure), (reason, infrastructure), "{status:?}");
            assert!(!failure.message.is_empty());
        }
        for status in [Built, Substituted, AlreadyValid, ResolvesToAlreadyValid] {
            assert!(failure(&derivation(false), &BuildResult::new(status)).is_none());
        }
    }

    #[test]
    fn a_fixed_output_that_fails_to_build_is_a_verdict() {
        let reason = |message: &str| {
            let result = BuildResult::failure(BuildStatus::TransientFailure, message);
            let failure = failure(&derivation(true), &result).unwrap();
            (failure.reason, failure.infrastructure)
        };
        assert_eq!(reason("exit code 1"), (Reason::BuildFailed, false));
        assert_eq!(reason("disk full: exit code 1"), (Reason::DiskFull, true));
        let of_nix = format!(
            "Cannot build it.\nLast 1 log lines:\n> no\nFor full logs, run:\n  nix log x\n{NIX_DISK_FULL}"
        );
        assert_eq!(reason(&of_nix), (Reason::DiskFull, true));
    }

    #[test]
    fn what_the_build_printed_is_no_evidence() {
        let printed =
            format!("> out of memory: x\n> disk full: x\n> killed from outside: x\n> {NIX_DISK_FULL}");
        // Nor is what it is named, or what it names its files.
        for (status, head, reason) in [
            (BuildStatus::PermanentFailure, "builder of 'disk full: x' failed", Reason::BuildFailed),
            (BuildStatus::TransientFailure, "builder of 'out of memory: x' failed", Reason::BuildFailed),
            (BuildStatus::OutputRejected, "disk full: a file", Reason::OutputRejected),
            (BuildStatus::TimedOut, "timed out after 3 seconds", Reason::TimedOut),
        ] {
            let message = format!("{head}; last 6 log lines:\n> silence\n> hash mismatch\n{printed}");
            let failure = failure(&derivation(true), &BuildResult::failure(status, message.clone())).unwrap();
            assert_eq!((failure.reason, failure.infrastructure), (reason, false));
            assert_eq!(failure.message, message);
        }
    }

    #[test]
    fn colours_go() {
        assert_eq!(strip_colours("\u{1b}[31;1merror:\u{1b}[0m é\u{1b}"), "error: é");
        assert_eq!(strip_colours("cut \u{1b}[31"), "cut ");
        assert_eq!(strip_colours("plain"), "plain");
    }
}
