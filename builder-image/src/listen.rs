//! stub
use crate::build::Builder;
use std::path::Path;
pub(crate) struct Options<'a> {
    pub address: &'a str,
    pub authorized_keys: &'a [String],
    pub host_key: Option<&'a Path>,
    pub max_sessions: usize,
}
pub(crate) fn run(_options: &Options<'_>, _builder: Builder) -> anyhow::Result<()> {
    anyhow::bail!("listen is not there yet")
}
