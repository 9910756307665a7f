//! The corpus as requests on a real API server: it takes every one that a request can express, and changes nothing of it.

use anyhow::{Context as _, Result, ensure};
use drover_tests::corpus::{self, Case};
use drover_tests::{ControlPlane, Nix, Peer};
use serde_json::{Value, json};
use xtask::run;

#[test]
fn every_kind_of_derivation_is_taken_as_it_is() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (tools, store) = (scratch.path().join("tools"), scratch.path().join("store"));
    corpus::tools(&tools)?;
    let (peer, root) = (Peer::new(Nix::V2_34)?, store.display().to_string());
    let mut cases = corpus::instantiate(&peer, &tools, &["--store", &root])?;
    cases.retain(|case| case.not_in_cluster.is_none());
    corpus::realise_inputs(&peer, &tools, &store, &cases)?;
    let request = |case: &Case| corpus::request(case, &root);
    let requests = cases.iter().map(request).collect::<Result<Vec<Value>>>();
    drover_store::fs::delete(&store.join("nix"))?;
    let requests = requests?;

    let plane = ControlPlane::start()?;
    plane.apply(&std::fs::read_to_string(xtask::checkout().join("crds/buildrequests.yaml"))?)?;
    plane.wait_established()?;
    let list = json!({"apiVersion": "v1", "kind": "List", "items": requests});
    // Not `apply`, which keeps a second copy in an annotation: some of these are large.
    run::filter(plane.kubectl_command().args(["create", "-f", "-"]), &serde_json::to_vec(&list)?)?;
    let text = plane.kubectl(&["get", "buildrequests", "-o", "json"])?;
    let kept: Value = serde_json::from_str(&text)?;
    let kept = kept["items"].as_array().context("a List")?;
    ensure!(kept.len() == requests.len(), "{} of {}", kept.len(), requests.len());
    for request in &requests {
        let name = &request["metadata"]["name"];
        let found = kept.iter().find(|item| item["metadata"]["name"] == *name).context("it is not there")?;
        ensure!(found["spec"]["derivation"] == request["spec"]["derivation"], "{name} is changed");
    }
    Ok(())
}
