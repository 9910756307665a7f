//! Both ends of a session in memory: a store that says yes to everything, and a peer whose answers are given bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};

use drover_nix::{BasicDerivation, OutputName, PathInfo, Sha256, StoreDir, StorePath, nar};
use drover_serve::{
    Backend, BoxError, BuildOptions, BuildResult, BuildStatus, BuildTarget, BuiltOutput, ReceivedPath,
};

/// What the client says first (Nix: serve-protocol.hh), for a version's minor number.
pub(crate) fn client_hello(minor: u8) -> Vec<u8> {
    [0x390c_9debu64, 0x200 + u64::from(minor)].map(u64::to_le_bytes).concat()
}

/// What the server says first.
pub(crate) fn server_hello(minor: u8) -> Vec<u8> {
    [0x5452_eecbu64, 0x200 + u64::from(minor)].map(u64::to_le_bytes).concat()
}

/// A store in which every path is valid, so that a session gets as far as its bytes make sense, and a record of what was
/// asked of it.
#[derive(Default)]
pub(crate) struct Yes {
    pub(crate) calls: Vec<Call>,
    pub(crate) added: BTreeMap<StorePath, (PathInfo, Vec<u8>)>,
    /// What BuildDerivation answers; success with every known output if there is none.
    pub(crate) result: Option<BuildResult>,
}

/// What was asked, as far as it matters to compare two sessions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    QueryValidPaths(BTreeSet<StorePath>, bool, bool),
    PathInfo(StorePath),
    Dump(StorePath),
    AddNar(Box<ReceivedPath>),
    Build(StorePath, Box<BasicDerivation>, BuildOptions),
    BuildPaths(Vec<BuildTarget>, BuildOptions),
    QueryClosure(BTreeSet<StorePath>, bool),
}

impl Yes {
    fn object(path: &StorePath) -> (PathInfo, Vec<u8>) {
        let nar = file_nar(path.as_str().as_bytes());
        let info = PathInfo {
            path: path.clone(),
            nar_hash: Sha256::of(&nar),
            nar_size: nar.len() as u64,
            references: [path.clone()].into(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        (info, nar)
    }
}

impl Backend for Yes {
    fn query_valid_paths(
        &mut self,
        paths: &BTreeSet<StorePath>,
        lock: bool,
        substitute: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        self.calls.push(Call::QueryValidPaths(paths.clone(), lock, substitute));
        Ok(paths.clone())
    }

    fn path_info(&mut self, path: &StorePath) -> Result<Option<PathInfo>, BoxError> {
        self.calls.push(Call::PathInfo(path.clone()));
        Ok(Some(self.added.get(path).map_or_else(|| Self::object(path).0, |(info, _)| info.clone())))
    }

    fn dump(&mut self, path: &StorePath, output: &mut dyn Write) -> Result<(), BoxError> {
        self.calls.push(Call::Dump(path.clone()));
        match self.added.get(path) {
            Some((_, nar)) => Ok(output.write_all(nar)?),
            None => Ok(output.write_all(&Self::object(path).1)?),
        }
    }

    fn add_nar(&mut self, path: ReceivedPath, input: &mut dyn Read) -> Result<(), BoxError> {
        self.calls.push(Call::AddNar(Box::new(path.clone())));
        // As a real store does it: only what the grammar allows, and not a byte beyond.
        let mut nar = Vec::new();
        nar::copy(&mut *input, &mut nar)?;
        self.added.insert(path.info.path.clone(), (path.info, nar));
        Ok(())
    }

    fn build_derivation(
        &mut self,
        drv_path: &StorePath,
        derivation: &BasicDerivation,
        options: &BuildOptions,
    ) -> Result<BuildResult, BoxError> {
        self.calls.push(Call::Build(drv_path.clone(), Box::new(derivation.clone()), options.clone()));
        if let Some(result) = &self.result {
            return Ok(result.clone());
        }
        let mut result = BuildResult::new(BuildStatus::Built);
        for (name, path) in derivation.output_paths(&StoreDir::default())? {
            if let Some(path) = path {
                result.built_outputs.insert(name, BuiltOutput { path, signatures: Vec::new() });
            }
        }
        Ok(result)
    }

    fn query_closure(
        &mut self,
        paths: &BTreeSet<StorePath>,
        include_outputs: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        self.calls.push(Call::QueryClosure(paths.clone(), include_outputs));
        Ok(paths.clone())
    }

    fn build_paths(
        &mut self,
        targets: &[BuildTarget],
        options: &BuildOptions,
    ) -> Result<Result<(), (BuildStatus, String)>, BoxError> {
        self.calls.push(Call::BuildPaths(targets.to_vec(), options.clone()));
        Ok(if targets.len().is_multiple_of(2) { Ok(()) } else { Err((BuildStatus::TimedOut, "slow".into())) })
    }

    fn spool(&mut self) -> Result<std::fs::File, BoxError> {
        Ok(tempfile::tempfile()?)
    }
}

/// The NAR of a regular file.
pub(crate) fn file_nar(contents: &[u8]) -> Vec<u8> {
    let mut writer = nar::Writer::new(Vec::new());
    // Writing to memory does not fail, and one file is a complete archive.
    writer.file_bytes(false, contents).and_then(|()| writer.finish()).unwrap_or_else(|_| unreachable!())
}

/// A derivation of one input-addressed output.
pub(crate) fn derivation(name: &str, out: &StorePath) -> BasicDerivation {
    BasicDerivation {
        name: name.to_owned(),
        outputs: [(OutputName::out(), drover_nix::DerivationOutput::InputAddressed(out.clone()))].into(),
        input_srcs: [out.clone()].into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-c".into(), "echo > $out".into()],
        env: [("out".into(), "".into()), ("__json".into(), "{\"a\":[1]}".into())].into(),
    }
}

/// A stream that gives `step` bytes at a time: where reads end must not matter.
pub(crate) struct Steps<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) step: usize,
}

impl Read for Steps<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.step.min(buffer.len()).min(self.bytes.len());
        buffer[..count].copy_from_slice(&self.bytes[..count]);
        self.bytes = &self.bytes[count..];
        Ok(count)
    }
}

/// Every full store path in the text, as far as it is one.
pub(crate) fn paths_in(data: &[u8]) -> BTreeSet<StorePath> {
    const DIR: &[u8] = b"/nix/store/";
    /// So many are enough to ask for.
    const MOST: usize = 64;
    let mut paths = BTreeSet::new();
    for at in bstr::ByteSlice::find_iter(data, DIR).take(MOST) {
        let base = &data[at + DIR.len()..];
        // In a padded string, what follows is a NUL; in one that ends at a multiple of 8, the next one's length.
        let len = base.iter().position(|b| !b.is_ascii_graphic() || *b == b'"' || *b == b'!');
        if let Ok(path) = StorePath::from_base_name(&base[..len.unwrap_or(base.len())]) {
            paths.insert(path);
        }
    }
    paths
}
