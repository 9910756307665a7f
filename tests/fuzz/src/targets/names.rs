//! Short texts with rules of their own: store paths, hashes, content addresses, signatures, output names, nix32. What was
//! parsed prints as text that parses to the same; store paths print as they were.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use drover_nix::signature::{PublicKey, SecretKey, Signature};
use drover_nix::{ContentAddress, Hash, HashAlgo, Method, OutputName, Sha256, StoreDir, StorePath, base32};

pub(super) fn check(data: &[u8]) {
    let dir = StoreDir::default();
    if let Ok(path) = dir.parse(data) {
        assert_eq!(dir.full(&path).as_bytes(), data);
        assert_eq!(path.hash_part().len() + 1 + path.name().len(), path.as_str().len());
        assert!(!path.as_str().contains(['/', '\0', '\n', ' ']));
    }
    if let Ok(path) = StorePath::from_base_name(data) {
        assert_eq!(path.as_str().as_bytes(), data);
    }
    let _ = OutputName::new(data).map(|name| assert_eq!(name.as_str().as_bytes(), data));
    let Ok(text) = std::str::from_utf8(data) else { return };
    again::<Sha256>(text);
    again::<ContentAddress>(text);
    again::<Signature>(text);
    again::<PublicKey>(text);
    let _ = SecretKey::parse(text);
    let _ = StoreDir::new(text);
    let _ = text.parse::<Method>();
    let _ = Method::parse_with_algo(text);
    for algo in [None, Some(HashAlgo::Md5), Some(HashAlgo::Sha1), Some(HashAlgo::Sha512)] {
        let Ok(hash) = Hash::parse(text, algo) else { continue };
        assert_eq!(hash.bytes.len(), hash.algo.size());
        for printed in [hash.to_string(), hash.to_sri(), format!("{}:{}", hash.algo, hash.to_hex())] {
            assert_eq!(Hash::parse(&printed, None).ok().as_ref(), Some(&hash), "{printed}");
        }
    }
    if let Ok(bytes) = base32::decode::<20>(text) {
        assert_eq!(base32::encode(&bytes), text, "two spellings of one hash");
    }
}

fn again<T: FromStr + Display + PartialEq + Debug>(text: &str) {
    let Ok(value) = text.parse::<T>() else { return };
    match value.to_string().parse::<T>() {
        Ok(again) => assert_eq!(again, value),
        Err(_) => panic!("{value} does not parse"),
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    [
        "/nix/store/i00sflxqsj37lfmf95m8mn0grv615hpj-hello-2.12",
        "i00sflxqsj37lfmf95m8mn0grv615hpj-a+b.c_d?e=f",
        "sha256:00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq",
        "sha256-WJG7GU4vHxNHMGSL0TvbOPSTZ6lWqHsZHPXYhw9ZtZg=",
        "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        "fixed:r:sha256:00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq",
        "fixed:git:sha1:aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d",
        "text:md5:5d41402abc4b2a76b9719d911017c592",
        "cache.example-1:kqAJqfDUyrhyDoILX2QlQKKye1QWUD+Ps3YiI+vbadoIWsHkPhWZbkWPNhPQ8R2MOHsurrQwKu6wDSkWErsMAA==",
        "i00sflxqsj37lfmf95m8mn0grv615hpj",
        "out",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
