//! The text of a `.drv` file (Nix: derivation/aterm.cc).
//!
//! `Derive([outputs],[input drvs],[input srcs],"system","builder",[args],[env])`, without white space; lists and
//! tuples as they look, strings in double quotes. Bytes are raw: builder, args and env need not be UTF-8.

use std::collections::{BTreeMap, BTreeSet};

use bstr::{BString, ByteSlice as _};

use super::{DerivationOutput, OutputName};
use crate::{BasicDerivation, Derivation, Error, StoreDir, StorePath};

/// Most bytes that a `.drv` file may have.
pub const MAX_LEN: usize = 64 << 20;

/// Parses the text of a `.drv` file. `name` is the derivation's name, which the text does not have.
///
/// Lists may be in any order, as Nix allows; whoever needs the canonical text compares [`print`]'s with it.
pub fn parse(dir: &StoreDir, name: &str, text: &[u8]) -> Result<Derivation, Error> {
    if text.len() > MAX_LEN {
        let why = format!("its text has {} bytes; {MAX_LEN} are allowed", text.len());
        return Err(Error::Derivation { why });
    }
    let mut parser = Parser { dir, text, at: 0 };
    if parser.text.starts_with(b"DrvWithVersion(") {
        return Err(parser.fail("dynamic derivations (`DrvWithVersion`) are not supported"));
    }
    parser.expect("Derive(")?;
    let outputs = parser.outputs(name)?;
    parser.expect(",")?;
    let input_drvs = parser.input_drvs()?;
    parser.expect(",")?;
    let mut input_srcs = BTreeSet::new();
    parser.list(|parser| {
        input_srcs.insert(parser.path()?);
        Ok(())
    })?;
    parser.expect(",")?;
    let system = parser.string()?;
    parser.expect(",")?;
    let builder = parser.string()?;
    parser.expect(",")?;
    let mut args = Vec::new();
    parser.list(|parser| {
        args.push(parser.string()?);
        Ok(())
    })?;
    parser.expect(",")?;
    let mut env = BTreeMap::new();
    parser.list(|parser| {
        parser.expect("(")?;
        let key = parser.string()?;
        parser.expect(",")?;
        env.insert(key, parser.string()?);
        parser.expect(")")
    })?;
    parser.expect(")")?;
    if parser.at != text.len() {
        return Err(parser.fail("something follows the end"));
    }
    let basic = BasicDerivation { name: name.to_owned(), outputs, input_srcs, system, builder, args, env };
    Ok(Derivation { basic, input_drvs })
}

/// The canonical text.
pub fn print(dir: &StoreDir, drv: &Derivation) -> Result<Vec<u8>, Error> {
    let inputs = drv.input_drvs.iter().map(|(path, outputs)| (dir.full(path), outputs));
    print_with(dir, &drv.basic, inputs, false)
}

/// The canonical text with other names for the input derivations, which come sorted by them. `blank` leaves out the
/// outputs' paths and empties the env entries named like outputs. Both are for [`super::modulo`].
pub(super) fn print_with<'a>(
    dir: &StoreDir,
    drv: &BasicDerivation,
    inputs: impl IntoIterator<Item = (String, &'a BTreeSet<OutputName>)>,
    blank: bool,
) -> Result<Vec<u8>, Error> {
    if drv.system.find_byteset(b"\"\\\n\r\t").is_some() {
        // Nix prints it without escapes, so that the text would mean something else.
        let why = format!("its system {:?} has a quote, a backslash or a control character", drv.system);
        return Err(Error::Derivation { why });
    }
    let mut text = Vec::with_capacity(4096);
    text.extend_from_slice(b"Derive(");
    list(&mut text, &drv.outputs, |text, (name, output)| {
        let (path, algo, hash) = output.to_triple(dir, &drv.name, name)?;
        let path = if blank { "" } else { &path };
        text.extend_from_slice(format!("(\"{name}\",\"{path}\",\"{algo}\",\"{hash}\")").as_bytes());
        Ok(())
    })?;
    text.push(b',');
    list(&mut text, inputs, |text, (input, outputs)| {
        text.extend_from_slice(format!("(\"{input}\",").as_bytes());
        list(text, outputs, |text, output| {
            text.extend_from_slice(format!("\"{output}\"").as_bytes());
            Ok(())
        })?;
        text.push(b')');
        Ok(())
    })?;
    text.push(b',');
    list(&mut text, &drv.input_srcs, |text, path| {
        text.extend_from_slice(format!("\"{}\"", dir.full(path)).as_bytes());
        Ok(())
    })?;
    text.extend_from_slice(b",\"");
    text.extend_from_slice(&drv.system);
    text.extend_from_slice(b"\",");
    string(&mut text, &drv.builder);
    text.push(b',');
    list(&mut text, &drv.args, |text, arg| {
        string(text, arg);
        Ok(())
    })?;
    text.push(b',');
    list(&mut text, &drv.env, |text, (key, value)| {
        text.push(b'(');
        string(text, key);
        text.push(b',');
        let is_output = || key.to_str().is_ok_and(|key| drv.outputs.contains_key(key));
        string(text, if blank && is_output() { b"" } else { value });
        text.push(b')');
        Ok(())
    })?;
    text.push(b')');
    Ok(text)
}

fn list<T>(
    text: &mut Vec<u8>,
    items: impl IntoIterator<Item = T>,
    mut print: impl FnMut(&mut Vec<u8>, T) -> Result<(), Error>,
) -> Result<(), Error> {
    text.push(b'[');
    for (i, item) in items.into_iter().enumerate() {
        if i > 0 {
            text.push(b',');
        }
        print(text, item)?;
    }
    text.push(b']');
    Ok(())
}

fn string(text: &mut Vec<u8>, bytes: &[u8]) {
    text.push(b'"');
    let mut rest = bytes;
    while let Some(at) = rest.find_byteset(b"\"\\\n\r\t") {
        text.extend_from_slice(&rest[..at]);
        text.push(b'\\');
        text.push(match rest[at] {
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            other => other,
        });
        rest = &rest[at + 1..];
    }
    text.extend_from_slice(rest);
    text.push(b'"');
}

/// A position in the text. Nothing here recurses: the grammar nests to a fixed depth.
struct Parser<'a> {
    dir: &'a StoreDir,
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn outputs(&mut self, drv_name: &str) -> Result<BTreeMap<OutputName, DerivationOutput>, Error> {
        let mut outputs = BTreeMap::new();
        self.list(|parser| {
            parser.expect("(")?;
            let name = OutputName::new(&parser.string()?)?;
            parser.expect(",")?;
            let path = parser.string()?;
            parser.expect(",")?;
            let algo = parser.string()?;
            parser.expect(",")?;
            let hash = parser.string()?;
            parser.expect(")")?;
            let output = DerivationOutput::from_triple(parser.dir, drv_name, &name, &path, &algo, &hash)?;
            match outputs.insert(name, output) {
                None => Ok(()),
                Some(_) => Err(parser.fail("an output is there twice")),
            }
        })?;
        Ok(outputs)
    }

    fn input_drvs(&mut self) -> Result<BTreeMap<StorePath, BTreeSet<OutputName>>, Error> {
        let mut inputs = BTreeMap::new();
        self.list(|parser| {
            parser.expect("(")?;
            let path = parser.path()?;
            if !path.is_derivation() {
                return Err(parser.fail("an input derivation's path does not end in `.drv`"));
            }
            parser.expect(",")?;
            let mut outputs = BTreeSet::new();
            parser.list(|parser| {
                outputs.insert(OutputName::new(&parser.string()?)?);
                Ok(())
            })?;
            parser.expect(")")?;
            if outputs.is_empty() {
                return Err(parser.fail("an input derivation comes without outputs"));
            }
            match inputs.insert(path, outputs) {
                None => Ok(()),
                Some(_) => Err(parser.fail("an input derivation is there twice")),
            }
        })?;
        Ok(inputs)
    }

    fn path(&mut self) -> Result<StorePath, Error> {
        let text = self.string()?;
        self.dir.parse(&text)
    }

    fn list(&mut self, mut item: impl FnMut(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        self.expect("[")?;
        if self.skip(b']') {
            return Ok(());
        }
        loop {
            item(self)?;
            if self.skip(b']') {
                return Ok(());
            }
            self.expect(",")?;
        }
    }

    fn string(&mut self) -> Result<BString, Error> {
        self.expect("\"")?;
        let mut string = BString::default();
        loop {
            let rest = &self.text[self.at..];
            let run = rest.find_byteset(b"\"\\").ok_or_else(|| self.fail("a string does not end"))?;
            string.extend_from_slice(&rest[..run]);
            self.at += run + 1;
            if rest[run] == b'"' {
                return Ok(string);
            }
            let escaped = rest.get(run + 1).ok_or_else(|| self.fail("a string does not end"))?;
            self.at += 1;
            string.push(match escaped {
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                other => *other,
            });
        }
    }

    fn expect(&mut self, token: &str) -> Result<(), Error> {
        if !self.text[self.at..].starts_with(token.as_bytes()) {
            return Err(self.fail(&format!("expected `{token}`")));
        }
        self.at += token.len();
        Ok(())
    }

    fn skip(&mut self, token: u8) -> bool {
        let found = self.text.get(self.at) == Some(&token);
        self.at += usize::from(found);
        found
    }

    fn fail(&self, why: &str) -> Error {
        Error::Derivation { why: format!("{why} at byte {} of its text", self.at) }
    }
}
