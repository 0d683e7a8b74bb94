//! The caller of a method, and the proofs of what it may do. Model functions on a
//! tenant's data take one of these proofs. Only [`Caller`] returns proofs, and only
//! the look-ups of sessions, API keys and watch tokens make a [`Caller`].

use diesel::{deserialize::FromSqlRow, expression::AsExpression};
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    schema::sql_types,
};

/// The role of a user; it never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::UserRole)]
pub enum UserRole {
    /// Jobs run for a customer.
    Customer,
    /// A provider runs jobs.
    Provider,
}

/// A group of methods that an API key may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::ApiKeyScope)]
pub enum KeyScope {
    /// Methods that only read.
    Read,
    /// Methods by which a provider writes.
    Append,
    /// Methods that list and change the user's API keys.
    Manage,
}

impl KeyScope {
    /// The name in the API, without the enum's prefix.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "READ",
            Self::Append => "APPEND",
            Self::Manage => "MANAGE",
        }
    }
}

/// The kind and id of the credential of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CredentialId {
    Session(Uuid),
    ApiKey(Uuid),
    WatchToken(Uuid),
}

impl CredentialId {
    pub(super) fn uuid(self) -> Uuid {
        match self {
            Self::Session(id) | Self::ApiKey(id) | Self::WatchToken(id) => id,
        }
    }
}

/// The subject on whose behalf a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    User {
        id: Uuid,
        role: UserRole,
    },
    /// One job, read-only: the subject of a watch token.
    Job(Uuid),
}

/// An authenticated subject, and what its credential allows.
#[derive(Clone, Debug)]
pub struct Caller {
    subject: Subject,
    credential: CredentialId,
    scopes: Vec<KeyScope>,
}

impl Caller {
    pub(super) fn new(subject: Subject, credential: CredentialId, scopes: Vec<KeyScope>) -> Self {
        Self { subject, credential, scopes }
    }

    /// The subject on whose behalf the call is made.
    pub fn subject(&self) -> Subject {
        self.subject
    }

    /// The credential of the call.
    pub fn credential(&self) -> CredentialId {
        self.credential
    }

    /// Returns the proof that a provider's data may be read or, with
    /// [`KeyScope::Append`], written. Fails with [`Error::RoleRequired`] or
    /// [`Error::ScopeRequired`].
    pub fn provider(&self, scope: KeyScope) -> Result<Provider> {
        let Subject::User { id, role: UserRole::Provider } = self.subject else {
            return Err(Error::RoleRequired("provider"));
        };
        self.require(scope)?;
        Ok(Provider { id })
    }

    /// As [`Self::viewer`], for methods that concern more than one job. Fails with
    /// [`Error::RoleRequired`] for a watch token.
    pub fn user_viewer(&self) -> Result<Viewer> {
        match self.subject {
            Subject::User { .. } => self.viewer(),
            Subject::Job(_) => Err(Error::RoleRequired("provider or customer")),
        }
    }

    /// Returns the proof that the jobs of [`Viewer::visibility`] may be read. Fails
    /// with [`Error::ScopeRequired`].
    pub fn viewer(&self) -> Result<Viewer> {
        self.require(KeyScope::Read)?;
        Ok(match self.subject {
            Subject::User { id, role: UserRole::Provider } => Viewer(Visibility::Provider(id)),
            Subject::User { id, role: UserRole::Customer } => Viewer(Visibility::Customer(id)),
            Subject::Job(id) => Viewer(Visibility::Job(id)),
        })
    }

    /// Returns the proof that the call is made with a session of the user. Fails with
    /// [`Error::SessionRequired`] for an API key or a watch token.
    pub fn account(&self) -> Result<Account> {
        match (self.subject, self.credential) {
            (Subject::User { id, .. }, CredentialId::Session(session_id)) => {
                Ok(Account { user_id: id, session_id })
            }
            _ => Err(Error::SessionRequired),
        }
    }

    /// Returns the proof that the user's API keys may be listed, created and expired.
    /// Fails with [`Error::RoleRequired`] or [`Error::ScopeRequired`].
    pub fn key_manager(&self) -> Result<KeyManager> {
        let Subject::User { id, role } = self.subject else {
            return Err(Error::RoleRequired("provider or customer"));
        };
        self.require(KeyScope::Manage)?;
        Ok(KeyManager { user_id: id, role, scopes: self.scopes.clone() })
    }

    fn require(&self, scope: KeyScope) -> Result<()> {
        if self.scopes.contains(&scope) { Ok(()) } else { Err(Error::ScopeRequired(scope.name())) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Provider {
    id: Uuid,
}

impl Provider {
    pub fn id(self) -> Uuid {
        self.id
    }
}

/// Proof of [`Caller::viewer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Viewer(Visibility);

/// The jobs that a viewer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// The jobs of this provider.
    Provider(Uuid),
    /// The jobs of this customer.
    Customer(Uuid),
    /// This one job.
    Job(Uuid),
}

impl Viewer {
    /// The jobs that the viewer sees.
    pub fn visibility(self) -> Visibility {
        self.0
    }

    /// The id of the user, or of the one job.
    pub fn id(self) -> Uuid {
        match self.0 {
            Visibility::Provider(id) | Visibility::Customer(id) | Visibility::Job(id) => id,
        }
    }

    /// Whether the viewer sees a job of this id, provider and customer.
    pub fn sees(self, job_id: Uuid, provider_id: Uuid, customer_id: Uuid) -> bool {
        match self.0 {
            Visibility::Provider(id) => id == provider_id,
            Visibility::Customer(id) => id == customer_id,
            Visibility::Job(id) => id == job_id,
        }
    }
}

impl From<Provider> for Viewer {
    fn from(provider: Provider) -> Self {
        Self(Visibility::Provider(provider.id))
    }
}

/// Proof of [`Caller::account`].
#[derive(Clone, Copy, Debug)]
pub struct Account {
    user_id: Uuid,
    session_id: Uuid,
}

impl Account {
    pub fn user_id(self) -> Uuid {
        self.user_id
    }

    /// The id of the session that the call is made with.
    pub fn session_id(self) -> Uuid {
        self.session_id
    }
}

/// Proof of [`Caller::key_manager`].
#[derive(Clone, Debug)]
pub struct KeyManager {
    user_id: Uuid,
    role: UserRole,
    scopes: Vec<KeyScope>,
}

impl KeyManager {
    /// The id of the user who owns the keys.
    pub fn user_id(&self) -> Uuid {
        self.user_id
    }

    /// The role of that user.
    pub fn role(&self) -> UserRole {
        self.role
    }

    /// The scopes that a new key may have.
    pub fn scopes(&self) -> &[KeyScope] {
        &self.scopes
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A caller for tests of what caches credentials.
    pub(crate) fn caller(user_id: Uuid, credential: CredentialId) -> Caller {
        Caller::new(Subject::User { id: user_id, role: UserRole::Customer }, credential, vec![KeyScope::Read])
    }
}
