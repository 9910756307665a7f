//! narinfo files: printing what was parsed, and parsing that, gives the same.

use drover_nix::signature::Signature;
use drover_nix::{NarInfo, StoreDir};

pub(super) fn check(data: &[u8]) {
    let dir = StoreDir::default();
    let Ok(info) = NarInfo::parse(&dir, data) else { return };
    let text = info.print(&dir);
    match NarInfo::parse(&dir, text.as_bytes()) {
        Ok(again) => assert_eq!(again, info),
        Err(error) => panic!("{error}: {text}"),
    }
    assert_eq!(info.info.fingerprint(&dir).matches(';').count(), 4, "a name hides a separator");
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let signature = Signature { key_name: "cache.example-1".into(), bytes: [9; 64] };
    let path = "i00sflxqsj37lfmf95m8mn0grv615hpj-hello-2.12";
    let hash = "sha256:00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq";
    let needed = format!("StorePath: /nix/store/{path}\nURL: nar/x.nar\nNarHash: {hash}\nNarSize: 120\n");
    let more = format!(
        "Compression: zstd\nFileHash: {hash}\nFileSize: 99\nReferences: {path}\nDeriver: {path}.drv\n\
         Sig: {signature}\nCA: fixed:r:{hash}\nSystem: x86_64-linux\n"
    );
    vec![needed.clone().into(), (needed + &more).into()]
}
