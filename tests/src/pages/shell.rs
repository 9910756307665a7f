//! A shell for the commands of pages: the programs that they name are in its PATH, and what it writes lands in a directory
//! of its own, where the checkout's charts and examples are too.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use xtask::parts::go;
use xtask::{checkout, run};

use super::{Kind, Page};
use crate::program;

/// Seconds after which a page's commands are ended.
const LIMIT: u32 = 300;
/// What of the checkout pages name by its path.
const SHOWN: [&str; 5] = ["charts", "crds", "docs", "examples", "tests"];

/// Programs and files for one page.
pub struct Shell {
    dir: TempDir,
}

impl Shell {
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("drover-pages-").tempdir_in("/tmp")?;
        let this = Self { dir };
        fs::create_dir(this.bin())?;
        fs::create_dir(this.home())?;
        for name in SHOWN {
            symlink(checkout().join(name), this.home().join(name))?;
        }
        let kubectl = go::kubernetes()?.join("kubectl");
        let (drover, builder) = (program("drover")?, program("drover-builder")?);
        for (name, file) in [
            ("kubectl", &kubectl),
            ("helm", &go::helm()?),
            ("drover", &drover),
            ("kubectl-drover", &drover),
            ("drover-builder", &builder),
        ] {
            symlink(file, this.bin().join(name))?;
        }
        Ok(this)
    }

    /// Where the commands run, and what is their home.
    pub fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    /// Has `name` run this command, with the arguments that follow the name and then these.
    pub fn wrap(&self, name: &str, command: &Command, more: &str) -> Result<()> {
        let mut text = String::from("#!/bin/sh\n");
        for (name, value) in command.get_envs() {
            let name = name.to_string_lossy();
            text += &match value {
                Some(value) => format!("export {name}={}\n", quoted(&value.to_string_lossy())),
                None => format!("unset {name}\n"),
            };
        }
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<_> = words.map(|word| quoted(&word.to_string_lossy())).collect();
        text += &format!("exec {} \"$@\" {more}\n", words.join(" "));
        let path = self.bin().join(name);
        if path.is_symlink() {
            fs::remove_file(&path)?;
        }
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Runs the page's commands of this kind, by this program if that is not the shell itself (`nsenter …`). The error has
    /// all that they said.
    pub fn run(
        &self,
        page: &Page,
        kind: Kind,
        kubeconfig: &Path,
        env: &[(&str, &str)],
        by: &[&str],
    ) -> Result<()> {
        let Some(script) = page.script(kind) else { return Ok(()) };
        let file = self.dir.path().join("script");
        fs::write(&file, script)?;
        let (limit, file) = (LIMIT.to_string(), file.display().to_string());
        let mut words = [by, &["timeout", &limit, "bash", &file]].concat();
        let mut command = Command::new(words.remove(0));
        let path = format!("{}:{}", self.bin().display(), std::env::var("PATH").context("there is a PATH")?);
        command.args(words).current_dir(self.home()).env("PATH", path).env("HOME", self.home());
        command.env("KUBECONFIG", kubeconfig).envs(env.iter().copied());
        for name in
            ["XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HELM_CONFIG_HOME", "HELM_CACHE_HOME"]
        {
            command.env_remove(name);
        }
        let output = run::output(&mut command)?;
        if !output.status.success() {
            let [out, err] =
                [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            bail!(
                "{}: {}\nstandard output:\n{out}\nstandard error:\n{err}",
                page.path.display(),
                output.status
            );
        }
        Ok(())
    }

    fn bin(&self) -> PathBuf {
        self.dir.path().join("bin")
    }
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
