//! Binary caches against real Nix: each reads what the other wrote, over real HTTP and in a directory.

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use drover_cache::{
    Cache, CacheOptions, FRAME, FrameWriter, NarSpool, Stored, VerifiedNar, closure, read_drv,
};
use drover_nix::signature::SecretKey;
use drover_nix::{NarInfo, PathInfo, Sha256, StoreDir, StorePath, nar};
use drover_tests::{HttpCache, Nix, Peer};

/// Two paths of which one refers to the other and to itself, and a source below both.
const PAIR: &str = r#"
let
  source = builtins.toFile "source" "some text\n";
  make = attrs: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/bin:/usr/bin"; } // attrs);
  lib = make {
    name = "lib";
    args = [ "-c" "mkdir $out; echo ${source} $out > $out/text; ln -s $out/text $out/link; head -c 300000 /bin/sh > $out/big; for a in 1 2 3 4 5; do for b in 1 2 3 4 5; do cat $out/big; done; done > $out/bigger" ];
  };
in make { name = "user"; args = [ "-c" "echo ${lib} > $out" ]; }
"#;

/// A store that real Nix filled, at this machine's path and as the peer's own `/nix`.
pub(crate) struct Filled {
    pub(crate) peer: Peer,
    pub(crate) dir: tempfile::TempDir,
    /// `user`, and its derivation.
    pub(crate) out: StorePath,
    pub(crate) drv: StorePath,
}

impl Filled {
    pub(crate) fn new(nix: Nix) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let store = dir.path().join("nix");
        std::fs::create_dir(&store)?;
        let peer = Peer::new(nix)?.with_at(&store, "/nix");
        let out = peer.run("nix-build", &["--no-out-link", "-E", PAIR])?;
        let drv = peer.run("nix-instantiate", &["-E", PAIR])?;
        let parse = |text: &str| StoreDir::default().parse(text.trim().as_bytes());
        Ok(Self { out: parse(&out)?, drv: parse(&drv)?, peer, dir })
    }

    pub(crate) fn root(&self) -> String {
        self.dir.path().to_string_lossy().into_owned()
    }

    pub(crate) fn nix(&self, args: &[&str]) -> Result<String> {
        self.peer.run("nix", &[&["--extra-experimental-features", "nix-command"], args].concat())
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        let _ = drover_store::fs::delete(&self.dir.path().join("nix"));
    }
}

pub(crate) fn full(path: &StorePath) -> String {
    StoreDir::default().full(path)
}

pub(crate) fn open(url: &str, options: &CacheOptions) -> Result<Arc<dyn Cache>> {
    Ok(drover_cache::open(url, options)?)
}

/// NARs of a closure, each verified.
pub(crate) fn read_all(cache: &Arc<dyn Cache>, root: &StorePath) -> Result<BTreeMap<StorePath, Vec<u8>>> {
    let found = closure(std::slice::from_ref(cache), [root.clone()])?;
    ensure!(found.missing.is_empty(), "{:?}", found.missing);
    found
        .found
        .into_iter()
        .map(|(path, (_, narinfo))| {
            let mut nar = Vec::new();
            VerifiedNar::new(cache.nar(&narinfo)?, &narinfo.info).read_to_end(&mut nar)?;
            Ok((path, nar))
        })
        .collect()
}

/// What the narinfo files had in them that were compared.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Kinds {
    no_references: bool,
    references: bool,
    deriver: bool,
    no_deriver: bool,
    two_signatures: bool,
    text: bool,
    fixed: bool,
    fixed_recursive: bool,
}

impl Kinds {
    fn all() -> Self {
        let yes = true;
        Self {
            no_references: yes,
            references: yes,
            deriver: yes,
            no_deriver: yes,
            two_signatures: yes,
            text: yes,
            fixed: yes,
            fixed_recursive: yes,
        }
    }

    /// Each narinfo file in a cache that real Nix wrote: printed from what was parsed, it is the same to the byte.
    fn see(&mut self, cache: &Path) -> Result<()> {
        let dir = StoreDir::default();
        for entry in std::fs::read_dir(cache)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "narinfo") {
                continue;
            }
            let text = std::fs::read_to_string(&path)?;
            let parsed = NarInfo::parse(&dir, text.as_bytes())?;
            ensure!(
                parsed.print(&dir) == text,
                "Nix wrote\n{text}\nand this program\n{}",
                parsed.print(&dir)
            );
            let (info, ca) = (&parsed.info, parsed.info.ca.as_ref().map(ToString::to_string));
            let address = |prefix: &str| ca.as_ref().is_some_and(|ca| ca.starts_with(prefix));
            self.no_references |= info.references.is_empty();
            self.references |= info.references.len() > 1;
            self.deriver |= info.deriver.is_some();
            self.no_deriver |= info.deriver.is_none();
            self.two_signatures |= info.signatures.len() == 2;
            self.text |= address("text:sha256:");
            self.fixed |= address("fixed:sha1:");
            self.fixed_recursive |= address("fixed:r:sha256:");
        }
        Ok(())
    }
}

#[test]
fn drover_reads_what_nix_copies_in_every_compression() -> Result<()> {
    for nix in Nix::ALL {
        let filled = Filled::new(nix)?;
        let expected = read_all(&open(&filled.root(), &CacheOptions::default())?, &filled.out)?;
        ensure!(expected.len() == 3, "{expected:?}");
        let keys = tempfile::tempdir()?;
        let key = |name: &str| keys.path().join(name).to_string_lossy().into_owned();
        let generate = ["--generate-binary-cache-key", "test-1", &key("secret"), &key("public")];
        filled.peer.run("nix-store", &generate)?;
        let public = std::fs::read_to_string(key("public"))?.parse()?;
        let options = CacheOptions { public_keys: vec![public], ..CacheOptions::default() };
        // Signed by two, and things that are not: a file by its hash, a tree by its hash.
        let second = key("second");
        filled
            .peer
            .run("nix-store", &["--generate-binary-cache-key", "second-1", &second, &key("unused")])?;
        filled.nix(&["store", "sign", "-k", &second, "--recursive", &full(&filled.out)])?;
        let add =
            |args: &[&str]| Ok::<_, anyhow::Error>(filled.peer.run("nix-store", args)?.trim().to_owned());
        let fixed = [
            add(&["--add", &key("public")])?,
            add(&["--add-fixed", "sha1", &key("public")])?,
            add(&["--add-fixed", "--recursive", "sha512", &key("public")])?,
        ];
        let mut kinds = Kinds::default();
        for compression in ["xz&parallel-compression=true", "zstd", "bzip2", "gzip", "none"] {
            let dir = tempfile::tempdir()?;
            let http = HttpCache::start(dir.path())?;
            let url = format!("{}?compression={compression}&secret-key={}", http.url(), key("secret"));
            let copied: Vec<&str> = fixed.iter().map(String::as_str).collect();
            filled.nix(&[&["copy", "--to", &url, &full(&filled.out)][..], &copied].concat())?;
            kinds.see(dir.path()).with_context(|| format!("{nix:?} {compression}"))?;
            let over_http = open(http.url(), &options)?;
            let read = read_all(&over_http, &filled.out).with_context(|| format!("{nix:?} {compression}"))?;
            ensure!(read == expected, "{nix:?} {compression}");
            let in_directory = open(&format!("file://{}", dir.path().display()), &options)?;
            ensure!(read_all(&in_directory, &filled.out)? == expected, "{nix:?} {compression}");
        }
        // A `.drv` file, which nobody has to sign, and what is not signed and has to be.
        let dir = tempfile::tempdir()?;
        let http = HttpCache::start(dir.path())?;
        let drv = filled.nix(&["copy", "--derivation", "--to", http.url(), &full(&filled.drv)]);
        // The flag came after 2.8, which copies `.drv` files as they are.
        if drv.is_err() {
            filled.nix(&["copy", "--to", http.url(), &full(&filled.drv)])?;
        }
        filled.nix(&["copy", "--to", http.url(), &full(&filled.out)])?;
        kinds.see(dir.path())?;
        ensure!(kinds == Kinds::all(), "{nix:?} wrote too little to compare: {kinds:?}");
        let cache = open(http.url(), &options)?;
        let drv =
            read_drv(&*cache, &StoreDir::default(), &filled.drv)?.context("the .drv file was copied")?;
        ensure!(drv.basic.name == "user");
        let error = cache.narinfo(&filled.out).err().context("an unsigned path was believed")?;
        ensure!(error.category() == "untrusted", "{error}");
    }
    Ok(())
}

#[test]
fn nix_reads_what_drover_stores() -> Result<()> {
    let key = SecretKey::from_seed("drover-test-1", &[42; 32])?;
    for nix in Nix::ALL {
        let filled = Filled::new(nix)?;
        let store = open(&filled.root(), &CacheOptions::default())?;
        let dir = tempfile::tempdir()?;
        let http = HttpCache::start(dir.path())?;
        let cache = open(http.url(), &CacheOptions::default())?;
        let paths = closure(std::slice::from_ref(&store), [filled.out.clone()])?;
        let candidates: Vec<StorePath> = paths.found.keys().cloned().collect();
        let mut frames = 0;
        for (_, narinfo) in paths.found.values() {
            let mut spool = NarSpool::new(Path::new("/tmp"), candidates.iter().cloned())?;
            let mut from_store = store.nar(narinfo)?;
            if narinfo.info.nar_size > FRAME as u64 {
                // As a builder compresses it.
                let mut content = Vec::new();
                let mut writer = FrameWriter::new(|frame: &[u8]| {
                    frames += 1;
                    let left = narinfo.info.nar_size - spool.size();
                    spool.frame(frame, left, &mut content).map_err(io::Error::other)
                });
                io::copy(&mut from_store, &mut writer)?;
                writer.finish()?;
            } else {
                io::copy(&mut from_store, &mut spool)?;
            }
            let nar = spool.finish()?;
            ensure!(nar.references == narinfo.info.references, "{nix:?}: the scanner finds what Nix found");
            let mut info = narinfo.info.clone();
            info.signatures = vec![key.sign(info.fingerprint(&StoreDir::default()).as_bytes())];
            ensure!(cache.put(&info, &nar)? == Stored::New);
        }
        ensure!(frames > 2, "{nix:?}: no path is large enough");
        cache.put_log(&filled.drv, &mut &b"the log\n"[..])?;

        let trusted = format!("trusted-public-keys = {}\n", key.public());
        let with = |config: &str, program: &str, args: &[&str]| -> Result<std::process::Output> {
            let config = format!("experimental-features = nix-command\nbuild-users-group =\n{config}");
            Ok(filled.peer.command(program)?.env("NIX_CONFIG", config).args(args).output()?)
        };
        let text =
            |root: &Path| std::fs::read_to_string(root.join(full(&filled.out).trim_start_matches('/')));
        // Copied, substituted, and refused where the key is not trusted.
        for (config, program, args, works) in [
            (trusted.clone(), "nix", vec!["copy", "--from", http.url()], true),
            (format!("{trusted}substituters = {}\n", http.url()), "nix-store", vec!["-r"], true),
            ("trusted-public-keys =\n".to_owned(), "nix", vec!["copy", "--from", http.url()], false),
        ] {
            let target = tempfile::tempdir()?;
            let root = target.path().to_string_lossy().into_owned();
            let path = full(&filled.out);
            let place: &[&str] =
                if program == "nix" { &["--to", &root, &path] } else { &["--store", &root, &path] };
            let output = with(&config, program, &[&args[..], place].concat())?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success() == works, "{nix:?} {program} {args:?}: {said}");
            if works {
                ensure!(text(target.path())? == text(filled.dir.path())?);
                filled.peer.run("nix-store", &["--store", &root, "--verify", "--check-contents"])?;
            }
            drover_store::fs::delete(&target.path().join("nix"))?;
        }
        // By way of the output's deriver: the `.drv` file is not in the cache.
        let log = with("", "nix", &["log", "--store", http.url(), &full(&filled.out)])?;
        let said = String::from_utf8_lossy(&log.stderr);
        ensure!(String::from_utf8_lossy(&log.stdout).contains("the log"), "{nix:?}: {said}");
    }
    Ok(())
}

/// A path that no build made, with contents that do not compress.
fn put(cache: &Arc<dyn Cache>, name: &str, size: usize) -> Result<(StorePath, Vec<u8>)> {
    let mut state = Sha256::of(name.as_bytes());
    let mut contents = Vec::with_capacity(size + 32);
    while contents.len() < size {
        contents.extend_from_slice(&state.0);
        state = Sha256::of(&state.0);
    }
    let mut writer = nar::Writer::new(Vec::new());
    writer.file_bytes(false, &contents)?;
    let nar = writer.finish()?;
    let mut spool = NarSpool::new(Path::new("/tmp"), [])?;
    io::copy(&mut &nar[..], &mut spool)?;
    let spooled = spool.finish()?;
    let path = StoreDir::default().make_path("test", Sha256::of(name.as_bytes()), name)?;
    let info = PathInfo {
        path: path.clone(),
        nar_hash: spooled.nar_hash,
        nar_size: spooled.nar_size,
        references: Default::default(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    };
    cache.put(&info, &spooled)?;
    Ok((path, nar))
}

/// Threads ask for hundreds of narinfo files at once, of a real server.
#[test]
fn connections_are_kept_and_shared() -> Result<()> {
    const PATHS: usize = 200;
    let dir = tempfile::tempdir()?;
    let files = open(&format!("file://{}", dir.path().display()), &CacheOptions::default())?;
    let paths: Vec<StorePath> =
        (0..PATHS).map(|number| Ok(put(&files, &format!("p{number}"), 100)?.0)).collect::<Result<_>>()?;
    // By HTTP/1.1 a connection a thread, and some more: one that is free again is not always seen by who asks next. By
    // HTTP/2, all are on one.
    for (http, protocol, most) in
        [(HttpCache::start(dir.path())?, "HTTP/1.1", 32), (HttpCache::start_tls(dir.path())?, "HTTP/2.0", 1)]
    {
        let certificates = http.url().starts_with("https").then(|| http.certificate());
        let cache = open(http.url(), &CacheOptions { certificates, ..CacheOptions::default() })?;
        // So that what is spoken is known before many ask.
        ensure!(cache.narinfo(&paths[0])?.is_some());
        let found = closure(std::slice::from_ref(&cache), paths.iter().cloned())?;
        ensure!(found.found.len() == PATHS, "{:?}", found.missing);
        let connections = http.connections()?;
        ensure!(http.requests()?.len() > PATHS);
        ensure!(connections.iter().all(|(_, spoken)| spoken == protocol), "{connections:?}");
        ensure!(connections.len() <= most, "{protocol}: {} connections", connections.len());
    }
    Ok(())
}

/// A real server dies while a NAR is on its way, and comes back.
#[test]
fn a_download_survives_its_server() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let files = open(&format!("file://{}", dir.path().display()), &CacheOptions::default())?;
    // More than all the buffers between the two hold.
    let (path, nar) = put(&files, "large", 48 << 20)?;
    for http in [HttpCache::start(dir.path())?, HttpCache::start_tls(dir.path())?] {
        let certificates = http.url().starts_with("https").then(|| http.certificate());
        let cache = open(http.url(), &CacheOptions { certificates, ..CacheOptions::default() })?;
        let narinfo = cache.narinfo(&path)?.context("it was just stored")?;
        let mut body = VerifiedNar::new(cache.nar(&narinfo)?, &narinfo.info);
        let mut read = vec![0; 1 << 20];
        body.read_exact(&mut read)?;
        let http = http.restart()?;
        body.read_to_end(&mut read)?;
        ensure!(read == nar, "{}: {} bytes of {}", http.url(), read.len(), nar.len());
        let rest = http.requests()?.into_iter().filter(|(_, _, status, _)| *status == 206).count();
        ensure!(rest == 1, "{}: {:?}", http.url(), http.requests()?);
    }
    Ok(())
}
