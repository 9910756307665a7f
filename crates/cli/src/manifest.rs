//! BuildRequests as people write them: YAML with several documents, checked as strictly as an API server would, and
//! errors that name file, line and field.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use drover_api::{API_VERSION, BuildRequest, FieldError};
use serde_yaml::Value;

use crate::exit::Fault;
use crate::locate;

/// Most bytes of a manifest.
const MAX_LEN: u64 = 256 << 20;

/// A request and where it was written.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    pub(crate) request: BuildRequest,
    origin: Origin,
}

/// For errors: the file, the document with its line numbers, and what stands before its fields' paths.
#[derive(Clone, Debug)]
struct Origin {
    file: String,
    text: String,
    prefix: String,
}

/// Reads all requests of a file, or of standard input if it is called `-`.
pub(crate) fn read(path: &Path) -> Result<Vec<Manifest>, Fault> {
    let file = if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
    parse(&file, &read_text(path).map_err(Fault::Input)?)
}

/// The content of a file, or of standard input if it is called `-`.
pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    let read = || -> anyhow::Result<String> {
        let mut text = String::new();
        let mut source: Box<dyn std::io::Read> = if path == Path::new("-") {
            Box::new(std::io::stdin())
        } else {
            Box::new(std::fs::File::open(path)?)
        };
        source.by_ref().take(MAX_LEN + 1).read_to_string(&mut text)?;
        if text.len() as u64 > MAX_LEN {
            return Err(anyhow!("it is longer than {MAX_LEN} bytes"));
        }
        Ok(text)
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

/// Parses a YAML stream; `file` is what to call it in errors.
pub(crate) fn parse(file: &str, text: &str) -> Result<Vec<Manifest>, Fault> {
    let mut manifests = Vec::new();
    for document in documents(text) {
        let mut origin = Origin { file: file.to_owned(), text: document, prefix: String::new() };
        let value: Value = match serde_yaml::from_str(&origin.text) {
            Ok(value) => value,
            Err(error) => {
                origin.text = from_json(&origin.text).ok_or_else(|| origin.unreadable(&error))?;
                serde_yaml::from_str(&origin.text).map_err(|error| origin.unreadable(&error))?
            }
        };
        match value.get("kind").and_then(Value::as_str) {
            _ if value.is_null() => {}
            Some("List") => {
                let items = value.get("items").and_then(Value::as_sequence).cloned().unwrap_or_default();
                for (i, item) in items.into_iter().enumerate() {
                    let origin = Origin { prefix: format!("items[{i}]."), ..origin.clone() };
                    manifests.push(one(&item, item.clone(), origin)?);
                }
            }
            // From the text, not from the value: only that way errors know their lines.
            _ => {
                manifests.push(one(&value, serde_yaml::Deserializer::from_str(&origin.text.clone()), origin)?)
            }
        }
    }
    if manifests.is_empty() {
        return Err(Fault::Input(anyhow!("{file}: there is no BuildRequest in it")));
    }
    Ok(manifests)
}

impl Manifest {
    /// An error of the request's content, with file and line.
    pub(crate) fn fault(&self, error: &FieldError) -> Fault {
        self.origin.fault(&error.field, &error.why)
    }

    /// The file, for messages.
    pub(crate) fn file(&self) -> &str {
        &self.origin.file
    }

    /// Whether it was made, not read: then nothing in it is the user's.
    pub(crate) fn is_made(&self) -> bool {
        self.origin.text.is_empty()
    }

    /// For requests that were made, not read.
    pub(crate) fn made_from(file: String, request: BuildRequest) -> Self {
        Self { request, origin: Origin { file, text: String::new(), prefix: String::new() } }
    }
}

impl Origin {
    fn fault(&self, field: &str, why: &str) -> Fault {
        let line = locate::line_of(&self.text, &format!("{}{field}", self.prefix));
        let place = line.map_or_else(|| self.file.clone(), |line| format!("{}:{line}", self.file));
        Fault::Input(anyhow!("{place}: {}{field}: {why}", self.prefix))
    }

    fn unreadable(&self, error: &serde_yaml::Error) -> Fault {
        let text = error.to_string();
        Fault::Input(match error.location() {
            Some(at) => {
                // The place is said once, in front, where editors look for it.
                let text = text.split(" at line ").next().unwrap_or(&text);
                anyhow!("{}:{}:{}: {}{text}", self.file, at.line(), at.column(), self.prefix)
            }
            None => anyhow!("{}: {}{text}", self.file, self.prefix),
        })
    }
}

/// JSON as YAML takes it. Nearly all JSON is YAML as it stands, but for some characters that YAML wants escaped and pairs
/// of escapes for one character. None if it is no JSON either.
fn from_json(text: &str) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let escaped = |c: char| match c {
        '\u{7f}'..='\u{9f}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    };
    // Outside of strings JSON has none of these.
    Some(format!("{value:#}").chars().map(escaped).collect())
}

fn one<'de>(
    value: &Value,
    deserializer: impl serde::Deserializer<'de, Error = serde_yaml::Error>,
    origin: Origin,
) -> Result<Manifest, Fault> {
    for (field, expected) in [("apiVersion", API_VERSION), ("kind", "BuildRequest")] {
        let found = value.get(field).and_then(Value::as_str);
        if found != Some(expected) {
            let found = found.map_or_else(|| "it is missing".to_owned(), |found| format!("it is {found}"));
            return Err(origin.fault(field, &format!("{found}; expected {expected}")));
        }
    }
    let mut unknown = Vec::new();
    let request = serde_ignored::deserialize(deserializer, |path| unknown.push(clean(&path.to_string())))
        .map_err(|error: serde_yaml::Error| origin.unreadable(&error))?;
    // These two were read above; the type does not keep them.
    unknown.retain(|field| field != "apiVersion" && field != "kind");
    match unknown.first() {
        Some(field) => Err(origin.fault(field, "unknown field")),
        None => Ok(Manifest { request, origin }),
    }
}

/// The tracker writes `?` for the insides of an Option.
fn clean(path: &str) -> String {
    path.split('.').filter(|part| *part != "?").collect::<Vec<_>>().join(".")
}

/// The documents of a stream. Each keeps its place by empty lines before it, so that line numbers stay true.
fn documents(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    for (i, line) in text.lines().enumerate() {
        let is_marker = line == "---" || line.starts_with("--- ");
        if is_marker {
            documents.push("\n".repeat(i));
        }
        if let Some(last) = documents.last_mut() {
            last.push_str(line);
            last.push('\n');
        }
    }
    documents.retain(|document| {
        document.lines().any(|line| !line.trim().is_empty() && !line.starts_with('#') && line != "---")
    });
    documents
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
apiVersion: drover.build/v1alpha1
kind: BuildRequest
metadata:
  name: hello
spec:
  derivation:
    name: hello
    system: x86_64-linux
    builder: /bin/sh
    outputs:
      out: {}
";

    fn error(text: &str) -> String {
        match parse("f.yaml", text) {
            Err(Fault::Input(error)) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn json_that_is_no_yaml() {
        let text = r#"{"apiVersion": "drover.build/v1alpha1", "kind": "BuildRequest", "metadata": {"name": "x"},
            "spec": {"derivation": {"name": "x", "system": "s", "builder": "b", "outputs": {"out": {}},
            "env": {"pair": "\ud83e\udd80", "delete": "DEL", "c1": "\u0085"}}}}"#;
        let manifests = parse("f", &text.replace("DEL", "\u{7f}")).unwrap();
        let env = &manifests[0].request.spec.derivation.as_ref().unwrap().env;
        assert_eq!((&*env["pair"], &*env["delete"], &*env["c1"]), ("🦀", "\u{7f}", "\u{85}"));
    }

    #[test]
    fn documents_and_lists() {
        let two = format!("# first\n---\n{GOOD}---\n{}---\n", GOOD.replace("name: hello", "name: other"));
        let names = |text: &str| -> Vec<_> {
            parse("f", text).unwrap().into_iter().map(|m| m.request.metadata.name.unwrap()).collect()
        };
        assert_eq!(names(&two), ["hello", "other"]);
        let item = serde_json::to_string(&parse("f", GOOD).unwrap()[0].request).unwrap();
        let list = format!("{{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [{item}, {item}]}}");
        assert_eq!(names(&list), ["hello", "hello"]);
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let at = |from: &str, to: &str| error(&format!("---\n{GOOD}---\n{}", GOOD.replacen(from, to, 1)));
        assert_eq!(at("builder:", "bilder:"), "f.yaml:20:5: spec.derivation: missing field `builder`");
        assert_eq!(
            at("    builder:", "    argv: []\n    builder:"),
            "f.yaml:22: spec.derivation.argv: unknown field"
        );
        assert_eq!(
            at("kind: BuildRequest", "kind: Pod"),
            "f.yaml:15: kind: it is Pod; expected BuildRequest"
        );
        assert_eq!(
            at("apiVersion: drover.build/v1alpha1\n", ""),
            "f.yaml: apiVersion: it is missing; expected drover.build/v1alpha1"
        );
        assert!(at("spec:", "spec: [").starts_with("f.yaml:20:"), "{}", at("spec:", "spec: ["));
        assert_eq!(error("# nothing\n"), "f.yaml: there is no BuildRequest in it");
    }

    #[test]
    fn errors_of_content_have_lines_too() {
        let manifest = parse("f.yaml", GOOD).unwrap().remove(0);
        let Fault::Input(error) = manifest.fault(&FieldError::new("spec.derivation.system", "bad")) else {
            panic!("not the input's fault");
        };
        assert_eq!(error.to_string(), "f.yaml:8: spec.derivation.system: bad");
    }
}
