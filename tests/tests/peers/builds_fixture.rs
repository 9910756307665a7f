//! Sessions whose builds the tests can hold, let go and look at from outside.

use std::collections::BTreeMap;
use std::io::{Read as _, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Method, OutputName, PathInfo, Sha256, StoreDir,
    StorePath,
};
use drover_serve::{BuildOptions, BuildResult, Client};
use drover_store::{Access, LocalStore, StoreLayout};
use drover_tests::{Nix, Peer, program};

/// What the design says a session may take to end.
pub(crate) const A_SECOND: Duration = Duration::from_secs(1);
/// Longest wait for what does come.
const PATIENCE: Duration = Duration::from_secs(40);

/// A store, looked at from outside.
pub(crate) struct Store {
    root: tempfile::TempDir,
}

impl Store {
    pub(crate) fn new() -> Result<Self> {
        let root = tempfile::tempdir()?;
        std::fs::create_dir(root.path().join("nix"))?;
        Ok(Self { root })
    }

    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.root.path().join(inside)
    }

    pub(crate) fn open(&self) -> Result<LocalStore> {
        Ok(LocalStore::open(StoreLayout::in_root(self.root.path()), Access::ReadOnly)?)
    }

    /// A Nix that has this store for its own.
    pub(crate) fn nix(&self) -> Result<Peer> {
        Ok(Peer::new(Nix::V2_34)?.with_at(&self.path("nix"), "/nix"))
    }

    /// A command that serves this store by Drover.
    pub(crate) fn drover(&self, options: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("drover-builder")?);
        command.args(["serve", "--write", "--store"]).arg(self.root.path()).args(options);
        Ok(command)
    }

    /// Lets every build that [`hold`]s go on, whoever started it.
    pub(crate) fn let_go(&self) -> Result<()> {
        for top in std::fs::read_dir(self.path("nix/var/nix/builds"))? {
            // Where the builder works: inside a sandbox the directory is one level deeper.
            let top = top?.path();
            for dir in [top.join("build"), top] {
                if dir.is_dir() {
                    std::fs::write(dir.join("go"), "")?;
                }
            }
        }
        Ok(())
    }

    /// Nothing of a build is left: no lock, no scratch, no half of an output; and Nix finds the store in order.
    pub(crate) fn expect_clean(&self) -> Result<()> {
        let store = self.open()?;
        for entry in std::fs::read_dir(self.path("nix/store"))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let valid = name.parse().is_ok_and(|path| store.is_valid(&path).unwrap_or(false));
            ensure!(name == ".links" || valid, "{name} was left in the store");
        }
        for dir in ["builds", "temproots"] {
            let dir = self.path("nix/var/nix").join(dir);
            let left = std::fs::read_dir(&dir).map_or(0, Iterator::count);
            ensure!(left == 0, "{left} entries were left in {}", dir.display());
        }
        // It knows of git's hashes only if it is told to.
        let mut nix = self.nix()?.command("nix-store")?;
        nix.args(["--verify", "--check-contents"]);
        xtask::run::stdout(nix.env("NIX_CONFIG", "extra-experimental-features = git-hashing"))?;
        Ok(())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = drover_store::fs::delete(&self.path("nix"));
    }
}

/// The session's input. Closing it is for whoever has a copy, even while another thread waits for an answer.
#[derive(Clone)]
pub(crate) struct Input(Arc<Mutex<Option<ChildStdin>>>);

impl Input {
    pub(crate) fn close(&self) {
        self.0.lock().expect("nobody panics with it").take();
    }
}

impl Write for Input {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut stdin = self.0.lock().expect("nobody panics with it");
        stdin.as_mut().ok_or(std::io::ErrorKind::BrokenPipe)?.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Whether standard error is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    Follows,
    Stalls,
}

/// A running server with a client.
pub(crate) struct Session {
    pub(crate) client: Option<Client<ChildStdout, Input>>,
    pub(crate) input: Input,
    child: Child,
    log: Arc<Mutex<Vec<u8>>>,
}

/// A request that waits for its answer.
pub(crate) type Answer = JoinHandle<Result<BuildResult, drover_serve::Error>>;

impl Session {
    pub(crate) fn start(mut command: Command, reader: Reader) -> Result<Self> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let log = Arc::new(Mutex::new(Vec::new()));
        if reader == Reader::Follows {
            let (mut stderr, sink) = (child.stderr.take().context("no stderr")?, Arc::clone(&log));
            std::thread::spawn(move || {
                let mut chunk = [0; 4096];
                while let Ok(count @ 1..) = stderr.read(&mut chunk) {
                    sink.lock().expect("nobody panics with it").extend(&chunk[..count]);
                }
            });
        }
        let input = Input(Arc::new(Mutex::new(Some(child.stdin.take().context("no stdin")?))));
        let output = child.stdout.take().context("no stdout")?;
        let client = Some(Client::connect(output, input.clone(), StoreDir::default())?);
        Ok(Self { client, input, child, log })
    }

    pub(crate) fn client(&mut self) -> Result<&mut Client<ChildStdout, Input>> {
        self.client.as_mut().context("the client is busy")
    }

    /// Asks for a build in a thread of its own, which has the client from now on.
    pub(crate) fn build(&mut self, drv: &Drv, options: &BuildOptions) -> Result<Answer> {
        let mut client = self.client.take().context("the client is busy")?;
        let (drv, options) = (drv.clone(), options.clone());
        Ok(std::thread::spawn(move || client.build_derivation(&drv.path, &drv.drv, &options)))
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&self.log.lock().expect("nobody panics with it")).into_owned()
    }

    /// Waits for a text in what the session says.
    pub(crate) fn says(&self, text: &str) -> Result<()> {
        eventually(&format!("the session says {text:?}"), || self.log().contains(text))
    }

    /// The program's process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How the program ended, and how long that took.
    pub(crate) fn wait(&mut self) -> Result<(ExitStatus, Duration)> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok((status, begin.elapsed()));
            }
            ensure!(begin.elapsed() < PATIENCE, "the session does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Closes the session's input. It has to end within a second, with success or not.
    pub(crate) fn end(mut self, success: bool) -> Result<String> {
        self.client = None;
        self.input.close();
        let (status, took) = self.wait()?;
        ensure!(status.success() == success, "{status}: {}", self.log());
        ensure!(took <= A_SECOND, "the session took {took:?} to end: {}", self.log());
        Ok(self.log())
    }

    pub(crate) fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A derivation without inputs that has the shell only.
#[derive(Clone)]
pub(crate) struct Drv {
    pub(crate) path: StorePath,
    pub(crate) drv: BasicDerivation,
    /// Part of its builder's command line and nobody else's.
    pub(crate) marker: String,
}

impl Drv {
    pub(crate) fn new(name: &str, script: &str) -> Result<Self> {
        let dir = StoreDir::default();
        let marker = format!("mark-{name}-{}", std::process::id());
        let script = format!(": {marker}; {script}");
        let seed = Sha256::of(script.as_bytes());
        let out = dir.make_path("output:out", seed, name)?;
        let drv = BasicDerivation {
            name: name.into(),
            outputs: [(OutputName::out(), DerivationOutput::InputAddressed(out.clone()))].into(),
            input_srcs: [].into(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: vec!["-ec".into(), script.into()],
            env: BTreeMap::from([("out".into(), dir.full(&out).into())]),
        };
        Ok(Self { path: dir.make_path("text", seed, &format!("{name}.drv"))?, drv, marker })
    }

    /// With a directory of tools, which is to be in the store.
    pub(crate) fn with_tools(mut self, tools: &StorePath) -> Self {
        self.drv.env.insert("PATH".into(), format!("/nix/store/{tools}/bin").into());
        self.drv.input_srcs.insert(tools.clone());
        self
    }

    pub(crate) fn out(&self) -> StorePath {
        match &self.drv.outputs[&OutputName::out()] {
            DerivationOutput::InputAddressed(path) => path.clone(),
            other => unreachable!("{other:?}"),
        }
    }

    /// How many processes of its builder there are.
    pub(crate) fn processes(&self) -> usize {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
        let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
        lines.filter(|line| String::from_utf8_lossy(line).contains(&self.marker)).count()
    }

    pub(crate) fn runs(&self) -> Result<()> {
        eventually("the build runs", || self.processes() > 0)
    }

    pub(crate) fn is_gone(&self) -> Result<()> {
        ensure!(self.processes() == 0, "{} processes of the build still run", self.processes());
        Ok(())
    }
}

/// Shell that waits until [`Store::let_go`]. What it reads is its own terminal, which says nothing.
pub(crate) fn hold() -> &'static str {
    "echo holding; while [ ! -e go ]; do read -t 1 nothing <&1 || :; done"
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        ensure!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
    Ok(())
}

/// Adds a directory whose `bin` has busybox under the names of these applets.
pub(crate) fn add_tools(session: &mut Session, applets: &[&str]) -> Result<StorePath> {
    let tree = tempfile::tempdir()?;
    std::fs::set_permissions(tree.path(), std::fs::Permissions::from_mode(0o755))?;
    let bin = tree.path().join("bin");
    std::fs::create_dir(&bin)?;
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
    std::fs::copy(
        busybox.context("busybox not found: apt-get install busybox-static")?,
        bin.join("busybox"),
    )?;
    for applet in applets {
        std::os::unix::fs::symlink("busybox", bin.join(applet))?;
    }
    add_tree(session, tree.path())
}

/// Adds a directory as a source of the name `tools`.
pub(crate) fn add_tree(session: &mut Session, tree: &Path) -> Result<StorePath> {
    let mut nar = Vec::new();
    drover_store::fs::dump(tree, &mut nar)?;
    let nar_hash = Sha256::of(&nar);
    let ca = ContentAddress { method: Method::Nar, hash: nar_hash.into() };
    let path = ca.store_path(&StoreDir::default(), "tools", &[].into(), false)?;
    let info = PathInfo {
        path: path.clone(),
        nar_hash,
        nar_size: nar.len() as u64,
        references: [].into(),
        deriver: None,
        signatures: Vec::new(),
        ca: Some(ca),
    };
    session.client()?.add_to_store_nar(&info, &mut nar.as_slice())?;
    Ok(path)
}
