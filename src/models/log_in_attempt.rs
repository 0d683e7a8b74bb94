//! Log-ins that fail slow down those that follow, on all replicas alike.

use std::{
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use diesel::{
    data_types::PgInterval,
    sql_types::{Bytea, Integer, Interval},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    models::audit_entry::{AuditAct, AuditEntry, Origin},
};

/// Failures in a row of one user from one address before the next has to wait.
const PAIR_FREE: i32 = 5;
/// The same of one address, whoever it tries to be, and of one user, from
/// wherever it is tried.
const OTHER_FREE: i32 = 20;
/// The longest wait; the first is a second, each further one twice as long.
const LONGEST: Duration = Duration::from_secs(60);

mod sql {
    use super::{Bytea, Integer, Interval};

    diesel::define_sql_function! {
        /// See migrations/2026-11-23-000006_log_in_attempts/up.sql.
        fn begin_log_in(
            pair: Bytea,
            address: Bytea,
            email: Bytea,
            pair_free: Integer,
            other_free: Integer,
            longest: Interval,
        ) -> Nullable<Interval>;
    }

    diesel::define_sql_function! {
        /// The same.
        fn finish_log_in(pair: Bytea, address: Bytea, email: Bytea, other_free: Integer) -> Bool;
    }
}

/// Somebody who claims to be a user, from somewhere.
#[derive(Clone, Debug)]
pub struct LogInAttempt {
    pair: Vec<u8>,
    address: Vec<u8>,
    email: Vec<u8>,
    origin: Origin,
}

impl LogInAttempt {
    /// As whom, in any case, and where from, as far as it is known.
    pub fn new(email: &str, origin: Origin) -> Self {
        let email = email.to_lowercase();
        let address = origin.address.map_or_else(String::new, |address| household(address).to_string());
        let key = |of: &str| Sha256::digest(of).to_vec();
        Self {
            pair: key(&format!("pair {address} {email}")),
            address: key(&format!("address {address}")),
            email: key(&format!("email {email}")),
            origin,
        }
    }

    /// Counts it as failed. [`Error::LogInThrottled`] if it may not be made now.
    pub async fn begin(&self, conn: &mut AsyncPgConnection) -> Result<()> {
        let longest = PgInterval::from_microseconds(i64::try_from(LONGEST.as_micros()).unwrap_or(i64::MAX));
        let wait: Option<PgInterval> = diesel::select(sql::begin_log_in(
            &self.pair,
            &self.address,
            &self.email,
            PAIR_FREE,
            OTHER_FREE,
            longest,
        ))
        .get_result(conn)
        .await?;
        match wait {
            None => Ok(()),
            // Never as long as a day.
            Some(wait) => {
                self.origin.log_throttled_log_in();
                Err(Error::LogInThrottled {
                    retry_after: Duration::from_micros(u64::try_from(wait.microseconds).unwrap_or_default()),
                })
            }
        }
    }

    /// It came to nothing: stays counted as failed, and is written down so; as
    /// whom, where there is such a user.
    pub async fn fail(&self, conn: &mut AsyncPgConnection, user_id: Option<Uuid>) -> Result<()> {
        self.failed_entry(user_id).insert(conn).await?.committed();
        Ok(())
    }

    pub(super) fn failed_entry(&self, user_id: Option<Uuid>) -> AuditEntry {
        AuditEntry { user_id, ..self.origin.entry(AuditAct::LogInFailed) }
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The password was right: it is not a failure, and who comes from there is
    /// known.
    pub(super) async fn finish(&self, conn: &mut AsyncPgConnection) -> Result<()> {
        let call = sql::finish_log_in(&self.pair, &self.address, &self.email, OTHER_FREE);
        let _done: bool = diesel::select(call).get_result(conn).await?;
        Ok(())
    }
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
