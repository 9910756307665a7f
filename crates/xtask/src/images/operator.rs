//! The operator's image: the program, and the OpenSSH client, which it runs, with the libraries that it is linked with.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use super::oci::{Config, Layer};
use crate::platform::Platform;
use crate::run;

/// The user that the operator runs as. ssh refuses to run as a user that /etc/passwd does not know.
const USER: u64 = 65532;

pub(super) fn image(platform: Platform, programs: &Path, debian: &Path) -> Result<(Config, Layer)> {
    let passwd = format!(
        "root:x:0:0:root:/:/sbin/nologin\ndrover:x:{USER}:{USER}:drover:/home/drover:/sbin/nologin\n"
    );
    let group = format!("root:x:0:\ndrover:x:{USER}:\n");
    let libraries = format!("usr/lib/{}", platform.triplet());
    let (loader_dir, loader) = platform.loader();
    let mut layer = super::base(&passwd, &group)
        .directory("home", 0o755)
        .owned_directory("home/drover", 0o700, USER)
        .bytes("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n")
        .directory("etc/ssl", 0o755)
        .directory("etc/ssl/certs", 0o755)
        .file("etc/ssl/certs/ca-certificates.crt", 0o644, &debian.join("etc/ssl/certs/ca-certificates.crt"))?
        .directory("usr", 0o755)
        .directory("usr/bin", 0o755)
        .directory("usr/lib", 0o755)
        .directory(&libraries, 0o755)
        .symlink("lib", "usr/lib")
        .file("usr/bin/ssh", 0o755, &debian.join("usr/bin/ssh"))?
        .file("bin/drover-operator", 0o755, &programs.join("drover-operator"))?;
    let loader_dir = match loader_dir {
        "lib" => "usr/lib",
        other => {
            layer = layer.directory(other, 0o755);
            other
        }
    };
    let debian_libraries = debian.join(&libraries);
    layer = layer.file(&format!("{loader_dir}/{loader}"), 0o755, &debian_libraries.join(loader))?;
    for library in linked(&debian.join("usr/bin/ssh"), &debian_libraries, loader)? {
        layer = layer.file(&format!("{libraries}/{library}"), 0o644, &debian_libraries.join(&library))?;
    }
    let layer = super::licences(layer, debian, &notices(debian)?)?;
    let config = Config {
        entrypoint: vec!["/bin/drover-operator".into()],
        env: vec![
            "PATH=/bin:/usr/bin".into(),
            "HOME=/home/drover".into(),
            "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt".into(),
        ],
        user: format!("{USER}:{USER}"),
        labels: super::labels("drover-operator"),
        ..Config::default()
    };
    Ok((config, layer))
}

/// The file names of the libraries in `libraries` that a program is linked with, directly or not; of any platform: nothing
/// of it is run.
fn linked(program: &Path, libraries: &Path, loader: &str) -> Result<BTreeSet<String>> {
    let (mut found, mut next) = (BTreeSet::new(), vec![program.to_owned()]);
    while let Some(file) = next.pop() {
        let dynamic = run::stdout(Command::new("readelf").args(["--dynamic", "--wide"]).arg(&file))?;
        for name in needed(&dynamic).filter(|name| *name != loader) {
            let library = libraries.join(name);
            ensure!(library.is_file(), "{} is linked with {name}, which is not there", file.display());
            if found.insert(name.to_owned()) {
                next.push(library);
            }
        }
    }
    ensure!(!found.is_empty(), "{} is linked with nothing", program.display());
    Ok(found)
}

/// From lines such as ` 0x0000000000000001 (NEEDED)  Shared library: [libz.so.1]`.
fn needed(dynamic: &str) -> impl Iterator<Item = &str> {
    let lines = dynamic.lines().filter(|line| line.contains("(NEEDED)"));
    lines.filter_map(|line| line.split_once('[')?.1.strip_suffix(']'))
}

/// Every package that was unpacked with ssh: more than the image has files of, and none too few.
pub(super) fn notices(debian: &Path) -> Result<Vec<String>> {
    let mut packages = Vec::new();
    for entry in std::fs::read_dir(debian.join("usr/share/doc"))? {
        let entry = entry?;
        if entry.path().join("copyright").is_file() {
            packages.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    packages.sort_unstable();
    Ok(packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_that_are_needed() {
        let dynamic =
            " 0x01 (NEEDED)    Shared library: [libz.so.1]\n 0x0e (SONAME)    Library soname: [liba.so]\n";
        assert_eq!(needed(dynamic).collect::<Vec<_>>(), ["libz.so.1"]);
    }

    #[test]
    fn a_library_that_is_missing_is_told() {
        let program = std::env::current_exe().unwrap();
        let nowhere = tempfile::tempdir().unwrap();
        let error = linked(&program, nowhere.path(), "none").unwrap_err().to_string();
        assert!(error.contains("is linked with lib") && error.ends_with("which is not there"), "{error}");
    }
}
