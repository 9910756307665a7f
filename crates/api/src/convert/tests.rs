use std::collections::BTreeMap;

use drover_nix::Sha256;

use super::*;

const SOURCE: &str = "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-source";

fn dir() -> StoreDir {
    StoreDir::default()
}

fn spec(outputs: &[(&str, OutputSpec)]) -> DerivationSpec {
    DerivationSpec {
        name: "hello".into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-c".into(), "echo \"a\n\tb\" > $out".into()],
        env: BTreeMap::from([("__json".to_owned(), "{\"a\": 1}".to_owned())]),
        input_srcs: vec![SOURCE.into()],
        outputs: outputs.iter().map(|(name, output)| ((*name).to_owned(), output.clone())).collect(),
    }
}

fn fixed(method: &str) -> OutputSpec {
    OutputSpec {
        path: None,
        hash_algo: Some("sha256".into()),
        hash: Some(Sha256::of(b"hello\n").to_sri()),
        method: Some(method.into()),
    }
}

#[test]
fn every_kind_of_output_round_trips() {
    let floating =
        OutputSpec { hash_algo: Some("sha256".into()), method: Some("nar".into()), ..Default::default() };
    let path =
        |name: &str| OutputSpec { path: Some(format!("{}-{name}", &SOURCE[..43])), ..Default::default() };
    for outputs in [
        vec![("out", path("hello")), ("dev", path("hello-dev"))],
        vec![("out", OutputSpec::default())],
        vec![("out", fixed("flat"))],
        vec![("out", fixed("nar"))],
        vec![("out", floating.clone()), ("lib", floating.clone())],
        vec![("out", OutputSpec { method: Some("text".into()), ..floating.clone() })],
        vec![(
            "out",
            OutputSpec { method: Some("git".into()), hash_algo: Some("sha1".into()), ..floating.clone() },
        )],
        vec![("out", OutputSpec { hash: Some("impure".into()), ..floating.clone() })],
        vec![("out", OutputSpec { hash: Some("impure".into()), method: None, ..floating })],
    ] {
        let basic = to_basic(&spec(&outputs), &dir()).unwrap();
        let again = to_basic(&from_basic(&basic, &dir()).unwrap(), &dir()).unwrap();
        assert_eq!(again, basic);
    }
}

#[test]
fn a_derivation_may_make_a_derivation() {
    let mut spec = spec(&[("out", algo("text", "sha256"))]);
    spec.name = "made.drv".into();
    assert_eq!(to_basic(&spec, &dir()).unwrap().name, "made.drv");
    spec.outputs = [("out".to_owned(), algo("nar", "sha256"))].into();
    assert_eq!(to_basic(&spec, &dir()).unwrap_err().field, "spec.derivation.name");
}

#[test]
fn text_stays_as_it_is() {
    let given = spec(&[("out", OutputSpec::default())]);
    let back = from_basic(&to_basic(&given, &dir()).unwrap(), &dir()).unwrap();
    assert_eq!(back, given);
}

#[test]
fn every_spelling_of_a_fixed_hash_is_taken() {
    let hash = Sha256::of(b"hello\n");
    let known = to_basic(&spec(&[("out", fixed("nar"))]), &dir()).unwrap();
    for spelling in [hash.to_hex(), hash.to_nix32(), hash.to_sri(), hash.to_string()] {
        let output = OutputSpec { hash: Some(spelling), ..fixed("nar") };
        assert_eq!(to_basic(&spec(&[("out", output)]), &dir()).unwrap(), known);
    }
}

/// A change to a good spec, the field that is then at fault, and a part of what is said about it.
type Mistake = (fn(&mut DerivationSpec), &'static str, &'static str);

#[test]
fn errors_name_the_field() {
    let mistakes: &[Mistake] = &[
        (|s| s.name = "a b".into(), "name", "character"),
        (|s| s.name = "hello.drv".into(), "name", ".drv"),
        (|s| s.name = "a".repeat(208), "name", "207"),
        (|s| s.system.clear(), "system", "empty"),
        (|s| s.builder.clear(), "builder", "empty"),
        (|s| s.input_srcs.push("/nix/store/short".into()), "inputSrcs[1]", "/nix/store/short"),
        (|s| s.input_srcs.push("/tmp/x".into()), "inputSrcs[1]", "/nix/store"),
        (|s| s.input_srcs.push(SOURCE.into()), "inputSrcs[1]", "twice"),
        (|s| s.outputs.clear(), "outputs", "no outputs"),
        (|s| drop(s.outputs.insert("a/b".into(), OutputSpec::default())), "outputs.a/b", "output name"),
        (|s| drop(s.outputs.insert("out".into(), bad_path())), "outputs.out.path", "has to be called hello"),
        (|s| drop(s.outputs.insert("dev".into(), fixed("flat"))), "outputs", "different kinds"),
        (|s| s.outputs = [("x".into(), fixed("flat"))].into(), "outputs", "its name is `out`"),
        (|s| s.outputs = [("out".into(), fixed("zip"))].into(), "outputs.out.method", "zip"),
        (
            |s| s.outputs = [("out".into(), OutputSpec { hash_algo: None, ..fixed("flat") })].into(),
            "outputs.out",
            "hashAlgo",
        ),
        (
            |s| {
                s.outputs =
                    [("out".into(), OutputSpec { hash_algo: Some("crc".into()), ..fixed("flat") })].into();
            },
            "outputs.out.hashAlgo",
            "crc",
        ),
        (|s| drop(s.env.insert(String::new(), String::new())), "env", "empty"),
        (
            |s| {
                let impure =
                    OutputSpec { hash: Some("impure".into()), path: path_of("hello"), ..fixed("nar") };
                s.outputs = [("out".into(), impure)].into();
            },
            "outputs.out",
            "no path before it is built",
        ),
        (
            |s| {
                let floating = OutputSpec { hash: None, path: path_of("hello"), ..fixed("nar") };
                s.outputs = [("out".into(), floating)].into();
            },
            "outputs.out",
            "no hash",
        ),
        (
            |s| {
                let floating = OutputSpec { hash: None, ..fixed("nar") };
                let impure = OutputSpec { hash: Some("impure".into()), ..fixed("nar") };
                s.outputs = [("out".into(), floating), ("dev".into(), impure)].into();
            },
            "outputs",
            "different kinds",
        ),
        (|s| s.outputs = [("out".into(), algo("text", "sha512"))].into(), "outputs.out.hashAlgo", "sha256"),
        (
            |s| s.outputs = [("out".into(), algo("git", "md5"))].into(),
            "outputs.out.hashAlgo",
            "sha1 or sha256",
        ),
    ];
    for (i, (change, field, why)) in mistakes.iter().enumerate() {
        let mut spec = spec(&[("out", OutputSpec::default())]);
        change(&mut spec);
        let error = to_basic(&spec, &dir()).expect_err(&format!("mistake {i} was taken"));
        assert_eq!(error.field, format!("spec.derivation.{field}"), "mistake {i}: {error}");
        assert!(error.why.contains(why), "mistake {i}: {error}");
    }
}

fn algo(method: &str, algo: &str) -> OutputSpec {
    OutputSpec { hash_algo: Some(algo.into()), method: Some(method.into()), ..Default::default() }
}

fn path_of(name: &str) -> Option<String> {
    Some(format!("{}-{name}", &SOURCE[..43]))
}

fn bad_path() -> OutputSpec {
    OutputSpec { path: Some(SOURCE.into()), ..Default::default() }
}

#[test]
fn bytes_that_json_cannot_carry_are_refused() {
    let mut basic = to_basic(&spec(&[("out", OutputSpec::default())]), &dir()).unwrap();
    basic.env.insert("key".into(), b"\xff".as_slice().into());
    let error = from_basic(&basic, &dir()).unwrap_err();
    assert_eq!(error.field, "spec.derivation.env.key");
    assert!(error.why.contains("spec.drvPath"), "{error}");
}

#[test]
fn what_a_request_may_name() {
    let derivation = Some(spec(&[("out", fixed("flat"))]));
    let drv_path = Some(format!("{SOURCE}.drv"));
    let of = |derivation: &Option<DerivationSpec>, drv_path: &Option<String>| {
        let spec = BuildRequestSpec {
            derivation: derivation.clone(),
            drv_path: drv_path.clone(),
            ..Default::default()
        };
        target(&spec, &dir())
    };
    assert!(matches!(of(&derivation, &None), Ok(Target::Derivation(_))));
    assert!(matches!(of(&None, &drv_path), Ok(Target::DrvPath(_))));
    let named = Some(format!("{}-{}.drv", &SOURCE[..43], derivation.as_ref().unwrap().name));
    assert!(matches!(of(&derivation, &named), Ok(Target::Derivation(_))));
    assert_eq!(of(&derivation, &drv_path).unwrap_err().field, "spec.drvPath");
    assert_eq!(of(&None, &None).unwrap_err().field, "spec");
    assert_eq!(of(&None, &Some(SOURCE.into())).unwrap_err().field, "spec.drvPath");
}

#[test]
fn completing_sets_paths_and_variables() {
    let basic = to_basic(&spec(&[("out", OutputSpec::default()), ("dev", OutputSpec::default())]), &dir());
    let whole = complete(basic.unwrap(), &dir()).unwrap();
    for (name, output) in &whole.outputs {
        let DerivationOutput::InputAddressed(path) = output else { panic!("{name} has no path") };
        assert_eq!(path.name(), name.path_name("hello"));
        assert_eq!(whole.env(name.as_str()).unwrap().to_string(), dir().full(path));
    }
    assert_eq!(complete(whole.clone(), &dir()).unwrap(), whole);
}

#[test]
fn what_is_given_is_left_alone() {
    let given = OutputSpec { path: Some(format!("{}-hello", &SOURCE[..43])), ..Default::default() };
    let basic = to_basic(&spec(&[("out", given)]), &dir()).unwrap();
    assert_eq!(complete(basic.clone(), &dir()).unwrap(), basic);
}
