//! The OCI images: what is in each, and the writer that needs neither Docker nor a registry.
//!
//! `drover-builder` is one static program and a static shell for the sandbox. `drover-operator` is one static program and
//! the OpenSSH client with its libraries. The same sources and the same Debian packages give the same digest, wherever the
//! checkout lies.

mod crates;
pub mod oci;
mod operator;
mod programs;
pub mod sbom;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oci::{Config, Layer, Written};

use crate::parts::rootfs;

/// The name of the image that [`busybox`] makes for pods of tests.
pub const BUSYBOX: &str = "drover.test/busybox:1";

/// The name of the builder's image. `drover.build` is a registry that nothing is ever pulled from: images are loaded.
pub const BUILDER: &str = concat!("drover.build/drover-builder:", env!("CARGO_PKG_VERSION"));

/// The name of the operator's image.
pub const OPERATOR: &str = concat!("drover.build/drover-operator:", env!("CARGO_PKG_VERSION"));

/// An image that was made.
pub struct Image {
    /// An OCI layout in a tar file, which `ctr image import` and [`crate::cluster::Cluster::load`] take.
    pub file: PathBuf,
    /// The name under which it is loaded.
    pub reference: &'static str,
    pub written: Written,
}

/// Compiles the programs and makes both images in the directory `out`: the builder's, then the operator's.
pub fn make(out: &Path) -> Result<[Image; 2]> {
    fs::create_dir_all(out).with_context(|| format!("could not make {}", out.display()))?;
    let programs = programs::compile()?;
    let crates = crates::of(&programs::NAMES)?;
    let debian = rootfs::ssh()?;
    let image = |name: &str, reference: &'static str, config: &Config, layer: Layer, packages: &[String]| {
        let program = crates.id(name)?;
        let sbom = sbom::document(name, &program, &crates, &sbom::debian(&debian, packages)?)?;
        let sbom = serde_json::to_vec_pretty(&sbom)?;
        let beside = out.join(format!("{name}.spdx.json"));
        fs::write(&beside, &sbom).with_context(|| format!("could not write {}", beside.display()))?;
        let layer = layer.bytes(sbom::PATH, 0o644, sbom).bytes(
            "licenses/crates",
            0o644,
            crates.licences(&crates.closure(&program))?,
        );
        let file = out.join(format!("{name}.tar"));
        let written = oci::write(&file, reference, config, &[layer])?;
        anyhow::Ok(Image { file, reference, written })
    };
    let (config, layer) = builder(&programs, &debian)?;
    // libc6 is among its notices for what is linked statically, which the list has as glibc.
    let packages = ["busybox-static", "ca-certificates"].map(str::to_owned);
    let builder = image("drover-builder", BUILDER, &config, layer, &packages)?;
    let (config, layer) = operator::image(&programs, &debian)?;
    Ok([builder, image("drover-operator", OPERATOR, &config, layer, &operator::notices(&debian)?)?])
}

/// A small image for pods of tests, and the pause image of the node: busybox from `rootfs`, asleep unless told otherwise.
pub fn busybox(rootfs: &Path, reference: &str, out: &Path) -> Result<Written> {
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
    oci::write(out, reference, &config, &[layer])
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
