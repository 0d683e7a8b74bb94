//! The throttle of log-ins and sign-ups, shared by all replicas through the table
//! `log_in_attempts`. Failed log-ins are counted by e-mail, by client address, and
//! by the pair of both; sign-ups by client address, in the table `sign_up_windows`.
//!
//! An attempt is refused if its pair is blocked. It is *restricted* if its e-mail or
//! its address is blocked but the pair is not. A restricted attempt succeeds only
//! with the right password and from a known pair, which has logged in or signed up
//! in the last 30 days. So neither failures under a user's e-mail from other
//! addresses, nor failures under other e-mails from the user's address, lock out a
//! user whose pair is known.

use std::{
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use chrono::{DateTime, Utc};
use diesel::data_types::PgInterval;
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::{
    db::Transaction,
    error::{Error, Result},
    models::{
        audit_entry::{AuditAct, AuditEntry, Origin},
        duration,
        email::EmailKey,
        interval,
    },
};

/// Failures in a row of one pair before the next attempt has to wait.
const PAIR_FREE: i32 = 5;
/// Failures in a row of one address, or of one e-mail, before the next attempt has to wait.
const OTHER_FREE: i32 = 20;
/// Longest wait. The first wait is one second, and each further one is twice as long.
pub(super) const LONGEST: Duration = Duration::from_secs(60);

/// See migrations/2026-11-26-000008_log_in_throttle/up.sql.
mod sql {
    use diesel::{
        pg::sql_types::Timestamptz,
        sql_types::{Bool, Integer, Interval, Nullable, Text},
    };

    #[diesel::declare_sql_function]
    extern "SQL" {
        /// Returns when the attempt was counted on address and e-mail, how long to
        /// wait, whether it is refused, and whether the pair is known.
        fn begin_log_in_attempt(
            address: Text,
            email_key: Text,
            pair_free: Integer,
            other_free: Integer,
            longest: Interval,
            has_permit: Bool,
        ) -> Record<(Nullable<Timestamptz>, Nullable<Interval>, Bool, Bool)>;

        /// Always returns true.
        fn finish_log_in_attempt(address: Text, email_key: Text, counted_at: Nullable<Timestamptz>) -> Bool;

        /// Always returns true.
        fn withdraw_log_in_attempt(address: Text, email_key: Text, counted_at: Nullable<Timestamptz>)
        -> Bool;

        /// Returns how long to wait, or NULL if the sign-up is counted.
        fn begin_sign_up(address: Text, most: Integer) -> Nullable<Interval>;
    }
}

/// The e-mail that a log-in gives, and the address that it comes from.
#[derive(Clone, Debug)]
pub struct LogInClaim {
    email: EmailKey,
    origin: Origin,
}

/// A log-in that is counted as failed, and whose password may be verified.
#[derive(Clone, Debug)]
pub struct LogInAttempt {
    claim: LogInClaim,
    /// When it was counted on the address and the e-mail; none for a restricted
    /// attempt, which is counted on the pair alone.
    counted_at: Option<DateTime<Utc>>,
    /// How long the address or the e-mail stays blocked; none unless the attempt is
    /// restricted.
    restricted: Option<Duration>,
    known_pair: bool,
}

impl LogInClaim {
    /// The address is that of `origin`.
    pub fn new(email: EmailKey, origin: Origin) -> Self {
        Self { email, origin }
    }

    /// Counts the log-in as failed. Returns none if it is restricted: the caller then
    /// needs a password permit for unauthenticated callers, and calls
    /// [`Self::begin_restricted`]. Fails with [`Error::LogInThrottled`] if the pair
    /// is blocked.
    pub async fn begin(&self, tx: &mut Transaction<'_>) -> Result<Option<LogInAttempt>> {
        let attempt = self.begin_with(tx, false).await?;
        Ok(Some(attempt).filter(|attempt| attempt.restricted.is_none()))
    }

    /// As [`Self::begin`], for a caller with such a permit.
    pub async fn begin_restricted(&self, tx: &mut Transaction<'_>) -> Result<LogInAttempt> {
        self.begin_with(tx, true).await
    }

    async fn begin_with(&self, tx: &mut Transaction<'_>, has_permit: bool) -> Result<LogInAttempt> {
        let (address, email) = (network_key(&self.origin), self.email.as_str());
        let call =
            sql::begin_log_in_attempt(address, email, PAIR_FREE, OTHER_FREE, interval(LONGEST), has_permit);
        let (counted_at, wait, refused, known_pair): (_, Option<PgInterval>, _, _) =
            diesel::select(call).get_result(tx).await?;
        let restricted = wait.map(duration);
        match restricted {
            Some(wait) if refused => Err(self.throttled(wait)),
            _ => Ok(LogInAttempt { claim: self.clone(), counted_at, restricted, known_pair }),
        }
    }

    fn throttled(&self, retry_after: Duration) -> Error {
        self.origin.log_throttled_log_in();
        Error::LogInThrottled { retry_after }
    }

    /// Takes the failure back that was counted at `counted_at`, and makes the pair a
    /// known one.
    pub(super) async fn record_success(
        &self,
        tx: &mut Transaction<'_>,
        counted_at: Option<DateTime<Utc>>,
    ) -> Result<()> {
        let call = sql::finish_log_in_attempt(network_key(&self.origin), self.email.as_str(), counted_at);
        let _done: bool = diesel::select(call).get_result(tx).await?;
        Ok(())
    }
}

impl LogInAttempt {
    /// Whether the right password lets this attempt succeed.
    pub fn may_succeed(&self) -> bool {
        self.restricted.is_none() || self.known_pair
    }

    /// Leaves the attempt counted as failed and writes an audit entry, with the id of
    /// the user who has the e-mail, if there is one. A restricted attempt has no entry:
    /// it fails with [`Error::LogInThrottled`], as if its password had not been
    /// verified.
    pub async fn fail(&self, tx: &mut Transaction<'_>, user_id: Option<Uuid>) -> Result<()> {
        if let Some(wait) = self.restricted {
            return Err(self.claim.throttled(wait));
        }
        let entry = AuditEntry { user_id, ..self.origin().entry(AuditAct::LogInFailed) };
        entry.insert(tx).await
    }

    /// Takes the counted failure back, because the password could not be verified.
    pub async fn withdraw(&self, tx: &mut Transaction<'_>) -> Result<()> {
        let LogInClaim { email, origin } = &self.claim;
        let call = sql::withdraw_log_in_attempt(network_key(origin), email.as_str(), self.counted_at);
        let _done: bool = diesel::select(call).get_result(tx).await?;
        Ok(())
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.claim.origin
    }

    pub(super) async fn succeed(&self, tx: &mut Transaction<'_>) -> Result<()> {
        self.claim.record_success(tx, self.counted_at).await
    }
}

/// Counts a sign-up on its address. Fails with [`Error::Overloaded`] if that address had
/// `most` in the hour. Sign-ups from loopback are not counted: they come from this machine
/// alone, or through a proxy that is not configured as trusted, and then from everyone. Those
/// whose address is not known count as one address.
pub async fn begin_sign_up(tx: &mut Transaction<'_>, origin: &Origin, most: i32) -> Result<()> {
    if origin.client_address.is_some_and(|address| address.0.to_canonical().is_loopback()) {
        return Ok(());
    }
    let call = sql::begin_sign_up(network_key(origin), most);
    let wait: Option<PgInterval> = diesel::select(call).get_result(tx).await?;
    let refused = |retry_after| Err(Error::Overloaded { what: "sign-ups from one address", retry_after });
    wait.map(duration).map_or(Ok(()), refused)
}

/// An IPv6 address counts as its /64 network, because one client usually has all
/// addresses of such a network. An IPv4 address counts as itself.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

/// The network of the origin as text; that of an unknown address is empty.
fn network_key(origin: &Origin) -> String {
    origin.client_address.map(|address| network(address.0).to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_ipv6_64_network_count_as_one() {
        let of = |text: &str| network(text.parse().expect("an address"));
        let same = |a: &str, b: &str| of(a) == of(b);
        assert!(same("2001:db8:1:2::3", "2001:db8:1:2:ffff::4"));
        assert!(!same("2001:db8:1:2::3", "2001:db8:1:3::3"));
        assert!(!same("10.0.0.1", "10.0.0.2"));
        assert!(same("10.0.0.1", "::ffff:10.0.0.1") && !same("::ffff:10.0.0.1", "::ffff:10.0.0.2"));
    }
}
