//! The audit: who did what to accounts, credentials and jobs, and where from.
//!
//! An act's entry is inserted in the act's own transaction and becomes a line
//! of the log, under the target `milepost::audit`, once that has committed.

use std::net::IpAddr;

use diesel::{
    deserialize::FromSqlRow,
    expression::AsExpression,
    pg::Pg,
    prelude::*,
    serialize::{self, IsNull, Output, ToSql},
    sql_types::Inet,
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    error::Result,
    models::caller::{Caller, CredentialId, Subject},
    schema::{audit_entries, sql_types},
};

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::AuditAct)]
#[allow(missing_docs, reason = "they say it")]
pub enum AuditAct {
    SignUp,
    LogIn,
    /// Also a wrong current password.
    LogInFailed,
    LogOut,
    PasswordChanged,
    ApiKeyCreated,
    ApiKeyRotated,
    ApiKeyExpired,
    WatchTokenCreated,
    WatchTokenExpired,
    /// By `CloseJob`; a job that completes says so in its own log.
    JobClosed,
    UserCreated,
    PasswordSet,
    UserDisabled,
}

/// What somebody acted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::AuditActor)]
#[allow(missing_docs, reason = "they say it")]
pub enum AuditActor {
    Anonymous,
    Session,
    ApiKey,
    WatchToken,
    /// On the database itself.
    Operator,
}

/// Who acts, and where from.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    actor: AuditActor,
    /// The user and the credential.
    caller: Option<(Uuid, Uuid)>,
    /// As far as it is known.
    pub address: Option<IpAddr>,
    request_id: Option<Uuid>,
}

impl Origin {
    /// The operator, who has the database and needs no call.
    pub const OPERATOR: Self =
        Self { actor: AuditActor::Operator, caller: None, address: None, request_id: None };

    /// Of a call by somebody without a credential.
    pub fn anonymous(address: Option<IpAddr>, request_id: Option<Uuid>) -> Self {
        Self { actor: AuditActor::Anonymous, caller: None, address, request_id }
    }

    /// Of a call by this caller.
    pub fn of_caller(caller: &Caller, address: Option<IpAddr>, request_id: Option<Uuid>) -> Self {
        let (actor, credential) = match caller.credential() {
            CredentialId::Session(id) => (AuditActor::Session, id),
            CredentialId::ApiKey(id) => (AuditActor::ApiKey, id),
            CredentialId::WatchToken(id) => (AuditActor::WatchToken, id),
        };
        let (Subject::User { id: subject, .. } | Subject::Job(subject)) = caller.subject();
        Self { actor, caller: Some((subject, credential)), address, request_id }
    }

    /// An entry of this act, to which its subject is to be added.
    pub fn entry(&self, act: AuditAct) -> AuditEntry {
        AuditEntry {
            id: Uuid::now_v7(),
            act,
            actor: self.actor,
            actor_user_id: self.caller.map(|(user, _)| user),
            actor_credential_id: self.caller.map(|(_, credential)| credential),
            user_id: None,
            session_id: None,
            api_key_id: None,
            new_api_key_id: None,
            watch_token_id: None,
            job_id: None,
            client_address: self.address.map(ClientAddress),
            request_id: self.request_id,
        }
    }

    /// The line of the log for a log-in that the throttle refused. There is no
    /// entry: it costs whoever sends it nothing, so nothing bounds how many.
    pub fn log_throttled_log_in(&self) {
        tracing::warn!(
            target: "milepost::audit",
            act = "log_in_throttled",
            actor = self.actor.label(),
            actor_user_id = self.caller.map(|(user, _)| display(user)),
            actor_credential_id = self.caller.map(|(_, credential)| display(credential)),
            client_address = self.address.map(display),
            request_id = self.request_id.map(display),
        );
    }
}

/// A row. Which subjects an act has is a matter of the table's constraints.
#[derive(Clone, Debug, Insertable)]
#[diesel(table_name = audit_entries, treat_none_as_default_value = false)]
#[allow(missing_docs, reason = "the table says it")]
pub struct AuditEntry {
    pub id: Uuid,
    pub act: AuditAct,
    pub actor: AuditActor,
    pub actor_user_id: Option<Uuid>,
    pub actor_credential_id: Option<Uuid>,
    pub user_id: Option<Uuid>,
    pub session_id: Option<Uuid>,
    pub api_key_id: Option<Uuid>,
    pub new_api_key_id: Option<Uuid>,
    pub watch_token_id: Option<Uuid>,
    pub job_id: Option<Uuid>,
    pub client_address: Option<ClientAddress>,
    pub request_id: Option<Uuid>,
}

/// An entry whose transaction is still to commit.
#[derive(Debug)]
#[must_use = "once it is committed, it is to be logged"]
pub struct Inserted(AuditEntry);

impl AuditEntry {
    /// Stores it, in the transaction of its act.
    pub async fn insert(self, conn: &mut AsyncPgConnection) -> Result<Inserted> {
        diesel::insert_into(audit_entries::table).values(&self).execute(conn).await?;
        Ok(Inserted(self))
    }

    /// Its line of the log; to be called once it is committed.
    pub fn log(&self) {
        tracing::info!(
            target: "milepost::audit",
            entry_id = %self.id,
            act = self.act.label(),
            actor = self.actor.label(),
            actor_user_id = self.actor_user_id.map(display),
            actor_credential_id = self.actor_credential_id.map(display),
            user_id = self.user_id.map(display),
            session_id = self.session_id.map(display),
            api_key_id = self.api_key_id.map(display),
            new_api_key_id = self.new_api_key_id.map(display),
            watch_token_id = self.watch_token_id.map(display),
            job_id = self.job_id.map(display),
            client_address = self.client_address.map(|address| display(address.0)),
            request_id = self.request_id.map(display),
        );
    }
}

impl Inserted {
    /// Its transaction has committed.
    pub fn committed(self) {
        self.0.log();
    }
}

/// An address, as Postgres has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsExpression)]
#[diesel(sql_type = Inet)]
pub struct ClientAddress(pub IpAddr);

/// Address family (2, and 3 for IPv6), bits of the network, whether it is one,
/// length, bytes: Postgres' `utils/adt/network.c`.
impl ToSql<Inet, Pg> for ClientAddress {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        use std::io::Write as _;
        match self.0 {
            IpAddr::V4(address) => {
                out.write_all(&[2, 32, 0, 4])?;
                out.write_all(&address.octets())?;
            }
            IpAddr::V6(address) => {
                out.write_all(&[3, 128, 0, 16])?;
                out.write_all(&address.octets())?;
            }
        }
        Ok(IsNull::No)
    }
}
