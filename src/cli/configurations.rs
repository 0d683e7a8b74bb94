//! `milepost configurations`: lists, shows and registers configurations.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Subcommand};
use milepost_client::pb::{
    GetJobConfigurationRequest, JobConfiguration, ListJobConfigurationsRequest, MetadataConfiguration,
    RegisterJobConfigurationRequest, StepConfiguration, get_job_configuration_request::Key,
};

use super::{
    connection::Api,
    exit::WrongInput,
    output::{Output, Row, seconds, short, time},
    print_line, values,
};
use crate::{error::BoxError, limits::MESSAGE_BYTES};

/// Lists, shows and registers job configurations.
#[derive(Args, Clone, Debug)]
pub(super) struct Configurations {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// List the latest version of each of your configurations, or all versions of one
    List(List),
    /// Show a configuration with its steps and their metadata
    Get(Get),
    /// Register a version of a configuration, from a file
    Register(Register),
}

#[derive(Args, Clone, Debug)]
struct List {
    /// List all versions of this tag, the highest first
    #[arg(long, default_value = "", hide_default_value = true)]
    tag: String,

    /// Most configurations to list [default: all]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,

    #[command(flatten)]
    api: Api,
}

#[derive(Args, Clone, Debug)]
struct Get {
    /// Tag of the configuration
    configuration: String,

    /// Take CONFIGURATION as the id of the configuration
    #[arg(long, conflicts_with = "version")]
    id: bool,

    /// Version of the configuration [default: the latest]
    #[arg(long, default_value = "", hide_default_value = true)]
    version: String,

    #[command(flatten)]
    api: Api,
}

#[derive(Args, Clone, Debug)]
struct Register {
    /// A JobConfiguration in JSON or YAML; - is standard input. What begins with { is JSON
    file: PathBuf,

    #[command(flatten)]
    api: Api,
}

impl Configurations {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        match self.command {
            Command::List(command) => command.run().await?,
            Command::Get(command) => command.run().await?,
            Command::Register(command) => command.run().await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl List {
    async fn run(self) -> Result<(), BoxError> {
        let mut configurations = self.api.connect().await?.configurations();
        let list = self.api.output.list(&["ID", "TAG", "VERSION", "STEPS", "CREATED", "NAME"], row);
        let page = async |page_size, page_token| {
            let request = ListJobConfigurationsRequest { tag: self.tag.clone(), page_size, page_token };
            let page = configurations.list_job_configurations(request).await?.into_inner();
            Ok((page.job_configurations, page.next_page_token))
        };
        list.print_pages(self.limit, page).await
    }
}

impl Get {
    async fn run(self) -> Result<(), BoxError> {
        let key = if self.id { Key::Id } else { Key::Tag };
        let request =
            GetJobConfigurationRequest { key: Some(key(self.configuration)), version: self.version };
        let mut configurations = self.api.connect().await?.configurations();
        let answer = configurations.get_job_configuration(request).await?.into_inner();
        let configuration = answer.job_configuration.as_ref();
        self.api.output.answer(&answer, fields(configuration, false))?;
        print_steps(self.api.output, configuration)
    }
}

impl Register {
    async fn run(&self) -> Result<(), BoxError> {
        let JobConfiguration { tag, name, version, steps, max_silence, .. } = read(&self.file)?;
        let request = RegisterJobConfigurationRequest { tag, name, version, steps, max_silence };
        let mut configurations = self.api.connect().await?.configurations();
        let answer = configurations.register_job_configuration(request).await?.into_inner();
        let configuration = answer.job_configuration.as_ref();
        self.api.output.answer(&answer, fields(configuration, answer.existed))?;
        print_steps(self.api.output, configuration)
    }
}

fn read(file: &Path) -> Result<JobConfiguration, BoxError> {
    let wrong = |error: String| WrongInput(format!("{}: {error}", file.display()));
    let (mut text, most) = (String::new(), MESSAGE_BYTES + 1);
    let mut input = values::open(file)?.take(u64::try_from(most)?);
    input.read_to_string(&mut text).map_err(|error| wrong(error.to_string()))?;
    if text.len() == most {
        return Err(wrong(format!("is longer than {MESSAGE_BYTES} bytes")).into());
    }
    let parse = if text.trim_start().starts_with('{') { values::from_json } else { values::from_yaml };
    Ok(parse(&text).map_err(wrong)?)
}

fn row(configuration: &JobConfiguration) -> Row {
    vec![
        configuration.id.clone(),
        configuration.tag.clone(),
        configuration.version.clone(),
        configuration.steps.len().to_string(),
        time(configuration.created_at),
        configuration.name.clone(),
    ]
}

fn fields(configuration: Option<&JobConfiguration>, existed: bool) -> Vec<(&'static str, String)> {
    let Some(configuration) = configuration else { return Vec::new() };
    vec![
        ("id", configuration.id.clone()),
        ("existed", if existed { "yes".to_owned() } else { String::new() }),
        ("tag", configuration.tag.clone()),
        ("version", configuration.version.clone()),
        ("name", configuration.name.clone()),
        ("longest silence", seconds(configuration.max_silence)),
        ("created", time(configuration.created_at)),
    ]
}

/// Prints the table of a configuration's steps; nothing for scripts, for whom the message has
/// them.
fn print_steps(output: Output, configuration: Option<&JobConfiguration>) -> Result<(), BoxError> {
    let steps = configuration.map_or(&[][..], |configuration| &configuration.steps);
    if output.is_json() || steps.is_empty() {
        return Ok(());
    }
    print_line("")?;
    let step = |step: &StepConfiguration| {
        let metadata: Vec<String> = step.metadata.iter().map(metadata).collect();
        vec![step.tag.clone(), step.points.to_string(), step.name.clone(), metadata.join(", ")]
    };
    output.list(&["STEP", "POINTS", "NAME", "METADATA"], step).print(steps)
}

/// Name, kind and units of a step's metadata.
fn metadata(metadata: &MetadataConfiguration) -> String {
    let kind = short(metadata.kind().as_str_name(), "METADATA_KIND_");
    let text = format!("{} ({kind} {}", metadata.name, metadata.units);
    format!("{})", text.trim_end())
}
