//! An authority that no machine knows, and servers with its certificates: owns their making. What a client must be told to
//! trust it is [`TestAuthority::pem`].

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};

pub use tokio_rustls::TlsAcceptor;

/// The names that its servers have.
const NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// An authority, and a certificate for servers on loopback.
#[derive(Debug)]
pub struct TestAuthority {
    pem: String,
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl TestAuthority {
    /// A new one; each is a stranger to all others.
    ///
    /// # Panics
    /// Where no keys can be made: nothing can be tested then.
    #[expect(clippy::expect_used, clippy::new_without_default, reason = "test support: it is made, not defaulted")]
    pub fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).expect("a certificate").pem();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().expect("a key");
        let names = NAMES.map(str::to_owned).to_vec();
        let certificate =
            CertificateParams::new(names).expect("names").signed_by(&key, &issuer).expect("a certificate");
        Self { pem, certificate: certificate.der().clone(), key: PrivatePkcs8KeyDer::from(key.serialize_der()) }
    }

    /// Its own certificate, as PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// For a server that speaks these protocols: `h2`, `http/1.1`.
    ///
    /// # Panics
    /// Where the certificate cannot be used, which is a defect here.
    #[expect(clippy::expect_used, reason = "test support: the certificate was made a moment ago")]
    pub fn acceptor(&self, protocols: &[&str]) -> TlsAcceptor {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("TLS");
        let key = PrivateKeyDer::Pkcs8(self.key.clone_key());
        let mut config = builder
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.clone()], key)
            .expect("a certificate and its key");
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        TlsAcceptor::from(Arc::new(config))
    }
}
