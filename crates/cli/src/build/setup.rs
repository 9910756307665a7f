//! The parts of a local build: where the store is, which caches there are, which program builds.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use drover_cache::{Cache, CacheOptions, Credentials, Guarded, Memory, Secret};
use drover_nix::signature::SecretKey;
use drover_nix::{StoreDir, StorePath};
use tempfile::TempDir;

use crate::args;
use crate::exit::Fault;
use crate::order;

const BUILDER: &str = "drover-builder";
/// Nix: the default of `netrc-file`.
const NETRC: &str = "/etc/nix/netrc";

type Caches = Vec<Arc<dyn Cache>>;

pub(super) struct Setup {
    pub(super) dir: StoreDir,
    /// Root of the store that is built in.
    pub(super) store: PathBuf,
    pub(super) builder: PathBuf,
    /// Where inputs come from. What was built before is among them.
    pub(super) caches: Caches,
    /// Where outputs go.
    pub(super) push: Arc<dyn Cache>,
    /// Signs outputs.
    pub(super) signing_key: Option<Arc<SecretKey>>,
    /// For logs, and for outputs on their way to the cache.
    pub(super) spool: TempDir,
    /// For requests that do not say.
    pub(super) limits: args::Limits,
}

impl Setup {
    pub(super) fn new(args: &args::Build, dir: StoreDir) -> Result<Self, Fault> {
        let builder = find_builder(args.builder.as_deref()).map_err(Fault::Infrastructure)?;
        let store = match &args.store {
            Some(root) => std::path::absolute(root).context("--store").map_err(Fault::Input)?,
            None => home_dir("XDG_STATE_HOME", ".local/state").map_err(Fault::Input)?.join("drover/store"),
        };
        std::fs::create_dir_all(&store)
            .with_context(|| format!("cannot create the store {}", store.display()))
            .map_err(Fault::Infrastructure)?;
        let signing_key =
            args.secret_key_file.as_deref().map(secret_key).transpose().map_err(Fault::Input)?.map(Arc::new);
        let (caches, push) = caches(args, signing_key.as_deref(), &dir)?;
        let spool =
            TempDir::new().context("cannot create a temporary directory").map_err(Fault::Infrastructure)?;
        Ok(Self { dir, store, builder, caches, push, signing_key, spool, limits: args.limits.clone() })
    }
}

impl Setup {
    /// Whether a cache has the path and says so. One that cannot be asked is found out by who needs it.
    pub(super) fn has(&self, path: &StorePath) -> bool {
        self.caches.iter().any(|cache| matches!(cache.narinfo(path), Ok(Some(_))))
    }
}

/// Opens the caches that `urls` name. Without `netrc`, Nix's own is used if there is one.
pub(crate) fn open_caches(
    urls: &[String],
    keys: &[String],
    netrc: Option<&Path>,
    dir: &StoreDir,
) -> Result<Caches, Fault> {
    let keys = keys.iter().map(|key| key.parse().with_context(|| format!("public key {key}")));
    let public_keys = keys.collect::<Result<_>>().map_err(Fault::Input)?;
    let credentials = credentials(netrc).map_err(Fault::Input)?;
    let options = CacheOptions { dir: dir.clone(), public_keys, credentials, ..CacheOptions::default() };
    let open = |url: &String| -> Result<Arc<dyn Cache>> {
        let cache = drover_cache::open(url, &options).with_context(|| format!("--cache {url}"))?;
        // One that gives something wrong is not asked for it again.
        Ok(Arc::new(Guarded::new(cache, Memory::of(url))))
    };
    urls.iter().map(open).collect::<Result<_>>().map_err(Fault::Input)
}

fn credentials(netrc: Option<&Path>) -> Result<Credentials> {
    let text = match netrc {
        Some(path) => {
            std::fs::read_to_string(path).with_context(|| format!("--netrc-file {}", path.display()))?
        }
        // It may well be for root only; a cache that wants credentials says so.
        None => match std::fs::read_to_string(NETRC) {
            Ok(text) => text,
            Err(_) => return Ok(Credentials::None),
        },
    };
    Ok(Credentials::Netrc(Secret::new(text)))
}

/// The URL of drover's own cache.
pub(crate) fn own_cache() -> Result<String> {
    let path = home_dir("XDG_CACHE_HOME", ".cache")?.join("drover/cache");
    Ok(format!("file://{}", path.display()))
}

/// Where inputs come from, and where outputs go: where the caller says or else the first cache that is a directory, or our
/// own. Whether a server takes uploads cannot be told without trying.
fn caches(
    args: &args::Build,
    signing_key: Option<&SecretKey>,
    dir: &StoreDir,
) -> Result<(Caches, Arc<dyn Cache>), Fault> {
    let mut urls = args.caches.clone();
    let directory = || urls.iter().find(|url| url.starts_with("file://")).cloned();
    let push = match args.push.clone().or_else(directory) {
        Some(url) => url,
        None => own_cache().map_err(Fault::Input)?,
    };
    if !urls.contains(&push) {
        urls.push(push.clone());
    }
    // The inputs of a .drv in a store are in that store.
    for file in args.files.files.iter().filter(|file| order::is_drv(file)) {
        if let Some(store) = order::store_of(file)
            && !urls.contains(&store)
        {
            urls.push(store);
        }
    }
    if let Some(directory) = push.strip_prefix("file://") {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot create the cache {directory}"))
            .map_err(Fault::Infrastructure)?;
    }
    let mut keys = args.public_keys.clone();
    // As in Nix, the public half of a key of one's own is trusted. Alone it would have everything else refused.
    if !keys.is_empty() {
        keys.extend(signing_key.map(|key| key.public().to_string()));
    }
    let opened = open_caches(&urls, &keys, args.netrc_file.as_deref(), dir)?;
    let index = urls.iter().position(|url| *url == push).unwrap_or_default();
    let push = opened.get(index).cloned().ok_or_else(|| Fault::Input(anyhow!("there is no cache")))?;
    Ok((opened, push))
}

/// The key in a file as Nix has them. A message about it has nothing of its content.
fn secret_key(file: &Path) -> Result<SecretKey> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read --secret-key-file {}", file.display()))?;
    SecretKey::parse(&text).with_context(|| format!("--secret-key-file {}", file.display()))
}

/// What was asked for, or the program next to this one, or the one in PATH.
fn find_builder(asked: Option<&Path>) -> Result<PathBuf> {
    if let Some(program) = asked {
        if !program.is_file() {
            bail!("the builder {} (--builder or DROVER_BUILDER) is not a file", program.display());
        }
        return std::path::absolute(program).context("--builder");
    }
    let beside = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(BUILDER)));
    let in_path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&in_path).map(|dir| dir.join(BUILDER)).collect::<Vec<_>>();
    beside.into_iter().chain(in_path).find(|program| program.is_file()).context(
        "there is no drover-builder next to drover or in PATH; build it (cargo build -p drover-builder) or name it \
         with --builder",
    )
}

fn home_dir(variable: &str, below_home: &str) -> Result<PathBuf> {
    // The XDG specification says that relative paths are to be ignored.
    if let Some(dir) = env::var_os(variable).map(PathBuf::from).filter(|dir| dir.is_absolute()) {
        return Ok(dir);
    }
    let home = env::var_os("HOME").filter(|home| !home.is_empty());
    let home =
        home.with_context(|| format!("neither {variable} nor HOME is set; give --store and --cache"))?;
    Ok(Path::new(&home).join(below_home))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netrc_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = dir.path().join("netrc");
            std::fs::write(&path, text).unwrap();
            path
        };
        let open = |netrc: &Path| {
            let urls = ["http://h.example", "s3://bucket?region=r", "file:///nowhere"].map(str::to_owned);
            open_caches(&urls, &[], Some(netrc), &StoreDir::default()).map(|caches| caches.len())
        };
        assert_eq!(open(&file("machine h.example login me password hush")).ok(), Some(3));
        for (path, says) in
            [(file("machine hush hush"), "netrc"), (dir.path().join("absent"), "--netrc-file")]
        {
            let Err(Fault::Input(error)) = open(&path) else { panic!("{says} was taken") };
            let said = format!("{error:#}");
            assert!(said.contains(says) && !said.contains("hush"), "{said}");
        }
    }
}
