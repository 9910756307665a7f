//! `drover build` on the corpus, from the `.drv` files, as a person would call it: what it prints against real Nix.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use drover_serve::BuildStatus;
use drover_tests::corpus::{self, Case};
use drover_tests::program;
use serde_json::Value;

use super::leg::{Leg, User};
use super::outcome::Outcome;
use super::{Corpus, WITHOUT_OFFSETS, report};
use crate::store_parts::{Root, no_leftovers, verify};

#[test]
fn drover_build_gives_what_nix_builds() -> Result<()> {
    let corpus = Corpus::new()?;
    let cases: Vec<&Case> = corpus.cases.iter().filter(|case| case.not_by_drover_build.is_none()).collect();
    let (theirs, ours) = (Root::new()?, Root::new()?);
    let nix = Leg::nix(&corpus.peer, &theirs, &corpus.shell(), User::Root)?;
    let (nix, requests) = std::thread::scope(|scope| {
        let nix = scope.spawn(|| nix.build_all(&corpus.store()?, &cases));
        let requests = drover_build(&corpus, &cases, &ours);
        let nix = nix.join().map_err(|_| anyhow::anyhow!("building with Nix panicked"))?;
        anyhow::Ok((nix?, requests?))
    })?;

    let mut wrong = Vec::new();
    for case in &cases {
        let request = corpus::request_of(&requests, case)?;
        let status = &request["status"];
        let mut trouble = differences(case, &nix[&case.name], status)?;
        if report::is_pending(&case.name) {
            trouble.clear();
        }
        let ended = corpus::reason(status);
        let verdict = if trouble.is_empty() {
            "as expected".to_owned()
        } else {
            format!("DIFFERS: {}", trouble.join("; "))
        };
        let line = format!("{}: {ended}: {verdict}", case.name);
        println!("  {line}");
        if !trouble.is_empty() {
            wrong.push(line);
        }
    }
    ensure!(wrong.is_empty(), "not as Nix:\n{}", wrong.join("\n"));
    verify(&corpus.peer, &ours)?;
    no_leftovers(&ours)
}

/// Everything in one call. The requests with their status, as it prints them.
fn drover_build(corpus: &Corpus, cases: &[&Case], ours: &Root) -> Result<Vec<Value>> {
    let scratch = tempfile::tempdir()?;
    // Nix 2.34's rule for content that refers to itself, so that all paths are Nix's.
    let builder = scratch.path().join("builder");
    let mut script = std::fs::File::create(&builder)?;
    writeln!(
        script,
        "#!/bin/sh\nexec {} \"$@\" {}",
        program("drover-builder")?.display(),
        WITHOUT_OFFSETS.join(" ")
    )?;
    std::fs::set_permissions(&builder, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    drop(script);

    let mut drover = Command::new(program("drover")?);
    drover.args(["build", "--recursive", "--no-progress", "--output", "json", "--store"]).arg(ours.path());
    drover
        .arg("--builder")
        .arg(&builder)
        .arg("--cache")
        .arg(format!("file://{}/cache", scratch.path().display()));
    drover.env("HOME", scratch.path()).env(corpus::VARIABLE.0, corpus::VARIABLE.1);
    for case in cases {
        drover.arg(match corpus::limits(case).is_empty() {
            true => corpus.source.object(&case.drv),
            false => {
                // Limits are no part of a derivation: a request has them.
                let request = corpus::request(case, &corpus.source.text())?;
                let file = scratch.path().join(format!("{}.json", case.name));
                std::fs::write(&file, serde_json::to_vec(&request)?)?;
                file
            }
        });
    }
    let output = drover.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code().is_some_and(|code| code != 0), "some fail: {}: {said}", output.status);
    let list: Value = serde_json::from_slice(&output.stdout).with_context(|| said.into_owned())?;
    Ok(list["items"].as_array().context("a List")?.clone())
}

/// How a request's status is not what Nix's outcome, with what is different by intention, leads to.
fn differences(case: &Case, nix: &Outcome, status: &Value) -> Result<Vec<String>> {
    let mut found = nix.unexpected(case.expect);
    let expected = report::ours(case);
    let reason = corpus::reason(status);
    if !reasons(expected).contains(&reason.as_str()) {
        found.push(format!("{expected:?} is not {reason}: {}", status["failure"]["message"]));
    }
    if expected == nix.status {
        let theirs: BTreeMap<String, Value> = nix
            .outputs
            .iter()
            .map(|(name, output)| {
                let info = &output.info;
                let full = |path| format!("/nix/store/{path}");
                let mut references: Vec<String> = info.references.iter().map(full).collect();
                references.sort();
                let value = serde_json::json!({
                    "path": full(&info.path), "narHash": info.nar_hash.to_string(),
                    "narSize": info.nar_size, "references": references,
                });
                (name.to_string(), value)
            })
            .collect();
        let ours = corpus::outputs(status);
        if theirs != ours {
            found.push(format!("outputs {theirs:?}, ours {ours:?}"));
        }
    }
    Ok(found)
}

/// The words of the API for a status of the protocol.
fn reasons(status: BuildStatus) -> &'static [&'static str] {
    match status {
        BuildStatus::Built => &["Built"],
        BuildStatus::PermanentFailure | BuildStatus::TransientFailure => &["BuildFailed"],
        BuildStatus::InputRejected => &["WrongSystem", "InvalidDerivation"],
        BuildStatus::OutputRejected => &["OutputRejected", "OutputHashMismatch"],
        BuildStatus::TimedOut => &["TimedOut", "MaxSilentExceeded"],
        BuildStatus::LogLimitExceeded => &["LogLimitExceeded"],
        _ => &[],
    }
}
