//! `ExportJobs` and `ExportEvents`: all that matches, once each, by streams that can be resumed.

use std::{collections::VecDeque, pin::Pin, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use futures_util::{Stream, stream};
use prost::Message;
use tonic::Status;
use uuid::Uuid;

use super::{
    App,
    filter::job_filters,
    page::{QUERY_BYTES, binding_of},
    parse,
};
use crate::{
    auth::{Credential, StreamReset},
    db::read,
    error::{Error, Result, Violations},
    event_log::{EventExport, ExportPoint, ExportQuery, Exported},
    limits::{MESSAGE_BYTES, TOKEN_BYTES},
    models::{
        CreationCursor,
        caller::Viewer,
        job::{ExportPage, Job, JobFilters, WalkPoint},
        job_configuration::JobConfiguration,
    },
    pb::{self, export_events_response, export_jobs_response},
};

pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// First byte of a token: the version of its format.
const VERSION: u8 = 1;
/// Bytes of a message after which the next one begins. The other half of the largest message has
/// room for the item that passes this bound.
const BYTES: usize = MESSAGE_BYTES / 2;

type Binding = [u8; QUERY_BYTES];

fn encode(binding: Binding, point: ExportPoint) -> String {
    let ExportPoint { history, end, removals, until, walk, count } = point;
    let WalkPoint { job: CreationCursor { created_at, id }, sequence } = walk;
    let mut bytes = vec![VERSION];
    bytes.extend(binding);
    bytes.extend(history.into_bytes());
    bytes.extend(id.into_bytes());
    let (until, created_at) = (until.timestamp_micros(), created_at.timestamp_micros());
    for number in [end, removals, until, created_at, sequence, count] {
        bytes.extend(number.to_be_bytes());
    }
    URL_SAFE_NO_PAD.encode(bytes)
}

fn decode(token: &str) -> Option<(Binding, ExportPoint)> {
    if token.len() > TOKEN_BYTES {
        return None;
    }
    let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
    let (binding, rest) = bytes.strip_prefix(&[VERSION])?.split_first_chunk()?;
    let (history, rest) = rest.split_first_chunk()?;
    let (id, rest) = rest.split_first_chunk()?;
    let numbers: &[u8; 6 * 8] = rest.try_into().ok()?;
    let mut numbers = numbers.chunks_exact(8).map(|bytes| {
        let number = bytes.try_into().map(i64::from_be_bytes).ok();
        number.filter(|number| *number >= 0)
    });
    let mut number = || numbers.next().flatten();
    let (end, removals, until, created_at, sequence, count) =
        (number()?, number()?, number()?, number()?, number()?, number()?);
    let time = |micros| DateTime::from_timestamp_micros(micros).filter(|time| *time < latest());
    let job = CreationCursor { created_at: time(created_at)?, id: Uuid::from_bytes(*id) };
    let (history, walk) = (Uuid::from_bytes(*history), WalkPoint { job, sequence });
    Some((*binding, ExportPoint { history, end, removals, until: time(until)?, walk, count }))
}

/// Postgres cannot represent each later time of a forged token.
fn latest() -> DateTime<Utc> {
    DateTime::from_timestamp(253_402_300_800, 0).unwrap_or_default()
}

/// The point of the token, which is bound to the request; none for the empty one.
fn resumed(violations: &mut Violations, binding: Binding, token: &str) -> Option<ExportPoint> {
    if token.is_empty() {
        return None;
    }
    match decode(token) {
        Some((own, point)) if own == binding => return Some(point),
        Some(_) => violations.add("resume_token", "is of an export by another request"),
        None => violations.add("resume_token", "is not a token of this method"),
    }
    None
}

fn closed_before(
    violations: &mut Violations,
    filters: JobFilters,
    closed_before: Option<prost_types::Timestamp>,
) -> JobFilters {
    JobFilters { closed_before: parse::timestamp(violations, "closed_before", closed_before), ..filters }
}

/// A provider may not filter by a tag without configurations. A token is bound to its tag, which
/// was looked for when the export began.
async fn demand_tag(app: &App, viewer: Viewer, filters: &JobFilters, is_resumed: bool) -> Result<()> {
    match &filters.configuration_tag {
        Some(tag) if !is_resumed => {
            read!(app.database, viewer.tenant(), |conn| JobConfiguration::demand_tag(conn, viewer, tag))
        }
        _ => Ok(()),
    }
}

/// What both streams have in common.
struct Export {
    app: App,
    credential: Arc<Credential>,
    binding: Binding,
}

impl Export {
    /// Reads while the credential is valid and the server does not drain.
    async fn read<T>(&self, read: impl Future<Output = Result<T>>) -> Result<T> {
        let read = tokio::select! {
            biased;
            () = self.credential.ended() => Err(Error::CredentialInvalid),
            () = self.app.draining.cancelled() => Err(Error::Draining),
            read = read => read,
        };
        // Nothing is sent under a credential that may have ended.
        self.credential.confirmed().await?;
        read
    }

    fn token(&self, point: ExportPoint) -> String {
        encode(self.binding, point)
    }
}

pub(super) async fn jobs(
    app: &App,
    credential: Arc<Credential>,
    viewer: Viewer,
    reset: StreamReset,
    mut request: pb::ExportJobsRequest,
) -> Result<Answers<pb::ExportJobsResponse>> {
    let mut violations = Violations::default();
    let v = &mut violations;
    let token = std::mem::take(&mut request.resume_token);
    let binding = binding_of("ExportJobsRequest", viewer.id(), &request);
    let filters = job_filters(v, request.filter);
    let filters = closed_before(v, filters, request.closed_before);
    let point = resumed(v, binding, &token);
    let (filters, point) = violations.or((filters, point))?;
    demand_tag(app, viewer, &filters, point.is_some()).await?;
    let open = app.auth.open_stream(Arc::clone(&credential), reset)?;
    let export = Export { app: app.clone(), credential, binding };
    let state = JobExport { export, viewer, filters, point, waiting: VecDeque::new(), phase: Phase::Reading };
    let answers = stream::unfold((state, open), |(mut state, open)| async move {
        let answer = state.next().await.transpose()?;
        if answer.is_err() {
            state.phase = Phase::Ended;
        }
        Some((answer.map_err(Status::from), (state, open)))
    });
    Ok(Box::pin(answers))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Reading,
    /// Everything was read.
    Read,
    Ended,
}

struct JobExport {
    export: Export,
    viewer: Viewer,
    filters: JobFilters,
    /// Where the export is with what was read; none if it begins.
    point: Option<ExportPoint>,
    /// What was read and not sent yet, each with the point after it.
    waiting: VecDeque<(ExportPoint, pb::Job)>,
    phase: Phase,
}

impl JobExport {
    async fn next(&mut self) -> Result<Option<pb::ExportJobsResponse>> {
        use export_jobs_response::Message::{End, Jobs};
        while self.waiting.is_empty() && self.phase == Phase::Reading {
            self.read().await?;
        }
        let Some(last) = self.point else { return Ok(None) };
        let (mut jobs, mut bytes, mut point) = (Vec::new(), 0, last);
        while bytes < BYTES
            && let Some((after, job)) = self.waiting.pop_front()
        {
            bytes += job.encoded_len();
            jobs.push(job);
            point = after;
        }
        let message = if !jobs.is_empty() {
            Jobs(pb::ExportedJobs { jobs })
        } else if self.phase == Phase::Read {
            self.phase = Phase::Ended;
            End(pb::ExportEnd { count: last.count })
        } else {
            return Ok(None);
        };
        let resume_token = self.export.token(point);
        Ok(Some(pb::ExportJobsResponse { resume_token, message: Some(message) }))
    }

    async fn read(&mut self) -> Result<()> {
        let Self { export, viewer, filters, point, .. } = self;
        let before = *point;
        let reading = async {
            read!(export.app.database, viewer.tenant(), |conn| async {
                let point = match before {
                    Some(point) => point,
                    None => ExportPoint::begin(conn).await?,
                };
                let page = Job::list_for_export(conn, *viewer, filters, point.until, point.walk.job).await?;
                Ok((point, page))
            })
        };
        let (mut point, ExportPage { jobs, last, ends }) = export.read(reading).await?;
        // The page begins with the job that the export has come to.
        let new = jobs.into_iter().filter(|job| job.cursor() > point.walk.job);
        for job in new.collect::<Vec<_>>() {
            point.walk = WalkPoint { job: job.cursor(), sequence: 0 };
            point.count += 1;
            self.waiting.push_back((point, job.into()));
        }
        if let Some(last) = last {
            point.walk = WalkPoint { job: last, sequence: 0 };
        }
        self.point = Some(point);
        if ends {
            self.phase = Phase::Read;
        }
        Ok(())
    }
}

pub(super) async fn events(
    app: &App,
    credential: Arc<Credential>,
    viewer: Viewer,
    reset: StreamReset,
    mut request: pb::ExportEventsRequest,
) -> Result<Answers<pb::ExportEventsResponse>> {
    let mut violations = Violations::default();
    let v = &mut violations;
    let token = std::mem::take(&mut request.resume_token);
    let binding = binding_of("ExportEventsRequest", viewer.id(), &request);
    let filters = job_filters(v, request.filter);
    let filters = closed_before(v, filters, request.closed_before);
    let query = ExportQuery {
        viewer,
        filters,
        created_from: parse::timestamp(v, "created_from", request.created_from),
        created_before: parse::timestamp(v, "created_before", request.created_before),
        kinds: parse::event_kinds(v, &request.kinds),
    };
    if let (Some(from), Some(before)) = (query.created_from, query.created_before)
        && before < from
    {
        v.add("created_before", "must not be before created_from");
    }
    let point = resumed(v, binding, &token);
    let (query, point) = violations.or((query, point))?;
    demand_tag(app, viewer, &query.filters, point.is_some()).await?;
    let open = app.auth.open_stream(Arc::clone(&credential), reset)?;
    let export = Export { app: app.clone(), credential, binding };
    let reading = app.log.export(query, point);
    let state = EventStream { export, reading, waiting: VecDeque::new(), ended: false };
    let answers = stream::unfold((state, open), |(mut state, open)| async move {
        let answer = state.next().await.transpose()?;
        state.ended |= answer.is_err();
        Some((answer.map_err(Status::from), (state, open)))
    });
    Ok(Box::pin(answers))
}

struct EventStream {
    export: Export,
    reading: EventExport,
    /// What was read and not sent yet.
    waiting: VecDeque<(ExportPoint, export_events_response::Message)>,
    ended: bool,
}

impl EventStream {
    async fn next(&mut self) -> Result<Option<pb::ExportEventsResponse>> {
        while self.waiting.is_empty() && !self.ended {
            match self.export.read(self.reading.next()).await? {
                Some(exported) => self.take(exported)?,
                None => self.ended = true,
            }
        }
        Ok(self.waiting.pop_front().map(|(point, message)| pb::ExportEventsResponse {
            resume_token: self.export.token(point),
            message: Some(message),
        }))
    }

    /// Makes messages of what was read.
    fn take(&mut self, Exported { jobs, point, ends }: Exported) -> Result<()> {
        use export_events_response::Message::{End, Events};
        let total: usize = jobs.iter().map(|(_, events)| events.len()).sum();
        let mut at = ExportPoint { count: point.count - i64::try_from(total).unwrap_or(i64::MAX), ..point };
        let (mut message, mut bytes) = (pb::ExportedEvents::default(), 0);
        let mut messages = Vec::new();
        for (job, events) in jobs {
            let cursor = job.cursor();
            let job = pb::Job::from(job);
            if bytes > 0 && bytes + job.encoded_len() > BYTES {
                messages.push((at, std::mem::take(&mut message)));
                bytes = 0;
            }
            bytes += job.encoded_len();
            let mut of_job = pb::EventsOfJob { job: Some(job), events: Vec::with_capacity(events.len()) };
            for event in events {
                bytes += event.encoded.len();
                at.walk = WalkPoint { job: cursor, sequence: event.sequence };
                at.count += 1;
                of_job.events.push(event.message()?);
            }
            message.jobs.push(of_job);
        }
        if !message.jobs.is_empty() {
            messages.push((at, message));
        }
        // With the last of its messages, the export is where its reader is.
        if let Some((last, _)) = messages.last_mut() {
            *last = point;
        }
        self.waiting.extend(messages.into_iter().map(|(at, message)| (at, Events(message))));
        if ends {
            self.waiting.push_back((point, End(pb::ExportEnd { count: point.count })));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_says_where_the_export_is() {
        let time = |micros| DateTime::from_timestamp_micros(micros).expect("a time");
        let job = CreationCursor { created_at: time(1_700_000_000_123_456), id: Uuid::from_u128(3) };
        let point = ExportPoint {
            history: Uuid::from_u128(1),
            end: 9,
            removals: 2,
            until: time(1_700_000_001_000_000),
            walk: WalkPoint { job, sequence: 4 },
            count: 7,
        };
        for point in [point, ExportPoint { walk: WalkPoint::START, ..point }] {
            let token = encode([1; 8], point);
            assert!(token.len() <= 200, "{} characters", token.len());
            assert_eq!(decode(&token), Some(([1; 8], point)));
            assert_eq!(decode(&token[..token.len() - 4]), None);
            assert_eq!(decode(&format!("{token}AAAA")), None);
        }
        let bytes = URL_SAFE_NO_PAD.decode(encode([1; 8], point)).expect("base64");
        for at in (41..bytes.len()).step_by(8) {
            let mut bytes = bytes.clone();
            bytes[at] = 0x80;
            assert_eq!(decode(&URL_SAFE_NO_PAD.encode(bytes)), None, "at {at}");
        }
        assert_eq!(decode(&URL_SAFE_NO_PAD.encode([&[2], &bytes[1..]].concat())), None);
    }
}
