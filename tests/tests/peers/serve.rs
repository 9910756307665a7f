//! The serve protocol against real Nix: Drover's client talks to `nix-store --serve --write` of every version.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use anyhow::{Context as _, Result, ensure};
use drover_nix::derivation::{aterm, modulo};
use drover_nix::{
    BasicDerivation, ContentAddress, Derivation, DerivationOutput, Hash, Method, OutputName, PathInfo,
    Sha256, StoreDir, StorePath, nar,
};
use drover_serve::{BuildOptions, BuildStatus, BuildTarget, Error};
use drover_tests::{Nix, Peer};

use crate::store_parts::Session;

/// A Nix with a store of its own at `/nix`, which goes when this is dropped.
struct Server {
    peer: Peer,
    root: tempfile::TempDir,
}

impl Server {
    fn new(nix: Nix) -> Result<Self> {
        let root = tempfile::tempdir()?;
        let at = root.path().join("nix");
        std::fs::create_dir(&at)?;
        Ok(Self { peer: Peer::new(nix)?.with_at(&at, "/nix"), root })
    }

    fn session(&self) -> Result<Session> {
        let mut command = self.peer.command("nix-store")?;
        command.args(["--serve", "--write"]);
        Session::start(command)
    }

    fn verify(&self) -> Result<()> {
        self.peer.run("nix-store", &["--verify", "--check-contents"]).map(drop)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = drover_store::fs::delete(&self.root.path().join("nix"));
    }
}

fn file_nar(contents: &[u8]) -> Result<Vec<u8>> {
    let mut writer = nar::Writer::new(Vec::new());
    writer.file_bytes(false, contents)?;
    Ok(writer.finish()?)
}

/// An object that nothing proves, as most of those in a store are. Real Nix believes the hash part.
fn object(number: u32, contents: &[u8], references: &[&StorePath]) -> Result<(PathInfo, Vec<u8>)> {
    let nar = file_nar(contents)?;
    let mut hash = [7; 20];
    hash[..4].copy_from_slice(&number.to_le_bytes());
    let info = PathInfo {
        path: StorePath::from_parts(hash, "object")?,
        nar_hash: Sha256::of(&nar),
        nar_size: nar.len() as u64,
        references: references.iter().copied().cloned().collect(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    };
    Ok((info, nar))
}

/// An input-addressed derivation of two outputs, or a fixed-output one.
fn derivation(
    script: &str,
    inputs: &[&StorePath],
    fixed: Option<&ContentAddress>,
) -> Result<(StorePath, BasicDerivation)> {
    let dir = StoreDir::default();
    let placeholder = DerivationOutput::InputAddressed(StorePath::from_parts([0; 20], "x")?);
    let outputs = match fixed {
        Some(fixed) => vec![("out", DerivationOutput::CaFixed(fixed.clone()))],
        None => vec![("out", placeholder.clone()), ("dev", placeholder)],
    };
    let mut derivation = BasicDerivation {
        name: "made".into(),
        outputs: outputs
            .into_iter()
            .map(|(name, output)| Ok((name.parse()?, output)))
            .collect::<Result<_>>()?,
        input_srcs: inputs.iter().copied().cloned().collect(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        env: [("PATH".into(), "/bin:/usr/bin".into())].into(),
    };
    for name in derivation.outputs.keys() {
        derivation.env.insert(name.as_str().into(), "".into());
    }
    let paths = match fixed {
        None => modulo::basic_output_paths(&dir, &derivation)?,
        Some(fixed) => [(OutputName::out(), fixed.store_path(&dir, "made", &BTreeSet::new(), false)?)].into(),
    };
    for (name, path) in paths {
        derivation.env.insert(name.as_str().into(), dir.full(&path).into());
        if fixed.is_none() {
            derivation.outputs.insert(name, DerivationOutput::InputAddressed(path));
        }
    }
    let drv = Derivation { basic: derivation, input_drvs: BTreeMap::new() };
    Ok((modulo::drv_path(&dir, &drv)?, drv.basic))
}

#[test]
fn our_client_and_every_real_server() -> Result<()> {
    let dir = StoreDir::default();
    for nix in Nix::ALL {
        let server = Server::new(nix)?;
        let mut session = server.session()?;
        let client = &mut session.client;
        ensure!(client.version().to_string() == "2.7", "{nix:?} speaks {}", client.version());

        // Inputs: locked, sent without waiting in between, and then known as they were sent.
        let (libc, libc_nar) = object(1, b"libc", &[])?;
        let large = vec![b'x'; 3 << 20];
        let (tool, tool_nar) = object(2, &large, &[&libc.path])?;
        let mut own = object(3, b"itself", &[&tool.path])?;
        own.0.references.insert(own.0.path.clone());
        let (own, own_nar) = own;
        let all: BTreeSet<StorePath> = [&libc, &tool, &own].map(|info| info.path.clone()).into();
        ensure!(client.query_valid_paths(&all, true, true)?.is_empty());
        ensure!(client.query_path_infos(&all)?.is_empty());
        client.send_nar(&libc, &mut libc_nar.as_slice())?;
        client.send_nar(&tool, &mut tool_nar.as_slice())?;
        client.send_nar(&own, &mut own_nar.as_slice())?;
        client.finish_nars()?;
        // Once more: what is valid is skipped.
        client.add_to_store_nar(&tool, &mut tool_nar.as_slice())?;
        ensure!(client.query_valid_paths(&all, true, true)? == all);
        let infos = client.query_path_infos(&all)?;
        for info in [&libc, &tool, &own] {
            ensure!(infos[&info.path] == *info, "{nix:?}: {:?} is not {info:?}", infos[&info.path]);
        }
        let mut received = Vec::new();
        client.dump_store_path(&tool.path, &mut received)?;
        ensure!(received == tool_nar);
        ensure!(client.query_closure(&[own.path.clone()].into(), false)? == all);

        // A build with two outputs, one of which refers to the other and to an input.
        let script = format!(
            "echo headers > $dev; echo $out $dev {} > $out; echo this is the log",
            dir.full(&libc.path)
        );
        let (drv_path, drv) = derivation(&script, &[&libc.path, &tool.path], None)?;
        let result = client.build_derivation(&drv_path, &drv, &BuildOptions::default())?;
        ensure!(result.status == BuildStatus::Built, "{nix:?}: {result:?}");
        // Nix 2.34 leaves both times 0 for a build that it did just now.
        ensure!(result.start_time > 0 || nix == Nix::V2_34, "{nix:?}: {result:?}");
        ensure!(result.stop_time >= result.start_time, "{nix:?}: {result:?}");
        let paths = drv.output_paths(&dir)?;
        let paths = paths.iter().map(|(name, path)| Ok((name, path.clone().context("no path")?)));
        for (name, path) in paths.collect::<Result<Vec<_>>>()? {
            if let Some(built) = result.built_outputs.get(name) {
                ensure!(built.path == path);
            }
            let info = client.query_path_infos(&[path.clone()].into())?.remove(&path).context("not valid")?;
            received.clear();
            client.dump_store_path(&path, &mut received)?;
            ensure!((Sha256::of(&received), received.len() as u64) == (info.nar_hash, info.nar_size));
            ensure!(info.references.len() == if name.as_str() == "out" { 3 } else { 0 });
        }
        // The same again is there already.
        let result = client.build_derivation(&drv_path, &drv, &BuildOptions::default())?;
        ensure!(result.status == BuildStatus::AlreadyValid, "{nix:?}: {result:?}");

        let ended = session.finish()?;
        ensure!(ended.success, "{nix:?} ended badly: {}", ended.log);
        ensure!(ended.log.contains("this is the log"), "{nix:?}: {}", ended.log);
        server.verify()?;
    }
    Ok(())
}

#[test]
fn builds_that_fail_on_every_real_server() -> Result<()> {
    for nix in Nix::ALL {
        let server = Server::new(nix)?;
        let mut session = server.session()?;
        let client = &mut session.client;
        let none = BuildOptions::default();
        let silent = BuildOptions { max_silent_seconds: 1, ..none.clone() };
        let short = BuildOptions { timeout_seconds: 1, ..none.clone() };
        let terse = BuildOptions { max_log_bytes: 1000, ..none.clone() };
        let talk = "while :; do echo still here; sleep 0.1; done";
        for (script, options, expected) in [
            ("echo oh no; exit 3", &none, BuildStatus::PermanentFailure),
            ("echo only one > $out", &none, BuildStatus::OutputRejected),
            ("sleep 60", &silent, BuildStatus::TimedOut),
            (talk, &short, BuildStatus::TimedOut),
            (talk, &terse, BuildStatus::LogLimitExceeded),
        ] {
            let (drv_path, drv) = derivation(script, &[], None)?;
            let result = client.build_derivation(&drv_path, &drv, options)?;
            // Nix 2.8 reports a missing output as a failure of its own, not of the build.
            let missing = expected == BuildStatus::OutputRejected && result.status != expected;
            ensure!(result.status == expected || missing, "{nix:?}: {script}: {result:?}");
            ensure!(!result.status.is_success() && result.built_outputs.is_empty(), "{nix:?}: {result:?}");
            ensure!(!result.error_message.is_empty(), "{nix:?}: {script}: {result:?}");
        }
        let declared = ContentAddress { method: Method::Flat, hash: Hash::from(Sha256::of(b"declared\n")) };
        let (drv_path, drv) = derivation("echo declared > $out", &[], Some(&declared))?;
        let result = client.build_derivation(&drv_path, &drv, &none)?;
        ensure!(result.status == BuildStatus::Built, "{nix:?}: {result:?}");
        let declared = ContentAddress { hash: Hash::from(Sha256::of(b"something else\n")), ..declared };
        let (drv_path, drv) = derivation("echo declared > $out", &[], Some(&declared))?;
        let result = client.build_derivation(&drv_path, &drv, &none)?;
        ensure!(result.status == BuildStatus::OutputRejected, "{nix:?}: {result:?}");
        ensure!(session.finish()?.success);
        server.verify()?;
    }
    Ok(())
}

#[test]
fn streams_and_files_of_derivations_on_every_real_server() -> Result<()> {
    let dir = StoreDir::default();
    for nix in Nix::ALL {
        let server = Server::new(nix)?;
        let mut session = server.session()?;
        let client = &mut session.client;

        // Several paths in one export stream, as Hydra sends its inputs.
        let (libc, libc_nar) = object(1, b"libc", &[])?;
        let mut own = object(2, b"itself", &[&libc.path])?;
        own.0.references.insert(own.0.path.clone());
        let (own, own_nar) = own;
        let (mut first, mut second) = (libc_nar.as_slice(), own_nar.as_slice());
        let stream: [(_, &mut dyn Read); 2] = [(&libc, &mut first), (&own, &mut second)];
        client.import_paths(stream)?;
        let both: BTreeSet<StorePath> = [&libc, &own].map(|info| info.path.clone()).into();
        let infos = client.query_path_infos(&both)?;
        ensure!(infos[&libc.path] == libc && infos[&own.path] == own, "{nix:?}: {infos:?}");

        // A derivation that the server has builds by its name; one that fails says so, and the session goes on.
        let mut files = Vec::new();
        for script in ["echo built > $out; echo too > $dev", "echo oh no; exit 3"] {
            let (path, basic) = derivation(script, &[], None)?;
            let drv = Derivation { basic, input_drvs: BTreeMap::new() };
            let nar = file_nar(&aterm::print(&dir, &drv)?)?;
            let (nar_hash, nar_size) = (Sha256::of(&nar), nar.len() as u64);
            let info = PathInfo { path: path.clone(), nar_hash, nar_size, ..libc.clone() };
            client.add_to_store_nar(&info, &mut nar.as_slice())?;
            files.push(path);
        }
        let all = |path: &StorePath| BuildTarget { path: path.clone(), outputs: None };
        let dev: OutputName = "dev".parse()?;
        let only = BuildTarget { outputs: Some([dev].into()), ..all(&files[0]) };
        let options = BuildOptions::default();
        client.build_paths(&[only], &options)?;
        client.build_paths(&[all(&files[0]), all(&libc.path)], &options)?;
        let closure = client.query_closure(&[files[0].clone()].into(), true)?;
        ensure!(closure.len() == 3 && closure.contains(&files[0]), "{nix:?}: {closure:?}");
        match client.build_paths(&[all(&files[1])], &options) {
            Err(Error::BuildPaths { status, message }) => {
                ensure!(
                    !status.is_success() && message.contains("made.drv"),
                    "{nix:?}: {status:?}: {message}"
                );
            }
            other => anyhow::bail!("{nix:?}: {other:?}"),
        }
        ensure!(client.query_valid_paths(&both, false, false)? == both);

        // The stream in the other direction is gone since Nix 2.32.
        let mut nars = Vec::new();
        match client.export_paths(&both, &mut nars) {
            Ok(exported) => {
                ensure!(nix != Nix::V2_34, "{nix:?} has ExportPaths again");
                ensure!(
                    exported == [libc, own] && nars == [libc_nar, own_nar].concat(),
                    "{nix:?}: {exported:?}"
                );
                ensure!(session.finish()?.success, "{nix:?}");
            }
            Err(error) => {
                ensure!(nix == Nix::V2_34 && error.is_disconnect(), "{nix:?}: {error}");
                let log = session.finish()?.log;
                ensure!(log.contains("unknown serve command 5"), "{nix:?}: {log}");
            }
        }
        server.verify()?;
    }
    Ok(())
}

#[test]
fn what_real_servers_refuse_ends_the_session() -> Result<()> {
    for nix in Nix::ALL {
        let server = Server::new(nix)?;
        let (absent, _) = object(1, b"absent", &[])?;
        let (object, nar) = object(2, b"object", &[&absent.path])?;
        let refused = |what: &str, result: Result<(), Error>, session: Session| -> Result<()> {
            let Err(error) = result else { anyhow::bail!("{nix:?} accepts {what}") };
            ensure!(error.is_disconnect(), "{nix:?}: {what}: {error}");
            let ended = session.finish()?;
            ensure!(!ended.success && ended.log.contains("error:"), "{nix:?}: {what}: {}", ended.log);
            Ok(())
        };
        let mut session = server.session()?;
        let result = session.client.add_to_store_nar(&object, &mut nar.as_slice());
        refused("a reference to nothing", result, session)?;
        let mut session = server.session()?;
        let wrong = PathInfo { nar_hash: Sha256::of(b""), ..absent.clone() };
        let result =
            session.client.add_to_store_nar(&wrong, &mut nar.get(..wrong.nar_size as usize).unwrap_or(&nar));
        refused("a wrong hash", result, session)?;
        let mut session = server.session()?;
        let result = session.client.dump_store_path(&absent.path, &mut Vec::new()).map(drop);
        refused("dumping what is not there", result, session)?;
        let session = server.session()?;
        ensure!(session.finish()?.success, "an empty session is a good one");
        server.verify()?;
    }
    Ok(())
}
