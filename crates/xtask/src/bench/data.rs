//! Generated store objects and derivations, the same in every run.
//!
//! Contents come from a generator with a fixed seed: no file compresses, and none is like another. Names are computed
//! as for content that someone else's store vouches for: real Nix believes them.

use anyhow::Result;
use drover_nix::derivation::modulo;
use drover_nix::{BasicDerivation, Derivation, DerivationOutput, Sha256, StoreDir, StorePath, nar};

use super::client::{put_string, put_u64};

/// Files in one directory.
const FILES_A_DIRECTORY: usize = 100;

/// How much there is of everything.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Paths of one large file, and the bytes in each.
    pub large: (usize, usize),
    /// Files of 0.1 to 8 KB in one path.
    pub files: usize,
    /// Paths of one small file.
    pub paths: usize,
    /// Paths to ask for, every other one valid.
    pub queried: usize,
    /// Trivial builds.
    pub builds: usize,
    /// Bytes of the one file whose import is watched for memory.
    pub memory: u64,
}

impl Default for Sizes {
    /// Those of the design's table.
    fn default() -> Self {
        Self {
            large: (4, 256 << 20),
            files: 40_000,
            paths: 3_000,
            queried: 100_000,
            builds: 200,
            memory: 4 << 30,
        }
    }
}

/// A store object: what the protocol says of it, and its archive.
pub struct Object {
    pub path: StorePath,
    /// An AddToStoreNar request up to the archive.
    pub request: Vec<u8>,
    pub nar: Vec<u8>,
}

/// Numbers that look random (xorshift64*, Vigna 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// Paths of one large file each.
pub fn large(sizes: &Sizes) -> Result<Vec<Object>> {
    (0..sizes.large.0).map(|i| file("large", i, &Random::new(i as u64 + 1).bytes(sizes.large.1))).collect()
}

/// One path with many small files.
pub fn files(sizes: &Sizes) -> Result<Vec<Object>> {
    let mut random = Random::new(77);
    let mut writer = nar::Writer::new(Vec::new());
    writer.directory()?;
    for directory in 0..sizes.files.div_ceil(FILES_A_DIRECTORY) {
        writer.entry(format!("directory-{directory:05}").as_bytes())?;
        writer.directory()?;
        for number in 0..FILES_A_DIRECTORY.min(sizes.files - directory * FILES_A_DIRECTORY) {
            writer.entry(format!("file-{number:05}").as_bytes())?;
            let size = small_size(&mut random);
            writer.file_bytes(random.number().is_multiple_of(8), &random.bytes(size))?;
        }
        writer.end_directory()?;
    }
    writer.end_directory()?;
    Ok(vec![object("files", 0, writer.finish()?)?])
}

/// Many paths of one small file each.
pub fn paths(sizes: &Sizes) -> Result<Vec<Object>> {
    let mut random = Random::new(78);
    (0..sizes.paths)
        .map(|i| {
            let size = small_size(&mut random);
            file("small", i, &random.bytes(size))
        })
        .collect()
}

/// Paths that nothing has, for queries.
pub fn names(count: usize) -> Result<Vec<StorePath>> {
    (0..count).map(|i| name(Sha256::of(&i.to_le_bytes()), "queried", i)).collect()
}

/// A trivial derivation and the name that its file would have.
pub fn derivation(number: usize) -> Result<(StorePath, BasicDerivation)> {
    let dir = StoreDir::default();
    let mut basic = BasicDerivation {
        name: format!("trivial-{number}"),
        outputs: [("out".parse()?, DerivationOutput::Deferred)].into(),
        input_srcs: [].into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-c".into(), format!("echo {number} > $out").into()],
        env: [("out".into(), "".into())].into(),
    };
    modulo::fill_output_paths(&dir, &mut basic)?;
    let drv = Derivation { basic, input_drvs: [].into() };
    Ok((modulo::drv_path(&dir, &drv)?, drv.basic))
}

/// An AddToStoreNar request up to the archive, which has this hash and size.
pub fn request(path: &StorePath, nar_hash: Sha256, nar_size: u64) -> Vec<u8> {
    let mut request = Vec::new();
    put_u64(&mut request, 9);
    put_string(&mut request, StoreDir::default().full(path).as_bytes());
    put_string(&mut request, b""); // no deriver
    put_string(&mut request, nar_hash.to_hex().as_bytes());
    // No references, registered now, the size, not built here, no signatures.
    [0, 0, nar_size, 0, 0].into_iter().for_each(|word| put_u64(&mut request, word));
    put_string(&mut request, b""); // no content address
    request
}

/// The name for an object with this hash.
pub fn name(hash: Sha256, kind: &str, number: usize) -> Result<StorePath> {
    Ok(StoreDir::default().make_path("source", hash, &format!("{kind}-{number}"))?)
}

fn file(kind: &str, number: usize, contents: &[u8]) -> Result<Object> {
    let mut writer = nar::Writer::new(Vec::with_capacity(contents.len() + 200));
    writer.file_bytes(false, contents)?;
    object(kind, number, writer.finish()?)
}

fn object(kind: &str, number: usize, nar: Vec<u8>) -> Result<Object> {
    let hash = Sha256::of(&nar);
    let path = name(hash, kind, number)?;
    Ok(Object { request: request(&path, hash, nar.len() as u64), path, nar })
}

/// 100 to 8,000 bytes.
fn small_size(random: &mut Random) -> usize {
    100 + (random.number() % 7_901) as usize
}
