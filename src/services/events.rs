//! EventService: appends, pages and watches.

use std::{collections::HashSet, pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, stream};
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::{App, page, parse, status::rpc_status};
use crate::{
    auth::Credential,
    error::{Error, Result, Violations, quoted},
    event_log::{
        Configuration, JobIdentity, Lane, answered,
        plan::{Appended, Batch, NewEvent, Step},
        watch::{Body, EndReason, Message, Scope, Start, Watch, WatchQuery},
        wire::LogEvent,
    },
    limits,
    models::{
        caller::{self, Provider},
        job::JobKey,
        job_configuration::MetadataKind,
    },
    pb::{self, event_service_server::EventService},
    progress::{EventKind, JobState},
};

/// EventService over the log.
#[derive(Clone, Debug)]
pub struct EventApi(pub App);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl EventService for EventApi {
    async fn append_events(
        &self,
        request: Request<pb::AppendEventsRequest>,
    ) -> Result<Response<pb::AppendEventsResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let provider = credential.caller().provider(caller::Scope::Append)?;
        let batch = UncheckedBatch::try_from(request.into_inner())?;
        let answer = self.admit(provider, batch, Lane::default()).await?;
        Ok(Response::new(answered(answer).await?.into()))
    }

    type PublishEventsStream = Answers<pb::PublishEventsResponse>;

    async fn publish_events(
        &self,
        request: Request<Streaming<pb::PublishEventsRequest>>,
    ) -> Result<Response<Self::PublishEventsStream>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let provider = credential.caller().provider(caller::Scope::Append)?;
        // One more than fits is the one whose answer is awaited.
        let (accepted, answers) = mpsc::channel(self.0.log.publish_window().max(2) - 1);
        tokio::spawn(accept(self.clone(), provider, credential, request.into_inner(), accepted));
        Ok(Response::new(Box::pin(stream::unfold(Some(answers), |answers| async move {
            let mut answers = answers?;
            match answers.recv().await?.answer().await {
                Ok(answer) => Some((Ok(answer), Some(answers))),
                Err(error) => Some((Err(error.into()), None)),
            }
        }))))
    }

    async fn list_events(
        &self,
        request: Request<pb::ListEventsRequest>,
    ) -> Result<Response<pb::ListEventsResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let viewer = credential.caller().viewer()?;
        let query = ListQuery::try_from(request.into_inner())?;
        let job = self.0.log.find_job(viewer, &query.job).await?;
        let (events, mut more) = self.0.log.list(&job, query.after, &query.kinds, query.limit).await?;
        let mut room = limits::MESSAGE_BYTES - 1024;
        let mut page = Vec::with_capacity(events.len());
        for event in events {
            let bytes = event.bytes + 16;
            if bytes > room && !page.is_empty() {
                more = page.last().map(|last: &pb::Event| last.sequence);
                break;
            }
            room = room.saturating_sub(bytes);
            page.push(event.message.clone());
        }
        let next_page_token =
            more.map(|after| page::encode(&query.binding, &after.to_be_bytes())).unwrap_or_default();
        Ok(Response::new(pb::ListEventsResponse { events: page, next_page_token }))
    }

    type WatchEventsStream = Answers<pb::WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<pb::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let viewer = credential.caller().viewer()?;
        let (scope, kinds, start, heartbeat) = watch_request(request.into_inner())?;
        let scope = match scope {
            UncheckedScope::Job(key) => Scope::Job(self.0.log.find_job(viewer, &key).await?),
            UncheckedScope::All { configuration_tag, counterpart_id } => {
                Scope::All { viewer, configuration_tag, counterpart_id }
            }
        };
        let query = WatchQuery { scope, kinds, start, heartbeat };
        let watch = self.0.log.watch(query, credential, self.0.draining.clone()).await?;
        Ok(Response::new(Box::pin(stream::unfold(Watching::Open(Box::new(watch)), watch_next))))
    }
}

impl EventApi {
    /// Hands a batch of valid shape to the log.
    async fn admit(
        &self,
        provider: Provider,
        batch: UncheckedBatch,
        lane: Lane,
    ) -> Result<oneshot::Receiver<Result<Vec<Appended>>>> {
        let job = self.0.log.find_own_job(provider, &batch.job).await?;
        self.0.log.submit(batch.for_job(job), lane).await
    }
}

/// A batch of a publish stream, on its way.
struct Accepted {
    batch_id: String,
    outcome: Outcome,
}

enum Outcome {
    HandedIn(oneshot::Receiver<Result<Vec<Appended>>>),
    Failed(Error),
}

impl Accepted {
    /// What the client is answered; an error ends the stream.
    async fn answer(self) -> Result<pb::PublishEventsResponse> {
        let outcome = match self.outcome {
            Outcome::HandedIn(answer) => answered(answer).await,
            Outcome::Failed(error) => Err(error),
        };
        let outcome = match outcome {
            Ok(appended) => pb::publish_events_response::Outcome::Appended(appended.into()),
            Err(error) if error.is_about_content() => {
                pb::publish_events_response::Outcome::Refused(rpc_status(&error))
            }
            Err(error) => return Err(error),
        };
        Ok(pb::PublishEventsResponse { batch_id: self.batch_id, outcome: Some(outcome) })
    }
}

/// Reads a publish stream and hands its batches in, one after the other, as
/// long as there is room for their answers.
async fn accept(
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
                // Half-closed, or broken: either way nothing more comes.
                Ok(None) | Err(_) => return,
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

enum Watching {
    Open(Box<Watch>),
    /// The last message was sent; the status that follows it, unless OK.
    Ending(Option<Error>),
}

async fn watch_next(watching: Watching) -> Option<(Result<pb::WatchEventsResponse, Status>, Watching)> {
    let mut watch = match watching {
        Watching::Open(watch) => watch,
        Watching::Ending(error) => return error.map(|error| (Err(error.into()), Watching::Ending(None))),
    };
    let message = match watch.next().await? {
        Ok(message) => message,
        Err(error) => return Some((Err(error.into()), Watching::Ending(None))),
    };
    let next = match &message.body {
        Body::End(reason, _) => Watching::Ending(match reason {
            EndReason::JobClosed => None,
            EndReason::Draining => Some(Error::Draining),
            EndReason::CredentialEnded => Some(Error::CredentialInvalid),
        }),
        Body::Events(_) | Body::CaughtUp(_) | Body::Heartbeat => Watching::Open(watch),
    };
    Some((Ok(message.into()), next))
}

impl From<Message> for pb::WatchEventsResponse {
    fn from(message: Message) -> Self {
        use pb::watch_events_response::Message as Kind;
        let kind = match message.body {
            Body::Events(events) => Kind::Events(pb::WatchedEvents {
                events: events.iter().map(|event: &Arc<LogEvent>| event.message.clone()).collect(),
            }),
            Body::CaughtUp(job) => Kind::CaughtUp(pb::CaughtUp { job: job.map(Into::into) }),
            Body::Heartbeat => Kind::Heartbeat(pb::Heartbeat {}),
            Body::End(reason, job) => {
                let reason = match reason {
                    EndReason::JobClosed => pb::WatchEndReason::JobClosed,
                    EndReason::Draining => pb::WatchEndReason::Draining,
                    EndReason::CredentialEnded => pb::WatchEndReason::CredentialEnded,
                };
                Kind::End(pb::WatchEnd { reason: reason.into(), job: job.map(Into::into) })
            }
        };
        Self { resume_token: message.resume_token, message: Some(kind) }
    }
}

impl From<JobState> for pb::JobState {
    fn from(state: JobState) -> Self {
        Self {
            last_sequence: state.last_sequence,
            status: pb::JobStatus::from(state.status).into(),
            progress: Some(state.progress.into()),
        }
    }
}

impl From<Vec<Appended>> for pb::AppendEventsResponse {
    fn from(events: Vec<Appended>) -> Self {
        let events = events.into_iter().map(|event| pb::AppendedEvent {
            id: event.id.to_string(),
            sequence: event.sequence,
            existed: event.existed,
            status: pb::JobStatus::from(event.status).into(),
            progress: Some(event.progress.into()),
        });
        Self { events: events.collect() }
    }
}

/// A batch of valid shape, not yet held against its job's configuration.
struct UncheckedBatch {
    job: JobKey,
    expected_sequence: Option<i64>,
    events: Vec<UncheckedEvent>,
}

struct UncheckedEvent {
    event: NewEvent,
    /// Empty: none.
    step_tag: String,
    metadata: prost_types::Struct,
}

impl TryFrom<pb::AppendEventsRequest> for UncheckedBatch {
    type Error = Error;

    fn try_from(request: pb::AppendEventsRequest) -> Result<Self> {
        use pb::append_events_request::Job;
        let key = request.job.map(|job| match job {
            Job::JobId(id) => RawKey::Id(id),
            Job::ProviderJobId(id) => RawKey::ProviderJobId(id),
        });
        batch(key, request.expected_sequence, request.events)
    }
}

impl TryFrom<pb::PublishEventsRequest> for UncheckedBatch {
    type Error = Error;

    fn try_from(request: pb::PublishEventsRequest) -> Result<Self> {
        use pb::publish_events_request::Job;
        let key = request.job.map(|job| match job {
            Job::JobId(id) => RawKey::Id(id),
            Job::ProviderJobId(id) => RawKey::ProviderJobId(id),
        });
        batch(key, request.expected_sequence, request.events)
    }
}

fn batch(
    key: Option<RawKey>,
    expected_sequence: Option<i64>,
    events: Vec<pb::NewEvent>,
) -> Result<UncheckedBatch> {
    let mut violations = Violations::default();
    let job = job_key(&mut violations, key);
    if expected_sequence.is_some_and(|expected| expected < 0) {
        violations.add("expected_sequence", "must not be negative");
    }
    if events.is_empty() || events.len() > limits::BATCH_EVENTS {
        violations.add("events", format!("must be 1 to {} events", limits::BATCH_EVENTS));
        return Err(Error::Invalid(violations));
    }
    let mut ids = HashSet::new();
    let mut unchecked = Vec::with_capacity(events.len());
    for (index, event) in events.into_iter().enumerate() {
        let event = unchecked_event(&mut violations, index, event);
        if let Some(id) = event.event.id
            && !ids.insert(id)
        {
            violations.add(format!("events[{index}].id"), "stands twice in this batch");
        }
        unchecked.push(event);
    }
    violations.or(UncheckedBatch { job, expected_sequence, events: unchecked })
}

fn unchecked_event(violations: &mut Violations, index: usize, event: pb::NewEvent) -> UncheckedEvent {
    let at = |field: &str| format!("events[{index}].{field}");
    let id = parse::optional_uuid(violations, &at("id"), &event.id);
    let kind = match pb::EventKind::try_from(event.kind) {
        Ok(pb::EventKind::Step) => EventKind::Step,
        Ok(pb::EventKind::Error) => EventKind::Error,
        Ok(pb::EventKind::Info) => EventKind::Info,
        Ok(pb::EventKind::Complete) => EventKind::Complete,
        Ok(pb::EventKind::Close) => {
            violations.add(at("kind"), "CLOSE is written by CloseJob only");
            EventKind::Close
        }
        Ok(pb::EventKind::Unspecified) | Err(_) => {
            violations.add(at("kind"), "must be STEP, ERROR, INFO or COMPLETE");
            EventKind::Info
        }
    };
    let name = parse::text(violations, &at("name"), event.name);
    let step_tag = parse::text(violations, &at("step_tag"), event.step_tag);
    if kind == EventKind::Step && step_tag.is_empty() {
        violations.add(at("step_tag"), "is required for STEP");
    }
    let metadata = event.metadata.unwrap_or_default();
    check_metadata(violations, &at("metadata"), &metadata);
    let occurred_at = parse::timestamp(violations, &at("occurred_at"), event.occurred_at);
    let encoded = metadata.encode_to_vec();
    let event = NewEvent { id, kind, name, step: Step::None, metadata: encoded, occurred_at };
    UncheckedEvent { event, step_tag, metadata }
}

/// Flat, of texts, finite numbers and booleans, within its limits.
fn check_metadata(violations: &mut Violations, field: &str, metadata: &prost_types::Struct) {
    use prost_types::value::Kind;
    if metadata.fields.len() > limits::METADATA_NAMES {
        violations.add(field, format!("must have at most {} names", limits::METADATA_NAMES));
        return;
    }
    if metadata.encoded_len() > limits::METADATA_BYTES {
        violations.add(field, format!("must be at most {} bytes encoded", limits::METADATA_BYTES));
        return;
    }
    for (name, value) in &metadata.fields {
        if name.contains('\0') || name.chars().count() > limits::TEXT_CHARS {
            violations
                .add(field, format!("a name must be at most {} characters, without NUL", limits::TEXT_CHARS));
        }
        let wrong = match &value.kind {
            Some(Kind::StringValue(text)) if text.contains('\0') => "must not contain NUL",
            Some(Kind::NumberValue(number)) if !number.is_finite() => "must be finite",
            Some(Kind::StringValue(_) | Kind::NumberValue(_) | Kind::BoolValue(_)) => continue,
            Some(Kind::StructValue(_) | Kind::ListValue(_)) => "must not be nested",
            Some(Kind::NullValue(_)) | None => "must not be null",
        };
        violations.add(format!("{field}.{}", quoted(name)), wrong);
    }
}

impl UncheckedBatch {
    /// Held against the job's configuration; what is at fault is told by the
    /// log, after what comes before it.
    fn for_job(self, job: Arc<JobIdentity>) -> Batch {
        let mut at_fault = Violations::default();
        let configuration = &job.configuration;
        let events = self.events.into_iter().enumerate().map(|(index, unchecked)| {
            let UncheckedEvent { mut event, step_tag, metadata } = unchecked;
            if !step_tag.is_empty() {
                event.step = match configuration.step(&step_tag) {
                    None => {
                        at_fault
                            .add(format!("events[{index}].step_tag"), unknown_step(&step_tag, configuration));
                        Step::Unknown
                    }
                    Some((position, step)) => {
                        for declared in &step.metadata {
                            let value =
                                metadata.fields.get(&declared.name).and_then(|value| value.kind.as_ref());
                            if let Some(wrong) = value.and_then(|value| mismatch(declared.kind, value)) {
                                let name = quoted(&declared.name);
                                at_fault.add(format!("events[{index}].metadata.{name}"), wrong);
                            }
                        }
                        Step::Known(position)
                    }
                };
            }
            event
        });
        let events = events.collect();
        Batch { expected_sequence: self.expected_sequence, events, at_fault, job }
    }
}

/// Names the steps that there are, as far as an error has room for them.
fn unknown_step(tag: &str, configuration: &Configuration) -> String {
    let tree = &configuration.tree;
    let mut known = String::new();
    for step in &tree.steps {
        let separator = if known.is_empty() { "" } else { ", " };
        if known.len() + step.tag.len() > 4 * limits::ERROR_QUOTE_CHARS {
            known.push_str(separator);
            known.push('…');
            break;
        }
        known.push_str(separator);
        known.push_str(&quoted(&step.tag));
    }
    if known.is_empty() {
        known.push_str("none");
    }
    format!("{} is no step of {} {}; known: {known}", quoted(tag), quoted(&tree.tag), tree.version)
}

fn mismatch(declared: MetadataKind, value: &prost_types::value::Kind) -> Option<&'static str> {
    use prost_types::value::Kind;
    match (declared, value) {
        (MetadataKind::Number, Kind::NumberValue(_)) | (MetadataKind::Text, Kind::StringValue(_)) => None,
        (MetadataKind::Link, Kind::StringValue(text)) if is_link(text) => None,
        (MetadataKind::Number, _) => Some("must be a number"),
        (MetadataKind::Text, _) => Some("must be a text"),
        (MetadataKind::Link, _) => Some("must be an absolute http or https URL"),
    }
}

fn is_link(text: &str) -> bool {
    text.parse::<http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
    })
}

/// A job as a request names it.
enum RawKey {
    Id(String),
    ProviderJobId(String),
}

fn job_key(violations: &mut Violations, key: Option<RawKey>) -> JobKey {
    match key {
        Some(RawKey::Id(id)) => JobKey::Id(parse::uuid(violations, "job_id", &id)),
        Some(RawKey::ProviderJobId(id)) => {
            JobKey::ProviderJobId(parse::key_text(violations, "provider_job_id", id))
        }
        None => {
            violations.add("job_id", "or provider_job_id is required");
            JobKey::Id(Uuid::nil())
        }
    }
}

fn event_kinds(violations: &mut Violations, kinds: &[i32]) -> Vec<EventKind> {
    let mut parsed = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        let kind = match pb::EventKind::try_from(*kind) {
            Ok(pb::EventKind::Step) => EventKind::Step,
            Ok(pb::EventKind::Error) => EventKind::Error,
            Ok(pb::EventKind::Info) => EventKind::Info,
            Ok(pb::EventKind::Complete) => EventKind::Complete,
            Ok(pb::EventKind::Close) => EventKind::Close,
            Ok(pb::EventKind::Unspecified) | Err(_) => {
                violations.add(format!("kinds[{index}]"), "is no kind of event");
                continue;
            }
        };
        if !parsed.contains(&kind) {
            parsed.push(kind);
        }
    }
    parsed
}

struct ListQuery {
    job: JobKey,
    after: i64,
    kinds: Vec<EventKind>,
    limit: i64,
    /// What its page tokens are bound to.
    binding: Vec<u8>,
}

impl TryFrom<pb::ListEventsRequest> for ListQuery {
    type Error = Error;

    fn try_from(request: pb::ListEventsRequest) -> Result<Self> {
        use pb::list_events_request::Job;
        let mut violations = Violations::default();
        let key = request.job.map(|job| match job {
            Job::JobId(id) => RawKey::Id(id),
            Job::ProviderJobId(id) => RawKey::ProviderJobId(id),
        });
        let job = job_key(&mut violations, key);
        if request.after_sequence < 0 {
            violations.add("after_sequence", "must not be negative");
        }
        let kinds = event_kinds(&mut violations, &request.kinds);
        let limit = parse::page_size(&mut violations, request.page_size);
        let binding = format!("ListEvents {job:?} {} {kinds:?}", request.after_sequence).into_bytes();
        let mut after = request.after_sequence;
        if let Some(cursor) = page::decode(&mut violations, "page_token", &binding, &request.page_token) {
            match <[u8; 8]>::try_from(cursor.as_slice()) {
                Ok(bytes) => after = i64::from_be_bytes(bytes),
                Err(_) => violations.add("page_token", "is no token of this service"),
            }
        }
        violations.or(Self { job, after, kinds, limit, binding })
    }
}

enum UncheckedScope {
    Job(JobKey),
    All { configuration_tag: String, counterpart_id: Option<Uuid> },
}

fn watch_request(
    request: pb::WatchEventsRequest,
) -> Result<(UncheckedScope, Vec<EventKind>, Start, Duration)> {
    use pb::watch_events_request::{Scope as RawScope, Start as RawStart};
    let mut violations = Violations::default();
    let scope = match request.scope {
        Some(RawScope::JobId(id)) => UncheckedScope::Job(job_key(&mut violations, Some(RawKey::Id(id)))),
        Some(RawScope::ProviderJobId(id)) => {
            UncheckedScope::Job(job_key(&mut violations, Some(RawKey::ProviderJobId(id))))
        }
        Some(RawScope::AllJobs(all)) => UncheckedScope::All {
            configuration_tag: parse::text(
                &mut violations,
                "all_jobs.configuration_tag",
                all.configuration_tag,
            ),
            counterpart_id: parse::optional_uuid(
                &mut violations,
                "all_jobs.counterpart_id",
                &all.counterpart_id,
            ),
        },
        None => {
            violations.add("job_id", "or provider_job_id or all_jobs is required");
            UncheckedScope::Job(JobKey::Id(Uuid::nil()))
        }
    };
    let kinds = event_kinds(&mut violations, &request.kinds);
    let start = match request.start {
        None => Start::Beginning,
        Some(RawStart::AfterSequence(sequence)) => {
            if sequence < 0 {
                violations.add("after_sequence", "must not be negative");
            }
            if let UncheckedScope::All { .. } = scope {
                violations.add("after_sequence", "is for a watch of one job");
            }
            Start::AfterSequence(sequence)
        }
        Some(RawStart::ResumeToken(token)) => Start::Resume(token),
        Some(RawStart::FromNow(_)) => Start::Now,
    };
    let (shortest, default, longest) = limits::HEARTBEAT;
    let heartbeat = match request.heartbeat_interval.map(Duration::try_from) {
        None => default,
        Some(Ok(interval)) => interval.clamp(shortest, longest),
        Some(Err(_)) => {
            violations.add("heartbeat_interval", "must not be negative");
            default
        }
    };
    violations.or((scope, kinds, start, heartbeat))
}
