//! Programs of the machine itself: Debian packages that are installed when they are missing, and not otherwise.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// A program that the tests call, the file that shows that it is there, and the Debian package that brings it.
type Tool = (&'static str, &'static str);

/// What making root filesystems and running programs in them takes.
pub const ROOT_TOOLS: &[Tool] =
    &[("mmdebstrap", "mmdebstrap"), ("unshare", "util-linux"), ("mount", "mount")];
/// What the network namespace of the cluster takes on top.
pub const NET_TOOLS: &[Tool] = &[("ip", "iproute2"), ("nsenter", "util-linux"), ("sysctl", "procps")];
/// What crates that hold C sources take, and static linking with glibc.
pub const C_TOOLS: &[Tool] = &[("cc", "gcc"), ("make", "make")];
/// What libFuzzer takes on top: its sources are C++.
pub const CXX_TOOLS: &[Tool] = &[("cc", "gcc"), ("c++", "g++"), ("make", "make")];

/// The static shell that builds see as /bin/sh.
pub const SANDBOX_TOOLS: &[Tool] = &[("busybox", "busybox-static")];

/// What the operator calls, and what its keys are tested with.
pub const SSH_TOOLS: &[Tool] = &[("ssh", "openssh-client"), ("ssh-keygen", "openssh-client")];

/// Sees to it that every tool is on PATH; installs the packages of those that are not, which takes root.
pub fn ensure(tools: &[Tool]) -> Result<()> {
    let missing: Vec<_> = tools.iter().filter(|(program, _)| find(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    install(&packages).with_context(|| {
        let names: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
        format!("{} not found on PATH; install: {}", names.join(", "), packages.join(" "))
    })?;
    match missing.iter().find(|(program, _)| find(program).is_none()) {
        Some((program, package)) => {
            bail!("the package {package} is installed, but {program} is still not on PATH")
        }
        None => Ok(()),
    }
}

/// Installs Debian packages with apt-get.
pub fn install(packages: &[&str]) -> Result<()> {
    eprintln!("parts: installing on this machine: {}", packages.join(" "));
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-qq", "-o", "Dpkg::Use-Pty=0"]).args(args);
        run::stdout(&mut command).map(drop)
    };
    apt(&["update"])?;
    apt(&[&["install", "-y", "--no-install-recommends"], packages].concat())
}

/// The full path of `program` on PATH; administrators' directories count, which an ordinary user's PATH leaves out.
pub fn find(program: &str) -> Option<std::path::PathBuf> {
    std::env::split_paths(&path()).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// PATH, with administrators' directories at its end.
pub fn path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

/// Whether this process is root, which namespaces with real mounts and the cluster take.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    // The owner of /proc/self is the effective user: no system call wrapper needed for a yes or no.
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// The Debian mirror: `$DROVER_DEBIAN_MIRROR`, or the one that this machine's apt is set up with.
pub fn mirror() -> Result<String> {
    if let Some(named) = std::env::var("DROVER_DEBIAN_MIRROR").ok().filter(|value| !value.is_empty()) {
        return Ok(named);
    }
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let is_debian = read("/etc/os-release").lines().any(|line| line == "ID=debian");
    is_debian
        .then(|| mirror_in(&read("/etc/apt/sources.list.d/debian.sources"), &read("/etc/apt/sources.list")))
        .flatten()
        .context("no Debian mirror is set up for apt on this machine: set DROVER_DEBIAN_MIRROR to the address of one")
}

fn mirror_in(deb822: &str, one_line: &str) -> Option<String> {
    let stanza = deb822.lines().find_map(|line| line.strip_prefix("URIs:")?.split_whitespace().next());
    let listed = || {
        one_line.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            words.next().filter(|&kind| kind == "deb")?;
            words.find(|word| word.contains("://")) // options in brackets may stand before it
        })
    };
    stanza.or_else(listed).map(|uri| uri.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_read_from_either_format() {
        let deb822 = "Types: deb\n# a comment\nURIs: http://mirror.example/debian/\nSuites: bookworm\n";
        assert_eq!(mirror_in(deb822, "").as_deref(), Some("http://mirror.example/debian"));
        let one_line = "# deb http://no.example/debian sid main\ndeb-src http://src.example/d sid main\ndeb [arch=amd64 trusted=yes] https://mirror.example/debian sid main\n";
        assert_eq!(mirror_in("", one_line).as_deref(), Some("https://mirror.example/debian"));
        assert_eq!(mirror_in("", ""), None);
    }

    #[test]
    fn a_missing_tool_is_found_missing() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
    }
}
