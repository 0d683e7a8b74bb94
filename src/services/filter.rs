//! Parsing of `JobFilter`.

use crate::{
    error::Violations,
    limits::{JOB_STATUSES, SEARCH_TEXT_CHARS},
    models::job::{JobFilters, SearchText},
    pb,
    progress::JobStatus,
    services::parse,
};

/// The field `filter`.
pub(super) fn job_filters(violations: &mut Violations, filter: Option<pb::JobFilter>) -> JobFilters {
    let (v, filter) = (violations, filter.unwrap_or_default());
    let filters = JobFilters {
        statuses: statuses(v, &filter.statuses),
        open: open(v, filter.openness),
        configuration_tag: parse::optional_key_text(v, "filter.configuration_tag", filter.configuration_tag),
        counterpart_id: parse::optional_uuid(v, "filter.counterpart_id", &filter.counterpart_id),
        created_from: parse::timestamp(v, "filter.created_from", filter.created_from),
        created_before: parse::timestamp(v, "filter.created_before", filter.created_before),
        provider_job_id_prefix: parse::text(
            v,
            "filter.provider_job_id_prefix",
            filter.provider_job_id_prefix,
        ),
        provider_job_name_prefix: parse::text(
            v,
            "filter.provider_job_name_prefix",
            filter.provider_job_name_prefix,
        ),
        labels: parse::labels(v, "filter.labels", filter.labels),
        text: search_text(v, filter.text),
        closed_before: None,
    };
    if let (Some(from), Some(before)) = (filters.created_from, filters.created_before)
        && before < from
    {
        v.add("filter.created_before", "must not be before filter.created_from");
    }
    filters
}

fn search_text(violations: &mut Violations, text: String) -> Option<SearchText> {
    if text.is_empty() {
        return None;
    }
    if text.chars().nth(SEARCH_TEXT_CHARS - 1).is_none() {
        violations.add("filter.text", format!("must have at least {SEARCH_TEXT_CHARS} characters"));
    }
    Some(SearchText::new(&parse::text(violations, "filter.text", text)))
}

fn statuses(violations: &mut Violations, given: &[i32]) -> Vec<JobStatus> {
    if given.len() > JOB_STATUSES {
        violations.add("filter.statuses", format!("must be at most {JOB_STATUSES}"));
        return Vec::new();
    }
    parse::distinct(violations, "filter.statuses", given, |given| {
        format!("{given} is not one of PENDING, RUNNING, STALLED, FAILED, COMPLETE and CANCELLED")
    })
}

fn open(violations: &mut Violations, given: i32) -> Option<bool> {
    match pb::JobOpenness::try_from(given) {
        Ok(pb::JobOpenness::Unspecified) => None,
        Ok(pb::JobOpenness::Open) => Some(true),
        Ok(pb::JobOpenness::Closed) => Some(false),
        Err(_) => {
            violations.add("filter.openness", format!("{given} is neither OPEN nor CLOSED"));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::jobs::tests::fields;

    #[test]
    fn unknown_statuses_are_refused_and_repeated_ones_are_kept_once() {
        let parsed = |given: &[i32]| Violations::check(|violations| statuses(violations, given));
        assert_eq!(parsed(&[2, 1, 2]).expect("valid"), [JobStatus::Running, JobStatus::Pending]);
        assert_eq!(fields(parsed(&[1, 0, 7])), ["filter.statuses[1]", "filter.statuses[2]"]);
        assert_eq!(fields(parsed(&[1; 7])), ["filter.statuses"]);
    }
}
