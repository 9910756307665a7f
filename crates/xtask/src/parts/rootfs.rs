//! Debian root filesystems: one for the node, one for each real Nix that Drover is tested against, one for small servers.
//!
//! They come from the mirror that this machine is set up with, by mmdebstrap. The peers' packages are only unpacked,
//! never configured: that is three times faster, and Nix needs no more than its files, a shell and a few users.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::host;
use crate::platform::Platform;
use crate::root::Root;
use crate::run;

const FINISH: &str = include_str!("../scripts/finish-rootfs.sh");
/// Writes `NAME VERSION` of every package that was unpacked into the file `versions`.
const VERSIONS: &str = include_str!("../scripts/versions.sh");
/// The part that the images are made of.
const SSH: &str = "ssh";

/// A version of Nix that Drover must get along with: those that Debian's releases carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Nix {
    /// 2.8, Debian 12: the oldest that is supported.
    V2_8,
    /// 2.26, Debian 13.
    V2_26,
    /// 2.34, Debian unstable.
    V2_34,
}

impl Nix {
    /// Every version, oldest first.
    pub const ALL: [Self; 3] = [Self::V2_8, Self::V2_26, Self::V2_34];

    /// Major and minor number, as in `nix --version`.
    pub fn version(self) -> &'static str {
        match self {
            Self::V2_8 => "2.8",
            Self::V2_26 => "2.26",
            Self::V2_34 => "2.34",
        }
    }

    fn suite(self) -> &'static str {
        match self {
            Self::V2_8 => "bookworm",
            Self::V2_26 => "trixie",
            Self::V2_34 => "sid",
        }
    }
}

impl std::str::FromStr for Nix {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|nix| nix.version() == text).with_context(|| {
            let known: Vec<_> = Self::ALL.iter().map(|nix| nix.version()).collect();
            format!("no Nix {text:?} here; there are {}", known.join(", "))
        })
    }
}

/// The root filesystem of a real Nix: `nix-bin` with its libraries, a shell and coreutils.
pub fn nix(version: Nix) -> Result<PathBuf> {
    unpacked(
        &format!("nix-{}", version.version()),
        version.suite(),
        &["nix-bin", "dash", "coreutils", "ca-certificates"],
    )
}

/// The root filesystem of the cluster's node: container runtime, etcd, network plugins and what kubelet and kube-proxy call.
pub fn node() -> Result<PathBuf> {
    let packages = [
        "containerd",
        "runc",
        "etcd-server",
        "containernetworking-plugins", // the runtime and the store
        "iproute2",
        "iptables",
        "nftables",
        "conntrack",
        "kmod",
        "mount", // what kubelet and kube-proxy call
        "procps",
        "dash",
        "coreutils",
    ];
    unpacked("node", "sid", &packages)
}

/// The root filesystem of the HTTP server that tests use as a binary cache: nginx with its WebDAV module, for PUT.
pub fn nginx() -> Result<PathBuf> {
    unpacked("nginx", "sid", &["nginx", "dash", "coreutils"])
}

/// A C compiler for derivations that compile real software: tcc, which needs only its own files and a libc's.
pub fn tcc() -> Result<PathBuf> {
    unpacked("tcc", "sid", &["tcc", "libc6-dev", "dash", "coreutils"])
}

/// An OpenSSH client, the certificates and a static shell of Debian's stable release, for the images of a platform.
pub fn ssh(platform: Platform) -> Result<PathBuf> {
    unpacked_for(platform, SSH, "trixie", &["openssh-client", "ca-certificates"])
}

/// A whole OpenSSH server, and a client, for tests of what people have in front of a builder.
pub fn sshd() -> Result<PathBuf> {
    unpacked("sshd", "trixie", &["openssh-server", "openssh-client", "dash", "coreutils"])
}

/// pasta, a user-mode network for builds that fetch: `usr/bin/pasta`. It runs on the machine itself, so it comes from a
/// release that is old enough for the C library of any.
pub fn passt() -> Result<PathBuf> {
    unpacked("passt", "bookworm", &["passt"])
}

/// Prometheus and its `promtool`, which say whether metrics, alerts and a dashboard's queries mean anything.
pub fn prometheus() -> Result<PathBuf> {
    unpacked("prometheus", "sid", &["prometheus", "dash", "coreutils"])
}

/// [`unpacked_for`] this machine.
fn unpacked(name: &str, suite: &str, packages: &[&str]) -> Result<PathBuf> {
    unpacked_for(Platform::native()?, name, suite, packages)
}

/// Unpacks Debian packages and everything that they depend on, a static busybox (which [`Root`] needs), and adds what their scripts would have set up.
fn unpacked_for(platform: Platform, name: &str, suite: &str, packages: &[&str]) -> Result<PathBuf> {
    // The mirror is no part of the key: what a suite holds is the same everywhere.
    let packages = [packages, &["busybox-static"]].concat();
    // What images are made of says its versions, and nothing else has to.
    let versions = if name == SSH { VERSIONS } else { "" };
    let recipe = format!("{suite}\n{}\n{FINISH}{versions}", packages.join(","));
    let foreign = (platform != Platform::native()?).then(|| platform.architecture());
    let name = foreign.map_or_else(|| name.to_owned(), |architecture| format!("{name}-{architecture}"));
    super::ensure(&name, &recipe, |dir| {
        if !host::is_root() {
            bail!("making a root filesystem takes root");
        }
        host::ensure(host::ROOT_TOOLS)?;
        if !Path::new("/usr/share/keyrings/debian-archive-keyring.gpg").is_file() {
            host::install(&["debian-archive-keyring"])?; // a machine that is not a Debian itself
        }
        let root = dir.join("root");
        eprintln!("parts: unpacking from Debian {suite}: {}", packages.join(" "));
        let mut mmdebstrap = Command::new("mmdebstrap");
        // A frozen mirror's Release file may be past its Valid-Until; its signature is still checked.
        mmdebstrap.args(["--quiet", "--variant=extract", r#"--aptopt=Acquire::Check-Valid-Until "false""#]);
        // Packages of releases before Debian 13 still ship files under /bin and /lib: merge them from the start.
        mmdebstrap.arg(r#"--setup-hook=for d in bin sbin lib lib64; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done"#);
        mmdebstrap.args(["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"]);
        if !versions.is_empty() {
            mmdebstrap.arg(format!("--extract-hook={versions}"));
        }
        // Unpacking runs nothing of another platform.
        if let Some(architecture) = foreign {
            mmdebstrap.arg(format!("--architectures={architecture}"));
        }
        mmdebstrap.arg(format!("--include={}", packages.join(","))).arg(suite).arg(&root).arg(host::mirror()?);
        run::stdout(&mut mmdebstrap)?;
        run::stdout(Command::new("sh").args(["-c", FINISH, "finish-rootfs.sh"]).arg(&root))?;
        Ok(())
    })
    .map(|part| part.join("root"))
}

/// Checks that a peer is the version that it stands for: a suite moves on, and a test against the wrong Nix proves nothing.
pub fn check_version(version: Nix, rootfs: &Path) -> Result<()> {
    let said = run::stdout(Root::new(rootfs).command("nix-store")?.arg("--version"))?;
    let wanted = format!("nix-store (Nix) {}.", version.version());
    if !said.starts_with(&wanted) {
        bail!("Debian {} has {} where Nix {} is needed", version.suite(), said.trim(), version.version());
    }
    Ok(())
}
