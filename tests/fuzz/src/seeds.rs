//! What a target starts from: inputs that this crate makes, sessions recorded from real Nix clients, and inputs that once
//! broke something.

use std::io;
use std::path::Path;

use drover_nix::StoreDir;
use drover_serve::serve;

use crate::Target;
use crate::session::Yes;
use crate::targets::Act;

impl Target {
    /// Everything to start from. `recordings` holds sessions as files `NAME.requests` and `NAME.answers`, the bytes of
    /// each direction; the targets that sessions are no input of do without.
    pub fn all_seeds(&self, recordings: Option<&Path>) -> io::Result<Vec<Vec<u8>>> {
        let mut seeds = (self.seeds)();
        seeds.extend(self.cases()?.into_iter().map(|(_, input)| input));
        if let Some(dir) = recordings {
            recorded(self.name, dir, &mut seeds)?;
        }
        Ok(seeds)
    }

    /// Inputs that once broke something, with the names of their files: `cases/TARGET/*.hex` beside this crate.
    pub fn cases(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases").join(self.name);
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut cases = Vec::new();
        for entry in entries {
            let path = entry?.path();
            let bytes = from_hex(&std::fs::read_to_string(&path)?)
                .ok_or_else(|| io::Error::other(format!("{} is not hexadecimal", path.display())))?;
            cases.push((path.display().to_string(), bytes));
        }
        cases.sort();
        Ok(cases)
    }
}

/// Bytes as text, 32 a line.
pub fn to_hex(bytes: &[u8]) -> String {
    let line = |line: &[u8]| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n";
    bytes.chunks(32).map(line).collect()
}

/// The reverse of [`to_hex`]; white space and lines that begin with `#` are passed over.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let digits: Vec<u8> = lines.flat_map(str::bytes).filter(|byte| !byte.is_ascii_whitespace()).collect();
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let byte = |pair: &[u8]| Some(value(*pair.first()?)? << 4 | value(*pair.get(1)?)?);
    digits.chunks(2).map(byte).collect()
}

fn recorded(target: &str, dir: &Path, seeds: &mut Vec<Vec<u8>>) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let requests = entry?.path();
        if requests.is_dir() {
            recorded(target, &requests, seeds)?;
        }
        if requests.extension().is_none_or(|extension| extension != "requests") {
            continue;
        }
        let (sent, answers) = (std::fs::read(&requests)?, std::fs::read(requests.with_extension("answers"))?);
        match target {
            "server" => seeds.push(sent),
            "client" => {
                let mut store = Yes::default();
                let end = serve(sent.as_slice(), io::sink(), &mut store, &StoreDir::default(), true);
                end.map_err(|error| io::Error::other(format!("{}: {error}", requests.display())))?;
                let acts = Act::of(&store.calls);
                let number = |act| Act::ALL.iter().position(|other| *other == act).unwrap_or_default() as u8;
                let mut seed = vec![acts.len() as u8];
                seed.extend(acts.into_iter().map(number));
                seed.extend(answers);
                seeds.push(seed);
            }
            // The archives and the build results in them.
            "nar" => seeds.extend(behind(&sent, b"\x0d\0\0\0\0\0\0\0nix-archive-1")),
            "build-result" => {
                let minor = sent.get(8).copied().unwrap_or_default();
                // A status and the length of an empty message; where such words begin is for the fuzzer to find out.
                let starts = (16..answers.len()).step_by(8).take(200);
                seeds.extend(starts.map(|at| [&[minor][..], &answers[at..]].concat()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What begins with each occurrence of `mark`, to the end.
fn behind(bytes: &[u8], mark: &[u8]) -> Vec<Vec<u8>> {
    bstr::ByteSlice::find_iter(bytes, mark).map(|at| bytes[at..].to_vec()).collect()
}
