//! The commands that look after a store: `verify` and `gc`.

#![allow(clippy::unwrap_used)] // all of it is tests

mod common;

use std::process::Command;

use common::{Builder, User};
use drover_cache::{FRAME, NarSpool};

fn command(builder: &Builder, args: &[&str]) -> (bool, String) {
    let store = builder.root.path();
    let output = Command::new(common::BUILDER).args(args).arg("--store").arg(store).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn verify_and_collect() {
    let mut builder = Builder::start(User::Current);
    let drv = builder.derivation("echo data > $out");
    builder.build(&drv, &Default::default());
    let out = common::out(&drv);
    assert_eq!(
        command(&builder, &["verify", "--check-contents"]),
        (true, "2 paths checked, 0 problems\n".into())
    );
    // A session that goes on keeps what it made.
    let (success, text) = command(&builder, &["gc"]);
    assert!(success && text.starts_with("0 paths deleted"), "{text}");
    builder.finish();

    let file = builder.store_file(&out);
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::write(&file, "changed").unwrap();
    let (success, text) = command(&builder, &["verify", "--check-contents"]);
    assert!(!success && text.contains(out.as_str()), "{text}");

    let (success, text) = command(&builder, &["gc"]);
    assert!(success && text.starts_with("2 paths deleted"), "{text}");
    assert!(!file.exists());
}

/// Large enough that the builder would rather have the kernel move it.
#[test]
fn the_rest_of_a_large_path_and_its_frames() {
    let mut builder = Builder::start(User::Current);
    let tree = tempfile::tempdir().unwrap();
    let contents: Vec<u8> = (0..700_000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
    std::fs::write(tree.path().join("large"), contents).unwrap();
    let client = builder.client();
    let path = common::add(client, "large", tree.path());
    let mut whole = Vec::new();
    let size = client.dump_store_path(&path, &mut whole).unwrap();
    assert!(client.knows_frames().unwrap());
    for offset in [0, 1, 70_000, FRAME + 1, whole.len() - 1, whole.len()] {
        let mut rest = Vec::new();
        client.dump_store_path_from(&path, offset as u64, size, &mut rest).unwrap();
        assert!(rest == whole[offset..], "{offset}");
        let spools = tempfile::tempdir().unwrap();
        let mut spool = NarSpool::new(spools.path(), []).unwrap();
        let mut frames = client.dump_store_path_frames(&path, offset as u64).unwrap();
        let (mut frame, mut content, mut unpacked) = (Vec::new(), Vec::new(), Vec::new());
        while frames.next(&mut frame).unwrap() {
            spool.frame(&frame, (whole.len() - offset - unpacked.len()) as u64, &mut content).unwrap();
            unpacked.extend_from_slice(&content);
        }
        assert!(unpacked == whole[offset..], "{offset}");
    }
    builder.finish();
}

#[test]
fn mistakes_are_told_in_a_line() {
    for (args, why) in [
        (&["frobnicate"][..], "unknown argument"),
        (&["serve", "--store", "ssh://host"], "only local stores"),
        (&["serve", "--sandbox-shell", "/no/such/shell"], "cannot use /no/such/shell"),
        (&["serve", "--store", "/no/such/store"], "there is no store"),
    ] {
        let output = Command::new(common::BUILDER).args(args).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && text.contains(why) && text.lines().count() == 1,
            "{args:?}: {text}"
        );
    }
}
