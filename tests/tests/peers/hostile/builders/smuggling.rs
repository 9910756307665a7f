//! Descriptors of outputs in the hands of those who outlive the build.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drover_nix::{Hash, Method, Sha256};
use drover_serve::{BuildOptions, BuildStatus};
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::den::{Den, USERS, User};
use crate::builds_fixture::eventually;

const BENIGN: &[u8] = b"benign\n";

/// The attack as it was published: a fixed-output builder gives a writable descriptor of its output to an accomplice
/// outside, over an abstract socket, and the accomplice writes when the output is registered.
///
/// Where builds with the network have a network namespace of their own, the accomplice cannot connect in the first place;
/// then it takes the descriptor from the build's process, as root can, so that the copy is what is tested in either case.
#[test]
fn cve_2024_27297_a_descriptor_of_a_fixed_output_changes_nothing_afterwards() -> Result<()> {
    for (user, network) in users_and_networks() {
        let mut den = Den::with(user, &["--network", network], &[])?;
        let name = format!("drover-give-{}-{user:?}-{network}", std::process::id());
        let hash = Hash::from(Sha256::of(BENIGN));
        let attack = den.fixed(&["give", &name], Method::Flat, hash)?;
        let pending = den.start(&attack, &BuildOptions::default())?;
        den.says("listening")?;
        let file = match UnixStream::connect_addr(&SocketAddr::from_abstract_name(&name)?) {
            Ok(stream) => {
                ensure!(network == "host", "{user:?}: reached from outside of its network namespace");
                receive(&stream)?
            }
            Err(_) => steal(&den, attack.out().as_str())?,
        };
        ensure!(content(&file)? == BENIGN, "not the output");
        den.let_go()?;
        let result = den.join(pending)?;
        ensure!(result.status == BuildStatus::Built, "{user:?}: {result:?}");
        file.write_all_at(b"malign\n", 0)?;
        file.set_len(1 << 20)?;
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o4777))
            .or_else(|error| if error.raw_os_error() == Some(1) { Ok(()) } else { Err(error) })?;
        file.sync_all()?;
        ensure!(fs::read(den.object(&attack.out()))? == BENIGN, "{user:?}: the registered output changed");
        den.check()?;
    }
    Ok(())
}

/// The accomplice has the output's directory, writes, and exchanges names all the time: before, while and after the
/// output is examined, hashed and copied. Whatever is registered has the declared hash, and nothing else is touched.
#[test]
fn cve_2024_27297_a_directory_of_a_fixed_output_neither() -> Result<()> {
    const ROUNDS: usize = 25;
    let tree = tempfile::tempdir()?;
    let model = tree.path().join("t");
    fs::create_dir_all(model.join("d"))?;
    fs::write(model.join("d/file"), BENIGN)?;
    fs::write(model.join("file"), BENIGN)?;
    let mut nar = Vec::new();
    drover_store::fs::dump(&model, &mut nar)?;
    for user in USERS {
        let mut den = Den::new(user)?;
        let hash = Hash::from(Sha256::of(&nar));
        let mut built = 0;
        for round in 0..ROUNDS {
            let attack = den.fixed(&["hold-open"], Method::Nar, hash.clone())?;
            let path = attack.out();
            let pending = den.start(&attack, &BuildOptions::default())?;
            eventually("it is ready", || den.log().matches("ready\n").count() > round)
                .with_context(|| format!("round {round}: {}", den.log()))?;
            let scratch = den.object(&format!("{}.chroot", attack.path).parse()?);
            let output = scratch.join("store").join(path.as_str());
            let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(&output, flags, Mode::empty())?;
            let file = File::options().read(true).write(true).open(output.join("file"))?;
            let race = Race::start(directory, file, &den);
            den.let_go()?;
            let result = den.join(pending)?;
            race.stop()?;
            match result.status {
                BuildStatus::Built => {
                    built += 1;
                    let mut registered = Vec::new();
                    drover_store::fs::dump(&den.object(&path), &mut registered)?;
                    ensure!(registered == nar, "{user:?}: what is registered is not what was declared");
                }
                BuildStatus::OutputRejected | BuildStatus::MiscFailure => {}
                other => anyhow::bail!("{user:?}: {other:?}: {result:?}"),
            }
        }
        ensure!(built < ROUNDS, "{user:?}: the race was never on time");
        den.check()?;
    }
    Ok(())
}

/// Builds with the network are the ones that may share a network namespace, and with it abstract sockets. Where they do,
/// with the machine's own network, Landlock keeps them apart (Linux 6.12).
#[test]
fn cve_2025_46416_builds_pass_no_descriptors_to_each_other() -> Result<()> {
    for (user, network) in users_and_networks() {
        let den = || Den::with(user, &["--network", network], &[]);
        let (mut giver, mut taker) = (den()?, den()?);
        let name = format!("drover-pass-{}-{user:?}-{network}", std::process::id());
        let give = giver.fixed(&["give", &name], Method::Flat, Hash::from(Sha256::of(BENIGN)))?;
        let giving = giver.start(&give, &BuildOptions::default())?;
        giver.says("listening")?;
        let take = taker.fixed(&["take", &name], Method::Flat, Hash::from(Sha256::of(b"also benign\n")))?;
        let result = taker.build(&take)?;
        ensure!(result.status == BuildStatus::Built, "{user:?}: {result:?}");
        taker.none_worked(1, &[])?;
        giver.let_go()?;
        let result = giver.join(giving)?;
        ensure!(result.status == BuildStatus::Built, "{user:?}: {result:?}");
        ensure!(!giver.log().contains("attempt send"), "{user:?}: somebody got through");
        ensure!(fs::read(giver.object(&give.out()))? == BENIGN);
        giver.check()?;
        taker.check()?;
    }
    Ok(())
}

/// An input-addressed output is moved, not copied: nobody may have it open. Its builder's processes are gone, and it had
/// no way to hand a descriptor to anyone else: see `escape::no_way_out` for sockets of the network, of files and of
/// neither. What is left to show is that a build's sockets cannot be reached from outside.
#[test]
fn nobody_connects_to_a_build_without_network() -> Result<()> {
    for user in USERS {
        let mut den = Den::new(user)?;
        let name = format!("drover-alone-{}-{user:?}", std::process::id());
        let attack = den.attack(&["give", &name])?;
        let pending = den.start(&attack, &BuildOptions::default())?;
        den.says("listening")?;
        let error =
            UnixStream::connect_addr(&SocketAddr::from_abstract_name(&name)?).err().context("reached")?;
        ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "{error}");
        den.let_go()?;
        let result = den.join(pending)?;
        ensure!(result.status == BuildStatus::Built, "{result:?}");
        den.check()?;
    }
    Ok(())
}

/// With a network namespace of the build's own (which pasta connects or nothing does) and with that of the machine.
fn users_and_networks() -> impl Iterator<Item = (User, &'static str)> {
    USERS.into_iter().flat_map(|user| ["none", "host"].map(|network| (user, network)))
}

/// Exchanges what is in a directory by its descriptor, until it is told to stop.
struct Race {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Race {
    fn start(directory: OwnedFd, file: File, den: &Den) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let victim = den.canary();
        let rounds = AtomicUsize::new(0);
        let thread = std::thread::spawn(move || {
            let at = directory.as_fd();
            let _link = rustix::fs::symlinkat(&victim, at, "link");
            let _link = rustix::fs::symlinkat(victim.join("file"), at, "link-to-file");
            // Errors are the attack's own business: what it works on disappears under it.
            while !stopped.load(Ordering::Relaxed) {
                let _ = rustix::fs::renameat_with(at, "d", at, "link", RenameFlags::EXCHANGE);
                let _ = rustix::fs::renameat_with(at, "file", at, "link-to-file", RenameFlags::EXCHANGE);
                let _ = file.write_all_at(b"malign\n", 0);
                let _ = rustix::fs::unlinkat(at, "x", AtFlags::empty());
                let _ = rustix::fs::symlinkat(victim.join("new"), at, "x");
                // Every other round everything is as it was declared, for a moment.
                if rounds.fetch_add(1, Ordering::Relaxed) % 2 == 1 {
                    let _ = file.write_all_at(BENIGN, 0);
                    for name in ["x", "link", "link-to-file"] {
                        let _ = rustix::fs::unlinkat(at, name, AtFlags::empty());
                    }
                    std::thread::yield_now();
                    let _ = rustix::fs::symlinkat(&victim, at, "link");
                    let _ = rustix::fs::symlinkat(victim.join("file"), at, "link-to-file");
                }
            }
        });
        Self { stop, thread }
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the race panicked"))
    }
}

fn content(mut file: &File) -> Result<Vec<u8>> {
    use std::io::Seek as _;
    let mut bytes = Vec::new();
    file.seek(std::io::SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The descriptor that comes over this socket.
fn receive(stream: &UnixStream) -> Result<File> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut byte = [0];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [std::io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let passed = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(passed.context("no descriptor came")?.into())
}

/// A descriptor of an attack's process that leads to a file of this name, writable.
fn steal(den: &Den, name: &str) -> Result<File> {
    for pid in den.processes() {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.filter_map(Result::ok) {
            if fs::read_link(entry.path())?.ends_with(name) {
                return Ok(File::options().read(true).write(true).open(entry.path())?);
            }
        }
    }
    anyhow::bail!("no process of the build has {name} open")
}
