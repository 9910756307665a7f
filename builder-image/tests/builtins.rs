//! Built-in builders, run by the real program for the protocol's real client.

#![allow(clippy::unwrap_used)] // all of it is tests

mod common;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use common::http::{Reply, Server, authority};
use common::{Builder, User, add, out, path_for, set};
use drover_nix::{BasicDerivation, Hash, Method, Sha256, nar};
use drover_serve::{BuildOptions, BuildResult, BuildStatus};
use tempfile::TempDir;

/// A derivation that fetches, fixed by this hash.
fn fetch(builder: &Builder, url: &str, method: Method, hash: Sha256) -> BasicDerivation {
    let mut drv = builder.fixed("", method, Hash::from(hash));
    drv.builder = "builtin:fetchurl".into();
    drv.system = "builtin".into();
    drv.args.clear();
    set(&mut drv, "url", url);
    drv
}

/// One that is right if it gets `contents`.
fn fetch_flat(builder: &Builder, url: &str, contents: &[u8]) -> BasicDerivation {
    fetch(builder, url, Method::Flat, Sha256::of(contents))
}

fn build(builder: &mut Builder, drv: &BasicDerivation) -> BuildResult {
    builder.build(drv, &BuildOptions::default())
}

fn expect_built(builder: &mut Builder, drv: &BasicDerivation) {
    let result = build(builder, drv);
    assert_eq!(result.status, BuildStatus::Built, "{} {}", result.error_message, builder.log());
}

/// A derivation of another built-in builder, with the inputs that its environment names.
fn other(
    builder: &Builder,
    name: &str,
    env: &[(&str, &str)],
    inputs: &[drover_nix::StorePath],
) -> BasicDerivation {
    let mut drv = builder.derivation(&format!("{name} {env:?}"));
    drv.builder = format!("builtin:{name}").into();
    drv.system = "builtin".into();
    drv.args.clear();
    env.iter().for_each(|(key, value)| set(&mut drv, key, value));
    drv.input_srcs = inputs.iter().cloned().collect();
    drv
}

fn nar_of(contents: &[u8], executable: bool) -> Vec<u8> {
    let mut writer = nar::Writer::new(Vec::new());
    writer.file_bytes(executable, contents).unwrap();
    writer.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn files_and_archives_are_fetched() {
    let contents = b"contents\n".repeat(100_000);
    let (plain, tree) = (nar_of(&contents, false), nar_of(b"#!", true));
    let bodies = [contents.clone(), plain.clone(), xz(&tree), b"#!".to_vec()];
    let server = Server::start("127.0.0.1", None, move |path, _| {
        let index = ["/flat", "/nar", "/nar.xz", "/program"].iter().position(|name| *name == path);
        index.map_or(Reply::Status(404), |index| Reply::Body(bodies[index].clone()))
    });
    let url = |name: &str| format!("{}/{name}", server.url);
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start(user);
        let flat = fetch_flat(&builder, &url("flat"), &contents);
        expect_built(&mut builder, &flat);
        assert!(std::fs::read(builder.store_file(&out(&flat))).unwrap() == contents);
        for (name, hash) in [("nar", Sha256::of(&plain)), ("nar.xz", Sha256::of(&tree))] {
            let mut drv = fetch(&builder, &url(name), Method::Nar, hash);
            set(&mut drv, "unpack", "1");
            expect_built(&mut builder, &drv);
        }
        // Under a name of its own: the archive above has made the path of the same contents.
        let drv = {
            let renamed = fetch(&builder, &url("program"), Method::Nar, Sha256::of(&tree));
            let mut drv = BasicDerivation { name: "program".into(), ..renamed };
            let path = out(&drv);
            set(&mut drv, "out", &format!("/nix/store/{path}"));
            set(&mut drv, "executable", "1");
            drv
        };
        expect_built(&mut builder, &drv);
        assert_eq!(builder.store_file(&out(&drv)).metadata().unwrap().mode() & 0o7777, 0o555);
    }
}

#[test]
fn what_is_not_what_was_wanted_is_rejected() {
    let server = Server::of(b"something else");
    let mut builder = Builder::start(User::Current);
    let drv = fetch_flat(&builder, &server.url, b"something");
    let result = build(&mut builder, &drv);
    assert_eq!(result.status, BuildStatus::OutputRejected);
    assert!(
        result.error_message.contains(&Sha256::of(b"something else").to_sri()),
        "{}",
        result.error_message
    );
}

#[test]
fn failures_that_may_pass_are_tried_again_and_others_are_not() {
    let contents = b"x".repeat(200_000);
    let body = contents.clone();
    let server = Server::start("127.0.0.1", None, move |path, number| match (path, number) {
        ("/file", 0) => Reply::Status(503),
        ("/file", 1) => Reply::Broken(body.clone(), 100_000),
        ("/file", _) => Reply::Body(body.clone()),
        _ => Reply::Status(404),
    });
    let mut builder = Builder::start(User::Current);
    let drv = fetch_flat(&builder, &format!("{}/file", server.url), &contents);
    expect_built(&mut builder, &drv);
    assert_eq!(server.requests().len(), 3);
    assert!(builder.log().contains("503") && builder.log().contains("trying again"), "{}", builder.log());

    let url = format!("{}/absent?token=secret", server.url);
    let drv = fetch_flat(&builder, &url, b"");
    let result = build(&mut builder, &drv);
    assert_eq!(result.status, BuildStatus::TransientFailure, "it has the network, so it may pass");
    let message = &result.error_message;
    assert!(message.contains(&format!("cannot fetch '{}/absent'", server.url)), "{message}");
    assert!(message.contains("404") && !message.contains("secret"), "{message}");
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn a_server_that_stands_still_does_not_hold_a_build() {
    let server = Server::start("127.0.0.1", None, |_, _| Reply::Stalled(vec![0; 1000], 10));
    let mut builder = Builder::start(User::Current);
    let drv = fetch_flat(&builder, &server.url, b"");
    let begin = Instant::now();
    let options = BuildOptions { max_silent_seconds: 1, ..BuildOptions::default() };
    assert_eq!(builder.build(&drv, &options).status, BuildStatus::TimedOut);
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn passwords_go_to_their_host_alone() {
    let there = Server::start("127.0.0.2", None, |_, _| Reply::Body(b"found".to_vec()));
    let to = format!("{}/end", there.url);
    let here = Server::start("127.0.0.1", None, move |path, _| match path {
        "/loop" => Reply::Redirect("/loop".into()),
        "/away" => Reply::Redirect("file:///etc/passwd".into()),
        "/relative" => Reply::Redirect("start".into()),
        _ => Reply::Redirect(to.clone()),
    });
    let dir = TempDir::new().unwrap();
    let netrc = dir.path().join("netrc");
    std::fs::write(&netrc, "machine 127.0.0.2 login user password secret\n").unwrap();
    // Whoever reads it is the builder, not a build.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let mut builder = Builder::start_with(User::Current, &["--netrc-file", netrc.to_str().unwrap()]);
    let drv = fetch_flat(&builder, &format!("{}/relative", here.url), b"found");
    expect_built(&mut builder, &drv);
    assert_eq!(here.requests().len(), 2);
    assert!(
        here.requests().iter().all(|request| !request.contains("authorization")),
        "{:?}",
        here.requests()
    );
    assert!(there.requests()[0].contains("authorization: basic dxnlcjpzzwnyzxq="), "{:?}", there.requests());
    assert!(!builder.log().contains("secret"));

    for (path, why) in [("loop", "more than 10 redirects"), ("away", "it leads to a file URL")] {
        let drv = fetch_flat(&builder, &format!("{}/{path}", here.url), b"");
        let result = build(&mut builder, &drv);
        assert!(result.error_message.contains(why), "{}", result.error_message);
    }
}

#[test]
fn certificates_are_verified() {
    let (authority, tls) = authority();
    let server = Server::start("127.0.0.1", Some(tls), |_, _| Reply::Body(b"safe".to_vec()));
    let dir = TempDir::new().unwrap();
    let bundle = dir.path().join("authorities.pem");
    std::fs::write(&bundle, authority).unwrap();
    let mut knows = Builder::start_with(User::Current, &["--ssl-cert-file", bundle.to_str().unwrap()]);
    let drv = fetch_flat(&knows, &server.url, b"safe");
    expect_built(&mut knows, &drv);
    let asked = server.requests().len();

    let (stranger, _) = common::http::authority();
    std::fs::write(&bundle, stranger).unwrap();
    let drv = BasicDerivation { name: "again".into(), ..drv };
    let result = build(&mut knows, &drv);
    assert_eq!(result.status, BuildStatus::TransientFailure);
    assert!(result.error_message.contains("certificate"), "{}", result.error_message);
    assert!(result.error_message.contains("--ssl-cert-file"), "{}", result.error_message);
    assert_eq!(server.requests().len(), asked, "nothing is said to who is not trusted");
    assert!(!result.error_message.contains("trying again"), "{}", result.error_message);
}

#[test]
fn mirrors_come_first_and_are_not_relied_upon() {
    let digits = Sha256::of(b"file").to_hex();
    let mirror = Server::start("127.0.0.1", None, move |path, _| {
        if path == format!("/m/sha256/{digits}") { Reply::Body(b"file".to_vec()) } else { Reply::Status(404) }
    });
    let origin = Server::of(b"rare");
    let empty = Server::start("127.0.0.1", None, |_, _| Reply::Status(404));
    let list = format!("{} {}/m/", empty.url, mirror.url);
    let mut builder = Builder::start_with(User::Current, &["--hashed-mirrors", &list]);
    for contents in [&b"file"[..], b"rare"] {
        let drv = fetch_flat(&builder, &format!("{}/x", origin.url), contents);
        expect_built(&mut builder, &drv);
    }
    assert_eq!((empty.requests().len(), mirror.requests().len(), origin.requests().len()), (2, 2, 1));
}

/// CVE-2024-51481: what an ordinary builder may not do, a built-in one may not either.
#[test]
fn builtin_builders_are_in_the_sandbox() {
    let dir = TempDir::new().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "secret").unwrap();
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start(user);
        // Were it read, the output would be right.
        let drv = fetch_flat(&builder, &format!("file://{}", secret.display()), b"secret");
        let result = build(&mut builder, &drv);
        assert_eq!(result.status, BuildStatus::TransientFailure);
        assert!(result.error_message.contains("No such file"), "{}", result.error_message);
        // What it sees of itself: neither its memory nor what it has open, of which there is nothing.
        for (file, why) in [("environ", "Permission denied"), ("fd/3", "Permission denied")] {
            let drv = fetch_flat(&builder, &format!("file:///proc/self/{file}"), b"?");
            let result = build(&mut builder, &drv);
            assert!(result.error_message.contains(why), "{file}: {}", result.error_message);
        }
        // An input is there, and so is what the sandbox makes.
        let input = Path::new("/nix/store").join(builder.tools.as_str()).join("bin/busybox");
        let contents = std::fs::read(builder.store_file(&builder.tools).join("bin/busybox")).unwrap();
        let drv = fetch_flat(&builder, &format!("file://{}", input.display()), &contents);
        expect_built(&mut builder, &drv);
        assert_eq!(builder.store_file(&out(&drv)).metadata().unwrap().mode() & 0o7777, 0o444);
    }
}

/// What the helper has open for this build and for others stays out of a built-in builder.
#[test]
fn nothing_is_open_in_a_builtin_builder() {
    let server = Server::start("127.0.0.1", None, |_, _| Reply::Stalled(vec![0; 1000], 10));
    let mut builder = Builder::start(User::Current);
    let drv = fetch_flat(&builder, &server.url, b"");
    let mut client = builder.client.take().unwrap();
    let building = std::thread::spawn(move || {
        let options = BuildOptions { timeout_seconds: 60, ..BuildOptions::default() };
        client.build_derivation(&path_for("open", "test.drv"), &drv, &options)
    });
    while server.requests().is_empty() {
        assert!(!building.is_finished(), "{:?} {}", building.join(), builder.log());
        std::thread::yield_now();
    }
    let children = |parent: u32| -> Vec<u32> {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let parent_of = |pid: &u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse::<u32>().ok())
        };
        pids.filter(|pid| parent_of(pid) == Some(parent)).collect()
    };
    let helper = children(builder.child.id());
    assert_eq!(helper.len(), 1, "{helper:?}");
    let first = children(helper[0]);
    assert_eq!(first.len(), 1, "{first:?}");
    match std::fs::read_dir(format!("/proc/{}/fd", first[0])) {
        Ok(entries) => {
            let mut open: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            open.sort();
            assert_eq!(open, ["0", "1", "2"]);
        }
        // Not even to the user that it runs as.
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            assert!(!rustix::process::geteuid().is_root());
        }
    }
    builder.child.kill().unwrap();
    assert!(building.join().unwrap().is_err());
}

#[test]
fn what_may_not_fetch() {
    let server = Server::of(b"x");
    let mut builder = Builder::start(User::Current);
    let drv = other(&builder, "fetchurl", &[("url", &server.url)], &[]);
    let result = build(&mut builder, &drv);
    assert_eq!(result.status, BuildStatus::PermanentFailure);
    assert!(result.error_message.contains("outputHash"), "{}", result.error_message);
    assert_eq!(server.requests(), [""; 0]);
    for (url, why) in [("ftp://127.0.0.1/x", "ftp URLs are not supported"), ("no url", "is no URL")] {
        let drv = fetch_flat(&builder, url, b"");
        assert!(build(&mut builder, &drv).error_message.contains(why));
    }
}

#[test]
fn what_there_is_not() {
    let mut builder = Builder::start(User::Current);
    let drv = other(&builder, "frobnicate", &[], &[]);
    let result = build(&mut builder, &drv);
    assert_eq!(result.status, BuildStatus::PermanentFailure);
    assert!(
        result.error_message.contains("no built-in builder 'builtin:frobnicate'"),
        "{}",
        result.error_message
    );
}

#[test]
fn an_environment_of_packages() {
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start(user);
        let tree = TempDir::new().unwrap();
        std::fs::create_dir(tree.path().join("bin")).unwrap();
        std::fs::write(tree.path().join("bin/sh"), "mine").unwrap();
        std::fs::write(tree.path().join("bin/own"), "mine").unwrap();
        let package = add(builder.client(), "package", tree.path());
        let tools = builder.tools.clone();
        let derivations =
            |priority: u8| format!("true {priority} 1 /nix/store/{package} true 5 1 /nix/store/{tools}");
        let inputs = [package.clone(), tools.clone()];
        let env = [("derivations", &*derivations(4)), ("manifest", &format!("/nix/store/{package}/bin/own"))];
        let drv = other(&builder, "buildenv", &env, &inputs);
        expect_built(&mut builder, &drv);
        let bin = builder.store_file(&out(&drv)).join("bin");
        let target = |name: &str| std::fs::read_link(bin.join(name)).unwrap();
        assert_eq!(target("sh"), Path::new(&format!("/nix/store/{package}/bin/sh")));
        assert_eq!(target("cat"), Path::new(&format!("/nix/store/{tools}/bin/cat")));
        let path = out(&drv);
        let infos = builder.client().query_path_infos(&[path.clone()].into()).unwrap();
        assert_eq!(infos[&path].references, [package.clone(), tools.clone()].into());

        let drv =
            other(&builder, "buildenv", &[("derivations", &derivations(5)), ("manifest", "/m")], &inputs);
        let result = build(&mut builder, &drv);
        assert_eq!(result.status, BuildStatus::PermanentFailure);
        assert!(result.error_message.contains("two packages of priority 5"), "{}", result.error_message);
    }
}

#[test]
fn channels() {
    let mut builder = Builder::start(User::Current);
    let tar = |members: &[(&str, &str)]| {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, contents) in members {
            let mut header = tar::Header::new_ustar();
            header.set_size(contents.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, contents.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    };
    let dir = TempDir::new().unwrap();
    let mut unpack = |name: &str, bytes: &[u8]| {
        let file = dir.path().join("archive");
        std::fs::write(&file, bytes).unwrap();
        let archive = add(builder.client(), "archive", &file);
        let src = format!("/nix/store/{archive}");
        let drv = other(&builder, "unpack-channel", &[("channelName", name), ("src", &src)], &[archive]);
        let result = build(&mut builder, &drv);
        let read = std::fs::read_to_string(builder.store_file(&out(&drv)).join("stable/default.nix"));
        (result.status, result.error_message, read.unwrap_or_default())
    };
    let good = tar(&[("nixos-1.2/default.nix", "{ }"), ("nixos-1.2/lib/x.nix", "1")]);
    for bytes in [good.clone(), xz(&good)] {
        assert_eq!(unpack("stable", &bytes), (BuildStatus::Built, String::new(), "{ }".into()));
    }
    for (name, bytes, why) in [
        ("a/b", good.clone(), "without a slash"),
        ("..", good, "without a slash"),
        ("stable", tar(&[("a/x", ""), ("b/x", "")]), "more than one"),
        ("stable", tar(&[]), "it is empty"),
        ("stable", b"PK\x03\x04 not a tar archive".repeat(100), "has to be a tar archive"),
    ] {
        let (status, message, _) = unpack(name, &bytes);
        assert_eq!(status, BuildStatus::PermanentFailure);
        assert!(message.contains(why), "{message}");
    }
}
