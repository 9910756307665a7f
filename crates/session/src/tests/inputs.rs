//! What a build needs: what is sent, what is not, and what a cache that is wrong or away makes of it.

use super::*;

#[test]
fn what_the_builder_has_is_not_sent() {
    let mut world = World::new();
    world.store.insert(path(LIBC), &[], file_nar(b"libc"));
    let nar = file_nar(format!("contents of {TOOL}").as_bytes());
    let info = info_of(path(TOOL), &[&path(LIBC), &path(TOOL)], &nar);
    let size = info.nar_size;
    world.store.substitutable.insert(path(TOOL), (info, nar));
    let ran = world.run();
    let transfer = ran.result.as_ref().unwrap().transfer;
    assert_eq!((transfer.paths_total, transfer.paths_present, transfer.paths_sent), (3, 1, 1));
    assert_eq!((transfer.paths_fetched, transfer.bytes_fetched), (1, size));
    assert!(!ran.store.calls.iter().any(|call| call.ends_with(TOOL) && call.starts_with("add")));
}

#[test]
fn an_input_that_only_the_builder_has() {
    let mut world = World::new();
    world.sources.paths.lock().unwrap().clear();
    // Its own references count too, and those may be in a cache.
    world.store.insert(path(SOURCE), &[&path(LIBC)], file_nar(b"source"));
    let ran = world.run();
    let transfer = ran.result.as_ref().unwrap().transfer;
    assert_eq!((transfer.paths_present, transfer.paths_fetched), (1, 0));
    assert!(ran.store.paths.contains_key(&path(LIBC)));
}

#[test]
fn missing_inputs_are_named_all_of_them() {
    let world = World::new();
    world.sources.paths.lock().unwrap().clear();
    world.binaries.paths.lock().unwrap().remove(&path(LIBC));
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::InputMissing, false));
    let message = ran.message();
    for part in [LIBC, SOURCE, "memory:binaries", "memory:sources"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!ran.store.calls.iter().any(|call| call.starts_with("build")));
}

#[test]
fn a_cache_that_cannot_be_asked_gives_no_verdict() {
    let mut world = World::new();
    world.sources.unreachable = true;
    assert_eq!(world.run().reason(), (Reason::InfrastructureFailure, true));
    // But what another one has is good enough.
    let mut world = World::new();
    world.sources.unreachable = true;
    world.binaries.insert(SOURCE, &[]);
    world.run().result.unwrap();
}

#[test]
fn inputs_that_nobody_vouches_for() {
    let mut world = World::new();
    world.sources.untrusted.insert(path(SOURCE));
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::InputMissing, false));
    assert!(ran.message().contains("no signature"));
    // Another cache that cannot be asked might have had a trusted one.
    let mut world = World::new();
    world.sources.untrusted.insert(path(SOURCE));
    world.binaries.unreachable = true;
    assert_eq!(world.run().reason(), (Reason::InfrastructureFailure, true));
}

/// Before there is a builder that could be asked.
#[test]
fn inputs_that_no_cache_has() {
    let missing = |world: World| missing_inputs(&world.run().job);
    assert_eq!(missing(World::new()), MissingInputs::default());
    let world = World::new();
    world.sources.paths.lock().unwrap().clear();
    world.binaries.paths.lock().unwrap().remove(&path(LIBC));
    // Only of inputs; what they refer to is the session's business.
    let found = missing(world);
    assert_eq!((found.absent, found.unknown), (BTreeSet::from([path(SOURCE)]), BTreeSet::new()));
    for spoil in [
        |world: &mut World| world.sources.unreachable = true,
        |world: &mut World| world.sources.untrusted = BTreeSet::from([path(SOURCE)]),
    ] {
        let mut world = World::new();
        spoil(&mut world);
        let found = missing(world);
        assert_eq!((found.absent, found.unknown), (BTreeSet::new(), BTreeSet::from([path(SOURCE)])));
        assert!(found.trouble.is_some());
    }
}

#[test]
fn a_cache_that_lost_a_nar() {
    let mut world = World::new();
    world.binaries.hollow = true;
    assert_eq!(world.run().reason(), (Reason::InfrastructureFailure, true));
    let mut world = World::new();
    world.binaries.hollow = true;
    world.sources.insert(LIBC, &[]);
    world.sources.insert(TOOL, &[TOOL, LIBC]);
    world.run().result.unwrap();
}

#[test]
fn a_cache_that_delivers_something_else() {
    let good = file_nar(format!("contents of {SOURCE}").as_bytes());
    let mut other = good.clone();
    *other.iter_mut().find(|byte| **byte == b'c').unwrap() = b'C';
    for bytes in [other, good[..good.len() - 8].to_vec(), [good.as_slice(), &[0; 8]].concat(), Vec::new()] {
        let world = World::new();
        world.sources.corrupt(SOURCE, bytes);
        let ran = world.run();
        assert_eq!(ran.reason(), (Reason::InputHashMismatch, false));
        let message = ran.message();
        assert!(message.contains(SOURCE) && message.contains("memory:sources"), "{message}");
        assert!(!ran.store.paths.contains_key(&path(SOURCE)));
    }
}

#[test]
fn a_cache_that_breaks_off() {
    let mut world = World::new();
    world.binaries.breaks_at = Some(50);
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::InfrastructureFailure, true));
    assert!(ran.message().contains("memory:binaries"));
    // It broke off before anything of it had gone to the builder.
    assert!(ran.clean && ran.store.paths.is_empty());
}
