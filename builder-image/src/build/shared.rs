//! The builds that run in this process, so that a session that asks for one of them waits for it instead of building it
//! again: it sees the log from where it stands and gets the same end. Between processes the locks on outputs do
//! that, without the log.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_nix::{BasicDerivation, StorePath};
use drover_serve::{BuildOptions, BuildResult, BuildStatus};

use super::cancel::{Event, add_one, counter};
use super::log::{BuildLog, Log};
use crate::error::Error;

/// All builds of this process, by their outputs. Clones are one.
#[derive(Clone, Default)]
pub(crate) struct Registry {
    builds: Arc<Mutex<BTreeMap<Outputs, Arc<Shared>>>>,
}

/// The names of a build's locks: see [`super::targets::lock_names`].
type Outputs = BTreeSet<String>;

/// What makes two requests the same. The limits count too: who joins a build gets its end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Identity {
    pub drv_path: StorePath,
    pub drv: BasicDerivation,
    pub options: BuildOptions,
}

/// One build, as the sessions see it that want it.
pub(crate) struct Shared {
    identity: Identity,
    log: BuildLog,
    /// Wakes the thread that builds: someone joined or left.
    wake: OwnedFd,
    ended: Event,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    joined: usize,
    result: Option<BuildResult>,
}

/// What a session has to do with a build.
pub(crate) enum Entry {
    /// It builds.
    Own(Own),
    /// Another one builds the same already.
    Joined(Joined),
}

/// Held while building. Dropping it ends the build for those who joined, without a result if there is none.
pub(crate) struct Own {
    pub shared: Arc<Shared>,
    registry: Registry,
    outputs: Outputs,
    /// False where another build has these outputs that differs in something else: the locks decide between them.
    registered: bool,
}

/// Held while waiting for another session's build.
pub(crate) struct Joined {
    shared: Arc<Shared>,
}

impl Registry {
    /// Joins a build that is the same to the last option, or begins one.
    pub(crate) fn enter(&self, identity: Identity, outputs: Outputs, log: &Log) -> Result<Entry, Error> {
        let mut builds = lock(&self.builds);
        let present = builds.get(&outputs);
        if let Some(shared) = present.filter(|shared| shared.identity == identity) {
            lock(&shared.state).joined += 1;
            shared.log.join(log);
            shared.wake_up();
            return Ok(Entry::Joined(Joined { shared: Arc::clone(shared) }));
        }
        let registered = present.is_none();
        let shared = Arc::new(Shared::new(identity, log)?);
        if registered {
            builds.insert(outputs.clone(), Arc::clone(&shared));
        }
        Ok(Entry::Own(Own { shared, registry: self.clone(), outputs, registered }))
    }

    /// Begins a build that nobody can join, since each one is to make its own.
    pub(crate) fn enter_alone(&self, identity: Identity, log: &Log) -> Result<Entry, Error> {
        let shared = Arc::new(Shared::new(identity, log)?);
        Ok(Entry::Own(Own { shared, registry: self.clone(), outputs: Outputs::new(), registered: false }))
    }
}

impl Shared {
    fn new(identity: Identity, log: &Log) -> Result<Self, Error> {
        let failed = "make an event descriptor";
        Ok(Self {
            identity,
            log: BuildLog::new(log),
            wake: counter().map_err(Error::system(failed))?,
            ended: Event::new().map_err(Error::system(failed))?,
            state: Mutex::default(),
        })
    }

    pub(crate) fn log(&self) -> &BuildLog {
        &self.log
    }

    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn is_joined(&self) -> bool {
        lock(&self.state).joined > 0
    }

    fn wake_up(&self) {
        // It can only overflow, which leaves it readable.
        let _overflow = add_one(&self.wake);
    }
}

impl Own {
    /// Ends the build for those who joined, with its result.
    pub(crate) fn finish(self, result: &BuildResult) {
        lock(&self.shared.state).result = Some(result.clone());
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if self.registered {
            lock(&self.registry.builds).remove(&self.outputs);
        }
        self.shared.ended.set();
    }
}

impl Joined {
    pub(crate) fn ended(&self) -> &Event {
        &self.shared.ended
    }

    pub(crate) fn log(&self) -> &BuildLog {
        &self.shared.log
    }

    /// The build's end, as far as it is the derivation's own doing. None if it ended for a reason of its session's, and
    /// the next one has to try itself.
    pub(crate) fn result(&self) -> Option<BuildResult> {
        let result = lock(&self.shared.state).result.clone()?;
        if result.status.is_success() {
            let BuildResult { built_outputs, drv_hash, .. } = result;
            let already = BuildResult::new(BuildStatus::AlreadyValid);
            return Some(BuildResult { built_outputs, drv_hash, ..already });
        }
        (result.status != BuildStatus::MiscFailure).then_some(result)
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        lock(&self.shared.state).joined -= 1;
        self.shared.wake_up();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole between any two statements, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::build::testing::derivation;

    pub(crate) fn identity(timeout_seconds: u64) -> Identity {
        let options = BuildOptions { timeout_seconds, ..BuildOptions::default() };
        let drv_path = "i00sflxqsj37lfmf95m8mn0grv615hpj-x.drv".parse().unwrap();
        Identity { drv_path, drv: derivation(&[]), options }
    }

    pub(crate) fn shared() -> Shared {
        Shared::new(identity(0), &Log::to(std::io::sink())).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::identity;
    use super::*;

    fn enter(registry: &Registry, timeout: u64) -> Entry {
        let identity = identity(timeout);
        let outputs = [identity.drv_path.to_string()].into();
        registry.enter(identity, outputs, &Log::to(std::io::sink())).unwrap()
    }

    #[test]
    fn the_same_is_built_once() {
        let registry = Registry::default();
        let Entry::Own(own) = enter(&registry, 0) else { panic!("nobody builds it yet") };
        let Entry::Joined(joined) = enter(&registry, 0) else { panic!("it is built already") };
        assert!(own.shared.is_joined() && !joined.ended().is_set());
        own.finish(&BuildResult::new(BuildStatus::Built));
        assert!(joined.ended().is_set());
        assert_eq!(joined.result().unwrap().status, BuildStatus::AlreadyValid);
        assert!(matches!(enter(&registry, 0), Entry::Own(_)), "it is over");
    }

    #[test]
    fn what_differs_is_built_apart() {
        let registry = Registry::default();
        let Entry::Own(first) = enter(&registry, 0) else { panic!("nobody builds it yet") };
        let Entry::Own(second) = enter(&registry, 7) else { panic!("it has another limit") };
        drop(second);
        assert!(matches!(enter(&registry, 0), Entry::Joined(_)), "the first one still runs");
        drop(first);
    }

    #[test]
    fn what_is_entered_alone_is_not_joined() {
        let registry = Registry::default();
        let log = Log::to(std::io::sink());
        let Entry::Own(alone) = registry.enter_alone(identity(0), &log).unwrap() else {
            panic!("it is alone")
        };
        assert!(matches!(enter(&registry, 0), Entry::Own(_)));
        drop(alone);
    }

    #[test]
    fn a_build_without_an_end_of_its_own_gives_no_result() {
        let registry = Registry::default();
        for result in [None, Some(BuildResult::failure(BuildStatus::MiscFailure, "no"))] {
            let Entry::Own(own) = enter(&registry, 0) else { panic!("nobody builds it yet") };
            let Entry::Joined(joined) = enter(&registry, 0) else { panic!("it is built already") };
            match &result {
                Some(result) => own.finish(result),
                None => drop(own),
            }
            assert!(joined.ended().is_set() && joined.result().is_none());
        }
    }

    #[test]
    fn who_leaves_is_not_counted() {
        let registry = Registry::default();
        let Entry::Own(own) = enter(&registry, 0) else { panic!("nobody builds it yet") };
        drop(enter(&registry, 0));
        assert!(!own.shared.is_joined());
    }
}
