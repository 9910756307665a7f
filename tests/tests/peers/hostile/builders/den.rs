//! A store, canaries around it, a builder that serves it as root or as an ordinary user, and the attacks that run in its
//! sandbox. At the end everything is looked at: files, processes, and what real Nix says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Hash, Method, OutputName, PathInfo, Sha256, StoreDir,
    StorePath,
};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, Client};
use drover_store::{Access, LocalStore, StoreLayout};
use drover_tests::{Nix, Peer, program};
use xtask::{checkout, run};

use crate::builds_fixture::{Input, Reader, Session, eventually};

/// Who an ordinary user is, and who is nobody's friend: neither the store's owner nor any build.
const ORDINARY: u32 = 65534;
pub(super) const STRANGER: u32 = 44444;
/// The first of the ids that builds run under where root serves the store.
const POOL: std::ops::Range<u32> = 30001..30129;

/// How long a session may take to end. A second is what is asked for, and tested, on a machine that does nothing else.
const SOON: Duration = Duration::from_secs(10);

/// Who serves the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum User {
    Root,
    Ordinary,
}

pub(super) const USERS: [User; 2] = [User::Root, User::Ordinary];

type Connection = Client<ChildStdout, Input>;

pub(super) struct Den {
    pub(super) user: User,
    dir: tempfile::TempDir,
    session: Session,
    /// The input that has the attacks.
    attacks: StorePath,
    before: Snapshot,
    marks: Vec<String>,
}

impl Drop for Den {
    fn drop(&mut self) {
        // Store objects are read-only even to their owner.
        let _ = drover_store::fs::delete(&self.root());
    }
}

/// A build that runs an attack.
#[derive(Clone)]
pub(super) struct Attack {
    pub(super) path: StorePath,
    pub(super) drv: BasicDerivation,
}

/// A build that is waited for elsewhere.
pub(super) struct Pending(JoinHandle<(Connection, Result<BuildResult, drover_serve::Error>)>);

/// Kind and mode, owner, inode, time of change, and content, of everything but the database and locks.
type Snapshot = BTreeMap<PathBuf, (u32, (u32, u32), u64, i64, Vec<u8>)>;

impl Den {
    pub(super) fn new(user: User) -> Result<Self> {
        Self::with(user, &[], &[])
    }

    /// With options of the builder, and words before its command line that start it in some other way.
    pub(super) fn with(user: User, options: &[&str], launcher: &[&str]) -> Result<Self> {
        let dir = arena(user)?;
        Self::in_dir(user, dir, options, launcher)
    }

    /// Served by a process whose session has a key, as those of people who have logged in have.
    pub(super) fn with_key(user: User) -> Result<Self> {
        let attacks = attacks()?.join("bin/attack");
        Self::with(user, &[], &[attacks.to_str().context("UTF-8")?, "launch", "with-key"])
    }

    pub(super) fn in_dir(
        user: User,
        dir: tempfile::TempDir,
        options: &[&str],
        launcher: &[&str],
    ) -> Result<Self> {
        let mut words: Vec<String> = launcher.iter().map(ToString::to_string).collect();
        words.push(program("drover-builder")?.to_str().context("UTF-8")?.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["serve", "--write", "--store"]).arg(dir.path().join("root"));
        command.args(options);
        if user == User::Ordinary {
            command.uid(ORDINARY).gid(ORDINARY);
        }
        let mut session = Session::start(command, Reader::Follows)?;
        let attacks = add(session.client()?, "attacks", &attacks()?)?;
        let mut den = Self { user, dir, session, attacks, before: Snapshot::new(), marks: Vec::new() };
        den.before = den.snapshot()?;
        Ok(den)
    }

    /// Looks at everything again, since the test itself has changed something.
    pub(super) fn remember(&mut self) -> Result<()> {
        self.before = self.snapshot()?;
        Ok(())
    }

    pub(super) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// A directory beside the store, with a file in it, that everybody may write to and nobody should.
    pub(super) fn canary(&self) -> PathBuf {
        self.dir.path().join("canary")
    }

    pub(super) fn state(&self, name: &str) -> PathBuf {
        self.root().join("nix/var/nix").join(name)
    }

    pub(super) fn object(&self, path: &StorePath) -> PathBuf {
        self.root().join("nix/store").join(path.as_str())
    }

    pub(super) fn open(&self) -> Result<LocalStore> {
        Ok(LocalStore::open(StoreLayout::in_root(self.root()), Access::ReadOnly)?)
    }

    /// The server's process.
    pub(super) fn server(&self) -> u32 {
        self.session.id()
    }

    /// Who owns the store.
    pub(super) fn owner(&self) -> u32 {
        if self.user == User::Root { 0 } else { ORDINARY }
    }

    /// The uids of this machine that a build may have.
    pub(super) fn build_uids(&self) -> std::ops::Range<u32> {
        if self.user == User::Root { POOL } else { ORDINARY..ORDINARY + 1 }
    }

    /// Runs `attack WORDS…` with one input-addressed output.
    pub(super) fn attack(&mut self, words: &[&str]) -> Result<Attack> {
        static COUNTER: AtomicUsize = AtomicUsize::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let mark = format!("drover-attack-{}-{number}-end", std::process::id());
        let dir = StoreDir::default();
        let seed = Sha256::of(mark.as_bytes());
        // A name of its own: fixed outputs of the same hash shall be different paths.
        let name = format!("attack-{number}");
        let out = dir.make_path("output:out", seed, &name)?;
        let mut args = vec![mark.clone().into()];
        args.extend(words.iter().map(|word| (*word).into()));
        let mut attack = Attack {
            path: dir.make_path("text", seed, &format!("{name}.drv"))?,
            drv: BasicDerivation {
                name,
                outputs: [(OutputName::out(), DerivationOutput::InputAddressed(out.clone()))].into(),
                input_srcs: [self.attacks.clone()].into(),
                system: "x86_64-linux".into(),
                builder: format!("{}/bin/attack", dir.full(&self.attacks)).into(),
                args,
                env: BTreeMap::new(),
            },
        };
        attack.set("out", &dir.full(&out));
        attack.set("server", &self.server().to_string());
        attack.set("victim", self.canary().to_str().context("UTF-8")?);
        self.marks.push(mark);
        Ok(attack)
    }

    /// The same with an output that is fixed by a hash, and therefore with the network.
    pub(super) fn fixed(&mut self, words: &[&str], method: Method, hash: Hash) -> Result<Attack> {
        let mut attack = self.attack(words)?;
        let output = DerivationOutput::CaFixed(ContentAddress { method, hash });
        let path = output
            .path(&StoreDir::default(), &attack.drv.name, &OutputName::out())?
            .context("it is fixed")?;
        attack.set("out", &StoreDir::default().full(&path));
        attack.drv.outputs = [(OutputName::out(), output)].into();
        Ok(attack)
    }

    pub(super) fn build(&mut self, attack: &Attack) -> Result<BuildResult> {
        self.build_with(attack, &BuildOptions::default())
    }

    pub(super) fn build_with(&mut self, attack: &Attack, options: &BuildOptions) -> Result<BuildResult> {
        Ok(self.session.client()?.build_derivation(&attack.path, &attack.drv, options)?)
    }

    /// Builds, and demands that it works.
    pub(super) fn built(&mut self, attack: &Attack) -> Result<()> {
        let result = self.build(attack)?;
        ensure!(result.status == BuildStatus::Built, "{:?}: {result:?}\n{}", self.user, self.log());
        Ok(())
    }

    /// Builds in the background; one at a time.
    pub(super) fn start(&mut self, attack: &Attack, options: &BuildOptions) -> Result<Pending> {
        let mut client = self.session.client.take().context("the client is busy")?;
        let (attack, options) = (attack.clone(), options.clone());
        Ok(Pending(std::thread::spawn(move || {
            let result = client.build_derivation(&attack.path, &attack.drv, &options);
            (client, result)
        })))
    }

    pub(super) fn join(&mut self, pending: Pending) -> Result<BuildResult> {
        let (client, result) = pending.0.join().map_err(|_| anyhow!("the client panicked"))?;
        self.session.client = Some(client);
        Ok(result?)
    }

    /// The build directory of the one build that runs, from outside.
    pub(super) fn build_dir(&self) -> Result<PathBuf> {
        let mut tops = fs::read_dir(self.state("builds"))?.map(|entry| Ok(entry?.path()));
        let top: Result<PathBuf> = tops.next().context("no build runs")?;
        ensure!(tops.next().is_none(), "several builds run");
        Ok(top?.join("build"))
    }

    /// Lets a build that is `ready` go on.
    pub(super) fn let_go(&self) -> Result<()> {
        let go = self.build_dir()?.join("go");
        fs::write(&go, "")?;
        // As if it were the builder's own, or at least its server's.
        Ok(std::os::unix::fs::chown(&go, Some(self.owner()), None)?)
    }

    /// The processes of all attacks.
    pub(super) fn processes(&self) -> Vec<u32> {
        let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            self.marks.iter().any(|mark| line.contains(mark.as_str()))
        })
        .collect()
    }

    pub(super) fn says(&self, text: &str) -> Result<()> {
        self.session.says(text)
    }

    pub(super) fn log(&self) -> String {
        self.session.log()
    }

    /// What became of each attempt so far, once `over` is said.
    pub(super) fn attempts(&self) -> Result<BTreeMap<String, String>> {
        self.says("over\n")?;
        let log = self.log();
        let lines = log.lines().filter_map(|line| line.trim().strip_prefix("attempt "));
        lines
            .map(|line| {
                let (name, result) = line.rsplit_once(": ").with_context(|| format!("odd line {line:?}"))?;
                Ok((name.to_owned(), result.to_owned()))
            })
            .collect()
    }

    /// Of at least `count` attempts none has worked, but for those named.
    pub(super) fn none_worked(&self, count: usize, but: &[&str]) -> Result<()> {
        let attempts = self.attempts()?;
        ensure!(attempts.len() >= count, "only {} attempts were made: {}", attempts.len(), self.log());
        let worked: Vec<_> = attempts.iter().filter(|(_, result)| *result == "worked").collect();
        let worked: Vec<&str> = worked.into_iter().map(|(name, _)| name.as_str()).collect();
        ensure!(worked == but, "as {:?}, these worked: {worked:?}", self.user);
        Ok(())
    }

    /// Another build in the same session, which has to work as if nothing had been.
    pub(super) fn next_build_works(&mut self) -> Result<()> {
        let next = self.attack(&["nothing"])?;
        self.built(&next).context("the next build")?;
        ensure!(fs::read(self.object(&next.out()))? == b"nothing\n");
        Ok(())
    }

    /// The next build works; the session ends at once, and nothing of any build is left but valid paths.
    pub(super) fn check(mut self) -> Result<()> {
        self.next_build_works()?;
        self.end(true)
    }

    /// Goes away in the middle: the session has to end soon all the same, and nothing is left either.
    pub(super) fn hang_up(self) -> Result<()> {
        self.end(false)
    }

    fn end(mut self, success: bool) -> Result<()> {
        self.session.client = None;
        self.session.input.close();
        let (status, took) = self.session.wait()?;
        ensure!(status.success() == success, "{:?}: {status}: {}", self.user, self.log());
        ensure!(took < SOON, "{:?}: the session took {took:?} to end: {}", self.user, self.log());
        let root = self.root();
        let remains = Remains { user: self.user, root: &root, top: self.dir.path(), marks: &self.marks };
        remains.check(&self.before).with_context(|| format!("{:?}", self.user))
    }

    fn snapshot(&self) -> Result<Snapshot> {
        snapshot(self.dir.path())
    }
}

impl Pending {
    /// Waits for an answer that is not to come.
    pub(super) fn failed(self) -> bool {
        self.0.join().is_ok_and(|(_, result)| result.is_err())
    }
}

impl Attack {
    pub(super) fn set(&mut self, key: &str, value: &str) {
        self.drv.env.insert(key.into(), value.into());
    }

    pub(super) fn out(&self) -> StorePath {
        let output = &self.drv.outputs[&OutputName::out()];
        let path = output.path(&StoreDir::default(), &self.drv.name, &OutputName::out());
        path.ok().flatten().expect("attacks have known outputs")
    }

    /// Adds a second output and returns its path; the attack sees it as `second`.
    pub(super) fn second(&mut self) -> Result<StorePath> {
        let seed = Sha256::of(self.path.as_str().as_bytes());
        let path =
            StoreDir::default().make_path("output:second", seed, &format!("{}-second", self.drv.name))?;
        self.drv.outputs.insert("second".parse()?, DerivationOutput::InputAddressed(path.clone()));
        self.set("second", &StoreDir::default().full(&path));
        Ok(path)
    }
}

/// What is there when all is over.
struct Remains<'a> {
    user: User,
    top: &'a Path,
    root: &'a Path,
    marks: &'a [String],
}

impl Remains<'_> {
    fn check(&self, before: &Snapshot) -> Result<()> {
        self.no_processes()?;
        let store = LocalStore::open(StoreLayout::in_root(self.root), Access::ReadOnly)?;
        let valid = store.all_valid_paths()?;
        let state = self.root.join("nix/var/nix");
        for dir in ["builds", "temproots"] {
            let left: Vec<_> = fs::read_dir(state.join(dir)).into_iter().flatten().flatten().collect();
            ensure!(left.is_empty(), "left in {dir}: {left:?}");
        }
        let after = snapshot(self.top)?;
        for (path, was) in before {
            ensure!(
                after.get(path) == Some(was),
                "{} was {was:?} and is {:?}",
                path.display(),
                after.get(path)
            );
        }
        let objects = self.root.join("nix/store");
        for (path, (mode, owner, ..)) in after.iter().filter(|(path, _)| !before.contains_key(*path)) {
            let shown = path.display();
            if let Ok(inside) = path.strip_prefix(&objects) {
                let name = inside.iter().next().and_then(|name| name.to_str()).unwrap_or_default();
                let known = name.parse().is_ok_and(|path: StorePath| valid.contains(&path));
                ensure!(known || name == ".links", "{shown} was left in the store");
                let attributes = rustix::fs::llistxattr(path, &mut [0; 4096][..]);
                ensure!(matches!(attributes, Ok(0)), "{shown} has extended attributes: {attributes:?}");
            } else {
                ensure!(path.starts_with(&state), "{shown} is new");
            }
            let link = mode & 0o170_000 == 0o120_000;
            ensure!(link || mode & 0o6022 == 0, "{shown} has mode {mode:o}");
            let uid = if self.user == User::Root { 0 } else { ORDINARY };
            ensure!(owner.0 == uid, "{shown} belongs to {}", owner.0);
        }
        self.verify()
    }

    fn no_processes(&self) -> Result<()> {
        for entry in fs::read_dir("/proc")?.filter_map(Result::ok) {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let ours = self.marks.iter().any(|mark| line.contains(mark.as_str()));
            ensure!(!ours, "a process is left: {:?} {line:?}", entry.file_name());
        }
        Ok(())
    }

    /// What real Nix says of the store.
    fn verify(&self) -> Result<()> {
        let root = self.root.to_str().context("temporary directories are UTF-8")?;
        let mut command = Peer::new(Nix::V2_34)?.command("nix-store")?;
        let output = command.args(["--store", root, "--verify", "--check-contents"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{said}");
        let expected = [
            "reading the Nix store...",
            "checking path existence...",
            "checking link hashes...",
            "checking store hashes...",
        ];
        for line in said.lines().filter(|line| !line.is_empty()) {
            ensure!(expected.contains(&line), "nix-store --verify: {line}");
        }
        Ok(())
    }
}

/// A directory that everybody can get to, with a store's root and a canary in it.
pub(super) fn arena(user: User) -> Result<tempfile::TempDir> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "these tests take root: they look at builds as several users and from outside"
    );
    // Real Nix, which judges the store in the end, sees `/tmp`.
    let dir = tempfile::Builder::new().prefix("drover-den-").tempdir_in("/tmp")?;
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
    furnish(dir.path(), user)?;
    Ok(dir)
}

/// Makes the store's root and the canary.
pub(super) fn furnish(dir: &Path, user: User) -> Result<()> {
    let (root, canary) = (dir.join("root"), dir.join("canary"));
    fs::create_dir(&root)?;
    if user == User::Ordinary {
        std::os::unix::fs::chown(&root, Some(ORDINARY), Some(ORDINARY))?;
    }
    fs::create_dir(&canary)?;
    fs::write(canary.join("file"), "untouched")?;
    fs::set_permissions(canary.join("file"), Permissions::from_mode(0o666))?;
    fs::set_permissions(&canary, Permissions::from_mode(0o777))?;
    Ok(())
}

fn snapshot(top: &Path) -> Result<Snapshot> {
    let mut snapshot = Snapshot::new();
    let mut queue = vec![top.to_owned()];
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            // These change with everyone who works with the store; sessions' roots are looked for by themselves.
            let changing = ["db", "gc.lock", "temproots"].map(|name| Path::new("nix/var/nix").join(name));
            if changing.iter().any(|name| path.ends_with(name)) {
                continue;
            }
            let meta = fs::symlink_metadata(&path)?;
            let kind = meta.file_type();
            let content = if kind.is_symlink() {
                fs::read_link(&path)?.into_os_string().into_encoded_bytes()
            } else if kind.is_file() {
                Sha256::of(&fs::read(&path)?).to_string().into_bytes()
            } else {
                Vec::new()
            };
            let mut time = meta.mtime();
            if kind.is_dir() {
                if !path.parent().is_some_and(|parent| parent.ends_with("nix/store")) {
                    // Entries come and go; those that stay are compared themselves.
                    time = 0;
                }
                // What lies deeper than a path can say is real Nix's to look at.
                if path.as_os_str().len() < 3500 {
                    queue.push(path.clone());
                }
            }
            snapshot.insert(path, (meta.mode(), (meta.uid(), meta.gid()), meta.ino(), time, content));
        }
    }
    Ok(snapshot)
}

/// Adds a tree as a source.
pub(super) fn add(client: &mut Connection, name: &str, tree: &Path) -> Result<StorePath> {
    let mut nar = Vec::new();
    drover_store::fs::dump(tree, &mut nar)?;
    let nar_hash = Sha256::of(&nar);
    let ca = ContentAddress { method: Method::Nar, hash: nar_hash.into() };
    let path = ca.store_path(&StoreDir::default(), name, &[].into(), false)?;
    let info = PathInfo {
        path: path.clone(),
        nar_hash,
        nar_size: nar.len() as u64,
        references: BTreeSet::new(),
        deriver: None,
        signatures: Vec::new(),
        ca: Some(ca),
    };
    client.add_to_store_nar(&info, &mut nar.as_slice())?;
    Ok(path)
}

/// A directory with `bin/attack`, compiled once for all tests.
fn attacks() -> Result<PathBuf> {
    static MADE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    MADE.get_or_init(|| compile().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|error| anyhow!(error))
}

fn compile() -> Result<PathBuf> {
    let tree = checkout().join("target/attacks");
    let (program, new) = (tree.join("bin/attack"), tree.with_extension(std::process::id().to_string()));
    fs::create_dir_all(tree.join("bin"))?;
    // Static, since a sandbox has no libraries.
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition=2024", "-Dwarnings", "-Copt-level=1", "-Cpanic=abort", "-Cstrip=symbols"]);
    rustc.args(["-Ctarget-feature=+crt-static", "-o"]).arg(&new);
    run::run(rustc.arg(checkout().join("tests/attacks/main.rs")))?;
    fs::rename(&new, &program)?;
    Ok(tree)
}

/// What a process of another user's says: `sh -c SCRIPT` under this uid and gid, with no other group.
pub(super) fn as_user(uid: u32, gid: u32, script: &str) -> Result<String> {
    let mut command = Command::new("setpriv");
    command.args([
        &format!("--reuid={uid}"),
        &format!("--regid={gid}"),
        "--clear-groups",
        "sh",
        "-c",
        script,
    ]);
    let output = command.output()?;
    if !output.status.success() {
        bail!("{script}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Waits until the den's attacks have no process any more.
pub(super) fn gone(den: &Den) -> Result<()> {
    eventually("all processes are gone", || den.processes().is_empty())
}
