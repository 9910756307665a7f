//! Derivations whose paths follow from content, as real Nix 2.34 instantiates them, through `drover request` and `drover
//! build`: resolved as Nix resolves them, built to what Nix builds.

use std::path::PathBuf;
use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use drover_api::{BuildRequest, convert};
use drover_nix::derivation::aterm;
use drover_nix::{Derivation, StoreDir, StorePath};
use drover_store::{Access, LocalStore, StoreLayout};
use drover_tests::{Nix, Peer};
use serde_json::Value;

use crate::command_line::Home;

/// What Nix has to be told before it builds these.
const FEATURES: &str = "
substitute = false
build-users-group =
experimental-features = nix-command ca-derivations impure-derivations dynamic-derivations git-hashing
";

/// Every kind, and chains in which each link's paths are known only when the one below is built.
const KINDS: &str = r#"
let
  d = a: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // a);
  floating = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  sh = text: [ "-c" text ];
  base = d (floating // { name = "base"; outputs = [ "out" "dev" ]; args = sh "echo base > $out; echo dev > $dev"; });
  text = d (floating // { name = "plain.txt"; outputHashMode = "text"; args = sh "echo ${base} > $out"; });
  flat = d (floating // { name = "flat"; outputHashMode = "flat"; outputHashAlgo = "sha512"; args = sh "echo flat > $out"; });
  git = d (floating // { name = "git"; outputHashMode = "git"; outputHashAlgo = "sha1"; args = sh "echo git > $out"; });
  above = d (floating // { name = "above"; inherit text flat; args = sh "echo ${base.dev}${base.dev}/x $text > $out"; });
  fixed = d { name = "fixed"; outputHashMode = "flat"; outputHashAlgo = "sha256";
    outputHash = builtins.hashString "sha256" "x\n"; inherit above; args = sh "echo x > $out"; };
  deferred = d { name = "deferred"; outputs = [ "out" "lib" ]; inherit above fixed git;
    args = sh "echo ${above} $lib > $out; echo $git > $lib"; };
  structured = d { name = "structured"; __structuredAttrs = true; list = [ base.dev "é\"" ]; inherit deferred;
    args = sh ''while read -r line; do case $line in "declare -A outputs="*) o=''${line#*=*=\'}; o=''${o%%\'*}; esac; done < "$NIX_ATTRS_SH_FILE"
      read -r json < "$NIX_ATTRS_JSON_FILE" || :; echo "$json" > "$o"''; };
  top = d { name = "top"; inherit structured deferred; args = sh "echo $structured $deferred > $out"; };
  impure = d { name = "impure"; __impure = true; args = sh "echo impure > $out"; };
  of-impure = d { name = "of-impure"; __impure = true; inherit impure base; args = sh "echo $impure $base > $out"; };
  wrongly-pure = d (floating // { name = "wrongly-pure"; inherit impure; args = sh "echo $impure > $out"; });
in { inherit base text flat git above fixed deferred structured top impure of-impure wrongly-pure; }
"#;

/// Somebody with a Nix store and a Drover.
struct Side {
    home: Home,
    nix: Peer,
}

impl Side {
    fn new() -> Result<Self> {
        let home = Home::new()?;
        let theirs = home.path().join("theirs/nix");
        std::fs::create_dir_all(&theirs)?;
        let nix = Peer::new(Nix::V2_34)?.with_at(&theirs, "/nix");
        Ok(Self { home, nix })
    }

    fn nix(&self, program: &str, args: &[&str]) -> Result<String> {
        xtask::run::stdout(self.nix.command(program)?.args(args).env("NIX_CONFIG", FEATURES))
    }

    /// The `.drv` of one of [`KINDS`].
    fn instantiate(&self, name: &str) -> Result<StorePath> {
        let drv = self.nix("nix-instantiate", &["-E", KINDS, "-A", name])?;
        Ok(StoreDir::default().parse(drv.trim().as_bytes())?)
    }

    fn realise(&self, drv: &StorePath) -> Result<()> {
        self.nix("nix-store", &["--realise", &StoreDir::default().full(drv)]).map(drop)
    }

    /// Root of Nix's store, as `--store` takes it.
    fn store(&self) -> String {
        self.home.path().join("theirs").display().to_string()
    }

    /// A `.drv` of Nix's store as a file of this machine.
    fn file(&self, drv: &StorePath) -> PathBuf {
        self.home.path().join("theirs/nix/store").join(drv.as_str())
    }

    fn open(&self) -> Result<LocalStore> {
        let layout = StoreLayout::in_root(self.home.path().join("theirs"));
        Ok(LocalStore::open(layout, Access::ReadOnly)?)
    }

    fn request(&self, drv: &StorePath, more: &[&str]) -> Result<Output> {
        let (drv, store) = (StoreDir::default().full(drv), self.store());
        self.home.run(&[&["request", &drv, "--store", &store, "--json"], more].concat())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = drover_store::fs::delete(&self.home.path().join("theirs/nix"));
    }
}

fn requests(output: &Output) -> Result<Vec<BuildRequest>> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    let value: Value = serde_json::from_slice(&output.stdout)?;
    match value.get("items") {
        Some(items) => Ok(serde_json::from_value(items.clone())?),
        None => Ok(vec![serde_json::from_value(value)?]),
    }
}

#[test]
fn requests_are_what_nix_resolves_to() -> Result<()> {
    let side = Side::new()?;
    let dir = StoreDir::default();
    let top = side.instantiate("top")?;
    // Nothing is built yet: what has to be is named, all of it, and nothing is printed.
    let unresolved = side.request(&side.instantiate("above")?, &[])?;
    let said = String::from_utf8_lossy(&unresolved.stderr).into_owned();
    assert_eq!((unresolved.status.code(), unresolved.stdout.len()), (Some(2), 0), "{said}");
    for missing in ["-base.drv (dev)", "-flat.drv (out)", "-plain.txt.drv (out)", "drover build --recursive"]
    {
        ensure!(said.contains(missing), "{missing}: {said}");
    }

    side.realise(&top)?;
    let store = side.open()?;
    let mut seen = 0;
    for request in requests(&side.request(&top, &["--recursive"])?)? {
        let spec = request.spec.derivation.context("a derivation")?;
        let drv_path = dir.parse(request.spec.drv_path.context("a drvPath")?.as_bytes())?;
        let drv = Derivation { basic: convert::to_basic(&spec, &dir)?, input_drvs: Default::default() };
        if spec.name != "fixed" {
            // Nix has written what it built: byte for byte the request's.
            let text = std::fs::read(side.file(&drv_path))?;
            assert_eq!(String::from_utf8(aterm::print(&dir, &drv)?)?, String::from_utf8(text)?);
        }
        for path in drv.basic.output_paths(&dir)?.into_values().flatten() {
            ensure!(store.is_valid(&path)?, "Nix built {} elsewhere than {path}", spec.name);
        }
        seen += 1;
    }
    assert_eq!(seen, 9);
    Ok(())
}

#[test]
fn nothing_pure_is_made_of_what_is_impure() -> Result<()> {
    let side = Side::new()?;
    let wrong = side.instantiate("wrongly-pure")?;
    let output = side.request(&wrong, &[])?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    ensure!(said.contains("impure.drv, which is impure"), "{said}");
    let nix = side.realise(&wrong).unwrap_err();
    ensure!(format!("{nix:#}").contains("depends on impure derivation"), "{nix:#}");
    Ok(())
}
