//! The connections of the load's users.

use std::{
    net::SocketAddr,
    ops::{Deref, DerefMut},
    time::Duration,
};

use milepost_client::pb::{ApiKeyScope, UserRole};
use milepost_testing::{Caller, Clients, User};
use tonic::transport::Endpoint;

/// HTTP/2 window of a slow client, in bytes: while it does not read, the server can send it
/// no more than this.
const SMALL_WINDOW: u32 = 64 * 1024;
/// HTTP/2 window of a connection that users share, in bytes: more than all of its streams
/// have, so that only the unread streams stand still.
const SHARED_WINDOW: u32 = 16 * 1024 * 1024;

/// One user's generated clients, over one connection to one replica.
#[derive(Clone)]
pub struct UserClient {
    pub replica: usize,
    caller: Caller,
}

impl Deref for UserClient {
    type Target = Caller;

    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl DerefMut for UserClient {
    fn deref_mut(&mut self) -> &mut Caller {
        &mut self.caller
    }
}

impl UserClient {
    pub fn new(replica: usize, clients: &Clients, user: &User) -> Self {
        Self { replica, caller: clients.with_secret(&user.key_secret) }
    }

    /// Over a connection to each replica that may be shared with other users.
    pub fn over(shared: &[Clients; 2], user: &User) -> [Self; 2] {
        [0, 1].map(|replica| Self::new(replica, &shared[replica], user))
    }
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect_timeout(Duration::from_secs(1))
}

/// A connection to a server, made by its first call.
pub fn connection(address: SocketAddr) -> Clients {
    Clients::at(endpoint(address))
}

/// The same with small windows.
pub fn slow_connection(address: SocketAddr) -> Clients {
    let endpoint = endpoint(address).initial_stream_window_size(SMALL_WINDOW);
    Clients::at(endpoint.initial_connection_window_size(SMALL_WINDOW))
}

/// The same as a gateway makes it, which sends the calls of many users over one connection.
pub fn shared_connection(address: SocketAddr) -> Clients {
    let endpoint = endpoint(address).initial_stream_window_size(SMALL_WINDOW);
    Clients::at(endpoint.initial_connection_window_size(SHARED_WINDOW))
}

/// A new user, whose API key has all scopes.
pub async fn sign_up(address: SocketAddr, role: UserRole) -> User {
    let scopes = [ApiKeyScope::Read, ApiKeyScope::Manage, ApiKeyScope::Append];
    connection(address).sign_up(role, &scopes).await
}
