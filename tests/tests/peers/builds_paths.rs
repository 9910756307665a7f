//! BuildPaths on `.drv` files that real Nix wrote: what they depend on is built first, and failures say whose they are.

use anyhow::{Context as _, Result, ensure};
use drover_nix::{StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildStatus, BuildTarget, Error};
use drover_store::{Access, LocalStore, StoreLayout};

use super::builds_fixture::{Reader, Session, Store};

/// A diamond with a failure beside it.
const DERIVATIONS: &str = r#"
let
  make = name: attrs: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
  source = builtins.toFile "source" "text\n";
  base = make "base" {
    outputs = [ "out" "dev" ];
    args = [ "-ec" "echo building base; echo ${source} > $out; echo headers > $dev" ];
  };
  left = make "left" { args = [ "-ec" "echo building left; echo ${base} > $out" ]; };
  right = make "right" { args = [ "-ec" "echo building right; echo ${base.dev} > $out" ]; };
  broken = make "broken" { args = [ "-ec" "echo it is broken; exit 3" ]; };
in {
  top = make "top" { args = [ "-ec" "echo building top; echo ${left} ${right} > $out" ]; };
  hopeless = make "hopeless" { args = [ "-ec" "echo ${left} ${broken} > $out" ]; };
  inherit base broken;
}
"#;

/// The `.drv` files and sources of [`DERIVATIONS`] in a store of Drover's, unbuilt.
struct Instantiated {
    store: Store,
    drvs: Vec<StorePath>,
}

impl Instantiated {
    fn new() -> Result<Self> {
        let (nix, store) = (Store::new()?, Store::new()?);
        let said = nix.nix()?.run("nix-instantiate", &["-E", DERIVATIONS])?;
        let dir = StoreDir::default();
        let drvs: Vec<StorePath> =
            said.lines().map(|line| dir.parse(line.trim().as_bytes())).collect::<Result<_, _>>()?;
        let from = nix.open()?;
        let to = LocalStore::open(StoreLayout::in_root(store.path("")), Access::ReadWrite)?;
        let mut left: Vec<StorePath> = from.closure(&drvs.iter().cloned().collect())?.into_iter().collect();
        while !left.is_empty() {
            let before = left.len();
            for path in std::mem::take(&mut left) {
                let info = from.path_info(&path)?.context("a closure is valid")?;
                if to.valid_paths(&info.other_references().cloned().collect())?.len()
                    < info.other_references().count()
                {
                    left.push(path);
                    continue;
                }
                let mut nar = Vec::new();
                from.dump(&path, &mut nar)?;
                to.add_nar(&info, false, 0, &mut nar.as_slice())?;
            }
            ensure!(left.len() < before, "references run in a circle");
        }
        Ok(Self { store, drvs })
    }

    fn drv(&self, name: &str) -> Result<StorePath> {
        let suffix = format!("-{name}.drv");
        self.drvs.iter().find(|drv| drv.as_str().ends_with(&suffix)).cloned().context("no such derivation")
    }
}

fn target(path: StorePath, outputs: Option<&[&str]>) -> Result<BuildTarget> {
    let outputs = outputs.map(|names| names.iter().map(|name| Ok(name.parse()?)).collect::<Result<_>>());
    Ok(BuildTarget { path, outputs: outputs.transpose()? })
}

fn failure(result: Result<(), Error>) -> Result<(BuildStatus, String)> {
    match result {
        Err(Error::BuildPaths { status, message }) => Ok((status, message)),
        other => anyhow::bail!("{other:?} is no failure to build"),
    }
}

#[test]
fn inputs_are_built_first_and_once() -> Result<()> {
    let here = Instantiated::new()?;
    let mut session = Session::start(here.store.drover(&[])?, Reader::Follows)?;
    let top = target(here.drv("top")?, None)?;
    session.client()?.build_paths(std::slice::from_ref(&top), &BuildOptions::default())?;
    // Again, and some of it by name: there is nothing left to do.
    let dev = target(here.drv("base")?, Some(&["dev"]))?;
    session.client()?.build_paths(&[dev, top], &BuildOptions::default())?;
    let log = session.end(true)?;
    let order: Vec<&str> = log.lines().filter_map(|line| line.strip_prefix("building ")).collect();
    ensure!(order.len() == 4 && order[0] == "base" && order[3] == "top", "{log}");
    here.store.expect_clean()
}

#[test]
fn failures_name_the_derivation_that_failed() -> Result<()> {
    let here = Instantiated::new()?;
    let mut session = Session::start(here.store.drover(&[])?, Reader::Follows)?;
    let client = session.client()?;
    let none = BuildOptions::default();
    let (status, message) = failure(client.build_paths(&[target(here.drv("hopeless")?, None)?], &none))?;
    ensure!(status == BuildStatus::DependencyFailed, "{status:?}: {message}");
    ensure!(message.contains("-broken.drv") && message.contains("exit code 3"), "{message}");
    let (status, message) = failure(client.build_paths(&[target(here.drv("broken")?, None)?], &none))?;
    ensure!(status == BuildStatus::PermanentFailure && message.contains("it is broken"), "{message}");
    let (status, message) =
        failure(client.build_paths(&[target(here.drv("base")?, Some(&["doc"]))?], &none))?;
    ensure!(status == BuildStatus::InputRejected && message.contains("doc"), "{message}");
    let absent = StorePath::from_parts([7; 20], "absent")?;
    let (status, _) = failure(client.build_paths(&[target(absent, None)?], &none))?;
    ensure!(status == BuildStatus::NoSubstituters, "{status:?}");
    let absent = StorePath::from_parts([7; 20], "absent.drv")?;
    let (status, _) = failure(client.build_paths(&[target(absent, None)?], &none))?;
    ensure!(status == BuildStatus::MiscFailure, "{status:?}");
    // None of it ended the session.
    client.build_paths(&[target(here.drv("top")?, None)?], &none)?;
    session.end(true)?;
    here.store.expect_clean()
}

#[test]
fn what_is_left_to_build_ends_with_the_client() -> Result<()> {
    let here = Instantiated::new()?;
    let mut session = Session::start(here.store.drover(&[])?, Reader::Follows)?;
    let mut client = session.client.take().context("the client is there")?;
    let top = target(here.drv("top")?, None)?;
    let answer = std::thread::spawn(move || client.build_paths(&[top], &BuildOptions::default()));
    session.says("building base")?;
    session.end(false)?;
    ensure!(answer.join().expect("the client does not panic").is_err());
    here.store.expect_clean()
}
