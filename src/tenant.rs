//! The user to whom the use of what all users share is counted.

use uuid::Uuid;

/// The user who makes a call, or for a watch token the provider of its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tenant(Uuid);

impl Tenant {
    pub fn of_user(id: Uuid) -> Self {
        Self(id)
    }

    /// The id of the user.
    pub fn id(self) -> Uuid {
        self.0
    }
}
