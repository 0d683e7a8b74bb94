//! How many connections the database accepts, and how many a server may open.

use diesel::{QueryableByName, sql_query, sql_types::Integer};
use diesel_async::RunQueryDsl as _;

use super::{Database, Payer, pooler};
use crate::error::Result;

/// What a server opens outside its pool: to listen, to append, to read and to lock jobs, to
/// follow the log, to look for silent jobs, to confirm credentials, and to check the
/// availability.
const OUTSIDE_THE_POOL: usize = 8;

#[derive(QueryableByName)]
struct Capacity {
    #[diesel(sql_type = Integer)]
    max_connections: i32,
    /// What is left for this role and this database.
    #[diesel(sql_type = Integer)]
    accepted: i32,
}

/// The limits of a role and of a database are negative if there are none. Superusers may use
/// reserved connections, but a server's role need not be one.
const CAPACITY: &str = "SELECT setting::integer AS max_connections, least(
        setting::integer - current_setting('superuser_reserved_connections')::integer
            - coalesce(current_setting('reserved_connections', true)::integer, 0),
        CASE WHEN rolconnlimit >= 0 THEN rolconnlimit END,
        CASE WHEN datconnlimit >= 0 THEN datconnlimit END) AS accepted
    FROM pg_settings, pg_roles, pg_database
    WHERE name = 'max_connections' AND rolname = current_user AND datname = current_database()";

impl Database {
    /// Warns if this server may open more connections than the database accepts. Others, such
    /// as those of further servers, come on top.
    pub async fn warn_of_too_many_connections(&self) -> Result<()> {
        let mut connection = self.get(Payer::Server).await?;
        let capacity: Capacity = sql_query(CAPACITY).get_result(&mut connection).await?;
        let own = OUTSIDE_THE_POOL + pooler::CONNECTIONS;
        let accepted = usize::try_from(capacity.accepted).unwrap_or(0);
        let pool = self.settings().connections;
        if pool + own > accepted {
            tracing::warn!(
                database_connections = pool,
                outside_the_pool = own,
                accepted,
                max_connections = capacity.max_connections,
                "the database accepts fewer connections than this server may open: lower --database-connections to \
                 {} or raise max_connections of Postgres",
                accepted.saturating_sub(own)
            );
        }
        Ok(())
    }
}
