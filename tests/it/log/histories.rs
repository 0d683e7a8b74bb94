//! Commits that are lost: a standby that lacks the last of them is promoted while servers run.
//! What is left is served on, and nobody goes on from what is lost.

use std::time::Duration;

use milepost_client::pb::{
    self, ErrorReason, EventKind, JobStatus, NewEvent, WatchEndReason,
    watch_events_request::{Scope, Start},
    watch_events_response::Message,
};
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    Replication, TestServer, User, Watch, assert_refused, complete, info, named, step, within_timeout,
};

/// A server whose database was replaced by one that lacks the last commits.
struct World {
    replication: Replication,
    server: TestServer,
    provider: User,
    customer: User,
}

impl World {
    async fn start() -> Self {
        let replication = Replication::start().await;
        let server = TestServer::on(replication.database()).await;
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        provider.configuration(&[("a", 40), ("b", 20), ("c", 40)]).await;
        Self { replication, server, provider, customer }
    }

    /// From here on commits will be lost.
    async fn part(&self) {
        self.replication.in_step().await;
        self.replication.part().await;
    }

    /// The standby becomes the primary. Returns once the server has noticed.
    async fn fail_over(&mut self) {
        self.replication.stop_primary().await;
        self.replication.promote().await;
        within_timeout("the server to serve the promoted standby", async {
            while self.provider.jobs.list_jobs(pb::ListJobsRequest::default()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Appends until the server answers; what was sent is safe by its ids.
    async fn append(&mut self, job: &pb::Job, events: Vec<NewEvent>) -> Vec<pb::AppendedEvent> {
        within_timeout("the append", async {
            loop {
                match self.provider.try_append(job, events.clone()).await {
                    Ok(appended) => return appended,
                    Err(status) if status.code() == Code::Unavailable => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    Err(status) => panic!("{status:?}"),
                }
            }
        })
        .await
    }
}

/// An event that a client may send again.
fn with_id(event: NewEvent) -> NewEvent {
    NewEvent { id: Uuid::now_v7().to_string(), ..event }
}

/// Reads a watch to its end, which must be that its events are lost.
async fn assert_set_back(watch: &mut Watch) {
    loop {
        match watch.next().await.unwrap() {
            Some(Message::End(end)) => {
                assert_eq!(end.reason(), WatchEndReason::LogSetBack);
                break;
            }
            Some(Message::Heartbeat(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_refused(watch.next().await, Code::OutOfRange, ErrorReason::LogSetBack);
}

fn names(events: &[pb::Event]) -> Vec<&str> {
    events.iter().map(|event| event.name.as_str()).collect()
}

async fn watch_all_from(user: &mut User, token: &str) -> Result<Watch, tonic::Status> {
    let scope = Some(Scope::AllJobs(pb::AllJobs::default()));
    let start = Some(Start::ResumeToken(token.to_owned()));
    user.watch_by(pb::WatchEventsRequest { scope, start, ..Default::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_seen_lost_events_is_told_and_all_others_go_on() {
    let mut world = World::start().await;
    let (lost, kept) = (world.provider.job(&world.customer).await, world.provider.job(&world.customer).await);
    for job in [&lost, &kept] {
        world.provider.append(job, [named(step("a"), "kept")]).await;
    }
    world.part().await;
    let mut of_kept = world.provider.watch(&kept).await;
    of_kept.caught_up().await;
    let mut behind = world.customer.watch_all().await;
    behind.caught_up().await;
    let token_before = behind.resume_token.clone();
    drop(behind);
    world.provider.append(&lost, [named(step("b"), "lost"), named(step("c"), "lost")]).await;
    let mut of_lost = world.provider.watch(&lost).await;
    let mut of_all = world.customer.watch_all().await;
    for (watch, count) in [(&mut of_lost, 3), (&mut of_all, 4)] {
        assert_eq!(watch.caught_up().await.0.len(), count);
    }
    let token = of_all.resume_token.clone();
    let token_of_lost = of_lost.resume_token.clone();

    world.fail_over().await;
    // More events than were lost, so that the log is not shorter than it was.
    let anew = (0..10).map(|number| info(&number.to_string())).collect();
    world.append(&kept, anew).await;
    world.append(&lost, vec![named(step("a"), "anew"), info("anew"), info("anew")]).await;

    assert_set_back(&mut of_lost).await;
    assert_set_back(&mut of_all).await;
    let expected: Vec<String> = (0..10).map(|number| number.to_string()).collect();
    assert_eq!(names(&of_kept.events(10).await), expected);
    let refused = watch_all_from(&mut world.customer, &token).await;
    assert_refused(refused, Code::OutOfRange, ErrorReason::LogSetBack);
    let start = Some(Start::ResumeToken(token_of_lost));
    let request =
        pb::WatchEventsRequest { scope: Some(Scope::JobId(lost.id.clone())), start, ..Default::default() };
    assert_refused(world.provider.watch_by(request).await, Code::OutOfRange, ErrorReason::LogSetBack);
    // A token from before the lost events is good on another server too.
    let replica = world.server.replica().await;
    let mut customer = replica.same(&world.customer);
    let mut resumed = watch_all_from(&mut customer, &token_before).await.unwrap();
    assert_eq!(resumed.caught_up().await.0.len(), 13);
    assert_refused(watch_all_from(&mut customer, &token).await, Code::OutOfRange, ErrorReason::LogSetBack);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_computed_from_a_state_that_is_lost() {
    let mut world = World::start().await;
    let (open, closed) =
        (world.provider.job(&world.customer).await, world.provider.job(&world.customer).await);
    let first = world.provider.append(&open, [with_id(step("a"))]).await.remove(0);
    world.provider.append(&closed, [step("a"), step("b")]).await;
    let repeated = world.provider.job(&world.customer).await;
    world.provider.append(&repeated, [step("a")]).await;
    world.part().await;
    let last = with_id(step("c"));
    world.provider.append(&repeated, [step("b"), last.clone()]).await;
    let lost = [with_id(step("b")), with_id(complete())];
    world.provider.append(&open, [lost[0].clone()]).await;
    world.provider.append(&closed, [step("c")]).await;
    world.fail_over().await;

    // Another server takes each job to the sequence that this one remembers.
    let replica = world.server.replica().await;
    let mut other = replica.same(&world.provider);
    other.append(&open, [info("anew")]).await;
    other.append(&closed, [complete()]).await;
    // Even the last event is the same as before, behind another one.
    other.append(&repeated, [info("anew"), last]).await;

    let appended = world.append(&open, vec![with_id(step("c"))]).await;
    let progress = appended[0].progress.unwrap();
    assert_eq!((appended[0].sequence, progress.points_done, progress.percent), (3, 80, 80));
    let appended = world.append(&repeated, vec![info("after")]).await;
    assert_eq!((appended[0].sequence, appended[0].progress.unwrap().percent), (4, 80));
    let refused = world.provider.try_append(&closed, [info("late")]).await;
    assert_refused(refused, Code::FailedPrecondition, ErrorReason::JobClosed);
    assert_eq!(world.provider.get(&closed).await.status(), JobStatus::Complete);
    // What is sent again is stored where it is lost, and answered where it is not.
    let again = NewEvent { id: first.id.clone(), ..step("a") };
    let appended = world.append(&open, vec![again, lost[0].clone()]).await;
    assert_eq!(
        appended.iter().map(|event| (event.sequence, event.existed)).collect::<Vec<_>>(),
        [(1, true), (4, false)]
    );
    assert_eq!(appended[1].progress.unwrap().percent, 99);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_creation_is_lost_is_not_remembered() {
    let mut world = World::start().await;
    let kept = world.provider.job(&world.customer).await;
    world.provider.append(&kept, [info("kept")]).await;
    world.part().await;
    let request = world.provider.new_job(&world.customer);
    let lost = world.provider.jobs.create_job(request.clone()).await.unwrap().into_inner().job.unwrap();
    world.provider.append(&lost, [info("lost")]).await;
    let mut watch = world.provider.watch(&lost).await;
    assert_eq!(watch.caught_up().await.0.len(), 1);
    by_name(&mut world.provider, &lost.provider_job_id).await.unwrap();
    watch.events(1).await;
    world.fail_over().await;
    assert_set_back(&mut watch).await;

    let anew = world.provider.jobs.create_job(request).await.unwrap().into_inner();
    assert!(!anew.existed);
    assert_eq!(by_name(&mut world.provider, &lost.provider_job_id).await.unwrap(), 1);
    let refused = world.provider.try_append(&lost, [info("lost")]).await;
    assert_refused(refused, Code::NotFound, ErrorReason::ResourceNotFound);
}

/// Appends one event to a job by the provider's own id; returns the event's sequence.
async fn by_name(provider: &mut User, name: &str) -> Result<i64, tonic::Status> {
    let job = Some(pb::append_events_request::Job::ProviderJobId(name.to_owned()));
    let request = pb::AppendEventsRequest { job, events: vec![info("by name")], ..Default::default() };
    Ok(provider.events.append_events(request).await?.into_inner().events[0].sequence)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_deleted_and_created_again_is_found_by_its_name() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("a", 1)]).await;
    let request = provider.new_job(&customer);
    let name = request.provider_job_id.clone();
    let deleted = provider.jobs.create_job(request.clone()).await.unwrap().into_inner().job.unwrap();
    // The name is looked up by an append that is refused.
    let job = || Some(pb::append_events_request::Job::ProviderJobId(name.clone()));
    let unknown = pb::AppendEventsRequest { job: job(), events: vec![step("unknown")], ..Default::default() };
    provider.events.append_events(unknown).await.unwrap_err();
    server.database.execute("DELETE FROM jobs").await;
    let anew = provider.jobs.create_job(request).await.unwrap().into_inner().job.unwrap();
    assert_ne!(anew.id, deleted.id);

    assert_eq!(by_name(&mut provider, &name).await.unwrap(), 1);
    let token = pb::CreateWatchTokenRequest {
        job: Some(pb::create_watch_token_request::Job::JobId(deleted.id)),
        note: String::new(),
        lifetime: None,
    };
    let refused = provider.auth.create_watch_token(token).await;
    assert_refused(refused, Code::NotFound, ErrorReason::ResourceNotFound);
    let list = pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::ProviderJobId(name.clone())),
        ..Default::default()
    };
    assert_eq!(provider.events.list_events(list).await.unwrap().into_inner().events.len(), 1);
    let close = pb::CloseJobRequest {
        job: Some(pb::close_job_request::Job::ProviderJobId(name)),
        reason: String::new(),
    };
    assert_eq!(provider.jobs.close_job(close).await.unwrap().into_inner().job.unwrap().id, anew.id);
    assert_eq!(provider.list(&anew).await.last().unwrap().kind(), EventKind::Close);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_primary_is_not_used_again() {
    let mut world = World::start().await;
    let job = world.provider.job(&world.customer).await;
    world.provider.append(&job, [info("kept")]).await;
    world.part().await;
    // The primary runs on, as one that was frozen and woke.
    world.replication.promote().await;
    let new_connections = "SELECT pg_terminate_backend(pid)::text AS text FROM pg_stat_activity
        WHERE application_name = 'milepost'";
    within_timeout("the server to find the promoted standby", async {
        // Which of the two answers a new connection first is chance.
        while world.server.app.database.connect().await.is_err()
            || world.replication.on("b").texts(new_connections).await.is_empty()
        {
            world.replication.on("a").texts(new_connections).await;
        }
    })
    .await;
    // From then on the former primary keeps no connection from the other one, although both
    // answer.
    for _ in 0..40 {
        // On a busy machine a server may need longer for an answer than a connection waits.
        within_timeout("a connection", async { while world.server.app.database.connect().await.is_err() {} })
            .await;
    }
    for number in 0..20 {
        world.append(&job, vec![info(&number.to_string())]).await;
        world.replication.on("b").texts(new_connections).await;
    }
    let count = |server: &str| {
        let database = world.replication.on(server);
        async move { database.texts("SELECT count(*)::text AS text FROM events").await }
    };
    assert_eq!((count("a").await, count("b").await), (vec!["1".to_owned()], vec!["21".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_without_a_loss_ends_no_watch() {
    let mut world = World::start().await;
    let job = world.provider.job(&world.customer).await;
    let mut watches = [world.provider.watch(&job).await, world.customer.watch_all().await];
    world.append(&job, vec![info("before")]).await;
    for watch in &mut watches {
        assert_eq!(names(&watch.events(1).await), ["before"]);
    }
    world.part().await;
    world.fail_over().await;
    world.append(&job, vec![info("after")]).await;
    for watch in &mut watches {
        assert_eq!(names(&watch.events(1).await), ["after"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_end_if_the_log_has_become_shorter() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    provider.append(&job, [info("kept"), info("lost")]).await;
    let mut watches = [customer.clone().watch(&job).await, provider.watch_all().await];
    for watch in &mut watches {
        assert_eq!(watch.caught_up().await.0.len(), 2);
    }
    // As if an older backup had been restored.
    let restore = "BEGIN;
        ALTER TABLE events DISABLE TRIGGER events_refuse_delete;
        DELETE FROM events WHERE sequence = 2;
        ALTER TABLE events ENABLE TRIGGER events_refuse_delete;
        UPDATE job_states SET last_sequence = 1;
        UPDATE event_log SET position = position - 1;
        COMMIT";
    server.database.execute(restore).await;
    for watch in &mut watches {
        let ended = within_timeout("the end", watch.next()).await.unwrap();
        let Some(Message::End(end)) = ended else { panic!("{ended:?}") };
        assert_eq!(end.reason(), WatchEndReason::LogSetBack);
        assert_refused(watch.next().await, Code::OutOfRange, ErrorReason::LogSetBack);
    }
    provider.append(&job, [info("anew")]).await;
    let names: Vec<_> = provider.list(&job).await.into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["kept", "anew"]);
}
