//! The caller of a method, and the proofs of what it may do. Model functions on a
//! tenant's data take one of these proofs. Only [`Caller`] returns proofs, and only
//! the look-ups of sessions, API keys and watch tokens make a [`Caller`].

use uuid::Uuid;

use super::pg_enum::pg_enum;
use crate::error::{Error, Result};
pub use crate::tenant::Tenant;

pg_enum! {
    /// The role of a user; it never changes.
    pub enum UserRole = UserRole {
        /// Jobs run for a customer.
        Customer = "customer",
        /// A provider runs jobs.
        Provider = "provider",
    }
}

pg_enum! {
    /// A group of methods that an API key may call.
    #[derive(PartialOrd, Ord)]
    pub enum KeyScope = ApiKeyScope {
        /// Methods that only read.
        Read = "read",
        /// Methods that write to jobs.
        Append = "append",
        /// Methods that list and change the user's API keys.
        Manage = "manage",
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
    tenant: Tenant,
    credential: CredentialId,
    scopes: Vec<KeyScope>,
}

impl Caller {
    pub(super) fn new(
        subject: Subject,
        tenant: Tenant,
        credential: CredentialId,
        scopes: Vec<KeyScope>,
    ) -> Self {
        Self { subject, tenant, credential, scopes }
    }

    /// To whom the use of what all users share is counted.
    pub fn tenant(&self) -> Tenant {
        self.tenant
    }

    pub fn subject(&self) -> Subject {
        self.subject
    }

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
        require(&self.scopes, &[scope])?;
        Ok(Provider { id })
    }

    /// Returns the proof that a customer may ask something of the provider of a job. Fails with
    /// [`Error::RoleRequired`] or [`Error::ScopeRequired`].
    pub fn customer(&self) -> Result<Customer> {
        let Subject::User { id, role: UserRole::Customer } = self.subject else {
            return Err(Error::RoleRequired("customer"));
        };
        require(&self.scopes, &[KeyScope::Append])?;
        Ok(Customer { id })
    }

    /// Returns the proof that a side of a job may hold it. Fails with [`Error::RoleRequired`] for a
    /// watch token, or with [`Error::ScopeRequired`].
    pub fn holder(&self) -> Result<Holder> {
        let visibility = match self.subject {
            Subject::User { id, role: UserRole::Provider } => Visibility::Provider(id),
            Subject::User { id, role: UserRole::Customer } => Visibility::Customer(id),
            Subject::Job(_) => return Err(Error::RoleRequired("provider or customer")),
        };
        require(&self.scopes, &[KeyScope::Append])?;
        Ok(Holder(Viewer { visibility, tenant: self.tenant }))
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
        require(&self.scopes, &[KeyScope::Read])?;
        let visibility = match self.subject {
            Subject::User { id, role: UserRole::Provider } => Visibility::Provider(id),
            Subject::User { id, role: UserRole::Customer } => Visibility::Customer(id),
            Subject::Job(id) => Visibility::Job(id),
        };
        Ok(Viewer { visibility, tenant: self.tenant })
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

    /// As [`Self::account`], for methods of customers. Fails with [`Error::RoleRequired`] for
    /// the session of a provider.
    pub fn customer_account(&self) -> Result<CustomerAccount> {
        let account = self.account()?;
        let Subject::User { role: UserRole::Customer, .. } = self.subject else {
            return Err(Error::RoleRequired("customer"));
        };
        Ok(CustomerAccount(account))
    }

    /// Returns the proof that the user's API keys may be listed, created and expired.
    /// Fails with [`Error::RoleRequired`] or [`Error::ScopeRequired`].
    pub fn key_manager(&self) -> Result<KeyManager> {
        let Subject::User { id, role } = self.subject else {
            return Err(Error::RoleRequired("provider or customer"));
        };
        require(&self.scopes, &[KeyScope::Manage])?;
        let key_id = match self.credential {
            CredentialId::ApiKey(id) => Some(id),
            CredentialId::Session(_) | CredentialId::WatchToken(_) => None,
        };
        Ok(KeyManager { user_id: id, role, scopes: self.scopes.clone(), key_id })
    }
}

fn require(granted: &[KeyScope], scopes: &[KeyScope]) -> Result<()> {
    let missing = scopes.iter().find(|scope| !granted.contains(scope));
    missing.map_or(Ok(()), |scope| Err(Error::ScopeRequired(scope.label())))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Provider {
    id: Uuid,
}

impl Provider {
    pub fn id(self) -> Uuid {
        self.id
    }

    /// See [`Caller::tenant`].
    pub fn tenant(self) -> Tenant {
        Tenant::of_user(self.id)
    }
}

/// Proof of [`Caller::customer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Customer {
    id: Uuid,
}

impl Customer {
    pub fn id(self) -> Uuid {
        self.id
    }

    /// See [`Caller::tenant`].
    pub fn tenant(self) -> Tenant {
        Tenant::of_user(self.id)
    }
}

impl From<Customer> for Viewer {
    fn from(customer: Customer) -> Self {
        Self { visibility: Visibility::Customer(customer.id), tenant: customer.tenant() }
    }
}

/// Proof of [`Caller::holder`].
#[derive(Clone, Copy, Debug)]
pub struct Holder(Viewer);

impl Holder {
    pub fn viewer(self) -> Viewer {
        self.0
    }
}

/// Proof of [`Caller::viewer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Viewer {
    visibility: Visibility,
    tenant: Tenant,
}

/// The jobs that a viewer sees: those of a user, or one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Visibility {
    Provider(Uuid),
    Customer(Uuid),
    Job(Uuid),
}

impl Viewer {
    pub fn visibility(self) -> Visibility {
        self.visibility
    }

    /// See [`Caller::tenant`].
    pub fn tenant(self) -> Tenant {
        self.tenant
    }

    /// The id of the user, or of the one job.
    pub fn id(self) -> Uuid {
        match self.visibility {
            Visibility::Provider(id) | Visibility::Customer(id) | Visibility::Job(id) => id,
        }
    }

    /// Whether the viewer sees a job of this id, provider and customer.
    pub fn sees(self, job_id: Uuid, provider_id: Uuid, customer_id: Uuid) -> bool {
        match self.visibility {
            Visibility::Provider(id) => id == provider_id,
            Visibility::Customer(id) => id == customer_id,
            Visibility::Job(id) => id == job_id,
        }
    }
}

impl From<Provider> for Viewer {
    fn from(provider: Provider) -> Self {
        Self { visibility: Visibility::Provider(provider.id), tenant: provider.tenant() }
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

    pub fn session_id(self) -> Uuid {
        self.session_id
    }

    /// See [`Caller::tenant`].
    pub fn tenant(self) -> Tenant {
        Tenant::of_user(self.user_id)
    }
}

/// Proof of [`Caller::customer_account`].
#[derive(Clone, Copy, Debug)]
pub struct CustomerAccount(Account);

impl CustomerAccount {
    pub fn user_id(self) -> Uuid {
        self.0.user_id
    }
}

/// Proof of [`Caller::key_manager`].
#[derive(Clone, Debug)]
pub struct KeyManager {
    user_id: Uuid,
    role: UserRole,
    scopes: Vec<KeyScope>,
    key_id: Option<Uuid>,
}

impl KeyManager {
    /// The id of the user who owns the keys.
    pub fn user_id(&self) -> Uuid {
        self.user_id
    }

    pub fn role(&self) -> UserRole {
        self.role
    }

    /// See [`Caller::tenant`].
    pub fn tenant(&self) -> Tenant {
        Tenant::of_user(self.user_id)
    }

    /// The key that the call is made with; none for a session.
    pub(super) fn key_id(&self) -> Option<Uuid> {
        self.key_id
    }

    /// Fails with [`Error::ScopeRequired`] unless a new key may have these scopes.
    pub fn require(&self, scopes: &[KeyScope]) -> Result<()> {
        require(&self.scopes, scopes)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A caller for tests of what caches credentials.
    pub(crate) fn caller(user_id: Uuid, credential: CredentialId) -> Caller {
        let subject = Subject::User { id: user_id, role: UserRole::Customer };
        Caller::new(subject, Tenant::of_user(user_id), credential, vec![KeyScope::Read])
    }
}
