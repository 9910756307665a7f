//! TLS as all of Drover's own clients speak it: by ring, checked against the system's authorities.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// A client's configuration by ring, whatever provider the process has as its default, or none. `certificates`: a PEM file of
/// further authorities. With `needed`, one at least must be known. The error is a sentence.
pub fn client_config(certificates: Option<&Path>, needed: bool) -> Result<rustls::ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(system.certs);
    if let Some(path) = certificates {
        let fail = |error: &dyn std::fmt::Display| {
            format!("cannot read certificates from {}: {error}", path.display())
        };
        for certificate in CertificateDer::pem_file_iter(path).map_err(|error| fail(&error))? {
            let certificate = certificate.map_err(|error| fail(&error))?;
            roots.add(certificate).map_err(|error| fail(&error))?;
        }
    }
    if needed && roots.is_empty() {
        return Err(
            "no certificate authorities are known here; install them, or name a PEM file of them in \
                    SSL_CERT_FILE"
                .into(),
        );
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
