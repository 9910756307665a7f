//! Real Nix clients of every version against Drover's builder, as their `ssh://` store: copying there and back, and
//! fetching from it as from a cache. A host named `localhost` makes Nix start the program itself, without SSH.

use anyhow::{Context as _, Result, ensure};
use drover_tests::record::CHAIN;
use drover_tests::{Nix, Remote};

/// Builds the chain in the client's store. The path of the last of it, which refers to all that it needs.
fn built(remote: &Remote) -> Result<String> {
    let out = remote.run("nix-build", &["--no-out-link", "-A", "user", "-E", CHAIN])?;
    Ok(out.lines().next().context("nix-build prints no path")?.to_owned())
}

/// What Nix says of everything that a path requires, in the store of this name.
fn closure(remote: &Remote, store: &str, path: &str) -> Result<Vec<String>> {
    let root = remote.path(store);
    let root = root.to_str().context("temporary directories are UTF-8")?;
    let at: &[&str] = if store == "client" { &[] } else { &["--store", root] };
    let required = remote.run("nix-store", &[at, &["-q", "--requisites", path]].concat())?;
    let mut known = Vec::new();
    for path in required.lines() {
        let ask = |what| remote.run("nix-store", &[at, &["-q", what, path]].concat());
        known.push(format!("{path}: {} {} {}", ask("--hash")?, ask("--size")?, ask("--references")?));
    }
    known.sort();
    Ok(known)
}

/// Removes everything from the client's store, so that it has to come from elsewhere.
fn forget(remote: &Remote) -> Result<()> {
    remote.run("nix-store", &["--gc"]).map(drop)
}

#[test]
fn every_real_client_copies_there_and_back() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let (out, uri) = (built(&remote)?, remote.uri("server"));
        let copy = ["copy", "--no-check-sigs", "--substitute-on-destination", "--to", &uri, &out];
        remote.nix(&copy).context("there")?;
        let known = closure(&remote, "client", &out)?;
        ensure!(known.len() == 3, "{nix:?}: {known:?}");
        ensure!(closure(&remote, "server", &out)? == known, "{nix:?}: not all of it arrived");
        let back = remote.path("back");
        let back_text = back.to_string_lossy();
        remote.nix(&["copy", "--no-check-sigs", "--from", &uri, "--to", &back_text, &out]).context("back")?;
        ensure!(closure(&remote, "back", &out)? == known, "{nix:?}: it came back changed");
        for store in ["server", "back"] {
            remote.verify(store)?;
        }
    }
    Ok(())
}

#[test]
fn nix_copy_closure_both_ways() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let out = built(&remote)?;
        // This program takes no URI but a host, and names no program: it finds `nix-store` on PATH, as sshd would.
        remote.install_as_nix_store("server")?;
        let copy = |args: &[&str]| remote.run("nix-copy-closure", &[args, &["localhost", &out]].concat());
        copy(&["--to", "--use-substitutes"]).context("there")?;
        copy(&["--to", "--use-substitutes", "--gzip"]).context("there again, where all is valid")?;
        let known = closure(&remote, "client", &out)?;
        ensure!(closure(&remote, "server", &out)? == known, "{nix:?}: not all of it arrived");
        forget(&remote)?;
        ensure!(!remote.object("client", &out).exists(), "{nix:?}: the client forgets nothing");
        copy(&["--from", "--use-substitutes"]).context("back")?;
        ensure!(closure(&remote, "client", &out)? == known, "{nix:?}: it came back changed");
        remote.verify("server")?;
        remote.verify("client")?;
    }
    Ok(())
}

#[test]
fn the_builder_is_a_substituter_and_a_store_to_look_at() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let (out, uri) = (built(&remote)?, remote.uri("server"));
        remote.nix(&["copy", "--no-check-sigs", "--to", &uri, &out])?;
        let known = closure(&remote, "client", &out)?;
        forget(&remote)?;
        let fetch =
            ["--option", "substituters", &uri, "--option", "require-sigs", "false", "--realise", &out];
        remote.run("nix-store", &fetch).context("fetching")?;
        ensure!(closure(&remote, "client", &out)? == known, "{nix:?}: it came changed");

        let said = remote.nix(&["store", "ping", "--store", &uri])?;
        // Up to some version it goes to standard error; that it succeeds is the point.
        ensure!(said.is_empty() || said.contains("ssh://localhost"), "{nix:?}: {said}");
        let info = remote.nix(&["path-info", "--json", "--store", &uri, &out])?;
        ensure!(info.contains("narHash"), "{nix:?}: {info}");
    }
    Ok(())
}

#[test]
fn realising_over_the_protocol_ends_as_it_does_with_nix() -> Result<()> {
    for nix in Nix::ALL {
        let remote = Remote::new(nix)?;
        let uri = remote.uri("server");
        let theirs = format!("ssh://localhost?remote-store={}", remote.path("theirs").display());
        let drv = remote.run("nix-instantiate", &["-A", "user", "-E", CHAIN])?;
        let source = remote.run("nix-store", &["-q", "--requisites", drv.trim()])?;
        let (drv, source) = (drv.trim(), source.lines().next().context("it requires something")?);
        for uri in [&uri, &theirs] {
            // BuildPaths for what is not there: a failure with the server's own words, and not a broken session.
            let absent = remote.output("nix-store", &["--store", uri, "--realise", source])?;
            let said = String::from_utf8_lossy(&absent.stderr);
            ensure!(!absent.status.success() && said.contains(source), "{nix:?} {uri}: {said}");
            ensure!(!said.contains("unexpected") && !said.contains("protocol"), "{nix:?} {uri}: {said}");
            remote.nix(&["copy", "--no-check-sigs", "--derivation", "--to", uri, drv])?;
            remote.run("nix-store", &["--store", uri, "--realise", source]).context("what is there")?;
            // These clients cannot build a derivation that a store has over this protocol, whoever serves it: before
            // they send BuildPaths they want to read the derivation's file, for which there is no command.
            for (program, args) in [("nix-build", &["--no-out-link"][..]), ("nix-store", &["--realise"])] {
                let output = remote.output(program, &[&["--store", uri], args, &[drv]].concat())?;
                let said = String::from_utf8_lossy(&output.stderr);
                let reason = "is not supported by store";
                ensure!(!output.status.success() && said.contains(reason), "{nix:?} {uri} {program}: {said}");
            }
        }
        remote.verify("server")?;
    }
    Ok(())
}
