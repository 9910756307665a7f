//! Reading: what is valid, what is known of it, and what it refers to.

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::{OutputName, PathInfo, Sha256, StorePath};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension as _, Row};

use super::Database;
use crate::{Error, ValidPath};

/// From how many paths on one pass over the index beats a look-up for each.
const SCAN_FROM: usize = 2_000;
/// ... if the index has at most this many entries for each path that is asked for.
const SCAN_RATIO: i64 = 8;

impl Database {
    pub(crate) fn is_valid(&self, path: &StorePath) -> Result<bool, Error> {
        self.read("look up a path", |connection| Ok(self.id(connection, path)?.is_some()))
    }

    /// The size of a path's archive, 0 if it is not known; None if the path is not valid.
    pub(crate) fn nar_size(&self, path: &StorePath) -> Result<Option<u64>, Error> {
        let act = "look up a path";
        self.read(act, |connection| {
            connection
                .prepare_cached("SELECT coalesce(narSize, 0) FROM ValidPaths WHERE path = ?1")
                .and_then(|mut statement| {
                    statement.query_row([self.store_dir.full(path)], |row| row.get::<_, i64>(0)).optional()
                })
                .map(|found| found.map(|size| u64::try_from(size).unwrap_or(0)))
                .map_err(Error::db(act))
        })
    }

    pub(crate) fn valid_paths(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, Error> {
        self.read("look up paths", |connection| {
            if paths.len() >= SCAN_FROM {
                let most: i64 = connection
                    .prepare_cached("SELECT coalesce(max(id), 0) FROM ValidPaths")
                    .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
                    .map_err(Error::db("count the paths"))?;
                if most / SCAN_RATIO <= i64::try_from(paths.len()).unwrap_or(i64::MAX) {
                    return self.valid_by_scan(connection, paths);
                }
            }
            let mut valid = Vec::new();
            for path in paths {
                if self.id(connection, path)?.is_some() {
                    valid.push(path.clone());
                }
            }
            Ok(valid.into_iter().collect())
        })
    }

    pub(crate) fn all_valid_paths(&self) -> Result<BTreeSet<StorePath>, Error> {
        self.read("list the paths", |connection| {
            let mut statement = connection
                .prepare_cached("SELECT path FROM ValidPaths ORDER BY path")
                .map_err(Error::db("list the paths"))?;
            self.paths(&mut statement, [])
        })
    }

    pub(crate) fn by_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>, Error> {
        let prefix = format!("{}/{hash_part}", self.store_dir);
        let act = "look up a hash part";
        self.read(act, |connection| {
            let found: Option<String> = connection
                .prepare_cached("SELECT path FROM ValidPaths WHERE path >= ?1 ORDER BY path LIMIT 1")
                .and_then(|mut statement| statement.query_row([&prefix], |row| row.get(0)).optional())
                .map_err(Error::db(act))?;
            match found {
                Some(path) if path.starts_with(&prefix) => {
                    let path = self.parse(path.as_bytes())?;
                    Ok((path.hash_part() == hash_part).then_some(path))
                }
                _ => Ok(None),
            }
        })
    }

    pub(crate) fn row(&self, path: &StorePath) -> Result<Option<ValidPath>, Error> {
        let act = "read a path's record";
        self.read(act, |connection| {
            let found = connection
                .prepare_cached(
                    "SELECT id, hash, registrationTime, deriver, narSize, ultimate, sigs, ca
                     FROM ValidPaths WHERE path = ?1",
                )
                .and_then(|mut statement| {
                    statement.query_row([self.store_dir.full(path)], Columns::read).optional()
                })
                .map_err(Error::db(act))?;
            let Some(columns) = found else { return Ok(None) };
            let mut statement = connection
                .prepare_cached("SELECT path FROM Refs JOIN ValidPaths ON reference = id WHERE referrer = ?1")
                .map_err(Error::db(act))?;
            let references = self.paths(&mut statement, [columns.id])?;
            self.parse_row(path, columns, references).map(Some)
        })
    }

    /// What `path` refers to; nothing if it is not valid.
    pub(crate) fn references(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, Error> {
        let act = "look up references";
        self.read(act, |connection| {
            let mut statement = connection
                .prepare_cached(
                    "SELECT path FROM Refs JOIN ValidPaths ON reference = id
                     WHERE referrer = (SELECT id FROM ValidPaths WHERE path = ?1)",
                )
                .map_err(Error::db(act))?;
            self.paths(&mut statement, [self.store_dir.full(path)])
        })
    }

    pub(crate) fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, Error> {
        let act = "look up referrers";
        self.read(act, |connection| {
            let mut statement = connection
                .prepare_cached(
                    "SELECT path FROM Refs JOIN ValidPaths ON referrer = id
                     WHERE reference = (SELECT id FROM ValidPaths WHERE path = ?1)",
                )
                .map_err(Error::db(act))?;
            self.paths(&mut statement, [self.store_dir.full(path)])
        })
    }

    /// `paths` and all that they refer to.
    pub(crate) fn closure(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, Error> {
        let act = "look up references";
        self.read(act, |connection| {
            let mut closure = paths.clone();
            let mut ids: BTreeSet<i64> = BTreeSet::new();
            for path in paths {
                let id = self.id(connection, path)?;
                ids.insert(id.ok_or_else(|| Error::NotValid { path: path.clone() })?);
            }
            let mut pending: Vec<i64> = ids.iter().copied().collect();
            let mut statement = connection
                .prepare_cached(
                    "SELECT id, path FROM Refs JOIN ValidPaths ON reference = id WHERE referrer = ?1",
                )
                .map_err(Error::db(act))?;
            while let Some(id) = pending.pop() {
                let mut rows = statement.query([id]).map_err(Error::db(act))?;
                while let Some(row) = rows.next().map_err(Error::db(act))? {
                    let id = row.get(0).map_err(Error::db(act))?;
                    if ids.insert(id) {
                        closure.insert(self.parse(text(row, 1).map_err(Error::db(act))?)?);
                        pending.push(id);
                    }
                }
            }
            Ok(closure)
        })
    }

    pub(crate) fn derivation_outputs(
        &self,
        drv: &StorePath,
    ) -> Result<BTreeMap<OutputName, StorePath>, Error> {
        let act = "look up a derivation's outputs";
        self.read(act, |connection| {
            let mut statement = connection
                .prepare_cached(
                    "SELECT DerivationOutputs.id, DerivationOutputs.path FROM DerivationOutputs
                     JOIN ValidPaths ON drv = ValidPaths.id WHERE ValidPaths.path = ?1",
                )
                .map_err(Error::db(act))?;
            let mut rows = statement.query([self.store_dir.full(drv)]).map_err(Error::db(act))?;
            let mut outputs = BTreeMap::new();
            while let Some(row) = rows.next().map_err(Error::db(act))? {
                let name = OutputName::new(text(row, 0).map_err(Error::db(act))?)
                    .map_err(|error| self.bad(error.to_string()))?;
                outputs.insert(name, self.parse(text(row, 1).map_err(Error::db(act))?)?);
            }
            Ok(outputs)
        })
    }

    /// The valid derivations that `path` is an output of.
    pub(crate) fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, Error> {
        let act = "look up derivers";
        self.read(act, |connection| {
            let mut statement = connection
                .prepare_cached(
                    "SELECT ValidPaths.path FROM DerivationOutputs JOIN ValidPaths ON drv = ValidPaths.id
                     WHERE DerivationOutputs.path = ?1",
                )
                .map_err(Error::db(act))?;
            self.paths(&mut statement, [self.store_dir.full(path)])
        })
    }

    pub(super) fn id(&self, connection: &Connection, path: &StorePath) -> Result<Option<i64>, Error> {
        connection
            .prepare_cached("SELECT id FROM ValidPaths WHERE path = ?1")
            .and_then(|mut statement| {
                statement.query_row([self.store_dir.full(path)], |row| row.get(0)).optional()
            })
            .map_err(Error::db("look up a path"))
    }

    /// Both the set and the index are sorted by bytes: one merge.
    fn valid_by_scan(
        &self,
        connection: &Connection,
        paths: &BTreeSet<StorePath>,
    ) -> Result<BTreeSet<StorePath>, Error> {
        let act = "scan the paths";
        let (Some(first), Some(last)) = (paths.first(), paths.last()) else {
            return Ok(BTreeSet::new());
        };
        let mut statement = connection
            .prepare_cached("SELECT path FROM ValidPaths WHERE path BETWEEN ?1 AND ?2 ORDER BY path")
            .map_err(Error::db(act))?;
        let bounds = [self.store_dir.full(first), self.store_dir.full(last)];
        let mut rows = statement.query(bounds).map_err(Error::db(act))?;
        let skip = self.store_dir.as_str().len() + 1;
        let mut asked = paths.iter().peekable();
        let mut valid = Vec::new();
        while let Some(row) = rows.next().map_err(Error::db(act))? {
            // Between the bounds everything begins with the store directory and a slash.
            let known = text(row, 0).map_err(Error::db(act))?.get(skip..).unwrap_or_default();
            while let Some(path) = asked.next_if(|path| path.as_str().as_bytes() <= known) {
                if path.as_str().as_bytes() == known {
                    valid.push(path.clone());
                }
            }
        }
        Ok(valid.into_iter().collect())
    }

    fn paths<P: rusqlite::Params>(
        &self,
        statement: &mut rusqlite::Statement<'_>,
        params: P,
    ) -> Result<BTreeSet<StorePath>, Error> {
        let act = "read paths";
        let mut rows = statement.query(params).map_err(Error::db(act))?;
        let mut paths = Vec::new();
        while let Some(row) = rows.next().map_err(Error::db(act))? {
            paths.push(self.parse(text(row, 0).map_err(Error::db(act))?)?);
        }
        Ok(paths.into_iter().collect())
    }

    fn parse_row(
        &self,
        path: &StorePath,
        columns: Columns,
        references: BTreeSet<StorePath>,
    ) -> Result<ValidPath, Error> {
        let nar_hash: Sha256 =
            columns.hash.parse().map_err(|error| self.bad(format!("the hash of {path}: {error}")))?;
        let ca = match columns.ca.as_deref() {
            None | Some("") => None,
            Some(text) => Some(
                text.parse().map_err(|error| self.bad(format!("the content address of {path}: {error}")))?,
            ),
        };
        Ok(ValidPath {
            info: PathInfo {
                path: path.clone(),
                nar_hash,
                nar_size: columns.nar_size,
                references,
                // A deriver is a hint, and a signature proves nothing until it is checked: what does not parse
                // (old stores have such) is left out rather than making the path unusable.
                deriver: columns.deriver.and_then(|text| self.store_dir.parse(text.as_bytes()).ok()),
                signatures: columns
                    .signatures
                    .split_ascii_whitespace()
                    .filter_map(|text| text.parse().ok())
                    .collect(),
                ca,
            },
            ultimate: columns.ultimate,
            registration_time: columns.registration_time,
        })
    }

    pub(super) fn parse(&self, path: &[u8]) -> Result<StorePath, Error> {
        self.store_dir.parse(path).map_err(|error| self.bad(error.to_string()))
    }

    fn bad(&self, why: String) -> Error {
        Error::BadDatabase { path: self.path.clone(), why }
    }
}

struct Columns {
    id: i64,
    hash: String,
    registration_time: u64,
    deriver: Option<String>,
    nar_size: u64,
    ultimate: bool,
    signatures: String,
    ca: Option<String>,
}

impl Columns {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let unsigned = |index| -> rusqlite::Result<u64> {
            Ok(row.get::<_, Option<i64>>(index)?.and_then(|number| u64::try_from(number).ok()).unwrap_or(0))
        };
        Ok(Self {
            id: row.get(0)?,
            hash: row.get(1)?,
            registration_time: unsigned(2)?,
            deriver: row.get(3)?,
            nar_size: unsigned(4)?,
            ultimate: row.get::<_, Option<i64>>(5)? == Some(1),
            signatures: row.get::<_, Option<String>>(6)?.unwrap_or_default(),
            ca: row.get(7)?,
        })
    }
}

/// The bytes of a text column; nothing for NULL.
fn text<'a>(row: &'a Row<'_>, index: usize) -> rusqlite::Result<&'a [u8]> {
    Ok(match row.get_ref(index)? {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes,
        _ => &[],
    })
}
