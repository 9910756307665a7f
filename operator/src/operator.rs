//! What every part of the running operator shares.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_api::BuilderClass;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::runtime::reflector::Store;

use crate::backoff::Backoffs;
use crate::clock::Clock;
use crate::error::Error;
use crate::events::publish::Events;
use crate::health::Health;
use crate::keys::Seed;
use crate::lookup::Doors;
use crate::metrics::Metrics;
use crate::obstacle::Obstacles;
use crate::queue::Queue;
use crate::ready::Ready;
use crate::refusal::Refusals;
use crate::session::Sessions;
use crate::session::job::Caches;
use crate::settings::Settings;
use crate::trace::Tracer;

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
    pub health: Arc<Health>,
    /// What the watches have seen. Requests come with each reconcile.
    pub classes: Store<BuilderClass>,
    pub pods: Store<Pod>,
    pub sessions: Sessions,
    pub caches: Arc<Caches>,
    /// Of requests whose last pass failed.
    pub backoffs: Mutex<Backoffs>,
    /// What requests mean for each other; whose turn it is.
    pub queue: Arc<Queue>,
    /// Look-ups in caches that are under way.
    pub doors: Doors,
    pub refusals: Refusals,
    pub obstacles: Obstacles,
    pub events: Events,
    pub tracer: Tracer,
}

impl Operator {
    pub fn backoffs(&self) -> MutexGuard<'_, Backoffs> {
        // A map of numbers: fit for use after a panic.
        self.backoffs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request to the API server, bounded in time. `act` completes "cannot …".
pub async fn call<T>(
    act: &'static str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    call_within(CALL_TIMEOUT, act, request).await
}

/// As [`call`], for those who have less time.
pub async fn call_within<T>(
    limit: Duration,
    act: &'static str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, request).await {
        Ok(answer) => answer.map_err(Error::kube(act)),
        Err(_) => Err(Error::KubeTimeout { act, seconds: limit.as_secs() }),
    }
}
