//! Log-ins that fail slow down those that follow, on all replicas alike; and so do
//! sign-ups.

use std::{
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use chrono::{DateTime, Utc};
use diesel::data_types::PgInterval;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    models::{
        audit_entry::{AuditAct, AuditEntry, Origin},
        interval,
    },
};

/// Failures in a row of one user from one address before the next has to wait.
const PAIR_FREE: i32 = 5;
/// The same of one address, whoever it tries to be, and of one user, from
/// wherever it is tried.
const OTHER_FREE: i32 = 20;
/// Sign-ups in a row from one address before the next has to wait: more than the
/// people of one office or class.
const SIGN_UPS_FREE: i32 = 100;
/// The longest wait; the first is a second, each further one twice as long.
const LONGEST: Duration = Duration::from_secs(60);

/// See migrations/2026-11-26-000008_log_in_throttle/up.sql.
mod sql {
    use diesel::{
        pg::sql_types::Timestamptz,
        sql_types::{Bool, Integer, Interval, Nullable, Text},
    };

    diesel::define_sql_function! {
        /// When it was counted, how long to wait, whether it is refused, whether
        /// the pair is known.
        fn begin_log_in_attempt(
            address: Text,
            email: Text,
            pair_free: Integer,
            other_free: Integer,
            longest: Interval,
            has_permit: Bool,
        ) -> Record<(Nullable<Timestamptz>, Nullable<Interval>, Bool, Bool)>;
    }

    diesel::define_sql_function! {
        /// Always true.
        fn finish_log_in_attempt(address: Text, email: Text, counted_at: Nullable<Timestamptz>) -> Bool;
    }

    diesel::define_sql_function! {
        /// Always true.
        fn withdraw_log_in_attempt(address: Text, email: Text, counted_at: Nullable<Timestamptz>) -> Bool;
    }

    diesel::define_sql_function! {
        /// How long to wait, if so.
        fn begin_sign_up(address: Text, free: Integer, longest: Interval) -> Nullable<Interval>;
    }
}

/// Somebody who claims to be a user, from somewhere.
#[derive(Clone, Debug)]
pub struct LogInClaim {
    email: String,
    address: String,
    origin: Origin,
}

/// A claim that was counted as failed, and whose password may be looked at.
#[derive(Debug)]
pub struct LogInAttempt {
    claim: LogInClaim,
    /// On the address and the e-mail; of one in doubt none.
    counted_at: Option<DateTime<Utc>>,
    /// How long all have to wait whom a right password does not let in.
    in_doubt: Option<Duration>,
    /// Logged in or signed up from there before.
    known: bool,
}

impl LogInClaim {
    /// As whom, in any case, and where from, as far as it is known.
    pub fn new(email: impl Into<String>, origin: Origin) -> Self {
        Self { email: email.into(), address: household_of(&origin), origin }
    }

    /// Counts it as failed. None where it is in doubt: then it may be made by who
    /// has a stranger's place at hashing, with [`Self::begin_in_doubt`].
    /// [`Error::LogInThrottled`] if it may not be made now.
    pub async fn begin(&self, conn: &mut AsyncPgConnection) -> Result<Option<LogInAttempt>> {
        let attempt = self.begin_with(conn, false).await?;
        Ok(Some(attempt).filter(|attempt| attempt.in_doubt.is_none()))
    }

    /// The same with such a place.
    pub async fn begin_in_doubt(&self, conn: &mut AsyncPgConnection) -> Result<LogInAttempt> {
        self.begin_with(conn, true).await
    }

    async fn begin_with(&self, conn: &mut AsyncPgConnection, has_turn: bool) -> Result<LogInAttempt> {
        let (address, email) = (&self.address, &self.email);
        let call =
            sql::begin_log_in_attempt(address, email, PAIR_FREE, OTHER_FREE, interval(LONGEST), has_turn);
        let (counted_at, wait, refused, known): (_, Option<PgInterval>, _, _) =
            diesel::select(call).get_result(conn).await?;
        let in_doubt = wait.map(duration);
        match in_doubt {
            Some(wait) if refused => Err(self.throttled(wait)),
            _ => Ok(LogInAttempt { claim: self.clone(), counted_at, in_doubt, known }),
        }
    }

    fn throttled(&self, retry_after: Duration) -> Error {
        self.origin.log_throttled_log_in();
        Error::LogInThrottled { retry_after }
    }

    /// They are who they claim to be: from now on they are known there.
    pub(super) async fn is_right(
        &self,
        conn: &mut AsyncPgConnection,
        counted_at: Option<DateTime<Utc>>,
    ) -> Result<()> {
        let call = sql::finish_log_in_attempt(&self.address, &self.email, counted_at);
        let _done: bool = diesel::select(call).get_result(conn).await?;
        Ok(())
    }
}

impl LogInAttempt {
    /// Whether a right password is enough.
    pub fn admits(&self) -> bool {
        self.in_doubt.is_none() || self.known
    }

    /// It came to nothing: stays counted as failed, and is written down so; as
    /// whom, where there is such a user. One in doubt is refused like those that
    /// are not looked at: [`Error::LogInThrottled`].
    pub async fn fail(&self, conn: &mut AsyncPgConnection, user_id: Option<Uuid>) -> Result<()> {
        if let Some(wait) = self.in_doubt {
            return Err(self.claim.throttled(wait));
        }
        let entry = AuditEntry { user_id, ..self.origin().entry(AuditAct::LogInFailed) };
        entry.insert(conn).await?.committed();
        Ok(())
    }

    /// The password could not be looked at: it is not counted any more.
    pub async fn withdraw(&self, conn: &mut AsyncPgConnection) -> Result<()> {
        let LogInClaim { address, email, .. } = &self.claim;
        let call = sql::withdraw_log_in_attempt(address, email, self.counted_at);
        let _done: bool = diesel::select(call).get_result(conn).await?;
        Ok(())
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.claim.origin
    }

    /// The password was right: it is not a failure, and who comes from there is
    /// known.
    pub(super) async fn finish(&self, conn: &mut AsyncPgConnection) -> Result<()> {
        self.claim.is_right(conn, self.counted_at).await
    }
}

/// Counts a sign-up. [`Error::Overloaded`] if there were too many from that
/// address. Whoever is on this machine is not counted: nobody else is there, or
/// everybody, behind a proxy that nobody said is to be trusted.
pub async fn begin_sign_up(conn: &mut AsyncPgConnection, origin: &Origin) -> Result<()> {
    if origin.address.is_none_or(|address| address.to_canonical().is_loopback()) {
        return Ok(());
    }
    let call = sql::begin_sign_up(household_of(origin), SIGN_UPS_FREE, interval(LONGEST));
    let wait: Option<PgInterval> = diesel::select(call).get_result(conn).await?;
    match wait.map(duration) {
        None => Ok(()),
        Some(retry_after) => Err(Error::Overloaded { what: "sign-ups from one address", retry_after }),
    }
}

/// Of a wait, which is never as long as a day.
fn duration(wait: PgInterval) -> Duration {
    Duration::from_micros(u64::try_from(wait.microseconds).unwrap_or_default())
}

fn household_of(origin: &Origin) -> String {
    origin.address.map_or_else(String::new, |address| household(address).to_string())
}

/// What one household has: of IPv6 it is a whole network of 64 bits, so that
/// nobody is somebody else by taking the next address of theirs.
fn household(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_network_of_64_bits_is_one_household() {
        let same = |a: &str, b: &str| {
            household(a.parse().expect("an address")) == household(b.parse().expect("an address"))
        };
        assert!(same("2001:db8:1:2::3", "2001:db8:1:2:ffff::4"));
        assert!(!same("2001:db8:1:2::3", "2001:db8:1:3::3"));
        assert!(!same("10.0.0.1", "10.0.0.2"));
        assert!(same("10.0.0.1", "::ffff:10.0.0.1") && !same("::ffff:10.0.0.1", "::ffff:10.0.0.2"));
    }
}
