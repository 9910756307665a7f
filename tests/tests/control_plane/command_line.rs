//! `drover` against a real API server. Nobody builds here: the test plays the operator.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use drover_tests::{ControlPlane, program};
use xtask::{checkout, run};

/// As the administrator, in the checkout.
fn drover(plane: &ControlPlane, args: &[&str]) -> Result<Output> {
    let mut drover = Command::new(program("drover")?);
    drover.env("KUBECONFIG", plane.kubeconfig()).current_dir(checkout()).args(args);
    Ok(drover.output()?)
}

/// Standard output of what must go well.
fn good(plane: &ControlPlane, args: &[&str]) -> Result<String> {
    let output = drover(plane, args)?;
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Exit code and standard error of what must not.
fn bad(plane: &ControlPlane, args: &[&str]) -> Result<(Option<i32>, String)> {
    let output = drover(plane, args)?;
    Ok((output.status.code(), String::from_utf8(output.stderr)?))
}

#[test]
fn a_request_from_submit_to_output() -> Result<()> {
    let plane = ControlPlane::start()?;
    let crds = good(&plane, &["crds"])?;
    plane.apply(&crds)?;
    plane.wait_established()?;

    assert_eq!(good(&plane, &["submit", "examples/hello.yaml"])?, "buildrequest.drover.build/hello\n");
    // What is submitted twice is there once.
    good(&plane, &["submit", "examples/hello.yaml"])?;
    assert!(good(&plane, &["describe", "hello"])?.contains("has not looked at it yet"));
    let (code, said) = bad(&plane, &["get-output", "hello"])?;
    assert!(code == Some(2) && said.contains("has not ended"), "{code:?} {said}");
    let (code, said) = bad(&plane, &["logs", "hello"])?;
    assert!(code == Some(2) && said.contains("no log yet"), "{code:?} {said}");
    let (code, said) = bad(&plane, &["wait", "hello", "--timeout", "1"])?;
    assert!(code == Some(3) && said.contains("not all have ended"), "{code:?} {said}");
    let (code, said) = bad(&plane, &["wait", "nobody"])?;
    assert!(code == Some(2) && said.contains("nobody"), "{code:?} {said}");

    // A watch sees the end, whenever it comes.
    let waiting = Command::new(program("drover")?)
        .env("KUBECONFIG", plane.kubeconfig())
        .args(["wait", "hello", "--timeout", "60"])
        .stdout(Stdio::piped())
        .spawn()?;
    let path = "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-hello";
    end(
        &plane,
        "hello",
        "True",
        "Built",
        &format!(r#""outputs": {{"out": {{"path": "{path}", "narHash": "sha256:x", "narSize": 8}}}}"#),
    )?;
    let waited = waiting.wait_with_output()?;
    assert!(waited.status.success());
    assert_eq!(String::from_utf8_lossy(&waited.stdout), "hello Built\n");
    assert_eq!(good(&plane, &["get-output", "hello"])?.trim(), path);
    assert_eq!(good(&plane, &["get-output", "hello", "out"])?.trim(), path);
    let (code, said) = bad(&plane, &["get-output", "hello", "dev"])?;
    assert!(code == Some(2) && said.contains("it has out"), "{code:?} {said}");
    assert!(good(&plane, &["describe", "hello"])?.contains(path));

    chains(&plane)?;
    failures(&plane)?;
    plugin(&plane)
}

/// Derivations whose inputs' paths are known only when these are built: sent with these paths in them, one after the other.
fn chains(plane: &ControlPlane) -> Result<()> {
    let drv = "crates/nix/testdata/content-addressed/gm4wzcsawaihldpc37262n1n3ism6xgj-deferred.drv";
    let (code, said) = bad(plane, &["submit", "--recursive", drv])?;
    assert!(code == Some(2) && said.contains("--wait"), "{code:?} {said}");

    let submitting = Command::new(program("drover")?)
        .env("KUBECONFIG", plane.kubeconfig())
        .current_dir(checkout())
        .args(["submit", "--recursive", "--wait", drv])
        .stdout(Stdio::piped())
        .spawn()?;
    // What Nix 2.34 built of them. The names are the resolved derivations'.
    for (name, outputs) in [
        (
            "base-7papim1j",
            &[
                ("out", "rphn4lwi1ilhyw9nrc0j9jb1rabzwq5w-base"),
                ("dev", "5qd6cp1z5976fljxy94a8zvijghj65v2-base-dev"),
            ][..],
        ),
        ("plain-txt-pasxmlj2", &[("out", "axwixvp9c4mz2mv1g4cixzi2356hq387-plain.txt")]),
        ("fixed-ssqnvrc6", &[("out", "w0fkqvh6w58g3lwp5v8mwyhh92vf18j5-fixed")]),
        ("above-s1q3bbn1", &[("out", "d6h2xy1112cmkmvvs0kbbb6vyvdh9lag-above")]),
        ("deferred-pcqf7d5g", &[("out", "5pgb55my4f0k5759ajhrnm0rgcngkp1a-deferred")]),
    ] {
        run::wait_for(name, Duration::from_secs(60), || Ok(plane.kubectl(&["get", "breq", name]).is_ok()))?;
        let output = |(output, path): &(&str, &str)| {
            format!(r#""{output}": {{"path": "/nix/store/{path}", "narHash": "sha256:x", "narSize": 8}}"#)
        };
        let outputs = outputs.iter().map(output).collect::<Vec<_>>().join(", ");
        end(plane, name, "True", "Built", &format!(r#""outputs": {{{outputs}}}"#))?;
    }
    let submitted = submitting.wait_with_output()?;
    let said = String::from_utf8_lossy(&submitted.stdout);
    assert!(submitted.status.success() && said.ends_with("deferred-pcqf7d5g Built\n"), "{said}");
    let path = ["get", "breq", "deferred-pcqf7d5g", "-o", "jsonpath={.spec.derivation.outputs.out.path}"];
    assert_eq!(plane.kubectl(&path)?, "/nix/store/5pgb55my4f0k5759ajhrnm0rgcngkp1a-deferred");
    Ok(())
}

/// Several at once: each way to end has its exit code, and the worst one counts.
fn failures(plane: &ControlPlane) -> Result<()> {
    good(plane, &["submit", "examples/failing.yaml"])?;
    let failure = r#""failure": {"reason": "BuildFailed", "message": "exit code 7", "logTail": ["no rule"]}"#;
    end(plane, "exit-code", "False", "BuildFailed", failure)?;
    // Too little memory is not the build's verdict.
    end(plane, "too-slow", "False", "OutOfMemory", r#""phase": "Failed""#)?;
    assert_eq!(drover(plane, &["wait", "hello", "exit-code"])?.status.code(), Some(1));
    assert_eq!(drover(plane, &["wait", "exit-code", "too-slow"])?.status.code(), Some(3));
    assert_eq!(drover(plane, &["wait", "too-slow", "exit-code"])?.status.code(), Some(3));
    assert_eq!(good(plane, &["logs", "exit-code"])?, "no rule\n");
    assert!(good(plane, &["describe", "exit-code"])?.contains("> no rule"));

    // What only names its derivation is the cluster's to read.
    let named = tempfile::NamedTempFile::new()?;
    let drv = "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-nowhere.drv";
    let text = "apiVersion: drover.build/v1alpha1\nkind: BuildRequest\nmetadata: {name: named}\nspec: {drvPath: DRV}\n";
    std::fs::write(named.path(), text.replace("DRV", drv))?;
    good(plane, &["submit", &named.path().to_string_lossy()])?;
    let spec: serde_json::Value =
        serde_json::from_str(&plane.kubectl(&["get", "breq", "named", "-o", "jsonpath={.spec}"])?)?;
    assert!(spec["drvPath"] == drv && spec["derivation"].is_null(), "{spec}");

    assert!(good(plane, &["cancel", "missing-input"])?.contains("missing-input cancelled"));
    assert_eq!(plane.kubectl(&["get", "breq", "missing-input", "-o", "jsonpath={.spec.cancel}"])?, "true");
    let (code, said) = bad(plane, &["cancel", "nobody"])?;
    assert!(code == Some(2) && said.contains("nobody"), "{code:?} {said}");
    let (code, said) = bad(plane, &["submit", "examples/hello.yaml", "--namespace", "nowhere"])?;
    assert!(code == Some(2) && said.contains("nowhere"), "{code:?} {said}");
    Ok(())
}

/// kubectl finds it by its name and passes on what was typed.
fn plugin(plane: &ControlPlane) -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::os::unix::fs::symlink(program("drover")?, dir.path().join("kubectl-drover"))?;
    let mut kubectl = plane.kubectl_command();
    let path = std::env::var("PATH").context("PATH")?;
    kubectl.env("PATH", format!("{}:{path}", dir.path().display()));
    assert!(run::stdout(kubectl.args(["drover", "describe", "hello"]))?.contains("Name:       hello"));
    let help = run::stdout(Command::new(dir.path().join("kubectl-drover")).args(["wait", "--help"]))?;
    assert!(help.contains("Usage: kubectl drover wait"), "{help}");
    Ok(())
}

/// What the operator would write at the end.
fn end(plane: &ControlPlane, name: &str, succeeded: &str, reason: &str, more: &str) -> Result<()> {
    let status = format!(
        r#"{{"status": {{{more}, "conditions": [{{"type": "Succeeded", "status": "{succeeded}", "reason": "{reason}",
            "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}}]}}}}"#
    );
    let args = ["patch", "breq", name, "--subresource=status", "--type=merge", "--patch", &status];
    plane.kubectl(&args).map(drop)
}
