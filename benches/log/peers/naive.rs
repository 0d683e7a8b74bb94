//! The design that one would write first: a transaction for each event, in the tables of
//! milepost, with a NOTIFY in it. Who watches listens, and reads what is new by SELECT.
//!
//! It has no server of its own: what it does beside Postgres is done in the process of its
//! user, here the benchmark. Positions come from a Postgres sequence, so that they become
//! visible out of order.

use std::{
    collections::HashMap,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use milepost_testing::connect;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio_postgres::{AsyncMessage, Client, NoTls, Statement};

use crate::{
    Result,
    accounts::Accounts,
    harness::{Harness, serve, stop},
};

const UPDATE: &str = "
    UPDATE job_states SET last_sequence = last_sequence + 1, last_event_id = $2::text::uuid, status = 'running',
        points_done = 5, percent = 5, updated_at = now()
    WHERE job_id = $1::text::uuid RETURNING last_sequence";
const INSERT: &str = r"
    INSERT INTO events (job_id, sequence, position, id, kind, name, step_configuration_id, event_metadata,
        status, points_done, percent, created_at)
    VALUES ($1::text::uuid, $2, nextval('naive_position'), $3::text::uuid, 'step', $4, $5::text::uuid, '\x',
        'running', 5, 5, now())";
const NOTIFY: &str = "SELECT pg_notify('naive', $1)";
const READ: &str =
    "SELECT sequence, name FROM events WHERE job_id = $1::text::uuid AND sequence > $2 ORDER BY sequence";

/// A database with jobs.
pub(crate) struct Database {
    url: String,
    jobs: Vec<String>,
}

/// A pool of connections, and one that listens.
pub(crate) struct Connections {
    sessions: Vec<AsyncMutex<Session>>,
    step: String,
    watched: Arc<Watched>,
    /// The connection that listens.
    _listener: Client,
}

/// Those who watch a job, by its id.
type Watched = Mutex<HashMap<String, Vec<Arc<Notify>>>>;

/// A connection with its prepared statements.
struct Session {
    client: Client,
    update: Statement,
    insert: Statement,
    notify: Statement,
    read: Statement,
}

/// The events of a job after a sequence.
pub(crate) struct Events {
    connections: Arc<Connections>,
    session: usize,
    job: String,
    last: i64,
    notified: Arc<Notify>,
}

impl Database {
    /// Creates a database with as many jobs, by a server of milepost that then stops.
    pub(super) async fn create(harness: &Harness, jobs: usize) -> Result<Self> {
        let url = harness.database().await?;
        let mut server = serve(&url).await;
        let jobs = Accounts::create(server.address).await.create_jobs(server.address, jobs).await?;
        stop(&mut server).await;
        connect(&url).await?.batch_execute("CREATE SEQUENCE naive_position").await?;
        Ok(Self { url, jobs })
    }

    /// The first jobs.
    pub(crate) fn jobs(&self, count: usize) -> Arc<[String]> {
        self.jobs[..count].into()
    }
}

impl Connections {
    pub(crate) async fn open(database: &Database, count: usize) -> Result<Arc<Self>> {
        let mut sessions = Vec::new();
        for _ in 0..count {
            sessions.push(AsyncMutex::new(Session::open(&database.url).await?));
        }
        let client = connect(&database.url).await?;
        let step = client.query_one("SELECT min(id::text) FROM step_configurations", &[]).await?.get(0);
        let watched = Arc::<Watched>::default();
        let listener = listen(&database.url, Arc::clone(&watched)).await?;
        Ok(Arc::new(Self { sessions, step, watched, _listener: listener }))
    }

    /// Appends an event by a transaction of its own, and returns its sequence.
    pub(crate) async fn append(&self, session: usize, job: &str, id: &str, name: &str) -> Result<i64> {
        let mut session = self.sessions[session % self.sessions.len()].lock().await;
        let Session { client, update, insert, notify, .. } = &mut *session;
        let transaction = client.transaction().await?;
        let sequence: i64 = transaction.query_one(update, &[&job, &id]).await?.get(0);
        transaction.execute(insert, &[&job, &sequence, &id, &name, &self.step]).await?;
        transaction.execute(notify, &[&job]).await?;
        transaction.commit().await?;
        Ok(sequence)
    }

    /// The number of stored events.
    pub(crate) async fn stored(&self) -> Result<i64> {
        let session = self.sessions[0].lock().await;
        Ok(session.client.query_one("SELECT count(*) FROM events", &[]).await?.get(0))
    }

    /// Watches a job from now on; returns also its last sequence.
    pub(crate) async fn watch(self: &Arc<Self>, session: usize, job: &str) -> Result<(Events, i64)> {
        let notified = Arc::new(Notify::new());
        // Before the sequence is read, so that no later event is missed.
        lock(&self.watched).entry(job.to_owned()).or_default().push(Arc::clone(&notified));
        let session = session % self.sessions.len();
        let sql = "SELECT last_sequence FROM job_states WHERE job_id = $1::text::uuid";
        let last = self.sessions[session].lock().await.client.query_one(sql, &[&job]).await?.get(0);
        let events = Events { connections: Arc::clone(self), session, job: job.to_owned(), last, notified };
        Ok((events, last))
    }
}

impl Session {
    async fn open(url: &str) -> Result<Self> {
        let client = connect(url).await?;
        let [update, insert, notify, read] = [
            client.prepare(UPDATE).await?,
            client.prepare(INSERT).await?,
            client.prepare(NOTIFY).await?,
            client.prepare(READ).await?,
        ];
        Ok(Self { client, update, insert, notify, read })
    }
}

impl Events {
    /// The sequences and names of the next events.
    pub(crate) async fn next(&mut self) -> Result<Vec<(i64, String)>> {
        loop {
            self.notified.notified().await;
            let session = self.connections.sessions[self.session].lock().await;
            let rows = session.client.query(&session.read, &[&self.job, &self.last]).await?;
            drop(session);
            let events: Vec<(i64, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
            if let Some((last, _)) = events.last() {
                self.last = *last;
                return Ok(events);
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if let Some(watchers) = lock(&self.connections.watched).get_mut(&self.job) {
            watchers.retain(|watcher| !Arc::ptr_eq(watcher, &self.notified));
        }
    }
}

/// Wakes those who watch a job when it is notified, until the returned client is dropped.
async fn listen(url: &str, watched: Arc<Watched>) -> Result<Client> {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(async move {
        while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
            match message {
                Ok(AsyncMessage::Notification(notification)) => {
                    let watched = lock(&watched);
                    let watchers = watched.get(notification.payload()).into_iter().flatten();
                    watchers.for_each(|watcher| watcher.notify_one());
                }
                Ok(_) => {}
                Err(error) => return eprintln!("the connection that listens: {error}"),
            }
        }
    });
    client.batch_execute("LISTEN naive").await?;
    Ok(client)
}

fn lock(watched: &Watched) -> MutexGuard<'_, HashMap<String, Vec<Arc<Notify>>>> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}
