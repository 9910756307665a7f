//! Outputs whose paths follow from what is in them: floating, fixed by any method, and impure.

#![allow(clippy::unwrap_used)] // all of it is tests

mod common;

use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Builder, User, out, path_for, set};
use drover_nix::content_hash::content_hashes;
use drover_nix::hash_modulo::SelfReferenceHash;
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Hash, HashAlgo, Method, OutputName, PathInfo, Sha256,
    StoreDir, StorePath,
};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, Client};

/// What stands for an output in a derivation that does not know its path.
fn placeholder(output: &str) -> String {
    format!("/{}", Sha256::of(format!("nix-output:{output}").as_bytes()).to_nix32())
}

/// As [`Builder::derivation`], with these outputs, each of them `output`.
fn with_outputs(
    builder: &Builder,
    script: &str,
    outputs: &[&str],
    output: &DerivationOutput,
) -> BasicDerivation {
    let mut drv = builder.derivation(script);
    drv.outputs = outputs.iter().map(|name| (name.parse().unwrap(), output.clone())).collect();
    outputs.iter().for_each(|name| set(&mut drv, name, &placeholder(name)));
    drv
}

fn floating(builder: &Builder, script: &str, method: Method, algo: HashAlgo) -> BasicDerivation {
    with_outputs(builder, script, &["out"], &DerivationOutput::CaFloating { method, algo })
}

fn nar(builder: &Builder, script: &str) -> BasicDerivation {
    floating(builder, script, Method::Nar, HashAlgo::Sha256)
}

fn impure(builder: &Builder, script: &str) -> BasicDerivation {
    let output = DerivationOutput::Impure { method: Method::Nar, algo: HashAlgo::Sha256 };
    with_outputs(builder, script, &["out"], &output)
}

fn build(builder: &mut Builder, drv: &BasicDerivation) -> BuildResult {
    builder.build(drv, &BuildOptions::default())
}

/// What was built, which has to have worked.
fn built(builder: &mut Builder, drv: &BasicDerivation) -> Vec<PathInfo> {
    let result = build(builder, drv);
    assert_eq!(result.status, BuildStatus::Built, "{}\n{}", result.error_message, builder.log());
    result.built_outputs.values().map(|built| info(builder, &built.path)).collect()
}

fn built_one(builder: &mut Builder, drv: &BasicDerivation) -> PathInfo {
    built(builder, drv).remove(0)
}

fn info(builder: &mut Builder, path: &StorePath) -> PathInfo {
    builder.client().query_path_infos(&[path.clone()].into()).unwrap().remove(path).unwrap()
}

fn rejected(builder: &mut Builder, drv: &BasicDerivation, status: BuildStatus, why: &str) {
    let result = build(builder, drv);
    assert_eq!(result.status, status, "{}", result.error_message);
    assert!(result.error_message.contains(why), "{}", result.error_message);
    assert!(result.built_outputs.is_empty());
}

fn contents(builder: &mut Builder, path: &StorePath) -> String {
    std::fs::read_to_string(builder.store_file(path)).unwrap()
}

/// Content, address and path of an output agree, in the way that the builder is told to hash self-references.
fn expect_addressed(builder: &mut Builder, info: &PathInfo, which: SelfReferenceHash) {
    let ca = info.ca.as_ref().expect("it is content-addressed");
    let mut nar = Vec::new();
    builder.client().dump_store_path(&info.path, &mut nar).unwrap();
    assert_eq!((Sha256::of(&nar), nar.len() as u64), (info.nar_hash, info.nar_size));
    let hashes = content_hashes(ca.method, ca.hash.algo, nar.as_slice(), &info.path).unwrap();
    assert_eq!(ca.hash, *hashes.get(which));
    let others = info.other_references().cloned().collect();
    let own = info.references.contains(&info.path);
    let path = ca.store_path(&StoreDir::default(), info.path.name(), &others, own).unwrap();
    assert_eq!(info.path, path);
}

#[test]
fn every_method_gives_its_path() {
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start(user);
        let file = "echo data > $out";
        let tree =
            "mkdir -p $out/d; echo x > $out/d/x; chmod +x $out/d/x; echo y > $out/d.y; ln -s d/x $out/l";
        for (method, algo, script) in [
            (Method::Flat, HashAlgo::Sha256, file),
            (Method::Flat, HashAlgo::Md5, file),
            (Method::Nar, HashAlgo::Sha256, tree),
            (Method::Nar, HashAlgo::Sha512, tree),
            (Method::Nar, HashAlgo::Sha1, file),
            (Method::Text, HashAlgo::Sha256, file),
            (Method::Git, HashAlgo::Sha1, tree),
            (Method::Git, HashAlgo::Sha256, file),
        ] {
            let drv = floating(&builder, script, method, algo);
            let info = built_one(&mut builder, &drv);
            let ca = info.ca.as_ref().unwrap();
            assert_eq!((ca.method, ca.hash.algo), (method, algo));
            expect_addressed(&mut builder, &info, SelfReferenceHash::WithOffsets);
            let again = build(&mut builder, &drv);
            assert_eq!(again.status, BuildStatus::AlreadyValid, "it is remembered");
            assert_eq!(again.built_outputs[&OutputName::out()].path, info.path);
        }
    }
}

#[test]
fn references_to_itself_become_the_path() {
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start(user);
        let drv = nar(&builder, "mkdir $out; echo $out $PATH > $out/f; ln -s $out/f $out/l; echo built $out");
        let info = built_one(&mut builder, &drv);
        expect_addressed(&mut builder, &info, SelfReferenceHash::WithOffsets);
        let tools = builder.tools.clone();
        assert_eq!(info.references, [info.path.clone(), tools.clone()].into());
        let written = std::fs::read_to_string(builder.store_file(&info.path).join("f")).unwrap();
        assert_eq!(written, format!("/nix/store/{} /nix/store/{tools}/bin\n", info.path));
        let link = std::fs::read_link(builder.store_file(&info.path).join("l")).unwrap();
        assert_eq!(link.to_str().unwrap(), format!("/nix/store/{}/f", info.path));
        let log = builder.finish();
        assert!(!log.contains(info.path.hash_part()), "the path is not known while it is built: {log}");
    }
}

/// Two NARs that differ only in a self-reference that is zeroed in one of them (Nix: rl-2.35).
#[test]
fn a_zeroed_self_reference_is_no_collision() {
    let real = "echo a $out b $out > $out";
    let forged = "{ echo -n a $out b /nix/store/; head -c 32 /dev/zero; echo -test; } > $out";
    for (option, which, differ) in [
        (None, SelfReferenceHash::WithOffsets, true),
        (Some("with-offsets"), SelfReferenceHash::WithOffsets, true),
        (Some("without-offsets"), SelfReferenceHash::WithoutOffsets, false),
    ] {
        let options: Vec<&str> = option.iter().flat_map(|value| ["--self-reference-hash", value]).collect();
        let mut builder = Builder::start_with(User::Current, &options);
        let infos = [real, forged].map(|script| {
            let drv = nar(&builder, script);
            built_one(&mut builder, &drv)
        });
        expect_addressed(&mut builder, &infos[0], which);
        if differ {
            expect_addressed(&mut builder, &infos[1], which);
        }
        assert_eq!(infos[0].path != infos[1].path, differ, "{option:?}");
    }
}

#[test]
fn outputs_refer_to_each_other_by_their_final_paths() {
    let mut builder = Builder::start(User::Current);
    let output = DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 };
    // Names in an order that is not that of the references: `a` refers to `z`, which refers to `m` and itself.
    let script = "echo $z $m > $a; mkdir $z; echo $m $z > $z/f; echo leaf > $m; echo $a $PATH > $out";
    let drv = with_outputs(&builder, script, &["a", "m", "out", "z"], &output);
    let infos = built(&mut builder, &drv);
    let [a, m, out, z] = infos.as_slice() else { panic!("four outputs") };
    for info in &infos {
        expect_addressed(&mut builder, info, SelfReferenceHash::WithOffsets);
    }
    assert_eq!(m.references, [].into());
    assert_eq!(z.references, [m.path.clone(), z.path.clone()].into());
    assert_eq!(a.references, [m.path.clone(), z.path.clone()].into());
    assert_eq!(out.references, [a.path.clone(), builder.tools.clone()].into());
    assert_eq!(a.path.name(), "test-a");
    let text = contents(&mut builder, &a.path);
    assert_eq!(text, format!("/nix/store/{} /nix/store/{}\n", z.path, m.path));

    let circle = with_outputs(&builder, "echo $b > $a; echo $a > $b", &["a", "b"], &output);
    rejected(&mut builder, &circle, BuildStatus::OutputRejected, "cycle detected");
}

#[test]
fn equal_content_is_one_object() {
    let mut builder = Builder::start(User::Current);
    let first = nar(&builder, "echo same $out > $out");
    let first = built_one(&mut builder, &first);
    let inode = |builder: &Builder| std::fs::metadata(builder.store_file(&first.path)).unwrap().ino();
    let before = inode(&builder);
    let second = nar(&builder, "echo same $out > $out; : another derivation");
    let second = built_one(&mut builder, &second);
    assert_eq!(first, second, "what was there stays as it was, its deriver included");
    assert_eq!(before, inode(&builder), "and the very same files");
    let left: Vec<_> = std::fs::read_dir(builder.root.path().join("nix/store"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".links" && !name.ends_with("-tools") && *name != first.path.to_string())
        .collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn a_derivation_finds_its_own_results_only() {
    let mut builder = Builder::start(User::Current);
    let drv_path = path_for("claimed", "test.drv");
    let mut ask = |script: &str| {
        let drv = nar(&builder, script);
        let options = BuildOptions::default();
        builder.client().build_derivation(&drv_path, &drv, &options).unwrap()
    };
    let evil = ask("echo evil > $out");
    let good = ask("echo good > $out");
    assert_eq!((evil.status, good.status), (BuildStatus::Built, BuildStatus::Built));
    assert_ne!(evil.built_outputs, good.built_outputs);
    assert_eq!(ask("echo good > $out").built_outputs, good.built_outputs);
}

#[test]
fn what_is_impure_is_built_each_time() {
    let mut builder = Builder::start(User::Current);
    let drv = impure(&builder, "cat /proc/sys/kernel/random/uuid > $out; echo $out >> $out; echo $out");
    let infos = [(); 2].map(|()| built_one(&mut builder, &drv));
    assert_ne!(infos[0].path, infos[1].path);
    for info in &infos {
        expect_addressed(&mut builder, info, SelfReferenceHash::WithOffsets);
        assert_eq!(info.references, [info.path.clone()].into());
        let written = contents(&mut builder, &info.path);
        assert!(written.ends_with(&format!("\n/nix/store/{}\n", info.path)), "{written}");
    }
    let failing = impure(&builder, "exit 1");
    rejected(&mut builder, &failing, BuildStatus::TransientFailure, "exit code 1");
}

#[test]
fn fixed_outputs_by_every_method() {
    let mut builder = Builder::start(User::Current);
    let text = b"data\n";
    let blob = Sha256::of(b"blob 5\0data\n");
    for (method, hash) in [
        (Method::Text, Hash::from(Sha256::of(text))),
        (Method::Git, Hash::from(blob)),
        (Method::Git, Hash::parse("1269488f7fb1f4b56a8c0e5eb48cecbfadfa9219", Some(HashAlgo::Sha1)).unwrap()),
    ] {
        let drv = builder.fixed("echo data > $out; echo noise", method, hash.clone());
        let info = built_one(&mut builder, &drv);
        assert_eq!(info.path, out(&drv));
        assert_eq!(info.ca, Some(ContentAddress { method, hash }));
        expect_addressed(&mut builder, &info, SelfReferenceHash::WithOffsets);
    }
}

#[test]
fn content_with_another_hash_is_kept_under_its_own_path() {
    let mut builder = Builder::start(User::Current);
    for (method, algo) in
        [(Method::Flat, HashAlgo::Sha256), (Method::Nar, HashAlgo::Sha256), (Method::Git, HashAlgo::Sha1)]
    {
        let wrong = Hash { algo, bytes: vec![7; algo.size()] };
        let script = format!("echo the data for {} > $out", method.as_str());
        let drv = builder.fixed(&script, method, wrong.clone());
        rejected(&mut builder, &drv, BuildStatus::OutputRejected, &wrong.to_sri());
        let result = build(&mut builder, &drv);
        let got = result.error_message.lines().find_map(|line| line.trim().strip_prefix("got:")).unwrap();
        let hash = Hash::parse(got.trim(), None).unwrap();
        let corrected = builder.fixed(&script, method, hash);
        assert_ne!(out(&corrected), out(&drv));
        // There without having been asked for: nothing has to be fetched again.
        assert_eq!(build(&mut builder, &corrected).status, BuildStatus::AlreadyValid);
        let info = info(&mut builder, &out(&corrected));
        expect_addressed(&mut builder, &info, SelfReferenceHash::WithOffsets);
        assert!(builder.client().query_valid_paths(&[out(&drv)].into(), false, false).unwrap().is_empty());
    }
}

#[test]
fn what_cannot_be_content_addressed_is_refused() {
    let mut builder = Builder::start(User::Current);
    let outputs = BuildStatus::OutputRejected;
    for (method, algo, script, why) in [
        (Method::Flat, HashAlgo::Sha256, "mkdir $out", "since its hash is that of a flat file"),
        (
            Method::Text,
            HashAlgo::Sha256,
            "echo x > $out; chmod +x $out",
            "since its hash is that of a flat file",
        ),
        (Method::Flat, HashAlgo::Sha256, "echo $PATH > $out", "may have references"),
        (Method::Git, HashAlgo::Sha1, "echo $PATH > $out", "may have references"),
        (Method::Nar, HashAlgo::Sha512, "echo $out > $out", "may have references"),
        (Method::Text, HashAlgo::Sha256, "echo $out > $out", "cannot refer to itself"),
    ] {
        let drv = floating(&builder, script, method, algo);
        rejected(&mut builder, &drv, outputs, why);
    }
    let refers = builder.fixed("echo $PATH > $out", Method::Nar, Hash::from(Sha256::of(b"x")));
    rejected(&mut builder, &refers, outputs, "must not reference store paths");
    let inputs = BuildStatus::InputRejected;
    for (method, algo) in [(Method::Git, HashAlgo::Md5), (Method::Text, HashAlgo::Sha1)] {
        let drv = floating(&builder, "touch $out", method, algo);
        rejected(&mut builder, &drv, inputs, "sha256");
    }
    // A name that sorts elsewhere once the final path is in it: no archive can hold both.
    let script = "mkdir $out; touch $out/$(basename $out); for c in 0 1 8 h z; do touch $out/$c; done";
    let drv = nar(&builder, script);
    let result = build(&mut builder, &drv);
    assert!(
        matches!(result.status, BuildStatus::Built | BuildStatus::OutputRejected),
        "{}",
        result.error_message
    );
}

/// Nothing but the placeholders in its environment and arguments says where the output goes, in files too.
#[test]
fn placeholders_are_replaced_everywhere() {
    let mut builder = Builder::start(User::Current);
    let mut drv = nar(&builder, "test $1 = $out; test $(cat $textPath) = $out; echo $1 > $out");
    drv.args.extend(["sh".into(), placeholder("out").into()]);
    set(&mut drv, "text", &placeholder("out"));
    set(&mut drv, "passAsFile", "text");
    let info = built_one(&mut builder, &drv);
    let written = contents(&mut builder, &info.path);
    assert_eq!(written, format!("/nix/store/{}\n", info.path));
}

#[test]
fn discarded_references_are_discarded_for_every_kind() {
    let mut builder = Builder::start(User::Current);
    let script = "PATH=@tools@/bin; while read -r a b c; do case $c in outputs=*) out=${c#*=*=\\'}; out=${out%%\\'*};; esac; done \
                  < $NIX_ATTRS_SH_FILE; echo $PATH $out > $out";
    for (method, algo) in [(Method::Flat, HashAlgo::Sha256), (Method::Nar, HashAlgo::Sha256)] {
        for discard in [true, false] {
            let mut drv = floating(&builder, script, method, algo);
            let script = script.replace("@tools@", &format!("/nix/store/{}", builder.tools));
            drv.args = vec!["-ec".into(), script.into()];
            let json = format!(r#"{{"unsafeDiscardReferences":{{"out":{discard}}},"outputs":["out"]}}"#);
            drv.env = [("__json".into(), json.into())].into();
            if method == Method::Flat && !discard {
                rejected(&mut builder, &drv, BuildStatus::OutputRejected, "may have references");
                continue;
            }
            let info = built_one(&mut builder, &drv);
            assert_eq!(info.references.is_empty(), discard);
            // It still says where it is.
            let written = contents(&mut builder, &info.path);
            assert!(written.ends_with(&format!(" /nix/store/{}\n", info.path)), "{written}");
            expect_addressed(&mut builder, &info, SelfReferenceHash::WithOffsets);
        }
    }
}

/// Of an input-addressed derivation one output may be there while another is not, as after a collection.
#[test]
fn what_is_there_already_is_left_alone() {
    let mut builder = Builder::start(User::Current);
    let script = "echo $dev > $out; cat /proc/sys/kernel/random/uuid > $dev";
    let mut drv = builder.derivation(script);
    let dev = path_for("dev of two", "test-dev");
    set(&mut drv, "dev", &format!("/nix/store/{dev}"));
    drv.outputs.insert("dev".parse().unwrap(), DerivationOutput::InputAddressed(dev.clone()));
    built(&mut builder, &drv);
    let before = contents(&mut builder, &dev);
    let root = builder.root.path().to_owned();
    let layout = drover_store::StoreLayout::in_root(&root);
    let store = drover_store::LocalStore::open(layout, drover_store::Access::ReadWrite).unwrap();
    store.delete_path(&out(&drv)).unwrap();
    set(&mut drv, "disallowedReferences", "out");
    let again = build(&mut builder, &drv);
    assert_eq!((again.status, again.built_outputs.len()), (BuildStatus::Built, 2), "{}", again.error_message);
    assert_eq!(contents(&mut builder, &dev), before, "it is the one of the first build");
    assert_eq!(info(&mut builder, &out(&drv)).references, [dev].into(), "and is still found in the other");
}

/// What git has hashed would change if its temporary path were replaced, so that it may not be there, reference or not.
#[test]
fn what_git_hashes_does_not_name_itself() {
    let mut builder = Builder::start(User::Current);
    let mut drv = floating(&builder, "", Method::Git, HashAlgo::Sha1);
    let script = "while read -r a b c; do case $c in outputs=*) out=${c#*=*=\\'}; out=${out%%\\'*};; esac; done \
                  < $NIX_ATTRS_SH_FILE; echo $out > $out";
    drv.args = vec!["-ec".into(), script.into()];
    drv.env = [("__json".into(), r#"{"unsafeDiscardReferences":{"out":true}}"#.into())].into();
    rejected(&mut builder, &drv, BuildStatus::OutputRejected, "changes its hash");
}

#[test]
fn a_session_keeps_what_it_has_built() {
    let mut builder = Builder::start(User::Current);
    let drv = nar(&builder, "echo kept $out > $out");
    let kept = built_one(&mut builder, &drv);
    let root = builder.root.path().to_owned();
    let collected = Command::new(common::BUILDER).arg("gc").arg("--store").arg(&root).output().unwrap();
    assert!(collected.status.success(), "{collected:?}");
    assert_eq!(build(&mut builder, &drv).status, BuildStatus::AlreadyValid);
    assert_eq!(info(&mut builder, &kept.path), kept);
}

/// A client may call any derivation by any path, and what a build works in goes by it.
#[test]
fn builds_of_one_name_wait_for_each_other() {
    let mut builder = Builder::start(User::Current);
    let drv_path = path_for("one", "test.drv");
    let store = builder.root.path().to_owned();
    let mut other = Command::new(common::BUILDER)
        .args(["serve", "--write", "--store"])
        .arg(&store)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (output, input) = (other.stdout.take().unwrap(), other.stdin.take().unwrap());
    let client = Client::connect(output, input, StoreDir::default()).unwrap();
    let scripts = ["echo 1 > $out; while [ ! -e go ]; do sleep 0.05; done", "echo 2 > $out"];
    let drvs = scripts.map(|script| builder.derivation(script));
    let build = |mut client: Client<_, _>, drv: &BasicDerivation| {
        let (path, drv) = (drv_path.clone(), drv.clone());
        std::thread::spawn(move || client.build_derivation(&path, &drv, &BuildOptions::default()).unwrap())
    };
    let first = build(client, &drvs[0]);
    let scratch = store.join("nix/store").join(format!("{drv_path}.chroot/store"));
    let begun = || std::fs::read(scratch.join(out(&drvs[0]).as_str())).is_ok_and(|text| text == b"1\n");
    eventually("the first one runs", begun);
    let second = build(builder.client.take().unwrap(), &drvs[1]);
    eventually("the second one waits", || builder.log().contains("waiting for another build"));
    assert!(begun(), "the first one's output is where it was");
    for top in std::fs::read_dir(store.join("nix/var/nix/builds")).unwrap() {
        std::fs::write(top.unwrap().path().join("build/go"), "").unwrap();
    }
    for (thread, drv, text) in [(first, &drvs[0], "1\n"), (second, &drvs[1], "2\n")] {
        let result = thread.join().unwrap();
        assert_eq!(result.status, BuildStatus::Built, "{}", result.error_message);
        assert_eq!(contents(&mut builder, &out(drv)), text);
    }
    other.wait().unwrap();
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 seconds: {what}");
        std::thread::yield_now();
    }
}
