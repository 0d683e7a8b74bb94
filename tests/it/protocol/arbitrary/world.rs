//! Two providers and two customers, whose resources arbitrary messages name.

use milepost_client::pb::{self, ApiKeyScope, MetadataKind, watch_events_request::Start};
use uuid::Uuid;

use super::generate::{Known, Random};
use crate::support::{PASSWORD, Replay, TestServer, User, complete, info, registration, step};

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
            provider.create_key(&[ApiKeyScope::Read, ApiKeyScope::Append, ApiKeyScope::Manage]).await;
        let token = provider.create_watch_token(&jobs[1]).await;
        let foreign_token = other.create_watch_token(&foreign).await;
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
        let codes = [customer.customer_code().await, other_customer.customer_code().await];
        add("customer_code", &[&codes[0], &codes[0].to_lowercase(), &codes[1], "0000000000", ""]);
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
        add("api_key_id", &[&manager.0, &provider.create_key(&[]).await.0, &new]);
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
    let steps: Vec<(String, i64)> =
        configuration.steps.into_iter().map(|step| (step.tag, step.points)).collect();
    let (mut replay, mut last_sequence) = (Replay::new(&steps), 0);
    for event in checker.list(&job).await {
        if replay.closed || event.kind() == pb::EventKind::Unspecified {
            return Err(format!("the job has {event:?}; it is closed before: {}", replay.closed));
        }
        replay.apply(event.kind(), &event.step_tag, event.step_percent);
        last_sequence += 1;
        let expected = (last_sequence, replay.status, Some(replay.progress));
        if (event.sequence, event.status(), event.progress) != expected {
            return Err(format!("{event:?} should have {expected:?}"));
        }
    }
    let expected = (last_sequence, replay.status, Some(replay.progress));
    if (job.last_sequence, job.status(), job.progress) != expected || job.closed_at.is_some() != replay.closed
    {
        return Err(format!("{job:?} should have {expected:?}"));
    }
    if !replay.has_steps(&found.steps) {
        return Err(format!("{job:?} has wrong steps: {:?}", found.steps));
    }
    Ok(())
}

fn declared(name: &str, kind: MetadataKind) -> pb::MetadataConfiguration {
    pb::MetadataConfiguration { name: name.to_owned(), kind: kind.into(), ..Default::default() }
}

/// The secret of a new session.
async fn session(server: &TestServer, user: &User) -> String {
    // From an address without failed log-ins, since the throttle slows down log-ins
    // after many failures.
    let [.., b, c, d] = Uuid::now_v7().into_bytes();
    let clients = server.from(std::net::Ipv4Addr::new(127, b | 1, c, d | 1));
    clients.log_in(user).await
}

/// The same user with another key.
async fn with_another_key(server: &TestServer, mut user: User) -> User {
    let (_, secret) = user.create_key(&[]).await;
    User { key: server.with_secret(secret), ..user }
}
