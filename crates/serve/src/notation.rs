//! How tests write the wire's bytes by hand: apart from [`crate::wire`], which they are there to check.

/// A number.
pub(crate) fn u(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

/// A string, padded.
pub(crate) fn s(text: &str) -> Vec<u8> {
    let mut bytes = u(text.len() as u64);
    bytes.extend(text.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}
