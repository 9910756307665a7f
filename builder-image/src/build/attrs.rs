//! What a derivation says beside its builder and inputs: attributes in the environment, or structured ones
//! (Nix: derivation-options.cc, parsed-derivations.cc). Pure.

use std::collections::{BTreeMap, BTreeSet};

use bstr::ByteSlice as _;
use drover_nix::BasicDerivation;
use drover_nix::derivation::STRUCTURED_ATTRS;
use serde_json::{Map, Value};

use super::json;
use crate::error::Error;

/// A derivation's attributes, in whichever of the two forms it has them.
pub(crate) struct Attributes<'a> {
    drv: &'a BasicDerivation,
    structured: Option<Map<String, Value>>,
}

impl<'a> Attributes<'a> {
    pub(crate) fn parse(drv: &'a BasicDerivation) -> Result<Self, Error> {
        let structured = match drv.env(STRUCTURED_ATTRS) {
            None => None,
            Some(text) => match serde_json::from_slice(text) {
                Ok(Value::Object(map)) => Some(map),
                Ok(_) => {
                    return Err(Error::input("the structured attributes (env `__json`) are no JSON object"));
                }
                Err(error) => {
                    return Err(Error::input(format!(
                        "the structured attributes (env `__json`) are not JSON: {error}"
                    )));
                }
            },
        };
        Ok(Self { drv, structured })
    }

    pub(crate) fn structured(&self) -> Option<&Map<String, Value>> {
        self.structured.as_ref()
    }

    /// A list of words: separated by white space in the environment, an array of strings in structured attributes.
    /// None if the attribute is not there at all.
    pub(crate) fn strings(&self, name: &str) -> Result<Option<Vec<String>>, Error> {
        match &self.structured {
            None => Ok(self.drv.env(name).map(|text| words(text))),
            Some(map) => map.get(name).map(|value| string_array(name, value)).transpose(),
        }
    }

    /// In the environment true only if it is exactly `1`.
    pub(crate) fn flag(&self, name: &str) -> bool {
        match &self.structured {
            None => self.drv.env(name).is_some_and(|text| *text == "1"),
            Some(map) => map.get(name).is_some_and(|value| *value == Value::Bool(true)),
        }
    }

    /// `unsafeDiscardReferences`: the outputs that are registered without references. Structured attributes alone can
    /// ask for it.
    pub(crate) fn discards_references(&self) -> Result<BTreeSet<String>, Error> {
        const NAME: &str = "unsafeDiscardReferences";
        let mut outputs = BTreeSet::new();
        match self.structured.as_ref().and_then(|map| map.get(NAME)) {
            None => {}
            Some(Value::Object(map)) => {
                for (output, value) in map {
                    match value {
                        Value::Bool(true) => drop(outputs.insert(output.clone())),
                        Value::Bool(false) => {}
                        _ => {
                            return Err(Error::input(format!("{NAME}.{output} is neither true nor false")));
                        }
                    }
                }
            }
            Some(_) => {
                return Err(Error::input(format!("{NAME} is no table of outputs")));
            }
        }
        Ok(outputs)
    }

    /// `exportReferencesGraph`: file or key, and the paths whose closures it is about, still as text.
    pub(crate) fn reference_graphs(&self) -> Result<BTreeMap<String, Vec<String>>, Error> {
        const NAME: &str = "exportReferencesGraph";
        let mut graphs = BTreeMap::new();
        match &self.structured {
            None => {
                let words = self.drv.env(NAME).map(|text| words(text)).unwrap_or_default();
                for pair in words.chunks(2) {
                    let [file, path] = pair else {
                        return Err(Error::input(format!(
                            "{NAME} is a list of file and path in turn; it has an odd length"
                        )));
                    };
                    if !is_file_name(file) {
                        return Err(Error::input(format!("{NAME}: {file:?} cannot be a file's name")));
                    }
                    graphs.insert(file.clone(), vec![path.clone()]);
                }
            }
            Some(map) => {
                if let Some(Value::Object(entries)) = map.get(NAME) {
                    for (key, value) in entries {
                        let mut paths = Vec::new();
                        collect_strings(key, value, &mut paths)?;
                        graphs.insert(key.clone(), paths);
                    }
                }
            }
        }
        Ok(graphs)
    }
}

/// The JSON text of `.attrs.json`: compact, keys sorted at every level.
pub(crate) fn to_json(map: &Map<String, Value>) -> String {
    drover_nix::json::to_string(&Value::Object(map.clone()))
}

/// The text of `.attrs.sh`: one line a variable, for Bash. What Bash cannot hold is left out.
pub(crate) fn to_shell(map: &Map<String, Value>) -> String {
    let mut entries: Vec<_> = map.iter().filter(|(key, _)| is_variable_name(key)).collect();
    entries.sort_by_key(|(key, _)| *key);
    let mut text = String::new();
    for (key, value) in entries {
        let line = match value {
            Value::Array(items) => {
                let words: Option<String> =
                    items.iter().map(|item| shell_word(item).map(|word| word + " ")).collect();
                words.map(|words| format!("declare -a {key}=({words})\n"))
            }
            Value::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                fields.sort_by_key(|(name, _)| *name);
                let words: Option<String> = fields
                    .into_iter()
                    .map(|(name, item)| shell_word(item).map(|word| format!("[{}]={word} ", quote(name))))
                    .collect();
                words.map(|words| format!("declare -A {key}=({words})\n"))
            }
            scalar => shell_word(scalar).map(|word| format!("declare {key}={word}\n")),
        };
        text.push_str(&line.unwrap_or_default());
    }
    text
}

/// A scalar as a word; None for what the shell has no scalar for.
fn shell_word(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some("''".into()),
        Value::Bool(true) => Some("1".into()),
        Value::Bool(false) => Some(String::new()),
        Value::String(text) => Some(quote(text)),
        Value::Number(number) => json::shell_integer(number).map(|number| number.to_string()),
        Value::Array(_) | Value::Object(_) => None,
    }
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn words(text: &[u8]) -> Vec<String> {
    text.fields_with(|c| matches!(c, ' ' | '\t' | '\n' | '\r'))
        .map(|word| word.to_str_lossy().into_owned())
        .collect()
}

pub(crate) fn string_array(name: &str, value: &Value) -> Result<Vec<String>, Error> {
    let fail = || Error::input(format!("attribute {name} is not a list of strings"));
    let items = value.as_array().ok_or_else(fail)?;
    items.iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(fail)).collect()
}

fn collect_strings(key: &str, value: &Value, into: &mut Vec<String>) -> Result<(), Error> {
    match value {
        Value::String(text) => into.push(text.clone()),
        Value::Array(items) => items.iter().try_for_each(|item| collect_strings(key, item, into))?,
        _ => {
            return Err(Error::input(format!(
                "exportReferencesGraph.{key} is neither a string nor a list of strings"
            )));
        }
    }
    Ok(())
}

fn is_variable_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn is_file_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::build::testing::derivation;

    fn object(value: Value) -> Map<String, Value> {
        let Value::Object(map) = value else { panic!("an object") };
        map
    }

    #[test]
    fn shell_text_is_nixs() {
        let map = object(json!({
            "s": "it's", "n": 3, "big": 1.0, "half": 0.5, "no": null, "t": true, "f": false,
            "list": ["a b", 2, true, false, null], "table": {"k'": "v", "a": 1},
            "nested": [["x"]], "deep": {"a": {}}, "not-a-name": 1, "1st": 1, "empty": [],
        }));
        assert_eq!(
            to_shell(&map),
            "declare big=1\n\
             declare -a empty=()\n\
             declare f=\n\
             declare -a list=('a b' 2 1  '' )\n\
             declare n=3\n\
             declare no=''\n\
             declare s='it'\\''s'\n\
             declare t=1\n\
             declare -A table=(['a']=1 ['k'\\''']='v' )\n"
        );
    }

    #[test]
    fn json_is_compact_and_sorted() {
        let map = object(serde_json::from_str(r#"{"b": {"z": 1, "a": [ {"y":1,"x":2} ]}, "a": 0}"#).unwrap());
        assert_eq!(to_json(&map), r#"{"a":0,"b":{"a":[{"x":2,"y":1}],"z":1}}"#);
    }

    #[test]
    fn both_forms_of_lists_and_flags() {
        let plain = derivation(&[("l", " a\n b\tc "), ("one", "1"), ("true", "true")]);
        let attributes = Attributes::parse(&plain).unwrap();
        assert_eq!(attributes.strings("l").unwrap().unwrap(), ["a", "b", "c"]);
        assert_eq!(attributes.strings("none").unwrap(), None);
        assert!(attributes.flag("one") && !attributes.flag("true"));

        let structured = derivation(&[("__json", r#"{"l": ["a b"], "one": true, "bad": "x"}"#)]);
        let attributes = Attributes::parse(&structured).unwrap();
        assert_eq!(attributes.strings("l").unwrap().unwrap(), ["a b"]);
        assert!(attributes.flag("one"));
        assert!(attributes.strings("bad").is_err());
    }

    #[test]
    fn reference_graphs() {
        let drv = derivation(&[("exportReferencesGraph", "a /nix/store/x b.txt /nix/store/y")]);
        let graphs = Attributes::parse(&drv).unwrap().reference_graphs().unwrap();
        assert_eq!(graphs["b.txt"], ["/nix/store/y"]);
        for bad in ["a", "../a /nix/store/x", "a /x .b /y"] {
            let drv = derivation(&[("exportReferencesGraph", bad)]);
            assert!(Attributes::parse(&drv).unwrap().reference_graphs().is_err(), "{bad}");
        }
        let drv = derivation(&[("__json", r#"{"exportReferencesGraph": {"g": ["p", ["q"]]}}"#)]);
        assert_eq!(Attributes::parse(&drv).unwrap().reference_graphs().unwrap()["g"], ["p", "q"]);
    }

    #[test]
    fn discarded_references() {
        let of = |env: &[(&str, &str)]| Attributes::parse(&derivation(env)).unwrap().discards_references();
        let json = r#"{"unsafeDiscardReferences": {"out": true, "dev": false}}"#;
        assert_eq!(of(&[("__json", json)]).unwrap(), ["out".to_owned()].into());
        assert_eq!(of(&[("unsafeDiscardReferences", "1")]).unwrap(), [].into(), "not in the environment");
        for bad in [r#"{"unsafeDiscardReferences": true}"#, r#"{"unsafeDiscardReferences": {"out": 1}}"#] {
            assert!(of(&[("__json", bad)]).is_err(), "{bad}");
        }
    }

    #[test]
    fn bad_structured_attributes() {
        for bad in ["", "[]", "{"] {
            assert!(Attributes::parse(&derivation(&[("__json", bad)])).is_err());
        }
    }
}
