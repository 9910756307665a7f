//! The operator's image: the program, and the OpenSSH client, which it runs, with the libraries that it is linked with.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::oci::{Config, Layer};
use crate::run;

/// The user that the operator runs as. ssh refuses to run as a user that /etc/passwd does not know.
const USER: u64 = 65532;

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "ld-linux-x86-64.so.2";

pub(super) fn image(programs: &Path, debian: &Path) -> Result<(Config, Layer)> {
    let passwd = format!(
        "root:x:0:0:root:/:/sbin/nologin\ndrover:x:{USER}:{USER}:drover:/home/drover:/sbin/nologin\n"
    );
    let group = format!("root:x:0:\ndrover:x:{USER}:\n");
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
        .directory(LIBRARIES, 0o755)
        .symlink("lib", "usr/lib")
        .directory("lib64", 0o755)
        .file(&format!("lib64/{LOADER}"), 0o755, &debian.join("usr/lib64").join(LOADER))?
        .file("usr/bin/ssh", 0o755, &debian.join("usr/bin/ssh"))?
        .file("bin/drover-operator", 0o755, &programs.join("drover-operator"))?;
    for library in libraries(debian)? {
        layer =
            layer.file(&format!("{LIBRARIES}/{library}"), 0o644, &debian.join(LIBRARIES).join(&library))?;
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

/// The file names of the libraries that ssh is linked with, directly or not, as the loader of its own suite finds them.
fn libraries(debian: &Path) -> Result<Vec<String>> {
    let mut list = Command::new(debian.join("usr/lib64").join(LOADER));
    list.arg("--library-path").arg(debian.join(LIBRARIES)).arg("--list").arg(debian.join("usr/bin/ssh"));
    parse_libraries(&run::stdout(&mut list)?)
}

fn parse_libraries(listed: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for line in listed.lines() {
        match line.trim().split_once(" => ") {
            Some((name, found)) if found.starts_with('/') => names.push(name.to_owned()),
            Some((name, _)) => bail!("ssh is linked with {name}, which is not there"),
            None => {} // the loader and the kernel's vDSO
        }
    }
    names.retain(|name| name != LOADER && !name.contains('/'));
    Ok(names)
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
    fn the_loader_and_the_vdso_are_no_libraries() {
        let listed = "\tlinux-vdso.so.1 (0x00)\n\tlibz.so.1 => /r/usr/lib/libz.so.1 (0x01)\n\t/lib64/ld-linux-x86-64.so.2 => /r/ld.so (0x02)\n";
        assert_eq!(parse_libraries(listed).unwrap(), ["libz.so.1"]);
        assert!(parse_libraries("\tlibx.so.1 => not found\n").is_err());
    }
}
