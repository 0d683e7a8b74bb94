//! Servers that start before their database does.

use std::process::Stdio;

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::Instant,
};

use crate::support::{Mode, PATIENCE, Proxy, ServerProcess, TestDatabase, within_patience};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_starts_before_its_database_waits_for_it() {
    let database = TestDatabase::migrated().await;
    for mode in [Mode::Refuse, Mode::Starting] {
        let proxy = Proxy::to(&database.url).await;
        proxy.set(mode);
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
        let mut log = BufReader::new(server.stderr.take().unwrap()).lines();
        let mut said = BufReader::new(server.stdout.take().unwrap()).lines();
        let waits = within_patience("a word about it", log.next_line()).await.unwrap().unwrap();
        assert!(waits.contains("waiting for the database"), "{waits}");
        proxy.set(Mode::Pass);
        let serves = within_patience("the server", said.next_line()).await.unwrap();
        assert!(serves.is_some_and(|line| line.contains("listens")));
        server.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_waits_no_longer_than_it_is_told() {
    let proxy = Proxy::to(&TestDatabase::migrated().await.url).await;
    proxy.set(Mode::Refuse);
    let refusal = ServerProcess::refused_with(&proxy.url, &["--database-start-timeout-s", "1"]).await;
    let last = refusal.lines().last().unwrap();
    assert!(last.starts_with("milepost: the database did not answer for"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waiting_does_not_cure_is_told_at_once_in_one_line() {
    let database = TestDatabase::migrated().await;
    let elsewhere = database.url.replace("/test_", "/no_such_");
    let nobody = database.url.replace("//milepost@", "//nobody@");
    for (url, word) in
        [(&elsewhere, "no_such_"), (&nobody, "nobody"), (&"postgresql:nonsense".to_owned(), "connect")]
    {
        assert_ne!(*url, database.url);
        let started = Instant::now();
        let refusal = ServerProcess::refused_on(url).await;
        assert!(refusal.contains(word) && refusal.lines().count() == 1, "{refusal}");
        assert!(started.elapsed() < PATIENCE / 2, "it waited");
    }
}
