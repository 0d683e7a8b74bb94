//! Reads PEM files for rustls. The cryptography of all TLS connections is ring's.

use std::{
    path::Path,
    sync::{Arc, LazyLock},
};

use tokio::sync::OnceCell;
use tokio_rustls::rustls::{
    RootCertStore,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

/// Why TLS cannot be set up: a setting or file that cannot be used, as one line for
/// the operator. The text never quotes a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TlsError(pub(crate) String);

pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(ring::default_provider()));
    Arc::clone(&PROVIDER)
}

pub(crate) async fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let read = tokio::fs::read(path).await;
    read.map_err(|error| TlsError(format!("cannot read {}: {error}", path.display())))
}

/// The certificates of a PEM file. An error if it contains none.
pub(crate) fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(TlsError(format!("{} holds no certificate", path.display()))),
        Err(error) => Err(TlsError(format!("{} is no PEM file: {error}", path.display()))),
    }
}

pub(crate) fn private_key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|_| TlsError(format!("{} holds no private key that can be read", path.display())))
}

/// The certificates of a PEM file as trusted authorities.
pub(crate) fn authorities(path: &Path, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(|error| {
            TlsError(format!("{} holds a certificate that cannot be used: {error}", path.display()))
        })?;
    }
    Ok(roots)
}

/// The authorities that a server is verified by: those of the file `ca`, or without
/// one those of this system, which are read once per process.
pub(crate) async fn trusted(ca: Option<&Path>) -> Result<Arc<RootCertStore>, TlsError> {
    static SYSTEM: OnceCell<Arc<RootCertStore>> = OnceCell::const_new();
    match ca {
        Some(path) => Ok(Arc::new(authorities(path, &read(path).await?)?)),
        None => SYSTEM.get_or_try_init(system).await.cloned(),
    }
}

async fn system() -> Result<Arc<RootCertStore>, TlsError> {
    let found = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs).await;
    let found = found.map_err(|error| TlsError(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
        return Err(TlsError(format!("this system has no root certificates{why}")));
    }
    Ok(Arc::new(roots))
}
