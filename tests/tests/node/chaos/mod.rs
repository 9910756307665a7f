//! Hundreds of builds on a node on which everything fails: whatever becomes of operator, builders, connections, kubelet,
//! containerd, etcd and API server, each request has the end that it would have had, and no invariant is broken. That is read
//! from the API server's audit log, from the logs that the containers left and from the cache, not from the operator's words.
//!
//! `DROVER_CHAOS_SEED` repeats a run's decisions; the machine's own timing cannot be repeated.

mod evidence;
mod killer;
mod random;
mod workload;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_tests::audit::{Log, Rules};
use drover_tests::installation::{BUILDERS, RELEASE};
use drover_tests::{Installation, LogKeeper};
use serde_json::{Value, json};
use xtask::run;

use evidence::Evidence;
use killer::Killer;
use random::Random;
use workload::{Expected, Job, NAMESPACES};

/// Builds, not requests: some of those ask for the same.
const BUILDS: usize = 200;
/// Between two groups of requests.
const PACE: Duration = Duration::from_secs(6);
/// From the first request to the last fault, and from there until all has ended: what was killed often waits five minutes
/// for its next attempt.
const KILLING: Duration = Duration::from_secs(420);
const SETTLING: Duration = Duration::from_secs(400);
/// An API server that was killed is back by then.
const API_LIMIT: Duration = Duration::from_secs(60);
/// DESIGN.md, S6.
const GONE: Duration = Duration::from_secs(60);
/// What the runtime keeps of containers that ended is the kubelet's to tidy up, once a minute.
const FORGOTTEN: Duration = Duration::from_secs(150);

#[test]
fn no_build_is_lost_doubled_or_leaked() -> Result<()> {
    let seed = match std::env::var("DROVER_CHAOS_SEED") {
        Ok(text) => text.parse().context("DROVER_CHAOS_SEED is a number")?,
        Err(_) => std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs(),
    };
    println!("DROVER_CHAOS_SEED={seed}");
    let scratch = tempfile::Builder::new().prefix("drover-node-").tempdir_in("/tmp")?;
    let drover = Installation::up(scratch.path())?;
    let tools = drover.tools()?;
    for namespace in NAMESPACES {
        drover.cluster.kubectl(&["delete", "namespace", namespace, "--ignore-not-found", "--wait"])?;
        drover.cluster.kubectl(&["create", "namespace", namespace])?;
    }
    drover.cluster.apply(&workload::class(drover.cache.url()).to_string())?;
    let audit_log = drover.cluster.logs().join("audit.log");
    let before = std::fs::metadata(&audit_log)?.len();
    let kept = tempfile::Builder::new().prefix("drover-logs-").tempdir_in(&scratch)?;
    let keeper = LogKeeper::start(&drover.cluster, kept.path())?;

    let mut random = Random(seed);
    let batches = workload::batches(&mut random, BUILDS, &tools)?;
    let jobs: Vec<Job> = batches.iter().flatten().cloned().collect();
    let begun = Instant::now();
    let killer = Killer::start(&drover.cluster, random.next());
    let submitted = submit(&drover, &batches, &mut random);
    let ended_early = wait_until(&drover, &jobs, KILLING.saturating_sub(begun.elapsed()));
    let faults = killer.stop()?;
    for fault in &faults {
        println!("{fault}");
    }
    let killed = begun.elapsed();
    let all_ended = ended_early? || wait_until(&drover, &jobs, SETTLING)?;
    println!(
        "{} requests for {BUILDS} builds, {} faults in {:.0} s, all ended after {:.0} s",
        jobs.len(),
        faults.iter().filter(|fault| fault.outcome.is_ok()).count(),
        killed.as_secs_f64(),
        begun.elapsed().as_secs_f64(),
    );
    submitted?;
    let requests = requests(&drover)?;
    let unfinished: Vec<&Value> =
        requests.values().filter(|request| request["status"]["completionTime"].is_null()).collect();
    ensure!(
        all_ended,
        "{} requests have no end, the first: {:#}\nthe operator: {}",
        unfinished.len(),
        unfinished.first().map_or(&Value::Null, |first| *first),
        drover.operator_log()
    );

    // Then everything goes, and with it all that was made for it.
    for namespace in NAMESPACES {
        drover.cluster.kubectl(&["delete", "buildrequests", "--all", "-n", namespace, "--wait=false"])?;
    }
    run::wait_for("every builder to go, as pods and as processes", GONE, || {
        Ok(drover.builder_pods()?.is_empty()
            && drover_tests::faults::in_pods(&drover.cluster, "drover-builder")?.is_empty())
    })?;
    run::wait_for("the runtime to forget every builder", FORGOTTEN, || {
        let mut containers = drover.cluster.node_command("ctr")?;
        let listed = run::stdout(containers.args(["--namespace", "k8s.io", "containers", "list"]))?;
        Ok(!listed.contains("drover-builder"))
    })?;

    let text = std::fs::read(&audit_log)?;
    let text = String::from_utf8_lossy(&text[usize::try_from(before)?.min(text.len())..]).into_owned();
    let evidence = Evidence {
        drover: &drover,
        jobs: &jobs,
        requests: &requests,
        faults: &faults,
        log: Log::parse(&text),
        audit_text: &text,
        rules: Rules::new(RELEASE, RELEASE, BUILDERS),
        container_logs: keeper.logs()?,
    };
    let wrong = evidence.all()?;
    ensure!(
        wrong.is_empty(),
        "with DROVER_CHAOS_SEED={seed} {} things are wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    Ok(())
}

/// Applies one group after the other, and cancels and deletes what is to be, while the API server comes and goes.
fn submit(drover: &Installation, batches: &[Vec<Job>], random: &mut Random) -> Result<()> {
    let mut later: Vec<(Instant, &Job)> = Vec::new();
    for batch in batches {
        let next = Instant::now() + PACE;
        let items: Vec<&Value> = batch.iter().map(|job| &job.manifest).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
        persist("requests to be taken", || drover.cluster.apply(&list).map(drop))?;
        for job in batch.iter().filter(|job| matches!(job.expected, Expected::Cancelled | Expected::Deleted))
        {
            later.push((Instant::now() + Duration::from_millis(random.below(12_000) as u64), job));
        }
        finish(drover, &mut later, next)?;
    }
    let end = later.iter().map(|(due, _)| *due).max();
    end.map_or(Ok(()), |end| finish(drover, &mut later, end))
}

/// Cancels and deletes what is due before `end`, and returns then.
fn finish(drover: &Installation, later: &mut Vec<(Instant, &Job)>, end: Instant) -> Result<()> {
    later.sort_by_key(|(due, _)| std::cmp::Reverse(*due));
    while let Some((due, job)) = later.pop_if(|(due, _)| *due <= end) {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let target = ["buildrequest", job.name.as_str(), "-n", job.namespace];
        persist("a request to be cancelled or deleted", || {
            let kubectl = |args: &[&str]| drover.cluster.kubectl(&[args, &target[..]].concat()).map(drop);
            match job.expected {
                Expected::Deleted => kubectl(&["delete", "--ignore-not-found", "--wait=false"]),
                _ => kubectl(&["patch", "--type=merge", "-p", r#"{"spec": {"cancel": true}}"#]),
            }
        })?;
    }
    std::thread::sleep(end.saturating_duration_since(Instant::now()));
    Ok(())
}

/// As a person does whose API server does not answer: again, until it does.
fn persist(what: &str, mut act: impl FnMut() -> Result<()>) -> Result<()> {
    let mut last = None;
    run::wait_for(what, API_LIMIT, || {
        last = act().err();
        Ok(last.is_none())
    })
    .map_err(|error| match last.take() {
        Some(last) => error.context(format!("{last:#}")),
        None => error,
    })
}

/// Whether all have come to an end within this time.
fn wait_until(drover: &Installation, jobs: &[Job], limit: Duration) -> Result<bool> {
    let kept = jobs.iter().filter(|job| job.expected != Expected::Deleted).count();
    let begun = Instant::now();
    loop {
        // The API server may be away.
        if let Ok(requests) = requests(drover) {
            let ended =
                requests.values().filter(|request| request["status"]["completionTime"].is_string()).count();
            if ended >= kept && requests.len() == kept {
                return Ok(true);
            }
        }
        if begun.elapsed() >= limit {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_secs(2));
    }
}

/// All requests of the run that are there, by namespace and name.
fn requests(drover: &Installation) -> Result<BTreeMap<(String, String), Value>> {
    let json = drover.cluster.kubectl(&["get", "buildrequests", "-A", "-o", "json"])?;
    let list: Value = serde_json::from_str(&json)?;
    let items = list["items"].as_array().cloned().unwrap_or_default().into_iter();
    let key = |item: &Value| {
        let text = |field: &str| item["metadata"][field].as_str().unwrap_or_default().to_owned();
        (text("namespace"), text("name"))
    };
    let ours =
        items.filter(|item| NAMESPACES.iter().any(|namespace| item["metadata"]["namespace"] == *namespace));
    Ok(ours.map(|item| (key(&item), item)).collect())
}
