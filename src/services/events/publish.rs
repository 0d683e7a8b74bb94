//! The two ends of a publish stream: batches in, answers out.

use std::sync::Arc;

use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{EventApi, batch::UncheckedBatch};
use crate::{
    auth::Credential,
    error::{Error, Result},
    event_log::{PendingAnswer, StreamOrder},
    limits::{ERROR_QUOTE_CHARS, TEXT_CHARS},
    models::caller::Provider,
    pb,
    services::status::{reason, rpc_status},
    telemetry::metrics::Method,
};

/// A batch of a publish stream, on its way.
pub(super) struct Accepted {
    batch_id: String,
    outcome: Outcome,
}

enum Outcome {
    HandedIn(PendingAnswer),
    Failed(Error),
    /// The stream is broken off, or what it brought is no batch; as tonic says.
    Broken(Status),
}

impl Accepted {
    /// What the client is answered; an error ends the stream.
    pub(super) async fn answer(self, counted: &Method) -> Result<pb::PublishEventsResponse, Status> {
        let outcome = match self.outcome {
            Outcome::HandedIn(answer) => answer.wait().await,
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
        Ok(pb::PublishEventsResponse { batch_id: self.batch_id, outcome: Some(outcome) })
    }
}

/// Reads a publish stream and hands its batches in, one after the other, as
/// long as there is room for their answers.
pub(super) async fn accept(
    api: EventApi,
    provider: Provider,
    credential: Arc<Credential>,
    mut batches: Streaming<pb::PublishEventsRequest>,
    accepted: mpsc::Sender<Accepted>,
) {
    let stream_order = StreamOrder::default();
    // The stream of answers is gone when the client is.
    while let Ok(room) = accepted.reserve().await {
        let batch = tokio::select! {
            biased;
            () = credential.ended() => Err(Error::CredentialInvalid),
            () = api.0.draining.cancelled() => Err(Error::Draining),
            () = accepted.closed() => return,
            batch = batches.message() => match batch {
                Ok(Some(batch)) => Ok(batch),
                // Half-closed.
                Ok(None) => return,
                Err(status) => {
                    room.send(Accepted { batch_id: String::new(), outcome: Outcome::Broken(status) });
                    return;
                }
            },
        };
        let (batch_id, outcome) = match batch {
            Err(error) => (String::new(), Err(error)),
            Ok(batch) => {
                let batch_id = echo(&batch.batch_id);
                let handed_in = async {
                    credential.confirmed().await?;
                    let batch = UncheckedBatch::try_from(batch)?;
                    api.admit(&credential, provider, batch, stream_order.clone()).await
                };
                // The job's configuration and the log may keep it waiting.
                let handed_in = tokio::select! {
                    biased;
                    () = credential.ended() => Err(Error::CredentialInvalid),
                    () = accepted.closed() => return,
                    handed_in = handed_in => handed_in,
                };
                (batch_id, handed_in)
            }
        };
        let ends = outcome.as_ref().is_err_and(|error| !error.is_about_content());
        let outcome = outcome.map_or_else(Outcome::Failed, Outcome::HandedIn);
        room.send(Accepted { batch_id, outcome });
        if ends {
            return;
        }
    }
}

/// A batch's id as its answer has it: cut where it is refused for its length, so
/// that batches in flight cannot fill memory with their ids.
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
    fn an_id_that_is_too_long_is_echoed_shortly() {
        for character in ["x", "\u{1F9E0}"] {
            assert_eq!(echo(&character.repeat(256)), character.repeat(256));
            for length in [257, 100_000] {
                assert_eq!(echo(&character.repeat(length)), format!("{}…", character.repeat(64)));
            }
        }
    }
}
