//! `EventService`: appends, publish streams, pages and watches of events.

mod batch;
mod publish;
mod requests;
mod submitted;

use std::sync::Arc;

use futures_util::{StreamExt as _, stream};
use opentelemetry::trace::FutureExt as _;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use self::{
    batch::UncheckedBatch,
    publish::accept,
    requests::{ListQuery, UncheckedScope, watch_request},
    submitted::{Found, Submitted},
};
use super::{
    Answer, App, Encoding, Peer, credential_of,
    export::{self, Answers},
    held_bytes, held_messages,
    jobs::step_states,
    page::Page,
};
use crate::{
    db::read,
    error::{Error, Result},
    event_log::{Appended, Body, EndReason, Filter, Message, Scope, Start, StreamOrder, Watch, WatchQuery},
    models::{caller::KeyScope, job_configuration::JobConfiguration},
    pb::{self, event_service_server::EventService},
    progress::JobState,
    proto_enums::{ProtoEnum as _, timestamp},
    telemetry::metrics::Open,
};

#[derive(Clone, Debug)]
pub struct EventApi(pub App);

/// The method under which the answers of a publish stream are counted.
const PUBLISH: &str = "/milepost.v1.EventService/PublishEvents";

#[tonic::async_trait]
impl EventService for EventApi {
    async fn append_events(
        &self,
        request: Request<pb::AppendEventsRequest>,
    ) -> Answer<pb::AppendEventsResponse> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let held = held_bytes(&request);
        let batch = UncheckedBatch::try_from(request.into_inner())?;
        self.0.auth.tenants().count_events(provider.tenant(), batch.len())?;
        let order = StreamOrder::default();
        let job = Found::by(&self.0.log, provider, &batch.job).await?;
        let submitted = Submitted::new(&self.0.log, credential, provider, (job, batch), order, held).await?;
        Ok(Response::new(submitted.answer().await?.into()))
    }

    type PublishEventsStream = Answers<pb::PublishEventsResponse>;

    async fn publish_events(
        &self,
        request: Request<Streaming<pb::PublishEventsRequest>>,
    ) -> Answer<Self::PublishEventsStream> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let open = self.0.auth.open_stream(Arc::clone(&credential), Peer::of(&request).reset)?;
        // The channel holds one less than the window, because the batch whose answer is
        // awaited has left it.
        let (accepted, answers) = mpsc::channel(self.0.log.settings.publish_window.max(2) - 1);
        let held = held_messages(&request);
        let accepting =
            accept(self.clone(), provider, Arc::clone(&credential), (request.into_inner(), held), accepted);
        // The batches are traced as part of this call.
        tokio::spawn(accepting.with_current_context());
        let metrics = &self.0.telemetry.metrics;
        let (counted, method) = (Open::of(&metrics.appends.streams), Arc::clone(metrics.method(PUBLISH)));
        let answers = stream::unfold(Some((answers, credential, method, None)), |state| async move {
            let (mut answers, credential, method, taken) = state?;
            // The transport asks for the next answer when it has taken the one before.
            drop(taken);
            let (answer, held) = answers.recv().await?.answer(&method).await;
            // No answer is sent under a credential that may have ended.
            match credential.confirmed().await.map_err(Status::from).and(answer) {
                Ok(answer) => Some((Ok(answer), Some((answers, credential, method, held)))),
                Err(status) => Some((Err(status), None)),
            }
        });
        // The stream counts as open until tonic has taken the last answer.
        let answers = answers.inspect(move |_| _ = (&open, &counted));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn list_events(&self, request: Request<pb::ListEventsRequest>) -> Answer<pb::ListEventsResponse> {
        let credential = credential_of(&request)?;
        let viewer = credential.caller().viewer()?;
        let query = ListQuery::parse(viewer.id(), request.into_inner())?;
        let job = self.0.log.jobs.find(viewer, &query.job).await?;
        let (events, mut more) =
            self.0.log.list(viewer.tenant(), &job, query.after(), &query.kinds, query.page.size).await?;
        let mut page = Page::default();
        for event in events {
            if !page.push(event.message()?) {
                more = page.items.last().map(|last: &pb::Event| last.sequence);
                break;
            }
        }
        let next_page_token = query.page.next_token(more.as_ref());
        Ok(Response::new(pb::ListEventsResponse { events: page.items, next_page_token }))
    }

    type ExportEventsStream = Answers<pb::ExportEventsResponse>;

    async fn export_events(
        &self,
        request: Request<pb::ExportEventsRequest>,
    ) -> Answer<Self::ExportEventsStream> {
        let credential = credential_of(&request)?;
        let viewer = credential.caller().user_viewer()?;
        let reset = Peer::of(&request).reset;
        Ok(Response::new(export::events(&self.0, credential, viewer, reset, request.into_inner()).await?))
    }

    type WatchEventsStream = Answers<pb::WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<pb::WatchEventsRequest>,
    ) -> Answer<Self::WatchEventsStream> {
        let credential = credential_of(&request)?;
        let viewer = match request.get_ref().scope {
            Some(pb::watch_events_request::Scope::AllJobs(_)) => credential.caller().user_viewer()?,
            _ => credential.caller().viewer()?,
        };
        let (peer, encoding) = (Peer::of(&request), Encoding::of(&request));
        let (scope, kinds, start, heartbeat) = watch_request(request.into_inner())?;
        let scope = match scope {
            UncheckedScope::Job(key) => Scope::Job(self.0.log.jobs.find(viewer, &key).await?),
            UncheckedScope::All { configuration_tag, counterpart_id, labels } => {
                // A token is bound to its tag, which was looked for when the watch began.
                if !configuration_tag.is_empty() && !matches!(start, Start::Resume(_)) {
                    read!(self.0.database, viewer.tenant(), |conn| {
                        JobConfiguration::demand_tag(conn, viewer, &configuration_tag)
                    })?;
                }
                Scope::All { viewer, configuration_tag, counterpart_id, labels }
            }
        };
        let query = WatchQuery { filter: Filter::new(scope, kinds), start, heartbeat };
        let open = self.0.auth.open_stream(Arc::clone(&credential), peer.reset)?;
        let watch = self.0.log.watch(query, credential, self.0.draining.clone()).await?;
        let messages = stream::unfold((Watching::Open(Box::new(watch)), encoding), watch_next);
        // The stream counts as open until tonic has taken the last message.
        let messages = messages.inspect(move |_| _ = &open);
        Ok(Response::new(Box::pin(messages)))
    }
}

enum Watching {
    Open(Box<Watch>),
    /// The last message was sent. The error is the status that follows; none is OK.
    Ending(Option<Error>),
}

async fn watch_next(
    (watching, encoding): (Watching, Encoding),
) -> Option<(Result<pb::WatchEventsResponse, Status>, (Watching, Encoding))> {
    let ending = |error| (Watching::Ending(error), encoding);
    let mut watch = match watching {
        Watching::Open(watch) => watch,
        Watching::Ending(error) => return error.map(|error| (Err(error.into()), ending(None))),
    };
    let message = match watch.next().await? {
        Ok(message) => message,
        Err(error) => return Some((Err(error.into()), ending(None))),
    };
    let next = match &message.body {
        Body::End(reason, job) => ending(match reason {
            EndReason::JobClosed => None,
            EndReason::Draining => Some(Error::Draining),
            EndReason::CredentialEnded => Some(Error::CredentialInvalid),
            EndReason::LogSetBack => Some(Error::LogSetBack),
            EndReason::EventsExpired => {
                Some(Error::EventsExpired { first_sequence: job.as_ref().map(|job| job.last_sequence + 1) })
            }
        }),
        Body::Events(_) | Body::CaughtUp(_) | Body::Heartbeat => (Watching::Open(watch), encoding),
    };
    Some(match watch_response(message, encoding) {
        Ok(response) => (Ok(response), next),
        Err(error) => (Err(error.into()), ending(None)),
    })
}

fn watch_response(message: Message, encoding: Encoding) -> Result<pb::WatchEventsResponse> {
    use pb::watch_events_response::Message as Kind;
    let kind = match message.body {
        Body::Events(events) => {
            let encoded: Result<_> = match encoding {
                Encoding::Protobuf => Ok(events.iter().map(|event| event.encoded.clone()).collect()),
                Encoding::Json => events.iter().map(|event| event.json()).collect(),
            };
            Kind::Events(pb::WatchedEvents::from_encoded(encoded?))
        }
        Body::CaughtUp(job) => {
            let steps = job.as_ref().map(|(job, configuration)| step_states(configuration, &job.steps));
            let job = job.map(|(job, _)| job.into());
            Kind::CaughtUp(pb::CaughtUp { job, steps: steps.unwrap_or_default() })
        }
        Body::Heartbeat => Kind::Heartbeat(pb::Heartbeat {}),
        Body::End(reason, job) => {
            let reason = match reason {
                EndReason::JobClosed => pb::WatchEndReason::JobClosed,
                EndReason::Draining => pb::WatchEndReason::Draining,
                EndReason::CredentialEnded => pb::WatchEndReason::CredentialEnded,
                EndReason::EventsExpired => pb::WatchEndReason::EventsExpired,
                EndReason::LogSetBack => pb::WatchEndReason::LogSetBack,
            };
            Kind::End(pb::WatchEnd { reason: reason.into(), job: job.map(Into::into) })
        }
    };
    Ok(pb::WatchEventsResponse { resume_token: message.resume_token, message: Some(kind) })
}

impl From<JobState> for pb::JobState {
    fn from(state: JobState) -> Self {
        Self {
            last_sequence: state.last_sequence,
            status: state.status.to_proto(),
            progress: Some(state.progress.into()),
        }
    }
}

impl From<Appended> for pb::AppendEventsResponse {
    fn from(appended: Appended) -> Self {
        let events = appended.events.into_iter().map(|event| pb::AppendedEvent {
            id: event.id.to_string(),
            sequence: event.sequence,
            existed: event.existed,
            status: event.status.to_proto(),
            progress: Some(event.progress.into()),
        });
        let cancellation_requested_at = appended.cancellation_requested_at.map(timestamp);
        Self { events: events.collect(), cancellation_requested_at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server may have tens of thousands of open watches.
    #[test]
    fn a_waiting_watch_takes_little_memory() {
        fn size<F>(_: fn((Watching, Encoding)) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = size(watch_next) + size_of::<Watch>();
        assert!(bytes <= 1_100, "{bytes} bytes");
    }
}
