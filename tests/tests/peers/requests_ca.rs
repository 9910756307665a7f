//! Derivations whose paths follow from content, as real Nix 2.34 instantiates them, through `drover request` and `drover
//! build`: resolved as Nix resolves them, built to what Nix builds.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use drover_api::BuildRequest;
use drover_api::convert::{self, Target};
use drover_cache::CacheOptions;
use drover_nix::derivation::aterm;
use drover_nix::{Derivation, StoreDir, StorePath};
use drover_serve::BuildOptions;
use drover_session::{Job, Trust};
use drover_store::{Access, LocalStore, StoreLayout};
use drover_tests::{Nix, Peer, program};
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
  made = ''Derive([("out","","r:sha256","")],[],[],"x86_64-linux","/bin/sh",[],[("out","")])'';
  maker = d (floating // { name = "made.drv"; outputHashMode = "text"; inherit base; args = sh "printf %s '${made}' > $out"; });
  impure = d { name = "impure"; __impure = true; args = sh "echo impure > $out"; };
  of-impure = d { name = "of-impure"; __impure = true; inherit impure base; args = sh "echo $impure $base > $out"; };
  wrongly-pure = d (floating // { name = "wrongly-pure"; inherit impure; args = sh "echo $impure > $out"; });
in { inherit base text flat git above fixed deferred structured top maker impure of-impure wrongly-pure; }
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

    /// As [`Self::realise`], for impure derivations too: Nix builds them, and then cannot say where.
    fn realise_any(&self, drv: &StorePath) -> Result<()> {
        let said = match self.realise(drv) {
            Ok(()) => return Ok(()),
            Err(error) => format!("{error:#}"),
        };
        ensure!(said.contains("cannot operate on output 'out' of the unbuilt derivation"), "{said}");
        Ok(())
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

    // What Nix shows of them comes to the same.
    let shown = side.nix("nix", &["derivation", "show", "--recursive", &dir.full(&top)])?;
    let mut request = side.home.drover(&["request", "-", "--store", &side.store()])?;
    let of_json = xtask::run::filter(&mut request, shown.as_bytes())?;
    let mut request = side.home.drover(&["request", &dir.full(&top), "--store", &side.store()])?;
    assert_eq!(of_json, xtask::run::stdout(&mut request)?);
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

#[test]
fn builds_from_the_bottom_up_are_what_nix_builds() -> Result<()> {
    let side = Side::new()?;
    let dir = StoreDir::default();
    let wanted = ["top", "maker", "of-impure"].map(|name| side.instantiate(name));
    let wanted: Vec<StorePath> = wanted.into_iter().collect::<Result<_>>()?;
    let files: Vec<String> = wanted.iter().map(|drv| side.file(drv).display().to_string()).collect();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();

    // Without what is below, it can be said only that something is missing.
    let output = side.home.run(&[&["build"], &files[..]].concat())?;
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.is_empty(), "nothing was tried");
    let plan = side.home.run(&[&["plan", "--recursive"], &files[..]].concat())?;
    let plan = String::from_utf8(plan.stdout)?;
    ensure!(plan.contains("known when what makes them is built") && plan.contains("after: base-"), "{plan}");

    let built = requests(&side.home.run(&[&["build", "--recursive", "-o", "json"], &files[..]].concat())?)?;
    assert_eq!(built.len(), 12);
    for drv in &wanted {
        side.realise_any(drv)?;
    }
    let store = side.open()?;
    let mut addressed = 0;
    for request in &built {
        let name = request.metadata.name.as_deref().unwrap_or_default();
        let spec = request.spec.derivation.as_ref().context("a derivation")?;
        let status = request.status.as_ref().context("a status")?;
        assert_eq!(status.outputs.len(), spec.outputs.len(), "{name}");
        for output in status.outputs.values() {
            let path = dir.parse(output.path.as_bytes())?;
            let info =
                store.path_info(&path)?.with_context(|| format!("{name}: Nix did not build {path}"))?;
            let references: Vec<String> = info.references.iter().map(|path| dir.full(path)).collect();
            assert_eq!((&output.nar_hash, &output.references), (&info.nar_hash.to_string(), &references));
            assert_eq!(output.ca, info.ca.as_ref().map(ToString::to_string), "{name}");
            addressed += usize::from(output.ca.is_some());
            // Who built it is the resolved derivation, but for fixed outputs, which Nix also resolves.
            if spec.name != "fixed" {
                assert_eq!(status.drv_path, info.deriver.map(|drv| dir.full(&drv)), "{name}");
            }
        }
    }
    assert_eq!(addressed, 10);
    let ours = side.home.store().display().to_string();
    side.nix("nix-store", &["--store", &ours, "--verify", "--check-contents"])?;

    // With all of it in the store of the .drv files, the last is built alone, and of the rest nothing is.
    let again = requests(&side.home.run(&["build", "--recursive", "-o", "json", files[0]])?)?;
    assert_eq!(again.len(), 1);
    assert_eq!(
        again[0].spec,
        built
            .iter()
            .find(|request| request.metadata.name == again[0].metadata.name)
            .context("the same")?
            .spec
    );
    Ok(())
}

/// What an operator does with the same requests, with a class that believes nothing: trust is `drover build`'s only for
/// what is its user's own.
#[test]
fn sessions_that_believe_nothing_take_them_all() -> Result<()> {
    let side = Side::new()?;
    let dir = StoreDir::default();
    let top = side.instantiate("top")?;
    side.realise(&top)?;
    let options = CacheOptions::default();
    let (cache, spool) = (side.home.path().join("cache"), side.home.path().join("spool"));
    std::fs::create_dir_all(&cache)?;
    std::fs::create_dir_all(&spool)?;
    let push = drover_cache::open(&format!("file://{}", cache.display()), &options)?;
    let proven = Arc::default();
    let store = side.open()?;
    for request in requests(&side.request(&top, &["--recursive"])?)? {
        let drv_path = convert::drv_path(&request.spec, &dir)?.context("a drvPath")?;
        let Target::Derivation(derivation) = convert::target(&request.spec, &dir)? else {
            anyhow::bail!("{drv_path} has no derivation")
        };
        let job = Job {
            dir: dir.clone(),
            drv_path,
            derivation,
            options: BuildOptions::default(),
            // What was built before comes from where it was put.
            caches: vec![Arc::clone(&push)],
            push: Some(Arc::clone(&push)),
            signing_key: None,
            trust: Trust::Verified,
            proven: Arc::clone(&proven),
            max_output_bytes: None,
            spool_dir: spool.clone(),
            kept: Arc::default(),
        };
        let mut builder = Command::new(program("drover-builder")?);
        builder.args(["serve", "--write", "--store"]).arg(side.home.store()).stderr(Stdio::null());
        let mut child = builder.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (input, output) = (child.stdout.take().context("stdout")?, child.stdin.take().context("stdin")?);
        let outcome = drover_session::run(input, output, &job, &mut |_| {})?;
        child.wait()?;
        for output in outcome.outputs.values() {
            let info =
                store.path_info(&output.path)?.with_context(|| format!("not Nix's: {}", output.path))?;
            assert_eq!((output.nar_hash, &output.ca), (info.nar_hash, &info.ca), "{}", output.path);
        }
    }
    Ok(())
}

#[test]
fn a_failure_below_is_said_of_what_is_above() -> Result<()> {
    let side = Side::new()?;
    let expression = r#"
      let floating = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; system = "x86_64-linux";
            builder = "/bin/sh"; };
          bad = derivation (floating // { name = "bad"; args = [ "-c" "echo no; exit 7" ]; });
          wrong = derivation { name = "wrong"; system = "x86_64-linux"; builder = "/bin/sh"; outputHashMode = "flat";
            outputHashAlgo = "sha256"; outputHash = builtins.hashString "sha256" "right"; args = [ "-c" "echo wrong > $out" ]; };
      in derivation (floating // { name = "above"; inherit bad wrong; args = [ "-c" "echo $bad > $out" ]; })
    "#;
    let drv = side.nix("nix-instantiate", &["-E", expression])?;
    let drv = side.file(&StoreDir::default().parse(drv.trim().as_bytes())?).display().to_string();
    let output = side.home.run(&["build", "--recursive", "-o", "json", &drv])?;
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let list: Value = serde_json::from_slice(&output.stdout)?;
    let of = |name: &str| -> Result<Value> {
        let items = list["items"].as_array().context("a List")?;
        let named =
            |item: &&Value| item["metadata"]["name"].as_str().is_some_and(|text| text.starts_with(name));
        Ok(items.iter().find(named).with_context(|| format!("no {name}"))?["status"]["failure"].clone())
    };
    assert_eq!((&of("bad")?["reason"], &of("bad")?["logTail"][0]), (&"BuildFailed".into(), &"no".into()));
    let above = of("above")?;
    assert_eq!(above["reason"], "InputMissing");
    ensure!(above["message"].as_str().is_some_and(|text| text.contains("was not built")), "{above}");
    // Both hashes, in the form that goes into an expression.
    let wrong = of("wrong")?;
    assert_eq!(wrong["reason"], "OutputHashMismatch");
    for hash in [
        "sha256-JwQvTm7KfQsqfuQCbfLs+lHTM55tEiqgmRGOzYVjutk=",
        "sha256-VD34n+yFscKA5b57xqM+MSA1A81u2zCEMS3k21qbQ2w=",
    ] {
        ensure!(wrong["message"].as_str().is_some_and(|text| text.contains(hash)), "{hash}: {wrong}");
    }
    Ok(())
}

#[test]
fn limits_and_what_is_kept() -> Result<()> {
    let side = Side::new()?;
    let make = |script: &str| -> Result<String> {
        let script = script.replace('"', "\\\"");
        let expression = format!(
            r#"derivation {{ name = "x"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "{script}" ]; }}"#
        );
        let drv = side.nix("nix-instantiate", &["-E", &expression])?;
        Ok(side.file(&StoreDir::default().parse(drv.trim().as_bytes())?).display().to_string())
    };
    let busy = make("while :; do :; done")?;
    let loud = make("while :; do echo 0123456789; done")?;
    let bad = make("echo kept > left; exit 3")?;
    for (drv, options, reason) in [
        (&busy, &["--timeout", "1"][..], "TimedOut"),
        (&busy, &["--max-silent-time", "1"], "MaxSilentExceeded"),
        (&loud, &["--max-log-bytes", "1000"], "LogLimitExceeded"),
        (&bad, &["--keep-failed"], "BuildFailed"),
    ] {
        let output = side.home.run(&[&["build", "-o", "json", drv], options].concat())?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let request: BuildRequest = serde_json::from_slice(&output.stdout)?;
        let status = request.status.context("a status")?;
        assert_eq!(status.failure.context("a failure")?.reason, reason, "{options:?}: {said}");
        let sandbox = status.builder.context("a builder")?.sandbox.context("a sandbox")?;
        assert_eq!(sandbox, "nested");
        ensure!(!said.contains("sandbox: "), "that line is no part of the log: {said}");
        if options == ["--keep-failed"] {
            let kept = side.home.store().join("nix/var/nix/builds");
            let tops: Vec<_> = std::fs::read_dir(&kept)?.collect::<std::io::Result<_>>()?;
            assert_eq!(tops.len(), 1, "{said}");
            assert_eq!(std::fs::read_to_string(tops[0].path().join("build/left"))?, "kept\n");
            ensure!(said.contains(&*tops[0].path().to_string_lossy()), "{said}");
        }
    }
    Ok(())
}

/// Nix 2.34 hashes content that refers to itself in another way than 2.35 and Drover; a builder can be told to do as it
/// does, and then the paths are the same.
#[test]
fn references_to_itself_as_nix_hashes_them() -> Result<()> {
    let side = Side::new()?;
    let expression = r#"derivation { name = "own"; system = "x86_64-linux"; builder = "/bin/sh"; __contentAddressed = true;
        outputHashMode = "recursive"; outputHashAlgo = "sha256"; args = [ "-c" "echo $out twice: $out > $out" ]; }"#;
    let drv = side.nix("nix-instantiate", &["-E", expression])?;
    let theirs = side.nix("nix-store", &["--realise", drv.trim()])?;
    let file = side.file(&StoreDir::default().parse(drv.trim().as_bytes())?).display().to_string();
    let mut paths = Vec::new();
    for how in ["with-offsets", "without-offsets"] {
        let mut build = side.home.drover(&["build", "-o", "json", &file])?;
        build.env("DROVER_SELF_REFERENCE_HASH", how);
        let built = requests(&build.output()?)?.remove(0);
        let output = built.status.context("a status")?.outputs.remove("out").context("an output")?;
        assert_eq!(output.references, std::slice::from_ref(&output.path), "{how}");
        paths.push(output.path);
    }
    assert_ne!(paths[0], theirs.trim());
    assert_eq!(paths[1], theirs.trim());
    Ok(())
}
