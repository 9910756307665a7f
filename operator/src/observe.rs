//! From the cluster and this process to a [`World`].
//!
//! Reads only. What the watches have seen is enough for most; where a watch that lags could lead to a wrong decision,
//! the API server is asked. Translation of pods is pure and tested here.

use std::time::Duration;

use drover_api::{AllowedNamespaces, BuildRequest, BuilderClass, default_class};
use k8s_openapi::api::core::v1::{ContainerStatus, Namespace, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::api::ListParams;
use kube::core::{DeserializeGuard, Selector, SelectorExt as _};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt as _};

use crate::error::Error;
use crate::operator::{Operator, call};
use crate::pod;
use crate::world::{Class, Lookup, Others, PodEnd, PodView, World};

/// Requests in one answer of a list: each may be 1.5 MB.
const PAGE: u32 = 100;
/// Longest name of an object (Kubernetes: apimachinery, DNS1123SubdomainMaxLength).
const MAX_NAME: usize = 253;

/// Where the reading is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Freshness {
    /// From what the watches have seen.
    Watched,
    /// From the API server itself.
    Live,
}

/// Gathers what there is to know about one request; None if the API server says that it is gone.
pub async fn observe(
    operator: &Operator,
    request: &BuildRequest,
    freshness: Freshness,
) -> Result<Option<World>, Error> {
    let uid = request.uid().unwrap_or_default();
    let live = freshness == Freshness::Live;
    let request = match live {
        false => request.clone(),
        true => match newest(operator, request).await? {
            Some(request) => request,
            None => return Ok(None),
        },
    };
    let class = class_of(operator, &request, freshness).await?;
    let attempt = request.status.as_ref().and_then(|status| status.attempt).unwrap_or(0);
    let pods = match live {
        false => pods_watched(operator, &request, &class, &uid, attempt).await?,
        true => pods_listed(operator, &uid).await?,
    };
    let next = attempt.saturating_add(1);
    let (lookup, others, slot) = match &class {
        Class::Found { name, spec, .. } => {
            let concurrency = spec.concurrency.unwrap_or_default();
            let slot = operator.queue.slot(&uid, next, Some((name, concurrency)));
            let lookup = operator.queue.lookups.get(&uid, next);
            let mut others = operator.queue.others(&uid, Some(name));
            if live && lacks_a_maker(&lookup, &others) {
                note_neighbours(operator, &request).await?;
                others = operator.queue.others(&uid, Some(name));
            }
            (lookup, others, slot)
        }
        Class::Absent | Class::OutOfSight { .. } => {
            (Lookup::Unknown, Others::default(), operator.queue.slot(&uid, next, None))
        }
    };
    Ok(Some(World {
        class,
        resolution: operator.queue.resolutions.get(&uid),
        pods,
        lookup,
        others,
        slot,
        refusal: operator.refusals.get(&uid, attempt),
        obstacle: operator.obstacles.get(&uid, attempt),
        session: operator.sessions.view(&uid),
        timeouts: operator.settings.timeouts,
        live,
        request,
    }))
}

/// The request as the API server has it now; None if it is gone, or another has its name.
async fn newest(operator: &Operator, request: &BuildRequest) -> Result<Option<BuildRequest>, Error> {
    let namespace = request.namespace().unwrap_or_default();
    let api: Api<BuildRequest> = Api::namespaced(operator.client.clone(), &namespace);
    let found = call("read the request", api.get_opt(&request.name_any())).await?;
    let found = found.filter(|found| found.uid() == request.uid());
    match &found {
        Some(found) => operator.queue.seen(found),
        None => operator.queue.gone(&request.uid().unwrap_or_default()),
    }
    Ok(found)
}

/// Whether an input is nowhere and nobody is known to make it: the request would end by that.
fn lacks_a_maker(lookup: &Lookup, others: &Others) -> bool {
    let Lookup::Missing { absent } = lookup else { return false };
    absent.iter().any(|path| !others.producers.contains_key(path))
}

/// Has the queue learn of every request in this one's namespace: the watch may lag behind the one that makes an input.
async fn note_neighbours(operator: &Operator, request: &BuildRequest) -> Result<(), Error> {
    let namespace = request.namespace().unwrap_or_default();
    // One that cannot be read makes nothing that is known.
    let api: Api<DeserializeGuard<BuildRequest>> = Api::namespaced(operator.client.clone(), &namespace);
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = call("list the namespace's requests", api.list(&params)).await?;
        page.items
            .iter()
            .filter_map(|found| found.0.as_ref().ok())
            .for_each(|found| operator.queue.seen(found));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// The request's pods as the watch has them.
async fn pods_watched(
    operator: &Operator,
    request: &BuildRequest,
    class: &Class,
    uid: &str,
    attempt: u32,
) -> Result<Vec<PodView>, Error> {
    let mut pods: Vec<PodView> = operator
        .pods
        .state()
        .iter()
        .filter(|pod| pod.labels().get(pod::UID_LABEL).is_some_and(|label| label == uid))
        .filter_map(|pod| view(pod))
        .collect();
    // An attempt that runs and whose pod the watch does not show: the watch may lag behind our own creation, and a
    // pod outside the builder namespace is not watched at all.
    let attempts = request.status.as_ref().map(|status| status.attempts.as_slice()).unwrap_or_default();
    let is_open = attempts.last().is_some_and(|last| last.end_time.is_none());
    if let Class::Found { spec, .. } = class
        && is_open
        && !pods.iter().any(|pod| pod.attempt == attempt)
    {
        let request_namespace = request.namespace().unwrap_or_default();
        let namespace = pod::namespace(spec, &request_namespace, &operator.settings);
        let api: Api<Pod> = Api::namespaced(operator.client.clone(), namespace);
        let name = pod::name(&request.name_any(), uid, attempt);
        let found = call("read the builder's pod", api.get_opt(&name)).await?;
        let ours = found.filter(|pod| pod.labels().get(pod::UID_LABEL).is_some_and(|label| label == uid));
        pods.extend(ours.as_ref().and_then(view));
    }
    Ok(pods)
}

/// The request's pods as the API server has them.
async fn pods_listed(operator: &Operator, uid: &str) -> Result<Vec<PodView>, Error> {
    let api: Api<Pod> = Api::namespaced(operator.client.clone(), &operator.settings.builder_namespace);
    let params = ListParams::default().labels(&format!("{}={uid}", pod::UID_LABEL));
    let pods = call("list the request's pods", api.list(&params)).await?;
    Ok(pods.items.iter().filter_map(view).collect())
}

/// The class that the request names, or the default; and whether the request's namespace may use it.
async fn class_of(operator: &Operator, request: &BuildRequest, freshness: Freshness) -> Result<Class, Error> {
    let scope = &operator.settings.scope;
    // What a file says does not change while this process lives.
    let freshness = if scope.classes.is_some() { Freshness::Watched } else { freshness };
    // One that cannot be read is as good as none, and keeps nobody else from the others.
    let api = || Api::<DeserializeGuard<BuilderClass>>::all(operator.client.clone());
    let class = match (&request.spec.class, freshness) {
        // It would become part of an address.
        (Some(name), _) if !may_be_a_name(name) => None,
        (Some(name), Freshness::Watched) => {
            operator.classes.get(&ObjectRef::new(name)).map(|class| BuilderClass::clone(&class))
        }
        (Some(name), Freshness::Live) => {
            let class = call("read the class", api().get_opt(name)).await?;
            class.and_then(|class| class.0.ok())
        }
        (None, Freshness::Watched) => {
            let classes = operator.classes.state();
            default_class(classes.iter().map(|class| &**class)).cloned()
        }
        (None, Freshness::Live) => {
            let classes = call("list the classes", api().list(&ListParams::default())).await?;
            let readable = classes.items.iter().filter_map(|class| class.0.as_ref().ok());
            default_class(readable).cloned()
        }
    };
    let Some(class) = class else { return Ok(Class::Absent) };
    let namespace = request.namespace().unwrap_or_default();
    let allowed = match &class.spec.allowed_namespaces {
        None => true,
        Some(allowed) if allowed.names.contains(&namespace) => true,
        Some(AllowedNamespaces { selector: None, .. }) => false,
        Some(_) if !scope.is_cluster() => return Ok(Class::OutOfSight { name: class.name_any() }),
        Some(AllowedNamespaces { selector: Some(selector), .. }) => {
            is_selected(operator, selector, &namespace).await?
        }
    };
    Ok(Class::Found { name: class.name_any(), spec: Box::new(class.spec.clone()), allowed })
}

/// Whether an object can be called so (Kubernetes: apimachinery, IsDNS1123Subdomain). What users write becomes part of an
/// address, where other characters have other meanings.
pub fn may_be_a_name(name: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let label = |label: &str| {
        label.bytes().all(|byte| inside(byte) || byte == b'-')
            && label.bytes().next().is_some_and(inside)
            && label.bytes().last().is_some_and(inside)
    };
    name.len() <= MAX_NAME && name.split('.').all(label)
}

async fn is_selected(operator: &Operator, selector: &LabelSelector, namespace: &str) -> Result<bool, Error> {
    // A selector that Kubernetes would not take selects nothing.
    let Ok(selector) = Selector::try_from(selector.clone()) else { return Ok(false) };
    let api: Api<Namespace> = Api::all(operator.client.clone());
    let namespace = call("read the request's namespace", api.get_metadata_opt(namespace)).await?;
    Ok(namespace.is_some_and(|namespace| selector.matches(namespace.labels())))
}

/// A pod as plans see it; None for one without our labels.
pub fn view(pod: &Pod) -> Option<PodView> {
    let attempt = pod.labels().get(pod::ATTEMPT_LABEL)?.parse().ok()?;
    let status = pod.status.as_ref();
    let container: Option<&ContainerStatus> = status
        .and_then(|status| status.container_statuses.as_ref())
        .and_then(|all| all.iter().find(|container| container.name == pod::CONTAINER));
    let state = container.and_then(|container| container.state.as_ref());
    let waiting = state.and_then(|state| state.waiting.as_ref());
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
    let terminated = state.and_then(|state| state.terminated.as_ref());
    let ended = (matches!(phase, "Failed" | "Succeeded") || terminated.is_some()).then(|| {
        // The pod's own reason (Evicted, DeadlineExceeded) stands above its container's.
        let pod_reason = status.and_then(|status| status.reason.clone());
        let container_reason = terminated.and_then(|end| end.reason.clone());
        let pod_message = status.and_then(|status| status.message.clone());
        let exit_code = terminated.map(|end| end.exit_code);
        // The container's message is the end of its log, where a build may have the last word.
        let words = terminated.and_then(|end| end.message.as_deref());
        let last_line = words.and_then(|words| words.lines().rfind(|line| !line.trim().is_empty()));
        PodEnd {
            reason: pod_reason.or(container_reason).unwrap_or_else(|| phase.to_owned()),
            message: pod_message
                .or_else(|| exit_code.map(|code| format!("exit code {code}")))
                .unwrap_or_default(),
            exit_code,
            only_container_since: terminated
                .filter(|_| !matches!(phase, "Failed" | "Succeeded"))
                .and_then(|end| end.finished_at.as_ref())
                .map(|time| time.0),
            last_line: last_line.map(|line| line.trim().to_owned()),
        }
    });
    let conditions = status.and_then(|status| status.conditions.as_ref());
    let condition = |kind: &str, status: &str| {
        let mut all = conditions.into_iter().flatten();
        all.find(|condition| condition.type_ == kind && condition.status == status)
    };
    let unschedulable = condition("PodScheduled", "False").and_then(|condition| condition.message.clone());
    let scheduled =
        condition("PodScheduled", "True").and_then(|condition| condition.last_transition_time.clone());
    let deadline = pod.spec.as_ref().and_then(|spec| spec.active_deadline_seconds);
    let disruption = condition("DisruptionTarget", "True").map(|condition| {
        (condition.reason.clone().unwrap_or_default(), condition.message.clone().unwrap_or_default())
    });
    Some(PodView {
        name: pod.name_any(),
        namespace: pod.namespace().unwrap_or_default(),
        uid: pod.uid().unwrap_or_default(),
        attempt,
        created: pod.creation_timestamp().map(|time| time.0).unwrap_or_default(),
        deleting: pod.metadata.deletion_timestamp.is_some(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).filter(|node| !node.is_empty()),
        scheduled: scheduled.map(|time| time.0),
        deadline: deadline.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs),
        unschedulable,
        waiting: waiting.map(|waiting| {
            (waiting.reason.clone().unwrap_or_default(), waiting.message.clone().unwrap_or_default())
        }),
        ended,
        disruption,
        image: container
            .filter(|container| !container.image_id.is_empty())
            .map(|container| container.image_id.clone()),
    })
}

/// The request that a builder pod belongs to, by its annotation.
pub fn request_of(pod: &Pod) -> Option<ObjectRef<BuildRequest>> {
    let (namespace, name) = pod.annotations().get(pod::REQUEST_ANNOTATION)?.split_once('/')?;
    Some(ObjectRef::new(name).within(namespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(status: &str) -> PodView {
        let pod: Pod = serde_yaml::from_str(&format!(
            "metadata:
  name: a
  namespace: builders
  uid: u
  labels: {{drover.build/attempt: '3', drover.build/request-uid: r}}
  annotations: {{drover.build/request: team/hello}}
spec: {{nodeName: n1, containers: []}}
status: {status}
"
        ))
        .unwrap();
        assert_eq!(request_of(&pod).unwrap(), ObjectRef::new("hello").within("team"));
        view(&pod).unwrap()
    }

    #[test]
    fn names_of_objects() {
        for name in ["a", "small", "a-b.c9", &"a".repeat(253)] {
            assert!(may_be_a_name(name), "{name}");
        }
        for name in [
            "", "A", "a b", "a/b", "..", "../a", "a..b", ".a", "a.", "-a", "a-", "a?b", "a#b", "a%20b", "ä",
            "a\n",
        ] {
            assert!(!may_be_a_name(name), "{name:?}");
        }
        assert!(!may_be_a_name(&"a".repeat(254)));
    }

    #[test]
    fn a_running_pod() {
        let pod =
            pod("{phase: Running, containerStatuses: [{name: builder, imageID: 'i@sha256:1', image: i, \
                       ready: true, restartCount: 0, state: {running: {}}}]}");
        assert_eq!(
            (pod.attempt, pod.node.as_deref(), pod.image.as_deref()),
            (3, Some("n1"), Some("i@sha256:1"))
        );
        assert_eq!((pod.ended, pod.waiting, pod.deleting), (None, None, false));
    }

    #[test]
    fn why_a_pod_does_not_run() {
        let waiting =
            pod("{phase: Pending, containerStatuses: [{name: builder, imageID: '', image: i, ready: false, \
                           restartCount: 0, state: {waiting: {reason: ErrImagePull, message: no}}}]}");
        assert_eq!((waiting.waiting, waiting.image), (Some(("ErrImagePull".into(), "no".into())), None));
        let unschedulable =
            pod("{phase: Pending, conditions: [{type: PodScheduled, status: 'False', message: full}]}");
        assert_eq!(unschedulable.unschedulable.as_deref(), Some("full"));
    }

    #[test]
    fn how_a_pod_ended() {
        let end = |status: &str| {
            let end = pod(status).ended.unwrap();
            (end.reason, end.message)
        };
        assert_eq!(end("{phase: Failed, reason: Evicted, message: low}"), ("Evicted".into(), "low".into()));
        let killed = "{phase: Failed, containerStatuses: [{name: builder, imageID: x, image: i, ready: false, \
                      restartCount: 0, state: {terminated: {exitCode: 137, reason: OOMKilled}}}]}";
        assert_eq!(end(killed), ("OOMKilled".into(), "exit code 137".into()));
        let refused =
            pod("{phase: Failed, containerStatuses: [{name: builder, imageID: x, image: i, ready: false, \
                      restartCount: 0, state: {terminated: {exitCode: 78, reason: Error, \
                      message: 'first\n\n  last\n\n'}}}]}"
                .replace("\\n", "\n")
                .as_str())
            .ended
            .unwrap();
        assert_eq!((refused.exit_code, refused.last_line.as_deref()), (Some(78), Some("last")));
        assert_eq!(refused.message, "exit code 78", "what was written is not Kubernetes' word");
        assert_eq!(refused.only_container_since, None);
        let early =
            pod("{phase: Running, containerStatuses: [{name: builder, imageID: x, image: i, ready: false, \
                         restartCount: 0, state: {terminated: {exitCode: 0, reason: Completed, \
                         finishedAt: '2026-01-01T00:00:00Z'}}}]}");
        assert!(early.ended.unwrap().only_container_since.is_some(), "its pod has not said why");
        let drained = pod("{phase: Running, conditions: [{type: DisruptionTarget, status: 'True', \
                           reason: EvictionByEvictionAPI, message: drained}]}");
        assert_eq!(drained.disruption, Some(("EvictionByEvictionAPI".into(), "drained".into())));
        let over =
            pod("{phase: Running, conditions: [{type: DisruptionTarget, status: 'False', reason: x}]}");
        assert_eq!((over.disruption, over.ended), (None, None));
        assert_eq!(end("{phase: Succeeded}"), ("Succeeded".into(), String::new()));
    }
}
