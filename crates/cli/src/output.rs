//! Objects on standard output, as YAML documents or as JSON.

use std::io::{self, Write as _};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::{Value, json};

use crate::exit::Fault;

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Format {
    Yaml,
    Json,
}

/// Prints objects: YAML as one document each, JSON as the object or, of several, a `List`. kubectl reads all of them.
pub(crate) fn print<T: Serialize>(objects: &[T], format: Format) -> Result<(), Fault> {
    let text = match format {
        Format::Yaml => yaml(objects)?,
        Format::Json => json(objects)?,
    };
    print_text(&text)
}

pub(crate) fn print_text(text: &str) -> Result<(), Fault> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Fault::ReaderGone),
        result => result.context("cannot write to standard output").map_err(Fault::Infrastructure),
    }
}

/// YAML documents, each with its `---`.
pub(crate) fn yaml<T: Serialize>(objects: &[T]) -> Result<String, Fault> {
    let mut text = String::new();
    for object in objects {
        text.push_str("---\n");
        text.push_str(
            &serde_yaml::to_string(object).context("cannot write YAML").map_err(Fault::Infrastructure)?,
        );
    }
    Ok(text)
}

fn json<T: Serialize>(objects: &[T]) -> Result<String, Fault> {
    let text = || -> serde_json::Result<String> {
        let values: Vec<Value> = objects.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
        let whole = match <[Value; 1]>::try_from(values) {
            Ok([one]) => one,
            Err(several) => json!({ "apiVersion": "v1", "kind": "List", "items": several }),
        };
        Ok(serde_json::to_string_pretty(&whole)? + "\n")
    };
    text().context("cannot write JSON").map_err(Fault::Infrastructure)
}
