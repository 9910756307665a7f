//! What a build comes to: the same status by real Nix and by Drover, with Nix's words in the message; and where the machine
//! is to blame, `drover build` says so by its exit code.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{BasicDerivation, ContentAddress, DerivationOutput, Method, OutputName, Sha256, StoreDir};
use drover_serve::{BuildOptions, BuildResult, Cause};
use serde_json::Value;

use super::builds_fixture::{Drv, Reader, Session, Store, eventually};
use super::command_line::Home;

/// A string that doubles until there is no memory left.
const HOG: &str = "x=mmmmmmmmmmmmmmmm; while :; do x=$x$x; done";
/// A megabyte, for writing it again and again.
const MEGABYTE: &str = "x=dddddddddddddddd; i=0; while [ $i != 16 ]; do x=$x$x; i=$((i + 1)); done";
/// What Nix says below a failure when its disk is nearly full.
const NIX_NOTE: &str = "note: build failure may have been caused by lack of free disk space";

struct Case {
    name: &'static str,
    script: &'static str,
    options: BuildOptions,
    change: fn(&mut BasicDerivation),
    number: u64,
    /// In both messages, whoever wrote them.
    said: &'static str,
}

fn fixed(drv: &mut BasicDerivation) {
    let ca = ContentAddress { method: Method::Flat, hash: Sha256::of(b"something else").into() };
    let path = ca.store_path(&StoreDir::default(), &drv.name, &[].into(), false).expect("a flat hash");
    drv.env.insert("out".into(), format!("/nix/store/{path}").into());
    drv.outputs = [(OutputName::out(), DerivationOutput::CaFixed(ca))].into();
}

fn cases() -> Vec<Case> {
    let plain =
        Case { name: "", script: "", options: BuildOptions::default(), change: |_| {}, number: 3, said: "" };
    let timeout = || BuildOptions { timeout_seconds: 1, ..BuildOptions::default() };
    let silent = || BuildOptions { max_silent_seconds: 1, ..BuildOptions::default() };
    let short = || BuildOptions { max_log_bytes: 1000, ..BuildOptions::default() };
    let nothing = BuildOptions::default;
    vec![
        Case { name: "built", script: "echo x > $out", number: 0, options: nothing(), ..plain },
        Case {
            name: "exits",
            script: "exit 3",
            said: "failed with exit code 3",
            options: nothing(),
            ..plain
        },
        Case {
            name: "closes",
            script: "echo closing; exec > /dev/null 2>&1; while :; do :; done",
            said: "failed due to signal 9 (Killed)",
            options: nothing(),
            ..plain
        },
        Case {
            name: "no-builder",
            change: |drv| drv.builder = "/no/such/builder".into(),
            options: nothing(),
            ..plain
        },
        Case {
            name: "elsewhere",
            change: |drv| drv.system = "riscv64-linux".into(),
            number: 4,
            options: nothing(),
            ..plain
        },
        Case {
            name: "no-feature",
            change: |drv| drop(drv.env.insert("requiredSystemFeatures".into(), "moon".into())),
            number: 4,
            options: nothing(),
            ..plain
        },
        Case {
            name: "no-output",
            script: ":",
            number: 5,
            said: "failed to produce output path",
            options: nothing(),
            ..plain
        },
        Case {
            name: "wrong-hash",
            script: "echo something > $out",
            change: fixed,
            number: 5,
            said: "hash mismatch in fixed-output derivation",
            options: nothing(),
        },
        Case {
            name: "fixed-fails",
            script: "exit 9",
            change: fixed,
            number: 6,
            said: "failed with exit code 9",
            options: nothing(),
        },
        Case {
            name: "too-long",
            script: "trap '' TERM INT HUP; while :; do echo and on; done",
            options: timeout(),
            number: 8,
            said: "timed out after 1 seconds",
            ..plain
        },
        Case {
            name: "too-quiet",
            script: "while :; do :; done",
            options: silent(),
            number: 8,
            said: "timed out after 1 seconds",
            ..plain
        },
        Case {
            name: "too-loud",
            script: "while :; do echo and on; done",
            options: short(),
            number: 11,
            said: "killed after writing more than 1000 bytes of log",
            ..plain
        },
    ]
}

#[test]
fn statuses_are_those_of_nix() -> Result<()> {
    let (theirs, ours) = (Store::new()?, Store::new()?);
    let mut nix = Session::start(nix(&theirs)?, Reader::Follows)?;
    let mut drover = Session::start(ours.drover(&[])?, Reader::Follows)?;
    for case in cases() {
        let mut drv = Drv::new(case.name, case.script)?;
        (case.change)(&mut drv.drv);
        for session in [&mut nix, &mut drover] {
            let result = session.client()?.build_derivation(&drv.path, &drv.drv, &case.options)?;
            let message = plain(&result.error_message);
            ensure!(result.status as u64 == case.number, "{}: {result:?}", case.name);
            ensure!(message.contains(case.said), "{}: {message}", case.name);
            ensure!(Cause::of(&result).is_none(), "{}: {message}", case.name);
            drv.is_gone()?;
        }
    }
    drover.end(true)?;
    ours.expect_clean()
}

#[test]
fn a_full_disk_is_one_to_nix_as_well() -> Result<()> {
    // Each fills a disk of its own, and says so in its own way.
    let script = format!("{MEGABYTE}; while echo \"$x\"; do :; done > $out; exit 4");
    let build = |command: Command| -> Result<BuildResult> {
        let drv = Drv::new("fills", &script)?;
        let mut session = Session::start(command, Reader::Follows)?;
        Ok(session.client()?.build_derivation(&drv.path, &drv.drv, &BuildOptions::default())?)
    };
    let store = Store::new()?;
    let result = build(on_small_disk(nix(&store)?, &store.path("nix")))?;
    ensure!(result.status as u64 == 6, "{result:?}");
    let message = plain(&result.error_message);
    ensure!(message.lines().any(|line| line.trim() == NIX_NOTE), "{message}");
    let result = build(on_small_disk(store.drover(&[])?, &store.path("nix")))?;
    ensure!(result.status as u64 == 6, "{result:?}");
    ensure!(Cause::of(&result) == Some(Cause::DiskFull), "{result:?}");
    Ok(())
}

#[test]
fn exit_codes_of_what_the_machine_failed() -> Result<()> {
    let home = Home::new()?;
    let end = |output: Output, code: i32, reason: &str| -> Result<Value> {
        let said = String::from_utf8_lossy(&output.stderr);
        let request: Value = serde_json::from_slice(&output.stdout).with_context(|| said.to_string())?;
        let failure = &request["status"]["failure"];
        ensure!(output.status.code() == Some(code), "{}: {failure}: {said}", output.status);
        ensure!(failure["reason"] == reason, "{failure}");
        let machine = request["status"]["attempts"][0]["infrastructure"] == true;
        ensure!(machine == (code == 3), "{}", request["status"]);
        Ok(request)
    };
    let small = home.path().join("small");
    std::fs::create_dir(&small)?;
    let drover = |store: Option<&Path>| {
        let mut drover = home.drover(&["build", "-", "--output", "json"])?;
        if let Some(store) = store {
            drover.arg("--store").arg(store);
        }
        anyhow::Ok(drover)
    };

    end(run(drover(None)?, &request("fails", "exit 1", &[]))?, 1, "BuildFailed")?;
    let group = Group::new(160 << 20)?;
    end(run(group.holds(drover(None)?), &request("hungry", HOG, &[]))?, 3, "OutOfMemory")?;
    end(run(group.holds(drover(None)?), &request("fails-too", "exit 1", &[]))?, 1, "BuildFailed")?;
    let fill = format!("{MEGABYTE}; while echo \"$x\"; do :; done > $out; exit 4");
    end(run(on_small_disk(drover(Some(&small))?, &small), &request("fills", &fill, &[]))?, 3, "DiskFull")?;

    // An input that does not fit: the builder has no more than its last words to say so.
    let large = format!("{MEGABYTE}; i=0; while [ $i != 30 ]; do echo \"$x\"; i=$((i + 1)); done > $out");
    let made = run(drover(None)?, &request("large", &large, &[]))?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let made: Value = serde_json::from_slice(&made.stdout)?;
    let path = made["status"]["outputs"]["out"]["path"].as_str().context("a path")?;
    let needs = request("needs-it", "echo $out > $out", &[path]);
    let failed = end(run(on_small_disk(drover(Some(&small))?, &small), &needs)?, 3, "DiskFull")?;
    let message = failed["status"]["failure"]["message"].as_str().context("a message")?;
    ensure!(message.starts_with("disk full: "), "{message}");

    // Something kills the build, or its builder.
    for (name, of_build) in [("build-killed", true), ("builder-killed", false)] {
        let marker = format!("mark-{name}-{}", std::process::id());
        let script = format!(": {marker}; while :; do :; done");
        let running = spawn(drover(None)?, &request(name, &script, &[]))?;
        let mut found = None;
        eventually("the build runs", || {
            let build = process(|words, _| words.last().is_some_and(|word| word.contains(&marker)));
            let builder =
                || process(|words, parent| parent == running.id() && words[0].ends_with("drover-builder"));
            found = build.and_then(|build| if of_build { Some(build) } else { builder() });
            found.is_some()
        })?;
        let pid = found.context("a process")?.to_string();
        ensure!(Command::new("kill").args(["-9", &pid]).status()?.success());
        end(running.wait_with_output()?, 3, "BuilderLost")?;
    }
    Ok(())
}

fn request(name: &str, script: &str, inputs: &[&str]) -> String {
    let derivation = serde_json::json!({
        "name": name, "system": "x86_64-linux", "builder": "/bin/sh", "args": ["-c", script],
        "inputSrcs": inputs, "outputs": {"out": {}},
    });
    let request = serde_json::json!({
        "apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest", "metadata": {"name": name},
        "spec": {"derivation": derivation},
    });
    request.to_string()
}

fn nix(store: &Store) -> Result<Command> {
    let mut command = store.nix()?.command("nix-store")?;
    command.args(["--serve", "--write"]);
    Ok(command)
}

/// Without colours.
fn plain(message: &str) -> String {
    let mut pieces = message.split("\u{1b}[");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |text, piece| text + piece.split_once('m').map_or("", |(_, rest)| rest))
}

/// The same command, with a small disk at `directory`, which only it sees.
fn on_small_disk(command: Command, directory: &Path) -> Command {
    let mount = format!("mount -t tmpfs -o size=24m,mode=755 tmpfs '{}'; exec \"$@\"", directory.display());
    around(command, &["unshare", "--mount", "sh", "-ec", &mount, "sh"])
}

/// The same command, started by another one.
fn around(command: Command, outer: &[&str]) -> Command {
    let mut around = Command::new(outer[0]);
    around.args(&outer[1..]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => around.env(name, value),
            None => around.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        around.current_dir(dir);
    }
    around
}

fn spawn(mut command: Command, input: &str) -> Result<std::process::Child> {
    use std::io::Write as _;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("a pipe")?.write_all(input.as_bytes())?;
    Ok(child)
}

fn run(command: Command, input: &str) -> Result<Output> {
    Ok(spawn(command, input)?.wait_with_output()?)
}

/// The first process whose command line and parent are these.
fn process(is: impl Fn(&[String], u32) -> bool) -> Option<u32> {
    let entries = std::fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|pid: &u32| {
        let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let (line, stat) = (read("cmdline"), read("stat"));
        let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        let words: Vec<String> = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let stat = String::from_utf8_lossy(&stat).into_owned();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        !words.is_empty() && parent.is_some_and(|parent| is(&words, parent))
    })
}

/// A control group with little memory.
struct Group(std::path::PathBuf);

impl Group {
    fn new(bytes: u64) -> Result<Self> {
        let name = format!("drover-verdicts-{}", std::process::id());
        let version_1 = Path::new("/sys/fs/cgroup/memory");
        let (dir, limit) = match version_1.is_dir() {
            true => (version_1.join(name), "memory.limit_in_bytes"),
            false => (Path::new("/sys/fs/cgroup").join(name), "memory.max"),
        };
        std::fs::create_dir(&dir).context("making a control group takes root")?;
        let group = Self(dir);
        std::fs::write(group.0.join(limit), bytes.to_string())?;
        Ok(group)
    }

    /// The command, which joins the group first.
    fn holds(&self, command: Command) -> Command {
        let join = format!("echo $$ > '{}/cgroup.procs'; exec \"$@\"", self.0.display());
        around(command, &["sh", "-ec", &join, "sh"])
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        // Busy until the last process in it was reaped.
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}
