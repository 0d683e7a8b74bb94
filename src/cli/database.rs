//! The database that a command works on: that of DATABASE_URL, or the embedded
//! Postgres.

use std::{path::PathBuf, sync::Arc};

use tokio_util::task::AbortOnDropHandle;

use crate::{
    config::{Config, DatabaseSettings, DatabaseSource, DatabaseUrl},
    db::{
        StartError,
        embedded::{Embedded, EmbeddedError, EmbeddedSettings, default_data_dir},
        migrations::{self, SchemaError},
        wait_until_available,
    },
    error::BoxError,
};

/// An open database; `close` stops the embedded Postgres if this process started it.
#[derive(Debug)]
pub(super) struct OpenDatabase {
    pub(super) url: DatabaseUrl,
    pub(super) embedded: Option<Arc<Embedded>>,
    supervisor: Option<AbortOnDropHandle<()>>,
}

impl OpenDatabase {
    /// Opens the database for a server. An error if another process serves the
    /// embedded Postgres.
    pub(super) async fn to_serve(source: &DatabaseSource) -> Result<Self, BoxError> {
        if let Some(url) = source.url() {
            return Ok(Self::existing(url.clone()));
        }
        let embedded = Embedded::start(EmbeddedSettings::new(data_dir(source).await?)).await?;
        Ok(Self::embedded(embedded))
    }

    /// Opens the database for reading or changing it, also while another process
    /// serves it.
    pub(super) async fn to_use(source: &DatabaseSource) -> Result<Self, BoxError> {
        match Self::to_serve(source).await {
            Err(error) if matches!(error.downcast_ref(), Some(EmbeddedError::Served { .. })) => {
                Ok(Self::existing(Embedded::url_of_served(&data_dir(source).await?)?.into()))
            }
            result => result,
        }
    }

    /// Waits until DATABASE_URL accepts connections, at most `start_timeout`. Returns at
    /// once without a DATABASE_URL.
    pub(super) async fn wait(source: &DatabaseSource) -> Result<(), StartError> {
        let Some(url) = source.url() else { return Ok(()) };
        wait_until_available(url, &source.settings, source.start_timeout).await
    }

    /// Waits for DATABASE_URL as [`OpenDatabase::wait`] does, and with `--migrate`
    /// applies its missing migrations. Dropping the future rolls back the migration
    /// in progress.
    pub(super) async fn ready(Config { database, start, .. }: &Config) -> Result<(), BoxError> {
        Self::wait(database).await?;
        if let Some(url) = database.url().filter(|_| start.migrate) {
            migrate(url, &database.settings).await?;
        }
        Ok(())
    }

    fn existing(url: DatabaseUrl) -> Self {
        Self { url, embedded: None, supervisor: None }
    }

    fn embedded(embedded: Embedded) -> Self {
        let url = embedded.database_url().into();
        let embedded = Arc::new(embedded);
        let supervised = embedded.clone();
        let supervisor = AbortOnDropHandle::new(tokio::spawn(async move { supervised.keep_running().await }));
        Self { url, embedded: Some(embedded), supervisor: Some(supervisor) }
    }

    pub(super) async fn close(mut self) -> Result<(), BoxError> {
        drop(self.supervisor.take());
        if let Some(embedded) = &self.embedded {
            embedded.stop().await?;
        }
        Ok(())
    }
}

pub(super) async fn migrate(url: &DatabaseUrl, settings: &DatabaseSettings) -> Result<(), SchemaError> {
    for version in migrations::migrate(url.reveal(), settings.ca.as_deref()).await? {
        tracing::info!(version, "applied a migration");
    }
    Ok(())
}

pub(super) async fn data_dir(source: &DatabaseSource) -> Result<PathBuf, EmbeddedError> {
    match &source.data_dir {
        Some(dir) => Ok(dir.clone()),
        None => default_data_dir().await,
    }
}
