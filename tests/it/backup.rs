//! A backup of the database is a backup of everything.

use std::process::{Command, Output};

use milepost::pb::watch_events_request::Start;

use crate::support::{TemporaryDir, TestDatabase, TestServer, complete, info, step};

fn succeed(command: &mut Command) {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert!(status.success(), "{command:?}: {}", String::from_utf8_lossy(&stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_dump_is_served_and_goes_on_where_it_was_taken() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1), ("report", 1)]).await;
    let (job, done) = (provider.job(&customer).await, provider.job(&customer).await);
    let sent = step("load");
    provider.append(&job, [info("begins"), sent.clone()]).await;
    provider.append(&done, [complete()]).await;
    let mut watch = customer.watch(&job).await;
    let (_, caught_up) = watch.caught_up().await;

    let dir = TemporaryDir::new();
    let dump = dir.path().join("milepost.dump");
    // While it is served.
    succeed(Command::new("pg_dump").args(["--format=custom", "--file"]).arg(&dump).arg(&server.database.url));
    provider.append(&job, [info("after the backup")]).await;
    let restored = TestDatabase::empty().await;
    succeed(
        Command::new("pg_restore")
            .args(["--no-owner", "--exit-on-error", "--dbname"])
            .arg(&restored.url)
            .arg(&dump),
    );

    let server = TestServer::on(restored).await;
    let (mut provider, mut customer) = (server.same(&provider), server.same(&customer));
    assert_eq!(provider.list(&job).await.len(), 2);
    let again = provider.append(&job, [sent, step("report")]).await;
    assert_eq!(
        again.iter().map(|event| (event.sequence, event.existed)).collect::<Vec<_>>(),
        [(2, true), (3, false)]
    );
    provider.append(&job, [complete()]).await;
    let start = Some(Start::ResumeToken(watch.resume_token));
    let film = customer.watch_from(&job, start).await.film().await;
    assert_eq!(caught_up.job.unwrap().last_sequence, 2);
    assert_eq!(film.events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [3, 4]);
    assert_eq!(customer.get(&done).await.progress.unwrap().percent, 100);
}
