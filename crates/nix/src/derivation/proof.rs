//! Which output paths a derivation is entitled to, proven from the request alone or from the closure of its `.drv`.
//!
//! An input-addressed path is a function of the derivation and of every derivation below it, so whoever believes a
//! bare claim lets anyone fill anyone's path (Nix: daemon.cc, BuildDerivation). Here a claim is recomputed. Pure: the
//! caller brings the text of `.drv` files; each one is proven by its own name.

use std::collections::{BTreeMap, BTreeSet};

use super::modulo::{self, InputHash};
use super::{BasicDerivation, Derivation, DerivationType, OutputName, aterm};
use crate::{Error, StoreDir, StorePath};

/// Most `.drv` files that one proof may take in.
pub const MAX_DERIVATIONS: usize = 100_000;

/// Gives the text of a `.drv` file, or None if it is not to be had.
pub type ReadFile<'a, E> = dyn FnMut(&StorePath) -> Result<Option<Vec<u8>>, E> + 'a;

/// Derivations whose files and output paths were proven. What is in it stays true, so it may be kept and shared
/// between proofs.
#[derive(Default)]
pub struct Proven(BTreeMap<StorePath, Entry>);

struct Entry {
    drv: Derivation,
    hash: InputHash,
    /// None where the path is not known before the build.
    outputs: BTreeMap<OutputName, Option<StorePath>>,
}

/// Why a claim does not stand.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError<E> {
    /// The request differs from the derivation that its `drvPath` names.
    #[error("{field} is not what {drv} says: the request has {claimed}, the derivation {proven}")]
    Differs { field: String, drv: StorePath, claimed: String, proven: String },
    /// A derivation, or the file that should hold one, is not what it should be.
    #[error("derivation {drv}: {source}")]
    Invalid { drv: String, source: Error },
    /// A `.drv` file is not to be had.
    #[error("{0} is needed for the proof, and no cache has it")]
    Missing(StorePath),
    /// A file's content does not lead to its name.
    #[error("the file {path} is not what its name says: its content belongs at {computed}")]
    Name { path: StorePath, computed: StorePath },
    /// A file's text is another than that of the derivation that it was understood as.
    #[error("the file {0} is not written as Nix writes derivations, so that its name proves nothing")]
    Spelling(StorePath),
    /// An output path is not the one that the derivation leads to.
    #[error("output {output} of {drv} claims {claimed}, but its path is {computed}")]
    Path { drv: String, output: OutputName, claimed: String, computed: String },
    /// The variable that tells a builder where an output goes says something else.
    #[error("env.{output} of {drv} is {value}, but the output's path is {computed}")]
    Variable { drv: String, output: OutputName, value: String, computed: String },
    /// The path depends on content that is not known yet.
    #[error("output {output} of {drv} cannot be proven: its path depends on outputs that are not built yet")]
    Deferred { drv: String, output: OutputName },
    /// The caller could not read a file.
    #[error("cannot read {drv}")]
    Read { drv: StorePath, source: E },
    /// The closure is larger than [`MAX_DERIVATIONS`].
    #[error("more than {MAX_DERIVATIONS} derivations are below {0}")]
    TooMany(StorePath),
}

/// Proves the paths of `drv` from nothing but itself: for derivations that no other derivation is an input of.
pub fn prove_alone(
    dir: &StoreDir,
    drv: &BasicDerivation,
) -> Result<(), ProofError<std::convert::Infallible>> {
    let invalid = |source| ProofError::Invalid { drv: drv.name.clone(), source };
    match drv.kind().map_err(invalid)? {
        // Paths of these follow from content, which is checked when it is there.
        DerivationType::CaFixed | DerivationType::CaFloating | DerivationType::Impure => return Ok(()),
        DerivationType::Deferred => {
            let output = drv.outputs.keys().next().cloned().unwrap_or_else(OutputName::out);
            return Err(ProofError::Deferred { drv: drv.name.clone(), output });
        }
        DerivationType::InputAddressed => {}
    }
    let computed = modulo::basic_output_paths(dir, drv).map_err(invalid)?;
    let claimed = drv.output_paths(dir).map_err(invalid)?;
    compare(dir, &drv.name, drv, &claimed, &computed)
}

impl Proven {
    /// How many derivations are in it.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes in the derivation `root` and all below it. `read` gives the text of a `.drv` file, or None if it is not
    /// to be had. On an error, what was proven before it is kept.
    pub fn prove<E>(
        &mut self,
        dir: &StoreDir,
        root: &StorePath,
        read: &mut ReadFile<'_, E>,
    ) -> Result<(), ProofError<E>> {
        // Depth first without recursion: a chain may be thousands of derivations long. A derivation stays on the
        // stack until its inputs are proven.
        let mut parsed: BTreeMap<StorePath, Derivation> = BTreeMap::new();
        let mut stack = vec![root.clone()];
        while let Some(path) = stack.last().cloned() {
            if self.0.contains_key(&path) {
                stack.pop();
                continue;
            }
            let Some(drv) = parsed.get(&path) else {
                if parsed.len() >= MAX_DERIVATIONS {
                    return Err(ProofError::TooMany(root.clone()));
                }
                let drv = self.read_one(dir, &path, read)?;
                // A cycle cannot be: each name is a hash over the names below it.
                stack.extend(drv.input_drvs.keys().filter(|input| !self.0.contains_key(*input)).cloned());
                parsed.insert(path, drv);
                continue;
            };
            let entry = self.prove_one(dir, &path, drv)?;
            parsed.remove(&path);
            self.0.insert(path, entry);
            stack.pop();
        }
        Ok(())
    }

    /// The resolved form of a derivation that was proven: its sources and the needed outputs of its inputs.
    pub fn resolve(
        &self,
        dir: &StoreDir,
        drv_path: &StorePath,
    ) -> Result<BasicDerivation, ProofError<std::convert::Infallible>> {
        let entry = self.0.get(drv_path).ok_or_else(|| ProofError::Missing(drv_path.clone()))?;
        entry
            .drv
            .resolve(dir, |input, output| self.0.get(input)?.outputs.get(output)?.clone())
            .map_err(|source| ProofError::Invalid { drv: drv_path.to_string(), source })
    }

    /// Checks that a request builds what the proven derivation `drv_path` says, and nothing else. It may list more
    /// inputs, if they are in `closure`: what the derivation's own inputs refer to.
    pub fn entitles(
        &self,
        dir: &StoreDir,
        drv_path: &StorePath,
        request: &BasicDerivation,
        closure: &BTreeSet<StorePath>,
    ) -> Result<(), ProofError<std::convert::Infallible>> {
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

    fn read_one<E>(
        &self,
        dir: &StoreDir,
        path: &StorePath,
        read: &mut ReadFile<'_, E>,
    ) -> Result<Derivation, ProofError<E>> {
        let invalid = |source| ProofError::Invalid { drv: path.to_string(), source };
        let text = match read(path) {
            Ok(text) => text.ok_or_else(|| ProofError::Missing(path.clone()))?,
            Err(source) => return Err(ProofError::Read { drv: path.clone(), source }),
        };
        let name = path.derivation_name().ok_or_else(|| {
            invalid(Error::StorePath { path: path.as_str().into(), why: "it does not end with .drv".into() })
        })?;
        let drv = aterm::parse(dir, name, &text).map_err(invalid)?;
        let computed = modulo::text_path(dir, &drv, &text).map_err(invalid)?;
        if computed != *path {
            return Err(ProofError::Name { path: path.clone(), computed });
        }
        // What the name stands for is this text, and what is believed is what was understood: they must be one.
        if aterm::print(dir, &drv).map_err(invalid)? != text {
            return Err(ProofError::Spelling(path.clone()));
        }
        Ok(drv)
    }

    /// Every input of `drv` has been proven.
    fn prove_one<E>(
        &self,
        dir: &StoreDir,
        path: &StorePath,
        drv: &Derivation,
    ) -> Result<Entry, ProofError<E>> {
        let invalid = |source| ProofError::Invalid { drv: path.to_string(), source };
        let mut input = |input: &StorePath| match self.0.get(input) {
            Some(entry) => Ok(entry.hash.clone()),
            None => Err(Error::Derivation { why: format!("its input {input} has not been proven") }),
        };
        let outputs = drv.basic.output_paths(dir).map_err(invalid)?;
        if drv.basic.kind().map_err(invalid)? == DerivationType::InputAddressed {
            let Some(computed) = modulo::output_paths(dir, drv, &mut input).map_err(invalid)? else {
                let output = outputs.into_keys().next().unwrap_or_else(OutputName::out);
                return Err(ProofError::Deferred { drv: path.to_string(), output });
            };
            compare(dir, path.as_str(), &drv.basic, &outputs, &computed)?;
        }
        let hash = modulo::input_hash(dir, drv, &mut input).map_err(invalid)?;
        Ok(Entry { drv: drv.clone(), hash, outputs })
    }
}

/// Output paths, and the variables by which a builder finds them: their values are no part of what paths are made of, so
/// that a builder could be led to put one output in another's place (Nix: derivations.cc, checkInvariants).
fn compare<E>(
    dir: &StoreDir,
    drv: &str,
    basic: &BasicDerivation,
    claimed: &BTreeMap<OutputName, Option<StorePath>>,
    computed: &BTreeMap<OutputName, StorePath>,
) -> Result<(), ProofError<E>> {
    for (output, computed) in computed {
        let claimed = claimed.get(output).and_then(Option::as_ref);
        if claimed != Some(computed) {
            return Err(ProofError::Path {
                drv: drv.to_owned(),
                output: output.clone(),
                claimed: claimed.map_or_else(|| "no path".to_owned(), |path| dir.full(path)),
                computed: dir.full(computed),
            });
        }
        let variable = basic.env(output.as_str());
        if variable.is_none_or(|value| *value != dir.full(computed).as_bytes()) {
            return Err(ProofError::Variable {
                drv: drv.to_owned(),
                output: output.clone(),
                value: variable.map_or_else(|| "missing".to_owned(), |value| format!("{value:?}")),
                computed: dir.full(computed),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bstr::ByteSlice as _;

    use super::*;
    use crate::DerivationOutput;

    type Files = BTreeMap<StorePath, Vec<u8>>;

    fn basic(name: &str) -> BasicDerivation {
        BasicDerivation {
            name: name.into(),
            outputs: BTreeMap::from([(OutputName::out(), DerivationOutput::Deferred)]),
            input_srcs: BTreeSet::new(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: vec!["-c".into()],
            env: BTreeMap::from([("out".into(), "".into()), ("name".into(), name.into())]),
        }
    }

    /// Adds a derivation with its right paths to the files, and says where it is.
    fn add(files: &mut Files, proven: &mut Proven, name: &str, inputs: &[&StorePath]) -> StorePath {
        let dir = StoreDir::default();
        let out = || BTreeSet::from([OutputName::out()]);
        let mut drv = Derivation {
            basic: basic(name),
            input_drvs: inputs.iter().map(|path| ((*path).clone(), out())).collect(),
        };
        let mut input = |path: &StorePath| Ok(proven.0[path].hash.clone());
        let path = modulo::output_paths(&dir, &drv, &mut input).unwrap().unwrap()["out"].clone();
        drv.basic.env.insert("out".into(), dir.full(&path).into());
        drv.basic.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(path));
        let drv_path = modulo::drv_path(&dir, &drv).unwrap();
        files.insert(drv_path.clone(), aterm::print(&dir, &drv).unwrap());
        prove(proven, files, &drv_path).unwrap();
        drv_path
    }

    fn prove(proven: &mut Proven, files: &Files, root: &StorePath) -> Result<(), ProofError<Infallible>> {
        proven.prove(&StoreDir::default(), root, &mut |path| Ok(files.get(path).cloned()))
    }

    /// A chain of three and its files.
    fn chain() -> (Files, [StorePath; 3]) {
        let (mut files, mut proven) = (Files::new(), Proven::default());
        let bottom = add(&mut files, &mut proven, "bottom", &[]);
        let middle = add(&mut files, &mut proven, "middle", &[&bottom]);
        let top = add(&mut files, &mut proven, "top", &[&middle, &bottom]);
        (files, [bottom, middle, top])
    }

    #[test]
    fn a_closure_is_proven_and_resolved() {
        let (files, [bottom, middle, top]) = chain();
        let mut proven = Proven::default();
        prove(&mut proven, &files, &top).unwrap();
        let request = proven.resolve(&StoreDir::default(), &top).unwrap();
        let outputs: BTreeSet<_> =
            [&bottom, &middle].map(|drv| proven.0[drv].outputs["out"].clone().unwrap()).into();
        assert_eq!(request.input_srcs, outputs);
        proven.entitles(&StoreDir::default(), &top, &request, &BTreeSet::new()).unwrap();
        // What was proven once is not read again.
        prove(&mut proven, &Files::new(), &top).unwrap();
    }

    #[test]
    fn any_change_of_a_request_is_found() {
        let dir = StoreDir::default();
        let (files, [bottom, _, top]) = chain();
        let mut proven = Proven::default();
        prove(&mut proven, &files, &top).unwrap();
        let request = proven.resolve(&StoreDir::default(), &top).unwrap();
        let foreign = proven.0[&bottom].outputs["out"].clone().unwrap();
        type Lie = (&'static str, Box<dyn Fn(&mut BasicDerivation)>);
        let lies: Vec<Lie> = vec![
            ("name", Box::new(|drv| drv.name.push('x'))),
            ("system", Box::new(|drv| drv.system = "i686-linux".into())),
            ("builder", Box::new(|drv| drv.builder = "/bin/bash".into())),
            ("args", Box::new(|drv| drv.args.push("x".into()))),
            ("env.name", Box::new(|drv| drop(drv.env.remove(b"name".as_slice())))),
            ("env.new", Box::new(|drv| drop(drv.env.insert("new".into(), "".into())))),
            ("inputSrcs", Box::new(|drv| drop(drv.input_srcs.pop_first()))),
            ("inputSrcs", {
                let top = top.clone();
                Box::new(move |drv| drv.input_srcs.extend([top.clone()]))
            }),
            (
                "outputs",
                Box::new(move |drv| {
                    drv.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(foreign.clone()));
                }),
            ),
        ];
        for (expected, lie) in lies {
            let mut request = request.clone();
            lie(&mut request);
            match proven.entitles(&dir, &top, &request, &BTreeSet::new()) {
                Err(ProofError::Differs { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        // An input more is no lie if the inputs refer to it anyway.
        let mut more = request;
        more.input_srcs.insert(top.clone());
        proven.entitles(&dir, &top, &more, &BTreeSet::from([top.clone()])).unwrap();
    }

    #[test]
    fn forged_files_prove_nothing() {
        let (files, [bottom, middle, top]) = chain();
        let mut missing = files.clone();
        missing.remove(&bottom);
        assert!(
            matches!(prove(&mut Proven::default(), &missing, &top), Err(ProofError::Missing(path)) if path == bottom)
        );

        let mut swapped = files.clone();
        swapped.insert(middle, files[&bottom].clone());
        assert!(matches!(prove(&mut Proven::default(), &swapped, &top), Err(ProofError::Name { .. })));

        // The same derivation, and a name of its own, but not the text that paths are made of.
        let dir = StoreDir::default();
        let respelled = files[&bottom].replacen("(\"name\"", "(\"na\\me\"", 1);
        let drv = aterm::parse(&dir, "bottom", &respelled).unwrap();
        assert_eq!(drv, aterm::parse(&dir, "bottom", &files[&bottom]).unwrap());
        let own = modulo::text_path(&dir, &drv, &respelled).unwrap();
        let spelled = Files::from([(own.clone(), respelled)]);
        assert!(
            matches!(prove(&mut Proven::default(), &spelled, &own), Err(ProofError::Spelling(path)) if path == own)
        );

        // Right by its name, but its output is somebody else's: the name alone does not entitle.
        let mut drv = aterm::parse(&dir, "bottom", &files[&bottom]).unwrap();
        let foreign = StorePath::from_parts([7; 20], "bottom").unwrap();
        drv.basic.env.insert("out".into(), dir.full(&foreign).into());
        drv.basic.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(foreign));
        let liar = modulo::drv_path(&dir, &drv).unwrap();
        let files = Files::from([(liar.clone(), aterm::print(&dir, &drv).unwrap())]);
        assert!(matches!(prove(&mut Proven::default(), &files, &liar), Err(ProofError::Path { .. })));
    }

    #[test]
    fn closures_with_floating_outputs_below() {
        // Of real Nix: `fixed` depends on `base`, whose outputs' paths follow from their content.
        let real = |name: &str, text: &[u8]| (name.parse::<StorePath>().unwrap(), text.to_vec());
        let (base, base_text) = real(
            "7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv",
            include_bytes!("../../testdata/content-addressed/7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv"),
        );
        let (fixed, fixed_text) = real(
            "ssqnvrc6cpwwl3csijv225ns3zqipp42-fixed.drv",
            include_bytes!("../../testdata/content-addressed/ssqnvrc6cpwwl3csijv225ns3zqipp42-fixed.drv"),
        );
        let mut files = Files::from([(base.clone(), base_text), (fixed.clone(), fixed_text)]);
        let mut proven = Proven::default();
        prove(&mut proven, &files, &fixed).unwrap();
        // What depends on the fixed one has a path that can be proven.
        let top = add(&mut files, &mut proven, "top", &[&fixed]);
        let request = proven.resolve(&StoreDir::default(), &top).unwrap();
        let input = "w0fkqvh6w58g3lwp5v8mwyhh92vf18j5-fixed".parse().unwrap();
        assert_eq!(request.input_srcs, [input].into());
        // What depends on the floating one has not, whatever it claims.
        let dir = StoreDir::default();
        let mut drv =
            Derivation { basic: basic("liar"), input_drvs: [(base, [OutputName::out()].into())].into() };
        let foreign = StorePath::from_parts([7; 20], "liar").unwrap();
        drv.basic.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(foreign));
        let liar = modulo::drv_path(&dir, &drv).unwrap();
        files.insert(liar.clone(), aterm::print(&dir, &drv).unwrap());
        assert!(matches!(prove(&mut proven, &files, &liar), Err(ProofError::Deferred { .. })));
    }

    #[test]
    fn a_request_alone() {
        let dir = StoreDir::default();
        let mut drv = basic("alone");
        assert!(matches!(prove_alone(&dir, &drv), Err(ProofError::Deferred { .. })));
        let path = modulo::basic_output_paths(&dir, &drv).unwrap()["out"].clone();
        drv.env.insert("out".into(), dir.full(&path).into());
        drv.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(path));
        prove_alone(&dir, &drv).unwrap();
        let mut changed = drv.clone();
        changed.args.push("changed".into());
        assert!(matches!(prove_alone(&dir, &changed), Err(ProofError::Path { .. })));
        // What the paths are made of leaves these values out.
        let mut led_astray = drv.clone();
        led_astray.env.insert("out".into(), "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-alone".into());
        let computed = modulo::basic_output_paths(&dir, &led_astray).unwrap();
        assert_eq!(computed, modulo::basic_output_paths(&dir, &drv).unwrap());
        match prove_alone(&dir, &led_astray) {
            Err(ProofError::Variable { output, .. }) => assert_eq!(output, OutputName::out()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_chain_of_five_thousand() {
        let (mut files, mut proven) = (Files::new(), Proven::default());
        let mut last = add(&mut files, &mut proven, "d", &[]);
        for _ in 1..5000 {
            last = add(&mut files, &mut proven, "d", &[&last]);
        }
        let mut afresh = Proven::default();
        prove(&mut afresh, &files, &last).unwrap();
        assert_eq!(afresh.0.len(), 5000);
    }
}
