//! What becomes of answers of caches, and of requests that say what is not so.

use std::collections::BTreeMap;
use std::io::Write as _;

use drover_api::{ClassCache, Reason, Trust};
use drover_cache::{CacheOptions, NarSpool};
use drover_nix::derivation::{aterm, modulo};
use drover_nix::{BasicDerivation, Derivation, DerivationOutput, OutputName};
use drover_serve::testing;
use drover_session::Resolved;

use super::*;

const LIB: &str = "f8g8x4m83da3b2f79iv84q2r3qlc58lr-lib";
const TOOL: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-tool";

/// What is absent, with a cache at this place, when another request makes the library.
fn absent(url: &str) -> BTreeSet<String> {
    let dir = StoreDir::default();
    let mut derivation = BasicDerivation {
        name: "app".into(),
        outputs: [("out".parse().unwrap(), DerivationOutput::Deferred)].into(),
        input_srcs: [LIB, TOOL].map(|base| base.parse().unwrap()).into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec![],
        env: [("out".into(), "".into())].into(),
    };
    modulo::fill_output_paths(&dir, &mut derivation).unwrap();
    let drv_path = drover_session::drv_path_of(&dir, &derivation).unwrap();
    let plan = plan(Resolved { drv_path, derivation }, url, Trust::Verified);
    match ask(&plan, &Caches::default(), &|path| path.ends_with("-lib")) {
        Lookup::Missing { absent } => absent,
        other => panic!("{other:?}"),
    }
}

fn plan(resolved: Resolved, url: &str, trust: Trust) -> JobPlan {
    JobPlan {
        drv_path: resolved.drv_path,
        derivation: resolved.derivation,
        options: Default::default(),
        caches: vec![ClassCache { url: url.into(), ..ClassCache::default() }],
        credentials: vec![],
        signing_key: None,
        trust,
        max_output_bytes: None,
        spool_dir: "/tmp".into(),
    }
}

#[test]
fn what_a_cache_that_cannot_be_asked_lacks() {
    let empty = tempfile::tempdir().unwrap();
    let full = |base: &str| format!("/nix/store/{base}");
    let asked = absent(&format!("file://{}", empty.path().display()));
    assert_eq!(asked, BTreeSet::from([full(LIB), full(TOOL)]));
    // No verdict follows from a cache that is not there; but what is about to be made is waited for.
    assert_eq!(absent("gopher://nowhere"), BTreeSet::from([full(LIB)]));
    // One with something else in the place of its narinfo files.
    let broken = tempfile::tempdir().unwrap();
    for base in [LIB, TOOL] {
        std::fs::create_dir(broken.path().join(format!("{}.narinfo", &base[..32]))).unwrap();
    }
    let url = format!("file://{}", broken.path().display());
    assert_eq!(absent(&url), BTreeSet::from([full(LIB)]));
}

/// A chain of derivations, as Nix would have made them: each file's text by its path, inputs first.
struct Chain {
    files: Vec<(StorePath, Vec<u8>)>,
    /// The last one.
    top: Resolved,
    /// Where the outputs are, by the derivations' names.
    outputs: BTreeMap<&'static str, StorePath>,
}

impl Chain {
    fn new() -> Self {
        let dir = StoreDir::default();
        let (mut files, mut outputs) = (vec![], BTreeMap::new());
        let mut hashes: BTreeMap<StorePath, modulo::InputHash> = BTreeMap::new();
        for name in ["bottom", "middle", "top"] {
            let below = files.last().map(|(path, _): &(StorePath, Vec<u8>)| path.clone());
            let mut drv = Derivation {
                basic: BasicDerivation {
                    name: name.into(),
                    outputs: [(OutputName::out(), DerivationOutput::Deferred)].into(),
                    input_srcs: BTreeSet::new(),
                    system: "x86_64-linux".into(),
                    builder: "/bin/sh".into(),
                    args: vec!["-c".into(), "echo > $out".into()],
                    env: [("name".into(), name.into()), ("out".into(), "".into())].into(),
                },
                input_drvs: below.into_iter().map(|path| (path, [OutputName::out()].into())).collect(),
            };
            let mut input = |path: &StorePath| Ok(hashes[path].clone());
            let out = modulo::output_paths(&dir, &drv, &mut input).unwrap().unwrap()["out"].clone();
            drv.basic.env.insert("out".into(), dir.full(&out).into());
            drv.basic.outputs.insert(OutputName::out(), DerivationOutput::InputAddressed(out.clone()));
            let hash = modulo::input_hash(&dir, &drv, &mut input).unwrap();
            let path = modulo::drv_path(&dir, &drv).unwrap();
            hashes.insert(path.clone(), hash);
            files.push((path, aterm::print(&dir, &drv).unwrap()));
            outputs.insert(name, out);
        }
        let shelf = shelf(files.iter().map(|(path, text)| (path, &**text)));
        let top = drover_session::resolve(&dir, &files[2].0, &[open(&shelf)]).unwrap();
        Self { files, top, outputs }
    }

    /// A cache that has these of its files, by their places; this one with another text.
    fn shelf(&self, has: &[usize], forged: Option<(usize, &[u8])>) -> tempfile::TempDir {
        shelf(has.iter().map(|place| match forged {
            Some((other, text)) if other == *place => (&self.files[*place].0, text),
            _ => (&self.files[*place].0, &*self.files[*place].1),
        }))
    }
}

fn url(shelf: &tempfile::TempDir) -> String {
    format!("file://{}", shelf.path().display())
}

fn open(shelf: &tempfile::TempDir) -> Arc<dyn Cache> {
    drover_cache::open(&url(shelf), &CacheOptions::default()).unwrap()
}

/// A cache with files of these names and texts.
fn shelf<'a>(files: impl IntoIterator<Item = (&'a StorePath, &'a [u8])>) -> tempfile::TempDir {
    let shelf = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let nar = testing::file_nar(text);
        let info = testing::info_of(path.clone(), &[], &nar);
        let mut spool = NarSpool::new(shelf.path(), []).unwrap();
        spool.write_all(&nar).unwrap();
        open(&shelf).put(&info, &spool.finish().unwrap()).unwrap();
    }
    shelf
}

/// The answer for a request that carries this derivation, from these caches.
fn asked(resolved: Resolved, shelf: &tempfile::TempDir, trust: Trust) -> Lookup {
    ask(&plan(resolved, &url(shelf), trust), &Caches::default(), &|_| false)
}

#[test]
fn a_request_that_lies_about_its_derivation_is_refused() {
    let chain = Chain::new();
    let shelf = chain.shelf(&[0, 1, 2], None);
    let (dir, foreign) = (StoreDir::default(), chain.outputs["bottom"].clone());
    let named = |name: &str| StorePath::from_parts([7; 20], name).unwrap();
    type Lie<'a> = (&'static str, String, String, Box<dyn Fn(&mut BasicDerivation) + 'a>);
    // Field, what was claimed and what is so, as far as one word shows them.
    let lies: Vec<Lie<'_>> = vec![
        (
            "system",
            "i686-linux".into(),
            "x86_64-linux".into(),
            Box::new(|drv| drv.system = "i686-linux".into()),
        ),
        ("builder", "/bin/bash".into(), "/bin/sh".into(), Box::new(|drv| drv.builder = "/bin/bash".into())),
        ("args", "evil".into(), "echo".into(), Box::new(|drv| drv.args[1] = "evil > $out".into())),
        (
            "env.name",
            "other".into(),
            "top".into(),
            Box::new(|drv| drv.env.extend([("name".into(), "other".into())])),
        ),
        ("env.LD_PRELOAD", "evil".into(), "None".into(), {
            Box::new(|drv| drv.env.extend([("LD_PRELOAD".into(), "evil".into())]))
        }),
        ("env.name", "None".into(), "top".into(), Box::new(|drv| drop(drv.env.remove(b"name".as_slice())))),
        (
            "inputSrcs",
            chain.outputs["middle"].to_string(),
            String::new(),
            Box::new(|drv| drv.input_srcs.clear()),
        ),
        (
            "inputSrcs",
            foreign.to_string(),
            String::new(),
            Box::new(|drv| drv.input_srcs.extend([foreign.clone()])),
        ),
        ("outputs", named("top").to_string(), chain.outputs["top"].to_string(), {
            Box::new(|drv| {
                drv.outputs.extend([(OutputName::out(), DerivationOutput::InputAddressed(named("top")))])
            })
        }),
    ];
    for (field, claimed, is, lie) in lies {
        let mut lying = chain.top.clone();
        lie(&mut lying.derivation);
        match asked(lying.clone(), &shelf, Trust::Verified) {
            Lookup::Refused { reason: Reason::PathNotProven, message } => {
                for word in [field, &claimed, &is, chain.top.drv_path.as_str()] {
                    assert!(message.contains(word), "{field}: {word} is not in: {message}");
                }
            }
            other => panic!("{field}: {other:?}"),
        }
        // Whom the administrator believes is believed.
        let believed = asked(lying, &shelf, Trust::Claimed);
        assert!(matches!(believed, Lookup::Missing { .. }), "{field}: {believed:?}");
    }
    // Without a lie it is only not there yet.
    let absent = BTreeSet::from([dir.full(&chain.outputs["middle"])]);
    assert_eq!(asked(chain.top, &shelf, Trust::Verified), Lookup::Missing { absent });
}

#[test]
fn a_closure_that_does_not_hold_proves_nothing() {
    let chain = Chain::new();
    let texts: Vec<&[u8]> = chain.files.iter().map(|(_, text)| &**text).collect();
    for (shelf, words) in [
        (chain.shelf(&[1, 2], None), vec![chain.files[0].0.to_string()]),
        (chain.shelf(&[0, 2], None), vec![chain.files[1].0.to_string()]),
        (chain.shelf(&[], None), vec![chain.files[2].0.to_string(), "nix copy --derivation".into()]),
        // Another derivation's text does not lead to this name.
        (chain.shelf(&[0, 1, 2], Some((1, texts[0]))), vec![chain.files[1].0.to_string()]),
    ] {
        match asked(chain.top.clone(), &shelf, Trust::Verified) {
            Lookup::Refused { reason: Reason::PathNotProven, message } => {
                assert!(words.iter().all(|word| message.contains(word)), "{words:?} are not in: {message}");
            }
            other => panic!("{words:?}: {other:?}"),
        }
        let believed = asked(chain.top.clone(), &shelf, Trust::Claimed);
        assert!(matches!(believed, Lookup::Missing { .. }), "{believed:?}");
    }
}

#[test]
fn what_is_only_named_is_what_its_name_says_or_nothing() {
    let chain = Chain::new();
    let (top, texts) = (&chain.files[2].0, [&*chain.files[0].1, &*chain.files[1].1]);
    let read_from = |shelf: &tempfile::TempDir| read(top, &[open(shelf)]);
    let found = Resolution::Found(Arc::new(chain.top.clone()));
    assert_eq!(read_from(&chain.shelf(&[0, 1, 2], None)), found);
    // Two levels below is not for this step to know: the proof asks for it.
    assert_eq!(read_from(&chain.shelf(&[1, 2], None)), found);
    let absent = |place: usize| Resolution::Absent { path: chain.files[place].0.clone() };
    assert_eq!(read_from(&chain.shelf(&[], None)), absent(2));
    assert_eq!(read_from(&chain.shelf(&[0, 2], None)), absent(1));
    for (place, text) in [(2, texts[1]), (1, texts[0]), (2, b"Derive(".as_slice())] {
        match read_from(&chain.shelf(&[0, 1, 2], Some((place, text)))) {
            Resolution::Refused { reason: Reason::PathNotProven, message } => {
                assert!(message.contains(chain.files[place].0.as_str()), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }
    let broken = tempfile::tempdir().unwrap();
    std::fs::create_dir(broken.path().join(format!("{}.narinfo", top.hash_part()))).unwrap();
    let unread = read_from(&broken);
    assert!(matches!(&unread, Resolution::Unreadable { why } if why.contains(top.as_str())), "{unread:?}");
}
