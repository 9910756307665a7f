//! Ways out of the sandbox, and ways to do harm from within it. Each attempt in [`escape`] has to fail.

use std::ffi::c_int;
use std::fs::{File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::sys::{self, AT_FDCWD, call, control, mount, text};
use crate::{attempt, out, say};

const BIND: u64 = 0x1000;
const REMOUNT: u64 = 0x20;
const RECURSIVE: u64 = 0x4000;
const PRIVATE: u64 = 1 << 18;
const NEW_USER: u64 = 0x1000_0000;
const NEW_MOUNTS: u64 = 0x2_0000;

/// Ids, groups, limits and namespaces, as they are inside.
pub fn identity() -> io::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    std::fs::write(out(), &status)?;
    // The file's owner tells the outside who this is.
    crate::ready();
    Ok(())
}

pub fn escape() -> io::Result<()> {
    let input = input()?;
    std::fs::create_dir(out())?;
    descriptors()?;
    processes();
    kernel_files();
    rights();
    inputs("", &input);
    mounts("", &input);
    handles("");
    devices("");
    keys();
    terminal_tricks();
    sockets();
    nested(&input)?;
    Ok(())
}

/// A terminal of the machine's that the test names.
pub fn terminal(path: &str) -> io::Result<()> {
    std::fs::write(out(), "")?;
    const NONBLOCKING: i32 = 0o4000;
    const NO_TERMINAL: i32 = 0o400;
    let mut options = File::options();
    let opened = options.read(true).write(true).custom_flags(NONBLOCKING | NO_TERMINAL).open(path);
    attempt("open a terminal", opened.and_then(|mut file| file.write_all(b"mischief\r\n")));
    // What builds use terminals for does work.
    let made = File::options().read(true).write(true).open("/dev/ptmx").and_then(|file| {
        let mut number: c_int = 0;
        control(file.as_raw_fd(), 0x4004_5431, (&raw mut number).cast())?;
        control(file.as_raw_fd(), 0x8004_5430, (&raw mut number).cast())?;
        File::options().read(true).write(true).open(format!("/dev/pts/{number}")).map(drop)
    });
    say(&format!("own terminal: {made:?}"));
    Ok(())
}

/// The store path that this program is in.
fn input() -> io::Result<PathBuf> {
    let this = std::env::current_exe()?;
    Ok(this.ancestors().find(|path| path.parent() == Some(Path::new("/nix/store"))).expect("it is an input").into())
}

fn descriptors() -> io::Result<()> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let to = std::fs::read_link(entry.path())?;
        // The listing itself.
        if !to.starts_with("/proc") {
            open.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    open.sort();
    say(&format!("descriptors: {}", open.join(" ")));
    // Of what is open, nothing leads to a directory, by which `..` would lead on.
    for name in open {
        attempt(&format!("list by descriptor {name}"), std::fs::read_dir(format!("/proc/self/fd/{name}/")));
    }
    Ok(())
}

fn processes() {
    let own = std::process::id();
    let others = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let others = others.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in others.filter(|pid| *pid != own) {
        attempt(&format!("see process {pid}"), Ok(()));
    }
    let server: i64 = std::env::var("server").ok().and_then(|pid| pid.parse().ok()).unwrap_or(2);
    attempt("pidfd_open", call(434, &[&server, &0]));
    attempt("ptrace", call(101, &[&16, &server, &0, &0]));
    attempt("kill the server", call(62, &[&server, &0]));
    attempt("kill a process group", call(62, &[&-server, &0]));
    for file in ["mem", "environ", "root", "cwd", "fd", "ns/mnt", "exe"] {
        attempt(&format!("open the server's {file}"), File::open(format!("/proc/{server}/{file}")));
    }
    let (mut byte, remote) = (0_u8, 0x40_0000_u64);
    let (local, far) = ([&raw mut byte as u64, 1], [remote, 1]);
    attempt("process_vm_readv", call(310, &[&server, &local.as_ptr(), &1, &far.as_ptr(), &1, &0]));
    // A sibling of this process would be outside of its namespace.
    const CLONE_PARENT: u64 = 0x8000 | 17;
    attempt("clone a sibling", call(56, &[&CLONE_PARENT, &0, &0, &0, &0]));
    for kind in ["mnt", "net", "pid", "user", "ipc", "uts"] {
        let entered = File::open(format!("/proc/self/ns/{kind}")).and_then(|file| call(308, &[&file.as_raw_fd(), &0]));
        attempt(&format!("setns {kind}"), entered);
    }
}

fn kernel_files() {
    for file in [
        "sysrq-trigger",
        "sys/kernel/core_pattern",
        "sys/kernel/modprobe",
        "sys/kernel/hostname",
        "sys/kernel/domainname",
        "sys/kernel/pid_max",
        "sys/kernel/ns_last_pid",
        "sys/kernel/shmmax",
        "sys/vm/drop_caches",
        "sys/vm/overcommit_memory",
        "sys/fs/protected_symlinks",
        "sys/net/ipv4/ip_forward",
        "sys/net/ipv4/ip_unprivileged_port_start",
        "sys/user/max_user_namespaces",
        "self/uid_map",
        "self/gid_map",
        "self/setgroups",
        "1/uid_map",
        "kcore",
        "kmsg",
        "irq/0/smp_affinity",
        "bus/pci",
        "acpi",
        "timer_list",
    ] {
        let path = Path::new("/proc").join(file);
        attempt(&format!("write /proc/{file}"), File::options().write(true).open(&path).and_then(|mut f| {
            // Opening alone is not what harms: ids that are mapped already refuse the write.
            f.write_all(&std::fs::read(&path).unwrap_or_else(|_| b"1\n".to_vec()))
        }));
    }
    attempt("read /proc/kcore", File::open("/proc/kcore"));
    attempt("read /proc/kmsg", File::open("/proc/kmsg"));
    attempt("the kernel's log", call(103, &[&3, &0, &0]));
    attempt("no killing when memory is short", std::fs::write("/proc/self/oom_score_adj", "-1000"));
    for dir in ["/sys", "/sys/fs/cgroup", "/run", "/home", "/root", "/var", "/usr", "/proc/1/root/usr", "/build/../../usr"] {
        attempt(&format!("list {dir}"), std::fs::read_dir(dir));
    }
}

fn rights() {
    attempt("setuid 0", call(105, &[&0]));
    attempt("setgid 0", call(106, &[&0]));
    attempt("setresuid of another build", call(117, &[&30002, &30002, &30002]));
    attempt("setgroups", call(116, &[&0, &0]));
    attempt("sethostname", call(170, &[&text("x"), &1]));
    attempt("reboot", call(169, &[&0xfee1_dead_u32, &0, &0, &0]));
    attempt("swapon", call(167, &[&text("/build/x"), &0]));
    attempt("init_module", call(175, &[&0, &0, &text("")]));
    attempt("nice", call(141, &[&0, &0, &-20]));
    let real_time = [1_i32];
    attempt("real time", call(144, &[&0, &1, &real_time.as_ptr()]));
    attempt("regain privileges", call(157, &[&38, &0, &0, &0, &0]));
    attempt("chroot", call(161, &[&text("/build")]));
    attempt("settimeofday", call(164, &[&[0_i64, 0].as_ptr(), &0]));
    attempt("open BPF", call(321, &[&5, &[0_u64; 16].as_ptr(), &128]));
    attempt("acct", call(163, &[&text("/build/x")]));
    attempt("quotactl", call(179, &[&0x80_0003, &text("/dev/vda"), &0, &0]));
}

fn inputs(prefix: &str, input: &Path) {
    let program = input.join("bin/attack");
    let named = |what: &str| format!("{prefix}{what}");
    let write = |path: &Path| File::options().write(true).open(path);
    attempt(&named("write an input"), write(&program));
    attempt(&named("write the running program"), write(Path::new("/proc/self/exe")));
    let reopened = File::open(&program).and_then(|f| write(Path::new(&format!("/proc/self/fd/{}", f.as_raw_fd()))));
    attempt(&named("reopen an input"), reopened);
    attempt(&named("truncate an input"), call(76, &[&text(&program), &0]));
    attempt(&named("chmod an input"), std::fs::set_permissions(&program, Permissions::from_mode(0o755)));
    attempt(&named("chown an input"), std::os::unix::fs::chown(&program, Some(1000), None));
    attempt(&named("delete from an input"), std::fs::remove_file(&program));
    attempt(&named("add to an input"), File::create(input.join("new")));
    attempt(&named("rename an input"), std::fs::rename(input, "/nix/store/renamed"));
    attempt(&named("remove an input"), std::fs::remove_dir(input));
    attempt(&named("link an input"), std::fs::hard_link(&program, "/nix/store/linked"));
    attempt(&named("link the shell"), std::fs::hard_link("/bin/sh", "/build/linked"));
    attempt(&named("touch an input"), File::open(&program).and_then(|f| f.set_modified(std::time::UNIX_EPOCH)));
    attempt(&named("write the shell"), write(Path::new("/bin/sh")));
    attempt(&named("write /etc/passwd"), write(Path::new("/etc/passwd")));
    attempt(&named("replace /etc/passwd"), std::fs::remove_file("/etc/passwd"));
    for dir in ["/", "/bin", "/etc", "/nix", "/dev", "/dev/pts"] {
        attempt(&named(&format!("make a file in {dir}")), File::create(Path::new(dir).join("planted")));
    }
    const LEASE: c_int = 1024;
    let lease = File::open(&program).and_then(|f| call(72, &[&f.as_raw_fd(), &LEASE, &1]));
    attempt(&named("lease an input"), lease);
}

fn mounts(prefix: &str, input: &Path) {
    let named = |what: &str| format!("{prefix}{what}");
    let input = input.to_str().expect("UTF-8");
    // Where rights over a mount namespace of one's own are to be had, new mounts are harmless: only what is mounted
    // already counts then.
    if prefix.is_empty() {
        attempt("mount a tmpfs", mount("x", "/build", "tmpfs", 0));
        attempt("mount over an input", mount("/build", input, "", BIND));
        attempt("mount proc", mount("x", "/proc", "proc", 0));
        attempt("unshare mounts", call(272, &[&NEW_MOUNTS]));
        attempt("fsopen", call(430, &[&text("tmpfs"), &0]));
        attempt("open_tree", call(428, &[&AT_FDCWD, &text("/nix/store"), &1]));
        attempt("pivot_root", call(155, &[&text("/build"), &text("/build")]));
    }
    // Not the store directory itself: it is writable, for outputs.
    for target in [input, "/bin/sh", "/"] {
        attempt(&named(&format!("remount {target}")), mount("", target, "", BIND | REMOUNT));
        let cleared = [0_u64, 1, 0, 0];
        let attribute = call(442, &[&AT_FDCWD, &text(target), &0x8000, &cleared.as_ptr(), &32]);
        attempt(&named(&format!("make {target} writable")), attribute);
    }
    for target in [input, "/nix/store", "/build", "/tmp", "/dev/null", "/proc", "/bin/sh"] {
        attempt(&named(&format!("umount {target}")), call(166, &[&text(target), &0]));
        attempt(&named(&format!("detach {target}")), call(166, &[&text(target), &2]));
    }
    attempt(&named("sysfs"), mount("x", "/tmp", "sysfs", 0));
    attempt(&named("a block device"), mount("/dev/vda", "/tmp", "ext4", 0));
    attempt(&named("debugfs"), mount("x", "/tmp", "debugfs", 0));
}

/// A file by its number in the file system, which no mount hides: the root directory of ext4 is inode 2.
fn handles(prefix: &str) {
    for dir in ["/build", "/nix/store", "/tmp"] {
        let Ok(directory) = File::open(dir) else { continue };
        let handle: [u32; 4] = [8, 1, 2, 0];
        let opened = call(304, &[&directory.as_raw_fd(), &handle.as_ptr(), &0]);
        attempt(&format!("{prefix}open by handle in {dir}"), opened);
    }
}

fn devices(prefix: &str) {
    for (name, kind, major, minor) in [("mem", 0o020_000_u32, 1, 1), ("disk", 0o060_000, 254, 0), ("null", 0o020_000, 1, 3)] {
        let device: u32 = major << 8 | minor;
        let path = text(format!("/build/{name}"));
        attempt(&format!("{prefix}mknod {name}"), call(133, &[&path, &(kind | 0o666), &device]));
    }
    for name in ["mem", "kmem", "port", "kmsg", "vda", "loop-control", "fuse", "net/tun", "kvm", "console", "tty0"] {
        attempt(&format!("{prefix}open /dev/{name}"), File::open(Path::new("/dev").join(name)));
    }
    // The multiplexer of terminals is its own.
    for name in ["null", "zero", "tty"] {
        let changed = std::fs::set_permissions(Path::new("/dev").join(name), Permissions::from_mode(0));
        attempt(&format!("{prefix}chmod /dev/{name}"), changed);
    }
    attempt(&format!("{prefix}add entropy"), File::open("/dev/random").and_then(|f| {
        control(f.as_raw_fd(), 0x5206, std::ptr::null_mut())
    }));
}

/// Keyrings are inherited, across namespaces, unless someone sees to it that they are not.
fn keys() {
    const SESSION: i32 = -3;
    let found = call(250, &[&10, &SESSION, &text("user"), &text("drover-secret"), &0]);
    attempt("find a key of the server's", found);
}

fn terminal_tricks() {
    let mut byte = b'x';
    // With /dev/null as standard input and no terminal of one's own there is nothing to push into.
    attempt("push into standard input", control(0, 0x5412, (&raw mut byte).cast()));
    attempt("push into the log", control(1, 0x5412, (&raw mut byte).cast()));
    attempt("take over the console", control(1, 0x541d, std::ptr::null_mut()));
    attempt("open /dev/tty", File::open("/dev/tty"));
    attempt("read the log's other end", read_log());
}

/// The terminal's other side, where nobody writes: there must be nothing to read.
fn read_log() -> io::Result<usize> {
    let mut flags = 1_i32;
    control(1, 0x5421, (&raw mut flags).cast())?;
    // SAFETY: standard output is open and stays so.
    let mut file = std::mem::ManuallyDrop::new(unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(1) });
    let read = file.read(&mut [0; 16]);
    flags = 0;
    control(1, 0x5421, (&raw mut flags).cast())?;
    read
}

fn sockets() {
    if let Ok(port) = std::env::var("port") {
        attempt("connect to the machine", TcpStream::connect(format!("127.0.0.1:{port}")));
    }
    if let Ok(path) = std::env::var("socket") {
        attempt("connect to a socket in a directory", std::os::unix::net::UnixStream::connect(path));
    }
    if let Ok(name) = std::env::var("abstract") {
        use std::os::linux::net::SocketAddrExt as _;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name);
        let connected = address.and_then(|address| std::os::unix::net::UnixStream::connect_addr(&address));
        attempt("connect to an abstract socket", connected);
    }
    attempt("a raw socket", call(41, &[&2, &3, &1]));
    attempt("a packet socket", call(41, &[&17, &3, &0]));
}

/// The same once more, as root of a user namespace of one's own.
fn nested(input: &Path) -> io::Result<()> {
    // SAFETY: this process has one thread.
    let child = unsafe { sys::fork() };
    if child != 0 {
        let mut status = 0_i32;
        call(61, &[&child, &(&raw mut status), &0, &0])?;
        return Ok(());
    }
    let entered = call(272, &[&(NEW_USER | NEW_MOUNTS)])
        .and_then(|_| std::fs::write("/proc/self/uid_map", "0 1000 1"))
        .and_then(|()| std::fs::write("/proc/self/setgroups", "deny"))
        .and_then(|()| std::fs::write("/proc/self/gid_map", "0 100 1"));
    if let Err(error) = &entered {
        say(&format!("nested: no user namespace: {error}"));
    } else {
        say("nested: root");
        inputs("nested ", input);
        mounts("nested ", input);
        handles("nested ");
        devices("nested ");
        attempt("nested map another id", std::fs::write("/proc/self/uid_map", "0 0 4294967295"));
        attempt("nested sysrq", std::fs::write("/proc/sysrq-trigger", "h"));
        attempt("nested core_pattern", std::fs::write("/proc/sys/kernel/core_pattern", "|/build/x"));
        attempt("nested pid_max", std::fs::write("/proc/sys/kernel/pid_max", "400"));
        attempt("nested setuid of another build", call(105, &[&30002]));
        uncover(input);
    }
    // SAFETY: ends the child without the parent's destructors.
    unsafe { sys::_exit(0) }
}

/// What lies under mounts: the mount points of inputs, and whatever the root directory was taken from.
fn uncover(input: &Path) {
    attempt("nested bind without what is below", mount("/nix/store", "/tmp", "", BIND));
    let bound = mount("/", "/build", "", BIND | RECURSIVE).and_then(|_| mount("", "/build", "", PRIVATE | RECURSIVE));
    if bound.is_ok() {
        let copy = Path::new("/build").join(input.strip_prefix("/").expect("absolute")).join("bin/attack");
        attempt("nested write a copied mount", File::options().write(true).open(copy));
        let target = text(Path::new("/build").join(input.strip_prefix("/").expect("absolute")));
        attempt("nested umount a copied mount", call(166, &[&target, &2]));
    }
    // Out by `..` from a directory that a new root does not contain.
    let escaped = File::open("/").and_then(|old| {
        call(161, &[&text("/tmp")])?;
        call(81, &[&old.as_raw_fd()])?;
        for _ in 0..64 {
            std::env::set_current_dir("..")?;
        }
        std::fs::metadata("usr").map(drop)
    });
    attempt("nested out of a chroot", escaped);
}
