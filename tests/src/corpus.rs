//! The corpus: derivations that each exercise one thing, in `tests/derivations/corpus`, as real Nix instantiates them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use drover_nix::{StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildStatus};
use drover_store::{Access, LocalStore, StoreLayout};
use serde_json::Value;
use xtask::{checkout, run};

use crate::{Peer, program};

/// What the corpus needs of Nix beyond what is stable.
pub const FEATURES: &str = "nix-command ca-derivations impure-derivations dynamic-derivations git-hashing";

/// What a case expects its builder to have in the environment.
pub const VARIABLE: (&str, &str) = ("CORPUS_VARIABLE", "from outside");

/// One derivation and what is to become of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// Subject and thing, as in `floating-chain`; also the derivation's name, nearly always.
    pub name: String,
    pub drv: StorePath,
    /// What Nix 2.34 answers.
    pub expect: BuildStatus,
    /// Limits that the client sets.
    pub options: BuildOptions,
    /// Why a request to a cluster cannot express it, or cannot end alike.
    pub not_in_cluster: Option<String>,
    /// Why `drover build` cannot do it.
    pub not_by_drover_build: Option<String>,
}

/// Makes the directory of tools that the corpus takes as its argument: a static busybox under the names of its applets.
pub fn tools(dir: &Path) -> Result<()> {
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
    let busybox = busybox.context("busybox not found: apt-get install busybox-static")?;
    let bin = dir.join("bin");
    std::fs::create_dir_all(&bin)?;
    for dir in [dir, &bin] {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
    }
    std::fs::copy(busybox, bin.join("busybox"))?;
    for applet in run::stdout(Command::new(busybox).arg("--list"))?.lines() {
        if applet != "busybox" {
            std::os::unix::fs::symlink("busybox", bin.join(applet))?;
        }
    }
    Ok(())
}

/// Has this Nix, which sees `tools`, write the `.drv` files and sources of the whole corpus into its store, and gives the
/// cases by name. `more` are options of Nix's, such as which store.
pub fn instantiate(peer: &Peer, tools: &Path, more: &[&str]) -> Result<Vec<Case>> {
    let expressions = checkout().join("tests/derivations/corpus");
    let mut nix = peer.clone().with(&expressions).command("nix-instantiate")?;
    nix.args(["--eval", "--strict", "--json", "--read-write-mode"]).args(more).arg(&expressions);
    nix.arg("--argstr").arg("tools").arg(tools);
    nix.env("NIX_CONFIG", format!("extra-experimental-features = {FEATURES}\n"));
    let json = run::stdout(&mut nix)?;
    let cases: BTreeMap<String, Value> =
        serde_json::from_str(&json).context("nix-instantiate prints JSON")?;
    cases.into_iter().map(|(name, value)| case(name, &value)).collect()
}

/// Has this Nix, with the corpus in `store`, build what the cases have as inputs, so that a request for each can be made.
/// The outputs' paths.
pub fn realise_inputs(peer: &Peer, tools: &Path, store: &Path, cases: &[Case]) -> Result<Vec<String>> {
    let opened = LocalStore::open(StoreLayout::in_root(store), Access::ReadOnly)?;
    let mut inputs = BTreeSet::new();
    for case in cases {
        for (drv, outputs) in opened.read_derivation(&case.drv)?.input_drvs {
            inputs.extend(outputs.iter().map(|output| format!("/nix/store/{drv}^{output}")));
        }
    }
    drop(opened);
    let mut nix = peer.command("nix")?;
    nix.env("NIX_CONFIG", nix_config(tools)).args(["build", "--no-link", "--print-out-paths", "--store"]);
    let paths = run::stdout(nix.arg(store).args(&inputs))?;
    Ok(paths.lines().map(str::to_owned).collect())
}

/// Settings of a Nix that builds what the corpus has, in its own sandbox and with the shell of these tools.
pub fn nix_config(tools: &Path) -> String {
    format!(
        "substitute = false\nbuild-users-group =\nexperimental-features = {FEATURES}\nsandbox-paths = /bin/sh={}/bin/busybox\n",
        tools.display()
    )
}

/// The limits of a case as fields of a request.
pub fn limits(case: &Case) -> BTreeMap<&'static str, u64> {
    let options = &case.options;
    let all = [
        ("timeoutSeconds", options.timeout_seconds),
        ("maxSilentSeconds", options.max_silent_seconds),
        ("maxLogBytes", options.max_log_bytes),
    ];
    all.into_iter().filter(|(_, limit)| *limit > 0).collect()
}

/// The BuildRequest of a case, as `drover request` makes it from the `.drv` in this store, with the case's limits.
pub fn request(case: &Case, store: &str) -> Result<Value> {
    let drv = format!("/nix/store/{}", case.drv);
    let mut command = Command::new(program("drover")?);
    let json = run::stdout(command.args(["request", &drv, "--json", "--store", store]))
        .with_context(|| case.name.clone())?;
    let mut request: Value = serde_json::from_str(&json).context("drover request prints JSON")?;
    for (field, limit) in limits(case) {
        request["spec"][field] = limit.into();
    }
    Ok(request)
}

/// The request of a case among those that `drover build` prints, or a cluster has.
pub fn request_of<'a>(requests: &'a [Value], case: &Case) -> Result<&'a Value> {
    // A name ends with the beginning of the hash of the .drv that was asked for, or of the one that it was resolved to.
    let end = format!("-{}", &case.drv.hash_part()[..8]);
    let is_its = |request: &&Value| {
        let name = request["metadata"]["name"].as_str().unwrap_or_default();
        name.ends_with(&end) || request["spec"]["derivation"]["name"] == *case.name
    };
    requests.iter().find(is_its).with_context(|| format!("no request for {}", case.name))
}

/// Why a request ended: the reason of its condition Succeeded.
pub fn reason(status: &Value) -> String {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let succeeded = conditions.into_iter().find(|condition| condition["type"] == "Succeeded");
    succeeded.and_then(|condition| condition["reason"].as_str()).unwrap_or("none").to_owned()
}

/// The outputs in a status by name: path, narHash, narSize and references, sorted.
pub fn outputs(status: &Value) -> BTreeMap<String, Value> {
    let outputs = status["outputs"].as_object().into_iter().flatten();
    let sorted = |output: &Value| {
        let mut references: Vec<String> = output["references"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect();
        references.sort();
        serde_json::json!({
            "path": output["path"], "narHash": output["narHash"], "narSize": output["narSize"], "references": references,
        })
    };
    outputs.map(|(name, output)| (name.clone(), sorted(output))).collect()
}

fn case(name: String, value: &Value) -> Result<Case> {
    let drv = value["drv"].as_str().context("a case has a .drv")?;
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    let limit = |key: &str| value["limits"][key].as_u64().unwrap_or(0);
    Ok(Case {
        drv: StoreDir::default().parse(drv.as_bytes())?,
        expect: status(value["expect"].as_str().unwrap_or_default()).context(name.clone())?,
        options: BuildOptions {
            timeout_seconds: limit("timeout"),
            max_silent_seconds: limit("silent"),
            max_log_bytes: limit("log"),
            ..BuildOptions::default()
        },
        not_in_cluster: text("local"),
        not_by_drover_build: text("built"),
        name,
    })
}

fn status(name: &str) -> Result<BuildStatus> {
    Ok(match name {
        "Built" => BuildStatus::Built,
        "PermanentFailure" => BuildStatus::PermanentFailure,
        "InputRejected" => BuildStatus::InputRejected,
        "OutputRejected" => BuildStatus::OutputRejected,
        "TransientFailure" => BuildStatus::TransientFailure,
        "TimedOut" => BuildStatus::TimedOut,
        "MiscFailure" => BuildStatus::MiscFailure,
        "LogLimitExceeded" => BuildStatus::LogLimitExceeded,
        _ => bail!("no status {name:?}"),
    })
}
