//! Servers that start before their database, or cannot connect to it.

use std::process::Stdio;

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::Instant,
};

use crate::support::{AT_ONCE, Mode, Proxy, ServerProcess, TestDatabase, within_timeout};

/// A starting server that has logged that it waits for the database.
async fn waiting(proxy: &Proxy) -> Child {
    let mut server = Command::new(env!("CARGO_BIN_EXE_milepost"))
        .arg("serve")
        .env("DATABASE_URL", &proxy.url)
        .env("MILEPOST_UNSAFE_DATABASE", "true")
        .env("MILEPOST_LISTEN", "127.0.0.1:0")
        .env("MILEPOST_LOG_FORMAT", "json")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut log = BufReader::new(server.stderr.as_mut().unwrap()).lines();
    let waits = within_timeout("the first line of the log", log.next_line()).await.unwrap().unwrap();
    assert!(waits.contains("waiting for the database"), "{waits}");
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_starts_before_its_database_waits_for_it() {
    let database = TestDatabase::migrated().await;
    for mode in [Mode::Refuse, Mode::Starting] {
        let proxy = Proxy::to(&database.url).await;
        proxy.set(mode);
        let mut server = waiting(&proxy).await;
        let mut stdout = BufReader::new(server.stdout.take().unwrap()).lines();
        proxy.set(Mode::Pass);
        let serves = within_timeout("the server to listen", stdout.next_line()).await.unwrap();
        assert!(serves.is_some_and(|line| line.contains("listens")));
        server.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_a_server_that_waits_for_its_database() {
    let proxy = Proxy::to(&TestDatabase::migrated().await.url).await;
    proxy.set(Mode::Refuse);
    for signal in ["TERM", "INT"] {
        let mut server = waiting(&proxy).await;
        let (signalled, pid) = (Instant::now(), server.id().expect("it runs").to_string());
        let sent = Command::new("kill").args(["-s", signal, &pid]).status().await.unwrap();
        assert!(sent.success());
        let ended = within_timeout("the exit", server.wait()).await.unwrap();
        assert_eq!(ended.code(), Some(0), "{signal}");
        assert!(signalled.elapsed() < AT_ONCE, "the server did not exit at once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_waits_no_longer_than_its_timeout() {
    let proxy = Proxy::to(&TestDatabase::migrated().await.url).await;
    proxy.set(Mode::Refuse);
    let refusal = ServerProcess::refused_with(&proxy.url, &["--database-start-timeout-s", "1"]).await;
    let last = refusal.lines().last().unwrap();
    assert!(last.starts_with("milepost: the database did not answer for"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn permanent_connection_errors_are_reported_at_once_in_one_line() {
    let database = TestDatabase::migrated().await;
    let proxy = Proxy::to(&database.url).await;
    let (user, place) = proxy.url.split_once('@').unwrap();
    let (address, name) = place.split_once('/').unwrap();
    let socket_dir = database.url.split_once('@').unwrap().1.split_once('/').unwrap().0.replace("%2F", "/");
    for (url, words) in [
        (database.url.replace("/test_", "/no_such_"), [socket_dir.as_str(), "no_such_"]),
        (database.url.replace("//milepost@", "//nobody:secret@"), [&socket_dir, "nobody"]),
        ("postgresql:secret".to_owned(), ["DATABASE_URL", "postgresql://"]),
        ("postgresql://milepost:secret@/milepost".to_owned(), ["DATABASE_URL", "no host"]),
        (format!("{}?gssencmode=disable", database.url), ["DATABASE_URL", "gssencmode"]),
        (
            format!("{}?target_session_attrs=standby", database.url),
            ["target_session_attrs=standby", "primary"],
        ),
        (format!("{}?sslmode=verify-full", proxy.url), [address, "sslmode"]),
        (format!("{}?channel_binding=require", proxy.url), [address, "channel_binding=require"]),
        (
            format!("{user}:secret@{address},{address}/{name}?sslmode=require"),
            [&format!("cannot connect to the database: {address}: "), &format!("; {address}: ")],
        ),
    ] {
        assert!(url != database.url && url != proxy.url);
        let started = Instant::now();
        let refusal = ServerProcess::refused_on(&url).await;
        assert!(refusal.lines().count() == 1 && !refusal.contains("secret"), "{refusal}");
        for word in words {
            assert!(refusal.contains(word), "{word:?} is not in {refusal}");
        }
        assert!(started.elapsed() < AT_ONCE, "the server did not exit at once");
    }
}
