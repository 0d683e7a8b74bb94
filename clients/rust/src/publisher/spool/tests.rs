use std::{
    env,
    fs::{self, OpenOptions},
    io::Write as _,
    iter,
    ops::Deref,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::{
    super::content::Content,
    Spool, SpoolError, SpoolSettings, encode,
    record::{Found, find},
};
use crate::pb::{CreateJobRequest, EventKind, NewEvent, append_events_request::Job};

/// A folder that is removed after the test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        Self(env::temp_dir().join(format!("milepost-spool-{}", Uuid::now_v7())))
    }

    fn open(&self) -> Spool {
        SpoolSettings::new(&self.0).open().unwrap()
    }

    /// The segments, in order.
    fn segments(&self) -> Vec<PathBuf> {
        let paths = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path());
        let mut segments: Vec<PathBuf> =
            paths.filter(|path| path.extension().is_some_and(|extension| extension == "spool")).collect();
        segments.sort();
        segments
    }
}

impl Deref for Dir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // A failure is ignored, since the directory is temporary.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn job() -> Job {
    Job::JobId("a".to_owned())
}

fn event(name: &str) -> Content {
    Content::Event(NewEvent { kind: EventKind::Info.into(), name: name.to_owned(), ..NewEvent::default() })
}

fn record(name: &str) -> Vec<u8> {
    encode(job(), event(name))
}

/// The names of the events from an offset on, and `None` for each damaged part.
fn read(spool: &Spool, mut offset: u64) -> Vec<Option<String>> {
    let mut names = Vec::new();
    while offset < spool.written() {
        let (bytes, end) = spool.read(offset).unwrap();
        names.extend(names_in(&bytes));
        offset = end;
    }
    names
}

fn names_in(bytes: &[u8]) -> Vec<Option<String>> {
    let mut start = 0;
    let next = || {
        let (end, name) = match (start < bytes.len()).then(|| find(bytes, start))? {
            Found::Record { end, content, .. } => match *content {
                Content::Event(event) => (end, Some(event.name)),
                Content::Job(request) => (end, Some(request.provider_job_id)),
            },
            Found::Damaged { end } => (end, None),
            Found::Torn => (bytes.len(), None),
        };
        start = end;
        Some(name)
    };
    iter::from_fn(next).collect()
}

fn some(names: &[&str]) -> Vec<Option<String>> {
    names.iter().map(|name| Some((*name).to_owned())).collect()
}

#[test]
fn the_format_of_a_record_is_fixed() {
    let payload = b"\x02\x0a\x01a\x22\x07\x10\x03\x1a\x03one";
    let crc = crc32fast::hash(payload).to_le_bytes();
    assert_eq!(record("one"), [&[13, 0, 0, 0], &crc[..], payload].concat());
    assert_eq!(crc, 0x80f4_9954_u32.to_le_bytes());

    let request = CreateJobRequest { provider_job_id: "p".to_owned(), ..CreateJobRequest::default() };
    let created = encode(Job::ProviderJobId("p".to_owned()), Content::Job(request.clone()));
    assert_eq!(created[8..], *b"\x01\x0a\x01p");
    let (job, content) = (Job::ProviderJobId("p".to_owned()), Box::new(Content::Job(request)));
    assert_eq!(find(&created, 0), Found::Record { end: created.len(), job, content });
}

#[test]
fn every_damaged_byte_is_found_and_costs_no_other_record() {
    let records = [record("one"), record("two"), record("three")];
    let second = records[0].len()..records[0].len() + records[1].len();
    let whole = records.concat();
    for place in second {
        for flipped in [0x01, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[place] ^= flipped;
            let expected = [some(&["one"]), vec![None], some(&["three"])].concat();
            assert_eq!(names_in(&bytes), expected, "byte {place} ^ {flipped}");
        }
    }
}

#[test]
fn a_damaged_record_that_contains_another_one_is_one_damage() {
    // The name of an event cannot have these bytes, but a damaged file can.
    let inner = record("inner");
    let payload = [b"\x02", &inner[..]].concat();
    let outer = [&u32::try_from(payload.len()).unwrap().to_le_bytes(), &[0; 4][..], &payload].concat();
    let bytes = [record("one"), outer, record("two")].concat();
    assert_eq!(names_in(&bytes), [some(&["one"]), vec![None], some(&["two"])].concat());
}

#[test]
fn a_spool_is_read_again_after_it_was_closed() {
    let dir = Dir::new();
    let spool = dir.open();
    spool.append(&record("one")).unwrap();
    spool.append(&record("two")).unwrap();
    let first = record("one").len() as u64;
    spool.close(first).unwrap();
    assert!(matches!(spool.append(&record("three")), Err(SpoolError::Closed)));
    assert_eq!(fs::read_to_string(dir.join("delivered")).unwrap(), first.to_string());

    let spool = dir.open();
    spool.append(&record("three")).unwrap();
    assert_eq!(spool.delivered(), first);
    assert_eq!(read(&spool, first), some(&["two", "three"]));
}

#[test]
fn one_publisher_at_a_time_has_a_spool() {
    let dir = Dir::new();
    let spool = dir.open();
    let second = SpoolSettings::new(&dir.0).open();
    assert!(matches!(second, Err(SpoolError::Locked(path)) if path == dir.0));
    spool.close(0).unwrap();
    dir.open();
}

#[test]
fn a_torn_record_is_cut_at_every_length() {
    let torn = record("torn");
    for length in 1..torn.len() {
        let dir = Dir::new();
        let spool = dir.open();
        spool.append(&record("one")).unwrap();
        spool.close(0).unwrap();
        let mut segment = OpenOptions::new().append(true).open(&dir.segments()[0]).unwrap();
        segment.write_all(&torn[..length]).unwrap();

        let spool = dir.open();
        spool.append(&record("two")).unwrap();
        assert_eq!(read(&spool, 0), some(&["one", "two"]), "after {length} bytes");
    }
    // What a file has whose last data was lost by a failure of the machine.
    assert_eq!(find(&[0; 64], 0), Found::Torn);
}

#[test]
fn segments_are_named_by_their_offset_and_removed_when_they_are_delivered() {
    let dir = Dir::new();
    let spool = dir.open();
    let large = record(&"x".repeat(1024 * 1024 - 64));
    for _ in 0..20 {
        spool.append(&large).unwrap();
    }
    let length = large.len() as u64;
    let path = |offset: u64| dir.join(format!("{offset:020}.spool"));
    // The ninth record makes more than 8 MiB.
    assert_eq!(dir.segments(), [path(0), path(9 * length), path(18 * length)]);
    spool.save_delivered(9 * length - 1).unwrap();
    assert_eq!(dir.segments().len(), 3);
    spool.save_delivered(9 * length).unwrap();
    assert_eq!(dir.segments(), [path(9 * length), path(18 * length)]);
    assert_eq!(read(&spool, 9 * length).len(), 11);
    spool.close(20 * length).unwrap();
    assert_eq!(dir.segments(), [path(18 * length)]);
    let spool = dir.open();
    assert_eq!((spool.written(), spool.delivered()), (20 * length, 20 * length));
}

#[test]
fn a_full_spool_takes_more_once_something_is_delivered() {
    let dir = Dir::new();
    let length = record("1").len() as u64;
    let spool = SpoolSettings::new(&dir.0).max_bytes(2 * length).open().unwrap();
    spool.append(&record("1")).unwrap();
    spool.append(&record("2")).unwrap();
    let full = spool.append(&record("3")).unwrap_err();
    assert!(matches!(full, SpoolError::Full { max_bytes, .. } if max_bytes == 2 * length), "{full}");
    spool.save_delivered(length).unwrap();
    spool.append(&record("4")).unwrap();
    assert_eq!(read(&spool, 0), some(&["1", "2", "4"]));
}

#[test]
fn a_request_that_no_server_accepts_is_not_appended() {
    let dir = Dir::new();
    let spool = dir.open();
    assert!(matches!(spool.append(&record(&"x".repeat(1024 * 1024))), Err(SpoolError::TooLarge(_))));
    assert_eq!(spool.written(), 0);
}

#[test]
fn missing_bytes_before_a_segment_are_known() {
    let dir = Dir::new();
    let spool = dir.open();
    let large = record(&"x".repeat(1024 * 1024 - 64));
    for _ in 0..9 {
        spool.append(&large).unwrap();
    }
    spool.append(&record("later")).unwrap();
    spool.close(0).unwrap();
    let first = OpenOptions::new().write(true).open(&dir.segments()[0]).unwrap();
    first.set_len(8 * large.len() as u64).unwrap();

    let spool = dir.open();
    let (bytes, end) = spool.read(0).unwrap();
    assert_eq!((bytes.len(), end), (8 * large.len(), 9 * large.len() as u64));
    assert_eq!(read(&spool, end), some(&["later"]));
}

#[test]
fn a_spool_goes_on_behind_what_was_delivered_and_lost() {
    let dir = Dir::new();
    let spool = dir.open();
    spool.append(&record("lost")).unwrap();
    spool.close(1000).unwrap();
    let spool = dir.open();
    assert_eq!((spool.delivered(), spool.written()), (1000, 1000));
    spool.append(&record("new")).unwrap();
    assert_eq!(read(&spool, 1000), some(&["new"]));
    drop(spool);

    // Nothing is lost if the number cannot be read.
    fs::write(dir.join("delivered"), "").unwrap();
    assert_eq!(dir.open().delivered(), 1000);
}
