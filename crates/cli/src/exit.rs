//! How `drover` ends: four exit codes that scripts may rely on.

use std::process::ExitCode;

/// Everything was done.
pub(crate) const DONE: u8 = 0;
/// A build failed.
pub(crate) const BUILD_FAILED: u8 = 1;
/// Bad usage or bad input. The argument parser uses the same code.
pub(crate) const BAD_INPUT: u8 = 2;
/// The machinery failed: a builder, a cache, a cluster, this machine.
pub(crate) const INFRASTRUCTURE: u8 = 3;

/// For `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  a build failed
  2  bad usage or bad input
  3  infrastructure: a builder, a cache, the cluster or this machine failed";

/// Why there is nothing to show.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The user can mend it.
    Input(anyhow::Error),
    /// The machinery's.
    Infrastructure(anyhow::Error),
    /// Whoever read standard output went away, and wants no more. Nobody minds: `drover … | head` ends well.
    ReaderGone,
}

/// What a command comes to: an exit code, or a fault that is still to be said.
pub(crate) type Outcome = Result<u8, Fault>;

impl Fault {
    pub(crate) fn input(error: impl Into<anyhow::Error>) -> Self {
        Self::Input(error.into())
    }

    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Input(_) => BAD_INPUT,
            Self::Infrastructure(_) => INFRASTRUCTURE,
            Self::ReaderGone => DONE,
        }
    }
}

/// Says what there is to say, on standard error.
pub(crate) fn finish(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(code) => code.into(),
        Err(fault) => {
            if let Fault::Input(error) | Fault::Infrastructure(error) = &fault {
                eprintln!("error: {}", said(error));
            }
            fault.code().into()
        }
    }
}

/// The error and its causes in one line. Libraries differ in whether an error repeats its cause: what is there is not said again.
fn said(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            let colon = if text.is_empty() { "" } else { ": " };
            text += &format!("{colon}{cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let error =
            anyhow::anyhow!("no such file").context("cannot read x: no such file").context("no config");
        assert_eq!(said(&error), "no config: cannot read x: no such file");
    }
}
