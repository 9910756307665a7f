//! What tenants, administrators and the cluster do to requests beside breaking the line: marks that are not theirs to set, names
//! that no object has, objects that cannot be read, Secrets and namespaces that are gone. None of it stops a request from saying
//! what it waits for, or from its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use drover_nix::signature::SecretKey;
use serde_json::{Value, json};

use crate::audit;
use crate::cluster::{BUILDERS, TEAM, World};
use crate::double::store::Writer;
use crate::double::{Failure, Key};
use crate::line::Faults;
use crate::run::{operate, run};
use crate::scenarios::{FAILING, PLAIN, Scenario, class, request};

/// In which a request says what it waits for (L3).
const SAID: Duration = Duration::from_secs(30);
/// In which it goes on, as soon as nothing is in its way: it looks by itself.
const GOES_ON: Duration = Duration::from_secs(120);

fn ends_well(scenario: &Scenario) {
    run(scenario, Faults::none(), None).unwrap_or_else(|why| panic!("{}: {why}", scenario.name));
}

/// The operator leaves that mark on copies in its own memory. Of a request that has it from its maker nothing is missing.
#[test]
fn a_mark_of_the_operators_own_means_nothing_on_an_object() {
    ends_well(&Scenario {
        script: || {
            vec![crate::cluster::Step {
                when: |_| true,
                after: jiff::SignedDuration::from_secs(1),
                act: |world| {
                    let mut marked = request("a", &[]);
                    marked["metadata"]["annotations"] = json!({"drover.build/stripped": ""});
                    world.make(Key::new("buildrequests", TEAM, "a"), marked);
                },
            }]
        },
        ..PLAIN
    });
}

/// Nobody but the definition's schema looks at the name; it becomes part of an address.
#[test]
fn a_name_that_no_class_can_have_is_a_class_that_is_not_there() {
    for name in ["no such class", "../builderclasses/small", "small?x", "small#", "Small", "ä"] {
        let world = World::new(vec![]);
        class(&world);
        while_operated(&world, async {
            let mut odd = request("a", &[]);
            odd["spec"]["class"] = name.into();
            world.make(Key::new("buildrequests", TEAM, "a"), odd);
            says(&world, "WaitingForClass", name).await;
            world.edit("a", "cancel", true.into());
            says(&world, "Cancelled", "").await;
        });
    }
}

#[test]
fn a_class_that_cannot_be_read_keeps_no_other_from_its_verdict() {
    ends_well(&Scenario {
        setup: |world| {
            class(world);
            let odd =
                json!({"metadata": {}, "spec": {"systems": ["x86_64-linux"], "caches": {"some": "where"}}});
            world.make(Key::new("builderclasses", "", "odd"), odd);
        },
        ..FAILING
    });
}

#[test]
fn a_secret_that_is_missing_is_named_and_waited_for() {
    let world = World::new(vec![]);
    for (name, key) in [("small", "signing"), ("other", "a/../b")] {
        let cache = json!({
            "url": format!("file://{}", world.cache().display()),
            "push": true,
            "signingKeySecretRef": {"name": key},
        });
        let spec = json!({"systems": ["x86_64-linux"], "caches": [cache]});
        world.make(Key::new("builderclasses", "", name), json!({"metadata": {}, "spec": spec}));
    }
    let signing = Key::new("secrets", "drover-system", "signing");
    while_operated(&world, async {
        for (name, class) in [("a", "small"), ("b", "other")] {
            let mut request = request(name, &[]);
            request["spec"]["class"] = class.into();
            world.make(Key::new("buildrequests", TEAM, name), request);
        }
        says(&world, "WaitingForClass", "cannot use Secret signing: it is not in namespace drover-system")
            .await;
        // There, and no key.
        world.make(signing.clone(), secret("nonsense"));
        says(&world, "WaitingForClass", "cannot use Secret of the class's signing key").await;
        assert!(world.starts().is_empty(), "no builder can do anything about that");
        world.server.with(|store, now| {
            store.change(&signing, Writer::User, now, |there| there["data"] = secret(&key())["data"].clone());
        });
        says_within(&world, "a", GOES_ON, "Built", "").await;
        says_within(&world, "b", SAID, "WaitingForClass", "cannot use Secret a/../b").await;
    });
}

/// However long their turn takes to come: that is no fault of their builders, which are to answer within ten minutes.
#[test]
fn builders_beyond_the_sessions_wait_for_their_turn() {
    const BUILDS: usize = 40;
    let world = World::new(vec![]);
    class(&world);
    world.max_sessions.store(1, Ordering::SeqCst);
    let names: Vec<String> = (0..BUILDS).map(|number| format!("a{number}")).collect();
    while_operated(&world, async {
        for name in &names {
            world.make(Key::new("buildrequests", TEAM, name), request(name, &[]));
        }
        // Whose turn is first, nobody says.
        let last = names.last().expect("some");
        says_within(&world, last, SAID, "StartingBuilder", "waits for its turn").await;
        for name in &names {
            says_within(&world, name, Duration::from_secs(3600), "Built", "").await;
        }
    });
    for name in &names {
        let status = world.request(name).expect("it is there")["status"].clone();
        assert_eq!(status["attempt"], 1, "{status}");
    }
}

/// Nothing was asked of the caches by the process that goes on with the attempt.
#[test]
fn a_secret_that_goes_with_the_operator_is_named_and_waited_for() {
    let world = World::new(vec![]);
    let cache = json!({
        "url": format!("file://{}", world.cache().display()),
        "push": true,
        "signingKeySecretRef": {"name": "signing"},
    });
    let spec = json!({"systems": ["x86_64-linux"], "caches": [cache]});
    world.make(Key::new("builderclasses", "", "small"), json!({"metadata": {}, "spec": spec}));
    let signing = Key::new("secrets", "drover-system", "signing");
    world.make(signing.clone(), secret(&key()));
    while_operated(&world, async {
        let mut request = request("a", &[]);
        request["spec"]["class"] = "small".into();
        world.make(Key::new("buildrequests", TEAM, "a"), request);
        says(&world, "Building", "").await;
    });
    world.server.with(|store, now| store.remove(&signing, Writer::User, now));
    // Another one.
    while_operated(&world, async {
        let why = "cannot use Secret signing: it is not in namespace drover-system";
        says_within(
            &world,
            "a",
            GOES_ON,
            "WaitingForClass",
            &format!("BuilderClass small cannot be used: {why}"),
        )
        .await;
        world.make(signing.clone(), secret(&key()));
        says_within(&world, "a", GOES_ON, "Built", "").await;
    });
    assert_eq!(world.starts().len(), 1, "it is the same build");
}

fn secret(key: &str) -> Value {
    json!({"metadata": {}, "data": {"key": BASE64.encode(key)}})
}

/// The text of a secret key: seed and public half.
fn key() -> String {
    let seed = [7; 32];
    let public = SecretKey::from_seed("key-1", &seed).expect("a key").public().to_string();
    let public = BASE64.decode(public.rsplit(':').next().expect("its bytes")).expect("base 64");
    format!("key-1:{}", BASE64.encode([&seed[..], &public].concat()))
}

#[test]
fn builders_without_a_namespace_are_waited_for() {
    let world = World::new(vec![]);
    class(&world);
    let builders = Key::new("namespaces", "", BUILDERS);
    world.server.with(|store, now| store.remove(&builders, Writer::User, now));
    while_operated(&world, async {
        world.make(Key::new("buildrequests", TEAM, "a"), request("a", &[]));
        says(&world, "WaitingForQuota", &format!("namespaces {BUILDERS:?} not found")).await;
        world.make(builders, json!({"metadata": {}}));
        says_within(&world, "a", GOES_ON, "Built", "").await;
    });
}

#[test]
fn a_policy_that_does_not_answer_is_waited_for() {
    let world = World::new(vec![]);
    class(&world);
    let refused = |_: &Key, _: &Value| Err(Failure::webhook("policy.example.org"));
    world.server.admit(Box::new(move |key, object| match key.kind.plural {
        "pods" => refused(key, object),
        _ => Ok(()),
    }));
    while_operated(&world, async {
        world.make(Key::new("buildrequests", TEAM, "a"), request("a", &[]));
        says(&world, "WaitingForQuota", "failed calling webhook \"policy.example.org\"").await;
        world.server.admit(Box::new(|_, _| Ok(())));
        says_within(&world, "a", GOES_ON, "Built", "").await;
    });
}

/// Runs the script beside an operator.
fn while_operated(world: &Arc<World>, script: impl Future<Output = ()>) {
    let faults = Arc::new(Faults::none());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        world.time.enter();
        tokio::spawn(world.clone().drive());
        tokio::select! {
            () = script => {}
            () = operate(world, &faults, 0) => panic!("the operator ended by itself"),
        }
        world.time.leave();
    });
}

/// Request `a` says this.
async fn says(world: &World, reason: &str, words: &str) {
    says_within(world, "a", SAID, reason, words).await;
}

async fn says_within(world: &World, name: &str, limit: Duration, reason: &str, words: &str) {
    let end = tokio::time::Instant::now() + limit;
    loop {
        let request = world.request(name).expect("it is there");
        let (said, message) = (audit::reason_of(&request), audit::message_of(&request));
        if said == reason && message.contains(words) {
            return;
        }
        assert!(
            tokio::time::Instant::now() < end,
            "{name} says {said:?}, {message:?}, not {reason}: {words}"
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
