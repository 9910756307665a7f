//! Content addresses: how an object's own content leads to its path (Nix: content-address.cc, store-dir-config.cc).

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use crate::{Error, Hash, HashAlgo, Sha256, StoreDir, StorePath};

/// What is hashed of an object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Method {
    /// The bytes of a single regular file.
    Flat,
    /// The git object id.
    Git,
    /// The NAR serialisation.
    Nar,
    /// The bytes of a single file that may have references: `.drv` files.
    Text,
}

impl Method {
    /// What stands before the algorithm in a derivation's `hashAlgo` field and in `fixed:` content addresses.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Flat => "",
            Self::Git => "git:",
            Self::Nar => "r:",
            Self::Text => "text:",
        }
    }

    /// Splits `r:sha256` and its like into method and algorithm.
    pub fn parse_with_algo(text: &str) -> Result<(Self, HashAlgo), Error> {
        let methods = [Self::Git, Self::Nar, Self::Text];
        match methods.into_iter().find_map(|m| Some((m, text.strip_prefix(m.prefix())?))) {
            Some((method, algo)) => Ok((method, algo.parse()?)),
            None => Ok((Self::Flat, text.parse()?)),
        }
    }

    /// Whether a hash by this method may be of this algorithm: git knows two, and what is text has one (Nix:
    /// store-dir-config.cc, git.cc). The error says which.
    pub fn check_algo(self, algo: HashAlgo) -> Result<(), Error> {
        let (what, allowed): (_, &[HashAlgo]) = match self {
            Self::Flat | Self::Nar => return Ok(()),
            Self::Git => ("git hashes by sha1 or sha256", &[HashAlgo::Sha1, HashAlgo::Sha256]),
            Self::Text => ("text objects are addressed by sha256", &[HashAlgo::Sha256]),
        };
        if allowed.contains(&algo) {
            return Ok(());
        }
        Err(Error::ContentAddress {
            text: format!("{}{algo}", self.prefix()),
            why: format!("{what}, not by {algo}"),
        })
    }

    /// `flat`, `git`, `nar` or `text`, as JSON derivations have it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Flat => "flat",
            Self::Git => "git",
            Self::Nar => "nar",
            Self::Text => "text",
        }
    }
}

impl FromStr for Method {
    type Err = Error;

    /// Accepts Nix's older word `recursive` for `nar`.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "flat" => Ok(Self::Flat),
            "git" => Ok(Self::Git),
            "nar" | "recursive" => Ok(Self::Nar),
            "text" => Ok(Self::Text),
            _ => Err(Error::ContentAddress {
                text: text.chars().take(80).collect(),
                why: "unknown method (known: flat, nar, text, git)".into(),
            }),
        }
    }
}

/// Method and hash. Displays as Nix writes it, for instance `fixed:r:sha256:<nix32>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ContentAddress {
    pub method: Method,
    pub hash: Hash,
}

impl ContentAddress {
    /// The path of an object with this address, these references (itself left out) and, if `self_reference`, one to
    /// itself. Fails where the method does not allow the references.
    pub fn store_path(
        &self,
        dir: &StoreDir,
        name: &str,
        references: &BTreeSet<StorePath>,
        self_reference: bool,
    ) -> Result<StorePath, Error> {
        let fail = |why: &str| Err(Error::ContentAddress { text: self.to_string(), why: why.into() });
        self.method.check_algo(self.hash.algo)?;
        let with_references = |kind: &str| {
            references.iter().fold(kind.to_owned(), |text, path| format!("{text}:{}", dir.full(path)))
        };
        match (self.method, self.hash.algo) {
            (Method::Text, _) if self_reference => fail("a text object cannot refer to itself"),
            (Method::Text, _) => dir.make_path(&with_references("text"), self.sha256()?, name),
            (Method::Nar, HashAlgo::Sha256) => {
                let kind = with_references("source") + if self_reference { ":self" } else { "" };
                dir.make_path(&kind, self.sha256()?, name)
            }
            _ if self_reference || !references.is_empty() => fail(
                "only text and NAR objects addressed by SHA-256 may have references (or discard them by \
                      unsafeDiscardReferences)",
            ),
            _ => {
                let inner =
                    format!("fixed:out:{}{}:{}:", self.method.prefix(), self.hash.algo, self.hash.to_hex());
                dir.make_path("output:out", Sha256::of(inner.as_bytes()), name)
            }
        }
    }

    fn sha256(&self) -> Result<Sha256, Error> {
        self.hash.to_hex().parse()
    }
}

impl fmt::Display for ContentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.method {
            Method::Text => write!(f, "text:{}", self.hash),
            method => write!(f, "fixed:{}{}", method.prefix(), self.hash),
        }
    }
}

impl FromStr for ContentAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |why: String| Error::ContentAddress { text: text.chars().take(200).collect(), why };
        let (method, hash) = match text.split_once(':') {
            Some(("text", hash)) => (Method::Text, hash),
            Some(("fixed", rest)) => match (rest.strip_prefix("r:"), rest.strip_prefix("git:")) {
                (Some(hash), _) => (Method::Nar, hash),
                (_, Some(hash)) => (Method::Git, hash),
                _ => (Method::Flat, rest),
            },
            _ => return Err(fail("it begins with neither `text:` nor `fixed:`".into())),
        };
        let hash = Hash::parse(hash, None).map_err(|error| fail(error.to_string()))?;
        Ok(Self { method, hash })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_paths() {
        let dir = StoreDir::default();
        let hash = Hash::from(Sha256::of(b"hello\n"));
        let path = |method| {
            ContentAddress { method, hash: hash.clone() }
                .store_path(&dir, "hello.txt", &BTreeSet::new(), false)
                .unwrap()
                .to_string()
        };
        assert_eq!(path(Method::Text), "qa1w9gdfrba6jl2r57mb3c43863gqywp-hello.txt");
        assert_eq!(path(Method::Flat), "gy454w1cxaq731grqwylhzf4pp9r5izh-hello.txt");
    }

    #[test]
    fn which_hashes_go_with_which_methods() {
        let all = [HashAlgo::Md5, HashAlgo::Sha1, HashAlgo::Sha256, HashAlgo::Sha512];
        let good = |method: Method| {
            all.into_iter().filter(|algo| method.check_algo(*algo).is_ok()).collect::<Vec<_>>()
        };
        assert_eq!(good(Method::Flat), all);
        assert_eq!(good(Method::Nar), all);
        assert_eq!(good(Method::Text), [HashAlgo::Sha256]);
        assert_eq!(good(Method::Git), [HashAlgo::Sha1, HashAlgo::Sha256]);
        let why = Method::Git.check_algo(HashAlgo::Md5).unwrap_err().to_string();
        assert!(why.ends_with("git hashes by sha1 or sha256, not by md5"), "{why}");
    }

    #[test]
    fn spellings_round_trip() {
        let hash = Hash::from(Sha256::of(b""));
        for method in [Method::Flat, Method::Git, Method::Nar, Method::Text] {
            let address = ContentAddress { method, hash: hash.clone() };
            assert_eq!(address.to_string().parse::<ContentAddress>().unwrap(), address);
        }
        for bad in ["", "text", "fixed:r:", "recursive:sha256:aa", "fixed:sha256:aa"] {
            assert!(bad.parse::<ContentAddress>().is_err(), "{bad}");
        }
    }
}
