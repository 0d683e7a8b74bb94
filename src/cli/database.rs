//! The database that a command works on: DATABASE_URL's, or the embedded one.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio_util::task::AbortOnDropHandle;

use crate::{
    config::{Config, DatabaseConfig},
    db::{
        DatabaseSettings, StartError,
        embedded::{Embedded, EmbeddedError, EmbeddedSettings, default_data_dir},
        migrations::{self, SchemaError},
        wait_until_it_answers,
    },
    error::BoxError,
};

/// A database, and what has to be stopped after its use.
#[derive(Debug)]
pub(super) struct OpenDatabase {
    pub(super) settings: DatabaseSettings,
    pub(super) embedded: Option<Arc<Embedded>>,
    supervisor: Option<AbortOnDropHandle<()>>,
}

impl OpenDatabase {
    /// To be served: the embedded one must be this process's own.
    pub(super) async fn to_serve(config: &DatabaseConfig) -> Result<Self, BoxError> {
        if let Some(url) = &config.database_url {
            return Ok(Self::outer(settings(config, url.reveal().to_owned())));
        }
        let embedded = Embedded::start(EmbeddedSettings::new(data_dir(config).await?)).await?;
        Ok(Self::owned(config, embedded))
    }

    /// To be looked at or changed, also while another process serves it.
    pub(super) async fn to_use(config: &DatabaseConfig) -> Result<Self, BoxError> {
        match Self::to_serve(config).await {
            Err(error) if matches!(error.downcast_ref(), Some(EmbeddedError::Served { .. })) => {
                let url = Embedded::url_of_served(&data_dir(config).await?)?;
                Ok(Self::outer(settings(config, url)))
            }
            result => result,
        }
    }

    /// Waits until the database of DATABASE_URL takes connections, if it is that
    /// one and as long as the settings say.
    pub(super) async fn wait(config: &DatabaseConfig) -> Result<(), StartError> {
        let Some(url) = &config.database_url else { return Ok(()) };
        let connect_limit = Duration::from_secs(config.database_start_timeout_s);
        wait_until_it_answers(&settings(config, url.reveal().to_owned()), connect_limit).await
    }

    /// The same before it is served: its schema is brought up to date, too, if it is
    /// to be. A migration that is under way leaves nothing if this is dropped.
    pub(super) async fn ready(Config { database, server, .. }: &Config) -> Result<(), BoxError> {
        Self::wait(database).await?;
        if let Some(url) = database.database_url.as_ref().filter(|_| server.migrate) {
            migrate(&settings(database, url.reveal().to_owned())).await?;
        }
        Ok(())
    }

    fn outer(settings: DatabaseSettings) -> Self {
        Self { settings, embedded: None, supervisor: None }
    }

    fn owned(config: &DatabaseConfig, embedded: Embedded) -> Self {
        let settings = settings(config, embedded.database_url());
        let embedded = Arc::new(embedded);
        let kept = embedded.clone();
        let supervisor = AbortOnDropHandle::new(tokio::spawn(async move { kept.keep_running().await }));
        Self { settings, embedded: Some(embedded), supervisor: Some(supervisor) }
    }

    /// Stops what was started.
    pub(super) async fn close(mut self) -> Result<(), BoxError> {
        drop(self.supervisor.take());
        if let Some(embedded) = &self.embedded {
            embedded.stop().await?;
        }
        Ok(())
    }
}

/// Brings the schema up to date.
pub(super) async fn migrate(DatabaseSettings { url, ca, .. }: &DatabaseSettings) -> Result<(), SchemaError> {
    for version in migrations::migrate(url, ca.as_deref()).await? {
        tracing::info!(version, "migrated");
    }
    Ok(())
}

/// The embedded database's folder.
pub(super) async fn data_dir(config: &DatabaseConfig) -> Result<PathBuf, EmbeddedError> {
    match &config.data_dir {
        Some(dir) => Ok(dir.clone()),
        None => default_data_dir().await,
    }
}

fn settings(config: &DatabaseConfig, url: String) -> DatabaseSettings {
    DatabaseSettings {
        url,
        ca: config.database_ca.clone(),
        connections: usize::try_from(config.database_connections).unwrap_or(usize::MAX),
        statement_timeout: Duration::from_secs(config.statement_timeout_s),
        connect_timeout: Duration::from_secs(config.database_connect_timeout_s),
        synchronous_commit: config.synchronous_commit.name().to_owned(),
    }
}
