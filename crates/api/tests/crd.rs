//! The definitions, as far as they can be checked without an API server: rules are evaluated, schemas are walked.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use drover_api::{
    BuildRequest, BuildRequestSpec, BuilderClass, BuilderClassSpec, DerivationSpec, OutputSpec, Trust, crds,
};
use kube::core::cel::Validator;
use serde_json::{Value, json};

fn request() -> BuildRequest {
    let spec = BuildRequestSpec {
        derivation: Some(DerivationSpec {
            name: "hello".into(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            outputs: BTreeMap::from([("out".to_owned(), OutputSpec::default())]),
            ..Default::default()
        }),
        timeout_seconds: Some(60),
        ..Default::default()
    };
    BuildRequest::new("hello", spec)
}

/// The schema of the definition whose kind is `kind`, as JSON.
fn schema(kind: &str) -> Value {
    let crd = crds().into_iter().find(|crd| crd.spec.names.kind == kind).unwrap();
    serde_json::to_value(crd.spec.versions[0].schema.as_ref().unwrap().open_api_v3_schema.as_ref().unwrap())
        .unwrap()
}

fn violations<T: serde::Serialize>(kind: &str, new: &T, old: Option<&T>) -> Vec<String> {
    let old = old.map(|old| serde_json::to_value(old).unwrap());
    match Validator::new().validate(&schema(kind), &serde_json::to_value(new).unwrap(), old.as_ref()) {
        Ok(()) => vec![],
        Err(errors) => errors.into_vec().into_iter().map(|error| error.message).collect(),
    }
}

#[test]
fn a_good_request_breaks_no_rule() {
    assert_eq!(violations("BuildRequest", &request(), None), [""; 0]);
    assert_eq!(violations("BuildRequest", &request(), Some(&request())), [""; 0]);
}

#[test]
fn a_derivation_or_a_drv_path_or_both() {
    let mut both = request();
    both.spec.drv_path = Some("/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a.drv".into());
    assert_eq!(violations("BuildRequest", &both, None), [""; 0]);
    let mut neither = request();
    neither.spec.derivation = None;
    let said = violations("BuildRequest", &neither, None);
    assert!(said.iter().any(|text| text.contains("a derivation, a drvPath or both")), "{said:?}");
}

#[test]
fn output_rules() {
    let output = |path: Option<&str>, algo: Option<&str>, hash: Option<&str>, method: Option<&str>| {
        let own = |text: Option<&str>| text.map(str::to_owned);
        OutputSpec { path: own(path), hash_algo: own(algo), hash: own(hash), method: own(method) }
    };
    let path = Some("/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-hello");
    let sha256 = Some("sha256");
    for (name, output, expected) in [
        ("drv", output(None, None, None, None), "output names"),
        ("a/b", output(None, None, None, None), "output names"),
        ("", output(None, None, None, None), "output names"),
        ("out", output(None, None, Some("00"), None), "needs hashAlgo"),
        ("out", output(None, None, None, Some("nar")), "needs hashAlgo"),
        ("out", output(path, sha256, None, None), "needs a hash"),
        ("out", output(path, sha256, Some("impure"), Some("nar")), "an impure output has no path"),
        ("dev", output(None, sha256, Some("00"), Some("nar")), "its name is `out`"),
        ("out", output(None, Some("sha512"), None, Some("text")), "method text takes"),
        ("out", output(None, Some("md5"), None, Some("git")), "method git takes"),
    ] {
        let mut bad = request();
        bad.spec.derivation.as_mut().unwrap().outputs = BTreeMap::from([(name.to_owned(), output)]);
        let said = violations("BuildRequest", &bad, None);
        assert!(said.iter().any(|text| text.contains(expected)), "{name}: {said:?}");
    }
}

#[test]
fn outputs_are_of_one_kind() {
    let output = |algo: Option<&str>, hash: Option<&str>| OutputSpec {
        hash_algo: algo.map(str::to_owned),
        hash: hash.map(str::to_owned),
        ..Default::default()
    };
    let (input, floating) = (output(None, None), output(Some("sha256"), None));
    let (fixed, impure) = (output(Some("sha256"), Some("00")), output(Some("sha256"), Some("impure")));
    for (out, dev, expected) in [
        (&input, &input, None),
        (&floating, &floating, None),
        (&impure, &impure, None),
        (&input, &floating, Some("for all of them or for none")),
        (&floating, &impure, Some("all of them are impure or none is")),
        (&fixed, &fixed, Some("has one output")),
        (&fixed, &floating, Some("has one output")),
    ] {
        let mut request = request();
        request.spec.derivation.as_mut().unwrap().outputs =
            BTreeMap::from([("out".to_owned(), out.clone()), ("dev".to_owned(), dev.clone())]);
        let said = violations("BuildRequest", &request, None);
        match expected {
            None => assert_eq!(said, [""; 0]),
            Some(expected) => {
                assert!(said.iter().any(|text| text.contains(expected)), "{expected}: {said:?}")
            }
        }
    }
}

#[test]
fn what_may_change_and_what_may_not() {
    let old = request();
    let mut new = request();
    new.spec.cancel = Some(true);
    new.spec.suspend = Some(true);
    new.spec.priority = Some(7);
    new.spec.ttl_seconds_after_succeeded = Some(1);
    new.spec.ttl_seconds_after_failed = Some(1);
    assert_eq!(violations("BuildRequest", &new, Some(&old)), [""; 0]);

    type Change = fn(&mut BuildRequestSpec);
    let changes: &[(&str, Change)] = &[
        ("derivation", |spec| spec.derivation.as_mut().unwrap().args.push("x".into())),
        ("class", |spec| spec.class = Some("other".into())),
        ("timeoutSeconds", |spec| spec.timeout_seconds = None),
        ("maxSilentSeconds", |spec| spec.max_silent_seconds = Some(1)),
        ("maxLogBytes", |spec| spec.max_log_bytes = Some(1)),
        ("maxOutputBytes", |spec| spec.max_output_bytes = Some(1)),
        ("retries", |spec| spec.retries.build += 1),
        ("resources", |spec| spec.resources = Some(Default::default())),
        ("verify", |spec| spec.verify = Some(drover_api::Verify { builders: 2 })),
    ];
    for (field, change) in changes {
        let mut new = request();
        change(&mut new.spec);
        let said = violations("BuildRequest", &new, Some(&old));
        assert!(
            said.iter().any(|text| text.contains(&format!("spec.{field} is immutable"))),
            "{field}: {said:?}"
        );
    }
}

#[test]
fn cancel_stays() {
    let mut old = request();
    old.spec.cancel = Some(true);
    let said = violations("BuildRequest", &request(), Some(&old));
    assert!(said.iter().any(|text| text.contains("cannot be taken back")), "{said:?}");
}

#[test]
fn claimed_trust_names_namespaces() {
    let mut class =
        BuilderClass::new("c", BuilderClassSpec { systems: vec!["s".into()], ..Default::default() });
    assert_eq!(violations("BuilderClass", &class, None), [""; 0]);
    class.spec.trust = Trust::Claimed;
    let said = violations("BuilderClass", &class, None);
    assert!(said.iter().any(|text| text.contains("allowedNamespaces")), "{said:?}");
    class.spec.allowed_namespaces = Some(Default::default());
    assert_eq!(violations("BuilderClass", &class, None), [""; 0]);
}

/// An API server that validates strictly refuses unknown fields only where the schema does not keep them.
#[test]
fn schemas_are_closed_and_described() {
    for crd in crds() {
        let text = serde_json::to_string(&crd).unwrap();
        assert!(!text.contains("preserve-unknown"), "{}", crd.spec.names.kind);
        assert!(!text.contains("nullable"), "{}", crd.spec.names.kind);
        assert!(!text.contains("\"uint"), "{}", crd.spec.names.kind);
        assert!(text.len() < 250_000, "{} has {} bytes", crd.spec.names.kind, text.len());
    }
    let request = schema("BuildRequest");
    for part in ["spec", "status"] {
        for (name, field) in request["properties"][part]["properties"].as_object().unwrap() {
            assert!(field["description"].is_string(), "{part}.{name} has no description");
        }
    }
}

#[test]
fn defaults_are_in_the_schema() {
    let spec = &schema("BuildRequest")["properties"]["spec"]["properties"];
    assert_eq!(spec["retries"]["default"], json!({ "infrastructure": 5, "build": 0 }));
    let class = &schema("BuilderClass")["properties"]["spec"]["properties"];
    assert_eq!(class["trust"]["default"], "Verified");
    assert_eq!(class["placement"]["default"], "BuilderNamespace");
    assert_eq!(class["sandbox"]["default"], "Nested");
}

#[test]
fn a_class_template_needs_no_containers() {
    let text = json!({ "systems": ["x"], "template": { "spec": { "nodeSelector": { "a": "b" } } } });
    let spec: BuilderClassSpec = serde_json::from_value(text).unwrap();
    assert!(spec.template.unwrap().spec.unwrap().containers.is_empty());
    let class = schema("BuilderClass");
    let pod = &class["properties"]["spec"]["properties"]["template"]["properties"]["spec"];
    assert!(pod["properties"]["containers"].is_object());
    assert!(pod["required"].is_null());
}
