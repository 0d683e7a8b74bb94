//! The health service.

use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::support::TestServer;

/// The services of milepost.
pub const SERVICES: [&str; 4] = [
    "milepost.v1.AuthService",
    "milepost.v1.ConfigurationService",
    "milepost.v1.EventService",
    "milepost.v1.JobService",
];

#[tokio::test(flavor = "multi_thread")]
async fn health_is_served_for_every_service_and_for_liveness() {
    let server = TestServer::start().await;
    for service in SERVICES.into_iter().chain(["", "liveness"]) {
        server.wait_for_health(service, ServingStatus::Serving).await;
    }
    let unknown = HealthCheckRequest { service: "nonsense".to_owned() };
    assert_eq!(server.health().check(unknown).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn during_an_outage_a_server_is_alive_but_not_ready() {
    let server = TestServer::start().await;
    server.wait_for_health("", ServingStatus::Serving).await;
    server.database.make_unavailable().await;
    server.wait_for_health("", ServingStatus::NotServing).await;
    server.wait_for_health("milepost.v1.EventService", ServingStatus::NotServing).await;
    server.wait_for_health("liveness", ServingStatus::Serving).await;
    server.database.make_available().await;
    server.wait_for_health("", ServingStatus::Serving).await;
}
