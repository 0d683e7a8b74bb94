//! The database that a command works on: that of DATABASE_URL, or the embedded
//! Postgres.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio_util::task::AbortOnDropHandle;

use crate::{
    config::{Config, DatabaseConfig},
    db::{
        DatabaseSettings, StartError,
        embedded::{Embedded, EmbeddedError, EmbeddedSettings, default_data_dir},
        migrations::{self, SchemaError},
        wait_until_available,
    },
    error::BoxError,
};

/// An open database; `close` stops the embedded Postgres if this process started it.
#[derive(Debug)]
pub(super) struct OpenDatabase {
    pub(super) settings: DatabaseSettings,
    pub(super) embedded: Option<Arc<Embedded>>,
    supervisor: Option<AbortOnDropHandle<()>>,
}

impl OpenDatabase {
    /// Opens the database for a server. An error if another process serves the
    /// embedded Postgres.
    pub(super) async fn to_serve(config: &DatabaseConfig) -> Result<Self, BoxError> {
        if let Some(url) = &config.database_url {
            return Ok(Self::existing(settings(config, url.reveal().to_owned())));
        }
        let embedded = Embedded::start(EmbeddedSettings::new(data_dir(config).await?)).await?;
        Ok(Self::embedded(config, embedded))
    }

    /// Opens the database for reading or changing it, also while another process
    /// serves it.
    pub(super) async fn to_use(config: &DatabaseConfig) -> Result<Self, BoxError> {
        match Self::to_serve(config).await {
            Err(error) if matches!(error.downcast_ref(), Some(EmbeddedError::Served { .. })) => {
                let url = Embedded::url_of_served(&data_dir(config).await?)?;
                Ok(Self::existing(settings(config, url)))
            }
            result => result,
        }
    }

    /// Waits until DATABASE_URL accepts connections, at most
    /// `database_start_timeout_s`. Returns at once without a DATABASE_URL.
    pub(super) async fn wait(config: &DatabaseConfig) -> Result<(), StartError> {
        let Some(url) = &config.database_url else { return Ok(()) };
        let connect_limit = Duration::from_secs(config.database_start_timeout_s);
        wait_until_available(&settings(config, url.reveal().to_owned()), connect_limit).await
    }

    /// Waits for DATABASE_URL as [`OpenDatabase::wait`] does, and with `--migrate`
    /// applies its missing migrations. Dropping the future rolls back the migration
    /// in progress.
    pub(super) async fn ready(Config { database, server, .. }: &Config) -> Result<(), BoxError> {
        Self::wait(database).await?;
        if let Some(url) = database.database_url.as_ref().filter(|_| server.migrate) {
            migrate(&settings(database, url.reveal().to_owned())).await?;
        }
        Ok(())
    }

    fn existing(settings: DatabaseSettings) -> Self {
        Self { settings, embedded: None, supervisor: None }
    }

    fn embedded(config: &DatabaseConfig, embedded: Embedded) -> Self {
        let settings = settings(config, embedded.database_url());
        let embedded = Arc::new(embedded);
        let supervised = embedded.clone();
        let supervisor = AbortOnDropHandle::new(tokio::spawn(async move { supervised.keep_running().await }));
        Self { settings, embedded: Some(embedded), supervisor: Some(supervisor) }
    }

    pub(super) async fn close(mut self) -> Result<(), BoxError> {
        drop(self.supervisor.take());
        if let Some(embedded) = &self.embedded {
            embedded.stop().await?;
        }
        Ok(())
    }
}

pub(super) async fn migrate(DatabaseSettings { url, ca, .. }: &DatabaseSettings) -> Result<(), SchemaError> {
    for version in migrations::migrate(url, ca.as_deref()).await? {
        tracing::info!(version, "applied a migration");
    }
    Ok(())
}

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
