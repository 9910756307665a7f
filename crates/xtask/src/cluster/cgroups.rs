//! The control group below which kubelet puts every pod: one directory per hierarchy (version 1), or one in all (version 2).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Makes the group `name` at the top of every hierarchy.
pub(super) fn make(name: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let group = hierarchy.join(name);
        fs::create_dir_all(&group)
            .with_context(|| format!("could not make the control group {}", group.display()))?;
        // A new cpuset is empty, and nothing can run in it; other controllers start without limits.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(value) = fs::read_to_string(hierarchy.join(file)) {
                fs::write(group.join(file), value)?;
            }
        }
        let controllers = fs::read_to_string(hierarchy.join("cgroup.controllers")).unwrap_or_default();
        for controller in controllers.split_whitespace() {
            // Version 2: hand every controller down to the group. Some cannot be, which kubelet says where it matters.
            let _ = fs::write(hierarchy.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    Ok(())
}

/// Removes the group and those below it; says no while one of them still holds a process.
pub(super) fn remove(name: &str) -> Result<bool> {
    let all = mounted(&mounts()?, &["cgroup", "cgroup2"]);
    let gone: Vec<bool> = all.iter().map(|hierarchy| remove_tree(&hierarchy.join(name))).collect();
    Ok(gone.into_iter().all(|gone| gone))
}

fn remove_tree(group: &Path) -> bool {
    let Ok(entries) = fs::read_dir(group) else { return true };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(group).is_ok()
}

/// Where kubelet wants the group to be: in every version 1 hierarchy, or in the one of version 2 where there are none.
/// Where both are mounted, runc still makes it in version 2's.
fn hierarchies() -> Result<Vec<PathBuf>> {
    Ok(hierarchies_in(&mounts()?))
}

fn hierarchies_in(mounts: &str) -> Vec<PathBuf> {
    let first = mounted(mounts, &["cgroup"]);
    if first.is_empty() { mounted(mounts, &["cgroup2"]) } else { first }
}

fn mounts() -> Result<String> {
    fs::read_to_string("/proc/mounts").context("could not read /proc/mounts")
}

fn mounted(mounts: &str, kinds: &[&str]) -> Vec<PathBuf> {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let of_kind = fields.filter(|fields| fields.get(2).is_some_and(|kind| kinds.contains(kind)));
    of_kind
        .map(|fields| PathBuf::from(fields[1]))
        .filter(|point| point.starts_with("/sys/fs/cgroup"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_goes_before_version_2() {
        let both = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(hierarchies_in(both), [PathBuf::from("/sys/fs/cgroup/cpu")]);
        assert_eq!(
            hierarchies_in("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            [PathBuf::from("/sys/fs/cgroup")]
        );
    }
}
