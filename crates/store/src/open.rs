//! Opening a store: directories, the database's schema, and the lock that guards it (Nix: local-store.cc).

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};

use crate::db::{Database, SCHEMA};
use crate::path_lock::flock;
use crate::temp_roots::open_lock;
use crate::{Access, Error, StoreLayout};

/// Bytes of a file that a collector may delete so that the database can be written on a full disk.
const RESERVED: u64 = 8 << 20;
/// Most bytes of a `schema` file that are looked at.
const MAX_SCHEMA_LEN: usize = 16;
/// The variable by which Nix lets the way to the store have symlinks.
const IGNORE_SYMLINKS: &str = "NIX_IGNORE_SYMLINK_STORE";

/// The database and the store's big lock, held shared.
pub(crate) fn open(layout: &StoreLayout, access: Access) -> Result<(Database, Option<File>), Error> {
    let big_lock = match access {
        Access::ReadOnly => lock_for_reading(layout)?,
        Access::ReadWrite => Some(prepare(layout)?),
    };
    let path = layout.db_dir().join("db.sqlite");
    match read_schema(layout)? {
        SCHEMA => {}
        0 => {
            let why = "there is no `schema` file: no store has been created here".into();
            return Err(Error::BadDatabase { path, why });
        }
        newer if newer > SCHEMA => {
            let why = format!("it has schema {newer}, which is newer than {SCHEMA}, the last that is known");
            return Err(Error::BadDatabase { path, why });
        }
        older => {
            let why = format!(
                "it has schema {older}; open the store once with Nix 2.3 or later, which brings it to {SCHEMA}"
            );
            return Err(Error::BadDatabase { path, why });
        }
    }
    let database = Database::open(path, layout.store_dir.clone(), access)?;
    if access == Access::ReadWrite {
        // Not before: where the disk is full, the reserve may just have been given up for this.
        reserve(layout);
    }
    Ok((database, big_lock))
}

/// Makes what a store needs, waits for its big lock, and creates the database if there is none.
fn prepare(layout: &StoreLayout) -> Result<File, Error> {
    for directory in [
        layout.real_store_dir.clone(),
        layout.real_store_dir.join(".links"),
        layout.db_dir(),
        layout.state_dir.join("temproots"),
        layout.state_dir.join("gcroots"),
        layout.state_dir.join("profiles"),
    ] {
        make_directory(&directory)?;
    }
    for parent in ["gcroots", "profiles"] {
        let directory = layout.state_dir.join(parent).join("per-user");
        make_directory(&directory)?;
        set_mode(&directory, 0o755)?;
    }
    if std::env::var_os(IGNORE_SYMLINKS).is_none_or(|value| value != "1") {
        refuse_symlinks(&layout.real_store_dir)?;
    }
    let lock_path = layout.db_dir().join("big-lock");
    let lock = open_lock(&lock_path)?;
    let take = |operation| flock(&lock, operation).map_err(Error::sys("lock", &lock_path));
    take(FlockOperation::LockShared)?;
    if read_schema(layout)? == 0 {
        // Changing a lock's kind lets go of it in between, so someone else may have been faster.
        take(FlockOperation::LockExclusive)?;
        if read_schema(layout)? == 0 {
            Database::create(&layout.db_dir().join("db.sqlite"))?;
            write_schema(layout)?;
        }
        take(FlockOperation::LockShared)?;
    }
    Ok(lock)
}

/// A store that we may not write has no lock that we could make; if nobody can take it, nobody can migrate either.
fn lock_for_reading(layout: &StoreLayout) -> Result<Option<File>, Error> {
    let path = layout.db_dir().join("big-lock");
    let Ok(file) = File::open(&path) else { return Ok(None) };
    flock(&file, FlockOperation::LockShared).map_err(Error::sys("lock", &path))?;
    Ok(Some(file))
}

/// The number in the `schema` file, 0 if there is none.
fn read_schema(layout: &StoreLayout) -> Result<u32, Error> {
    let path = layout.db_dir().join("schema");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let number = std::str::from_utf8(&text[..text.len().min(MAX_SCHEMA_LEN)])
        .ok()
        .and_then(|text| text.trim_end().parse().ok());
    number.ok_or_else(|| Error::BadDatabase { path, why: "it does not hold a schema number".into() })
}

/// Last of all, and durably: its presence says that the database is complete.
fn write_schema(layout: &StoreLayout) -> Result<(), Error> {
    let path = layout.db_dir().join("schema");
    let write = || {
        let mut file = File::create(&path)?;
        file.write_all(SCHEMA.to_string().as_bytes())?;
        file.sync_all()
    };
    write().map_err(Error::io("write", &path))
}

/// Not being able to costs nothing but the reserve.
fn reserve(layout: &StoreLayout) {
    let path = layout.db_dir().join("reserved");
    if fs::metadata(&path).is_ok_and(|meta| meta.len() == RESERVED) {
        return;
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    if let Ok(file) = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR) {
        let _ = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RESERVED);
        let _ = rustix::fs::ftruncate(&file, RESERVED);
    }
}

fn make_directory(path: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(Error::io("make the directory", path))
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Error> {
    let meta = fs::metadata(path).map_err(Error::io("examine", path))?;
    if meta.mode() & 0o7777 == mode {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(Error::io("change the mode of", path))
}

/// Someone who can change a symlink on the way to the store could exchange the store.
fn refuse_symlinks(path: &Path) -> Result<(), Error> {
    for ancestor in path.ancestors() {
        let meta = fs::symlink_metadata(ancestor).map_err(Error::io("examine", ancestor))?;
        if meta.is_symlink() {
            let why = format!(
                "it is a symlink, which neither a store nor a directory above it may be; give the real path, or set \
                 {IGNORE_SYMLINKS}=1"
            );
            return Err(Error::BadFile { path: PathBuf::from(ancestor), why });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LocalStore;
    use crate::testing::{add, store};

    #[test]
    fn a_new_store_has_what_nix_expects() {
        let (_dir, store) = store();
        let state = &store.layout().state_dir;
        assert_eq!(fs::read(state.join("db/schema")).unwrap(), b"10");
        assert_eq!(fs::metadata(state.join("db/big-lock")).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::metadata(state.join("db/reserved")).unwrap().len(), RESERVED);
        for directory in ["temproots", "gcroots/per-user", "profiles/per-user"] {
            assert!(state.join(directory).is_dir(), "{directory}");
        }
        assert!(store.layout().real_store_dir.join(".links").is_dir());
        let connection = rusqlite::Connection::open(state.join("db/db.sqlite")).unwrap();
        let journal: String = connection.query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
        assert_eq!(journal, "wal");
        let columns: String = connection
            .query_row("SELECT group_concat(name) FROM pragma_table_info('ValidPaths')", [], |row| row.get(0))
            .unwrap();
        assert_eq!(columns, "id,path,hash,registrationTime,deriver,narSize,ultimate,sigs,ca");
    }

    #[test]
    fn opening_again_keeps_everything() {
        let (_dir, store) = store();
        let path = add(&store, "a", &[]);
        let layout = store.layout().clone();
        drop(store);
        let store = LocalStore::open(layout, Access::ReadWrite).unwrap();
        assert!(store.is_valid(&path).unwrap());
    }

    #[test]
    fn schemas_that_are_not_ours() {
        let (_dir, store) = store();
        let schema = store.layout().db_dir().join("schema");
        for (text, part) in [("11", "newer"), ("9", "older"), ("x", "number")] {
            fs::write(&schema, text).unwrap();
            let error = LocalStore::open(store.layout().clone(), Access::ReadWrite).unwrap_err();
            assert!(matches!(error, Error::BadDatabase { .. }));
            assert!(part == "older" || error.to_string().contains(part), "{error}");
        }
        fs::write(&schema, "10\n").unwrap();
        LocalStore::open(store.layout().clone(), Access::ReadWrite).unwrap();
        // A database that got lost is not replaced by an empty one.
        drop(store.clone());
        fs::rename(store.layout().db_dir().join("db.sqlite"), store.layout().db_dir().join("gone")).unwrap();
        assert!(LocalStore::open(store.layout().clone(), Access::ReadWrite).is_err());
    }

    #[test]
    fn reading_creates_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let error = LocalStore::open(StoreLayout::in_root(dir.path()), Access::ReadOnly).unwrap_err();
        assert!(matches!(error, Error::BadDatabase { .. }), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_symlink_on_the_way_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        fs::create_dir(&real).unwrap();
        let link = real.with_file_name("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let error = LocalStore::open(StoreLayout::in_root(&link), Access::ReadWrite).unwrap_err();
        assert!(error.to_string().contains("symlink"), "{error}");
    }

    #[test]
    fn many_at_once_create_one_store() {
        let dir = tempfile::tempdir().unwrap();
        let layout = StoreLayout::in_root(dir.path().canonicalize().unwrap());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| LocalStore::open(layout.clone(), Access::ReadWrite).unwrap());
            }
        });
        assert!(LocalStore::open(layout, Access::ReadOnly).unwrap().all_valid_paths().unwrap().is_empty());
    }
}
