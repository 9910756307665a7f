//! Binary caches in buckets of a real S3 service: Drover and real Nix read what the other wrote, large files go in parts,
//! and what breaks off is taken up again.
//!
//! Debian's Nix is built without AWS's libraries: 2.34 speaks `s3://` anonymously, so its buckets are open to all; 2.26 and
//! 2.8 do not speak it. Drover signs every request, and the service checks it.

mod cutter;

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drover_cache::{
    Cache, CacheOptions, Credentials, NarSpool, Presigned, Secret, Stored, VerifiedNar, closure, presign,
};
use drover_nix::signature::SecretKey;
use drover_nix::{PathInfo, Sha256, StoreDir, StorePath, nar};
use drover_tests::{Nix, S3Server};

use self::cutter::{Cut, Cutter};
use crate::cache::{Filled, full, open, read_all};
use crate::command_line::Home;

fn options() -> CacheOptions {
    let credentials = Credentials::Aws {
        access_key_id: S3Server::ACCESS_KEY_ID.into(),
        secret_access_key: Secret::new(S3Server::SECRET_ACCESS_KEY),
        session_token: None,
    };
    CacheOptions { attempts: 3, credentials, ..CacheOptions::default() }
}

/// Puts everything that `filled.out` needs into a cache, signed.
fn put_all(filled: &Filled, cache: &Arc<dyn Cache>, key: &SecretKey) -> Result<()> {
    let store = open(&filled.root(), &CacheOptions::default())?;
    for (_, narinfo) in closure(std::slice::from_ref(&store), [filled.out.clone()])?.found.values() {
        let mut spool = NarSpool::new(Path::new("/tmp"), [])?;
        io::copy(&mut store.nar(narinfo)?, &mut spool)?;
        let mut info = narinfo.info.clone();
        info.signatures = vec![key.sign(info.fingerprint(&StoreDir::default()).as_bytes())];
        ensure!(cache.put(&info, &spool.finish()?)? == Stored::New);
    }
    Ok(())
}

#[test]
fn nix_and_drover_share_buckets() -> Result<()> {
    let filled = Filled::new(Nix::V2_34)?;
    let server = S3Server::start()?;
    let key = SecretKey::from_seed("drover-test-1", &[42; 32])?;

    // Ours, below a prefix; Nix installs from it and shows the log.
    let url = server.bucket("ours")?.replace("ours?", "ours/some/prefix?");
    let ours = open(&url, &options())?;
    put_all(&filled, &ours, &key)?;
    ours.put_log(&filled.drv, &mut &b"the log\n"[..])?;
    let mut log = String::new();
    ours.log(&filled.drv)?.context("no log")?.read_to_string(&mut log)?;
    ensure!(log == "the log\n" && ours.log(&filled.out)?.is_none());
    server.allow("ours", &["s3:GetObject"])?;
    let target = tempfile::tempdir()?;
    let root = target.path().to_string_lossy().into_owned();
    let trusted = format!("trusted-public-keys = {}\nbuild-users-group =\n", key.public());
    let features = ["--extra-experimental-features", "nix-command"];
    let nix = |args: &[&str]| -> Result<String> {
        let mut command = filled.peer.command("nix")?;
        xtask::run::stdout(command.env("NIX_CONFIG", &trusted).args(features).args(args))
    };
    nix(&["copy", "--from", &url, "--to", &root, &full(&filled.out)])?;
    filled.peer.run("nix-store", &["--store", &root, "--verify", "--check-contents"])?;
    drover_store::fs::delete(&target.path().join("nix"))?;
    ensure!(nix(&["log", "--store", &url, &full(&filled.out)])?.contains("the log"));
    // Each narinfo file after its NAR, by the service's own account.
    let requests = server.requests()?;
    let puts: Vec<&str> =
        requests.iter().filter(|(action, _, _)| action == "PutObject").map(|(_, name, _)| &**name).collect();
    let kinds: Vec<&str> = puts.iter().filter_map(|name| name.rsplit('.').next()).collect();
    let (infos, narinfos) = (puts.first(), kinds.iter().filter(|kind| **kind == "narinfo").count());
    ensure!(infos.is_some_and(|name| name.ends_with("some/prefix/nix-cache-info")), "{puts:?}");
    ensure!(narinfos == 3, "{puts:?}");
    for (at, name) in puts.iter().enumerate().filter(|(_, name)| name.ends_with(".narinfo")) {
        let text = std::fs::read_to_string(server.object("ours", name))?;
        let nar = text.lines().find_map(|line| line.strip_prefix("URL: ")).context("a URL")?;
        ensure!(puts[..at].iter().any(|name| name.ends_with(nar)), "{name} before {nar}: {puts:?}");
    }

    // Theirs, signed and compressed as Nix can.
    let url = server.bucket("theirs")?;
    server.allow("theirs", &["s3:GetObject", "s3:PutObject"])?;
    let keys = tempfile::tempdir()?;
    let file = |name: &str| keys.path().join(name).to_string_lossy().into_owned();
    filled
        .peer
        .run("nix-store", &["--generate-binary-cache-key", "test-1", &file("secret"), &file("public")])?;
    let to = format!(
        "{url}&secret-key={}&compression=zstd&narinfo-compression=gzip&storage-class=STANDARD",
        file("secret")
    );
    nix(&["copy", "--to", &to, &full(&filled.out)])?;
    let strict = CacheOptions {
        public_keys: vec![std::fs::read_to_string(file("public"))?.parse()?],
        require_signatures: true,
        ..options()
    };
    let expected = read_all(&open(&filled.root(), &CacheOptions::default())?, &filled.out)?;
    ensure!(read_all(&open(&url, &strict)?, &filled.out)? == expected);
    // Without keys too, where everybody may read.
    let public = CacheOptions { credentials: Credentials::None, ..strict };
    ensure!(read_all(&open(&url, &public)?, &filled.out)? == expected);
    Ok(())
}

/// Does not compress, so that it stays as long as it is.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let step = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..len).map(step).collect()
}

/// A path of one file of 12 MiB: three parts, of the smallest that S3 takes.
fn large(name: &str) -> Result<(PathInfo, Vec<u8>)> {
    let mut writer = nar::Writer::new(Vec::new());
    writer.file_bytes(false, &noise(12 << 20))?;
    let nar = writer.finish()?;
    let info = PathInfo {
        path: StoreDir::default().make_path("test", Sha256::of(name.as_bytes()), name)?,
        nar_hash: Sha256::of(&nar),
        nar_size: nar.len() as u64,
        references: [].into(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    };
    Ok((info, nar))
}

fn put(cache: &dyn Cache, info: &PathInfo, nar: &[u8]) -> Result<Stored> {
    let mut spool = NarSpool::new(Path::new("/tmp"), [])?;
    spool.write_all(nar)?;
    Ok(cache.put(info, &spool.finish()?)?)
}

fn get(cache: &dyn Cache, path: &StorePath) -> Result<Vec<u8>> {
    let narinfo = cache.narinfo(path)?.context("it is there")?;
    let mut bytes = Vec::new();
    VerifiedNar::new(cache.nar(&narinfo)?, &narinfo.info).read_to_end(&mut bytes)?;
    Ok(bytes)
}

const IN_PARTS: &str = "&multipart-chunk-size=5242880";

#[test]
fn large_files_go_in_parts_over_a_line_that_breaks() -> Result<()> {
    let server = S3Server::start()?;
    let line = Cutter::start(server.endpoint())?;
    let url = server.bucket("large")?.replace(server.endpoint(), &line.endpoint) + IN_PARTS;
    let cache = open(&url, &options())?;
    let (info, nar) = large("large")?;
    let count = |action: &str| -> Result<usize> {
        Ok(server.requests()?.iter().filter(|(done, _, status)| done == action && *status == 200).count())
    };
    // A part breaks off in its middle, twice; the others are not sent again.
    line.cut(Cut { when: "partNumber=2", after: 1 << 20, answer: false, times: 2 });
    ensure!(put(&*cache, &info, &nar)? == Stored::New);
    ensure!(line.left() == 0);
    ensure!((count("UploadPart")?, count("CompleteMultipartUpload")?) == (3, 1), "{:?}", server.requests()?);
    ensure!(server.unfinished("large")? == 0);

    // What is read breaks off twice, and goes on where it stopped.
    line.cut(Cut { when: "GET /large/nar/", after: 5 << 20, answer: true, times: 2 });
    line.cut(Cut { when: "range: bytes=", after: u64::MAX, answer: true, times: 1 });
    ensure!(get(&*cache, &info.path)? == nar);
    ensure!(line.left() == 0);

    // A part that never gets through: an error, no narinfo file, and nothing left that somebody pays for.
    let (info, nar) = (PathInfo { path: large("other")?.0.path, ..info }, [nar, vec![0; 8]].concat());
    let info = PathInfo { nar_hash: Sha256::of(&nar), nar_size: nar.len() as u64, ..info };
    line.cut(Cut { when: "partNumber=3", after: 1 << 20, answer: false, times: 100 });
    let error = put(&*cache, &info, &nar).err().context("it was stored")?;
    ensure!(format!("{error:#}").contains("store a part of"), "{error:#}");
    ensure!(cache.narinfo(&info.path)?.is_none() && server.unfinished("large")? == 0);
    Ok(())
}

#[test]
fn what_a_service_refuses_is_said() -> Result<()> {
    let server = S3Server::start()?;
    let url = server.bucket("private")?;
    let path = StoreDir::default().make_path("test", Sha256::of(b"x"), "gtk+-3.0")?;
    let drv = StoreDir::default().make_path("test", Sha256::of(b"x"), "gtk+-3.0.drv")?;
    let cache = open(&url, &options())?;
    ensure!(cache.narinfo(&path)?.is_none() && cache.log(&drv)?.is_none());
    // Names that URLs and signatures would spell differently.
    cache.put_log(&drv, &mut &b"text"[..])?;
    ensure!(std::fs::read(server.object("private", &format!("log/{drv}")))? == b"text");
    ensure!(cache.log(&drv)?.is_some());

    let with = |id: &str, secret: &str| {
        let (access_key_id, secret_access_key) = (id.to_owned(), Secret::new(secret));
        let credentials = Credentials::Aws { access_key_id, secret_access_key, session_token: None };
        CacheOptions { credentials, ..options() }
    };
    let nowhere = url.replace("private?", "nowhere?");
    let elsewhere = url.replace(S3Server::REGION, "eu-west-9");
    for (url, options, says) in [
        (&url, with(S3Server::ACCESS_KEY_ID, "hush"), "SignatureDoesNotMatch"),
        (&url, with("HUSH", "hush"), "access key ID"),
        (&nowhere, options(), "NoSuchBucket"),
        (&elsewhere, options(), S3Server::REGION),
    ] {
        let error = open(url, &options)?.narinfo(&path).err().context("it was answered")?;
        let text = error.to_string();
        ensure!(error.category() == "s3" && text.contains(says) && !text.contains("hush"), "{says}: {text}");
    }
    // Who may not read sees nothing, as with Nix; who may not write hears of it.
    let stranger = open(&url, &CacheOptions { credentials: Credentials::None, ..options() })?;
    ensure!(stranger.narinfo(&path)?.is_none() && stranger.log(&drv)?.is_none());
    let error = stranger.put_log(&drv, &mut &b""[..]).err().context("a stranger wrote")?;
    ensure!(error.to_string().contains("AccessDenied"), "{error}");
    Ok(())
}

#[test]
fn a_url_lets_others_do_one_thing() -> Result<()> {
    let server = S3Server::start()?;
    let url = server.bucket("private")?;
    let send = |method: &str, url: &str, body: &str| -> Result<String> {
        let rest = url.strip_prefix("http://").context("http")?;
        let (host, target) = rest.split_once('/').context("a path")?;
        let mut stream = TcpStream::connect(host)?;
        let length = body.len();
        write!(
            stream,
            "{method} /{target} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let name = "nar/some+thing.nar";
    let valid = Duration::from_secs(60);
    let to_put = presign(&url, &options(), Presigned::Put, name, valid)?;
    let answer = send("PUT", &to_put, "bytes")?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    ensure!(std::fs::read(server.object("private", name))? == b"bytes");
    let to_get = presign(&url, &options(), Presigned::Get, name, valid)?;
    ensure!(send("GET", &to_get, "")?.ends_with("\r\n\r\nbytes"));
    // Not another thing, and not with another file.
    for (method, url) in [("PUT", to_get.clone()), ("GET", to_get.replace("thing", "other"))] {
        let answer = send(method, &url, "")?;
        ensure!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    }
    Ok(())
}

#[test]
fn drover_build_works_from_bucket_to_bucket() -> Result<()> {
    let filled = Filled::new(Nix::V2_34)?;
    let server = S3Server::start()?;
    let (url, push) = (server.bucket("inputs")?, server.bucket("outputs")?);
    put_all(&filled, &open(&url, &options())?, &SecretKey::from_seed("k-1", &[1; 32])?)?;
    let home = Home::new()?;
    let request = home.path().join("request.json");
    let input = full(&filled.out);
    let json = serde_json::json!({
        "apiVersion": "drover.build/v1alpha1",
        "kind": "BuildRequest",
        "metadata": { "name": "reader" },
        "spec": { "derivation": {
            "name": "reader",
            "system": "x86_64-linux",
            "builder": "/bin/sh",
            "args": ["-c", format!("read -r lib < {input}; read -r line < $lib/text; echo $line > $out")],
            "inputSrcs": [input],
            "outputs": { "out": {} },
        } },
    });
    std::fs::write(&request, json.to_string())?;
    let file = request.to_string_lossy();
    let [secret_key, public_key] =
        ["key", "key.pub"].map(|name| home.path().join(name).to_string_lossy().into_owned());
    filled.peer.run("nix-store", &["--generate-binary-cache-key", "test-1", &secret_key, &public_key])?;
    let build = |secret: &str| -> Result<std::process::Output> {
        let mut drover = home.drover(&[
            "build",
            &file,
            "--cache",
            &url,
            "--push",
            &push,
            "--secret-key-file",
            &secret_key,
            "--output",
            "json",
        ])?;
        drover.env("AWS_ACCESS_KEY_ID", S3Server::ACCESS_KEY_ID).env("AWS_SECRET_ACCESS_KEY", secret);
        Ok(drover.output()?)
    };
    let refused = build("hush")?;
    let said =
        String::from_utf8_lossy(&refused.stderr).into_owned() + &String::from_utf8_lossy(&refused.stdout);
    ensure!(refused.status.code() == Some(3) && said.contains("SignatureDoesNotMatch"), "{said}");
    ensure!(!said.contains("hush"), "{said}");
    let done = build(S3Server::SECRET_ACCESS_KEY)?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let done: serde_json::Value = serde_json::from_slice(&done.stdout)?;
    let out = done["status"]["outputs"]["out"]["path"].as_str().context("an output")?;
    // Nix, with nothing but the key and the address.
    server.allow("outputs", &["s3:GetObject"])?;
    let target = tempfile::tempdir()?;
    let root = target.path().to_string_lossy().into_owned();
    // What it refers to lies where the inputs came from.
    server.allow("inputs", &["s3:GetObject"])?;
    let mut nix = filled.peer.command("nix-store")?;
    let trusted = format!(
        "{} {}",
        std::fs::read_to_string(&public_key)?,
        SecretKey::from_seed("k-1", &[1; 32])?.public()
    );
    nix.env("NIX_CONFIG", format!("trusted-public-keys = {trusted}\nbuild-users-group =\n"));
    nix.args(["--store", &root, "--option", "substituters", &format!("{push} {url}"), "-r", out]);
    xtask::run::stdout(&mut nix)?;
    let text = std::fs::read_to_string(target.path().join(out.trim_start_matches('/')))?;
    ensure!(text.contains("-source"), "{text}");
    drover_store::fs::delete(&target.path().join("nix"))?;
    Ok(())
}
