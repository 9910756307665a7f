//! Whether an output is what it must be: decisions over what was received. Pure.

use std::collections::{BTreeMap, BTreeSet};

use drover_nix::derivation::STRUCTURED_ATTRS;
use drover_nix::hash_modulo::ModuloHashes;
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Hash, HashAlgo, Method, OutputName, PathInfo, Sha256,
    StoreDir, StorePath,
};
use drover_serve::BuildResult;
use serde_json::Value;

use crate::{Failure, Job, Reason, Trust};

/// What was computed from an output's bytes.
pub(crate) struct Received<'a> {
    pub nar_hash: Sha256,
    pub nar_size: u64,
    pub references: &'a BTreeSet<StorePath>,
}

/// Where each output is: known before the build, or said by the builder for those whose paths follow from content.
pub(crate) fn locate(
    dir: &StoreDir,
    known: BTreeMap<OutputName, Option<StorePath>>,
    result: &BuildResult,
) -> Result<BTreeMap<OutputName, StorePath>, Failure> {
    let located = known.into_iter().map(|(name, known)| {
        let said = result.built_outputs.get(&name).map(|built| &built.path);
        match (known, said) {
            (Some(known), Some(said)) if known != *said => {
                let (said, known) = (dir.full(said), dir.full(&known));
                let message = format!("the builder put output {name} at {said} instead of {known}");
                Err(Failure::verdict(Reason::OutputRejected, message))
            }
            (Some(path), _) => Ok((name, path)),
            (None, Some(said)) => Ok((name, said.clone())),
            (None, None) => {
                let message = format!("the builder does not say where output {name} is");
                Err(Failure::verdict(Reason::OutputRejected, message))
            }
        }
    });
    located.collect()
}

/// Checks what the builder says about its outputs before anything is received.
pub(crate) fn claims(
    outputs: &BTreeMap<OutputName, StorePath>,
    infos: &BTreeMap<StorePath, PathInfo>,
    candidates: &BTreeSet<StorePath>,
    max_output_bytes: Option<u64>,
) -> Result<(), Failure> {
    let mut total: u64 = 0;
    for (name, path) in outputs {
        let info = infos.get(path).ok_or_else(|| {
            let message = format!("the builder reports success, but has no output {name} ({path})");
            Failure::verdict(Reason::OutputRejected, message)
        })?;
        total = total.saturating_add(info.nar_size);
        if let Some(stray) = info.references.difference(candidates).next() {
            let message = format!("output {name} refers to {stray}, which is neither an input nor an output");
            return Err(Failure::verdict(Reason::OutputRejected, message));
        }
    }
    match max_output_bytes {
        Some(limit) if total > limit => {
            let message = format!("the outputs have {total} bytes as NARs; {limit} are allowed");
            Err(Failure::verdict(Reason::OutputSizeLimitExceeded, message))
        }
        _ => Ok(()),
    }
}

/// Checks what was received against what the builder said of it.
pub(crate) fn received(
    name: &OutputName,
    claimed: &PathInfo,
    received: &Received<'_>,
) -> Result<(), Failure> {
    let path = &claimed.path;
    let mismatch = |what: String| {
        let message = format!("output {name} ({path}) is not what the builder says: {what}");
        Err(Failure::verdict(Reason::OutputHashMismatch, message))
    };
    if received.nar_size != claimed.nar_size {
        return mismatch(format!("{} bytes arrived instead of {}", received.nar_size, claimed.nar_size));
    }
    if received.nar_hash != claimed.nar_hash {
        return mismatch(format!("its hash is {} instead of {}", received.nar_hash, claimed.nar_hash));
    }
    if let Some(hidden) = received.references.difference(&claimed.references).next() {
        return mismatch(format!("it refers to {hidden}, which the builder leaves out"));
    }
    if let Some(absent) = claimed.references.difference(received.references).next() {
        return mismatch(format!("it does not refer to {absent}"));
    }
    Ok(())
}

/// Whether the derivation has this output registered without references, whatever it refers to. Structured attributes
/// alone can say so (Nix: derivation-options.cc, unsafeDiscardReferences).
pub(crate) fn discards_references(derivation: &BasicDerivation, name: &OutputName) -> bool {
    let attributes = derivation.env(STRUCTURED_ATTRS).map(|text| serde_json::from_slice(text));
    match attributes {
        Some(Ok(Value::Object(map))) => {
            map.get("unsafeDiscardReferences").and_then(|outputs| outputs.get(name.as_str()))
                == Some(&Value::Bool(true))
        }
        _ => false,
    }
}

/// How an output's content is to be hashed, None if its path does not depend on its content.
pub(crate) fn content_method(output: &DerivationOutput) -> Option<(Method, HashAlgo)> {
    match output {
        DerivationOutput::CaFixed(ca) => Some((ca.method, ca.hash.algo)),
        DerivationOutput::CaFloating { method, algo } | DerivationOutput::Impure { method, algo } => {
            Some((*method, *algo))
        }
        DerivationOutput::Deferred | DerivationOutput::InputAddressed(_) => None,
    }
}

/// The content address of an output whose content has one of `hashes`, if it makes the path what it must be.
///
/// Of content that refers to itself there are two hashes. By the one of Nix 2.17 to 2.34 anyone can make other content
/// with the same path, by putting zeros where it refers to itself or the reverse. So that one is taken on a caller's
/// word only ([`Trust::Claimed`]); whoever wants proof ([`Trust::Verified`]) gets the other.
pub(crate) fn content_address(
    job: &Job,
    name: &OutputName,
    path: &StorePath,
    references: &BTreeSet<StorePath>,
    hashes: &ModuloHashes,
) -> Result<Option<ContentAddress>, Failure> {
    let (dir, derivation) = (&job.dir, &job.derivation);
    let Some(output) = derivation.outputs.get(name) else {
        return Ok(None);
    };
    let Some((method, _)) = content_method(output) else {
        return Ok(None);
    };
    if let DerivationOutput::CaFixed(declared) = output
        && !hashes.contains(&declared.hash)
    {
        let really = hashes.with_offsets.to_sri();
        let declared = declared.hash.to_sri();
        let message = format!("output {name} has the hash {really}, but the derivation declares {declared}");
        return Err(Failure::verdict(Reason::OutputHashMismatch, message));
    }
    let has_own = hashes.with_offsets != hashes.without_offsets;
    let self_reference = references.contains(path);
    let others = references.iter().filter(|reference| *reference != path).cloned().collect();
    let at = |hash: &Hash| {
        let address = ContentAddress { method, hash: hash.clone() };
        match address.store_path(dir, &name.path_name(&derivation.name), &others, self_reference) {
            Ok(computed) if computed == *path => Ok(address),
            Ok(computed) => Err(format!("its content gives {}", dir.full(&computed))),
            Err(error) => Err(error.to_string()),
        }
    };
    let why = match (job.trust, at(&hashes.with_offsets), at(&hashes.without_offsets)) {
        // Only an archive says where it ends: the text of a file could go on with what stands for offsets.
        (Trust::Verified, Ok(_), _) if has_own && method != Method::Nar => {
            "it has its own path in it, which proves nothing unless it is addressed by its archive (nar)"
                .into()
        }
        (_, Ok(address), _) | (Trust::Claimed, _, Ok(address)) => return Ok(Some(address)),
        (Trust::Verified, Err(why), Ok(_)) => format!(
            "{why}. It is there by the rule of Nix 2.17 to 2.34 for content that refers to itself, by which other \
             content can have the same path; with trust: Verified, builders have to hash the offsets too"
        ),
        (_, Err(why), Err(_)) => why,
    };
    let message = format!("output {name} cannot be at {}: {why}", dir.full(path));
    Err(Failure::verdict(Reason::OutputRejected, message))
}

#[cfg(test)]
mod tests {
    use drover_serve::{BuildStatus, BuiltOutput};

    use super::*;

    const A: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-a";
    const B: &str = "q4mzjdlh5px6977h7v5fdsk1p33yg583-b";

    fn path(base: &str) -> StorePath {
        base.parse().unwrap()
    }

    fn info(size: u64, references: &[&str]) -> PathInfo {
        PathInfo {
            path: path(A),
            nar_hash: Sha256::of(b"a"),
            nar_size: size,
            references: references.iter().map(|base| path(base)).collect(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        }
    }

    #[test]
    fn where_outputs_are() {
        let dir = StoreDir::default();
        let said = |base: Option<&str>| BuildResult {
            built_outputs: base
                .map(|base| (OutputName::out(), BuiltOutput { path: path(base), signatures: Vec::new() }))
                .into_iter()
                .collect(),
            ..BuildResult::new(BuildStatus::Built)
        };
        let locate = |known: Option<&str>, result| {
            locate(&dir, [(OutputName::out(), known.map(path))].into(), &result)
                .map(|outputs| outputs[&OutputName::out()].to_string())
                .map_err(|failure| failure.reason)
        };
        assert_eq!(locate(Some(A), said(None)), Ok(A.to_owned()), "old servers do not say");
        assert_eq!(locate(Some(A), said(Some(A))), Ok(A.to_owned()));
        assert_eq!(locate(Some(A), said(Some(B))), Err(Reason::OutputRejected));
        assert_eq!(locate(None, said(Some(B))), Ok(B.to_owned()));
        assert_eq!(locate(None, said(None)), Err(Reason::OutputRejected));
    }

    #[test]
    fn what_the_builder_says() {
        let outputs = [(OutputName::out(), path(A))].into();
        let check = |info: Option<PathInfo>, limit| {
            let infos = info.into_iter().map(|info| (info.path.clone(), info)).collect();
            claims(&outputs, &infos, &[path(A)].into(), limit).map_err(|failure| failure.reason)
        };
        assert_eq!(check(Some(info(10, &[A])), Some(10)), Ok(()));
        assert_eq!(check(Some(info(10, &[A])), None), Ok(()));
        assert_eq!(check(Some(info(11, &[A])), Some(10)), Err(Reason::OutputSizeLimitExceeded));
        assert_eq!(check(Some(info(10, &[B])), None), Err(Reason::OutputRejected));
        assert_eq!(check(None, None), Err(Reason::OutputRejected));
    }

    #[test]
    fn what_arrives() {
        let claimed = info(10, &[A]);
        let check = |nar_hash, nar_size, references: &[&str]| {
            let references = references.iter().map(|base| path(base)).collect();
            received(&OutputName::out(), &claimed, &Received { nar_hash, nar_size, references: &references })
                .map_err(|failure| failure.reason)
        };
        let (good, bad) = (Sha256::of(b"a"), Sha256::of(b"b"));
        assert_eq!(check(good, 10, &[A]), Ok(()));
        for (hash, size, references) in
            [(bad, 10, &[A][..]), (good, 9, &[A]), (good, 10, &[]), (good, 10, &[A, B])]
        {
            assert_eq!(check(hash, size, references), Err(Reason::OutputHashMismatch));
        }
    }

    fn job(output: DerivationOutput, trust: Trust) -> Job {
        let derivation = BasicDerivation {
            name: "x".into(),
            outputs: [(OutputName::out(), output)].into(),
            input_srcs: [].into(),
            system: "".into(),
            builder: "".into(),
            args: Vec::new(),
            env: [].into(),
        };
        let dir = StoreDir::default();
        Job {
            drv_path: crate::drv_path_of(&dir, &derivation).unwrap(),
            dir,
            derivation,
            options: Default::default(),
            caches: Vec::new(),
            push: None,
            signing_key: None,
            trust,
            proven: Default::default(),
            max_output_bytes: None,
            spool_dir: Default::default(),
            kept: Default::default(),
        }
    }

    #[test]
    fn content_decides_the_path() {
        let dir = StoreDir::default();
        let hash = |content: &[u8]| Hash::from(Sha256::of(content));
        let address = ContentAddress { method: Method::Nar, hash: hash(b"good") };
        let at = address.store_path(&dir, "x", &[].into(), false).unwrap();
        let check = |output, at: &StorePath, content: &[u8]| {
            let (references, hashes) = (BTreeSet::new(), ModuloHashes::both(hash(content)));
            content_address(&job(output, Trust::Verified), &OutputName::out(), at, &references, &hashes)
                .map_err(|failure| failure.reason)
        };
        let fixed = || DerivationOutput::CaFixed(address.clone());
        let floating = || DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 };
        assert_eq!(check(fixed(), &at, b"good"), Ok(Some(address.clone())));
        assert_eq!(check(fixed(), &at, b"evil"), Err(Reason::OutputHashMismatch));
        assert_eq!(check(floating(), &at, b"good"), Ok(Some(address.clone())));
        assert_eq!(check(floating(), &at, b"evil"), Err(Reason::OutputRejected));
        assert_eq!(check(floating(), &path(A), b"good"), Err(Reason::OutputRejected));
        assert_eq!(check(DerivationOutput::InputAddressed(path(A)), &path(A), b"any"), Ok(None));
        // Another method, another algorithm, other references: other paths.
        let flat = DerivationOutput::CaFloating { method: Method::Flat, algo: HashAlgo::Sha256 };
        assert_eq!(check(flat, &at, b"good"), Err(Reason::OutputRejected));
    }

    #[test]
    fn references_to_itself_prove_with_their_offsets_only() {
        let dir = StoreDir::default();
        let hashes = ModuloHashes {
            with_offsets: Sha256::of(b"with").into(),
            without_offsets: Sha256::of(b"without").into(),
        };
        let place = |method, hash: &Hash, own| {
            let address = ContentAddress { method, hash: hash.clone() };
            address.store_path(&dir, "x", &[].into(), own).unwrap()
        };
        let check = |method, trust, at: &StorePath, references: BTreeSet<StorePath>| {
            let output = DerivationOutput::CaFloating { method, algo: HashAlgo::Sha256 };
            content_address(&job(output, trust), &OutputName::out(), at, &references, &hashes)
                .map(|address| address.unwrap().hash)
                .map_err(|failure| failure.message)
        };
        let with = place(Method::Nar, &hashes.with_offsets, true);
        let without = place(Method::Nar, &hashes.without_offsets, true);
        for trust in [Trust::Verified, Trust::Claimed] {
            let found = check(Method::Nar, trust, &with, [with.clone()].into());
            assert_eq!(found.as_ref(), Ok(&hashes.with_offsets), "{trust:?}");
        }
        let found = check(Method::Nar, Trust::Claimed, &without, [without.clone()].into());
        assert_eq!(found.as_ref(), Ok(&hashes.without_offsets));
        let said = check(Method::Nar, Trust::Verified, &without, [without.clone()].into()).unwrap_err();
        assert!(said.contains("2.17 to 2.34"), "{said}");
        // With its references discarded, a file may have its path in it; the offsets are then no more than its end.
        let flat = place(Method::Flat, &hashes.with_offsets, false);
        assert!(check(Method::Flat, Trust::Claimed, &flat, [].into()).is_ok());
        let said = check(Method::Flat, Trust::Verified, &flat, [].into()).unwrap_err();
        assert!(said.contains("its own path"), "{said}");
    }

    #[test]
    fn who_discards_references() {
        let derivation = |text: &str| BasicDerivation {
            name: "x".into(),
            outputs: [].into(),
            input_srcs: [].into(),
            system: "".into(),
            builder: "".into(),
            args: Vec::new(),
            env: [("__json".into(), text.into())].into(),
        };
        let discards = |text| discards_references(&derivation(text), &OutputName::out());
        assert!(discards(r#"{"unsafeDiscardReferences":{"out":true}}"#));
        for text in [
            r#"{"unsafeDiscardReferences":{"out":false,"dev":true}}"#,
            r#"{"unsafeDiscardReferences":{"out":"true"}}"#,
            r#"{"unsafeDiscardReferences":true}"#,
            "{}",
            "[",
        ] {
            assert!(!discards(text), "{text}");
        }
    }
}
