//! The builder's own look at what its client claims, before anything runs.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use drover_nix::derivation::{aterm, modulo};
use drover_nix::{
    BasicDerivation, ContentAddress, Derivation, DerivationOutput, Method, OutputName, PathInfo, Sha256,
    StoreDir, StorePath, nar,
};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, BuildTarget};

use crate::builds_fixture::{Drv, Reader, Session, Store};

fn dir() -> StoreDir {
    StoreDir::default()
}

/// A derivation with these outputs and the paths that follow from the rest.
fn honest(name: &str, outputs: &[&str], script: &str) -> Result<Drv> {
    let mut made = Drv::new(name, script)?;
    made.drv.outputs =
        outputs.iter().map(|name| Ok((name.parse()?, DerivationOutput::Deferred))).collect::<Result<_>>()?;
    made.drv.env.clear();
    modulo::fill_output_paths(&dir(), &mut made.drv)?;
    made.path = own(&made.drv)?;
    Ok(made)
}

fn own(drv: &BasicDerivation) -> Result<StorePath> {
    Ok(modulo::basic_drv_path(&dir(), drv)?)
}

fn built(store: &Store, options: &[&str], drv: &Drv) -> Result<BuildResult> {
    let mut session = Session::start(store.drover(options)?, Reader::Follows)?;
    let result = session.client()?.build_derivation(&drv.path, &drv.drv, &BuildOptions::default())?;
    session.end(true)?;
    Ok(result)
}

fn refused(result: &BuildResult, status: BuildStatus, why: &str) -> Result<()> {
    ensure!(result.status == status && result.error_message.contains(why), "{result:?}");
    Ok(())
}

#[test]
fn a_path_of_somebody_else_is_refused() -> Result<()> {
    let store = Store::new()?;
    let verified = ["--trust", "verified"];
    let liar = Drv::new("victim", "echo mine > $out")?;
    let out = liar.out();
    refused(
        &built(&store, &verified, &liar)?,
        BuildStatus::InputRejected,
        "its output paths are not proven",
    )?;
    ensure!(!store.open()?.is_valid(&out)?, "it was built nevertheless");
    // Whoever proves it otherwise says so of this derivation, and of no other that claims the same path.
    let name = dir().full(&own(&liar.drv)?);
    let proven = [&verified[..], &["--proven-derivation", &name]].concat();
    let mut other = liar.clone();
    other.drv.args = vec!["-c".into(), "echo somebody's > $out".into()];
    refused(&built(&store, &proven, &other)?, BuildStatus::InputRejected, "its output paths are not proven")?;
    ensure!(built(&store, &proven, &liar)?.status == BuildStatus::Built);
    // What proves itself needs nobody.
    let honest = honest("honest", &["out"], "echo mine > $out")?;
    ensure!(built(&store, &verified, &honest)?.status == BuildStatus::Built);
    store.expect_clean()
}

/// The values of variables named like outputs are no part of what paths are made of.
#[test]
fn outputs_that_change_places_are_refused() -> Result<()> {
    let honest = honest("pair", &["out", "dev"], "echo out > $out; echo dev > $dev")?;
    let mut swapped = honest.clone();
    let [out, dev] =
        ["out", "dev"].map(|name| honest.drv.env.get(name.as_bytes()).cloned().unwrap_or_default());
    swapped.drv.env.extend([("out".into(), dev.clone()), ("dev".into(), out.clone())]);
    let store = Store::new()?;
    refused(
        &built(&store, &["--trust", "verified"], &swapped)?,
        BuildStatus::InputRejected,
        "env.dev of pair",
    )?;
    // That it is no idle fear: a builder that believes makes one in the place of the other.
    ensure!(built(&store, &["--trust", "claimed"], &swapped)?.status == BuildStatus::Built);
    let text = |path: &[u8]| -> Result<String> {
        let path = dir().parse(path)?;
        Ok(std::fs::read_to_string(store.path("nix/store").join(path.as_str()))?)
    };
    ensure!((text(&out)?.as_str(), text(&dev)?.as_str()) == ("dev\n", "out\n"));
    Ok(())
}

#[test]
fn a_builder_for_one_build_makes_no_other() -> Result<()> {
    let store = Store::new()?;
    let [mine, other] = ["mine", "other"].map(|name| honest(name, &["out"], "echo > $out"));
    let (mine, other) = (mine?, other?);
    for trust in ["verified", "claimed"] {
        let options = ["--trust", trust, "--only-derivation", &dir().full(&mine.path)];
        refused(&built(&store, &options, &other)?, BuildStatus::MiscFailure, "started for other builds")?;
        ensure!(built(&store, &options, &mine)?.status.is_success());
    }
    store.expect_clean()
}

/// A `.drv` file that is valid in the store was proven when it became so, with all that is below it.
#[test]
fn derivations_of_the_store_prove_themselves() -> Result<()> {
    let store = Store::new()?;
    let mut session = Session::start(store.drover(&["--trust", "verified"])?, Reader::Follows)?;
    let below = honest("below", &["out"], "echo below > $out")?;
    let file = Derivation { basic: below.drv.clone(), input_drvs: BTreeMap::new() };
    let below_path = add_file(&mut session, &file)?;
    let mut basic = Drv::new("above", "read line < $below; echo above $line > $out")?.drv;
    basic.env = [
        ("below".into(), below.drv.env.get("out".as_bytes()).cloned().context("a path")?),
        ("out".into(), "".into()),
    ]
    .into();
    basic.outputs = [(OutputName::out(), DerivationOutput::Deferred)].into();
    let mut above = Derivation { basic, input_drvs: [(below_path, [OutputName::out()].into())].into() };
    let mut input = |_: &StorePath| modulo::input_hash(&dir(), &file, &mut |path| unreachable!("{path}"));
    let out = modulo::output_paths(&dir(), &above, &mut input)?.context("known")?[&OutputName::out()].clone();
    above.basic.env.insert("out".into(), dir().full(&out).into());
    above.basic.outputs = [(OutputName::out(), DerivationOutput::InputAddressed(out.clone()))].into();
    let path = add_file(&mut session, &above)?;
    let target = BuildTarget { path, outputs: None };
    session.client()?.build_paths(&[target], &BuildOptions::default())?;
    session.end(true)?;
    ensure!(std::fs::read_to_string(store.path("nix/store").join(out.as_str()))? == "above below\n");
    // The same, sent by a client, is a claim.
    let resolved = above.resolve(&dir(), |_, _| below.drv.output_paths(&dir()).ok()?.remove("out")?)?;
    let claim = Drv { path: own(&resolved)?, drv: resolved, marker: String::new() };
    refused(&built(&store, &["--trust", "verified"], &claim)?, BuildStatus::InputRejected, "not proven")
}

/// Adds a `.drv` file.
fn add_file(session: &mut Session, drv: &Derivation) -> Result<StorePath> {
    let text = aterm::print(&dir(), drv)?;
    let mut writer = nar::Writer::new(Vec::new());
    writer.file_bytes(false, &text)?;
    let nar = writer.finish()?;
    let path = modulo::drv_path(&dir(), drv)?;
    let info = PathInfo {
        path: path.clone(),
        nar_hash: Sha256::of(&nar),
        nar_size: nar.len() as u64,
        references: drv.basic.input_srcs.iter().chain(drv.input_drvs.keys()).cloned().collect(),
        deriver: None,
        signatures: Vec::new(),
        ca: Some(ContentAddress { method: Method::Text, hash: Sha256::of(&text).into() }),
    };
    session.client()?.add_to_store_nar(&info, &mut nar.as_slice())?;
    Ok(path)
}
