//! The SQLite database, schema 10 (Nix: schema.sql, local-store.cc, sqlite.cc): connections and transactions.
//!
//! What is asked is in [`query`] and [`build_trace`], what is written in [`register`]. Columns as Nix writes them: `path` and `deriver` are
//! full logical paths, `hash` is `sha256:` and hexadecimal, absent values are NULL and never empty.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use drover_nix::StoreDir;
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior, ffi};

use crate::{Access, Error};

mod build_trace;
mod query;
mod register;

pub(crate) use register::DrvOutputs;

/// The schema that this program reads and writes, the number in the `schema` file.
pub(crate) const SCHEMA: u32 = 10;

/// How long SQLite itself waits for another process's transaction, as Nix does.
const BUSY_TIMEOUT: Duration = Duration::from_secs(3600);
/// Pause before an operation is repeated that SQLite would not wait for.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Pages of write-ahead log before it is copied back, as Nix sets it: imports should not stop for that.
const WAL_AUTOCHECKPOINT: u32 = 40_000;
/// Connections kept open for the next operation.
const MAX_IDLE: usize = 8;
/// Prepared statements kept by each connection: more than this crate has.
const STATEMENTS: usize = 40;

const CREATE: &str = "
    CREATE TABLE IF NOT EXISTS ValidPaths (
        id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,
        path TEXT UNIQUE NOT NULL,
        hash TEXT NOT NULL,
        registrationTime INTEGER NOT NULL,
        deriver TEXT,
        narSize INTEGER,
        ultimate INTEGER,
        sigs TEXT,
        ca TEXT
    );
    CREATE TABLE IF NOT EXISTS Refs (
        referrer INTEGER NOT NULL,
        reference INTEGER NOT NULL,
        PRIMARY KEY (referrer, reference),
        FOREIGN KEY (referrer) REFERENCES ValidPaths(id) ON DELETE CASCADE,
        FOREIGN KEY (reference) REFERENCES ValidPaths(id) ON DELETE RESTRICT
    );
    CREATE INDEX IF NOT EXISTS IndexReference ON Refs(reference);
    CREATE TRIGGER IF NOT EXISTS DeleteSelfRefs BEFORE DELETE ON ValidPaths BEGIN
        DELETE FROM Refs WHERE referrer = old.id AND reference = old.id;
    END;
    CREATE TABLE IF NOT EXISTS DerivationOutputs (
        drv INTEGER NOT NULL,
        id TEXT NOT NULL,
        path TEXT NOT NULL,
        PRIMARY KEY (drv, id),
        FOREIGN KEY (drv) REFERENCES ValidPaths(id) ON DELETE CASCADE
    );
    CREATE INDEX IF NOT EXISTS IndexDerivationOutputs ON DerivationOutputs(path);
";

/// The database of one store. Every operation has a connection to itself; writers of this process take turns.
#[derive(Debug)]
pub(crate) struct Database {
    path: PathBuf,
    store_dir: StoreDir,
    mode: OpenMode,
    idle: Mutex<Vec<Connection>>,
    writer: Mutex<()>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum OpenMode {
    ReadWrite,
    ReadOnly,
    /// Nobody can write, so SQLite need not (and cannot) coordinate with anybody.
    Immutable,
}

impl Database {
    /// Opens the existing database `path`.
    pub(crate) fn open(path: PathBuf, store_dir: StoreDir, access: Access) -> Result<Self, Error> {
        let mut database = Self {
            path,
            store_dir,
            mode: match access {
                Access::ReadWrite => OpenMode::ReadWrite,
                Access::ReadOnly => OpenMode::ReadOnly,
            },
            idle: Mutex::default(),
            writer: Mutex::default(),
        };
        let probe = |database: &Self| {
            database.connect().and_then(|connection| {
                connection
                    .query_row(
                        "SELECT count(*) FROM pragma_table_info('ValidPaths') WHERE name = 'ca'",
                        [],
                        |row| row.get::<_, i64>(0),
                    )
                    .map_err(Error::db("find the tables"))
                    .map(|columns| (connection, columns))
            })
        };
        let (connection, columns) = match probe(&database) {
            // A write-ahead log cannot be shared on a file system, or by a user, without the right to write.
            Err(Error::Database { source, .. })
                if database.mode == OpenMode::ReadOnly
                    && matches!(
                        source.sqlite_error_code(),
                        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly)
                    ) =>
            {
                database.mode = OpenMode::Immutable;
                probe(&database)?
            }
            other => other?,
        };
        if columns == 0 {
            let why = format!("it lacks the tables of schema {SCHEMA}");
            return Err(Error::BadDatabase { path: database.path, why });
        }
        database.put_back(connection);
        Ok(database)
    }

    /// Makes the database with its tables. Harmless where they exist.
    pub(crate) fn create(path: &Path) -> Result<(), Error> {
        let act = "create the tables";
        let connection = Connection::open(path).map_err(Error::db(act))?;
        configure(&connection, OpenMode::ReadWrite).map_err(Error::db(act))?;
        connection.execute_batch(&format!("BEGIN IMMEDIATE; {CREATE} COMMIT;")).map_err(Error::db(act))
    }

    /// Runs `operation` on a connection. It is repeated where SQLite asks for that, so it must not change anything
    /// outside the database.
    pub(crate) fn read<T>(
        &self,
        act: &'static str,
        mut operation: impl FnMut(&Connection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let connection = self.take(act)?;
        let result = repeat_while_busy(|| operation(&connection));
        self.put_back(connection);
        result
    }

    /// Runs `operation` in one transaction that is committed if it succeeds. Repeated like [`Self::read`].
    pub(crate) fn write<T>(
        &self,
        act: &'static str,
        mut operation: impl FnMut(&Connection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        // Threads of this process queue here rather than in SQLite's busy handler, which sleeps.
        let _turn = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut connection = self.take(act)?;
        let result = repeat_while_busy(|| {
            let transaction = connection
                .transaction_with_behavior(TransactionBehavior::Immediate)
                .map_err(Error::db(act))?;
            let value = operation(&transaction)?;
            transaction.commit().map_err(Error::db(act))?;
            Ok(value)
        });
        self.put_back(connection);
        result
    }

    fn take(&self, _act: &'static str) -> Result<Connection, Error> {
        match self.idle().pop() {
            Some(connection) => Ok(connection),
            None => self.connect(),
        }
    }

    fn put_back(&self, connection: Connection) {
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE {
            idle.push(connection);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect(&self) -> Result<Connection, Error> {
        // One thread at a time has a connection, so SQLite's own locks would be idle work. CREATE is never given: a
        // missing database is an error, not an empty store.
        let flags = OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let (flags, immutable) = match self.mode {
            OpenMode::ReadWrite => (flags | OpenFlags::SQLITE_OPEN_READ_WRITE, 0),
            OpenMode::ReadOnly => (flags | OpenFlags::SQLITE_OPEN_READ_ONLY, 0),
            OpenMode::Immutable => (flags | OpenFlags::SQLITE_OPEN_READ_ONLY, 1),
        };
        let act = "open the file";
        let uri = format!("file:{}?immutable={immutable}", percent_encode(&self.path));
        let connection = Connection::open_with_flags(uri, flags).map_err(Error::db(act))?;
        configure(&connection, self.mode).map_err(Error::db(act))?;
        Ok(connection)
    }
}

fn configure(connection: &Connection, mode: OpenMode) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.pragma_update(None, "foreign_keys", true)?;
    if mode != OpenMode::ReadWrite {
        return Ok(());
    }
    connection.pragma_update(None, "synchronous", "normal")?;
    let journal: String = connection.query_row("PRAGMA journal_mode", [], |row| row.get(0))?;
    if journal != "wal" {
        connection.query_row("PRAGMA journal_mode = wal", [], |row| row.get::<_, String>(0))?;
    }
    keep_log_file(connection)?;
    connection.query_row(&format!("PRAGMA wal_autocheckpoint = {WAL_AUTOCHECKPOINT}"), [], |_| Ok(()))?;
    Ok(())
}

/// Has the last process that closes the database leave the (then empty) log file, as Nix does: without one, users who
/// may not make files beside the database could not read it.
#[allow(unsafe_code)] // rusqlite has no wrapper for file controls
fn keep_log_file(connection: &Connection) -> rusqlite::Result<()> {
    let mut on: std::ffi::c_int = 1;
    // SAFETY: the handle is that of an open connection, which is borrowed for the whole call and used by this thread
    // only. For this file control the last argument points to an int, which SQLite reads and writes during the call
    // and does not keep (sqlite3.h, SQLITE_FCNTL_PERSIST_WAL); the name is a C string with static lifetime.
    let code = unsafe {
        ffi::sqlite3_file_control(
            connection.handle(),
            c"main".as_ptr(),
            ffi::SQLITE_FCNTL_PERSIST_WAL,
            (&raw mut on).cast(),
        )
    };
    match code {
        ffi::SQLITE_OK => Ok(()),
        code => Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)),
    }
}

/// SQLite gives up at once where waiting could deadlock (SQLITE_BUSY) and when it lost a race for the log's index too
/// often (SQLITE_PROTOCOL); either passes.
fn repeat_while_busy<T>(mut operation: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    loop {
        match operation() {
            Err(Error::Database { source, .. })
                if matches!(
                    source.sqlite_error_code(),
                    Some(ErrorCode::DatabaseBusy | ErrorCode::FileLockingProtocolFailed)
                ) =>
            {
                thread::sleep(BUSY_PAUSE);
            }
            other => return other,
        }
    }
}

/// For the path of a `file:` URI.
fn percent_encode(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    path.as_os_str()
        .as_bytes()
        .iter()
        .map(|byte| match byte {
            b'/' | b'-' | b'.' | b'_' | b'~' => char::from(*byte).to_string(),
            byte if byte.is_ascii_alphanumeric() => char::from(*byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}
