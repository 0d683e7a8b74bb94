//! Who asks. The only way to a tenant's data: model functions take one of the
//! proofs below, [`Caller`] alone hands them out, and only the look-ups of
//! sessions, API keys and watch tokens can make a [`Caller`].

use diesel::{deserialize::FromSqlRow, expression::AsExpression};
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    schema::sql_types,
};

/// What a user is, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::UserRole)]
pub enum UserRole {
    /// Somebody whom jobs are run for.
    Customer,
    /// Somebody who runs jobs.
    Provider,
}

/// What an API key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::ApiKeyScope)]
pub enum KeyScope {
    /// Methods that only read.
    Read,
    /// A provider's writes.
    Append,
    /// The user's API keys.
    Manage,
}

impl KeyScope {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "READ",
            Self::Append => "APPEND",
            Self::Manage => "MANAGE",
        }
    }
}

/// What a call was made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CredentialId {
    /// A session.
    Session(Uuid),
    /// An API key.
    ApiKey(Uuid),
    /// A watch token.
    WatchToken(Uuid),
}

/// On whose behalf a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A user.
    User {
        /// Who.
        id: Uuid,
        /// As what.
        role: UserRole,
    },
    /// Whoever holds a secret that shows one job and nothing else.
    Job(Uuid),
}

/// Who asks, and what their credential allows.
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

    /// On whose behalf.
    pub fn subject(&self) -> Subject {
        self.subject
    }

    /// With what.
    pub fn credential(&self) -> CredentialId {
        self.credential
    }

    /// Proof that a provider's data may be read or, with [`KeyScope::Append`],
    /// written.
    pub fn provider(&self, scope: KeyScope) -> Result<Provider> {
        let Subject::User { id, role: UserRole::Provider } = self.subject else {
            return Err(Error::RoleRequired("provider"));
        };
        self.require(scope)?;
        Ok(Provider { id })
    }

    /// Proof that jobs may be read by a user: what concerns more than one job.
    pub fn user_viewer(&self) -> Result<Viewer> {
        match self.subject {
            Subject::User { .. } => self.viewer(),
            Subject::Job(_) => Err(Error::RoleRequired("provider or customer")),
        }
    }

    /// Proof that jobs may be read: which ones is the viewer's matter.
    pub fn viewer(&self) -> Result<Viewer> {
        self.require(KeyScope::Read)?;
        Ok(match self.subject {
            Subject::User { id, role: UserRole::Provider } => Viewer(Visibility::Provider(id)),
            Subject::User { id, role: UserRole::Customer } => Viewer(Visibility::Customer(id)),
            Subject::Job(id) => Viewer(Visibility::Job(id)),
        })
    }

    /// Proof that the user themselves is there, not merely a key of theirs.
    pub fn account(&self) -> Result<Account> {
        match (self.subject, self.credential) {
            (Subject::User { id, .. }, CredentialId::Session(session_id)) => {
                Ok(Account { user_id: id, session_id })
            }
            _ => Err(Error::SessionRequired),
        }
    }

    /// Proof that the user's API keys may be listed, made and expired.
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

/// See [`Caller::provider`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Provider {
    id: Uuid,
}

impl Provider {
    /// The provider's user id.
    pub fn id(self) -> Uuid {
        self.id
    }
}

/// See [`Caller::viewer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Viewer(Visibility);

/// Which jobs a viewer sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// Those that this provider runs.
    Provider(Uuid),
    /// Those that are run for this customer.
    Customer(Uuid),
    /// This one.
    Job(Uuid),
}

impl Viewer {
    /// Which jobs.
    pub fn visibility(self) -> Visibility {
        self.0
    }

    /// Of the user, or of the one job.
    pub fn id(self) -> Uuid {
        match self.0 {
            Visibility::Provider(id) | Visibility::Customer(id) | Visibility::Job(id) => id,
        }
    }

    /// Whether a job of this id, provider and customer is among them.
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

/// See [`Caller::account`].
#[derive(Clone, Copy, Debug)]
pub struct Account {
    user_id: Uuid,
    session_id: Uuid,
}

impl Account {
    /// Who.
    pub fn user_id(self) -> Uuid {
        self.user_id
    }

    /// The session that the call was made with.
    pub fn session_id(self) -> Uuid {
        self.session_id
    }
}

/// See [`Caller::key_manager`].
#[derive(Clone, Debug)]
pub struct KeyManager {
    user_id: Uuid,
    role: UserRole,
    scopes: Vec<KeyScope>,
}

impl KeyManager {
    /// Whose keys.
    pub fn user_id(&self) -> Uuid {
        self.user_id
    }

    /// What that user is.
    pub fn role(&self) -> UserRole {
        self.role
    }

    /// What may be passed on to a new key.
    pub fn scopes(&self) -> &[KeyScope] {
        &self.scopes
    }
}
