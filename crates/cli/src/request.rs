//! `drover request`: the BuildRequests of derivations.

use std::path::Path;

use anyhow::{Context as _, Result};
use drover_api::{BuildRequest, BuildRequestSpec, convert};
use drover_nix::{StoreDir, StorePath};
use drover_store::StoreUri;

use crate::args;
use crate::exit::{self, Fault, Outcome};
use crate::manifest;
use crate::output::{self, Format};
use crate::resolve::{Resolved, Resolver};

/// Longest name that a request gets. Pods are named after it, and pod names are host names.
const MAX_NAME: usize = 52;
/// Digits of the derivation's hash in the name of its request.
const HASH_DIGITS: usize = 8;

pub(crate) fn run(args: &args::Request) -> Outcome {
    let requests = requests(args).map_err(Fault::Input)?;
    output::print(&requests, if args.json { Format::Json } else { Format::Yaml })?;
    Ok(exit::DONE)
}

/// The request for a derivation whose inputs are paths.
pub(crate) fn of(dir: &StoreDir, resolved: &Resolved) -> Result<BuildRequest> {
    let Resolved { drv_path, derivation } = resolved;
    let spec = BuildRequestSpec {
        derivation: Some(convert::from_basic(derivation, dir).with_context(|| drv_path.to_string())?),
        drv_path: Some(dir.full(drv_path)),
        ..Default::default()
    };
    Ok(BuildRequest::new(&name_of(drv_path), spec))
}

/// The request that names a derivation and leaves it to the cluster to read it.
pub(crate) fn by_path(dir: &StoreDir, drv_path: &StorePath) -> BuildRequest {
    let spec = BuildRequestSpec { drv_path: Some(dir.full(drv_path)), ..Default::default() };
    BuildRequest::new(&name_of(drv_path), spec)
}

fn requests(args: &args::Request) -> Result<Vec<BuildRequest>> {
    let (mut resolver, dir) = open(&args.store)?;
    let mut wanted: Vec<StorePath> = Vec::new();
    for file in &args.derivations {
        wanted.extend(add(&mut resolver, file)?);
    }
    if args.recursive {
        let tops = std::mem::take(&mut wanted);
        for top in tops {
            wanted.extend(resolver.closure(&top)?);
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    wanted.retain(|path| seen.insert(path.clone()));
    let mut requests = Vec::with_capacity(wanted.len());
    if args.by_path {
        return Ok(wanted.iter().map(|path| by_path(&dir, path)).collect());
    }
    for path in &wanted {
        let resolved = resolver.resolve(path)?;
        requests.push(of(&dir, &resolved)?);
    }
    Ok(requests)
}

/// A resolver over a local store, and the store's directory.
pub(crate) fn open(store: &str) -> Result<(Resolver, StoreDir)> {
    let layout = StoreUri::parse(store)?.with_environment()?.layout();
    let dir = layout.store_dir.clone();
    Ok((Resolver::new(layout), dir))
}

/// The derivations that a file names: itself if it is a `.drv`, else what it shows.
fn add(resolver: &mut Resolver, file: &Path) -> Result<Vec<StorePath>> {
    if file.extension().is_some_and(|extension| extension == "drv") {
        return Ok(vec![resolver.add_file(file)?]);
    }
    let text = manifest::read_text(file)?;
    let what = "expected a .drv file or what `nix derivation show` prints";
    resolver.add_json(text.as_bytes()).with_context(|| format!("{}: {what}", file.display()))
}

/// A name that Kubernetes takes (RFC 1123), with enough of the hash that equal names are equal derivations.
pub(crate) fn name_of(drv_path: &StorePath) -> String {
    let name = drv_path.derivation_name().unwrap_or_else(|| drv_path.name());
    let mut label = String::new();
    for c in name.chars().map(|c| c.to_ascii_lowercase()) {
        let c = if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
        if !(c == '-' && (label.is_empty() || label.ends_with('-'))) {
            label.push(c);
        }
    }
    label.truncate(MAX_NAME - HASH_DIGITS - 1);
    let label = label.trim_end_matches('-');
    let hash = &drv_path.hash_part()[..HASH_DIGITS];
    if label.is_empty() { format!("drv-{hash}") } else { format!("{label}-{hash}") }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use drover_nix::{BasicDerivation, ContentAddress, DerivationOutput, HashAlgo, Method, OutputName};
    use proptest::prelude::*;

    use super::*;

    fn path(name: &str) -> StorePath {
        format!("i00sflxqsj37lfmf95m8mn0grv615hpj-{name}").parse().unwrap()
    }

    #[test]
    fn names_are_what_kubernetes_takes() {
        assert_eq!(name_of(&path("hello-2.12.1.drv")), "hello-2-12-1-i00sflxq");
        assert_eq!(name_of(&path("Foo_Bar+.tar.gz.drv")), "foo-bar-tar-gz-i00sflxq");
        assert_eq!(name_of(&path("_.drv")), "drv-i00sflxq");
        assert_eq!(name_of(&path(&format!("{}.drv", "a".repeat(200)))).len(), MAX_NAME);
        let cut_at_dash = format!("{}-b.drv", "a".repeat(MAX_NAME - HASH_DIGITS - 2));
        assert!(!name_of(&path(&cut_at_dash)).contains("--"));
    }

    proptest! {
        /// Request, YAML, parser and back: nothing of a derivation may get lost or be taken for another type.
        #[test]
        fn yaml_round_trip(
            args in proptest::collection::vec(any::<String>(), 0..4),
            env in proptest::collection::btree_map("[a-zA-Z_.0-9~ ]{1,8}", text(), 0..5),
            builder in "[^\u{0}]{1,20}",
            outputs in outputs(),
        ) {
            let dir = StoreDir::default();
            let derivation = BasicDerivation {
                name: "x".into(),
                outputs,
                input_srcs: [path("source")].into(),
                system: "x86_64-linux".into(),
                builder: builder.into(),
                args: args.into_iter().map(Into::into).collect(),
                env: env.into_iter().map(|(key, value)| (key.into(), value.into())).collect(),
            };
            let resolved = Resolved { drv_path: path("x.drv"), derivation };
            let request = of(&dir, &resolved).unwrap();
            let derivation = resolved.derivation;
            let yaml = output::yaml(&[request]).unwrap();
            let again = manifest::parse("f", &yaml).unwrap().remove(0).request;
            let again = convert::to_basic(again.spec.derivation.as_ref().unwrap(), &dir).unwrap();
            prop_assert_eq!(again, derivation, "{}", yaml);
        }
    }

    /// Of every kind that a request can have.
    fn outputs() -> impl Strategy<Value = BTreeMap<OutputName, DerivationOutput>> {
        let methods = proptest::sample::select(vec![Method::Flat, Method::Git, Method::Nar, Method::Text]);
        (0..4, any::<bool>(), methods, any::<bool>()).prop_map(|(kind, sha512, method, several)| {
            // Text takes SHA-256 only, git SHA-1 or SHA-256.
            let sha512 = sha512 && !matches!(method, Method::Text | Method::Git);
            let algo = if sha512 { HashAlgo::Sha512 } else { HashAlgo::Sha256 };
            let mut hasher = drover_nix::hash::Hasher::new(algo);
            hasher.update(b"x");
            let fixed = DerivationOutput::CaFixed(ContentAddress { method, hash: hasher.finish() });
            let output = |name: &OutputName| match kind {
                0 => DerivationOutput::InputAddressed(path(&name.path_name("x"))),
                1 => fixed.clone(),
                2 => DerivationOutput::CaFloating { method, algo },
                _ => DerivationOutput::Impure { method, algo },
            };
            let mut names = vec![OutputName::out()];
            names.extend((several && kind != 1).then(|| "dev".parse().unwrap()));
            names.into_iter().map(|name| (name.clone(), output(&name))).collect()
        })
    }

    /// What YAML is known to trip over, and anything.
    fn text() -> impl Strategy<Value = String> {
        let traps = [
            "",
            " ",
            "yes",
            "no",
            "null",
            "~",
            "1",
            "1.0",
            "0x10",
            "1e3",
            "---",
            "--- a",
            "a: b",
            "- a",
            "# a",
            "a #b",
            "\n",
            "a\n",
            "\na",
            "a\n\n",
            " a\n b",
            "a\r\nb",
            "\t",
            "a\tb",
            "{",
            "&a",
            "*a",
            "!a",
            "|",
            ">",
            "%",
            "@",
            "\u{85}",
            "\u{2028}",
            "\u{feff}",
            "\u{1}",
            "\u{7f}",
            "it's \"so\"",
            "\\n",
            "${x}",
            "2001-01-01",
            ".nan",
            "a\n---\nb",
            "...\n",
        ];
        prop_oneof![any::<String>(), proptest::sample::select(traps.to_vec()).prop_map(str::to_owned)]
    }
}
