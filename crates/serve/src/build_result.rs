//! How a build ended, and its three encodings (Nix: serve-protocol.cc, common-protocol.cc, realisation.cc).

use std::collections::BTreeMap;
use std::io::{Read, Write};

use drover_nix::signature::Signature;
use drover_nix::{OutputName, Sha256, StoreDir, StorePath};
use serde_json::{Value, json};

use crate::wire::{self, WireWrite as _};
use crate::{Error, Version};

/// Most bytes of one realisation in JSON.
const MAX_REALISATION_LEN: u64 = 1 << 20;
/// Nix 2.4 to 2.34 want a well-formed hash before an output's name, but look at it only where the output's path was not
/// known before.
const NO_HASH: Sha256 = Sha256([0; 32]);
const ACT: &str = "reading a build result";

/// Numbers as on the wire; they were never renumbered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum BuildStatus {
    Built = 0,
    Substituted = 1,
    AlreadyValid = 2,
    /// A sandboxed builder exited with a code other than 0.
    PermanentFailure = 3,
    /// The server cannot build this: wrong system, missing features, malformed derivation.
    InputRejected = 4,
    /// The builder exited with 0 but its outputs are not acceptable.
    OutputRejected = 5,
    /// A builder with network access failed, or the disk is full: another try may work.
    TransientFailure = 6,
    CachedFailure = 7,
    /// The limit on time, or on time without output.
    TimedOut = 8,
    /// Everything else: not the derivation's fault.
    MiscFailure = 9,
    DependencyFailed = 10,
    LogLimitExceeded = 11,
    NotDeterministic = 12,
    ResolvesToAlreadyValid = 13,
    NoSubstituters = 14,
}

/// Where an output is, and who vouches for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BuiltOutput {
    pub path: StorePath,
    /// Signatures of the realisation, not of the path. Empty but for content-addressed outputs.
    pub signatures: Vec<Signature>,
}

/// The answer to BuildDerivation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BuildResult {
    pub status: BuildStatus,
    /// Empty on success. May have several lines and, from Nix, colours.
    pub error_message: String,
    pub times_built: u64,
    pub is_non_deterministic: bool,
    /// Seconds since 1970; 0 if nothing was built, and always from Nix 2.34.
    pub start_time: u64,
    pub stop_time: u64,
    /// Every output on success, also of input-addressed derivations: Hydra copies back what is listed here.
    pub built_outputs: BTreeMap<OutputName, BuiltOutput>,
    /// What Nix up to 2.34 files outputs under whose paths were not known before
    /// ([`drover_nix::derivation::realisation`]). Written for these only, and never read: a client can compute it.
    pub drv_hash: Option<Sha256>,
}

impl BuildStatus {
    const ALL: [Self; 15] = [
        Self::Built,
        Self::Substituted,
        Self::AlreadyValid,
        Self::PermanentFailure,
        Self::InputRejected,
        Self::OutputRejected,
        Self::TransientFailure,
        Self::CachedFailure,
        Self::TimedOut,
        Self::MiscFailure,
        Self::DependencyFailed,
        Self::LogLimitExceeded,
        Self::NotDeterministic,
        Self::ResolvesToAlreadyValid,
        Self::NoSubstituters,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Built => "built",
            Self::Substituted => "substituted",
            Self::AlreadyValid => "already valid",
            Self::PermanentFailure => "permanent failure",
            Self::InputRejected => "input rejected",
            Self::OutputRejected => "output rejected",
            Self::TransientFailure => "transient failure",
            Self::CachedFailure => "cached failure",
            Self::TimedOut => "timed out",
            Self::MiscFailure => "miscellaneous failure",
            Self::DependencyFailed => "dependency failed",
            Self::LogLimitExceeded => "log limit exceeded",
            Self::NotDeterministic => "not deterministic",
            Self::ResolvesToAlreadyValid => "resolves to already valid",
            Self::NoSubstituters => "no substituters",
        }
    }

    pub const fn is_success(self) -> bool {
        matches!(self, Self::Built | Self::Substituted | Self::AlreadyValid | Self::ResolvesToAlreadyValid)
    }

    pub(crate) fn from_wire(word: u64) -> Result<Self, Error> {
        let index = usize::try_from(word).ok();
        index
            .and_then(|index| Self::ALL.get(index).copied())
            .ok_or_else(|| Error::invalid("a build result", format!("unknown status {word}")))
    }
}

impl BuildResult {
    /// A build that did not succeed, without times.
    pub fn failure(status: BuildStatus, message: impl Into<String>) -> Self {
        Self { error_message: message.into(), ..Self::new(status) }
    }

    /// Without message, times and outputs.
    pub fn new(status: BuildStatus) -> Self {
        Self {
            status,
            error_message: String::new(),
            times_built: 0,
            is_non_deterministic: false,
            start_time: 0,
            stop_time: 0,
            built_outputs: BTreeMap::new(),
            drv_hash: None,
        }
    }

    pub(crate) fn read(input: &mut impl Read, dir: &StoreDir, version: Version) -> Result<Self, Error> {
        let status = BuildStatus::from_wire(wire::read_u64(input, ACT)?)?;
        let message = wire::read_string(input, wire::MAX_MESSAGE_LEN, ACT)?;
        let mut result = Self::failure(status, String::from_utf8_lossy(&message));
        if version >= Version::BUILD_TIMES {
            result.times_built = wire::read_u64(input, ACT)?;
            result.is_non_deterministic = wire::read_bool(input, ACT)?;
            result.start_time = wire::read_u64(input, ACT)?;
            result.stop_time = wire::read_u64(input, ACT)?;
        }
        if version >= Version::BUILT_OUTPUTS {
            for _ in 0..wire::read_count(input, wire::MAX_OUTPUTS, ACT)? {
                let (name, output) = match version >= Version::STRUCTURED_OUTPUTS {
                    true => read_structured(input, dir)?,
                    false => read_json(input)?,
                };
                if result.built_outputs.insert(name.clone(), output).is_some() {
                    return Err(Error::invalid("a build result", format!("output {name} is there twice")));
                }
            }
        }
        Ok(result)
    }

    pub(crate) fn write(
        &self,
        output: &mut impl Write,
        dir: &StoreDir,
        version: Version,
    ) -> Result<(), Error> {
        output.put_u64(self.status as u64)?;
        output.put_string(self.error_message.as_bytes())?;
        if version >= Version::BUILD_TIMES {
            output.put_u64(self.times_built)?;
            output.put_bool(self.is_non_deterministic)?;
            output.put_u64(self.start_time)?;
            output.put_u64(self.stop_time)?;
        }
        if version >= Version::BUILT_OUTPUTS {
            output.put_u64(self.built_outputs.len() as u64)?;
            for (name, built) in &self.built_outputs {
                match version >= Version::STRUCTURED_OUTPUTS {
                    true => write_structured(output, dir, name, built)?,
                    false => write_json(output, self.drv_hash.unwrap_or(NO_HASH), name, built)?,
                }
            }
        }
        Ok(())
    }
}

fn read_structured(input: &mut impl Read, dir: &StoreDir) -> Result<(OutputName, BuiltOutput), Error> {
    let name = wire::read_string(input, wire::MAX_SHORT_LEN, ACT)?;
    let name = OutputName::new(&name).map_err(Error::nix("the name of a built output"))?;
    let path = wire::read_path(input, dir)?;
    let mut signatures = Vec::new();
    for _ in 0..wire::read_count(input, wire::MAX_SIGNATURES, ACT)? {
        let text = wire::read_text(input, "a signature")?;
        signatures.push(text.parse().map_err(Error::nix("a signature"))?);
    }
    Ok((name, BuiltOutput { path, signatures }))
}

fn write_structured(
    output: &mut impl Write,
    dir: &StoreDir,
    name: &OutputName,
    built: &BuiltOutput,
) -> Result<(), Error> {
    output.put_string(name.as_str().as_bytes())?;
    output.put_path(dir, &built.path)?;
    output.put_u64(built.signatures.len() as u64)?;
    built.signatures.iter().try_for_each(|signature| output.put_string(signature.to_string().as_bytes()))
}

/// `sha256:<hex>!<output>` and a JSON object with `id`, `outPath` (a base name) and, optionally, the rest.
fn read_json(input: &mut impl Read) -> Result<(OutputName, BuiltOutput), Error> {
    let fail = |why: &str| Error::invalid("a realisation", why);
    let id = wire::read_text(input, "a realisation's id")?;
    let (_, name) = id.split_once('!').ok_or_else(|| fail("its id has no `!`"))?;
    let name = name.parse().map_err(Error::nix("the name of a built output"))?;
    let text = wire::read_string(input, MAX_REALISATION_LEN, ACT)?;
    let value: Value = serde_json::from_slice(&text).map_err(|error| fail(&error.to_string()))?;
    let path = value["outPath"].as_str().ok_or_else(|| fail("it has no `outPath`"))?;
    let path = path.parse().map_err(Error::nix("the path of a built output"))?;
    let signatures = match &value["signatures"] {
        Value::Null => Vec::new(),
        Value::Array(items) => items.iter().map(json_signature).collect::<Result<_, _>>()?,
        _ => return Err(fail("its `signatures` are no array")),
    };
    Ok((name, BuiltOutput { path, signatures }))
}

/// Text up to Nix 2.34, an object after it.
fn json_signature(value: &Value) -> Result<Signature, Error> {
    let text = match (value, &value["keyName"], &value["sig"]) {
        (Value::String(text), _, _) => text.clone(),
        (_, Value::String(key), Value::String(signature)) => format!("{key}:{signature}"),
        _ => return Err(Error::invalid("a realisation", "a signature is neither text nor keyName and sig")),
    };
    text.parse().map_err(Error::nix("a signature"))
}

fn write_json(
    output: &mut impl Write,
    drv_hash: Sha256,
    name: &OutputName,
    built: &BuiltOutput,
) -> Result<(), Error> {
    let id = format!("sha256:{}!{name}", drv_hash.to_hex());
    let signatures: Vec<String> = built.signatures.iter().map(Signature::to_string).collect();
    let value = json!({
        "dependentRealisations": {},
        "id": id,
        "outPath": built.path.as_str(),
        "signatures": signatures,
    });
    output.put_string(id.as_bytes())?;
    output.put_string(value.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notation::{s, u};

    const BASE: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-a";

    fn built() -> BuildResult {
        let output = BuiltOutput { path: BASE.parse().unwrap(), signatures: Vec::new() };
        BuildResult {
            times_built: 1,
            start_time: 30,
            stop_time: 50,
            built_outputs: [(OutputName::out(), output)].into(),
            ..BuildResult::new(BuildStatus::Built)
        }
    }

    /// The bytes for each version, put together by hand.
    fn golden(version: u16) -> Vec<u8> {
        let id = format!("sha256:{}!out", "0".repeat(64));
        let json =
            format!(r#"{{"dependentRealisations":{{}},"id":"{id}","outPath":"{BASE}","signatures":[]}}"#);
        let mut parts = vec![u(0), s("")];
        if version >= 0x203 {
            parts.extend([u(1), u(0), u(30), u(50)]);
        }
        match version {
            0x208.. => parts.extend([u(1), s("out"), s(&format!("/nix/store/{BASE}")), u(0)]),
            0x206.. => parts.extend([u(1), s(&id), s(&json)]),
            _ => {}
        }
        parts.concat()
    }

    #[test]
    fn every_version_to_the_byte() {
        let dir = StoreDir::default();
        for version in [0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208] {
            let mut bytes = Vec::new();
            built().write(&mut bytes, &dir, Version(version)).unwrap();
            assert_eq!(bytes, golden(version), "{version:x}");
            let read = BuildResult::read(&mut bytes.as_slice(), &dir, Version(version)).unwrap();
            assert_eq!(read.status, BuildStatus::Built);
            assert_eq!(read.built_outputs.is_empty(), version < 0x206);
        }
    }

    #[test]
    fn old_clients_are_told_what_they_file_outputs_under() {
        let hash = Sha256::of(b"derivation");
        let mut bytes = Vec::new();
        let result = BuildResult { drv_hash: Some(hash), ..built() };
        result.write(&mut bytes, &StoreDir::default(), Version(0x207)).unwrap();
        let id = format!("sha256:{}!out", hash.to_hex());
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains(&format!(r#""id":"{id}""#)) && text.matches(&id).count() == 2, "{text}");
    }

    #[test]
    fn a_failure() {
        let dir = StoreDir::default();
        let result = BuildResult::failure(BuildStatus::PermanentFailure, "no");
        let mut bytes = Vec::new();
        result.write(&mut bytes, &dir, Version(0x207)).unwrap();
        assert_eq!(bytes, [u(3), s("no"), u(0), u(0), u(0), u(0), u(0)].concat());
        assert_eq!(BuildResult::read(&mut bytes.as_slice(), &dir, Version(0x207)).unwrap(), result);
    }

    #[test]
    fn what_other_nix_versions_write_as_json() {
        let id = format!("sha256:{}!out", "1".repeat(64));
        let read = |json: &str| {
            let bytes = [u(0), s(""), u(1), u(0), u(0), u(0), u(1), s(&id), s(json)].concat();
            BuildResult::read(&mut bytes.as_slice(), &StoreDir::default(), Version(0x206))
        };
        assert!(read(&format!(r#"{{"id":"{id}","outPath":"{BASE}"}}"#)).is_ok());
        let full_path = format!(r#"{{"id":"{id}","outPath":"/nix/store/{BASE}"}}"#);
        assert!(read(&full_path).is_err(), "outPath is a base name");
        assert!(read("{").is_err());
        assert!(read(&format!(r#"{{"id":"{id}"}}"#)).is_err());
    }

    #[test]
    fn status_numbers() {
        for (number, status) in BuildStatus::ALL.into_iter().enumerate() {
            assert_eq!(status as usize, number);
            assert_eq!(BuildStatus::from_wire(number as u64).unwrap(), status);
        }
        assert!(BuildStatus::from_wire(15).is_err());
        assert!(BuildStatus::from_wire(256).is_err());
    }
}
