//! What is not so is refused, and the refusal says what it is: the corpus of real Nix with one thing changed.

use std::collections::BTreeSet;
use std::convert::Infallible;

use anyhow::{Context as _, Result, ensure};
use drover_nix::derivation::proof::{ProofError, Proven};
use drover_nix::derivation::{DerivationType, aterm, modulo};
use drover_nix::{BasicDerivation, ContentAddress, DerivationOutput, Method, Sha256, StoreDir, StorePath};
use drover_tests::Nix;

use super::{Corpus, prove};

/// How many derivations of the corpus are lied about: every so-many-th.
const EVERY: usize = 9;

type Lie = (&'static str, fn(&mut BasicDerivation, &StorePath) -> bool);

/// Each changes one field, and says whether there was anything to change.
const LIES: [Lie; 14] = [
    ("name", |drv, _| {
        drv.name.push('x');
        true
    }),
    ("system", |drv, _| {
        drv.system.push(b'x');
        true
    }),
    ("builder", |drv, _| {
        drv.builder.push(b'x');
        true
    }),
    ("args", |drv, _| {
        drv.args.push("".into());
        true
    }),
    ("args", |drv, _| drv.args.pop().is_some()),
    ("args", |drv, _| {
        drv.args.reverse();
        drv.args.first() != drv.args.last()
    }),
    ("env.name", |drv, _| drv.env.remove(b"name".as_slice()).is_some()),
    ("env.name", |drv, _| drv.env.insert("name".into(), "".into()).is_some()),
    ("env.new", |drv, _| drv.env.insert("new".into(), "".into()).is_none()),
    ("inputSrcs", |drv, _| drv.input_srcs.pop_first().is_some()),
    ("inputSrcs", |drv, foreign| drv.input_srcs.insert(foreign.clone())),
    ("outputs", |drv, _| drv.outputs.len() > 1 && drv.outputs.pop_last().is_some()),
    ("outputs", |drv, foreign| {
        let Some(mut output) = drv.outputs.first_entry() else { return false };
        output.insert(DerivationOutput::InputAddressed(foreign.clone()));
        true
    }),
    ("outputs", |drv, _| {
        // Two outputs change places.
        let [Some(first), Some(last)] = [drv.outputs.first_key_value(), drv.outputs.last_key_value()]
            .map(|output| output.map(|(name, output)| (name.clone(), output.clone())))
        else {
            return false;
        };
        if first.1 == last.1 {
            return false;
        }
        drv.outputs.insert(first.0, last.1);
        drv.outputs.insert(last.0, first.1);
        true
    }),
];

fn sample(corpus: &Corpus) -> impl Iterator<Item = Result<StorePath>> {
    corpus.said.iter().step_by(EVERY).map(|said| Ok(StoreDir::default().parse(said.drv.as_bytes())?))
}

#[test]
fn a_request_that_differs_in_one_field() -> Result<()> {
    let corpus = Corpus::new(Nix::V2_34)?;
    let dir = StoreDir::default();
    let mut proven = Proven::default();
    let foreign: StorePath = "i00sflxqsj37lfmf95m8mn0grv615hpj-foreign".parse()?;
    let mut told = [0; LIES.len()];
    for path in sample(&corpus) {
        let path = path?;
        prove(&mut proven, &corpus.files, &path)?;
        // Where inputs are not built yet there is no request either.
        let Ok(request) = proven.resolve(&dir, &path) else { continue };
        for (number, (field, lie)) in LIES.iter().enumerate() {
            let mut request = request.clone();
            if !lie(&mut request, &foreign) {
                continue;
            }
            told[number] += 1;
            let refused = proven.entitles(&dir, &path, &request, &BTreeSet::new()).err();
            let error = refused.with_context(|| format!("{path}: believed though {field} was changed"))?;
            ensure!(error.to_string().starts_with(&format!("{field} is not what {path} says")), "{error}");
        }
    }
    ensure!(told.iter().all(|told| *told >= 10), "{told:?}");
    Ok(())
}

#[test]
fn a_file_that_is_not_what_its_name_says() -> Result<()> {
    let corpus = Corpus::new(Nix::V2_34)?;
    let (mut changes, mut respelled) = (0, 0);
    for path in sample(&corpus) {
        let path = path?;
        // What is below it is proven, so that each change costs one file.
        let mut proven = Proven::default();
        for input in corpus.drv(&path)?.input_drvs.keys() {
            prove(&mut proven, &corpus.files, input)?;
        }
        let mut refused = |path: &StorePath, text: Vec<u8>, what: &str| {
            let mut read = |_: &StorePath| Ok::<_, Infallible>(Some(text.clone()));
            let error = proven.prove(&StoreDir::default(), path, &mut read).err();
            let error = error.with_context(|| format!("{path}: believed {what}"))?;
            ensure!(error.to_string().contains(path.as_str()), "{error}");
            Ok(error)
        };
        let text = &corpus.files[&path];
        for step in 0..40 {
            let at = text.len() * step / 40;
            let mut changed = text.clone();
            changed[at] ^= 1;
            refused(&path, changed, &format!("with byte {at} changed"))?;
            changes += 1;
        }
        refused(&path, text[..text.len() - 1].to_vec(), "without its last byte")?;
        refused(&path, [text.as_slice(), b"\n"].concat(), "with a byte more")?;
        // The same derivation in other words: the first output's name with an escape that changes nothing.
        let at = "Derive([(\"".len();
        if !b"nrt".contains(&text[at]) {
            let dir = StoreDir::default();
            let other = [&text[..at], b"\\", &text[at..]].concat();
            let same = aterm::parse(&dir, path.derivation_name().context("a .drv")?, &other)?;
            ensure!(same == corpus.drv(&path)?);
            let error = refused(&path, other.clone(), "in another spelling")?;
            ensure!(matches!(error, ProofError::Name { .. }), "{error}");
            // Nor is it by its own name.
            let references = same.basic.input_srcs.iter().chain(same.input_drvs.keys()).cloned().collect();
            let address = ContentAddress { method: Method::Text, hash: Sha256::of(&other).into() };
            let own = address.store_path(&dir, path.name(), &references, false)?;
            let error = refused(&own, other, "in another spelling by its own name")?;
            ensure!(matches!(error, ProofError::Spelling(_)), "{error}");
            respelled += 1;
        }
    }
    ensure!(changes >= 2000 && respelled >= 50, "{changes} {respelled}");
    Ok(())
}

#[test]
fn a_closure_with_a_file_missing_or_swapped() -> Result<()> {
    let corpus = Corpus::new(Nix::V2_34)?;
    let top = StoreDir::default().parse(corpus.said.last().context("a corpus")?.drv.as_bytes())?;
    let mut chain = vec![];
    for said in corpus.said.iter().filter(|said| said.drv.ends_with("-link.drv")) {
        chain.push(StoreDir::default().parse(said.drv.as_bytes())?);
    }
    ensure!(chain.len() >= 200, "{}", chain.len());
    for (root, part) in [(chain.last().context("a chain")?, &chain[100]), (&top, &top)] {
        let mut files = corpus.files.clone();
        files.remove(part);
        match prove(&mut Proven::default(), &files, root) {
            Err(ProofError::Missing(missing)) => ensure!(missing == *part, "{missing}"),
            other => anyhow::bail!("{other:?}"),
        }
        files.insert(part.clone(), corpus.files[&chain[7]].clone());
        match prove(&mut Proven::default(), &files, root) {
            Err(ProofError::Name { path, .. }) => ensure!(path == *part, "{path}"),
            other => anyhow::bail!("{other:?}"),
        }
    }
    Ok(())
}

/// The `.drv` is what its name says, but what it says of its outputs is not so: only the computation shows it.
#[test]
fn a_derivation_that_claims_a_path_of_somebody_else() -> Result<()> {
    let corpus = Corpus::new(Nix::V2_34)?;
    let dir = StoreDir::default();
    let mut claims = 0;
    for path in sample(&corpus) {
        let mut drv = corpus.drv(&path?)?;
        if drv.basic.kind()? != DerivationType::InputAddressed {
            continue;
        }
        let Some(mut output) = drv.basic.outputs.last_entry() else { continue };
        let name = output.key().clone();
        let foreign = StorePath::from_parts([7; 20], &name.path_name(&drv.basic.name))?;
        output.insert(DerivationOutput::InputAddressed(foreign.clone()));
        drv.basic.env.insert(name.as_str().into(), dir.full(&foreign).into());
        let liar = modulo::drv_path(&dir, &drv)?;
        let mut files = corpus.files.clone();
        files.insert(liar.clone(), aterm::print(&dir, &drv)?);
        match prove(&mut Proven::default(), &files, &liar) {
            Err(ProofError::Path { output, claimed, .. }) => {
                ensure!(output == name && claimed == dir.full(&foreign), "{output} {claimed}");
            }
            other => anyhow::bail!("{liar}: {other:?}"),
        }
        claims += 1;
    }
    ensure!(claims >= 30, "{claims}");
    Ok(())
}
