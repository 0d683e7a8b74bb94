//! The ordered log and those who watch it.

use uuid::Uuid;

pub use crate::models::job::JobKey;
use crate::{db::Database, error::Result, models::caller::Provider};

/// What the operator decides about the log.
#[derive(Clone, Debug)]
pub struct EventLogSettings {
    /// Most unanswered batches of one publish stream.
    pub publish_window: usize,
}

/// The log: appends to it, and watches of it.
#[derive(Clone, Debug)]
pub struct EventLog {}

impl EventLog {
    /// Starts the appender and the tail.
    pub fn start(_database: Database, _settings: EventLogSettings) -> Self {
        unimplemented!()
    }

    /// Seals a job of this provider's. The job's id, and whether it had been
    /// sealed so before.
    pub async fn close(&self, _provider: Provider, _job: JobKey, _reason: String) -> Result<(Uuid, bool)> {
        unimplemented!()
    }
}
