//! What real clients say to the builder: that it can be recorded, and that it is what the tables of the protocol say.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail, ensure};
use drover_tests::record::record;
use drover_tests::{Nix, Remote};

use super::notation::{client_hello, server_hello};

/// A cursor over a client's bytes.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    fn skip(&mut self, len: usize) -> Result<&'a [u8]> {
        let (skipped, rest) = self.0.split_at_checked(len).context("the recording is cut off")?;
        self.0 = rest;
        Ok(skipped)
    }

    fn word(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.skip(8)?.try_into()?))
    }

    fn words(&mut self, count: usize) -> Result<Vec<u64>> {
        (0..count).map(|_| self.word()).collect()
    }

    fn text(&mut self) -> Result<&'a [u8]> {
        let len = self.word()? as usize;
        let padded = self.skip(len.next_multiple_of(8))?;
        let (text, padding) = padded.split_at(len);
        ensure!(padding.iter().all(|byte| *byte == 0), "padding");
        Ok(text)
    }

    /// A list of groups of so many strings.
    fn list(&mut self, strings: u64) -> Result<()> {
        let count = self.word()?;
        (0..count * strings).try_for_each(|_| self.text().map(drop))
    }

    /// A request of protocol 2.7, and the number of its command.
    fn request(&mut self) -> Result<u64> {
        let command = self.word()?;
        match command {
            1 => {
                let [lock, _substitute] = self.words(2)?[..] else { bail!("two words") };
                ensure!(lock == 0, "these clients do not lock");
                self.list(1)?;
            }
            2 => self.list(1)?,
            3 => drop(self.text()?),
            6 => {
                self.list(1)?;
                self.words(6)?;
            }
            7 => {
                self.word()?;
                self.list(1)?;
            }
            8 => {
                ensure!(self.text()?.ends_with(b".drv"), "the name of a derivation");
                self.list(4)?;
                self.list(1)?;
                ensure!(self.text()? == b"x86_64-linux" && self.text()? == b"/bin/sh");
                self.list(1)?;
                self.list(2)?;
                let options = self.words(6)?;
                ensure!(options[3] == 0, "repeats are 0 unless they are asked for: {options:?}");
            }
            9 => {
                self.text()?;
                self.text()?;
                let hash = self.text()?;
                ensure!(
                    hash.len() == 64 && hash.iter().all(u8::is_ascii_hexdigit),
                    "bare hexadecimal digits"
                );
                self.list(1)?;
                let [_time, size, ultimate] = self.words(3)?[..] else { bail!("three words") };
                ensure!(ultimate == 0, "clients since 2.8 never say that they built it");
                self.list(1)?;
                self.text()?;
                ensure!(self.skip(usize::try_from(size)?)?.starts_with(b"\x0d\0\0\0\0\0\0\0nix-archive-1"));
            }
            other => bail!("command {other}"),
        }
        Ok(command)
    }
}

#[test]
fn real_clients_say_what_the_tables_say() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let recordings = record(dir.path())?;
    for nix in Nix::ALL {
        let mut said = BTreeSet::new();
        for recording in recordings.iter().filter(|recording| recording.nix == nix) {
            let requests = std::fs::read(&recording.requests)?;
            let answers = std::fs::read(&recording.answers)?;
            ensure!(requests.starts_with(&client_hello(0x207)), "{recording:?}: {:02x?}", requests.get(..16));
            ensure!(answers.starts_with(&server_hello(0x207)), "{recording:?}: {:02x?}", answers.get(..16));
            let mut words = Words(&requests[16..]);
            while !words.0.is_empty() {
                said.insert(words.request().with_context(|| format!("{recording:?}"))?);
            }
        }
        // ImportPaths and ExportPaths are for Hydra and for older ones.
        ensure!(said == [1, 2, 3, 6, 7, 8, 9].into(), "{nix:?} sent {said:?}");
    }
    Ok(())
}

#[test]
fn a_look_at_a_store_is_a_greeting_and_nothing_more() -> Result<()> {
    for nix in Nix::ALL {
        let dir = tempfile::tempdir()?;
        let remote = Remote::recording(nix, dir.path())?;
        remote.nix(&["store", "ping", "--store", &remote.uri("server")])?;
        for entry in std::fs::read_dir(dir.path())? {
            let entry = entry?.path();
            let bytes = std::fs::read(&entry)?;
            let greetings = [client_hello(0x207), server_hello(0x207)];
            ensure!(greetings.contains(&bytes), "{nix:?}: {}: {bytes:02x?}", entry.display());
        }
    }
    Ok(())
}
