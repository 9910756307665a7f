//! The plan against a simulated cluster: random events, crashes after every prefix of what a plan does, and the rules
//! that must hold throughout (DESIGN.md: S1, S2, S3, S10, S12, L1).

use std::collections::BTreeMap;

use drover_api::{
    BuildRequest, BuildRequestSpec, BuilderClassSpec, DerivationSpec, OutputSpec, OutputStatus, Timings,
    Transfer,
};
use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proptest::prelude::*;

use super::*;
use crate::world::{Class, PodEnd, PodView, SessionEnd, SessionView, Stage};

/// What happens outside of the operator.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Event {
    /// The scheduler finds a node for every pod.
    Schedule,
    /// The session reaches its next stage; behind the last one, it finishes.
    Advance,
    /// The machinery fails, and says so.
    SessionFails,
    /// The connection breaks; the pod may have more to say, or not.
    SessionBreaks,
    BuildFails,
    /// The builder says that the build had too little memory.
    OutOfMemory,
    PodEvicted,
    /// The pod's container is killed for want of memory, all of it.
    PodOutOfMemory,
    /// The builder does not run on such a pod.
    BuilderRefuses,
    /// Somebody deletes the pod, or its node goes: no trace is left.
    PodGone,
    /// The operator starts anew.
    Crash,
    /// A write of ours came back late: the plan sees the request as it was before the last write.
    StaleRequest,
    Wait,
}

struct Sim {
    request: BuildRequest,
    before_last_write: BuildRequest,
    class: Class,
    pods: Vec<PodView>,
    session: Option<SessionView>,
    lookups: BTreeMap<u32, Lookup>,
    in_cache: bool,
    now: Timestamp,
    pods_created: u32,
    verdicts: Vec<bool>,
    writes: usize,
    stale: bool,
}

const STAGES: [Stage; 7] = [
    Stage::Connecting,
    Stage::Ready,
    Stage::CopyingInputs,
    Stage::InputsCopied,
    Stage::Building,
    Stage::Built,
    Stage::Collecting,
];

fn outputs() -> BTreeMap<String, OutputStatus> {
    BTreeMap::from([("out".to_owned(), OutputStatus::default())])
}

fn request(spec: BuildRequestSpec) -> BuildRequest {
    let mut request = BuildRequest::new("hello", spec);
    request.metadata.uid = Some("uid".into());
    request.metadata.namespace = Some("team".into());
    request.metadata.generation = Some(1);
    request
}

fn derivation() -> DerivationSpec {
    DerivationSpec {
        name: "hello".into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        outputs: BTreeMap::from([("out".to_owned(), OutputSpec::default())]),
        ..DerivationSpec::default()
    }
}

fn spec() -> BuildRequestSpec {
    BuildRequestSpec { derivation: Some(derivation()), ..BuildRequestSpec::default() }
}

fn class() -> Class {
    let spec = BuilderClassSpec { systems: vec!["x86_64-linux".into()], ..BuilderClassSpec::default() };
    Class::Found { name: "small".into(), spec: Box::new(spec), allowed: true }
}

impl Sim {
    fn new(spec: BuildRequestSpec, class: Class) -> Self {
        let request = request(spec);
        Self {
            before_last_write: request.clone(),
            request,
            class,
            pods: vec![],
            session: None,
            lookups: BTreeMap::new(),
            in_cache: false,
            now: Timestamp::from_second(1_000_000).unwrap(),
            pods_created: 0,
            verdicts: vec![],
            writes: 0,
            stale: false,
        }
    }

    fn world(&self) -> World {
        let request = if self.stale { &self.before_last_write } else { &self.request };
        let attempt = request.status.as_ref().and_then(|status| status.attempt).unwrap_or(0);
        World {
            request: request.clone(),
            class: self.class.clone(),
            pods: self.pods.clone(),
            lookup: self.lookups.get(&(attempt + 1)).cloned().unwrap_or(Lookup::Unknown),
            others: Default::default(),
            slot: Slot::Granted,
            refusal: None,
            session: self.session.clone(),
            timeouts: Default::default(),
            live: true,
        }
    }

    /// One pass, of which only the first `cut` effects happen; what is less than all of them is a crash.
    fn pass(&mut self, cut: usize) -> Plan {
        let plan = plan(&self.world(), self.now);
        let stale = std::mem::take(&mut self.stale);
        let mut effects = 0;
        if let Some(status) = &plan.status {
            if effects == cut {
                self.crash();
                return plan;
            }
            if stale {
                // The write names the version that it was made from, and the API server refuses it.
                return plan;
            }
            self.write(status);
            effects += 1;
        } else if stale {
            // Without a write, the executor reads the request again before it acts.
            return plan;
        }
        for action in &plan.actions {
            if effects == cut {
                self.crash();
                return plan;
            }
            self.act(action);
            effects += 1;
        }
        plan
    }

    fn write(&mut self, status: &BuildRequestStatus) {
        self.before_last_write = self.request.clone();
        self.request.status = Some(status.clone());
        self.writes += 1;
        if let Some(verdict) = conditions::verdict(&status.conditions) {
            self.verdicts.push(verdict);
        }
        if !status.outputs.is_empty() {
            assert!(self.in_cache, "outputs are recorded only after they were stored");
        }
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::LookUp { attempt } => {
                let lookup = if self.in_cache {
                    Lookup::Present(outputs())
                } else {
                    Lookup::Missing { absent: Default::default() }
                };
                self.lookups.insert(*attempt, lookup);
            }
            Action::ForgetLookUp | Action::AskForSlot { .. } | Action::ReleaseSlot => {}
            Action::CreatePod { attempt, .. } => {
                if self.pods.iter().any(|pod| pod.attempt == *attempt) {
                    return;
                }
                self.pods_created += 1;
                self.pods.push(PodView {
                    name: format!("hello-{attempt}"),
                    namespace: "builders".into(),
                    uid: format!("pod-{}", self.pods_created),
                    attempt: *attempt,
                    created: self.now,
                    deleting: false,
                    node: None,
                    scheduled: None,
                    deadline: None,
                    unschedulable: None,
                    waiting: None,
                    ended: None,
                    disruption: None,
                    image: None,
                });
            }
            Action::StartSession { attempt, pod_uid, .. } => {
                self.session = Some(SessionView {
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
            Action::DeletePod { uid, .. } => self.pods.retain(|pod| pod.uid != *uid),
            Action::DeleteRequest => panic!("no request here has a time to live"),
        }
        let attempts: Vec<u32> = self.pods.iter().map(|pod| pod.attempt).collect();
        let mut unique = attempts.clone();
        unique.dedup();
        assert_eq!(attempts, unique, "one pod an attempt");
    }

    fn crash(&mut self) {
        self.session = None;
        self.lookups.clear();
    }

    fn happen(&mut self, event: Event) {
        self.now = self.now.saturating_add(SignedDuration::from_secs(1)).unwrap();
        let failed = |reason: Reason, message: &str| {
            let infrastructure = reason.is_infrastructure();
            Some(SessionEnd::Failed { reason, message: message.into(), infrastructure })
        };
        let end = match event {
            Event::SessionFails => failed(Reason::InfrastructureFailure, "the cache does not answer"),
            Event::SessionBreaks => failed(Reason::ConnectionLost, "connection lost"),
            Event::BuildFails => failed(Reason::BuildFailed, "builder failed with exit code 1"),
            Event::OutOfMemory => failed(Reason::OutOfMemory, "out of memory: builder failed"),
            _ => None,
        };
        let running = self.session.as_mut().filter(|session| session.end.is_none());
        match (event, running) {
            (Event::Schedule, _) => self.pods.iter_mut().for_each(|pod| pod.node = Some("node".into())),
            (Event::Advance, Some(session)) => match STAGES.iter().find(|stage| **stage > session.stage) {
                Some(next) => session.stage = *next,
                None => {
                    self.in_cache = true;
                    session.end = Some(SessionEnd::Finished {
                        outputs: outputs(),
                        transfer: Transfer::default(),
                        timings: Timings::default(),
                    });
                    session.end_time = Some(self.now);
                }
            },
            (_, Some(session)) if end.is_some() => {
                if event == Event::BuildFails {
                    session.log_tail = vec!["error: no".into()];
                }
                (session.end, session.end_time) = (end, Some(self.now));
            }
            (Event::PodEvicted, _) => self.pods_end("Evicted", None),
            (Event::PodOutOfMemory, _) => self.pods_end("OOMKilled", Some(137)),
            (Event::BuilderRefuses, _) => self.pods_end("Error", Some(78)),
            (Event::PodGone, _) => self.pods.clear(),
            (Event::Crash, _) => self.crash(),
            (Event::StaleRequest, _) => self.stale = true,
            (Event::Wait, _) => self.now = self.now.saturating_add(SignedDuration::from_secs(30)).unwrap(),
            (_, None) | (_, Some(_)) => {}
        }
    }

    fn pods_end(&mut self, reason: &str, exit_code: Option<i32>) {
        let end = PodEnd {
            reason: reason.into(),
            message: String::new(),
            exit_code,
            last_line: Some("no sandbox here".into()),
            only_container_since: None,
        };
        self.pods.iter_mut().for_each(|pod| pod.ended = Some(end.clone()));
    }

    /// Lets everything go well from here until the request is settled.
    fn settle(&mut self) {
        for round in 0..500 {
            let event = [Event::Schedule, Event::Advance, Event::Wait][round % 3];
            self.happen(event);
            let plan = self.pass(usize::MAX);
            if !self.verdicts.is_empty() && plan.status.is_none() && plan.actions.is_empty() {
                return;
            }
        }
        panic!("no end in sight: {:#?}", self.request.status);
    }

    fn check_settled(&self) {
        assert!(self.pods.is_empty() && self.session.is_none(), "nothing is left behind");
        assert_eq!(self.verdicts.len(), 1, "a verdict is spoken once");
        let status = self.request.status.as_ref().unwrap();
        let succeeded = self.verdicts[0];
        assert_eq!(!status.outputs.is_empty(), succeeded);
        assert_eq!(status.failure.is_none(), succeeded);
        assert!(status.attempts.iter().all(|attempt| attempt.end_time.is_some()));
        let infrastructure = status.attempts.iter().filter(|attempt| attempt.infrastructure).count();
        let budget = self.request.spec.retries;
        assert!(infrastructure <= budget.infrastructure as usize + 1, "attempts stay within their budget");
        let again = plan(&self.world(), self.now);
        assert_eq!((again.status, again.actions), (None, vec![]), "a settled request is left alone");
    }
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => Just(Event::Schedule),
        8 => Just(Event::Advance),
        1 => Just(Event::SessionFails),
        1 => Just(Event::SessionBreaks),
        1 => Just(Event::BuildFails),
        1 => Just(Event::OutOfMemory),
        1 => Just(Event::PodEvicted),
        1 => Just(Event::PodOutOfMemory),
        1 => Just(Event::BuilderRefuses),
        1 => Just(Event::PodGone),
        1 => Just(Event::Crash),
        1 => Just(Event::StaleRequest),
        1 => Just(Event::Wait),
    ]
}

proptest! {
    /// Whatever happens, and wherever a pass is cut off, every request comes to exactly one end.
    #[test]
    fn every_request_ends_once(
        events in prop::collection::vec((event(), 0usize..5), 0..60),
        retries in 0u32..4,
    ) {
        let mut spec = spec();
        spec.retries.infrastructure = retries;
        let mut sim = Sim::new(spec, class());
        for (event, cut) in events {
            sim.happen(event);
            // Most passes are whole; cuts at 4 and beyond never bite.
            sim.pass(cut + 1);
        }
        sim.settle();
        sim.check_settled();
    }

    /// A plan that is made twice of the same world is the same plan: nothing is random.
    #[test]
    fn plans_are_deterministic(events in prop::collection::vec(event(), 0..30)) {
        let mut sim = Sim::new(spec(), class());
        for event in events {
            sim.happen(event);
            prop_assert_eq!(plan(&sim.world(), sim.now), plan(&sim.world(), sim.now));
            sim.pass(usize::MAX);
        }
    }
}

/// Not sampled but complete: one build in which all goes well, crashed after each of its effects.
#[test]
fn a_crash_after_any_effect_changes_nothing_in_the_end() {
    for crash_at in 0..40 {
        let mut sim = Sim::new(spec(), class());
        let mut effects = 0;
        for round in 0..40 {
            sim.happen([Event::Schedule, Event::Advance][round % 2]);
            let plan = plan(&sim.world(), sim.now);
            let here = usize::from(plan.status.is_some()) + plan.actions.len();
            let cut =
                if (effects..effects + here).contains(&crash_at) { crash_at - effects } else { usize::MAX };
            sim.pass(cut);
            effects += here;
        }
        sim.settle();
        sim.check_settled();
        assert_eq!(sim.verdicts, [true], "crash after effect {crash_at}");
        assert!(sim.pods_created <= 2, "crash after effect {crash_at}: {} pods", sim.pods_created);
    }
}

#[test]
fn a_build_takes_few_writes_and_one_pod() {
    let mut sim = Sim::new(spec(), class());
    sim.settle();
    sim.check_settled();
    assert_eq!(sim.pods_created, 1);
    assert!(sim.writes <= 8, "{} writes", sim.writes);
    let status = sim.request.status.unwrap();
    for condition in conditions::PHASES {
        assert!(conditions::is_true(&status.conditions, condition), "{condition}");
    }
    assert_eq!(status.builder.unwrap().node.as_deref(), Some("node"));
}

#[test]
fn outputs_that_are_there_need_no_pod() {
    let mut sim = Sim::new(spec(), class());
    sim.in_cache = true;
    sim.settle();
    sim.check_settled();
    assert_eq!(sim.pods_created, 0);
    assert_eq!(reason(&sim), "AlreadyBuilt");
}

#[test]
fn a_failed_build_is_not_repeated_and_keeps_its_log() {
    let mut sim = Sim::new(spec(), class());
    for event in [Event::Wait, Event::Wait, Event::Schedule, Event::Wait, Event::BuildFails] {
        sim.happen(event);
        sim.pass(usize::MAX);
    }
    sim.settle();
    sim.check_settled();
    assert_eq!((reason(&sim).as_str(), sim.pods_created), ("BuildFailed", 1));
    assert_eq!(sim.request.status.unwrap().failure.unwrap().log_tail, ["error: no"]);
}

#[test]
fn infrastructure_failures_end_with_the_budget() {
    let mut spec = spec();
    spec.retries.infrastructure = 2;
    let mut sim = Sim::new(spec, class());
    for _ in 0..40 {
        for event in [Event::Wait, Event::Schedule, Event::PodEvicted] {
            sim.happen(event);
            sim.pass(usize::MAX);
        }
    }
    sim.settle();
    sim.check_settled();
    assert_eq!((reason(&sim).as_str(), sim.pods_created), ("Evicted", 3));
}

/// A new simulation in the middle of its build.
fn building(retries: u32) -> Sim {
    let mut spec = spec();
    spec.retries.infrastructure = retries;
    let mut sim = Sim::new(spec, class());
    begin(&mut sim);
    sim
}

/// From nothing, or from an attempt that ended, to a build that runs.
fn begin(sim: &mut Sim) {
    for _ in 0..6 {
        for event in [Event::Wait, Event::Schedule] {
            sim.happen(event);
            sim.pass(usize::MAX);
        }
    }
    assert!(sim.session.as_ref().is_some_and(|session| session.end.is_none()), "{:#?}", sim.request.status);
}

fn attempts(sim: &Sim) -> Vec<(String, bool)> {
    let attempts = &sim.request.status.as_ref().unwrap().attempts;
    let ended = attempts.iter().filter(|attempt| attempt.end_time.is_some());
    ended.map(|attempt| (attempt.reason.clone().unwrap(), attempt.infrastructure)).collect()
}

#[test]
fn too_little_memory_is_no_verdict_but_has_its_name() {
    let mut sim = building(1);
    sim.happen(Event::OutOfMemory);
    sim.pass(usize::MAX);
    assert_eq!(reason(&sim), "Retrying");
    begin(&mut sim);
    sim.happen(Event::PodOutOfMemory);
    sim.pass(usize::MAX);
    sim.check_settled();
    assert_eq!((reason(&sim).as_str(), sim.verdicts.as_slice()), ("OutOfMemory", &[false][..]));
    assert_eq!(attempts(&sim), [("OutOfMemory".to_owned(), true), ("OutOfMemory".to_owned(), true)]);
    // The build's own budget would not have paid for it.
    let mut spec = spec();
    (spec.retries.infrastructure, spec.retries.build) = (0, 5);
    let mut sim = Sim::new(spec, class());
    begin(&mut sim);
    sim.happen(Event::OutOfMemory);
    sim.pass(usize::MAX);
    sim.check_settled();
    assert_eq!(sim.pods_created, 1);
}

#[test]
fn a_connection_that_broke_lets_the_pod_speak_first() {
    let mut sim = building(3);
    sim.happen(Event::SessionBreaks);
    let plan = sim.pass(usize::MAX);
    assert!(attempts(&sim).is_empty(), "the pod may say why");
    assert!(matches!(plan.requeue, Requeue::After(wait) if wait <= Duration::from_secs(10)), "{plan:?}");
    sim.happen(Event::PodOutOfMemory);
    sim.pass(usize::MAX);
    assert_eq!(attempts(&sim), [("OutOfMemory".to_owned(), true)]);

    // It says nothing: its builder goes on, and another session finds it.
    let mut sim = building(3);
    for event in [Event::Advance, Event::Advance, Event::SessionBreaks] {
        sim.happen(event);
        sim.pass(usize::MAX);
    }
    sim.happen(Event::Wait);
    sim.pass(usize::MAX);
    assert_eq!((attempts(&sim), reason(&sim).as_str()), (vec![], "Connecting"));
    assert!(sim.session.as_ref().is_some_and(|session| session.end.is_none()));
    sim.settle();
    assert_eq!((sim.verdicts.as_slice(), sim.pods_created), ([true].as_slice(), 1));
    assert_eq!(sim.request.status.as_ref().unwrap().attempts[0].reconnects, 1);

    // It has nothing to do with the pod.
    let mut sim = building(3);
    sim.happen(Event::SessionFails);
    sim.pass(usize::MAX);
    assert_eq!(attempts(&sim), [("InfrastructureFailure".to_owned(), true)]);

    // What the builder has said for certain stands, whatever became of its pod then.
    let mut sim = building(3);
    sim.happen(Event::OutOfMemory);
    sim.happen(Event::PodEvicted);
    sim.pass(usize::MAX);
    assert_eq!(attempts(&sim), [("OutOfMemory".to_owned(), true)]);
}

#[test]
fn a_builder_that_refuses_is_asked_once() {
    let mut sim = building(5);
    sim.happen(Event::BuilderRefuses);
    sim.pass(usize::MAX);
    sim.check_settled();
    assert_eq!((reason(&sim).as_str(), sim.pods_created), ("Unplaceable", 1));
    let message = sim.request.status.unwrap().failure.unwrap().message;
    assert!(message.ends_with("no sandbox here"), "{message}");
}

#[test]
fn cancel_ends_a_running_build() {
    let mut sim = Sim::new(spec(), class());
    for event in [Event::Wait, Event::Wait, Event::Schedule, Event::Wait, Event::Advance] {
        sim.happen(event);
        sim.pass(usize::MAX);
    }
    assert!(sim.session.is_some());
    sim.request.spec.cancel = Some(true);
    sim.settle();
    sim.check_settled();
    assert_eq!(reason(&sim), "Cancelled");
}

#[test]
fn what_can_never_be_built_ends_at_once() {
    let verdict = |spec: BuildRequestSpec, class: Class| {
        let mut sim = Sim::new(spec, class);
        sim.pass(usize::MAX);
        assert_eq!(sim.verdicts, [false]);
        sim.check_settled();
        (reason(&sim), sim.request.status.unwrap().failure.unwrap().message)
    };
    let with = |change: fn(&mut DerivationSpec)| {
        let mut derivation = derivation();
        change(&mut derivation);
        BuildRequestSpec { derivation: Some(derivation), ..spec() }
    };

    let (reason, message) = verdict(with(|d| d.system = "sparc-solaris".into()), class());
    assert_eq!(reason, "WrongSystem");
    assert!(message.contains("small") && message.contains("x86_64-linux"), "{message}");

    let (reason, message) =
        verdict(with(|d| drop(d.env.insert("requiredSystemFeatures".into(), "kvm".into()))), class());
    assert_eq!(reason, "WrongSystem");
    assert!(message.contains("kvm"), "{message}");

    let (reason, message) = verdict(with(|d| d.input_srcs = vec!["/nix/store/nonsense".into()]), class());
    assert_eq!(reason, "InvalidDerivation");
    assert!(message.contains("spec.derivation.inputSrcs[0]"), "{message}");

    let Class::Found { name, spec: class_spec, .. } = class() else { unreachable!() };
    let (reason, _) = verdict(spec(), Class::Found { name, spec: class_spec, allowed: false });
    assert_eq!(reason, "ClassNotAllowed");
}

#[test]
fn every_kind_of_output_gets_a_pod() {
    let algo = |hash: Option<&str>, method: &str| OutputSpec {
        path: None,
        hash_algo: Some("sha256".into()),
        hash: hash.map(str::to_owned),
        method: Some(method.into()),
    };
    let zeros = "0".repeat(64);
    for output in [
        OutputSpec::default(),
        algo(Some(&zeros), "nar"),
        algo(Some(&zeros), "text"),
        algo(None, "nar"),
        algo(None, "git"),
        algo(Some("impure"), "flat"),
    ] {
        let mut derivation = derivation();
        derivation.system = "builtin".into();
        derivation.builder = "builtin:fetchurl".into();
        derivation.env.insert("requiredSystemFeatures".into(), "ca-derivations".into());
        derivation.outputs.insert("out".into(), output.clone());
        let mut sim = Sim::new(BuildRequestSpec { derivation: Some(derivation), ..spec() }, class());
        sim.settle();
        assert_eq!((sim.pods_created, sim.verdicts.as_slice()), (1, [true].as_slice()), "{output:?}");
        assert_eq!(sim.request.status.unwrap().outputs, outputs());
    }
}

#[test]
fn paths_that_are_not_proven_get_no_pod() {
    let mut sim = Sim::new(spec(), class());
    let message = "output out claims another's path".to_owned();
    sim.lookups.insert(1, Lookup::Refused { reason: Reason::PathNotProven, message });
    sim.settle();
    sim.check_settled();
    assert_eq!((reason(&sim).as_str(), sim.pods_created), ("PathNotProven", 0));
}

#[test]
fn a_class_bounds_what_begins_and_not_what_runs() {
    let Class::Found { name, spec: class_spec, allowed } = class() else { unreachable!() };
    let mut narrow = class_spec.clone();
    narrow.resources = Some(serde_yaml::from_str("{maximum: {memory: 1Gi}}").unwrap());
    let narrow = Class::Found { name: name.clone(), spec: narrow, allowed };
    let wants = || BuildRequestSpec {
        resources: Some(serde_yaml::from_str("{limits: {memory: 2Gi}}").unwrap()),
        ..spec()
    };
    let mut sim = Sim::new(wants(), narrow.clone());
    sim.settle();
    assert_eq!((reason(&sim).as_str(), sim.pods_created), ("Unplaceable", 0));

    let mut sim = Sim::new(wants(), class());
    sim.pass(usize::MAX);
    sim.pass(usize::MAX);
    assert_eq!(sim.pods_created, 1);
    sim.class = narrow;
    sim.settle();
    assert_eq!(sim.verdicts, [true]);

    let mut elsewhere = class_spec;
    elsewhere.placement = drover_api::Placement::RequestNamespace;
    let mut sim = Sim::new(spec(), Class::Found { name, spec: elsewhere, allowed });
    sim.pass(usize::MAX);
    assert_eq!((reason(&sim).as_str(), sim.pods_created), ("WaitingForClass", 0));
}

#[test]
fn a_request_without_a_class_waits_and_says_so_once() {
    let mut sim = Sim::new(spec(), Class::Absent);
    sim.pass(usize::MAX);
    sim.happen(Event::Wait);
    sim.pass(usize::MAX);
    assert_eq!((reason(&sim).as_str(), sim.writes), ("WaitingForClass", 1));
    sim.class = class();
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn a_pod_without_a_node_says_what_the_scheduler_says() {
    let mut sim = Sim::new(spec(), class());
    for _ in 0..2 {
        sim.happen(Event::Crash);
        sim.pass(usize::MAX);
        sim.pass(usize::MAX);
    }
    sim.pods[0].unschedulable = Some("0/1 nodes are available".into());
    sim.happen(Event::Wait);
    sim.pass(usize::MAX);
    let status = sim.request.status.as_ref().unwrap();
    let scheduled = conditions::find(&status.conditions, conditions::SCHEDULED).unwrap();
    assert_eq!(
        (scheduled.reason.as_str(), scheduled.message.as_str()),
        ("WaitingForNode", "0/1 nodes are available")
    );
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn suspended_requests_start_nothing() {
    let mut sim = Sim::new(BuildRequestSpec { suspend: Some(true), ..spec() }, class());
    sim.pass(usize::MAX);
    assert_eq!((reason(&sim).as_str(), sim.pods_created), ("Suspended", 0));
    sim.request.spec.suspend = None;
    sim.settle();
    assert_eq!(sim.verdicts, [true]);
}

#[test]
fn a_request_that_is_being_deleted_loses_its_pod_and_gets_no_status() {
    let mut sim = Sim::new(spec(), class());
    sim.pass(usize::MAX);
    sim.pass(usize::MAX);
    assert_eq!(sim.pods.len(), 1);
    sim.request.metadata.deletion_timestamp = Some(Time(sim.now));
    let writes = sim.writes;
    sim.pass(usize::MAX);
    assert_eq!((sim.pods.len(), sim.writes), (0, writes));
}

#[test]
fn time_to_live_counts_from_the_end() {
    let mut sim = Sim::new(BuildRequestSpec { ttl_seconds_after_succeeded: Some(60), ..spec() }, class());
    sim.settle();
    let completed = sim.request.status.as_ref().unwrap().completion_time.clone().unwrap().0;
    let at = |seconds| completed.saturating_add(SignedDuration::from_secs(seconds)).unwrap();
    let early = plan(&sim.world(), at(59));
    assert_eq!((early.actions, early.requeue), (vec![], Requeue::After(Duration::from_secs(1))));
    assert_eq!(plan(&sim.world(), at(60)).actions, [Action::DeleteRequest]);
}

fn reason(sim: &Sim) -> String {
    let status = sim.request.status.as_ref().unwrap();
    conditions::find(&status.conditions, conditions::SUCCEEDED).unwrap().reason.clone()
}
