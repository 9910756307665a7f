use bstr::BString;

use crate::derivation::resolve::DrvOutputs;

/// What can be wrong with bytes that claim to be one of Nix's formats.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Text that should be in Nix's base 32.
    #[error("cannot decode {text:?} as nix32: {why}")]
    Base32 { text: String, why: &'static str },
    /// A content address such as `fixed:r:sha256:…`.
    #[error("cannot parse content address {text:?}: {why}")]
    ContentAddress { text: String, why: String },
    /// A derivation: ATerm text, JSON, or a combination of fields that makes no sense.
    #[error("invalid derivation: {why}")]
    Derivation { why: String },
    /// A hash in any of its spellings.
    #[error("cannot parse hash {text:?}: {why}")]
    Hash { text: String, why: &'static str },
    /// A NAR that breaks the format's rules. `offset` counts bytes from the archive's start.
    #[error("invalid NAR at byte {offset}: {why}")]
    Nar { offset: u64, why: String },
    /// Reading or writing the underlying stream failed.
    #[error("cannot {act} the NAR stream: {source}")]
    NarIo { act: &'static str, source: std::io::Error },
    /// A narinfo file; `field` names the line that is wrong or missing.
    #[error("invalid narinfo: field {field}: {why}")]
    NarInfo { field: &'static str, why: String },
    /// A netrc file. Nothing of what is in it is repeated.
    #[error("invalid netrc file: {why}")]
    Netrc { why: String },
    /// An output name such as `out`.
    #[error("invalid output name {name:?}: {why}")]
    OutputName { name: BString, why: &'static str },
    /// A key or a signature.
    #[error("invalid {what}: {why}")]
    Signature { what: &'static str, why: String },
    /// A store path or the base name of one.
    #[error("invalid store path {path:?}: {why}")]
    StorePath { path: BString, why: String },
    /// A derivation cannot be resolved yet: where these outputs of its inputs are follows from their content.
    #[error("these inputs have to be built first: {}", spell(.missing))]
    Unresolved { missing: DrvOutputs },
}

impl Error {
    /// A stable word for metrics and reasons.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Base32 { .. } => "base32",
            Self::ContentAddress { .. } => "content-address",
            Self::Derivation { .. } | Self::OutputName { .. } => "derivation",
            Self::Hash { .. } => "hash",
            Self::Nar { .. } => "nar",
            Self::NarIo { .. } => "nar-io",
            Self::NarInfo { .. } => "narinfo",
            Self::Netrc { .. } => "netrc",
            Self::Signature { .. } => "signature",
            Self::StorePath { .. } => "store-path",
            Self::Unresolved { .. } => "unresolved",
        }
    }
}

fn spell(outputs: &DrvOutputs) -> String {
    let names = |names: &std::collections::BTreeSet<crate::OutputName>| {
        names.iter().map(crate::OutputName::as_str).collect::<Vec<_>>().join(" ")
    };
    outputs.iter().map(|(drv, outputs)| format!("{drv} ({})", names(outputs))).collect::<Vec<_>>().join(", ")
}
