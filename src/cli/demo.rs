//! `milepost demo`: acts as the provider of a sample job, and shows the job as its
//! customer sees it.

use std::{env, io, net::SocketAddr, process::ExitCode, time::Duration};

use clap::{Args, builder::Resettable};
use console::style;
use futures_util::future::try_join_all;
use milepost_client::{
    Client,
    pb::{
        AppendEventsRequest, CreateJobRequest, EventKind, JobStatus, MetadataConfiguration, MetadataKind,
        NewEvent, RegisterJobConfigurationRequest, SignUpRequest, StepConfiguration, UserRole,
        append_events_request, create_job_request, create_watch_token_request, get_job_request,
    },
};
use prost_types::{Struct, Timestamp, Value};
use tokio::net::TcpListener;
use uuid::Uuid;

use super::{
    connection::{connect, page},
    database::{OpenDatabase, data_dir},
    events::append,
    exit::{self, EXIT_CODES},
    print_line,
    serve::{Server, bind, start_tls},
    share::link,
    watch::follow,
};
use crate::{
    config::{ClientTls, Config},
    db::embedded::Served,
    error::BoxError,
};

/// Variables that name the database and the server of other commands, and the demo's flags for
/// the same. The demo creates users and a job, and does so only where a flag says.
const NOT_READ: [(&str, &str); 2] = [("DATABASE_URL", "--database-url"), ("MILEPOST_SERVER", "--server")];

/// The server and the length of the demo. Its `--database-url` is read from no variable.
#[derive(Args, Clone, Debug)]
#[command(mut_arg("url", |url| url.env(Resettable::Reset)), after_help = EXIT_CODES)]
pub(super) struct Demo {
    /// Address of the server to use, as for `watch`; without it, the server of the data directory or a new
    /// one. The demo reads neither MILEPOST_SERVER nor DATABASE_URL
    #[arg(long, value_name = "HOST:PORT")]
    server: Option<String>,

    /// About how long the job takes, in seconds
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=3600))]
    seconds: u32,

    #[command(flatten)]
    tls: ClientTls,

    #[command(flatten)]
    config: Config,
}

impl Demo {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        let (address, own) = self.find_or_start().await?;
        let played = tokio::select! {
            played = self.play(&address, own.is_some()) => played,
            interrupted = tokio::signal::ctrl_c() => interrupted.map_err(BoxError::from).map(|()| ExitCode::FAILURE),
        };
        if let Some(server) = own {
            server.stop().await?;
        }
        played
    }

    /// A server's address, and the server itself if this process started it.
    async fn find_or_start(&self) -> Result<(String, Option<Server>), BoxError> {
        if let Some(server) = &self.server {
            return Ok((server.clone(), None));
        }
        if self.config.database.url().is_none() {
            note_unused_variables()?;
            let dir = data_dir(&self.config.database).await?;
            match Served::of(&dir) {
                Served::At(address) => return Ok((self.url(address)?, None)),
                Served::Starting => {
                    let why = format!("another milepost is starting on {}: try again", dir.display());
                    return Err(why.into());
                }
                Served::No => {}
            }
        }
        print_line(&format!("  {}", style("starting a server …").dim()))?;
        let tls = start_tls(&self.config).await?;
        OpenDatabase::ready(&self.config).await?;
        let server = Server::start(&self.config, tls, self.listen().await?).await?;
        Ok((self.url(server.address)?, Some(server)))
    }

    /// The URL of a server that has the TLS settings of this demo.
    fn url(&self, address: SocketAddr) -> Result<String, BoxError> {
        let scheme = if self.config.start.tls.is_on()? { "https" } else { "http" };
        Ok(format!("{scheme}://{address}"))
    }

    /// Listens on the address of the settings, or on a free port if that one is taken.
    async fn listen(&self) -> Result<TcpListener, BoxError> {
        let mut listen = self.config.start.listen;
        if TcpListener::bind(listen).await.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
            listen.set_port(0);
        }
        bind(listen).await
    }

    async fn play(&self, address: &str, own: bool) -> Result<ExitCode, BoxError> {
        let anonymous = connect(address, &self.tls).await?;
        let provider = DemoUser::sign_up(&anonymous, UserRole::Provider, "Ada", "Radiology").await?;
        let customer = DemoUser::sign_up(&anonymous, UserRole::Customer, "Grace", "Hospital").await?;
        register(&provider.client).await?;
        let length = Duration::from_secs(self.seconds.into());
        let earlier =
            (0..EARLIER_JOBS).map(|number| play_earlier(&provider.client, &customer.id, length, number));
        let shown = self.show(address, own, &provider, &customer, length);
        let (status, _) = tokio::try_join!(shown, try_join_all(earlier))?;
        Ok(exit::of_job(status))
    }

    /// Plays the job that is shown, and shows it.
    async fn show(
        &self,
        address: &str,
        own: bool,
        provider: &DemoUser,
        customer: &DemoUser,
        length: Duration,
    ) -> Result<JobStatus, BoxError> {
        if !length.is_zero() {
            let note = format!("playing {EARLIER_JOBS} jobs before it, so that its end can be estimated …");
            print_line(&format!("  {}", style(note).dim()))?;
            tokio::time::sleep(length * HEAD_START / 100).await;
        }
        let job_id = create_job(&provider.client, &customer.id, EARLIER_JOBS).await?;
        let page = page(address, &self.tls);
        let job = Some(create_watch_token_request::Job::JobId(job_id.clone()));
        let (link, _) = link(&provider.client, &page, job, Duration::from_secs(60 * 60), "demo").await?;
        let origin = if own { "started for this demo, stopped after it" } else { "found running" };
        print_line("")?;
        for (label, value, note) in [
            ("server", address, origin),
            ("provider", &provider.email, "creates a job and appends its events"),
            ("customer", &customer.email, "watches the job, as shown below"),
            ("browser", &link, ""),
        ] {
            print_line(&format!(
                "  {}  {value}  {}",
                style(format!("{label:<8}")).cyan(),
                style(note).dim()
            ))?;
        }

        let job = Some(get_job_request::Job::JobId(job_id.clone()));
        let watched = follow(&customer.client, job);
        let appended = append_events(&provider.client, &job_id, length, all_events());
        let (status, ()) = tokio::try_join!(watched, appended)?;
        print_line(&format!(
            "\n  {}\n  {}\n",
            style("Every event above was durable in Postgres before it was sent.").dim(),
            style("Next: start `milepost`, and follow the tour in README.md.").dim(),
        ))?;
        Ok(status)
    }
}

/// Says that the demo does not read variables that are set.
fn note_unused_variables() -> io::Result<()> {
    for (variable, flag) in NOT_READ {
        if env::var_os(variable).is_some_and(|value| !value.is_empty()) {
            let note =
                format!("{variable} is set and not used: the demo creates users, for which it needs {flag}");
            print_line(&format!("  {}", style(note).dim()))?;
        }
    }
    Ok(())
}

/// A user created for the demo.
struct DemoUser {
    id: String,
    email: String,
    client: Client,
}

impl DemoUser {
    async fn sign_up(anonymous: &Client, role: UserRole, first: &str, last: &str) -> Result<Self, BoxError> {
        let tag = Uuid::now_v7().simple().to_string();
        let short = tag.get(20..).unwrap_or_default();
        let request = SignUpRequest {
            role: role.into(),
            email: format!("{}-{short}@{}.example", first.to_lowercase(), last.to_lowercase()),
            password: format!("{:016x}{:016x}", getrandom::u64()?, getrandom::u64()?),
            first_name: first.to_owned(),
            last_name: last.to_owned(),
        };
        let email = request.email.clone();
        let answer = anonymous.auth().sign_up(request).await?.into_inner();
        let secret = answer.session.unwrap_or_default().secret;
        Ok(Self {
            id: answer.user.unwrap_or_default().id,
            email,
            client: anonymous.with_credential(&secret)?,
        })
    }
}

/// Registers the configuration.
async fn register(provider: &Client) -> Result<(), BoxError> {
    let configuration = RegisterJobConfigurationRequest {
        tag: "ct-analysis".to_owned(),
        name: "CT analysis".to_owned(),
        version: "1.0.0".to_owned(),
        steps: steps(),
        max_silence: None,
    };
    provider.configurations().register_job_configuration(configuration).await?;
    Ok(())
}

/// Creates the job of this number and returns its id.
async fn create_job(provider: &Client, customer_id: &str, number: u32) -> Result<String, BoxError> {
    let job = CreateJobRequest {
        provider_job_id: format!("ct-{:08x}", getrandom::u32()?),
        customer: Some(create_job_request::Customer::CustomerId(customer_id.to_owned())),
        configuration_tag: "ct-analysis".to_owned(),
        configuration_version: String::new(),
        provider_job_name: format!("Thorax, slice {}", 30 + number),
        max_silence: None,
        labels: [("scanner", "ct-2"), ("ward", "3b")].map(|(key, value)| (key.into(), value.into())).into(),
    };
    let created = provider.jobs().create_job(job).await?;
    Ok(created.into_inner().job.unwrap_or_default().id)
}

/// The job's steps; their points are their expected shares of the work.
fn steps() -> Vec<StepConfiguration> {
    use MetadataKind::{Link, Number, Text};
    let step = |tag: &str, name: &str, points, metadata: &[(&str, MetadataKind, &str)]| StepConfiguration {
        tag: tag.to_owned(),
        name: name.to_owned(),
        points,
        metadata: metadata
            .iter()
            .map(|&(name, kind, units)| MetadataConfiguration {
                name: name.to_owned(),
                kind: kind.into(),
                units: units.to_owned(),
                ..MetadataConfiguration::default()
            })
            .collect(),
        ..StepConfiguration::default()
    };
    vec![
        step(
            "load",
            "Load the slice",
            5,
            &[("columns", Number, "px"), ("rows", Number, "px"), ("spacing", Number, "mm")],
        ),
        step(
            "calibrate",
            "Calibrate to Hounsfield units",
            10,
            &[("highest", Number, "HU"), ("lowest", Number, "HU")],
        ),
        step("segment", "Segment the lungs", 45, &[("area", Number, "cm²"), ("threshold", Number, "HU")]),
        step("measure", "Measure", 30, &[("largest nodule", Number, "mm"), ("mean density", Number, "HU")]),
        step("report", "Write the report", 10, &[("report", Link, ""), ("signed by", Text, "")]),
    ]
}

/// Jobs that are played before the one that is shown: an estimate rests on ten at least.
const EARLIER_JOBS: u32 = 12;
/// How much earlier they begin, in percent of the demo's length. All are complete when the long
/// step of the shown job ends.
const HEAD_START: u32 = 80;

/// An event of the demo: when it is appended, in percent of the demo's length, then
/// its kind, its step's tag, its name and its metadata.
type DemoEvent = (u32, EventKind, &'static str, &'static str, Vec<(&'static str, Value)>);

/// The step that takes longest, with the shares of the demo's length at which it begins and
/// ends. Events of kind progress move it in between.
const LONG_STEP: (&str, u32, u32) = ("segment", 18, 42);

fn demo_events() -> [DemoEvent; 9] {
    use EventKind::{Complete, Error, Info, Step};
    let number = |name, value: f64| (name, Value::from(value));
    let text = |name, value: &str| (name, Value::from(value));
    [
        (4, Step, "load", "", vec![number("rows", 512.0), number("columns", 512.0), number("spacing", 0.74)]),
        (12, Step, "calibrate", "", vec![number("lowest", -1024.0), number("highest", 1371.0)]),
        (18, Info, "segment", "Growing regions from 2 seeds", vec![]),
        (42, Step, "segment", "", vec![number("area", 412.6), number("threshold", -320.0)]),
        (52, Info, "measure", "3 nodules found", vec![]),
        (60, Error, "measure", "Accelerator lost, going on without it", vec![number("attempt", 1.0)]),
        (82, Step, "measure", "", vec![number("mean density", -742.3), number("largest nodule", 6.4)]),
        (
            94,
            Step,
            "report",
            "",
            vec![text("report", "https://radiology.example/reports/42"), text("signed by", "Dr. Ada")],
        ),
        (100, Complete, "", "Analysis complete", vec![]),
    ]
}

/// The events of the demo with those that move its long step, each with the step's percent.
fn all_events() -> Vec<(DemoEvent, Option<i32>)> {
    let (long_step, begins, ends) = LONG_STEP;
    let moves = (begins + 1..ends).map(|share| {
        let percent = i32::try_from((share - begins) * 100 / (ends - begins)).ok();
        ((share, EventKind::Progress, long_step, "", Vec::new()), percent)
    });
    let mut all: Vec<_> = demo_events().into_iter().map(|event| (event, None)).chain(moves).collect();
    all.sort_by_key(|((share, ..), _)| *share);
    all
}

/// Plays a job before the one that is shown. No two of them take the same time.
async fn play_earlier(
    provider: &Client,
    customer_id: &str,
    length: Duration,
    number: u32,
) -> Result<(), BoxError> {
    let job_id = create_job(provider, customer_id, number).await?;
    let length = length * (85 + 3 * number) / 100;
    append_events(provider, &job_id, length, demo_events().map(|event| (event, None))).await
}

/// Appends these events, spread over `length`.
async fn append_events(
    provider: &Client,
    job_id: &str,
    length: Duration,
    all: impl IntoIterator<Item = (DemoEvent, Option<i32>)>,
) -> Result<(), BoxError> {
    let mut events = provider.events();
    let start = tokio::time::Instant::now();
    for ((share, kind, step, name, metadata), step_percent) in all {
        tokio::time::sleep_until(start + length * share / 100).await;
        let fields = metadata.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let event = NewEvent {
            id: Uuid::now_v7().to_string(),
            kind: kind.into(),
            name: name.to_owned(),
            step_tag: step.to_owned(),
            metadata: Some(Struct { fields }),
            occurred_at: Some(Timestamp::from(std::time::SystemTime::now())),
            step_percent,
        };
        let request = AppendEventsRequest {
            job: Some(append_events_request::Job::JobId(job_id.to_owned())),
            expected_sequence: None,
            events: vec![event],
        };
        append(&mut events, &request, Duration::MAX).await?;
    }
    Ok(())
}
