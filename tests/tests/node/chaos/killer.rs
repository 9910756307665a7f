//! What goes wrong meanwhile: one fault after the other, drawn from the seed, until it is told to stop. Whether a fault could
//! be done is written down: some find nothing to break at that moment.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use drover_tests::Cluster;
use drover_tests::faults::{self, Process};
use drover_tests::installation::BUILDERS;
use jiff::Timestamp;
use rustix::process::Signal;
use xtask::run;

use super::random::Random;

/// Between two faults, at least and at most, in milliseconds.
const PAUSE: (usize, usize) = (1000, 4000);
/// How long etcd and the pods' network stand still: less than a lease.
const STANDSTILL: Duration = Duration::from_secs(3);

/// As the node's CNI configuration names it.
const BRIDGE: &str = "cni0";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fault {
    OperatorKilled,
    BuilderPodDeleted,
    BuilderPodGone,
    BuilderPodEvicted,
    BuilderKilled,
    BuildKilled,
    ConnectionCut,
    NetworkCut,
    KubeletKilled,
    ContainerdKilled,
    ApiServerKilled,
    EtcdPaused,
}

/// Each as often as it is named here.
const FAULTS: [Fault; 24] = [
    Fault::OperatorKilled,
    Fault::OperatorKilled,
    Fault::OperatorKilled,
    Fault::BuilderPodDeleted,
    Fault::BuilderPodDeleted,
    Fault::BuilderPodGone,
    Fault::BuilderPodGone,
    Fault::BuilderPodEvicted,
    Fault::BuilderPodEvicted,
    Fault::BuilderKilled,
    Fault::BuilderKilled,
    Fault::BuilderKilled,
    Fault::BuildKilled,
    Fault::BuildKilled,
    Fault::BuildKilled,
    Fault::ConnectionCut,
    Fault::ConnectionCut,
    Fault::ConnectionCut,
    Fault::ConnectionCut,
    Fault::NetworkCut,
    Fault::KubeletKilled,
    Fault::ContainerdKilled,
    Fault::ApiServerKilled,
    Fault::EtcdPaused,
];

/// One that was tried.
#[derive(Clone, Debug)]
pub(super) struct Done {
    /// Since the start.
    pub(super) at: Duration,
    pub(super) time: Timestamp,
    pub(super) fault: Fault,
    /// What it broke, or why it could not.
    pub(super) outcome: Result<String, String>,
    /// The builder's pod whose attempt it may have ended, whatever the outcome.
    pub(super) pod_uid: Option<String>,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = self.outcome.as_ref().unwrap_or_else(|why| why);
        write!(f, "{:6.1} s {:?}: {outcome}", self.at.as_secs_f64(), self.fault)
    }
}

/// A thread that breaks things.
pub(super) struct Killer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Done>>,
}

impl Killer {
    pub(super) fn start(cluster: &Cluster, seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, cluster) = (stop.clone(), cluster.clone());
        let thread = std::thread::spawn(move || {
            let mut random = Random(seed);
            let (begun, mut all) = (Instant::now(), Vec::new());
            // Each fault once in the beginning, so that no run is without one; then by lot.
            let mut first: Vec<Fault> = FAULTS.to_vec();
            random.shuffle(&mut first);
            while !told.load(Ordering::Relaxed) {
                let pause = PAUSE.0 + random.below(PAUSE.1 - PAUSE.0);
                std::thread::sleep(Duration::from_millis(pause as u64));
                let fault = first.pop().unwrap_or_else(|| *random.one_of(&FAULTS));
                let (at, time) = (begun.elapsed(), Timestamp::now());
                let mut pod_uid = None;
                let outcome =
                    strike(&cluster, fault, &mut random, &mut pod_uid).map_err(|error| format!("{error:#}"));
                all.push(Done { at, time, fault, outcome, pod_uid });
            }
            all
        });
        Self { stop, thread }
    }

    /// Lets it finish what it is at, and gives all that it did.
    pub(super) fn stop(self) -> Result<Vec<Done>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the killer panicked"))
    }
}

fn strike(
    cluster: &Cluster,
    fault: Fault,
    random: &mut Random,
    pod_uid: &mut Option<String>,
) -> Result<String> {
    let mut pick = |mut found: Vec<Process>| -> Result<Process> {
        let count = found.len();
        let picked = (count > 0).then(|| found.swap_remove(random.below(count)));
        let picked = picked.context("there is none at the moment")?;
        let of_builder = !matches!(fault, Fault::OperatorKilled | Fault::ConnectionCut);
        *pod_uid = of_builder.then(|| uid_of(&picked)).flatten();
        Ok(picked)
    };
    let kill = |process: &Process| {
        let command: String = process.command.chars().take(80).collect();
        process.kill().map(|_| format!("{} ({command})", process.pid))
    };
    let builders = || faults::in_pods(cluster, "drover-builder listen");
    let program = |name: &str| -> Result<Process> {
        faults::programs(cluster, name)?
            .into_iter()
            .next()
            .with_context(|| format!("{name} does not run at the moment"))
    };
    match fault {
        Fault::OperatorKilled => kill(&pick(faults::in_pods(cluster, "/bin/drover-operator")?)?),
        Fault::BuilderKilled => kill(&pick(builders()?)?),
        Fault::BuildKilled => kill(&pick(faults::in_pods(cluster, "-ec echo start ")?)?),
        Fault::ConnectionCut => {
            // OpenSSH's own name for the process that holds a connection: `ssh: SOCKET [mux]`.
            let clients = faults::in_pods(cluster, "ssh")?.into_iter();
            kill(&pick(clients.filter(|process| process.command.starts_with("ssh")).collect())?)
        }
        Fault::KubeletKilled => kill(&program("kubelet")?),
        Fault::ContainerdKilled => kill(&program("containerd")?),
        Fault::ApiServerKilled => kill(&program("kube-apiserver")?),
        Fault::EtcdPaused => {
            let etcd = program("etcd")?;
            etcd.signal(Signal::STOP)?;
            std::thread::sleep(STANDSTILL);
            etcd.signal(Signal::CONT)?;
            Ok(etcd.pid.to_string())
        }
        Fault::NetworkCut => {
            // The bridge that every pod is plugged into: builders, operators and what they all reach.
            let bridge =
                |state| run::stdout(cluster.netns_command("ip").args(["link", "set", BRIDGE, state]));
            bridge("down")?;
            std::thread::sleep(STANDSTILL);
            bridge("up").map(|_| BRIDGE.to_owned())
        }
        Fault::BuilderPodDeleted | Fault::BuilderPodGone | Fault::BuilderPodEvicted => {
            // By the processes: asking the API server would only find those that it has been told of.
            let host = pod_of(&pick(builders()?)?)?;
            let mut kubectl = cluster.kubectl_command()?;
            kubectl.args(["--namespace", BUILDERS, "--request-timeout=5s"]);
            match fault {
                Fault::BuilderPodDeleted => {
                    run::stdout(kubectl.args(["delete", "pod", &host, "--wait=false"]))
                }
                Fault::BuilderPodGone => run::stdout(kubectl.args([
                    "delete",
                    "pod",
                    &host,
                    "--force",
                    "--grace-period=0",
                    "--wait=false",
                ])),
                _ => {
                    let body = format!(
                        r#"{{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {{"name": "{host}", "namespace": "{BUILDERS}"}}}}"#
                    );
                    let path = format!("/api/v1/namespaces/{BUILDERS}/pods/{host}/eviction");
                    run::filter(kubectl.args(["create", "--raw", &path, "-f", "-"]), body.as_bytes())
                }
            }?;
            Ok(host)
        }
    }
}

/// The uid of a process's pod, by its control group: `…/podUID/CONTAINER`.
fn uid_of(process: &Process) -> Option<String> {
    process.group.split('/').find_map(|part| part.strip_prefix("pod")).map(str::to_owned)
}

/// The name of a process's pod: its host name.
fn pod_of(process: &Process) -> Result<String> {
    let environment = std::fs::read(format!("/proc/{}/environ", process.pid))?;
    let environment = String::from_utf8_lossy(&environment).into_owned();
    let name = environment.split('\0').find_map(|variable| variable.strip_prefix("HOSTNAME="));
    name.map(str::to_owned).context("no host name")
}
