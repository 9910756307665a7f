//! What a machine is called by those who make programs, packages and images for it. Pure, but for what this machine is.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

/// A platform that images are made for: Linux on a processor, 64 bits and little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Platform {
    /// x86_64.
    Amd64,
    /// aarch64.
    Arm64,
}

impl Platform {
    /// Every one.
    pub const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    /// That of this machine.
    pub fn native() -> Result<Self> {
        let here = std::env::consts::ARCH;
        Self::ALL.into_iter().find(|platform| platform.processor() == here).with_context(|| {
            format!("Drover's images are for x86_64 and aarch64, and nothing here runs on {here}")
        })
    }

    /// As in Nix's systems and in Rust's `target_arch`.
    pub fn processor(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// As the image specification and Kubernetes have it, and Debian as well.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Rust's target.
    pub fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// GNU's name: Debian's directory of libraries, and what programs of a cross compiler begin with.
    pub fn triplet(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// The directory of the loader that dynamic programs ask for, and its name: fixed by the System V ABI's supplements.
    pub fn loader(self) -> (&'static str, &'static str) {
        match self {
            Self::Amd64 => ("lib64", "ld-linux-x86-64.so.2"),
            Self::Arm64 => ("lib", "ld-linux-aarch64.so.1"),
        }
    }

    /// `e_machine` of its ELF files (linux/elf-em.h).
    pub fn machine(self) -> u16 {
        match self {
            Self::Amd64 => 62,
            Self::Arm64 => 183,
        }
    }

    /// The C compiler for it, and the Debian packages that bring it where it is not this machine's own.
    pub fn compiler(self, native: Self) -> (String, Vec<String>) {
        if self == native {
            return ("cc".to_owned(), vec![]);
        }
        let architecture = self.architecture();
        let package = format!("gcc-{}", self.triplet().replace('_', "-"));
        (format!("{}-gcc", self.triplet()), vec![package, format!("libc6-dev-{architecture}-cross")])
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux/{}", self.architecture())
    }
}

impl FromStr for Platform {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|platform| platform.to_string() == text) {
            Some(platform) => Ok(platform),
            None => {
                bail!("no images for {text:?}; there are {}", Self::ALL.map(|one| one.to_string()).join(", "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_read_as_they_are_written() {
        for platform in Platform::ALL {
            assert_eq!(platform.to_string().parse::<Platform>().unwrap(), platform);
        }
        let error = "linux/arm".parse::<Platform>().unwrap_err().to_string();
        assert_eq!(error, "no images for \"linux/arm\"; there are linux/amd64, linux/arm64");
        assert!("amd64".parse::<Platform>().is_err() && "".parse::<Platform>().is_err());
    }

    #[test]
    fn this_machine_is_one_of_them_and_needs_no_other_compiler() {
        let native = Platform::native().unwrap();
        assert!(native.target().starts_with(std::env::consts::ARCH));
        assert_eq!(native.compiler(native), ("cc".to_owned(), vec![]));
        let (compiler, packages) = Platform::Arm64.compiler(Platform::Amd64);
        assert_eq!(compiler, "aarch64-linux-gnu-gcc");
        assert_eq!(packages, ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"]);
        let (_, packages) = Platform::Amd64.compiler(Platform::Arm64);
        assert_eq!(packages, ["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"]);
    }

    #[test]
    fn this_program_is_of_this_machine() {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let machine = Platform::native().unwrap().machine();
        assert_eq!(program[18..20], machine.to_le_bytes());
    }
}
