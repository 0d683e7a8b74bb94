//! The two halves of a publish stream: reading batches and sending answers.

use std::sync::Arc;

use tokio::{sync::mpsc, time::sleep};
use tonic::{Status, Streaming};

use super::{
    EventApi,
    batch::UncheckedBatch,
    submitted::{Found, Submitted},
};
use crate::{
    auth::{Credential, HeldBytes, HeldMessages},
    error::{Error, Result},
    event_log::{EventLog, StreamOrder},
    limits::{ERROR_QUOTE_CHARS, TEXT_CHARS},
    models::{caller::Provider, job::JobKey},
    pb,
    services::status::{reason, rpc_status},
    telemetry::metrics::Method,
};

/// A batch of a publish stream whose answer is not sent yet.
pub(super) struct Accepted {
    batch_id: String,
    outcome: Outcome,
    /// What the batch holds of its user's bytes in flight, until its answer was taken.
    held: Option<HeldBytes>,
}

enum Outcome {
    /// The event log has the batch and sends its answer here.
    Submitted(Submitted),
    Failed(Error),
    /// tonic's status for a stream that was reset or a message that does not decode.
    Broken(Status),
}

impl Accepted {
    /// Waits for the answer to the client, and returns with it what is held until the answer was
    /// taken. An error ends the stream.
    pub(super) async fn answer(
        self,
        counted: &Method,
    ) -> (Result<pb::PublishEventsResponse, Status>, Option<HeldBytes>) {
        let Self { batch_id, outcome, held } = self;
        (Self::response(batch_id, outcome, counted).await, held)
    }

    async fn response(
        batch_id: String,
        outcome: Outcome,
        counted: &Method,
    ) -> Result<pb::PublishEventsResponse, Status> {
        let outcome = match outcome {
            Outcome::Submitted(submitted) => submitted.answer().await,
            Outcome::Failed(error) => Err(error),
            Outcome::Broken(status) => return Err(status),
        };
        let outcome = match outcome {
            Ok(appended) => pb::publish_events_response::Outcome::Appended(appended.into()),
            Err(error) if error.is_about_content() => {
                counted.refused(reason(&error));
                pb::publish_events_response::Outcome::Refused(rpc_status(&error))
            }
            Err(error) => return Err(error.into()),
        };
        Ok(pb::PublishEventsResponse { batch_id, outcome: Some(outcome) })
    }
}

/// Reads a publish stream and submits its batches one after the other, as long as the
/// window has room for their answers.
pub(super) async fn accept(
    api: EventApi,
    provider: Provider,
    credential: Arc<Credential>,
    (mut batches, held): (Streaming<pb::PublishEventsRequest>, HeldMessages),
    accepted: mpsc::Sender<Accepted>,
) {
    let stream_order = StreamOrder::default();
    // The receiver is dropped when the client has closed the stream.
    while let Ok(permit) = accepted.reserve().await {
        let batch = tokio::select! {
            biased;
            () = credential.ended() => Err(Error::CredentialInvalid),
            () = api.0.draining.cancelled() => Err(Error::Draining),
            () = accepted.closed() => return,
            batch = batches.message() => match batch {
                Ok(Some(batch)) => Ok(batch),
                // The client has half-closed the stream.
                Ok(None) => return,
                Err(status) => {
                    let outcome = Outcome::Broken(status);
                    permit.send(Accepted { batch_id: String::new(), outcome, held: None });
                    return;
                }
            },
        };
        let held = held.pop();
        let (batch_id, outcome) = match batch {
            Err(error) => (String::new(), Err(error)),
            Ok(batch) => {
                let batch_id = echo(&batch.batch_id);
                let submitted = async {
                    // Before the wait for the credential, so that no message that is refused
                    // waits with it.
                    let batch = UncheckedBatch::try_from(batch)?;
                    credential.confirmed().await?;
                    let pause = api.0.auth.tenants().pace_events(provider.tenant(), batch.len());
                    if !pause.is_zero() {
                        let draining = api.0.draining.run_until_cancelled(sleep(pause)).await;
                        draining.ok_or(Error::Draining)?;
                    }
                    let (credential, order) = (Arc::clone(&credential), stream_order.clone());
                    let job = find_patiently(&api.0.log, provider, &batch.job).await?;
                    Submitted::new(&api.0.log, credential, provider, (job, batch), order, held.clone()).await
                };
                // Submitting may wait for the job's configuration and for the log.
                let submitted = tokio::select! {
                    biased;
                    () = credential.ended() => Err(Error::CredentialInvalid),
                    () = accepted.closed() => return,
                    submitted = submitted => submitted,
                };
                (batch_id, submitted)
            }
        };
        let ends = outcome.as_ref().is_err_and(|error| !error.is_about_content());
        let outcome = outcome.map_or_else(Outcome::Failed, Outcome::Submitted);
        permit.send(Accepted { batch_id, outcome, held });
        if ends {
            return;
        }
    }
}

/// Finds the job of a batch. While other calls of the user take the user's part of the database
/// connections, the stream waits.
async fn find_patiently(log: &EventLog, provider: Provider, key: &JobKey) -> Result<Found> {
    loop {
        match Found::by(log, provider, key).await {
            Err(Error::Overloaded { .. }) => {}
            found => return found,
        }
    }
}

/// Returns the batch id for the answer. An id that is refused for its length is cut, so
/// that batches in flight cannot fill the memory with their ids.
fn echo(batch_id: &str) -> String {
    if batch_id.chars().nth(TEXT_CHARS).is_none() {
        return batch_id.to_owned();
    }
    batch_id.chars().take(ERROR_QUOTE_CHARS).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_is_too_long_is_cut_in_the_answer() {
        for character in ["x", "\u{1F9E0}"] {
            assert_eq!(echo(&character.repeat(256)), character.repeat(256));
            for length in [257, 100_000] {
                assert_eq!(echo(&character.repeat(length)), format!("{}…", character.repeat(64)));
            }
        }
    }
}
