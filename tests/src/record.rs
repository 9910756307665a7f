//! What real Nix clients say to Drover's builder and what it answers, byte for byte: material for fuzzing, and for whoever
//! wants to see the protocol. Nothing of it is kept in the repository; it is recorded anew where it is needed.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::{Nix, Remote};

/// A source, a derivation with two outputs that uses it, and one that uses that; and one that fails.
pub const CHAIN: &str = r#"
let
  source = builtins.toFile "source" "some text\n";
  make = attrs: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
  lib = make { name = "lib"; args = [ "-c" "read line < ${source}; echo $line from ${source} > $out" ]; };
in {
  user = make { name = "user"; outputs = [ "out" "dev" ]; args = [ "-c" "echo ${lib} > $out; echo $out > $dev; echo loud" ]; };
  failing = make { name = "failing"; args = [ "-c" "echo oh no; exit 3" ]; };
}
"#;

/// One session: the bytes of both directions, each in a file.
#[derive(Clone, Debug)]
pub struct Recording {
    pub nix: Nix,
    /// What the client was doing, in a word or two.
    pub name: &'static str,
    /// From the client, greeting included.
    pub requests: PathBuf,
    /// From the builder, greeting included.
    pub answers: PathBuf,
}

/// Has a real Nix of every version copy there and back, query, and build in every way that it knows, and leaves the
/// sessions in `dir`, which exists, is empty and lies below `/tmp`. Takes root, and some seconds a version.
pub fn record(dir: &Path) -> Result<Vec<Recording>> {
    let mut all = Vec::new();
    for nix in Nix::ALL {
        let version = nix.version();
        for (name, act) in ACTS {
            let into = dir.join(format!("{version}-{name}"));
            std::fs::create_dir_all(&into)?;
            let remote = Remote::recording(nix, &into)?;
            act(&remote).with_context(|| format!("recording {name} of Nix {version}"))?;
            let before = all.len();
            all.extend(sessions(nix, name, &into)?);
            ensure!(all.len() > before, "Nix {version} held no session to {name}");
        }
    }
    Ok(all)
}

type Act = fn(&Remote) -> Result<()>;

const ACTS: [(&str, Act); 4] = [
    ("copy", |remote| {
        let out = remote.run("nix-build", &["--no-out-link", "-A", "user", "-E", CHAIN])?;
        let (out, uri) = (out.lines().next().context("no output")?, remote.uri("server"));
        remote.nix(&["copy", "--no-check-sigs", "--to", &uri, out])?;
        let back = remote.path("back");
        let back = back.to_str().context("temporary directories are UTF-8")?;
        remote.nix(&["copy", "--no-check-sigs", "--from", &uri, "--to", back, out]).map(drop)
    }),
    ("build", |remote| {
        let machine = format!("{} x86_64-linux - 1 1", remote.uri("server"));
        let args = ["--no-out-link", "--max-jobs", "0", "--builders", &machine, "-A", "user", "-E", CHAIN];
        remote.run("nix-build", &args).map(drop)
    }),
    ("fail", |remote| {
        let machine = format!("{} x86_64-linux - 1 1", remote.uri("server"));
        let args = ["--no-out-link", "--max-jobs", "0", "--builders", &machine, "-A", "failing", "-E", CHAIN];
        ensure!(!remote.output("nix-build", &args)?.status.success(), "it does not fail");
        Ok(())
    }),
    // Nix up to 2.34 asks for no more than this: of a derivation that the store has it wants to read the file first,
    // which it cannot do over this protocol.
    ("build-paths", |remote| {
        let uri = remote.uri("server");
        let drv = remote.run("nix-instantiate", &["-A", "user", "-E", CHAIN])?;
        let source = remote.run("nix-store", &["-q", "--requisites", drv.trim()])?;
        let source = source.lines().next().context("it requires something")?;
        ensure!(!remote.output("nix-store", &["--store", &uri, "--realise", drv.trim()])?.status.success());
        remote.nix(&["copy", "--no-check-sigs", "--derivation", "--to", &uri, drv.trim()])?;
        remote.run("nix-store", &["--store", &uri, "--realise", source]).map(drop)
    }),
];

fn sessions(nix: Nix, name: &'static str, dir: &Path) -> Result<Vec<Recording>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let requests = entry?.path();
        if requests.extension().is_some_and(|extension| extension == "requests") {
            let answers = requests.with_extension("answers");
            found.push(Recording { nix, name, requests, answers });
        }
    }
    found.sort_by(|a, b| a.requests.cmp(&b.requests));
    Ok(found)
}
