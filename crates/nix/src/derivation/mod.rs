//! Derivations: what is to be built, how, and from what.
//!
//! A [`BasicDerivation`] is resolved: it names store paths only. A [`Derivation`], what a `.drv` file holds, may name
//! outputs of other derivations as well. Formats: [`aterm`] (`.drv` files) and [`json`] (`nix derivation show`);
//! output paths are computed in [`modulo`]; [`resolve`] leads from the one to the other.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use bstr::BString;

use crate::{ContentAddress, Error, Hash, HashAlgo, Method, StoreDir, StorePath};

pub mod aterm;
pub mod json;
pub mod modulo;
pub mod placeholder;
pub mod proof;
pub mod realisation;
pub mod resolve;
#[cfg(test)]
mod tests;

/// The env entry in which structured attributes travel (Nix: parsed-derivations.cc).
pub const STRUCTURED_ATTRS: &str = "__json";

/// Name of an output such as `out`. Follows the rules for names of store objects, since it becomes part of one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OutputName(String);

/// What one output is, before it is built (Nix: derivations.hh, DerivationOutput).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DerivationOutput {
    /// The path follows from the content, once it is there.
    CaFloating { method: Method, algo: HashAlgo },
    /// The content is known by its hash; the path follows from it.
    CaFixed(ContentAddress),
    /// Input-addressed, but the path is not known yet.
    Deferred,
    /// Like floating, never reused.
    Impure { method: Method, algo: HashAlgo },
    /// The path follows from the derivation and all that it depends on.
    InputAddressed(StorePath),
}

/// A derivation whose inputs are all store paths: what `BuildDerivation` carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BasicDerivation {
    /// Name without hash and `.drv`. Not part of the serialised forms: it comes from the file's name.
    pub name: String,
    pub outputs: BTreeMap<OutputName, DerivationOutput>,
    pub input_srcs: BTreeSet<StorePath>,
    pub system: BString,
    pub builder: BString,
    pub args: Vec<BString>,
    pub env: BTreeMap<BString, BString>,
}

/// A derivation as its `.drv` file has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Derivation {
    /// `basic.input_srcs` holds the sources only.
    pub basic: BasicDerivation,
    /// Which outputs of which derivations are inputs.
    pub input_drvs: BTreeMap<StorePath, BTreeSet<OutputName>>,
}

/// The kinds of derivation, as far as they differ in how they are built.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DerivationType {
    CaFixed,
    CaFloating,
    /// Some path is not known yet: cannot be built before it is resolved.
    Deferred,
    Impure,
    InputAddressed,
}

impl DerivationType {
    /// Whether the build is cut off from the network and from the caller's environment.
    pub fn is_sandboxed(self) -> bool {
        !matches!(self, Self::CaFixed | Self::Impure)
    }
}

impl OutputName {
    pub fn new(name: &[u8]) -> Result<Self, Error> {
        let fail =
            |why| Error::OutputName { name: name.iter().copied().take(300).collect::<Vec<_>>().into(), why };
        let ok = !name.is_empty()
            && name.len() <= crate::store_path::MAX_NAME_LEN
            && name.iter().all(|b| b.is_ascii_alphanumeric() || b"+-._?=".contains(b));
        if !ok {
            return Err(fail("expected 1 to 211 characters of a-z A-Z 0-9 + - . _ ? ="));
        }
        if name == b"." || name == b".." || name == b"drv" {
            return Err(fail("this name is reserved"));
        }
        String::from_utf8(name.to_vec()).map(Self).map_err(|_| fail("it is not ASCII"))
    }

    pub fn out() -> Self {
        Self("out".to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Name of the store object that holds this output of the derivation `drv_name` (Nix: outputPathName).
    pub fn path_name(&self, drv_name: &str) -> String {
        match self.as_str() {
            "out" => drv_name.to_owned(),
            other => format!("{drv_name}-{other}"),
        }
    }
}

impl fmt::Display for OutputName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for OutputName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::new(text.as_bytes())
    }
}

impl Borrow<str> for OutputName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl DerivationOutput {
    /// Parses the triple that `.drv` files and the wire have (Nix: parseDerivationOutput). The path of a fixed output
    /// is recomputed from its hash and must agree where one is given.
    pub fn from_triple(
        dir: &StoreDir,
        drv_name: &str,
        output: &OutputName,
        path: &[u8],
        algo: &[u8],
        hash: &[u8],
    ) -> Result<Self, Error> {
        let fail = |why: String| Error::Derivation { why: format!("output {output}: {why}") };
        let text = |bytes: &[u8]| {
            std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| fail("hash fields must be text".into()))
        };
        if algo.is_empty() {
            return match (path, hash) {
                (_, [_, ..]) => Err(fail("it has a hash but no hash algorithm".into())),
                ([], _) => Ok(Self::Deferred),
                (path, _) => Ok(Self::InputAddressed(dir.parse(path)?)),
            };
        }
        let (method, algo) = Method::parse_with_algo(&text(algo)?)?;
        match (hash, path) {
            (b"impure", []) => Ok(Self::Impure { method, algo }),
            (b"impure", _) => Err(fail("an impure output has no path before it is built".into())),
            (b"", []) => Ok(Self::CaFloating { method, algo }),
            (b"", _) => Err(fail("it has a path and a hash algorithm but no hash".into())),
            (hash, path) => {
                let hash = Hash::parse(&text(hash)?, Some(algo))?;
                if hash.algo != algo {
                    return Err(fail(format!("its hash is {} but its algorithm says {algo}", hash.algo)));
                }
                let fixed = Self::CaFixed(ContentAddress { method, hash });
                let computed = fixed.path(dir, drv_name, output)?;
                match computed {
                    Some(computed) if !path.is_empty() && dir.parse(path)? != computed => Err(fail(format!(
                        "its path is {} but its hash gives {}",
                        BString::from(path),
                        dir.full(&computed)
                    ))),
                    _ => Ok(fixed),
                }
            }
        }
    }

    /// The reverse of [`Self::from_triple`]: path, algorithm, hash.
    pub fn to_triple(
        &self,
        dir: &StoreDir,
        drv_name: &str,
        output: &OutputName,
    ) -> Result<(String, String, String), Error> {
        let path = self.path(dir, drv_name, output)?.map(|path| dir.full(&path)).unwrap_or_default();
        let with_prefix = |method: Method, algo: HashAlgo| format!("{}{algo}", method.prefix());
        Ok(match self {
            Self::InputAddressed(_) | Self::Deferred => (path, String::new(), String::new()),
            Self::CaFixed(ca) => (path, with_prefix(ca.method, ca.hash.algo), ca.hash.to_hex()),
            Self::CaFloating { method, algo } => (path, with_prefix(*method, *algo), String::new()),
            Self::Impure { method, algo } => (path, with_prefix(*method, *algo), "impure".to_owned()),
        })
    }

    /// The path as far as it is known before the build.
    pub fn path(
        &self,
        dir: &StoreDir,
        drv_name: &str,
        output: &OutputName,
    ) -> Result<Option<StorePath>, Error> {
        match self {
            Self::InputAddressed(path) => Ok(Some(path.clone())),
            Self::CaFixed(ca) => {
                ca.store_path(dir, &output.path_name(drv_name), &BTreeSet::new(), false).map(Some)
            }
            Self::CaFloating { .. } | Self::Deferred | Self::Impure { .. } => Ok(None),
        }
    }
}

impl BasicDerivation {
    /// Checks that the outputs make sense together (Nix: derivations.cc, type).
    pub fn kind(&self) -> Result<DerivationType, Error> {
        let fail = |why: &str| Err(Error::Derivation { why: why.into() });
        let kind_of = |output: &DerivationOutput| match output {
            DerivationOutput::CaFixed(_) => DerivationType::CaFixed,
            DerivationOutput::CaFloating { .. } => DerivationType::CaFloating,
            DerivationOutput::Deferred => DerivationType::Deferred,
            DerivationOutput::Impure { .. } => DerivationType::Impure,
            DerivationOutput::InputAddressed(_) => DerivationType::InputAddressed,
        };
        let mut outputs = self.outputs.iter();
        let Some((name, first)) = outputs.next() else {
            return fail("it has no outputs");
        };
        let kind = kind_of(first);
        if self.outputs.values().any(|output| kind_of(output) != kind) {
            return fail("its outputs are of different kinds");
        }
        if kind == DerivationType::CaFixed && (self.outputs.len() > 1 || name.as_str() != "out") {
            return fail("a fixed-output derivation has one output, and its name is `out`");
        }
        let algo_of = |output: &DerivationOutput| match output {
            DerivationOutput::CaFloating { algo, .. } | DerivationOutput::Impure { algo, .. } => Some(*algo),
            _ => None,
        };
        if self.outputs.values().any(|output| algo_of(output) != algo_of(first)) {
            return fail("its content-addressed outputs use different hash algorithms");
        }
        Ok(kind)
    }

    /// Every output's path as far as it is known.
    pub fn output_paths(&self, dir: &StoreDir) -> Result<BTreeMap<OutputName, Option<StorePath>>, Error> {
        self.outputs
            .iter()
            .map(|(name, output)| Ok((name.clone(), output.path(dir, &self.name, name)?)))
            .collect()
    }

    pub fn env(&self, key: &str) -> Option<&BString> {
        self.env.get(key.as_bytes())
    }
}
