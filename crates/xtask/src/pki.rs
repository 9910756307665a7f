//! Keys and certificates of a throw-away Kubernetes: one authority, and everything that it signs, as PEM text.
//!
//! Valid for ever and never protected: these keys open nothing but a cluster on this machine's loopback or in its own
//! network namespace.

use anyhow::Result;
use base64::Engine;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// A certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate, which clients and servers are told to trust.
    pub certificate: String,
    /// Its private key, with which the controller manager signs.
    pub key: String,
}

/// A certificate and its private key.
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        let pem = key.serialize_pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate, key: pem })
    }

    /// A certificate for a user (`name`, and Kubernetes groups) and for a server that is reached at `hosts`.
    pub fn issue(&self, name: &str, groups: &[&str], hosts: &[&str]) -> Result<Identity> {
        let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(hosts)?;
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Identity { certificate, key: key.serialize_pem() })
    }

    /// A kubeconfig that reaches `server` as this user: everything is inside, so it works from any directory and root.
    pub fn kubeconfig(&self, server: &str, user: &Identity) -> String {
        let base64 = |pem: &str| base64::engine::general_purpose::STANDARD.encode(pem);
        format!(
            "apiVersion: v1
kind: Config
clusters: [{{name: drover, cluster: {{server: '{server}', certificate-authority-data: {ca}}}}}]
users: [{{name: user, user: {{client-certificate-data: {certificate}, client-key-data: {key}}}}}]
contexts: [{{name: drover, context: {{cluster: drover, user: user}}}}]
current-context: drover
",
            ca = base64(&self.certificate),
            certificate = base64(&user.certificate),
            key = base64(&user.key),
        )
    }
}

/// A private key that signs service account tokens, and the public key that checks them.
pub fn signing_key() -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    Ok((key.serialize_pem(), key.public_key_pem()))
}
