//! A directory with a store in it and something beside it that must not change, and builders that serve that store.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use drover_nix::{PathInfo, Sha256, StorePath};
use drover_store::{Access, LocalStore, StoreLayout};
use drover_tests::{Nix, Peer, program};

/// Memory that a builder may allocate, in KiB: what `ulimit -d` counts. Its threads' stacks are in it.
const DATA_LIMIT: u64 = 128 << 10;
/// After so long a process that should have ended by itself is taken for wedged.
const WEDGED: Duration = Duration::from_secs(20);

pub(super) struct Arena {
    dir: tempfile::TempDir,
    builder: PathBuf,
    pub(super) store: LocalStore,
}

/// How a builder ended.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) status: ExitStatus,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
    /// From the end of its input to its own.
    pub(super) took: Duration,
}

/// All that there is on disk but the database's own files: what it is, its mode, and its content.
pub(super) type Snapshot = BTreeMap<PathBuf, (u32, Vec<u8>)>;

impl Arena {
    pub(super) fn new() -> Result<Self> {
        // Real Nix, which judges the store in the end, sees `/tmp`.
        let dir = tempfile::Builder::new().prefix("drover-hostile-").tempdir_in("/tmp")?;
        let canary = dir.path().join("canary");
        fs::create_dir(&canary)?;
        fs::write(canary.join("file"), "untouched")?;
        fs::set_permissions(canary.join("file"), fs::Permissions::from_mode(0o666))?;
        let store = LocalStore::open(StoreLayout::in_root(dir.path().join("root")), Access::ReadWrite)?;
        Ok(Self { dir, builder: program("drover-builder")?, store })
    }

    /// A directory beside the store, which everybody may write to and nobody should.
    pub(super) fn canary(&self) -> PathBuf {
        self.dir.path().join("canary")
    }

    pub(super) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Where store objects are.
    pub(super) fn objects(&self) -> &Path {
        &self.store.layout().real_store_dir
    }

    /// A builder that may write. Its memory is limited: what a peer claims must not be believed.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("ulimit -d {DATA_LIMIT}; exec \"$@\""), "sh"]).arg(&self.builder);
        command.args(["--serve", "--write", "--sandbox-shell", "/bin/busybox", "--store"]).arg(self.root());
        command
    }

    pub(super) fn start(&self) -> Result<Builder> {
        let mut command = self.command();
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Ok(Builder::from(child))
    }

    /// Sends `input`, closes, and waits for the end.
    pub(super) fn run(&self, input: &[u8]) -> Result<Outcome> {
        self.start()?.finish(input)
    }

    /// Adds a path as the store itself would.
    pub(super) fn add(&self, path: &StorePath, nar: &[u8], references: &[&StorePath]) -> Result<PathInfo> {
        let info = PathInfo {
            path: path.clone(),
            nar_hash: Sha256::of(nar),
            nar_size: nar.len() as u64,
            references: references.iter().copied().cloned().collect(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        self.store.add_nar(&info, false, 0, &mut &nar[..])?;
        Ok(info)
    }

    /// Everything below the arena, store and canary alike.
    pub(super) fn snapshot(&self) -> Result<Snapshot> {
        let mut snapshot = Snapshot::new();
        self.walk(self.dir.path(), &mut snapshot)?;
        Ok(snapshot)
    }

    /// Fails unless everything on disk is as it was.
    pub(super) fn check_unchanged(&self, before: &Snapshot) -> Result<()> {
        let after = self.snapshot()?;
        let differs = |path: &&PathBuf| before.get(*path) != after.get(*path);
        let changed: BTreeSet<&PathBuf> = before.keys().chain(after.keys()).filter(differs).collect();
        ensure!(changed.is_empty(), "changed on disk: {changed:?}");
        Ok(())
    }

    /// Fails unless exactly what is valid lies in the store, and no lock, scratch or root of a process that is gone.
    pub(super) fn check_clean(&self) -> Result<BTreeSet<StorePath>> {
        let valid = self.store.all_valid_paths()?;
        let mut names = names(self.objects())?;
        names.remove(".links");
        let expected: BTreeSet<String> = valid.iter().map(ToString::to_string).collect();
        ensure!(names == expected, "in the store lie {names:?}, valid are {expected:?}");
        let state = &self.store.layout().state_dir;
        let own = std::process::id().to_string();
        for (dir, allowed) in [("temproots", Some(&own)), ("builds", None)] {
            let left = names_if_there(&state.join(dir))?;
            ensure!(left.iter().all(|name| Some(name) == allowed), "in {dir} are left {left:?}");
        }
        Ok(valid)
    }

    /// What real Nix says of the store.
    pub(super) fn verify(&self) -> Result<()> {
        let root = self.root();
        let root = root.to_str().context("temporary directories are UTF-8")?;
        let mut command = Peer::new(Nix::V2_34)?.command("nix-store")?;
        let output = command.args(["--store", root, "--verify", "--check-contents"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{said}");
        for complaint in ["error", "warning", "disappeared", "not valid", "modified"] {
            ensure!(!said.contains(complaint), "{said}");
        }
        Ok(())
    }

    fn walk(&self, dir: &Path, snapshot: &mut Snapshot) -> Result<()> {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let meta = fs::symlink_metadata(&path)?;
            let content = if meta.is_symlink() {
                fs::read_link(&path)?.into_os_string().into_encoded_bytes()
            } else if meta.is_dir() {
                self.walk(&path, snapshot)?;
                Vec::new()
            } else if path.starts_with(self.store.layout().state_dir.join("db")) {
                continue;
            } else {
                fs::read(&path)?
            };
            snapshot.insert(path, (meta.mode(), content));
        }
        Ok(())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Trees in a store are read-only, which an ordinary removal stumbles over.
        let _ = drover_store::fs::delete(&self.root());
    }
}

/// A running builder; killed when this is dropped before its end.
pub(super) struct Builder {
    child: Option<Child>,
}

impl From<Child> for Builder {
    fn from(child: Child) -> Self {
        Self { child: Some(child) }
    }
}

impl Builder {
    pub(super) fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("it has not ended")
    }

    /// Writes; a builder that does not want any more is no error.
    pub(super) fn send(&mut self, input: &[u8]) -> Result<()> {
        let stdin = self.child().stdin.as_mut().context("closed already")?;
        match stdin.write_all(input).and_then(|()| stdin.flush()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
            _ => Ok(()),
        }
    }

    pub(super) fn receive(&mut self, count: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.child().stdout.as_mut().context("closed already")?.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn receive_u(&mut self) -> Result<u64> {
        let bytes = self.receive(8)?;
        Ok(bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)))
    }

    pub(super) fn receive_s(&mut self) -> Result<Vec<u8>> {
        let length = usize::try_from(self.receive_u()?)?;
        let mut bytes = self.receive(length.next_multiple_of(8))?;
        bytes.truncate(length);
        Ok(bytes)
    }

    /// Status and message of a build result of protocol 2.7; the rest of it is read too.
    pub(super) fn receive_build_result(&mut self) -> Result<(u64, String)> {
        let (status, message) = (self.receive_u()?, self.receive_s()?);
        self.receive(32)?;
        for _ in 0..2 * self.receive_u()? {
            self.receive_s()?;
        }
        Ok((status, String::from_utf8(message)?))
    }

    /// Reads the log up to and including a line that has this in it.
    pub(super) fn wait_for_log(&mut self, text: &str) -> Result<String> {
        let stderr = self.child().stderr.as_mut().context("closed already")?;
        let (mut seen, mut byte) = (Vec::new(), [0]);
        loop {
            ensure!(stderr.read(&mut byte)? == 1, "the log ended: {}", String::from_utf8_lossy(&seen));
            seen.push(byte[0]);
            if byte[0] == b'\n' && String::from_utf8_lossy(&seen).contains(text) {
                return Ok(String::from_utf8_lossy(&seen).into_owned());
            }
        }
    }

    pub(super) fn close_stdout(&mut self) {
        self.child().stdout = None;
    }

    /// Sends the rest, closes standard input, and waits. Both outputs are read meanwhile, if they are still open.
    pub(super) fn finish(mut self, input: &[u8]) -> Result<Outcome> {
        let mut child = self.child.take().context("it has ended")?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (status, took, stdout, stderr) = std::thread::scope(|scope| -> Result<_> {
            let stdout = scope.spawn(|| read_all(stdout));
            let stderr = scope.spawn(|| read_all(stderr));
            if let Some(mut stdin) = stdin {
                // A builder that refuses what it has read so far does not read the rest.
                let _ = stdin.write_all(input);
            }
            let closed = Instant::now();
            let status = wait(&mut child)?;
            let took = closed.elapsed();
            Ok((status, took, stdout.join().expect("reading"), stderr.join().expect("reading")))
        })?;
        Ok(Outcome { status, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned(), took })
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Outcome {
    /// A clean end, with nothing to say.
    pub(super) fn expect_clean(&self) -> Result<()> {
        ensure!(self.status.success() && self.stderr.is_empty(), "{:?}: {}", self.status, self.stderr);
        Ok(())
    }

    /// An end with exit code 1 and one line on standard error, which says why.
    pub(super) fn expect_refusal(&self) -> Result<()> {
        ensure!(self.status.code() == Some(1), "it ends with {:?}: {}", self.status, self.stderr);
        let line = self.stderr.strip_suffix('\n').context("standard error does not end with a line")?;
        ensure!(line.starts_with("drover-builder: ") && !line.contains('\n'), "not one line: {line:?}");
        let last = line.rsplit(": ").next().unwrap_or_default();
        ensure!(line.matches(last).count() == 1 || last.len() < 10, "it says {last:?} twice: {line:?}");
        ensure!(line.chars().all(|c| !c.is_control()), "control characters reach the terminal: {line:?}");
        Ok(())
    }
}

fn read_all(stream: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Killing the process ends it too.
    let _ = stream.map(|mut stream| stream.read_to_end(&mut bytes));
    bytes
}

fn wait(child: &mut Child) -> Result<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if start.elapsed() > WEDGED {
            let threads = threads(child.id());
            child.kill()?;
            bail!("it is still there {} s after the end of its input: {threads}", WEDGED.as_secs());
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// What each thread of a process waits for in the kernel.
fn threads(process: u32) -> String {
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lines = tasks.map(|task| {
        let file = |name: &str| read(task.path().join(name));
        format!("\n{} waits in {:?}: {}", file("comm"), file("wchan"), file("syscall"))
    });
    lines.collect()
}

fn names(dir: &Path) -> Result<BTreeSet<String>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn names_if_there(dir: &Path) -> Result<BTreeSet<String>> {
    if dir.exists() { names(dir) } else { Ok(BTreeSet::new()) }
}
