//! Requests and answers of every version, put together by hand (Nix: serve-protocol.cc, serve-protocol.hh,
//! nix-store.cc's opServe, archive.cc, export-import.cc).

/// `major << 8 | minor`, as in the greeting.
pub(super) type Version = u64;

/// Every version that anyone has ever spoken, and one that is yet to come.
pub(super) const VERSIONS: [Version; 10] =
    [0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x20a];
/// The newest one that Drover speaks.
pub(super) const OURS: Version = 0x208;

/// `hello\n` as a NAR, which has 120 bytes, in the spellings that a hash may have.
pub(super) const HELLO_HEX: &str = "1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13";
pub(super) const HELLO_NIX32: &str = "sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw";
pub(super) const HELLO_SRI: &str = "sha256-HDfQGvQL4ugGkd48w99EN3ppmvuxfGjwgJZLL9Bx/BM=";
pub(super) const HELLO_CA: &str = "fixed:r:sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw";
pub(super) const HELLO_SIZE: u64 = 120;
/// The path that content address gives.
pub(super) const SOURCE: &str = "i9pmrzmpshapij2kin22pff6fc2adavx-hello.txt";
/// A path that nothing proves, which refers to itself and to the source.
pub(super) const USER: &str = "q4mzjdlh5px6977h7v5fdsk1p33yg583-user";
pub(super) const MISSING: &str = "jwmbpldsdgfjhkxk317jn55jilyfl63f-missing";
/// A signature that is well formed, by nobody.
pub(super) const SIGNATURE: &str =
    "nobody-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==";

/// A derivation as Nix 2.34 instantiates it, whose file the server gets.
pub(super) const KEPT_DRV: &str = "bk9ipzamsfwvqc0ibp43b2zh23p97qhf-transcript-kept.drv";
pub(super) const KEPT_OUT: &str = "3vznwrq5nhn0m6wrg0pjdczw8x4n5wj6-transcript-kept";
pub(super) const KEPT_TEXT: &str = r#"Derive([("out","/nix/store/3vznwrq5nhn0m6wrg0pjdczw8x4n5wj6-transcript-kept","","")],[],[],"x86_64-linux","/bin/sh",["-c","echo kept > $out"],[("builder","/bin/sh"),("name","transcript-kept"),("out","/nix/store/3vznwrq5nhn0m6wrg0pjdczw8x4n5wj6-transcript-kept"),("system","x86_64-linux")])"#;
pub(super) const KEPT_NAR_HASH: &str = "sha256:0yxqn76nizczgcx8qm8a782g44hi7y95f8qym7j3m75yd245akjs";
/// Two whose files it does not get. The first builds, the second fails with 3.
pub(super) const SENT_DRV: &str = "9lrkqvwpklxzw814lcc699m8q64n84ss-transcript-sent.drv";
pub(super) const SENT_OUT: &str = "y20fq6lq2fdszjz1n5lyb5f1kqaqd9bj-transcript-sent";
pub(super) const FAILS_DRV: &str = "qv77n4aipxwdfq1n7k0a9ryn2jr1wd8y-transcript-fails.drv";
pub(super) const FAILS_OUT: &str = "0njkc6gzyc47ky17k0gx8yyvf1091w26-transcript-fails";

/// A word.
pub(super) fn u(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

/// A string.
pub(super) fn s(text: &str) -> Vec<u8> {
    let mut bytes = u(text.len() as u64);
    bytes.extend(text.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// A path.
pub(super) fn p(base: &str) -> Vec<u8> {
    s(&format!("/nix/store/{base}"))
}

/// A set of paths, which the caller sorts.
pub(super) fn set(bases: &[&str]) -> Vec<u8> {
    [vec![u(bases.len() as u64)], bases.iter().map(|base| p(base)).collect()].concat().concat()
}

/// A regular file as a NAR.
pub(super) fn nar(contents: &str) -> Vec<u8> {
    let words = ["nix-archive-1", "(", "type", "regular", "contents", contents, ")"];
    words.map(s).concat()
}

pub(super) fn client_hello(version: Version) -> Vec<u8> {
    [u(0x390c_9deb), u(version)].concat()
}

pub(super) fn server_hello(version: Version) -> Vec<u8> {
    [u(0x5452_eecb), u(version)].concat()
}

pub(super) fn query_valid_paths(lock: bool, substitute: bool, bases: &[&str]) -> Vec<u8> {
    [u(1), u(lock.into()), u(substitute.into()), set(bases)].concat()
}

pub(super) fn query_path_infos(bases: &[&str]) -> Vec<u8> {
    [u(2), set(bases)].concat()
}

pub(super) fn dump_store_path(base: &str) -> Vec<u8> {
    [u(3), p(base)].concat()
}

pub(super) fn query_closure(include_outputs: bool, bases: &[&str]) -> Vec<u8> {
    [u(7), u(include_outputs.into()), set(bases)].concat()
}

/// What is known about a path, in every place where it is told.
#[derive(Clone, Default)]
pub(super) struct Info<'a> {
    pub base: &'a str,
    pub deriver: Option<&'a str>,
    pub references: &'a [&'a str],
    pub nar_size: u64,
    /// In the spelling that is sent.
    pub nar_hash: &'a str,
    pub ca: &'a str,
    pub signatures: &'a [&'a str],
}

/// [`SOURCE`] as it is added: with all that can be known about a path.
pub(super) fn source() -> Info<'static> {
    Info {
        base: SOURCE,
        deriver: Some(KEPT_DRV),
        nar_size: HELLO_SIZE,
        nar_hash: HELLO_HEX,
        ca: HELLO_CA,
        signatures: &[SIGNATURE],
        ..Info::default()
    }
}

impl Info<'_> {
    fn deriver(&self) -> Vec<u8> {
        self.deriver.map_or_else(|| s(""), p)
    }

    fn signatures(&self) -> Vec<u8> {
        let count = u(self.signatures.len() as u64);
        [vec![count], self.signatures.iter().map(|text| s(text)).collect()].concat().concat()
    }

    /// One item of QueryPathInfos' answer.
    pub(super) fn item(&self, version: Version) -> Vec<u8> {
        let size = u(self.nar_size);
        let common = [p(self.base), self.deriver(), set(self.references), size.clone(), size].concat();
        match version {
            0x204.. => [common, s(self.nar_hash), s(self.ca), self.signatures()].concat(),
            _ => common,
        }
    }

    /// AddToStoreNar.
    pub(super) fn addition(&self, nar: &[u8]) -> Vec<u8> {
        let (path, deriver, references) = (p(self.base), self.deriver(), set(self.references));
        let (hash, size, ca) = (s(self.nar_hash), u(self.nar_size), s(self.ca));
        [u(9), path, deriver, hash, references, u(0), size, u(0), self.signatures(), ca, nar.to_vec()]
            .concat()
    }

    /// One item of an export stream, with the signature that old Nix put there or without.
    pub(super) fn record(&self, nar: &[u8], signed: bool) -> Vec<u8> {
        let end = if signed { [u(1), s("an old signature")].concat() } else { u(0) };
        let (path, references, deriver) = (p(self.base), set(self.references), self.deriver());
        [u(1), nar.to_vec(), u(0x4558_494e), path, references, deriver, end].concat()
    }
}

/// The options behind a build request: limits, two rounds as Hydra asks for them, and to keep what fails.
pub(super) fn options(version: Version, repeats: u64) -> Vec<u8> {
    let mut words = vec![50, 60];
    if version >= 0x202 {
        words.push(7 << 20);
    }
    if version >= 0x203 {
        words.extend([repeats, repeats]);
    }
    if version >= 0x207 {
        words.push(1);
    }
    words.into_iter().flat_map(u).collect()
}

/// BuildDerivation of a derivation with one output and no inputs.
pub(super) fn build_derivation(
    version: Version,
    drv: &str,
    out: &str,
    script: &str,
    repeats: u64,
) -> Vec<u8> {
    let name = &out[33..];
    let env = [
        ("builder", "/bin/sh"),
        ("name", name),
        ("out", &format!("/nix/store/{out}")),
        ("system", "x86_64-linux"),
    ];
    let outputs = [u(1), s("out"), p(out), s(""), s("")].concat();
    let builder = [s("x86_64-linux"), s("/bin/sh"), u(2), s("-c"), s(script)].concat();
    let env = env.into_iter().flat_map(|(key, value)| [s(key), s(value)].concat()).collect();
    [u(8), p(drv), outputs, u(0), builder, u(4), env, options(version, repeats)].concat()
}

/// An answer: bytes, with gaps where only the server can know.
#[derive(Clone)]
pub(super) enum Part {
    Bytes(Vec<u8>),
    /// A word that is a time: not 0.
    Time,
    /// A word that means failure to every client that ever was: no number of a success, and not beyond the last.
    Failure,
    /// A string that says something.
    Message,
}

/// BuildPaths of a path, or a path with names of outputs.
pub(super) fn build_paths(version: Version, targets: &[&str]) -> Vec<u8> {
    [u(6), set(targets), options(version, 0)].concat()
}

/// The answer to BuildDerivation: `outputs` of a success by base name.
pub(super) fn build_result(version: Version, status: u64, outputs: &[&str]) -> Vec<Part> {
    let built_now = [0, 3].contains(&status);
    let message = if outputs.is_empty() { Part::Message } else { Part::Bytes(s("")) };
    let mut parts = vec![Part::Bytes(u(status)), message];
    if version >= 0x203 {
        parts.push(Part::Bytes([u(built_now.into()), u(0)].concat()));
        let time = || if built_now { Part::Time } else { Part::Bytes(u(0)) };
        parts.extend([time(), time()]);
    }
    let count = u(outputs.len() as u64);
    let tail = outputs.iter().flat_map(|base| {
        let id = format!("sha256:{}!out", "0".repeat(64));
        let json =
            format!(r#"{{"dependentRealisations":{{}},"id":"{id}","outPath":"{base}","signatures":[]}}"#);
        match version {
            0x208.. => [s("out"), p(base), u(0)].concat(),
            _ => [s(&id), s(&json)].concat(),
        }
    });
    if version >= 0x206 {
        parts.push(Part::Bytes([count, tail.collect()].concat()));
    }
    parts
}
