//! The program of the Rust client. [The README](../README.md) says what each program does.

use std::{collections::HashSet, env, error::Error, time::Duration};

use milepost_client::{
    Client, Publisher, Refused,
    pb::{
        AllJobs, EventKind, NewEvent, WatchEventsRequest, append_events_request::Job,
        watch_events_request::Scope, watch_events_response::Message,
    },
    prost_types,
};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::sleep};

type BoxError = Box<dyn Error + Send + Sync>;

const HEARTBEAT_S: i64 = 5;
const REFUSED_NAME_LENGTH: usize = 300;

/// The scenario, as the environment variables set it.
#[derive(Clone)]
struct Program {
    client: Client,
    jobs: Vec<String>,
    rounds: u32,
    pause: Duration,
}

/// Runs the scenario to its end.
pub(crate) async fn run() -> Result<(), BoxError> {
    let client = Client::connect(&env::var("MILEPOST_SERVER")?).await?;
    let program = Program {
        client: client.with_credential(&env::var("MILEPOST_API_KEY")?)?,
        jobs: env::var("MILEPOST_JOBS")?.split(',').map(str::to_owned).collect(),
        rounds: env::var("MILEPOST_ROUNDS")?.parse()?,
        pause: Duration::from_millis(env::var("MILEPOST_PAUSE_MS")?.parse()?),
    };
    let mut tasks = JoinSet::new();
    for job in &program.jobs {
        tasks.spawn(program.clone().watch(job.clone(), Scope::JobId(job.clone())));
    }
    tasks.spawn(program.clone().watch("all".to_owned(), Scope::AllJobs(AllJobs::default())));
    tasks.spawn(program.publish());
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}

impl Program {
    /// Watches until the job is closed, or all jobs are complete.
    async fn watch(self, name: String, scope: Scope) -> Result<(), BoxError> {
        let request = WatchEventsRequest {
            scope: Some(scope),
            heartbeat_interval: Some(prost_types::Duration { seconds: HEARTBEAT_S, nanos: 0 }),
            ..WatchEventsRequest::default()
        };
        let interrupted = name.clone();
        let mut watch = self.client.watch(request).on_interruption(move |error, _pause| {
            print(&json!({"kind": "interruption", "watch": interrupted, "error": error.to_string()}));
        });
        let mut complete = HashSet::new();
        while let Some(message) = watch.next().await? {
            match message.message {
                Some(Message::Events(events)) => {
                    for event in events.events {
                        print(&json!({
                            "kind": "event", "watch": name, "job": event.job_id, "sequence": event.sequence,
                            "id": event.id, "name": event.name,
                        }));
                        if event.kind() == EventKind::Complete {
                            complete.insert(event.job_id);
                        }
                    }
                }
                Some(Message::CaughtUp(_)) => print(&json!({"kind": "caught_up", "watch": name})),
                Some(Message::Heartbeat(_)) => print(&json!({"kind": "heartbeat", "watch": name})),
                Some(Message::End(end)) => {
                    let last_sequence = end.job.unwrap_or_default().last_sequence;
                    print(&json!({"kind": "end", "watch": name, "last_sequence": last_sequence}));
                }
                None => {}
            }
            if complete.len() == self.jobs.len() && name == "all" {
                break;
            }
        }
        Ok(())
    }

    async fn publish(self) -> Result<(), BoxError> {
        let publisher = self
            .client
            .publisher()
            .on_stored(|job, event| {
                let (sequence, id) = (event.sequence, &event.id);
                print(&json!({"kind": "stored", "job": job_id(job), "sequence": sequence, "id": id}));
            })
            .on_refused(|refusal| {
                if let Refused::Event { job, event } = &refusal.refused {
                    let (id, reason) = (&event.id, refusal.error.reason());
                    print(&json!({"kind": "refused", "job": job_id(job), "id": id, "reason": reason}));
                }
            })
            .on_interruption(|error, _pause| {
                print(&json!({"kind": "interruption", "watch": "publisher", "error": error.to_string()}));
            })
            .on_cancellation_requested(|job, _at| {
                print(&json!({"kind": "cancellation_requested", "job": job_id(job)}));
            })
            .start();
        for round in 1..=self.rounds {
            self.append(&publisher, EventKind::Info, &round.to_string()).await?;
            if round % 10 == 0 {
                self.append(&publisher, EventKind::Info, &"x".repeat(REFUSED_NAME_LENGTH)).await?;
            }
            sleep(self.pause).await;
        }
        self.append(&publisher, EventKind::Complete, "complete").await?;
        publisher.flush().await?;
        print(&json!({"kind": "flushed"}));
        publisher.close().await?;
        Ok(())
    }

    /// Appends an event to each job.
    async fn append(&self, publisher: &Publisher, kind: EventKind, name: &str) -> Result<(), BoxError> {
        for job in &self.jobs {
            let event = NewEvent { kind: kind.into(), name: name.to_owned(), ..NewEvent::default() };
            publisher.append(Job::JobId(job.clone()), event).await?;
        }
        Ok(())
    }
}

fn job_id(job: &Job) -> &str {
    match job {
        Job::JobId(id) | Job::ProviderJobId(id) => id,
    }
}

/// Standard output is flushed at the end of each line.
fn print(line: &Value) {
    println!("{line}");
}
