//! Whether a request can be built at all, and by which class. Pure.

use std::collections::BTreeSet;
use std::io;

use drover_api::convert::{self, Target};
use drover_api::{BuilderClassSpec, FieldError, MAX_OUTPUTS, Placement, Reason, Resources, Trust};
use drover_nix::derivation::{STRUCTURED_ATTRS, proof};
use drover_nix::{BasicDerivation, StoreDir, StorePath};
use kube::ResourceExt as _;
use serde::Serialize;

use crate::quantity::nanos;
use crate::world::{Class, Resolution, World};

/// Most bytes of a spec. etcd takes objects of 1.5 MiB: the rest is for status and managed fields, which grow with what is built and
/// how often it is tried, and without which no request could ever come to its end.
pub(super) const MAX_SPEC: usize = 640 << 10;

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
    /// What is to be built has not been read: see [`World::resolution`].
    Unread,
}

/// Checks spec against class. Everything that the schema checks too is checked again.
pub fn accept(world: &World) -> Result<Accepted<'_>, Refusal> {
    let spec = &world.request.spec;
    let never = |reason, message| Err(Refusal::Never { reason, message });
    let dir = StoreDir::default();
    let invalid =
        |error: FieldError| Refusal::Never { reason: Reason::InvalidDerivation, message: error.to_string() };
    let target = convert::target(spec, &dir).map_err(invalid)?;
    let given = convert::drv_path(spec, &dir).map_err(invalid)?;
    let (class_name, class, allowed) = match &world.class {
        Class::Found { name, spec, allowed } => (name, spec, *allowed),
        Class::OutOfSight { name } => {
            let message = format!(
                "BuilderClass {name} selects namespaces by their labels, which an operator that watches only some \
                 namespaces does not read; name this one in allowedNamespaces.names"
            );
            return Err(Refusal::Wait { reason: Reason::WaitingForClass, message });
        }
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
    let (derivation, drv_path) = match target {
        Target::Derivation(derivation) => {
            let computed = || drover_session::drv_path_of(&dir, &derivation);
            let believed = given.filter(|_| is_name_believed(class, &dir, &derivation));
            match believed.map_or_else(computed, Ok) {
                Ok(path) => (derivation, path),
                Err(error) => return never(Reason::InvalidDerivation, format!("spec.derivation: {error}")),
            }
        }
        Target::DrvPath(path) => found(world, &path)?,
    };
    let system = derivation.system.to_string();
    if !class.has_system(&system) {
        let offered = class.systems.join(", ");
        let message = format!("BuilderClass {class_name} has no builders for {system}; it has {offered}");
        return never(Reason::WrongSystem, message);
    }
    let missing: Vec<String> =
        required_features(&derivation).into_iter().filter(|feature| !class.has_feature(feature)).collect();
    if !missing.is_empty() {
        let message = format!(
            "BuilderClass {class_name} does not offer the required system features {}",
            missing.join(", ")
        );
        return never(Reason::WrongSystem, message);
    }
    Ok(Accepted { derivation, drv_path, class_name, class })
}

/// Whether the `.drv` that a request gives beside its derivation may name the build: its log in the cache, and what its outputs
/// are said to come from. Where the derivation proves its paths alone, nobody looks into that file, and it could be another's.
fn is_name_believed(class: &BuilderClassSpec, dir: &StoreDir, derivation: &BasicDerivation) -> bool {
    class.trust == Trust::Claimed || proof::prove_alone(dir, derivation).is_err()
}

/// What was found at a `drvPath` that is all that the request says: derivation, and the `.drv` that it goes by.
fn found(world: &World, drv_path: &StorePath) -> Result<(BasicDerivation, StorePath), Refusal> {
    let never = |reason, message| Err(Refusal::Never { reason, message });
    match &world.resolution {
        Resolution::Unknown | Resolution::Absent { .. } | Resolution::Unreadable { .. } => {
            Err(Refusal::Unread)
        }
        Resolution::Refused { reason, message } => never(*reason, message.clone()),
        Resolution::Found(resolved) if resolved.derivation.outputs.len() > MAX_OUTPUTS => {
            let outputs = resolved.derivation.outputs.len();
            let message =
                format!("spec.drvPath: {drv_path} has {outputs} outputs; a request takes {MAX_OUTPUTS}");
            never(Reason::InvalidDerivation, message)
        }
        Resolution::Found(resolved) => Ok((resolved.derivation.clone(), resolved.drv_path.clone())),
    }
}

/// What is checked before an attempt begins, and does not end one that runs if the class changes meanwhile.
pub(super) fn admit(world: &World, accepted: &Accepted<'_>) -> Result<(), Refusal> {
    let (class, class_name) = (accepted.class, accepted.class_name);
    if class.placement == Placement::RequestNamespace {
        let message = format!(
            "BuilderClass {class_name} says placement: RequestNamespace, which this version cannot do; set it to \
             BuilderNamespace"
        );
        return Err(Refusal::Wait { reason: Reason::WaitingForClass, message });
    }
    let size = json_len(&world.request.spec);
    if size > MAX_SPEC {
        let message = format!(
            "spec takes {size} bytes; with more than {MAX_SPEC} an object has no room for its status beside it (etcd takes 1.5 MiB of \
             both): leave spec.derivation out, and give its .drv by spec.drvPath"
        );
        return Err(Refusal::Never { reason: Reason::InvalidDerivation, message });
    }
    if let Some(message) = excess(world.request.spec.resources.as_ref(), class) {
        let message = format!("spec.resources.{message} of BuilderClass {class_name}");
        return Err(Refusal::Never { reason: Reason::Unplaceable, message });
    }
    Ok(())
}

/// Bytes of a part of an object as an API server keeps it, which writes some characters so that HTML could hold them (Go:
/// encoding/json, HTMLEscape).
pub(super) fn json_len(part: &impl Serialize) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let escaped = bytes.iter().filter(|byte| matches!(byte, b'<' | b'>' | b'&')).count();
            self.0 += bytes.len() + escaped * (r"\u003c".len() - 1);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // It came as JSON, and counting does not fail: what it has taken by then would be too little at worst.
    let _written = serde_json::to_writer(&mut count, part);
    count.0
}

/// What of a request's resources is beyond the class's maximum, if anything is.
fn excess(wanted: Option<&Resources>, class: &BuilderClassSpec) -> Option<String> {
    let maximum = &class.resources.as_ref()?.maximum;
    let wanted = wanted?;
    for (kind, amounts) in [("requests", &wanted.requests), ("limits", &wanted.limits)] {
        for (name, amount) in amounts {
            let Some(most) = maximum.get(name) else { continue };
            // A maximum that cannot be read allows nothing: better a request that waits for a correction than one
            // that takes what it likes.
            let within = matches!((nanos(amount), nanos(most)), (Some(amount), Some(most)) if amount <= most);
            if !within {
                return Some(format!("{kind}.{name}: {} is more than the maximum {}", amount.0, most.0));
            }
        }
    }
    None
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
    fn resources_stay_within_the_class() {
        let parse = |yaml: &str| serde_yaml::from_str::<BuilderClassSpec>(yaml).unwrap();
        let class = parse("{systems: [x], resources: {maximum: {cpu: '4', memory: 8Gi}}}");
        let wanted = |yaml: &str| serde_yaml::from_str::<Resources>(yaml).unwrap();
        let excess_of = |yaml: &str| excess(Some(&wanted(yaml)), &class);
        assert_eq!(excess(None, &class), None);
        assert_eq!(excess_of("{requests: {cpu: 4000m, memory: 8Gi}, limits: {disk: 9Ti}}"), None);
        assert_eq!(
            excess_of("{limits: {memory: 8193Mi}}").unwrap(),
            "limits.memory: 8193Mi is more than the maximum 8Gi"
        );
        assert!(excess_of("{requests: {cpu: 4001m}}").is_some());
        assert!(excess_of("{requests: {cpu: lots}}").is_some());
        assert_eq!(excess(Some(&wanted("{requests: {cpu: 99}}")), &parse("{systems: [x]}")), None);
    }

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
