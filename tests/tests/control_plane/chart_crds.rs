//! The chart's definitions: they are part of a release, Helm 4 takes them over from charts that had them elsewhere, and what
//! was stored under an older version of them is as it was.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use drover_tests::ControlPlane;
use serde_json::{Value, json};
use xtask::parts::go;
use xtask::{checkout, run};

const NAMESPACE: &str = "drover-system";
const DEFINITIONS: [&str; 2] = ["builderclasses.drover.build", "buildrequests.drover.build"];
/// etcd takes 1.5 MiB, and kubectl's client-side apply a copy in an annotation, all of which may have 256 KiB
/// (Kubernetes: apimachinery/pkg/api/validation/objectmeta.go, TotalAnnotationSizeLimitB).
const MOST: usize = 256 << 10;

/// A release with definitions and a class; what uninstalling leaves; and that the next installation takes up what it finds.
#[test]
fn definitions_and_class_come_and_stay_or_go() -> Result<()> {
    for file in std::fs::read_dir(checkout().join("crds"))? {
        let file = file?;
        let size = file.metadata()?.len();
        ensure!(size < MOST as u64, "{} has {size} bytes", file.path().display());
    }
    let plane = ControlPlane::start()?;
    let class = ["--set", "class.create=true"];
    install(&plane, &[])?;
    plane.wait_established()?;
    // Made by the first installation, on a cluster with nodes: a class that waited for its definition, and names its release.
    let rendered = template(&class)?;
    let documents =
        rendered.split("---\n").filter(|document| document.contains("kind: BuilderClass\nmetadata"));
    let hook = documents.last().context("a class")?;
    ensure!(hook.contains("helm.sh/hook: post-install"), "{hook}");
    run::filter(
        plane.kubectl_command().args(["apply", "--server-side", "--field-manager=helm", "-f", "-"]),
        hook.as_bytes(),
    )?;
    // An upgrade takes it into the release, and it follows.
    upgrade(&plane, &[&class[..], &["--set", "class.spec.systems={i686-linux}"]].concat())?;
    let systems = plane.kubectl(&["get", "bclass", "default", "-o", "jsonpath={.spec.systems[*]}"])?;
    ensure!(systems == "i686-linux", "{systems}");
    let hook = plane.kubectl(&["get", "bclass", "default", "-o", "jsonpath={.metadata.annotations}"])?;
    ensure!(!hook.contains("helm.sh/hook"), "{hook}");

    plane.apply(&request("stays", &json!({"derivation": derivation()})).to_string())?;
    let said = uninstall(&plane)?;
    for kept in DEFINITIONS.iter().chain(&["default"]) {
        ensure!(said.contains(kept), "Helm names what stays: {said}");
    }
    plane.kubectl(&["get", "buildrequest/stays", "builderclass/default"])?;

    // Nobody is there who would end the builders' namespace.
    let other = ["--set", "crds.keep=false", "--set", "builder.namespace=other"];
    install(&plane, &[&class[..], &other].concat())?;
    let said = uninstall(&plane)?;
    ensure!(!said.contains("default"), "{said}");
    run::wait_for("the definitions to go", std::time::Duration::from_secs(30), || {
        Ok(plane.kubectl(&["get", "crd", "-o", "name"])?.is_empty())
    })
}

/// The chart before 0.2 had its definitions in `crds/`, which Helm makes once and knows nothing of afterwards.
#[test]
fn objects_of_the_last_version_survive_the_next() -> Result<()> {
    let plane = ControlPlane::start()?;
    let old = checkout().join("tests/fixtures/chart-0.1.0");
    let class = ["--set", "class.create=true"];
    run::stdout(helm(&plane, "install", &old).args(class))?;
    let mut objects = Vec::new();
    for (name, spec) in shapes() {
        plane.apply(&request(name, &spec).to_string())?;
        objects.push(format!("buildrequest/{name}"));
    }
    let status = json!({"status": {
        "attempt": 2, "duration": "1m32s", "phase": "Failed", "observedGeneration": 1,
        "failure": {"reason": "BuildFailed", "message": "exit code 7", "logTail": ["one", "two"]},
        "builder": {"pod": "ended-1", "node": "n1"},
        "conditions": [{"type": "Succeeded", "status": "False", "reason": "BuildFailed", "message": "exit code 7",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}],
    }});
    patch_status(&plane, "ended", &status)?;
    plane.apply(&full_class().to_string())?;
    objects.extend(["builderclass/full".to_owned(), "builderclass/default".to_owned()]);
    let before = read(&plane, &objects)?;

    // Said in so many words, and nothing has been touched.
    let chart = checkout().join(xtask::chart::CHART);
    let refused = run::output(helm(&plane, "upgrade", &chart).args(class))?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success(), "Helm took over what another made");
    for part in [DEFINITIONS[0], "invalid ownership metadata", "meta.helm.sh/release-name"] {
        ensure!(said.contains(part), "{part:?} is not in: {said}");
    }
    ensure!(read(&plane, &objects)? == before, "a refused upgrade changed something");

    run::stdout(helm(&plane, "upgrade", &chart).args(class).arg("--take-ownership"))?;
    plane.wait_established()?;
    for definition in DEFINITIONS {
        let crd: Value = serde_json::from_str(&plane.kubectl(&["get", "crd", definition, "-o", "json"])?)?;
        ensure!(crd["metadata"]["labels"]["helm.sh/chart"] == "drover-0.2.0", "{}", crd["metadata"]);
        // What etcd has is of a version that is served.
        ensure!(crd["status"]["storedVersions"] == json!(["v1alpha1"]), "{}", crd["status"]);
    }
    let after = read(&plane, &objects)?;
    for (was, is) in before.iter().zip(&after) {
        ensure!(contains(&is["spec"], &was["spec"]), "lost: {was:#}\nis now {is:#}");
        ensure!(contains(&is["status"], &was["status"]), "lost: {was:#}\nis now {is:#}");
        ensure!(was["metadata"]["uid"] == is["metadata"]["uid"]);
    }
    // Written again under the new schema: by a user, and by who keeps the status.
    for (name, spec) in shapes() {
        plane.apply(&request(name, &spec).to_string())?;
        plane.kubectl(&["annotate", "buildrequest", name, "touched=yes"])?;
    }
    plane.kubectl(&["patch", "breq", "small", "--type=merge", "-p", r#"{"spec": {"cancel": true}}"#])?;
    patch_status(&plane, "large", &json!({"status": {"phase": "Running", "observedGeneration": 1}}))?;
    plane.apply(&full_class().to_string())?;
    // And as the operator reads them.
    for object in &read(&plane, &objects)? {
        if object["kind"] == "BuildRequest" {
            serde_json::from_value::<drover_api::BuildRequest>(object.clone())
                .with_context(|| format!("{object:#}"))?;
        } else {
            serde_json::from_value::<drover_api::BuilderClass>(object.clone())
                .with_context(|| format!("{object:#}"))?;
        }
    }
    // From here on it is an upgrade as any other.
    upgrade(&plane, &class)
}

fn helm(plane: &ControlPlane, act: &str, chart: &std::path::Path) -> Command {
    // The parts are there: the control plane was made of them.
    let mut helm = Command::new(go::helm().unwrap_or_else(|_| "helm".into()));
    helm.env("KUBECONFIG", plane.kubeconfig()).args([act, "drover"]).arg(chart);
    helm.args([
        "--namespace",
        NAMESPACE,
        if act == "install" { "--create-namespace" } else { "--timeout=60s" },
    ]);
    helm
}

fn install(plane: &ControlPlane, options: &[&str]) -> Result<()> {
    run::stdout(helm(plane, "install", &checkout().join(xtask::chart::CHART)).args(options)).map(drop)
}

fn template(options: &[&str]) -> Result<String> {
    let mut helm = Command::new(go::helm()?);
    helm.args(["template", "drover"]).arg(checkout().join(xtask::chart::CHART));
    run::stdout(helm.args(["--namespace", NAMESPACE]).args(options))
}

fn upgrade(plane: &ControlPlane, options: &[&str]) -> Result<()> {
    run::stdout(helm(plane, "upgrade", &checkout().join(xtask::chart::CHART)).args(options)).map(drop)
}

/// What Helm says to it. Without a wait: no controller is there that would end namespaces.
fn uninstall(plane: &ControlPlane) -> Result<String> {
    let mut helm = Command::new(go::helm()?);
    helm.env("KUBECONFIG", plane.kubeconfig()).args(["uninstall", "drover", "--namespace", NAMESPACE]);
    run::stdout(&mut helm)
}

fn derivation() -> Value {
    json!({"name": "a", "system": "x86_64-linux", "builder": "/bin/sh", "outputs": {"out": {}}})
}

fn request(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest",
        "metadata": {"name": name, "namespace": "default"}, "spec": spec,
    })
}

/// Requests with as little and as much in them as the last version takes.
fn shapes() -> [(&'static str, Value); 4] {
    let path = "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-source";
    let large = json!({
        "class": "full",
        "derivation": {
            "name": "large", "system": "x86_64-linux", "builder": "/bin/sh", "args": ["-c", "true"],
            "env": {"__json": "{\"a\": 1}", "empty": ""}, "inputSrcs": [path],
            "outputs": {
                "out": {"hashAlgo": "sha256", "method": "nar"}, "dev": {"hashAlgo": "sha256", "method": "nar"},
            },
        },
        "drvPath": "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-large.drv",
        "timeoutSeconds": 60, "maxSilentSeconds": 30, "maxLogBytes": 1000, "maxOutputBytes": 100_000,
        "retries": {"infrastructure": 1, "build": 2}, "priority": 7, "suspend": true,
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
        "ttlSecondsAfterSucceeded": 60, "ttlSecondsAfterFailed": 600, "verify": {"builders": 2},
    });
    [
        ("small", json!({"derivation": derivation()})),
        ("named", json!({"drvPath": "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a.drv"})),
        ("large", large),
        ("ended", json!({"derivation": derivation(), "cancel": true})),
    ]
}

fn full_class() -> Value {
    json!({
        "apiVersion": "drover.build/v1alpha1", "kind": "BuilderClass", "metadata": {"name": "full"},
        "spec": {
            "systems": ["x86_64-linux", "i686-linux"], "features": ["kvm"],
            "featureScheduling": {"kvm": {"nodeSelector": {"kvm": "yes"}}},
            "template": {"spec": {
                "nodeSelector": {"disk": "ssd"}, "tolerations": [{"key": "builders", "operator": "Exists"}],
            }},
            "resources": {"default": {"requests": {"cpu": "1"}}, "maximum": {"cpu": "8"}},
            "allowedNamespaces": {"names": ["default"]}, "trust": "Claimed",
            "caches": [{"url": "http://cache.example", "push": true}],
            "concurrency": {"total": 10, "perNamespace": 5},
        },
    })
}

fn patch_status(plane: &ControlPlane, name: &str, status: &Value) -> Result<()> {
    let status = status.to_string();
    let args = ["patch", "breq", name, "--subresource=status", "--type=merge", "--patch", &status];
    plane.kubectl(&args).map(drop)
}

fn read(plane: &ControlPlane, objects: &[String]) -> Result<Vec<Value>> {
    let read = |object: &String| Ok(serde_json::from_str(&plane.kubectl(&["get", object, "-o", "json"])?)?);
    objects.iter().map(read).collect()
}

/// Whether all of `less` is in `more`; a newer version may add defaults.
fn contains(more: &Value, less: &Value) -> bool {
    match (more, less) {
        (Value::Object(more), Value::Object(less)) => {
            less.iter().all(|(key, value)| more.get(key).is_some_and(|more| contains(more, value)))
        }
        (Value::Array(more), Value::Array(less)) => {
            more.len() == less.len() && more.iter().zip(less).all(|(more, less)| contains(more, less))
        }
        _ => more == less,
    }
}
