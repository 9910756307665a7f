//! Requests as bytes, put together by hand: a hostile client does not use our encoder, which refuses to write nonsense.

use drover_nix::{Sha256, StoreDir, StorePath};

pub(super) const MAGIC: u64 = 0x390c_9deb;
pub(super) const EXPORT_MAGIC: u64 = 0x4558_494e;

pub(super) fn u(value: u64) -> Vec<u8> {
    value.to_le_bytes().into()
}

/// A padded string.
pub(super) fn s(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    let mut bytes = [&u(text.len() as u64)[..], text].concat();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// A list of strings.
pub(super) fn l<T: AsRef<[u8]>>(items: &[T]) -> Vec<u8> {
    items.iter().fold(u(items.len() as u64), |list, item| [list, s(item)].concat())
}

/// What a client of protocol 2.7 says first.
pub(super) fn hello() -> Vec<u8> {
    [u(MAGIC), u(0x207)].concat()
}

/// A session's bytes: the greeting and these requests.
pub(super) fn session(requests: &[Vec<u8>]) -> Vec<u8> {
    [hello(), requests.concat()].concat()
}

/// A path that nothing proves, as most of those in a store are.
pub(super) fn path(name: &str) -> StorePath {
    let hash = Sha256::of(name.as_bytes());
    StoreDir::default().make_path("output:out", hash, name).expect("the name is valid")
}

pub(super) fn full(path: &StorePath) -> String {
    StoreDir::default().full(path)
}

/// The NAR of a regular file, by hand.
pub(super) fn file_nar(contents: &[u8]) -> Vec<u8> {
    [s("nix-archive-1"), file(contents)].concat()
}

/// A regular file inside an archive.
pub(super) fn file(contents: &[u8]) -> Vec<u8> {
    [s("("), s("type"), s("regular"), s("contents"), s(contents), s(")")].concat()
}

pub(super) fn symlink(target: impl AsRef<[u8]>) -> Vec<u8> {
    [s("("), s("type"), s("symlink"), s("target"), s(target), s(")")].concat()
}

pub(super) fn directory(entries: &[(&[u8], Vec<u8>)]) -> Vec<u8> {
    let entries = entries.iter().map(|(name, node)| {
        [s("entry"), s("("), s("name"), s(name), s("node"), node.clone(), s(")")].concat()
    });
    [s("("), s("type"), s("directory"), entries.collect::<Vec<_>>().concat(), s(")")].concat()
}

/// AddToStoreNar, field by field.
#[derive(Clone)]
pub(super) struct Add {
    pub(super) path: Vec<u8>,
    pub(super) deriver: Vec<u8>,
    pub(super) hash: Vec<u8>,
    pub(super) references: Vec<Vec<u8>>,
    pub(super) time: u64,
    pub(super) nar_size: u64,
    pub(super) signatures: Vec<Vec<u8>>,
    pub(super) ca: Vec<u8>,
    pub(super) nar: Vec<u8>,
}

impl Add {
    /// All of it true.
    pub(super) fn new(path: &StorePath, nar: Vec<u8>) -> Self {
        Self {
            path: full(path).into(),
            deriver: Vec::new(),
            hash: Sha256::of(&nar).to_hex().into(),
            references: Vec::new(),
            time: 0,
            nar_size: nar.len() as u64,
            signatures: Vec::new(),
            ca: Vec::new(),
            nar,
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        [
            u(9),
            s(&self.path),
            s(&self.deriver),
            s(&self.hash),
            l(&self.references),
            u(self.time),
            u(self.nar_size),
            u(0),
            l(&self.signatures),
            s(&self.ca),
            self.nar.clone(),
        ]
        .concat()
    }
}

/// BuildDerivation of one input-addressed output, field by field.
#[derive(Clone)]
pub(super) struct Build {
    pub(super) drv: Vec<u8>,
    /// Name, path, hash algorithm and hash of each.
    pub(super) outputs: Vec<[Vec<u8>; 4]>,
    pub(super) inputs: Vec<Vec<u8>>,
    pub(super) system: Vec<u8>,
    pub(super) builder: Vec<u8>,
    pub(super) args: Vec<Vec<u8>>,
    pub(super) env: Vec<[Vec<u8>; 2]>,
    /// As protocol 2.7 has them.
    pub(super) options: [u64; 6],
}

impl Build {
    /// A script that makes one path.
    pub(super) fn new(name: &str, script: &str) -> Self {
        let out = full(&path(name));
        Self {
            drv: full(&path(&format!("{name}.drv"))).into(),
            outputs: vec![["out".into(), out.clone().into(), "".into(), "".into()]],
            inputs: Vec::new(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: vec![["out".into(), out.into()]],
            options: [0; 6],
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let outputs = self.outputs.iter().flatten().map(s).collect::<Vec<_>>().concat();
        let env = self.env.iter().flatten().map(s).collect::<Vec<_>>().concat();
        [
            u(8),
            s(&self.drv),
            u(self.outputs.len() as u64),
            outputs,
            l(&self.inputs),
            s(&self.system),
            s(&self.builder),
            l(&self.args),
            u(self.env.len() as u64),
            env,
            self.options.map(u).concat(),
        ]
        .concat()
    }
}

/// An export stream of these paths, each with an archive and references.
pub(super) fn export_stream(records: &[(&StorePath, Vec<u8>, Vec<String>)]) -> Vec<u8> {
    let records = records.iter().map(|(path, nar, references)| {
        [u(1), nar.clone(), u(EXPORT_MAGIC), s(full(path)), l(references), s(""), u(0)].concat()
    });
    [records.collect::<Vec<_>>().concat(), u(0)].concat()
}
