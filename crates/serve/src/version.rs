use std::fmt;

/// The newest version that this crate speaks.
pub const LATEST: Version = Version(0x208);

/// Protocol version as the wire has it: major in the high byte, minor in the low one. Only major 2 exists in the field.
/// What each one added is in Nix: serve-protocol.hh; Nix 2.4 to 2.34 speak 2.7, Nix 2.35 speaks 2.8.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u16);

impl Version {
    /// The command BuildDerivation.
    pub(crate) const BUILD_DERIVATION: Self = Self(0x201);
    /// `max-log-size` in build options.
    pub(crate) const LOG_LIMIT: Self = Self(0x202);
    /// Repeat options; how often and when in build results.
    pub(crate) const BUILD_TIMES: Self = Self(0x203);
    /// NAR hash, content address and signatures in path infos.
    pub(crate) const NAR_HASH: Self = Self(0x204);
    /// The command AddToStoreNar.
    pub(crate) const ADD_TO_STORE_NAR: Self = Self(0x205);
    /// Built outputs in build results, as JSON.
    pub(crate) const BUILT_OUTPUTS: Self = Self(0x206);
    /// `keep-failed` in build options.
    pub(crate) const KEEP_FAILED: Self = Self(0x207);
    /// Built outputs in build results, structured.
    pub(crate) const STRUCTURED_OUTPUTS: Self = Self(0x208);

    pub const fn major(self) -> u8 {
        (self.0 >> 8) as u8
    }

    pub const fn minor(self) -> u8 {
        (self.0 & 0xff) as u8
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
