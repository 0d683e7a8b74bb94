//! Publishes each line of standard input as an `info` event of a job.
//!
//! `cargo run --example publish -- JOB_ID [FOLDER]`, with the secret of a provider's API key in
//! `MILEPOST_API_KEY`, and the address of a server other than 127.0.0.1:50051 in
//! `MILEPOST_SERVER`. With a folder, the events are kept in a spool there until they are
//! stored, so that the example also works without a server. After the customer of the job has
//! asked to stop it, the example reads no further line.

use std::{
    env,
    error::Error,
    io::{self, BufRead as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use milepost_client::{
    Client, SpoolSettings,
    pb::{EventKind, NewEvent, append_events_request::Job},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let job = Job::JobId(arguments.next().ok_or("the first argument is the id of a job")?);
    let server = env::var("MILEPOST_SERVER").unwrap_or_else(|_| "127.0.0.1:50051".to_owned());
    let client =
        Client::connect_lazy(&server, None).await?.with_credential(&env::var("MILEPOST_API_KEY")?)?;

    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let mut settings = client
        .publisher()
        .on_stored(|_, event| println!("stored as event {} of the job", event.sequence))
        .on_refused(|refusal| eprintln!("refused: {}", refusal.error))
        .on_interruption(|error, pause| eprintln!("again in {pause:.1?}: {error}"))
        .on_cancellation_requested(move |_, _| {
            eprintln!("the customer asks to stop");
            told.store(true, Relaxed);
        });
    if let Some(folder) = arguments.next() {
        settings = settings.spool(SpoolSettings::new(folder).open()?);
    }
    let publisher = settings.start();
    for line in io::stdin().lock().lines() {
        if stop.load(Relaxed) {
            break;
        }
        let event = NewEvent { kind: EventKind::Info.into(), name: line?, ..NewEvent::default() };
        publisher.append(job.clone(), event).await?;
    }
    publisher.close().await?;
    Ok(())
}
