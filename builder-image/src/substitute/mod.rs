//! Fetching store paths from binary caches (Nix: substitution-goal.cc): what this builder was told to believe of them is
//! checked here, whoever asks.
//!
//! In the order of its story: the caches and what is remembered of their failures ([`source`]), what has to be fetched
//! with a path ([`search`]), and the threads that fetch it ([`crew`]), from streams that may not creep ([`paced`]). Nothing
//! here speaks a protocol or knows of builds. Failing to fetch is no error to whoever asked: the path is not valid then,
//! and the log says why in one line a cache.

mod complaints;
mod crew;
mod paced;
mod search;
mod source;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use drover_cache::{CacheOptions, Credentials, Secret};
use drover_nix::StorePath;
use drover_nix::signature::PublicKey;
use drover_store::{LocalStore, TempRoots};

use self::complaints::Complaints;
use self::source::Source;
use crate::build::cancel::Cancel;
use crate::build::log::Log;

/// For a connection to stand, names and TLS included. Where packets vanish, this is what a build waits for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For an answer to begin, and between any two pieces of it.
const STALL_TIMEOUT: Duration = Duration::from_secs(15);
/// Whoever asked may have other ways to the same path, so that little is tried twice.
const ATTEMPTS: u32 = 2;

/// Where paths are fetched, and what of it is believed.
#[derive(Clone, Default, Debug)]
pub(crate) struct Settings {
    /// URLs of caches, the preferred one first. `?trusted=true` on one: what it says is believed unsigned.
    pub urls: Vec<String>,
    pub public_keys: Vec<PublicKey>,
    /// Whether what is not content-addressed must be signed (Nix: require-sigs).
    pub require_signatures: bool,
    /// None for what is usual here.
    pub connect_timeout: Option<Duration>,
    pub stall_timeout: Option<Duration>,
    /// Users and passwords by host.
    pub netrc: Option<PathBuf>,
    /// Certificate authorities that are trusted beside the machine's.
    pub certificates: Option<PathBuf>,
}

/// The caches of this program; clones are one. Nothing is opened before something is fetched.
#[derive(Clone, Default, Debug)]
pub(crate) struct Substituter(Arc<Inner>);

#[derive(Default, Debug)]
struct Inner {
    settings: Settings,
    store_dir: drover_nix::StoreDir,
    sources: OnceLock<Vec<Source>>,
}

impl Substituter {
    pub(crate) fn new(settings: Settings, store: &LocalStore) -> Self {
        let store_dir = store.store_dir().clone();
        Self(Arc::new(Inner { settings, store_dir, sources: OnceLock::new() }))
    }

    /// Fetches those of `paths` that are not valid, and what they refer to, as far as the caches have it. All of it is kept
    /// from the collector for as long as `roots` are held. As in Nix (store-api.cc, substitutePaths) derivations are not
    /// fetched for their own sake.
    pub(crate) fn fetch(
        &self,
        store: &LocalStore,
        paths: &BTreeSet<StorePath>,
        roots: &TempRoots,
        log: &Log,
        cancel: &Cancel,
    ) {
        if self.0.settings.urls.is_empty() {
            return;
        }
        let complaints = Complaints::new(log);
        let sources = self.0.sources.get_or_init(|| self.open(log));
        let wanted = paths.iter().filter(|path| !path.is_derivation()).cloned();
        let fetched = search::search(store, sources, wanted.collect(), roots, cancel, &complaints)
            .and_then(|plan| crew::fetch(store, sources, &plan, cancel, &complaints));
        if let Err(error) = fetched {
            log.note(&format!("paths were not fetched from caches: {error}"));
        }
    }

    /// A cache that cannot be used is as good as one that has nothing.
    fn open(&self, log: &Log) -> Vec<Source> {
        let settings = &self.0.settings;
        let credentials = match settings.netrc.as_deref().map(std::fs::read_to_string) {
            Some(Ok(text)) => Credentials::Netrc(Secret::new(text)),
            Some(Err(error)) => {
                log.note(&format!("cannot read the netrc file, so caches are asked without: {error}"));
                Credentials::None
            }
            None => Credentials::None,
        };
        let options = CacheOptions {
            dir: self.0.store_dir.clone(),
            public_keys: settings.public_keys.clone(),
            require_signatures: settings.require_signatures,
            connect_timeout: settings.connect_timeout.unwrap_or(CONNECT_TIMEOUT),
            stall_timeout: settings.stall_timeout.unwrap_or(STALL_TIMEOUT),
            attempts: ATTEMPTS,
            certificates: settings.certificates.clone(),
            credentials,
        };
        let open = |url: &String| {
            let options = match (is_trusted(url), settings.require_signatures) {
                (false, true) => options.clone(),
                // Keys alone would ask for signatures, too.
                _ => CacheOptions { public_keys: Vec::new(), require_signatures: false, ..options.clone() },
            };
            match drover_cache::open(url, &options) {
                Ok(cache) => Some(Source::new(cache, url)),
                Err(error) => {
                    log.note(&format!("nothing is fetched from a cache: {error}"));
                    None
                }
            }
        };
        settings.urls.iter().filter_map(open).collect()
    }
}

/// Whether a cache's own word is enough (Nix: store-api.hh, the store's setting `trusted`).
fn is_trusted(url: &str) -> bool {
    let (_, query) = url.split_once('?').unwrap_or_default();
    query.split('&').any(|pair| matches!(pair, "trusted=true" | "trusted=1" | "trusted=yes"))
}
