//! OCI image layouts as tar files, byte for byte the same for the same content: sorted entries, one fixed time, owner as given.
//!
//! The OCI image specification: `oci-layout`, `index.json` and `blobs/sha256/…`; the index entry's annotation names the image
//! for `ctr image import`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};

/// Modification time of everything in a layer, in seconds: one second after the epoch, as in the Nix store.
const MTIME: u64 = 1;

/// One layer: paths without a leading slash, and what lies there. Parents must be named too.
#[derive(Default)]
pub struct Layer {
    entries: BTreeMap<String, Entry>,
}

enum Entry {
    Directory { mode: u32, owner: u64 },
    File { mode: u32, bytes: Vec<u8> },
    Symlink { target: String },
}

impl Layer {
    /// A directory of root's.
    pub fn directory(self, path: &str, mode: u32) -> Self {
        self.owned_directory(path, mode, 0)
    }

    /// A directory of this user and group.
    pub fn owned_directory(mut self, path: &str, mode: u32, owner: u64) -> Self {
        self.entries.insert(path.to_owned(), Entry::Directory { mode, owner });
        self
    }

    /// A file with this content, root's.
    pub fn bytes(mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) -> Self {
        self.entries.insert(path.to_owned(), Entry::File { mode, bytes: bytes.into() });
        self
    }

    /// A copy of the file `from`, root's.
    pub fn file(self, path: &str, mode: u32, from: &Path) -> Result<Self> {
        let bytes = std::fs::read(from).with_context(|| format!("could not read {}", from.display()))?;
        Ok(self.bytes(path, mode, bytes))
    }

    /// A symbolic link.
    pub fn symlink(mut self, path: &str, target: &str) -> Self {
        self.entries.insert(path.to_owned(), Entry::Symlink { target: target.to_owned() });
        self
    }

    /// The uncompressed tar.
    fn tar(&self) -> Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, entry) in &self.entries {
            let mut header = tar::Header::new_ustar();
            header.set_mtime(MTIME);
            header.set_uid(0);
            header.set_gid(0);
            header.set_size(0);
            match entry {
                Entry::Directory { mode, owner } => {
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_mode(*mode);
                    header.set_uid(*owner);
                    header.set_gid(*owner);
                    tar.append_data(&mut header, format!("{path}/"), std::io::empty())?;
                }
                Entry::File { mode, bytes } => {
                    header.set_entry_type(tar::EntryType::Regular);
                    header.set_mode(*mode);
                    header.set_size(bytes.len() as u64);
                    tar.append_data(&mut header, path, bytes.as_slice())?;
                }
                Entry::Symlink { target } => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_mode(0o777);
                    tar.append_link(&mut header, path, target)?;
                }
            }
        }
        Ok(tar.into_inner()?)
    }
}

/// What a container of the image runs, unless the pod says otherwise: the `config` of the OCI image configuration.
#[derive(Default)]
pub struct Config {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub user: String,
    pub labels: BTreeMap<String, String>,
}

/// What was written: `sha256:…` of the manifest, which is the image's digest, and the size of config and layers, compressed.
#[derive(Debug, PartialEq, Eq)]
pub struct Written {
    pub digest: String,
    pub compressed: u64,
}

/// Writes the image as an OCI layout in the tar file `out`, under the name `reference`.
pub fn write(out: &Path, reference: &str, config: &Config, layers: &[Layer]) -> Result<Written> {
    let mut blobs = BTreeMap::new();
    let mut put = |media_type: &str, bytes: Vec<u8>| {
        let digest = sha256(&bytes);
        let descriptor =
            json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() });
        blobs.insert(digest, bytes);
        descriptor
    };

    let mut diff_ids = Vec::new();
    let mut descriptors = Vec::new();
    for layer in layers {
        let tar = layer.tar()?;
        diff_ids.push(format!("sha256:{}", sha256(&tar)));
        descriptors.push(put("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&tar)?));
    }
    let image = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:01Z",
        "config": {
            "Entrypoint": config.entrypoint, "Cmd": config.cmd, "Env": config.env,
            "User": config.user, "Labels": config.labels,
        },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put("application/vnd.oci.image.config.v1+json", serde_json::to_vec(&image)?),
        "layers": descriptors,
    });
    let mut descriptor = put("application/vnd.oci.image.manifest.v1+json", serde_json::to_vec(&manifest)?);
    let digest = descriptor["digest"].as_str().context("a descriptor has a digest")?.to_owned();
    let manifest_size = descriptor["size"].as_u64().unwrap_or_default();
    descriptor["annotations"] = json!({ "io.containerd.image.name": reference });
    descriptor["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    let compressed = blobs.values().map(|blob| blob.len() as u64).sum::<u64>() - manifest_size;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [descriptor],
    });
    save(out, &index, blobs).with_context(|| format!("could not write the image {}", out.display()))?;
    Ok(Written { digest, compressed })
}

fn save(out: &Path, index: &Value, blobs: BTreeMap<String, Vec<u8>>) -> Result<()> {
    let mut layout = Layer::default()
        .bytes("oci-layout", 0o644, r#"{"imageLayoutVersion":"1.0.0"}"#)
        .bytes("index.json", 0o644, serde_json::to_vec(index)?)
        .directory("blobs", 0o755)
        .directory("blobs/sha256", 0o755);
    for (digest, blob) in blobs {
        layout = layout.bytes(&format!("blobs/sha256/{digest}"), 0o644, blob);
    }
    let mut file = BufWriter::new(File::create(out)?);
    file.write_all(&layout.tar()?)?;
    Ok(file.flush()?)
}

/// Gzip without a file name and without a time.
fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    gzip.write_all(bytes)?;
    Ok(gzip.finish()?)
}

fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(order: bool) -> Layer {
        let layer = Layer::default().directory("bin", 0o755);
        if order {
            layer.bytes("bin/a", 0o755, "a").symlink("bin/b", "a")
        } else {
            layer.symlink("bin/b", "a").bytes("bin/a", 0o755, "a")
        }
    }

    #[test]
    fn the_same_content_is_the_same_bytes_whatever_the_order() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { entrypoint: vec!["/bin/a".into()], ..Config::default() };
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        let first = write(&one, "example/a:1", &config, &[sample(true)]).unwrap();
        let second = write(&two, "example/a:1", &config, &[sample(false)]).unwrap();
        assert_eq!(first, second);
        assert_eq!(std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
    }

    #[test]
    fn every_blob_is_named_by_its_digest_and_found_by_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("image.tar");
        let written = write(&out, "example/a:1", &Config::default(), &[sample(true)]).unwrap();
        let mut blobs = BTreeMap::new();
        for entry in tar::Archive::new(File::open(&out).unwrap()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            std::io::copy(&mut entry, &mut bytes).unwrap();
            blobs.insert(name, bytes);
        }
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let bytes = &blobs[&format!("blobs/sha256/{digest}")];
            assert_eq!(sha256(bytes), digest);
            assert_eq!(descriptor["size"], bytes.len());
            bytes.clone()
        };
        let index: Value = serde_json::from_slice(&blobs["index.json"]).unwrap();
        assert_eq!(index["manifests"][0]["digest"], written.digest);
        let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).unwrap();
        let image: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
        let mut layer = Vec::new();
        let gzip = blob(&manifest["layers"][0]);
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(gzip.as_slice()), &mut layer).unwrap();
        assert_eq!(image["rootfs"]["diff_ids"][0], format!("sha256:{}", sha256(&layer)));
    }
}
