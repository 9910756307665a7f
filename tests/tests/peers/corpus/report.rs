//! Where Drover may differ from Nix 2.34, why, and what the comparison of two implementations says. A difference that is
//! not listed fails, and so does one that is listed and gone.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use drover_nix::StorePath;
use drover_nix::hash_modulo::SelfReferenceHash;
use drover_serve::BuildStatus;
use drover_tests::corpus::Case;

use super::outcome::{Outcome, Outcomes};

/// A case with another status by intention.
struct Difference {
    case: &'static str,
    ours: BuildStatus,
    why: &'static str,
}

/// Nix answers `MiscFailure` for whatever it throws, and who asked has to take that for a fault of the machine, to be
/// tried on another one.
const NOT_THE_MACHINES_FAULT: &str =
    "the build's own fault, which another try or another machine cannot mend";

const DIFFERENCES: &[Difference] = &[
    Difference {
        case: "fixed-with-a-reference",
        ours: BuildStatus::OutputRejected,
        why: NOT_THE_MACHINES_FAULT,
    },
    Difference {
        case: "floating-flat-with-references",
        ours: BuildStatus::OutputRejected,
        why: NOT_THE_MACHINES_FAULT,
    },
    Difference {
        case: "floating-text-of-itself",
        ours: BuildStatus::OutputRejected,
        why: NOT_THE_MACHINES_FAULT,
    },
    Difference { case: "trees-fifo", ours: BuildStatus::OutputRejected, why: NOT_THE_MACHINES_FAULT },
    Difference { case: "trees-fifo-below", ours: BuildStatus::OutputRejected, why: NOT_THE_MACHINES_FAULT },
    Difference { case: "trees-too-deep", ours: BuildStatus::OutputRejected, why: NOT_THE_MACHINES_FAULT },
    Difference {
        case: "refused-without-the-sandbox",
        ours: BuildStatus::InputRejected,
        why: NOT_THE_MACHINES_FAULT,
    },
    Difference {
        case: "checks-allowed-below",
        ours: BuildStatus::Built,
        why: "as Nix 2.35: a path below an object stands for the object",
    },
];

/// What this builder cannot do yet, by the beginning of the case's name. To be empty.
const PENDING: &[&str] = &[];

/// Cases with content-addressed outputs that refer to themselves. Nix 2.34 leaves the offsets of these references out of
/// the hash that makes the path, Nix 2.35 and Drover digest them; Drover on demand does as 2.34.
pub(super) const SELF_REFERENCES: &[&str] = &[
    "floating-environment",
    "floating-files",
    "floating-is-itself",
    "floating-is-itself-in-binary",
    "floating-outputs-and-itself",
    "floating-structured",
    "impure-environment",
];

/// A case whose outputs are refused. Nix makes content-addressed outputs valid before it checks them, and leaves these
/// when the check fails; here only what was accepted becomes valid.
const LEFT_BY_NIX: &str = "floating-disallowed";

/// Whether the outcome of this case says nothing about Drover yet.
pub(super) fn is_pending(case: &str) -> bool {
    PENDING.iter().any(|start| case.starts_with(start))
}

/// The status that the case ends with here.
pub(super) fn ours(case: &Case) -> BuildStatus {
    DIFFERENCES.iter().find(|known| known.case == case.name).map_or(case.expect, |known| known.ours)
}

/// Whether what is in the stores may differ for this case.
pub(super) fn may_differ(case: &str) -> bool {
    DIFFERENCES.iter().any(|known| known.case == case) || is_pending(case) || SELF_REFERENCES.contains(&case)
}

/// Compares and prints one line a case. Fails with all that nobody has explained.
pub(super) fn compare(
    what: &str,
    cases: &[&Case],
    nix: &Outcomes,
    ours: &Outcomes,
    hash: SelfReferenceHash,
) -> Result<()> {
    let (mut same, mut intended, mut pending, mut wrong) = (0, 0, 0, Vec::new());
    println!("{what}: {} derivations", cases.len());
    for case in cases {
        let (theirs, ours) = (&nix[&case.name], &ours[&case.name]);
        let mut trouble = theirs.unexpected(case.expect);
        let known = DIFFERENCES.iter().find(|known| known.case == case.name);
        let offsets = hash == SelfReferenceHash::WithOffsets && SELF_REFERENCES.contains(&case.name.as_str());
        let verdict = match known {
            _ if is_pending(&case.name) => {
                pending += 1;
                "pending".to_owned()
            }
            Some(known) => {
                if ours.status != known.ours || theirs.status == known.ours {
                    trouble.push(format!("listed as {:?}, came out as {}", known.ours, ours.ended()));
                }
                intended += 1;
                format!("{:?} by intention: {}", ours.status, known.why)
            }
            None if offsets => {
                trouble.extend(offsets_apart(theirs, ours));
                intended += 1;
                "another path by intention: the offsets of references to itself are digested, as in Nix 2.35"
                    .to_owned()
            }
            None => {
                trouble.extend(theirs.differences(ours));
                same += usize::from(trouble.is_empty());
                "same".to_owned()
            }
        };
        let verdict = if trouble.is_empty() { verdict } else { format!("DIFFERS: {}", trouble.join("; ")) };
        let line = format!("{}: {:?}: {verdict}", case.name, theirs.status);
        println!("  {line}");
        if !trouble.is_empty() {
            wrong.push(line);
        }
    }
    println!(
        "{what}: {same} the same, {intended} different by intention, {pending} pending, {} unexplained",
        wrong.len()
    );
    ensure!(wrong.is_empty(), "{what}: not explained:\n{}", wrong.join("\n"));
    Ok(())
}

/// Compares what is valid after all builds, outputs of failed ones included.
pub(super) fn compare_stores(theirs: &BTreeSet<StorePath>, ours: &BTreeSet<StorePath>) -> Result<()> {
    let left = |path: &&StorePath| path.name().starts_with(LEFT_BY_NIX);
    ensure!(theirs.iter().any(|path| left(&path)), "Nix left nothing of {LEFT_BY_NIX}");
    let alone: Vec<_> = theirs.difference(ours).filter(|path| !left(path)).collect();
    let ours_alone: Vec<_> = ours.difference(theirs).collect();
    let same = alone.is_empty() && ours_alone.is_empty() && !ours.iter().any(|path| left(&path));
    ensure!(same, "valid in Nix's store alone: {alone:?}, in ours alone: {ours_alone:?}");
    Ok(())
}

/// Two outcomes that may differ in hashes, and have to differ in these alone, each by its own rule.
fn offsets_apart(theirs: &Outcome, ours: &Outcome) -> Vec<String> {
    let mut found = Vec::new();
    let mut expect = |holds: bool, what: &str| {
        if !holds {
            found.push(what.to_owned());
        }
    };
    expect(theirs.status == ours.status, "another status");
    expect(theirs.outputs.keys().eq(ours.outputs.keys()), "other outputs");
    for (theirs, ours) in theirs.outputs.values().zip(ours.outputs.values()) {
        expect(theirs.info.nar_size == ours.info.nar_size, "another size");
        expect(theirs.info.references.len() == ours.info.references.len(), "other references");
        expect(theirs.files == ours.files, "other files");
        let (Some(their_hashes), Some(our_hashes)) = (&theirs.modulo, &ours.modulo) else {
            expect(
                theirs.modulo.is_none() && ours.modulo.is_none(),
                "one refers to itself and the other does not",
            );
            continue;
        };
        let hash = |output: &super::outcome::Output| output.info.ca.as_ref().map(|ca| ca.hash.clone());
        expect(hash(theirs).as_ref() == Some(&their_hashes.without_offsets), "Nix 2.34 digests offsets");
        expect(hash(ours).as_ref() == Some(&our_hashes.with_offsets), "we do not digest offsets");
        expect(theirs.info.path != ours.info.path, "the same path");
    }
    found
}
