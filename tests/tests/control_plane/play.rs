//! What is not there: a scheduler and a kubelet ([`Node`]), and builders ([`Builders`]). Both do what a test tells them,
//! request by request, and never fail by themselves.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use drover_api::{OutputStatus, Reason, Timings, Transfer};
use drover_operator::session::{Assignment, Conversation, Progress};
use drover_operator::world::{SessionEnd, Stage};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::sync::watch;

use crate::world::{BUILDERS, World};

/// Between two looks at the pods.
const LOOK: Duration = Duration::from_millis(100);
/// For an answer of the API server.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the builder of a request does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Build {
    /// Comes so far and waits for another order.
    Until(Stage),
    /// One stage after the other, each for so long, and the outputs.
    Succeeds(Duration),
    /// Its program ends with an exit code other than 0.
    Fails,
}

/// Builders, whatever pods they are in. A request without an order gets its outputs at once.
#[derive(Clone, Default)]
pub(crate) struct Builders(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// By the request's name.
    orders: watch::Sender<HashMap<String, Build>>,
    /// Names of requests with a session, as often as they have one.
    sessions: Mutex<Vec<String>>,
}

/// One node that takes every pod and runs it, on a thread of its own, until this is dropped.
pub(crate) struct Node {
    full: Arc<Mutex<HashSet<String>>>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Builders {
    /// From now on, and for a build that runs as well.
    pub(crate) fn order(&self, request: &str, build: Build) {
        self.0.orders.send_modify(|orders| {
            orders.insert(request.to_owned(), build);
        });
    }

    /// Names of requests that have a session now.
    pub(crate) fn sessions(&self) -> Vec<String> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.0.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Conversation for Builders {
    fn hold(
        &self,
        assignment: Assignment,
        progress: Arc<Progress>,
        mut stopped: watch::Receiver<bool>,
    ) -> Pin<Box<dyn Future<Output = SessionEnd> + Send>> {
        let name = assignment.request.name;
        self.lock().push(name.clone());
        let session = Session { of: self.clone(), name };
        Box::pin(async move {
            tokio::select! {
                end = session.run(&progress) => end,
                _ = stopped.changed() => failed(Reason::InfrastructureFailure, "the operator gave this session up"),
            }
        })
    }
}

/// One session; its name is taken off the list when it ends, however that is.
struct Session {
    of: Builders,
    name: String,
}

impl Session {
    async fn run(&self, progress: &Progress) -> SessionEnd {
        const STAGES: [Stage; 6] = [
            Stage::Ready,
            Stage::CopyingInputs,
            Stage::InputsCopied,
            Stage::Building,
            Stage::Built,
            Stage::Collecting,
        ];
        let mut orders = self.of.0.orders.subscribe();
        loop {
            let order = orders.borrow_and_update().get(&self.name).copied();
            match order.unwrap_or(Build::Succeeds(Duration::ZERO)) {
                Build::Until(last) => {
                    STAGES.into_iter().filter(|stage| *stage <= last).for_each(|stage| progress.reach(stage));
                    // The sender lives as long as this session does.
                    let _ = orders.changed().await;
                }
                Build::Succeeds(pause) => {
                    for stage in STAGES {
                        progress.reach(stage);
                        tokio::time::sleep(pause).await;
                    }
                    return SessionEnd::Finished {
                        outputs: outputs(&self.name),
                        transfer: Transfer::default(),
                        timings: Timings::default(),
                    };
                }
                Build::Fails => {
                    progress.reach(Stage::Building);
                    return SessionEnd::Failed {
                        reason: Reason::BuildFailed,
                        message: "the builder failed with exit code 7".into(),
                        infrastructure: false,
                    };
                }
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut sessions = self.of.lock();
        if let Some(at) = sessions.iter().position(|name| *name == self.name) {
            sessions.swap_remove(at);
        }
    }
}

fn failed(reason: Reason, message: &str) -> SessionEnd {
    SessionEnd::Failed { reason, message: message.into(), infrastructure: reason.is_infrastructure() }
}

fn outputs(name: &str) -> BTreeMap<String, OutputStatus> {
    let output = OutputStatus {
        path: format!("/nix/store/{}-{name}", "0".repeat(32)),
        nar_hash: format!("sha256:{}", "0".repeat(52)),
        nar_size: 120,
        ..OutputStatus::default()
    };
    BTreeMap::from([("out".into(), output)])
}

impl Node {
    pub(crate) fn start(world: &World) -> Result<Self> {
        let kubeconfig = kube::config::Kubeconfig::read_from(world.plane.kubeconfig())?;
        let full = Arc::new(Mutex::new(HashSet::new()));
        let ends = Arc::new(AtomicBool::new(false));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let pods: Api<Pod> = runtime.block_on(async {
            let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
            anyhow::Ok(Api::namespaced(kube::Client::try_from(config)?, BUILDERS))
        })?;
        let (is_full, has_ended) = (full.clone(), ends.clone());
        let thread = std::thread::spawn(move || {
            let everything = ListParams::default();
            runtime.block_on(async {
                while !has_ended.load(Ordering::Relaxed) {
                    // The API server may be away: what did not happen happens at the next look.
                    let looked = tokio::time::timeout(PATIENCE, pods.list(&everything));
                    for pod in looked.await.into_iter().flatten().flatten() {
                        let full = is_full.lock().unwrap_or_else(PoisonError::into_inner).clone();
                        if let Ok(Err(error)) = tokio::time::timeout(PATIENCE, tend(&pods, &pod, &full)).await
                        {
                            eprintln!("node: {}: {error}", pod.name_any());
                        }
                    }
                    tokio::time::sleep(LOOK).await;
                }
            });
        });
        Ok(Self { full, ends, thread: Some(thread) })
    }

    /// There is no room for pods of this request.
    pub(crate) fn refuse(&self, request: &str) {
        self.full.lock().unwrap_or_else(PoisonError::into_inner).insert(request.to_owned());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What a panic there said is on standard error.
            let _ = thread.join();
        }
    }
}

/// One step of what scheduler and kubelet do for a pod.
async fn tend(pods: &Api<Pod>, pod: &Pod, full: &HashSet<String>) -> kube::Result<()> {
    let name = pod.name_any();
    let status = pod.status.clone().unwrap_or_default();
    let has_node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    if pod.metadata.deletion_timestamp.is_some() {
        pods.delete(&name, &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() })
            .await?;
        return Ok(());
    }
    let request = pod.annotations().get("drover.build/request").and_then(|at| at.split('/').nth(1));
    let patch = if has_node && status.phase.as_deref() == Some("Pending") {
        json!({"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}], "containerStatuses": [{
            "name": "builder", "image": "drover.test/none:1", "imageID": "drover.test/none@sha256:0",
            "ready": true, "started": true, "restartCount": 0, "state": {"running": {}},
        }]})
    } else if has_node || status.conditions.is_some() {
        return Ok(());
    } else if full.contains(request.unwrap_or_default()) {
        json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/1 nodes are available: 1 Insufficient cpu."}]})
    } else {
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name, "namespace": BUILDERS},
            "target": {"apiVersion": "v1", "kind": "Node", "name": "node-1"},
        });
        let _: serde_json::Value =
            pods.create_subresource("binding", &name, &PostParams::default(), &binding).await?;
        return Ok(());
    };
    let patch = Patch::Merge(json!({"status": patch}));
    let params = PatchParams { field_manager: Some("node".into()), ..PatchParams::default() };
    pods.patch_status(&name, &params, &patch).await.map(drop)
}
