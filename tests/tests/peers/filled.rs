//! Requests that leave out what can be computed: what is filled in is what real Nix has written into its `.drv` files.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use drover_api::convert::{complete, from_basic, to_basic};
use drover_api::{DerivationSpec, OutputSpec};
use drover_nix::derivation::{aterm, modulo};
use drover_nix::{BasicDerivation, StoreDir};
use drover_tests::{Nix, Peer};

/// No derivation here is another one's input, so that each is a request by itself.
const PLAIN: &str = r#"
let
  source = builtins.toFile "source" "text\n";
  make = name: attrs: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
  fixed = algo: mode: hash: make "fixed-${algo}-${mode}" {
    outputHashAlgo = algo; outputHashMode = mode; outputHash = hash;
  };
  sums = {
    md5 = "d41d8cd98f00b204e9800998ecf8427e";
    sha1 = "da39a3ee5e6b4b0d3255bfef95601890afd80709";
    sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    sha512 = "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e";
  };
  algos = builtins.attrNames sums;
in {
  one = make "one" { args = [ "-c" "echo > $out" source ]; };
  several = make "several" { outputs = [ "bin" "dev" "lib" "out" ]; inherit source; };
  another-first = make "another-first" { outputs = [ "dev" ]; };
  odd = make "odd+name_1.0?=x" { outputs = [ "a.b" "c+d" ]; empty = ""; quoted = "a\"b\\c\n\t\${x}"; };
  structured = make "structured" { __structuredAttrs = true; outputs = [ "out" "doc" ]; inherit source; list = [ 1 "b" { c = null; } ]; };
  refers = make "refers" { here = builtins.placeholder "out"; };
} // builtins.listToAttrs (builtins.concatMap (algo: map (mode: {
  name = "fixed-${algo}-${mode}"; value = fixed algo mode sums.${algo};
}) [ "flat" "recursive" ]) algos)
"#;
/// The kinds whose paths follow from content.
const CONTENT: &str = r#"
let make = name: attrs: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
in {
  floating = make "floating" { __contentAddressed = true; outputs = [ "out" "dev" ]; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  flat = make "flat" { __contentAddressed = true; outputHashMode = "flat"; outputHashAlgo = "sha512"; };
  impure = make "impure" { __impure = true; };
}
"#;

#[test]
fn what_is_left_out_is_filled_in_as_nix_does() -> Result<()> {
    for nix in Nix::ALL {
        let drvs = instantiate(nix, PLAIN)?;
        ensure!(drvs.len() == 14, "{nix:?}: {}", drvs.len());
        for (name, drv) in &drvs {
            check(drv).with_context(|| format!("{nix:?}: {name}"))?;
        }
    }
    for (name, drv) in &instantiate(Nix::V2_34, CONTENT)? {
        check(drv).with_context(|| name.clone())?;
    }
    Ok(())
}

/// Takes out, in every way, what may be left out, and sees it come back.
fn check(drv: &BasicDerivation) -> Result<()> {
    let dir = StoreDir::default();
    let whole = from_basic(drv, &dir)?;
    let mut bare = whole.clone();
    for (name, output) in &mut bare.outputs {
        *output = OutputSpec { path: None, ..output.clone() };
        ensure!(bare.env.contains_key(name), "Nix has no variable {name}");
    }
    let without = |change: &dyn Fn(&mut BTreeMap<String, String>, &str)| {
        let mut spec = bare.clone();
        bare.outputs.keys().for_each(|name| change(&mut spec.env, name));
        spec
    };
    let given_back =
        |spec: &DerivationSpec| -> Result<BasicDerivation> { Ok(complete(to_basic(spec, &dir)?, &dir)?) };
    for spec in [
        bare.clone(),
        without(&|env, name| drop(env.remove(name))),
        without(&|env, name| drop(env.insert(name.to_owned(), String::new()))),
        whole,
    ] {
        let filled = given_back(&spec)?;
        ensure!(filled == *drv, "{spec:#?} gave {filled:#?}, but Nix has {drv:#?}");
        ensure!(modulo::basic_drv_path(&dir, &filled)? == modulo::basic_drv_path(&dir, drv)?);
    }
    Ok(())
}

/// What this Nix makes of the expression's attributes, by name of the derivation.
fn instantiate(nix: Nix, expression: &str) -> Result<BTreeMap<String, BasicDerivation>> {
    let store = tempfile::tempdir()?;
    let root = store.path().display().to_string();
    let mut command = Peer::new(nix)?.command("nix-instantiate")?;
    command.env("NIX_CONFIG", "experimental-features = ca-derivations impure-derivations nix-command");
    let said = xtask::run::stdout(command.args(["--store", &root, "-E", expression]))?;
    let dir = StoreDir::default();
    let mut drvs = BTreeMap::new();
    for line in said.lines() {
        let path = dir.parse(line.split('!').next().unwrap_or_default().as_bytes())?;
        let text = std::fs::read(store.path().join("nix/store").join(path.as_str()))?;
        let name = path.derivation_name().context("no derivation")?;
        let drv = aterm::parse(&dir, name, &text)?;
        ensure!(drv.input_drvs.is_empty() && modulo::drv_path(&dir, &drv)? == path, "{path}");
        drvs.insert(name.to_owned(), drv.basic);
    }
    Ok(drvs)
}
