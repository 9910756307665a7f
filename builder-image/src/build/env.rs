//! The builder's environment, arguments and helper files, computed from a derivation (Nix: derivation-builder.cc,
//! initEnv; derivation-env-desugar.cc). Pure.

use std::collections::BTreeMap;
use std::ffi::CString;

use bstr::{BString, ByteSlice as _};
use drover_nix::derivation::DerivationType;
use drover_nix::{BasicDerivation, OutputName, Sha256, StoreDir, StorePath, base32};
use serde_json::Value;

use super::attrs::{self, Attributes};
use super::graph::Graphs;
use crate::error::Error;
use crate::sandbox::plan::Program;

/// What the environment depends on.
pub(crate) struct Inputs<'a> {
    pub dir: &'a StoreDir,
    pub drv: &'a BasicDerivation,
    pub attributes: &'a Attributes<'a>,
    pub kind: DerivationType,
    /// Where the builder is to put each output.
    pub outputs: &'a BTreeMap<OutputName, StorePath>,
    /// As the builder sees it.
    pub build_dir: &'a str,
    pub cores: usize,
    /// The caller's environment, for `impureEnvVars`.
    pub impure: &'a dyn Fn(&str) -> Option<BString>,
    pub graphs: &'a Graphs,
}

/// What is executed, and the files that it expects in its build directory, by name.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub command: Program,
    pub files: BTreeMap<String, Vec<u8>>,
}

pub(crate) fn prepare(inputs: &Inputs<'_>) -> Result<Prepared, Error> {
    let placeholders = placeholders(inputs);
    let rewrite = |bytes: &[u8]| rewrite(bytes, &placeholders);
    let mut files: BTreeMap<String, Vec<u8>> = inputs.graphs.files.clone();

    let mut env = BTreeMap::<BString, BString>::new();
    let set = |env: &mut BTreeMap<BString, BString>, key: &str, value: &str| {
        env.insert(key.into(), value.into());
    };
    set(&mut env, "PATH", "/path-not-set");
    set(&mut env, "HOME", "/homeless-shelter");
    set(&mut env, "NIX_STORE", inputs.dir.as_str());
    set(&mut env, "NIX_BUILD_CORES", &inputs.cores.to_string());
    if inputs.attributes.structured().is_some() {
        for (name, variable, text) in structured_files(inputs) {
            set(&mut env, variable, &format!("{}/{name}", inputs.build_dir));
            files.insert(name.to_owned(), rewrite(text.as_bytes()).into());
        }
    } else {
        let as_file = inputs.attributes.strings("passAsFile")?.unwrap_or_default();
        for (key, value) in &inputs.drv.env {
            if as_file.iter().any(|name| name.as_bytes() == key.as_slice()) {
                let name = format!(".attr-{}", base32::encode(&Sha256::of(key).0));
                let mut variable = key.clone();
                variable.extend_from_slice(b"Path");
                env.insert(variable, format!("{}/{name}", inputs.build_dir).into());
                files.insert(name, rewrite(value).into());
            } else {
                env.insert(rewrite(key), rewrite(value));
            }
        }
    }
    for key in ["NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD"] {
        set(&mut env, key, inputs.build_dir);
    }
    if inputs.kind == DerivationType::CaFixed {
        set(&mut env, "NIX_OUTPUT_CHECKED", "1");
    }
    if !inputs.kind.is_sandboxed() {
        for name in inputs.attributes.strings("impureEnvVars")?.unwrap_or_default() {
            let value = (inputs.impure)(&name).unwrap_or_default();
            env.insert(name.into(), value);
        }
    }
    set(&mut env, "NIX_LOG_FD", "2");
    set(&mut env, "TERM", "xterm-256color");

    let base_name = inputs.drv.builder.rsplit_str("/").next().unwrap_or_default();
    let mut argv = vec![c_string("the builder's name", base_name)?];
    for arg in &inputs.drv.args {
        argv.push(c_string("an argument", &rewrite(arg))?);
    }
    let env = env.iter().map(|(key, value)| variable(key, value)).collect::<Result<_, _>>()?;
    let program = c_string("the builder's path", &inputs.drv.builder)?;
    Ok(Prepared { command: Program { program, argv, env }, files })
}

/// The text that stands for an output where its path is not known (Nix: hashPlaceholder).
pub(crate) fn placeholder(output: &OutputName) -> String {
    format!("/{}", Sha256::of(format!("nix-output:{output}").as_bytes()).to_nix32())
}

/// File name, variable that says where it is, and text.
fn structured_files(inputs: &Inputs<'_>) -> [(&'static str, &'static str, String); 2] {
    let mut map = inputs.attributes.structured().cloned().unwrap_or_default();
    let outputs = inputs.outputs.keys().map(|name| (name.to_string(), Value::String(placeholder(name))));
    map.insert("outputs".to_owned(), Value::Object(outputs.collect()));
    map.extend(inputs.graphs.values.clone());
    [
        (".attrs.json", "NIX_ATTRS_JSON_FILE", attrs::to_json(&map)),
        (".attrs.sh", "NIX_ATTRS_SH_FILE", attrs::to_shell(&map)),
    ]
}

fn placeholders(inputs: &Inputs<'_>) -> Vec<(String, String)> {
    inputs.outputs.iter().map(|(name, path)| (placeholder(name), inputs.dir.full(path))).collect()
}

fn rewrite(bytes: &[u8], placeholders: &[(String, String)]) -> BString {
    let mut text = BString::from(bytes);
    for (from, to) in placeholders {
        if text.contains_str(from) {
            text = text.replace(from, to).into();
        }
    }
    text
}

/// Any name: one that is empty or has an equals sign is as odd to the builder as it is with Nix.
fn variable(key: &BString, value: &BString) -> Result<CString, Error> {
    c_string(&format!("the environment variable {key}"), &[key.as_slice(), b"=", value].concat())
}

/// The kernel's strings end in NUL, and cannot hold one.
fn c_string(what: &str, bytes: &[u8]) -> Result<CString, Error> {
    CString::new(bytes).map_err(|_| Error::input(format!("{what} has a NUL byte in it")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::testing::derivation;

    const OUT: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-x";

    fn prepare_with(
        drv: &BasicDerivation,
        kind: DerivationType,
    ) -> Result<(BTreeMap<String, String>, Prepared), Error> {
        let attributes = Attributes::parse(drv)?;
        let outputs = [(OutputName::out(), OUT.parse().unwrap())].into();
        let prepared = prepare(&Inputs {
            dir: &StoreDir::default(),
            drv,
            attributes: &attributes,
            kind,
            outputs: &outputs,
            build_dir: "/build",
            cores: 3,
            impure: &|name| (name == "http_proxy").then(|| "proxy".into()),
            graphs: &Graphs::default(),
        })?;
        let env = prepared.command.env.iter().map(|entry| {
            let (key, value) = entry.to_str().unwrap().split_once('=').unwrap();
            (key.to_owned(), value.to_owned())
        });
        Ok((env.collect(), prepared))
    }

    #[test]
    fn what_the_derivation_may_override_and_what_not() {
        let drv =
            derivation(&[("PATH", "/p"), ("TMPDIR", "/t"), ("TERM", "dumb"), ("HOME", "/h"), ("x", "y")]);
        let (env, prepared) = prepare_with(&drv, DerivationType::InputAddressed).unwrap();
        let expected = [
            ("HOME", "/h"),
            ("NIX_BUILD_CORES", "3"),
            ("NIX_BUILD_TOP", "/build"),
            ("NIX_LOG_FD", "2"),
            ("NIX_STORE", "/nix/store"),
            ("PATH", "/p"),
            ("PWD", "/build"),
            ("TEMP", "/build"),
            ("TEMPDIR", "/build"),
            ("TERM", "xterm-256color"),
            ("TMP", "/build"),
            ("TMPDIR", "/build"),
            ("x", "y"),
        ];
        assert_eq!(env, expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        assert_eq!(prepared.command.program.as_c_str(), c"/bin/sh");
        assert_eq!(prepared.command.argv, [c"sh".to_owned(), c"-c".into(), c"true".into()]);
    }

    #[test]
    fn network_builds_get_impure_variables_and_a_mark() {
        let drv = derivation(&[("impureEnvVars", "http_proxy no_proxy")]);
        let (env, _) = prepare_with(&drv, DerivationType::CaFixed).unwrap();
        assert_eq!((env["http_proxy"].as_str(), env["no_proxy"].as_str()), ("proxy", ""));
        assert_eq!(env["NIX_OUTPUT_CHECKED"], "1");
        let (env, _) = prepare_with(&drv, DerivationType::InputAddressed).unwrap();
        assert!(!env.contains_key("http_proxy") && !env.contains_key("NIX_OUTPUT_CHECKED"));
    }

    #[test]
    fn pass_as_file() {
        let drv = derivation(&[("passAsFile", "text absent"), ("text", "T"), ("other", "o")]);
        let (env, prepared) = prepare_with(&drv, DerivationType::InputAddressed).unwrap();
        let name = format!(".attr-{}", Sha256::of(b"text").to_nix32());
        assert_eq!(env["textPath"], format!("/build/{name}"));
        assert_eq!(prepared.files[&name], b"T");
        assert!(!env.contains_key("text") && !env.contains_key("absentPath"));
        assert_eq!(env["passAsFile"], "text absent");
    }

    #[test]
    fn structured_attributes_hide_the_environment() {
        let drv = derivation(&[("__json", r#"{"a":1,"outputs":["out"]}"#), ("secret", "s")]);
        let (env, prepared) = prepare_with(&drv, DerivationType::InputAddressed).unwrap();
        assert!(!env.contains_key("secret") && !env.contains_key("__json"));
        assert_eq!(env["NIX_ATTRS_JSON_FILE"], "/build/.attrs.json");
        let json = String::from_utf8(prepared.files[".attrs.json"].clone()).unwrap();
        assert_eq!(json, format!(r#"{{"a":1,"outputs":{{"out":"/nix/store/{OUT}"}}}}"#));
        let shell = String::from_utf8(prepared.files[".attrs.sh"].clone()).unwrap();
        assert_eq!(shell, format!("declare a=1\ndeclare -A outputs=(['out']='/nix/store/{OUT}' )\n"));
    }

    #[test]
    fn placeholders_become_paths() {
        // Known from Nix: builtins.placeholder "out".
        let out = placeholder(&OutputName::out());
        assert_eq!(out, "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9");
        let mut drv = derivation(&[("p", &format!("a{out}b"))]);
        drv.args = vec![out.into()];
        let (env, prepared) = prepare_with(&drv, DerivationType::InputAddressed).unwrap();
        assert_eq!(env["p"], format!("a/nix/store/{OUT}b"));
        assert_eq!(prepared.command.argv[1].to_str().unwrap(), format!("/nix/store/{OUT}"));
    }

    #[test]
    fn what_the_kernel_cannot_pass_is_refused() {
        for (key, value) in [("a", "b\0c"), ("a\0", "c")] {
            let error =
                prepare_with(&derivation(&[(key, value)]), DerivationType::InputAddressed).unwrap_err();
            assert_eq!(error.status(), drover_serve::BuildStatus::InputRejected);
        }
    }
}
