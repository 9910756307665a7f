//! Comparing the database with what is on disk (Nix: local-store.cc, verifyStore).

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self as std_fs, File};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use drover_nix::StorePath;
use drover_nix::hash::Sha256Hasher;
use rusqlite::Connection;
use rustix::fs::FlockOperation;

use crate::path_lock::flock;
use crate::{Access, Error, LocalStore, content, fs};

/// Most threads that hash at a time: more would not get more from most disks.
const MAX_THREADS: usize = 8;
/// Most rows that a check of the database itself may find fault with, each a line.
const MAX_DATABASE_PROBLEMS: usize = 100;

/// What [`LocalStore::verify`] found.
#[derive(Clone, Default, Debug)]
pub struct VerifyReport {
    pub paths_checked: u64,
    /// One line a problem that is there still. None: the store is sound.
    pub problems: Vec<String>,
    /// One line for each that was there.
    pub repaired: Vec<String>,
}

impl LocalStore {
    /// Checks the database, and that every valid path is on disk; with `contents` also that each has the hash and the
    /// size that the database says, and that the pool of identical files (`.links`) is what it says. As with Nix, of
    /// modes only the right to execute matters, times do not, and what is not valid may lie about. Nothing is changed.
    pub fn verify(&self, contents: bool) -> Result<VerifyReport, Error> {
        Verification { store: self, contents, repair: false, report: VerifyReport::default() }.run()
    }

    /// As [`LocalStore::verify`], and repairs what can be repaired with what is there: a path that is missing is made
    /// invalid if no valid path refers to it (Nix does that whenever it verifies), and a wrong entry of the pool goes. A
    /// path with wrong content stays as it is.
    pub fn repair(&self, contents: bool) -> Result<VerifyReport, Error> {
        self.must_write("repair the store")?;
        Verification { store: self, contents, repair: true, report: VerifyReport::default() }.run()
    }
}

struct Verification<'a> {
    store: &'a LocalStore,
    contents: bool,
    repair: bool,
    report: VerifyReport,
}

impl Verification<'_> {
    fn run(mut self) -> Result<VerifyReport, Error> {
        self.report.problems = self.store.database().read("check the tables", check_database)?;
        let present = {
            // As Nix does: so that no collector comes between the two lists.
            let _no_collector = self.lock_out_collectors()?;
            let valid = self.store.all_valid_paths()?;
            self.report.paths_checked = valid.len() as u64;
            let on_disk = self.on_disk()?;
            let is_there = |path: &StorePath| on_disk.contains(OsStr::new(path.as_str()));
            let (present, missing): (Vec<_>, Vec<_>) = valid.into_iter().partition(is_there);
            self.missing(missing)?;
            present
        };
        if self.contents {
            self.links()?;
            self.objects(&present)?;
        }
        Ok(self.report)
    }

    /// None where there cannot be a collector.
    fn lock_out_collectors(&self) -> Result<Option<File>, Error> {
        let path = self.store.layout().state_dir.join("gc.lock");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(_) if self.store.access() == Access::ReadOnly => return Ok(None),
            Err(error) => return Err(Error::io("open the lock file", path)(error)),
        };
        flock(&file, FlockOperation::LockShared).map_err(Error::sys("lock", &path))?;
        Ok(Some(file))
    }

    fn on_disk(&self) -> Result<HashSet<OsString>, Error> {
        let directory = self.store.real_store_dir();
        let failed = || Error::io("list", directory);
        let entries = std_fs::read_dir(directory).map_err(failed())?;
        entries.map(|entry| Ok(entry.map_err(failed())?.file_name())).collect()
    }

    fn missing(&mut self, mut missing: Vec<StorePath>) -> Result<(), Error> {
        let full = |path: &StorePath| self.store.store_dir().full(path);
        while self.repair {
            // What refers to a missing path may be missing as well, and has to go first.
            let before = missing.len();
            let mut left = Vec::new();
            for path in missing {
                match self.store.forget_path(&path) {
                    Ok(_) => {
                        self.report
                            .repaired
                            .push(format!("{} was not on disk; it is not valid now", full(&path)));
                    }
                    Err(Error::Referenced { .. }) => left.push(path),
                    Err(error) => return Err(error),
                }
            }
            missing = left;
            if missing.is_empty() || missing.len() == before {
                break;
            }
        }
        for path in missing {
            let mut referrers = self.store.referrers(&path)?;
            referrers.remove(&path);
            self.report.problems.push(match referrers.first() {
                None => format!("{} is valid but not on disk", full(&path)),
                Some(first) => {
                    format!("{} is valid but not on disk, and {} refers to it", full(&path), full(first))
                }
            });
        }
        Ok(())
    }

    /// The pool of identical files: each is named by the hash of its archive (Nix: optimise-store.cc).
    fn links(&mut self) -> Result<(), Error> {
        let directory = self.store.real_store_dir().join(".links");
        let entries = match std_fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("list", directory)(error)),
        };
        let names: Vec<OsString> = entries
            .map(|entry| Ok(entry.map_err(Error::io("list", &directory))?.file_name()))
            .collect::<Result<_, Error>>()?;
        let wrong = in_parallel(&names, |name| {
            let path = directory.join(name);
            let mut hasher = Sha256Hasher::new();
            match fs::dump(&path, &mut hasher) {
                Ok(_) => {}
                // A collector took it meanwhile.
                Err(_) if std_fs::symlink_metadata(&path).is_err() => return Ok(None),
                Err(error) => return Ok(Some(error.to_string())),
            }
            let hash = hasher.finish().to_nix32();
            let is_right = name.as_os_str() == hash.as_str();
            Ok((!is_right).then(|| format!("{} was modified: its hash is {hash}", path.display())))
        })?;
        for (index, problem) in wrong {
            let path = directory.join(&names[index]);
            if self.repair && std_fs::remove_file(&path).is_ok() {
                self.report.repaired.push(format!("{problem}; it is deleted now"));
            } else {
                self.report.problems.push(problem);
            }
        }
        Ok(())
    }

    fn objects(&mut self, paths: &[StorePath]) -> Result<(), Error> {
        let found = in_parallel(paths, |path| {
            let problem = match verify_object(self.store, path) {
                // SQLite itself failed, and would for every path.
                Err(error @ Error::Database { .. }) => return Err(error),
                // What cannot be read is a finding, and no reason not to look at the rest.
                Err(error) => Some(error.to_string()),
                Ok(problem) => problem,
            };
            // Deleted meanwhile, by a collector for instance: nothing to find fault with.
            Ok(if problem.is_some() && self.store.is_valid(path)? { problem } else { None })
        })?;
        self.report.problems.extend(found.into_iter().map(|(_, problem)| problem));
        Ok(())
    }
}

fn verify_object(store: &LocalStore, path: &StorePath) -> Result<Option<String>, Error> {
    let Some(info) = store.path_info(path)? else { return Ok(None) };
    let full = store.store_dir().full(path);
    let mut hasher = Sha256Hasher::new();
    let size = fs::dump(&store.real_path(path), &mut hasher)?;
    let hash = hasher.finish();
    if hash != info.nar_hash {
        let expected = info.nar_hash;
        return Ok(Some(format!("{full} was modified: its hash is {hash}, not {expected}")));
    }
    if info.nar_size != 0 && size != info.nar_size {
        return Ok(Some(format!("{full} has {size} bytes as an archive, not {}", info.nar_size)));
    }
    // The content is what was registered, so what its address says of the content was checked then.
    Ok(content::check_address(store.store_dir(), &info).err().map(|error| error.to_string()))
}

/// What SQLite finds wrong with the file, and references that lead nowhere, which it ought never to have let in.
fn check_database(connection: &Connection) -> Result<Vec<String>, Error> {
    let act = Error::db;
    let mut problems = Vec::new();
    let sql = format!("PRAGMA quick_check({MAX_DATABASE_PROBLEMS})");
    let mut statement = connection.prepare(&sql).map_err(act("check the file"))?;
    let lines = statement.query_map([], |row| row.get::<_, String>(0)).map_err(act("check the file"))?;
    for line in lines {
        let line = line.map_err(act("check the file"))?;
        if line != "ok" {
            problems.push(format!("the store's database is damaged: {}", line.replace('\n', "; ")));
        }
    }
    let mut statement =
        connection.prepare("PRAGMA foreign_key_check").map_err(act("check the references"))?;
    let rows = statement
        .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Option<i64>>(1)?)))
        .map_err(act("check the references"))?;
    for row in rows.take(MAX_DATABASE_PROBLEMS) {
        let (table, row) = row.map_err(act("check the references"))?;
        let row = row.map_or_else(String::new, |row| format!(" {row}"));
        problems
            .push(format!("the store's database is damaged: row{row} of {table} refers to no valid path"));
    }
    Ok(problems)
}

/// Calls `check` for each of `items`, in several threads, and gives what it finds with the item's index, in order.
fn in_parallel<T: Sync>(
    items: &[T],
    check: impl Fn(&T) -> Result<Option<String>, Error> + Sync,
) -> Result<Vec<(usize, String)>, Error> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, String)>, Error> {
        let mut found = Vec::new();
        while let index = next.fetch_add(1, Ordering::Relaxed)
            && let Some(item) = items.get(index)
        {
            match check(item) {
                Ok(problem) => found.extend(problem.map(|problem| (index, problem))),
                Err(error) => {
                    // The others stop at their next item.
                    next.store(items.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(found)
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(items.len());
    thread::scope(|scope| {
        // As many as can be had.
        let other = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).map_while(other).collect();
        let mut found = work()?;
        for other in others {
            found.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        found.sort_unstable();
        Ok(found)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::testing::{add, store};

    // What counts as damage is held against real Nix, in the `peers` layer.
    #[test]
    fn finds_what_is_missing_and_what_was_changed() {
        let (_dir, store) = store();
        let (a, b, c) = (add(&store, "a", &[]), add(&store, "b", &[]), add(&store, "c", &[]));
        let d = add(&store, "d", &[&a]);
        let report = store.verify(true).unwrap();
        assert_eq!((report.paths_checked, report.problems.len()), (4, 0));
        std_fs::remove_file(store.real_path(&a)).unwrap();
        std_fs::remove_file(store.real_path(&b)).unwrap();
        std_fs::set_permissions(store.real_path(&c), std_fs::Permissions::from_mode(0o644)).unwrap();
        std_fs::write(store.real_path(&c), "C").unwrap();
        assert_eq!(store.verify(false).unwrap().problems.len(), 2);
        let problems = store.verify(true).unwrap().problems.join("\n");
        assert!(problems.contains(&format!("{b} is valid but not on disk")), "{problems}");
        assert!(
            problems.contains(&format!("{a} is valid but not on disk, and /nix/store/{d}")),
            "{problems}"
        );
        assert!(problems.contains(&format!("{c} was modified")), "{problems}");
        let report = store.repair(false).unwrap();
        assert_eq!((report.problems.len(), report.repaired.len()), (1, 1));
        assert!(!store.is_valid(&b).unwrap() && store.is_valid(&a).unwrap());
        // With what refers to it, the other goes as well.
        std_fs::remove_file(store.real_path(&d)).unwrap();
        let report = store.repair(false).unwrap();
        assert_eq!((report.problems.len(), report.repaired.len()), (0, 2));
        assert_eq!(store.all_valid_paths().unwrap(), [c].into());
    }

    #[test]
    fn many_find_all_in_order_and_one_failure_ends_it() {
        let items: Vec<usize> = (0..1000).collect();
        let found = in_parallel(&items, |i| Ok((i % 10 == 3).then(|| i.to_string()))).unwrap();
        assert_eq!(found.len(), 100);
        assert!(found.iter().all(|(index, text)| *text == index.to_string()) && found.is_sorted());
        let failed = in_parallel(&items, |i| {
            if *i == 500 { Err(Error::ReadOnly { act: "test" }) } else { Ok(Some(String::new())) }
        });
        assert!(failed.is_err());
        assert_eq!(in_parallel(&[0; 0], |_| Ok(Some(String::new()))).unwrap(), []);
    }
}
