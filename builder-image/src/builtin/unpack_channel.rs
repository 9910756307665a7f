//! `builtin:unpack-channel`: an archive that holds one directory, unpacked, with that directory renamed
//! (Nix: builtins/unpack-channel.cc).

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::{Job, archive, compression};

pub(super) fn run(job: &Job) -> Result<()> {
    let out = job.out()?;
    let (name, archive) = (job.attribute("channelName")?, Path::new(job.attribute("src")?));
    // One component that is a name, which `..` is not.
    if Path::new(name).file_name() != Some(name) {
        bail!("the attribute 'channelName' has to be the name of a file, without a slash: {name:?}");
    }
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let shown = archive.display();
    let file = File::open(archive).with_context(|| format!("cannot open the channel's archive {shown}"))?;
    let input = compression::detect(file).with_context(|| format!("cannot decompress {shown}"))?;
    archive::unpack(input, out)
        .with_context(|| format!("cannot unpack {shown}, which has to be a tar archive"))?;
    let only = only_entry(out).with_context(|| format!("the archive {shown} is no channel"))?;
    if only != name {
        fs::rename(out.join(&only), out.join(name))
            .with_context(|| format!("cannot rename {only:?} to {name:?}"))?;
    }
    Ok(())
}

fn only_entry(directory: &Path) -> Result<OsString> {
    let mut entries = fs::read_dir(directory)?;
    let first = entries.next().context("it is empty")??;
    if entries.next().is_some() {
        bail!("it holds more than one file or directory at its top");
    }
    Ok(first.file_name())
}
