//! The throttle of log-ins: what it counts and what its answers reveal. Also the throttle
//! of sign-ups from one address.

use std::net::Ipv4Addr;

use diesel_async::SimpleAsyncConnection as _;
use futures_util::future::{join, join_all};
use milepost_client::pb::{self, ErrorReason};
use tonic::{Code, Request, Response, Status};

use crate::support::{
    Clients, PASSWORD, SIGN_UPS_PER_HOUR, TRUSTED_PROXY, TestServer, User, assert_refused, sign_up_request,
    within_timeout,
};

/// An address from which no user has logged in before.
const OTHER_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const WRONG_PASSWORD: &str = "a wrong guess";

#[track_caller]
fn assert_failed(answer: Result<impl std::fmt::Debug, Status>) {
    assert_refused(answer, Code::Unauthenticated, ErrorReason::LogInFailed);
}

#[track_caller]
fn assert_throttled(answer: Result<impl std::fmt::Debug, Status>) {
    assert_refused(answer, Code::ResourceExhausted, ErrorReason::LogInThrottled);
}

/// Fails this many log-ins, each with another e-mail that no user has.
async fn guess_at_unknown_emails(clients: &Clients, guesses: u32) {
    for n in 0..guesses {
        assert_failed(clients.try_log_in(&format!("nobody-{n}@example.com"), WRONG_PASSWORD).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn successful_log_ins_between_guesses_do_not_reset_the_failures_of_the_address() {
    let server = TestServer::start().await;
    let remote = server.from(OTHER_ADDRESS);
    let (own, other) = (remote.customer().await, server.customer().await);
    for n in 0..20 {
        assert_failed(remote.try_log_in(&format!("nobody-{n}@example.com"), WRONG_PASSWORD).await);
        remote.try_log_in(&own.email, PASSWORD).await.unwrap();
    }
    server.database.block_log_ins_for(30).await;
    assert_throttled(remote.try_log_in(&other.email, PASSWORD).await);
    remote.try_log_in(&own.email, PASSWORD).await.unwrap();
    assert_throttled(remote.try_log_in(&other.email, PASSWORD).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successful_log_in_adds_no_failure_and_no_block() {
    let server = TestServer::start().await;
    let (one, other) = (server.customer().await, server.customer().await);
    let remote = server.from(OTHER_ADDRESS);
    guess_at_unknown_emails(&remote, 1).await;
    server.database.execute("UPDATE log_in_attempts SET failures = 25 WHERE failures > 0").await;
    remote.try_log_in(&one.email, PASSWORD).await.unwrap();
    remote.try_log_in(&other.email, PASSWORD).await.unwrap();
    let counted = "SELECT failures::text AS text FROM log_in_attempts WHERE succeeded_at IS NULL ORDER BY 1";
    assert_eq!(server.database.texts(counted).await, ["0", "0", "25", "25", "25"]);
}

/// Guesses at one e-mail and at others, from one address and from many. Returns the codes
/// of the answers for the one e-mail and the rows of `log_in_attempts` afterwards.
async fn guess_everywhere(user_exists: bool) -> (Vec<Code>, Vec<String>) {
    let server = TestServer::start().await;
    let email = "ada@example.com";
    let remote = server.from(OTHER_ADDRESS);
    if user_exists {
        remote.anonymous().auth.sign_up(sign_up_request(email)).await.unwrap();
    }
    let mut answers = Vec::new();
    let mut guess = async |clients: &Clients| {
        answers.push(clients.try_log_in(email, WRONG_PASSWORD).await.unwrap_err().code());
        // No block ends during the test.
        server.database.block_log_ins_for(30).await;
    };
    guess(&remote).await;
    guess_at_unknown_emails(&remote, 18).await;
    // The last failure that is counted for the address, and then restricted attempts.
    for _ in 0..5 {
        guess(&remote).await;
    }
    // Enough failures to block the e-mail, and one attempt more.
    for n in 0..19 {
        guess(&server.from(Ipv4Addr::new(127, 0, 1, n))).await;
    }
    // Finally only the e-mail is blocked.
    let unblock_others = "UPDATE log_in_attempts SET blocked_until = NULL
        WHERE key <> sha256('email ada@example.com')";
    server.database.execute(unblock_others).await;
    guess(&remote).await;
    let table = "SELECT key::text || ' ' || failures || ' ' || (blocked_until IS NULL)::text AS text
        FROM log_in_attempts ORDER BY 1";
    (answers, server.database.texts(table).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_to_log_ins_do_not_reveal_whether_a_user_exists_whatever_is_blocked() {
    let (with_user, without_user) = (guess_everywhere(true).await, guess_everywhere(false).await);
    assert_eq!(with_user, without_user);
    let throttled = with_user.0.iter().filter(|code| **code == Code::ResourceExhausted).count();
    assert_eq!(throttled, 6, "{:?}", with_user.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_pair_logs_in_although_its_address_and_email_are_blocked_until_its_fifth_failure() {
    let server = TestServer::start().await;
    let remote = server.from(OTHER_ADDRESS);
    let known = remote.customer().await;
    guess_at_unknown_emails(&remote, 20).await;
    for n in 0..20 {
        assert_failed(
            server.from(Ipv4Addr::new(127, 0, 1, n)).try_log_in(&known.email, WRONG_PASSWORD).await,
        );
    }
    server.database.block_log_ins_for(30).await;
    let counts = "SELECT failures::text AS text FROM log_in_attempts ORDER BY failures DESC LIMIT 3";
    for _ in 0..2 {
        for _ in 0..4 {
            assert_throttled(remote.try_log_in(&known.email, WRONG_PASSWORD).await);
        }
        remote.try_log_in(&known.email, PASSWORD).await.unwrap();
        assert_eq!(server.database.texts(counts).await, ["20", "20", "1"]);
    }
    for _ in 0..5 {
        assert_throttled(remote.try_log_in(&known.email, WRONG_PASSWORD).await);
    }
    server.database.block_log_ins_for(30).await;
    assert_throttled(remote.try_log_in(&known.email, PASSWORD).await);
    assert_eq!(server.count("audit_entries WHERE act = 'log_in_failed'").await, 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_concurrent_guesses_as_many_are_verified_as_of_consecutive_ones() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let remote = server.from(OTHER_ADDRESS);
    assert_failed(remote.try_log_in(&user.email, WRONG_PASSWORD).await);
    // The next failure blocks the pair for 32 s.
    server.database.execute("UPDATE log_in_attempts SET failures = 9").await;
    let guesses = (0..40).map(|_| remote.try_log_in(&user.email, WRONG_PASSWORD));
    let mut counting = server.database.connect().await;
    counting.batch_execute("BEGIN; SELECT 1 FROM log_in_attempts FOR UPDATE").await.unwrap();
    let counted = async {
        server.database.wait_for_locks(2).await;
        counting.batch_execute("COMMIT").await.unwrap();
    };
    let (answers, ()) = within_timeout("the answers", join(join_all(guesses), counted)).await;
    let (verified, refused): (Vec<_>, Vec<_>) = answers
        .into_iter()
        .partition(|answer| answer.as_ref().is_err_and(|status| status.code() == Code::Unauthenticated));
    assert_eq!(verified.len(), 1);
    refused.into_iter().for_each(|answer| assert_throttled(answer));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_up_makes_its_pair_known() {
    let server = TestServer::start().await;
    let remote = server.from(OTHER_ADDRESS);
    let (known, other) = (remote.customer().await, server.customer().await);
    guess_at_unknown_emails(&remote, 20).await;
    server.database.block_log_ins_for(30).await;
    assert_throttled(remote.try_log_in(&other.email, PASSWORD).await);
    remote.try_log_in(&known.email, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_signs_up_a_number_of_users_an_hour_on_all_servers_together() {
    let servers = [TestServer::start().await];
    let servers = [servers[0].replica().await, servers.into_iter().next().unwrap()];
    let sign_up = async |server: &TestServer, address: &str, email: &str| {
        let mut request = Request::new(sign_up_request(email));
        request.metadata_mut().insert("x-forwarded-for", address.parse().unwrap());
        let answer = server.from(TRUSTED_PROXY).anonymous().auth.sign_up(request).await;
        answer.map(Response::into_inner)
    };
    for (network, addresses) in
        [("a", ["192.0.2.1", "192.0.2.1"]), ("b", ["2001:db8:1:2::3", "2001:db8:1:2:ffff::4"])]
    {
        sign_up(&servers[0], addresses[0], &format!("{network}@b")).await.unwrap();
        // A sign-up that is refused for its known e-mail counts; one that is refused for its
        // shape does not.
        sign_up(&servers[1], addresses[0], &format!("{network}@b")).await.unwrap_err();
        sign_up(&servers[1], addresses[0], "nobody").await.unwrap_err();
        for n in 2..SIGN_UPS_PER_HOUR {
            let server = &servers[usize::try_from(n % 2).unwrap()];
            sign_up(server, addresses[1], &format!("{network}{n}@b")).await.unwrap();
        }
        for (server, address) in servers.iter().zip(addresses) {
            let refused = sign_up(server, address, &format!("{network}-more@b")).await;
            let refusal = assert_refused(refused, Code::ResourceExhausted, ErrorReason::Overloaded);
            let wait = refusal.details.retry_info().unwrap().retry_delay.unwrap();
            assert!((3_500..=3_600).contains(&wait.as_secs()), "{wait:?}");
        }
    }
    // Neither other addresses nor loopback are refused.
    sign_up(&servers[0], "192.0.2.2", "other@b").await.unwrap();
    sign_up(&servers[0], "127.0.0.1", "local@b").await.unwrap();

    // After the hour the count starts anew, and so does that of a clock that was ahead.
    let database = &servers[0].database;
    for moved in ["- interval '61 minutes'", "+ interval '2 hours'"] {
        database
            .execute(&format!(
                "UPDATE sign_up_windows SET began_at = clock_timestamp() {moved}, sign_ups = {SIGN_UPS_PER_HOUR}"
            ))
            .await;
        sign_up(&servers[0], "192.0.2.1", &format!("{}@b", moved.len())).await.unwrap();
    }
    assert_eq!(servers[0].count("sign_up_windows WHERE began_at < now() - interval '1 hour'").await, 0);
}

/// Replaces the password hash of every user by another hash of the same password, once
/// `work` has verified the old hash and waits for the row.
async fn with_replaced_hash<T>(server: &TestServer, work: impl Future<Output = T>) -> T {
    let newer = bcrypt::hash(PASSWORD, 4).unwrap();
    let mut other = server.database.connect().await;
    other.batch_execute(&format!("BEGIN; UPDATE users SET password_hash = '{newer}'")).await.unwrap();
    let replaced = async {
        server.database.wait_for_locks(1).await;
        other.batch_execute("COMMIT").await.unwrap();
    };
    within_timeout("the call that verifies the password", join(work, replaced)).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_accepted_although_its_hash_is_replaced_meanwhile() {
    let server = TestServer::start().await;
    let mut user: User = server.customer().await;
    with_replaced_hash(&server, server.try_log_in(&user.email, PASSWORD)).await.unwrap();
    let request = pb::ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: "another horse".to_owned(),
    };
    with_replaced_hash(&server, user.session.auth.change_password(request)).await.unwrap();
    server.try_log_in(&user.email, "another horse").await.unwrap();
    assert_eq!(server.count("audit_entries WHERE act = 'log_in_failed'").await, 0);
    assert_eq!(server.count("log_in_attempts WHERE failures > 0").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_whose_password_cannot_be_verified_counts_as_no_failure() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    for restricted in [false, true] {
        assert_failed(server.try_log_in(&user.email, WRONG_PASSWORD).await);
        // One failure more would block the address and the e-mail for a minute; or both
        // are blocked already.
        let blocked = if restricted { "now() + interval '1 hour'" } else { "NULL" };
        let counted = format!(
            "UPDATE log_in_attempts SET failures = 3;
             UPDATE log_in_attempts SET failures = 24, blocked_until = {blocked} WHERE succeeded_at IS NULL"
        );
        server.database.connect().await.batch_execute(&counted).await.unwrap();
        let mut locker = server.database.lock("users").await;
        let refused = within_timeout("a refusal", server.try_log_in(&user.email, PASSWORD)).await;
        assert_refused(refused, Code::Unavailable, ErrorReason::DatabaseUnavailable);
        locker.batch_execute("COMMIT").await.unwrap();
        let counted = "SELECT failures::text AS text FROM log_in_attempts ORDER BY failures";
        within_timeout("the counts", async {
            while server.database.texts(counted).await != ["3", "24", "24"] {}
        })
        .await;
        server.try_log_in(&user.email, PASSWORD).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_counts_are_deleted_and_known_pairs_are_kept_for_30_days() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    guess_at_unknown_emails(&server.from(OTHER_ADDRESS), 3).await;
    server.database.execute("UPDATE log_in_attempts SET last_at = now() - interval '16 minutes'").await;
    server.try_log_in(&user.email, PASSWORD).await.unwrap();
    assert_eq!(server.count("log_in_attempts").await, 3, "the pair, the address and the e-mail");
    let of_known_pairs = "log_in_attempts WHERE succeeded_at IS NOT NULL";
    server.database.execute("UPDATE log_in_attempts SET last_at = now() - interval '29 days'").await;
    guess_at_unknown_emails(&server.from(OTHER_ADDRESS), 1).await;
    assert_eq!(server.count(of_known_pairs).await, 1);
    server.database.execute("UPDATE log_in_attempts SET last_at = now() - interval '31 days'").await;
    guess_at_unknown_emails(&server.from(OTHER_ADDRESS), 1).await;
    assert_eq!(server.count(of_known_pairs).await, 0);
}
