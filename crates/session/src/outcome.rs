use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use drover_nix::signature::Signature;
use drover_nix::{ContentAddress, NarInfo, OutputName, PathInfo, Sha256, StorePath};
use drover_serve::BuildResult;

/// A build that succeeded: every output was received, checked and stored.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub outputs: BTreeMap<OutputName, Output>,
    /// What the builder said about it; None if nothing was built.
    pub built: Option<BuildResult>,
    pub transfer: Transfer,
    pub timings: Timings,
}

/// One output as the cache has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Output {
    pub path: StorePath,
    pub nar_hash: Sha256,
    pub nar_size: u64,
    pub references: BTreeSet<StorePath>,
    pub signatures: Vec<Signature>,
    pub ca: Option<ContentAddress>,
}

/// How much moved. Bytes are of NARs, uncompressed, unless they say otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Transfer {
    /// Paths that the build needs.
    pub paths_total: usize,
    /// Of these, paths that the builder had before anybody asked.
    pub paths_present: usize,
    /// And those that it fetched from caches by itself.
    pub paths_fetched: usize,
    pub bytes_fetched: u64,
    /// The rest.
    pub paths_sent: usize,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Compressed, to the cache.
    pub bytes_stored: u64,
}

/// What a session has done, as far as it came: of a phase that did not come to its end nothing is counted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Tally {
    pub transfer: Transfer,
    pub timings: Timings,
}

/// How long each phase took; nothing if it did not come to its end.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Timings {
    pub connect: Duration,
    /// Finding out what the inputs need.
    pub closure: Duration,
    /// Locking it, and the builder's own fetching.
    pub lock: Duration,
    pub copy_in: Duration,
    pub build: Duration,
    pub copy_out: Duration,
    /// Signing and storing.
    pub store: Duration,
}

impl From<&PathInfo> for Output {
    fn from(info: &PathInfo) -> Self {
        Self {
            path: info.path.clone(),
            nar_hash: info.nar_hash,
            nar_size: info.nar_size,
            references: info.references.clone(),
            signatures: info.signatures.clone(),
            ca: info.ca.clone(),
        }
    }
}

impl From<&NarInfo> for Output {
    fn from(narinfo: &NarInfo) -> Self {
        Self::from(&narinfo.info)
    }
}
