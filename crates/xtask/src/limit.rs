//! Time limits for programs that start others: when the time is over, everything that came of them is killed.
//!
//! A process belongs to a watch if it carries the watch's mark in its environment, or if an ancestor of it does: so a
//! program that made a process group or a session of its own is found, and so is one whose parent has ended, unless it
//! cleared its environment too. Reads /proc, sends signals, and owns one thread.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The environment variable that says to which watch a process belongs.
pub const MARK: &str = "DROVER_XTASK_RUN";
/// How often a watch whose time is over looks for what was started since.
const AGAIN: Duration = Duration::from_millis(100);

/// The value of [`MARK`] for what this program starts: that of the run that it belongs to itself, or one of its own.
pub fn mark() -> &'static str {
    static MINE: OnceLock<String> = OnceLock::new();
    MINE.get_or_init(|| {
        std::env::var(MARK).unwrap_or_else(|_| {
            // A process id comes again, and what an earlier run left behind is not this one's.
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            format!("{}-{}", std::process::id(), now.as_nanos())
        })
    })
}

/// Kills what carries a mark when the time is over, and again and again until it is stopped.
pub struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    deadline: Instant,
    stopped: bool,
    /// Once the time is over: the programs that were killed.
    killed: Option<BTreeSet<String>>,
}

impl Watch {
    /// Watches what carries `mark`, now or later, until `deadline`.
    pub fn until(deadline: Instant, mark: &str) -> Self {
        let state = Mutex::new(State { deadline, stopped: false, killed: None });
        let shared = Arc::new(Shared { state, changed: Condvar::new() });
        let (watched, mark) = (Arc::clone(&shared), mark.to_owned());
        let thread = std::thread::spawn(move || watched.watch(&mark));
        Self { shared, thread: Some(thread) }
    }

    /// Whether the time is over.
    pub fn is_over(&self) -> bool {
        self.shared.lock().killed.is_some()
    }

    /// Ends the watch. The programs that it killed, by the paths of their files, if the time was over.
    pub fn stop(mut self) -> Option<BTreeSet<String>> {
        self.end();
        self.shared.lock().killed.take()
    }

    /// Says that the time is over, whatever the clock says.
    #[cfg(test)]
    pub(crate) fn expire(&self) {
        self.shared.lock().deadline = Instant::now();
        self.shared.changed.notify_all();
    }

    fn end(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            drop(thread.join()); // it does not panic, and if it did, nothing would be watched
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, mark: &str) {
        let mut state = self.lock();
        while !state.stopped {
            let left = state.deadline.saturating_duration_since(Instant::now());
            let wait = if left.is_zero() {
                state.killed.get_or_insert_default().extend(kill_all(mark));
                AGAIN
            } else {
                left
            };
            let waited = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
        }
        // What was between two programs before had no environment to be known by.
        if let Some(killed) = &mut state.killed {
            killed.extend(kill_all(mark));
        }
    }
}

/// Kills what carries the mark and all that came of it; the paths of the programs.
fn kill_all(mark: &str) -> BTreeSet<String> {
    // First they are stopped, until none is new: a process that runs could start another that this does not see.
    let mut known = BTreeSet::new();
    loop {
        let found: Vec<u32> = marked(mark).into_iter().filter(|pid| known.insert(*pid)).collect();
        if found.is_empty() {
            break;
        }
        found.into_iter().for_each(|pid| signal(pid, Signal::STOP));
    }
    // A process that has ended meanwhile has no file.
    let programs = known.iter().filter_map(|pid| fs::read_link(format!("/proc/{pid}/exe")).ok());
    let programs = programs.map(|path| path.display().to_string()).collect();
    known.into_iter().for_each(|pid| signal(pid, Signal::KILL));
    programs
}

/// The living processes that carry the mark, and their descendants; never this process.
fn marked(mark: &str) -> BTreeSet<u32> {
    let line = format!("{MARK}={mark}");
    let mut marked = BTreeSet::new();
    let mut children = BTreeMap::<u32, Vec<u32>>::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Processes end at any moment; those of others cannot be read.
        let Some(parent) = fs::read_to_string(entry.path().join("stat")).ok().as_deref().and_then(parent)
        else {
            continue;
        };
        children.entry(parent).or_default().push(pid);
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environ.split(|byte| *byte == 0).any(|variable| variable == line.as_bytes()) {
            marked.insert(pid);
        }
    }
    marked.remove(&std::process::id());
    let mut next: Vec<u32> = marked.iter().copied().collect();
    while let Some(pid) = next.pop() {
        next.extend(children.remove(&pid).into_iter().flatten().filter(|child| marked.insert(*child)));
    }
    marked
}

/// The parent's process id in `/proc/PID/stat`, unless the process has ended and only waits to be asked how (proc(5)).
fn parent(stat: &str) -> Option<u32> {
    // The name, in parentheses, may hold anything, parentheses too.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    fields.next()?.parse().ok().filter(|_| !matches!(state, "Z" | "X"))
}

/// A process that has ended meanwhile is as good as one that was killed.
fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_parent_is_found_whatever_the_name_is() {
        assert_eq!(parent("42 (sh) S 7 42 42 0 -1"), Some(7));
        assert_eq!(parent("42 (a) R 1 (b) c) R 9 42 42 0 -1"), Some(9));
        assert_eq!(parent("42 (sh) Z 7 42 42 0 -1"), None);
        assert_eq!(parent("42 (sh"), None);
    }

    #[test]
    fn what_ends_in_time_is_left_alone_and_what_does_not_is_killed() {
        let mark = format!("limit-test-{}", std::process::id());
        let watch = Watch::until(Instant::now() + Duration::from_secs(600), &mark);
        assert!(Command::new("true").env(MARK, &mark).status().unwrap().success());
        assert_eq!((watch.is_over(), watch.stop()), (false, None));

        let mut sleep = Command::new("sleep").arg("600").env(MARK, &mark).spawn().unwrap();
        let watch = Watch::until(Instant::now(), &mark);
        assert!(!sleep.wait().unwrap().success());
        assert!(watch.is_over());
        let killed = watch.stop().unwrap();
        assert_eq!(killed.len(), 1, "{killed:?}");
    }
}
