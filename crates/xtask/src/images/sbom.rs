//! What an image is made of, as SPDX 2.3 JSON: the crates that its program is linked with, the C libraries that some of them
//! bring, the libraries of the compiler and of the system, and Debian's packages.
//!
//! The document depends on nothing but what is in it: no time, no random number, no path.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::crates::{Crates, Id};
use super::programs;
use crate::platform::Platform;
use crate::{parts, run};

/// Where it lies in each image.
pub const PATH: &str = "sbom.spdx.json";

/// C sources that a crate brings along and links: the crate, the library, its licence, and how its header names its version.
const BUNDLED: [(&str, &str, &str, &str, &[&str]); 3] = [
    ("libsqlite3-sys", "sqlite", "blessing", "sqlite3/sqlite3.h", &["SQLITE_VERSION "]),
    (
        "zstd-sys",
        "zstd",
        "BSD-3-Clause OR GPL-2.0-only",
        "zstd/lib/zstd.h",
        &["ZSTD_VERSION_MAJOR ", "ZSTD_VERSION_MINOR ", "ZSTD_VERSION_RELEASE "],
    ),
    (
        "liblzma-sys",
        "xz",
        "0BSD",
        "xz/src/liblzma/api/lzma/version.h",
        &["LZMA_VERSION_MAJOR ", "LZMA_VERSION_MINOR ", "LZMA_VERSION_PATCH "],
    ),
];

/// The document of the image `image` for a platform, whose program is that crate, with these Debian packages beside it: name and version.
pub(super) fn document(
    image: &str,
    platform: Platform,
    program: &Id,
    crates: &Crates,
    debian: &[(String, String)],
) -> Result<Value> {
    let mut packages = Vec::new();
    let mut relations = vec![relation("SPDXRef-DOCUMENT", "DESCRIBES", &crate_id(program))];
    let mut extracted = Vec::new();
    for id in crates.closure(program) {
        let one = crates.all.get(&id).with_context(|| format!("{} {} is not known", id.0, id.1))?;
        let purl = format!("pkg:cargo/{}@{}", id.0, id.1.replace('+', "%2B"));
        let mut package = package(&crate_id(&id), &id, &one.licence, &purl);
        if let Some(checksum) = &one.checksum {
            package["checksums"] = json!([{ "algorithm": "SHA256", "checksumValue": checksum }]);
        }
        packages.push(package);
        for linked in crates.links.get(&id).into_iter().flatten() {
            relations.push(relation(&crate_id(&id), "DEPENDS_ON", &crate_id(linked)));
        }
        if let Some((_, library, licence, header, names)) = BUNDLED.iter().find(|bundled| bundled.0 == id.0) {
            let text = fs::read_to_string(one.dir.join(header))
                .with_context(|| format!("no {header} in {}", id.0))?;
            let found = (
                (*library).to_owned(),
                version(&text, names).with_context(|| format!("no version in {header}"))?,
            );
            let spdx = format!("SPDXRef-generic-{library}");
            packages.push(self::package(
                &spdx,
                &found,
                licence,
                &format!("pkg:generic/{library}@{}", found.1),
            ));
            relations.push(relation(&crate_id(&id), "STATIC_LINK", &spdx));
        }
    }
    for (id, licence) in [(rust()?, "MIT OR Apache-2.0"), (glibc(platform)?, "LGPL-2.1-or-later")] {
        let spdx = format!("SPDXRef-generic-{}", id.0);
        let purl = format!("pkg:generic/{}@{}", id.0, id.1.replace('+', "%2B"));
        packages.push(package(&spdx, &id, licence, &purl));
        relations.push(relation(&crate_id(program), "STATIC_LINK", &spdx));
    }
    for id in debian {
        let spdx = format!("SPDXRef-deb-{}", word(&id.0));
        // Debian says licences in a file for each package, not in an expression.
        let licence = format!("LicenseRef-Debian-{}", word(&id.0));
        extracted.push(json!({
            "licenseId": licence,
            "name": format!("Debian's copyright file of {}", id.0),
            "extractedText": format!("See /licenses/{} in the image.", id.0),
        }));
        let version = id.1.replace('+', "%2B").replace(':', "%3A");
        let purl = format!("pkg:deb/debian/{}@{version}?arch={}", id.0, platform.architecture());
        packages.push(package(&spdx, id, &licence, &purl));
        relations.push(relation("SPDXRef-DOCUMENT", "DESCRIBES", &spdx));
    }
    let digest = parts::key(&serde_json::to_string(&(&packages, &relations))?);
    Ok(json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": image,
        // Unique for the content, as the format wants it; nothing lies there.
        "documentNamespace": format!("https://drover.build/spdx/{image}-{}-{digest}", program.1),
        "creationInfo": { "created": "1970-01-01T00:00:01Z", "creators": ["Tool: drover-xtask"] },
        "packages": packages,
        "relationships": relations,
        "hasExtractedLicensingInfos": extracted,
    }))
}

/// The versions that were noted when the packages in `root` were unpacked; of those that `wanted` wants.
pub(super) fn debian(root: &Path, wanted: &[impl AsRef<str>]) -> Result<Vec<(String, String)>> {
    let noted = root.join("versions");
    let noted = fs::read_to_string(&noted).with_context(|| format!("could not read {}", noted.display()))?;
    let version = |name: &str| noted.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let names: BTreeSet<&str> = wanted.iter().map(AsRef::as_ref).collect();
    let versions = names.into_iter().map(|name| {
        let version = version(name).with_context(|| format!("the version of {name} was not noted"))?;
        Ok((name.to_owned(), version.to_owned()))
    });
    versions.collect()
}

fn package(spdx: &str, id: &Id, licence: &str, purl: &str) -> Value {
    json!({
        "SPDXID": spdx,
        "name": id.0,
        "versionInfo": id.1,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": licence,
        "copyrightText": "NOASSERTION",
        "externalRefs": [{
            "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl,
        }],
    })
}

fn relation(from: &str, kind: &str, to: &str) -> Value {
    json!({ "spdxElementId": from, "relationshipType": kind, "relatedSpdxElement": to })
}

fn crate_id(id: &Id) -> String {
    format!("SPDXRef-cargo-{}-{}", word(&id.0), word(&id.1))
}

/// With what SPDX allows in an identifier: letters, digits, `.` and `-`. No two crates differ in `-` and `_` alone.
fn word(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect()
}

/// From lines such as `#define ZSTD_VERSION_MAJOR    1` or `#define SQLITE_VERSION "3.50.0"`.
fn version(header: &str, names: &[&str]) -> Option<String> {
    let number = |name: &&str| {
        let line = header.lines().find_map(|line| line.strip_prefix("#define ")?.strip_prefix(*name));
        line.map(|value| value.trim().trim_matches('"').to_owned())
    };
    names.iter().map(number).collect::<Option<Vec<_>>>().map(|numbers| numbers.join("."))
}

/// Rust's own library.
fn rust() -> Result<Id> {
    let said = run::stdout(Command::new("rustc").arg("--version"))?;
    let version = said.split(' ').nth(1).context("rustc names no version")?;
    Ok(("rust-std".into(), version.to_owned()))
}

/// The C library that the platform's compiler links, by its own headers.
fn glibc(platform: Platform) -> Result<Id> {
    let mut preprocess = Command::new(programs::compiler(platform)?);
    preprocess.args(["-E", "-dM", "-include", "features.h", "-x", "c", "/dev/null"]);
    let version = version(&run::stdout(&mut preprocess)?, &["__GLIBC__ ", "__GLIBC_MINOR__ "]);
    Ok(("glibc".into(), version.context("the C library's headers name no version")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::crates;
    use std::collections::BTreeMap;

    #[test]
    fn every_crate_that_is_linked_is_there_with_a_licence_and_none_else() {
        let platform = Platform::native().unwrap();
        let all = crates::of(&programs::NAMES, platform).unwrap();
        for name in programs::NAMES {
            let program = all.id(name).unwrap();
            let debian = [("libx".to_owned(), "1:2.0+b1".to_owned())];
            let document = document(name, platform, &program, &all, &debian).unwrap();
            assert_eq!(document, self::document(name, platform, &program, &all, &debian).unwrap());
            let mut ids = BTreeSet::from(["SPDXRef-DOCUMENT"]);
            let mut purls = BTreeMap::new();
            let text = |value: &'_ Value, key: &str| value[key].as_str().unwrap().to_owned();
            for package in document["packages"].as_array().unwrap() {
                let id = package["SPDXID"].as_str().unwrap();
                let allowed = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
                assert!(id.strip_prefix("SPDXRef-").unwrap().chars().all(allowed), "{id}");
                assert!(ids.insert(id), "{id} is there twice");
                let licence = text(package, "licenseDeclared");
                assert!(!licence.is_empty() && !licence.contains('/'), "{id}: {licence}");
                let purl = text(&package["externalRefs"][0], "referenceLocator");
                let (start, version) = purl.split_once('@').unwrap();
                assert!(start.starts_with("pkg:") && start.matches('/').count() >= 1, "{purl}");
                assert!(!version.is_empty() && !version.contains(['+', ':', ' ', '/']), "{purl}");
                purls.insert((text(package, "name"), text(package, "versionInfo")), start.to_owned());
            }
            for relation in document["relationships"].as_array().unwrap() {
                for end in ["spdxElementId", "relatedSpdxElement"] {
                    assert!(ids.contains(relation[end].as_str().unwrap()), "{relation}");
                }
            }
            // Cargo's own list, without a graph in between; each program alone has no more features than both together.
            let mut tree = run::cargo();
            tree.args(["tree", "--locked", "-e", "normal,no-proc-macro", "--prefix", "none", "-p", name]);
            if programs::FEATURES.starts_with(name) {
                tree.args(["--features", programs::FEATURES]);
            }
            let said = run::stdout(tree.args(["--target", platform.target()])).unwrap();
            let linked: BTreeSet<_> = said.lines().filter_map(|line| line.split_once(" v")).collect();
            for (crate_name, rest) in linked {
                let id = (crate_name.to_owned(), rest.split(' ').next().unwrap().to_owned());
                assert!(purls.contains_key(&id), "{name} is linked with {id:?}");
            }
            for (id, start) in &purls {
                assert!(
                    start != "pkg:cargo/" && (!start.starts_with("pkg:cargo/") || all.all.contains_key(id)),
                    "{id:?}"
                );
            }
            // What only tests and build scripts take is in neither.
            assert!(!purls.keys().any(|id| ["proptest", "cc", "serde_derive"].contains(&id.0.as_str())));
            let sqlite = purls.keys().any(|id| id.0 == "sqlite");
            assert!(sqlite || name != "drover-builder");
            assert!(purls.keys().any(|id| id.0 == "glibc"));
            let licences = all.licences(&all.closure(&program)).unwrap();
            assert!(licences.contains("\nring 0.") && licences.contains("Permission is hereby granted"));
        }
    }

    #[test]
    fn versions_are_read_from_headers() {
        let header = "#define A_MAJOR   1\n#define A_MINOR 5\n#define B_VERSION  \"3.1\"\n";
        assert_eq!(version(header, &["A_MAJOR ", "A_MINOR "]).as_deref(), Some("1.5"));
        assert_eq!(version(header, &["B_VERSION "]).as_deref(), Some("3.1"));
        assert_eq!(version(header, &["C "]), None);
    }
}
