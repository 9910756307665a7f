//! Why a pod ended, read from what Kubernetes says of it: what the request's status calls it and whose budget it is. Pure.
//!
//! A builder listens until it is told to stop, so that a pod that ends by itself is never a build that failed. Reasons and
//! the wording of messages are the kubelet's and the controllers' (Kubernetes: pkg/kubelet/eviction/helpers.go,
//! pkg/kubelet/preemption, pkg/kubelet/nodeshutdown, api/core/v1 PodConditionType DisruptionTarget).

use std::time::Duration;

use drover_api::Reason;
use jiff::Timestamp;

use crate::settings::BUILDER_REFUSES;
use crate::world::{PodEnd, PodView};

/// What went wrong with an attempt.
pub(super) struct Failure {
    pub reason: Reason,
    pub message: String,
    pub infrastructure: bool,
}

impl Failure {
    pub(super) fn infrastructure(reason: Reason, message: String) -> Self {
        Self { reason, message, infrastructure: true }
    }
}

/// How long a pod's status may lag behind its end: the kubelet looks once a second, and kills before it reports.
pub(super) const POD_LAG: Duration = Duration::from_secs(10);

/// Why the pod is of no more use: None while it is. The error says how long it may still take to say so: an evicted pod's
/// container ends well before the pod is called evicted.
pub(super) fn word(pod: &PodView, now: Timestamp) -> Result<Option<Failure>, Duration> {
    let failure = of_pod(pod);
    let since = pod.ended.as_ref().and_then(|ended| ended.only_container_since);
    if let (Some(Failure { reason: Reason::BuilderLost, .. }), Some(since)) = (&failure, since) {
        // A node whose clock is ahead is not waited for.
        let waited = Duration::try_from(now.duration_since(since)).unwrap_or(POD_LAG);
        let left = POD_LAG.saturating_sub(waited);
        if !left.is_zero() {
            return Err(left);
        }
    }
    Ok(failure)
}

fn of_pod(pod: &PodView) -> Option<Failure> {
    // What the pod itself came to is nearer to the cause than why it is to go.
    let ended = pod.ended.as_ref().map(of_end);
    let disrupted = pod.disruption.as_ref().map(|(reason, message)| of_disruption(reason, message));
    let deleted = pod.deleting.then(|| {
        let message = format!("pod {} is being deleted, and not by the operator", pod.name);
        Failure::infrastructure(Reason::BuilderLost, message)
    });
    match (ended, disrupted) {
        // It was told to go, and went.
        (Some(Failure { reason: Reason::BuilderLost, .. }), Some(disrupted)) => Some(disrupted),
        (Some(ended), _) => Some(ended),
        // A disruption that is announced comes with the deletion or with the pod's end; some never come.
        (None, Some(disrupted)) if pod.deleting => Some(disrupted),
        (None, _) => deleted,
    }
}

fn of_end(ended: &PodEnd) -> Failure {
    let PodEnd { reason, message, exit_code, last_line, .. } = ended;
    let mut said = format!("the builder's pod ended: {reason}");
    // A builder that ends with 1 has said why, after all that builds had to say.
    let why = last_line.iter().filter(|_| *exit_code == Some(1));
    for part in [message].into_iter().filter(|message| !message.is_empty()).chain(why) {
        said.push_str(": ");
        said.push_str(part);
    }
    if exit_code.is_some_and(|code| BUILDER_REFUSES.contains(&code)) {
        let why = last_line.as_deref().unwrap_or("its log says why");
        let message = format!("the builder refuses to run on this class's pods: {why}");
        return Failure { reason: Reason::Unplaceable, message, infrastructure: false };
    }
    let word = match reason.as_str() {
        "DeadlineExceeded" => {
            return Failure { reason: Reason::TimedOut, message: said, infrastructure: false };
        }
        "OOMKilled" => Reason::OutOfMemory,
        "Evicted" => evicted(message),
        "Preempting" | "Terminated" | "NodeShutdown" | "Shutdown" => Reason::Evicted,
        "NodeLost" => Reason::NodeLost,
        // The container never ran, or there is none: refused at admission, or not to be started.
        "StartError" | "ContainerCannotRun" => Reason::InfrastructureFailure,
        _ if exit_code.is_some() => Reason::BuilderLost,
        _ => Reason::InfrastructureFailure,
    };
    Failure::infrastructure(word, said)
}

/// What the kubelet evicts for: its node's need, in which the pods go that use more than they asked for, or a limit of the
/// pod's own.
fn evicted(message: &str) -> Reason {
    const DISK: [&str; 5] = [
        "low on resource: ephemeral-storage",
        "low on resource: inodes",
        "ephemeral storage limit",
        "ephemeral local storage usage exceeds",
        "Usage of EmptyDir volume",
    ];
    if DISK.iter().any(|words| message.contains(words)) {
        Reason::DiskFull
    } else if message.contains("low on resource: memory") {
        Reason::OutOfMemory
    } else {
        Reason::Evicted
    }
}

fn of_disruption(reason: &str, message: &str) -> Failure {
    let word = match reason {
        "DeletionByTaintManager" | "DeletionByPodGC" => Reason::NodeLost,
        "TerminationByKubelet" => evicted(message),
        // PreemptionByScheduler, EvictionByEvictionAPI and what may come.
        _ => Reason::Evicted,
    };
    Failure::infrastructure(word, format!("the builder's pod had to go: {reason}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodView {
        PodView {
            name: "hello-1".into(),
            namespace: "builders".into(),
            uid: "u".into(),
            attempt: 1,
            created: Default::default(),
            deleting: false,
            node: Some("n".into()),
            scheduled: None,
            deadline: None,
            unschedulable: None,
            waiting: None,
            ended: None,
            disruption: None,
            image: None,
        }
    }

    fn ended(reason: &str, message: &str, exit_code: Option<i32>) -> PodView {
        let last_line = Some("out of memory: Evicted: this is the build's".to_owned());
        let (reason, message) = (reason.into(), message.into());
        let end = PodEnd { reason, message, exit_code, last_line, only_container_since: None };
        PodView { ended: Some(end), ..pod() }
    }

    fn blame(pod: &PodView) -> (Reason, bool) {
        let failure = of_pod(pod).unwrap();
        assert!(!failure.message.is_empty());
        assert_eq!(failure.infrastructure, failure.reason.is_infrastructure(), "{}", failure.message);
        (failure.reason, failure.infrastructure)
    }

    #[test]
    fn how_pods_end() {
        for (reason, message, exit_code, word) in [
            ("OOMKilled", "exit code 137", Some(137), Reason::OutOfMemory),
            ("Error", "exit code 137", Some(137), Reason::BuilderLost),
            ("Error", "exit code 1", Some(1), Reason::BuilderLost),
            ("Completed", "exit code 0", Some(0), Reason::BuilderLost),
            ("ContainerStatusUnknown", "exit code 137", Some(137), Reason::BuilderLost),
            ("StartError", "exit code 128", Some(128), Reason::InfrastructureFailure),
            ("OutOfmemory", "Node didn't have enough resource: memory", None, Reason::InfrastructureFailure),
            ("UnexpectedAdmissionError", "no device", None, Reason::InfrastructureFailure),
            ("Preempting", "Preempted in order to admit critical pod", None, Reason::Evicted),
            ("Terminated", "in response to imminent node shutdown.", Some(0), Reason::Evicted),
            ("NodeLost", "Node n which was running pod is unresponsive", None, Reason::NodeLost),
            ("Evicted", "The node had condition: [DiskPressure]. ", None, Reason::Evicted),
            ("Evicted", "The node was low on resource: pids. ", None, Reason::Evicted),
            (
                "Evicted",
                "The node was low on resource: memory. Threshold quantity: …",
                None,
                Reason::OutOfMemory,
            ),
            ("Evicted", "The node was low on resource: ephemeral-storage. …", None, Reason::DiskFull),
            ("Evicted", "The node was low on resource: inodes. ", None, Reason::DiskFull),
            (
                "Evicted",
                "Container builder exceeded its local ephemeral storage limit \"1Gi\". ",
                Some(137),
                Reason::DiskFull,
            ),
            (
                "Evicted",
                "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ",
                None,
                Reason::DiskFull,
            ),
            (
                "Evicted",
                "Usage of EmptyDir volume \"nix\" exceeds the limit \"1Gi\". ",
                None,
                Reason::DiskFull,
            ),
        ] {
            assert_eq!(blame(&ended(reason, message, exit_code)), (word, true), "{reason}: {message}");
        }
        assert_eq!(blame(&ended("DeadlineExceeded", "", None)), (Reason::TimedOut, false));
        assert!(of_pod(&pod()).is_none());
    }

    #[test]
    fn a_builder_that_refuses_is_believed_and_not_asked_again() {
        for code in BUILDER_REFUSES {
            let failure = of_pod(&ended("Error", "exit code", Some(code))).unwrap();
            assert_eq!((failure.reason, failure.infrastructure), (Reason::Unplaceable, false));
            assert!(failure.message.ends_with("this is the build's"), "{}", failure.message);
        }
        // A pod that was evicted has its container's exit code as well: 1 or 2 would be the build's business.
        assert_eq!(blame(&ended("Evicted", "", Some(1))).0, Reason::Evicted);
    }

    #[test]
    fn why_pods_are_deleted() {
        let going = |reason: &str, message: &str| PodView {
            deleting: true,
            disruption: Some((reason.into(), message.into())),
            ..pod()
        };
        for (reason, message, word) in [
            ("PreemptionByScheduler", "", Reason::Evicted),
            ("EvictionByEvictionAPI", "", Reason::Evicted),
            ("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint", Reason::NodeLost),
            ("DeletionByPodGC", "PodGC: node no longer exists", Reason::NodeLost),
            ("TerminationByKubelet", "The node was low on resource: memory. ", Reason::OutOfMemory),
            (
                "TerminationByKubelet",
                "Pod was terminated in response to imminent node shutdown.",
                Reason::Evicted,
            ),
        ] {
            let pod = going(reason, message);
            assert_eq!(blame(&pod), (word, true), "{reason}: {message}");
            // It was told to, and went.
            let went = PodView { disruption: pod.disruption, ..ended("Completed", "exit code 0", Some(0)) };
            assert_eq!(blame(&went), (word, true), "{reason}: {message}");
        }
        assert_eq!(blame(&PodView { deleting: true, ..pod() }), (Reason::BuilderLost, true));
        // Announced, and nothing has come of it yet.
        assert!(of_pod(&PodView { deleting: false, ..going("PreemptionByScheduler", "") }).is_none());
        // What it came to is nearer to the cause.
        let oom =
            PodView { disruption: Some(("X".into(), String::new())), ..ended("OOMKilled", "", Some(137)) };
        assert_eq!(blame(&oom).0, Reason::OutOfMemory);
    }

    #[test]
    fn a_container_that_ended_lets_its_pod_speak() {
        let at = |second: i64| Timestamp::from_second(1000 + second).unwrap();
        let mut early = ended("Completed", "exit code 0", Some(0));
        let since = |pod: &mut PodView, second: i64| {
            pod.ended.as_mut().unwrap().only_container_since = Some(at(second));
        };
        since(&mut early, 0);
        assert_eq!(word(&early, at(3)).map(|_| ()), Err(Duration::from_secs(7)));
        for (begin, now) in [(0, 10), (5, 0)] {
            since(&mut early, begin);
            let failure = word(&early, at(now)).ok().flatten().unwrap();
            assert_eq!(failure.reason, Reason::BuilderLost, "it says nothing more");
        }
        // What is certain is not waited for.
        let mut oom = ended("OOMKilled", "exit code 137", Some(137));
        since(&mut oom, 0);
        assert_eq!(word(&oom, at(0)).ok().flatten().unwrap().reason, Reason::OutOfMemory);
        assert!(matches!(word(&pod(), at(0)), Ok(None)));
    }
}
