//! The text of `.drv` files: what was parsed prints as text that parses to the same, and is then canonical.

use drover_nix::derivation::{aterm, modulo};
use drover_nix::{Derivation, StoreDir};

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
    ];
    let made = [plain.ok(), more.ok(), Some(fixed.to_vec()), Some(floating.to_vec())];
    made.into_iter().flatten().chain(real.map(<[u8]>::to_vec)).collect()
}
