//! Leadership by a Lease (coordination.k8s.io): standing by, keeping it, giving it back.
//!
//! [`record`] decides; this is the thin edge that reads and writes. Each write of the Lease names the version that it was made
//! from, so that of two processes that take it at once one is refused. The [`Gate`] is opened from here and nowhere else:
//! each renewal opens it for the renew deadline, counted from *before* the renewal was sent. Others may take the Lease after
//! the lease's duration, counted from when they *saw* the renewal. The difference, 5 s by default, is what a write that is
//! under way has left to arrive.
//!
//! Own code and no library, because none for this version of kube can do that: `kube-lease-manager` 0.13.1 compares the
//! holder's wall clock with its own, writes renewals and takeovers as patches that name no version (two may take an expired
//! lease at once, and a stolen one is renewed before it is looked at), and waits for the API server without a bound.

pub mod record;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::error::Error;
use crate::gate::Gate;
use crate::health::{Health, Loop};
use crate::operator::call_within;
use crate::settings::FIELD_MANAGER;
use record::{Sighting, Step};

/// The longest that one request about the Lease may take: a hung connection is left while there is time for another one.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Which Lease, who asks for it, and how long things last.
#[derive(Clone, Debug)]
pub struct Election {
    pub namespace: String,
    pub name: String,
    /// Of this process and no other, not even of an earlier one in the same pod.
    pub identity: String,
    pub timing: Timing,
}

#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long others wait after they last saw a sign of the holder. Whole seconds.
    duration: Duration,
    /// How long the holder writes, and tries on, after its last renewal that succeeded.
    renew_deadline: Duration,
    /// Between two renewals, and between two looks of one who stands by.
    retry_period: Duration,
}

impl Timing {
    /// Checked as `client-go` does: what is not in this order cannot keep two leaders apart.
    pub fn new(duration: Duration, renew_deadline: Duration, retry_period: Duration) -> Result<Self, Error> {
        let in_order = duration > renew_deadline && renew_deadline > retry_period && !retry_period.is_zero();
        match in_order {
            true => Ok(Self { duration, renew_deadline, retry_period }),
            false => Err(Error::Lease {
                why: format!(
                    "its duration ({duration:?}) has to be longer than the renew deadline ({renew_deadline:?}), and that \
                     longer than the retry period ({retry_period:?})"
                ),
            }),
        }
    }
}

/// Leadership, kept by a task of its own. Dropped, it is kept no longer, and others wait for its end.
pub struct Leadership {
    keeper: JoinHandle<Result<(), Error>>,
    give_back: Option<oneshot::Sender<()>>,
}

impl Leadership {
    /// Stands by until the Lease can be taken, and takes it; `gate` is open then. The client is one without that gate.
    ///
    /// Does not fail: what the API server refuses today, it may grant tomorrow. It is logged.
    pub async fn acquire(client: Client, election: Election, gate: Gate, health: Arc<Health>) -> Self {
        let candidate =
            Candidate { api: Api::namespaced(client, &election.namespace), election, gate, health };
        let held = candidate.stand_by().await;
        let (give_back, asked) = oneshot::channel();
        let keeper = tokio::spawn(async move { candidate.keep(held, asked).await });
        Self { keeper, give_back: Some(give_back) }
    }

    /// Resolves when leadership is lost; the gate is closed by then.
    pub async fn lost(&mut self) -> Error {
        match (&mut self.keeper).await {
            Ok(Err(error)) => error,
            Ok(Ok(())) => Error::Lease { why: "it was given back".into() },
            Err(panic) => Error::Lease { why: format!("the task that renews it ended badly: {panic}") },
        }
    }

    /// Closes the gate and gives the Lease back, so that another process has it at once. Bounded in time.
    pub async fn release(mut self) -> Result<(), Error> {
        if let Some(give_back) = self.give_back.take() {
            // The keeper is gone only after it was lost.
            let _ = give_back.send(());
        }
        match (&mut self.keeper).await {
            Ok(ended) => ended,
            Err(panic) => Err(Error::Lease { why: format!("the task that renews it ended badly: {panic}") }),
        }
    }
}

impl Drop for Leadership {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// The Lease as this process wrote it.
struct Held {
    lease: Lease,
    /// Before the write was sent.
    since: Instant,
}

struct Candidate {
    api: Api<Lease>,
    election: Election,
    gate: Gate,
    health: Arc<Health>,
}

impl Candidate {
    async fn stand_by(&self) -> Held {
        let Election { identity, timing, .. } = &self.election;
        let mut seen: Option<Sighting> = None;
        let mut told: Option<String> = None;
        loop {
            self.health.beat(Loop::Lease);
            match self.look(&mut seen).await {
                Ok(Some(held)) => {
                    self.gate.open_until(held.since + timing.renew_deadline);
                    self.health.lease_held(self.gate.clone());
                    tracing::info!(identity, lease = self.election.name, "leading");
                    return held;
                }
                Ok(None) => {
                    self.health.lease_seen();
                    let holder = seen.as_ref().and_then(Sighting::holder).map(str::to_owned);
                    if holder.is_some() && holder != told {
                        tracing::info!(identity, holder, lease = self.election.name, "standing by");
                        told = holder;
                    }
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(
                        error,
                        lease = self.election.name,
                        "cannot ask for the lease; trying again"
                    );
                }
            }
            tokio::time::sleep(timing.retry_period).await;
        }
    }

    /// One look at the Lease; taken if it can be.
    async fn look(&self, seen: &mut Option<Sighting>) -> Result<Option<Held>, Error> {
        let Election { name, identity, timing, .. } = &self.election;
        let Some(lease) = call("read the lease", self.api.get_opt(name)).await? else {
            *seen = None;
            let lease = record::first(name, identity, timing.duration, Timestamp::now());
            return self.write(lease, "make the lease").await;
        };
        let now = Instant::now();
        let before = seen.take();
        let sighting = seen.insert(Sighting::next(before, lease, now));
        match sighting.step(identity, timing.duration, now) {
            Step::Wait(_) => Ok(None),
            // Ours: the answer to our write was lost. It is written again, so that its age is known.
            Step::Take | Step::Ours => {
                let lease = record::taken(&sighting.lease, identity, timing.duration, Timestamp::now());
                self.write(lease, "take the lease").await
            }
        }
    }

    /// Writes over the version that was read; None if somebody else was faster.
    async fn write(&self, lease: Lease, act: &'static str) -> Result<Option<Held>, Error> {
        let params = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
        let since = Instant::now();
        let is_new = lease.metadata.resource_version.is_none();
        let written = match is_new {
            true => call(act, self.api.create(&params, &lease)).await,
            false => call(act, self.api.replace(&self.election.name, &params, &lease)).await,
        };
        match written {
            Ok(lease) => Ok(Some(Held { lease, since })),
            Err(Error::Kube { source, .. }) if is_refused(&source, is_new) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Renews until it is lost, which is an error, or to be given back.
    async fn keep(self, mut held: Held, mut asked: oneshot::Receiver<()>) -> Result<(), Error> {
        let Timing { renew_deadline, retry_period, .. } = self.election.timing;
        let mut due = held.since + retry_period;
        let mut last_error: Option<Error> = None;
        loop {
            self.health.beat(Loop::Lease);
            let end = held.since + renew_deadline;
            tokio::select! {
                biased;
                // Dropped without a word: nobody waits for us any more.
                asked = &mut asked => {
                    self.gate.close();
                    return match asked {
                        Ok(()) => self.give_back(&held).await,
                        Err(_) => Ok(()),
                    };
                }
                () = tokio::time::sleep_until(due.min(end)) => {}
            }
            if Instant::now() >= end {
                self.gate.close();
                let why = last_error
                    .map_or_else(|| "no renewal was tried in time".into(), |error| error.to_string());
                return Err(Error::Lease {
                    why: format!("it could not be renewed within {renew_deadline:?}: {why}"),
                });
            }
            let began = Instant::now();
            // In no case longer than until the end; the gate would be shut anyway.
            match tokio::time::timeout_at(end, self.renew(&held)).await {
                Ok(Ok(renewed)) => {
                    self.gate.open_until(renewed.since + renew_deadline);
                    held = renewed;
                    last_error = None;
                }
                Ok(Err(Renewal::Lost(error))) => {
                    self.gate.close();
                    return Err(error);
                }
                Ok(Err(Renewal::Failed(error))) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "the lease was not renewed; trying again"
                    );
                    last_error = Some(error);
                }
                Err(_) => {}
            }
            due = began + retry_period;
        }
    }

    async fn renew(&self, held: &Held) -> Result<Held, Renewal> {
        let duration = self.election.timing.duration;
        self.rewrite(held, "renew the lease", |lease| record::renewed(lease, duration, Timestamp::now()))
            .await
    }

    async fn give_back(&self, held: &Held) -> Result<(), Error> {
        let act = "give the lease back";
        match self.rewrite(held, act, |lease| record::released(lease, Timestamp::now())).await {
            Ok(_) => {
                tracing::info!(lease = self.election.name, "gave the lease back");
                Ok(())
            }
            Err(Renewal::Failed(error) | Renewal::Lost(error)) => Err(error),
        }
    }

    /// Writes a change of our Lease; once more if it turns out to be another version of ours.
    async fn rewrite(
        &self,
        held: &Held,
        act: &'static str,
        change: impl Fn(&Lease) -> Lease,
    ) -> Result<Held, Renewal> {
        if let Some(held) = self.write(change(&held.lease), act).await.map_err(Renewal::Failed)? {
            return Ok(held);
        }
        let lost = |why: String| Err(Renewal::Lost(Error::Lease { why }));
        let found = call("read the lease", self.api.get_opt(&self.election.name)).await;
        let Some(lease) = found.map_err(Renewal::Failed)? else { return lost("somebody deleted it".into()) };
        let seen = Sighting::next(None, lease, Instant::now());
        match seen.holder() {
            // The answer to a write of ours was lost, or somebody has set a label.
            Some(holder) if holder == self.election.identity => {
                let written = self.write(change(&seen.lease), act).await.map_err(Renewal::Failed)?;
                let busy = || Renewal::Failed(Error::Lease { why: "somebody else keeps writing it".into() });
                written.ok_or_else(busy)
            }
            holder => lost(format!("{} holds it now", holder.unwrap_or("nobody"))),
        }
    }
}

enum Renewal {
    /// To be tried again while there is time.
    Failed(Error),
    Lost(Error),
}

/// Another version is there than the one that was read, or none where there was one.
fn is_refused(error: &kube::Error, is_new: bool) -> bool {
    let kube::Error::Api(status) = error else { return false };
    // A new lease that is "not found" has no namespace to be in.
    status.is_conflict() || status.is_already_exists() || (status.is_not_found() && !is_new)
}

async fn call<T>(
    act: &'static str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    call_within(CALL_TIMEOUT, act, request).await
}
