//! What comes back: what is refused, what is stored, and which paths need a proof.

use super::*;

#[test]
fn a_builder_that_lies_about_its_outputs() {
    type Lie = fn(&mut MemoryStore, &StorePath);
    let lies: [(Lie, Reason); 6] = [
        (
            |store, out| store.paths.get_mut(out).unwrap().0.nar_hash = Sha256::of(b""),
            Reason::OutputHashMismatch,
        ),
        (|store, out| store.paths.get_mut(out).unwrap().0.nar_size += 8, Reason::OutputHashMismatch),
        (|store, out| store.paths.get_mut(out).unwrap().0.nar_size -= 8, Reason::OutputHashMismatch),
        (|store, out| store.paths.get_mut(out).unwrap().0.references.clear(), Reason::OutputHashMismatch),
        (
            |store, out| {
                store.paths.get_mut(out).unwrap().0.references.insert(path(SOURCE));
            },
            Reason::OutputHashMismatch,
        ),
        (
            |store, out| {
                store.paths.remove(out);
            },
            Reason::OutputRejected,
        ),
    ];
    for (number, (lie, reason)) in lies.into_iter().enumerate() {
        let mut world = World::new();
        world.builder(move |store, derivation| {
            let result = build(store, derivation);
            lie(store, &result.built_outputs["out"].path);
            result
        });
        assert_eq!(world.run().reason(), (reason, false), "lie {number}");
    }
}

#[test]
fn a_reference_to_something_that_was_no_input() {
    let mut world = World::new();
    world.builder(|store, derivation| {
        let result = build(store, derivation);
        let out = result.built_outputs["out"].path.clone();
        store.insert(path(OTHER), &[], file_nar(b"other"));
        store.insert(out, &[&path(OTHER)], file_nar(OTHER.as_bytes()));
        result
    });
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::OutputRejected, false));
    assert!(ran.message().contains(OTHER));
}

#[test]
fn outputs_that_are_too_large() {
    let mut world = World::new();
    world.max_output_bytes = Some(200);
    assert_eq!(world.run().reason(), (Reason::OutputSizeLimitExceeded, false));
}

#[test]
fn an_output_that_the_cache_has_already() {
    let world = World::new();
    let paths = world.derivation.output_paths(&StoreDir::default()).unwrap();
    let dev = paths["dev"].clone().unwrap();
    let nar = file_nar(b"other headers");
    world.push.paths.lock().unwrap().insert(dev.clone(), (info_of(dev, &[], &nar), nar.clone()));
    let ran = world.run();
    let outcome = ran.result.as_ref().unwrap();
    assert_eq!(outcome.outputs["dev"].nar_hash, Sha256::of(&nar), "what the cache has counts");
    assert_eq!(ran.push.stored.lock().unwrap().len(), 1);
}

#[test]
fn a_cache_that_takes_nothing() {
    let mut world = World::new();
    world.push.unreachable = true;
    assert_eq!(world.run().reason(), (Reason::InfrastructureFailure, true));
}

#[test]
fn paths_that_nothing_proves() {
    let claimed = || single(DerivationOutput::InputAddressed(path(OTHER)));
    let mut world = World::new();
    world.derivation = claimed();
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::PathNotProven, false));
    assert!(ran.store.calls.is_empty(), "nobody is asked");
    let mut world = World::new();
    world.derivation = BasicDerivation { name: "other".into(), ..claimed() };
    world.trust = Trust::Claimed;
    world.builder(build_single(b"x", OTHER));
    assert_eq!(world.run().result.unwrap().outputs["out"].path, path(OTHER));
}
