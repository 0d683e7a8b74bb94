//! What operators use: health, reflection, signals and restarts.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb;
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

fn health_request(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

/// Waits until the health of a service is `wanted`.
async fn wait_for_health(server: &TestServer, service: &str, wanted: ServingStatus) {
    let mut client = HealthClient::new(server.channel.clone());
    let mut statuses = client.watch(health_request(service)).await.unwrap().into_inner();
    within_timeout(format!("{service:?} to be {wanted:?}"), async {
        while statuses.next().await.expect("the health stream stays open").unwrap().status() != wanted {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_served_for_every_service_and_for_liveness() {
    let server = TestServer::start().await;
    for service in SERVICES.into_iter().chain(["", "liveness"]) {
        wait_for_health(&server, service, ServingStatus::Serving).await;
    }
    let unknown =
        HealthClient::new(server.channel.clone()).check(health_request("nonsense")).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn during_an_outage_a_server_is_alive_but_not_ready() {
    let server = TestServer::start().await;
    wait_for_health(&server, "", ServingStatus::Serving).await;
    server.database.make_unavailable().await;
    wait_for_health(&server, "", ServingStatus::NotServing).await;
    wait_for_health(&server, "milepost.v1.EventService", ServingStatus::NotServing).await;
    wait_for_health(&server, "liveness", ServingStatus::Serving).await;
    server.database.make_available().await;
    wait_for_health(&server, "", ServingStatus::Serving).await;
}

/// The services that reflection lists. The two versions of the protocol differ only in
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
async fn reflection_describes_the_messages_of_error_details() {
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
async fn every_response_carries_a_request_id() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let answered = user.auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap();
    assert!(answered.metadata().contains_key("x-request-id"));
    let refused = server.anonymous().auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap_err();
    assert!(refused.metadata().contains_key("x-request-id"));
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sigterm_watches_end_with_draining_and_the_exit_code_is_0() {
    let mut server = ServerProcess::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [step("load")]).await;
    let mut watch = customer.watch(&job).await;
    watch.caught_up().await;

    server.terminate();
    let last = watch.next().await.unwrap();
    let Some(pb::watch_events_response::Message::End(end)) = last else { panic!("{last:?}") };
    assert_eq!(end.reason(), pb::WatchEndReason::Draining);
    let status = watch.next().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(server.exit().await.code(), Some(0));

    // After a restart, the watch resumes with its token.
    server.restart().await;
    let start = pb::watch_events_request::Start::ResumeToken(watch.resume_token);
    let watch = customer.watch_from(&job, Some(start)).await;
    provider.append(&job, [complete()]).await;
    let watched = watch.read_to_end().await;
    assert_eq!(watched.events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sigterm_health_becomes_not_serving_first_and_calls_in_flight_finish() {
    let database = TestDatabase::migrated().await;
    let mut server = ServerProcess::on(&database).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let mut client = HealthClient::new(server.other_clients().channel);
    let mut statuses = client.watch(health_request("")).await.unwrap().into_inner();
    within_timeout("readiness", async {
        while statuses.next().await.expect("the health stream stays open").unwrap().status()
            != ServingStatus::Serving
        {}
    })
    .await;
    let mut locker = database.connect().await;
    let lock = format!("BEGIN; SELECT 1 FROM jobs WHERE id = '{}' FOR UPDATE", job.id);
    locker.batch_execute(&lock).await.unwrap();
    let appending = tokio::spawn(async move { provider.try_append(&job, [info("in flight")]).await });
    within_timeout("an append that waits for the lock", async {
        while database.waiting_for_locks().await.is_empty() {}
    })
    .await;

    server.terminate();
    let update =
        within_timeout("a change of health", statuses.next()).await.expect("the health stream stays open");
    assert_eq!(update.expect("health changes before the stream ends").status(), ServingStatus::NotServing);
    // Longer than the drain of a server without calls takes.
    let ended = timeout(Duration::from_secs(3), server.exit()).await;
    assert!(ended.is_err(), "the server exited with a call in flight: {ended:?}");
    locker.batch_execute("COMMIT").await.unwrap();
    let appended = within_timeout("the answer", appending).await.unwrap().unwrap();
    assert_eq!(appended[0].sequence, 1);
    assert_eq!(server.exit().await.code(), Some(0));
    assert!(!server.log().contains("deadline passed"), "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_of_a_server_and_its_embedded_postgres_logs_no_warning() {
    let mut server = ServerProcess::start().await;
    server.logged("the database answers", 1).await;
    server.terminate();
    assert_eq!(server.exit().await.code(), Some(0));
    let log = server.log();
    assert!(log.contains("draining") && !log.contains("WARN") && !log.contains("ERROR"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_sigkill_a_restarted_server_has_all_acknowledged_events() {
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
async fn an_embedded_postgres_that_is_killed_is_restarted() {
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
