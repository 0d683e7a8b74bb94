//! The server's certificate, reloaded when its files change.

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
    config::TlsSettings,
    tls::{TlsError, authorities, certificates, private_key, provider, read},
};

/// How often the files are read. A change is recognised by their contents, however the
/// files are replaced.
const RELOAD_INTERVAL: Duration = Duration::from_secs(3);
/// The protocols that are negotiated: HTTP/2 where the client has it, because gRPC needs it. A
/// client that negotiates nothing may speak either.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The TLS configuration of a server. It follows the files until the last clone is
/// dropped.
#[derive(Clone, Debug)]
pub struct Tls {
    loaded: watch::Receiver<Loaded>,
    _reloader: Arc<AbortOnDropHandle<()>>,
}

#[derive(Clone, Debug)]
struct Loaded {
    config: Arc<rustls::ServerConfig>,
    /// Hash of the contents of all files.
    hash: [u8; 32],
}

impl Tls {
    /// Loads the files, or returns none if TLS is off. From then on the files are read
    /// again every 3 s and on SIGHUP, which no longer ends the process. An error in a
    /// later load is logged, and the configuration in use stays.
    pub async fn start(settings: &TlsSettings) -> Result<Option<Self>, TlsError> {
        if !settings.is_on().map_err(|why| TlsError(why.to_owned()))? {
            return Ok(None);
        }
        let hangup = signal(SignalKind::hangup())
            .map_err(|error| TlsError(format!("cannot handle SIGHUP: {error}")))?;
        let (sender, loaded) = watch::channel(load(settings).await?);
        let reloader = AbortOnDropHandle::new(tokio::spawn(reload(settings.clone(), sender, hangup)));
        Ok(Some(Self { loaded, _reloader: Arc::new(reloader) }))
    }

    /// The acceptor of one new connection; a later connection may get a newer
    /// certificate.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.loaded.borrow().config))
    }
}

/// Loads the files again at each interval and each SIGHUP; never returns.
async fn reload(settings: TlsSettings, current: watch::Sender<Loaded>, mut hangup: Signal) {
    let mut ticks = interval(RELOAD_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_error = None;
    loop {
        let hung_up = tokio::select! {
            _ = ticks.tick() => false,
            _ = hangup.recv() => true,
        };
        match load(&settings).await {
            Ok(loaded) => {
                let changed = loaded.hash != current.borrow().hash;
                if changed {
                    tracing::info!("new connections get the new certificate");
                    current.send_replace(loaded);
                } else if hung_up {
                    tracing::info!("the certificate is the one in use already");
                }
                last_error = None;
            }
            // A repeated error is logged only after SIGHUP, not at every interval.
            Err(error) if hung_up || last_error.as_ref() != Some(&error) => {
                tracing::warn!(%error, "cannot load the TLS files: the certificate in use stays");
                last_error = Some(error);
            }
            Err(_) => {}
        }
    }
}

/// Loads the files. Each configuration has its own TLS sessions, so that a session of
/// an earlier certificate or authority cannot be resumed under a new one.
async fn load(settings: &TlsSettings) -> Result<Loaded, TlsError> {
    let (Some(certificate_path), Some(key_path)) = (&settings.tls_cert, &settings.tls_key) else {
        return Err(TlsError("TLS needs both --tls-cert and --tls-key".to_owned()));
    };
    let (certificate, key) = (read(certificate_path).await?, read(key_path).await?);
    let mut hash =
        Sha256::new().chain_update(Sha256::digest(&certificate)).chain_update(Sha256::digest(&key));

    let builder = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError(error.to_string()))?;
    let builder = match &settings.tls_client_ca {
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
    server.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
    Ok(Loaded { config: Arc::new(server), hash: hash.finalize().into() })
}
