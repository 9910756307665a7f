//! Where Nix notes the paths of outputs that were not known before they were built. Only read: the tables are an
//! experiment of Nix's, with other columns in each generation (Nix: ca-specific-schema.sql at 2.34 and 2.35).

use drover_nix::{OutputName, Sha256, StorePath};
use rusqlite::{Connection, OptionalExtension as _};

use super::Database;
use crate::Error;

/// A generation of the table: its name, and how a valid path is found in it.
struct Table {
    name: &'static str,
    find: &'static str,
}

/// Nix 2.35 and later: by the base name of the resolved `.drv`.
const BUILD_TRACE: Table = Table {
    name: "BuildTraceV3",
    find: "SELECT outputPath FROM BuildTraceV3 JOIN ValidPaths ON outputPath = ValidPaths.path
           WHERE drvPath = ?1 AND outputName = ?2",
};
/// Nix up to 2.34: by a hash of the derivation.
const REALISATIONS: Table = Table {
    name: "Realisations",
    find: "SELECT ValidPaths.path FROM Realisations JOIN ValidPaths ON outputPath = ValidPaths.id
           WHERE drvPath = ?1 AND outputName = ?2",
};

impl Database {
    /// The valid path that the output was found at, by the name of the `.drv` or by its key.
    pub(crate) fn realised_output(
        &self,
        drv: &StorePath,
        key: &Sha256,
        output: &OutputName,
    ) -> Result<Option<StorePath>, Error> {
        let act = "look up a realised output";
        self.read(act, |connection| {
            for (table, name) in
                [(&BUILD_TRACE, drv.to_string()), (&REALISATIONS, format!("sha256:{}", key.to_hex()))]
            {
                if !exists(connection, table.name)? {
                    continue;
                }
                let found: Option<String> = connection
                    .prepare_cached(table.find)
                    .and_then(|mut statement| {
                        statement.query_row([name.as_str(), output.as_str()], |row| row.get(0)).optional()
                    })
                    .map_err(Error::db(act))?;
                if let Some(path) = found {
                    return self.parse(path.as_bytes()).map(Some);
                }
            }
            Ok(None)
        })
    }
}

fn exists(connection: &Connection, table: &str) -> Result<bool, Error> {
    connection
        .prepare_cached("SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?1")
        .and_then(|mut statement| statement.query_row([table], |row| row.get::<_, i64>(0)))
        .map(|count| count > 0)
        .map_err(Error::db("find the tables"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{add, store, store_path};

    #[test]
    fn both_generations_are_read() {
        let (_dir, store) = store();
        let (drv, key) = (store_path("a.drv"), Sha256::of(b"key"));
        let look = |output: &str| {
            store.realised_output(&drv, &key, &output.parse().unwrap()).unwrap().map(|path| path.to_string())
        };
        assert_eq!(look("out"), None, "a store without the tables");

        let (old, new) = (add(&store, "old", &[]), add(&store, "new", &[]));
        let gone = store_path("gone");
        let full = |path| store.store_dir().full(path);
        let write = |text: &str| {
            store
                .database()
                .write("test", |connection| connection.execute_batch(text).map_err(Error::db("test")))
        };
        write(&format!(
            "CREATE TABLE Realisations (id integer primary key, drvPath text, outputName text, outputPath integer);
             INSERT INTO Realisations SELECT 1, 'sha256:{}', 'out', id FROM ValidPaths WHERE path = '{}'",
            key.to_hex(),
            full(&old)
        ))
        .unwrap();
        assert_eq!((look("out"), look("dev")), (Some(old.to_string()), None));

        write(&format!(
            "CREATE TABLE BuildTraceV3 (id integer primary key, drvPath text, outputName text, outputPath text);
             INSERT INTO BuildTraceV3 VALUES (1, '{drv}', 'out', '{}'), (2, '{drv}', 'dev', '{}')",
            full(&new),
            full(&gone)
        ))
        .unwrap();
        assert_eq!(look("out"), Some(new.to_string()));
        assert_eq!(look("dev"), None, "a path that is not valid any more");
    }
}
