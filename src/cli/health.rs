//! `milepost health`: asks a server for its health, for the probes of containers and for scripts.

use std::{error::Error as _, process::ExitCode, time::Duration};

use clap::Args;
use tokio::time::timeout;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{clean, connect, one_line, print_line};
use crate::{config::ClientTls, error::BoxError};

/// Longest that the connection and the answer may take together.
const TIMEOUT: Duration = Duration::from_secs(10);
const EXIT_CODES: &str = "Exit codes:
  0  the server is serving
  1  the server is not serving, or does not answer within 10 seconds
  2  a wrong command line";

/// The server, and whose health is asked for.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Health {
    /// Address of the server, as for `watch`
    #[arg(long, env = "MILEPOST_SERVER", default_value = "127.0.0.1:50051", value_name = "HOST:PORT")]
    server: String,

    /// `liveness` to ask whether the process runs, even without its database; without it, whether the server
    /// is ready for calls
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME")]
    service: String,

    #[command(flatten)]
    tls: ClientTls,
}

impl Health {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        let silent = || format!("the server at {} does not answer within {TIMEOUT:?}", self.server);
        // A text as the error of each failure gives all of them the exit code 1: engines of
        // containers know 0 and 1 only.
        match timeout(TIMEOUT, self.check()).await.unwrap_or_else(|_| Err(silent()))? {
            ServingStatus::Serving => print_line("serving")?,
            ServingStatus::NotServing | ServingStatus::Unknown | ServingStatus::ServiceUnknown => {
                return Err(format!("the server at {} is not serving", self.server).into());
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn check(&self) -> Result<ServingStatus, String> {
        let client = connect(&self.server, &self.tls).await.map_err(|error| one_line(error.as_ref()))?;
        let request = HealthCheckRequest { service: self.service.clone() };
        match HealthClient::new(client.service()).check(request).await {
            Ok(answer) => Ok(answer.into_inner().status()),
            Err(status) => {
                let why = status.source().map_or_else(|| clean(status.message()), one_line);
                Err(format!("the server at {} does not tell its health: {why}", self.server))
            }
        }
    }
}
