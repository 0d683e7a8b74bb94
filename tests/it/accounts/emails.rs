//! Which e-mails are the same, on databases of any locale, and which are refused.

use std::net::Ipv4Addr;

use milepost_client::pb::{self, ErrorReason};
use tonic::{Code, Status};

use crate::support::{
    Clients, PASSWORD, TestDatabase, TestServer, assert_refused, assert_violations, sign_up_request,
};

/// Spellings of one e-mail. Postgres's lower case takes them for two e-mails in some
/// locale, or in all.
const SAME: [(&str, &str); 7] = [
    ("info@example.com", "INFO@EXAMPLE.COM"),
    ("müller@example.com", "MÜLLER@example.com"),
    ("οδος@example.com", "ΟΔΟΣ@example.com"),
    ("zoë@example.com", "zoe\u{308}@example.com"),
    ("ÅSE@example.com", "a\u{30a}se@example.com"),
    ("straße@example.com", "STRAẞE@example.com"),
    ("kelvin@example.com", "\u{212A}elvin@example.com"),
];

/// Two e-mails each, though some foldings take them for one.
const DIFFERENT: [(&str, &str); 4] = [
    ("weiß@example.com", "weiss@example.com"),
    ("ida@example.com", "ıda@example.com"),
    ("ivo@example.com", "İvo@example.com"),
    ("fiona@example.com", "ﬁona@example.com"),
];

async fn sign_up(clients: &Clients, email: &str) -> Result<pb::User, Status> {
    let answer = clients.anonymous().auth.sign_up(sign_up_request(email)).await?.into_inner();
    Ok(answer.user.unwrap())
}

async fn log_in(clients: &Clients, email: &str, password: &str) -> Result<pb::User, Status> {
    let request = pb::LogInRequest { email: email.to_owned(), password: password.to_owned() };
    Ok(clients.anonymous().auth.log_in(request).await?.into_inner().user.unwrap())
}

/// Databases of the locales in which Postgres's lower case differs most.
async fn servers() -> Vec<(&'static str, TestServer)> {
    let mut servers = vec![("default", TestServer::start().await)];
    for locale in ["LOCALE 'C'", "LOCALE 'C.UTF-8'", "LOCALE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'tr'"] {
        servers.push((locale, TestServer::on(TestDatabase::with_locale(locale).await).await));
    }
    let lower_case = "SELECT lower('Iİß ΟΔΟΣ Ü') AS text";
    let mut lower_cases = Vec::new();
    for (_, server) in &servers {
        lower_cases.extend(server.database.texts(lower_case).await);
    }
    lower_cases.sort();
    lower_cases.dedup();
    assert_eq!(lower_cases.len(), 3, "locales that differ: {lower_cases:?}");
    servers
}

/// Guesses five times from one address, by both spellings in turn, and returns whether the
/// right password is refused then with the second one.
async fn is_throttled(server: &TestServer, address: Ipv4Addr, (one, other): (&str, &str)) -> bool {
    let remote = server.from(address);
    for email in [one, other, one, one, one] {
        let refused = log_in(&remote, email, "a wrong guess").await;
        assert_refused(refused, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    match log_in(&remote, other, PASSWORD).await {
        Ok(_) => false,
        answer => {
            assert_refused(answer, Code::ResourceExhausted, ErrorReason::LogInThrottled);
            true
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn emails_that_differ_in_case_or_normalization_are_one_on_every_locale() {
    for (locale, server) in servers().await {
        for (n, (one, other)) in SAME.into_iter().enumerate() {
            let case = format!("{one} {other} on {locale}");
            let user = sign_up(&server, one).await.unwrap();
            assert_eq!(user.email, one, "shown as given");
            let again = sign_up(&server, other).await;
            let refusal = assert_refused(again, Code::AlreadyExists, ErrorReason::EmailTaken);
            assert_eq!(refusal.fields, ["email"], "{case}");
            for email in [one, other] {
                assert_eq!(log_in(&server, email, PASSWORD).await.unwrap(), user, "{case}");
            }
            let address = Ipv4Addr::new(127, 0, 1, u8::try_from(n).unwrap());
            assert!(is_throttled(&server, address, (one, other)).await, "{case}");
        }
        assert_eq!(server.count("users").await, SAME.len(), "{locale}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn emails_that_simple_case_folding_keeps_apart_are_two_on_every_locale() {
    for (locale, server) in servers().await {
        for (n, (one, other)) in DIFFERENT.into_iter().enumerate() {
            let users = [sign_up(&server, one).await.unwrap(), sign_up(&server, other).await.unwrap()];
            for (email, user) in [one, other].into_iter().zip(&users) {
                assert_eq!(&log_in(&server, email, PASSWORD).await.unwrap(), user, "{email} on {locale}");
            }
            let address = Ipv4Addr::new(127, 0, 1, u8::try_from(n).unwrap());
            assert!(!is_throttled(&server, address, (one, other)).await, "{one} {other} on {locale}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_current_password_counts_on_the_email_whatever_its_spelling() {
    let server = TestServer::start().await;
    let email = "ΟΔΟΣ@example.com";
    let session = server.anonymous().auth.sign_up(sign_up_request(email)).await.unwrap().into_inner().session;
    let mut caller = server.with_secret(session.unwrap().secret);
    for _ in 0..5 {
        let request = pb::ChangePasswordRequest {
            current_password: "a wrong guess".to_owned(),
            new_password: PASSWORD.to_owned(),
        };
        assert_violations(caller.auth.change_password(request).await, &["current_password"]);
    }
    server.database.block_log_ins_for(30).await;
    let throttled = log_in(&server, "οδος@example.com", PASSWORD).await;
    assert_refused(throttled, Code::ResourceExhausted, ErrorReason::LogInThrottled);
}

/// The database refuses by itself what commands a terminal, whatever its locale.
#[tokio::test(flavor = "multi_thread")]
async fn emails_with_control_or_invisible_characters_are_refused() {
    for (locale, server) in servers().await {
        let user = sign_up(&server, "ada@example.com").await.unwrap();
        for character in [
            '\0', '\u{1b}', '\u{7f}', '\u{9b}', '\u{ad}', '\u{200b}', '\u{202e}', '\u{3000}', '\u{e000}',
            '\u{378}',
        ] {
            let email = format!("ada{character}@example.com");
            let refusal = assert_violations(sign_up(&server, &email).await, &["email"]);
            let description = &refusal.details.bad_request().unwrap().field_violations[0].description;
            assert!(!description.contains(character), "{description:?}");
        }
        for code in [1, 0x1b, 0x20, 0x7f, 0x80, 0x9b, 0xa0] {
            let set = format!("UPDATE users SET email = 'a' || chr({code}) || '@b' WHERE id = '{}'", user.id);
            let violated = server.database.violated_by(&set).await;
            assert_eq!(violated.as_deref(), Some("users_email_check"), "{code:x} on {locale}");
        }
        let set = "UPDATE users SET email = 'é' || chr(161) || '@ΟΔΟΣ'";
        assert_eq!(server.database.violated_by(set).await, None, "{locale}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_email_is_bounded_as_given_and_as_compared() {
    let server = TestServer::start().await;
    let grows = |count| format!("{}@b", "\u{1d160}".repeat(count));
    // NFC replaces this character by three.
    sign_up(&server, &grows(84)).await.unwrap();
    let refusal = assert_violations(sign_up(&server, &grows(85)).await, &["email"]);
    let description = &refusal.details.bad_request().unwrap().field_violations[0].description;
    assert!(description.contains("256"), "{description}");
    let unknown = log_in(&server, &grows(85), PASSWORD).await;
    assert_refused(unknown, Code::Unauthenticated, ErrorReason::LogInFailed);
}
