//! Status and progress are the same for every watcher at the same sequence.

use milepost::pb::JobStatus;

use crate::support::{TestServer, complete, error, info, step};

#[tokio::test(flavor = "multi_thread")]
async fn deterministic_for_whoever_watches_lists_or_appends() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 10), ("segment", 60), ("report", 30)]).await;
    let job = provider.job(&customer).await;
    let live = [customer.clone(), replica.same(&customer)].map(|mut customer| {
        let job = job.clone();
        async move { customer.watch(&job).await }
    });
    let live = futures_util::future::join_all(live).await;
    let mut told = Vec::new();
    for (n, event) in [
        step("load"),
        error("hm"),
        info("retrying"),
        step("load"),
        step("segment"),
        step("report"),
        complete(),
    ]
    .into_iter()
    .enumerate()
    {
        let mut caller = if n % 2 == 0 { provider.clone() } else { replica.same(&provider) };
        told.extend(caller.append(&job, [event]).await);
    }
    let told: Vec<_> = told.iter().map(|event| (event.sequence, event.status, event.progress)).collect();
    let film: Vec<_> = told
        .iter()
        .map(|(_, status, progress)| (JobStatus::try_from(*status).unwrap(), progress.unwrap().percent))
        .collect();
    assert_eq!(
        film,
        [
            (JobStatus::Running, 10),
            (JobStatus::Failed, 10),
            (JobStatus::Failed, 10),
            (JobStatus::Running, 10),
            (JobStatus::Running, 70),
            (JobStatus::Running, 99),
            (JobStatus::Complete, 100),
        ]
    );
    let mut films = vec![provider.list(&job).await, replica.same(&provider).list(&job).await];
    for watch in live {
        films.push(watch.film().await.events);
    }
    films.push(customer.clone().watch(&job).await.film().await.events);
    films.push(replica.same(&customer).watch(&job).await.film().await.events);
    for events in &films {
        assert_eq!(events, &films[0], "every field of every event is the same for everybody");
        let seen: Vec<_> =
            events.iter().map(|event| (event.sequence, event.status, event.progress)).collect();
        assert_eq!(seen, told);
    }
    let job = provider.get(&job).await;
    assert_eq!((job.last_sequence, job.status, job.progress), told[told.len() - 1]);
}
