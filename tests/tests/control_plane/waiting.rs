//! Requests that wait for each other, for a place or for a quota, against a real API server. Builders are a stand-in that
//! puts what it "builds" into the class's cache, as a session would.

use std::collections::{BTreeMap, HashSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use drover_api::convert::{complete, to_basic};
use drover_api::{DerivationSpec, OutputSpec, OutputStatus, Reason, Timings, Transfer};
use drover_cache::{CacheOptions, NarSpool};
use drover_nix::{PathInfo, Sha256, StoreDir, nar};
use drover_operator::session::job::JobPlan;
use drover_operator::session::{Assignment, Conversation, Progress};
use drover_operator::world::{SessionEnd, Stage};
use serde_json::{Value, json};
use tokio::sync::watch;
use xtask::run;

use crate::play::Node;
use crate::world::{BUILDERS, LIMIT, TEAM, World, condition};

/// One control plane for all: it takes seconds to start. The parts use requests of their own.
#[test]
fn what_waits_says_so_and_goes_on() -> Result<()> {
    let makers = Makers::default();
    let world = World::start()?;
    let _node = Node::start(&world)?;
    let operator = world.operator_with(Arc::new(makers.clone()))?;
    world.class("wide")?;
    class(&world, "narrow", "concurrency: {total: 1}")?;
    world.plane.kubectl(&["create", "namespace", "other"])?;

    a_whole_dag_in_reverse_order(&world, &makers)?;
    a_failed_dependency_fails_its_dependents(&world, &makers)?;
    a_cycle_is_reported(&world, &makers)?;
    the_same_is_built_once(&world, &makers)?;
    the_same_fails_once(&world, &makers)?;
    one_at_a_time_in_order(&world, &makers)?;
    operator.stop()?;
    a_restart_knows_who_runs(&world, &makers)?;
    Ok(())
}

#[test]
fn a_pod_that_is_refused_is_waited_for() -> Result<()> {
    let makers = Makers::default();
    let world = World::start()?;
    let _node = Node::start(&world)?;
    let operator = world.operator_with(Arc::new(makers))?;
    world.class("wide")?;

    quota(&world, 0)?;
    let one = Build::new("one", &[])?;
    one.apply(&world, TEAM, "one", "")?;
    world.wait_reason("one", "WaitingForQuota")?;
    let status = world.status("one")?;
    ensure!(message(&status).contains("exceeded quota"), "it is the API server's word: {status}");
    ensure!(status["attempts"].as_array().is_some_and(|all| all.len() == 1), "no attempt is lost: {status}");
    quota(&world, 10)?;
    world.wait("one", "True")?;

    // What no pod can be is no use waiting for.
    class(&world, "broken", "template: {spec: {nodeSelector: {zone: 'not a label value!'}}}")?;
    Build::new("broken", &[])?.apply(&world, TEAM, "broken", "  class: broken")?;
    world.wait("broken", "False")?;
    let status = world.status("broken")?;
    ensure!(status["failure"]["reason"] == "Unplaceable", "{status}");
    ensure!(message(&status).contains("not a label value!"), "{status}");
    operator.stop()
}

fn a_whole_dag_in_reverse_order(world: &World, makers: &Makers) -> Result<()> {
    let base = Build::new("base", &[])?;
    let left = Build::new("left", &[&base])?;
    let right = Build::new("right", &[&base])?;
    let top = Build::new("top", &[&left, &right])?;
    top.apply(world, TEAM, "top", "")?;
    world.wait_reason("top", "WaitingForInput")?;
    ensure!(message(&world.status("top")?).contains("no request builds it yet"));
    makers.hold("base");
    for build in [&right, &left, &base] {
        build.apply(world, TEAM, &build.name, "")?;
    }
    // It says whom it waits for as soon as that one is there.
    run::wait_for("top to name a request", LIMIT, || {
        let status = world.status("top")?;
        Ok(message(&status).contains("request left") || message(&status).contains("request right"))
    })?;
    makers.starts("base")?;
    world.wait_reason("left", "WaitingForInput")?;
    let status = world.status("left")?;
    ensure!(message(&status).contains(&base.path) && message(&status).contains("request base"), "{status}");
    makers.let_go("base");
    for name in ["base", "left", "right", "top"] {
        world.wait(name, "True")?;
        let status = world.status(name)?;
        ensure!(condition(&status, "Succeeded") == Some(("True", "Built")), "{status}");
        ensure!(status["attempt"] == 1, "{name} was begun before it could be built: {status}");
    }
    let started = makers.take_started();
    ensure!(started.len() == 4 && started[0] == "team/base" && started[3] == "team/top", "{started:?}");
    Ok(())
}

fn a_failed_dependency_fails_its_dependents(world: &World, makers: &Makers) -> Result<()> {
    let bad = Build::new("bad", &[])?;
    let user = Build::new("user", &[&bad])?;
    let further = Build::new("further", &[&user])?;
    makers.fail("bad");
    for build in [&further, &user, &bad] {
        build.apply(world, TEAM, &build.name, "")?;
    }
    for (name, because) in [("user", "request bad"), ("further", "request user")] {
        world.wait(name, "False")?;
        let status = world.status(name)?;
        ensure!(status["failure"]["reason"] == "DependencyFailed", "{status}");
        ensure!(message(&status).contains(because), "{status}");
    }
    ensure!(makers.take_started() == ["team/bad"]);
    Ok(())
}

/// Only outputs that are named before they are built can be named by each other.
fn a_cycle_is_reported(world: &World, makers: &Makers) -> Result<()> {
    let fixed = |name: &str| Build::fixed(name, &[]);
    let (egg, hen) = (fixed("egg")?, fixed("hen")?);
    for (build, needs) in [(&egg, &hen), (&hen, &egg)] {
        Build::fixed(&build.name, &[needs])?.apply(world, TEAM, &build.name, "")?;
    }
    for (name, other) in [("egg", "hen"), ("hen", "egg")] {
        world.wait(name, "False")?;
        let status = world.status(name)?;
        ensure!(status["failure"]["reason"] == "DependencyCycle", "{status}");
        ensure!(message(&status).contains(other), "{status}");
    }
    ensure!(makers.take_started().is_empty());
    Ok(())
}

fn the_same_is_built_once(world: &World, makers: &Makers) -> Result<()> {
    let same = Build::new("same", &[])?;
    makers.hold("same-1");
    same.apply(world, TEAM, "same-1", "")?;
    makers.starts("same-1")?;
    for name in ["same-2", "same-3"] {
        same.apply(world, TEAM, name, "")?;
        world.wait_reason(name, "WaitingForSameBuild")?;
        ensure!(message(&world.status(name)?).contains("same-1"));
    }
    // Another namespace neither waits nor is told.
    makers.hold("elsewhere");
    same.apply(world, "other", "elsewhere", "")?;
    makers.starts("elsewhere")?;
    makers.let_go("same-1");
    for name in ["same-2", "same-3"] {
        world.wait(name, "True")?;
        let status = world.status(name)?;
        ensure!(condition(&status, "Succeeded") == Some(("True", "AlreadyBuilt")), "{status}");
        ensure!(status["attempt"].is_null() && world.pods(name)?.is_empty(), "{status}");
    }
    makers.let_go("elsewhere");
    ensure!(makers.take_started() == ["team/same-1", "other/elsewhere"]);
    Ok(())
}

fn the_same_fails_once(world: &World, makers: &Makers) -> Result<()> {
    let same = Build::new("doomed", &[])?;
    // The third succeeds: held, so that the second does not find its output in the cache.
    makers.hold("doomed-1");
    makers.hold("doomed-3");
    makers.fail("doomed-1");
    same.apply(world, TEAM, "doomed-1", "")?;
    makers.starts("doomed-1")?;
    same.apply(world, TEAM, "doomed-2", "")?;
    // With another limit it might have ended otherwise: it builds by itself.
    same.apply(world, TEAM, "doomed-3", "  timeoutSeconds: 77")?;
    for name in ["doomed-2", "doomed-3"] {
        world.wait_reason(name, "WaitingForSameBuild")?;
    }
    makers.let_go("doomed-1");
    world.wait("doomed-2", "False")?;
    let status = world.status("doomed-2")?;
    ensure!(status["failure"]["reason"] == "BuildFailed" && status["attempt"].is_null(), "{status}");
    ensure!(message(&status).contains("doomed-1"), "{status}");
    makers.let_go("doomed-3");
    world.wait("doomed-3", "True")?;
    ensure!(makers.take_started() == ["team/doomed-1", "team/doomed-3"]);
    Ok(())
}

fn one_at_a_time_in_order(world: &World, makers: &Makers) -> Result<()> {
    let apply = |namespace: &str, name: &str, more: &str| {
        makers.hold(name);
        Build::new(name, &[])?.apply(world, namespace, name, &format!("  class: narrow\n{more}"))
    };
    makers.take_most_at_once();
    apply(TEAM, "runs", "")?;
    makers.starts("runs")?;
    apply(TEAM, "low", "  priority: -1")?;
    apply(TEAM, "plain", "")?;
    for name in ["low", "plain"] {
        world.wait_reason(name, "WaitingForConcurrency")?;
        ensure!(message(&world.status(name)?).contains("narrow"), "it names the class");
    }
    apply("other", "theirs", "  priority: -9")?;
    apply(TEAM, "urgent", "  priority: 2")?;
    apply(TEAM, "raised", "")?;
    for (namespace, name) in [("other", "theirs"), (TEAM, "urgent"), (TEAM, "raised")] {
        wait_reason(world, namespace, name, "WaitingForConcurrency")?;
    }
    world.change("raised", r#"{"priority": 9}"#)?;
    // Seen by the operator, and so by the queue, when it is in the status.
    run::wait_for("the change to be seen", LIMIT, || {
        let request = world.get("raised")?;
        Ok(request["status"]["observedGeneration"] == request["metadata"]["generation"])
    })?;
    let mut running = "runs";
    // The other namespace has its turn, whatever the priorities are.
    for next in ["theirs", "raised", "urgent", "plain", "low"] {
        makers.let_go(running);
        makers.starts(next)?;
        running = next;
    }
    let most = makers.take_most_at_once();
    ensure!(most == 1, "{most} ran at once");
    makers.let_go(running);
    world.wait("low", "True")?;
    makers.take_started();
    Ok(())
}

/// The place of a build that runs is taken, whoever gave it.
fn a_restart_knows_who_runs(world: &World, makers: &Makers) -> Result<()> {
    let first = world.operator_with(Arc::new(makers.clone()))?;
    for name in ["stays", "after"] {
        makers.hold(name);
    }
    Build::new("stays", &[])?.apply(world, TEAM, "stays", "  class: narrow")?;
    makers.starts("stays")?;
    first.stop()?;
    Build::new("after", &[])?.apply(world, TEAM, "after", "  class: narrow")?;
    let second = world.operator_with(Arc::new(makers.clone()))?;
    world.wait_reason("after", "WaitingForConcurrency")?;
    ensure!(world.pods("after")?.is_empty());
    makers.let_go("stays");
    world.wait("stays", "True")?;
    makers.let_go("after");
    world.wait("after", "True")?;
    second.stop()
}

fn class(world: &World, name: &str, more: &str) -> Result<()> {
    world.plane.apply(&format!(
        "apiVersion: drover.build/v1alpha1
kind: BuilderClass
metadata: {{name: {name}}}
spec:
  systems: [x86_64-linux]
  caches: [{{url: 'file://{}', push: true}}]
  {more}",
        world.cache.path().display()
    ))?;
    Ok(())
}

/// A quota on pods, with what its controller would say of it: there is none.
fn quota(world: &World, pods: u32) -> Result<()> {
    world.plane.apply(&format!(
        "{{apiVersion: v1, kind: ResourceQuota, metadata: {{name: few, namespace: {BUILDERS}}}, spec: {{hard: {{pods: '{pods}'}}}}}}"
    ))?;
    let status = json!({"status": {"hard": {"pods": pods.to_string()}, "used": {"pods": "0"}}}).to_string();
    let args =
        ["patch", "resourcequota", "few", "-n", BUILDERS, "--subresource=status", "--type=merge", "-p"];
    world.plane.kubectl(&[&args[..], &[&status]].concat())?;
    Ok(())
}

pub(crate) fn message(status: &Value) -> &str {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let succeeded = conditions.into_iter().find(|condition| condition["type"] == "Succeeded");
    succeeded.and_then(|condition| condition["message"].as_str()).unwrap_or_default()
}

fn wait_reason(world: &World, namespace: &str, name: &str, reason: &str) -> Result<()> {
    run::wait_for(&format!("{name} to say {reason}"), LIMIT, || {
        let request = world.plane.kubectl(&["get", "breq", "-n", namespace, name, "-o", "json"])?;
        let request: Value = serde_json::from_str(&request)?;
        Ok(condition(&request["status"], "Succeeded").is_some_and(|condition| condition.1 == reason))
    })
}

/// A derivation and where its output will be.
struct Build {
    name: String,
    derivation: DerivationSpec,
    path: String,
}

impl Build {
    fn new(name: &str, inputs: &[&Self]) -> Result<Self> {
        Self::with(name, inputs, OutputSpec::default())
    }

    /// Its output's path follows from its name alone.
    fn fixed(name: &str, inputs: &[&Self]) -> Result<Self> {
        let output = OutputSpec {
            hash: Some(Sha256::of(name.as_bytes()).to_string()),
            hash_algo: Some("sha256".into()),
            method: Some("nar".into()),
            path: None,
        };
        Self::with(name, inputs, output)
    }

    fn with(name: &str, inputs: &[&Self], output: OutputSpec) -> Result<Self> {
        let dir = StoreDir::default();
        let derivation = DerivationSpec {
            name: name.into(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            input_srcs: inputs.iter().map(|input| input.path.clone()).collect(),
            outputs: BTreeMap::from([("out".into(), output)]),
            ..DerivationSpec::default()
        };
        let basic = to_basic(&derivation, &dir).and_then(|basic| complete(basic, &dir))?;
        let out = basic
            .output_paths(&dir)?
            .into_values()
            .next()
            .flatten()
            .context("its path is not known before")?;
        Ok(Self { name: name.into(), derivation, path: dir.full(&out) })
    }

    /// As a request of this name; `more` goes on with the spec.
    fn apply(&self, world: &World, namespace: &str, name: &str, more: &str) -> Result<()> {
        let derivation = serde_json::to_string(&self.derivation)?;
        world.plane.apply(&format!(
            "apiVersion: drover.build/v1alpha1
kind: BuildRequest
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  derivation: {derivation}
{more}"
        ))?;
        Ok(())
    }
}

/// Builders that put outputs into the class's cache, unless they are told to wait or to fail. By the request's name.
#[derive(Clone, Default)]
pub(crate) struct Makers(Arc<Orders>);

#[derive(Default)]
struct Orders {
    held: watch::Sender<HashSet<String>>,
    fails: Mutex<HashSet<String>>,
    /// `namespace/name` of requests whose builds have started, in that order.
    started: watch::Sender<Vec<String>>,
    /// Builds that run, and the most that did since it was asked last.
    running: Mutex<(usize, usize)>,
}

impl Makers {
    pub(crate) fn hold(&self, name: &str) {
        self.0.held.send_modify(|held| {
            held.insert(name.into());
        });
    }

    pub(crate) fn let_go(&self, name: &str) {
        self.0.held.send_modify(|held| {
            held.remove(name);
        });
    }

    fn fail(&self, name: &str) {
        self.0.fails.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into());
    }

    /// Waits for this build to start.
    pub(crate) fn starts(&self, name: &str) -> Result<()> {
        let all = || self.0.started.borrow().join(" ");
        run::wait_for(&format!("{name} to start"), LIMIT, || {
            Ok(self.0.started.borrow().iter().any(|started| started.ends_with(&format!("/{name}"))))
        })
        .with_context(|| format!("started: {}", all()))
    }

    pub(crate) fn take_started(&self) -> Vec<String> {
        let mut started = vec![];
        self.0.started.send_modify(|all| started = std::mem::take(all));
        started
    }

    /// The most that ran at a time since this was asked last.
    fn take_most_at_once(&self) -> usize {
        let mut running = self.0.running.lock().unwrap_or_else(PoisonError::into_inner);
        let now = running.0;
        std::mem::replace(&mut running.1, now)
    }
}

/// One build that runs.
struct Count(Arc<Orders>);

impl Count {
    fn new(orders: &Arc<Orders>) -> Self {
        let mut running = orders.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.0 += 1;
        running.1 = running.1.max(running.0);
        Self(orders.clone())
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.running.lock().unwrap_or_else(PoisonError::into_inner).0 -= 1;
    }
}

impl Conversation for Makers {
    fn hold(
        &self,
        assignment: Assignment,
        progress: Arc<Progress>,
        mut stopped: watch::Receiver<bool>,
    ) -> Pin<Box<dyn Future<Output = SessionEnd> + Send>> {
        let orders = self.0.clone();
        Box::pin(async move {
            let request = &assignment.request;
            let name = request.name.clone();
            let _count = Count::new(&orders);
            orders.started.send_modify(|started| {
                started.push(format!("{}/{name}", request.namespace.as_deref().unwrap_or_default()));
            });
            progress.reach(Stage::Building);
            let mut held = orders.held.subscribe();
            tokio::select! {
                _ = held.wait_for(|held| !held.contains(&name)) => {}
                _ = stopped.changed() => {
                    return failed(Reason::InfrastructureFailure, "the operator gave this session up");
                }
            }
            if orders.fails.lock().unwrap_or_else(PoisonError::into_inner).contains(&name) {
                return failed(Reason::BuildFailed, "the builder failed with exit code 7");
            }
            let job = assignment.job;
            match tokio::task::spawn_blocking(move || make(&job)).await {
                Ok(Ok(outputs)) => SessionEnd::Finished {
                    outputs,
                    transfer: Transfer::default(),
                    timings: Timings::default(),
                },
                error => failed(Reason::InfrastructureFailure, &format!("{error:?}")),
            }
        })
    }
}

fn failed(reason: Reason, message: &str) -> SessionEnd {
    SessionEnd::Failed { reason, message: message.into(), infrastructure: reason.is_infrastructure() }
}

/// A file for each output, in the class's first cache.
fn make(job: &JobPlan) -> Result<BTreeMap<String, OutputStatus>> {
    let dir = StoreDir::default();
    let options = CacheOptions { require_signatures: false, ..CacheOptions::default() };
    let cache = drover_cache::open(&job.caches.first().context("no cache")?.url, &options)?;
    let mut outputs = BTreeMap::new();
    for (name, path) in job.derivation.output_paths(&dir)? {
        let path = path.context("its path is not known before")?;
        let mut writer = nar::Writer::new(Vec::new());
        writer.file_bytes(false, job.derivation.name.as_bytes())?;
        let bytes = writer.finish()?;
        let mut spool = NarSpool::new(&job.spool_dir, [])?;
        std::io::Write::write_all(&mut spool, &bytes)?;
        let info = PathInfo {
            path: path.clone(),
            nar_hash: Sha256::of(&bytes),
            nar_size: bytes.len() as u64,
            references: Default::default(),
            deriver: None,
            signatures: vec![],
            ca: None,
        };
        cache.put(&info, &spool.finish()?)?;
        let status = OutputStatus {
            path: dir.full(&path),
            nar_hash: info.nar_hash.to_string(),
            nar_size: info.nar_size,
            ..OutputStatus::default()
        };
        outputs.insert(name.to_string(), status);
    }
    Ok(outputs)
}
