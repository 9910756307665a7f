//! What Drover builds and pushes, as its users get it: real Nix of every version, with an empty store, the cache's URL and
//! the public key and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use drover_tests::{HttpCache, Nix, Peer};
use serde_json::Value;
use tempfile::TempDir;

use crate::command_line::Home;

/// Every kind of output, but content-addressed ones that refer to themselves: of these, Nix 2.8 and Nix 2.26 to 2.34 do not
/// take the same. The builder is a shell with nothing but what is built in.
const KINDS: &str = r#"
let
  d = name: script: a: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; inherit name; args = [ "-c" script ]; } // a);
  source = builtins.toFile "source" "some text\n";
  fixed = d "fixed" "echo fixed > $out" {
    outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = builtins.hashString "sha256" "fixed\n";
  };
  lib = d "lib" "echo ${source} $out > $out; echo $out > $dev" { outputs = [ "out" "dev" ]; };
  floating = d "floating" "echo ${lib.dev} > $out" {
    __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
  };
  user = d "user" "read line < ${fixed}; echo this is $line; echo $line ${fixed} ${lib} ${lib.dev} > $out" {};
in { inherit floating user; }
"#;

/// The pair is that of RFC 8032, 7.1, test 1.
const SECRET_KEY: &str =
    "cache-1:nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2DXWpgBgrEKt9VL/tPJZAc6DuFy89qmIyWvAhpo9wdRGg==";
const PUBLIC_KEY: &str = "cache-1:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";

/// What was built, in a cache.
struct Pushed {
    url: String,
    /// By `NAME.OUTPUT`, as the requests' statuses say.
    outputs: BTreeMap<String, Value>,
    /// Of each derivation by its name.
    drvs: BTreeMap<String, String>,
    _home: Home,
}

impl Pushed {
    /// Real Nix puts sources and `.drv` files into the cache, Drover what it builds of them.
    fn to(url: &str) -> Result<Self> {
        let home = Home::new()?;
        let theirs = home.path().join("theirs/nix");
        std::fs::create_dir_all(&theirs)?;
        let nix = Peer::new(Nix::V2_34)?.with_at(&theirs, "/nix");
        let features = "experimental-features = nix-command ca-derivations\n";
        let nix = |program: &str, args: &[&str]| {
            xtask::run::stdout(nix.command(program)?.args(args).env("NIX_CONFIG", features))
        };
        let drvs = nix("nix-instantiate", &["-E", KINDS, "-A", "floating", "-A", "user"])?;
        let drvs: Vec<&str> = drvs.lines().collect();
        nix("nix", &[&["copy", "--derivation", "--to", url], &drvs[..]].concat())?;

        let key = home.path().join("secret-key");
        std::fs::write(&key, SECRET_KEY)?;
        let store = home.path().join("theirs").display().to_string();
        let files: Vec<String> = drvs.iter().map(|drv| format!("{store}{drv}")).collect();
        let key = key.display().to_string();
        let mut drover = home.drover(&["build", "--recursive", "-o", "json", "--push", url])?;
        let built = xtask::run::stdout(drover.args(["--secret-key-file", &key]).args(files))?;
        let built: Value = serde_json::from_str(&built)?;
        let _ = drover_store::fs::delete(&theirs);

        let (mut outputs, mut drvs) = (BTreeMap::new(), BTreeMap::new());
        for request in built["items"].as_array().context("several requests are a list")? {
            let name = request["spec"]["derivation"]["name"].as_str().context("no name")?;
            let status = &request["status"];
            for (output, said) in status["outputs"].as_object().context("not built")? {
                ensure!(said["signatures"][0].as_str().is_some_and(|sig| sig.starts_with("cache-1:")));
                outputs.insert(format!("{name}.{output}"), said.clone());
            }
            drvs.insert(name.to_owned(), status["drvPath"].as_str().context("no path")?.to_owned());
        }
        let names: Vec<&str> = outputs.keys().map(String::as_str).collect();
        ensure!(names == ["fixed.out", "floating.out", "lib.dev", "lib.out", "user.out"], "{names:?}");
        Ok(Self { url: url.to_owned(), outputs, drvs, _home: home })
    }

    fn path(&self, output: &str) -> Result<&str> {
        self.outputs[output]["path"].as_str().context("no path")
    }

    /// Everything is there, as the statuses say, and real Nix finds nothing wrong with it.
    fn check(&self, to: &Target) -> Result<()> {
        let query = |what: &str, path: &str| to.run("", "nix-store", &["-q", what, path]);
        for (name, said) in &self.outputs {
            let path = self.path(name)?;
            ensure!(query("--hash", path)?.trim() == said["narHash"], "{name}");
            let found = query("--references", path)?;
            let found: BTreeSet<&str> = found.lines().collect();
            let said = said["references"].as_array().into_iter().flatten().filter_map(Value::as_str);
            ensure!(found == said.collect(), "{name}: {found:?}");
        }
        to.run("", "nix-store", &["--verify", "--check-contents"]).map(drop)
    }

    fn check_installs(&self, nix: Nix) -> Result<()> {
        let trusted = format!("trusted-public-keys = {PUBLIC_KEY}\nsubstituters = {}\n", self.url);
        let stranger = format!("trusted-public-keys =\nsubstituters = {}\n", self.url);
        let wanted = [self.path("user.out")?, self.path("floating.out")?];
        let (copy, realise) = (["copy", "--from", &self.url], ["-r"]);

        let copied = Target::new(nix)?;
        copied.run(&trusted, "nix", &[&copy[..], &wanted].concat())?;
        self.check(&copied).context("nix copy")?;

        let realised = Target::new(nix)?;
        realised.run(&trusted, "nix-store", &[&realise[..], &wanted].concat())?;
        self.check(&realised).context("nix-store -r")?;
        // By what it made, or by its `.drv` file, which is not in the store. Nix 2.8 wants it to be.
        let drv = self.drvs["user"].as_str();
        let named = [wanted[0], drv];
        for of in if nix == Nix::V2_8 { &named[..1] } else { &named } {
            let log = realised.run(&trusted, "nix", &["log", of])?;
            ensure!(log.contains("this is fixed"), "{of}: {log}");
        }

        // Without the key: what its address proves, and nothing else.
        let refusing = Target::new(nix)?;
        for (program, args) in [("nix", &copy[..]), ("nix-store", &realise)] {
            let output = refusing.output(&stranger, program, &[args, &wanted].concat())?;
            ensure!(!output.status.success(), "{program} takes what nobody vouches for");
        }
        for output in ["lib.out", "lib.dev", "user.out", "floating.out"] {
            ensure!(!refusing.has(self.path(output)?), "{output} was taken");
        }
        let fixed = self.path("fixed.out")?;
        refusing.run(&stranger, "nix", &[&copy[..], &[fixed]].concat())?;
        ensure!(refusing.has(fixed));
        Ok(())
    }
}

/// A store that has nothing yet.
struct Target {
    peer: Peer,
    dir: TempDir,
}

impl Target {
    fn new(nix: Nix) -> Result<Self> {
        let dir = TempDir::with_prefix_in("drover-install-", "/tmp")?;
        Ok(Self { peer: Peer::new(nix)?, dir })
    }

    /// A program of Nix with this store and these settings.
    fn output(&self, settings: &str, program: &str, args: &[&str]) -> Result<Output> {
        let settings = format!("experimental-features = nix-command\nbuild-users-group =\n{settings}");
        let mut command = self.peer.command(program)?;
        // Where `nix copy` takes things from is no option of `--store`'s.
        let place = if args.contains(&"copy") { "--to" } else { "--store" };
        command.args(args).arg(place).arg(self.dir.path()).env("NIX_CONFIG", settings);
        Ok(command.output()?)
    }

    fn run(&self, settings: &str, program: &str, args: &[&str]) -> Result<String> {
        let output = self.output(settings, program, args)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {args:?}: {said}");
        Ok(String::from_utf8(output.stdout)?)
    }

    fn has(&self, path: &str) -> bool {
        self.dir.path().join(path.trim_start_matches('/')).exists()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = drover_store::fs::delete(&self.dir.path().join("nix"));
    }
}

fn install_by_all(url: &str) -> Result<()> {
    let pushed = Pushed::to(url)?;
    for nix in Nix::ALL {
        pushed.check_installs(nix).with_context(|| format!("{nix:?} from {url}"))?;
    }
    Ok(())
}

#[test]
fn real_nix_installs_from_a_directory() -> Result<()> {
    let dir = TempDir::with_prefix_in("drover-install-", "/tmp")?;
    install_by_all(&format!("file://{}", dir.path().display()))
}

#[test]
fn real_nix_installs_by_http() -> Result<()> {
    let dir = TempDir::with_prefix_in("drover-install-", "/tmp")?;
    let http = HttpCache::start(dir.path())?;
    install_by_all(http.url())?;
    // At no moment a narinfo file led to what was not there yet, and nothing was stored twice.
    let mut stored = BTreeSet::new();
    for (method, path, status, _) in http.requests()? {
        if method != "PUT" {
            continue;
        }
        ensure!(matches!(status, 201 | 204), "{path}: {status}");
        if path.ends_with(".narinfo") {
            let text = std::fs::read_to_string(dir.path().join(path.trim_start_matches('/')))?;
            let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
            let nar = format!("/{}", field("URL: ").context("no NAR")?);
            let references = field("References: ").unwrap_or_default().split_whitespace();
            let needed = references.map(|base| format!("/{}.narinfo", &base[..32])).filter(|it| *it != path);
            for needed in [nar].into_iter().chain(needed) {
                ensure!(stored.contains(&needed), "{path} was stored before {needed}");
            }
        }
        ensure!(stored.insert(path.clone()), "{path} was stored twice");
    }
    Ok(())
}
