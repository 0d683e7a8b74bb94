//! Status and progress in answers. The unit tests of the rules are in
//! `src/progress.rs`.

use milepost_client::pb::{self, JobStatus};

use crate::support::{TestServer, complete, error, info, progress, registration, step};

fn percents(appended: &[pb::AppendedEvent]) -> Vec<i32> {
    appended.iter().map(|event| event.progress.unwrap().percent).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_step_does_not_change_the_progress() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1), ("segment", 2), ("report", 1)]).await;
    let one_batch = provider.append(&job, [step("load"), step("load"), step("segment")]).await;
    assert_eq!(percents(&one_batch), [25, 25, 75]);
    let another = provider.append(&job, [step("load"), step("segment"), step("report"), complete()]).await;
    assert_eq!(percents(&another), [75, 75, 99, 100]);
    assert_eq!(another.iter().map(|event| event.sequence).collect::<Vec<_>>(), [4, 5, 6, 7]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_without_steps_works_from_creation_to_100_percent() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[]).await;
    let nothing = pb::Progress { points_done: 0, points_total: 0, percent: 0 };
    assert_eq!(job.progress, Some(nothing));
    let appended = provider.append(&job, [info("started"), complete()]).await;
    assert_eq!(appended[0].progress, Some(nothing));
    assert_eq!(appended[1].progress, Some(pb::Progress { percent: 100, ..nothing }));

    let watched = customer.watch(&job).await.read_to_end().await;
    assert_eq!(watched.events.len(), 2);
    assert_eq!(watched.end.job.unwrap().progress, Some(pb::Progress { percent: 100, ..nothing }));
    assert_eq!(customer.get(&job).await.status(), JobStatus::Complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_event_without_a_step_tag_counts_nothing_and_recovers_a_failed_job() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    for (version, steps) in [("1.0.0", &[][..]), ("2.0.0", &[("load", 1), ("report", 3)])] {
        let total =
            provider.register(registration(version, steps)).await.steps.iter().map(|step| step.points).sum();
        let job = provider.job(&customer).await;
        let batch = [step(""), error("lost"), step(""), step("")];
        let appended = provider.append(&job, batch.clone()).await;
        use JobStatus::{Failed, Running};
        let statuses: Vec<_> = appended.iter().map(pb::AppendedEvent::status).collect();
        assert_eq!(statuses, [Running, Failed, Running, Running]);
        let nothing = pb::Progress { points_done: 0, points_total: total, percent: 0 };
        assert!(appended.iter().all(|event| event.progress == Some(nothing)), "{appended:?}");
        assert!(provider.append(&job, batch).await.iter().all(|event| event.existed));

        let first = customer.watch(&job).await.events(1).await.remove(0);
        assert_eq!(
            (first.kind(), first.step_tag, first.step_name),
            (pb::EventKind::Step, String::new(), String::new())
        );
        provider.append(&job, [complete()]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_without_points_weigh_one_each() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("a", 0), ("b", 0), ("c", 0)]).await;
    let appended = provider.append(&job, [step("b"), step("c")]).await;
    assert_eq!(percents(&appended), [33, 66]);
    assert_eq!(appended[1].progress.unwrap().points_total, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_job_recovers_with_the_next_step_and_not_with_an_info() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1), ("report", 1)]).await;
    let events =
        [step("load"), error("lost"), info("trying again"), step("report"), error("lost"), complete()];
    let appended = provider.append(&job, events).await;
    let statuses: Vec<_> = appended.iter().map(pb::AppendedEvent::status).collect();
    use JobStatus::{Complete, Failed, Running};
    assert_eq!(statuses, [Running, Failed, Failed, Running, Failed, Complete]);
    assert_eq!(percents(&appended), [50, 50, 50, 99, 99, 100]);

    // A later read of the events shows the same statuses.
    let replayed = provider.list(&job).await;
    assert_eq!(replayed.iter().map(pb::Event::status).collect::<Vec<_>>(), statuses);
    let job = provider.get(&job).await;
    assert_eq!((job.status(), job.last_sequence), (Complete, 6));
    assert_eq!(job.closed_at, replayed[5].created_at);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_percent_moves_within_steps_and_the_state_of_each_step_is_told() {
    let server = TestServer::start().await;
    let steps = [("load", 1), ("segment", 2), ("report", 1)];
    let (mut provider, mut customer, job) = server.job(&steps).await;
    let untold = pb::NewEvent { step_percent: None, ..progress("report", 0) };
    let within = pb::NewEvent { step_tag: "load".to_owned(), ..info("began") };
    let events = [within, progress("segment", 49), step("load"), progress("segment", 30), untold];
    let appended = provider.append(&job, events).await;
    assert_eq!(percents(&appended), [0, 24, 49, 49, 49]);
    assert_eq!(appended[4].progress.unwrap().points_done, 1);
    let listed = provider.list(&job).await;
    let told: Vec<_> = listed.iter().map(|event| (event.step_tag.as_str(), event.step_percent)).collect();
    let expected =
        [("load", None), ("segment", Some(49)), ("load", None), ("segment", Some(30)), ("report", None)];
    assert_eq!(told, expected);

    let mut watch = customer.watch(&job).await;
    let (watched, caught_up) = watch.caught_up().await;
    assert_eq!(watched, listed);
    use pb::StepStatus::{Done, ToCome, UnderWay};
    let states = |steps: &[pb::StepState]| -> Vec<(pb::StepStatus, i32)> {
        steps.iter().map(|step| (step.status(), step.percent)).collect()
    };
    let after_five = [(Done, 100), (UnderWay, 49), (UnderWay, 0)];
    assert_eq!(states(&caught_up.steps), after_five);
    assert_eq!(caught_up.steps[1].step_tag, "segment");
    let found = customer.find(&job).await;
    assert_eq!(found.steps, caught_up.steps);

    // A step that is done stays done; a failed job recovers.
    let events = [error("lost"), progress("load", 99), step("segment"), complete()];
    let appended = provider.append(&job, events).await;
    assert_eq!(percents(&appended), [49, 49, 75, 100]);
    use JobStatus::{Complete, Failed, Running};
    let statuses: Vec<_> = appended.iter().map(pb::AppendedEvent::status).collect();
    assert_eq!(statuses, [Failed, Running, Running, Complete]);
    assert_eq!(states(&customer.find(&job).await.steps), [(Done, 100), (Done, 100), (UnderWay, 0)]);

    // A watch of a job that has no event, and one of all jobs.
    let other = provider.job(&customer).await;
    let (_, caught_up) = customer.watch(&other).await.caught_up().await;
    assert_eq!(states(&caught_up.steps), [(ToCome, 0); 3]);
    let (_, caught_up) = customer.watch_all().await.caught_up().await;
    assert_eq!(caught_up.steps, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_reads_the_state_goes_on_within_a_step() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("segment", 1)]).await;
    provider.append(&job, [progress("segment", 50)]).await;
    let replica = server.replica().await;
    let appended = replica.same(&provider).append(&job, [progress("segment", 20), info("on")]).await;
    assert_eq!(percents(&appended), [50, 50]);
    assert_eq!(percents(&provider.append(&job, [progress("segment", 70)]).await), [70]);
}
