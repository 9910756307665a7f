//! Several operators, each a process of its own, and one lease. What they did is read from the API server's audit log, where
//! each is known by its User-Agent.

use std::os::unix::process::ExitStatusExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jiff::{SignedDuration, Timestamp};
use rustix::process::Signal;
use xtask::audit::Entry;
use xtask::run;

use crate::process::{DURATION, Operator, RENEW_DEADLINE, RETRY_PERIOD, holder};
use crate::world::{LIMIT, SYSTEM, World};

/// What two busy processors may add to anything.
const SLACK: Duration = Duration::from_secs(3);

#[test]
fn one_leads_and_the_next_one_follows() -> Result<()> {
    let world = World::start()?;
    class(&world)?;
    let mut first = Operator::start(&world, "first")?;
    first.wait_leads(&world)?;
    let mut second = Operator::start(&world, "second")?;
    run::wait_for("the second to stand by", LIMIT, || second.is_ready())?;
    run::wait_for("the first to be ready", LIMIT, || first.is_ready())?;
    ensure!(first.metric("drover_leader")? == "1" && second.metric("drover_leader")? == "0");
    let pod = built(&world, "one")?;

    // Told to end, it hands over at once.
    let told = Instant::now();
    let status = first.end(Signal::TERM)?;
    ensure!(status.success(), "{status}: {}", first.log());
    second.wait_leads(&world)?;
    ensure!(told.elapsed() < DURATION, "the second waited for the lease's end: {:?}", told.elapsed());
    built(&world, "two")?;
    ensure!(world.pod("one", 1)? == pod, "what the first had begun goes on");

    // Stopped for longer than the lease lasts, it finds that it was succeeded. What it had to do it does not do any more.
    let mut third = Operator::start(&world, "third")?;
    run::wait_for("the third to stand by", LIMIT, || third.is_ready())?;
    second.signal(Signal::STOP)?;
    world.request("three", "", "x86_64-linux")?;
    third.wait_leads(&world)?;
    world.pod("three", 1)?;
    world.request("four", "", "x86_64-linux")?;
    second.signal(Signal::CONT)?;
    let status = second.ended()?;
    ensure!(!status.success() && status.signal().is_none(), "{status}: {}", second.log());
    world.pod("four", 1)?;

    // Killed, it says nothing, and its lease has to run out.
    let mut fourth = Operator::start(&world, "fourth")?;
    run::wait_for("the fourth to stand by", LIMIT, || fourth.is_ready())?;
    let killed = Instant::now();
    third.end(Signal::KILL)?;
    fourth.wait_leads(&world)?;
    let waited = killed.elapsed();
    ensure!(waited < DURATION + RETRY_PERIOD * 2 + SLACK, "{waited:?}");
    built(&world, "five")?;

    // Twice told to end, it waits for nothing.
    fourth.signal(Signal::TERM)?;
    fourth.end(Signal::TERM)?;
    written_in_terms(&world, &["first", "second", "third", "fourth"])
}

#[test]
fn who_is_not_heard_or_not_meant_writes_no_more() -> Result<()> {
    let world = World::start()?;
    class(&world)?;
    let mut first = Operator::start(&world, "first")?;
    first.wait_leads(&world)?;
    let mut second = Operator::start(&world, "second")?;
    run::wait_for("the second to stand by", LIMIT, || second.is_ready())?;
    built(&world, "one")?;

    // An API server that is away for less than that changes nothing.
    let paused = world.plane.pause_apiserver()?;
    std::thread::sleep(RENEW_DEADLINE / 4);
    drop(paused);
    built(&world, "two")?;
    first.wait_leads(&world)?;

    // For longer, and the leader ends by itself while nobody answers. Nothing is on its way then: what was sent in time, the
    // API server may still do when it goes on.
    world.wait_reason("two", "WaitingForNode")?;
    let paused = world.plane.pause_apiserver()?;
    let began = Instant::now();
    let status = first.ended()?;
    let after = began.elapsed();
    ensure!(!status.success(), "{status}: {}", first.log());
    ensure!((RENEW_DEADLINE - RETRY_PERIOD - SLACK..RENEW_DEADLINE + SLACK).contains(&after), "{after:?}");
    while began.elapsed() < DURATION + RETRY_PERIOD {
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(paused);
    second.wait_leads(&world)?;
    built(&world, "three")?;

    // Somebody else puts a name of his own into the lease.
    let patch = r#"{"spec": {"holderIdentity": "thief"}}"#;
    world.plane.kubectl(&["patch", "lease", "drover", "-n", SYSTEM, "--type=merge", "-p", patch])?;
    let stolen = Instant::now();
    for name in ["four", "five", "six", "seven"] {
        world.request(name, "", "x86_64-linux")?;
    }
    let status = second.ended()?;
    ensure!(!status.success(), "{status}: {}", second.log());
    ensure!(stolen.elapsed() < RETRY_PERIOD * 2 + SLACK, "{:?}", stolen.elapsed());
    ensure!(second.log().contains("thief holds it now"), "{}", second.log());
    ensure!(holder(&world)? == "thief", "it was written over");
    written_in_terms(&world, &["first", "second"])
}

fn class(world: &World) -> Result<()> {
    world.plane.apply(&format!(
        "{{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {{name: small}}, spec: {{default: true, \
         systems: [x86_64-linux], caches: [{{url: 'file://{}', push: true}}]}}}}",
        world.cache.path().display()
    ))?;
    Ok(())
}

/// A request with this name gets a pod; the pod's name.
fn built(world: &World, name: &str) -> Result<String> {
    world.request(name, "", "x86_64-linux")?;
    world.pod(name, 1)
}

/// Whatever these operators wrote or tried to write, they did so while the lease was theirs: renewed not longer ago than it is
/// good for, and not written by anybody else since, but for the retry period that it takes to learn of a theft.
fn written_in_terms(world: &World, operators: &[&str]) -> Result<()> {
    let audit = world.audit()?;
    let theirs = world.plane.audit()?;
    let time = |received: &str| received.parse::<Timestamp>().context("a time of the audit log");
    let mut terms = Vec::new();
    // The API server has leases of its own, in another namespace.
    let of_lease = |entry: &&Entry| entry.resource == "leases" && entry.namespace == SYSTEM;
    for entry in theirs.iter().filter(of_lease).filter(|entry| entry.is_write() && entry.is_done()) {
        let holder = entry.body["spec"]["holderIdentity"].as_str().unwrap_or_default();
        terms.push((
            time(&entry.received)?,
            holder.to_owned(),
            entry.user_agent.starts_with("drover-operator/"),
        ));
    }
    terms.sort();
    for name in operators {
        let mut writes = 0;
        let agent = format!("({name})");
        let of_it = audit.iter().filter(|entry| entry.user_agent.ends_with(&agent));
        for entry in of_it.filter(|entry| entry.is_write() && entry.resource != "leases") {
            writes += 1;
            let at = time(&entry.received)?;
            let slack = |since: &Timestamp, limit: Duration| {
                SignedDuration::try_from(limit).is_ok_and(|limit| at.duration_since(*since) <= limit)
            };
            let mut before = terms.iter().rev().filter(|(since, ..)| *since <= at);
            let mine = |holder: &String| holder.starts_with(&format!("{name}_"));
            let in_term = match before.next() {
                Some((since, holder, _)) if mine(holder) => slack(since, DURATION),
                // A thief, who asked nobody.
                Some((since, _, false)) => {
                    slack(since, RETRY_PERIOD * 2) && before.next().is_some_and(|(_, holder, _)| mine(holder))
                }
                _ => false,
            };
            ensure!(in_term, "{name} wrote at {at}: {} {}; the lease: {terms:#?}", entry.verb, entry.uri);
        }
        ensure!(writes > 0, "{name} is not in the audit log, which proves nothing of it");
    }
    Ok(())
}
