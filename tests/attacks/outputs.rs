//! Outputs that are not what outputs should be, and names that the registrar might fall for.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::sys::{AT_FDCWD, call, text};
use crate::{attempt, out, say};

/// Symlinks to `victim` under all names that anyone who handles this build's output may use, and the output itself.
pub fn plant(names: &[&str]) -> io::Result<()> {
    let victim = std::env::var("victim").expect("a victim");
    let out = out();
    let base = out.file_name().expect("a name").to_string_lossy().into_owned();
    let server = std::env::var("server").unwrap_or_default();
    let mut planted: Vec<String> =
        ["x", "tmp", ".links", ".tmp-link", "out", "store", "root", "build"].map(String::from).into();
    for suffix in [".lock", ".tmp", ".chroot", ".drv", ".drv.chroot", ".check", "-x"] {
        planted.push(format!("{base}{suffix}"));
    }
    for number in 0..32 {
        planted.push(format!("tmp-{server}-{number}"));
        planted.push(format!(".tmp-link-{server}-{number}"));
        planted.push(format!("nix-{server}-{number}"));
        planted.push(format!(".drover-delete-{number}"));
    }
    planted.extend(names.iter().map(ToString::to_string));
    let mut count = 0;
    for dir in ["/nix/store", "/build", "/tmp"] {
        for name in &planted {
            count += usize::from(symlink(&victim, Path::new(dir).join(name)).is_ok());
        }
    }
    say(&format!("planted {count}"));
    std::fs::write(out, "benign\n")?;
    Ok(())
}

/// One odd kind of output.
pub fn output(kind: &str) -> io::Result<()> {
    let out = out();
    let victim = || PathBuf::from(std::env::var_os("victim").expect("a victim"));
    let inside = |name: &str| -> io::Result<PathBuf> {
        std::fs::create_dir_all(&out)?;
        Ok(out.join(name))
    };
    let node = |path: &Path, mode: u32| call(133, &[&text(path), &mode, &0]).map(drop);
    match kind {
        "symlink" => symlink(victim(), &out),
        "symlink-inside" => symlink(victim(), inside("link")?),
        "fifo" => node(&out, 0o010_644),
        "fifo-inside" => node(&inside("fifo")?, 0o010_644),
        "socket" => node(&out, 0o140_644),
        "socket-inside" => std::os::unix::net::UnixListener::bind(inside("socket")?).map(drop),
        // The one device that anybody may make: 0, 0.
        "device" => node(&out, 0o020_644),
        "device-inside" => node(&inside("device")?, 0o020_644),
        "writable" => {
            std::fs::write(&out, "x")?;
            std::fs::set_permissions(&out, std::os::unix::fs::PermissionsExt::from_mode(0o666))
        }
        "nothing" => Ok(()),
        "parent-symlink" => {
            // What is mounted on, or in use, cannot be exchanged; the name itself can.
            std::fs::create_dir("/nix/store/elsewhere")?;
            std::fs::write("/nix/store/elsewhere/file", "x")?;
            symlink("elsewhere", &out)
        }
        "hard-links" => {
            let second = PathBuf::from(std::env::var_os("second").expect("two outputs"));
            std::fs::create_dir(&second)?;
            std::fs::write(inside("file")?, "shared\n")?;
            std::fs::hard_link(out.join("file"), second.join("file"))?;
            // A name that stays outside of both.
            std::fs::hard_link(out.join("file"), "/nix/store/third-name")
        }
        "proc" => symlink("/proc/self/root", &out),
        "unreadable" => {
            use std::os::unix::fs::DirBuilderExt as _;
            DirBuilder::new().mode(0o755).create(&out)?;
            std::fs::write(out.join("file"), "x")?;
            let mode = |path: &Path, mode| std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode));
            mode(&out.join("file"), 0)?;
            DirBuilder::new().mode(0).create(out.join("dir"))
        }
        other => panic!("unknown output {other}"),
    }
}

/// Names that are hard to print.
pub fn names() -> io::Result<()> {
    let out = out();
    std::fs::create_dir(&out)?;
    let odd: [&[u8]; 8] =
        [b"new\nline", b"\xff\xfe", b" ", b"-rf", b"\x1b[31m", b"tab\there", b"quote'\"`$(x)", &[b'n'; 255]];
    for name in odd {
        std::fs::write(out.join(OsStr::from_bytes(name)), name)?;
    }
    Ok(())
}

/// A file in directories that are no deeper than an archive may be, but have names that add up to more than PATH_MAX.
pub fn long(names: usize) -> io::Result<()> {
    std::fs::create_dir(out())?;
    let names: PathBuf = (0..names).map(|_| "d".repeat(250)).collect();
    make_below(&out().join(names))
}

/// Directories that no path can name: each is made from within the one above it.
fn make_below(path: &Path) -> io::Result<()> {
    std::env::set_current_dir(out())?;
    for name in path.strip_prefix(out()).expect("below").components() {
        std::fs::create_dir(name)?;
        std::env::set_current_dir(name)?;
    }
    std::fs::write("bottom", "x")?;
    std::env::set_current_dir("/")
}

/// Nested directories, in the output and in every place that is cleaned up.
pub fn deep(count: usize) -> io::Result<()> {
    for (top, count) in [(out(), count), ("/build/deep".into(), count / 10), ("/tmp/deep".into(), count / 10)] {
        std::fs::create_dir(&top)?;
        std::env::set_current_dir(&top)?;
        for _ in 0..count {
            call(258, &[&AT_FDCWD, &text("d"), &0o755])?;
            call(80, &[&text("d")])?;
        }
        File::create("bottom")?;
    }
    std::env::set_current_dir("/")
}

pub fn many(count: usize) -> io::Result<()> {
    let out = out();
    std::fs::create_dir(&out)?;
    for number in 0..count {
        if number % 1000 == 0 {
            std::fs::create_dir(out.join((number / 1000).to_string()))?;
        }
        File::create(out.join(format!("{}/{number}", number / 1000)))?;
    }
    Ok(())
}

/// A file that is all hole.
pub fn sparse(size: u64) -> io::Result<()> {
    let file = File::create(out())?;
    attempt("make the hole", file.set_len(size));
    say("sparse");
    Ok(())
}

/// A build directory that takes a while to delete, and a failure.
pub fn tree(count: usize) -> io::Result<()> {
    for number in 0..count {
        let dir = PathBuf::from(format!("/build/d{number}"));
        std::fs::create_dir(&dir)?;
        for file in 0..20 {
            File::create(dir.join(format!("f{file}")))?;
        }
    }
    crate::ready();
    std::process::exit(1)
}

/// Tells what the files are that the builder's own environment names.
pub fn files() -> io::Result<()> {
    std::fs::write(out(), "files\n")?;
    for (name, value) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.ends_with("Path") || name.starts_with("NIX_ATTRS_") {
            say(&format!("{name}: {:?}", std::fs::read_to_string(value)?.len()));
        }
    }
    Ok(())
}
