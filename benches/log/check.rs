//! Checks that exactly the acknowledged events are stored: each once, with its
//! sequence, and no others.

use std::collections::BTreeMap;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost_client::{Client, pb};
use uuid::Uuid;

use crate::{Result, events::Acked, store::Store};

/// Number of logs that are read back concurrently.
const AT_ONCE: usize = 8;

/// Reads logs back; it remembers the last checked sequence of each.
#[derive(Default)]
pub(crate) struct Checker {
    checked: BTreeMap<usize, i64>,
}

impl Checker {
    /// Reads with `ListEvents` the events appended since the last check and compares
    /// them with the acknowledged ones.
    pub(crate) async fn check(&mut self, client: &Client, jobs: &[String], acked: &[Acked]) -> Result<()> {
        let mut logs: BTreeMap<usize, BTreeMap<i64, Uuid>> = BTreeMap::new();
        for event in acked {
            if logs.entry(event.log).or_default().insert(event.sequence, event.id).is_some() {
                return Err(format!("sequence {} was acknowledged twice", event.sequence).into());
            }
        }
        let checks = logs.into_iter().map(|(log, acked)| {
            let after = self.checked.get(&log).copied().unwrap_or(0);
            async move { Ok::<_, crate::Error>((log, compare(client, &jobs[log], after, &acked).await?)) }
        });
        let checked: Vec<(usize, i64)> = stream::iter(checks).buffer_unordered(AT_ONCE).try_collect().await?;
        self.checked.extend(checked);
        Ok(())
    }
}

/// Compares a job's log after a sequence, and returns its last sequence.
async fn compare(client: &Client, job: &str, after: i64, acked: &BTreeMap<i64, Uuid>) -> Result<i64> {
    let mut expected = acked.iter();
    let mut last = after;
    let mut request = pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(job.to_owned())),
        after_sequence: after,
        page_size: 500,
        ..Default::default()
    };
    loop {
        let page = client.events().list_events(request.clone()).await?.into_inner();
        for event in page.events {
            let stored = (event.sequence, event.id.parse::<Uuid>()?);
            if event.sequence != last + 1 {
                return Err(format!("job {job} has event {} after event {last}", event.sequence).into());
            }
            last = event.sequence;
            if expected.next() != Some((&stored.0, &stored.1)) {
                return Err(
                    format!("event {last} of job {job} has another id than the acknowledged event").into()
                );
            }
        }
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    match expected.next() {
        None => Ok(last),
        Some((sequence, _)) => {
            Err(format!("event {sequence} of job {job} was acknowledged, but is not stored").into())
        }
    }
}

/// Checks that a peer has stored as many events since then as it has acknowledged.
pub(crate) async fn check_peer(store: &Store, before: i64, acked: &[Acked]) -> Result<()> {
    let (stored, acked) = (store.stored().await? - before, i64::try_from(acked.len())?);
    if stored == acked {
        Ok(())
    } else {
        Err(format!("a peer acknowledged {acked} events, but stored {stored}").into())
    }
}
