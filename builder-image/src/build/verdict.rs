//! What a builder's end means: Nix's statuses and messages (Nix: derivation-building-goal.cc).

use drover_nix::StorePath;
use drover_nix::derivation::DerivationType;
use drover_serve::BuildStatus;

use super::Builder;
use super::supervise::End;
use crate::error::Error;

/// Less free disk than this after a failure means that the failure may be the disk's (Nix: derivation-builder.cc).
const LOW_DISK_BYTES: u64 = 8 << 20;

impl Builder {
    /// None if the builder did its part.
    pub(super) fn verdict(
        &self,
        drv_path: &StorePath,
        kind: DerivationType,
        end: &End,
        tail: &[String],
    ) -> Option<Error> {
        let full = self.store.store_dir().full(drv_path);
        let failed = || {
            // What has the network may fail for reasons that pass.
            let passing = !kind.is_sandboxed() || self.disk_is_low();
            if passing { BuildStatus::TransientFailure } else { BuildStatus::PermanentFailure }
        };
        let (status, what) = match end {
            End::Exited(0) => return None,
            End::Exited(code) => (failed(), format!("builder for '{full}' failed with exit code {code}")),
            End::Signalled(signal) => {
                (failed(), format!("builder for '{full}' failed due to signal {signal}"))
            }
            End::NotExecuted(why) => (failed(), format!("builder for '{full}' failed: {why}")),
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
        };
        let mut message = what;
        if !tail.is_empty() {
            message.push_str(&format!(";\nlast {} log lines:", tail.len()));
            tail.iter().for_each(|line| message.push_str(&format!("\n> {line}")));
        }
        Some(Error::Verdict { status, message })
    }

    fn disk_is_low(&self) -> bool {
        let layout = self.store.layout();
        [&layout.real_store_dir, &layout.state_dir].into_iter().any(|dir| {
            rustix::fs::statvfs(dir)
                .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) < LOW_DISK_BYTES)
        })
    }
}
