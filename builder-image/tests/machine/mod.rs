//! Builders on machines that lack something: a control group with little memory, a small disk. And what can be done to
//! their processes from outside.
//!
//! The protocol's real client speaks to them; what it reads is noted, so that tests can look at the very bytes.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use drover_nix::derivation::aterm;
use drover_nix::{
    BasicDerivation, ContentAddress, Derivation, DerivationOutput, Hash, Method, OutputName, PathInfo,
    Sha256, StoreDir, StorePath,
};
use drover_serve::{BuildOptions, BuildResult, Client};
use rustix::process::Pid;
use tempfile::TempDir;

use super::common::{self, BUILDER, Log, NOBODY, User, path_for, set};

const PATIENCE: Duration = Duration::from_secs(30);

/// What a builder runs on.
pub(crate) enum Machine {
    Plain,
    /// A control group that may have so much.
    Memory {
        bytes: u64,
    },
    /// A tmpfs with these options as its store's disk, and perhaps another one for the builds' directories.
    Disk {
        store: &'static str,
        builds: Option<&'static str>,
    },
}

pub(crate) struct Session {
    client: Option<Client<Tap, ChildStdin>>,
    child: Child,
    root: TempDir,
    tools: StorePath,
    heard: Arc<Mutex<Vec<u8>>>,
    log: Log,
    _group: Option<Group>,
}

/// Notes what passes.
pub(crate) struct Tap {
    inner: ChildStdout,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Read for Tap {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.heard.lock().unwrap().extend(&buffer[..count]);
        Ok(count)
    }
}

impl Session {
    pub(crate) fn start(machine: &Machine, user: User) -> Self {
        let root = TempDir::new().unwrap();
        let (mut command, group) = command(machine, user, root.path());
        command.args([BUILDER, "--serve", "--write", "--store"]).arg(root.path());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (heard, log) = (Arc::<Mutex<Vec<u8>>>::default(), Log::of(&mut child));
        let output = Tap { inner: child.stdout.take().unwrap(), heard: Arc::clone(&heard) };
        let client = Client::connect(output, child.stdin.take().unwrap(), StoreDir::default());
        let mut client = client.unwrap_or_else(|error| {
            panic!("{error}: {}", log.text());
        });
        let tools = common::add(&mut client, "tools", common::tools().path());
        Self { client: Some(client), child, root, tools, heard, log, _group: group }
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn client(&mut self) -> &mut Client<Tap, ChildStdin> {
        self.heard.lock().unwrap().clear();
        self.client.as_mut().unwrap()
    }

    /// What was read since the last command was sent, as the protocol's words.
    pub(crate) fn words(&self) -> Vec<u64> {
        let heard = self.heard.lock().unwrap();
        heard.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }

    /// The first word of the last answer: for BuildDerivation, the status.
    pub(crate) fn number(&self) -> u64 {
        self.words()[0]
    }

    pub(crate) fn derivation(&self, script: &str) -> BasicDerivation {
        common::derivation(&self.tools, script)
    }

    /// One whose output is fixed, by a hash that no script here comes to.
    pub(crate) fn fixed(&self, script: &str) -> BasicDerivation {
        self.fixed_as("test", script)
    }

    fn fixed_as(&self, name: &str, script: &str) -> BasicDerivation {
        let mut drv = self.derivation(script);
        drv.name = name.into();
        let ca = ContentAddress { method: Method::Flat, hash: Hash::from(Sha256::of(script.as_bytes())) };
        let path = ca.store_path(&StoreDir::default(), &drv.name, &[].into(), false).unwrap();
        set(&mut drv, "out", &format!("/nix/store/{path}"));
        drv.outputs = [(OutputName::out(), DerivationOutput::CaFixed(ca))].into();
        drv
    }

    pub(crate) fn run(&mut self, script: &str) -> BuildResult {
        self.run_with(script, &BuildOptions::default())
    }

    pub(crate) fn run_with(&mut self, script: &str, options: &BuildOptions) -> BuildResult {
        let drv = self.derivation(script);
        self.build(&drv, options)
    }

    pub(crate) fn build(&mut self, drv: &BasicDerivation, options: &BuildOptions) -> BuildResult {
        self.client().build_derivation(&drv_path(drv), drv, options).unwrap()
    }

    /// Builds, and does something meanwhile.
    pub(crate) fn build_while(&mut self, drv: &BasicDerivation, act: impl FnOnce(&Self)) -> BuildResult {
        let mut client = self.client.take().unwrap();
        let (result, client) = std::thread::scope(|scope| {
            let building = scope.spawn(move || {
                let result = client.build_derivation(&drv_path(drv), drv, &BuildOptions::default());
                (result, client)
            });
            act(self);
            building.join().unwrap()
        });
        self.client = Some(client);
        result.unwrap()
    }

    /// The one process of this builder that watches over builds.
    pub(crate) fn helper(&self) -> Pid {
        self.find("the helper", |process| {
            process.parent == self.child.id() && process.words.iter().any(|word| word == "sandbox-child")
        })
    }

    /// The first process of this derivation's build.
    pub(crate) fn builder_of(&self, drv: &BasicDerivation) -> Pid {
        let helper = self.helper().as_raw_nonzero().get().unsigned_abs();
        let script = drv.args.last().unwrap().to_string();
        self.find("the builder", |process| process.parent == helper && process.words.contains(&script))
    }

    /// A process with this command line, of this session's.
    pub(crate) fn process_of(&self, command_line: &str) -> Pid {
        let words: Vec<&str> = command_line.split(' ').collect();
        let helper = self.helper().as_raw_nonzero().get().unsigned_abs();
        self.find(command_line, |process| {
            let parent = Process::read(process.parent);
            process.words == words && parent.is_some_and(|parent| parent.parent == helper)
        })
    }

    fn find(&self, what: &str, matches: impl Fn(&Process) -> bool) -> Pid {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
            let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
            if let Some(found) = pids.filter_map(Process::read).find(&matches) {
                return Pid::from_raw(found.pid.cast_signed()).unwrap();
            }
            assert!(Instant::now() < deadline, "{what} does not run: {}", self.log());
            std::thread::yield_now();
        }
    }

    /// Adds a program of nothing but this machine code.
    pub(crate) fn add_program(&mut self, code: &[u8]) -> StorePath {
        use std::os::unix::fs::PermissionsExt as _;
        let file = self.root.path().join("program");
        std::fs::write(&file, elf(code)).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        common::add(self.client(), "program", &file)
    }

    /// Adds the `.drv` file of a script, which has another one's output for an input.
    pub(crate) fn add_derivation(
        &mut self,
        name: &str,
        script: &str,
        input: Option<&StorePath>,
    ) -> StorePath {
        let dir = StoreDir::default();
        let basic = self.fixed_as(name, script);
        let outputs = [OutputName::out()].into();
        let input_drvs: BTreeMap<_, _> = input.map(|path| (path.clone(), outputs)).into_iter().collect();
        let tools = basic.input_srcs.clone();
        let text = aterm::print(&dir, &Derivation { basic, input_drvs }).unwrap();
        let references = tools.into_iter().chain(input.cloned()).collect();
        let ca = ContentAddress { method: Method::Text, hash: Sha256::of(&text).into() };
        let path = ca.store_path(&dir, &format!("{name}.drv"), &references, false).unwrap();
        let mut writer = drover_nix::nar::Writer::new(Vec::new());
        writer.file_bytes(false, &text).unwrap();
        let nar = writer.finish().unwrap();
        let info = PathInfo {
            path: path.clone(),
            nar_hash: Sha256::of(&nar),
            nar_size: nar.len() as u64,
            references,
            deriver: None,
            signatures: Vec::new(),
            ca: Some(ca),
        };
        self.client().add_to_store_nar(&info, &mut nar.as_slice()).unwrap();
        path
    }

    pub(crate) fn log(&self) -> String {
        self.log.text()
    }

    /// Ends the session and waits for the program. All of its log.
    pub(crate) fn finish(&mut self) -> String {
        self.client = None;
        self.child.wait().unwrap();
        self.log.finish()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.client = None;
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        // Its disk went with it, if that was a small one.
        let _left = drover_store::fs::delete(&self.root.path().join("nix"));
    }
}

fn drv_path(drv: &BasicDerivation) -> StorePath {
    path_for(&format!("{drv:?}"), &format!("{}.drv", drv.name))
}

/// What starts the program that is named next, on such a machine.
fn command(machine: &Machine, user: User, root: &Path) -> (Command, Option<Group>) {
    let is_root = rustix::process::geteuid().is_root();
    let other = user == User::Ordinary && is_root;
    let owner = if other { NOBODY } else { rustix::process::geteuid().as_raw() };
    std::os::unix::fs::chown(root, Some(owner), None).unwrap();
    match machine {
        Machine::Plain => {
            let mut command = Command::new("env");
            if other {
                command.uid(NOBODY).gid(NOBODY);
            }
            (command, None)
        }
        Machine::Memory { bytes } => {
            let group = Group::new(*bytes);
            let script = "echo $$ > \"$1\"; shift; exec \"$@\"";
            let mut command = Command::new("sh");
            command.args(["-ec", script, "sh"]).arg(group.dir.join("cgroup.procs"));
            command.args(demoted(other));
            (command, Some(group))
        }
        Machine::Disk { store, builds } => {
            let script = "mount -t tmpfs -o \"$2\" tmpfs \"$1\"; mkdir -p \"$1/nix/var/nix/builds\"; \
                          [ -z \"$3\" ] || mount -t tmpfs -o \"$3\" tmpfs \"$1/nix/var/nix/builds\"; \
                          chmod 755 \"$1\" \"$1/nix/var/nix/builds\"; [ \"$4\" = 0 ] || chown -R \"$4\" \"$1\"; \
                          shift 4; exec \"$@\"";
            let mut command = Command::new("unshare");
            // A mount namespace of its own, in which an ordinary user is root as well.
            command.args(if is_root {
                vec!["--mount"]
            } else {
                vec!["--user", "--map-root-user", "--mount"]
            });
            command.args(["sh", "-ec", script, "sh"]).arg(root).args([store, builds.unwrap_or("")]);
            command.arg(if other { NOBODY.to_string() } else { "0".into() }).args(demoted(other));
            (command, None)
        }
    }
}

/// Makes the program that follows one of an ordinary user's.
fn demoted(other: bool) -> Vec<String> {
    let id = NOBODY.to_string();
    let words = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"];
    if other { words.map(str::to_owned).into() } else { vec!["env".into()] }
}

/// A control group with a limit on memory.
struct Group {
    dir: PathBuf,
}

impl Group {
    fn new(bytes: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(
            rustix::process::geteuid().is_root(),
            "making a control group with a memory limit takes root"
        );
        let name = format!("drover-ends-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let version_1 = Path::new("/sys/fs/cgroup/memory");
        let (dir, limit, swap) = if version_1.is_dir() {
            (version_1.join(name), "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        } else {
            let all = Path::new("/sys/fs/cgroup");
            std::fs::write(all.join("cgroup.subtree_control"), "+memory").unwrap();
            (all.join(name), "memory.max", "memory.swap.max")
        };
        std::fs::create_dir(&dir).unwrap();
        let group = Self { dir };
        std::fs::write(group.dir.join(limit), bytes.to_string()).unwrap();
        // Not there where swap is not counted.
        let without_swap = if swap.contains("memsw") { bytes.to_string() } else { "0".into() };
        let _no_swap = std::fs::write(group.dir.join(swap), without_swap);
        group
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        // It is busy until the last process in it was reaped.
        while std::fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

struct Process {
    pid: u32,
    parent: u32,
    words: Vec<String>,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let stat = std::fs::read_to_string(dir.join("stat")).ok()?;
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        let line = std::fs::read(dir.join("cmdline")).ok()?;
        let words = line.strip_suffix(b"\0")?.split(|byte| *byte == 0);
        let words = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        Some(Self { pid, parent, words })
    }
}

/// A static program for this machine that begins with these instructions, as small as the kernel takes it.
fn elf(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // An executable for x86-64.
    [2, 62].iter().for_each(|half: &u16| file.extend(half.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    [BASE + HEADERS, 64, 0].iter().for_each(|word| file.extend(word.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    [64, 56, 1, 64, 0, 0].iter().for_each(|half: &u16| file.extend(half.to_le_bytes()));
    // One segment, all of the file, readable and executable.
    [1u32, 5].iter().for_each(|half| file.extend(half.to_le_bytes()));
    [0, BASE, BASE, size, size, 0x1000].iter().for_each(|word: &u64| file.extend(word.to_le_bytes()));
    file.extend(code);
    file
}
