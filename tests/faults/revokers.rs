//! Revokers: each makes a session, an API key or a watch token, uses it on both servers by
//! calls and open watches, ends it, and goes on trying to use it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use milepost_client::pb::{
    self, WatchEndReason,
    watch_events_request::{Scope, Start},
    watch_events_response::Message,
};
use milepost_testing::PASSWORD;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Response, Status};
use uuid::Uuid;

use crate::{
    context::{Context, configuration_tag},
    history::{
        CredentialEnd, CredentialRecord, CredentialStream, CredentialStreamEnd, CredentialUse, Moment,
        UseOutcome,
    },
};

/// How long a client waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(3);
/// For so long after its end a credential is still used: longer than the checker allows.
const AFTER_END: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug)]
enum Kind {
    Session,
    ApiKey,
    WatchToken,
}

struct Credential {
    kind: Kind,
    id: String,
    secret: String,
}

/// What the tasks found that use a credential on one server.
#[derive(Default)]
struct Findings {
    uses: Vec<CredentialUse>,
    streams: Vec<CredentialStream>,
}

/// Makes and ends one credential after the other until the load finishes.
pub async fn revoke(context: Arc<Context>) {
    let mut random = context.random();
    let job = create_job(&context).await;
    while !context.is_finishing() {
        let created_from = context.now();
        let Ok(credential) = create(&context, &mut random, &job).await else {
            context.pause(&mut random, 200).await;
            continue;
        };
        let created_by = context.now();
        let stop = CancellationToken::new();
        let mut users = JoinSet::new();
        for replica in 0..2 {
            let (context, stop) = (Arc::clone(&context), stop.clone());
            let (random, secret, job) = (random.fork(), credential.secret.clone(), job.clone());
            users.spawn(call(Arc::clone(&context), replica, secret.clone(), random, stop.clone()));
            users.spawn(watch(context, replica, secret, job, stop));
        }
        tokio::time::sleep(Duration::from_millis(random.u64(100..3_000))).await;
        append(&context, &mut random, &job).await;
        let end = end(&context, &mut random, &credential).await;
        let until = context.now() + AFTER_END;
        while context.now() < until {
            append(&context, &mut random, &job).await;
            tokio::time::sleep(Duration::from_millis(random.u64(200..1_000))).await;
        }
        stop.cancel();
        let mut record = CredentialRecord {
            name: format!("{:?} {}", credential.kind, credential.id),
            created_from,
            created_by,
            end,
            uses: Vec::new(),
            streams: Vec::new(),
        };
        while let Some(found) = users.join_next().await {
            let Findings { uses, streams } = found.unwrap();
            record.uses.extend(uses);
            record.streams.extend(streams);
        }
        context.history.lock().unwrap().credentials.push(record);
    }
}

/// The id of a new job of the revoker.
async fn create_job(context: &Context) -> String {
    let request = pb::CreateJobRequest {
        provider_job_id: Uuid::now_v7().to_string(),
        customer: Some(pb::create_job_request::Customer::CustomerId(context.revoked_from.id.clone())),
        configuration_tag: configuration_tag(0),
        configuration_version: String::new(),
        provider_job_name: "A job to watch".to_owned(),
        max_silence: None,
        labels: BTreeMap::new(),
    };
    loop {
        let created = context.client(0, &context.revoker).jobs.create_job(request.clone()).await;
        match created {
            Ok(created) => return created.into_inner().job.expect("the response has a job").id,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Gives the watches an event to receive. A failure is no matter.
async fn append(context: &Context, random: &mut fastrand::Rng, job: &str) {
    let event = pb::NewEvent {
        kind: pb::EventKind::Info.into(),
        name: "for watches".to_owned(),
        ..Default::default()
    };
    let request = pb::AppendEventsRequest {
        job: Some(pb::append_events_request::Job::JobId(job.to_owned())),
        expected_sequence: None,
        events: vec![event],
    };
    let mut client = context.client(random.usize(..2), &context.revoker).events.clone();
    let _ = within(client.append_events(request)).await;
}

async fn within<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    let timed = tokio::time::timeout(TIMEOUT, call).await;
    timed.unwrap_or_else(|_| Err(Status::unavailable("no answer"))).map(Response::into_inner)
}

async fn create(context: &Context, random: &mut fastrand::Rng, job: &str) -> Result<Credential, Status> {
    let replica = random.usize(..2);
    let mut auth = context.caller(replica, &context.revoker.key_secret).auth;
    let kind = [Kind::Session, Kind::ApiKey, Kind::WatchToken][random.usize(..3)];
    let (id, secret) = match kind {
        Kind::Session => {
            let email = context.revoker.email.clone();
            let request = pb::LogInRequest { email, password: PASSWORD.to_owned() };
            let session = within(auth.log_in(request)).await?.session.expect("a session");
            (session.id, session.secret)
        }
        Kind::ApiKey => {
            let created = within(auth.create_api_key(pb::CreateApiKeyRequest::default())).await?;
            (created.api_key.expect("a key").id, created.secret)
        }
        Kind::WatchToken => {
            let request = pb::CreateWatchTokenRequest {
                job: Some(pb::create_watch_token_request::Job::JobId(job.to_owned())),
                ..Default::default()
            };
            let created = within(auth.create_watch_token(request)).await?;
            (created.watch_token.expect("a token").id, created.secret)
        }
    };
    Ok(Credential { kind, id, secret })
}

/// Ends a credential, with retries until that is answered. None if it does not exist, which
/// is so if its creation was lost.
async fn end(
    context: &Context,
    random: &mut fastrand::Rng,
    credential: &Credential,
) -> Option<CredentialEnd> {
    let sent_at = context.now();
    let mut is_first = true;
    loop {
        let replica = random.usize(..2);
        let ended = end_once(context, replica, credential).await;
        let acknowledged_at = context.now();
        let code = match ended {
            Ok(()) => return Some(CredentialEnd { sent_at, acknowledged_at, by: Some(replica) }),
            Err(status) => status.code(),
        };
        match code {
            // An earlier attempt ended it, whose answer was lost.
            Code::Unauthenticated | Code::FailedPrecondition if !is_first => {
                return Some(CredentialEnd { sent_at, acknowledged_at, by: None });
            }
            Code::Unauthenticated | Code::FailedPrecondition | Code::NotFound => return None,
            _ => is_first = false,
        }
        tokio::time::sleep(Duration::from_millis(random.u64(20..200))).await;
    }
}

async fn end_once(context: &Context, replica: usize, credential: &Credential) -> Result<(), Status> {
    let mut auth = context.caller(replica, &context.revoker.key_secret).auth;
    match credential.kind {
        Kind::Session => {
            let mut auth = context.caller(replica, &credential.secret).auth;
            within(auth.log_out(pb::LogOutRequest {})).await.map(drop)
        }
        Kind::ApiKey => {
            let request = pb::ExpireApiKeyRequest { api_key_id: credential.id.clone() };
            within(auth.expire_api_key(request)).await.map(drop)
        }
        Kind::WatchToken => {
            let request = pb::ExpireWatchTokenRequest { watch_token_id: credential.id.clone() };
            within(auth.expire_watch_token(request)).await.map(drop)
        }
    }
}

fn outcome<T>(answer: &Result<T, Status>) -> UseOutcome {
    match answer {
        Ok(_) => UseOutcome::Accepted,
        Err(status) if status.code() == Code::Unauthenticated => UseOutcome::Refused,
        Err(_) => UseOutcome::Unknown,
    }
}

/// Repeats a call with a credential, whether it is refused or not.
async fn call(
    context: Arc<Context>,
    replica: usize,
    secret: String,
    mut random: fastrand::Rng,
    stop: CancellationToken,
) -> Findings {
    let mut auth = context.caller(replica, &secret).auth;
    let mut findings = Findings::default();
    while !stop.is_cancelled() {
        let sent_at = context.now();
        let answer = within(auth.get_current_user(pb::GetCurrentUserRequest {})).await;
        let (outcome, ended_at) = (outcome(&answer), context.now());
        findings.uses.push(CredentialUse { replica, sent_at, ended_at, outcome });
        tokio::time::sleep(Duration::from_millis(random.u64(50..300))).await;
    }
    findings
}

/// Watches a job with a credential, again and again, until that is refused.
async fn watch(
    context: Arc<Context>,
    replica: usize,
    secret: String,
    job: String,
    stop: CancellationToken,
) -> Findings {
    let mut client = context.caller(replica, &secret).events;
    let mut findings = Findings::default();
    while !stop.is_cancelled() {
        let request = pb::WatchEventsRequest {
            scope: Some(Scope::JobId(job.clone())),
            start: Some(Start::FromNow(pb::FromNow {})),
            heartbeat_interval: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
            ..Default::default()
        };
        let sent_at = context.now();
        let opened = within(client.watch_events(request)).await;
        let (outcome, ended_at) = (outcome(&opened), context.now());
        findings.uses.push(CredentialUse { replica, sent_at, ended_at, outcome });
        match opened {
            Ok(messages) => {
                let mut stream =
                    CredentialStream { replica, opened_at: sent_at, last_message_at: None, end: None };
                stop.run_until_cancelled(read(&context, messages, &mut stream)).await;
                findings.streams.push(stream);
            }
            Err(status) if status.code() == Code::Unauthenticated => return findings,
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    findings
}

/// Reads a watch to its end.
async fn read(
    context: &Context,
    mut messages: tonic::Streaming<pb::WatchEventsResponse>,
    stream: &mut CredentialStream,
) {
    let mut told = None;
    loop {
        let message = messages.message().await;
        let now: Moment = context.now();
        match message {
            Ok(Some(message)) => match message.message {
                Some(Message::End(end)) => told = Some(end.reason()),
                _ => stream.last_message_at = Some(now),
            },
            Ok(None) => {
                return stream.end = Some((now, CredentialStreamEnd::Other(format!("OK after {told:?}"))));
            }
            Err(status) => {
                let end = match (status.code(), told) {
                    (Code::Unauthenticated, Some(WatchEndReason::CredentialEnded)) => {
                        CredentialStreamEnd::Told
                    }
                    (Code::Unauthenticated, _) | (_, Some(WatchEndReason::CredentialEnded)) => {
                        CredentialStreamEnd::Other(format!("{:?} after {told:?}", status.code()))
                    }
                    _ => CredentialStreamEnd::Broken,
                };
                return stream.end = Some((now, end));
            }
        }
    }
}
