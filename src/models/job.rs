//! Jobs: something that a provider runs for a customer.

use std::fmt;

use uuid::Uuid;

/// How a job is named by its caller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum JobKey {
    /// By its id.
    Id(Uuid),
    /// By its provider's id for it; for that provider only.
    ProviderJobId(String),
}

/// As an error names it.
impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::ProviderJobId(id) => f.write_str(id),
        }
    }
}
