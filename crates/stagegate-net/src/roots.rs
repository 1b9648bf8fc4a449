//! TLS: owns the one cryptography provider of the process and which certificate authorities are trusted.

use std::{
    path::Path,
    sync::{Arc, Once},
};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use stagegate_core::{Code, Error, Violation};

use crate::config::NetConfig;

/// The largest file of certificates that is read, in bytes; the system's own are some 250 KB.
const CA_FILE_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Variables that name the system's authorities instead of their usual place.
const SYSTEM_VARIABLES: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

static INSTALL: Once = Once::new();

/// Makes ring the process's TLS provider. Call it before the first client of any kind is built; again is harmless.
pub fn install_tls() {
    INSTALL.call_once(|| {
        // It fails only where the process already has a provider, and then that one serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// How servers are recognised: by the system's authorities and those of `ca_file`.
pub(crate) fn tls(config: &NetConfig) -> Result<ClientConfig, Error> {
    install_tls();
    let mut roots = RootCertStore::empty();
    system(&mut roots)?;
    if let Some(path) = &config.ca_file {
        own(path, &mut roots)?;
    }
    let mut tls = ClientConfig::builder().with_root_certificates(Arc::new(roots)).with_no_client_auth();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    if config.http2 {
        tls.alpn_protocols.insert(0, b"h2".to_vec());
    }
    Ok(tls)
}

/// The system's authorities; Mozilla's where it has none, as in a container without any files.
fn system(roots: &mut RootCertStore) -> Result<(), Error> {
    let found = rustls_native_certs::load_native_certs();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    for error in &found.errors {
        tracing::warn!(%error, "a certificate authority of the system could not be read");
    }
    if added > 0 {
        return Ok(());
    }
    if let Some(name) = SYSTEM_VARIABLES.into_iter().find(|name| std::env::var_os(name).is_some()) {
        let reason = found.errors.first().map_or_else(|| "it holds no certificate".to_owned(), ToString::to_string);
        let mend = "name a PEM file of certificates (a directory for SSL_CERT_DIR), or unset the variable";
        return Err(refused(name, reason, mend));
    }
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    Ok(())
}

/// The operator's own authorities.
fn own(path: &Path, roots: &mut RootCertStore) -> Result<(), Error> {
    let wrong = |what: String| {
        refused("net.ca_file", format!("{}: {what}", path.display()), "name a file of PEM certificates of authorities")
    };
    let length = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?.len();
    if length > CA_FILE_MAX_BYTES {
        return Err(wrong(format!("the file is over {CA_FILE_MAX_BYTES} bytes")));
    }
    let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let mut found = 0_usize;
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let certificate = certificate.map_err(|error| wrong(format!("certificate {}: {error}", found + 1)))?;
        roots.add(certificate).map_err(|error| wrong(format!("certificate {}: {error}", found + 1)))?;
        found += 1;
    }
    if found == 0 { Err(wrong("it holds no certificate".to_owned())) } else { Ok(()) }
}

fn refused(place: &str, what: String, mend: &str) -> Error {
    Error::violations(Code::InvalidConfig, vec![Violation::new(Code::InvalidConfig, place, what).mend(mend)])
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn with_ca_file(path: PathBuf) -> Result<ClientConfig, Error> {
        tls(&NetConfig { ca_file: Some(path), ..NetConfig::default() })
    }

    #[test]
    fn a_file_of_authorities_that_cannot_be_used_is_refused_by_its_key() {
        let place = tempfile::tempdir().expect("a directory");
        let file = |name: &str, text: &str| {
            let path = place.path().join(name);
            std::fs::write(&path, text).expect("writable");
            path
        };
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (path, part) in [
            (place.path().join("nowhere"), "No such file"),
            (file("empty", ""), "holds no certificate"),
            (file("text", "not a certificate"), "holds no certificate"),
            (file("broken", broken), "certificate 1"),
        ] {
            let error = with_ca_file(path).expect_err("refused");
            assert_eq!((error.code, error.violations[0].path.as_str()), (Code::InvalidConfig, "net.ca_file"));
            assert!(error.violations[0].message.contains(part), "{error}");
        }
    }

    #[test]
    fn http2_is_offered_unless_it_is_turned_off() {
        let offered = |http2| tls(&NetConfig { http2, ..NetConfig::default() }).expect("authorities").alpn_protocols;
        assert_eq!(offered(true), [b"h2".to_vec(), b"http/1.1".to_vec()]);
        assert_eq!(offered(false), [b"http/1.1".to_vec()]);
    }
}
