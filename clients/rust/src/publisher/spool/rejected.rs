//! The files that tell what was refused.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::{self, Write as _},
    path::Path,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use prost::Message as _;

use super::super::{Refusal, Refused};
use crate::pb::AppendEventsRequest;

/// Writes a refusal as one JSON object. A file that is there already tells the same.
pub(super) fn write(file: &Path, refusal: &Refusal, fsync: bool) -> io::Result<()> {
    let mut file = File::create(file)?;
    file.write_all(json(refusal).as_bytes())?;
    if fsync { file.sync_all() } else { Ok(()) }
}

fn json(Refusal { refused, error }: &Refusal) -> String {
    let (kind, request, readable) = match refused {
        Refused::Job(request) => ("CreateJobRequest", request.encode_to_vec(), format!("{request:?}")),
        Refused::Event { job, event } => {
            let (job, events) = (Some(job.clone()), vec![event.clone()]);
            let request = AppendEventsRequest { job, events, expected_sequence: None };
            ("AppendEventsRequest", request.encode_to_vec(), format!("{request:?}"))
        }
        Refused::Damaged(bytes) => ("damaged", bytes.clone(), String::new()),
    };
    let violation = |violation: &tonic_types::FieldViolation| {
        let (field, description) = (Text(&violation.field), Text(&violation.description));
        format!("{{\"field\": {field}, \"description\": {description}}}")
    };
    let details: Vec<String> = error.violations().iter().map(violation).collect();
    let (code, reason) =
        (error.code_name(), error.reason().map_or("null".to_owned(), |text| Text(text).to_string()));
    format!(
        "{{\n  \"code\": \"{code}\",\n  \"reason\": {reason},\n  \"message\": {message},\n  \"details\": [{details}],\n  \
         \"kind\": \"{kind}\",\n  \"request\": \"{request}\",\n  \"readable\": {readable}\n}}\n",
        message = Text(error.message()),
        details = details.join(", "),
        request = BASE64_STANDARD.encode(request),
        readable = Text(&readable),
    )
}

/// A text as JSON.
struct Text<'a>(&'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for letter in self.0.chars() {
            match letter {
                '"' | '\\' => write!(f, "\\{letter}")?,
                '\0'..='\x1f' => write!(f, "\\u{:04x}", u32::from(letter))?,
                _ => f.write_char(letter)?,
            }
        }
        f.write_char('"')
    }
}
