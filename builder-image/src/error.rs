//! What can go wrong in the builder, and which of Nix's statuses it is to the client that asked for a build.

use std::io;
use std::path::PathBuf;

use drover_serve::{BuildResult, BuildStatus, Cause};

/// Every variant names the act that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// A system call on a file.
    #[error("cannot {act} {}: {source}", path.display())]
    File { act: &'static str, path: PathBuf, source: io::Error },
    /// A system call on nothing that has a path.
    #[error("cannot {act}: {source}")]
    System { act: &'static str, source: io::Error },
    /// The sandbox could not be set up; no instruction of the builder ran.
    #[error("{why}")]
    Sandbox { why: String },
    /// This machine allows no sandbox of the kind that is asked for, and will not however often it is tried.
    #[error("this machine allows no sandbox: {why}")]
    Unfit { why: String },
    /// A process that builds depend on was ended by something else.
    #[error("{why}")]
    Lost { why: String },
    #[error(transparent)]
    Store(#[from] drover_store::Error),
    #[error(transparent)]
    Nix(#[from] drover_nix::Error),
    /// The client went away or the program is told to stop.
    #[error("the build was cancelled: {why}")]
    Cancelled { why: String },
    /// The build's end, as far as it is the derivation's own doing.
    #[error("{message}")]
    Verdict { status: BuildStatus, message: String },
}

impl Error {
    /// A stable word for metrics and reasons.
    pub(crate) fn category(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::System { .. } => "system",
            Self::Sandbox { .. } | Self::Unfit { .. } => "sandbox",
            Self::Lost { .. } => "lost",
            Self::Store(error) => error.category(),
            Self::Nix(error) => error.category(),
            Self::Cancelled { .. } => "cancelled",
            Self::Verdict { .. } => "verdict",
        }
    }

    /// What BuildDerivation answers (Nix: build-result.hh). Whatever is not the derivation's fault is miscellaneous, but
    /// for a full disk, after which another try may work.
    pub(crate) fn status(&self) -> BuildStatus {
        match self {
            Self::Verdict { status, .. } => *status,
            Self::Store(drover_store::Error::Cycle { .. }) => BuildStatus::OutputRejected,
            Self::Nix(drover_nix::Error::Derivation { .. } | drover_nix::Error::OutputName { .. }) => {
                BuildStatus::InputRejected
            }
            error if error.is_disk_full() => BuildStatus::TransientFailure,
            _ => BuildStatus::MiscFailure,
        }
    }

    /// The answer to who asked for a build that ended so.
    pub(crate) fn to_result(&self) -> BuildResult {
        let message = self.to_string();
        let message = match self {
            Self::Lost { .. } => Cause::Killed.say(&message),
            error if error.is_disk_full() => Cause::DiskFull.say(&message),
            _ => message,
        };
        BuildResult::failure(self.status(), message)
    }

    /// Whether a file system had no room left.
    pub(crate) fn is_disk_full(&self) -> bool {
        match self {
            Self::Store(error) => error.is_disk_full(),
            Self::File { source, .. } | Self::System { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }

    pub(crate) fn file(act: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { act, path, source }
    }

    pub(crate) fn system(act: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { act, source }
    }

    /// Nobody is left who wants the build.
    pub(crate) fn gone() -> Self {
        Self::Cancelled { why: "the client is gone or asked for it".into() }
    }

    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self::Verdict { status: BuildStatus::InputRejected, message: message.into() }
    }

    pub(crate) fn output(message: impl Into<String>) -> Self {
        Self::Verdict { status: BuildStatus::OutputRejected, message: message.into() }
    }
}

/// The last words of a session that an error ended. The protocol has no place for them, so that they go to standard error;
/// whoever reads that finds the cause at the beginning, as in a result.
pub(crate) fn last_words(error: &anyhow::Error) -> String {
    let is_full = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref().is_some_and(Error::is_disk_full)
            || cause.downcast_ref().is_some_and(drover_store::Error::is_disk_full)
    };
    let line = one_line(error);
    if error.chain().any(is_full) { Cause::DiskFull.say(&line) } else { line }
}

/// An error and its causes in one line, for a log or a terminal: what an earlier part has said already is not repeated,
/// and what a peer's bytes could do to a terminal is shown instead of done.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for part in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = part;
        } else if !text.ends_with(&part) {
            text = format!("{text}: {part}");
        }
    }
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_name_a_full_disk() {
        let full = || drover_store::Error::Io {
            act: "write",
            path: "/x".into(),
            source: io::ErrorKind::StorageFull.into(),
        };
        for source in [drover_serve::BoxError::from(full()), Error::from(full()).into()] {
            let error = drover_serve::Error::Backend { act: "add a path".into(), source };
            let words = last_words(&error.into());
            assert!(words.starts_with("disk full: cannot add a path: cannot write /x: "), "{words}");
        }
        assert_eq!(last_words(&anyhow::anyhow!("no")), "no");
    }

    #[test]
    fn one_line_says_everything_once() {
        let error = Error::file("write", "/x")(io::ErrorKind::StorageFull.into());
        let full = anyhow::Error::from(error).context("cannot serve");
        assert_eq!(one_line(&full), "cannot serve: cannot write /x: no storage space");
        assert_eq!(one_line(&anyhow::anyhow!("a\nb\x1b[31m")), "a\\nb\\u{1b}[31m");
    }

    #[test]
    fn statuses() {
        let full = Error::file("write", "/x")(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(full.status(), BuildStatus::TransientFailure);
        let other = Error::file("write", "/x")(io::Error::from(io::ErrorKind::NotFound));
        assert_eq!((other.status(), other.category()), (BuildStatus::MiscFailure, "file"));
        assert_eq!(Error::output("no").status(), BuildStatus::OutputRejected);
    }

    #[test]
    fn results_name_what_the_machine_failed_with() {
        let cause = |error: &Error| Cause::of(&error.to_result());
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            assert_eq!(cause(&Error::file("write", "/x")(kind.into())), Some(Cause::DiskFull));
            let of_store = drover_store::Error::Io { act: "write", path: "/x".into(), source: kind.into() };
            assert_eq!(cause(&of_store.into()), Some(Cause::DiskFull));
        }
        assert_eq!(cause(&Error::Lost { why: "it is gone".into() }), Some(Cause::Killed));
        assert_eq!(cause(&Error::file("write", "/x")(io::ErrorKind::NotFound.into())), None);
        // Limits on namespaces have the error of a full disk.
        let why = "cannot clone: No space left on device".into();
        assert_eq!(cause(&Error::Sandbox { why }), None);
    }
}
