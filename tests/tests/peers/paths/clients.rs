//! What real Nix clients send to have built, against what Drover resolves from the same `.drv` files.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};

use anyhow::{Result, ensure};
use drover_nix::derivation::proof::Proven;
use drover_nix::{BasicDerivation, PathInfo, StoreDir, StorePath};
use drover_serve::{Backend, BoxError, BuildOptions, BuildResult, BuildStatus, ReceivedPath, serve};
use drover_tests::{Nix, Remote};

use super::prove;

/// Several outputs, of which others use some; a source, a fixed output, structured attributes; a diamond.
const GRAPH: &str = r#"
let
  d = a: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // a);
  source = builtins.toFile "source" "text\n";
  lib = d { name = "lib"; outputs = [ "out" "dev" "doc" ]; inherit source;
    args = [ "-c" "read l < $source; echo $l > $out; echo $out > $dev; echo > $doc" ]; };
  fixed = d { name = "fixed"; outputHashMode = "flat"; outputHashAlgo = "sha256"; inherit lib;
    outputHash = builtins.hashString "sha256" "x\n"; args = [ "-c" "echo x > $out" ]; };
  left = d { name = "left+a.b_c?=d"; inherit fixed; doc = lib.doc; args = [ "-c" "echo ${lib.dev} $doc > $out" ]; };
  right = d { name = "right"; __structuredAttrs = true; list = [ lib fixed 1.5 ]; text = "\"\\\n\t";
    args = [ "-c" ''while read -r line; do case $line in "declare -A outputs="*) o=''${line#*=*=\'}; o=''${o%%\'*}; esac; done < "$NIX_ATTRS_SH_FILE"
      echo right > "$o"'' ]; };
in d { name = "top"; inherit left right; args = [ "-c" "echo $left ${lib} > $out" ]; odd = "\r\"\\ é"; empty = ""; }
"#;

/// Takes everything, and keeps what was to be built.
#[derive(Default)]
struct Listener(Vec<(StorePath, BasicDerivation)>);

impl Backend for Listener {
    fn query_valid_paths(
        &mut self,
        _paths: &BTreeSet<StorePath>,
        _lock: bool,
        _substitute: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        Ok(BTreeSet::new())
    }

    fn path_info(&mut self, _path: &StorePath) -> Result<Option<PathInfo>, BoxError> {
        Ok(None)
    }

    fn dump(&mut self, path: &StorePath, _nar: &mut dyn Write) -> Result<(), BoxError> {
        // The recorded client went on, and so does this; nobody reads it.
        Err(format!("{path} is not here").into())
    }

    fn add_nar(&mut self, _path: ReceivedPath, nar: &mut dyn Read) -> Result<(), BoxError> {
        std::io::copy(nar, &mut std::io::sink())?;
        Ok(())
    }

    fn build_derivation(
        &mut self,
        drv_path: &StorePath,
        derivation: &BasicDerivation,
        _options: &BuildOptions,
    ) -> Result<BuildResult, BoxError> {
        self.0.push((drv_path.clone(), derivation.clone()));
        Ok(BuildResult::new(BuildStatus::Built))
    }

    fn query_closure(
        &mut self,
        paths: &BTreeSet<StorePath>,
        _include_outputs: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        Ok(paths.clone())
    }
}

#[test]
fn what_real_clients_send_is_what_is_resolved() -> Result<()> {
    for nix in Nix::ALL {
        let dir = StoreDir::default();
        let recordings = tempfile::tempdir()?;
        let remote = Remote::recording(nix, recordings.path())?;
        let machine = format!("{} x86_64-linux - 1 1", remote.uri("server"));
        let build = ["--no-out-link", "--max-jobs", "0", "--builders", &machine, "-E", GRAPH];
        remote.run("nix-build", &build)?;
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(remote.path("client/nix/store"))? {
            let entry = entry?;
            if let Some(path) = entry.file_name().to_str().and_then(|name| name.parse::<StorePath>().ok())
                && path.is_derivation()
            {
                files.insert(path, std::fs::read(entry.path())?);
            }
        }
        let mut sent = BTreeMap::new();
        for entry in std::fs::read_dir(recordings.path())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "requests") {
                let mut listener = Listener::default();
                // Up to where the client asks for an output.
                let _cut = serve(std::fs::File::open(&path)?, std::io::sink(), &mut listener, &dir, true);
                sent.extend(listener.0);
            }
        }
        let mut proven = Proven::default();
        for (path, sent) in &sent {
            prove(&mut proven, &files, path)?;
            let resolved = proven.resolve(&dir, path)?;
            // Nix names the whole closure of the inputs.
            ensure!(
                resolved.input_srcs.is_subset(&sent.input_srcs),
                "{nix:?}: {path}: {:?}",
                sent.input_srcs
            );
            let mut same = sent.clone();
            same.input_srcs.clone_from(&resolved.input_srcs);
            ensure!(same == resolved, "{nix:?}: {path}: {same:?}");
            proven.entitles(&dir, path, sent, &sent.input_srcs)?;
        }
        let names: Vec<&str> = sent.values().map(|drv| drv.name.as_str()).collect();
        ensure!(sent.len() == 5, "{nix:?} had these built: {names:?}");
    }
    Ok(())
}
