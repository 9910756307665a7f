//! Whole sessions against the serve crate's server over real pipes, with a builder and caches in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, pipe};
use std::sync::Arc;
use std::thread;

use drover_nix::signature::SecretKey;
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Hash, HashAlgo, Method, OutputName, Sha256, StoreDir,
    StorePath,
};
use drover_serve::testing::{MemoryStore, file_nar, info_of};
use drover_serve::{BuildOptions, BuildResult, BuildStatus};

use crate::*;

mod again;
mod content;
mod frames;
mod inputs;
mod outputs;
mod world;

use world::*;

#[test]
fn one_build_from_end_to_end() {
    let mut world = World::new();
    world.key = Some(SecretKey::from_seed("test-1", &[7; 32]).unwrap());
    let public = SecretKey::from_seed("test-1", &[7; 32]).unwrap().public();
    let ran = world.run();
    let outcome = ran.result.as_ref().unwrap();
    assert!(ran.clean);

    // Locked as a whole before anything was copied; copied with references first.
    let closure: BTreeSet<StorePath> = [LIBC, TOOL, SOURCE].map(path).into();
    assert_eq!(ran.store.locked, closure);
    let calls: Vec<&str> = ran.store.calls.iter().map(String::as_str).collect();
    assert_eq!(calls[0], "query-valid-paths lock=true substitute=false");
    assert_eq!(calls[1], "query-valid-paths lock=false substitute=true");
    let position = |call: &str| calls.iter().position(|item| *item == call).unwrap();
    assert!(position(&format!("add-nar {LIBC}")) < position(&format!("add-nar {TOOL}")));
    assert_eq!(position(&format!("build-derivation {}", ran.job.drv_path)), 5);

    assert_eq!(outcome.transfer.paths_total, 3);
    assert_eq!((outcome.transfer.paths_present, outcome.transfer.paths_sent), (0, 3));
    let out = &outcome.outputs["out"];
    let dev = &outcome.outputs["dev"];
    assert_eq!(out.references, [out.path.clone(), dev.path.clone(), path(LIBC)].into());
    let built = outcome.built.as_ref().unwrap();
    assert_eq!((built.start_time, built.stop_time), (100, 107));

    // In the cache: references first, signed, with the deriver.
    assert_eq!(*ran.push.stored.lock().unwrap(), [dev.path.clone(), out.path.clone()]);
    let stored = ran.push.paths.lock().unwrap();
    let (info, nar) = &stored[&out.path];
    assert_eq!((info.nar_hash, out.nar_hash), (Sha256::of(nar), Sha256::of(nar)));
    assert_eq!(info.deriver.as_ref(), Some(&ran.job.drv_path));
    assert!(public.verify(info.fingerprint(&StoreDir::default()).as_bytes(), &out.signatures[0]));
    drop(stored);

    // What an observer hears, in order.
    let names: Vec<String> = ran
        .events
        .iter()
        .map(|event| {
            let text = format!("{event:?}");
            text[..text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len())].to_owned()
        })
        .collect();
    let expected = [
        "Connected",
        "ClosureComputed",
        "Locked",
        "FetchStarted",
        "Fetched",
        "CopyStarted",
        "Copied",
        "CopyStarted",
        "Copied",
        "CopyStarted",
        "Copied",
        "InputsCopied",
        "BuildStarted",
        "Built",
        "OutputStarted",
        "OutputReceived",
        "OutputStarted",
        "OutputReceived",
        "OutputsVerified",
        "OutputStored",
        "OutputStored",
        "OutputsCollected",
    ];
    assert_eq!(names, expected);

    // And now nobody needs a builder any more.
    let again = all_outputs_in_cache(&ran.job).unwrap().unwrap();
    assert_eq!(again.outputs, outcome.outputs);
    assert!(again.built.is_none());
}

#[test]
fn a_build_that_fails() {
    let mut world = World::new();
    world.builder(|_, _| BuildResult::failure(BuildStatus::PermanentFailure, "exit code 3"));
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::BuildFailed, false));
    // What came before has been done, and what would have come behind it has not.
    let Tally { transfer, timings } = ran.tally;
    assert!(
        transfer.paths_sent == 3 && transfer.bytes_sent > 0 && transfer.bytes_received == 0,
        "{transfer:?}"
    );
    assert!(!timings.copy_in.is_zero() && !timings.build.is_zero() && timings.store.is_zero(), "{timings:?}");
    assert!(ran.message().contains("exit code 3"));
}

#[test]
fn a_builder_that_goes_away() {
    let world = World::new();
    let dir = StoreDir::default();
    let job = Job {
        drv_path: drv_path_of(&dir, &world.derivation).unwrap(),
        dir,
        derivation: world.derivation,
        options: BuildOptions::default(),
        caches: vec![Arc::new(world.binaries), Arc::new(world.sources)],
        push: None,
        signing_key: None,
        trust: Trust::Verified,
        proven: Arc::default(),
        max_output_bytes: None,
        spool_dir: std::env::temp_dir(),
        kept: Arc::default(),
    };
    // A server's half of the whole conversation, recorded by letting it run over memory, cut off anywhere.
    for len in [0, 8, 16, 20] {
        let greeting = [0x5452_eecb_u64.to_le_bytes(), 0x207_u64.to_le_bytes(), [0; 8]].concat();
        let failure = run(&greeting[..len], io::sink(), &job, &mut |_| {}).unwrap_err();
        assert_eq!((failure.reason, failure.infrastructure), (Reason::ConnectionLost, true));
    }
}

#[test]
fn derivations_that_nobody_can_build() {
    for derivation in
        [single(DerivationOutput::Deferred), BasicDerivation { outputs: BTreeMap::new(), ..derivation() }]
    {
        let mut world = World::new();
        world.trust = Trust::Claimed;
        world.derivation = derivation;
        assert_eq!(world.run().reason(), (Reason::InvalidDerivation, false));
    }
}
