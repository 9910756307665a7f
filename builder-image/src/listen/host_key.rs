//! The server's own key: the one in a file, or one that is made at start and lives as long as the process.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use ring::rand::SecureRandom as _;
use russh::keys::ssh_key::private::Ed25519Keypair;
use russh::keys::{Algorithm, PrivateKey};

/// Reads the key, or makes one.
pub(super) fn load(file: Option<&Path>) -> anyhow::Result<PrivateKey> {
    let Some(file) = file else {
        return make();
    };
    let text = std::fs::read(file).with_context(|| format!("cannot read the host key {}", file.display()))?;
    let key = PrivateKey::from_openssh(text)
        .with_context(|| format!("{} is no OpenSSH private key", file.display()))?;
    ensure!(
        !key.is_encrypted(),
        "the host key {} has a passphrase, and nobody here to type it",
        file.display()
    );
    match key.algorithm() {
        Algorithm::Ed25519 => Ok(key),
        other => bail!(
            "the host key {} is of type {other}, only ssh-ed25519 is used (make one: ssh-keygen -t ed25519)",
            file.display()
        ),
    }
}

/// The public half as it stands in `known_hosts`: type and key, no comment.
pub(super) fn public_line(key: &PrivateKey) -> anyhow::Result<String> {
    let line = key.public_key().to_openssh().context("cannot encode the host key")?;
    Ok(line.split(' ').take(2).collect::<Vec<_>>().join(" "))
}

fn make() -> anyhow::Result<PrivateKey> {
    let mut seed = [0; 32];
    let random = ring::rand::SystemRandom::new().fill(&mut seed);
    random.map_err(|_| anyhow::anyhow!("cannot get random bytes for a host key"))?;
    Ok(Ed25519Keypair::from_seed(&seed).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_that_is_made_is_a_new_one() {
        let (a, b) = (load(None).unwrap(), load(None).unwrap());
        assert_ne!(a.public_key(), b.public_key());
        let line = public_line(&a).unwrap();
        assert!(line.starts_with("ssh-ed25519 AAAA") && line.split(' ').count() == 2);
    }

    #[test]
    fn a_file_has_to_be_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        assert!(format!("{:#}", load(Some(&file)).unwrap_err()).contains("cannot read"));
        std::fs::write(&file, "no key").unwrap();
        assert!(format!("{:#}", load(Some(&file)).unwrap_err()).contains("no OpenSSH private key"));
        let key = load(None).unwrap();
        std::fs::write(&file, key.to_openssh(russh::keys::ssh_key::LineEnding::LF).unwrap()).unwrap();
        assert_eq!(load(Some(&file)).unwrap().public_key(), key.public_key());
    }
}
