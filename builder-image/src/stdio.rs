//! One session on standard input and output: what an SSH server's forced command or Nix itself starts.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, poll};

use crate::backend::Session;
use crate::build::Builder;
use crate::build::log::Log;
use crate::build::supervise::Cancel;

/// Serves until the client closes its side.
pub(crate) fn serve(builder: Builder, write: bool) -> anyhow::Result<()> {
    let input = io::stdin().as_fd().try_clone_to_owned().context("cannot open standard input")?;
    let output = io::stdout().as_fd().try_clone_to_owned().context("cannot open standard output")?;
    let error = io::stderr().as_fd().try_clone_to_owned().context("cannot open standard error")?;
    let cancel = Cancel::new().context("cannot make an event descriptor")?;
    watch(input.try_clone().context("cannot open standard input")?, cancel.clone());
    let dir = builder.store.store_dir().clone();
    let log = Log::to(File::from(error));
    let mut session = Session::new(builder, write, log.clone(), cancel)?;
    let result = drover_serve::serve(File::from(input), File::from(output), &mut session, &dir, write);
    log.flush();
    Ok(result?)
}

/// Cancels builds as soon as nobody can send anything any more: the client is gone.
fn watch(input: OwnedFd, cancel: Cancel) {
    std::thread::spawn(move || {
        loop {
            // Nothing is asked for but what is always reported: hang-up and errors. Sockets say it their own way.
            let mut fds = [PollFd::new(&input, PollFlags::RDHUP)];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
                Ok(_) => {
                    cancel.cancel();
                    return;
                }
            }
        }
    });
}
