//! What `--store` takes: real Nix puts something into a store of this name, and Drover has to find it there.

use anyhow::{Context as _, Result, ensure};
use drover_tests::{Nix, Peer, program};

/// What people write, with an environment before it. `@` is a fresh directory, in which the programs run.
const SAME: &[&str] = &[
    "local",
    "auto",
    "@/a",
    "./a",
    "../d/a",
    "a/b",
    "@/with space",
    "@/a%20b",
    "@/a+b",
    "@/a?trusted=1&priority=3&want-mass-query=1&require-sigs=false",
    "local?root=@/a",
    "auto?root=@/a",
    "local?root=",
    "local?root",
    "local?root=@/a/",
    "local?root=@/a&&",
    "local?root=@/a%20b",
    "local?root=@/a+b",
    "local?root=@/a&store=/s",
    "local?store=@/s",
    "local?store=@/s/",
    "local?store=@/s&real=@/r",
    "local?real=@/r",
    "local?real=@/r&state=@/st&log=@/l",
    "local?root=@/a&real=@/r",
    "local?root=@/a&state=@/st",
    "local?nonsense=1&root=@/a",
    "@/a?store=/s",
    "@/a?state=@/st",
    "@/a?",
    "NIX_STORE_DIR=@/s local",
    "NIX_STATE_DIR=@/st local",
    "NIX_STATE_DIR=@/st @/a",
    "NIX_STORE_DIR=@/s local?root=@/a",
    "NIX_STORE_DIR=@/s local?store=@/t",
    "NIX_LOG_DIR=@/l local",
];
/// What Nix 2.8 did not know yet.
const SAME_SINCE: &[&str] = &["", "local://", "local://?root=@/a", "local://@/a", "@/b?root=@/a"];
/// What is no local store, or not well formed, to either.
const REFUSED: &[&str] = &[
    "a",
    ".",
    "LOCAL",
    "local?root=a",
    "local?root=./a",
    "local?state=st",
    "local?store=s",
    "local?root=@/%zz",
    "file://a",
    "dummy://",
    "unix://@/socket",
    "daemon",
];

/// Each store is new. What is left of Nix's command: whether it succeeded; of Drover's: its last line.
const SCRIPT: &str = r#"
builder=$1 dir=$2
printf 'found\n' >/tmp-object
while IFS= read -r line; do
	rm -rf "$dir" /nix/store /nix/var
	mkdir "$dir"
	cd "$dir"
	env=A=b uri=$line
	case $line in
	NIX_*) env=${line%% *} uri=${line#* } ;;
	esac
	env "$env" nix-store --store "$uri" --add /tmp-object >/dev/null 2>&1
	theirs=$?
	ours=$(env "$env" "$builder" verify --check-contents --store "$uri" 2>/dev/null | tail -n 1)
	echo "$theirs|$ours"
done
"#;

/// What the script says of each.
fn ask(nix: Nix, uris: &[&str]) -> Result<Vec<String>> {
    let dir = tempfile::tempdir()?;
    let work = dir.path().join("d");
    let work_text = work.to_str().context("temporary directories are UTF-8")?;
    let builder = program("drover-builder")?;
    let builder_text = builder.to_str().context("the checkout's path is UTF-8")?;
    let mut shell = Peer::new(nix)?.with(&builder).command("sh")?;
    shell.args(["-c", SCRIPT, "sh", builder_text, work_text]);
    let lines: String = uris.iter().map(|uri| uri.replace('@', work_text) + "\n").collect();
    let said = xtask::run::filter(&mut shell, lines.as_bytes())?;
    let _ = drover_store::fs::delete(&work);
    let said: Vec<String> = said.lines().map(str::to_owned).collect();
    ensure!(said.len() == uris.len(), "{nix:?}: {said:?}");
    Ok(said)
}

#[test]
fn drover_finds_what_nix_put_there() -> Result<()> {
    for nix in Nix::ALL {
        let uris = if nix == Nix::V2_8 { SAME } else { &[SAME, SAME_SINCE].concat() };
        for (uri, said) in uris.iter().zip(ask(nix, uris)?) {
            ensure!(said == "0|1 paths checked, 0 problems", "{nix:?}: {uri:?}: {said}");
        }
    }
    Ok(())
}

#[test]
fn drover_refuses_what_nix_refuses() -> Result<()> {
    for nix in Nix::ALL {
        for (uri, said) in REFUSED.iter().zip(ask(nix, REFUSED)?) {
            ensure!(!said.starts_with("0|") && said.ends_with('|'), "{nix:?}: {uri:?}: {said}");
        }
    }
    Ok(())
}
