use drover_nix::{OutputName, Sha256, StorePath};
use drover_serve::{BuildResult, Version};

/// What happens in a session, as it happens. Sizes are bytes of NARs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The builder answered.
    Connected {
        version: Version,
    },
    /// How many paths the build needs, all told.
    ClosureComputed {
        paths: usize,
    },
    /// All of them are locked on the builder; so many it has, so many it lacks.
    Locked {
        valid: usize,
        missing: usize,
        missing_bytes: u64,
    },
    /// The builder is asked to fetch so many by itself. Until it answers nothing moves on the connection, with
    /// [`drover_serve::SLOWEST_FETCH`] for as long as that takes.
    FetchStarted {
        paths: usize,
        bytes: u64,
    },
    /// So many of these it has now.
    Fetched {
        paths: usize,
        bytes: u64,
    },
    /// What is left is sent to it.
    CopyStarted {
        path: StorePath,
        nar_size: u64,
    },
    /// A cache did not give what it says that it has, and is not asked for it for a while.
    CacheSetAside {
        cache: String,
        path: StorePath,
        why: String,
    },
    /// Now and then within a large path.
    CopyProgress {
        path: StorePath,
        bytes: u64,
    },
    Copied {
        path: StorePath,
        nar_size: u64,
    },
    /// The builder has confirmed every one.
    InputsCopied {
        paths: usize,
        bytes: u64,
    },
    BuildStarted,
    /// However it ended.
    Built {
        result: BuildResult,
    },
    OutputStarted {
        name: OutputName,
        path: StorePath,
        nar_size: u64,
    },
    /// So much of it had come in an earlier session, perhaps all.
    OutputKept {
        name: OutputName,
        bytes: u64,
    },
    OutputProgress {
        name: OutputName,
        bytes: u64,
    },
    /// Received and found to be what it must be.
    OutputReceived {
        name: OutputName,
        path: StorePath,
        nar_hash: Sha256,
        nar_size: u64,
    },
    /// All of them are received and checked. What follows is storing them, where the job says so.
    OutputsVerified {
        outputs: usize,
        bytes: u64,
    },
    /// In the cache now.
    OutputStored {
        name: OutputName,
        path: StorePath,
        cache: String,
    },
    OutputsCollected,
}

/// Listens to a session. Runs on the session's thread: what takes long here delays the build.
pub trait Observer: Send {
    fn event(&mut self, event: Event);
}

/// Closures observe.
impl<F: FnMut(Event) + Send> Observer for F {
    fn event(&mut self, event: Event) {
        self(event);
    }
}
