//! The operator as a process of its own, with the chart's rights: the program that is shipped, told what it is told there.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use drover_tests::program;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use xtask::run;

use crate::world::{LIMIT, SYSTEM, World};

/// Shorter than the defaults, so that the tests are; in the same order.
pub(crate) const DURATION: Duration = Duration::from_secs(6);
pub(crate) const RENEW_DEADLINE: Duration = Duration::from_secs(4);
pub(crate) const RETRY_PERIOD: Duration = Duration::from_secs(1);

/// One that runs. Killed when it is dropped.
pub(crate) struct Operator {
    child: Child,
    name: &'static str,
    log: PathBuf,
    _work: TempDir,
}

impl Operator {
    pub(crate) fn start(world: &World, name: &'static str) -> Result<Self> {
        Self::start_with(world, name, &[])
    }

    /// With further arguments.
    pub(crate) fn start_with(world: &World, name: &'static str, args: &[&str]) -> Result<Self> {
        Self::start_in(world, name, args, &[])
    }

    /// And in this environment.
    pub(crate) fn start_in(
        world: &World,
        name: &'static str,
        args: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let work = TempDir::new()?;
        let log = work.path().join("log");
        let mut command = Command::new(program("drover-operator")?);
        command.env("KUBECONFIG", &world.rights).env("DROVER_POD_NAME", name).env("NO_COLOR", "1");
        command.envs(environment.iter().copied());
        command.args([
            "--builder-image=drover.test/none:1",
            "--seed-secret=drover-seed",
            "--lease-name=drover",
        ]);
        command.args(["--listen=127.0.0.1:0", "--log=info,drover_operator=debug"]);
        for (flag, duration) in [
            ("--lease-duration-seconds", DURATION),
            ("--lease-renew-deadline-seconds", RENEW_DEADLINE),
            ("--lease-retry-period-seconds", RETRY_PERIOD),
        ] {
            command.arg(format!("{flag}={}", duration.as_secs()));
        }
        command.arg("--work-dir").arg(work.path()).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        Ok(Self { child: command.spawn()?, name, log, _work: work })
    }

    pub(crate) fn wait_leads(&self, world: &World) -> Result<()> {
        let leads = || Ok(holder(world)?.starts_with(&format!("{}_", self.name)));
        run::wait_for(&format!("{} to lead", self.name), LIMIT, leads).with_context(|| self.log())
    }

    pub(crate) fn is_ready(&self) -> Result<bool> {
        Ok(self.page("/readyz").is_ok_and(|page| page.starts_with("HTTP/1.1 200")))
    }

    /// The value of a metric without labels.
    pub(crate) fn metric(&self, name: &str) -> Result<String> {
        let page = self.page("/metrics")?;
        let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map(str::to_owned).with_context(|| page.clone())
    }

    /// The answer to a request for this path, head and all.
    pub(crate) fn page(&self, path: &str) -> Result<String> {
        let log = self.log();
        let address = log.split("address=").nth(1).and_then(|rest| rest.split_whitespace().next());
        let mut connection = TcpStream::connect(address.context("it does not listen yet")?)?;
        write!(connection, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        connection.read_to_string(&mut page)?;
        Ok(page)
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        // Not waited for yet: the number is still its own.
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    pub(crate) fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        self.signal(signal)?;
        self.ended()
    }

    pub(crate) fn ended(&mut self) -> Result<ExitStatus> {
        let mut status = None;
        run::wait_for(&format!("{} to end", self.name), LIMIT, || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })
        .with_context(|| self.log())?;
        status.context("it has ended")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // An error means that it is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Empty if nobody holds the lease, or there is none.
pub(crate) fn holder(world: &World) -> Result<String> {
    let path = "jsonpath={.spec.holderIdentity}";
    world.plane.kubectl(&["get", "lease", "drover", "-n", SYSTEM, "--ignore-not-found", "-o", path])
}
