//! Two providers and two customers, whose resources arbitrary messages name.

use milepost::progress::{EventKind, JobState, Progress, Weights};
use milepost_client::pb::{self, ApiKeyScope, MetadataKind, watch_events_request::Start};
use uuid::Uuid;

use super::generate::{Known, Random};
use crate::support::{PASSWORD, TestServer, User, complete, info, registration, step};

/// The name of each caller, and its secret if it has one.
pub type Callers = Vec<(&'static str, Option<String>)>;

pub struct World {
    pub callers: Callers,
    pub known: Known,
    /// Both providers with API keys whose ids no message contains, so that no call
    /// expires them.
    checkers: [User; 2],
}

impl World {
    pub async fn new(server: &TestServer, random: &mut Random) -> Self {
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        let (mut other, other_customer) = (server.provider().await, server.customer().await);
        other.configuration(&[("load", 1)]).await;
        let foreign = other.job(&other_customer).await;
        let mut request = registration("1.0.0", &[("load", 3), ("report", 1)]);
        request.steps[0].metadata = vec![
            declared("mean", MetadataKind::Number),
            declared("source", MetadataKind::Link),
            declared("comment", MetadataKind::Text),
        ];
        let configuration = provider.register(request).await;
        let mut jobs = Vec::new();
        let mut ids = vec![String::new(), random.uuid(), random.uuid(), configuration.id];
        for job in 0..3 {
            let job_of = provider.job(&customer).await;
            let mut events = vec![step("load"), info("x")];
            events.extend((job == 0).then(complete));
            ids.extend(events.iter().map(|event| event.id.clone()));
            provider.append(&job_of, events).await;
            jobs.push(job_of);
        }
        let mut watch = provider.watch_from(&jobs[1], Some(Start::FromNow(pb::FromNow {}))).await;
        watch.caught_up().await;
        let manager =
            key(&mut provider, &[ApiKeyScope::Read, ApiKeyScope::Append, ApiKeyScope::Manage]).await;
        let token = watch_token(&mut provider, &jobs[1]).await;
        let foreign_token = watch_token(&mut other, &foreign).await;
        let callers = vec![
            ("the provider's session", Some(session(server, &provider).await)),
            ("the provider's key", Some(provider.key_secret.clone())),
            ("the provider's manager", Some(manager.1)),
            ("the provider's other session", Some(session(server, &provider).await)),
            ("the customer's session", Some(session(server, &customer).await)),
            ("the customer's key", Some(customer.key_secret.clone())),
            ("a watch token", Some(token.1)),
            ("another provider's watch token", Some(foreign_token.1)),
            ("no credential", None),
            ("a malformed secret", Some("mpk_garbage".to_owned())),
        ];
        let mut known = Known::new();
        let mut add = |field, values: &[&str]| {
            known.insert(field, values.iter().map(|value| (*value).to_owned()).collect());
        };
        let new = random.uuid();
        let [first, second, third] = [0, 1, 2].map(|job: usize| &jobs[job]);
        add("job_id", &[&second.id, &third.id, &second.id, &third.id, &first.id, &foreign.id, &new]);
        let names = [&second.provider_job_id, &third.provider_job_id, &first.provider_job_id];
        add("provider_job_id", &[names[0], names[1], names[2], &foreign.provider_job_id, "new", &new]);
        let user_ids = [&customer.id, &provider.id, &other_customer.id];
        add("customer_id", &[user_ids[0], user_ids[0], user_ids[1], user_ids[2], &new]);
        add("counterpart_id", &["", user_ids[0], user_ids[1], user_ids[2], &new]);
        for tag in ["tag", "configuration_tag"] {
            add(tag, &["analysis", "analysis", "load", "report", "another", ""]);
        }
        add("step_tag", &["load", "report", "load", "", "none"]);
        for version in ["version", "configuration_version"] {
            add(version, &["", "1.0.0", "1.1.0", "2.0.0-rc.1", "1.0.0+build", "18446744073709551615.0.0"]);
        }
        let email = format!("{}@example.com", random.uuid());
        add("email", &[&provider.email, &customer.email, &email]);
        for password in ["password", "current_password", "new_password"] {
            add(password, &[PASSWORD, PASSWORD, "another horse"]);
        }
        add("api_key_id", &[&manager.0, &key(&mut provider, &[]).await.0, &new]);
        add("watch_token_id", &[&token.0, &foreign_token.0, &new]);
        add("page_token", &[""]);
        add("resume_token", &[&watch.resume_token]);
        add("paths", &["first_name", "last_name"]);
        add("key", &["mean", "source", "comment", "undeclared"]);
        add("string_value", &["https://example.com/a", "a text", ""]);
        for optional in ["provider_job_id_prefix", "provider_job_name_prefix", "note", "units", "name"] {
            add(optional, &["", "A", "%", "_\\", "new"]);
        }
        known.insert("id", ids);
        let checkers = [with_another_key(server, provider).await, with_another_key(server, other).await];
        Self { callers, known, checkers }
    }

    /// Checks every job against its log.
    pub async fn check(&mut self) -> Result<(), String> {
        for checker in &mut self.checkers {
            let mut request = pb::ListJobsRequest { page_size: 500, ..Default::default() };
            loop {
                let page =
                    checker.jobs.list_jobs(request.clone()).await.map_err(|e| e.to_string())?.into_inner();
                for job in page.jobs {
                    check(checker, &job).await?;
                }
                request.page_token = page.next_page_token;
                if request.page_token.is_empty() {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Compares the job with the state that its log gives.
async fn check(checker: &mut User, listed: &pb::Job) -> Result<(), String> {
    let by_id = Some(pb::get_job_request::Job::JobId(listed.id.clone()));
    let found = checker.jobs.get_job(pb::GetJobRequest { job: by_id }).await.map_err(|e| e.to_string())?;
    let found = found.into_inner();
    let (job, configuration) = (found.job.unwrap(), found.job_configuration.unwrap());
    let weights = Weights::new(configuration.steps.iter().map(|step| step.points));
    let mut state = JobState::pending(&weights);
    for event in checker.list(&job).await {
        let step = configuration.steps.iter().position(|step| step.tag == event.step_tag);
        let kind = match event.kind() {
            pb::EventKind::Step => EventKind::Step,
            pb::EventKind::Error => EventKind::Error,
            pb::EventKind::Info => EventKind::Info,
            pb::EventKind::Complete => EventKind::Complete,
            pb::EventKind::Close => EventKind::Close,
            pb::EventKind::Unspecified => return Err(format!("an event without a kind: {event:?}")),
        };
        state
            .apply(Uuid::nil(), kind, step, &weights)
            .map_err(|closed| format!("{closed:?} before this event: {event:?}"))?;
        let expected = expected_of(&state);
        if (event.sequence, event.status(), event.progress) != expected {
            return Err(format!("{event:?} should have {expected:?}"));
        }
    }
    let expected = expected_of(&state);
    if (job.last_sequence, job.status(), job.progress) != expected || job.closed_at.is_some() != state.closed
    {
        return Err(format!("{job:?} should have {expected:?}"));
    }
    Ok(())
}

/// The last sequence, the status and the progress as answers have them.
fn expected_of(state: &JobState) -> (i64, pb::JobStatus, Option<pb::Progress>) {
    let status = milepost::pb::JobStatus::from(state.status);
    let Progress { points_done, points_total, percent } = state.progress;
    let progress = pb::Progress { points_done, points_total, percent: percent.into() };
    (state.last_sequence, pb::JobStatus::try_from(i32::from(status)).unwrap(), Some(progress))
}

fn declared(name: &str, kind: MetadataKind) -> pb::MetadataConfiguration {
    pb::MetadataConfiguration { name: name.to_owned(), kind: kind.into(), units: String::new() }
}

/// Id and secret of a new key.
async fn key(user: &mut User, scopes: &[ApiKeyScope]) -> (String, String) {
    let scopes = scopes.iter().map(|scope| i32::from(*scope)).collect();
    let request = pb::CreateApiKeyRequest { scopes, ..Default::default() };
    let created = user.session.auth.create_api_key(request).await.unwrap().into_inner();
    (created.api_key.unwrap().id, created.secret)
}

/// Id and secret of a new watch token.
async fn watch_token(provider: &mut User, job: &pb::Job) -> (String, String) {
    let job = Some(pb::create_watch_token_request::Job::JobId(job.id.clone()));
    let request = pb::CreateWatchTokenRequest { job, ..Default::default() };
    let created = provider.auth.create_watch_token(request).await.unwrap().into_inner();
    (created.watch_token.unwrap().id, created.secret)
}

/// The secret of a new session.
async fn session(server: &TestServer, user: &User) -> String {
    // From an address without failed log-ins, since the throttle slows down log-ins
    // after many failures.
    let [.., b, c, d] = Uuid::now_v7().into_bytes();
    let clients = server.from(std::net::Ipv4Addr::new(127, b | 1, c, d | 1));
    let request = pb::LogInRequest { email: user.email.clone(), password: PASSWORD.to_owned() };
    clients.anonymous().auth.log_in(request).await.unwrap().into_inner().session.unwrap().secret
}

/// The same user with another key.
async fn with_another_key(server: &TestServer, mut user: User) -> User {
    let (_, secret) = key(&mut user, &[]).await;
    User { key: server.with_secret(secret), ..user }
}
