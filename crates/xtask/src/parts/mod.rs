//! Parts: everything that is not in this repository and that tests need, fetched and built once per machine.
//!
//! A part is a directory in the cache, named by what it is and by a hash of its recipe; a changed recipe is another part.
//! It is made in a directory of its own and renamed into place, under a lock, so a part that exists is whole and two
//! processes never make the same one. Only this module writes to the cache, but for [`crate::cluster`]'s state.

pub mod go;
pub mod host;
pub mod rootfs;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

/// The cache: `$DROVER_CACHE`, or `drover` in the user's cache directory.
pub fn cache() -> Result<PathBuf> {
    let named = std::env::var_os("DROVER_CACHE").filter(|v| !v.is_empty()).map(PathBuf::from);
    let user = || {
        let xdg = std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        xdg.or_else(home).map(|dir| dir.join("drover"))
    };
    let dir = named
        .or_else(user)
        .context("neither DROVER_CACHE, XDG_CACHE_HOME nor HOME is set: set DROVER_CACHE to a directory")?;
    fs::create_dir_all(&dir).with_context(|| format!("could not make the cache {}", dir.display()))?;
    Ok(fs::canonicalize(dir)?)
}

/// Returns the part `name` with this recipe; makes it with `make`, which fills the directory that it is given, if it is missing.
pub fn ensure(name: &str, recipe: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    ensure_in(&cache()?, name, recipe, make)
}

/// Holds the lock `name` of the cache until the file is dropped; waits for another holder.
pub fn lock(cache: &Path, name: &str) -> Result<File> {
    let dir = cache.join("locks");
    fs::create_dir_all(&dir)?;
    let path = dir.join(name);
    let file = File::create(&path).with_context(|| format!("could not make the lock {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("parts: waiting for another process that holds {}", path.display());
        file.lock().with_context(|| format!("could not lock {}", path.display()))?;
    }
    Ok(file)
}

/// The first 12 hexadecimal digits of the SHA-256 of `text`.
pub fn key(text: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    digest.as_ref()[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn ensure_in(
    cache: &Path,
    name: &str,
    recipe: &str,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let part = format!("{name}-{}", key(recipe));
    let place = cache.join("parts").join(&part);
    if place.is_dir() {
        return Ok(place);
    }
    let _lock = lock(cache, &part)?;
    if place.is_dir() {
        return Ok(place); // made by the process that we waited for
    }
    let scratch = cache.join("tmp").join(&part);
    remove(&scratch)?; // left by a process that died; the lock says that none is at work
    fs::create_dir_all(&scratch)?;
    fs::create_dir_all(cache.join("parts"))?;
    eprintln!("parts: making {name} in {}", place.display());
    let start = Instant::now();
    make(&scratch).with_context(|| format!("could not make the part {name}"))?;
    fs::rename(&scratch, &place).with_context(|| format!("could not move {} into place", place.display()))?;
    eprintln!("parts: {name} is ready after {:.0} s", start.elapsed().as_secs_f64());
    Ok(place)
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn a_part_is_made_once_even_by_two_at_a_time() {
        let cache = tempfile::tempdir().unwrap();
        let made = AtomicU32::new(0);
        let make = |dir: &Path| {
            made.fetch_add(1, Ordering::SeqCst);
            fs::write(dir.join("file"), "whole")?;
            Ok(())
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| ensure_in(cache.path(), "thing", "recipe", make).unwrap());
            }
        });
        let place = ensure_in(cache.path(), "thing", "recipe", make).unwrap();
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "whole");
        assert_eq!(made.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn another_recipe_is_another_part() {
        let cache = tempfile::tempdir().unwrap();
        let a = ensure_in(cache.path(), "thing", "a", |_| Ok(())).unwrap();
        let b = ensure_in(cache.path(), "thing", "b", |_| Ok(())).unwrap();
        assert_ne!(a, b);
    }

    #[test]
    fn a_part_that_failed_is_not_there_and_can_be_made_again() {
        let cache = tempfile::tempdir().unwrap();
        let half = |dir: &Path| {
            fs::write(dir.join("half"), "")?;
            anyhow::bail!("the mirror is down")
        };
        let error = ensure_in(cache.path(), "thing", "a", half).unwrap_err();
        assert_eq!(format!("{error:#}"), "could not make the part thing: the mirror is down");
        let place = ensure_in(cache.path(), "thing", "a", |_| Ok(())).unwrap();
        assert_eq!(fs::read_dir(place).unwrap().count(), 0);
    }
}
