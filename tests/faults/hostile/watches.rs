//! Watches that read much to deliver nothing, and ones that are not read.

use std::time::Duration;

use futures_util::future::join_all;
use milepost_client::{
    Service,
    pb::{
        self, AllJobs, event_service_client::EventServiceClient, watch_events_request::Scope,
        watch_events_response::Message,
    },
};
use milepost_testing::{Clients, PASSWORD};
use tokio::time::timeout;
use tonic::{Code, Streaming};

use super::{Hostile, TIMEOUT};

/// Watches at once of a customer without a job: at times more than one user may have.
const WATCHES: usize = 20;
const MANY_WATCHES: usize = 80;
const PAUSE_MS: u64 = 1_000;
/// Watches that are not read.
const UNREAD: usize = 8;
/// By then the server has filled the windows of the unread watches.
const FILLED: Duration = Duration::from_millis(700);
/// By then the server has given up to send the end of the watches. It tries for 2 s.
const GIVEN_UP: Duration = Duration::from_secs(4);

/// Watches all jobs of a customer without a job from the beginning, again and again.
pub async fn watch_nothing(mut hostile: Hostile) {
    let client = hostile.context.client(hostile.replica, &hostile.context.hostile_customer).events.clone();
    while !hostile.is_finishing() {
        let watches = if hostile.random.u32(..20) == 0 { MANY_WATCHES } else { WATCHES };
        join_all((0..watches).map(|_| watch_until_caught_up(&hostile, client.clone()))).await;
        hostile.pause(PAUSE_MS).await;
    }
}

async fn watch_until_caught_up(hostile: &Hostile, client: EventServiceClient<Service>) {
    let Ok(mut messages) = watch(hostile, client).await else { return };
    let caught_up = async {
        while let Ok(Some(message)) = messages.message().await {
            if matches!(message.message, Some(Message::CaughtUp(_))) {
                return;
            }
        }
    };
    if timeout(TIMEOUT, caught_up).await.is_err() {
        hostile.count(|answers| answers.unanswered += 1);
    }
}

async fn watch(
    hostile: &Hostile,
    mut client: EventServiceClient<Service>,
) -> Result<Streaming<pb::WatchEventsResponse>, Code> {
    let request =
        pb::WatchEventsRequest { scope: Some(Scope::AllJobs(AllJobs::default())), ..Default::default() };
    hostile.call(client.watch_events(request)).await
}

/// Watches all jobs of the provider over a connection that other users share, reads nothing,
/// and logs the session of these watches out.
pub async fn leave_watches_unread(mut hostile: Hostile, shared: Clients) {
    while !hostile.is_finishing() {
        let context = &hostile.context;
        let user = &context.hostile;
        let request = pb::LogInRequest { email: user.email.clone(), password: PASSWORD.to_owned() };
        let mut auth = context.caller(hostile.replica, &user.key_secret).auth;
        let Ok(logged_in) = hostile.call(auth.log_in(request)).await else {
            hostile.pause(500).await;
            continue;
        };
        let secret = logged_in.session.expect("the response has a session").secret;
        let client = shared.with_secret(&secret).events;
        let unread = join_all((0..UNREAD).map(|_| watch(&hostile, client.clone()))).await;
        tokio::time::sleep(FILLED).await;
        let mut auth = context.caller(hostile.replica, &secret).auth;
        let _logged_out = hostile.call(auth.log_out(pb::LogOutRequest {})).await;
        tokio::time::sleep(GIVEN_UP).await;
        drop(unread);
        hostile.pause(PAUSE_MS).await;
    }
}
