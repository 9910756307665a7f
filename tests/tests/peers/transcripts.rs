//! The protocol byte for byte: what real clients say, and what no installed Nix says any more.

use anyhow::{Result, ensure};
use drover_tests::record::record;

/// The client's magic number and version 2.7 (nix-serve-protocol: the greeting of Nix 2.4 to 2.34).
const HELLO: [u8; 16] = [0xeb, 0x9d, 0x0c, 0x39, 0, 0, 0, 0, 0x07, 0x02, 0, 0, 0, 0, 0, 0];
/// The server's, for them.
const ANSWER: [u8; 16] = [0xcb, 0xee, 0x52, 0x54, 0, 0, 0, 0, 0x07, 0x02, 0, 0, 0, 0, 0, 0];

#[test]
fn sessions_of_real_clients_can_be_recorded() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let recordings = record(dir.path())?;
    for recording in &recordings {
        let requests = std::fs::read(&recording.requests)?;
        let answers = std::fs::read(&recording.answers)?;
        ensure!(requests.starts_with(&HELLO), "{recording:?}: {:02x?}", requests.get(..16));
        ensure!(answers.starts_with(&ANSWER), "{recording:?}: {:02x?}", answers.get(..16));
    }
    Ok(())
}
