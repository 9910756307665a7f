//! What every part of the running operator shares.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_api::BuilderClass;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::runtime::reflector::Store;

use crate::clock::Clock;
use crate::error::Error;
use crate::keys::Seed;
use crate::metrics::Metrics;
use crate::ready::Ready;
use crate::session::Sessions;
use crate::session::job::Caches;
use crate::settings::Settings;
use crate::world::Lookup;

/// The longest that one request to the API server may take, with all that the client repeats within it.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// One of these a process.
pub struct Operator {
    pub client: Client,
    pub settings: Settings,
    pub seed: Seed,
    pub metrics: Arc<Metrics>,
    pub clock: Clock,
    pub ready: Arc<Ready>,
    /// What the watches have seen. Requests come with each reconcile.
    pub classes: Store<BuilderClass>,
    pub pods: Store<Pod>,
    pub sessions: Sessions,
    pub caches: Arc<Caches>,
    pub lookups: Lookups,
}

/// What was found in caches, by request; one attempt's answer at a time. Lost with the process, and asked again.
#[derive(Default)]
pub struct Lookups(Mutex<HashMap<String, (u32, Lookup)>>);

impl Lookups {
    /// The answer for this attempt.
    pub fn get(&self, uid: &str, attempt: u32) -> Lookup {
        match self.lock().get(uid) {
            Some((of, lookup)) if *of == attempt => lookup.clone(),
            _ => Lookup::Unknown,
        }
    }

    pub fn set(&self, uid: &str, attempt: u32, lookup: Lookup) {
        self.lock().insert(uid.to_owned(), (attempt, lookup));
    }

    pub fn forget(&self, uid: &str) {
        self.lock().remove(uid);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, (u32, Lookup)>> {
        // One insertion or removal at a time: whole after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request to the API server, bounded in time. `act` completes "cannot …".
pub async fn call<T>(
    act: &'static str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(CALL_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(Error::kube(act)),
        Err(_) => Err(Error::KubeTimeout { act, seconds: CALL_TIMEOUT.as_secs() }),
    }
}
