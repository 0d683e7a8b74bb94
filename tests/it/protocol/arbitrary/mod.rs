//! Arbitrary messages cause no internal error, no panic and no hang. Every refusal
//! has the details of the API, and every job still agrees with its log.
//!
//! The test runs cases for `MILEPOST_ARBITRARY_S` seconds (default 15). Each case
//! has a seed, which a failure prints. `MILEPOST_ARBITRARY_SEED` sets the seed of
//! the first case; with 0 seconds it is the only case, and its calls are the same
//! each time.

mod generate;
mod world;

use std::{
    panic,
    sync::{
        Arc, Mutex, Once, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use milepost::limits;
use milepost_client::pb;
use prost::Message as _;
use prost_reflect::{DynamicMessage, MethodDescriptor, Value};
use tokio::{task::JoinSet, time::timeout};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use self::{
    generate::{Generator, Random},
    world::World,
};
use crate::support::{TestServer, raw};

/// Calls of one case.
const CALLS: usize = 80;
/// Cases at once.
const PARALLEL: usize = 4;
/// A call that lasts longer hangs, since the server's own timeouts are shorter.
const HANG: Duration = Duration::from_secs(15);
/// Most that the resident memory of the process may grow in a long run.
const GROWTH_BYTES: usize = 256 * 1024 * 1024;

/// Panics outside the code of the tests.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn note_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if info.location().is_none_or(|location| !location.file().starts_with("tests/")) {
                PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(info.to_string());
            }
            before(info);
        }));
    });
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn arbitrary_messages_cause_no_internal_error_no_panic_and_no_hang() {
    note_panics();
    let time = Duration::from_secs(setting("MILEPOST_ARBITRARY_S").unwrap_or(15));
    let clock = || u64::from(SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos()) << 16;
    let first = setting("MILEPOST_ARBITRARY_SEED").unwrap_or_else(clock);
    println!("the first case's seed is {first}");
    let server = Arc::new(TestServer::start().await);
    let (seeds, calls, succeeded) = (Arc::new(AtomicU64::new(first)), Arc::default(), Arc::default());
    let started = Instant::now();
    let (mut memory, mut failures) = (None, Vec::new());
    let mut working = JoinSet::new();
    let parallel = if time.is_zero() { 1 } else { PARALLEL };
    for _ in 0..parallel {
        let (server, seeds) = (Arc::clone(&server), Arc::clone(&seeds));
        let counts: [Arc<AtomicU64>; 2] = [Arc::clone(&calls), Arc::clone(&succeeded)];
        working.spawn(async move {
            loop {
                let seed = seeds.fetch_add(1, Ordering::Relaxed);
                case(&server, seed, &counts).await.map_err(|error| format!("seed {seed}: {error}"))?;
                if started.elapsed() >= time {
                    return Ok::<_, String>(());
                }
            }
        });
    }
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            done = working.join_next() => match done {
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => failures.push(error),
                Some(Err(panicked)) => panic::resume_unwind(panicked.into_panic()),
                None => break,
            },
            // The first minute fills caches and pools.
            _ = ticks.tick() => if memory.is_none() && started.elapsed() >= Duration::from_secs(60) {
                memory = Some(resident_bytes());
            },
        }
    }
    let (calls, succeeded) = (calls.load(Ordering::Relaxed), succeeded.load(Ordering::Relaxed));
    println!("{calls} calls, {succeeded} of them succeeded; {} MiB resident", resident_bytes() >> 20);
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    assert!(succeeded > calls / 10, "only {succeeded} of {calls} calls succeeded");
    let panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    assert!(panics.is_empty(), "{panics:?}");
    if let Some(before) = memory {
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < GROWTH_BYTES, "the memory grew by {} MiB over {calls} calls", grown >> 20);
    }
}

fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// Makes a world, calls methods, and checks the jobs afterwards. Counts all calls,
/// and those that were not refused.
async fn case(
    server: &TestServer,
    seed: u64,
    [calls, succeeded]: &[Arc<AtomicU64>; 2],
) -> Result<(), String> {
    let mut random = Random(seed);
    let mut world = World::new(server, &mut random).await;
    let methods = raw::methods();
    for number in 0..CALLS {
        let method = random.pick(&methods).clone();
        let mut call = Call::new(server, &world, method, &mut random);
        for _ in 0..3 {
            let outcome = call.make().await;
            calls.fetch_add(1, Ordering::Relaxed);
            let Some(answers) = outcome.map_err(|error| format!("call {number}: {error}\n{call}"))? else {
                break;
            };
            succeeded.fetch_add(1, Ordering::Relaxed);
            if !call.continue_from(&world, &answers, &mut random) {
                break;
            }
        }
    }
    world.check().await.map_err(|error| format!("after the calls: {error}"))
}

struct Call<'a> {
    server: &'a TestServer,
    method: MethodDescriptor,
    caller: (&'static str, Option<String>),
    messages: Vec<Vec<u8>>,
    /// The first message, before `corrupt` may have changed it.
    first: DynamicMessage,
}

impl std::fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} by {}", self.method.full_name(), self.caller.0)?;
        for bytes in &self.messages {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let shown = match DynamicMessage::decode(self.method.input(), bytes.as_slice()) {
                Ok(message) => message.to_text_format().chars().take(4_000).collect(),
                Err(error) => error.to_string(),
            };
            writeln!(f, "{shown}\n{}", hex.get(..20_000).unwrap_or(&hex))?;
        }
        Ok(())
    }
}

impl<'a> Call<'a> {
    fn new(server: &'a TestServer, world: &World, method: MethodDescriptor, random: &mut Random) -> Self {
        // Most calls use the provider's credentials, which grant most.
        let count = if random.percent(60) { 4 } else { world.callers.len() };
        let caller = random.pick(&world.callers[..count]).clone();
        let invalid_percent = *random.pick(&[0, 0, 2, 10, 40]);
        let count = if method.is_client_streaming() { 1 + random.below(5) } else { 1 };
        let mut generator = Generator { random, known: &world.known, invalid_percent };
        let generated: Vec<_> = (0..count).map(|_| generator.message(&method.input())).collect();
        let mut messages: Vec<_> = generated.iter().map(prost::Message::encode_to_vec).collect();
        if random.percent(7) {
            let at = random.below(messages.len());
            corrupt(&mut messages[at], random);
        }
        Self { server, method, caller, messages, first: generated.into_iter().next().unwrap() }
    }

    /// Makes the call. Returns the messages of the answer, `None` for a refusal,
    /// or an error that tells what is wrong with the answer.
    async fn make(&self) -> Result<Option<Vec<Bytes>>, String> {
        let name = raw::name(&self.method);
        let opened =
            raw::open(self.server.channel.clone(), self.caller.1.as_deref(), &name, self.messages.clone());
        // tonic itself refuses messages that cannot be decoded.
        let decodable = self
            .messages
            .iter()
            .all(|bytes| DynamicMessage::decode(self.method.input(), bytes.as_slice()).is_ok());
        let mut answers = Vec::new();
        let reading = async {
            let mut stream = opened.await?;
            while let Some(answer) = stream.message().await? {
                let caught_up = name == "EventService/WatchEvents" && is_caught_up(&answer);
                answers.push(answer);
                if caught_up {
                    break;
                }
            }
            Ok(())
        };
        let ended: Result<(), Status> =
            timeout(HANG, reading).await.map_err(|_| format!("no end within {HANG:?}"))?;
        if name == "EventService/PublishEvents" {
            for answer in &answers {
                let answer = pb::PublishEventsResponse::decode(answer.clone()).map_err(|e| e.to_string())?;
                if let Some(pb::publish_events_response::Outcome::Refused(refused)) = answer.outcome {
                    let details = refused.encode_to_vec().into();
                    check(&Status::with_details(Code::from(refused.code), refused.message, details))?;
                }
            }
            if ended.is_ok() && answers.len() != self.messages.len() {
                return Err(format!("{} answers to {} batches", answers.len(), self.messages.len()));
            }
        }
        match ended {
            Ok(()) => Ok(Some(answers)),
            Err(_) if !decodable => Ok(None),
            Err(status) => check(&status).map(|()| None),
        }
    }

    /// Prepares the next call with the token of this answer or with a changed one.
    /// Returns false if there is none.
    fn continue_from(&mut self, world: &World, answers: &[Bytes], random: &mut Random) -> bool {
        let input = self.method.input();
        let field = ["page_token", "resume_token"].into_iter().find_map(|name| input.get_field_by_name(name));
        let Some(field) = field else { return false };
        let mut tokens = answers.iter().filter_map(|answer| {
            let answer = DynamicMessage::decode(self.method.output(), answer.clone()).ok()?;
            let token = answer.get_field_by_name("next_page_token");
            token.or_else(|| answer.get_field_by_name("resume_token"))?.as_str().map(str::to_owned)
        });
        let Some(token) = tokens.next_back().filter(|token| !token.is_empty()) else { return false };
        let mut generator = Generator { random, known: &world.known, invalid_percent: 0 };
        let token = match generator.random.below(5) {
            0 => token,
            1 => generator.mangled(&token),
            _ => generator.forged(&token),
        };
        self.first.set_field(&field, Value::String(token));
        self.messages = vec![self.first.encode_to_vec()];
        true
    }
}

fn is_caught_up(answer: &Bytes) -> bool {
    let message = pb::WatchEventsResponse::decode(answer.clone()).map(|answer| answer.message);
    matches!(message, Ok(Some(pb::watch_events_response::Message::CaughtUp(_))))
}

/// Checks what holds for every refusal.
fn check(status: &Status) -> Result<(), String> {
    let wrong = |problem: &str| Err(format!("{problem}: {status:?}"));
    let allowed = match status.code() {
        Code::Internal | Code::Unknown | Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
            false
        }
        code => code != Code::Ok,
    };
    if !allowed {
        return wrong("an unexpected code");
    }
    if status.details().len().div_ceil(3) * 4 > limits::ERROR_DETAILS_BYTES {
        return wrong("the details are too large");
    }
    // Several long texts in a SignUp, which is refused by its length before it is a message: by
    // the length of the body, or by that before the message.
    let limit = limits::UNAUTHENTICATED_CALL_BYTES.to_string();
    if status.code() == Code::OutOfRange && status.message().contains(&limit) {
        return Ok(());
    }
    let Ok(details) = status.check_error_details() else { return wrong("no details") };
    let Some(info) = details.error_info() else { return wrong("no ErrorInfo") };
    let reason = pb::ErrorReason::from_str_name(&format!("ERROR_REASON_{}", info.reason));
    if info.domain != "milepost" || reason.is_none_or(|reason| reason == pb::ErrorReason::Unspecified) {
        return wrong("an unknown domain or reason");
    }
    if status.message().is_empty() || status.message().contains('\0') {
        return wrong("the message is empty or has a NUL");
    }
    Ok(())
}

/// Truncates, changes, extends or replaces the bytes.
fn corrupt(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    match random.below(4) {
        0 => bytes.truncate(at),
        1 => {
            for _ in 0..1 + random.below(4) {
                let at = random.below(bytes.len().max(1));
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = random.next().to_le_bytes()[0];
                }
            }
        }
        2 => {
            let more = random.bytes(random.clone().below(64));
            bytes.splice(at..at, more);
        }
        _ => *bytes = random.bytes(random.clone().below(200)),
    }
}
