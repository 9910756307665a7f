//! Pieces of schema that several fields share: the patterns and bounds that an API server enforces.
//!
//! Bounds are there for two reasons: hostile requests, and the cost that an API server computes for CEL rules from
//! the largest value that could be there.

use kube::core::Rule;
use schemars::{Schema, SchemaGenerator, json_schema};

/// A full store path: any absolute directory, 32 nix32 digits, a dash, a name (Nix: path.cc, checkName).
pub(crate) const STORE_PATH_PATTERN: &str = r"^(/[^/]+)+/[0-9a-df-np-sv-z]{32}-[0-9a-zA-Z+._?=-]{1,211}$";
/// Longest full store path that is taken: the name's limit and room for the directory.
pub(crate) const MAX_STORE_PATH: usize = 1024;
/// Most sources and inputs of one derivation.
pub(crate) const MAX_INPUTS: usize = 16_384;
/// Most arguments of one builder.
pub(crate) const MAX_ARGS: usize = 4096;
/// Most environment variables of one builder.
pub(crate) const MAX_ENV: usize = 4096;
/// Longest argument or value. An API server takes no object above 1.5 MiB anyway.
pub(crate) const MAX_TEXT: usize = 1 << 20;
/// Most outputs of one derivation. Small, because the rule over their names is priced by it.
pub const MAX_OUTPUTS: usize = 16;

/// A store path as a string.
pub(crate) fn store_path(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "pattern": STORE_PATH_PATTERN, "maxLength": MAX_STORE_PATH })
}

/// The path of a `.drv` file.
pub(crate) fn drv_path(_: &mut SchemaGenerator) -> Schema {
    let pattern = STORE_PATH_PATTERN.replace("$", r"\.drv$");
    json_schema!({ "type": "string", "pattern": pattern, "maxLength": MAX_STORE_PATH })
}

/// Inputs of a derivation.
pub(crate) fn store_paths(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "array", "items": store_path(generator), "maxItems": MAX_INPUTS })
}

/// Arguments of a builder.
pub(crate) fn args(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": MAX_ARGS,
        "items": { "type": "string", "maxLength": MAX_TEXT },
    })
}

/// Environment of a builder.
pub(crate) fn env(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object", "maxProperties": MAX_ENV,
        "additionalProperties": { "type": "string", "maxLength": MAX_TEXT },
    })
}

/// The rule that optional field `name` of a spec stays what it was, presence included.
pub(crate) fn immutable(name: &str) -> Rule {
    Rule::new(format!(
        "has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"
    ))
    .message(&*format!("spec.{name} is immutable: make a new BuildRequest"))
    .field_path(format!(".{name}"))
}
