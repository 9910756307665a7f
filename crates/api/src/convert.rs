//! Between a request's derivation and Nix's own type. Errors name the field, as an API server would.

use bstr::BString;
use drover_nix::derivation::{DerivationType, modulo, placeholder};
use drover_nix::store_path::MAX_NAME_LEN;
use drover_nix::{BasicDerivation, DerivationOutput, Method, OutputName, StoreDir, StorePath};

use crate::{BuildRequestSpec, DerivationSpec, OutputSpec};

/// Where a request has its derivation.
const ROOT: &str = "spec.derivation";

/// What is wrong with which field.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field}: {why}")]
pub struct FieldError {
    /// Path from the object's root, such as `spec.derivation.inputSrcs[3]`.
    pub field: String,
    /// What is wrong and what would be right.
    pub why: String,
}

impl FieldError {
    pub fn new(field: impl Into<String>, why: impl ToString) -> Self {
        Self { field: field.into(), why: why.to_string() }
    }

    /// A stable word for metrics and reasons.
    pub fn category(&self) -> &'static str {
        "field"
    }
}

/// What a request asks for.
#[derive(Clone, PartialEq, Debug)]
pub enum Target {
    /// `spec.derivation`, completed (see [`complete`]).
    Derivation(BasicDerivation),
    /// `spec.drvPath`: to be read from a cache.
    DrvPath(StorePath),
}

/// What `spec` asks for, checked.
pub fn target(spec: &BuildRequestSpec, dir: &StoreDir) -> Result<Target, FieldError> {
    match (&spec.derivation, drv_path(spec, dir)?) {
        (Some(derivation), _) => complete(to_basic(derivation, dir)?, dir).map(Target::Derivation),
        (None, Some(path)) => Ok(Target::DrvPath(path)),
        (None, None) => Err(FieldError::new("spec", "it needs a derivation, a drvPath or both")),
    }
}

/// The `.drv` that the request says it comes from.
pub fn drv_path(spec: &BuildRequestSpec, dir: &StoreDir) -> Result<Option<StorePath>, FieldError> {
    let Some(path) = &spec.drv_path else {
        return Ok(None);
    };
    let field = "spec.drvPath";
    let path = store_path(field, path, dir)?;
    match (path.derivation_name(), &spec.derivation) {
        (None, _) => Err(FieldError::new(field, format!("{path} does not end with .drv"))),
        (Some(name), Some(drv)) if name != drv.name => Err(FieldError::new(
            field,
            format!("{path} is not called {}.drv, as the derivation is", drv.name),
        )),
        _ => Ok(Some(path)),
    }
}

/// The derivation as it is written, with nothing filled in: an output without path and hash is `Deferred`.
pub fn to_basic(spec: &DerivationSpec, dir: &StoreDir) -> Result<BasicDerivation, FieldError> {
    check_name(spec)?;
    for (field, value) in [("system", &spec.system), ("builder", &spec.builder)] {
        if value.is_empty() {
            return Err(FieldError::new(format!("{ROOT}.{field}"), "it is empty"));
        }
    }
    let mut outputs = std::collections::BTreeMap::new();
    for (name, output) in &spec.outputs {
        let field = format!("{ROOT}.outputs.{name}");
        let name: OutputName = name.parse().map_err(|error| FieldError::new(&field, error))?;
        let output = to_output(&field, &spec.name, &name, output, dir)?;
        outputs.insert(name, output);
    }
    let mut input_srcs = std::collections::BTreeSet::new();
    for (i, path) in spec.input_srcs.iter().enumerate() {
        let field = format!("{ROOT}.inputSrcs[{i}]");
        let parsed = store_path(&field, path, dir)?;
        if !input_srcs.insert(parsed) {
            return Err(FieldError::new(field, format!("{path} is listed twice")));
        }
    }
    if spec.env.contains_key("") {
        return Err(FieldError::new(format!("{ROOT}.env"), "a variable has an empty name"));
    }
    let basic = BasicDerivation {
        name: spec.name.clone(),
        outputs,
        input_srcs,
        system: spec.system.as_str().into(),
        builder: spec.builder.as_str().into(),
        args: spec.args.iter().map(|arg| arg.as_str().into()).collect(),
        env: spec.env.iter().map(|(key, value)| (key.as_str().into(), value.as_str().into())).collect(),
    };
    basic.kind().map_err(|error| FieldError::new(format!("{ROOT}.outputs"), error))?;
    Ok(basic)
}

/// The spec for a derivation. Fails on bytes that are not UTF-8, because JSON cannot carry them.
pub fn from_basic(drv: &BasicDerivation, dir: &StoreDir) -> Result<DerivationSpec, FieldError> {
    let text = |field: &str, bytes: &BString| {
        String::from_utf8(bytes.to_vec()).map_err(|_| {
            let why = "it is not UTF-8, which a BuildRequest cannot carry: put the .drv into the class's cache \
                       and name it in spec.drvPath";
            FieldError::new(format!("{ROOT}.{field}"), why)
        })
    };
    let mut outputs = std::collections::BTreeMap::new();
    for (name, output) in &drv.outputs {
        outputs.insert(name.to_string(), from_output(&drv.name, name, output, dir)?);
    }
    let mut args = Vec::with_capacity(drv.args.len());
    for (i, arg) in drv.args.iter().enumerate() {
        args.push(text(&format!("args[{i}]"), arg)?);
    }
    let mut env = std::collections::BTreeMap::new();
    for (key, value) in &drv.env {
        let field = format!("env.{key}");
        env.insert(text(&field, key)?, text(&field, value)?);
    }
    Ok(DerivationSpec {
        name: drv.name.clone(),
        system: text("system", &drv.system)?,
        builder: text("builder", &drv.builder)?,
        args,
        env,
        input_srcs: drv.input_srcs.iter().map(|path| dir.full(path)).collect(),
        outputs,
    })
}

/// Fills in what a request may leave out: the paths of input-addressed outputs, computed as Nix does for a derivation
/// without derivations as inputs, and the variables that are called like the outputs. They hold the outputs' paths, or the
/// placeholders for these where only the content can tell them (Nix: primops.cc, derivationStrict). A derivation whose
/// paths are given is left as it is.
pub fn complete(mut drv: BasicDerivation, dir: &StoreDir) -> Result<BasicDerivation, FieldError> {
    let fail = |error: drover_nix::Error| FieldError::new(format!("{ROOT}.outputs"), error);
    match drv.kind().map_err(fail)? {
        DerivationType::Deferred => modulo::fill_output_paths(dir, &mut drv).map_err(fail)?,
        DerivationType::CaFixed | DerivationType::CaFloating | DerivationType::Impure => {
            for (name, path) in drv.output_paths(dir).map_err(fail)? {
                let value = path.map_or_else(|| placeholder::own(&name), |path| dir.full(&path));
                let variable = drv.env.entry(name.as_str().into()).or_default();
                if variable.is_empty() {
                    *variable = value.into();
                }
            }
        }
        DerivationType::InputAddressed => {}
    }
    Ok(drv)
}

fn check_name(spec: &DerivationSpec) -> Result<(), FieldError> {
    let field = || format!("{ROOT}.name");
    // Whether the name will do is for the store path's own rules to say; the hash does not matter.
    StorePath::from_parts([0; 20], &spec.name).map_err(|error| FieldError::new(field(), error))?;
    // Nix: primops.cc, derivationStrict.
    let makes_a_derivation = || {
        let text = |output: &OutputSpec| output.method.as_deref() == Some(Method::Text.as_str());
        spec.outputs.len() == 1 && spec.outputs.get("out").is_some_and(text)
    };
    if spec.name.ends_with(".drv") && !makes_a_derivation() {
        let why = "it ends with .drv, which is for derivations whose one output, `out`, is such a file (method \
                   text); give the name without";
        return Err(FieldError::new(field(), why));
    }
    let longest = MAX_NAME_LEN - ".drv".len();
    if spec.name.len() > longest {
        return Err(FieldError::new(field(), format!("it is longer than {longest} characters")));
    }
    Ok(())
}

fn to_output(
    field: &str,
    drv_name: &str,
    name: &OutputName,
    output: &OutputSpec,
    dir: &StoreDir,
) -> Result<DerivationOutput, FieldError> {
    // Its own length limit: what is left of the name when the output's is added.
    StorePath::from_parts([0; 20], &name.path_name(drv_name))
        .map_err(|error| FieldError::new(field, error))?;
    let path = match &output.path {
        Some(path) => {
            let parsed = store_path(&format!("{field}.path"), path, dir)?;
            let expected = name.path_name(drv_name);
            if parsed.name() != expected {
                let why =
                    format!("{path} is called {}; this output has to be called {expected}", parsed.name());
                return Err(FieldError::new(format!("{field}.path"), why));
            }
            path.as_str()
        }
        None => "",
    };
    let method = match &output.method {
        Some(method) => method.parse().map_err(|error| FieldError::new(format!("{field}.method"), error))?,
        None => Method::Flat,
    };
    let algo = match (&output.hash_algo, &output.hash, &output.method) {
        (Some(algo), ..) => {
            let algo = algo.parse().map_err(|error| FieldError::new(format!("{field}.hashAlgo"), error))?;
            method.check_algo(algo).map_err(|why| FieldError::new(format!("{field}.hashAlgo"), why))?;
            format!("{}{algo}", method.prefix())
        }
        (None, None, None) => String::new(),
        _ => return Err(FieldError::new(field, "an output with a hash or a method needs hashAlgo")),
    };
    let hash = output.hash.as_deref().unwrap_or_default();
    DerivationOutput::from_triple(dir, drv_name, name, path.as_bytes(), algo.as_bytes(), hash.as_bytes())
        .map_err(|error| FieldError::new(field, error))
}

fn from_output(
    drv_name: &str,
    name: &OutputName,
    output: &DerivationOutput,
    dir: &StoreDir,
) -> Result<OutputSpec, FieldError> {
    let path = output
        .path(dir, drv_name, name)
        .map_err(|error| FieldError::new(format!("{ROOT}.outputs.{name}"), error))?
        .map(|path| dir.full(&path));
    Ok(match output {
        DerivationOutput::InputAddressed(_) | DerivationOutput::Deferred => {
            OutputSpec { path, ..Default::default() }
        }
        DerivationOutput::CaFixed(ca) => OutputSpec {
            path,
            hash_algo: Some(ca.hash.algo.to_string()),
            hash: Some(ca.hash.to_sri()),
            method: Some(ca.method.as_str().into()),
        },
        DerivationOutput::CaFloating { method, algo } | DerivationOutput::Impure { method, algo } => {
            OutputSpec {
                path: None,
                hash_algo: Some(algo.to_string()),
                hash: matches!(output, DerivationOutput::Impure { .. }).then(|| "impure".into()),
                method: Some(method.as_str().into()),
            }
        }
    })
}

fn store_path(field: &str, path: &str, dir: &StoreDir) -> Result<StorePath, FieldError> {
    dir.parse(path.as_bytes()).map_err(|error| FieldError::new(field, error))
}

#[cfg(test)]
mod tests;
