//! A control group for one build, where this program may make one: below its own, in version 2's hierarchy. Version 1 is
//! left alone, as Nix leaves it: moving a process into a group takes longer than the whole of a small build, and only
//! version 2 lets a process begin in one. It limits nothing. It is a second way to find all of a build's processes, beside its
//! process namespace or its id.
//!
//! In a pod there is none as a rule: its groups are mounted read-only. Nothing depends on it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal};

use super::cgroup::Hierarchies;
use super::linux_parent::has_clone_into;

/// Names that are tried, if others are taken: by a program of the same number in another process namespace, or by one
/// that was killed.
const NAMES: u64 = 16;
/// How often what is in a group is killed by hand (Nix: cgroup.cc), and how long each time is waited for its end.
const ROUNDS: u32 = 20;
const ROUND: Duration = Duration::from_millis(10);

/// Removed when dropped, with everything in it killed.
#[derive(Debug)]
pub(crate) struct Group {
    dir: PathBuf,
}

impl Group {
    /// None where this program may not make one.
    pub(crate) fn make() -> Option<Self> {
        if !has_clone_into() {
            return None;
        }
        Self::make_in(Hierarchies::find().unified.as_deref()?)
    }

    fn make_in(parent: &Path) -> Option<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        for _ in 0..NAMES {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let dir = parent.join(format!("drover-build-{}-{number}", std::process::id()));
            match fs::create_dir(&dir) {
                Ok(()) => {
                    let group = Self { dir };
                    return group.takes_processes().then_some(group);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// Not so below a group whose threads are spread over groups (cgroups(7), "domain invalid").
    fn takes_processes(&self) -> bool {
        let kind = fs::read_to_string(self.dir.join("cgroup.type"));
        kind.map_or(true, |kind| kind.trim() == "domain")
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Kills everything in it.
    fn kill(&self) {
        if fs::write(self.dir.join("cgroup.kill"), "1").is_ok() {
            return;
        }
        // Linux before 5.14.
        for pid in self.processes() {
            let _gone = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    fn processes(&self) -> Vec<Pid> {
        let list = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        list.lines().filter_map(|line| Pid::from_raw(line.trim().parse().ok()?)).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // As a rule there is nothing in it any more, and this is all.
        for _ in 0..ROUNDS {
            match fs::remove_dir(&self.dir) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                _ => return,
            }
            self.kill();
            std::thread::sleep(ROUND);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn names_that_are_taken_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Group::make_in(dir.path()).unwrap();
        let second = Group::make_in(dir.path()).unwrap();
        assert!(first.dir() != second.dir() && first.dir().is_dir());
        let gone = first.dir().to_owned();
        drop(first);
        assert!(!gone.exists() && second.dir().is_dir());
        assert!(Group::make_in(&dir.path().join("absent")).is_none());
    }

    /// Where groups can be made: all that this machine has.
    #[test]
    fn what_is_in_a_group_dies_with_it() {
        let Some(group) = Group::make() else {
            // An ordinary user, or a container: then there must be no place for one.
            let own = Hierarchies::find().unified;
            assert!(!has_clone_into() || own.is_none_or(|parent| fs::create_dir(parent.join("x")).is_err()));
            return;
        };
        let dir = group.dir().to_owned();
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        assert_eq!(group.processes(), [Pid::from_child(&child)]);
        // A zombie is in no group any more, and this test's own child stays one until it is waited for.
        drop(group);
        let left = dir.exists();
        if left {
            child.kill().unwrap();
        }
        let end = child.wait().unwrap();
        if left {
            // Nothing stays on the machine, whatever comes out.
            fs::remove_dir(&dir).unwrap();
        }
        assert!(!left, "what was in the group has outlived it");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&end), Some(libc::SIGKILL));
    }
}
