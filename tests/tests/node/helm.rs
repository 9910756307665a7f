//! A release from its first day to its last: the chart of the version before, a build that goes on while the release is
//! upgraded, `helm test`, the commands that Helm prints at the end, and what is left when it is uninstalled.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_tests::installation::{BUILDERS, RELEASE, TENANT, commands};
use drover_tests::{Installation, faults};
use rustix::process::Signal;
use serde_json::json;
use xtask::{checkout, run};

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_release_lives_and_goes() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("drover-node-").tempdir_in("/tmp")?;
    let drover = Installation::prepare(scratch.path())?;
    let tools = drover.tools()?;
    let test = Test { drover, tools };
    test.start_over()?;
    test.upgrade_from_the_last_version().map_err(|error| error.context(test.drover.operator_log()))?;
    test.helm_test()?;
    test.uninstall_while_something_is_built()?;
    test.a_release_from_nothing().map_err(|error| error.context(test.drover.operator_log()))
}

struct Test {
    drover: Installation,
    tools: String,
}

impl Test {
    fn start_over(&self) -> Result<()> {
        self.helm(&["uninstall", RELEASE, "--ignore-not-found", "--wait"])?;
        let definitions = ["buildrequests.drover.build", "builderclasses.drover.build"];
        self.kubectl(&[&["delete", "crd", "--ignore-not-found"], &definitions[..]].concat())?;
        Ok(())
    }

    /// The definitions of that version are nobody's. An upgrade that would take them says so, and one that may does it.
    fn upgrade_from_the_last_version(&self) -> Result<()> {
        let old = checkout().join("tests/fixtures/chart-0.1.0");
        run::stdout(self.drover.helm("install", &old)?.arg("--create-namespace"))?;
        let operators = self.operators()?;
        ensure!(!operators.is_empty(), "no operator");
        self.start("upgraded")?;
        let (pod, uid) = self.builder("upgraded")?;

        let chart = checkout().join(xtask::chart::CHART);
        // Without another pod template, no operator would go.
        let another = ["--set", "podAnnotations.drover\\.test/upgraded=yes"];
        let refused = run::output(self.drover.helm("upgrade", &chart)?.args(another))?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(!refused.status.success() && said.contains("invalid ownership metadata"), "{said}");
        run::stdout(self.drover.helm("upgrade", &chart)?.args(another).arg("--take-ownership"))?;
        run::wait_for("the operators to be others", LIMIT, || {
            let now = self.operators()?;
            Ok(!now.is_empty() && now.iter().all(|operator| !operators.contains(operator)))
        })?;

        // The build has noticed nothing; now it may end.
        ensure!(self.builder("upgraded")? == (pod.clone(), uid.clone()), "another builder");
        let sleeping = faults::in_pod(&self.drover.cluster, &uid, "sleep 600")?;
        ensure!(!sleeping.is_empty(), "the build is over");
        for process in sleeping {
            process.signal(Signal::TERM)?;
        }
        let request = self.drover.wait("upgraded", "True")?;
        ensure!(request["status"]["attempt"] == 1, "{request:#}");
        ensure!(request["status"]["builder"]["pod"] == pod.as_str(), "{request:#}");
        Ok(())
    }

    fn helm_test(&self) -> Result<()> {
        let said = self.helm(&["test", RELEASE, "--logs", "--timeout=120s"])?;
        for part in ["Phase:          Succeeded", ": created", "Built"] {
            ensure!(said.contains(part), "{part:?} is not in: {said}");
        }
        // It cleans up after itself, and a system that no class has is a failure that says so.
        let left = self.kubectl(&["get", "pod,buildrequest,role", "-n", RELEASE, "-o", "name"])?;
        ensure!(!left.contains("check"), "{left}");
        let chart = checkout().join(xtask::chart::CHART);
        run::stdout(self.drover.helm("upgrade", &chart)?.args(["--set", "tests.system=riscv64-linux"]))?;
        let mut helm = self.drover.cluster.helm_command()?;
        helm.args(["test", RELEASE, "--namespace", RELEASE, "--logs", "--timeout=120s"]);
        let failed = run::output(&mut helm)?;
        let said = String::from_utf8_lossy(&failed.stdout);
        ensure!(!failed.status.success() && said.contains("WrongSystem"), "{said}");
        Ok(())
    }

    /// Builders go with their namespace, what users wrote stays, and nobody has to be there for it to be deleted.
    fn uninstall_while_something_is_built(&self) -> Result<()> {
        self.start("left")?;
        let begun = Instant::now();
        let said = self.helm(&["uninstall", RELEASE, "--wait", "--timeout=90s"])?;
        ensure!(begun.elapsed() < Duration::from_secs(60), "it took {:?}", begun.elapsed());
        for kept in ["buildrequests.drover.build", "builderclasses.drover.build"] {
            ensure!(said.contains(kept), "Helm names what stays: {said}");
        }
        let namespaces = self.kubectl(&["get", "namespaces", "-o", "name"])?;
        ensure!(!namespaces.contains(BUILDERS), "{namespaces}");
        self.kubectl(&["get", "-n", TENANT, "buildrequest", "upgraded", "left"])?;
        self.kubectl(&["get", "-n", RELEASE, "secret", "drover-seed"])?;
        self.kubectl(&["delete", "-n", TENANT, "buildrequest", "--all", "--timeout=20s"])?;
        Ok(())
    }

    /// A first installation with a class, on a cluster that has never heard of Drover; the commands that Helm prints, as they
    /// stand there; and an end that leaves nothing.
    fn a_release_from_nothing(&self) -> Result<()> {
        self.start_over()?;
        let chart = checkout().join(xtask::chart::CHART);
        let gone = ["--set", "crds.keep=false"];
        run::stdout(self.drover.helm("install", &chart)?.args(gone))?;
        let notes = self.helm(&["get", "notes", RELEASE])?;
        let commands = commands(&notes);
        ensure!(commands.len() == 3, "{notes}");
        for command in &commands {
            let mut shell = self.drover.cluster.netns_command("sh");
            let programs = [self.drover.cluster.kubectl_command()?, self.drover.cluster.helm_command()?];
            shell.env("PATH", path_with(&programs)?).args(["-euc", command]);
            run::stdout(&mut shell).with_context(|| command.clone())?;
        }
        self.kubectl(&["delete", "-n", RELEASE, "buildrequest", "--all", "--timeout=20s"])?;
        self.helm(&["uninstall", RELEASE, "--wait", "--timeout=90s"])?;
        let definitions = self.kubectl(&["get", "crd", "-o", "name"])?;
        ensure!(!definitions.contains("drover"), "{definitions}");
        Ok(())
    }

    /// A build that runs until its `sleep` is ended.
    fn start(&self, name: &str) -> Result<()> {
        // The number is not in the shell's own command line.
        let script = "n=600; $tools/bin/sleep $n || echo woken; echo done > $out";
        let request = json!({
            "apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest", "metadata": {"name": name},
            "spec": {"derivation": {
                "name": name, "system": "x86_64-linux", "builder": "/bin/sh", "args": ["-ec", script],
                "env": {"tools": self.tools}, "inputSrcs": [self.tools], "outputs": {"out": {}},
            }},
        });
        self.drover.apply(&request.to_string())?;
        run::wait_for("the build to run", LIMIT, || {
            let Ok((_, uid)) = self.builder(name) else { return Ok(false) };
            Ok(!faults::in_pod(&self.drover.cluster, &uid, "sleep 600")?.is_empty())
        })
    }

    /// Name and uid of a request's pod.
    fn builder(&self, name: &str) -> Result<(String, String)> {
        let request = self.drover.get(name)?;
        let pod = request["status"]["builder"]["pod"].as_str().context("no builder yet")?;
        let uid = self.kubectl(&["get", "-n", BUILDERS, "pod", pod, "-o", "jsonpath={.metadata.uid}"])?;
        Ok((pod.to_owned(), uid))
    }

    /// Uids of the operators' pods.
    fn operators(&self) -> Result<Vec<String>> {
        let selector = "app.kubernetes.io/component=operator";
        let uids = "jsonpath={.items[*].metadata.uid}";
        let listed = self.kubectl(&["get", "pods", "-n", RELEASE, "-l", selector, "-o", uids])?;
        Ok(listed.split_whitespace().map(str::to_owned).collect())
    }

    fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.drover.cluster.kubectl(args)
    }

    /// Helm in the release's namespace.
    fn helm(&self, args: &[&str]) -> Result<String> {
        run::stdout(self.drover.cluster.helm_command()?.args(args).args(["--namespace", RELEASE]))
    }
}

/// PATH with the folders of these programs, which `nsenter` starts, in front.
fn path_with(programs: &[Command]) -> Result<String> {
    let mut path = std::env::var("PATH").unwrap_or_default();
    for program in programs {
        let program = program.get_args().last().context("the program that nsenter starts")?;
        let folder = std::path::Path::new(program).parent().context("a program lies in a folder")?;
        path = format!("{}:{path}", folder.display());
    }
    Ok(path)
}
