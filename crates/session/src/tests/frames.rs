//! Outputs that come compressed: stored as they came, resumed, and whatever a builder may make of frames.

use std::io::Write;

use drover_cache::{FRAME, FrameWriter};

use super::again::{AROUND, Cut, Line, is_lost, noise};
use super::*;

/// Bytes of the large output's file: several frames, the last of them not full.
const LARGE: usize = 4 * FRAME + FRAME / 2;

/// What an honest builder sends.
fn frames(nar: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut writer = FrameWriter::new(|frame: &[u8]| {
        frames.push(frame.to_vec());
        Ok(())
    });
    writer.write_all(nar).unwrap();
    writer.finish().unwrap();
    frames
}

fn large() -> Vec<u8> {
    (0..).flat_map(noise).take(LARGE).collect()
}

/// A builder whose output `out` has that archive, and which compresses by `framer`.
fn line(nar: Vec<u8>, framer: impl FnMut(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Line {
    let mut line = Line::good();
    line.store().builder = Some(Box::new(move |store, _, derivation, _| {
        let result = build(store, derivation);
        let (info, there) = store.paths.get_mut(&result.built_outputs["out"].path).unwrap();
        (info.nar_hash, info.nar_size) = (Sha256::of(&nar), nar.len() as u64);
        info.references.clear();
        there.clone_from(&nar);
        result
    }));
    line.store().framer = Some(Box::new(framer));
    line
}

/// How a session ends in which the builder sends that instead of what it should, and that nothing was stored of it.
fn ends(nar: Vec<u8>, spoil: impl FnMut(&mut Vec<Vec<u8>>) + Send + 'static) -> Failure {
    let mut spoil = spoil;
    let framer = move |rest: &[u8]| {
        let mut sent = frames(rest);
        spoil(&mut sent);
        sent
    };
    let mut line = line(nar, framer);
    let (result, events) = line.session(&Cut::default());
    assert!(!events.iter().any(|event| matches!(event, Event::OutputStored { .. })));
    // The one that was whole may be kept for another session; nothing is kept of the one that was not.
    line.job.kept = Arc::default();
    assert_eq!(std::fs::read_dir(line.spool.path()).unwrap().count(), 0);
    result.unwrap_err()
}

fn rejected(failure: &Failure, why: &str) {
    // Another builder may do better.
    assert_eq!((failure.reason, failure.infrastructure), (Reason::InfrastructureFailure, true), "{failure}");
    assert!(failure.message.contains(why), "{failure}");
}

fn verdict(failure: &Failure, reason: Reason) {
    assert_eq!((failure.reason, failure.infrastructure), (reason, false), "{failure}");
}

#[test]
fn a_large_output_comes_compressed_and_a_small_one_does_not() {
    let nar = file_nar(&large());
    let mut line = line(nar.clone(), frames);
    let outcome = line.session(&Cut::default()).0.unwrap();
    let out = &outcome.outputs["out"];
    assert_eq!((out.nar_hash, out.nar_size), (Sha256::of(&nar), nar.len() as u64));
    let calls: Vec<_> = line.store().calls.iter().filter(|call| call.starts_with("dump")).cloned().collect();
    let dev = &outcome.outputs["dev"].path;
    assert_eq!(calls, [format!("dump {dev}"), format!("dump-frames {} 0", out.path)]);
    // The bytes are those that came.
    let sizes = [frames(&nar).concat().len() as u64, 1000];
    assert!((sizes[0]..sizes[0] + sizes[1]).contains(&outcome.transfer.bytes_stored));

    // Where nothing is stored, nobody needs it compressed.
    let mut line = self::line(nar, frames);
    line.job.push = None;
    line.session(&Cut::default()).0.unwrap();
    assert!(!line.store().calls.iter().any(|call| call.starts_with("dump-frames")));
}

#[test]
fn a_compressed_output_goes_on_behind_the_last_whole_frame() {
    let nar = file_nar(&large());
    let mut whole = line(nar.clone(), frames);
    let expected = whole.session(&Cut::default()).0.unwrap().outputs;
    let all = whole.received;
    for step in 1..=9 {
        let at = all * step / 9 - 4;
        for second in [None, Some(all / 3)] {
            let mut line = line(nar.clone(), frames);
            let cuts = [Some(at), second].into_iter().flatten().map(Some).chain([None]);
            let mut ended = cuts.map(|answers| line.session(&Cut { answers, ..Cut::default() }).0);
            assert!(is_lost(&ended.next().unwrap()));
            let outcome = ended.find(|result| !is_lost(result)).unwrap().unwrap();
            drop(ended);
            assert_eq!(outcome.outputs, expected, "{at} {second:?}");
            let lost = 2 * (FRAME as u64 + AROUND);
            assert!(line.received < all + lost, "{at} {second:?}: {} of {all}", line.received);
            assert_eq!(std::fs::read_dir(line.spool.path()).unwrap().count(), 0);
        }
    }
}

#[test]
fn a_builder_program_of_another_version_goes_on() {
    let nar = file_nar(&large());
    for compresses in [[true, false, true], [false, true, false]] {
        let mut line = line(nar.clone(), frames);
        for (turn, compresses) in compresses.into_iter().enumerate() {
            line.store().framer = if compresses { Some(Box::new(frames)) } else { None };
            let answers = if turn < 2 { Some(2 * FRAME as u64 - 1000) } else { None };
            let (result, _) = line.session(&Cut { answers, ..Cut::default() });
            match turn {
                0 | 1 => assert!(is_lost(&result)),
                _ => assert_eq!(result.unwrap().outputs["out"].nar_hash, Sha256::of(&nar)),
            }
        }
        assert!(line.received < (nar.len() + 2 * FRAME) as u64 + 3 * AROUND);
    }
}

#[test]
fn frames_of_something_else() {
    let nar = file_nar(&large());
    let mut other = nar.clone();
    other[LARGE - 5] ^= 1;
    let failure = ends(nar.clone(), move |sent| *sent = frames(&other));
    verdict(&failure, Reason::OutputHashMismatch);

    // Of something else from where it goes on.
    let mut line = line(nar, frames);
    assert!(is_lost(&line.session(&Cut { answers: Some(3 * FRAME as u64), ..Cut::default() }).0));
    line.store().framer = Some(Box::new(|rest| {
        let mut other = rest.to_vec();
        other[1000] ^= 1;
        frames(&other)
    }));
    verdict(&line.session(&Cut::default()).0.unwrap_err(), Reason::OutputHashMismatch);
}

#[test]
fn more_than_was_announced() {
    // In frames of its own.
    let failure = ends(file_nar(&large()), |sent| sent.push(frames(b"more").concat()));
    verdict(&failure, Reason::OutputHashMismatch);
    assert!(failure.message.contains("bytes arrive"), "{failure}");
    // A bomb in the last frame.
    let failure =
        ends(file_nar(&large()), |sent| *sent.last_mut().unwrap() = frames(&vec![0; FRAME]).concat());
    rejected(&failure, "1048576 bytes of the archive in it instead of");
    // Announced as well, behind an archive.
    let failure = ends([file_nar(&large()), vec![0; 100]].concat(), |_| {});
    verdict(&failure, Reason::OutputRejected);
    assert!(failure.message.contains("100 bytes stand behind it"), "{failure}");
    let failure = ends([file_nar(&large()), vec![0; 3 * FRAME]].concat(), |_| {});
    verdict(&failure, Reason::OutputRejected);
}

#[test]
fn less_than_was_announced() {
    let failure = ends(file_nar(&large()), |sent| drop(sent.pop()));
    verdict(&failure, Reason::OutputRejected);
    let failure = ends(file_nar(&large()), Vec::clear);
    verdict(&failure, Reason::OutputRejected);
    rejected(&ends(file_nar(&large()), |sent| drop(sent.remove(2))), "instead of");
}

#[test]
fn what_is_in_a_frame_beside_the_archive() {
    let skippable = || [&0x184d_2a50_u32.to_le_bytes()[..], &4u32.to_le_bytes(), b"more"].concat();
    let nar = || file_nar(&large());
    rejected(&ends(nar(), move |sent| sent.insert(1, skippable())), "no zstd frame");
    rejected(&ends(nar(), move |sent| sent[1].extend(skippable())), "12 bytes stand behind it");
    rejected(&ends(nar(), |sent| sent[4].push(0)), "1 bytes stand behind it");
    rejected(&ends(nar(), |sent| sent[4].extend(frames(b"more").concat())), "stand behind it");
    rejected(&ends(nar(), |sent| *sent[2].last_mut().unwrap() ^= 1), "does not decompress");
    rejected(&ends(nar(), |sent| sent[2].truncate(100_000)), "not whole");
    rejected(&ends(nar(), |sent| sent[3] = vec![b'x'; 1000]), "no zstd frame");
}

#[test]
fn a_frame_that_is_too_long() {
    let failure = ends(file_nar(&large()), |sent| sent[1].resize(3 << 20, 0));
    rejected(&failure, "too long");
}

#[test]
fn no_archive_at_all() {
    let failure = ends(large(), |_| {});
    verdict(&failure, Reason::OutputRejected);
    // Found out as well where it comes in parts.
    let mut line = line([file_nar(&large()), vec![0; 100]].concat(), frames);
    assert!(is_lost(&line.session(&Cut { answers: Some(3 * FRAME as u64), ..Cut::default() }).0));
    verdict(&line.session(&Cut::default()).0.unwrap_err(), Reason::OutputRejected);
}
