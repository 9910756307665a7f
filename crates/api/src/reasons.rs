//! Reasons: every word that a condition's `reason` can be, in one table.
//!
//! A reason is a promise: scripts match on it. Words are added, never changed. Each says what kind of end it is, if
//! it is one, and what to do about it.

use std::fmt;
use std::fmt::Write as _;

/// What a reason means for the request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Work goes on.
    Progress,
    /// The end: outputs are there.
    Success,
    /// The end: the request, its class or its build is at fault. Trying again as it is gives the same.
    Failure,
    /// The machinery is at fault, or gave the build too little: not the builder's verdict, and another try elsewhere may
    /// come out otherwise. Counts against `retries.infrastructure`, and is the end when that is used up.
    Infrastructure,
}

/// The two numbers of `spec.retries`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Budget {
    Build,
    Infrastructure,
}

macro_rules! reasons {
    ($($name:ident $kind:ident $text:literal,)*) => {
        /// Why a condition is as it is.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[non_exhaustive]
        pub enum Reason {
            $(#[doc = $text] $name,)*
        }

        impl Reason {
            /// All of them, in the order of a request's life.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The word in a condition's `reason`.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// What it means and what to do, in one or two sentences.
            pub const fn description(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            pub const fn kind(self) -> Kind {
                match self { $(Self::$name => Kind::$kind,)* }
            }
        }
    };
}

reasons! {
    Pending Progress "The operator has not looked at the request yet.",
    Accepted Progress "The spec is valid and its class may be used.",
    Suspended Progress "`spec.suspend` is true. Set it to false to go on.",
    WaitingForClass Progress
        "The class does not exist, no class is the default, or a Secret that the class names is not as it should be; the \
         message says which.",
    WaitingForInput Progress
        "An input, or the `.drv` that `spec.drvPath` names, is not in the class's caches yet; the message names it, and the \
         request that will build it if there is one.",
    WaitingForSameBuild Progress "Another request in the namespace is building the same derivation.",
    WaitingForConcurrency Progress "The class's `concurrency` is used up; a builder that ends makes room.",
    WaitingForQuota Progress
        "A quota, an admission policy or the lack of the builders' namespace keeps the pod from being made; the message is \
         the API server's.",
    WaitingForNode Progress "No node has room for the pod. A cluster autoscaler would add one.",
    StartingBuilder Progress "The pod has a node and starts.",
    ImagePull Progress "The builder's image cannot be pulled yet; the message is the kubelet's.",
    Scheduled Progress "The pod has a node.",
    Connecting Progress "The operator dials the builder.",
    BuilderReady Progress "The builder answered.",
    CopyingInputs Progress "Inputs that the builder lacks are being sent.",
    InputsCopied Progress "Every input is in the builder's store, and locked.",
    Building Progress "The builder runs.",
    CollectingOutputs Progress "Outputs are being received and checked.",
    OutputsCollected Progress "Every output was received, checked and stored.",
    Retrying Progress "An attempt failed and another one will be made; the message says why and when.",
    Built Success "Built. `status.outputs` has the paths.",
    AlreadyBuilt Success "Every output was in the class's cache already; nothing was built.",
    BuildFailed Failure "The builder failed: its exit code and last lines are in `status.failure`.",
    TimedOut Failure "The build ran longer than `spec.timeoutSeconds`.",
    MaxSilentExceeded Failure "The build wrote nothing for `spec.maxSilentSeconds`.",
    LogLimitExceeded Failure "The build wrote more than `spec.maxLogBytes`.",
    OutputSizeLimitExceeded Failure "The outputs are larger than `spec.maxOutputBytes` of the request or its class.",
    OutputHashMismatch Failure
        "An output is not what was declared or what the builder said of it. For a fixed output, correct its hash.",
    OutputRejected Failure "An output breaks the derivation's own rules, such as `allowedReferences`.",
    NotDeterministic Failure "Builds of the same derivation differ; the message names the outputs.",
    InputMissing Failure
        "An input, or the `.drv` of the request, is in no cache and no request builds it; the message names it. Copy it to a \
         cache.",
    InputHashMismatch Failure "A cache delivered an input that is not what it announced. Repair the cache.",
    Cancelled Failure "`spec.cancel` was set.",
    Unplaceable Failure "No pod of this class can ever run; the message says why.",
    ClassNotAllowed Failure "The class is not for this namespace (`spec.allowedNamespaces` of the class).",
    WrongSystem Failure "The class has no builders for the derivation's system or features.",
    InvalidDerivation Failure "The derivation makes no sense; the message names the field.",
    PathNotProven Failure
        "An output path does not follow from what the request shows, and the class trusts nothing else.",
    DependencyFailed Failure "Another request that builds an input failed; the message names it. Mend that one first.",
    DependencyCycle Failure "Requests wait for each other's outputs; the message names them.",
    OutOfMemory Infrastructure "The build needed more memory than it has. Raise `spec.resources`.",
    DiskFull Infrastructure "The build needed more disk than it has. Raise `spec.resources`.",
    Evicted Infrastructure "The builder's pod was evicted, preempted or drained, or its node shut down.",
    NodeLost Infrastructure "The builder's node is gone or does not answer.",
    BuilderLost Infrastructure "Something else than the build ended its process, the builder or the builder's pod.",
    StartTimedOut Infrastructure
        "The builder did not answer in time: its image may not be there, or its pod cannot start; the message says more.",
    ConnectionLost Infrastructure "The connection to the builder broke, and the pod does not say why.",
    InfrastructureFailure Infrastructure
        "A node, a cache, a builder's machine or the operator failed; the message says what.",
}

impl Reason {
    /// Whether a request can end with it.
    pub const fn is_terminal(self) -> bool {
        !matches!(self.kind(), Kind::Progress)
    }

    /// Whether it counts against `retries.infrastructure`.
    pub const fn is_infrastructure(self) -> bool {
        matches!(self.kind(), Kind::Infrastructure)
    }

    /// What pays for another attempt after one that ended with it; None: the first is the last.
    pub const fn budget(self) -> Option<Budget> {
        match self {
            // Only the build itself can come out otherwise; a hash or a missing input stays what it is.
            Self::BuildFailed | Self::TimedOut | Self::MaxSilentExceeded => Some(Budget::Build),
            _ if self.is_infrastructure() => Some(Budget::Infrastructure),
            _ => None,
        }
    }

    /// The reason with this word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.as_str() == word)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The table for the documentation (`cargo xtask docs`).
pub fn markdown_table() -> String {
    let mut table =
        String::from("| reason | end | tried again | meaning and what to do |\n|---|---|---|---|\n");
    for reason in Reason::ALL {
        let end = match reason.kind() {
            Kind::Progress => "",
            Kind::Success => "success",
            Kind::Failure | Kind::Infrastructure => "failure",
        };
        let again = match (reason.budget(), reason.kind()) {
            (Some(Budget::Build), _) => "`retries.build`",
            (Some(Budget::Infrastructure), _) => "`retries.infrastructure`",
            (None, Kind::Failure) => "no",
            (None, _) => "",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(table, "| `{reason}` | {end} | {again} | {} |", reason.description());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_what_kubernetes_takes() {
        for reason in Reason::ALL {
            let word = reason.as_str();
            assert!(word.starts_with(|c: char| c.is_ascii_uppercase()), "{word}");
            assert!(word.chars().all(|c| c.is_ascii_alphanumeric()), "{word}");
            assert_eq!(Reason::parse(word), Some(*reason));
            assert!(reason.description().ends_with('.'), "{word}");
        }
        assert_eq!(Reason::parse("Nonsense"), None);
    }

    /// Whose budget pays, and what `drover` exits with, follow from this.
    #[test]
    fn what_the_machinery_is_at_fault_for() {
        let infrastructure: Vec<&str> =
            Reason::ALL.iter().filter(|reason| reason.is_infrastructure()).map(|r| r.as_str()).collect();
        assert_eq!(
            infrastructure,
            [
                "OutOfMemory",
                "DiskFull",
                "Evicted",
                "NodeLost",
                "BuilderLost",
                "StartTimedOut",
                "ConnectionLost",
                "InfrastructureFailure"
            ]
        );
    }

    #[test]
    fn table_has_them_all() {
        let table = markdown_table();
        assert_eq!(table.lines().count(), Reason::ALL.len() + 2);
        // A cell more or less would break the row.
        assert!(table.lines().all(|row| row.matches('|').count() == 5), "{table}");
        assert!(table.contains("| `BuildFailed` | failure | `retries.build` |"));
        assert!(table.contains("| `Evicted` | failure | `retries.infrastructure` |"));
        assert!(table.contains("| `Cancelled` | failure | no |"));
    }
}
