//! A resolved derivation on the wire (Nix: derivation/aterm.cc, readDerivation and writeDerivation). Its name is not
//! part of it: it comes from the path that is sent before.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use drover_nix::{BasicDerivation, DerivationOutput, OutputName, StoreDir, StorePath};

use crate::Error;
use crate::wire::{self, WireWrite as _};

const WHAT: &str = "a derivation";

pub(crate) fn read(
    input: &mut impl Read,
    dir: &StoreDir,
    drv_path: &StorePath,
) -> Result<BasicDerivation, Error> {
    let name = drv_path
        .derivation_name()
        .ok_or_else(|| Error::invalid(WHAT, format!("its path, {drv_path}, does not end in .drv")))?
        .to_owned();
    let mut budget = Budget(wire::MAX_DERIVATION_LEN);
    let mut outputs = BTreeMap::new();
    for _ in 0..wire::read_count(input, wire::MAX_OUTPUTS, WHAT)? {
        let output = wire::read_string(input, wire::MAX_SHORT_LEN, WHAT)?;
        let output = OutputName::new(&output).map_err(Error::nix("an output name"))?;
        let path = wire::read_string(input, wire::MAX_PATH_LEN, WHAT)?;
        let algo = wire::read_string(input, wire::MAX_SHORT_LEN, WHAT)?;
        let hash = wire::read_string(input, wire::MAX_SHORT_LEN, WHAT)?;
        let parsed = DerivationOutput::from_triple(dir, &name, &output, &path, &algo, &hash)
            .map_err(Error::nix("an output of the derivation"))?;
        if outputs.insert(output.clone(), parsed).is_some() {
            return Err(Error::invalid(WHAT, format!("output {output} is there twice")));
        }
    }
    let input_srcs = wire::read_paths(input, dir)?;
    let system = wire::read_string(input, wire::MAX_SHORT_LEN, WHAT)?.into();
    let builder = budget.read(input)?.into();
    let args = (0..wire::read_count(input, wire::MAX_VALUES, WHAT)?)
        .map(|_| budget.read(input).map(Into::into))
        .collect::<Result<_, _>>()?;
    let mut env = BTreeMap::new();
    for _ in 0..wire::read_count(input, wire::MAX_VALUES, WHAT)? {
        let key = budget.read(input)?;
        env.insert(key.into(), budget.read(input)?.into());
    }
    Ok(BasicDerivation { name, outputs, input_srcs, system, builder, args, env })
}

pub(crate) fn write(
    output: &mut impl Write,
    dir: &StoreDir,
    derivation: &BasicDerivation,
) -> Result<(), Error> {
    output.put_u64(derivation.outputs.len() as u64)?;
    for (name, kind) in &derivation.outputs {
        let (path, algo, hash) =
            kind.to_triple(dir, &derivation.name, name).map_err(Error::nix("an output"))?;
        for field in [name.as_str(), &path, &algo, &hash] {
            output.put_string(field.as_bytes())?;
        }
    }
    output.put_paths(dir, &derivation.input_srcs)?;
    output.put_string(&derivation.system)?;
    output.put_string(&derivation.builder)?;
    output.put_u64(derivation.args.len() as u64)?;
    derivation.args.iter().try_for_each(|arg| output.put_string(arg))?;
    output.put_u64(derivation.env.len() as u64)?;
    derivation.env.iter().try_for_each(|(key, value)| {
        output.put_string(key)?;
        output.put_string(value)
    })
}

/// Bytes that the strings of one derivation may still have.
struct Budget(u64);

impl Budget {
    fn read(&mut self, input: &mut impl Read) -> Result<Vec<u8>, Error> {
        let bytes = wire::read_string(input, wire::MAX_VALUE_LEN.min(self.0), WHAT)?;
        // Empty strings cost something too: their number is a length from outside as well.
        self.0 = self.0.saturating_sub(bytes.len() as u64 + 8);
        Ok(bytes)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use drover_nix::{ContentAddress, Hash, HashAlgo, Method, Sha256};

    use super::*;

    pub(crate) fn hello(output: DerivationOutput) -> BasicDerivation {
        BasicDerivation {
            name: "hello".into(),
            outputs: [(OutputName::out(), output)].into(),
            input_srcs: ["q4mzjdlh5px6977h7v5fdsk1p33yg583-b".parse().unwrap()].into(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: vec!["-c".into(), b"echo \xff > $out".as_slice().into()],
            env: [("out".into(), "".into()), ("b".into(), "\n".into())].into(),
        }
    }

    fn drv_path() -> StorePath {
        "jwmbpldsdgfjhkxk317jn55jilyfl63f-hello.drv".parse().unwrap()
    }

    #[test]
    fn to_the_byte() {
        let u = |value: u64| value.to_le_bytes().to_vec();
        let s = |text: &[u8]| {
            let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
            bytes.extend(text);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let path = "i00sflxqsj37lfmf95m8mn0grv615hpj-hello";
        let derivation = hello(DerivationOutput::InputAddressed(path.parse().unwrap()));
        let mut bytes = Vec::new();
        write(&mut bytes, &StoreDir::default(), &derivation).unwrap();
        let golden = [
            u(1),
            s(b"out"),
            s(format!("/nix/store/{path}").as_bytes()),
            s(b""),
            s(b""),
            u(1),
            s(b"/nix/store/q4mzjdlh5px6977h7v5fdsk1p33yg583-b"),
            s(b"x86_64-linux"),
            s(b"/bin/sh"),
            u(2),
            s(b"-c"),
            s(b"echo \xff > $out"),
            u(2),
            s(b"b"),
            s(b"\n"),
            s(b"out"),
            s(b""),
        ]
        .concat();
        assert_eq!(bytes, golden);
        assert_eq!(read(&mut bytes.as_slice(), &StoreDir::default(), &drv_path()).unwrap(), derivation);
    }

    #[test]
    fn every_kind_of_output_comes_back() {
        let hash = Hash::from(Sha256::of(b""));
        for output in [
            DerivationOutput::CaFixed(ContentAddress { method: Method::Flat, hash: hash.clone() }),
            DerivationOutput::CaFixed(ContentAddress { method: Method::Nar, hash }),
            DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 },
            DerivationOutput::Impure { method: Method::Nar, algo: HashAlgo::Sha256 },
            DerivationOutput::Deferred,
        ] {
            let derivation = hello(output);
            let mut bytes = Vec::new();
            write(&mut bytes, &StoreDir::default(), &derivation).unwrap();
            let back = read(&mut bytes.as_slice(), &StoreDir::default(), &drv_path()).unwrap();
            assert_eq!(back, derivation);
        }
    }

    #[test]
    fn the_path_must_name_a_derivation() {
        let path = "jwmbpldsdgfjhkxk317jn55jilyfl63f-hello".parse().unwrap();
        assert!(read(&mut [].as_slice(), &StoreDir::default(), &path).is_err());
    }
}
