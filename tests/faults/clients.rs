//! The users of the load, and their clients.

use std::{net::SocketAddr, time::Duration};

use milepost_client::pb::{
    self, auth_service_client::AuthServiceClient, event_service_client::EventServiceClient,
    job_service_client::JobServiceClient,
};
use tonic::{
    Request, Status,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

pub const PASSWORD: &str = "correct horse battery";
/// HTTP/2 window of a slow client, in bytes: while it does not read, the server can send it
/// no more than this.
const SMALL_WINDOW: u32 = 64 * 1024;
/// HTTP/2 window of a connection that users share, in bytes: more than all of its streams
/// have, so that only the unread streams stand still.
const SHARED_WINDOW: u32 = 16 * 1024 * 1024;

#[derive(Clone)]
pub struct Bearer(String);

impl Bearer {
    pub fn new(secret: &str) -> Self {
        Self(secret.to_owned())
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.0).parse().unwrap());
        Ok(request)
    }
}

pub type Service = InterceptedService<Channel, Bearer>;

#[derive(Clone)]
pub struct User {
    pub id: String,
    pub email: String,
    /// Of an API key with all scopes that the user's role may have.
    pub secret: String,
}

/// One user's generated clients, over one connection to one replica.
#[derive(Clone)]
pub struct UserClient {
    pub replica: usize,
    pub events: EventServiceClient<Service>,
    pub jobs: JobServiceClient<Service>,
}

impl UserClient {
    pub fn new(replica: usize, channel: Channel, user: &User) -> Self {
        let service = InterceptedService::new(channel, Bearer::new(&user.secret));
        let (events, jobs) = (EventServiceClient::new(service.clone()), JobServiceClient::new(service));
        Self { replica, events, jobs }
    }

    /// Over a connection to each replica that may be shared with other users.
    pub fn over(channels: &[Channel; 2], user: &User) -> [Self; 2] {
        [0, 1].map(|replica| Self::new(replica, channels[replica].clone(), user))
    }
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect_timeout(Duration::from_secs(1))
}

/// A connection to a server, made by its first call.
pub fn channel(address: SocketAddr) -> Channel {
    endpoint(address).connect_lazy()
}

/// The same with small windows.
pub fn slow_channel(address: SocketAddr) -> Channel {
    endpoint(address)
        .initial_stream_window_size(SMALL_WINDOW)
        .initial_connection_window_size(SMALL_WINDOW)
        .connect_lazy()
}

/// The same as a gateway makes it, which sends the calls of many users over one connection.
pub fn shared_channel(address: SocketAddr) -> Channel {
    endpoint(address)
        .initial_stream_window_size(SMALL_WINDOW)
        .initial_connection_window_size(SHARED_WINDOW)
        .connect_lazy()
}

pub fn service(address: SocketAddr, secret: &str) -> Service {
    InterceptedService::new(channel(address), Bearer::new(secret))
}

pub async fn sign_up(address: SocketAddr, role: pb::UserRole) -> User {
    let email = format!("{}@example.com", Uuid::now_v7());
    let request = pb::SignUpRequest {
        role: role.into(),
        email: email.clone(),
        password: PASSWORD.to_owned(),
        first_name: "Ada".to_owned(),
        last_name: "Lovelace".to_owned(),
    };
    let mut unauthenticated = AuthServiceClient::new(channel(address));
    let signed_up = unauthenticated.sign_up(request).await.unwrap().into_inner();
    let session = service(address, &signed_up.session.unwrap().secret);
    let mut scopes = vec![pb::ApiKeyScope::Read.into(), pb::ApiKeyScope::Manage.into()];
    scopes.extend((role == pb::UserRole::Provider).then_some(i32::from(pb::ApiKeyScope::Append)));
    let request = pb::CreateApiKeyRequest { scopes, ..Default::default() };
    let key = AuthServiceClient::new(session).create_api_key(request).await.unwrap().into_inner();
    User { id: signed_up.user.unwrap().id, email, secret: key.secret }
}
