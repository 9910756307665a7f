//! What is asked for: a few hundred requests in three namespaces, all that differs between runs drawn from one seed.

use std::collections::BTreeMap;

use anyhow::Result;
use drover_api::{DerivationSpec, convert};
use drover_nix::StoreDir;
use serde_json::{Value, json};

use super::random::Random;

pub(super) const NAMESPACES: [&str; 3] = ["chaos-a", "chaos-b", "chaos-c"];
pub(super) const CLASS: &str = "chaos";
/// Builders at once, in all and for a namespace: room for two cores, and less than is asked for.
pub(super) const TOTAL: u32 = 8;
pub(super) const PER_NAMESPACE: u32 = 4;
/// Infrastructure failures that a request may have. The killer must not use them up: that would be a rightful end.
pub(super) const RETRIES: u32 = 20;
/// Requests that are sent together; a request and what it depends on always are.
const BATCH: usize = 12;

/// How a request has to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Expected {
    Succeeds,
    Fails(&'static str),
    /// Cancelled while it may have been anywhere, also at its end.
    Cancelled,
    /// Deleted in the same way.
    Deleted,
}

#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) namespace: &'static str,
    pub(super) name: String,
    /// Of the derivation; requests for the same one share it.
    pub(super) build: String,
    pub(super) expected: Expected,
    /// Full path of its output.
    pub(super) path: String,
    pub(super) manifest: Value,
}

/// Requests in the groups in which they are sent.
pub(super) fn batches(random: &mut Random, builds: usize, tools: &str) -> Result<Vec<Vec<Job>>> {
    let mut all = Vec::new();
    let mut made = 0;
    while made < builds {
        let mut batch: Vec<Job> = Vec::new();
        while batch.len() < BATCH && made < builds {
            let namespace = NAMESPACES[random.below(NAMESPACES.len())];
            let of_namespace = |job: &&Job| job.namespace == namespace;
            let succeeding: Vec<Job> = batch
                .iter()
                .filter(of_namespace)
                .filter(|job| job.expected == Expected::Succeeds)
                .cloned()
                .collect();
            let failing: Vec<Job> = batch
                .iter()
                .filter(of_namespace)
                .filter(|job| matches!(job.expected, Expected::Fails(_)))
                .cloned()
                .collect();
            let name = format!("{}-{:03}", &namespace[6..], made);
            let quick = || Draft { namespace, name: name.clone(), ..Draft::default() };
            let draft = match random.below(100) {
                0..38 => quick(),
                38..55 => Draft { seconds: 2 + random.below(8), ..quick() },
                55..57 => Draft { seconds: 20, ..quick() },
                57..72 if !succeeding.is_empty() => {
                    Draft { input: Some(random.one_of(&succeeding).path.clone()), ..quick() }
                }
                72..82 => Draft { exit: 9, expected: Some(Expected::Fails("BuildFailed")), ..quick() },
                82..86 if !failing.is_empty() => Draft {
                    input: Some(random.one_of(&failing).path.clone()),
                    expected: Some(Expected::Fails("DependencyFailed")),
                    ..quick()
                },
                86..91 if !succeeding.is_empty() => {
                    // The same derivation under another name: no build of its own.
                    let mut same = random.one_of(&succeeding).clone();
                    same.name = format!("{}-same-{}", same.name, batch.len());
                    same.manifest["metadata"]["name"] = same.name.as_str().into();
                    batch.push(same);
                    continue;
                }
                91..96 => Draft { seconds: 8, expected: Some(Expected::Cancelled), ..quick() },
                96..100 => Draft { seconds: 8, expected: Some(Expected::Deleted), ..quick() },
                _ => quick(),
            };
            batch.push(draft.job(tools)?);
            made += 1;
        }
        random.shuffle(&mut batch);
        all.push(batch);
    }
    Ok(all)
}

/// The class that they all name.
pub(super) fn class(cache: &str) -> Value {
    json!({
        "apiVersion": "drover.build/v1alpha1", "kind": "BuilderClass", "metadata": {"name": CLASS},
        "spec": {
            "systems": ["x86_64-linux"],
            "caches": [{"url": cache, "push": true}],
            "concurrency": {"total": TOTAL, "perNamespace": PER_NAMESPACE},
            "resources": {"default": {"requests": {"cpu": "20m", "memory": "32Mi", "ephemeral-storage": "16Mi"}}},
        },
    })
}

#[derive(Default)]
struct Draft {
    namespace: &'static str,
    name: String,
    seconds: usize,
    exit: u32,
    input: Option<String>,
    expected: Option<Expected>,
}

impl Draft {
    fn job(self, tools: &str) -> Result<Job> {
        let name = &self.name;
        // Each run of the build has a value of its own: it is in the log and in the output, so that the two can be compared.
        let mut script =
            format!("echo start {name}; read -r run < /proc/sys/kernel/random/uuid; echo run {name} $run; ");
        if self.seconds > 0 {
            script += &format!(
                "i=0; while [ $i != {} ]; do $tools/bin/sleep 1; i=$((i + 1)); done; ",
                self.seconds
            );
        }
        if self.input.is_some() {
            script += "read -r below rest < $input; ";
        }
        script += if self.exit > 0 { "exit 9" } else { "echo $run $input > $out; " };
        if self.exit == 0 {
            script += &format!("echo end {name}");
        }
        let mut env = BTreeMap::from([("tools".to_owned(), tools.to_owned())]);
        env.extend(self.input.iter().map(|path| ("input".to_owned(), path.clone())));
        let derivation = DerivationSpec {
            name: name.clone(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: vec!["-ec".into(), script],
            env,
            input_srcs: [tools.to_owned()].into_iter().chain(self.input).collect(),
            outputs: BTreeMap::from([("out".to_owned(), Default::default())]),
        };
        let dir = StoreDir::default();
        let basic = convert::to_basic(&derivation, &dir).and_then(|basic| convert::complete(basic, &dir))?;
        let paths = basic.output_paths(&dir)?;
        let path = paths.into_values().flatten().map(|path| dir.full(&path)).collect();
        let manifest = json!({
            "apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"class": CLASS, "retries": {"infrastructure": RETRIES}, "derivation": derivation},
        });
        Ok(Job {
            namespace: self.namespace,
            build: self.name.clone(),
            name: self.name,
            expected: self.expected.unwrap_or(Expected::Succeeds),
            path,
            manifest,
        })
    }
}
