//! Commands of the pages for users that take running pods and a real Nix, page by page, each in a namespace of its own.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use drover_tests::Installation;
use drover_tests::pages::shell::Shell;
use drover_tests::pages::{self, Kind, Page};
use xtask::{checkout, run};

#[test]
fn what_pages_do_on_a_node_works() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("drover-node-").tempdir_in("/tmp")?;
    let drover = Installation::up(scratch.path())?;
    let mut followed = 0;
    for page in pages::of_users(&checkout())? {
        if page.of(Kind::Node).next().is_some() {
            follow(&drover, &page).with_context(|| drover.operator_log())?;
            followed += 1;
        }
    }
    ensure!(followed > 2, "pages have nothing for a node any more");
    Ok(())
}

fn follow(drover: &Installation, page: &Page) -> Result<()> {
    let path = page.path.with_extension("").to_string_lossy().to_lowercase();
    let namespace = format!("page-{}", path.replace('/', "-"));
    drover.cluster.kubectl(&["delete", "namespace", &namespace, "--ignore-not-found", "--wait"])?;
    drover.cluster.kubectl(&["create", "namespace", &namespace])?;

    let shell = Shell::new()?;
    // Nix finds examples by their paths from here, and keeps its store where the machine has none of its own.
    let nix = drover.nix.clone().with(&checkout().join("examples")).in_dir(&shell.home());
    let store = drover.store().display().to_string();
    for program in ["nix", "nix-instantiate", "nix-store"] {
        let mut command = nix.command(program)?;
        command.env(
            "NIX_CONFIG",
            "substitute = false\nbuild-users-group =\nexperimental-features = nix-command\n",
        );
        shell.wrap(program, &command, &format!("--store {store}"))?;
    }
    let mut request = Command::new("sh");
    let drover_itself = drover_tests::program("drover")?.display().to_string();
    request.args([
        "-c",
        &format!("case $1 in request) set -- \"$@\" --store {store};; esac; exec {drover_itself} \"$@\""),
        "drover",
    ]);
    shell.wrap("drover", &request, "")?;

    let kubeconfig = shell.home().join("kubeconfig");
    std::fs::copy(drover.cluster.kubeconfig(), &kubeconfig)?;
    let mut kubectl = drover.cluster.kubectl_command()?;
    kubectl.env("KUBECONFIG", &kubeconfig).args([
        "config",
        "set-context",
        "--current",
        "--namespace",
        &namespace,
    ]);
    run::stdout(&mut kubectl)?;

    let netns = format!("--net={}", drover.cluster.netns().display());
    let cache = [("CACHE", drover.cache.url())];
    shell.run(page, Kind::Node, &kubeconfig, &cache, &["nsenter", &netns, "--"])?;
    drover.cluster.kubectl(&["delete", "namespace", &namespace, "--wait=false"]).map(drop)
}
