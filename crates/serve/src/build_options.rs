use std::io::{Read, Write};

use crate::wire::{self, WireWrite as _};
use crate::{Error, Version};

/// How to build, beside the derivation itself. 0 means no limit throughout; the default limits nothing.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct BuildOptions {
    /// Longest time without output of the builder, in seconds.
    pub max_silent_seconds: u64,
    /// Longest time in all, in seconds.
    pub timeout_seconds: u64,
    /// Most bytes of log.
    pub max_log_bytes: u64,
    /// Extra rounds. Nix 2.13 and later end the session unless it is 0; Hydra sends 1 for some derivations.
    pub repeats: u64,
    /// Fail when rounds differ. Ignored by Nix since 2.13.
    pub enforce_determinism: bool,
    /// Keep the build directory of a build that fails.
    pub keep_failed: bool,
}

impl BuildOptions {
    /// Nix: serve-protocol.cc, BuildOptions.
    pub(crate) fn read(input: &mut impl Read, version: Version) -> Result<Self, Error> {
        const ACT: &str = "reading build options";
        let mut options = Self {
            max_silent_seconds: wire::read_int(input, ACT)?,
            timeout_seconds: wire::read_int(input, ACT)?,
            ..Self::default()
        };
        if version >= Version::LOG_LIMIT {
            options.max_log_bytes = wire::read_u64(input, ACT)?;
        }
        if version >= Version::BUILD_TIMES {
            options.repeats = wire::read_int(input, ACT)?;
            options.enforce_determinism = wire::read_bool(input, ACT)?;
        }
        if version >= Version::KEEP_FAILED {
            options.keep_failed = wire::read_bool(input, ACT)?;
        }
        Ok(options)
    }

    /// Seconds beyond 32 bits, which no reader takes, are sent as the most that one takes.
    pub(crate) fn write(&self, output: &mut impl Write, version: Version) -> Result<(), Error> {
        let int = |value: u64| value.min(u64::from(u32::MAX));
        output.put_u64(int(self.max_silent_seconds))?;
        output.put_u64(int(self.timeout_seconds))?;
        if version >= Version::LOG_LIMIT {
            output.put_u64(self.max_log_bytes)?;
        }
        if version >= Version::BUILD_TIMES {
            output.put_u64(int(self.repeats))?;
            output.put_bool(self.enforce_determinism)?;
        }
        if version >= Version::KEEP_FAILED {
            output.put_bool(self.keep_failed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> BuildOptions {
        BuildOptions {
            max_silent_seconds: 5,
            timeout_seconds: 6,
            max_log_bytes: 7,
            repeats: 8,
            enforce_determinism: false,
            keep_failed: true,
        }
    }

    #[test]
    fn fields_follow_the_version() {
        let words = |version| {
            let mut bytes = Vec::new();
            options().write(&mut bytes, Version(version)).unwrap();
            bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect::<Vec<_>>()
        };
        assert_eq!(words(0x201), [5, 6]);
        assert_eq!(words(0x202), [5, 6, 7]);
        assert_eq!(words(0x203), [5, 6, 7, 8, 0]);
        assert_eq!(words(0x206), [5, 6, 7, 8, 0]);
        assert_eq!(words(0x207), [5, 6, 7, 8, 0, 1]);
        assert_eq!(words(0x208), [5, 6, 7, 8, 0, 1]);
    }

    #[test]
    fn reading_gives_back_what_was_written() {
        let mut bytes = Vec::new();
        options().write(&mut bytes, Version(0x207)).unwrap();
        assert_eq!(BuildOptions::read(&mut bytes.as_slice(), Version(0x207)).unwrap(), options());
    }

    #[test]
    fn seconds_beyond_32_bits() {
        let mut bytes = Vec::new();
        let options = BuildOptions { timeout_seconds: u64::MAX, ..BuildOptions::default() };
        options.write(&mut bytes, Version(0x207)).unwrap();
        let read = BuildOptions::read(&mut bytes.as_slice(), Version(0x207)).unwrap();
        assert_eq!(read.timeout_seconds, u64::from(u32::MAX));
        let too_long = u64::MAX.to_le_bytes();
        assert!(BuildOptions::read(&mut too_long.as_slice(), Version(0x207)).is_err());
    }
}
