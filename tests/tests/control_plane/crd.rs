//! The definitions on a real API server: it takes them, and what it says to users.

use anyhow::{Context as _, Result};
use drover_tests::ControlPlane;
use xtask::run;

const REQUEST: &str = "\
apiVersion: drover.build/v1alpha1
kind: BuildRequest
metadata:
  name: hello
  namespace: default
spec:
  class: fast
  derivation:
    name: hello
    system: x86_64-linux
    builder: /bin/sh
    args: [-c, \"echo hello > $out\"]
    inputSrcs:
    - /nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-source
    outputs:
      out: {}
";

#[test]
fn definitions_rules_and_columns() -> Result<()> {
    let plane = ControlPlane::start()?;
    install(&plane)?;
    a_good_request_is_taken_with_defaults(&plane)?;
    every_kind_of_output_is_taken(&plane)?;
    mistakes_are_answered_with_the_field(&plane)?;
    the_spec_is_immutable(&plane)?;
    nobody_has_looked_at_a_new_request(&plane)?;
    columns_and_selectors(&plane)?;
    waiting_works(&plane)?;
    the_end_is_final(&plane)?;
    classes_are_checked(&plane)
}

/// Without a warning, and until the server serves both.
fn install(plane: &ControlPlane) -> Result<()> {
    let dir = xtask::checkout().join("crds");
    let applied = run::output(plane.kubectl_command().args(["apply", "--filename"]).arg(&dir))?;
    let said = String::from_utf8_lossy(&applied.stderr);
    assert!(applied.status.success() && said.is_empty(), "{said}");
    plane.wait_established()?;
    for crd in ["buildrequests.drover.build", "builderclasses.drover.build"] {
        let bad = plane.kubectl(&[
            "get",
            "crd",
            crd,
            "-o",
            "jsonpath={.status.conditions[?(@.type==\"NonStructuralSchema\")].message}",
        ])?;
        assert_eq!(bad, "", "{crd}");
    }
    Ok(())
}

fn a_good_request_is_taken_with_defaults(plane: &ControlPlane) -> Result<()> {
    plane.apply(REQUEST)?;
    let retries = plane.kubectl(&["get", "breq", "hello", "-o", "jsonpath={.spec.retries}"])?;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&retries)?["infrastructure"], 5);
    // Nothing that kubectl does by itself breaks a rule.
    plane.apply(REQUEST)?;
    plane.kubectl(&["annotate", "breq", "hello", "note=x"])?;
    plane.kubectl(&["get", "nix"])?;
    Ok(())
}

fn every_kind_of_output_is_taken(plane: &ControlPlane) -> Result<()> {
    let fixed = "{hashAlgo: sha256, method: nar, hash: sha256-LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=}";
    for (number, outputs) in [
        "{out: {hashAlgo: sha256, method: nar}, dev: {hashAlgo: sha256, method: nar}}",
        "{out: {hashAlgo: sha256, method: text}}",
        "{out: {hashAlgo: sha1, method: git}}",
        "{out: {hashAlgo: sha512, method: nar, hash: impure}, dev: {hashAlgo: sha512, method: nar, hash: impure}}",
        &format!("{{out: {fixed}}}"),
        "{out: {path: /nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-hello}}",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("kind-{number}");
        let request = REQUEST.replacen("name: hello", &format!("name: {name}"), 1);
        let request = request.replacen("outputs:\n      out: {}\n", &format!("outputs: {outputs}\n"), 1);
        plane.apply(&request.replacen("x86_64-linux", "builtin", 1))?;
        plane.kubectl(&["delete", "breq", &name])?;
    }
    Ok(())
}

/// What is wrong, a change that makes it so, and what the server must say.
const MISTAKES: &[(&str, &str, &[&str])] = &[
    ("class: fast", "class: fast\n  colour: red", &["unknown field \"spec.colour\""]),
    ("    builder: /bin/sh\n", "", &["spec.derivation.builder: Required value"]),
    (
        "i00sflxqsj37lfmf95m8mn0grv615hpj-source",
        "i00sflxqsj37lfmf95m8mn0grv615hpe-source",
        &["spec.derivation.inputSrcs[0]", "should match"],
    ),
    ("/nix/store/i00", "i00", &["spec.derivation.inputSrcs[0]", "should match"]),
    ("out: {}", "drv: {}", &["spec.derivation.outputs", "output names"]),
    ("out: {}", "a/b: {}", &["spec.derivation.outputs", "output names"]),
    ("      out: {}\n", "      {}\n", &["spec.derivation.outputs", "at least 1 propert"]),
    ("out: {}", "out: {hash: abc}", &["spec.derivation.outputs[out]", "needs hashAlgo"]),
    ("out: {}", "out: {path: /nix/store/x}", &["spec.derivation.outputs.out.path", "should match"]),
    ("out: {}", "out: {hashAlgo: crc32, hash: x}", &["spec.derivation.outputs.out.hashAlgo"]),
    (
        "out: {}",
        "out: {hashAlgo: sha256, hash: impure, path: /nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-hello}",
        &["spec.derivation.outputs[out]", "an impure output has no path"],
    ),
    (
        "      out: {}",
        "      {out: {}, dev: {hashAlgo: sha256}}",
        &["spec.derivation.outputs", "for all of them or for none"],
    ),
    (
        "out: {}",
        "{out: {hashAlgo: sha256}, dev: {hashAlgo: sha256, hash: impure}}",
        &["spec.derivation.outputs", "all of them are impure or none is"],
    ),
    ("out: {}", "bin: {hashAlgo: sha256, hash: \"00\"}", &["spec.derivation.outputs", "its name is `out`"]),
    ("out: {}", "out: {hashAlgo: md5, method: git}", &["spec.derivation.outputs[out]", "sha1 or sha256"]),
    ("out: {}", "out: {hashAlgo: md5, method: text}", &["spec.derivation.outputs[out]", "sha256"]),
    ("name: hello\n    system", "name: a b\n    system", &["spec.derivation.name", "should match"]),
    ("class: fast", "class: Fast Lane", &["spec.class", "should match"]),
    ("class: fast", "class: ../fast", &["spec.class", "should match"]),
    ("class: fast", "timeoutSeconds: 0", &["spec.timeoutSeconds", "greater than or equal to 1"]),
    ("class: fast", "timeoutSeconds: long", &["spec.timeoutSeconds", "integer"]),
    ("class: fast", "retries: {build: -1}", &["spec.retries.build", "greater than or equal to 0"]),
    (
        "class: fast",
        "drvPath: /nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a",
        &["spec.drvPath", "should match"],
    ),
];

fn mistakes_are_answered_with_the_field(plane: &ControlPlane) -> Result<()> {
    for (from, to, expected) in MISTAKES {
        assert!(REQUEST.contains(from), "{from} is not in the request");
        let said =
            refused(plane, &REQUEST.replacen(from, to, 1).replacen("name: hello", "name: mistake", 1))?;
        for part in *expected {
            assert!(said.contains(part), "{to:?}: expected {part:?} in: {said}");
        }
    }
    let start = REQUEST.find("  derivation:").context("the request has a derivation")?;
    let said = refused(plane, &REQUEST[..start])?;
    assert!(said.contains("derivation") && said.contains("drvPath"), "{said}");
    Ok(())
}

fn the_spec_is_immutable(plane: &ControlPlane) -> Result<()> {
    for (from, to, field) in [
        ("echo hello", "echo bye", "spec.derivation"),
        ("class: fast", "class: slow", "spec.class"),
        ("  class: fast\n", "", "spec.class"),
        ("class: fast", "class: fast\n  timeoutSeconds: 5", "spec.timeoutSeconds"),
        ("class: fast", "class: fast\n  retries: {build: 3}", "spec.retries"),
        ("class: fast", "class: fast\n  maxSilentSeconds: 5", "spec.maxSilentSeconds"),
        ("class: fast", "class: fast\n  maxLogBytes: 5", "spec.maxLogBytes"),
        ("class: fast", "class: fast\n  maxOutputBytes: 5", "spec.maxOutputBytes"),
        ("class: fast", "class: fast\n  resources: {limits: {cpu: 1}}", "spec.resources"),
        ("class: fast", "class: fast\n  verify: {builders: 2}", "spec.verify"),
        (
            "class: fast",
            "class: fast\n  drvPath: /nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a.drv",
            "spec.drvPath",
        ),
    ] {
        let said = refused(plane, &REQUEST.replacen(from, to, 1))?;
        assert!(said.contains(&format!("{field} is immutable")), "{to:?}: {said}");
    }
    let patch = |text: &str| plane.kubectl(&["patch", "breq", "hello", "--type=merge", "--patch", text]);
    patch(
        r#"{"spec": {"suspend": true, "priority": 7, "ttlSecondsAfterSucceeded": 9, "ttlSecondsAfterFailed": 9}}"#,
    )?;
    patch(
        r#"{"spec": {"suspend": null, "priority": null, "ttlSecondsAfterSucceeded": null, "ttlSecondsAfterFailed": null}}"#,
    )?;
    patch(r#"{"spec": {"cancel": true}}"#)?;
    let back = patch(r#"{"spec": {"cancel": false}}"#);
    let back = back.err().context("the server took the cancellation back")?.to_string();
    assert!(back.contains("cannot be taken back"), "{back}");
    Ok(())
}

/// The API server itself says so: kstatus takes an object without a status for one that is done.
fn nobody_has_looked_at_a_new_request(plane: &ControlPlane) -> Result<()> {
    let seen = plane.kubectl(&["get", "breq", "hello", "-o", "jsonpath={.status}"])?;
    assert_eq!(seen, r#"{"observedGeneration":-1}"#);
    Ok(())
}

fn columns_and_selectors(plane: &ControlPlane) -> Result<()> {
    let status = r#"{"status": {
        "attempt": 2, "duration": "1m32s", "phase": "Failed", "observedGeneration": 100,
        "builder": {"pod": "hello-1", "node": "n1"},
        "conditions": [{"type": "Succeeded", "status": "False", "reason": "BuildFailed", "message": "exit code 7",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}]
    }}"#;
    plane.kubectl(&["patch", "breq", "hello", "--subresource=status", "--type=merge", "--patch", status])?;
    // The age is the only column that is not the same each time.
    let text = plane.kubectl(&["get", "breq", "-o", "wide"])?;
    let cells = |line: &str| -> Vec<String> {
        line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect()
    };
    let wide: Vec<_> = text.lines().map(cells).collect();
    assert_eq!(wide[0], ["NAME", "SYSTEM", "STATUS", "ATTEMPT", "DURATION", "AGE", "POD", "NODE", "MESSAGE"]);
    assert_eq!(wide[1][..5], ["hello", "x86_64-linux", "BuildFailed", "2", "1m32s"]);
    assert_eq!(wide[1][6..], ["hello-1", "n1", "exit code 7"]);
    // One that only names its derivation: what was found of it.
    plane.apply(
        "{apiVersion: drover.build/v1alpha1, kind: BuildRequest, metadata: {name: named}, spec: {drvPath: \
         /nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a.drv}}",
    )?;
    let status =
        r#"{"status": {"derivation": {"system": "riscv64-linux", "outputs": {"out": "/nix/store/x"}}}}"#;
    plane.kubectl(&["patch", "breq", "named", "--subresource=status", "--type=merge", "--patch", status])?;
    let named = plane.kubectl(&["get", "breq", "named", "--no-headers"])?;
    assert_eq!(cells(&named)[..2], ["named", "riscv64-linux"], "{named}");
    plane.kubectl(&["delete", "breq", "named"])?;
    let plain = plane.kubectl(&["get", "breq"])?;
    assert!(!plain.contains("POD") && plain.lines().all(|line| line.len() <= 80), "{plain}");

    let select = |selector: &str| plane.kubectl(&["get", "breq", "-o", "name", "--field-selector", selector]);
    assert_eq!(
        select("spec.derivation.system=x86_64-linux,spec.class=fast")?.trim(),
        "buildrequest.drover.build/hello"
    );
    assert_eq!(select("spec.class=slow")?.trim(), "");
    Ok(())
}

fn waiting_works(plane: &ControlPlane) -> Result<()> {
    plane.kubectl(&["wait", "breq/hello", "--for=condition=Succeeded=False", "--timeout=5s"])?;
    plane.kubectl(&["wait", "breq/hello", "--for=jsonpath={.status.phase}=Failed", "--timeout=5s"])?;
    Ok(())
}

/// Whoever writes it: an end does not become another one, and outputs stay what they are.
fn the_end_is_final(plane: &ControlPlane) -> Result<()> {
    let patch = |status: &str| {
        let status = format!("{{\"status\": {status}}}");
        let args = ["patch", "breq", "hello", "--subresource=status", "--type=merge", "--patch", &status];
        plane.kubectl(&args)
    };
    let refused =
        |status: &str| Ok::<_, anyhow::Error>(patch(status).err().context("the server took it")?.to_string());
    for phase in [r#""Succeeded""#, r#""Running""#, "null"] {
        let said = refused(&format!("{{\"phase\": {phase}}}"))?;
        assert!(said.contains("the end of a request is final"), "{said}");
    }
    patch(r#"{"outputs": {"out": {"path": "/nix/store/x", "narHash": "sha256:x", "narSize": 1}}}"#)?;
    assert!(refused(r#"{"outputs": null}"#)?.contains("never go away"));
    assert!(refused(r#"{"outputs": {"out": {"narSize": 2}}}"#)?.contains("never change"));
    // What is said of a newer spec, or what a person adds, is no change of it.
    patch(r#"{"observedGeneration": 101}"#).map(drop)
}

fn classes_are_checked(plane: &ControlPlane) -> Result<()> {
    let class = "\
apiVersion: drover.build/v1alpha1
kind: BuilderClass
metadata:
  name: fast
spec:
  default: true
  systems: [x86_64-linux]
  template:
    spec:
      nodeSelector: {disk: ssd}
      tolerations: [{key: builders, operator: Exists}]
  caches:
  - url: http://cache.example
    push: true
  - url: https://other.example
    publicKeys: [\"other:AAAA\"]
";
    plane.apply(&std::fs::read_to_string(xtask::checkout().join("examples/class.yaml"))?)?;
    plane.apply(class)?;
    plane.kubectl(&["get", "bclass", "fast"])?;
    for (from, to, expected) in [
        ("nodeSelector", "nodeSelektor", "unknown field \"spec.template.spec.nodeSelektor\""),
        ("systems: [x86_64-linux]", "systems: []", "spec.systems"),
        ("default: true", "trust: Claimed", "name them in spec.allowedNamespaces"),
        ("default: true", "trust: Blind", "spec.trust"),
        ("https://other.example", "ftp://other.example", "spec.caches[1].url"),
        ("publicKeys: [\"other:AAAA\"]", "push: true", "at most one cache"),
    ] {
        let said = refused(plane, &class.replacen(from, to, 1))?;
        assert!(said.contains(expected), "{to:?}: {said}");
    }
    Ok(())
}

/// What the server says to this, which it must not take.
fn refused(plane: &ControlPlane, yaml: &str) -> Result<String> {
    match plane.apply(yaml) {
        Ok(_) => anyhow::bail!("the server took:\n{yaml}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}
