//! What the throttle counts, whom it tells what, and how fast strangers can sign
//! up.

use std::net::Ipv4Addr;

use diesel_async::SimpleAsyncConnection as _;
use futures_util::future::{join, join_all};
use milepost::pb::{self, ErrorReason};
use tonic::{Code, Request, Response, Status};

use crate::support::{Clients, PASSWORD, TRUSTED_PROXY, TestServer, User, assert_refused, within_timeout};

const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const GUESS: &str = "a wrong guess";

async fn log_in(clients: &Clients, email: &str, password: &str) -> Result<(), Status> {
    let request = pb::LogInRequest { email: email.to_owned(), password: password.to_owned() };
    clients.anonymous().auth.log_in(request).await.map(drop)
}

fn signing_up(email: &str) -> pb::SignUpRequest {
    pb::SignUpRequest {
        role: pb::UserRole::Customer.into(),
        email: email.to_owned(),
        password: PASSWORD.to_owned(),
        ..Default::default()
    }
}

async fn sign_up(clients: &Clients, email: &str) {
    clients.anonymous().auth.sign_up(signing_up(email)).await.unwrap();
}

#[track_caller]
fn failed(answer: Result<(), Status>) {
    assert_refused(answer, Code::Unauthenticated, ErrorReason::LogInFailed);
}

#[track_caller]
fn throttled(answer: Result<(), Status>) {
    assert_refused(answer, Code::ResourceExhausted, ErrorReason::LogInThrottled);
}

/// So many guesses, each at another user, of whom there is none.
async fn guess_at_nobody(clients: &Clients, guesses: u32) {
    for n in 0..guesses {
        failed(log_in(clients, &format!("nobody-{n}@example.com"), GUESS).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_logs_in_as_themselves_between_guesses_is_slowed_down_all_the_same() {
    let server = TestServer::start().await;
    let stranger = server.from(STRANGER);
    let (own, other) = (stranger.customer().await, server.customer().await);
    for n in 0..20 {
        failed(log_in(&stranger, &format!("nobody-{n}@example.com"), GUESS).await);
        log_in(&stranger, &own.email, PASSWORD).await.unwrap();
    }
    server.database.block_log_ins_for(30).await;
    throttled(log_in(&stranger, &other.email, PASSWORD).await);
    log_in(&stranger, &own.email, PASSWORD).await.unwrap();
    throttled(log_in(&stranger, &other.email, PASSWORD).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_password_blocks_nobody_whatever_failed_before() {
    let server = TestServer::start().await;
    let (one, other) = (server.customer().await, server.customer().await);
    let stranger = server.from(STRANGER);
    guess_at_nobody(&stranger, 1).await;
    server.database.execute("UPDATE log_in_attempts SET failures = 25 WHERE failures > 0").await;
    log_in(&stranger, &one.email, PASSWORD).await.unwrap();
    log_in(&stranger, &other.email, PASSWORD).await.unwrap();
    let counted = "SELECT failures::text AS text FROM log_in_attempts WHERE succeeded_at IS NULL ORDER BY 1";
    assert_eq!(server.database.texts(counted).await, ["0", "0", "25", "25", "25"]);
}

/// What somebody learns who guesses at one user, at others and from elsewhere,
/// and what is left in the table.
async fn film(of_a_user: bool) -> (Vec<Code>, Vec<String>) {
    let server = TestServer::start().await;
    let email = "ada@example.com";
    let stranger = server.from(STRANGER);
    if of_a_user {
        sign_up(&stranger, email).await;
    }
    let mut answers = Vec::new();
    let mut guess = async |clients: &Clients| {
        answers.push(log_in(clients, email, GUESS).await.unwrap_err().code());
        // None ends while this goes on.
        server.database.block_log_ins_for(30).await;
    };
    guess(&stranger).await;
    guess_at_nobody(&stranger, 18).await;
    // The last one that counts on the address, and then some in doubt.
    for _ in 0..5 {
        guess(&stranger).await;
    }
    // As many as are blocked at the user, and one more.
    for n in 0..19 {
        guess(&server.from(Ipv4Addr::new(127, 0, 1, n))).await;
    }
    // At last the user alone is blocked.
    let elsewhere = "UPDATE log_in_attempts SET blocked_until = NULL
        WHERE key <> sha256('email ada@example.com')";
    server.database.execute(elsewhere).await;
    guess(&stranger).await;
    let table = "SELECT key::text || ' ' || failures || ' ' || (blocked_until IS NULL)::text AS text
        FROM log_in_attempts ORDER BY 1";
    (answers, server.database.texts(table).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_tells_nobody_who_is_a_user_whatever_is_blocked() {
    let (of_a_user, of_nobody) = (film(true).await, film(false).await);
    assert_eq!(of_a_user, of_nobody);
    let throttled = of_a_user.0.iter().filter(|code| **code == Code::ResourceExhausted).count();
    assert_eq!(throttled, 6, "{:?}", of_a_user.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_known_is_let_in_though_address_and_e_mail_are_blocked_and_guesses_as_rarely_as_ever() {
    let server = TestServer::start().await;
    let stranger = server.from(STRANGER);
    let known = stranger.customer().await;
    guess_at_nobody(&stranger, 20).await;
    for n in 0..20 {
        failed(log_in(&server.from(Ipv4Addr::new(127, 0, 1, n)), &known.email, GUESS).await);
    }
    server.database.block_log_ins_for(30).await;
    let counts = "SELECT failures::text AS text FROM log_in_attempts ORDER BY failures DESC LIMIT 3";
    for _ in 0..2 {
        for _ in 0..4 {
            throttled(log_in(&stranger, &known.email, GUESS).await);
        }
        log_in(&stranger, &known.email, PASSWORD).await.unwrap();
        assert_eq!(server.database.texts(counts).await, ["20", "20", "1"]);
    }
    for _ in 0..5 {
        throttled(log_in(&stranger, &known.email, GUESS).await);
    }
    server.database.block_log_ins_for(30).await;
    throttled(log_in(&stranger, &known.email, PASSWORD).await);
    assert_eq!(server.count("audit_entries WHERE act = 'log_in_failed'").await, 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_guesses_at_once_as_many_are_looked_at_as_of_those_one_after_the_other() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let stranger = server.from(STRANGER);
    failed(log_in(&stranger, &user.email, GUESS).await);
    // One more, and the next has to wait for half a minute.
    server.database.execute("UPDATE log_in_attempts SET failures = 9").await;
    let guesses = (0..40).map(|_| log_in(&stranger, &user.email, GUESS));
    let mut counting = server.database.connect().await;
    counting.batch_execute("BEGIN; SELECT 1 FROM log_in_attempts FOR UPDATE").await.unwrap();
    let counted = async {
        while server.database.waiting_for_locks().await.len() < 2 {}
        counting.batch_execute("COMMIT").await.unwrap();
    };
    let (answers, ()) = within_timeout("the answers", join(join_all(guesses), counted)).await;
    let (looked_at, refused): (Vec<_>, Vec<_>) = answers
        .into_iter()
        .partition(|answer| answer.as_ref().is_err_and(|status| status.code() == Code::Unauthenticated));
    assert_eq!(looked_at.len(), 1);
    refused.into_iter().for_each(throttled);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_e_mail_is_one_to_the_throttle_where_it_is_one_to_the_log_in() {
    let server = TestServer::start().await;
    for (n, (one, other)) in
        [("ida@example.com", "İda@example.com"), ("éva@example.com", "ÉVA@example.com")].iter().enumerate()
    {
        let stranger = server.from(Ipv4Addr::new(127, 0, 1, u8::try_from(n).unwrap()));
        sign_up(&server, one).await;
        for _ in 0..5 {
            failed(log_in(&stranger, one, GUESS).await);
        }
        server.database.block_log_ins_for(30).await;
        let same = format!("SELECT (lower('{one}') = lower('{other}'))::text AS text");
        let answer = log_in(&stranger, other, PASSWORD).await;
        match server.database.texts(&same).await[0].as_str() {
            "true" => throttled(answer),
            _ => failed(answer),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_signs_up_is_known_from_there() {
    let server = TestServer::start().await;
    let stranger = server.from(STRANGER);
    let (here, elsewhere) = (stranger.customer().await, server.customer().await);
    guess_at_nobody(&stranger, 20).await;
    server.database.block_log_ins_for(30).await;
    throttled(log_in(&stranger, &elsewhere.email, PASSWORD).await);
    log_in(&stranger, &here.email, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_signs_up_again_and_again_from_one_address_is_slowed_down() {
    let server = TestServer::start().await;
    let sign_up = async |address: &str, email: &str| {
        let mut request = Request::new(signing_up(email));
        request.metadata_mut().insert("x-forwarded-for", address.parse().unwrap());
        let answer = server.from(TRUSTED_PROXY).anonymous().auth.sign_up(request).await;
        answer.map(Response::into_inner)
    };
    sign_up("192.0.2.1", "a@b").await.unwrap();
    // A refusal for the e-mail counts as well, one for the shape does not.
    sign_up("192.0.2.1", "a@b").await.unwrap_err();
    sign_up("192.0.2.1", "nobody").await.unwrap_err();
    server.database.execute("UPDATE log_in_attempts SET failures = failures + 96 WHERE failures = 2").await;
    sign_up("192.0.2.1", "3@b").await.unwrap();
    sign_up("192.0.2.1", "4@b").await.unwrap();
    server.database.block_log_ins_for(30).await;
    let slow = sign_up("192.0.2.1", "5@b").await;
    let refusal = assert_refused(slow, Code::ResourceExhausted, ErrorReason::Overloaded);
    let wait = refusal.details.retry_info().unwrap().retry_delay.unwrap();
    assert!((20..=30).contains(&wait.as_secs()), "{wait:?}");
    // Not for others, nor for those who are on this machine.
    sign_up("192.0.2.2", "6@b").await.unwrap();
    sign_up("127.0.0.1", "7@b").await.unwrap();
    let counted = "SELECT failures::text AS text FROM log_in_attempts WHERE failures > 0 ORDER BY 1";
    assert_eq!(server.database.texts(counted).await, ["1", "100"]);
}

/// Replaces the hash of everybody's password by another one of the same, while
/// `work` has verified it by the old one.
async fn with_the_hash_made_anew<T>(server: &TestServer, work: impl Future<Output = T>) -> T {
    let newer = bcrypt::hash(PASSWORD, 4).unwrap();
    let mut other = server.database.connect().await;
    other.batch_execute(&format!("BEGIN; UPDATE users SET password_hash = '{newer}'")).await.unwrap();
    let made_anew = async {
        while server.database.waiting_for_locks().await.is_empty() {}
        other.batch_execute("COMMIT").await.unwrap();
    };
    within_timeout("the work", join(work, made_anew)).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_right_though_its_hash_is_made_anew_meanwhile() {
    let server = TestServer::start().await;
    let mut user: User = server.customer().await;
    with_the_hash_made_anew(&server, log_in(&server, &user.email, PASSWORD)).await.unwrap();
    let request = pb::ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: "another horse".to_owned(),
    };
    with_the_hash_made_anew(&server, user.session.auth.change_password(request)).await.unwrap();
    log_in(&server, &user.email, "another horse").await.unwrap();
    assert_eq!(server.count("audit_entries WHERE act = 'log_in_failed'").await, 0);
    assert_eq!(server.count("log_in_attempts WHERE failures > 0").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_that_cannot_be_looked_at_is_not_a_failure() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    for in_doubt in [false, true] {
        failed(log_in(&server, &user.email, GUESS).await);
        // With one more everything is blocked for a minute; or the address and the
        // e-mail are already.
        let blocked = if in_doubt { "now() + interval '1 hour'" } else { "NULL" };
        let counted = format!(
            "UPDATE log_in_attempts SET failures = 3;
             UPDATE log_in_attempts SET failures = 24, blocked_until = {blocked} WHERE succeeded_at IS NULL"
        );
        server.database.connect().await.batch_execute(&counted).await.unwrap();
        let mut holder = server.database.connect().await;
        holder.batch_execute("BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let refused = within_timeout("a refusal", log_in(&server, &user.email, PASSWORD)).await;
        assert_refused(refused, Code::Unavailable, ErrorReason::DatabaseUnavailable);
        holder.batch_execute("COMMIT").await.unwrap();
        let counted = "SELECT failures::text AS text FROM log_in_attempts ORDER BY failures";
        within_timeout("the counts", async {
            while server.database.texts(counted).await != ["3", "24", "24"] {}
        })
        .await;
        log_in(&server, &user.email, PASSWORD).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_that_are_forgotten_are_removed_and_who_is_known_is_kept() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    guess_at_nobody(&server.from(STRANGER), 3).await;
    server.database.execute("UPDATE log_in_attempts SET last_at = now() - interval '16 minutes'").await;
    log_in(&server, &user.email, PASSWORD).await.unwrap();
    assert_eq!(server.count("log_in_attempts").await, 3, "the pair, the address and the e-mail");
    let of_users = "log_in_attempts WHERE succeeded_at IS NOT NULL";
    server.database.execute("UPDATE log_in_attempts SET last_at = now() - interval '29 days'").await;
    guess_at_nobody(&server.from(STRANGER), 1).await;
    assert_eq!(server.count(of_users).await, 1);
    server.database.execute("UPDATE log_in_attempts SET last_at = now() - interval '31 days'").await;
    guess_at_nobody(&server.from(STRANGER), 1).await;
    assert_eq!(server.count(of_users).await, 0);
}
