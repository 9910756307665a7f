//! What a builder's end means: Nix's statuses and messages (Nix: derivation-building-goal.cc), and which ends are the
//! machine's doing instead of the derivation's. Pure.
//!
//! The status is the one that Nix would give. That the machine is to blame stands in the message ([`Cause`]), since the
//! protocol has no number for it.

use drover_nix::derivation::DerivationType;
use drover_serve::{BuildStatus, Cause};

use super::evidence::Evidence;
use super::supervise::End;
use crate::error::Error;

/// What a shell exits with whose command was killed by SIGKILL.
const EXIT_KILLED: i32 = 128 + libc::SIGKILL;

/// None if the builder did its part. `full`: the derivation's path.
pub(super) fn failure(
    full: &str,
    kind: DerivationType,
    end: &End,
    tail: &[String],
    evidence: &Evidence,
) -> Option<Error> {
    let cause = cause(end, evidence);
    // What has the network may fail for reasons that pass.
    let passing = !kind.is_sandboxed() || evidence.low_disk.is_some();
    let failed = if passing { BuildStatus::TransientFailure } else { BuildStatus::PermanentFailure };
    let (status, mut message) = match end {
        End::Exited(0) => return None,
        End::Exited(code) => (failed, format!("builder for '{full}' failed with exit code {code}")),
        End::Signalled(signal) => {
            (failed, format!("builder for '{full}' failed due to signal {}", describe(*signal)))
        }
        End::Closed => (
            failed,
            format!(
                "builder for '{full}' failed due to signal {}: it ran on after it had closed its output, which ends a \
                 build",
                describe(libc::SIGKILL)
            ),
        ),
        End::NotExecuted(why) => (failed, format!("builder for '{full}' failed: {why}")),
        End::TimedOut(limit) => (
            BuildStatus::TimedOut,
            format!("building of '{full}' timed out after {} seconds", limit.as_secs()),
        ),
        End::Silent(limit) => (
            BuildStatus::TimedOut,
            format!("building of '{full}' timed out after {} seconds of silence", limit.as_secs()),
        ),
        End::LogLimit(limit) => (
            BuildStatus::LogLimitExceeded,
            format!("'{full}' was killed after writing more than {limit} bytes of log"),
        ),
        End::Cancelled => return Some(Error::gone()),
        End::SetUp(why) => return Some(Error::Sandbox { why: why.clone() }),
        End::Lost if cause != Some(Cause::OutOfMemory) => {
            let why =
                format!("the process that watches over builds died, and '{full}' with it; build it again");
            return Some(Error::Lost { why });
        }
        End::Lost => {
            (BuildStatus::MiscFailure, format!("building of '{full}' lost the process that watches over it"))
        }
    };
    if let Some(cause) = cause {
        message = cause.say(&message);
        message.push_str(&explain(cause, evidence));
    }
    if !tail.is_empty() {
        message.push_str(&format!(";\nlast {} log lines:", tail.len()));
        tail.iter().for_each(|line| message.push_str(&format!("\n> {line}")));
    }
    Some(Error::Verdict { status, message })
}

/// What the machine failed a build with that failed.
fn cause(end: &End, evidence: &Evidence) -> Option<Cause> {
    let killed = match end {
        // Process 1 of a process namespace gets a SIGKILL from outside of it or from the kernel only; from the latter also
        // at the end of a time limit (RLIMIT_CPU) that the build has set itself, which nobody can tell and few do.
        End::Signalled(libc::SIGKILL) | End::Lost => true,
        // Perhaps; a process below the builder was.
        End::Exited(EXIT_KILLED) => true,
        End::Exited(0) => return None,
        End::Exited(_) | End::Signalled(_) | End::Closed | End::NotExecuted(_) => false,
        // Limits are verdicts of their own, and what was not begun has a reason of its own.
        End::TimedOut(_) | End::Silent(_) | End::LogLimit(_) | End::Cancelled | End::SetUp(_) => return None,
    };
    // What the build's own control group has counted is the build's. Where others are counted with it, the build has to
    // look like it: the whole machine's count alone says nothing about a builder that just failed.
    let ours = evidence.alone && !evidence.oom.whole_machine;
    if evidence.oom.count > 0 && (ours || killed) {
        return Some(Cause::OutOfMemory);
    }
    // Without a process namespace of its own, a build may as well have killed itself.
    if *end == End::Signalled(libc::SIGKILL) && evidence.contained {
        return Some(Cause::Killed);
    }
    evidence.low_disk.is_some().then_some(Cause::DiskFull)
}

/// What is known beyond the cause's name, and what to do.
fn explain(cause: Cause, evidence: &Evidence) -> String {
    match (cause, &evidence.low_disk) {
        (Cause::OutOfMemory, _) => {
            let count = evidence.oom.count;
            let processes = if count == 1 { "a process" } else { "processes" };
            let whose = if evidence.oom.whole_machine { " of this machine" } else { "" };
            format!(
                "; the kernel killed {processes}{whose} for want of memory ({count} in all): give the build more"
            )
        }
        (Cause::DiskFull, Some(disk)) => format!("; {disk}: give the build more disk"),
        (Cause::DiskFull, None) => String::new(),
        (Cause::Killed, _) => "; neither the build nor its builder sent it".into(),
    }
}

/// A signal's number, with the name that the C library has for those that end programs as a rule.
fn describe(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "Hangup",
        libc::SIGINT => "Interrupt",
        libc::SIGQUIT => "Quit",
        libc::SIGILL => "Illegal instruction",
        libc::SIGTRAP => "Trace/breakpoint trap",
        libc::SIGABRT => "Aborted",
        libc::SIGBUS => "Bus error",
        libc::SIGFPE => "Floating point exception",
        libc::SIGKILL => "Killed",
        libc::SIGSEGV => "Segmentation fault",
        libc::SIGPIPE => "Broken pipe",
        libc::SIGALRM => "Alarm clock",
        libc::SIGTERM => "Terminated",
        libc::SIGXCPU => "CPU time limit exceeded",
        libc::SIGXFSZ => "File size limit exceeded",
        libc::SIGSYS => "Bad system call",
        _ => return signal.to_string(),
    };
    format!("{signal} ({name})")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sandbox::oom::OomKills;

    const PURE: DerivationType = DerivationType::InputAddressed;
    const NETWORK: DerivationType = DerivationType::CaFixed;

    fn evidence(count: u64, whole_machine: bool, alone: bool, low_disk: bool) -> Evidence {
        let low_disk = low_disk.then(|| "/nix/store has only 3 bytes left".to_owned());
        Evidence { oom: OomKills { count, whole_machine }, alone, low_disk, contained: true }
    }

    /// Status, and what the message begins with.
    fn verdict(kind: DerivationType, end: &End, evidence: &Evidence) -> (BuildStatus, Option<Cause>) {
        let error =
            failure("/nix/store/x.drv", kind, end, &["out of memory: I say".into()], evidence).unwrap();
        let result = error.to_result();
        (result.status, Cause::of(&result))
    }

    #[test]
    fn ends_without_evidence_of_anything_else() {
        use BuildStatus::*;
        let second = Duration::from_secs(1);
        let quiet = evidence(0, false, true, false);
        for (end, pure, network, cause) in [
            (End::Exited(1), PermanentFailure, TransientFailure, None),
            (End::Exited(EXIT_KILLED), PermanentFailure, TransientFailure, None),
            (End::Signalled(libc::SIGSEGV), PermanentFailure, TransientFailure, None),
            (End::Signalled(libc::SIGKILL), PermanentFailure, TransientFailure, Some(Cause::Killed)),
            (End::Closed, PermanentFailure, TransientFailure, None),
            (End::NotExecuted("no".into()), PermanentFailure, TransientFailure, None),
            (End::TimedOut(second), TimedOut, TimedOut, None),
            (End::Silent(second), TimedOut, TimedOut, None),
            (End::LogLimit(1), LogLimitExceeded, LogLimitExceeded, None),
            (End::Cancelled, MiscFailure, MiscFailure, None),
            (End::SetUp("no".into()), MiscFailure, MiscFailure, None),
            (End::Lost, MiscFailure, MiscFailure, Some(Cause::Killed)),
        ] {
            assert_eq!(verdict(PURE, &end, &quiet), (pure, cause), "{end:?}");
            assert_eq!(verdict(NETWORK, &end, &quiet), (network, cause), "{end:?}");
        }
        let exposed = Evidence { contained: false, ..quiet };
        let killed = verdict(PURE, &End::Signalled(libc::SIGKILL), &exposed);
        assert_eq!(killed, (PermanentFailure, None), "it may have been the build itself");
        let good = failure("/nix/store/x.drv", PURE, &End::Exited(0), &[], &evidence(9, false, true, true));
        assert!(good.is_none(), "nothing speaks against success");
    }

    #[test]
    fn who_is_out_of_memory() {
        let oom = |end: &End, evidence: &Evidence| verdict(PURE, end, evidence).1 == Some(Cause::OutOfMemory);
        let (own, shared, machine) = (
            evidence(1, false, true, false),
            evidence(1, false, false, false),
            evidence(1, true, true, false),
        );
        for (end, of_shared) in [
            (End::Signalled(libc::SIGKILL), true),
            (End::Exited(EXIT_KILLED), true),
            (End::Lost, true),
            (End::Exited(1), false),
            (End::Signalled(libc::SIGSEGV), false),
            (End::Closed, false),
        ] {
            assert!(oom(&end, &own), "{end:?}");
            assert_eq!(oom(&end, &shared), of_shared, "{end:?}");
            assert_eq!(oom(&end, &machine), of_shared, "{end:?}");
        }
        for end in [End::TimedOut(Duration::from_secs(1)), End::LogLimit(1), End::SetUp("no".into())] {
            assert!(!oom(&end, &own), "{end:?}");
        }
        // Memory before disk: what was killed may not have come to cleaning up.
        assert!(oom(&End::Exited(1), &evidence(1, false, true, true)));
        // The status is Nix's all the same.
        assert_eq!(verdict(PURE, &End::Exited(1), &own).0, BuildStatus::PermanentFailure);
        assert_eq!(verdict(NETWORK, &End::Exited(1), &own).0, BuildStatus::TransientFailure);
    }

    #[test]
    fn a_full_disk_makes_a_failure_one_that_may_pass() {
        let full = evidence(0, false, true, true);
        let transient = (BuildStatus::TransientFailure, Some(Cause::DiskFull));
        for end in [End::Exited(1), End::Signalled(libc::SIGBUS), End::NotExecuted("no".into())] {
            assert_eq!(verdict(PURE, &end, &full), transient, "{end:?}");
        }
        let killed = verdict(PURE, &End::Signalled(libc::SIGKILL), &full);
        assert_eq!(killed, (BuildStatus::TransientFailure, Some(Cause::Killed)));
        assert_eq!(verdict(PURE, &End::LogLimit(1), &full), (BuildStatus::LogLimitExceeded, None));
    }

    #[test]
    fn messages() {
        let message = |end: &End, evidence: &Evidence| {
            failure("/nix/store/x.drv", PURE, end, &["a".into()], evidence).unwrap().to_result().error_message
        };
        assert_eq!(
            message(&End::Signalled(libc::SIGABRT), &Evidence::default()),
            "builder for '/nix/store/x.drv' failed due to signal 6 (Aborted);\nlast 1 log lines:\n> a"
        );
        assert_eq!(
            message(&End::Exited(1), &evidence(2, false, true, false)),
            "out of memory: builder for '/nix/store/x.drv' failed with exit code 1; the kernel killed processes for want of \
             memory (2 in all): give the build more;\nlast 1 log lines:\n> a"
        );
        let full = message(&End::Exited(1), &evidence(0, false, true, true));
        assert!(full.contains("; /nix/store has only 3 bytes left: give"), "{full}");
    }
}
