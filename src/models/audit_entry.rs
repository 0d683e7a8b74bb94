//! The audit log: each act on accounts, credentials and jobs, with its actor and
//! client address.
//!
//! An act's entry is inserted in the transaction of the act. After the commit it is
//! also logged, under the target `milepost::audit`.

use std::net::IpAddr;

use diesel::{
    expression::AsExpression,
    pg::Pg,
    prelude::*,
    serialize::{self, IsNull, Output, ToSql},
    sql_types::Inet,
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::{
    db::Transaction,
    error::Result,
    models::{
        caller::{Caller, CredentialId, Subject},
        pg_enum::pg_enum,
    },
    schema::audit_entries,
};

pg_enum! {
    /// The kind of an audited act.
    pub enum AuditAct = AuditAct {
        SignUp = "sign_up",
        LogIn = "log_in",
        /// Also `ChangePassword` with a wrong current password.
        LogInFailed = "log_in_failed",
        LogOut = "log_out",
        /// A log-in beyond the quota of sessions ended the user's oldest one.
        SessionEnded = "session_ended",
        PasswordChanged = "password_changed",
        ApiKeyCreated = "api_key_created",
        ApiKeyRotated = "api_key_rotated",
        ApiKeyExpired = "api_key_expired",
        WatchTokenCreated = "watch_token_created",
        WatchTokenExpired = "watch_token_expired",
        /// By `CloseJob` only; a completion is an event of the job's log.
        JobClosed = "job_closed",
        CancellationRequested = "cancellation_requested",
        JobHeld = "job_held",
        JobReleased = "job_released",
        UserCreated = "user_created",
        PasswordSet = "password_set",
        UserDisabled = "user_disabled",
        UserEnabled = "user_enabled",
        CustomerCodeRenewed = "customer_code_renewed",
    }
}

pg_enum! {
    /// The kind of credential that an act was done with.
    pub enum AuditActor = AuditActor {
        Anonymous = "anonymous",
        Session = "session",
        ApiKey = "api_key",
        WatchToken = "watch_token",
        /// A command of `milepost user`, which works on the database directly.
        Operator = "operator",
    }
}

/// The columns of an entry that say who acted: the caller of a call, or the operator.
#[derive(Clone, Copy, Debug, Insertable)]
#[diesel(table_name = audit_entries, treat_none_as_default_value = false)]
pub struct Origin {
    pub(super) actor: AuditActor,
    pub(super) actor_user_id: Option<Uuid>,
    pub(super) actor_credential_id: Option<Uuid>,
    pub(super) client_address: Option<ClientAddress>,
    pub(super) request_id: Option<Uuid>,
}

impl Origin {
    /// The operator, who works on the database without a call.
    pub const OPERATOR: Self = Self {
        actor: AuditActor::Operator,
        actor_user_id: None,
        actor_credential_id: None,
        client_address: None,
        request_id: None,
    };

    /// The origin of a call without a credential.
    pub fn anonymous(address: Option<IpAddr>, request_id: Option<Uuid>) -> Self {
        let client_address = address.map(ClientAddress);
        Self { actor: AuditActor::Anonymous, client_address, request_id, ..Self::OPERATOR }
    }

    /// The origin of a call by this caller.
    pub fn of_caller(caller: &Caller, address: Option<IpAddr>, request_id: Option<Uuid>) -> Self {
        let (actor, credential) = match caller.credential() {
            CredentialId::Session(id) => (AuditActor::Session, id),
            CredentialId::ApiKey(id) => (AuditActor::ApiKey, id),
            CredentialId::WatchToken(id) => (AuditActor::WatchToken, id),
        };
        let (Subject::User { id: subject, .. } | Subject::Job(subject)) = caller.subject();
        let (actor_user_id, actor_credential_id) = (Some(subject), Some(credential));
        Self { actor, actor_user_id, actor_credential_id, ..Self::anonymous(address, request_id) }
    }

    /// Makes an entry of this act without the ids of what the act changed; the caller
    /// adds them.
    pub fn entry(&self, act: AuditAct) -> AuditEntry {
        AuditEntry {
            id: Uuid::now_v7(),
            act,
            origin: *self,
            user_id: None,
            session_id: None,
            api_key_id: None,
            new_api_key_id: None,
            watch_token_id: None,
            job_id: None,
        }
    }

    /// Logs a log-in that the throttle refused. It has no entry in the table, because
    /// nothing limits how many refused log-ins a client sends.
    pub fn log_throttled_log_in(&self) {
        tracing::warn!(
            target: "milepost::audit",
            act = "log_in_throttled",
            actor = self.actor.label(),
            actor_user_id = self.actor_user_id.map(display),
            actor_credential_id = self.actor_credential_id.map(display),
            client_address = self.client_address.map(|address| display(address.0)),
            request_id = self.request_id.map(display),
        );
    }
}

/// Most rows of one INSERT: Postgres takes at most 65,535 parameters in a statement.
const INSERT_ROWS: usize = 1_000;

/// A row. The table's constraints say which ids an entry of each act has.
#[derive(Clone, Debug, Insertable)]
#[diesel(table_name = audit_entries, treat_none_as_default_value = false)]
pub struct AuditEntry {
    pub id: Uuid,
    pub act: AuditAct,
    #[diesel(embed)]
    pub origin: Origin,
    pub user_id: Option<Uuid>,
    pub session_id: Option<Uuid>,
    pub api_key_id: Option<Uuid>,
    pub new_api_key_id: Option<Uuid>,
    pub watch_token_id: Option<Uuid>,
    pub job_id: Option<Uuid>,
}

impl AuditEntry {
    /// Inserts the entry in the transaction of the act, and logs it after the commit.
    pub async fn insert(self, tx: &mut Transaction<'_>) -> Result<()> {
        diesel::insert_into(audit_entries::table).values(&self).execute(tx).await?;
        tx.after_commit(move || self.log());
        Ok(())
    }

    /// As [`Self::insert`], for many entries of one act.
    pub(super) async fn insert_all(entries: Vec<Self>, tx: &mut Transaction<'_>) -> Result<()> {
        for entries in entries.chunks(INSERT_ROWS) {
            diesel::insert_into(audit_entries::table).values(entries).execute(tx).await?;
        }
        tx.after_commit(move || entries.iter().for_each(Self::log));
        Ok(())
    }

    /// Logs the entry; to be called after its transaction has committed.
    pub fn log(&self) {
        let origin = &self.origin;
        tracing::info!(
            target: "milepost::audit",
            entry_id = %self.id,
            act = self.act.label(),
            actor = origin.actor.label(),
            actor_user_id = origin.actor_user_id.map(display),
            actor_credential_id = origin.actor_credential_id.map(display),
            user_id = self.user_id.map(display),
            session_id = self.session_id.map(display),
            api_key_id = self.api_key_id.map(display),
            new_api_key_id = self.new_api_key_id.map(display),
            watch_token_id = self.watch_token_id.map(display),
            job_id = self.job_id.map(display),
            client_address = origin.client_address.map(|address| display(address.0)),
            request_id = origin.request_id.map(display),
        );
    }
}

/// An address as a value of the Postgres type `inet`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsExpression)]
#[diesel(sql_type = Inet)]
pub struct ClientAddress(pub IpAddr);

/// The binary form of `inet` is the address family (2 for IPv4, 3 for IPv6), the bits
/// of the netmask, a flag for `cidr`, the length of the address, and the address
/// (`utils/adt/network.c` of Postgres).
impl ToSql<Inet, Pg> for ClientAddress {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        use std::io::Write as _;
        let bytes = match self.0 {
            IpAddr::V4(address) => [&[2, 32, 0, 4][..], &address.octets()].concat(),
            IpAddr::V6(address) => [&[3, 128, 0, 16][..], &address.octets()].concat(),
        };
        out.write_all(&bytes)?;
        Ok(IsNull::No)
    }
}
