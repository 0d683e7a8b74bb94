//! Appends an `info` event to a job, and tries until the server has stored it.
//!
//! `cargo run --example append -- JOB_ID TEXT`, with the secret of a provider's API key in
//! `MILEPOST_API_KEY`, and the address of a server other than 127.0.0.1:50051 in
//! `MILEPOST_SERVER`.

use std::{env, error::Error, time::Duration};

use milepost_client::{
    Client, is_transient,
    pb::{AppendEventsRequest, EventKind, NewEvent, append_events_request::Job},
};

const PAUSE: Duration = Duration::from_millis(200);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let job = arguments.next().ok_or("the first argument is the id of a job")?;
    let text = arguments.next().ok_or("the second argument is the text of the event")?;
    let server = env::var("MILEPOST_SERVER").unwrap_or_else(|_| "127.0.0.1:50051".to_owned());
    let client = Client::connect(&server).await?.with_credential(&env::var("MILEPOST_API_KEY")?)?;

    let event = NewEvent {
        // The id makes it safe to send the event again.
        id: uuid::Uuid::now_v7().to_string(),
        kind: EventKind::Info.into(),
        name: text,
        ..NewEvent::default()
    };
    let request =
        AppendEventsRequest { job: Some(Job::JobId(job)), events: vec![event], ..Default::default() };
    let appended = loop {
        match client.events().append_events(request.clone()).await {
            Ok(answer) => break answer.into_inner().events,
            Err(status) if is_transient(&status) => tokio::time::sleep(PAUSE).await,
            Err(status) => return Err(status.into()),
        }
    };
    for event in appended {
        println!("stored as event {} of the job", event.sequence);
    }
    Ok(())
}
