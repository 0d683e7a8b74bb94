//! How many items the fields of requests may have, for [`prune`](super::prune::prune).

use crate::limits::{
    API_KEY_SCOPES, BATCH_EVENTS, CONFIGURATION_STEPS, EVENT_KINDS, JOB_LABELS, JOB_STATUSES, METADATA_NAMES,
    STEP_METADATA, UPDATE_MASK_PATHS,
};

/// The rules for the fields of a message, by number, which is less than 100. Fields of one number
/// or text need none.
#[derive(Debug)]
pub(super) struct Rules(&'static [(u32, Rule)]);

#[derive(Debug)]
pub(super) enum Rule {
    /// A message. If it is sent in pieces, these are one message.
    Message(&'static Rules),
    /// At most so many messages.
    Messages(usize, &'static Rules),
    /// A map of at most so many entries, each with these rules.
    Map(usize, &'static Rules),
    /// At most so many numbers, one by one or packed.
    Numbers(usize),
    /// At most so many texts.
    Texts(usize),
    /// A message that is refused if it is there at all: its content does not matter.
    Refused,
}

impl Rules {
    pub(super) fn of(&self, number: u32) -> Option<&'static Rule> {
        self.0.iter().find(|(ruled, _)| *ruled == number).map(|(_, rule)| rule)
    }
}

/// The rules of a request by the name of its message; none for a message that no server reads.
pub(super) fn rules_of(name: &str) -> Option<&'static Rules> {
    Some(match name {
        "AppendEventsRequest" => &Rules(&[(4, Rule::Messages(BATCH_EVENTS, &NEW_EVENT))]),
        "PublishEventsRequest" => &Rules(&[(5, Rule::Messages(BATCH_EVENTS, &NEW_EVENT))]),
        "RegisterJobConfigurationRequest" => {
            &Rules(&[(4, Rule::Messages(CONFIGURATION_STEPS, &STEP)), (5, Rule::Message(&NOTHING))])
        }
        "CreateJobRequest" => &Rules(&[(7, Rule::Message(&NOTHING)), (8, LABELS)]),
        "ListEventsRequest" => &Rules(&[(4, Rule::Numbers(EVENT_KINDS))]),
        "WatchEventsRequest" => &Rules(&[
            (3, Rule::Message(&ALL_JOBS)),
            (4, Rule::Numbers(EVENT_KINDS)),
            (7, Rule::Message(&NOTHING)),
            (8, Rule::Message(&NOTHING)),
        ]),
        "ListJobsRequest" | "SummarizeJobsRequest" => &Rules(&[(1, Rule::Message(&JOB_FILTER))]),
        "ExportJobsRequest" => &Rules(&[(1, Rule::Message(&JOB_FILTER)), (2, Rule::Message(&NOTHING))]),
        "ExportEventsRequest" => &Rules(&[
            (1, Rule::Message(&JOB_FILTER)),
            (2, Rule::Message(&NOTHING)),
            (3, Rule::Message(&NOTHING)),
            (4, Rule::Message(&NOTHING)),
            (5, Rule::Numbers(EVENT_KINDS)),
        ]),
        "UpdateCurrentUserRequest" => &Rules(&[(1, Rule::Message(&USER)), (2, Rule::Message(&FIELD_MASK))]),
        "CreateApiKeyRequest" => &Rules(&[(2, Rule::Message(&NOTHING)), (3, Rule::Numbers(API_KEY_SCOPES))]),
        "RotateApiKeyRequest" => &Rules(&[(2, Rule::Message(&NOTHING))]),
        "CreateWatchTokenRequest" => &Rules(&[(4, Rule::Message(&NOTHING))]),
        other if other.ends_with("Request") => &NOTHING,
        _ => return None,
    })
}

/// Of a message whose fields are numbers and texts.
const NOTHING: Rules = Rules(&[]);
const LABELS: Rule = Rule::Map(JOB_LABELS, &NOTHING);
const ALL_JOBS: Rules = Rules(&[(3, LABELS)]);
const JOB_FILTER: Rules = Rules(&[
    (1, Rule::Numbers(JOB_STATUSES)),
    (5, Rule::Message(&NOTHING)),
    (6, Rule::Message(&NOTHING)),
    (9, LABELS),
]);
const NEW_EVENT: Rules = Rules(&[(5, Rule::Message(&STRUCT)), (6, Rule::Message(&NOTHING))]);
const STRUCT: Rules = Rules(&[(1, Rule::Map(METADATA_NAMES, &STRUCT_ENTRY))]);
const STRUCT_ENTRY: Rules = Rules(&[(2, Rule::Message(&STRUCT_VALUE))]);
/// Metadata is flat.
const STRUCT_VALUE: Rules = Rules(&[(5, Rule::Refused), (6, Rule::Refused)]);
const STEP: Rules = Rules(&[
    (4, Rule::Messages(STEP_METADATA, &METADATA)),
    (6, Rule::Message(&NOTHING)),
    (7, Rule::Message(&NOTHING)),
]);
const METADATA: Rules = Rules(&[(5, Rule::Message(&NOTHING)), (6, Rule::Message(&NOTHING))]);
const USER: Rules = Rules(&[(6, Rule::Message(&NOTHING)), (7, Rule::Message(&NOTHING))]);
const FIELD_MASK: Rules = Rules(&[(1, Rule::Texts(UPDATE_MASK_PATHS))]);
