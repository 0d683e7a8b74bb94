//! Parsing of `ListEventsRequest` and `WatchEventsRequest`.

use std::time::Duration;

use uuid::Uuid;

use crate::{
    error::{Result, Violations},
    event_log::{ResumeToken, Start},
    limits,
    models::{job::JobKey, labels::Labels},
    pb,
    progress::EventKind,
    services::{
        jobs::{job_id, job_key, no_job, provider_job_id},
        page::PageRequest,
        parse,
    },
};

/// The content of a `ListEventsRequest`.
pub(super) struct ListQuery {
    pub(super) job: JobKey,
    after_sequence: i64,
    pub(super) kinds: Vec<EventKind>,
    pub(super) page: PageRequest<i64>,
}

impl ListQuery {
    /// `caller` is the id to which page tokens are bound.
    pub(super) fn parse(caller: Uuid, mut request: pb::ListEventsRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let page = PageRequest::take(&mut violations, caller, &mut request);
        let job = job_key!(&mut violations, request.job, list_events_request);
        if request.after_sequence < 0 {
            violations.add("after_sequence", "must not be negative");
        }
        let kinds = parse::event_kinds(&mut violations, &request.kinds);
        violations.or(Self { job, after_sequence: request.after_sequence, kinds, page })
    }

    /// The sequence after which the page starts.
    pub(super) fn after(&self) -> i64 {
        self.page.after.unwrap_or(self.after_sequence)
    }
}

/// The scope of a watch, whose job is not read yet.
pub(super) enum UncheckedScope {
    Job(JobKey),
    All { configuration_tag: String, counterpart_id: Option<Uuid>, labels: Labels },
}

pub(super) fn watch_request(
    request: pb::WatchEventsRequest,
) -> Result<(UncheckedScope, Vec<EventKind>, Start, Duration)> {
    use pb::watch_events_request::{Scope as RawScope, Start as RawStart};
    let mut violations = Violations::default();
    let v = &mut violations;
    let scope = match request.scope {
        Some(RawScope::JobId(id)) => UncheckedScope::Job(job_id(v, &id)),
        Some(RawScope::ProviderJobId(id)) => UncheckedScope::Job(provider_job_id(v, id)),
        Some(RawScope::AllJobs(all)) => UncheckedScope::All {
            configuration_tag: parse::optional_key_text(
                v,
                "all_jobs.configuration_tag",
                all.configuration_tag,
            )
            .unwrap_or_default(),
            counterpart_id: parse::optional_uuid(v, "all_jobs.counterpart_id", &all.counterpart_id),
            labels: parse::labels(v, "all_jobs.labels", all.labels),
        },
        None => UncheckedScope::Job(no_job(v, "scope")),
    };
    let kinds = parse::event_kinds(&mut violations, &request.kinds);
    let start = match request.start {
        None => Start::Beginning,
        Some(RawStart::AfterSequence(sequence)) => {
            if sequence < 0 {
                violations.add("after_sequence", "must not be negative");
            }
            if let UncheckedScope::All { .. } = scope {
                violations.add("after_sequence", "is valid only in a watch of one job");
            }
            Start::AfterSequence(sequence)
        }
        Some(RawStart::ResumeToken(token)) => ResumeToken::parse(&token).map_or_else(
            || {
                violations.add("resume_token", "is not a token of this service");
                Start::Beginning
            },
            Start::Resume,
        ),
        Some(RawStart::FromNow(_)) => Start::Now,
    };
    let (shortest, default, longest) = limits::HEARTBEAT;
    let heartbeat = match request.heartbeat_interval.map(parse::not_negative) {
        None => default,
        Some(Some(interval)) => interval.clamp(shortest, longest),
        Some(None) => {
            violations.add("heartbeat_interval", "must not be negative");
            default
        }
    };
    violations.or((scope, kinds, start, heartbeat))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_interval_is_cut_to_5_to_60_seconds() {
        let parsed = |heartbeat_interval| {
            let scope = Some(pb::watch_events_request::Scope::AllJobs(pb::AllJobs::default()));
            let request = pb::WatchEventsRequest { scope, heartbeat_interval, ..Default::default() };
            watch_request(request).map(|(.., heartbeat)| heartbeat.as_secs_f64())
        };
        let given = |seconds, nanos| parsed(Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(parsed(None).expect("valid"), 15.0);
        for (seconds, nanos, cut) in [
            (0, 0, 5.0),
            (4, 999_999_999, 5.0),
            (5, 0, 5.0),
            (5, 500_000_000, 5.5),
            (60, 0, 60.0),
            (60, 1, 60.0),
            (i64::MAX, i32::MAX, 60.0),
        ] {
            assert_eq!(given(seconds, nanos).expect("valid"), cut, "{seconds} {nanos}");
        }
        assert!(given(-1, 0).is_err() && given(i64::MIN, i32::MIN).is_err());
    }
}
