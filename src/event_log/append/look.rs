//! Reads of jobs and of stored events, and appends to a locked job: the work that goes on
//! beside the rounds, each kind over a connection of its own.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use diesel_async::AsyncPgConnection;
use futures_util::future::try_join_all;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::{
    request::{Knowledge, Request},
    round::Round,
    task::Sent,
    waiting::jobs_of,
};
use crate::{
    db::{Database, Identified as _, OwnConnection},
    error::{Error, Result},
    event_log::position::Run,
    models::event::{AppendConnection, AppendStatement, Event, LockedJob, StoredState},
    progress::JobState,
    telemetry::{metrics::Metrics, traces::Traces},
};

/// Work of one kind, of which one piece at a time is under way, over connections of the type `C`.
pub(super) struct Look<T, C> {
    pub(super) under_way: Option<JoinHandle<T>>,
    /// The jobs of that piece; no other work on them is begun.
    pub(super) jobs: HashSet<Uuid>,
    /// Kept from one piece to the next.
    pub(super) connection: Option<C>,
}

impl<T, C> Default for Look<T, C> {
    fn default() -> Self {
        Self { under_way: None, jobs: HashSet::new(), connection: None }
    }
}

impl<T: Send + 'static, C> Look<T, C> {
    /// Begins a piece with the requests that it is about.
    pub(super) fn begin<F>(&mut self, requests: Vec<Request>, work: impl FnOnce(Option<C>, Vec<Request>) -> F)
    where
        F: Future<Output = T> + Send + 'static,
    {
        if !requests.is_empty() {
            self.jobs = jobs_of(&requests);
            self.under_way = Some(tokio::spawn(work(self.connection.take(), requests)));
        }
    }

    pub(super) fn is_free(&self) -> bool {
        self.under_way.is_none()
    }
}

/// What was read for some requests: the states of their jobs.
pub(super) struct ReadJobs {
    pub(super) requests: Vec<Request>,
    pub(super) states: Result<HashMap<Uuid, JobState>>,
    pub(super) connection: Option<OwnConnection>,
}

/// Reads the states of the requests' jobs in this run, and after them the stored ids.
pub(super) async fn read_jobs(
    database: Database,
    run: Run,
    mut kept: Option<OwnConnection>,
    mut requests: Vec<Request>,
) -> ReadJobs {
    let read = async {
        let mut connection = database.kept_or_new(&mut kept).await?;
        demand_run(&connection, run)?;
        let jobs: Vec<Uuid> = jobs_of(&requests).into_iter().collect();
        let states = StoredState::load(&mut connection, &jobs).await?;
        read_stored(&connection, &mut requests).await?;
        Ok((states, connection))
    };
    let (states, connection) = match database.in_time(read, "reading the jobs took too long").await {
        Ok((states, connection)) => (Ok(states), Some(connection)),
        Err(error) => (Err(error), None),
    };
    ReadJobs { requests, states, connection }
}

/// What became of an append to a locked job.
pub(super) struct Locked {
    pub(super) run: Run,
    pub(super) sent: Sent,
    /// The requests that could not be planned, in their order.
    pub(super) unplanned: Vec<Request>,
}

/// Appends to a job to which another replica appends so fast that it has always moved
/// between the read of its state and the round. Only for such a job, since a server that
/// stops within the transaction keeps others waiting.
pub(super) async fn append_locked(
    database: Database,
    run: Run,
    mut kept: Option<AppendConnection>,
    mut requests: Vec<Request>,
    (traces, metrics): (Traces, Arc<Metrics>),
) -> Locked {
    let mut round = Round::default();
    let id = requests.first().map(Request::job_id).unwrap_or_default();
    let begin = async {
        let is_new = kept.is_none();
        let connection = AppendConnection::kept_or_new(&database, &mut kept).await?;
        demand_run(&connection, run)?;
        if is_new {
            // Prepares the statement, so that COMMIT will not overtake it.
            AppendStatement::default().execute(&connection).await?;
        }
        let locked = LockedJob::begin(connection, id).await?;
        read_stored(locked.connection(), &mut requests).await?;
        Ok(locked)
    };
    let locked = match database.in_time(begin, "locking the job took too long").await {
        Ok(locked) => locked,
        Err(error) => {
            let error = Arc::new(error);
            requests.into_iter().for_each(|request| request.fail(&error));
            return Locked { run, sent: (round, Err(Error::unavailable(error))), unplanned: Vec::new() };
        }
    };
    let states = locked.state().map(|state| (id, state)).into_iter().collect();
    let unplanned = round.plan_all(requests, &states, Knowledge::Locked);
    let appended = if round.order.is_empty() {
        let rolled_back = async { Ok((locked.roll_back().await?, Vec::new())) };
        database.in_time(rolled_back, "ending the transaction took too long").await
    } else {
        round.start_span(&traces);
        let append = round.measured(&metrics, round.append_locked(locked));
        database.in_time(append, "the append took too long").await
    };
    Locked { run, sent: (round, appended), unplanned }
}

/// [`Error::Unavailable`] if the connection is not one of this run.
fn demand_run(connection: &OwnConnection, run: Run) -> Result<()> {
    if connection.identity() != run.identity {
        return Err(Error::unavailable("another database has taken the place of the one before"));
    }
    Ok(())
}

/// Reads which events of those requests are stored that were refused from memory or
/// not appended.
async fn read_stored(connection: &AsyncPgConnection, requests: &mut [Request]) -> Result<()> {
    let unsure = requests.iter_mut().filter(|request| request.needs >= Knowledge::Read);
    let reads = unsure.map(|request| async move {
        let ids: Vec<Uuid> = request.batch.client_ids().collect();
        let rows = Event::list_by_ids(connection, request.job_id(), &ids).await?;
        request.stored = rows.into_iter().map(|row| (row.id, row)).collect();
        Ok::<_, Error>(())
    });
    try_join_all(reads).await.map(drop)
}
