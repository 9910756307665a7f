//! Descriptors of outputs in other hands.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use crate::{attempt, out, ready, say, sys};

/// Hands a writable descriptor of its output to whoever connects to an abstract socket.
pub fn give(name: &str) -> io::Result<()> {
    std::fs::write(out(), "benign\n")?;
    let file = File::options().read(true).write(true).open(out())?;
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    listener.set_nonblocking(true)?;
    say("listening");
    while !std::path::Path::new("/build/go").exists() {
        match listener.accept() {
            Ok((stream, _)) => attempt("send", sys::send_descriptor(stream.as_raw_fd(), file.as_raw_fd())),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    Ok(())
}

/// Takes the descriptor that another build gives away, and writes through it.
pub fn take(name: &str) -> io::Result<()> {
    std::fs::write(out(), "also benign\n")?;
    let taken = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)
        .and_then(|stream| sys::receive_descriptor(stream.as_raw_fd()));
    if let Ok(descriptor) = &taken {
        use std::io::Write as _;
        // SAFETY: it was just received.
        let mut file = File::from(unsafe { OwnedFd::from_raw_fd(*descriptor) });
        attempt("write", file.write_all(b"malign\n"));
    }
    attempt("take", taken);
    Ok(())
}

/// An output with a directory, open for as long as the test needs to get hold of it.
pub fn hold_open() -> io::Result<()> {
    std::fs::create_dir_all(out().join("d"))?;
    std::fs::write(out().join("d/file"), "benign\n")?;
    std::fs::write(out().join("file"), "benign\n")?;
    let _file = File::options().read(true).write(true).open(out().join("file"))?;
    let _directory = File::open(out())?;
    ready();
    Ok(())
}
