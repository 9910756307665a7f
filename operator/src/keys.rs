//! The keys that open builders: derived, never stored.
//!
//! This module owns the operator's seed and what is derived from it: one Ed25519 client key for each attempt of each
//! request, HKDF-SHA256 over the request's uid and the attempt's number. Only the public half leaves the process
//! (in the pod's arguments) and, for the moments that `ssh` needs it, the private half in a file of mode 0600. It may
//! not touch the network or Kubernetes; where the seed is kept is the caller's business.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::hkdf;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _};

use crate::error::Error;

/// Bytes of a seed.
pub const SEED_LEN: usize = 32;
/// Key type in OpenSSH's files and messages.
const KEY_TYPE: &[u8] = b"ssh-ed25519";
/// HKDF's salt: a name for the purpose, so that the same seed used elsewhere gives other keys.
const PURPOSE: &[u8] = b"drover.build/v1alpha1 client key of an attempt";
/// Columns of a PEM line as `ssh-keygen` writes them.
const PEM_COLUMNS: usize = 70;

/// The secret that all client keys follow from. Its Debug form says nothing.
#[derive(Clone)]
pub struct Seed([u8; SEED_LEN]);

/// The client's key pair for one attempt. Its Debug form has the public half only.
pub struct ClientKey {
    seed: [u8; 32],
    public: [u8; 32],
}

impl Seed {
    /// A new one from the system's random numbers.
    pub fn generate() -> Result<Self, Error> {
        let mut seed = [0; SEED_LEN];
        SystemRandom::new()
            .fill(&mut seed)
            .map_err(|_| Error::Seed { why: "the system gave no random numbers".into() })?;
        Ok(Self(seed))
    }

    /// Exactly [`SEED_LEN`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let seed = bytes.try_into().map_err(|_| Error::Seed {
            why: format!("it has {} bytes; {SEED_LEN} are needed", bytes.len()),
        })?;
        Ok(Self(seed))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The key of one attempt. The same uid and attempt always give the same key.
    pub fn client_key(&self, uid: &str, attempt: u32) -> Result<ClientKey, Error> {
        let fail = |_| Error::Seed { why: "deriving a key from it failed".into() };
        let attempt = attempt.to_be_bytes();
        let mut seed = [0; 32];
        hkdf::Salt::new(hkdf::HKDF_SHA256, PURPOSE)
            .extract(&self.0)
            .expand(&[uid.as_bytes(), &[0], &attempt], hkdf::HKDF_SHA256)
            .and_then(|okm| okm.fill(&mut seed))
            .map_err(fail)?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|_| Error::Seed { why: "deriving a key from it failed".into() })?;
        let mut public = [0; 32];
        public.copy_from_slice(pair.public_key().as_ref());
        Ok(ClientKey { seed, public })
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(…)")
    }
}

impl ClientKey {
    /// `ssh-ed25519 AAAA…`, as `authorized_keys` has it.
    pub fn public_line(&self) -> String {
        format!("ssh-ed25519 {}", BASE64.encode(self.public_blob()))
    }

    /// The file that `ssh -i` takes (OpenSSH: PROTOCOL.key), unencrypted.
    pub fn private_file(&self) -> String {
        // The two check numbers tell a reader whether decryption worked; without encryption any pair of equals does.
        let check = [0x44, 0x72, 0x6f, 0x76];
        let mut secret = Vec::new();
        secret.extend_from_slice(&check);
        secret.extend_from_slice(&check);
        put_string(&mut secret, KEY_TYPE);
        put_string(&mut secret, &self.public);
        put_string(&mut secret, &[self.seed, self.public].concat());
        put_string(&mut secret, b"");
        let mut padding = 1;
        while secret.len() % 8 != 0 {
            secret.push(padding);
            padding += 1;
        }

        let mut file = b"openssh-key-v1\0".to_vec();
        put_string(&mut file, b"none");
        put_string(&mut file, b"none");
        put_string(&mut file, b"");
        file.extend_from_slice(&1u32.to_be_bytes());
        put_string(&mut file, &self.public_blob());
        put_string(&mut file, &secret);

        let text = BASE64.encode(file);
        let mut pem = String::from("-----BEGIN OPENSSH PRIVATE KEY-----\n");
        let mut rest = text.as_str();
        while !rest.is_empty() {
            // Base64 is ASCII, so every index is a character's boundary.
            let (line, tail) = rest.split_at(rest.len().min(PEM_COLUMNS));
            pem.push_str(line);
            pem.push('\n');
            rest = tail;
        }
        pem.push_str("-----END OPENSSH PRIVATE KEY-----\n");
        pem
    }

    fn public_blob(&self) -> Vec<u8> {
        let mut blob = Vec::new();
        put_string(&mut blob, KEY_TYPE);
        put_string(&mut blob, &self.public);
        blob
    }
}

impl fmt::Debug for ClientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClientKey({})", self.public_line())
    }
}

/// A string as SSH writes it: four bytes of length, big endian, and the bytes (RFC 4251, section 5).
fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    // Callers pass constants, keys of fixed size and what was built from them: far below 4 GiB.
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    #[test]
    fn a_key_belongs_to_one_attempt_of_one_request() {
        let seed = Seed::from_bytes(&[7; SEED_LEN]).unwrap();
        let line = |uid: &str, attempt| seed.client_key(uid, attempt).unwrap().public_line();
        assert_eq!(line("a", 1), line("a", 1));
        assert_ne!(line("a", 1), line("a", 2));
        assert_ne!(line("a", 1), line("b", 1));
        let other = Seed::from_bytes(&[8; SEED_LEN]).unwrap();
        assert_ne!(line("a", 1), other.client_key("a", 1).unwrap().public_line());
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let seed = Seed::from_bytes(&[7; SEED_LEN]).unwrap();
        assert_eq!(format!("{seed:?}"), "Seed(…)");
        let key = seed.client_key("a", 1).unwrap();
        assert_eq!(format!("{key:?}"), format!("ClientKey({})", key.public_line()));
    }

    #[test]
    fn a_seed_of_another_length_is_refused() {
        assert!(Seed::from_bytes(&[0; 31]).unwrap_err().to_string().contains("31 bytes"));
    }

    /// The judge is OpenSSH itself: it reads the private file and gives the same public half.
    #[test]
    fn openssh_reads_the_private_file() {
        let key = Seed::generate().unwrap().client_key("uid", 3).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(key.private_file().as_bytes()))
            .unwrap();
        let output = std::process::Command::new("ssh-keygen")
            .arg("-y")
            .arg("-f")
            .arg(&path)
            .output()
            .expect("ssh-keygen of OpenSSH must be installed: the operator needs it to be right");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), key.public_line());
    }
}
