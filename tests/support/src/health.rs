//! The health service of a server.

use futures_util::StreamExt as _;
use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{Clients, within_timeout};

impl Clients {
    pub fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel.clone())
    }

    /// Waits until the health of a service is `wanted`; that of the service "" is the
    /// readiness of the server.
    pub async fn wait_for_health(&self, service: &str, wanted: ServingStatus) {
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut statuses = self.health().watch(request).await.unwrap().into_inner();
        within_timeout(format!("{service:?} to be {wanted:?}"), async {
            while statuses.next().await.expect("the health stream stays open").unwrap().status() != wanted {}
        })
        .await;
    }
}
