//! Everything that the chart makes of the golden values files is what a real API server knows: by kubeconform, against schemas
//! that this server publishes, Drover's own definitions among them; nothing comes from anywhere else. And Pod Security, by the
//! server's own admission, which schemas know nothing of.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use drover_tests::ControlPlane;
use serde_json::{Map, Value, json};
use xtask::parts::go;
use xtask::{chart, checkout, run};

/// Kinds of the Prometheus operator: their definitions are its own, and no part of a cluster.
const NOT_OURS: &str = "ServiceMonitor,PodMonitor,PrometheusRule";

#[test]
fn renderings_are_what_an_api_server_takes() -> Result<()> {
    let plane = ControlPlane::start()?;
    let crds = checkout().join("crds");
    plane.kubectl(&["apply", "--server-side", "-f", &crds.to_string_lossy()])?;
    plane.wait_established()?;
    let schemas = tempfile::tempdir()?;
    write_schemas(&plane, schemas.path())?;
    let cases = chart::cases()?;
    for case in &cases {
        let rendered = case.render()?;
        let said = conform(schemas.path(), &rendered)?;
        ensure!(said.is_empty(), "{}: {said}", case.name);
    }

    // It would notice: a field that there is not, a value of the wrong type, a kind that nobody knows.
    let default = cases.iter().find(|case| case.name == "default").context("a golden values file")?;
    let rendered = default.render()?;
    for (from, to) in [
        ("replicas: 2", "replicsa: 2"),
        ("replicas: 2", "replicas: two"),
        ("kind: PodDisruptionBudget", "kind: PodDisruptionBudged"),
    ] {
        ensure!(rendered.contains(from), "{from:?} is not rendered");
        let said = conform(schemas.path(), &rendered.replacen(from, to, 1))?;
        ensure!(!said.is_empty(), "{to:?} was not noticed");
    }
    operators_are_restricted_and_builders_baseline(&plane)
}

/// The operators' pods and those of hooks, in a namespace that enforces `restricted`, and what the builders' enforces.
fn operators_are_restricted_and_builders_baseline(plane: &ControlPlane) -> Result<()> {
    plane.apply(
        "{apiVersion: v1, kind: Namespace, metadata: {name: drover-system, labels: \
         {pod-security.kubernetes.io/enforce: restricted}}}",
    )?;
    let cases = chart::cases()?;
    let of = |name: &str| cases.iter().find(|case| case.name == name).context("a golden values file");
    let mut pods = 0;
    for document in of("class")?.render()?.split("---\n") {
        let object: Value = serde_yaml::from_str(document)?;
        let (template, name) = match object["kind"].as_str() {
            Some("Deployment" | "Job") => (&object["spec"]["template"], &object["metadata"]["name"]),
            Some("Pod") => (&object, &object["metadata"]["name"]),
            _ => continue,
        };
        let mut spec = template["spec"].clone();
        // Nobody makes service accounts here.
        spec.as_object_mut().context("a pod's spec")?.remove("serviceAccountName");
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "spec": spec,
            "metadata": {"name": name, "namespace": "drover-system", "labels": template["metadata"]["labels"]}});
        dry_run(plane, &pod)?;
        pods += 1;
        // And the server would say no.
        for (field, value) in [
            ("allowPrivilegeEscalation", json!(true)),
            ("capabilities", Value::Null),
            ("runAsUser", json!(0)),
        ] {
            let mut worse = pod.clone();
            worse["spec"]["containers"][0]["securityContext"][field] = value;
            let refused = dry_run(plane, &worse).err().with_context(|| format!("it took {field}"))?;
            ensure!(format!("{refused:#}").contains("restricted"), "{refused:#}");
        }
    }
    ensure!(pods == 3, "{pods} pods: the operators', and two of hooks");
    for document in of("default")?.render()?.split("---\n") {
        let object: Value = serde_yaml::from_str(document)?;
        if object["kind"] == "Namespace" {
            let level = &object["metadata"]["labels"]["pod-security.kubernetes.io/enforce"];
            ensure!(level == "baseline", "{object}");
            return Ok(());
        }
    }
    anyhow::bail!("the chart makes no namespace for builders")
}

fn dry_run(plane: &ControlPlane, object: &Value) -> Result<()> {
    let mut kubectl = plane.kubectl_command();
    run::filter(kubectl.args(["create", "--dry-run=server", "-f", "-"]), object.to_string().as_bytes())
        .map(drop)
}

/// What kubeconform has against it; nothing if it is clean.
fn conform(schemas: &Path, rendered: &str) -> Result<String> {
    let file = schemas.join("rendered.yaml");
    std::fs::write(&file, rendered)?;
    let location = format!("{}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json", schemas.display());
    let mut kubeconform = Command::new(go::kubeconform()?);
    kubeconform.args(["-strict", "-skip", NOT_OURS, "-schema-location", &location]).arg(file);
    let out = run::output(&mut kubeconform)?;
    let said = [out.stdout, out.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    ensure!(out.status.success() == said.is_empty(), "{}: {said}", out.status);
    Ok(said)
}

/// A file a kind, called as kubeconform asks for it: `deployment-apps-v1.json`.
fn write_schemas(plane: &ControlPlane, dir: &Path) -> Result<()> {
    let mut openapi = Value::Null;
    run::wait_for("the server to publish Drover's schemas", std::time::Duration::from_secs(30), || {
        openapi = serde_json::from_str(&plane.kubectl(&["get", "--raw", "/openapi/v2"])?)?;
        let known = openapi["definitions"].as_object().context("definitions")?;
        Ok(["BuildRequest", "BuilderClass"].iter().all(|kind| known.keys().any(|name| name.ends_with(kind))))
    })?;
    let definitions = openapi["definitions"].as_object_mut().context("definitions")?;
    let mut written = 0;
    for (name, definition) in definitions.iter_mut() {
        strict(definition);
        if name.ends_with(".IntOrString") {
            *definition = json!({"type": ["integer", "string"]});
        } else if name.ends_with(".Quantity") {
            *definition = json!({"type": ["number", "string"]});
        }
    }
    for (name, definition) in definitions.iter() {
        for kind in definition["x-kubernetes-group-version-kind"].as_array().into_iter().flatten() {
            let word = |field: &str| kind[field].as_str().unwrap_or_default().to_lowercase();
            let group = word("group").split('.').next().unwrap_or_default().to_owned();
            let suffix = if group.is_empty() { String::new() } else { format!("-{group}") };
            let file = format!("{}{suffix}-{}.json", word("kind"), word("version"));
            let schema = json!({"$ref": format!("definitions.json#/definitions/{name}")});
            std::fs::write(dir.join(file), schema.to_string())?;
            written += 1;
        }
    }
    ensure!(written > 100, "{written} kinds");
    let all = json!({"definitions": Value::Object(std::mem::take(definitions))});
    std::fs::write(dir.join("definitions.json"), all.to_string())?;
    Ok(())
}

/// What is not in a schema is a mistake, as the server sees it too (`--validate=strict`).
fn strict(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            fields.values_mut().for_each(strict);
            let open = |fields: &Map<String, Value>| {
                fields.contains_key("additionalProperties")
                    || fields.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true))
            };
            if fields.get("properties").is_some_and(Value::is_object) && !open(fields) {
                fields.insert("additionalProperties".into(), false.into());
            }
            if fields.get("format").is_some_and(|format| format == "int-or-string") {
                fields.insert("type".into(), json!(["integer", "string"]));
            }
        }
        Value::Array(items) => items.iter_mut().for_each(strict),
        _ => {}
    }
}
