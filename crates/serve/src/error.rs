use std::io;

use drover_nix::StorePath;

use crate::{BuildStatus, Version};

/// What a [`crate::Backend`] fails with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a session ended. After any of them the connection is of no more use: the protocol cannot resynchronise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server's store could not do what it was asked to.
    #[error("cannot {act}: {source}")]
    Backend { act: String, source: BoxError },
    /// The other side closed the connection where more had to come.
    #[error("the connection was closed while {act}")]
    Closed { act: &'static str },
    /// The peer says something that the protocol does not allow.
    #[error("protocol violation in {what}: {why}")]
    Invalid { what: &'static str, why: String },
    /// The greeting has wrong bytes in it, typically text that a login shell printed.
    #[error("the other side does not speak the serve protocol: its greeting begins with {got:02x?}")]
    Magic { got: [u8; 8] },
    /// A path, hash, name or archive that breaks Nix's rules.
    #[error("invalid {what}: {source}")]
    Nix { what: &'static str, source: drover_nix::Error },
    /// A command that changes the store, on a read-only session.
    #[error("{command} needs a session that may write (start the server with --write)")]
    NotWritable { command: &'static str },
    /// The bytes to be sent could not be had. `sent` of them are gone already.
    #[error("cannot read the NAR of {path} after {sent} bytes: {source}")]
    NarSource { path: StorePath, sent: u64, source: io::Error },
    /// The place where received bytes go refused them.
    #[error("cannot pass on the NAR of {path}: {source}")]
    NarSink { path: StorePath, source: io::Error },
    /// A NAR is not as long as was announced.
    #[error("the NAR of {path} has {got} bytes instead of the announced {expected}")]
    NarSize { path: StorePath, expected: u64, got: u64 },
    /// The operating system failed to move bytes.
    #[error("the connection failed while {act}: {source}")]
    Io { act: &'static str, source: io::Error },
    /// A length beyond its limit.
    #[error("{what} is too long: {got}, the limit is {limit}")]
    TooLong { what: &'static str, got: u64, limit: u64 },
    /// The server is too old for a command.
    #[error("the other side speaks serve protocol {have}; {command} needs {needs}")]
    TooOld { command: &'static str, needs: Version, have: Version },
    /// No such command.
    #[error("unknown serve command {number}")]
    UnknownCommand { number: u64 },
    /// Not protocol version 2.
    #[error("the other side speaks serve protocol version word {word:#x}; only major version 2 is known")]
    UnsupportedVersion { word: u64 },
    /// BuildPaths reported failure.
    #[error("building paths failed ({}): {message}", status.as_str())]
    BuildPaths { status: BuildStatus, message: String },
}

impl Error {
    /// A stable word for metrics.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Backend { .. } => "backend",
            Self::BuildPaths { .. } => "build",
            Self::Closed { .. } => "closed",
            Self::Invalid { .. } | Self::Magic { .. } | Self::Nix { .. } => "protocol",
            Self::Io { .. } => "io",
            Self::NarSink { .. } => "nar-sink",
            Self::NarSize { .. } => "nar-size",
            Self::NarSource { .. } => "nar-source",
            Self::NotWritable { .. } => "not-writable",
            Self::TooLong { .. } => "limit",
            Self::TooOld { .. } | Self::UnsupportedVersion { .. } => "version",
            Self::UnknownCommand { .. } => "unknown-command",
        }
    }

    /// Whether the connection broke, as opposed to a peer that said something wrong.
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Io { .. })
    }

    pub(crate) fn invalid(what: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { what, why: why.into() }
    }

    pub(crate) fn nix(what: &'static str) -> impl FnOnce(drover_nix::Error) -> Self {
        move |source| Self::Nix { what, source }
    }

    /// Tells the end of the stream from other failures.
    pub(crate) fn io(act: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::Closed { act },
            _ => Self::Io { act, source },
        }
    }
}
