//! A backup of the database holds the whole state of milepost.

use std::process::{Command, Output};

use milepost_client::pb::{
    self, ErrorReason,
    watch_events_request::{Scope, Start},
};
use tonic::Code;

use crate::support::{TemporaryDir, TestServer, assert_refused, blocks, complete, info, step};

fn run(command: &mut Command) {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert!(status.success(), "{command:?}: {}", String::from_utf8_lossy(&stderr));
}

/// The role of milepost in the restored database. It may not create databases.
const ROLE: &str = "restorer";

fn watch_of_one(job: &pb::Job, start: Option<Start>) -> pb::WatchEventsRequest {
    pb::WatchEventsRequest { scope: Some(Scope::JobId(job.id.clone())), start, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_on_a_restored_dump_continues_its_jobs_and_watches() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1), ("report", 1)]).await;
    let (job, done) = (provider.job(&customer).await, provider.job(&customer).await);
    let sent = step("load");
    provider.append(&job, [info("begins"), sent.clone()]).await;
    provider.append(&done, [complete()]).await;
    let mut watch = customer.watch(&job).await;
    let (_, caught_up) = watch.caught_up().await;

    let (dir, source) = (TemporaryDir::new(), &server.database);
    source.execute(&format!("CREATE ROLE {ROLE}")).await;
    let url = format!("{}/restored?options=-c%20role%3D{ROLE}", source.url.rsplit_once('/').unwrap().0);
    let recipe = blocks("docs/backup.md", "sh");
    let shell = |commands: &str| {
        run(Command::new("bash")
            .args([
                "-euo",
                "pipefail",
                "-c",
                &commands.replace("--owner=milepost", &format!("--owner={ROLE}")),
            ])
            .current_dir(dir.path())
            .env("ADMIN_URL", &source.url)
            .env("DATABASE_URL", &source.url)
            .env("RESTORED_URL", &url));
    };
    let [dump, restore] = &recipe[..] else { panic!("a dump and a restore, not {recipe:?}") };
    // The dump is taken while the server runs.
    shell(dump);
    provider.append(&job, [info("after the backup")]).await;
    let mut of_lost = customer.watch(&job).await;
    of_lost.caught_up().await;
    let lost = Some(Start::ResumeToken(of_lost.resume_token));
    shell(restore);
    let restored = source.through(url.clone());
    let owners = "SELECT DISTINCT relowner::regrole::text AS text FROM pg_class
        WHERE relnamespace = 'public'::regnamespace";
    assert_eq!(restored.texts(owners).await, [ROLE]);

    let server = TestServer::on(restored).await;
    let (mut provider, mut customer) = (server.same(&provider), server.same(&customer));
    assert_eq!(provider.list(&job).await.len(), 2);
    let resumed = customer.watch_by(watch_of_one(&job, lost.clone())).await;
    assert_refused(resumed, Code::OutOfRange, ErrorReason::LogSetBack);
    let again = provider.append(&job, [sent, step("report")]).await;
    assert_eq!(
        again.iter().map(|event| (event.sequence, event.existed)).collect::<Vec<_>>(),
        [(2, true), (3, false)]
    );
    provider.append(&job, [complete()]).await;
    // The log has grown past that token.
    let resumed = customer.watch_by(watch_of_one(&job, lost)).await;
    assert_refused(resumed, Code::OutOfRange, ErrorReason::LogSetBack);
    let start = Some(Start::ResumeToken(watch.resume_token));
    let watched = customer.watch_from(&job, start).await.read_to_end().await;
    assert_eq!(caught_up.job.unwrap().last_sequence, 2);
    assert_eq!(watched.events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [3, 4]);
    assert_eq!(customer.get(&done).await.progress.unwrap().percent, 100);
}
