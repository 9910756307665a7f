//! Where this process's control groups are, by `/proc/self/cgroup` and `/proc/self/mountinfo` (cgroups(7), proc(5)).
//! Parsers are pure; [`Hierarchies::find`] is the only edge. It changes nothing.

use std::fs;
use std::path::{Path, PathBuf};

/// Most bytes of either file that are looked at.
const MAX_LEN: u64 = 1 << 20;

/// The directories of this process's own groups.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Hierarchies {
    /// Of version 2, where it is mounted; it may be without any controller beside version 1.
    pub unified: Option<PathBuf>,
    /// Of version 1's controllers, by name.
    pub controllers: Vec<(String, PathBuf)>,
}

impl Hierarchies {
    /// Where this machine has any; what cannot be read is not there.
    pub(crate) fn find() -> Self {
        Self::parse(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"))
    }

    /// The directory of a controller of version 1.
    pub(crate) fn controller(&self, name: &str) -> Option<&Path> {
        self.controllers.iter().find(|(controller, _)| controller == name).map(|(_, dir)| dir.as_path())
    }

    fn parse(groups: &str, mounts: &str) -> Self {
        let mut found = Self::default();
        // hierarchy:controllers:path
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            if controllers.is_empty() {
                found.unified = mounted(mounts, "cgroup2", None, path);
                continue;
            }
            for controller in controllers.split(',') {
                if let Some(dir) = mounted(mounts, "cgroup", Some(controller), path) {
                    found.controllers.push((controller.to_owned(), dir));
                }
            }
        }
        found
    }
}

/// Where the group `path` lies, by the first mount of its hierarchy that shows it.
fn mounted(mounts: &str, kind: &str, controller: Option<&str>, path: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        // id parent device root point options [tag]... - kind source superblock-options
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        let mut filesystem = filesystem.split(' ');
        let of_kind = filesystem.next()? == kind;
        let options = filesystem.nth(1)?;
        if !of_kind || controller.is_some_and(|name| !options.split(',').any(|option| option == name)) {
            return None;
        }
        // A container may see a part of the hierarchy only, or its own group as the root of all.
        let below = Path::new(path).strip_prefix(root).ok()?;
        Some(Path::new(&unescape(point)).join(below))
    })
}

/// The kernel writes blanks and backslashes of a path as three octal digits.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

fn read(path: &str) -> String {
    use std::io::Read as _;
    let mut text = Vec::new();
    let file = fs::File::open(path);
    match file.and_then(|file| file.take(MAX_LEN).read_to_end(&mut text)) {
        Ok(_) => String::from_utf8_lossy(&text).into_owned(),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_two_alone() {
        let mounts = "30 20 0:26 / /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n";
        let found = Hierarchies::parse("0::/\n", mounts);
        assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/")));
        let found = Hierarchies::parse("0::/user.slice/a b\n", mounts);
        assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/user.slice/a b")));
        assert!(found.controllers.is_empty());
    }

    #[test]
    fn version_one_with_two_beside_it() {
        let mounts = "\
            1 0 0:1 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            2 1 0:2 /pods/a /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n\
            3 1 0:3 / /sys/fs/cgroup/cpu\\040acct rw - cgroup cgroup rw,cpu,cpuacct\n\
            4 1 0:4 /other /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
            5 1 0:5 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let groups =
            "4:memory:/pods/a/b\n3:cpu,cpuacct:/\n2:pids:/pods/a\n1:name=systemd:/\n0::/x\nrubbish\n";
        let found = Hierarchies::parse(groups, mounts);
        assert_eq!(found.controller("memory"), Some(Path::new("/sys/fs/cgroup/memory/b")));
        assert_eq!(found.controller("cpuacct"), Some(Path::new("/sys/fs/cgroup/cpu acct")));
        assert_eq!(found.controller("pids"), None, "another part of the hierarchy is mounted");
        assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified/x")));
    }

    #[test]
    fn nothing_is_no_error() {
        assert_eq!(Hierarchies::parse("", ""), Hierarchies::default());
        assert_eq!(Hierarchies::parse("0::/\n", ""), Hierarchies::default());
    }
}
