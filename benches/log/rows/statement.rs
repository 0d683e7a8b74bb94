//! The append statement alone, driven by pgbench: what the server adds to it is the cost of
//! the service.

use std::{fs, process::Stdio, time::Duration};

use milepost_testing::{connect, installed::succeed};
use tokio::process::Command;
use uuid::Uuid;

use crate::{Result, harness::Harness, load::latency, report::Measure};

/// The name of this peer.
pub(super) const NAME: &str = "append statement";
/// Those of the server's connections that append.
const SETTINGS: &str = "-c plan_cache_mode=force_generic_plan -c jit=off -c enable_seqscan=off \
                        -c enable_bitmapscan=off -c enable_hashjoin=off -c enable_mergejoin=off";
/// As many batches as the server appends in one transaction.
pub(super) const BATCHES: Load = Load { clients: 2, client_jobs: 500, jobs: 20, batch: 100 };
pub(super) const ONE_EVENT: Load = Load { clients: 1, client_jobs: 1_000, jobs: 1, batch: 1 };

#[derive(Clone, Copy)]
pub(super) struct Load {
    clients: usize,
    /// Jobs that each client appends to.
    client_jobs: usize,
    /// Jobs in one statement.
    jobs: usize,
    /// Events of each of these jobs.
    batch: usize,
}

/// The statement on the database of a server, which has the job `job-0000000`.
pub(super) struct Statement {
    database: String,
}

/// What a round has measured.
pub(super) struct Run {
    /// In events a second.
    pub(super) rate: Measure,
    /// The median of a statement in milliseconds.
    pub(super) latency: Measure,
    /// The processor time of an event in microseconds, without that of pgbench.
    pub(super) cost: Measure,
}

impl Statement {
    /// None if pgbench is not installed.
    pub(super) async fn find(harness: &Harness, database: &str) -> Result<Option<Self>> {
        if Command::new("pgbench").arg("--version").stdout(Stdio::null()).status().await.is_ok() {
            return Ok(Some(Self { database: database.to_owned() }));
        }
        harness.report_missing_peer("pgbench (Debian: postgresql)")?;
        Ok(None)
    }

    /// Runs the statement for a round, on new jobs.
    pub(super) async fn run(&self, harness: &Harness, load: Load, round: u32) -> Result<Run> {
        let first = insert_jobs(&self.database, round, load.clients * load.client_jobs).await?;
        let script = load.script(first, &step_id(&self.database).await?);
        let script = harness.write_file("append.sql", &script)?;
        let log = harness.dir.path().join(format!("pgbench-{}", Uuid::now_v7().simple()));
        fs::create_dir(&log)?;
        let mut pgbench = Command::new("pgbench");
        pgbench
            .args(["--no-vacuum", "--protocol=prepared", "--define=i=0", "--log"])
            .arg(format!("--log-prefix={}", log.join("log").display()))
            .arg(format!("--client={}", load.clients))
            .arg(format!("--jobs={}", load.clients))
            .arg(format!("--time={}", harness.options.seconds))
            .arg(format!("--file={}", script.display()))
            .arg(&self.database)
            .env("PGOPTIONS", SETTINGS);
        harness.checkpoint().await?;
        let before = harness.postgres_processor_time();
        succeed(&mut pgbench).await;
        let time = harness.postgres_processor_time() - before;
        let mut latencies = Vec::new();
        for file in fs::read_dir(&log)? {
            for line in fs::read_to_string(file?.path())?.lines() {
                // After the client and the transaction.
                let micros = line.split(' ').nth(2).ok_or("a line of the log without a time")?;
                latencies.push(Duration::from_micros(micros.parse()?));
            }
        }
        let appended = count_events(&self.database, first, load.clients * load.client_jobs).await?;
        let (statements, events) = (latencies.len(), load.jobs * load.batch);
        if usize::try_from(appended)? != statements * events {
            return Err(format!(
                "{statements} append statements appended {appended} events, expected {events} each"
            )
            .into());
        }
        let rate = appended_rate(appended, harness.options.seconds)?;
        let latencies = latency(&latencies);
        let latency = Measure { value: latencies[0], latencies: Some(latencies) };
        Ok(Run { rate, latency, cost: Measure::cost(time, statements * events) })
    }
}

fn appended_rate(appended: i64, seconds: u64) -> Result<Measure> {
    Ok(Measure::of(f64::from(u32::try_from(appended)?) / f64::from(u32::try_from(seconds)?)))
}

impl Load {
    /// The script of pgbench. Each client counts its statements in `i` to know its next job
    /// and that job's last sequence: a query for them would cost a round trip.
    fn script(self, first: i64, step: &str) -> String {
        let Self { client_jobs, jobs, batch, .. } = self;
        let events = jobs * batch;
        let after = "(:after)::bigint";
        let of_job = |value: &str| array("j", jobs, value);
        let of_event = |value: &str| array("e", events, value);
        let sequence = format!("{after} + e % {batch} + 1");
        format!(
            r"\set first {first} + :client_id * {client_jobs} + (:i * {jobs}) % {client_jobs}
\set after ((:i * {jobs}) / {client_jobs}) * {batch}
\set i :i + 1
SELECT outcomes FROM append_events(
    {ids},
    array_fill({after}, ARRAY[{jobs}]),
    {last_ids},
    array_fill({batch}, ARRAY[{jobs}]),
    {new_last_ids},
    array_fill('running'::job_status, ARRAY[{jobs}]),
    array_fill(5::bigint, ARRAY[{jobs}]),
    array_fill(5::smallint, ARRAY[{jobs}]),
    array_fill('\x65'::bytea, ARRAY[{jobs}]),
    array_fill({after} + {batch}, ARRAY[{jobs}]),
    array_fill(false, ARRAY[{jobs}]),
    array_fill({after} = 0, ARRAY[{jobs}]),
    array_fill(false, ARRAY[{jobs}]),
    array_fill(false, ARRAY[{jobs}]),
    array_fill(false, ARRAY[{jobs}]),
    {event_jobs},
    {event_ids},
    array_fill(true, ARRAY[{events}]),
    {sequences},
    array_fill('step'::event_kind, ARRAY[{events}]),
    array_fill(repeat('.', 64), ARRAY[{events}]),
    array_fill('{step}'::uuid, ARRAY[{events}]),
    array_fill(NULL::smallint, ARRAY[{events}]),
    array_fill(''::bytea, ARRAY[{events}]),
    array_fill(NULL::timestamptz, ARRAY[{events}]),
    array_fill('running'::job_status, ARRAY[{events}]),
    array_fill(5::bigint, ARRAY[{events}]),
    array_fill(5::smallint, ARRAY[{events}]));
",
            ids = of_job(&job_id("(:first)::bigint + j")),
            last_ids = of_job(&format!("CASE WHEN {after} > 0 THEN {} END", event_id("j", after))),
            new_last_ids = of_job(&event_id("j", &format!("{after} + {batch}"))),
            event_jobs = of_event(&format!("e / {batch} + 1")),
            event_ids = of_event(&event_id(&format!("e / {batch}"), &sequence)),
            sequences = of_event(&sequence),
        )
    }
}

/// An SQL array of the values that an expression has for the numbers from 0 on. A single value
/// is not sorted.
fn array(variable: &str, count: usize, value: &str) -> String {
    if count == 1 {
        return format!("(SELECT ARRAY[{value}] FROM (VALUES (0)) AS one ({variable}))");
    }
    format!("ARRAY(SELECT {value} FROM generate_series(0, {}) AS {variable} ORDER BY {variable})", count - 1)
}

/// Inserts jobs directly into the database. Their ids are made of consecutive numbers;
/// the first number is returned.
pub(super) async fn insert_jobs(database: &str, set: u32, count: usize) -> Result<i64> {
    let first = i64::from(set) * 1_000_000;
    let (from, to) = (first, first + i64::try_from(count)? - 1);
    let sql = format!(
        "INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                           provider_job_id, provider_job_name, points_total)
         SELECT {}, provider_id, customer_id, job_configuration_id, configuration_tag, 'set-' || n, '', points_total
         FROM (SELECT * FROM jobs WHERE provider_job_id = 'job-0000000') AS one, generate_series({from}, {to}) AS n",
        job_id("n")
    );
    connect(database).await?.batch_execute(&sql).await?;
    Ok(first)
}

/// An SQL expression for the id that `insert_jobs` makes of a number.
fn job_id(number: &str) -> String {
    format!("('00000000-0000-7000-8000-' || lpad(to_hex({number}), 12, '0'))::uuid")
}

/// The id of a step of the configuration.
pub(super) async fn step_id(database: &str) -> Result<String> {
    let client = connect(database).await?;
    Ok(client.query_one("SELECT min(id::text) FROM step_configurations", &[]).await?.get(0))
}

/// The id that the script gives the event of this sequence of its job with this number: the
/// function compares the id of a job's last event.
fn event_id(job: &str, sequence: &str) -> String {
    format!("md5(((:first)::bigint + {job}) || ' ' || ({sequence}))::uuid")
}

/// The number of events of the jobs inserted from this number on, by their
/// `last_sequence`.
async fn count_events(database: &str, first: i64, jobs: usize) -> Result<i64> {
    let last = first + i64::try_from(jobs)? - 1;
    let sql = format!(
        "SELECT sum(last_sequence)::bigint FROM job_states WHERE job_id BETWEEN {} AND {}",
        job_id(&first.to_string()),
        job_id(&last.to_string())
    );
    Ok(connect(database).await?.query_one(&sql, &[]).await?.get(0))
}
