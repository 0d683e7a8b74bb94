//! `GetJob` and `GetCurrentUser`, compared with a method that does nothing.

use milepost_client::{
    Client,
    pb::{GetCurrentUserRequest, GetJobRequest, get_job_request},
};
use tonic::{client::Grpc, transport::Channel, transport::Endpoint};

use super::Row;
use crate::{
    Result,
    accounts::{self, Accounts},
    empty,
    harness::{Harness, serve},
    load::{Worker, drive},
    report::Outcome,
};

const CONNECTIONS: usize = 8;
/// Calls in flight on each connection.
const IN_FLIGHT: usize = 32;
const JOBS: usize = 1_000;

enum Caller {
    GetJob { client: Client, jobs: Vec<String>, next: usize },
    GetCurrentUser { client: Client },
    Empty(Box<Grpc<Channel>>),
}

impl Worker for Caller {
    async fn work(&mut self) -> Result<()> {
        match self {
            Self::GetJob { client, jobs, next } => {
                *next = (*next + 1) % jobs.len();
                let job = Some(get_job_request::Job::JobId(jobs[*next].clone()));
                let answer = client.jobs().get_job(GetJobRequest { job }).await?.into_inner();
                if answer.job.is_none_or(|job| job.id != jobs[*next]) {
                    return Err("GetJob answered with another job".into());
                }
            }
            Self::GetCurrentUser { client } => {
                let answer = client.auth().get_current_user(GetCurrentUserRequest {}).await?.into_inner();
                answer.user.ok_or("GetCurrentUser answered without a user")?;
            }
            Self::Empty(grpc) => empty::call(grpc).await?,
        }
        Ok(())
    }
}

pub(super) async fn measure(harness: &Harness, row: Row) -> Result<Vec<Outcome>> {
    let server = serve(&harness.database().await?).await;
    let accounts = Accounts::create(server.address).await;
    let jobs = accounts.create_jobs(server.address, JOBS).await?;
    let clients = accounts::connect(server.address, &accounts.customer, CONNECTIONS).await?;
    let empty = harness.empty().await?;
    let endpoint = Endpoint::from_shared(format!("http://{}", empty.address))?;
    let mut channels = Vec::new();
    for _ in 0..CONNECTIONS {
        channels.push(endpoint.connect().await?);
    }
    let milepost_caller = |number: usize| {
        let client = clients[number % CONNECTIONS].clone();
        if matches!(row, Row::GetJob) {
            Caller::GetJob { client, jobs: jobs.clone(), next: number * 37 % JOBS }
        } else {
            Caller::GetCurrentUser { client }
        }
    };
    let empty_caller =
        |number: usize| Caller::Empty(Box::new(Grpc::new(channels[number % CONNECTIONS].clone())));
    let mut outcome = Outcome::new(row.name(), "calls/s").compared_with("empty method", None);
    for _ in 0..harness.options.rounds {
        harness.checkpoint().await?;
        let callers = (0..CONNECTIONS * IN_FLIGHT).map(milepost_caller).collect();
        outcome.add_milepost(drive(callers, &harness.options).await?.1.rate(1.0));
        let callers = (0..CONNECTIONS * IN_FLIGHT).map(empty_caller).collect();
        outcome.add_peer(drive(callers, &harness.options).await?.1.rate(1.0));
    }
    Ok(vec![outcome])
}
