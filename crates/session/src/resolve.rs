//! From the path of a `.drv` that caches have to what a builder can build, for those who give no derivation of their own.
//!
//! The file itself and those of its direct inputs are read, each believed by its own name alone. Whether the paths of its
//! outputs are right as well is not asked here: `trust` proves them, when the [`crate::Job`] is looked at.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use drover_cache::Cache;
use drover_nix::derivation::{DerivationType, aterm, modulo};
use drover_nix::{BasicDerivation, Derivation, Error, StoreDir, StorePath};

use crate::{Failure, Reason};

/// Files that are read at once.
const READERS: usize = 16;
/// Most direct inputs of one derivation whose files are read; those of the largest packages have some thousand.
const MAX_INPUTS: usize = 20_000;

/// A derivation whose inputs are paths.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// The `.drv` that it goes by: where inputs' paths had to be known first, that of the resolved derivation.
    pub drv_path: StorePath,
    pub derivation: BasicDerivation,
}

/// Why there is no derivation to build.
#[derive(Debug)]
pub enum Unresolved {
    /// No cache has this `.drv`: the one that was asked for, or a direct input of it.
    Absent(StorePath),
    /// A cache could not be asked (`infrastructure`), or the answer is that it cannot be built.
    Failed(Failure),
}

/// The derivation at `drv_path` with its inputs as store paths, from what the caches have.
pub fn resolve(
    dir: &StoreDir,
    drv_path: &StorePath,
    caches: &[Arc<dyn Cache>],
) -> Result<Resolved, Unresolved> {
    let invalid = |why: &dyn std::fmt::Display| {
        Failure::verdict(Reason::InvalidDerivation, format!("cannot resolve {drv_path}: {why}"))
    };
    let drv = read(dir, drv_path, caches)?;
    let kind = drv.basic.kind().map_err(|error| invalid(&error))?;
    if drv.input_drvs.len() > MAX_INPUTS {
        return Err(invalid(&format!("it has more than {MAX_INPUTS} derivations as inputs")).into());
    }
    let inputs = read_all(dir, &drv, caches)?;
    for (path, outputs) in &drv.input_drvs {
        let input = &inputs[path].basic;
        if let Some(absent) = outputs.iter().find(|output| !input.outputs.contains_key(*output)) {
            return Err(
                invalid(&format!("it needs output {absent} of {path}, which has no such output")).into()
            );
        }
        if !kind.may_use_impure() && matches!(input.kind(), Ok(DerivationType::Impure)) {
            let why =
                format!("{path} is impure, and only impure and fixed-output derivations may depend on that");
            return Err(invalid(&why).into());
        }
    }
    let path_of = |input: &StorePath, output: &_| {
        let input = &inputs.get(input)?.basic;
        input.outputs.get(output)?.path(dir, &input.name, output).ok()?
    };
    let derivation = drv.resolve(dir, path_of).map_err(|error| match error {
        Error::Unresolved { .. } => invalid(&format!(
            "{error}, and a request that has drvPath alone cannot say where they are, because that follows from their \
             content. `drover submit --wait` builds them first and sends the derivation itself"
        )),
        error => invalid(&error),
    })?;
    let is_another = drv.resolves_to_another().map_err(|error| invalid(&error))?;
    let drv_path = match is_another {
        true => modulo::basic_drv_path(dir, &derivation).map_err(|error| invalid(&error))?,
        false => drv_path.clone(),
    };
    Ok(Resolved { drv_path, derivation })
}

/// The files of the direct inputs.
fn read_all(
    dir: &StoreDir,
    drv: &Derivation,
    caches: &[Arc<dyn Cache>],
) -> Result<BTreeMap<StorePath, Derivation>, Unresolved> {
    let paths: Vec<&StorePath> = drv.input_drvs.keys().collect();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    let work = || {
        while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = read(dir, path, caches);
            let has_failed = result.is_err();
            // If another reader panicked, the scope passes that on.
            results.lock().unwrap_or_else(PoisonError::into_inner).insert((*path).clone(), result);
            if has_failed {
                next.fetch_max(paths.len(), Ordering::Relaxed);
            }
        }
    };
    drover_cache::in_parallel(READERS.min(paths.len()), work);
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.into_iter().map(|(path, result)| Ok((path, result?))).collect()
}

/// The derivation that has this name. A cache that has something else under it is passed over, and counts only if no other one
/// has the right file; so does one that cannot be asked, before that.
fn read(dir: &StoreDir, path: &StorePath, caches: &[Arc<dyn Cache>]) -> Result<Derivation, Unresolved> {
    let (mut trouble, mut wrong) = (None, None);
    for cache in caches {
        match drover_cache::read_file(&**cache, path, aterm::MAX_LEN as u64) {
            Ok(None) => {}
            Ok(Some(text)) => match parse(dir, path, &text) {
                Ok(drv) => return Ok(drv),
                Err(why) => {
                    let message =
                        format!("the file {path} in {} is not what its name says: {why}", cache.url());
                    wrong.get_or_insert_with(|| Failure::verdict(Reason::PathNotProven, message));
                }
            },
            Err(error) => {
                trouble.get_or_insert_with(|| Failure::cache(&format!("reading {path}"))(error));
            }
        }
    }
    match trouble.or(wrong) {
        Some(failure) => Err(failure.into()),
        None => Err(Unresolved::Absent(path.clone())),
    }
}

/// What the text says, if it is the one text that leads to this path.
fn parse(dir: &StoreDir, path: &StorePath, text: &[u8]) -> Result<Derivation, String> {
    let name = path.derivation_name().ok_or("it does not end with .drv")?;
    let drv = aterm::parse(dir, name, text).map_err(|error| error.to_string())?;
    let computed = modulo::drv_path(dir, &drv).map_err(|error| error.to_string())?;
    if computed != *path {
        return Err(format!("its content belongs at {computed}"));
    }
    if aterm::print(dir, &drv).map_err(|error| error.to_string())? != text {
        return Err("it is written in another way than Nix writes derivations".into());
    }
    Ok(drv)
}

impl From<Failure> for Unresolved {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::Write as _;

    use drover_cache::{CacheOptions, NarSpool};
    use drover_nix::{DerivationOutput, Method, OutputName};
    use drover_serve::testing;
    use tempfile::TempDir;

    use super::*;

    /// A cache in a directory.
    struct Shelf {
        root: TempDir,
        cache: Arc<dyn Cache>,
    }

    impl Shelf {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let url = format!("file://{}", root.path().display());
            Self { cache: drover_cache::open(&url, &CacheOptions::default()).unwrap(), root }
        }

        /// Puts a file under this name, whatever it is.
        fn put(&self, path: &StorePath, text: &[u8]) {
            let nar = testing::file_nar(text);
            let info = testing::info_of(path.clone(), &[], &nar);
            let mut spool = NarSpool::new(self.root.path(), []).unwrap();
            spool.write_all(&nar).unwrap();
            self.cache.put(&info, &spool.finish().unwrap()).unwrap();
        }

        fn add(&self, drv: &Derivation) -> StorePath {
            let path = modulo::drv_path(&StoreDir::default(), drv).unwrap();
            self.put(&path, &aterm::print(&StoreDir::default(), drv).unwrap());
            path
        }

        fn resolve(&self, path: &StorePath) -> Result<Resolved, Unresolved> {
            resolve(&StoreDir::default(), path, std::slice::from_ref(&self.cache))
        }
    }

    /// With one output, of this kind; an input-addressed one is somewhere.
    fn drv(name: &str, output: Option<DerivationOutput>, inputs: &[&StorePath]) -> Derivation {
        let somewhere = || DerivationOutput::InputAddressed(StorePath::from_parts([7; 20], name).unwrap());
        Derivation {
            basic: BasicDerivation {
                name: name.into(),
                outputs: [(OutputName::out(), output.unwrap_or_else(somewhere))].into(),
                input_srcs: BTreeSet::new(),
                system: "x86_64-linux".into(),
                builder: "/bin/sh".into(),
                args: vec![],
                env: [("out".into(), "".into())].into(),
            },
            input_drvs: inputs.iter().map(|path| ((*path).clone(), [OutputName::out()].into())).collect(),
        }
    }

    fn floating() -> Option<DerivationOutput> {
        Some(DerivationOutput::CaFloating { method: Method::Nar, algo: drover_nix::HashAlgo::Sha256 })
    }

    fn refusal(result: Result<Resolved, Unresolved>) -> (Reason, String) {
        match result {
            Err(Unresolved::Failed(failure)) if !failure.infrastructure => (failure.reason, failure.message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn inputs_become_paths() {
        let shelf = Shelf::new();
        let inputs: Vec<_> = (0..40).map(|i| shelf.add(&drv(&format!("input-{i}"), None, &[]))).collect();
        let top = drv("top", None, &inputs.iter().collect::<Vec<_>>());
        let path = shelf.add(&top);
        let resolved = shelf.resolve(&path).unwrap();
        assert_eq!(resolved.drv_path, path);
        assert_eq!(resolved.derivation.input_srcs.len(), 40);
        assert_eq!(resolved.derivation.outputs, top.basic.outputs);
        // Where the outputs' paths follow from content, it is another derivation without its inputs.
        let above = shelf.add(&drv("above", floating(), &[&path]));
        let resolved = shelf.resolve(&above).unwrap();
        assert_ne!(resolved.drv_path, above);
        let own = crate::drv_path_of(&StoreDir::default(), &resolved.derivation).unwrap();
        assert_eq!(resolved.drv_path, own);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let (shelf, other) = (Shelf::new(), Shelf::new());
        let below = other.add(&drv("below", None, &[]));
        let top = drv("top", None, &[&below]);
        let path = modulo::drv_path(&StoreDir::default(), &top).unwrap();
        let absent = |path: &StorePath| match shelf.resolve(path) {
            Err(Unresolved::Absent(absent)) => absent,
            other => panic!("{other:?}"),
        };
        assert_eq!(absent(&path), path);
        shelf.add(&top);
        assert_eq!(absent(&path), below);
        // Each cache may have a part.
        let both = [shelf.cache.clone(), other.cache.clone()];
        assert!(resolve(&StoreDir::default(), &path, &both).is_ok());
    }

    #[test]
    fn a_file_is_believed_by_its_name_alone() {
        let honest = Shelf::new();
        let good = drv("good", None, &[]);
        let path = honest.add(&good);
        let other = drv("good", floating(), &[]);
        let elsewhere = modulo::drv_path(&StoreDir::default(), &other).unwrap();
        let canonical = aterm::print(&StoreDir::default(), &good).unwrap();
        let spelt = String::from_utf8(canonical).unwrap().replacen("x86_64-linux", "\\x86_64-linux", 1);
        for (text, why) in [
            (aterm::print(&StoreDir::default(), &other).unwrap(), elsewhere.to_string()),
            (b"Derive(".to_vec(), "derivation".into()),
            (spelt.into_bytes(), "another way".into()),
        ] {
            let liar = Shelf::new();
            liar.put(&path, &text);
            let (reason, message) = refusal(liar.resolve(&path));
            assert_eq!(reason, Reason::PathNotProven);
            assert!(message.contains(&path.to_string()) && message.contains(&why), "{message}");
            // Another cache may have the right one.
            let both = [liar.cache.clone(), honest.cache.clone()];
            assert!(resolve(&StoreDir::default(), &path, &both).is_ok());
        }
    }

    #[test]
    fn what_cannot_be_built_from_its_name_says_so() {
        let shelf = Shelf::new();
        let base = shelf.add(&drv("base", floating(), &[]));
        let (reason, message) = refusal(shelf.resolve(&shelf.add(&drv("user", None, &[&base]))));
        assert_eq!(reason, Reason::InvalidDerivation);
        assert!(message.contains(&base.to_string()) && message.contains("submit --wait"), "{message}");

        let mut wrong = drv("wrong", None, &[&base]);
        wrong.input_drvs.insert(base, ["doc".parse().unwrap()].into());
        let (_, message) = refusal(shelf.resolve(&shelf.add(&wrong)));
        assert!(message.contains("output doc"), "{message}");
    }

    #[test]
    fn a_cache_that_cannot_be_asked_is_no_verdict() {
        let shelf = Shelf::new();
        let good = drv("good", None, &[]);
        let path = modulo::drv_path(&StoreDir::default(), &good).unwrap();
        std::fs::create_dir(shelf.root.path().join(format!("{}.narinfo", path.hash_part()))).unwrap();
        let liar = Shelf::new();
        liar.put(&path, b"Derive(");
        for caches in [vec![shelf.cache.clone()], vec![liar.cache.clone(), shelf.cache.clone()]] {
            match resolve(&StoreDir::default(), &path, &caches) {
                Err(Unresolved::Failed(failure)) => assert!(failure.infrastructure, "{failure}"),
                other => panic!("{other:?}"),
            }
        }
    }
}
