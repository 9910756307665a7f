//! Comparing the database with what is on disk (Nix: local-store.cc, verifyStore). Nothing is changed.

use std::io;

use drover_nix::StorePath;
use drover_nix::hash::Sha256Hasher;

use crate::{Error, LocalStore, content, fs};

/// What [`LocalStore::verify`] found.
#[derive(Clone, Default, Debug)]
pub struct VerifyReport {
    pub paths_checked: u64,
    /// One line a problem. None: the store is sound.
    pub problems: Vec<String>,
}

impl LocalStore {
    /// Checks that every valid path is on disk; with `contents` also that it has the hash, the size and the content
    /// address that the database says.
    pub fn verify(&self, contents: bool) -> Result<VerifyReport, Error> {
        let mut report = VerifyReport::default();
        for path in self.all_valid_paths()? {
            report.paths_checked += 1;
            match self.verify_path(&path, contents) {
                Ok(None) => {}
                Ok(Some(problem)) => report.problems.push(problem),
                Err(error) if error.category() == "database" => return Err(error),
                // What cannot be read is a finding, and no reason not to look at the rest.
                Err(error) => report.problems.push(error.to_string()),
            }
        }
        Ok(report)
    }

    fn verify_path(&self, path: &StorePath, contents: bool) -> Result<Option<String>, Error> {
        let real = self.real_path(path);
        match std::fs::symlink_metadata(&real) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Some(format!("{path} is valid but not on disk")));
            }
            Err(error) => return Err(Error::io("examine", &real)(error)),
        }
        // Deleted meanwhile, by a collector for instance: nothing to find fault with.
        let Some(info) = self.path_info(path)?.filter(|_| contents) else { return Ok(None) };
        let mut hasher = Sha256Hasher::new();
        let size = fs::dump(&real, &mut hasher)?;
        let hash = hasher.finish();
        if hash != info.nar_hash {
            let expected = info.nar_hash;
            return Ok(Some(format!("{path} was modified: its hash is {hash}, not {expected}")));
        }
        if info.nar_size != 0 && size != info.nar_size {
            return Ok(Some(format!("{path} has {size} bytes as an archive, not {}", info.nar_size)));
        }
        Ok(content::check_content(&info, &real).err().map(|error| error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use crate::testing::{add, store};

    #[test]
    fn finds_what_is_missing_and_what_was_changed() {
        let (_dir, store) = store();
        let (_, b, c) = (add(&store, "a", &[]), add(&store, "b", &[]), add(&store, "c", &[]));
        let report = store.verify(true).unwrap();
        assert_eq!((report.paths_checked, report.problems.len()), (3, 0));
        std::fs::remove_file(store.real_path(&b)).unwrap();
        std::fs::set_permissions(store.real_path(&c), std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::write(store.real_path(&c), "C").unwrap();
        let report = store.verify(false).unwrap();
        assert_eq!(report.problems.len(), 1);
        let problems = store.verify(true).unwrap().problems.join("\n");
        assert!(problems.contains(&format!("{b} is valid but not on disk")), "{problems}");
        assert!(problems.contains(&format!("{c} was modified")), "{problems}");
    }
}
