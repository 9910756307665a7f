//! Label and field selectors, as far as lists and watches of the operator use them.

use serde_json::Value;

use super::Failure;

/// All of these must hold.
#[derive(Clone, Default, Debug)]
pub(crate) struct Selector {
    labels: Vec<(String, Test)>,
    /// `metadata.name`.
    name: Option<String>,
}

#[derive(Clone, Debug)]
enum Test {
    Exists,
    Absent,
    Is(String),
    IsNot(String),
}

impl Selector {
    pub(crate) fn parse(labels: Option<&str>, fields: Option<&str>) -> Result<Self, Failure> {
        let mut selector = Self::default();
        for part in parts(labels) {
            if part.contains('(') || part.contains(" in ") {
                return Err(Failure::not_modelled(&format!("the label selector {part:?}")));
            }
            let (key, test) = if let Some((key, value)) = part.split_once("!=") {
                (key, Test::IsNot(value.to_owned()))
            } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (key, Test::Is(value.to_owned()))
            } else if let Some(key) = part.strip_prefix('!') {
                (key, Test::Absent)
            } else {
                (part, Test::Exists)
            };
            selector.labels.push((key.to_owned(), test));
        }
        for part in parts(fields) {
            match part.split_once('=') {
                Some(("metadata.name", name)) => {
                    selector.name = Some(name.trim_start_matches('=').to_owned());
                }
                _ => return Err(Failure::not_modelled(&format!("the field selector {part:?}"))),
            }
        }
        Ok(selector)
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        self.name.as_ref().is_none_or(|name| metadata["name"] == name.as_str())
            && self.labels.iter().all(|(key, test)| {
                let value = metadata["labels"].get(key).and_then(Value::as_str);
                match test {
                    Test::Exists => value.is_some(),
                    Test::Absent => value.is_none(),
                    Test::Is(wanted) => value == Some(wanted),
                    Test::IsNot(other) => value != Some(other),
                }
            })
    }
}

fn parts(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.unwrap_or_default().split(',').filter(|part| !part.is_empty())
}
