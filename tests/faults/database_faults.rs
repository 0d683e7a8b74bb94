//! Faults of the database and of its clients, without a failover.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use milepost_testing::{
    PgBouncer, connect,
    processes::{Signal, signal},
    texts, within,
};
use uuid::Uuid;

use crate::{
    campaign::read_job,
    fault_injector::{FaultInjector, TIMEOUT},
    postgres::MAX_CONNECTIONS,
};

/// libfaketime reads the offset of a clock once a second.
const CLOCK_REREAD: Duration = Duration::from_millis(1_100);

/// Condition on `pg_stat_activity`: sessions of the servers.
pub const SERVER_SESSIONS: &str = "application_name = 'milepost' AND backend_type = 'client backend'";

impl FaultInjector {
    pub async fn move_clock(&mut self, duration: Duration) -> String {
        let seconds = self.random.i64(120..900) * if self.random.bool() { 1 } else { -1 };
        for offset in [seconds, -seconds] {
            self.replicas[1].move_clock(offset);
            within(TIMEOUT, format!("server 1's clock to move by {offset} s"), async {
                // The time in ids never goes back, so that only a forward move shows.
                while self.seconds_ahead().await < offset.max(0) - 5 {
                    tokio::time::sleep(CLOCK_REREAD).await;
                }
            })
            .await;
            tokio::time::sleep(CLOCK_REREAD + duration / 8).await;
        }
        self.replicas[1].move_clock(0);
        tokio::time::sleep(CLOCK_REREAD).await;
        format!("server 1, by {seconds} s and back")
    }

    /// By how many seconds the clock of server 1 is ahead, by the time in the id of an
    /// event that it makes: the `close` event of a new job.
    async fn seconds_ahead(&mut self) -> i64 {
        let mut clients = [
            self.context.client(1, &self.context.providers[0]),
            self.context.client(1, &self.context.providers[0]),
        ];
        let job = self.context.create_job(0, &mut clients, &mut self.random).await;
        self.context.close_job(&mut clients, &mut self.random, job).await;
        let log = read_job(&self.context, &mut clients[1], 1, job).await.expect("the job exists").log;
        let id: Uuid = log[0].id.parse().unwrap();
        let (seconds, _) = id.get_timestamp().expect("the id is a UUID with a time").to_unix();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        i64::try_from(seconds).unwrap() - i64::try_from(now.as_secs()).unwrap()
    }

    pub async fn terminate_backends(&mut self) -> String {
        let which = ["true", "random() < 0.5", "query ILIKE '%append_events%'"][self.random.usize(..3)];
        let times = self.random.usize(1..4);
        let admin = self.postgres.connect().await;
        for _ in 0..times {
            let sql = format!(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {SERVER_SESSIONS} AND {which}"
            );
            admin.simple_query(&sql).await.unwrap();
            tokio::time::sleep(Duration::from_millis(self.random.u64(0..200))).await;
        }
        format!("{times} times, where {which}")
    }

    pub async fn stop_backend(&mut self, duration: Duration) -> String {
        let admin = self.postgres.connect().await;
        let sql = format!(
            "SELECT pid FROM pg_stat_activity WHERE {SERVER_SESSIONS} \
             ORDER BY query ILIKE '%append_events%' DESC, random() LIMIT 3"
        );
        let pids = texts(&admin, &sql).await;
        let Some(pid) = pids.get(self.random.usize(..pids.len().max(1))) else { return "none".to_owned() };
        let pid = pid.parse().unwrap();
        signal(pid, Signal::STOP);
        tokio::time::sleep(duration).await;
        signal(pid, Signal::CONT);
        format!("for {duration:?}")
    }

    pub async fn fill_disk(&mut self, duration: Duration) -> String {
        self.postgres.fill_disk().await;
        tokio::time::sleep(duration).await;
        // Postgres may have removed files: fill that space as well.
        self.postgres.fill_disk().await;
        tokio::time::sleep(duration / 2).await;
        self.postgres.free_disk().await;
        let has_exited = !self.postgres.primary_mut().is_running();
        if has_exited {
            self.postgres.start_again().await;
        }
        format!("for {duration:?}; Postgres {}", if has_exited { "exited" } else { "kept running" })
    }

    /// Opens connections until Postgres has none left. In half of the cases it also
    /// terminates sessions of the servers, to take their connections.
    pub async fn use_up_connections(&mut self, duration: Duration) -> String {
        let admin = self.postgres.connect().await;
        let mut taken = Vec::new();
        let until = self.context.now() + duration;
        let terminates = self.random.bool();
        while self.context.now() < until {
            match connect(&self.postgres.primary().url("milepost")).await {
                Ok(client) if taken.len() < MAX_CONNECTIONS => taken.push(client),
                Ok(_) => {}
                Err(_) => {
                    if terminates {
                        let sql = format!(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                             WHERE {SERVER_SESSIONS} AND random() < 0.3"
                        );
                        admin.simple_query(&sql).await.unwrap();
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
        format!(
            "{} taken for {duration:?}{}",
            taken.len(),
            if terminates { ", sessions of the servers terminated" } else { "" }
        )
    }

    /// Holds a lock, so that statements wait and occupy the servers' few connections.
    pub async fn hold_locks(&mut self, duration: Duration) -> String {
        let lock = [
            "SELECT FROM event_log FOR UPDATE",
            "SELECT FROM job_states WHERE random() < 0.3 FOR UPDATE",
            "SELECT FROM jobs WHERE random() < 0.3 FOR UPDATE",
            "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE",
            "LOCK TABLE events IN ACCESS EXCLUSIVE MODE",
            "LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE",
            "LOCK TABLE job_states, jobs, events, api_keys, users, event_log IN ACCESS EXCLUSIVE MODE",
        ][self.random.usize(..7)];
        let admin = self.postgres.connect().await;
        // In a deadlock Postgres cancels the session whose `deadlock_timeout` passes
        // first. That must be a session of a server.
        let begin = format!("SET deadlock_timeout = '1min'; BEGIN; {lock}");
        if let Err(error) = admin.batch_execute(&begin).await {
            return format!("{lock}: {error}");
        }
        tokio::time::sleep(duration).await;
        admin.batch_execute("ROLLBACK").await.unwrap();
        format!("{lock}, for {duration:?}")
    }

    /// Moves Postgres's clock there and back.
    pub async fn move_database_clock(&mut self, duration: Duration) -> String {
        let seconds = self.random.i64(120..900) * if self.random.bool() { 1 } else { -1 };
        for offset in [seconds, -seconds, 0] {
            self.postgres.move_clock(offset);
            tokio::time::sleep(CLOCK_REREAD + duration / 4).await;
        }
        format!("by {seconds} s and back")
    }

    /// Makes transactions read-only by default. Sessions of the servers set that back, so
    /// that both go on to append.
    pub async fn make_read_only(&mut self, duration: Duration) -> String {
        let (set, reset) = [
            (
                "ALTER SYSTEM SET default_transaction_read_only = on",
                "ALTER SYSTEM RESET default_transaction_read_only",
            ),
            (
                "ALTER DATABASE milepost SET default_transaction_read_only = on",
                "ALTER DATABASE milepost RESET default_transaction_read_only",
            ),
        ][self.random.usize(..2)];
        let admin = self.postgres.connect().await;
        admin.batch_execute("SET default_transaction_read_only = off").await.unwrap();
        admin.batch_execute(set).await.unwrap();
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        tokio::time::sleep(duration / 4).await;
        // New sessions begin with the new default.
        let sql = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {SERVER_SESSIONS}");
        admin.simple_query(&sql).await.unwrap();
        let reconnected_at = self.context.now();
        for replica in 0..2 {
            self.wait_for_append(replica, reconnected_at).await;
        }
        tokio::time::sleep(duration / 2).await;
        admin.batch_execute(reset).await.unwrap();
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        format!("{set}, for {duration:?}")
    }

    /// Leads server 0 through a pooler for a while.
    pub async fn insert_pooler(&mut self, duration: Duration) -> String {
        let settings = ["pool_mode=session", "default_pool_size=400"];
        let pooler = PgBouncer::start(&self.postgres.primary().url("milepost"), &settings).await;
        self.lead_server_0_to(pooler.dir(), true);
        let led_at = self.context.now();
        self.wait_for_append(0, led_at).await;
        tokio::time::sleep(duration).await;
        let dir = self.postgres.primary().dir().to_owned();
        self.lead_server_0_to(&dir, true);
        drop(pooler);
        format!("for {duration:?}")
    }
}
