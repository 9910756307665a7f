//! A process's life: it stands by until it leads, works while it leads, and ends in order when it is told to.
//!
//! The order of the end is: no new work, reconciles that run come to theirs, sessions are closed (their builders go on
//! without us, and are found again), the gate is shut, and last of all the lease is given back. Whoever takes it then meets
//! nobody. A leader that loses the lease ends at once and with an error: what it has in memory is of no use to anybody.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::{HeaderValue, USER_AGENT};
use kube::Client;
use kube::client::ClientBuilder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::clock::Clock;
use crate::controller::{self, Parts};
use crate::error::Error;
use crate::gate::Gate;
use crate::health::Health;
use crate::lease::{Election, Leadership};
use crate::metrics::Metrics;
use crate::metrics::api::Count;
use crate::seed;
use crate::session::Conversation;
use crate::settings::{FIELD_MANAGER, Settings};
use crate::trace::Tracer;

/// How long work that runs may take to come to its end.
const LAST_WORK: Duration = Duration::from_secs(15);
/// Exit code of a process that was told twice to end: it did not wait for anything.
const IMPATIENT: i32 = 1;

/// All that a process is told.
pub struct Process {
    pub config: kube::Config,
    /// Of the pod, or of whatever else tells processes apart for people.
    pub name: String,
    /// None: it leads without asking.
    pub election: Option<Election>,
    pub seed: SeedSource,
    pub settings: Settings,
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    pub conversation: Arc<dyn Conversation>,
    pub tracer: Tracer,
}

/// Where the seed is.
#[derive(Clone, Debug)]
pub enum SeedSource {
    File(PathBuf),
    /// Name of a Secret in the operator's namespace; made if it is not there.
    Secret(String),
}

/// Whether the process was told to end. All clones hear of it.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    /// By SIGTERM or SIGINT. A second one ends the process on the spot.
    pub fn on_signals() -> std::io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(async move {
            let mut next = async || {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            next().await;
            tracing::info!("shutting down; a second signal does not wait for anything");
            stop.send_replace(true);
            next().await;
            std::process::exit(IMPATIENT);
        });
        Ok(Self(stopped))
    }

    /// Resolves as soon as it is to end.
    pub async fn requested(mut self) {
        // The sender lives until the process ends.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

impl Process {
    /// Stands by, leads, and ends when it is told to, or with the error that keeps it from leading.
    pub async fn run(self, stop: Stop) -> Result<(), Error> {
        let gate = match self.election {
            Some(_) => Gate::shut(),
            None => Gate::open(),
        };
        tokio::spawn(self.health.clone().beat_runtime());
        tokio::spawn({
            let (health, stop) = (self.health.clone(), stop.clone());
            async move {
                stop.requested().await;
                health.stopping();
            }
        });
        let mut leadership = None;
        if let Some(election) = &self.election {
            let client = self.lease_client()?;
            let acquired = Leadership::acquire(client, election.clone(), gate.clone(), self.health.clone());
            tokio::select! {
                biased;
                () = stop.clone().requested() => return Ok(()),
                taken = acquired => leadership = Some(taken),
            }
        } else {
            self.health.lease_unused();
        }
        self.metrics.leader.set(1);
        let lost = async {
            match &mut leadership {
                Some(leadership) => leadership.lost().await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            biased;
            error = lost => return Err(error),
            ended = self.work(&gate, stop.clone()) => ended,
            () = async { stop.requested().await; tokio::time::sleep(LAST_WORK).await } => {
                tracing::warn!("work did not end within {LAST_WORK:?}; leaving it");
                Ok(())
            }
        };
        self.metrics.leader.set(0);
        gate.close();
        if let Some(leadership) = leadership
            && let Err(error) = leadership.release().await
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the lease was not given back; others wait for its end");
        }
        ended
    }

    async fn work(&self, gate: &Gate, stop: Stop) -> Result<(), Error> {
        let client = self.client(gate)?;
        let seed = match &self.seed {
            SeedSource::File(path) => seed::from_file(path)?,
            SeedSource::Secret(name) => seed::from_secret(&client, &self.settings.namespace, name).await?,
        };
        let parts = Parts {
            client,
            settings: self.settings.clone(),
            seed,
            metrics: self.metrics.clone(),
            health: self.health.clone(),
            clock: Clock::system(),
            conversation: self.conversation.clone(),
            tracer: self.tracer.clone(),
        };
        controller::run(parts, stop.requested()).await;
        Ok(())
    }

    /// What everything but the lease is written with.
    fn client(&self, gate: &Gate) -> Result<Client, Error> {
        let builder = ClientBuilder::try_from(self.config()).map_err(Error::kube("make a client"))?;
        Ok(builder.with_layer(&Count(self.metrics.clone())).with_layer(gate).build())
    }

    /// Without the gate, and with a connection of its own: renewals wait for nothing else. What fails is tried again by those
    /// who know how much time there is.
    fn lease_client(&self) -> Result<Client, Error> {
        let mut config = self.config();
        config.default_retry = false;
        let builder = ClientBuilder::try_from(config).map_err(Error::kube("make a client"))?;
        Ok(builder.with_layer(&Count(self.metrics.clone())).build())
    }

    /// Who asks, as the API server's audit log shows it.
    fn config(&self) -> kube::Config {
        let mut config = self.config.clone();
        let agent = format!("{FIELD_MANAGER}/{} ({})", env!("CARGO_PKG_VERSION"), self.name);
        if let Ok(agent) = HeaderValue::from_str(&agent) {
            config.headers.push((USER_AGENT, agent));
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Secret;
    use kube::Api;
    use kube::api::PostParams;

    use super::*;
    use crate::session::Ssh;
    use crate::settings::Timeouts;

    /// Nobody listens at that address: what gets past the gate fails otherwise.
    #[tokio::test]
    async fn everything_but_the_lease_is_written_behind_the_gate() {
        // Another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let process = process();
        let write = async |client: Client| {
            let secrets: Api<Secret> = Api::namespaced(client, "drover-system");
            let written = secrets.create(&PostParams::default(), &Secret::default()).await;
            written.map_err(Error::kube("write")).unwrap_err().category()
        };
        assert_eq!(write(process.client(&Gate::shut()).unwrap()).await, "not-leading");
        assert_eq!(write(process.client(&Gate::open()).unwrap()).await, "api-transport");
        assert_eq!(write(process.lease_client().unwrap()).await, "api-transport");
    }

    fn process() -> Process {
        Process {
            config: kube::Config::new("http://127.0.0.1:1".parse().unwrap()),
            name: "test".into(),
            election: None,
            seed: SeedSource::Secret("seed".into()),
            settings: Settings {
                namespace: "drover-system".into(),
                builder_namespace: "drover-builders".into(),
                builder_image: "drover.test/none:1".into(),
                builder_pull_policy: "Never".into(),
                builder_pull_secrets: vec![],
                max_sessions: 1024,
                pod_deadline_seconds: 60,
                work_dir: "/tmp".into(),
                concurrency: 1,
                timeouts: Timeouts::default(),
                scope: Default::default(),
            },
            metrics: Arc::default(),
            health: Arc::default(),
            conversation: Arc::new(Ssh),
            tracer: Tracer::off(),
        }
    }
}
