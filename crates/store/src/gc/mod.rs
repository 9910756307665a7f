//! Collecting garbage (Nix: gc.cc): deleting what no root leads to, while others go on using the store.
//!
//! The collector has `gc.lock` for itself. Whoever wants to protect a path meanwhile tells it over its socket
//! ([`server`]) and waits if that very path is being deleted. What is a root is found by [`roots`]. A path is deleted
//! only after everything that refers to it, each time after looking whether someone has come to need it.

mod roots;
mod server;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use drover_nix::StorePath;
use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::fs::Freed;
use crate::path_lock::flock;
use crate::temp_roots::open_lock;
use crate::{Error, LocalStore, fs};

use self::server::Server;

/// What to collect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GcOptions {
    /// Stop when so many bytes were freed.
    pub max_freed: Option<u64>,
    /// The outputs of a derivation that is alive are alive too.
    pub keep_outputs: bool,
    /// The derivation of a path that is alive is alive too.
    pub keep_derivations: bool,
    /// Only say what would be deleted.
    pub dry_run: bool,
}

/// Nix's defaults.
impl Default for GcOptions {
    fn default() -> Self {
        Self { max_freed: None, keep_outputs: false, keep_derivations: true, dry_run: false }
    }
}

/// What was collected.
#[derive(Clone, Default, Debug)]
pub struct GcReport {
    /// Deleted, or what would be; leftovers that were never valid are not among them.
    pub paths: Vec<StorePath>,
    /// Bytes of disk that are free. For a dry run an estimate: the sizes of the paths as archives.
    pub bytes_freed: u64,
    /// Valid paths that stay.
    pub alive: u64,
    /// One line for whatever could not be deleted. The paths among it are not valid any more; the next collection tries
    /// again.
    pub failures: Vec<String>,
}

impl LocalStore {
    /// Whether a collector is at work, which another one would have to wait for.
    pub fn is_being_collected(&self) -> Result<bool, Error> {
        self.must_write("look for a collector")?;
        let lock_path = gc_lock_path(self);
        let free = flock(open_lock(&lock_path)?, FlockOperation::NonBlockingLockShared);
        free.map(|free| !free).map_err(Error::sys("lock", &lock_path))
    }

    /// Deletes what no root leads to. Waits for another collector to end. Goes on where something cannot be deleted, and
    /// reports that.
    pub fn collect_garbage(&self, options: &GcOptions) -> Result<GcReport, Error> {
        self.must_write("collect garbage")?;
        let lock_path = gc_lock_path(self);
        let lock = open_lock(&lock_path)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(Error::sys("lock", &lock_path))?;
        // Before any root is looked for: from here on nobody can add one without telling us.
        let server = Server::start(self.layout())?;
        // The temporary ones first: who lets go of one for a permanent root makes that before. The other way round, a
        // process that does so between our two looks would have neither.
        let temp_roots = roots::temporary(self)?;
        let mut roots = roots::find(self)?;
        let valid = self.all_valid_paths()?;
        roots.extend(valid.iter().filter(|path| temp_roots.contains(path.hash_part())).cloned());
        server.protect(temp_roots);
        roots.retain(|path| valid.contains(path));
        if !options.dry_run {
            // So that the database can be written even if the disk is full. It comes back at the next opening.
            self.layout().release_reserve();
        }
        let mut collection = Collection {
            store: self,
            server: &server,
            options,
            alive: HashSet::new(),
            report: GcReport::default(),
            kept_by_one: 0,
        };
        collection.keep(roots)?;
        collection.run(valid)?;
        let report = collection.report;
        server.settle(|| roots::temporary(self))?;
        Ok(report)
    }
}

struct Collection<'a> {
    store: &'a LocalStore,
    server: &'a Server,
    options: &'a GcOptions,
    /// Closed under references, and under what `options` keeps.
    alive: HashSet<StorePath>,
    report: GcReport,
    /// Bytes of deleted files that have one more name: most likely that in `.links`, which goes at the end.
    kept_by_one: u64,
}

impl Collection<'_> {
    fn run(&mut self, valid: BTreeSet<StorePath>) -> Result<(), Error> {
        let dead: BTreeSet<StorePath> =
            valid.iter().filter(|path| !self.alive.contains(*path)).cloned().collect();
        for path in self.referrers_first(&dead)? {
            if self.is_enough() {
                break;
            }
            self.collect(path)?;
        }
        self.report.alive = valid.len() as u64 - self.report.paths.len() as u64;
        if !self.options.dry_run {
            self.collect_leftovers(&valid)?;
            // Always: it is what frees the space of identical files.
            self.prune_links()?;
        }
        Ok(())
    }

    /// Adds `paths` and all that must stay because of them to what is alive.
    fn keep(&mut self, paths: impl IntoIterator<Item = StorePath>) -> Result<(), Error> {
        let database = self.store.database();
        let mut pending: Vec<StorePath> = paths.into_iter().collect();
        while let Some(path) = pending.pop() {
            if !self.alive.insert(path.clone()) {
                continue;
            }
            let Some(info) = self.store.path_info(&path)? else { continue };
            if self.options.keep_outputs && path.is_derivation() {
                for output in database.derivation_outputs(&path)?.into_values() {
                    if database.is_valid(&output)? {
                        pending.push(output);
                    }
                }
            }
            if let Some(deriver) = info.deriver.filter(|_| self.options.keep_derivations)
                && database.is_valid(&deriver)?
            {
                pending.push(deriver);
            }
            pending.extend(info.references);
        }
        Ok(())
    }

    /// `dead` in an order in which each path comes before what it refers to.
    fn referrers_first(&self, dead: &BTreeSet<StorePath>) -> Result<Vec<StorePath>, Error> {
        let mut order = Vec::with_capacity(dead.len());
        let mut seen: HashSet<&StorePath> = HashSet::with_capacity(dead.len());
        let mut references: HashMap<&StorePath, Vec<&StorePath>> = HashMap::new();
        for start in dead {
            // Depth first without recursion; a path is in order once all that it refers to is.
            let mut stack = vec![start];
            while let Some(path) = stack.last().copied() {
                if let Some(left) = references.get_mut(path) {
                    match left.pop() {
                        Some(next) if !seen.contains(next) => stack.push(next),
                        Some(_) => {}
                        None => {
                            references.remove(path);
                            order.push(path.clone());
                            stack.pop();
                        }
                    }
                } else if seen.insert(path) {
                    let known = self.store.database().references(path)?;
                    let known = known.iter().filter(|reference| *reference != path);
                    references.insert(path, known.filter_map(|reference| dead.get(reference)).collect());
                } else {
                    stack.pop();
                }
            }
        }
        order.reverse();
        Ok(order)
    }

    /// Deletes a valid path, unless someone has come to need it.
    fn collect(&mut self, path: StorePath) -> Result<(), Error> {
        if self.alive.contains(&path) {
            return Ok(());
        }
        if self.options.dry_run {
            self.report.bytes_freed += self.store.path_info(&path)?.map_or(0, |info| info.nar_size);
            self.report.paths.push(path);
            return Ok(());
        }
        let Some(_deletion) = self.server.begin_deletion(path.hash_part()) else {
            return self.keep([path]);
        };
        match self.store.forget_path(&path) {
            Ok(_) => {}
            // A path that was registered meanwhile, or that is kept, refers to it.
            Err(Error::Referenced { .. }) => return self.keep([path]),
            Err(error) => return Err(error),
        }
        let deleted = fs::delete_counting(&self.store.real_path(&path));
        self.report.paths.push(path);
        self.count(deleted);
        Ok(())
    }

    /// One object that cannot be deleted (it is immutable, or something is mounted in it) is no reason to let the disk
    /// run full with others.
    fn count(&mut self, deleted: Result<Freed, Error>) {
        match deleted {
            Ok(freed) => {
                self.report.bytes_freed += freed.bytes;
                self.kept_by_one += freed.kept_by_one;
            }
            Err(error) => self.report.failures.push(error.to_string()),
        }
    }

    /// Deletes what is in the store's directory but not valid: what builds and imports that died left behind.
    fn collect_leftovers(&mut self, valid: &BTreeSet<StorePath>) -> Result<(), Error> {
        let directory = self.store.real_store_dir();
        let entries = std::fs::read_dir(directory).map_err(Error::io("list", directory))?;
        for entry in entries {
            if self.is_enough() {
                break;
            }
            let name = entry.map_err(Error::io("list", directory))?.file_name();
            let path = StorePath::from_base_name(name.as_bytes()).ok();
            match path {
                Some(path) if valid.contains(&path) => {}
                Some(path) => {
                    // Whoever makes a path protects it first. `<path>.lock` and its like have its hash part.
                    if let Some(_deletion) = self.server.begin_deletion(path.hash_part())
                        && !self.store.is_valid(&path)?
                    {
                        self.count(fs::delete_counting(&directory.join(&name)));
                    }
                }
                None if name == ".links" => {}
                None => self.count(delete_unless_locked(&directory.join(&name), &name)),
            }
        }
        Ok(())
    }

    /// Deletes files that only the pool of identical files still has (Nix: optimise-store.cc).
    fn prune_links(&mut self) -> Result<(), Error> {
        let directory = self.store.real_store_dir().join(".links");
        let Ok(entries) = std::fs::read_dir(&directory) else { return Ok(()) };
        for entry in entries {
            let entry = entry.map_err(Error::io("list", &directory))?;
            let path = entry.path();
            let Ok(meta) = std::fs::symlink_metadata(&path) else { continue };
            if meta.nlink() == 1 && !meta.is_dir() {
                let removed = std::fs::remove_file(&path).map_err(Error::io("delete", &path));
                self.count(removed.map(|()| Freed { bytes: meta.blocks() * 512, kept_by_one: 0 }));
            }
        }
        Ok(())
    }

    fn is_enough(&self) -> bool {
        self.options.max_freed.is_some_and(|most| self.report.bytes_freed + self.kept_by_one >= most)
    }
}

fn gc_lock_path(store: &LocalStore) -> PathBuf {
    store.layout().state_dir.join("gc.lock")
}

/// A directory `tmp-…` is in use while someone has it locked (see [`LocalStore::temp_dir`]).
fn delete_unless_locked(path: &Path, name: &OsString) -> Result<Freed, Error> {
    if name.as_bytes().starts_with(b"tmp-") {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if let Ok(fd) = rustix::fs::open(path, flags, Mode::empty()) {
            let free = flock(&fd, FlockOperation::NonBlockingLockExclusive);
            if !free.map_err(Error::sys("lock", path))? {
                return Ok(Freed::default());
            }
            // The lock is kept until it is gone, so that nobody takes it for theirs.
            return fs::delete_counting(path);
        }
    }
    fs::delete_counting(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{add, info, store, store_path};
    use crate::{Access, TempRoots, ValidPath};

    /// The store opened anew, without the roots that importing left.
    fn reopened(store: LocalStore) -> LocalStore {
        let layout = store.layout().clone();
        drop(store);
        LocalStore::open(layout, Access::ReadWrite).unwrap()
    }

    fn root(store: &LocalStore, name: &str, target: &StorePath) {
        let link = store.layout().state_dir.join("gcroots").join(name);
        std::os::unix::fs::symlink(store.store_dir().full(target), link).unwrap();
    }

    #[test]
    fn what_roots_lead_to_stays() {
        let (_dir, store) = store();
        let a = add(&store, "a", &[]);
        let b = add(&store, "b", &[&a, &store_path("b")]);
        let c = add(&store, "c", &[&b]);
        let d = add(&store, "d", &[&a]);
        let store = reopened(store);
        root(&store, "b", &b);
        let dry = store.collect_garbage(&GcOptions { dry_run: true, ..GcOptions::default() }).unwrap();
        assert_eq!(BTreeSet::from_iter(dry.paths), [c.clone(), d.clone()].into());
        assert!(store.is_valid(&c).unwrap());
        let report = store.collect_garbage(&GcOptions::default()).unwrap();
        assert_eq!(report.paths.len(), 2);
        assert!(report.bytes_freed > 0);
        assert_eq!(report.alive, 2);
        assert_eq!(store.all_valid_paths().unwrap(), [a, b].into());
        assert!(!store.real_path(&c).exists() && !store.real_path(&d).exists());
    }

    #[test]
    fn temporary_roots_stay_until_they_are_let_go() {
        let (_dir, store) = store();
        let a = add(&store, "a", &[]);
        let b = add(&store, "b", &[&a]);
        let store = reopened(store);
        let roots = TempRoots::new(&store).unwrap();
        roots.add(&b).unwrap();
        assert_eq!(store.collect_garbage(&GcOptions::default()).unwrap().paths, []);
        drop(roots);
        // In order: what refers goes before what it refers to.
        assert_eq!(store.collect_garbage(&GcOptions::default()).unwrap().paths, [b, a]);
        // A dead process's file is no root, and goes.
        let c = add(&store, "c", &[]);
        let store = reopened(store);
        let stale = store.layout().state_dir.join("temproots/999999999");
        std::fs::write(&stale, format!("{}\0", store.store_dir().full(&c))).unwrap();
        assert_eq!(store.collect_garbage(&GcOptions::default()).unwrap().paths, [c]);
        assert!(!stale.exists());
    }

    // What derivers and outputs keep is held against real Nix, in the `peers` layer.
    #[test]
    fn a_deriver_that_is_not_valid_is_nothing_to_stumble_over() {
        let (_dir, store) = store();
        let x = store_path("x");
        std::fs::write(store.real_path(&x), "x").unwrap();
        let mut valid = ValidPath { info: info("x", b"?", &[]), ultimate: true, registration_time: 0 };
        valid.info.deriver = Some(store_path("x.drv"));
        store.register(&[valid]).unwrap();
        root(&store, "x", &x);
        let report = store.collect_garbage(&GcOptions::default()).unwrap();
        assert_eq!((report.paths, report.alive), (vec![], 1));
    }

    #[test]
    fn leftovers_go_but_not_what_is_in_use() {
        let (_dir, store) = store();
        let a = add(&store, "a", &[]);
        let store = reopened(store);
        root(&store, "a", &a);
        let (stale, making) = (store_path("stale"), store_path("making"));
        for path in [&stale, &making] {
            std::fs::create_dir(store.real_path(path)).unwrap();
            std::fs::write(store.real_path(path).with_extension("lock"), "").unwrap();
        }
        std::fs::write(store.real_store_dir().join("rubbish"), "x").unwrap();
        std::fs::create_dir(store.real_store_dir().join("tmp-1-1")).unwrap();
        let temp = store.temp_dir().unwrap();
        let link = store.real_store_dir().join(".links/0000000000000000000000000000000000000000000000000000");
        std::fs::write(&link, "x").unwrap();
        let roots = TempRoots::new(&store).unwrap();
        roots.add(&making).unwrap();
        store.collect_garbage(&GcOptions::default()).unwrap();
        assert!(temp.path().exists() && store.real_path(&making).exists() && store.real_path(&a).exists());
        assert!(store.real_path(&making).with_extension("lock").exists());
        let left: BTreeSet<OsString> = std::fs::read_dir(store.real_store_dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 5, "{left:?}");
        assert!(!link.exists());
    }

    #[test]
    fn stops_when_it_is_enough() {
        let (_dir, store) = store();
        for i in 0..10 {
            add(&store, &format!("p{i}"), &[]);
        }
        let store = reopened(store);
        let report =
            store.collect_garbage(&GcOptions { max_freed: Some(1), ..GcOptions::default() }).unwrap();
        assert_eq!((report.paths.len(), report.alive), (1, 9));
        let report =
            store.collect_garbage(&GcOptions { max_freed: Some(0), ..GcOptions::default() }).unwrap();
        assert_eq!(report.paths.len(), 0);
    }

    #[test]
    fn what_identical_files_share_counts_before_it_is_free() {
        let (_dir, store) = store();
        let pool = store.real_store_dir().join(".links");
        for i in 0..10 {
            let path = add(&store, &format!("p{i}"), &[]);
            std::fs::hard_link(store.real_path(&path), pool.join(format!("{i:052}"))).unwrap();
        }
        let store = reopened(store);
        let report =
            store.collect_garbage(&GcOptions { max_freed: Some(1), ..GcOptions::default() }).unwrap();
        assert_eq!((report.paths.len(), report.alive), (1, 9));
        // The other name went as well, or nothing would be free.
        assert!(report.bytes_freed > 0);
        assert_eq!(std::fs::read_dir(&pool).unwrap().count(), 9);
    }

    #[test]
    fn one_that_waits_can_say_so() {
        let (_dir, store) = store();
        assert!(!store.is_being_collected().unwrap());
        let lock = open_lock(&gc_lock_path(&store)).unwrap();
        assert!(flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap());
        assert!(store.is_being_collected().unwrap());
    }

    #[test]
    fn a_path_that_is_protected_meanwhile_is_kept_or_seen_to_be_gone() {
        let (_dir, store) = store();
        let paths: Vec<StorePath> = (0..200).map(|i| add(&store, &format!("p{i}"), &[])).collect();
        let store = reopened(store);
        let roots = TempRoots::new(&store).unwrap();
        std::thread::scope(|scope| {
            let collector = scope.spawn(|| store.collect_garbage(&GcOptions::default()).unwrap());
            // Backwards and forwards, so as to meet it somewhere.
            for path in paths.iter().rev() {
                roots.add(path).unwrap();
                let valid = store.is_valid(path).unwrap();
                assert_eq!(valid, store.real_path(path).exists());
            }
            let kept: Vec<bool> = paths.iter().map(|path| store.is_valid(path).unwrap()).collect();
            collector.join().unwrap();
            // Whatever was protected and valid then is valid now.
            for (path, kept) in paths.iter().zip(kept) {
                assert_eq!(store.is_valid(path).unwrap(), kept, "{path}");
                assert_eq!(store.real_path(path).exists(), kept, "{path}");
            }
        });
    }
}
