//! Failed log-ins: which later log-ins they throttle, and for how long.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb::{self, ErrorReason};
use tonic::{Code, Request, Status};

use crate::support::{
    Clients, PASSWORD, ServerProcess, TRUSTED_PROXY, TestDatabase, TestServer, assert_refused,
};

/// An address from which no user has logged in before.
const OTHER_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

fn credentials(email: &str, password: &str) -> pb::LogInRequest {
    pb::LogInRequest { email: email.to_owned(), password: password.to_owned() }
}

/// Asserts that a log-in is throttled. Returns the wait before the next attempt.
fn assert_throttled(answer: Result<impl std::fmt::Debug, Status>) -> Duration {
    let refusal = assert_refused(answer, Code::ResourceExhausted, ErrorReason::LogInThrottled);
    let wait = refusal.details.retry_info().unwrap().retry_delay.unwrap();
    assert!(!wait.is_zero() && wait <= Duration::from_secs(60), "{wait:?}");
    wait
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_failures_are_throttled_on_every_replica_except_for_known_pairs() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let user = server.customer().await;
    server.try_log_in(&user.email, PASSWORD).await.unwrap();

    for _ in 0..5 {
        let wrong = server.from(OTHER_ADDRESS).try_log_in(&user.email, "a wrong guess").await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    assert_throttled(server.from(OTHER_ADDRESS).try_log_in(&user.email, "a wrong guess").await);
    assert_throttled(replica.from(OTHER_ADDRESS).try_log_in(&user.email.to_uppercase(), PASSWORD).await);
    // Neither the known pair nor another e-mail from the same address is throttled.
    server.try_log_in(&user.email, PASSWORD).await.unwrap();
    let other = server.customer().await;
    server.from(OTHER_ADDRESS).try_log_in(&other.email, PASSWORD).await.unwrap();

    server.database.block_log_ins_for(3).await;
    let wait = assert_throttled(server.from(OTHER_ADDRESS).try_log_in(&user.email, PASSWORD).await);
    tokio::time::sleep(wait).await;
    replica.from(OTHER_ADDRESS).try_log_in(&user.email, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_one_email_from_many_addresses_are_throttled() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    server.try_log_in(&user.email, PASSWORD).await.unwrap();
    for n in 0..20 {
        let wrong = server.from(Ipv4Addr::new(127, 0, 1, n)).try_log_in(&user.email, "a wrong guess").await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    assert_throttled(server.from(OTHER_ADDRESS).try_log_in(&user.email, PASSWORD).await);
    server.try_log_in(&user.email, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn log_ins_from_one_address_to_many_emails_are_throttled_whether_the_users_exist_or_not() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let remote = server.from(OTHER_ADDRESS);
    for n in 0..20 {
        let wrong = remote.try_log_in(&format!("nobody-{n}@example.com"), "a wrong guess").await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    assert_throttled(remote.try_log_in("nobody@example.com", PASSWORD).await);
    assert_throttled(remote.try_log_in(&user.email, PASSWORD).await);
}

/// Sets every row of `log_in_attempts` to this many failures, the last of them this
/// many minutes ago, and ends every block.
async fn set_failures(server: &TestServer, failures: i32, minutes_ago: u32) {
    let sql = format!(
        "UPDATE log_in_attempts SET failures = {failures}, blocked_until = NULL,
             last_at = clock_timestamp() - interval '{minutes_ago} minutes'"
    );
    server.database.execute(&sql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_doubles_the_wait_up_to_one_minute() {
    let server = TestServer::start().await;
    let guess = async || server.try_log_in("nobody@example.com", "a wrong guess").await;
    guess().await.unwrap_err();
    // Seconds for which the pair, the address and the e-mail are blocked.
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
        set_failures(&server, failures, 0).await;
        assert_refused(guess().await, Code::Unauthenticated, ErrorReason::LogInFailed);
        assert_eq!(server.database.texts(waits).await, expected, "after {failures} failures");
    }
    let wait = assert_throttled(guess().await);
    assert!(wait > Duration::from_secs(30), "{wait:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_forgotten_after_15_minutes_without_another() {
    let server = TestServer::start().await;
    let guess = async || server.try_log_in("nobody@example.com", "a wrong guess").await;
    guess().await.unwrap_err();
    set_failures(&server, 25, 14).await;
    assert_refused(guess().await, Code::Unauthenticated, ErrorReason::LogInFailed);
    assert_throttled(guess().await);

    set_failures(&server, 25, 16).await;
    for _ in 0..5 {
        assert_refused(guess().await, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    assert_throttled(guess().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_current_password_counts_as_a_failed_log_in() {
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
    assert_throttled(user.session.auth.change_password(change(PASSWORD)).await.map(drop));
    assert_throttled(server.try_log_in(&user.email, PASSWORD).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn x_forwarded_for_is_read_only_from_trusted_proxies() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let guess = async |through: Clients, forwarded: &str| {
        let mut request = Request::new(credentials(&user.email, "a wrong guess"));
        request.metadata_mut().insert("x-forwarded-for", forwarded.parse().unwrap());
        through.anonymous().auth.log_in(request).await.map(drop)
    };
    for n in 0..5 {
        // The proxy appends the client's address; the entry before it may be forged.
        let wrong = guess(server.from(TRUSTED_PROXY), &format!("10.0.1.{n}, 10.0.0.1")).await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    assert_throttled(guess(server.from(TRUSTED_PROXY), "10.0.0.1").await);
    let other_client = guess(server.from(TRUSTED_PROXY), "10.0.0.2").await;
    assert_refused(other_client, Code::Unauthenticated, ErrorReason::LogInFailed);

    for n in 0..5 {
        let wrong = guess(server.from(OTHER_ADDRESS), &format!("10.0.2.{n}")).await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    assert_throttled(guess(server.from(OTHER_ADDRESS), "10.0.3.1").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_hash_of_another_cost_is_replaced_at_the_next_log_in() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let hash = || async { server.database.texts("SELECT password_hash AS text FROM users").await };
    let older = bcrypt::hash(PASSWORD, 5).unwrap();
    server.database.execute(&format!("UPDATE users SET password_hash = '{older}'")).await;
    server.try_log_in(&user.email, "a wrong guess").await.unwrap_err();
    assert_eq!(hash().await, [older]);
    server.try_log_in(&user.email, PASSWORD).await.unwrap();
    let [newer] = hash().await.try_into().unwrap();
    assert!(newer.starts_with("$2b$04$"), "{newer}");
    server.try_log_in(&user.email, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_succeeds_although_its_password_hash_cannot_be_replaced() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let older = bcrypt::hash(PASSWORD, 5).unwrap();
    let fixed = format!(
        "UPDATE users SET password_hash = '{older}';
         ALTER TABLE users ADD CONSTRAINT fixed CHECK (password_hash = '{older}')"
    );
    server.database.connect().await.batch_execute(&fixed).await.unwrap();
    server.try_log_in(&user.email, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_proxy_is_recognized_by_its_ipv4_address_on_a_dual_stack_listener() {
    let database = TestDatabase::migrated().await;
    let server = ServerProcess::on_at(
        &database,
        "::",
        &[
            ("MILEPOST_INSECURE_LISTEN", "true"),
            ("MILEPOST_SIGN_UP", "open"),
            ("MILEPOST_TRUSTED_PROXY", "127.0.0.8/31,::ffff:127.0.0.16/124"),
        ],
    )
    .await;
    let clients = Clients::of(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), server.address.port()));
    let customer = clients.customer().await;

    let logged_address = async |from: [u8; 4], hops: &str| {
        let credentials = pb::LogInRequest { email: customer.email.clone(), password: PASSWORD.to_owned() };
        let mut request = Request::new(credentials);
        request.metadata_mut().insert("x-forwarded-for", hops.parse().unwrap());
        clients.from(Ipv4Addr::from(from)).anonymous().auth.log_in(request).await.unwrap();
        let last = "SELECT host(client_address) AS text FROM audit_entries ORDER BY created_at DESC LIMIT 1";
        database.texts(last).await.remove(0)
    };
    assert_eq!(logged_address([127, 0, 0, 1], "10.1.2.3").await, "127.0.0.1");
    assert_eq!(logged_address([127, 0, 0, 8], "10.1.2.3").await, "10.1.2.3");
    assert_eq!(logged_address([127, 0, 0, 9], "::ffff:10.1.2.4").await, "10.1.2.4");
    assert_eq!(logged_address([127, 0, 0, 9], "10.1.2.5, ::ffff:127.0.0.8").await, "10.1.2.5");
    // In the range, and with ports as some proxies write them.
    assert_eq!(logged_address([127, 0, 0, 20], "10.1.2.6:50000, 127.0.0.31:443").await, "10.1.2.6");
    assert_eq!(logged_address([127, 0, 0, 20], "[2001:db8::6]:50000").await, "2001:db8::6");
    assert_eq!(logged_address([127, 0, 0, 32], "10.1.2.7").await, "127.0.0.32");
    assert_eq!(logged_address([127, 0, 0, 20], "10.1.2.8, unknown").await, "127.0.0.20");
}
