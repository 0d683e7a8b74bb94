//! Takes out of an encoded message what its rules do not allow, so that no message is much
//! larger in memory than it was sent: a message of 1 MiB has room for 500,000 empty events.
//!
//! Of a field with too many items one more than the limit is kept, and of metadata that is
//! nested only that it is. So the message that is decoded is small, and is refused by the same
//! validation, with the same answer, as if it had been decoded whole. Groups, which are always
//! unknown fields, are taken out: prost decodes them with a limit on their depth, to which a
//! caller could not do anything. What remains of a message within its limits is the same bytes.

use prost::encoding::encode_varint;

use super::{
    rules::{Rule, Rules},
    wire::{Field, Fields, Malformed, Value, delimited_key},
};

/// The message without what its rules do not allow; none if all of it is allowed.
pub(super) fn prune(rules: &Rules, message: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
    if is_allowed(rules, message, Items::default().at_start())? {
        return Ok(None);
    }
    let mut pruned = Vec::new();
    write(rules, message, &mut pruned)?;
    Ok(Some(pruned))
}

/// How many items each field of a message has so far, and of the messages within it that are not
/// repeated: these may be sent in pieces. A field is named by its path.
#[derive(Default)]
struct Items(Vec<(u32, usize)>);

impl Items {
    /// Where the outermost message counts.
    fn at_start(&mut self) -> Counter<'_> {
        Counter { items: self, path: 0 }
    }
}

/// Counts the items of the fields of one message.
struct Counter<'a> {
    items: &'a mut Items,
    /// The numbers of the fields that lead to the message, two digits each.
    path: u32,
}

impl Counter<'_> {
    /// The path of a field of this message.
    fn path(&self, field: u32) -> u32 {
        self.path * 100 + field
    }

    /// Counts the items of the message in this field.
    fn within(&mut self, field: u32) -> Counter<'_> {
        Counter { path: self.path(field), items: self.items }
    }

    /// How many items the field has so far.
    fn of(&mut self, field: u32) -> &mut usize {
        let path = self.path(field);
        let known = self.items.0.iter().position(|(counted, _)| *counted == path);
        let index = known.unwrap_or_else(|| {
            self.items.0.push((path, 0));
            self.items.0.len() - 1
        });
        &mut self.items.0[index].1
    }
}

/// Whether nothing is to be taken out.
fn is_allowed(rules: &Rules, message: &[u8], mut counter: Counter<'_>) -> Result<bool, Malformed> {
    let mut fields = Fields(message);
    while let Some(field) = fields.next()? {
        let allowed = match (rules.of(field.number), field.value) {
            (_, Value::Group) => false,
            (Some(Rule::Message(inner)), Value::Delimited(content)) => {
                is_allowed(inner, content, counter.within(field.number))?
            }
            (Some(Rule::Messages(most, inner) | Rule::Map(most, inner)), Value::Delimited(content)) => {
                let items = counter.of(field.number);
                *items += 1;
                *items <= *most && is_allowed(inner, content, Items::default().at_start())?
            }
            (Some(Rule::Numbers(most) | Rule::Texts(most)), _) => {
                let items = counter.of(field.number);
                *items += scalars(rules.of(field.number), &field);
                *items <= *most
            }
            (Some(Rule::Refused), Value::Delimited(content)) => content.is_empty(),
            // Of another type than the field has: prost refuses that.
            (Some(_) | None, Value::Varint | Value::Fixed | Value::Delimited(_)) => true,
        };
        if !allowed {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How many numbers or texts a field has.
fn scalars(rule: Option<&Rule>, field: &Field<'_>) -> usize {
    match (rule, field.value) {
        (Some(Rule::Numbers(_)), Value::Delimited(packed)) => {
            packed.iter().filter(|byte| **byte < 0x80).count()
        }
        _ => 1,
    }
}

/// Writes what is allowed of a message, and one item more of what has too many.
fn write(rules: &Rules, message: &[u8], to: &mut Vec<u8>) -> Result<(), Malformed> {
    let start = to.len();
    if let Some(most) = write_pieces(rules, message, Items::default().at_start(), None, to)? {
        // The entries that are kept might have one name.
        to.truncate(start);
        write_pieces(rules, message, Items::default().at_start(), Some(most), to)?;
    }
    Ok(())
}

/// As [`write`], for a piece of a message. Returns the limit of a map that has more entries;
/// with it, the entries are written with names of their own.
fn write_pieces(
    rules: &Rules,
    message: &[u8],
    mut counter: Counter<'_>,
    overfull: Option<usize>,
    to: &mut Vec<u8>,
) -> Result<Option<usize>, Malformed> {
    let mut found = None;
    let mut fields = Fields(message);
    while let Some(field) = fields.next()? {
        let rule = rules.of(field.number);
        match (rule, field.value) {
            (_, Value::Group) => {}
            (Some(Rule::Message(inner)), Value::Delimited(content)) => {
                let mut piece = Vec::new();
                found = found.or(write_pieces(
                    inner,
                    content,
                    counter.within(field.number),
                    overfull,
                    &mut piece,
                )?);
                put(field.number, &piece, to);
            }
            (Some(Rule::Messages(most, inner)), Value::Delimited(content)) => {
                let items = counter.of(field.number);
                *items += 1;
                if *items <= most + 1 {
                    let mut item = Vec::new();
                    write(inner, content, &mut item)?;
                    put(field.number, &item, to);
                }
            }
            (Some(Rule::Map(most, inner)), Value::Delimited(content)) => {
                let items = counter.of(field.number);
                *items += 1;
                let mut entry = Vec::new();
                match overfull {
                    Some(most) if *items <= most + 1 => put(1, items.to_string().as_bytes(), &mut entry),
                    None if *items <= *most => write(inner, content, &mut entry)?,
                    Some(_) => continue,
                    None => {
                        found = Some(*most);
                        continue;
                    }
                }
                put(field.number, &entry, to);
            }
            (Some(Rule::Numbers(most)), Value::Delimited(packed)) => {
                let items = counter.of(field.number);
                let ends = (1..=packed.len()).filter(|end| packed[end - 1] < 0x80);
                let kept = ends.take((most + 1).saturating_sub(*items)).last().unwrap_or_default();
                // A number without an end is malformed, and stays so.
                let kept = if packed.last().is_some_and(|byte| *byte >= 0x80) { packed.len() } else { kept };
                *items += scalars(rule, &field);
                put(field.number, &packed[..kept], to);
            }
            (Some(Rule::Numbers(most) | Rule::Texts(most)), _) => {
                let items = counter.of(field.number);
                *items += 1;
                if *items <= most + 1 {
                    to.extend_from_slice(field.raw);
                }
            }
            (Some(Rule::Refused), Value::Delimited(_)) => put(field.number, &[], to),
            (Some(_) | None, Value::Varint | Value::Fixed | Value::Delimited(_)) => {
                to.extend_from_slice(field.raw);
            }
        }
    }
    Ok(found)
}

fn put(number: u32, content: &[u8], to: &mut Vec<u8>) {
    encode_varint(delimited_key(number), to);
    encode_varint(content.len() as u64, to);
    to.extend_from_slice(content);
}

#[cfg(test)]
mod tests {
    use std::iter::repeat_with;

    use prost::{Message, Name};
    use prost_reflect::{DescriptorPool, Kind as FieldKind, MessageDescriptor};
    use prost_types::{ListValue, Struct, Value, value::Kind};

    use super::{super::rules::rules_of, *};
    use crate::{
        limits::{BATCH_EVENTS, CONFIGURATION_STEPS, EVENT_KINDS, METADATA_NAMES, STEP_METADATA},
        pb,
    };

    /// The message as the server decodes it, and whether something was taken out.
    fn decoded<M: Message + Name + Default>(message: &[u8]) -> (M, bool) {
        let rules = rules_of(M::NAME).expect("rules");
        let pruned = prune(rules, message).expect("well-formed");
        let bytes = pruned.as_deref().unwrap_or(message);
        (M::decode(bytes).expect("decodes"), pruned.is_some())
    }

    fn repeated(number: u32, content: &[u8], times: usize) -> Vec<u8> {
        let mut message = Vec::new();
        (0..times).for_each(|_| put(number, content, &mut message));
        message
    }

    fn metadata(count: usize) -> Struct {
        let value = || Value { kind: Some(Kind::BoolValue(true)) };
        Struct { fields: (0..count).map(|name| (name.to_string(), value())).collect() }
    }

    fn random_text(random: &mut fastrand::Rng, most: usize) -> String {
        let length = random.usize(..=most);
        repeat_with(|| random.alphanumeric()).take(length).collect()
    }

    fn random_event(random: &mut fastrand::Rng, names: usize) -> pb::NewEvent {
        pb::NewEvent {
            id: random_text(random, 40),
            kind: random.i32(-1..9),
            name: random_text(random, 20),
            step_tag: random_text(random, 5),
            metadata: random.bool().then(|| metadata(random.usize(..=names))),
            occurred_at: random.bool().then(|| prost_types::Timestamp { seconds: random.i64(..), nanos: 7 }),
            step_percent: random.bool().then(|| random.i32(..)),
        }
    }

    #[test]
    fn of_messages_within_their_limits_nothing_is_taken_out() {
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..200 {
            let events = if round == 0 { BATCH_EVENTS } else { random.usize(..20) };
            let append = pb::AppendEventsRequest {
                job: Some(pb::append_events_request::Job::JobId(random_text(&mut random, 40))),
                expected_sequence: random.bool().then(|| random.i64(..)),
                events: repeat_with(|| random_event(&mut random, METADATA_NAMES)).take(events).collect(),
            };
            assert_eq!(decoded(&append.encode_to_vec()), (append, false));
            let step = |random: &mut fastrand::Rng| pb::StepConfiguration {
                tag: random_text(random, 9),
                metadata: vec![pb::MetadataConfiguration::default(); random.usize(..=STEP_METADATA)],
                ..Default::default()
            };
            let steps = if round == 0 { CONFIGURATION_STEPS } else { random.usize(..9) };
            let register = pb::RegisterJobConfigurationRequest {
                steps: repeat_with(|| step(&mut random)).take(steps).collect(),
                ..Default::default()
            };
            assert_eq!(decoded(&register.encode_to_vec()), (register, false));
            let kinds = (0..random.usize(..=EVENT_KINDS)).map(|_| random.i32(..)).collect();
            let watch = pb::WatchEventsRequest {
                kinds,
                start: Some(pb::watch_events_request::Start::FromNow(pb::FromNow {})),
                ..Default::default()
            };
            assert_eq!(decoded(&watch.encode_to_vec()), (watch, false));
        }
    }

    #[test]
    fn of_too_many_items_one_more_than_the_limit_is_left() {
        let mut random = fastrand::Rng::with_seed(8);
        for too_many in [1, 2, 1_000, 500_000] {
            let (append, _): (pb::AppendEventsRequest, _) =
                decoded(&repeated(4, &[], BATCH_EVENTS + too_many));
            assert_eq!(append.events.len(), BATCH_EVENTS + 1);
            let (register, _): (pb::RegisterJobConfigurationRequest, _) =
                decoded(&repeated(4, &[], CONFIGURATION_STEPS + too_many));
            assert_eq!(register.steps.len(), CONFIGURATION_STEPS + 1);
            let step = repeated(4, &[], STEP_METADATA + too_many);
            let (register, _): (pb::RegisterJobConfigurationRequest, _) = decoded(&repeated(4, &step, 3));
            assert!(register.steps.iter().all(|step| step.metadata.len() == STEP_METADATA + 1));
            let event =
                pb::NewEvent { metadata: Some(metadata(METADATA_NAMES + too_many)), ..Default::default() };
            let (publish, _): (pb::PublishEventsRequest, _) =
                decoded(&repeated(5, &event.encode_to_vec(), 2));
            let names = |event: &pb::NewEvent| event.metadata.as_ref().expect("metadata").fields.len();
            assert!(publish.events.iter().all(|event| names(event) == METADATA_NAMES + 1));
        }
        // The other fields, before and behind, are kept.
        let mut append = pb::AppendEventsRequest {
            job: Some(pb::append_events_request::Job::ProviderJobId("job".to_owned())),
            expected_sequence: Some(4),
            events: repeat_with(|| random_event(&mut random, 3)).take(900).collect(),
        };
        let (pruned, taken_out): (pb::AppendEventsRequest, _) = decoded(&append.encode_to_vec());
        append.events.truncate(BATCH_EVENTS + 1);
        assert_eq!((pruned, taken_out), (append, true));
    }

    #[test]
    fn numbers_are_counted_one_by_one_and_packed() {
        for message in [
            repeated(4, &[1; 4], 1_000),
            repeated(4, &[0xff, 1], 1_000),
            [0x20, 1].repeat(1_000),
            [repeated(4, &[1; 3], 1), [0x20, 1].repeat(9)].concat(),
        ] {
            let (watch, _): (pb::WatchEventsRequest, _) = decoded(&message);
            assert_eq!(watch.kinds.len(), EVENT_KINDS + 1, "{message:?}");
        }
    }

    #[test]
    fn metadata_in_pieces_is_counted_together_and_a_repeated_name_does_not_hide_entries() {
        let entry = |name: &str| metadata_entry(name);
        let pieces = |piece: &[u8], times| repeated(4, &repeated(5, piece, times), 1);
        let names = |message: &[u8]| {
            let (append, _): (pb::AppendEventsRequest, _) = decoded(message);
            append.events[0].metadata.as_ref().expect("metadata").fields.len()
        };
        assert_eq!(names(&pieces(&entry("a"), METADATA_NAMES)), 1);
        // Nobody encodes so. It is refused as too many names, whatever they are.
        assert_eq!(names(&pieces(&entry("a"), METADATA_NAMES + 1)), METADATA_NAMES + 1);
        assert_eq!(names(&pieces(&entry("a").repeat(40), 2)), METADATA_NAMES + 1);
        let distinct: Vec<u8> = (0..90).flat_map(|name| entry(&name.to_string())).collect();
        assert_eq!(names(&pieces(&distinct, 3)), METADATA_NAMES + 1);
        // Of two events each has its own metadata.
        let event = repeated(5, &entry("a").repeat(METADATA_NAMES), 1);
        let (_, taken_out): (pb::AppendEventsRequest, _) = decoded(&repeated(4, &event, 2));
        assert!(!taken_out);
    }

    /// An encoded Struct of one name.
    fn metadata_entry(name: &str) -> Vec<u8> {
        let value = Value { kind: Some(Kind::NumberValue(1.0)) };
        Struct { fields: [(name.to_owned(), value)].into() }.encode_to_vec()
    }

    #[test]
    fn metadata_nested_however_deep_is_left_as_nested() {
        let mut kind = Kind::NumberValue(1.0);
        for _ in 0..300 {
            kind = Kind::ListValue(ListValue { values: vec![Value { kind: Some(kind) }] });
        }
        let nested = Struct { fields: [("deep".to_owned(), Value { kind: Some(kind) })].into() };
        let event = pb::NewEvent { metadata: Some(nested), ..Default::default() };
        let append = pb::AppendEventsRequest { events: vec![event], ..Default::default() };
        let (append, taken_out): (pb::AppendEventsRequest, _) = decoded(&append.encode_to_vec());
        let fields = &append.events[0].metadata.as_ref().expect("metadata").fields;
        assert_eq!(fields["deep"].kind, Some(Kind::ListValue(ListValue::default())));
        assert!(taken_out);
    }

    #[test]
    fn unknown_groups_are_passed_however_deep() {
        let deep = [[0x7b].repeat(5_000), [0x7c].repeat(5_000)].concat();
        let event =
            [deep.clone(), pb::NewEvent { name: "n".to_owned(), ..Default::default() }.encode_to_vec()];
        let message = [deep, repeated(4, &event.concat(), 1)].concat();
        let (append, _): (pb::AppendEventsRequest, _) = decoded(&message);
        assert_eq!(append.events[0].name, "n");
    }

    /// Random bytes, and random changes of messages: what is left is bounded, and malformed is
    /// only what prost does not decode either.
    #[test]
    fn only_what_prost_refuses_is_malformed() {
        let mut random = fastrand::Rng::with_seed(9);
        let rules = rules_of(pb::AppendEventsRequest::NAME).expect("rules");
        let (mut malformed, mut well_formed) = (0, 0);
        for _ in 0..20_000 {
            let events = repeat_with(|| random_event(&mut random, 3)).take(3).collect();
            let mut message = pb::AppendEventsRequest { events, ..Default::default() }.encode_to_vec();
            for _ in 0..random.usize(..3) {
                let at = random.usize(..message.len());
                message[at] = random.u8(..);
            }
            let whole = pb::AppendEventsRequest::decode(message.as_slice());
            match prune(rules, &message) {
                Err(Malformed) => {
                    assert!(whole.is_err(), "{message:02x?}");
                    malformed += 1;
                }
                Ok(pruned) => {
                    let bytes = pruned.unwrap_or(message);
                    let decoded = pb::AppendEventsRequest::decode(bytes.as_slice());
                    if let Ok(decoded) = decoded {
                        assert!(decoded.events.len() <= BATCH_EVENTS + 1);
                        well_formed += 1;
                    }
                }
            }
        }
        assert!(malformed > 1_000 && well_formed > 1_000, "{malformed} {well_formed}");
    }

    /// Each field of a request that has items or fields of its own has a rule.
    #[test]
    fn every_request_has_rules() {
        fn check(message: &MessageDescriptor, rules: &Rules) {
            for field in message.fields() {
                assert!(field.number() < 100, "{} has a number of three digits", field.full_name());
                let rule = rules.of(field.number());
                match (rule, field.kind()) {
                    (Some(Rule::Map(_, inner)), FieldKind::Message(entry)) if field.is_map() => {
                        check(&entry, inner);
                    }
                    (Some(Rule::Messages(_, inner)), FieldKind::Message(item)) if field.is_list() => {
                        check(&item, inner);
                    }
                    (Some(Rule::Message(inner)), FieldKind::Message(inside)) if !field.is_list() => {
                        check(&inside, inner);
                    }
                    (Some(Rule::Numbers(_)), FieldKind::Enum(_)) if field.is_list() => {}
                    (Some(Rule::Texts(_)), FieldKind::String) if field.is_list() => {}
                    (Some(Rule::Refused), FieldKind::Message(_)) => {}
                    (None, FieldKind::Message(_)) => panic!("{} has no rule", field.full_name()),
                    (rule, _) => assert!(
                        rule.is_none() && !field.is_list(),
                        "{} has the wrong rule {rule:?}",
                        field.full_name()
                    ),
                }
            }
        }
        let pool = DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).expect("descriptors");
        let services = pool.services().filter(|service| service.package_name() == "milepost.v1");
        for method in services.flat_map(|service| service.methods().collect::<Vec<_>>()) {
            let request = method.input();
            check(&request, rules_of(request.name()).expect("rules"));
        }
    }
}
