//! Archives: what the parser accepts is canonical, so that writing its events again gives the same bytes; it reads not a
//! byte beyond the end; and skipping, copying and stepping agree.

use drover_nix::nar::{self, Event, Reader, Writer};

use crate::session::{Steps, file_nar};

pub(super) fn check(data: &[u8]) {
    let mut skipper = Reader::new(data);
    let skipped = skipper.skip_all();
    let mut copied = Vec::new();
    let mut rest = Steps { bytes: data, step: 1 + data.len() % 13 };
    let copy = nar::copy(&mut rest, &mut copied);
    let again = rewrite(data);
    match skipped {
        Ok(size) => {
            let archive = &data[..usize::try_from(size).unwrap_or(usize::MAX)];
            assert_eq!(skipper.into_inner(), &data[archive.len()..], "what is left after skipping");
            assert!(copy.is_ok_and(|copy| copy == size), "copying does not accept what skipping does");
            assert_eq!((copied.as_slice(), rest.bytes), (archive, &data[archive.len()..]), "the copy");
            assert_eq!(again.as_deref().map_err(ToString::to_string), Ok(archive), "written again");
        }
        Err(error) => {
            assert!(copy.is_err() && again.is_err(), "only skipping says {error}");
            assert!(skipper.next().is_err(), "after an error every call fails");
        }
    }
}

/// By its events, contents in small pieces.
fn rewrite(data: &[u8]) -> Result<Vec<u8>, drover_nix::Error> {
    let mut reader = Reader::new(data);
    let mut writer = Writer::new(Vec::new());
    loop {
        let Some(event) = reader.next()? else { return writer.finish() };
        match event {
            Event::Directory => writer.directory()?,
            Event::Entry(name) => {
                assert!(!name.is_empty() && name != b"." && name != b"..", "{name:?}");
                assert!(!name.contains(&b'/') && !name.contains(&0) && name.len() <= nar::MAX_NAME_LEN);
                writer.entry(name)?;
            }
            Event::EndDirectory => writer.end_directory()?,
            Event::Symlink(target) => {
                assert!(!target.is_empty() && !target.contains(&0) && target.len() <= nar::MAX_TARGET_LEN);
                writer.symlink(target)?;
            }
            Event::File { executable, size } => {
                let (mut contents, mut piece) = (Vec::new(), [0; 100]);
                loop {
                    match reader.read_contents(&mut piece)? {
                        0 => break,
                        count => contents.extend_from_slice(&piece[..count]),
                    }
                }
                assert_eq!(contents.len() as u64, size);
                writer.file_bytes(executable, &contents)?;
            }
        }
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    [file_nar(b""), file_nar(b"hello\n"), file_nar(&[b'x'; 3000]), tree(), deep(nar::MAX_DEPTH - 1)].into()
}

/// Everything that the grammar has.
pub(super) fn tree() -> Vec<u8> {
    let write = || {
        let mut writer = Writer::new(Vec::new());
        writer.directory()?;
        writer.entry(b"bin")?;
        writer.directory()?;
        writer.entry(b"run")?;
        writer.file_bytes(true, b"#!/bin/sh\n")?;
        writer.entry(b"same")?;
        writer.symlink(b"run")?;
        writer.end_directory()?;
        writer.entry(b"empty")?;
        writer.directory()?;
        writer.end_directory()?;
        writer.entry(b"\xff odd name")?;
        writer.file_bytes(false, b"12345678")?;
        writer.end_directory()?;
        writer.finish()
    };
    write().unwrap_or_else(|error: drover_nix::Error| unreachable!("{error}"))
}

/// A file in so many directories.
fn deep(depth: usize) -> Vec<u8> {
    let write = || {
        let mut writer = Writer::new(Vec::new());
        for _ in 0..depth {
            writer.directory()?;
            writer.entry(b"d")?;
        }
        writer.file_bytes(false, b"deep")?;
        (0..depth).try_for_each(|_| writer.end_directory())?;
        writer.finish()
    };
    write().unwrap_or_else(|error: drover_nix::Error| unreachable!("{error}"))
}
