//! Values that make no sense are refused before anything happens, with the name of the value; and what Helm prints when it is
//! done can be typed as it stands there.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use drover_tests::ControlPlane;
use serde_json::{Value, json};
use xtask::parts::go;
use xtask::{chart, checkout, run};

#[test]
fn mistakes_are_named() -> Result<()> {
    for (values, named) in [
        (json!({"replicaCount": 2}), "replicaCount"),
        (json!({"image": {"repo": "x"}}), "'/image': additional properties 'repo'"),
        (json!({"image": {"digest": "sha256:12"}}), "/image/digest"),
        (json!({"image": {"pullPolicy": "Sometimes"}}), "/image/pullPolicy"),
        (json!({"imagePullSecrets": ["name"]}), "/imagePullSecrets/0"),
        (json!({"builder": {"image": {"tags": "1"}}}), "/builder/image"),
        (json!({"builder": {"namespace": "Builders"}}), "/builder/namespace"),
        (json!({"builder": {"lingerSeconds": "1h"}}), "/builder/lingerSeconds"),
        (json!({"builder": {"networkPolicy": {"except": ["10.0.0.0"]}}}), "/builder/networkPolicy/except/0"),
        (json!({"class": {"enabled": true}}), "/class"),
        (json!({"crds": {"install": true}}), "/crds"),
        (json!({"crds": {"keep": "yes"}}), "/crds/keep"),
        (json!({"networkPolicy": {"enabled": true}}), "/networkPolicy"),
        (json!({"networkPolicy": {"egress": {"ports": [0]}}}), "/networkPolicy/egress/ports/0"),
        (json!({"tests": {"timeoutSeconds": 0}}), "/tests/timeoutSeconds"),
        (json!({"tests": {"image": "x"}}), "/tests"),
        (json!({"resources": {"limit": {}}}), "/resources"),
        (json!({"log": {"format": "xml"}}), "/log/format"),
        (json!({"leaderElection": {"leaseDuration": 15}}), "/leaderElection"),
        (json!({"podDisruptionBudget": {"maxUnavailable": 0}}), "/podDisruptionBudget/maxUnavailable"),
        (json!({"serviceAccount": {"annotations": {"a": 1}}}), "/serviceAccount/annotations/a"),
        (json!({"rbac": {"enabled": true}}), "/rbac"),
        (json!({"nodeSelector": ["linux"]}), "/nodeSelector"),
        (json!({"tolerations": {}}), "/tolerations"),
        (json!({"replicas": -1}), "/replicas"),
        (json!({"replicas": 2, "leaderElection": {"enabled": false}}), "replicas can be 1 at most"),
    ] {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), values.to_string())?;
        let mut helm = Command::new(go::helm()?);
        helm.args(["template", "drover"]).arg(checkout().join(chart::CHART)).arg("--values").arg(file.path());
        let out = run::output(&mut helm)?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(!out.status.success(), "it took {values}");
        ensure!(said.contains(named), "{values}: {named:?} is not in: {said}");
    }
    Ok(())
}

/// No level of the schema takes what it does not know, but where Kubernetes' own types begin.
#[test]
fn every_value_has_a_schema() -> Result<()> {
    let read = |file: &str| std::fs::read_to_string(checkout().join(chart::CHART).join(file));
    let schema: Value = serde_json::from_str(&read("values.schema.json")?)?;
    let values: Value = serde_yaml::from_str(&read("values.yaml")?)?;
    compare("", &values, &schema, &schema)
}

fn compare(path: &str, value: &Value, schema: &Value, root: &Value) -> Result<()> {
    let schema = match schema["$ref"].as_str() {
        Some(name) => root.pointer(name.trim_start_matches('#')).context(name.to_owned())?,
        None => schema,
    };
    let (Some(value), Some(known)) = (value.as_object(), schema["properties"].as_object()) else {
        return Ok(());
    };
    ensure!(schema["additionalProperties"] == false, "{path} takes anything");
    for (key, value) in value {
        let schema = known.get(key).with_context(|| format!("{path}/{key} has no schema"))?;
        compare(&format!("{path}/{key}"), value, schema, root)?;
    }
    for key in known.keys().filter(|key| !["global", "claims"].contains(&key.as_str())) {
        // Of resources, the requests and limits are there.
        ensure!(value.contains_key(key), "{path}/{key} is not in values.yaml");
    }
    Ok(())
}

/// For a few sets of values: what is applied is taken, and what is asked for is there to be asked.
#[test]
fn notes_can_be_typed() -> Result<()> {
    let plane = ControlPlane::start()?;
    plane.kubectl(&["create", "namespace", "mine"])?;
    for (number, (options, programs)) in [
        ("", "kubectl helm kubectl kubectl"),
        ("--set class.create=true --set tests.enabled=false --set crds.keep=false", "kubectl kubectl"),
        (
            "--set builder.createNamespace=false --set builder.namespace=mine --set tests.class=fast --set tests.namespace=default",
            "kubectl kubectl helm kubectl kubectl",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let namespace = format!("release-{number}");
        plane.kubectl(&["create", "namespace", &namespace])?;
        let helm = |act: &[&str]| -> Result<Command> {
            let mut helm = Command::new(go::helm()?);
            helm.env("KUBECONFIG", plane.kubeconfig()).args(act).args(["--namespace", &namespace]);
            Ok(helm)
        };
        let chart = checkout().join(chart::CHART).display().to_string();
        // Nothing runs here: what hooks wait for never comes. What all releases have in common passes from one to the next.
        let mut install = helm(&["install", "drover", &chart, "--no-hooks", "--take-ownership"])?;
        run::stdout(install.args(options.split_whitespace()))?;
        plane.wait_established()?;
        let notes = run::stdout(&mut helm(&["get", "notes", "drover"])?)?;
        let commands = drover_tests::installation::commands(&notes);
        let begin: Vec<_> = commands.iter().filter_map(|command| command.split_whitespace().next()).collect();
        ensure!(begin.join(" ") == programs, "{options}: {notes}");
        for command in &commands {
            let folder = |program: std::path::PathBuf| Some(program.parent()?.display().to_string());
            let path = [folder(go::helm()?), Some(go::kubernetes()?.display().to_string())];
            let path = path.into_iter().flatten().collect::<Vec<_>>().join(":");
            // What is waited for exists; no operator is there that would end it.
            let command = command.replace("--timeout=10m", "--timeout=1s");
            let mut shell = Command::new("sh");
            shell.env("PATH", format!("{path}:{}", std::env::var("PATH").unwrap_or_default()));
            shell.env("KUBECONFIG", plane.kubeconfig()).args(["-euc", &command]);
            if command.starts_with("helm test") {
                // It would wait for a pod. The release has a test, and knows these options.
                let tests = run::stdout(&mut helm(&["get", "hooks", "drover"])?)?;
                ensure!(tests.contains("helm.sh/hook: test") && command.contains(&namespace), "{tests}");
            } else if command.contains(" wait ") {
                let said = run::output(&mut shell)?;
                let said = String::from_utf8_lossy(&said.stderr);
                ensure!(said.contains("timed out waiting for the condition"), "{said}");
            } else {
                run::stdout(&mut shell).with_context(|| command.clone())?;
            }
        }
        plane.kubectl(&["delete", "builderclass", "--all"])?;
    }
    Ok(())
}
