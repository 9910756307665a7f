//! The reference runs: what users and the cluster do, and how it must end, whatever goes wrong on the line.

use std::collections::BTreeSet;

use drover_api::convert::{Target, target};
use drover_nix::derivation::{aterm, modulo};
use drover_nix::{BasicDerivation, Derivation, DerivationOutput, OutputName, StoreDir, StorePath};
use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::cluster::{Step, TEAM, World};
use crate::double::Key;

pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) setup: fn(&World),
    pub(crate) script: fn() -> Vec<Step>,
    /// Whether all has happened that will.
    pub(crate) over: fn(&World) -> bool,
    /// How each request ends: see [`crate::audit::end_of`].
    pub(crate) ends: &'static [(&'static str, &'static str)],
    /// They are equal: which of them ends how is left open.
    pub(crate) interchangeable: bool,
    /// Builds that were begun in all pods together.
    pub(crate) starts: usize,
}

const SECOND: SignedDuration = SignedDuration::from_secs(1);

pub(crate) const PLAIN: Scenario = Scenario {
    name: "plain",
    setup: class,
    script: || vec![make_a()],
    over: |world| is_settled(world, "a"),
    ends: &[("a", "Built: Built")],
    interchangeable: false,
    starts: 1,
};

pub(crate) const FAILING: Scenario = Scenario {
    name: "failing",
    setup: class,
    script: || {
        vec![Step {
            when: |_| true,
            after: SECOND,
            act: |world| {
                let mut request = request("a", &[]);
                request["spec"]["derivation"]["env"]["fail"] = "1".into();
                world.make(Key::new("buildrequests", TEAM, "a"), request);
            },
        }]
    },
    over: |world| is_settled(world, "a"),
    ends: &[("a", "BuildFailed: BuildFailed")],
    interchangeable: false,
    starts: 1,
};

pub(crate) const EVICTED: Scenario = Scenario {
    name: "evicted",
    setup: class,
    script: || {
        let evict = Step {
            when: |world| world.builds("a", "1"),
            after: SignedDuration::from_secs(5),
            act: |world| world.evict("a"),
        };
        vec![make_a(), evict]
    },
    over: |world| is_settled(world, "a"),
    ends: &[("a", "Built: Evicted, Built")],
    interchangeable: false,
    starts: 2,
};

pub(crate) const LOST: Scenario = Scenario {
    name: "lost",
    setup: class,
    script: || {
        let lose = Step {
            when: |world| world.builds("a", "1"),
            after: SignedDuration::from_secs(5),
            act: |world| world.lose("a"),
        };
        vec![make_a(), lose]
    },
    over: |world| is_settled(world, "a"),
    ends: &[("a", "Built: BuilderLost, Built")],
    interchangeable: false,
    starts: 2,
};

pub(crate) const DAG: Scenario = Scenario {
    name: "dag",
    setup: class,
    script: || {
        let dependent = Step {
            when: |_| true,
            after: SECOND,
            act: |world| {
                let input = output(&request("a", &[]));
                world.make(Key::new("buildrequests", TEAM, "b"), request("b", &[&input]));
            },
        };
        let dependency = Step {
            when: |world| world.request("b").is_some(),
            after: SECOND,
            act: |world| world.make(Key::new("buildrequests", TEAM, "a"), request("a", &[])),
        };
        vec![dependent, dependency]
    },
    over: |world| is_settled(world, "a") && is_settled(world, "b"),
    ends: &[("a", "Built: Built"), ("b", "Built: Built")],
    interchangeable: false,
    starts: 2,
};

pub(crate) const EQUAL: Scenario = Scenario {
    name: "equal",
    setup: class,
    script: || {
        let twin = Step {
            when: |world| world.request("a").is_some(),
            after: SignedDuration::ZERO,
            act: |world| world.make(Key::new("buildrequests", TEAM, "twin"), request("a", &[])),
        };
        vec![make_a(), twin]
    },
    over: |world| is_settled(world, "a") && is_settled(world, "twin"),
    ends: &[("a", "Built: Built"), ("twin", "AlreadyBuilt: ")],
    interchangeable: true,
    starts: 1,
};

pub(crate) const CANCELLED: Scenario = Scenario {
    name: "cancelled",
    setup: class,
    script: || {
        let cancel = Step {
            when: |world| world.builds("a", "1"),
            after: SignedDuration::from_secs(5),
            act: |world| world.edit("a", "cancel", true.into()),
        };
        vec![make_a(), cancel]
    },
    over: |world| is_settled(world, "a"),
    ends: &[("a", "Cancelled: Cancelled")],
    interchangeable: false,
    starts: 1,
};

pub(crate) const DELETED: Scenario = Scenario {
    name: "deleted",
    setup: class,
    script: || {
        let delete = Step {
            when: |world| world.builds("a", "1"),
            after: SignedDuration::from_secs(5),
            act: |world| world.delete("a"),
        };
        vec![make_a(), delete]
    },
    over: |world| !world.starts().is_empty() && world.request("a").is_none(),
    ends: &[("a", "gone")],
    interchangeable: false,
    starts: 1,
};

pub(crate) const SHORT_LIVED: Scenario = Scenario {
    name: "short_lived",
    setup: class,
    script: || {
        vec![Step {
            when: |_| true,
            after: SECOND,
            act: |world| {
                let mut request = request("a", &[]);
                request["spec"]["ttlSecondsAfterSucceeded"] = 0.into();
                world.make(Key::new("buildrequests", TEAM, "a"), request);
            },
        }]
    },
    over: |world| !world.starts().is_empty() && world.request("a").is_none(),
    ends: &[("a", "gone")],
    interchangeable: false,
    starts: 1,
};

/// Requests that say which `.drv` alone, the dependent one first: what they build is read from the class's cache.
pub(crate) const BY_PATH: Scenario = Scenario {
    name: "by_path",
    setup: class,
    script: || {
        let dependent = Step {
            when: |_| true,
            after: SECOND,
            act: |world| {
                let (_, top) = chain(world);
                world.make(Key::new("buildrequests", TEAM, "b"), by_path(&top));
            },
        };
        let dependency = Step {
            when: |world| world.request("b").is_some(),
            after: SECOND,
            act: |world| {
                let (bottom, _) = chain(world);
                world.make(Key::new("buildrequests", TEAM, "a"), by_path(&bottom));
            },
        };
        vec![dependent, dependency]
    },
    over: |world| is_settled(world, "a") && is_settled(world, "b"),
    ends: &[("a", "Built: Built"), ("b", "Built: Built")],
    interchangeable: false,
    starts: 2,
};

fn make_a() -> Step {
    Step {
        when: |_| true,
        after: SECOND,
        act: |world| world.make(Key::new("buildrequests", TEAM, "a"), request("a", &[])),
    }
}

/// One class, with one cache.
pub(crate) fn class(world: &World) {
    let url = format!("file://{}", world.cache().display());
    let spec = json!({
        "systems": ["x86_64-linux"],
        "default": true,
        "caches": [{"url": url, "push": true}],
    });
    world.make(Key::new("builderclasses", "", "small"), json!({"metadata": {}, "spec": spec}));
}

/// A request for the derivation of this name.
pub(crate) fn request(name: &str, inputs: &[&str]) -> Value {
    json!({
        "metadata": {},
        "spec": {
            "derivation": {
                "name": name,
                "system": "x86_64-linux",
                "builder": "/bin/sh",
                "args": [],
                "env": {},
                "inputSrcs": inputs,
                "outputs": {"out": {}},
            },
            "retries": {"infrastructure": 5, "build": 0},
        },
    })
}

/// Puts two derivations into the cache, of which the second needs the first, and gives their paths.
fn chain(world: &World) -> (StorePath, StorePath) {
    let dir = StoreDir::default();
    let mut below: Option<(StorePath, modulo::InputHash)> = None;
    for name in ["bottom", "top"] {
        let mut drv = Derivation {
            basic: BasicDerivation {
                name: name.into(),
                outputs: [(OutputName::out(), DerivationOutput::Deferred)].into(),
                input_srcs: BTreeSet::new(),
                system: "x86_64-linux".into(),
                builder: "/bin/sh".into(),
                args: vec![],
                env: [("out".into(), "".into())].into(),
            },
            input_drvs: below.iter().map(|(path, _)| (path.clone(), [OutputName::out()].into())).collect(),
        };
        let mut input = |_: &StorePath| Ok(below.as_ref().expect("the one input").1.clone());
        let paths = modulo::output_paths(&dir, &drv, &mut input).expect("paths").expect("known ones");
        let out = paths["out"].clone();
        drv.basic.env.insert("out".into(), dir.full(&out).into());
        drv.basic.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(out));
        let hash = modulo::input_hash(&dir, &drv, &mut input).expect("a hash");
        let path = modulo::drv_path(&dir, &drv).expect("a path");
        world.keep_file(&path, &aterm::print(&dir, &drv).expect("a text"));
        match below.replace((path.clone(), hash)) {
            None => {}
            Some((bottom, _)) => return (bottom, path),
        }
    }
    unreachable!("there are two")
}

fn by_path(drv: &StorePath) -> Value {
    json!({
        "metadata": {},
        "spec": {
            "drvPath": StoreDir::default().full(drv),
            "retries": {"infrastructure": 5, "build": 0},
        },
    })
}

/// The full path of its output.
pub(crate) fn output(request: &Value) -> String {
    let spec = serde_json::from_value(request["spec"].clone()).expect("a spec");
    let dir = StoreDir::default();
    let Ok(Target::Derivation(derivation)) = target(&spec, &dir) else { panic!("a derivation") };
    let paths = derivation.output_paths(&dir).expect("paths");
    dir.full(paths.values().flatten().next().expect("one output, known before it is built"))
}

fn is_settled(world: &World, name: &str) -> bool {
    let end = crate::audit::end_of(world.request(name).as_deref());
    !end.starts_with("unsettled") && end != "gone"
}
