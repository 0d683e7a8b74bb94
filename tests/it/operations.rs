//! What an operator meets: health, reflection, signals, restarts.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost::pb;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::{v1, v1alpha};

use crate::support::{ServerProcess, TestDatabase, TestServer, complete, info, step, within_timeout};

const SERVICES: [&str; 4] = [
    "milepost.v1.AuthService",
    "milepost.v1.ConfigurationService",
    "milepost.v1.EventService",
    "milepost.v1.JobService",
];

fn asked(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

/// Waits until a service's health is that.
async fn wait_for_health(server: &TestServer, service: &str, wanted: ServingStatus) {
    let mut client = HealthClient::new(server.channel.clone());
    let mut statuses = client.watch(asked(service)).await.unwrap().into_inner();
    within_timeout(format!("{service:?} to be {wanted:?}"), async {
        while statuses.next().await.expect("the stream goes on").unwrap().status() != wanted {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_of_everything_is_served() {
    let server = TestServer::start().await;
    for service in SERVICES.into_iter().chain(["", "liveness"]) {
        wait_for_health(&server, service, ServingStatus::Serving).await;
    }
    let unknown = HealthClient::new(server.channel.clone()).check(asked("nonsense")).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_a_server_is_alive_but_not_ready() {
    let server = TestServer::start().await;
    wait_for_health(&server, "", ServingStatus::Serving).await;
    server.database.take_away().await;
    wait_for_health(&server, "", ServingStatus::NotServing).await;
    wait_for_health(&server, "milepost.v1.EventService", ServingStatus::NotServing).await;
    wait_for_health(&server, "liveness", ServingStatus::Serving).await;
    server.database.bring_back().await;
    wait_for_health(&server, "", ServingStatus::Serving).await;
}

/// The services that reflection lists; the two versions differ in nothing but
/// their package.
macro_rules! listed_services {
    ($version:ident, $channel:expr) => {{
        use $version::{
            server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
            server_reflection_response::MessageResponse,
        };
        let request = $version::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = ServerReflectionClient::new($channel);
        let mut responses =
            client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        match responses.message().await.unwrap().unwrap().message_response.unwrap() {
            MessageResponse::ListServicesResponse(list) => {
                list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        }
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn both_versions_of_reflection_list_the_services() {
    let server = TestServer::start().await;
    let v1 = listed_services!(v1, server.channel.clone());
    let v1alpha = listed_services!(v1alpha, server.channel.clone());
    for service in SERVICES.into_iter().chain(["grpc.health.v1.Health"]) {
        assert!(v1.iter().any(|name| name == service), "{service} in {v1:?}");
        assert!(v1alpha.iter().any(|name| name == service), "{service} in {v1alpha:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_knows_the_details_of_errors() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let server = TestServer::start().await;
    let mut client = ServerReflectionClient::new(server.channel.clone());
    for detail in
        ["ErrorInfo", "BadRequest", "PreconditionFailure", "ResourceInfo", "RetryInfo", "QuotaFailure"]
    {
        let symbol = MessageRequest::FileContainingSymbol(format!("google.rpc.{detail}"));
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(symbol) };
        let mut responses =
            client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let response = responses.message().await.unwrap().unwrap().message_response.unwrap();
        assert!(matches!(response, MessageResponse::FileDescriptorResponse(_)), "{detail}: {response:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_carries_a_request_id() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let good = user.auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap();
    assert!(good.metadata().contains_key("x-request-id"));
    let refused = server.anonymous().auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap_err();
    assert!(refused.metadata().contains_key("x-request-id"));
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sigterm_watchers_are_told_and_the_exit_is_clean() {
    let mut server = ServerProcess::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [step("load")]).await;
    let mut watch = customer.watch(&job).await;
    watch.caught_up().await;

    server.terminate().await;
    let last = watch.next().await.unwrap();
    let Some(pb::watch_events_response::Message::End(end)) = last else { panic!("{last:?}") };
    assert_eq!(end.reason(), pb::WatchEndReason::Draining);
    let status = watch.next().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(server.exit().await.code(), Some(0));

    // What it served is there for the next one, and the watch goes on.
    server.restart().await;
    let start = pb::watch_events_request::Start::ResumeToken(watch.resume_token);
    let watch = customer.watch_from(&job, Some(start)).await;
    provider.append(&job, [complete()]).await;
    let film = watch.film().await;
    assert_eq!(film.events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sigterm_health_says_so_first_and_calls_under_way_are_finished() {
    let database = TestDatabase::migrated().await;
    let mut server = ServerProcess::on(&database).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let mut client = HealthClient::new(server.other_clients().channel);
    let mut statuses = client.watch(asked("")).await.unwrap().into_inner();
    within_timeout("readiness", async {
        while statuses.next().await.expect("the stream goes on").unwrap().status() != ServingStatus::Serving {
        }
    })
    .await;
    let mut holder = database.connect().await;
    let hold = format!("BEGIN; SELECT 1 FROM jobs WHERE id = '{}' FOR UPDATE", job.id);
    holder.batch_execute(&hold).await.unwrap();
    let appending = tokio::spawn(async move { provider.try_append(&job, [info("under way")]).await });
    within_timeout("an append that waits", async { while database.waiting_for_locks().await.is_empty() {} })
        .await;

    server.terminate().await;
    let told = within_timeout("a word about it", statuses.next()).await.expect("the stream goes on");
    assert_eq!(told.expect("it is told before the stream ends").status(), ServingStatus::NotServing);
    // Longer than it would stay for nobody.
    let ended = timeout(Duration::from_secs(3), server.exit()).await;
    assert!(ended.is_err(), "it went with a call under way: {ended:?}");
    holder.batch_execute("COMMIT").await.unwrap();
    let appended = within_timeout("the answer", appending).await.unwrap().unwrap();
    assert_eq!(appended[0].sequence, 1);
    assert_eq!(server.exit().await.code(), Some(0));
    assert!(!server.log().contains("deadline passed"), "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_the_next_start_takes_over_what_it_finds() {
    let mut server = ServerProcess::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let batch = [info("started"), step("load")];
    let appended = provider.append(&job, batch.clone()).await;

    server.kill().await;
    server.restart().await;
    let again = provider.append(&job, batch).await;
    assert!(again.iter().all(|event| event.existed));
    assert_eq!(again.last().unwrap().sequence, appended.last().unwrap().sequence);
    provider.append(&job, [complete()]).await;
    assert_eq!(provider.list(&job).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_is_killed_is_started_again() {
    let server = ServerProcess::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let batch = [info("started")];
    provider.append(&job, batch.clone()).await;
    server.kill_postgres().await;
    server.ready().await;
    assert!(provider.append(&job, batch).await[0].existed);
}
