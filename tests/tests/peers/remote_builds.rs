//! Real Nix clients that build on Drover's builders, as `--builders` has it: which builder gets what, how many at once,
//! and what the client learns of a failure.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use drover_tests::record::CHAIN;
use drover_tests::{Nix, Remote};

/// `nix-build` that builds nothing itself, with these machines and of this expression.
fn build(
    remote: &Remote,
    machines: &[&str],
    more: &[&str],
    expression: &str,
) -> Result<(bool, String, String)> {
    let machines = machines.join(" ; ");
    let args = ["--no-out-link", "--max-jobs", "0", "--builders", &machines, "-E", expression];
    let output = remote.output("nix-build", &[&args, more].concat())?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.success(), text(output.stdout), text(output.stderr)))
}

#[test]
fn every_real_client_builds_remotely() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let machine = format!("{} x86_64-linux - 1 1", remote.uri("server"));
        let (success, out, log) = build(&remote, &[&machine], &["-A", "user"], CHAIN)?;
        ensure!(success, "{nix:?}: {log}");
        ensure!(log.contains("loud"), "{nix:?}: the log is not passed on: {log}");
        // Built over there, copied back here.
        let out = out.lines().next().unwrap_or_default();
        for store in ["client", "server"] {
            let file = remote.object(store, out);
            ensure!(file.is_file(), "{nix:?}: {} is not there", file.display());
            remote.verify(store)?;
        }
        let (success, again, log) = build(&remote, &[&machine], &["-A", "user"], CHAIN)?;
        ensure!(success && again.lines().next() == Some(out), "{nix:?}: what is there is built again: {log}");
    }
    Ok(())
}

#[test]
fn the_new_commands_build_remotely_as_well() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let file = remote.path("chain.nix");
        std::fs::write(&file, CHAIN)?;
        let file = file.to_str().context("temporary directories are UTF-8")?;
        // Options of the client's that travel: silence and time limits, and that the builder shall fetch by itself.
        let machine = format!("{} x86_64-linux - 1 1", remote.uri("server"));
        let limits =
            ["--max-silent-time", "30", "--timeout", "60", "--builders-use-substitutes", "--keep-failed"];
        let build = ["build", "--no-link", "--max-jobs", "0", "--builders", &machine, "-f", file, "user"];
        remote.nix(&[&build[..], &limits].concat())?;
        let user = remote.run("nix-build", &["--no-out-link", "-A", "user", "-E", CHAIN])?;
        let user = user.lines().next().context("nix-build prints no path")?;
        ensure!(remote.object("server", user).is_file(), "{nix:?}: {user} was built elsewhere");
        remote.verify("server")?;
    }
    Ok(())
}

#[test]
fn every_real_client_learns_that_a_build_failed() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let machine = format!("{} x86_64-linux - 1 1", remote.uri("server"));
        let (success, _, log) = build(&remote, &[&machine], &["-A", "failing"], CHAIN)?;
        ensure!(!success && log.contains("oh no"), "{nix:?}: {log}");
        ensure!(log.contains("exit code 3"), "{nix:?}: {log}");
        remote.verify("server")?;
    }
    Ok(())
}

/// Two derivations, each for builders with a feature that only one of them has.
const FEATURES: &str = r#"
let
  make = name: features: derivation {
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-c" "echo ${name} > $out" ];
    requiredSystemFeatures = features;
  };
in {
  plain = make "plain" [];
  left = make "left" [ "left" ];
  right = make "right" [ "right" "big-parallel" ];
}
"#;

#[test]
fn each_derivation_goes_to_a_builder_with_its_features() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let left = remote.server("left", &["--system-features", "left"])?;
        let right = remote.server("right", &["--system-features", "right big-parallel"])?;
        // The second column of features is what a derivation must ask for to be let in.
        let left = format!("{left} x86_64-linux - 1 1 left left");
        let right = format!("{right} x86_64-linux - 1 1 right,big-parallel");
        let which = ["--keep-going", "-A", "plain", "-A", "left", "-A", "right"];
        let (success, out, log) = build(&remote, &[&left, &right], &which, FEATURES)?;
        ensure!(success, "{nix:?}: {log}");
        let paths: Vec<&str> = out.lines().collect();
        ensure!(paths.len() == 3, "{nix:?}: {out}");
        for (path, builder, other) in
            [(paths[0], "right", "left"), (paths[1], "left", "right"), (paths[2], "right", "left")]
        {
            ensure!(remote.object(builder, path).is_file(), "{nix:?}: {path} is not on {builder}");
            ensure!(!remote.object(other, path).exists(), "{nix:?}: {path} is on {other}");
            ensure!(remote.object("client", path).is_file(), "{nix:?}: {path} did not come back");
        }
        for store in ["left", "right", "client"] {
            remote.verify(store)?;
        }
    }
    Ok(())
}

#[test]
fn a_builder_refuses_what_it_has_no_feature_for() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let uri = remote.server("modest", &["--system-features", "benchmark"])?;
        // The client is told that it has the feature; it has not.
        let machine = format!("{uri} x86_64-linux - 1 1 left,right,big-parallel");
        let (success, _, log) = build(&remote, &[&machine], &["-A", "left"], FEATURES)?;
        ensure!(!success && log.contains("left"), "{nix:?}: {log}");
        remote.verify("modest")?;
    }
    Ok(())
}

/// Two derivations that end when they are told to. The only thing outside that a sandbox shows and that its owner may
/// change meanwhile is the shell's own file: they wait for its sticky bit.
const WAITING: &str = r#"
let
  make = name: derivation {
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-c" "echo ${name} is here; while [ ! -k /bin/sh ]; do :; done; echo done > $out" ];
  };
in [ (make "first") (make "second") ]
"#;

#[test]
fn two_builds_run_at_once_on_a_builder_with_two_slots() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let machine = format!("{} x86_64-linux - 2 1", remote.uri("server"));
        let args = ["--no-out-link", "--max-jobs", "0", "--builders", &machine, "-E", WAITING];
        let mut command = remote.command("nix-build", &args)?;
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let (mut log, mut told) = (String::new(), false);
        for line in BufReader::new(child.stderr.take().context("no stderr")?).lines() {
            log += &(line? + "\n");
            // Neither can have ended, so both are running.
            if !told && log.contains("first is here") && log.contains("second is here") {
                std::fs::set_permissions(remote.shell(), std::fs::Permissions::from_mode(0o1755))?;
                told = true;
            }
        }
        ensure!(child.wait()?.success() && told, "{nix:?}: {log}");
        remote.verify("server")?;
    }
    Ok(())
}

/// A builder that never ends, and says nothing or says it over and over.
const ENDLESS: &str = r#"
let make = name: script: derivation {
  inherit name;
  system = "x86_64-linux";
  builder = "/bin/sh";
  args = [ "-c" script ];
};
in {
  silent = make "silent" "while :; do :; done";
  loud = make "loud" "while :; do echo louder; done";
}
"#;

#[test]
fn the_limits_of_the_client_hold_on_the_builder() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let machine = format!("{} x86_64-linux - 1 1", remote.uri("server"));
        // The client watches how long the log is, and leaves time to the builder.
        for (which, limit) in [("silent", ["--max-silent-time", "1"]), ("loud", ["--timeout", "1"])] {
            let (success, _, log) =
                build(&remote, &[&machine], &[&["-A", which], &limit[..]].concat(), ENDLESS)?;
            let said: String = log.lines().filter(|line| *line != "louder").collect();
            ensure!(!success && log.contains("timed out"), "{nix:?}: {which} {limit:?}: {said}");
            remote.verify("server").with_context(|| format!("{nix:?}: {which} {limit:?}: {said}"))?;
        }
        // Once, and not twice: there is nothing to compare a second round with since Nix 2.13.
        if nix == Nix::V2_8 {
            let more = ["-A", "user", "--option", "build-repeat", "1"];
            let (success, _, log) = build(&remote, &[&machine], &more, CHAIN)?;
            ensure!(success && log.matches("loud").count() == 1, "{log}");
        }
    }
    Ok(())
}
