//! Certificate authorities, and the certificates that they sign, as PEM files.

use std::{
    fs,
    path::{Path, PathBuf},
};

use milepost::config::{ClientTls, TlsSettings};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::TemporaryDir;

/// A certificate authority (CA).
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its private key, as PEM.
#[derive(Clone, Debug)]
pub struct TlsIdentity {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "An authority");
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A server certificate for these DNS names or IP addresses.
    pub fn server(&self, names: &[&str]) -> TlsIdentity {
        self.issue(names, ExtendedKeyUsagePurpose::ServerAuth)
    }

    pub fn client(&self) -> TlsIdentity {
        self.issue(&["client.example.com"], ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn issue(&self, names: &[&str], purpose: ExtendedKeyUsagePurpose) -> TlsIdentity {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        TlsIdentity { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// The TLS settings of a client that trusts this authority alone.
    pub fn client_tls(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.pem()))
    }
}

impl TlsIdentity {
    pub fn identity(&self) -> Identity {
        Identity::from_pem(&self.certificate, &self.key)
    }
}

/// The TLS files of a server and its clients, in a temporary directory.
#[derive(Debug)]
pub struct TlsFiles(TemporaryDir);

impl TlsFiles {
    /// The files of a server at 127.0.0.1 whose certificate this authority signs.
    pub fn new(authority: &Authority) -> Self {
        let files = Self(TemporaryDir::new());
        files.write("ca.pem", &authority.pem());
        files.replace_server_certificate(&authority.server(&["127.0.0.1"]));
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Replaces a file by a rename, so that no reader sees half of it.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let (path, new) = (self.path(name), self.path("new"));
        fs::write(&new, content).unwrap();
        fs::rename(&new, &path).unwrap();
        path
    }

    /// Replaces the server's certificate and key.
    pub fn replace_server_certificate(&self, pair: &TlsIdentity) {
        self.write("server.pem", &pair.certificate);
        self.write("server.key", &pair.key);
    }

    pub fn server(&self) -> TlsSettings {
        TlsSettings {
            tls_cert: Some(self.path("server.pem")),
            tls_key: Some(self.path("server.key")),
            tls_client_ca: None,
        }
    }

    /// The settings of a server that demands client certificates of this authority.
    pub fn server_with_client_ca(&self, authority: &Authority) -> TlsSettings {
        TlsSettings { tls_client_ca: Some(self.write("clients.pem", &authority.pem())), ..self.server() }
    }

    pub fn client(&self) -> ClientTls {
        ClientTls { tls_ca: Some(self.path("ca.pem")), ..ClientTls::default() }
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }
}
