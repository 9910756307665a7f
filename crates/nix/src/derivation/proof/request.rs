//! A request against the derivation that it says it is of.

use std::collections::BTreeSet;
use std::convert::Infallible;

use super::{ProofError, Proven};
use crate::derivation::BasicDerivation;
use crate::{StoreDir, StorePath};

impl Proven {
    /// Checks that a request builds what the proven derivation `drv_path` says, and nothing else. It may list more
    /// inputs, if they are in `closure`: what the derivation's own inputs refer to.
    pub fn entitles(
        &self,
        dir: &StoreDir,
        drv_path: &StorePath,
        request: &BasicDerivation,
        closure: &BTreeSet<StorePath>,
    ) -> Result<(), ProofError<Infallible>> {
        let proven = self.resolve(dir, drv_path)?;
        let differs = |field: &str, claimed: String, proven: String| {
            Err(ProofError::Differs { field: field.into(), drv: drv_path.clone(), claimed, proven })
        };
        for (field, claimed, proven) in [
            ("name", request.name.as_str().into(), proven.name.as_str().into()),
            ("system", request.system.clone(), proven.system.clone()),
            ("builder", request.builder.clone(), proven.builder.clone()),
        ] {
            if claimed != proven {
                return differs(field, format!("{claimed:?}"), format!("{proven:?}"));
            }
        }
        if request.args != proven.args {
            return differs("args", format!("{:?}", request.args), format!("{:?}", proven.args));
        }
        let keys: BTreeSet<_> = request.env.keys().chain(proven.env.keys()).collect();
        for key in keys {
            let (claimed, proven) = (request.env.get(key), proven.env.get(key));
            if claimed != proven {
                return differs(&format!("env.{key}"), format!("{claimed:?}"), format!("{proven:?}"));
            }
        }
        if request.outputs != proven.outputs {
            let paths = |drv: &BasicDerivation| {
                drv.output_paths(dir)
                    .map(|paths| format!("{paths:?}"))
                    .unwrap_or_else(|error| error.to_string())
            };
            return differs("outputs", paths(request), paths(&proven));
        }
        if let Some(absent) = proven.input_srcs.difference(&request.input_srcs).next() {
            return differs("inputSrcs", format!("no {absent}"), "it".into());
        }
        let extra = request.input_srcs.difference(&proven.input_srcs).find(|path| !closure.contains(*path));
        match extra {
            Some(extra) => {
                differs("inputSrcs", extra.to_string(), "no such input, nor one that refers to it".into())
            }
            None => Ok(()),
        }
    }
}
