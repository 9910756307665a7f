//! The text of a `.drv` file (Nix: derivation/aterm.cc).

use crate::{Derivation, Error, StoreDir};

/// Most bytes that a `.drv` file may have.
pub const MAX_LEN: usize = 64 << 20;

/// Parses the text of a `.drv` file. `name` is the derivation's name, which the text does not have.
pub fn parse(_dir: &StoreDir, _name: &str, _text: &[u8]) -> Result<Derivation, Error> {
    todo!()
}

/// The canonical text.
pub fn print(_dir: &StoreDir, _drv: &Derivation) -> Result<Vec<u8>, Error> {
    todo!()
}

#[doc(hidden)]
pub(crate) fn _unused() {}
