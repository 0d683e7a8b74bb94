//! What the commands that call a server have in common: its address, the credential, and the
//! job that a command names.

use clap::Args;
use milepost_client::{Client, server_url};

use super::{exit::WrongInput, output::Output};
use crate::{config::ClientTls, error::BoxError};

/// The server, and the credential of the caller.
#[derive(Args, Clone, Debug)]
pub(super) struct Connection {
    /// Address of the server; https:// encrypts, http:// does not; without either, milepost encrypts unless
    /// the address is loopback and no TLS flag is set
    #[arg(long, env = "MILEPOST_SERVER", default_value = "127.0.0.1:50051", value_name = "HOST:PORT")]
    server: String,

    #[command(flatten)]
    credential: Credential,

    #[command(flatten)]
    tls: ClientTls,
}

/// The caller's secret, in a type of its own whose `Debug` does not print it.
#[derive(Args, Clone)]
struct Credential {
    /// Secret of the caller's API key, session or watch token; required. All users of this machine can read
    /// the arguments of a process: prefer the variable
    #[arg(long, env = "MILEPOST_API_KEY", hide_env_values = true, value_name = "SECRET")]
    api_key: Option<String>,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credential(…)")
    }
}

impl Connection {
    /// A client with the credential. [`WrongInput`] if there is none.
    pub(super) async fn connect(&self) -> Result<Client, BoxError> {
        // A variable of a container or a unit file is often set to nothing instead of unset.
        let Some(secret) = self.credential.api_key.as_deref().filter(|secret| !secret.is_empty()) else {
            let what_to_do = "no credential: set the variable MILEPOST_API_KEY (or --api-key) to the secret of an \
                              API key or a session, or to watch one job, of a watch token";
            return Err(WrongInput(what_to_do.to_owned()).into());
        };
        Ok(connect(&self.server, &self.tls).await?.with_credential(secret)?)
    }

    /// The URL of the server's page.
    pub(super) fn page(&self) -> String {
        page(&self.server, &self.tls)
    }
}

/// Connects to the server of a command's flags, without a credential.
pub async fn connect(server: &str, tls: &ClientTls) -> Result<Client, BoxError> {
    Ok(match tls.load().await? {
        None => Client::connect(server).await?,
        Some(tls) => Client::connect_with_tls(server, tls).await?,
    })
}

/// The URL of a server's page.
pub(super) fn page(server: &str, tls: &ClientTls) -> String {
    server_url(server, *tls != ClientTls::default()).map_or_else(|| server.to_owned(), |url| url.to_string())
}

/// What each command takes that prints the answers of a server.
#[derive(Args, Clone, Debug)]
pub(super) struct Api {
    #[command(flatten)]
    pub(super) output: Output,

    #[command(flatten)]
    pub(super) connection: Connection,
}

impl Api {
    pub(super) async fn connect(&self) -> Result<Client, BoxError> {
        self.connection.connect().await
    }
}

/// The job that a command is about.
#[derive(Args, Clone, Debug)]
pub(super) struct JobArgument {
    /// Id of the job
    job: String,

    /// Take JOB as the provider_job_id, the provider's own id of the job
    #[arg(long)]
    provider_job_id: bool,
}

impl JobArgument {
    /// The job as a request names it: by one of the two variants of the request's oneof.
    pub(super) fn key<T>(&self, by_id: fn(String) -> T, by_provider_job_id: fn(String) -> T) -> Option<T> {
        let variant = if self.provider_job_id { by_provider_job_id } else { by_id };
        Some(variant(self.job.clone()))
    }
}
