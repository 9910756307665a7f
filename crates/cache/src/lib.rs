//! Binary caches and local stores behind one trait: where inputs come from and outputs go to.
//!
//! This crate owns the layout of binary caches (Nix: binary-cache-store.cc), fetching and storing over files, HTTP and S3,
//! compression, and the question whether a cache's word about a path is believed. It is synchronous; an async caller
//! runs it on a blocking thread, which its HTTP client insists on. It knows nothing of builds, builders or Kubernetes.
//!
//! What a cache says about a path ([`Cache::narinfo`]) is checked against [`CacheOptions`] before it is returned; the
//! bytes that [`Cache::nar`] gives are not: read them through [`VerifiedNar`].

mod binary;
mod closure;
mod compression;
mod credentials;
mod crew;
mod error;
mod file;
mod find;
mod frames;
mod guarded;
mod http;
mod local;
mod read;
mod s3;
mod spool;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod tls;
mod trust;
mod verified;

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use drover_nix::signature::PublicKey;
use drover_nix::{NarInfo, PathInfo, StoreDir, StorePath};

pub use drover_store::in_parallel;

pub use closure::{Closure, closure, closure_where};
pub use credentials::{Credentials, Secret};
pub use crew::FrameWriter;
pub use error::Error;
pub use find::find;
pub use frames::FRAME;
pub use guarded::{Counts, Guarded, Memory};
pub use read::{read_drv, read_file, read_nar_file};
pub use s3::{Presigned, presign};
pub use spool::{NarSpool, SpooledNar};
pub use trust::is_self_proving;
pub use verified::VerifiedNar;

/// How caches are read and what of them is believed.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// The store whose paths are wanted. A cache of another store directory is refused.
    pub dir: StoreDir,
    /// If there are any, each path that is not content-addressed must be signed by one of them. Without keys the
    /// cache's own word is enough, unless `require_signatures` says otherwise. That of a local store always is: it
    /// checked when it took the path in.
    pub public_keys: Vec<PublicKey>,
    /// Refuse what is neither signed nor content-addressed even if there are no keys.
    pub require_signatures: bool,
    /// For a connection to stand.
    pub connect_timeout: Duration,
    /// For a server to say something, and between any two pieces of a body.
    pub stall_timeout: Duration,
    /// How often a request is sent before a failure counts, and a broken body is resumed.
    pub attempts: u32,
    /// PEM file of certificate authorities to trust beside the system's.
    pub certificates: Option<PathBuf>,
    /// What is shown to the cache.
    pub credentials: Credentials,
}

impl Default for CacheOptions {
    /// `/nix/store`, no keys, Nix's five attempts.
    fn default() -> Self {
        Self {
            dir: StoreDir::default(),
            public_keys: Vec::new(),
            require_signatures: false,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            attempts: 5,
            certificates: None,
            credentials: Credentials::None,
        }
    }
}

/// Whether [`Cache::put`] wrote anything.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stored {
    New,
    /// The path was there before, as this says, which may be another NAR than the one that was offered.
    Already(Box<NarInfo>),
}

/// What is known of a cache without asking it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Recalled {
    Nothing,
    /// It had the path, and said this.
    Has(Box<NarInfo>),
    /// It lacked the path a moment ago, which decides nothing but who is asked first.
    Lacked,
    /// It was wrong about something: whoever else has the path is to be believed first.
    AskedLast,
}

/// A place that has store objects.
pub trait Cache: Send + Sync {
    /// For people and messages: without secrets.
    fn url(&self) -> String;

    /// What the cache says about a path, None if it does not have it. Fails where the word is not to be believed.
    fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, Error>;

    /// What is known of the path without asking. Most callers want [`find`], which knows what to make of it.
    fn recall(&self, _path: &StorePath) -> Recalled {
        Recalled::Nothing
    }

    /// The decompressed NAR, at most `narSize` bytes of it, not verified. Fails if it is gone.
    fn nar(&self, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, Error>;

    /// Somebody found that what this cache gave for `path` is not what it should be. For a while, those who share this
    /// handle get an error for that path, and [`find`] asks every other cache first for all others. Caches that keep no
    /// memory ([`Guarded`] does) ignore it.
    fn set_aside(&self, _path: &StorePath, _why: &str) {}

    /// Stores an object: the NAR first, what leads to it last, so that a crash anywhere leaves nothing that leads nowhere;
    /// another call completes it. `info` must be `nar`'s. If the path is there already with the same NAR, signatures that
    /// it lacks are added; if its NAR is gone, this one takes its place. Of two that store the same path at once with
    /// different NARs either may be the one that stays.
    fn put(&self, info: &PathInfo, nar: &SpooledNar) -> Result<Stored, Error>;

    /// Stores a build log where `nix log` looks for it. Replaces an earlier one.
    fn put_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<(), Error>;

    /// The build log of a derivation, None if there is none.
    fn log(&self, _drv: &StorePath) -> Result<Option<Box<dyn Read + Send>>, Error> {
        Ok(None)
    }
}

/// Opens a cache: `file://DIR`, `http://…`, `https://…`, `s3://BUCKET?…`, or a local store as Nix writes it (`local?root=…`, `/DIR`,
/// `auto`). Touches the network only when it is used.
pub fn open(url: &str, options: &CacheOptions) -> Result<Arc<dyn Cache>, Error> {
    match url.split_once("://") {
        Some(("file", _)) => Ok(Arc::new(file::open(url, options)?)),
        Some(("http" | "https", _)) => Ok(Arc::new(http::open(url, options)?)),
        Some(("s3", _)) => Ok(Arc::new(s3::open(url, options)?)),
        Some((scheme, _)) if scheme != "local" => Err(Error::Url {
            url: url.to_owned(),
            why: format!(
                "{scheme} is not supported; give file://, http://, https://, s3:// or a local store"
            ),
        }),
        _ => Ok(Arc::new(local::open(url, options)?)),
    }
}
