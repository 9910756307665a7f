//! Where a store lies: what users write for `--store`, and the directories that it stands for.
//!
//! Facts: Nix store-reference.cc (forms of a URI), local-fs-store.hh (`root`, `state`, `log`, `real`), globals.cc
//! (defaults and environment); held against Nix 2.8, 2.26 and 2.34 by a test with real ones.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use drover_nix::StoreDir;

use crate::Error;

/// Settings that Nix knows for local stores and that change nothing here.
const IGNORED: [&str; 8] = [
    "build-dir",
    "ignore-gc-delete-failure",
    "path-info-cache-size",
    "priority",
    "require-sigs",
    "system-features",
    "trusted",
    "want-mass-query",
];

/// A parsed `--store` value: a directory, `local`, `auto`, or any of them with
/// `?root=…&store=…&real=…&state=…&log=…`. A directory is what has a slash in it; a relative one is taken from where
/// the program runs, whereas parameters have to be absolute.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StoreUri {
    pub root: Option<PathBuf>,
    pub store: Option<StoreDir>,
    pub real: Option<PathBuf>,
    pub state: Option<PathBuf>,
    pub log: Option<PathBuf>,
    /// `read-only=true`: open it with [`crate::Access::ReadOnly`].
    pub read_only: bool,
    /// Parameters that mean nothing to us. Nix warns of those that mean nothing to it, and goes on.
    pub unknown: Vec<String>,
}

/// A store's directories. All are absolute.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreLayout {
    /// What paths in the store begin with, `/nix/store` as a rule, wherever the files lie.
    pub store_dir: StoreDir,
    /// Where the objects' files lie.
    pub real_store_dir: PathBuf,
    /// Database, roots and locks.
    pub state_dir: PathBuf,
    /// Build logs, in `drvs` below it.
    pub log_dir: PathBuf,
}

impl StoreUri {
    pub fn parse(uri: &str) -> Result<Self, Error> {
        let fail = |why: String| Error::Uri { uri: uri.to_owned(), why };
        let (base, query) = uri.split_once('?').unwrap_or((uri, ""));
        let mut parsed = Self::default();
        match base.strip_prefix("local://").unwrap_or(base) {
            "local" | "auto" | "" => {}
            root if root.contains('/') && !root.contains("://") => {
                parsed.root = Some(
                    std::path::absolute(root)
                        .map_err(|error| fail(format!("the directory cannot be made absolute: {error}")))?,
                );
            }
            _ => {
                return Err(fail(
                    "only local stores are supported: give a root directory (`/…` or `./…`), `local`, or `auto`"
                        .into(),
                ));
            }
        }
        // What has no `=` is no parameter to Nix either.
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            let value = percent_decode(value)
                .ok_or_else(|| fail(format!("the value of {key} is not percent-encoded correctly")))?;
            match key {
                // Nix takes an empty `root` as none.
                "root" if value.is_empty() => parsed.root = None,
                "root" => parsed.root = Some(absolute(&value).map_err(&fail)?),
                "real" => parsed.real = Some(absolute(&value).map_err(&fail)?),
                "state" => parsed.state = Some(absolute(&value).map_err(&fail)?),
                "log" => parsed.log = Some(absolute(&value).map_err(&fail)?),
                "store" => parsed.store = Some(store_dir(&value).map_err(&fail)?),
                "read-only" => parsed.read_only = matches!(value.to_str(), Some("true" | "1" | "yes")),
                key if IGNORED.contains(&key) => {}
                key => parsed.unknown.push(key.to_owned()),
            }
        }
        Ok(parsed)
    }

    /// The directories, with Nix's defaults for what the URI does not say.
    pub fn layout(&self) -> StoreLayout {
        let below_root = |path: &str| match &self.root {
            Some(root) => root.join(path),
            None => Path::new("/").join(path),
        };
        let store_dir = self.store.clone().unwrap_or_default();
        let real_store_dir = match (&self.real, &self.root) {
            (Some(real), _) => real.clone(),
            (None, Some(root)) => root.join("nix/store"),
            (None, None) => PathBuf::from(store_dir.as_str()),
        };
        StoreLayout {
            real_store_dir,
            state_dir: self.state.clone().unwrap_or_else(|| below_root("nix/var/nix")),
            log_dir: self.log.clone().unwrap_or_else(|| below_root("nix/var/log/nix")),
            store_dir,
        }
    }

    /// Fills in what `NIX_STORE_DIR`, `NIX_STATE_DIR` and `NIX_LOG_DIR` say where the URI does not. A root moves state
    /// and logs away from where the latter two mean.
    pub fn with_environment(mut self) -> Result<Self, Error> {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let fail = |name: &str| {
            let uri = name.to_owned();
            |why| Error::Uri { uri, why }
        };
        if let (None, Some(value)) = (&self.store, variable("NIX_STORE_DIR")) {
            self.store = Some(store_dir(&value).map_err(fail("NIX_STORE_DIR"))?);
        }
        if self.root.is_some() {
            return Ok(self);
        }
        if let (None, Some(value)) = (&self.state, variable("NIX_STATE_DIR")) {
            self.state = Some(absolute(&value).map_err(fail("NIX_STATE_DIR"))?);
        }
        if let (None, Some(value)) = (&self.log, variable("NIX_LOG_DIR")) {
            self.log = Some(absolute(&value).map_err(fail("NIX_LOG_DIR"))?);
        }
        Ok(self)
    }
}

impl StoreLayout {
    /// The layout that `--store ROOT` has: everything below `root`, the logical store directory `/nix/store`.
    pub fn in_root(root: impl Into<PathBuf>) -> Self {
        StoreUri { root: Some(root.into()), ..StoreUri::default() }.layout()
    }

    /// Whether the files lie elsewhere than their store paths say.
    pub fn is_relocated(&self) -> bool {
        self.real_store_dir != Path::new(self.store_dir.as_str())
    }

    /// Deletes the file that keeps some room on the disk, so that the database can be opened and written where nothing else
    /// can. The next opening that finds room makes it anew. False if it was not there.
    pub fn release_reserve(&self) -> bool {
        std::fs::remove_file(self.db_dir().join("reserved")).is_ok()
    }

    /// Where a running collector listens.
    pub(crate) fn gc_socket(&self) -> PathBuf {
        self.state_dir.join("gc-socket/socket")
    }

    pub(crate) fn db_dir(&self) -> PathBuf {
        self.state_dir.join("db")
    }
}

fn absolute(path: &OsStr) -> Result<PathBuf, String> {
    let path = Path::new(path);
    path.is_absolute().then(|| path.to_owned()).ok_or_else(|| format!("{} is not absolute", path.display()))
}

fn store_dir(value: &OsStr) -> Result<StoreDir, String> {
    let text = value.to_str().ok_or("the store directory is not UTF-8")?;
    let trimmed = text.trim_end_matches('/');
    StoreDir::new(trimmed).map_err(|error| error.to_string())
}

fn percent_decode(text: &str) -> Option<OsString> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            other => other,
        };
        // No path can have NUL; a system call would see it end there.
        if byte == 0 {
            return None;
        }
        decoded.push(byte);
    }
    Some(OsString::from_vec(decoded))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(uri: &str) -> StoreLayout {
        StoreUri::parse(uri).unwrap().layout()
    }

    #[test]
    fn the_store_of_the_machine() {
        for uri in ["local", "auto", "", "local://", "local?", "local?root", "local?root="] {
            let layout = layout(uri);
            assert_eq!(layout.real_store_dir, Path::new("/nix/store"));
            assert_eq!(layout.state_dir, Path::new("/nix/var/nix"));
            assert_eq!(layout.log_dir, Path::new("/nix/var/log/nix"));
            assert!(!layout.is_relocated());
        }
    }

    #[test]
    fn a_root_moves_everything_but_the_logical_directory() {
        for uri in [
            "/a b",
            "local:///a b",
            "local?root=/a%20b",
            "auto?root=%2Fa%20b",
            "/a b?trusted=1",
            "/x?root=/a%20b",
        ] {
            let layout = layout(uri);
            assert_eq!(layout.store_dir.as_str(), "/nix/store");
            assert_eq!(layout.real_store_dir, Path::new("/a b/nix/store"));
            assert_eq!(layout.state_dir, Path::new("/a b/nix/var/nix"));
            assert_eq!(layout.log_dir, Path::new("/a b/nix/var/log/nix"));
            assert!(layout.is_relocated());
            assert_eq!(layout, StoreLayout::in_root("/a b"));
        }
    }

    #[test]
    fn single_directories() {
        let layout = layout("local?root=/r&store=/s/&real=/t&state=/u&log=/v");
        assert_eq!(layout.store_dir.as_str(), "/s");
        assert_eq!(layout.real_store_dir, Path::new("/t"));
        assert_eq!(layout.state_dir, Path::new("/u"));
        assert_eq!(layout.log_dir, Path::new("/v"));
        // Without a root the files lie where the store says.
        assert_eq!(StoreUri::parse("local?store=/s").unwrap().layout().real_store_dir, Path::new("/s"));
        assert!(StoreUri::parse("local?read-only=true").unwrap().read_only);
    }

    #[test]
    fn relative_directories() {
        let here = env::current_dir().unwrap();
        for uri in ["./r", "r/", "x/../r"] {
            let root = StoreUri::parse(uri).unwrap().root.unwrap();
            assert!(root.starts_with(&here) && root.ends_with("r"), "{uri}");
        }
    }

    #[test]
    fn what_nobody_knows_is_told() {
        let uri = StoreUri::parse("/r?rot=1&trusted=1&toor=").unwrap();
        assert_eq!((uri.unknown, uri.root), (vec!["rot".into(), "toor".into()], Some("/r".into())));
    }

    #[test]
    fn what_is_refused() {
        for uri in [
            "ssh://host",
            "daemon",
            "https://cache",
            "file:///x",
            "relative",
            ".",
            "local?root=x",
            "local?state=./x",
            "/x?store=a",
            "/x?root=%0",
        ] {
            assert!(StoreUri::parse(uri).is_err(), "{uri}");
        }
        assert!(StoreUri::parse("local?root=/a%00b").is_err());
    }
}
