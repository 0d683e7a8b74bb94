//! Log-ins that fail: how guessing gets slow, and for whom.

use std::{net::Ipv4Addr, time::Duration};

use diesel_async::SimpleAsyncConnection as _;
use futures_util::future::{join, join_all};
use milepost::pb::{self, ErrorReason};
use tonic::{Code, Request, Status};

use crate::support::{Clients, PASSWORD, TRUSTED_PROXY, TestServer, assert_refused, within_timeout};

const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

fn claim(email: &str, password: &str) -> pb::LogInRequest {
    pb::LogInRequest { email: email.to_owned(), password: password.to_owned() }
}

async fn log_in(clients: &Clients, email: &str, password: &str) -> Result<(), Status> {
    clients.anonymous().auth.log_in(claim(email, password)).await.map(drop)
}

fn throttled(answer: Result<(), Status>) -> Duration {
    let refusal = assert_refused(answer, Code::ResourceExhausted, ErrorReason::LogInThrottled);
    let wait = refusal.details.retry_info().unwrap().retry_delay.unwrap();
    assert!(!wait.is_zero() && wait <= Duration::from_secs(60), "{wait:?}");
    wait
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_gets_slow_on_every_replica_and_locks_nobody_out_who_is_known() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let user = server.customer().await;
    log_in(&server, &user.email, PASSWORD).await.unwrap();

    for _ in 0..5 {
        let wrong = log_in(&server.from(STRANGER), &user.email, "a wrong guess").await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    throttled(log_in(&server.from(STRANGER), &user.email, "a wrong guess").await);
    throttled(log_in(&replica.from(STRANGER), &user.email.to_uppercase(), PASSWORD).await);
    // Not for who has been here before, nor for others there.
    log_in(&server, &user.email, PASSWORD).await.unwrap();
    let other = server.customer().await;
    log_in(&server.from(STRANGER), &other.email, PASSWORD).await.unwrap();

    server.database.block_log_ins_for(3).await;
    let wait = throttled(log_in(&server.from(STRANGER), &user.email, PASSWORD).await);
    tokio::time::sleep(wait).await;
    log_in(&replica.from(STRANGER), &user.email, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_from_many_addresses_gets_slow_as_well() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    log_in(&server, &user.email, PASSWORD).await.unwrap();
    for n in 0..20 {
        let wrong = log_in(&server.from(Ipv4Addr::new(127, 0, 1, n)), &user.email, "a wrong guess").await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    throttled(log_in(&server.from(STRANGER), &user.email, PASSWORD).await);
    log_in(&server, &user.email, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_that_tries_many_users_gets_slow_whether_they_exist_or_not() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let stranger = server.from(STRANGER);
    for n in 0..20 {
        let wrong = log_in(&stranger, &format!("nobody-{n}@example.com"), "a wrong guess").await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    throttled(log_in(&stranger, "nobody@example.com", PASSWORD).await);
    throttled(log_in(&stranger, &user.email, PASSWORD).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_known_at_an_address_logs_in_there_whatever_others_do() {
    let server = TestServer::start().await;
    let (known, other) = (server.customer().await, server.customer().await);
    let stranger = server.from(STRANGER);
    log_in(&stranger, &known.email, PASSWORD).await.unwrap();
    for n in 0..20 {
        let wrong = log_in(&stranger, &format!("nobody-{n}@example.com"), "a wrong guess").await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    throttled(log_in(&stranger, &other.email, PASSWORD).await);
    log_in(&stranger, &known.email, PASSWORD).await.unwrap();
}

/// As if so many log-ins had failed so long ago, and the wait since were over.
async fn failed_before(server: &TestServer, failures: i32, minutes_ago: u32) {
    let sql = format!(
        "UPDATE log_in_attempts SET failures = {failures}, blocked_until = NULL,
             last_at = clock_timestamp() - interval '{minutes_ago} minutes'"
    );
    server.database.execute(&sql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_doubles_the_wait_until_it_is_a_minute() {
    let server = TestServer::start().await;
    let guess = async || log_in(&server, "nobody@example.com", "a wrong guess").await;
    guess().await.unwrap_err();
    // In seconds: of the user from the address, of the address, of the user.
    let waits = "SELECT coalesce(extract(epoch FROM blocked_until - last_at)::int, 0)::text AS text
        FROM log_in_attempts ORDER BY blocked_until DESC NULLS LAST";
    for (failures, expected) in [
        (3, ["0", "0", "0"]),
        (4, ["1", "0", "0"]),
        (5, ["2", "0", "0"]),
        (6, ["4", "0", "0"]),
        (9, ["32", "0", "0"]),
        (10, ["60", "0", "0"]),
        (18, ["60", "0", "0"]),
        (19, ["60", "1", "1"]),
        (20, ["60", "2", "2"]),
        (24, ["60", "32", "32"]),
        (25, ["60", "60", "60"]),
        (i32::MAX - 1, ["60", "60", "60"]),
    ] {
        failed_before(&server, failures, 0).await;
        assert_refused(guess().await, Code::Unauthenticated, ErrorReason::LogInFailed);
        assert_eq!(server.database.texts(waits).await, expected, "after {failures} failures");
    }
    let wait = throttled(guess().await);
    assert!(wait > Duration::from_secs(30), "{wait:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quarter_of_an_hour_without_a_failure_is_a_new_beginning() {
    let server = TestServer::start().await;
    let guess = async || log_in(&server, "nobody@example.com", "a wrong guess").await;
    guess().await.unwrap_err();
    failed_before(&server, 25, 14).await;
    assert_refused(guess().await, Code::Unauthenticated, ErrorReason::LogInFailed);
    throttled(guess().await);

    failed_before(&server, 25, 16).await;
    for _ in 0..5 {
        assert_refused(guess().await, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    throttled(guess().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_guesses_at_once_are_slowed_down_like_those_one_after_the_other() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let stranger = server.from(STRANGER);
    log_in(&stranger, &user.email, "a wrong guess").await.unwrap_err();
    // One more, and the next has to wait for half a minute.
    failed_before(&server, 9, 0).await;
    let guesses = (0..40).map(|_| log_in(&stranger, &user.email, "a wrong guess"));
    // Those that ask while another one is being counted look again when it is.
    let mut counting = server.database.connect().await;
    counting.batch_execute("BEGIN; SELECT 1 FROM log_in_attempts FOR UPDATE").await.unwrap();
    let counted = async {
        while server.database.waiting_for_locks().await.len() < 2 {}
        counting.batch_execute("COMMIT").await.unwrap();
    };
    let both = join(join_all(guesses), counted);
    let (answers, ()) = within_timeout("the answers", both).await;
    let (looked_at, refused): (Vec<_>, Vec<_>) = answers
        .into_iter()
        .partition(|answer| answer.as_ref().is_err_and(|status| status.code() == Code::Unauthenticated));
    for answer in refused {
        throttled(answer);
    }
    assert_eq!(looked_at.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_current_password_is_a_failed_log_in() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let change = |current: &str| pb::ChangePasswordRequest {
        current_password: current.to_owned(),
        new_password: "another horse".to_owned(),
    };
    for _ in 0..5 {
        let wrong = user.session.auth.change_password(change("a wrong guess")).await;
        assert_refused(wrong, Code::InvalidArgument, ErrorReason::FieldInvalid);
    }
    server.database.block_log_ins_for(30).await;
    throttled(user.session.auth.change_password(change(PASSWORD)).await.map(drop));
    throttled(log_in(&server, &user.email, PASSWORD).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_trusted_proxy_may_say_where_a_call_comes_from() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let guess = async |through: Clients, forwarded: &str| {
        let mut request = Request::new(claim(&user.email, "a wrong guess"));
        request.metadata_mut().insert("x-forwarded-for", forwarded.parse().unwrap());
        through.anonymous().auth.log_in(request).await.map(drop)
    };
    for n in 0..5 {
        // What the client made up comes before what the proxy added.
        let wrong = guess(server.from(TRUSTED_PROXY), &format!("10.0.1.{n}, 10.0.0.1")).await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    throttled(guess(server.from(TRUSTED_PROXY), "10.0.0.1").await);
    let elsewhere = guess(server.from(TRUSTED_PROXY), "10.0.0.2").await;
    assert_refused(elsewhere, Code::Unauthenticated, ErrorReason::LogInFailed);

    for n in 0..5 {
        let wrong = guess(server.from(STRANGER), &format!("10.0.2.{n}")).await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    throttled(guess(server.from(STRANGER), "10.0.3.1").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hash_of_another_cost_is_made_anew_at_the_next_log_in() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let hash = || async { server.database.texts("SELECT password_hash AS text FROM users").await };
    let older = bcrypt::hash(PASSWORD, 5).unwrap();
    server.database.execute(&format!("UPDATE users SET password_hash = '{older}'")).await;
    log_in(&server, &user.email, "a wrong guess").await.unwrap_err();
    assert_eq!(hash().await, [older]);
    log_in(&server, &user.email, PASSWORD).await.unwrap();
    let [newer] = hash().await.try_into().unwrap();
    assert!(newer.starts_with("$2b$04$"), "{newer}");
    log_in(&server, &user.email, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hash_that_cannot_be_made_anew_keeps_nobody_out() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let older = bcrypt::hash(PASSWORD, 5).unwrap();
    let fixed = format!(
        "UPDATE users SET password_hash = '{older}';
         ALTER TABLE users ADD CONSTRAINT fixed CHECK (password_hash = '{older}')"
    );
    server.database.connect().await.batch_execute(&fixed).await.unwrap();
    log_in(&server, &user.email, PASSWORD).await.unwrap();
}
