//! The collector's socket: who wants to protect a path while it works says so here, one full path a line, and is
//! answered with the byte `1` as soon as that path is not being deleted (Nix: gc.cc).

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use drover_nix::StoreDir;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::{Error, StoreLayout, socket};

/// Longest line: a path, its directory and the newline.
const MAX_LINE: u64 = 4096;
/// How long a client that has its answer may take to note its root, and how often that is looked at.
const MAX_SETTLE: Duration = Duration::from_secs(1);
const SETTLE_POLL: Duration = Duration::from_millis(1);
/// How long nobody is taken after someone could not be: what is lacking would not come from asking for it at once.
const REFUSAL_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

pub(super) struct Server {
    shared: Arc<Shared>,
    socket: PathBuf,
    /// Closing it ends the thread that accepts connections.
    stop: Option<OwnedFd>,
    acceptor: Option<JoinHandle<Vec<Answered>>>,
}

/// A client that was still there at the end, and the hash parts that it was told are protected.
struct Answered {
    stream: UnixStream,
    hash_parts: HashSet<String>,
}

struct Shared {
    store_dir: StoreDir,
    state: Mutex<State>,
    /// A deletion has ended.
    done: Condvar,
}

#[derive(Default)]
struct State {
    /// Hash parts of what may not be deleted.
    protected: HashSet<String>,
    /// Hash part of what is being deleted.
    deleting: Option<String>,
}

/// A client, and the thread that answers it, which gives the hash parts that it has.
type Client = (UnixStream, JoinHandle<HashSet<String>>);

/// While it lives, those who want to protect the path wait.
pub(super) struct Deletion<'a>(&'a Shared);

impl Server {
    pub(super) fn start(layout: &StoreLayout) -> Result<Self, Error> {
        let socket = layout.gc_socket();
        let failed = || Error::io("listen at", socket.clone());
        if let Some(directory) = socket.parent() {
            fs::create_dir_all(directory).map_err(failed())?;
        }
        // We have the collector's lock, so whoever made it has ended.
        let _ = fs::remove_file(&socket);
        let listener = socket::listen(&socket).map_err(failed())?;
        // Everybody may protect paths; it costs a collector no more than garbage that stays.
        fs::set_permissions(&socket, Permissions::from_mode(0o666)).map_err(failed())?;
        let (wait, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(Error::sys("make a pipe for", &socket))?;
        let shared = Arc::new(Shared {
            store_dir: layout.store_dir.clone(),
            state: Mutex::default(),
            done: Condvar::new(),
        });
        let acceptor = {
            let shared = Arc::clone(&shared);
            let accept = move || accept(&listener, &wait, |listener| admit(listener, &shared));
            thread::Builder::new().spawn(accept).map_err(Error::io("start a thread for", &socket))?
        };
        Ok(Self { shared, socket, stop: Some(stop), acceptor: Some(acceptor) })
    }

    pub(super) fn protect(&self, hash_parts: HashSet<String>) {
        self.shared.lock().protected.extend(hash_parts);
    }

    /// None if the path is protected.
    pub(super) fn begin_deletion(&self, hash_part: &str) -> Option<Deletion<'_>> {
        let mut state = self.shared.lock();
        if state.protected.contains(hash_part) {
            return None;
        }
        state.deleting = Some(hash_part.to_owned());
        Some(Deletion(&self.shared))
    }

    /// Ends the answers, and waits until what was answered can be seen by the collector that comes next: Nix's programs
    /// note a root in their own file only after the answer, and may not have got that far. `noted` gives the hash parts
    /// in those files. Whoever goes away needs nothing any more.
    pub(super) fn settle(
        mut self,
        mut noted: impl FnMut() -> Result<HashSet<String>, Error>,
    ) -> Result<(), Error> {
        let mut open = self.stop();
        open.retain(|client| !client.hash_parts.is_empty());
        let start = Instant::now();
        while !open.is_empty() && start.elapsed() < MAX_SETTLE {
            let noted = noted()?;
            open.retain(|client| !client.hash_parts.is_subset(&noted) && !client.is_gone());
            thread::sleep(SETTLE_POLL);
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<Answered> {
        let _ = fs::remove_file(&self.socket);
        drop(self.stop.take());
        self.acceptor.take().and_then(|acceptor| acceptor.join().ok()).unwrap_or_default()
    }
}

impl Answered {
    fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).is_err() || fds[0].revents().contains(PollFlags::HUP)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Drop for Deletion<'_> {
    fn drop(&mut self) {
        self.0.lock().deleting = None;
        self.0.done.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns once `hash_part` is protected.
    fn add(&self, hash_part: &str) {
        let mut state = self.lock();
        state.protected.insert(hash_part.to_owned());
        while state.deleting.as_deref() == Some(hash_part) {
            state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Until `stop` is closed; then takes no more requests, so that clients go on with the collector's lock, and gives those who
/// are still there. `admit` takes the next client, who is there.
fn accept(
    listener: &UnixListener,
    stop: &OwnedFd,
    mut admit: impl FnMut(&UnixListener) -> io::Result<Client>,
) -> Vec<Answered> {
    let mut clients = Vec::new();
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        if rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None)).is_err()
            || !fds[1].revents().is_empty()
        {
            break;
        }
        // Those who have gone need nothing any more.
        clients.retain(|(_, client): &Client| !client.is_finished());
        match admit(listener) {
            Ok(client) => clients.push(client),
            // Out of descriptors, memory or processes, which may pass. Whoever was not taken yet waits; a client whose connection
            // ends begins again, with the collector's lock.
            Err(_) => {
                let _ = rustix::event::poll(&mut fds[1..], Some(&REFUSAL_PAUSE));
            }
        }
    }
    // Who has no answer finds the connection ended when it is dropped.
    for (stream, _) in &clients {
        let _ = stream.shutdown(Shutdown::Read);
    }
    let join = |(stream, client): Client| Some(Answered { stream, hash_parts: client.join().ok()? });
    clients.into_iter().filter_map(join).collect()
}

/// Takes the next client and has a thread answer it.
fn admit(listener: &UnixListener, shared: &Arc<Shared>) -> io::Result<Client> {
    let (stream, _) = listener.accept()?;
    let other = stream.try_clone()?;
    // One that takes no answers must not hold up the end.
    let _ = stream.set_write_timeout(Some(MAX_SETTLE));
    let shared = Arc::clone(shared);
    Ok((other, thread::Builder::new().spawn(move || serve(&stream, &shared))?))
}

/// Answers one client until it goes or says what is no path. Gives what it was answered.
fn serve(stream: &UnixStream, shared: &Shared) -> HashSet<String> {
    let mut answered = HashSet::new();
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(_) if line.pop() == Some(b'\n') => {}
            _ => break,
        }
        // What lies elsewhere is nothing that we would delete.
        let path = shared.store_dir.parse(&line).ok();
        if let Some(path) = &path {
            shared.add(path.hash_part());
        }
        let mut answers = stream;
        if answers.write_all(b"1").is_err() {
            break;
        }
        answered.extend(path.map(|path| path.hash_part().to_owned()));
    }
    answered
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::testing::store_path;

    #[test]
    fn answers_at_once_but_for_what_is_being_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let layout = StoreLayout::in_root(dir.path());
        let server = Server::start(&layout).unwrap();
        let ask = |stream: &mut UnixStream, name: &str| {
            stream.write_all(format!("/nix/store/{}\n", store_path(name)).as_bytes()).unwrap();
        };
        let answer = |stream: &mut UnixStream| {
            let mut byte = [0];
            stream.read_exact(&mut byte).map(|()| byte[0])
        };
        let deletion = server.begin_deletion(store_path("a").hash_part()).unwrap();
        let mut other = socket::connect(&layout.gc_socket()).unwrap();
        let mut same = socket::connect(&layout.gc_socket()).unwrap();
        ask(&mut same, "a");
        ask(&mut other, "b");
        assert_eq!(answer(&mut other).unwrap(), b'1');
        let (send, receive) = mpsc::channel();
        let waiter = thread::spawn(move || {
            let byte = answer(&mut same).unwrap();
            send.send(()).unwrap();
            (byte, same)
        });
        // Whoever asks for what is being deleted must not have been answered; how long to look is a matter of taste.
        assert!(receive.recv_timeout(Duration::from_millis(50)).is_err());
        drop(deletion);
        let (byte, mut same) = waiter.join().unwrap();
        assert_eq!(byte, b'1');
        assert!(server.begin_deletion(store_path("a").hash_part()).is_none());
        assert!(server.begin_deletion(store_path("b").hash_part()).is_none());
        drop(server.begin_deletion(store_path("c").hash_part()).unwrap());
        drop(server);
        assert!(answer(&mut same).is_err());
        assert!(!layout.gc_socket().exists());
    }

    #[test]
    fn who_cannot_be_taken_is_not_tried_without_pause() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = socket::listen(&socket).unwrap();
        let _waits = socket::connect(&socket).unwrap();
        let (wait, stop) = rustix::pipe::pipe().unwrap();
        let (mut stop, mut tries) = (Some(stop), Vec::new());
        accept(&listener, &wait, |_| {
            tries.push(Instant::now());
            if tries.len() == 2 {
                drop(stop.take());
            }
            Err(rustix::io::Errno::MFILE.into())
        });
        assert_eq!(tries.len(), 2);
        let pause = Duration::try_from(REFUSAL_PAUSE).unwrap();
        assert!(tries[1] - tries[0] >= pause, "{:?}", tries[1] - tries[0]);
    }

    #[test]
    fn without_threads_there_is_no_collection() {
        crate::testing::without_threads("gc::server::tests::without_threads_there_is_no_collection", || {
            let dir = tempfile::tempdir().unwrap();
            let refused = Server::start(&StoreLayout::in_root(dir.path())).err().unwrap().to_string();
            assert!(refused.contains("start a thread"), "{refused}");
        });
    }

    #[test]
    fn the_end_waits_for_roots_to_be_noted_but_not_for_who_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let layout = StoreLayout::in_root(dir.path());
        let start = |names: &[&str]| {
            let server = Server::start(&layout).unwrap();
            let mut client = socket::connect(&layout.gc_socket()).unwrap();
            for name in names {
                client.write_all(format!("/nix/store/{}\n", store_path(name)).as_bytes()).unwrap();
                client.read_exact(&mut [0]).unwrap();
            }
            (server, client)
        };
        let hash_parts =
            |names: &[&str]| names.iter().map(|name| store_path(name).hash_part().to_owned()).collect();
        // One of two is there, then both.
        let (server, client) = start(&["a", "b"]);
        let mut looks = 0;
        let noted = || {
            looks += 1;
            Ok(hash_parts(if looks < 5 { &["a"] } else { &["a", "b", "c"] }))
        };
        server.settle(noted).unwrap();
        assert_eq!(looks, 5);
        drop(client);
        // It goes before it has noted anything.
        let (server, client) = start(&["a"]);
        let mut client = Some(client);
        let mut looks = 0;
        let noted = || {
            looks += 1;
            drop(client.take());
            Ok(HashSet::new())
        };
        server.settle(noted).unwrap();
        assert_eq!(looks, 1);
        // Nobody asked for anything: nothing to look at.
        let (server, _client) = start(&[]);
        server.settle(|| unreachable!()).unwrap();
    }
}
