//! One session on standard input and output: what an SSH server's forced command or Nix itself starts.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, poll};

use crate::backend::Session;
use crate::build::Builder;
use crate::build::log::Log;
use crate::build::supervise::Cancel;

/// Bytes that a pipe from or to the client should hold: what is read at a time. A user has 64 MiB for all of its pipes.
const PIPE_SIZE: usize = 256 << 10;

/// Serves until the client closes its side.
pub(crate) fn serve(builder: Builder, write: bool) -> anyhow::Result<()> {
    let input = io::stdin().as_fd().try_clone_to_owned().context("cannot open standard input")?;
    let output = io::stdout().as_fd().try_clone_to_owned().context("cannot open standard output")?;
    let error = io::stderr().as_fd().try_clone_to_owned().context("cannot open standard error")?;
    let cancel = Cancel::new().context("cannot make an event descriptor")?;
    let lingers = !builder.settings.linger.is_zero();
    let let_go = if lingers { vec![1, 2, output.as_raw_fd(), error.as_raw_fd()] } else { Vec::new() };
    let watched = input.try_clone().context("cannot open standard input")?;
    let dir = builder.store.store_dir().clone();
    let log = Log::to(File::from(error)).context("cannot start a thread for the log")?;
    let ends = (rustix::stdio::stdin(), rustix::stdio::stdout());
    [ends.0, ends.1].into_iter().for_each(widen);
    let mut session = Session::new(builder, write, log.clone(), cancel.clone())?.with_ends(ends.0, ends.1);
    watch(watched, cancel, session.building(), let_go)
        .context("cannot start a thread that watches the client")?;
    let result = drover_serve::serve(File::from(input), File::from(output), &mut session, &dir, write);
    log.flush();
    Ok(result?)
}

/// Makes room in a pipe: fewer turns for each side. What is no pipe, or may not grow, works as it is.
fn widen(pipe: BorrowedFd<'_>) {
    let _ = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_SIZE);
}

/// Cancels builds as soon as nobody can send anything any more: the client is gone. If a build is running then and may
/// linger, lets go of these descriptors, which stay what they were to everyone else but lead nowhere: whoever reads them
/// must not wait for a build that goes on without them. Otherwise who closes its side may still read its answers.
fn watch(input: OwnedFd, cancel: Cancel, building: Arc<AtomicBool>, let_go: Vec<RawFd>) -> io::Result<()> {
    let watch = move || {
        loop {
            // Nothing is asked for but what is always reported: hang-up and errors. Sockets say it their own way.
            let mut fds = [PollFd::new(&input, PollFlags::RDHUP)];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
                Ok(_) => {
                    cancel.cancel();
                    // A build that begins only now finds itself cancelled before it runs, and does not linger.
                    if building.load(Ordering::SeqCst) {
                        let_go.into_iter().for_each(lead_nowhere);
                    }
                    return;
                }
            }
        }
    };
    std::thread::Builder::new().name("watch".into()).spawn(watch).map(drop)
}

#[allow(unsafe_code)]
fn lead_nowhere(descriptor: RawFd) {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        // SAFETY: takes two numbers. The descriptor stays open throughout, so that its owner, who may be writing to it
        // just now, never finds it closed or anybody else's; a write in progress keeps the file that it began with.
        let _kept = unsafe { libc::dup2(null.as_raw_fd(), descriptor) };
    }
}
