//! One run of a scenario: operators, one after the other, with the double on the other end of their line.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use drover_operator::clock::Clock;
use drover_operator::controller::{self, Parts};
use drover_operator::keys::Seed;
use drover_operator::metrics::Metrics;
use drover_operator::settings::{Settings, Timeouts};
use drover_operator::trace::Tracer;
use jiff::SignedDuration;

use crate::audit;
use crate::builder::Talk;
use crate::cluster::{BUILDERS, World};
use crate::line::{Fault, Faults, Line, Trouble};
use crate::scenarios::Scenario;
use crate::time::Time;

/// From the death of an operator to the next.
const DOWNTIME: Duration = Duration::from_secs(3);
/// Virtual; no run takes so long unless something hangs.
const LIMIT: SignedDuration = SignedDuration::from_mins(40);
/// Requests and events of one run; one that comes to rest has a hundred.
const MOST_TRAFFIC: usize = 2000;
/// How long a run is watched after its end: longer than two sweeps.
const QUIET: Duration = Duration::from_secs(150);

/// What a run came to.
#[derive(Debug)]
pub(crate) struct Report {
    /// What the fault hit; None if the run never came so far.
    pub(crate) hit: Option<String>,
    /// Each request or event, in order.
    pub(crate) trace: Vec<String>,
    /// Reasons of the events about request `a`.
    pub(crate) events: Vec<String>,
    /// Names of all spans, as they ended.
    pub(crate) spans: Vec<String>,
}

enum End {
    Crashed,
    Over,
    Hung,
}

/// Runs it to its end and checks everything.
pub(crate) fn run(scenario: &Scenario, faults: Faults, fault: Option<Fault>) -> Result<Report, String> {
    let world = World::new((scenario.script)());
    (scenario.setup)(&world);
    let faults = Arc::new(faults);
    let begin = world.time.now();
    let mut settled_version = 0;
    let mut client = 0;
    loop {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let end = runtime.block_on(async {
            world.time.enter();
            tokio::spawn(world.clone().drive());
            if client > 0 {
                tokio::time::sleep(DOWNTIME).await;
            }
            let end = tokio::select! {
                () = operate(&world, &faults, client) => panic!("the operator ended by itself"),
                () = faults.crash.notified() => End::Crashed,
                end = until_over(&world, scenario, &faults, &mut settled_version) => end,
            };
            world.time.leave();
            end
        });
        // All that the operator was goes with its runtime.
        drop(runtime);
        match end {
            End::Crashed => client += 1,
            End::Over => break,
            End::Hung => {
                let ends = ends(&world, scenario);
                return Err(format!("it never came to its end: {ends:?}"));
            }
        }
    }
    verify(&world, scenario, fault, settled_version)
        .map_err(|why| format!("{why}\n{}", chronicle(&world, begin)))?;
    let trace = faults.trace.lock().expect("no panic in between").clone();
    let events = audit::events_about(&world.server.store().history, "a");
    Ok(Report { hit: faults.hit(), trace, events, spans: world.spans.told() })
}

pub(crate) async fn operate(world: &Arc<World>, faults: &Arc<Faults>, client: u32) {
    let alive = Arc::new(AtomicBool::new(true));
    let line = Line { server: world.server.clone(), faults: faults.clone(), client, alive: alive.clone() };
    let time = world.time.clone();
    let parts = Parts {
        client: kube::Client::new(line, "default"),
        settings: settings(world),
        seed: Seed::from_bytes(&[7; 32]).expect("a seed of the right length"),
        metrics: Arc::new(Metrics::new()),
        health: Arc::default(),
        clock: Clock::new(move || time.now()),
        conversation: Arc::new(Talk { world: world.clone(), alive }),
        tracer: Tracer::new(world.spans.clone()),
    };
    controller::run(parts, std::future::pending()).await;
}

fn settings(world: &World) -> Settings {
    Settings {
        namespace: "drover-system".into(),
        builder_namespace: BUILDERS.into(),
        builder_image: "drover/builder:1".into(),
        builder_pull_policy: "Never".into(),
        builder_pull_secrets: vec![],
        max_sessions: world.max_sessions.load(Ordering::SeqCst),
        pod_deadline_seconds: 86_400,
        work_dir: world.cache().to_owned(),
        concurrency: 4,
        // Longer than a watch lasts, so that an event that was lost only is late.
        timeouts: Timeouts::default(),
        scope: Default::default(),
    }
}

/// Until every request has its end and no pod is left; and then for a while, in which nothing may happen.
async fn until_over(world: &World, scenario: &Scenario, faults: &Faults, settled_version: &mut u64) -> End {
    let begin = world.time.now();
    loop {
        let traffic = faults.trace.lock().expect("no panic in between").len();
        let due = world.time.now().duration_since(begin) > LIMIT || traffic > MOST_TRAFFIC;
        let over = (scenario.over)(world) && !has_pods(world);
        match (over, due) {
            (true, _) => break,
            (false, true) => return End::Hung,
            (false, false) => tokio::time::sleep(Duration::from_secs(1)).await,
        }
    }
    *settled_version = world.server.store().version();
    tokio::time::sleep(QUIET).await;
    End::Over
}

fn has_pods(world: &World) -> bool {
    scenario_pods(world) > 0
}

fn scenario_pods(world: &World) -> usize {
    let pods = crate::double::Key::new("pods", "", "").kind;
    world.server.store().list(pods, None, &Default::default()).len()
}

fn ends(world: &World, scenario: &Scenario) -> Vec<(String, String)> {
    let names = scenario.ends.iter().map(|(name, _)| *name);
    let mut ends: Vec<_> = names.clone().map(|name| audit::end_of(world.request(name).as_deref())).collect();
    if scenario.interchangeable {
        ends.sort_by_key(|end| scenario.ends.iter().position(|(_, expected)| expected == end));
    }
    names.map(str::to_owned).zip(ends).collect()
}

fn verify(world: &World, scenario: &Scenario, fault: Option<Fault>, settled: u64) -> Result<(), String> {
    let expected: Vec<_> =
        scenario.ends.iter().map(|(name, end)| (name.to_string(), end.to_string())).collect();
    let ends = ends(world, scenario);
    if ends != expected {
        return Err(format!("it should end as {expected:?} and ended as {ends:?}"));
    }
    let starts = world.starts();
    if starts.len() != scenario.starts {
        return Err(format!("{} builds should be started; there were {starts:?}", scenario.starts));
    }
    let history = world.server.store().history.clone();
    audit::check(&history, world.time.now(), cost(fault))?;
    audit::silent_since(&history, settled)?;
    world.spans.check()
}

/// How long a fault may keep the operator from acting at all.
fn cost(fault: Option<Fault>) -> SignedDuration {
    let seconds = match fault {
        None => 0,
        Some(Fault::Before(Trouble::Silence) | Fault::After(Trouble::Silence)) => 60,
        Some(Fault::Late) => 45,
        // The longest that a watch lasts.
        Some(Fault::Lost) => 300,
        Some(_) => 30,
    };
    SignedDuration::from_secs(seconds)
}

/// Everything that happened, one line a change.
fn chronicle(world: &World, begin: jiff::Timestamp) -> String {
    let _ = begin;
    let mut lines = String::new();
    for change in &world.server.store().history {
        let what = match (&change.before, &change.after) {
            (None, _) => "made",
            (_, None) => "removed",
            _ => "changed",
        };
        let end = change.after.as_deref().filter(|_| change.key.kind.plural == "buildrequests");
        let end = end.map(|request| audit::end_of(Some(request))).unwrap_or_default();
        lines += &format!(
            "{:9.3} {:?} {what} {}/{} {end}\n",
            Time::elapsed(change.at),
            change.writer,
            change.key.kind.plural,
            change.key.name
        );
    }
    lines
}
