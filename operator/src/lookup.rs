//! Asking the class's caches what they have: the derivation, where the request only names it; its outputs and inputs.
//!
//! Caches may be slow, or hang until their time is up. So a look-up is a task of its own: a pass waits for it a moment, and if
//! the answer comes later, asks for another pass. A class has so many at once and no more, and takes none from another.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_api::convert;
use drover_cache::Cache;
use drover_nix::{StoreDir, StorePath};
use drover_session::Unresolved;
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::{Semaphore, oneshot};
use tracing::Instrument as _;

use crate::error::Error;
use crate::log::carried;
use crate::operator::Operator;
use crate::plan::accept;
use crate::secrets;
use crate::session::job::{self, Caches, JobPlan};
use crate::world::{Class, Lookup, Resolution, World};

/// Look-ups that a class has under way at once. Each may ask for several paths at a time.
const AT_ONCE: usize = 8;
/// What a pass waits for an answer. Most caches need some milliseconds.
const PATIENCE: Duration = Duration::from_millis(500);
/// The same for a pass that reads everything anew in order to speak a verdict: without the answer it would begin again.
const LONG_PATIENCE: Duration = Duration::from_secs(60);

/// Whether an answer is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// In the next world, unless it was made worthless meanwhile.
    There,
    /// The request will be looked at when it is.
    Coming,
}

/// Which classes have how many look-ups under way.
#[derive(Default)]
pub struct Doors(Mutex<HashMap<String, Arc<Semaphore>>>);

impl Doors {
    fn of(&self, class: &str) -> Arc<Semaphore> {
        // One insertion: whole after a panic.
        let mut doors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        doors.entry(class.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE))).clone()
    }
}

/// Asks for what the next attempt wants to know.
pub async fn look_up(operator: &Operator, world: &World, attempt: u32) -> Result<Answer, Error> {
    let plan = match job_plan(operator, world).await {
        Err(error) if !matches!(error, Error::Secret { .. }) => return Err(error),
        plan => plan,
    };
    let (uid, queue) = (world.request.uid().unwrap_or_default(), operator.queue.clone());
    let Some(ticket) = queue.lookups.ask(&uid, attempt) else { return Ok(Answer::Coming) };
    let plan = match plan {
        Ok(plan) => plan,
        Err(error) => {
            queue.lookups.answer(&uid, ticket, Lookup::Unusable { why: error.to_string() });
            return Ok(Answer::There);
        }
    };
    let (Some(plan), Class::Found { name: class, .. }) = (plan, &world.class) else {
        queue.lookups.answer(&uid, ticket, nothing_absent());
        return Ok(Answer::There);
    };
    let caches = operator.caches.clone();
    let (asking, of) = (queue.clone(), uid.clone());
    let ask = move || ask(&plan, &caches, &|path| asking.is_coming(&of, path));
    let keep = move |lookup: Option<Lookup>| {
        let lookup = lookup.unwrap_or_else(nothing_absent);
        if queue.lookups.answer(&uid, ticket, lookup.clone()) {
            queue.looked_up(&uid, &lookup);
        }
    };
    Ok(behind_the_door(operator, world, class, ask, keep).await)
}

/// Reads the derivation that the request only names.
pub async fn read_derivation(operator: &Operator, world: &World) -> Answer {
    let (uid, queue) = (world.request.uid().unwrap_or_default(), operator.queue.clone());
    let Some(ticket) = queue.resolutions.ask(&uid) else { return Answer::Coming };
    let dir = StoreDir::default();
    let (Ok(Some(drv_path)), Class::Found { name: class, spec, .. }) =
        (convert::drv_path(&world.request.spec, &dir), &world.class)
    else {
        // Nobody asks where there is nothing to read, or nowhere.
        queue.resolutions.forget(&uid);
        return Answer::There;
    };
    let (caches, of_class) = (operator.caches.clone(), spec.caches.clone());
    let keep = move |resolution: Option<Resolution>| {
        let fault = || Resolution::Unreadable { why: "reading it ended by a fault in the operator".into() };
        let resolution = resolution.unwrap_or_else(fault);
        if queue.resolutions.answer(&uid, ticket, resolution.clone()) {
            queue.resolved(&uid, &resolution);
        }
    };
    let credentials = match secrets::credentials(operator, &of_class).await {
        Ok(credentials) => credentials,
        Err(error) => {
            keep(Some(Resolution::Unreadable { why: error.to_string() }));
            return Answer::There;
        }
    };
    let read = move || match caches.open_all(&of_class, &credentials) {
        Ok(caches) => read(&drv_path, &caches),
        Err(error) => Resolution::Unreadable { why: error.to_string() },
    };
    behind_the_door(operator, world, class, read, keep).await
}

/// Asks caches as soon as the class's door lets this one in, and keeps the answer, None if asking has panicked.
async fn behind_the_door<T: Send + 'static>(
    operator: &Operator,
    world: &World,
    class: &str,
    ask: impl FnOnce() -> T + Send + 'static,
    keep: impl FnOnce(Option<T>) + Send + 'static,
) -> Answer {
    let (door, queue) = (operator.doors.of(class), operator.queue.clone());
    let request = ObjectRef::from_obj(&world.request);
    let (done, answered) = oneshot::channel();
    let asked = async move {
        // Never closed. It is given back when this task ends.
        let _permit = door.acquire().await;
        // A thread that panicked has said so already.
        keep(tokio::task::spawn_blocking(carried(ask)).await.ok());
        if done.send(()).is_err() {
            queue.look_at(request);
        }
    };
    tokio::spawn(asked.in_current_span());
    let patience = if world.live { LONG_PATIENCE } else { PATIENCE };
    match tokio::time::timeout(patience, answered).await {
        Ok(_) => Answer::There,
        Err(_) => Answer::Coming,
    }
}

/// Blocks.
fn read(drv_path: &StorePath, caches: &[Arc<dyn Cache>]) -> Resolution {
    match drover_session::resolve(&StoreDir::default(), drv_path, caches) {
        Ok(resolved) => Resolution::Found(Arc::new(resolved)),
        Err(Unresolved::Absent(path)) => Resolution::Absent { path },
        Err(Unresolved::Failed(failure)) if failure.infrastructure => {
            Resolution::Unreadable { why: failure.message }
        }
        Err(Unresolved::Failed(failure)) => {
            Resolution::Refused { reason: job::reason(failure.reason), message: failure.message }
        }
    }
}

/// Blocks. A cache that cannot be asked counts as one that has nothing of the outputs and all of the inputs: the attempt that
/// follows meets the same cache, and says what is wrong with it. But an input that `is_coming` from another request is waited
/// for. A key that is none is no cache's trouble: no attempt comes farther.
fn ask(plan: &JobPlan, caches: &Caches, is_coming: &dyn Fn(&str) -> bool) -> Lookup {
    let dir = StoreDir::default();
    let cannot = |why: &dyn std::fmt::Display| {
        caches.note_trouble();
        tracing::warn!(%why, "cannot ask the caches");
    };
    let coming = |paths: &mut dyn Iterator<Item = &StorePath>| -> BTreeSet<String> {
        paths.map(|path| dir.full(path)).filter(|path| is_coming(path)).collect()
    };
    let inputs = || plan.derivation.input_srcs.iter();
    let job = match plan.open(caches) {
        Ok(job) => job,
        Err(error @ Error::Secret { .. }) => return Lookup::Unusable { why: error.to_string() },
        Err(error) => {
            cannot(&error);
            return Lookup::Missing { absent: coming(&mut inputs()) };
        }
    };
    match drover_session::all_outputs_in_cache(&job) {
        Ok(Some(outcome)) => Lookup::Present(job::outputs(&dir, &outcome)),
        Ok(None) => {
            let missing = drover_session::missing_inputs(&job);
            if let Some(error) = &missing.trouble {
                cannot(error);
            }
            let mut absent = coming(&mut missing.unknown.iter());
            absent.extend(missing.absent.iter().map(|path| dir.full(path)));
            Lookup::Missing { absent }
        }
        Err(failure) if !failure.infrastructure => {
            Lookup::Refused { reason: job::reason(failure.reason), message: failure.message }
        }
        Err(failure) => {
            cannot(&failure);
            Lookup::Missing { absent: coming(&mut inputs()) }
        }
    }
}

fn nothing_absent() -> Lookup {
    Lookup::Missing { absent: BTreeSet::new() }
}

/// What a session needs to know; None if the request is not acceptable (any more).
pub async fn job_plan(operator: &Operator, world: &World) -> Result<Option<JobPlan>, Error> {
    let (Ok(accepted), Class::Found { spec, .. }) = (accept(world), &world.class) else { return Ok(None) };
    let signing_key = match spec.push_cache() {
        Some(cache) => secrets::signing_key(operator, cache).await?,
        None => None,
    };
    let credentials = secrets::credentials(operator, &spec.caches).await?;
    let work_dir = operator.settings.work_dir.clone();
    Ok(Some(JobPlan::new(accepted, &world.request.spec, signing_key, credentials, work_dir)))
}

#[cfg(test)]
mod tests;
