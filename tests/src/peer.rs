//! A real Nix of a given version, in a root filesystem of its own.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use xtask::parts::rootfs::{self, Nix};
use xtask::root::Root;
use xtask::run;

/// A real Nix. It sees `/tmp` of this machine and the directories that it was given, at the same paths, and nothing else;
/// `/nix` is empty and forgotten after each command, so name a store: `--store DIR`.
#[derive(Clone, Debug)]
pub struct Peer {
    version: Nix,
    root: Root,
}

impl Peer {
    pub fn new(version: Nix) -> Result<Self> {
        let root = Root::new(rootfs::nix(version)?).bind("/tmp", "/tmp");
        Ok(Self { version, root })
    }

    /// Shows the directory or file at the same path inside, writable.
    pub fn with(mut self, path: &Path) -> Self {
        self.root = self.root.bind(path, path);
        self
    }

    /// Shows `from` at another path inside, writable: a store directory at `/nix`, for instance.
    pub fn with_at(mut self, from: &Path, to: &str) -> Self {
        self.root = self.root.bind(from, to);
        self
    }

    /// Shows `from` at another path inside, read-only.
    pub fn with_read_only_at(mut self, from: &Path, to: &str) -> Self {
        self.root = self.root.bind_ro(from, to);
        self
    }

    /// Starts its programs in this directory, which it has to see.
    pub fn in_dir(mut self, dir: &Path) -> Self {
        self.root = self.root.cwd(dir);
        self
    }

    /// Starts its programs in this network namespace.
    pub fn in_netns(mut self, netns: &Path) -> Self {
        self.root = self.root.netns(netns);
        self
    }

    pub fn version(&self) -> Nix {
        self.version
    }

    /// A program of this Nix: `nix`, `nix-store`, `nix-instantiate`, `nix-build`. Settings go into the variable NIX_CONFIG.
    pub fn command(&self, program: &str) -> Result<Command> {
        let mut command = self.root.command(program)?;
        // What the person who runs the tests has set is not what the tests mean.
        for name in ["NIX_CONFIG", "NIX_PATH", "NIX_REMOTE", "NIX_STORE_DIR", "NIX_STATE_DIR", "NIX_SSHOPTS"]
        {
            command.env_remove(name);
        }
        Ok(command)
    }

    /// Runs a program of this Nix and returns its standard output; an exit code other than 0 is an error with its standard
    /// error.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        run::stdout(self.command(program)?.args(args))
    }
}
