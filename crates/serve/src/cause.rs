//! Why a build failed where that is not the derivation's doing.
//!
//! A build result has a status and a message and no room for more, and Nix's numbers do not tell a builder that failed
//! from one that the machine failed. So Drover's builder begins the message with one of these phrases, and whoever reads
//! a result looks there. Nothing that a build can choose stands at the beginning of a message: its name is within it, its
//! output below it.

use crate::{BuildResult, BuildStatus};

/// What the machine failed a build with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// The kernel killed a process of the build for want of memory.
    OutOfMemory,
    /// A file system had no room left, or no inodes.
    DiskFull,
    /// Something that is neither the build nor the builder killed the build's process, or one that it depends on.
    Killed,
}

impl Cause {
    pub const ALL: [Self; 3] = [Self::OutOfMemory, Self::DiskFull, Self::Killed];

    /// What stands at the beginning of a message, before a colon. Never changed: both ends rely on it.
    pub const fn phrase(self) -> &'static str {
        match self {
            Self::OutOfMemory => "out of memory",
            Self::DiskFull => "disk full",
            Self::Killed => "killed from outside",
        }
    }

    /// The message with the phrase before it.
    pub fn say(self, message: &str) -> String {
        format!("{}: {message}", self.phrase())
    }

    /// What a text begins with.
    pub fn of_text(text: &str) -> Option<Self> {
        let says =
            |cause: &Self| text.strip_prefix(cause.phrase()).is_some_and(|rest| rest.starts_with(": "));
        Self::ALL.into_iter().find(says)
    }

    /// The cause that a failure names. The other statuses are verdicts of their own, whatever their messages say.
    pub fn of(result: &BuildResult) -> Option<Self> {
        match result.status {
            BuildStatus::PermanentFailure | BuildStatus::TransientFailure | BuildStatus::MiscFailure => {
                Self::of_text(&result.error_message)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_read_where_it_was_said_and_nowhere_else() {
        let said = |status, message: String| Cause::of(&BuildResult::failure(status, message));
        for cause in Cause::ALL {
            let message = cause.say("builder for '/nix/store/x.drv' failed with exit code 1");
            for status in
                [BuildStatus::PermanentFailure, BuildStatus::TransientFailure, BuildStatus::MiscFailure]
            {
                assert_eq!(said(status, message.clone()), Some(cause));
            }
            assert_eq!(said(BuildStatus::OutputRejected, message.clone()), None);
            assert_eq!(said(BuildStatus::PermanentFailure, format!("failed\n{message}")), None);
            assert_eq!(said(BuildStatus::PermanentFailure, format!("> {message}")), None);
            assert_eq!(said(BuildStatus::PermanentFailure, format!("{}ness", cause.phrase())), None);
        }
    }
}
