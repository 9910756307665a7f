//! The OCI images: what is in each, and the writer that needs neither Docker nor a registry.
//!
//! `drover-builder` is one static program and a static shell for the sandbox. `drover-operator` is one static program and
//! the OpenSSH client with its libraries. The same sources and the same Debian packages give the same digest, wherever the
//! checkout lies. For several platforms an image is one name with a part for each.

mod crates;
pub mod oci;
mod operator;
mod programs;
pub mod sbom;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use oci::{Config, Content, Layer, Written};

use crate::parts::rootfs;
use crate::platform::Platform;

/// The name of the image that [`busybox`] makes for pods of tests.
pub const BUSYBOX: &str = "drover.test/busybox:1";

/// The name of the builder's image. `drover.build` is a registry that nothing is ever pulled from: images are loaded.
pub const BUILDER: &str = concat!("drover.build/drover-builder:", env!("CARGO_PKG_VERSION"));

/// The name of the operator's image.
pub const OPERATOR: &str = concat!("drover.build/drover-operator:", env!("CARGO_PKG_VERSION"));

/// Of the builder for each platform, compressed, in bytes: it is pulled for every builder that starts on a new node.
pub const BUILDER_LIMIT: u64 = 15 << 20;

/// An image that was made.
pub struct Image {
    /// An OCI layout in a tar file, which `ctr image import` and [`crate::cluster::Cluster::load`] take.
    pub file: PathBuf,
    /// The name under which it is loaded.
    pub reference: &'static str,
    /// `sha256:…`, as a registry names it: of the manifest, or of the index of several.
    pub digest: String,
    /// In the order in which platforms were asked for.
    pub parts: Vec<Part>,
}

/// The image for one platform.
pub struct Part {
    pub platform: Platform,
    pub written: Written,
    /// A copy of what lies in it under [`sbom::PATH`].
    pub sbom: PathBuf,
}

/// Compiles the programs and makes both images for these platforms in the directory `out`: the builder's, then the
/// operator's.
pub fn make(out: &Path, platforms: &[Platform]) -> Result<[Image; 2]> {
    fs::create_dir_all(out).with_context(|| format!("could not make {}", out.display()))?;
    let (mut builders, mut operators) = (Vec::new(), Vec::new());
    for (at, &platform) in platforms.iter().enumerate() {
        ensure!(!platforms[..at].contains(&platform), "{platform} is asked for twice");
        let (programs, debian) = (programs::compile(platform)?, rootfs::ssh(platform)?);
        let crates = crates::of(&programs::NAMES, platform)?;
        let described = |name: &str, (config, layer): (Config, Layer), packages: &[String]| {
            let program = crates.id(name)?;
            let sbom = sbom::document(name, platform, &program, &crates, &sbom::debian(&debian, packages)?)?;
            let sbom = serde_json::to_vec_pretty(&sbom)?;
            let beside = match platforms {
                [_] => out.join(format!("{name}.spdx.json")),
                _ => out.join(format!("{name}-{}.spdx.json", platform.architecture())),
            };
            fs::write(&beside, &sbom).with_context(|| format!("could not write {}", beside.display()))?;
            let licences = crates.licences(&crates.closure(&program))?;
            let layer = layer.bytes(sbom::PATH, 0o644, sbom).bytes("licenses/crates", 0o644, licences);
            anyhow::Ok((Content { platform, config, layers: vec![layer] }, beside))
        };
        // libc6 is among its notices for what is linked statically, which the list has as glibc.
        let packages = ["busybox-static", "ca-certificates"].map(str::to_owned);
        builders.push(described("drover-builder", builder(&programs, &debian)?, &packages)?);
        let image = operator::image(platform, &programs, &debian)?;
        operators.push(described("drover-operator", image, &operator::notices(&debian)?)?);
    }
    let builder = write(out, "drover-builder", BUILDER, builders)?;
    for Part { platform, written, .. } in &builder.parts {
        let size = written.compressed;
        ensure!(
            size <= BUILDER_LIMIT,
            "the builder for {platform} has {size} bytes, more than {BUILDER_LIMIT}"
        );
    }
    Ok([builder, write(out, "drover-operator", OPERATOR, operators)?])
}

/// A small image for pods of tests, and the pause image of the node: busybox from `rootfs`, asleep unless told otherwise.
pub fn busybox(rootfs: &Path, reference: &str, out: &Path) -> Result<()> {
    let mut layer = base("root:x:0:0:root:/:/bin/sh\n", "root:x:0:\n").file(
        "bin/busybox", // Debian's busybox takes its own file name for the applet to run, unless that name is busybox
        0o755,
        &rootfs.join("usr/bin/busybox"),
    )?;
    for applet in [
        "sh", "cat", "echo", "sleep", "ls", "unshare", "mount", "ip", "id", "wget", "nc", "ps", "stat",
        "true", "false",
    ] {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    let config = Config {
        entrypoint: vec!["/bin/busybox".into()],
        cmd: vec!["sleep".into(), "2147483647".into()],
        env: vec!["PATH=/bin".into()],
        ..Config::default()
    };
    let content = Content { platform: Platform::native()?, config, layers: vec![layer] };
    oci::write(out, reference, &[content]).map(drop)
}

/// Each platform's content, and where the copy of its list is.
fn write(
    out: &Path,
    name: &str,
    reference: &'static str,
    contents: Vec<(Content, PathBuf)>,
) -> Result<Image> {
    let (contents, sboms): (Vec<_>, Vec<_>) = contents.into_iter().unzip();
    let file = out.join(format!("{name}.tar"));
    let (digest, written) = oci::write(&file, reference, &contents)?;
    let parts = contents.iter().zip(written).zip(sboms);
    let part = |((content, written), sbom): ((&Content, Written), PathBuf)| Part {
        platform: content.platform,
        written,
        sbom,
    };
    Ok(Image { file, reference, digest, parts: parts.map(part).collect() })
}

fn builder(programs: &Path, debian: &Path) -> Result<(Config, Layer)> {
    let layer = base(
        "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
        "root:x:0:\nnogroup:x:65534:\n",
    )
    .directory("nix", 0o755)
    // What fixed outputs are fetched from is believed by these.
    .directory("etc/ssl", 0o755)
    .directory("etc/ssl/certs", 0o755)
    .file("etc/ssl/certs/ca-certificates.crt", 0o644, &debian.join("etc/ssl/certs/ca-certificates.crt"))?
    .file("bin/drover-builder", 0o755, &programs.join("drover-builder"))?
    .file("bin/busybox", 0o755, &debian.join("usr/bin/busybox"))?;
    let layer = licences(layer, debian, &["busybox-static", "ca-certificates", "libc6"])?;
    let config = Config {
        entrypoint: vec!["/bin/drover-builder".into()],
        env: vec!["PATH=/bin".into()],
        labels: labels("drover-builder"),
        ..Config::default()
    };
    Ok((config, layer))
}

/// What every image has: users, a directory for programs, and a /tmp that everybody may write to.
fn base(passwd: &str, group: &str) -> Layer {
    Layer::default()
        .directory("bin", 0o755)
        .directory("etc", 0o755)
        .directory("tmp", 0o1777)
        .bytes("etc/passwd", 0o644, passwd)
        .bytes("etc/group", 0o644, group)
}

/// Drover's licence, and those of the Debian packages whose programs or libraries the image holds.
fn licences(layer: Layer, debian: &Path, packages: &[impl AsRef<str>]) -> Result<Layer> {
    let mut layer = layer
        .directory("licenses", 0o755)
        .file("licenses/drover", 0o644, &crate::checkout().join("LICENSE"))?
        .bytes("licenses/README", 0o644, include_str!("licenses.txt"));
    for package in packages.iter().map(AsRef::as_ref) {
        let copyright = debian.join("usr/share/doc").join(package).join("copyright");
        layer = layer.file(&format!("licenses/{package}"), 0o644, &copyright)?;
    }
    Ok(layer)
}

fn labels(title: &str) -> std::collections::BTreeMap<String, String> {
    [("title", title), ("version", env!("CARGO_PKG_VERSION")), ("licenses", "Apache-2.0")]
        .map(|(name, value)| (format!("org.opencontainers.image.{name}"), value.to_owned()))
        .into()
}
