//! Unix sockets by paths of any length: the kernel takes 107 bytes, and a state directory may be deeper.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// Bytes of a path that fit into a socket's address, with room for NUL.
const MAX_ADDRESS: usize = 107;

pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let (_directory, address) = address(path)?;
    UnixStream::connect(address)
}

pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    let (_directory, address) = address(path)?;
    UnixListener::bind(address)
}

/// A short path to the same file, good while the descriptor is open.
fn address(path: &Path) -> io::Result<(Option<OwnedFd>, PathBuf)> {
    use std::os::fd::AsRawFd as _;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if path.as_os_str().len() <= MAX_ADDRESS {
        return Ok((None, path.to_owned()));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(parent, flags, Mode::empty())?;
    let address = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
    Ok((Some(directory), address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_are_too_long_work_too() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("s"), dir.path().join("long/".repeat(40)).join("s")] {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let listener = listen(&path).unwrap();
            let _client = connect(&path).unwrap();
            listener.accept().unwrap();
        }
    }
}
