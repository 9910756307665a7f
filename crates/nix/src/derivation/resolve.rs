//! Resolution: outputs of input derivations become store paths, and placeholders for them the same paths (Nix:
//! derivation/resolution.cc, derivation-resolution-goal.cc).
//!
//! A derivation whose inputs' paths follow from their content can be built only in its resolved form, and is then
//! another derivation with a `.drv` of its own: two unresolved ones that come to the same are built once.

use std::collections::{BTreeMap, BTreeSet};

use bstr::BString;

use super::placeholder::{self, Rewrites};
use super::{DerivationType, OutputName, modulo};
use crate::{BasicDerivation, Derivation, Error, StoreDir, StorePath};

/// Outputs of derivations, by the path of the `.drv`.
pub type DrvOutputs = BTreeMap<StorePath, BTreeSet<OutputName>>;

impl Derivation {
    /// The derivation with its inputs as store paths. `output_path` says where an output of an input is; None means
    /// that it is not known.
    ///
    /// Placeholders of inputs in builder, args and env (names and values, so `__json` too) become paths; output paths
    /// that could not be known without these (`Deferred`) are computed, and set in outputs and env. Derivations whose
    /// own paths are known keep their text. Fails with [`Error::Unresolved`], which names all outputs whose path is
    /// not known: they have to be built first.
    pub fn resolve(
        &self,
        dir: &StoreDir,
        mut output_path: impl FnMut(&StorePath, &OutputName) -> Option<StorePath>,
    ) -> Result<BasicDerivation, Error> {
        let mut basic = self.basic.clone();
        let mut missing = DrvOutputs::new();
        let mut rewrites = Rewrites::default();
        for (drv, outputs) in &self.input_drvs {
            for output in outputs {
                let Some(path) = output_path(drv, output) else {
                    missing.entry(drv.clone()).or_default().insert(output.clone());
                    continue;
                };
                if let Some(placeholder) = placeholder::of_input(drv, output) {
                    rewrites.add(&placeholder, dir.full(&path));
                }
                basic.input_srcs.insert(path);
            }
        }
        if !missing.is_empty() {
            return Err(Error::Unresolved { missing });
        }
        // The text of an input-addressed derivation with known paths is what these are made of.
        if basic.kind()? != DerivationType::InputAddressed {
            rewrite(&mut basic, &rewrites);
            modulo::fill_output_paths(dir, &mut basic)?;
        }
        Ok(basic)
    }

    /// Whether Nix builds the resolved form under that form's own `.drv` path ([`modulo::basic_drv_path`]), which is
    /// then its outputs' deriver and the name of its log. Fixed outputs keep their derivation's, since the
    /// feature `ca-derivations` of Nix alone would change it.
    pub fn resolves_to_another(&self) -> Result<bool, Error> {
        let kind = self.basic.kind()?;
        let unknown =
            matches!(kind, DerivationType::CaFloating | DerivationType::Deferred | DerivationType::Impure);
        Ok(unknown && !self.input_drvs.is_empty())
    }
}

impl DerivationType {
    /// Whether outputs of impure derivations may be its inputs. What is built from them cannot be built again, so
    /// that nothing may depend on it that claims otherwise.
    pub fn may_use_impure(self) -> bool {
        matches!(self, Self::Impure | Self::CaFixed)
    }
}

fn rewrite(drv: &mut BasicDerivation, rewrites: &Rewrites) {
    drv.builder = rewrites.apply(&drv.builder);
    for arg in &mut drv.args {
        *arg = rewrites.apply(arg);
    }
    let env = std::mem::take(&mut drv.env);
    let rewritten = |(key, value): (BString, BString)| (rewrites.apply(&key), rewrites.apply(&value));
    drv.env = env.into_iter().map(rewritten).collect();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derivation::aterm;

    /// The derivations of testdata/content-addressed by name: as instantiated, and as Nix resolved them.
    const FILES: [(&str, &[u8]); 13] = [
        (
            "7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv",
            include_bytes!("../../testdata/content-addressed/7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv"),
        ),
        (
            "pasxmlj21192xg67r22ip97bxly96ycx-plain.txt.drv",
            include_bytes!("../../testdata/content-addressed/pasxmlj21192xg67r22ip97bxly96ycx-plain.txt.drv"),
        ),
        (
            "haq05svyxdis3mpszspwqhgxc5qkbaip-impure.drv",
            include_bytes!("../../testdata/content-addressed/haq05svyxdis3mpszspwqhgxc5qkbaip-impure.drv"),
        ),
        (
            "kvl5syg3n9r7rmmrdzkpd0ca7mf4pwyl-above.drv",
            include_bytes!("../../testdata/content-addressed/kvl5syg3n9r7rmmrdzkpd0ca7mf4pwyl-above.drv"),
        ),
        (
            "s1q3bbn19294h2i95vjm0cb3xki3pqhn-above.drv",
            include_bytes!("../../testdata/content-addressed/s1q3bbn19294h2i95vjm0cb3xki3pqhn-above.drv"),
        ),
        (
            "ssqnvrc6cpwwl3csijv225ns3zqipp42-fixed.drv",
            include_bytes!("../../testdata/content-addressed/ssqnvrc6cpwwl3csijv225ns3zqipp42-fixed.drv"),
        ),
        (
            "cybrn1ayr98vwbxwwxaiipihxpxqa8zn-fixed.drv",
            include_bytes!("../../testdata/content-addressed/cybrn1ayr98vwbxwwxaiipihxpxqa8zn-fixed.drv"),
        ),
        (
            "gm4wzcsawaihldpc37262n1n3ism6xgj-deferred.drv",
            include_bytes!("../../testdata/content-addressed/gm4wzcsawaihldpc37262n1n3ism6xgj-deferred.drv"),
        ),
        (
            "pcqf7d5gh0ww62wshwlgr6lb1kvaga7g-deferred.drv",
            include_bytes!("../../testdata/content-addressed/pcqf7d5gh0ww62wshwlgr6lb1kvaga7g-deferred.drv"),
        ),
        (
            "fbzgrahdfsfa08v5g1jkhgmc3ryfnfvb-structured2.drv",
            include_bytes!(
                "../../testdata/content-addressed/fbzgrahdfsfa08v5g1jkhgmc3ryfnfvb-structured2.drv"
            ),
        ),
        (
            "gixclqa1gchmxbk03byzch61l5nhvd06-structured2.drv",
            include_bytes!(
                "../../testdata/content-addressed/gixclqa1gchmxbk03byzch61l5nhvd06-structured2.drv"
            ),
        ),
        (
            "59fl5p919wzh26ycvw5py2hkc981yyba-of-impure.drv",
            include_bytes!("../../testdata/content-addressed/59fl5p919wzh26ycvw5py2hkc981yyba-of-impure.drv"),
        ),
        (
            "xh039m2jr6vyyhzqz69f2knrkal8p128-of-impure.drv",
            include_bytes!("../../testdata/content-addressed/xh039m2jr6vyyhzqz69f2knrkal8p128-of-impure.drv"),
        ),
    ];

    /// What came out when Nix 2.34 built them.
    const BUILT: [(&str, &str, &str); 7] = [
        ("7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv", "dev", "5qd6cp1z5976fljxy94a8zvijghj65v2-base-dev"),
        ("7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv", "out", "rphn4lwi1ilhyw9nrc0j9jb1rabzwq5w-base"),
        (
            "pasxmlj21192xg67r22ip97bxly96ycx-plain.txt.drv",
            "out",
            "axwixvp9c4mz2mv1g4cixzi2356hq387-plain.txt",
        ),
        ("kvl5syg3n9r7rmmrdzkpd0ca7mf4pwyl-above.drv", "out", "d6h2xy1112cmkmvvs0kbbb6vyvdh9lag-above"),
        ("ssqnvrc6cpwwl3csijv225ns3zqipp42-fixed.drv", "out", "w0fkqvh6w58g3lwp5v8mwyhh92vf18j5-fixed"),
        (
            "gm4wzcsawaihldpc37262n1n3ism6xgj-deferred.drv",
            "lib",
            "rxaa1frckw7ihmqqvhyly48xvq61v3n8-deferred-lib",
        ),
        ("haq05svyxdis3mpszspwqhgxc5qkbaip-impure.drv", "out", "nx2qkididh0sfiffjyyn7qxnb9wnsi1g-impure"),
    ];

    /// Each derivation, with its path and text, and the same of what Nix resolved it to.
    fn pairs() -> Vec<[(StorePath, Derivation, &'static [u8]); 2]> {
        let dir = StoreDir::default();
        let parse = |(path, text): (&str, &'static [u8])| {
            let path: StorePath = path.parse().unwrap();
            (path.clone(), aterm::parse(&dir, path.derivation_name().unwrap(), text).unwrap(), text)
        };
        FILES[3..].chunks(2).map(|pair| [parse(pair[0]), parse(pair[1])]).collect()
    }

    fn built(drv: &StorePath, output: &OutputName) -> Option<StorePath> {
        let found = BUILT.iter().find(|(of, name, _)| *of == drv.as_str() && *name == output.as_str())?;
        Some(found.2.parse().unwrap())
    }

    #[test]
    fn nix_resolves_them_to_the_same() {
        let dir = StoreDir::default();
        for [(path, drv, text), (resolved_path, _, resolved_text)] in pairs() {
            assert_eq!(aterm::print(&dir, &drv).unwrap(), text, "{path}");
            assert_eq!(modulo::drv_path(&dir, &drv).unwrap(), path);
            let basic = drv.resolve(&dir, built).unwrap();
            let whole = Derivation { basic: basic.clone(), input_drvs: BTreeMap::new() };
            let printed = aterm::print(&dir, &whole).unwrap();
            assert_eq!(BString::from(printed), BString::from(resolved_text), "{path}");
            assert_eq!(modulo::basic_drv_path(&dir, &basic).unwrap(), resolved_path);
            let fixed = basic.kind().unwrap() == DerivationType::CaFixed;
            assert_eq!(drv.resolves_to_another().unwrap(), !fixed, "{path}");
            assert!(!whole.resolves_to_another().unwrap(), "{path}");
            // Once it is resolved, it proves its own paths.
            crate::derivation::proof::prove_alone(&dir, &basic).unwrap();
        }
        assert_eq!(pairs().len(), 5);
    }

    #[test]
    fn what_is_missing_is_named() {
        let [(_, above, _), _] = pairs().swap_remove(0);
        let text: StorePath = FILES[1].0.parse().unwrap();
        let error = above
            .resolve(&StoreDir::default(), |drv, output| {
                built(drv, output).filter(|_| output.as_str() == "out" && *drv != text)
            })
            .unwrap_err();
        let base: StorePath = FILES[0].0.parse().unwrap();
        match &error {
            Error::Unresolved { missing } => {
                let names = |name: &str| BTreeSet::from([name.parse().unwrap()]);
                assert_eq!(*missing, [(base, names("dev")), (text, names("out"))].into());
            }
            other => panic!("{other}"),
        }
        assert!(error.to_string().contains("base.drv (dev)"), "{error}");
    }

    #[test]
    fn known_paths_keep_their_text() {
        let dir = StoreDir::default();
        let [(_, mut drv, _), _] = pairs().swap_remove(0);
        let path = "i00sflxqsj37lfmf95m8mn0grv615hpj-above".parse().unwrap();
        drv.basic.outputs = [(OutputName::out(), crate::DerivationOutput::InputAddressed(path))].into();
        let basic = drv.resolve(&dir, built).unwrap();
        assert_eq!((basic.args, basic.env), (drv.basic.args, drv.basic.env));
        assert_eq!(basic.input_srcs.len(), 3);
    }
}
