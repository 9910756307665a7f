//! Drover installed as its users install it: the chart by Helm, images on a real node, a binary cache behind nginx.
//!
//! Nothing of Drover is called here; all that this does a person could type. The cluster and the release stay when it is
//! dropped, the cache's server does not.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use xtask::{checkout, run};

use crate::{Cluster, HttpCache, Nix, Peer, corpus, images, program, sqlite};

/// Namespace and name of the release.
pub const RELEASE: &str = "drover";
/// Where its builders are.
pub const BUILDERS: &str = "drover-builders";
/// Where requests go, if they do not say.
pub const TENANT: &str = "drover-tenant";

const CACHE_PORT: u16 = 8100;

/// A cluster with Drover and a cache.
pub struct Installation {
    pub cluster: Cluster,
    pub cache: HttpCache,
    /// A Nix whose store is in [`Self::store`], and which reaches the cache.
    pub nix: Peer,
    dir: PathBuf,
}

impl Installation {
    /// Brings up the cluster, loads the images, serves an empty cache and installs the chart with a default class that
    /// uses it. What an earlier call left of requests and cache is gone. `dir` is empty and below /tmp.
    pub fn up(dir: &Path) -> Result<Self> {
        let this = Self::prepare(dir)?;
        this.upgrade(&[])?;
        Ok(this)
    }

    /// All of that but the chart: a release is there or not, as an earlier call left it.
    pub fn prepare(dir: &Path) -> Result<Self> {
        let cluster = Cluster::up()?;
        let [builder, operator] = images()?;
        cluster.load(&builder.file)?;
        cluster.load(&operator.file)?;
        let served = dir.join("cache");
        std::fs::create_dir_all(&served)?;
        let cache = HttpCache::start_in(&cluster, &served, CACHE_PORT)?;
        let nix = Peer::new(Nix::V2_34)?.in_netns(&cluster.netns()).with(&checkout().join("tests"));
        let nix = nix.with(&sqlite::inputs()?);
        let this = Self { cluster, cache, nix, dir: dir.to_owned() };

        this.cluster.kubectl(&["delete", "namespace", TENANT, "--ignore-not-found", "--wait"])?;
        let values = this.values(&[&builder.digest, &operator.digest]);
        std::fs::write(this.values_file(), serde_json::to_vec_pretty(&values)?)?;
        this.cluster.kubectl(&["create", "namespace", TENANT])?;
        Ok(this)
    }

    /// `helm upgrade` with the same values and these (`--set`), until the new operator is there and the old one is gone.
    pub fn upgrade(&self, set: &[&str]) -> Result<()> {
        let mut helm = self.helm("upgrade", &checkout().join("charts/drover"))?;
        helm.args(["--install", "--create-namespace"]).args(set.iter().flat_map(|set| ["--set", set]));
        run::stdout(&mut helm).map(drop).map_err(|error| error.context(self.operator_log()))
    }

    /// `helm ACT` of the release with this chart and the values of [`Self::up`], until all is as it says; to be completed.
    pub fn helm(&self, act: &str, chart: &Path) -> Result<Command> {
        let mut helm = self.cluster.helm_command()?;
        helm.args([act, RELEASE]).arg(chart).args([
            "--namespace",
            RELEASE,
            "--wait",
            "--timeout=120s",
            "--values",
        ]);
        helm.arg(self.values_file());
        Ok(helm)
    }

    /// Puts programs into the cache, for builds that need more than a shell: `PATH/bin/sleep` and other applets of busybox.
    pub fn tools(&self) -> Result<String> {
        let dir = self.dir.join("tools");
        corpus::tools(&dir)?;
        let path = self.nix("nix-store", &["--add", &dir.display().to_string()])?.trim().to_owned();
        self.copy_to_cache(&[&path])?;
        Ok(path)
    }

    /// The root of a Nix store on this machine, for [`Self::nix`].
    pub fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// Runs a program of real Nix on the store. Derivations may be built: in Nix's own sandbox.
    pub fn nix(&self, program: &str, args: &[&str]) -> Result<String> {
        let store = self.store().display().to_string();
        run::stdout(self.nix_command(program)?.args(args).args(["--store", &store]))
    }

    /// As [`Self::nix`], to be completed.
    pub fn nix_command(&self, program: &str) -> Result<Command> {
        let mut nix = self.nix.command(program)?;
        let config = "substitute = false\nbuild-users-group =\nexperimental-features = nix-command\n";
        nix.env("NIX_CONFIG", config);
        Ok(nix)
    }

    /// `nix copy` of these paths and all that they refer to into the cache; `.drv` files with all that they come from.
    pub fn copy_to_cache(&self, paths: &[&str]) -> Result<()> {
        let url = self.cache.url().to_owned();
        self.nix("nix", &[&["copy", "--to", &url][..], paths].concat()).map(drop)
    }

    /// A program of Drover's in the cluster's network, as the cluster's administrator.
    pub fn drover(&self, args: &[&str]) -> Result<Command> {
        let mut drover = self.cluster.netns_command(program("drover")?);
        drover.args(args);
        Ok(drover)
    }

    /// `kubectl apply` into the tenant's namespace.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        let mut kubectl = self.cluster.kubectl_command()?;
        kubectl.args(["apply", "--namespace", TENANT, "-f", "-"]);
        run::filter(&mut kubectl, yaml.as_bytes())
    }

    /// Waits as a person would until the request's condition Succeeded is True, or False, and returns the request.
    pub fn wait(&self, name: &str, succeeded: &str) -> Result<Value> {
        let condition = format!("--for=condition=Succeeded={succeeded}");
        let request = format!("buildrequest/{name}");
        let waited = self.cluster.kubectl(&["wait", "-n", TENANT, &request, &condition, "--timeout=180s"]);
        let object = self.get(name)?;
        waited.with_context(|| format!("the request: {object:#}\nthe operator: {}", self.operator_log()))?;
        Ok(object)
    }

    pub fn get(&self, name: &str) -> Result<Value> {
        let json = self.cluster.kubectl(&["get", "-n", TENANT, "buildrequest", name, "-o", "json"])?;
        serde_json::from_str(&json).context("kubectl prints JSON")
    }

    /// Names of the builders' pods that are there.
    pub fn builder_pods(&self) -> Result<Vec<String>> {
        let names = self.cluster.kubectl(&["get", "-n", BUILDERS, "pods", "-o", "name"])?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The end of the operators' logs, for messages.
    pub fn operator_log(&self) -> String {
        let operators = "app.kubernetes.io/component=operator";
        let log = self.cluster.kubectl(&["logs", "-n", RELEASE, "-l", operators, "--prefix", "--tail=60"]);
        let pods = self.cluster.kubectl(&["get", "pods", "-A", "-o", "wide"]);
        format!("{}\n{}", log.unwrap_or_else(|e| format!("{e:#}")), pods.unwrap_or_else(|e| format!("{e:#}")))
    }

    fn values_file(&self) -> PathBuf {
        self.dir.join("values.json")
    }

    fn values(&self, digests: &[&str]) -> Value {
        serde_json::json!({
            // The tag stays the same from build to build: another image has to mean another pod.
            "podAnnotations": {"drover.test/images": digests.join(",")},
            // Operators that are killed are missed for no longer; an API server takes as long to come back.
            "leaderElection": {"leaseDurationSeconds": 6, "renewDeadlineSeconds": 4, "retryPeriodSeconds": 1},
            "log": {"level": "info,drover_operator=debug", "format": "text"},
            "class": {
                "create": true,
                "spec": {
                    "default": true,
                    "systems": ["x86_64-linux", "i686-linux", "x86_64-v1-linux"],
                    "features": ["nixos-test", "benchmark", "big-parallel"],
                    "caches": [{"url": self.cache.url(), "push": true}],
                },
            },
        })
    }
}

/// What Helm's notes tell to type: each begins at the start of a line with the name of a program, and a here-document ends
/// where it says.
pub fn commands(notes: &str) -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    let mut inside = false;
    for line in notes.lines() {
        if inside {
            commands.last_mut().into_iter().for_each(|command| *command += &format!("{line}\n"));
            inside = line != "EOF";
        } else if ["kubectl ", "helm "].iter().any(|program| line.starts_with(program)) {
            commands.push(format!("{line}\n"));
            inside = line.ends_with("<<'EOF'");
        }
    }
    commands
}
