//! TLS: owns the choice of the one cryptography provider that every client of the process uses.

use std::sync::Once;

static INSTALL: Once = Once::new();

/// Makes ring the process's TLS provider. Call it before the first HTTP or Redis client is built; again is harmless.
pub fn install_tls() {
    INSTALL.call_once(|| {
        // It fails only where the process already has a provider, and then that one serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
