//! The OCI images: what is in each, and the writer that needs neither Docker nor a registry.

pub mod oci;

use std::path::Path;

use anyhow::Result;
use oci::{Config, Layer};

/// The name of the image that [`busybox`] makes.
pub const BUSYBOX: &str = "drover.test/busybox:1";

/// A small image for pods of tests, and the pause image of the node: busybox from `rootfs`, asleep unless told otherwise.
pub fn busybox(rootfs: &Path, reference: &str, out: &Path) -> Result<oci::Written> {
    let mut layer = Layer::default()
        .directory("bin", 0o755)
        .directory("etc", 0o755)
        .directory("tmp", 0o1777)
        .bytes("etc/passwd", 0o644, "root:x:0:0:root:/:/bin/sh\n")
        .bytes("etc/group", 0o644, "root:x:0:\n")
        // Debian's busybox takes its own file name for the applet to run, unless that name is busybox.
        .file("bin/busybox", 0o755, &rootfs.join("usr/bin/busybox"))?;
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
