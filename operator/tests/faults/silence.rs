//! Radio silence: what is settled or waits for somebody else causes no write, however long it takes (S12).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::audit;
use crate::cluster::{TEAM, World};
use crate::double::{Failure, Key};
use crate::line::Faults;
use crate::run::operate;
use crate::scenarios::{class, output, request};

const HOUR: Duration = Duration::from_secs(3600);
/// By then everything has come to where it stays.
const SETTLED: Duration = Duration::from_secs(300);
/// Creations that a quota refuses are tried again, and not too often.
const QUOTA_TRIES: std::ops::Range<usize> = 10..100;

/// One request for each state in which one can stay.
fn requests() -> Vec<(&'static str, Value, &'static str)> {
    let plain = |name: &str| request(name, &[]);
    let with = |mut request: Value, field: &str, value: Value| {
        request["spec"][field] = value;
        request
    };
    let mut failing = plain("failing");
    failing["spec"]["derivation"]["env"]["fail"] = "1".into();
    let suspended = with(plain("suspended"), "suspend", true.into());
    let needy = request("needy", &[&output(&suspended)]);
    let narrow = |name| with(plain(name), "class", "narrow".into());
    vec![
        ("built", plain("built"), "Built"),
        ("failed", failing, "BuildFailed"),
        ("cancelled", with(plain("cancelled"), "cancel", true.into()), "Cancelled"),
        ("classless", with(plain("classless"), "class", "absent".into()), "WaitingForClass"),
        ("suspended", suspended, "Suspended"),
        ("needy", needy, "WaitingForInput"),
        ("stuck", narrow("stuck"), "WaitingForNode"),
        ("twin", narrow("stuck"), "WaitingForSameBuild"),
        ("late", narrow("late"), "WaitingForConcurrency"),
        ("refused", plain("refused"), "WaitingForQuota"),
    ]
}

#[test]
fn nothing_is_written_while_nothing_happens() {
    let world = World::new(vec![]);
    class(&world);
    let narrow = json!({"systems": ["x86_64-linux"], "concurrency": {"total": 1}});
    world.make(Key::new("builderclasses", "", "narrow"), json!({"metadata": {}, "spec": narrow}));
    world.server.admit(Box::new(|key, _| match key.name.starts_with("refused") {
        true => Err(Failure::quota(key, "exceeded quota: builds")),
        false => Ok(()),
    }));
    let faults = Arc::new(Faults::none());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        world.time.enter();
        tokio::spawn(world.clone().drive());
        let script = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            for (name, request, _) in requests() {
                world.make(Key::new("buildrequests", TEAM, name), request);
                // In this order, also for the queue.
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
            tokio::time::sleep(SETTLED).await;
            for (name, _, reason) in requests() {
                let found = world.request(name).expect("it is there");
                assert_eq!(audit::reason_of(&found), reason, "{name}");
            }
            let version = world.server.store().version();
            faults.writes.lock().expect("no panic in between").clear();
            tokio::time::sleep(HOUR).await;
            version
        };
        let version = tokio::select! {
            version = script => version,
            () = operate(&world, &faults, 0) => panic!("the operator ended by itself"),
        };
        let history = world.server.store().history.clone();
        audit::silent_since(&history, version).unwrap();
        let mut writes: BTreeMap<String, usize> = BTreeMap::new();
        for write in faults.writes.lock().expect("no panic in between").drain(..) {
            *writes.entry(write).or_default() += 1;
        }
        let tries = writes.remove("create pods").unwrap_or_default();
        assert!(QUOTA_TRIES.contains(&tries), "{tries} creations of the pod that is refused");
        assert_eq!(writes, BTreeMap::new());
    });
}
