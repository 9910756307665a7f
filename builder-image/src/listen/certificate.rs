//! Whether an OpenSSH user certificate opens the door. A pure function of the certificate, who shows it, from where and
//! when (facts: OpenSSH's PROTOCOL.certkeys; for empty principals the rule of OpenSSH 10.3: they match nobody).

use std::net::IpAddr;

use russh::keys::{Algorithm, Certificate, HashAlg, PublicKey};

use super::address::Networks;
use super::authorized::{Access, Rule, forced_command};

/// How a certificate is shown.
#[derive(Clone, Copy)]
pub(super) struct Visit<'a> {
    /// The name that the client logs in as.
    pub user: &'a str,
    pub address: IpAddr,
    /// Seconds since 1970.
    pub now: u64,
}

/// That the client has the certificate's private key is for the caller to know. The error is why not, for the log.
pub(super) fn judge(rules: &[Rule], certificate: &Certificate, visit: Visit<'_>) -> Result<Access, String> {
    let signer = PublicKey::from(certificate.signature_key().clone());
    let who = format!(
        "certificate {:?} (serial {}, signed by {})",
        certificate.key_id(),
        certificate.serial(),
        signer.fingerprint(HashAlg::Sha256)
    );
    let restrictions = check(certificate, visit).map_err(|why| format!("{who}: {why}"))?;
    let mut refusal = format!("{who}: its signer is not an authority here");
    for rule in rules.iter().filter(|rule| rule.authority && rule.key.key_data() == signer.key_data()) {
        match check_rule(rule, certificate, visit) {
            Ok(()) => return Ok(Access { write: rule.write && restrictions.write, who }),
            Err(why) => refusal = format!("{who}: {why}"),
        }
    }
    Err(refusal)
}

/// What a certificate's own options leave of an access.
struct Restrictions {
    write: bool,
}

/// All that does not depend on who signed it.
fn check(certificate: &Certificate, visit: Visit<'_>) -> Result<Restrictions, String> {
    if !certificate.cert_type().is_user() {
        return Err("it is a host's, not a user's".into());
    }
    if certificate.algorithm() != Algorithm::Ed25519 {
        return Err(format!("keys of type {} are not accepted, only Ed25519", certificate.algorithm()));
    }
    if certificate.verify_signature().is_err() {
        return Err("its signature is wrong".into());
    }
    let (after, before) = (certificate.valid_after(), certificate.valid_before());
    if visit.now < after {
        return Err(format!("it is not valid before {after} (now: {})", visit.now));
    }
    if visit.now >= before {
        return Err(format!("it expired at {before} (now: {})", visit.now));
    }
    if certificate.valid_principals().is_empty() {
        return Err("it names no principals".into());
    }
    let mut restrictions = Restrictions { write: true };
    for (name, value) in certificate.critical_options().iter() {
        match name.as_str() {
            "force-command" => {
                let write = forced_command(value);
                restrictions.write &= write.ok_or_else(|| format!("it is for the command {value:?} only"))?;
            }
            "source-address" => {
                let networks = Networks::parse(value).map_err(|why| format!("source-address: {why}"))?;
                if !networks.contains(visit.address) {
                    return Err(format!("it is not for clients at {}", visit.address));
                }
            }
            // Critical means: refuse what you do not understand.
            other => return Err(format!("its critical option {other:?} is not understood")),
        }
    }
    Ok(restrictions)
}

/// What the authority's line asks for.
fn check_rule(rule: &Rule, certificate: &Certificate, visit: Visit<'_>) -> Result<(), String> {
    let theirs = certificate.valid_principals();
    let named = match &rule.principals {
        Some(ours) => ours.iter().any(|name| theirs.contains(name)),
        None => theirs.iter().any(|name| name == visit.user),
    };
    if !named {
        return Err(match &rule.principals {
            Some(ours) => format!("none of its principals {theirs:?} is among {ours:?}"),
            None => format!("its principals {theirs:?} do not name the user {:?}", visit.user),
        });
    }
    match &rule.from {
        Some(networks) if !networks.contains(visit.address) => {
            Err(format!("its signer's certificates are not for clients at {}", visit.address))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use russh::keys::PrivateKey;
    use russh::keys::ssh_key::certificate::{Builder, CertType};
    use russh::keys::ssh_key::private::Ed25519Keypair;

    use super::super::authorized;
    use super::*;

    const VISIT: Visit<'_> =
        Visit { user: "root", address: IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 7)), now: 1_000 };

    fn key(seed: u8) -> PrivateKey {
        Ed25519Keypair::from_seed(&[seed; 32]).into()
    }

    fn rules(options: &str) -> Vec<Rule> {
        let key = key(1).public_key().to_openssh().unwrap();
        authorized::parse(&format!("cert-authority{options} {key}")).unwrap()
    }

    /// For `root`, from 900 to 2,000, with something changed.
    fn certificate(change: impl FnOnce(&mut Builder)) -> Certificate {
        signed_by(1, CertType::User, change)
    }

    fn signed_by(authority: u8, kind: CertType, change: impl FnOnce(&mut Builder)) -> Certificate {
        let mut builder = Builder::new([0; 32], key(2).public_key(), 900, 2_000).unwrap();
        builder.key_id("alice").unwrap().cert_type(kind).unwrap();
        change(&mut builder);
        builder.sign(&key(authority)).unwrap()
    }

    fn root(builder: &mut Builder) {
        builder.valid_principal("root").unwrap();
    }

    fn refused(rules: &[Rule], certificate: &Certificate, visit: Visit<'_>) -> String {
        judge(rules, certificate, visit).unwrap_err()
    }

    #[test]
    fn a_certificate_in_its_time() {
        let good = certificate(root);
        let at = |now| judge(&rules(""), &good, Visit { now, ..VISIT });
        assert!(at(900).is_ok() && at(1_999).is_ok());
        assert!(at(899).unwrap_err().contains("not valid before 900"));
        assert!(at(2_000).unwrap_err().contains("expired at 2000"));
        let access = at(1_000).unwrap();
        assert!(access.write && access.who.starts_with("certificate \"alice\" (serial 0, signed by SHA256:"));
    }

    #[test]
    fn only_what_an_authority_signed_for_a_user() {
        assert!(
            refused(&rules(""), &signed_by(3, CertType::User, root), VISIT).contains("not an authority here")
        );
        // The authority's key on a line without the option is a login, not an authority.
        let line = key(1).public_key().to_openssh().unwrap();
        let plain = authorized::parse(&line).unwrap();
        assert!(refused(&plain, &certificate(root), VISIT).contains("not an authority here"));
        let host = signed_by(1, CertType::Host, root);
        assert!(refused(&rules(""), &host, VISIT).contains("a host's"));
        let mut bytes = certificate(root).to_bytes().unwrap();
        let place = bytes.windows(4).position(|window| window == b"root").unwrap();
        bytes[place..place + 4].copy_from_slice(b"toor");
        let forged = Certificate::from_bytes(&bytes).unwrap();
        assert!(refused(&rules(""), &forged, VISIT).contains("signature is wrong"));
    }

    #[test]
    fn principals() {
        let of = |names: &[&str]| {
            certificate(|builder| {
                for name in names {
                    builder.valid_principal(*name).unwrap();
                }
                if names.is_empty() {
                    builder.all_principals_valid().unwrap();
                }
            })
        };
        assert!(judge(&rules(""), &of(&["nix", "root"]), VISIT).is_ok());
        assert!(refused(&rules(""), &of(&["nix"]), VISIT).contains("do not name the user \"root\""));
        assert!(refused(&rules(""), &of(&["*"]), VISIT).contains("do not name the user"));
        assert!(refused(&rules(""), &of(&[]), VISIT).contains("names no principals"));
        let named = rules(r#",principals="deploy,nix""#);
        assert!(judge(&named, &of(&["nix"]), VISIT).is_ok());
        assert!(refused(&named, &of(&["root"]), VISIT).contains("is among"));
    }

    #[test]
    fn critical_options() {
        let with = |name: &str, value: &str| {
            certificate(|builder| {
                root(builder);
                builder.critical_option(name, value).unwrap();
                builder.extension("permit-pty", "").unwrap();
            })
        };
        let judge = |name, value| judge(&rules(""), &with(name, value), VISIT);
        assert!(judge("source-address", "10.0.0.0/8,192.0.2.1").is_ok());
        assert!(judge("source-address", "192.0.2.0/24").unwrap_err().contains("not for clients at 10.0.0.7"));
        assert!(judge("source-address", "example.org").unwrap_err().contains("neither an address"));
        assert!(judge("force-command", "nix-store --serve --write").unwrap().write);
        assert!(!judge("force-command", "drover-builder serve").unwrap().write);
        assert!(
            judge("force-command", "/bin/date").unwrap_err().contains("for the command \"/bin/date\" only")
        );
        for unknown in ["verify-required", "no-such-option@example.org"] {
            assert!(judge(unknown, "").unwrap_err().contains("not understood"), "{unknown}");
        }
    }

    #[test]
    fn the_line_restricts_too() {
        let good = certificate(root);
        assert!(refused(&rules(r#",from="192.0.2.1""#), &good, VISIT).contains("are not for clients at"));
        assert!(!judge(&rules(r#",command="drover-builder serve""#), &good, VISIT).unwrap().write);
    }
}
