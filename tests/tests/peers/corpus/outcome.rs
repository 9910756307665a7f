//! What became of a case, in one implementation, and how two outcomes differ. Touches no store but to look.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::Result;
use drover_nix::hash_modulo::{HashModulo, ModuloHashes};
use drover_nix::{OutputName, PathInfo};
use drover_serve::BuildStatus;
use drover_store::LocalStore;

/// Largest file that is kept for messages.
const MAX_TEXT: u64 = 1 << 16;
/// Most lines of one that are shown.
const SHOWN_LINES: usize = 10;

/// By the name of the case.
pub(super) type Outcomes = BTreeMap<String, Outcome>;

/// How one build ended, and all that can be seen of what it left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Outcome {
    pub(super) status: BuildStatus,
    pub(super) message: String,
    pub(super) outputs: BTreeMap<OutputName, Output>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Output {
    /// As the serve protocol tells it: path, hash and size of the archive, references, content address, deriver.
    pub(super) info: PathInfo,
    /// What no archive has: one line a file.
    pub(super) files: Vec<String>,
    /// The contents, where the output is one small file, for messages.
    text: Vec<u8>,
    /// Both hashes of content that refers to itself, where its path is made of one of them.
    pub(super) modulo: Option<ModuloHashes>,
}

impl Outcome {
    /// Its status with what was said.
    pub(super) fn ended(&self) -> String {
        format!("{:?} ({})", self.status, self.message)
    }

    /// That Nix itself does not end as the case says.
    pub(super) fn unexpected(&self, expected: BuildStatus) -> Vec<String> {
        let differs = self.status != expected;
        differs
            .then(|| format!("the case expects {expected:?}, Nix ends with {}", self.ended()))
            .into_iter()
            .collect()
    }

    /// In what way `self`, which is Nix's, is not like `ours`.
    pub(super) fn differences(&self, ours: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if self.status != ours.status {
            found.push(format!("{}, ours {}", self.ended(), ours.ended()));
        }
        if !self.outputs.keys().eq(ours.outputs.keys()) {
            let names = |outputs: &BTreeMap<OutputName, Output>| {
                outputs.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ")
            };
            found.push(format!("outputs [{}], ours [{}]", names(&self.outputs), names(&ours.outputs)));
        }
        for (name, theirs) in &self.outputs {
            let Some(ours) = ours.outputs.get(name) else { continue };
            let mut field = |what: &str, theirs: String, ours: String| {
                if theirs != ours {
                    found.push(format!("{name}: {what} {theirs}, ours {ours}"));
                }
            };
            let (a, b) = (&theirs.info, &ours.info);
            field("path", a.path.to_string(), b.path.to_string());
            field("NAR hash", a.nar_hash.to_string(), b.nar_hash.to_string());
            field("NAR size", a.nar_size.to_string(), b.nar_size.to_string());
            field("references", format!("{:?}", a.references), format!("{:?}", b.references));
            field("ca", format!("{:?}", a.ca), format!("{:?}", b.ca));
            field("deriver", format!("{:?}", a.deriver), format!("{:?}", b.deriver));
            field("signatures", format!("{:?}", a.signatures), format!("{:?}", b.signatures));
            let differing = theirs.files.iter().zip(&ours.files).find(|(a, b)| a != b);
            if let Some((a, b)) = differing {
                field("file", a.clone(), b.clone());
            }
            let lines = |text: &[u8]| -> Vec<String> {
                text.split(|byte| b"\n\0".contains(byte))
                    .map(|line| line.escape_ascii().to_string())
                    .collect()
            };
            let (theirs_text, ours_text) = (lines(&theirs.text), lines(&ours.text));
            for (a, b) in theirs_text.iter().zip(&ours_text).filter(|(a, b)| a != b).take(SHOWN_LINES) {
                field("line", a.clone(), b.clone());
            }
            field("lines", theirs_text.len().to_string(), ours_text.len().to_string());
            field("files", theirs.files.len().to_string(), ours.files.len().to_string());
        }
        found
    }
}

impl Output {
    /// The contents, where the output is one small file.
    pub(super) fn text(&self) -> &[u8] {
        &self.text
    }

    /// Looks at the object `info` in a store.
    pub(super) fn look(info: PathInfo, store: &LocalStore) -> Result<Self> {
        let place = store.real_path(&info.path);
        let metadata = std::fs::symlink_metadata(&place)?;
        let text = match metadata.is_file() && metadata.len() <= MAX_TEXT {
            true => std::fs::read(&place)?,
            false => Vec::new(),
        };
        let modulo = match &info.ca {
            Some(ca) if info.references.contains(&info.path) => {
                let mut hashes = HashModulo::new(&info.path, ca.hash.algo);
                store.dump(&info.path, &mut hashes)?;
                Some(hashes.finish())
            }
            _ => None,
        };
        // Whoever owns the store owns all that is in it.
        let owner = std::fs::metadata(&store.layout().real_store_dir)?;
        let mut files = Vec::new();
        look(&place, &place, owner.uid(), &mut files)?;
        Ok(Self { info, files, text, modulo })
    }
}

/// Kind, mode, owner, times and links of everything below `path`, sorted by name.
fn look(top: &Path, path: &Path, owner: u32, lines: &mut Vec<String>) -> Result<()> {
    let metadata = std::fs::symlink_metadata(path)?;
    let name = path.strip_prefix(top).unwrap_or(path).as_os_str().as_bytes().escape_ascii().to_string();
    // How many names a directory has is up to the file system.
    let links = if metadata.is_dir() { 0 } else { metadata.nlink() };
    let owner_is =
        if metadata.uid() == owner { "the store's".to_owned() } else { metadata.uid().to_string() };
    lines.push(format!(
        "{name} mode {:o} owner {owner_is} time {}.{} links {links}",
        metadata.mode(),
        metadata.mtime(),
        metadata.mtime_nsec()
    ));
    if metadata.is_dir() {
        let mut entries: Vec<_> = std::fs::read_dir(path)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(|entry| entry.file_name());
        for entry in entries {
            look(top, &entry.path(), owner, lines)?;
        }
    }
    Ok(())
}
