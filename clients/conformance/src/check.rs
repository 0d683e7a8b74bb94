//! Compares what a program printed with the log of the server.

use std::collections::{BTreeMap, HashSet};

use crate::output::{Event, Line};

/// What a program was told to do, and what became of it on the server.
#[derive(Debug)]
pub(crate) struct Scene {
    /// The log of each job.
    pub(crate) logs: BTreeMap<String, Vec<Event>>,
    /// The job whose customer asked to stop it.
    pub(crate) cancelled: String,
    pub(crate) rounds: usize,
    /// The fewest interruptions that the faults must have caused.
    pub(crate) interruptions: usize,
}

/// The reason for the requested cancellation, which is the name of its event.
pub(crate) const CANCELLATION: &str = "cancellation";
/// The name of the watch of all jobs.
const ALL: &str = "all";
/// The reason for which the events with a name that is too long are refused.
const REFUSED: &str = "FIELD_INVALID";

/// What is wrong, one text for each error. Nothing if the output is right.
pub(crate) fn check(scene: &Scene, lines: &[Line]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (job, log) in &scene.logs {
        let (cancellations, published): (Vec<&Event>, Vec<&Event>) =
            log.iter().partition(|event| event.name == CANCELLATION);
        let names: Vec<_> = published.iter().map(|event| event.name.clone()).collect();
        wrong.extend(differences(&format!("the log of job {job}"), &names, &scene.names()));
        let stored = &stored(lines, job);
        let ids: Vec<_> = published.iter().map(|event| (event.sequence, event.id.as_str())).collect();
        wrong.extend(differences(&format!("what was told as stored in job {job}"), stored, &ids));
        let told = count(lines, |line| matches!(line, Line::CancellationRequested { job: of } if of == job));
        let expected = usize::from(*job == scene.cancelled);
        if (cancellations.len(), told) != (expected, expected) {
            let requested = cancellations.len();
            wrong.push(format!(
                "job {job}: {requested} requested cancellations, told {told} times, expected {expected}"
            ));
        }
        wrong.extend(refusals(scene, lines, job, log));
        wrong.extend(end(lines, job, log));
    }
    for watch in scene.logs.keys().map(String::as_str).chain([ALL]) {
        wrong.extend(watched(scene, lines, watch));
    }
    if !lines.contains(&Line::Flushed) {
        wrong.push("the flush did not end".to_owned());
    }
    let interruptions = count(lines, |line| *line == Line::Interruption);
    if interruptions < scene.interruptions {
        wrong.push(format!("{interruptions} interruptions, expected at least {}", scene.interruptions));
    }
    wrong
}

impl Scene {
    /// The names of the events of each job.
    fn names(&self) -> Vec<String> {
        let rounds = (1..=self.rounds).map(|round| round.to_string());
        rounds.chain(["complete".to_owned()]).collect()
    }
}

pub(crate) fn count(lines: &[Line], holds: impl Fn(&Line) -> bool) -> usize {
    lines.iter().filter(|line| holds(line)).count()
}

/// Sequence and id of each stored event of a job.
fn stored<'a>(lines: &'a [Line], job: &str) -> Vec<(i64, &'a str)> {
    let of_job = |line: &'a Line| match line {
        Line::Stored { job: of, sequence, id } if of == job => Some((*sequence, id.as_str())),
        _ => None,
    };
    lines.iter().filter_map(of_job).collect()
}

/// Checks one watch: it saw each event of each of its jobs once, in order, and nothing else.
fn watched(scene: &Scene, lines: &[Line], watch: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let seen = |line: &Line| match line {
        Line::Event { watch: by, event } if by == watch => Some(event.clone()),
        _ => None,
    };
    let seen: Vec<Event> = lines.iter().filter_map(seen).collect();
    let jobs: Vec<&String> = scene.logs.keys().filter(|job| watch == ALL || *job == watch).collect();
    for job in &jobs {
        let of_job: Vec<Event> = seen.iter().filter(|event| event.job == **job).cloned().collect();
        wrong.extend(differences(&format!("job {job} in the watch {watch}"), &of_job, &scene.logs[*job]));
    }
    let aliens = seen.iter().filter(|event| !jobs.contains(&&event.job));
    wrong.extend(aliens.map(|event| format!("an event of another job in the watch {watch}: {event:?}")));
    if !lines.iter().any(|line| matches!(line, Line::CaughtUp { watch: by } if by == watch)) {
        wrong.push(format!("the watch {watch} has never caught up"));
    }
    wrong
}

/// Checks that each event with a name that is too long was refused, and no other event.
fn refusals(scene: &Scene, lines: &[Line], job: &str, log: &[Event]) -> Vec<String> {
    let of_job = |line: &Line| match line {
        Line::Refused { job: of, id, reason } if of == job => Some((id.clone(), reason.clone())),
        _ => None,
    };
    let refused: Vec<(String, String)> = lines.iter().filter_map(of_job).collect();
    let ids: HashSet<&String> = refused.iter().map(|(id, _)| id).collect();
    let mut wrong = Vec::new();
    let expected = scene.rounds / 10;
    if (refused.len(), ids.len()) != (expected, expected) {
        let (told, events) = (refused.len(), ids.len());
        wrong.push(format!("job {job}: {told} refusals of {events} events, expected {expected}"));
    }
    for (id, reason) in &refused {
        if reason != REFUSED {
            wrong.push(format!("job {job}: event {id} was refused with {reason:?}, expected {REFUSED:?}"));
        }
        if log.iter().any(|event| event.id == *id) {
            wrong.push(format!("job {job}: event {id} was told as refused and is in the log"));
        }
    }
    wrong
}

fn end(lines: &[Line], job: &str, log: &[Event]) -> Option<String> {
    let of_job = |line: &Line| match line {
        Line::End { watch, last_sequence } if watch == job => Some(*last_sequence),
        _ => None,
    };
    let ends: Vec<i64> = lines.iter().filter_map(of_job).collect();
    let expected = log.last().map_or(0, |event| event.sequence);
    (ends != [expected]).then(|| format!("the watch of job {job} ended with {ends:?}, expected {expected}"))
}

/// Tells the first place where two lists differ.
fn differences<T: PartialEq + std::fmt::Debug>(what: &str, found: &[T], expected: &[T]) -> Option<String> {
    if found == expected {
        return None;
    }
    let place = found.iter().zip(expected).take_while(|(found, expected)| found == expected).count();
    let (found_there, expected_there) = (found.get(place), expected.get(place));
    let (found, expected) = (found.len(), expected.len());
    Some(format!(
        "{what}: {found} entries, expected {expected}; entry {} is {found_there:?}, expected {expected_there:?}",
        place + 1
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUNDS: usize = 20;

    fn event(job: &str, sequence: i64, name: &str) -> Event {
        Event { job: job.to_owned(), sequence, id: format!("{job}/{sequence}"), name: name.to_owned() }
    }

    /// The cancellation of job `b` is requested in the middle.
    fn log(job: &str) -> Vec<Event> {
        let mut names: Vec<String> = (1..=ROUNDS).map(|round| round.to_string()).collect();
        if job == "b" {
            names.insert(ROUNDS / 2, CANCELLATION.to_owned());
        }
        names.push("complete".to_owned());
        (1..).zip(names).map(|(sequence, name)| event(job, sequence, &name)).collect()
    }

    fn scene() -> Scene {
        let logs = ["a", "b"].map(|job| (job.to_owned(), log(job))).into();
        Scene { logs, cancelled: "b".to_owned(), rounds: ROUNDS, interruptions: 1 }
    }

    fn refused(job: &str, round: usize) -> Line {
        let (id, reason) = (format!("{job}/refused {round}"), "FIELD_INVALID".to_owned());
        Line::Refused { job: job.to_owned(), id, reason }
    }

    /// The output of a program that is right.
    fn lines() -> Vec<Line> {
        let mut lines = vec![Line::Interruption, Line::Heartbeat, Line::CaughtUp { watch: ALL.to_owned() }];
        for (job, log) in scene().logs {
            lines.push(Line::CaughtUp { watch: job.clone() });
            let last_sequence = log.last().unwrap().sequence;
            for event in log {
                let (sequence, id) = (event.sequence, event.id.clone());
                lines.push(if event.name == CANCELLATION {
                    Line::CancellationRequested { job: job.clone() }
                } else {
                    Line::Stored { job: job.clone(), sequence, id }
                });
                lines.push(Line::Event { watch: job.clone(), event: event.clone() });
                lines.push(Line::Event { watch: ALL.to_owned(), event });
            }
            lines.extend([refused(&job, 10), refused(&job, 20)]);
            lines.push(Line::End { watch: job, last_sequence });
        }
        lines.push(Line::Flushed);
        lines
    }

    /// The place of what the watch saw of the event `a/3`.
    fn third(lines: &[Line], watch: &str) -> usize {
        let is_third = |line: &Line| matches!(line, Line::Event { watch: by, event } if by == watch && event.id == "a/3");
        lines.iter().position(is_third).unwrap()
    }

    #[track_caller]
    fn assert_wrong(lines: &[Line], words: &str) {
        let wrong = check(&scene(), lines);
        assert!(wrong.len() == 1 && wrong[0].contains(words), "{wrong:#?}");
    }

    #[test]
    fn a_right_output_has_no_error() {
        assert_eq!(check(&scene(), &lines()), Vec::<String>::new());
    }

    #[test]
    fn an_event_that_a_watch_missed_repeated_or_moved_is_an_error() {
        for watch in ["a", ALL] {
            let what = format!("job a in the watch {watch}");
            let place = third(&lines(), watch);

            let mut missing = lines();
            missing.remove(place);
            assert_wrong(&missing, &what);

            let mut twice = lines();
            twice.insert(place, twice[place].clone());
            assert_wrong(&twice, &what);

            let mut moved = lines();
            let event = moved.remove(place);
            moved.insert(third(&lines(), watch) + 3, event);
            assert_wrong(&moved, &what);
        }
    }

    #[test]
    fn an_event_that_the_log_does_not_have_is_an_error() {
        let alien = |watch: &str, job| Line::Event { watch: watch.to_owned(), event: event(job, 1, "alien") };
        assert_wrong(&[lines(), vec![alien("a", "a")]].concat(), "job a in the watch a: 22 entries");
        assert_wrong(&[lines(), vec![alien("a", "b")]].concat(), "an event of another job in the watch a");
        assert_wrong(&[lines(), vec![alien(ALL, "c")]].concat(), "an event of another job in the watch all");
    }

    #[test]
    fn an_event_that_was_told_as_stored_and_is_not_in_the_log_is_an_error() {
        let job = "a".to_owned();
        let absent = Line::Stored { job: job.clone(), sequence: 22, id: "absent".to_owned() };
        assert_wrong(&[lines(), vec![absent]].concat(), "told as stored in job a: 22 entries");
        let other_id = Line::Stored { job, sequence: 3, id: "other".to_owned() };
        let replaced = |line: Line| match line {
            Line::Stored { job, sequence: 3, .. } if job == "a" => other_id.clone(),
            line => line,
        };
        let lines: Vec<Line> = lines().into_iter().map(replaced).collect();
        assert_wrong(&lines, "told as stored in job a: 21 entries");
    }

    #[test]
    fn a_log_with_another_event_or_order_is_an_error() {
        let mut scene = scene();
        let log = scene.logs.get_mut("a").unwrap();
        let (second, third) = (log[1].name.clone(), log[2].name.clone());
        (log[1].name, log[2].name) = (third, second);
        let wrong = check(&scene, &lines());
        assert!(wrong.iter().any(|wrong| wrong.starts_with("the log of job a: 21 entries")), "{wrong:#?}");
    }

    #[test]
    fn a_refusal_that_is_missing_repeated_or_untrue_is_an_error() {
        let without = |line: &Line| *line != refused("a", 10);
        let missing: Vec<Line> = lines().into_iter().filter(without).collect();
        assert_wrong(&missing, "job a: 1 refusals of 1 events");
        assert_wrong(&[lines(), vec![refused("a", 10)]].concat(), "job a: 3 refusals of 2 events");
        let reason = "FIELD_INVALID".to_owned();
        let untrue = Line::Refused { job: "a".to_owned(), id: "a/3".to_owned(), reason };
        assert_wrong(&[missing.clone(), vec![untrue]].concat(), "told as refused and is in the log");
        let (id, reason) = ("x".to_owned(), "OTHER".to_owned());
        let unexplained = Line::Refused { job: "a".to_owned(), id, reason };
        assert_wrong(&[missing, vec![unexplained]].concat(), "was refused with \"OTHER\"");
    }

    #[test]
    fn a_requested_cancellation_is_told_once_and_of_no_other_job() {
        let told = |job: &str| Line::CancellationRequested { job: job.to_owned() };
        let never: Vec<Line> = lines().into_iter().filter(|line| *line != told("b")).collect();
        assert_wrong(&never, "job b: 1 requested cancellations, told 0 times, expected 1");
        assert_wrong(&[lines(), vec![told("b")]].concat(), "job b: 1 requested cancellations, told 2 times");
        assert_wrong(&[lines(), vec![told("a")]].concat(), "job a: 0 requested cancellations, told 1 times");
    }

    #[test]
    fn what_never_came_is_an_error() {
        let without =
            |missing: &Line| -> Vec<Line> { lines().into_iter().filter(|line| line != missing).collect() };
        assert_wrong(&without(&Line::Flushed), "the flush did not end");
        assert_wrong(&without(&Line::Interruption), "0 interruptions");
        assert_wrong(
            &without(&Line::CaughtUp { watch: ALL.to_owned() }),
            "the watch all has never caught up",
        );
        let end = Line::End { watch: "a".to_owned(), last_sequence: 21 };
        assert_wrong(&without(&end), "the watch of job a ended with []");
        let other = Line::End { watch: "a".to_owned(), last_sequence: 20 };
        assert_wrong(&[without(&end), vec![other]].concat(), "ended with [20], expected 21");
    }
}
