//! The whole way, as a user goes it: real derivations, `drover request`, `kubectl apply`, a builder pod on a real node,
//! `kubectl wait`; and then what is in the status and in the cache against what real Nix builds.

use std::time::Duration;

use anyhow::{Context, Result};
use drover_tests::installation::{BUILDERS, TENANT};
use drover_tests::{Installation, Nix, Peer, sqlite};
use serde_json::Value;
use xtask::{checkout, run};

#[test]
fn real_software_is_built_as_nix_builds_it() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("drover-node-").tempdir_in("/tmp")?;
    let drover = Installation::up(scratch.path())?;
    let inputs = sqlite::inputs()?.display().to_string();
    let expression = checkout().join("tests/derivations/sqlite").display().to_string();
    let (tcc, libc, source) = (format!("{inputs}/tcc"), format!("{inputs}/libc"), format!("{inputs}/sqlite"));
    let arguments = ["--argstr", "tcc", &tcc, "--argstr", "libc", &libc, "--argstr", "sqlite", &source];
    let instantiated = drover.nix("nix-instantiate", &[&[&*expression][..], &arguments].concat())?;
    let drvs: Vec<&str> = ["-sqlite3.o.drv", "-sqlite-query.drv", "-sqlite-database.drv"]
        .iter()
        .map(|name| instantiated.lines().find(|line| line.ends_with(name)).context(*name))
        .collect::<Result<_>>()?;

    // The .drv files and the sources: what the proof of the paths and the builds need. No output is in the cache.
    drover.copy_to_cache(&drvs)?;

    for drv in &drvs {
        let yaml = run::stdout(&mut drover.drover(&[
            "request",
            drv,
            "--store",
            &drover.store().display().to_string(),
        ])?)?;
        let name = request_name(&yaml)?;
        drover.apply(&yaml)?;
        let request = drover.wait(&name, "True")?;
        let status = &request["status"];
        let builders_fetch = drv != &drvs[0];
        if !builders_fetch {
            // Long before the next request: a build by real Nix is in between.
            drover.upgrade(&["class.spec.caches[0].fetchedBy=Builders"])?;
        }

        // Against real Nix, which builds the same .drv from the same inputs, in its own sandbox.
        let built = drover.nix("nix-store", &["--realise", drv])?;
        let path = built.lines().last().context("nix-store --realise prints the path")?;
        let infos: Value = serde_json::from_str(&drover.nix("nix", &["path-info", "--json", path])?)?;
        let info =
            [&infos[path], &infos[0]].into_iter().find(|info| info.is_object()).context("a path info")?;
        let output = &status["outputs"]["out"];
        assert_eq!(output["path"], path);
        assert_eq!(sri(&output["narHash"])?, sri(&info["narHash"])?, "{drv}");
        assert_eq!(output["narSize"], info["narSize"]);
        assert_eq!(sorted(&output["references"]), sorted(&info["references"]));

        for condition in [
            "Accepted",
            "Scheduled",
            "BuilderReady",
            "InputsCopied",
            "Built",
            "OutputsCollected",
            "Succeeded",
            "Ready",
        ] {
            assert_eq!(condition_of(status, condition)["status"], "True", "{condition} in {status:#}");
        }
        for condition in ["Reconciling", "Stalled"] {
            assert_ne!(condition_of(status, condition)["status"], "True", "{condition}");
        }
        assert_eq!(condition_of(status, "Succeeded")["reason"], "Built");
        assert_eq!(status["builder"]["sandbox"], "nested");
        assert_eq!(status["builder"]["namespace"], BUILDERS);
        assert_eq!(status["observedGeneration"], request["metadata"]["generation"]);
        // A new builder has nothing. The cache's address is a private one: builders fetch from it if the class says so.
        let transfer = &status["transfer"];
        let (way, bytes, not) = match builders_fetch {
            false => ("pathsSent", "bytesSent", "pathsFetched"),
            true => ("pathsFetched", "bytesFetched", "pathsSent"),
        };
        assert_eq!(transfer[way], transfer["pathsTotal"], "{transfer}");
        assert!(transfer[bytes].as_u64() > Some(0) && transfer[not] == 0, "{transfer}");
        assert!(transfer["pathsTotal"].as_u64() > Some(0));
        no_pods(&drover)?;
    }

    // Each path that a builder lacked was fetched once a build, and nothing else: the .drv files never travel.
    let fetched: Vec<_> = drover.cache.requests()?.into_iter().filter(|r| r.0 == "PUT").collect();
    assert!(
        fetched.iter().any(|(_, path, ..)| path.starts_with("/log/")),
        "the log is in the cache: {fetched:?}"
    );

    // A fresh store installs what was built from nothing but the cache, and finds it whole.
    let fresh = scratch.path().join("fresh").display().to_string();
    let request = drover.get(&request_name_of(&drover, "sqlite-database")?)?;
    let path = request["status"]["outputs"]["out"]["path"].as_str().context("a path")?;
    let mut copy = drover.nix_command("nix")?;
    run::stdout(copy.args(["copy", "--no-check-sigs", "--from", drover.cache.url(), "--to", &fresh, path]))?;
    run::stdout(drover.nix_command("nix-store")?.args(["--verify", "--check-contents", "--store", &fresh]))?;
    let database = scratch.path().join("fresh").join(path.trim_start_matches('/'));
    assert!(std::fs::read(database)?.starts_with(b"SQLite format 3\0"));

    // The same request again under another name: its outputs are there, so no pod is made.
    let again = format!("{}-again", request["metadata"]["name"].as_str().context("a name")?);
    let copy = serde_json::json!({
        "apiVersion": request["apiVersion"], "kind": request["kind"],
        "metadata": {"name": again}, "spec": request["spec"],
    });
    drover.apply(&copy.to_string())?;
    let request = drover.wait(&again, "True")?;
    assert_eq!(condition_of(&request["status"], "Succeeded")["reason"], "AlreadyBuilt");
    assert!(request["status"]["attempt"].is_null(), "{}", request["status"]);
    Ok(())
}

#[test]
fn builds_that_fail_say_why_and_leave_nothing() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("drover-node-").tempdir_in("/tmp")?;
    let drover = Installation::up(scratch.path())?;
    let script = |text: &str| {
        format!(
            "{{name: fails, system: x86_64-linux, builder: /bin/sh, args: [-c, {text:?}], outputs: {{out: {{}}}}}}"
        )
    };
    let missing = "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-source";
    struct Case {
        name: &'static str,
        spec: String,
        reason: &'static str,
        message: &'static str,
        log: Option<&'static str>,
    }
    let cases = [
        Case {
            name: "exit-code",
            spec: format!("derivation: {}", script("echo one; echo two >&2; exit 7")),
            reason: "BuildFailed",
            message: "exit code 7",
            log: Some("two"),
        },
        Case {
            name: "timeout",
            spec: format!("timeoutSeconds: 2\n  derivation: {}", script("echo begun; while :; do :; done")),
            reason: "TimedOut",
            message: "2 seconds",
            log: Some("begun"),
        },
        Case {
            name: "silent",
            spec: format!("maxSilentSeconds: 2\n  derivation: {}", script("echo quiet now; while :; do :; done")),
            reason: "MaxSilentExceeded",
            message: "2 seconds",
            log: Some("quiet now"),
        },
        Case {
            name: "log-limit",
            spec: format!("maxLogBytes: 1000\n  derivation: {}", script("while :; do echo and on; done")),
            reason: "LogLimitExceeded",
            message: "",
            log: None,
        },
        Case {
            name: "no-output",
            spec: format!("derivation: {}", script("echo nothing made")),
            reason: "OutputRejected",
            message: "out",
            log: Some("nothing made"),
        },
        Case {
            name: "missing-input",
            spec: format!("derivation: {}", script("cat $source").replace("outputs:", &format!("inputSrcs: [{missing}], outputs:"))),
            reason: "InputMissing",
            message: missing,
            log: None,
        },
        Case {
            name: "wrong-system",
            spec: format!("derivation: {}", script("true").replace("x86_64-linux", "riscv64-linux")),
            reason: "WrongSystem",
            message: "riscv64-linux",
            log: None,
        },
        Case {
            name: "wrong-hash",
            spec: format!(
                "derivation: {}",
                script("echo surprise > $out").replace(
                    "{out: {}}",
                    "{out: {hashAlgo: sha256, hash: '0000000000000000000000000000000000000000000000000000000000000000'}}"
                )
            ),
            reason: "OutputHashMismatch",
            message: "sha256-",
            log: None,
        },
        Case {
            name: "not-entitled",
            spec: format!(
                "derivation: {}",
                script("echo forged > $out").replace("{out: {}}", &format!("{{out: {{path: {}}}}}", missing.replace("source", "fails")))
            ),
            reason: "PathNotProven",
            message: "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-fails",
            log: None,
        },
    ];
    for case in &cases {
        let yaml = format!(
            "apiVersion: drover.build/v1alpha1\nkind: BuildRequest\nmetadata: {{name: {}}}\nspec:\n  {}\n",
            case.name, case.spec
        );
        drover.apply(&yaml)?;
    }
    for case in cases {
        let request = drover.wait(case.name, "False")?;
        let status = &request["status"];
        let failure = &status["failure"];
        assert_eq!(condition_of(status, "Succeeded")["reason"], case.reason, "{}: {status:#}", case.name);
        assert_eq!(condition_of(status, "Stalled")["status"], "True", "{}", case.name);
        assert_eq!(failure["reason"], case.reason, "{}", case.name);
        let message = failure["message"].as_str().unwrap_or_default();
        assert!(message.contains(case.message), "{}: {message:?}", case.name);
        let log: Vec<&str> =
            failure["logTail"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if let Some(line) = case.log {
            assert!(log.contains(&line), "{}: {log:?}", case.name);
        }
        assert!(status["outputs"].as_object().is_none_or(|outputs| outputs.is_empty()), "{}", case.name);
    }
    no_pods(&drover)?;

    a_running_builder_is_confined(&drover)?;
    no_pods(&drover)
}

/// Looks at a builder in the middle of its build: what its pod may do, and what its store is like. Then deletes the
/// request, which ends the build.
fn a_running_builder_is_confined(drover: &Installation) -> Result<()> {
    let file = drover.store().with_file_name("some-input");
    std::fs::write(&file, "an input\n")?;
    let input = drover.nix("nix-store", &["--add", &file.display().to_string()])?.trim().to_owned();
    drover.copy_to_cache(&[&input])?;
    drover.apply(&format!(
        "apiVersion: drover.build/v1alpha1\nkind: BuildRequest\nmetadata: {{name: deleted}}\nspec:\n  derivation: \
         {{name: runs, system: x86_64-linux, builder: /bin/sh, args: [-c, 'while :; do :; done'], inputSrcs: [{input}], \
         outputs: {{out: {{}}}}}}\n"
    ))?;
    let building = "--for=jsonpath={.status.conditions[?(@.type==\"Succeeded\")].reason}=Building";
    drover.cluster.kubectl(&["wait", "-n", TENANT, "breq/deleted", building, "--timeout=60s"])?;

    let pods: Value =
        serde_json::from_str(&drover.cluster.kubectl(&["get", "-n", BUILDERS, "pods", "-o", "json"])?)?;
    let pod = &pods["items"][0];
    let spec = &pod["spec"];
    assert_eq!(spec["hostUsers"], false);
    assert_eq!(spec["automountServiceAccountToken"], false);
    let context = &spec["containers"][0]["securityContext"];
    assert_eq!(context["procMount"], "Unmasked");
    assert_eq!(context["allowPrivilegeEscalation"], false);
    assert!(context["capabilities"]["add"].is_null() && context["privileged"].is_null(), "{context}");
    let volumes = spec["volumes"].as_array().context("volumes")?;
    assert!(volumes.iter().all(|volume| volume["emptyDir"].is_object()), "no Secret, no token: {volumes:?}");
    assert_eq!(drover.cluster.kubectl(&["get", "-n", BUILDERS, "secrets", "-o", "name"])?, "");
    let namespace: Value =
        serde_json::from_str(&drover.cluster.kubectl(&["get", "namespace", BUILDERS, "-o", "json"])?)?;
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "baseline");

    // Real Nix finds the store of the running builder whole, and the input in it.
    let uid = pod["metadata"]["uid"].as_str().context("a uid")?;
    let volume = format!("pods/{uid}/volumes/kubernetes.io~empty-dir/nix");
    let nix = Peer::new(Nix::V2_34)?.with_at(&drover.cluster.kubelet_dir().join(volume), "/nix");
    nix.run("nix-store", &["--verify", "--check-contents", "--store", "local"])?;
    nix.run("nix-store", &["--check-validity", &input, "--store", "local"])?;

    drover.cluster.kubectl(&["delete", "-n", TENANT, "breq/deleted", "--timeout=20s"])?;
    Ok(())
}

/// Waits until no builder pod is there: they go with their builds, after their grace period.
fn no_pods(drover: &Installation) -> Result<()> {
    run::wait_for("the builders' pods to go", Duration::from_secs(60), || {
        Ok(drover.builder_pods()?.is_empty())
    })
}

fn condition_of<'a>(status: &'a Value, kind: &str) -> &'a Value {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().find(|condition| condition["type"] == kind).unwrap_or(&Value::Null)
}

/// The name in a request that `drover request` printed.
fn request_name(yaml: &str) -> Result<String> {
    let line =
        yaml.lines().find_map(|line| line.trim().strip_prefix("name: ")).context("a name in the request")?;
    Ok(line.trim_matches(['"', '\'']).to_owned())
}

/// The first request of the tenant whose derivation has this name.
fn request_name_of(drover: &Installation, derivation: &str) -> Result<String> {
    let json = drover.cluster.kubectl(&["get", "-n", TENANT, "buildrequests", "-o", "json"])?;
    let list: Value = serde_json::from_str(&json)?;
    let items = list["items"].as_array().into_iter().flatten();
    items
        .into_iter()
        .find(|item| item["spec"]["derivation"]["name"] == derivation)
        .and_then(|item| item["metadata"]["name"].as_str())
        .map(str::to_owned)
        .with_context(|| format!("no request for {derivation}"))
}

/// A NAR hash of any spelling as SRI.
fn sri(hash: &Value) -> Result<String> {
    let hash: drover_nix::Sha256 = hash.as_str().context("a hash")?.parse()?;
    Ok(hash.to_sri())
}

fn sorted(list: &Value) -> Vec<String> {
    let mut paths: Vec<String> =
        list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    paths.sort();
    paths
}
