//! Calls on a large database, compared with the same calls on a small one. In both the
//! calls go to the same number of jobs; in the large one these are spread over all jobs.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use milepost_client::{
    Client,
    pb::{
        AllJobs, FromNow, GetJobRequest, ListEventsRequest, ListJobsRequest, SummarizeJobsRequest,
        SummaryPeriod, get_job_request, list_events_request,
        summarize_jobs_request::GroupBy,
        watch_events_request::{Scope, Start},
    },
};
use milepost_testing::{ServerProcess, connect};

use tokio::task::JoinHandle;

use crate::{
    Result,
    accounts::{self, Accounts},
    events::{append_request, new_event},
    harness::{Harness, serve, stop},
    load::latency,
    report::{Goal, Measure, Outcome},
    store::watch,
};

const EVENTS_PER_JOB: u32 = 10;
/// Jobs that calls go to; the small database has no others.
const JOBS: u32 = 1_000;
/// Of how many jobs one is the small tenant's.
const SMALL_TENANT: u32 = 1_000;
/// Events between a token and the end of the log, when a watch is resumed.
const MISSED: usize = 10;

/// The calls, each a row of the table.
const CALLS: [&str; 6] = ["append", "get-job", "resume-job", "resume-all", "list-jobs", "list-events"];

/// Longest median of a summary of a million jobs, in milliseconds.
const MOST_OF_A_SUMMARY: f64 = 2_000.0;

/// A server on a filled database.
struct Side {
    _server: ServerProcess,
    provider: Client,
    customer: Client,
    /// The customer of a thousandth of the jobs; of all jobs where these are few.
    small: Client,
    jobs: Arc<[String]>,
    /// A token of a watch of all jobs, [`MISSED`] events or more before the end of the log.
    all_token: String,
    /// For each job a token of its watch from before the appends of the row.
    job_tokens: Vec<String>,
    /// Index of the next call's job.
    next: usize,
}

pub(super) async fn measure(harness: &Harness) -> Result<Vec<Outcome>> {
    let large = harness.options.flat_events / EVENTS_PER_JOB;
    eprintln!(
        "flat: {} events of {large} jobs compared with {} events of {JOBS} jobs",
        large * EVENTS_PER_JOB,
        JOBS * EVENTS_PER_JOB
    );
    let (mut few, mut many) = (Side::fill(harness, JOBS).await?, Side::fill(harness, large).await?);
    let mut alone = Side::fill(harness, large / SMALL_TENANT).await?;
    let past = "flat-small-tenant";
    let mut of_small = Outcome::new(past, "ms p50").compared_with("without the others", None);
    let mut of_summary =
        Outcome::new("summarize", "ms p50").compared_with("with few", Some(Goal::Within(MOST_OF_A_SUMMARY)));
    let mut beside_summary = Outcome::new("append-beside-summary", "ms p50").compared_with("alone", None);
    let outcome = |call: &&str| {
        Outcome::new(format!("flat-{call}"), "ms p50").compared_with("with few", Some(Goal::AtMost(1.2)))
    };
    let mut outcomes: Vec<Outcome> = CALLS.iter().map(outcome).collect();
    let share = harness.options.round() / u32::try_from(CALLS.len())?;
    for _ in 0..harness.options.rounds {
        for (call, outcome) in CALLS.iter().zip(&mut outcomes) {
            harness.checkpoint().await?;
            let [in_large, in_small] = alternate(call, [&mut many, &mut few], share).await?;
            outcome.add_milepost(in_large);
            outcome.add_peer(in_small);
        }
        let [among, alone] = alternate(past, [&mut many, &mut alone], share).await?;
        of_small.add_milepost(among);
        of_small.add_peer(alone);
        let [in_large, in_small] = alternate("summarize", [&mut many, &mut few], share).await?;
        of_summary.add_milepost(in_large);
        of_summary.add_peer(in_small);
        let alone = many.appends(share).await?;
        let customer = many.customer.clone();
        let summaries: JoinHandle<Result<()>> = tokio::spawn(async move {
            loop {
                summarize(&customer).await?;
            }
        });
        beside_summary.add_milepost(many.appends(share).await?);
        beside_summary.add_peer(alone);
        if summaries.is_finished() {
            summaries.await??
        } else {
            summaries.abort();
        }
    }
    outcomes.extend([of_small, of_summary, beside_summary]);
    Ok(outcomes)
}

/// Makes calls on both sides alternately, so that other load of the machine slows both
/// equally. Returns their median latencies.
async fn alternate(call: &str, mut sides: [&mut Side; 2], time: Duration) -> Result<[Measure; 2]> {
    let mut latencies = [Vec::new(), Vec::new()];
    for side in &mut sides {
        side.prepare().await?;
    }
    let started = Instant::now();
    while started.elapsed() < time * 2 {
        for (side, latencies) in sides.iter_mut().zip(&mut latencies) {
            let called = Instant::now();
            side.call(call).await?;
            latencies.push(called.elapsed());
        }
    }
    Ok(latencies.map(|latencies| {
        let latencies = latency(&latencies);
        Measure { value: latencies[0], latencies: Some(latencies) }
    }))
}

impl Side {
    async fn fill(harness: &Harness, jobs: u32) -> Result<Self> {
        let database = harness.database().await?;
        let mut server = serve(&database).await;
        let accounts = Accounts::create(server.address).await;
        accounts.create_jobs(server.address, 1).await?;
        let has_small = jobs > JOBS;
        let small = if has_small { Accounts::create(server.address).await } else { accounts.clone() };
        if has_small {
            small.create_jobs(server.address, 1).await?;
        }
        let client = connect(&database).await?;
        client.batch_execute(&insert_jobs_sql(jobs)).await?;
        // In time autovacuum would do the same.
        client.batch_execute("VACUUM ANALYZE").await?;
        // A restarted server has cached nothing from before the INSERTs.
        stop(&mut server).await;
        server.restart().await;
        let stride = i64::from(jobs / JOBS).max(1);
        let rows = client
            .query(&format!("SELECT id::text FROM jobs WHERE provider_job_id LIKE 'fill-%' AND substr(provider_job_id, 6)::bigint % {stride} = 0 ORDER BY 1"), &[])
            .await?;
        let jobs: Arc<[String]> = rows.iter().map(|row| row.get(0)).collect();
        let provider = accounts::connect(server.address, &accounts.provider, 1).await?.remove(0);
        let customer = accounts::connect(server.address, &accounts.customer, 1).await?.remove(0);
        let (all_token, job_tokens) = (String::new(), Vec::new());
        let small = accounts::connect(server.address, &small.customer, 1).await?.remove(0);
        let _server = server;
        let mut side = Self { _server, provider, customer, small, jobs, all_token, job_tokens, next: 0 };
        for index in 0..side.jobs.len() {
            let scope = Scope::JobId(side.jobs[index].clone());
            let (_, token, _) = watch(&side.customer, scope, Start::FromNow(FromNow {})).await?;
            side.job_tokens.push(token);
        }
        side.prepare().await?;
        Ok(side)
    }

    /// Takes a token of all jobs at the end of the log, and then appends [`MISSED`] events.
    async fn prepare(&mut self) -> Result<()> {
        let all = Scope::AllJobs(AllJobs::default());
        (_, self.all_token, _) = watch(&self.customer, all, Start::FromNow(FromNow {})).await?;
        for _ in 0..MISSED {
            self.call("append").await?;
        }
        Ok(())
    }

    /// The median of appends one after the other.
    async fn appends(&mut self, time: Duration) -> Result<Measure> {
        let (started, mut latencies) = (Instant::now(), Vec::new());
        while started.elapsed() < time {
            let called = Instant::now();
            self.call("append").await?;
            latencies.push(called.elapsed());
        }
        let latencies = latency(&latencies);
        Ok(Measure { value: latencies[0], latencies: Some(latencies) })
    }

    async fn call(&mut self, call: &str) -> Result<()> {
        self.next = (self.next + 7) % self.jobs.len();
        let job = self.jobs[self.next].clone();
        match call {
            "append" => {
                let request = append_request(job, vec![new_event(self.next, 0)]);
                let answer = self.provider.events().append_events(request).await?.into_inner();
                answer
                    .events
                    .first()
                    .filter(|event| !event.existed)
                    .ok_or("AppendEvents appended no event")?;
            }
            "get-job" => {
                let request = GetJobRequest { job: Some(get_job_request::Job::JobId(job)) };
                self.customer.jobs().get_job(request).await?;
            }
            "resume-job" => {
                let token = Start::ResumeToken(self.job_tokens[self.next].clone());
                watch(&self.customer, Scope::JobId(job), token).await?;
            }
            "resume-all" => {
                let token = Start::ResumeToken(self.all_token.clone());
                watch(&self.customer, Scope::AllJobs(AllJobs::default()), token).await?;
            }
            "flat-small-tenant" => {
                let scope = Scope::AllJobs(AllJobs::default());
                watch(&self.small, scope, None).await?;
            }
            "summarize" => summarize(&self.customer).await?,
            "list-jobs" => {
                let page = self.customer.jobs().list_jobs(ListJobsRequest::default()).await?.into_inner();
                page.jobs.get(49).ok_or("a page has fewer items than expected")?;
            }
            _ => {
                let job = Some(list_events_request::Job::JobId(job));
                let request = ListEventsRequest { job, ..Default::default() };
                let page = self.customer.events().list_events(request).await?.into_inner();
                page.events.get(9).ok_or("a page has fewer items than expected")?;
            }
        }
        Ok(())
    }
}

/// Counts the customer's jobs by month.
async fn summarize(customer: &Client) -> Result<()> {
    let group_by = Some(GroupBy::Period(SummaryPeriod::Month.into()));
    let request = SummarizeJobsRequest { group_by, ..Default::default() };
    let answer = customer.jobs().summarize_jobs(request).await?.into_inner();
    let counted = answer.total.filter(|total| total.jobs >= i64::from(JOBS));
    counted.map(drop).ok_or_else(|| "a summary counts fewer jobs than there are".into())
}

/// SQL that inserts jobs and their events as appends would have stored them.
fn insert_jobs_sql(jobs: u32) -> String {
    let events = u64::from(jobs) * u64::from(EVENTS_PER_JOB);
    format!(
        "CREATE TEMPORARY TABLE made AS
             SELECT n, ('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid AS id
             FROM generate_series(1, {jobs}) AS n;
         INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag, provider_job_id,
                           provider_job_name, points_total, created_at)
         SELECT made.id, provider_id, customer_id, job_configuration_id, configuration_tag, 'fill-' || n,
                'Patient ' || n, points_total, now() - interval '1 day' + n * interval '1 millisecond'
         FROM made JOIN (
             SELECT *, row_number() OVER (ORDER BY created_at) AS owner, count(*) OVER () AS owners
             FROM jobs WHERE provider_job_id = 'job-0000000') AS one
         -- The calls go to jobs whose numbers are multiples.
         ON owner = CASE WHEN owners > 1 AND n % {SMALL_TENANT} = 1 THEN 2 ELSE 1 END;
         UPDATE job_states SET status = 'running', points_done = 5, percent = 5, steps = '\\x65',
                               last_sequence = {EVENTS_PER_JOB}, last_event_id = gen_random_uuid()
         FROM made WHERE made.id = job_id;
         UPDATE jobs SET status = 'running' FROM made WHERE made.id = jobs.id;
         INSERT INTO events (job_id, sequence, position, id, kind, name, step_configuration_id, event_metadata,
                             status, points_done, percent, created_at)
         SELECT made.id, sequence, (sequence - 1) * {jobs} + n, gen_random_uuid(), 'step', repeat('.', 64), step.id, '',
                'running', 5, 5, now()
         FROM generate_series(1, {EVENTS_PER_JOB}) AS sequence, made JOIN jobs USING (id)
             JOIN step_configurations AS step
             ON step.job_configuration_id = jobs.job_configuration_id AND step.position = 0;
         UPDATE event_log SET position = {events};
         DROP TABLE made;"
    )
}
