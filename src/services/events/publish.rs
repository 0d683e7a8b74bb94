//! The two ends of a publish stream: batches in, answers out.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tonic::{Status, Streaming};

use super::{EventApi, batch::UncheckedBatch};
use crate::{
    auth::Credential,
    error::{Error, Result},
    event_log::{Lane, answered, plan::Appended},
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
    HandedIn(oneshot::Receiver<Result<Vec<Appended>>>),
    Failed(Error),
    /// The stream is broken off, or what it brought is no batch; as tonic says.
    Broken(Status),
}

impl Accepted {
    /// What the client is answered; an error ends the stream.
    pub(super) async fn answer(self, counted: &Method) -> Result<pb::PublishEventsResponse, Status> {
        let outcome = match self.outcome {
            Outcome::HandedIn(answer) => answered(answer).await,
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
    let lane = Lane::default();
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
                let batch_id = batch.batch_id.clone();
                let handed_in = async {
                    credential.confirmed().await?;
                    let batch = UncheckedBatch::try_from(batch)?;
                    api.admit(provider, batch, lane.clone()).await
                };
                (batch_id, handed_in.await)
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
