//! `milepost migrate`.

use std::process::ExitCode;

use clap::Args;

use super::{database::OpenDatabase, say};
use crate::{config::DatabaseConfig, db::migrations, error::BoxError};

/// Applies what is missing, or takes back what was applied last.
#[derive(Args, Clone, Debug)]
pub(super) struct Migrate {
    /// Take back so many of the newest migrations, with the data that only they can hold
    #[arg(long, value_name = "COUNT")]
    revert: Option<usize>,

    #[command(flatten)]
    database: DatabaseConfig,
}

impl Migrate {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        OpenDatabase::wait(&self.database).await?;
        let database = OpenDatabase::to_use(&self.database).await?;
        let (url, ca) = (&database.settings.url, database.settings.ca.as_deref());
        let done = match self.revert {
            None => migrations::migrate(url, ca).await,
            Some(count) => migrations::revert(url, ca, count).await,
        };
        database.close().await?;
        let done = done?;
        let verb = if self.revert.is_some() { "reverted" } else { "applied" };
        for version in &done {
            say(&format!("{verb} {version}"))?;
        }
        if done.is_empty() {
            say("nothing to do")?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
