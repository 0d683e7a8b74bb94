//! Which run of which database a connection has reached.
//!
//! After a failover, a restore or a restart the same URL may lead to a database that lacks
//! commits which this process has seen. Every new connection is therefore asked which
//! database it has reached, before its first use. When that differs from the one before,
//! the connections to the one before are closed, and all that was remembered of it is
//! forgotten: by the appender, the tail, the watches and the job cache, each of which keeps
//! the identity beside what it remembers.

use std::{collections::BTreeMap, fmt, ops::DerefMut};

use diesel_async::AsyncPgConnection;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::connect::DialError;

/// A run of a primary: between two values of this, commits may have been lost. Any role may
/// read all parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Made by initdb; equal on a primary and its standbys.
    system: u64,
    database: u32,
    /// The table `event_log`, which a restore from a dump makes anew; 0 without a schema.
    event_log: u32,
    /// Grows with each promotion of a standby.
    timeline: u32,
    /// Microseconds since 1970. Tells a primary from the one before a restart, which may have
    /// been restored from a copy of its disk.
    started_us: i64,
}

/// The query for the parts of an identity, one column each. `pg_control_checkpoint()` would
/// have the timeline too, but some seconds late after a promotion. A standby has none.
pub(super) const COLUMNS: &str = "(SELECT system_identifier FROM pg_control_system()), \
    (SELECT datid FROM pg_stat_get_activity(pg_backend_pid())), \
    coalesce(to_regclass('event_log')::oid, 0), \
    CASE WHEN NOT pg_is_in_recovery() THEN pg_walfile_name(pg_current_wal_insert_lsn()) END, \
    (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint";

impl Identity {
    /// Parses the values of [`COLUMNS`].
    pub(super) fn parse(columns: [Option<&str>; 5]) -> Option<Self> {
        let [system, database, event_log, wal_file, started_us] = columns;
        Some(Self {
            // Postgres shows the unsigned number as a signed one.
            system: system?.parse::<i64>().ok()?.cast_unsigned(),
            database: database?.parse().ok()?,
            event_log: event_log?.parse().ok()?,
            timeline: u32::from_str_radix(wal_file?.get(..8)?, 16).ok()?,
            started_us: started_us?.parse().ok()?,
        })
    }
}

/// A connection that knows which database it has reached.
pub trait Identified: DerefMut<Target = AsyncPgConnection> + Send {
    fn identity(&self) -> Identity;
}

/// The form in which the table `histories` has an identity.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { system, database, event_log, timeline, started_us } = self;
        write!(f, "{system}/{database}/{event_log}/{timeline}/{started_us}")
    }
}

/// The database that this process works on at present.
#[derive(Debug, Default)]
pub(super) struct Present(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    present: Option<Identity>,
    /// Closes the connections to it.
    superseded: CancellationToken,
    /// The highest timeline that this process has seen, by system.
    timelines: BTreeMap<u64, u32>,
}

impl Present {
    /// Notes that a connection has reached this database. Returns the token that closes the
    /// connection, once another one is the present database. [`DialError::Superseded`] for a
    /// former primary, which may still take appends that are lost later.
    pub(super) fn enter(&self, reached: Identity) -> Result<CancellationToken, DialError> {
        let mut state = self.0.lock();
        let highest = state.timelines.entry(reached.system).or_default();
        if reached.timeline < *highest {
            return Err(DialError::Superseded);
        }
        *highest = reached.timeline;
        if state.present != Some(reached) {
            if state.present.replace(reached).is_some() {
                tracing::warn!(identity = %reached, "the database is another one than before, or was restarted");
            }
            std::mem::take(&mut state.superseded).cancel();
        }
        Ok(state.superseded.clone())
    }

    /// None before the first connection.
    pub(super) fn identity(&self) -> Option<Identity> {
        self.0.lock().present
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(wal_file: &str, started_us: &str) -> Identity {
        let columns = [Some("-1"), Some("5"), Some("0"), Some(wal_file), Some(started_us)];
        Identity::parse(columns).expect("an identity")
    }

    #[test]
    fn a_former_primary_is_refused_and_its_connections_are_closed() {
        let present = Present::default();
        let (old, new) =
            (identity("0000000A00000001000000FF", "10"), identity("0000000B0000000100000000", "9"));
        assert_eq!(old.to_string(), "18446744073709551615/5/0/10/10");
        let of_old = present.enter(old).expect("the first one");
        assert!(!present.enter(old).expect("the same").is_cancelled() && !of_old.is_cancelled());
        let of_new = present.enter(new).expect("a promoted standby");
        assert!(of_old.is_cancelled() && !of_new.is_cancelled());
        assert!(matches!(present.enter(old), Err(DialError::Superseded)));
        assert!(!of_new.is_cancelled());
        assert_eq!(present.identity(), Some(new));
    }

    #[test]
    fn a_restart_is_another_run() {
        let present = Present::default();
        let before = present.enter(identity("000000010000000000000001", "10")).expect("a run");
        // The clock was set back meanwhile.
        let after = present.enter(identity("000000010000000000000001", "7")).expect("another run");
        assert!(before.is_cancelled() && !after.is_cancelled());
    }

    #[test]
    fn a_standby_has_no_identity() {
        assert_eq!(Identity::parse([Some("1"), Some("5"), Some("7"), None, Some("10")]), None);
    }
}
