//! `milepost migrate`: applies or reverts migrations.

use std::process::ExitCode;

use clap::{Args, builder::RangedI64ValueParser};

use super::{database::OpenDatabase, print_line};
use crate::{config::DatabaseSource, db::migrations, error::BoxError};

/// Applies the missing migrations, or reverts the newest ones.
#[derive(Args, Clone, Debug)]
pub(super) struct Migrate {
    /// Revert this many of the newest migrations. Refused without --yes while servers are connected, and if
    /// the database has users: data that only these migrations can hold is lost
    #[arg(long, value_name = "COUNT", value_parser = RangedI64ValueParser::<usize>::new().range(1..))]
    revert: Option<usize>,

    /// Revert although data is lost or servers are connected
    #[arg(long, requires = "revert")]
    yes: bool,

    #[command(flatten)]
    database: DatabaseSource,
}

impl Migrate {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        OpenDatabase::wait(&self.database).await?;
        let database = OpenDatabase::to_use(&self.database).await?;
        let (url, ca) = (database.url.reveal(), self.database.settings.ca.as_deref());
        let migrated = match self.revert {
            None => migrations::migrate(url, ca).await,
            Some(count) => migrations::revert(url, ca, count, self.yes).await,
        };
        database.close().await?;
        let migrated = migrated?;
        let verb = if self.revert.is_some() { "reverted" } else { "applied" };
        for version in &migrated {
            print_line(&format!("{verb} {version}"))?;
        }
        if migrated.is_empty() {
            print_line("nothing to do")?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
