//! A simulated cluster around one request: everything that a plan can meet, moved by abstract events, and the rules that must
//! hold at every effect (DESIGN.md: S1, S2, S3, S5, S9, S10).
//!
//! Effects go through the same gates as in `execute`: a status that was made from an old version is refused, and so are pods and
//! sessions; everything else is done unseen.

mod events;
mod key;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use drover_api::conditions;
use drover_api::convert::{self, Target};
use drover_api::{
    BuildRequest, BuildRequestSpec, BuildRequestStatus, BuilderClassSpec, DerivationSpec, OutputSpec,
    OutputStatus, Reason, Trust,
};
use drover_nix::StoreDir;
use drover_session::Resolved;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::plan::{Action, Plan, Requeue, plan};
use crate::settings::Timeouts;
use crate::world::{
    Class, Lookup, Other, OtherState, Others, PodRefusal, PodView, RefusalKind, Resolution, SameFailed,
    SessionView, Slot, Stage, World,
};

/// What time passes by, in seconds. More than the pod's lag, and the times below are whole numbers of it, so that few steps reach
/// every limit.
pub(in crate::plan::tests) const STEP: i64 = 20;
pub(in crate::plan::tests) const TIMEOUTS: Timeouts = Timeouts {
    scheduling: Duration::from_secs(60),
    start: Duration::from_secs(40),
    stall: Duration::from_secs(40),
    input_grace: Duration::from_secs(40),
    linger: Duration::from_secs(40),
};
/// Ages beyond every limit are one.
const OLDEST: i64 = 60;

pub(in crate::plan::tests) const INPUT: &str = "/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-input";

/// The derivation's.
pub(in crate::plan::tests) const DRV: &str = "/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-hello.drv";

/// What happens outside of the operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::plan::tests) enum Event {
    Wait,
    /// The scheduler finds a node for every pod.
    Schedule,
    /// The session reaches its next stage; behind the last one, it finishes.
    Advance,
    /// The session ends so.
    Ends(Reason),
    /// The pod ends, for this reason and with this exit code, and its session with it.
    PodEnds(&'static str, Option<i32>),
    /// Only its container has ended yet.
    ContainerEnds,
    /// The pod is told to go, by an eviction.
    Drain,
    /// Somebody deletes the pod by force, or its node goes: no trace is left.
    PodGone,
    /// The kubelet cannot pull the image.
    ImageFails,
    /// The operator starts anew.
    Crash,
    Env(Env),
    Cancel,
    Suspend(bool),
}

/// What others do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(in crate::plan::tests) struct Env {
    /// The outputs are in the class's cache.
    pub outputs: bool,
    pub input: Input,
    pub same: Same,
    /// The class's concurrency is not used up.
    pub has_room: bool,
    pub admission: Admission,
    pub has_class: bool,
    pub has_cycle: bool,
    /// Of a request that only names its derivation.
    pub file: File,
    /// Nobody knows yet what some other request builds.
    pub has_unread: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(in crate::plan::tests) enum Input {
    Cached,
    /// No cache has it; another request builds it.
    Going,
    Failed,
    /// It succeeded, and no cache has it all the same.
    Lost,
    /// No cache has it, and nobody builds it.
    Orphan,
}

/// What caches have of the derivation's own file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(in crate::plan::tests) enum File {
    There,
    Absent,
    /// They cannot be asked.
    Unreachable,
    /// Something else lies there.
    Wrong,
}

/// Another request for the same derivation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(in crate::plan::tests) enum Same {
    None,
    Running,
    Failed,
}

/// What the API server says of pods.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(in crate::plan::tests) enum Admission {
    Open,
    Quota,
    Invalid,
}

impl Env {
    pub(in crate::plan::tests) const GOOD: Self = Self {
        outputs: false,
        input: Input::Cached,
        same: Same::None,
        has_room: true,
        admission: Admission::Open,
        has_class: true,
        has_cycle: false,
        file: File::There,
        has_unread: false,
    };
}

#[derive(Clone)]
pub(in crate::plan::tests) struct Sim {
    pub request: BuildRequest,
    pub class: Class,
    pub pods: Vec<PodView>,
    pub session: Option<SessionView>,
    pub env: Env,
    pub now: Timestamp,
    /// Whether watches may show what was before the last write.
    pub lags: bool,
    /// Stages that sessions stop at.
    pub stages: &'static [Stage],
    pub lookup: Option<(u32, Lookup)>,
    pub resolution: Resolution,
    /// Whether it was read by a pass with a live world.
    read_live: bool,
    /// The attempt that has asked the queue, and the one that has leave.
    asked: Option<u32>,
    granted: Option<u32>,
    refusal: Option<PodRefusal>,
    wants_live: bool,
    version: u32,
    /// Request and pods as they were before the last write: what watches that lag show.
    pub before: (BuildRequest, Vec<PodView>),
    pub pods_created: u32,
    pub verdicts: Vec<bool>,
    pub writes: usize,
    pub reasons: BTreeSet<String>,
    /// How it came here, for whoever reads a failure.
    trail: Vec<Step>,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Happened(#[expect(dead_code, reason = "for Debug")] Event),
    /// A pass, cut after so many effects.
    Passed(#[expect(dead_code, reason = "for Debug")] usize),
    PassedStale(#[expect(dead_code, reason = "for Debug")] usize),
}

pub(in crate::plan::tests) const STAGES: [Stage; 7] = [
    Stage::Connecting,
    Stage::Ready,
    Stage::CopyingInputs,
    Stage::InputsCopied,
    Stage::Building,
    Stage::Built,
    Stage::Collecting,
];

pub(in crate::plan::tests) fn outputs() -> BTreeMap<String, OutputStatus> {
    BTreeMap::from([("out".to_owned(), OutputStatus::default())])
}

pub(in crate::plan::tests) fn derivation() -> DerivationSpec {
    DerivationSpec {
        name: "hello".into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        outputs: BTreeMap::from([("out".to_owned(), OutputSpec::default())]),
        ..DerivationSpec::default()
    }
}

pub(in crate::plan::tests) fn spec() -> BuildRequestSpec {
    BuildRequestSpec {
        derivation: Some(derivation()),
        // Given, so that it is not computed in each of a hundred thousand plans.
        drv_path: Some(DRV.into()),
        ..BuildRequestSpec::default()
    }
}

/// What there is at that name. Computed once: there may be a hundred thousand plans.
fn found() -> Arc<Resolved> {
    static FOUND: OnceLock<Arc<Resolved>> = OnceLock::new();
    let find = || {
        let Ok(Target::Derivation(derivation)) = convert::target(&spec(), &StoreDir::default()) else {
            unreachable!("the spec is good")
        };
        Arc::new(Resolved { drv_path: DRV[11..].parse().unwrap(), derivation })
    };
    FOUND.get_or_init(find).clone()
}

pub(in crate::plan::tests) fn class() -> Class {
    let spec = BuilderClassSpec {
        systems: vec!["x86_64-linux".into()],
        // Proofs of paths are made elsewhere; here the given name is to be taken.
        trust: Trust::Claimed,
        ..BuilderClassSpec::default()
    };
    Class::Found { name: "small".into(), spec: Box::new(spec), allowed: true }
}

impl Sim {
    pub(in crate::plan::tests) fn new(spec: BuildRequestSpec, class: Class) -> Self {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let mut request = BuildRequest::new("hello", spec);
        request.metadata.uid = Some("uid".into());
        request.metadata.namespace = Some("team".into());
        request.metadata.generation = Some(1);
        request.metadata.creation_timestamp = Some(Time(now));
        request.metadata.resource_version = Some("0".into());
        Self {
            before: (request.clone(), vec![]),
            request,
            class,
            pods: vec![],
            session: None,
            env: Env::GOOD,
            now,
            lags: false,
            stages: &STAGES,
            lookup: None,
            resolution: Resolution::Unknown,
            read_live: false,
            asked: None,
            granted: None,
            refusal: None,
            wants_live: false,
            version: 0,
            pods_created: 0,
            verdicts: vec![],
            writes: 0,
            reasons: BTreeSet::new(),
            trail: vec![],
        }
    }

    pub(in crate::plan::tests) fn status(&self) -> &BuildRequestStatus {
        self.request.status.as_ref().expect("a status was written")
    }

    /// The reason of the summary.
    pub(in crate::plan::tests) fn reason(&self) -> &str {
        &conditions::find(&self.status().conditions, conditions::SUCCEEDED).expect("a summary").reason
    }

    pub(in crate::plan::tests) fn message(&self) -> &str {
        &conditions::find(&self.status().conditions, conditions::SUCCEEDED).expect("a summary").message
    }

    pub(in crate::plan::tests) fn is_settled(&self) -> bool {
        // A pod that was told to go goes.
        let going = self.pods.iter().all(|pod| pod.deleting);
        !self.verdicts.is_empty() && going && self.session.is_none()
    }

    /// An input that nobody builds is still waited for.
    pub(in crate::plan::tests) fn is_young(&self) -> bool {
        let created = self.request.metadata.creation_timestamp.as_ref().expect("a time of creation");
        self.age(created.0, OLDEST) < TIMEOUTS.input_grace.as_secs() as i64
    }

    /// Ended attempts: reason, and whether the machinery was at fault.
    pub(in crate::plan::tests) fn attempts(&self) -> Vec<(&str, bool)> {
        let ended = self.request.status.iter().flat_map(|status| &status.attempts);
        let ended = ended.filter(|attempt| attempt.end_time.is_some());
        ended.map(|attempt| (attempt.reason.as_deref().unwrap_or(""), attempt.infrastructure)).collect()
    }

    pub(in crate::plan::tests) fn world(&self, live: bool) -> World {
        self.world_of(&self.request, &self.pods, live)
    }

    fn world_of(&self, request: &BuildRequest, pods: &[PodView], live: bool) -> World {
        let next = request.status.as_ref().and_then(|status| status.attempt).unwrap_or(0) + 1;
        let lookup = self.lookup.as_ref().filter(|(attempt, _)| *attempt == next);
        World {
            request: request.clone(),
            class: if self.env.has_class { self.class.clone() } else { Class::Absent },
            resolution: self.resolution.clone(),
            pods: pods.to_vec(),
            lookup: lookup.map_or(Lookup::Unknown, |(_, lookup)| lookup.clone()),
            others: self.others(),
            slot: if self.granted == Some(next) {
                Slot::Granted
            } else if self.asked != Some(next) {
                Slot::Unasked
            } else if self.env.same == Same::Running {
                Slot::WaitForSame { request: "twin".into() }
            } else {
                Slot::WaitForConcurrency { message: "1 of 1 in use".into() }
            },
            refusal: self.refusal.clone(),
            obstacle: None,
            session: self.session.clone(),
            timeouts: TIMEOUTS,
            live,
        }
    }

    fn others(&self) -> Others {
        let state = match self.env.input {
            Input::Cached | Input::Orphan => None,
            Input::Going => Some(OtherState::Going),
            Input::Lost => Some(OtherState::Succeeded),
            Input::Failed => {
                Some(OtherState::Failed { reason: Reason::BuildFailed, message: "exit code 1".into() })
            }
        };
        let other = state.map(|state| (INPUT.to_owned(), Other { request: "maker".into(), state }));
        let same_failed = (self.env.same == Same::Failed).then(|| SameFailed {
            request: "twin".into(),
            reason: Reason::BuildFailed,
            message: "exit code 1".into(),
        });
        let cycle = if self.env.has_cycle { vec!["hello".into(), "maker".into()] } else { vec![] };
        let unread = self.env.has_unread.then(|| "dark".to_owned());
        Others { producers: other.into_iter().collect(), same_failed, cycle, unread }
    }

    /// One pass, of which only the first `cut` effects happen; what is less than all of them is a crash.
    pub(in crate::plan::tests) fn pass(&mut self, cut: usize) -> Plan {
        self.trail.push(Step::Passed(cut));
        let world = self.world(self.wants_live);
        self.execute(&world, cut)
    }

    /// The same, from what watches showed before the last write.
    pub(in crate::plan::tests) fn stale_pass(&mut self, cut: usize) -> Plan {
        self.trail.push(Step::PassedStale(cut));
        let (request, pods) = self.before.clone();
        let world = self.world_of(&request, &pods, false);
        self.execute(&world, cut)
    }

    /// Passes until nothing more is to be done at once.
    pub(in crate::plan::tests) fn reconcile(&mut self) -> Plan {
        for _ in 0..10 {
            let plan = self.pass(usize::MAX);
            if matches!(plan.requeue, Requeue::After(_)) {
                return plan;
            }
        }
        panic!("it goes round in circles: {:#?}", plan(&self.world(self.wants_live), self.now));
    }

    fn execute(&mut self, world: &World, cut: usize) -> Plan {
        let plan = plan(world, self.now);
        let is_stale = world.request.metadata.resource_version != self.request.metadata.resource_version;
        self.wants_live = plan.requeue == Requeue::Live;
        let mut effects = 0;
        if let Some(status) = &plan.status {
            if effects == cut {
                self.crash();
                return plan;
            }
            if is_stale {
                return plan;
            }
            self.write(status, world);
            effects += 1;
        } else if is_stale
            && plan
                .actions
                .iter()
                .any(|action| matches!(action, Action::CreatePod { .. } | Action::StartSession { .. }))
        {
            return plan;
        }
        for action in &plan.actions {
            if effects == cut {
                self.crash();
                return plan;
            }
            self.act(action, world.live);
            effects += 1;
        }
        plan
    }

    fn act(&mut self, action: &Action, live: bool) {
        match action {
            Action::LookUp { attempt } => {
                let absent = if self.env.input == Input::Cached { vec![] } else { vec![INPUT.to_owned()] };
                let lookup = if self.env.outputs {
                    Lookup::Present(outputs())
                } else {
                    Lookup::Missing { absent: absent.into_iter().collect() }
                };
                self.lookup = Some((*attempt, lookup));
            }
            Action::ReadDerivation => {
                assert!(self.request.spec.derivation.is_none(), "it has one");
                self.read_live = live;
                self.resolution = match self.env.file {
                    File::There => Resolution::Found(found()),
                    File::Absent => Resolution::Absent { path: DRV[11..].parse().unwrap() },
                    File::Unreachable => Resolution::Unreadable { why: "no route".into() },
                    File::Wrong => Resolution::Refused {
                        reason: Reason::PathNotProven,
                        message: "its content belongs elsewhere".into(),
                    },
                };
            }
            Action::ForgetLookUp => {
                self.lookup = None;
                if !matches!(self.resolution, Resolution::Found(_)) {
                    self.resolution = Resolution::Unknown;
                }
            }
            Action::AskForSlot { attempt } => {
                self.asked = Some(*attempt);
                self.promote();
            }
            Action::ReleaseSlot => (self.asked, self.granted) = (None, None),
            Action::CreatePod { attempt, .. } => self.create_pod(*attempt),
            Action::StartSession { attempt, pod_uid, .. } => {
                let pod = self.pods.iter().find(|pod| pod.uid == *pod_uid).expect("the session's pod");
                assert!(pod.node.is_some() && self.session.is_none(), "one session at a time");
                self.session = Some(SessionView {
                    waits: false,
                    counted: None,
                    attempt: *attempt,
                    pod_uid: pod_uid.clone(),
                    started: self.now,
                    stage: Stage::Connecting,
                    sandbox: None,
                    host_key: None,
                    log_tail: vec![],
                    end: None,
                    end_time: None,
                });
            }
            Action::StopSession => self.session = None,
            Action::DeletePod { uid, .. } => {
                let going = self.request.metadata.deletion_timestamp.is_some() || !self.verdicts.is_empty();
                for pod in self.pods.iter().filter(|pod| pod.uid == *uid) {
                    assert!(going || self.open() != Some(pod.attempt), "the open attempt's pod is deleted");
                }
                self.pods.retain(|pod| pod.uid != *uid);
            }
            Action::DeleteRequest => panic!("no request here has a time to live"),
        }
    }

    fn open(&self) -> Option<u32> {
        let last = self.request.status.as_ref()?.attempts.last()?;
        last.end_time.is_none().then_some(last.number)
    }

    fn promote(&mut self) {
        if self.asked.is_some() && self.env.has_room && self.env.same != Same::Running {
            self.granted = self.asked.take();
        }
    }

    fn create_pod(&mut self, attempt: u32) {
        assert_eq!(self.open(), Some(attempt), "a pod is made for the open attempt");
        if self.pods.iter().any(|pod| pod.attempt == attempt) {
            return;
        }
        let refused =
            |kind| Some(PodRefusal { attempt, kind, message: "exceeded quota: pods".into(), at: self.now });
        self.refusal = match self.env.admission {
            Admission::Open => None,
            Admission::Quota => refused(RefusalKind::Quota),
            Admission::Invalid => refused(RefusalKind::Invalid),
        };
        if self.refusal.is_some() {
            return;
        }
        self.pods_created += 1;
        self.pods.push(PodView {
            name: format!("hello-{attempt}"),
            namespace: "builders".into(),
            uid: format!("pod-{}", self.pods_created),
            attempt,
            created: self.now,
            deleting: false,
            node: None,
            scheduled: None,
            deadline: None,
            unschedulable: Some("0/1 nodes are available".into()),
            waiting: None,
            ended: None,
            disruption: None,
            image: None,
        });
    }

    /// The request is another version now.
    fn change(&mut self) {
        self.version += 1;
        self.request.metadata.resource_version = Some(self.version.to_string());
    }

    fn crash(&mut self) {
        self.session = None;
        self.lookup = None;
        self.resolution = Resolution::Unknown;
        self.refusal = None;
        self.wants_live = false;
        (self.asked, self.granted) = (None, None);
    }
}
