//! Real Nix clients of every version against Drover's builder, as their `ssh://` store: copying there and back, and
//! building remotely. A host named `localhost` makes Nix start the program itself, without SSH.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use drover_nix::{StoreDir, StorePath};
use drover_tests::{Nix, Peer, program};

/// Something with references, and one that uses it and needs nothing but a shell.
const CHAIN: &str = r#"
let
  source = builtins.toFile "source" "some text\n";
  make = attrs: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
  lib = make { name = "lib"; args = [ "-c" "read line < ${source}; echo $line from ${source} > $out" ]; };
in make { name = "user"; outputs = [ "out" "dev" ]; args = [ "-c" "echo ${lib} > $out; echo $out > $dev; echo loud" ]; }
"#;

/// A client with a store at `/nix`, and a script that starts our builder with a store elsewhere.
struct World {
    peer: Peer,
    dir: tempfile::TempDir,
    remote: String,
}

impl World {
    fn new(nix: Nix) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let client = dir.path().join("client/nix");
        std::fs::create_dir_all(&client)?;
        let builder = program("drover-builder")?;
        // Seen inside: the program itself, and a shell for builds, which goes by its file name.
        std::fs::copy("/bin/busybox", dir.path().join("busybox"))?;
        let wrapper = dir.path().join("remote");
        let (root, builder_text) = (dir.path().display(), builder.display());
        let text = format!(
            "#!/bin/sh\nexec {builder_text} \"$@\" --store {root}/server --sandbox-shell {root}/busybox\n"
        );
        std::fs::write(&wrapper, text)?;
        std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755))?;
        // Nix 2.8 starts programs on `localhost` by bash, which its root filesystem has not; any shell will do.
        let bash = dir.path().join("bin/bash");
        std::fs::create_dir(dir.path().join("bin"))?;
        std::fs::write(&bash, "#!/bin/sh\nexec /bin/sh \"$@\"\n")?;
        std::fs::set_permissions(&bash, std::fs::Permissions::from_mode(0o755))?;
        let peer = Peer::new(nix)?.with_at(&client, "/nix").with(&builder);
        let remote = format!("ssh://localhost?remote-program={}", wrapper.display());
        Ok(Self { peer, dir, remote })
    }

    /// A program of this Nix.
    fn command(&self, program: &str, args: &[&str]) -> Result<Command> {
        let mut command = self.peer.command("sh")?;
        let set_path = format!("PATH={}/bin:$PATH; exec \"$@\"", self.dir.path().display());
        command.args(["-c", &set_path, "sh", program]).args(args);
        Ok(command)
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.command(program, args)?.output()?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {args:?} fails: {log}");
        Ok(String::from_utf8(output.stdout)?)
    }

    fn nix(&self, args: &[&str]) -> Result<String> {
        self.run("nix", &[&["--extra-experimental-features", "nix-command"], args].concat())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in ["client/nix", "server/nix", "back/nix"] {
            let _ = drover_store::fs::delete(&self.dir.path().join(name));
        }
    }
}

fn parse(path: &str) -> Result<StorePath> {
    Ok(StoreDir::default().parse(path.lines().next().context("no path")?.as_bytes())?)
}

#[test]
fn every_real_client_copies_there_and_back() -> Result<()> {
    for nix in Nix::ALL {
        let world = World::new(nix)?;
        let out = world.run("nix-build", &["--no-out-link", "-A", "out", "-E", CHAIN])?;
        let path = parse(&out)?;
        let out = out.trim();
        world.nix(&["copy", "--no-check-sigs", "--to", &world.remote, out]).context("there")?;
        let server = world.dir.path().join("server/nix/store");
        ensure!(server.join(path.as_str()).is_file(), "{nix:?}: it did not arrive");
        // And everything that it needs: lib and its source.
        ensure!(
            std::fs::read_dir(&server)?
                .filter(|entry| entry
                    .as_ref()
                    .is_ok_and(|e| !e.file_name().to_string_lossy().starts_with('.')))
                .count()
                >= 3
        );
        let back = world.dir.path().join("back");
        let back = back.to_string_lossy();
        world
            .nix(&["copy", "--no-check-sigs", "--from", &world.remote, "--to", &back, out])
            .context("back")?;
        let hash = |store: &[&str]| {
            let args = [store, &["-q", "--hash", out]].concat();
            world.run("nix-store", &args)
        };
        ensure!(hash(&[])? == hash(&["--store", &back])?, "{nix:?}");
    }
    Ok(())
}

#[test]
fn every_real_client_builds_remotely() -> Result<()> {
    for nix in Nix::ALL {
        let world = World::new(nix)?;
        let machine = format!("{} x86_64-linux - 1 1", world.remote);
        let args = ["--no-out-link", "--max-jobs", "0", "--builders", &machine, "-A", "out", "-E", CHAIN];
        let output = world.command("nix-build", &args)?.output()?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{nix:?}: {log}");
        ensure!(log.contains("loud"), "{nix:?}: the log is not passed on: {log}");
        let out = String::from_utf8(output.stdout)?;
        let path = parse(&out)?;
        // Built over there, copied back here.
        for store in ["client", "server"] {
            let file = world.dir.path().join(store).join("nix/store").join(path.as_str());
            ensure!(file.is_file(), "{nix:?}: {} is not there", file.display());
        }
        world.run("nix-store", &["--verify", "--check-contents"])?;
    }
    Ok(())
}

#[test]
fn every_real_client_learns_that_a_build_failed() -> Result<()> {
    for nix in Nix::ALL {
        let world = World::new(nix)?;
        let machine = format!("{} x86_64-linux - 1 1", world.remote);
        let failing = r#"derivation { name = "failing"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo oh no; exit 3" ]; }"#;
        let args = ["--no-out-link", "--max-jobs", "0", "--builders", &machine, "-E", failing];
        let output = world.command("nix-build", &args)?.output()?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && log.contains("oh no"), "{nix:?}: {log}");
        ensure!(log.contains("exit code 3"), "{nix:?}: {log}");
    }
    Ok(())
}
