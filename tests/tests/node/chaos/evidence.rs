//! What is held against the outcome: the audit log, the logs that containers left, the cache and the list of what was broken.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use drover_operator::keys::Seed;
use drover_tests::Installation;
use drover_tests::audit::{self, History, Log, Pod, Rules};
use drover_tests::installation::{BUILDERS, RELEASE};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use xtask::run;

use super::killer::{Done, Fault};
use super::workload::{Expected, Job, PER_NAMESPACE, TOTAL};

pub(super) struct Evidence<'a> {
    pub(super) drover: &'a Installation,
    pub(super) jobs: &'a [Job],
    /// By namespace and name, as they were when all had ended.
    pub(super) requests: &'a BTreeMap<(String, String), Value>,
    pub(super) faults: &'a [Done],
    pub(super) log: Log,
    pub(super) audit_text: &'a str,
    pub(super) rules: Rules,
    /// By `NAMESPACE_POD_UID/CONTAINER/RESTARTS`.
    pub(super) container_logs: BTreeMap<String, String>,
}

/// What a build said of itself in the log of one container.
struct Run {
    value: String,
}

impl Evidence<'_> {
    /// Everything that is not as it must be, for people.
    pub(super) fn all(&self) -> Result<Vec<String>> {
        let history = History::new(&self.log.events, &self.rules);
        let mut wrong: Vec<String> =
            audit::audit(&self.log.events, &self.rules).iter().map(ToString::to_string).collect();
        self.the_log_is_whole(&history, &mut wrong);
        self.verdicts(&mut wrong);
        let runs = self.runs(&mut wrong);
        self.outputs(&runs, &mut wrong)?;
        self.lost_attempts_were_struck(&history, &mut wrong);
        self.equal_builds_are_one(&history, &mut wrong);
        self.concurrency(&history, &mut wrong);
        self.secrets(&history, &mut wrong)?;
        Ok(wrong)
    }

    /// Else it would prove nothing.
    fn the_log_is_whole(&self, history: &History, wrong: &mut Vec<String>) {
        let kills = self.faults.iter().filter(|done| done.fault == Fault::ApiServerKilled).count();
        if self.log.broken > kills {
            wrong.push(format!(
                "the audit log has {} broken lines, and {kills} API servers were killed",
                self.log.broken
            ));
        }
        if history.leases.is_empty() {
            wrong.push("no lease was ever written".into());
        }
        let built = history.pods.iter().map(|pod| &pod.request).collect::<BTreeSet<_>>().len();
        println!("{} pods for {built} requests, {} events", history.pods.len(), self.log.events.len());
    }

    fn verdicts(&self, wrong: &mut Vec<String>) {
        for job in self.jobs {
            let name = format!("{}/{}", job.namespace, job.name);
            let Some(request) = self.requests.get(&(job.namespace.to_owned(), job.name.clone())) else {
                if job.expected != Expected::Deleted {
                    wrong.push(format!("{name} is gone"));
                }
                continue;
            };
            let status = &request["status"];
            let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
            let succeeded = conditions.iter().find(|condition| condition["type"] == "Succeeded");
            let succeeded = succeeded.map_or(&Value::Null, |condition| &condition["status"]) == "True";
            let reason = status["failure"]["reason"].as_str();
            let right = match job.expected {
                Expected::Succeeds => succeeded && status["outputs"]["out"]["path"] == job.path.as_str(),
                Expected::Fails(expected) => reason == Some(expected),
                Expected::Cancelled => succeeded || reason == Some("Cancelled"),
                Expected::Deleted => false,
            };
            if !right {
                wrong.push(format!("{name} should have been {:?}: {}", job.expected, brief(status)));
            }
        }
    }

    /// Every run of every build, by the build's name. In one pod, a build starts once.
    fn runs(&self, wrong: &mut Vec<String>) -> BTreeMap<String, Vec<Run>> {
        let mut runs: BTreeMap<String, Vec<Run>> = BTreeMap::new();
        for (name, log) in self.container_logs.iter().filter(|(name, _)| name.starts_with(BUILDERS)) {
            let starts = log.lines().filter(|line| line.starts_with("start ")).count();
            if starts > 1 {
                wrong.push(format!("in {name} builds were started {starts} times"));
            }
            for line in log.lines() {
                if let Some((build, value)) =
                    line.strip_prefix("run ").and_then(|rest| rest.trim_end().split_once(' '))
                {
                    let run = Run { value: value.to_owned() };
                    runs.entry(build.to_owned()).or_default().push(run);
                }
            }
        }
        runs
    }

    /// What is in the cache is what one run wrote, status and cache agree, and the kept log is that run's, whole and once.
    fn outputs(&self, runs: &BTreeMap<String, Vec<Run>>, wrong: &mut Vec<String>) -> Result<()> {
        let succeeding = self.jobs.iter().filter(|job| job.expected == Expected::Succeeds);
        let paths: BTreeSet<&str> = succeeding.clone().map(|job| job.path.as_str()).collect();
        let into = self.drover.store().with_file_name("read").display().to_string();
        let mut copy = self.drover.nix_command("nix")?;
        copy.args(["copy", "--no-check-sigs", "--from", self.drover.cache.url(), "--to", &into]).args(paths);
        if let Err(error) = run::stdout(&mut copy) {
            wrong.push(format!("not every output is in the cache, whole: {error:#}"));
            return Ok(());
        }
        for job in succeeding {
            let Some(request) = self.requests.get(&(job.namespace.to_owned(), job.name.clone())) else {
                continue;
            };
            let status = &request["status"];
            let text = std::fs::read_to_string(format!("{into}{}", job.path)).unwrap_or_default();
            let value = text.split_whitespace().next().unwrap_or_default();
            let of_build = runs.get(&job.build).map(Vec::as_slice).unwrap_or_default();
            if !of_build.iter().any(|run| run.value == value) {
                wrong.push(format!("{}: no run that a container logged has written {text:?}", job.name));
            }
            let hash_part =
                job.path.rsplit('/').next().and_then(|base| base.split('-').next()).unwrap_or_default();
            let narinfo =
                std::fs::read_to_string(self.drover.cache.dir().join(format!("{hash_part}.narinfo")))?;
            let stored = narinfo.lines().find_map(|line| line.strip_prefix("NarHash: ")).unwrap_or_default();
            let recorded = status["outputs"]["out"]["narHash"].as_str().unwrap_or_default();
            let same = |a: &str, b: &str| -> Option<bool> {
                Some(a.parse::<drover_nix::Sha256>().ok()? == b.parse().ok()?)
            };
            if same(stored, recorded) != Some(true) {
                wrong.push(format!("{}: the status says {recorded}, the cache has {stored}", job.name));
            }
            let drv = status["drvPath"].as_str().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
            let log =
                std::fs::read_to_string(self.drover.cache.dir().join("log").join(drv)).unwrap_or_default();
            let expected = [
                format!("start {}", job.build),
                format!("run {} {value}", job.build),
                format!("end {}", job.build),
            ];
            let said: Vec<&str> = log.lines().map(str::trim_end).collect();
            if said != expected {
                wrong.push(format!("{}: the kept log is {said:?}", job.name));
            }
        }
        Ok(())
    }

    /// An attempt is lost only where its pod was struck. What happens to operators, connections and the node's own programs
    /// costs no attempt, but for one thing: a container that is being started when the kubelet or containerd is killed does
    /// not start, and in a pod that is never restarted nobody tries again.
    fn lost_attempts_were_struck(&self, history: &History, wrong: &mut Vec<String>) {
        let struck: BTreeSet<&str> = self.faults.iter().filter_map(|done| done.pod_uid.as_deref()).collect();
        let mut lost = 0;
        for (uid, request) in &history.requests {
            let Some(last) = request.statuses.last() else { continue };
            for attempt in last.status["attempts"].as_array().into_iter().flatten() {
                if attempt["infrastructure"] != true {
                    continue;
                }
                lost += 1;
                let number = attempt["number"].to_string();
                let of_attempt = |pod: &&Pod| pod.request == *uid && pod.attempt == number;
                let pod = history.pods.iter().find(of_attempt);
                let was_starting = |pod: &Pod| {
                    let end = attempt["endTime"].as_str().and_then(|time| time.parse().ok());
                    let could_not_start =
                        attempt["message"].as_str().is_some_and(|message| message.contains("StartError"));
                    could_not_start && self.node_was_struck(pod.created, end)
                };
                if pod.is_none_or(|pod| !struck.contains(pod.uid.as_str()) && !was_starting(pod)) {
                    wrong.push(format!(
                        "{}/{}: attempt {number} was lost though nothing was done to its pod {}: {}: {}",
                        request.namespace,
                        request.name,
                        pod.map_or("", |pod| &pod.name),
                        attempt["reason"],
                        attempt["message"]
                    ));
                }
            }
        }
        println!("{lost} attempts were lost, {} pods were struck", struck.len());
    }

    /// Whether a program that starts containers was killed in this time.
    fn node_was_struck(&self, from: Timestamp, to: Option<Timestamp>) -> bool {
        // What is written of times has whole seconds.
        let second = SignedDuration::from_secs(1);
        let during = |time: Timestamp| time >= from - second && to.is_none_or(|to| time <= to + second);
        let starters = [Fault::KubeletKilled, Fault::ContainerdKilled];
        let mut done = self.faults.iter().filter(|done| starters.contains(&done.fault));
        done.any(|done| done.outcome.is_ok() && during(done.time))
    }

    /// Requests of a namespace for the same derivation make one pod, and another one only where that was lost.
    fn equal_builds_are_one(&self, history: &History, wrong: &mut Vec<String>) {
        let mut groups: BTreeMap<(&str, &str), Vec<&Job>> = BTreeMap::new();
        for job in self.jobs {
            groups.entry((job.namespace, &job.build)).or_default().push(job);
        }
        for ((namespace, build), jobs) in groups.into_iter().filter(|(_, jobs)| jobs.len() > 1) {
            let of_group = |request: &&audit::Request| {
                request.namespace == namespace && jobs.iter().any(|job| job.name == request.name)
            };
            let lost: usize = history
                .requests
                .values()
                .filter(of_group)
                .filter_map(|request| request.statuses.last()?.status["attempts"].as_array())
                .map(|attempts| attempts.iter().filter(|attempt| attempt["infrastructure"] == true).count())
                .sum();
            let pods = history
                .pods
                .iter()
                .filter(|pod| history.requests.get(&pod.request).as_ref().is_some_and(of_group));
            let pods = pods.count();
            if pods > lost + 1 {
                wrong.push(format!(
                    "{namespace}: {} requests for {build} had {pods} pods, of which {lost} were lost",
                    jobs.len()
                ));
            }
        }
    }

    /// A pod counts from its creation until its attempt's end is written, or it is gone.
    fn concurrency(&self, history: &History, wrong: &mut Vec<String>) {
        let mut changes: Vec<(Timestamp, i64, &str)> = Vec::new();
        for pod in &history.pods {
            let Some(request) = history.requests.get(&pod.request) else { continue };
            let ended = request.statuses.iter().find(|write| {
                let attempts = write.status["attempts"].as_array();
                let mut attempts = attempts.into_iter().flatten();
                attempts.any(|attempt| {
                    attempt["number"].as_u64() == pod.attempt.parse().ok() && attempt["endTime"].is_string()
                })
            });
            let ends = [ended.map(|write| write.received), pod.gone, request.deleted];
            let Some(end) = ends.into_iter().flatten().min() else { continue };
            changes.push((pod.created, 1, &request.namespace));
            changes.push((end.max(pod.created), -1, &request.namespace));
        }
        changes.sort();
        let (mut total, mut most) = (0, 0);
        let mut by_namespace: BTreeMap<&str, (i64, i64)> = BTreeMap::new();
        for (_, change, namespace) in changes {
            total += change;
            most = most.max(total);
            let (now, peak) = by_namespace.entry(namespace).or_default();
            *now += change;
            *peak = (*peak).max(*now);
        }
        println!("at most {most} builders at once; by namespace {by_namespace:?}");
        if most > i64::from(TOTAL) {
            wrong.push(format!("{most} builders at once, of which the class allows {TOTAL}"));
        }
        for (namespace, (_, peak)) in by_namespace {
            if peak > i64::from(PER_NAMESPACE) {
                wrong.push(format!(
                    "{peak} builders at once for {namespace}, of which the class allows {PER_NAMESPACE}"
                ));
            }
        }
    }

    /// S8: neither the seed nor a key that was derived from it is anywhere.
    fn secrets(&self, history: &History, wrong: &mut Vec<String>) -> Result<()> {
        let secret = self.drover.cluster.kubectl(&["get", "secrets", "-n", RELEASE, "-o", "json"])?;
        let secret: Value = serde_json::from_str(&secret)?;
        let items = secret["items"].as_array().cloned().unwrap_or_default();
        let seeds = items
            .iter()
            .filter(|item| item["metadata"]["name"].as_str().is_some_and(|name| name.ends_with("-seed")));
        let seed = seeds
            .flat_map(|item| item["data"].as_object().into_iter().flatten())
            .find_map(|(_, value)| value.as_str());
        let seed = seed.context("the operator has a seed")?;
        let bytes = BASE64.decode(seed).context("a seed in base64")?;
        let derive = Seed::from_bytes(&bytes)?;
        let mut secrets = vec![seed.to_owned(), "PRIVATE KEY-----".to_owned()];
        for pod in &history.pods {
            let key = derive.client_key(&pod.request, pod.attempt.parse().unwrap_or(0))?.private_file();
            // The private half is in the last line but one of the base64; lines before it are the same for all keys, or public.
            secrets.extend(key.lines().rev().nth(2).map(str::to_owned));
        }
        let logs = self.container_logs.iter().map(|(name, text)| (name.as_str(), text.as_str()));
        for (name, text) in logs.chain([("audit.log", self.audit_text)]) {
            let lines = audit::leaks(text, &secrets);
            if !lines.is_empty() {
                wrong.push(format!("S8: a secret is in {name}, lines {lines:?}"));
            }
        }
        Ok(())
    }
}

fn brief(status: &Value) -> String {
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    let succeeded = conditions.iter().find(|condition| condition["type"] == "Succeeded").cloned();
    let attempts: Vec<String> = status["attempts"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|attempt| format!("{}: {} {}", attempt["number"], attempt["reason"], attempt["message"]))
        .collect();
    format!("{} after {attempts:?}", succeeded.unwrap_or_default())
}
