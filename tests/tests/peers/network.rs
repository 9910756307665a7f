//! Builds that may fetch, in network namespaces of their own that pasta connects: what they reach and what they do not.
//!
//! The builder runs in a network namespace that the test makes, with a cable to another one where the servers are.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{ContentAddress, DerivationOutput, Hash, Method, OutputName, Sha256, StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildResult, BuildStatus};
use drover_tests::copy_program;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use xtask::{parts, run};

use crate::builds_fixture::{Drv, Reader, Session, Store, add_tools, eventually, hold};
use crate::web::Web;

/// The builder's end of the cable, and the other one, which is also its gateway.
const HERE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const THERE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// Two network namespaces with a cable between them.
struct Cable {
    here: String,
    there: String,
}

impl Cable {
    fn new() -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = format!("{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let cable = Self { here: format!("drover-here-{number}"), there: format!("drover-there-{number}") };
        let (here, there) = (&*cable.here, &*cable.there);
        ip(&["netns", "add", here])?;
        ip(&["netns", "add", there])?;
        ip(&["-n", here, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", there])?;
        for (namespace, address) in [(here, HERE), (there, THERE)] {
            ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", "cable"])?;
            ip(&["-n", namespace, "link", "set", "lo", "up"])?;
            ip(&["-n", namespace, "link", "set", "cable", "up"])?;
        }
        ip(&["-n", here, "route", "add", "default", "via", &THERE.to_string()])?;
        Ok(cable)
    }

    /// Runs something in one of the namespaces: sockets and processes that it makes stay there.
    fn within<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = File::open(Path::new("/run/netns").join(name))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&namespace),
                    Some(LinkNameSpaceType::Network),
                )?;
                work()
            });
            thread.join().expect("the thread does not panic")
        })
    }

    fn listen(name: &str, address: Ipv4Addr) -> Result<TcpListener> {
        Self::within(name, || Ok(TcpListener::bind(SocketAddr::from((address, 0)))?))
    }

    /// How many processes of pasta the builder of this namespace has.
    fn connections(&self) -> Result<usize> {
        use std::os::unix::fs::MetadataExt as _;
        let namespace = std::fs::metadata(Path::new("/run/netns").join(&self.here))?.ino();
        let count = std::fs::read_dir("/proc")?.filter_map(Result::ok).filter(|entry| {
            let network = std::fs::metadata(entry.path().join("ns/net"));
            let program = std::fs::read_link(entry.path().join("exe")).unwrap_or_default();
            network.is_ok_and(|network| network.ino() == namespace)
                && program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pas"))
        });
        Ok(count.count())
    }

    /// A session with a builder that has the namespace for its network.
    fn session(&self, store: &Store, options: &[&str]) -> Result<Session> {
        let mut command = store.drover(options)?;
        command.env("PATH", path_with_pasta()?);
        Self::within(&self.here, || Session::start(command, Reader::Follows))
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in [&self.here, &self.there] {
            let _never_made = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    run::stdout(Command::new("ip").args(arguments)).map(drop)
}

fn path_with_pasta() -> Result<std::ffi::OsString> {
    let mut path = parts::rootfs::passt()?.join("usr/bin").into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    Ok(path)
}

/// A fixed-output derivation that is right if its script writes `expected`.
fn fixed(name: &str, script: &str, tools: &StorePath, expected: &str) -> Result<(Drv, StorePath)> {
    let mut drv = Drv::new(name, script)?.with_tools(tools);
    let hash = Hash::from(Sha256::of(expected.as_bytes()));
    let output = DerivationOutput::CaFixed(ContentAddress { method: Method::Flat, hash });
    let path = output.path(&StoreDir::default(), name, &OutputName::out())?.context("it is fixed")?;
    drv.drv.env.insert("out".into(), StoreDir::default().full(&path).into());
    drv.drv.outputs = [(OutputName::out(), output)].into();
    Ok((drv, path))
}

fn build(session: &mut Session, drv: &Drv) -> Result<BuildResult> {
    Ok(session.client()?.build_derivation(&drv.path, &drv.drv, &BuildOptions::default())?)
}

fn expect_built(session: &mut Session, drv: &Drv) -> Result<()> {
    let result = build(session, drv)?;
    ensure!(result.status == BuildStatus::Built, "{result:?}: {}", session.log());
    Ok(())
}

#[test]
fn what_a_build_that_fetches_reaches() -> Result<()> {
    let cable = Cable::new()?;
    let there = Cable::listen(&cable.there, THERE)?;
    let web = Web::serve(there, [("file".to_owned(), b"fetched\n".to_vec())].into())?;
    let store = Store::new()?;
    let mut session = cable.session(&store, &["--network", "pasta"])?;
    let tools = add_tools(&mut session, &["wget", "nc", "ip", "cat"])?;

    let script = format!("wget -q -O $out {}/file", web.url);
    expect_built(&mut session, &fixed("wget", &script, &tools, "fetched\n")?.0)?;
    let mut builtin = fixed("builtin", "", &tools, "fetched\n")?.0;
    builtin.drv.builder = "builtin:fetchurl".into();
    builtin.drv.env.insert("url".into(), format!("{}/file", web.url).into());
    expect_built(&mut session, &builtin)?;
    ensure!(web.asked() == ["/file", "/file"], "{:?}", web.asked());

    // What the builder itself listens on, and what is on its loopback interface: not under its own address, nor under the
    // gateway's, under which pasta has it unless told otherwise.
    let on_loopback = Cable::listen(&cable.here, Ipv4Addr::LOCALHOST)?;
    let everywhere = Cable::listen(&cable.here, Ipv4Addr::UNSPECIFIED)?;
    let mut script = String::new();
    for listener in [&on_loopback, &everywhere] {
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        for address in [Ipv4Addr::LOCALHOST, HERE, THERE] {
            script.push_str(&format!(
                "nc -w 2 {address} {port} < /dev/null && echo reached {address} {port} || :\n"
            ));
        }
    }
    script.push_str("echo done > $out; echo tried everything");
    expect_built(&mut session, &fixed("loopback", &script, &tools, "done\n")?.0)?;
    ensure!(
        session.log().contains("tried everything") && !session.log().contains("reached"),
        "{}",
        session.log()
    );
    for listener in [on_loopback, everywhere] {
        let error = listener.accept().err().context("somebody came")?;
        ensure!(error.kind() == std::io::ErrorKind::WouldBlock, "{error}");
    }

    // Builds that may not fetch reach nothing at all.
    let script = format!("wget -q -T 2 -O - {}/file && echo reached > $out || echo nothing > $out", web.url);
    let pure = Drv::new("pure", &script)?.with_tools(&tools);
    expect_built(&mut session, &pure)?;
    ensure!(std::fs::read_to_string(store.path("nix/store").join(pure.out().as_str()))? == "nothing\n");

    session.end(true)?;
    ensure!(cable.connections()? == 0, "a connection outlives its build");
    store.expect_clean()
}

#[test]
fn without_a_network_there_is_none() -> Result<()> {
    let cable = Cable::new()?;
    let there = Cable::listen(&cable.there, THERE)?;
    let web = Web::serve(there, [("file".to_owned(), b"fetched\n".to_vec())].into())?;
    let store = Store::new()?;
    let mut session = cable.session(&store, &["--network", "none"])?;
    let tools = add_tools(&mut session, &["wget"])?;
    let script = format!("wget -q -T 2 -O $out {}/file || echo nothing > $out", web.url);
    expect_built(&mut session, &fixed("none", &script, &tools, "nothing\n")?.0)?;
    ensure!(web.asked().is_empty());
    session.end(true)?;
    store.expect_clean()
}

/// An ordinary user, where everybody may open `/dev/net/tun`, on a machine whose name server listens on its loopback interface.
#[test]
fn an_ordinary_user_with_a_name_server_on_loopback() -> Result<()> {
    const NOBODY: u32 = 65534;
    let cable = Cable::new()?;
    let web =
        Web::serve(Cable::listen(&cable.there, THERE)?, [("file".to_owned(), b"fetched\n".to_vec())].into())?;
    let port = web.url.rsplit(':').next().context("a port")?.to_owned();
    let names = Cable::within(&cable.here, || Ok(UdpSocket::bind((Ipv4Addr::LOCALHOST, 53))?))?;
    std::thread::spawn(move || name_server(&names, THERE));

    // Where that user can reach it, which the cache is not as a rule.
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    for program in ["passt", "passt.avx2"] {
        copy_program(&parts::rootfs::passt()?.join("usr/bin").join(program), &dir.path().join(program))?;
    }
    for program in ["pasta", "pasta.avx2"] {
        std::os::unix::fs::symlink(program.replace("pasta", "passt"), dir.path().join(program))?;
    }
    let resolv_conf = dir.path().join("resolv.conf");
    std::fs::write(&resolv_conf, "nameserver 127.0.0.1\n")?;
    let store = Store::new()?;
    for path in [store.path(""), store.path("nix")] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY))?;
    }
    let builder = store.drover(&["--network", "pasta"])?;
    let script = format!(
        "mkdir -p /dev/net && mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && \
         mount --bind {} /etc/resolv.conf && exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups \"$@\"",
        resolv_conf.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &script, "sh"]).arg(builder.get_program()).args(builder.get_args());
    command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", dir.path().display()));
    let mut session = Cable::within(&cable.here, || Session::start(command, Reader::Follows))?;
    let tools = add_tools(&mut session, &["cat"])?;
    let mut builtin = fixed("builtin", "", &tools, "fetched\n")?.0;
    builtin.drv.builder = "builtin:fetchurl".into();
    builtin.drv.env.insert("url".into(), format!("http://files.example:{port}/file").into());
    expect_built(&mut session, &builtin)?;
    ensure!(web.asked() == ["/file"]);
    session.end(true)?;
    store.expect_clean()
}

/// Answers every question for an IPv4 address with this one, and others with nothing.
fn name_server(socket: &UdpSocket, address: Ipv4Addr) {
    let mut query = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut query) {
        // Header of 12 bytes; then one question: labels, each behind its length, an empty one, type and class.
        let mut end = 12;
        while end < length && query[end] != 0 {
            end += usize::from(query[end]) + 1;
        }
        end += 5;
        if end > length {
            continue;
        }
        let is_address = query[end - 4..end - 2] == [0, 1];
        let mut answer = query[..end].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
        if is_address {
            // The question's name, type, class, 60 seconds, four bytes.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(address.octets());
        }
        let _nobody_waits = socket.send_to(&answer, from);
    }
}

/// Says something into an abstract socket, or waits for somebody who does.
const SOCKETS: &str = r#"
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
int main(int argc, char **argv) {
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if (argc != 3 || strlen(argv[2]) > 90) return 2;
    strcpy(address.sun_path + 1, argv[2]);
    socklen_t length = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(argv[2]);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (strcmp(argv[1], "connect") == 0) {
        if (connect(fd, (struct sockaddr *)&address, length) != 0) { perror("connect"); return 1; }
        return 0;
    }
    if (bind(fd, (struct sockaddr *)&address, length) != 0 || listen(fd, 9) != 0) { perror("listen"); return 2; }
    puts("somebody may come");
    fflush(stdout);
    for (;;) {
        if (accept(fd, 0, 0) < 0) return 2;
        puts("somebody came");
        fflush(stdout);
    }
}
"#;

/// CVE-2024-27297, CVE-2025-46416.
#[test]
fn builds_that_fetch_share_no_abstract_sockets() -> Result<()> {
    let cable = Cable::new()?;
    let (mine, theirs) = (Store::new()?, Store::new()?);
    let mut listening = cable.session(&mine, &["--network", "pasta"])?;
    let mut connecting = cable.session(&theirs, &["--network", "pasta"])?;
    let name = format!("drover-abstract-{}", std::process::id());

    let dir = tempfile::tempdir()?;
    let (source, program) = (dir.path().join("sockets.c"), dir.path().join("sockets"));
    std::fs::write(&source, SOCKETS)?;
    run::stdout(Command::new("cc").args(["-static", "-o"]).args([&program, &source]))?;
    let sockets = std::fs::read(&program)?;
    let tools = add_program(&mut listening, "sockets", &sockets)?;
    add_program(&mut connecting, "sockets", &sockets)?;

    let script = format!("sockets listen {name} & {}; echo held > $out", hold());
    let (held, _) = fixed("held", &script, &tools, "held\n")?;
    let answer = listening.build(&held, &BuildOptions::default())?;
    listening.says("somebody may come")?;
    let script = format!("if sockets connect {name}; then echo reached; else echo refused; fi > $out");
    let (other, _) = fixed("other", &script, &tools, "refused\n")?;
    expect_built(&mut connecting, &other)?;
    // Neither does anybody else: this test, which has the builder's namespace, has none of a build's.
    let connect =
        || Cable::within(&cable.here, || Ok(Command::new(&program).args(["connect", &name]).output()?));
    ensure!(!connect()?.status.success());
    ensure!(!listening.log().contains("somebody came"), "{}", listening.log());
    mine.let_go()?;
    let result = answer.join().expect("the thread does not panic")?;
    ensure!(result.status == BuildStatus::Built, "{result:?}");

    // That nobody came is not the program's fault.
    let mut outside = Cable::within(&cable.here, || {
        Ok(Command::new(&program).args(["listen", &name]).stdout(std::process::Stdio::null()).spawn()?)
    })?;
    eventually("the program connects where it can", || {
        connect().is_ok_and(|output| output.status.success())
    })?;
    outside.kill()?;
    outside.wait()?;
    listening.end(true)?;
    connecting.end(true)?;
    mine.expect_clean()?;
    theirs.expect_clean()
}

/// Adds a directory whose `bin` has this program.
fn add_program(session: &mut Session, name: &str, contents: &[u8]) -> Result<StorePath> {
    let tree = tempfile::tempdir()?;
    let bin = tree.path().join("bin");
    std::fs::create_dir(&bin)?;
    std::fs::write(bin.join(name), contents)?;
    for path in [tree.path(), &bin, &bin.join(name)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    crate::builds_fixture::add_tree(session, tree.path())
}

/// A builder that is killed takes its builds' connections along.
#[test]
fn connections_end_with_the_builder() -> Result<()> {
    let cable = Cable::new()?;
    let store = Store::new()?;
    let mut session = cable.session(&store, &["--network", "auto"])?;
    let tools = add_tools(&mut session, &["cat"])?;
    let (held, _) = fixed("held", &format!("{}; echo held > $out", hold()), &tools, "held\n")?;
    let _answer = session.build(&held, &BuildOptions::default())?;
    session.says("holding")?;
    ensure!(cable.connections()? == 1, "there is no connection to end");
    drop(session);
    eventually("the connection is gone", || cable.connections().is_ok_and(|count| count == 0))?;
    eventually("the build is gone", || held.processes() == 0)
}
