//! A builder process with a store of its own, spoken to over pipes by the protocol's real client.
//!
//! Scripts run in Debian's static busybox, which is both the sandbox's shell and an input store path with an applet
//! for every tool that they use. Without it these tests fail: `apt-get install busybox-static`.

#![allow(dead_code, clippy::unwrap_used)] // each test program uses its own part; all of it is tests

pub(crate) mod http;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use bstr::BString;
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Hash, Method, OutputName, PathInfo, Sha256, StoreDir,
    StorePath,
};
use drover_serve::{BuildOptions, BuildResult, Client};
use tempfile::TempDir;

pub(crate) const BUILDER: &str = env!("CARGO_BIN_EXE_drover-builder");
/// Who an ordinary user is where the tests run as root.
pub(crate) const NOBODY: u32 = 65534;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum User {
    Current,
    /// Not root, whoever runs the tests.
    Ordinary,
}

pub(crate) struct Builder {
    pub(crate) client: Option<Client<ChildStdout, ChildStdin>>,
    pub(crate) child: Child,
    pub(crate) root: TempDir,
    pub(crate) tools: StorePath,
    log: Log,
}

/// What a program writes to standard error, read as it comes.
pub(crate) struct Log {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Log {
    pub(crate) fn of(child: &mut Child) -> Self {
        let bytes = Arc::<Mutex<Vec<u8>>>::default();
        let (mut stderr, sink) = (child.stderr.take().unwrap(), Arc::clone(&bytes));
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut chunk) {
                sink.lock().unwrap().extend(&chunk[..count]);
            }
        });
        Self { bytes, reader: Some(reader) }
    }

    /// So far.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }

    /// All, when the program and what it started have closed it.
    pub(crate) fn finish(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        self.text()
    }
}

impl Builder {
    /// A new store, with the tools in it.
    pub(crate) fn start(user: User) -> Self {
        Self::start_with(user, &[])
    }

    pub(crate) fn start_with(user: User, args: &[&str]) -> Self {
        let (command, root) = Self::command(user, args);
        Self::start_command(command, root)
    }

    fn command(user: User, args: &[&str]) -> (Command, TempDir) {
        let root = TempDir::new().unwrap();
        let mut command = Command::new(BUILDER);
        command.args(["--serve", "--write", "--store", root.path().to_str().unwrap()]).args(args);
        if user == User::Ordinary && rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(root.path(), Some(NOBODY), Some(NOBODY)).unwrap();
            command.uid(NOBODY).gid(NOBODY);
        }
        (command, root)
    }

    /// Like a container of a pod that cannot nest namespaces: mounts, processes and a root directory of its own, a /proc
    /// with something masked. Only root of the machine has more than one id in there.
    pub(crate) fn start_in_pod(args: &[&str]) -> Self {
        const ENTER: &str = r#"
            nix=$1 builder=$2 root=$3; shift 3
            mount --make-rprivate /
            mount -t tmpfs -o mode=755 pod "$root"
            cd "$root"
            mkdir bin etc dev proc tmp usr lib lib64 nix old
            chmod 1777 tmp
            for dir in usr lib lib64; do [ ! -e "/$dir" ] || mount --rbind "/$dir" "$dir"; done
            mount --rbind /dev dev
            mount --rbind "$nix" nix
            mount -t proc proc proc
            mount --bind dev/null proc/version
            cp "$builder" bin/drover-builder
            cp "$(command -v busybox)" bin/busybox
            echo root:x:0:0:root:/:/bin/sh > etc/passwd
            pivot_root . old
            cd /
            /bin/busybox umount -l /old
            exec /bin/drover-builder --serve --write --store local "$@""#;
        let root = TempDir::new().unwrap();
        let (nix, pod) = (root.path().join("nix"), root.path().join("pod"));
        std::fs::create_dir(&nix).unwrap();
        std::fs::create_dir(&pod).unwrap();
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.arg("--map-root-user");
        }
        command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", ENTER, "sh"]);
        command.args([&nix, Path::new(BUILDER), &pod]).args(args);
        Self::start_command(command, root)
    }

    /// Under a filter that refuses this call. Those of container runtimes refuse pivot_root, whatever a container may else.
    pub(crate) fn start_filtered(user: User, refused: libc::c_long, args: &[&str]) -> Self {
        use seccompiler::{SeccompAction, SeccompFilter};
        let refused = [(refused, Vec::new())].into();
        let errno = SeccompAction::Errno(libc::EPERM.cast_unsigned());
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(refused, SeccompAction::Allow, errno, arch).unwrap();
        let program: seccompiler::BpfProgram = filter.try_into().unwrap();
        let (mut command, root) = Self::command(user, args);
        let apply = move || seccompiler::apply_filter(&program).map_err(std::io::Error::other);
        // SAFETY: two system calls on a program that is ready; nothing is allocated unless they fail.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(apply)
        };
        Self::start_command(command, root)
    }

    fn start_command(mut command: Command, root: TempDir) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Log::of(&mut child);
        let (stdout, stdin) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
        let mut client = Client::connect(stdout, stdin, StoreDir::default()).unwrap();
        let tools = add(&mut client, "tools", tools().path());
        Self { client: Some(client), child, root, tools, log }
    }

    pub(crate) fn client(&mut self) -> &mut Client<ChildStdout, ChildStdin> {
        self.client.as_mut().unwrap()
    }

    pub(crate) fn store_file(&self, path: &StorePath) -> PathBuf {
        self.root.path().join("nix/store").join(path.as_str())
    }

    /// Runs a script with the tools on its PATH.
    pub(crate) fn run(&mut self, script: &str) -> BuildResult {
        self.run_with(script, &BuildOptions::default())
    }

    pub(crate) fn run_with(&mut self, script: &str, options: &BuildOptions) -> BuildResult {
        let drv = self.derivation(script);
        self.build(&drv, options)
    }

    pub(crate) fn build(&mut self, drv: &BasicDerivation, options: &BuildOptions) -> BuildResult {
        let drv_path = path_for(&format!("{drv:?}"), &format!("{}.drv", drv.name));
        self.client().build_derivation(&drv_path, drv, options).unwrap()
    }

    /// [`derivation`] with this builder's tools.
    pub(crate) fn derivation(&self, script: &str) -> BasicDerivation {
        derivation(&self.tools, script)
    }

    /// One output that is fixed by a hash.
    pub(crate) fn fixed(&self, script: &str, method: Method, hash: Hash) -> BasicDerivation {
        let mut drv = self.derivation(script);
        let output = DerivationOutput::CaFixed(ContentAddress { method, hash });
        let path = output.path(&StoreDir::default(), &drv.name, &OutputName::out()).unwrap().unwrap();
        set(&mut drv, "out", &format!("/nix/store/{path}"));
        drv.outputs = [(OutputName::out(), output)].into();
        drv
    }

    /// What was written to standard error so far.
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

impl Drop for Builder {
    fn drop(&mut self) {
        self.client = None;
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        // Store objects are read-only even to their owner.
        drover_store::fs::delete(&self.root.path().join("nix")).unwrap();
    }
}

/// A script with the tools on its PATH and one input-addressed output.
pub(crate) fn derivation(tools: &StorePath, script: &str) -> BasicDerivation {
    let out = path_for(script, "test");
    let outputs = BTreeMap::from([(OutputName::out(), DerivationOutput::InputAddressed(out.clone()))]);
    let mut drv = BasicDerivation {
        name: "test".into(),
        outputs,
        input_srcs: [tools.clone()].into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-ec".into(), script.into()],
        env: BTreeMap::new(),
    };
    set(&mut drv, "PATH", &format!("/nix/store/{}/bin", tools));
    set(&mut drv, "out", &format!("/nix/store/{out}"));
    drv
}

pub(crate) fn set(drv: &mut BasicDerivation, key: &str, value: &str) {
    drv.env.insert(BString::from(key), BString::from(value));
}

pub(crate) fn out(drv: &BasicDerivation) -> StorePath {
    let output = &drv.outputs[&OutputName::out()];
    output.path(&StoreDir::default(), &drv.name, &OutputName::out()).unwrap().unwrap()
}

/// Some path that depends on `seed`.
pub(crate) fn path_for(seed: &str, name: &str) -> StorePath {
    StoreDir::default().make_path("output:out", Sha256::of(seed.as_bytes()), name).unwrap()
}

/// Adds a tree as a source.
pub(crate) fn add<R: Read, W: Write>(client: &mut Client<R, W>, name: &str, tree: &Path) -> StorePath {
    let mut nar = Vec::new();
    drover_store::fs::dump(tree, &mut nar).unwrap();
    let nar_hash = Sha256::of(&nar);
    let ca = ContentAddress { method: Method::Nar, hash: nar_hash.into() };
    let path = ca.store_path(&StoreDir::default(), name, &[].into(), false).unwrap();
    let info = PathInfo {
        path: path.clone(),
        nar_hash,
        nar_size: nar.len() as u64,
        references: [].into(),
        deriver: None,
        signatures: Vec::new(),
        ca: Some(ca),
    };
    client.add_to_store_nar(&info, &mut nar.as_slice()).unwrap();
    path
}

/// `bin/busybox` and a symlink for each applet.
pub(crate) fn tools() -> TempDir {
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
    let busybox = busybox.expect("busybox not found: apt-get install busybox-static");
    let dir = TempDir::new().unwrap();
    let bin = dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    // A temporary directory is its owner's alone, and the tree is what is added, its top included.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::copy(busybox, bin.join("busybox")).unwrap();
    let list = Command::new(busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
    }
    dir
}
