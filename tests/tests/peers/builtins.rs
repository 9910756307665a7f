//! Built-in builders against real Nix's: the same derivations give the same trees, whatever they are made from.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use drover_nix::{Sha256, nar};
use drover_tests::{Nix, Peer};
use xtask::run;

use crate::build::build_by_both;
use crate::web::Web;

fn serve(files: &[(&str, &[u8])]) -> Result<Web> {
    let files = files.iter().map(|(name, body)| ((*name).to_owned(), body.to_vec()));
    Web::serve(TcpListener::bind("127.0.0.1:0")?, files.collect::<BTreeMap<_, _>>())
}

fn nar_of(contents: &[u8], executable: bool) -> Result<Vec<u8>> {
    let mut writer = nar::Writer::new(Vec::new());
    writer.file_bytes(executable, contents)?;
    Ok(writer.finish()?)
}

#[test]
fn fetchurl() -> Result<()> {
    let contents = b"contents of a file\n".repeat(5_000);
    let (plain, program) = (nar_of(&contents, false)?, nar_of(b"#!", true)?);
    let web = serve(&[("file", &contents), ("tree.nar", &plain), ("run", b"#!"), ("a%20b", b"spaces")])?;
    let hash = |bytes: &[u8]| Sha256::of(bytes).to_hex();
    let cases = [
        // A file, a NAR that is unpacked, and a file that may be executed.
        (format!("url = \"{}/file\"; sha256 = \"{}\";", web.url, hash(&contents)), 1),
        (format!("url = \"{}/tree.nar\"; unpack = true; sha256 = \"{}\";", web.url, hash(&plain)), 1),
        (format!("url = \"{}/run\"; executable = true; sha256 = \"{}\";", web.url, hash(&program)), 1),
        (format!("url = \"{}/a%20b?q=1\"; sha256 = \"{}\"; name = \"other\";", web.url, hash(b"spaces")), 0),
    ];
    for (attributes, expected) in cases {
        let before = web.asked().len();
        let both = build_by_both(
            &Peer::new(Nix::V2_34)?,
            &["-E", &format!("import <nix/fetchurl.nix> {{ {attributes} }}")],
        );
        // Both ask once for what there is, and both fail where there is nothing.
        ensure!(both.is_ok() == (expected == 1), "{attributes}: {both:?}");
        ensure!(expected == 0 || web.asked().len() - before == 2, "{:?}", web.asked());
    }
    Ok(())
}

/// Packages of every kind of entry that is treated in a way of its own.
const ENVIRONMENT: &str = r#"
let
  package = name: script: derivation {
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    PATH = "${TOOLS}/bin";
    args = [ "-ec" script ];
  };
  one = package "one" ''
    mkdir -p $out/bin $out/share/doc/one $out/share/info $out/nix-support $out/only
    echo one > $out/bin/one; echo one > $out/bin/both; echo one > $out/share/doc/one/README
    echo hidden > $out/.hidden; echo log > $out/log; echo dir > $out/share/info/dir; echo x > $out/share/info/page
    echo m > $out/manifest.nix; echo m > $out/manifest.json; echo p > $out/share/perllocal.pod
    ln -s nowhere $out/dangling; ln -s bin $out/sbin; echo p > $out/nix-support/propagated-build-inputs
    echo "${three} ${four}" > $out/nix-support/propagated-user-env-packages
  '';
  two = package "two" ''
    mkdir -p $out/bin $out/share/doc/two $out/lib/deep/er
    echo two > $out/bin/two; echo two > $out/bin/both; echo two > $out/share/doc/two/README; echo two > $out/lib/deep/er/x
    ln -s ../bin/two $out/lib/link
  '';
  three = package "three" ''
    mkdir -p $out/bin $out/lib/deep
    echo three > $out/bin/three; echo three > $out/bin/both; echo three > $out/lib/deep/y; echo three > $out/from-three
    mkdir $out/nix-support; echo "${four}" > $out/nix-support/propagated-user-env-packages
  '';
  four = package "four" "mkdir -p $out/bin; echo four > $out/bin/four; echo four > $out/from-three";
  five = package "five" "mkdir -p $out/bin; echo five > $out/bin/both";
  file = package "file" "echo a file > $out";
  environment = derivations: derivation {
    name = "environment";
    system = "builtin";
    builder = "builtin:buildenv";
    inherit derivations;
    manifest = file;
  };
in
"#;

fn environment(derivations: &str) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let tools = tools(dir.path())?;
    let expression = ENVIRONMENT.replace("${TOOLS}", &format!("${{{}}}", tools.display()))
        + &format!("environment [ {derivations} ]");
    build_by_both(&Peer::new(Nix::V2_34)?, &["-E", &expression])
}

#[test]
fn buildenv() -> Result<()> {
    environment(r#""true" "5" "1" one "true" "4" "1" two "false" "1" "1" five "true" "9" "2" two file"#)?;
    // A directory of one is merged with those of others, whichever comes first.
    environment(r#""true" "3" "1" four "true" "2" "1" three"#)?;
    let clash = environment(r#""true" "5" "1" one "true" "5" "1" two"#);
    ensure!(clash.is_err(), "a file of two packages of one priority: {clash:?}");
    Ok(())
}

/// Fills a directory of the name `tools`, as expressions know it.
fn tools(dir: &Path) -> Result<PathBuf> {
    let bin = dir.join("tools/bin");
    std::fs::create_dir_all(&bin)?;
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
    let busybox = busybox.context("busybox not found: apt-get install busybox-static")?;
    std::fs::copy(busybox, bin.join("busybox"))?;
    for applet in ["mkdir", "ln"] {
        symlink("busybox", bin.join(applet))?;
    }
    Ok(dir.join("tools"))
}

#[test]
fn unpack_channel() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let top = dir.path().join("nixos-26.11.abc");
    let long = top.join("lib").join("d".repeat(90));
    std::fs::create_dir_all(&long)?;
    std::fs::create_dir(top.join("locked"))?;
    std::fs::write(top.join("default.nix"), "{ }\n")?;
    std::fs::write(long.join("f".repeat(90)), "too long for one field of a header\n")?;
    std::fs::write(top.join("._resource"), "of another system\n")?;
    std::fs::write(top.join("run"), "#!/bin/sh\n")?;
    std::fs::write(top.join("locked/inside"), "readable in the end\n")?;
    std::fs::hard_link(top.join("run"), top.join("run-again"))?;
    symlink("../default.nix", top.join("lib/link"))?;
    symlink("/nowhere/absolute", top.join("lib/away"))?;
    for (name, mode) in [("run", 0o4755), ("default.nix", 0o600), ("locked", 0o000)] {
        std::fs::set_permissions(top.join(name), std::fs::Permissions::from_mode(mode))?;
    }
    let tar = |options: &[&str]| -> Result<Vec<u8>> {
        let file = dir.path().join("archive");
        run::stdout(
            Command::new("tar")
                .current_dir(dir.path())
                .args(options)
                .arg("-f")
                .arg(&file)
                .arg("nixos-26.11.abc"),
        )?;
        Ok(std::fs::read(file)?)
    };
    for (format, options) in [
        ("ustar", &["-c", "--format=ustar"][..]),
        ("gnu", &["-c", "--format=gnu", "-z"]),
        ("pax", &["-c", "--format=pax", "-z", "--pax-option=globexthdr.name=pax_global_header,comment=abc"]),
    ] {
        let archive = tar(options)?;
        let web = serve(&[("channel", &archive)])?;
        let expression = format!(
            "derivation {{ name = \"channel\"; system = \"builtin\"; builder = \"builtin:unpack-channel\"; channelName = \
             \"stable\"; src = import <nix/fetchurl.nix> {{ url = \"{}/channel\"; sha256 = \"{}\"; }}; }}",
            web.url,
            Sha256::of(&archive).to_hex()
        );
        let log = build_by_both(&Peer::new(Nix::V2_34)?, &["-E", &expression]);
        ensure!(log.is_ok(), "{format}: {log:?}");
    }
    std::fs::set_permissions(top.join("locked"), std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}
