//! Faults in which a standby takes the place of the primary.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
    time::Duration,
};

use futures_util::{StreamExt as _, future::join_all, stream};
use milepost_testing::{connect, set, texts, within};

use crate::{
    campaign::read_job,
    database_faults::SERVER_SESSIONS,
    fault_injector::{FaultInjector, TIMEOUT},
    history::{LostLog, Moment, Outcome, SetBack},
    replica::Replica,
    writers::{Writer, event},
};

/// For how long a proxy leads to a server of Postgres that is not the primary.
const MISLED: Duration = Duration::from_secs(1);
/// Jobs that have lost events, and then as many others, at the other server.
const TEMPTED_JOBS: usize = 6;

impl FaultInjector {
    /// The primary is killed, and a standby promoted that has every acknowledged commit.
    pub async fn promote_synchronous(&mut self, duration: Duration) -> String {
        tokio::time::sleep(duration / 4).await;
        self.postgres.stop_primary().await;
        self.promote(true).await;
        String::new()
    }

    /// The primary is killed, and a standby promoted that lacks its last commits.
    pub async fn promote_asynchronous(&mut self, duration: Duration) -> String {
        let mut tempted = Vec::new();
        for _ in 0..TEMPTED_JOBS {
            let mut writer = Writer::new(&self.context, "injector".to_owned(), 0);
            let job = writer.create_job().await;
            tempted.push((writer, job));
        }
        self.append_to_all(&mut tempted, 0, 1).await;
        self.postgres.in_step().await;
        let lost_from = self.context.now();
        self.postgres.part().await;
        let standby = self.postgres.other().connect().await;
        let kept_position = texts(&standby, "SELECT position FROM event_log").await.remove(0);
        let kept_jobs: HashSet<String> = texts(&standby, "SELECT id FROM jobs").await.into_iter().collect();
        drop(standby);
        self.append_to_all(&mut tempted, 0, 3).await;
        tokio::time::sleep(Duration::from_millis(300) + duration / 2).await;
        self.postgres.stop_primary().await;
        let until = self.context.now();
        self.promote(true).await;
        let noticed_at = self.context.now();
        // The other server brings each job to the sequence that server 0 may remember.
        self.append_to_all(&mut tempted, 1, 3).await;
        self.append_to_all(&mut tempted, 0, 1).await;
        let logs = self.read_lost_logs(&kept_position, &kept_jobs).await;
        let lost: usize = logs.values().map(|log| log.events.len() - log.kept).sum();
        let gone = logs.values().filter(|log| log.is_gone).count();
        let what = format!("{lost} events of {} jobs are lost, {gone} jobs are gone", logs.len());
        let set_back = SetBack { lost_from, until, noticed_at, logs };
        self.context.history.lock().unwrap().set_backs.push(set_back);
        what
    }

    /// Appends so many events to each job, each by itself, at one server.
    async fn append_to_all(&self, jobs: &mut [(Writer, usize)], replica: usize, count: usize) {
        let appends = jobs.iter_mut().map(async |(writer, job)| {
            for _ in 0..count {
                let event = event(&self.context, &mut writer.random, *job);
                let mut batch = writer.batch(*job, vec![event]);
                within(TIMEOUT, "an append of the injector to be answered", async {
                    while matches!(writer.send_to(replica, &mut batch).await, Outcome::Unknown(_)) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                })
                .await;
                self.context.history.lock().unwrap().batches.push(batch);
            }
        });
        join_all(appends).await;
    }

    /// The primary is stopped, the standby promoted, and the former primary follows it.
    pub async fn switch_over(&mut self, duration: Duration) -> String {
        self.postgres.primary_mut().stop().await;
        self.promote(true).await;
        self.postgres.return_as_standby().await;
        let misleads = self.random.bool();
        if misleads {
            self.mislead_server_0().await;
        }
        tokio::time::sleep(duration).await;
        self.postgres.other_mut().stop().await;
        format!("server 0 {} to the former primary", if misleads { "was led" } else { "was not led" })
    }

    /// The primary stops to run, a standby is promoted, and the former primary wakes and
    /// would take commits.
    pub async fn freeze_primary(&mut self, duration: Duration) -> String {
        self.postgres.primary().freeze();
        tokio::time::sleep(Duration::from_millis(500) + duration / 2).await;
        let (cuts, misleads) = (self.random.bool(), self.random.bool());
        self.promote(cuts).await;
        self.postgres.other().wake();
        let former = self.postgres.other().connect().await;
        // Without a standby its commits would wait.
        set(&former, "synchronous_standby_names", "").await;
        // It finishes what it was doing when it froze.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let position = "SELECT position FROM event_log";
        let before = texts(&former, position).await;
        if misleads {
            self.mislead_server_0().await;
        }
        let primary = self.postgres.connect().await;
        let reconnect =
            format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {SERVER_SESSIONS}");
        for _ in 0..5 {
            primary.simple_query(&reconnect).await.unwrap();
            tokio::time::sleep(Duration::from_millis(self.random.u64(100..400))).await;
        }
        let after = texts(&former, position).await;
        if before != after {
            let what =
                format!("events were appended to a former primary: position {before:?}, then {after:?}");
            self.context.record_unexpected(what);
        }
        self.postgres.other_mut().kill().await;
        format!(
            "connections of server 0 were {}, it {} to the former primary",
            if cuts { "cut" } else { "left open" },
            if misleads { "was led" } else { "was not led" }
        )
    }

    /// Promotes the standby, and returns once both servers have appended to it.
    async fn promote(&mut self, cuts: bool) {
        self.postgres.promote().await;
        let dir = self.postgres.primary().dir().to_owned();
        self.lead_server_0_to(&dir, cuts);
        self.note_available().await;
    }

    pub fn lead_server_0_to(&mut self, dir: &Path, cuts: bool) {
        let [proxy] = &self.proxies[0][..] else { panic!("server 0 has one proxy") };
        proxy.lead_to(dir);
        if cuts {
            proxy.cut();
        }
    }

    /// As a load balancer that has not noticed yet which node is the primary.
    async fn mislead_server_0(&mut self) {
        let dir = self.postgres.other().dir().to_owned();
        self.lead_server_0_to(&dir, true);
        tokio::time::sleep(MISLED).await;
        let dir = self.postgres.primary().dir().to_owned();
        self.lead_server_0_to(&dir, true);
        self.note_available().await;
    }

    /// Reads from the killed primary what the promoted standby lacks: the logs of all jobs
    /// with lost events, and the jobs that are lost themselves.
    async fn read_lost_logs(
        &mut self,
        kept_position: &str,
        kept_jobs: &HashSet<String>,
    ) -> BTreeMap<usize, LostLog> {
        self.postgres.other_mut().start_hidden();
        let former = within(TIMEOUT, "the killed primary to start again", async {
            loop {
                if let Ok(client) = connect(&self.postgres.other().hidden_url()).await
                    && client.simple_query("SELECT 1").await.is_ok()
                {
                    return client;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        let lost = format!(
            "SELECT job_id || ' ' || count(*) FROM events WHERE position > {kept_position} GROUP BY job_id"
        );
        let lost = texts(&former, &lost).await;
        let lost: HashMap<&str, usize> = lost
            .iter()
            .filter_map(|line| line.split_once(' '))
            .map(|(job, count)| (job, count.parse().unwrap()))
            .collect();
        let former_jobs = texts(&former, "SELECT id FROM jobs").await;
        let gone: HashSet<&str> =
            former_jobs.iter().map(String::as_str).filter(|&id| !kept_jobs.contains(id)).collect();
        let url = self.postgres.other().hidden_url();
        let mut server = Replica::start(url, None).await;
        let clients: Vec<_> =
            self.context.providers.iter().map(|user| self.context.client_at(server.address, user)).collect();
        let jobs = self.context.history.lock().unwrap().jobs.clone();
        let (context, clients) = (&self.context, &clients);
        let affected = jobs.iter().enumerate().filter_map(|(number, job)| {
            let (id, provider) = (job.id.as_str(), job.provider);
            let (lost, is_gone) = (lost.get(id).copied().unwrap_or(0), gone.contains(id));
            (lost > 0 || is_gone).then_some((number, provider, lost, is_gone))
        });
        let reads = affected.map(|(number, provider, lost, is_gone)| async move {
            let read = read_job(context, &mut clients[provider].clone(), 0, number).await;
            let events = read.expect("the killed primary has the job").log;
            (number, LostLog { kept: events.len() - lost, events, is_gone })
        });
        let logs = stream::iter(reads).buffer_unordered(8).collect().await;
        server.kill().await;
        self.postgres.other_mut().kill().await;
        logs
    }

    /// Notes that the database is available from now on, and returns once both servers have
    /// appended since.
    pub async fn note_available(&mut self) {
        self.postgres.primary().wait_until_ready().await;
        let now = self.context.now();
        self.available_at.push(now);
        for replica in 0..2 {
            self.wait_for_append(replica, now).await;
        }
    }

    /// Waits for an append that was sent after this moment.
    pub async fn wait_for_append(&self, replica: usize, since: Moment) {
        within(
            TIMEOUT,
            format!("server {replica} to append; the end of its log:\n{}", self.replicas[replica].log_tail()),
            async {
                loop {
                    let last = self.successes[replica].lock().unwrap().last().copied();
                    if last.is_some_and(|(sent_at, _)| sent_at > since) {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            },
        )
        .await;
    }
}
