//! What a build leaves for those that come after it: processes, and everything that outlives processes.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use crate::sys::{self, call, text};
use crate::{attempt, out, say};

const KEY: i32 = 0x6472_6f76;

/// Processes that want to outlive the build: each of another kind, all deaf to signals, all writing.
pub fn survive() -> io::Result<()> {
    std::fs::create_dir(out())?;
    std::fs::write(out().join("file"), "benign\n")?;
    for kind in ["child", "daemon", "terminal", "namespace", "stopped"] {
        spawn(kind)?;
    }
    // Until all of them write.
    for kind in ["child", "daemon", "terminal", "namespace", "stopped"] {
        while !Path::new("/build").join(kind).exists() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    say("survivors run");
    Ok(())
}

fn spawn(kind: &str) -> io::Result<()> {
    // SAFETY: this process has one thread.
    if unsafe { sys::fork() } != 0 {
        return Ok(());
    }
    sys::ignore_signals();
    if kind == "namespace" {
        // Process 1 of a namespace of its own, in a user namespace of its own.
        const NEW_USER_AND_PIDS: u64 = 0x1000_0000 | 0x2000_0000;
        let _ = call(272, &[&NEW_USER_AND_PIDS]);
    }
    if kind != "child" {
        // SAFETY: as above; the middle one ends at once.
        unsafe {
            sys::setsid();
            if sys::fork() != 0 {
                sys::_exit(0);
            }
        }
    }
    let file = File::options().read(true).write(true).open(out().join("file"))?;
    if kind != "terminal" {
        // Without the terminal the build's end does not wait for this process.
        let null = File::options().read(true).write(true).open("/dev/null")?;
        for descriptor in 0..3 {
            use std::os::fd::AsRawFd as _;
            call(33, &[&null.as_raw_fd(), &descriptor])?;
        }
    }
    std::fs::write(Path::new("/build").join(kind), "runs")?;
    if kind == "stopped" {
        // SAFETY: stops this process only.
        unsafe { sys::kill(std::process::id() as i32, sys::SIGSTOP) };
    }
    let mut round = 0_u64;
    loop {
        use std::os::unix::fs::FileExt as _;
        let _ = file.write_all_at(b"malign\n", 0);
        let _ = std::fs::write(out().join(format!("{kind}-{}", round % 10)), "malign\n");
        let _ = std::fs::write("/build/again", "malign\n");
        round += 1;
    }
}

/// Leaves one thing of every kind.
pub fn leave() -> io::Result<()> {
    std::fs::write(out(), "left\n")?;
    let shared = call(29, &[&KEY, &4096, &0o1666]);
    say(&format!("shared memory: {}", shared.is_ok()));
    say(&format!("semaphores: {}", call(64, &[&KEY, &1, &0o1666]).is_ok()));
    say(&format!("messages: {}", call(68, &[&KEY, &0o1666]).is_ok()));
    let queue = call(240, &[&text("drover-queue"), &0o102, &0o666, &0]);
    say(&format!("message queue: {}", queue.is_ok()));
    for dir in ["/tmp", "/dev/shm", "/build", "/nix/store"] {
        let path = Path::new(dir).join("left-behind");
        std::fs::write(&path, "left\n")?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777))?;
    }
    let key = call(248, &[&text("user"), &text("drover-left"), &text("left"), &4, &-3]);
    say(&format!("key: {}", key.is_ok()));
    let _listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name("drover-left")?)?;
    let _tcp = std::net::TcpListener::bind("127.0.0.1:7777")?;
    // SAFETY: this process has one thread. The child keeps the sockets open and would serve them.
    if unsafe { sys::fork() } == 0 {
        sys::ignore_signals();
        loop {
            // SAFETY: waits.
            unsafe { sys::pause() };
        }
    }
    std::io::stdout().flush()
}

/// Looks for what [`leave`] left.
pub fn search() -> io::Result<()> {
    std::fs::write(out(), "searched\n")?;
    attempt("shared memory", call(29, &[&KEY, &4096, &0]));
    attempt("semaphores", call(64, &[&KEY, &1, &0]));
    attempt("messages", call(68, &[&KEY, &0]));
    attempt("message queue", call(240, &[&text("drover-queue"), &2, &0, &0]));
    for dir in ["/tmp", "/dev/shm", "/build", "/nix/store"] {
        attempt(&format!("file in {dir}"), std::fs::metadata(Path::new(dir).join("left-behind")));
        let names = std::fs::read_dir(dir)?.filter_map(Result::ok).map(|entry| entry.file_name());
        let names: Vec<_> = names.filter(|name| !name.to_string_lossy().ends_with("-attacks")).collect();
        let allowed = usize::from(dir == "/nix/store");
        if names.len() > allowed {
            attempt(&format!("something in {dir}: {names:?}"), Ok(()));
        }
    }
    attempt("key", call(250, &[&10, &-3, &text("user"), &text("drover-left"), &0]));
    let socket = SocketAddr::from_abstract_name("drover-left").and_then(|address| UnixStream::connect_addr(&address));
    attempt("abstract socket", socket);
    attempt("TCP", std::net::TcpStream::connect("127.0.0.1:7777"));
    attempt("another process", call(62, &[&2, &0]));
    Ok(())
}

/// Runs a command that has a key in its session's keyring, as whoever logs in to a machine has.
pub fn with_key(command: &[&str]) -> io::Result<()> {
    use std::os::unix::process::CommandExt as _;
    call(250, &[&1, &0])?;
    call(248, &[&text("user"), &text("drover-secret"), &text("secret"), &6, &-3])?;
    Err(std::process::Command::new(command[0]).args(&command[1..]).exec())
}
