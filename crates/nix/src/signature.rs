//! Ed25519 keys and signatures in Nix's text form, `name:base64` (Nix: signature/local-keys.cc).

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// Name of the key and 64 bytes.
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
    _name: String,
}

impl PublicKey {
    /// Whether `signature` is this key's over `text`. False for another key's name.
    pub fn verify(&self, _text: &[u8], _signature: &Signature) -> bool {
        todo!()
    }
}

impl SecretKey {
    /// Parses the content of a Nix secret key file (`name:base64` of 64 bytes: seed and public half).
    pub fn parse(_text: &str) -> Result<Self, Error> {
        todo!()
    }

    pub fn sign(&self, _text: &[u8]) -> Signature {
        todo!()
    }

    pub fn public(&self) -> PublicKey {
        todo!()
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        todo!()
    }
}

impl FromStr for Signature {
    type Err = Error;

    fn from_str(_text: &str) -> Result<Self, Error> {
        todo!()
    }
}

impl FromStr for PublicKey {
    type Err = Error;

    fn from_str(_text: &str) -> Result<Self, Error> {
        todo!()
    }
}
