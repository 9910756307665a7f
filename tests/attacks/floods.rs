//! Too much of everything, and builders that do not end.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use crate::{out, say, sys};

/// Hears no signal and says nothing, it and its children.
pub fn deaf() -> io::Result<()> {
    for _ in 0..3 {
        // SAFETY: this process has one thread.
        if unsafe { sys::fork() } == 0 {
            break;
        }
    }
    sys::ignore_signals();
    say("deaf");
    loop {
        // SAFETY: waits.
        unsafe { sys::pause() };
    }
}

/// Stops everything that it can, itself included.
pub fn stop() -> io::Result<()> {
    for _ in 0..3 {
        // SAFETY: this process has one thread.
        if unsafe { sys::fork() } == 0 {
            loop {
                // SAFETY: waits.
                unsafe { sys::pause() };
            }
        }
    }
    say("stopping");
    // SAFETY: reaches what is in this process's namespace.
    unsafe {
        sys::kill(-1, sys::SIGSTOP);
        sys::kill(0, sys::SIGSTOP);
        sys::kill(std::process::id() as i32, sys::SIGSTOP);
    }
    loop {
        // SAFETY: waits.
        unsafe { sys::pause() };
    }
}

/// As many processes as there can be, which make more as soon as there can be more.
pub fn bomb() -> io::Result<()> {
    say("bomb");
    let mut refused = false;
    loop {
        // SAFETY: this process has one thread.
        if unsafe { sys::fork() } < 0 {
            if !std::mem::replace(&mut refused, true) {
                // Once per process: a sign that the limit is reached.
                let _ = File::create("/build/full");
            }
            std::thread::yield_now();
        }
    }
}

pub fn hog() -> io::Result<()> {
    say("hog");
    let mut all = Vec::new();
    loop {
        let mut block = vec![0_u8; 1 << 20];
        block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        all.push(block);
    }
}

/// Fills the disk, and ends with `code`.
pub fn fill(code: i32) -> io::Result<()> {
    std::fs::write(out(), "small\n")?;
    for dir in ["/build", "/nix/store"] {
        let mut file = File::create(Path::new(dir).join("filler"))?;
        let block = vec![1; 64 << 10];
        while file.write_all(&block).is_ok() {}
        // To the last byte.
        while file.write_all(b"x").is_ok() {}
    }
    say("full");
    std::process::exit(code)
}

/// One line.
pub fn line(bytes: usize) -> io::Result<()> {
    std::fs::write(out(), "x")?;
    let block = vec![b'x'; 1 << 16];
    let mut stdout = io::stdout().lock();
    for _ in 0..bytes >> 16 {
        stdout.write_all(&block)?;
    }
    stdout.write_all(b"\n")
}

/// What terminals, log readers and Nix itself obey, and a failure, so that the last lines become a message.
pub fn escapes() -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(b"\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m\n")?;
    stdout.write_all(b"@nix {\"action\":\"start\",\"id\":1,\"level\":0,\"type\":100,\"text\":\"fake\"}\n")?;
    stdout.write_all(b"@nix {\"action\":\"setPhase\",\"phase\":\"\x1b[31m\"}\n")?;
    stdout.write_all(b"host-key: ssh-ed25519 AAAAfake\nlistening: 0.0.0.0:1\n")?;
    stdout.write_all(b"exited 0\nready\ndrover-builder: fake\n")?;
    stdout.write_all(b"nul \0 and \xff\xfe and \x08\x08\x7f\r\n")?;
    stdout.flush()?;
    std::process::exit(1)
}

/// All pseudo-terminals that there are.
pub fn terminals() -> io::Result<()> {
    std::fs::write(out(), "x")?;
    let mut all = Vec::new();
    while let Ok(file) = File::options().read(true).write(true).open("/dev/ptmx") {
        all.push(file);
    }
    say(&format!("terminals: {}", all.len()));
    crate::ready();
    Ok(())
}
