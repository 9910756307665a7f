//! `nix derivation show` in every version's form: whatever is accepted can be printed as a `.drv` file and read again.

use drover_nix::StoreDir;
use drover_nix::derivation::{aterm, json};

pub(super) fn check(data: &[u8]) {
    let dir = StoreDir::default();
    let Ok(derivations) = json::parse(&dir, data) else { return };
    for drv in derivations.into_values() {
        let Ok(text) = aterm::print(&dir, &drv) else { continue };
        match aterm::parse(&dir, &drv.basic.name, &text) {
            Ok(again) => assert_eq!(again, drv),
            Err(error) => panic!("{error}: {:?}", bstr::BStr::new(&text)),
        }
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    // What real Nix of three versions prints.
    [
        &include_bytes!("../../../../crates/nix/testdata/show-2.8.json")[..],
        include_bytes!("../../../../crates/nix/testdata/show-2.26.json"),
        include_bytes!("../../../../crates/nix/testdata/show-2.34.json"),
    ]
    .map(<[u8]>::to_vec)
    .into()
}
