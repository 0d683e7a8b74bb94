//! Runs the client libraries of all languages against a server that fails, and checks what
//! they saw. [The README](../README.md) says more.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test fails by a panic, and the other lint does not help in test code"
)]

mod check;
mod clients;
mod output;
mod program;
mod script;

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use clap::Parser;
use milepost_client::pb::{ApiKeyScope, RequestCancellationRequest, UserRole};
use milepost_testing::{Proxy, ServerProcess, TemporaryDir, TestDatabase, User};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    check::{CANCELLATION, Scene, check, count},
    clients::{CLIENTS, Client, Run},
    output::{Event, Line},
    script::Script,
};

/// The most time from the start of the programs to the end of all of them.
const LONGEST: Duration = Duration::from_secs(130);
/// The most time until a program prints its first line.
const LONGEST_START: Duration = Duration::from_secs(30);
const JOBS: usize = 3;
const PAUSE_MS: u32 = 200;

/// Runs the client libraries against a server that fails, and checks what they saw. The
/// variable `MILEPOST_BIN` names the program of the server.
#[derive(Debug, Parser)]
struct Options {
    /// The clients to run, separated by commas; all of them without this.
    #[arg(long, value_delimiter = ',', default_values_t = CLIENTS)]
    client: Vec<Client>,
    /// The seed of the faults: the one that an earlier run printed; a new one without this.
    #[arg(long)]
    seed: Option<u64>,
    /// Run the program of the Rust client.
    #[arg(long, hide = true)]
    program: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let ended = if options.program {
        program::run().await.map_err(|error| format!("{error:?}"))
    } else {
        harness(&options.client, options.seed.unwrap_or_else(|| fastrand::u64(..))).await
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// What one client works on.
struct World {
    client: Client,
    provider: User,
    customer: User,
    /// The cancellation of the first one is requested.
    jobs: Vec<milepost_client::pb::Job>,
}

async fn harness(clients: &[Client], seed: u64) -> Result<(), String> {
    let out = TemporaryDir::new();
    for client in clients {
        client.build(out.path()).await?;
    }
    let mut server = ServerProcess::on(&TestDatabase::migrated().await).await;
    let proxy = Proxy::to_server(server.address).await;
    let script = Script::new(seed);
    let rounds = u32::try_from(script.length().as_millis()).unwrap() / PAUSE_MS;
    println!("seed {seed}: {rounds} rounds of {JOBS} jobs");

    let mut programs = JoinSet::new();
    let deadline = Instant::now() + LONGEST;
    let mut runs = Vec::new();
    for client in clients {
        let world = World::new(*client, &server).await;
        let run = client.start(out.path(), &world.variables(&proxy, rounds));
        runs.push((world, run));
    }
    for (mut world, mut run) in runs {
        run.start(LONGEST_START).await;
        world.request_cancellation().await;
        programs.spawn(async move {
            run.finish(deadline).await;
            (world, run)
        });
    }
    script.run(&proxy, &mut server).await;
    server.ready().await;
    let mut results = Vec::new();
    while let Some(ended) = programs.join_next().await {
        let (world, run) = ended.unwrap();
        results.push(world.result(run, &script, rounds).await);
    }
    report(results, seed)
}

impl World {
    /// A provider of its own with open jobs.
    async fn new(client: Client, server: &ServerProcess) -> Self {
        let scopes = [ApiKeyScope::Read, ApiKeyScope::Append, ApiKeyScope::Manage];
        let mut provider = server.sign_up(UserRole::Provider, &scopes).await;
        let customer = server.customer().await;
        provider.configuration(&[]).await;
        let mut jobs = Vec::new();
        for _ in 0..JOBS {
            jobs.push(provider.job(&customer).await);
        }
        Self { client, provider, customer, jobs }
    }

    async fn request_cancellation(&mut self) {
        let request =
            RequestCancellationRequest { job_id: self.jobs[0].id.clone(), reason: CANCELLATION.to_owned() };
        self.customer.session.jobs.request_cancellation(request).await.unwrap();
    }

    fn variables(&self, proxy: &Proxy, rounds: u32) -> [(&'static str, String); 5] {
        let jobs: Vec<&str> = self.jobs.iter().map(|job| job.id.as_str()).collect();
        [
            ("MILEPOST_SERVER", proxy.url.clone()),
            ("MILEPOST_API_KEY", self.provider.key_secret.clone()),
            ("MILEPOST_JOBS", jobs.join(",")),
            ("MILEPOST_ROUNDS", rounds.to_string()),
            ("MILEPOST_PAUSE_MS", PAUSE_MS.to_string()),
        ]
    }

    /// Compares the output of the program with the logs on the server.
    async fn result(mut self, run: Run, script: &Script, rounds: u32) -> ClientResult {
        let mut logs = BTreeMap::new();
        for job in &self.jobs {
            let event = |event: milepost_client::pb::Event| Event {
                job: event.job_id,
                sequence: event.sequence,
                id: event.id,
                name: event.name,
            };
            logs.insert(
                job.id.clone(),
                self.provider.list(job).await.into_iter().map(event).collect::<Vec<_>>(),
            );
        }
        let events = logs.values().map(Vec::len).sum();
        let cancelled = self.jobs[0].id.clone();
        let scene = Scene { logs, cancelled, rounds: rounds as usize, interruptions: script.interruptions() };
        let wrong = run.wrong.into_iter().chain(check(&scene, &run.lines)).collect();
        let interruptions = count(&run.lines, |line| *line == Line::Interruption);
        ClientResult { name: self.client.name, events, interruptions, wrong }
    }
}

struct ClientResult {
    name: &'static str,
    events: usize,
    interruptions: usize,
    wrong: Vec<String>,
}

/// Prints a table and what is wrong.
fn report(mut results: Vec<ClientResult>, seed: u64) -> Result<(), String> {
    results.sort_by_key(|result| result.name);
    println!("\n{:16}{:>8}{:>9}{:>15}  result", "client", "events", "watches", "interruptions");
    for ClientResult { name, events, interruptions, wrong } in &results {
        let result = if wrong.is_empty() { "passed" } else { "FAILED" };
        println!("{name:16}{events:>8}{:>9}{interruptions:>15}  {result}", JOBS + 1);
    }
    for ClientResult { name, wrong, .. } in &results {
        for wrong in wrong {
            println!("{name}: {wrong}");
        }
    }
    let failed = results.iter().any(|result| !result.wrong.is_empty());
    if failed { Err(format!("failed; again by --seed {seed}")) } else { Ok(()) }
}
