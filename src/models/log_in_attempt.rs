//! Log-ins that fail slow down those that follow, on all replicas alike.

use std::{net::IpAddr, time::Duration};

use diesel::{
    data_types::PgInterval,
    sql_types::{Bytea, Integer, Interval},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

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
}

impl LogInAttempt {
    /// As whom, in any case, and where from, as far as it is known.
    pub fn new(email: &str, address: Option<IpAddr>) -> Self {
        let email = email.to_lowercase();
        let address = address.map_or_else(String::new, |address| address.to_string());
        let key = |of: &str| Sha256::digest(of).to_vec();
        Self {
            pair: key(&format!("pair {address} {email}")),
            address: key(&format!("address {address}")),
            email: key(&format!("email {email}")),
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
            Some(wait) => Err(Error::LogInThrottled {
                retry_after: Duration::from_micros(u64::try_from(wait.microseconds).unwrap_or_default()),
            }),
        }
    }

    /// The password was right: it is not a failure, and who comes from there is
    /// known.
    pub async fn finish(&self, conn: &mut AsyncPgConnection) -> Result<()> {
        let call = sql::finish_log_in(&self.pair, &self.address, &self.email, OTHER_FREE);
        let _done: bool = diesel::select(call).get_result(conn).await?;
        Ok(())
    }
}
