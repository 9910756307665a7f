//! Drover's builder against real Nix: the same derivations give the same outputs, and Nix is content with the store
//! that they end up in.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, ensure};
use drover_nix::{PathInfo, StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildStatus, Client};
use drover_store::{Access, LocalStore, StoreLayout};
use drover_tests::{Nix, Peer, program, sqlite};
use xtask::checkout;

/// One store, of real Nix or of the builder. Its read-only trees go with it.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Result<Self> {
        let root = tempfile::tempdir()?;
        std::fs::create_dir(root.path().join("nix"))?;
        Ok(Self(root))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn store(&self) -> Result<LocalStore> {
        Ok(LocalStore::open(StoreLayout::in_root(self.path()), Access::ReadOnly)?)
    }

    fn as_nix(&self, peer: &Peer) -> Peer {
        peer.clone().with_at(&self.path().join("nix"), "/nix")
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = drover_store::fs::delete(&self.path().join("nix"));
    }
}

/// A session with our builder.
struct Builder {
    client: Client<ChildStdout, ChildStdin>,
    child: Child,
    log: JoinHandle<String>,
}

impl Builder {
    fn start(root: &Root) -> Result<Self> {
        let mut command = Command::new(program("drover-builder")?);
        command.args(["serve", "--write", "--store"]).arg(root.path());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut stderr = child.stderr.take().context("no stderr")?;
        let log = std::thread::spawn(move || {
            let mut log = Vec::new();
            let _ = stderr.read_to_end(&mut log);
            String::from_utf8_lossy(&log).into_owned()
        });
        let (input, output) = (child.stdout.take(), child.stdin.take());
        let (input, output) = (input.context("no stdout")?, output.context("no stdin")?);
        Ok(Self { client: Client::connect(input, output, StoreDir::default())?, child, log })
    }

    /// Adds `info` with the contents that `from` has.
    fn add(&mut self, from: &LocalStore, info: &PathInfo) -> Result<()> {
        let mut nar = Vec::new();
        from.dump(&info.path, &mut nar)?;
        Ok(self.client.add_to_store_nar(info, &mut nar.as_slice())?)
    }

    fn end(mut self) -> Result<String> {
        drop(self.client);
        let status = self.child.wait()?;
        let log = self.log.join().expect("reading the log does not panic");
        ensure!(status.success(), "the builder ended with {status}: {log}");
        Ok(log)
    }
}

/// Real Nix builds `args`' derivations in one store, ours in another from the same `.drv` files, which must come out the
/// same. Returns the log of ours.
pub(crate) fn build_by_both(peer: &Peer, args: &[&str]) -> Result<String> {
    let (theirs, ours) = (Root::new()?, Root::new()?);
    let nix = theirs.as_nix(peer);
    let drv = nix.run("nix-instantiate", args)?;
    let drv = drv.trim();
    nix.run("nix-store", &["--realise", drv])?;

    let dir = StoreDir::default();
    let reference = theirs.store()?;
    let mut builder = Builder::start(&ours)?;
    let mut built = 0;
    for drv_path in in_order(&reference, dir.parse(drv.as_bytes())?)? {
        let derivation = reference.read_derivation(&drv_path)?;
        let resolved = derivation.resolve(&dir, |drv, output| {
            reference.derivation_outputs(drv).ok().and_then(|outputs| outputs.get(output).cloned())
        })?;
        // What no build of ours made is a source.
        let known =
            builder.client.query_valid_paths(&reference.closure(&resolved.input_srcs)?, true, false)?;
        for source in &derivation.basic.input_srcs {
            for path in reference.closure(&[source.clone()].into())?.difference(&known) {
                builder.add(&reference, &reference.path_info(path)?.context("a closure is valid")?)?;
            }
        }
        let result = builder.client.build_derivation(&drv_path, &resolved, &BuildOptions::default())?;
        ensure!(result.status == BuildStatus::Built, "{drv_path}: {result:?}");
        for (name, output) in &result.built_outputs {
            let path = [output.path.clone()].into();
            let ours = builder.client.query_path_infos(&path)?.remove(&output.path).context("not valid")?;
            let theirs = reference.path_info(&output.path)?.context("Nix built something else")?;
            ensure!(
                (ours.nar_hash, ours.nar_size, &ours.references, &ours.deriver, &ours.ca)
                    == (theirs.nar_hash, theirs.nar_size, &theirs.references, &theirs.deriver, &theirs.ca),
                "{drv_path} {name}: {ours:?} is not {theirs:?}"
            );
            built += 1;
        }
    }
    ensure!(built > 0);
    let log = builder.end()?;
    ours.as_nix(peer).run("nix-store", &["--verify", "--check-contents"])?;
    Ok(log)
}

/// The derivations that `drv` needs and itself, inputs first.
fn in_order(store: &LocalStore, drv: StorePath) -> Result<Vec<StorePath>> {
    fn visit(
        store: &LocalStore,
        drv: StorePath,
        seen: &mut BTreeSet<StorePath>,
        order: &mut Vec<StorePath>,
    ) -> Result<()> {
        if seen.insert(drv.clone()) {
            for input in store.read_derivation(&drv)?.input_drvs.into_keys() {
                visit(store, input, seen, order)?;
            }
            order.push(drv);
        }
        Ok(())
    }
    let (mut seen, mut order) = (BTreeSet::new(), Vec::new());
    visit(store, drv, &mut seen, &mut order)?;
    Ok(order)
}

#[test]
fn sqlite_and_what_uses_it() -> Result<()> {
    let inputs = sqlite::inputs()?;
    let expression = checkout().join("tests/derivations/sqlite");
    let peer = Peer::new(Nix::V2_34)?.with(&inputs).with(&expression);
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let file = text(&expression.join("default.nix"));
    let [tcc, libc, sqlite] = ["tcc", "libc", "sqlite"].map(|name| text(&inputs.join(name)));
    let args = [
        &file, "-A", "database", "--argstr", "tcc", &tcc, "--argstr", "libc", &libc, "--argstr", "sqlite",
        &sqlite,
    ];
    build_by_both(&peer, &args)?;
    Ok(())
}

/// Only what the sandbox's shell can do by itself: Nix's own sandbox has nothing else either.
const FEATURES: &str = r#"
let
  make = attrs: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
  source = builtins.toFile "source" "text\n";
  files = make {
    name = "files";
    passAsFile = [ "text" ];
    text = "passed as a file";
    exportReferencesGraph = [ "graph" source ];
    args = [ "-ec" ''
      read -r line < "$textPath" || :
      { echo "$line"; while read -r line; do echo "$line"; done < graph; } > $out
    '' ];
  };
  structured = make {
    name = "structured";
    __structuredAttrs = true;
    list = [ "a b" 1 true null ];
    table = { "k'" = "v"; number = 2; };
    inherit source;
    args = [ "-ec" ''
      { while read -r line; do echo "$line"; case $line in "declare -A outputs="*) out=$line; esac; done < "$NIX_ATTRS_SH_FILE"; } > log
      out=''${out#*=*=\'}; out=''${out%%\'*}
      { while read -r line; do echo "$line"; done < log; read -r line < "$NIX_ATTRS_JSON_FILE" || :; echo "$line"; } > $out
    '' ];
  };
in make {
  name = "all";
  outputs = [ "out" "dev" ];
  args = [ "-c" "echo ${files} ${structured} $dev > $out; echo dev > $dev" ];
}
"#;

#[test]
fn features_of_derivations() -> Result<()> {
    build_by_both(&Peer::new(Nix::V2_34)?, &["-E", FEATURES])?;
    Ok(())
}
