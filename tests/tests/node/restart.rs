//! Operators that go away while builds run: killed, scaled to nothing, replaced, or by losing the lead to another. No build
//! notices: the builder lingers, the next operator finds it again, and its log goes on.

use std::io::Read as _;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_tests::faults::{self, Process};
use drover_tests::installation::{BUILDERS, RELEASE, TENANT};
use drover_tests::{Installation, LogKeeper};
use rustix::process::Signal;
use serde_json::{Value, json};
use xtask::run;

const LIMIT: Duration = Duration::from_secs(60);
/// What a pod gets to end by itself, and what may pass until it is asked to (DESIGN.md: L4).
const GRACE_AND_TEN: Duration = Duration::from_secs(20);

#[test]
fn a_build_goes_on_while_no_operator_is_there() -> Result<()> {
    with_drover(Test::away)
}

#[test]
fn operators_take_over_from_one_another() -> Result<()> {
    with_drover(|test| {
        test.upgrade()?;
        test.next_leader()
    })
}

#[test]
fn what_is_not_wanted_any_more_is_freed_in_time() -> Result<()> {
    with_drover(|test| {
        test.unwanted()?;
        test.times_to_live()
    })
}

#[test]
fn a_node_that_is_lost_costs_an_attempt_and_no_more() -> Result<()> {
    with_drover(Test::lost_node)
}

fn with_drover(act: impl FnOnce(&Test) -> Result<()>) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("drover-node-").tempdir_in("/tmp")?;
    let drover = Installation::up(scratch.path())?;
    let tools = drover.tools()?;
    let test = Test { drover, tools };
    act(&test).map_err(|error| error.context(test.drover.operator_log()))
}

struct Test {
    drover: Installation,
    tools: String,
}

/// A build that runs, and where.
struct Running {
    name: String,
    pod: String,
    pod_uid: String,
    /// The builder, and the build in it.
    processes: [Process; 2],
}

/// Programs that stand still until this is dropped.
struct Stopped(Vec<Process>);

impl Stopped {
    fn all(processes: Vec<Process>) -> Result<Self> {
        let stopped = Self(processes);
        stopped.0.iter().try_for_each(|process| process.signal(Signal::STOP).map(drop))?;
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for process in &self.0 {
            // Gone is as good.
            let _ = process.signal(Signal::CONT);
        }
    }
}

/// A node that takes no pods and is there on paper only. Where every node is lost, Kubernetes takes itself for the one who is,
/// and touches no pod (kube-controller-manager: node_lifecycle_controller.go, full disruption).
struct OtherNode<'a> {
    drover: &'a Installation,
    stop: Arc<AtomicBool>,
    heart: Option<JoinHandle<Result<()>>>,
}

impl<'a> OtherNode<'a> {
    fn start(drover: &'a Installation) -> Result<Self> {
        let now = jiff::Timestamp::now();
        let lease = lease_of_other_node(now);
        let mut kubectl = drover.cluster.kubectl_command()?;
        run::filter(kubectl.args(["apply", "-f", "-"]), format!("{OTHER_NODE}---\n{lease}").as_bytes())?;
        let ready = json!({"status": {"conditions": [{
            "type": "Ready", "status": "True", "reason": "OnPaper", "message": "", "lastHeartbeatTime": format!("{now:.0}"),
            "lastTransitionTime": format!("{now:.0}"),
        }]}});
        let args = ["patch", "node", "node-on-paper", "--subresource=status", "-p", &ready.to_string()];
        drover.cluster.kubectl(&args)?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut kubectl = drover.cluster.kubectl_command()?;
        kubectl.args(["apply", "-f", "-"]);
        let stopped = stop.clone();
        let heart = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                run::filter(&mut kubectl, lease_of_other_node(jiff::Timestamp::now()).as_bytes())?;
                std::thread::park_timeout(Duration::from_secs(5));
            }
            Ok(())
        });
        Ok(Self { drover, stop, heart: Some(heart) })
    }
}

impl Drop for OtherNode<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(heart) = self.heart.take() {
            heart.thread().unpark();
            let _ = heart.join();
        }
        let _ = self.drover.cluster.kubectl(&["delete", "node", "node-on-paper", "--ignore-not-found"]);
    }
}

const OTHER_NODE: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-on-paper}
spec: {taints: [{key: drover.test/on-paper, effect: NoSchedule}]}
";

fn lease_of_other_node(now: jiff::Timestamp) -> String {
    format!(
        "{{apiVersion: coordination.k8s.io/v1, kind: Lease, metadata: {{name: node-on-paper, namespace: kube-node-lease}}, \
         spec: {{holderIdentity: node-on-paper, leaseDurationSeconds: 40, renewTime: '{now:.6}'}}}}"
    )
}

impl Test {
    fn away(&self) -> Result<()> {
        let kept = tempfile::Builder::new()
            .prefix("drover-logs-")
            .tempdir_in(self.drover.store().with_file_name(""))?;
        let keeper = LogKeeper::start(&self.drover.cluster, kept.path())?;
        let running = self.start("away", 45)?;
        let mut logs = self.drover.drover(&["logs", "away", "--follow", "--namespace", TENANT])?;
        let mut logs = logs.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;

        // Killed, and found again by the next process of the same pod.
        let operators = self.operators()?;
        ensure!(!operators.is_empty(), "no operator");
        for operator in &operators {
            operator.kill()?;
        }
        run::wait_for("another operator", LIMIT, || {
            Ok(self.operators()?.iter().any(|now| !operators.contains(now)) && self.has_session()?)
        })?;
        running.goes_on()?;

        // Nobody at all for a while, in which the build has more to say.
        self.scale(0)?;
        run::wait_for("every operator to go", LIMIT, || Ok(self.operators()?.is_empty()))?;
        let said = self.lines_of(&running)?;
        ensure!(said < 40, "the build was as good as done before every operator was gone");
        run::wait_for("the build to say more", LIMIT, || Ok(self.lines_of(&running)? > said + 3))?;
        running.goes_on()?;
        self.scale(2)?;

        let request = self.drover.wait("away", "True")?;
        self.first_attempt(&request, &running)?;
        self.log_is_whole(&request, "away", 45)?;
        let mut followed = String::new();
        logs.stdout.take().context("a pipe")?.read_to_string(&mut followed)?;
        ensure!(logs.wait()?.success(), "drover logs: {followed}");
        whole(&followed, "away", 45).context("drover logs --follow")?;

        // By what the containers wrote, too: it was started once, in one pod.
        let kept = keeper.logs()?;
        let starts: usize = kept
            .iter()
            .filter(|(name, _)| name.starts_with(BUILDERS))
            .map(|(_, log)| log.lines().filter(|line| *line == "start away").count())
            .sum();
        ensure!(starts == 1, "it was started {starts} times");
        self.no_pods()
    }

    fn upgrade(&self) -> Result<()> {
        let running: Vec<Running> =
            ["upgrade-1", "upgrade-2"].map(|name| self.start(name, 20)).into_iter().collect::<Result<_>>()?;
        let before = self.operators()?;
        self.drover.upgrade(&["podAnnotations.drover\\.test/upgrade=yes"])?;
        run::wait_for("the old operators to go", LIMIT, || {
            Ok(before.iter().all(|operator| !operator.is_alive()))
        })?;
        for running in &running {
            running.goes_on()?;
        }
        for running in &running {
            let request = self.drover.wait(&running.name, "True")?;
            self.first_attempt(&request, running)?;
            self.log_is_whole(&request, &running.name, 20)?;
        }
        self.no_pods()
    }

    fn next_leader(&self) -> Result<()> {
        let first = self.leader()?;
        let running = self.start("lead", 24)?;
        let pods = self.json(&["get", "-n", RELEASE, "pod", &first, "-o", "json"])?;
        let uid = pods["metadata"]["uid"].as_str().context("a uid")?.to_owned();
        // Its pod goes as well, so that it is not the same one that comes back in time.
        for process in faults::in_pod(&self.drover.cluster, &uid, "drover-operator")? {
            process.kill()?;
        }
        self.drover.cluster.kubectl(&[
            "delete",
            "-n",
            RELEASE,
            "pod",
            &first,
            "--force",
            "--grace-period=0",
        ])?;
        let killed = Instant::now();
        run::wait_for("another leader", LIMIT, || Ok(self.leader()? != first))?;
        // A lease of 6 s, a retry each second, and a machine that may be busy.
        ensure!(killed.elapsed() < Duration::from_secs(16), "it took {:?}", killed.elapsed());
        running.goes_on()?;
        let request = self.drover.wait("lead", "True")?;
        self.first_attempt(&request, &running)?;
        self.log_is_whole(&request, "lead", 24)?;
        self.no_pods()
    }

    fn unwanted(&self) -> Result<()> {
        let cancelled = self.start("cancelled", 600)?;
        let deleted = self.start("deleted", 600)?;
        let begun = Instant::now();
        let cancel = r#"{"spec": {"cancel": true}}"#;
        self.drover.cluster.kubectl(&[
            "patch",
            "-n",
            TENANT,
            "buildrequest",
            "cancelled",
            "--type=merge",
            "-p",
            cancel,
        ])?;
        // Nothing holds it back: the request itself is gone at once.
        self.drover.cluster.kubectl(&["delete", "-n", TENANT, "buildrequest", "deleted", "--timeout=5s"])?;
        for running in [&cancelled, &deleted] {
            let left = GRACE_AND_TEN.saturating_sub(begun.elapsed());
            run::wait_for(&format!("the pod of {} to go", running.name), left, || {
                let gone = self.drover.cluster.kubectl(&[
                    "get",
                    "-n",
                    BUILDERS,
                    "pod",
                    &running.pod,
                    "--ignore-not-found",
                    "-o",
                    "name",
                ])?;
                Ok(gone.is_empty() && running.processes.iter().all(|process| !process.is_alive()))
            })?;
        }
        let request = self.drover.wait("cancelled", "False")?;
        ensure!(request["status"]["failure"]["reason"] == "Cancelled", "{request:#}");
        self.no_pods()
    }

    fn times_to_live(&self) -> Result<()> {
        for (name, script, kept) in [
            ("ttl-success", "exit 0", "ttlSecondsAfterFailed"),
            ("ttl-failure", "exit 1", "ttlSecondsAfterSucceeded"),
        ] {
            let mut request = self.request(name, &format!("echo $tools > $out; {script}"));
            request["spec"]["ttlSecondsAfterSucceeded"] = 2.into();
            request["spec"]["ttlSecondsAfterFailed"] = 2.into();
            request["spec"][kept] = 3600.into();
            self.drover.apply(&request.to_string())?;
            let mut other = self.request(&format!("{name}-stays"), &format!("echo $tools > $out; {script}"));
            other["spec"]["ttlSecondsAfterSucceeded"] = 3600.into();
            other["spec"]["ttlSecondsAfterFailed"] = 3600.into();
            other["spec"][kept] = 2.into();
            self.drover.apply(&other.to_string())?;
        }
        for name in ["ttl-success", "ttl-failure"] {
            run::wait_for(&format!("{name} to be deleted"), LIMIT, || {
                let found = self.drover.cluster.kubectl(&[
                    "get",
                    "-n",
                    TENANT,
                    "buildrequest",
                    name,
                    "--ignore-not-found",
                    "-o",
                    "name",
                ])?;
                Ok(found.is_empty())
            })?;
        }
        self.drover.wait("ttl-success-stays", "True")?;
        self.drover.wait("ttl-failure-stays", "False")?;
        self.no_pods()
    }

    /// DESIGN.md: L2. Kubernetes itself notices after 50 s without a word (`--node-monitor-grace-period`).
    fn lost_node(&self) -> Result<()> {
        let _other = OtherNode::start(&self.drover)?;
        let running = self.start("lost-node", 600)?;
        let kubelets = faults::programs(&self.drover.cluster, "kubelet")?;
        ensure!(!kubelets.is_empty(), "no kubelet");
        let stopped = Stopped::all(kubelets)?;
        run::wait_for("Kubernetes to miss the node", Duration::from_secs(120), || {
            Ok(self.is_ready("node-0")? != "True")
        })?;
        let missed = Instant::now();
        run::wait_for("another attempt", LIMIT, || Ok(self.attempt("lost-node")? == 2))?;
        let request = self.drover.get("lost-node")?;
        let first = &request["status"]["attempts"][0];
        ensure!(first["reason"] == "NodeLost" && first["infrastructure"] == true, "{request:#}");
        // Its pod waits for a node: there is no other that would take it.
        run::wait_for("another pod", LIMIT.saturating_sub(missed.elapsed()), || {
            let pods = self.json(&["get", "-n", BUILDERS, "pods", "-o", "json"])?;
            let pods = pods["items"].as_array().into_iter().flatten();
            Ok(pods.filter(|pod| pod["metadata"]["name"] != running.pod.as_str()).count() == 1)
        })?;

        drop(stopped);
        let mut again = None;
        run::wait_for("the build to run again", Duration::from_secs(120), || {
            again = self.running("lost-node")?.filter(|now| now.pod_uid != running.pod_uid);
            Ok(again.is_some())
        })?;
        run::wait_for("the lost build to end", LIMIT, || {
            Ok(running.processes.iter().all(|process| !process.is_alive()))
        })?;
        self.drover.cluster.kubectl(&["delete", "-n", TENANT, "buildrequest", "lost-node"])?;
        self.no_pods()
    }

    fn attempt(&self, name: &str) -> Result<u64> {
        Ok(self.drover.get(name)?["status"]["attempt"].as_u64().unwrap_or_default())
    }

    fn is_ready(&self, node: &str) -> Result<String> {
        let path = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
        self.drover.cluster.kubectl(&["get", "node", node, "-o", path])
    }

    /// A request that says a line a second, so many, and then is done.
    fn start(&self, name: &str, seconds: u32) -> Result<Running> {
        let script = format!(
            "echo start {name}; i=0; while [ $i != {seconds} ]; do i=$((i + 1)); $tools/bin/sleep 1; echo line {name} $i; done; \
             echo $i > $out; echo end {name}"
        );
        self.drover.apply(&self.request(name, &script).to_string())?;
        let mut running = None;
        run::wait_for(&format!("{name} to build"), LIMIT, || {
            running = self.running(name)?;
            Ok(running.is_some())
        })?;
        running.context("it runs")
    }

    fn request(&self, name: &str, script: &str) -> Value {
        json!({
            "apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest", "metadata": {"name": name},
            "spec": {"derivation": {
                "name": name, "system": "x86_64-linux", "builder": "/bin/sh", "args": ["-ec", script],
                "env": {"tools": self.tools}, "inputSrcs": [self.tools], "outputs": {"out": {}},
            }},
        })
    }

    /// None as long as the build has not said its first line.
    fn running(&self, name: &str) -> Result<Option<Running>> {
        let request = self.drover.get(name)?;
        let Some(pod) = request["status"]["builder"]["pod"].as_str() else { return Ok(None) };
        let found = self.drover.cluster.kubectl(&[
            "get",
            "-n",
            BUILDERS,
            "pod",
            pod,
            "--ignore-not-found",
            "-o",
            "json",
        ])?;
        let Ok(object) = serde_json::from_str::<Value>(&found) else { return Ok(None) };
        let pod_uid = object["metadata"]["uid"].as_str().context("a uid")?.to_owned();
        let find = |words: &str| {
            Ok::<_, anyhow::Error>(faults::in_pod(&self.drover.cluster, &pod_uid, words)?.into_iter().next())
        };
        let (Some(builder), Some(build)) =
            (find("drover-builder listen")?, find(&format!("echo start {name};"))?)
        else {
            return Ok(None);
        };
        let running = Running { name: name.into(), pod: pod.into(), pod_uid, processes: [builder, build] };
        Ok((self.lines_of(&running)? > 0).then_some(running))
    }

    /// How many lines its pod's log has.
    fn lines_of(&self, running: &Running) -> Result<usize> {
        Ok(self
            .drover
            .cluster
            .kubectl(&["logs", "-n", BUILDERS, &running.pod])?
            .lines()
            .filter(|line| line.starts_with("line "))
            .count())
    }

    /// Whether an operator is connected to a builder: each connection is a process of OpenSSH's.
    fn has_session(&self) -> Result<bool> {
        let processes = faults::in_pods(&self.drover.cluster, "ssh")?;
        Ok(processes.iter().any(|process| process.command.starts_with("ssh")))
    }

    fn operators(&self) -> Result<Vec<Process>> {
        let all = faults::in_pods(&self.drover.cluster, "drover-operator")?;
        Ok(all.into_iter().filter(|process| process.command.starts_with("/bin/drover-operator")).collect())
    }

    fn scale(&self, replicas: u32) -> Result<()> {
        let (deployment, replicas) = (format!("deployment/{RELEASE}"), format!("--replicas={replicas}"));
        self.drover.cluster.kubectl(&["scale", "-n", RELEASE, &deployment, &replicas]).map(drop)
    }

    /// The pod of the operator that leads.
    fn leader(&self) -> Result<String> {
        let leases = self.json(&["get", "-n", RELEASE, "leases", "-o", "json"])?;
        let holder = leases["items"][0]["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned();
        let pods = self.drover.cluster.kubectl(&[
            "get",
            "-n",
            RELEASE,
            "pods",
            "-o",
            "jsonpath={.items[*].metadata.name}",
        ])?;
        let pod = pods.split_whitespace().find(|pod| holder.starts_with(pod));
        Ok(pod.unwrap_or(&holder).to_owned())
    }

    fn first_attempt(&self, request: &Value, running: &Running) -> Result<()> {
        let status = &request["status"];
        let attempts = status["attempts"].as_array().map(Vec::len);
        ensure!(status["attempt"] == 1 && attempts == Some(1), "{status:#}");
        ensure!(status["builder"]["pod"] == running.pod.as_str(), "{status:#}");
        Ok(())
    }

    /// What `nix log` would show.
    fn log_is_whole(&self, request: &Value, name: &str, lines: u32) -> Result<()> {
        let drv = request["status"]["drvPath"]
            .as_str()
            .and_then(|path| path.rsplit('/').next())
            .context("a drvPath")?;
        let log = std::fs::read_to_string(self.drover.cache.dir().join("log").join(drv))?;
        whole(&log, name, lines).with_context(|| format!("the log of {name} in the cache"))
    }

    fn no_pods(&self) -> Result<()> {
        run::wait_for("the builders' pods to go", LIMIT, || Ok(self.drover.builder_pods()?.is_empty()))
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        serde_json::from_str(&self.drover.cluster.kubectl(args)?).context("kubectl prints JSON")
    }
}

impl Running {
    fn goes_on(&self) -> Result<()> {
        for process in &self.processes {
            ensure!(process.is_alive(), "{} in {} is not there any more", process.command, self.pod_uid);
        }
        Ok(())
    }
}

/// Every line of the build, once and in its order.
fn whole(log: &str, name: &str, lines: u32) -> Result<()> {
    let expected = [format!("start {name}")]
        .into_iter()
        .chain((1..=lines).map(|line| format!("line {name} {line}")))
        .chain([format!("end {name}")]);
    // The builder's own words are in the pod's log as well.
    let of_build = |line: &&str| line.split(' ').nth(1) == Some(name);
    let said: Vec<&str> = log.lines().map(str::trim_end).filter(of_build).collect();
    ensure!(said == expected.collect::<Vec<_>>(), "not whole: {said:#?}");
    Ok(())
}
