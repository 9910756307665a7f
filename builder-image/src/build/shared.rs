//! The builds that run in this process, so that a session that asks for one of them waits for it instead of building it
//! again: it sees the log from where it stands and gets the same end. Between processes the locks on outputs do
//! that, without the log. Builds that have ended are found again for a while ([`super::kept`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_nix::{BasicDerivation, StorePath};
use drover_serve::{BuildOptions, BuildResult, BuildStatus};

use super::cancel::{Cancel, Event, add_one, counter};
use super::kept::Kept;
use super::log::{BuildLog, Log};
use crate::error::Error;

/// All builds of this process, by their outputs. Clones are one.
#[derive(Clone)]
pub(crate) struct Registry {
    builds: Arc<Mutex<Builds>>,
    /// How long the end of a build is kept. Zero: nothing is.
    keep: Duration,
}

#[derive(Default)]
struct Builds {
    running: BTreeMap<Outputs, Arc<Shared>>,
    ended: Kept,
}

/// The names of a build's locks: see [`super::targets::lock_names`].
pub(super) type Outputs = BTreeSet<String>;

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
    /// Of the session that builds.
    owner: Cancel,
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

/// A session that asks for a build.
pub(crate) struct Asker<'a> {
    pub identity: Identity,
    pub outputs: Outputs,
    /// Every session that asks is to get a build of its own. One that lost its session is anybody's.
    pub alone: bool,
    pub log: &'a Log,
    pub cancel: &'a Cancel,
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
    alone: bool,
}

/// Held while waiting for another session's build.
pub(crate) struct Joined {
    shared: Arc<Shared>,
    was_left: bool,
}

impl Registry {
    /// One that keeps the ends of builds for so long.
    pub(crate) fn new(keep: Duration) -> Self {
        Self { builds: Arc::default(), keep }
    }

    /// Joins a build that is the same to the last option, whether it runs or has ended.
    pub(crate) fn join(&self, asker: &Asker<'_>) -> Option<Joined> {
        lock(&self.builds).join(asker)
    }

    /// Joins a build that is the same to the last option, or begins one. More of its log than memory has room for is
    /// kept in `spool`.
    pub(crate) fn enter(&self, asker: Asker<'_>, spool: Option<File>) -> Result<Entry, Error> {
        let mut builds = lock(&self.builds);
        if let Some(joined) = builds.join(&asker) {
            return Ok(Entry::Joined(joined));
        }
        let registered = !builds.running.contains_key(&asker.outputs);
        let Asker { identity, outputs, alone, log, cancel } = asker;
        let shared = Arc::new(Shared::new(identity, cancel.clone(), log, spool)?);
        if registered {
            builds.running.insert(outputs.clone(), Arc::clone(&shared));
        }
        Ok(Entry::Own(Own { shared, registry: self.clone(), outputs, registered, alone }))
    }

    /// What it ended with is good for nothing any more.
    pub(crate) fn forget(&self, joined: &Joined) {
        lock(&self.builds).ended.forget(&joined.shared);
    }
}

impl Builds {
    fn join(&mut self, asker: &Asker<'_>) -> Option<Joined> {
        let running = self.running.get(&asker.outputs).filter(|shared| shared.identity == asker.identity);
        let free = running.filter(|shared| !asker.alone || shared.is_left());
        let shared = match free.cloned() {
            Some(shared) => shared,
            None => {
                let ended = self.ended.find(&asker.identity, &asker.outputs, Instant::now())?;
                if asker.alone {
                    self.ended.forget(&ended);
                }
                ended
            }
        };
        let was_left = shared.is_left();
        lock(&shared.state).joined += 1;
        shared.log.join(asker.log);
        shared.wake_up();
        Some(Joined { shared, was_left })
    }
}

impl Shared {
    fn new(identity: Identity, owner: Cancel, log: &Log, spool: Option<File>) -> Result<Self, Error> {
        let failed = "make an event descriptor";
        Ok(Self {
            identity,
            owner,
            log: BuildLog::new(log, spool),
            wake: counter().map_err(Error::system(failed))?,
            ended: Event::new().map_err(Error::system(failed))?,
            state: Mutex::default(),
        })
    }

    pub(crate) fn log(&self) -> &BuildLog {
        &self.log
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// No session has it: the one that builds has lost its client, and no other waits.
    fn is_left(&self) -> bool {
        self.owner.is_cancelled() && !self.is_joined()
    }

    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn is_joined(&self) -> bool {
        lock(&self.state).joined > 0
    }

    /// There is a result that is worth keeping: what was there before the build needs no keeping.
    fn has_end(&self) -> bool {
        let state = lock(&self.state);
        state
            .result
            .as_ref()
            .is_some_and(|result| counts(result) && result.status != BuildStatus::AlreadyValid)
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

    /// Whether a session could find it again whose client comes back.
    pub(crate) fn can_be_found(&self) -> bool {
        self.registered
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.shared.log.end();
        if self.registered {
            let mut builds = lock(&self.registry.builds);
            builds.running.remove(&self.outputs);
            // One that is its session's own is kept only if that session cannot have had its answer.
            let wanted = self.shared.has_end() && (!self.alone || self.shared.is_left());
            if wanted && !self.registry.keep.is_zero() {
                let (outputs, shared) = (std::mem::take(&mut self.outputs), Arc::clone(&self.shared));
                builds.ended.keep(outputs, shared, self.registry.keep, Instant::now());
            }
        }
        self.shared.ended.set();
    }
}

impl Joined {
    pub(crate) fn ended(&self) -> &Event {
        &self.shared.ended
    }

    /// Nobody had it: its session's client was gone.
    pub(crate) fn was_left(&self) -> bool {
        self.was_left
    }

    /// The build's end, as far as it is the derivation's own doing. None if it ended for a reason of its session's, and
    /// the next one has to try itself.
    pub(crate) fn result(&self) -> Option<BuildResult> {
        let result = lock(&self.shared.state).result.clone().filter(counts)?;
        if result.status.is_success() {
            let BuildResult { built_outputs, drv_hash, .. } = result;
            let already = BuildResult::new(BuildStatus::AlreadyValid);
            return Some(BuildResult { built_outputs, drv_hash, ..already });
        }
        Some(result)
    }
}

/// Whether it says something of the derivation, or of what became of it; not only of the session that asked.
fn counts(result: &BuildResult) -> bool {
    result.status != BuildStatus::MiscFailure
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
        Shared::new(identity(0), Cancel::new().unwrap(), &Log::to(std::io::sink()).unwrap(), None).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::identity;
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A client, and what it asks for.
    struct Session {
        cancel: Cancel,
        timeout: u64,
        alone: bool,
    }

    fn session() -> Session {
        Session { cancel: Cancel::new().unwrap(), timeout: 0, alone: false }
    }

    impl Session {
        fn enter(&self, registry: &Registry) -> Entry {
            let identity = identity(self.timeout);
            let outputs = [identity.drv_path.to_string()].into();
            let (log, cancel) = (&Log::to(std::io::sink()).unwrap(), &self.cancel);
            registry.enter(Asker { identity, outputs, alone: self.alone, log, cancel }, None).unwrap()
        }

        fn owns(&self, registry: &Registry) -> Own {
            let Entry::Own(own) = self.enter(registry) else { panic!("it is built already") };
            own
        }

        fn joins(&self, registry: &Registry) -> Joined {
            let Entry::Joined(joined) = self.enter(registry) else { panic!("nobody builds it") };
            joined
        }
    }

    #[test]
    fn the_same_is_built_once() {
        let registry = Registry::new(Duration::ZERO);
        let own = session().owns(&registry);
        let joined = session().joins(&registry);
        assert!(own.shared.is_joined() && !joined.ended().is_set() && !joined.was_left());
        own.finish(&BuildResult::new(BuildStatus::Built));
        assert!(joined.ended().is_set());
        assert_eq!(joined.result().unwrap().status, BuildStatus::AlreadyValid);
        drop(session().owns(&registry));
    }

    #[test]
    fn what_differs_is_built_apart() {
        let registry = Registry::new(HOUR);
        let first = session().owns(&registry);
        let second = Session { timeout: 7, ..session() }.owns(&registry);
        assert!(first.can_be_found() && !second.can_be_found());
        drop(second);
        session().joins(&registry);
    }

    #[test]
    fn an_end_is_kept_for_who_comes_back() {
        let registry = Registry::new(HOUR);
        for (status, again) in [
            (BuildStatus::PermanentFailure, BuildStatus::PermanentFailure),
            (BuildStatus::Built, BuildStatus::AlreadyValid),
        ] {
            let own = session().owns(&registry);
            own.finish(&BuildResult::failure(status, "why"));
            for _ in 0..2 {
                let joined = session().joins(&registry);
                assert!(joined.ended().is_set());
                assert_eq!(joined.result().unwrap().status, again);
            }
            registry.forget(&session().joins(&registry));
        }
        session().owns(&registry).finish(&BuildResult::new(BuildStatus::Built));
        drop(Session { timeout: 7, ..session() }.owns(&registry));
    }

    #[test]
    fn what_is_each_ones_own_is_not_joined_while_it_has_someone() {
        let registry = Registry::new(HOUR);
        let (first, other) = (Session { alone: true, ..session() }, Session { alone: true, ..session() });
        let own = first.owns(&registry);
        drop(other.owns(&registry));
        // Its client is gone, and comes back.
        first.cancel.cancel();
        let joined = other.joins(&registry);
        assert!(joined.was_left());
        drop(session_alone().owns(&registry));
        drop(joined);
        own.finish(&BuildResult::new(BuildStatus::Built));
        // Nobody had that answer; the first who asks has.
        assert!(other.joins(&registry).was_left());
        let own = other.owns(&registry);
        own.finish(&BuildResult::new(BuildStatus::Built));
        drop(other.owns(&registry));
    }

    fn session_alone() -> Session {
        Session { alone: true, ..session() }
    }

    #[test]
    fn a_build_without_an_end_of_its_own_gives_no_result() {
        let registry = Registry::new(HOUR);
        for result in [None, Some(BuildResult::failure(BuildStatus::MiscFailure, "no"))] {
            let own = session().owns(&registry);
            let joined = session().joins(&registry);
            match &result {
                Some(result) => own.finish(result),
                None => drop(own),
            }
            assert!(joined.ended().is_set() && joined.result().is_none());
        }
    }

    #[test]
    fn who_leaves_is_not_counted() {
        let registry = Registry::new(HOUR);
        let own = session().owns(&registry);
        drop(session().enter(&registry));
        assert!(!own.shared.is_joined());
    }
}
