//! From a request and its class to what `drover_session` runs.
//!
//! [`JobPlan`] is plain data and can be made anywhere. Opening caches blocks, and dropping one may: a [`Job`] lives on
//! threads that may block, and the handles that it shares live in [`Caches`] for as long as the process.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_api::{BuildRequestSpec, ClassCache, OutputStatus, Reason, Timings, Transfer, Trust};
use drover_cache::{Cache, CacheOptions, Counts, Credentials, Guarded, Memory};
use drover_nix::signature::{PublicKey, SecretKey};
use drover_nix::{BasicDerivation, StoreDir, StorePath};
use drover_serve::BuildOptions;
use drover_session::{Failure, Job, Outcome, Proofs, Tally};

use crate::error::Error;
use crate::plan::Accepted;
use crate::world::SessionEnd;

/// All that a build needs to know, and no handle of anything.
#[derive(Clone)]
pub struct JobPlan {
    pub derivation: BasicDerivation,
    pub drv_path: StorePath,
    pub options: BuildOptions,
    pub caches: Vec<ClassCache>,
    /// What each of them wants to see, in their order; nothing if there are fewer.
    pub credentials: Vec<Credentials>,
    /// Text of the class's secret key.
    pub signing_key: Option<String>,
    pub trust: Trust,
    pub max_output_bytes: Option<u64>,
    pub spool_dir: PathBuf,
}

impl JobPlan {
    pub fn new(
        accepted: Accepted<'_>,
        spec: &BuildRequestSpec,
        signing_key: Option<String>,
        credentials: Vec<Credentials>,
        spool_dir: PathBuf,
    ) -> Self {
        let class = accepted.class;
        Self {
            derivation: accepted.derivation,
            drv_path: accepted.drv_path,
            options: BuildOptions {
                max_silent_seconds: spec.max_silent_seconds.unwrap_or(0).into(),
                timeout_seconds: spec.timeout_seconds.unwrap_or(0).into(),
                max_log_bytes: spec.max_log_bytes.unwrap_or(0),
                ..BuildOptions::default()
            },
            caches: class.caches.clone(),
            credentials,
            signing_key,
            trust: class.trust,
            max_output_bytes: spec.max_output_bytes.into_iter().chain(class.max_output_bytes).min(),
            spool_dir,
        }
    }

    /// Opens what the plan names. Blocks.
    pub fn open(&self, handles: &Caches) -> Result<Job, Error> {
        let dir = StoreDir::default();
        let signing_key = self.signing_key()?;
        let caches = handles.open_all(&self.believed(signing_key.as_deref()), &self.credentials)?;
        // The last of them that says so.
        let push =
            self.caches.iter().rposition(|cache| cache.push).and_then(|index| caches.get(index)).cloned();
        Ok(Job {
            dir,
            drv_path: self.drv_path.clone(),
            derivation: self.derivation.clone(),
            options: self.options.clone(),
            caches,
            push,
            signing_key,
            trust: match self.trust {
                Trust::Claimed => drover_session::Trust::Claimed,
                Trust::Verified => drover_session::Trust::Verified,
            },
            proven: handles.proven.clone(),
            max_output_bytes: self.max_output_bytes,
            spool_dir: self.spool_dir.clone(),
            kept: Arc::default(),
        })
    }

    fn signing_key(&self) -> Result<Option<Arc<SecretKey>>, Error> {
        let Some(text) = &self.signing_key else { return Ok(None) };
        let fail = |error: drover_nix::Error| Error::Secret {
            name: "of the class's signing key".into(),
            why: error.to_string(),
        };
        Ok(Some(Arc::new(SecretKey::parse(text).map_err(fail)?)))
    }

    /// The class's caches. What it signed itself it believes as well (Nix: keys.cc, getDefaultPublicKeys): else its own
    /// outputs would be no inputs.
    fn believed(&self, own: Option<&SecretKey>) -> Vec<ClassCache> {
        let mut caches = self.caches.clone();
        if let Some(own) = own.map(|key| key.public().to_string()) {
            let signed = caches.iter_mut().filter(|cache| cache.push && !cache.public_keys.is_empty());
            for cache in signed.filter(|cache| !cache.public_keys.contains(&own)) {
                cache.public_keys.push(own.clone());
            }
        }
        caches
    }
}

/// Handles of caches, one for each set of what decides about it. They keep their connections open between builds, and
/// remember for all of them what the cache had and where it was wrong.
#[derive(Default)]
pub struct Caches {
    open: Mutex<HashMap<Key, Handle>>,
    /// What was asked of handles that others have replaced.
    replaced: Mutex<Counts>,
    troubles: AtomicU64,
    /// Derivations that were proven from what caches have; true whichever cache it was.
    proven: Arc<Proofs>,
}

/// URL, public keys, and the Secret with the credentials. When what is in it changes, a new handle takes the old one's place.
type Key = (String, Vec<String>, Option<String>);
type Handle = (Credentials, Arc<Guarded>);

impl Caches {
    /// The handles of a class's caches, in their order. Credentials are in the same order; those at the end may lack.
    pub fn open_all(
        &self,
        caches: &[ClassCache],
        credentials: &[Credentials],
    ) -> Result<Vec<Arc<dyn Cache>>, Error> {
        let credentials = credentials.iter().chain(std::iter::repeat(&Credentials::None));
        caches.iter().zip(credentials).map(|(cache, credentials)| self.open(cache, credentials)).collect()
    }

    /// Blocks: on the network if the cache is remote.
    pub fn open(&self, cache: &ClassCache, credentials: &Credentials) -> Result<Arc<dyn Cache>, Error> {
        let fail = |why: String| Error::Cache { url: cache.url.clone(), why };
        let secret = cache.credentials_secret_ref.as_ref().map(|secret| secret.name.clone());
        let key = (cache.url.clone(), cache.public_keys.clone(), secret);
        // A panic while the lock is held leaves a map that is still whole. It is not held while the cache is asked.
        let lock = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, handle)) = lock().get(&key)
            && of == credentials
        {
            return Ok(handle.clone());
        }
        let public_keys = cache
            .public_keys
            .iter()
            .map(|key| key.parse::<PublicKey>())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| fail(error.to_string()))?;
        let options = CacheOptions {
            // A class without keys believes its cache unsigned.
            require_signatures: !public_keys.is_empty(),
            public_keys,
            credentials: credentials.clone(),
            ..CacheOptions::default()
        };
        let handle = drover_cache::open(&cache.url, &options).map_err(|error| fail(error.to_string()))?;
        let handle = Arc::new(Guarded::new(handle, Memory::of(&cache.url)));
        // Who came first shares its handle. The lock is free again when another one ends.
        let mut open = lock();
        let old = match open.get(&key) {
            Some((of, first)) if of == credentials => return Ok(first.clone()),
            _ => open.insert(key, (credentials.clone(), handle.clone())),
        };
        if let Some((_, old)) = &old {
            add(&mut self.replaced.lock().unwrap_or_else(PoisonError::into_inner), old.counts());
        }
        drop(open);
        drop(old);
        Ok(handle)
    }

    /// What became of questions to all caches. Does not block.
    pub fn counts(&self) -> Counts {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = *self.replaced.lock().unwrap_or_else(PoisonError::into_inner);
        open.values().for_each(|(_, handle)| add(&mut sum, handle.counts()));
        sum
    }

    /// A look-up met a cache that could not be asked.
    pub fn note_trouble(&self) {
        self.troubles.fetch_add(1, Ordering::Relaxed);
    }

    /// How often one did.
    pub fn troubles(&self) -> u64 {
        self.troubles.load(Ordering::Relaxed)
    }
}

fn add(sum: &mut Counts, more: Counts) {
    sum.recalled += more.recalled;
    sum.asked += more.asked;
    sum.wrong += more.wrong;
}

/// What the status says of an outcome. `reached_after`: from a pod with a node to a connection.
pub fn finished(dir: &StoreDir, outcome: &Outcome, reached_after: Duration) -> SessionEnd {
    let (transfer, timings) =
        counted(&Tally { transfer: outcome.transfer, timings: outcome.timings }, reached_after);
    SessionEnd::Finished { outputs: outputs(dir, outcome), transfer, timings }
}

/// What the status says of what a session has done. Phases that did not come to their end have no time.
pub fn counted(tally: &Tally, reached_after: Duration) -> (Transfer, Timings) {
    let Tally { transfer, timings } = tally;
    let millis = |duration: Duration| Some(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
    let sum = |parts: &[Duration]| match parts.last() {
        Some(last) if !last.is_zero() => millis(parts.iter().sum()),
        _ => None,
    };
    let transfer = Transfer {
        paths_total: transfer.paths_total as u64,
        paths_present: transfer.paths_present as u64,
        paths_fetched: transfer.paths_fetched as u64,
        bytes_fetched: transfer.bytes_fetched,
        paths_sent: transfer.paths_sent as u64,
        bytes_sent: transfer.bytes_sent,
        bytes_received: transfer.bytes_received,
        bytes_stored: transfer.bytes_stored,
    };
    let timings = Timings {
        queued_millis: None,
        pod_start_millis: millis(reached_after),
        connect_millis: sum(&[timings.connect]),
        copy_in_millis: sum(&[timings.closure, timings.lock, timings.copy_in]),
        build_millis: sum(&[timings.build]),
        collect_millis: sum(&[timings.copy_out, timings.store]),
    };
    (transfer, timings)
}

/// The outputs with full paths.
pub fn outputs(dir: &StoreDir, outcome: &Outcome) -> BTreeMap<String, OutputStatus> {
    let status = |output: &drover_session::Output| OutputStatus {
        path: dir.full(&output.path),
        nar_hash: output.nar_hash.to_string(),
        nar_size: output.nar_size,
        references: output.references.iter().map(|path| dir.full(path)).collect(),
        references_omitted: None,
        signatures: output.signatures.iter().map(ToString::to_string).collect(),
        ca: output.ca.as_ref().map(ToString::to_string),
    };
    outcome.outputs.iter().map(|(name, output)| (name.to_string(), status(output))).collect()
}

/// What the status says of a failure. The words of both sides are the same; one that the API does not know would be
/// the machinery's fault.
pub fn failed(failure: &Failure) -> SessionEnd {
    SessionEnd::Failed {
        reason: reason(failure.reason),
        message: failure.message.clone(),
        infrastructure: failure.infrastructure,
    }
}

/// The session's word as the API's.
pub fn reason(reason: drover_session::Reason) -> Reason {
    // A word that the API does not know would be a mistake of ours, not of the build's; a test looks for one.
    Reason::parse(reason.as_str()).unwrap_or(Reason::InfrastructureFailure)
}

#[cfg(test)]
mod tests {
    use drover_api::BuilderClassSpec;

    use super::*;

    #[test]
    fn handles_are_shared_as_long_as_credentials_stay() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ClassCache { url: format!("file://{}", dir.path().display()), ..ClassCache::default() };
        let caches = Caches::default();
        let with = |token: &str| {
            caches.open(&cache, &Credentials::Bearer(drover_cache::Secret::new(token))).unwrap()
        };
        let first = with("1");
        assert!(Arc::ptr_eq(&first, &with("1")));
        let second = with("2");
        assert!(!Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&second, &with("2")));
        assert_eq!(caches.open.lock().unwrap().len(), 1);
        // What one build finds wrong, another one hears of.
        let path = "f8g8x4m83da3b2f79iv84q2r3qlc58lr-lib".parse().unwrap();
        second.set_aside(&path, "its hash is another");
        assert_eq!(with("2").narinfo(&path).unwrap_err().category(), "set-aside");
        // Metrics know of it, and still do when the handle was replaced.
        assert_eq!(caches.counts().wrong, 1);
        with("3").set_aside(&path, "once more");
        assert_eq!(caches.counts().wrong, 2);
        let second = with("2");
        // Another class, which names no Secret, does not use a handle that shows one.
        assert!(!Arc::ptr_eq(&second, &caches.open(&cache, &Credentials::None).unwrap()));
        let other = ClassCache {
            credentials_secret_ref: Some(drover_api::SecretKeyRef { name: "other".into(), key: None }),
            ..cache.clone()
        };
        assert!(!Arc::ptr_eq(&second, &caches.open(&other, &Credentials::None).unwrap()));
    }

    #[test]
    fn phases_without_an_end_have_no_time() {
        let second = Duration::from_secs(1);
        let mut tally = Tally::default();
        (tally.timings.connect, tally.timings.closure, tally.timings.lock) = (second, second, second);
        tally.transfer.paths_fetched = 2;
        let (transfer, timings) = counted(&tally, second);
        assert_eq!((timings.pod_start_millis, timings.connect_millis), (Some(1000), Some(1000)));
        assert_eq!(
            (timings.copy_in_millis, timings.build_millis, timings.collect_millis),
            (None, None, None)
        );
        assert_eq!(transfer.paths_fetched, 2);
        tally.timings.copy_in = second;
        assert_eq!(counted(&tally, second).1.copy_in_millis, Some(3000));
    }

    #[test]
    fn nobody_gets_more_disk_than_the_class_gives() {
        let of = |request: Option<u64>, class: Option<u64>| {
            let class = BuilderClassSpec { max_output_bytes: class, ..BuilderClassSpec::default() };
            let derivation = BasicDerivation {
                name: "x".into(),
                outputs: BTreeMap::new(),
                input_srcs: Default::default(),
                system: "x86_64-linux".into(),
                builder: "/bin/sh".into(),
                args: Vec::new(),
                env: Default::default(),
            };
            let drv_path = "f8g8x4m83da3b2f79iv84q2r3qlc58lr-x.drv".parse().unwrap();
            let accepted = Accepted { derivation, drv_path, class_name: "small", class: &class };
            let spec = BuildRequestSpec { max_output_bytes: request, ..BuildRequestSpec::default() };
            JobPlan::new(accepted, &spec, None, vec![], "/tmp".into()).max_output_bytes
        };
        let cases = [
            (None, None, None),
            (None, Some(5), Some(5)),
            (Some(9), Some(5), Some(5)),
            (Some(3), Some(5), Some(3)),
        ];
        for (request, class, expected) in cases {
            assert_eq!(of(request, class), expected);
        }
        assert_eq!(of(Some(7), None), Some(7));
    }

    #[test]
    fn a_class_believes_what_it_signed() {
        let own = SecretKey::from_seed("own-1", &[1; 32]).unwrap();
        let cache = |push, keys: &[&str]| ClassCache {
            push,
            public_keys: keys.iter().map(|key| (*key).to_owned()).collect(),
            ..ClassCache::default()
        };
        let mine = own.public().to_string();
        let caches =
            vec![cache(true, &["a:b"]), cache(true, &[&mine]), cache(true, &[]), cache(false, &["a:b"])];
        let plan = JobPlan {
            derivation: BasicDerivation {
                name: "x".into(),
                outputs: BTreeMap::new(),
                input_srcs: Default::default(),
                system: "x86_64-linux".into(),
                builder: "/bin/sh".into(),
                args: Vec::new(),
                env: BTreeMap::new(),
            },
            drv_path: "f8g8x4m83da3b2f79iv84q2r3qlc58lr-x.drv".parse().unwrap(),
            options: BuildOptions::default(),
            caches,
            credentials: Vec::new(),
            signing_key: None,
            trust: Trust::Verified,
            max_output_bytes: None,
            spool_dir: PathBuf::new(),
        };
        let keys = |own| plan.believed(own).into_iter().map(|cache| cache.public_keys).collect::<Vec<_>>();
        let other = "a:b".to_owned();
        assert_eq!(
            keys(Some(&own)),
            [vec![other.clone(), mine.clone()], vec![mine], vec![], vec![other.clone()]]
        );
        assert_eq!(keys(None)[0], [other]);
    }

    #[test]
    fn every_reason_of_a_session_is_a_final_reason_of_the_api() {
        use drover_session::Reason as R;
        for reason in [
            R::BuildFailed,
            R::BuilderLost,
            R::ConnectionLost,
            R::DiskFull,
            R::InfrastructureFailure,
            R::InputHashMismatch,
            R::InputMissing,
            R::InvalidDerivation,
            R::LogLimitExceeded,
            R::MaxSilentExceeded,
            R::NotDeterministic,
            R::OutOfMemory,
            R::OutputHashMismatch,
            R::OutputRejected,
            R::OutputSizeLimitExceeded,
            R::PathNotProven,
            R::TimedOut,
            R::WrongSystem,
        ] {
            assert!(Reason::parse(reason.as_str()).is_some_and(Reason::is_terminal), "{reason}");
        }
    }
}
