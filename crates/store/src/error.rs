use std::io;
use std::path::PathBuf;

use drover_nix::{Sha256, StorePath};

/// What can go wrong with a store. Every variant names the act that failed and what it was done to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A store URI that cannot be understood.
    #[error("cannot use {uri:?} as a store: {why}")]
    Uri { uri: String, why: String },
    /// A system call on a file of the store.
    #[error("cannot {act} {}: {source}", path.display())]
    Io { act: &'static str, path: PathBuf, source: io::Error },
    /// A file whose kind, owner or name no store object may have.
    #[error("{}: {why}", path.display())]
    BadFile { path: PathBuf, why: String },
    /// A statement on the database.
    #[error("cannot {act} in the store's database: {source}")]
    Database { act: &'static str, source: rusqlite::Error },
    /// A database that this program cannot use, or a row that makes no sense.
    #[error("the store's database {}: {why}", path.display())]
    BadDatabase { path: PathBuf, why: String },
    /// Something that writes was asked of a store that was opened for reading.
    #[error("cannot {act}: the store was opened for reading only")]
    ReadOnly { act: &'static str },
    /// The path must be valid for what was asked.
    #[error("store path {path} is not valid in this store")]
    NotValid { path: StorePath },
    /// A path was to be registered before what it refers to.
    #[error("cannot register {path}: it refers to {reference}, which is not valid; add that path first")]
    ReferenceNotValid { path: StorePath, reference: StorePath },
    /// A path was to be made invalid while others refer to it.
    #[error("cannot delete {path}: {referrer} refers to it")]
    Referenced { path: StorePath, referrer: StorePath },
    /// Paths that were to be registered together refer to each other in a circle.
    #[error("cannot register {path}: it refers to itself by way of {via}")]
    Cycle { path: StorePath, via: StorePath },
    /// A batch of imports of which one could not be registered.
    #[error("cannot add to the batch: one of its paths could not be registered, so those after it are gone")]
    BrokenBatch,
    /// The archive is not a NAR.
    #[error("cannot unpack {path}: {source}")]
    Nar { path: StorePath, source: drover_nix::Error },
    /// An archive could not be read or written, or a file does not fit into one.
    #[error("cannot {act} the archive: {source}")]
    Archive { act: &'static str, source: drover_nix::Error },
    /// The bytes are not those that were announced.
    #[error("the content of {path} has hash {actual}, not {expected}")]
    HashMismatch { path: StorePath, expected: Sha256, actual: Sha256 },
    /// The archive is longer or shorter than was announced.
    #[error("the archive of {path} has {actual} bytes, not {expected}")]
    SizeMismatch { path: StorePath, expected: u64, actual: u64 },
    /// A content address that does not lead to the path, or is not the content's.
    #[error("cannot accept {path} with content address {ca}: {why}")]
    ContentAddress { path: StorePath, ca: String, why: String },
    /// A `.drv` file that is not a derivation, or claims outputs that are not its own.
    #[error("cannot accept the derivation {path}: {why}")]
    Derivation { path: StorePath, why: String },
}

impl Error {
    /// A stable word for metrics and reasons.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Uri { .. } => "uri",
            Self::Io { .. } => "io",
            Self::BadFile { .. } => "file",
            Self::Database { .. } | Self::BadDatabase { .. } => "database",
            Self::ReadOnly { .. } => "read-only",
            Self::NotValid { .. } => "not-valid",
            Self::ReferenceNotValid { .. }
            | Self::Referenced { .. }
            | Self::Cycle { .. }
            | Self::BrokenBatch => "references",
            Self::Nar { .. } | Self::Archive { .. } => "nar",
            Self::HashMismatch { .. } | Self::SizeMismatch { .. } => "hash",
            Self::ContentAddress { .. } => "content-address",
            Self::Derivation { .. } => "derivation",
        }
    }

    /// Whether the file system had no room left.
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::Database { source, .. } => {
                source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
                    // No room for the index of the log, which the first who opens the database makes.
                    || source
                        .sqlite_error()
                        .is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE)
            }
            _ => false,
        }
    }

    pub(crate) fn io(act: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { act, path, source }
    }

    pub(crate) fn sys(act: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let path = path.into();
        move |errno| Self::Io { act, path, source: errno.into() }
    }

    pub(crate) fn db(act: &'static str) -> impl FnOnce(rusqlite::Error) -> Self {
        move |source| Self::Database { act, source }
    }
}
