//! narinfo files: what a binary cache says about a path (Nix: nar-info.cc).

use std::collections::BTreeSet;
use std::fmt;
use std::fmt::Write as _;

use bstr::ByteSlice as _;

use crate::{Error, PathInfo, Sha256, StoreDir, StorePath};

/// Most bytes of a narinfo file that are read.
pub const MAX_LEN: usize = 1 << 20;

/// How a cache stores a NAR. Names as in the `Compression` line; others are refused when they are fetched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    Bzip2,
    Gzip,
    None,
    Xz,
    Zstd,
    /// One that Nix knows and this crate does not offer: brotli, lz4 and older ones.
    Other(&'static str),
}

/// Nix: compression-algo.hh, those that [`Compression`] has no variant for.
const OTHERS: [&str; 8] = ["br", "compress", "grzip", "lrzip", "lz4", "lzip", "lzma", "lzop"];

impl Compression {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bzip2 => "bzip2",
            Self::Gzip => "gzip",
            Self::None => "none",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Other(name) => name,
        }
    }

    /// What a NAR file's name ends in (Nix: binary-cache-store.cc).
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Bzip2 => ".bz2",
            Self::Xz => ".xz",
            Self::Zstd => ".zst",
            Self::Gzip | Self::None | Self::Other(_) => "",
        }
    }

    /// None for a name that Nix does not know either. An empty one means bzip2, as it did before the line existed.
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "" | "bzip2" => Self::Bzip2,
            "gzip" => Self::Gzip,
            "none" => Self::None,
            "xz" => Self::Xz,
            "zstd" => Self::Zstd,
            _ => Self::Other(OTHERS.into_iter().find(|other| *other == name)?),
        })
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NarInfo {
    pub info: PathInfo,
    /// Relative to the cache's root, or absolute.
    pub url: String,
    pub compression: Compression,
    pub file_hash: Option<Sha256>,
    pub file_size: Option<u64>,
}

impl NarInfo {
    /// Parses a whole file. Every line must be complete; keys that Nix does not know are passed over.
    pub fn parse(dir: &StoreDir, text: &[u8]) -> Result<Self, Error> {
        if text.len() > MAX_LEN {
            return Err(fail("all", format!("the file has {} bytes; {MAX_LEN} are allowed", text.len())));
        }
        let text = text.to_str().map_err(|_| fail("all", "the file is not UTF-8".into()))?;
        let mut fields = Fields::default();
        let mut rest = text;
        while !rest.is_empty() {
            let (line, after) = rest.split_once('\n').ok_or_else(|| {
                fail("all", "the last line does not end, so the file may be cut off".into())
            })?;
            rest = after;
            let (key, value) = line.split_once(':').ok_or_else(|| {
                fail("all", format!("line {:?} has no colon", line.chars().take(80).collect::<String>()))
            })?;
            // Nix skips one character after the colon, which everybody makes a space.
            let value = value.strip_prefix(' ').unwrap_or(value);
            fields.take(dir, key, value)?;
        }
        fields.complete()
    }

    /// The file as Nix writes it, to the byte.
    pub fn print(&self, dir: &StoreDir) -> String {
        let mut text = String::with_capacity(1024);
        let mut line = |key: &str, value: &dyn fmt::Display| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{key}: {value}");
        };
        line("StorePath", &dir.full(&self.info.path));
        line("URL", &self.url);
        line("Compression", &self.compression);
        if let Some(hash) = &self.file_hash {
            line("FileHash", hash);
        }
        if let Some(size) = &self.file_size {
            line("FileSize", size);
        }
        line("NarHash", &self.info.nar_hash);
        line("NarSize", &self.info.nar_size);
        let references: Vec<&str> = self.info.references.iter().map(StorePath::as_str).collect();
        line("References", &references.join(" "));
        if let Some(deriver) = &self.info.deriver {
            line("Deriver", deriver);
        }
        for signature in &self.info.signatures {
            line("Sig", signature);
        }
        if let Some(ca) = &self.info.ca {
            line("CA", ca);
        }
        text
    }
}

/// The lines so far.
#[derive(Default)]
struct Fields {
    path: Option<StorePath>,
    url: Option<String>,
    compression: Option<Compression>,
    file_hash: Option<Sha256>,
    file_size: Option<u64>,
    nar_hash: Option<Sha256>,
    nar_size: Option<u64>,
    references: Option<BTreeSet<StorePath>>,
    deriver: Option<StorePath>,
    signatures: Vec<crate::signature::Signature>,
    ca: Option<crate::ContentAddress>,
}

impl Fields {
    fn take(&mut self, dir: &StoreDir, key: &str, value: &str) -> Result<(), Error> {
        match key {
            "StorePath" => {
                set("StorePath", &mut self.path, value, |value| dir.parse(value.as_bytes()))?;
            }
            "URL" if value.is_empty() => return Err(fail("URL", "it is empty".into())),
            "URL" => set("URL", &mut self.url, value, |value| Ok::<_, Error>(value.to_owned()))?,
            "Compression" => set("Compression", &mut self.compression, value, |value| {
                Compression::parse(value)
                    .ok_or_else(|| format!("{value:?} is not a compression that Nix knows"))
            })?,
            "FileHash" => set("FileHash", &mut self.file_hash, value, prefixed_hash)?,
            "FileSize" => set("FileSize", &mut self.file_size, value, str::parse)?,
            "NarHash" => set("NarHash", &mut self.nar_hash, value, prefixed_hash)?,
            "NarSize" => set("NarSize", &mut self.nar_size, value, str::parse)?,
            "References" => set("References", &mut self.references, value, |value| {
                value.split_ascii_whitespace().map(str::parse).collect::<Result<_, Error>>()
            })?,
            "Deriver" if value == "unknown-deriver" || value.is_empty() => {}
            "Deriver" => set("Deriver", &mut self.deriver, value, str::parse)?,
            "Sig" => {
                self.signatures.push(value.parse().map_err(|error: Error| fail("Sig", error.to_string()))?)
            }
            "CA" if value.is_empty() => {}
            "CA" => set("CA", &mut self.ca, value, str::parse)?,
            _ => {}
        }
        Ok(())
    }

    fn complete(self) -> Result<NarInfo, Error> {
        let missing = |field| move || fail(field, "it is missing".into());
        let nar_size = self.nar_size.ok_or_else(missing("NarSize"))?;
        if nar_size == 0 {
            return Err(fail("NarSize", "it is 0".into()));
        }
        Ok(NarInfo {
            info: PathInfo {
                path: self.path.ok_or_else(missing("StorePath"))?,
                nar_hash: self.nar_hash.ok_or_else(missing("NarHash"))?,
                nar_size,
                references: self.references.unwrap_or_default(),
                deriver: self.deriver,
                signatures: self.signatures,
                ca: self.ca,
            },
            url: self.url.ok_or_else(missing("URL"))?,
            compression: self.compression.unwrap_or(Compression::Bzip2),
            file_hash: self.file_hash,
            file_size: self.file_size,
        })
    }
}

/// Nix lets most fields repeat; two different answers to one question are refused here.
fn set<T: PartialEq, E: fmt::Display>(
    field: &'static str,
    slot: &mut Option<T>,
    value: &str,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<(), Error> {
    let value = parse(value).map_err(|error| fail(field, error.to_string()))?;
    match slot {
        Some(earlier) if *earlier != value => {
            Err(fail(field, "it is there twice, with different values".into()))
        }
        _ => {
            *slot = Some(value);
            Ok(())
        }
    }
}

fn prefixed_hash(text: &str) -> Result<Sha256, Error> {
    if !text.starts_with("sha256") {
        return Err(Error::Hash {
            text: text.chars().take(160).collect(),
            why: "it does not begin with `sha256`",
        });
    }
    text.parse()
}

fn fail(field: &'static str, why: String) -> Error {
    Error::NarInfo { field, why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signature::SecretKey;

    const FILE: &str = "\
StorePath: /nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-hello-2.12
URL: nar/00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq.nar.zst
Compression: zstd
FileHash: sha256:00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq
FileSize: 41232
NarHash: sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw
NarSize: 226488
References: gy454w1cxaq731grqwylhzf4pp9r5izh-glibc-2.38 i00sflxqsj37lfmf95m8mn0grv615hpj-hello-2.12
Deriver: q4mzjdlh5px6977h7v5fdsk1p33yg583-hello-2.12.drv
Sig: cache.example-1:kqAJqfDUyrhyDoILX2QlQKKye1QWUD+Ps3YiI+vbadoIWsHkPhWZbkWPNhPQ8R2MOHsurrQwKu6wDSkWErsMAA==
CA: fixed:r:sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw
";

    fn parse(text: &str) -> Result<NarInfo, Error> {
        NarInfo::parse(&StoreDir::default(), text.as_bytes())
    }

    fn without(key: &str) -> String {
        FILE.lines().filter(|line| !line.starts_with(key)).map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn a_full_file() {
        let info = parse(FILE).unwrap();
        assert_eq!(info.print(&StoreDir::default()), FILE);
        assert_eq!(info.compression, Compression::Zstd);
        assert_eq!((info.file_size, info.info.nar_size), (Some(41232), 226_488));
        assert_eq!(info.info.other_references().count(), 1);
        assert_eq!(
            info.info.fingerprint(&StoreDir::default()),
            "1;/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-hello-2.12;\
             sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw;226488;\
             /nix/store/gy454w1cxaq731grqwylhzf4pp9r5izh-glibc-2.38,\
             /nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-hello-2.12"
        );
    }

    #[test]
    fn lines_that_may_be_left_out() {
        let mut text = FILE.to_owned();
        for key in ["Compression", "FileHash", "FileSize", "References", "Deriver", "Sig", "CA"] {
            text =
                text.lines().filter(|line| !line.starts_with(key)).map(|line| format!("{line}\n")).collect();
            parse(&text).unwrap();
        }
        let info = parse(&text).unwrap();
        assert_eq!(info.compression, Compression::Bzip2);
        assert!(info.print(&StoreDir::default()).contains("\nReferences: \n"));
        for key in ["StorePath", "URL", "NarHash", "NarSize"] {
            let error = parse(&without(key)).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("missing"), "{error}");
        }
    }

    #[test]
    fn what_others_write() {
        let hex = "sha256:1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13";
        for (from, to) in [
            ("Deriver: q4mzjdlh5px6977h7v5fdsk1p33yg583-hello-2.12.drv", "Deriver: unknown-deriver"),
            ("NarSize: 226488\n", "NarSize: 226488\nSystem: x86_64-linux\nLater: a:b\n"),
            (
                "NarHash: sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw",
                &format!("NarHash: {hex}"),
            ),
            ("Compression: zstd", "Compression: br"),
            ("Compression: zstd", "Compression: "),
        ] {
            assert!(FILE.contains(from));
            assert_eq!(
                parse(&FILE.replace(from, to)).unwrap().info.nar_hash,
                parse(FILE).unwrap().info.nar_hash
            );
        }
        let key = SecretKey::from_seed("second", &[3; 32]).unwrap();
        let two = format!("{FILE}Sig: {}\n", key.sign(b""));
        assert_eq!(parse(&two).unwrap().info.signatures.len(), 2);
    }

    #[test]
    fn what_is_refused() {
        for (from, to, field) in [
            ("NarSize: 226488", "NarSize: 0", "NarSize"),
            ("NarSize: 226488", "NarSize: -1", "NarSize"),
            ("NarSize: 226488", "NarSize: 226488\nNarSize: 226489", "NarSize"),
            ("NarSize: 226488\n", "no colon\n", "all"),
            ("StorePath: /nix/store/", "StorePath: /gnu/store/", "StorePath"),
            ("NarHash: sha256:04", "NarHash: sha256:4", "NarHash"),
            ("NarHash: sha256:04", "NarHash: sha1:04", "NarHash"),
            ("Compression: zstd", "Compression: zstandard", "Compression"),
            ("References: gy4", "References: /nix/store/gy4", "References"),
            ("Sig: cache.example-1:", "Sig: ", "Sig"),
            ("CA: fixed", "CA: moved", "CA"),
            ("URL: nar/00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq.nar.zst", "URL: ", "URL"),
        ] {
            assert!(FILE.contains(from));
            let error = parse(&FILE.replace(from, to)).unwrap_err();
            assert!(matches!(error, Error::NarInfo { field: f, .. } if f == field), "{error}");
        }
        assert!(parse(&FILE[..FILE.len() - 1]).is_err(), "a file that was cut off");
        assert!(NarInfo::parse(&StoreDir::default(), b"StorePath: \xff\n").is_err());
        assert!(parse(&format!("{FILE}X: {}\n", "x".repeat(MAX_LEN))).is_err());
    }
}
