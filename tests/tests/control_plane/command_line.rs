//! `drover` against a real API server. Nobody builds here: the test plays the operator.

use std::process::{Command, Output};

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
        .stdout(std::process::Stdio::piped())
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

    failures(&plane)?;
    plugin(&plane)
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
