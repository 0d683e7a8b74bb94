//! Calls whose answers nobody waits for, and connections and credentials without end.

use std::time::Duration;

use futures_util::future::join_all;
use milepost_client::pb::{self, get_job_request, list_events_request};
use milepost_testing::User;
use tokio::time::timeout;
use tonic::Code;

use super::{Hostile, requests};
use crate::clients::UserClient;

/// Calls at once, each of which is given up within some time.
const AT_ONCE: usize = 12;
const GIVEN_UP_MS: u64 = 150;
const PAUSE_MS: u64 = 1_000;
/// New connections at once.
const CONNECTIONS: usize = 16;

/// Lists a long log in the largest pages, and leaves most of these calls before they are
/// answered.
pub async fn abandon_calls(mut hostile: Hostile) {
    while let Some(job) = hostile.create_job().await {
        let mut appended = hostile.append(requests::append(&job, requests::large_events(true))).await;
        while !hostile.is_finishing() && !matches!(appended, Err(Code::NotFound)) {
            let limits: Vec<_> =
                (0..AT_ONCE).map(|_| Duration::from_millis(hostile.random.u64(..GIVEN_UP_MS))).collect();
            let lists = limits.into_iter().map(|limit| timeout(limit, list(&hostile, &job)));
            let given_up = join_all(lists).await.into_iter().filter(Result::is_err).count();
            hostile.count(|answers| answers.unanswered += given_up as u64);
            hostile.pause(PAUSE_MS).await;
            // Says whether the job is still there.
            appended = hostile.append(requests::append(&job, vec![requests::event()])).await;
        }
    }
}

async fn list(hostile: &Hostile, job: &str) {
    let request = pb::ListEventsRequest {
        job: Some(list_events_request::Job::JobId(job.to_owned())),
        page_size: 500,
        ..Default::default()
    };
    let _page = hostile.call(hostile.client.events.clone().list_events(request)).await;
}

/// Opens connections, and lists its jobs over each of them.
pub async fn open_connections(mut hostile: Hostile) {
    while !hostile.is_finishing() {
        let user = &hostile.context.hostile;
        let clients: Vec<_> =
            (0..CONNECTIONS).map(|_| hostile.context.client(hostile.replica, user)).collect();
        join_all(clients.iter().map(|client| list_jobs(&hostile, client.clone()))).await;
        hostile.pause(PAUSE_MS * 4).await;
        drop(clients);
    }
}

async fn list_jobs(hostile: &Hostile, mut client: UserClient) {
    let request = pb::ListJobsRequest { page_size: 500, ..Default::default() };
    let _page = hostile.call(client.jobs.list_jobs(request)).await;
}

/// Makes watch tokens and API keys, and uses each of them once.
pub async fn make_credentials(mut hostile: Hostile) {
    let auth = hostile.client.auth.clone();
    while let Some(job) = hostile.create_job().await {
        for _ in 0..20 {
            if hostile.is_finishing() {
                return;
            }
            let token = pb::CreateWatchTokenRequest {
                job: Some(pb::create_watch_token_request::Job::JobId(job.clone())),
                ..Default::default()
            };
            let made = if hostile.random.bool() {
                let key = pb::CreateApiKeyRequest::default();
                hostile.call(auth.clone().create_api_key(key)).await.map(|made| made.secret)
            } else {
                hostile.call(auth.clone().create_watch_token(token)).await.map(|made| made.secret)
            };
            if let Ok(secret) = made {
                let mut client = client(&hostile, secret);
                let request = pb::GetJobRequest { job: Some(get_job_request::Job::JobId(job.clone())) };
                let _job = hostile.call(client.jobs.get_job(request)).await;
            }
            hostile.pause(PAUSE_MS).await;
        }
    }
}

fn client(hostile: &Hostile, secret: String) -> UserClient {
    let user = User { key_secret: secret, ..hostile.context.hostile.clone() };
    hostile.context.client(hostile.replica, &user)
}
