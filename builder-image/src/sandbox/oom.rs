//! Whether the kernel killed something for want of memory while a build ran. The kernel counts such kills for each control
//! group and for the whole machine; nothing tells a build's parent directly, who sees a SIGKILL like any other.

use std::fs;
use std::path::{Path, PathBuf};

use super::cgroup::Hierarchies;

/// Kills of processes for want of memory, since a watch began.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct OomKills {
    pub count: u64,
    /// Counted for the whole machine, since there are no counts of this program's own: they may be someone else's.
    pub whole_machine: bool,
}

/// A counter and where it stood.
#[derive(Debug)]
pub(crate) struct OomWatch {
    counter: Option<Counter>,
}

#[derive(Debug)]
struct Counter {
    file: PathBuf,
    before: u64,
    whole_machine: bool,
}

impl OomWatch {
    /// Begins to watch. `group` is the directory of the build's own memory group if it has one; otherwise the group of
    /// this program counts, and without one the machine.
    pub(crate) fn start(group: Option<&Path>) -> Self {
        let own = Hierarchies::find();
        let directories = group.into_iter().chain(own.controller("memory")).chain(own.unified.as_deref());
        let of_groups = directories
            .flat_map(|dir| [(dir.join("memory.events"), false), (dir.join("memory.oom_control"), false)]);
        let all = of_groups.chain([(PathBuf::from("/proc/vmstat"), true)]);
        Self::first(all)
    }

    /// Watches the first of these files that counts.
    fn first(files: impl IntoIterator<Item = (PathBuf, bool)>) -> Self {
        let counter = files.into_iter().find_map(|(file, whole_machine)| {
            let before = read(&file)?;
            Some(Counter { file, before, whole_machine })
        });
        Self { counter }
    }

    /// Kills since the beginning. Without any counter there are none.
    pub(crate) fn kills(&self) -> OomKills {
        let Some(Counter { file, before, whole_machine }) = &self.counter else { return OomKills::default() };
        let count = read(file).unwrap_or(*before).saturating_sub(*before);
        OomKills { count, whole_machine: *whole_machine }
    }
}

fn read(file: &Path) -> Option<u64> {
    parse(&fs::read_to_string(file).ok()?)
}

/// The line `oom_kill N`, which `memory.events`, `memory.oom_control` and `/proc/vmstat` have alike. Not `oom_kill_disable`,
/// `oom_group_kill` or `oom`.
fn parse(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_kinds_of_file() {
        assert_eq!(parse("low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 1\n"), Some(2));
        assert_eq!(parse("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"), Some(5));
        assert_eq!(parse("nr_free_pages 4\noom_kill 11\ndrop_pagecache 0\n"), Some(11));
        assert_eq!(parse("oom_kill_disable 0\nunder_oom 0\n"), None);
    }

    #[test]
    fn the_first_file_that_counts_is_watched() {
        let dir = tempfile::tempdir().unwrap();
        let [absent, group, machine] = ["absent", "group", "machine"].map(|name| dir.path().join(name));
        fs::write(&group, "oom_kill 3\n").unwrap();
        fs::write(&machine, "oom_kill 10\n").unwrap();
        let files = [(absent.clone(), false), (group.clone(), false), (machine.clone(), true)];
        let watch = OomWatch::first(files);
        assert_eq!(watch.kills(), OomKills::default());
        fs::write(&group, "oom_kill 5\n").unwrap();
        assert_eq!(watch.kills(), OomKills { count: 2, whole_machine: false });
        fs::remove_file(&group).unwrap();
        assert_eq!(watch.kills().count, 0, "a group that is gone says nothing more");

        let watch = OomWatch::first([(absent, false), (machine.clone(), true)]);
        fs::write(&machine, "oom_kill 11\n").unwrap();
        assert_eq!(watch.kills(), OomKills { count: 1, whole_machine: true });
    }

    #[test]
    fn this_machine_counts() {
        assert!(OomWatch::start(None).counter.is_some());
    }
}
