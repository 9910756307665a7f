use std::io;
use std::path::Path;
use std::time::Duration;

use drover_nix::StorePath;
use drover_nix::narinfo::Compression;

/// What can go wrong with a cache. URLs in it are free of secrets.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A cache URL that cannot be used.
    #[error("cannot use {url} as a cache: {why}")]
    Url { url: String, why: String },
    /// The server could not be reached, or the exchange broke off.
    #[error("cannot {act} {url}: {}", chain(source))]
    Request { act: &'static str, url: String, source: reqwest::Error },
    /// The server answered, but not with what was asked for.
    #[error("cannot {act} {url}: the server says {status}{}", hint(*status))]
    Status { act: &'static str, url: String, status: u16 },
    /// An S3 service refused, and said why. Its sentence is not ours.
    #[error("cannot {act} {url}: the S3 service says {code} ({status}): {why}")]
    S3 { act: &'static str, url: String, status: u16, code: String, why: String, transient: bool },
    /// The server wants to know who asks, or does not let these credentials in.
    #[error("cannot {act} {url}: the server says {status}: {}", denied(*shown))]
    Denied { act: &'static str, url: String, status: u16, shown: bool },
    /// A system call on a file.
    #[error("cannot {act}: {source}")]
    Io { act: String, source: io::Error },
    /// A body that broke off or does not decompress.
    #[error("cannot read {url}: {source}")]
    Read { url: String, source: io::Error },
    /// A file that is larger than any of its kind should be.
    #[error("{url} is larger than {limit} bytes, the most that is read of such a file")]
    TooLarge { url: String, limit: u64 },
    /// A file of the cache that makes no sense.
    #[error("{url}: {source}")]
    Format { url: String, source: drover_nix::Error },
    /// The cache holds paths of another store directory.
    #[error("{url} is a cache of the store {found}, not of {wanted}")]
    StoreDir { url: String, found: String, wanted: String },
    /// The narinfo file is about another path.
    #[error("{url} is about {found}, not about {wanted}")]
    WrongPath { url: String, wanted: StorePath, found: StorePath },
    /// The cache has the path, but nothing shows that its content is right.
    #[error("{url} has {path}, but it is not trusted: {why}")]
    Untrusted { url: String, path: StorePath, why: String },
    /// The narinfo file leads to a NAR that is not there.
    #[error("{url} is missing although the cache's narinfo file names it")]
    MissingNar { url: String },
    /// The NAR is compressed in a way that this program does not read.
    #[error(
        "cannot read {url}: its compression {compression} is not supported (none, bzip2, gzip, xz, zstd are)"
    )]
    Compression { url: String, compression: Compression },
    /// The content is not what it should be.
    #[error("{path} from {url}: {why}")]
    Content { url: String, path: StorePath, why: String },
    /// Part of an archive that came compressed from whoever built it, and is not as it has to be.
    #[error("a frame of a compressed archive is wrong: {why}")]
    Frame { why: String },
    /// The cache gave this path wrong not long ago ([`crate::Cache::set_aside`]).
    #[error(
        "{url} gave {path} wrong ({why}), so it is not asked for it; it will be in {} s", again.as_secs().max(1)
    )]
    SetAside { url: String, path: StorePath, why: String, again: Duration },
    /// The cache is one that is only read.
    #[error("cannot {act} {url}: it is read only here; give a file://, http:// or s3:// cache")]
    ReadOnly { act: &'static str, url: String },
    /// A local store.
    #[error("local store {url}: {source}")]
    Store { url: String, source: drover_store::Error },
}

impl Error {
    pub(crate) fn io(act: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let act = format!("{act} {}", path.display());
        move |source| Self::Io { act, source }
    }

    /// A stable word for metrics and reasons.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Url { .. } => "url",
            Self::Request { .. } => "request",
            Self::Status { .. } => "status",
            Self::S3 { .. } => "s3",
            Self::Denied { .. } => "denied",
            Self::Io { .. } => "io",
            Self::Read { .. } => "read",
            Self::TooLarge { .. } => "too-large",
            Self::Format { .. } => "format",
            Self::StoreDir { .. } => "store-dir",
            Self::WrongPath { .. } => "wrong-path",
            Self::Untrusted { .. } => "untrusted",
            Self::MissingNar { .. } => "missing-nar",
            Self::Compression { .. } => "compression",
            Self::Content { .. } => "content",
            Self::Frame { .. } => "frame",
            Self::SetAside { .. } => "set-aside",
            Self::ReadOnly { .. } => "read-only",
            Self::Store { .. } => "store",
        }
    }

    /// Whether the same call may well succeed later, nobody having changed anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Request { .. } | Self::Read { .. } | Self::SetAside { .. } => true,
            Self::S3 { transient, .. } => *transient,
            Self::Status { status, .. } => crate::http::transport::may_pass(*status),
            _ => false,
        }
    }
}

fn hint(status: u16) -> &'static str {
    match status {
        407 => "; the proxy wants credentials",
        405 | 409 | 501 => "; a cache that is pushed to must take PUT",
        413 => "; raise the server's limit for bodies",
        507 => "; its disk is full",
        _ => "",
    }
}

fn denied(shown: bool) -> &'static str {
    match shown {
        true => "it does not accept the credentials that are given for this cache, or not for this",
        false => "it wants credentials, and none are given for this cache",
    }
}

/// Causes too: the outermost error of an HTTP client says next to nothing.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}
