//! Derivations whose outputs' paths follow from their content, built by real Nix 2.34 and by Drover: the same statuses,
//! paths, references and rows in the database; and a real Nix that has them built by Drover.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, BuildTarget};
use drover_store::{Access, LocalStore, StoreLayout, ValidPath};
use drover_tests::{Nix, Remote};

use super::builds_fixture::{Reader, Session, Store};

/// What Nix has to be told before it builds these.
const FEATURES: &str = "
substitute = false
build-users-group =
experimental-features = nix-command ca-derivations impure-derivations dynamic-derivations git-hashing
";

/// Without inputs, so that each can be sent as it is.
const KINDS: &str = r#"
let
  d = name: a: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // a);
  floating = mode: algo: { __contentAddressed = true; outputHashMode = mode; outputHashAlgo = algo; };
  nar = floating "recursive" "sha256";
  fixed = mode: algo: hash: { outputHashMode = mode; outputHashAlgo = algo; outputHash = hash; };
  sh = text: [ "-ec" text ];
  source = builtins.toFile "source" "text\n";
  # The outputs' paths as Nix and Drover give them to the shell that has structured attributes only.
  structured = ''while read -r line; do case $line in "declare -A outputs="*) o=''${line#*=*=\'}; o=''${o%%\'*}; esac; done < "$NIX_ATTRS_SH_FILE"; '';
in {
  good = {
    plain = d "plain" (nar // { args = sh "echo scratch $out; echo x > $out"; });
    itself = d "itself" (nar // { args = sh "echo $out $out ${source} > $out"; });
    flat = d "flat" (floating "flat" "sha256" // { args = sh "echo x > $out"; });
    flat-md5 = d "flat-md5" (floating "flat" "md5" // { args = sh "echo x > $out"; });
    nar-sha1 = d "nar-sha1" (floating "recursive" "sha1" // { args = sh "echo x > $out"; });
    nar-sha512 = d "nar-sha512" (floating "nar" "sha512" // { args = sh "echo x > $out"; });
    text = d "text" (floating "text" "sha256" // { args = sh "echo ${source} > $out"; });
    git-sha1 = d "git-sha1" (floating "git" "sha1" // { args = sh "echo x > $out"; });
    git-sha256 = d "git-sha256" (floating "git" "sha256" // { args = sh "echo x > $out"; });
    several = d "several" (nar // { outputs = [ "out" "a" "z" "m" ];
      args = sh "echo $z $m > $a; echo $m $z ${source} > $z; echo leaf > $m; echo $a > $out; echo scratch $a $m $out $z"; });
    one-of-itself = d "one-of-itself" (nar // { outputs = [ "out" "lib" ];
      args = sh "echo $out $lib > $out; echo $lib > $lib"; });
    impure = d "impure" { __impure = true; args = sh "echo x $out > $out"; };
    impure-git = d "impure-git" { __impure = true; outputHashMode = "git"; outputHashAlgo = "sha1"; args = sh "echo x > $out"; };
    # Another derivation, which is what dynamic derivations are made of.
    derivation = d "made.drv" (floating "text" "sha256" // {
      args = sh ''echo -n 'Derive([("out","","r:sha256","")],[],[],"x86_64-linux","/bin/sh",[],[("out","")])' > $out''; });
    fixed-text = d "fixed-text" (fixed "text" "sha256" (builtins.hashString "sha256" "x\n") // { args = sh "echo x > $out"; });
    fixed-git = d "fixed-git" (fixed "git" "sha1" "587be6b4c3f93f93c489c0111bba5596147a26cb" // { args = sh "echo x > $out"; });
    fixed-nar = d "fixed-nar" (fixed "recursive" "sha1" "ce66fb50f8435866a20d72d6d470c33bc00fd5cd" // { args = sh "echo x > $out"; });
    discards = d "discards" (nar // { __structuredAttrs = true; unsafeDiscardReferences.out = true; inherit source;
      args = sh (structured + "echo $o ${source} > $o"); });
    discards-flat = d "discards-flat" (floating "flat" "sha256" // { __structuredAttrs = true; unsafeDiscardReferences.out = true;
      args = sh (structured + "echo $o ${source} > $o"); });
    allowed = d "allowed" (nar // { allowedReferences = [ source "out" ]; allowedRequisites = [ source ]; args = sh "echo $out ${source} > $out"; });
    sized = d "sized" (nar // { __structuredAttrs = true; outputChecks.out = { maxSize = 120; maxClosureSize = 120; allowedRequisites = [ "out" ]; };
      args = sh (structured + "echo x > $o"); });
  };
  bad = {
    circle = d "circle" (nar // { outputs = [ "a" "b" ]; args = sh "echo $b > $a; echo $a > $b"; });
    missing = d "missing" (nar // { outputs = [ "out" "dev" ]; args = sh "echo x > $out"; });
    failing = d "failing" (nar // { args = sh "exit 3"; });
    impure-failing = d "impure-failing" { __impure = true; args = sh "exit 3"; };
    flat-refers = d "flat-refers" (floating "flat" "sha256" // { args = sh "echo ${source} > $out"; });
    git-refers = d "git-refers" (floating "git" "sha1" // { args = sh "echo ${source} > $out"; });
    sha512-refers = d "sha512-refers" (floating "nar" "sha512" // { args = sh "echo ${source} > $out"; });
    no-derivation = d "no.drv" (floating "text" "sha256" // { args = sh "echo x > $out"; });
    text-itself = d "text-itself" (floating "text" "sha256" // { args = sh "echo $out > $out"; });
    mismatch = d "mismatch" (fixed "flat" "sha256" (builtins.hashString "sha256" "other") // { args = sh "echo x > $out"; });
    mismatch-nar = d "mismatch-nar" (fixed "recursive" "sha256" (builtins.hashString "sha256" "other") // { args = sh "echo x > $out"; });
    mismatch-git = d "mismatch-git" (fixed "git" "sha1" "0000000000000000000000000000000000000000" // { args = sh "echo x > $out"; });
    fixed-refers = d "fixed-refers" (fixed "recursive" "sha256" (builtins.hashString "sha256" "other") // { args = sh "echo ${source} > $out"; });
    fixed-flat-refers = d "fixed-flat-refers" (fixed "flat" "sha256" (builtins.hashString "sha256" "${builtins.unsafeDiscardStringContext source}\n") // { args = sh "echo ${source} > $out"; });
    disallowed = d "disallowed" (nar // { disallowedReferences = [ "out" ]; args = sh "echo $out > $out"; });
    unlisted = d "unlisted" (nar // { allowedReferences = [ ]; args = sh "echo ${source} > $out"; });
    unknown-output = d "unknown-output" (nar // { allowedReferences = [ "doc" ]; args = sh "echo x > $out"; });
    large = d "large" (nar // { __structuredAttrs = true; outputChecks.out.maxSize = 119; args = sh (structured + "echo x > $o"); });
    large-closure = d "large-closure" (nar // { __structuredAttrs = true; inherit source; outputChecks.out.maxClosureSize = 200;
      args = sh (structured + "echo ${source} > $o"); });
    itself-required = d "itself-required" (nar // { __structuredAttrs = true; outputChecks.out.disallowedRequisites = [ "out" ];
      args = sh (structured + "echo $o > $o"); });
  };
}
"#;

/// Chains, in which each link's paths are known only when the one below is built.
const CHAINS: &str = r#"
let
  d = name: a: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // a);
  floating = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  sh = text: [ "-ec" text ];
  base = d "base" (floating // { outputs = [ "out" "dev" ]; args = sh "echo base $dev > $out; echo dev > $dev"; });
  middle = d "middle" (floating // { inherit base; args = sh "echo ${base.dev} $base $out > $out"; });
  # Another derivation that resolves to the same.
  twin = d "middle" (floating // { base = base.out; args = sh "echo ${base.dev} $base $out > $out"; });
  deferred = d "deferred" { inherit middle twin; outputs = [ "out" "doc" ]; args = sh "echo $middle $doc > $out; echo $twin > $doc"; };
  impure = d "impure" { __impure = true; inherit base; args = sh "echo $base > $out"; };
  of-impure = d "of-impure" { __impure = true; inherit impure; args = sh "echo $impure > $out"; };
  wrongly-pure = d "wrongly-pure" (floating // { inherit impure; args = sh "echo $impure > $out"; });
in { inherit deferred of-impure wrongly-pure; }
"#;

/// The same unbuilt derivations in a store of Nix's and one of Drover's.
struct Both {
    nix: Store,
    drover: Store,
    /// By name.
    drvs: BTreeMap<String, StorePath>,
}

impl Both {
    fn instantiate(expression: &str, attribute: &[&str]) -> Result<Self> {
        let (nix, drover) = (Store::new()?, Store::new()?);
        let mut command = nix.nix()?.command("nix-instantiate")?;
        let said =
            xtask::run::stdout(command.args(["-E", expression]).args(attribute).env("NIX_CONFIG", FEATURES))?;
        let dir = StoreDir::default();
        // Where the first output is not `out`, its name stands behind the path.
        let path = |line: &str| dir.parse(line.split('!').next().unwrap_or(line).as_bytes());
        let paths: Vec<StorePath> = said.lines().map(path).collect::<Result<_, _>>()?;
        copy_closure(&nix.open()?, &drover, &paths)?;
        let named = |path: StorePath| Some((path.derivation_name()?.to_owned(), path));
        Ok(Self { nix, drover, drvs: paths.into_iter().filter_map(named).collect() })
    }

    fn nix_session(&self) -> Result<Session> {
        let mut command = self.nix.nix()?.command("nix-store")?;
        command.args(["--serve", "--write"]).env("NIX_CONFIG", FEATURES);
        Session::start(command, Reader::Follows)
    }

    /// Hashes references to themselves as this Nix does.
    fn drover_session(&self) -> Result<Session> {
        let command = self.drover.drover(&["--self-reference-hash", "without-offsets"])?;
        Session::start(command, Reader::Follows)
    }

    fn build(&self, session: &mut Session, drv_path: &StorePath) -> Result<BuildResult> {
        let drv = self.nix.open()?.read_derivation(drv_path)?.basic;
        Ok(session.client()?.build_derivation(drv_path, &drv, &BuildOptions::default())?)
    }
}

/// Copies a closure, references first.
fn copy_closure(from: &LocalStore, to: &Store, paths: &[StorePath]) -> Result<()> {
    let to = LocalStore::open(StoreLayout::in_root(to.path("")), Access::ReadWrite)?;
    let mut left = from.closure(&paths.iter().cloned().collect())?;
    while !left.is_empty() {
        let before = left.len();
        for path in std::mem::take(&mut left) {
            let info = from.path_info(&path)?.context("a closure is valid")?;
            let others: BTreeSet<StorePath> = info.other_references().cloned().collect();
            if to.valid_paths(&others)?.len() < others.len() {
                left.insert(path);
                continue;
            }
            let mut nar = Vec::new();
            from.dump(&path, &mut nar)?;
            to.add_nar(&info, false, 0, &mut nar.as_slice())?;
        }
        ensure!(left.len() < before, "references run in a circle");
    }
    Ok(())
}

/// The whole row of a path but for the time.
fn row(store: &LocalStore, path: &StorePath) -> Result<ValidPath> {
    let row = store.registration(path)?.with_context(|| format!("{path} is not valid"))?;
    Ok(ValidPath { registration_time: 0, ..row })
}

fn expect_same_row(nix: &LocalStore, drover: &LocalStore, path: &StorePath) -> Result<()> {
    let (theirs, ours) = (row(nix, path)?, row(drover, path)?);
    ensure!(format!("{theirs:?}") == format!("{ours:?}"), "Nix has {theirs:#?}\nDrover has {ours:#?}");
    Ok(())
}

#[test]
fn every_kind_is_built_to_what_nix_builds() -> Result<()> {
    let both = Both::instantiate(KINDS, &["-A", "good"])?;
    let (mut nix, mut drover) = (both.nix_session()?, both.drover_session()?);
    let mut wrong = Vec::new();
    for (name, drv_path) in &both.drvs {
        let theirs = both.build(&mut nix, drv_path)?;
        let ours = both.build(&mut drover, drv_path)?;
        if theirs.status != BuildStatus::Built || ours.status != theirs.status {
            let (theirs, ours) = ((theirs.status, theirs.error_message), (ours.status, ours.error_message));
            wrong.push(format!("{name}: Nix says {theirs:?}, Drover says {ours:?}"));
            continue;
        }
        let paths = |result: &BuildResult| -> BTreeMap<_, _> {
            result.built_outputs.iter().map(|(name, built)| (name.clone(), built.path.clone())).collect()
        };
        if paths(&theirs) != paths(&ours) {
            wrong.push(format!("{name}: Nix made {:?}, Drover {:?}", paths(&theirs), paths(&ours)));
            continue;
        }
        for path in paths(&ours).values() {
            if let Err(error) = expect_same_row(&both.nix.open()?, &both.drover.open()?, path) {
                wrong.push(format!("{name}: {error:#}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(both.drvs.len() == 21, "{:?}", both.drvs.keys());
    // Where they are built is what the builder is told, and says.
    let scratch = |log: String| -> Vec<String> {
        let lines = log.lines().filter_map(|line| line.split_once("scratch /"));
        lines.map(|(_, paths)| paths.to_owned()).collect()
    };
    let (theirs, ours) = (scratch(nix.log()), scratch(drover.end(true)?));
    ensure!(theirs == ours && ours.len() == 2, "Nix built in {theirs:?}, Drover in {ours:?}");
    nix.end(true)?;
    both.drover.expect_clean()
}

#[test]
fn what_nix_refuses_is_refused_with_its_status() -> Result<()> {
    use BuildStatus::*;
    let both = Both::instantiate(KINDS, &["-A", "bad"])?;
    let (mut nix, mut drover) = (both.nix_session()?, both.drover_session()?);
    // Nix takes it for an accident that content with references cannot have such an address, or is no derivation, and
    // would be asked again for what can never work.
    let accident =
        ["flat-refers", "git-refers", "sha512-refers", "text-itself", "fixed-flat-refers", "no.drv"];
    let mut wrong = Vec::new();
    for (name, drv_path) in &both.drvs {
        let theirs = both.build(&mut nix, drv_path)?;
        let ours = both.build(&mut drover, drv_path)?;
        let expected = match accident.contains(&name.as_str()) {
            true => (MiscFailure, OutputRejected),
            false => (theirs.status, theirs.status),
        };
        if theirs.status.is_success() || (theirs.status, ours.status) != expected {
            let (theirs, ours) = ((theirs.status, theirs.error_message), (ours.status, ours.error_message));
            wrong.push(format!("{name}: Nix says {theirs:?}, Drover says {ours:?}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(both.drvs.len() == 20, "{:?}", both.drvs.keys());
    drover.end(true)?;
    nix.end(true)?;
    // What a wrong hash was found for is there under the right one, in both.
    let (theirs, ours) = (both.nix.open()?, both.drover.open()?);
    let kept = |store: &LocalStore| -> Result<BTreeSet<StorePath>> {
        let all = store.all_valid_paths()?.into_iter();
        Ok(all.filter(|path| path.name().starts_with("mismatch") && !path.is_derivation()).collect())
    };
    ensure!(kept(&ours)?.len() == 3 && kept(&ours)? == kept(&theirs)?, "{:?}", kept(&ours)?);
    kept(&ours)?.iter().try_for_each(|path| expect_same_row(&theirs, &ours, path))?;
    both.drover.expect_clean()
}

#[test]
fn chains_are_resolved_as_they_are_built() -> Result<()> {
    let both = Both::instantiate(CHAINS, &["-A", "deferred", "-A", "of-impure", "-A", "wrongly-pure"])?;
    let (mut nix, mut drover) = (both.nix_session()?, both.drover_session()?);
    let target = |name: &str| BuildTarget { path: both.drvs[name].clone(), outputs: None };
    let targets = [target("deferred"), target("of-impure")];
    for session in [&mut nix, &mut drover] {
        session.client()?.build_paths(&targets, &BuildOptions::default())?;
    }
    let (theirs, ours) = (both.nix.open()?, both.drover.open()?);
    // Everything: outputs, and the derivations that the ones with unknown inputs were resolved to.
    let (in_theirs, in_ours) = (theirs.all_valid_paths()?, ours.all_valid_paths()?);
    let (only_theirs, only_ours): (Vec<_>, Vec<_>) =
        (in_theirs.difference(&in_ours).collect(), in_ours.difference(&in_theirs).collect());
    ensure!(in_theirs == in_ours, "only Nix has {only_theirs:?}; only Drover has {only_ours:?}");
    in_ours
        .iter()
        .filter(|path| !path.is_derivation())
        .try_for_each(|path| expect_same_row(&theirs, &ours, path))?;

    // Once more: nothing is built but what is impure.
    drover.client()?.build_paths(&targets, &BuildOptions::default())?;
    let wrong = drover.client()?.build_paths(&[target("wrongly-pure")], &BuildOptions::default());
    ensure!(format!("{wrong:?}").contains("depends on impure derivation"), "{wrong:?}");
    ensure!(ours.all_valid_paths()?.len() == in_ours.len());
    drover.end(true)?;
    nix.end(true)?;
    both.drover.expect_clean()
}

/// Two outputs that are others with each build.
const RANDOM: &str = r#"
derivation {
  name = "random"; system = "x86_64-linux"; builder = "/bin/sh"; outputs = [ "out" "dev" ];
  __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
  args = [ "-ec" "read x < /proc/sys/kernel/random/uuid; echo $x > $out; echo $x > $dev" ];
}
"#;

#[test]
fn what_nix_has_built_in_the_same_store_is_found() -> Result<()> {
    let both = Both::instantiate(RANDOM, &[])?;
    let drv_path = both.drvs.values().next().context("one derivation")?;
    let mut nix = both.nix_session()?;
    let theirs = both.build(&mut nix, drv_path)?;
    ensure!(theirs.status == BuildStatus::Built, "{}", theirs.error_message);
    nix.end(true)?;
    let mut drover = Session::start(both.nix.drover(&[])?, Reader::Follows)?;
    let ours = both.build(&mut drover, drv_path)?;
    ensure!(ours.status == BuildStatus::AlreadyValid, "{:?}: {}", ours.status, ours.error_message);
    ensure!(ours.built_outputs.len() == 2 && ours.built_outputs == theirs.built_outputs, "{ours:?}");
    drover.end(true)?;
    // Where nobody has built it, it is another.
    let mut elsewhere = both.drover_session()?;
    let other = both.build(&mut elsewhere, drv_path)?;
    ensure!(other.status == BuildStatus::Built && other.built_outputs != theirs.built_outputs);
    elsewhere.end(true)?;
    both.drover.expect_clean()
}

/// A chain for builders elsewhere.
const REMOTE: &str = r#"
let
  d = name: a: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; __contentAddressed = true;
    outputHashMode = "recursive"; outputHashAlgo = "sha256"; } // a);
  base = d "base" { outputs = [ "out" "dev" ]; args = [ "-ec" "echo built remotely; echo $dev > $out; echo dev $dev > $dev" ]; };
in d "user" { args = [ "-ec" "echo ${base} ${base.dev} > $out" ]; }
"#;

#[test]
fn real_nix_has_them_built_by_drover() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        // Nix checks what it is given, in its own way.
        let hash = if nix == Nix::V2_8 { "with-offsets" } else { "without-offsets" };
        remote.server("ca", &["--self-reference-hash", hash])?;
        let machine = format!("{} x86_64-linux - 1 1 ca-derivations", remote.uri("ca"));
        let build = |remote: &Remote, args: &[&str]| -> Result<(String, String)> {
            let mut command =
                remote.command("nix-build", &[&["--no-out-link", "-E", REMOTE], args].concat())?;
            let output = command.env("NIX_CONFIG", FEATURES).output()?;
            let log = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success(), "{nix:?}: {log}");
            Ok((String::from_utf8(output.stdout)?.trim().to_owned(), log))
        };
        let (out, log) = build(&remote, &["--max-jobs", "0", "--builders", &machine])?;
        ensure!(log.contains("built remotely"), "{nix:?}: {log}");
        for store in ["client", "ca"] {
            ensure!(remote.object(store, &out).is_file(), "{nix:?}: {out} is not in {store}");
            remote.verify(store)?;
        }
        // Nix builds the same by itself, where nothing is there yet.
        let alone = Remote::new(nix)?;
        let (itself, _) = build(&alone, &["--option", "sandbox", "false"])?;
        ensure!(itself == out, "{nix:?}: Nix makes {itself}, Drover {out}");
    }
    Ok(())
}
