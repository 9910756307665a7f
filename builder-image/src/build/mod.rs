//! One derivation, built: from a request that names store paths to valid outputs or a reason why not.
//!
//! In the order of its story: what has to be built first ([`goals`]), who else in this process builds it ([`shared`])
//! or has built it ([`kept`]), who wants it ([`cancel`]), what was made of it before ([`realised`]), whether its paths are
//! its own ([`trust`]), whether it can be built here ([`accept`]), the one attempt ([`attempt`]): where its outputs go ([`targets`]), locks ([`locks`]), ids
//! ([`ids`]), directories ([`scratch`], [`root`], [`extra_paths`], [`skeleton`]), what the builder sees ([`attrs`],
//! [`json`], [`graph`], [`env`], [`builtins`]), the sandbox ([`confine`], [`bare`], `crate::sandbox`) and its network
//! ([`connect`]), the watch over it ([`supervise`], [`log`]); how it ended ([`evidence`], [`verdict`]) and what becomes
//! of its outputs ([`outputs`], [`checks`]) or of its directory ([`keep`]). Nothing here speaks a protocol.

mod accept;
mod attempt;
mod attrs;
mod bare;
mod builtins;
pub(crate) mod cancel;
mod checks;
mod confine;
mod connect;
mod env;
mod evidence;
pub(crate) mod extra_paths;
pub(crate) mod goals;
mod graph;
mod ids;
mod json;
mod keep;
mod kept;
mod locks;
pub(crate) mod log;
mod outputs;
mod realised;
mod root;
mod scratch;
mod shared;
mod skeleton;
pub(crate) mod supervise;
mod targets;
pub(crate) mod trust;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use drover_nix::derivation::modulo::{self, InputHash};
use drover_nix::derivation::{DerivationType, realisation};
use drover_nix::hash_modulo::SelfReferenceHash;
use drover_nix::{BasicDerivation, Derivation, OutputName, Sha256, StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, BuiltOutput};
use drover_store::{LocalStore, TempRoots};

use self::attempt::Attempt;
use self::attrs::Attributes;
pub(crate) use self::builtins::Fetching;
use self::cancel::{Cancel, Interest};
use self::confine::Ladder;
use self::evidence::Company;
use self::extra_paths::ExtraPath;
use self::log::Log;
use self::realised::{Key, Realised};
use self::shared::{Asker, Entry, Identity, Joined, Own, Registry};
use self::skeleton::Placed;
use self::targets::Paths;
use self::trust::{Origin, Trust};
use crate::error::Error;
use crate::network;
use crate::sandbox::rungs::{Ids, Rung};
use crate::substitute::{self, Substituter};

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
    /// The weakest sandbox that builds may have.
    pub sandbox: Rung,
    /// What builds see of this machine beside what all of them do.
    pub extra_paths: Vec<ExtraPath>,
    /// Each build gets a control group, where one can be made.
    pub cgroups: bool,
    pub fetching: Fetching,
    /// Of builds that may fetch.
    pub network: network::Choice,
    pub substitution: substitute::Settings,
    /// How long a build outlives the last session that wants it, and its end is kept for who asks again.
    pub linger: Duration,
    /// What the paths of content-addressed outputs that refer to themselves are made of.
    pub self_references: SelfReferenceHash,
    pub trust: Trust,
}

/// Builds into one store.
#[derive(Clone)]
pub(crate) struct Builder {
    pub store: LocalStore,
    pub settings: Settings,
    pub substituter: Substituter,
    running: Registry,
    realised: Realised,
    /// Of builds without network access.
    skeleton: Arc<Mutex<Option<Placed>>>,
    ladder: Ladder,
    network: network::Found,
    company: Company,
}

/// One request.
pub(crate) struct Request<'a> {
    pub drv_path: &'a StorePath,
    pub drv: &'a BasicDerivation,
    pub origin: Origin,
    pub options: &'a BuildOptions,
    /// Keeps outputs from the collector while the session lasts, which is as long as its build.
    pub roots: &'a TempRoots,
    pub log: &'a Log,
    pub cancel: &'a Cancel,
}

/// What a request is after.
struct Wanted {
    /// Every output, and its path where that does not follow from what is built.
    known: BTreeMap<OutputName, Option<StorePath>>,
    /// Under which the paths that are not known are remembered. None where all are known, or every build makes its own.
    key: Option<Key>,
    /// What Nix files the outputs under whose paths are not known.
    filed: Option<Filed>,
}

/// The names of one derivation in Nix's two tables of realised outputs. Both follow from its text alone.
struct Filed {
    /// Since Nix 2.35.
    drv_path: StorePath,
    /// Up to Nix 2.34. Clients of that age ask for it too.
    drv_hash: Sha256,
}

impl Builder {
    pub(crate) fn new(store: LocalStore, settings: Settings) -> Self {
        let running = Registry::new(settings.linger);
        let substituter = Substituter::new(settings.substitution.clone(), &store);
        Self {
            store,
            substituter,
            settings,
            running,
            realised: Realised::default(),
            skeleton: Arc::default(),
            ladder: Ladder::default(),
            network: network::Found::default(),
            company: Company::default(),
        }
    }

    /// Builds, waits for who builds it already, or finds that there is nothing to build. Every failure is a result.
    pub(crate) fn build(&self, request: &Request<'_>) -> BuildResult {
        self.try_build(request).unwrap_or_else(|error| {
            // What is not the derivation's doing belongs into the log too, where whoever runs this looks.
            if !matches!(error, Error::Verdict { .. }) {
                request.log.note(&format!("{}: {error}", error.category()));
            }
            error.to_result()
        })
    }

    fn try_build(&self, request: &Request<'_>) -> Result<BuildResult, Error> {
        let drv = request.drv;
        let kind = drv.kind()?;
        let dir = self.store.store_dir();
        let known = drv.output_paths(dir)?;
        if kind == DerivationType::Deferred {
            // Such a derivation is not accepted, which says why.
            self.accept(request.drv_path, drv, &Attributes::parse(drv)?)?;
        }
        self.settings.trust.check(dir, request.origin, request.drv_path, drv)?;
        request.roots.add_all(known.values().flatten().chain([request.drv_path]))?;
        let key = match kind {
            DerivationType::CaFloating => Some(Key::of(dir, request.drv_path, drv)?),
            _ => None,
        };
        let filed = match kind {
            DerivationType::CaFloating | DerivationType::Impure => Filed::of(dir, drv)?,
            _ => None,
        };
        let wanted = Wanted { known, key, filed };
        loop {
            let asker = Asker {
                identity: Identity {
                    drv_path: request.drv_path.clone(),
                    drv: drv.clone(),
                    options: request.options.clone(),
                },
                outputs: targets::lock_names(request.drv_path, &wanted.known),
                // Whoever asks for one of these wants a new one.
                alone: kind == DerivationType::Impure,
                log: request.log,
                cancel: request.cancel,
            };
            // Before the store is looked at: who comes back wants the log too.
            let entry = match self.running.join(&asker) {
                Some(joined) => Entry::Joined(joined),
                None => {
                    if let Some(paths) = self.made_before(&wanted, request.roots)? {
                        return Ok(wanted.finished(BuildStatus::AlreadyValid, paths));
                    }
                    self.running.enter(asker, self.log_spool())?
                }
            };
            let result = match entry {
                Entry::Own(own) => Some(self.build_own(request, own, &wanted)),
                Entry::Joined(joined) => self.await_other(request, &joined)?,
            };
            if let Some(result) = result {
                return Ok(result);
            }
        }
    }

    /// Room for a build's log, where one may be asked for again. Without it less of the log is kept.
    fn log_spool(&self) -> Option<File> {
        if self.settings.linger.is_zero() { None } else { self.store.spool().ok() }
    }

    /// All outputs, if they are valid and where that is known. They are kept from the collector then.
    fn made_before(&self, wanted: &Wanted, roots: &TempRoots) -> Result<Option<Paths>, Error> {
        let known = wanted.known.iter().map(|(name, path)| Some((name.clone(), path.clone()?)));
        let paths = match (known.collect::<Option<Paths>>(), &wanted.key) {
            (Some(known), _) => known,
            (None, Some(key)) => match self.realised.get(key) {
                Some(made) => made,
                None => return self.noted_by_nix(wanted, roots),
            },
            (None, None) => return Ok(None),
        };
        Ok(self.all_valid(&paths, roots)?.then_some(paths))
    }

    /// All outputs, if a Nix with the same store has noted where it has built them, and they are valid.
    fn noted_by_nix(&self, wanted: &Wanted, roots: &TempRoots) -> Result<Option<Paths>, Error> {
        let Some(Filed { drv_path, drv_hash }) = &wanted.filed else { return Ok(None) };
        let mut paths = Paths::new();
        for name in wanted.known.keys() {
            let Some(path) = self.store.realised_output(drv_path, drv_hash, name)? else { return Ok(None) };
            paths.insert(name.clone(), path);
        }
        Ok(self.all_valid(&paths, roots)?.then_some(paths))
    }

    /// Whether all are valid, and stay so for as long as `roots` are held.
    fn all_valid(&self, paths: &Paths, roots: &TempRoots) -> Result<bool, Error> {
        roots.add_all(paths.values())?;
        let paths: BTreeSet<StorePath> = paths.values().cloned().collect();
        Ok(self.store.valid_paths(&paths)?.len() == paths.len())
    }

    fn remember(&self, wanted: &Wanted, paths: &Paths) {
        if let Some(key) = wanted.key {
            self.realised.insert(key, paths.clone());
        }
    }

    /// Builds for this session and whoever joins it.
    fn build_own(&self, request: &Request<'_>, own: Own, wanted: &Wanted) -> BuildResult {
        let start = now();
        let shared = own.shared.clone();
        // What nobody could find again need not go on.
        let linger = if own.can_be_found() { self.settings.linger } else { Duration::ZERO };
        let (log, interest) = (shared.log(), Interest::new(request.cancel, &shared, linger));
        let result = Attributes::parse(request.drv).and_then(|attributes| {
            let kind = self.accept(request.drv_path, request.drv, &attributes)?;
            let (drv_path, drv, options) = (request.drv_path, request.drv, request.options);
            let (attributes, roots, interest) = (&attributes, request.roots, &interest);
            let attempt = Attempt {
                builder: self,
                drv_path,
                drv,
                kind,
                attributes,
                options,
                wanted,
                roots,
                log,
                interest,
            };
            attempt.run()
        });
        let mut result = match result {
            Ok((status, paths)) => wanted.finished(status, paths),
            Err(error) => {
                if !matches!(error, Error::Verdict { .. }) {
                    log.note(&format!("{}: {error}", error.category()));
                }
                error.to_result()
            }
        };
        if result.status != BuildStatus::AlreadyValid {
            result.times_built = u64::from(result.status != BuildStatus::InputRejected);
            (result.start_time, result.stop_time) = (start, now());
        }
        own.finish(&result);
        // The log comes before the answer, for whoever reads both; without anyone to answer it can wait for its end.
        request.log.flush_until(&|| interest.owner_is_gone());
        result
    }

    /// Waits for another session's build. None if that one came to no end that counts here.
    fn await_other(&self, request: &Request<'_>, joined: &Joined) -> Result<Option<BuildResult>, Error> {
        // Who comes back for a build that nobody else has gets what it would have got, and no word of ours in between.
        if !(joined.was_left() || joined.ended().is_set()) {
            request.log.note(&format!("another session builds {} as well", request.drv_path));
        }
        let ended =
            request.cancel.wait_for(joined.ended()).map_err(Error::system("wait for another build"))?;
        if !ended {
            return Err(Error::gone());
        }
        request.log.flush_until(&|| request.cancel.is_cancelled());
        if let Some(result) = joined.result() {
            // The builder's session may have ended, and taken its hold on the outputs with it.
            let built = result.built_outputs.iter().map(|(name, built)| (name.clone(), built.path.clone()));
            if self.all_valid(&built.collect(), request.roots)? {
                return Ok(Some(result));
            }
        }
        self.running.forget(joined);
        Ok(None)
    }
}

impl Wanted {
    /// A success, with all outputs.
    fn finished(&self, status: BuildStatus, paths: Paths) -> BuildResult {
        let built = |(name, path)| (name, BuiltOutput { path, signatures: Vec::new() });
        let built_outputs = paths.into_iter().map(built).collect();
        let drv_hash = self.filed.as_ref().map(|filed| filed.drv_hash);
        BuildResult { built_outputs, drv_hash, ..BuildResult::new(status) }
    }
}

impl Filed {
    fn of(dir: &StoreDir, drv: &BasicDerivation) -> Result<Option<Self>, Error> {
        let drv = Derivation { basic: drv.clone(), input_drvs: BTreeMap::new() };
        let keys = realisation::keys(dir, &drv, &mut |_| Ok(InputHash::Deferred))?;
        // The same for all outputs of a derivation.
        let Some(drv_hash) = keys.into_values().next() else { return Ok(None) };
        Ok(Some(Self { drv_path: modulo::drv_path(dir, &drv)?, drv_hash }))
    }
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
