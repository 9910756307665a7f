//! What `nix derivation show` prints, in all its versions (Nix: derivation/json.cc and its older forms).
//!
//! Up to 2.22: full paths, `hashAlgo` with the method in front, no version. 2.23 to 2.31: `method` apart. 2.32
//! (version 3): base names, no paths for fixed outputs. From 2.33 (version 4): wrapped in `derivations`, `inputs`, SRI
//! hashes. The reader looks at the fields rather than at the version, and takes structured attributes from either place.

use std::collections::{BTreeMap, BTreeSet};

use bstr::BString;
use serde_json::{Map, Value};

use super::{DerivationOutput, OutputName, STRUCTURED_ATTRS, aterm};
use crate::{
    BasicDerivation, ContentAddress, Derivation, Error, Hash, HashAlgo, Method, StoreDir, StorePath, json,
};

/// Newest version that is understood.
const NEWEST: u64 = 4;

/// Parses the whole output of `nix derivation show` of any Nix release: derivations by the path of their `.drv`.
///
/// JSON does not hold what is not UTF-8, and is not proof: [`super::modulo::drv_path`] tells whether a derivation is
/// the one that its path names.
pub fn parse(dir: &StoreDir, text: &[u8]) -> Result<BTreeMap<StorePath, Derivation>, Error> {
    if text.len() > aterm::MAX_LEN {
        return Err(fail(format!("the JSON has {} bytes; {} are allowed", text.len(), aterm::MAX_LEN)));
    }
    let mut top: Map<String, Value> =
        serde_json::from_slice(text).map_err(|error| fail(format!("this is not a JSON object: {error}")))?;
    check_version(&top, "")?;
    if let Some(derivations) = top.remove("derivations") {
        top = match derivations {
            Value::Object(derivations) => derivations,
            _ => return Err(fail("derivations: expected an object".into())),
        };
    }
    top.into_iter()
        .map(|(path, value)| {
            let key = store_path(dir, &path).map_err(|error| fail(format!("{path}: {error}")))?;
            let name = key
                .derivation_name()
                .ok_or_else(|| fail(format!("{path}: this is not the path of a `.drv` file")))?
                .to_owned();
            let derivation = derivation(&Reader { dir, path: &path }, &name, value)?;
            Ok((key, derivation))
        })
        .collect()
}

/// Where we are, for messages.
struct Reader<'a> {
    dir: &'a StoreDir,
    path: &'a str,
}

fn derivation(reader: &Reader<'_>, name: &str, value: Value) -> Result<Derivation, Error> {
    let Value::Object(mut drv) = value else {
        return Err(reader.fail("", "expected an object"));
    };
    check_version(&drv, reader.path)?;
    if let Some(Value::String(stated)) = drv.get("name")
        && stated != name
    {
        return Err(reader.fail("name", &format!("it is {stated:?} but the path says {name:?}")));
    }
    let (srcs, drvs) = match drv.remove("inputs") {
        Some(Value::Object(mut inputs)) => (inputs.remove("srcs"), inputs.remove("drvs")),
        Some(_) => return Err(reader.fail("inputs", "expected an object")),
        None => (drv.remove("inputSrcs"), drv.remove("inputDrvs")),
    };
    let mut outputs = BTreeMap::new();
    for (output, value) in reader.object("outputs", drv.remove("outputs"))? {
        let output: OutputName = output.parse()?;
        let parsed = output_of(reader, name, &output, value)?;
        outputs.insert(output, parsed);
    }
    let mut input_srcs = BTreeSet::new();
    for value in reader.array("inputSrcs", srcs)? {
        let text = reader.string("inputSrcs", Some(value))?;
        input_srcs.insert(store_path(reader.dir, &text)?);
    }
    let mut input_drvs = BTreeMap::new();
    for (path, value) in reader.object("inputDrvs", drvs)? {
        let input = store_path(reader.dir, &path)?;
        if !input.is_derivation() {
            return Err(reader.fail("inputDrvs", &format!("{path} is not the path of a `.drv` file")));
        }
        input_drvs.insert(input, input_outputs(reader, &path, value)?);
    }
    let mut args = Vec::new();
    for value in reader.array("args", drv.remove("args"))? {
        args.push(BString::from(reader.string("args", Some(value))?));
    }
    let mut env = BTreeMap::new();
    for (key, value) in reader.object("env", drv.remove("env"))? {
        let value = reader.string(&format!("env.{key}"), Some(value))?;
        env.insert(BString::from(key), BString::from(value));
    }
    match drv.remove("structuredAttrs") {
        None | Some(Value::Null) => {}
        Some(attrs @ Value::Object(_)) => {
            // Nix prints it compactly and with sorted keys; so do we, however this JSON was ordered.
            env.insert(STRUCTURED_ATTRS.into(), BString::from(json::to_string(&attrs)));
        }
        Some(_) => return Err(reader.fail("structuredAttrs", "expected an object")),
    }
    let basic = BasicDerivation {
        name: name.to_owned(),
        outputs,
        input_srcs,
        system: reader.string("system", drv.remove("system"))?.into(),
        builder: reader.string("builder", drv.remove("builder"))?.into(),
        args,
        env,
    };
    Ok(Derivation { basic, input_drvs })
}

fn output_of(
    reader: &Reader<'_>,
    drv_name: &str,
    output: &OutputName,
    value: Value,
) -> Result<DerivationOutput, Error> {
    let at = |field: &str| format!("outputs.{output}{field}");
    let Value::Object(mut fields) = value else {
        return Err(reader.fail(&at(""), "expected an object"));
    };
    let mut text = |field: &str| match fields.remove(field) {
        None | Some(Value::Null) => Ok(None),
        value => reader.string(&at(&format!(".{field}")), value).map(Some),
    };
    let (path, method, algo, hash) = (text("path")?, text("method")?, text("hashAlgo")?, text("hash")?);
    let impure = match fields.remove("impure") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(impure)) => impure,
        Some(_) => return Err(reader.fail(&at(".impure"), "expected true or false")),
    };
    let path = path.map(|path| store_path(reader.dir, &path)).transpose()?;
    // Where there is no `method`, the algorithm has it in front.
    let (method, algo): (Option<Method>, Option<HashAlgo>) = match (method, algo) {
        (Some(method), algo) => (Some(method.parse()?), algo.map(|algo| algo.parse()).transpose()?),
        (None, Some(algo)) => {
            let (method, algo) = Method::parse_with_algo(&algo)?;
            (Some(method), Some(algo))
        }
        (None, None) => (None, None),
    };
    match (path, method, algo, hash) {
        (Some(path), None, None, None) if !impure => Ok(DerivationOutput::InputAddressed(path)),
        (None, None, None, None) if !impure => Ok(DerivationOutput::Deferred),
        (None, Some(method), Some(algo), None) if impure => Ok(DerivationOutput::Impure { method, algo }),
        (None, Some(method), Some(algo), None) => Ok(DerivationOutput::CaFloating { method, algo }),
        (path, Some(method), algo, Some(hash)) if !impure => {
            let hash = Hash::parse(&hash, algo)?;
            if algo.is_some_and(|algo| algo != hash.algo) {
                return Err(reader.fail(&at(".hash"), "it is of another algorithm than hashAlgo"));
            }
            let fixed = DerivationOutput::CaFixed(ContentAddress { method, hash });
            let computed = fixed.path(reader.dir, drv_name, output)?;
            if path.is_some() && path != computed {
                return Err(reader.fail(&at(".path"), "it is not the path that the hash gives"));
            }
            Ok(fixed)
        }
        _ => {
            Err(reader
                .fail(&at(""), "its fields path, method, hashAlgo, hash and impure do not fit together"))
        }
    }
}

/// An array of names (up to 2.17) or an object.
fn input_outputs(reader: &Reader<'_>, path: &str, value: Value) -> Result<BTreeSet<OutputName>, Error> {
    let field = format!("inputDrvs.{path}");
    let names = match value {
        Value::Object(mut fields) => {
            if let Some(Value::Object(dynamic)) = fields.get("dynamicOutputs")
                && !dynamic.is_empty()
            {
                return Err(reader.fail(&field, "dynamic derivations are not supported"));
            }
            fields.remove("outputs")
        }
        names => Some(names),
    };
    let mut outputs = BTreeSet::new();
    for value in reader.array(&field, names)? {
        outputs.insert(reader.string(&field, Some(value))?.parse()?);
    }
    if outputs.is_empty() {
        return Err(reader.fail(&field, "no outputs are named"));
    }
    Ok(outputs)
}

impl Reader<'_> {
    fn object(&self, field: &str, value: Option<Value>) -> Result<Map<String, Value>, Error> {
        match value {
            Some(Value::Object(object)) => Ok(object),
            Some(_) => Err(self.fail(field, "expected an object")),
            None => Err(self.fail(field, "it is missing")),
        }
    }

    fn array(&self, field: &str, value: Option<Value>) -> Result<Vec<Value>, Error> {
        match value {
            Some(Value::Array(array)) => Ok(array),
            Some(_) => Err(self.fail(field, "expected an array")),
            None => Err(self.fail(field, "it is missing")),
        }
    }

    fn string(&self, field: &str, value: Option<Value>) -> Result<String, Error> {
        match value {
            Some(Value::String(string)) => Ok(string),
            Some(_) => Err(self.fail(field, "expected a string")),
            None => Err(self.fail(field, "it is missing")),
        }
    }

    fn fail(&self, field: &str, why: &str) -> Error {
        fail(format!("{}: {field}: {why}", self.path))
    }
}

/// Full paths before version 3, base names since.
fn store_path(dir: &StoreDir, text: &str) -> Result<StorePath, Error> {
    if text.starts_with('/') { dir.parse(text.as_bytes()) } else { text.parse() }
}

fn check_version(object: &Map<String, Value>, path: &str) -> Result<(), Error> {
    match object.get("version") {
        None => Ok(()),
        Some(version) if version.as_u64().is_some_and(|version| version <= NEWEST) => Ok(()),
        Some(version) => Err(fail(format!(
            "{path}: version {version} of this JSON is newer than what is known ({NEWEST}); use the `.drv` file instead"
        ))),
    }
}

fn fail(why: String) -> Error {
    Error::Derivation { why }
}
