//! A control plane with Drover installed by its chart, but for the pods: nothing runs there. The operator runs in the
//! test's own process, with the rights of the chart's service account and no others.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drover_operator::clock::Clock;
use drover_operator::controller::{self, Parts};
use drover_operator::keys::Seed;
use drover_operator::metrics::Metrics;
use drover_operator::metrics::api::Count;
use drover_operator::seed;
use drover_operator::session::{Conversation, Ssh};
use drover_operator::settings::Settings;
use drover_tests::ControlPlane;
use drover_tests::audit::{self as invariants, Log, Rules};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::oneshot;
use xtask::audit;
use xtask::parts::go;
use xtask::run;

/// Where the chart's operator, its builders and the requests of tests are.
pub(crate) const SYSTEM: &str = "drover-system";
pub(crate) const BUILDERS: &str = "drover-builders";
pub(crate) const TEAM: &str = "team";
/// The chart's service account.
pub(crate) const OPERATOR: &str = "system:serviceaccount:drover-system:drover";
/// The longest that anything is waited for.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A control plane with the chart's objects in it, and what the operator needs beside.
pub(crate) struct World {
    pub(crate) plane: ControlPlane,
    /// Kubeconfig of the chart's service account.
    pub(crate) rights: PathBuf,
    /// What the chart renders to.
    pub(crate) chart: String,
    pub(crate) cache: TempDir,
    work: TempDir,
}

/// An operator that runs on a thread of its own.
pub(crate) struct Running {
    pub(crate) metrics: Arc<Metrics>,
    thread: JoinHandle<Result<()>>,
    stop: oneshot::Sender<()>,
}

impl World {
    pub(crate) fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// With these options of `helm template`.
    pub(crate) fn start_with(options: &[&str]) -> Result<Self> {
        let plane = ControlPlane::start()?;
        for namespace in [SYSTEM, TEAM] {
            plane.kubectl(&["create", "namespace", namespace])?;
        }
        let chart = template(options)?;
        plane.apply(&chart)?;
        plane.wait_established()?;
        let rights = plane.kubeconfig_for(OPERATOR, &["system:serviceaccounts", "system:authenticated"])?;
        Ok(Self { plane, rights, chart, cache: TempDir::new()?, work: TempDir::new()? })
    }

    /// Makes the class that requests get, with an empty cache.
    pub(crate) fn class(&self, name: &str) -> Result<()> {
        self.plane.apply(&format!(
            "{{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {{name: {name}}}, spec: {{default: true, \
             systems: [x86_64-linux], caches: [{{url: 'file://{}', push: true}}]}}}}",
            self.cache.path().display()
        ))?;
        Ok(())
    }

    /// Starts an operator as `main` does.
    pub(crate) fn operator(&self) -> Result<Running> {
        self.operator_with(Arc::new(Ssh))
    }

    /// Starts one that talks to these builders.
    pub(crate) fn operator_with(&self, conversation: Arc<dyn Conversation>) -> Result<Running> {
        let (stop, stopped) = oneshot::channel();
        let (rights, work_dir) = (self.rights.clone(), self.work.path().to_owned());
        let metrics = Arc::new(Metrics::new());
        let counted = metrics.clone();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            let result = runtime.block_on(operate(&rights, work_dir, counted, conversation, stopped));
            runtime.shutdown_background();
            result
        });
        Ok(Running { metrics, thread, stop })
    }

    /// What the operator asked the API server for, oldest first.
    pub(crate) fn audit(&self) -> Result<Vec<audit::Entry>> {
        Ok(self.plane.audit()?.into_iter().filter(|entry| entry.user == OPERATOR).collect())
    }

    /// Fails with whatever the audit log shows to be against the invariants of DESIGN.md.
    pub(crate) fn ensure_invariants(&self) -> Result<()> {
        let log = Log::parse(&std::fs::read_to_string(self.plane.audit_log())?);
        ensure!(
            !log.events.is_empty() && log.broken <= 1,
            "{} lines of the audit log are no events",
            log.broken
        );
        let broken = invariants::audit(&log.events, &Rules::new(SYSTEM, "drover", BUILDERS));
        let broken: Vec<String> = broken.iter().map(ToString::to_string).collect();
        ensure!(broken.is_empty(), "{}", broken.join("\n"));
        Ok(())
    }

    /// Applies a request of namespace `team`. Its derivation has its name; `more` goes on with the spec.
    pub(crate) fn request(&self, name: &str, more: &str, system: &str) -> Result<()> {
        self.plane.apply(&format!(
            "apiVersion: drover.build/v1alpha1
kind: BuildRequest
metadata: {{name: {name}, namespace: {TEAM}}}
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

    /// `kubectl patch` of the request's spec.
    pub(crate) fn change(&self, name: &str, spec: &str) -> Result<()> {
        let patch = format!("{{\"spec\": {spec}}}");
        self.plane.kubectl(&["patch", "breq", name, "-n", TEAM, "--type=merge", "-p", &patch])?;
        Ok(())
    }

    /// As a person waits who expects success (`True`) or failure (`False`).
    pub(crate) fn wait(&self, name: &str, succeeded: &str) -> Result<()> {
        let condition = format!("--for=condition=Succeeded={succeeded}");
        let waited = self.plane.kubectl(&["wait", "breq", name, "-n", TEAM, &condition, "--timeout=60s"]);
        waited.map(drop).with_context(|| format!("{:#}", self.get(name).unwrap_or_default()))
    }

    pub(crate) fn delete(&self, name: &str) -> Result<()> {
        self.plane.kubectl(&["delete", "breq", "-n", TEAM, name])?;
        Ok(())
    }

    pub(crate) fn get(&self, name: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.plane.kubectl(&["get", "breq", "-n", TEAM, name, "-o", "json"])?)?)
    }

    pub(crate) fn status(&self, name: &str) -> Result<Value> {
        Ok(self.get(name)?["status"].take())
    }

    pub(crate) fn version(&self, name: &str) -> Result<String> {
        Ok(self.get(name)?["metadata"]["resourceVersion"].as_str().context("no resourceVersion")?.to_owned())
    }

    pub(crate) fn pods(&self, request: &str) -> Result<Vec<Value>> {
        let uid = self.get(request)?["metadata"]["uid"].as_str().context("no uid")?.to_owned();
        let selector = format!("drover.build/request-uid={uid}");
        let pods = self.plane.kubectl(&["get", "pods", "-n", BUILDERS, "-l", &selector, "-o", "json"])?;
        let mut pods: Value = serde_json::from_str(&pods)?;
        Ok(pods["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// Waits for the pod of this attempt; its name.
    pub(crate) fn pod(&self, request: &str, attempt: u32) -> Result<String> {
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

    pub(crate) fn pod_uid(&self, pod: &str) -> Result<String> {
        self.plane.kubectl(&["get", "pod", "-n", BUILDERS, pod, "-o", "jsonpath={.metadata.uid}"])
    }

    pub(crate) fn pod_status(&self, pod: &str, status: &str) -> Result<()> {
        let patch = format!("{{\"status\": {status}}}");
        let args =
            ["patch", "pod", pod, "-n", BUILDERS, "--subresource=status", "--type=merge", "-p", &patch];
        self.plane.kubectl(&args)?;
        Ok(())
    }

    /// A pod that has no node is gone as soon as it is deleted.
    pub(crate) fn wait_gone(&self, pod: &str) -> Result<()> {
        run::wait_for(&format!("pod {pod} to be gone"), LIMIT, || {
            Ok(self
                .plane
                .kubectl(&["get", "pod", "-n", BUILDERS, pod, "--ignore-not-found", "-o", "name"])?
                .is_empty())
        })
    }

    /// Waits until no builder's pod is there.
    pub(crate) fn no_pods(&self) -> Result<()> {
        let mut left = String::new();
        run::wait_for("builders' pods to go", LIMIT, || {
            left = self.plane.kubectl(&["get", "pods", "-n", BUILDERS, "-o", "name"])?;
            Ok(left.is_empty())
        })
        .with_context(|| left)
    }

    pub(crate) fn wait_reason(&self, request: &str, reason: &str) -> Result<()> {
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
    /// How often it has looked at a request.
    pub(crate) fn looks(&self) -> Result<u64> {
        let page = self.metrics.render();
        let count =
            page.lines().find_map(|line| line.strip_prefix("drover_reconcile_duration_seconds_count "));
        count.context("it counts them")?.parse().context("a number")
    }

    /// Stops it as SIGTERM would, and says how it ended.
    pub(crate) fn stop(self) -> Result<()> {
        let _ = self.stop.send(());
        self.thread.join().map_err(|_| anyhow::anyhow!("the operator panicked"))?
    }
}

async fn operate(
    kubeconfig: &Path,
    work_dir: PathBuf,
    metrics: Arc<Metrics>,
    conversation: Arc<dyn Conversation>,
    stopped: oneshot::Receiver<()>,
) -> Result<()> {
    let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
    let counted = Count(metrics.clone());
    let client = kube::client::ClientBuilder::try_from(config)?.with_layer(&counted).build();
    let seed: Seed = seed::from_secret(&client, SYSTEM, "drover-seed").await?;
    let settings = Settings {
        namespace: SYSTEM.into(),
        builder_namespace: BUILDERS.into(),
        builder_image: "drover.test/none:1".into(),
        builder_pull_policy: "Never".into(),
        builder_pull_secrets: vec![],
        max_sessions: 1024,
        pod_deadline_seconds: 3600,
        work_dir,
        concurrency: 4,
        timeouts: Default::default(),
        scope: Default::default(),
    };
    let shutdown = async {
        let _ = stopped.await;
    };
    let parts = Parts {
        client,
        settings,
        seed,
        metrics,
        health: Arc::default(),
        clock: Clock::system(),
        conversation,
        tracer: Default::default(),
    };
    controller::run(parts, shutdown).await;
    Ok(())
}

/// What the chart renders to with these options of `helm template`.
pub(crate) fn template(options: &[&str]) -> Result<String> {
    run::stdout(
        std::process::Command::new(go::helm()?)
            .args(["template", "drover", "--no-hooks", "--namespace", SYSTEM])
            .arg(xtask::checkout().join("charts/drover"))
            .args(options),
    )
}

/// Status and reason of a condition.
pub(crate) fn condition<'a>(status: &'a Value, type_: &str) -> Option<(&'a str, &'a str)> {
    let all = status["conditions"].as_array()?;
    let condition = all.iter().find(|condition| condition["type"] == type_)?;
    Some((condition["status"].as_str()?, condition["reason"].as_str()?))
}
