//! Whole sessions: inputs from a cache that real Nix filled, a build by real Nix and by Drover's own builder, outputs
//! into a cache that real Nix reads. All of them give what real Nix gives by itself.

use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use drover_cache::CacheOptions;
use drover_nix::derivation::aterm;
use drover_nix::{BasicDerivation, Derivation, Sha256, StoreDir, StorePath};
use drover_serve::BuildOptions;
use drover_session::{Event, Job, Outcome, Reason, Trust, all_outputs_in_cache, run};
use drover_tests::{Nix, Peer, program};

/// A derivation with two outputs that has another one and a source as inputs. The builder is a shell with nothing
/// but what is built in.
const CHAIN: &str = r#"
let
  source = builtins.toFile "source" "some text\n";
  make = attrs: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
  lib = make { name = "lib"; args = [ "-c" "read line < ${source}; echo $line from ${source} > $out" ]; };
in make {
  name = "user";
  outputs = [ "out" "dev" ];
  args = [ "-c" "read line < ${lib}; echo $line > $dev; echo $out uses $dev and ${lib}; echo $out $dev ${lib} > $out" ];
}
"#;

/// A store that real Nix filled, its cache, and the derivation to build, resolved.
pub(super) struct World {
    peer: Peer,
    dir: tempfile::TempDir,
    drv_path: StorePath,
    derivation: BasicDerivation,
    /// `out` as real Nix built it.
    out: StorePath,
}

impl World {
    pub(super) fn new(nix: Nix) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        for name in ["filled/nix", "inputs", "outputs", "spool"] {
            std::fs::create_dir_all(dir.path().join(name))?;
        }
        let peer = Peer::new(nix)?.with_at(&dir.path().join("filled/nix"), "/nix");
        let out = store_path(&peer.run("nix-build", &["--no-out-link", "-A", "out", "-E", CHAIN])?)?;
        let drv_path = store_path(&peer.run("nix-instantiate", &["-E", CHAIN])?)?;
        let store = dir.path().join("filled/nix/store");
        let read = |path: &StorePath| -> Result<Derivation> {
            let text = std::fs::read(store.join(path.as_str()))?;
            let name = path.derivation_name().context("no derivation")?;
            Ok(aterm::parse(&StoreDir::default(), name, &text)?)
        };
        let drv = read(&drv_path)?;
        let derivation = drv.resolve(&StoreDir::default(), |input, output| {
            let input = read(input).ok()?.basic;
            input.outputs.get(output)?.path(&StoreDir::default(), &input.name, output).ok()?
        })?;
        let this = Self { peer, dir, drv_path, derivation, out };
        // Only what the build needs goes into the cache: nothing of its outputs.
        this.copy_inputs("inputs")?;
        Ok(this)
    }

    pub(super) fn nix(&self, args: &[&str]) -> Result<String> {
        self.peer.run("nix", &[&["--extra-experimental-features", "nix-command"], args].concat())
    }

    /// By real Nix, into one of the caches.
    fn copy_inputs(&self, cache: &str) -> Result<()> {
        let (to, inputs) = (self.url(cache), self.derivation.input_srcs.iter().map(full).collect::<Vec<_>>());
        let mut args = vec!["copy", "--no-check-sigs", "--to", &to];
        args.extend(inputs.iter().map(String::as_str));
        self.nix(&args).map(drop)
    }

    pub(super) fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn url(&self, name: &str) -> String {
        format!("file://{}", self.path(name).display())
    }

    pub(super) fn job(&self) -> Result<Job> {
        let options = CacheOptions { require_signatures: false, ..CacheOptions::default() };
        Ok(Job {
            dir: StoreDir::default(),
            drv_path: self.drv_path.clone(),
            derivation: self.derivation.clone(),
            options: BuildOptions::default(),
            caches: vec![drover_cache::open(&self.url("inputs"), &options)?],
            push: Some(drover_cache::open(&self.url("outputs"), &options)?),
            signing_key: None,
            // Its paths follow from a chain of derivations, which is not in the cache unless a test puts it there.
            trust: Trust::Claimed,
            proven: Arc::default(),
            max_output_bytes: None,
            spool_dir: self.path("spool"),
            kept: Arc::default(),
        })
    }

    /// Checks that what is in the cache for outputs is what real Nix built.
    pub(super) fn check(&self, job: &Job, outcome: &Outcome) -> Result<()> {
        ensure!(outcome.outputs["out"].path == self.out);
        let transfer = &outcome.transfer;
        ensure!(
            transfer.paths_total == 2 && transfer.paths_fetched + transfer.paths_sent == 2,
            "{transfer:?}"
        );
        for (name, output) in &outcome.outputs {
            let path = full(&output.path);
            let hash: Sha256 = self.peer.run("nix-store", &["-q", "--hash", &path])?.trim().parse()?;
            ensure!(output.nar_hash == hash, "{name}: {} instead of {hash}", output.nar_hash);
            let references = self.peer.run("nix-store", &["-q", "--references", &path])?;
            let mut references = references.lines().map(store_path).collect::<Result<Vec<_>>>()?;
            references.sort();
            ensure!(output.references.iter().cloned().collect::<Vec<_>>() == references, "{name}");
        }
        // Real Nix takes it from there, into a store that has nothing. It wants the whole closure in one cache.
        self.copy_inputs("outputs")?;
        let (from, to) = (self.url("outputs"), self.path("received"));
        let to = to.to_string_lossy();
        self.nix(&["copy", "--no-check-sigs", "--from", &from, "--to", &to, &full(&self.out)])?;
        let again = all_outputs_in_cache(job)?.context("the outputs are in the cache")?;
        ensure!(again.outputs == outcome.outputs);
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in ["filled/nix", "received/nix", "server/nix"] {
            let _ = drover_store::fs::delete(&self.path(name));
        }
    }
}

fn full(path: &StorePath) -> String {
    StoreDir::default().full(path)
}

fn store_path(text: &str) -> Result<StorePath> {
    let line = text.lines().next().context("no path")?;
    // `nix-build -A out` appends nothing, `nix-instantiate` may append `!out`.
    Ok(StoreDir::default().parse(line.trim().split('!').next().unwrap_or(line).as_bytes())?)
}

/// One session with a server that `command` starts. Its log too.
pub(super) fn session(
    mut command: Command,
    job: &Job,
) -> Result<(Result<Outcome, drover_session::Failure>, Vec<Event>, String)> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stderr = child.stderr.take().context("no stderr")?;
    let log = thread::spawn(move || {
        let mut log = Vec::new();
        let _ = stderr.read_to_end(&mut log);
        String::from_utf8_lossy(&log).into_owned()
    });
    let (input, output) =
        (child.stdout.take().context("no stdout")?, child.stdin.take().context("no stdin")?);
    let mut events = Vec::new();
    let result = run(input, output, job, &mut |event| events.push(event));
    child.wait()?;
    Ok((result, events, log.join().expect("reading the log does not panic")))
}

/// Drover's own builder, with a store below `root`.
pub(super) fn own_builder(root: &Path) -> Result<Command> {
    let mut command = Command::new(program("drover-builder")?);
    command.args(["serve", "--write", "--store"]).arg(root);
    Ok(command)
}

#[test]
fn a_session_with_every_real_server() -> Result<()> {
    for nix in Nix::ALL {
        let world = World::new(nix)?;
        let at = world.path("server/nix");
        std::fs::create_dir_all(&at)?;
        let mut command = Peer::new(nix)?.with_at(&at, "/nix").command("nix-store")?;
        command.args(["--serve", "--write"]);
        let job = world.job()?;
        let (result, _, log) = session(command, &job)?;
        let outcome = result.with_context(|| format!("{nix:?}: {log}"))?;
        ensure!(log.contains("uses"), "{nix:?}: {log}");
        world.check(&job, &outcome).with_context(|| format!("{nix:?}"))?;
    }
    Ok(())
}

#[test]
fn a_session_with_our_own_builder() -> Result<()> {
    for nix in Nix::ALL {
        let world = World::new(nix)?;
        // With the `.drv` files in the cache nothing has to be believed.
        let (drv, to) = (full(&world.drv_path), world.url("inputs"));
        world.nix(&["copy", "--no-check-sigs", "--derivation", "--to", &to, &drv])?;
        let job = Job { trust: Trust::Verified, ..world.job()? };
        let (result, events, log) = session(own_builder(&world.path("server"))?, &job)?;
        let outcome = result.with_context(|| format!("{nix:?}: {log}"))?;
        ensure!(log.contains("uses"), "{nix:?}: {log}");
        ensure!(matches!(events.last(), Some(Event::OutputsCollected)));
        world.check(&job, &outcome).with_context(|| format!("{nix:?}"))?;
        // Real Nix finds nothing wrong with the store that our builder left.
        let peer = Peer::new(nix)?.with_at(&world.path("server/nix"), "/nix");
        peer.run("nix-store", &["--verify", "--check-contents"])?;
    }
    Ok(())
}

#[test]
fn sessions_that_fail() -> Result<()> {
    let world = World::new(Nix::V2_34)?;
    let fails = |change: &dyn Fn(&mut Job)| -> Result<(Reason, bool)> {
        let mut job = world.job()?;
        change(&mut job);
        let (result, _, log) = session(own_builder(&world.path("server"))?, &job)?;
        let failure = result.err().with_context(|| format!("it succeeds: {log}"))?;
        ensure!(std::fs::read_dir(world.path("spool"))?.next().is_none());
        Ok((failure.reason, failure.infrastructure))
    };
    let script =
        |script: &'static str| move |job: &mut Job| job.derivation.args = vec!["-c".into(), script.into()];
    ensure!(fails(&script("echo oh no; exit 3"))? == (Reason::BuildFailed, false));
    ensure!(fails(&script("echo one > $out"))? == (Reason::OutputRejected, false));
    let sleep = "while :; do echo x; read -t 1 line < /dev/tty || :; done";
    let timeout = |job: &mut Job| {
        script(sleep)(job);
        job.options.timeout_seconds = 1;
    };
    ensure!(fails(&timeout)? == (Reason::TimedOut, false));
    let silent = |job: &mut Job| {
        script("while :; do :; done")(job);
        job.options.max_silent_seconds = 1;
    };
    ensure!(fails(&silent)? == (Reason::MaxSilentExceeded, false));
    let log = |job: &mut Job| {
        script("while :; do echo some more; done")(job);
        job.options.max_log_bytes = 1000;
    };
    ensure!(fails(&log)? == (Reason::LogLimitExceeded, false));
    let missing = |job: &mut Job| {
        let absent = StorePath::from_parts([9; 20], "absent").expect("a valid name");
        job.derivation.input_srcs.insert(absent);
    };
    ensure!(fails(&missing)? == (Reason::InputMissing, false));
    let system = |job: &mut Job| job.derivation.system = "riscv64-linux".into();
    ensure!(fails(&system)? == (Reason::WrongSystem, false));
    ensure!(fails(&|job| job.max_output_bytes = Some(100))? == (Reason::OutputSizeLimitExceeded, false));
    ensure!(fails(&|job| job.trust = Trust::Verified)? == (Reason::PathNotProven, false));
    // A cache with a corrupt NAR.
    for entry in std::fs::read_dir(world.path("inputs/nar"))? {
        let path = entry?.path();
        let mut bytes = std::fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::remove_file(&path)?;
        std::fs::write(&path, bytes)?;
    }
    // A store that has them already asks no cache.
    let _ = drover_store::fs::delete(&world.path("server/nix"));
    ensure!(fails(&|_| ())? == (Reason::InputHashMismatch, false));
    Ok(())
}
