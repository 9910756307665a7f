//! Against what real Nix made of `testdata/derivations.nix`, and against themselves.

use std::collections::{BTreeMap, BTreeSet};

use bstr::BString;
use proptest::prelude::*;

use super::modulo::{self, InputHash};
use super::*;
use crate::Sha256;

/// `.drv` files by their base names.
const FILES: [(&str, &[u8]); 7] = [
    (
        "71m2sa1klz0z8f4wr7pd4720426h34ax-fetched.drv",
        include_bytes!("../../testdata/71m2sa1klz0z8f4wr7pd4720426h34ax-fetched.drv"),
    ),
    (
        "gc8afz0vd2my774qn36nd880d5cmk6dz-fetched.drv",
        include_bytes!("../../testdata/gc8afz0vd2my774qn36nd880d5cmk6dz-fetched.drv"),
    ),
    (
        "p3s9bs8pv3fjlqsq5534pawsrh6kmcha-flat.tar.drv",
        include_bytes!("../../testdata/p3s9bs8pv3fjlqsq5534pawsrh6kmcha-flat.tar.drv"),
    ),
    (
        "sk87m2ks4hmkkdrnhlvfgcbqsa8wnfzi-mid.drv",
        include_bytes!("../../testdata/sk87m2ks4hmkkdrnhlvfgcbqsa8wnfzi-mid.drv"),
    ),
    (
        "k2jjrqkh6zll1k4b91xbbks0ml5qw4cy-mid.drv",
        include_bytes!("../../testdata/k2jjrqkh6zll1k4b91xbbks0ml5qw4cy-mid.drv"),
    ),
    (
        "b2nsf2bia2n669rxhbvfjx7qpy4zjljr-leaf.drv",
        include_bytes!("../../testdata/b2nsf2bia2n669rxhbvfjx7qpy4zjljr-leaf.drv"),
    ),
    (
        "inyw81mm787rpk7lrbq7ypd0zj55kgpv-attrs.drv",
        include_bytes!("../../testdata/inyw81mm787rpk7lrbq7ypd0zj55kgpv-attrs.drv"),
    ),
];

fn parse_all() -> BTreeMap<StorePath, Derivation> {
    FILES
        .into_iter()
        .map(|(path, text)| {
            let path: StorePath = path.parse().unwrap();
            let drv = aterm::parse(&StoreDir::default(), path.derivation_name().unwrap(), text).unwrap();
            (path, drv)
        })
        .collect()
}

fn by_name(drvs: &BTreeMap<StorePath, Derivation>, name: &str) -> Derivation {
    drvs.values().find(|drv| drv.basic.name == name).unwrap().clone()
}

/// As a caller with all files at hand does it.
fn input_hash_of(drvs: &BTreeMap<StorePath, Derivation>, path: &StorePath) -> Result<InputHash, Error> {
    modulo::input_hash(&StoreDir::default(), &drvs[path], &mut |input| input_hash_of(drvs, input))
}

#[test]
fn real_files_print_as_they_were_and_have_their_paths() {
    let dir = StoreDir::default();
    let drvs = parse_all();
    for (path, text) in FILES {
        let path: StorePath = path.parse().unwrap();
        assert_eq!(BString::from(aterm::print(&dir, &drvs[&path]).unwrap()), BString::from(text));
        assert_eq!(modulo::drv_path(&dir, &drvs[&path]).unwrap(), path);
    }
    let mid = by_name(&drvs, "mid").basic;
    assert_eq!(mid.args[1], "echo \"quoted\" \\ back\ttab\r\n");
    assert_eq!(mid.outputs.len(), 2);
    assert_eq!(by_name(&drvs, "flat.tar").basic.kind().unwrap(), DerivationType::CaFixed);
    assert_eq!(by_name(&drvs, "leaf").input_drvs.len(), 2);
}

#[test]
fn real_files_have_the_output_paths_that_they_must_have() {
    let dir = StoreDir::default();
    let drvs = parse_all();
    for drv in drvs.values() {
        let computed =
            modulo::output_paths(&dir, drv, &mut |input| input_hash_of(&drvs, input)).unwrap().unwrap();
        let stated: BTreeMap<_, _> = drv
            .basic
            .output_paths(&dir)
            .unwrap()
            .into_iter()
            .map(|(name, path)| (name, path.unwrap()))
            .collect();
        assert_eq!(computed, stated, "{}", drv.basic.name);
    }
    // Two ways to fetch the same thing make no difference further down.
    let hashes: BTreeSet<_> = drvs
        .iter()
        .filter(|(_, drv)| drv.basic.name == "mid")
        .map(|(path, _)| match input_hash_of(&drvs, path).unwrap() {
            InputHash::Whole(hash) => hash,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(hashes.len(), 1);
}

#[test]
fn a_changed_derivation_has_other_paths() {
    let dir = StoreDir::default();
    let drvs = parse_all();
    let attrs = by_name(&drvs, "attrs").basic;
    let paths = modulo::basic_output_paths(&dir, &attrs).unwrap();
    let out = "kk885c1fdy8d3dzrqxn0ycvq3cwr8kb7-attrs";
    assert_eq!(paths[&OutputName::out()].as_str(), out);
    let mut changed = attrs.clone();
    changed.args.push("x".into());
    assert_ne!(modulo::basic_output_paths(&dir, &changed).unwrap()[&OutputName::out()].as_str(), out);
    // Leaving the paths out, with or without their env entries, leads back to them.
    for with_env in [true, false] {
        let mut blank = attrs.clone();
        for output in attrs.outputs.keys() {
            blank.outputs.insert(output.clone(), DerivationOutput::Deferred);
            blank.env.remove(output.as_str().as_bytes());
            if with_env {
                blank.env.insert(output.as_str().into(), "".into());
            }
        }
        modulo::fill_output_paths(&dir, &mut blank).unwrap();
        assert_eq!(blank, attrs);
    }
}

#[test]
fn unknown_paths_defer_what_depends_on_them() {
    let dir = StoreDir::default();
    let mut drvs = parse_all();
    let fetched: StorePath = FILES[0].0.parse().unwrap();
    let floating = DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 };
    drvs.get_mut(&fetched).unwrap().basic.outputs.insert(OutputName::out(), floating);
    let leaf: StorePath = FILES[5].0.parse().unwrap();
    assert_eq!(input_hash_of(&drvs, &leaf).unwrap(), InputHash::Deferred);
    let paths = modulo::output_paths(&dir, &drvs[&leaf], &mut |input| input_hash_of(&drvs, input));
    assert_eq!(paths.unwrap(), None);
    let basic = &drvs[&fetched].basic;
    assert!(modulo::basic_output_paths(&dir, basic).unwrap_err().to_string().contains("content"));
}

#[test]
fn json_of_every_release_says_the_same() {
    let drvs = parse_all();
    for text in [
        &include_bytes!("../../testdata/show-2.8.json")[..],
        include_bytes!("../../testdata/show-2.26.json"),
        include_bytes!("../../testdata/show-2.34.json"),
    ] {
        assert_eq!(json::parse(&StoreDir::default(), text).unwrap(), drvs);
    }
    // Version 3: base names as in 4, the layout of before.
    let mut v4: serde_json::Value =
        serde_json::from_slice(include_bytes!("../../testdata/show-2.34.json")).unwrap();
    let v3 = v4["derivations"].take();
    let mut v3 = serde_json::Value::Object(v3.as_object().unwrap().clone());
    for drv in v3.as_object_mut().unwrap().values_mut() {
        let mut inputs = drv["inputs"].take();
        let drv = drv.as_object_mut().unwrap();
        drv.insert("version".into(), 3.into());
        drv.insert("inputSrcs".into(), inputs["srcs"].take());
        drv.insert("inputDrvs".into(), inputs["drvs"].take());
        drv.remove("inputs");
    }
    assert_eq!(json::parse(&StoreDir::default(), v3.to_string().as_bytes()).unwrap(), drvs);
}

#[test]
fn structured_attributes_have_the_text_that_nix_makes_of_them() {
    let text = r#"{"x.drv": {"name": "x", "outputs": {"out": {"path": "i00sflxqsj37lfmf95m8mn0grv615hpj-x"}},
        "inputSrcs": [], "inputDrvs": {}, "system": "s", "builder": "b", "args": [], "version": 3,
        "env": {}, "structuredAttrs": {"b": {"d": 1e100, "c": [1.0, -0.5, 10]}, "a": 0.00001}}}"#
        .replace("x.drv", "q4mzjdlh5px6977h7v5fdsk1p33yg583-x.drv");
    let drvs = json::parse(&StoreDir::default(), text.as_bytes()).unwrap();
    let (_, drv) = drvs.first_key_value().unwrap();
    let expected = r#"{"a":1e-05,"b":{"c":[1.0,-0.5,10],"d":1e+100}}"#;
    assert_eq!(drv.basic.env["__json".as_bytes()], expected);
}

#[test]
fn json_that_is_wrong_says_where() {
    let text = String::from_utf8(include_bytes!("../../testdata/show-2.34.json").to_vec()).unwrap();
    for (from, to, says) in [
        ("\"version\":4", "\"version\":5", "newer"),
        ("\"system\":\"x86_64-linux\",\"version\"", "\"version\"", "system: it is missing"),
        ("\"name\":\"leaf\",\"outputs\"", "\"name\":\"twig\",\"outputs\"", "name: it is \"twig\""),
        (
            "\"path\":\"gmf5y7038qpdj6ng6ssnsf67gm4dc09z-leaf\"",
            "\"method\":\"nar\"",
            "outputs.out: its fields",
        ),
        ("\"hash\":\"sha256-HDfQ", "\"hash\":\"sha256-HDf", "hash"),
        ("\"dynamicOutputs\":{}", "\"dynamicOutputs\":{\"x\":{}}", "dynamic"),
        ("\"outputs\":[\"dev\"]", "\"outputs\":[]", "no outputs"),
        ("\"args\":[]", "\"args\":[1]", "args: expected a string"),
        ("\"structuredAttrs\":{", "\"structuredAttrs\":1,\"x\":{", "structuredAttrs: expected an object"),
    ] {
        assert!(text.contains(from), "{from}");
        let bad = text.replacen(from, to, 1);
        let error = json::parse(&StoreDir::default(), bad.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    assert!(json::parse(&StoreDir::default(), b"[]").is_err());
}

#[test]
fn text_that_is_no_derivation() {
    let dir = StoreDir::default();
    let parse = |text: &[u8]| aterm::parse(&dir, "leaf", text);
    let text = FILES[5].1;
    for len in 0..text.len() {
        assert!(parse(&text[..len]).is_err(), "{len}");
    }
    let text = std::str::from_utf8(text).unwrap();
    for (from, to) in [
        ("Derive(", "Derive ("),
        ("Derive(", "DrvWithVersion(\"xp-dyn-drv\","),
        ("[\"out\"]", "[]"),
        ("(\"out\",", "(\"o/ut\","),
        ("-mid.drv", "-mid.txt"),
        ("-input.txt\"]", "-input.txt\",]"),
        (",\"\",\"\")]", ",\"\",\"\"),(\"out\",\"\",\"\",\"\")]"),
        (",\"\",\"\")]", ",\"\",\"1c37\")]"),
        (",\"\",\"\")]", ",\"sha256\",\"1c37\")]"),
        (")])", ")]) "),
        (")])", ")])\n"),
    ] {
        assert!(text.contains(from), "{from}");
        assert!(parse(text.replacen(from, to, 1).as_bytes()).is_err(), "{from} to {to}");
    }
    let mut drv = parse(text.as_bytes()).unwrap();
    drv.basic.system = "x\",\"y".into();
    assert!(aterm::print(&dir, &drv).is_err(), "a system that would close its own string");
}

fn store_path(name: &'static str) -> impl Strategy<Value = StorePath> {
    (any::<[u8; 20]>(), "[a-z]{1,9}")
        .prop_map(move |(hash, stem)| StorePath::from_parts(hash, &format!("{stem}{name}")).unwrap())
}

fn bytes() -> impl Strategy<Value = BString> {
    prop::collection::vec(prop_oneof![any::<u8>(), Just(b'"'), Just(b'\\'), Just(b'\n')], 0..20)
        .prop_map(Into::into)
}

fn output() -> impl Strategy<Value = DerivationOutput> {
    let method = prop_oneof![Just(Method::Nar), Just(Method::Flat)];
    prop_oneof![
        store_path("").prop_map(DerivationOutput::InputAddressed),
        Just(DerivationOutput::Deferred),
        (method.clone(), any::<[u8; 32]>()).prop_map(|(method, hash)| {
            DerivationOutput::CaFixed(ContentAddress { method, hash: Sha256(hash).into() })
        }),
        method.clone().prop_map(|method| DerivationOutput::CaFloating { method, algo: HashAlgo::Sha512 }),
        method.prop_map(|method| DerivationOutput::Impure { method, algo: HashAlgo::Sha256 }),
    ]
}

fn output_name() -> impl Strategy<Value = OutputName> {
    "[a-z]{1,3}".prop_map(|name| name.parse().unwrap_or_else(|_| OutputName::out()))
}

prop_compose! {
    fn derivation()(
        outputs in prop::collection::btree_map(output_name(), output(), 0..4),
        input_srcs in prop::collection::btree_set(store_path(""), 0..4),
        input_drvs in prop::collection::btree_map(
            store_path(".drv"), prop::collection::btree_set(output_name(), 1..3), 0..4),
        builder in bytes(),
        args in prop::collection::vec(bytes(), 0..4),
        env in prop::collection::btree_map(bytes(), bytes(), 0..5),
    ) -> Derivation {
        let system = "x86_64-linux".into();
        let basic = BasicDerivation { name: "name".into(), outputs, input_srcs, system, builder, args, env };
        Derivation { basic, input_drvs }
    }
}

proptest! {
    #[test]
    fn text_round_trips(drv in derivation()) {
        let dir = StoreDir::default();
        let text = aterm::print(&dir, &drv).unwrap();
        prop_assert_eq!(aterm::parse(&dir, "name", &text).unwrap(), drv);
    }

    /// Whatever bytes come in, what is accepted is understood: its canonical text means the same.
    #[test]
    fn damaged_text_is_refused_or_understood(
        file in 0..FILES.len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(b'\\'), Just(b'"')]), 1..5),
    ) {
        let dir = StoreDir::default();
        let mut text = FILES[file].1.to_vec();
        for (index, byte) in changes {
            let at = index.index(text.len());
            text[at] = byte;
        }
        if let Ok(drv) = aterm::parse(&dir, "mid", &text)
            && let Ok(text) = aterm::print(&dir, &drv)
        {
            prop_assert_eq!(aterm::parse(&dir, "mid", &text).unwrap(), drv);
        }
    }
}
