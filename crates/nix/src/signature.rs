//! Ed25519 keys and signatures in Nix's text form, `name:base64` (Nix: signature/local-keys.cc).

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};

use crate::Error;

/// Most bytes of a key or signature in text form that are looked at.
pub const MAX_LEN: usize = 1024;

/// Name of the key and 64 bytes. Orders by name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Signature {
    pub key_name: String,
    pub bytes: [u8; 64],
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PublicKey {
    pub name: String,
    pub bytes: [u8; 32],
}

/// Never printed: its Debug form has the name only.
pub struct SecretKey {
    name: String,
    pair: Ed25519KeyPair,
}

impl PublicKey {
    /// Whether `signature` is this key's over `text`. False for another key's name.
    pub fn verify(&self, text: &[u8], signature: &Signature) -> bool {
        signature.key_name == self.name
            && UnparsedPublicKey::new(&ED25519, &self.bytes).verify(text, &signature.bytes).is_ok()
    }
}

impl SecretKey {
    /// Parses the content of a Nix secret key file (`name:base64` of 64 bytes: seed and public half).
    pub fn parse(text: &str) -> Result<Self, Error> {
        const WHAT: &str = "secret key";
        let (name, bytes) = parse::<64>(WHAT, text)?;
        let (seed, public) = bytes.split_at(32);
        let pair = Ed25519KeyPair::from_seed_and_public_key(seed, public).map_err(|_| Error::Signature {
            what: WHAT,
            why: format!("the two halves of key {name} do not belong together"),
        })?;
        Ok(Self { name, pair })
    }

    /// A key from 32 secret bytes.
    pub fn from_seed(name: &str, seed: &[u8; 32]) -> Result<Self, Error> {
        const WHAT: &str = "secret key";
        check_name(WHAT, name)?;
        let fail = |_| Error::Signature { what: WHAT, why: format!("the seed of key {name} is not usable") };
        Ok(Self { name: name.to_owned(), pair: Ed25519KeyPair::from_seed_unchecked(seed).map_err(fail)? })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn sign(&self, text: &[u8]) -> Signature {
        let mut bytes = [0; 64];
        bytes.copy_from_slice(self.pair.sign(text).as_ref());
        Signature { key_name: self.name.clone(), bytes }
    }

    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey { name: self.name.clone(), bytes }
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKey").field("name", &self.name).finish_non_exhaustive()
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.key_name, BASE64.encode(self.bytes))
    }
}

impl FromStr for Signature {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (key_name, bytes) = parse("signature", text)?;
        Ok(Self { key_name, bytes })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode(self.bytes))
    }
}

impl FromStr for PublicKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (name, bytes) = parse("public key", text)?;
        Ok(Self { name, bytes })
    }
}

/// Messages never quote the text: it may be a secret.
fn parse<const N: usize>(what: &'static str, text: &str) -> Result<(String, [u8; N]), Error> {
    let fail = |why: String| Error::Signature { what, why };
    if text.len() > MAX_LEN {
        return Err(fail(format!("it has {} bytes; {MAX_LEN} are allowed", text.len())));
    }
    let (name, digits) = text
        .trim()
        .split_once(':')
        .ok_or_else(|| fail("expected a key's name, a colon and base 64".into()))?;
    check_name(what, name)?;
    // Nix ignores line ends within base 64.
    let digits: String = digits.chars().filter(|c| *c != '\n').collect();
    let bytes = BASE64.decode(digits).map_err(|_| fail(format!("what follows {name:?} is not base 64")))?;
    let len = bytes.len();
    let bytes = bytes.try_into().map_err(|_| fail(format!("{name:?} has {len} bytes instead of {N}")))?;
    Ok((name.to_owned(), bytes))
}

fn check_name(what: &'static str, name: &str) -> Result<(), Error> {
    if name.is_empty() || name.chars().any(|c| c == ':' || c.is_whitespace() || c.is_control()) {
        let why = "the key's name is empty or has colons, white space or control characters".into();
        return Err(Error::Signature { what, why });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8032, section 7.1, test 2.
    const SEED: [u8; 32] = [
        0x4c, 0xcd, 0x08, 0x9b, 0x28, 0xff, 0x96, 0xda, 0x9d, 0xb6, 0xc3, 0x46, 0xec, 0x11, 0x4e, 0x0f, 0x5b,
        0x8a, 0x31, 0x9f, 0x35, 0xab, 0xa6, 0x24, 0xda, 0x8c, 0xf6, 0xed, 0x4f, 0xb8, 0xa6, 0xfb,
    ];

    #[test]
    fn signs_as_the_standard_says() {
        let key = SecretKey::from_seed("test-1", &SEED).unwrap();
        assert_eq!(key.public().to_string(), "test-1:PUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw=");
        let signature = key.sign(&[0x72]);
        assert_eq!(
            signature.to_string(),
            "test-1:kqAJqfDUyrhyDoILX2QlQKKye1QWUD+Ps3YiI+vbadoIWsHkPhWZbkWPNhPQ8R2MOHsurrQwKu6wDSkWErsMAA=="
        );
        assert!(key.public().verify(&[0x72], &signature));
        assert!(!key.public().verify(&[0x73], &signature));
        let foreign = Signature { key_name: "test-2".into(), ..signature };
        assert!(!key.public().verify(&[0x72], &foreign));
        assert_eq!(signature.to_string().parse::<Signature>().unwrap(), signature);
    }

    #[test]
    fn key_files() {
        let key = SecretKey::from_seed("cache.example-1", &SEED).unwrap();
        let mut bytes = SEED.to_vec();
        bytes.extend_from_slice(&key.public().bytes);
        let text = format!("cache.example-1:{}", BASE64.encode(&bytes));
        let parsed = SecretKey::parse(&format!("{text}\n")).unwrap();
        assert_eq!((parsed.name(), parsed.public()), ("cache.example-1", key.public()));
        assert_eq!(key.public().to_string().parse::<PublicKey>().unwrap(), key.public());
        assert!(!format!("{parsed:?}").contains(&text[20..40]));
        // A public half that is not the seed's would make signatures that nobody accepts.
        bytes[40] ^= 1;
        let wrong = format!("k:{}", BASE64.encode(&bytes));
        let error = SecretKey::parse(&wrong).unwrap_err().to_string();
        assert!(error.contains("halves") && !error.contains(&wrong[2..10]), "{error}");
    }

    #[test]
    fn what_is_no_signature() {
        let digits = BASE64.encode([1; 64]);
        for bad in
            ["", ":", "name", "name:", "name:AAAA", &format!(":{digits}"), &format!("a b:{digits}"), &digits]
        {
            assert!(bad.parse::<Signature>().is_err(), "{bad}");
        }
        assert!(format!("{}:{digits}", "n".repeat(2000)).parse::<Signature>().is_err());
        assert!(format!("n:{digits}").parse::<PublicKey>().is_err());
    }
}
