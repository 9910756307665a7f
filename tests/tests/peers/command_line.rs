//! `drover` as people run it: what it builds here is what real Nix builds, and it ends with the exit code that the help
//! promises.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use drover_tests::{Nix, Peer, copy_program, program, sqlite};
use serde_json::Value;
use xtask::{checkout, run};

/// Somebody's home directory.
pub(crate) struct Home(tempfile::TempDir);

impl Home {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(tempfile::Builder::new().prefix("drover-home-").tempdir_in("/tmp")?))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where `drover build` keeps its store unless told otherwise.
    pub(crate) fn store(&self) -> PathBuf {
        self.path().join(".local/state/drover/store")
    }

    /// `drover` in this home, with nothing else of the environment that it looks at.
    pub(crate) fn drover(&self, args: &[&str]) -> Result<Command> {
        let mut drover = Command::new(program("drover")?);
        for name in ["XDG_STATE_HOME", "XDG_CACHE_HOME", "DROVER_BUILDER", "KUBECONFIG"] {
            drover.env_remove(name);
        }
        drover.env("HOME", self.path()).args(args).current_dir(checkout());
        Ok(drover)
    }

    pub(crate) fn run(&self, args: &[&str]) -> Result<Output> {
        Ok(self.drover(args)?.output()?)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = drover_store::fs::delete(&self.store().join("nix"));
    }
}

#[test]
fn hello_is_what_nix_says_it_is() -> Result<()> {
    let home = Home::new()?;
    let first = home.run(&["build", "examples/hello.yaml", "--output", "json"])?;
    let request = built(&first)?;
    let output = &request["status"]["outputs"]["out"];
    let said = String::from_utf8_lossy(&first.stderr);
    ensure!(said.contains("building in /build as 1000:100"), "the log is not on standard error: {said}");

    // Nix computes the same path for the same derivation, from its own language, and builds the same.
    let peer = Peer::new(Nix::V2_34)?.with(&checkout().join("examples"));
    std::fs::create_dir(home.path().join("nix"))?;
    let peer = peer.with_at(&home.path().join("nix"), "/nix");
    let expression = checkout().join("examples/hello.nix").display().to_string();
    let drv = peer.run("nix-instantiate", &[&expression])?;
    assert_eq!(peer.run("nix-store", &["--query", "--outputs", drv.trim()])?.trim(), output["path"]);
    assert_eq!(request["status"]["drvPath"], drv.trim());

    // Nix finds nothing wrong with the store that it was built in.
    let store = home.store().display().to_string();
    Peer::new(Nix::V2_34)?.run("nix-store", &["--store", &store, "--verify", "--check-contents"])?;

    let again = built(&home.run(&["build", "examples/hello.yaml", "--output", "json"])?)?;
    assert_eq!(again["status"]["conditions"][1]["reason"], "AlreadyBuilt", "{again:#}");
    assert_eq!(again["status"]["outputs"]["out"], *output);
    Ok(())
}

#[test]
fn an_ordinary_user_can_build() -> Result<()> {
    const NOBODY: u32 = 65534;
    let home = Home::new()?;
    std::os::unix::fs::chown(home.path(), Some(NOBODY), Some(NOBODY))?;
    // The checkout may be where this user cannot go: the programs and the request come to the user.
    for name in ["drover", "drover-builder"] {
        copy_program(&program(name)?, &home.path().join(name))?;
    }
    let yaml = std::fs::read_to_string(checkout().join("examples/hello.yaml"))?;
    let mut drover = Command::new(home.path().join("drover"));
    drover.env_clear().env("HOME", home.path()).env("PATH", "/usr/bin:/bin").current_dir("/");
    drover.args(["build", "-", "--output", "json"]).uid(NOBODY).gid(NOBODY);
    let request = built(&output_of(drover, &yaml)?)?;
    assert_eq!(request["status"]["conditions"][1]["reason"], "BuilderReady", "{request:#}");
    Ok(())
}

#[test]
fn real_software_from_drv_files() -> Result<()> {
    let home = Home::new()?;
    let theirs = home.path().join("theirs");
    std::fs::create_dir_all(theirs.join("nix"))?;
    let inputs = sqlite::inputs()?;
    let peer = Peer::new(Nix::V2_34)?.with(&checkout().join("tests")).with(&inputs);
    let peer = peer.with_at(&theirs.join("nix"), "/nix");
    let (tcc, libc, source) = (inputs.join("tcc"), inputs.join("libc"), inputs.join("sqlite"));
    let [tcc, libc, source] = [&tcc, &libc, &source].map(|path| path.display().to_string());
    let expression = checkout().join("tests/derivations/sqlite").display().to_string();
    let args =
        ["--argstr", "tcc", &tcc, "--argstr", "libc", &libc, "--argstr", "sqlite", &source, &expression];
    let drvs = peer.run("nix-instantiate", &args)?;
    let last = drvs.lines().find(|drv| drv.ends_with("-sqlite-database.drv")).context("no database")?;

    // The whole chain out of one .drv, in order; its sources lie in the store of the .drv files.
    let store = theirs.display().to_string();
    let yaml = run::stdout(&mut home.drover(&["request", last, "--store", &store, "--recursive"])?)?;
    assert_eq!(yaml.matches("kind: BuildRequest").count(), 3, "{yaml}");
    let reversed: Vec<&str> = yaml.rsplit("---\n").filter(|document| !document.is_empty()).collect();
    let yaml = reversed.join("---\n");
    let cache = format!("file://{}", home.path().join("cache").display());
    let build = home.drover(&["build", "-", "--cache", &cache, "--cache", &store, "--output", "json"])?;
    let done = built(&output_of(build, &yaml)?)?;

    peer.run("nix-store", &["--realise", last])?;
    for request in done["items"].as_array().context("several requests are a List")? {
        let output = &request["status"]["outputs"]["out"];
        let path = output["path"].as_str().context("a path")?;
        let hash = peer.run("nix-store", &["--query", "--hash", path])?;
        assert_eq!(output["narHash"], hash.trim(), "{path}");
    }
    let ours = home.store().display().to_string();
    Peer::new(Nix::V2_34)?.run("nix-store", &["--store", &ours, "--verify", "--check-contents"])?;
    Ok(())
}

#[test]
fn what_nix_shows_is_what_the_file_says() -> Result<()> {
    let home = Home::new()?;
    std::fs::create_dir_all(home.path().join("nix"))?;
    let expression = r#"
        let dep = derivation { name = "dep"; system = "x"; builder = "/b"; outputs = [ "out" "dev" ]; };
        in derivation { name = "Top_1.0"; system = "x"; builder = "/b"; args = [ "a\nb" ]; needs = dep.dev; }
    "#;
    for version in Nix::ALL {
        let peer = Peer::new(version)?.with_at(&home.path().join("nix"), "/nix");
        let drv = peer.run("nix-instantiate", &["-E", expression])?;
        let store = home.path().display().to_string();
        let of_file = run::stdout(&mut home.drover(&["request", drv.trim(), "--store", &store])?)?;
        assert!(of_file.contains("name: top-1-0-") && of_file.contains("-dep-dev"), "{of_file}");

        let show: &[&str] = match version {
            Nix::V2_8 => &["show-derivation"],
            _ => &["derivation", "show"],
        };
        let features = ["--extra-experimental-features", "nix-command", "--recursive"];
        let shown = peer.run("nix", &[show, &features, &[drv.trim()]].concat())?;
        let mut request = home.drover(&["request", "-", "--store", &store])?;
        assert_eq!(run::filter(&mut request, shown.as_bytes())?, of_file, "{version:?}");
    }
    Ok(())
}

/// No `.drv` is on this machine: what the request names is read from the cache that it is given.
#[test]
fn what_is_only_named_is_read_from_a_cache() -> Result<()> {
    let home = Home::new()?;
    let theirs = home.path().join("theirs");
    std::fs::create_dir_all(theirs.join("nix"))?;
    let peer = Peer::new(Nix::V2_34)?.with_at(&theirs.join("nix"), "/nix");
    let expression = r#"
        let make = name: text: derivation {
          inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" text ];
        };
        dep = make "dep" "echo words > $out";
        in make "top" "read line < ${dep}; echo $line > $out"
    "#;
    let drv = peer.run("nix-instantiate", &["-E", expression])?;
    let cache = format!("file://{}", home.path().join("cache").display());
    let nix = ["--extra-experimental-features", "nix-command"];
    peer.run("nix", &[&nix[..], &["copy", "--derivation", "--to", &cache, drv.trim()]].concat())?;
    let store = theirs.display().to_string();
    let request = ["request", drv.trim(), "--store", &store, "--recursive", "--by-path"];
    let yaml = run::stdout(&mut home.drover(&request)?)?;
    ensure!(yaml.matches("drvPath:").count() == 2 && !yaml.contains("derivation:"), "{yaml}");

    let plan = output_of(home.drover(&["plan", "-", "--cache", &cache])?, &yaml)?;
    let said = String::from_utf8_lossy(&plan.stdout);
    ensure!(said.contains("to be built for x86_64-linux") && said.contains("after: dep-"), "{said} {plan:?}");
    let done =
        built(&output_of(home.drover(&["build", "-", "--cache", &cache, "--output", "json"])?, &yaml)?)?;
    let items = done["items"].as_array().context("two requests are a List")?;
    let output = peer.run("nix-store", &["--query", "--binding", "out", drv.trim()])?;
    assert_eq!(items[1]["status"]["outputs"]["out"]["path"], output.trim(), "{done:#}");
    assert_eq!(items[1]["status"]["drvPath"], drv.trim());

    let elsewhere = format!("file://{}", home.path().join("elsewhere").display());
    let lost = output_of(home.drover(&["build", "-", "--cache", &elsewhere])?, &yaml)?;
    let said = String::from_utf8_lossy(&lost.stderr);
    ensure!(lost.status.code() == Some(2) && said.contains("is in no cache (asked: "), "{said}");
    Ok(())
}

#[test]
fn exit_codes_and_reasons() -> Result<()> {
    let home = Home::new()?;
    let failing = home.run(&["build", "examples/failing.yaml", "--output", "json"])?;
    assert_eq!(failing.status.code(), Some(1));
    let list: Value = serde_json::from_slice(&failing.stdout)?;
    let failures: Vec<&Value> =
        list["items"].as_array().context("a List")?.iter().map(|item| &item["status"]["failure"]).collect();
    let reasons: Vec<&str> = failures.iter().filter_map(|failure| failure["reason"].as_str()).collect();
    assert_eq!(reasons, ["BuildFailed", "TimedOut", "InputMissing", "WrongSystem"]);
    assert_eq!(failures[0]["logTail"], serde_json::json!(["no rule to make target"]));
    assert!(failures[2]["message"].as_str().is_some_and(|text| text.contains("-nowhere")), "{}", failures[2]);
    // What needs an output that was not built is not built either.
    let chain = "examples/failing.yaml and what needs it";
    let needing = needing_the_first(&list)?;
    let output = output_of(home.drover(&["build", "-", "--output", "json"])?, &needing)?;
    assert_eq!(output.status.code(), Some(1), "{chain}");
    let list: Value = serde_json::from_slice(&output.stdout)?;
    let last = &list["items"][1]["status"]["failure"];
    assert!(last["message"].as_str().is_some_and(|text| text.contains("exit-code")), "{last}");

    for (args, code, said) in [
        (&["build", "/nonexistent.yaml"][..], 2, "/nonexistent.yaml"),
        (&["build", "Cargo.toml"], 2, "Cargo.toml:"),
        (&["build", "examples/class.yaml"], 2, "examples/class.yaml:3: kind: it is BuilderClass"),
        (&["build"], 2, "FILE|DRV"),
        (&["build", "examples/hello.yaml", "--cache", "gopher://x"], 2, "gopher"),
        (&["build", "examples/hello.yaml", "--builder", "/bin/false"], 3, "builder"),
        (&["build", "examples/hello.yaml", "--cache", "http://127.0.0.1:9"], 3, "127.0.0.1:9"),
        (&["request", "examples/hello.nix"], 2, "expected a .drv file"),
        (&["request", "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-a.drv", "--store", "/tmp"], 2, "--store"),
        (&["nonsense"], 2, "nonsense"),
        (&["wait", "x"], 3, "kubeconfig"),
        (&["--help"], 0, ""),
    ] {
        let output = home.run(args)?;
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(error.contains(said), "{args:?}: {error}");
    }
    Ok(())
}

/// The first request of a list and one that has its output as an input, the wrong way round.
fn needing_the_first(list: &Value) -> Result<String> {
    let mut first = list["items"][0].clone();
    let drv_path = first["status"]["drvPath"].as_str().context("a drvPath")?.to_owned();
    let path = drv_path.strip_suffix(".drv").context("a .drv")?.to_owned();
    first["spec"]["derivation"]["outputs"]["out"]["path"] = path.clone().into();
    let mut second = first.clone();
    second["metadata"]["name"] = "second".into();
    second["spec"]["derivation"]["name"] = "second".into();
    second["spec"]["derivation"]["inputSrcs"] = serde_json::json!([path]);
    second["spec"]["derivation"]["outputs"] = serde_json::json!({ "out": {} });
    Ok(format!("---\n{second}\n---\n{first}\n"))
}

/// The one request, or the list, that a build printed which went well.
fn built(output: &Output) -> Result<Value> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{}: {said}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    serde_json::from_slice(&output.stdout).context("the output is JSON")
}

fn output_of(mut command: Command, input: &str) -> Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    let input = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    // Who refuses the input may go before it was all read.
    let _ = writer.join();
    Ok(output)
}
