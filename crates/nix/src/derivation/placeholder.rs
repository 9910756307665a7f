//! The texts that stand for output paths which are not known yet (Nix: derivations.cc, hashPlaceholder;
//! downstream-placeholder.cc).
//!
//! An evaluator writes them into a derivation; whoever knows the path later puts it in their place. A derivation's own
//! outputs become known when it is built, those of its inputs when it is resolved.

use std::collections::BTreeMap;

use bstr::BString;

use super::OutputName;
use crate::{Sha256, StorePath};

/// Characters of a placeholder behind its slash.
const DIGITS: usize = 52;

/// What a derivation calls its own output: `builtins.placeholder "out"`.
pub fn own(output: &OutputName) -> String {
    render(&format!("nix-output:{output}"))
}

/// What a derivation calls output `output` of its input `drv`. None if `drv` is not the path of a `.drv` file.
pub fn of_input(drv: &StorePath, output: &OutputName) -> Option<String> {
    let name = output.path_name(drv.derivation_name()?);
    Some(render(&format!("nix-upstream-output:{}:{name}", drv.hash_part())))
}

/// Texts and what comes in their place.
#[derive(Default, Debug)]
pub(super) struct Rewrites(BTreeMap<Vec<u8>, Vec<u8>>);

impl Rewrites {
    pub(super) fn add(&mut self, placeholder: &str, path: String) {
        self.0.insert(placeholder.as_bytes().to_vec(), path.into_bytes());
    }

    /// In one pass however many there are: a derivation may have thousands of inputs and megabytes of text. No path
    /// that is put in can be part of another placeholder.
    pub(super) fn apply(&self, text: &BString) -> BString {
        let mut result = Vec::with_capacity(text.len());
        let mut rest = text.as_slice();
        while let Some(at) = rest.iter().position(|byte| *byte == b'/') {
            let (before, from) = rest.split_at(at);
            result.extend_from_slice(before);
            match from.get(..=DIGITS).and_then(|text| self.0.get(text)) {
                Some(path) => {
                    result.extend_from_slice(path);
                    rest = &from[1 + DIGITS..];
                }
                None => {
                    result.push(b'/');
                    rest = &from[1..];
                }
            }
        }
        result.extend_from_slice(rest);
        result.into()
    }
}

fn render(text: &str) -> String {
    format!("/{}", Sha256::of(text.as_bytes()).to_nix32())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_placeholders() {
        // From Nix: builtins.placeholder "out", and what 2.34 wrote into testdata/content-addressed.
        assert_eq!(own(&OutputName::out()), "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9");
        let of = |drv: &str, output: &str| of_input(&drv.parse().unwrap(), &output.parse().unwrap());
        let base = "7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base.drv";
        assert_eq!(of(base, "out").unwrap(), "/1shyykwwxclsd35ffqj8j65zlv3nli2jvn7v5yzjwa5hp53m1fvd");
        assert_eq!(of(base, "dev").unwrap(), "/1zisf9p816mkr593rgj3x206jk3afxrl2hb7fisi8inb0hiak6gk");
        assert_eq!(of("7papim1jhqjlq8kcsnwmjyxbdgmw9pgv-base", "out"), None);
    }

    #[test]
    fn rewriting_takes_whole_placeholders_only() {
        let placeholder = own(&OutputName::out());
        let mut rewrites = Rewrites::default();
        rewrites.add(&placeholder, "/PATH".into());
        let apply = |text: String| rewrites.apply(&text.into()).to_string();
        assert_eq!(
            apply(format!("a{placeholder}{placeholder}/b//{placeholder}\n")),
            "a/PATH/PATH/b///PATH\n"
        );
        let cut = &placeholder[..placeholder.len() - 1];
        for text in [String::new(), "/".into(), format!("{cut}/"), cut.into(), placeholder[1..].to_owned()] {
            assert_eq!(apply(text.clone()), text);
        }
    }
}
