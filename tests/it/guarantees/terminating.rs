//! The watch of a job ends by itself, with a reason, once the job is closed.

use milepost_client::pb::{self, EventKind, JobStatus, WatchEndReason, watch_events_request};

use crate::support::{TestServer, complete, error, info, step};

#[tokio::test(flavor = "multi_thread")]
async fn watches_on_either_replica_end_once_the_job_is_closed() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 4), ("report", 1)]).await;
    for (events, closing, status, percent) in [
        (vec![step("load"), complete()], false, JobStatus::Complete, 100),
        (vec![step("load")], true, JobStatus::Cancelled, 80),
        (vec![step("load"), error("broken")], true, JobStatus::Failed, 80),
        (vec![], true, JobStatus::Cancelled, 0),
    ] {
        let job = provider.job(&customer).await;
        let (mut here, mut there) = (customer.clone(), replica.same(&customer));
        let mut watches = [here.watch(&job).await, there.watch(&job).await];
        for watch in &mut watches {
            assert_eq!(watch.caught_up().await.0, []);
        }
        let count = events.len() + usize::from(closing);
        if !events.is_empty() {
            provider.append(&job, events).await;
        }
        if closing {
            assert!(!provider.close(&job).await.unwrap().existed);
        }
        let late = [here.watch(&job).await, there.watch(&job).await];
        for (watch, past) in
            watches.into_iter().map(|watch| (watch, None)).chain(late.map(|w| (w, Some(count))))
        {
            let watched = watch.read_to_end().await;
            assert_eq!(watched.end.reason(), WatchEndReason::JobClosed);
            assert_eq!(watched.past, past);
            assert_eq!(watched.events.len(), count);
            let state = watched.end.job.unwrap();
            assert_eq!(usize::try_from(state.last_sequence).unwrap(), count);
            assert_eq!((state.status(), state.progress.unwrap().percent), (status, percent));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kinds_filter_hides_neither_the_end_nor_the_state_of_the_job() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let request = pb::WatchEventsRequest {
        scope: Some(watch_events_request::Scope::JobId(job.id.clone())),
        kinds: vec![EventKind::Error.into()],
        ..Default::default()
    };
    let watch = customer.watch_by(request.clone()).await.unwrap();
    provider.append(&job, [info("a"), error("b"), step("load")]).await;
    provider.append(&job, [complete()]).await;
    for watch in [watch, customer.watch_by(request).await.unwrap()] {
        let watched = watch.read_to_end().await;
        assert_eq!(watched.events.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["b"]);
        let state = watched.end.job.unwrap();
        assert_eq!((state.last_sequence, state.status()), (4, JobStatus::Complete));
    }
}
