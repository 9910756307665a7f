//! Outputs whose paths follow from their content: nothing that a builder says of them is believed.

use std::io::Write as _;

use drover_nix::hash_modulo::HashModulo;

use super::*;

#[test]
fn fixed_outputs() {
    for (output, good) in [
        (fixed(Method::Flat, b"right"), true),
        (fixed(Method::Nar, &file_nar(b"right")), true),
        (fixed(Method::Flat, b"wrong"), false),
        (fixed(Method::Nar, &file_nar(b"wrong")), false),
    ] {
        let mut world = World::new();
        world.derivation = single(output.clone());
        world.builder(build_single(b"right", OTHER));
        let ran = world.run();
        match good {
            true => {
                let outcome = ran.result.unwrap();
                let DerivationOutput::CaFixed(address) = output else { unreachable!() };
                assert_eq!(outcome.outputs["out"].ca, Some(address));
            }
            false => assert_eq!(ran.reason(), (Reason::OutputHashMismatch, false)),
        }
    }
}

#[test]
fn floating_outputs() {
    let output = DerivationOutput::CaFloating { method: Method::Flat, algo: HashAlgo::Sha256 };
    let address = ContentAddress { method: Method::Flat, hash: Hash::from(Sha256::of(b"content")) };
    let at = address.store_path(&StoreDir::default(), "hello", &[].into(), false).unwrap();
    for honest in [true, false] {
        let mut world = World::new();
        world.derivation = single(output.clone());
        let place = if honest { at.clone() } else { path(OTHER) };
        world.builder(move |store, _| {
            store.insert(place.clone(), &[], file_nar(b"content"));
            success(&[(&OutputName::out(), &place)])
        });
        let ran = world.run();
        match honest {
            true => assert_eq!(ran.result.unwrap().outputs["out"].path, at),
            false => assert_eq!(ran.reason(), (Reason::OutputRejected, false)),
        }
    }
}

#[test]
fn nothing_is_believed_of_a_floating_output() {
    let dir = StoreDir::default();
    let address = |method, algo, hash: Hash| {
        assert_eq!(hash.algo, algo);
        ContentAddress { method, hash }
    };
    let nar = file_nar(LIBC.as_bytes());
    let good = address(Method::Nar, HashAlgo::Sha256, Sha256::of(&nar).into());
    let flat = address(Method::Flat, HashAlgo::Sha256, Sha256::of(LIBC.as_bytes()).into());
    let refers = BTreeSet::from([path(LIBC)]);
    let at = |address: &ContentAddress, name: &str, references: &BTreeSet<StorePath>| {
        address.store_path(&dir, name, references, false).unwrap()
    };
    // Where the builder says that the output is, and what it says that the output refers to.
    for (place, said, expected) in [
        (at(&good, "hello", &refers), &[LIBC][..], None),
        (at(&good, "other", &refers), &[LIBC], Some(Reason::OutputRejected)),
        (at(&good, "hello", &BTreeSet::new()), &[LIBC], Some(Reason::OutputRejected)),
        (at(&good, "hello", &BTreeSet::new()), &[], Some(Reason::OutputHashMismatch)),
        (at(&good, "hello", &refers), &[LIBC, TOOL], Some(Reason::OutputHashMismatch)),
        (at(&flat, "hello", &BTreeSet::new()), &[LIBC], Some(Reason::OutputRejected)),
    ] {
        let mut world = World::new();
        world.derivation =
            single(DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 });
        let (there, content) = (place.clone(), nar.clone());
        let references: Vec<StorePath> = said.iter().map(|base| path(base)).collect();
        world.builder(move |store, _| {
            store.insert(there.clone(), &references.iter().collect::<Vec<_>>(), content.clone());
            success(&[(&OutputName::out(), &there)])
        });
        let ran = world.run();
        match expected {
            None => assert_eq!(ran.result.unwrap().outputs["out"].ca, Some(good.clone())),
            Some(reason) => assert_eq!(ran.reason(), (reason, false), "{place} {said:?}"),
        }
    }
}

/// Content that mentions an input, of which the builder says that it refers to nothing.
#[test]
fn references_are_discarded_where_the_derivation_says_so() {
    for (attributes, accepted) in [
        (r#"{"unsafeDiscardReferences":{"out":true}}"#, true),
        (r#"{"unsafeDiscardReferences":{"out":false}}"#, false),
        ("{}", false),
    ] {
        let mut world = World::new();
        world.derivation =
            single(DerivationOutput::CaFloating { method: Method::Flat, algo: HashAlgo::Sha256 });
        world.derivation.env.insert("__json".into(), attributes.into());
        let content = format!("see {LIBC}");
        let address =
            ContentAddress { method: Method::Flat, hash: Hash::from(Sha256::of(content.as_bytes())) };
        let out =
            address.store_path(&StoreDir::default(), &world.derivation.name, &[].into(), false).unwrap();
        let expected = out.clone();
        world.builder(move |store: &mut MemoryStore, _: &BasicDerivation| {
            store.insert(out.clone(), &[], file_nar(content.as_bytes()));
            success(&[(&OutputName::out(), &out)])
        });
        let ran = world.run();
        if accepted {
            let outcome = ran.result.as_ref().unwrap();
            assert_eq!(
                (&outcome.outputs["out"].path, outcome.outputs["out"].references.len()),
                (&expected, 0)
            );
            assert!(ran.push.paths.lock().unwrap()[&expected].0.references.is_empty());
        } else {
            assert_eq!(ran.reason().0, Reason::OutputHashMismatch, "{attributes}");
        }
    }
}

#[test]
fn content_with_its_own_path_is_not_swapped() {
    let dir = StoreDir::default();
    // Where content that refers to itself twice belongs, by either rule, and content with zeros in one of the places.
    let own = path("i00sflxqsj37lfmf95m8mn0grv615hpj-hello");
    let nar = |own: &StorePath, first: &str| file_nar(format!("{first} and {}", own.hash_part()).as_bytes());
    let mut hasher = HashModulo::new(&own, HashAlgo::Sha256);
    hasher.write_all(&nar(&own, own.hash_part())).unwrap();
    let hashes = hasher.finish();
    let zeros = "\0".repeat(32);
    for (hash, trust, swapped, expected) in [
        (&hashes.with_offsets, Trust::Verified, false, None),
        (&hashes.with_offsets, Trust::Verified, true, Some(Reason::OutputRejected)),
        (&hashes.with_offsets, Trust::Claimed, true, Some(Reason::OutputRejected)),
        (&hashes.without_offsets, Trust::Verified, false, Some(Reason::OutputRejected)),
        (&hashes.without_offsets, Trust::Verified, true, Some(Reason::OutputRejected)),
        (&hashes.without_offsets, Trust::Claimed, false, None),
        // What Claimed believes, and why Verified does not.
        (&hashes.without_offsets, Trust::Claimed, true, None),
    ] {
        let address = ContentAddress { method: Method::Nar, hash: hash.clone() };
        let place = address.store_path(&dir, "hello", &[].into(), true).unwrap();
        let content = nar(&place, if swapped { &zeros } else { place.hash_part() });
        let mut world = World::new();
        world.trust = trust;
        world.derivation =
            single(DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 });
        world.builder(move |store, _| {
            store.insert(place.clone(), &[&place], content.clone());
            success(&[(&OutputName::out(), &place)])
        });
        let ran = world.run();
        match expected {
            None => drop(ran.result.unwrap()),
            Some(reason) => assert_eq!(ran.reason(), (reason, false), "{hash} {trust:?} {swapped}"),
        }
    }
}

#[test]
fn a_cache_with_other_content_at_a_path_that_follows_from_content() {
    let mut world = World::new();
    world.derivation = single(fixed(Method::Flat, b"right"));
    world.builder(build_single(b"right", OTHER));
    let out = world.derivation.output_paths(&StoreDir::default()).unwrap()["out"].clone().unwrap();
    let nar = file_nar(b"wrong");
    world.push.paths.lock().unwrap().insert(out.clone(), (info_of(out, &[], &nar), nar));
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::InfrastructureFailure, true));
    assert!(ran.message().contains("delete it"), "{}", ran.message());
}
