//! What a derivation demands of its outputs: sizes and references (Nix: derivation-check.cc). Pure but for what it asks
//! about paths outside the derivation.

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::{OutputName, PathInfo, StoreDir, StorePath};
use serde_json::Value;

use super::attrs::{Attributes, string_array};
use super::targets::Paths;
use crate::error::Error;

/// The demands on one output. Names are store paths or names of outputs.
#[derive(Default, Debug)]
struct Rules {
    max_size: Option<u64>,
    max_closure_size: Option<u64>,
    allowed_references: Option<Vec<String>>,
    allowed_requisites: Option<Vec<String>>,
    disallowed_references: Vec<String>,
    disallowed_requisites: Vec<String>,
    /// An output's reference to itself does not count among its requisites.
    ignore_self: bool,
}

/// What is known about outputs and their surroundings.
pub(crate) struct Outputs<'a> {
    pub dir: &'a StoreDir,
    pub infos: &'a BTreeMap<OutputName, PathInfo>,
    /// Of all outputs, those included that were there before the build and are not checked again.
    pub paths: &'a Paths,
    /// References and NAR size of a path that is none of the outputs.
    pub known: &'a dyn Fn(&StorePath) -> Result<PathInfo, Error>,
}

/// Fails where the demands on an output cannot be understood: better before the build than after it.
pub(crate) fn understand(attributes: &Attributes<'_>, output: &OutputName) -> Result<(), Error> {
    Rules::of(attributes, output).map(drop)
}

impl Outputs<'_> {
    /// Fails with the first demand that an output does not meet.
    pub(crate) fn check(&self, attributes: &Attributes<'_>) -> Result<(), Error> {
        for (name, info) in self.infos {
            self.check_one(info, &Rules::of(attributes, name)?)?;
        }
        Ok(())
    }

    fn check_one(&self, info: &PathInfo, rules: &Rules) -> Result<(), Error> {
        let path = self.dir.full(&info.path);
        if let Some(max) = rules.max_size.filter(|max| info.nar_size > *max) {
            return Err(Error::output(format!(
                "output '{path}' is too large: its NAR has {} bytes, maxSize allows {max}",
                info.nar_size
            )));
        }
        let needs_closure = rules.max_closure_size.is_some()
            || rules.allowed_requisites.is_some()
            || !rules.disallowed_requisites.is_empty();
        let closure = if needs_closure { self.closure(info)? } else { BTreeMap::new() };
        if let Some(max) = rules.max_closure_size {
            let size: u64 = closure.values().sum();
            if size > max {
                return Err(Error::output(format!(
                    "the closure of output '{path}' is too large: {size} bytes, maxClosureSize allows {max}"
                )));
            }
        }
        let mut requisites: BTreeSet<StorePath> = closure.into_keys().collect();
        if rules.ignore_self {
            requisites.remove(&info.path);
        }
        if let Some(allowed) = &rules.allowed_references {
            self.refuse(&path, "refer to", &info.references, allowed, true)?;
        }
        if let Some(allowed) = &rules.allowed_requisites {
            self.refuse(&path, "depend on", &requisites, allowed, true)?;
        }
        self.refuse(&path, "refer to", &info.references, &rules.disallowed_references, false)?;
        self.refuse(&path, "depend on", &requisites, &rules.disallowed_requisites, false)
    }

    /// Fails if `used` has members outside `list` (`allow`) or inside it.
    fn refuse(
        &self,
        path: &str,
        verb: &str,
        used: &BTreeSet<StorePath>,
        list: &[String],
        allow: bool,
    ) -> Result<(), Error> {
        let listed = list.iter().map(|text| self.resolve(text)).collect::<Result<BTreeSet<_>, _>>()?;
        let bad: Vec<String> = used
            .iter()
            .filter(|path| listed.contains(*path) != allow)
            .map(|path| self.dir.full(path))
            .collect();
        if bad.is_empty() {
            return Ok(());
        }
        Err(Error::output(format!(
            "output '{path}' is not allowed to {verb} the following paths:\n  {}",
            bad.join("\n  ")
        )))
    }

    /// A store path, what is below one, or the name of an output.
    fn resolve(&self, text: &str) -> Result<StorePath, Error> {
        if let Some(path) = self.paths.get(text) {
            return Ok(path.clone());
        }
        let prefix = format!("{}/", self.dir);
        let base = text.strip_prefix(&prefix).and_then(|rest| rest.split('/').next());
        base.and_then(|base| base.parse().ok()).ok_or_else(|| {
            Error::output(format!(
                "an output check names {text:?}, which is neither a store path nor one of the outputs"
            ))
        })
    }

    /// Everything that `info` refers to, itself included, with NAR sizes.
    fn closure(&self, info: &PathInfo) -> Result<BTreeMap<StorePath, u64>, Error> {
        let mut sizes = BTreeMap::new();
        let mut queue = vec![info.path.clone()];
        while let Some(path) = queue.pop() {
            if sizes.contains_key(&path) {
                continue;
            }
            let sibling = self.infos.values().find(|info| info.path == path).cloned();
            let info = match sibling {
                Some(info) => info,
                None => (self.known)(&path)?,
            };
            queue.extend(info.references.iter().cloned());
            sizes.insert(path, info.nar_size);
        }
        Ok(sizes)
    }
}

impl Rules {
    /// Plain attributes hold for every output; structured ones say which in `outputChecks`.
    fn of(attributes: &Attributes<'_>, output: &OutputName) -> Result<Self, Error> {
        let Some(structured) = attributes.structured() else {
            return Ok(Self {
                allowed_references: attributes.strings("allowedReferences")?,
                allowed_requisites: attributes.strings("allowedRequisites")?,
                disallowed_references: attributes.strings("disallowedReferences")?.unwrap_or_default(),
                disallowed_requisites: attributes.strings("disallowedRequisites")?.unwrap_or_default(),
                ignore_self: true,
                ..Self::default()
            });
        };
        let Some(checks) = structured.get("outputChecks").and_then(|checks| checks.get(output.as_str()))
        else {
            return Ok(Self::default());
        };
        let number = |name: &str| match checks.get(name) {
            None => Ok(None),
            Some(value) => value
                .as_u64()
                .map(Some)
                .ok_or_else(|| Error::input(format!("outputChecks.{output}.{name} is not a whole number"))),
        };
        let strings =
            |name: &str| checks.get(name).map(|value: &Value| string_array(name, value)).transpose();
        Ok(Self {
            max_size: number("maxSize")?,
            max_closure_size: number("maxClosureSize")?,
            allowed_references: strings("allowedReferences")?,
            allowed_requisites: strings("allowedRequisites")?,
            disallowed_references: strings("disallowedReferences")?.unwrap_or_default(),
            disallowed_requisites: strings("disallowedRequisites")?.unwrap_or_default(),
            ignore_self: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use drover_nix::Sha256;

    use super::*;
    use crate::build::testing::derivation;

    const OUT: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-out";
    const DEV: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-dev";
    const LIB: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-lib";
    const DEEP: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-deep";

    fn info(path: &str, references: &[&str]) -> PathInfo {
        PathInfo {
            path: path.parse().unwrap(),
            nar_hash: Sha256::of(b""),
            nar_size: 100,
            references: references.iter().map(|path| path.parse().unwrap()).collect(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        }
    }

    /// out refers to itself, dev and lib; lib refers to deep.
    fn check(env: &[(&str, &str)]) -> Result<(), Error> {
        let drv = derivation(env);
        let infos: BTreeMap<OutputName, PathInfo> =
            [(OutputName::out(), info(OUT, &[OUT, DEV, LIB])), ("dev".parse().unwrap(), info(DEV, &[]))]
                .into();
        // Valid before the build.
        let mut paths: Paths = [("bin".parse().unwrap(), DEEP.parse().unwrap())].into();
        paths.extend(infos.iter().map(|(name, info)| (name.clone(), info.path.clone())));
        let outputs = Outputs {
            dir: &StoreDir::default(),
            infos: &infos,
            paths: &paths,
            known: &|path| Ok(info(path.as_str(), if path.as_str() == LIB { &[DEEP] } else { &[] })),
        };
        outputs.check(&Attributes::parse(&drv).unwrap())
    }

    #[test]
    fn plain_lists() {
        let (lib, deep) = (format!("/nix/store/{LIB}"), format!("/nix/store/{DEEP}/sub"));
        assert!(check(&[]).is_ok());
        assert!(check(&[("allowedReferences", &format!("out dev {lib}"))]).is_ok());
        assert!(check(&[("allowedReferences", &format!("dev {lib}"))]).is_err(), "itself is a reference");
        assert!(check(&[("allowedReferences", "")]).is_err());
        assert!(check(&[("disallowedReferences", &deep)]).is_ok());
        assert!(check(&[("disallowedRequisites", &deep)]).is_err());
        assert!(check(&[("disallowedRequisites", "out")]).is_ok(), "itself is no requisite");
        assert!(check(&[("allowedRequisites", &format!("dev {lib}"))]).is_err());
        assert!(check(&[("allowedRequisites", &format!("dev {lib} {deep}"))]).is_ok());
        assert!(check(&[("disallowedReferences", "doc")]).is_err(), "no such output");
        assert!(check(&[("disallowedReferences", "bin")]).is_ok());
        assert!(check(&[("disallowedRequisites", "bin")]).is_err(), "the one that was there before");
    }

    #[test]
    fn structured_checks() {
        let with = |checks: &str| check(&[("__json", &format!(r#"{{"outputChecks":{{"out":{checks}}}}}"#))]);
        assert!(with("{}").is_ok());
        assert!(with(r#"{"maxSize": 100, "maxClosureSize": 400}"#).is_ok());
        assert!(with(r#"{"maxSize": 99}"#).is_err());
        assert!(with(r#"{"maxClosureSize": 399}"#).is_err());
        assert!(with(r#"{"disallowedReferences": ["dev"]}"#).is_err());
        assert!(with(r#"{"disallowedRequisites": ["out"]}"#).is_err(), "here itself does count");
        assert!(with(r#"{"maxSize": "big"}"#).is_err());
        assert!(check(&[("__json", r#"{"allowedReferences":[]}"#)]).is_ok(), "no effect at the top");
    }
}
