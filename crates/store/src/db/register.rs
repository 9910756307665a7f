//! Writing: making paths valid and invalid.

use std::collections::{BTreeMap, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

use drover_nix::{OutputName, StorePath};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::Database;
use crate::{Error, ValidPath};

/// Outputs with a known path of each `.drv` among the paths that are registered.
pub(crate) type DrvOutputs = HashMap<StorePath, BTreeMap<OutputName, StorePath>>;

impl Database {
    /// Registers `paths` in one transaction. What is there already gets new hash, size, `ultimate`, signatures and
    /// content address, but keeps its deriver and time (Nix: local-store.cc, registerValidPaths).
    pub(crate) fn register(&self, paths: &[ValidPath], outputs: &DrvOutputs) -> Result<(), Error> {
        self.write("register paths", |connection| {
            let mut ids = HashMap::with_capacity(paths.len());
            for path in paths {
                ids.insert(&path.info.path, self.upsert(connection, path)?);
            }
            for path in paths {
                let id = ids[&path.info.path];
                self.insert_references(connection, path, id, &ids)?;
                for (name, output) in outputs.get(&path.info.path).into_iter().flatten() {
                    connection
                        .prepare_cached(
                            "INSERT OR REPLACE INTO DerivationOutputs (drv, id, path) VALUES (?1, ?2, ?3)",
                        )
                        .and_then(|mut statement| {
                            statement.execute(params![id, name.as_str(), self.store_dir.full(output)])
                        })
                        .map_err(Error::db("register a derivation's outputs"))?;
                }
            }
            Ok(())
        })
    }

    /// Makes `path` invalid; false if it was not valid. Refused if another path refers to it.
    pub(crate) fn invalidate(&self, path: &StorePath) -> Result<bool, Error> {
        let act = "make a path invalid";
        self.write(act, |connection| {
            let Some(id) = self.id(connection, path)? else { return Ok(false) };
            let referrer: Option<String> = connection
                .prepare_cached(
                    "SELECT path FROM Refs JOIN ValidPaths ON referrer = id
                     WHERE reference = ?1 AND referrer <> ?1 LIMIT 1",
                )
                .and_then(|mut statement| statement.query_row([id], |row| row.get(0)).optional())
                .map_err(Error::db(act))?;
            if let Some(referrer) = referrer {
                let referrer = self.parse(referrer.as_bytes())?;
                return Err(Error::Referenced { path: path.clone(), referrer });
            }
            connection
                .prepare_cached("DELETE FROM ValidPaths WHERE id = ?1")
                .and_then(|mut statement| statement.execute([id]))
                .map_err(Error::db(act))?;
            Ok(true)
        })
    }

    fn upsert(&self, connection: &Connection, path: &ValidPath) -> Result<i64, Error> {
        let info = &path.info;
        let mut signatures: Vec<String> = info.signatures.iter().map(ToString::to_string).collect();
        // As the set that Nix keeps them in.
        signatures.sort_unstable();
        signatures.dedup();
        let signatures = signatures.join(" ");
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        connection
            .prepare_cached(
                "INSERT INTO ValidPaths (path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
                 ON CONFLICT (path) DO UPDATE SET hash = excluded.hash, narSize = excluded.narSize,
                     ultimate = excluded.ultimate, sigs = excluded.sigs, ca = excluded.ca
                 RETURNING id",
            )
            .and_then(|mut statement| {
                statement.query_row(
                    params![
                        self.store_dir.full(&info.path),
                        format!("sha256:{}", info.nar_hash.to_hex()),
                        match path.registration_time {
                            0 => now(),
                            time => number(time),
                        },
                        info.deriver.as_ref().map(|deriver| self.store_dir.full(deriver)),
                        (info.nar_size != 0).then(|| number(info.nar_size)),
                        path.ultimate.then_some(1),
                        (!signatures.is_empty()).then_some(signatures),
                        info.ca.as_ref().map(ToString::to_string),
                    ],
                    |row| row.get(0),
                )
            })
            .map_err(Error::db("register a path"))
    }

    fn insert_references(
        &self,
        connection: &Connection,
        path: &ValidPath,
        id: i64,
        ids: &HashMap<&StorePath, i64>,
    ) -> Result<(), Error> {
        for reference in &path.info.references {
            let reference_id = match ids.get(reference) {
                Some(id) => *id,
                None => self.id(connection, reference)?.ok_or_else(|| Error::ReferenceNotValid {
                    path: path.info.path.clone(),
                    reference: reference.clone(),
                })?,
            };
            connection
                .prepare_cached("INSERT OR REPLACE INTO Refs (referrer, reference) VALUES (?1, ?2)")
                .and_then(|mut statement| statement.execute([id, reference_id]))
                .map_err(Error::db("register a reference"))?;
        }
        Ok(())
    }
}

/// Unix seconds. A clock before 1970 counts as 1: 0 means that the time is not known.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX).max(1)
}
