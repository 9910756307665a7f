//! The text of `.drv` files: what was parsed prints as text that parses to the same, and is then canonical.

use bstr::ByteSlice as _;
use drover_nix::derivation::modulo::InputHash;
use drover_nix::derivation::{DerivationType, aterm, modulo, placeholder, realisation};
use drover_nix::{Derivation, Sha256, StoreDir, StorePath};

use super::server::path;
use crate::session::derivation;

pub(super) fn check(data: &[u8]) {
    let dir = StoreDir::default();
    let Ok(drv) = aterm::parse(&dir, "made", data) else { return };
    // Some fields print without escapes, so not everything that parses can be printed.
    let Ok(text) = aterm::print(&dir, &drv) else { return };
    let again = aterm::parse(&dir, "made", &text);
    match again {
        Ok(again) => assert_eq!(again, drv),
        Err(error) => panic!("{error}: {:?}", bstr::BStr::new(&text)),
    }
    assert_eq!(aterm::print(&dir, &drv).ok(), Some(text));
    // Neither may they panic, whatever the fields say.
    let _ = drv.basic.kind();
    let _ = drv.basic.output_paths(&dir);
    let _ = modulo::drv_path(&dir, &drv);
    let _ = modulo::basic_output_paths(&dir, &drv.basic);
    let mut input = |_: &StorePath| Ok(InputHash::Whole(Sha256::of(b"input")));
    let _ = realisation::keys(&dir, &drv, &mut input);
    let Ok(basic) = drv.resolve(&dir, |_, output| {
        dir.make_path("built", Sha256::of(b"built"), &output.path_name("input")).ok()
    }) else {
        return;
    };
    assert!(drv.basic.input_srcs.is_subset(&basic.input_srcs));
    if let Ok(DerivationType::InputAddressed) = drv.basic.kind() {
        return;
    }
    // Every placeholder of an input is gone, and no path is left open.
    for (drv, outputs) in &drv.input_drvs {
        for text in outputs.iter().filter_map(|output| placeholder::of_input(drv, output)) {
            assert!(basic.args.iter().chain(basic.env.values()).all(|value| value.find(&text).is_none()));
        }
    }
    assert!(!matches!(basic.kind(), Ok(DerivationType::Deferred)));
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let dir = StoreDir::default();
    let mut drv = Derivation {
        basic: derivation("made", &path("made")),
        input_drvs: std::collections::BTreeMap::new(),
    };
    let plain = aterm::print(&dir, &drv);
    drv.basic.args.push(b"\"quoted\"\\\n\t\xff".as_slice().into());
    let out = drover_nix::OutputName::out();
    drv.input_drvs.insert(path("b.drv"), [out].into());
    let more = aterm::print(&dir, &drv);
    let fixed = br#"Derive([("out","/nix/store/m5f2rbrmmr7x7p4whpw9d2cn0sw1i6jc-made","r:sha256","0000000000000000000000000000000000000000000000000000000000000000")],[],[],"x86_64-linux","builtin:fetchurl",[],[("out","")])"#;
    let floating = br#"Derive([("dev","","r:sha256","impure"),("out","","sha256","")],[],[],"x","",[],[])"#;
    // Files that real Nix wrote.
    let real = [
        &include_bytes!("../../../../crates/nix/testdata/b2nsf2bia2n669rxhbvfjx7qpy4zjljr-leaf.drv")[..],
        include_bytes!("../../../../crates/nix/testdata/inyw81mm787rpk7lrbq7ypd0zj55kgpv-attrs.drv"),
        include_bytes!("../../../../crates/nix/testdata/p3s9bs8pv3fjlqsq5534pawsrh6kmcha-flat.tar.drv"),
        include_bytes!(
            "../../../../crates/nix/testdata/content-addressed/kvl5syg3n9r7rmmrdzkpd0ca7mf4pwyl-above.drv"
        ),
        include_bytes!(
            "../../../../crates/nix/testdata/content-addressed/gm4wzcsawaihldpc37262n1n3ism6xgj-deferred.drv"
        ),
    ];
    let made = [plain.ok(), more.ok(), Some(fixed.to_vec()), Some(floating.to_vec())];
    made.into_iter().flatten().chain(real.map(<[u8]>::to_vec)).collect()
}
