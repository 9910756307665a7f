//! `exportReferencesGraph`: closures of inputs, told to the builder (Nix: store-api.cc, exportReferences;
//! derivation-env-desugar.cc; parsed-derivations.cc). Pure but for what it asks of a [`Known`].

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::{PathInfo, StoreDir, StorePath};
use serde_json::{Map, Value, json};

use super::attrs::Attributes;
use crate::error::Error;

/// Paths and references of all graphs of one derivation together. Each takes some hundred bytes of memory, several times over, and
/// a derivation may name the same closure as often as it likes.
const MAX_ENTRIES: usize = 1_048_576;

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
    let mut entries = 0;
    for (name, roots) in attributes.reference_graphs()? {
        let roots = roots.iter().map(|text| root(dir, text, inputs)).collect::<Result<_, _>>()?;
        let infos = closure(roots, known)?;
        entries += infos.values().map(|info| 1 + info.references.len()).sum::<usize>();
        if entries > MAX_ENTRIES {
            return Err(Error::input(format!(
                "exportReferencesGraph: the closures have more than {MAX_ENTRIES} paths and references in all; name fewer"
            )));
        }
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
    let entries = infos.iter().zip(closure_sizes(infos)).map(|((path, info), closure_size)| {
        let references: Vec<String> = info.references.iter().map(|path| dir.full(path)).collect();
        let mut entry = json!({
            "closureSize": closure_size,
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

/// Of each path, in order: the archives' bytes of all in `infos` that it refers to, itself included.
///
/// Which paths lead to a path is asked for 64 of them at a time, one bit each: walking the closure of each path by itself would
/// take a minute for twenty thousand of them.
fn closure_sizes(infos: &BTreeMap<StorePath, PathInfo>) -> Vec<u64> {
    const BITS: usize = u64::BITS as usize;
    let number: BTreeMap<&StorePath, usize> = infos.keys().enumerate().map(|(at, path)| (path, at)).collect();
    let known =
        |info: &PathInfo| info.references.iter().filter_map(|path| number.get(path).copied()).collect();
    let references: Vec<Vec<usize>> = infos.values().map(known).collect();
    let nar_sizes: Vec<u64> = infos.values().map(|info| info.nar_size).collect();
    let order = references_first(&references);
    let mut sizes = vec![0_u64; nar_sizes.len()];
    for (block, of_block) in nar_sizes.chunks(BITS).enumerate() {
        let mut leads_to = vec![0_u64; sizes.len()];
        leads_to[block * BITS..].iter_mut().take(BITS).enumerate().for_each(|(bit, set)| *set = 1 << bit);
        let sums = sums(of_block);
        // Once, and once more to see that nothing changes: a store has no circles.
        let mut changes = true;
        while changes {
            changes = false;
            for &path in &order {
                let all = references[path].iter().fold(leads_to[path], |all, &to| all | leads_to[to]);
                changes |= all != leads_to[path];
                leads_to[path] = all;
            }
        }
        for (size, set) in sizes.iter_mut().zip(&leads_to) {
            let bytes = set.to_le_bytes();
            *size += sums.iter().zip(bytes).map(|(sums, byte)| sums[usize::from(byte)]).sum::<u64>();
        }
    }
    sizes
}

/// For each of the eight bytes of a set of up to 64 sizes, and each value of it: the sum of what it stands for.
fn sums(sizes: &[u64]) -> [[u64; 256]; 8] {
    let mut sums = [[0; 256]; 8];
    for (sums, sizes) in sums.iter_mut().zip(sizes.chunks(8)) {
        for (byte, sum) in sums.iter_mut().enumerate() {
            *sum =
                sizes.iter().enumerate().filter(|(bit, _)| byte >> bit & 1 == 1).map(|(_, size)| size).sum();
        }
    }
    sums
}

/// All numbers below `references.len()`, each after those that it refers to, where there are no circles.
fn references_first(references: &[Vec<usize>]) -> Vec<usize> {
    let mut order = Vec::with_capacity(references.len());
    let mut seen = vec![false; references.len()];
    for root in 0..references.len() {
        // Without recursion: closures may be one long chain. With what is on the way, how many of its references were looked at.
        let mut way = Vec::new();
        if !std::mem::replace(&mut seen[root], true) {
            way.push((root, 0));
        }
        while let Some((path, looked)) = way.last_mut() {
            match references[*path].get(*looked) {
                Some(&to) => {
                    *looked += 1;
                    if !std::mem::replace(&mut seen[to], true) {
                        way.push((to, 0));
                    }
                }
                None => {
                    order.push(*path);
                    way.pop();
                }
            }
        }
    }
    order
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
    fn closures_are_measured_in_bounded_time() {
        // Far more than it takes; path by path it would be minutes.
        const LONG: std::time::Duration = std::time::Duration::from_secs(30);
        const PATHS: u64 = 20_000;
        let path = |number: u64| StorePath::from_parts([0; 20], &format!("{number:05}")).unwrap();
        let info = |number: u64, references: BTreeSet<StorePath>| PathInfo {
            path: path(number),
            nar_hash: Sha256::of(b""),
            nar_size: number,
            references,
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        let chain = (0..PATHS).map(|n| {
            let next = [n, n + 1, n + 2].into_iter().filter(|next| *next < PATHS).map(path).collect();
            (path(n), info(n, next))
        });
        let infos: BTreeMap<StorePath, PathInfo> = chain.collect();
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || send.send(closure_sizes(&infos)));
        let sizes = receive.recv_timeout(LONG).expect("it takes too long");
        let expected: Vec<u64> = (0..PATHS).map(|n| (n..PATHS).sum()).collect();
        assert_eq!(sizes, expected);
        // In a circle each has all, and what is not known counts for nothing.
        let other = path(99);
        let circle = [(path(1), info(1, [path(2)].into())), (path(2), info(2, [path(1), other].into()))];
        assert_eq!(closure_sizes(&circle.into()), [3, 3]);
    }

    #[test]
    fn one_closure_under_many_names_has_a_limit() {
        struct Wide;
        impl Known for Wide {
            fn info(&self, path: &StorePath) -> Result<PathInfo, Error> {
                let leaf = |n: usize| StorePath::from_parts([1; 20], &n.to_string()).unwrap();
                let references =
                    if path.as_str() == A { (0..MAX_ENTRIES / 64).map(leaf).collect() } else { [].into() };
                Ok(PathInfo { path: path.clone(), references, ..Some.info(path)? })
            }
            fn outputs(&self, _drv: &StorePath) -> Result<Vec<StorePath>, Error> {
                unreachable!("there is no derivation")
            }
        }
        let of = |names: usize| {
            let pairs: Vec<String> = (0..names).map(|name| format!("g{name} /nix/store/{A}")).collect();
            let drv = derivation(&[("exportReferencesGraph", &pairs.join(" "))]);
            graphs(
                &StoreDir::default(),
                &Attributes::parse(&drv).unwrap(),
                &[A.parse().unwrap()].into(),
                &Wide,
            )
        };
        assert_eq!(of(2).unwrap().files.len(), 2);
        let why = of(32).unwrap_err().to_string();
        assert!(why.contains("1048576 paths and references"), "{why}");
    }

    #[test]
    fn roots_are_inputs() {
        for path in ["/etc/passwd", "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-c"] {
            assert!(of(&[("exportReferencesGraph", &format!("g {path}"))]).is_err());
        }
    }
}
