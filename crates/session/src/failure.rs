use std::error::Error as StdError;
use std::fmt;

use drover_serve::Cause;

/// What Drover's builder begins its own lines of a log with.
const BUILDER_SAYS: &str = "drover-builder: ";
/// How many of the last lines may be its last words: an SSH client may add some of its own.
const LAST_WORDS: usize = 3;

/// How a session can end without outputs: the words that the API has for it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Reason {
    BuildFailed,
    BuilderLost,
    ConnectionLost,
    DiskFull,
    InfrastructureFailure,
    InputHashMismatch,
    InputMissing,
    InvalidDerivation,
    LogLimitExceeded,
    MaxSilentExceeded,
    NotDeterministic,
    OutOfMemory,
    OutputHashMismatch,
    OutputRejected,
    OutputSizeLimitExceeded,
    PathNotProven,
    TimedOut,
    WrongSystem,
}

impl Reason {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BuildFailed => "BuildFailed",
            Self::BuilderLost => "BuilderLost",
            Self::ConnectionLost => "ConnectionLost",
            Self::DiskFull => "DiskFull",
            Self::InfrastructureFailure => "InfrastructureFailure",
            Self::InputHashMismatch => "InputHashMismatch",
            Self::InputMissing => "InputMissing",
            Self::InvalidDerivation => "InvalidDerivation",
            Self::LogLimitExceeded => "LogLimitExceeded",
            Self::MaxSilentExceeded => "MaxSilentExceeded",
            Self::NotDeterministic => "NotDeterministic",
            Self::OutOfMemory => "OutOfMemory",
            Self::OutputHashMismatch => "OutputHashMismatch",
            Self::OutputRejected => "OutputRejected",
            Self::OutputSizeLimitExceeded => "OutputSizeLimitExceeded",
            Self::PathNotProven => "PathNotProven",
            Self::TimedOut => "TimedOut",
            Self::WrongSystem => "WrongSystem",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a session has no outcome.
#[derive(Debug)]
pub struct Failure {
    pub reason: Reason,
    /// What went wrong, with the names of paths and caches; for people.
    pub message: String,
    /// Whether the machinery is at fault, so that another attempt elsewhere may succeed.
    pub infrastructure: bool,
    pub source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Failure {
    /// The same failure, or what the builder's last words make of it: a session that an error ends has no place for that
    /// error but the end of its log. `log` is the last lines of it.
    #[must_use]
    pub fn with_last_words(self, log: &[String]) -> Self {
        if self.reason != Reason::ConnectionLost {
            return self;
        }
        let words = log.iter().rev().take(LAST_WORDS).find_map(|line| line.strip_prefix(BUILDER_SAYS));
        match words.map(|words| (words, Cause::of_text(words))) {
            Some((words, Some(cause @ (Cause::DiskFull | Cause::Killed)))) => {
                let reason = if cause == Cause::DiskFull { Reason::DiskFull } else { Reason::BuilderLost };
                Self { reason, message: format!("{words} ({})", self.message), ..self }
            }
            _ => self,
        }
    }

    /// The request, a cache's content or the build is at fault: another attempt gives the same.
    pub(crate) fn verdict(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), infrastructure: false, source: None }
    }

    pub(crate) fn infrastructure(
        message: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self {
            reason: Reason::InfrastructureFailure,
            message: message.into(),
            infrastructure: true,
            source: Some(source.into()),
        }
    }

    /// A session that broke while doing `act`. The protocol has no words for why; who runs the builder may know more.
    pub(crate) fn builder(act: &str) -> impl FnOnce(drover_serve::Error) -> Self {
        move |error| {
            let reason = match error.is_disconnect() {
                true => Reason::ConnectionLost,
                false => Reason::InfrastructureFailure,
            };
            Self { reason, ..Self::infrastructure(format!("{act}: {error}"), error) }
        }
    }

    pub(crate) fn cache(act: &str) -> impl FnOnce(drover_cache::Error) -> Self {
        move |error| Self::infrastructure(format!("{act}: {error}"), error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_explain_a_broken_connection() {
        let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
        let closed = || drover_serve::Error::Closed { act: "sending" };
        let explained = |log: &[&str]| Failure::builder("sending x")(closed()).with_last_words(&lines(log));
        let full = "drover-builder: disk full: cannot add a path";
        let failure = explained(&["building", full, "Connection closed."]);
        assert_eq!((failure.reason, failure.infrastructure), (Reason::DiskFull, true));
        assert!(
            failure.message.starts_with("disk full: cannot add a path (sending x: "),
            "{}",
            failure.message
        );
        let told = explained(&["drover-builder: killed from outside: the builder was told to end"]);
        assert_eq!((told.reason, told.infrastructure), (Reason::BuilderLost, true));
        for log in [
            &["drover-builder: no such path"][..],
            &["disk full: says the build"],
            &[full, "much", "more", "log"],
            &[full, "drover-builder: something else"],
            &[],
        ] {
            assert_eq!(explained(log).reason, Reason::ConnectionLost, "{log:?}");
        }
        let failure = Failure::verdict(Reason::BuildFailed, "no").with_last_words(&lines(&[full]));
        assert_eq!(failure.reason, Reason::BuildFailed);
    }
}
