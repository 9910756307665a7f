//! What the first process of a container owes the others: it forwards signals and collects the dead.
//!
//! `ssh` puts its connection masters into the background, where their parent becomes process 1. The operator is that
//! process in its image, and tokio waits only for children that it started itself, so as process 1 the program starts
//! itself once more and the first copy does nothing but this. It may not touch anything of Kubernetes.

use std::process::ExitCode;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};
use tokio::signal::unix::{SignalKind, signal};

/// Set for the copy that does the work, in case it is process 1 of yet another namespace.
const MARK: &str = "DROVER_OPERATOR_CHILD";

/// Whether this process has to play the part.
pub fn is_needed() -> bool {
    std::process::id() == 1 && std::env::var_os(MARK).is_none()
}

/// Runs this program again with the same arguments and returns its exit code once it has ended.
pub fn run() -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Streams first: a signal that comes before its stream exists would be lost.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut child_ended = signal(SignalKind::child())?;
        let exe = std::env::current_exe().context("cannot find this program's own file")?;
        let child = std::process::Command::new(exe)
            .args(std::env::args_os().skip(1))
            .env(MARK, "1")
            .spawn()
            .context("cannot start this program again as a child of process 1")?;
        let child = Pid::from_raw(child.id() as i32).context("the child has no process id")?;
        loop {
            tokio::select! {
                _ = terminate.recv() => forward(child, Signal::TERM),
                _ = interrupt.recv() => forward(child, Signal::INT),
                _ = child_ended.recv() => {
                    // One signal may stand for several children.
                    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                        if pid == child {
                            let code = status.exit_status().unwrap_or_else(|| {
                                status.terminating_signal().map_or(1, |signal| 128 + signal)
                            });
                            return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
                        }
                    }
                }
            }
        }
    })
}

/// A child that is gone already needs no signal.
fn forward(child: Pid, signal: Signal) {
    let _ = kill_process(child, signal);
}
