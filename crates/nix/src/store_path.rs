//! Store paths: the name that a store object goes by, and how names are computed from content.
//!
//! Rules: Nix path.cc and store-dir-config.cc. A [`StorePath`] is the base name only; a [`StoreDir`] turns it into a
//! full path and back, so that nothing depends on where a store happens to be mounted.

use std::fmt;
use std::str::FromStr;

use bstr::{BString, ByteSlice as _};

use crate::hash::{Sha256, Sha256Hasher};
use crate::{Error, base32};

/// Digits of the hash part.
pub const HASH_PART_LEN: usize = 32;
/// Longest name after the hash part and its dash (Nix: path.hh, MaxPathLen).
pub const MAX_NAME_LEN: usize = 211;

/// The base name of a store object: 32 nix32 digits, a dash and a name. Orders as its text does.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePath(String);

impl StorePath {
    /// Parses a base name such as `zzyyxx…-hello-1.0`.
    pub fn from_base_name(base_name: &[u8]) -> Result<Self, Error> {
        let fail = |why: String| Error::StorePath { path: shorten(base_name), why };
        if base_name.len() <= HASH_PART_LEN + 1 || base_name[HASH_PART_LEN] != b'-' {
            return Err(fail(format!("expected {HASH_PART_LEN} digits, a dash and a name")));
        }
        let (hash, name) = (&base_name[..HASH_PART_LEN], &base_name[HASH_PART_LEN + 1..]);
        if !hash.iter().all(|b| base32::is_digit(*b)) {
            return Err(fail("its hash part has characters that are not nix32 digits".into()));
        }
        check_name(name).map_err(fail)?;
        // Both halves were just checked to be ASCII.
        String::from_utf8(base_name.to_vec()).map(Self).map_err(|_| fail("it is not ASCII".into()))
    }

    /// From a 20-byte hash and a name.
    pub fn from_parts(hash: [u8; 20], name: &str) -> Result<Self, Error> {
        check_name(name.as_bytes())
            .map_err(|why| Error::StorePath { path: shorten(name.as_bytes()), why })?;
        Ok(Self(format!("{}-{name}", base32::encode(&hash))))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 32 digits, which are what references are found by.
    pub fn hash_part(&self) -> &str {
        &self.0[..HASH_PART_LEN]
    }

    /// The text behind the dash.
    pub fn name(&self) -> &str {
        &self.0[HASH_PART_LEN + 1..]
    }

    pub fn is_derivation(&self) -> bool {
        self.name().ends_with(".drv")
    }

    /// The derivation's name if this is a `.drv` file's path.
    pub fn derivation_name(&self) -> Option<&str> {
        self.name().strip_suffix(".drv")
    }
}

impl FromStr for StorePath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::from_base_name(text.as_bytes())
    }
}

/// The base name.
impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The logical directory of a store, `/nix/store` nearly everywhere. It is part of what names are computed from.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct StoreDir(String);

impl Default for StoreDir {
    fn default() -> Self {
        Self("/nix/store".to_owned())
    }
}

impl StoreDir {
    /// `dir` is absolute, without a trailing slash and without `.` or `..`.
    pub fn new(dir: &str) -> Result<Self, Error> {
        let canonical = dir.starts_with('/')
            && dir.len() > 1
            && dir[1..].split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        if !canonical {
            let why = "a store directory is an absolute path without empty, `.` or `..` components".into();
            return Err(Error::StorePath { path: shorten(dir.as_bytes()), why });
        }
        Ok(Self(dir.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The full path.
    pub fn full(&self, path: &StorePath) -> String {
        format!("{}/{}", self.0, path.0)
    }

    /// Parses a full path that is a direct child of this directory.
    pub fn parse(&self, path: &[u8]) -> Result<StorePath, Error> {
        let base = path.strip_prefix(self.0.as_bytes()).and_then(|rest| rest.strip_prefix(b"/"));
        match base {
            Some(base) => StorePath::from_base_name(base).map_err(|error| match error {
                Error::StorePath { why, .. } => Error::StorePath { path: shorten(path), why },
                other => other,
            }),
            None => Err(Error::StorePath { path: shorten(path), why: format!("it is not in {}", self.0) }),
        }
    }

    /// `type:sha256:<hex>:<dir>:<name>`, hashed and folded to 20 bytes (Nix: store-dir-config.cc, makeStorePath).
    /// `kind` carries its references already, for instance `source:/nix/store/…`.
    pub fn make_path(&self, kind: &str, inner: Sha256, name: &str) -> Result<StorePath, Error> {
        let text = format!("{kind}:sha256:{}:{}:{name}", inner.to_hex(), self.0);
        let mut hasher = Sha256Hasher::new();
        hasher.update(text.as_bytes());
        StorePath::from_parts(compress(hasher.finish()), name)
    }
}

impl fmt::Display for StoreDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// XORs byte `i` into byte `i mod 20` (Nix: hash.cc, compressHash).
pub fn compress(hash: Sha256) -> [u8; 20] {
    let mut folded = [0; 20];
    for (i, byte) in hash.0.iter().enumerate() {
        folded[i % 20] ^= byte;
    }
    folded
}

/// The rules for the name of a store object (Nix: path.cc, checkName).
fn check_name(name: &[u8]) -> Result<(), String> {
    if name.is_empty() {
        return Err("its name is empty".into());
    }
    if name.len() > MAX_NAME_LEN {
        return Err(format!("its name has {} characters; {MAX_NAME_LEN} are allowed", name.len()));
    }
    if name == b"." || name == b".." || name.starts_with(b".-") || name.starts_with(b"..-") {
        return Err("its name may not be `.` or `..` or begin with `.-` or `..-`".into());
    }
    match name.iter().find(|b| !(b.is_ascii_alphanumeric() || b"+-._?=".contains(b))) {
        Some(bad) => Err(format!("its name has the character {:?}", char::from(*bad))),
        None => Ok(()),
    }
}

/// Enough of hostile text for a message.
fn shorten(text: &[u8]) -> BString {
    text.as_bstr()[..text.len().min(300)].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_path_of_a_known_hash() {
        let inner: Sha256 =
            "894517c9163c896ec31a2adbd33c0681fd5f45b2c0ef08a64c92a03fb97f390f".parse().unwrap();
        let dir = StoreDir::default();
        let path = dir.make_path("source", inner, "source").unwrap();
        assert_eq!(dir.full(&path), "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-source");
    }

    #[test]
    fn parts() {
        let dir = StoreDir::default();
        let path = dir.parse(b"/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a.drv").unwrap();
        assert_eq!((path.hash_part(), path.name()), ("i00sflxqsj37lfmf95m8mn0grv615hpj", "a.drv"));
        assert_eq!(path.derivation_name(), Some("a"));
    }

    #[test]
    fn what_is_no_store_path() {
        let dir = StoreDir::default();
        let digits = "i00sflxqsj37lfmf95m8mn0grv615hpj";
        for bad in [
            format!("/nix/store/{digits}"),
            format!("/nix/store/{digits}-"),
            format!("/nix/store/{digits}Xname"),
            format!("/nix/store/{digits}\0name"),
            format!("/nix/store/{digits}-a/b"),
            format!("/nix/store/{digits}-a/"),
            format!("/nix/store/../{digits}-a"),
            format!("/nix/store/{digits}-.."),
            format!("/nix/store/{digits}-.-x"),
            format!("/nix/store/{digits}-{}", "a".repeat(MAX_NAME_LEN + 1)),
            format!("/nix/store/{}-a", digits.replace('i', "e")),
            format!("/etc/{digits}-a"),
            String::new(),
        ] {
            assert!(dir.parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(dir.parse(format!("/nix/store/{digits}-{}", "a".repeat(MAX_NAME_LEN)).as_bytes()).is_ok());
        for bad in ["", "/", "nix", "/nix/", "/nix//store", "/nix/../store"] {
            assert!(StoreDir::new(bad).is_err(), "{bad}");
        }
    }
}
