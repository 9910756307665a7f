//! OCI image layouts as tar files, byte for byte the same for the same content: sorted entries, one fixed time, owner as given.
//!
//! The OCI image specification: `oci-layout`, `index.json` and `blobs/sha256/…`; the index entry's annotation names the image
//! for `ctr image import`. An image for several platforms is an index of its own among the blobs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};

use crate::platform::Platform;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

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

/// The image for one platform.
pub struct Content {
    pub platform: Platform,
    pub config: Config,
    pub layers: Vec<Layer>,
}

/// What was written for a platform: `sha256:…` of its manifest, and the size of config and layers, compressed.
#[derive(Debug, PartialEq, Eq)]
pub struct Written {
    pub digest: String,
    pub compressed: u64,
}

/// Writes the image as an OCI layout in the tar file `out`, under the name `reference`. Returns the digest that a registry
/// gives it, and what was written for each platform. For one platform that digest is its manifest's; for several it is that
/// of an index over their manifests.
pub fn write(out: &Path, reference: &str, contents: &[Content]) -> Result<(String, Vec<Written>)> {
    let mut blobs = Blobs::default();
    let (mut descriptors, mut written) = (Vec::new(), Vec::new());
    for content in contents {
        let (mut descriptor, one) = blobs.image(content)?;
        let architecture = content.platform.architecture();
        descriptor["platform"] = json!({ "architecture": architecture, "os": "linux" });
        descriptors.push(descriptor);
        written.push(one);
    }
    let mut named = match descriptors.as_slice() {
        [one] => one.clone(),
        all => blobs.put(INDEX, serde_json::to_vec(&index(all))?),
    };
    let digest = digest(&named)?;
    named["annotations"] = json!({ "io.containerd.image.name": reference });
    save(out, &index(&[named]), blobs.0)
        .with_context(|| format!("could not write the image {}", out.display()))?;
    Ok((digest, written))
}

/// By the hexadecimal digits of their SHA-256.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// The descriptor of a blob that is kept.
    fn put(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = sha256(&bytes);
        let descriptor =
            json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() });
        self.0.insert(digest, bytes);
        descriptor
    }

    /// The descriptor of a platform's manifest.
    fn image(&mut self, content: &Content) -> Result<(Value, Written)> {
        let Content { platform, config, layers } = content;
        let (mut diff_ids, mut descriptors) = (Vec::new(), Vec::new());
        for layer in layers {
            let tar = layer.tar()?;
            diff_ids.push(format!("sha256:{}", sha256(&tar)));
            descriptors.push(self.put("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&tar)?));
        }
        let image = json!({
            "architecture": platform.architecture(),
            "os": "linux",
            "created": "1970-01-01T00:00:01Z",
            "config": {
                "Entrypoint": config.entrypoint, "Cmd": config.cmd, "Env": config.env,
                "User": config.user, "Labels": config.labels,
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.put("application/vnd.oci.image.config.v1+json", serde_json::to_vec(&image)?);
        let size = |descriptor: &Value| descriptor["size"].as_u64().unwrap_or_default();
        let compressed = size(&config) + descriptors.iter().map(size).sum::<u64>();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": descriptors,
        });
        let descriptor = self.put(MANIFEST, serde_json::to_vec(&manifest)?);
        let digest = digest(&descriptor)?;
        Ok((descriptor, Written { digest, compressed }))
    }
}

fn index(manifests: &[Value]) -> Value {
    json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests })
}

fn digest(descriptor: &Value) -> Result<String> {
    Ok(descriptor["digest"].as_str().context("a descriptor has a digest")?.to_owned())
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

    fn content(platform: Platform, order: bool) -> Content {
        let config = Config { entrypoint: vec!["/bin/a".into()], ..Config::default() };
        Content { platform, config, layers: vec![sample(order)] }
    }

    /// By their names.
    fn files(layout: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(File::open(layout).unwrap()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            std::io::copy(&mut entry, &mut bytes).unwrap();
            files.insert(name, bytes);
        }
        files
    }

    /// What a descriptor stands for.
    fn blob(files: &BTreeMap<String, Vec<u8>>, descriptor: &Value) -> Vec<u8> {
        let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
        let bytes = &files[&format!("blobs/sha256/{digest}")];
        assert_eq!(sha256(bytes), digest);
        assert_eq!(descriptor["size"], bytes.len());
        bytes.clone()
    }

    fn json_blob(files: &BTreeMap<String, Vec<u8>>, descriptor: &Value) -> Value {
        serde_json::from_slice(&blob(files, descriptor)).unwrap()
    }

    #[test]
    fn the_same_content_is_the_same_bytes_whatever_the_order() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        let first = write(&one, "example/a:1", &[content(Platform::Amd64, true)]).unwrap();
        let second = write(&two, "example/a:1", &[content(Platform::Amd64, false)]).unwrap();
        assert_eq!(first, second);
        assert_eq!(std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
    }

    #[test]
    fn every_blob_is_named_by_its_digest_and_found_by_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("image.tar");
        let (digest, written) = write(&out, "example/a:1", &[content(Platform::Amd64, true)]).unwrap();
        assert_eq!(digest, written[0].digest);
        let files = files(&out);
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        assert_eq!(index["manifests"][0]["digest"], digest);
        let manifest = json_blob(&files, &index["manifests"][0]);
        let image = json_blob(&files, &manifest["config"]);
        let mut layer = Vec::new();
        let gzip = blob(&files, &manifest["layers"][0]);
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(gzip.as_slice()), &mut layer).unwrap();
        assert_eq!(image["rootfs"]["diff_ids"][0], format!("sha256:{}", sha256(&layer)));
        let sizes = [&manifest["config"], &manifest["layers"][0]].map(|one| one["size"].as_u64().unwrap());
        assert_eq!(written[0].compressed, sizes.iter().sum::<u64>());
    }

    #[test]
    fn several_platforms_are_one_name_and_each_has_the_digest_that_it_has_alone() {
        let dir = tempfile::tempdir().unwrap();
        let [both, alone] = ["both", "alone"].map(|name| dir.path().join(name));
        let contents = Platform::ALL.map(|platform| content(platform, true));
        let (digest, written) = write(&both, "example/a:1", &contents).unwrap();
        let files = files(&both);
        let layout: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let named = layout["manifests"].as_array().unwrap();
        assert_eq!(named.len(), 1);
        assert_eq!((&named[0]["digest"], &named[0]["mediaType"]), (&json!(digest), &json!(INDEX)));
        assert_eq!(named[0]["annotations"]["io.containerd.image.name"], "example/a:1");
        let index = json_blob(&files, &named[0]);
        for (at, platform) in Platform::ALL.into_iter().enumerate() {
            let descriptor = &index["manifests"][at];
            assert_eq!(descriptor["platform"]["architecture"], platform.architecture());
            let image = json_blob(&files, &json_blob(&files, descriptor)["config"]);
            assert_eq!(image["architecture"], platform.architecture());
            let (one, _) = write(&alone, "example/a:1", &[content(platform, true)]).unwrap();
            assert_eq!(one, written[at].digest);
            assert_eq!(descriptor["digest"], one);
        }
    }
}
