//! What the tests of one store with two implementations share: stores of their own, real Nix and the builder on them,
//! archives of every kind, and the last word, which is real Nix's.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, anyhow, ensure};
use drover_nix::{PathInfo, Sha256, StoreDir, StorePath, nar};
use drover_serve::Client;
use drover_store::{Access, Added, LocalStore, StoreLayout};
use drover_tests::{Nix, Peer, program};

/// A directory for a store, which goes with its read-only trees. It lies below `/tmp`, where real Nix sees it as well.
pub(crate) struct Root(tempfile::TempDir);

impl Root {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    /// One in memory, where there is memory for it: for tests that make very many files, or are about time.
    pub(crate) fn in_memory() -> Result<Self> {
        const ENOUGH: u64 = 1 << 30;
        // Real Nix sees it, too, with all of `/dev`.
        let memory = Path::new("/dev/shm");
        match rustix::fs::statvfs(memory) {
            Ok(stat) if stat.f_bavail * stat.f_frsize > ENOUGH => Ok(Self(tempfile::tempdir_in(memory)?)),
            _ => Self::new(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn text(&self) -> String {
        self.path().to_string_lossy().into_owned()
    }

    /// A file below `nix/var/nix`.
    pub(crate) fn state(&self, name: &str) -> PathBuf {
        self.path().join("nix/var/nix").join(name)
    }

    /// Where an object lies.
    pub(crate) fn object(&self, path: &StorePath) -> PathBuf {
        self.path().join("nix/store").join(path.as_str())
    }

    pub(crate) fn store(&self, access: Access) -> Result<LocalStore> {
        Ok(LocalStore::open(StoreLayout::in_root(self.path()), access)?)
    }

    /// A command of `drover-builder` on this store.
    pub(crate) fn builder(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("drover-builder")?);
        command.args(args).arg("--store").arg(self.path());
        Ok(command)
    }

    /// A session with `drover-builder serve --write` on this store.
    pub(crate) fn drover_session(&self) -> Result<Session> {
        Session::start(self.builder(&["serve", "--write", "--sandbox-shell", "/bin/busybox"])?)
    }

    /// A session with real `nix-store --serve --write` on this store.
    pub(crate) fn nix_session(&self, peer: &Peer) -> Result<Session> {
        let mut command = peer.command("nix-store")?;
        command.args(["--serve", "--write", "--store", &self.text()]);
        Session::start(command)
    }

    /// An expression: a derivation with two outputs and a source, one that uses it, and what only Nix's own tests would
    /// think of: names that are no UTF-8, a symlink to nowhere, an executable, an empty directory. Every root has paths of
    /// its own, since what a process anywhere on the machine has in its environment is a root for every collector.
    pub(crate) fn chain(&self) -> String {
        CHAIN.replace("SALT", &self.text())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = drover_store::fs::delete(&self.path().join("nix"));
    }
}

const CHAIN: &str = r#"
let
  source = builtins.toFile "source" "some text for SALT\n";
  make = attrs: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
  lib = make {
    name = "lib";
    outputs = [ "out" "dev" ];
    args = [ "-c" ''
      mkdir $out $dev $out/empty
      echo ${source} $out > $out/text
      echo $out > $dev/back
      printf '#!/bin/sh\n' > $out/run
      chmod 755 $out/run
      ln -s /no/where $out/link
      echo odd > $out/$(printf '\377')
    '' ];
    PATH = "/bin:/usr/bin";
  };
in make {
  name = "user";
  args = [ "-c" "echo ${lib} > $out" ];
}
"#;

/// A store that real Nix made and filled with the root's chain, and the path of what was built last.
pub(crate) fn filled_by_nix(peer: &Peer) -> Result<(Root, StorePath)> {
    let root = Root::new()?;
    let out = build_chain(peer, &root)?;
    Ok((root, out))
}

/// Has real Nix build the root's chain in its store.
pub(crate) fn build_chain(peer: &Peer, root: &Root) -> Result<StorePath> {
    // As its own /nix: in a store elsewhere the builds would need a sandbox and a shell to put there.
    std::fs::create_dir_all(root.path().join("nix"))?;
    let out = with_nix(peer, root).run("nix-build", &["--no-out-link", "-E", &root.chain()])?;
    Ok(out.trim().rsplit('/').next().context("no output")?.parse()?)
}

/// The Nix with the store at `/nix`, where it may build.
pub(crate) fn with_nix(peer: &Peer, root: &Root) -> Peer {
    peer.clone().with_at(&root.path().join("nix"), "/nix")
}

/// Copies everything, references first.
pub(crate) fn copy_all(from: &LocalStore, to: &LocalStore) -> Result<()> {
    let mut left = from.all_valid_paths()?;
    while !left.is_empty() {
        let ready: Vec<StorePath> = left
            .iter()
            .filter(|path| {
                from.path_info(path).is_ok_and(|info| {
                    info.is_some_and(|info| {
                        info.other_references().all(|reference| !left.contains(reference))
                    })
                })
            })
            .cloned()
            .collect();
        ensure!(!ready.is_empty(), "the references run in a circle: {left:?}");
        for path in ready {
            let registration = from.registration(&path)?.context("it was valid")?;
            let mut nar = Vec::new();
            from.dump(&path, &mut nar)?;
            let time = registration.registration_time;
            let added = to.add_nar(&registration.info, registration.ultimate, time, &mut &nar[..])?;
            ensure!(added == Added::Imported);
            left.remove(&path);
        }
    }
    Ok(())
}

/// A session with a server on a store: ours or Nix's.
pub(crate) struct Session {
    pub(crate) client: Client<ChildStdout, ChildStdin>,
    pub(crate) child: Child,
    log: JoinHandle<String>,
}

/// What is left when a session has ended.
pub(crate) struct Ended {
    pub(crate) success: bool,
    pub(crate) log: String,
}

impl Session {
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut stderr = child.stderr.take().context("no stderr")?;
        // Read all the time, or a server that writes a long log stops.
        let log = thread::spawn(move || {
            let mut log = Vec::new();
            let _ = stderr.read_to_end(&mut log);
            String::from_utf8_lossy(&log).into_owned()
        });
        let (input, output) = (child.stdout.take(), child.stdin.take());
        let (input, output) = (input.context("no stdout")?, output.context("no stdin")?);
        match Client::connect(input, output, StoreDir::default()) {
            Ok(client) => Ok(Self { client, child, log }),
            Err(error) => {
                child.wait()?;
                Err(anyhow!("{error}: {}", log.join().unwrap_or_default()))
            }
        }
    }

    /// Ends it, which has to succeed.
    pub(crate) fn end(self) -> Result<()> {
        let ended = self.finish()?;
        ensure!(ended.success, "the session ends badly: {}", ended.log);
        Ok(())
    }

    /// Waits for its end, which has to be a bad one, and gives what it said.
    pub(crate) fn end_badly(self) -> Result<String> {
        let ended = self.finish()?;
        ensure!(!ended.success, "the session ends well: {}", ended.log);
        Ok(ended.log)
    }

    /// Closes the client's side and waits for the end, whatever it is.
    pub(crate) fn finish(self) -> Result<Ended> {
        let Self { client, mut child, log } = self;
        drop(client);
        let success = child.wait()?.success();
        let log = log.join().map_err(|_| anyhow!("reading the log panicked"))?;
        Ok(Ended { success, log })
    }

    /// Ends its process with SIGKILL. What the client finds out then is its business.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

/// One file as an archive.
pub(crate) fn file_nar(content: &[u8]) -> Result<Vec<u8>> {
    let mut writer = nar::Writer::new(Vec::new());
    writer.file_bytes(false, content)?;
    Ok(writer.finish()?)
}

/// What an archive is imported as: a path that nothing proves, as most of those in a store.
pub(crate) fn info(name: &str, nar: &[u8], references: &[&StorePath]) -> Result<PathInfo> {
    let nar_hash = Sha256::of(nar);
    let mut seed = [nar_hash.to_hex().as_bytes(), name.as_bytes()].concat();
    references.iter().for_each(|path| seed.extend_from_slice(path.as_str().as_bytes()));
    Ok(PathInfo {
        path: StoreDir::default().make_path("test", Sha256::of(&seed), name)?,
        nar_hash,
        nar_size: nar.len() as u64,
        references: references.iter().map(|path| (*path).clone()).collect(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    })
}

/// Real Nix finds nothing wrong with the store, contents included, and neither does Drover. Nix only mumbles about a path
/// that is missing, so what it says counts, too.
pub(crate) fn verify(peer: &Peer, root: &Root) -> Result<()> {
    let findings = findings_of_nix(peer, root)?;
    ensure!(findings.is_empty(), "{:?} finds {findings:?}", peer.version());
    let report = root.store(Access::ReadOnly)?.verify(true)?;
    ensure!(report.problems.is_empty(), "{:?}", report.problems);
    Ok(())
}

/// The lines in which `nix-store --verify --check-contents` says what is wrong, and that it failed.
pub(crate) fn findings_of_nix(peer: &Peer, root: &Root) -> Result<Vec<String>> {
    let args = ["--verify", "--check-contents", "--store", &root.text()];
    let mut command = peer.command("nix-store")?;
    if peer.version() == Nix::V2_34 {
        // What it may find in a store; older ones do not know the word.
        command.env("NIX_CONFIG", "extra-experimental-features = git-hashing\n");
    }
    let output = command.args(args).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let progress = [
        "reading the",
        "checking path existence",
        "checking link hashes",
        "checking hashes",
        "checking store hashes",
    ];
    let is_progress = |line: &&str| line.is_empty() || progress.iter().any(|start| line.starts_with(start));
    let mut findings: Vec<String> =
        text.lines().filter(|line| !is_progress(line)).map(str::to_owned).collect();
    if !output.status.success() && findings.is_empty() {
        findings.push(output.status.to_string());
    }
    Ok(findings)
}

/// No lock, no temporary root and no scratch is left. (Of a collector's socket Nix itself leaves the name.)
pub(crate) fn no_leftovers(root: &Root) -> Result<()> {
    let names = |dir: PathBuf| -> Result<BTreeSet<String>> {
        if !dir.exists() {
            return Ok(BTreeSet::new());
        }
        let entries = std::fs::read_dir(dir)?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let objects = names(root.path().join("nix/store"))?;
    let valid = root.store(Access::ReadOnly)?.all_valid_paths()?;
    let stray: Vec<&String> = objects
        .iter()
        .filter(|name| {
            *name != ".links" && name.parse::<StorePath>().map_or(true, |path| !valid.contains(&path))
        })
        .collect();
    ensure!(stray.is_empty(), "left in the store: {stray:?}");
    ensure!(names(root.state("temproots"))?.is_empty(), "temporary roots are left");
    Ok(())
}

/// A program that is killed with its guard, and can be held where it stands.
pub(crate) struct Running {
    child: Child,
    /// Both standard output and standard error, which nobody reads until it has ended.
    log: std::fs::File,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        let log = tempfile::tempfile()?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?).spawn()?;
        Ok(Self { child, log })
    }

    /// Holds it, all its threads, until [`Self::go_on`]. False if it has ended.
    pub(crate) fn hold(&mut self) -> Result<bool> {
        self.signal(rustix::process::Signal::STOP)?;
        let stopped = || -> Result<bool> {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
            Ok(stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['T', 'Z'])))
        };
        wait_until("it is held", stopped)?;
        Ok(self.child.try_wait()?.is_none())
    }

    pub(crate) fn go_on(&self) -> Result<()> {
        self.signal(rustix::process::Signal::CONT)
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end, which has to be a good one.
    pub(crate) fn end(mut self) -> Result<String> {
        use std::os::unix::fs::FileExt as _;
        let status = self.child.wait()?;
        let mut log = vec![0; usize::try_from(self.log.metadata()?.len())?];
        self.log.read_exact_at(&mut log, 0)?;
        let log = String::from_utf8_lossy(&log).into_owned();
        ensure!(status.success(), "it ends with {status}: {log}");
        Ok(log)
    }

    fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        Ok(rustix::process::kill_process(pid, signal)?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks again and again, for half a minute at most.
pub(crate) fn wait_until(what: &str, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = std::time::Instant::now();
    while !ready()? {
        ensure!(start.elapsed().as_secs() < 30, "waited in vain until {what}");
        thread::sleep(std::time::Duration::from_millis(1));
    }
    Ok(())
}
