//! A job on a server, as the arguments of a command name it.

use clap::Args;
use milepost_client::{Client, pb::get_job_request};

use super::{connect, page};
use crate::{config::ClientTls, error::BoxError};

/// The job, its server and the credential of the caller.
#[derive(Args, Clone, Debug)]
pub(super) struct JobArguments {
    /// Id of the job
    job: String,

    /// Take JOB as the provider_job_id, the provider's own id of the job
    #[arg(long)]
    provider_job_id: bool,

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
    /// Secret of the caller's API key or session, or for `watch` of a watch token; required. All users of
    /// this machine can read the arguments of a process: prefer the variable
    #[arg(long, env = "MILEPOST_API_KEY", hide_env_values = true, value_name = "SECRET")]
    api_key: Option<String>,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credential(…)")
    }
}

impl JobArguments {
    pub(super) fn job(&self) -> get_job_request::Job {
        if self.provider_job_id {
            get_job_request::Job::ProviderJobId(self.job.clone())
        } else {
            get_job_request::Job::JobId(self.job.clone())
        }
    }

    /// The credential; none if it is not set.
    pub(super) fn secret(&self) -> Option<&str> {
        // A variable of a container or a unit file is often set to nothing instead of unset.
        self.credential.api_key.as_deref().filter(|secret| !secret.is_empty())
    }

    /// The URL of the server's page.
    pub(super) fn page(&self) -> String {
        page(&self.server, &self.tls)
    }

    /// A client with this credential.
    pub(super) async fn connect(&self, secret: &str) -> Result<Client, BoxError> {
        Ok(connect(&self.server, &self.tls).await?.with_credential(secret)?)
    }
}
