//! What is a root: links below `gcroots` and `profiles`, what running processes use, and temporary roots (Nix: gc.cc,
//! local-gc.cc).

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use bstr::ByteSlice as _;
use drover_nix::StorePath;
use rustix::fs::FlockOperation;

use crate::path_lock::{flock, retire};
use crate::{Error, LocalStore};

/// Most bytes that are looked at of one file in `/proc`.
const MAX_PROC_FILE: u64 = 64 << 20;
/// Most bytes of one process's temporary roots: a few million paths.
const MAX_TEMP_ROOTS: u64 = 1 << 30;
/// How deep the directories below `gcroots` may nest.
const MAX_DEPTH: usize = 64;
/// Programs that the kernel starts by itself.
const KERNEL_PROGRAMS: [&str; 3] =
    ["/proc/sys/kernel/modprobe", "/proc/sys/kernel/fbsplash", "/proc/sys/kernel/poweroff_cmd"];

/// Permanent roots and what running processes use. Not all of them need be valid.
pub(super) fn find(store: &LocalStore) -> Result<BTreeSet<StorePath>, Error> {
    let mut roots = BTreeSet::new();
    for name in ["gcroots", "profiles"] {
        links(store, &store.layout().state_dir.join(name), 0, &mut roots)?;
    }
    running(store, &mut roots);
    Ok(roots)
}

/// The hash parts of what the processes that live protect for the moment. Removes the files of those that do not.
pub(super) fn temporary(store: &LocalStore) -> Result<HashSet<String>, Error> {
    let directory = store.layout().state_dir.join("temproots");
    let mut hash_parts = HashSet::new();
    for entry in fs::read_dir(&directory).map_err(Error::io("list", &directory))? {
        let entry = entry.map_err(Error::io("list", &directory))?;
        if entry.file_name().as_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            // Its process has just ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        let is_dead = flock(&file, FlockOperation::NonBlockingLockExclusive);
        if is_dead.map_err(Error::sys("lock", &path))? {
            retire(&path, &file);
            continue;
        }
        let mut content = Vec::new();
        (&file).take(MAX_TEMP_ROOTS).read_to_end(&mut content).map_err(Error::io("read", &path))?;
        // The last entry may be half written: its path is not protected yet, and who adds it cannot think so.
        let whole = content.rfind_byte(0).map_or(0, |end| end + 1);
        for entry in content[..whole].split(|byte| *byte == 0) {
            if let Ok(path) = store.store_dir().parse(entry) {
                hash_parts.insert(path.hash_part().to_owned());
            }
        }
    }
    Ok(hash_parts)
}

fn links(
    store: &LocalStore,
    path: &Path,
    depth: usize,
    roots: &mut BTreeSet<StorePath>,
) -> Result<(), Error> {
    match link(store, path, depth, roots) {
        // It went away, or is none of our business: then it cannot have been made as a root for this store either.
        Err(Error::Io { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn link(store: &LocalStore, path: &Path, depth: usize, roots: &mut BTreeSet<StorePath>) -> Result<(), Error> {
    let meta = fs::symlink_metadata(path).map_err(Error::io("examine", path))?;
    if meta.is_dir() {
        if depth == MAX_DEPTH {
            let why = format!("directories with roots may nest {MAX_DEPTH} deep");
            return Err(Error::BadFile { path: path.into(), why });
        }
        for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
            let entry = entry.map_err(Error::io("list", path))?;
            links(store, &entry.path(), depth + 1, roots)?;
        }
    } else if meta.is_symlink() {
        let target = fs::read_link(path).map_err(Error::io("read the symlink", path))?;
        if let Some(root) = in_store(store, &target) {
            roots.insert(root);
            return Ok(());
        }
        // An indirect root: a link elsewhere, which leads to the store in its turn.
        let target = path.parent().unwrap_or(path).join(target);
        match fs::symlink_metadata(&target) {
            Ok(meta) if meta.is_symlink() => {
                let last = fs::read_link(&target).map_err(Error::io("read the symlink", &target))?;
                roots.extend(in_store(store, &last));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let auto = store.layout().state_dir.join("gcroots/auto");
                if path.parent() == Some(&auto)
                    && let Some(root) = remove_dangling(path, &target)?
                {
                    roots.extend(in_store(store, &root));
                }
            }
            Err(error) => return Err(Error::io("examine", target)(error)),
        }
    } else if meta.is_file() {
        let name = path.file_name().unwrap_or_default();
        roots.extend(StorePath::from_base_name(name.as_bytes()).ok());
    }
    Ok(())
}

/// Removes a link to `target`, which is not there; unless it comes to be there meanwhile, as the root of someone who makes
/// `target` first and this link then. In that case it gives what `target` leads to.
fn remove_dangling(link: &Path, target: &Path) -> Result<Option<PathBuf>, Error> {
    // Out of the way of whoever makes a new one of this name, which must stay. A name that is a root as well.
    let mut aside = link.as_os_str().to_owned();
    aside.push(".dangling");
    let aside = PathBuf::from(aside);
    fs::rename(link, &aside).map_err(Error::io("move the dangling root", link))?;
    match fs::read_link(target) {
        Ok(root) => {
            // What is in the way is newer, and as good.
            if rename_if_free(&aside, link).is_err() {
                fs::remove_file(&aside).map_err(Error::io("remove the dangling root", &aside))?;
            }
            Ok(Some(root))
        }
        Err(_) => {
            fs::remove_file(&aside).map_err(Error::io("remove the dangling root", &aside))?;
            Ok(None)
        }
    }
}

fn rename_if_free(from: &Path, to: &Path) -> rustix::io::Result<()> {
    rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, rustix::fs::RenameFlags::NOREPLACE)
}

/// The store path that `target` is or lies in.
fn in_store(store: &LocalStore, target: &Path) -> Option<StorePath> {
    let rest = target.as_os_str().as_bytes().strip_prefix(store.store_dir().as_str().as_bytes())?;
    let rest = rest.strip_prefix(b"/")?;
    StorePath::from_base_name(rest.split(|byte| *byte == b'/').next()?).ok()
}

/// What processes run, have open, have mapped or are told of by their environment, as far as we may look.
fn running(store: &LocalStore, roots: &mut BTreeSet<StorePath>) {
    // In a relocated store a process outside of any sandbox sees the real paths.
    let mut prefixes = vec![format!("{}/", store.store_dir()).into_bytes()];
    let real = [store.real_store_dir().as_os_str().as_bytes(), b"/"].concat();
    if !prefixes.contains(&real) {
        prefixes.push(real);
    }
    let mut scan = |bytes: &[u8]| {
        for prefix in &prefixes {
            mentioned(prefix, bytes, roots);
        }
    };
    let mut scan_link = |path: PathBuf| {
        if let Ok(target) = fs::read_link(path) {
            scan(target.as_os_str().as_bytes());
        }
    };
    let processes = processes();
    for process in &processes {
        scan_link(process.join("exe"));
        scan_link(process.join("cwd"));
        for entry in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
            scan_link(entry.path());
        }
    }
    let files = processes.iter().flat_map(|process| [process.join("maps"), process.join("environ")]);
    for file in files.chain(KERNEL_PROGRAMS.map(PathBuf::from)) {
        let mut content = Vec::new();
        // What cannot be read belongs to someone else or has ended.
        if File::open(file).and_then(|file| file.take(MAX_PROC_FILE).read_to_end(&mut content)).is_ok() {
            scan(&content);
        }
    }
}

fn processes() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().as_bytes().iter().all(u8::is_ascii_digit))
        .map(|entry| entry.path())
        .collect()
}

/// Adds every store path behind `prefix` that occurs in `bytes`.
fn mentioned(prefix: &[u8], bytes: &[u8], paths: &mut BTreeSet<StorePath>) {
    for start in bytes.find_iter(prefix) {
        let rest = &bytes[start + prefix.len()..];
        let is_end = |byte: &u8| !(byte.is_ascii_alphanumeric() || b"+-._?=".contains(byte));
        let end = rest.iter().position(is_end).unwrap_or(rest.len());
        paths.extend(StorePath::from_base_name(&rest[..end]).ok());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::{store, store_path};

    #[test]
    fn links_direct_and_indirect() {
        let (_dir, store) = store();
        let roots = store.layout().state_dir.join("gcroots");
        let elsewhere = store.layout().state_dir.join("elsewhere");
        let full = |name: &str| store.store_dir().full(&store_path(name));
        fs::create_dir_all(roots.join("auto")).unwrap();
        fs::create_dir_all(roots.join("some/where")).unwrap();
        symlink(full("direct"), roots.join("some/where/direct")).unwrap();
        symlink(full("inside") + "/bin/x", roots.join("inside")).unwrap();
        symlink(&elsewhere, roots.join("auto/indirect")).unwrap();
        symlink(full("indirect"), &elsewhere).unwrap();
        symlink("/no/where", roots.join("auto/dangling")).unwrap();
        symlink("/no/where", roots.join("dangling")).unwrap();
        fs::write(roots.join(store_path("file").as_str()), "").unwrap();
        symlink(full("profile"), store.layout().state_dir.join("profiles/p-1-link")).unwrap();
        let found = find(&store).unwrap();
        for name in ["direct", "inside", "indirect", "file", "profile"] {
            assert!(found.contains(&store_path(name)), "{name}");
        }
        assert!(fs::symlink_metadata(roots.join("auto/dangling")).is_err());
        assert!(fs::symlink_metadata(roots.join("dangling")).is_ok());
    }

    #[test]
    fn a_root_that_comes_back_while_its_link_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (link, target) = (dir.path().join("link"), dir.path().join("target"));
        symlink(&target, &link).unwrap();
        // Seen to be dangling, and then it is not any more.
        symlink("/nix/store/x", &target).unwrap();
        assert_eq!(remove_dangling(&link, &target).unwrap(), Some("/nix/store/x".into()));
        assert_eq!(fs::read_link(&link).unwrap(), target);
        fs::remove_file(&target).unwrap();
        assert_eq!(remove_dangling(&link, &target).unwrap(), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_process_has_open_is_a_root() {
        let (_dir, store) = store();
        let path = store_path("open");
        fs::write(store.real_path(&path), "x").unwrap();
        let _file = File::open(store.real_path(&path)).unwrap();
        assert!(find(&store).unwrap().contains(&path));
    }

    #[test]
    fn paths_in_text() {
        let (a, b) = (store_path("a"), store_path("b-1.0_x"));
        let text = format!("PATH=/nix/store/{a}/bin:/nix/store/{b}\0X=/nix/store/nope:/nix/store/{a}");
        let mut found = BTreeSet::new();
        mentioned(b"/nix/store/", text.as_bytes(), &mut found);
        assert_eq!(found, [a, b].into());
    }
}
