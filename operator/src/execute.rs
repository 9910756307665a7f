//! Does what a plan says: the status first, then the actions in their order.
//!
//! Each act can be repeated and meets what an earlier one did. Nothing is decided here but one thing: whether the
//! request that the plan was made from is still the newest. A status names the version that it was made from, so a
//! stale one is refused; actions without a status are preceded by a look at the request.

use std::sync::Arc;

use drover_api::{BuildRequest, BuildRequestStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::error::Error;
use crate::lookup::{Answer, job_plan, look_up, read_derivation};
use crate::metrics::transition;
use crate::operator::{Operator, call};
use crate::plan::{Action, Plan, accept};
use crate::pod::{self, PodPlan};
use crate::refusal::refusal;
use crate::session::Assignment;
use crate::session::host_key::HostKey;
use crate::settings::{FIELD_MANAGER, STATUS_MANAGER};
use crate::trace;
use crate::world::{Class, World};

/// What became of a plan.
pub enum Executed {
    /// All of it was done. The request as it is now, if its status was written.
    Done(Option<Box<BuildRequest>>),
    /// Nothing was done, because the plan was made from an old version: plan again from this one.
    Stale(Box<BuildRequest>),
    /// What was begun has no answer yet. The request is looked at when it has.
    Coming,
    /// Nothing was done, because the request is gone.
    Gone,
}

pub async fn execute(operator: &Operator, world: &World, plan: &Plan) -> Result<Executed, Error> {
    let request = &world.request;
    let mut written = None;
    if let Some(status) = &plan.status {
        match write_status(operator, request, status).await {
            Ok(after) => {
                let now = operator.clock.now();
                operator.events.say(request, &after, now);
                operator.tracer.say(|| trace::transition::spans_of(request, status, now));
                written = Some(Box::new(after));
            }
            Err(error) if error.is_conflict() => return current(operator, request).await,
            Err(Error::Kube { source, .. }) if is_not_found(&source) => {
                operator.queue.gone(&request.uid().unwrap_or_default());
                return Ok(Executed::Gone);
            }
            Err(error) => return Err(error),
        }
        operator.metrics.record(&transition::observe(request, status, operator.clock.now()));
    } else if plan
        .actions
        .iter()
        .any(|action| matches!(action, Action::CreatePod { .. } | Action::StartSession { .. }))
    {
        match current(operator, request).await? {
            Executed::Stale(now) if now.resource_version() == request.resource_version() => {}
            other => return Ok(other),
        }
    }
    let mut answer = Answer::There;
    for action in &plan.actions {
        match action {
            Action::ReadDerivation => answer = read_derivation(operator, world).await,
            Action::LookUp { attempt } => answer = look_up(operator, world, *attempt).await?,
            action => act(operator, world, action).await?,
        }
    }
    Ok(match answer {
        Answer::Coming => Executed::Coming,
        Answer::There => Executed::Done(written),
    })
}

/// The request as the API server has it.
async fn current(operator: &Operator, request: &BuildRequest) -> Result<Executed, Error> {
    let found = call("read the request", requests(operator, request).get_opt(&request.name_any())).await?;
    Ok(match found {
        Some(found) if found.uid() == request.uid() => {
            operator.queue.seen(&found);
            Executed::Stale(Box::new(found))
        }
        _ => {
            operator.queue.gone(&request.uid().unwrap_or_default());
            Executed::Gone
        }
    })
}

async fn write_status(
    operator: &Operator,
    request: &BuildRequest,
    status: &BuildRequestStatus,
) -> Result<BuildRequest, Error> {
    let body = json!({
        "apiVersion": drover_api::API_VERSION,
        "kind": "BuildRequest",
        // With version and uid, a write that was made from an old state, or meant for a namesake, is refused.
        "metadata": {
            "name": request.name_any(),
            "resourceVersion": request.resource_version(),
            "uid": request.uid(),
        },
        "status": status,
    });
    let params = PatchParams::apply(STATUS_MANAGER).force();
    let api = requests(operator, request);
    let name = request.name_any();
    let written =
        call("write the request's status", api.patch_status(&name, &params, &Patch::Apply(&body))).await?;
    operator.metrics.status_writes.inc();
    operator.queue.seen(&written);
    Ok(written)
}

async fn act(operator: &Operator, world: &World, action: &Action) -> Result<(), Error> {
    let uid = world.request.uid().unwrap_or_default();
    match action {
        // See `execute`: these are the ones that may take long.
        Action::ReadDerivation | Action::LookUp { .. } => Ok(()),
        Action::ForgetLookUp => {
            operator.queue.lookups.expire(&uid);
            operator.queue.resolutions.expire(&uid);
            Ok(())
        }
        Action::AskForSlot { attempt } => {
            if let Class::Found { name, spec, .. } = &world.class {
                operator.queue.ask(&uid, *attempt, name, spec.concurrency.unwrap_or_default());
            }
            Ok(())
        }
        Action::ReleaseSlot => {
            operator.queue.release(&uid);
            Ok(())
        }
        Action::CreatePod { attempt, memory } => create_pod(operator, world, *attempt, memory.as_ref()).await,
        Action::StartSession { attempt, namespace, pod, pod_uid } => {
            let job = match job_plan(operator, world).await {
                // Tried again as every failure is; meanwhile the request says so.
                Err(error @ Error::Secret { .. }) => {
                    operator.obstacles.set(&uid, *attempt, error.to_string());
                    return Err(error);
                }
                job => job?,
            };
            operator.obstacles.forget(&uid);
            let Some(job) = job else { return Ok(()) };
            let request = &world.request;
            operator.sessions.start(
                &uid,
                Assignment {
                    request: ObjectRef::from_obj(request),
                    trace: trace::Context::of(request),
                    request_uid: uid.clone(),
                    attempt: *attempt,
                    pods: Api::namespaced(operator.client.clone(), namespace),
                    pods_seen: operator.pods.clone(),
                    pod: pod.clone(),
                    pod_uid: pod_uid.clone(),
                    host_key: known_host_key(request, *attempt, pod),
                    client_key: operator.seed.client_key(&uid, *attempt)?,
                    job,
                    caches: operator.caches.clone(),
                    work_dir: operator.settings.work_dir.clone(),
                    timeouts: operator.settings.timeouts,
                    kept: Arc::default(),
                },
            );
            Ok(())
        }
        Action::StopSession => {
            operator.sessions.stop(&uid);
            Ok(())
        }
        Action::DeletePod { namespace, name, uid } => delete_pod(operator, namespace, name, uid).await,
        Action::DeleteRequest => {
            // As it was read: somebody may just have given it more time.
            let resource_version = world.request.resource_version();
            let params = DeleteParams {
                preconditions: Some(Preconditions { uid: world.request.uid(), resource_version }),
                ..DeleteParams::background()
            };
            let api = requests(operator, &world.request);
            done_if_gone(
                call("delete the request", api.delete(&world.request.name_any(), &params)).await.map(drop),
            )
        }
    }
}

/// The key that an earlier session with this pod has learned: attempts have one pod each.
fn known_host_key(request: &BuildRequest, attempt: u32, pod: &str) -> Option<HostKey> {
    let status = request.status.as_ref().filter(|status| status.attempt == Some(attempt))?;
    let builder = status.builder.as_ref().filter(|builder| builder.pod.as_deref() == Some(pod))?;
    HostKey::parse_kept(builder.host_key.as_deref()?)
}

/// Deletes this pod, not a later one of the same name. Done if it is gone already.
pub async fn delete_pod(operator: &Operator, namespace: &str, name: &str, uid: &str) -> Result<(), Error> {
    let api: Api<Pod> = Api::namespaced(operator.client.clone(), namespace);
    let params = DeleteParams {
        preconditions: Some(Preconditions { uid: Some(uid.to_owned()), resource_version: None }),
        ..DeleteParams::default()
    };
    done_if_gone(call("delete the builder's pod", api.delete(name, &params)).await.map(drop))
}

async fn create_pod(
    operator: &Operator,
    world: &World,
    attempt: u32,
    memory: Option<&Quantity>,
) -> Result<(), Error> {
    let (Ok(accepted), Class::Found { name, spec, .. }) = (accept(world), &world.class) else {
        return Ok(());
    };
    let uid = world.request.uid().unwrap_or_default();
    let key = operator.seed.client_key(&uid, attempt)?;
    let pod = PodPlan {
        request: &world.request,
        class: spec,
        class_name: name,
        attempt,
        memory,
        system: &accepted.derivation.system.to_string(),
        features: &crate::plan::required_features(&accepted.derivation),
        fetches: accepted.derivation.kind().is_ok_and(|kind| !kind.is_sandboxed()),
        derivation: &accepted.derivation,
        authorized_key: &key.public_line(),
        settings: &operator.settings,
    }
    .build()?;
    let api: Api<Pod> = Api::namespaced(operator.client.clone(), &pod.namespace().unwrap_or_default());
    let params = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
    match call("create the builder's pod", api.create(&params, &pod)).await {
        Ok(_) => {
            operator.metrics.pods_created.inc();
            operator.refusals.forget(&uid);
            Ok(())
        }
        Err(Error::Kube { source, .. }) if is_already_exists(&source) => {
            let there = call("read the builder's pod", api.get_opt(&pod.name_any())).await?;
            match there {
                Some(there) if there.labels().get(pod::UID_LABEL) != Some(&uid) => Err(Error::Pod {
                    why: format!("a pod {} is there that belongs to something else", pod.name_any()),
                }),
                // Ours, from an earlier pass; or gone again, and the next pass sees to it.
                _ => {
                    operator.refusals.forget(&uid);
                    Ok(())
                }
            }
        }
        Err(Error::Kube { act, source }) => match refusal(&source, attempt, operator.clock.now()) {
            Some(refusal) => {
                operator.refusals.set(&uid, refusal);
                // The plan that asked for the pod did not know. The next one says so.
                operator.queue.look_at(ObjectRef::from_obj(&world.request));
                Ok(())
            }
            None => Err(Error::Kube { act, source }),
        },
        Err(error) => Err(error),
    }
}

fn requests(operator: &Operator, request: &BuildRequest) -> Api<BuildRequest> {
    Api::namespaced(operator.client.clone(), &request.namespace().unwrap_or_default())
}

/// A pod that was deleted, or replaced by a namesake, is gone.
fn done_if_gone(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::Kube { source, .. }) if is_not_found(&source) => Ok(()),
        Err(error) if error.is_conflict() => Ok(()),
        other => other,
    }
}

fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_not_found())
}

fn is_already_exists(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_already_exists())
}

// Handles of caches end on threads that may block, never here.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<Operator>>();
};
