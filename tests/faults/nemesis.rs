//! What goes wrong, one after the other, in an order that the seed decides.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio_postgres::Client;
use uuid::Uuid;

use crate::{
    campaign::read,
    cluster::{Cluster, MAX_CONNECTIONS},
    history::{Disturbance, Moment},
    probes::Successes,
    proxy::{Flow, Proxy},
    replica::Replica,
    say,
    temporary::TemporaryDir,
    world::{World, signal, within},
};

/// Longest that the service may need to be back; past it, the campaign fails.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long after a fault some still feel it.
const RECOVERY: Duration = Duration::from_secs(3);
/// One calm in so many is a long one: what is stuck then is so for no fault.
const LONG_CALM_IN: u32 = 10;
const LONG_CALM: Duration = Duration::from_secs(13);
/// A server looks where its clock was moved to once a second.
const LOOKED_UP: Duration = Duration::from_millis(1_100);
/// How soon it is promised to be back once Postgres accepts connections.
pub const PROMISE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    KillServer,
    TerminateServer,
    StopServer,
    MoveClock,
    KillPostgres,
    RestartPostgres,
    TerminateBackends,
    StopBackend,
    CutConnections,
    RefuseConnections,
    DelayBytes,
    HoldBytes,
    FillDisk,
    UseUpConnections,
    HoldLocks,
}

impl Fault {
    pub const ALL: [Self; 15] = [
        Self::KillServer,
        Self::TerminateServer,
        Self::StopServer,
        Self::MoveClock,
        Self::KillPostgres,
        Self::RestartPostgres,
        Self::TerminateBackends,
        Self::StopBackend,
        Self::CutConnections,
        Self::RefuseConnections,
        Self::DelayBytes,
        Self::HoldBytes,
        Self::FillDisk,
        Self::UseUpConnections,
        Self::HoldLocks,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KillServer => "kill -9 of a server",
            Self::TerminateServer => "SIGTERM to a server",
            Self::StopServer => "a server stopped (SIGSTOP)",
            Self::MoveClock => "a server's clock moved",
            Self::KillPostgres => "kill -9 of Postgres",
            Self::RestartPostgres => "restart of Postgres",
            Self::TerminateBackends => "backends terminated",
            Self::StopBackend => "a backend stopped (SIGSTOP)",
            Self::CutConnections => "connections cut",
            Self::RefuseConnections => "connections refused",
            Self::DelayBytes => "bytes delayed",
            Self::HoldBytes => "bytes held back",
            Self::FillDisk => "disk full",
            Self::UseUpConnections => "connections used up",
            Self::HoldLocks => "locks held",
        }
    }

    /// Whether the service has to be back within [`PROMISE`]: where it is the
    /// database that was away, not the server.
    pub fn is_of_the_database(self) -> bool {
        match self {
            Self::KillServer | Self::TerminateServer | Self::StopServer | Self::MoveClock => false,
            Self::KillPostgres
            | Self::RestartPostgres
            | Self::TerminateBackends
            | Self::StopBackend
            | Self::CutConnections
            | Self::RefuseConnections
            | Self::DelayBytes
            | Self::HoldBytes
            | Self::FillDisk
            | Self::UseUpConnections
            | Self::HoldLocks => true,
        }
    }
}

/// A fault, and how long each server could not append for it.
#[derive(Clone, Debug)]
pub struct Episode {
    pub fault: Fault,
    pub what: String,
    /// The one that alone is struck.
    pub server: Option<usize>,
    pub began: Moment,
    /// Everything was healed, and Postgres accepted connections.
    pub healed: Moment,
    pub outages: [Outage; 2],
}

impl Episode {
    /// When nobody can be blamed for what fails.
    pub fn disturbance(&self) -> Disturbance {
        let touches = self.server.map_or([true; 2], |server| [server == 0, server == 1]);
        Disturbance { from: self.began, to: self.healed + RECOVERY, touches }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Outage {
    /// The longest time between two successes from its beginning on.
    pub without: Duration,
    /// From its end to the next success.
    pub until_back: Duration,
}

/// All that can be broken.
pub struct Bed {
    pub dir: TemporaryDir,
    pub cluster: Cluster,
    pub proxies: [Proxy; 2],
    pub replicas: [Replica; 2],
    pub world: Arc<World>,
    pub successes: [Successes; 2],
    pub random: fastrand::Rng,
}

impl Bed {
    /// Every fault once, then any of them, until the time is up.
    pub async fn torment(&mut self, until: Moment) -> Vec<Episode> {
        let mut faults = Fault::ALL.to_vec();
        if !self.cluster.has_a_disk_of_its_own() {
            say("a disk cannot be mounted here: it is not filled up");
            faults.retain(|&fault| fault != Fault::FillDisk);
        }
        let mut episodes = Vec::new();
        self.random.shuffle(&mut faults);
        let mut first = faults.clone().into_iter();
        loop {
            let due = first.next();
            if due.is_none() && self.world.now() > until {
                return episodes;
            }
            let fault = due.unwrap_or_else(|| faults[self.random.usize(..faults.len())]);
            let calm = Duration::from_millis(self.random.u64(300..1_500));
            let is_long = self.random.u32(..LONG_CALM_IN) == 0;
            tokio::time::sleep(if is_long { LONG_CALM } else { calm }).await;
            episodes.push(self.strike(fault).await);
        }
    }

    async fn strike(&mut self, fault: Fault) -> Episode {
        let began = self.world.now();
        let (what, server) = self.inflict(fault).await;
        let undone = self.world.now();
        self.cluster.answers().await;
        let healed = self.world.now();
        let mut outages = [Outage { without: Duration::ZERO, until_back: Duration::ZERO }; 2];
        for (replica, outage) in outages.iter_mut().enumerate() {
            *outage = self.outage(replica, began, healed).await;
        }
        let [first, second] = outages.map(|outage| outage.until_back.as_millis());
        let undone = (undone - began).as_secs_f64();
        let answered = (healed - began).as_secs_f64();
        say(format!(
            "{:8.3} s  {what}; undone after {undone:.3} s, Postgres there after {answered:.3} s, service {first} and {second} ms later; {}",
            began.as_secs_f64(),
            self.cluster.room().await,
        ));
        Episode { fault, what, server, began, healed, outages }
    }

    /// Waits for a success of an append that was sent after the end, and looks
    /// back.
    async fn outage(&self, replica: usize, began: Moment, healed: Moment) -> Outage {
        let back = tokio::time::timeout(TIMEOUT, async {
            loop {
                let success = self.successes[replica]
                    .lock()
                    .unwrap()
                    .iter()
                    .rev()
                    .take_while(|(_, answered)| *answered >= healed)
                    .last()
                    .copied();
                if let Some((_, answered)) = success {
                    return answered;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        let Ok(back) = back else {
            panic!(
                "server {replica} has appended nothing for {TIMEOUT:?} after all was healed; {}; it said last:\n{}",
                self.cluster.room().await,
                self.replicas[replica].last_words(),
            );
        };
        let successes = self.successes[replica].lock().unwrap();
        let within = successes.iter().rev().take_while(|(_, answered)| *answered >= began);
        let mut moments: Vec<Moment> = within.map(|&(_, answered)| answered).collect();
        moments.push(began);
        let without = moments.windows(2).map(|pair| pair[0] - pair[1]).max().unwrap_or_default();
        Outage { without, until_back: back - healed }
    }

    /// Does it and heals it; what it was, in words, and to which server, if to one
    /// alone.
    async fn inflict(&mut self, fault: Fault) -> (String, Option<usize>) {
        let one = self.random.usize(..2);
        let server = match fault {
            Fault::KillServer | Fault::TerminateServer | Fault::StopServer => Some(one),
            // The only one with a clock of its own.
            Fault::MoveClock => Some(1),
            _ => None,
        };
        let lasts = Duration::from_millis(self.random.u64(200..self.world.pace.fault_ms));
        let detail = match fault {
            Fault::KillServer => {
                self.replicas[one].kill().await;
                tokio::time::sleep(lasts / 4).await;
                self.replicas[one].start_again(&mut self.dir);
                self.replicas[one].listens().await;
                format!("server {one}")
            }
            Fault::TerminateServer => {
                let exit = self.replicas[one].terminate().await;
                assert!(exit.success(), "a server that was told to stop ended with {exit}");
                self.replicas[one].start_again(&mut self.dir);
                self.replicas[one].listens().await;
                format!("server {one}")
            }
            Fault::StopServer => {
                self.replicas[one].signal("STOP").await;
                tokio::time::sleep(lasts).await;
                self.replicas[one].signal("CONT").await;
                format!("server {one} for {lasts:?}")
            }
            Fault::MoveClock => self.move_clock(lasts).await,
            Fault::KillPostgres => {
                self.cluster.kill().await;
                tokio::time::sleep(lasts / 2).await;
                self.cluster.start_again().await;
                format!("for {:?}", lasts / 2)
            }
            Fault::RestartPostgres => {
                self.cluster.stop().await;
                self.cluster.start_again().await;
                String::new()
            }
            Fault::TerminateBackends => self.terminate_backends().await,
            Fault::StopBackend => self.stop_backend(lasts).await,
            Fault::CutConnections | Fault::RefuseConnections | Fault::DelayBytes | Fault::HoldBytes => {
                self.disturb_connections(fault, lasts).await
            }
            Fault::FillDisk => self.fill_disk(lasts).await,
            Fault::UseUpConnections => self.use_up_connections(lasts).await,
            Fault::HoldLocks => self.hold_locks(lasts).await,
        };
        (format!("{}: {detail}", fault.name()), server)
    }

    async fn move_clock(&mut self, lasts: Duration) -> String {
        let seconds = self.random.i64(120..900) * if self.random.bool() { 1 } else { -1 };
        for offset in [seconds, -seconds] {
            self.replicas[1].move_clock(offset);
            within(TIMEOUT, format!("a clock to move by {offset} s"), async {
                // Ids never go back in time.
                while self.seconds_ahead_of_us().await < offset.max(0) - 5 {
                    tokio::time::sleep(LOOKED_UP).await;
                }
            })
            .await;
            tokio::time::sleep(LOOKED_UP + lasts / 8).await;
        }
        self.replicas[1].move_clock(0);
        tokio::time::sleep(LOOKED_UP).await;
        format!("server 1, by {seconds} s and back")
    }

    /// By how much the clock of server 1 is ahead, as the id says of an event
    /// that it makes.
    async fn seconds_ahead_of_us(&mut self) -> i64 {
        let mut callers =
            [self.world.caller(1, &self.world.providers[0]), self.world.caller(1, &self.world.providers[0])];
        let job = self.world.new_job(0, &mut callers, &mut self.random).await;
        self.world.close_job(&mut callers, &mut self.random, job).await;
        let log = read(&self.world, &mut callers[1], 1, job).await.log;
        let id: Uuid = log[0].id.parse().unwrap();
        let (seconds, _) = id.get_timestamp().expect("an id with a time").to_unix();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        i64::try_from(seconds).unwrap() - i64::try_from(now.as_secs()).unwrap()
    }

    async fn terminate_backends(&mut self) -> String {
        let which = ["true", "random() < 0.5", "query ILIKE '%append_events%'"][self.random.usize(..3)];
        let times = self.random.usize(1..4);
        let admin = self.cluster.connect().await;
        for _ in 0..times {
            let sql =
                format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS} AND {which}");
            admin.simple_query(&sql).await.unwrap();
            tokio::time::sleep(Duration::from_millis(self.random.u64(0..200))).await;
        }
        format!("{times} times, where {which}")
    }

    async fn stop_backend(&mut self, lasts: Duration) -> String {
        let admin = self.cluster.connect().await;
        let sql = format!(
            "SELECT pid FROM pg_stat_activity WHERE {OURS} \
             ORDER BY query ILIKE '%append_events%' DESC, random() LIMIT 3"
        );
        let pids: Vec<String> = column(&admin, &sql).await;
        let Some(pid) = pids.get(self.random.usize(..pids.len().max(1))) else { return "none".to_owned() };
        signal("STOP", pid).await;
        tokio::time::sleep(lasts).await;
        signal("CONT", pid).await;
        format!("for {lasts:?}")
    }

    async fn disturb_connections(&mut self, fault: Fault, lasts: Duration) -> String {
        let which = [[true, false], [false, true], [true, true]][self.random.usize(..3)];
        let delay = Duration::from_millis(self.random.u64(20..250));
        let proxies = || (0..2).filter(|&proxy| which[proxy]);
        if matches!(fault, Fault::CutConnections | Fault::RefuseConnections) {
            // So that much is on its way when they are cut.
            proxies().for_each(|proxy| self.proxies[proxy].set_flow(Flow::Delayed(delay)));
            tokio::time::sleep(delay * 2).await;
        }
        for proxy in proxies() {
            let proxy = &mut self.proxies[proxy];
            match fault {
                Fault::RefuseConnections => {
                    proxy.refuse();
                    proxy.cut();
                }
                Fault::DelayBytes => proxy.set_flow(Flow::Delayed(delay)),
                Fault::HoldBytes => proxy.set_flow(Flow::Held),
                _ => proxy.cut(),
            }
        }
        let lasts = match fault {
            // Long enough for many to come and go meanwhile.
            Fault::DelayBytes => lasts + Duration::from_secs(1),
            _ => lasts,
        };
        if fault != Fault::CutConnections {
            tokio::time::sleep(lasts).await;
        }
        for proxy in proxies() {
            if fault == Fault::RefuseConnections {
                self.proxies[proxy].accept();
            }
            self.proxies[proxy].set_flow(Flow::Free);
        }
        let which: Vec<String> = proxies().map(|proxy| proxy.to_string()).collect();
        let servers = which.join(" and ");
        match fault {
            Fault::CutConnections => format!("of server {servers}"),
            Fault::DelayBytes => format!("by up to {delay:?}, of server {servers}, for {lasts:?}"),
            _ => format!("of server {servers}, for {lasts:?}"),
        }
    }

    async fn fill_disk(&mut self, lasts: Duration) -> String {
        self.cluster.fill_disk().await;
        tokio::time::sleep(lasts).await;
        // What was let go of meanwhile is taken as well.
        self.cluster.fill_disk().await;
        tokio::time::sleep(lasts / 2).await;
        self.cluster.free_disk().await;
        let died = !self.cluster.is_running();
        if died {
            self.cluster.start_again().await;
        }
        format!("for {lasts:?}; Postgres {}", if died { "gave up" } else { "stayed" })
    }

    /// Takes every connection that is free, those of the servers too.
    async fn use_up_connections(&mut self, lasts: Duration) -> String {
        let admin = self.cluster.connect().await;
        let mut taken = Vec::new();
        let until = self.world.now() + lasts;
        let ends = self.random.bool();
        while self.world.now() < until {
            match self.cluster.try_connect().await {
                Ok(client) if taken.len() < MAX_CONNECTIONS => taken.push(client),
                Ok(_) => {}
                Err(_) => {
                    if ends {
                        let sql = format!(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                             WHERE {OURS} AND random() < 0.3"
                        );
                        admin.simple_query(&sql).await.unwrap();
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
        format!("{} taken for {lasts:?}{}", taken.len(), if ends { ", the servers' ended" } else { "" })
    }

    /// So that statements wait, and with them the servers' few connections.
    async fn hold_locks(&mut self, lasts: Duration) -> String {
        let lock = [
            "SELECT FROM event_log FOR UPDATE",
            "SELECT FROM jobs WHERE random() < 0.3 FOR UPDATE",
            "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE",
            "LOCK TABLE events IN ACCESS EXCLUSIVE MODE",
            "LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE",
            "LOCK TABLE jobs, events, api_keys, users, event_log IN ACCESS EXCLUSIVE MODE",
        ][self.random.usize(..6)];
        let admin = self.cluster.connect().await;
        // Deadlocks are the servers' affair; otherwise it may be us who lose.
        let begin = format!("SET deadlock_timeout = '1min'; BEGIN; {lock}");
        if let Err(error) = admin.batch_execute(&begin).await {
            return format!("{lock}: {error}");
        }
        tokio::time::sleep(lasts).await;
        admin.batch_execute("ROLLBACK").await.unwrap();
        format!("{lock}, for {lasts:?}")
    }
}

/// The connections of the servers, in `pg_stat_activity`.
const OURS: &str = "application_name = 'milepost' AND backend_type = 'client backend'";

async fn column(client: &Client, sql: &str) -> Vec<String> {
    let rows = client.simple_query(sql).await.unwrap();
    rows.iter()
        .filter_map(|row| match row {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .collect()
}
