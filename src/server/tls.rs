//! The server's certificate, and new ones as they come.

use std::{sync::Arc, time::Duration};

use sha2::{Digest as _, Sha256};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{self, server::WebPkiClientVerifier},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    config::TlsConfig,
    tls::{TlsError, authorities, certificates, private_key, provider, read},
};

/// How often the files are looked at. By what is in them, so that it does not
/// matter how they are replaced.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);
/// The one protocol over it.
const ALPN: &[u8] = b"h2";

/// What a server shows of itself and asks of its clients, kept as the files
/// have it for as long as a clone of this is there.
#[derive(Clone, Debug)]
pub struct Tls {
    loaded: watch::Receiver<Loaded>,
    _fresh: Arc<AbortOnDropHandle<()>>,
}

#[derive(Clone, Debug)]
struct Loaded {
    config: Arc<rustls::ServerConfig>,
    /// Of all files, to know them by.
    hash: [u8; 32],
}

impl Tls {
    /// Loads the files, if there is to be TLS, and goes on looking at them: now
    /// and then, and on SIGHUP, which no longer ends the process. What cannot be
    /// used later is logged and changes nothing.
    pub async fn start(config: &TlsConfig) -> Result<Option<Self>, TlsError> {
        if !config.is_on()? {
            return Ok(None);
        }
        let hangup = signal(SignalKind::hangup())
            .map_err(|error| TlsError(format!("cannot wait for SIGHUP: {error}")))?;
        let (sender, loaded) = watch::channel(load(config).await?);
        let fresh = AbortOnDropHandle::new(tokio::spawn(keep_fresh(config.clone(), sender, hangup)));
        Ok(Some(Self { loaded, _fresh: Arc::new(fresh) }))
    }

    /// For one connection: the next one may have to do with another.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.loaded.borrow().config))
    }
}

async fn keep_fresh(config: TlsConfig, current: watch::Sender<Loaded>, mut hangup: Signal) {
    let mut looks = interval(LOOK_INTERVAL);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut trouble = None;
    loop {
        let asked = tokio::select! {
            _ = looks.tick() => false,
            _ = hangup.recv() => true,
        };
        match load(&config).await {
            Ok(loaded) => {
                let other = loaded.hash != current.borrow().hash;
                if other {
                    tracing::info!("new connections get the new certificate");
                    current.send_replace(loaded);
                } else if asked {
                    tracing::info!("the certificate is the one in use already");
                }
                trouble = None;
            }
            // Told once, not at every look.
            Err(error) if asked || trouble.as_ref() != Some(&error) => {
                tracing::warn!(%error, "the certificate in use stays");
                trouble = Some(error);
            }
            Err(_) => {}
        }
    }
}

/// The files as they are now. What was begun under an earlier certificate or
/// authority cannot be resumed under this one: each has its own sessions.
async fn load(config: &TlsConfig) -> Result<Loaded, TlsError> {
    let (Some(certificate_path), Some(key_path)) = (&config.tls_cert, &config.tls_key) else {
        return Err(TlsError("TLS needs a certificate and its key".to_owned()));
    };
    let (certificate, key) = (read(certificate_path).await?, read(key_path).await?);
    let mut hash =
        Sha256::new().chain_update(Sha256::digest(&certificate)).chain_update(Sha256::digest(&key));

    let builder = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError(error.to_string()))?;
    let builder = match &config.tls_client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let pem = read(path).await?;
            hash.update(&pem);
            let authorities = Arc::new(authorities(path, &pem)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(authorities, provider()).build();
            let verifier = verifier.map_err(|error| TlsError(format!("{}: {error}", path.display())))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut server = builder
        .with_single_cert(certificates(certificate_path, &certificate)?, private_key(key_path, &key)?)
        .map_err(|error| {
            let (certificate, key) = (certificate_path.display(), key_path.display());
            TlsError(format!("the certificate of {certificate} does not go with the key of {key}: {error}"))
        })?;
    server.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Loaded { config: Arc::new(server), hash: hash.finalize().into() })
}
