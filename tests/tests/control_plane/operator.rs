//! The operator against a real API server, with the rights that the chart gives it and no more. There is no kubelet and
//! no scheduler: this test plays their parts where a build needs them, by writing the status of pods.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drover_operator::controller::{self, Parts};
use drover_operator::keys::Seed;
use drover_operator::metrics::Metrics;
use drover_operator::seed;
use drover_operator::session::Ssh;
use drover_operator::settings::Settings;
use drover_tests::ControlPlane;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::oneshot;
use xtask::parts::go;
use xtask::run;

const LIMIT: Duration = Duration::from_secs(60);
const BUILDERS: &str = "drover-builders";

/// One control plane for all: it takes seconds to start. The parts use requests of their own.
#[test]
fn requests_become_pods() -> Result<()> {
    let world = World::start()?;
    let operator = world.operator()?;
    without_a_class_a_request_waits(&world)?;
    a_pod_is_made_and_its_loss_is_an_attempt(&world)?;
    cancelling_ends_it(&world)?;
    what_cannot_be_built_is_said(&world)?;
    deleting_a_request_deletes_its_pod(&world)?;
    operator.stop()?;
    a_restart_finds_its_pods(&world)?;
    the_rights_are_in_the_builder_namespace_only(&world)
}

fn without_a_class_a_request_waits(world: &World) -> Result<()> {
    world.request("first", "", "x86_64-linux")?;
    world.wait_reason("first", "WaitingForClass")?;
    world.plane.apply(&format!(
        "{{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {{name: small}}, spec: {{default: true, \
         systems: [x86_64-linux], caches: [{{url: 'file://{}', push: true}}]}}}}",
        world.cache.path().display()
    ))?;
    // The class's watch wakes the request.
    world.pod("first", 1)?;
    world.delete("first")
}

fn a_pod_is_made_and_its_loss_is_an_attempt(world: &World) -> Result<()> {
    world.request("lost", "", "x86_64-linux")?;
    let pod = world.pod("lost", 1)?;
    let status = world.status("lost")?;
    ensure!(condition(&status, "Accepted") == Some(("True", "Accepted")), "{status}");
    ensure!(condition(&status, "Succeeded").is_some_and(|c| c.0 == "Unknown"), "{status}");
    ensure!(condition(&status, "Reconciling").is_some_and(|c| c.0 == "True"), "{status}");
    ensure!(status["class"] == "small" && status["attempt"] == 1, "{status}");
    ensure!(status["observedGeneration"] == 1, "{status}");

    // What the scheduler would say, and after it the kubelet.
    world.pod_status(&pod, r#"{"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}]}"#)?;
    world.wait_reason("lost", "WaitingForNode")?;
    world.pod_status(&pod, r#"{"phase": "Failed", "reason": "Evicted", "message": "low on memory"}"#)?;
    let second = world.pod("lost", 2)?;
    world.wait_gone(&pod)?;
    let status = world.status("lost")?;
    let first = &status["attempts"][0];
    ensure!(first["reason"] == "Evicted" && first["infrastructure"] == true, "{status}");
    ensure!(first["message"].as_str().is_some_and(|m| m.contains("low on memory")), "{status}");
    ensure!(status["attempts"].as_array().is_some_and(|all| all.len() == 2), "{status}");

    // Somebody deletes the pod, after the status has named it.
    world.wait_reason("lost", "WaitingForNode")?;
    world.plane.kubectl(&["delete", "pod", "-n", BUILDERS, &second, "--grace-period=0", "--force"])?;
    world.pod("lost", 3)?;
    world.delete("lost")
}

fn cancelling_ends_it(world: &World) -> Result<()> {
    world.request("unwanted", "", "x86_64-linux")?;
    let pod = world.pod("unwanted", 1)?;
    let patch = r#"{"spec": {"cancel": true}}"#;
    world.plane.kubectl(&["patch", "breq", "unwanted", "-n", "team", "--type=merge", "-p", patch])?;
    world.plane.kubectl(&[
        "wait",
        "breq",
        "unwanted",
        "-n",
        "team",
        "--for=condition=Succeeded=False",
        "--timeout=60s",
    ])?;
    world.wait_gone(&pod)?;
    let status = world.status("unwanted")?;
    ensure!(status["failure"]["reason"] == "Cancelled" && status["phase"] == "Failed", "{status}");
    ensure!(condition(&status, "Stalled").is_some_and(|c| c.0 == "True"), "{status}");
    // A settled request is left alone.
    let version = world.version("unwanted")?;
    world.plane.kubectl(&["annotate", "breq", "unwanted", "-n", "team", "touched=yes"])?;
    let touched = world.version("unwanted")?;
    ensure!(version != touched);
    world.request("after", "", "x86_64-linux")?;
    world.pod("after", 1)?;
    ensure!(world.version("unwanted")? == touched, "the operator wrote a request that was settled");
    world.delete("after")
}

fn what_cannot_be_built_is_said(world: &World) -> Result<()> {
    world.request("alien", "", "sparc-solaris")?;
    world.plane.kubectl(&[
        "wait",
        "breq",
        "alien",
        "-n",
        "team",
        "--for=condition=Succeeded=False",
        "--timeout=60s",
    ])?;
    let status = world.status("alien")?;
    ensure!(status["failure"]["reason"] == "WrongSystem", "{status}");
    ensure!(status["failure"]["message"].as_str().is_some_and(|m| m.contains("sparc-solaris")), "{status}");
    ensure!(status["attempts"].is_null(), "{status}");
    ensure!(world.pods("alien")?.is_empty());
    Ok(())
}

fn deleting_a_request_deletes_its_pod(world: &World) -> Result<()> {
    world.request("gone", "", "x86_64-linux")?;
    let pod = world.pod("gone", 1)?;
    // Nothing holds the request back: no finalizer.
    world.plane.kubectl(&["delete", "breq", "gone", "-n", "team", "--timeout=10s"])?;
    world.wait_gone(&pod)
}

/// A request that was made and one that went while no operator ran.
fn a_restart_finds_its_pods(world: &World) -> Result<()> {
    let operator = world.operator()?;
    world.request("stays", "", "x86_64-linux")?;
    world.request("goes", "", "x86_64-linux")?;
    let (stays, goes) = (world.pod("stays", 1)?, world.pod("goes", 1)?);
    operator.stop()?;
    world.plane.kubectl(&["delete", "breq", "goes", "-n", "team"])?;
    world.request("waits", "", "x86_64-linux")?;
    let uid = world.pod_uid(&stays)?;
    let operator = world.operator()?;
    world.pod("waits", 1)?;
    world.wait_gone(&goes)?;
    ensure!(world.pod_uid(&stays)? == uid, "the pod that ran was replaced");
    ensure!(world.status("stays")?["attempt"] == 1);
    operator.stop()
}

fn the_rights_are_in_the_builder_namespace_only(world: &World) -> Result<()> {
    let can = |verb: &str, what: &str, namespace: &str| -> Result<bool> {
        // kubectl would take what is behind a slash for a name.
        let (what, subresource) = what.split_once('/').unwrap_or((what, ""));
        let subresource = format!("--subresource={subresource}");
        let output = run::output(world.plane.kubectl_command().env("KUBECONFIG", &world.rights).args([
            "auth",
            "can-i",
            verb,
            what,
            &subresource,
            "-n",
            namespace,
        ]))?;
        Ok(output.stdout.starts_with(b"yes"))
    };
    for (verb, what, namespace, expected) in [
        ("create", "pods", BUILDERS, true),
        ("get", "pods/log", BUILDERS, true),
        ("create", "pods", "team", false),
        ("get", "pods", "team", false),
        ("create", "pods/exec", BUILDERS, false),
        ("get", "secrets", "drover-system", true),
        ("list", "secrets", "drover-system", false),
        ("get", "secrets", BUILDERS, false),
        ("get", "secrets", "team", false),
        ("patch", "buildrequests.drover.build", "team", false),
        ("patch", "buildrequests.drover.build/status", "team", true),
        ("patch", "builderclasses.drover.build", "team", false),
    ] {
        ensure!(can(verb, what, namespace)? == expected, "{verb} {what} in {namespace}");
    }
    // No Secret but the seed was made.
    let secrets =
        world.plane.kubectl(&["get", "secrets", "-A", "-o", "jsonpath={.items[*].metadata.name}"])?;
    ensure!(secrets == "drover-seed", "{secrets}");
    Ok(())
}

/// A control plane with the chart's objects in it, and what the operator needs beside.
struct World {
    plane: ControlPlane,
    /// Kubeconfig of the chart's service account.
    rights: PathBuf,
    cache: TempDir,
    work: TempDir,
}

/// An operator that runs on a thread of its own.
struct Running {
    thread: JoinHandle<Result<()>>,
    stop: oneshot::Sender<()>,
}

impl World {
    fn start() -> Result<Self> {
        let plane = ControlPlane::start()?;
        for namespace in ["drover-system", "team"] {
            plane.kubectl(&["create", "namespace", namespace])?;
        }
        let chart = xtask::checkout().join("charts/drover");
        for crd in ["builderclasses", "buildrequests"] {
            let file = chart.join(format!("crds/{crd}.yaml"));
            plane.kubectl(&["apply", "--server-side", "-f", &file.to_string_lossy()])?;
        }
        plane.wait_established()?;
        plane.apply(&run::stdout(
            std::process::Command::new(go::helm()?)
                .args(["template", "drover", "--namespace", "drover-system"])
                .arg(&chart),
        )?)?;
        let user = "system:serviceaccount:drover-system:drover";
        let rights = plane.kubeconfig_for(user, &["system:serviceaccounts", "system:authenticated"])?;
        Ok(Self { plane, rights, cache: TempDir::new()?, work: TempDir::new()? })
    }

    /// Starts an operator as `main` does.
    fn operator(&self) -> Result<Running> {
        let (stop, stopped) = oneshot::channel();
        let (rights, work_dir) = (self.rights.clone(), self.work.path().to_owned());
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            let result = runtime.block_on(operate(&rights, work_dir, stopped));
            runtime.shutdown_background();
            result
        });
        Ok(Running { thread, stop })
    }

    fn request(&self, name: &str, more: &str, system: &str) -> Result<()> {
        self.plane.apply(&format!(
            "apiVersion: drover.build/v1alpha1
kind: BuildRequest
metadata: {{name: {name}, namespace: team}}
spec:
  derivation:
    name: {name}
    system: {system}
    builder: /bin/sh
    args: [-c, 'echo hello > $out']
    outputs: {{out: {{}}}}
{more}"
        ))?;
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.plane.kubectl(&["delete", "breq", "-n", "team", name])?;
        Ok(())
    }

    fn get(&self, name: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.plane.kubectl(&["get", "breq", "-n", "team", name, "-o", "json"])?)?)
    }

    fn status(&self, name: &str) -> Result<Value> {
        Ok(self.get(name)?["status"].take())
    }

    fn version(&self, name: &str) -> Result<String> {
        Ok(self.get(name)?["metadata"]["resourceVersion"].as_str().context("no resourceVersion")?.to_owned())
    }

    fn pods(&self, request: &str) -> Result<Vec<Value>> {
        let uid = self.get(request)?["metadata"]["uid"].as_str().context("no uid")?.to_owned();
        let selector = format!("drover.build/request-uid={uid}");
        let pods = self.plane.kubectl(&["get", "pods", "-n", BUILDERS, "-l", &selector, "-o", "json"])?;
        let mut pods: Value = serde_json::from_str(&pods)?;
        Ok(pods["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// Waits for the pod of this attempt; its name.
    fn pod(&self, request: &str, attempt: u32) -> Result<String> {
        let mut name = String::new();
        let what = format!("the pod of attempt {attempt} of {request}");
        run::wait_for(&what, LIMIT, || {
            let pods = self.pods(request)?;
            let attempt = attempt.to_string();
            let found = pods.iter().find(|pod| pod["metadata"]["labels"]["drover.build/attempt"] == attempt);
            name = found.and_then(|pod| pod["metadata"]["name"].as_str()).unwrap_or_default().to_owned();
            Ok(found.is_some())
        })?;
        Ok(name)
    }

    fn pod_uid(&self, pod: &str) -> Result<String> {
        self.plane.kubectl(&["get", "pod", "-n", BUILDERS, pod, "-o", "jsonpath={.metadata.uid}"])
    }

    fn pod_status(&self, pod: &str, status: &str) -> Result<()> {
        let patch = format!("{{\"status\": {status}}}");
        let args =
            ["patch", "pod", pod, "-n", BUILDERS, "--subresource=status", "--type=merge", "-p", &patch];
        self.plane.kubectl(&args)?;
        Ok(())
    }

    /// A pod that has no node is gone as soon as it is deleted.
    fn wait_gone(&self, pod: &str) -> Result<()> {
        run::wait_for(&format!("pod {pod} to be gone"), LIMIT, || {
            Ok(self
                .plane
                .kubectl(&["get", "pod", "-n", BUILDERS, pod, "--ignore-not-found", "-o", "name"])?
                .is_empty())
        })
    }

    fn wait_reason(&self, request: &str, reason: &str) -> Result<()> {
        let mut last = String::new();
        let waited = run::wait_for(&format!("{request} to say {reason}"), LIMIT, || {
            let status = self.status(request)?;
            last = status.to_string();
            Ok(condition(&status, "Succeeded").is_some_and(|condition| condition.1 == reason))
        });
        waited.with_context(|| last)
    }
}

impl Running {
    /// Stops it as SIGTERM would, and says how it ended.
    fn stop(self) -> Result<()> {
        let _ = self.stop.send(());
        self.thread.join().map_err(|_| anyhow::anyhow!("the operator panicked"))?
    }
}

async fn operate(kubeconfig: &Path, work_dir: PathBuf, stopped: oneshot::Receiver<()>) -> Result<()> {
    let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
    let client = kube::Client::try_from(config)?;
    let seed: Seed = seed::from_secret(&client, "drover-system", "drover-seed").await?;
    let settings = Settings {
        namespace: "drover-system".into(),
        builder_namespace: BUILDERS.into(),
        builder_image: "drover.test/none:1".into(),
        builder_pull_policy: "Never".into(),
        builder_pull_secrets: vec![],
        pod_deadline_seconds: 3600,
        work_dir,
        concurrency: 4,
        timeouts: Default::default(),
    };
    let shutdown = async {
        let _ = stopped.await;
    };
    let parts =
        Parts { client, settings, seed, metrics: Arc::new(Metrics::new()), conversation: Arc::new(Ssh) };
    controller::run(parts, shutdown).await;
    Ok(())
}

/// Status and reason of a condition.
fn condition<'a>(status: &'a Value, type_: &str) -> Option<(&'a str, &'a str)> {
    let all = status["conditions"].as_array()?;
    let condition = all.iter().find(|condition| condition["type"] == type_)?;
    Some((condition["status"].as_str()?, condition["reason"].as_str()?))
}
