use std::io;

/// Why a cache could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system or the network. `act` says what was tried on which file or address.
    #[error("cannot {act}: {source}")]
    Io { act: String, source: io::Error },
}

impl Error {
    /// A stable word for metrics.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
        }
    }

    /// Whether another try may work, as opposed to content that is wrong.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Io { .. } => true,
        }
    }
}
