//! Out of the sandbox: other processes, the kernel's files, mounts, devices, keys, terminals, sockets; also as root of a
//! user namespace that the builder makes for itself.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};

use anyhow::{Context as _, Result, ensure};
use drover_serve::{BuildOptions, BuildStatus};
use rustix::pty::OpenptFlags;

use super::den::{Den, USERS, User};

/// CVE-2025-53819: a change left out the step that gives up privileges. What counts is what the machine sees.
#[test]
fn cve_2025_53819_builds_are_neither_root_nor_the_stores_owner() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let attack = den.attack(&["identity"])?;
        let pending = den.start(&attack, &BuildOptions::default())?;
        den.says("ready")?;
        let pids = den.processes();
        ensure!(!pids.is_empty(), "nothing runs");
        for pid in pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.map(|line| line.split_whitespace().map(String::from).collect::<Vec<_>>())
                    .context("no field")
            };
            for name in ["Uid:", "Gid:"] {
                // Real, effective, saved and of the file system.
                for id in field(name)? {
                    let id: u32 = id.parse()?;
                    ensure!(id != 0, "{user:?}: {name} {id}");
                    // An ordinary user has one id to give, its own: as in Nix there, inputs are safe by their mounts.
                    if name == "Uid:" {
                        ensure!(den.build_uids().contains(&id), "{user:?}: {name} {id}");
                        ensure!(user == User::Ordinary || id != den.owner(), "{user:?}: {name} {id}");
                    }
                }
            }
            ensure!(field("Groups:")?.is_empty(), "{user:?}: groups {:?}", field("Groups:")?);
            for name in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                ensure!(field(name)? == ["0000000000000000"], "{user:?}: {name}");
            }
            ensure!(field("NoNewPrivs:")? == ["1"] && field("Seccomp:")? == ["2"]);
            // A process of a namespace that our own processes are not in.
            let server = den.server();
            for kind in ["user", "mnt", "pid", "ipc", "uts", "net"] {
                let namespace = |pid| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
                ensure!(namespace(pid)? != namespace(server)?, "{user:?}: the {kind} namespace is shared");
            }
        }
        den.let_go()?;
        let result = den.join(pending)?;
        ensure!(result.status == BuildStatus::Built, "{result:?}");
        let inside = fs::read_to_string(den.object(&attack.out()))?;
        ensure!(inside.contains("Uid:\t1000\t1000\t1000\t1000\n"), "{inside}");
        den.check()?;
    }
    Ok(())
}

#[test]
fn no_way_out() -> Result<()> {
    for user in USERS {
        let mut den = Den::with_key(user)?;
        // What there would be to reach: a port, a socket that everybody may write to, one without a file.
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let socket = den.canary().join("socket");
        let _by_path = UnixListener::bind(&socket)?;
        fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        let name = format!("drover-escape-{}-{user:?}", std::process::id());
        let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        den.remember()?;
        let mut attack = den.attack(&["escape"])?;
        attack.set("port", &listener.local_addr()?.port().to_string());
        attack.set("socket", socket.to_str().context("UTF-8")?);
        attack.set("abstract", &name);
        den.built(&attack)?;
        den.none_worked(200, &[])?;
        let log = den.log();
        ensure!(log.contains("descriptors: 0 1 2\r\n") || log.contains("descriptors: 0 1 2\n"), "{log}");
        ensure!(log.contains("nested: root"), "user namespaces are not nested here: {log}");
        den.check()?;
    }
    Ok(())
}

/// Terminals are files of the machine: a build that runs under its user's own id would be let in by their modes.
#[test]
fn terminals_of_the_machine_are_not_the_builds() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        // Someone's terminal, of the very user that the build runs as.
        let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::unlockpt(&ours)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let name = rustix::pty::ptsname(&ours, Vec::new())?.into_string()?;
        let theirs = File::options().read(true).write(true).open(&name)?;
        let uid = den.build_uids().start;
        rustix::fs::fchown(&theirs, Some(rustix::fs::Uid::from_raw(uid)), None)?;
        ensure!(theirs.metadata()?.uid() == uid);
        let attack = den.attack(&["terminal", &name])?;
        den.built(&attack)?;
        den.none_worked(1, &[])?;
        ensure!(rustix::io::read(ours.as_fd(), &mut [0_u8; 16][..]).is_err(), "{user:?}: it was written to");
        ensure!(den.log().contains("own terminal: Ok(())"), "{user:?}: {}", den.log());
        den.check()?;
    }
    Ok(())
}
