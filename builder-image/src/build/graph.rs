//! `exportReferencesGraph`: closures of inputs, told to the builder (Nix: store-api.cc, exportReferences;
//! derivation-env-desugar.cc; parsed-derivations.cc). Pure but for what it asks of a [`Known`].

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::{PathInfo, StoreDir, StorePath};
use serde_json::{Map, Value, json};

use super::attrs::Attributes;
use crate::error::Error;

/// What is known of store paths.
pub(crate) trait Known {
    fn info(&self, path: &StorePath) -> Result<PathInfo, Error>;
    /// The outputs of a `.drv` that is in the store. Fails if their paths do not follow from it.
    fn outputs(&self, drv: &StorePath) -> Result<Vec<StorePath>, Error>;
}

/// What the builder gets: files of its build directory, or values among its structured attributes.
#[derive(Default, Debug)]
pub(crate) struct Graphs {
    pub files: BTreeMap<String, Vec<u8>>,
    pub values: Map<String, Value>,
}

/// Computes what `attributes` ask for. Roots must be in `inputs`, the closure of the derivation's inputs.
pub(crate) fn graphs(
    dir: &StoreDir,
    attributes: &Attributes<'_>,
    inputs: &BTreeSet<StorePath>,
    known: &dyn Known,
) -> Result<Graphs, Error> {
    let mut graphs = Graphs::default();
    for (name, roots) in attributes.reference_graphs()? {
        let roots = roots.iter().map(|text| root(dir, text, inputs)).collect::<Result<_, _>>()?;
        let infos = closure(roots, known)?;
        if attributes.structured().is_some() {
            graphs.values.insert(name, structured(dir, &infos));
        } else {
            graphs.files.insert(name, registration(dir, &infos).into_bytes());
        }
    }
    Ok(graphs)
}

/// The store path that `text` is, or is below.
fn root(dir: &StoreDir, text: &str, inputs: &BTreeSet<StorePath>) -> Result<StorePath, Error> {
    let prefix = format!("{dir}/");
    let base = text.strip_prefix(&prefix).and_then(|rest| rest.split('/').next());
    let path = base.and_then(|base| base.parse::<StorePath>().ok()).filter(|path| inputs.contains(path));
    path.ok_or_else(|| {
        Error::input(format!(
            "exportReferencesGraph: {text} is not among the derivation's inputs and what they refer to"
        ))
    })
}

/// The closure of `roots`, and of the outputs of every `.drv` in it; but not of those that only these lead to.
fn closure(roots: Vec<StorePath>, known: &dyn Known) -> Result<BTreeMap<StorePath, PathInfo>, Error> {
    let mut infos = BTreeMap::new();
    extend(&mut infos, roots, known)?;
    let drvs: Vec<StorePath> = infos.keys().filter(|path| path.is_derivation()).cloned().collect();
    for drv in drvs {
        extend(&mut infos, known.outputs(&drv)?, known)?;
    }
    Ok(infos)
}

fn extend(
    infos: &mut BTreeMap<StorePath, PathInfo>,
    paths: Vec<StorePath>,
    known: &dyn Known,
) -> Result<(), Error> {
    let mut queue = paths;
    while let Some(path) = queue.pop() {
        if infos.contains_key(&path) {
            continue;
        }
        let info = known.info(&path)?;
        queue.extend(info.references.iter().cloned());
        infos.insert(path, info);
    }
    Ok(())
}

/// Path, deriver (empty), number of references, references: a line each, as `nix-store --register-validity` reads.
fn registration(dir: &StoreDir, infos: &BTreeMap<StorePath, PathInfo>) -> String {
    let mut text = String::new();
    for (path, info) in infos {
        text.push_str(&format!("{}\n\n{}\n", dir.full(path), info.references.len()));
        for reference in &info.references {
            text.push_str(&dir.full(reference));
            text.push('\n');
        }
    }
    text
}

fn structured(dir: &StoreDir, infos: &BTreeMap<StorePath, PathInfo>) -> Value {
    let entries = infos.iter().map(|(path, info)| {
        let references: Vec<String> = info.references.iter().map(|path| dir.full(path)).collect();
        let mut entry = json!({
            "closureSize": closure_size(path, infos),
            "narHash": info.nar_hash.to_string(),
            "narSize": info.nar_size,
            "path": dir.full(path),
            "references": references,
            "valid": true,
        });
        if let Some(ca) = &info.ca {
            entry["ca"] = Value::String(ca.to_string());
        }
        entry
    });
    Value::Array(entries.collect())
}

fn closure_size(path: &StorePath, infos: &BTreeMap<StorePath, PathInfo>) -> u64 {
    let (mut seen, mut queue) = (BTreeSet::new(), vec![path]);
    while let Some(path) = queue.pop() {
        if seen.insert(path) {
            queue.extend(infos.get(path).into_iter().flat_map(|info| &info.references));
        }
    }
    seen.into_iter().filter_map(|path| infos.get(path)).map(|info| info.nar_size).sum()
}

#[cfg(test)]
mod tests {
    use drover_nix::Sha256;

    use super::*;
    use crate::build::testing::derivation;

    const A: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-a";
    const B: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-b";
    /// Its output is C, which refers to another derivation.
    const DRV: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-c.drv";
    const C: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-c";
    const OTHER_DRV: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-d.drv";

    struct Some;

    impl Known for Some {
        fn info(&self, path: &StorePath) -> Result<PathInfo, Error> {
            let references: &[&str] = match path.as_str() {
                A => &[A, B],
                C => &[OTHER_DRV],
                _ => &[],
            };
            Ok(PathInfo {
                path: path.clone(),
                nar_hash: Sha256::of(b""),
                nar_size: 100,
                references: references.iter().map(|path| path.parse().unwrap()).collect(),
                deriver: None,
                signatures: Vec::new(),
                ca: None,
            })
        }
        fn outputs(&self, drv: &StorePath) -> Result<Vec<StorePath>, Error> {
            match drv.as_str() {
                DRV => Ok(vec![C.parse().unwrap()]),
                other => panic!("{other} is below an output only"),
            }
        }
    }

    fn of(env: &[(&str, &str)]) -> Result<Graphs, Error> {
        let drv = derivation(env);
        let inputs = [A, B, DRV].iter().map(|path| path.parse().unwrap()).collect();
        graphs(&StoreDir::default(), &Attributes::parse(&drv).unwrap(), &inputs, &Some)
    }

    #[test]
    fn as_a_file() {
        let graphs = of(&[("exportReferencesGraph", &format!("g /nix/store/{A}/bin/x"))]).unwrap();
        let text = String::from_utf8(graphs.files["g"].clone()).unwrap();
        assert_eq!(
            text,
            format!("/nix/store/{A}\n\n2\n/nix/store/{A}\n/nix/store/{B}\n/nix/store/{B}\n\n0\n")
        );
    }

    #[test]
    fn as_a_value() {
        let json = format!(r#"{{"exportReferencesGraph":{{"g":["/nix/store/{A}"]}}}}"#);
        let graphs = of(&[("__json", &json)]).unwrap();
        assert_eq!(graphs.values["g"][0]["closureSize"], 200);
        assert_eq!(graphs.values["g"][1]["references"], json!([]));
        assert!(graphs.files.is_empty());
    }

    #[test]
    fn derivations_bring_their_outputs() {
        let graphs = of(&[("exportReferencesGraph", &format!("g /nix/store/{DRV}"))]).unwrap();
        let text = String::from_utf8(graphs.files["g"].clone()).unwrap();
        assert_eq!(
            text,
            format!(
                "/nix/store/{C}\n\n1\n/nix/store/{OTHER_DRV}\n/nix/store/{DRV}\n\n0\n/nix/store/{OTHER_DRV}\n\n0\n"
            )
        );
    }

    #[test]
    fn roots_are_inputs() {
        for path in ["/etc/passwd", "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-c"] {
            assert!(of(&[("exportReferencesGraph", &format!("g {path}"))]).is_err());
        }
    }
}
