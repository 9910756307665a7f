//! The corpus in a cluster: every derivation of it as a BuildRequest, in pods of their own on a real node, ends as
//! `drover build` ends it: the same reason, the same outputs. That `drover build` ends it as Nix does is for the peers layer.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use drover_tests::Installation;
use drover_tests::corpus::{self, Case};
use drover_tests::installation::TENANT;
use serde_json::{Value, json};
use xtask::run;

/// Requests that are under way at a time: about as many pods as the node starts without tripping over them.
const UNDER_WAY: usize = 6;
/// For all of them.
const PATIENCE: Duration = Duration::from_secs(1200);
const BETWEEN_LOOKS: Duration = Duration::from_millis(700);

#[test]
fn a_cluster_ends_the_corpus_as_drover_build_does() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("drover-node-").tempdir_in("/tmp")?;
    let drover = Installation::up(scratch.path())?;
    let tools = scratch.path().join("tools");
    corpus::tools(&tools)?;
    let store = drover.store().display().to_string();
    let all = corpus::instantiate(&drover.nix, &tools, &["--store", &store])?;
    let (cases, left_out): (Vec<Case>, Vec<Case>) =
        all.into_iter().partition(|case| case.not_in_cluster.is_none());
    for case in &left_out {
        println!("left out: {}: {}", case.name, case.not_in_cluster.as_deref().unwrap_or_default());
    }
    ensure!(cases.len() >= 60 && left_out.len() < 12, "{} cases, {} left out", cases.len(), left_out.len());

    // What the cases need is built by real Nix and lies in the cache, with the .drv files that prove the paths.
    let inputs = corpus::realise_inputs(&drover.nix, &tools, &drover.store(), &cases)?;
    let drvs = cases.iter().map(|case| format!("/nix/store/{}", case.drv));
    let wanted: Vec<String> = drvs.chain(inputs).collect();
    let mut copy = drover.nix_command("nix")?;
    copy.env("NIX_CONFIG", corpus::nix_config(&tools)).args([
        "copy",
        "--no-check-sigs",
        "--to",
        drover.cache.url(),
        "--store",
        &store,
    ]);
    run::stdout(copy.args(&wanted))?;

    let requests = cases.iter().map(|case| corpus::request(case, &store)).collect::<Result<Vec<Value>>>()?;
    let here = drover_build(scratch.path(), &store, &requests)?;
    let there = in_cluster(&drover, &requests)?;

    let mut wrong = Vec::new();
    for (case, request) in cases.iter().zip(&requests) {
        let name = &request["metadata"]["name"];
        let of = |list: &[Value]| -> Result<Value> {
            let found = list.iter().find(|item| item["metadata"]["name"] == *name);
            Ok(found.with_context(|| format!("{} is not there", case.name))?["status"].clone())
        };
        let (here, there) = (of(&here)?, of(&there)?);
        let mut trouble = Vec::new();
        let reasons = [corpus::reason(&here), corpus::reason(&there)];
        if reasons[0] != reasons[1] {
            let [a, b] = [&here, &there].map(|status| &status["failure"]["message"]);
            trouble.push(format!("{} here ({a}), {} in the cluster ({b})", reasons[0], reasons[1]));
        }
        let outputs = [corpus::outputs(&here), corpus::outputs(&there)];
        if outputs[0] != outputs[1] {
            trouble.push(format!("outputs {:?} here, {:?} in the cluster", outputs[0], outputs[1]));
        }
        let verdict =
            if trouble.is_empty() { "same".to_owned() } else { format!("DIFFERS: {}", trouble.join("; ")) };
        let line = format!("{}: {}: {verdict}", case.name, reasons[1]);
        println!("  {line}");
        if !trouble.is_empty() {
            wrong.push(line);
        }
    }
    ensure!(wrong.is_empty(), "not as drover build:\n{}", wrong.join("\n"));
    Ok(())
}

/// The same requests without a cluster; inputs come from the store in `store`.
fn drover_build(scratch: &std::path::Path, store: &str, requests: &[Value]) -> Result<Vec<Value>> {
    let file = scratch.join("requests.json");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": requests});
    std::fs::write(&file, serde_json::to_vec(&list)?)?;
    let mut drover = std::process::Command::new(drover_tests::program("drover")?);
    drover.args(["build", "--no-progress", "--output", "json", "--cache", store]);
    drover.arg("--cache").arg(format!("file://{}/own", scratch.display())).arg(&file);
    drover.arg("--store").arg(scratch.join("builder")).env("HOME", scratch);
    let output = drover.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let list: Value = serde_json::from_slice(&output.stdout).with_context(|| said.into_owned())?;
    Ok(list["items"].as_array().context("a List")?.clone())
}

/// Creates the requests, some at a time, and returns them when all have ended.
fn in_cluster(drover: &Installation, requests: &[Value]) -> Result<Vec<Value>> {
    let deadline = Instant::now() + PATIENCE;
    let mut waiting: VecDeque<&Value> = requests.iter().collect();
    let mut created = 0;
    loop {
        let text = drover.cluster.kubectl(&["get", "-n", TENANT, "buildrequests", "-o", "json"])?;
        let list: Value = serde_json::from_str(&text)?;
        let items = list["items"].as_array().context("a List")?;
        let ended = items.iter().filter(|item| has_ended(item)).count();
        if ended == requests.len() {
            return Ok(items.clone());
        }
        ensure!(
            Instant::now() < deadline,
            "{ended} of {} have ended within {PATIENCE:?}; {}",
            requests.len(),
            drover.operator_log()
        );
        let next: Vec<&Value> = (created - ended..UNDER_WAY).map_while(|_| waiting.pop_front()).collect();
        if next.is_empty() {
            std::thread::sleep(BETWEEN_LOOKS);
            continue;
        }
        created += next.len();
        // Not `apply`, which keeps a second copy in an annotation: some of these are large.
        let mut kubectl = drover.cluster.kubectl_command()?;
        let list = json!({"apiVersion": "v1", "kind": "List", "items": next});
        run::filter(kubectl.args(["create", "--namespace", TENANT, "-f", "-"]), &serde_json::to_vec(&list)?)?;
    }
}

fn has_ended(request: &Value) -> bool {
    let conditions = request["status"]["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|condition| {
        condition["type"] == "Succeeded" && (condition["status"] == "True" || condition["status"] == "False")
    })
}
