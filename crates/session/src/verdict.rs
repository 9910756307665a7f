//! What a build result means for the request. Pure.
//!
//! The protocol has fifteen numbers and a message, the API more reasons than that. Where a number is too coarse the
//! message decides; the phrases looked for are Drover's own builder's and Nix's.

use drover_nix::BasicDerivation;
use drover_nix::derivation::DerivationType;
use drover_serve::{BuildResult, BuildStatus};

use crate::{Failure, Reason};

/// The failure that `result` reports, None if it reports success.
pub(crate) fn failure(derivation: &BasicDerivation, result: &BuildResult) -> Option<Failure> {
    let text = without_log(&result.error_message).to_ascii_lowercase();
    let says = |phrases: &[&str]| phrases.iter().any(|phrase| text.contains(phrase));
    let (reason, infrastructure) = match result.status {
        status if status.is_success() => return None,
        _ if says(&["no space left on device", "disk is full", "disk full"]) => (Reason::DiskFull, false),
        _ if says(&["out of memory", "out-of-memory", "oom-killed"]) => (Reason::OutOfMemory, false),
        BuildStatus::PermanentFailure | BuildStatus::CachedFailure => (Reason::BuildFailed, false),
        BuildStatus::InputRejected if says(&["system", "platform", "features"]) => {
            (Reason::WrongSystem, false)
        }
        BuildStatus::InputRejected => (Reason::InvalidDerivation, false),
        BuildStatus::OutputRejected if says(&["hash mismatch"]) => (Reason::OutputHashMismatch, false),
        BuildStatus::OutputRejected => (Reason::OutputRejected, false),
        // The builder of a fixed output ran and failed. A download may work another time, but that is for
        // `retries.build` to say: the machinery did its part.
        BuildStatus::TransientFailure if is_fixed(derivation) => (Reason::BuildFailed, false),
        BuildStatus::TimedOut if says(&["silen", "without output", "no output"]) => {
            (Reason::MaxSilentExceeded, false)
        }
        BuildStatus::TimedOut => (Reason::TimedOut, false),
        BuildStatus::LogLimitExceeded => (Reason::LogLimitExceeded, false),
        BuildStatus::NotDeterministic => (Reason::NotDeterministic, false),
        // Inputs were locked and confirmed before: that one is missing now is the builder's fault.
        _ => (Reason::InfrastructureFailure, true),
    };
    let message = match result.error_message.as_str() {
        "" => format!("the builder reports: {}", result.status.as_str()),
        message => strip_colours(message),
    };
    Some(Failure { reason, message, infrastructure, source: None })
}

fn is_fixed(derivation: &BasicDerivation) -> bool {
    matches!(derivation.kind(), Ok(DerivationType::CaFixed))
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
            (PermanentFailure, "write error: No space left on device", Reason::DiskFull, false),
            (PermanentFailure, "killed: out of memory", Reason::OutOfMemory, false),
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
        let result = BuildResult::failure(BuildStatus::TransientFailure, "exit code 1");
        let failure = failure(&derivation(true), &result).unwrap();
        assert_eq!((failure.reason, failure.infrastructure), (Reason::BuildFailed, false));
    }

    #[test]
    fn what_the_build_printed_is_no_evidence() {
        let message = "builder failed with exit code 1; last 2 log lines:\n> out of memory\n> disk full";
        let result = BuildResult::failure(BuildStatus::PermanentFailure, message);
        let failure = failure(&derivation(false), &result).unwrap();
        assert_eq!((failure.reason, failure.message.as_str()), (Reason::BuildFailed, message));
    }

    #[test]
    fn colours_go() {
        assert_eq!(strip_colours("\u{1b}[31;1merror:\u{1b}[0m é\u{1b}"), "error: é");
        assert_eq!(strip_colours("cut \u{1b}[31"), "cut ");
        assert_eq!(strip_colours("plain"), "plain");
    }
}
