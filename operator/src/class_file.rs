//! Classes from a file, for an operator that has no right to read the cluster's: one BuilderClass a YAML document.
//!
//! No API server has looked at them, so what its schema would refuse is refused here: fields that do not exist, and what the
//! definition's rules say.

use std::path::{Path, PathBuf};

use drover_api::{BuilderClass, Trust};
use kube::ResourceExt as _;
use serde::Deserialize as _;
use serde_json::Value;

use crate::error::Error;

/// Read at most so much: a class is a few kilobytes.
const MAX_BYTES: u64 = 1 << 20;

/// Reads all that are in the file.
pub fn read(path: &Path) -> Result<Vec<BuilderClass>, Error> {
    let fail = |source| Error::File { act: "read the classes from", path: path.to_owned(), source };
    let wrong = |why: String| Error::Classes { path: PathBuf::from(path), why };
    let bytes = std::fs::metadata(path).map_err(fail)?.len();
    if bytes > MAX_BYTES {
        return Err(wrong(format!("it has {bytes} bytes; {MAX_BYTES} are read at most")));
    }
    parse(&std::fs::read_to_string(path).map_err(fail)?).map_err(wrong)
}

fn parse(text: &str) -> Result<Vec<BuilderClass>, String> {
    let mut classes: Vec<BuilderClass> = Vec::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        let value = Value::deserialize(document).map_err(|error| error.to_string())?;
        if value.is_null() {
            continue;
        }
        let class: BuilderClass =
            serde_json::from_value(value.clone()).map_err(|error| format!("no BuilderClass: {error}"))?;
        let name = class.metadata.name.clone().unwrap_or_default();
        if name.is_empty() || classes.iter().any(|other| other.name_any() == name) {
            return Err(format!("metadata.name {name:?} is empty, or there twice"));
        }
        check(&class).map_err(|why| format!("BuilderClass {name}: {why}"))?;
        let known = serde_json::to_value(&class.spec).map_err(|error| error.to_string())?;
        if let Some(field) = unknown(&value["spec"], &known, "spec") {
            return Err(format!("BuilderClass {name}: there is no field {field}"));
        }
        classes.push(class);
    }
    Ok(classes)
}

/// What the definition's rules ask for (see `drover_api`, class.rs).
fn check(class: &BuilderClass) -> Result<(), &'static str> {
    let spec = &class.spec;
    if spec.systems.is_empty() {
        return Err("spec.systems is empty");
    }
    if spec.caches.iter().filter(|cache| cache.push).count() > 1 {
        return Err("at most one cache has push: true");
    }
    if spec.trust == Trust::Claimed && spec.allowed_namespaces.is_none() {
        return Err("trust: Claimed believes whoever may use the class: name them in spec.allowedNamespaces");
    }
    Ok(())
}

/// The first field with something in it that reading has left out: nobody knows it.
fn unknown(given: &Value, known: &Value, at: &str) -> Option<String> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => given.iter().find_map(|(name, value)| {
            let at = format!("{at}.{name}");
            match known.get(name) {
                Some(known) => unknown(value, known, &at),
                // What is the default is not written again.
                None if says_nothing(value) => None,
                None => Some(at),
            }
        }),
        (Value::Array(given), Value::Array(known)) => given
            .iter()
            .zip(known)
            .enumerate()
            .find_map(|(index, (given, known))| unknown(given, known, &format!("{at}[{index}]"))),
        _ => None,
    }
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(says_nothing),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_read_as_the_api_server_would_take_them() {
        let classes = parse(
            "---
metadata: {name: a}
spec: {default: true, systems: [x86_64-linux], features: [], caches: [{url: 'file:///c', push: true}], \
             concurrency: {}}
---
apiVersion: drover.build/v1alpha1
kind: BuilderClass
metadata: {name: b}
spec: {systems: [x86_64-linux], template: {spec: {containers: [{name: builder, image: x}]}}}
",
        )
        .unwrap();
        let names: Vec<_> = classes.iter().map(BuilderClass::name_any).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(classes[0].spec.default);
    }

    #[test]
    fn what_it_would_refuse_is_refused() {
        for (spec, says) in [
            ("{systems: []}", "spec.systems is empty"),
            ("{systems: [a], cachess: [1]}", "no field spec.cachess"),
            ("{systems: [a], caches: [{url: 'file:///c', pusch: true}]}", "no field spec.caches[0].pusch"),
            ("{systems: [a], trust: Claimed}", "name them in spec.allowedNamespaces"),
            ("{systems: [a], trust: Maybe}", "no BuilderClass"),
            (
                "{systems: [a], caches: [{url: 'file:///c', push: true}, {url: 'file:///d', push: true}]}",
                "at most one cache",
            ),
        ] {
            let error = parse(&format!("{{metadata: {{name: a}}, spec: {spec}}}")).unwrap_err();
            assert!(error.contains(says), "{spec}: {error}");
        }
        let one = "metadata: {name: a}\nspec: {systems: [a]}\n";
        assert!(parse(&format!("{one}---\n{one}")).unwrap_err().contains("twice"));
        assert!(parse("spec: {systems: [a]}").is_err());
    }
}
