//! Whether a request can be built at all, and by which class. Pure.

use std::collections::BTreeSet;

use drover_api::convert::{self, Target};
use drover_api::{BuilderClassSpec, FieldError, Reason};
use drover_nix::derivation::STRUCTURED_ATTRS;
use drover_nix::{BasicDerivation, StoreDir, StorePath};
use kube::ResourceExt as _;

use crate::world::{Class, World};

/// A request that makes sense, and the class that takes it.
#[derive(Clone, Debug)]
pub struct Accepted<'a> {
    pub derivation: BasicDerivation,
    /// Given or computed.
    pub drv_path: StorePath,
    pub class_name: &'a str,
    pub class: &'a BuilderClassSpec,
}

/// Why there is no attempt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Somebody else can mend it without touching the request.
    Wait { reason: Reason, message: String },
    /// Nobody can: the request is immutable.
    Never { reason: Reason, message: String },
}

/// Checks spec against class. Everything that the schema checks too is checked again.
pub fn accept(world: &World) -> Result<Accepted<'_>, Refusal> {
    let spec = &world.request.spec;
    let never = |reason, message| Err(Refusal::Never { reason, message });
    let dir = StoreDir::default();
    let invalid =
        |error: FieldError| Refusal::Never { reason: Reason::InvalidDerivation, message: error.to_string() };
    let derivation = match convert::target(spec, &dir).map_err(invalid)? {
        Target::Derivation(derivation) => derivation,
        Target::DrvPath(_) => {
            let message = "spec.drvPath: without spec.derivation it is not supported yet; send the derivation \
                           itself as well, as `drover request` prints it";
            return never(Reason::InvalidDerivation, message.into());
        }
    };
    let drv_path = match convert::drv_path(spec, &dir).map_err(invalid)? {
        Some(given) => given,
        None => match drover_session::drv_path_of(&dir, &derivation) {
            Ok(path) => path,
            Err(error) => return never(Reason::InvalidDerivation, format!("spec.derivation: {error}")),
        },
    };
    let (class_name, class, allowed) = match &world.class {
        Class::Found { name, spec, allowed } => (name, spec, *allowed),
        Class::Absent => {
            let message = match &spec.class {
                Some(name) => format!("there is no BuilderClass {name}"),
                None => {
                    "spec.class is not set and no BuilderClass is the default (spec.default: true)".into()
                }
            };
            return Err(Refusal::Wait { reason: Reason::WaitingForClass, message });
        }
    };
    if !allowed {
        let namespace = world.request.namespace().unwrap_or_default();
        let message = format!("BuilderClass {class_name} is not for namespace {namespace}");
        return never(Reason::ClassNotAllowed, message);
    }
    let system = derivation.system.to_string();
    if !class.has_system(&system) {
        let offered = class.systems.join(", ");
        let message = format!("BuilderClass {class_name} has no builders for {system}; it has {offered}");
        return never(Reason::WrongSystem, message);
    }
    let missing: Vec<String> = required_features(&derivation)
        .into_iter()
        .filter(|feature| !class.features.contains(feature))
        .collect();
    if !missing.is_empty() {
        let message = format!(
            "BuilderClass {class_name} does not offer the required system features {}",
            missing.join(", ")
        );
        return never(Reason::WrongSystem, message);
    }
    Ok(Accepted { derivation, drv_path, class_name, class })
}

/// The derivation's `requiredSystemFeatures` (Nix: derivation-options.cc), from structured attributes if it has them.
pub fn required_features(derivation: &BasicDerivation) -> BTreeSet<String> {
    const NAME: &str = "requiredSystemFeatures";
    if let Some(json) = derivation.env(STRUCTURED_ATTRS) {
        let attrs: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
        let features = attrs[NAME].as_array().into_iter().flatten();
        return features.filter_map(|feature| feature.as_str()).map(str::to_owned).collect();
    }
    let text = derivation.env(NAME).map(ToString::to_string).unwrap_or_default();
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_come_from_either_place() {
        let mut derivation = BasicDerivation {
            name: "a".into(),
            outputs: Default::default(),
            input_srcs: Default::default(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: vec![],
            env: Default::default(),
        };
        assert!(required_features(&derivation).is_empty());
        derivation.env.insert("requiredSystemFeatures".into(), "kvm  big-parallel".into());
        assert_eq!(required_features(&derivation).into_iter().collect::<Vec<_>>(), ["big-parallel", "kvm"]);
        derivation.env.insert("__json".into(), r#"{"requiredSystemFeatures": ["uid-range"]}"#.into());
        assert_eq!(required_features(&derivation).into_iter().collect::<Vec<_>>(), ["uid-range"]);
    }
}
