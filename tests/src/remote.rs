//! A real Nix client, and Drover's builder as its `ssh://` store. A host named `localhost` makes Nix start the remote
//! program itself, without SSH.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use xtask::parts::rootfs;

use crate::{Nix, Peer, Sshd, program};

/// How long a builder may take to end after its client.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A Nix with a store of its own at `/nix`, and builders with stores elsewhere. Everything goes when this is dropped.
pub struct Remote {
    peer: Peer,
    dir: tempfile::TempDir,
    builder: PathBuf,
    recordings: Option<PathBuf>,
    /// NIX_SSHOPTS.
    ssh_options: String,
}

impl Remote {
    /// A client with an empty store, and a builder named `server` that has none yet.
    pub fn new(nix: Nix) -> Result<Self> {
        Self::make(nix, None)
    }

    /// As [`Self::new`]; what passes between client and builders is kept in this directory, which the client must see:
    /// it lies below `/tmp`. Each session leaves `NAME-NUMBER.requests` and `NAME-NUMBER.answers`.
    pub fn recording(nix: Nix, into: &Path) -> Result<Self> {
        Self::make(nix, Some(into.to_owned()))
    }

    fn make(nix: Nix, recordings: Option<PathBuf>) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let client = dir.path().join("client/nix");
        std::fs::create_dir_all(&client)?;
        let builder = program("drover-builder")?;
        // Seen inside: the program itself, and a shell for builds, which goes by its file name.
        std::fs::copy("/bin/busybox", dir.path().join("busybox"))?;
        // Nix 2.8 starts programs on `localhost` by bash, which its root filesystem has not; any shell will do.
        std::fs::create_dir(dir.path().join("bin"))?;
        let peer = Peer::new(nix)?.with_at(&client, "/nix").with(&builder);
        let this = Self { peer, dir, builder, recordings, ssh_options: String::new() };
        script(&this.path("bin/bash"), "exec /bin/sh \"$@\"\n")?;
        this.server("server", &[])?;
        Ok(this)
    }

    /// The URI of another builder, with a store in the directory of this name and these options.
    pub fn server(&self, name: &str, options: &[&str]) -> Result<String> {
        let options = options.iter().map(|option| format!(" '{option}'")).collect::<String>();
        let run = self.builder_command(name, "\"$@\"") + &options;
        let text = match &self.recordings {
            None => format!("exec {run}\n"),
            Some(into) => {
                let file = format!("{}/{name}-$$", into.display());
                // Not `exec`: the shell waits for all three, and what they wrote is complete when it ends.
                format!("tee {file}.requests | {run} | tee {file}.answers\n")
            }
        };
        script(&self.path(name).with_extension("sh"), &text)?;
        Ok(self.uri(name))
    }

    /// The `ssh://` URI of the builder of this name.
    pub fn uri(&self, name: &str) -> String {
        format!("ssh://localhost?remote-program={}", self.path(name).with_extension("sh").display())
    }

    /// Makes the builder of this name what a program of this Nix finds when it looks for `nix-store` to serve: the host
    /// `localhost`, without a URI. Only for that: `nix-store` itself is another program from here on.
    pub fn install_as_nix_store(&self, name: &str) -> Result<()> {
        let real = "for dir in /usr/local/bin /usr/bin; do [ -x $dir/nix-store ] && exec $dir/nix-store \"$@\"; done";
        let builder = self.path(name).with_extension("sh");
        let choose = format!("[ \"$1\" = --serve ] && exec {} \"$@\"\n{real}\n", builder.display());
        script(&self.path("bin/nix-store"), &choose)
    }

    /// What the builder of this name is started with, as one word for a shell after the other: the program, then options.
    pub fn builder_command(&self, name: &str, arguments: &str) -> String {
        let (root, builder) = (self.dir.path().display(), self.builder.display());
        format!("{builder} {arguments} --store {root}/{name} --sandbox-shell {root}/busybox")
    }

    /// From here on the client has `ssh`, which knows this server and this key alone.
    pub fn through_ssh(&mut self, sshd: &Sshd, key: usize) -> Result<()> {
        // The program of another Debian, with the libraries that it was linked with.
        let root = rootfs::sshd()?;
        self.peer = self.peer.clone().with_read_only_at(&root, "/opt/ssh");
        let (loader, libraries) = ("lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu");
        let run = format!(
            "exec /opt/ssh/usr/{loader} --library-path /opt/ssh/{libraries} /opt/ssh/usr/bin/ssh \"$@\"\n"
        );
        script(&self.path("bin/ssh"), &run)?;
        self.ssh_options = sshd.options(key);
        Ok(())
    }

    /// A directory or file beside the stores, at the same path for the client as for the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where a store object lies in the store of this name: `client`, `server`, or another builder's.
    pub fn object(&self, store: &str, path: &str) -> PathBuf {
        let base = path.trim().rsplit('/').next().unwrap_or(path);
        self.path(store).join("nix/store").join(base)
    }

    /// The file that builds see as /bin/sh.
    pub fn shell(&self) -> PathBuf {
        self.path("busybox")
    }

    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// A program of this Nix.
    pub fn command(&self, program: &str, args: &[&str]) -> Result<Command> {
        let mut command = self.peer.command("sh")?;
        let set_path = format!("PATH={}/bin:$PATH; exec \"$@\"", self.dir.path().display());
        command.args(["-c", &set_path, "sh", program]).args(args);
        command.env("NIX_SSHOPTS", &self.ssh_options);
        Ok(command)
    }

    pub fn output(&self, program: &str, args: &[&str]) -> Result<Output> {
        self.command(program, args)?.output().with_context(|| format!("cannot run {program}"))
    }

    /// The standard output of a program that has to succeed.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.output(program, args)?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{:?}: {program} {args:?} fails: {log}", self.peer.version());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// `nix` with its new commands.
    pub fn nix(&self, args: &[&str]) -> Result<String> {
        self.run("nix", &[&["--extra-experimental-features", "nix-command"], args].concat())
    }

    /// Waits until no program has the store of this name open; then real Nix's own judgement of it, contents included,
    /// and a look for what an unfinished addition or build would leave.
    pub fn verify(&self, store: &str) -> Result<()> {
        self.wait_until_closed(store)?;
        let root = self.path(store);
        let root = root.to_str().context("temporary directories are UTF-8")?;
        let output = self.output("nix-store", &["--store", root, "--verify", "--check-contents"])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{store}: {said}");
        for complaint in ["error", "warning", "disappeared", "not valid", "modified"] {
            ensure!(!said.contains(complaint), "{store}: {said}");
        }
        for entry in std::fs::read_dir(self.path(store).join("nix/store"))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            ensure!(!name.starts_with("tmp-") && !name.ends_with(".chroot"), "{store}: {name} is left");
        }
        Ok(())
    }

    /// Every program that has a store open holds its big lock shared (Nix: local-store.cc).
    fn wait_until_closed(&self, store: &str) -> Result<()> {
        let path = self.path(store).join("nix/var/nix/db/big-lock");
        let lock = std::fs::File::open(&path).with_context(|| format!("no {}", path.display()))?;
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        while lock.try_lock().is_err() {
            ensure!(
                Instant::now() < deadline,
                "{store} is still open, {CLOSE_TIMEOUT:?} after its client ended"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // Trees in a store are read-only, which an ordinary removal stumbles over.
        let Ok(entries) = std::fs::read_dir(self.dir.path()) else { return };
        for entry in entries.flatten() {
            let _ = drover_store::fs::delete(&entry.path().join("nix"));
        }
    }
}

fn script(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, format!("#!/bin/sh\n{text}"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}
