//! One derivation, built: from a request that names store paths to valid outputs or a reason why not.
//!
//! In the order of its story: who else builds this ([`drover_store::PathLock`]), under which ids ([`ids`]), where
//! ([`scratch`]), what the builder sees ([`attrs`], [`graph`], [`env`]), the sandbox (`crate::sandbox`), the watch over
//! it ([`supervise`], [`log`]), and what becomes of its outputs ([`outputs`], [`checks`]). Nothing here speaks a
//! protocol.

mod attrs;
mod checks;
mod env;
pub(crate) mod goals;
mod graph;
mod ids;
pub(crate) mod log;
mod outputs;
mod scratch;
pub(crate) mod supervise;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use drover_nix::derivation::DerivationType;
use drover_nix::{BasicDerivation, DerivationOutput, OutputName, PathInfo, StorePath};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, BuiltOutput};
use drover_store::{LocalStore, PathLock, TempRoots, Wait};

use self::attrs::Attributes;
use self::graph::Known;
use self::ids::BuildIds;
use self::log::Log;
use self::scratch::{BUILD_DIR, Scratch};
use self::supervise::{Cancel, End, Limits};
use crate::error::Error;
use crate::sandbox::launch;
use crate::sandbox::plan::{self, INSIDE_GID, INSIDE_UID, IdMap, Layout, Plan};
use crate::sandbox::rungs::{self, Ids};

/// How often a lock or a uid that others have is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// Less free disk than this after a failure means that the failure may be the disk's (Nix: derivation-builder.cc).
const LOW_DISK_BYTES: u64 = 8 << 20;
/// Host files that builds with network access need, where they exist.
const NETWORK_FILES: [&str; 3] = ["/etc/resolv.conf", "/etc/services", "/etc/hosts"];
const DEVICES: [&str; 6] = ["full", "null", "random", "tty", "urandom", "zero"];

/// What does not change from build to build.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// A static shell that becomes `/bin/sh`.
    pub sandbox_shell: Option<PathBuf>,
    /// `NIX_BUILD_CORES`.
    pub cores: usize,
    /// Systems that this machine builds for, the native one first.
    pub systems: Vec<String>,
    pub features: BTreeSet<String>,
    pub ids: Ids,
}

/// Builds into one store.
#[derive(Clone)]
pub(crate) struct Builder {
    pub store: LocalStore,
    pub settings: Settings,
}

/// One request.
pub(crate) struct Request<'a> {
    pub drv_path: &'a StorePath,
    pub drv: &'a BasicDerivation,
    pub options: &'a BuildOptions,
    /// Keeps outputs from the collector.
    pub roots: &'a TempRoots,
    pub log: &'a Log,
    pub cancel: &'a Cancel,
}

impl Builder {
    /// Builds, or finds that there is nothing to build. Every failure is a result.
    pub(crate) fn build(&self, request: &Request<'_>) -> BuildResult {
        let start = now();
        let outcome = self.try_build(request);
        // The log comes before the answer, for whoever reads both.
        request.log.flush();
        let mut result = match outcome {
            Ok((status, outputs)) => {
                let built = outputs
                    .into_iter()
                    .map(|(name, path)| (name, BuiltOutput { path, signatures: Vec::new() }));
                BuildResult { built_outputs: built.collect(), ..BuildResult::new(status) }
            }
            Err(error) => {
                // What is not the derivation's doing belongs into the log too, where whoever runs this looks.
                if !matches!(error, Error::Verdict { .. }) {
                    request.log.note(&format!("{}: {error}", error.category()));
                    request.log.flush();
                }
                BuildResult::failure(error.status(), error.to_string())
            }
        };
        if result.status != BuildStatus::AlreadyValid {
            result.times_built = u64::from(result.status != BuildStatus::InputRejected);
            (result.start_time, result.stop_time) = (start, now());
        }
        result
    }

    fn try_build(
        &self,
        request: &Request<'_>,
    ) -> Result<(BuildStatus, BTreeMap<OutputName, StorePath>), Error> {
        let drv = request.drv;
        let kind = drv.kind()?;
        let attributes = Attributes::parse(drv)?;
        self.accept(request.drv_path, drv, kind, &attributes)?;
        let mut outputs = BTreeMap::new();
        for (name, path) in drv.output_paths(self.store.store_dir())? {
            // `accept` let only those pass whose paths are known.
            let path = path.ok_or_else(|| Error::input(format!("the path of output {name} is not known")))?;
            outputs.insert(name, path);
        }

        request.roots.add_all(outputs.values().chain([request.drv_path]))?;
        let lock = self.lock(&outputs, request)?;
        let paths: BTreeSet<StorePath> = outputs.values().cloned().collect();
        let valid = self.store.valid_paths(&paths)?;
        if valid.len() == paths.len() {
            lock.release_deleting();
            return Ok((BuildStatus::AlreadyValid, outputs));
        }
        let missing = outputs.iter().filter(|(_, path)| !valid.contains(*path));
        let missing: BTreeMap<_, _> = missing.map(|(name, path)| (name.clone(), path.clone())).collect();
        for path in missing.values() {
            drover_store::fs::delete(&self.store.real_path(path))?;
        }
        self.run(request, kind, &attributes, &outputs, &missing)?;
        lock.release_deleting();
        Ok((BuildStatus::Built, outputs))
    }

    /// Whether this builder can build it at all.
    fn accept(
        &self,
        drv_path: &StorePath,
        drv: &BasicDerivation,
        kind: DerivationType,
        attributes: &Attributes<'_>,
    ) -> Result<(), Error> {
        let full = self.store.store_dir().full(drv_path);
        let refuse = |why: String| Err(Error::input(format!("cannot build '{full}': {why}")));
        if drv.builder.starts_with(b"builtin:") {
            return refuse(format!("the built-in builder `{}` is not supported", drv.builder));
        }
        let system = drv.system.to_string();
        if !self.settings.systems.contains(&system) {
            let have = self.settings.systems.join(", ");
            return refuse(format!("it is for system `{system}`, and this builder builds for: {have}"));
        }
        let wanted = attributes.strings("requiredSystemFeatures")?.unwrap_or_default();
        let lacking: Vec<String> =
            wanted.into_iter().filter(|feature| !self.settings.features.contains(feature)).collect();
        if !lacking.is_empty() {
            let have: Vec<&str> = self.settings.features.iter().map(String::as_str).collect();
            return refuse(format!(
                "it needs the features {{{}}}, and this builder has {{{}}}",
                lacking.join(", "),
                have.join(", ")
            ));
        }
        if attributes.flag("__noChroot") {
            return refuse("it has `__noChroot` set, and this builder builds in the sandbox only".into());
        }
        match kind {
            DerivationType::InputAddressed => Ok(()),
            DerivationType::CaFixed => {
                let mut fixed = drv.outputs.values().filter_map(|output| match output {
                    DerivationOutput::CaFixed(ca) => Some(ca),
                    _ => None,
                });
                fixed.try_for_each(outputs::supported)
            }
            DerivationType::Deferred => {
                refuse("its output paths are not known: it has to be resolved first".into())
            }
            DerivationType::CaFloating | DerivationType::Impure => {
                refuse("content-addressed outputs without a fixed hash are not supported".into())
            }
        }
    }

    /// Waits until nobody else makes these outputs.
    fn lock(
        &self,
        outputs: &BTreeMap<OutputName, StorePath>,
        request: &Request<'_>,
    ) -> Result<PathLock, Error> {
        let mut told = false;
        loop {
            if let Some(lock) = PathLock::acquire(&self.store, outputs.values(), Wait::Try)? {
                return Ok(lock);
            }
            if !std::mem::replace(&mut told, true) {
                request.log.note(&format!("waiting for another build of {}", request.drv_path));
            }
            pause(request.cancel)?;
        }
    }

    fn ids(&self, request: &Request<'_>) -> Result<BuildIds, Error> {
        loop {
            if let Some(ids) = BuildIds::take(self.settings.ids, &self.store.layout().state_dir)? {
                return Ok(ids);
            }
            pause(request.cancel)?;
        }
    }

    /// From directories to registered outputs.
    fn run(
        &self,
        request: &Request<'_>,
        kind: DerivationType,
        attributes: &Attributes<'_>,
        outputs: &BTreeMap<OutputName, StorePath>,
        missing: &BTreeMap<OutputName, StorePath>,
    ) -> Result<(), Error> {
        let dir = self.store.store_dir();
        let inputs = self.inputs(request)?;
        let ids = self.ids(request)?;
        let graphs = graph::graphs(dir, attributes, &inputs, &self.store)?;
        let prepared = env::prepare(&env::Inputs {
            dir,
            drv: request.drv,
            attributes,
            kind,
            outputs,
            build_dir: BUILD_DIR,
            cores: self.settings.cores,
            impure: &|name| {
                std::env::var_os(name).map(|value| std::os::unix::ffi::OsStringExt::into_vec(value).into())
            },
            graphs: &graphs,
        })?;
        let mut scratch = Scratch::create(self.store.layout(), request.drv_path, &ids)?;
        for (name, contents) in &prepared.files {
            scratch.build_file(name, contents)?;
        }
        let made: BTreeSet<&StorePath> = outputs.values().collect();
        let visible = inputs.iter().filter(|path| !made.contains(path));
        let layout = self.layout(&scratch, kind, visible)?;
        let plan = Plan {
            steps: plan::build_steps(&layout),
            private_network: layout.private_network,
            uid: IdMap { inside: INSIDE_UID, outside: ids.uid },
            gid: IdMap { inside: INSIDE_GID, outside: ids.gid },
            command: prepared.command,
        };
        let seconds = |seconds: u64| (seconds > 0).then(|| Duration::from_secs(seconds));
        let limits = Limits {
            timeout: seconds(request.options.timeout_seconds),
            max_silent: seconds(request.options.max_silent_seconds),
            max_log_bytes: Some(request.options.max_log_bytes).filter(|bytes| *bytes > 0),
        };
        let running = launch::start(&plan, ids.foreign()).map_err(Error::system("start the sandbox"))?;
        let (end, tail) = supervise::supervise(running, &limits, request.log, request.cancel)?;
        let result = match self.verdict(request.drv_path, kind, &end, &tail) {
            None => outputs::Finished {
                store: &self.store,
                drv_path: request.drv_path,
                drv: request.drv,
                attributes,
                scratch: &scratch,
                ids: &ids,
                outputs: missing,
                inputs: &inputs,
            }
            .register(),
            Some(error) => Err(error),
        };
        if result.is_err() && request.options.keep_failed {
            let kept = scratch.keep();
            request.log.note(&format!("keeping build directory {}", kept.display()));
        }
        result
    }

    /// The closure of the derivation's inputs, all of it valid.
    fn inputs(&self, request: &Request<'_>) -> Result<BTreeSet<StorePath>, Error> {
        let named = &request.drv.input_srcs;
        let valid = self.store.valid_paths(named)?;
        let missing: Vec<String> =
            named.difference(&valid).map(|path| self.store.store_dir().full(path)).collect();
        if !missing.is_empty() {
            return Err(Error::Verdict {
                status: BuildStatus::MiscFailure,
                message: format!(
                    "cannot build '{}': these inputs are not valid in this store; add them first:\n  {}",
                    self.store.store_dir().full(request.drv_path),
                    missing.join("\n  ")
                ),
            });
        }
        Ok(self.store.closure(named)?)
    }

    /// Makes every mount point and says what goes where.
    fn layout<'a>(
        &self,
        scratch: &Scratch,
        kind: DerivationType,
        inputs: impl Iterator<Item = &'a StorePath>,
    ) -> Result<Layout, Error> {
        let store = &self.store;
        let mut binds = Vec::new();
        let mut add = |source: &Path, inside: &Path| {
            binds.extend(scratch.mount_point(source, inside)?);
            Ok::<_, Error>(())
        };
        let etc = |name: &str, text: &str| {
            let path = scratch.outside(Path::new("/etc")).join(name);
            scratch::fixed_file(&path, text.as_bytes())
        };
        etc("passwd", &scratch::passwd(INSIDE_UID, INSIDE_GID))?;
        etc("group", &scratch::group(INSIDE_GID))?;
        if kind.is_sandboxed() {
            etc("hosts", scratch::HOSTS)?;
        } else {
            etc("nsswitch.conf", scratch::NSSWITCH)?;
            for file in NETWORK_FILES.map(Path::new) {
                // Often a symlink to where a resolver's daemon writes: bind what it leads to.
                if let Ok(real) = std::fs::canonicalize(file) {
                    add(&real, file)?;
                }
            }
            if let Some(bundle) = certificates() {
                add(&bundle, Path::new("/etc/ssl/certs/ca-certificates.crt"))?;
            }
        }
        if let Some(shell) = &self.settings.sandbox_shell {
            add(shell, Path::new("/bin/sh"))?;
        }
        for device in DEVICES {
            let path = Path::new("/dev").join(device);
            if path.exists() {
                add(&path, &path)?;
            }
        }
        if self.settings.features.contains("kvm") && Path::new("/dev/kvm").exists() {
            add(Path::new("/dev/kvm"), Path::new("/dev/kvm"))?;
        }
        // A terminal file system of the build's own would need an id 0 in its user namespace, which it has not.
        for path in ["/dev/pts", "/dev/ptmx"].map(Path::new) {
            if path.exists() {
                add(path, path)?;
            }
        }
        add(&scratch.build_dir(), Path::new(BUILD_DIR))?;
        for path in inputs {
            add(&store.real_path(path), Path::new(&store.store_dir().full(path)))?;
        }
        scratch.seal()?;
        Ok(Layout {
            root: scratch.root().to_owned(),
            store_dir: store.store_dir().as_str().into(),
            binds,
            build_dir: BUILD_DIR.into(),
            private_network: kind.is_sandboxed(),
            linux32: false,
            shm: Path::new("/dev/shm").is_dir(),
        })
    }

    /// None if the builder did its part.
    fn verdict(
        &self,
        drv_path: &StorePath,
        kind: DerivationType,
        end: &End,
        tail: &[String],
    ) -> Option<Error> {
        let full = self.store.store_dir().full(drv_path);
        // What has the network may fail for reasons that pass.
        let failed = if kind.is_sandboxed() && !self.disk_is_low() {
            BuildStatus::PermanentFailure
        } else {
            BuildStatus::TransientFailure
        };
        let (status, what) = match end {
            End::Exited(0) => return None,
            End::Exited(code) => (failed, format!("builder for '{full}' failed with exit code {code}")),
            End::Signalled(signal) => (failed, format!("builder for '{full}' failed due to signal {signal}")),
            End::NotExecuted(why) => (failed, format!("builder for '{full}' failed: {why}")),
            End::TimedOut(limit) => (
                BuildStatus::TimedOut,
                format!("building of '{full}' timed out after {} seconds", limit.as_secs()),
            ),
            End::Silent(limit) => (
                BuildStatus::TimedOut,
                format!("building of '{full}' timed out after {} seconds of silence", limit.as_secs()),
            ),
            End::LogLimit(limit) => (
                BuildStatus::LogLimitExceeded,
                format!("'{full}' was killed after writing more than {limit} bytes of log"),
            ),
            End::Cancelled => {
                return Some(Error::gone());
            }
            End::SetUp(why) => return Some(Error::Sandbox { why: format!("{why}. {}", rungs::advice(why)) }),
        };
        let mut message = what;
        if !tail.is_empty() {
            message.push_str(&format!(";\nlast {} log lines:", tail.len()));
            tail.iter().for_each(|line| message.push_str(&format!("\n> {line}")));
        }
        Some(Error::Verdict { status, message })
    }

    fn disk_is_low(&self) -> bool {
        let layout = self.store.layout();
        [&layout.real_store_dir, &layout.state_dir].into_iter().any(|dir| {
            rustix::fs::statvfs(dir)
                .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) < LOW_DISK_BYTES)
        })
    }
}

impl Known for LocalStore {
    fn info(&self, path: &StorePath) -> Result<PathInfo, Error> {
        let info = self.path_info(path)?;
        info.ok_or_else(|| drover_store::Error::NotValid { path: path.clone() }.into())
    }

    fn outputs(&self, drv: &StorePath) -> Result<Vec<StorePath>, Error> {
        Ok(self.derivation_outputs(drv)?.into_values().collect())
    }
}

fn pause(cancel: &Cancel) -> Result<(), Error> {
    if cancel.wait(RETRY) {
        return Err(Error::gone());
    }
    Ok(())
}

/// The certificates that this machine trusts, for builds that fetch.
fn certificates() -> Option<PathBuf> {
    let named =
        ["NIX_SSL_CERT_FILE", "SSL_CERT_FILE"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let usual = [PathBuf::from("/etc/ssl/certs/ca-certificates.crt")];
    named.chain(usual).find_map(|path| std::fs::canonicalize(path).ok().filter(|path| path.is_file()))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
pub(crate) mod testing {
    use bstr::BString;
    use drover_nix::{BasicDerivation, DerivationOutput, OutputName};

    /// A derivation with one output and this environment.
    pub(crate) fn derivation(env: &[(&str, &str)]) -> BasicDerivation {
        let path = "i00sflxqsj37lfmf95m8mn0grv615hpj-x".parse().unwrap();
        BasicDerivation {
            name: "x".into(),
            outputs: [(OutputName::out(), DerivationOutput::InputAddressed(path))].into(),
            input_srcs: [].into(),
            system: "x86_64-linux".into(),
            builder: "/bin/sh".into(),
            args: vec!["-c".into(), "true".into()],
            env: env.iter().map(|(key, value)| (BString::from(*key), BString::from(*value))).collect(),
        }
    }
}
