//! Builds that end badly on a real node, and what their requests say: too little memory, too little disk and what was
//! killed from outside are told from builders that failed, are counted apart, and are tried again only where that is of use.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drover_tests::Installation;
use drover_tests::installation::{BUILDERS, TENANT};
use serde_json::Value;
use xtask::run;

/// What a request with this script comes to.
struct Case {
    name: &'static str,
    class: &'static str,
    script: String,
    /// The reason of the request and of each of its attempts.
    reason: &'static str,
    /// Whether the machinery is at fault.
    infrastructure: bool,
    /// How many more tries it gets for that.
    retries: usize,
    message: &'static str,
}

#[test]
fn a_build_that_the_machine_failed_is_told_from_one_that_failed() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("drover-node-").tempdir_in("/tmp")?;
    let drover = Installation::up(scratch.path())?;
    classes(&drover)?;
    // A string that doubles; a megabyte, and a hundred of it.
    let hog = "x=mmmmmmmmmmmmmmmm; while :; do x=$x$x; done";
    let megabyte = "x=dddddddddddddddd; i=0; while [ $i != 16 ]; do x=$x$x; i=$((i + 1)); done";
    let hundred = "i=0; while [ $i != 100 ] && echo \"$x\"; do i=$((i + 1)); done > $out";
    let cases = [
        Case {
            name: "fails",
            class: "roomy",
            script: "echo out of memory: no; exit 1".into(),
            reason: "BuildFailed",
            infrastructure: false,
            retries: 1,
            message: "failed with exit code 1",
        },
        Case {
            name: "hungry",
            class: "little-memory",
            script: hog.into(),
            reason: "OutOfMemory",
            infrastructure: true,
            retries: 1,
            message: "",
        },
        Case {
            name: "hungry-child",
            class: "little-memory",
            script: format!("({hog}) || exit 3"),
            reason: "OutOfMemory",
            infrastructure: true,
            retries: 1,
            message: "",
        },
        Case {
            name: "full",
            class: "little-disk",
            script: format!("{megabyte}; {hundred}; exit 4"),
            reason: "DiskFull",
            infrastructure: true,
            retries: 1,
            message: "failed with exit code 4",
        },
        // The kubelet looks at the volume's size once a minute, and evicts the pod: one try is enough.
        Case {
            name: "evicted",
            class: "watched-disk",
            script: format!("{megabyte}; {hundred}; while :; do :; done"),
            reason: "DiskFull",
            infrastructure: true,
            retries: 0,
            message: "EmptyDir",
        },
    ];
    for case in &cases {
        apply(&drover, case.name, case.class, &case.script, case.retries)?;
    }
    // Builds of their own, that something else ends.
    for name in ["killed", "builder-killed"] {
        apply(&drover, name, "roomy", &format!(": mark-{name}; while :; do :; done"), 1)?;
    }
    for attempt in 1..=2 {
        let build = process(&drover, "killed", attempt, "mark-killed")?;
        kill(&build)?;
        let key = authorized_key(&drover, "builder-killed", attempt)?;
        kill(&process(&drover, "builder-killed", attempt, &key)?)?;
    }

    for case in cases {
        let tries = if case.infrastructure { case.retries + 1 } else { 1 };
        let attempts = expect(&drover, case.name, case.reason, case.infrastructure, tries)?;
        let last = attempts.last().context("an attempt")?;
        let message = last["message"].as_str().unwrap_or_default();
        ensure!(message.contains(case.message), "{}: {message}", case.name);
    }
    for name in ["killed", "builder-killed"] {
        expect(&drover, name, "BuilderLost", true, 2)?;
    }
    run::wait_for("the builders' pods to go", Duration::from_secs(60), || {
        Ok(drover.builder_pods()?.is_empty())
    })
}

/// The request has ended so, and so has each of its attempts, of which there were so many.
fn expect(
    drover: &Installation,
    name: &str,
    reason: &str,
    infrastructure: bool,
    tries: usize,
) -> Result<Vec<Value>> {
    let request = drover.wait(name, "False")?;
    let status = &request["status"];
    ensure!(status["failure"]["reason"] == reason, "{name}: {status:#}");
    let attempts = status["attempts"].as_array().cloned().unwrap_or_default();
    ensure!(attempts.len() == tries, "{name}: {status:#}");
    for attempt in &attempts {
        ensure!(attempt["reason"] == reason, "{name}: {status:#}");
        ensure!(attempt["infrastructure"].as_bool().unwrap_or(false) == infrastructure, "{name}: {status:#}");
    }
    // What `drover wait` says of it to scripts.
    let waited = drover.drover(&["wait", name, "--namespace", TENANT])?.output()?;
    ensure!(waited.status.code() == Some(if infrastructure { 3 } else { 1 }), "{name}: {waited:?}");
    Ok(attempts)
}

fn apply(drover: &Installation, name: &str, class: &str, script: &str, retries: usize) -> Result<()> {
    let request = serde_json::json!({
        "apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest", "metadata": {"name": name},
        "spec": {
            "class": class,
            "retries": {"infrastructure": retries},
            "derivation": {
                "name": name, "system": "x86_64-linux", "builder": "/bin/sh", "args": ["-c", script],
                "outputs": {"out": {}},
            },
        },
    });
    drover.apply(&request.to_string()).map(drop)
}

fn classes(drover: &Installation) -> Result<()> {
    let class = |name: &str, memory: &str, volume: Value| {
        serde_json::json!({
            "apiVersion": "drover.build/v1alpha1", "kind": "BuilderClass", "metadata": {"name": name},
            "spec": {
                "systems": ["x86_64-linux"],
                "caches": [{"url": drover.cache.url(), "push": true}],
                "resources": {"default": {
                    "requests": {"cpu": "50m", "ephemeral-storage": "64Mi"}, "limits": {"memory": memory},
                }},
                "template": {"spec": {"volumes": [{"name": "nix", "emptyDir": volume}]}},
            },
        })
    };
    let nothing = serde_json::json!({});
    let small = serde_json::json!({"medium": "Memory", "sizeLimit": "64Mi"});
    let watched = serde_json::json!({"sizeLimit": "32Mi"});
    for class in [
        class("roomy", "512Mi", nothing.clone()),
        class("little-memory", "128Mi", nothing),
        class("little-disk", "512Mi", small),
        class("watched-disk", "512Mi", watched),
    ] {
        drover.cluster.apply(&class.to_string())?;
    }
    Ok(())
}

/// The pod of an attempt, once it is there.
fn pod(drover: &Installation, name: &str, attempt: u32) -> Result<Value> {
    let mut found = None;
    run::wait_for(&format!("pod {attempt} of {name}"), Duration::from_secs(90), || {
        let selector = format!("drover.build/attempt={attempt}");
        let json = drover.cluster.kubectl(&["get", "-n", BUILDERS, "pods", "-l", &selector, "-o", "json"])?;
        let list: Value = serde_json::from_str(&json)?;
        let of = Value::from(format!("{TENANT}/{name}"));
        let pods = list["items"].as_array().into_iter().flatten();
        found = pods
            .into_iter()
            .find(|pod| pod["metadata"]["annotations"]["drover.build/request"] == of)
            .cloned();
        Ok(found.is_some())
    })?;
    found.context("a pod")
}

/// What only this attempt's builder has on its command line.
fn authorized_key(drover: &Installation, name: &str, attempt: u32) -> Result<String> {
    let pod = pod(drover, name, attempt)?;
    let args = pod["spec"]["containers"][0]["args"].as_array().context("arguments")?;
    let at = args.iter().position(|arg| arg == "--authorized-key").context("a key")?;
    args.get(at + 1).and_then(Value::as_str).map(str::to_owned).context("a key")
}

/// The directory in /proc of a process of an attempt that builds, with these words on its command line.
fn process(drover: &Installation, name: &str, attempt: u32, words: &str) -> Result<PathBuf> {
    let uid = pod(drover, name, attempt)?["metadata"]["uid"].as_str().context("a uid")?.to_owned();
    let mut found = None;
    run::wait_for(&format!("{name} to build"), Duration::from_secs(90), || {
        let request = drover.get(name)?;
        let status = &request["status"];
        let all = status["conditions"].as_array().cloned().unwrap_or_default();
        let building = all.iter().any(|one| one["type"] == "Succeeded" && one["reason"] == "Building");
        if !building || status["attempt"] != attempt {
            return Ok(false);
        }
        let entries = std::fs::read_dir("/proc")?.filter_map(Result::ok).map(|entry| entry.path());
        found = entries.into_iter().find(|dir| {
            let read = |file: &str| std::fs::read(dir.join(file)).unwrap_or_default();
            let (line, groups) = (read("cmdline"), read("cgroup"));
            String::from_utf8_lossy(&line).contains(words) && String::from_utf8_lossy(&groups).contains(&uid)
        });
        Ok(found.is_some())
    })?;
    found.context("a process")
}

fn kill(process: &std::path::Path) -> Result<()> {
    let pid = process.file_name().and_then(|name| name.to_str()).context("a pid")?;
    run::stdout(Command::new("kill").args(["-9", pid])).map(drop)
}
